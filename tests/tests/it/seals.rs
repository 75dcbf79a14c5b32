//! The seals of the audit log: changes behind Tollgate's back are found and located; old events can be purged, and the
//! rest stays verifiable.

use std::sync::Arc;
use std::time::Duration;

use crate::common::{self, Shared, refused, value, wait_until_blocked};
use crate::operator::{Db, OPERATOR, position, read_all};
use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use tokio_postgres::error::SqlState;
use tokio_postgres::{AsyncMessage, Client};
use tollgate_tests::{Cluster, DATABASE, Tollgated, eventually, eventually_async};

/// The tests' events are only a moment old.
static SHARED: Shared = Shared::new(&[("tollgate.min_audit_retention", "0")]);

const LONG: Duration = Duration::from_secs(30);

async fn db(name: &str) -> Result<Db> {
    Db::create(&SHARED.cluster()?, name).await
}

async fn log(client: &Client, name: &str) -> Result<()> {
    client.execute("select tollgate.define_scope($1, 'of the tests')", &[&name]).await?;
    Ok(())
}

/// Waits until the whole log may be sealed: transactions in other databases, including those of other tests, delay it.
async fn settle(owner: &Client) -> Result<()> {
    let settled = "select not exists (select from tollgate.audit_log a, tollgate.final_place() f
                                      where (a.epoch, a.xid) >= (f.epoch, f.xid))";
    eventually_async(LONG, "older transactions to end", async || value(owner, settled).await.unwrap()).await;
    Ok(())
}

/// The number of events in the next seal; 0 if there is none.
async fn seal(client: &Client, max_events: i32) -> Result<i64> {
    Ok(client.query_one("select events from tollgate.seal_audit_log($1)", &[&max_events]).await?.get(0))
}

/// Seals each of a number of new events by itself; returns the number of seals. Earlier events are in the first.
async fn sealed(db: &Db, count: usize) -> Result<i64> {
    settle(&db.owner).await?;
    seal(&db.operator, 10_000).await?;
    let before: i64 = value(&db.owner, "select count(*) from tollgate.audit_seals").await?;
    for n in 0..count {
        for part in ["a", "b", "c"] {
            log(&db.owner, &format!("sealed:{before}:{n}:{part}")).await?;
        }
        settle(&db.owner).await?;
        assert_eq!(seal(&db.operator, 10_000).await?, 3);
    }
    value(&db.owner, "select count(*) from tollgate.audit_seals").await
}

/// `verify_audit_log()`, as JSON.
async fn verify(client: &Client) -> Result<Value> {
    value(client, "select to_jsonb(v) from tollgate.verify_audit_log() v").await
}

/// The first bad seal, and why.
async fn fault(client: &Client) -> Result<Option<(i64, String)>> {
    let answer = verify(client).await?;
    assert_eq!(answer["whole"], json!(answer["fault"].is_null()));
    Ok(answer["seal"].as_i64().zip(answer["fault"].as_str().map(str::to_owned)))
}

/// Runs statements with all triggers off, as a malicious owner can.
async fn tamper(db: &Db, statements: &str) -> Result<()> {
    let tables = ["audit_log", "audit_seals"];
    let switch = |how: &str| {
        tables.map(|table| format!("alter table tollgate.{table} {how} trigger append_only;")).concat()
    };
    let statements = format!("begin; {} {statements}; {} commit", switch("disable"), switch("enable always"));
    db.owner.batch_execute(&statements).await.with_context(|| statements.clone())?;
    Ok(())
}

/// The middle event under a seal that [`sealed`] created.
fn event_of(seal: i64) -> String {
    format!(
        "(select a.id from tollgate.audit_log a, tollgate.audit_seals s, tollgate.audit_seals p
          where s.seal = {seal} and p.seal = s.seal - 1
            and (a.epoch, a.xid) >= (p.epoch, p.xid) and (a.epoch, a.xid) < (s.epoch, s.xid)
          order by a.id offset 1 limit 1)"
    )
}

// ---- Sealing

#[tokio::test]
async fn an_untouched_log_is_intact() -> Result<()> {
    let db = db("untouched").await?;
    let empty = verify(&db.owner).await?;
    assert_eq!(
        (&empty["whole"], &empty["seals"], &empty["last_seal"]),
        (&json!(true), &json!(0), &Value::Null)
    );
    assert_eq!(sealed(&db, 3).await?, 4);
    assert_eq!(seal(&db.operator, 10_000).await?, 0, "nothing new");
    log(&db.owner, "not:sealed").await?;
    let answer = verify(&db.owner).await?;
    let events: i64 = value(&db.owner, "select count(*) from tollgate.audit_log").await?;
    assert_eq!((&answer["whole"], &answer["seals"]), (&json!(true), &json!(4)));
    assert_eq!((&answer["events"], &answer["last_seal"]), (&json!(events - 1), &json!(4)));
    Ok(())
}

