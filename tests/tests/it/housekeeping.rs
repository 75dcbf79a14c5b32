//! Housekeeping: expiries are recorded once, ended tokens are deleted, and no session has to wait.

use crate::web;
use std::collections::BTreeSet;
use std::time::Duration;

use crate::common::{Shared, Token, code, issue, issue_with, refused, revoke, value};
use crate::operator::{
    self, Cursor, Db, OPERATOR, flush_all, issue_many, position, read_all, reads, set, usage, verify_each,
};
use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use tollgate_tests::{Tollgated, eventually_async};
use uuid::Uuid;

/// Less than the days that the tests keep.
static SHARED: Shared = Shared::new(&[("tollgate.min_audit_retention", "1d")]);

const LONG: Duration = Duration::from_secs(30);

async fn expire(client: &Client, batch_size: i32) -> Result<i64> {
    Ok(client.query_one("select tollgate.expire_tokens($1)", &[&batch_size]).await?.get(0))
}

/// With a retention of thirty days.
async fn purge(client: &Client, batch_size: i32) -> Result<i64> {
    Ok(client.query_one("select tollgate.purge_tokens('30 days', $1)", &[&batch_size]).await?.get(0))
}

/// A token, changed behind Tollgate's back.
async fn token(db: &Db, changes: &str) -> Result<Token> {
    let token = issue(&db.owner, "ann", &[]).await?;
    set(&db.owner, token.id, changes).await?;
    Ok(token)
}

async fn remaining(db: &Db) -> Result<BTreeSet<Uuid>> {
    let rows = db.owner.query("select id from tollgate.api_tokens", &[]).await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// The tokens of the new events, all of which are of this kind.
async fn logged(db: &Db, cursor: &mut Cursor, event: &str) -> Result<Vec<Uuid>> {
    let events = read_all(&db.operator, cursor, 1000).await?;
    events
        .iter()
        .map(|logged| {
            assert_eq!(logged["event"], json!(event), "{logged}");
            assert_eq!((&logged["actor"], &logged["user_id"]), (&json!(OPERATOR), &json!("ann")));
            logged["token_id"].as_str().context("an event of a token")?.parse().context("an id")
        })
        .collect()
}

// ---- Expiry

#[tokio::test]
async fn an_expiry_is_recorded_once() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "once").await?;
    let due = token(&db, "expires_at = '2026-01-02 03:04:05+00'").await?;
    let later = issue_with(&db.owner, "ann", "expires_in => '1 day'").await?;
    issue(&db.owner, "ann", &[]).await?;
    let mut cursor = position(&db.operator, None).await?;

    assert_eq!(expire(&db.operator, 1000).await?, 1);
    let events = read_all(&db.operator, &mut cursor, 10).await?;
    assert_eq!(events.len(), 1, "{events:?}");
    let event = &events[0];
    assert_eq!((&event["event"], &event["token_id"]), (&json!("token.expired"), &json!(due.id)));
    assert_eq!((&event["user_id"], &event["actor"]), (&json!("ann"), &json!(OPERATOR)));
    assert_eq!(event["detail"], json!({"expires_at": "2026-01-02T03:04:05+00:00"}));

    for _ in 0..3 {
        assert_eq!(expire(&db.operator, 1000).await?, 0);
    }
    assert_eq!(read_all(&db.operator, &mut cursor, 10).await?, Vec::<Value>::new());
    assert_eq!(code(&db.web, &due.token).await?, "EXPIRED");
    assert_eq!(code(&db.web, &later.token).await?, "VALID");
    Ok(())
}

#[tokio::test]
async fn an_expired_token_is_refused_before_its_expiry_is_recorded() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "refused").await?;
    let token = issue_with(&db.owner, "ann", "expires_in => '200 milliseconds'").await?;
    eventually_async(LONG, "the token to be refused", async || {
        code(&db.web, &token.token).await.unwrap() == "EXPIRED"
    })
    .await;
    let recorded: i64 =
        value(&db.owner, "select count(*) from tollgate.audit_log where event = 'token.expired'").await?;
    assert_eq!(recorded, 0);
    let status: String = value(&db.owner, "select status from tollgate.tokens").await?;
    assert_eq!(status, "expired");
    assert_eq!(expire(&db.operator, 10).await?, 1);
    assert_eq!(code(&db.web, &token.token).await?, "EXPIRED");
    Ok(())
}

