//! Tokens of trusted issuers, by ordinary roles: what comes of them, what a hostile issuer cannot reach, and how keys come
//! and go. The tokens are made here, with keys of the tests' own and the claims of well-known issuers.

use std::collections::BTreeSet;
use std::sync::LazyLock;

use crate::common::{
    self, Shared, Verification, authenticate, changed, current_user, error, now, refused, value,
};
use crate::operator::{Db, flush_all};
use anyhow::{Context as _, Result};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use tollgate_core::jws::Algorithm;
use tollgate_core::signature::SigningKey;
use uuid::Uuid;

const AUDIENCE: &str = "https://api.test";
const ISSUER: &str = "https://idp.test";

static SHARED: Shared = Shared::new(&[("tollgate.user_rate_window", "1h")]);
/// Takes a while to make.
static RSA: LazyLock<SigningKey> = LazyLock::new(|| generate(Algorithm::Rs256));

#[expect(clippy::unwrap_used, reason = "a key can be made unless there is no memory")]
fn generate(algorithm: Algorithm) -> SigningKey {
    SigningKey::generate(algorithm).unwrap()
}

/// A key of an issuer, under a kid.
struct Key {
    kid: &'static str,
    key: SigningKey,
}

impl Key {
    fn new(kid: &'static str) -> Self {
        Self { kid, key: generate(Algorithm::Es256) }
    }

    fn jwk(&self) -> Value {
        jwk(&self.key, self.kid)
    }

    fn sign(&self, claims: &Value) -> Result<String> {
        let header = json!({"alg": self.key.algorithm().as_str(), "kid": self.kid, "typ": "JWT"});
        sign(&self.key, &header, claims)
    }
}

fn jwk(key: &SigningKey, kid: &str) -> Value {
    serde_json::from_str(&key.public_key().to_jwk(kid)).unwrap_or_default()
}

fn set(keys: &[&Key]) -> Value {
    json!({"keys": keys.iter().map(|key| key.jwk()).collect::<Vec<_>>()})
}

fn sign(key: &SigningKey, header: &Value, claims: &Value) -> Result<String> {
    let input = format!(
        "{}.{}",
        URL_SAFE_NO_PAD.encode(header.to_string()),
        URL_SAFE_NO_PAD.encode(claims.to_string())
    );
    let signature = URL_SAFE_NO_PAD.encode(key.sign(input.as_bytes())?);
    Ok(format!("{input}.{signature}"))
}

/// Those of a good token, with some replaced; null removes one.
fn claims(issuer: &str, changes: &Value) -> Result<Value> {
    let claims = json!({
        "iss": issuer, "sub": "ann", "aud": AUDIENCE, "exp": now()? + 600, "iat": now()?,
        "jti": Uuid::new_v4().to_string(), "scope": "openid posts:read",
    });
    changed(claims, changes)
}

/// A database, whose role `web` verifies and whose role `boss` administers.
async fn database(name: &str) -> Result<(Db, Client)> {
    let db = Db::create(&SHARED.cluster()?, name).await?;
    db.owner
        .batch_execute(
            "do $$ begin create role boss login; exception when duplicate_object or unique_violation then end $$;
             select tollgate.grant_capability('boss', 'admin'), tollgate.grant_capability('web', 'verifier')",
        )
        .await?;
    let boss = db.session("boss").await?;
    Ok((db, boss))
}

/// Trusts an issuer with these keys, with further arguments in SQL.
async fn trust(
    client: &Client,
    issuer: &str,
    keys: &Value,
    arguments: &str,
) -> Result<(), tokio_postgres::Error> {
    let call = format!(
        "select tollgate.trust_issuer(issuer => $1, jwks => $2, audience => '{{{AUDIENCE}}}', {arguments})"
    );
    client.execute(&call, &[&issuer, &keys]).await.map(drop)
}

async fn verify(client: &Client, token: &str, arguments: &str) -> Result<Verification> {
    let sql = format!("select {} from tollgate.verify_access_token($1{arguments}) v", Verification::COLUMNS);
    Ok(Verification::of(&client.query_one(&sql, &[&token]).await?))
}

async fn code(client: &Client, token: &str) -> Result<String> {
    Ok(verify(client, token, "").await?.code)
}

async fn revoke(client: &Client, token: &str) -> Result<bool> {
    let call = "select tollgate.revoke_access_token($1::text, 'leaked')";
    Ok(client.query_one(call, &[&token]).await?.get(0))
}

/// Details of the events of a kind, in their order.
async fn events(owner: &Client, event: &str) -> Result<Vec<Value>> {
    let log = "select detail from tollgate.audit_log where event = $1 order by id";
    Ok(owner.query(log, &[&event]).await?.iter().map(|row| row.get(0)).collect())
}

/// An issuer as its documentation shows its tokens.
struct Provider {
    issuer: &'static str,
    header: Value,
    algorithm: Algorithm,
    trusted: &'static str,
    claims: Value,
    user: &'static str,
    scopes: &'static [&'static str],
}

