//! The audit log as an outbox: what is written to it, that readers miss nothing and get nothing twice, and what
//! listeners receive.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::common::{self, Shared, code, issue, issue_with, refused, revoke, value};
use crate::operator::{
    self, Batch, Cursor, Db, OPERATOR, advance, open, position, read, read_all, reads, set,
};
use anyhow::{Context as _, Result, ensure};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngSeed, TestCaseError, TestRunner};
use serde_json::{Value, json};
use tokio::sync::mpsc::UnboundedReceiver;
use tokio_postgres::error::SqlState;
use tokio_postgres::{AsyncMessage, Client, NoTls};
use tollgate_tests::{Cluster, DATABASE, Tollgated, eventually_async};
use uuid::Uuid;

static SHARED: Shared = Shared::new(&[]);

const LONG: Duration = Duration::from_secs(30);

/// An ordinary role that manages tokens and scopes.
const MANAGER: &str = "manager";

async fn with_manager(cluster: &Arc<Cluster>, name: &str) -> Result<(Db, Client)> {
    let db = Db::create(cluster, name).await?;
    let manager = manager(&db).await?;
    Ok((db, manager))
}

async fn manager(db: &Db) -> Result<Client> {
    db.cluster.execute(
        &db.name,
        "do $$ begin
             create role manager login;
         exception when duplicate_object or unique_violation then
             -- Another test was faster.
         end $$;
         grant execute on function
             tollgate.create_api_token, tollgate.revoke_api_token, tollgate.revoke_all_api_tokens,
             tollgate.revoke_presented_token, tollgate.define_scope, tollgate.drop_scope
         to manager",
    )?;
    db.session(MANAGER).await
}

/// The events since a cursor, which advances.
async fn news(db: &Db, cursor: &mut Cursor) -> Result<Vec<Value>> {
    read_all(&db.operator, cursor, 1000).await
}

/// Logs an event by a single insertion.
async fn log(client: &Client, name: &str) -> Result<()> {
    client.execute("select tollgate.define_scope($1, 'of the tests')", &[&name]).await?;
    Ok(())
}

/// The names of such events.
fn names(events: &[Value]) -> Vec<&str> {
    events.iter().filter_map(|event| event["detail"]["scope"].as_str()).collect()
}

// ---- What is written

#[tokio::test]
async fn each_change_is_recorded_with_who_made_it_and_to_what() -> Result<()> {
    let (db, manager) = with_manager(&SHARED.cluster()?, "recorded").await?;
    let mut cursor = position(&db.operator, None).await?;
    let mut recorded = async |event: &str| -> Result<Value> {
        let mut events = news(&db, &mut cursor).await?;
        ensure!(events.len() == 1, "{event}: {events:?}");
        let recorded = events.remove(0);
        assert_eq!(recorded["event"], json!(event));
        assert_eq!(recorded["actor"], json!(MANAGER));
        assert_eq!(recorded["client_addr"], Value::Null, "it came over the Unix socket");
        let keys: BTreeSet<&str> =
            recorded.as_object().context("an object")?.keys().map(String::as_str).collect();
        let documented =
            ["id", "epoch", "at", "event", "token_id", "user_id", "actor", "reason", "client_addr", "detail"];
        assert_eq!(keys, BTreeSet::from(documented));
        Ok(recorded)
    };
    let of = |id: Uuid| (json!(id), json!("ann"));

    manager.execute("select tollgate.define_scope('files:read', 'Read files')", &[]).await?;
    let event = recorded("scope.defined").await?;
    assert_eq!(event["detail"], json!({"scope": "files:read", "description": "Read files"}));
    assert_eq!((&event["token_id"], &event["user_id"]), (&Value::Null, &Value::Null));

    manager.execute("select tollgate.define_scope('files:read', 'Read all files')", &[]).await?;
    let event = recorded("scope.defined").await?;
    let changes = json!({"description": {"from": "Read files", "to": "Read all files"}});
    assert_eq!(
        event["detail"],
        json!({"scope": "files:read", "description": "Read all files", "changes": changes})
    );

    let arguments = "scopes => '{files:read}', expires_in => '1 day', allowed_ips => '{10.0.0.0/8}'";
    let first = issue_with(&manager, "ann", arguments).await?;
    let event = recorded("token.created").await?;
    assert_eq!((event["token_id"].clone(), event["user_id"].clone()), of(first.id));
    assert_eq!(event["detail"]["name"], json!("a test's"));
    assert_eq!(event["detail"]["scopes"], json!(["files:read"]));
    assert_eq!(event["detail"]["allowed_ips"], json!(["10.0.0.0/8"]));
    assert_eq!(event["detail"]["hint"], json!(&first.token[..8]));
    assert!(event["detail"]["expires_at"].is_string(), "{event}");

    let again = "select tollgate.revoke_api_token($1, 'ann', 'found in a repository')";
    assert!(manager.query_one(again, &[&first.id]).await?.get::<_, bool>(0));
    let event = recorded("token.revoked").await?;
    assert_eq!((event["token_id"].clone(), event["user_id"].clone()), of(first.id));
    assert_eq!((&event["reason"], &event["detail"]), (&json!("found in a repository"), &json!({})));

    let second = issue(&manager, "ann", &[]).await?;
    recorded("token.created").await?;
    manager.query_one("select tollgate.revoke_presented_token($1)", &[&second.token]).await?;
    let event = recorded("token.revoked").await?;
    assert_eq!((event["token_id"].clone(), event["user_id"].clone()), of(second.id));
    assert_eq!(event["reason"], Value::Null);

    manager.execute("select tollgate.drop_scope('files:read')", &[]).await?;
    assert_eq!(
        recorded("scope.dropped").await?["detail"],
        json!({"scope": "files:read", "description": "Read all files"})
    );
    Ok(())
}

#[tokio::test]
async fn revoking_all_of_a_user_records_each_token() -> Result<()> {
    let (db, manager) = with_manager(&SHARED.cluster()?, "recordall").await?;
    let mut ids = BTreeSet::new();
    for _ in 0..3 {
        ids.insert(issue(&manager, "ann", &[]).await?.id.to_string());
    }
    issue(&manager, "bob", &[]).await?;
    let gone = issue(&manager, "ann", &[]).await?;
    assert!(revoke(&manager, gone.id).await?);
    let mut cursor = position(&db.operator, None).await?;

    let row = manager.query_one("select tollgate.revoke_all_api_tokens('ann', 'left')", &[]).await?;
    assert_eq!(row.get::<_, i64>(0), 3);
    let events = news(&db, &mut cursor).await?;
    let received: BTreeSet<String> =
        events.iter().filter_map(|event| event["token_id"].as_str().map(str::to_owned)).collect();
    assert_eq!((events.len(), received), (3, ids));
    for event in events {
        assert_eq!(
            (&event["event"], &event["user_id"], &event["reason"]),
            (&json!("token.revoked"), &json!("ann"), &json!("left"))
        );
    }
    Ok(())
}

#[tokio::test]
async fn calls_that_change_nothing_are_not_recorded() -> Result<()> {
    let (db, manager) = with_manager(&SHARED.cluster()?, "unrecorded").await?;
    let token = issue(&manager, "ann", &[]).await?;
    let kept = issue(&manager, "ann", &["posts:read"]).await?;
    assert!(revoke(&manager, token.id).await?);
    let mut cursor = position(&db.operator, None).await?;

    assert!(!revoke(&manager, token.id).await?, "revoked already");
    assert!(!revoke(&manager, Uuid::new_v4()).await?, "unknown");
    let not_bobs = "select tollgate.revoke_api_token($1, 'bob')";
    assert!(!manager.query_one(not_bobs, &[&kept.id]).await?.get::<_, bool>(0));
    let presented = "select tollgate.revoke_presented_token($1)";
    assert!(!manager.query_one(presented, &[&token.token]).await?.get::<_, bool>(0));
    manager.execute("select tollgate.revoke_all_api_tokens('unknown')", &[]).await?;
    manager.execute("select tollgate.define_scope('posts:read', 'of the tests')", &[]).await?;
    let in_use = manager.execute("select tollgate.drop_scope('posts:read')", &[]).await;
    refused(in_use, &SqlState::DEPENDENT_OBJECTS_STILL_EXIST);
    let long = "x".repeat(1001);
    let reason = "select tollgate.revoke_api_token($1, null, $2)";
    let error =
        refused(manager.query_one(reason, &[&kept.id, &long]).await, &SqlState::INVALID_PARAMETER_VALUE);
    assert!(error.detail().is_some_and(|detail| detail.contains("reason")), "{error:?}");
    db.web.query_one("select code from tollgate.verify_api_token($1)", &[&kept.token]).await?;
    assert_eq!(news(&db, &mut cursor).await?, Vec::<Value>::new());
    Ok(())
}

