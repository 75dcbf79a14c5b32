//! Service accounts, by ordinary roles: what they prove themselves by, what they get for it, what ends that, and what an
//! attacker gets by everything else.

use anyhow::{Context as _, Result};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use tollgate_core::jws;
use tollgate_core::signature::{Algorithm, SigningKey};
use tollgate_tests::{DATABASE, eventually_async};
use uuid::Uuid;

use crate::commands::{NO, OK, failure, json_of, printed};
use crate::common::{
    self, Shared, authenticate, changed, current_user, now, refused, value, wait_until_blocked,
};
use crate::operator::{Db, flush_all};

/// As every test server is configured.
const ISSUER: &str = "https://tollgate.test";
const AUDIENCE: &str = "https://api.test";
/// Of workloads.
const CI: &str = "https://ci.test";

static SHARED: Shared = Shared::new(&[("tollgate.log_verifications", "failures")]);

struct Key {
    kid: &'static str,
    key: SigningKey,
}

impl Key {
    fn new(kid: &'static str) -> Result<Self> {
        Ok(Self { kid, key: SigningKey::generate(Algorithm::Es256)? })
    }

    fn jwk(&self) -> Result<Value> {
        Ok(serde_json::from_str(&self.key.public_key().to_jwk(self.kid))?)
    }

    fn sign(&self, typ: &str, claims: &Value) -> Result<String> {
        Ok(jws::sign(&self.key, self.kid, typ, &claims.to_string())?)
    }

    /// An assertion of a client.
    fn assert(&self, client: &str) -> Result<String> {
        self.sign("JWT", &assertion(client, &json!({}))?)
    }
}

fn set(keys: &[&Key]) -> Result<Value> {
    Ok(json!({ "keys": keys.iter().map(|key| key.jwk()).collect::<Result<Vec<_>>>()? }))
}

/// The claims of a good assertion, with some replaced; null removes one.
fn assertion(client: &str, changes: &Value) -> Result<Value> {
    let claims = json!({
        "iss": client, "sub": client, "aud": ISSUER, "exp": now()? + 60, "iat": now()?, "jti": Uuid::new_v4().to_string(),
    });
    changed(claims, changes)
}

/// The same of a token of a CI job.
fn job(changes: &Value) -> Result<Value> {
    let claims = json!({
        "iss": CI, "sub": "repo:octo-org/octo-repo:ref:refs/heads/main", "aud": AUDIENCE, "exp": now()? + 600, "iat": now()?,
        "jti": Uuid::new_v4().to_string(), "repository_id": "74", "repository": "octo-org/octo-repo", "ref": "refs/heads/main",
    });
    changed(claims, changes)
}

#[derive(Debug)]
struct Answer {
    code: String,
    token: Option<String>,
    scopes: Option<Vec<String>>,
    audience: Option<Vec<String>>,
}

impl Answer {
    fn token(self) -> Result<String> {
        let code = self.code;
        self.token.with_context(|| format!("{code} instead of a token"))
    }
}

/// A call with further arguments in SQL.
async fn call(
    client: &Client,
    id: &str,
    how: &str,
    credential: &str,
    more: &str,
) -> Result<Answer, tokio_postgres::Error> {
    let call = format!("select * from tollgate.client_credentials($1, {how} => $2{more})");
    let row = client.query_one(&call, &[&id, &credential]).await?;
    Ok(Answer {
        code: row.get("code"),
        token: row.get("access_token"),
        scopes: row.get("scopes"),
        audience: row.get("audience"),
    })
}

async fn verified(client: &Client, token: &str) -> Result<String> {
    let call = "select code from tollgate.verify_access_token($1)";
    Ok(client.query_one(call, &[&token]).await?.get(0))
}

fn claims(token: &str) -> Result<Value> {
    let payload = token.split('.').nth(1).context("a payload")?;
    Ok(serde_json::from_slice(&URL_SAFE_NO_PAD.decode(payload)?)?)
}

/// A database with a signing key, an application that issues, and one who administers.
struct World {
    db: Db,
    backend: Client,
    boss: Client,
}

const PREPARE: &str = "
    do $$ begin create role backend login; exception when duplicate_object or unique_violation then end $$;
    do $$ begin create role boss login; exception when duplicate_object or unique_violation then end $$;
    select tollgate.grant_capability('backend', 'issuer'), tollgate.grant_capability('boss', 'admin'),
           tollgate.grant_capability('web', 'verifier'), tollgate.create_signing_key()";

impl World {
    async fn create(name: &str) -> Result<Self> {
        let db = Db::create(&SHARED.cluster()?, name).await?;
        db.owner.batch_execute(PREPARE).await?;
        let (backend, boss) = (db.session("backend").await?, db.session("boss").await?);
        Ok(Self { db, backend, boss })
    }

    async fn account(&self, id: &str) -> Result<()> {
        let create = "select tollgate.create_service_account($1, 'of the tests', '{posts:read,users:*}')";
        Ok(self.boss.execute(create, &[&id]).await.map(drop)?)
    }

    /// The id of a secret, and itself.
    async fn secret(&self, id: &str) -> Result<(Uuid, String)> {
        let create = "select id, token from tollgate.create_service_account_secret($1)";
        let row = self.boss.query_one(create, &[&id]).await?;
        Ok((row.get(0), row.get(1)))
    }

    async fn keys(&self, id: &str, keys: &[&Key]) -> Result<()> {
        let call = "select tollgate.set_service_account_keys($1, $2)";
        Ok(self.boss.execute(call, &[&id, &set(keys)?]).await.map(drop)?)
    }

    async fn by_secret(&self, id: &str, secret: &str, more: &str) -> Result<Answer> {
        Ok(call(&self.backend, id, "secret", secret, more).await?)
    }

    async fn by_assertion(&self, id: &str, assertion: &str) -> Result<Answer> {
        Ok(call(&self.backend, id, "assertion", assertion, "").await?)
    }

    async fn verified(&self, token: &str) -> Result<String> {
        verified(&self.db.web, token).await
    }

    async fn admin(&self, call: &str) -> Result<bool> {
        value(&self.boss, &format!("select tollgate.{call}")).await
    }

