//! Connections under load: one statement repeatedly, with a random token each time.

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use hdrhistogram::Histogram;
use tollgate_tests::Cluster;

use crate::measure::histogram;
use crate::tokens::{Random, Tokens};
use crate::wire::Connection;

/// The scope that every verification requires, and the client address.
pub(crate) const REQUIRED: &str = "{posts:read}";
pub(crate) const ADDRESS: &str = "203.0.113.7";

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Takes {
    Nothing,
    Token,
    /// And what it is checked for: [`REQUIRED`] and [`ADDRESS`].
    TokenAndChecks,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Statement {
    pub(crate) sql: &'static str,
    pub(crate) takes: Takes,
    /// The expected first column of its one row.
    pub(crate) expected: &'static [u8],
}

/// Connected once, like the connections of a pool. A new backend takes a page fault for each page of shared memory that
/// it touches first, which with random ones of a million tokens would be most of what is measured.
pub(crate) struct Clients<'a> {
    connections: Vec<Connection>,
    statements: &'a [Statement],
}

/// What all connections did in one turn.
pub(crate) struct Done {
    pub(crate) executions: u64,
    pub(crate) seconds: f64,
    /// Nanoseconds, of all backends together.
    pub(crate) backend_cpu: Option<u64>,
}

impl Done {
    pub(crate) fn rate(&self) -> f64 {
        self.executions as f64 / self.seconds
    }

    /// Microseconds of the server's processor time per execution.
    pub(crate) fn cost(&self) -> f64 {
        self.backend_cpu.map_or(f64::NAN, |cpu| cpu as f64 / self.executions as f64 / 1000.0)
    }
}

impl<'a> Clients<'a> {
    pub(crate) fn connect(
        cluster: &Cluster,
        role: &str,
        database: &str,
        count: usize,
        statements: &'a [Statement],
    ) -> Result<Self> {
        let sql: Vec<&str> = statements.iter().map(|statement| statement.sql).collect();
        let connections = (0..count)
            .map(|_| Connection::prepare(&socket(cluster), role, database, &sql))
            .collect::<Result<_>>()?;
        Ok(Self { connections, statements })
    }

    /// Runs SQL on each of the connections.
    pub(crate) fn each(&mut self, sql: &str) -> Result<()> {
        self.connections.iter_mut().try_for_each(|connection| connection.simple(sql).map(drop))
    }

    /// Runs a statement once with each of the tokens.
    pub(crate) fn warm_up(
        &mut self,
        statement: usize,
        tokens: &Tokens,
        share: std::ops::Range<usize>,
    ) -> Result<()> {
        let Statement { takes, expected, .. } = self.statements[statement];
        let name = statement.to_string();
        let workers = self.connections.len();
        self.all(|number, connection| {
            for index in share.clone().skip(number).step_by(workers) {
                connection.execute(&name, parameters(takes, tokens.get(index)).as_slice(), expected)?;
            }
            Ok(())
        })?;
        Ok(())
    }

    /// Runs a statement on all connections for a while, each time with one of the tokens, if it takes any.
    pub(crate) fn run(&mut self, length: Duration, statement: usize, tokens: &Tokens) -> Result<Done> {
        let Statement { takes, expected, .. } = self.statements[statement];
        let name = statement.to_string();
        self.repeat(length, |_, connection, random| {
            connection.execute(&name, parameters(takes, tokens.random(random)).as_slice(), expected)
        })
    }

    /// Repeats some work on all connections for a while. It is given the number of the connection.
    pub(crate) fn repeat(
        &mut self,
        length: Duration,
        work: impl Fn(usize, &mut Connection, &mut Random) -> Result<()> + Sync,
    ) -> Result<Done> {
        let (start, stop) = (Barrier::new(self.connections.len() + 1), AtomicBool::new(false));
        let repeat = |number: usize, connection: &mut Connection| {
            connection.share_processor(number);
            start.wait();
            let before = connection.backend_cpu();
            let mut random = Random::new();
            let mut executions = 0;
            while !stop.load(Ordering::Relaxed) {
                work(number, connection, &mut random)?;
                executions += 1;
            }
            Ok((executions, connection.backend_cpu().zip(before).map(|(after, before)| after - before)))
        };
        thread::scope(|scope| {
            let clock = scope.spawn(|| {
                start.wait();
                let begin = Instant::now();
                thread::sleep(length);
                stop.store(true, Ordering::Relaxed);
                begin
            });
            let counts = Self::all_of(&mut self.connections, repeat)?;
            let begin = clock.join().expect("a clock does not fail");
            Ok(Done {
                executions: counts.iter().map(|(executions, _)| executions).sum(),
                seconds: begin.elapsed().as_secs_f64(),
                backend_cpu: counts.iter().map(|(_, cpu)| *cpu).sum(),
            })
        })
    }

