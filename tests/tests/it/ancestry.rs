//! Access tokens that came of something, and end with it. The tokens are signed here, with a key that the database knows, and
//! name what no function would put together.

use crate::common::{self, Shared, Token, Verification, changed, issue, issue_with, now, value};
use crate::operator::{Db, counts, flush_all};
use anyhow::{Context as _, Result};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use tokio_postgres::Client;
use tollgate_core::jws;
use tollgate_core::signature::{Algorithm, SigningKey};
use uuid::Uuid;

/// As every test server is configured.
pub(crate) const ISSUER: &str = "https://tollgate.test";
pub(crate) const AUDIENCE: &str = "https://api.test";

static SHARED: Shared = Shared::new(&[("tollgate.user_rate_window", "1h")]);

/// A database with a key that is known here, an application that may issue, and one that verifies.
pub(crate) struct World {
    pub(crate) db: Db,
    /// An ordinary role with the capability issuer.
    pub(crate) backend: Client,
    key: SigningKey,
    kid: String,
}

impl World {
    async fn create(name: &str) -> Result<Self> {
        Self::on(&SHARED, name).await
    }

    pub(crate) async fn on(shared: &Shared, name: &str) -> Result<Self> {
        Self::of(Db::create(&shared.cluster()?, name).await?).await
    }

    pub(crate) async fn of(db: Db) -> Result<Self> {
        db.owner
            .batch_execute(
                "do $$ begin create role backend login; exception when duplicate_object or unique_violation then end $$;
                 select tollgate.grant_capability('backend', 'issuer');
                 select tollgate.grant_capability('web', 'verifier')",
            )
            .await?;
        let key = SigningKey::generate(Algorithm::Es256)?;
        let pem = format!(
            "-----BEGIN PRIVATE KEY-----\n{}\n-----END PRIVATE KEY-----\n",
            STANDARD.encode(&*key.to_pkcs8()?)
        );
        let kid = db.owner.query_one("select tollgate.import_signing_key($1)", &[&pem]).await?.get(0);
        let backend = db.session("backend").await?;
        Ok(Self { db, backend, key, kid })
    }

    /// A token of ann's for reading posts, with some claims replaced; null removes one.
    pub(crate) fn sign(&self, changes: &Value) -> Result<String> {
        let now = now()?;
        let claims = json!({
            "iss": ISSUER, "sub": "ann", "aud": AUDIENCE, "exp": now + 600, "iat": now, "nbf": now,
            "jti": Uuid::new_v4().to_string(), "client_id": "test", "scope": "posts:read",
        });
        let claims = changed(claims, changes)?;
        Ok(jws::sign(&self.key, &self.kid, "at+jwt", &claims.to_string())?)
    }

    pub(crate) async fn code(&self, token: &str) -> Result<String> {
        Ok(self.verify(token, "").await?.code)
    }

    /// With further arguments in SQL.
    pub(crate) async fn verify(&self, token: &str, arguments: &str) -> Result<Verification> {
        verify(&self.db.web, token, arguments).await
    }

    pub(crate) async fn run(&self, sql: &str) -> Result<()> {
        self.db.owner.batch_execute(sql).await.with_context(|| sql.to_owned())
    }
}

async fn verify(client: &Client, token: &str, arguments: &str) -> Result<Verification> {
    let sql = format!("select {} from tollgate.verify_access_token($1{arguments}) v", Verification::COLUMNS);
    Ok(Verification::of(&client.query_one(&sql, &[&token]).await?))
}

fn of_root(root: &Token) -> Value {
    json!({"root": root.id})
}