#[tokio::test]
async fn the_actor_is_the_role_that_acts_and_the_address_the_one_it_connects_from() -> Result<()> {
    let (db, manager) = with_manager(&SHARED.cluster()?, "actors").await?;
    db.owner
        .batch_execute(
            "create role deputy_of_actors;
             grant deputy_of_actors to manager;
             grant execute on function tollgate.create_api_token to deputy_of_actors;
             create schema app;
             grant usage on schema app to public;
             create function app.issue() returns uuid language sql security definer
                 set search_path = pg_catalog, pg_temp
                 as $$ select id from tollgate.create_api_token('ann', 'by a function') $$",
        )
        .await?;
    let mut cursor = position(&db.operator, None).await?;
    let mut actor = async || -> Result<Value> {
        let events = news(&db, &mut cursor).await?;
        ensure!(events.len() == 1, "{events:?}");
        Ok(events[0].clone())
    };

    issue(&db.owner, "ann", &[]).await?;
    assert_eq!(actor().await?["actor"], json!("postgres"));
    // The function acts for the application's role, not for its owner.
    db.web.query_one("select app.issue()", &[]).await?;
    assert_eq!(actor().await?["actor"], json!("web"));
    manager.batch_execute("set role deputy_of_actors").await?;
    issue(&manager, "ann", &[]).await?;
    assert_eq!(actor().await?["actor"], json!("deputy_of_actors"));
    manager.batch_execute("reset role").await?;

    let (remote, connection) = tokio_postgres::connect(&db.cluster.url(MANAGER, &db.name), NoTls).await?;
    tokio::spawn(connection);
    issue(&remote, "ann", &[]).await?;
    let event = actor().await?;
    assert_eq!((&event["actor"], &event["client_addr"]), (&json!(MANAGER), &json!("127.0.0.1")));
    let created_by: String =
        value(&db.owner, "select created_by from tollgate.tokens order by created_at desc limit 1").await?;
    assert_eq!(created_by, MANAGER);
    Ok(())
}

#[tokio::test]
async fn no_event_holds_a_token_or_its_digest() -> Result<()> {
    let (db, manager) = with_manager(&SHARED.cluster()?, "secretless").await?;
    let mut secrets = Vec::new();
    for _ in 0..3 {
        let token = issue(&manager, "ann", &["posts:read"]).await?;
        secrets.push(token.token[8..].to_owned());
        let digest = tollgate_core::token::digest(token.token.as_bytes());
        secrets.push(digest.iter().map(|byte| format!("{byte:02x}")).collect());
        manager.query_one("select tollgate.revoke_presented_token($1, 'found')", &[&token.token]).await?;
    }
    let log: String =
        value(&db.owner, "select string_agg(to_jsonb(a)::text, ' ') from tollgate.audit_log a").await?;
    assert!(log.matches("token.revoked").count() >= 3, "{log}");
    for secret in secrets {
        assert!(!log.contains(&secret), "a secret in {log}");
    }
    Ok(())
}

#[tokio::test]
async fn the_log_is_append_only_even_for_its_owner() -> Result<()> {
    let (db, _) = with_manager(&SHARED.cluster()?, "appendonly").await?;
    let before: i64 = value(&db.owner, "select count(*) from tollgate.audit_log").await?;
    assert!(before > 0);
    for change in [
        "update tollgate.audit_log set event = 'nothing'",
        "delete from tollgate.audit_log",
        "truncate tollgate.audit_log",
        "update tollgate.audit_epochs set timeline = 7",
        "truncate tollgate.audit_seals",
        "set session_replication_role = replica; delete from tollgate.audit_log",
    ] {
        refused(db.owner.batch_execute(change).await, &SqlState::INSUFFICIENT_PRIVILEGE);
    }
    assert_eq!(value::<i64>(&db.owner, "select count(*) from tollgate.audit_log").await?, before);
    Ok(())
}

#[tokio::test]
async fn rolled_back_changes_are_neither_recorded_nor_notified() -> Result<()> {
    let (db, manager) = with_manager(&SHARED.cluster()?, "undone").await?;
    let token = issue(&manager, "ann", &[]).await?;
    let mut ears = Ears::listen(&db).await?;
    let mut cursor = position(&db.operator, None).await?;

    manager.batch_execute("begin").await?;
    assert!(revoke(&manager, token.id).await?);
    issue(&manager, "ann", &[]).await?;
    manager.batch_execute("rollback").await?;
    manager.batch_execute("begin; savepoint s").await?;
    assert!(revoke(&manager, token.id).await?);
    manager.batch_execute("rollback to s").await?;
    log(&manager, "kept:one").await?;
    manager.batch_execute("commit").await?;

    assert_eq!(names(&news(&db, &mut cursor).await?), ["kept:one"]);
    assert_eq!(ears.heard().await?, Vec::<Value>::new());
    assert!(revoke(&manager, token.id).await?);
    assert_eq!(ears.heard().await?.len(), 1);
    Ok(())
}

// ---- Notifications

/// A session that listens for events.
struct Ears {
    speaker: Client,
    messages: UnboundedReceiver<AsyncMessage>,
}

impl Ears {
    /// As a role without any of our privileges.
    async fn listen(db: &Db) -> Result<Self> {
        let (speaker, messages) = db.cluster.listen("web", &db.name).await?;
        speaker.batch_execute("listen tollgate_events").await?;
        Ok(Self { speaker, messages })
    }

    /// All notifications up to now, unparsed. One of our own marks the end, since notifications keep their order.
    async fn payloads(&mut self) -> Result<Vec<String>> {
        self.speaker.batch_execute("notify tollgate_events, 'end'").await?;
        let mut payloads = Vec::new();
        loop {
            let message = tokio::time::timeout(LONG, self.messages.recv()).await?;
            if let AsyncMessage::Notification(notification) = message.context("the connection lives")? {
                if notification.payload() == "end" {
                    return Ok(payloads);
                }
                payloads.push(notification.payload().to_owned());
            }
        }
    }

    async fn heard(&mut self) -> Result<Vec<Value>> {
        let payloads = self.payloads().await?;
        Ok(payloads.iter().map(|payload| serde_json::from_str(payload)).collect::<Result<_, _>>()?)
    }
}

#[tokio::test]
async fn listeners_are_notified_of_lost_access_and_of_nothing_else() -> Result<()> {
    let (db, manager) = with_manager(&SHARED.cluster()?, "heard").await?;
    let mut ears = Ears::listen(&db).await?;
    let expire = "select tollgate.expire_tokens()";

    let token = issue(&manager, "ann", &[]).await?;
    log(&manager, "files:read").await?;
    manager.execute("select tollgate.drop_scope('files:read')", &[]).await?;
    db.web.query_one("select code from tollgate.verify_api_token($1)", &[&token.token]).await?;
    db.operator.execute(expire, &[]).await?;
    assert_eq!(ears.heard().await?, Vec::<Value>::new());

    manager.execute("select tollgate.revoke_api_token($1, null, 'leaked')", &[&token.id]).await?;
    assert_eq!(
        ears.heard().await?,
        [json!({"event": "token.revoked", "token_id": token.id, "user_id": "ann", "reason": "leaked"})]
    );
    let token = issue(&manager, "ann", &[]).await?;
    manager.execute("select tollgate.revoke_presented_token($1)", &[&token.token]).await?;
    assert_eq!(
        ears.heard().await?,
        [json!({"event": "token.revoked", "token_id": token.id, "user_id": "ann", "reason": null})]
    );

    for _ in 0..3 {
        issue(&manager, "bob", &[]).await?;
    }
    manager.execute("select tollgate.revoke_all_api_tokens('bob', 'left')", &[]).await?;
    assert_eq!(ears.heard().await?, [json!({"event": "token.revoked", "user_id": "bob", "count": 3})]);
    manager.execute("select tollgate.revoke_all_api_tokens('bob')", &[]).await?;
    assert_eq!(ears.heard().await?, Vec::<Value>::new());

    let expiring = issue(&manager, "ann", &[]).await?;
    set(&db.owner, expiring.id, "expires_at = now()").await?;
    db.operator.execute(expire, &[]).await?;
    assert_eq!(
        ears.heard().await?,
        [json!({"event": "token.expired", "token_id": expiring.id, "user_id": "ann", "reason": null})]
    );
    for user in ["ann", "bob"] {
        let expiring = issue(&manager, user, &[]).await?;
        set(&db.owner, expiring.id, "expires_at = now()").await?;
    }
    db.operator.execute(expire, &[]).await?;
    assert_eq!(ears.heard().await?, [json!({"event": "token.expired", "user_id": null, "count": 2})]);

    // It ended long ago: access is not lost.
    db.owner
        .execute("update tollgate.api_tokens set revoked_at = revoked_at - interval '1 year'", &[])
        .await?;
    let purged: i64 = value(&db.operator, "select tollgate.purge_tokens()").await?;
    assert!(purged >= 5, "{purged}");
    assert_eq!(ears.heard().await?, Vec::<Value>::new());
    Ok(())
}

#[tokio::test]
async fn a_notification_fits_whatever_the_user_and_the_reason() -> Result<()> {
    let (db, manager) = with_manager(&SHARED.cluster()?, "fitting").await?;
    let mut ears = Ears::listen(&db).await?;
    let mut cursor = position(&db.operator, None).await?;
    // Control characters take six bytes in JSON, the key takes four.
    for (user, character) in [("\u{1F511}", "\u{1F511}"), ("\u{1}", "\u{1}"), ("\"", "\\"), ("g", "\u{7f}")] {
        let (user, reason) = (user.repeat(255), character.repeat(1000));
        let token = issue(&manager, &user, &[]).await?;
        manager.execute("select tollgate.revoke_api_token($1, null, $2)", &[&token.id, &reason]).await?;
        let payloads = ears.payloads().await?;
        assert_eq!(payloads.len(), 1);
        assert!(payloads[0].len() < 8000, "{} bytes", payloads[0].len());
        let payload: Value = serde_json::from_str(&payloads[0])?;
        assert_eq!((&payload["token_id"], &payload["user_id"]), (&json!(token.id), &json!(user)));
        let received = payload["reason"].as_str().context("a reason")?;
        let length = received.chars().count();
        assert!(reason.starts_with(received) && (100..500).contains(&length), "cut to {length} characters");

        issue(&manager, &user, &[]).await?;
        manager.execute("select tollgate.revoke_all_api_tokens($1, $2)", &[&user, &reason]).await?;
        assert_eq!(ears.heard().await?, [json!({"event": "token.revoked", "user_id": user, "count": 1})]);
        // The log has all of it.
        let events = news(&db, &mut cursor).await?;
        let reasons: Vec<&Value> = events
            .iter()
            .filter(|event| event["event"] == "token.revoked")
            .map(|event| &event["reason"])
            .collect();
        assert_eq!(reasons, [&json!(reason), &json!(reason)]);
    }
    Ok(())
}

