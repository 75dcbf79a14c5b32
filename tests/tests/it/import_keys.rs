//! Tokens that another system stored by HMAC with a secret key of its own.

use crate::commands::{LONG, NO, OK, failure, json_of, printed};
use crate::common::{self, Shared, code, history, refused, value};
use crate::operator::Db;
use anyhow::{Context as _, Result};
use serde_json::json;
use tempfile::TempDir;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use tollgate_tests::{Account, Cluster, DATABASE, eventually_async};
use uuid::Uuid;

static SHARED: Shared = Shared::new(&[("tollgate.accept_foreign_tokens", "on")]);

/// By openssl: `printf %s sk_live_ida | openssl dgst -sha256 -hmac 'a pepper'`, and likewise the others.
const IDA: [&str; 2] = ["sk_live_ida", "52c57fe7ec3ce90d8716756d65eb9c86952ff5bc6e1076b5d4b57bd3cb9edefb"];
const JAN: [&str; 2] = ["sk_live_jan", "c5fbf4817ed1919c41b2655259024dae716788f227970424f560ccb3a5e84cdf"];

async fn store(owner: &Client, name: &str, key: &str) -> Result<(), tokio_postgres::Error> {
    let call = "select tollgate.store_import_key($1, convert_to($2, 'UTF8'))";
    owner.execute(call, &[&name, &key]).await.map(drop)
}

async fn import(owner: &Client, digest: &str, key: &str) -> Result<Uuid, tokio_postgres::Error> {
    let call = "select tollgate.import_api_token('ida', 'old', decode($1, 'hex'), '{posts:read}', format => 'hmac-sha256:' || $2)";
    Ok(owner.query_one(call, &[&digest, &key]).await?.get(0))
}

/// Records what verifications found, as the daemon does.
async fn record(owner: &Client) -> Result<()> {
    for _ in 0..2 {
        owner.batch_execute("select tollgate.apply_findings()").await?;
    }
    Ok(())
}

async fn waiting(owner: &Client, id: Uuid) -> Result<Option<String>> {
    let call = "select foreign_format from tollgate.api_tokens where id = $1";
    Ok(owner.query_one(call, &[&id]).await?.get(0))
}

#[tokio::test]
async fn a_token_is_found_by_the_other_systems_key_and_by_its_own_digest_from_its_first_use_on() -> Result<()>
{
    let db = Db::create(&SHARED.cluster()?, "hmac").await?;
    let owner = &db.owner;
    store(owner, "app", "a pepper").await?;
    store(owner, "other", "another pepper").await?;
    let id = import(owner, IDA[1], "app").await?;
    assert_eq!(waiting(owner, id).await?.as_deref(), Some("hmac-sha256:app"));
    assert_eq!(value::<i64>(owner, "select count(*) from tollgate.import_keys where is_needed").await?, 1);

    // In a read-only transaction of an ordinary role; nothing near it is accepted.
    for wrong in [&IDA[0][1..], "sk_live_ida ", IDA[1], JAN[0]] {
        assert_eq!(code(&db.web, wrong).await?, "NOT_FOUND", "{wrong}");
    }
    db.web.batch_execute("begin read only").await?;
    assert_eq!(code(&db.web, IDA[0]).await?, "VALID");
    db.web.batch_execute("commit").await?;
    record(owner).await?;
    assert_eq!(waiting(owner, id).await?, None);
    let ours: bool = owner
        .query_one(
            "select token_hash = sha256(convert_to($1, 'UTF8')) from tollgate.api_tokens where id = $2",
            &[&IDA[0], &id],
        )
        .await?
        .get(0);
    assert!(ours);

    // From then on without the key, which no token needs any more.
    owner.batch_execute("select tollgate.drop_import_key('app')").await?;
    assert_eq!(code(&db.web, IDA[0]).await?, "VALID");
    refused(import(owner, IDA[1], "app").await, &SqlState::UNDEFINED_OBJECT);
    store(owner, "app", "a pepper").await?;
    refused(import(owner, IDA[1], "app").await, &SqlState::UNIQUE_VIOLATION);

    // With the key of another system it is another token, which what is presented does not lead to.
    import(owner, JAN[1], "other").await?;
    assert_eq!(code(&db.web, JAN[0]).await?, "NOT_FOUND");
    assert_eq!(history(owner, id).await?[0].1["format"], "hmac-sha256:app");
    Ok(())
}

#[tokio::test]
async fn a_token_that_waits_for_its_first_use_is_ended_by_presenting_it() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "hmac_leak").await?;
    store(&db.owner, "app", "a pepper").await?;
    import(&db.owner, IDA[1], "app").await?;
    let end = "select tollgate.revoke_presented_token($1, 'found it')";
    assert!(db.owner.query_one(end, &[&IDA[0]]).await?.get::<_, bool>(0));
    assert_eq!(code(&db.web, IDA[0]).await?, "REVOKED");
    db.owner.batch_execute("select tollgate.drop_import_key('app')").await?;
    Ok(())
}

