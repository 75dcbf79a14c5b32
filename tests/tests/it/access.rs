//! Signed access tokens: issued, verified, authenticated with and revoked, by ordinary roles. Tokens that no function
//! would issue are signed here, with a key that the database knows.

use std::sync::Arc;
use std::time::Duration;

use crate::common::{
    self, Shared, Verification, authenticate, changed, current_user, error, issue, now, refused, text_of,
    value,
};
use crate::operator::{Db, flush_all};
use crate::web;
use anyhow::{Context as _, Result};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use tollgate_core::jws;
use tollgate_core::signature::{Algorithm, SigningKey};
use tollgate_tests::{Cluster, DATABASE, eventually_async};
use uuid::Uuid;

/// As every test server is configured.
const ISSUER: &str = "https://tollgate.test";
const AUDIENCE: &str = "https://api.test";

static SHARED: Shared = Shared::new(&[("tollgate.user_rate_window", "1h")]);

/// A key of these tests, which nothing else uses.
const PEM: &str = "-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg30DOsogH4Sfm+jUm
DBQZtkMQjZXI134AX+CSy4Q3NwuhRANCAARbs9Wz5saCVVDRJi3MGaNYJPIhATZ5
9DEw2BPdgx1oOu+QRvx9eeWm7nNV5MBdqdjtnKH1mRI6kidzanp9KJUB
-----END PRIVATE KEY-----
";

/// A database with the key above, and an application that may issue.
struct Signed {
    db: Db,
    /// An ordinary role with the capability issuer.
    backend: Client,
    key: SigningKey,
    kid: String,
}

impl Signed {
    async fn create(name: &str) -> Result<Self> {
        Self::on(&SHARED.cluster()?, name).await
    }

    async fn on(cluster: &Arc<Cluster>, name: &str) -> Result<Self> {
        let db = Db::create(cluster, name).await?;
        db.owner
            .batch_execute(
                "do $$ begin create role backend login; exception when duplicate_object or unique_violation then end $$;
                 select tollgate.grant_capability('backend', 'issuer');
                 select tollgate.grant_capability('web', 'verifier')",
            )
            .await?;
        let key = SigningKey::from_pkcs8_pem(PEM)?;
        let kid = import(&db.owner).await?;
        assert_eq!(kid, key.public_key().thumbprint());
        let backend = db.session("backend").await?;
        Ok(Self { db, backend, key, kid })
    }

    /// Signs claims with our key.
    fn sign(&self, claims: &Value) -> Result<String> {
        Ok(jws::sign(&self.key, &self.kid, "at+jwt", &claims.to_string())?)
    }

    async fn code(&self, token: &str) -> Result<String> {
        code(&self.db.web, token).await
    }
}

async fn import(owner: &Client) -> Result<String> {
    Ok(owner.query_one("select tollgate.import_signing_key($1)", &[&PEM]).await?.get(0))
}

/// Those of a good token of ann's.
fn claims() -> Result<Value> {
    Ok(json!({
        "iss": ISSUER, "sub": "ann", "aud": AUDIENCE, "exp": now()? + 600, "iat": now()?, "nbf": now()?,
        "jti": Uuid::new_v4().to_string(), "client_id": "test", "scope": "posts:read",
    }))
}

/// With some claims replaced; null removes one.
fn claims_with(changes: &Value) -> Result<Value> {
    changed(claims()?, changes)
}

/// Issues a token through the given connection, with further arguments in SQL.
async fn issue_signed(client: &Client, user: &str, arguments: &str) -> Result<(String, Uuid)> {
    let call =
        format!("select access_token, jti from tollgate.issue_access_token($1, '{{posts:read}}'{arguments})");
    let row = client.query_one(&call, &[&user]).await?;
    Ok((row.get(0), row.get(1)))
}

async fn verify(client: &Client, token: &str, arguments: &str) -> Result<Verification> {
    let sql = format!("select {} from tollgate.verify_access_token($1{arguments}) v", Verification::COLUMNS);
    Ok(Verification::of(&client.query_one(&sql, &[&token]).await?))
}

async fn code(client: &Client, token: &str) -> Result<String> {
    Ok(verify(client, token, "").await?.code)
}

async fn last_refusal(client: &Client) -> Result<Value> {
    value(client, "select tollgate.last_refusal()").await
}

async fn revoke_user(client: &Client, user: &str) -> Result<i64> {
    Ok(client.query_one("select tollgate.revoke_user($1, 'left')", &[&user]).await?.get(0))
}

// ---- Issuing and verifying

#[tokio::test]
async fn an_issued_token_is_verified_with_its_claims() -> Result<()> {
    let signed = Signed::create("issued").await?;
    let row = signed
        .backend
        .query_one(
            "select access_token, jti, expires_at::text, scopes, audience
             from tollgate.issue_access_token('ann', '{posts:read,posts:write}', claims => '{\"plan\": \"pro\", \"n\": 12345678901234567890123}')",
            &[],
        )
        .await?;
    let (token, jti): (String, Uuid) = (row.get(0), row.get(1));
    assert_eq!(row.get::<_, Vec<String>>(4), [AUDIENCE]);
    // In FROM, where the custom scan is used, and in the list of columns.
    let call =
        format!("select {} from (select (tollgate.verify_access_token($1)).*) v", Verification::COLUMNS);
    let in_list = Verification::of(&signed.db.web.query_one(&call, &[&token]).await?);
    let verified = verify(&signed.db.web, &token, "").await?;
    assert_eq!(verified, in_list);
    let metadata = verified.metadata.clone().context("claims")?;
    assert_eq!(
        verified,
        Verification {
            valid: true,
            code: "VALID".to_owned(),
            token_id: Some(jti),
            user_id: Some("ann".to_owned()),
            scopes: Some(vec!["posts:read".to_owned(), "posts:write".to_owned()]),
            expires_at: row.get(2),
            metadata: Some(metadata.clone()),
            ..Verification::default()
        }
    );
    let exp = metadata["exp"].as_i64().context("exp")?;
    assert_eq!(exp - metadata["iat"].as_i64().context("iat")?, 600);
    assert_eq!(metadata["nbf"], metadata["iat"]);
    for (claim, expected) in [
        ("iss", json!(ISSUER)),
        ("sub", json!("ann")),
        ("aud", json!(AUDIENCE)),
        ("jti", json!(jti)),
        ("client_id", json!("backend")),
        ("scope", json!("posts:read posts:write")),
        ("plan", json!("pro")),
    ] {
        assert_eq!(metadata[claim], expected, "{claim}");
    }
    let large: String = signed
        .db
        .web
        .query_one("select (tollgate.verify_access_token($1)).metadata ->> 'n'", &[&token])
        .await?
        .get(0);
    assert_eq!(large, "12345678901234567890123", "claims are as they were signed");
    let (small, _) = issue_signed(&signed.backend, "ann", "").await?;
    assert!(small.len() <= 600, "{} bytes", small.len());
    // Nothing is recorded unless that is asked for.
    let recorded = "select count(*) from tollgate.audit_log where event = 'access_token.issued'";
    assert_eq!(value::<i64>(&signed.db.owner, recorded).await?, 0);
    signed.db.owner.batch_execute("alter database issued set tollgate.audit_issue = on").await?;
    let auditing = signed.db.session("backend").await?;
    let (_, jti) = issue_signed(&auditing, "ann", "").await?;
    let history = common::history(&signed.db.owner, jti).await?;
    assert_eq!(history.len(), 1);
    assert_eq!(history[0].1["scopes"], json!(["posts:read"]), "{history:?}");
    auditing.batch_execute("begin read only").await?;
    let call = "select tollgate.issue_access_token('ann', '{}')";
    refused(auditing.execute(call, &[]).await, &SqlState::READ_ONLY_SQL_TRANSACTION);
    // Unaudited it writes nothing.
    signed.backend.batch_execute("begin read only").await?;
    let (token, _) = issue_signed(&signed.backend, "ann", "").await?;
    assert_eq!(signed.code(&token).await?, "VALID");
    Ok(())
}

