//! Token exchange by ordinary roles: what comes of which token, that nothing is widened on the way, and that what comes of a
//! token ends with it.

use std::sync::Arc;

use crate::ancestry::{AUDIENCE, ISSUER, World};
use crate::common::{self, Shared, Token, authenticate, issue, issue_with, now, refused, value};
use crate::operator::{Db, counts, flush_all};
use anyhow::{Context as _, Result};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use tollgate_core::jws;
use tollgate_core::signature::{Algorithm, SigningKey};
use uuid::Uuid;

const IDP: &str = "https://idp.test";
const JWT: &str = "urn:ietf:params:oauth:token-type:jwt";
const ACCESS_TOKEN: &str = "urn:ietf:params:oauth:token-type:access_token";
const API_TOKEN: &str = "urn:tollgate:token-type:api-token";

static SHARED: Shared = Shared::new(&[("tollgate.user_rate_window", "1h")]);

/// A row of `tollgate.exchanged_token`.
#[derive(Debug)]
struct Exchanged {
    code: String,
    reason: Option<String>,
    token: Option<String>,
    jti: Option<Uuid>,
    scopes: Option<Vec<String>>,
    audience: Option<Vec<String>>,
    kind: Option<String>,
}

impl Exchanged {
    #[track_caller]
    fn token(&self) -> &str {
        self.token.as_deref().unwrap_or_else(|| panic!("{self:?}"))
    }

    #[track_caller]
    fn claims(&self) -> Value {
        let payload = self.token().split('.').nth(1).unwrap_or_default();
        serde_json::from_slice(&URL_SAFE_NO_PAD.decode(payload).unwrap_or_default()).unwrap_or_default()
    }

    fn outcome(&self) -> (&str, Option<&str>) {
        (&self.code, self.reason.as_deref())
    }
}

async fn world(name: &str) -> Result<World> {
    World::on(&SHARED, name).await
}

/// With further arguments in SQL, in which `$2` is the actor's token.
async fn exchange_with(
    client: &Client,
    subject: &str,
    actor: Option<&str>,
    arguments: &str,
) -> Result<Exchanged, tokio_postgres::Error> {
    let call =
        format!("select e.* from (select $2::text as actor) a, tollgate.exchange_token($1{arguments}) e");
    let row = client.query_one(&call, &[&subject, &actor]).await?;
    Ok(Exchanged {
        code: row.get("code"),
        reason: row.get("reason"),
        token: row.get("access_token"),
        jti: row.get("jti"),
        scopes: row.get("scopes"),
        audience: row.get("audience"),
        kind: row.get("issued_token_type"),
    })
}

async fn exchange(world: &World, subject: &str, arguments: &str) -> Result<Exchanged> {
    Ok(exchange_with(&world.backend, subject, None, arguments).await?)
}

/// By an actor, whose token may be of any kind.
async fn exchange_as(world: &World, subject: &str, actor: &str, arguments: &str) -> Result<Exchanged> {
    let arguments = format!(", actor_token => $2, actor_token_type => '{ACCESS_TOKEN}'{arguments}");
    Ok(exchange_with(&world.backend, subject, Some(actor), &arguments).await?)
}

/// A service account that may call this audience, with its secret, and a token that it got for that.
async fn account(world: &World, name: &str, audience: &str) -> Result<(Token, String)> {
    world
        .run(&format!(
            "select tollgate.create_service_account('{name}', 'of the test', audience => '{{{audience}}}')"
        ))
        .await?;
    let row = world
        .db
        .owner
        .query_one("select id, token from tollgate.create_service_account_secret($1)", &[&name])
        .await?;
    let secret = Token { id: row.get(0), token: row.get(1) };
    let get = "select access_token from tollgate.client_credentials($1, $2)";
    let access = world.backend.query_one(get, &[&name, &secret.token]).await?.get(0);
    Ok((secret, access))
}

// ---- What comes of a token