#[tokio::test]
async fn a_token_ends_with_the_api_token_that_it_came_of() -> Result<()> {
    let world = World::create("root").await?;
    let root = issue(&world.db.owner, "ann", &["posts:*"]).await?;
    let token = world.sign(&of_root(&root))?;
    let id = root.id;
    let set = |assignments: &str| format!("update tollgate.api_tokens set {assignments} where id = '{id}'");
    for (change, expected) in [
        (String::new(), "VALID"),
        (format!("select tollgate.set_api_token_enabled('{id}', false)"), "DISABLED"),
        (format!("select tollgate.set_api_token_enabled('{id}', true)"), "VALID"),
        // Not the scope that it has.
        (set("scopes = '{posts:write,users:read}'"), "REVOKED"),
        (set("scopes = '{posts:read}'"), "VALID"),
        (set("expires_at = now() - interval '1 second'"), "EXPIRED"),
        (set("expires_at = now() + interval '1 hour', user_id = 'ben'"), "REVOKED"),
        (set("user_id = 'ann'"), "VALID"),
    ] {
        world.run(&change).await?;
        assert_eq!(world.code(&token).await?, expected, "{change}");
    }
    // By what is committed now, whatever the transaction sees.
    world.db.web.batch_execute("begin isolation level repeatable read").await?;
    assert_eq!(world.code(&token).await?, "VALID");
    world.run(&format!("select tollgate.revoke_api_token('{id}')")).await?;
    assert_eq!(world.code(&token).await?, "REVOKED");
    world.db.web.batch_execute("commit").await?;

    let unknown = world.sign(&json!({"root": Uuid::new_v4()}))?;
    assert_eq!(world.code(&unknown).await?, "REVOKED");
    // A secret of a service account has no scopes: those are the account's.
    let secret = issue(&world.db.owner, "zoe", &[]).await?;
    world
        .run(&format!("update tollgate.api_tokens set user_id = 'service:a' where id = '{}'", secret.id))
        .await?;
    let token = world.sign(&json!({"root": secret.id, "sub": "service:a"}))?;
    assert_eq!(world.code(&token).await?, "VALID");
    assert_eq!(world.code(&world.sign(&json!({"root": secret.id}))?).await?, "REVOKED", "of ann");
    Ok(())
}

#[tokio::test]
async fn a_token_is_held_to_the_networks_and_limits_of_its_root_and_counted_there() -> Result<()> {
    let world = World::create("root_limits").await?;
    let arguments = "scopes => '{posts:read}', allowed_ips => '{203.0.113.0/24}', rate_limit => 2, rate_window => '1 hour'";
    let root = issue_with(&world.db.owner, "ann", arguments).await?;
    let token = world.sign(&of_root(&root))?;
    let at = |address: &str| format!(", client_ip => '{address}'");
    for (address, expected) in [
        (String::new(), "IP_NOT_ALLOWED"),
        (at("198.51.100.1"), "IP_NOT_ALLOWED"),
        (at("203.0.113.7"), "VALID"),
        // One is left for both.
        (at("203.0.113.8"), "VALID"),
        (at("203.0.113.9"), "RATE_LIMITED"),
    ] {
        assert_eq!(world.verify(&token, &address).await?.code, expected, "{address}");
    }
    let own = common::Request::of(&root.token).coming_from("203.0.113.7");
    assert_eq!(own.code(&world.db.web).await?, "RATE_LIMITED");
    flush_all(&world.db.operator).await?;
    assert_eq!(counts(&world.db.owner, root.id).await?, (2, 4));
    let of_user = "select use_count + denied_count from tollgate.access_token_usage('ann')";
    assert_eq!(value::<i64>(&world.db.owner, of_user).await?, 0);
    // One that is refused for now can be revoked all the same.
    world.run(&format!("select tollgate.set_api_token_enabled('{}', false)", root.id)).await?;
    let revoke = "select tollgate.revoke_access_token($1::text)";
    assert!(world.db.web.query_one(revoke, &[&token]).await?.get::<_, bool>(0));
    world.run(&format!("select tollgate.set_api_token_enabled('{}', true)", root.id)).await?;
    assert_eq!(world.verify(&token, &at("203.0.113.7")).await?.code, "REVOKED");
    Ok(())
}

