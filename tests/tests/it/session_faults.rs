//! Sessions when something goes wrong: a server killed between a refresh and its answer, a standby promoted without the
//! last refreshes, backups and copies of the database, many refreshes at once, and attacks on refresh tokens.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tokio::task::JoinSet;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use tollgate_tests::{Cluster, DATABASE, eventually_async};
use uuid::Uuid;

use crate::commands::{OK, json_of};
use crate::common::{self, Shared, refused, value, wait_until_blocked};
use crate::operator::Db;
use crate::running::rounds;

/// So long that a server can be killed and started within it.
const GRACE: (&str, &str) = ("tollgate.refresh_grace", "60s");

/// Nothing is vacuumed, nor kept by the snapshot of what vacuums.
static SHARED: Shared = Shared::new(&[GRACE, ("autovacuum", "off")]);

const LONG: Duration = Duration::from_secs(60);
const OTHER_MASTER_KEY: &str = "0f1e2d3c4b5a69788796a5b4c3d2e1f0f0e1d2c3b4a5968778695a4b3c2d1e0f";

/// What a client holds of its session.
#[derive(Clone, Debug)]
struct Session {
    id: Uuid,
    access: String,
    refresh: String,
}

#[derive(Debug)]
struct Refreshed {
    code: String,
    access: Option<String>,
    refresh: Option<String>,
}

/// A signing key, and an ordinary role that opens and refreshes sessions.
fn prepare(cluster: &Cluster, database: &str) -> Result<()> {
    cluster.execute(
        database,
        "do $$ begin create role backend login; exception when duplicate_object or unique_violation then end $$;
         select tollgate.grant_capability('backend', 'issuer'), tollgate.grant_capability('backend', 'verifier');
         select tollgate.create_signing_key()",
    )
}

/// A server of its own.
fn started() -> Result<Cluster> {
    let cluster = common::start(Cluster::builder().setting(GRACE.0, GRACE.1))?;
    prepare(&cluster, DATABASE)?;
    Ok(cluster)
}

/// A database on the shared server, and the role's connection to it.
async fn created(name: &str) -> Result<(Db, Client)> {
    let db = Db::create(&SHARED.cluster()?, name).await?;
    prepare(&db.cluster, name)?;
    let backend = db.session("backend").await?;
    Ok((db, backend))
}

async fn open(client: &Client, user: &str) -> Result<Session> {
    let call =
        "select session_id, access_token, refresh_token from tollgate.open_session($1, '{posts:read}')";
    let row = client.query_one(call, &[&user]).await?;
    Ok(Session { id: row.get(0), access: row.get(1), refresh: row.get(2) })
}

async fn refresh(client: &Client, token: &str) -> Result<Refreshed, tokio_postgres::Error> {
    let call = "select code, access_token, refresh_token from tollgate.refresh_session($1)";
    let row = client.query_one(call, &[&token]).await?;
    Ok(Refreshed { code: row.get(0), access: row.get(1), refresh: row.get(2) })
}

async fn code(client: &Client, token: &str) -> Result<String> {
    let refreshed = refresh(client, token).await?;
    ensure!((refreshed.code == "VALID") == refreshed.refresh.is_some(), "{refreshed:?}");
    ensure!(refreshed.access.is_some() == refreshed.refresh.is_some(), "{refreshed:?}");
    Ok(refreshed.code)
}

/// The token that replaces one that is good.
async fn next(client: &Client, token: &str) -> Result<String> {
    let refreshed = refresh(client, token).await?;
    refreshed.refresh.with_context(|| refreshed.code)
}

async fn verify(client: &Client, access: &str) -> Result<String> {
    Ok(client.query_one("select code from tollgate.verify_access_token($1)", &[&access]).await?.get(0))
}

/// All that is stored of a session.
async fn stored(owner: &Client, id: Uuid) -> Result<Value> {
    Ok(owner.query_one("select to_jsonb(s) from tollgate.sessions s where s.id = $1", &[&id]).await?.get(0))
}

/// How often it was refreshed.
async fn refreshes(owner: &Client, id: Uuid) -> Result<i64> {
    Ok(stored(owner, id).await?["generation"].as_i64().context("a generation")? - 1)
}

async fn events(owner: &Client, event: &str) -> Result<i64> {
    Ok(owner.query_one("select count(*) from tollgate.audit_log where event = $1", &[&event]).await?.get(0))
}

// ---- The server is killed