#[tokio::test]
async fn expiries_are_recorded_in_batches_the_earliest_first() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "batches").await?;
    let mut in_order = Vec::new();
    for n in 0..7 {
        in_order.push(token(&db, &format!("expires_at = '2026-01-0{}'", 9 - n)).await?.id);
    }
    in_order.reverse();
    let mut cursor = position(&db.operator, None).await?;
    for batch in in_order.chunks(3) {
        assert_eq!(expire(&db.operator, 3).await?, i64::try_from(batch.len())?);
        assert_eq!(logged(&db, &mut cursor, "token.expired").await?, batch);
    }
    assert_eq!(expire(&db.operator, 3).await?, 0);
    Ok(())
}

#[tokio::test]
async fn revoked_tokens_do_not_expire_and_disabled_ones_do() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "kinds").await?;
    token(&db, "expires_at = now() - interval '1 hour', revoked_at = now()").await?;
    token(&db, "expires_at = 'infinity'").await?;
    let disabled = token(&db, "expires_at = now() - interval '1 hour', disabled_at = now()").await?;
    let ancient = token(&db, "expires_at = '-infinity'").await?;
    let mut cursor = position(&db.operator, None).await?;
    assert_eq!(expire(&db.operator, 10).await?, 2);
    assert_eq!(logged(&db, &mut cursor, "token.expired").await?, [ancient.id, disabled.id]);

    // An expired token can still be revoked, which is another event.
    let expired = token(&db, "expires_at = now() - interval '1 hour'").await?;
    assert_eq!(expire(&db.operator, 10).await?, 1);
    assert!(revoke(&db.owner, expired.id).await?);
    let events = read_all(&db.operator, &mut cursor, 10).await?;
    let kinds: Vec<&Value> = events.iter().map(|event| &event["event"]).collect();
    assert_eq!(kinds, ["token.created", "token.expired", "token.revoked"]);
    Ok(())
}

#[tokio::test]
async fn an_expiry_that_was_rolled_back_is_recorded_later() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "undone").await?;
    let due = token(&db, "expires_at = now()").await?;
    let mut cursor = position(&db.operator, None).await?;
    db.operator.batch_execute("begin").await?;
    assert_eq!(expire(&db.operator, 10).await?, 1);
    db.operator.batch_execute("rollback").await?;
    assert_eq!(logged(&db, &mut cursor, "token.expired").await?, Vec::<Uuid>::new());
    assert_eq!(expire(&db.operator, 10).await?, 1);
    assert_eq!(logged(&db, &mut cursor, "token.expired").await?, [due.id]);
    Ok(())
}

// ---- Purge

#[tokio::test]
async fn only_tokens_that_ended_longer_ago_than_the_retention_are_deleted() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "retention").await?;
    let long_ago = "now() - interval '30 days 1 minute'";
    let not_so_long = "now() - interval '29 days 23 hours'";
    let mut kept = BTreeSet::new();
    for changes in [
        // Live.
        "name = 'live'".to_owned(),
        "expires_at = now() + interval '1 day'".to_owned(),
        format!("created_at = {long_ago}"),
        // May be enabled again.
        format!("disabled_at = {long_ago}"),
        // Ended a short time ago.
        format!("revoked_at = {not_so_long}"),
        format!("expires_at = {not_so_long}, expired_at = {not_so_long}"),
        format!("revoked_at = {not_so_long}, expires_at = now()"),
        // Its expiry is not recorded yet.
        format!("expires_at = {long_ago}"),
        format!("expires_at = {long_ago}, disabled_at = {long_ago}"),
    ] {
        kept.insert(token(&db, &changes).await?.id);
    }
    let mut deleted = BTreeSet::new();
    for changes in [
        format!("revoked_at = {long_ago}"),
        format!("revoked_at = {long_ago}, disabled_at = now()"),
        format!("revoked_at = {long_ago}, expires_at = now() + interval '1 day'"),
        // Recorded long after it ended; the end counts.
        format!("expires_at = {long_ago}, expired_at = now()"),
        format!("expires_at = {long_ago}, expired_at = now(), disabled_at = now()"),
    ] {
        deleted.insert(token(&db, &changes).await?.id);
    }
    let mut cursor = position(&db.operator, None).await?;

    let purged: i64 = value(&db.operator, "select tollgate.purge_tokens()").await?;
    assert_eq!(purged, 5, "the default retention is thirty days");
    assert_eq!(remaining(&db).await?, kept);
    let logged = logged(&db, &mut cursor, "token.purged").await?;
    assert_eq!((logged.len(), logged.into_iter().collect()), (5, deleted));
    assert_eq!(purge(&db.operator, 100).await?, 0);

    // Once their expiry is recorded, the tokens that waited for it are purged as well.
    assert_eq!(expire(&db.operator, 100).await?, 2);
    assert_eq!(purge(&db.operator, 100).await?, 2);
    let purged: i64 = value(&db.operator, "select tollgate.purge_tokens('0 days')").await?;
    assert_eq!(purged, 3, "what has ended at all");
    Ok(())
}