    /// The conditions of the refusals that were recorded for an account, oldest first. Forgets them, so that the next one is too.
    async fn conditions(&self, id: &str) -> Result<Vec<String>> {
        let log = "select detail ->> 'condition' from tollgate.audit_log
                   where event = 'service.refused' and user_id = 'service:' || $1::text
                     and id > coalesce((select max(n) from public.seen), 0) order by id";
        self.db.owner.batch_execute("create table if not exists public.seen (n bigint)").await?;
        let rows = self.db.owner.query(log, &[&id]).await?;
        self.db
            .owner
            .batch_execute(
                "insert into public.seen select max(id) from tollgate.audit_log;
                 update tollgate.service_refusals set at = '-infinity'",
            )
            .await?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    }
}

// ---- Secrets

#[tokio::test]
async fn an_account_gets_tokens_for_its_secret_within_what_it_has() -> Result<()> {
    let world = World::create("svc_secret").await?;
    world
        .boss
        .batch_execute(
            "select tollgate.create_service_account('ci', 'The nightly build', '{posts:read,users:*}', '{https://api.test,https://b.test}',
                '5 minutes', 'builds', 'team build')",
        )
        .await?;
    let (id, secret) = world.secret("ci").await?;
    let answer = world.by_secret("ci", &secret, "").await?;
    assert_eq!(answer.code, "VALID");
    assert_eq!(answer.scopes.as_deref(), Some(&["posts:read".to_owned(), "users:*".to_owned()][..]));
    assert_eq!(answer.audience.as_deref().map(<[String]>::len), Some(2));
    let token = answer.token()?;
    let all = claims(&token)?;
    assert_eq!(
        (&all["sub"], &all["client_id"], &all["root"], &all["scope"], &all["aud"]),
        (
            &json!("service:ci"),
            &json!("ci"),
            &json!(id.to_string()),
            &json!("posts:read users:*"),
            &json!([AUDIENCE, "https://b.test"])
        )
    );
    assert_eq!(all["exp"].as_i64().zip(all["iat"].as_i64()).map(|(exp, iat)| exp - iat), Some(300));
    world.db.web.batch_execute("begin").await?;
    authenticate(&world.db.web, &token).await?;
    assert_eq!(current_user(&world.db.web).await?.as_deref(), Some("service:ci"));
    assert!(value::<bool>(&world.db.web, "select tollgate.token_has_scope('users:write')").await?);
    world.db.web.batch_execute("commit").await?;

    for (asked, scopes) in
        [("'{users:read}'", "users:read"), ("'{posts:read,users:*}'", "posts:read users:*")]
    {
        let token = world.by_secret("ci", &secret, &format!(", scopes => {asked}")).await?.token()?;
        assert_eq!(claims(&token)?["scope"], scopes);
    }
    let token = world.by_secret("ci", &secret, ", audience => '{https://b.test}'").await?.token()?;
    assert_eq!(claims(&token)?["aud"], "https://b.test");
    for beyond in [
        "'{posts:write}'",
        "'{admin}'",
        "'{posts:*}'",
        "'{tollgate:tokens}'",
        "'{posts:read,x y}'",
        "array[null]",
    ] {
        let answer = world.by_secret("ci", &secret, &format!(", scopes => {beyond}")).await?;
        assert_eq!((answer.code.as_str(), answer.token), ("INSUFFICIENT_SCOPE", None), "{beyond}");
    }
    for beyond in ["'{https://c.test}'", "'{https://api.test,https://c.test}'", "'{}'", "array[null]"] {
        let answer = world.by_secret("ci", &secret, &format!(", audience => {beyond}")).await?;
        assert_eq!((answer.code.as_str(), answer.token), ("WRONG_AUDIENCE", None), "{beyond}");
    }

    // By itself the secret says who calls, and grants nothing.
    let alone = "select code from tollgate.verify_api_token($1, '{posts:read}')";
    assert_eq!(world.db.web.query_one(alone, &[&secret]).await?.get::<_, &str>(0), "INSUFFICIENT_SCOPE");
    flush_all(&world.db.operator).await?;
    let row: Value = value(&world.boss, "select to_jsonb(s) from tollgate.service_accounts s").await?;
    assert_eq!(
        (&row["user_id"], &row["name"], &row["owner"], &row["lifetime"], &row["enabled"], &row["secrets"]),
        (
            &json!("service:ci"),
            &json!("The nightly build"),
            &json!("team build"),
            &json!("00:05:00"),
            &json!(true),
            &json!(1)
        )
    );
    assert!(row["last_used_at"].is_string(), "{row}");
    let issued: i64 =
        value(&world.boss, "select use_count from tollgate.list_api_tokens('service:ci')").await?;
    assert!(issued > 3, "uses of the secret are counted: {issued}");
    Ok(())
}

#[tokio::test]
async fn whatever_is_wrong_with_a_client_is_one_code_and_the_condition_is_for_its_managers() -> Result<()> {
    let world = World::create("svc_refused").await?;
    for id in ["ci", "other", "off"] {
        world.account(id).await?;
    }
    let (_, secret) = world.secret("ci").await?;
    let (_, others) = world.secret("other").await?;
    let (_, of_disabled) = world.secret("off").await?;
    assert!(world.admin("disable_service_account('off', 'unused')").await?);
    let anns = common::issue(&world.db.owner, "ann", &["posts:read"]).await?.token;
    let unknown = secret.replacen("tgt_", "abc_", 1);
    for (id, presented, condition) in [
        ("ci", others.as_str(), "the secret is of another user"),
        ("ci", &anns, "the secret is of another user"),
        ("ci", &unknown, "the secret is NOT_FOUND"),
        ("ci", "guess", "the secret is MALFORMED"),
        ("off", &of_disabled, "the secret is DISABLED"),
    ] {
        let answer = world.by_secret(id, presented, ", client_ip => '192.0.2.7'").await?;
        assert_eq!((answer.code.as_str(), answer.token), ("INVALID_CLIENT", None), "{condition}");
        assert_eq!(world.conditions(id).await?, [condition]);
        let line = format!(
            "client_credentials code=INVALID_CLIENT client_id={id} client_ip=192.0.2.7/32 condition={condition}"
        );
        let log = world.db.cluster.log();
        assert!(log.contains(&line) || log.contains(&line.replace("/32", "")), "{line}");
    }
    // Of an account that does not exist there is nothing to record.
    for id in ["none", "CI", "service:ci", "", "ci\n"] {
        assert_eq!(world.by_secret(id, &secret, "").await?.code, "INVALID_CLIENT", "{id}");
    }
    // At most one a minute for each.
    for _ in 0..3 {
        world.by_secret("ci", "guess", "").await?;
    }
    assert_eq!(world.conditions("ci").await?.len(), 1);
    for arguments in ["'ci'", "'ci', 'a', 'b'", "null, 'a'"] {
        let call = format!("select tollgate.client_credentials({arguments})");
        refused(world.backend.batch_execute(&call).await, &SqlState::INVALID_PARAMETER_VALUE);
    }
    assert_eq!(world.by_secret("ci", &secret, "").await?.code, "VALID");
    // Neither may an attempt that is not committed keep the account from being disabled.
    world.backend.batch_execute("begin").await?;
    assert_eq!(world.by_secret("ci", "guess", "").await?.code, "INVALID_CLIENT");
    assert!(world.admin("disable_service_account('ci')").await?);
    world.backend.batch_execute("rollback").await?;
    Ok(())
}