#[tokio::test]
async fn the_claims_are_the_jsonb_that_postgresql_reads_from_what_was_signed() -> Result<()> {
    let signed = Signed::create("jsonb").await?;
    for own in [
        "{}",
        r#"{"z": {}, "a": [], "Z": [[], {}, [{"b": [1, {"c": null}]}]], "é": "", "aa": true, "b": false, "": null}"#,
        r#"{"texts": ["", "\u0001\n\"\\/", "é😀\ud83d\ude00", "0"], "nested": {"bb": 1, "a": {"x": {"y": {"z": "deep"}}}}}"#,
        r#"{"numbers": [0, -1, 9223372036854775807, -9223372036854775808, 10000, 100000000]}"#,
        // Not kept as they were written, except in the text.
        r#"{"numbers": [-0, 1.10, 1e2, 18446744073709551615, 12345678901234567890123], "a": {"b": [0.1]}}"#,
    ] {
        // As they are written: serde_json would read the numbers.
        let claims = claims()?.to_string();
        let text = format!("{},\"own\":{own}}}", claims.strip_suffix('}').context("an object")?);
        let token = jws::sign(&signed.key, &signed.kid, "at+jwt", &text)?;
        let row = signed
            .db
            .web
            .query_one(
                "select v.code, v.metadata::text, $2::text::jsonb::text, v.metadata = $2::text::jsonb
                 from (select (tollgate.verify_access_token($1)).*) v",
                &[&token, &text],
            )
            .await?;
        assert_eq!(row.get::<_, &str>(0), "VALID", "{own}");
        assert_eq!(row.get::<_, &str>(1), row.get::<_, &str>(2), "{own}");
        assert!(row.get::<_, bool>(3), "{own}");
    }
    Ok(())
}

#[tokio::test]
async fn each_fault_has_its_code_and_gives_no_identity() -> Result<()> {
    let signed = Signed::create("faults").await?;
    let good = signed.sign(&claims()?)?;
    let (body, signature) = good.rsplit_once('.').context("a signature")?;
    let (header, payload) = body.split_once('.').context("a payload")?;
    let flipped = |part: &str| {
        let mut bytes = URL_SAFE_NO_PAD.decode(part).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        URL_SAFE_NO_PAD.encode(bytes)
    };
    let other = SigningKey::generate(Algorithm::Es256)?;
    let others = |kid: &str| jws::sign(&other, kid, "at+jwt", &claims().unwrap().to_string());
    let encoded = |json: &str| URL_SAFE_NO_PAD.encode(json);
    let elevated = encoded(&claims_with(&json!({"scope": "admin"}))?.to_string());
    let none = encoded(&json!({"alg": "none", "typ": "at+jwt", "kid": signed.kid}).to_string());
    let confused = encoded(&json!({"alg": "RS256", "typ": "at+jwt", "kid": signed.kid}).to_string());
    let with = |changes: Value| signed.sign(&claims_with(&changes).unwrap()).unwrap();
    let soon = now()? + 60;
    for (what, expected, reason, token) in [
        ("nothing", "MALFORMED", Some("parts"), String::new()),
        ("an API token", "MALFORMED", Some("parts"), issue(&signed.db.owner, "ann", &[]).await?.token),
        ("no algorithm", "MALFORMED", Some("algorithm"), format!("{none}.{payload}.{signature}")),
        ("too large", "MALFORMED", Some("size"), format!("{good}{}", "A".repeat(8192))),
        ("a space", "MALFORMED", Some("encoding"), format!("{good} ")),
        ("no id", "MALFORMED", Some("claim"), with(json!({"jti": null}))),
        (
            "an id in capitals",
            "MALFORMED",
            Some("claim"),
            with(json!({"jti": Uuid::new_v4().to_string().to_uppercase()})),
        ),
        ("no end", "MALFORMED", Some("claim"), with(json!({"exp": null}))),
        ("no user", "MALFORMED", Some("claim"), with(json!({"sub": null}))),
        ("a blank user", "MALFORMED", Some("claim"), with(json!({"sub": ""}))),
        ("no issuer", "MALFORMED", Some("claim"), with(json!({"iss": null}))),
        ("a mark that is a text", "MALFORMED", Some("claim"), with(json!({"rev": "1"}))),
        (
            "an id token",
            "MALFORMED",
            Some("type"),
            jws::sign(&signed.key, &signed.kid, "JWT", &claims()?.to_string())?,
        ),
        ("another issuer", "UNTRUSTED_ISSUER", None, with(json!({"iss": format!("{ISSUER}/")}))),
        ("another kid", "UNKNOWN_KEY", None, others(&other.public_key().thumbprint())?),
        ("another key", "BAD_SIGNATURE", None, others(&signed.kid)?),
        ("another algorithm", "BAD_SIGNATURE", None, format!("{confused}.{payload}.{signature}")),
        ("other claims", "BAD_SIGNATURE", None, format!("{header}.{elevated}.{signature}")),
        ("a changed signature", "BAD_SIGNATURE", None, format!("{body}.{}", flipped(signature))),
        ("over", "EXPIRED", None, with(json!({"exp": now()?}))),
        ("not yet", "NOT_YET_VALID", None, with(json!({"nbf": soon}))),
        ("issued in the future", "NOT_YET_VALID", None, with(json!({"iat": soon}))),
        ("for others", "WRONG_AUDIENCE", None, with(json!({"aud": ["https://other.test"]}))),
        ("for all", "WRONG_AUDIENCE", None, with(json!({"aud": null}))),
        ("for several", "VALID", None, with(json!({"aud": ["https://other.test", AUDIENCE]}))),
        ("good", "VALID", None, good.clone()),
    ] {
        for round in 0..2 {
            let answer = verify(&signed.db.web, &token, "").await.with_context(|| what.to_owned())?;
            assert_eq!(answer.code, expected, "{what}, {round}");
            assert_eq!(answer.valid, expected == "VALID");
            if expected == "VALID" {
                continue;
            }
            let identity = (answer.user_id, answer.name, answer.scopes, answer.metadata);
            assert_eq!(identity, (None, None, None, None), "{what}");
            let genuine = ["EXPIRED", "NOT_YET_VALID", "WRONG_AUDIENCE"].contains(&expected);
            assert_eq!(answer.token_id.is_some(), genuine, "{what}");
            let mut refusal = json!({"code": expected});
            if let Some(reason) = reason {
                refusal["reason"] = reason.into();
            }
            assert_eq!(last_refusal(&signed.db.web).await?, refusal, "{what}");
        }
        // What has not even the form of a signed token is looked up as an API token.
        if expected != "VALID" && what != "an API token" {
            signed.db.web.batch_execute("begin").await?;
            let error = error(authenticate(&signed.db.web, &token).await);
            assert_eq!(error.code(), &SqlState::INVALID_AUTHORIZATION_SPECIFICATION, "{what}");
            assert!(token.len() < 20 || !text_of(&error).contains(&token[10..20]), "{what}: {error:?}");
            signed.db.web.batch_execute("rollback").await?;
            assert_eq!(current_user(&signed.db.web).await?, None);
        }
    }
    let null = "select (tollgate.verify_access_token(null)).code";
    assert_eq!(value::<String>(&signed.db.web, null).await?, "MALFORMED");
    let lacking = verify(&signed.db.web, &good, ", '{posts:read,posts:write}'").await?;
    assert_eq!(lacking.code, "INSUFFICIENT_SCOPE");
    assert_eq!(
        last_refusal(&signed.db.web).await?,
        json!({"code": "INSUFFICIENT_SCOPE", "missing_scopes": ["posts:write"]})
    );
    Ok(())
}

