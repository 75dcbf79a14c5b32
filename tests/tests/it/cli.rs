//! The one-shot commands of `tollgated`, as users, cron and pipes run them.

use std::io::{BufRead as _, BufReader};
use std::process::Stdio;
use std::sync::Arc;

use crate::commands::{
    LONG, NO, OK, UNAVAILABLE, USAGE, ended, expect, failure, fed, json_of, lines, printed,
};
use crate::common::{self, Shared, code, issue, issue_with, revoke, value};
use crate::operator::{self, Db, OPERATOR, counts, issue_many, set, totals};
use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use tokio_postgres::Client;
use tollgate_tests::{Account, Cluster, DATABASE, Tollgated, eventually, eventually_async};

static SHARED: Shared = Shared::new(&[]);

/// An ordinary role that manages tokens.
const MANAGER: &str = "manager";

fn url_of_manager(db: &Db) -> Result<String> {
    db.cluster.execute(
        &db.name,
        "do $$ begin
             create role manager login;
         exception when duplicate_object or unique_violation then
             -- Another test was faster.
         end $$;
         grant execute on function
             tollgate.create_api_token, tollgate.list_api_tokens, tollgate.revoke_api_token,
             tollgate.revoke_presented_token, tollgate.verify_api_token_hash
         to manager",
    )?;
    Ok(db.cluster.url(MANAGER, &db.name))
}

fn ids(events: &[Value]) -> Vec<i64> {
    events.iter().filter_map(|event| event["id"].as_i64()).collect()
}

/// The ids of the log in the order in which it is read.
async fn logged_after(owner: &Client, id: i64) -> Result<Vec<i64>> {
    let rows =
        owner.query("select id from tollgate.audit_log where id > $1 order by xid, id", &[&id]).await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

async fn last_event(owner: &Client) -> Result<i64> {
    value(owner, "select max(id) from tollgate.audit_log").await
}

// ---- tail

#[tokio::test]
async fn tail_prints_the_events_since_one_and_ends() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "tail").await?;
    let before = last_event(&db.owner).await?;
    let token = issue(&db.owner, "an\"n\n", &[]).await?;
    db.owner.execute("select tollgate.revoke_api_token($1, null, 'leaked')", &[&token.id]).await?;
    let all = logged_after(&db.owner, 0).await?;

    let text = printed(&db.url(), &["tail", "--since", &before.to_string()], OK);
    let events = lines(&text);
    assert_eq!(ids(&events), logged_after(&db.owner, before).await?);
    for line in text.lines() {
        // In this order, which a JSON object in memory does not keep.
        let places: Vec<Option<usize>> =
            ["id", "epoch", "at", "event", "token_id", "user_id", "actor", "reason", "detail"]
                .iter()
                .map(|key| line.find(&format!("\"{key}\":")))
                .collect();
        assert!(places.iter().all(Option::is_some) && places.is_sorted(), "{line}");
        let object: Value = serde_json::from_str(line)?;
        assert_eq!(object.as_object().map(serde_json::Map::len), Some(9), "{line}");
    }
    let revoked = &events[1];
    assert_eq!(
        (&revoked["event"], &revoked["token_id"], &revoked["user_id"]),
        (&json!("token.revoked"), &json!(token.id), &json!("an\"n\n"))
    );
    assert_eq!((&revoked["actor"], &revoked["reason"]), (&json!("postgres"), &json!("leaked")));
    assert_eq!((&revoked["detail"], &events[0]["reason"]), (&json!({}), &Value::Null));

    assert_eq!(ids(&lines(&printed(&db.url(), &["tail", "--since=0"], OK))), all);
    assert_eq!(ids(&lines(&printed(&db.url(), &["tail", "--since=0", "--batch-size=2"], OK))), all);
    let last = all.last().context("events")?.to_string();
    assert_eq!(printed(&db.url(), &["tail", "--since", &last], OK), "");
    // The last ones unless one is named; from now on there is nothing yet.
    assert!(all.len() > 5, "{all:?}");
    let last_ten = &all[all.len().saturating_sub(10)..];
    assert_eq!(ids(&lines(&printed(&db.url(), &["tail"], OK))), last_ten);
    assert_eq!(ids(&lines(&printed(&db.url(), &["tail", "-n", "2"], OK))), &all[all.len() - 2..]);
    assert_eq!(printed(&db.url(), &["tail", "--last=0"], OK), "");
    Ok(())
}

#[tokio::test]
async fn tail_follows_through_restarts_and_crashes_without_losing_or_repeating() -> Result<()> {
    let mut cluster = Arc::new(common::start(Cluster::builder())?);
    let db = Db::only(&cluster).await?;
    let before = last_event(&db.owner).await?;
    let mut tail =
        Tollgated::spawn(&db.url(), &["tail", "--follow", "--batch-size=2", "--since", &before.to_string()])?;
    drop(db);
    let mut expected = Vec::new();
    for fault in ["none", "restart", "crash", "disconnection"] {
        let server = Arc::get_mut(&mut cluster).context("no other holder")?;
        let owner = server.connect("postgres", DATABASE).await?;
        // It is notified of some at once and must scan for the others; and some come just before the server stops.
        for n in 0..5 {
            let token = issue(&owner, "a", &[]).await?;
            if n % 2 == 0 {
                revoke(&owner, token.id).await?;
            }
        }
        drop(owner);
        match fault {
            "restart" => server.restart()?,
            "crash" => {
                server.crash()?;
                server.restart()?;
            }
            "disconnection" => server.execute(
                DATABASE,
                "select pg_terminate_backend(pid) from pg_stat_activity where usename = 'tollgated'",
            )?,
            _ => {}
        }
        eventually_async(LONG, "the server to be back", async || {
            cluster.connect("postgres", DATABASE).await.is_ok()
        })
        .await;
        let owner = cluster.connect("postgres", DATABASE).await?;
        issue(&owner, "a", &[]).await?;
        expected = logged_after(&owner, before).await?;
        eventually(LONG, &format!("the events up to the {fault}"), || {
            assert!(tail.is_running(), "{fault}: {}", tail.log());
            lines(&tail.stdout()).len() >= expected.len()
        });
    }
    assert_eq!(ids(&lines(&tail.stdout())), expected);
    Ok(())
}

