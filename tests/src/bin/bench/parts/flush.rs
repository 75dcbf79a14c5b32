//! How fast counters are moved into the tables: the first time, when each token's row is new, and after that.

use std::time::Duration;

use anyhow::{Result, ensure};
use tollgate_tests::DATABASE;

use super::part::{Outcome, Part, Run, part};
use crate::clients::socket;
use crate::measure::{Series, alternate_numbers, timed};
use crate::report::{Figure, Unit};
use crate::service;
use crate::tokens::Tokens;
use crate::wire::Connection;

pub(super) const PART: Part =
    part("flush", "distinct tokens whose counts apply_usage writes in a second", run);

/// The maximum number of tokens that the server hands to the daemon at once.
const GENERATION: u32 = 16_384;

fn run(run: &Run<'_>) -> Result<Outcome> {
    let (tokens, flushed) = (Tokens::new(run.scale.tokens)?, run.scale.flushed);
    let cluster = service::with_tokens(service::builder(run.install, run.scale.tokens), &tokens)?;
    let mut owner = Connection::prepare(&socket(&cluster), "postgres", DATABASE, &[])?;
    let mut generation = 0;
    // So many in all, so many at a time.
    let mut apply = |first: bool, at_a_time: u32| -> Result<f64> {
        if first {
            owner.simple("truncate tollgate.token_usage")?;
        }
        // Different tokens each time, in random order, as drained. In a table, so that generating them is not measured.
        owner.simple(&format!(
            "drop table if exists drained;
             create temporary table drained as
                 select number / {at_a_time} as part, array_agg((id, 3, 1, now(), '203.0.113.7')::tollgate.usage_row) as rows
                 from (select id, row_number() over () - 1 as number
                       from (select id from tollgate.api_tokens order by random() limit {flushed}) as used) as numbered
                 group by part"
        ))?;
        let mut total = Duration::ZERO;
        for part in 0..flushed.div_ceil(at_a_time) {
            generation += 1;
            let sql = format!(
                "select tollgate.apply_usage('bench', '00000000-0000-0000-0000-000000000001', {generation}, rows,
                     tollgate.signature_of_usage('bench', '00000000-0000-0000-0000-000000000001', {generation}, rows))
                 from drained where part = {part}"
            );
            let (applied, time) = timed(|| owner.simple(&sql))?;
            ensure!(applied.as_deref() == Some("t"), "apply_usage answered {applied:?}");
            total += time;
        }
        Ok(f64::from(flushed) / total.as_secs_f64())
    };
    let sizes = [flushed, GENERATION];
    let first = alternate_numbers("flush, the first", run.scale.rounds, 2, |turn| apply(true, sizes[turn]))?;
    // After this all tokens have rows, or nearly all.
    owner_fills_up(&cluster)?;
    let steady = alternate_numbers("flush, steady", run.scale.rounds, 2, |turn| apply(false, sizes[turn]))?;
    let per_second = |what: &str, series: &Series| Figure::new(what, Unit::PerSecond, series);
    Ok(Outcome {
        conditions: vec![
            format!("one client, {flushed} tokens a flush, random among {}", tokens.len()),
            "the statement apply_usage, with its commit".to_owned(),
            service::conditions(&cluster)?,
        ],
        figures: vec![
            per_second("flush: tokens written, each for the first time", &first[0]).at_least(150_000.0),
            per_second("flush: tokens written, steady", &steady[0]).at_least(150_000.0),
            per_second(&format!("flush: {GENERATION} at a time, each for the first time"), &first[1]),
            per_second(&format!("flush: {GENERATION} at a time, steady"), &steady[1]),
        ],
    })
}

/// Adds a row for each token that has none yet, as in a service that has been up for a while.
fn owner_fills_up(cluster: &tollgate_tests::Cluster) -> Result<()> {
    cluster.execute(
        DATABASE,
        "insert into tollgate.token_usage (token_id, use_count, denied_count)
             select id, 1, 0 from tollgate.api_tokens order by random() on conflict do nothing",
    )?;
    cluster.execute(DATABASE, "vacuum analyze tollgate.token_usage")?;
    cluster.execute(DATABASE, "checkpoint")
}