#[tokio::test]
async fn guesses_are_counted_at_their_address() -> Result<()> {
    let world = World::create("svc_guesses").await?;
    world.account("ci").await?;
    let (_, secret) = world.secret("ci").await?;
    world
        .db
        .owner
        .batch_execute(
            "alter database svc_guesses set tollgate.failure_rate_limit = 3; alter database svc_guesses set tollgate.failure_rate_window = '1h'",
        )
        .await?;
    let backend = world.db.session("backend").await?;
    let key = Key::new("1")?;
    for (net, how, guess) in [(1, "secret", "guess".to_owned()), (2, "assertion", key.assert("ci")?)] {
        let from = format!(", client_ip => '192.0.2.{net}'");
        for _ in 0..3 {
            assert_eq!(call(&backend, "ci", how, &guess, &from).await?.code, "INVALID_CLIENT");
        }
        // Not even a right one is confirmed.
        assert_eq!(call(&backend, "ci", "secret", &secret, &from).await?.code, "RATE_LIMITED");
    }
    assert_eq!(call(&backend, "ci", "secret", &secret, ", client_ip => '192.0.2.3'").await?.code, "VALID");
    Ok(())
}

#[tokio::test]
async fn what_came_of_an_account_ends_at_once_with_what_it_came_of() -> Result<()> {
    let world = World::create("svc_ends").await?;
    let key = Key::new("1")?;
    let (second, third) = (Key::new("2")?, Key::new("3")?);
    world.account("ci").await?;
    world.keys("ci", &[&key, &second]).await?;
    let (first, secret) = world.secret("ci").await?;
    let (_, other) = world.secret("ci").await?;

    // The secret.
    let of_first = world.by_secret("ci", &secret, "").await?.token()?;
    let of_other = world.by_secret("ci", &other, "").await?.token()?;
    let rotated: String = world
        .boss
        .query_one("select token from tollgate.rotate_api_token($1, '1 hour')", &[&first])
        .await?
        .get(0);
    let of_rotated = world.by_secret("ci", &rotated, "").await?.token()?;
    assert_eq!(world.by_secret("ci", &secret, "").await?.code, "VALID", "within the grace");
    assert!(common::revoke(&world.boss, first).await?);
    assert_eq!(world.verified(&of_first).await?, "REVOKED");
    for token in [&of_other, &of_rotated] {
        assert_eq!(world.verified(token).await?, "VALID");
    }

    // Narrowing, and not widening or another name.
    let by_key = world.by_assertion("ci", &key.assert("ci")?).await?.token()?;
    let update = async |arguments: &str| -> Result<()> {
        let call = format!("select tollgate.update_service_account('ci', {arguments})");
        Ok(world.boss.batch_execute(&call).await?)
    };
    update("name => 'Other', scopes => '{posts:read,posts:write,users:*}', lifetime => '1 minute'").await?;
    assert_eq!(world.verified(&by_key).await?, "VALID");
    update("scopes => '{posts:read,posts:write}'").await?;
    for token in [&by_key, &of_other, &of_rotated] {
        assert_eq!(world.verified(token).await?, "REVOKED", "it was issued wider");
    }
    let narrow = world.by_secret("ci", &other, "").await?.token()?;
    assert_eq!(claims(&narrow)?["scope"], "posts:read posts:write");
    update("audience => '{https://api.test}'").await?;
    assert_eq!(world.verified(&narrow).await?, "REVOKED");

    // A key.
    let by_key = world.by_assertion("ci", &key.assert("ci")?).await?.token()?;
    world.keys("ci", &[&key, &second, &third]).await?;
    assert_eq!(world.verified(&by_key).await?, "VALID", "one came");
    world.keys("ci", &[&second, &third]).await?;
    assert_eq!(world.verified(&by_key).await?, "REVOKED", "one went");
    assert_eq!(world.by_assertion("ci", &key.assert("ci")?).await?.code, "INVALID_CLIENT");
    let by_key = world.by_assertion("ci", &second.assert("ci")?).await?.token()?;

    // The account.
    let by_secret = world.by_secret("ci", &other, "").await?.token()?;
    world.boss.batch_execute("begin isolation level repeatable read; select 1").await?;
    let call_disable = "select tollgate.disable_service_account('ci', 'an incident')";
    assert!(value::<bool>(&world.db.session("boss").await?, call_disable).await?);
    world.boss.batch_execute("rollback").await?;
    for token in [&by_key, &by_secret] {
        assert_eq!(world.verified(token).await?, "REVOKED");
    }
    let code = "select code from tollgate.verify_api_token($1)";
    assert_eq!(world.db.web.query_one(code, &[&other]).await?.get::<_, &str>(0), "DISABLED");
    assert_eq!(world.by_assertion("ci", &second.assert("ci")?).await?.code, "INVALID_CLIENT");
    let secret_of_disabled =
        world.boss.batch_execute("select tollgate.create_service_account_secret('ci')").await;
    refused(secret_of_disabled, &SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE);
    assert!(!world.admin("disable_service_account('ci')").await?);
    assert!(world.admin("enable_service_account('ci')").await?);
    assert!(!world.admin("enable_service_account('ci')").await?);
    assert_eq!(world.verified(&by_secret).await?, "REVOKED", "what was issued before stays refused");
    let again = world.by_secret("ci", &other, "").await?.token()?;
    assert_eq!(world.verified(&again).await?, "VALID");

    assert!(world.admin("delete_service_account('ci', 'over')").await?);
    assert!(!world.admin("delete_service_account('ci')").await?);
    world.account("ci").await?;
    assert_eq!(world.verified(&again).await?, "REVOKED");
    assert_eq!(world.by_secret("ci", &other, "").await?.code, "INVALID_CLIENT", "another account has its id");
    assert_eq!(world.by_assertion("ci", &second.assert("ci")?).await?.code, "INVALID_CLIENT");
    let rows = world
        .db
        .owner
        .query("select distinct event from tollgate.audit_log where event like 'service.%' order by 1", &[])
        .await?;
    let events: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
    assert_eq!(
        events,
        [
            "service.created",
            "service.deleted",
            "service.disabled",
            "service.enabled",
            "service.keys_changed",
            "service.refused",
            "service.updated"
        ]
    );
    Ok(())
}

