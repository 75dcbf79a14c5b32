//! Quotas with real daemons, while servers and daemons are killed, stopped and promoted: never more uses than a quota
//! allows, and never fewer than what the leases that were lost leave of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Result;
use nix::sys::signal::Signal;
use tokio::task::JoinSet;
use tokio_postgres::Client;
use tollgate_tests::{Cluster, DATABASE, Tollgated, eventually_async};

use crate::common::{self, Token, code, issue, value};
use crate::operator::{Db, OPERATOR};
use crate::running::{LAZY, LONG, rounds, run, some_moment};

async fn set(owner: &Client, token: &Token, arguments: &str) -> Result<()> {
    Ok(owner.batch_execute(&format!("select tollgate.set_quota('{}', {arguments})", token.id)).await?)
}

/// One database on a server of its own, a token, and a daemon that leases.
async fn started(arguments: &str) -> Result<(Db, Token, Tollgated)> {
    let cluster = Arc::new(common::start(Cluster::builder())?);
    let db = Db::only(&cluster).await?;
    let token = issue(&db.owner, "ann", &[]).await?;
    set(&db.owner, &token, arguments).await?;
    let daemon = run(&db.url(), &[LAZY])?;
    Ok((db, token, daemon))
}

/// Uses the token until its quota is used up, and returns how often that succeeded. Refusals until the next lease are
/// waited out.
async fn use_up(client: &Client, token: &Token) -> Result<i64> {
    let mut uses = 0;
    loop {
        let call =
            "select code, retry_after is null or retry_after > '2 s' from tollgate.verify_api_token($1)";
        let row = client.query_one(call, &[&token.token]).await?;
        match (row.get(0), row.get(1)) {
            ("VALID", _) => uses += 1,
            ("QUOTA_EXCEEDED", true) => return Ok(uses),
            ("QUOTA_EXCEEDED", _) => tokio::task::yield_now().await,
            (other, _) => anyhow::bail!("{other}"),
        }
    }
}

