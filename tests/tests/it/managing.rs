//! The commands that manage tokens of all users, users, webhooks, capabilities and the audit log; and that no command answers in
//! the words of SQL.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use tollgate_tests::{Tollgated, eventually_async};

use crate::commands::{NO, OK, USAGE, expect, failure, fed, json_of, printed};
use crate::common::{Shared, code, issue, issue_with, value};
use crate::operator::{Db, QUEUE_ALL};

static SHARED: Shared = Shared::new(&[]);

/// A database, and the address of a role in it that has a capability.
async fn db_of(name: &str, capability: &str) -> Result<(Db, String)> {
    let db = Db::create(&SHARED.cluster()?, name).await?;
    let role = format!("{name}_{capability}");
    db.owner
        .batch_execute(&format!(
            "create role {role} login; select tollgate.grant_capability('{role}', '{capability}')"
        ))
        .await?;
    let url = db.cluster.url(&role, &db.name);
    Ok((db, url))
}

fn column(rows: &Value, key: &str) -> Vec<String> {
    rows.as_array().into_iter().flatten().filter_map(|row| row[key].as_str().map(str::to_owned)).collect()
}

#[tokio::test]
async fn tokens_of_all_users_are_searched_and_listed_page_by_page() -> Result<()> {
    let (db, url) = db_of("searched", "admin").await?;
    let mut ids = Vec::new();
    for user in ["ann", "ben", "ann", "cem"] {
        ids.push(issue(&db.owner, user, &[]).await?.id.to_string());
    }
    db.owner
        .execute("select tollgate.update_api_token($1::text::uuid, '{\"name\": \"ci\"}')", &[&ids[1]])
        .await?;
    db.owner.execute("select tollgate.revoke_api_token($1::text::uuid)", &[&ids[3]]).await?;
    let list =
        |arguments: &[&str]| column(&json_of(&url, &[&["token", "list"], arguments].concat(), OK), "id");
    assert_eq!(list(&[]), ids);
    assert_eq!(list(&["--user=ann"]), [ids[0].clone(), ids[2].clone()]);
    assert_eq!(list(&["--name=ci"]), ids[1..2]);
    assert_eq!(list(&["--status=revoked"]), ids[3..]);
    assert_eq!(list(&["--status=active", "--user=cem"]), Vec::<String>::new());
    let hint = json_of(&url, &["token", "show", &ids[2]], OK)["hint"].as_str().context("a hint")?.to_owned();
    assert!(list(&["--hint", &hint]).contains(&ids[2]));
    assert!(list(&["--hint", &hint, "--user=ann"]).contains(&ids[2]));
    assert_eq!(list(&["--hint=tgt_none"]), Vec::<String>::new());

    assert_eq!(list(&["--limit=3"]), ids[..3]);
    assert_eq!(list(&["--limit=3", "--after", &ids[2]]), ids[3..]);
    assert_eq!(list(&["--user=ann", "--limit=1", "--after", &ids[0]]), ids[2..3]);
    let arguments = ["token", "list", "--limit=2"];
    let page = Tollgated::run(&url, &arguments)?;
    expect(&page, &arguments, OK);
    let more = String::from_utf8(page.stderr)?;
    assert!(more.contains(&format!("--after {}", ids[1])), "{more}");
    assert!(printed(&url, &["token", "list", "--name=none"], OK).contains("no such tokens"));
    // A user's own list needs no more than before; a search of all users does.
    let (_issuers, issuer) = db_of("searcher", "issuer").await?;
    json_of(&issuer, &["token", "list", "--user=ann"], OK);
    let refused = failure(&issuer, &["token", "list"], NO);
    assert!(refused.contains("'admin'"), "{refused}");
    Ok(())
}

