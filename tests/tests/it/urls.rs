//! Signed URLs: signed by an issuer, verified by an application, attacked by those who hold them, used once, and verified
//! without the database by the scripts in contrib.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use tollgate_core::url::{self, Key, SignedUrl};
use tollgate_tests::{Cluster, DATABASE, Port, eventually_async};

use crate::commands::{NO, OK, failure, json_of, printed};
use crate::common::{self, Shared, refused, value, wait_until_blocked};
use crate::drivers::fetched;
use crate::operator::Db;
use crate::web;

static SHARED: Shared = Shared::new(&[]);

const LONG: Duration = Duration::from_secs(60);
const VIDEO: &str = "https://media.example.com/videos/7/index.m3u8";

/// A database with a key, and the roles that sign, verify and manage.
struct Urls {
    db: Db,
    backend: Client,
    boss: Client,
    key_id: String,
}

impl Urls {
    async fn create(name: &str) -> Result<Self> {
        Self::on(&SHARED.cluster()?, name).await
    }

    async fn on(cluster: &Arc<Cluster>, name: &str) -> Result<Self> {
        let db = Db::create(cluster, name).await?;
        db.owner
            .batch_execute(
                "do $$ begin create role backend login; exception when duplicate_object or unique_violation then end $$;
                 do $$ begin create role boss login; exception when duplicate_object or unique_violation then end $$;
                 select tollgate.grant_capability('backend', 'issuer'), tollgate.grant_capability('boss', 'admin'),
                        tollgate.grant_capability('web', 'verifier')",
            )
            .await?;
        let (backend, boss) = (db.session("backend").await?, db.session("boss").await?);
        let key_id = value(&boss, "select tollgate.create_url_key()").await?;
        Ok(Self { db, backend, boss, key_id })
    }

    async fn sign(&self, arguments: &str) -> Result<String> {
        sign(&self.backend, VIDEO, arguments).await
    }

    async fn code(&self, url: &str) -> Result<String> {
        code(&self.db.web, url).await
    }
}

/// Signs a URL with further arguments in SQL.
async fn sign(client: &Client, url: &str, arguments: &str) -> Result<String> {
    let call = format!("select tollgate.sign_url($1{arguments})");
    Ok(client.query_one(&call, &[&url]).await.with_context(|| call.clone())?.get(0))
}

/// The row, as JSON, with further arguments in SQL.
async fn verify(client: &Client, url: &str, arguments: &str) -> Result<Value, tokio_postgres::Error> {
    let call = format!("select to_jsonb(v) from tollgate.verify_signed_url($1{arguments}) v");
    Ok(client.query_one(&call, &[&url]).await?.get(0))
}

async fn code_of(client: &Client, url: &str, arguments: &str) -> Result<String> {
    let row = verify(client, url, arguments).await?;
    assert_eq!(row["valid"], row["code"] == "VALID");
    Ok(row["code"].as_str().context("a code")?.to_owned())
}

async fn code(client: &Client, url: &str) -> Result<String> {
    code_of(client, url, "").await
}

// ---- Signing and verifying

#[tokio::test]
async fn a_signed_url_is_verified_with_what_was_signed() -> Result<()> {
    let urls = Urls::create("signed").await?;
    let url = urls.sign("").await?;
    let row = verify(&urls.db.web, &url, "").await?;
    let left = "select extract(epoch from ($1::text::timestamptz - now()))::float8";
    let left: f64 = urls.db.owner.query_one(left, &[&row["expires_at"].as_str()]).await?.get(0);
    assert!((3500.0..3601.0).contains(&left), "an hour, not {left} s");
    let expected = json!({
        "valid": true, "code": "VALID", "reason": null, "subject": null, "key_name": "default", "key_id": urls.key_id,
        "expires_at": row["expires_at"], "single_use": false, "response_headers": null,
    });
    assert_eq!(row, expected);

    let url = urls
        .sign(
            ", expires_at => now() + interval '2 days', methods => '{PUT,GET}', path_prefix => '/videos/7/',
             network => '203.0.113.0/24', subject => 'Zoë', not_before => now() - interval '1 minute',
             response_headers => '{\"Content-Disposition\": \"attachment; filename=\\\"a.txt\\\"\"}'",
        )
        .await?;
    let segment = url.replace("index.m3u8", "0001.ts");
    let row = verify(&urls.db.web, &segment, ", 'PUT', '203.0.113.9'").await?;
    assert_eq!((&row["code"], &row["subject"]), (&json!("VALID"), &json!("Zoë")));
    assert_eq!(row["response_headers"], json!({"Content-Disposition": "attachment; filename=\"a.txt\""}));
    for (arguments, expected) in [
        (", 'GET', '203.0.113.9'", "VALID"),
        (", 'GET', '::ffff:203.0.113.9'", "VALID"),
        (", 'HEAD', '203.0.113.9'", "METHOD_NOT_ALLOWED"),
        (", 'get', '203.0.113.9'", "METHOD_NOT_ALLOWED"),
        (", null, '203.0.113.9'", "METHOD_NOT_ALLOWED"),
        (", 'GET', '198.51.100.1'", "IP_NOT_ALLOWED"),
        (", 'GET'", "IP_NOT_ALLOWED"),
    ] {
        assert_eq!(code_of(&urls.db.web, &segment, arguments).await?, expected, "{arguments}");
    }
    let elsewhere = verify(&urls.db.web, &segment, "").await?;
    assert_eq!(elsewhere["response_headers"], Value::Null, "only a valid one says what to answer");
    assert_eq!(elsewhere["subject"], "Zoë", "a refused one says whose it is, for the log");
    for (url, reason) in [
        ("null", "missing"),
        ("''", "scheme"),
        ("'https://h/'", "parameter"),
        ("'https://h/#'", "fragment"),
        ("'https://ann@h/'", "host"),
        ("'https://h/../'", "dot-segment"),
        ("'https://h/é'", "character"),
        ("'https://h/%'", "escape"),
        ("'https://h/' || repeat('x', 9000)", "size"),
    ] {
        let query = format!("select code || ' ' || reason from tollgate.verify_signed_url({url})");
        assert_eq!(value::<String>(&urls.db.web, &query).await?, format!("MALFORMED {reason}"));
    }
    Ok(())
}