#[tokio::test]
async fn tail_can_begin_now() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "tailnow").await?;
    issue(&db.owner, "a", &[]).await?;
    let before = last_event(&db.owner).await?;
    let tail = Tollgated::spawn(&db.url(), &["tail", "-f", "-n0"])?;
    let listens = "select exists (select from pg_stat_activity where application_name = 'tollgated tail'
        and datname = current_database() and query ~ 'read_events')";
    eventually_async(LONG, "tail to have begun", async || value::<bool>(&db.owner, listens).await.unwrap())
        .await;
    let token = issue(&db.owner, "a", &[]).await?;
    revoke(&db.owner, token.id).await?;
    let expected = logged_after(&db.owner, before).await?;
    eventually(LONG, "the two events", || ids(&lines(&tail.stdout())) == expected);
    Ok(())
}

#[tokio::test]
async fn tail_ends_quietly_when_its_reader_has_seen_enough() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "tailpipe").await?;
    // More than a pipe holds.
    db.owner
        .batch_execute(
            "insert into tollgate.audit_log (event, detail)
             select 'test', jsonb_build_object('filler', repeat('x', 1000)) from generate_series(1, 2000)",
        )
        .await?;
    for arguments in [&["tail", "--since=0"][..], &["tail", "--since=0", "--follow"], &["tail", "--follow"]] {
        let mut command = Tollgated::command(&db.url())?;
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn()?;
        let mut reader = BufReader::new(child.stdout.take().context("a pipe")?);
        if arguments.contains(&"--since=0") {
            let mut line = String::new();
            reader.read_line(&mut line)?;
            assert_eq!(lines(&line).len(), 1);
        }
        drop(reader);
        ended(&mut child)?;
        let output = child.wait_with_output()?;
        assert_eq!(output.status.code(), Some(OK), "{arguments:?}");
        assert_eq!(String::from_utf8_lossy(&output.stderr), "", "{arguments:?}");
    }
    Ok(())
}

// ---- status, flush, cleanup

#[tokio::test]
async fn status_shows_the_counters_and_the_daemons() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "status").await?;
    let alone = json_of(&db.url(), &["status"], NO);
    assert_eq!((&alone["healthy"], &alone["daemons"]), (&json!(false), &json!([])));
    assert_eq!(alone["stats"]["metering"], json!(true));
    assert!(printed(&db.url(), &["status"], NO).contains("tollgated run"));

    let token = issue(&db.owner, "a", &[]).await?;
    code(&db.web, &token.token).await?;
    let daemon = Tollgated::spawn(&db.url(), &["run", "--flush-interval=100ms"])?;
    eventually_async(LONG, "a report of the daemon", async || {
        let reports = "select count(*) from tollgate.daemons";
        value::<i64>(&db.operator, reports).await.unwrap() == 1
    })
    .await;
    let status = json_of(&db.url(), &["status"], OK);
    assert_eq!(status["healthy"], json!(true));
    assert_eq!(status["daemons"][0]["pid"], json!(daemon.pid()));
    assert!(status["daemons"][0]["tasks"]["flush_usage"].is_object(), "{status}");
    assert!(status["stats"]["verifications"]["VALID"].as_i64() >= Some(1), "{status}");

    let text = printed(&db.url(), &["status"], OK);
    let tasks = ["flush_usage", "publish_events", "expire_tokens", "purge", "heartbeat"];
    for word in tasks.iter().chain(&["extension", "metering", "VALID", "keys", "flushes"]) {
        assert!(text.contains(word), "{word} in:\n{text}");
    }
    assert!(text.contains(&daemon.pid().to_string()), "{text}");
    assert!(!text.contains("gone"), "{text}");
    drop(daemon);
    db.owner
        .batch_execute("update tollgate.daemon_reports set last_seen_at = now() - interval '2 minutes'")
        .await?;
    assert!(printed(&db.url(), &["status"], NO).contains("gone"));
    Ok(())
}

#[tokio::test]
async fn without_preload_there_is_nothing_to_flush_and_it_says_why() -> Result<()> {
    let cluster = Arc::new(common::start(Cluster::builder().preload(false))?);
    let db = Db::only(&cluster).await?;
    let flush = json_of(&db.url(), &["flush"], NO);
    assert_eq!(flush["metering"], json!(false));
    assert!(flush["metering_detail"].as_str().is_some_and(|text| text.contains("shared_preload_libraries")));
    assert!(printed(&db.url(), &["status"], NO).contains("shared_preload_libraries"));
    json_of(&db.url(), &["cleanup"], OK);
    Ok(())
}

#[tokio::test]
async fn flush_stores_the_counts_and_says_how_many() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "flush").await?;
    let nothing = json_of(&db.url(), &["flush"], OK);
    assert_eq!((&nothing["tokens"], &nothing["uses"]), (&json!(0), &json!(0)));
    let tokens = operator::issue_many(&db.owner, 5).await?;
    operator::verify_each(&db.web, &tokens).await?;
    // Closed by a carrier that then died, and counting went on.
    operator::drained(&db.operator).await?;
    operator::verify_each(&db.web, &tokens).await?;
    revoke(&db.owner, tokens[0].id).await?;
    code(&db.web, &tokens[0].token).await?;

    let flushed = json_of(&db.url(), &["flush"], OK);
    assert_eq!(
        (&flushed["uses"], &flushed["denials"], &flushed["generations"], &flushed["metering"]),
        (&json!(10), &json!(1), &json!(2), &json!(true))
    );
    assert_eq!(totals(&db.owner).await?, (10, 1));
    assert_eq!(counts(&db.owner, tokens[0].id).await?, (2, 1));
    assert!(printed(&db.url(), &["flush"], OK).contains("flushed 0 uses"));
    Ok(())
}