#[tokio::test]
async fn a_token_is_changed_in_what_is_named_and_in_nothing_else() -> Result<()> {
    let (db, url) = db_of("changed", "admin").await?;
    let create = [
        "token",
        "create",
        "--user=ann",
        "--name=old",
        "--scope=posts:read",
        "--expires-in=1d",
        "--rate-limit=5",
    ];
    let issued = json_of(&url, &create, OK);
    let (id, token) = (issued["id"].as_str().context("an id")?, issued["token"].as_str().context("a token")?);
    let update =
        |arguments: &[&str], code: i32| json_of(&url, &[&["token", "update", id], arguments].concat(), code);
    let changed = update(
        &["--name=new", "--scope=posts:write,users:read", "--metadata={\"n\": 12345678901234567890}"],
        OK,
    );
    assert_eq!((&changed["name"], &changed["rate_limit"]), (&json!("new"), &json!(5)));
    assert_eq!(changed["scopes"], json!(["posts:write", "users:read"]));
    assert_eq!(changed["expires_at"], issued["expires_at"]);
    let stored: String = value(&db.owner, "select metadata::text from tollgate.tokens").await?;
    assert_eq!(stored, "{\"n\": 12345678901234567890}");
    let limited = update(&["--rate-limit=7", "--rate-window=90s", "--allowed-ip=10.0.0.0/8"], OK);
    assert_eq!((&limited["rate_limit"], &limited["rate_window"]), (&json!(7), &json!("PT1M30S")));
    assert!(printed(&url, &["token", "show", id], OK).contains("1m 30s"), "as it was given");
    let longer = "select expires_at > now() + interval '29 days' from tollgate.tokens";
    update(&["--expires-in=30d"], OK);
    assert!(value::<bool>(&db.owner, longer).await?);
    let cleared = update(&["--clear=scopes,expiry,metadata", "--clear=allowed-ips,rate-limit"], OK);
    for (key, left) in [
        ("scopes", json!([])),
        ("expires_at", Value::Null),
        ("metadata", json!({})),
        ("allowed_ips", Value::Null),
        ("rate_limit", Value::Null),
    ] {
        assert_eq!(cleared[key], left, "{key}");
    }
    assert_eq!(code(&db.web, token).await?, "VALID");
    let both = failure(&url, &["token", "update", id, "--expires-in=1d", "--clear=expiry"], USAGE);
    assert!(both.contains("expires at"), "{both}");
    Ok(())
}

#[tokio::test]
async fn all_tokens_of_a_user_are_revoked_at_once() -> Result<()> {
    let (db, url) = db_of("departed", "issuer").await?;
    for user in ["ann", "ann", "ben", "cem"] {
        issue(&db.owner, user, &[]).await?;
    }
    assert_eq!(json_of(&url, &["token", "revoke", "--user=ann", "--reason=left"], OK), json!({"revoked": 2}));
    assert_eq!(json_of(&url, &["token", "revoke", "--user=ann"], NO), json!({"revoked": 0}));
    let ended = printed(&url, &["user", "revoke", "ben"], OK);
    assert_eq!(
        ended.trim_end(),
        "revoked 1 API token of ben, and every session and access token from before now"
    );
    assert_eq!(json_of(&url, &["user", "revoke", "ben"], OK), json!({"revoked": 0}));
    let left: Vec<String> = column(&json_of(&url, &["token", "list", "--user=cem"], OK), "status");
    assert_eq!(left, ["active"]);
    let reasons =
        "select string_agg(distinct revoked_reason, ',') from tollgate.tokens where user_id = 'ann'";
    assert_eq!(value::<String>(&db.owner, reasons).await?, "left");
    Ok(())
}

