//! Tokens verified on hot standbys: their usage reaches the tables of the primary exactly once, whatever fails or takes
//! over on the way. Every standby here really streams.

use std::sync::Arc;
use std::time::Duration;

use crate::common::{self, Token, code, issue, value};
use crate::operator::{
    self, Db, OPERATOR, ack, apply, counts, drain, drained, flush_all, issue_many, sums, verify_each,
};
use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tokio_postgres::Client;
use tollgate_tests::{Cluster, DATABASE, Tollgated, eventually_async};

const LONG: Duration = Duration::from_secs(60);

/// Flushes several times a second, and does nothing else for as long as a test lasts.
const FLUSHING: &[&str] = &[
    "run",
    "--log-format=json",
    "--flush-interval=100ms",
    "--expire-interval=24h",
    "--purge-interval=24h",
    "--seal-interval=24h",
];

fn primary() -> Result<Arc<Cluster>> {
    Ok(Arc::new(common::start(Cluster::builder())?))
}

/// As the operator.
fn url(cluster: &Cluster) -> String {
    cluster.url(OPERATOR, DATABASE)
}

fn run(database_url: &str, standbys: &[&str]) -> Result<Tollgated> {
    let options: Vec<String> = standbys.iter().map(|url| format!("--standby={url}")).collect();
    let arguments: Vec<&str> = FLUSHING.iter().copied().chain(options.iter().map(String::as_str)).collect();
    Tollgated::spawn(database_url, &arguments)
}

/// Verifies there this many times, each time with success.
async fn use_on(cluster: &Cluster, token: &Token, times: i64) -> Result<()> {
    let web = cluster.connect("web", DATABASE).await?;
    for _ in 0..times {
        ensure!(code(&web, &token.token).await? == "VALID");
    }
    Ok(())
}

async fn eventually_counts(owner: &Client, token: &Token, uses: i64) {
    eventually_async(LONG, &format!("{uses} uses to be flushed"), async || {
        counts(owner, token.id).await.unwrap() == (uses, 0)
    })
    .await;
}

/// The daemon's report of a task, `None` until it reports.
async fn task(owner: &Client, name: &str) -> Option<Value> {
    let tasks: Option<Value> =
        value(owner, "select (select d.tasks from tollgate.daemons d order by d.last_seen_at desc limit 1)")
            .await
            .ok()?;
    tasks?.get(name).cloned()
}

fn task_of(standby: &Cluster) -> String {
    format!("flush_standby tollgated@127.0.0.1:{}/{DATABASE}", standby.port())
}

#[tokio::test]
async fn uses_on_every_standby_reach_the_primary_with_its_own() -> Result<()> {
    let db = Db::only(&primary()?).await?;
    let token = issue(&db.owner, "a", &[]).await?;
    // Both have the name and the identifier of the primary.
    let (one, other) = (db.cluster.standby()?, db.cluster.standby()?);
    for standby in [&one, &other] {
        standby.catch_up_with(&db.cluster)?;
    }
    let daemon = run(&db.url(), &[&url(&one), &url(&other)])?;
    for round in 1..=3 {
        use_on(&db.cluster, &token, 1).await?;
        use_on(&one, &token, 2).await?;
        use_on(&other, &token, 3).await?;
        eventually_counts(&db.owner, &token, round * 6).await;
    }
    for standby in [&one, &other] {
        let name = task_of(standby);
        eventually_async(LONG, "the report of what came from each standby", async || {
            task(&db.owner, &name).await.is_some_and(|task| task["items"].as_i64() >= Some(1))
        })
        .await;
    }
    assert!(!daemon.log().contains("ERROR"), "{}", daemon.log());
    Ok(())
}

