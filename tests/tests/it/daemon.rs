//! `tollgated run` as a real process, with an operator's privileges only.

use crate::web;
use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::common::{self, Shared, Token, code, issue, issue_with, refused, revoke, value};
use crate::operator::{Db, OPERATOR, counts, flush_all, issue_many, set, stats, totals, verify_each};
use crate::running::{
    EAGER, LAZY, LONG, eventually_counts, eventually_logs, eventually_publishes, ids, last_event, lines,
    logged_after, published, rounds, run, some_moment, stop, subscribed,
};
use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use tollgate_tests::{Account, Cluster, DATABASE, Tollgated, eventually_async};
use uuid::Uuid;

static SHARED: Shared = Shared::new(&[]);

/// Exit codes, as `tollgated --help` documents them.
const ABANDONED: i32 = 75;

// ---- Its work

#[tokio::test]
async fn usage_is_flushed_again_and_again_with_the_operators_grants_alone() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "flushed").await?;
    for table in ["api_tokens", "token_usage", "audit_log", "tokens", "subscriptions"] {
        let answer = db.operator.query(&format!("select from tollgate.{table}"), &[]).await;
        refused(answer, &SqlState::INSUFFICIENT_PRIVILEGE);
    }
    let daemon = run(&db.url(), &[EAGER])?;
    let token = issue(&db.owner, "a", &[]).await?;
    for uses in 1..=3 {
        assert_eq!(code(&db.web, &token.token).await?, "VALID");
        eventually_counts(&db.owner, &token, (uses, 0)).await;
    }
    revoke(&db.owner, token.id).await?;
    assert_eq!(code(&db.web, &token.token).await?, "REVOKED");
    eventually_counts(&db.owner, &token, (3, 1)).await;

    let warnings: Vec<Value> = lines(&daemon).into_iter().filter(|line| line["level"] != "INFO").collect();
    assert_eq!(warnings, Vec::<Value>::new());
    Ok(())
}

/// The package of the daemon may be installed before ALTER EXTENSION is run.
#[tokio::test]
async fn a_task_that_needs_a_newer_schema_waits_for_it_while_the_others_go_on() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "older").await?;
    let version: String =
        value(&db.owner, "select extversion from pg_extension where extname = 'tollgate'").await?;
    let has_version = async |version: &str, from: &str, to: &str| {
        let statement = format!(
            "update pg_extension set extversion = '{version}' where extname = 'tollgate';
             alter function tollgate.{from}(integer, timestamptz, uuid) rename to {to}"
        );
        db.owner.batch_execute(&statement).await
    };
    has_version("0.0.1", "expire_tokens_after", "of_a_later_version").await?;
    let mut daemon = run(&db.url(), &[EAGER])?;
    let waits = format!(
        "waits: needs schema {version}, this database has 0.0.1; run ALTER EXTENSION tollgate UPDATE"
    );
    eventually_logs(&mut daemon, &waits).await;
    let token = issue_with(&db.owner, "a", "expires_in => '100 milliseconds'").await?;
    let used = issue(&db.owner, "b", &[]).await?;
    assert_eq!(code(&db.web, &used.token).await?, "VALID");
    eventually_counts(&db.owner, &used, (1, 0)).await;
    let tasks = "select tasks from tollgate.daemons";
    eventually_async(LONG, "the daemon to report that it waits", async || {
        let task = &value::<Value>(&db.owner, tasks).await.unwrap()["expire_tokens"];
        task["last_outcome"] == "waiting" && task["failures"] == 0
    })
    .await;

    has_version(&version, "of_a_later_version", "expire_tokens_after").await?;
    let expired = format!(
        "select count(*) = 1 from tollgate.audit_log where event = 'token.expired' and token_id = '{}'",
        token.id
    );
    eventually_async(LONG, "the task to go on", async || value::<bool>(&db.owner, &expired).await.unwrap())
        .await;
    let others: Vec<Value> = lines(&daemon)
        .into_iter()
        .filter(|line| line["level"] != "INFO" && line["task"] != "expire_tokens")
        .collect();
    assert_eq!(others, Vec::<Value>::new());
    Ok(())
}

#[tokio::test]
async fn usage_is_flushed_at_once_on_demand() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "demand").await?;
    let token = issue(&db.owner, "a", &[]).await?;
    code(&db.web, &token.token).await?;
    let daemon = run(&db.url(), &[LAZY])?;
    eventually_counts(&db.owner, &token, (1, 0)).await;
    for uses in 2..=4 {
        code(&db.web, &token.token).await?;
        daemon.signal(Signal::SIGUSR1)?;
        eventually_counts(&db.owner, &token, (uses, 0)).await;
    }
    Ok(())
}

