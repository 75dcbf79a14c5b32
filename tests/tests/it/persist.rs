//! Counters and the state of limits across the end of the server: a clean shutdown loses nothing, any other only what
//! was not flushed, and none counts anything twice. And counters that are flushed before the room runs out.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::Duration;

use crate::common::{self, Request, Token, code, issue, value};
use crate::operator::{
    self, Db, OPERATOR, ack, apply, counts, drain, drained, flush, flush_all, issue_many, stats, sums,
    totals, usage, verify_each,
};
use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use tokio_postgres::Client;
use tollgate_tests::{Cluster, DATABASE, Tollgated, eventually_async};

const LONG: Duration = Duration::from_secs(60);

/// A server that is restarted, and its connections while it runs.
struct Restarted {
    cluster: Cluster,
    owner: Client,
    web: Client,
    operator: Client,
}

impl Restarted {
    async fn start(settings: &[(&str, &str)]) -> Result<Self> {
        let builder =
            settings.iter().fold(Cluster::builder(), |builder, (name, to)| builder.setting(name, to));
        let cluster = common::start(builder)?;
        operator::grant(&cluster, DATABASE)?;
        let (owner, web, operator) = connect(&cluster).await?;
        Ok(Self { cluster, owner, web, operator })
    }

    async fn reconnect(&mut self) -> Result<()> {
        (self.owner, self.web, self.operator) = connect(&self.cluster).await?;
        Ok(())
    }

    async fn restart(&mut self) -> Result<()> {
        self.cluster.restart()?;
        self.reconnect().await
    }

    fn file(&self) -> PathBuf {
        self.cluster.data_dir().join("pg_stat/tollgate_usage.stat")
    }

    /// How often the server has logged a text.
    fn logged(&self, text: &str) -> usize {
        self.cluster.log().matches(text).count()
    }
}

async fn connect(cluster: &Cluster) -> Result<(Client, Client, Client)> {
    Ok((
        cluster.connect("postgres", DATABASE).await?,
        cluster.connect("web", DATABASE).await?,
        cluster.connect(OPERATOR, DATABASE).await?,
    ))
}

async fn overflowed(operator: &Client) -> Result<i64> {
    value(operator, "select overflowed from tollgate.usage_pressure()").await
}

async fn pressure(operator: &Client) -> Result<f64> {
    value(operator, "select pressure from tollgate.usage_pressure()").await
}

// ---- A clean restart

#[tokio::test]
async fn a_clean_restart_loses_nothing() -> Result<()> {
    let mut server = Restarted::start(&[]).await?;
    let [one, two] = [issue(&server.owner, "a", &[]).await?, issue(&server.owner, "a", &[]).await?];
    for address in ["192.0.2.1", "2001:db8::7"] {
        assert_eq!(Request::of(&one.token).coming_from(address).code(&server.web).await?, "VALID");
    }
    let denied = Request::of(&two.token).requiring(&[Some("posts:read")]);
    assert_eq!(denied.code(&server.web).await?, "INSUFFICIENT_SCOPE");
    assert!(!server.file().exists(), "it is of a server that is down");

    server.cluster.stop()?;
    let file = fs::metadata(server.file())?;
    assert_eq!(file.permissions().mode() & 0o077, 0, "others can read it");
    server.restart().await?;
    assert!(!server.file().exists());
    // Counting continues from there, also across the next restart.
    assert_eq!(denied.code(&server.web).await?, "INSUFFICIENT_SCOPE");
    server.restart().await?;

    let before = stats(&server.operator).await?;
    assert_eq!((&before["tracked_keys"], &before["overflowed"]), (&json!(2), &json!(0)));
    let generation = drained(&server.operator).await?;
    assert_eq!((generation.counts(one.id), generation.counts(two.id)), ((2, 0), (0, 2)));
    assert!(apply(&server.operator, &generation).await? && ack(&server.operator, generation.number).await?);
    let stored = usage(&server.owner, one.id).await?.context("it was used")?;
    assert_eq!((stored.uses, stored.last_used_ip), (2, Some("2001:db8::7".parse()?)));
    assert!(stored.last_used_at.is_some());

    // Flushed counters are not kept: the file has nothing but the name under which the server holds leases of quotas.
    server.cluster.stop()?;
    assert!(fs::metadata(server.file())?.len() < 100);
    server.restart().await?;
    assert_eq!(drain(&server.operator).await?, None);
    assert_eq!(totals(&server.owner).await?, (2, 2));
    Ok(())
}