#[tokio::test]
async fn a_call_seals_so_many_events_and_never_half_a_transaction() -> Result<()> {
    let db = db("bounded").await?;
    settle(&db.owner).await?;
    while seal(&db.operator, 1).await? > 0 {}
    for n in 0..5 {
        log(&db.owner, &format!("one:{n}")).await?;
    }
    db.owner.batch_execute("begin").await?;
    for n in 0..5 {
        log(&db.owner, &format!("together:{n}")).await?;
    }
    db.owner.batch_execute("commit").await?;
    settle(&db.owner).await?;
    let mut sizes = Vec::new();
    loop {
        match seal(&db.operator, 2).await? {
            0 => break,
            size => sizes.push(size),
        }
    }
    assert_eq!(sizes, [2, 2, 6]);
    assert_eq!(fault(&db.owner).await?, None);
    for wrong in ["null", "0", "-1", "1000001"] {
        let call = format!("select tollgate.seal_audit_log({wrong})");
        let error = refused(db.operator.execute(&call, &[]).await, &SqlState::INVALID_PARAMETER_VALUE);
        assert!(error.detail().is_some_and(|detail| detail.contains("max_events")), "{error:?}");
    }
    Ok(())
}

/// An event that only a superuser can write: its text would be longer than a text can be.
#[tokio::test]
async fn an_event_of_any_size_and_depth_is_sealed_and_a_change_of_it_found() -> Result<()> {
    let db = db("odd").await?;
    let digits = |n: usize| format!("('{{\"k\": [' || repeat('1e131071,', {n}) || '1]}}')::jsonb");
    let write = format!(
        "insert into tollgate.audit_log (event, detail) values
             ('odd', {}), ('odd', (repeat('[', 200) || repeat(']', 200))::jsonb), ('odd', '5'), ('odd', '{{\"n\": 1e400}}')",
        digits(10_000)
    );
    db.owner.batch_execute(&write).await?;
    settle(&db.owner).await?;
    assert!(seal(&db.operator, 10_000).await? > 4);
    assert_eq!(fault(&db.owner).await?, None);
    let odd = "id = (select min(id) from tollgate.audit_log where event = 'odd')";
    tamper(&db, &format!("update tollgate.audit_log set detail = {} where {odd}", digits(10_001))).await?;
    assert_eq!(fault(&db.owner).await?, Some((1, "events changed".to_owned())));
    Ok(())
}

/// Its digests are joined in chunks.
#[tokio::test]
async fn a_transaction_of_many_events_is_sealed_as_one_and_a_change_is_found_in_any_of_its_pieces()
-> Result<()> {
    let db = db("pieces").await?;
    settle(&db.owner).await?;
    seal(&db.operator, 10_000).await?;
    let write = "insert into tollgate.audit_log (event, detail) select 'many', to_jsonb(n) from generate_series(1, 2500) n";
    db.owner.batch_execute(write).await?;
    settle(&db.owner).await?;
    assert_eq!(seal(&db.operator, 100).await?, 2500);
    assert_eq!(fault(&db.owner).await?, None);
    let swap = |one: u32, other: u32| {
        format!(
            "update tollgate.audit_log a set at = b.at, detail = b.detail from tollgate.audit_log b
             where a.event = 'many' and b.event = 'many'
               and (a.detail::text, b.detail::text) in (('{one}', '{other}'), ('{other}', '{one}'))"
        )
    };
    for (one, other) in [(1, 2), (1000, 1001), (1, 2500)] {
        tamper(&db, &swap(one, other)).await?;
        assert_eq!(fault(&db.owner).await?, Some((2, "events reordered".to_owned())), "{one} {other}");
        tamper(&db, &swap(one, other)).await?;
        assert_eq!(fault(&db.owner).await?, None);
    }
    for n in [1, 1000, 1001, 2500] {
        let rename = |to: &str| {
            format!("update tollgate.audit_log set actor = {to} where event = 'many' and detail = '{n}'")
        };
        tamper(&db, &rename("'x' || actor")).await?;
        assert_eq!(fault(&db.owner).await?, Some((2, "events changed".to_owned())), "{n}");
        tamper(&db, &rename("substr(actor, 2)")).await?;
        assert_eq!(fault(&db.owner).await?, None);
    }
    Ok(())
}

