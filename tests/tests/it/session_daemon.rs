//! Sessions as the daemon and its command line deal with them: listed, ended, announced, deleted, counted.

use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use tollgate_tests::eventually_async;
use uuid::Uuid;

use crate::commands::{NO, OK, failure, json_of, printed};
use crate::common::{Shared, refused, value};
use crate::operator::Db;
use crate::web::{self, eventually_measures};

static SHARED: Shared = Shared::new(&[]);

const LONG: Duration = Duration::from_secs(60);

/// A database with a signing key, a role that opens sessions and may list and end them, and the address for its commands.
async fn created(name: &str) -> Result<(Db, Client, String)> {
    let db = Db::create(&SHARED.cluster()?, name).await?;
    db.owner
        .batch_execute(
            "do $$ begin create role backend login; exception when duplicate_object or unique_violation then end $$;
             select tollgate.grant_capability('backend', 'issuer'), tollgate.grant_capability('backend', 'verifier');
             select tollgate.create_signing_key()",
        )
        .await?;
    let backend = db.session("backend").await?;
    let url = db.cluster.url("backend", name);
    Ok((db, backend, url))
}

/// Opens a session whose further arguments are written out in SQL, and returns its id and its refresh token.
async fn open(client: &Client, user: &str, arguments: &str) -> Result<(Uuid, String)> {
    let call = format!(
        "select session_id, refresh_token from tollgate.open_session($1, '{{posts:read}}'{arguments})"
    );
    let row = client.query_one(&call, &[&user]).await?;
    Ok((row.get(0), row.get(1)))
}

async fn code(client: &Client, token: &str) -> Result<String> {
    Ok(client.query_one("select code from tollgate.refresh_session($1)", &[&token]).await?.get(0))
}

#[tokio::test]
async fn sessions_are_listed_and_ended_from_the_command_line() -> Result<()> {
    let (db, backend, url) = created("commands").await?;
    let (first, token) = open(&backend, "ann", ", label => 'laptop', client_ip => '192.0.2.1'").await?;
    let (second, _) = open(&backend, "ann", "").await?;
    let (bens, _) = open(&backend, "ben", "").await?;
    assert_eq!(code(&backend, &token).await?, "VALID");

    let listed = json_of(&url, &["session", "list", "ann"], OK);
    let ids: Vec<&str> =
        listed.as_array().context("a list")?.iter().filter_map(|s| s["id"].as_str()).collect();
    assert_eq!(ids, [first.to_string(), second.to_string()]);
    assert_eq!(
        (&listed[0]["label"], &listed[0]["opened_from"], &listed[0]["refreshes"], &listed[0]["scopes"]),
        (&json!("laptop"), &json!("192.0.2.1"), &json!(1), &json!(["posts:read"]))
    );
    let text = listed.to_string();
    assert!(!text.contains("tgr_") && !text.contains("secret"), "{text}");
    let table = printed(&url, &["session", "list", "ann"], OK);
    assert!(table.contains("laptop") && table.contains(&second.to_string()), "{table}");
    assert!(printed(&url, &["session", "list", "cem"], OK).contains("cem has no sessions"));

    let id = first.to_string();
    let revoke = ["session", "revoke", &id, "--reason", "stolen"];
    assert_eq!(json_of(&url, &[&revoke[..], &["--user=ben"]].concat(), NO), json!({"revoked": 0}));
    assert_eq!(json_of(&url, &revoke, OK), json!({"revoked": 1}));
    assert_eq!(json_of(&url, &revoke, NO), json!({"revoked": 0}));
    assert_eq!(code(&backend, &token).await?, "REVOKED");
    let reason = "select detail ->> 'reason' from tollgate.audit_log where event = 'session.revoked' and token_id = $1";
    assert_eq!(db.owner.query_one(reason, &[&first]).await?.get::<_, String>(0), "stolen");
    assert_eq!(json_of(&url, &["session", "revoke", "--user", "ann"], OK), json!({"revoked": 1}));
    assert_eq!(json_of(&url, &["session", "list", "ann"], OK), json!([]));

    // All that a user has.
    assert_eq!(json_of(&url, &["user", "revoke", "ben"], OK), json!({"revoked": 0}));
    assert!(!printed(&url, &["session", "list", "ben"], OK).contains(&bens.to_string()));
    Ok(())
}