// ---- Reading from a cursor

#[tokio::test]
async fn a_position_is_from_now_from_the_beginning_or_after_an_event() -> Result<()> {
    let (db, manager) = with_manager(&SHARED.cluster()?, "positions").await?;
    log(&manager, "p:1").await?;
    log(&manager, "p:2").await?;
    let mut from_now = position(&db.operator, None).await?;
    let mut from_start = position(&db.operator, Some(0)).await?;
    let everything: Vec<i64> = db
        .owner
        .query("select id from tollgate.audit_log order by xid, id", &[])
        .await?
        .iter()
        .map(|row| row.get(0))
        .collect();
    let two_ago = everything[everything.len() - 2];
    let mut after = position(&db.operator, Some(two_ago)).await?;
    let mut after_all = position(&db.operator, everything.last().copied()).await?;
    let mut beyond = position(&db.operator, Some(i64::MAX)).await?;
    let mut below = position(&db.operator, Some(-10_000)).await?;
    assert!(position(&db.operator, Some(i64::MIN)).await.is_err(), "a distance from the end has a bound");

    let all = news(&db, &mut from_start).await?;
    assert_eq!(all.iter().filter_map(|event| event["id"].as_i64()).collect::<Vec<_>>(), everything);
    assert_eq!(news(&db, &mut below).await?, all);
    assert_eq!(names(&news(&db, &mut after).await?), ["p:2"]);
    log(&manager, "p:3").await?;
    for cursor in [&mut from_now, &mut from_start, &mut after, &mut after_all, &mut beyond, &mut below] {
        assert_eq!(names(&news(&db, cursor).await?), ["p:3"]);
        assert_eq!(news(&db, cursor).await?, Vec::<Value>::new());
    }
    Ok(())
}

#[tokio::test]
async fn late_commits_are_delivered_and_delay_nothing() -> Result<()> {
    let (db, manager) = with_manager(&SHARED.cluster()?, "late").await?;
    let slow = db.session(MANAGER).await?;
    slow.batch_execute("begin").await?;
    log(&slow, "late:slow").await?;
    let mut cursor = position(&db.operator, None).await?;
    for n in 0..20 {
        log(&manager, &format!("late:{n}")).await?;
        assert_eq!(names(&news(&db, &mut cursor).await?), [format!("late:{n}")]);
    }
    assert!(!cursor.is_at_rest() && cursor.0.len() < 200, "{cursor:?}");

    slow.batch_execute("commit").await?;
    assert_eq!(names(&news(&db, &mut cursor).await?), ["late:slow"]);
    eventually_async(LONG, "the open transaction to be forgotten", async || {
        assert_eq!(news(&db, &mut cursor).await.unwrap(), Vec::<Value>::new());
        cursor.is_at_rest()
    })
    .await;
    log(&manager, "late:after").await?;
    assert_eq!(names(&news(&db, &mut cursor).await?), ["late:after"]);
    Ok(())
}

#[tokio::test]
async fn a_position_misses_nothing_that_commits_after_it_was_taken() -> Result<()> {
    let (db, manager) = with_manager(&SHARED.cluster()?, "taken").await?;
    let [lower, higher, prepared] =
        [db.session(MANAGER).await?, db.session(MANAGER).await?, db.session(MANAGER).await?];
    // It has an id below that of `taken:now`, an older transaction, and commits after the position was taken.
    lower.batch_execute("begin").await?;
    log(&lower, "taken:lower").await?;
    // It has an older transaction, but an id above it.
    higher.batch_execute("begin; savepoint s").await?;
    log(&higher, "taken:undone").await?;
    higher.batch_execute("rollback to s").await?;
    prepared.batch_execute("begin").await?;
    log(&prepared, "taken:prepared").await?;
    prepared.batch_execute("prepare transaction 'taken'").await?;
    log(&manager, "taken:now").await?;
    let now: i64 = value(&db.owner, "select max(id) from tollgate.audit_log").await?;
    log(&higher, "taken:higher").await?;

    let mut cursors = [position(&db.operator, None).await?, position(&db.operator, Some(now)).await?];
    lower.batch_execute("commit").await?;
    higher.batch_execute("commit").await?;
    for cursor in &mut cursors {
        assert_eq!(names(&news(&db, cursor).await?), ["taken:lower", "taken:higher"]);
    }
    prepared.batch_execute("commit prepared 'taken'").await?;
    for cursor in &mut cursors {
        assert_eq!(names(&news(&db, cursor).await?), ["taken:prepared"]);
    }
    // Taken only now, it includes the later id although its transaction is the older one.
    let mut after = position(&db.operator, Some(now)).await?;
    assert_eq!(names(&news(&db, &mut after).await?), ["taken:higher"]);
    Ok(())
}

#[tokio::test]
async fn batches_of_any_size_go_through_a_transaction_of_many_events() -> Result<()> {
    let (db, manager) = with_manager(&SHARED.cluster()?, "batches").await?;
    let start = position(&db.operator, None).await?;
    let open = db.session(MANAGER).await?;
    open.batch_execute("begin").await?;
    log(&open, "batches:open").await?;
    let mut expected = Vec::new();
    manager.batch_execute("begin").await?;
    for n in 0..12 {
        log(&manager, &format!("batches:{n:02}")).await?;
        expected.push(format!("batches:{n:02}"));
    }
    manager.batch_execute("commit").await?;
    for size in 1..=14 {
        let mut cursor = start.clone();
        let events = read_all(&db.operator, &mut cursor, size).await?;
        assert_eq!(names(&events), expected, "in batches of {size}");
    }
    // Not a batch at all: the minimum is one.
    for size in [0, -1, i32::MIN] {
        let error = read(&db.operator, &start, size).await.err().map(|error| format!("{error:?}"));
        assert!(error.as_ref().is_some_and(|error| error.contains("max_events")), "{size}: {error:?}");
    }
    // A batch that is exactly full knows that it was the last.
    for size in [12, 13, i32::MAX] {
        assert!(read(&db.operator, &start, size).await?.caught_up, "{size}");
    }
    assert!(!read(&db.operator, &start, 11).await?.caught_up);
    Ok(())
}

/// A lost cursor must not silently become one from which everything was read.
#[tokio::test]
async fn a_cursor_of_nulls_does_not_skip_events() -> Result<()> {
    let (db, manager) = with_manager(&SHARED.cluster()?, "nullcursor").await?;
    let start = position(&db.operator, None).await?;
    log(&manager, "null:1").await?;
    // Its snapshot lists the running transactions, and may contain commas.
    let epoch = start.0.trim_start_matches('(').split(',').next().context("an epoch")?;
    let fields = [epoch, "10:10:", ",,,,"];
    for (case, cursor) in [
        ("nothing", None),
        ("no field", Some("(,,,,,,)".to_owned())),
        ("no epoch", Some(format!("(,{},{})", fields[1], fields[2]))),
        ("no snapshot", Some(format!("({},,{})", fields[0], fields[2]))),
        ("half a batch", Some(format!("({},{},{},1:1:,,,)", fields[0], fields[1], fields[0]))),
        (
            "a long one",
            Some(format!(
                "({},\"1:1000000:{}\",,,,,)",
                fields[0],
                (1..9000).map(|xid| xid.to_string()).collect::<Vec<_>>().join(",")
            )),
        ),
    ] {
        let read = db
            .operator
            .query_one("select tollgate.read_events($1::text::tollgate.event_cursor)", &[&cursor])
            .await;
        let error = refused(read, &SqlState::INVALID_PARAMETER_VALUE);
        assert!(error.detail().is_some_and(|detail| detail.contains("cursor")), "{case}: {error:?}");
    }
    assert_eq!(names(&read(&db.operator, &start, 10).await?.events), ["null:1"]);
    Ok(())
}

/// A session with an older snapshot, or a standby that lags, may read from a newer cursor.
#[tokio::test]
async fn an_older_snapshot_does_not_move_a_cursor_back() -> Result<()> {
    let (db, manager) = with_manager(&SHARED.cluster()?, "backwards").await?;
    let mut cursor = position(&db.operator, None).await?;
    let old = db.session(OPERATOR).await?;
    old.batch_execute("begin isolation level repeatable read; select 1").await?;
    log(&manager, "back:1").await?;
    log(&manager, "back:2").await?;
    assert_eq!(names(&news(&db, &mut cursor).await?), ["back:1", "back:2"]);

    let batch = read(&old, &cursor, 10).await?;
    assert_eq!(batch.events, Vec::<Value>::new());
    let mut next = batch.next;
    assert_eq!(names(&news(&db, &mut next).await?), Vec::<&str>::new(), "received twice");
    Ok(())
}

