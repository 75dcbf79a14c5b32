//! Signing keys and the master keys that seal them: states, withdrawal, sealing, what a copy of the database is worth
//! without the master key, and who may do what.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::Value;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use tollgate_tests::{Account, Cluster, DATABASE, MASTER_KEY, Tollgated, eventually_async};

use crate::commands::{NO, OK, expect, failure, fed, json_of, printed};
use crate::common::{self, Shared, error, refused, value};
use crate::operator::Db;

static SHARED: Shared = Shared::new(&[]);

const LONG: Duration = Duration::from_secs(30);
const OTHER_MASTER_KEY: &str = "0f1e2d3c4b5a69788796a5b4c3d2e1f0f0e1d2c3b4a5968778695a4b3c2d1e0f";

/// Keys of these tests, which nothing else uses.
const ES256: &str = "-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg30DOsogH4Sfm+jUm
DBQZtkMQjZXI134AX+CSy4Q3NwuhRANCAARbs9Wz5saCVVDRJi3MGaNYJPIhATZ5
9DEw2BPdgx1oOu+QRvx9eeWm7nNV5MBdqdjtnKH1mRI6kidzanp9KJUB
-----END PRIVATE KEY-----
";
const EDDSA: &str = "-----BEGIN PRIVATE KEY-----
MC4CAQAwBQYDK2VwBCIEII7UttGH2B5IdnUrssZw/Lsf7N/ZULHCajBWuwAhRsNJ
-----END PRIVATE KEY-----
";
/// The private number of the first.
const PRIVATE: &str = "df40ceb28807e127e6fa35260c1419b643108d95c8d77e005fe092cb8437370b";

/// Signs and verifies with the key that signs now, and returns its kid.
const SIGN: &str = "select tollgate.test_signing_key()";

async fn create(owner: &Client, arguments: &str) -> Result<String> {
    value(owner, &format!("select tollgate.create_signing_key({arguments})")).await
}

async fn sign(client: &Client) -> Result<String, tokio_postgres::Error> {
    Ok(client.query_one(SIGN, &[]).await?.get(0))
}

async fn state(owner: &Client, kid: &str) -> Result<String> {
    let query = "select state from tollgate.signing_keys where kid = $1";
    Ok(owner.query_one(query, &[&kid]).await?.get(0))
}

/// The kids in the JWKS, in its order.
async fn published(client: &Client) -> Result<Vec<String>> {
    let jwks: Value = value(client, "select tollgate.jwks()").await?;
    let keys = jwks["keys"].as_array().context("an array")?;
    Ok(keys.iter().map(|key| key["kid"].as_str().unwrap_or_default().to_owned()).collect())
}

/// Moves all times of all keys into the past.
async fn pass(owner: &Client, time: &str) -> Result<()> {
    owner
        .batch_execute(&format!(
            "update tollgate.sealed_keys set signs_from = signs_from - interval '{time}',
                 retires_at = retires_at - interval '{time}', verifies_until = verifies_until - interval '{time}'"
        ))
        .await?;
    Ok(())
}

/// The ids of the loaded master keys, by `tollgate.master_key_ids()`, once a reload has had this effect.
async fn eventually_loaded(owner: &Client, what: &str, holds: impl Fn(&[String]) -> bool) {
    eventually_async(LONG, what, async || {
        value::<Vec<String>>(owner, "select tollgate.master_key_ids()").await.is_ok_and(|ids| holds(&ids))
    })
    .await;
}

async fn findings(owner: &Client) -> Result<Vec<(String, String)>> {
    let query = "select severity, detail from tollgate.deployment_health() where aspect = 'keys'";
    Ok(owner.query(query, &[]).await?.iter().map(|row| (row.get(0), row.get(1))).collect())
}

async fn fault(owner: &Client) -> Result<String> {
    Ok(value::<Option<String>>(owner, "select tollgate.master_key_fault()").await?.unwrap_or_default())
}

#[tokio::test]
async fn a_key_is_published_then_signs_then_retires_and_then_is_gone() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "states").await?;
    assert_eq!(published(&db.owner).await?, Vec::<String>::new());
    refused(sign(&db.owner).await, &SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE);

    let first = create(&db.owner, "").await?;
    assert_eq!(sign(&db.owner).await?, first, "the first key signs at once");
    let second = create(&db.owner, "'EdDSA'").await?;
    assert_eq!(
        (state(&db.owner, &first).await?, state(&db.owner, &second).await?),
        ("signing".into(), "published".into())
    );
    assert_eq!(sign(&db.owner).await?, first);
    assert_eq!(published(&db.owner).await?, [&*second, &first], "both are in the JWKS");

    pass(&db.owner, "24 hours").await?;
    assert_eq!(
        (state(&db.owner, &first).await?, state(&db.owner, &second).await?),
        ("retiring".into(), "signing".into())
    );
    assert_eq!(sign(&db.owner).await?, second);
    assert_eq!(
        published(&db.owner).await?,
        [&*second, &first],
        "what the first one signed is still verified"
    );

    pass(&db.owner, "24 hours").await?;
    assert_eq!(state(&db.owner, &first).await?, "gone");
    assert_eq!(published(&db.owner).await?, [&*second]);
    // Its private half is erased by the next change, and the key itself a month later.
    let third: String = value(&db.owner, "select tollgate.rotate_signing_key('0')").await?;
    assert_eq!(sign(&db.owner).await?, third);
    let sealed = "select count(*) from tollgate.sealed_keys where sealed is not null";
    assert_eq!(value::<i64>(&db.owner, sealed).await?, 2);
    let algorithm = "select algorithm from tollgate.signing_keys where state = 'signing'";
    assert_eq!(value::<String>(&db.owner, algorithm).await?, "EdDSA", "rotation keeps the algorithm");
    pass(&db.owner, "31 days").await?;
    create(&db.owner, "'RS256', '0'").await?;
    let kids = "select array_agg(kid) from tollgate.sealed_keys";
    assert!(!value::<Vec<String>>(&db.owner, kids).await?.contains(&first));
    sign(&db.owner).await?;
    Ok(())
}