#[tokio::test]
async fn every_session_from_before_a_moment_is_ended_and_no_later_one() -> Result<()> {
    let (db, backend, url) = created("invalidated").await?;
    let (_, before) = open(&backend, "ann", "").await?;
    let (refreshed, refreshed_since) = open(&backend, "ann", "").await?;
    db.owner
        .batch_execute("update tollgate.sessions set created_at = created_at - interval '2 days', refreshed_at = refreshed_at - interval '2 days'")
        .await?;
    assert_eq!(code(&backend, &refreshed_since).await?, "VALID");
    let (_, after) = open(&backend, "ann", "").await?;
    // More than a batch.
    db.owner
        .execute(
            "insert into tollgate.sessions
             select (t).* from (select jsonb_populate_record(s, jsonb_build_object('id', gen_random_uuid(), 'refreshed_at', now() - interval '2 days')) t
                                from tollgate.sessions s, generate_series(1, 10500) where s.id = $1) r",
            &[&refreshed],
        )
        .await?;
    let moment = (jiff::Timestamp::now() - jiff::SignedDuration::from_hours(24)).to_string();
    let invalidate = ["session", "invalidate", "--before", &moment];
    assert_eq!(json_of(&db.url(), &invalidate, OK), json!({"invalidated": 10_501}));
    assert_eq!(json_of(&db.url(), &invalidate, OK), json!({"invalidated": 0}));
    assert_eq!(code(&backend, &before).await?, "REVOKED");
    for token in [&refreshed_since, &after] {
        assert_eq!(code(&backend, token).await?, "VALID");
    }
    assert!(printed(&db.url(), &invalidate, OK).contains("ended 0 sessions"));
    // Those who run the daemon do this, and who manages sessions is not one of them.
    assert!(failure(&url, &invalidate, NO).contains("capability operator"));
    let future = failure(&db.url(), &["session", "invalidate", "--before=2999-01-01T00:00:00Z"], NO);
    assert!(future.contains("Option: --before") && !future.contains("()"), "{future}");
    Ok(())
}

#[tokio::test]
async fn the_daemon_announces_ends_deletes_what_ended_long_ago_and_shows_what_is_counted() -> Result<()> {
    let (db, backend, _) = created("housekept").await?;
    let (soon, _) = open(&backend, "ann", "").await?;
    let (later, later_token) = open(&backend, "ann", "").await?;
    let (idle, _) = open(&backend, "ann", "").await?;
    let (ended, _) = open(&backend, "ann", "").await?;
    let (over, _) = open(&backend, "ann", "").await?;
    backend.execute("select tollgate.revoke_session($1)", &[&ended]).await?;
    for (id, change) in [
        (soon, "expires_at = now() + interval '2 days', created_at = now() - interval '28 days'"),
        (idle, "refreshed_at = now() - interval '8 days', created_at = now() - interval '8 days'"),
        (ended, "revoked_at = now() - interval '31 days'"),
        (over, "expires_at = now() - interval '31 days'"),
    ] {
        let change = format!("update tollgate.sessions set {change} where id = $1");
        db.owner.execute(&change, &[&id]).await?;
    }
    let (_daemon, address) =
        web::run(&db.url(), &["--purge-interval=100ms", "--expire-interval=100ms"]).await?;
    let left = "select array_agg(id order by id) from tollgate.sessions";
    eventually_async(LONG, "the ended sessions to be deleted", async || {
        value::<Vec<Uuid>>(&db.owner, left).await.is_ok_and(|ids| ids == [soon, later, idle])
    })
    .await;
    let announced = "select array_agg(token_id) from tollgate.audit_log where event = 'session.expires_soon'";
    eventually_async(LONG, "the notice", async || {
        value::<Option<Vec<Uuid>>>(&db.owner, announced).await.is_ok_and(|ids| ids == Some(vec![soon]))
    })
    .await;

    let counted = async |outcome: &str| -> Result<f64> {
        let stats: Value = value(&db.operator, "select sessions from tollgate.stats()").await?;
        stats[outcome].as_f64().with_context(|| format!("{outcome} in {stats}"))
    };
    // Others on this server count too.
    let before = (counted("refreshed").await?, counted("reused").await?, counted("refused").await?);
    assert!(counted("opened").await? >= 5.0);
    let next: String = backend
        .query_one("select refresh_token from tollgate.refresh_session($1)", &[&later_token])
        .await?
        .get(0);
    assert_eq!(code(&backend, &next).await?, "VALID");
    assert_eq!(code(&backend, &later_token).await?, "REUSED");
    assert_eq!(code(&backend, &next).await?, "REVOKED");
    for (outcome, least) in
        [("refreshed", before.0 + 2.0), ("reused", before.1 + 1.0), ("refused", before.2 + 1.0)]
    {
        eventually_measures(address, &format!("tollgate_sessions_total{{outcome=\"{outcome}\"}}"), |n| {
            n >= least
        })
        .await;
    }
    eventually_measures(address, "tollgate_can_sign", |can| can == 1.0).await;
    eventually_measures(address, "tollgate_master_keys", |keys| keys == 1.0).await;
    Ok(())
}