#[tokio::test]
async fn an_api_token_is_exchanged_for_fewer_scopes_and_what_comes_of_it_ends_with_it() -> Result<()> {
    let world = world("exchange_api").await?;
    let arguments = "scopes => '{posts:*}', expires_in => '1 hour', allowed_ips => '{203.0.113.0/24}'";
    let root = issue_with(&world.db.owner, "ann", arguments).await?;
    let at = ", client_ip => '203.0.113.7'";
    let exchanged =
        exchange(&world, &root.token, ", scopes => '{posts:read,posts:read}', client_ip => '203.0.113.7'")
            .await?;
    assert_eq!(exchanged.outcome(), ("VALID", None));
    assert_eq!(exchanged.scopes.as_deref(), Some(&["posts:read".to_owned()][..]));
    assert_eq!(exchanged.audience.as_deref(), Some(&[AUDIENCE.to_owned()][..]));
    assert_eq!(exchanged.kind.as_deref(), Some(ACCESS_TOKEN));
    let claims = exchanged.claims();
    for (claim, expected) in [
        ("iss", json!(ISSUER)),
        ("sub", json!("ann")),
        ("aud", json!(AUDIENCE)),
        ("scope", json!("posts:read")),
        ("root", json!(root.id)),
        ("jti", json!(exchanged.jti)),
        ("client_id", json!("backend")),
        ("from", Value::Null),
        ("act", Value::Null),
    ] {
        assert_eq!(claims[claim], expected, "{claim}");
    }
    // The networks hold for it, and it is counted on the API token.
    assert_eq!(world.verify(exchanged.token(), at).await?.user_id.as_deref(), Some("ann"));
    assert_eq!(world.code(exchanged.token()).await?, "IP_NOT_ALLOWED");
    flush_all(&world.db.operator).await?;
    assert_eq!(counts(&world.db.owner, root.id).await?, (2, 1));
    // All that it may do, if nothing is asked for; by each type that it has.
    for kind in [ACCESS_TOKEN, API_TOKEN] {
        let all = exchange(&world, &root.token, &format!(", '{kind}'{at}")).await?;
        assert_eq!(all.scopes.as_deref(), Some(&["posts:*".to_owned()][..]), "{all:?}");
    }
    let nothing = exchange(&world, &root.token, &format!(", scopes => '{{}}'{at}")).await?;
    assert_eq!(nothing.claims()["scope"], "");

    // What came of what came of it ends too.
    let second = exchange(&world, exchanged.token(), &format!(", '{JWT}'{at}")).await?;
    assert_eq!(second.claims()["root"], json!(root.id));
    assert_eq!(world.verify(second.token(), at).await?.code, "VALID");
    assert!(common::revoke(&world.db.owner, root.id).await?);
    for token in [exchanged.token(), second.token()] {
        assert_eq!(world.verify(token, at).await?.code, "REVOKED");
    }
    Ok(())
}

