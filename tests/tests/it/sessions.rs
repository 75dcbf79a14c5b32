//! Sessions inside the server: opened, refreshed, listed and ended by ordinary roles. Time passes by changing the rows.

use std::sync::Arc;

use crate::common::{self, Shared, authenticate, refused, value, wait_until_blocked};
use crate::operator::Db;
use anyhow::{Context as _, Result};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use tollgate_core::refresh::{self, Key, Subject};
use uuid::Uuid;

/// As every test server is configured.
const ISSUER: &str = "https://tollgate.test";

static SHARED: Shared = Shared::new(&[]);

/// A database with a signing key, and an application that may issue.
struct World {
    db: Db,
    /// An ordinary role with the capability issuer.
    backend: Client,
}

struct Opened {
    session: Uuid,
    access: String,
    refresh: String,
}

#[derive(Debug)]
struct Refreshed {
    code: String,
    session: Option<Uuid>,
    access: Option<String>,
    refresh: Option<String>,
    scopes: Option<Vec<String>>,
}

impl Refreshed {
    fn next(self) -> Result<String> {
        let code = self.code;
        self.refresh.with_context(|| format!("{code} instead of a token"))
    }
}

impl World {
    async fn create(name: &str) -> Result<Self> {
        let db = Db::create(&SHARED.cluster()?, name).await?;
        db.owner
            .batch_execute(
                "do $$ begin create role backend login; exception when duplicate_object or unique_violation then end $$;
                 select tollgate.grant_capability('backend', 'issuer');
                 select tollgate.grant_capability('web', 'verifier');
                 select tollgate.create_signing_key()",
            )
            .await?;
        let backend = db.session("backend").await?;
        Ok(Self { db, backend })
    }

    /// With further arguments in SQL.
    async fn open(&self, user: &str, arguments: &str) -> Result<Opened> {
        open(&self.backend, user, arguments).await
    }

    async fn refresh(&self, token: &str, arguments: &str) -> Result<Refreshed> {
        Ok(refresh(&self.backend, token, arguments).await?)
    }

    async fn code(&self, token: &str) -> Result<String> {
        Ok(self.refresh(token, "").await?.code)
    }

    /// The code of a verification.
    async fn verified(&self, access: &str) -> Result<String> {
        verified(&self.db.web, access).await
    }

    /// As if the last refresh of each session were so much longer ago.
    async fn pass(&self, time: &str) -> Result<()> {
        let pass = format!("update tollgate.sessions set refreshed_at = refreshed_at - interval '{time}'");
        Ok(self.db.owner.batch_execute(&pass).await?)
    }

    /// The names of the events of a session.
    async fn events(&self, session: Uuid) -> Result<Vec<String>> {
        Ok(common::history(&self.db.owner, session).await?.into_iter().map(|(event, _)| event).collect())
    }

    /// The detail of the last one of these events.
    async fn detail(&self, session: Uuid, event: &str) -> Result<Value> {
        let all = common::history(&self.db.owner, session).await?;
        let last = all.into_iter().rev().find(|(name, _)| name == event);
        Ok(last.with_context(|| event.to_owned())?.1)
    }

    async fn listed(&self, user: &str) -> Result<i64> {
        value(&self.backend, &format!("select count(*) from tollgate.list_sessions('{user}')")).await
    }
}

async fn open(client: &Client, user: &str, arguments: &str) -> Result<Opened> {
    let call = format!(
        "select session_id, access_token, refresh_token from tollgate.open_session($1, '{{posts:read,posts:write}}'{arguments})"
    );
    let row = client.query_one(&call, &[&user]).await?;
    Ok(Opened { session: row.get(0), access: row.get(1), refresh: row.get(2) })
}

async fn refresh(client: &Client, token: &str, arguments: &str) -> Result<Refreshed, tokio_postgres::Error> {
    let call = format!("select * from tollgate.refresh_session($1{arguments})");
    let row = client.query_one(&call, &[&token]).await?;
    Ok(Refreshed {
        code: row.get("code"),
        session: row.get("session_id"),
        access: row.get("access_token"),
        refresh: row.get("refresh_token"),
        scopes: row.get("scopes"),
    })
}

async fn verified(client: &Client, access: &str) -> Result<String> {
    let call = "select code from tollgate.verify_access_token($1)";
    Ok(client.query_one(call, &[&access]).await?.get(0))
}

fn claims(access: &str) -> Result<Value> {
    let payload = access.split('.').nth(1).context("a payload")?;
    Ok(serde_json::from_slice(&URL_SAFE_NO_PAD.decode(payload)?)?)
}

/// The CRC-32 of IEEE 802.3.
fn checksum(text: &str) -> u32 {
    !text.bytes().fold(u32::MAX, |sum, byte| {
        (0..8).fold(sum ^ u32::from(byte), |sum, _| (sum >> 1) ^ (0xedb8_8320 & (sum & 1).wrapping_neg()))
    })
}

// ---- Opening and refreshing