#[tokio::test]
async fn the_jwks_has_only_public_members() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "members").await?;
    for algorithm in ["ES256", "EdDSA", "RS256"] {
        create(&db.owner, &format!("'{algorithm}', '1 hour'")).await?;
    }
    db.owner.batch_execute("grant execute on function tollgate.jwks to web").await?;
    let jwks: Value = value(&db.web, "select tollgate.jwks()").await?;
    for key in jwks["keys"].as_array().context("an array")? {
        let mut names: Vec<&str> = key.as_object().context("an object")?.keys().map(String::as_str).collect();
        names.sort_unstable();
        let expected: &[&str] = match key["alg"].as_str() {
            Some("ES256") => &["alg", "crv", "kid", "kty", "use", "x", "y"],
            Some("EdDSA") => &["alg", "crv", "kid", "kty", "use", "x"],
            _ => &["alg", "e", "kid", "kty", "n", "use"],
        };
        assert_eq!(names, expected);
        assert_eq!(key["use"], "sig");
    }
    Ok(())
}

#[tokio::test]
async fn a_withdrawn_key_is_refused_by_the_next_use_also_in_an_older_snapshot() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "withdrawn").await?;
    let first = create(&db.owner, "").await?;
    let next = create(&db.owner, "").await?;
    let old = db.session("postgres").await?;
    old.batch_execute("begin isolation level repeatable read").await?;
    assert_eq!(sign(&old).await?, first);
    let withdraw = "select tollgate.withdraw_signing_key($1, 'leaked')";
    assert!(db.owner.query_one(withdraw, &[&first]).await?.get::<_, bool>(0));
    assert_eq!(sign(&old).await?, next, "the next key signs at once");
    assert_eq!(published(&db.owner).await?, [&*next]);
    assert!(!db.owner.query_one(withdraw, &[&first]).await?.get::<_, bool>(0), "a second time");
    assert!(db.owner.query_one(withdraw, &[&next]).await?.get::<_, bool>(0));
    let refusal = refused(sign(&old).await, &SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE);
    assert!(refusal.hint().is_some_and(|hint| hint.contains("create_signing_key")));
    let erased = "select count(*) from tollgate.sealed_keys where sealed is null";
    assert_eq!(value::<i64>(&db.owner, erased).await?, 2, "their private halves are erased");
    let events = "select array_agg(event || coalesce(' ' || (detail->>'reason'), '') order by id)
                  from tollgate.audit_log where event like 'key%'";
    let events: Vec<String> = value(&db.owner, events).await?;
    assert_eq!(events, ["key.created", "key.created", "key.withdrawn leaked", "key.withdrawn leaked"]);
    assert!(!db.owner.query_one(withdraw, &[&"none"]).await?.get::<_, bool>(0));
    Ok(())
}

#[tokio::test]
async fn a_rolled_back_withdrawal_and_creation_change_nothing() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "rolled_back").await?;
    let first = create(&db.owner, "").await?;
    db.owner.batch_execute("begin").await?;
    let second = create(&db.owner, "signs_in => '0'").await?;
    assert_eq!(sign(&db.owner).await?, second, "its own transaction uses it");
    assert_eq!(sign(&db.session("postgres").await?).await?, first);
    db.owner.execute("select tollgate.withdraw_signing_key($1)", &[&second]).await?;
    db.owner.batch_execute("rollback").await?;
    assert_eq!(sign(&db.owner).await?, first);
    Ok(())
}

#[tokio::test]
async fn no_use_fails_while_keys_rotate() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "rotated").await?;
    create(&db.owner, "").await?;
    let (one, other) = (db.session("postgres").await?, db.session("postgres").await?);
    let rotations = async {
        for _ in 0..30 {
            db.owner.execute("select tollgate.rotate_signing_key('0')", &[]).await?;
        }
        Ok::<_, tokio_postgres::Error>(())
    };
    let uses = async |client: &Client| {
        for _ in 0..200 {
            client.query_one(SIGN, &[]).await?;
        }
        Ok::<_, tokio_postgres::Error>(())
    };
    tokio::try_join!(rotations, uses(&one), uses(&other))?;
    Ok(())
}