fn providers() -> Vec<Provider> {
    vec![
        // GitHub Actions.
        Provider {
            issuer: "https://token.actions.githubusercontent.com",
            header: json!({"typ": "JWT", "alg": "RS256", "x5t": "example-thumbprint"}),
            algorithm: Algorithm::Rs256,
            trusted: "user_prefix => 'github:', user_claim => 'repository_id', scopes => '{posts:write}', scope_claims => '{}',
                required_claims => '{\"repository_owner_id\": \"65\", \"ref\": \"refs/heads/main\"}', max_lifetime => '10 minutes'",
            claims: json!({
                "sub": "repo:octo-org/octo-repo:environment:prod", "environment": "prod", "aud": AUDIENCE,
                "ref": "refs/heads/main", "sha": "example-sha", "repository": "octo-org/octo-repo",
                "repository_owner": "octo-org", "actor_id": "12", "repository_visibility": "private",
                "repository_id": "74", "repository_owner_id": "65", "run_id": "example-run-id",
                "run_number": "10", "run_attempt": "2", "runner_environment": "github-hosted",
                "actor": "octocat", "workflow": "example-workflow", "head_ref": "", "base_ref": "",
                "event_name": "workflow_dispatch", "ref_type": "branch",
                "job_workflow_ref": "octo-org/octo-automation/.github/workflows/oidc.yml@refs/heads/main",
            }),
            user: "github:74",
            scopes: &["posts:write"],
        },
        // A service account of Kubernetes, whose tokens have no type.
        Provider {
            issuer: "https://kubernetes.default.svc.cluster.local",
            header: json!({"alg": "RS256"}),
            algorithm: Algorithm::Rs256,
            trusted: "user_prefix => 'k8s:', user_claim => 'kubernetes.io.serviceaccount.uid', scopes => '{posts:read}',
                scope_claims => '{}', required_claims => '{\"kubernetes.io.namespace\": \"my-namespace\"}'",
            claims: json!({
                "aud": [AUDIENCE, "https://kubernetes.default.svc"],
                "sub": "system:serviceaccount:my-namespace:my-serviceaccount",
                "kubernetes.io": {
                    "namespace": "my-namespace",
                    "node": {"name": "my-node", "uid": "646e7c5e-32d6-4d42-9dbd-e504e6cbe6b1"},
                    "pod": {"name": "my-pod", "uid": "5e0bd49b-f040-43b0-99b7-22765a53f7f3"},
                    "serviceaccount": {"name": "my-serviceaccount", "uid": "14ee3fa4-a7e2-420f-9f9a-dbc4507c3798"},
                },
            }),
            user: "k8s:14ee3fa4-a7e2-420f-9f9a-dbc4507c3798",
            scopes: &["posts:read"],
        },
        // Entra, version 2.0: no jti, scopes of the delegation and roles of the user.
        Provider {
            issuer: "https://login.microsoftonline.com/aaaabbbb-0000-cccc-1111-dddd2222eeee/v2.0",
            header: json!({"typ": "JWT", "alg": "RS256"}),
            algorithm: Algorithm::Rs256,
            trusted: "user_prefix => 'entra:', user_claim => 'oid', scopes => '{posts:read,users:*}', scope_claims => '{scp,roles}',
                required_claims => '{\"tid\": \"aaaabbbb-0000-cccc-1111-dddd2222eeee\", \"ver\": \"2.0\"}'",
            claims: json!({
                "aud": AUDIENCE, "aio": "AXQAi/8TAAAA", "azp": "00001111-aaaa-2222-bbbb-3333cccc4444", "azpacr": "0",
                "name": "Abe Lincoln", "oid": "aaaaaaaa-0000-1111-2222-bbbbbbbbbbbb",
                "preferred_username": "abeli@microsoft.com", "rh": "I", "scp": "posts:read User.Read",
                "roles": ["users:read", "Admin"], "sub": "HKZpfaHyWadeOouYlitjrI-KffTm222X5rrV3xDqfKQ",
                "tid": "aaaabbbb-0000-cccc-1111-dddd2222eeee", "uti": "fqiBqXLPj0eQa82S-IYFAA", "ver": "2.0", "jti": null,
            }),
            user: "entra:aaaaaaaa-0000-1111-2222-bbbbbbbbbbbb",
            scopes: &["posts:read", "users:read"],
        },
        // Auth0: an issuer with a slash at its end, permissions, a claim of the tenant's own.
        Provider {
            issuer: "https://my-domain.auth0.com/",
            header: json!({"typ": "JWT", "alg": "RS256"}),
            algorithm: Algorithm::Rs256,
            trusted: "user_prefix => 'auth0:', scopes => '{posts:*,users:read}',
                scope_claims => '{scope,permissions,https://example.com/roles}'",
            claims: json!({
                "sub": "auth0|123456", "aud": [AUDIENCE, "https://my-domain.auth0.com/userinfo"],
                "azp": "my_client_id", "scope": "openid profile posts:read", "permissions": ["posts:write", "posts:read"],
                "https://example.com/roles": ["users:read"],
            }),
            user: "auth0:auth0|123456",
            scopes: &["posts:read", "posts:write", "users:read"],
        },
        // Keycloak: roles in an object.
        Provider {
            issuer: "https://sso.test/realms/main",
            header: json!({"typ": "JWT", "alg": "ES256"}),
            algorithm: Algorithm::Es256,
            trusted: "user_prefix => '', scopes => '{posts:read,users:write}',
                scope_claims => '{scope,realm_access.roles,resource_access.posts.roles}'",
            claims: json!({
                "typ": "Bearer", "azp": "web", "acr": "1", "sid": "c4ba8fd6-8d1f-4a4c-8a5e-6f4a4d9bbf28",
                "sub": "f2f1b1f0-7a6a-4e6f-9d34-4f30f5a3b5f0", "scope": "profile email", "email_verified": false,
                "realm_access": {"roles": ["offline_access", "users:write"]},
                "resource_access": {"posts": {"roles": ["posts:read"]}, "account": {"roles": ["view-profile"]}},
            }),
            user: "f2f1b1f0-7a6a-4e6f-9d34-4f30f5a3b5f0",
            scopes: &["users:write", "posts:read"],
        },
    ]
}

// ---- What comes of a token

#[tokio::test]
async fn tokens_of_well_known_issuers_become_identities() -> Result<()> {
    let (db, boss) = database("well_known").await?;
    let (providers, es256) = (providers(), generate(Algorithm::Es256));
    let key = |algorithm| if algorithm == Algorithm::Rs256 { &*RSA } else { &es256 };
    for provider in &providers {
        // All under one kid: a key belongs to its issuer.
        let keys = json!({"keys": [jwk(key(provider.algorithm), "1")]});
        trust(&boss, provider.issuer, &keys, provider.trusted).await.context(provider.issuer)?;
    }
    for provider in &providers {
        let mut header = provider.header.clone();
        header["kid"] = "1".into();
        let claims = claims(provider.issuer, &provider.claims)?;
        let token = sign(key(provider.algorithm), &header, &claims)?;
        let verified = verify(&db.web, &token, "").await?;
        let expected = Verification {
            valid: true,
            code: "VALID".to_owned(),
            token_id: verified.token_id,
            user_id: Some(provider.user.to_owned()),
            scopes: Some(provider.scopes.iter().map(|&scope| scope.to_owned()).collect()),
            expires_at: verified.expires_at.clone(),
            metadata: Some(claims.clone()),
            ..Verification::default()
        };
        assert_eq!(verified, expected, "{}", provider.issuer);
        // The id is that of what was signed.
        let (input, _) = token.rsplit_once('.').context("a signature")?;
        let digest: [u8; 16] = Sha256::digest(input)[..16].try_into()?;
        assert_eq!(verified.token_id, Some(uuid::Builder::from_custom_bytes(digest).into_uuid()));
        assert!(!verify(&db.web, &token, ", '{users:delete}'").await?.valid);

        db.web.batch_execute("begin").await?;
        authenticate(&db.web, &token).await.context(provider.issuer)?;
        assert_eq!(current_user(&db.web).await?.as_deref(), Some(provider.user));
        assert_eq!(value::<String>(&db.web, "select tollgate.current_issuer()").await?, provider.issuer);
        let kept: Value = value(&db.web, "select tollgate.current_claims()").await?;
        assert_eq!((&kept["sub"], &kept["iss"]), (&claims["sub"], &claims["iss"]));
        db.web.batch_execute("commit").await?;
    }
    Ok(())
}

#[tokio::test]
async fn who_acts_for_a_user_is_known_to_policies() -> Result<()> {
    let (db, boss) = database("actors").await?;
    let key = Key::new("1");
    trust(&boss, ISSUER, &set(&[&key]), "user_prefix => 'idp:', scopes => '{posts:read}'").await?;
    let actor = json!({"sub": "agent", "client_id": "agent", "act": {"sub": "service:broker", "client_id": "broker"}});
    let token = key.sign(&claims(ISSUER, &json!({"act": actor}))?)?;
    db.web.batch_execute("begin").await?;
    authenticate(&db.web, &token).await?;
    // Named as the issuer's users are: it may call its actors like a user or a service account here.
    let named = json!({"sub": "idp:agent", "act": {"sub": "idp:service:broker"}});
    assert_eq!(value::<Value>(&db.web, "select tollgate.current_actor()").await?, named);
    let kept: Value = value(&db.web, "select tollgate.current_claims()").await?;
    assert_eq!(kept.get("act"), None);
    db.web.batch_execute("commit").await?;
    let shown: Value = db.web.query_one("select tollgate.introspect_token($1)", &[&token]).await?.get(0);
    assert_eq!((&shown["act"], shown.get("client_id")), (&named, None));
    // One that has no such name is there all the same.
    let long = json!({"sub": "a".repeat(4100)});
    let token = key.sign(&claims(ISSUER, &json!({"act": long}))?)?;
    db.web.batch_execute("begin").await?;
    authenticate(&db.web, &token).await?;
    assert_eq!(value::<Value>(&db.web, "select tollgate.current_actor()").await?, json!({}));
    db.web.batch_execute("rollback").await?;
    Ok(())
}

