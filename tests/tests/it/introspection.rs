//! Introspection and revocation of whatever is presented, by a role that verifies.

use crate::ancestry::{AUDIENCE, ISSUER, World};
use crate::common::{self, Shared, code, issue_with, refused, value};
use crate::operator::{counts, flush_all};
use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use tollgate_core::refresh::{Key, Subject};
use uuid::Uuid;

static SHARED: Shared = Shared::new(&[
    ("tollgate.user_rate_window", "1h"),
    ("tollgate.failure_rate_limit", "4"),
    ("tollgate.failure_rate_window", "1h"),
]);

async fn introspect(client: &Client, token: &str, arguments: &str) -> Result<Value> {
    let call = format!("select tollgate.introspect_token($1{arguments})");
    Ok(client.query_one(&call, &[&token]).await?.get(0))
}

async fn is_active(world: &World, token: &str) -> Result<bool> {
    let answer = introspect(&world.db.web, token, "").await?;
    if answer != json!({"active": false}) {
        assert_eq!(answer["active"], true, "{answer}");
        return Ok(true);
    }
    Ok(false)
}

async fn revoke(client: &Client, token: &str, arguments: &str) -> Result<(), tokio_postgres::Error> {
    client.execute(&format!("select tollgate.revoke_token($1{arguments})"), &[&token]).await.map(drop)
}

async fn session(world: &World) -> Result<(Uuid, String, String)> {
    let open = "select session_id, access_token, refresh_token
                from tollgate.open_session('ann', '{posts:read}', client_id => 'app')";
    let row = world.backend.query_one(open, &[]).await?;
    Ok((row.get(0), row.get(1), row.get(2)))
}

#[tokio::test]
async fn each_kind_of_token_says_what_it_is_and_is_not_used() -> Result<()> {
    let world = World::on(&SHARED, "introspect").await?;
    let api = issue_with(&world.db.owner, "ann", "scopes => '{posts:*,users:read}', expires_in => '1 hour'")
        .await?;
    let answer = introspect(&world.db.web, &api.token, ", 'refresh_token'").await?;
    let exp: i64 = value(
        &world.db.owner,
        "select floor(extract(epoch from expires_at))::bigint from tollgate.api_tokens",
    )
    .await?;
    assert_eq!(
        answer,
        json!({
            "active": true, "scope": "posts:* users:read", "username": "ann", "client_id": "postgres", "token_type": "Bearer",
            "exp": exp, "iat": answer["iat"], "sub": "ann", "aud": AUDIENCE, "iss": ISSUER, "jti": api.id,
        })
    );
    assert_eq!(exp - answer["iat"].as_i64().context("iat")?, 3600);

    let act = json!({"sub": "service:a", "client_id": "a"});
    let claims = json!({"aud": ["https://b.test", "https://c.test"], "act": act, "own": 1, "rev": 7});
    let signed = world.sign(&claims)?;
    let verified =
        world.verify(&signed, ", audience => 'https://b.test'").await?.metadata.context("claims")?;
    let answer = introspect(&world.db.web, &signed, ", hint => null").await?;
    let expected = ["client_id", "exp", "iat", "nbf", "sub", "aud", "iss", "jti", "act"];
    let mut expected: serde_json::Map<String, Value> =
        expected.iter().map(|&name| (name.to_owned(), verified[name].clone())).collect();
    for (name, value) in [
        ("active", json!(true)),
        ("scope", json!("posts:read")),
        ("username", json!("ann")),
        ("token_type", json!("Bearer")),
    ] {
        expected.insert(name.to_owned(), value);
    }
    assert_eq!(answer, Value::Object(expected), "whatever its audience is");

    let (id, access, refresh) = session(&world).await?;
    assert_eq!(introspect(&world.db.web, &access, "").await?["sid"], json!(id));
    let answer = introspect(&world.db.web, &refresh, "").await?;
    assert_eq!(
        answer,
        json!({
            "active": true, "scope": "posts:read", "username": "ann", "client_id": "app", "exp": answer["exp"],
            "sub": "ann", "iss": ISSUER, "aud": [AUDIENCE], "sid": id,
        })
    );
    // The one that it got its successor for is still good within the grace, and the session went on.
    let next: String = world
        .backend
        .query_one("select refresh_token from tollgate.refresh_session($1, 'app')", &[&refresh])
        .await?
        .get(0);
    assert!(is_active(&world, &refresh).await? && is_active(&world, &next).await?);
    world.run("update tollgate.sessions set refreshed_at = refreshed_at - interval '1 minute'").await?;
    assert!(!is_active(&world, &refresh).await? && is_active(&world, &next).await?);
    let ended = "select count(*) from tollgate.audit_log where event like 'session.re%'";
    assert_eq!(value::<i64>(&world.db.owner, ended).await?, 0, "an introspection ends nothing");

    flush_all(&world.db.operator).await?;
    assert_eq!(counts(&world.db.owner, api.id).await?, (0, 0));
    world.db.web.batch_execute("begin read only").await?;
    assert!(is_active(&world, &api.token).await?);
    world.db.web.batch_execute("commit").await?;
    Ok(())
}