#[tokio::test]
async fn a_purged_token_takes_its_usage_with_it_and_leaves_its_events() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "usage").await?;
    let [old, live] = [issue(&db.owner, "ann", &[]).await?, issue(&db.owner, "ann", &[]).await?];
    verify_each(&db.web, &[old.clone(), live.clone()]).await?;
    flush_all(&db.operator).await?;
    set(&db.owner, old.id, "revoked_at = '2026-01-02 03:04:05+00'").await?;
    let mut cursor = position(&db.operator, None).await?;
    assert_eq!(purge(&db.operator, 100).await?, 1);

    assert_eq!(usage(&db.owner, old.id).await?, None);
    assert_eq!(usage(&db.owner, live.id).await?.map(|usage| usage.uses), Some(1));
    let events = read_all(&db.operator, &mut cursor, 10).await?;
    assert_eq!(events.len(), 1);
    assert_eq!((&events[0]["event"], &events[0]["token_id"]), (&json!("token.purged"), &json!(old.id)));
    assert_eq!(events[0]["detail"], json!({"ended_at": "2026-01-02T03:04:05+00:00"}));
    let of_old = format!("select count(*) from tollgate.audit_log where token_id = '{}'", old.id);
    assert_eq!(value::<i64>(&db.owner, &of_old).await?, 2);
    assert_eq!(code(&db.web, &old.token).await?, "NOT_FOUND");
    assert_eq!(code(&db.web, &live.token).await?, "VALID");
    Ok(())
}

#[tokio::test]
async fn tokens_are_purged_in_batches_in_the_order_of_their_ends() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "purgebatches").await?;
    let mut in_order = Vec::new();
    for n in 0..7 {
        let end = if n % 2 == 0 { "revoked_at" } else { "expired_at = now(), expires_at" };
        in_order.push(token(&db, &format!("{end} = '2026-01-0{}'", 9 - n)).await?.id);
    }
    in_order.reverse();
    let mut cursor = position(&db.operator, None).await?;
    for batch in in_order.chunks(3) {
        assert_eq!(purge(&db.operator, 3).await?, i64::try_from(batch.len())?);
        assert_eq!(logged(&db, &mut cursor, "token.purged").await?, batch);
    }
    assert_eq!(purge(&db.operator, 3).await?, 0);
    Ok(())
}

// ---- Both

