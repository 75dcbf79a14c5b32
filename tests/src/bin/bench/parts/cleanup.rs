//! How much a large cleanup slows verifications down: the daemon deletes tokens that ended long ago while others are
//! verified.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use hdrhistogram::Histogram;
use tollgate_tests::{Cluster, DATABASE, Tollgated};

use super::part::{Outcome, Part, Run, part_with_daemon};
use crate::clients::{Clients, Statement};
use crate::measure::{Progress, Series, percentile, timed};
use crate::report::{Figure, Unit};
use crate::service::{self, OPERATOR, VERIFY, WEB};
use crate::tokens::{Tokens, hash, id, token};

pub(super) const PART: Part =
    part_with_daemon("cleanup", "p99 of verification while 1,000,000 ended tokens are deleted", run);

const STATEMENTS: [Statement; 1] = [VERIFY];
/// A cleanup that takes longer has hung.
const DEADLINE: Duration = Duration::from_mins(10);
/// At least this many, whatever is requested: one cleanup is not enough for a tail.
const ROUNDS: u32 = 5;

/// The tail of one quiet period and of the cleanup after it, and how many tokens per second the cleanup deleted.
struct Pair {
    quiet: f64,
    meanwhile: f64,
    speed: f64,
}

fn run(run: &Run<'_>) -> Result<Outcome> {
    let tokens = Tokens::new(run.scale.tokens)?;
    let cluster = service::with_tokens(service::builder(run.install, run.scale.tokens * 2), &tokens)?;
    // A tenth of them is for the load without a target, during which a cleanup takes long.
    let shares = [run.scale.ended / 10 / ROUNDS, run.scale.ended * 9 / 10 / ROUNDS];
    let groups = shares.map(|share| std::iter::repeat_n(share, ROUNDS as usize)).into_iter().flatten();
    let groups: Vec<u32> = groups.collect();
    load_ended(&cluster, tokens.len(), &groups)?;
    let mut clients = Clients::connect(&cluster, WEB, DATABASE, run.scale.clients, &STATEMENTS)?;
    clients.warm_up(0, &tokens, 0..tokens.len())?;
    service::flush(&cluster, DATABASE)?;
    let full = clients.run(run.scale.turn, 0, &tokens)?.rate();
    let rate = full / 4.0;

    let mut progress = Progress::new("cleanup", 2 * ROUNDS as usize);
    let mut left = groups;
    let mut pairs = |rate: Option<f64>| -> Result<Vec<Pair>> {
        (0..ROUNDS)
            .map(|_| {
                // Finishes the disk writes of the previous cleanup, which do not belong to a quiet period.
                cluster.execute(DATABASE, "checkpoint")?;
                let quiet = clients.latencies_for(run.scale.turn * 10, rate, 0, &tokens)?;
                let share = left.pop().context("a group for each")?;
                let (meanwhile, time) =
                    while_cleaning(&cluster, &mut clients, rate, &tokens, left.len(), share)?;
                progress.step();
                Ok(Pair {
                    quiet: percentile(&quiet, 0.99),
                    meanwhile: percentile(&meanwhile, 0.99),
                    speed: f64::from(share) / time.as_secs_f64(),
                })
            })
            .collect()
    };
    let paced = pairs(Some(rate))?;
    let flat_out = pairs(None)?;
    let left = cluster.value(DATABASE, "select count(*) from tollgate.api_tokens")?;
    ensure!(left == Some(tokens.len().to_string()), "{left:?} tokens are left of {}", tokens.len());

    let of = |pairs: &[Pair], what: fn(&Pair) -> f64| pairs.iter().map(what).collect::<Series>();
    let quiet = |pairs: &[Pair]| of(pairs, |pair| pair.quiet);
    let meanwhile = |pairs: &[Pair]| of(pairs, |pair| pair.meanwhile);
    Ok(Outcome {
        conditions: vec![
            format!(
                "{} clients, {rate:.0} verifications a second, a quarter of what there can be",
                run.scale.clients
            ),
            format!(
                "{ROUNDS} times {} ended tokens deleted by tollgated cleanup beside {} live ones, in turn with quiet \
                 stretches",
                shares[1],
                tokens.len()
            ),
            format!("then {ROUNDS} times {} at full load, where the processors are busy already", shares[0]),
            service::conditions(&cluster)?,
        ],
        figures: vec![
            Figure::new(
                "p99 of verification during cleanup ÷ quiet",
                Unit::Ratio,
                &meanwhile(&paced).over(&quiet(&paced)),
            )
            .at_most(2.0),
            Figure::new("the same at full load", Unit::Ratio, &meanwhile(&flat_out).over(&quiet(&flat_out))),
            Figure::new("p99 of verification, quiet", Unit::Microseconds, &quiet(&paced)),
            Figure::new("p99 of verification, during cleanup", Unit::Microseconds, &meanwhile(&paced)),
            Figure::new("tokens deleted meanwhile", Unit::PerSecond, &of(&paced, |pair| pair.speed)),
        ],
    })
}