#[tokio::test]
async fn a_sealed_key_that_was_moved_to_another_row_or_algorithm_does_not_open() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "swapped").await?;
    create(&db.owner, "").await?;
    create(&db.owner, "'EdDSA', '0'").await?;
    create(&db.owner, "'ES256', '0'").await?;
    sign(&db.owner).await?;
    for change in [
        // Of another kid, with the same algorithm and with another one.
        "update tollgate.sealed_keys k set sealed = (select o.sealed from tollgate.sealed_keys o order by o.signs_from limit 1)",
        "update tollgate.sealed_keys k set sealed = (select o.sealed from tollgate.sealed_keys o where o.algorithm = 'EdDSA')
            where k.algorithm = 'ES256'",
        "update tollgate.sealed_keys k set algorithm = 'EdDSA'",
        "update tollgate.sealed_keys k set sealed = set_byte(k.sealed, 40, get_byte(k.sealed, 40) # 1)",
        "update tollgate.sealed_keys k set sealed = ''",
    ] {
        db.owner.batch_execute(&format!("begin; {change}")).await?;
        let refusal = refused(sign(&db.owner).await, &SqlState::DATA_CORRUPTED);
        assert!(refusal.hint().is_some() && refusal.detail().is_some());
        db.owner.batch_execute("rollback").await?;
        sign(&db.owner).await?;
    }
    // A public key in the place of ours is found before anything is handed out.
    let change = "update tollgate.sealed_keys k set public_key = (select o.public_key from tollgate.sealed_keys o where o.algorithm = 'EdDSA')";
    db.owner.batch_execute(change).await?;
    refused(sign(&db.owner).await, &SqlState::DATA_CORRUPTED);
    let found = findings(&db.owner).await?;
    assert!(
        found.iter().any(|(severity, detail)| severity == "fail" && detail.contains("was changed")),
        "{found:?}"
    );
    Ok(())
}

#[tokio::test]
async fn a_private_key_in_pem_is_imported_once_and_a_withdrawn_one_not_again() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "imported").await?;
    let import = "select tollgate.import_signing_key($1, '0')";
    let kid: String = db.owner.query_one(import, &[&ES256]).await?.get(0);
    assert_eq!(sign(&db.owner).await?, kid);
    let other: String = db.owner.query_one(import, &[&EDDSA]).await?.get(0);
    assert_eq!(sign(&db.owner).await?, other);
    assert_eq!(db.owner.query_one(import, &[&ES256]).await?.get::<_, String>(0), kid);
    assert_eq!(sign(&db.owner).await?, other, "a repeated import changes nothing");
    db.owner.execute("select tollgate.withdraw_signing_key($1)", &[&kid]).await?;
    refused(db.owner.query_one(import, &[&ES256]).await, &SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE);
    for wrong in [
        "",
        "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----",
        &ES256.replace("30DOsogH", "30DOsogI"),
        &ES256.replace("PRIVATE", "PUBLIC"),
        &"x".repeat(20_000),
    ] {
        let refusal =
            refused(db.owner.query_one(import, &[&wrong]).await, &SqlState::INVALID_PARAMETER_VALUE);
        let shown = common::text_of(&refusal);
        assert!(!shown.contains("DBQZtkMQ"), "{shown}");
    }
    Ok(())
}

#[tokio::test]
async fn without_a_master_key_public_keys_are_served_and_nothing_is_signed_also_on_a_standby() -> Result<()> {
    let mut cluster = common::start(Cluster::builder())?;
    let owner = cluster.connect("postgres", DATABASE).await?;
    let kid = create(&owner, "").await?;
    let mut standby = cluster.standby()?;
    standby.catch_up_with(&cluster)?;
    let there = standby.connect("postgres", DATABASE).await?;
    assert_eq!(sign(&there).await?, kid, "a standby signs too");
    assert_eq!(sign(&owner).await?, kid);
    for (server, client) in [(&mut cluster, &owner), (&mut standby, &there)] {
        server.configure("tollgate.master_key_file", "")?;
        eventually_loaded(client, "the master key to be gone", <[String]>::is_empty).await;
        let refusal = refused(sign(client).await, &SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE);
        assert!(refusal.hint().is_some_and(|hint| hint.contains("tollgated key init")), "{refusal:?}");
        assert_eq!(published(client).await?, [&*kid]);
    }
    refused(
        owner.query_one("select tollgate.create_signing_key()", &[]).await,
        &SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE,
    );
    let found = findings(&owner).await?;
    assert!(
        matches!(&found[..], [(severity, detail)] if severity == "fail" && detail.contains("no master key")),
        "{found:?}"
    );
    let row = "select master_key is not null and not can_sign from tollgate.signing_keys";
    assert!(value::<bool>(&owner, row).await?);
    // What is to end must end without it.
    owner.execute("select tollgate.withdraw_signing_key($1)", &[&kid]).await?;
    assert!(published(&owner).await?.is_empty());
    Ok(())
}