#[tokio::test]
async fn transactions_that_may_still_write_are_not_sealed_and_writers_do_not_wait() -> Result<()> {
    // A separate server: open transactions of other databases would delay the seals too.
    let cluster = Arc::new(common::start(Cluster::builder().setting("autovacuum", "off"))?);
    let db = Db::only(&cluster).await?;
    while seal(&db.operator, 10_000).await? > 0 {}
    let slow = db.session("postgres").await?;
    slow.batch_execute("begin").await?;
    log(&slow, "slow:1").await?;
    log(&db.owner, "fast:1").await?;
    assert_eq!(seal(&db.operator, 10_000).await?, 0);

    db.operator.batch_execute("begin").await?;
    assert_eq!(seal(&db.operator, 10_000).await?, 0);
    // Sealing is in progress; writers continue.
    db.owner.batch_execute("set lock_timeout = '10ms'").await?;
    log(&db.owner, "fast:2").await?;
    slow.batch_execute("commit").await?;
    db.operator.batch_execute("commit").await?;
    assert_eq!(seal(&db.operator, 10_000).await?, 3);
    assert_eq!(fault(&db.owner).await?, None);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_that_seal_at_once_make_one_chain() -> Result<()> {
    let db = db("rivals").await?;
    let mut sealers = Vec::new();
    for _ in 0..3 {
        let client = db.session(OPERATOR).await?;
        sealers.push(tokio::spawn(async move {
            for _ in 0..30 {
                seal(&client, 2).await?;
            }
            anyhow::Ok(())
        }));
    }
    for n in 0..60 {
        log(&db.owner, &format!("rival:{n}")).await?;
    }
    for sealer in sealers {
        sealer.await??;
    }
    settle(&db.owner).await?;
    while seal(&db.operator, 2).await? > 0 {}
    let events: i64 = value(&db.owner, "select count(*) from tollgate.audit_log").await?;
    assert_eq!(verify(&db.owner).await?["events"], json!(events));
    assert_eq!(fault(&db.owner).await?, None);
    // An older snapshot would not see the last seals.
    db.operator.batch_execute("begin isolation level repeatable read").await?;
    refused(
        db.operator.execute("select tollgate.seal_audit_log()", &[]).await,
        &SqlState::INVALID_TRANSACTION_STATE,
    );
    Ok(())
}

#[tokio::test]
async fn seals_hold_whatever_the_settings() -> Result<()> {
    let db = db("settings").await?;
    db.owner
        .batch_execute(
            "insert into tollgate.audit_log (event, token_id, user_id, client_addr, detail) values
                 ('test', gen_random_uuid(), 'Jürgen ☃', '2001:db8::1/64', '{\"n\": 1.50, \"x\": [null, \"\\u2603\"]}'),
                 ('test', null, '', '10.0.0.1', '{}')",
        )
        .await?;
    settle(&db.owner).await?;
    assert!(seal(&db.operator, 10_000).await? > 0);
    for settings in [
        "set timezone = 'Asia/Kathmandu'; set datestyle = 'German, DMY'; set intervalstyle = 'iso_8601'",
        "set bytea_output = 'escape'; set extra_float_digits = -15; set client_encoding = 'LATIN1'",
        "set standard_conforming_strings = off; set lc_numeric = 'C'; set search_path = pg_temp",
        "set enable_indexscan = off; set enable_bitmapscan = off; set enable_hashagg = off; set work_mem = '64kB'",
    ] {
        let client = db.session("postgres").await?;
        client.batch_execute(settings).await?;
        let whole: bool = value(&client, "select whole from tollgate.verify_audit_log()").await?;
        assert!(whole, "{settings}");
    }
    Ok(())
}

#[tokio::test]
async fn several_daemons_seal_and_log_the_seals_as_proof_elsewhere() -> Result<()> {
    let db = db("daemons").await?;
    let arguments = ["run", "--seal-interval", "100ms", "--subscription", "seals", "--batch-size", "2"];
    let daemons = [Tollgated::spawn(&db.url(), &arguments)?, Tollgated::spawn(&db.url(), &arguments)?];
    for n in 0..20 {
        log(&db.owner, &format!("daemon:{n}")).await?;
    }
    eventually_async(LONG, "all events to be sealed", async || {
        let events: i64 = value(&db.owner, "select count(*) from tollgate.audit_log").await.unwrap();
        verify(&db.owner).await.unwrap()["events"] == json!(events)
    })
    .await;
    assert_eq!(fault(&db.owner).await?, None);
    let hashes = db.owner.query("select encode(hash, 'hex') from tollgate.audit_seals", &[]).await?;
    assert!(hashes.len() >= 10, "{} seals", hashes.len());
    for hash in hashes {
        let hash: String = hash.get(0);
        let logged = || daemons.iter().filter(|daemon| daemon.log().contains(&hash)).count();
        eventually(LONG, "the seal to be logged", || logged() == 1);
    }
    let reported =
        "select count(*) from tollgate.daemons d where d.tasks -> 'seal_audit' ->> 'last_outcome' = 'ok'";
    eventually_async(LONG, "the task to be reported", async || {
        // One of them leads the task.
        value::<i64>(&db.owner, reported).await.unwrap() >= 1
    })
    .await;
    Ok(())
}

// ---- Tampering

#[tokio::test]
async fn every_change_of_sealed_events_is_found_and_located() -> Result<()> {
    let cases: &[(&str, &str, &str)] = &[
        ("changed", "update tollgate.audit_log set actor = 'forged' where id = @3", "events changed"),
        ("movedtime", "update tollgate.audit_log set at = at + interval '1 microsecond' where id = @3", "events changed"),
        ("shifted", "update tollgate.audit_log set user_id = event, event = '' where id = @3", "events changed"),
        ("nulled", "update tollgate.audit_log set user_id = '' where id = @3 and user_id is null", "events changed"),
        ("renumbered", "update tollgate.audit_log set id = default where id = @3", "events reordered"),
        ("deleted", "delete from tollgate.audit_log where id = @3", "events removed"),
        (
            "inserted",
            "insert into tollgate.audit_log (event, xid, epoch) select 'forged', xid, epoch from tollgate.audit_log where id = @3",
            "events added",
        ),
        (
            "replaced",
            "delete from tollgate.audit_log where id = @3; update tollgate.audit_log set xid = (
                 select xid from tollgate.audit_seals where seal = 2) where id = @4",
            "events changed",
        ),
        (
            "swapped",
            "with a as (select * from tollgate.audit_log where id = @3),
                  b as (select * from tollgate.audit_log where id = (select id + 1 from a))
             update tollgate.audit_log l set detail = o.detail, at = o.at
             from (select b.id, a.detail, a.at from a, b union all select a.id, b.detail, b.at from a, b) o where o.id = l.id",
            "events reordered",
        ),
        ("movedaway", "update tollgate.audit_log set xid = (select xid from tollgate.audit_log where id = @4) where id = @3", "events removed"),
        ("movedback", "update tollgate.audit_log set epoch = 0 where id = @3", "events added"),
        ("sealcount", "update tollgate.audit_seals set events = events + 1 where seal = 3", "seal changed"),
        ("sealtime", "update tollgate.audit_seals set last_at = last_at + interval '1 second' where seal = 3", "seal changed"),
        ("sealhash", "update tollgate.audit_seals set hash = sha256('x') where seal = 3", "seal changed"),
        ("sealgone", "delete from tollgate.audit_seals where seal = 3", "seal removed"),
        (
            "sealbridged",
            "delete from tollgate.audit_seals where seal = 3; update tollgate.audit_seals set seal = seal - 1 where seal = 4;
             update tollgate.audit_seals set seal = seal - 1 where seal = 5",
            "seal changed",
        ),
    ];
    for (name, statements, expected) in cases {
        let db = db(&format!("tamper_{name}")).await?;
        assert_eq!(sealed(&db, 4).await?, 5);
        let (third, fourth): (i64, i64) = (
            value(&db.owner, &format!("select {}", event_of(3))).await?,
            value(&db.owner, &format!("select {}", event_of(4))).await?,
        );
        let statements = statements.replace("@3", &third.to_string()).replace("@4", &fourth.to_string());
        tamper(&db, &statements).await?;
        // Moved to before all seals, it is found under the first.
        let place = if *name == "movedback" { 1 } else { 3 };
        assert_eq!(fault(&db.owner).await?, Some((place, (*expected).to_owned())), "{name}");
    }
    Ok(())
}