#[tokio::test]
async fn reuse_on_a_standby_is_recorded_by_the_primary_and_then_forgotten() -> Result<()> {
    let db = Db::only(&primary()?).await?;
    let old = issue(&db.owner, "a", &[]).await?;
    let rotate = "select (tollgate.rotate_api_token($1, revoke_on_reuse => true)).token";
    let new: String = db.owner.query_one(rotate, &[&old.id]).await?.get(0);
    let import = "select tollgate.import_api_token('a', 'n', sha512('foreign'), format => 'sha512')";
    db.owner.batch_execute(import).await?;
    let standby = db.cluster.standby()?;
    standby.catch_up_with(&db.cluster)?;
    let there = standby.connect("postgres", DATABASE).await?;
    there.batch_execute("set tollgate.accept_foreign_tokens = on").await?;
    assert_eq!(code(&there, "foreign").await?, "VALID");
    assert_eq!(code(&there, &old.token).await?, "EXPIRED");
    let found: i64 = value(&there, "select count(*) from tollgate.found()").await?;
    assert_eq!(found, 1, "a digest is only taken on the primary");
    let _daemon = run(&db.url(), &[&url(&standby)])?;
    let recorded = "select count(*) from tollgate.audit_log where event = 'token.reuse_detected'";
    eventually_async(LONG, "the event", async || {
        value::<i64>(&db.owner, recorded).await.is_ok_and(|n| n == 1)
    })
    .await;
    assert_eq!(code(&db.web, &new).await?, "REVOKED");
    eventually_async(LONG, "the standby to forget it", async || {
        value::<i64>(&there, "select count(*) from tollgate.found()").await.is_ok_and(|n| n == 0)
    })
    .await;
    assert_eq!(value::<i64>(&db.owner, recorded).await?, 1);
    Ok(())
}