#[tokio::test]
async fn nothing_is_wider_than_the_subject_and_what_was_asked_for_is_not_narrowed_silently() -> Result<()> {
    let world = world("exchange_wider").await?;
    let api =
        issue_with(&world.db.owner, "ann", "scopes => '{posts:read}', expires_in => '200 seconds'").await?;
    let several = world.sign(&json!({"aud": [AUDIENCE, "https://b.test"], "scope": "posts:read"}))?;
    for (token, arguments, expected) in [
        (&api.token, ", scopes => '{posts:write}'", "INSUFFICIENT_SCOPE"),
        (&api.token, ", scopes => '{posts:*}'", "INSUFFICIENT_SCOPE"),
        (&api.token, ", scopes => '{admin}'", "INSUFFICIENT_SCOPE"),
        (&api.token, ", scopes => '{posts:read,NULL}'", "INSUFFICIENT_SCOPE"),
        (&api.token, ", scopes => '{posts read}'", "INSUFFICIENT_SCOPE"),
        (&api.token, ", audience => '{https://b.test}'", "INVALID_TARGET"),
        (&api.token, ", audience => '{https://api.test,https://b.test}'", "INVALID_TARGET"),
        (&api.token, ", audience => '{}'", "INVALID_TARGET"),
        (&api.token, ", audience => '{NULL}'", "INVALID_TARGET"),
        (&api.token, ", audience => '{https://api.test}'", "VALID"),
        (&several, ", audience => '{https://b.test}'", "VALID"),
        (&several, ", audience => '{https://c.test}'", "INVALID_TARGET"),
        (&several, ", scopes => '{posts:comments:read}'", "INSUFFICIENT_SCOPE"),
    ] {
        let exchanged = exchange(&world, token, arguments).await?;
        assert_eq!(exchanged.code, expected, "{arguments}");
        assert_eq!(exchanged.token.is_some(), expected == "VALID", "{arguments}");
    }
    assert_eq!(
        exchange(&world, &several, "").await?.audience,
        Some(vec![AUDIENCE.to_owned(), "https://b.test".to_owned()])
    );
    // It ends with the subject, in the same second, whatever was asked for.
    let subject = jws::parse(&several)?.claims.exp().context("an end")? / 1_000_000;
    for lifetime in ["30 minutes", "5 seconds"] {
        let exchanged = exchange(&world, &several, &format!(", lifetime => '{lifetime}'")).await?;
        let claims = exchanged.claims();
        let (exp, iat) = (claims["exp"].as_i64().context("exp")?, claims["iat"].as_i64().context("iat")?);
        assert_eq!(exp, subject.min(iat + if lifetime == "5 seconds" { 5 } else { 1800 }), "{lifetime}");
    }
    let of_api = exchange(&world, &api.token, ", lifetime => '1 hour'").await?.claims();
    let left = of_api["exp"].as_i64().context("exp")? - of_api["iat"].as_i64().context("iat")?;
    assert!((1..=200).contains(&left), "{left}");
    // A token in its last second leads to nothing.
    let last = "update tollgate.api_tokens set expires_at = date_trunc('second', clock_timestamp()) + interval '1.9 seconds'";
    world.run(&format!("{last} where id = '{}'", api.id)).await?;
    let (code, reason) = match exchange(&world, &api.token, "").await? {
        Exchanged { code, .. } if code == "VALID" => {
            // Within the first second.
            world
                .run(&format!(
                    "update tollgate.api_tokens set expires_at = clock_timestamp() where id = '{}'",
                    api.id
                ))
                .await?;
            let later = exchange(&world, &api.token, "").await?;
            (later.code, later.reason)
        }
        other => (other.code, other.reason),
    };
    assert_eq!((code.as_str(), reason.as_deref()), ("INVALID_SUBJECT", Some("EXPIRED")));
    Ok(())
}