#[tokio::test]
async fn a_secret_that_is_created_while_its_account_is_disabled_waits_and_is_refused() -> Result<()> {
    let world = World::create("svc_race").await?;
    world.account("ci").await?;
    let other = world.db.session("boss").await?;
    world.boss.batch_execute("begin; select tollgate.disable_service_account('ci')").await?;
    let create = tokio::spawn(async move {
        other.batch_execute("select tollgate.create_service_account_secret('ci')").await
    });
    wait_until_blocked(&world.boss).await?;
    world.boss.batch_execute("commit").await?;
    refused(create.await?, &SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE);
    Ok(())
}

#[tokio::test]
async fn nothing_else_is_the_user_of_an_account() -> Result<()> {
    let world = World::create("svc_user").await?;
    world.account("ci").await?;
    let (id, secret) = world.secret("ci").await?;
    let jwks = set(&[&Key::new("1")?])?.to_string();
    for call in [
        "create_api_token('service:ci', 'n')".to_owned(),
        "create_api_token('service:none', 'n')".to_owned(),
        "import_api_token('service:ci', 'n', sha256('x'))".to_owned(),
        "issue_access_token('service:ci', '{}')".to_owned(),
        "open_session('service:ci', '{}')".to_owned(),
        format!("derive_api_token('{secret}', 'n', '{{}}', null)"),
        format!("update_api_token('{id}', '{{\"scopes\": [\"posts:read\"]}}')"),
        format!("trust_issuer('https://a.test', 'service:', '{{a}}', jwks => '{jwks}')"),
        format!("trust_issuer('https://a.test', 'service:ci', '{{a}}', jwks => '{jwks}')"),
        format!("trust_issuer('https://a.test', 'serv', '{{a}}', jwks => '{jwks}')"),
        format!("trust_issuer('service:ci', 'a:', '{{a}}', jwks => '{jwks}')"),
        "create_service_account('service:ci', 'n')".to_owned(),
        "create_service_account('Ci', 'n')".to_owned(),
        "create_service_account('cj', ' ')".to_owned(),
        "create_service_account('cj', 'n', '{no:such}')".to_owned(),
        "create_service_account('cj', 'n', audience => '{}')".to_owned(),
        "create_service_account('cj', 'n', lifetime => '2 days')".to_owned(),
    ] {
        let result = world.boss.batch_execute(&format!("select tollgate.{call}")).await;
        let error = common::error(result);
        assert_eq!(error.code(), &SqlState::INVALID_PARAMETER_VALUE, "{call}: {error:?}");
    }
    let twice = world.boss.batch_execute("select tollgate.create_service_account('ci', 'n')").await;
    refused(twice, &SqlState::DUPLICATE_OBJECT);
    let scope = world.boss.batch_execute("select tollgate.drop_scope('posts:read')").await;
    refused(scope, &SqlState::DEPENDENT_OBJECTS_STILL_EXIST);

    // Nor by an issuer that names its users as the application does.
    let key = Key::new("1")?;
    world
        .boss
        .execute(
            "select tollgate.trust_issuer('https://ci.test', '', '{https://api.test}', jwks => $1, scopes => '{posts:read}')",
            &[&set(&[&key])?],
        )
        .await?;
    let foreign = key.sign("JWT", &job(&json!({"sub": "service:ci"}))?)?;
    assert_eq!(world.verified(&foreign).await?, "MALFORMED");

    // A users table decides nothing about accounts.
    world
        .db
        .owner
        .batch_execute(
            "create table public.users (id text primary key, active boolean not null);
             insert into public.users values ('ann', true), ('service:ci', false);
             select tollgate.attach_users_table('public.users', 'id', active => 'active')",
        )
        .await?;
    let token = world.by_secret("ci", &secret, "").await?.token()?;
    world.db.owner.batch_execute("delete from public.users; truncate public.users").await?;
    assert_eq!(world.verified(&token).await?, "VALID");
    assert_eq!(world.by_secret("ci", &secret, "").await?.code, "VALID");
    world.secret("ci").await?;
    world.boss.execute("select tollgate.rotate_api_token($1)", &[&id]).await?;
    Ok(())
}

// ---- Assertions