/// Also a column that a later version may add, and forget to seal.
#[tokio::test]
async fn no_column_of_an_event_can_be_changed_unnoticed() -> Result<()> {
    let db = db("columns").await?;
    let other = [
        ("bigint", "default"),
        ("xid8", "(c.xid::text::bigint - 1)::text::xid8"),
        ("timestamp with time zone", "c.at - interval '1 microsecond'"),
        ("text", "coalesce(c.@, '') || 'x'"),
        ("uuid", "gen_random_uuid()"),
        ("inet", "'10.9.8.7'"),
        ("jsonb", "c.detail || '{\"x\": 1}'"),
        ("integer", "c.epoch + 1"),
    ];
    let columns = db
        .owner
        .query(
            "select attname::text, format_type(atttypid, null) from pg_attribute
             where attrelid = 'tollgate.audit_log'::regclass and attnum > 0 and not attisdropped",
            &[],
        )
        .await?;
    sealed(&db, 2).await?;
    let id: i64 = value(&db.owner, &format!("select {}", event_of(2))).await?;
    for column in columns {
        let (column, of_type): (String, String) = (column.get(0), column.get(1));
        let (_, change) = other.iter().find(|(name, _)| *name == of_type).context(of_type)?;
        let change = change.replace('@', &column);
        db.owner
            .batch_execute(&format!(
                "begin; alter table tollgate.audit_log disable trigger append_only;
                 update tollgate.audit_log c set {column} = {change} where id = {id}"
            ))
            .await?;
        assert!(fault(&db.owner).await?.is_some(), "{column} was changed");
        db.owner.batch_execute("rollback").await?;
        assert_eq!(fault(&db.owner).await?, None);
    }
    Ok(())
}