#[tokio::test]
async fn a_url_lives_from_its_beginning_to_its_end() -> Result<()> {
    let urls = Urls::create("times").await?;
    let (short, later) = (
        urls.sign(", '1.5 seconds'").await?,
        urls.sign(", not_before => now() + interval '1 second'").await?,
    );
    let early = urls.sign(", not_before => now() + interval '50 minutes'").await?;
    assert_eq!(urls.code(&early).await?, "NOT_YET_VALID");
    for (url, code) in [(&short, "EXPIRED"), (&later, "VALID")] {
        eventually_async(LONG, code, async || urls.code(url).await.is_ok_and(|found| found == code)).await;
    }
    Ok(())
}

#[tokio::test]
async fn verifying_writes_nothing_and_works_in_old_snapshots() -> Result<()> {
    let urls = Urls::create("reads").await?;
    let url = urls.sign("").await?;
    for begin in [
        "begin read only",
        "begin isolation level repeatable read",
        "begin isolation level serializable read only",
    ] {
        urls.db.web.batch_execute(begin).await?;
        assert_eq!(urls.code(&url).await?, "VALID");
        assert!(value::<bool>(&urls.db.web, "select pg_current_xact_id_if_assigned() is null").await?);
        urls.db.web.batch_execute("commit").await?;
    }
    // The key is read by the latest snapshot.
    urls.db
        .web
        .batch_execute("begin isolation level repeatable read; select 1 from pg_class limit 1")
        .await?;
    urls.boss.query_one("select tollgate.withdraw_url_key($1, 'leaked')", &[&urls.key_id]).await?;
    assert_eq!(urls.code(&url).await?, "UNKNOWN_KEY");
    urls.db.web.batch_execute("commit").await?;
    Ok(())
}

// ---- Attacks