#[tokio::test]
async fn without_preloading_nothing_is_signed() -> Result<()> {
    let cluster = common::start(Cluster::builder().preload(false))?;
    let owner = cluster.connect("postgres", DATABASE).await?;
    let refusal = refused(
        owner.query_one("select tollgate.create_signing_key()", &[]).await,
        &SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE,
    );
    assert!(refusal.hint().is_some_and(|hint| hint.contains("shared_preload_libraries")), "{refusal:?}");
    assert_eq!(value::<Value>(&owner, "select tollgate.jwks()").await?["keys"], serde_json::json!([]));
    Ok(())
}

/// Every file below a directory.
fn files(directory: &Path) -> Result<Vec<Vec<u8>>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            found.extend(files(&path)?);
        } else if path.is_file() {
            found.push(fs::read(&path)?);
        }
    }
    Ok(found)
}

fn bytes_of(hex: &str) -> Vec<u8> {
    hex.as_bytes()
        .chunks(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap_or_default(), 16).unwrap_or_default())
        .collect()
}

/// What would betray a secret of 32 bytes: itself, its hexadecimal digits, base64 at each alignment.
fn traces(hex: &str) -> Vec<Vec<u8>> {
    use base64::Engine as _;
    use base64::engine::general_purpose::{STANDARD_NO_PAD, URL_SAFE_NO_PAD};
    let raw = bytes_of(hex);
    let mut traces = vec![raw.clone(), hex.as_bytes().to_vec(), hex.to_uppercase().into_bytes()];
    for shift in 0..3 {
        let shifted = [&vec![0; shift][..], &raw].concat();
        for text in [STANDARD_NO_PAD.encode(&shifted), URL_SAFE_NO_PAD.encode(&shifted)] {
            traces.push(text.as_bytes()[4..text.len() - 4].to_vec());
        }
    }
    // A part of it is enough.
    traces
        .iter()
        .map(|trace| trace[..trace.len() / 2].to_vec())
        .chain(ES256.lines().skip(1).take(2).map(|line| line.as_bytes()[..40].to_vec()))
        .collect()
}

/// Those of some traces that occur in a content. Each place is looked at once, by its first byte: the files are large.
fn found<'a>(content: &[u8], traces: &'a [Vec<u8>]) -> Vec<&'a Vec<u8>> {
    let mut by_first: Vec<Vec<&Vec<u8>>> = vec![Vec::new(); 256];
    for trace in traces {
        by_first[usize::from(trace[0])].push(trace);
    }
    let mut found = Vec::new();
    for (at, byte) in content.iter().enumerate() {
        let candidates = &by_first[usize::from(*byte)];
        if !candidates.is_empty() {
            found.extend(candidates.iter().filter(|trace| content[at..].starts_with(trace)));
        }
    }
    found
}

#[tokio::test]
async fn a_dump_and_the_data_directory_hold_no_private_key_and_sign_nothing_elsewhere() -> Result<()> {
    let mut cluster = common::start(Cluster::builder())?;
    let owner = cluster.connect("postgres", DATABASE).await?;
    let kid: String = owner.query_one("select tollgate.import_signing_key($1)", &[&ES256]).await?.get(0);
    owner.batch_execute("checkpoint").await?;
    assert_eq!(sign(&owner).await?, kid);

    let dump = cluster.program("pg_dump").output()?;
    anyhow::ensure!(dump.status.success(), "{}", String::from_utf8_lossy(&dump.stderr));
    let elsewhere = common::start(Cluster::builder().master_key(false).extension(false))
        .or_else(|_| Cluster::builder().master_key(false).extension(false).start())?;
    elsewhere.execute(DATABASE, "create role web").ok();
    let script = elsewhere.socket_dir().join("dump.sql");
    fs::write(&script, &dump.stdout)?;
    let restored = elsewhere
        .program("psql")
        .args(["--quiet", "--no-psqlrc", "--set=ON_ERROR_STOP=1", "--file"])
        .arg(&script)
        .output()?;
    anyhow::ensure!(restored.status.success(), "{}", String::from_utf8_lossy(&restored.stderr));

    let mut copy = cluster.standby()?;
    copy.configure("tollgate.master_key_file", "")?;
    copy.promote()?;
    for server in [&elsewhere, &copy] {
        let there = server.connect("postgres", DATABASE).await?;
        eventually_loaded(&there, "the server to have no master key", <[String]>::is_empty).await;
        assert_eq!(published(&there).await?, [&*kid], "public keys are restored");
        for call in [SIGN, "select tollgate.create_signing_key()", "select tollgate.reseal_signing_keys()"] {
            refused(there.query_one(call, &[]).await, &SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE);
        }
    }
    // Nor with another master key.
    elsewhere.write_master_keys(&[OTHER_MASTER_KEY])?;
    let mut elsewhere = elsewhere;
    let file = elsewhere.master_key_file().display().to_string();
    elsewhere.configure("tollgate.master_key_file", &file)?;
    let there = elsewhere.connect("postgres", DATABASE).await?;
    eventually_loaded(&there, "the other master key", |ids| ids.len() == 1).await;
    let refusal = refused(sign(&there).await, &SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE);
    assert!(refusal.message().contains("a master key that this server does not have"), "{refusal:?}");

    cluster.stop()?;
    let mut places = files(cluster.data_dir())?;
    assert!(places.len() > 500, "{}", places.len());
    places.push(dump.stdout);
    let there = [kid.into_bytes()];
    let kids = places.iter().map(|content| found(content, &there).len()).sum::<usize>();
    assert!(kids > 1, "the search finds what is there");
    let secrets: Vec<Vec<u8>> = [PRIVATE, MASTER_KEY].into_iter().flat_map(traces).collect();
    for content in &places {
        let found = found(content, &secrets);
        assert!(found.is_empty(), "{found:?}");
    }
    Ok(())
}