#[tokio::test]
async fn a_standby_can_be_read_from() -> Result<()> {
    let cluster = Arc::new(common::start(Cluster::builder())?);
    let db = Db::only(&cluster).await?;
    let standby = cluster.standby()?;
    standby.catch_up_with(&cluster)?;
    let operator = standby.connect(OPERATOR, DATABASE).await?;
    let mut cursor = position(&operator, None).await?;
    let open = db.session("postgres").await?;
    open.batch_execute("begin").await?;
    log(&open, "standby:open").await?;
    log(&db.owner, "standby:1").await?;
    standby.catch_up_with(&cluster)?;
    // A standby does not know what runs on the primary, so it waits for everything that began since.
    assert_eq!(read_all(&operator, &mut cursor, 10).await?, Vec::<Value>::new());
    open.batch_execute("commit").await?;
    standby.catch_up_with(&cluster)?;
    assert_eq!(names(&read_all(&operator, &mut cursor, 10).await?), ["standby:open", "standby:1"]);
    assert_eq!(read_all(&operator, &mut cursor, 10).await?, Vec::<Value>::new());
    Ok(())
}

#[tokio::test]
async fn a_reader_at_the_end_of_a_long_log_reads_none_of_it_again() -> Result<()> {
    let (db, manager) = with_manager(&SHARED.cluster()?, "longlog").await?;
    db.owner
        .batch_execute(
            "insert into tollgate.audit_log (event) select 'test' from generate_series(1, 50000);
             analyze tollgate.audit_log",
        )
        .await?;
    let mut cursor = position(&db.operator, None).await?;
    for round in 0..8 {
        log(&manager, &format!("long:{round}")).await?;
        let call = format!("select * from tollgate.read_events('{}')", cursor.0);
        let reads = reads(&db.operator, "audit_log", "audit_log_position", &call).await?;
        assert_eq!(reads.scanned, 0, "{reads:?}");
        assert!(reads.scans_of_index > 0 && reads.fetched < 20, "{reads:?}");
        assert_eq!(news(&db, &mut cursor).await?.len(), 1);
    }
    Ok(())
}

/// Writes a number of events in one statement.
async fn log_rows(client: &Client, count: usize) -> Result<()> {
    let rows =
        format!("insert into tollgate.audit_log (event) select 'test' from generate_series(1, {count})");
    Ok(client.batch_execute(&rows).await?)
}

/// The last page of one transaction's events costs as much as the first one, however many precede it; also without
/// statistics, and while another transaction is open.
#[tokio::test]
async fn a_page_costs_the_same_wherever_in_a_transaction_it_is() -> Result<()> {
    let (db, manager) = with_manager(&SHARED.cluster()?, "pages").await?;
    let open = db.session(MANAGER).await?;
    open.batch_execute("begin").await?;
    log(&open, "pages:open").await?;
    let start = position(&db.operator, None).await?;
    log_rows(&db.owner, 20_000).await?;
    for (case, mut cursor) in
        [("from now", start), ("from the beginning", position(&db.operator, Some(0)).await?)]
    {
        // The first page determines where the batch begins and ends.
        let mut batch = read(&db.operator, &cursor, 500).await?;
        let mut read_so_far = batch.events.len();
        while !batch.caught_up && batch.events.len() == 500 {
            cursor = batch.next.clone();
            ensure!(cursor.0.len() < 300, "{cursor:?}");
            let call = format!("select tollgate.read_events('{}', 500)", cursor.0);
            let reads = reads(&db.operator, "audit_log", "audit_log_pkey", &call).await?;
            assert!(reads.scanned == 0 && reads.fetched < 2100, "{case}, after {read_so_far}: {reads:?}");
            batch = read(&db.operator, &cursor, 500).await?;
            read_so_far += batch.events.len();
        }
        assert!(read_so_far >= 20_000, "{case}: {read_so_far}");
    }
    log(&manager, "pages:last").await?;
    Ok(())
}

// ---- Events that our functions do not write, or very many

/// Writes an event as only a superuser can, and returns its id.
async fn by_hand(owner: &Client, event: &str, user: &str, detail: &str) -> Result<i64> {
    let insert = format!(
        "set max_stack_depth = '6MB'; insert into tollgate.audit_log (event, user_id, detail) values ({event}, {user}, {detail})"
    );
    owner.batch_execute(&insert).await.with_context(|| insert.clone())?;
    value(owner, "select max(id) from tollgate.audit_log").await
}

const LARGE: &str = "jsonb_build_object('k', repeat('x', 20000000))";
/// Small when stored, but longer than a text can be.
const MANY_DIGITS: &str = "('{\"k\": [' || repeat('1e131071,', 10000) || '1]}')::jsonb";
const DEEP: &str = "(repeat('[', 6000) || repeat(']', 6000))::jsonb";

#[tokio::test]
async fn events_that_a_superuser_wrote_by_hand_are_delivered_once_and_so_are_later_ones() -> Result<()> {
    let (db, manager) = with_manager(&SHARED.cluster()?, "by_hand").await?;
    let start = position(&db.operator, None).await?;
    let token = issue(&db.owner, "ann", &[]).await?;
    let mut written = BTreeMap::new();
    for (event, user, detail, is_readable) in [
        (
            "'token.updated'",
            "'ann'",
            "'{\"n\": 1e400, \"m\": 12345678901234567890123, \"reason\": [1.10]}'",
            true,
        ),
        ("'token.updated'", "null", "'5'", true),
        ("'token.updated'", "'ann'", "'[\"reason\", null]'", true),
        ("'odd'", "'ann'", "(repeat('[', 64) || repeat(']', 64))::jsonb", true),
        ("'odd'", "'ann'", "(repeat('[', 65) || repeat(']', 65))::jsonb", false),
        ("'token.revoked'", "'ann'", DEEP, false),
        ("'token.revoked'", "'ann'", LARGE, false),
        ("'token.revoked'", "'ann'", MANY_DIGITS, false),
        ("repeat('x', 201)", "'ann'", "'{}'", false),
        ("'odd'", "repeat('x', 2000000)", "'{}'", false),
    ] {
        written.insert(by_hand(&db.owner, event, user, detail).await?, (event, detail, is_readable));
    }
    revoke(&db.owner, token.id).await?;
    log(&manager, "by_hand:last").await?;
    for batch_size in [1, 3, 1000] {
        let mut cursor = start.clone();
        // The JSON parser of the tests only has 64-bit numbers.
        let mut seen = BTreeMap::new();
        loop {
            let query = "
                select (e.event ->> 'id')::bigint, e.event ->> 'event', e.event ->> 'user_id', (e.event -> 'detail')::text, (e.event -> 'reason')::text,
                       b.next::text, b.caught_up
                  from tollgate.read_events($1::text::tollgate.event_cursor, $2) b left join jsonb_array_elements(b.events) e (event) on true";
            let rows = db.operator.query(query, &[&cursor.0, &batch_size]).await?;
            for row in &rows {
                if let Some(id) = row.get::<_, Option<i64>>(0) {
                    let event: (String, Option<String>, String, String) =
                        (row.get(1), row.get(2), row.get(3), row.get(4));
                    assert!(seen.insert(id, event).is_none(), "{id} twice");
                }
            }
            cursor = Cursor(rows[0].get(5));
            if rows[0].get(6) {
                break;
            }
        }
        for (id, (event, detail, is_readable)) in &written {
            let (received, user, read_detail, reason) = &seen[id];
            assert_eq!(read_detail.contains("unreadable"), !is_readable, "{event} {detail}: {read_detail}");
            assert!(
                received.len() <= 200 && user.as_ref().is_none_or(|user| user == "ann"),
                "{received} {user:?}"
            );
            if event.starts_with('\'') {
                assert_eq!(format!("'{received}'"), *event);
            }
            if detail.contains("1e400") {
                let digits = format!("1{}", "0".repeat(400));
                assert_eq!(*read_detail, format!("{{\"m\": 12345678901234567890123, \"n\": {digits}}}"));
                assert_eq!(reason, "[1.10]");
            } else {
                assert_eq!(reason, "null");
            }
            if ["'5'", "'[\"reason\", null]'"].contains(detail) {
                assert_eq!(format!("'{read_detail}'"), *detail);
            }
        }
        // Issued, revoked, and a scope.
        assert_eq!(seen.len(), written.len() + 3, "{seen:?}");
    }

    let url = db.url();
    let ids: Vec<i64> = value(&db.owner, "select array_agg(id order by id) from tollgate.audit_log").await?;
    let tail = Tollgated::run(&url, &["tail", "--since=0"])?;
    let text = String::from_utf8_lossy(&tail.stdout);
    let printed: Vec<i64> = text
        .lines()
        .filter_map(|line| line.strip_prefix("{\"id\":")?.split(',').next()?.parse().ok())
        .collect();
    assert_eq!(printed, ids, "{}", String::from_utf8_lossy(&tail.stderr));
    assert!(text.contains(&format!("\"n\": 1{}", "0".repeat(400))), "as it was written");

    db.operator.batch_execute("select tollgate.open_subscription('log')").await?;
    let back = "update tollgate.subscriptions set place = tollgate.event_position(0) where name = 'log'";
    db.owner.batch_execute(back).await?;
    let daemon = Tollgated::spawn(&url, &["run", "--log-format=json", "--publish-interval=100ms"])?;
    eventually_async(LONG, "the daemon to log the last event", async || {
        daemon.log().contains("by_hand:last")
    })
    .await;
    for id in ids {
        let line = format!("\"id\":{id},");
        assert_eq!(daemon.log().matches(&line).count(), 1, "{line}");
    }
    Ok(())
}