#[tokio::test]
async fn a_foreign_identity_is_held_to_policies_usage_and_limits_like_any_other() -> Result<()> {
    let (db, boss) = database("policies_of_others").await?;
    let key = Key::new("1");
    trust(&boss, ISSUER, &set(&[&key]), "user_prefix => 'idp:', scopes => '{posts:read}'").await?;
    db.owner
        .batch_execute(
            "create table public.posts (author text not null, title text not null);
             alter table public.posts enable row level security;
             grant select on public.posts to web;
             create policy own on public.posts to web using (
                 author = (select tollgate.current_user_id()) and (select tollgate.token_has_scope('posts:read')));
             insert into public.posts values ('idp:ann', 'hers'), ('ann', 'of the local ann')",
        )
        .await?;
    let token = key.sign(&claims(ISSUER, &json!({}))?)?;
    db.web.batch_execute("begin").await?;
    authenticate(&db.web, &token).await?;
    let titles = "select string_agg(title, ',') from posts";
    assert_eq!(value::<String>(&db.web, titles).await?, "hers");
    let second = key.sign(&claims(ISSUER, &json!({"sub": "ben"}))?)?;
    refused(authenticate(&db.web, &second).await, &SqlState::ACTIVE_SQL_TRANSACTION);
    db.web.batch_execute("rollback").await?;

    assert_eq!(code(&db.web, &key.sign(&claims(ISSUER, &json!({"aud": "x"}))?)?).await?, "WRONG_AUDIENCE");
    flush_all(&db.operator).await?;
    let usage = "select use_count || ' ' || denied_count from tollgate.access_token_usage('idp:ann')";
    assert_eq!(value::<String>(&db.owner, usage).await?, "1 1");

    db.owner.batch_execute("alter database policies_of_others set tollgate.user_rate_limit = 2").await?;
    let limited = db.session("web").await?;
    let carl = key.sign(&claims(ISSUER, &json!({"sub": "carl"}))?)?;
    let mut codes = Vec::new();
    for _ in 0..3 {
        codes.push(code(&limited, &carl).await?);
    }
    assert_eq!(codes, ["VALID", "VALID", "RATE_LIMITED"]);
    Ok(())
}

#[tokio::test]
async fn a_token_is_accepted_until_its_age_or_its_end_and_the_leeway() -> Result<()> {
    let (db, boss) = database("ages").await?;
    let key = Key::new("1");
    let arguments = "user_prefix => 'idp:', max_lifetime => '10 minutes'";
    trust(&boss, ISSUER, &set(&[&key]), arguments).await?;
    db.owner.batch_execute("alter database ages set tollgate.leeway = '5min'").await?;
    let web = db.session("web").await?;
    let at = now()?;
    for (changes, expected) in [
        (json!({}), "VALID"),
        // Ten years of its own, and ten minutes here.
        (json!({"exp": at + 315_360_000}), "VALID"),
        (json!({"exp": at + 315_360_000, "iat": at - 610}), "VALID"),
        (json!({"exp": at + 315_360_000, "iat": at - 901}), "EXPIRED"),
        (json!({"exp": at - 10}), "VALID"),
        (json!({"exp": at - 301}), "EXPIRED"),
        (json!({"iat": at + 200}), "VALID"),
        (json!({"iat": at + 900}), "NOT_YET_VALID"),
        (json!({"nbf": at + 900}), "NOT_YET_VALID"),
        (json!({"iat": null}), "MALFORMED"),
        (json!({"exp": null}), "MALFORMED"),
        (json!({"exp": "4102444800"}), "MALFORMED"),
    ] {
        let token = key.sign(&claims(ISSUER, &changes)?)?;
        assert_eq!(code(&web, &token).await?, expected, "{changes}");
    }
    // Within the leeway it is an identity too, and says when it is refused.
    let token = key.sign(&claims(ISSUER, &json!({"exp": at - 1}))?)?;
    web.batch_execute("begin").await?;
    authenticate(&web, &token).await?;
    assert_eq!(current_user(&web).await?.as_deref(), Some("idp:ann"));
    web.batch_execute("commit").await?;
    let call = "select extract(epoch from (tollgate.verify_access_token($1)).expires_at)::bigint";
    assert_eq!(web.query_one(call, &[&token]).await?.get::<_, i64>(0), at + 299);
    db.owner.batch_execute("alter database ages set tollgate.leeway = 0").await?;
    assert_eq!(code(&db.session("web").await?, &token).await?, "EXPIRED");
    refused(web.batch_execute("set tollgate.leeway = 300").await, &SqlState::INSUFFICIENT_PRIVILEGE);
    Ok(())
}

// ---- What a hostile issuer cannot reach

#[tokio::test]
async fn a_hostile_issuer_grants_nothing_that_it_was_not_given() -> Result<()> {
    let (db, boss) = database("hostile_issuer").await?;
    db.owner.batch_execute("select tollgate.define_scope('tollgate:tokens', 'of ours')").await?;
    let (hostile, other, ours) = (Key::new("1"), Key::new("1"), Key::new("2"));
    let keys = set(&[&hostile, &ours]);
    trust(&boss, ISSUER, &keys, "user_prefix => 'idp:', scopes => '{posts:read,users:*}'").await?;
    trust(&boss, "https://other.test", &set(&[&other]), "user_prefix => 'other:', scopes => '{posts:*}'")
        .await?;
    trust(&boss, "https://local.test", &set(&[&hostile]), "user_prefix => ''").await?;
    trust(&boss, "https://mail.test", &set(&[&hostile]), "user_prefix => 'mail:', user_claim => 'email'")
        .await?;

    let token = |issuer: &str, changes: Value| hostile.sign(&claims(issuer, &changes).unwrap()).unwrap();
    // Scopes above the ceiling are dropped.
    for (scope, expected) in [
        ("admin", &[][..]),
        ("tollgate:tokens tollgate:*", &[]),
        ("posts:* posts:write posts", &[]),
        ("posts:read users:read users:* admin", &["posts:read", "users:read", "users:*"]),
    ] {
        let verified = verify(&db.web, &token(ISSUER, json!({"scope": scope})), "").await?;
        assert_eq!(verified.scopes.context("scopes")?, expected, "{scope}");
        let elevated =
            verify(&db.web, &token(ISSUER, json!({"scope": scope})), ", '{users:x,posts:write}'").await?;
        assert_eq!(elevated.code, "INSUFFICIENT_SCOPE");
    }
    // Its users are its own.
    for (issuer, sub, expected) in [
        (ISSUER, "ann", Some("idp:ann")),
        (ISSUER, "ANN", Some("idp:ANN")),
        (ISSUER, "other:ann", Some("idp:other:ann")),
        ("https://local.test", "ann", Some("ann")),
        ("https://local.test", "Other:ann", Some("Other:ann")),
        ("https://local.test", "idp:ann", None),
        ("https://local.test", "other:ann", None),
        (ISSUER, "", None),
        (ISSUER, " ", None),
    ] {
        let verified = verify(&db.web, &token(issuer, json!({"sub": sub})), "").await?;
        assert_eq!(verified.user_id.as_deref(), expected, "{issuer} {sub}: {verified:?}");
        if expected.is_none() {
            assert_eq!(verified.code, "MALFORMED");
            let refusal: Value = value(&db.web, "select tollgate.last_refusal()").await?;
            assert_eq!(refusal, json!({"code": "MALFORMED", "reason": "user"}));
        }
    }
    for (verified, expected) in [
        (json!(true), "VALID"),
        (json!(false), "MALFORMED"),
        (json!("true"), "MALFORMED"),
        (Value::Null, "MALFORMED"),
    ] {
        let token = token("https://mail.test", json!({"email": "ann@corp.test", "email_verified": verified}));
        assert_eq!(code(&db.web, &token).await?, expected, "{verified}");
    }
    // Audiences, and tokens without one.
    for (aud, expected) in [
        (json!([AUDIENCE, "x"]), "VALID"),
        (json!("https://other.test"), "WRONG_AUDIENCE"),
        (json!(format!("{AUDIENCE}/")), "WRONG_AUDIENCE"),
        (Value::Null, "WRONG_AUDIENCE"),
        (json!(""), "WRONG_AUDIENCE"),
        (json!([]), "MALFORMED"),
    ] {
        assert_eq!(code(&db.web, &token(ISSUER, json!({"aud": aud}))).await?, expected, "{aud}");
    }
    let both = token(ISSUER, json!({"aud": [AUDIENCE, "billing"]}));
    for (named, expected) in [("billing", "VALID"), ("other", "WRONG_AUDIENCE"), ("", "WRONG_AUDIENCE")] {
        let answer = verify(&db.web, &both, &format!(", audience => '{named}'")).await?;
        assert_eq!(answer.code, expected, "{named:?}");
    }
    // Keys: of another issuer under the same kid, one that the other issuer alone has, none, and a secret one.
    let good = claims(ISSUER, &json!({}))?;
    let with = |header: Value| sign(&hostile.key, &header, &good).unwrap();
    let hs256 = {
        let header = json!({"alg": "HS256", "kid": "1", "typ": "JWT"});
        let input = format!(
            "{}.{}",
            URL_SAFE_NO_PAD.encode(header.to_string()),
            URL_SAFE_NO_PAD.encode(good.to_string())
        );
        format!("{input}.{}", URL_SAFE_NO_PAD.encode(Sha256::digest(hostile.jwk().to_string())))
    };
    for (what, token, expected) in [
        ("the key of another", hostile.sign(&claims("https://other.test", &json!({}))?)?, "BAD_SIGNATURE"),
        ("a kid of another", ours.sign(&claims("https://other.test", &json!({}))?)?, "UNKNOWN_KEY"),
        ("no kid", with(json!({"alg": "ES256", "typ": "JWT"})), "UNKNOWN_KEY"),
        ("a kid in other letters", with(json!({"alg": "ES256", "kid": "1 ", "typ": "JWT"})), "UNKNOWN_KEY"),
        ("another algorithm", with(json!({"alg": "RS256", "kid": "1", "typ": "JWT"})), "BAD_SIGNATURE"),
        ("a secret", hs256, "MALFORMED"),
        ("no signature", with(json!({"alg": "none", "kid": "1", "typ": "JWT"})), "MALFORMED"),
        ("another type", with(json!({"alg": "ES256", "kid": "1", "typ": "logout+jwt"})), "MALFORMED"),
        ("another issuer", token("https://IDP.test", json!({})), "UNTRUSTED_ISSUER"),
        ("an issuer with a slash", token("https://idp.test/", json!({})), "UNTRUSTED_ISSUER"),
        // As all test servers are configured: our own, whose keys are not these.
        ("our own", token("https://tollgate.test", json!({})), "MALFORMED"),
        ("good", hostile.sign(&good)?, "VALID"),
    ] {
        assert_eq!(code(&db.web, &token).await?, expected, "{what}");
    }
    let own = sign(
        &hostile.key,
        &json!({"alg": "ES256", "kid": "1", "typ": "at+jwt"}),
        &claims("https://tollgate.test", &json!({}))?,
    )?;
    assert_eq!(code(&db.web, &own).await?, "UNKNOWN_KEY", "as our own");
    // What is named by hand comes, and nothing else does.
    trust(&boss, ISSUER, &keys, "user_prefix => 'idp:', scopes => '{admin,tollgate:tokens}'").await?;
    let verified =
        verify(&db.web, &token(ISSUER, json!({"scope": "admin tollgate:tokens tollgate:x"})), "").await?;
    assert_eq!(verified.scopes.context("scopes")?, ["admin", "tollgate:tokens"]);
    Ok(())
}