#[tokio::test]
async fn cleanup_records_and_deletes_until_nothing_is_left() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "cleanup").await?;
    for _ in 0..7 {
        let token = issue(&db.owner, "a", &[]).await?;
        set(&db.owner, token.id, "expires_at = now() - interval '3 hours'").await?;
    }
    let kept = issue(&db.owner, "a", &[]).await?;
    set(&db.owner, kept.id, "revoked_at = now() - interval '1 hour'").await?;
    db.owner
        .execute(
            "insert into tollgate.usage_hourly (token_id, hour, used, denied)
             select $1, date_trunc('hour', now()) - days * interval '1 day', 1, 0 from generate_series(52, 97, 5) days",
            &[&kept.id],
        )
        .await?;
    let output = json_of(&db.url(), &["cleanup", "--batch-size=2"], OK);
    let expected =
        json!({"expired": 7, "purged": 0, "purged_sessions": 0, "purged_hours": 2, "purged_events": 0});
    assert_eq!(output, expected, "tokens are kept for thirty days, hours of usage for ninety");
    let shorter = ["cleanup", "--batch-size=2", "--retention=2h", "--usage-retention=60days"];
    assert_eq!(
        json_of(&db.url(), &shorter, OK),
        json!({"expired": 0, "purged": 7, "purged_sessions": 0, "purged_hours": 6, "purged_events": 0})
    );
    let left: uuid::Uuid = value(&db.owner, "select id from tollgate.api_tokens").await?;
    assert_eq!(left, kept.id);
    let text = printed(&db.url(), &["cleanup", "--retention=0s"], OK);
    assert!(text.contains("recorded 0 expiries, deleted 1 ended tokens"), "{text}");
    Ok(())
}

#[tokio::test]
async fn cleanup_deletes_in_short_transactions_and_what_they_deleted_stays_deleted() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "pieces").await?;
    let tokens = issue_many(&db.owner, 130).await?;
    db.owner
        .batch_execute("update tollgate.api_tokens set revoked_at = now() - interval '1 day' - random() * interval '1 day'")
        .await?;
    let last = tokens[7].id;
    set(&db.owner, last, "revoked_at = now() - interval '2 hours'").await?;
    db.owner
        .batch_execute(&format!(
            "create function public.refuse() returns trigger language plpgsql as
                 $$ begin raise 'not this one'; end $$;
             create trigger refuse before delete on tollgate.api_tokens
                 for each row when (old.id = '{last}') execute function public.refuse()"
        ))
        .await?;
    let cleanup = ["cleanup", "--retention=1h"];
    let text = failure(&db.url(), &cleanup, NO);
    assert!(text.contains("not this one"), "{text}");
    let left: i64 = value(&db.owner, "select count(*) from tollgate.api_tokens").await?;
    assert_eq!(left, 30, "two transactions of fifty are done");
    db.owner.batch_execute("drop trigger refuse on tollgate.api_tokens").await?;
    assert_eq!(json_of(&db.url(), &cleanup, OK)["purged"], json!(30));
    let purged: Vec<i64> = db
        .owner
        .query("select count(*) from tollgate.audit_log where event = 'token.purged' group by epoch, xid order by 1", &[])
        .await?
        .iter()
        .map(|row| row.get(0))
        .collect();
    assert_eq!(purged, [30, 50, 50]);
    Ok(())
}

// ---- Data from others

/// Clears a screen, sets a title, ends a line, reverses the direction of text, hides text.
const NASTY: &str = "x\u{1b}[2J\u{1b}]0;owned\u{7}\r\n\u{9b}31m\u{202e}\u{2066}\u{200b}\u{2028}\u{e0041}y";

/// Apart from visible characters, only line breaks and our own colours may reach a terminal.
fn assert_harmless(text: &str, what: &[&str]) {
    let ours = text.replace("\u{1b}[0m", "").replace("\u{1b}[1m", "");
    let ours = (30..=37).fold(ours, |text, colour| text.replace(&format!("\u{1b}[{colour}m"), ""));
    let hidden = |c: char| {
        c.is_control() && c != '\n'
            || ['\u{202e}', '\u{2066}', '\u{200b}', '\u{2028}', '\u{e0041}'].contains(&c)
    };
    assert!(!ours.chars().any(hidden), "{what:?}: {text:?}");
    // The text after its line break does not start a line.
    assert!(!ours.lines().any(|line| line.starts_with(['\u{9b}', '3'])), "{what:?}: {text:?}");
}