#[tokio::test]
async fn without_an_expected_audience_no_signed_token_is_accepted() -> Result<()> {
    let signed = Signed::create("audiences").await?;
    let theirs = signed.sign(&claims_with(&json!({"aud": ["https://theirs.test"]}))?)?;
    let ours = signed.sign(&claims()?)?;
    assert_eq!(signed.code(&ours).await?, "VALID");
    let named = verify(&signed.db.web, &theirs, ", audience => 'https://theirs.test'").await?;
    assert_eq!(named.code, "VALID");
    for other in ["https://theirs.test/", "", "https://THEIRS.test"] {
        let answer = verify(&signed.db.web, &theirs, &format!(", audience => '{other}'")).await?;
        assert_eq!(answer.code, "WRONG_AUDIENCE", "{other:?}");
    }
    let answer = verify(&signed.db.web, &ours, ", audience => 'https://theirs.test'").await?;
    assert_eq!(answer.code, "WRONG_AUDIENCE", "the argument replaces the setting");
    // A role's setting, and none at all.
    signed
        .db
        .owner
        .batch_execute("alter role web in database audiences set tollgate.audience = 'https://theirs.test'")
        .await?;
    let web = signed.db.session("web").await?;
    assert_eq!(code(&web, &theirs).await?, "VALID");
    refused(
        web.batch_execute("set tollgate.audience = 'https://api.test'").await,
        &SqlState::INSUFFICIENT_PRIVILEGE,
    );
    refused(
        web.batch_execute("set tollgate.issuer = 'https://own.test'").await,
        &SqlState::INSUFFICIENT_PRIVILEGE,
    );
    signed.db.owner.batch_execute("alter role web in database audiences set tollgate.audience = ''").await?;
    let web = signed.db.session("web").await?;
    for token in [&ours, &theirs] {
        assert_eq!(code(&web, token).await?, "WRONG_AUDIENCE");
    }
    Ok(())
}