#[tokio::test]
async fn a_session_is_opened_refreshed_and_named_by_its_access_tokens() -> Result<()> {
    let world = World::create("session_opened").await?;
    let opened = world
        .open("ann", ", client_id => 'app', label => 'Phone', client_ip => '203.0.113.7', claims => '{\"plan\": \"pro\"}'")
        .await?;
    let refreshed = world.refresh(&opened.refresh, ", 'app', client_ip => '203.0.113.7'").await?;
    assert_eq!((refreshed.code.as_str(), refreshed.session), ("VALID", Some(opened.session)));
    let access = refreshed.access.context("an access token")?;
    let second = refreshed.refresh.context("a refresh token")?;
    assert_ne!(second, opened.refresh);
    for token in [&opened.access, &access] {
        let claims = claims(token)?;
        for (claim, expected) in [
            ("sid", json!(opened.session)),
            ("client_id", json!("app")),
            ("sub", json!("ann")),
            ("scope", json!("posts:read posts:write")),
            ("plan", json!("pro")),
        ] {
            assert_eq!(claims[claim], expected, "{claim}");
        }
        assert_eq!(world.verified(token).await?, "VALID");
    }
    world.db.web.batch_execute("begin").await?;
    authenticate(&world.db.web, &access).await?;
    assert_eq!(value::<Uuid>(&world.db.web, "select tollgate.current_session_id()").await?, opened.session);
    world.db.web.batch_execute("commit").await?;
    let none = "select tollgate.current_session_id() is null";
    assert!(value::<bool>(&world.db.web, none).await?);

    let row = world
        .backend
        .query_one("select to_jsonb(s) from tollgate.list_sessions('ann') s", &[])
        .await?
        .get::<_, Value>(0);
    for (column, expected) in [
        ("id", json!(opened.session)),
        ("client_id", json!("app")),
        ("label", json!("Phone")),
        ("refreshes", json!(1)),
        ("opened_from", json!("203.0.113.7")),
        ("last_address", json!("203.0.113.7")),
    ] {
        assert_eq!(row[column], expected, "{column}");
    }
    // A refresh leaves no event, and no token is stored.
    assert_eq!(world.events(opened.session).await?, ["session.opened"]);
    let stored: String =
        value(&world.db.owner, "select (select s::text from tollgate.sessions s) || (select jsonb_agg(a)::text from tollgate.audit_log a)").await?;
    for token in [&opened.refresh, &second] {
        assert!(!stored.contains(&token[52..116]), "the MAC is stored");
    }
    world.refresh(&second, ", 'app', client_ip => '198.51.100.1'").await?.next()?;
    assert_eq!(
        world.detail(opened.session, "session.address_changed").await?,
        json!({"client_ip": "198.51.100.1", "last_address": "203.0.113.7"})
    );
    let counters: Value = value(&world.db.owner, "select sessions from tollgate.stats()").await?;
    assert!(
        counters["opened"].as_i64() >= Some(1) && counters["refreshed"].as_i64() >= Some(2),
        "{counters}"
    );
    Ok(())
}

#[tokio::test]
async fn an_access_token_ends_with_its_session() -> Result<()> {
    let world = World::create("session_short").await?;
    let ends = "select extract(epoch from expires_at)::bigint from tollgate.sessions";
    for arguments in [", lifetime => '5 minutes'", ", idle => '5 minutes'"] {
        world.db.owner.batch_execute("delete from tollgate.sessions").await?;
        let opened = world.open("ann", arguments).await?;
        let exp = claims(&opened.access)?["exp"].as_i64().context("exp")?;
        let iat = claims(&opened.access)?["iat"].as_i64().context("iat")?;
        assert_eq!(exp - iat, 300, "{arguments}");
        assert!(exp <= value::<i64>(&world.db.owner, ends).await?);
        world.pass("200 seconds").await?;
        let shifted = "update tollgate.sessions set expires_at = expires_at - interval '200 seconds'";
        world.db.owner.batch_execute(shifted).await?;
        let next = world.refresh(&opened.refresh, "").await?;
        let next = claims(&next.access.context("an access token")?)?;
        assert!(next["exp"].as_i64() <= Some(value::<i64>(&world.db.owner, ends).await?), "{arguments}");
    }
    Ok(())
}