#[tokio::test]
async fn a_token_without_the_required_claims_is_none_of_the_trusted_ones() -> Result<()> {
    let (db, boss) = database("required").await?;
    let key = Key::new("1");
    let arguments = "user_prefix => 'ci:', types => '{at+jwt}', required_claims => '{\"repository_id\": \"74\", \"env.prod\": true}'";
    trust(&boss, ISSUER, &set(&[&key]), arguments).await?;
    let header = json!({"alg": "ES256", "kid": "1", "typ": "at+jwt"});
    let good = json!({"repository_id": "74", "env": {"prod": true}});
    for (changes, expected) in [
        (good.clone(), "VALID"),
        (json!({"repository_id": "740", "env": {"prod": true}}), "UNTRUSTED_ISSUER"),
        (json!({"repository_id": 74, "env": {"prod": true}}), "UNTRUSTED_ISSUER"),
        (json!({"repository_id": "74", "env": {"prod": "true"}}), "UNTRUSTED_ISSUER"),
        (json!({"repository_id": "74"}), "UNTRUSTED_ISSUER"),
        (json!({"repository_id": "74", "env": {"prod": true}, "env.prod": true}), "MALFORMED"),
    ] {
        let token = sign(&key.key, &header, &claims(ISSUER, &changes)?)?;
        assert_eq!(code(&db.web, &token).await?, expected, "{changes}");
        if expected == "UNTRUSTED_ISSUER" {
            let refusal: Value = value(&db.web, "select tollgate.last_refusal()").await?;
            assert_eq!(refusal["reason"], "required_claims");
        }
    }
    assert_eq!(code(&db.web, &key.sign(&claims(ISSUER, &good)?)?).await?, "MALFORMED", "of another type");
    Ok(())
}

// ---- Whom to trust

#[tokio::test]
async fn an_issuer_that_could_be_taken_for_another_is_not_trusted() -> Result<()> {
    let (db, boss) = database("whom_to_trust").await?;
    let key = Key::new("1");
    let keys = set(&[&key]);
    trust(&boss, "https://a.test", &keys, "user_prefix => 'a:'").await?;
    trust(&boss, "https://b.test", &keys, "user_prefix => ''").await?;
    let huge = format!("repeat('x', {})", 300_000);
    let oct = json!({"keys": [{"kty": "oct", "kid": "s", "k": "c2VjcmV0"}, key.jwk()]});
    let private = {
        let mut jwk = key.jwk();
        jwk["d"] = "c2VjcmV0".into();
        json!({"keys": [jwk]})
    };
    let unnamed = {
        let mut jwk = key.jwk();
        jwk.as_object_mut().context("an object")?.remove("kid");
        json!({"keys": [jwk]})
    };
    for (issuer, keys, arguments, argument) in [
        ("https://c.test", &keys, "user_prefix => null", "user_prefix"),
        ("https://c.test", &keys, "user_prefix => ''", "user_prefix"),
        ("https://c.test", &keys, "user_prefix => 'a:'", "user_prefix"),
        ("https://c.test", &keys, "user_prefix => 'a:b'", "user_prefix"),
        ("https://c.test", &keys, "user_prefix => 'a'", "user_prefix"),
        ("https://c.test", &keys, "user_prefix => repeat('x', 65)", "user_prefix"),
        ("https://tollgate.test", &keys, "user_prefix => 'c:'", "issuer"),
        ("", &keys, "user_prefix => 'c:'", "issuer"),
        ("has space", &keys, "user_prefix => 'c:'", "issuer"),
        ("https://c.test", &keys, "user_prefix => 'c:', scopes => '{no:such}'", "scopes"),
        ("https://c.test", &keys, "user_prefix => 'c:', scopes => null", "scopes"),
        ("https://c.test", &keys, "user_prefix => 'c:', user_claim => ''", "user_claim"),
        ("https://c.test", &keys, "user_prefix => 'c:', user_claim => 'a b'", "user_claim"),
        ("https://c.test", &keys, "user_prefix => 'c:', scope_claims => '{a,null}'", "scope_claims"),
        ("https://c.test", &keys, "user_prefix => 'c:', algorithms => '{}'", "algorithms"),
        ("https://c.test", &keys, "user_prefix => 'c:', algorithms => '{HS256}'", "algorithms"),
        ("https://c.test", &keys, "user_prefix => 'c:', algorithms => '{none}'", "algorithms"),
        ("https://c.test", &keys, "user_prefix => 'c:', algorithms => '{RS256}'", "jwks"),
        ("https://c.test", &keys, "user_prefix => 'c:', types => '{}'", "types"),
        ("https://c.test", &keys, "user_prefix => 'c:', required_claims => '[]'", "required_claims"),
        (
            "https://c.test",
            &keys,
            "user_prefix => 'c:', required_claims => '{\"a\": 1.5}'",
            "required_claims",
        ),
        ("https://c.test", &keys, "user_prefix => 'c:', required_claims => '{\"a\": []}'", "required_claims"),
        ("https://c.test", &keys, "user_prefix => 'c:', max_lifetime => '59 seconds'", "max_lifetime"),
        ("https://c.test", &keys, "user_prefix => 'c:', max_lifetime => '8 days'", "max_lifetime"),
        ("https://c.test", &keys, "user_prefix => 'c:', max_lifetime => null", "max_lifetime"),
        ("https://c.test", &keys, "user_prefix => 'c:', jwks_url => 'https://c.test/keys'", "jwks_url"),
        ("https://c.test", &oct, "user_prefix => 'c:'", "jwks"),
        ("https://c.test", &private, "user_prefix => 'c:'", "jwks"),
        ("https://c.test", &unnamed, "user_prefix => 'c:'", "jwks"),
        ("https://c.test", &json!({"keys": []}), "user_prefix => 'c:'", "jwks"),
        ("https://c.test", &json!({"keys": [key.jwk(), key.jwk()]}), "user_prefix => 'c:'", "jwks"),
    ] {
        let error = refused(trust(&boss, issuer, keys, arguments).await, &SqlState::INVALID_PARAMETER_VALUE);
        let detail = error.detail().unwrap_or_default();
        assert!(detail.starts_with(&format!("Argument: {argument}")), "{arguments}: {error:?}");
        assert!(error.hint().is_some() && !detail.contains("c2VjcmV0"), "{error:?}");
    }
    for (call, argument) in [
        ("'https://c.test', 'c:', '{}'", "audience"),
        ("'https://c.test', 'c:', null", "audience"),
        ("'https://c.test', 'c:', array['']", "audience"),
        ("'https://c.test', 'c:', array[null]::text[]", "audience"),
        ("null, 'c:', '{a}'", "issuer"),
        ("'no-url', 'c:', '{a}'", "issuer"),
        ("'https://c.test', 'c:', '{a}', jwks_url => 'ftp://c.test'", "jwks_url"),
        ("'https://c.test', 'c:', '{a}', jwks_url => 'https://u:p@c.test/'", "jwks_url"),
        (&format!("'https://c.test', 'c:', '{{a}}', jwks => jsonb_build_object('keys', {huge})"), "jwks"),
    ] {
        let error = refused(
            boss.execute(&format!("select tollgate.trust_issuer({call})"), &[]).await,
            &SqlState::INVALID_PARAMETER_VALUE,
        );
        assert!(
            error.detail().is_some_and(|detail| detail.starts_with(&format!("Argument: {argument}"))),
            "{call}: {error:?}"
        );
    }
    boss.batch_execute("begin isolation level repeatable read").await?;
    refused(
        trust(&boss, "https://c.test", &keys, "user_prefix => 'c:'").await,
        &SqlState::INVALID_TRANSACTION_STATE,
    );
    boss.batch_execute("rollback").await?;
    // What was refused is not there, and what is there can be changed, its own prefix too.
    trust(&boss, "https://a.test", &keys, "user_prefix => 'a:b:'").await?;
    let there =
        "select string_agg(issuer || ' ' || user_prefix, ', ' order by issuer) from tollgate.trusted_issuers";
    assert_eq!(value::<String>(&boss, there).await?, "https://a.test a:b:, https://b.test ");
    let local = key.sign(&claims("https://b.test", &json!({"sub": "a:ann"}))?)?;
    assert_eq!(code(&db.web, &local).await?, "VALID", "the prefix is free again");
    // Others may not.
    for call in ["trust_issuer('x', 'x', '{a}')", "distrust_issuer('https://a.test')"] {
        refused(
            db.web.execute(&format!("select tollgate.{call}"), &[]).await,
            &SqlState::INSUFFICIENT_PRIVILEGE,
        );
        refused(
            db.operator.execute(&format!("select tollgate.{call}"), &[]).await,
            &SqlState::INSUFFICIENT_PRIVILEGE,
        );
    }
    Ok(())
}