#[tokio::test]
async fn a_bad_token_has_its_code_and_a_bad_argument_raises() -> Result<()> {
    let world = world("exchange_bad").await?;
    let api = issue(&world.db.owner, "ann", &["posts:read"]).await?;
    let signed = world.sign(&json!({}))?;
    let over = world.sign(&json!({"exp": 1_700_000_000}))?;
    for (token, arguments, reason) in [
        ("nothing", String::new(), "MALFORMED"),
        (signed.as_str(), format!(", '{API_TOKEN}'"), "MALFORMED"),
        (&api.token, format!(", '{JWT}'"), "MALFORMED"),
        (&over, String::new(), "EXPIRED"),
        (&format!("{}A", signed), String::new(), "BAD_SIGNATURE"),
        (&world.sign(&json!({"iss": "https://none.test"}))?, String::new(), "UNTRUSTED_ISSUER"),
    ] {
        let refused = exchange(&world, token, &arguments).await?;
        assert_eq!(refused.outcome(), ("INVALID_SUBJECT", Some(reason)), "{token}");
        assert!(refused.token.is_none() && refused.scopes.is_none(), "{refused:?}");
        if arguments.is_empty() {
            let refused = exchange_as(&world, &api.token, token, "").await?;
            assert_eq!(refused.outcome(), ("INVALID_ACTOR", Some(reason)), "{token}");
        }
    }
    // One for another service is judged for what it is.
    let elsewhere = world.sign(&json!({"aud": "https://b.test"}))?;
    let exchanged = exchange(&world, &elsewhere, "").await?;
    assert_eq!(exchanged.audience, Some(vec!["https://b.test".to_owned()]));
    let client = jws::parse(&elsewhere)?.claims.client_id()?.map(str::to_owned);
    assert_eq!(exchanged.claims()["client_id"], json!(client), "the client stays");
    for (arguments, argument) in [
        (", null", "subject_token_type, which is NULL"),
        (", ''", "subject_token_type"),
        (", 'urn:ietf:params:oauth:token-type:refresh_token'", "subject_token_type"),
        (", 'urn:ietf:params:oauth:token-type:id_token'", "subject_token_type"),
        (", actor_token => 'x'", "actor_token_type"),
        (", actor_token_type => 'urn:ietf:params:oauth:token-type:jwt'", "actor_token"),
        (", actor_token => 'x', actor_token_type => 'x'", "actor_token_type"),
        (", lifetime => '0'", "lifetime"),
        (", lifetime => '2 hours'", "lifetime"),
    ] {
        let error = refused(
            exchange_with(&world.backend, &signed, None, arguments).await,
            &SqlState::INVALID_PARAMETER_VALUE,
        );
        let named = error.detail().unwrap_or_default().starts_with(&format!("Argument: {argument}"));
        assert!(named && error.hint().is_some(), "{arguments}: {error:?}");
    }
    let null = "select (tollgate.exchange_token(null)).reason";
    assert_eq!(value::<String>(&world.backend, null).await?, "MALFORMED");
    // A verifier issues nothing.
    refused(exchange_with(&world.db.web, &signed, None, "").await, &SqlState::INSUFFICIENT_PRIVILEGE);
    // It is a use, and limited as one.
    let limited =
        issue_with(&world.db.owner, "ann", "scopes => '{}', rate_limit => 1, rate_window => '1 hour'")
            .await?;
    assert_eq!(exchange(&world, &limited.token, "").await?.code, "VALID");
    assert_eq!(exchange(&world, &limited.token, "").await?.code, "RATE_LIMITED");
    world.run(&format!("select tollgate.set_quota('{}', amount => 1, per => 'day')", api.id)).await?;
    assert_eq!(exchange(&world, &api.token, "").await?.code, "VALID");
    assert_eq!(exchange(&world, &api.token, "").await?.code, "RATE_LIMITED");
    // A secret proves who calls, and is no token of the account.
    let (secret, _) = account(&world, "mailer", "https://b.test").await?;
    assert_eq!(exchange(&world, &secret.token, "").await?.outcome(), ("INVALID_SUBJECT", Some("secret")));
    Ok(())
}

#[tokio::test]
async fn an_exchange_is_recorded_only_if_that_is_asked_for() -> Result<()> {
    let world = world("exchange_audited").await?;
    let api = issue(&world.db.owner, "ann", &["posts:read"]).await?;
    let (by, _) = account(&world, "a", AUDIENCE).await?;
    let unrecorded = exchange(&world, &api.token, "").await?;
    assert_eq!(common::history(&world.db.owner, unrecorded.jti.context("an id")?).await?, []);
    world.run("alter database exchange_audited set tollgate.audit_issue = on").await?;
    let auditing = world.db.session("backend").await?;
    let arguments = format!(", actor_token => $2, actor_token_type => '{API_TOKEN}'");
    let recorded = exchange_with(&auditing, &api.token, Some(&by.token), &arguments).await?;
    let history = common::history(&world.db.owner, recorded.jti.context("an id")?).await?;
    assert_eq!(history.len(), 1);
    assert_eq!(history[0].0, "access_token.issued");
    assert_eq!(history[0].1["act"], json!({"sub": "service:a", "client_id": "a"}));
    auditing.batch_execute("begin read only").await?;
    refused(exchange_with(&auditing, &api.token, None, "").await, &SqlState::READ_ONLY_SQL_TRANSACTION);
    // Unrecorded it writes nothing.
    world.backend.batch_execute("begin read only").await?;
    assert_eq!(exchange(&world, &api.token, "").await?.code, "VALID");
    world.backend.batch_execute("commit").await?;
    Ok(())
}

// ---- Who acts