#[tokio::test]
async fn a_key_is_kept_while_a_token_needs_it_also_one_that_is_being_imported() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "hmac_drop").await?;
    let owner = &db.owner;
    store(owner, "app", "a pepper").await?;
    let importer = db.cluster.connect("postgres", &db.name).await?;
    importer.batch_execute("begin").await?;
    let id = import(&importer, IDA[1], "app").await?;
    let dropper = db.cluster.connect("postgres", &db.name).await?;
    let drop_it = "select tollgate.drop_import_key('app')";
    let (dropped, committed) = tokio::join!(dropper.batch_execute(drop_it), async {
        let blocked = "select count(*) from pg_locks where not granted and database = (select oid from pg_database where datname = current_database())
                       or not granted and locktype = 'transactionid'";
        eventually_async(LONG, "the import to be waited for", async || {
            value::<i64>(owner, blocked).await.is_ok_and(|blocked| blocked > 0)
        })
        .await;
        importer.batch_execute("commit").await
    });
    committed?;
    refused(dropped, &SqlState::from_code("2BP01"));
    assert_eq!(code(&db.web, IDA[0]).await?, "VALID");
    assert!(common::revoke(owner, id).await?);
    dropper.batch_execute(drop_it).await?;
    // As one of several kinds, it has none of the ways of a signing key.
    store(owner, "app", "a pepper").await?;
    let kid: String =
        value(owner, "select kid from tollgate.sealed_keys where purpose = 'token_import:app'").await?;
    for withdraw in ["withdraw_signing_key", "withdraw_url_key"] {
        let call = format!("select tollgate.{withdraw}('{kid}')");
        assert!(!value::<bool>(owner, &call).await?, "{withdraw}");
    }
    let listed = "select count(*) from tollgate.signing_keys where purpose like 'token_import%'";
    assert_eq!(value::<i64>(owner, listed).await?, 0);
    Ok(())
}

#[tokio::test]
async fn a_key_is_stored_within_its_limits_and_no_error_or_row_shows_it() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "hmac_limits").await?;
    let owner = &db.owner;
    for (name, key, argument) in [
        ("null", "'a'::bytea", "name"),
        ("'App'", "'a'", "name"),
        ("''", "'a'", "name"),
        ("'a:b'", "'a'", "name"),
        ("repeat('a', 64)", "'a'", "name"),
        ("'app'", "null", "key"),
        ("'app'", "''", "key"),
        ("'app'", "convert_to(repeat('pepper', 200), 'UTF8')", "key"),
    ] {
        let call = format!("select tollgate.store_import_key({name}, {key})");
        let error = refused(owner.batch_execute(&call).await, &SqlState::INVALID_PARAMETER_VALUE);
        assert!(
            error.detail().is_some_and(|detail| detail.starts_with(&format!("Argument: {argument}"))),
            "{call}: {error:?}"
        );
        assert!(!format!("{error:?}").contains("pepper"), "{error:?}");
    }
    for n in 0..8 {
        store(owner, &format!("k{n}"), "the pepper").await?;
    }
    store(owner, "k0", "the pepper").await?;
    refused(store(owner, "k8", "the pepper").await, &SqlState::PROGRAM_LIMIT_EXCEEDED);
    refused(
        owner.batch_execute("select tollgate.drop_import_key('none')").await,
        &SqlState::UNDEFINED_OBJECT,
    );
    // The same key twice looks like two: a guess cannot be compared with anything.
    let different = "select count(distinct kid) = 8 and count(distinct sealed) = 8 from tollgate.sealed_keys";
    assert!(value::<bool>(owner, different).await?);
    let shown = "select count(*) from tollgate.audit_log a where a::text like '%pepper%' or a::text like '%' || encode('the pepper', 'hex') || '%'";
    assert_eq!(value::<i64>(owner, shown).await?, 0);
    Ok(())
}