#[tokio::test]
async fn a_refresh_whose_answer_was_lost_with_the_server_is_answered_again_with_the_same_successor()
-> Result<()> {
    let mut cluster = started()?;
    let owner = cluster.connect("postgres", DATABASE).await?;
    let session = open(&cluster.connect("backend", DATABASE).await?, "ann").await?;
    // Committed, and not answered: the commit waits for a standby that does not exist.
    cluster.configure("synchronous_standby_names", "nowhere")?;
    eventually_async(LONG, "the server to wait for standbys", async || {
        value::<String>(&owner, "show synchronous_standby_names").await.is_ok_and(|names| names == "nowhere")
    })
    .await;
    let client = cluster.connect("backend", DATABASE).await?;
    let token = session.refresh.clone();
    let lost = tokio::spawn(async move { refresh(&client, &token).await });
    let waits =
        "select exists (select from pg_stat_activity where wait_event = 'SyncRep' and usename = 'backend')";
    eventually_async(LONG, "the refresh to be committed", async || {
        value::<bool>(&owner, waits).await.is_ok_and(|waits| waits)
    })
    .await;
    cluster.crash()?;
    assert!(lost.await?.is_err(), "it was not answered");
    cluster.configure("synchronous_standby_names", "")?;
    cluster.restart()?;

    let owner = cluster.connect("postgres", DATABASE).await?;
    let backend = cluster.connect("backend", DATABASE).await?;
    assert_eq!(refreshes(&owner, session.id).await?, 1, "it was committed");
    let again = refresh(&backend, &session.refresh).await?;
    assert_eq!(again.code, "VALID");
    assert_eq!(next(&backend, &session.refresh).await?, again.refresh.clone().context("a token")?);
    assert_eq!(refreshes(&owner, session.id).await?, 1, "a repetition changes nothing");
    assert_eq!(verify(&backend, &again.access.context("a token")?).await?, "VALID");
    let second = next(&backend, &again.refresh.context("a token")?).await?;

    // What was not committed did not happen; the repetition gets what it would have got.
    backend.batch_execute("begin").await?;
    let third = next(&backend, &second).await?;
    cluster.crash()?;
    cluster.restart()?;
    let backend = cluster.connect("backend", DATABASE).await?;
    assert_eq!(next(&backend, &second).await?, third);
    let owner = cluster.connect("postgres", DATABASE).await?;
    assert_eq!(events(&owner, "session.reuse_detected").await?, 0);
    Ok(())
}

// ---- Standbys, backups, copies

#[tokio::test]
async fn a_promoted_standby_without_the_last_refreshes_believes_one_ahead_once_and_ends_what_is_further()
-> Result<()> {
    let mut primary = started()?;
    let backend = primary.connect("backend", DATABASE).await?;
    let one = open(&backend, "one").await?;
    let two = open(&backend, "two").await?;
    let late = open(&backend, "late").await?;
    let thrice = open(&backend, "thrice").await?;
    let none = open(&backend, "none").await?;
    let (mut standby, mut other) = (primary.standby()?, primary.standby()?);
    for standby in [&mut standby, &mut other] {
        standby.catch_up_with(&primary)?;
        standby.stop()?;
    }
    // The standbys do not receive these.
    let one_ahead = next(&backend, &one.refresh).await?;
    let two_ahead = next(&backend, &next(&backend, &two.refresh).await?).await?;
    let late_first = next(&backend, &late.refresh).await?;
    let late_second = next(&backend, &late_first).await?;
    let thrice_first = next(&backend, &thrice.refresh).await?;
    let thrice_second = next(&backend, &thrice_first).await?;
    let thrice_third = next(&backend, &thrice_second).await?;
    let unknown = open(&backend, "unknown").await?;
    primary.crash()?;
    for standby in [&mut standby, &mut other] {
        standby.restart()?;
        standby.promote()?;
    }

    // Once: what follows is one ahead of a session that was refreshed here, also before anything else has happened here.
    let backend = other.connect("backend", DATABASE).await?;
    assert_eq!(next(&backend, &thrice_first).await?, thrice_second);
    assert_eq!(code(&backend, &thrice_third).await?, "REUSED");

    let backend = standby.connect("backend", DATABASE).await?;
    let owner = standby.connect("postgres", DATABASE).await?;
    // Refreshed here, so that nothing of it can have been lost since; the first that happens here, before any event.
    assert_eq!(next(&backend, &late.refresh).await?, late_first);
    assert_eq!(code(&backend, &late_second).await?, "REUSED");
    assert_eq!(code(&backend, &late_first).await?, "REVOKED");
    assert_eq!(events(&owner, "session.reuse_detected").await?, 1);

    let successor = next(&backend, &one_ahead).await?;
    assert_eq!(refreshes(&owner, one.id).await?, 2);
    assert_eq!(next(&backend, &one_ahead).await?, successor, "its repetition too");
    let present = next(&backend, &successor).await?;
    assert_eq!(events(&owner, "session.reuse_detected").await?, 1);
    assert_eq!(next(&backend, &none.refresh).await?.len(), present.len(), "others go on as before");

    assert_eq!(code(&backend, &two_ahead).await?, "REUSED");
    assert_eq!(code(&backend, &two.refresh).await?, "REVOKED", "it has ended");
    assert_eq!(verify(&backend, &two.access).await?, "REVOKED");
    assert_eq!(events(&owner, "session.reuse_detected").await?, 2);

    assert_eq!(code(&backend, &unknown.refresh).await?, "NOT_FOUND");
    assert_eq!(verify(&backend, &unknown.access).await?, "REVOKED");
    // And the first of all tokens is known for what it is.
    assert_eq!(code(&backend, &one.refresh).await?, "REUSED");
    assert_eq!(code(&backend, &present).await?, "REVOKED");
    Ok(())
}