#[tokio::test]
async fn along_a_chain_of_services_each_sees_the_user_the_actors_and_what_was_asked_for() -> Result<()> {
    let world = world("exchange_chain").await?;
    let (b, c) = ("https://b.test", "https://c.test");
    let user = issue(&world.db.owner, "ann", &["posts:*", "users:read"]).await?;
    let (secret_a, token_a) = account(&world, "a", b).await?;
    let (secret_b, token_b) = account(&world, "b", c).await?;

    // The service A, to which ann's token came, calls B, which calls C.
    let for_b =
        exchange_as(&world, &user.token, &token_a, ", scopes => '{posts:*}', audience => '{https://b.test}'")
            .await?;
    assert_eq!(for_b.claims()["act"], json!({"sub": "service:a", "client_id": "a"}));
    assert_eq!(for_b.claims()["client_id"], "a");
    let for_c = exchange_as(
        &world,
        for_b.token(),
        &token_b,
        ", scopes => '{posts:read}', audience => '{https://c.test}'",
    )
    .await?;
    let act = json!({"sub": "service:b", "client_id": "b", "act": {"sub": "service:a", "client_id": "a"}});
    let claims = for_c.claims();
    for (claim, expected) in [
        ("sub", json!("ann")),
        ("aud", json!(c)),
        ("scope", json!("posts:read")),
        ("act", act.clone()),
        ("root", json!(user.id)),
        ("client_id", json!("b")),
    ] {
        assert_eq!(claims[claim], expected, "{claim}");
    }
    let at_c = format!(", audience => '{c}'");
    assert_eq!(world.verify(for_c.token(), &at_c).await?.user_id.as_deref(), Some("ann"));
    assert_eq!(world.code(for_c.token()).await?, "WRONG_AUDIENCE");
    // What the policies of C see.
    world.run("alter role web in database exchange_chain set tollgate.audience = 'https://c.test'").await?;
    let web = world.db.session("web").await?;
    web.batch_execute("begin").await?;
    authenticate(&web, for_c.token()).await?;
    assert_eq!(common::current_user(&web).await?.as_deref(), Some("ann"));
    assert_eq!(value::<Value>(&web, "select tollgate.current_actor()").await?, act);
    let may = "select tollgate.token_has_scope('posts:read') and not tollgate.token_has_scope('posts:write')";
    assert!(value::<bool>(&web, may).await?);
    web.batch_execute("commit").await?;
    // Neither an actor nor its place widens anything.
    for (actor, arguments, expected) in [
        (&token_b, ", scopes => '{users:read}'", "INSUFFICIENT_SCOPE"),
        (&token_b, ", audience => '{https://d.test}'", "INVALID_TARGET"),
        (&token_a, ", audience => '{https://c.test}'", "INVALID_TARGET"),
        // Only a service account has audiences of its own.
        (
            &world.sign(&json!({"sub": "ben", "aud": c}))?,
            ", audience => '{https://c.test}'",
            "INVALID_TARGET",
        ),
        // One that acts for another is no party of its own.
        (&for_b.token().to_owned(), "", "ACTOR_NOT_ALLOWED"),
    ] {
        assert_eq!(exchange_as(&world, for_b.token(), actor, arguments).await?.code, expected, "{arguments}");
    }

    // By its secret an account acts as well, with the audiences that it has now.
    let by_secret =
        exchange_as(&world, &user.token, &secret_a.token, ", audience => '{https://b.test}'").await?;
    assert_eq!(by_secret.claims()["act"], json!({"sub": "service:a", "client_id": "a"}));
    let at_b = format!(", audience => '{b}'");
    assert_eq!(world.verify(by_secret.token(), &at_b).await?.code, "VALID");

    // Each of what it came of ends it.
    for end in [
        format!("select tollgate.revoke_api_token('{}')", user.id),
        format!("select tollgate.revoke_api_token('{}')", secret_a.id),
        format!("select tollgate.set_api_token_enabled('{}', false)", secret_b.id),
        "select tollgate.update_service_account('a', audience => '{https://other.test}')".to_owned(),
        "select tollgate.disable_service_account('b')".to_owned(),
        "select tollgate.delete_service_account('a')".to_owned(),
        "select tollgate.end_access_of_users('{ann}', null, '{}')".to_owned(),
        format!("select tollgate.revoke_access_token('{}'::uuid)", for_b.jti.context("an id")?),
        format!(
            "select tollgate.revoke_access_token('{}'::uuid)",
            jws::parse(&token_a)?.claims.jti().context("jti")?
        ),
    ] {
        world.db.owner.batch_execute("begin").await?;
        world.run(&end).await?;
        let inside: String = world
            .db
            .owner
            .query_one(
                "select code from tollgate.verify_access_token($1, audience => $2)",
                &[&for_c.token(), &c],
            )
            .await?
            .get(0);
        // What is not committed yet has ended nothing.
        assert_eq!(world.verify(for_c.token(), &at_c).await?.code, "VALID", "{end}");
        world.db.owner.batch_execute("rollback").await?;
        assert_ne!(inside, "VALID", "{end}");
    }
    world.run("select tollgate.update_service_account('a', audience => '{https://other.test}')").await?;
    assert_eq!(world.verify(by_secret.token(), &at_b).await?.code, "REVOKED");
    let narrowed =
        exchange_as(&world, &user.token, &secret_a.token, ", audience => '{https://b.test}'").await?;
    assert_eq!(narrowed.code, "INVALID_TARGET");
    Ok(())
}