#[tokio::test]
async fn what_was_not_signed_is_refused() -> Result<()> {
    let urls = Urls::create("attacks").await?;
    let url = sign(&urls.backend, "https://media.example.com/a/b?x=1&y=2", "").await?;
    let (before, signature) = url.split_at(url.len() - 43);
    let other = sign(&urls.backend, "https://media.example.com/a/c?x=1&y=2", "").await?;
    let exp = url.split("tgu_exp=").nth(1).and_then(|rest| rest.split('&').next()).context("an end")?;
    let attacks = [
        // Pollution, order and encoding of parameters.
        (url.replace("?x=1&y=2&", "?y=2&x=1&"), "VALID"),
        (url.replace("?x=1", "?%78=%31"), "VALID"),
        (url.replace("?x=1", "?x=2"), "BAD_SIGNATURE"),
        (url.replace("?x=1", "?x=1&x=2"), "BAD_SIGNATURE"),
        (url.replace("&y=2", ""), "BAD_SIGNATURE"),
        (url.replace("&y=2", "&y=%32%00"), "MALFORMED"),
        (url.replace("x=1&y=2", "x=1%26y=2"), "BAD_SIGNATURE"),
        (url.replace("x=1", "x=1+"), "BAD_SIGNATURE"),
        (url.replace("x=1&", "x=1;z=1&"), "BAD_SIGNATURE"),
        (format!("{url}&z"), "BAD_SIGNATURE"),
        (format!("{url}&tgu_exp={exp}"), "MALFORMED"),
        (format!("{url}&TGU_EXP=1"), "BAD_SIGNATURE"),
        (format!("{url}&tgu_once=00"), "MALFORMED"),
        (format!("{url}&tgu_prefix=1"), "BAD_SIGNATURE"),
        // The path: dots, escapes, escapes of escapes, Unicode.
        (url.replace("/a/b", "/a/./b"), "MALFORMED"),
        (url.replace("/a/b", "/c/../a/b"), "MALFORMED"),
        (url.replace("/a/b", "/c/%2e%2e/a/b"), "MALFORMED"),
        (url.replace("/a/b", "/c/%252e%252e/a/b"), "BAD_SIGNATURE"),
        (url.replace("/a/b", "/a%2Fb"), "BAD_SIGNATURE"),
        (url.replace("/a/b", "/a//b"), "BAD_SIGNATURE"),
        (url.replace("/a/b", "/A/b"), "BAD_SIGNATURE"),
        (url.replace("/a/b", "/a/b/"), "BAD_SIGNATURE"),
        (url.replace("/a/b", "/a/%62"), "VALID"),
        (url.replace("/a/b", "/%C3%A1/b"), "BAD_SIGNATURE"),
        (url.replace("/a/b", "/a\u{301}/b"), "MALFORMED"),
        (url.replace("/a/b", "/a\\b"), "MALFORMED"),
        (url.replace("/a/b", "/a/b%00"), "MALFORMED"),
        // The host.
        (url.replace("media.example.com", "MEDIA.example.COM:443"), "VALID"),
        (url.replace("media.example.com", "media.example.com:8443"), "BAD_SIGNATURE"),
        (url.replace("media.example.com", "media.example.com."), "MALFORMED"),
        (url.replace("media.example.com", "evil.example.com"), "BAD_SIGNATURE"),
        (url.replace("media.example.com", "media.example.com@evil.example"), "MALFORMED"),
        (url.replace("https:", "http:"), "BAD_SIGNATURE"),
        (format!("{url}#top"), "MALFORMED"),
        // What it allows.
        (url.replace("GET.HEAD", "GET.HEAD.PUT"), "BAD_SIGNATURE"),
        (url.replace(exp, "99999999999"), "BAD_SIGNATURE"),
        (url.replace(exp, "9999999999999"), "MALFORMED"),
        (url.replace(exp, "18446744073709551617"), "MALFORMED"),
        (url.replace(exp, "-1"), "MALFORMED"),
        // The signature.
        (format!("{before}{}", &signature[..42]), "MALFORMED"),
        (format!("{url}A"), "MALFORMED"),
        (format!("{url}="), "MALFORMED"),
        (format!("{before}{}", "A".repeat(43)), "BAD_SIGNATURE"),
        (before.to_owned(), "MALFORMED"),
        (before.trim_end_matches("&tgu_sig=").to_owned(), "MALFORMED"),
        (format!("{before}{}", other.rsplit('=').next().unwrap_or_default()), "BAD_SIGNATURE"),
    ];
    for (attack, expected) in attacks {
        assert_eq!(urls.code(&attack).await?, expected, "{attack}");
    }
    let prefix = sign(&urls.backend, "https://media.example.com/a/b", ", path_prefix => '/a/'").await?;
    for (path, expected) in [
        ("/a/", "VALID"),
        ("/a/deeper/still", "VALID"),
        ("/ab", "BAD_SIGNATURE"),
        ("/a", "BAD_SIGNATURE"),
        ("/A/b", "BAD_SIGNATURE"),
        ("/a/../b", "MALFORMED"),
        ("/a/%2e%2e/b", "MALFORMED"),
        ("/a/..;/b", "MALFORMED"),
        ("/a/..%2fb", "PATH_NOT_ALLOWED"),
        ("/a/..%5cb", "PATH_NOT_ALLOWED"),
        ("/a/%252e%252e/b", "PATH_NOT_ALLOWED"),
        ("/a/%c0%ae%c0%ae/b", "PATH_NOT_ALLOWED"),
        ("/a/%ef%bc%8e%ef%bc%8e/b", "PATH_NOT_ALLOWED"),
        ("//a/b", "BAD_SIGNATURE"),
    ] {
        assert_eq!(urls.code(&prefix.replace("/a/b?", &format!("{path}?"))).await?, expected, "{path}");
    }
    assert_eq!(
        urls.code(&prefix.replace("/a/b?", "/a/b?x=1&")).await?,
        "BAD_SIGNATURE",
        "the query is signed too"
    );
    Ok(())
}

#[tokio::test]
async fn no_key_is_taken_for_another() -> Result<()> {
    let urls = Urls::create("confused").await?;
    let downloads: String = value(&urls.boss, "select tollgate.create_url_key('downloads')").await?;
    let signing: String = value(&urls.boss, "select tollgate.create_signing_key()").await?;
    urls.backend.query_one("select tollgate.open_session('ann', '{posts:read}')", &[]).await?;
    let refresh: String =
        value(&urls.boss, "select kid from tollgate.signing_keys where purpose = 'refresh_token'").await?;
    let url = urls.sign(", key => 'downloads'").await?;
    let row = verify(&urls.db.web, &url, "").await?;
    assert_eq!((&row["key_name"], &row["key_id"]), (&json!("downloads"), &json!(downloads)));
    for (other, expected) in [
        (urls.key_id.as_str(), "BAD_SIGNATURE"),
        (&signing, "UNKNOWN_KEY"),
        (&refresh, "UNKNOWN_KEY"),
        (&"A".repeat(43), "UNKNOWN_KEY"),
        ("default", "MALFORMED"),
    ] {
        assert_eq!(urls.code(&url.replace(&downloads, other)).await?, expected, "{other}");
    }
    // Of another database, and one whose row was moved to another name.
    let elsewhere = Urls::create("confused_elsewhere").await?;
    assert_eq!(elsewhere.code(&url).await?, "UNKNOWN_KEY");
    urls.db
        .owner
        .execute("update tollgate.sealed_keys set purpose = 'signed_url:other' where kid = $1", &[&downloads])
        .await?;
    let fresh = urls.db.session("web").await?;
    refused(verify(&fresh, &url, "").await, &SqlState::DATA_CORRUPTED);
    Ok(())
}