#[tokio::test]
async fn a_user_claim_that_may_pass_to_another_user_is_a_warning() -> Result<()> {
    let (db, _) = database("mutable_claims").await?;
    let key = Key::new("1");
    let (boss, mut messages) = db.cluster.listen("boss", &db.name).await?;
    let mut warned = Vec::new();
    for claim in ["sub", "oid", "email", "profile.preferred_username", "upn"] {
        let arguments = format!("user_prefix => 'idp:', user_claim => '{claim}'");
        trust(&boss, ISSUER, &set(&[&key]), &arguments).await?;
        boss.execute("select 1", &[]).await?;
        while let Ok(message) = messages.try_recv() {
            if let tokio_postgres::AsyncMessage::Notice(notice) = message {
                assert!(notice.hint().is_some_and(|hint| hint.contains("sub")), "{notice:?}");
                warned.push(claim);
            }
        }
    }
    assert_eq!(warned, ["email", "profile.preferred_username", "upn"]);
    Ok(())
}

#[tokio::test]
async fn a_scope_that_an_issuer_may_grant_is_not_dropped() -> Result<()> {
    let (db, boss) = database("kept_scopes").await?;
    let key = Key::new("1");
    trust(&boss, ISSUER, &set(&[&key]), "user_prefix => 'idp:', scopes => '{users:write}'").await?;
    let drop_scope = "select tollgate.drop_scope('users:write')";
    let error = refused(boss.execute(drop_scope, &[]).await, &SqlState::DEPENDENT_OBJECTS_STILL_EXIST);
    assert!(error.detail().is_some_and(|detail| detail.contains(ISSUER)), "{error:?}");
    boss.execute("select tollgate.distrust_issuer($1)", &[&ISSUER]).await?;
    boss.execute(drop_scope, &[]).await?;
    drop(db);
    Ok(())
}

// ---- Trust that ends

#[tokio::test]
async fn trust_that_is_rolled_back_leaves_nothing_behind() -> Result<()> {
    let (db, boss) = database("rolled_back_trust").await?;
    let key = Key::new("1");
    let token = key.sign(&claims(ISSUER, &json!({}))?)?;
    boss.batch_execute("begin").await?;
    trust(&boss, ISSUER, &set(&[&key]), "user_prefix => 'idp:'").await?;
    assert_eq!(code(&boss, &token).await?, "VALID", "the transaction sees what it trusts");
    assert_eq!(code(&db.web, &token).await?, "UNTRUSTED_ISSUER", "nothing else does");
    boss.batch_execute("rollback").await?;
    for client in [&boss, &db.web] {
        assert_eq!(code(client, &token).await?, "UNTRUSTED_ISSUER");
    }
    Ok(())
}

#[tokio::test]
async fn two_databases_trust_one_issuer_and_kid_with_different_keys() -> Result<()> {
    let ((one, boss_of_one), (two, boss_of_two)) =
        (database("one_trust").await?, database("other_trust").await?);
    let (first, second) = (Key::new("1"), Key::new("1"));
    trust(&boss_of_one, ISSUER, &set(&[&first]), "user_prefix => 'idp:'").await?;
    trust(&boss_of_two, ISSUER, &set(&[&second]), "user_prefix => 'idp:'").await?;
    let token = first.sign(&claims(ISSUER, &json!({}))?)?;
    // Twice: the signature is remembered of one database alone.
    for _ in 0..2 {
        assert_eq!(code(&one.web, &token).await?, "VALID");
        assert_eq!(code(&two.web, &token).await?, "BAD_SIGNATURE");
    }
    Ok(())
}