#[tokio::test]
async fn of_a_restored_backup_what_is_behind_its_client_ends_and_the_rest_can_be_ended_at_once() -> Result<()>
{
    let cluster = started()?;
    let backend = cluster.connect("backend", DATABASE).await?;
    let refreshed = open(&backend, "refreshed").await?;
    let untouched = open(&backend, "untouched").await?;
    let revoked = open(&backend, "revoked").await?;
    let dump = cluster.program("pg_dump").output()?;
    ensure!(dump.status.success(), "{}", String::from_utf8_lossy(&dump.stderr));
    let mut latest = refreshed.refresh.clone();
    for _ in 0..3 {
        latest = next(&backend, &latest).await?;
    }
    assert!(backend.query_one("select tollgate.revoke_session($1)", &[&revoked.id]).await?.get::<_, bool>(0));

    let restored = Cluster::builder().extension(false).setting(GRACE.0, GRACE.1).start()?;
    restored.execute(DATABASE, "create role web login; create role backend login")?;
    let mut psql = restored.program("psql");
    psql.args(["--no-psqlrc", "--quiet", "--set=ON_ERROR_STOP=1"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null());
    let mut psql = psql.stderr(Stdio::piped()).spawn()?;
    psql.stdin.take().context("a pipe")?.write_all(&dump.stdout)?;
    let output = psql.wait_with_output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));

    let backend = restored.connect("backend", DATABASE).await?;
    assert_eq!(code(&backend, &latest).await?, "REUSED");
    let back = refresh(&backend, &revoked.refresh).await?;
    assert_eq!(back.code, "VALID", "a backup does not know what was revoked since");
    let moment = jiff::Timestamp::now().to_string();
    let invalidate = ["session", "invalidate", "--before", &moment];
    let url = restored.url("postgres", DATABASE);
    assert_eq!(json_of(&url, &invalidate, OK)["invalidated"], 2);
    assert_eq!(code(&backend, &untouched.refresh).await?, "REVOKED");
    assert_eq!(code(&backend, &back.refresh.context("a token")?).await?, "REVOKED");
    assert_eq!(verify(&backend, &back.access.context("a token")?).await?, "REVOKED");
    let again = open(&backend, "revoked").await?;
    assert_eq!(json_of(&url, &invalidate, OK)["invalidated"], 0);
    next(&backend, &again.refresh).await?;
    Ok(())
}

/// Waits until a server has so many master keys loaded.
async fn eventually_loaded(owner: &Client, count: i32) {
    eventually_async(LONG, "the master keys to be read", async || {
        value::<i32>(owner, "select cardinality(tollgate.master_key_ids())").await.is_ok_and(|n| n == count)
    })
    .await;
}