#[tokio::test]
async fn no_command_prints_control_or_invisible_characters_of_others() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "nasty").await?;
    let url = db.cluster.url("postgres", &db.name);
    let owner = &db.owner;
    owner.execute("select tollgate.define_scope('x:y', 'A scope')", &[]).await?;
    owner.execute("update tollgate.scopes set description = $1, defined_by = $1", &[&NASTY]).await?;
    let token = issue(owner, NASTY, &["x:y"]).await?;
    let ended = issue(owner, NASTY, &[]).await?;
    owner.execute("select tollgate.revoke_api_token($1, null, $2)", &[&ended.id, &NASTY]).await?;
    owner
        .execute(
            "update tollgate.api_tokens set name = $1, created_by = $1, metadata = jsonb_build_object($1::text, $1::text)",
            &[&NASTY],
        )
        .await?;
    owner
        .execute(
            "select tollgate.report_daemon(gen_random_uuid(), $1, 1, $1, now(), jsonb_build_object($1::text, $1::text))",
            &[&NASTY],
        )
        .await?;
    // Tasks that can be parsed, and contain the nasty text.
    owner
        .execute(
            "select tollgate.report_daemon(gen_random_uuid(), $1, 2, '0', now(), jsonb_build_object($1::text, jsonb_build_object(
                 'last_error', $1::text, 'note', $1::text)))",
            &[&NASTY],
        )
        .await?;
    owner.execute("select tollgate.open_subscription($1)", &[&NASTY]).await?;
    owner
        .batch_execute(&format!(
            "create function public.refuse() returns trigger language plpgsql as $$ begin
                 raise exception using message = 'm{NASTY}', detail = 'd{NASTY}', hint = 'h{NASTY}';
             end $$;
             create trigger refuse before delete on tollgate.scopes for each row execute function public.refuse()"
        ))
        .await?;
    let directory = tempfile::tempdir()?;
    Account::unprivileged()?.own(directory.path())?;
    let presented = directory.path().join("token");
    std::fs::write(&presented, &token.token)?;
    let presented = presented.display().to_string();
    let rows = directory.path().join("rows.csv");
    std::fs::write(
        &rows,
        format!("token_hash,user_id,name,scopes\nno,\"{NASTY}\",\"{NASTY}\",\"{NASTY}\"\n"),
    )?;
    let rows = rows.display().to_string();
    let (id, ended_id) = (token.id.to_string(), ended.id.to_string());
    let (user, name) = (format!("--user={NASTY}"), format!("--name={NASTY}"));
    let commands: &[&[&str]] = &[
        &["tail", "--since=0"],
        &["status"],
        &["check"],
        &["flush"],
        &["cleanup"],
        &["config", "--subscription", NASTY],
        &["token", "create", &user, &name],
        &["token", "list", &user],
        &["token", "list", "--user=no\u{202e}body"],
        &["token", "show", &id],
        &["token", "show", &ended_id],
        &["token", "verify", &presented],
        &["token", "derive", &presented, &name, "--expires-in=1h"],
        &["token", "disable", &id, "--reason", NASTY],
        &["token", "enable", &id],
        &["token", "import", &rows],
        &["token", "rotate", &id],
        &["token", "revoke", &id, "--reason", NASTY],
        &["token", "list", "--name", NASTY],
        &["token", "update", &id, &name],
        &["token", "revoke", &user],
        &["user", "revoke", NASTY],
        &["session", "list", NASTY],
        &["session", "revoke", "--user", NASTY],
        &["session", "invalidate", "--before", NASTY],
        &["webhook", "create", NASTY, NASTY],
        &["webhook", "show", NASTY],
        &["webhook", "messages", NASTY],
        &["webhook", "pause", NASTY],
        &["webhook", "delete", NASTY],
        &["capability", "grant", NASTY, "verifier"],
        &["capability", "list"],
        &["audit", "verify"],
        &["scope", "list"],
        &["scope", "define", NASTY, NASTY],
        &["scope", "drop", "x:y"],
        &["scope", "drop", NASTY],
        &["no\u{202e}command"],
    ];
    for command in commands {
        for form in [&[][..], &["--json"], &["--quiet"], &["--log-format=json"]] {
            let arguments = [command, form].concat();
            let mut daemon = Tollgated::command(&url)?;
            // As on a terminal, where coloured text is not stripped.
            let output = Tollgated::run_command(daemon.env("CLICOLOR_FORCE", "1").args(&arguments))?;
            let (out, error) = (String::from_utf8(output.stdout)?, String::from_utf8(output.stderr)?);
            assert_harmless(&out, &arguments);
            assert_harmless(&error, &arguments);
            if (form == ["--json"] || command[0] == "tail") && !out.is_empty() && command[0] != "config" {
                lines(&out);
            }
        }
    }
    // Nor does the log of `run`.
    for format in ["human", "json"] {
        let subscription = format!("--subscription=log_{format}");
        let run = ["run", "--log-format", format, "--publish-interval=100ms", &subscription];
        let daemon = Tollgated::spawn(&url, &run)?;
        eventually(LONG, "events to be logged", || {
            let token = issue_in_background(&db.cluster, &db.name);
            token.is_ok() && daemon.log().contains("owned")
        });
        assert_harmless(&daemon.log(), &run);
    }
    Ok(())
}

fn issue_in_background(cluster: &Cluster, database: &str) -> Result<()> {
    let user = NASTY.replace('\'', "\'\'");
    cluster.execute(database, &format!("select tollgate.create_api_token('{user}', 'x')"))
}

// ---- token