#[tokio::test]
async fn the_result_says_when_the_bad_events_were() -> Result<()> {
    let db = db("placed").await?;
    sealed(&db, 3).await?;
    let id: i64 = value(&db.owner, &format!("select {}", event_of(2))).await?;
    tamper(&db, &format!("update tollgate.audit_log set event = 'x' where id = {id}")).await?;
    let within: bool = value(
        &db.owner,
        &format!(
            "select v.seal = 2 and a.at between v.first_at and v.last_at and v.seals = 1 and v.last_seal = 1
             from tollgate.verify_audit_log() v, tollgate.audit_log a where a.id = {id}"
        ),
    )
    .await?;
    assert!(within);
    Ok(())
}

/// A seal that was kept elsewhere reveals what the chain alone cannot.
#[tokio::test]
async fn a_seal_that_was_kept_elsewhere_reveals_a_cut_or_forged_chain() -> Result<()> {
    let db = db("kept").await?;
    sealed(&db, 3).await?;
    let (kept, hash): (i64, Vec<u8>) = {
        let row =
            db.owner.query_one("select last_seal, last_hash from tollgate.verify_audit_log()", &[]).await?;
        (row.get(0), row.get(1))
    };
    let known = async || -> Result<Option<(i64, String)>> {
        let answer = db
            .owner
            .query_one("select seal, fault from tollgate.verify_audit_log($1, $2)", &[&kept, &hash])
            .await?;
        Ok(answer.get::<_, Option<i64>>(0).zip(answer.get(1)))
    };
    assert_eq!(known().await?, None);
    tamper(&db, &format!("delete from tollgate.audit_seals where seal = {kept}")).await?;
    assert_eq!(fault(&db.owner).await?, None, "nothing in the database shows that there was one more");
    assert_eq!(known().await?, Some((kept, "seal removed".to_owned())));

    let id: i64 = value(&db.owner, "select max(id) from tollgate.audit_log").await?;
    tamper(&db, &format!("update tollgate.audit_log set event = 'x' where id = {id}")).await?;
    settle(&db.owner).await?;
    assert_eq!(seal(&db.operator, 10_000).await?, 3);
    assert_eq!(fault(&db.owner).await?, None, "it was sealed again");
    assert_eq!(known().await?, Some((kept, "seal changed".to_owned())));
    for half in ["1, null", "null, '\\x00'"] {
        let call = format!("select tollgate.verify_audit_log({half})");
        refused(db.owner.execute(&call, &[]).await, &SqlState::INVALID_PARAMETER_VALUE);
    }
    Ok(())
}

#[tokio::test]
async fn seals_are_append_only_even_for_their_owner() -> Result<()> {
    let db = db("appendonly").await?;
    sealed(&db, 1).await?;
    for change in [
        "update tollgate.audit_seals set events = 0",
        "delete from tollgate.audit_seals",
        "truncate tollgate.audit_seals",
        "set session_replication_role = replica; delete from tollgate.audit_seals",
    ] {
        refused(db.owner.batch_execute(change).await, &SqlState::INSUFFICIENT_PRIVILEGE);
    }
    Ok(())
}

// ---- Purging

/// [`sealed`] takes no time, so the past is everything up to the moment after a seal.
async fn purge(client: &Client, through: i64, max_events: i32) -> Result<i64> {
    let before: String = value(
        client,
        &format!("select (last_at + interval '1 microsecond')::text from tollgate.audit_seals where seal = {through}"),
    )
    .await?;
    let purge = format!("select tollgate.purge_audit_log('{before}', {max_events})");
    value(client, &purge).await
}