/// Whatever the number of events, and whatever their sizes.
#[tokio::test]
async fn a_page_has_at_most_four_megabytes_and_always_an_event() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "page_bytes").await?;
    let mut cursor = position(&db.operator, None).await?;
    let large = "insert into tollgate.audit_log (event, detail)
                 select 'large', jsonb_build_object('n', n, 'k', repeat('\"', 490000)) from generate_series(1, 11) n";
    db.owner.batch_execute(large).await?;
    let mut sizes = Vec::new();
    let mut received = 0;
    loop {
        let query =
            "select octet_length(b.events::text), jsonb_array_length(b.events), b.next::text, b.caught_up
                       from tollgate.read_events($1::text::tollgate.event_cursor, 1000) b";
        let row = db.operator.query_one(query, &[&cursor.0]).await?;
        sizes.push(row.get::<_, i32>(0));
        received += row.get::<_, i32>(1);
        cursor = Cursor(row.get(2));
        if row.get(3) {
            break;
        }
    }
    assert_eq!(received, 11);
    assert!(sizes.iter().all(|bytes| *bytes <= 4_000_000) && sizes.len() >= 3, "{sizes:?}");
    log_rows(&db.owner, 5000).await?;
    let batch = read(&db.operator, &cursor, i32::MAX).await?;
    assert!((1..=2000).contains(&batch.events.len()), "{}", batch.events.len());
    assert_eq!(batch.events.len() + read_all(&db.operator, &mut batch.next.clone(), 3000).await?.len(), 5000);
    Ok(())
}

/// The size computed from the stored bytes is that of PostgreSQL's output.
#[tokio::test]
async fn the_size_of_json_is_that_of_its_text() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "json_size").await?;
    let values = "
        select j::jsonb from (values ('1'), ('\"x\"'), ('null'), ('true'), ('false'), ('{}'), ('[]'), ('[[], {}, [{}]]'), ('\"\"'),
            ('{\"a\": 1, \"bb\": [true, false, null, \"é😀\"], \"\": {\"x\": [1, 2, 3]}}'),
            ('\"\\u0001\\u001f\\b\\f\\n\\r\\t\\\\ \\\" \\u007f\"')) v (j)
        union all select to_jsonb(n) from (select sign * mantissa * 10::numeric ^ power as n
            from unnest('{1, -1}'::numeric[]) sign, unnest('{0, 0.0, 1, 9, 10, 9999, 10000, 12345.678, 99999999.99999999, 0.1, 1.10}'::numeric[]) mantissa,
                 unnest('{-20, -5, -4, -1, 0, 1, 3, 4, 5, 40}'::numeric[]) power) n
        union all select jsonb_build_array(n, trim_scale(n), 'x', n) from unnest('{0.00000, 1e-100, 123.4500, 1e400, 5e131071, 1e-16383}'::numeric[]) n
        union all select jsonb_agg(g) from generate_series(1, 1000) g
        union all select jsonb_object_agg(g, repeat('k', g)) from generate_series(1, 200) g
        union all select jsonb_agg(jsonb_build_object('n', g, 'l', array[g, -g, g * 1000007])) from generate_series(1, 100) g";
    let wrong: Vec<String> = value(
        &db.owner,
        &format!(
            "select coalesce(array_agg(left(j::text, 80)), '{{}}') from ({values}) v (j)
             where tollgate.json_text_size(j, 1000000, 64) is distinct from octet_length(j::text)
                or tollgate.json_text_size(j, octet_length(j::text), 64) is null
                or tollgate.json_text_size(j, octet_length(j::text) - 1, 64) is not null"
        ),
    )
    .await?;
    assert!(wrong.is_empty(), "{wrong:?}");
    let depths: Vec<bool> = value(
        &db.owner,
        "select array_agg(tollgate.json_text_size((repeat('[', n) || repeat(']', n))::jsonb, 1000, 8) is not null order by n)
           from generate_series(1, 10) n",
    )
    .await?;
    assert_eq!(depths, (1..=10).map(|depth| depth <= 8).collect::<Vec<_>>());
    Ok(())
}

// ---- Cost

/// Events that were read in between are not read again.
#[tokio::test]
async fn an_early_id_that_commits_late_costs_one_look() -> Result<()> {
    let (db, manager) = with_manager(&SHARED.cluster()?, "early").await?;
    let mut cursor = position(&db.operator, None).await?;
    let slow = db.session(MANAGER).await?;
    slow.batch_execute("begin").await?;
    log(&slow, "early:first").await?;
    log_rows(&db.owner, 20_000).await?;
    assert_eq!(read_all(&db.operator, &mut cursor, 1000).await?.len(), 20_000);
    log(&slow, "early:second").await?;
    slow.batch_execute("commit").await?;
    let call = format!("select tollgate.read_events('{}')", cursor.0);
    let reads = reads(&db.operator, "audit_log", "audit_log_position", &call).await?;
    assert!(reads.scanned == 0 && reads.fetched < 50, "{reads:?}");
    log(&manager, "early:last").await?;
    assert_eq!(names(&news(&db, &mut cursor).await?), ["early:first", "early:second", "early:last"]);
    Ok(())
}

/// A session with an older snapshot does not see all of a batch, and must not go past it.
#[tokio::test]
async fn the_rest_of_a_batch_waits_for_a_reader_that_sees_it() -> Result<()> {
    let (db, manager) = with_manager(&SHARED.cluster()?, "midway").await?;
    let start = position(&db.operator, None).await?;
    let old = db.session(OPERATOR).await?;
    old.batch_execute("begin isolation level repeatable read; select 1").await?;
    for n in 0..3 {
        log(&manager, &format!("midway:{n}")).await?;
    }
    let first = read(&db.operator, &start, 1).await?;
    let unseen = read(&old, &first.next, 10).await?;
    assert!(unseen.caught_up && unseen.events.is_empty() && unseen.next == first.next, "{unseen:?}");
    let mut cursor = unseen.next;
    assert_eq!(names(&news(&db, &mut cursor).await?), ["midway:1", "midway:2"]);
    Ok(())
}

#[tokio::test]
async fn pending_events_are_estimated_at_a_cost_that_does_not_grow() -> Result<()> {
    let (db, manager) = with_manager(&SHARED.cluster()?, "backlog").await?;
    deliver(&db.operator, "late", "commit").await?;
    log(&manager, "backlog:1").await?;
    log(&manager, "backlog:2").await?;
    let pending = "select pending from tollgate.subscription_backlogs() where name = 'late'";
    assert_eq!(value::<i64>(&db.operator, pending).await?, 2);
    log_rows(&db.owner, 20_000).await?;
    let estimate: i64 = value(&db.operator, pending).await?;
    assert!((20_000..21_000).contains(&estimate), "{estimate}");
    for call in [
        pending.to_owned(),
        format!("select tollgate.has_events('{}')", position(&db.operator, Some(0)).await?.0),
    ] {
        let reads = reads(&db.operator, "audit_log", "audit_log_position", &call).await?;
        assert!(reads.scanned == 0 && reads.fetched < 1100, "{call}: {reads:?}");
    }
    Ok(())
}

/// Each would make a subscriber miss later commits.
#[tokio::test]
async fn a_cursor_beyond_the_present_is_refused() -> Result<()> {
    let (db, manager) = with_manager(&SHARED.cluster()?, "beyond").await?;
    deliver(&db.operator, "log", "commit").await?;
    let open = db.session(MANAGER).await?;
    open.batch_execute("begin").await?;
    log(&open, "beyond:open").await?;
    let now = position(&db.operator, None).await?;
    // With a proof, as if that had been read.
    let signed = async |next: &str| -> Result<Batch> {
        let sign = "select tollgate.signature_of_page(s.place, $1::text::tollgate.event_cursor)
                    from tollgate.subscriptions s where s.name = 'log'";
        let proof = db.owner.query_one(sign, &[&next]).await?.get(0);
        Ok(Batch { events: Vec::new(), next: Cursor(next.to_owned()), caught_up: true, proof })
    };
    let epoch = now.0.trim_start_matches('(').split(',').next().context("an epoch")?.to_owned();
    let all = "9223372036854775807:9223372036854775807:";
    let next: i64 = value(&open, "select pg_current_xact_id()::text::bigint + 1").await?;
    for forged in [
        format!("({epoch},{all},,,,,)"),
        format!("({epoch},{next}:{next}:,,,,,)"),
        format!("({epoch},1:1:,{epoch},{all},1,1,1)"),
        format!("(00000000-0000-0000-0000-000000000000,1:1:,{epoch},{all},1,1,9223372036854775807)"),
    ] {
        let moved = advance(&db.operator, "log", &signed(&forged).await?).await;
        let error = refused(moved, &SqlState::INVALID_PARAMETER_VALUE);
        assert!(error.message().contains("beyond"), "{forged}: {error:?}");
    }
    advance(&db.operator, "log", &signed(&now.0).await?).await?;
    open.batch_execute("commit").await?;
    log(&manager, "beyond:later").await?;
    assert_eq!(names(&deliver(&db.operator, "log", "commit").await?), ["beyond:open", "beyond:later"]);
    Ok(())
}