// ---- Keys

#[tokio::test]
async fn a_replaced_key_verifies_for_a_year_and_a_withdrawn_one_not_at_all() -> Result<()> {
    let urls = Urls::create("keys").await?;
    let old = urls.sign("").await?;
    let state = async |key: &str| -> Result<String> {
        let query = "select state from tollgate.url_keys where key_id = $1";
        Ok(urls.boss.query_one(query, &[&key]).await?.get(0))
    };
    let next: String = value(&urls.boss, "select tollgate.rotate_url_key()").await?;
    assert_eq!((state(&urls.key_id).await?, state(&next).await?), ("signing".into(), "published".into()));
    assert!(
        urls.sign("").await?.contains(&urls.key_id),
        "servers at the edge have a day to get the next one"
    );
    let pass = "update tollgate.sealed_keys set signs_from = signs_from - $1::text::interval,
        retires_at = retires_at - $1::text::interval, verifies_until = verifies_until - $1::text::interval";
    urls.db.owner.execute(pass, &[&"24 hours"]).await?;
    assert_eq!((state(&urls.key_id).await?, state(&next).await?), ("retiring".into(), "signing".into()));
    let new = urls.sign("").await?;
    assert!(new.contains(&next));
    for url in [&old, &new] {
        assert_eq!(urls.code(url).await?, "VALID");
    }
    // The longest that a URL may live.
    urls.db.owner.execute(pass, &[&"366 days"]).await?;
    assert_eq!(urls.code(&old).await?, "VALID");
    urls.db.owner.execute(pass, &[&"1 day"]).await?;
    assert_eq!(urls.code(&old).await?, "UNKNOWN_KEY");
    assert_eq!(state(&urls.key_id).await?, "gone");

    let third: String = value(&urls.boss, "select tollgate.rotate_url_key('default', '2 days')").await?;
    let withdraw = "select tollgate.withdraw_url_key($1, 'leaked')";
    assert!(urls.boss.query_one(withdraw, &[&next]).await?.get::<_, bool>(0));
    assert!(!urls.boss.query_one(withdraw, &[&next]).await?.get::<_, bool>(0));
    assert_eq!(urls.code(&new).await?, "UNKNOWN_KEY");
    assert_eq!(state(&third).await?, "signing", "the next one takes over at once");
    assert_eq!(urls.code(&urls.sign("").await?).await?, "VALID");
    // Only keys for URLs are withdrawn as such.
    let signing: String = value(&urls.boss, "select tollgate.create_signing_key()").await?;
    assert!(!urls.boss.query_one(withdraw, &[&signing]).await?.get::<_, bool>(0));
    urls.boss.query_one(withdraw, &[&third]).await?;
    refused(
        urls.backend.query_one("select tollgate.sign_url('https://h/')", &[]).await,
        &SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE,
    );
    urls.boss.execute("select tollgate.create_url_key()", &[]).await?;
    urls.sign("").await?;
    refused(urls.boss.execute("select tollgate.create_url_key()", &[]).await, &SqlState::DUPLICATE_OBJECT);
    refused(urls.boss.execute("select tollgate.rotate_url_key('x')", &[]).await, &SqlState::UNDEFINED_OBJECT);
    for name in ["''", "null", "'A'", "'a b'", "'-a'", "repeat('a', 64)", "'a:b'"] {
        let create = format!("select tollgate.create_url_key({name})");
        refused(urls.boss.execute(&create, &[]).await, &SqlState::INVALID_PARAMETER_VALUE);
    }
    // A dump has keys that a check can open, each of its kind.
    let health =
        "select count(*) from tollgate.deployment_health() where aspect = 'keys' and severity = 'fail'";
    assert_eq!(value::<i64>(&urls.db.owner, health).await?, 0);
    Ok(())
}