#[tokio::test]
async fn keys_are_resealed_all_or_none_and_a_kill_in_between_changes_nothing() -> Result<()> {
    let mut cluster = common::start(Cluster::builder())?;
    let owner = cluster.connect("postgres", DATABASE).await?;
    create(&owner, "").await?;
    create(&owner, "'RS256', '0'").await?;
    let kid = create(&owner, "'EdDSA', '0'").await?;
    let reseal = "select tollgate.reseal_signing_keys()";
    assert_eq!(value::<i64>(&owner, reseal).await?, 0);
    // The new one first: it seals, and both open.
    cluster.write_master_keys(&[OTHER_MASTER_KEY, MASTER_KEY])?;
    cluster.configure("work_mem", "5MB")?;
    eventually_loaded(&owner, "both master keys", |ids| ids.len() == 2).await;
    assert_eq!(sign(&owner).await?, kid);
    let by =
        "select array_agg(m.keys order by m.seals desc) from tollgate.list_master_keys() m where m.loaded";
    assert_eq!(value::<Vec<i64>>(&owner, by).await?, [0, 3]);
    let found = findings(&owner).await?;
    assert!(
        matches!(&found[..], [(severity, detail)] if severity == "warn" && detail.contains("not the first one")),
        "{found:?}"
    );

    owner.batch_execute("begin").await?;
    assert_eq!(value::<i64>(&owner, reseal).await?, 3);
    cluster.crash()?;
    cluster.restart()?;
    let owner = cluster.connect("postgres", DATABASE).await?;
    eventually_loaded(&owner, "both master keys", |ids| ids.len() == 2).await;
    assert_eq!(value::<Vec<i64>>(&owner, by).await?, [0, 3]);
    assert_eq!(sign(&owner).await?, kid);
    assert_eq!(value::<i64>(&owner, reseal).await?, 3);
    assert_eq!(value::<i64>(&owner, reseal).await?, 0);
    cluster.write_master_keys(&[OTHER_MASTER_KEY])?;
    cluster.configure("work_mem", "6MB")?;
    eventually_loaded(&owner, "the new master key alone", |ids| ids.len() == 1).await;
    assert_eq!(sign(&owner).await?, kid);
    assert_eq!(findings(&owner).await?.first().map(|(severity, _)| &**severity), Some("ok"));

    // One that was sealed with a key that is gone leaves the others as they were.
    cluster.write_master_keys(&[MASTER_KEY])?;
    cluster.configure("work_mem", "7MB")?;
    let refuses = async || sign(&owner).await.is_err();
    eventually_async(LONG, "the old master key alone", refuses).await;
    refused(owner.query_one(reseal, &[]).await, &SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE);
    Ok(())
}