#[tokio::test]
async fn a_standby_that_is_down_delays_no_other_and_is_named_until_it_is_back() -> Result<()> {
    let db = Db::only(&primary()?).await?;
    let token = issue(&db.owner, "a", &[]).await?;
    let (mut down, up) = (db.cluster.standby()?, db.cluster.standby()?);
    up.catch_up_with(&db.cluster)?;
    down.stop()?;
    let _daemon = run(&db.url(), &[&url(&down), &url(&up)])?;
    use_on(&db.cluster, &token, 1).await?;
    use_on(&up, &token, 1).await?;
    eventually_counts(&db.owner, &token, 2).await;
    let name = task_of(&down);
    eventually_async(LONG, "the report of the failure", async || {
        task(&db.owner, &name).await.is_some_and(|task| task["last_outcome"] == "failed")
    })
    .await;
    let error = task(&db.owner, &name).await.context("it is reported")?["last_error"].to_string();
    assert!(error.contains(&down.port().to_string()), "{error}");

    down.restart()?;
    down.catch_up_with(&db.cluster)?;
    use_on(&down, &token, 1).await?;
    eventually_counts(&db.owner, &token, 3).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn counts_are_exact_however_often_the_daemon_is_killed() -> Result<()> {
    let db = Db::only(&primary()?).await?;
    let token = issue(&db.owner, "a", &[]).await?;
    let standby = Arc::new(db.cluster.standby()?);
    standby.catch_up_with(&db.cluster)?;
    const USES: i64 = 6_000;
    let load = |cluster: Arc<Cluster>| {
        let token = Token { id: token.id, token: token.token.clone() };
        tokio::spawn(async move { use_on(&cluster, &token, USES).await })
    };
    let users = [load(Arc::clone(&db.cluster)), load(Arc::clone(&standby))];
    let mut kills = 0;
    while kills < 8 || users.iter().any(|user| !user.is_finished()) {
        let flushes = async || {
            value::<i64>(&db.owner, "select coalesce(sum(flushes), 0)::bigint from tollgate.usage_flushes")
                .await
        };
        let before = flushes().await?;
        let mut daemon = run(&db.url(), &[&url(&standby)])?;
        // At a different point each time, and not before it does something, unless nothing is left to do.
        eventually_async(LONG, "a flush", async || {
            flushes().await.unwrap() > before + kills % 3
                || users.iter().all(tokio::task::JoinHandle::is_finished)
        })
        .await;
        daemon.signal(Signal::SIGKILL)?;
        daemon.kill()?;
        kills += 1;
    }
    for user in users {
        user.await??;
    }
    let _daemon = run(&db.url(), &[&url(&standby)])?;
    eventually_counts(&db.owner, &token, 2 * USES).await;
    Ok(())
}

#[tokio::test]
async fn counts_of_a_standby_survive_restarts_and_crashes_of_the_primary() -> Result<()> {
    let mut primary = common::start(Cluster::builder())?;
    operator::grant(&primary, DATABASE)?;
    let token = issue(&primary.connect("postgres", DATABASE).await?, "a", &[]).await?;
    let standby = primary.standby()?;
    standby.catch_up_with(&primary)?;
    let _daemon = run(&url(&primary), &[&url(&standby)])?;
    let mut uses = 0;
    for crash in [false, true, true, false] {
        use_on(&standby, &token, 20).await?;
        uses += 20;
        if crash {
            primary.crash()?;
        } else {
            primary.stop()?;
        }
        use_on(&standby, &token, 5).await?;
        uses += 5;
        primary.restart()?;
        eventually_counts(&primary.connect("postgres", DATABASE).await?, &token, uses).await;
    }
    Ok(())
}

/// The worst case: the primary has the flush and is lost with it, before the standby that takes over received it.
#[tokio::test]
async fn a_promoted_standby_still_counts_usage_that_only_the_lost_primary_had() -> Result<()> {
    let mut primary = common::start(Cluster::builder())?;
    operator::grant(&primary, DATABASE)?;
    let owner = primary.connect("postgres", DATABASE).await?;
    let token = issue(&owner, "a", &[]).await?;
    let standby = primary.standby()?;
    standby.catch_up_with(&primary)?;
    // The daemon follows whichever accepts writes.
    let both = format!(
        "postgres://{OPERATOR}@127.0.0.1:{},127.0.0.1:{}/{DATABASE}?target_session_attrs=read-write",
        primary.port(),
        standby.port()
    );
    let _daemon = run(&both, &[&url(&standby)])?;
    use_on(&standby, &token, 4).await?;
    eventually_counts(&owner, &token, 4).await;
    standby.catch_up_with(&primary)?;

    // From now on it receives nothing. Being cut off, it cannot report that, but it continues to count.
    let receiver = standby.connect("postgres", DATABASE).await?;
    for statement in ["alter system set primary_conninfo = ''", "select pg_reload_conf()"] {
        receiver.batch_execute(statement).await?;
    }
    eventually_async(LONG, "the standby to be cut off", async || {
        value::<i64>(&owner, "select count(*) from pg_stat_replication").await.unwrap() == 0
    })
    .await;
    use_on(&standby, &token, 3).await?;
    // Perhaps not all three: uses after the first drain wait for the next one.
    eventually_async(LONG, "a flush that only the primary has", async || {
        counts(&owner, token.id).await.unwrap().0 > 4
    })
    .await;
    let name = task_of(&standby);
    eventually_async(LONG, "the report that the standby is behind", async || {
        let task = task(&owner, &name).await;
        task.is_some_and(|task| task["note"].as_str().is_some_and(|note| note.contains("behind")))
    })
    .await;

    drop(owner);
    primary.crash()?;
    standby.promote()?;
    let owner = standby.connect("postgres", DATABASE).await?;
    eventually_counts(&owner, &token, 7).await;
    // The daemon now has it as its primary and as its standby.
    use_on(&standby, &token, 50).await?;
    eventually_counts(&owner, &token, 57).await;
    let operator = standby.connect(OPERATOR, DATABASE).await?;
    eventually_async(LONG, "everything to be acknowledged", async || {
        drain(&operator).await.unwrap().is_none()
    })
    .await;
    assert_eq!(counts(&owner, token.id).await?, (57, 0));
    Ok(())
}

#[tokio::test]
async fn a_promoted_standby_does_not_add_again_what_it_had_replayed() -> Result<()> {
    let db = Db::only(&primary()?).await?;
    let token = issue(&db.owner, "a", &[]).await?;
    let standby = db.cluster.standby()?;
    standby.catch_up_with(&db.cluster)?;
    use_on(&standby, &token, 5).await?;
    let operator = standby.connect(OPERATOR, DATABASE).await?;
    let generation = drained(&operator).await?;
    // Applied but not acknowledged when the primary is lost.
    assert!(apply(&db.operator, &generation).await?);
    standby.catch_up_with(&db.cluster)?;
    standby.promote()?;
    let again = drained(&operator).await?;
    assert_eq!(sums(&again), sums(&generation));
    assert!(!apply(&operator, &again).await?);
    assert!(ack(&operator, again.number).await?);
    use_on(&standby, &token, 1).await?;
    flush_all(&operator).await?;
    assert_eq!(counts(&standby.connect("postgres", DATABASE).await?, token.id).await?, (6, 0));
    Ok(())
}

#[tokio::test]
async fn usage_of_a_standby_is_visible_there_once_it_is_replayed() -> Result<()> {
    let db = Db::only(&primary()?).await?;
    let token = issue(&db.owner, "a", &[]).await?;
    let standby = db.cluster.standby()?;
    standby.catch_up_with(&db.cluster)?;
    use_on(&standby, &token, 1).await?;
    let operator = standby.connect(OPERATOR, DATABASE).await?;
    let generation = drained(&operator).await?;
    let applied = async |client: &Client| -> Result<bool> {
        let key = client
            .query_one(
                "select tollgate.usage_applied($1, $2, $3)",
                &[&generation.node, &generation.boot, &generation.number],
            )
            .await?;
        Ok(key.get(0))
    };
    assert!(!applied(&db.operator).await? && !applied(&operator).await?);
    let pausing = standby.connect("postgres", DATABASE).await?;
    pausing.batch_execute("select pg_wal_replay_pause()").await?;
    eventually_async(LONG, "the replay to pause", async || {
        value::<String>(&pausing, "select pg_get_wal_replay_pause_state()").await.unwrap() == "paused"
    })
    .await;
    assert!(apply(&db.operator, &generation).await?);
    assert!(applied(&db.operator).await? && !applied(&operator).await?);
    pausing.batch_execute("select pg_wal_replay_resume()").await?;
    standby.catch_up_with(&db.cluster)?;
    assert!(applied(&operator).await?);
    Ok(())
}

/// A standby has its own shared memory, where room for counters may run out.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn early_flushes_keep_a_standby_from_overflowing_however_many_tokens_are_used() -> Result<()> {
    const TOKENS: i32 = 4_000;
    let db =
        Db::only(&Arc::new(common::start(Cluster::builder().setting("tollgate.max_tracked_keys", "1024"))?))
            .await?;
    let tokens = issue_many(&db.owner, TOKENS).await?;
    let standby = db.cluster.standby()?;
    standby.catch_up_with(&db.cluster)?;
    // By its interval it would flush tomorrow.
    let mut arguments = FLUSHING.to_vec();
    arguments[2] = "--flush-interval=24h";
    let on_standby = format!("--standby={}", url(&standby));
    arguments.push(&on_standby);
    let daemon = Tollgated::spawn(&db.url(), &arguments)?;
    let web = standby.connect("web", DATABASE).await?;
    let operator = standby.connect(OPERATOR, DATABASE).await?;
    let pressed = async |column: &str| -> Result<f64> {
        value(&operator, &format!("select {column}::float8 from tollgate.usage_pressure()")).await
    };
    for tokens in tokens.chunks(100) {
        verify_each(&web, tokens).await?;
        eventually_async(LONG, "an early flush", async || pressed("pressure").await.unwrap() < 1.0 / 3.0)
            .await;
    }
    assert!(pressed("overflowed").await?.abs() < 0.5);
    assert!(!daemon.log().contains("not counted"), "{}", daemon.log());
    Ok(())
}