/// The carrier may have reached any step: what the server hands out again must have the same name.
#[tokio::test]
async fn a_drained_generation_is_counted_once_at_whichever_step_a_restart_comes() -> Result<()> {
    let mut server = Restarted::start(&[("cluster_name", "east")]).await?;
    let token = issue(&server.owner, "a", &[]).await?;
    let mut uses = 0;
    for (applied_before, applied_after) in [(false, false), (true, false), (false, true), (true, true)] {
        for _ in 0..3 {
            assert_eq!(code(&server.web, &token.token).await?, "VALID");
        }
        let held = drained(&server.operator).await?;
        assert_eq!(held.counts(token.id), (3, 0));
        if applied_before {
            assert!(apply(&server.operator, &held).await?);
        }
        assert_eq!(code(&server.web, &token.token).await?, "VALID");
        uses += 4;

        server.restart().await?;
        // Renaming the server does not rename a generation that was already handed out.
        server.cluster.configure("cluster_name", if uses % 8 == 0 { "east" } else { "west" })?;
        server.restart().await?;
        if applied_after {
            assert_eq!(apply(&server.operator, &held).await?, !applied_before);
        }
        let again = drained(&server.operator).await?;
        assert_eq!(sums(&again), sums(&held));
        assert_eq!(stats(&server.operator).await?["closed_generation"], json!(held.number));
        assert_eq!(apply(&server.operator, &again).await?, !applied_before && !applied_after);
        assert!(ack(&server.operator, again.number).await?);

        let rest = drained(&server.operator).await?;
        assert_eq!(rest.counts(token.id), (1, 0));
        assert_ne!((&rest.node, rest.boot), (&held.node, held.boot));
        assert!(apply(&server.operator, &rest).await? && ack(&server.operator, rest.number).await?);
        assert_eq!(counts(&server.owner, token.id).await?, (uses, 0));
    }
    Ok(())
}

#[tokio::test]
async fn each_database_restores_its_own_counters() -> Result<()> {
    let mut server = Restarted::start(&[]).await?;
    common::database(&server.cluster, "other")?;
    operator::grant(&server.cluster, "other")?;
    let mut tokens = Vec::new();
    for database in [DATABASE, "other"] {
        let (owner, web) = (
            server.cluster.connect("postgres", database).await?,
            server.cluster.connect("web", database).await?,
        );
        tokens.push(issue(&owner, "a", &[]).await?);
        assert_eq!(code(&web, &tokens[tokens.len() - 1].token).await?, "VALID");
    }
    let held = drained(&server.operator).await?;
    server.restart().await?;
    let other = server.cluster.connect(OPERATOR, "other").await?;
    let of_other = drained(&other).await?;
    assert_eq!((of_other.counts(tokens[1].id), of_other.rows.len()), ((1, 0), 1));
    assert_ne!(of_other.boot, held.boot);
    assert_eq!(sums(&drained(&server.operator).await?), sums(&held));
    Ok(())
}

#[tokio::test]
async fn limits_survive_a_clean_restart() -> Result<()> {
    let mut server = Restarted::start(&[]).await?;
    let token = common::issue_with(&server.owner, "a", "rate_limit => 2, rate_window => '1 day'").await?;
    for expected in ["VALID", "VALID", "RATE_LIMITED"] {
        assert_eq!(code(&server.web, &token.token).await?, expected);
    }
    flush_all(&server.operator).await?;
    server.restart().await?;
    assert_eq!(code(&server.web, &token.token).await?, "RATE_LIMITED");
    assert_eq!(drained(&server.operator).await?.counts(token.id), (0, 1));
    Ok(())
}

#[tokio::test]
async fn a_standby_loses_nothing_either() -> Result<()> {
    let server = Restarted::start(&[]).await?;
    let mut standby = server.cluster.standby()?;
    let token = issue(&server.owner, "a", &[]).await?;
    standby.catch_up_with(&server.cluster)?;
    let mut uses = 0;
    for _ in 0..2 {
        let web = standby.connect("web", DATABASE).await?;
        assert_eq!(code(&web, &token.token).await?, "VALID");
        let held = drained(&standby.connect(OPERATOR, DATABASE).await?).await?;
        assert_eq!(code(&web, &token.token).await?, "VALID");
        drop(web);
        standby.restart()?;
        let operator = standby.connect(OPERATOR, DATABASE).await?;
        assert_eq!(sums(&drained(&operator).await?), sums(&held));
        for _ in 0..2 {
            let generation = drained(&operator).await?;
            assert!(apply(&server.operator, &generation).await?);
            // It acknowledges what it knows to be applied.
            standby.catch_up_with(&server.cluster)?;
            assert!(ack(&operator, generation.number).await?);
        }
        uses += 2;
        assert_eq!(counts(&server.owner, token.id).await?, (uses, 0));
    }
    Ok(())
}