#[tokio::test]
async fn expiries_are_recorded_and_published() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "expiries").await?;
    let mut daemon = run(&db.url(), &[EAGER, &["--batch-size=2"]])?;
    subscribed(&db.owner, "log").await;
    let mut expiring = BTreeSet::new();
    for _ in 0..5 {
        let token = common::issue_with(&db.owner, "a", "expires_in => '500 milliseconds'").await?;
        expiring.insert(token.id.to_string());
    }
    let expired = || -> Vec<String> {
        published(&daemon)
            .iter()
            .filter(|event| event["event"] == "token.expired")
            .filter_map(|event| event["token_id"].as_str().map(str::to_owned))
            .collect()
    };
    eventually_async(LONG, "five expiries", async || expired().len() >= 5).await;
    let published = expired();
    assert_eq!((published.len(), published.into_iter().collect()), (5, expiring));
    assert!(stop(&mut daemon)?.success());
    Ok(())
}

#[tokio::test]
async fn tokens_that_ended_before_the_retention_are_purged() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "purged").await?;
    let mut kept = Vec::new();
    for changes in ["name = 'live'", "revoked_at = now() - interval '50 minutes'"] {
        let token = issue(&db.owner, "a", &[]).await?;
        set(&db.owner, token.id, changes).await?;
        kept.push(token.id);
    }
    for n in 0..7 {
        let token = issue(&db.owner, "a", &[]).await?;
        let end = if n % 2 == 0 { "revoked_at" } else { "expires_at" };
        set(&db.owner, token.id, &format!("{end} = now() - interval '2 hours'")).await?;
    }
    let _daemon = run(&db.url(), &[EAGER, &["--retention=1h", "--batch-size=3"]])?;
    eventually_async(LONG, "seven tokens to be gone", async || {
        let left: i64 = value(&db.owner, "select count(*) from tollgate.api_tokens").await.unwrap();
        left <= 2
    })
    .await;
    let left = db.owner.query("select id from tollgate.api_tokens order by created_at", &[]).await?;
    assert_eq!(left.iter().map(|row| row.get(0)).collect::<Vec<Uuid>>(), kept);
    Ok(())
}

#[tokio::test]
async fn every_event_is_published_once_with_its_fields() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "published").await?;
    let before = last_event(&db.owner).await?;
    let mut daemon = run(&db.url(), &[EAGER, &["--batch-size=3"]])?;
    subscribed(&db.owner, "log").await;
    let started = last_event(&db.owner).await?;
    assert_eq!(started, before);

    let token = issue(&db.owner, "an\"n\n", &["posts:read"]).await?;
    db.owner.execute("select tollgate.revoke_api_token($1, null, 'leaked\u{1b}[2J')", &[&token.id]).await?;
    for n in 0..20 {
        db.owner.execute("select tollgate.define_scope($1, 'x')", &[&format!("s:{n}")]).await?;
    }
    let logged = logged_after(&db.owner, before).await?;
    eventually_publishes(&daemon, &logged).await;
    assert!(stop(&mut daemon)?.success());
    let published = published(&daemon);
    assert_eq!(ids(&published), logged.into_iter().collect::<Vec<_>>(), "each once, in their order");

    let event = &published[1];
    assert_eq!(event["event"], "token.revoked");
    assert_eq!((&event["token_id"], &event["user_id"]), (&json!(token.id), &json!("an\"n\n")));
    assert_eq!((&event["actor"], &event["reason"]), (&json!("postgres"), &json!("leaked\u{1b}[2J")));
    assert!(event["at"].is_string() && event["level"] == "INFO", "{event}");
    assert!(event.get("client_addr").is_none(), "{event}");
    assert!(
        published[0]["detail"].as_str().is_some_and(|detail| detail.contains("posts:read")),
        "{:?}",
        published[0]
    );
    Ok(())
}

#[tokio::test]
async fn lost_access_is_published_without_waiting_for_the_interval() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "woken").await?;
    let token = issue(&db.owner, "a", &[]).await?;
    let before = last_event(&db.owner).await?;
    let mut daemon = run(&db.url(), &[LAZY])?;
    eventually_logs(&mut daemon, "listening").await;
    subscribed(&db.owner, "log").await;
    revoke(&db.owner, token.id).await?;
    eventually_publishes(&daemon, &logged_after(&db.owner, before).await?).await;
    Ok(())
}

#[tokio::test]
async fn events_of_its_downtime_are_published_at_the_next_start() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "downtime").await?;
    let mut before = last_event(&db.owner).await?;
    for round in 0..3 {
        let mut daemon = run(&db.url(), &[EAGER])?;
        subscribed(&db.owner, "log").await;
        let running = issue(&db.owner, "a", &[]).await?;
        revoke(&db.owner, running.id).await?;
        let logged = logged_after(&db.owner, before).await?;
        eventually_publishes(&daemon, &logged).await;
        assert!(stop(&mut daemon)?.success());
        assert_eq!(ids(&published(&daemon)), logged.into_iter().collect::<Vec<_>>(), "round {round}");

        before = last_event(&db.owner).await?;
        let down = issue(&db.owner, "a", &[]).await?;
        revoke(&db.owner, down.id).await?;
    }
    Ok(())
}

