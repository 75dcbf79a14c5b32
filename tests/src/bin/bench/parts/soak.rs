//! Full load for minutes, with the daemon flushing: what remains of it in tables and in memory.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use tollgate_tests::{Cluster, DATABASE, Tollgated, eventually};

use super::part::{Outcome, Part, Run, part_with_daemon};
use crate::clients::{Clients, Statement};
use crate::measure::Series;
use crate::memory::Memory;
use crate::report::{Figure, Unit};
use crate::service::{self, OPERATOR, VERIFY, WEB};
use crate::tokens::Tokens;

pub(super) const PART: Part =
    part_with_daemon("soak", "ten minutes of full load with the daemon flushing: bloat and memory", run);

const STATEMENTS: [Statement; 1] = [VERIFY];

fn run(run: &Run<'_>) -> Result<Outcome> {
    let tokens = Tokens::new(run.scale.tokens)?;
    let cluster = service::with_tokens(service::builder(run.install, run.scale.tokens), &tokens)?;
    let mut command = Tollgated::command(&cluster.url(OPERATOR, DATABASE))?;
    command.arg("run").arg(format!("--flush-interval={}ms", run.scale.flush_interval.as_millis()));
    // Any port: there may be another daemon on this machine.
    let mut daemon = Tollgated::spawn_command(command.env("TOLLGATED_OPS_ADDRESS", "127.0.0.1:0"))?;
    let mut clients = Clients::connect(&cluster, WEB, DATABASE, run.scale.clients, &STATEMENTS)?;
    // Each token twice: its row of usage then exists and was updated, so that the load only repeats that.
    let mut verified = 1;
    for _ in 0..2 {
        clients.warm_up(0, &tokens, 0..tokens.len())?;
        verified += tokens.len() as u64;
        catch_up(&cluster, verified);
    }
    let before = Tables::look(&cluster)?;

    let stop = AtomicBool::new(false);
    let (done, samples) = thread::scope(|scope| {
        let sampler = scope.spawn(|| -> Result<Vec<Memory>> {
            let mut samples = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                samples.push(Memory::of(&cluster, &daemon)?);
                thread::sleep(pause(run.scale.soak));
            }
            Ok(samples)
        });
        let done = clients.run(run.scale.soak, 0, &tokens);
        stop.store(true, Ordering::Relaxed);
        let samples = sampler.join().expect("a failing sampler returns an error");
        anyhow::Ok((done?, samples?))
    })?;
    ensure!(daemon.is_running(), "the daemon ended:\n{}", daemon.log());
    verified += done.executions;
    catch_up(&cluster, verified);
    daemon.terminate()?;
    daemon.wait(Duration::from_secs(60))?;
    drop(clients);
    // A session reports its table statistics when it ends, at the latest.
    let others = "select count(*) from pg_stat_activity where backend_type = 'client backend' and pid <> pg_backend_pid()";
    eventually(Duration::from_secs(60), "all sessions to end", || {
        cluster.value(DATABASE, others).is_ok_and(|count| count.as_deref() == Some("0"))
    });
    let after = Tables::look(&cluster)?;

    // The first tenth of the time, compared with the last. The minimum of each: a flush allocates memory while it runs,
    // and frees it.
    let tenth = (samples.len() / 10).max(1);
    let growth = |of: fn(&Memory) -> f64| {
        let least = |samples: &[Memory]| samples.iter().map(of).collect::<Series>().min();
        least(&samples[samples.len() - tenth..]) - least(&samples[..tenth])
    };
    let most = |of: fn(&Memory) -> f64| samples.iter().map(of).collect::<Series>().max();
    let one = |what: &str, unit: Unit, value: f64| Figure::new(what, unit, &Series(vec![value]));
    Ok(Outcome {
        conditions: vec![
            format!(
                "{} clients, {} s at {:.0} verifications a second, tokens random among {}",
                run.scale.clients,
                run.scale.soak.as_secs(),
                done.rate(),
                tokens.len()
            ),
            format!(
                "tollgated run, a flush every {:?}; every verification found counted at the end",
                run.scale.flush_interval
            ),
            "private memory: of all processes of the server but autovacuum workers, which come and go; growth: from the \
             least in the first tenth of the time to the least in the last"
                .to_owned(),
            service::conditions(&cluster)?,
        ],
        figures: vec![
            one("soak: dead tuples in api_tokens", Unit::Rows, after.dead).at_most(0.0),
            one("soak: growth of api_tokens and its indexes", Unit::Bytes, after.tokens - before.tokens).at_most(0.0),
            one("soak: growth of the server's private memory", Unit::Bytes, growth(|memory| memory.private))
                .at_most(SLACK),
            one("soak: growth of the shared memory in use", Unit::Bytes, growth(|memory| memory.shared)),
            one("soak: growth of the daemon's memory", Unit::Bytes, growth(|memory| memory.daemon)),
            one("soak: HOT updates of token_usage", Unit::Percent, 100.0 * after.hot / after.updates),
            one("soak: growth of token_usage and its index", Unit::Bytes, after.usage - before.usage),
            one("soak: the server's private memory, at most", Unit::Bytes, most(|memory| memory.private)),
            one("soak: the shared memory in use, at most", Unit::Bytes, most(|memory| memory.shared)),
            one("soak: the daemon's memory, at most", Unit::Bytes, most(|memory| memory.daemon)),
            one("soak: verifications", Unit::PerSecond, done.rate()),
        ],
    })
}

/// Growth that is ignored: a few pages that some allocator happens to hold at one moment and not at another.
const SLACK: f64 = 1_048_576.0;

/// Gives some hundred samples.
fn pause(soak: Duration) -> Duration {
    (soak / 300).clamp(Duration::from_millis(50), Duration::from_secs(2))
}

/// Waits until the daemon has flushed all verifications.
fn catch_up(cluster: &Cluster, verified: u64) {
    eventually(Duration::from_secs(60), "the daemon to flush all verifications", || {
        service::check_metering(cluster, verified).is_ok()
    });
}

/// Sizes in bytes, and numbers of rows.
struct Tables {
    tokens: f64,
    dead: f64,
    usage: f64,
    updates: f64,
    hot: f64,
}

impl Tables {
    fn look(cluster: &Cluster) -> Result<Self> {
        let number =
            |sql: &str| -> Result<f64> { Ok(cluster.value(DATABASE, sql)?.context("a number")?.parse()?) };
        let of = |table: &str, what: &str| {
            number(&format!(
                "select {what} from pg_stat_user_tables where relid = 'tollgate.{table}'::regclass"
            ))
        };
        let size = |table: &str| {
            number(&format!(
                "select pg_relation_size('tollgate.{table}') + pg_indexes_size('tollgate.{table}')"
            ))
        };
        Ok(Self {
            tokens: size("api_tokens")?,
            dead: of("api_tokens", "n_dead_tup + n_tup_upd + n_tup_del")?,
            usage: size("token_usage")?,
            updates: of("token_usage", "n_tup_upd")?,
            hot: of("token_usage", "n_tup_hot_upd")?,
        })
    }
}