#[tokio::test]
async fn a_master_key_file_that_others_could_read_is_refused_and_the_earlier_key_stays() -> Result<()> {
    let mut cluster = common::start(Cluster::builder())?;
    let owner = cluster.connect("postgres", DATABASE).await?;
    let kid = create(&owner, "").await?;
    let file = cluster.master_key_file();
    let server = cluster.data_dir().metadata().map(|data| std::os::unix::fs::MetadataExt::uid(&data))?;
    let mut nth = 0;
    let mut reload = |cluster: &mut Cluster| {
        nth += 1;
        cluster.configure("work_mem", &format!("{}MB", 4 + nth))
    };
    for mode in [0o644, 0o640, 0o604, 0o660] {
        fs::set_permissions(&file, fs::Permissions::from_mode(mode))?;
        reload(&mut cluster)?;
        eventually_async(LONG, "the refusal", async || {
            fault(&owner).await.is_ok_and(|fault| fault.contains("accessible to others"))
        })
        .await;
        assert_eq!(sign(&owner).await?, kid);
        fs::set_permissions(&file, fs::Permissions::from_mode(0o400))?;
        reload(&mut cluster)?;
        eventually_async(LONG, "the file to be read again", async || {
            fault(&owner).await.is_ok_and(|fault| fault.is_empty())
        })
        .await;
    }
    let inside = cluster.data_dir().join("master.key");
    fs::copy(&file, &inside)?;
    fs::set_permissions(&inside, fs::Permissions::from_mode(0o600))?;
    Account::unprivileged()?.own(&inside)?;
    let link = cluster.socket_dir().join("link");
    std::os::unix::fs::symlink(&inside, &link)?;
    let path = |path: &Path| path.display().to_string();
    for (setting, words) in [
        (path(&inside), "in the data directory"),
        (path(&link), "in the data directory"),
        ("master.key".to_owned(), "absolute path"),
        (path(cluster.socket_dir()), "not a regular file"),
        (path(&cluster.socket_dir().join("missing")), "could not be opened"),
        ("/dev/zero".to_owned(), "not a regular file"),
    ] {
        cluster.configure("tollgate.master_key_file", &setting)?;
        eventually_async(LONG, words, async || fault(&owner).await.is_ok_and(|fault| fault.contains(words)))
            .await;
        assert_eq!(sign(&owner).await?, kid);
    }
    let found = findings(&owner).await?;
    assert!(
        matches!(&found[..], [(severity, detail)] if severity == "fail" && detail.contains("could not be read")),
        "{found:?}"
    );
    // Root's file, which the server's group may read, as with TLS keys.
    if server != 0 && nix::unistd::geteuid().is_root() {
        let roots = cluster.socket_dir().join("roots");
        fs::copy(&file, &roots)?;
        fs::set_permissions(&roots, fs::Permissions::from_mode(0o640))?;
        std::os::unix::fs::chown(
            &roots,
            Some(0),
            Some(std::os::unix::fs::MetadataExt::gid(&file.metadata()?)),
        )?;
        cluster.configure("tollgate.master_key_file", &path(&roots))?;
        eventually_async(LONG, "root's file to be read", async || {
            fault(&owner).await.is_ok_and(|fault| fault.is_empty())
        })
        .await;
    }
    let log = cluster.log();
    assert!(log.contains("could not read the master keys") && !log.contains(&MASTER_KEY[..16]), "{log}");
    Ok(())
}

#[tokio::test]
async fn a_command_prints_the_master_keys() -> Result<()> {
    let mut cluster = common::start(Cluster::builder().master_key(false))?;
    cluster.write_master_keys(&[MASTER_KEY])?;
    let command = format!("cat '{}'", cluster.master_key_file().display());
    cluster.configure("tollgate.master_key_command", &command)?;
    let owner = cluster.connect("postgres", DATABASE).await?;
    eventually_loaded(&owner, "the master key", |ids| ids.len() == 1).await;
    let kid = create(&owner, "").await?;
    for (command, words) in [
        (format!("{command}; false"), "exit status: 1"),
        ("true".to_owned(), "holds no key"),
        ("yes".to_owned(), "more than 65536 bytes"),
        ("echo hello".to_owned(), "line 1 is not"),
    ] {
        cluster.configure("tollgate.master_key_command", &command)?;
        eventually_async(LONG, words, async || fault(&owner).await.is_ok_and(|fault| fault.contains(words)))
            .await;
        assert_eq!(sign(&owner).await?, kid);
    }
    // One that hangs does not keep the server from stopping.
    cluster.configure("tollgate.master_key_command", "sleep 1000")?;
    eventually_async(LONG, "the command to run", async || {
        fs::read_dir("/proc").is_ok_and(|all| {
            all.flatten().any(|process| {
                fs::read(process.path().join("cmdline"))
                    .is_ok_and(|line| line.starts_with(b"sleep\x001000\0") || line.ends_with(b"sleep 1000\0"))
            })
        })
    })
    .await;
    let file = cluster.master_key_file().display().to_string();
    cluster.configure("tollgate.master_key_file", &file)?;
    cluster.configure("tollgate.master_key_command", "")?;
    cluster.restart()?;
    let owner = cluster.connect("postgres", DATABASE).await?;
    assert_eq!(sign(&owner).await?, kid, "a backend waits for the first reading");
    Ok(())
}

#[tokio::test]
async fn a_backend_that_misses_a_master_key_has_them_read_again_once() -> Result<()> {
    let mut cluster = common::start(Cluster::builder().master_key(false))?;
    cluster.write_master_keys(&[MASTER_KEY])?;
    let runs = cluster.socket_dir().join("runs");
    let command = format!("echo >>'{}'; cat '{}'", runs.display(), cluster.master_key_file().display());
    cluster.configure("tollgate.master_key_command", &command)?;
    let owner = cluster.connect("postgres", DATABASE).await?;
    eventually_loaded(&owner, "the master key", |ids| ids.len() == 1).await;
    let kid = create(&owner, "").await?;
    cluster.write_master_keys(&[OTHER_MASTER_KEY, MASTER_KEY])?;
    cluster.configure("work_mem", "5MB")?;
    eventually_loaded(&owner, "both master keys", |ids| ids.len() == 2).await;
    assert_eq!(value::<i64>(&owner, "select tollgate.reseal_signing_keys()").await?, 1);
    cluster.write_master_keys(&[MASTER_KEY])?;
    cluster.configure("work_mem", "6MB")?;
    eventually_loaded(&owner, "the first master key alone", |ids| ids.len() == 1).await;

    let count = || Ok::<_, anyhow::Error>(fs::read(&runs)?.len());
    let before = count()?;
    for _ in 0..3 {
        refused(owner.query_one(SIGN, &[]).await, &SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE);
        assert_eq!(count()?, before + 1);
    }
    // Added, and the server not reloaded.
    cluster.write_master_keys(&[OTHER_MASTER_KEY, MASTER_KEY])?;
    let other = cluster.connect("postgres", DATABASE).await?;
    assert_eq!(sign(&other).await?, kid);
    assert_eq!(sign(&owner).await?, kid);
    assert_eq!(count()?, before + 2);
    Ok(())
}