#[tokio::test]
async fn a_token_is_created_shown_once_listed_verified_and_revoked() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "lifecycle").await?;
    let url = url_of_manager(&db)?;
    let create = [
        "token",
        "create",
        "--user=ann",
        "--name=ci \"x\"",
        "--scope=posts:read,users:*",
        "--scope=posts:write",
        "--expires-in=90days",
        "--allowed-ip=10.0.0.0/8",
        "--metadata={\"team\":1}",
        "--prefix=my_app",
    ];
    let issued = json_of(&url, &create, OK);
    let token = issued["token"].as_str().context("the token")?.to_owned();
    assert!(token.starts_with("my_app_"), "{issued}");
    assert_eq!(issued["scopes"], json!(["posts:read", "users:*", "posts:write"]));
    let create = ["token", "create", "--user=ann", "--name=other"];
    let output = Tollgated::run(&url, &create)?;
    expect(&output, &create, OK);
    assert!(String::from_utf8_lossy(&output.stdout).contains("tgt_"), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("cannot be shown again"), "{output:?}");

    let listed = json_of(&url, &["token", "list", "--user=ann"], OK);
    assert_eq!(listed.as_array().map(Vec::len), Some(2));
    assert_eq!((&listed[0]["name"], &listed[0]["status"]), (&json!("ci \"x\""), &json!("active")));
    assert_eq!(listed[0]["metadata"], json!({"team": 1}));
    let text = printed(&url, &["token", "list", "--user=ann"], OK);
    assert!(text.contains("ci \"x\"") && text.contains("my_app_"), "{text}");
    for shown in [listed.to_string(), text] {
        assert!(!shown.contains(&token) && !shown.contains(&token[11..]), "{shown}");
    }
    assert_eq!(json_of(&url, &["token", "list", "--user=bob"], OK), json!([]));
    assert!(printed(&url, &["token", "list", "--user=bob"], OK).contains("bob has no tokens"));

    let verify = |arguments: &[&str], input: &str, code: i32| -> Result<Value> {
        let arguments = [&["token", "verify", "--json"], arguments].concat();
        let output = fed(&url, &arguments, input.as_bytes())?;
        expect(&output, &arguments, code);
        Ok(serde_json::from_slice(&output.stdout)?)
    };
    // With the line break that echo adds.
    let valid = verify(&["--client-ip=10.1.2.3", "--scope=posts:read"], &format!("{token}\n"), OK)?;
    assert_eq!((&valid["valid"], &valid["user_id"]), (&json!(true), &json!("ann")));
    for (arguments, input, code) in [
        (&["--client-ip=10.1.2.3", "--scope=posts:read,admin"][..], token.as_str(), "INSUFFICIENT_SCOPE"),
        (&["--client-ip=192.0.2.1"], &token, "IP_NOT_ALLOWED"),
        (&[], "junk", "MALFORMED"),
        (&[], &token[..60], "MALFORMED"),
    ] {
        let refused = verify(arguments, input, NO)?;
        assert_eq!((&refused["code"], &refused["valid"]), (&json!(code), &json!(false)));
    }
    let output = fed(&url, &["token", "verify", "--client-ip=10.0.0.1"], token.as_bytes())?;
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("VALID") && text.contains("ann") && !text.contains(&token[11..]), "{text}");

    let id = issued["id"].as_str().context("the id")?;
    let others = json_of(&url, &["token", "revoke", id, "--user=bob"], NO);
    assert_eq!(others, json!({"revoked": false}));
    assert_eq!(json_of(&url, &["token", "revoke", id, "--reason=left"], OK), json!({"revoked": true}));
    assert_eq!(json_of(&url, &["token", "revoke", id], NO), json!({"revoked": false}));
    assert_eq!(verify(&[], &token, NO)?["code"], json!("REVOKED"));
    let revoked = json_of(&url, &["token", "list", "--user=ann"], OK);
    assert_eq!((&revoked[0]["status"], &revoked[0]["revoked_reason"]), (&json!("revoked"), &json!("left")));

    // A malformed token belongs to no user.
    json_of(&db.url(), &["flush"], OK);
    assert_eq!(counts(&db.owner, id.parse()?).await?, (2, 3));
    Ok(())
}

#[tokio::test]
async fn metadata_is_shown_as_stored_whatever_its_numbers() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "numbers").await?;
    let url = db.cluster.url("postgres", &db.name);
    let metadata = r#"{"ratio": 0.10, "account": 12345678901234567890123}"#;
    let create = ["token", "create", "--user=ann", "--name=x", "--metadata", metadata];
    let issued = json_of(&url, &create, OK);
    let (id, token) = (issued["id"].as_str().context("an id")?, issued["token"].as_str().context("a token")?);
    let beyond = format!("1{}", "0".repeat(400));
    let update = "select tollgate.update_api_token($1, '{\"metadata\": {\"n\": 1e400}}')";
    for stored in [metadata.to_owned(), format!(r#"{{"n": {beyond}}}"#)] {
        for arguments in [
            &["token", "show", id][..],
            &["token", "list", "--user=ann", "--json"],
            &["token", "show", id, "--json"],
        ] {
            let text = printed(&url, arguments, OK);
            assert!(text.contains(&stored), "{arguments:?}: {text}");
        }
        let verified = fed(&url, &["token", "verify", "--json"], token.as_bytes())?;
        assert!(String::from_utf8_lossy(&verified.stdout).contains(&stored), "{verified:?}");
        db.owner.execute(update, &[&id.parse::<uuid::Uuid>()?]).await?;
    }
    // A report with numbers beyond our range is shown without them.
    let report = "select tollgate.report_daemon(gen_random_uuid(), 'h', 1, '1', now(), '{\"t\": 1e400}')";
    db.owner.batch_execute(report).await?;
    assert_eq!(json_of(&url, &["status"], OK)["daemons"][0]["tasks"], Value::Null);
    Ok(())
}

#[tokio::test]
async fn a_long_list_is_printed_as_it_arrives_and_is_one_document_as_json() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "long_list").await?;
    let url = db.cluster.url("postgres", &db.name);
    issue_many(&db.owner, 2500).await?;
    let list = ["token", "list", "--user=many"];
    let all = json_of(&url, &list, OK);
    let names: Vec<&str> =
        all.as_array().context("an array")?.iter().filter_map(|row| row["name"].as_str()).collect();
    assert_eq!(names, (1..=2500).map(|n| format!("number {n}")).collect::<Vec<_>>());
    let table = printed(&url, &list, OK);
    assert_eq!(table.lines().filter(|line| line.trim_start().starts_with("ID ")).count(), 3);
    assert_eq!(table.lines().count(), 2503);
    assert_eq!(printed(&url, &[&list[..], &["--quiet"]].concat(), OK).lines().count(), 2500);
    Ok(())
}