/// A session has a token's row locked, and may keep it so for hours.
#[tokio::test]
async fn locked_tokens_are_left_for_later_and_not_waited_for() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "locked").await?;
    let ended = "revoked_at = now() - interval '1 year'";
    let mut due = Vec::new();
    let mut old = Vec::new();
    for _ in 0..3 {
        due.push(token(&db, "expires_at = now() - interval '1 hour'").await?.id);
        old.push(token(&db, ended).await?.id);
    }
    let holder = db.session("postgres").await?;
    holder.batch_execute("begin").await?;
    let lock = "select from tollgate.api_tokens where id = any ($1) for update";
    holder.execute(lock, &[&vec![due[0], old[0]]]).await?;
    let mut cursor = position(&db.operator, None).await?;
    db.operator.batch_execute("set lock_timeout = '1ms'").await?;

    assert_eq!(expire(&db.operator, 10).await?, 2);
    assert_eq!(logged(&db, &mut cursor, "token.expired").await?, due[1..]);
    assert_eq!(purge(&db.operator, 10).await?, 2);
    assert_eq!(logged(&db, &mut cursor, "token.purged").await?, old[1..]);
    assert_eq!((expire(&db.operator, 10).await?, purge(&db.operator, 10).await?), (0, 0));

    holder.batch_execute("rollback").await?;
    assert_eq!((expire(&db.operator, 10).await?, purge(&db.operator, 10).await?), (1, 1));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn several_daemons_at_once_record_and_purge_each_token_once() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "several").await?;
    issue_many(&db.owner, 600).await?;
    db.owner
        .batch_execute(
            "update tollgate.api_tokens set expires_at = now() - random() * interval '1 year';
             update tollgate.api_tokens set user_id = 'ann'",
        )
        .await?;
    let mut cursor = position(&db.operator, None).await?;
    let mut daemons = Vec::new();
    for _ in 0..3 {
        let operator = db.session(OPERATOR).await?;
        daemons.push(tokio::spawn(async move {
            let (mut expired, mut purged) = (0, 0);
            loop {
                let recorded = expire(&operator, 20).await?;
                let row = operator.query_one("select tollgate.purge_tokens('0 days', 15)", &[]).await?;
                let deleted: i64 = row.get(0);
                expired += recorded;
                purged += deleted;
                if recorded + deleted == 0 {
                    return anyhow::Ok((expired, purged));
                }
            }
        }));
    }
    let mut sums = (0, 0);
    for daemon in daemons {
        let (expired, purged) = daemon.await??;
        sums = (sums.0 + expired, sums.1 + purged);
    }
    // A session that found all the rest locked by the others stopped early.
    sums.0 += expire(&db.operator, 1000).await?;
    let left: i64 = value(&db.operator, "select tollgate.purge_tokens('0 days', 1000)").await?;
    assert_eq!((sums.0, sums.1 + left), (600, 600));
    assert_eq!(remaining(&db).await?, BTreeSet::new());

    let events = read_all(&db.operator, &mut cursor, 1000).await?;
    for kind in ["token.expired", "token.purged"] {
        let tokens: Vec<&Value> =
            events.iter().filter(|event| event["event"] == kind).map(|event| &event["token_id"]).collect();
        let different: BTreeSet<String> = tokens.iter().map(ToString::to_string).collect();
        assert_eq!((tokens.len(), different.len()), (600, 600), "{kind}");
    }
    Ok(())
}

#[tokio::test]
async fn arguments_that_make_no_sense_are_refused_by_name() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "arguments").await?;
    for (call, argument) in [
        ("expire_tokens(0)", "batch_size"),
        ("expire_tokens(-1)", "batch_size"),
        ("expire_tokens(100001)", "batch_size"),
        ("expire_tokens(null)", "batch_size"),
        ("purge_tokens('30 days', 0)", "batch_size"),
        ("purge_tokens('30 days', null)", "batch_size"),
        ("purge_tokens('30 days', 100001)", "batch_size"),
        ("purge_tokens('-1 second')", "retention"),
        ("purge_tokens(null)", "retention"),
    ] {
        let answer = db.operator.query_one(&format!("select tollgate.{call}"), &[]).await;
        let error = refused(answer, &SqlState::INVALID_PARAMETER_VALUE);
        assert!(error.detail().is_some_and(|detail| detail.contains(argument)), "{call}: {error:?}");
        assert!(error.hint().is_some(), "{call}: {error:?}");
    }
    for call in
        ["expire_tokens(1)", "expire_tokens(100000)", "purge_tokens('0', 1)", "purge_tokens('1000 years')"]
    {
        assert_eq!(value::<i64>(&db.operator, &format!("select tollgate.{call}")).await?, 0, "{call}");
    }
    Ok(())
}