#[tokio::test]
async fn a_removed_issuer_and_a_withdrawn_key_are_refused_at_once_and_in_older_snapshots() -> Result<()> {
    let (db, boss) = database("removed").await?;
    let (first, second) = (Key::new("1"), Key::new("2"));
    trust(&boss, ISSUER, &set(&[&first]), "user_prefix => 'idp:'").await?;
    let tokens = [first.sign(&claims(ISSUER, &json!({}))?)?, second.sign(&claims(ISSUER, &json!({}))?)?];
    let older = db.session("web").await?;
    older.batch_execute("begin isolation level repeatable read").await?;
    let codes = async || -> Result<Vec<String>> {
        let mut codes = Vec::new();
        for client in [&older, &db.web] {
            for token in &tokens {
                codes.push(code(client, token).await?);
            }
        }
        Ok(codes)
    };
    assert_eq!(codes().await?, ["VALID", "UNKNOWN_KEY", "VALID", "UNKNOWN_KEY"]);
    trust(&boss, ISSUER, &set(&[&first, &second]), "user_prefix => 'idp:'").await?;
    assert_eq!(codes().await?, ["VALID"; 4]);
    trust(&boss, ISSUER, &set(&[&second]), "user_prefix => 'idp:'").await?;
    assert_eq!(codes().await?, ["UNKNOWN_KEY", "VALID", "UNKNOWN_KEY", "VALID"]);
    // Another key of the same kid.
    let replaced = Key::new("2");
    trust(&boss, ISSUER, &set(&[&replaced]), "user_prefix => 'idp:'").await?;
    assert_eq!(codes().await?, ["UNKNOWN_KEY", "BAD_SIGNATURE", "UNKNOWN_KEY", "BAD_SIGNATURE"]);
    trust(&boss, ISSUER, &set(&[&second]), "user_prefix => 'idp:', algorithms => '{ES256}'").await?;
    assert_eq!(codes().await?, ["UNKNOWN_KEY", "VALID", "UNKNOWN_KEY", "VALID"]);
    let distrust = "select tollgate.distrust_issuer($1, 'compromised')";
    assert!(boss.query_one(distrust, &[&ISSUER]).await?.get::<_, bool>(0));
    assert!(!boss.query_one(distrust, &[&ISSUER]).await?.get::<_, bool>(0), "once");
    assert_eq!(codes().await?, ["UNTRUSTED_ISSUER"; 4]);

    let kids = |changes: &[Value]| -> Vec<(Value, Value)> {
        changes.iter().map(|change| (change["came"].clone(), change["went"].clone())).collect()
    };
    assert_eq!(
        kids(&events(&db.owner, "issuer.keys_changed").await?),
        [
            (json!(["1"]), json!([])),
            (json!(["2"]), json!([])),
            (json!([]), json!(["1"])),
            (json!(["2"]), json!(["2"])),
            (json!(["2"]), json!(["2"])),
        ]
    );
    assert_eq!(events(&db.owner, "issuer.trusted").await?[0]["user_prefix"], "idp:");
    assert_eq!(
        events(&db.owner, "issuer.changed").await?,
        [
            json!({"issuer": ISSUER, "changes": {"algorithms": {"from": ["RS256", "ES256", "EdDSA"], "to": ["ES256"]}}})
        ]
    );
    let distrusted = events(&db.owner, "issuer.distrusted").await?;
    assert_eq!(distrusted, [json!({"issuer": ISSUER, "reason": "compromised"})]);
    Ok(())
}

#[tokio::test]
async fn tokens_from_before_an_issuer_was_distrusted_stay_refused_when_it_is_trusted_again() -> Result<()> {
    let (db, boss) = database("trusted_again").await?;
    let key = Key::new("1");
    let arguments = "user_prefix => 'idp:'";
    trust(&boss, ISSUER, &set(&[&key]), arguments).await?;
    let at = now()?;
    let [before, later] =
        [at - 7200, at - 1800].map(|iat| key.sign(&claims(ISSUER, &json!({"iat": iat})).unwrap()).unwrap());
    assert_eq!(
        (code(&db.web, &before).await?.as_str(), code(&db.web, &later).await?.as_str()),
        ("VALID", "VALID")
    );
    boss.execute("select tollgate.distrust_issuer($1)", &[&ISSUER]).await?;
    trust(&boss, ISSUER, &set(&[&key]), arguments).await?;
    for token in [&before, &later] {
        assert_eq!(code(&db.web, token).await?, "REVOKED");
    }
    // As if it had been an hour ago. A change of the trust forgets nothing.
    db.owner
        .batch_execute("update tollgate.issuers set accepts_from = accepts_from - interval '1 hour'")
        .await?;
    trust(&boss, ISSUER, &set(&[&key]), "user_prefix => 'idp:', max_lifetime => '7 days'").await?;
    assert_eq!(
        (code(&db.web, &before).await?.as_str(), code(&db.web, &later).await?.as_str()),
        ("REVOKED", "VALID")
    );
    // What was distrusted long ago is forgotten, as no token of then could be accepted.
    boss.execute("select tollgate.distrust_issuer($1)", &[&ISSUER]).await?;
    db.owner
        .batch_execute("update tollgate.issuers set distrusted_at = now() - interval '193 hours'")
        .await?;
    trust(&boss, "https://next.test", &set(&[&key]), "user_prefix => 'idp:'").await?;
    assert_eq!(value::<i64>(&db.owner, "select count(*) from tollgate.issuers").await?, 1);
    Ok(())
}

// ---- Revoking

/// The same signature in another form: s is replaced by n - s.
fn other_signature(token: &str) -> Result<String> {
    const ORDER: [u8; 32] = [
        0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xbc, 0xe6, 0xfa,
        0xad, 0xa7, 0x17, 0x9e, 0x84, 0xf3, 0xb9, 0xca, 0xc2, 0xfc, 0x63, 0x25, 0x51,
    ];
    let (input, signature) = token.rsplit_once('.').context("a signature")?;
    let mut bytes = URL_SAFE_NO_PAD.decode(signature)?;
    let mut borrow = 0;
    for place in (0..32).rev() {
        let difference = i16::from(ORDER[place]) - i16::from(bytes[32 + place]) - borrow;
        borrow = i16::from(difference < 0);
        bytes[32 + place] = u8::try_from(difference.rem_euclid(256))?;
    }
    Ok(format!("{input}.{}", URL_SAFE_NO_PAD.encode(bytes)))
}

#[tokio::test]
async fn a_foreign_token_that_is_shown_can_be_revoked_in_whatever_form() -> Result<()> {
    let (db, boss) = database("revoked_foreign").await?;
    let key = Key::new("1");
    for (issuer, prefix) in [(ISSUER, "idp:"), ("https://other.test", "other:")] {
        trust(&boss, issuer, &set(&[&key]), &format!("user_prefix => '{prefix}'")).await?;
    }
    let older = db.session("web").await?;
    older.batch_execute("begin isolation level repeatable read").await?;
    for jti in [json!("one"), Value::Null, json!(""), json!("x".repeat(300)), json!("0a".repeat(40))] {
        let claims_of = |issuer| claims(issuer, &json!({"jti": jti}));
        let token = key.sign(&claims_of(ISSUER)?)?;
        let twin = other_signature(&token)?;
        for client in [&older, &db.web] {
            for form in [&token, &twin] {
                assert_eq!(code(client, form).await?, "VALID", "{jti}");
            }
        }
        assert!(revoke(&db.web, &token).await?, "{jti}");
        assert!(!revoke(&db.web, &twin).await?, "once");
        for client in [&older, &db.web] {
            for form in [&token, &twin] {
                assert_eq!(code(client, form).await?, "REVOKED", "{jti}");
            }
        }
        // The same jti of another issuer is another token.
        assert_eq!(code(&db.web, &key.sign(&claims_of("https://other.test")?)?).await?, "VALID", "{jti}");
    }
    let event = "select user_id, detail from tollgate.audit_log where event = 'access_token.revoked' order by id limit 1";
    let event = db.owner.query_one(event, &[]).await?;
    assert_eq!(event.get::<_, &str>(0), "idp:ann");
    assert_eq!(event.get::<_, Value>(1), json!({"reason": "leaked", "issuer": ISSUER}));
    // It is kept for as long as the token can be accepted, whatever the token says, and a day longer.
    let long = key.sign(&claims(ISSUER, &json!({"exp": now()? + 864_000, "jti": "long"}))?)?;
    assert!(revoke(&db.web, &long).await?);
    let kept = "select expires_at > now() + interval '23 hours' and expires_at < now() + interval '25 hours'
                from tollgate.denied_access_tokens where jti = 'long'";
    assert!(value::<bool>(&db.owner, kept).await?);
    let refused = [(ISSUER, json!({"exp": 1})), ("https://x.test", json!({}))];
    for (issuer, changes) in refused {
        let token = key.sign(&claims(issuer, &changes)?)?;
        assert!(!revoke(&db.web, &token).await?, "nothing that is refused anyway is listed");
    }
    Ok(())
}