#[tokio::test]
async fn webhooks_are_managed_from_the_command_line() -> Result<()> {
    let (db, url) = db_of("hooked", "admin").await?;
    let created =
        json_of(&url, &["webhook", "create", "audit", "https://example.com/a", "--event=token.*"], OK);
    let secret = created["secret"].as_str().context("a secret")?.to_owned();
    assert!(secret.starts_with("whsec_"), "{created}");
    // An address that is a secret itself is not an argument.
    let from_file = ["webhook", "create", "chat", "--url-file=-", "--quiet"];
    let output = fed(&url, &from_file, b"https://example.com/s3cr3t\n")?;
    expect(&output, &from_file, OK);
    assert!(String::from_utf8(output.stdout)?.starts_with("whsec_"));
    assert_eq!(column(&json_of(&url, &["webhook", "list"], OK), "name"), ["audit", "chat"]);

    for (command, done, exit) in [
        ("pause", "paused", OK),
        ("pause", "paused", NO),
        ("resume", "resumed", OK),
        ("resume", "resumed", NO),
        ("disable", "disabled", OK),
        ("enable", "enabled", OK),
    ] {
        assert_eq!(
            json_of(&url, &["webhook", command, "audit"], exit),
            json!({done: exit == OK}),
            "{command}"
        );
    }
    let moved = ["webhook", "set-url", "audit", "https://example.com/b"];
    assert_eq!(json_of(&url, &moved, OK), json!({"changed": true}));
    assert_eq!(json_of(&url, &moved, NO), json!({"changed": false}));
    let rotated = json_of(&url, &["webhook", "rotate-secret", "audit", "--grace=1h"], OK);
    assert_ne!(rotated["secret"], json!(secret));
    let shown = json_of(&url, &["webhook", "show", "audit"], OK);
    assert_eq!((&shown["url"], &shown["events"]), (&json!("https://example.com/b"), &json!(["token.*"])));
    assert!(shown["old_secret_until"].is_string() && !shown.to_string().contains("whsec_"), "{shown}");
    assert!(printed(&url, &["webhook", "show", "audit"], OK).contains("active"));
    assert_eq!(json_of(&url, &["webhook", "show", "none"], NO), Value::Null);

    // Messages that were given up are listed and sent again.
    issue(&db.owner, "ann", &[]).await?;
    db.owner.batch_execute(QUEUE_ALL).await?;
    let messages = json_of(&url, &["webhook", "messages", "audit"], OK);
    assert_eq!(column(&messages, "event"), ["token.created"]);
    let id = messages[0]["id"].to_string();
    assert_eq!(
        json_of(&url, &["webhook", "replay", "audit"], NO),
        json!({"replayed": 0}),
        "it is due already"
    );
    db.owner.batch_execute("update tollgate.webhook_queue set dead_at = now()").await?;
    assert_eq!(column(&json_of(&url, &["webhook", "messages", "audit", "--limit=1"], OK), "state"), ["dead"]);
    assert_eq!(json_of(&url, &["webhook", "replay", "audit", "--message", &id], OK), json!({"replayed": 1}));
    assert_eq!(printed(&url, &["webhook", "messages", "audit", "--quiet"], OK).trim_end(), id);

    assert_eq!(json_of(&url, &["webhook", "delete", "audit"], OK), json!({"deleted": true}));
    assert_eq!(json_of(&url, &["webhook", "delete", "audit"], NO), json!({"deleted": false}));
    let unknown = failure(&url, &["webhook", "pause", "audit"], NO);
    assert!(unknown.contains("`tollgated webhook list`") && unknown.contains("42704"), "{unknown}");
    Ok(())
}

#[tokio::test]
async fn the_audit_log_is_verified_with_and_without_a_seal_that_was_kept() -> Result<()> {
    let (db, url) = db_of("sealed", "admin").await?;
    issue(&db.owner, "ann", &[]).await?;
    // Transactions of other tests, in other databases of the cluster, keep the last events from being sealed.
    eventually_async(Duration::from_secs(30), "all events to be settled", async || {
        let settled = "select pg_snapshot_xmin(pg_current_snapshot()) > max(xid) from tollgate.audit_log";
        value::<bool>(&db.owner, settled).await.is_ok_and(|settled| settled)
    })
    .await;
    db.owner.batch_execute("select tollgate.seal_audit_log()").await?;
    let verified = json_of(&url, &["audit", "verify"], OK);
    assert_eq!((&verified["whole"], &verified["last_seal"]), (&json!(true), &json!(1)));
    let hash = verified["last_hash"].as_str().context("a hash")?.to_owned();
    let known = format!("--known-hash={hash}");
    json_of(&url, &["audit", "verify", "--known-seal=1", &known], OK);
    let other = format!("--known-hash={}", "0".repeat(64));
    assert_eq!(
        json_of(&url, &["audit", "verify", "--known-seal=1", &other], NO)["fault"],
        json!("seal changed")
    );
    db.owner
        .batch_execute(
            "alter table tollgate.audit_log disable trigger append_only; update tollgate.audit_log set user_id = 'ben' where user_id = 'ann'",
        )
        .await?;
    let text = printed(&url, &["audit", "verify"], NO);
    assert!(text.contains("CHANGED") && text.contains("events changed"), "{text}");
    assert_eq!(printed(&url, &["audit", "verify", "--quiet"], NO), "");
    Ok(())
}