#[tokio::test]
async fn an_exported_key_signs_and_verifies_elsewhere_and_leaves_an_event() -> Result<()> {
    let urls = Urls::create("exported").await?;
    let export = "select tollgate.export_url_key($1)";
    for client in [&urls.db.web, &urls.backend, &urls.db.operator] {
        refused(client.query_one(export, &[&urls.key_id]).await, &SqlState::INSUFFICIENT_PRIVILEGE);
    }
    let exported: String = urls.boss.query_one(export, &[&urls.key_id]).await?.get(0);
    let key = Key::from_bytes(&URL_SAFE_NO_PAD.decode(exported)?).context("32 bytes")?;
    assert_eq!(key.kid(), urls.key_id);
    let url = urls.sign("").await?;
    assert!(SignedUrl::parse(&url)?.is_signed_by(&key));
    let event = "select detail from tollgate.audit_log where event = 'key.exported' and actor = 'boss'";
    let detail: Value = value(&urls.db.owner, event).await?;
    assert_eq!(detail, json!({ "kid": urls.key_id, "purpose": "signed_url:default" }));
    urls.boss.batch_execute("begin").await?;
    urls.boss.query_one(export, &[&urls.key_id]).await?;
    urls.boss.batch_execute("rollback").await?;
    let line = format!("the key {} for URLs is exported, by boss", urls.key_id);
    assert_eq!(urls.db.cluster.log().matches(&line).count(), 2, "a rollback does not undo the log");
    let signing: String = value(&urls.boss, "select tollgate.create_signing_key()").await?;
    urls.boss.query_one("select tollgate.withdraw_url_key($1)", &[&urls.key_id]).await?;
    for none in [signing.as_str(), &urls.key_id, "x"] {
        refused(urls.boss.query_one(export, &[&none]).await, &SqlState::UNDEFINED_OBJECT);
    }
    Ok(())
}

#[tokio::test]
async fn without_the_master_key_nothing_is_signed_and_nothing_is_taken_for_good() -> Result<()> {
    let mut cluster = common::start(Cluster::builder())?;
    let owner = cluster.connect("postgres", DATABASE).await?;
    owner.execute("select tollgate.create_url_key()", &[]).await?;
    let url = sign(&owner, VIDEO, "").await?;
    cluster.configure("tollgate.master_key_file", "")?;
    let error = "select count(*) from tollgate.list_master_keys() where loaded";
    eventually_async(LONG, "the master key to be gone", async || {
        value::<i64>(&owner, error).await.is_ok_and(|loaded| loaded == 0)
    })
    .await;
    for call in ["sign_url('https://h/')", "create_url_key('other')"] {
        let call = format!("select tollgate.{call}");
        refused(owner.execute(&call, &[]).await, &SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE);
    }
    refused(verify(&owner, &url, "").await, &SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE);
    Ok(())
}

#[tokio::test]
async fn arguments_that_cannot_be_meant_are_refused_by_name() -> Result<()> {
    let urls = Urls::create("arguments").await?;
    for (arguments, name) in [
        ("null", "url"),
        ("'/videos/7'", "url"),
        ("'https://h/../a'", "url"),
        ("'https://h/?tgu_sig=x'", "url"),
        ("'https://h/', '0'", "expires_in"),
        ("'https://h/', '-1 hour'", "expires_in"),
        ("'https://h/', '367 days'", "expires_in"),
        ("'https://h/', expires_at => now() - interval '1 second'", "expires_at"),
        ("'https://h/', expires_at => 'infinity'", "expires_at"),
        ("'https://h/', expires_at => '-infinity'", "expires_at"),
        ("'https://h/', '1 hour', now() + interval '1 hour'", "expires_at"),
        ("'https://h/', not_before => now() + interval '2 hours'", "not_before"),
        ("'https://h/', not_before => 'infinity'", "not_before"),
        ("'https://h/', not_before => '-infinity'", "not_before"),
        ("'https://h/', methods => null", "methods"),
        ("'https://h/', methods => '{}'", "methods"),
        ("'https://h/', methods => '{get}'", "methods"),
        ("'https://h/', methods => '{{GET},{PUT}}'", "methods"),
        ("'https://h/', methods => '{GET,null}'", "methods"),
        ("'https://h/a', path_prefix => '/a'", "path_prefix"),
        ("'https://h/ab', path_prefix => '/a/'", "path_prefix"),
        ("'https://h/', subject => ''", "subject"),
        ("'https://h/', response_headers => '[]'", "response_headers"),
        ("'https://h/', response_headers => '{\"a\": 1}'", "response_headers"),
        ("'https://h/', response_headers => '{\"a\": \"x\\r\\nb: y\"}'", "response_headers"),
        ("'https://h/', key => null", "key"),
        ("'https://h/', key => 'A'", "key"),
    ] {
        let call = format!("select tollgate.sign_url({arguments})");
        let error = refused(urls.backend.execute(&call, &[]).await, &SqlState::INVALID_PARAMETER_VALUE);
        let detail = error.detail().unwrap_or_default();
        assert!(detail.starts_with(&format!("Argument: {name}")), "{call}: {detail}");
    }
    refused(
        urls.backend.execute("select tollgate.sign_url('https://h/', key => 'other')", &[]).await,
        &SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE,
    );
    refused(
        urls.db.web.execute("select tollgate.sign_url('https://h/')", &[]).await,
        &SqlState::INSUFFICIENT_PRIVILEGE,
    );
    Ok(())
}

// ---- One use