#[tokio::test]
async fn revoking_a_user_refuses_the_foreign_tokens_from_before() -> Result<()> {
    let (db, boss) = database("revoked_foreign_users").await?;
    let key = Key::new("1");
    trust(&boss, ISSUER, &set(&[&key]), "user_prefix => 'idp:'").await?;
    let at = now()?;
    let token =
        |sub: &str, iat: i64| key.sign(&claims(ISSUER, &json!({"sub": sub, "iat": iat})).unwrap()).unwrap();
    let [before, later, ben] = [token("ann", at - 7200), token("ann", at - 1800), token("ben", at - 7200)];
    let codes = async |tokens: &[&str]| -> Result<Vec<String>> {
        let mut codes = Vec::new();
        for token in tokens {
            codes.push(code(&db.web, token).await?);
        }
        Ok(codes)
    };
    assert_eq!(codes(&[&before, &later, &ben]).await?, ["VALID"; 3]);
    // The local ann is another user.
    boss.execute("select tollgate.revoke_user('ann')", &[]).await?;
    assert_eq!(codes(&[&before, &later, &ben]).await?, ["VALID"; 3]);
    boss.execute("select tollgate.revoke_user('idp:ann')", &[]).await?;
    // Also one from a clock that is ahead by less than the leeway.
    assert_eq!(
        codes(&[&before, &later, &token("ann", at + 25), &ben]).await?,
        ["REVOKED", "REVOKED", "REVOKED", "VALID"]
    );
    // As if it had been an hour ago.
    db.owner
        .batch_execute("update tollgate.revoked_users set revoked_at = revoked_at - interval '1 hour'")
        .await?;
    assert_eq!(codes(&[&before, &later, &ben]).await?, ["REVOKED", "VALID", "VALID"]);
    Ok(())
}

/// No key signs in this database, so it has no access tokens of its own.
#[tokio::test]
async fn a_user_who_leaves_an_attached_table_loses_the_foreign_tokens_from_before() -> Result<()> {
    let (db, boss) = database("leavers").await?;
    let key = Key::new("k");
    trust(&boss, ISSUER, &set(&[&key]), "user_prefix => 'idp:', scopes => '{posts:read}'").await?;
    db.owner
        .batch_execute(
            "create table users (id text primary key, active boolean not null default true);
             insert into users values ('idp:ann'), ('idp:ben'), ('idp:eve');
             select tollgate.attach_users_table('users', 'id', active => 'active')",
        )
        .await?;
    let token = |sub: &str| key.sign(&claims(ISSUER, &json!({"sub": sub}))?);
    let tokens = [token("ann")?, token("ben")?, token("eve")?];
    let codes = async || -> Result<Vec<String>> {
        let web = db.session("web").await?;
        let mut codes = Vec::new();
        for token in &tokens {
            codes.push(code(&web, token).await?);
        }
        Ok(codes)
    };
    assert_eq!(codes().await?, ["VALID", "VALID", "VALID"]);
    db.owner
        .batch_execute(
            "update users set active = false where id = 'idp:ann'; delete from users where id = 'idp:ben'",
        )
        .await?;
    assert_eq!(codes().await?, ["REVOKED", "REVOKED", "VALID"]);
    Ok(())
}

// ---- Keys that are fetched

/// A role with the capability that fetches keys and no other, and an issuer whose keys are fetched.
async fn fetched(name: &str) -> Result<(Db, Client, Client)> {
    let (db, boss) = database(name).await?;
    db.owner
        .batch_execute(
            "do $$ begin create role fetcher login; exception when duplicate_object or unique_violation then end $$;
             select tollgate.grant_capability('fetcher', 'key_fetcher')",
        )
        .await?;
    let fetcher = db.session("fetcher").await?;
    boss.execute("select tollgate.trust_issuer($1, 'idp:', $2)", &[&ISSUER, &vec![AUDIENCE]]).await?;
    Ok((db, boss, fetcher))
}

async fn store(
    client: &Client,
    issuer: &str,
    jwks: &str,
    max_age: &str,
) -> Result<(i32, i32, Option<String>)> {
    let call =
        "select s.stored, s.refused, s.detail from tollgate.store_issuer_keys($1, $2, $3::text::interval) s";
    let row = client.query_one(call, &[&issuer, &jwks, &max_age]).await?;
    Ok((row.get(0), row.get(1), row.get(2)))
}

/// Issuer and reason of those that are due.
async fn due(client: &Client) -> Result<BTreeSet<(String, String)>> {
    let rows = client.query("select issuer, reason from tollgate.issuers_due()", &[]).await?;
    Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
}

fn because(reason: &str) -> BTreeSet<(String, String)> {
    BTreeSet::from([(ISSUER.to_owned(), reason.to_owned())])
}

/// Lets time pass for the issuer's keys.
async fn later(db: &Db, by: &str) -> Result<()> {
    let change = format!(
        "update tollgate.issuers set tried_at = tried_at - interval '{by}', due_at = due_at - interval '{by}'"
    );
    Ok(db.owner.batch_execute(&change).await?)
}

#[tokio::test]
async fn keys_are_fetched_when_they_are_due_and_a_bad_set_changes_nothing() -> Result<()> {
    let (db, boss, fetcher) = fetched("fetched").await?;
    let (first, second) = (Key::new("1"), Key::new("2"));
    let token = first.sign(&claims(ISSUER, &json!({}))?)?;
    assert_eq!(due(&fetcher).await?, because("new"));
    assert_eq!(store(&fetcher, ISSUER, &set(&[&first]).to_string(), "10 minutes").await?, (1, 0, None));
    assert_eq!(code(&db.web, &token).await?, "VALID");
    assert_eq!(due(&fetcher).await?, BTreeSet::new());
    later(&db, "9 minutes").await?;
    assert_eq!(due(&fetcher).await?, BTreeSet::new());
    later(&db, "1 minute").await?;
    assert_eq!(due(&fetcher).await?, because("age"));

    // Sets of which nothing can be used change nothing, and are failures.
    let many =
        json!({"keys": (0..10_000).map(|n| json!({"kty": "EC", "kid": n.to_string()})).collect::<Vec<_>>()});
    let bad = [
        (String::new(), "the key set is refused"),
        ("<!DOCTYPE html><html></html>".to_owned(), "the key set is refused"),
        ("{}".to_owned(), "the key set is refused"),
        (json!({"keys": []}).to_string(), "the key set is empty"),
        (
            json!({"keys": [first.jwk(), {"kty": "oct", "kid": "s", "k": "c2VjcmV0"}]}).to_string(),
            "private or symmetric",
        ),
        (json!({"keys": [first.jwk(), first.jwk()]}).to_string(), "two keys"),
        (
            json!({"keys": [{"kty": "EC", "crv": "P-384", "kid": "3", "x": "AA", "y": "AA"}]}).to_string(),
            "key \"3\"",
        ),
        (many.to_string(), "the key set is refused"),
        (" ".repeat(300_000), "the key set is refused"),
    ];
    for (n, (jwks, problem)) in bad.iter().enumerate() {
        let (stored, _, detail) = store(&fetcher, ISSUER, jwks, "10 minutes").await?;
        let detail = detail.context("a problem")?;
        assert_eq!(stored, 0);
        assert!(detail.contains(problem) && !detail.contains("c2VjcmV0"), "{problem}: {detail}");
        let state = "select failures, problem, keys, problem_at is not null from tollgate.trusted_issuers";
        let state = db.operator.query_one(state, &[]).await?;
        assert_eq!(
            (
                state.get::<_, i32>(0),
                state.get::<_, &str>(1),
                state.get::<_, i64>(2),
                state.get::<_, bool>(3)
            ),
            (i32::try_from(n)? + 1, &*detail, 1, true)
        );
        assert_eq!(code(&db.web, &token).await?, "VALID");
    }
    // It is tried again, later and later.
    assert_eq!(due(&fetcher).await?, BTreeSet::new());
    later(&db, "15 minutes").await?;
    assert_eq!(due(&fetcher).await?, because("failed"));
    let note = "select tollgate.note_issuer_failure($1, $2)";
    let problem = format!("it said: {}\r\n{}", token, "0a".repeat(40));
    fetcher.execute(note, &[&ISSUER, &problem]).await?;
    let noted: String = value(&db.operator, "select problem from tollgate.trusted_issuers").await?;
    assert_eq!(noted, "it said: ………", "without what may be a token, and on one line");

    // One that cannot be used is left out, and what the others say counts.
    let mixed =
        json!({"keys": [second.jwk(), {"kty": "EC", "crv": "P-384", "kid": "4", "x": "AA", "y": "AA"}]});
    let (stored, refused_keys, detail) = store(&fetcher, ISSUER, &mixed.to_string(), "1 second").await?;
    assert_eq!((stored, refused_keys), (1, 1));
    assert!(detail.context("a problem")?.contains("key \"4\""));
    assert_eq!(code(&db.web, &token).await?, "UNKNOWN_KEY", "it was withdrawn");
    assert_eq!(code(&db.web, &second.sign(&claims(ISSUER, &json!({}))?)?).await?, "VALID");
    let state = "select failures, kids, problem ~ 'key \"4\"', fetched_at > now() - interval '1 minute',
                        due_at between now() + interval '30 seconds' and now() + interval '1 minute' from tollgate.trusted_issuers";
    let row = db.operator.query_one(state, &[]).await?;
    assert_eq!((row.get::<_, i32>(0), row.get::<_, Vec<&str>>(1)), (0, vec!["2"]));
    assert!(row.get::<_, bool>(2) && row.get::<_, bool>(3), "{row:?}");
    assert!(row.get::<_, bool>(4), "not sooner than a minute");
    store(&fetcher, ISSUER, &set(&[&second]).to_string(), "1 year").await?;
    let at_most =
        "select due_at <= now() + interval '1 hour' and problem is null from tollgate.trusted_issuers";
    assert!(value::<bool>(&db.operator, at_most).await?);
    // Only what changed is an event.
    assert_eq!(events(&db.owner, "issuer.keys_changed").await?.len(), 2);
    // Other sources: what was fetched from elsewhere is forgotten.
    boss.execute(
        "select tollgate.trust_issuer($1, 'idp:', $2, jwks_url => 'https://IDP.test/keys')",
        &[&ISSUER, &vec![AUDIENCE]],
    )
    .await?;
    let row =
        db.operator.query_one("select keys, jwks_url, keys_from from tollgate.trusted_issuers", &[]).await?;
    assert_eq!(
        (row.get::<_, i64>(0), row.get::<_, &str>(1), row.get::<_, &str>(2)),
        (0, "https://idp.test/keys", "jwks_url")
    );
    assert_eq!(due(&fetcher).await?, because("new"));
    Ok(())
}