#[tokio::test]
async fn what_cannot_be_issued_is_refused_with_the_argument_and_the_way_to_fix_it() -> Result<()> {
    let signed = Signed::create("arguments_of_issuing").await?;
    for (arguments, argument) in [
        ("null, '{}'", "user_id"),
        ("' ', '{}'", "user_id"),
        ("'ann', null", "scopes"),
        ("'ann', '{no:such}'", "scopes"),
        ("'ann', '{}', '{}'", "audience"),
        ("'ann', '{}', '{null}'", "audience"),
        ("'ann', '{}', array['a b']", "audience"),
        ("'ann', '{}', lifetime => '0'", "lifetime"),
        ("'ann', '{}', lifetime => '-1 hour'", "lifetime"),
        ("'ann', '{}', lifetime => '61 minutes'", "lifetime"),
        ("'ann', '{}', lifetime => '1000 years'", "lifetime"),
        ("'ann', '{}', claims => null", "claims"),
        ("'ann', '{}', claims => '[]'", "claims"),
        ("'ann', '{}', claims => '{\"exp\": 1}'", "claims"),
        ("'ann', '{}', claims => '{\"client_id\": \"x\"}'", "claims"),
        ("'ann', '{}', claims => '{\"rev\": 1}'", "claims"),
        ("'ann', '{}', claims => jsonb_build_object('x', repeat('x', 5000))", "claims"),
    ] {
        let error = error(
            signed.backend.execute(&format!("select tollgate.issue_access_token({arguments})"), &[]).await,
        );
        assert_eq!(error.code(), &SqlState::INVALID_PARAMETER_VALUE, "{arguments}: {error:?}");
        assert!(
            error.detail().is_some_and(|detail| detail.starts_with(&format!("Argument: {argument}"))),
            "{error:?}"
        );
        assert!(error.hint().is_some(), "{error:?}");
    }
    // A token in any argument is refused, in whatever form, and not repeated.
    let (token, _) = issue_signed(&signed.backend, "ann", "").await?;
    for argument in [
        "user_id => $1, scopes => '{}'",
        "user_id => 'ann', scopes => array[$1]",
        "user_id => 'ann', scopes => '{}', audience => array[$1]",
        "user_id => 'ann', scopes => '{}', claims => jsonb_build_object('x', $1::text)",
    ] {
        let call = format!("select tollgate.issue_access_token({argument})");
        let error = refused(signed.backend.query(&call, &[&token]).await, &SqlState::INVALID_PARAMETER_VALUE);
        assert!(!text_of(&error).contains(&token[20..40]), "{error:?}");
    }
    let error = refused(
        signed.backend.query("select tollgate.revoke_user('ann', 'it had ' || $1::text)", &[&token]).await,
        &SqlState::INVALID_PARAMETER_VALUE,
    );
    assert!(!text_of(&error).contains(&token[20..40]), "{error:?}");

    // Without a key, an issuer or an audience.
    let refusal = async |name: &str| -> Result<(SqlState, String)> {
        let backend = signed.db.session("backend").await?;
        let error =
            common::error(backend.execute("select tollgate.issue_access_token('ann', '{}')", &[]).await);
        assert!(error.hint().is_some() && error.detail().is_some(), "{name}: {error:?}");
        Ok((error.code().clone(), error.message().to_owned()))
    };
    for (setting, expected) in [
        ("tollgate.audience", SqlState::INVALID_PARAMETER_VALUE),
        ("tollgate.issuer", SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE),
    ] {
        signed
            .db
            .owner
            .batch_execute(&format!("alter database arguments_of_issuing set {setting} = ''"))
            .await?;
        assert_eq!(refusal(setting).await?.0, expected);
        signed
            .db
            .owner
            .batch_execute(&format!("alter database arguments_of_issuing reset {setting}"))
            .await?;
    }
    signed.db.owner.execute("select tollgate.withdraw_signing_key($1)", &[&signed.kid]).await?;
    assert_eq!(refusal("no key").await?.0, SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE);
    // Settings are checked when they are set, and not repeated.
    for (setting, bad) in [
        ("tollgate.issuer", "has space"),
        ("tollgate.audience", "quo\"te"),
        ("tollgate.issuer", token.as_str()),
        ("tollgate.identity_claims", token.as_str()),
    ] {
        let error = refused(
            signed.db.owner.batch_execute(&format!("set {setting} = '{bad}'")).await,
            &SqlState::INVALID_PARAMETER_VALUE,
        );
        assert!(!text_of(&error).contains(bad) && error.detail().is_some(), "{error:?}");
    }
    Ok(())
}

// ---- Keys

#[tokio::test]
async fn a_signature_that_was_seen_helps_neither_a_withdrawn_nor_a_changed_key() -> Result<()> {
    let signed = Signed::create("seen").await?;
    let good = signed.sign(&claims()?)?;
    let other = SigningKey::generate(Algorithm::Es256)?.public_key().to_jwk(&signed.kid);
    assert_eq!(signed.code(&good).await?, "VALID");
    // By hand, as no function does it: another key of the same kid.
    let own: String = value(&signed.db.owner, "select public_key from tollgate.sealed_keys").await?;
    let change = "update tollgate.sealed_keys set public_key = $1";
    signed.db.owner.execute(change, &[&other]).await?;
    assert_eq!(signed.code(&good).await?, "BAD_SIGNATURE");
    signed.db.owner.execute(change, &[&own]).await?;
    assert_eq!(signed.code(&good).await?, "VALID");

    // Inside a snapshot in which the key is good, and in every other session.
    let older = signed.db.session("web").await?;
    older.batch_execute("begin isolation level repeatable read").await?;
    assert_eq!(code(&older, &good).await?, "VALID");
    signed.db.owner.execute("select tollgate.withdraw_signing_key($1)", &[&signed.kid]).await?;
    assert_eq!(code(&older, &good).await?, "UNKNOWN_KEY");
    assert_eq!(signed.code(&good).await?, "UNKNOWN_KEY");
    Ok(())
}

#[tokio::test]
async fn a_key_that_was_rolled_back_leaves_nothing_behind() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "rolled_back").await?;
    db.owner.batch_execute("grant execute on function tollgate.verify_access_token to web").await?;
    let key = SigningKey::from_pkcs8_pem(PEM)?;
    let token = jws::sign(&key, &key.public_key().thumbprint(), "at+jwt", &claims()?.to_string())?;
    db.owner.batch_execute("begin").await?;
    import(&db.owner).await?;
    assert_eq!(code(&db.owner, &token).await?, "VALID", "the transaction sees its own key");
    assert_eq!(code(&db.web, &token).await?, "UNKNOWN_KEY", "nothing else does");
    db.owner.batch_execute("rollback").await?;
    for client in [&db.owner, &db.web] {
        assert_eq!(code(client, &token).await?, "UNKNOWN_KEY");
    }
    Ok(())
}

#[tokio::test]
async fn two_databases_of_a_server_share_neither_keys_nor_signatures_nor_revocations() -> Result<()> {
    let (one, two) = (Signed::create("first_of_two").await?, Signed::create("second_of_two").await?);
    let token = one.sign(&claims()?)?;
    // Both have the key and the issuer.
    assert_eq!((one.code(&token).await?.as_str(), two.code(&token).await?.as_str()), ("VALID", "VALID"));
    let (id, revoke) =
        (verify(&one.db.web, &token, "").await?.token_id, "select tollgate.revoke_access_token($1::uuid)");
    assert!(one.backend.query_one(revoke, &[&id]).await?.get::<_, bool>(0));
    assert_eq!((one.code(&token).await?.as_str(), two.code(&token).await?.as_str()), ("REVOKED", "VALID"));
    let token = one.sign(&claims()?)?;
    assert_eq!((one.code(&token).await?.as_str(), two.code(&token).await?.as_str()), ("VALID", "VALID"));
    two.db.owner.execute("select tollgate.withdraw_signing_key($1)", &[&two.kid]).await?;
    assert_eq!(
        (one.code(&token).await?.as_str(), two.code(&token).await?.as_str()),
        ("VALID", "UNKNOWN_KEY")
    );
    one.db
        .owner
        .batch_execute("alter database first_of_two set tollgate.issuer = 'https://first.test'")
        .await?;
    let web = one.db.session("web").await?;
    assert_eq!(code(&web, &token).await?, "UNTRUSTED_ISSUER");
    Ok(())
}