#[tokio::test]
async fn a_url_for_one_use_is_used_once_and_not_by_a_transaction_that_is_rolled_back() -> Result<()> {
    let urls = Urls::create("once").await?;
    let once = ", single_use => true";
    let (first, second) = (urls.sign(once).await?, urls.sign(once).await?);
    assert_ne!(first, second, "two of the same second are two");
    assert_eq!(code_of(&urls.db.web, &first, ", 'POST'").await?, "METHOD_NOT_ALLOWED");
    let row = verify(&urls.db.web, &first, "").await?;
    assert_eq!(
        (&row["code"], &row["single_use"]),
        (&json!("VALID"), &json!(true)),
        "what was refused was no use"
    );
    for client in [&urls.db.web, &urls.db.session("web").await?, &urls.backend] {
        assert_eq!(code(client, &first).await?, "ALREADY_USED");
    }
    let web = &urls.db.web;
    for (begin, end) in [("begin", "rollback"), ("begin; savepoint a", "rollback to a; commit")] {
        web.batch_execute(begin).await?;
        assert_eq!(code(web, &second).await?, "VALID");
        assert_eq!(code(web, &second).await?, "ALREADY_USED");
        web.batch_execute(end).await?;
    }
    refused(
        async {
            web.batch_execute("begin read only").await?;
            verify(web, &second, "").await
        }
        .await,
        &SqlState::READ_ONLY_SQL_TRANSACTION,
    );
    web.batch_execute("rollback; begin read only").await?;
    assert_eq!(code(web, &first).await?, "ALREADY_USED", "that needs no write");
    web.batch_execute("rollback; begin isolation level repeatable read; select 1 from pg_class limit 1")
        .await?;
    assert_eq!(code(&urls.backend, &second).await?, "VALID");
    assert_eq!(code(web, &second).await?, "ALREADY_USED", "also where the snapshot does not show it");
    web.batch_execute("rollback").await?;
    Ok(())
}

#[tokio::test]
async fn a_gateway_uses_nothing_in_a_transaction_block() -> Result<()> {
    let urls = Urls::create("gateway").await?;
    // The capability does not exist yet.
    urls.db
        .owner
        .batch_execute(
            "do $$ begin create role entrance login; exception when duplicate_object or unique_violation then end $$;
             alter table tollgate.capabilities drop constraint capabilities_capability_check;
             insert into tollgate.capabilities (role, capability, granted_at) values ('entrance', 'gateway', now());
             grant execute on function tollgate.verify_signed_url to entrance",
        )
        .await?;
    let entrance = urls.db.session("entrance").await?;
    let (once, often) = (urls.sign(", single_use => true").await?, urls.sign("").await?);
    entrance.batch_execute("begin").await?;
    assert_eq!(code(&entrance, &often).await?, "VALID", "of which nothing is used up");
    refused(verify(&entrance, &once, "").await, &SqlState::ACTIVE_SQL_TRANSACTION);
    entrance.batch_execute("rollback").await?;
    assert_eq!(code(&entrance, &once).await?, "VALID");
    Ok(())
}

#[tokio::test]
async fn of_two_requests_at_once_one_uses_it() -> Result<()> {
    let urls = Urls::create("at_once").await?;
    let url = urls.sign(", single_use => true").await?;
    for (end, expected) in [("rollback", "VALID"), ("commit", "ALREADY_USED")] {
        let url = match end {
            "commit" => urls.sign(", single_use => true").await?,
            _ => url.clone(),
        };
        let web = &urls.db.web;
        web.batch_execute("begin").await?;
        assert_eq!(code(web, &url).await?, "VALID");
        let other = urls.db.session("web").await?;
        let waiting = tokio::spawn(async move { code(&other, &url).await });
        wait_until_blocked(web).await?;
        web.batch_execute(end).await?;
        assert_eq!(waiting.await??, expected, "after a {end}");
    }
    Ok(())
}

#[tokio::test]
async fn a_use_outlives_a_crash_and_standbys_verify_but_use_nothing() -> Result<()> {
    let mut cluster = common::start(Cluster::builder())?;
    let owner = cluster.connect("postgres", DATABASE).await?;
    owner.execute("select tollgate.create_url_key()", &[]).await?;
    let once = ", single_use => true";
    let (url, used, unused) =
        (sign(&owner, VIDEO, "").await?, sign(&owner, VIDEO, once).await?, sign(&owner, VIDEO, once).await?);
    assert_eq!(code(&owner, &used).await?, "VALID");
    let standby = cluster.standby()?;
    standby.catch_up_with(&cluster)?;
    let there = standby.connect("postgres", DATABASE).await?;
    assert_eq!(code(&there, &url).await?, "VALID");
    assert_eq!(code(&there, &used).await?, "ALREADY_USED");
    refused(verify(&there, &unused, "").await, &SqlState::READ_ONLY_SQL_TRANSACTION);
    assert!(sign(&there, VIDEO, "").await?.contains("tgu_sig="), "signing writes nothing");
    cluster.crash()?;
    cluster.restart()?;
    let owner = cluster.connect("postgres", DATABASE).await?;
    assert_eq!(code(&owner, &used).await?, "ALREADY_USED");
    assert_eq!(code(&owner, &unused).await?, "VALID");
    Ok(())
}