#[tokio::test]
async fn who_may_act_is_said_by_the_subject_and_stays_so() -> Result<()> {
    let world = world("exchange_may_act").await?;
    let idp = Idp::trusted(&world, "").await?;
    let actor = idp.sign(&json!({"sub": "agent"}))?;
    let (other, local) = (idp.sign(&json!({"sub": "other"}))?, world.sign(&json!({"sub": "agent"}))?);
    for (may_act, by, expected) in [
        (json!({"sub": "agent"}), &actor, "VALID"),
        (json!({"sub": "agent", "iss": IDP}), &actor, "VALID"),
        (json!({"sub": "agent"}), &other, "ACTOR_NOT_ALLOWED"),
        // A user of ours with the same name is another one.
        (json!({"sub": "agent"}), &local, "ACTOR_NOT_ALLOWED"),
        (json!({"sub": "idp:agent"}), &actor, "ACTOR_NOT_ALLOWED"),
        (json!({"sub": "agent", "iss": ISSUER}), &local, "VALID"),
        (json!({"sub": "agent", "iss": ISSUER}), &actor, "ACTOR_NOT_ALLOWED"),
        (json!({"sub": "agent", "client_id": "x"}), &actor, "INVALID_SUBJECT"),
        (json!("agent"), &actor, "INVALID_SUBJECT"),
        (Value::Null, &actor, "VALID"),
    ] {
        let subject = idp.sign(&json!({"may_act": may_act}))?;
        let exchanged = exchange_as(&world, &subject, by, "").await?;
        assert_eq!(exchanged.code, expected, "{may_act}: {:?}", exchanged.reason);
        if expected == "VALID" && !may_act.is_null() {
            // The next one may not act either.
            let next =
                exchange_as(&world, exchanged.token(), &world.sign(&json!({"sub": "ben"}))?, "").await?;
            assert_eq!(next.code, "ACTOR_NOT_ALLOWED", "{may_act}");
            assert_eq!(exchange(&world, exchanged.token(), "").await?.code, "VALID");
        }
    }
    // Actors of another issuer are named as its users are.
    let subject = idp.sign(&json!({"act": {"sub": "service:a", "client_id": "a"}}))?;
    let exchanged = exchange_as(&world, &subject, &actor, "").await?;
    assert_eq!(exchanged.claims()["act"], json!({"sub": "idp:agent", "act": {"sub": "idp:service:a"}}));
    for act in [json!({"sub": "a", "iss": "https://third.test"}), json!({}), json!("a")] {
        let subject = idp.sign(&json!({"act": act}))?;
        assert_eq!(
            exchange(&world, &subject, "").await?.outcome(),
            ("INVALID_SUBJECT", Some("act")),
            "{act}"
        );
    }
    Ok(())
}