#[tokio::test]
async fn the_same_token_again_within_the_grace_gets_the_same_successor() -> Result<()> {
    let world = World::create("session_retry").await?;
    let at = ", client_ip => '203.0.113.7'";
    let opened = world.open("ann", at).await?;
    let second = world.refresh(&opened.refresh, at).await?.next()?;
    for _ in 0..2 {
        assert_eq!(world.refresh(&opened.refresh, at).await?.next()?, second);
    }
    assert_eq!(world.events(opened.session).await?, ["session.opened"]);
    // A thief right behind the owner is seen, once for each refresh.
    for _ in 0..3 {
        let elsewhere = world.refresh(&opened.refresh, ", client_ip => '198.51.100.66'").await?;
        assert_eq!(elsewhere.next()?, second);
    }
    assert_eq!(world.events(opened.session).await?, ["session.opened", "session.retried_elsewhere"]);
    let detail = world.detail(opened.session, "session.retried_elsewhere").await?;
    assert_eq!(
        (&detail["client_ip"], &detail["last_address"]),
        (&json!("198.51.100.66"), &json!("203.0.113.7"))
    );
    let third = world.refresh(&second, at).await?.next()?;
    world.refresh(&second, ", client_ip => '198.51.100.66'").await?.next()?;
    assert_eq!(world.events(opened.session).await?.len(), 3, "and again for the next");

    // Or refused, by a setting that the application cannot change.
    refused(
        world.backend.batch_execute("set tollgate.refresh_grace_same_address = on").await,
        &SqlState::INSUFFICIENT_PRIVILEGE,
    );
    world
        .db
        .owner
        .batch_execute("alter database session_retry set tollgate.refresh_grace_same_address = on")
        .await?;
    let strict = world.db.session("backend").await?;
    assert_eq!(refresh(&strict, &second, at).await?.next()?, third);
    assert_eq!(refresh(&strict, &second, ", client_ip => '198.51.100.66'").await?.code, "REUSED");
    assert_eq!(world.code(&third).await?, "REVOKED");
    Ok(())
}

#[tokio::test]
async fn of_many_refreshes_of_one_token_at_once_there_is_one_successor() -> Result<()> {
    let world = Arc::new(World::create("session_parallel").await?);
    let opened = world.open("ann", "").await?;
    // All of them find the row as it is now, and wait for it.
    world.db.owner.batch_execute("begin; update tollgate.sessions set label = 'held'").await?;
    let mut waiting = Vec::new();
    for _ in 0..6 {
        let client = world.db.session("backend").await?;
        let token = opened.refresh.clone();
        waiting.push(tokio::spawn(async move { refresh(&client, &token, "").await }));
    }
    wait_until_blocked(&world.db.owner).await?;
    world.db.owner.batch_execute("commit").await?;
    let mut successors = Vec::new();
    for one in waiting {
        successors.push(one.await??.next()?);
    }
    successors.dedup();
    assert_eq!(successors.len(), 1);
    let generation = "select generation from tollgate.sessions";
    assert_eq!(value::<i64>(&world.db.owner, generation).await?, 2);
    Ok(())
}

// ---- Theft

#[tokio::test]
async fn a_token_that_was_replaced_ends_its_session_whenever_it_comes_back() -> Result<()> {
    let world = World::create("session_reused").await?;
    let at = ", client_ip => '203.0.113.7'";
    // The one before the latest, after the grace; and an old one, at once.
    for (rounds, pause) in [(1, "11 seconds"), (5, "0")] {
        let opened = world.open("ann", at).await?;
        let mut latest = opened.refresh.clone();
        let mut access = String::new();
        for _ in 0..rounds {
            let refreshed = world.refresh(&latest, at).await?;
            access = refreshed.access.clone().context("an access token")?;
            latest = refreshed.next()?;
        }
        world.pass(pause).await?;
        assert_eq!(world.verified(&access).await?, "VALID");
        let thief = ", client_ip => '198.51.100.66'";
        let answer = world.refresh(&opened.refresh, thief).await?;
        assert_eq!((answer.code.as_str(), answer.session), ("REUSED", Some(opened.session)));
        assert!(answer.access.is_none() && answer.refresh.is_none() && answer.scopes.is_none(), "{answer:?}");
        let events = ["session.opened", "session.reuse_detected", "session.revoked"];
        assert_eq!(world.events(opened.session).await?, events);
        let detail = world.detail(opened.session, "session.reuse_detected").await?;
        assert_eq!(
            json!([detail["client_ip"], detail["last_address"], detail["generation"], detail["latest"]]),
            json!(["198.51.100.66", "203.0.113.7", 1, rounds + 1])
        );
        // All that came of it is over, the owner's too.
        for token in [&opened.refresh, &latest] {
            assert_eq!(world.code(token).await?, "REVOKED");
        }
        for token in [&opened.access, &access] {
            assert_eq!(world.verified(token).await?, "REVOKED");
        }
        assert_eq!(world.events(opened.session).await?, events, "once");
        assert_eq!(world.listed("ann").await?, 0);
    }
    Ok(())
}