// ---- Revoking

#[tokio::test]
async fn a_revoked_token_is_refused_at_once_and_inside_an_older_snapshot() -> Result<()> {
    let signed = Signed::create("revoked").await?;
    let older = signed.db.session("web").await?;
    let (first, first_id) = issue_signed(&signed.backend, "ann", "").await?;
    let (second, second_id) = issue_signed(&signed.backend, "ann", "").await?;
    older.batch_execute("begin isolation level repeatable read").await?;
    assert_eq!(
        (code(&older, &first).await?.as_str(), code(&older, &second).await?.as_str()),
        ("VALID", "VALID")
    );
    // By its id, and by a role that is shown it.
    let by_id = "select tollgate.revoke_access_token($1::uuid, 'leaked')";
    assert!(signed.backend.query_one(by_id, &[&first_id]).await?.get::<_, bool>(0));
    assert!(!signed.backend.query_one(by_id, &[&first_id]).await?.get::<_, bool>(0), "once");
    let shown = "select tollgate.revoke_access_token($1::text, 'leaked')";
    let revoke =
        async |token: &str| -> Result<bool> { Ok(signed.db.web.query_one(shown, &[&token]).await?.get(0)) };
    assert!(revoke(&second).await?);
    assert!(!revoke(&second).await?, "once");
    for client in [&older, &signed.db.web] {
        for token in [&first, &second] {
            assert_eq!(code(client, token).await?, "REVOKED");
        }
    }
    older.batch_execute("rollback").await?;
    for (id, user) in [(first_id, None), (second_id, Some("ann"))] {
        let row = signed
            .db
            .owner
            .query_one("select event, user_id, detail from tollgate.audit_log where token_id = $1", &[&id])
            .await?;
        assert_eq!((row.get::<_, &str>(0), row.get::<_, Option<&str>>(1)), ("access_token.revoked", user));
        assert_eq!(row.get::<_, Value>(2), json!({"reason": "leaked"}));
    }
    // Nothing that is refused anyway is listed.
    let forged =
        jws::sign(&SigningKey::generate(Algorithm::Es256)?, &signed.kid, "at+jwt", &claims()?.to_string())?;
    let over = signed.sign(&claims_with(&json!({"exp": now()? - 1}))?)?;
    for token in [forged.as_str(), &over, "junk", ""] {
        assert!(!revoke(token).await?, "{token}");
    }
    // For another audience: it is accepted elsewhere, so it can be revoked.
    assert!(revoke(&signed.sign(&claims_with(&json!({"aud": "https://other.test"}))?)?).await?);
    let listed = "select count(*) from tollgate.denied_access_tokens";
    assert_eq!(value::<i64>(&signed.db.owner, listed).await?, 3);
    refused(
        signed.backend.execute("select tollgate.revoke_access_token(null::uuid)", &[]).await,
        &SqlState::INVALID_PARAMETER_VALUE,
    );
    // A revocation that is rolled back is none.
    let (third, third_id) = issue_signed(&signed.backend, "ann", "").await?;
    signed.backend.batch_execute("begin").await?;
    signed.backend.execute(by_id, &[&third_id]).await?;
    assert_eq!(signed.code(&third).await?, "VALID");
    signed.backend.batch_execute("rollback").await?;
    assert_eq!(signed.code(&third).await?, "VALID");
    Ok(())
}

#[tokio::test]
async fn a_login_right_after_revoke_user_works_and_a_token_from_before_never_does() -> Result<()> {
    let signed = Signed::create("marks").await?;
    let codes = async |tokens: &[&str]| -> Result<Vec<String>> {
        let mut codes = Vec::new();
        for token in tokens {
            codes.push(signed.code(token).await?);
        }
        Ok(codes)
    };
    let (first, _) = issue_signed(&signed.backend, "ann", "").await?;
    let (bens, _) = issue_signed(&signed.backend, "ben", "").await?;
    let api_token = issue(&signed.db.owner, "ann", &[]).await?;
    let older = signed.db.session("web").await?;
    older.batch_execute("begin isolation level repeatable read").await?;
    assert_eq!(code(&older, &first).await?, "VALID");
    // All within one second.
    assert_eq!(revoke_user(&signed.backend, "ann").await?, 1);
    let (second, _) = issue_signed(&signed.backend, "ann", "").await?;
    assert_eq!(codes(&[&first, &second, &bens]).await?, ["REVOKED", "VALID", "VALID"]);
    assert_eq!(common::code(&signed.db.owner, &api_token.token).await?, "REVOKED");
    assert_eq!(
        (code(&older, &first).await?.as_str(), code(&older, &second).await?.as_str()),
        ("REVOKED", "VALID")
    );
    assert_eq!(revoke_user(&signed.backend, "ann").await?, 0);
    let (third, _) = issue_signed(&signed.backend, "ann", "").await?;
    assert_eq!(codes(&[&first, &second, &third]).await?, ["REVOKED", "REVOKED", "VALID"]);

    // A login in the transaction that revokes, and one that is rolled back: its mark never comes back.
    signed.backend.batch_execute("begin").await?;
    revoke_user(&signed.backend, "ann").await?;
    let (rolled_back, _) = issue_signed(&signed.backend, "ann", "").await?;
    assert_eq!(code(&signed.backend, &rolled_back).await?, "VALID");
    signed.backend.batch_execute("rollback").await?;
    assert_eq!(codes(&[&third, &rolled_back]).await?, ["VALID", "REVOKED"]);
    signed.backend.batch_execute("begin isolation level repeatable read; select 1").await?;
    let elsewhere = signed.db.session("backend").await?;
    revoke_user(&elsewhere, "ann").await?;
    let (in_old_snapshot, _) = issue_signed(&signed.backend, "ann", "").await?;
    signed.backend.batch_execute("commit").await?;
    assert_eq!(codes(&[&third, &rolled_back, &in_old_snapshot]).await?, ["REVOKED", "REVOKED", "VALID"]);
    // Nor does another's mark help.
    let mark: i64 =
        value(&signed.db.owner, "select mark from tollgate.revoked_users where user_id = 'ann'").await?;
    revoke_user(&signed.backend, "ben").await?;
    assert_eq!(
        signed.code(&signed.sign(&claims_with(&json!({"sub": "ben", "rev": mark}))?)?).await?,
        "REVOKED"
    );
    assert_eq!(signed.code(&signed.sign(&claims_with(&json!({"rev": mark}))?)?).await?, "VALID");

    let event = "select detail from tollgate.audit_log where event = 'user.revoked' and user_id = 'ann' order by id limit 1";
    assert_eq!(
        value::<Value>(&signed.db.owner, event).await?,
        json!({"reason": "left", "tokens": 1, "sessions": 0})
    );
    for user in ["null", "''", "' '", "repeat('x', 256)"] {
        refused(
            signed.backend.execute(&format!("select tollgate.revoke_user({user})"), &[]).await,
            &SqlState::INVALID_PARAMETER_VALUE,
        );
    }
    Ok(())
}