#[tokio::test]
async fn a_chain_is_bounded() -> Result<()> {
    let world = world("exchange_bounds").await?;
    // Without actors each exchange adds the token before.
    let mut token = world.sign(&json!({}))?;
    let mut hops = 0;
    let refused = loop {
        let next = exchange(&world, &token, "").await?;
        match next.token {
            Some(next) => token = next,
            None => break next,
        }
        hops += 1;
        assert!(hops < 20);
    };
    assert_eq!(refused.outcome(), ("CHAIN_TOO_LONG", Some("from")));
    assert!(hops >= 14, "{hops}");
    assert_eq!(world.code(&token).await?, "VALID");

    let mut act = json!({"sub": "0"});
    for n in 1..8 {
        act = json!({"sub": n.to_string(), "act": act});
    }
    let subject = world.sign(&json!({"act": act}))?;
    assert_eq!(exchange(&world, &subject, "").await?.claims()["act"], act);
    let actor = issue(&world.db.owner, "ben", &[]).await?;
    let refused = exchange_as(&world, &subject, &actor.token, "").await?;
    assert_eq!(refused.outcome(), ("CHAIN_TOO_LONG", Some("act")));
    Ok(())
}

// ---- Sessions and other issuers

#[tokio::test]
async fn what_comes_of_a_sessions_token_belongs_to_it_and_an_actors_session_counts_too() -> Result<()> {
    let world = world("exchange_session").await?;
    let open = "select session_id, access_token from tollgate.open_session($1, '{posts:read}')";
    let ann = world.backend.query_one(open, &[&"ann"]).await?;
    let ben = world.backend.query_one(open, &[&"ben"]).await?;
    let exchanged = exchange_as(&world, ann.get(1), ben.get(1), "").await?;
    let claims = exchanged.claims();
    assert_eq!((&claims["sid"], &claims["sub"]), (&json!(ann.get::<_, Uuid>(0)), &json!("ann")));
    assert_eq!(claims["act"], json!({"sub": "ben"}));
    let alone = exchange(&world, ann.get(1), "").await?;
    for (session, expected) in [(ben.get::<_, Uuid>(0), "VALID"), (ann.get(0), "REVOKED")] {
        assert_eq!(world.code(alone.token()).await?, "VALID");
        world.run(&format!("select tollgate.revoke_session('{session}')")).await?;
        assert_eq!(world.code(exchanged.token()).await?, "REVOKED");
        assert_eq!(world.code(alone.token()).await?, expected);
    }
    Ok(())
}

struct Idp {
    key: SigningKey,
}

impl Idp {
    /// With further arguments in SQL.
    async fn trusted(world: &World, arguments: &str) -> Result<Self> {
        let idp = Self { key: SigningKey::generate(Algorithm::Es256)? };
        idp.trust(world, arguments).await?;
        Ok(idp)
    }

    async fn trust(&self, world: &World, arguments: &str) -> Result<()> {
        let jwk: Value = serde_json::from_str(&self.key.public_key().to_jwk("1"))?;
        let call = format!(
            "select tollgate.trust_issuer('{IDP}', 'idp:', '{{sts.test}}', scopes => '{{posts:*}}', jwks => $1{arguments})"
        );
        world.db.owner.execute(&call, &[&json!({"keys": [jwk]})]).await?;
        Ok(())
    }

    fn sign(&self, changes: &Value) -> Result<String> {
        let now = now()?;
        let mut claims = json!({
            "iss": IDP, "sub": "ann", "aud": "sts.test", "exp": now + 600, "iat": now,
            "jti": Uuid::new_v4().to_string(), "scope": "posts:read admin",
        });
        for (name, value) in changes.as_object().context("an object")? {
            claims[name] = value.clone();
        }
        if claims["may_act"].is_null() {
            claims.as_object_mut().context("an object")?.remove("may_act");
        }
        Ok(jws::sign(&self.key, "1", "JWT", &claims.to_string())?)
    }
}