/// Verifies as fast as it can until stopped, reconnecting as needed; counts the answers that said valid.
async fn verify_until(
    config: tokio_postgres::Config,
    tokens: Arc<Vec<Token>>,
    stop: Arc<AtomicBool>,
    valid: Arc<AtomicI64>,
) {
    while !stop.load(Ordering::Relaxed) {
        let Ok((client, connection)) = config.connect(tokio_postgres::NoTls).await else {
            // The server is down: a pause between attempts, not a wait for anything.
            tokio::time::sleep(Duration::from_millis(20)).await;
            continue;
        };
        let connection = tokio::spawn(connection);
        for token in tokens.iter().cycle() {
            if stop.load(Ordering::Relaxed) {
                break;
            }
            match code(&client, &token.token).await {
                Ok(code) => valid.fetch_add(i64::from(code == "VALID"), Ordering::Relaxed),
                Err(_) => break,
            };
        }
        drop(client);
        let _ = connection.await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn restarts_under_load_with_a_daemon_at_work_lose_nothing() -> Result<()> {
    const CLIENTS: i64 = 4;
    const RESTARTS: i64 = 3;
    let mut server = Restarted::start(&[]).await?;
    let tokens = Arc::new(issue_many(&server.owner, 50).await?);
    let url = server.cluster.url(OPERATOR, DATABASE);
    let mut daemon = Tollgated::spawn(&url, &["run", "--flush-interval=100ms"])?;
    let stop = Arc::new(AtomicBool::new(false));
    let valid = Arc::new(AtomicI64::new(0));
    let config = server.cluster.config("web", DATABASE);
    let clients: Vec<_> = (0..CLIENTS)
        .map(|_| {
            tokio::spawn(verify_until(
                config.clone(),
                Arc::clone(&tokens),
                Arc::clone(&stop),
                Arc::clone(&valid),
            ))
        })
        .collect();
    for restart in 1..=RESTARTS {
        let wanted = valid.load(Ordering::Relaxed) + 500;
        eventually_async(LONG, "some traffic", async || valid.load(Ordering::Relaxed) > wanted).await;
        server.restart().await?;
        ensure!(daemon.is_running(), "the daemon ended at restart {restart}: {}", daemon.log());
    }
    let wanted = valid.load(Ordering::Relaxed) + 500;
    eventually_async(LONG, "traffic after the last restart", async || valid.load(Ordering::Relaxed) > wanted)
        .await;
    stop.store(true, Ordering::Relaxed);
    for client in clients {
        client.await?;
    }
    daemon.terminate()?;
    assert!(daemon.wait(LONG)?.success(), "{}", daemon.log());
    flush_all(&server.operator).await?;
    // For a session that was disconnected, it is unknown whether its last verification completed.
    let (accepted, counted) = (valid.load(Ordering::Relaxed), totals(&server.owner).await?.0);
    assert!(
        accepted <= counted && counted <= accepted + CLIENTS * RESTARTS,
        "accepted of {accepted}, counted {counted}"
    );
    Ok(())
}

// ---- Any other end

#[tokio::test]
async fn an_immediate_shutdown_and_a_crash_lose_what_was_not_flushed_and_count_nothing_twice() -> Result<()> {
    let mut server = Restarted::start(&[]).await?;
    let token = issue(&server.owner, "a", &[]).await?;
    for crash in [Cluster::stop_immediately, Cluster::crash] {
        let before = counts(&server.owner, token.id).await?.0;
        assert_eq!(code(&server.web, &token.token).await?, "VALID");
        flush_all(&server.operator).await?;
        assert_eq!(code(&server.web, &token.token).await?, "VALID");
        // Restored from a file, which must not be left for the start after the next.
        server.restart().await?;
        let held = drained(&server.operator).await?;
        assert!(apply(&server.operator, &held).await?);
        assert_eq!(code(&server.web, &token.token).await?, "VALID");

        crash(&mut server.cluster)?;
        assert!(!server.file().exists());
        server.restart().await?;
        assert_eq!(drain(&server.operator).await?, None);
        assert!(!apply(&server.operator, &held).await?);
        assert_eq!(counts(&server.owner, token.id).await?, (before + 2, 0));
    }
    assert_eq!(server.logged("ignored file"), 0, "{}", server.cluster.log());
    Ok(())
}

#[tokio::test]
async fn a_damaged_file_or_one_of_another_shutdown_is_logged_and_dropped() -> Result<()> {
    type Damage = fn(&mut Vec<u8>);
    let damages: [(&str, Damage); 7] = [
        ("it has 0 bytes", |file| file.clear()),
        ("bytes and should have", |file| file.truncate(file.len() - 1)),
        ("its checksum is wrong", |file| file[100] ^= 1),
        ("it has format version 99", |file| file[8] = 99),
        ("and should have 18446744073709551615", |file| file[16..24].fill(0xff)),
        ("it does not begin like such a file", |file| file.fill(b'x')),
        ("bytes and should have", |file| file.resize(1_000_000, 0)),
    ];
    let mut server = Restarted::start(&[]).await?;
    let token = issue(&server.owner, "a", &[]).await?;
    for (n, (why, damage)) in damages.into_iter().enumerate() {
        assert_eq!(code(&server.web, &token.token).await?, "VALID");
        server.cluster.stop()?;
        let mut file = fs::read(server.file())?;
        damage(&mut file);
        fs::write(server.file(), file)?;
        server.restart().await?;
        let log = server.cluster.log();
        let line = log.lines().rfind(|line| line.contains("ignored file")).context(why)?;
        assert!(line.contains("LOG") && line.contains(why), "{line}");
        assert_eq!(server.logged("Uses since the last flush before the shutdown are not counted"), n + 1);
        assert!(!server.file().exists());
        assert_eq!(drain(&server.operator).await?, None, "{why}");
    }

    // An intact file, but put back after it was read, and one of another cluster.
    const ELSEWHERE: &str = "it was written by another cluster, or not at the last shutdown";
    assert_eq!(code(&server.web, &token.token).await?, "VALID");
    server.cluster.stop()?;
    let old = fs::read(server.file())?;
    server.restart().await?;
    assert!(flush(&server.operator).await?);
    let mut other = Cluster::builder().own_identity().start()?;
    other.stop()?;
    server.cluster.stop()?;
    for data in [server.cluster.data_dir(), other.data_dir()] {
        fs::write(data.join("pg_stat/tollgate_usage.stat"), &old)?;
    }
    other.restart()?;
    server.restart().await?;
    assert!(other.log().contains(ELSEWHERE) && server.logged(ELSEWHERE) == 1, "{}", server.cluster.log());
    assert_eq!(drain(&server.operator).await?, None);
    assert_eq!(counts(&server.owner, token.id).await?, (1, 0));
    Ok(())
}

#[tokio::test]
async fn a_file_that_cannot_be_written_is_logged_and_does_not_keep_the_server_from_stopping() -> Result<()> {
    let mut server = Restarted::start(&[]).await?;
    let token = issue(&server.owner, "a", &[]).await?;
    assert_eq!(code(&server.web, &token.token).await?, "VALID");
    fs::create_dir(server.file().with_extension("stat.tmp"))?;
    server.restart().await?;
    assert_eq!(server.logged("could not write file \"pg_stat/tollgate_usage.stat\""), 1);
    assert_eq!(drain(&server.operator).await?, None);
    Ok(())
}

#[tokio::test]
async fn a_smaller_table_keeps_limits_before_counters_and_reports_what_was_dropped() -> Result<()> {
    let mut server = Restarted::start(&[("tollgate.max_tracked_keys", "4096")]).await?;
    let tokens = issue_many(&server.owner, 3_000).await?;
    let limited: Vec<String> = server
        .owner
        .query(
            "select t.token from generate_series(1, 200) n, lateral
                 tollgate.create_api_token('limited', 'number ' || n, rate_limit => 1, rate_window => '1 day') t",
            &[],
        )
        .await?
        .iter()
        .map(|row| row.get(0))
        .collect();
    for token in &limited {
        assert_eq!(code(&server.web, token).await?, "VALID");
    }
    flush_all(&server.operator).await?;
    verify_each(&server.web, &tokens).await?;
    let all = drained(&server.operator).await?;
    let counted: i64 = all.rows.iter().map(|row| row.uses).sum();
    server.cluster.configure("tollgate.max_tracked_keys", "1024")?;
    server.restart().await?;
    let lost = overflowed(&server.operator).await?;
    let said = format!(
        "the limits of 0 tokens, 0 users and 0 addresses, which start again; {lost} uses and denials of {lost} tokens"
    );
    assert!(lost > 1_000 && server.logged(&said) == 1, "{lost}");
    for token in &limited {
        assert_eq!(code(&server.web, token).await?, "RATE_LIMITED");
    }
    let rest = drained(&server.operator).await?;
    assert_eq!((&rest.node, rest.boot, rest.number), (&all.node, all.boot, all.number));
    assert_eq!(rest.rows.iter().map(|row| row.uses).sum::<i64>(), counted - lost);
    flush_all(&server.operator).await?;
    verify_each(&server.web, &tokens[..100]).await?;
    assert_eq!(drained(&server.operator).await?.rows.len(), 100);
    Ok(())
}

// ---- Room

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn early_flushes_keep_a_small_table_from_overflowing_however_many_tokens_are_used() -> Result<()> {
    const TOKENS: i32 = 8_000;
    let cluster = Arc::new(common::start(Cluster::builder().setting("tollgate.max_tracked_keys", "1024"))?);
    let db = Db::only(&cluster).await?;
    let tokens = issue_many(&db.owner, TOKENS).await?;
    assert!(pressure(&db.operator).await? == 0.0);
    // By its interval it would flush tomorrow.
    let mut daemon = Tollgated::spawn(&db.url(), &["run", "--flush-interval=24h"])?;
    for tokens in tokens.chunks(100) {
        verify_each(&db.web, tokens).await?;
        eventually_async(LONG, "an early flush", async || pressure(&db.operator).await.unwrap() < 1.0 / 3.0)
            .await;
    }
    assert_eq!(overflowed(&db.operator).await?, 0);
    assert!(!daemon.log().contains("not counted"), "{}", daemon.log());
    daemon.terminate()?;
    assert!(daemon.wait(LONG)?.success(), "{}", daemon.log());
    assert_eq!(totals(&db.owner).await?, (i64::from(TOKENS), 0));
    Ok(())
}

#[tokio::test]
async fn the_daemon_warns_of_uses_that_were_not_counted() -> Result<()> {
    let cluster = Arc::new(common::start(Cluster::builder().setting("tollgate.max_tracked_keys", "1024"))?);
    let db = Db::only(&cluster).await?;
    let tokens = issue_many(&db.owner, 3_000).await?;
    // While no daemon ran.
    verify_each(&db.web, &tokens).await?;
    let lost = overflowed(&db.operator).await?;
    assert!(lost > 1_000);
    let mut daemon = Tollgated::spawn(&db.url(), &["run", "--flush-interval=100ms"])?;
    let warning = format!("{lost} uses were not counted");
    eventually_async(LONG, "the warning", async || {
        assert!(daemon.is_running(), "{}", daemon.log());
        daemon.log().contains(&warning)
    })
    .await;
    let log = daemon.log();
    let line = log.lines().find(|line| line.contains(&warning)).context("just found")?;
    assert!(line.contains("WARN") && line.contains("tollgate.max_tracked_keys"), "{line}");
    daemon.terminate()?;
    assert!(daemon.wait(LONG)?.success(), "{}", daemon.log());
    assert_eq!(totals(&db.owner).await?.0, 3_000 - lost);
    Ok(())
}

// ---- A backend that is killed while it records

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn backends_killed_while_they_record_leave_a_server_that_recovers_and_counts() -> Result<()> {
    const CLIENTS: usize = 8;
    const KILLS: usize = 20;
    // Few tokens, so that a backend often waits for a lock that another holds.
    let server = Restarted::start(&[]).await?;
    let tokens = issue_many(&server.owner, 3).await?;
    let presented: Arc<Vec<String>> = Arc::new(tokens.iter().map(|token| token.token.clone()).collect());
    let (mut victim, mut flushed) = (0, 0);
    for round in 0..KILLS {
        let mut clients = Vec::new();
        let mut processes: Vec<i32> = Vec::new();
        for _ in 0..CLIENTS {
            let web = server.cluster.connect("web", DATABASE).await?;
            processes.push(value(&web, "select pg_backend_pid()").await?);
            let presented = Arc::clone(&presented);
            // Without a round trip in between they spend most of the time recording. Until the server disconnects them.
            clients.push(tokio::spawn(async move {
                let statement = "select count(*) from generate_series(1, 20000), unnest($1::text[]) t,
                    lateral tollgate.verify_api_token(t) v where v.valid";
                while web.query_one(statement, &[&*presented]).await.is_ok() {}
            }));
        }
        let operator = server.cluster.connect(OPERATOR, DATABASE).await?;
        // A different moment each time: after a flush or a few, while one is running.
        for _ in 0..1 + round % 5 {
            eventually_async(LONG, "something to flush", async || flush(&operator).await.unwrap()).await;
        }
        flushed = totals(&server.cluster.connect("postgres", DATABASE).await?).await?.0;
        victim = (victim + 5) % CLIENTS;
        kill(Pid::from_raw(processes[victim]), Signal::SIGKILL)?;
        for client in clients {
            tokio::time::timeout(LONG, client).await.context("a client hangs")??;
        }
        eventually_async(LONG, "the server to be back", async || {
            server.cluster.connect(OPERATOR, DATABASE).await.is_ok()
        })
        .await;

        let operator = server.cluster.connect(OPERATOR, DATABASE).await?;
        let web = server.cluster.connect("web", DATABASE).await?;
        assert_eq!(drain(&operator).await?, None, "round {round}: what was not flushed is gone, all of it");
        verify_each(&web, &tokens).await?;
        assert_eq!(drained(&operator).await?.rows.len(), 3, "round {round}");
        flush_all(&operator).await?;
        let owner = server.cluster.connect("postgres", DATABASE).await?;
        assert_eq!(totals(&owner).await?, (flushed + 3, 0), "round {round}");
    }
    assert!(flushed > 1_000, "{flushed}");
    Ok(())
}

/// The holder is stopped at some moment in a loop of verifications, which sometimes is one at which it holds the lock.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backend_that_waits_for_a_spinlock_of_a_stopped_one_sleeps_and_shows_the_wait_event() -> Result<()>
{
    let cluster = common::start(Cluster::builder())?;
    let owner = cluster.connect("postgres", DATABASE).await?;
    let token = issue(&owner, "hot", &[]).await?.token;
    let busy = cluster.connect("postgres", DATABASE).await?;
    let waiter = cluster.connect("postgres", DATABASE).await?;
    let pid_of_busy = Pid::from_raw(value::<i32>(&busy, "select pg_backend_pid()").await?);
    let pid_of_waiter: i32 = value(&waiter, "select pg_backend_pid()").await?;
    let has_event =
        value::<i32>(&owner, "select current_setting('server_version_num')::int").await? >= 160_000;
    let verify = format!("select tollgate.verify_api_token('{token}')");
    let endless = format!("do $$ begin loop perform tollgate.verify_api_token('{token}'); end loop; end $$");
    let cancel = busy.cancel_token();
    let busy = tokio::spawn(async move { busy.batch_execute(&endless).await });
    let waiter = Arc::new(waiter);
    let mut has_slept = false;
    for _ in 0..5_000 {
        kill(pid_of_busy, Signal::SIGSTOP)?;
        let waiting = tokio::spawn({
            let (waiter, verify) = (Arc::clone(&waiter), verify.clone());
            async move { waiter.batch_execute(&verify).await }
        });
        while !waiting.is_finished() && !has_slept {
            let event =
                "select coalesce(wait_event, '') from pg_stat_activity where state = 'active' and pid = $1";
            let event: Option<String> =
                owner.query_opt(event, &[&pid_of_waiter]).await?.map(|row| row.get(0));
            let stat = fs::read_to_string(format!("/proc/{pid_of_waiter}/stat"))?;
            let sleeps = stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('S'));
            has_slept = match event.as_deref() {
                Some("SpinDelay") => true,
                // Not reported before version 16.
                Some("") => !has_event && sleeps && !waiting.is_finished(),
                _ => false,
            };
        }
        kill(pid_of_busy, Signal::SIGCONT)?;
        waiting.await??;
        if has_slept {
            break;
        }
    }
    cancel.cancel_query(tokio_postgres::NoTls).await?;
    assert!(busy.await?.is_err());
    assert!(has_slept, "no backend was seen to wait");
    Ok(())
}
