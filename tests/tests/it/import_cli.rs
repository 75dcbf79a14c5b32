//! `tollgated token import`: a file is imported whole, once, and refused rows are reported by line.

use std::fmt::Write as _;

use crate::commands::{LONG, NO, OK, USAGE, expect, failure, fed, json_of, printed};
use crate::common::{self, Shared, code, value};
use crate::operator::Db;
use anyhow::{Context as _, Result};
use serde_json::json;
use tempfile::TempDir;
use tollgate_tests::{Account, Tollgated, eventually_async};

static SHARED: Shared = Shared::new(&[("tollgate.accept_foreign_tokens", "on")]);

/// A database, the address of a role that may import, and a directory that the command can read.
async fn world(name: &str) -> Result<(Db, String, TempDir)> {
    let db = Db::create(&SHARED.cluster()?, name).await?;
    db.cluster.execute(
        &db.name,
        &format!(
            "create role {name}_issuer login; select tollgate.grant_capability('{name}_issuer', 'issuer')"
        ),
    )?;
    let url = db.cluster.url(&format!("{name}_issuer"), &db.name);
    let directory = tempfile::tempdir()?;
    Account::unprivileged()?.own(directory.path())?;
    Ok((db, url, directory))
}

fn digest(token: &str) -> String {
    tollgate_core::token::digest(token.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn file(directory: &TempDir, name: &str, text: &str) -> Result<String> {
    let path = directory.path().join(name);
    std::fs::write(&path, text)?;
    Ok(path.to_str().context("a name")?.to_owned())
}

#[tokio::test]
async fn a_file_is_imported_once_and_each_refused_row_is_reported_by_its_line() -> Result<()> {
    let (db, url, directory) = world("rows").await?;
    let bad = digest("tgt_bad");
    let csv = format!(
        "user_id,name,token_hash,scopes,expires_at\n\
         ann,one,{},posts:read posts:write,2999-01-01T00:00:00Z\n\
         ann,two,{bad},nonsense,\n\
         ann,three,sk_live_secret,,\n\
         ann,past,{},,1066-10-14T00:00:00Z\n\
         bob,four,{},,\n",
        digest("one"),
        digest("past"),
        digest("four"),
    );
    let path = file(&directory, "tokens.csv", &csv)?;
    for arguments in [&["--dry-run"][..], &["--dry-run", "--batch-size=1"], &[]] {
        let report = json_of(&url, &[&["token", "import", &path], arguments].concat(), NO);
        assert_eq!((&report["imported"], &report["present"]), (&json!(2), &json!(0)), "{report}");
        assert_eq!(report["dry_run"], json!(!arguments.is_empty()));
        let refused = report["refused"].as_array().context("refused rows")?;
        let lines: Vec<_> = refused.iter().map(|row| row["line"].as_i64().unwrap_or_default()).collect();
        assert_eq!(lines, [3, 4, 5], "{report}");
        for (row, words) in refused.iter().zip(["nonsense", "token_hash", "expires_at"]) {
            assert!(row["why"].as_str().is_some_and(|why| why.contains(words)), "{words} in {row}");
        }
        for secret in ["sk_live_secret", &bad[..16]] {
            assert!(!report.to_string().contains(secret), "{report}");
        }
        let imported = if arguments.is_empty() { 2 } else { 0 };
        let there: i64 = value(&db.owner, "select count(*) from tollgate.api_tokens").await?;
        assert_eq!(there, imported, "{arguments:?}");
    }
    assert_eq!(code(&db.web, "one").await?, "VALID");
    let expires: String =
        value(&db.owner, "select expires_at::text from tollgate.tokens where name = 'one'").await?;
    assert!(expires.starts_with("2999-01-01 00:00:00"), "{expires}");

    let text = printed(&url, &["token", "import", &path], NO);
    assert!(text.contains(&format!("{path}:3: ")), "{text}");
    assert!(text.contains("imported 0 tokens, 2 were there already, 3 refused"), "{text}");
    assert_eq!(value::<i64>(&db.owner, "select count(*) from tollgate.api_tokens").await?, 2);
    Ok(())
}

#[tokio::test]
async fn files_of_other_systems_are_imported_with_their_format_and_data() -> Result<()> {
    let (db, url, directory) = world("guides").await?;
    // As `docs/migrating.md` exports them.
    let sanctum = "user_id,name,token_hash,scopes,created_at,last_used_at,expires_at\n\
         7,phone,8d969eef6ecad3c29a3a629280e686cf0c3f5d5a86aff3ca12020c923adc6c92,posts:read,2024-01-02T03:04:05Z,2025-01-02T03:04:05Z,\n\
         7,old,5994471abb01112afcc18159f6cc74b4f511b99806da59b3caf5a9c173cacfc5,,2020-01-02T03:04:05Z,,2021-01-02T03:04:05Z\n";
    let report = json_of(
        &url,
        &["token", "import", &file(&directory, "sanctum.csv", sanctum)?, "--token-format=sanctum"],
        OK,
    );
    assert_eq!(report["imported"], json!(2), "{report}");
    let known = [("1|123456", "VALID"), ("2|12345", "EXPIRED")];
    for (plaintext, expected) in known {
        assert_eq!(code(&db.web, plaintext).await?, expected, "{plaintext}");
    }
    let used: bool = value(
        &db.owner,
        "select last_used_at = '2025-01-02 03:04:05Z' from tollgate.tokens where name = 'phone'",
    )
    .await?;
    assert!(used);

    let knox = tollgate_core::foreign::Format::Sha512;
    let digest: String = value(&db.owner, "select encode(sha512('knx_abc'), 'hex')").await?;
    let lines = format!(
        "{}\n{}\n",
        json!({"user_id": "8", "name": "knox", "token_hash": digest, "disabled_at": "2024-01-02T03:04:05Z"}),
        json!({"user_id": "8", "name": "salted", "token_hash": "pbkdf2_sha256$1000$salt$aGFzaA=="}),
    );
    let path = file(&directory, "knox.jsonl", &lines)?;
    let report = json_of(&url, &["token", "import", &path, "--token-format", &knox.to_string()], NO);
    assert_eq!(report["imported"], json!(1), "{report}");
    assert!(
        report["refused"][0]["why"].as_str().is_some_and(|why| why.contains("next presented")),
        "{report}"
    );
    assert_eq!(code(&db.web, "knx_abc").await?, "DISABLED");

    let failure = failure(&url, &["token", "import", &path, "--token-format=bcrypt"], USAGE);
    assert!(failure.contains("sha512-of-hex") && failure.contains("salt"), "{failure}");
    for (command, code) in [(&["token", "verify", "--foreign"][..], OK), (&["token", "verify"], NO)] {
        expect(&fed(&url, command, b"1|123456")?, command, code);
    }
    Ok(())
}

#[tokio::test]
async fn json_lines_are_read_from_standard_input_too_and_a_repeated_row_is_one_token() -> Result<()> {
    let (db, url, _directory) = world("lines").await?;
    let row = |name: &str| {
        format!(
            "{}\n",
            json!({"user_id": "ann", "name": name, "token_hash": digest(name), "scopes": ["posts:*"],
                                "metadata": {"plan": "pro"}, "allowed_ips": ["10.0.0.0/8"]})
        )
    };
    let input = [row("a"), row("b"), row("a")].concat();
    for (arguments, imported) in [(&["--dry-run"][..], 2), (&[], 2), (&[], 0)] {
        let command = [&["token", "import", "-", "--format=jsonl", "--json"], arguments].concat();
        let output = fed(&url, &command, input.as_bytes())?;
        expect(&output, &command, OK);
        let report: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        assert_eq!(report["imported"], json!(imported), "{report}");
        assert_eq!(report["present"], json!(3 - imported), "{report}");
    }
    let verified = common::Request::of("a").coming_from("10.1.2.3").verify(&db.web).await?;
    assert_eq!((verified.code.as_str(), verified.metadata), ("VALID", Some(json!({"plan": "pro"}))));
    Ok(())
}

#[tokio::test]
async fn an_import_that_was_killed_is_begun_again_and_loses_and_doubles_nothing() -> Result<()> {
    const ROWS: i64 = 20_000;
    let (db, url, directory) = world("killed").await?;
    let mut csv = String::from("user_id,name,token_hash\n");
    for n in 0..ROWS {
        writeln!(csv, "user-{n},n,{}", digest(&n.to_string()))?;
    }
    let path = file(&directory, "tokens.csv", &csv)?;
    let mut import = Tollgated::spawn(&url, &["token", "import", &path, "--batch-size=500"])?;
    let there = "select count(*) from tollgate.api_tokens";
    eventually_async(LONG, "a few batches", async || value::<i64>(&db.owner, there).await.unwrap() >= 1000)
        .await;
    import.kill()?;
    // The server may be about to commit one more.
    let alive = "select count(*) from pg_stat_activity where application_name = 'tollgated token import'";
    eventually_async(LONG, "its session to end", async || value::<i64>(&db.owner, alive).await.unwrap() == 0)
        .await;
    let before: i64 = value(&db.owner, there).await?;
    assert!(before < ROWS, "it was killed too late to tell");
    assert_eq!(before % 500, 0, "batches are whole");

    let report = json_of(&url, &["token", "import", &path], OK);
    assert_eq!(report["present"], json!(before));
    assert_eq!(report["imported"], json!(ROWS - before));
    assert_eq!(value::<i64>(&db.owner, there).await?, ROWS);
    let events = "select count(*) from tollgate.audit_log where event = 'token.imported'";
    assert_eq!(value::<i64>(&db.owner, events).await?, ROWS);
    Ok(())
}

/// A violation of any other unique key than that of the digests does not mean that the row exists.
#[tokio::test]
async fn an_import_that_stores_nothing_for_another_reason_does_not_say_that_it_was_there_already()
-> Result<()> {
    let (db, url, directory) = world("other_key").await?;
    let csv = format!("user_id,name,token_hash\nann,one,{}\nann,two,{}\n", digest("one"), digest("two"));
    let path = file(&directory, "tokens.csv", &csv)?;
    db.owner
        .batch_execute(
            "create unique index by_name on tollgate.audit_log (actor) where event = 'token.imported'",
        )
        .await?;
    let failure = failure(&url, &["token", "import", &path], NO);
    assert!(failure.contains("23505") && failure.contains("by_name"), "{failure}");
    assert_eq!(value::<i64>(&db.owner, "select count(*) from tollgate.api_tokens").await?, 0);
    db.owner.batch_execute("drop index tollgate.by_name").await?;
    assert_eq!(json_of(&url, &["token", "import", &path], OK)["imported"], json!(2));
    assert_eq!(json_of(&url, &["token", "import", &path], OK)["present"], json!(2));
    Ok(())
}

#[tokio::test]
async fn metadata_arrives_unchanged_or_its_row_is_refused() -> Result<()> {
    let (db, url, directory) = world("metadata").await?;
    let given = [
        r#"{"account": 12345678901234567890123}"#.to_owned(),
        r#"{"ratio": -0.10, "n": 1e400}"#.to_owned(),
        format!(r#"{{"k": {}{}}}"#, "[".repeat(31), "]".repeat(31)),
        format!(r#"{{"k": {}{}}}"#, "[".repeat(32), "]".repeat(32)),
        format!(r#"{{"k": {}{}}}"#, "[".repeat(100_000), "]".repeat(100_000)),
        format!(r#"{{"k": "{}"}}"#, "x".repeat(16 * 1024)),
        r#"{"k": "\u0000"}"#.to_owned(),
    ];
    let mut csv = "user_id,name,token_hash,metadata\n".to_owned();
    let mut jsonl = String::new();
    for (n, metadata) in given.iter().enumerate() {
        let quoted = metadata.replace('"', "\"\"");
        writeln!(csv, "ann,{n},{},\"{quoted}\"", digest(&format!("csv {n}")))?;
        let hash = digest(&format!("jsonl {n}"));
        writeln!(
            jsonl,
            r#"{{"user_id": "ben", "name": "{n}", "token_hash": "{hash}", "metadata": {metadata}}}"#
        )?;
    }
    for (name, text, user, first) in [("m.csv", csv, "ann", 5), ("m.jsonl", jsonl, "ben", 4)] {
        let path = file(&directory, name, &text)?;
        let report = json_of(&url, &["token", "import", &path], NO);
        assert_eq!(report["imported"], json!(3), "{report}");
        let lines: Vec<i64> = report["refused"]
            .as_array()
            .context("rows")?
            .iter()
            .filter_map(|row| row["line"].as_i64())
            .collect();
        assert_eq!(lines, (first..first + 4).collect::<Vec<i64>>(), "{report}");
        for (n, metadata) in given[..3].iter().enumerate() {
            let kept = format!(
                "select metadata::text = $1::text::jsonb::text from tollgate.tokens where user_id = '{user}' and name = '{n}'"
            );
            assert!(db.owner.query_one(&kept, &[metadata]).await?.get::<_, bool>(0), "{metadata}");
        }
    }
    Ok(())
}

#[tokio::test]
async fn a_batch_is_bounded_by_its_bytes_too_and_any_number_of_rows_may_be_refused() -> Result<()> {
    let (db, url, directory) = world("bytes").await?;
    db.cluster.execute("postgres", "alter database bytes set tollgate.max_metadata_size = '256kB'")?;
    let mut rows = String::new();
    for n in 0..30 {
        let (hash, long) = (digest(&format!("large {n}")), "x".repeat(250_000));
        writeln!(
            rows,
            r#"{{"user_id": "ann", "name": "{n}", "token_hash": "{hash}", "metadata": {{"k": "{long}"}}}}"#
        )?;
        writeln!(rows, r#"{{"user_id": "ann", "name": "{n}", "token_hash": "junk"}}"#)?;
    }
    let path = file(&directory, "large.jsonl", &rows)?;
    let report = json_of(&url, &["token", "import", &path], NO);
    assert_eq!((&report["imported"], &report["present"]), (&json!(30), &json!(0)));
    assert_eq!(report["refused"].as_array().map(Vec::len), Some(30));
    let transactions: i64 =
        value(&db.owner, "select count(distinct xid) from tollgate.audit_log where event = 'token.imported'")
            .await?;
    assert_eq!(transactions, 2, "7.5 MB of which 4 are sent at a time");
    Ok(())
}

#[test]
fn a_file_that_cannot_contain_tokens_is_refused_before_anything_is_tried() -> Result<()> {
    let directory = tempfile::tempdir()?;
    Account::unprivileged()?.own(directory.path())?;
    let bare = file(&directory, "bare.csv", &format!("ann,n,{}\n", digest("x")))?;
    let nameless = file(&directory, "tokens", "")?;
    let url = "postgres://unused@127.0.0.1:1/nowhere";
    for (path, words) in
        [(bare.as_str(), "user_id"), (&nameless, "--format"), ("/nonexistent/tokens.csv", "/nonexistent")]
    {
        let failure = failure(url, &["token", "import", path], USAGE);
        assert!(failure.contains(words), "{words} in {failure}");
        assert!(!failure.contains(&digest("x")[..16]), "{failure}");
    }
    Ok(())
}