    /// The latency of each execution, in nanoseconds, at a total rate per second on all connections together, until
    /// `stop`. An execution that cannot start on time, because the previous one still runs, is measured from its actual
    /// start. With `None` the rate is unlimited.
    pub(crate) fn latencies(
        &mut self,
        rate: Option<f64>,
        stop: &AtomicBool,
        statement: usize,
        tokens: &Tokens,
    ) -> Result<Histogram<u64>> {
        let Statement { takes, expected, .. } = self.statements[statement];
        let name = statement.to_string();
        let pause = rate.map(|rate| Duration::from_secs_f64(self.connections.len() as f64 / rate));
        let shares = self.all(|_, connection| {
            // Tail latency depends on what else runs on the processor, and on a dedicated one nothing would.
            connection.leave_to_scheduler();
            let mut random = Random::new();
            let mut times = histogram();
            let mut due = Instant::now();
            while !stop.load(Ordering::Relaxed) {
                let token = tokens.random(&mut random);
                let mut begin = Instant::now();
                if let Some(pause) = pause {
                    due += pause;
                    match due.checked_duration_since(begin) {
                        Some(early) => {
                            thread::sleep(early);
                            begin = Instant::now();
                        }
                        None => begin = due,
                    }
                }
                connection.execute(&name, parameters(takes, token).as_slice(), expected)?;
                times.record(u64::try_from(begin.elapsed().as_nanos())?)?;
            }
            Ok(times)
        })?;
        let mut all = histogram();
        shares.iter().try_for_each(|share| all.add(share))?;
        Ok(all)
    }

    /// [`Clients::latencies`] for a fixed time.
    pub(crate) fn latencies_for(
        &mut self,
        length: Duration,
        rate: Option<f64>,
        statement: usize,
        tokens: &Tokens,
    ) -> Result<Histogram<u64>> {
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(length);
                stop.store(true, Ordering::Relaxed);
            });
            self.latencies(rate, &stop, statement, tokens)
        })
    }

    fn all<T: Send>(&mut self, work: impl Fn(usize, &mut Connection) -> Result<T> + Sync) -> Result<Vec<T>> {
        Self::all_of(&mut self.connections, work)
    }

    fn all_of<T: Send>(
        connections: &mut [Connection],
        work: impl Fn(usize, &mut Connection) -> Result<T> + Sync,
    ) -> Result<Vec<T>> {
        thread::scope(|scope| {
            let workers: Vec<_> = connections
                .iter_mut()
                .enumerate()
                .map(|(number, connection)| {
                    let work = &work;
                    scope.spawn(move || work(number, connection))
                })
                .collect();
            workers
                .into_iter()
                .map(|worker| worker.join().expect("a failing client returns an error"))
                .collect()
        })
    }
}

pub(crate) fn socket(cluster: &Cluster) -> std::path::PathBuf {
    cluster.socket_dir().join(format!(".s.PGSQL.{}", cluster.port()))
}

/// The first `n` of these, so that nothing is allocated per execution.
struct Parameters<'a>([&'a str; 3], usize);

impl Parameters<'_> {
    fn as_slice(&self) -> &[&str] {
        &self.0[..self.1]
    }
}

fn parameters(takes: Takes, token: &str) -> Parameters<'_> {
    let count = match takes {
        Takes::Nothing => 0,
        Takes::Token => 1,
        Takes::TokenAndChecks => 3,
    };
    Parameters([token, REQUIRED, ADDRESS], count)
}