#[tokio::test]
async fn daemons_share_a_subscription_and_others_have_their_own() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "shared").await?;
    let before = last_event(&db.owner).await?;
    let mut daemons = [
        run(&db.url(), &[EAGER, &["--batch-size=2"]])?,
        run(&db.url(), &[EAGER, &["--batch-size=2"]])?,
        run(&db.url(), &[EAGER, &["--subscription=siem"]])?,
    ];
    subscribed(&db.owner, "log").await;
    subscribed(&db.owner, "siem").await;
    for _ in 0..40 {
        let token = issue(&db.owner, "a", &[]).await?;
        revoke(&db.owner, token.id).await?;
    }
    let logged = logged_after(&db.owner, before).await?;
    let shared = || [ids(&published(&daemons[0])), ids(&published(&daemons[1]))].concat();
    eventually_async(LONG, "the two to publish all", async || shared().len() >= logged.len()).await;
    eventually_publishes(&daemons[2], &logged).await;
    let mut shared = shared();
    shared.sort_unstable();
    let logged: Vec<i64> = logged.into_iter().collect();
    assert_eq!(shared, logged, "each is published by one of the two");
    assert_eq!(ids(&published(&daemons[2])), logged);
    for daemon in &mut daemons {
        assert!(stop(daemon)?.success());
    }
    Ok(())
}

/// The tasks that run by default.
const TASKS: [&str; 13] = [
    "announce_expiries",
    "deliver_webhooks",
    "expire_tokens",
    "fetch_keys",
    "flush_usage",
    "heartbeat",
    "lease_quotas",
    "observe",
    "publish_events",
    "purge",
    "rotate_keys",
    "seal_audit",
    "watch_usage",
];

#[tokio::test]
async fn it_reports_the_status_of_its_tasks_to_the_server() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "heartbeat").await?;
    let mut daemon = run(&db.url(), &[EAGER])?;
    let all = "select to_jsonb(d) from tollgate.daemons d";
    eventually_async(LONG, "a report", async || !db.operator.query(all, &[]).await.unwrap().is_empty()).await;
    let report: Value = value(&db.operator, all).await?;
    assert_eq!(report["pid"], json!(daemon.pid()));
    let tasks: BTreeSet<&str> =
        report["tasks"].as_object().context("an object")?.keys().map(String::as_str).collect();
    assert_eq!(tasks, BTreeSet::from(TASKS));
    assert!(stop(&mut daemon)?.success());
    Ok(())
}

// ---- Faults

async fn eventually_restarted(cluster: &Cluster) {
    eventually_async(LONG, "the server to be back", async || {
        cluster.connect("postgres", DATABASE).await.is_ok()
    })
    .await;
}

#[tokio::test]
async fn it_outlives_crashes_and_restarts_of_the_server() -> Result<()> {
    let mut cluster = Arc::new(common::start(Cluster::builder())?);
    let db = Db::only(&cluster).await?;
    let token = issue(&db.owner, "a", &[]).await?;
    let mut before = last_event(&db.owner).await?;
    let url = db.url();
    // Events are published as soon as it is notified, or not at all: so it must listen again after each fault.
    let mut daemon = run(&url, &[&["--flush-interval=100ms", "--publish-interval=24h"]])?;
    eventually_logs(&mut daemon, "listening").await;
    subscribed(&db.owner, "log").await;
    drop(db);

    let mut uses = 0;
    let mut expected = BTreeSet::new();
    for fault in ["crash", "restart", "disconnection", "crash"] {
        let server = Arc::get_mut(&mut cluster).context("no other holder")?;
        match fault {
            "crash" => {
                server.crash()?;
                eventually_logs(&mut daemon, "could not connect").await;
                server.restart()?;
            }
            "restart" => server.restart()?,
            _ => server.execute(
                DATABASE,
                "select pg_terminate_backend(pid) from pg_stat_activity where usename = 'tollgated'",
            )?,
        }
        eventually_restarted(&cluster).await;
        let owner = cluster.connect("postgres", DATABASE).await?;
        let web = cluster.connect("web", DATABASE).await?;
        code(&web, &token.token).await?;
        uses += 1;
        eventually_counts(&owner, &token, (uses, 0)).await;
        eventually_async(LONG, "the daemon to listen again", async || {
            let listening = "select exists (select from pg_stat_activity
                 where usename = 'tollgated' and query ~* '^unlisten tollgate_proof')";
            value::<bool>(&owner, listening).await.unwrap()
        })
        .await;
        let gone = issue(&owner, "a", &[]).await?;
        revoke(&owner, gone.id).await?;
        let logged = logged_after(&owner, before).await?;
        eventually_publishes(&daemon, &logged).await;
        expected.extend(logged);
        before = last_event(&owner).await?;
    }
    // Some may have been published twice: those whose publication was not committed before the server went down.
    let published: BTreeSet<i64> = ids(&published(&daemon)).into_iter().collect();
    assert_eq!(published, expected);
    assert!(stop(&mut daemon)?.success());
    Ok(())
}