/// Transactions beyond the size of a cursor wait for older ones, and are read when those end.
#[tokio::test]
async fn a_crowd_of_open_transactions_does_not_make_a_cursor_longer() -> Result<()> {
    let (db, manager) = with_manager(&SHARED.cluster()?, "crowd").await?;
    let mut open = Vec::new();
    for n in 0..8 {
        let client = db.session(MANAGER).await?;
        client.batch_execute("begin").await?;
        log(&client, &format!("crowd:{n}")).await?;
        open.push(client);
    }
    // One that began after them and has ended, so that they are listed.
    log(&manager, "crowd:ended").await?;
    // By one statement: transactions of other tests end meanwhile.
    let both = "select tollgate.readable_snapshot(3800)::text, tollgate.readable_snapshot(30)::text";
    let row = db.owner.query_one(both, &[]).await?;
    let (whole, short): (String, String) = (row.get(0), row.get(1));
    assert!(short.len() < 60 && short.len() < whole.len(), "{short} of {whole}");
    let within = format!("select tollgate.snapshot_contains('{whole}', '{short}')");
    assert!(value::<bool>(&db.owner, &within).await?, "{short} of {whole}");
    Ok(())
}

// ---- Any interleaving

const WRITERS: usize = 5;

#[derive(Clone, Debug)]
enum Step {
    Begin {
        writer: usize,
        level: usize,
    },
    Log {
        writer: usize,
    },
    Savepoint {
        writer: usize,
    },
    RollbackToSavepoint {
        writer: usize,
    },
    Commit {
        writer: usize,
    },
    Rollback {
        writer: usize,
    },
    Prepare {
        writer: usize,
    },
    /// A new reader: from now, or after the event that is this many behind the last one.
    Join {
        back: Option<u8>,
    },
    Read {
        reader: prop::sample::Index,
        max_events: i32,
    },
    CatchUp {
        reader: prop::sample::Index,
        max_events: i32,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let writer = || 0..WRITERS;
    let reader = any::<prop::sample::Index>;
    prop_oneof![
        6 => (writer(), 0..3usize).prop_map(|(writer, level)| Step::Begin { writer, level }),
        12 => writer().prop_map(|writer| Step::Log { writer }),
        3 => writer().prop_map(|writer| Step::Savepoint { writer }),
        3 => writer().prop_map(|writer| Step::RollbackToSavepoint { writer }),
        4 => writer().prop_map(|writer| Step::Commit { writer }),
        2 => writer().prop_map(|writer| Step::Rollback { writer }),
        1 => writer().prop_map(|writer| Step::Prepare { writer }),
        2 => option::of(0..6u8).prop_map(|back| Step::Join { back }),
        5 => (reader(), 1..6).prop_map(|(reader, max_events)| Step::Read { reader, max_events }),
        3 => (reader(), 1..20).prop_map(|(reader, max_events)| Step::CatchUp { reader, max_events }),
    ]
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum State {
    Idle,
    InTransaction { savepoint: bool },
    Prepared,
}

struct Reader {
    cursor: Cursor,
    /// Events it must not receive: those in the log when it took its position, up to the event it named.
    skips: BTreeSet<i64>,
    received: BTreeSet<i64>,
}

/// Writers and readers of one case, and the expected outcome.
struct Case<'a> {
    owner: &'a Client,
    operator: &'a Client,
    writers: &'a [Client],
    states: [State; WRITERS],
    readers: Vec<Reader>,
    logged: u32,
    /// The log's last id before the case.
    origin: i64,
}

impl<'a> Case<'a> {
    async fn run(
        owner: &'a Client,
        operator: &'a Client,
        writers: &'a [Client],
        steps: &[Step],
    ) -> Result<()> {
        let origin = value(owner, "select coalesce(max(id), 0) from tollgate.audit_log").await?;
        let mut case = Self {
            owner,
            operator,
            writers,
            states: [State::Idle; WRITERS],
            readers: Vec::new(),
            logged: 0,
            origin,
        };
        case.join(None).await?;
        for step in steps {
            case.step(step).await.with_context(|| format!("in {step:?}"))?;
        }
        for writer in 0..WRITERS {
            case.end(writer, "commit").await?;
        }
        for reader in 0..case.readers.len() {
            case.catch_up(reader, 3).await?;
            // No transaction is open any more, so there is none to remember.
            case.catch_up(reader, 3).await?;
            let cursor = &case.readers[reader].cursor;
            ensure!(cursor.is_at_rest(), "{cursor:?}, although all transactions have ended");
        }
        Ok(())
    }

    async fn step(&mut self, step: &Step) -> Result<()> {
        match *step {
            Step::Begin { writer, level } => {
                if self.states[writer] == State::Idle {
                    let level = ["read committed", "repeatable read", "serializable"][level];
                    // With its snapshot taken, and without an id yet.
                    let begin = format!("begin isolation level {level}; select 1");
                    self.writers[writer].batch_execute(&begin).await?;
                    self.states[writer] = State::InTransaction { savepoint: false };
                }
            }
            Step::Log { writer } => {
                if self.states[writer] != State::Prepared {
                    self.logged += 1;
                    let name = format!("case:{}:{}", self.origin, self.logged);
                    log(&self.writers[writer], &name).await?;
                }
            }
            Step::Savepoint { writer } => {
                if let State::InTransaction { savepoint } = &mut self.states[writer] {
                    *savepoint = true;
                    self.writers[writer].batch_execute("savepoint s").await?;
                }
            }
            Step::RollbackToSavepoint { writer } => {
                if self.states[writer] == (State::InTransaction { savepoint: true }) {
                    self.writers[writer].batch_execute("rollback to savepoint s").await?;
                }
            }
            Step::Commit { writer } => self.end(writer, "commit").await?,
            Step::Rollback { writer } => self.end(writer, "rollback").await?,
            Step::Prepare { writer } => {
                if let State::InTransaction { .. } = self.states[writer] {
                    let prepare = format!("prepare transaction 'case {writer}'");
                    self.writers[writer].batch_execute(&prepare).await?;
                    self.states[writer] = State::Prepared;
                }
            }
            Step::Join { back } => self.join(back).await?,
            Step::Read { ref reader, max_events } => {
                let reader = reader.index(self.readers.len());
                self.read(reader, max_events).await?;
            }
            Step::CatchUp { ref reader, max_events } => {
                let reader = reader.index(self.readers.len());
                self.catch_up(reader, max_events).await?;
            }
        }
        Ok(())
    }

    async fn end(&mut self, writer: usize, how: &str) -> Result<()> {
        let end = match self.states[writer] {
            State::Idle => return Ok(()),
            State::InTransaction { .. } => how.to_owned(),
            State::Prepared => format!("{how} prepared 'case {writer}'"),
        };
        self.states[writer] = State::Idle;
        Ok(self.writers[writer].batch_execute(&end).await?)
    }

    /// The ids that are committed now.
    async fn visible(&self) -> Result<BTreeSet<i64>> {
        let rows =
            self.owner.query("select id from tollgate.audit_log where id > $1", &[&self.origin]).await?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    }

    async fn join(&mut self, back: Option<u8>) -> Result<()> {
        let visible = self.visible().await?;
        let since =
            back.map(|back| visible.iter().rev().nth(usize::from(back)).copied().unwrap_or(self.origin));
        let cursor = position(self.operator, since).await?;
        let skips = visible.into_iter().filter(|&id| since.is_none_or(|since| id <= since)).collect();
        self.readers.push(Reader { cursor, skips, received: BTreeSet::new() });
        Ok(())
    }

    async fn read(&mut self, reader: usize, max_events: i32) -> Result<bool> {
        let reader = &mut self.readers[reader];
        let batch = read(self.operator, &reader.cursor, max_events).await?;
        ensure!(batch.events.len() <= usize::try_from(max_events)?, "more than asked for");
        let ids = batch.ids();
        for &id in &ids {
            ensure!(!reader.skips.contains(&id), "event {id} was there before the reader came");
            ensure!(reader.received.insert(id), "event {id} was received twice");
        }
        let ordered: Vec<i64> = self
            .owner
            .query("select id from tollgate.audit_log where id = any ($1) order by id", &[&ids])
            .await?
            .iter()
            .map(|row| row.get(0))
            .collect();
        ensure!(ids == ordered, "{ids:?} were delivered in this order instead of {ordered:?}");
        reader.cursor = batch.next;
        Ok(batch.caught_up)
    }

    /// A reader that has caught up knows everything that is committed, whatever transactions are still open.
    async fn catch_up(&mut self, reader: usize, max_events: i32) -> Result<()> {
        while !self.read(reader, max_events).await? {}
        let visible = self.visible().await?;
        let reader = &self.readers[reader];
        let known: BTreeSet<i64> = reader.received.union(&reader.skips).copied().collect();
        ensure!(known == visible, "received {known:?}, but {visible:?} are in the log");
        Ok(())
    }
}

#[test]
fn readers_receive_every_event_once_whatever_the_interleaving() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    // A separate server: open transactions of other databases would be remembered too.
    let cluster = Arc::new(common::start(Cluster::builder().setting("autovacuum", "off"))?);
    let db = runtime.block_on(Db::only(&cluster))?;
    let mut writers = Vec::new();
    for _ in 0..WRITERS {
        writers.push(runtime.block_on(manager(&db))?);
    }