async fn taken(owner: &Client) -> Result<i64> {
    value(owner, "select taken from tollgate.quotas").await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn however_often_server_and_daemon_are_killed_no_use_is_admitted_twice_and_no_more_than_leases_are_lost()
-> Result<()> {
    const AMOUNT: i64 = 5000;
    const LEASE: i64 = 200;
    const CLIENTS: usize = 4;
    let mut cluster = common::start(Cluster::builder())?;
    crate::operator::grant(&cluster, DATABASE)?;
    let owner = cluster.connect("postgres", DATABASE).await?;
    let token = issue(&owner, "ann", &[]).await?;
    set(&owner, &token, &format!("amount => {AMOUNT}, per => 'month', lease => {LEASE}")).await?;
    let url = cluster.url(OPERATOR, DATABASE);
    let (mut admitted, mut crashes) = (0, 0);
    for round in 0..rounds(3) {
        let daemon = run(&url, &[LAZY])?;
        let stop = Arc::new(AtomicBool::new(false));
        let mut clients = JoinSet::new();
        for _ in 0..CLIENTS {
            let (web, token) = (cluster.connect("web", DATABASE).await?, token.clone());
            let stop = Arc::clone(&stop);
            clients.spawn(async move {
                let (mut uses, mut unknown) = (0, 0);
                while !stop.load(Ordering::Relaxed) {
                    match code(&web, &token.token).await {
                        Ok(code) => uses += i64::from(code == "VALID"),
                        // It may have been admitted before the server was killed.
                        Err(_) => {
                            unknown += 1;
                            break;
                        }
                    }
                }
                (uses, unknown)
            });
        }
        some_moment(std::time::Duration::from_millis(400)).await;
        if round % 2 == 1 {
            daemon.signal(Signal::SIGKILL)?;
        }
        cluster.crash()?;
        stop.store(true, Ordering::Relaxed);
        while let Some(result) = clients.join_next().await {
            let (uses, _unknown) = result?;
            admitted += uses;
        }
        crashes += 1;
        cluster.restart()?;
    }
    let _daemon = run(&url, &[LAZY])?;
    let web = cluster.connect("web", DATABASE).await?;
    admitted += use_up(&web, &token).await?;
    // Each crash loses a lease that may be whole and one that was just granted, and an answer of each client.
    let lost = i64::from(crashes) * (2 * LEASE + i64::try_from(CLIENTS)?);
    assert!(admitted <= AMOUNT, "{admitted} of {AMOUNT}");
    assert!(admitted >= AMOUNT - lost, "{admitted} of {AMOUNT} after {crashes} crashes");
    let owner = cluster.connect("postgres", DATABASE).await?;
    assert_eq!(taken(&owner).await?, AMOUNT);
    Ok(())
}

#[tokio::test]
async fn two_daemons_lease_no_more_than_one_and_nothing_is_lost() -> Result<()> {
    let (db, token, _daemon) = started("amount => 1000, per => 'day', lease => 50").await?;
    let _other = run(&db.url(), &[LAZY])?;
    let other = db.session("web").await?;
    let (one, two) = tokio::join!(use_up(&db.web, &token), use_up(&other, &token));
    assert_eq!(one? + two?, 1000);
    let row = db
        .owner
        .query_one("select used, leased, remaining from tollgate.token_quota($1)", &[&token.id])
        .await?;
    assert_eq!((row.get::<_, i64>(0), row.get::<_, i64>(1), row.get::<_, i64>(2)), (1000, 0, 0));
    Ok(())
}

#[tokio::test]
async fn a_clean_restart_loses_nothing_and_a_crash_what_was_leased() -> Result<()> {
    let mut cluster = common::start(Cluster::builder())?;
    let owner = cluster.connect("postgres", DATABASE).await?;
    let (token, unused) = (issue(&owner, "ann", &[]).await?, issue(&owner, "ben", &[]).await?);
    for one in [&token, &unused] {
        set(&owner, one, "amount => 10, per => 'lifetime', lease => 4").await?;
    }
    let web = cluster.connect("web", DATABASE).await?;
    assert_eq!(code(&web, &token.token).await?, "VALID");
    drop((owner, web));
    cluster.stop()?;
    cluster.restart()?;
    let (owner, web) =
        (cluster.connect("postgres", DATABASE).await?, cluster.connect("web", DATABASE).await?);
    for expected in ["VALID", "VALID", "VALID", "QUOTA_EXCEEDED"] {
        assert_eq!(code(&web, &token.token).await?, expected);
    }
    assert_eq!(code(&web, &unused.token).await?, "VALID", "also of what nothing was spent of");
    assert_eq!(value::<i64>(&owner, "select tollgate.lease_quotas()").await?, 1);
    assert_eq!(code(&web, &token.token).await?, "VALID");
    drop((owner, web));

    cluster.crash()?;
    cluster.restart()?;
    let (owner, web) =
        (cluster.connect("postgres", DATABASE).await?, cluster.connect("web", DATABASE).await?);
    for one in [&token, &unused] {
        assert_eq!(code(&web, &one.token).await?, "QUOTA_EXCEEDED");
    }
    assert_eq!(value::<i64>(&owner, "select tollgate.lease_quotas()").await?, 2);
    for expected in ["VALID", "VALID", "QUOTA_EXCEEDED"] {
        assert_eq!(code(&web, &token.token).await?, expected);
    }
    for expected in ["VALID", "VALID", "VALID", "VALID", "QUOTA_EXCEEDED"] {
        assert_eq!(code(&web, &unused.token).await?, expected);
    }
    Ok(())
}

#[tokio::test]
async fn standbys_spend_leases_of_the_primary_and_go_on_when_one_is_promoted() -> Result<()> {
    let cluster = Arc::new(common::start(Cluster::builder())?);
    let db = Db::only(&cluster).await?;
    let token = issue(&db.owner, "ann", &[]).await?;
    set(&db.owner, &token, "amount => 100, per => 'month', lease => 10").await?;
    let standby = db.cluster.standby()?;
    standby.catch_up_with(&db.cluster)?;
    let there = standby.connect("web", DATABASE).await?;
    assert_eq!(code(&there, &token.token).await?, "QUOTA_EXCEEDED", "it has no lease yet");
    let option = format!("--standby={}", standby.url(OPERATOR, DATABASE));
    let mut daemon = run(&db.url(), &[LAZY, &[&option]])?;
    let mut uses = [0, 0];
    // Each has its turn.
    for _ in 0..20 {
        for (number, client) in [&db.web, &there].into_iter().enumerate() {
            eventually_async(LONG, "a use", async || code(client, &token.token).await.unwrap() == "VALID")
                .await;
            uses[number] += 1;
        }
    }
    daemon.terminate()?;
    daemon.wait(LONG)?;
    let taken = taken(&db.owner).await?;
    assert!((40..=100).contains(&taken), "{taken}");

    // What the primary held is lost, and what the standby holds is not.
    standby.catch_up_with(&db.cluster)?;
    standby.promote()?;
    let _daemon = run(&standby.url(OPERATOR, DATABASE), &[LAZY])?;
    let more = use_up(&there, &token).await?;
    let total = uses[0] + uses[1] + more;
    assert!((80..=100).contains(&total), "{uses:?} and {more}");
    let owner = standby.connect("postgres", DATABASE).await?;
    assert_eq!(self::taken(&owner).await?, 100);
    Ok(())
}

#[tokio::test]
async fn a_daemon_reports_the_leases_that_it_had_granted() -> Result<()> {
    let (db, token, _daemon) = started("amount => 20, per => 'day', lease => 5").await?;
    assert_eq!(use_up(&db.web, &token).await?, 20);
    eventually_async(LONG, "the report", async || {
        let report = "select (d.tasks -> 'lease_quotas' ->> 'items')::bigint from tollgate.daemons d";
        db.owner
            .query_opt(report, &[])
            .await
            .unwrap()
            .is_some_and(|row| row.get::<_, Option<i64>>(0) >= Some(3))
    })
    .await;
    Ok(())
}