#[tokio::test]
async fn one_that_is_not_active_is_only_that() -> Result<()> {
    let world = World::on(&SHARED, "introspect_inactive").await?;
    let bound = issue_with(&world.db.owner, "ann", "scopes => '{}', allowed_ips => '{10.0.0.0/8}'").await?;
    let (session, _, refresh) = session(&world).await?;
    // In the form of its next token, by another key.
    let forged = Subject { issuer: ISSUER, session: session.as_bytes(), secret: &[0; 32] };
    let guess = Key::new(&[7; 32]).issue(&forged, 1).to_string();
    for token in [
        "",
        "nothing",
        "eyJ.e30.x",
        &bound.token,
        &bound.token.replacen("tgt", "abc", 1),
        &guess,
        &world.sign(&json!({"exp": 1_700_000_000}))?,
        &world.sign(&json!({"root": Uuid::new_v4()}))?,
        &world.sign(&json!({"iss": "https://none.test"}))?,
    ] {
        assert!(!is_active(&world, token).await?, "{token}");
    }
    let null = "select tollgate.introspect_token(null)";
    assert_eq!(value::<Value>(&world.db.web, null).await?, json!({"active": false}));
    assert_eq!(introspect(&world.db.web, &bound.token, ", client_ip => '10.0.0.1'").await?["active"], true);
    // Guesses count, of each kind: then not even a right one is confirmed.
    for (n, wrong, right) in
        [(1, "nothing", &bound.token), (2, guess.as_str(), &refresh), (3, "eyJ.e30.x", &refresh)]
    {
        let at = format!(", client_ip => '10.2.0.{n}'");
        assert_eq!(introspect(&world.db.web, right, &at).await?["active"], true, "{wrong}");
        for _ in 0..4 {
            introspect(&world.db.web, wrong, &at).await?;
        }
        assert_eq!(introspect(&world.db.web, right, &at).await?, json!({"active": false}), "{wrong}");
    }
    Ok(())
}

#[tokio::test]
async fn whatever_is_presented_is_revoked_and_what_is_unknown_is_no_error() -> Result<()> {
    let world = World::on(&SHARED, "revoke_any").await?;
    let web = &world.db.web;
    let api = issue_with(&world.db.owner, "ann", "scopes => '{posts:read}'").await?;
    let signed = world.sign(&json!({}))?;
    let (id, access, refresh) = session(&world).await?;
    let of_api: String = world
        .backend
        .query_one("select access_token from tollgate.exchange_token($1)", &[&api.token])
        .await?
        .get(0);
    let of_signed: String = world
        .backend
        .query_one("select access_token from tollgate.exchange_token($1)", &[&signed])
        .await?
        .get(0);
    for (token, also) in [(&api.token, &of_api), (&signed, &of_signed), (&refresh, &access)] {
        assert!(is_active(&world, token).await? && is_active(&world, also).await?);
        // Again, of what is over by then.
        for _ in 0..2 {
            revoke(web, token, ", 'access_token', reason => 'leaked'").await?;
        }
        assert!(!is_active(&world, token).await? && !is_active(&world, also).await?);
    }
    assert_eq!(code(web, &api.token).await?, "REVOKED");
    for (subject, event) in [(api.id, "token.revoked"), (id, "session.revoked")] {
        let history = common::history(&world.db.owner, subject).await?;
        let (last, detail) = history.last().context("an event")?;
        assert_eq!((last.as_str(), &detail["reason"]), (event, &json!("leaked")));
    }
    for unknown in ["", "nothing", "eyJ.e30.x", &api.token.replacen("tgt", "abc", 1)] {
        revoke(web, unknown, "").await?;
    }
    web.execute("select tollgate.revoke_token(null)", &[]).await?;
    let given = format!(", reason => '{}'", api.token);
    refused(revoke(web, "nothing", &given).await, &SqlState::INVALID_PARAMETER_VALUE);
    let at = ", client_ip => '10.3.0.1'";
    for _ in 0..4 {
        revoke(web, "nothing", at).await?;
    }
    for token in ["nothing", "eyJ.e30.x", &refresh] {
        refused(revoke(web, token, at).await, &SqlState::CONFIGURATION_LIMIT_EXCEEDED);
    }
    Ok(())
}