#[tokio::test]
async fn capabilities_are_granted_listed_and_revoked() -> Result<()> {
    let (db, url) = db_of("capable", "admin").await?;
    db.owner.batch_execute("create role \"Odd name\" login; create role capable_group").await?;
    let grant = ["capability", "grant", "Odd name", "issuer"];
    assert_eq!(json_of(&url, &grant, OK), json!({"granted": "issuer", "role": "Odd name"}));
    let listed = json_of(&url, &["capability", "list"], OK);
    let ours = listed.as_array().context("rows")?.iter().find(|row| row["role"] == "Odd name").cloned();
    assert_eq!(ours.context("the grant")?["capability"], json!("issuer"));
    assert!(printed(&url, &["capability", "list"], OK).contains("Odd name"));
    // What the server remarks on it is shown.
    let group = Tollgated::run(&url, &["capability", "grant", "capable_group", "verifier"])?;
    expect(&group, &["capability", "grant"], OK);
    let remark = String::from_utf8(group.stderr)?;
    assert!(remark.contains("bind values"), "{remark}");
    assert_eq!(
        printed(&url, &["capability", "revoke", "Odd name", "issuer"], OK).trim_end(),
        "revoked issuer from Odd name"
    );
    let unknown = failure(&url, &["capability", "grant", "no_such_role", "issuer"], NO);
    assert!(unknown.contains("42704") && unknown.contains("CREATE ROLE"), "{unknown}");
    assert!(!unknown.contains("CREATE EXTENSION"), "{unknown}");
    Ok(())
}

/// Advice that only who writes SQL can follow. A whole statement for an administrator is none of it.
fn sql_advice(text: &str) -> BTreeSet<&'static str> {
    let text: String = text.lines().filter(|line| !line.contains("have an administrator run")).collect();
    [
        "NULL",
        "=>",
        "SELECT",
        "::",
        "interval '",
        "'{",
        "tollgate.define_",
        "tollgate.list_",
        "()",
        "CREATE EXTENSION",
    ]
    .into_iter()
    .filter(|advice| text.contains(advice))
    .collect()
}