#[tokio::test]
async fn the_daemon_deletes_uses_a_day_after_their_urls_ended() -> Result<()> {
    let urls = Urls::create("purged").await?;
    for _ in 0..3 {
        assert_eq!(urls.code(&urls.sign(", single_use => true").await?).await?, "VALID");
    }
    let purge = "select tollgate.purge_used_urls(1000)";
    assert_eq!(value::<i64>(&urls.db.operator, purge).await?, 0);
    // Two are over for longer than a day.
    urls.db
        .owner
        .batch_execute(
            "update tollgate.used_urls set expires_at = now() - interval '25 hours'
                 where id in (select id from tollgate.used_urls order by id limit 2)",
        )
        .await?;
    let (daemon, _) = web::run(&urls.db.url(), &["--purge-interval=100ms"]).await?;
    eventually_async(LONG, "the daemon to purge", async || {
        let left = "select count(*) from tollgate.used_urls";
        value::<i64>(&urls.db.owner, left).await.is_ok_and(|left| left == 1)
    })
    .await;
    drop(daemon);
    let none = urls.db.operator.execute("select tollgate.purge_used_urls(0)", &[]).await;
    refused(none, &SqlState::INVALID_PARAMETER_VALUE);
    Ok(())
}

// ---- The command line

#[tokio::test]
async fn keys_for_urls_are_managed_from_the_command_line() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "url_commands").await?;
    let url = db.cluster.url("postgres", &db.name);
    assert!(printed(&url, &["url-key", "list"], OK).contains("there are no keys for URLs"));
    let first = printed(&url, &["url-key", "create", "downloads"], OK).trim().to_owned();
    assert!(failure(&url, &["url-key", "create", "downloads"], NO).contains("rotate_url_key"));
    let second = json_of(&url, &["url-key", "rotate", "downloads", "--signs-in", "0s"], OK)["key_id"].clone();
    let listed = json_of(&url, &["url-key", "list"], OK);
    assert_eq!((&listed[0]["key_id"], &listed[0]["state"]), (&second, &json!("signing")));
    assert_eq!((&listed[1]["key_id"], &listed[1]["state"]), (&json!(first), &json!("retiring")));
    let exported = printed(&url, &["url-key", "export", &first], OK);
    assert_eq!(URL_SAFE_NO_PAD.decode(exported.trim())?.len(), 32);
    assert_eq!(json_of(&url, &["url-key", "withdraw", &first, "--reason", "a test"], OK)["withdrawn"], true);
    assert_eq!(json_of(&url, &["url-key", "withdraw", &first], NO)["withdrawn"], false);
    Ok(())
}

// ---- Verifiers without the database

fn scripts() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../contrib/signed-urls")
}

fn vectors() -> Result<Value> {
    Ok(serde_json::from_str(&fs::read_to_string(scripts().join("vectors.json"))?)?)
}

/// Runs a program that is given the vectors and writes the name and the code of each, one a line: the shell of njs cuts longer
/// lines off.
fn codes(command: &mut Command, vectors: &Value) -> Result<BTreeMap<String, String>> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {command:?}"))?;
    child.stdin.take().context("piped")?.write_all(vectors.to_string().as_bytes())?;
    let output = child.wait_with_output()?;
    ensure!(output.status.success(), "{command:?}: {}", output.status);
    Ok(serde_json::Deserializer::from_slice(&output.stdout)
        .into_iter::<(String, String)>()
        .collect::<Result<_, _>>()?)
}

#[track_caller]
fn assert_passed(found: &BTreeMap<String, String>, vectors: &Value) {
    let all = vectors["vectors"].as_array().map(Vec::as_slice).unwrap_or_default();
    assert!(all.len() >= 40 && found.len() == all.len());
    for vector in all {
        let name = vector["name"].as_str().unwrap_or_default();
        assert_eq!(Some(found[name].as_str()), vector["code"].as_str(), "{name}");
    }
}

const PYTHON: &str = "
import json, sys
from verify import verify
given = json.load(sys.stdin)
for v in given['vectors']:
    code, _ = verify(v['url'], v['method'], v.get('client_ip'), v['now'], given['keys'])
    print(json.dumps([v['name'], code]))
";

const NODE: &str = "
import fs from 'fs'
import urls from './verify.mjs'
const given = JSON.parse(fs.readFileSync(0))
const run = (v) => urls.verify(v.url, v.method, v.client_ip, v.now, given.keys).code
given.vectors.forEach((v) => console.log(JSON.stringify([v.name, run(v)])))
";

#[test]
fn the_scripts_for_python_and_node_pass_every_vector() -> Result<()> {
    let vectors = vectors()?;
    let mut python = Command::new(fetched("python")?.join("bin/python"));
    python.args(["-B", "-c", PYTHON]).current_dir(scripts());
    assert_passed(&codes(&mut python, &vectors)?, &vectors);

    let directory = tempfile::tempdir()?;
    fs::copy(scripts().join("verify.mjs"), directory.path().join("verify.mjs"))?;
    fs::write(directory.path().join("run.mjs"), NODE)?;
    let mut node = Command::new(fetched("node")?.join("node"));
    node.arg("run.mjs").current_dir(&directory);
    assert_passed(&codes(&mut node, &vectors)?, &vectors);
    Ok(())
}