#[tokio::test]
async fn an_assertion_is_good_once_and_only_as_it_should_be() -> Result<()> {
    let world = World::create("svc_assertion").await?;
    let (key, others) = (Key::new("1")?, Key::new("1")?);
    for (id, key) in [("ci", &key), ("other", &others)] {
        world.account(id).await?;
        world.keys(id, &[key]).await?;
    }
    let first = key.assert("ci")?;
    let token = world.by_assertion("ci", &first).await?.token()?;
    assert_eq!(world.verified(&token).await?, "VALID");
    assert_eq!((&claims(&token)?["sub"], claims(&token)?.get("root")), (&json!("service:ci"), None));
    assert_eq!(world.by_assertion("ci", &first).await?.code, "INVALID_CLIENT");
    assert_eq!(world.conditions("ci").await?, ["the assertion was used before (jti)"]);
    // What asks for too much is not used up, and what was rolled back did not happen.
    let second = key.assert("ci")?;
    let beyond = call(&world.backend, "ci", "assertion", &second, ", scopes => '{admin}'").await?;
    assert_eq!(beyond.code, "INSUFFICIENT_SCOPE");
    world.backend.batch_execute("begin").await?;
    assert_eq!(world.by_assertion("ci", &second).await?.code, "VALID");
    world.backend.batch_execute("rollback").await?;
    assert_eq!(world.by_assertion("ci", &second).await?.code, "VALID");
    assert_eq!(world.by_assertion("ci", &second).await?.code, "INVALID_CLIENT");
    world.conditions("ci").await?;

    let at = now()?;
    for (typ, changes, condition) in [
        ("at+jwt", json!({}), "the assertion: typ is one of another token"),
        ("JWT", json!({"sub": "other"}), "the assertion: sub is not the client"),
        ("JWT", json!({"sub": null}), "the assertion: sub is not the client"),
        ("JWT", json!({"aud": "https://other.test"}), "the assertion: aud is not the issuer alone"),
        ("JWT", json!({"aud": [ISSUER, "https://other.test"]}), "the assertion: aud is not the issuer alone"),
        ("JWT", json!({"aud": null}), "the assertion: aud is not the issuer alone"),
        ("JWT", json!({"exp": at + 600}), "the assertion: exp is more than 5 minutes ahead"),
        ("JWT", json!({"exp": at - 60}), "the assertion: exp has passed"),
        ("JWT", json!({"exp": null}), "the assertion: exp is missing"),
        ("JWT", json!({"iat": null}), "the assertion: iat is missing"),
        ("JWT", json!({"iat": at + 120}), "the assertion: iat or nbf lies ahead"),
        ("JWT", json!({"jti": null}), "the assertion: jti is missing or too long"),
        // Of an issuer that is not trusted.
        ("JWT", json!({"iss": "https://ci.test"}), "the token of the workload is UNTRUSTED_ISSUER"),
        ("JWT", json!({"iss": "other"}), "the token of the workload is UNTRUSTED_ISSUER"),
    ] {
        let presented = key.sign(typ, &assertion("ci", &changes)?)?;
        assert_eq!(world.by_assertion("ci", &presented).await?.code, "INVALID_CLIENT", "{changes}");
        assert_eq!(world.conditions("ci").await?, [condition], "{changes}");
    }
    // Keys belong to their account, and the algorithm to the key.
    let claims_of_ci = assertion("ci", &json!({}))?;
    let stranger = Key::new("2")?;
    let header =
        |alg: &str| URL_SAFE_NO_PAD.encode(json!({"alg": alg, "kid": "1", "typ": "JWT"}).to_string());
    let body = URL_SAFE_NO_PAD.encode(claims_of_ci.to_string());
    for (presented, condition) in [
        (others.sign("JWT", &claims_of_ci)?, "the key of the account did not sign the assertion"),
        (stranger.sign("JWT", &claims_of_ci)?, "the assertion names no key of the account (kid)"),
        (format!("{}.{body}.", header("none")), "the assertion is no signed token"),
        (format!("{}.{body}.AAAA", header("HS256")), "the assertion is no signed token"),
        ("guess".to_owned(), "the assertion is no signed token"),
        (token, "the token is one of our own"),
    ] {
        assert_eq!(world.by_assertion("ci", &presented).await?.code, "INVALID_CLIENT", "{condition}");
        let noted = world.conditions("ci").await?;
        assert!(noted.len() == 1 && noted[0].starts_with(condition), "{noted:?}: {condition}");
    }
    // The same jti of another client is another assertion.
    let twin = |key: &Key, id: &str| key.sign("JWT", &assertion(id, &json!({"jti": "twin"}))?);
    assert_eq!(world.by_assertion("ci", &twin(&key, "ci")?).await?.code, "VALID");
    assert_eq!(world.by_assertion("other", &twin(&others, "other")?).await?.code, "VALID");
    assert_eq!(world.by_assertion("other", &twin(&key, "ci")?).await?.code, "INVALID_CLIENT");

    // Kept for an hour longer than it could be accepted.
    let count = "select count(*) from tollgate.used_assertions";
    assert_eq!(value::<i64>(&world.db.owner, count).await?, 4);
    let purge = "select tollgate.purge_denials(1000)";
    world
        .db
        .owner
        .batch_execute("update tollgate.used_assertions set expires_at = now() - interval '59 minutes'")
        .await?;
    assert_eq!(value::<i64>(&world.db.operator, purge).await?, 0);
    world
        .db
        .owner
        .batch_execute("update tollgate.used_assertions set expires_at = now() - interval '61 minutes'")
        .await?;
    assert_eq!(value::<i64>(&world.db.operator, purge).await?, 4);
    Ok(())
}

#[tokio::test]
async fn of_two_uses_at_once_one_gets_a_token() -> Result<()> {
    let world = World::create("svc_at_once").await?;
    let key = Key::new("1")?;
    world.account("ci").await?;
    world.keys("ci", &[&key]).await?;
    for (end, expected) in [("commit", "INVALID_CLIENT"), ("rollback", "VALID")] {
        let presented = key.assert("ci")?;
        world.backend.batch_execute("begin").await?;
        assert_eq!(world.by_assertion("ci", &presented).await?.code, "VALID");
        let other = world.db.session("backend").await?;
        let second = tokio::spawn(async move { call(&other, "ci", "assertion", &presented, "").await });
        wait_until_blocked(&world.backend).await?;
        world.backend.batch_execute(end).await?;
        assert_eq!(second.await??.code, expected, "after {end}");
    }
    Ok(())
}

#[tokio::test]
async fn an_assertion_is_not_good_again_after_a_crash_nor_after_a_failover_that_lost_its_use() -> Result<()> {
    let mut primary = common::start(common_builder())?;
    primary.execute(DATABASE, PREPARE)?;
    let (key, ci) = (Key::new("1")?, Key::new("ci")?);
    let boss = primary.connect("boss", DATABASE).await?;
    boss.batch_execute("select tollgate.create_service_account('ci', 'n', '{posts:read}')").await?;
    boss.execute("select tollgate.set_service_account_keys('ci', $1)", &[&set(&[&key])?]).await?;
    let secret: String =
        boss.query_one("select token from tollgate.create_service_account_secret('ci')", &[]).await?.get(0);
    boss.execute(
        "select tollgate.trust_issuer($1, 'ci:', '{https://api.test}', jwks => $2)",
        &[&CI, &set(&[&ci])?],
    )
    .await?;
    boss.execute("select tollgate.trust_workload('ci', $1, '{\"repository_id\": \"74\"}')", &[&CI]).await?;

    // A commit that the server did not wait for otherwise.
    let backend = primary.connect("backend", DATABASE).await?;
    let used = key.assert("ci")?;
    assert_eq!(call(&backend, "ci", "assertion", &used, "").await?.code, "VALID");
    primary.crash()?;
    primary.restart()?;
    let backend = primary.connect("backend", DATABASE).await?;
    assert_eq!(call(&backend, "ci", "assertion", &used, "").await?.code, "INVALID_CLIENT");

    // So that the next refusal is recorded too.
    primary.execute(DATABASE, "update tollgate.service_refusals set at = '-infinity'")?;
    let mut standby = primary.standby()?;
    standby.catch_up_with(&primary)?;
    let there = standby.connect("backend", DATABASE).await?;
    let token = call(&there, "ci", "secret", &secret, "").await?.token()?;
    assert_eq!(verified(&there, &token).await?, "VALID", "issued and verified on a standby");
    let workload = ci.sign("JWT", &job(&json!({}))?)?;
    assert_eq!(call(&there, "ci", "assertion", &workload, "").await?.code, "VALID");
    assert_eq!(call(&there, "ci", "secret", "guess", "").await?.code, "INVALID_CLIENT");
    refused(
        call(&there, "ci", "assertion", &key.assert("ci")?, "").await,
        &SqlState::READ_ONLY_SQL_TRANSACTION,
    );
    standby.stop()?;
    let lost = key.assert("ci")?;
    assert_eq!(call(&backend, "ci", "assertion", &lost, "").await?.code, "VALID");
    primary.crash()?;
    standby.restart()?;
    standby.promote()?;
    let backend = standby.connect("backend", DATABASE).await?;
    assert_eq!(call(&backend, "ci", "assertion", &lost, "").await?.code, "INVALID_CLIENT");
    let owner = standby.connect("postgres", DATABASE).await?;
    let condition: String = value(
        &owner,
        "select detail ->> 'condition' from tollgate.audit_log where event = 'service.refused' order by id desc limit 1",
    )
    .await?;
    assert!(condition.contains("promoted"), "{condition}");
    assert_eq!(call(&backend, "ci", "assertion", &used, "").await?.code, "INVALID_CLIENT");
    // A client that asks again a moment later is served.
    eventually_async(std::time::Duration::from_secs(30), "a later assertion to be accepted", async || {
        let later = key.assert("ci").unwrap();
        call(&backend, "ci", "assertion", &later, "").await.unwrap().code == "VALID"
    })
    .await;
    Ok(())
}