#[tokio::test]
async fn a_token_that_was_made_up_is_not_found_and_changes_nothing() -> Result<()> {
    let world = World::create("session_forged").await?;
    let (opened, other) = (world.open("ann", "").await?, world.open("ben", "").await?);
    let secret: Vec<u8> = world
        .db
        .owner
        .query_one("select secret from tollgate.sessions where user_id = 'ann'", &[])
        .await?
        .get(0);
    let secret: [u8; 32] = secret.try_into().map_err(|_| anyhow::anyhow!("32 bytes"))?;
    let forged = |session: &Uuid, generation: i64| {
        let subject = Subject { issuer: ISSUER, session: session.as_bytes(), secret: &secret };
        Key::generate().map(|key| key.issue(&subject, generation).to_string())
    };
    let parse = |token: &str| refresh::parse(token.as_bytes()).is_some();
    // With the whole row, and without the key.
    for generation in [1, 2, 3] {
        let token = forged(&opened.session, generation).map_err(|_| anyhow::anyhow!("no randomness"))?;
        assert!(parse(&token));
        assert_eq!(world.code(&token).await?, "NOT_FOUND", "{generation}");
    }
    let unknown = forged(&Uuid::new_v4(), 1).map_err(|_| anyhow::anyhow!("no randomness"))?;
    assert_eq!(world.code(&unknown).await?, "NOT_FOUND");
    // The MAC of another session of the same database.
    let swapped = format!("{}{}", &opened.refresh[..52], &other.refresh[52..116]);
    let swapped = format!("{swapped}{:08x}", checksum(&swapped[4..]));
    assert!(parse(&swapped));
    assert_eq!(world.code(&swapped).await?, "NOT_FOUND");
    for junk in ["", "tgr_", &opened.refresh[..123], &opened.access, &opened.refresh.to_uppercase()] {
        assert_eq!(world.code(junk).await?, "MALFORMED", "{junk}");
    }
    let null = "select (tollgate.refresh_session(null)).code";
    assert_eq!(value::<String>(&world.backend, null).await?, "MALFORMED");
    for opened in [&opened, &other] {
        assert_eq!(world.events(opened.session).await?, ["session.opened"]);
        world.refresh(&opened.refresh, "").await?.next()?;
    }
    // Nor does a refresh token pass for another credential.
    let call = "select code from tollgate.verify_api_token($1)";
    let code: String = world.db.web.query_one(call, &[&opened.refresh]).await?.get(0);
    assert_eq!(code, "MALFORMED");
    Ok(())
}

#[tokio::test]
async fn another_client_finds_no_session_and_leaves_an_event_a_minute() -> Result<()> {
    let world = World::create("session_clients").await?;
    let opened = world.open("ann", ", client_id => 'app'").await?;
    for other in ["", ", 'other'", ", 'APP'", ", 'app '"] {
        let answer = world.refresh(&opened.refresh, other).await?;
        assert_eq!((answer.code.as_str(), answer.session), ("NOT_FOUND", None), "{other}");
    }
    assert_eq!(world.events(opened.session).await?, ["session.opened", "session.client_mismatch"]);
    assert_eq!(world.detail(opened.session, "session.client_mismatch").await?, json!({"client_id": "app"}));
    let minute = "update tollgate.sessions set mismatch_at = mismatch_at - interval '1 minute'";
    world.db.owner.batch_execute(minute).await?;
    // What it says of itself may be anything, a token too.
    let pasted = format!(", 'my {}'", opened.refresh);
    assert_eq!(world.refresh(&opened.refresh, &pasted).await?.code, "NOT_FOUND");
    let detail = world.detail(opened.session, "session.client_mismatch").await?;
    assert_eq!(detail["presented_by"], "my tgr_…");
    world.refresh(&opened.refresh, ", 'app'").await?.next()?;
    // Even the oldest token ends nothing in another's hands.
    world.pass("11 seconds").await?;
    assert_eq!(world.refresh(&opened.refresh, ", 'other'").await?.code, "NOT_FOUND");
    assert_eq!(world.listed("ann").await?, 1);
    let unbound = world.open("ann", "").await?;
    assert_eq!(world.refresh(&unbound.refresh, ", 'any'").await?.code, "VALID");
    Ok(())
}

#[tokio::test]
async fn too_many_failed_attempts_from_an_address_are_refused() -> Result<()> {
    let world = World::create("session_guesses").await?;
    let opened = world.open("ann", "").await?;
    world
        .db
        .owner
        .batch_execute("alter database session_guesses set tollgate.failure_rate_limit = 2")
        .await?;
    let client = world.db.session("backend").await?;
    let at = ", client_ip => '203.0.113.99'";
    for _ in 0..2 {
        assert_eq!(refresh(&client, "junk", at).await?.code, "MALFORMED");
    }
    let answer = refresh(&client, &opened.refresh, at).await?;
    assert_eq!((answer.code.as_str(), answer.session, answer.refresh), ("RATE_LIMITED", None, None));
    refresh(&client, &opened.refresh, ", client_ip => '203.0.113.98'").await?.next()?;
    Ok(())
}

// ---- Scopes, ends, arguments

#[tokio::test]
async fn scopes_are_narrowed_for_one_access_token_and_never_widened() -> Result<()> {
    let world = World::create("session_scopes").await?;
    let opened = world.open("ann", "").await?;
    for wider in
        ["{admin}", "{posts:*}", "{posts:read,users:read}", "{posts:read,NULL}", "{\"\"}", "{Posts:Read}"]
    {
        let answer = world.refresh(&opened.refresh, &format!(", scopes => '{wider}'")).await?;
        assert_eq!(answer.code, "INSUFFICIENT_SCOPE", "{wider}");
        assert_eq!((answer.session, answer.refresh), (Some(opened.session), None));
    }
    let narrow = world.refresh(&opened.refresh, ", scopes => '{posts:read,posts:read}'").await?;
    assert_eq!(narrow.scopes.as_deref(), Some(&["posts:read".to_owned()][..]));
    assert_eq!(claims(narrow.access.as_deref().context("an access token")?)?["scope"], "posts:read");
    let whole = world.refresh(&narrow.next()?, "").await?;
    assert_eq!(whole.scopes.map(|scopes| scopes.len()), Some(2), "the session keeps its scopes");
    Ok(())
}