#[tokio::test]
async fn a_copy_of_the_database_refreshes_with_the_master_key_alone_and_gets_keys_of_its_own() -> Result<()> {
    let cluster = started()?;
    let original = cluster.connect("backend", DATABASE).await?;
    let session = open(&original, "ann").await?;
    let mut copy = cluster.standby()?;
    copy.catch_up_with(&cluster)?;
    let key_file = copy.master_key_file().display().to_string();
    copy.promote()?;
    let backend = copy.connect("backend", DATABASE).await?;
    let owner = copy.connect("postgres", DATABASE).await?;
    // With the original's master key it is as good as the original, which is why it must not have it.
    eventually_loaded(&owner, 1).await;
    let first = next(&original, &session.refresh).await?;
    assert_eq!(next(&backend, &session.refresh).await?, first);

    let refresh_and_open = async || -> Result<()> {
        refused(refresh(&backend, &first).await, &SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE);
        let opened = backend.query_one("select tollgate.open_session('ann', '{posts:read}')", &[]).await;
        refused(opened, &SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE);
        assert_eq!(refreshes(&owner, session.id).await?, 1, "nothing changed");
        assert_eq!(verify(&backend, &session.access).await?, "VALID", "public keys are enough to verify");
        Ok(())
    };
    copy.configure("tollgate.master_key_file", "")?;
    eventually_loaded(&owner, 0).await;
    refresh_and_open().await?;
    copy.write_master_keys(&[OTHER_MASTER_KEY])?;
    copy.configure("tollgate.master_key_file", &key_file)?;
    eventually_loaded(&owner, 1).await;
    refresh_and_open().await?;

    // As docs/operations.md says.
    owner
        .batch_execute(
            "select tollgate.withdraw_signing_key(k.kid, 'of the original') from tollgate.signing_keys k
                 where not k.can_sign and k.withdrawn_at is null;
             select tollgate.create_signing_key()",
        )
        .await?;
    let own = open(&backend, "ann").await?;
    next(&backend, &own.refresh).await?;
    assert_eq!(code(&backend, &first).await?, "REVOKED");
    assert_eq!(code(&original, &own.refresh).await?, "NOT_FOUND");
    next(&original, &first).await?;
    Ok(())
}

// ---- At once

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_refreshes_at_once_give_one_successor_and_two_tabs_share_a_session() -> Result<()> {
    let (db, backend) = created("at_once").await?;
    let session = open(&backend, "ann").await?;
    let mut clients = JoinSet::new();
    for _ in 0..10 {
        let client = db.session("backend").await?;
        let token = session.refresh.clone();
        clients.spawn(async move { refresh(&client, &token).await });
    }
    let mut successors = BTreeSet::new();
    let mut accesses = BTreeSet::new();
    while let Some(refreshed) = clients.join_next().await {
        let refreshed = refreshed??;
        assert_eq!(refreshed.code, "VALID");
        successors.extend(refreshed.refresh);
        accesses.extend(refreshed.access);
    }
    assert_eq!((successors.len(), accesses.len()), (1, 10));
    assert_eq!(refreshes(&db.owner, session.id).await?, 1);
    for access in &accesses {
        assert_eq!(verify(&backend, access).await?, "VALID");
    }

    // Two tabs with one store each, of which one is always a step behind.
    let mut behind = successors.pop_first().context("a successor")?;
    for _ in 0..5 {
        let ahead = next(&backend, &behind).await?;
        assert_eq!(next(&backend, &behind).await?, ahead);
        behind = ahead;
    }
    assert_eq!(events(&db.owner, "session.reuse_detected").await?, 0);
    // Two steps behind is no tab any more.
    assert_eq!(code(&backend, &session.refresh).await?, "REUSED");
    assert_eq!(code(&backend, &behind).await?, "REVOKED");
    for access in &accesses {
        assert_eq!(verify(&backend, access).await?, "REVOKED");
    }
    Ok(())
}