#[tokio::test]
async fn it_waits_for_a_server_that_is_down_and_stops_without_it() -> Result<()> {
    let mut cluster = Arc::new(common::start(Cluster::builder())?);
    let db = Db::only(&cluster).await?;
    let token = issue(&db.owner, "a", &[]).await?;
    let url = db.url();
    drop(db);
    Arc::get_mut(&mut cluster).context("no other holder")?.stop()?;

    let mut daemon = run(&url, &[EAGER])?;
    eventually_logs(&mut daemon, "could not connect").await;
    assert!(daemon.log().contains("start the server"), "{}", daemon.log());
    assert!(daemon.log().contains(&cluster.port().to_string()), "{}", daemon.log());
    Arc::get_mut(&mut cluster).context("no other holder")?.restart()?;
    let web = cluster.connect("web", DATABASE).await?;
    code(&web, &token.token).await?;
    eventually_counts(&cluster.connect("postgres", DATABASE).await?, &token, (1, 0)).await;
    eventually_logs(&mut daemon, "connected to").await;

    drop(web);
    Arc::get_mut(&mut cluster).context("no other holder")?.stop()?;
    assert!(stop(&mut daemon)?.success(), "{}", daemon.log());
    Ok(())
}

#[tokio::test]
async fn without_extension_or_grants_it_says_how_to_fix_it_and_recovers() -> Result<()> {
    let cluster = Arc::new(Cluster::builder().extension(false).start()?);
    cluster.execute(DATABASE, "create role web login; create role tollgated login")?;
    let mut daemon = run(&cluster.url(OPERATOR, DATABASE), &[EAGER])?;
    eventually_logs(&mut daemon, "CREATE EXTENSION tollgate").await;

    cluster.execute(DATABASE, "create extension tollgate")?;
    eventually_logs(&mut daemon, "permission denied").await;
    assert!(daemon.log().contains("tollgated check"), "{}", daemon.log());

    common::prepare(&cluster, DATABASE)?;
    let db = Db::only(&cluster).await?;
    let token = issue(&db.owner, "a", &[]).await?;
    code(&db.web, &token.token).await?;
    eventually_counts(&db.owner, &token, (1, 0)).await;
    eventually_logs(&mut daemon, "works again").await;
    subscribed(&db.owner, "log").await;
    let before = last_event(&db.owner).await?;
    revoke(&db.owner, token.id).await?;
    eventually_publishes(&daemon, &logged_after(&db.owner, before).await?).await;
    // The problems are over, and the warnings did not fill the log.
    let warnings = lines(&daemon).iter().filter(|line| line["level"] == "WARN").count();
    assert!(warnings < 25, "{warnings} warnings");
    assert!(stop(&mut daemon)?.success());
    Ok(())
}

#[tokio::test]
async fn without_preload_it_says_so_and_does_the_rest() -> Result<()> {
    let cluster = Arc::new(common::start(Cluster::builder().preload(false))?);
    let db = Db::only(&cluster).await?;
    let mut daemon = run(&db.url(), &[EAGER])?;
    eventually_logs(&mut daemon, "shared_preload_libraries").await;
    subscribed(&db.owner, "log").await;
    let before = last_event(&db.owner).await?;
    let token = issue(&db.owner, "a", &[]).await?;
    revoke(&db.owner, token.id).await?;
    eventually_publishes(&daemon, &logged_after(&db.owner, before).await?).await;
    let said = lines(&daemon).iter().filter(|line| line["level"] == "WARN").count();
    assert_eq!(said, 1, "once, not at every flush:\n{}", daemon.log());
    assert!(stop(&mut daemon)?.success());
    Ok(())
}

// ---- Its end

#[tokio::test]
async fn asked_to_stop_it_flushes_a_last_time() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "stopped").await?;
    let token = issue(&db.owner, "a", &[]).await?;
    let mut uses = 0;
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        code(&db.web, &token.token).await?;
        uses += 1;
        let mut daemon = run(&db.url(), &[LAZY])?;
        eventually_counts(&db.owner, &token, (uses, 0)).await;
        code(&db.web, &token.token).await?;
        uses += 1;
        daemon.signal(signal)?;
        assert_eq!(daemon.wait(LONG)?.code(), Some(0), "{}", daemon.log());
        assert_eq!(counts(&db.owner, token.id).await?, (uses, 0), "{signal}");
    }
    Ok(())
}

/// The tasks it named as stuck when it ended. Others may have waited for the one that really was.
fn stuck(daemon: &Tollgated) -> String {
    lines(daemon).iter().find_map(|line| line["stuck"].as_str().map(str::to_owned)).unwrap_or_default()
}