fn common_builder() -> tollgate_tests::Builder {
    tollgate_tests::Cluster::builder().setting("synchronous_commit", "off").setting("tollgate.leeway", "0")
}

// ---- Workloads

#[tokio::test]
async fn a_workload_is_an_account_by_exact_conditions_and_no_longer_than_it_is_trusted() -> Result<()> {
    let world = World::create("svc_workload").await?;
    world.account("ci").await?;
    world.account("other").await?;
    let key = Key::new("1")?;
    let trust = "select tollgate.trust_issuer($1, 'ci:', '{https://api.test,https://sts.test}', jwks => $2)";
    let trust_workload = async |id: &str, conditions: Value, audience: Option<&str>| {
        let call = "select tollgate.trust_workload($1, $2, $3, $4)";
        world.boss.query_one(call, &[&id, &CI, &conditions, &audience]).await.map(|row| row.get::<_, Uuid>(0))
    };
    let conditions = json!({"repository_id": "74", "ref": "refs/heads/main"});
    refused(trust_workload("ci", conditions.clone(), None).await, &SqlState::UNDEFINED_OBJECT);
    world.boss.execute(trust, &[&CI, &set(&[&key])?]).await?;
    refused(trust_workload("none", conditions.clone(), None).await, &SqlState::UNDEFINED_OBJECT);
    for wrong in [json!({}), json!([]), json!({"a": ["b"]}), json!({"a": null}), json!({"a": {"b": 1}})] {
        refused(trust_workload("ci", wrong, None).await, &SqlState::INVALID_PARAMETER_VALUE);
    }
    let trusted = trust_workload("ci", conditions.clone(), None).await?;
    assert_eq!(trust_workload("ci", conditions, None).await?, trusted, "it is there");

    let presented = key.sign("JWT", &job(&json!({}))?)?;
    let token = world.by_assertion("ci", &presented).await?.token()?;
    assert_eq!(world.verified(&token).await?, "VALID");
    assert_eq!(claims(&token)?["sub"], "service:ci");
    assert_eq!(world.by_assertion("ci", &presented).await?.code, "VALID", "good until its end");
    assert_eq!(world.by_assertion("other", &presented).await?.code, "INVALID_CLIENT");
    assert_eq!(world.conditions("other").await?, ["the account trusts no workload of this issuer"]);
    let at = now()?;
    for (changes, condition) in [
        (json!({"repository_id": "75"}), "the claim repository_id has another value"),
        (json!({"repository_id": 74}), "the claim repository_id has another value"),
        (json!({"repository_id": null}), "the claim repository_id has another value"),
        (json!({"ref": "refs/heads/Main"}), "the claim ref has another value"),
        (json!({"aud": "https://other.test"}), "the token of the workload is WRONG_AUDIENCE"),
        (json!({"exp": at - 60}), "the token of the workload is EXPIRED"),
        (json!({"iat": null}), "the token of the workload is MALFORMED"),
        (json!({"iss": "https://ci.test/"}), "the token of the workload is UNTRUSTED_ISSUER"),
    ] {
        let other = key.sign("JWT", &job(&changes)?)?;
        assert_eq!(world.by_assertion("ci", &other).await?.code, "INVALID_CLIENT", "{changes}");
        assert_eq!(world.conditions("ci").await?, [condition], "{changes}");
    }
    let forged = Key::new("1")?.sign("JWT", &job(&json!({}))?)?;
    assert_eq!(world.by_assertion("ci", &forged).await?.code, "INVALID_CLIENT");
    assert_eq!(world.conditions("ci").await?, ["the token of the workload is BAD_SIGNATURE"]);

    // An audience of its own.
    let for_sts = trust_workload("other", json!({"sub": "job"}), Some("https://sts.test")).await?;
    for (audience, code) in [(AUDIENCE, "INVALID_CLIENT"), ("https://sts.test", "VALID")] {
        let presented = key.sign("JWT", &job(&json!({"sub": "job", "aud": audience}))?)?;
        assert_eq!(world.by_assertion("other", &presented).await?.code, code, "{audience}");
    }
    assert_eq!(world.conditions("other").await?, ["the token is not for the audience of the workload"]);
    let listed: Value =
        value(&world.boss, "select workloads from tollgate.list_service_accounts('other')").await?;
    assert_eq!(
        listed,
        json!([{"id": for_sts, "issuer": CI, "audience": "https://sts.test", "conditions": {"sub": "job"}}])
    );

    // What it got ends with the token of the workload, with this trust, and with the issuer.
    let revoke = "select tollgate.revoke_access_token($1::text, 'leaked')";
    assert!(world.backend.query_one(revoke, &[&presented]).await?.get::<_, bool>(0));
    assert_eq!(world.verified(&token).await?, "REVOKED");
    assert_eq!(world.by_assertion("ci", &presented).await?.code, "INVALID_CLIENT");
    let again = async || -> Result<String> {
        world.by_assertion("ci", &key.sign("JWT", &job(&json!({}))?)?).await?.token()
    };
    let token = again().await?;
    assert!(world.admin(&format!("distrust_workload('{trusted}', 'over')")).await?);
    assert!(!world.admin(&format!("distrust_workload('{trusted}')")).await?);
    assert_eq!(world.verified(&token).await?, "REVOKED");
    trust_workload("ci", json!({"repository_id": "74"}), None).await?;
    let token =
        world.by_assertion("ci", &key.sign("JWT", &job(&json!({"sub": "runner"}))?)?).await?.token()?;
    world.boss.execute("select tollgate.revoke_user('ci:runner', 'compromised')", &[]).await?;
    assert_eq!(world.verified(&token).await?, "REVOKED", "with the user whose token it was");
    let token = again().await?;
    assert!(world.admin("distrust_issuer('https://ci.test')").await?);
    assert_eq!(world.verified(&token).await?, "REVOKED");
    Ok(())
}