#[tokio::test]
async fn a_refresh_that_waits_for_another_gets_its_successor_however_that_one_ends() -> Result<()> {
    let (db, backend) = created("waiting").await?;
    let mut token = open(&backend, "ann").await?.refresh;
    for end in ["commit", "rollback"] {
        let holder = db.session("backend").await?;
        holder.batch_execute("begin").await?;
        let successor = next(&holder, &token).await?;
        let waiter = db.session("backend").await?;
        let presented = token.clone();
        let waiting = tokio::spawn(async move { next(&waiter, &presented).await });
        wait_until_blocked(&holder).await?;
        holder.batch_execute(end).await?;
        assert_eq!(waiting.await??, successor, "{end}");
        token = successor;
    }
    // A session that is revoked meanwhile is not refreshed.
    let holder = db.session("backend").await?;
    holder.batch_execute("begin; select tollgate.revoke_all_sessions('ann')").await?;
    let waiter = db.session("backend").await?;
    let waiting = tokio::spawn(async move { refresh(&waiter, &token).await });
    wait_until_blocked(&holder).await?;
    holder.batch_execute("commit").await?;
    assert_eq!(waiting.await??.code, "REVOKED");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_refresh_begun_after_a_revocation_was_acknowledged_succeeds() -> Result<()> {
    const CLIENTS: usize = 3;
    let (db, backend) = created("storm").await?;
    let mut sessions = Vec::new();
    for n in 0..60 * rounds(1) {
        sessions.push(open(&backend, &format!("user {n}")).await?);
    }
    let sessions = Arc::new(sessions);
    let refreshed = Arc::new(AtomicUsize::new(0));
    let over = Arc::new(AtomicBool::new(false));
    let mut clients = JoinSet::new();
    for first in 0..CLIENTS {
        let client = db.session("backend").await?;
        let (sessions, refreshed, over) = (Arc::clone(&sessions), Arc::clone(&refreshed), Arc::clone(&over));
        clients.spawn(async move {
            let mut tokens: Vec<String> = sessions.iter().map(|session| session.refresh.clone()).collect();
            let mut history = Vec::new();
            while !over.load(Ordering::Relaxed) {
                for at in (first..tokens.len()).step_by(CLIENTS) {
                    let began = Instant::now();
                    let next = refresh(&client, &tokens[at]).await?;
                    history.push((at, began, Instant::now(), next.code));
                    refreshed.fetch_add(1, Ordering::Relaxed);
                    if let Some(token) = next.refresh {
                        tokens[at] = token;
                    }
                }
            }
            anyhow::Ok(history)
        });
    }
    let pass = async || {
        let enough = refreshed.load(Ordering::Relaxed) + 2 * sessions.len();
        eventually_async(LONG, "each to be refreshed", async || refreshed.load(Ordering::Relaxed) >= enough)
            .await;
    };
    pass().await;
    let mut revoked = Vec::new();
    for (n, session) in sessions.iter().enumerate() {
        let user = format!("user {n}");
        let began = Instant::now();
        match n % 3 {
            0 => backend.execute("select tollgate.revoke_session($1)", &[&session.id]).await?,
            1 => backend.execute("select tollgate.revoke_all_sessions($1)", &[&user]).await?,
            _ => backend.execute("select tollgate.revoke_user($1)", &[&user]).await?,
        };
        revoked.push((began, Instant::now()));
    }
    pass().await;
    over.store(true, Ordering::Relaxed);
    let (mut after, mut before) = (0, 0);
    while let Some(history) = clients.join_next().await {
        for (at, began, ended, code) in history?? {
            let (revoking, acknowledged) = revoked[at];
            if began > acknowledged {
                after += 1;
                assert_eq!(code, "REVOKED", "{at} was revoked before");
            } else if ended < revoking {
                before += 1;
                assert_eq!(code, "VALID", "{at} was not revoked yet");
            }
        }
    }
    assert!(after > 0 && before > 0, "{after} after and {before} before");
    Ok(())
}

// ---- For long

/// On a separate server: where a session of any database keeps a snapshot, PostgreSQL does not look again which dead rows it
/// may remove.
#[tokio::test]
async fn ten_thousand_refreshes_are_updates_in_place_and_take_no_more_room() -> Result<()> {
    let builder = Cluster::builder().setting(GRACE.0, GRACE.1).setting("autovacuum", "off");
    let db = Db::only(&Arc::new(common::start(builder)?)).await?;
    prepare(&db.cluster, DATABASE)?;
    let backend = db.session("backend").await?;
    let tokens: Vec<String> = {
        let mut tokens = Vec::new();
        for n in 0..100 {
            tokens.push(open(&backend, &format!("user {n}")).await?.refresh);
        }
        tokens
    };
    db.owner.batch_execute("create table public.held (n int primary key, token text not null)").await?;
    db.owner
        .execute(
            "insert into public.held select n, t from unnest($1::text[]) with ordinality u (t, n)",
            &[&tokens],
        )
        .await?;
    // Each in a transaction of its own, as they are in life.
    let refresh_all = |rounds: u32| {
        format!(
            "do $$
             declare held text[] := array(select token from public.held order by n); refreshed tollgate.refreshed_session;
             begin
                 for round in 1..{rounds} loop
                     for n in 1..cardinality(held) loop
                         refreshed := tollgate.refresh_session(held[n]);
                         if refreshed.code <> 'VALID' then raise '%', refreshed.code; end if;
                         held[n] := refreshed.refresh_token;
                         commit;
                     end loop;
                 end loop;
                 update public.held h set token = held[h.n];
             end $$"
        )
    };
    let sizes = "select pg_relation_size('tollgate.sessions'), pg_indexes_size('tollgate.sessions')";
    let counts = "select n_tup_upd, n_tup_hot_upd from pg_stat_user_tables where relid = 'tollgate.sessions'::regclass";
    let measured = async || -> Result<[i64; 4]> {
        db.owner.batch_execute("select pg_stat_force_next_flush()").await?;
        let (size, count) = (db.owner.query_one(sizes, &[]).await?, db.owner.query_one(counts, &[]).await?);
        Ok([size.get(0), size.get(1), count.get(0), count.get(1)])
    };
    // These make the room that the later ones use again.
    db.owner.batch_execute(&refresh_all(10)).await?;
    let [table, indexes, updates, hot] = measured().await?;
    assert_eq!(updates, 1_000);
    db.owner.batch_execute(&refresh_all(90)).await?;
    let [table_after, indexes_after, updates_after, hot_after] = measured().await?;
    assert_eq!(updates_after - updates, 9_000);
    assert_eq!(hot_after - hot, 9_000, "each is a HOT update");
    assert_eq!((table_after, indexes_after), (table, indexes), "in bytes");
    assert_eq!(events(&db.owner, "session.refreshed").await?, 0, "the audit log does not grow either");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_valid_token_is_refused_while_keys_rotate_under_four_clients() -> Result<()> {
    rotate_under_four_clients("rotating", rounds(25), Duration::ZERO).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "long: a minute"]
async fn no_valid_token_is_refused_while_keys_rotate_every_second_for_a_minute() -> Result<()> {
    rotate_under_four_clients("every_second", 60, Duration::from_secs(1)).await
}

async fn rotate_under_four_clients(name: &str, rotations: usize, period: Duration) -> Result<()> {
    let (db, _) = created(name).await?;
    let over = Arc::new(AtomicBool::new(false));
    let mut clients = JoinSet::new();
    for n in 0..4 {
        let (client, over) = (db.session("backend").await?, Arc::clone(&over));
        clients.spawn(async move {
            let user = format!("user {n}");
            let oldest = open(&client, &user).await?;
            let mut done = 0;
            while !over.load(Ordering::Relaxed) {
                let session = open(&client, &user).await?;
                let refreshed = refresh(&client, &session.refresh).await?;
                ensure!(refreshed.code == "VALID", "refreshed: {}", refreshed.code);
                let last = refresh(&client, &refreshed.refresh.context("a token")?).await?;
                for access in [
                    Some(&oldest.access),
                    Some(&session.access),
                    refreshed.access.as_ref(),
                    last.access.as_ref(),
                ] {
                    let code = verify(&client, access.context("a token")?).await?;
                    ensure!(code == "VALID", "verified: {code}");
                }
                done += 1;
            }
            Ok(done)
        });
    }
    let mut kids = BTreeSet::new();
    for _ in 0..rotations {
        let next = tokio::time::Instant::now() + period;
        let rotate = "select tollgate.rotate_signing_key('0')";
        kids.insert(value::<String>(&db.owner, rotate).await?);
        // Each key is used before the next one comes.
        let opened = open(&db.session("backend").await?, "between").await?;
        assert_eq!(verify(&db.owner, &opened.access).await?, "VALID");
        tokio::time::sleep_until(next).await;
    }
    over.store(true, Ordering::Relaxed);
    let mut done = 0;
    while let Some(client) = clients.join_next().await {
        done += client??;
    }
    assert!(kids.len() == rotations && done > 25, "{done} rounds with {} keys", kids.len());
    Ok(())
}

#[tokio::test]
async fn a_login_right_after_revoke_user_works_and_nothing_from_before_it_does() -> Result<()> {
    let (db, backend) = created("again").await?;
    let snapshot = db.session("backend").await?;
    let mut before: Vec<Session> = Vec::new();
    // Many within a second.
    for _ in 0..20 {
        let session = open(&backend, "ann").await?;
        snapshot.batch_execute("begin isolation level repeatable read; select 1").await?;
        assert_eq!(verify(&snapshot, &session.access).await?, "VALID");
        backend.execute("select tollgate.revoke_user('ann', 'left')", &[]).await?;
        before.push(session);
        for ended in &before {
            assert_eq!(verify(&backend, &ended.access).await?, "REVOKED");
            assert_eq!(code(&backend, &ended.refresh).await?, "REVOKED");
        }
        let old = before.last().context("one")?;
        assert_eq!(verify(&snapshot, &old.access).await?, "REVOKED", "in an older snapshot too");
        snapshot.batch_execute("rollback").await?;
    }
    let after = open(&backend, "ann").await?;
    assert_eq!(verify(&backend, &after.access).await?, "VALID");
    next(&backend, &after.refresh).await?;

    // A login that ends before the revocation does is from before it.
    let revoking = db.session("backend").await?;
    revoking.batch_execute("begin; select tollgate.revoke_user('ben')").await?;
    let meanwhile = open(&backend, "ben").await?;
    revoking.batch_execute("commit").await?;
    assert_eq!(code(&backend, &meanwhile.refresh).await?, "REVOKED");
    assert_eq!(verify(&backend, &meanwhile.access).await?, "REVOKED");
    Ok(())
}

// ---- Attacks

/// As in a PNG, reflected.
fn crc32(text: &[u8]) -> u32 {
    !text.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg()))
    })
}

