//! `token.expiring`: published ahead of time, once for each expiry.

use std::time::{Duration, Instant};

use crate::common::{self, Shared, code, history, issue, issue_with, refused, revoke, value};
use crate::operator::{self, Db};
use anyhow::{Context as _, Result, ensure};
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use tollgate_tests::{Cluster, Tollgated, eventually_async};
use uuid::Uuid;

static SHARED: Shared = Shared::new(&[]);

async fn db(name: &str) -> Result<Db> {
    Db::create(&SHARED.cluster()?, name).await
}

async fn announce(operator: &Client, notice: &str) -> Result<i64> {
    let sql = format!("select tollgate.announce_expiries('{notice}')");
    value(operator, &sql).await
}

/// How often it was announced.
async fn announced(owner: &Client, token: Uuid) -> Result<usize> {
    Ok(history(owner, token).await?.iter().filter(|(event, _)| event == "token.expiring").count())
}

#[tokio::test]
async fn a_token_is_announced_once_and_again_when_its_expiry_changes() -> Result<()> {
    let db = db("once").await?;
    let soon = issue_with(&db.owner, "ann", "expires_in => '2 days'").await?;
    let later = issue_with(&db.owner, "ann", "expires_in => '20 days'").await?;
    let never = issue_with(&db.owner, "ann", "scopes => '{}'").await?;
    assert_eq!(announce(&db.operator, "7 days").await?, 1);
    assert_eq!(announce(&db.operator, "7 days").await?, 0);
    assert_eq!(announced(&db.owner, soon.id).await?, 1);
    let detail = history(&db.owner, soon.id).await?.pop().map(|(_, detail)| detail).unwrap_or_default();
    assert_eq!(detail["name"], "a test's");
    assert!(detail["expires_at"].is_string(), "{detail}");

    let change = "select from tollgate.update_api_token($1, jsonb_build_object('expires_at', now() + $2::text::interval))";
    db.owner.execute(change, &[&soon.id, &"3 days"]).await?;
    assert_eq!(announce(&db.operator, "7 days").await?, 1);
    assert_eq!(announced(&db.owner, soon.id).await?, 2);
    db.owner.execute(change, &[&soon.id, &"30 days"]).await?;
    assert_eq!(announce(&db.operator, "7 days").await?, 0);
    assert_eq!(announce(&db.operator, "21 days").await?, 1);
    assert_eq!((announced(&db.owner, later.id).await?, announced(&db.owner, never.id).await?), (1, 0));
    Ok(())
}

#[tokio::test]
async fn tokens_that_need_no_replacement_are_not_announced() -> Result<()> {
    let db = db("needless").await?;
    let revoked = issue_with(&db.owner, "ann", "expires_in => '1 day'").await?;
    assert!(revoke(&db.owner, revoked.id).await?);
    let rotated = issue_with(&db.owner, "ann", "expires_in => '30 days'").await?;
    db.owner.execute("select from tollgate.rotate_api_token($1, '1 hour')", &[&rotated.id]).await?;
    let parent = issue_with(&db.owner, "ann", "scopes => '{posts:read}'").await?;
    db.owner
        .execute(
            "select from tollgate.derive_api_token($1, 'one run', '{posts:read}', '5 minutes')",
            &[&parent.token],
        )
        .await?;
    // It is handled once, so that it does not slow down others for as long as it lives.
    assert_eq!(announce(&db.operator, "7 days").await?, 1);
    assert_eq!(announce(&db.operator, "7 days").await?, 0);
    let recorded: i64 =
        value(&db.owner, "select count(*) from tollgate.audit_log where event = 'token.expiring'").await?;
    assert_eq!(recorded, 0);
    Ok(())
}

#[tokio::test]
async fn two_daemons_announce_a_token_once() -> Result<()> {
    let db = db("rivals").await?;
    for _ in 0..50 {
        issue_with(&db.owner, "ann", "expires_in => '1 day'").await?;
    }
    let other = db.session(operator::OPERATOR).await?;
    let batch = "select tollgate.announce_expiries('7 days', 7)";
    let mut total = 0;
    loop {
        let (one, two) = tokio::join!(value::<i64>(&db.operator, batch), value::<i64>(&other, batch));
        let round = one? + two?;
        total += round;
        if round == 0 {
            break;
        }
    }
    assert_eq!(total, 50);
    let events: i64 =
        value(&db.owner, "select count(*) from tollgate.audit_log where event = 'token.expiring'").await?;
    assert_eq!(events, 50);
    Ok(())
}

#[tokio::test]
async fn a_notice_or_batch_that_makes_no_sense_is_refused() -> Result<()> {
    let db = db("senseless").await?;
    for arguments in ["null", "'-1 day'", "'11 years'", "'1 day', 0", "'1 day', null"] {
        let sql = format!("select tollgate.announce_expiries({arguments})");
        refused(db.operator.execute(&sql, &[]).await, &SqlState::INVALID_PARAMETER_VALUE);
    }
    Ok(())
}

#[tokio::test]
async fn the_daemon_announces_ahead_of_time_unless_switched_off() -> Result<()> {
    let db = db("daemon").await?;
    let token = issue_with(&db.owner, "ann", "expires_in => '3 days'").await?;
    let mut silent = Tollgated::spawn(&db.url(), &["run", "--expiry-notice=0"])?;
    eventually_async(Duration::from_secs(60), "the daemon to work", async || {
        silent.log().contains("token.created") || silent.log().contains("sealed the audit log")
    })
    .await;
    silent.terminate()?;
    silent.wait(Duration::from_secs(60))?;
    assert_eq!(announced(&db.owner, token.id).await?, 0);
    let _daemon = Tollgated::spawn(&db.url(), &["run"])?;
    // A session of the first may still lead the task, which is then tried again a minute later.
    eventually_async(Duration::from_secs(150), "the expiry to be announced", async || {
        announced(&db.owner, token.id).await.unwrap() == 1
    })
    .await;
    Ok(())
}