#[tokio::test]
async fn a_session_is_over_at_its_end_and_when_it_was_idle() -> Result<()> {
    let world = World::create("session_ends").await?;
    let (idle, ended) = (world.open("ann", ", idle => '1 hour'").await?, world.open("ben", "").await?);
    world
        .db
        .owner
        .batch_execute(
            "update tollgate.sessions set refreshed_at = now() - interval '61 minutes' where user_id = 'ann';
             update tollgate.sessions set expires_at = now() where user_id = 'ben'",
        )
        .await?;
    for opened in [&idle, &ended] {
        let answer = world.refresh(&opened.refresh, "").await?;
        assert_eq!((answer.code.as_str(), answer.session), ("EXPIRED", Some(opened.session)));
    }
    assert_eq!((world.listed("ann").await?, world.listed("ben").await?), (0, 0));
    Ok(())
}

#[tokio::test]
async fn bad_arguments_are_refused() -> Result<()> {
    let world = World::create("session_arguments").await?;
    for arguments in [
        "null, '{}'",
        "'ann', null",
        "'ann', '{undefined:scope}'",
        "'ann', '{}', '{}'",
        "'ann', '{}', client_id => ''",
        "'ann', '{}', client_id => 'a' || chr(10)",
        "'ann', '{}', client_id => repeat('a', 256)",
        "'ann', '{}', lifetime => null",
        "'ann', '{}', lifetime => '0'",
        "'ann', '{}', lifetime => '-1 day'",
        "'ann', '{}', lifetime => '367 days'",
        "'ann', '{}', idle => '178000000 years'",
        "'ann', '{}', label => repeat('a', 101)",
        "'ann', '{}', label => repeat('a', 80)",
        "'ann', '{}', claims => '[]'",
        "'ann', '{}', claims => '{\"sid\": 1}'",
    ] {
        refused(
            world.backend.query_one(&format!("select tollgate.open_session({arguments})"), &[]).await,
            &SqlState::INVALID_PARAMETER_VALUE,
        );
    }
    for call in [
        "list_sessions(null)",
        "revoke_all_sessions('')",
        "revoke_session(null, reason => repeat('x', 1001))",
    ] {
        refused(
            world.backend.query(&format!("select tollgate.{call}"), &[]).await,
            &SqlState::INVALID_PARAMETER_VALUE,
        );
    }
    world.backend.batch_execute("begin read only").await?;
    refused(
        world.backend.query_one("select tollgate.open_session('ann', '{}')", &[]).await,
        &SqlState::READ_ONLY_SQL_TRANSACTION,
    );
    Ok(())
}

// ---- Ending

#[tokio::test]
async fn a_revoked_session_is_over_at_once_with_its_access_tokens() -> Result<()> {
    let world = World::create("session_revoked").await?;
    let opened = world.open("ann", "").await?;
    let (second, third) = (world.open("ann", "").await?, world.open("ann", "").await?);
    let older = world.db.session("web").await?;
    older.batch_execute("begin isolation level repeatable read").await?;
    assert_eq!(verified(&older, &opened.access).await?, "VALID");
    let revoke = async |arguments: &str| -> Result<bool> {
        value(&world.backend, &format!("select tollgate.revoke_session({arguments})")).await
    };
    assert!(!revoke(&format!("'{}', 'ben'", opened.session)).await?, "another user's");
    assert!(!revoke(&format!("'{}'", Uuid::new_v4())).await?);
    assert!(!revoke("null").await?);
    assert!(revoke(&format!("'{}', 'ann', 'signed out'", opened.session)).await?);
    assert!(!revoke(&format!("'{}'", opened.session)).await?, "already");
    assert_eq!(world.detail(opened.session, "session.revoked").await?, json!({"reason": "signed out"}));
    assert_eq!(world.code(&opened.refresh).await?, "REVOKED");
    assert_eq!(world.verified(&opened.access).await?, "REVOKED");
    assert_eq!(verified(&older, &opened.access).await?, "REVOKED", "in an older snapshot too");
    // A row that is gone is no session either.
    assert_eq!(world.verified(&second.access).await?, "VALID");
    let all = "select tollgate.revoke_all_sessions('ann')";
    assert_eq!(value::<i64>(&world.backend, all).await?, 2);
    assert_eq!(value::<i64>(&world.backend, all).await?, 0);
    for opened in [&second, &third] {
        assert_eq!(world.verified(&opened.access).await?, "REVOKED");
    }
    let fourth = world.open("ann", "").await?;
    world.db.owner.batch_execute("delete from tollgate.sessions").await?;
    assert_eq!(world.verified(&fourth.access).await?, "REVOKED");
    assert_eq!(world.code(&fourth.refresh).await?, "NOT_FOUND");
    Ok(())
}