/// A refresh token of this content, with the checksum that belongs to it.
fn token_of(content: &str) -> String {
    format!("tgr_{content}{:08x}", crc32(content.as_bytes()))
}

/// What a refresh token holds, in hexadecimal digits.
fn content(token: &str) -> Result<&str> {
    let digits = token.strip_prefix("tgr_").context("a refresh token")?;
    let content = digits.get(..digits.len() - 8).context("a checksum")?;
    ensure!(token_of(content) == token, "the checksum of {token}");
    Ok(content)
}

const ID_DIGITS: usize = 32;
/// HMAC-SHA-256.
const MAC_DIGITS: usize = 64;

#[tokio::test]
async fn a_forged_token_is_not_found_and_changes_nothing() -> Result<()> {
    let (db, backend) = created("forged").await?;
    let session = open(&backend, "ann").await?;
    let other = open(&backend, "ann").await?;
    let first = next(&backend, &session.refresh).await?;
    let before = (stored(&db.owner, session.id).await?, stored(&db.owner, other.id).await?);
    let logged: i64 = value(&db.owner, "select count(*) from tollgate.audit_log").await?;
    let (old, present, others) = (content(&session.refresh)?, content(&first)?, content(&other.refresh)?);
    let mac = present.len() - MAC_DIGITS;
    let flip = |text: &str, at: usize| {
        let digit = if text.as_bytes()[at] == b'0' { "1" } else { "0" };
        format!("{}{digit}{}", &text[..at], &text[at + 1..])
    };
    let none = Uuid::new_v4().simple().to_string();
    for (what, forged) in [
        ("the MAC with one bit changed at its end", flip(present, present.len() - 1)),
        ("at its beginning", flip(present, mac)),
        ("no MAC", format!("{}{}", &present[..mac], "0".repeat(MAC_DIGITS))),
        ("the MAC of the generation before", format!("{}{}", &present[..mac], &old[mac..])),
        ("the MAC of another session", format!("{}{}", &old[..mac], &others[mac..])),
        ("the id of another session", format!("{}{}", &others[..ID_DIGITS], &present[ID_DIGITS..])),
        ("an old generation with a bad MAC", flip(old, old.len() - 1)),
        ("a later generation", format!("{}3{}", &present[..mac - 1], &present[mac..])),
        (
            "the greatest generation",
            format!("{}{}{}", &present[..ID_DIGITS], "f".repeat(mac - ID_DIGITS), &present[mac..]),
        ),
        ("an id that there is not", format!("{none}{}", &present[ID_DIGITS..])),
    ] {
        // The greatest one may be beyond what a token can hold.
        let code = code(&backend, &token_of(&forged)).await?;
        assert!(
            code == "NOT_FOUND" || code == "MALFORMED" && what.starts_with("the greatest"),
            "{what}: {code}"
        );
    }
    for (what, malformed) in [
        ("a wrong checksum", flip(&first, first.len() - 1)),
        ("capitals", format!("tgr_{}", first[4..].to_uppercase())),
        ("a space", format!("{first} ")),
        ("half of it", first[..first.len() / 2].to_owned()),
        ("nothing", String::new()),
        ("an API token", common::issue(&db.owner, "ann", &[]).await?.token),
        ("an access token", session.access.clone()),
    ] {
        assert_eq!(code(&backend, &malformed).await?, "MALFORMED", "{what}");
    }
    assert_eq!((stored(&db.owner, session.id).await?, stored(&db.owner, other.id).await?), before);
    let issued = 1;
    assert_eq!(value::<i64>(&db.owner, "select count(*) from tollgate.audit_log").await?, logged + issued);
    next(&backend, &first).await?;
    next(&backend, &other.refresh).await?;
    Ok(())
}