#[tokio::test]
async fn an_account_whose_quota_is_used_up_gets_nothing() -> Result<()> {
    let world = World::create("svc_quota").await?;
    let key = Key::new("1")?;
    for account in ["by_secret", "by_key"] {
        world.account(account).await?;
        let call = "select tollgate.set_quota(user_id => 'service:' || $1, amount => 1, per => 'day')";
        world.db.owner.execute(call, &[&account]).await?;
    }
    world.keys("by_key", &[&key]).await?;
    let codes = [
        world.by_assertion("by_key", &key.assert("by_key")?).await?.code,
        world.by_assertion("by_key", &key.assert("by_key")?).await?.code,
    ];
    assert_eq!(codes, ["VALID", "RATE_LIMITED"]);
    let (_, secret) = world.secret("by_secret").await?;
    let codes = [
        world.by_secret("by_secret", &secret, "").await?.code,
        world.by_secret("by_secret", &secret, "").await?.code,
    ];
    assert_eq!(codes, ["VALID", "RATE_LIMITED"]);
    assert_eq!(world.conditions("by_secret").await?, [""; 0], "it is no fault of the account's");
    Ok(())
}

#[tokio::test]
async fn conditions_on_names_alone_are_warned_of() -> Result<()> {
    let world = World::create("svc_names").await?;
    world.account("ci").await?;
    let keys = set(&[&Key::new("1")?])?;
    let github = "https://token.actions.githubusercontent.com";
    for (issuer, prefix) in [(CI, "ci:"), (github, "github:")] {
        let trust = "select tollgate.trust_issuer($1, $2, '{https://api.test}', jwks => $3)";
        world.boss.execute(trust, &[&issuer, &prefix, &keys]).await?;
    }
    let (client, mut messages) = world.db.cluster.listen("postgres", &world.db.name).await?;
    for (issuer, conditions, warns) in [
        (github, json!({"repository": "a/b", "ref": "main"}), true),
        (github, json!({"sub": "repo:a/b:ref:refs/heads/main"}), true),
        (github, json!({"repository_id": "74", "ref": "main"}), false),
        (github, json!({"repository_owner_id": "65"}), false),
        (CI, json!({"sub": "system:serviceaccount:ns:name"}), false),
        (CI, json!({"kubernetes.io.serviceaccount.uid": "1"}), false),
        (CI, json!({"oid": "1"}), false),
        (CI, json!({"email": "a@b.c"}), true),
        (CI, json!({"grid": "1"}), true),
    ] {
        client.execute("select tollgate.trust_workload('ci', $1, $2)", &[&issuer, &conditions]).await?;
        let mut warned = false;
        while let Ok(message) = messages.try_recv() {
            if let tokio_postgres::AsyncMessage::Notice(notice) = message {
                warned |= notice.message().contains("names alone");
            }
        }
        assert_eq!(warned, warns, "{issuer} {conditions}");
    }
    Ok(())
}

// ---- What else

#[tokio::test]
async fn keys_that_are_fetched_are_stored_under_the_name_of_the_user() -> Result<()> {
    let world = World::create("svc_fetched").await?;
    world.account("ci").await?;
    world
        .db
        .owner
        .batch_execute(
            "do $$ begin create role fetcher login; exception when duplicate_object or unique_violation then end $$;
             select tollgate.grant_capability('fetcher', 'key_fetcher')",
        )
        .await?;
    let fetcher = world.db.session("fetcher").await?;
    for wrong in [
        "'ci', '{\"keys\": []}'",
        "'ci', '{\"keys\": []}', 'https://ci.test/keys'",
        "'ci', jwks_url => 'ci.test'",
    ] {
        let call = format!("select tollgate.set_service_account_keys({wrong})");
        refused(world.boss.batch_execute(&call).await, &SqlState::INVALID_PARAMETER_VALUE);
    }
    world
        .boss
        .batch_execute("select tollgate.set_service_account_keys('ci', jwks_url => 'https://ci.test/keys')")
        .await?;
    let due = "select string_agg(concat_ws(' ', issuer, jwks_url, reason), ',') from tollgate.issuers_due()";
    let is_due = async || value::<Option<String>>(&fetcher, due).await;
    assert_eq!(is_due().await?.as_deref(), Some("service:ci https://ci.test/keys new"));
    let (first, second) = (Key::new("1")?, Key::new("2")?);
    let store = async |keys: &Value| -> Result<i32> {
        let call = "select stored from tollgate.store_issuer_keys('service:ci', $1, '10 minutes')";
        Ok(fetcher.query_one(call, &[&keys.to_string()]).await?.get(0))
    };
    assert_eq!(world.by_assertion("ci", &first.assert("ci")?).await?.code, "INVALID_CLIENT");
    fetcher.batch_execute("select tollgate.note_issuer_failure('service:ci', 'it is down')").await?;
    let state = "select concat_ws(' ', failures, problem, cardinality(kids)) from tollgate.service_accounts";
    assert_eq!(value::<String>(&world.boss, state).await?, "1 it is down 0");
    assert_eq!(store(&set(&[&first])?).await?, 1);
    assert_eq!(value::<String>(&world.boss, state).await?, "0 1");
    let token = world.by_assertion("ci", &first.assert("ci")?).await?.token()?;
    assert_eq!(is_due().await?, None);
    // What was fetched from another address, before that was replaced, comes too late.
    let late =
        "select detail from tollgate.store_issuer_keys('service:ci', $1, '1 hour', 'https://old.test/keys')";
    let detail: String = fetcher.query_one(late, &[&set(&[&second])?.to_string()]).await?.get(0);
    assert_eq!(detail, "there is no service account of this name whose keys are fetched from there");
    assert_eq!(world.verified(&token).await?, "VALID");
    // An assertion by another key makes it due, at most once a minute.
    assert_eq!(world.by_assertion("ci", &second.assert("ci")?).await?.code, "INVALID_CLIENT");
    assert_eq!(is_due().await?, None);
    world
        .db
        .owner
        .batch_execute("update tollgate.services set tried_at = tried_at - interval '61 seconds'")
        .await?;
    assert_eq!(is_due().await?.as_deref(), Some("service:ci https://ci.test/keys unknown key"));
    assert_eq!(store(&json!({"keys": []})).await?, 0, "more likely this is not its key set");
    assert_eq!(world.verified(&token).await?, "VALID");
    assert_eq!(store(&set(&[&second])?).await?, 1);
    assert_eq!(world.verified(&token).await?, "REVOKED", "its key went");
    assert_eq!(world.by_assertion("ci", &second.assert("ci")?).await?.code, "VALID");
    // Those that are given are not the fetcher's.
    world.keys("ci", &[&first]).await?;
    assert_eq!(store(&set(&[&second])?).await?, 0);
    assert_eq!(world.by_assertion("ci", &first.assert("ci")?).await?.code, "VALID");
    Ok(())
}