#[tokio::test]
async fn no_command_answers_bad_input_in_the_words_of_sql() -> Result<()> {
    let (db, url) = db_of("worded", "admin").await?;
    let live = issue(&db.owner, "ann", &["posts:read"]).await?;
    let revoked = issue(&db.owner, "ann", &[]).await?.id.to_string();
    db.owner.execute("select tollgate.revoke_api_token($1::text::uuid)", &[&revoked]).await?;
    let expired = issue(&db.owner, "ann", &[]).await?.id.to_string();
    db.owner
        .execute(
            "update tollgate.api_tokens set expires_at = now() - interval '1 day' where id = $1::text::uuid",
            &[&expired],
        )
        .await?;
    let bound = issue_with(&db.owner, "ann", "allowed_ips => '{10.0.0.0/8}'").await?;
    let id = live.id.to_string();
    let none = uuid::Uuid::nil().to_string();
    let (long, secret) = ("x".repeat(1001), "ab".repeat(40));
    let long_name = format!("--name={long}");
    let reason = format!("--reason={long}");
    let user = format!("--user={secret}");
    let create = ["token", "create", "--user=u", "--name=n"];
    let commands: Vec<Vec<&str>> = [
        &["token", "create", "--user=", "--name=n"][..],
        &["token", "create", "--user= ", "--name=n"],
        &["token", "create", &user, "--name=n"],
        &["token", "create", "--user=u", "--name="],
        &["token", "create", "--user=u", &long_name],
        &[&create[..], &["--scope=no,Wrong!"]].concat(),
        &[&create[..], &["--expires-in=0s"]].concat(),
        &[&create[..], &["--expires-in=2000y"]].concat(),
        &[&create[..], &["--expires-at=2001-01-01T00:00:00Z"]].concat(),
        &[&create[..], &["--allowed-ip=here"]].concat(),
        &[&create[..], &["--rate-limit=5", "--rate-window=2d"]].concat(),
        &[&create[..], &["--prefix=!"]].concat(),
        &[&create[..], &["--metadata={\"a\": \"\\u0000\"}"]].concat(),
        &["token", "list", "--hint", &secret],
        &["token", "rotate", &none],
        &["token", "rotate", &revoked],
        &["token", "rotate", &expired],
        &["token", "rotate", &id, "--grace=2000y"],
        &["token", "update", &none, "--name=n"],
        &["token", "update", &revoked, "--name=n"],
        &["token", "update", &id, "--name="],
        &["token", "update", &id, "--scope=no"],
        &["token", "update", &id, "--allowed-ip=here"],
        &["token", "update", &id, "--rate-limit=5", "--rate-window=2d"],
        &["token", "update", &id, "--expires-at=2001-01-01T00:00:00Z"],
        &["token", "disable", &id, &reason],
        &["token", "revoke", &id, &reason],
        &["token", "revoke", "--user="],
        &["user", "revoke", " "],
        &["user", "revoke", &secret],
        &["session", "list", &secret],
        &["session", "revoke", &none, &reason],
        &["session", "revoke", "--user", &secret],
        &["scope", "define", "No!", "d"],
        &["scope", "define", "admin", "d"],
        &["scope", "define", "x", &long],
        &["scope", "drop", "nope"],
        &["scope", "drop", "posts:read"],
        &["webhook", "create", "No!", "https://example.com/"],
        &["webhook", "create", "w", "ftp://example.com/"],
        &["webhook", "create", "w", "https://example.com/", "--event=No"],
        &["webhook", "set-url", "none", "https://example.com/"],
        &["webhook", "set-url", "none", "nowhere"],
        &["webhook", "rotate-secret", "none"],
        &["webhook", "rotate-secret", "none", "--grace=99d"],
        &["webhook", "pause", "none"],
        &["webhook", "enable", "none"],
        &["webhook", "replay", "none"],
        &["capability", "grant", "none", "verifier"],
        &["capability", "grant", "postgres", "verifier"],
        &["capability", "revoke", "none", "verifier"],
    ]
    .iter()
    .map(|command| command.to_vec())
    .collect();
    let mut wrong = Vec::new();
    for command in &commands {
        let output = Tollgated::run(&url, command)?;
        let text = String::from_utf8(output.stderr)? + &String::from_utf8(output.stdout)?;
        let advice = sql_advice(&text);
        if output.status.code() != Some(NO) || !advice.is_empty() {
            wrong.push(format!("{command:?} ({:?}) {advice:?}: {text}", output.status.code()));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    db.owner.batch_execute("alter database worded set tollgate.max_token_lifetime = '90d'").await?;
    for command in [&create[..], &[&create[..], &["--expires-in=91d"]].concat()] {
        let text = failure(&url, command, NO);
        assert_eq!(sql_advice(&text), BTreeSet::new(), "{command:?}: {text}");
        assert!(text.contains("90 days"), "{text}");
    }
    // With a token on standard input.
    for (command, input) in [
        (&["token", "derive", "--name=n", "--scope=posts:read"][..], "junk"),
        (&["token", "derive", "--name=n", "--scope=posts:write"], &live.token),
        (&["token", "derive", "--name=n", "--expires-in=2000y"], &live.token),
        (&["token", "derive", "--name="], &live.token),
        (&["token", "derive", "--name=n", "--allowed-ip=0.0.0.0/0"], &bound.token),
    ] {
        let output = fed(&url, command, input.as_bytes())?;
        expect(&output, command, NO);
        let text = String::from_utf8(output.stderr)?;
        assert_eq!(sql_advice(&text), BTreeSet::new(), "{command:?}: {text}");
    }
    Ok(())
}

#[tokio::test]
async fn what_is_missing_is_not_taken_for_a_missing_extension() -> Result<()> {
    let (_db, url) = db_of("remedied", "admin").await?;
    let none = uuid::Uuid::nil().to_string();
    for (command, remedy) in [
        (&["scope", "drop", "nope"][..], "`tollgated scope list`"),
        (&["token", "rotate", &none], "`tollgated token list`"),
        (&["token", "update", &none, "--name=n"], "`tollgated token list`"),
        (&["webhook", "replay", "nope"], "`tollgated webhook list`"),
    ] {
        let text = failure(&url, command, NO);
        assert!(text.contains("to fix it: ") && text.contains(remedy), "{command:?}: {text}");
        assert!(!text.contains("EXTENSION"), "{command:?}: {text}");
    }
    Ok(())
}