#[tokio::test]
async fn a_token_of_another_database_is_not_found_even_where_its_row_and_key_were_copied() -> Result<()> {
    let (one, here) = created("swapped_one").await?;
    let (two, _) = created("swapped_two").await?;
    let session = open(&here, "ann").await?;
    let there = two.session("backend").await?;
    open(&there, "ann").await?;
    assert_eq!(code(&there, &session.refresh).await?, "NOT_FOUND");
    two.owner.batch_execute("alter database swapped_two set tollgate.issuer = 'https://two.test'").await?;
    for (table, condition) in [("sealed_keys", "purpose = 'refresh_token'"), ("sessions", "true")] {
        let rows: Value = value(
            &one.owner,
            &format!("select jsonb_agg(to_jsonb(t)) from tollgate.{table} t where {condition}"),
        )
        .await?;
        let insert = format!(
            "insert into tollgate.{table} select * from jsonb_populate_recordset(null::tollgate.{table}, $1)"
        );
        two.owner.execute(&insert, &[&rows]).await?;
    }
    // The issuer is part of what the MAC is over.
    let there = two.session("backend").await?;
    assert_eq!(code(&there, &session.refresh).await?, "NOT_FOUND");
    assert_eq!(stored(&two.owner, session.id).await?, stored(&one.owner, session.id).await?);
    next(&here, &session.refresh).await?;
    Ok(())
}