#[tokio::test]
async fn without_the_master_key_tokens_that_wait_are_refused_and_it_is_said_why() -> Result<()> {
    let mut cluster = common::start(Cluster::builder().setting("tollgate.accept_foreign_tokens", "on"))?;
    let owner = cluster.connect("postgres", DATABASE).await?;
    store(&owner, "app", "a pepper").await?;
    import(&owner, IDA[1], "app").await?;
    import(&owner, JAN[1], "app").await?;
    let plain = "select tollgate.import_api_token('ida', 'old', sha512('plain'), format => 'sha512')";
    owner.batch_execute(plain).await?;
    let web = cluster.connect("postgres", DATABASE).await?;
    assert_eq!(code(&web, IDA[0]).await?, "VALID");
    record(&owner).await?;

    let dump = cluster.program("pg_dump").output()?;
    anyhow::ensure!(dump.status.success(), "{}", String::from_utf8_lossy(&dump.stderr));
    let dump = String::from_utf8_lossy(&dump.stdout).into_owned();
    for trace in ["a pepper", "612070657070657"] {
        assert!(!dump.contains(trace), "{trace}");
    }

    cluster.configure("tollgate.master_key_file", "")?;
    let loaded = "select count(*) from tollgate.list_master_keys() where loaded";
    eventually_async(LONG, "the master key to be gone", async || {
        value::<i64>(&owner, loaded).await.is_ok_and(|loaded| loaded == 0)
    })
    .await;
    // Also in a session that had opened the key.
    for _ in 0..3 {
        assert_eq!(code(&web, JAN[0]).await?, "NOT_FOUND");
        assert_eq!(code(&owner, JAN[0]).await?, "NOT_FOUND");
    }
    for good in [IDA[0], "plain"] {
        assert_eq!(code(&web, good).await?, "VALID", "{good}");
    }
    let log = cluster.log();
    let said: Vec<&str> =
        log.lines().filter(|line| line.contains("imported with the key app are refused")).collect();
    assert_eq!(said.len(), 1, "{said:?}");
    assert!(said[0].contains("no master key"), "{said:?}");
    for secret in [JAN[0], "a pepper"] {
        let lines: Vec<&str> = log.lines().filter(|line| line.contains(secret)).collect();
        assert!(lines.iter().all(|line| !line.contains("imported with")), "{lines:?}");
    }
    let finding = "select h.severity, h.detail from tollgate.deployment_health() h where h.aspect = 'keys' and h.detail like '%app%'";
    let finding = owner.query_one(finding, &[]).await?;
    assert_eq!(finding.get::<_, &str>(0), "fail");
    refused(store(&owner, "more", "pepper").await, &SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE);

    let file = cluster.master_key_file().display().to_string();
    cluster.configure("tollgate.master_key_file", &file)?;
    eventually_async(LONG, "the token to be found again", async || {
        code(&web, JAN[0]).await.is_ok_and(|code| code == "VALID")
    })
    .await;
    Ok(())
}

#[tokio::test]
async fn a_key_that_was_tampered_with_finds_nothing_and_can_be_stored_again() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "hmac_tampered").await?;
    let owner = &db.owner;
    store(owner, "app", "a pepper").await?;
    store(owner, "other", "another pepper").await?;
    import(owner, IDA[1], "app").await?;
    owner
        .batch_execute(
            "update tollgate.sealed_keys set sealed = (select sealed from tollgate.sealed_keys where purpose = 'token_import:other')
             where purpose = 'token_import:app'",
        )
        .await?;
    assert_eq!(code(&db.web, IDA[0]).await?, "NOT_FOUND");
    let finding =
        "select h.detail from tollgate.deployment_health() h where h.aspect = 'keys' and h.severity = 'fail'";
    assert!(value::<String>(owner, finding).await?.contains("import key app does not open"));
    store(owner, "app", "a pepper").await?;
    assert_eq!(code(&db.web, IDA[0]).await?, "VALID");
    Ok(())
}

#[tokio::test]
async fn keys_are_stored_and_files_imported_with_them_from_the_command_line() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "hmac_commands").await?;
    let url = db.cluster.url("postgres", &db.name);
    let directory = TempDir::new()?;
    let account = Account::unprivileged()?;
    account.own(directory.path())?;
    let file = |name: &str, text: &str| -> Result<String> {
        let path = directory.path().join(name);
        std::fs::write(&path, text)?;
        account.own(&path)?;
        Ok(path.to_str().context("a name")?.to_owned())
    };
    assert!(printed(&url, &["import-key", "list"], OK).contains("there are no import keys"));
    let hex = file("key.hex", "6120706570706572\n")?;
    assert_eq!(
        json_of(&url, &["import-key", "store", "app", &hex, "--encoding", "hex"], OK)["stored"],
        "app"
    );
    let csv = format!("user_id,name,token_hash\nida,old,{}\nida,short,00\n", IDA[1]);
    let csv = file("tokens.csv", &csv)?;
    let report = json_of(&url, &["token", "import", &csv, "--token-format", "hmac-sha256:app"], NO);
    assert_eq!((&report["imported"], &report["refused"][0]["line"]), (&json!(1), &json!(3)), "{report}");
    assert_eq!(code(&db.web, IDA[0]).await?, "VALID");
    let listed = json_of(&url, &["import-key", "list"], OK);
    assert_eq!(
        (&listed[0]["name"], &listed[0]["is_needed"], &listed[0]["can_open"]),
        (&json!("app"), &json!(true), &json!(true))
    );
    assert!(failure(&url, &["import-key", "drop", "app"], NO).contains("tokens need it"));
    record(&db.owner).await?;
    assert_eq!(json_of(&url, &["import-key", "drop", "app"], OK)["dropped"], "app");
    let without_key = failure(&url, &["token", "import", &csv, "--token-format", "hmac-sha256:app"], NO);
    assert!(without_key.contains("no import key app"), "{without_key}");
    Ok(())
}
