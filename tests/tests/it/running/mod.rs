//! What tests observe of a running daemon: its log line by line, the events it published, its effects on the tables.

use std::collections::BTreeSet;
use std::process::ExitStatus;
use std::time::Duration;

use anyhow::Result;
use serde_json::Value;
use tokio_postgres::Client;
use tollgate_tests::{Tollgated, eventually_async};
use uuid::Uuid;

use crate::common::{Token, value};
use crate::operator::counts;

pub(crate) const LONG: Duration = Duration::from_secs(60);

/// How often a test that breaks things does so: `TOLLGATE_TEST_ROUNDS` times the usual number.
pub(crate) fn rounds(usual: usize) -> usize {
    let factor = std::env::var("TOLLGATE_TEST_ROUNDS").ok().and_then(|factor| factor.parse().ok());
    usual * factor.unwrap_or(1)
}

/// A daemon that runs all its tasks several times a second.
pub(crate) const EAGER: &[&str] = &[
    "--flush-interval=100ms",
    "--expire-interval=100ms",
    "--purge-interval=100ms",
    "--publish-interval=100ms",
];

/// A daemon that does nothing by itself after its start, for as long as a test lasts.
pub(crate) const LAZY: &[&str] =
    &["--flush-interval=24h", "--expire-interval=24h", "--purge-interval=24h", "--publish-interval=24h"];

pub(crate) fn run(url: &str, arguments: &[&[&str]]) -> Result<Tollgated> {
    let all = [&[&["run", "--log-format=json"][..]], arguments].concat().concat();
    Tollgated::spawn(url, &all)
}

/// The daemon's log, line by line. Fails if a line is not JSON.
pub(crate) fn lines(daemon: &Tollgated) -> Vec<Value> {
    let log = daemon.log();
    // A line that is still being written is left out.
    let whole = log.rfind('\n').map_or("", |end| &log[..end]);
    whole
        .lines()
        .map(|line| {
            serde_json::from_str(line).unwrap_or_else(|error| panic!("{error} in the log line: {line}"))
        })
        .collect()
}

/// The events it published, in its order.
pub(crate) fn published(daemon: &Tollgated) -> Vec<Value> {
    lines(daemon).into_iter().filter(|line| line["target"] == "tollgate::events").collect()
}

pub(crate) fn ids(events: &[Value]) -> Vec<i64> {
    events.iter().filter_map(|event| event["id"].as_i64()).collect()
}

pub(crate) async fn eventually_logs(daemon: &mut Tollgated, text: &str) {
    eventually_async(LONG, &format!("the daemon to log {text:?}"), async || {
        assert!(daemon.is_running(), "it ended instead:\n{}", daemon.log());
        daemon.log().contains(text)
    })
    .await;
}

pub(crate) async fn eventually_counts(owner: &Client, token: &Token, expected: (i64, i64)) {
    eventually_async(LONG, &format!("{expected:?} to be flushed"), async || {
        counts(owner, token.id).await.unwrap() == expected
    })
    .await;
}

pub(crate) async fn eventually_publishes(daemon: &Tollgated, expected: &BTreeSet<i64>) {
    eventually_async(LONG, "the daemon to publish the events", async || {
        ids(&published(daemon)).into_iter().collect::<BTreeSet<_>>().is_superset(expected)
    })
    .await;
}

/// Until its subscription exists, it may still be about to start "now".
pub(crate) async fn subscribed(owner: &Client, name: &str) {
    eventually_async(LONG, "the subscription", async || {
        value::<bool>(
            owner,
            &format!("select exists (select from tollgate.subscriptions where name = '{name}')"),
        )
        .await
        .unwrap()
    })
    .await;
}

/// The ids of the events that were logged after this one.
pub(crate) async fn logged_after(owner: &Client, id: i64) -> Result<BTreeSet<i64>> {
    let rows = owner.query("select id from tollgate.audit_log where id > $1", &[&id]).await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

pub(crate) async fn last_event(owner: &Client) -> Result<i64> {
    value(owner, "select max(id) from tollgate.audit_log").await
}

pub(crate) fn stop(daemon: &mut Tollgated) -> Result<ExitStatus> {
    daemon.terminate()?;
    daemon.wait(LONG)
}

/// A moment that differs from run to run.
pub(crate) async fn some_moment(longest: Duration) {
    let random = u32::from_le_bytes(*Uuid::new_v4().as_bytes().first_chunk().expect("sixteen bytes"));
    tokio::time::sleep(longest.mul_f64(f64::from(random) / f64::from(u32::MAX))).await;
}