#[tokio::test]
async fn a_token_ends_with_each_of_what_else_it_came_of() -> Result<()> {
    let world = World::create("ancestors").await?;
    let owner = &world.db.owner;
    let other = issue(owner, "ben", &[]).await?;
    let session: Uuid =
        value(&world.backend, "select session_id from tollgate.open_session('eve', '{posts:read}')").await?;
    let users: Uuid =
        value(&world.backend, "select session_id from tollgate.open_session('fay', '{posts:read}')").await?;
    let second: String = value(owner, "select tollgate.create_signing_key()").await?;
    let jti = Uuid::new_v4();
    let mark = "select mark from tollgate.revoked_users where user_id = 'gus'";
    world.run("select tollgate.revoke_user('gus')").await?;
    let gus: i64 = value(owner, mark).await?;
    for (ancestor, end) in [
        (json!({"jti": jti}), format!("select tollgate.revoke_access_token('{jti}'::uuid)")),
        (json!({"sid": session}), format!("select tollgate.revoke_session('{session}')")),
        (json!({"sid": users}), "select tollgate.revoke_user('fay')".to_owned()),
        (json!({"tok": other.id}), format!("select tollgate.revoke_api_token('{}')", other.id)),
        (json!({"usr": "hal"}), "select tollgate.revoke_user('hal')".to_owned()),
        (json!({"usr": "gus", "rev": gus}), "select tollgate.revoke_user('gus')".to_owned()),
        (json!({"kid": second}), format!("select tollgate.withdraw_signing_key('{second}', 'leaked')")),
    ] {
        let token = world.sign(&json!({"from": [{"usr": "another"}, ancestor]}))?;
        assert_eq!(world.code(&token).await?, "VALID", "{ancestor}");
        world.run(&end).await?;
        assert_eq!(world.code(&token).await?, "REVOKED", "{ancestor}");
        assert_eq!(world.code(&world.sign(&json!({}))?).await?, "VALID", "{end}: for another token");
    }
    for never in [
        json!({"sid": Uuid::new_v4()}),
        json!({"tok": Uuid::new_v4()}),
        json!({"usr": "gus", "rev": gus}),
        json!({"usr": "gus"}),
        json!({"kid": "none"}),
        json!({"iss": "https://idp.test", "jti": "1", "iat": 1_700_000_000, "kid": "1", "terms": ""}),
    ] {
        let token = world.sign(&json!({"from": [never]}))?;
        assert_eq!(world.code(&token).await?, "REVOKED", "{never}");
    }
    // The address holds for each API token.
    let bound = issue_with(owner, "ben", "scopes => '{}', allowed_ips => '{10.0.0.0/8}'").await?;
    let token = world.sign(&json!({"from": [{"tok": bound.id}]}))?;
    assert_eq!(world.code(&token).await?, "IP_NOT_ALLOWED");
    assert_eq!(world.verify(&token, ", client_ip => '10.1.1.1'").await?.code, "VALID");
    Ok(())
}

#[tokio::test]
async fn a_token_that_names_what_is_not_understood_is_malformed() -> Result<()> {
    let world = World::create("ancestors_unknown").await?;
    let many: Vec<Value> = (0..17).map(|n| json!({"usr": format!("user-{n}")})).collect();
    assert_eq!(world.code(&world.sign(&json!({"from": &many[..16]}))?).await?, "VALID");
    for claims in [
        json!({"root": 7}),
        json!({"root": "x"}),
        json!({"root": Uuid::new_v4().to_string().to_uppercase()}),
        json!({"from": []}),
        json!({"from": {}}),
        json!({"from": "x"}),
        json!({"from": [{}]}),
        json!({"from": [{"later": 1}]}),
        json!({"from": [{"usr": "ann", "later": 1}]}),
        json!({"from": many}),
    ] {
        let answer = world.verify(&world.sign(&claims)?, "").await?;
        assert_eq!((answer.code.as_str(), answer.token_id), ("MALFORMED", None), "{claims}");
    }
    // No caller of issue_access_token puts them there.
    for claim in ["root", "from", "act", "may_act"] {
        let call =
            "select tollgate.issue_access_token('ann', '{}', claims => jsonb_build_object($1::text, 1))";
        let refused = world.backend.query(call, &[&claim]).await;
        common::refused(refused, &tokio_postgres::error::SqlState::INVALID_PARAMETER_VALUE);
    }
    Ok(())
}