#[tokio::test]
async fn any_refresh_token_of_a_session_ends_it_when_it_is_given_up() -> Result<()> {
    let world = World::create("session_given_up").await?;
    let opened = world.open("ann", "").await?;
    let latest = world.refresh(&opened.refresh, "").await?.next()?;
    let give_up = async |token: &str| -> Result<bool> {
        let call = "select tollgate.revoke_presented_token($1, 'leaked')";
        Ok(world.db.web.query_one(call, &[&token]).await?.get(0))
    };
    let forged = Key::generate().map_err(|_| anyhow::anyhow!("no randomness"))?;
    let subject = Subject { issuer: ISSUER, session: opened.session.as_bytes(), secret: &[0; 32] };
    assert!(!give_up(&forged.issue(&subject, 1)).await?);
    assert!(!give_up(&latest[..100]).await?);
    assert!(give_up(&opened.refresh).await?, "an old one");
    assert!(!give_up(&latest).await?, "already");
    assert_eq!(world.code(&latest).await?, "REVOKED");
    assert_eq!(world.detail(opened.session, "session.revoked").await?, json!({"reason": "leaked"}));
    Ok(())
}

#[tokio::test]
async fn revoke_user_ends_sessions_and_a_login_right_after_it_works() -> Result<()> {
    let world = World::create("session_users").await?;
    let (anns, bens) = (world.open("ann", "").await?, world.open("ben", "").await?);
    // One that is being opened: it has the earlier mark.
    let opening = world.db.session("backend").await?;
    opening.batch_execute("begin").await?;
    let late = open(&opening, "ann", "").await?;
    world.backend.batch_execute("select tollgate.revoke_user('ann', 'left')").await?;
    let again = world.open("ann", "").await?;
    opening.batch_execute("commit").await?;
    for (opened, code) in [(&anns, "REVOKED"), (&late, "REVOKED"), (&again, "VALID"), (&bens, "VALID")] {
        assert_eq!(world.verified(&opened.access).await?, code);
        assert_eq!(world.code(&opened.refresh).await?, code);
    }
    assert_eq!(world.listed("ann").await?, 1);
    assert_eq!(world.events(anns.session).await?, ["session.opened", "session.revoked"]);
    let detail = "select detail from tollgate.audit_log where event = 'user.revoked'";
    assert_eq!(
        value::<Value>(&world.db.owner, detail).await?,
        json!({"reason": "left", "tokens": 0, "sessions": 1})
    );
    // When the mark is purged, the one that slipped through does not come back.
    world
        .db
        .owner
        .batch_execute("update tollgate.revoked_users set revoked_at = now() - interval '193 hours'")
        .await?;
    assert_eq!(value::<i64>(&world.db.operator, "select tollgate.purge_denials(10)").await?, 1);
    assert_eq!(world.code(&late.refresh).await?, "REVOKED");
    assert_eq!(world.events(late.session).await?, ["session.opened", "session.revoked"]);
    assert_eq!(world.listed("ann").await?, 1);
    Ok(())
}

#[tokio::test]
async fn a_user_who_leaves_an_attached_table_or_is_not_active_has_no_session() -> Result<()> {
    let world = World::create("session_leavers").await?;
    let before = world.open("dan", "").await?;
    world
        .db
        .owner
        .batch_execute(
            "create table public.users (id text primary key, active boolean not null default true);
             insert into public.users values ('ann'), ('ben'), ('cat'), ('dan');
             update public.users set active = false where id = 'dan';
             select tollgate.attach_users_table('public.users', 'id', active => 'active')",
        )
        .await?;
    assert_eq!(world.code(&before.refresh).await?, "REVOKED", "inactive when the table was attached");
    let (ann, ben, cat) =
        (world.open("ann", "").await?, world.open("ben", "").await?, world.open("cat", "").await?);
    world
        .db
        .owner
        .batch_execute("delete from users where id = 'ann'; update users set active = false where id = 'ben'")
        .await?;
    for (opened, code) in [(&ann, "REVOKED"), (&ben, "REVOKED"), (&cat, "VALID")] {
        assert_eq!(world.verified(&opened.access).await?, code);
        assert_eq!(world.code(&opened.refresh).await?, code);
    }
    let detail = world.detail(ann.session, "session.revoked").await?;
    assert_eq!(detail["reason"], "the user was deleted");
    for (user, state) in
        [("ann", SqlState::FOREIGN_KEY_VIOLATION), ("ben", SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE)]
    {
        let call = "select tollgate.open_session($1, '{}')";
        let error = common::error(world.backend.query_one(call, &[&user]).await);
        assert_eq!(error.code(), &state, "{user}");
    }
    world.db.owner.batch_execute("update users set active = true where id = 'ben'").await?;
    assert_eq!(world.code(&ben.refresh).await?, "REVOKED", "it takes a login");
    world.db.owner.batch_execute("truncate users").await?;
    assert_eq!(world.verified(&cat.access).await?, "REVOKED");
    Ok(())
}

// ---- Keys