/// The daemon and a session that blocks its flush. The token was used twice, and one of the uses is flushed.
async fn held_up(db: &Db, token: &Token, arguments: &[&str]) -> Result<(Tollgated, Client)> {
    code(&db.web, &token.token).await?;
    flush_all(&db.operator).await?;
    code(&db.web, &token.token).await?;
    let holder = db.session("postgres").await?;
    holder.batch_execute("begin; select from tollgate.token_usage for update").await?;
    let daemon = run(&db.url(), &[EAGER, arguments])?;
    let waits = "select exists (select from pg_stat_activity
        where usename = 'tollgated' and wait_event_type = 'Lock' and datname = current_database())";
    eventually_async(LONG, "the flush to wait", async || value::<bool>(&db.owner, waits).await.unwrap())
        .await;
    Ok((daemon, holder))
}

#[tokio::test]
async fn tasks_that_do_not_end_within_the_grace_are_named_and_nothing_is_lost() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "stuck").await?;
    let token = issue(&db.owner, "a", &[]).await?;
    let (mut daemon, holder) = held_up(&db, &token, &["--shutdown-grace=1s"]).await?;
    assert_eq!(stop(&mut daemon)?.code(), Some(ABANDONED), "{}", daemon.log());
    let lines = lines(&daemon);
    let named: Vec<&Value> = lines.iter().filter(|line| line.get("stuck").is_some()).collect();
    assert_eq!(named.len(), 1, "{}", daemon.log());
    assert_eq!(named[0]["level"], json!("ERROR"));
    assert!(stuck(&daemon).contains("flush_usage"), "{}", daemon.log());

    holder.batch_execute("rollback").await?;
    code(&db.web, &token.token).await?;
    let mut next = run(&db.url(), &[EAGER])?;
    eventually_counts(&db.owner, &token, (3, 0)).await;
    assert!(stop(&mut next)?.success());
    Ok(())
}

#[tokio::test]
async fn asked_twice_it_stops_at_once() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "impatient").await?;
    let token = issue(&db.owner, "a", &[]).await?;
    let (mut daemon, holder) = held_up(&db, &token, &["--shutdown-grace=1h"]).await?;
    daemon.terminate()?;
    eventually_logs(&mut daemon, "stopping").await;
    daemon.terminate()?;
    assert_eq!(daemon.wait(LONG)?.code(), Some(ABANDONED), "{}", daemon.log());
    assert!(stuck(&daemon).contains("flush_usage"), "{}", daemon.log());
    holder.batch_execute("rollback").await?;
    flush_all(&db.operator).await?;
    assert_eq!(counts(&db.owner, token.id).await?, (2, 0));
    Ok(())
}

#[tokio::test]
async fn sessions_that_it_no_longer_needs_are_closed() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "idle").await?;
    // Never again will as many tasks wait at once.
    db.owner.batch_execute("begin; lock table tollgate.api_tokens in access exclusive mode").await?;
    let _daemon = run(&db.url(), &[LAZY])?;
    let sessions = async |which: &str| -> i64 {
        let count = format!(
            "select count(*) from pg_stat_activity
             where application_name = 'tollgated run' and datname = current_database() and {which}"
        );
        value(&db.owner, &count).await.unwrap()
    };
    eventually_async(LONG, "three tasks to wait for the lock", async || {
        // Within a transaction the statistics are a snapshot.
        db.owner.batch_execute("select pg_stat_clear_snapshot()").await.unwrap();
        sessions("wait_event_type = 'Lock'").await >= 3
    })
    .await;
    let most = sessions("true").await;
    db.owner.batch_execute("commit").await?;
    eventually_async(LONG, "two sessions to be closed", async || sessions("true").await <= most - 2).await;
    Ok(())
}

/// Nothing comes back at all, as when the machine at the other end is gone.
#[tokio::test]
async fn a_server_that_does_not_answer_cannot_keep_it_from_stopping() -> Result<()> {
    let cluster = Arc::new(common::start(Cluster::builder())?);
    let db = Db::only(&cluster).await?;
    let mut daemon = run(&db.url(), &[EAGER, &["--shutdown-grace=1s"]])?;
    eventually_logs(&mut daemon, "listening").await;
    subscribed(&db.owner, "log").await;
    let rows = db
        .owner
        .query(
            "select pid from pg_stat_activity
             where application_name = 'tollgated run' and datname = current_database()",
            &[],
        )
        .await?;
    let backends: Vec<Pid> = rows.iter().map(|row| Pid::from_raw(row.get(0))).collect();
    assert!(!backends.is_empty());
    // The postmaster too, which would accept new connections.
    let postmaster = std::fs::read_to_string(cluster.data_dir().join("postmaster.pid"))?;
    let postmaster = Pid::from_raw(postmaster.lines().next().context("its process id")?.trim().parse()?);
    let signal = |signal| [postmaster].iter().chain(&backends).try_for_each(|&process| kill(process, signal));
    signal(Signal::SIGSTOP)?;
    let status = stop(&mut daemon);
    signal(Signal::SIGCONT)?;
    assert_eq!(status?.code(), Some(ABANDONED), "{}", daemon.log());
    assert!(stuck(&daemon).contains("flush_usage"), "{}", daemon.log());
    Ok(())
}

