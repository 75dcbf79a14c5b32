//! How soon a revocation reaches others: from its commit to the listeners, at hundreds of revocations a second.

use std::collections::HashMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::TcpStream;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use hdrhistogram::Histogram;
use serde_json::Value;
use tokio_postgres::AsyncMessage;
use tollgate_tests::{Cluster, DATABASE, Tollgated, eventually};

use super::part::{Outcome, Part, Run, part_with_daemon};
use crate::clients::socket;
use crate::measure::{Series, histogram, percentile};
use crate::report::{Figure, Unit};
use crate::service::{self, OPERATOR};
use crate::tokens::{Tokens, id};
use crate::wire::Connection;

pub(super) const PART: Part =
    part_with_daemon("latency", "from a revocation's commit to those who listen", run);

/// Revocations a second, of all sessions together.
const RATE: u32 = 500;
/// A single session would wait for the disk at each.
const SESSIONS: u32 = 4;
/// A subscriber that has not received it by then never will.
const DEADLINE: Duration = Duration::from_secs(30);

/// When each revocation's commit was acknowledged, or when a subscriber received it.
type Moments = HashMap<String, Instant>;

fn run(run: &Run<'_>) -> Result<Outcome> {
    let seconds = run.scale.turn.as_secs_f64() * 2.0;
    let in_a_round = ((f64::from(RATE) * seconds) as u32).max(SESSIONS);
    let tokens = Tokens::new((run.scale.rounds + 1) * in_a_round)?;
    let cluster = service::with_tokens(
        // NOTIFY serialises commits: waiting 2 ms for a disk each, there could be no 500 in a second.
        service::builder(run.install, 1).setting("synchronous_commit", "off"),
        &tokens,
    )?;
    let mut command = Tollgated::command(&cluster.url(OPERATOR, DATABASE))?;
    command.args(["run", "--log-format=json", "--api-address=127.0.0.1:0"]);
    let daemon = Tollgated::spawn_command(&mut command)?;
    let subscribers = [listen(&cluster)?, read_stream(&cluster, &daemon)?];
    let mut revokers = (0..SESSIONS)
        .map(|_| {
            Connection::prepare(
                &socket(&cluster),
                "postgres",
                DATABASE,
                &["select tollgate.revoke_api_token($1)"],
            )
        })
        .collect::<Result<Vec<_>>>()?;
    // For each subscriber.
    let (mut median, mut tail) =
        ([Series::default(), Series::default()], [Series::default(), Series::default()]);
    let mut made = Series::default();
    for round in 0..=run.scale.rounds {
        let numbers: Vec<u32> = (round * in_a_round..(round + 1) * in_a_round).collect();
        let (committed, rate) = revoke(&mut revokers, &numbers)?;
        for (subscriber, (median, tail)) in subscribers.iter().zip(median.iter_mut().zip(&mut tail)) {
            let times = delays(&committed, &subscriber.receive(committed.len())?)?;
            // The first warms up.
            if round > 0 {
                median.0.push(percentile(&times, 0.5) / 1000.0);
                tail.0.push(percentile(&times, 0.99) / 1000.0);
            }
        }
        if round > 0 {
            made.0.push(rate);
        }
    }
    Ok(Outcome {
        conditions: vec![
            format!("{RATE} revocations a second by {SESSIONS} sessions, {in_a_round} a round"),
            "a session that listens, and a reader of tollgated's /events".to_owned(),
            "from when the session that revokes has the commit's acknowledgement; what was heard before counts as 0".to_owned(),
            service::conditions(&cluster)?,
        ],
        figures: vec![
            Figure::new("revocation to SQL listener, p99", Unit::Milliseconds, &tail[0]).at_most(10.0),
            Figure::new("revocation to event stream, p99", Unit::Milliseconds, &tail[1]).at_most(20.0),
            Figure::new("revocation to SQL listener, p50", Unit::Milliseconds, &median[0]),
            Figure::new("revocation to event stream, p50", Unit::Milliseconds, &median[1]),
            // Otherwise the latency is that of a lower load.
            Figure::new("revocations made", Unit::PerSecond, &made).at_least(f64::from(RATE) * 0.95),
        ],
    })
}