#[tokio::test]
async fn a_user_who_leaves_an_attached_table_or_is_not_active_has_no_access() -> Result<()> {
    let signed = Signed::create("leavers").await?;
    signed
        .db
        .owner
        .batch_execute(
            "create table public.users (id text primary key, active boolean not null default true);
             insert into public.users values ('ann'), ('ben'), ('cat');
             select tollgate.attach_users_table('public.users', 'id', active => 'active')",
        )
        .await?;
    let mut tokens = Vec::new();
    for user in ["ann", "ben", "cat"] {
        tokens.push(issue_signed(&signed.backend, user, "").await?.0);
    }
    signed
        .db
        .owner
        .batch_execute("delete from users where id = 'ann'; update users set active = false where id = 'ben'")
        .await?;
    for (token, expected) in tokens.iter().zip(["REVOKED", "REVOKED", "VALID"]) {
        assert_eq!(signed.code(token).await?, expected);
    }
    for (user, refusal) in
        [("ann", SqlState::FOREIGN_KEY_VIOLATION), ("ben", SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE)]
    {
        let call = "select tollgate.issue_access_token($1, '{}')";
        refused(signed.backend.execute(call, &[&user]).await, &refusal);
    }
    signed.db.owner.batch_execute("update users set active = true where id = 'ben'").await?;
    assert_eq!(signed.code(&tokens[1]).await?, "REVOKED", "ben logs in again");
    let (again, _) = issue_signed(&signed.backend, "ben", "").await?;
    assert_eq!(signed.code(&again).await?, "VALID");
    signed.db.owner.batch_execute("truncate users").await?;
    assert_eq!(
        (signed.code(&again).await?.as_str(), signed.code(&tokens[2]).await?.as_str()),
        ("REVOKED", "REVOKED")
    );
    Ok(())
}

#[tokio::test]
async fn revocations_are_purged_when_no_token_can_be_affected() -> Result<()> {
    let signed = Signed::create("purged_denials").await?;
    let mut tokens = Vec::new();
    for _ in 0..3 {
        let (token, id) = issue_signed(&signed.backend, "ann", "").await?;
        signed.backend.execute("select tollgate.revoke_access_token($1::uuid)", &[&id]).await?;
        tokens.push(token);
    }
    revoke_user(&signed.backend, "ann").await?;
    revoke_user(&signed.backend, "ben").await?;
    let (current, _) = issue_signed(&signed.backend, "ben", "").await?;
    let purge = "select tollgate.purge_denials(1000)";
    assert_eq!(value::<i64>(&signed.db.operator, purge).await?, 0);
    // As if eight days had passed, for two of the tokens and for ben.
    signed
        .db
        .owner
        .batch_execute(
            "update tollgate.denied_access_tokens set expires_at = now() - interval '25 hours'
                 where jti in (select jti from tollgate.denied_access_tokens order by jti limit 2);
             update tollgate.revoked_users set revoked_at = now() - interval '193 hours' where user_id = 'ben'",
        )
        .await?;
    let (daemon, _) = web::run(&signed.db.url(), &["--purge-interval=100ms"]).await?;
    eventually_async(Duration::from_secs(30), "the daemon to purge", async || {
        let left = "select (select count(*) from tollgate.denied_access_tokens) * 10 + (select count(*) from tollgate.revoked_users)";
        value::<i64>(&signed.db.owner, left).await.is_ok_and(|left| left == 11)
    })
    .await;
    drop(daemon);
    assert_eq!(value::<i64>(&signed.db.operator, purge).await?, 0);
    assert_eq!(signed.code(&current).await?, "VALID", "a token of now outlives the mark that it repeats");
    for token in &tokens {
        assert_eq!(signed.code(token).await?, "REVOKED", "by the user's mark");
    }
    revoke_user(&signed.backend, "ben").await?;
    assert_eq!(signed.code(&current).await?, "REVOKED");
    refused(
        signed.db.operator.execute("select tollgate.purge_denials(0)", &[]).await,
        &SqlState::INVALID_PARAMETER_VALUE,
    );
    Ok(())
}

// ---- Identity

const POSTS: &str = "
    create table public.posts (author text not null, title text not null);
    alter table public.posts enable row level security;
    grant select on public.posts to web;
    create policy own on public.posts to web using (
        author = (select tollgate.current_user_id()) and (select tollgate.token_has_scope('posts:read')));
    insert into public.posts values ('ann', 'hers'), ('ben', 'his')";

async fn titles(client: &Client) -> Result<Vec<String>> {
    Ok(client.query("select title from posts order by 1", &[]).await?.iter().map(|row| row.get(0)).collect())
}