    let mut config = Config { failure_persistence: None, max_shrink_iters: 500, ..Config::default() };
    if std::env::var_os("PROPTEST_CASES").is_none() {
        config.cases = 60;
    }
    if std::env::var_os("PROPTEST_RNG_SEED").is_none() {
        config.rng_seed = RngSeed::Fixed(0x7011_6a7e);
    }
    TestRunner::new(config)
        .run(&vec(step(), 1..80), |steps| {
            let case = async {
                // The transactions that a failed case left open.
                for (number, writer) in writers.iter().enumerate() {
                    writer.batch_execute("rollback").await?;
                    let left = format!("select count(*) from pg_prepared_xacts where gid = 'case {number}'");
                    if value::<i64>(&db.owner, &left).await? > 0 {
                        db.owner.batch_execute(&format!("rollback prepared 'case {number}'")).await?;
                    }
                }
                Case::run(&db.owner, &db.operator, &writers, &steps).await
            };
            runtime.block_on(case).map_err(|error| TestCaseError::fail(format!("{error:#}")))
        })
        .map_err(|error| anyhow::anyhow!("{error}"))
}

/// The same with writers and readers that really run concurrently.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_receive_every_event_once_while_many_write() -> Result<()> {
    const TRANSACTIONS: usize = 120;
    let (db, _) = with_manager(&SHARED.cluster()?, "racing").await?;
    let origin = position(&db.operator, None).await?;
    let before: i64 = value(&db.owner, "select max(id) from tollgate.audit_log").await?;
    let slow = db.session(MANAGER).await?;
    slow.batch_execute("begin").await?;
    log(&slow, "racing:slow").await?;

    let mut writers = Vec::new();
    for writer in 0..5_usize {
        let client = db.session(MANAGER).await?;
        writers.push(tokio::spawn(async move {
            for n in 0..TRANSACTIONS {
                client.batch_execute("begin").await?;
                log(&client, &format!("racing:{writer}:{n}:a")).await?;
                if n % 3 == 0 {
                    client.batch_execute("savepoint s").await?;
                    log(&client, &format!("racing:{writer}:{n}:undone")).await?;
                    client.batch_execute("rollback to s").await?;
                }
                if n % 2 == 0 {
                    log(&client, &format!("racing:{writer}:{n}:b")).await?;
                }
                let end = if (n + writer) % 7 == 0 { "rollback" } else { "commit" };
                client.batch_execute(end).await?;
            }
            anyhow::Ok(())
        }));
    }
    let stop = Arc::new(AtomicBool::new(false));
    let mut readers = Vec::new();
    for max_events in [1, 3, 100] {
        let (client, stop, mut cursor) = (db.session(OPERATOR).await?, Arc::clone(&stop), origin.clone());
        readers.push(tokio::spawn(async move {
            let mut received: BTreeMap<i64, u32> = BTreeMap::new();
            loop {
                // Checked before reading, so that the last round begins when all have written.
                let last = stop.load(Ordering::Relaxed);
                for event in read_all(&client, &mut cursor, max_events).await? {
                    *received.entry(event["id"].as_i64().context("an id")?).or_default() += 1;
                }
                if last {
                    return anyhow::Ok(received);
                }
            }
        }));
    }
    for writer in writers {
        writer.await??;
    }
    slow.batch_execute("commit").await?;
    stop.store(true, Ordering::Relaxed);
    let logged: BTreeMap<i64, u32> = db
        .owner
        .query("select id from tollgate.audit_log where id > $1", &[&before])
        .await?
        .iter()
        .map(|row| (row.get(0), 1))
        .collect();
    assert!(logged.len() > 500, "{} events", logged.len());
    for reader in readers {
        let received = reader.await??;
        assert!(received == logged, "{} received, {} logged", received.len(), logged.len());
    }
    Ok(())
}

// ---- Subscriptions

async fn deliver(client: &Client, name: &str, end: &str) -> Result<Vec<Value>> {
    operator::deliver(client, name, 10, end).await
}

#[tokio::test]
async fn a_subscription_begins_now_and_continues_where_it_committed() -> Result<()> {
    let (db, manager) = with_manager(&SHARED.cluster()?, "subscribed").await?;
    log(&manager, "sub:before").await?;
    assert_eq!(deliver(&db.operator, "one", "commit").await?, Vec::<Value>::new());
    log(&manager, "sub:1").await?;
    log(&manager, "sub:2").await?;
    assert_eq!(names(&deliver(&db.operator, "one", "rollback").await?), ["sub:1", "sub:2"]);
    // A session that dies in between is like one that rolls back.
    let doomed = db.session(OPERATOR).await?;
    doomed.batch_execute("begin").await?;
    open(&doomed, "one").await?.context("no other session delivers")?;
    drop(doomed);
    eventually_async(LONG, "the lock of the dead session to be gone", async || {
        db.operator.batch_execute("begin").await.unwrap();
        let opened = open(&db.operator, "one").await.unwrap();
        db.operator.batch_execute("rollback").await.unwrap();
        opened.is_some()
    })
    .await;
    assert_eq!(names(&deliver(&db.operator, "one", "commit").await?), ["sub:1", "sub:2"]);
    assert_eq!(deliver(&db.operator, "one", "commit").await?, Vec::<Value>::new());

    log(&manager, "sub:3").await?;
    assert_eq!(deliver(&db.operator, "two", "commit").await?, Vec::<Value>::new(), "it begins now");
    log(&manager, "sub:4").await?;
    assert_eq!(names(&deliver(&db.operator, "one", "commit").await?), ["sub:3", "sub:4"]);
    assert_eq!(names(&deliver(&db.operator, "two", "commit").await?), ["sub:4"]);
    Ok(())
}

#[tokio::test]
async fn a_subscription_is_delivered_by_one_session_at_a_time_and_others_do_not_wait() -> Result<()> {
    let (db, manager) = with_manager(&SHARED.cluster()?, "locked").await?;
    deliver(&db.operator, "log", "commit").await?;
    let rival = db.session(OPERATOR).await?;
    rival.batch_execute("set lock_timeout = '1ms'").await?;
    log(&manager, "lock:1").await?;

    db.operator.batch_execute("begin").await?;
    let cursor = open(&db.operator, "log").await?.context("no other session delivers")?;
    assert_eq!(open(&rival, "log").await?, None);
    assert!(open(&rival, "other").await?.is_some(), "another name is free");
    let batch = read(&db.operator, &cursor, 10).await?;
    assert_eq!(names(&batch.events), ["lock:1"]);
    advance(&db.operator, "log", &batch).await?;
    assert_eq!(open(&rival, "log").await?, None);
    db.operator.batch_execute("commit").await?;
    assert_eq!(open(&rival, "log").await?, Some(batch.next));
    assert_eq!(deliver(&rival, "log", "commit").await?, Vec::<Value>::new());
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_sessions_may_begin_the_same_subscription() -> Result<()> {
    let (db, _) = with_manager(&SHARED.cluster()?, "begun").await?;
    for end in ["commit", "rollback"] {
        let name = format!("begun by {end}");
        db.operator.batch_execute("begin").await?;
        let first = open(&db.operator, &name).await?.context("it is new")?;
        let second = tokio::spawn({
            let (rival, name) = (db.session(OPERATOR).await?, name.clone());
            async move { open(&rival, &name).await }
        });
        eventually_async(LONG, "the second session to wait for the first, or to be done", async || {
            second.is_finished()
                || value::<bool>(
                    &db.owner,
                    "select exists (select from pg_stat_activity where wait_event_type = 'Lock'
                         and datname = current_database())",
                )
                .await
                .unwrap()
        })
        .await;
        db.operator.batch_execute(end).await?;
        // Either it found that the other delivers, or it came after it.
        if let Some(cursor) = second.await??
            && end == "commit"
        {
            assert_eq!(cursor, first);
        }
        assert!(open(&db.operator, &name).await?.is_some());
        let kept: i64 =
            value(&db.owner, &format!("select count(*) from tollgate.subscriptions where name = '{name}'"))
                .await?;
        assert_eq!(kept, 1);
    }
    Ok(())
}