#[tokio::test]
async fn a_found_token_is_revoked_by_presenting_it() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "found").await?;
    let url = url_of_manager(&db)?;
    let [piped, filed] = [issue(&db.owner, "a", &[]).await?, issue(&db.owner, "a", &[]).await?];
    let revoke = ["token", "revoke", "--presented", "--reason=found", "--json"];
    for (input, code) in [(piped.token.as_str(), OK), (&piped.token, NO), ("junk", NO)] {
        let output = fed(&url, &revoke, format!("  {input}\n").as_bytes())?;
        expect(&output, &revoke, code);
    }
    assert_eq!(common::code(&db.web, &piped.token).await?, "REVOKED");

    let directory = tempfile::tempdir()?;
    Account::unprivileged()?.own(directory.path())?;
    let path = directory.path().join("token");
    std::fs::write(&path, &filed.token)?;
    let path = path.display().to_string();
    printed(&url, &["token", "verify", &path], OK);
    printed(&url, &["token", "revoke", "--presented", &path], OK);
    assert_eq!(common::code(&db.web, &filed.token).await?, "REVOKED");
    let reason: String = value(
        &db.owner,
        "select detail ->> 'reason' from tollgate.audit_log where event = 'token.revoked' order by id limit 1",
    )
    .await?;
    assert_eq!(reason, "found");
    Ok(())
}

#[tokio::test]
async fn input_that_is_not_a_token_is_refused_before_anything_is_tried() -> Result<()> {
    // Nothing listens there: a command that tried to connect would exit with another code.
    let url = "postgres://unused@127.0.0.1:1/nowhere";
    let book = "x".repeat(20_000);
    for input in ["", "\n  \n", &book] {
        for command in [&["token", "verify"][..], &["token", "revoke", "--presented"]] {
            let output = fed(url, command, input.as_bytes())?;
            expect(&output, command, USAGE);
        }
    }
    let failure = failure(url, &["token", "verify", "/nonexistent/token"], USAGE);
    assert!(failure.contains("/nonexistent/token"), "{failure}");
    Ok(())
}

/// In the hurry of a leak, people type a token where it does not belong. It is then in their shell's history; it must
/// not also reach the log of the program that ran the command.
#[tokio::test]
async fn a_token_given_as_an_argument_is_refused_and_not_repeated() -> Result<()> {
    let token = tollgate_core::token::issue(&tollgate_core::token::Prefix::default(), &[7; 40]);
    let token = token.token();
    let mut offenders = Vec::new();
    let as_file = format!("--presented={token}");
    let as_option = format!("--token={token}");
    for arguments in [
        &["token", "verify", token][..],
        &["token", "verify", &as_option],
        &["token", "derive", token, "--name=n"],
        &["token", "revoke", token],
        &["token", "revoke", "--presented", token],
        &["token", "revoke", &as_file],
        &["token", token],
        &[token],
    ] {
        let failure = failure("postgres://unused@127.0.0.1:1/nowhere", arguments, USAGE);
        if failure.contains(&token[8..]) {
            offenders.push(arguments.join(" ").replace(token, "TOKEN"));
        }
    }
    assert_eq!(offenders, Vec::<String>::new(), "these commands print the token");
    Ok(())
}

#[tokio::test]
async fn no_command_leaves_a_token_in_the_log_of_the_server() -> Result<()> {
    let cluster = Arc::new(common::start(
        Cluster::builder()
            .setting("log_statement", "all")
            .setting("log_min_duration_statement", "0")
            .setting("log_parameter_max_length_on_error", "-1"),
    )?);
    let db = Db::only(&cluster).await?;
    let url = url_of_manager(&db)?;
    // Without this, a role cannot keep its bind values out of the log.
    db.owner.batch_execute("grant set on parameter log_parameter_max_length to manager").await?;
    let issued = json_of(&url, &["token", "create", "--user=ann", "--name=n"], OK);
    let token = issued["token"].as_str().context("the token")?;
    expect(&fed(&url, &["token", "verify"], token.as_bytes())?, &["token", "verify"], OK);
    let too_long = format!("--reason={}", "x".repeat(1001));
    let failing = ["token", "revoke", "--presented", &too_long];
    let output = fed(&url, &failing, token.as_bytes())?;
    expect(&output, &failing, NO);
    assert!(!String::from_utf8_lossy(&output.stderr).contains(&token[8..]));
    let revoke = ["token", "revoke", "--presented"];
    expect(&fed(&url, &revoke, token.as_bytes())?, &revoke, OK);

    let log = cluster.log();
    for statement in
        ["create_api_token", "verify_api_token_hash", "revoke_presented_token", "a reason has at most"]
    {
        assert!(log.contains(statement), "this was to be logged: {statement}");
    }
    assert!(!log.contains(&token[8..]), "the server's log has the token");
    Ok(())
}

#[tokio::test]
async fn errors_of_the_server_are_shown_with_detail_and_hint() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "refusals").await?;
    let url = url_of_manager(&db)?;
    let create = ["token", "create", "--user=ann", "--name=n", "--scope=posts:read,nonsense,more:nonsense"];
    let text = failure(&url, &create, NO);
    for word in ["22023", "Option: --scope", "nonsense", "more:nonsense", "`tollgated scope define`"] {
        assert!(text.contains(word), "{word} in {text}");
    }
    // The operator may not create tokens.
    let text = failure(&db.url(), &["token", "create", "--user=a", "--name=n"], NO);
    assert!(text.contains("42501") && text.contains("permission denied"), "{text}");
    assert!(text.contains("SELECT tollgate.grant_capability('tollgated', 'issuer');"), "{text}");
    let expired = issue_with(&db.owner, "ann", "expires_in => '1 day'").await?;
    let id = expired.id.to_string();
    let text = failure(&db.url(), &["token", "revoke", &id], NO);
    assert!(text.contains("42501"), "{text}");
    Ok(())
}