#[tokio::test]
#[cfg(target_os = "linux")]
async fn core_dumps_leave_the_master_keys_out() -> Result<()> {
    let cluster = SHARED.cluster()?;
    let owner = cluster.connect("postgres", DATABASE).await?;
    let pid: i32 = value(&owner, "select pg_backend_pid()").await?;
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let left_out = maps
        .lines()
        .filter(|line| line.starts_with("VmFlags:"))
        .filter(|line| line.split(' ').any(|flag| flag == "sh") && line.split(' ').any(|flag| flag == "dd"));
    assert!(left_out.count() > 0, "no shared mapping is left out of dumps:\n{maps}");
    Ok(())
}

#[tokio::test]
async fn ordinary_roles_and_smaller_capabilities_neither_read_nor_sign_nor_change_keys() -> Result<()> {
    let cluster = common::start(Cluster::builder())?;
    let owner = cluster.connect("postgres", DATABASE).await?;
    let kid = create(&owner, "").await?;
    owner
        .batch_execute(
            "create role nothing login; create role verifies login; create role issues login; create role operates login;
             create role manages login;
             select tollgate.grant_capability('verifies', 'verifier'); select tollgate.grant_capability('issues', 'issuer');
             select tollgate.grant_capability('operates', 'operator'); select tollgate.grant_capability('manages', 'admin')",
        )
        .await?;
    let withdraw = format!("select tollgate.withdraw_signing_key('{kid}')");
    for role in ["nothing", "verifies", "issues", "operates", "manages"] {
        let client = cluster.connect(role, DATABASE).await?;
        let internal = [
            "table tollgate.sealed_keys",
            "update tollgate.sealed_keys set signs_from = now()",
            "select tollgate.make_key('ES256', 'access_token')",
            "select tollgate.read_key('', 'access_token')",
            "select tollgate.reseal_key('', 'a', 'ES256', 'access_token')",
            "select tollgate.add_key('{}', 'access_token', '0', 'key.created')",
            "select tollgate.master_key_ids()",
            "select tollgate.master_key_fault()",
            SIGN,
            "select pg_read_file(current_setting('data_directory') || '/PG_VERSION')",
            "show tollgate.master_key_file",
            "show tollgate.master_key_command",
        ];
        for statement in internal {
            refused(client.batch_execute(statement).await, &SqlState::INSUFFICIENT_PRIVILEGE);
        }
        let managing = [
            "select tollgate.create_signing_key()",
            "select tollgate.rotate_signing_key()",
            "select tollgate.import_signing_key('')",
            "select tollgate.reseal_signing_keys()",
            "table tollgate.signing_keys",
            "select tollgate.list_master_keys()",
            &withdraw,
        ];
        for statement in managing {
            client.batch_execute("begin").await?;
            let result = client.batch_execute(statement).await;
            if role == "manages" {
                assert!(
                    !matches!(&result, Err(error) if error.code() == Some(&SqlState::INSUFFICIENT_PRIVILEGE)),
                    "{statement}"
                );
            } else {
                refused(result, &SqlState::INSUFFICIENT_PRIVILEGE);
            }
            client.batch_execute("rollback").await?;
        }
        let may = |result: Result<(), tokio_postgres::Error>| result.is_ok();
        let due = may(client.batch_execute("select tollgate.rotate_due_signing_key('90 days')").await);
        assert_eq!(due, role == "operates", "{role}");
        let jwks = may(client.batch_execute("select tollgate.jwks()").await);
        assert_eq!(jwks, ["verifies", "issues", "manages"].contains(&role), "{role}");
        refused(
            client.batch_execute("alter system set tollgate.master_key_file = ''").await,
            &SqlState::INSUFFICIENT_PRIVILEGE,
        );
        error(client.batch_execute("set tollgate.master_key_file = ''").await);
    }
    Ok(())
}

#[tokio::test]
async fn a_role_that_reads_files_of_the_server_is_reported() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "readers").await?;
    create(&db.owner, "").await?;
    assert_eq!(
        findings(&db.owner).await?,
        [("ok".to_owned(), "1 signing keys, 1 master keys loaded".to_owned())]
    );
    db.owner.batch_execute("begin; create role reader; grant pg_read_server_files to reader").await?;
    let found = findings(&db.owner).await?;
    assert!(
        matches!(&found[..], [(severity, detail)] if severity == "warn" && detail.contains("role reader")),
        "{found:?}"
    );
    db.owner.batch_execute("rollback").await?;
    Ok(())
}