#[tokio::test]
async fn another_issuers_token_is_exchanged_for_one_of_ours_that_ends_with_the_trust() -> Result<()> {
    let world = world("exchange_foreign").await?;
    let idp = Idp::trusted(&world, "").await?;
    let subject = idp.sign(&json!({}))?;
    let exchanged = exchange(&world, &subject, "").await?;
    let claims = exchanged.claims();
    for (claim, expected) in [
        ("iss", json!(ISSUER)),
        ("sub", json!("idp:ann")),
        // It is accepted here for what its issuer calls this service.
        ("aud", json!(AUDIENCE)),
        ("scope", json!("posts:read")),
        ("root", Value::Null),
    ] {
        assert_eq!(claims[claim], expected, "{claim}");
    }
    assert_eq!(claims["from"].as_array().map(Vec::len), Some(1), "{claims}");
    let named = exchange(&world, &subject, ", audience => '{sts.test}'").await?;
    assert_eq!(named.audience, Some(vec!["sts.test".to_owned()]));
    let deny = format!(
        "select tollgate.deny_access_token('{IDP}', '{}', gen_random_uuid(), now(), null, null)",
        jws::parse(&subject)?.claims.jti().context("jti")?
    );
    let other =
        serde_json::from_str::<Value>(&SigningKey::generate(Algorithm::Es256)?.public_key().to_jwk("2"))?;
    let others = json!({"keys": [other]});
    let another = SigningKey::generate(Algorithm::Es256)?.public_key().to_jwk("1");
    let of_the_same_kid = format!("'{{\"keys\": [{another}]}}'");
    let with_keys = |scopes: &str, keys: &str| {
        format!(
            "select tollgate.trust_issuer('{IDP}', 'idp:', '{{sts.test}}', scopes => '{{{scopes}}}', jwks => {keys})"
        )
    };
    let same = "(select jsonb_build_object('keys', jsonb_agg(k.jwk::jsonb)) from tollgate.issuer_keys k)";
    for (end, expected) in [
        ("select 1".to_owned(), "VALID"),
        (with_keys("posts:*", same), "VALID"),
        (deny, "REVOKED"),
        // Other terms: what came of it might not, now.
        (with_keys("posts:write", same), "REVOKED"),
        (with_keys("posts:*", &format!("'{others}'")), "REVOKED"),
        (with_keys("posts:*", &of_the_same_kid), "REVOKED"),
        (format!("select tollgate.distrust_issuer('{IDP}')"), "REVOKED"),
        ("select tollgate.revoke_user('idp:ann')".to_owned(), "REVOKED"),
    ] {
        world.db.owner.batch_execute("begin").await?;
        world.run(&end).await?;
        let code = "select code from tollgate.verify_access_token($1)";
        let found: String = world.db.owner.query_one(code, &[&exchanged.token()]).await?.get(0);
        world.db.owner.batch_execute("rollback").await?;
        assert_eq!(found, expected, "{end}");
    }
    // Trusted again, it accepts no token from before, nor what came of one.
    world.run(&format!("select tollgate.distrust_issuer('{IDP}')")).await?;
    idp.trust(&world, "").await?;
    assert_eq!(world.code(exchanged.token()).await?, "REVOKED");
    Ok(())
}

// ---- Standbys

#[tokio::test]
async fn tokens_are_exchanged_and_introspected_on_a_standby() -> Result<()> {
    let cluster = Arc::new(common::start(tollgate_tests::Cluster::builder())?);
    let world = World::of(Db::only(&cluster).await?).await?;
    let standby = cluster.standby()?;
    let api = issue(&world.db.owner, "ann", &["posts:read"]).await?;
    standby.catch_up_with(&cluster)?;
    let there = standby.connect("backend", tollgate_tests::DATABASE).await?;
    let exchanged = exchange_with(&there, &api.token, None, "").await?;
    assert_eq!(exchanged.outcome(), ("VALID", None));
    assert_eq!(world.code(exchanged.token()).await?, "VALID");
    let active = "select tollgate.introspect_token($1) -> 'active'";
    assert_eq!(there.query_one(active, &[&exchanged.token()]).await?.get::<_, Value>(0), json!(true));
    assert!(common::revoke(&world.db.owner, api.id).await?);
    standby.catch_up_with(&cluster)?;
    assert_eq!(there.query_one(active, &[&exchanged.token()]).await?.get::<_, Value>(0), json!(false));
    assert_eq!(
        exchange_with(&there, &api.token, None, "").await?.outcome(),
        ("INVALID_SUBJECT", Some("REVOKED"))
    );
    Ok(())
}