/// Revokes these tokens at [`RATE`], and returns when each was acknowledged, and the actual rate.
fn revoke(revokers: &mut [Connection], numbers: &[u32]) -> Result<(Moments, f64)> {
    let begin = Instant::now();
    let sessions = revokers.len();
    thread::scope(|scope| {
        let workers: Vec<_> = revokers
            .iter_mut()
            .enumerate()
            .map(|(session, connection)| {
                scope.spawn(move || -> Result<Vec<(String, Instant)>> {
                    let mut acknowledged = Vec::new();
                    for position in (session..numbers.len()).step_by(sessions) {
                        let due = begin + Duration::from_secs_f64(position as f64 / f64::from(RATE));
                        thread::sleep(due.saturating_duration_since(Instant::now()));
                        let id = id(numbers[position]).to_string();
                        connection.execute("0", &[&id], b"t")?;
                        acknowledged.push((id, Instant::now()));
                    }
                    Ok(acknowledged)
                })
            })
            .collect();
        let mut moments = Moments::new();
        for worker in workers {
            moments.extend(worker.join().expect("a failing session returns an error")?);
        }
        Ok((moments, numbers.len() as f64 / begin.elapsed().as_secs_f64()))
    })
}

/// How long after its commit each was received, in nanoseconds.
fn delays(committed: &Moments, received: &Moments) -> Result<Histogram<u64>> {
    let mut times = histogram();
    for (token, committed) in committed {
        let received =
            received.get(token).with_context(|| format!("the revocation of {token} was not received"))?;
        times.record(u64::try_from(received.saturating_duration_since(*committed).as_nanos())?)?;
    }
    Ok(times)
}

/// A subscriber to revocations, and when it received each.
struct Subscriber {
    heard: Receiver<(String, Instant)>,
}

impl Subscriber {
    /// Waits for a number of events.
    fn receive(&self, count: usize) -> Result<Moments> {
        let mut moments = Moments::new();
        while moments.len() < count {
            let (token, moment) = self.heard.recv_timeout(DEADLINE).context("waited in vain for an event")?;
            moments.insert(token, moment);
        }
        Ok(moments)
    }
}

/// A session that has issued LISTEN. It ends with the cluster.
fn listen(cluster: &Cluster) -> Result<Subscriber> {
    let (sender, heard) = channel();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (client, mut messages) = runtime.block_on(cluster.listen("postgres", DATABASE))?;
    runtime.block_on(client.batch_execute("listen tollgate_events"))?;
    thread::spawn(move || {
        let _listens = client;
        while let Some(message) = runtime.block_on(messages.recv()) {
            let AsyncMessage::Notification(notification) = message else { continue };
            let Some(token) = token_of(notification.payload()) else { continue };
            if sender.send((token, Instant::now())).is_err() {
                return;
            }
        }
    });
    Ok(Subscriber { heard })
}

/// A reader of the daemon's event stream. It ends with the daemon.
fn read_stream(cluster: &Cluster, daemon: &Tollgated) -> Result<Subscriber> {
    cluster.execute(DATABASE, "select tollgate.define_scope('tollgate:events', 'Read events')")?;
    let issue = "select token from tollgate.create_api_token('reader', 'reader', '{tollgate:events}')";
    let token = cluster.value(DATABASE, issue)?.context("a token")?;
    let mut address = None;
    eventually(DEADLINE, "the daemon to serve HTTP", || {
        address = daemon.address("api");
        address.is_some()
    });
    let mut stream = TcpStream::connect(address.context("an address")?)?;
    write!(stream, "GET /events HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\n\r\n")?;
    let mut lines = BufReader::new(stream);
    let mut line = String::new();
    lines.read_line(&mut line)?;
    ensure!(line.starts_with("HTTP/1.1 200 "), "/events answered {line:?}");
    // The first line of the stream, sent once it has its place in the log.
    while !line.starts_with("retry: ") {
        line.clear();
        ensure!(lines.read_line(&mut line)? > 0, "the stream ended");
    }
    let (sender, heard) = channel();
    thread::spawn(move || {
        for line in lines.lines().map_while(Result::ok) {
            let Some(token) = line.strip_prefix("data: ").and_then(token_of) else { continue };
            if sender.send((token, Instant::now())).is_err() {
                return;
            }
        }
    });
    Ok(Subscriber { heard })
}

fn token_of(payload: &str) -> Option<String> {
    serde_json::from_str::<Value>(payload).ok()?.get("token_id")?.as_str().map(str::to_owned)
}