#[tokio::test]
async fn the_daemons_role_makes_the_next_key_only_when_it_is_due() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "due").await?;
    let due = "select tollgate.rotate_due_signing_key('90 days')";
    assert_eq!(value::<Option<String>>(&db.operator, due).await?, None, "it does not make the first one");
    let first = create(&db.owner, "").await?;
    assert_eq!(value::<Option<String>>(&db.operator, due).await?, None);
    pass(&db.owner, "88 days 23 hours").await?;
    assert_eq!(value::<Option<String>>(&db.operator, due).await?, None);
    pass(&db.owner, "1 hour").await?;
    let next = value::<Option<String>>(&db.operator, due).await?.context("a day before the 90 are over")?;
    assert_eq!(
        (state(&db.owner, &first).await?, state(&db.owner, &next).await?),
        ("signing".into(), "published".into())
    );
    assert_eq!(value::<Option<String>>(&db.operator, due).await?, None, "once");
    for wrong in ["null", "'1 day'", "'-1 day'", "'1000 years'"] {
        let call = format!("select tollgate.rotate_due_signing_key({wrong})");
        refused(db.operator.query_one(&call, &[]).await, &SqlState::INVALID_PARAMETER_VALUE);
    }
    Ok(())
}

#[tokio::test]
async fn the_daemon_rotates_keys() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "rotating").await?;
    let first = create(&db.owner, "").await?;
    pass(&db.owner, "3 days").await?;
    let _daemon = Tollgated::spawn(&db.url(), &["run", "--key-rotation=2d"])?;
    eventually_async(LONG, "the next key", async || {
        published(&db.owner).await.is_ok_and(|kids| kids.len() == 2)
    })
    .await;
    assert_eq!(sign(&db.owner).await?, first);
    Ok(())
}

#[tokio::test]
async fn keys_are_managed_from_the_command_line() -> Result<()> {
    let mut cluster = common::start(Cluster::builder().master_key(false))?;
    let url = cluster.url("postgres", DATABASE);
    let directory = tempfile::tempdir()?;
    Account::unprivileged()?.own(directory.path())?;
    let file = directory.path().join("master.key").display().to_string();
    // Without a database.
    let made = json_of("postgres://nowhere.invalid/x", &["key", "init", &file], OK);
    assert_eq!(made["master_key"].as_str().map(str::len), Some(16));
    assert_eq!(fs::metadata(&file)?.permissions().mode() & 0o777, 0o600);
    assert!(failure(&url, &["key", "init", &file], 64).contains("could not create"));
    assert!(printed(&url, &["key", "list"], OK).contains("there are no signing keys"));
    assert!(failure(&url, &["key", "rotate"], NO).contains("key init"));

    cluster.configure("tollgate.master_key_file", &file)?;
    let owner = cluster.connect("postgres", DATABASE).await?;
    eventually_loaded(&owner, "the master key", |ids| ids.len() == 1).await;
    let first = printed(&url, &["key", "rotate", "--algorithm", "EdDSA"], OK).trim().to_owned();
    assert_eq!(sign(&owner).await?, first);
    let imported = fed(&url, &["key", "import", "--signs-in", "0s"], ES256.as_bytes())?;
    expect(&imported, &["key", "import"], OK);
    let second = String::from_utf8(imported.stdout)?.trim().to_owned();
    assert_eq!(sign(&owner).await?, second);
    let listed = json_of(&url, &["key", "list"], OK);
    assert_eq!(
        (&listed[0]["kid"], &listed[0]["state"]),
        (&Value::from(second.clone()), &Value::from("signing"))
    );
    assert_eq!((&listed[1]["kid"], &listed[1]["state"]), (&Value::from(first), &Value::from("retiring")));
    assert_eq!(json_of(&url, &["key", "withdraw", &second, "--reason", "a test"], OK)["withdrawn"], true);
    assert_eq!(json_of(&url, &["key", "withdraw", &second], NO)["withdrawn"], false);

    let standby = cluster.standby()?;
    let there = standby.url("postgres", DATABASE);
    let new = directory.path().join("new.key").display().to_string();
    json_of(&url, &["key", "init", &new], OK);
    let both = fs::read_to_string(&new)? + &fs::read_to_string(&file)?;
    fs::write(&new, both)?;
    cluster.configure("tollgate.master_key_file", &new)?;
    eventually_loaded(&owner, "both master keys", |ids| ids.len() == 2).await;
    let early = failure(&url, &["key", "reseal", "--standby", &there], NO);
    assert!(early.contains("has not loaded master key"), "{early}");
    assert_eq!(json_of(&url, &["key", "reseal"], OK)["resealed"], 1);
    assert_eq!(json_of(&url, &["key", "reseal"], OK)["resealed"], 0);
    Ok(())
}