#[tokio::test]
async fn the_pid_file_is_there_while_it_runs() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "pidfile").await?;
    let directory = tempfile::tempdir()?;
    Account::unprivileged()?.own(directory.path())?;
    let path = directory.path().join("tollgated.pid");
    let option = format!("--pid-file={}", path.display());
    let mut daemon = run(&db.url(), &[EAGER, &[&option]])?;
    eventually_async(LONG, "the file", async || path.exists()).await;
    assert_eq!(std::fs::read_to_string(&path)?.trim(), daemon.pid().to_string());
    assert!(stop(&mut daemon)?.success());
    assert!(!path.exists());
    Ok(())
}

// ---- Nothing is lost when it is killed

/// The acceptance test of metering.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn counts_are_exact_although_the_daemon_is_killed_again_and_again() -> Result<()> {
    const CLIENTS: usize = 8;
    let db = Db::create(&SHARED.cluster()?, "killed").await?;
    let done = Arc::new(AtomicBool::new(false));
    let tokens: Arc<Vec<Token>> = Arc::new(issue_many(&db.owner, 100).await?);
    let mut clients = Vec::new();
    for _ in 0..CLIENTS {
        let (web, tokens, done) = (db.session("web").await?, Arc::clone(&tokens), Arc::clone(&done));
        clients.push(tokio::spawn(async move {
            let statement = web.prepare("select v.valid from tollgate.verify_api_token($1, $2) v").await?;
            let mut laps = 0;
            while !done.load(Ordering::Relaxed) {
                // Each token is accepted four times and refused once.
                for n in 0..5 * tokens.len() {
                    let required = (n / tokens.len() == 4).then(|| vec!["users:write"]);
                    let row =
                        web.query_one(&statement, &[&tokens[n % tokens.len()].token, &required]).await?;
                    ensure!(row.get::<_, bool>(0) == required.is_none());
                }
                laps += 1;
            }
            anyhow::Ok(laps)
        }));
    }
    let mut kills = 0;
    while kills < rounds(20) {
        let mut daemon = run(&db.url(), &[EAGER])?;
        // Sometimes killed before it has connected, but not always.
        if kills % 3 != 0 {
            let applied = totals(&db.owner).await?;
            eventually_async(LONG, "a flush", async || totals(&db.owner).await.unwrap() != applied).await;
        }
        some_moment(Duration::from_millis(300)).await;
        daemon.kill()?;
        kills += 1;
    }
    done.store(true, Ordering::Relaxed);
    let mut laps: i64 = 0;
    for client in clients {
        laps += client.await??;
    }
    let mut daemon = run(&db.url(), &[LAZY])?;
    eventually_async(LONG, "the daemon to be there", async || daemon.log().contains("listening")).await;
    assert!(stop(&mut daemon)?.success());

    for token in tokens.iter() {
        assert_eq!(counts(&db.owner, token.id).await?, (4 * laps, laps), "{kills} kills");
    }
    let tokens = tokens.len() as i64;
    assert_eq!(totals(&db.owner).await?, (4 * laps * tokens, laps * tokens));
    assert!(stats(&db.operator).await?["flushes"].as_i64() > Some(5), "this was to flush in the middle");
    Ok(())
}

#[tokio::test]
async fn no_event_is_lost_although_the_daemon_is_killed_again_and_again() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "killedevents").await?;
    let before = last_event(&db.owner).await?;
    let mut first = run(&db.url(), &[EAGER])?;
    subscribed(&db.owner, "log").await;
    first.kill()?;
    let mut known: BTreeSet<i64> = ids(&published(&first)).into_iter().collect();
    for round in 0..6 {
        let mut daemon = run(&db.url(), &[EAGER, &["--batch-size=2"]])?;
        for _ in 0..10 {
            let token = issue(&db.owner, "a", &[]).await?;
            revoke(&db.owner, token.id).await?;
        }
        if round % 2 == 0 {
            eventually_async(LONG, "a first event", async || !published(&daemon).is_empty()).await;
        }
        daemon.kill()?;
        known.extend(ids(&published(&daemon)));
    }
    let logged = logged_after(&db.owner, before).await?;
    let last = run(&db.url(), &[EAGER])?;
    eventually_async(LONG, "the rest to be published", async || {
        known.extend(ids(&published(&last)));
        known.is_superset(&logged)
    })
    .await;
    assert_eq!(known, logged);
    Ok(())
}