#[tokio::test]
async fn a_signed_token_is_an_identity_under_row_level_security() -> Result<()> {
    let signed = Signed::create("policies").await?;
    signed.db.owner.batch_execute(POSTS).await?;
    let web = &signed.db.web;
    let (token, jti) = issue_signed(
        &signed.backend,
        "ann",
        ", claims => '{\"plan\": \"pro\", \"n\": 12345678901234567890123}'",
    )
    .await?;
    assert_eq!(titles(web).await?, [""; 0]);
    web.batch_execute("begin").await?;
    authenticate(web, &token).await?;
    assert_eq!(titles(web).await?, ["hers"]);
    let identity = common::identity(web).await?.context("an identity")?;
    assert_eq!((identity.token_id, identity.user_id.as_str()), (jti, "ann"));
    assert_eq!(identity.scopes, ["posts:read"]);
    assert_eq!(value::<String>(web, "select tollgate.current_issuer()").await?, ISSUER);
    assert!(value::<bool>(web, "select tollgate.current_actor() is null").await?);
    let claims: Value = value(web, "select tollgate.current_claims()").await?;
    let names: Vec<&str> = claims.as_object().context("an object")?.keys().map(String::as_str).collect();
    assert_eq!(names, ["aud", "client_id", "exp", "iat", "iss", "jti", "sub"]);
    assert_eq!((&claims["sub"], &claims["jti"]), (&json!("ann"), &json!(jti)));
    let setting: String = value(web, "select current_setting('tollgate.context')").await?;
    assert!(
        !setting.contains(token.rsplit_once('.').context("a signature")?.1),
        "the signature is in the setting"
    );
    // Revoking it does not end the transaction; the next one does not begin.
    revoke_user(&signed.backend, "ann").await?;
    assert_eq!(titles(web).await?, ["hers"]);
    web.batch_execute("commit; begin").await?;
    refused(authenticate(web, &token).await, &SqlState::INVALID_AUTHORIZATION_SPECIFICATION);
    web.batch_execute("rollback").await?;
    for gone in ["current_actor", "current_claims", "current_issuer", "current_user_id", "current_token_id"] {
        assert!(value::<bool>(web, &format!("select tollgate.{gone}() is null")).await?, "{gone}");
    }
    // Named claims, as they were signed; too many are refused, and not left out.
    signed
        .db
        .owner
        .batch_execute("alter database policies set tollgate.identity_claims = 'plan, n, none'")
        .await?;
    let web = signed.db.session("web").await?;
    let (token, _) = issue_signed(
        &signed.backend,
        "ann",
        ", claims => '{\"plan\": \"pro\", \"n\": 12345678901234567890123}'",
    )
    .await?;
    web.batch_execute("begin").await?;
    authenticate(&web, &token).await?;
    let kept = "select tollgate.current_claims() = '{\"plan\": \"pro\", \"n\": 12345678901234567890123}'";
    assert!(value::<bool>(&web, kept).await?);
    web.batch_execute("rollback; begin").await?;
    let large = signed.sign(&claims_with(&json!({"plan": "x".repeat(4100)}))?)?;
    assert_eq!(code(&web, &large).await?, "REVOKED");
    let mark: i64 = value(&signed.db.owner, "select mark from tollgate.revoked_users").await?;
    let large = signed.sign(&claims_with(&json!({"plan": "x".repeat(4100), "rev": mark}))?)?;
    assert_eq!(code(&web, &large).await?, "VALID");
    refused(authenticate(&web, &large).await, &SqlState::PROGRAM_LIMIT_EXCEEDED);
    web.batch_execute("rollback").await?;
    // An API token has neither issuer nor claims.
    let api_token = issue(&signed.db.owner, "ann", &["posts:read"]).await?;
    web.batch_execute("begin").await?;
    authenticate(&web, &api_token.token).await?;
    assert_eq!(titles(&web).await?, ["hers"]);
    assert!(
        value::<bool>(&web, "select tollgate.current_claims() is null and tollgate.current_issuer() is null")
            .await?
    );
    Ok(())
}

