//! What verifications feel of a large cleanup: the daemon deletes tokens that ended long ago while others are verified.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use hdrhistogram::Histogram;
use tollgate_tests::{Cluster, DATABASE, Tollgated};

use super::{Outcome, Part, Run, part_with_daemon};
use crate::clients::{Clients, Statement};
use crate::measure::{Progress, Series, percentile, timed};
use crate::report::{Figure, Unit};
use crate::service::{self, OPERATOR, VERIFY, WEB};
use crate::tokens::{Tokens, hash, id, token};

pub(super) const PART: Part =
    part_with_daemon("cleanup", "p99 of verification while 1,000,000 ended tokens are deleted", run);

const STATEMENTS: [Statement; 1] = [VERIFY];
/// A cleanup that takes longer hangs.
const DEADLINE: Duration = Duration::from_mins(10);
/// At least so many, whatever else is asked for: one cleanup says little of a tail.
const ROUNDS: u32 = 5;

/// The tail of one quiet stretch, and of the cleanup after it.
struct Pair {
    quiet: f64,
    meanwhile: f64,
}

fn run(run: &Run<'_>) -> Result<Outcome> {
    let tokens = Tokens::new(run.scale.tokens)?;
    let cluster = service::with_tokens(service::builder(run.install, run.scale.tokens * 2), &tokens)?;
    let share = run.scale.ended / (2 * ROUNDS);
    // Half of them for each of the two loads.
    load_ended(&cluster, tokens.len(), 2 * ROUNDS, share)?;
    let mut clients = Clients::connect(&cluster, WEB, DATABASE, run.scale.clients, &STATEMENTS)?;
    clients.warm_up(0, &tokens, 0..tokens.len())?;
    service::flush(&cluster, DATABASE)?;
    let full = clients.run(run.scale.turn, 0, &tokens)?.rate();
    let rate = full / 4.0;

    let mut progress = Progress::new("cleanup", 2 * ROUNDS as usize);
    let mut speeds = Series::default();
    let mut pairs = |rate: Option<f64>| -> Result<Vec<Pair>> {
        (0..ROUNDS)
            .map(|_| {
                let quiet = clients.latencies_for(run.scale.turn * 2, rate, 0, &tokens)?;
                let (meanwhile, time) = while_cleaning(
                    &cluster,
                    &mut clients,
                    rate,
                    &tokens,
                    2 * ROUNDS - speeds.0.len() as u32,
                    share,
                )?;
                speeds.0.push(f64::from(share) / time.as_secs_f64());
                progress.step();
                Ok(Pair { quiet: percentile(&quiet, 0.99), meanwhile: percentile(&meanwhile, 0.99) })
            })
            .collect()
    };
    let paced = pairs(Some(rate))?;
    let flat_out = pairs(None)?;
    let left = cluster.value(DATABASE, "select count(*) from tollgate.api_tokens")?;
    ensure!(left == Some(tokens.len().to_string()), "{left:?} tokens are left of {}", tokens.len());

    let quiet = |pairs: &[Pair]| pairs.iter().map(|pair| pair.quiet).collect::<Series>();
    let meanwhile = |pairs: &[Pair]| pairs.iter().map(|pair| pair.meanwhile).collect::<Series>();
    Ok(Outcome {
        conditions: vec![
            format!(
                "{} clients, {rate:.0} verifications a second, a quarter of what there can be",
                run.scale.clients
            ),
            format!(
                "{ROUNDS} times {share} ended tokens deleted by tollgated cleanup beside {} live ones, in turn with \
                 quiet stretches",
                tokens.len()
            ),
            "then as often at full load, where the processors are busy already".to_owned(),
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
            Figure::new("tokens deleted meanwhile", Unit::PerSecond, &speeds),
        ],
    })
}

/// Runs `tollgated cleanup` for those that ended at least so long ago, with the clients at work, and returns how long
/// verifications took meanwhile.
fn while_cleaning(
    cluster: &Cluster,
    clients: &mut Clients<'_>,
    rate: Option<f64>,
    tokens: &Tokens,
    age: u32,
    share: u32,
) -> Result<(Histogram<u64>, Duration)> {
    let stop = AtomicBool::new(false);
    let count =
        || cluster.value(DATABASE, "select count(*) from tollgate.api_tokens where expired_at is not null");
    let before: u32 = count()?.context("a count")?.parse()?;
    let measured = thread::scope(|scope| {
        let cleanup = scope.spawn(|| {
            let ran = timed(|| {
                let retention = format!("{}days", YEAR + 10 * (age - 1));
                let arguments = ["cleanup", "--retention", &retention, "--json"];
                let mut daemon = Tollgated::spawn(&cluster.url(OPERATOR, DATABASE), &arguments)?;
                let status = daemon.wait(DEADLINE)?;
                ensure!(status.success(), "tollgated cleanup: {status}\n{}", daemon.log());
                Ok(())
            });
            // Also when it failed: the clients would go on for ever.
            stop.store(true, Ordering::Relaxed);
            ran
        });
        let times = clients.latencies(rate, &stop, 0, tokens)?;
        let ((), time) = cleanup.join().expect("the cleanup that fails says so")?;
        anyhow::Ok((times, time))
    })?;
    let after: u32 = count()?.context("a count")?.parse()?;
    ensure!(before - after == share, "{} tokens were deleted where {share} had ended", before - after);
    Ok(measured)
}

/// In days. The youngest ended that long ago.
const YEAR: u32 = 365;

/// So many groups of tokens that ended, each ten days before the one that is before it, their expiries recorded.
fn load_ended(cluster: &Cluster, live: usize, groups: u32, share: u32) -> Result<()> {
    use std::io::Write as _;
    let path = cluster.socket_dir().join("ended");
    let mut file = std::io::BufWriter::new(std::fs::File::create(&path)?);
    let first = u32::try_from(live)?;
    for number in 0..groups * share {
        let (group, number) = (number % groups, first + number);
        writeln!(
            file,
            "{}\t\\\\x{}\tuser-{}\tkey {number}\ttgt_0000\t{}",
            id(number),
            hash(token(number).token()),
            number / 10,
            YEAR + 10 * group
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