/// More events than fit into a pipe: when the first one is read from it, the batch cannot have been published
/// completely.
#[tokio::test]
async fn no_event_is_lost_when_the_daemon_is_killed_while_it_publishes() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "killedtelling").await?;
    let before = last_event(&db.owner).await?;
    let mut first = run(&db.url(), &[EAGER])?;
    subscribed(&db.owner, "log").await;
    assert!(stop(&mut first)?.success());
    let earlier = logged_after(&db.owner, before).await?;
    issue_many(&db.owner, 1_000).await?;
    let logged: BTreeSet<i64> =
        logged_after(&db.owner, before).await?.difference(&earlier).copied().collect();

    let (pipe, end) = std::io::pipe()?;
    let mut command = Tollgated::command(&db.url())?;
    command.args(["run", "--log-format=json"]).args(EAGER);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(end);
    let mut daemon = command.spawn()?;
    // Or our end of it would keep it open.
    drop(command);
    let mut pipe = BufReader::new(pipe);
    let mut known = BTreeSet::new();
    let mut killed = false;
    loop {
        let mut line = String::new();
        // A line that the kill cut off was not published.
        if pipe.read_line(&mut line)? == 0 || !line.ends_with('\n') {
            break;
        }
        let line: Value = serde_json::from_str(&line)?;
        if line["target"] == "tollgate::events" {
            known.extend(line["id"].as_i64());
            if !killed {
                daemon.kill()?;
                daemon.wait()?;
                killed = true;
            }
        }
    }
    assert!(!known.is_empty() && !known.is_superset(&logged), "{} of {}", known.len(), logged.len());

    let last = run(&db.url(), &[EAGER])?;
    eventually_async(LONG, "the rest to be published", async || {
        known.extend(ids(&published(&last)));
        known.is_superset(&logged)
    })
    .await;
    Ok(())
}

/// Events go to the log: while its disk is full, they must wait.
#[tokio::test]
async fn events_that_could_not_be_written_are_published_later() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "diskfull").await?;
    let before = last_event(&db.owner).await?;
    let mut first = run(&db.url(), &[EAGER])?;
    subscribed(&db.owner, "log").await;
    assert!(stop(&mut first)?.success());

    let full = std::fs::File::options().write(true).open("/dev/full")?;
    let mut command = Tollgated::command(&db.url())?;
    command.arg("run").args(EAGER).stdin(Stdio::null()).stdout(Stdio::null()).stderr(full);
    let mut mute = command.spawn()?;
    let token = issue(&db.owner, "a", &[]).await?;
    code(&db.web, &token.token).await?;
    revoke(&db.owner, token.id).await?;
    let logged = logged_after(&db.owner, before).await?;
    // It works, or has given up; either way it has had its chance to publish.
    let peek = "select exists (select from tollgate.subscriptions s,
                    lateral tollgate.read_events(s.place) b where b.events <> '[]')";
    let end = std::time::Instant::now() + Duration::from_secs(2);
    while std::time::Instant::now() < end
        && mute.try_wait()?.is_none()
        && value::<bool>(&db.owner, peek).await?
    {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let _ = mute.kill();
    mute.wait()?;

    let last = run(&db.url(), &[EAGER])?;
    eventually_publishes(&last, &logged).await;
    Ok(())
}

// ---- Settings of the database or the role

#[tokio::test]
async fn no_setting_of_the_database_cuts_its_sessions_or_changes_what_they_do() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "settings").await?;
    for setting in [
        "idle_session_timeout = '300ms'",
        "idle_in_transaction_session_timeout = '200ms'",
        "transaction_timeout = '200ms'",
        "statement_timeout = '200ms'",
        "lock_timeout = '5ms'",
        "exit_on_error = on",
        "row_security = off",
        "jit = on",
        "jit_above_cost = 0",
        "restrict_nonsystem_relation_kind = 'view'",
        "default_transaction_read_only = on",
        "default_transaction_deferrable = on",
        "default_transaction_isolation = 'serializable'",
        "search_path = ''",
        "timezone = 'Asia/Kathmandu'",
        "datestyle = 'SQL, DMY'",
        "intervalstyle = 'sql_standard'",
        "bytea_output = 'escape'",
        "standard_conforming_strings = off",
        "session_replication_role = replica",
        "synchronous_commit = off",
    ] {
        let name = setting.split(' ').next().unwrap_or_default();
        let known = format!("select exists (select from pg_settings where name = '{name}')");
        if value::<bool>(&db.owner, &known).await? {
            db.owner.batch_execute(&format!("alter database {} set {setting}", db.name)).await?;
        }
    }
    let mut daemon = run(&db.url(), &[EAGER, &["--seal-interval=100ms"]])?;
    eventually_logs(&mut daemon, "listening").await;
    // These sessions began before the settings.
    subscribed(&db.owner, "log").await;
    let before = last_event(&db.owner).await?;
    let token = issue(&db.owner, "a", &[]).await?;
    let expiring = common::issue_with(&db.owner, "a", "expires_in => '1 second'").await?;
    assert_eq!(code(&db.web, &token.token).await?, "VALID");
    eventually_counts(&db.owner, &token, (1, 0)).await;
    eventually_async(LONG, "the expiry to be recorded", async || {
        let recorded = format!(
            "select exists (select from tollgate.audit_log where event = 'token.expired' and token_id = '{}')",
            expiring.id
        );
        value::<bool>(&db.owner, &recorded).await.is_ok_and(|recorded| recorded)
    })
    .await;
    eventually_publishes(&daemon, &logged_after(&db.owner, before).await?).await;
    // By then each session was idle many times longer than the database allows.
    let warnings: Vec<Value> = lines(&daemon).into_iter().filter(|line| line["level"] != "INFO").collect();
    assert_eq!(warnings, Vec::<Value>::new());
    assert!(stop(&mut daemon)?.success());
    Ok(())
}