#[tokio::test]
async fn the_daemons_role_ends_no_session_of_its_choice() -> Result<()> {
    let (db, backend, _) = created("operators").await?;
    let (id, token) = open(&backend, "ann", "").await?;
    for statement in [
        format!("select tollgate.revoke_session('{id}')"),
        "select tollgate.revoke_all_sessions('ann')".to_owned(),
        "select tollgate.revoke_user('ann')".to_owned(),
        "select tollgate.list_sessions('ann')".to_owned(),
        "select tollgate.open_session('ann', '{}')".to_owned(),
        "table tollgate.sessions".to_owned(),
    ] {
        refused(db.operator.batch_execute(&statement).await, &SqlState::INSUFFICIENT_PRIVILEGE);
    }
    for retention in ["null", "'-1 day'", "'2000 years'"] {
        let purge = format!("select tollgate.purge_sessions_after({retention}, 10)");
        refused(db.operator.batch_execute(&purge).await, &SqlState::INVALID_PARAMETER_VALUE);
    }
    for size in ["0", "1001", "null"] {
        let purge = format!("select tollgate.purge_sessions_after('30 days', {size})");
        refused(db.operator.batch_execute(&purge).await, &SqlState::INVALID_PARAMETER_VALUE);
    }
    assert_eq!(code(&backend, &token).await?, "VALID");
    Ok(())
}

#[tokio::test]
async fn the_walk_over_sessions_looks_at_no_more_than_a_batch() -> Result<()> {
    let (db, backend, _) = created("walked").await?;
    let mut ids = Vec::new();
    for _ in 0..7 {
        ids.push(open(&backend, "ann", "").await?.0);
    }
    db.owner
        .execute(
            "update tollgate.sessions set revoked_at = now() - interval '31 days' where id <> $1",
            &[&ids[3]],
        )
        .await?;
    let step = async |place: Option<Uuid>| -> Result<(Option<Uuid>, i64, i64)> {
        let call =
            "select session_id, looked_at, purged from tollgate.purge_sessions_after('30 days', 3, $1)";
        let row = db.operator.query_one(call, &[&place]).await?;
        Ok((row.get(0), row.get(1), row.get(2)))
    };
    // One that another session has locked is left for the next round.
    let holder = db.session("postgres").await?;
    holder
        .batch_execute(&format!("begin; select from tollgate.sessions where id = '{}' for update", ids[1]))
        .await?;
    assert_eq!(step(None).await?, (Some(ids[2]), 3, 2));
    assert_eq!(step(Some(ids[2])).await?, (Some(ids[5]), 3, 2));
    assert_eq!(step(Some(ids[5])).await?, (Some(ids[6]), 1, 1));
    holder.batch_execute("rollback").await?;
    assert_eq!(step(None).await?, (Some(ids[3]), 2, 1));
    let left: Vec<Uuid> = value(&db.owner, "select array_agg(id) from tollgate.sessions").await?;
    assert_eq!(left, [ids[3]]);
    Ok(())
}

#[tokio::test]
async fn the_status_of_keys_says_what_monitoring_needs() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "key_status").await?;
    let status = async || -> Result<(i64, Option<bool>, bool, bool)> {
        let call = "select master_keys, can_sign, coalesce(signs_since <= clock_timestamp(), false), \
                    coalesce(signs_until > clock_timestamp(), false) from tollgate.key_status()";
        let row = db.operator.query_one(call, &[]).await?;
        Ok((row.get(0), row.get(1), row.get(2), row.get(3)))
    };
    assert_eq!(status().await?, (1, None, false, false), "no key, which is no fault");
    let create = "select tollgate.create_signing_key()";
    let first: String = value(&db.owner, create).await?;
    assert_eq!(status().await?, (1, Some(true), true, false));
    db.owner.execute(create, &[]).await?;
    assert_eq!(status().await?, (1, Some(true), true, true), "the next one is there");
    // A key that another master key has sealed.
    let change = "update tollgate.sealed_keys set sealed = overlay(sealed placing '\\x0102030405060708'::bytea from 2)";
    db.owner.execute(change, &[]).await?;
    assert_eq!(status().await?, (1, Some(false), true, true));
    db.owner.execute("select tollgate.withdraw_signing_key($1)", &[&first]).await?;
    assert_eq!(status().await?, (1, Some(false), true, false), "the next one signs at once");
    refused(db.web.query_one("select tollgate.key_status()", &[]).await, &SqlState::INSUFFICIENT_PRIVILEGE);
    Ok(())
}