#[tokio::test]
async fn a_token_is_shown_disabled_enabled_rotated_and_derived_from() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "managed").await?;
    db.owner
        .batch_execute("create role boss login; select tollgate.grant_capability('boss', 'admin')")
        .await?;
    let url = db.cluster.url("boss", &db.name);
    let create = ["token", "create", "--user=ann", "--name=ci", "--scope=posts:*", "--quiet"];
    let token = printed(&url, &create, OK).trim_end().to_owned();
    assert_eq!(code(&db.web, &token).await?, "VALID", "the token alone is printed");
    let id = printed(&url, &["token", "list", "--user=ann", "--quiet"], OK).trim_end().to_owned();

    let text = printed(&url, &["token", "show", &id], OK);
    for words in ["ann", "ci", "active", "posts:*", "created by"] {
        assert!(text.contains(words), "{words} in {text}");
    }
    assert!(!text.contains(&token[9..]) && !text.contains("revoked"), "{text}");
    assert_eq!(json_of(&url, &["token", "show", &id], OK)["user_id"], json!("ann"));
    let unknown = uuid::Uuid::new_v4().to_string();
    assert_eq!(json_of(&url, &["token", "show", &unknown], NO), Value::Null);

    for (command, code_, status) in [
        ("disable", OK, "DISABLED"),
        ("disable", NO, "DISABLED"),
        ("enable", OK, "VALID"),
        ("enable", NO, "VALID"),
    ] {
        printed(&url, &["token", command, &id, "--reason=for now"], code_);
        assert_eq!(code(&db.web, &token).await?, status, "{command}");
    }

    let derive = ["token", "derive", "--name=part", "--scope=posts:read", "--expires-in=1h", "--quiet"];
    let output = fed(&url, &derive, token.as_bytes())?;
    expect(&output, &derive, OK);
    let child = String::from_utf8(output.stdout)?.trim_end().to_owned();
    assert_eq!(common::Request::of(&child).requiring(&[Some("posts:read")]).code(&db.web).await?, "VALID");
    assert_eq!(
        common::Request::of(&child).requiring(&[Some("posts:write")]).code(&db.web).await?,
        "INSUFFICIENT_SCOPE"
    );

    let rotated = json_of(&url, &["token", "rotate", &id, "--grace=1h"], OK);
    let successor = rotated["token"].as_str().context("a token")?;
    assert_eq!(
        (code(&db.web, &token).await?, code(&db.web, successor).await?),
        ("VALID".into(), "VALID".into())
    );
    Ok(())
}

#[tokio::test]
async fn scopes_are_listed_defined_and_dropped() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "catalogued").await?;
    db.owner
        .batch_execute("create role keeper login; select tollgate.grant_capability('keeper', 'admin')")
        .await?;
    let url = db.cluster.url("keeper", &db.name);
    let defined = json_of(&url, &["scope", "define", "reports:read", "Read reports"], OK);
    assert_eq!(defined, json!({"defined": "reports:read"}));
    let listed = json_of(&url, &["scope", "list"], OK);
    let listed = listed.as_array().context("scopes")?;
    let ours = listed.iter().find(|scope| scope["name"] == "reports:read").context("the scope")?;
    assert_eq!((&ours["description"], &ours["defined_by"]), (&json!("Read reports"), &json!("keeper")));
    let text = printed(&url, &["scope", "list"], OK);
    assert!(text.contains("DESCRIPTION") && text.contains("Read reports"), "{text}");
    let names = printed(&url, &["scope", "list", "--quiet"], OK);
    assert!(names.lines().any(|line| line == "reports:read"), "{names}");
    assert_eq!(printed(&url, &["scope", "drop", "reports:read", "--quiet"], OK), "");
    let text = failure(&url, &["scope", "drop", "reports:read"], NO);
    assert!(text.contains("42704") && text.contains("`tollgated scope list`"), "{text}");
    Ok(())
}

/// The output of a command whose standard output is a terminal.
fn on_a_terminal(url: &str, arguments: &[&str], environment: &[(&str, &str)]) -> Result<String> {
    use std::io::Read as _;
    let terminal = nix::pty::openpty(None, None)?;
    let mut command = Tollgated::command(url)?;
    // If CI is set, colours are used on every terminal.
    command.args(arguments).env_remove("CI").envs(environment.iter().copied());
    command.stdin(Stdio::null()).stdout(terminal.slave).stderr(Stdio::null());
    let mut child = command.spawn()?;
    // The last holder of the other end; otherwise reading would never end.
    drop(command);
    let mut text = Vec::new();
    // On Linux it ends with an error when the other end is closed.
    let _ = std::fs::File::from(terminal.master).read_to_end(&mut text);
    ended(&mut child)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

#[tokio::test]
async fn colours_and_lines_are_for_terminals_that_want_them() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "coloured").await?;
    let url = url_of_manager(&db)?;
    issue(&db.owner, "ann", &[]).await?;
    let list = ["token", "list", "--user=ann"];
    let coloured = on_a_terminal(&url, &list, &[("TERM", "xterm")])?;
    assert!(coloured.contains("\u{1b}[") && coloured.contains('─'), "{coloured:?}");
    for environment in [("NO_COLOR", "1"), ("TERM", "dumb")] {
        let plain = on_a_terminal(&url, &list, &[("TERM", "xterm"), environment])?;
        assert!(!plain.contains('\u{1b}') && plain.contains("active"), "{environment:?} {plain:?}");
    }
    assert!(!printed(&url, &list, OK).contains('\u{1b}'));
    Ok(())
}