/// Both run every few seconds for ever, on a table that may have millions of tokens.
#[tokio::test]
async fn both_find_their_tokens_by_an_index() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "indexed").await?;
    db.owner
        .batch_execute(
            "insert into tollgate.api_tokens
                 (id, token_hash, hint, user_id, name, scopes, metadata, expires_at, revoked_at, expired_at)
             select gen_random_uuid(), sha256(n::text::bytea), 'tgt_0000', 'ann', 'n', '{}', '{}',
                    case n % 4 when 1 then now() + n * interval '1 minute'
                               when 2 then now() - interval '1 hour' - n * interval '1 second' end,
                    case when n % 4 = 3 then now() - n * interval '1 second' end,
                    case when n % 4 = 2 and n > 500 then now() end
             from generate_series(1, 50000) n;
             update tollgate.api_tokens set revoked_at = '2026-01-01'
                 where revoked_at > now() - interval '500 seconds'",
        )
        .await?;
    db.owner.batch_execute("vacuum analyze tollgate.api_tokens").await?;
    // Often enough for a generic plan, which a daemon's connection ends up with.
    let mut done = 0;
    for round in 0..8 {
        for (call, index) in [
            ("select tollgate.expire_tokens(10)", "api_tokens_expiring"),
            ("select tollgate.purge_tokens('30 days', 10)", "api_tokens_ended"),
        ] {
            let reads = reads(&db.operator, "api_tokens", index, call).await?;
            assert_eq!((reads.scanned, reads.scans_of_index), (0, 1), "{call}, round {round}");
            assert!(reads.fetched <= 50, "{call}, round {round}: {reads:?}");
            done += 10;
        }
    }
    // A run that finds nothing must not read every token that will ever expire, or ever has.
    let rest: i64 = value(&db.operator, "select tollgate.expire_tokens(100000)").await?;
    let gone: i64 = value(&db.operator, "select tollgate.purge_tokens('30 days', 100000)").await?;
    assert!(rest > 0 && gone > 0, "{rest} and {gone} were left");
    for (call, index) in [
        ("select tollgate.expire_tokens(1000)", "api_tokens_expiring"),
        ("select tollgate.purge_tokens('30 days', 1000)", "api_tokens_ended"),
    ] {
        // The first may still be included through its earlier work.
        operator::reads(&db.operator, "api_tokens", index, call).await?;
        let reads = reads(&db.operator, "api_tokens", index, call).await?;
        assert_eq!((reads.scanned, reads.fetched, reads.scans_of_index), (0, 0, 1), "{call}");
    }
    // Each call got its ten tokens.
    let events: i64 = value(
        &db.owner,
        "select count(*) from tollgate.audit_log where event in ('token.expired', 'token.purged')",
    )
    .await?;
    assert_eq!(events, done + rest + gone);
    Ok(())
}

// ---- The audit log

/// Three days pass for the events that are not sealed yet.
const AGE: &str = "
    begin;
    alter table tollgate.audit_log disable trigger append_only;
    update tollgate.audit_log set at = at - interval '3 days' where at > now() - interval '1 day';
    alter table tollgate.audit_log enable always trigger append_only;
    commit";

/// Seals everything, which older transactions, also of other databases, may delay.
async fn seal(db: &Db) {
    eventually_async(LONG, "all to be sealed", async || {
        db.operator.execute("select tollgate.seal_audit_log()", &[]).await.unwrap();
        let unsealed = "select count(*) from tollgate.audit_log a, tollgate.place_after_seal(
                            (select max(s.seal) from tollgate.audit_seals s)) p
                        where (a.epoch, a.xid) >= (p.epoch, p.xid)";
        value::<i64>(&db.owner, unsealed).await.unwrap() == 0
    })
    .await;
}

/// A stretch of events of three days ago, two of them about these tokens.
async fn old_stretch(db: &Db) -> Result<Vec<Token>> {
    let tokens = issue_many(&db.owner, 2).await?;
    db.owner.batch_execute(AGE).await?;
    seal(db).await;
    Ok(tokens)
}

async fn events_of(db: &Db, tokens: &[Token]) -> Result<i64> {
    let ids: Vec<Uuid> = tokens.iter().map(|token| token.id).collect();
    let sql = "select count(*) from tollgate.audit_log where token_id = any ($1)";
    Ok(db.owner.query_one(sql, &[&ids]).await?.get(0))
}

async fn log_is_whole(db: &Db) -> Result<bool> {
    value(&db.owner, "select whole from tollgate.verify_audit_log()").await
}

/// Until a task has begun and ended twice after this.
async fn runs_twice(address: std::net::SocketAddr, task: &str) -> Result<()> {
    let runs = format!("tollgated_task_runs_total{{task=\"{task}\"}}");
    let before = web::metrics(address).await?.get(&runs).copied().unwrap_or_default();
    web::eventually_measures(address, &runs, |count| count >= before + 2.0).await;
    Ok(())
}

const OFTEN: [&str; 2] = ["--purge-interval=100ms", "--seal-interval=100ms"];

fn cleanup(db: &Db, arguments: &[&str]) -> Result<Value> {
    let output = Tollgated::run(&db.url(), &[&["cleanup", "--json"], arguments].concat())?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(serde_json::from_slice(&output.stdout)?)
}

