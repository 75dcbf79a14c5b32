//! Several daemons on one database: one leads each task that one does for all, another takes over, and a leader that was
//! frozen does nothing twice.

mod common;
mod operator;

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Result;
use nix::sys::signal::Signal;
use tollgate_tests::{Tollgated, eventually_async};

use common::Shared;
use operator::Db;

static SHARED: Shared = Shared::new(&[]);

/// Longer than any wait should take, short of a machine that is very busy.
const SOON: Duration = Duration::from_secs(60);
/// Within which another daemon must lead after the leader was killed.
const HANDOVER: Duration = Duration::from_secs(5);

const FAST: [&str; 9] = [
    "run",
    "--flush-interval=100ms",
    "--expire-interval=100ms",
    "--publish-interval=100ms",
    "--seal-interval=100ms",
    "--purge-interval=100ms",
    "--retention=1h",
    "--shutdown-grace=5s",
    "--log-level=info,tollgated::leader=debug",
];

async fn start(name: &str) -> Result<Db> {
    Db::create(&SHARED.cluster()?, name).await
}

/// The process that holds each lock of ours in the database, by its application_name.
async fn leaders(db: &Db) -> Vec<i32> {
    db.owner
        .query(
            "select distinct pid from pg_locks
             where locktype = 'advisory' and granted and classid = x'74676c64'::int::oid
               and database = (select oid from pg_database where datname = current_database())",
            &[],
        )
        .await
        .map(|rows| rows.iter().map(|row| row.get(0)).collect())
        .unwrap_or_default()
}

async fn eventually_leads(daemon: &Tollgated) {
    eventually_async(SOON, "a leader", async || daemon.log().contains("leads")).await;
}

/// A leader, and another that waits.
async fn two(db: &Db) -> Result<(Tollgated, Tollgated)> {
    let first = Tollgated::spawn(&db.url(), &FAST)?;
    eventually_leads(&first).await;
    let second = Tollgated::spawn(&db.url(), &FAST)?;
    eventually_async(SOON, "the second daemon", async || second.log().contains("listening")).await;
    Ok((first, second))
}

async fn flushed(db: &Db, token: uuid::Uuid, count: i64) {
    eventually_async(SOON, "a flush", async || {
        operator::counts(&db.owner, token).await.is_ok_and(|(uses, _)| uses == count)
    })
    .await;
}

#[tokio::test]
async fn another_daemon_takes_over_within_seconds_of_the_leaders_death() -> Result<()> {
    let db = start("leader_killed").await?;
    let token = common::issue(&db.owner, "ann", &[]).await?;
    let (mut first, second) = two(&db).await?;
    assert_eq!(common::code(&db.web, &token.token).await?, "VALID");
    flushed(&db, token.id, 1).await;
    assert!(!second.log().contains("leads"), "{}", second.log());
    let before = leaders(&db).await;
    first.kill()?;
    eventually_async(HANDOVER, "the handover", async || {
        let now = leaders(&db).await;
        !now.is_empty() && now != before
    })
    .await;
    assert_eq!(common::code(&db.web, &token.token).await?, "VALID");
    flushed(&db, token.id, 2).await;
    Ok(())
}

#[tokio::test]
async fn the_status_says_who_leads_what() -> Result<()> {
    let db = start("leader_status").await?;
    let (_first, _second) = two(&db).await?;
    let led = async || -> Result<Vec<BTreeMap<String, Option<bool>>>> {
        let rows = db.owner.query("select tasks from tollgate.daemons", &[]).await?;
        let tasks = rows.iter().map(|row| row.get::<_, serde_json::Value>(0));
        Ok(tasks
            .map(|tasks| {
                let each = tasks.as_object().into_iter().flatten();
                each.map(|(name, status)| (name.clone(), status["leads"].as_bool())).collect()
            })
            .collect())
    };
    eventually_async(SOON, "both reports", async || {
        led().await.is_ok_and(|reports| {
            ["flush_usage", "expire_tokens", "purge", "seal_audit"].iter().all(|task| {
                let says =
                    |answer| reports.iter().filter(|report| report.get(*task) == Some(&Some(answer))).count();
                (says(true), says(false)) == (1, 1)
            })
        })
    })
    .await;
    let reports = led().await?;
    assert!(reports.iter().all(|report| report.get("heartbeat") == Some(&None)), "{reports:?}");
    let shown = Tollgated::run(&db.url(), &["status"])?;
    let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
    assert!(shown.contains("leads") && shown.contains("another daemon leads"), "{shown}");
    Ok(())
}

/// Each round: the leader is frozen in whatever it is doing, the other takes over and works, the frozen one wakes up into
/// a world that went on. Counts are exact, each expiry and each revocation is in the log once, the chain of seals holds.
#[tokio::test]
async fn a_leader_that_was_frozen_does_nothing_twice() -> Result<()> {
    let db = start("leader_frozen").await?;
    let token = common::issue(&db.owner, "ann", &[]).await?;
    let (first, second) = two(&db).await?;
    let mut daemons = [first, second];
    let mut uses = 0;
    for _ in 0..3 {
        // Freshly counted, so that there is something to be in the midst of.
        for _ in 0..20 {
            assert_eq!(common::code(&db.web, &token.token).await?, "VALID");
            uses += 1;
        }
        let before = leaders(&db).await;
        daemons[0].signal(Signal::SIGSTOP)?;
        db.owner
            .batch_execute(
                "select tollgate.create_api_token('bob', 'short', expires_in => '1 second') from generate_series(1, 10)",
            )
            .await?;
        eventually_async(SOON, "another leader", async || {
            let now = leaders(&db).await;
            !now.is_empty() && now != before
        })
        .await;
        for _ in 0..20 {
            assert_eq!(common::code(&db.web, &token.token).await?, "VALID");
            uses += 1;
        }
        flushed(&db, token.id, uses).await;
        daemons[0].signal(Signal::SIGCONT)?;
        // Awake, it notices that it leads no more, and works on as the other's substitute.
        eventually_async(SOON, "the loss to be noticed", async || daemons[0].log().contains("leads no more"))
            .await;
        assert_eq!(leaders(&db).await.len(), 1);
        daemons.swap(0, 1);
    }
    let expired = "select count(*)::bigint from tollgate.audit_log where event = 'token.expired'";
    eventually_async(SOON, "all expiries", async || {
        common::value::<i64>(&db.owner, expired).await.is_ok_and(|count| count >= 30)
    })
    .await;
    let twice: i64 = common::value(
        &db.owner,
        "select count(*) from (select token_id from tollgate.audit_log where event = 'token.expired'
         group by token_id having count(*) > 1) t",
    )
    .await?;
    assert_eq!(twice, 0);
    assert_eq!(common::value::<i64>(&db.owner, expired).await?, 30);
    for daemon in &mut daemons {
        daemon.terminate()?;
        assert!(daemon.wait(SOON)?.success(), "{}", daemon.log());
    }
    assert_eq!(operator::counts(&db.owner, token.id).await?, (uses, 0));
    assert!(common::value::<bool>(&db.owner, "select whole from tollgate.verify_audit_log()").await?);
    Ok(())
}