#[tokio::test]
async fn a_gateway_consumes_nothing_in_a_transaction_block() -> Result<()> {
    let world = World::create("svc_gateway").await?;
    let key = Key::new("1")?;
    world.account("ci").await?;
    world.keys("ci", &[&key]).await?;
    // The capability does not exist yet.
    world
        .db
        .owner
        .batch_execute(
            "do $$ begin create role entrance login; exception when duplicate_object or unique_violation then end $$;
             alter table tollgate.capabilities drop constraint capabilities_capability_check;
             insert into tollgate.capabilities (role, capability, granted_at) values ('entrance', 'gateway', now());
             grant execute on function tollgate.client_credentials, tollgate.refresh_session to entrance",
        )
        .await?;
    let entrance = world.db.session("entrance").await?;
    for begin in ["begin", "begin; savepoint s"] {
        entrance.batch_execute(begin).await?;
        refused(
            call(&entrance, "ci", "assertion", &key.assert("ci")?, "").await,
            &SqlState::ACTIVE_SQL_TRANSACTION,
        );
        entrance.batch_execute("rollback").await?;
    }
    entrance.batch_execute("begin").await?;
    refused(
        entrance.batch_execute("select tollgate.refresh_session('x')").await,
        &SqlState::ACTIVE_SQL_TRANSACTION,
    );
    entrance.batch_execute("rollback").await?;
    assert_eq!(call(&entrance, "ci", "assertion", &key.assert("ci")?, "").await?.code, "VALID");
    // One with another capability does as before.
    world.db.owner.batch_execute("select tollgate.grant_capability('entrance', 'issuer')").await?;
    entrance.batch_execute("begin").await?;
    assert_eq!(call(&entrance, "ci", "assertion", &key.assert("ci")?, "").await?.code, "VALID");
    entrance.batch_execute("rollback").await?;
    Ok(())
}

#[tokio::test]
async fn accounts_are_managed_from_the_command_line() -> Result<()> {
    let world = World::create("svc_cli").await?;
    let url = world.db.cluster.url("boss", &world.db.name);
    assert!(printed(&url, &["service", "list"], OK).contains("no service account"));
    let create = [
        "service",
        "create",
        "ci",
        "--name",
        "Nightly build",
        "--scope",
        "posts:read,users:read",
        "--lifetime",
        "5m",
    ];
    assert_eq!(json_of(&url, &create, OK), json!({"created": "ci"}));
    assert!(failure(&url, &create, NO).contains("already"));
    let secret = json_of(&url, &["service", "secret", "ci", "--expires-in", "90d"], OK);
    let secret = secret["token"].as_str().context("a token")?;
    let token = world.by_secret("ci", secret, "").await?.token()?;

    let (directory, key, ci) = (tempfile::tempdir()?, Key::new("1")?, Key::new("ci")?);
    let file = directory.path().join("keys.json");
    std::fs::write(&file, set(&[&key])?.to_string())?;
    let file = file.to_str().context("a path")?;
    assert_eq!(json_of(&url, &["service", "keys", "ci", "--jwks", file], OK), json!({"changed": "ci"}));
    assert_eq!(world.by_assertion("ci", &key.assert("ci")?).await?.code, "VALID");
    let trust = "select tollgate.trust_issuer($1, 'ci:', '{https://api.test}', jwks => $2)";
    world.boss.execute(trust, &[&CI, &set(&[&ci])?]).await?;
    let workload = json_of(
        &url,
        &["service", "trust-workload", "ci", CI, "--conditions", "{\"repository_id\": \"74\"}"],
        OK,
    );
    let workload = workload["workload"].as_str().context("an id")?.to_owned();
    assert_eq!(world.by_assertion("ci", &ci.sign("JWT", &job(&json!({}))?)?).await?.code, "VALID");

    let shown = json_of(&url, &["service", "show", "ci"], OK);
    assert_eq!(
        (&shown["name"], &shown["secrets"], &shown["kids"], &shown["workloads"][0]["id"]),
        (&json!("Nightly build"), &json!(1), &json!(["1"]), &json!(workload))
    );
    assert_eq!(json_of(&url, &["service", "list"], OK), json!([shown]));
    let table = printed(&url, &["service", "list"], OK);
    assert!(table.contains("Nightly build") && table.contains("posts:read, users:read"), "{table}");
    assert!(printed(&url, &["service", "show", "ci"], OK).contains("repository_id"));
    assert_eq!(json_of(&url, &["service", "show", "none"], NO), Value::Null);

    assert_eq!(json_of(&url, &["service", "distrust-workload", &workload], OK), json!({"distrusted": true}));
    assert_eq!(
        json_of(&url, &["service", "update", "ci", "--scope", "posts:read", "--owner", "build"], OK),
        json!({"updated": "ci"})
    );
    assert_eq!(world.verified(&token).await?, "REVOKED");
    assert!(
        failure(&url, &["service", "update", "none", "--name", "x"], NO).contains("no such service account")
    );
    for (command, word) in [("disable", "disabled"), ("enable", "enabled"), ("delete", "deleted")] {
        assert_eq!(json_of(&url, &["service", command, "ci"], OK), json!({ word: true }));
        assert_eq!(json_of(&url, &["service", command, "ci"], NO), json!({ word: false }));
    }
    Ok(())
}