#[tokio::test]
async fn who_guesses_refresh_tokens_is_slowed_down_by_address() -> Result<()> {
    let (db, _) = created("guessed").await?;
    db.owner.batch_execute("alter database guessed set tollgate.failure_rate_limit = 5").await?;
    let backend = db.session("backend").await?;
    let session = open(&backend, "ann").await?;
    let from = async |token: &str, address: &str| -> Result<String> {
        let call = "select code from tollgate.refresh_session($1, client_ip => $2::text::inet)";
        Ok(backend.query_one(call, &[&token, &address]).await?.get(0))
    };
    let mut codes = Vec::new();
    for _ in 0..8 {
        let guess = format!("{}{}", Uuid::new_v4().simple(), &content(&session.refresh)?[ID_DIGITS..]);
        codes.push(from(&token_of(&guess), "192.0.2.1").await?);
    }
    assert_eq!(codes[..5], ["NOT_FOUND"; 5]);
    assert_eq!(codes[5..], ["RATE_LIMITED"; 3]);
    assert_eq!(
        from(&session.refresh, "192.0.2.1").await?,
        "RATE_LIMITED",
        "also a good one: it may be a guess"
    );
    assert_eq!(refreshes(&db.owner, session.id).await?, 0);
    assert_eq!(from(&session.refresh, "192.0.2.2").await?, "VALID");
    Ok(())
}

#[tokio::test]
async fn no_snapshot_and_no_rollback_makes_two_successors() -> Result<()> {
    let (db, backend) = created("rolled_back").await?;
    let session = open(&backend, "ann").await?;
    // In a snapshot from before another's refresh.
    let older = db.session("backend").await?;
    older.batch_execute("begin isolation level repeatable read; select 1").await?;
    let first = next(&backend, &session.refresh).await?;
    match refresh(&older, &session.refresh).await {
        Ok(refreshed) => assert_eq!(refreshed.refresh.as_ref(), Some(&first)),
        Err(error) => assert_eq!(error.code(), Some(&SqlState::T_R_SERIALIZATION_FAILURE), "{error}"),
    }
    older.batch_execute("rollback").await?;
    assert_eq!(refreshes(&db.owner, session.id).await?, 1);

    // Rolled back to a savepoint, it did not happen, and happens the same way.
    backend.batch_execute("begin; savepoint before").await?;
    let second = next(&backend, &first).await?;
    backend.batch_execute("rollback to before").await?;
    assert_eq!(next(&backend, &first).await?, second);
    backend.batch_execute("commit").await?;
    assert_eq!(refreshes(&db.owner, session.id).await?, 2);
    // Who keeps what was rolled back is ahead of the session, which nothing but a lost server explains.
    backend.batch_execute("begin").await?;
    let third = next(&backend, &second).await?;
    backend.batch_execute("rollback").await?;
    assert_eq!(code(&backend, &third).await?, "REUSED");
    assert_eq!(code(&backend, &second).await?, "REVOKED");
    Ok(())
}