#[tokio::test]
async fn the_commands_know_standbys_too() -> Result<()> {
    let db = Db::only(&primary()?).await?;
    let token = issue(&db.owner, "a", &[]).await?;
    let mut standby = db.cluster.standby()?;
    standby.catch_up_with(&db.cluster)?;
    use_on(&db.cluster, &token, 2).await?;
    use_on(&standby, &token, 3).await?;
    let option = format!("--standby={}", url(&standby));
    let command = |arguments: &[&str]| -> Result<(Option<i32>, Value)> {
        let output = Tollgated::run(&db.url(), &[arguments, &["--json"]].concat())?;
        Ok((output.status.code(), serde_json::from_slice(&output.stdout)?))
    };

    let (status, flushed) = command(&["flush", &option])?;
    assert_eq!((status, &flushed["uses"], &flushed["lagging_standbys"]), (Some(0), &json!(5), &json!([])));
    assert_eq!(counts(&db.owner, token.id).await?, (5, 0));
    let operator = standby.connect(OPERATOR, DATABASE).await?;
    assert_eq!(drain(&operator).await?, None, "it was acknowledged");
    drop(operator);

    let finding = |report: &Value| -> Option<Value> {
        report["findings"].as_array()?.iter().find(|finding| finding["name"] == "standby").cloned()
    };
    let (status, report) = command(&["check", &option])?;
    assert_eq!(
        (status, &finding(&report).context("a finding")?["verdict"]),
        (Some(0), &json!("ok")),
        "{report}"
    );
    standby.stop()?;
    let (status, report) = command(&["check", &option])?;
    assert_eq!(
        (status, &finding(&report).context("a finding")?["verdict"]),
        (Some(1), &json!("fail")),
        "{report}"
    );
    Ok(())
}
