//! Several daemons on one database: one leads each exclusive task, another takes over, and a leader that was frozen
//! does nothing twice.

use crate::commands;
use crate::web;
use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Result;
use nix::sys::signal::Signal;
use tokio_postgres::error::SqlState;
use tollgate_tests::{Tollgated, eventually_async};

use crate::common::{self, Shared, refused, value};
use crate::operator::{self, Db, OPERATOR};

static SHARED: Shared = Shared::new(&[]);

/// Longer than any wait should take, unless the machine is very busy.
const SOON: Duration = Duration::from_secs(60);
/// The time within which another daemon must lead after the leader was killed.
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

/// The process that holds each of our locks in the database, by its application_name.
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

/// A leader, and another daemon that waits.
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
async fn the_status_shows_the_leader_of_each_task() -> Result<()> {
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

/// Each round: the leader is frozen at some point, the other takes over and works, then the frozen one wakes up to a
/// changed state. Counts are exact, each expiry and each revocation is in the log once, and the chain of seals is
/// intact.
#[tokio::test]
async fn a_leader_that_was_frozen_does_nothing_twice() -> Result<()> {
    let db = start("leader_frozen").await?;
    let token = common::issue(&db.owner, "ann", &[]).await?;
    let (first, second) = two(&db).await?;
    let mut daemons = [first, second];
    let mut uses = 0;
    for _ in 0..3 {
        // Newly counted uses, so that there is work to interrupt.
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
        // After waking up it notices that it no longer leads, and continues as the other's standby.
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

/// The locks that an ordinary role can take, before any daemon runs.
#[tokio::test]
async fn no_role_can_take_the_leadership_locks() -> Result<()> {
    let db = start("leader_squatted").await?;
    let tag = "select classid::bigint::int, objid::bigint from pg_locks
               where locktype = 'advisory' and objsubid = 3 and pid = pg_backend_pid()";
    // The daemon's locks, from what it takes itself.
    let mut places = Vec::new();
    let probe = db.session(OPERATOR).await?;
    for task in tasks(&db).await? {
        probe.execute("select tollgate.acquire_leadership($1)", &[&task]).await?;
    }
    for row in probe.query(tag, &[]).await? {
        places.push((row.get::<_, i32>(0), row.get::<_, i64>(1)));
    }
    assert_eq!(places.len(), 9, "{places:?}");
    drop(probe);

    let squatter = db.session("web").await?;
    for (class, place) in &places {
        for lock in [
            format!(
                "pg_advisory_lock({class}, ({place} - case when {place} > 2147483647 then 4294967296 else 0 end)::int)"
            ),
            format!("pg_advisory_lock({class}::bigint << 32 | {place})"),
        ] {
            squatter.batch_execute(&format!("select {lock}")).await?;
        }
    }
    squatter
        .batch_execute(
            "select pg_advisory_lock(1952935012, hashtext(n)) from unnest('{flush_usage,expire_tokens,purge,seal_audit,announce_expiries}'::text[]) n",
        )
        .await?;
    let tables = "select c.oid::regclass::text from pg_class c where c.relnamespace = 'tollgate'::regnamespace and c.relkind = 'r'";
    for row in db.owner.query(tables, &[]).await? {
        let lock = format!("begin; lock table {} in access share mode", row.get::<_, &str>(0));
        refused(squatter.batch_execute(&lock).await, &SqlState::INSUFFICIENT_PRIVILEGE);
        squatter.batch_execute("rollback").await?;
    }
    let attempt = squatter.query_one("select tollgate.acquire_leadership('purge')", &[]).await;
    refused(attempt, &SqlState::INSUFFICIENT_PRIVILEGE);

    let daemon = Tollgated::spawn(&db.url(), &FAST)?;
    eventually_async(SOON, "all to be led", async || daemon.log().matches("leads").count() >= 5).await;
    let token = common::issue(&db.owner, "ann", &[]).await?;
    assert_eq!(common::code(&db.web, &token.token).await?, "VALID");
    flushed(&db, token.id, 1).await;
    Ok(())
}

async fn tasks(db: &Db) -> Result<Vec<String>> {
    let rows = db.owner.query("select task from tollgate.leaderships order by task", &[]).await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// A role that may lead can hold a lock and do nothing. Then each daemon is healthy, and the task is not done.
#[tokio::test]
async fn a_task_without_a_working_leader_is_named_by_check_readyz_and_a_metric() -> Result<()> {
    let db = start("leader_idle").await?;
    let idle = db.session(OPERATOR).await?;
    idle.execute("select tollgate.acquire_leadership('seal_audit')", &[]).await?;
    let (_daemon, address) = web::run(&db.url(), &["--seal-interval=100ms"]).await?;
    web::eventually_answers(address, "/readyz", 200).await;
    assert_eq!(web::metrics(address).await?["tollgated_task_unled{task=\"seal_audit\"}"], 0.0);
    web::eventually_measures(address, "tollgated_task_unled{task=\"seal_audit\"}", |value| value == 1.0)
        .await;
    let ready = web::get(address, "/readyz", &[]).await?;
    assert_eq!((ready.status, ready.body.as_str()), (503, "no daemon leads seal_audit\n"));
    assert_eq!(web::metrics(address).await?["tollgated_task_unled{task=\"flush_usage\"}"], 0.0);
    let report = commands::json_of(&db.url(), &["check"], commands::NO);
    assert!(report.to_string().contains("no daemon has led the task seal_audit"), "{report}");
    drop(idle);
    web::eventually_answers(address, "/readyz", 200).await;
    Ok(())
}

#[tokio::test]
async fn a_statement_of_a_leader_that_was_superseded_does_nothing() -> Result<()> {
    let db = start("leader_fence").await?;
    let lead = "select tollgate.acquire_leadership('expire_tokens')";
    let first = db.session(OPERATOR).await?;
    let old: i64 = value(&first, lead).await?;
    assert_eq!(value::<i64>(&first, lead).await?, old, "asked again");
    let second = db.session(OPERATOR).await?;
    assert_eq!(value::<Option<i64>>(&second, lead).await?, None);
    drop(first);
    // A rollback keeps the lock, and returned no fence.
    let mut unsure = None;
    eventually_async(SOON, "the lock to be free", async || {
        second.batch_execute("begin").await.unwrap();
        unsure = value::<Option<i64>>(&second, lead).await.unwrap();
        second.batch_execute("rollback").await.unwrap();
        unsure.is_some()
    })
    .await;
    let new: i64 = value(&second, lead).await?;
    assert!(new > old && Some(new) > unsure, "{old} {unsure:?} {new}");

    db.owner.execute("select tollgate.create_api_token('bob', 'ended')", &[]).await?;
    db.owner.execute("update tollgate.api_tokens set expires_at = now()", &[]).await?;
    let run = |fence: i64| {
        format!("select tollgate.expire_tokens(10) where tollgate.check_leadership('expire_tokens', {fence})")
    };
    for wrong in [old, old + 1, 0, i64::MAX] {
        refused(second.query(&run(wrong), &[]).await, &SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE);
    }
    assert_eq!(value::<i64>(&second, &run(new)).await?, 1);
    for task in ["null", "''", "'no such task'"] {
        for call in [format!("acquire_leadership({task})"), format!("check_leadership({task}, {new})")] {
            let answer = second.query(&format!("select tollgate.{call}"), &[]).await;
            refused(answer, &SqlState::INVALID_PARAMETER_VALUE);
        }
    }
    Ok(())
}