#[tokio::test]
async fn a_subscription_moves_only_to_the_end_of_a_page_that_was_read_from_it() -> Result<()> {
    let (db, manager) = with_manager(&SHARED.cluster()?, "unread").await?;
    deliver(&db.operator, "log", "commit").await?;
    for n in 0..5 {
        log(&manager, &format!("unread:{n}")).await?;
    }
    let place = open(&db.operator, "log").await?.context("no other session delivers")?;
    let page = read(&db.operator, &place, 2).await?;
    let second = read(&db.operator, &page.next, 2).await?;
    let later = read(&db.operator, &position(&db.operator, None).await?, 1000).await?;
    let earlier = read(&db.operator, &position(&db.operator, Some(0)).await?, 1).await?;
    // A cursor that was written by hand begins at the place, and has nothing left to read.
    let (place_only, _) = place.0.split_once(",,").context("a place at rest")?;
    let (_, end) = later.next.0.trim_matches(['(', ')']).split_once(',').context("a cursor")?;
    let epoch = place_only.trim_start_matches('(').split(',').next().context("an epoch")?;
    let snapshot = end.trim_end_matches(',');
    let forged = Cursor(format!("{place_only},{epoch},{snapshot},0,-1,0)"));
    let forged = read(&db.operator, &forged, 1000).await?;
    assert_eq!(forged.events, Vec::<Value>::new());
    let with =
        |next: &Cursor, proof: &[u8]| Batch { next: next.clone(), proof: proof.to_vec(), ..page.clone() };
    for (what, batch) in [
        ("past everything", with(&position(&db.operator, None).await?, b"")),
        ("past everything, by another page's proof", with(&later.next, &page.proof)),
        ("to where other reading ended", later.clone()),
        ("to where reading of a forged cursor ended", forged),
        ("back", earlier),
        ("past a page", second.clone()),
        ("to another end of the page", with(&second.next, &page.proof)),
        ("without a proof", with(&page.next, b"")),
    ] {
        let error = refused(advance(&db.operator, "log", &batch).await, &SqlState::INVALID_PARAMETER_VALUE);
        assert!(error.hint().is_some_and(|hint| hint.contains("open_subscription")), "{what}: {error:?}");
        assert_eq!(open(&db.operator, "log").await?.as_ref(), Some(&place), "{what}");
    }
    let none = "select tollgate.advance_subscription('log', $1::text::tollgate.event_cursor, null)";
    refused(db.operator.execute(none, &[&page.next.0]).await, &SqlState::INVALID_PARAMETER_VALUE);

    // Page by page, each once.
    advance(&db.operator, "log", &page).await?;
    refused(advance(&db.operator, "log", &page).await, &SqlState::INVALID_PARAMETER_VALUE);
    advance(&db.operator, "log", &second).await?;
    assert_eq!(names(&page.events), ["unread:0", "unread:1"]);
    assert_eq!(names(&second.events), ["unread:2", "unread:3"]);
    assert_eq!(names(&deliver(&db.operator, "log", "commit").await?), ["unread:4"]);

    // An administrator can have a subscriber begin anew, which the log shows.
    log(&manager, "unread:skipped").await?;
    let skip = "select tollgate.drop_subscription('log')";
    refused(db.operator.execute(skip, &[]).await, &SqlState::INSUFFICIENT_PRIVILEGE);
    db.owner.execute(skip, &[]).await?;
    let received = deliver(&db.operator, "log", "commit").await?;
    assert_eq!(names(&received), [""; 0], "{received:?}");
    Ok(())
}

#[tokio::test]
async fn an_unknown_subscription_cannot_be_advanced() -> Result<()> {
    let (db, _) = with_manager(&SHARED.cluster()?, "unknown").await?;
    let batch = read(&db.operator, &position(&db.operator, None).await?, 1).await?;
    for name in ["unknown's", ""] {
        let error = refused(advance(&db.operator, name, &batch).await, &SqlState::UNDEFINED_OBJECT);
        assert!(error.hint().is_some_and(|hint| hint.contains("open_subscription")), "{error:?}");
    }
    let error = refused(
        db.operator
            .execute(
                "select tollgate.advance_subscription(null, $1::text::tollgate.event_cursor, $2)",
                &[&batch.next.0, &batch.proof],
            )
            .await,
        &SqlState::UNDEFINED_OBJECT,
    );
    assert!(error.message().contains("NULL"), "{error:?}");
    let long = "x".repeat(101);
    for name in ["", &long] {
        let opened = db.operator.query("select * from tollgate.open_subscription($1)", &[&name]).await;
        refused(opened, &SqlState::INVALID_PARAMETER_VALUE);
    }
    Ok(())
}

// ---- Notifications, on which no change may depend

/// A session that LISTENs and does not end its transaction, which retains the queue of the whole server.
async fn hoard(cluster: &Cluster) -> Result<Client> {
    let hoarder = cluster.connect("web", "postgres").await?;
    hoarder.batch_execute("listen filler").await?;
    hoarder.batch_execute("begin; select 1").await?;
    Ok(hoarder)
}

/// An ordinary role fills the queue, until no role can notify any more.
async fn fill(cluster: &Cluster) -> Result<()> {
    let filler = cluster.connect("web", "postgres").await?;
    // Large ones, then some that fit into the rest.
    for size in [7900, 1] {
        for round in 0..1_000_000 {
            let notify = format!("notify filler, '{round}-{}'", "x".repeat(size));
            if let Err(error) = filler.batch_execute(&notify).await {
                let error = error.as_db_error().context("the server's error")?;
                assert_eq!(error.code(), &SqlState::PROGRAM_LIMIT_EXCEEDED, "{error:?}");
                break;
            }
        }
    }
    Ok(())
}

/// Before 17 the queue holds 8 GB, which no test fills.
async fn with_a_small_queue() -> Result<Option<(Arc<Cluster>, Db)>> {
    if tollgate_tests::Install::under_test()?.major < 17 {
        return Ok(None);
    }
    let cluster = Arc::new(common::start(Cluster::builder().setting("max_notify_queue_pages", "64"))?);
    let db = Db::only(&cluster).await?;
    Ok(Some((cluster, db)))
}

#[tokio::test]
async fn a_full_notification_queue_prevents_no_revocation_and_the_daemon_publishes_it() -> Result<()> {
    let Some((cluster, db)) = with_a_small_queue().await? else { return Ok(()) };
    db.owner
        .batch_execute(
            "create table users (id text primary key); insert into users values ('a'), ('b'), ('c'), ('d'), ('departing');
             select tollgate.attach_users_table('users', 'id')",
        )
        .await?;
    let tokens = [
        issue(&db.owner, "a", &[]).await?,
        issue(&db.owner, "b", &[]).await?,
        issue(&db.owner, "c", &[]).await?,
        issue(&db.owner, "departing", &[]).await?,
        issue(&db.owner, "d", &[]).await?,
    ];
    let _hoarder = hoard(&cluster).await?;
    fill(&cluster).await?;
    // Also one that begins when the queue is full.
    let mut daemon = Tollgated::spawn(&db.url(), &["run", "--log-format=json"])?;
    eventually_async(LONG, "the daemon", async || daemon.log().contains("ready")).await;
    for change in [
        format!("select tollgate.revoke_api_token('{}')", tokens[0].id),
        format!("select tollgate.revoke_presented_token('{}')", tokens[1].token),
        "select tollgate.revoke_all_api_tokens('c')".to_owned(),
        "delete from users where id = 'departing'".to_owned(),
        format!("select tollgate.set_api_token_enabled('{}', false)", tokens[4].id),
    ] {
        db.owner.batch_execute(&change).await.with_context(|| change.clone())?;
    }
    for token in &tokens {
        assert_ne!(code(&db.web, &token.token).await?, "VALID");
    }
    for token in &tokens {
        let received = |log: &str| {
            log.lines().any(|line| {
                line.contains(&token.id.to_string())
                    && (line.contains("token.revoked") || line.contains("token.disabled"))
            })
        };
        eventually_async(LONG, "the daemon to publish it", async || received(&daemon.log())).await;
    }
    daemon.terminate()?;
    assert!(daemon.wait(LONG)?.success(), "{}", daemon.log());
    Ok(())
}

#[tokio::test]
async fn a_queue_that_fills_before_the_commit_fails_one_attempt_and_not_the_next() -> Result<()> {
    let Some((cluster, db)) = with_a_small_queue().await? else { return Ok(()) };
    let token = issue(&db.owner, "a", &[]).await?;
    let _hoarder = hoard(&cluster).await?;
    let revoker = db.session("postgres").await?;
    let revoke = format!("select tollgate.revoke_api_token('{}')", token.id);
    revoker.batch_execute("begin").await?;
    assert!(value::<bool>(&revoker, &revoke).await?);
    fill(&cluster).await?;
    refused(revoker.batch_execute("commit").await, &SqlState::PROGRAM_LIMIT_EXCEEDED);
    assert_eq!(code(&db.web, &token.token).await?, "VALID");
    assert!(value::<bool>(&revoker, &revoke).await?);
    assert_eq!(code(&db.web, &token.token).await?, "REVOKED");
    Ok(())
}

#[tokio::test]
async fn without_notifications_a_revocation_can_be_prepared_and_the_daemon_still_publishes_it() -> Result<()>
{
    let cluster = Arc::new(common::start(Cluster::builder().setting("max_prepared_transactions", "5"))?);
    let db = Db::only(&cluster).await?;
    let token = issue(&db.owner, "a", &[]).await?;
    let revoke = format!("select tollgate.revoke_api_token('{}')", token.id);
    let daemon = Tollgated::spawn(&db.url(), &["run", "--log-format=json"])?;
    eventually_async(LONG, "the daemon", async || daemon.log().contains("ready")).await;
    let (listener, mut heard) = cluster.listen("web", DATABASE).await?;
    listener.batch_execute("listen tollgate_events").await?;

    db.owner.batch_execute(&format!("begin; {revoke}")).await?;
    refused(db.owner.batch_execute("prepare transaction 'loud'").await, &SqlState::FEATURE_NOT_SUPPORTED);
    assert_eq!(code(&db.web, &token.token).await?, "VALID");

    db.owner
        .batch_execute(&format!("set tollgate.notify = off; begin; {revoke}; prepare transaction 'quiet'"))
        .await?;
    assert_eq!(code(&db.web, &token.token).await?, "VALID");
    db.owner.batch_execute("commit prepared 'quiet'").await?;
    assert_eq!(code(&db.web, &token.token).await?, "REVOKED");
    let id = token.id.to_string();
    eventually_async(LONG, "the daemon to publish it", async || {
        daemon.log().lines().any(|line| line.contains(&id) && line.contains("token.revoked"))
    })
    .await;

    // Nothing was notified; only later notifications arrive.
    listener.batch_execute("notify tollgate_events, 'the end'").await?;
    let payload = loop {
        if let AsyncMessage::Notification(notification) = heard.recv().await.context("the listener lives")? {
            break notification.payload().to_owned();
        }
    };
    assert_eq!(payload, "the end");
    Ok(())
}