#[test]
fn completions_and_the_manual_page_know_every_command() {
    let manual = printed("", &["man"], OK);
    for shell in ["bash", "zsh", "fish"] {
        let script = printed("", &["completions", shell], OK);
        for word in
            ["token", "import", "dry-run", "patience", "completions", "webhook", "capability", "known-seal"]
        {
            assert!(script.contains(word), "{word} for {shell}");
        }
    }
    for word in [
        "TOLLGATED RUN",
        "TOLLGATED TOKEN IMPORT",
        "TOLLGATED SCOPE DEFINE",
        "TOLLGATED TOKEN UPDATE",
        "TOLLGATED USER REVOKE",
        "TOLLGATED WEBHOOK REPLAY",
        "TOLLGATED AUDIT VERIFY",
        "TOLLGATED CAPABILITY GRANT",
        "SIGUSR1",
        "token_hash",
        "flush\\-interval",
    ] {
        assert!(manual.contains(word), "{word} in the manual page");
    }
    let headings = manual.lines().filter(|line| line.starts_with("\\fB\\-\\-database\\-url\\fR"));
    assert_eq!(headings.count(), 1, "the common section appears once");
}

// ---- Usage

#[test]
fn a_wrong_command_line_says_what_is_wrong_and_tries_nothing() -> Result<()> {
    let url = "postgres://unused@127.0.0.1:1/nowhere";
    for (arguments, words) in [
        (&["frobnicate"][..], &["frobnicate"][..]),
        (&[], &["Usage"]),
        (&["token", "create"], &["--user", "--name"]),
        (&["token", "revoke"], &["ID", "--presented"]),
        (&["token", "revoke", "not-an-id"], &["not-an-id"]),
        (&["token", "create", "--user=a", "--name=n", "--metadata=[1]"], &["--metadata", "object"]),
        (&["token", "create", "--user=a", "--name=n", "--expires-in=soon"], &["--expires-in", "soon"]),
        (&["token", "verify", "--client-ip=here"], &["--client-ip", "here"]),
        (&["token", "update", "018f4a6e-0000-7000-8000-000000000000"], &["--name", "--clear"]),
        (&["token", "list", "--status=gone"], &["--status", "revoked"]),
        (&["token", "list", "--limit=0"], &["--limit"]),
        (&["webhook", "create", "hook"], &["URL", "--url-file"]),
        (&["webhook", "create", "hook", "https://example.com/", "--url-file=f"], &["--url-file"]),
        (&["audit", "verify", "--known-seal=1"], &["--known-hash"]),
        (&["audit", "verify", "--known-seal=1", "--known-hash=zz"], &["--known-hash", "64"]),
        (&["capability", "grant", "web", "king"], &["king", "verifier"]),
        (&["tail", "--since=-1"], &["--since"]),
        (&["tail", "--last=10001"], &["--last"]),
        (&["tail", "--last=1", "--since=1"], &["--since"]),
        (&["tail", "--batch-size=0"], &["--batch-size", "0"]),
        (&["run", "--flush-interval=5"], &["--flush-interval"]),
        (&["run", "--flush-interval=1ms"], &["--flush-interval", "100ms"]),
        (&["run", "--shutdown-grace=2days"], &["--shutdown-grace"]),
        (&["run", "--pid-file=/nonexistent/x.pid"], &["/nonexistent/x.pid"]),
        (&["cleanup", "--retention=-1s"], &["--retention"]),
        (&["status", "--log-level=loud,=x"], &["--log-level"]),
        (&["status", "--statement-timeout=1us"], &["--statement-timeout"]),
    ] {
        let failure = failure(url, arguments, USAGE);
        for word in words {
            assert!(failure.contains(word), "{arguments:?}: {word} in {failure}");
        }
    }
    Ok(())
}

#[test]
fn a_wrong_address_is_refused_without_repeating_the_password() -> Result<()> {
    for (url, words) in [
        ("", "DATABASE_URL"),
        ("postgres://u:s3cr3t@host:notaport/db", "port"),
        ("postgres://u:s3cr3t@/db", "host"),
        ("mysql://u:s3cr3t@host/db", "connection string"),
        ("postgres://u:s3cr3t@host/db?sslmode=sometimes", "sslmode"),
        ("host=h password=s3cr3t nonsense=1", "connection string"),
    ] {
        for command in ["status", "run", "tail"] {
            let failure = failure(url, &[command], USAGE);
            assert!(failure.contains(words), "{command}: {words} in {failure}");
            assert!(!failure.contains("s3cr3t"), "{failure}");
        }
    }
    Ok(())
}

#[test]
fn an_unreachable_server_is_distinguished_from_wrong_usage() -> Result<()> {
    let url = "postgres://u:s3cr3t@127.0.0.1:1/db";
    for command in [
        &["status"][..],
        &["check"],
        &["flush"],
        &["cleanup"],
        &["tail"],
        &["tail", "--follow"],
        &["token", "list", "--user=a"],
        &["token", "create", "--user=a", "--name=n"],
    ] {
        let failure = failure(url, command, UNAVAILABLE);
        assert!(failure.contains("127.0.0.1:1") && !failure.contains("s3cr3t"), "{failure}");
    }
    Ok(())
}

#[test]
fn help_and_version_need_no_database() -> Result<()> {
    for arguments in [&["--help"][..], &["run", "--help"], &["help", "token"], &["--version"]] {
        assert!(!printed("", arguments, OK).is_empty());
    }
    let help = printed("", &["--help"], OK);
    for word in
        ["64", "69", "75", "run", "tail", "status", "check", "flush", "cleanup", "token", "DATABASE_URL"]
    {
        assert!(help.contains(word), "{word} in {help}");
    }
    Ok(())
}

#[tokio::test]
async fn the_address_may_come_as_an_option_which_wins_over_the_environment() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "addresses").await?;
    let unreachable = "postgres://u@127.0.0.1:1/db";
    let socket = format!(
        "host={} port={} user={OPERATOR} dbname={}",
        db.cluster.socket_dir().display(),
        db.cluster.port(),
        db.name
    );
    for address in [db.url(), socket] {
        json_of(unreachable, &["flush", "--database-url", &address], OK);
        json_of(unreachable, &["--database-url", &address, "flush"], OK);
        json_of(&address, &["flush"], OK);
    }
    Ok(())
}