/// The shell of njs reads no standard input, and so gets the vectors as a module.
const NJS: &str = "
import given from 'given.mjs'
import urls from 'verify.mjs'
const run = (v) => urls.verify(v.url, v.method, v.client_ip, v.now, given.keys).code
given.vectors.forEach((v) => console.log(JSON.stringify([v.name, run(v)])))
";

/// A process that ends with its test.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What is below /videos/ is served by its signed URL alone.
fn nginx_conf(directory: &Path, port: u16, modules: &Path) -> String {
    let directory = directory.display();
    format!(
        "load_module {modules}/ngx_http_js_module.so;
         daemon off; master_process off; pid {directory}/pid; error_log stderr;
         events {{}}
         http {{
             access_log off;
             client_body_temp_path {directory}/1; proxy_temp_path {directory}/2; fastcgi_temp_path {directory}/3;
             uwsgi_temp_path {directory}/4; scgi_temp_path {directory}/5;
             js_path {directory};
             js_import signed from nginx.js;
             js_set $signed_url signed.code;
             server {{
                 listen 127.0.0.1:{port};
                 location /videos/ {{
                     if ($signed_url != VALID) {{ return 403 $signed_url; }}
                     js_header_filter signed.pin;
                     root {directory};
                 }}
             }}
         }}",
        modules = modules.display()
    )
}

#[tokio::test]
#[ignore = "long: needs nginx and njs, which `make drivers-long` fetches"]
async fn the_script_for_njs_passes_every_vector_and_guards_a_folder_of_nginx() -> Result<()> {
    let (njs, vectors) = (fetched("njs")?, vectors()?);
    let directory = tempfile::tempdir()?;
    for script in ["verify.mjs", "nginx.js"] {
        fs::copy(scripts().join(script), directory.path().join(script))?;
    }
    fs::write(directory.path().join("given.mjs"), format!("export default {vectors}"))?;
    fs::write(directory.path().join("run.js"), NJS)?;
    let libraries = njs.join("usr/lib/x86_64-linux-gnu");
    let mut shell = Command::new(njs.join("usr/bin/njs"));
    shell.env("LD_LIBRARY_PATH", &libraries).arg("run.js").current_dir(&directory);
    assert_passed(&codes(&mut shell, &vectors)?, &vectors);

    let key = Key::new(&[7; 32]);
    fs::write(
        directory.path().join("url-keys.mjs"),
        format!("export default {{ '{}': '{}' }}", key.kid(), *key.to_text()),
    )?;
    fs::create_dir(directory.path().join("videos"))?;
    fs::write(directory.path().join("videos/a.ts"), "a segment")?;
    let port = Port::any()?;
    let conf = directory.path().join("nginx.conf");
    fs::write(&conf, nginx_conf(directory.path(), port.number, &njs.join("usr/lib/nginx/modules")))?;
    let _nginx = Ended(
        Command::new(njs.join("usr/sbin/nginx"))
            .env("LD_LIBRARY_PATH", &libraries)
            .args(["-e", "stderr", "-c"])
            .arg(&conf)
            .spawn()?,
    );
    let address: std::net::SocketAddr = format!("127.0.0.1:{}", port.number).parse()?;
    eventually_async(LONG, "nginx to listen", async || {
        web::begin(address, &web::request("/", &[])).await.is_ok()
    })
    .await;
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs();
    let options = url::Options {
        expires_at: i64::try_from(now)? + 600,
        methods: &["GET"],
        path_prefix: Some("/videos/"),
        response_headers: Some(r#"{"Content-Disposition": "attachment"}"#),
        ..url::Options::default()
    };
    let host = format!("Host: media.example.com:{}", port.number);
    let signed = |options: &url::Options<'_>| {
        let given = format!("http://media.example.com:{}/videos/a.ts", port.number);
        url::sign(&key, &given, options).map_err(|unfit| anyhow::anyhow!("{unfit:?}"))
    };
    let link = signed(&options)?;
    let over = signed(&url::Options { expires_at: i64::try_from(now)? - 1, ..options })?;
    for (url, status) in [
        (link.clone(), 200),
        (over, 403),
        (link.replace("a.ts", "b.ts"), 404),
        // nginx resolves this to the file that was signed.
        (link.replace("a.ts", "..%2fvideos/a.ts"), 403),
        (format!("{link}&a=1"), 403),
        ("http://media.example.com/videos/a.ts".to_owned(), 403),
    ] {
        let path = url.splitn(4, '/').nth(3).unwrap_or_default();
        let (answer, _) = web::begin(address, &web::request(&format!("/{path}"), &[&host])).await?;
        assert_eq!(answer.status, status, "{url}");
        if status == 200 {
            assert_eq!(answer.headers["content-disposition"], "attachment");
        }
    }
    // By this request line nginx chooses the server of another host.
    let elsewhere = link.replace("media.example.com", "other.example.com");
    let (answer, _) = web::begin(address, &web::request(&elsewhere, &[&host])).await?;
    assert_eq!(answer.status, 403);
    Ok(())
}