#[tokio::test]
async fn a_session_keeps_its_key_which_is_never_published_and_ends_with_it() -> Result<()> {
    let world = World::create("session_keys").await?;
    let first = world.open("ann", "").await?;
    let keys = "select count(*) from tollgate.signing_keys where purpose = 'refresh_token'";
    assert_eq!(value::<i64>(&world.db.owner, keys).await?, 1);
    let published = "select count(*) from jsonb_array_elements(tollgate.jwks() -> 'keys')";
    assert_eq!(value::<i64>(&world.db.owner, published).await?, 1, "the signing key alone");
    // Rotation by the daemon, as if three months had passed: the next day's sessions have another key.
    let pass = async |time: &str| {
        let pass = format!(
            "update tollgate.sealed_keys set signs_from = signs_from - interval '{time}',
                 retires_at = retires_at - interval '{time}', verifies_until = verifies_until - interval '{time}'"
        );
        world.db.owner.batch_execute(&pass).await
    };
    pass("89 days").await?;
    world.db.operator.batch_execute("select tollgate.rotate_due_signing_key('90 days')").await?;
    pass("24 hours").await?;
    let second = world.open("ann", "").await?;
    let kids = "select count(distinct kid) from tollgate.sessions";
    assert_eq!(value::<i64>(&world.db.owner, kids).await?, 2);
    pass("300 days").await?;
    world.db.owner.batch_execute("select tollgate.create_signing_key(signs_in => '0')").await?;
    let (mut latest, mut access) = (Vec::new(), Vec::new());
    for opened in [&first, &second] {
        let refreshed = world.refresh(&opened.refresh, "").await?;
        access.push(refreshed.access.clone().context("an access token")?);
        latest.push(refreshed.next()?);
    }
    // A year after it made its last session, it is erased.
    let until = "select bool_and(verifies_until = retires_at + interval '367 days') from tollgate.sealed_keys
                 where purpose = 'refresh_token' and retires_at is not null";
    assert!(value::<bool>(&world.db.owner, until).await?);

    assert_eq!(world.verified(&access[0]).await?, "VALID");
    let withdraw =
        "select tollgate.withdraw_signing_key(s.kid, 'leaked') from tollgate.sessions s where s.id = $1";
    assert!(world.db.owner.query_one(withdraw, &[&first.session]).await?.get::<_, bool>(0));
    assert_eq!(world.code(&latest[0]).await?, "REVOKED");
    assert_eq!(
        (world.verified(&access[0]).await?, world.verified(&access[1]).await?),
        ("REVOKED".into(), "VALID".into())
    );
    assert_eq!(world.listed("ann").await?, 1);
    world.refresh(&latest[1], "").await?.next()?;
    assert!(world.db.owner.query_one(withdraw, &[&second.session]).await?.get::<_, bool>(0));
    let third = world.open("ann", "").await?;
    world.refresh(&third.refresh, "").await?.next()?;
    assert_eq!(value::<i64>(&world.db.owner, keys).await?, 3, "the next session has made one");
    // It is no key of tokens that others verify, nor does anyone import one.
    for call in ["create_signing_key('HS256')", "test_signing_key('none')"] {
        common::error(world.db.owner.query_one(&format!("select tollgate.{call}"), &[]).await);
    }
    Ok(())
}

// ---- Transactions

#[tokio::test]
async fn a_refresh_that_is_rolled_back_did_not_happen_and_an_older_snapshot_must_try_again() -> Result<()> {
    let world = World::create("session_snapshots").await?;
    let opened = world.open("ann", "").await?;
    world.backend.batch_execute("begin").await?;
    let lost = world.refresh(&opened.refresh, "").await?.next()?;
    assert_eq!(world.refresh(&lost, "").await?.code, "VALID", "within the transaction it is refreshed");
    world.backend.batch_execute("rollback").await?;
    assert_eq!(world.refresh(&opened.refresh, "").await?.next()?, lost, "the same successor");

    world.backend.batch_execute("begin isolation level repeatable read; select 1").await?;
    let elsewhere = world.db.session("backend").await?;
    let third = refresh(&elsewhere, &lost, "").await?.next()?;
    let new = open(&elsewhere, "ann", "").await?;
    // What it would change it does not see.
    refused(refresh(&world.backend, &third, "").await, &SqlState::T_R_SERIALIZATION_FAILURE);
    world.backend.batch_execute("rollback").await?;
    for call in ["revoke_all_sessions('ann')".to_owned(), format!("revoke_session('{}')", new.session)] {
        world.backend.batch_execute("begin isolation level repeatable read; select 1").await?;
        let newest = open(&elsewhere, "ann", "").await?;
        let call = call.replace(&new.session.to_string(), &newest.session.to_string());
        refused(
            world.backend.query_one(&format!("select tollgate.{call}"), &[]).await,
            &SqlState::T_R_SERIALIZATION_FAILURE,
        );
        world.backend.batch_execute("rollback").await?;
    }
    assert_eq!(world.code(&third).await?, "VALID");
    Ok(())
}