#[tokio::test]
async fn the_daemon_deletes_old_events_that_are_sealed_and_delivered_to_all_and_no_others() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "audit_retention").await?;
    let logged = old_stretch(&db).await?;
    db.operator.execute("select tollgate.open_subscription('slow')", &[]).await?;
    let unread = old_stretch(&db).await?;
    let new = issue_many(&db.owner, 2).await?;
    let before: i64 = value(&db.owner, "select count(*) from tollgate.audit_log").await?;

    let (daemon, address) = web::run(&db.url(), &[&OFTEN[..], &["--audit-retention=2days"]].concat()).await?;
    web::eventually_measures(address, "tollgated_purged_events_total", |count| count >= 2.0).await;
    runs_twice(address, "purge_audit").await?;
    assert_eq!(
        (events_of(&db, &logged).await?, events_of(&db, &unread).await?, events_of(&db, &new).await?),
        (0, 2, 2),
        "{}",
        daemon.log()
    );
    assert!(log_is_whole(&db).await?);

    let dropped = "select tollgate.drop_subscription('slow')";
    assert!(value::<bool>(&db.owner, dropped).await?);
    eventually_async(LONG, "the rest to be deleted", async || events_of(&db, &unread).await.unwrap() == 0)
        .await;
    runs_twice(address, "purge_audit").await?;
    assert_eq!(events_of(&db, &new).await?, 2);
    assert!(log_is_whole(&db).await?);
    // Its counter matches what is gone.
    let added = "select count(*) from tollgate.audit_log
                 where event in ('audit.purged', 'subscription.dropped') or event like 'epoch.%'";
    let added: i64 = value(&db.owner, added).await?;
    let left: i64 = value(&db.owner, "select count(*) from tollgate.audit_log").await?;
    let counted = web::metrics(address).await?["tollgated_purged_events_total"];
    assert_eq!(counted, (before + added - left) as f64);
    Ok(())
}

#[tokio::test]
async fn no_event_is_deleted_unasked() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "audit_kept").await?;
    let old = old_stretch(&db).await?;
    let (_daemon, address) = web::run(&db.url(), &OFTEN).await?;
    runs_twice(address, "purge").await?;
    let page = web::metrics(address).await?;
    assert!(!page.keys().any(|name| name.contains("purge_audit")), "{page:?}");
    assert_eq!(cleanup(&db, &["--retention=0s", "--usage-retention=0s"])?["purged_events"], json!(0));
    assert_eq!(cleanup(&db, &["--audit-retention=off"])?["purged_events"], json!(0));
    assert_eq!(events_of(&db, &old).await?, 2);
    Ok(())
}

#[tokio::test]
async fn cleanup_deletes_old_events_until_none_is_left() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "audit_cleanup").await?;
    let old = [old_stretch(&db).await?, old_stretch(&db).await?, old_stretch(&db).await?].concat();
    let new = issue_many(&db.owner, 2).await?;
    seal(&db).await;
    let before: i64 = value(&db.owner, "select count(*) from tollgate.audit_log").await?;
    assert_eq!(cleanup(&db, &["--audit-retention=4days"])?["purged_events"], json!(0));
    let answer = cleanup(&db, &["--audit-retention=2days", "--batch-size=1"])?;
    assert_eq!(answer["purged_events"], json!(before - 2));
    assert_eq!((events_of(&db, &old).await?, events_of(&db, &new).await?), (0, 2));
    assert!(log_is_whole(&db).await?);
    Ok(())
}

/// An attacker who changed the log would like it deleted.
#[tokio::test]
async fn a_log_that_was_tampered_with_is_not_deleted_and_blocks_no_other_deletion() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "audit_tampered").await?;
    let old = old_stretch(&db).await?;
    db.owner.batch_execute(&AGE.replace("'3 days' where at > now() - interval '1 day'", "'1 hour'")).await?;
    let ended = token(&db, "revoked_at = now() - interval '31 days'").await?;
    let (daemon, address) = web::run(&db.url(), &[&OFTEN[..], &["--audit-retention=2days"]].concat()).await?;
    web::eventually_measures(address, "tollgated_task_failures_total{task=\"purge_audit\"}", |count| {
        count >= 1.0
    })
    .await;
    eventually_async(LONG, "the ended token to go", async || {
        !remaining(&db).await.unwrap().contains(&ended.id)
    })
    .await;
    assert!(daemon.log().contains("the audit log was changed since it was sealed"), "{}", daemon.log());
    assert_eq!(events_of(&db, &old).await?, 2);
    Ok(())
}