#[tokio::test]
async fn claims_whose_names_are_escaped_are_a_part_of_the_identity() -> Result<()> {
    let signed = Signed::create("escaped").await?;
    // Some libraries escape each slash.
    let setting = "alter database escaped set tollgate.identity_claims = 'sub, https://example.com/roles, n'";
    signed.db.owner.batch_execute(setting).await?;
    let web = signed.db.session("web").await?;
    let claims = claims()?.to_string();
    let claims = claims.strip_suffix('}').context("an object")?;
    for (n, expected) in [("1", "1"), ("1.50", "1.50")] {
        let own = format!(
            r#""https:\/\/example.com\/roles":["a\/b"],"\u006e":{n},"a\u0063t":{{"sub":"helper","n":{n}}}"#
        );
        let token = jws::sign(&signed.key, &signed.kid, "at+jwt", &format!("{claims},{own}}}"))?;
        web.batch_execute("begin").await?;
        authenticate(&web, &token).await?;
        let identity = web
            .query_one(
                "select tollgate.current_claims() ->> 'n', tollgate.current_claims() #>> '{https://example.com/roles,0}',
                        tollgate.current_claims() ->> 'sub', tollgate.current_actor() ->> 'sub', tollgate.current_actor() ->> 'n'",
                &[],
            )
            .await?;
        let texts: Vec<Option<&str>> = (0..5).map(|column| identity.get(column)).collect();
        assert_eq!(texts, [Some(expected), Some("a/b"), Some("ann"), Some("helper"), Some(expected)]);
        web.batch_execute("rollback").await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_transaction_has_one_identity_of_whatever_kind() -> Result<()> {
    let signed = Signed::create("one_identity").await?;
    let web = &signed.db.web;
    let (first, _) = issue_signed(&signed.backend, "ann", "").await?;
    let (second, _) = issue_signed(&signed.backend, "ann", "").await?;
    let api_token = issue(&signed.db.owner, "ann", &["posts:read"]).await?.token;
    for (bound, other) in [(&first, &second), (&first, &api_token), (&api_token, &first)] {
        web.batch_execute("begin").await?;
        authenticate(web, bound).await?;
        authenticate(web, bound).await?;
        web.batch_execute("savepoint s").await?;
        refused(authenticate(web, other).await, &SqlState::ACTIVE_SQL_TRANSACTION);
        web.batch_execute("rollback to s").await?;
        assert_eq!(current_user(web).await?.as_deref(), Some("ann"));
        web.batch_execute("rollback; begin; savepoint s").await?;
        // Also when the first was rolled back.
        authenticate(web, bound).await?;
        web.batch_execute("rollback to s").await?;
        assert_eq!(current_user(web).await?, None);
        refused(authenticate(web, other).await, &SqlState::ACTIVE_SQL_TRANSACTION);
        web.batch_execute("rollback").await?;
    }
    // Only one that succeeds binds.
    web.batch_execute("begin; savepoint s").await?;
    let over = signed.sign(&claims_with(&json!({"exp": now()? - 1}))?)?;
    refused(authenticate(web, &over).await, &SqlState::INVALID_AUTHORIZATION_SPECIFICATION);
    web.batch_execute("rollback to s").await?;
    authenticate(web, &api_token).await?;
    web.batch_execute("rollback").await?;
    Ok(())
}

// ---- Usage and limits

#[tokio::test]
async fn uses_are_counted_on_the_user_and_limits_hold_for_every_kind_of_token() -> Result<()> {
    let signed = Signed::create("metered").await?;
    let usage = async |user: &str| -> Result<(i64, i64, Option<String>)> {
        flush_all(&signed.db.operator).await?;
        let call = "select use_count, denied_count, host(last_used_ip) from tollgate.access_token_usage($1)";
        let row = signed.backend.query_one(call, &[&user]).await?;
        Ok((row.get(0), row.get(1), row.get(2)))
    };
    let (one, _) = issue_signed(&signed.backend, "ann", "").await?;
    let (two, id) = issue_signed(&signed.backend, "ann", "").await?;
    assert_eq!(usage("ann").await?, (0, 0, None));
    for token in [&one, &two, &two] {
        assert_eq!(verify(&signed.db.web, token, ", client_ip => '192.0.2.7'").await?.code, "VALID");
    }
    verify(&signed.db.web, &one, ", '{posts:write}'").await?;
    assert_eq!(usage("ann").await?, (3, 1, Some("192.0.2.7".to_owned())));
    signed.backend.execute("select tollgate.revoke_access_token($1::uuid)", &[&id]).await?;
    assert_eq!(signed.code(&two).await?, "REVOKED");
    // A forged one counts for no user.
    let forged =
        jws::sign(&SigningKey::generate(Algorithm::Es256)?, &signed.kid, "at+jwt", &claims()?.to_string())?;
    assert_eq!(signed.code(&forged).await?, "BAD_SIGNATURE");
    assert_eq!(usage("ann").await?, (3, 2, Some("192.0.2.7".to_owned())));
    assert_eq!(usage("ben").await?, (0, 0, None));

    // All tokens of a user together.
    signed.db.owner.batch_execute("alter database metered set tollgate.user_rate_limit = 4").await?;
    let web = signed.db.session("web").await?;
    let api_token = issue(&signed.db.owner, "cat", &[]).await?.token;
    let (cats, _) = issue_signed(&signed.backend, "cat", "").await?;
    for n in 0..2 {
        assert_eq!(common::code(&web, &api_token).await?, "VALID");
        let answer = verify(&web, &cats, "").await?;
        assert_eq!(
            (answer.code.as_str(), answer.rate_limit, answer.rate_remaining),
            ("VALID", Some(4), Some(2 - 2 * n))
        );
    }
    let answer = verify(&web, &cats, "").await?;
    assert_eq!(
        (answer.code.as_str(), answer.user_id, answer.retry_after.is_some()),
        ("RATE_LIMITED", None, true)
    );
    assert_eq!(common::code(&web, &api_token).await?, "RATE_LIMITED");
    web.batch_execute("begin").await?;
    refused(authenticate(&web, &cats).await, &SqlState::CONFIGURATION_LIMIT_EXCEEDED);
    web.batch_execute("rollback").await?;
    assert_eq!(usage("cat").await?.0, 2);

    // Failed attempts, of whatever kind, from one address.
    signed
        .db
        .owner
        .batch_execute("alter database metered set tollgate.failure_rate_limit = 3; alter database metered reset tollgate.user_rate_limit")
        .await?;
    let web = signed.db.session("web").await?;
    let at = ", client_ip => '203.0.113.9'";
    for token in [forged.as_str(), "junk", &two] {
        assert_ne!(verify(&web, token, at).await?.code, "RATE_LIMITED");
    }
    for token in [forged.as_str(), &one] {
        let answer = verify(&web, token, at).await?;
        assert_eq!(
            (answer.code.as_str(), answer.token_id),
            ("RATE_LIMITED", None),
            "not even a right guess is confirmed"
        );
    }
    let revoke = "select tollgate.revoke_access_token($1::text, client_ip => '203.0.113.9')";
    refused(web.query_one(revoke, &[&one]).await, &SqlState::CONFIGURATION_LIMIT_EXCEEDED);
    assert_eq!(code(&web, &one).await?, "VALID");
    Ok(())
}

// ---- Servers

#[tokio::test]
async fn signed_tokens_are_verified_on_a_standby_and_in_read_only_transactions() -> Result<()> {
    let cluster = Arc::new(common::start(Cluster::builder())?);
    let signed = Signed::on(&cluster, "replicated").await?;
    let standby = cluster.standby()?;
    let (token, _) = issue_signed(&signed.backend, "ann", "").await?;
    standby.catch_up_with(&cluster)?;
    let there = standby.connect("web", "replicated").await?;
    signed.db.web.batch_execute("begin read only").await?;
    for client in [&there, &signed.db.web] {
        assert_eq!(code(client, &token).await?, "VALID");
    }
    there.batch_execute("begin").await?;
    authenticate(&there, &token).await?;
    assert_eq!(current_user(&there).await?.as_deref(), Some("ann"));
    there.batch_execute("commit").await?;
    revoke_user(&signed.backend, "ann").await?;
    standby.catch_up_with(&cluster)?;
    for client in [&there, &signed.db.web] {
        assert_eq!(code(client, &token).await?, "REVOKED");
    }
    Ok(())
}

#[tokio::test]
async fn without_a_table_of_signatures_and_without_shared_memory_everything_is_decided_alike() -> Result<()> {
    for preload in [true, false] {
        let cluster =
            common::start(Cluster::builder().preload(preload).setting("tollgate.signature_table_size", "0"))?;
        let owner = cluster.connect("postgres", DATABASE).await?;
        let key = SigningKey::from_pkcs8_pem(PEM)?;
        let kid = key.public_key().thumbprint();
        // By hand: without shared memory no private key can be sealed.
        let add = "insert into tollgate.sealed_keys (kid, purpose, algorithm, public_key, signs_from)
                   values ($1, 'access_token', 'ES256', $2, now())";
        owner.execute(add, &[&kid, &key.public_key().to_jwk(&kid)]).await?;
        let good = jws::sign(&key, &kid, "at+jwt", &claims()?.to_string())?;
        let forged =
            jws::sign(&SigningKey::generate(Algorithm::Es256)?, &kid, "at+jwt", &claims()?.to_string())?;
        for _ in 0..2 {
            assert_eq!(code(&owner, &good).await?, "VALID");
            assert_eq!(code(&owner, &forged).await?, "BAD_SIGNATURE");
        }
        owner.batch_execute("begin").await?;
        authenticate(&owner, &good).await?;
        assert_eq!(current_user(&owner).await?.as_deref(), Some("ann"));
        owner.batch_execute("rollback").await?;
        revoke_user(&owner, "ann").await?;
        assert_eq!(code(&owner, &good).await?, "REVOKED");
    }
    Ok(())
}