// ---- Its size

/// The part `soak` of the benchmark measures how much it takes; here it must not grow.
#[tokio::test]
async fn its_memory_does_not_grow_at_rest() -> Result<()> {
    const GROWTH: u64 = 1_000_000;
    let db = Db::create(&SHARED.cluster()?, "resting").await?;
    let mut command = Tollgated::command(&db.url())?;
    command.arg("run").args(EAGER).args([
        "--log-format=json",
        "--ops-address=127.0.0.1:0",
        "--audit-retention=400days",
    ]);
    let (daemon, address) = web::start(&mut command).await?;
    let flushes = "tollgated_task_runs_total{task=\"flush_usage\"}";
    web::eventually_measures(address, flushes, |count| count >= 20.0).await;
    let before = web::memory(&daemon, "RssAnon")?;
    web::eventually_measures(address, flushes, |count| count >= 60.0).await;
    let after = web::memory(&daemon, "RssAnon")?;
    assert!(after < before + GROWTH, "from {before} to {after} bytes");
    Ok(())
}

// ---- Secrets

const PASSWORD: &str = "s3cr3t-of-the-daemon";

#[tokio::test]
async fn neither_the_password_nor_a_token_appears_in_what_it_prints() -> Result<()> {
    let mut cluster = Arc::new(common::start(Cluster::builder())?);
    let db = Db::only(&cluster).await?;
    cluster.execute(DATABASE, &format!("alter role {OPERATOR} password '{PASSWORD}'"))?;
    let rules = cluster.data_dir().join("pg_hba.conf");
    let trusting = std::fs::read_to_string(&rules)?;
    std::fs::write(&rules, format!("host all {OPERATOR} 127.0.0.1/32 scram-sha-256\n{trusting}"))?;
    let wrong = format!("postgres://{OPERATOR}:{PASSWORD}-typo@127.0.0.1:{}/{DATABASE}", cluster.port());
    let right = format!("postgres://{OPERATOR}:{PASSWORD}@127.0.0.1:{}/{DATABASE}", cluster.port());
    let everything = [EAGER, &["--log-level=trace"]];
    let url = db.url();
    drop(db);
    Arc::get_mut(&mut cluster).context("no other holder")?.restart()?;
    let cluster = &cluster;
    let owner = cluster.connect("postgres", DATABASE).await?;
    let web = cluster.connect("web", DATABASE).await?;

    let mut outputs = Vec::new();
    let mut nameless = run(&url, &everything)?;
    eventually_logs(&mut nameless, "could not connect").await;
    assert!(stop(&mut nameless)?.success());

    let mut refused = run(&wrong, &everything)?;
    eventually_logs(&mut refused, "password authentication failed").await;
    assert!(stop(&mut refused)?.success());
    outputs.push(refused.log() + &refused.stdout());

    let as_argument = format!("--database-url={right}");
    for (url, arguments) in [(right.as_str(), vec![]), ("", vec![as_argument.as_str()])] {
        let mut daemon = run(url, &[everything[0], everything[1], &arguments])?;
        if arguments.is_empty() {
            let command_line = std::fs::read(format!("/proc/{}/cmdline", daemon.pid()))?;
            assert!(!String::from_utf8_lossy(&command_line).contains(PASSWORD));
        }
        eventually_logs(&mut daemon, "listening").await;
        subscribed(&owner, "log").await;
        let before = last_event(&owner).await?;
        let token = issue(&owner, "a", &[]).await?;
        verify_each(&web, std::slice::from_ref(&token)).await?;
        owner.query_one("select tollgate.revoke_presented_token($1, 'leaked')", &[&token.token]).await?;
        eventually_publishes(&daemon, &logged_after(&owner, before).await?).await;
        eventually_counts(&owner, &token, (1, 0)).await;
        // The server goes away, which makes it log its connections.
        cluster.execute(
            DATABASE,
            "select pg_terminate_backend(pid) from pg_stat_activity where usename = 'tollgated'",
        )?;
        daemon.signal(Signal::SIGUSR1)?;
        eventually_logs(&mut daemon, "SIGUSR1").await;
        assert!(stop(&mut daemon)?.success());
        let output = daemon.log() + &daemon.stdout();
        assert!(!output.contains(&token.token[8..]), "a token in:\n{output}");
        outputs.push(output);
    }
    for output in outputs {
        assert!(output.contains("starting"), "{output}");
        assert!(!output.contains(PASSWORD), "the password in:\n{output}");
    }
    Ok(())
}