/// Private memory of a process, in MB.
fn memory(pid: &str) -> Option<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find(|line| line.starts_with("RssAnon:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<f64>().ok()? / 1024.0)
}

/// Verifies until a condition holds, or for a fixed time. Returns how long that took, the p99 of the verifications in
/// milliseconds, and the peak memory of the daemon and of one of its backends.
async fn verify_until(
    db: &Db,
    token: &str,
    daemon: Option<&Tollgated>,
    patience: Duration,
    counted: Option<(&str, i64)>,
) -> Result<(Duration, f64, f64, f64)> {
    let begun = Instant::now();
    let (mut times, mut own, mut of_backends) = (Vec::new(), 0.0_f64, 0.0_f64);
    let mut looked = begun;
    loop {
        for _ in 0..50 {
            let at = Instant::now();
            ensure!(code(&db.web, token).await? == "VALID");
            times.push(at.elapsed());
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        if let Some(daemon) = daemon {
            own = own.max(memory(&daemon.pid().to_string()).unwrap_or_default());
            let sessions = "select coalesce(string_agg(pid::text, ' '), '') from pg_stat_activity where usename = 'tollgated'";
            let pids: String = value(&db.owner, sessions).await?;
            of_backends = pids.split(' ').filter_map(memory).fold(of_backends, f64::max);
        }
        if looked.elapsed() > Duration::from_secs(2)
            && let Some((count, expected)) = counted
        {
            looked = Instant::now();
            if value::<i64>(&db.owner, count).await? == expected {
                break;
            }
            ensure!(begun.elapsed() < patience, "{count} is not {expected} after {patience:?}");
        }
        if counted.is_none() && begun.elapsed() >= patience {
            break;
        }
    }
    times.sort();
    let p99 = times.get(times.len() * 99 / 100).context("something was verified")?.as_secs_f64() * 1000.0;
    Ok((begun.elapsed(), p99, own, of_backends))
}

/// Each is recorded once and purged once, and the memory of the daemon and its backends does not grow with them. The
/// duration, and the effect on verifications, are printed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "long: a quarter of an hour"]
async fn half_a_million_tokens_that_expire_in_one_second_are_recorded_and_purged() -> Result<()> {
    const TOKENS: i64 = 500_000;
    const PATIENCE: Duration = Duration::from_hours(1);
    let cluster = std::sync::Arc::new(common::start(
        Cluster::builder().setting("shared_buffers", "512MB").setting("max_wal_size", "4GB"),
    )?);
    let db = Db::only(&cluster).await?;
    let live = issue(&db.owner, "live", &[]).await?;
    let load = format!(
        "insert into tollgate.api_tokens (id, token_hash, user_id, name, scopes, metadata, hint, expires_at)
         select gen_random_uuid(), sha256(g::text::bytea), 'u' || g, 'k', '{{}}', '{{}}', 'h', now() + interval '2 minutes' + random() * interval '1 second'
         from generate_series(1, {TOKENS}) g"
    );
    db.owner.batch_execute(&load).await?;
    db.owner.batch_execute("vacuum analyze tollgate.api_tokens").await?;
    let (_, quiet, ..) = verify_until(&db, &live.token, None, Duration::from_secs(20), None).await?;
    // It also announces.
    let mut daemon = Tollgated::spawn(&db.url(), &["run", "--expiry-notice=0"])?;
    let expired = "select expires_at < now() from tollgate.api_tokens where expires_at is not null order by expires_at desc limit 1";
    eventually_async(Duration::from_secs(300), "all to expire", async || {
        value(&db.owner, expired).await.unwrap()
    })
    .await;
    let recorded = "select count(*) from tollgate.audit_log where event = 'token.expired'";
    let (took, p99, of_daemon, of_backend) =
        verify_until(&db, &live.token, Some(&daemon), PATIENCE, Some((recorded, TOKENS))).await?;
    println!(
        "recorded within {took:.0?}, p99 {p99:.2} ms against {quiet:.2} ms in the quiet, daemon {of_daemon:.0} MB, backend {of_backend:.0} MB"
    );
    assert!(of_daemon < 100.0 && of_backend < 100.0, "of 200 bytes for each token it would be more");
    daemon.terminate()?;
    daemon.wait(Duration::from_secs(60))?;

    let daemon = Tollgated::spawn(&db.url(), &["run", "--retention=0s", "--purge-interval=1s"])?;
    let left = "select count(*) from tollgate.api_tokens";
    let (took, p99, of_daemon, of_backend) =
        verify_until(&db, &live.token, Some(&daemon), PATIENCE, Some((left, 1))).await?;
    println!(
        "purged within {took:.0?}, p99 {p99:.2} ms against {quiet:.2} ms in the quiet, daemon {of_daemon:.0} MB, backend {of_backend:.0} MB"
    );
    assert!(of_daemon < 100.0 && of_backend < 100.0, "of 200 bytes for each token it would be more");
    for (event, distinct) in [("token.expired", TOKENS), ("token.purged", TOKENS)] {
        let counts = format!(
            "select count(*) || ' ' || count(distinct token_id) from tollgate.audit_log where event = '{event}'"
        );
        assert_eq!(value::<String>(&db.owner, &counts).await?, format!("{distinct} {distinct}"), "{event}");
    }
    Ok(())
}