#[tokio::test]
async fn a_purge_removes_whole_old_stretches_and_leaves_an_event_and_a_log_that_verifies() -> Result<()> {
    let db = db("purged").await?;
    let mut cursor = position(&db.operator, None).await?;
    assert_eq!(sealed(&db, 4).await?, 5);
    read_all(&db.operator, &mut cursor, 100).await?;
    let before: i64 = value(&db.owner, "select count(*) from tollgate.audit_log").await?;
    let first: i64 = value(&db.owner, "select events from tollgate.audit_seals where seal = 1").await?;
    assert_eq!(
        value::<i64>(&db.owner, "select tollgate.purge_audit_log(now() - interval '1 day')").await?,
        0
    );
    assert_eq!(purge(&db.owner, 3, 100_000).await?, first + 6);
    assert_eq!(purge(&db.owner, 3, 100_000).await?, 0, "done already");
    let after: i64 = value(&db.owner, "select count(*) from tollgate.audit_log").await?;
    assert_eq!(after, before - first - 6 + 1);

    let events = read_all(&db.operator, &mut cursor, 100).await?;
    assert_eq!(events.len(), 1, "{events:?}");
    assert_eq!((&events[0]["event"], &events[0]["actor"]), (&json!("audit.purged"), &json!("postgres")));
    let detail = &events[0]["detail"];
    assert_eq!(
        (&detail["events"], &detail["first_seal"], &detail["last_seal"]),
        (&json!(first + 6), &json!(1), &json!(3))
    );
    assert!(["before", "first_at", "last_at"].iter().all(|key| detail[key].is_string()), "{detail}");
    let answer = verify(&db.owner).await?;
    assert_eq!((&answer["whole"], &answer["seals"]), (&json!(true), &json!(6)), "one of them the purge's");
    assert_eq!((&answer["events"], &answer["purged"]), (&json!(6), &json!(3)));

    // The event of the purge is itself sealed and one day purged; the next one covers all before it.
    settle(&db.owner).await?;
    assert_eq!(seal(&db.operator, 10_000).await?, 1);
    log(&db.owner, "after:purge").await?;
    settle(&db.owner).await?;
    assert_eq!(seal(&db.operator, 10_000).await?, 1);
    assert_eq!(purge(&db.owner, 7, 100_000).await?, 7);
    let answer = verify(&db.owner).await?;
    assert_eq!(
        (&answer["whole"], &answer["events"], &answer["purged"]),
        (&json!(true), &json!(1), &json!(7))
    );
    tamper(&db, "insert into tollgate.audit_log (event, epoch, xid) select 'forged', epoch, '3' from tollgate.audit_seals where seal = 2").await?;
    assert_eq!(fault(&db.owner).await?, Some((1, "events added".to_owned())));
    Ok(())
}

#[tokio::test]
async fn a_purge_goes_in_bounded_steps() -> Result<()> {
    let db = db("steps").await?;
    sealed(&db, 4).await?;
    purge(&db.owner, 1, 100_000).await?;
    assert_eq!(purge(&db.owner, 5, 1).await?, 3, "one stretch at least");
    assert_eq!(purge(&db.owner, 5, 4).await?, 6);
    assert_eq!(purge(&db.owner, 5, 4).await?, 3);
    assert_eq!(purge(&db.owner, 5, 4).await?, 0);
    assert_eq!(fault(&db.owner).await?, None);
    Ok(())
}

#[tokio::test]
async fn a_purge_waits_for_every_subscriber_and_names_the_one_that_blocks_it() -> Result<()> {
    let db = db("heldup").await?;
    let mut cluster_cursor = position(&db.operator, Some(0)).await?;
    sealed(&db, 1).await?;
    db.operator.execute("select tollgate.open_subscription('slow one')", &[]).await?;
    sealed(&db, 2).await?;
    let (owner, mut notices) = db.cluster.listen("postgres", &db.name).await?;
    let removed = purge(&owner, 4, 100_000).await?;
    let left: i64 = value(
        &db.owner,
        "select min(s.seal) from tollgate.audit_seals s where s.seal > tollgate.last_purged_seal()",
    )
    .await?;
    assert!(removed > 0 && left == 3, "{removed} removed, seal {left} is the first left");
    let mut warnings = Vec::new();
    while let Ok(AsyncMessage::Notice(notice)) = notices.try_recv() {
        warnings.push(format!("{} {}", notice.message(), notice.hint().unwrap_or_default()));
    }
    assert!(
        warnings.len() == 1
            && warnings[0].contains("'slow one'")
            && warnings[0].contains("drop_subscription"),
        "{warnings:?}"
    );

    let dropped = "select tollgate.drop_subscription('slow one')";
    assert!(value::<bool>(&db.owner, dropped).await?);
    assert!(!value::<bool>(&db.owner, dropped).await?, "gone already");
    assert_eq!(purge(&db.owner, 4, 100_000).await?, 6);
    assert_eq!(fault(&db.owner).await?, None);
    let events = read_all(&db.operator, &mut cluster_cursor, 100).await?;
    assert!(events.iter().any(|event| event["event"] == "subscription.dropped"
        && event["detail"] == json!({"subscription": "slow one"})));
    Ok(())
}

#[tokio::test]
async fn a_purge_does_not_remove_the_evidence_of_tampering() -> Result<()> {
    let db = db("traces").await?;
    sealed(&db, 3).await?;
    let id: i64 = value(&db.owner, &format!("select {}", event_of(2))).await?;
    tamper(&db, &format!("update tollgate.audit_log set actor = 'forged' where id = {id}")).await?;
    let before: i64 = value(&db.owner, "select count(*) from tollgate.audit_log").await?;
    let error = purge(&db.owner, 3, 100_000).await.err().context("refused")?;
    let error = error
        .downcast_ref::<tokio_postgres::Error>()
        .map_or_else(|| format!("{error:?}"), |error| format!("{error:?}"));
    assert!(error.contains("XX001") && error.contains("Seal 2: events changed"), "{error}");
    assert_eq!(value::<i64>(&db.owner, "select count(*) from tollgate.audit_log").await?, before);
    Ok(())
}