#[tokio::test]
async fn one_refresh_that_a_failover_lost_is_recovered_once() -> Result<()> {
    let world = World::create("session_failover").await?;
    let opened = world.open("ann", "").await?;
    let second = world.refresh(&opened.refresh, "").await?.next()?;
    // As if the standby that was promoted had not received it.
    let lose = "update tollgate.sessions set generation = generation - 1,
                    refreshed_at = (select min(begun_at) from tollgate.audit_epochs) - interval '1 second'";
    world.db.owner.batch_execute(lose).await?;
    let third = world.refresh(&second, "").await?.next()?;
    assert_eq!(
        world.detail(opened.session, "session.recovered").await?,
        json!({"generation": 2, "latest": 1})
    );
    let fourth = world.refresh(&third, "").await?.next()?;
    // On the same timeline nothing is lost.
    world.db.owner.batch_execute("update tollgate.sessions set generation = generation - 1").await?;
    assert_eq!(world.code(&fourth).await?, "REUSED");

    // Two refreshes are one too many.
    let opened = world.open("ann", "").await?;
    let second = world.refresh(&opened.refresh, "").await?.next()?;
    let third = world.refresh(&second, "").await?.next()?;
    world.db.owner.batch_execute("delete from tollgate.sessions where revoked_at is not null").await?;
    world.db.owner.batch_execute(&lose.replace("generation - 1", "generation - 2")).await?;
    assert_eq!(world.code(&third).await?, "REUSED");
    Ok(())
}

// ---- For the daemon

#[tokio::test]
async fn sessions_are_announced_invalidated_and_purged() -> Result<()> {
    let world = World::create("session_housekeeping").await?;
    let operator = &world.db.operator;
    let announce = "select tollgate.announce_session_expiries('7 days', 10)";
    let mut opened = Vec::new();
    for arguments in ["", ", lifetime => '8 days'", ", lifetime => '1 day'"] {
        opened.push(world.open("ann", arguments).await?);
    }
    assert_eq!(value::<i64>(operator, announce).await?, 1, "the short one, without an event");
    let nearer = "update tollgate.sessions set expires_at = now() + interval '6 days',
                      created_at = now() - interval '2 days', label = 'x' where id = $1";
    world.db.owner.execute(nearer, &[&opened[1].session]).await?;
    assert_eq!(value::<i64>(operator, announce).await?, 1);
    assert_eq!(value::<i64>(operator, announce).await?, 0, "once");
    assert_eq!(world.events(opened[1].session).await?, ["session.opened", "session.expires_soon"]);
    assert_eq!(world.events(opened[2].session).await?, ["session.opened"]);
    assert_eq!(world.detail(opened[1].session, "session.expires_soon").await?["label"], "x");

    let old = "update tollgate.sessions set refreshed_at = now() - interval '2 days' where id = $1";
    world.db.owner.execute(old, &[&opened[0].session]).await?;
    let invalidate = "select tollgate.invalidate_sessions(now() - interval '1 day')";
    assert_eq!(value::<i64>(operator, invalidate).await?, 1);
    assert_eq!(value::<i64>(operator, invalidate).await?, 0);
    let codes = (world.code(&opened[0].refresh).await?, world.code(&opened[1].refresh).await?);
    assert_eq!(codes, ("REVOKED".to_owned(), "VALID".to_owned()));
    for bad in ["null", "'infinity'", "now() + interval '2 days'"] {
        refused(
            operator.query_one(&format!("select tollgate.invalidate_sessions({bad})"), &[]).await,
            &SqlState::INVALID_PARAMETER_VALUE,
        );
    }

    let purge = "select tollgate.purge_sessions('30 days', 10)";
    assert_eq!(value::<i64>(operator, purge).await?, 0);
    world
        .db
        .owner
        .batch_execute(&format!(
            "update tollgate.sessions set revoked_at = now() - interval '31 days' where id = '{}';
             update tollgate.sessions set refreshed_at = now() - interval '38 days' where id = '{}'",
            opened[0].session, opened[1].session
        ))
        .await?;
    // Many more than a page, of which the operator's calls find the ended ones wherever the last one stopped.
    world
        .db
        .owner
        .batch_execute(
            "insert into tollgate.sessions select gen_random_uuid(), 'many', null, s.kid, s.secret, 1, now(), s.idle, s.expires_at, null, null,
                    null, s.scopes, s.audience, s.claims, null, now()
             from (select * from tollgate.sessions limit 1) s, generate_series(1, 2500)",
        )
        .await?;
    let mut purged = 0;
    for _ in 0..3 {
        purged += value::<i64>(operator, "select tollgate.purge_sessions('30 days', 1)").await?;
    }
    assert_eq!(purged, 2);
    assert_eq!(value::<i64>(&world.db.owner, "select count(*) from tollgate.sessions").await?, 2501);
    refused(
        operator.query_one("select tollgate.purge_sessions('-1 day')", &[]).await,
        &SqlState::INVALID_PARAMETER_VALUE,
    );
    // All of them, in pages.
    let all = "select tollgate.invalidate_sessions(now() + interval '1 minute')";
    assert_eq!(value::<i64>(operator, all).await?, 2501);
    assert_eq!(world.listed("many").await?, 0);
    Ok(())
}