/// Runs `tollgated cleanup` for all groups from this one on, with the clients under load, and returns the latencies of
/// verifications meanwhile. One group is left to delete.
fn while_cleaning(
    cluster: &Cluster,
    clients: &mut Clients<'_>,
    rate: Option<f64>,
    tokens: &Tokens,
    group: usize,
    share: u32,
) -> Result<(Histogram<u64>, Duration)> {
    let stop = AtomicBool::new(false);
    let count =
        || cluster.value(DATABASE, "select count(*) from tollgate.api_tokens where expired_at is not null");
    let before: u32 = count()?.context("a count")?.parse()?;
    let measured = thread::scope(|scope| {
        let cleanup = scope.spawn(|| {
            let ran = timed(|| {
                let retention = format!("{}days", ended_days_ago(group));
                let arguments = ["cleanup", "--retention", &retention, "--json"];
                let mut daemon = Tollgated::spawn(&cluster.url(OPERATOR, DATABASE), &arguments)?;
                let status = daemon.wait(DEADLINE)?;
                ensure!(status.success(), "tollgated cleanup: {status}\n{}", daemon.log());
                Ok(())
            });
            // Even if it failed: the clients would run for ever.
            stop.store(true, Ordering::Relaxed);
            ran
        });
        let times = clients.latencies(rate, &stop, 0, tokens)?;
        let ((), time) = cleanup.join().expect("a failing cleanup returns an error")?;
        anyhow::Ok((times, time))
    })?;
    let after: u32 = count()?.context("a count")?.parse()?;
    ensure!(before - after == share, "{} tokens were deleted where {share} had ended", before - after);
    Ok(measured)
}

/// More than a year, and each group ten days more than the previous one.
fn ended_days_ago(group: usize) -> usize {
    365 + 10 * group
}

/// Ended tokens, a number in each group, in random order, with their expiries recorded.
fn load_ended(cluster: &Cluster, live: usize, groups: &[u32]) -> Result<()> {
    use std::io::Write as _;
    let path = cluster.socket_dir().join("ended");
    let mut file = std::io::BufWriter::new(std::fs::File::create(&path)?);
    let largest = groups.iter().copied().max().unwrap_or(0);
    let mixed = (0..largest).flat_map(|n| (0..groups.len()).filter(move |&group| n < groups[group]));
    for (number, group) in (u32::try_from(live)?..).zip(mixed) {
        writeln!(
            file,
            "{}\t\\\\x{}\tuser-{}\tkey {number}\ttgt_0000\t{}",
            id(number),
            hash(token(number).token()),
            number / 10,
            ended_days_ago(group)
        )?;
    }
    file.into_inner()?;
    cluster.execute(
        DATABASE,
        &format!(
            "create temporary table ended (id uuid, token_hash bytea, user_id text, name text, hint text, days integer);
             copy ended from '{}';
             insert into tollgate.api_tokens (id, token_hash, user_id, name, hint, scopes, metadata, created_by, expires_at, expired_at)
                 select id, token_hash, user_id, name, hint, '{{posts:read}}', '{{}}', 'bench',
                        now() - days * interval '1 day' - interval '1 hour', now() - days * interval '1 day'
                 from ended",
            path.display()
        ),
    )?;
    std::fs::remove_file(&path)?;
    cluster.execute(DATABASE, "vacuum (freeze, analyze) tollgate.api_tokens")?;
    cluster.execute(DATABASE, "checkpoint")
}
