//! Behaviour under faults: servers and daemons killed, disks full, storms. Each test breaks real processes, and states
//! the invariant that it checks. `make test-long` runs them with more rounds.
//!
//! `daemon.rs` shows that counts and events survive kills of the daemon.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use crate::common::{self, Shared, Token, code, issue, issue_with, revoke, value};
use crate::operator::{Db, issue_many, totals, verify_each};
use crate::running::{
    EAGER, LONG, eventually_counts, eventually_logs, eventually_publishes, last_event, logged_after,
    published, rounds, run, stop, subscribed,
};
use anyhow::{Context as _, Result};
use tokio::task::JoinSet;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use tollgate_tests::{Account, Cluster, DATABASE, eventually_async};
use uuid::Uuid;

static SHARED: Shared = Shared::new(&[]);

// ---- The server is killed

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_server_loses_at_most_what_was_not_flushed_and_counts_nothing_twice() -> Result<()> {
    const CLIENTS: i64 = 8;
    let mut cluster = Arc::new(common::start(Cluster::builder())?);
    let db = Db::only(&cluster).await?;
    let tokens = Arc::new(issue_many(&db.owner, 50).await?);
    let marker = issue(&db.owner, "marker", &[]).await?;
    let mut daemon = run(&db.url(), &[EAGER])?;
    drop(db);
    let mut marks = 0;
    for _ in 0..rounds(3) {
        let owner = cluster.connect("postgres", DATABASE).await?;
        let before = totals(&owner).await?.0;
        let accepted = Arc::new(AtomicI64::new(0));
        let mut clients = JoinSet::new();
        for _ in 0..CLIENTS {
            let (web, tokens) = (cluster.connect("web", DATABASE).await?, Arc::clone(&tokens));
            let accepted = Arc::clone(&accepted);
            // Until the server is gone.
            clients.spawn(async move {
                for token in tokens.iter().cycle() {
                    if code(&web, &token.token).await.is_err() {
                        return;
                    }
                    accepted.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        eventually_async(LONG, "a flush in the middle", async || {
            totals(&owner).await.is_ok_and(|(uses, _)| uses > before + 100)
        })
        .await;
        let flushed = totals(&owner).await?.0;
        drop(owner);
        let server = Arc::get_mut(&mut cluster).context("no other holder")?;
        server.crash()?;
        server.restart()?;
        while clients.join_next().await.is_some() {}

        // Once the marker has arrived, so has everything that was drained before the crash.
        let owner = cluster.connect("postgres", DATABASE).await?;
        let web = cluster.connect("web", DATABASE).await?;
        assert_eq!(code(&web, &marker.token).await?, "VALID");
        marks += 1;
        eventually_counts(&owner, &marker, (marks, 0)).await;
        let sum = totals(&owner).await?.0;
        let accepted = accepted.load(Ordering::Relaxed);
        assert!(flushed < sum, "what had been flushed, {flushed}, is missing in {sum}");
        assert!(sum - 1 - before <= accepted + CLIENTS, "{} counted of {accepted}", sum - 1 - before);

        // From here on it is exact again.
        assert_eq!(verify_each(&web, &tokens).await?, 50);
        eventually_async(LONG, "the rest to be flushed", async || {
            totals(&owner).await.is_ok_and(|(uses, _)| uses >= sum + 50)
        })
        .await;
        assert_eq!(totals(&owner).await?.0, sum + 50);
    }
    assert!(daemon.is_running(), "{}", daemon.log());
    assert!(stop(&mut daemon)?.success());
    Ok(())
}

// ---- The daemon is down

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_revocations_while_the_daemon_is_down_are_all_published_in_order() -> Result<()> {
    const SESSIONS: usize = 4;
    const EACH: i32 = 2_500;
    let db = Db::create(&SHARED.cluster()?, "downtime").await?;
    let mut first = run(&db.url(), &[EAGER])?;
    subscribed(&db.owner, "log").await;
    assert!(stop(&mut first)?.success());
    let before = last_event(&db.owner).await?;
    let mut sessions = JoinSet::new();
    for _ in 0..SESSIONS {
        let session = db.session("postgres").await?;
        let tokens = issue_many(&db.owner, EACH).await?;
        sessions.spawn(async move {
            for token in &tokens {
                revoke(&session, token.id).await?;
            }
            anyhow::Ok(tokens.iter().map(|token| token.id).collect::<Vec<_>>())
        });
    }
    let mut orders: Vec<Vec<Uuid>> = Vec::new();
    while let Some(order) = sessions.join_next().await {
        orders.push(order??);
    }
    let expected = logged_after(&db.owner, before).await?;
    assert_eq!(expected.len(), 2 * SESSIONS * EACH as usize, "each was issued and revoked");

    let daemon = run(&db.url(), &[EAGER])?;
    eventually_publishes(&daemon, &expected).await;
    let published = published(&daemon);
    assert_eq!(published.len(), expected.len(), "each is published once");
    let mut places: HashMap<Uuid, usize> = HashMap::new();
    for (place, event) in published.iter().enumerate().filter(|(_, event)| event["event"] == "token.revoked")
    {
        places.insert(event["token_id"].as_str().context("a token")?.parse()?, place);
    }
    for order in orders {
        let places: Vec<usize> = order.iter().map(|id| places[id]).collect();
        assert!(places.is_sorted(), "published in another order than committed");
    }
    Ok(())
}

// ---- Storms

/// One operation on a token, with the times around it.
#[derive(Debug)]
struct Verified {
    token: usize,
    began: Instant,
    ended: Instant,
    valid: bool,
}

/// Sessions that verify the tokens near the one that others are revoking, in three ways.
async fn verify_until(
    client: Client,
    tokens: Arc<Vec<Token>>,
    next: Arc<AtomicUsize>,
    over: Arc<AtomicBool>,
) -> Result<Vec<Verified>> {
    let statement = client.prepare("select valid from tollgate.verify_api_token($1)").await?;
    let authenticate = client.prepare("select valid from tollgate.authenticate($1)").await?;
    let mut history = Vec::new();
    let mut turn = 0;
    while !over.load(Ordering::Relaxed) {
        turn += 1;
        let around = next.load(Ordering::Relaxed) + turn % 24;
        let token = around.saturating_sub(12).min(tokens.len() - 1);
        let presented = &tokens[token].token;
        let old_snapshot = turn % 5 == 0;
        if old_snapshot {
            client.batch_execute("begin isolation level repeatable read; select 1").await?;
            tokio::task::yield_now().await;
        }
        let began = Instant::now();
        let valid = if turn % 7 == 0 {
            match client.query_one(&authenticate, &[presented]).await {
                Ok(_) => true,
                Err(error) if error.code() == Some(&SqlState::INVALID_AUTHORIZATION_SPECIFICATION) => false,
                Err(error) => return Err(error.into()),
            }
        } else {
            client.query_one(&statement, &[presented]).await?.get(0)
        };
        history.push(Verified { token, began, ended: Instant::now(), valid });
        if old_snapshot {
            client.batch_execute("rollback").await?;
        }
    }
    Ok(history)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_verification_begun_after_a_revocation_was_acknowledged_succeeds() -> Result<()> {
    const VERIFIERS: usize = 6;
    const REVOKERS: usize = 3;
    let cluster = SHARED.cluster()?;
    let db = Db::create(&cluster, "storm").await?;
    let tokens = Arc::new(issue_many(&db.owner, i32::try_from(400 * rounds(1))?).await?);
    let revoked: Arc<Vec<OnceLock<(Instant, Instant)>>> =
        Arc::new(tokens.iter().map(|_| OnceLock::new()).collect());
    let (next, over) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));

    let mut verifiers = JoinSet::new();
    for _ in 0..VERIFIERS {
        let (tokens, next, over) = (Arc::clone(&tokens), Arc::clone(&next), Arc::clone(&over));
        verifiers.spawn(verify_until(db.session("web").await?, tokens, next, over));
    }
    let mut revokers = JoinSet::new();
    for _ in 0..REVOKERS {
        let (tokens, next, revoked) = (Arc::clone(&tokens), Arc::clone(&next), Arc::clone(&revoked));
        let session = db.session("postgres").await?;
        revokers.spawn(async move {
            loop {
                let token = next.fetch_add(1, Ordering::Relaxed);
                let Some(Token { id, token: presented }) = tokens.get(token) else { return anyhow::Ok(()) };
                let began = Instant::now();
                if token % 2 == 0 {
                    session.query_one("select tollgate.revoke_api_token($1)", &[id]).await?;
                } else {
                    session.query_one("select tollgate.revoke_presented_token($1)", &[presented]).await?;
                }
                revoked[token].set((began, Instant::now())).ok().context("each is revoked once")?;
            }
        });
    }
    while let Some(revoker) = revokers.join_next().await {
        revoker??;
    }
    over.store(true, Ordering::Relaxed);
    let mut history = Vec::new();
    while let Some(verified) = verifiers.join_next().await {
        history.extend(verified??);
    }
    let (mut after, mut before) = (0, 0);
    for verified in &history {
        let (revoking, acknowledged) = *revoked[verified.token].get().context("each was revoked")?;
        if verified.began > acknowledged {
            after += 1;
            assert!(!verified.valid, "valid although revoked before: {verified:?}, {acknowledged:?}");
        } else if verified.ended < revoking {
            before += 1;
            assert!(verified.valid, "refused although not yet revoked: {verified:?}, {revoking:?}");
        }
    }
    assert!(after > 100 && before > 100, "{after} after and {before} before, of {}", history.len());
    Ok(())
}

// ---- The disk is full

/// A small file system in memory, unmounted when dropped.
struct SmallDisk(PathBuf);

impl SmallDisk {
    /// `None` where mounting is not allowed, which is printed.
    fn mount(size: &str) -> Result<Option<Self>> {
        let directory = tempfile::Builder::new().prefix("tollgate-disk-").tempdir()?.keep();
        let options = format!("size={size}");
        let mounted = nix::mount::mount(
            Some("tmpfs"),
            &directory,
            Some("tmpfs"),
            nix::mount::MsFlags::empty(),
            Some(options.as_str()),
        );
        if let Err(error) = mounted {
            std::fs::remove_dir(&directory)?;
            common::not_run(&format!("a full disk: no small file system can be mounted here: {error}"));
            return Ok(None);
        }
        let disk = Self(directory);
        Account::unprivileged()?.own(&disk.0)?;
        Ok(Some(disk))
    }

    fn ballast(&self) -> PathBuf {
        self.0.join("ballast")
    }

    /// Until no byte can be written any more.
    fn fill(&self) -> Result<()> {
        use std::io::Write as _;
        let mut file = std::fs::File::options().create(true).append(true).open(self.ballast())?;
        for size in [1 << 20, 4096, 1] {
            let block = vec![b'x'; size];
            while file.write_all(&block).is_ok() {}
        }
        Ok(())
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: a server that a failing test left behind may still use it.
        let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
        let _ = std::fs::remove_dir(&self.0);
    }
}

#[tokio::test]
async fn a_full_disk_gives_clear_errors_stops_no_verification_and_loses_nothing() -> Result<()> {
    let Some(disk) = SmallDisk::mount("400m")? else { return Ok(()) };
    let settings =
        Cluster::builder().within(&disk.0).setting("max_wal_size", "64MB").setting("wal_keep_size", "0");
    let cluster = Arc::new(common::start(settings)?);
    let db = Db::only(&cluster).await?;
    let mut daemon = run(&db.url(), &[EAGER])?;
    let limited = issue_with(&db.owner, "disk", "rate_limit => 1000, rate_window => '1 day'").await?;
    assert_eq!(code(&db.web, &limited.token).await?, "VALID");
    eventually_counts(&db.owner, &limited, (1, 0)).await;
    let many = issue_many(&db.owner, 3_000).await?;
    db.owner.batch_execute("checkpoint").await?;

    disk.fill()?;
    let mut issued: Vec<Token> = Vec::new();
    let error = loop {
        match issue(&db.owner, "disk", &[]).await {
            Ok(token) => issued.push(token),
            Err(error) => break error,
        }
        anyhow::ensure!(issued.len() < 100_000, "the disk does not get full");
    };
    let error = error.downcast::<tokio_postgres::Error>()?;
    assert_eq!(error.code(), Some(&SqlState::DISK_FULL), "{error}");
    assert!(error.as_db_error().is_some_and(|error| error.hint().is_some()), "{error:?}");
    // Verification writes nothing, so it continues, and it is counted.
    for token in issued.iter().chain([&limited]) {
        assert_eq!(code(&db.web, &token.token).await?, "VALID");
    }
    assert_eq!(verify_each(&db.web, &many).await?, 3_000);
    eventually_logs(&mut daemon, "No space left on device").await;
    assert!(daemon.is_running());

    std::fs::remove_file(disk.ballast())?;
    eventually_counts(&db.owner, &limited, (2, 0)).await;
    for token in issued.iter().chain(&many) {
        eventually_counts(&db.owner, token, (1, 0)).await;
    }
    let late = issue(&db.owner, "disk", &[]).await?;
    assert_eq!(code(&db.web, &late.token).await?, "VALID");
    eventually_counts(&db.owner, &late, (1, 0)).await;
    assert!(stop(&mut daemon)?.success());
    let stored: i64 = value(&db.owner, "select count(*) from tollgate.list_api_tokens('disk')").await?;
    assert_eq!(stored, i64::try_from(issued.len())? + 2);
    // The file system last.
    drop((db, cluster, disk));
    Ok(())
}