#[tokio::test]
async fn an_unknown_key_makes_its_issuer_due_at_most_once_a_minute() -> Result<()> {
    let (db, _, fetcher) = fetched("unknown_keys").await?;
    let (known, new) = (Key::new("1"), Key::new("2"));
    let jwks = set(&[&known]).to_string();
    store(&fetcher, ISSUER, &jwks, "1 hour").await?;
    let token = new.sign(&claims(ISSUER, &json!({}))?)?;
    assert_eq!(code(&db.web, &token).await?, "UNKNOWN_KEY");
    assert_eq!(due(&fetcher).await?, BTreeSet::new(), "it was fetched just now");
    later(&db, "1 minute").await?;
    assert_eq!(due(&fetcher).await?, because("unknown key"));
    // Other databases of the server, and other issuers, are not concerned.
    let (other, _, elsewhere) = fetched("known_keys").await?;
    store(&elsewhere, ISSUER, &jwks, "1 hour").await?;
    later(&other, "1 minute").await?;
    assert_eq!(due(&elsewhere).await?, BTreeSet::new());
    // Whatever is shown meanwhile.
    for kid in ["3", "4", "5"] {
        let header = json!({"alg": "ES256", "kid": kid, "typ": "JWT"});
        code(&db.web, &sign(&new.key, &header, &claims(ISSUER, &json!({}))?)?).await?;
    }
    assert_eq!(due(&fetcher).await?, because("unknown key"));
    fetcher.execute("select tollgate.note_issuer_failure($1, 'down')", &[&ISSUER]).await?;
    code(&db.web, &token).await?;
    assert_eq!(due(&fetcher).await?, BTreeSet::new());
    store(&fetcher, ISSUER, &set(&[&known, &new]).to_string(), "1 hour").await?;
    assert_eq!(code(&db.web, &token).await?, "VALID");
    assert_eq!(due(&fetcher).await?, BTreeSet::new());
    Ok(())
}

#[tokio::test]
async fn only_a_fetcher_stores_keys_and_only_of_issuers_whose_keys_are_fetched() -> Result<()> {
    let (db, boss, fetcher) = fetched("fetchers").await?;
    let (given, planted) = (Key::new("1"), Key::new("1"));
    let jwks = set(&[&planted]).to_string();
    trust(&boss, "https://given.test", &set(&[&given]), "user_prefix => 'given:'").await?;
    for issuer in ["https://given.test", "https://unknown.test", "https://tollgate.test"] {
        let (stored, _, detail) = store(&fetcher, issuer, &jwks, "1 hour").await?;
        assert_eq!((stored, detail.is_some()), (0, true), "{issuer}");
        fetcher.execute("select tollgate.note_issuer_failure($1, 'down')", &[&issuer]).await?;
    }
    let token = planted.sign(&claims("https://given.test", &json!({}))?)?;
    assert_eq!(code(&db.web, &token).await?, "BAD_SIGNATURE");
    assert!(due(&fetcher).await?.iter().all(|(issuer, _)| issuer == ISSUER), "those alone are due");
    let failures = "select failures from tollgate.trusted_issuers where issuer = 'https://given.test'";
    assert_eq!(value::<i32>(&db.operator, failures).await?, 0);
    for client in [&db.web, &db.operator, &boss] {
        for call in ["issuers_due()", "store_issuer_keys('x', 'y')", "note_issuer_failure('x', 'y')"] {
            let call = format!("select tollgate.{call}");
            refused(client.execute(&call, &[]).await, &SqlState::INSUFFICIENT_PRIVILEGE);
        }
    }
    for call in ["create_api_token('ann', 'n')", "trust_issuer('x', 'x', '{a}')", "revoke_user('ann')"] {
        let error = error(fetcher.execute(&format!("select tollgate.{call}"), &[]).await);
        assert_eq!(error.code(), &SqlState::INSUFFICIENT_PRIVILEGE, "{call}");
    }
    // What a stolen one can do: no more than the issuer could.
    store(&fetcher, ISSUER, &jwks, "1 hour").await?;
    let forged = planted.sign(&claims(ISSUER, &json!({"sub": "given:ann", "scope": "admin posts:read"}))?)?;
    let verified = verify(&db.web, &forged, "").await?;
    assert_eq!((verified.user_id.as_deref(), verified.scopes), (Some("idp:given:ann"), Some(Vec::new())));
    Ok(())
}

#[tokio::test]
async fn a_stored_key_set_waits_for_a_change_of_the_issuer_and_does_not_deadlock() -> Result<()> {
    let (db, boss, fetcher) = fetched("at_once").await?;
    let key = Key::new("1");
    let jwks = set(&[&key]).to_string();
    boss.batch_execute("begin").await?;
    boss.execute("select tollgate.distrust_issuer($1)", &[&ISSUER]).await?;
    let storing = store(&fetcher, ISSUER, &jwks, "1 hour");
    let committing = async {
        common::wait_until_blocked(&boss).await?;
        anyhow::Ok(boss.batch_execute("commit").await?)
    };
    let (stored, committed) = tokio::join!(storing, committing);
    committed?;
    assert_eq!(stored?.0, 0, "it is not trusted any more");
    let keys = "select count(*) from tollgate.issuer_keys";
    assert_eq!(value::<i64>(&db.owner, keys).await?, 0);
    Ok(())
}