/// The flag that lets a purge through the trigger is internal to the library: nothing in SQL sets it, and it is reset
/// after a purge, even one that fails.
#[tokio::test]
async fn nothing_but_a_purge_gets_past_the_trigger() -> Result<()> {
    let db = db("nobypass").await?;
    sealed(&db, 2).await?;
    let delete = "delete from tollgate.audit_log";
    for attempt in [
        delete.to_owned(),
        "select tollgate.purge_sealed_events(now(), 1000)".to_owned(),
        format!("select tollgate.purge_audit_log(now(), 1000), 1; {delete}"),
        format!(
            "do $$ begin perform tollgate.purge_audit_log('infinity'); exception when others then null; end $$; {delete}"
        ),
        format!("set tollgate.is_purging_audit_log = on; {delete}"),
        format!("begin; select tollgate.purge_audit_log(now(), 1); {delete} where event = 'x'"),
    ] {
        let result = db.owner.batch_execute(&attempt).await;
        let error = common::error(result);
        assert!(
            [&SqlState::INSUFFICIENT_PRIVILEGE, &SqlState::INVALID_NAME].contains(&error.code()),
            "{attempt}: {error:?}"
        );
        db.owner.batch_execute("rollback").await?;
    }
    for wrong in ["null", "'infinity'", "'-infinity'", "now() + interval '1 hour'"] {
        let call = format!("select tollgate.purge_audit_log({wrong})");
        let error = refused(db.owner.execute(&call, &[]).await, &SqlState::INVALID_PARAMETER_VALUE);
        assert!(error.detail().is_some_and(|detail| detail.contains("before")), "{error:?}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_purge_waits_for_a_session_that_seals() -> Result<()> {
    let db = db("queue").await?;
    sealed(&db, 2).await?;
    log(&db.owner, "queue:1").await?;
    settle(&db.owner).await?;
    db.operator.batch_execute("begin").await?;
    assert_eq!(seal(&db.operator, 10_000).await?, 1);
    let rival = db.session("postgres").await?;
    let purged = tokio::spawn(async move { purge(&rival, 3, 100_000).await });
    wait_until_blocked(&db.operator).await?;
    db.operator.batch_execute("commit").await?;
    assert!(purged.await?? > 0);
    assert_eq!(fault(&db.owner).await?, None);
    Ok(())
}

/// The role that purges does not decide how long the log is kept.
#[tokio::test]
async fn nothing_younger_than_the_owners_setting_is_purged() -> Result<()> {
    let db = db("retention").await?;
    db.owner.batch_execute("alter database retention set tollgate.min_audit_retention = '30d'").await?;
    sealed(&db, 2).await?;
    let purger = db.session(OPERATOR).await?;
    for lift in [
        "set tollgate.min_audit_retention = 0",
        "alter role current_user set tollgate.min_audit_retention = 0",
        "alter database retention set tollgate.min_audit_retention = 0",
    ] {
        refused(purger.batch_execute(lift).await, &SqlState::INSUFFICIENT_PRIVILEGE);
    }
    for before in ["now()", "now() - interval '1 second'", "now() - interval '29 days 23 hours'"] {
        let purge = purger.execute(&format!("select tollgate.purge_audit_log({before})"), &[]).await;
        let error = refused(purge, &SqlState::INVALID_PARAMETER_VALUE);
        assert!(error.message().contains("30 days"), "{error:?}");
    }
    assert_eq!(
        value::<i64>(&purger, "select tollgate.purge_audit_log(now() - interval '30 days')").await?,
        0
    );
    Ok(())
}

/// The verdict against a seal that was kept elsewhere, with a retention of thirty days.
async fn verdict(db: &Db, (seal, hash): &(i64, String)) -> Result<(Option<String>, Option<i64>)> {
    let session = db.session("postgres").await?;
    session.batch_execute("set tollgate.min_audit_retention = '30d'").await?;
    let call = format!("select fault, seal from tollgate.verify_audit_log({seal}, '\\x{hash}')");
    let row = session.query_one(&call, &[]).await?;
    Ok((row.get(0), row.get(1)))
}

async fn last_seal(db: &Db) -> Result<(i64, String)> {
    let last = "select seal, encode(hash, 'hex') from tollgate.audit_seals order by seal desc limit 1";
    let row = db.owner.query_one(last, &[]).await?;
    Ok((row.get(0), row.get(1)))
}

#[tokio::test]
async fn a_forged_purge_is_found() -> Result<()> {
    let db = db("byhand").await?;
    assert_eq!(sealed(&db, 3).await?, 4);
    let kept = last_seal(&db).await?;
    assert_eq!(verdict(&db, &kept).await?, (None, None));
    tamper(
        &db,
        "delete from tollgate.audit_log a using tollgate.audit_seals s where s.seal = 2 and (a.epoch, a.xid) < (s.epoch, s.xid);
         insert into tollgate.audit_log (event, detail)
             values ('audit.purged', '{\"first_seal\": 1, \"last_seal\": 2, \"events\": 9}')",
    )
    .await?;
    let removed = (1, "events removed".to_owned());
    assert_eq!(fault(&db.owner).await?, Some(removed.clone()), "an event is no proof");
    assert_eq!(verdict(&db, &kept).await?, (Some(removed.1), Some(removed.0)));

    // A link that fits the chain: anyone who can write to the table can create one.
    for (purged_to, before, found) in [
        (2, "now()", "purge not proven"),
        (2, "now() - interval '31 days'", "purge not proven"),
        (9, "now()", "events added"),
    ] {
        db.owner.batch_execute("begin").await?;
        db.owner
            .batch_execute(&format!(
                "set local session_replication_role = replica;
                 select tollgate.append_seal(jsonb_populate_record(s, jsonb_build_object(
                     'events', 0, 'purged_to', {purged_to}, 'purged_before', {before}, 'first_at', now(), 'last_at', now(),
                     'in_order', (e).in_order, 'any_order', (e).any_order)))
                 from tollgate.audit_seals s,
                     tollgate.measure_stretch((s.epoch, s.xid)::tollgate.audit_place, (s.epoch, s.xid)::tollgate.audit_place) e
                 where s.seal = 4"
            ))
            .await?;
        db.owner.batch_execute("set local tollgate.min_audit_retention = '30d'").await?;
        let call = format!("select fault from tollgate.verify_audit_log({}, '\\x{}')", kept.0, kept.1);
        let answer: Option<String> = value(&db.owner, &call).await?;
        assert_eq!(answer.as_deref(), Some(found), "{purged_to} {before}");
        db.owner.batch_execute("rollback").await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_purge_is_proven_by_a_seal_that_was_kept_later() -> Result<()> {
    let db = db("proven").await?;
    assert_eq!(sealed(&db, 3).await?, 4);
    let before = last_seal(&db).await?;
    assert!(purge(&db.owner, 2, 100_000).await? > 0);
    let after = last_seal(&db).await?;
    assert_eq!(after.0, 5);
    assert_eq!(verdict(&db, &after).await?, (None, None));
    assert_eq!(
        verdict(&db, &before).await?,
        (Some("purge not proven".to_owned()), Some(5)),
        "too young to be believed"
    );
    let logged = "select detail ->> 'hash' from tollgate.audit_log where event = 'audit.purged'";
    assert_eq!(value::<String>(&db.owner, logged).await?, after.1);
    let known = format!("select whole from tollgate.verify_audit_log({}, '\\x{}')", before.0, before.1);
    assert!(value::<bool>(&db.owner, &known).await?, "where such purges are allowed");
    Ok(())
}

// ---- Elsewhere

#[tokio::test]
async fn seals_hold_in_a_restored_database_and_on_a_standby() -> Result<()> {
    let db = db("restored").await?;
    sealed(&db, 2).await?;
    log(&db.owner, "un:sealed").await?;
    let dump = db.cluster.program("pg_dump").arg(&db.name).output()?;
    db.cluster.execute(DATABASE, "create database restored_copy")?;
    let file = tempfile::NamedTempFile::new()?;
    std::fs::write(file.path(), &dump.stdout)?;
    let psql = db
        .cluster
        .program("psql")
        .args(["--no-psqlrc", "--quiet", "--set=ON_ERROR_STOP=1", "--output=/dev/null", "restored_copy"])
        .stdin(std::fs::File::open(file.path())?)
        .output()?;
    assert!(psql.status.success(), "{}", String::from_utf8_lossy(&psql.stderr));
    let copy = db.cluster.connect("postgres", "restored_copy").await?;
    assert_eq!(verify(&copy).await?, verify(&db.owner).await?);
    assert_eq!(fault(&copy).await?, None);
    settle(&copy).await?;
    assert!(seal(&copy, 10_000).await? > 0, "the chain continues");
    assert_eq!(fault(&copy).await?, None);

    let standby = db.cluster.standby()?;
    standby.catch_up_with(&db.cluster)?;
    let replica = standby.connect("postgres", &db.name).await?;
    assert_eq!(verify(&replica).await?["whole"], json!(true));
    Ok(())
}
