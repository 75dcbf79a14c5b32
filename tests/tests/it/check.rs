//! `tollgated check` and `tollgate.deployment_health()`: problems are found, and the printed commands fix them.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::commands::{LONG, NO, OK, failure, json_of, printed};
use crate::common::{self, Shared, issue, refused, value};
use crate::operator::{Db, OPERATOR};
use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use tollgate_tests::{Cluster, DATABASE, Tollgated, eventually_async};

/// Settings of a real deployment that the tests omit for speed.
const DURABLE: [(&str, &str); 3] =
    [("fsync", "on"), ("full_page_writes", "on"), ("synchronous_commit", "on")];

static SHARED: Shared = Shared::new(&[
    ("fsync", "on"),
    ("full_page_writes", "on"),
    ("synchronous_commit", "on"),
    ("max_prepared_transactions", "5"),
    ("log_min_error_statement", "panic"),
]);

/// A daemon that has reported.
async fn serve(db: &Db) -> Result<Tollgated> {
    let daemon = Tollgated::spawn(&db.url(), &["run"])?;
    eventually_async(LONG, "a report of the daemon", async || {
        value::<i64>(&db.operator, "select count(*) from tollgate.daemons").await.unwrap() == 1
    })
    .await;
    Ok(daemon)
}

/// A row of `deployment_health`.
#[derive(Clone, Debug)]
struct Health {
    severity: String,
    detail: String,
    remedy: String,
}

/// The findings about an aspect, unless all is well.
async fn health(db: &Db, aspect: &str, patience: &str) -> Result<Vec<Health>> {
    let rows = db
        .operator
        .query(
            "select severity, detail, coalesce(remedy, '') from tollgate.deployment_health($1::text::interval)
             where aspect = $2 and severity <> 'ok'",
            &[&patience, &aspect],
        )
        .await?;
    Ok(rows
        .iter()
        .map(|row| Health { severity: row.get(0), detail: row.get(1), remedy: row.get(2) })
        .collect())
}

/// The only finding about an aspect.
async fn only(db: &Db, aspect: &str, patience: &str) -> Result<Health> {
    let mut found = health(db, aspect, patience).await?;
    assert_eq!(found.len(), 1, "{aspect}: {found:?}");
    found.pop().context("a finding")
}

async fn process(client: &Client) -> Result<i32> {
    value(client, "select pg_backend_pid()").await
}

/// The finding of this name.
fn finding(report: &Value, name: &str) -> Value {
    let findings = report["findings"].as_array().map(Vec::as_slice).unwrap_or_default();
    findings.iter().find(|finding| finding["name"] == name).cloned().unwrap_or_default()
}

#[tokio::test]
async fn check_passes_a_good_deployment() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "checked").await?;
    let _daemon = serve(&db).await?;
    let report = json_of(&db.url(), &["check"], OK);
    assert_eq!(report["ok"], json!(true));
    let findings = report["findings"].as_array().context("findings")?;
    for finding in findings {
        assert_eq!((&finding["verdict"], &finding["remedy"]), (&json!("ok"), &Value::Null), "{finding}");
    }
    let names: BTreeSet<&str> = findings.iter().filter_map(|finding| finding["name"].as_str()).collect();
    for name in [
        "pooler",
        "connection",
        "server",
        "role",
        "clock",
        "extension",
        "privileges",
        "library",
        "metering",
        "events",
        "daemons",
        "notifications",
        "transactions",
        "standbys",
        "tables",
        "indexes",
        "usage",
        "subscriptions",
        "issuers",
        "settings",
        "listen",
        "log",
        "statements",
        "auto_explain",
        "pg_stat_statements",
        "activity",
    ] {
        assert!(names.contains(name), "{name} in {names:?}");
    }
    let text = printed(&db.url(), &["check", "--strict"], OK);
    assert!(text.lines().all(|line| line.starts_with("ok")), "{text}");
    assert_eq!(printed(&db.url(), &["check", "--quiet"], OK), "");
    Ok(())
}

#[tokio::test]
async fn check_prints_how_to_fix_missing_privileges() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "granted").await?;
    let role = "\"Tollgate daemon\"";
    db.owner
        .batch_execute(&format!("create role {role} login; revoke usage on schema tollgate from public"))
        .await?;
    let url = db.cluster.url("Tollgate%20daemon", &db.name);
    let report = json_of(&url, &["check"], NO);
    assert_eq!(report["ok"], json!(false));
    let privileges = finding(&report, "privileges");
    assert_eq!(privileges["verdict"], json!("fail"), "{report}");
    assert!(printed(&url, &["check"], NO).contains("FAIL  privileges"));

    // A role with exactly these privileges can do all of it.
    db.owner.batch_execute(privileges["remedy"].as_str().context("a remedy")?).await?;
    let report = json_of(&url, &["check"], OK);
    assert_eq!(finding(&report, "privileges")["verdict"], json!("ok"), "{report}");
    let token = issue(&db.owner, "a", &[]).await?;
    db.owner.query_one("select code from tollgate.verify_api_token($1)", &[&token.token]).await?;
    assert_eq!(json_of(&url, &["flush"], OK)["uses"], json!(1));
    json_of(&url, &["cleanup"], OK);
    printed(&url, &["tail"], OK);

    db.owner.batch_execute(&format!("revoke execute on function tollgate.ack_usage from {role}")).await?;
    let privileges = finding(&json_of(&url, &["check"], NO), "privileges");
    assert_eq!(privileges["verdict"], json!("fail"), "{privileges}");
    db.owner.batch_execute(privileges["remedy"].as_str().context("a remedy")?).await?;
    assert_eq!(finding(&json_of(&url, &["check"], OK), "privileges")["verdict"], json!("ok"));
    Ok(())
}

#[tokio::test]
async fn check_finds_a_missing_extension_and_says_how_to_create_it() -> Result<()> {
    let cluster = Cluster::builder().extension(false).start()?;
    cluster.execute(DATABASE, "create role tollgated login")?;
    let url = cluster.url(OPERATOR, DATABASE);
    let report = json_of(&url, &["check"], NO);
    assert_eq!(report["ok"], json!(false));
    let extension = finding(&report, "extension");
    assert_eq!(extension["verdict"], json!("fail"), "{report}");
    assert!(extension["remedy"].as_str().is_some_and(|remedy| remedy.contains("CREATE EXTENSION tollgate")));
    for command in [&["status"][..], &["flush"], &["cleanup"], &["tail"]] {
        let failure = failure(&url, command, NO);
        assert!(failure.contains("CREATE EXTENSION tollgate"), "{command:?}: {failure}");
    }
    Ok(())
}

#[tokio::test]
async fn check_fails_a_server_without_preload_and_says_how_to_fix_it() -> Result<()> {
    let cluster = Arc::new(common::start(Cluster::builder().preload(false))?);
    let db = Db::only(&cluster).await?;
    let text = printed(&db.url(), &["check", "--quiet"], NO);
    assert!(!text.contains("ok    "), "{text}");
    assert!(text.contains("metering") && text.contains("shared_preload_libraries"), "{text}");
    Ok(())
}

#[tokio::test]
async fn check_warns_of_a_server_that_logs_tokens() -> Result<()> {
    let cluster = Arc::new(common::start(Cluster::builder().setting("log_min_duration_statement", "0"))?);
    let db = Db::only(&cluster).await?;
    let log = finding(&json_of(&db.url(), &["check"], OK), "log");
    assert_eq!(log["verdict"], json!("warn"), "{log}");
    let remedy = log["remedy"].as_str().context("a remedy")?;
    assert!(remedy.contains("web"), "{remedy}");
    db.owner.batch_execute(remedy).await?;
    let report = json_of(&db.url(), &["check"], OK);
    let (log, statements) = (finding(&report, "log"), finding(&report, "statements"));
    assert_eq!(log["verdict"], json!("ok"), "{log}");
    // Their texts are still logged.
    assert_eq!(statements["verdict"], json!("warn"), "{statements}");
    let detail = statements["detail"].as_str().context("a detail")?;
    assert!(detail.contains("log_min_duration_statement = 0 (") && detail.contains("web"), "{detail}");
    db.owner.batch_execute(statements["remedy"].as_str().context("a remedy")?).await?;
    assert_eq!(finding(&json_of(&db.url(), &["check"], OK), "statements")["verdict"], json!("ok"));
    Ok(())
}

#[tokio::test]
async fn check_warns_of_failing_statements_that_are_logged_until_they_are_not() -> Result<()> {
    let cluster = Arc::new(common::start(Cluster::builder())?);
    let db = Db::only(&cluster).await?;
    // A valid token that lacks a scope.
    let present = async || -> Result<String> {
        let token = issue(&db.owner, "a", &[]).await?.token;
        let web = db.session("web").await?;
        let refused =
            web.simple_query(&format!("select tollgate.authenticate('{token}', '{{posts:read}}')")).await;
        assert!(refused.is_err());
        Ok(token)
    };
    let exposed = present().await?;
    eventually_async(LONG, "the server to log the statement", async || cluster.log().contains(&exposed))
        .await;
    let statements = || finding(&json_of(&db.url(), &["check"], OK), "statements");
    let warned = statements();
    assert_eq!(warned["verdict"], json!("warn"), "{warned}");
    let detail = warned["detail"].as_str().context("a detail")?;
    assert!(detail.contains("log_min_error_statement = error (web)"), "{detail}");
    db.owner.batch_execute(warned["remedy"].as_str().context("a remedy")?).await?;
    assert_eq!(statements()["verdict"], json!("ok"));

    let hidden = present().await?;
    // It was refused, and the log is past it.
    let web = db.session("web").await?;
    assert!(web.simple_query("select 1 / (2 - 2)").await.is_err());
    eventually_async(LONG, "the next error to be logged", async || {
        cluster.log().contains("division by zero")
    })
    .await;
    assert!(!cluster.log().contains(&hidden));
    Ok(())
}

#[tokio::test]
async fn check_says_who_sees_the_statements_of_others() -> Result<()> {
    let cluster = Arc::new(common::start(
        Cluster::builder()
            .preload(false)
            .setting("shared_preload_libraries", "tollgate,pg_stat_statements")
            .setting("log_min_error_statement", "panic"),
    )?);
    let db = Db::only(&cluster).await?;
    let report = json_of(&db.url(), &["check"], OK);
    assert!(
        finding(&report, "activity")["detail"]
            .as_str()
            .is_some_and(|it| it.starts_with("none but superusers"))
    );
    let kept = finding(&report, "pg_stat_statements");
    assert_eq!(kept["verdict"], json!("warn"), "{kept}");
    db.owner.batch_execute("create role watcher login in role pg_monitor").await?;
    db.owner.batch_execute(kept["remedy"].as_str().context("a remedy")?).await?;
    let report = json_of(&db.url(), &["check"], OK);
    assert_eq!(finding(&report, "pg_stat_statements")["verdict"], json!("ok"));
    let activity = finding(&report, "activity");
    assert!(
        activity["detail"].as_str().is_some_and(|it| it.starts_with("watcher and superusers")),
        "{activity}"
    );
    Ok(())
}

#[tokio::test]
async fn check_names_the_capability_of_which_a_role_has_only_a_part() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "parts").await?;
    for (role, capability, function) in [
        ("part_verifier", "verifier", "tollgate.authenticate"),
        ("part_issuer", "issuer", "tollgate.create_api_token"),
        ("part_admin", "admin", "tollgate.define_scope"),
        ("part_operator", "operator", "tollgate.drain_usage"),
    ] {
        db.owner.batch_execute(&format!("create role {role} login")).await?;
        db.owner
            .execute("select tollgate.grant_capability($1::text::regrole, $2)", &[&role, &capability])
            .await?;
        let url = db.cluster.url(role, &db.name);
        let is_daemon = capability == "operator";
        let privileges = finding(&json_of(&url, &["check"], OK), "privileges");
        assert_eq!(privileges["verdict"], json!(if is_daemon { "ok" } else { "warn" }), "{privileges}");
        assert!(
            privileges["detail"].as_str().is_some_and(|detail| detail.contains(capability)),
            "{privileges}"
        );

        db.owner.batch_execute(&format!("revoke execute on function {function} from {role}")).await?;
        let report = json_of(&url, &["check"], if is_daemon { NO } else { OK });
        let findings = report["findings"].as_array().context("findings")?;
        let grants = format!("SELECT tollgate.grant_capability('{role}', '{capability}');");
        let partly: Vec<&Value> =
            findings.iter().filter(|finding| finding["remedy"] == json!(grants)).collect();
        assert_eq!(partly.len(), 1, "{report}");
        assert!(
            partly[0]["detail"].as_str().is_some_and(|detail| detail.contains(&format!("{function}("))),
            "{report}"
        );
        assert_eq!(report.to_string().matches("grant_capability(").count(), 1, "no other grant: {report}");
        db.owner.batch_execute(&grants).await?;
        assert_eq!(finding(&json_of(&url, &["check"], OK), "privileges"), privileges);
    }
    Ok(())
}

#[tokio::test]
async fn check_names_the_roles_whose_plans_auto_explain_writes() -> Result<()> {
    let cluster = Arc::new(common::start(Cluster::builder())?);
    let db = Db::only(&cluster).await?;
    let report =
        async || -> Result<Value> { Ok(finding(&json_of(&db.url(), &["check"], OK), "auto_explain")) };
    assert_eq!(report().await?["verdict"], json!("ok"));
    // Loaded for one role, and set to log for it: only that role's sessions would show it.
    db.owner.batch_execute("alter role web set session_preload_libraries = 'auto_explain'").await?;
    assert_eq!(report().await?["verdict"], json!("ok"));
    db.owner.batch_execute("alter role web set auto_explain.log_min_duration = '250ms'").await?;
    let parameters = cluster.major() >= 16;
    let warned = report().await?;
    let detail = warned["detail"].as_str().context("a detail")?;
    assert_eq!(warned["verdict"], json!("warn"), "{warned}");
    assert!(detail.contains("plans of web,") && !detail.contains("log_verbose"), "{warned}");
    assert_eq!(detail.contains("log_parameter_max_length"), parameters, "{warned}");
    db.owner
        .batch_execute(
            "alter role web set auto_explain.log_verbose = yes; alter role web set auto_explain.log_parameter_max_length = '0B'",
        )
        .await?;
    let warned = report().await?;
    let detail = warned["detail"].as_str().context("a detail")?;
    assert!(detail.contains("of web, with log_verbose") && !detail.contains("log_parameter"), "{warned}");
    // A role that passes no token does not matter.
    db.owner
        .batch_execute(
            "create role reporting login; alter role reporting set auto_explain.log_min_duration = 0",
        )
        .await?;
    let remedy = warned["remedy"].as_str().context("a remedy")?;
    assert!(!remedy.contains("reporting"), "{remedy}");
    db.owner.batch_execute(remedy).await?;
    assert_eq!(report().await?["verdict"], json!("ok"));

    // Loaded for the whole server.
    let cluster = Arc::new(common::start(
        Cluster::builder()
            .preload(false)
            .setting("shared_preload_libraries", "tollgate,auto_explain")
            .setting("auto_explain.log_min_duration", "1s"),
    )?);
    let db = Db::only(&cluster).await?;
    let warned = finding(&json_of(&db.url(), &["check"], OK), "auto_explain");
    assert_eq!(warned["verdict"], json!("warn"), "{warned}");
    db.owner.batch_execute(warned["remedy"].as_str().context("a remedy")?).await?;
    assert_eq!(finding(&json_of(&db.url(), &["check"], OK), "auto_explain")["verdict"], json!("ok"));
    Ok(())
}

#[tokio::test]
async fn check_names_where_transactions_may_change_their_identity() -> Result<()> {
    let cluster = Arc::new(common::start(Cluster::builder())?);
    let db = Db::only(&cluster).await?;
    let identity = || finding(&json_of(&db.url(), &["check"], OK), "identity");
    assert_eq!(identity()["verdict"], json!("ok"));
    let database: String = value(&db.owner, "select quote_ident(current_database())").await?;
    for (on, named) in [
        (format!("alter database {database} set tollgate.identity_changes = on"), "this database"),
        ("alter role web set tollgate.identity_changes = on".to_owned(), "role web"),
        (format!("alter role web in database {database} set tollgate.identity_changes = 'true'"), "role web"),
        ("alter role all set tollgate.identity_changes = on".to_owned(), "all roles"),
        (
            "alter system set tollgate.identity_changes = on; select pg_reload_conf()".to_owned(),
            "the whole server",
        ),
    ] {
        for statement in on.split("; ") {
            db.owner.batch_execute(statement).await?;
        }
        eventually_async(LONG, "the setting to be on", async || identity()["verdict"] == json!("warn")).await;
        let warned = identity();
        assert!(warned["detail"].as_str().is_some_and(|detail| detail.contains(named)), "{on}: {warned}");
        for statement in warned["remedy"].as_str().context("a remedy")?.split_inclusive(';') {
            db.owner.batch_execute(statement).await?;
        }
        eventually_async(LONG, "the setting to be off", async || identity()["verdict"] == json!("ok")).await;
    }
    // Off for a role needs no warning.
    db.owner.batch_execute("alter role web set tollgate.identity_changes = off").await?;
    assert_eq!(identity()["verdict"], json!("ok"));
    Ok(())
}

#[tokio::test]
async fn check_warns_while_no_daemon_serves_and_of_what_would_be_lost() -> Result<()> {
    let cluster = Arc::new(common::start(Cluster::builder().setting("synchronous_commit", "off"))?);
    let db = Db::only(&cluster).await?;
    let report = json_of(&db.url(), &["check"], OK);
    assert_eq!(finding(&report, "daemons")["verdict"], json!("warn"), "{report}");
    let text = printed(&db.url(), &["check", "--strict"], NO);
    for (setting, _) in DURABLE {
        let fixed = format!("ALTER SYSTEM SET {setting} = on; SELECT pg_reload_conf();");
        assert!(text.contains(&fixed), "{setting} in {text}");
    }
    Ok(())
}

// ---- The notification queue

/// Fills a share of the queue with notifications that are never read.
async fn fill(client: &Client, share: f64) -> Result<()> {
    for round in 0..1000 {
        let used: f64 = value(client, "select pg_notification_queue_usage()").await?;
        if used >= share {
            return Ok(());
        }
        let filler = "select count(pg_notify('filler', n || $1 || repeat('x', 7900))) from generate_series(1, $2::int) n";
        // A page each; few at first, so that a small queue does not overshoot the mark.
        let count = if round == 0 { 4 } else { 5000 };
        let count = if value::<i64>(client, QUEUE_PAGES).await? <= 1000 { 2 } else { count };
        client.execute(filler, &[&format!("-{round}-"), &count]).await?;
    }
    anyhow::bail!("the queue does not fill")
}

/// PostgreSQL 15 has no setting, but a million pages.
const QUEUE_PAGES: &str =
    "select coalesce(current_setting('max_notify_queue_pages', true), '1048576')::bigint";

/// A session that issued LISTEN, then opened a transaction and never ended it.
async fn stuck_listener(db: &Db) -> Result<(Client, i32)> {
    let session = db.session("web").await?;
    session.batch_execute("set application_name = 'forgotten'; listen filler").await?;
    session.batch_execute("begin; select 1 from pg_class limit 1").await?;
    let process = process(&session).await?;
    Ok((session, process))
}

#[tokio::test]
async fn check_names_the_listener_that_fills_the_notification_queue() -> Result<()> {
    let builder =
        DURABLE.iter().fold(Cluster::builder(), |builder, (name, value)| builder.setting(name, value));
    // The smallest possible.
    let small = tollgate_tests::Install::under_test()?.major >= 17;
    let builder = if small { builder.setting("max_notify_queue_pages", "64") } else { builder };
    let cluster = Arc::new(common::start(builder)?);
    let db = Db::only(&cluster).await?;
    let (mut stuck, stuck_process) = stuck_listener(&db).await?;
    // It does not hold the queue, which cannot be seen; but its transaction is shorter, so it is named after the other.
    let bystander = db.session("web").await?;
    bystander.batch_execute("begin; select 1 from pg_class limit 1").await?;
    assert_eq!(health(&db, "notifications", "5 minutes").await?.len(), 0);

    fill(&db.owner, 0.05).await?;
    let finding = only(&db, "notifications", "5 minutes").await?;
    assert_eq!(finding.severity, "warn", "{finding:?}");
    assert!(finding.detail.contains(&format!("process {stuck_process}")), "{finding:?}");
    assert!(
        finding.detail.contains("forgotten") && finding.detail.contains("idle in transaction"),
        "{finding:?}"
    );
    let report = json_of(&db.url(), &["check"], OK);
    assert_eq!(self::finding(&report, "notifications")["verdict"], json!("warn"), "{report}");
    // Access can still be taken away, and following what check prints restores the queue.
    let token = issue(&db.owner, "a", &[]).await?;
    common::revoke(&db.owner, token.id).await?;
    assert_eq!(finding.remedy, format!("SELECT pg_terminate_backend({stuck_process});"));
    bystander.batch_execute("rollback").await?;
    db.owner.batch_execute(&finding.remedy).await?;
    eventually_async(LONG, "the queue to be empty", async || {
        health(&db, "notifications", "5 minutes").await.unwrap().is_empty()
    })
    .await;
    assert!(stuck.query("select 1", &[]).await.is_err());
    assert_eq!(self::finding(&json_of(&db.url(), &["check"], OK), "notifications")["verdict"], json!("ok"));

    if small {
        // The situation that it warned of.
        (stuck, _) = stuck_listener(&db).await?;
        fill(&db.owner, 0.5).await?;
        assert_eq!(only(&db, "notifications", "5 minutes").await?.severity, "fail");
        json_of(&db.url(), &["check"], NO);
        let full = loop {
            if let Err(error) = fill(&db.owner, 1.0).await {
                break error;
            }
        };
        assert!(format!("{full:#}").contains("queue"), "{full:#}");
        let token = issue(&db.owner, "a", &[]).await?;
        common::revoke(&db.owner, token.id).await?;
        drop(stuck);
    }
    Ok(())
}

// ---- Long transactions

#[tokio::test]
async fn a_transaction_that_holds_the_cursors_is_named_with_the_command_to_end_it() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "lasting").await?;
    let writer = db.session("postgres").await?;
    writer.batch_execute("set application_name = 'a \"job\"'; begin; select pg_current_xact_id()").await?;
    let reader = db.session("postgres").await?;
    reader.batch_execute("begin isolation level repeatable read; select count(*) from pg_class").await?;
    // It holds nothing.
    let idle = db.session("postgres").await?;
    let idles = process(&idle).await?;
    idle.batch_execute("begin; select 1").await?;
    db.owner.batch_execute("begin; select pg_current_xact_id(); prepare transaction 'it''s mine'").await?;

    let (writers, readers) = (process(&writer).await?, process(&reader).await?);
    assert!(health(&db, "transactions", "1 hour").await?.is_empty());
    let found: Vec<Health> = health(&db, "transactions", "0").await?;
    let of = |words: &str| found.iter().find(|finding| finding.detail.contains(words));
    let finding = of(&format!("process {writers} ")).context("the writer")?;
    assert!(finding.detail.contains("cursors") && finding.detail.contains("'a \"job\"'"), "{finding:?}");
    assert_eq!(finding.remedy, format!("SELECT pg_terminate_backend({writers});"));
    let finding = of(&format!("process {readers} ")).context("the reader")?;
    assert!(finding.detail.contains("VACUUM") && !finding.detail.contains("cursors"), "{finding:?}");
    assert!(of(&format!("process {idles} ")).is_none(), "{found:?}");
    let finding = of("prepared").context("the prepared one")?;
    assert!(finding.remedy.starts_with("COMMIT PREPARED 'it''s mine';"), "{finding:?}");

    let report = json_of(&db.url(), &["check", "--patience=0s"], OK);
    assert_eq!(self::finding(&report, "transactions")["verdict"], json!("warn"), "{report}");
    db.owner.batch_execute("rollback prepared 'it''s mine'").await?;
    Ok(())
}

#[tokio::test]
async fn a_subscriber_that_is_behind_is_named_and_one_that_caught_up_is_not() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "behind").await?;
    for name in ["behind", "it's \"me\""] {
        db.operator.execute("select tollgate.open_subscription($1)", &[&name]).await?;
    }
    assert!(health(&db, "subscriptions", "0").await?.is_empty());
    issue(&db.owner, "a", &[]).await?;
    let found = health(&db, "subscriptions", "0").await?;
    assert_eq!(found.len(), 2, "{found:?}");
    assert!(health(&db, "subscriptions", "1 hour").await?.is_empty());
    // The printed command, after the hint, runs as it is.
    for finding in &found {
        let (_, statement) = finding.remedy.split_once("for good: ").context("a statement")?;
        db.owner.batch_execute(statement).await?;
    }
    assert!(health(&db, "subscriptions", "0").await?.is_empty());

    // Of another history, as after restoring an older state.
    db.operator.execute("select tollgate.open_subscription('lost')", &[]).await?;
    db.owner
        .batch_execute(
            "update tollgate.subscriptions set place.older_epoch = gen_random_uuid() where name = 'lost'",
        )
        .await?;
    assert_eq!(only(&db, "subscriptions", "1 hour").await?.severity, "fail");
    Ok(())
}

#[tokio::test]
async fn a_standby_that_lags_and_an_inactive_slot_are_reported() -> Result<()> {
    let cluster = Arc::new(common::start(Cluster::builder())?);
    let db = Db::only(&cluster).await?;
    let standby = cluster.standby()?;
    standby.catch_up_with(&cluster)?;
    assert!(health(&db, "standbys", "5 minutes").await?.is_empty());
    standby.execute(DATABASE, "select pg_wal_replay_pause()")?;
    db.owner.execute("select pg_create_physical_replication_slot('forgotten', true)", &[]).await?;
    // Five segments of 16 MB.
    for _ in 0..5 {
        db.owner
            .batch_execute("select pg_logical_emit_message(false, 'x', 'x'); select pg_switch_wal()")
            .await?;
    }
    let found = health(&db, "standbys", "5 minutes").await?;
    assert_eq!(found.len(), 2, "{found:?}");
    assert!(found[0].detail.starts_with("standby ") && found[0].detail.contains(" MB"), "{found:?}");
    assert!(found[1].detail.contains("forgotten"), "{found:?}");
    let (_, drop_slot) = found[1].remedy.split_once("for good: ").context("a statement")?;
    db.owner.batch_execute(drop_slot).await?;
    standby.execute(DATABASE, "select pg_wal_replay_resume()")?;
    eventually_async(LONG, "the standby to have caught up", async || {
        health(&db, "standbys", "5 minutes").await.unwrap().is_empty()
    })
    .await;
    Ok(())
}

// ---- Tables and indexes

#[tokio::test]
async fn dead_rows_bloat_and_disabled_settings_are_fixed_by_the_printed_commands() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "bloat").await?;
    db.owner
        .batch_execute(
            "alter table tollgate.api_tokens set (autovacuum_enabled = off);
             insert into tollgate.api_tokens (id, token_hash, user_id, name, scopes, metadata, hint)
                 select gen_random_uuid(), sha256(n::text::bytea), 'bulk', 'n', '{}', '{}', 'x' from generate_series(1, 200000) n;
             delete from tollgate.api_tokens where random() < 0.99",
        )
        .await?;
    let mut fixed = BTreeSet::new();
    // Each appears once the one before is fixed: VACUUM counts the rows that are left in the indexes.
    eventually_async(LONG, "nothing to be left to fix", async || {
        let found =
            [health(&db, "tables", "0").await.unwrap(), health(&db, "indexes", "0").await.unwrap()].concat();
        for finding in &found {
            db.owner.batch_execute(finding.remedy.split("; and").next().unwrap()).await.unwrap();
            fixed.insert(finding.remedy.clone());
        }
        found.is_empty() && fixed.len() >= 3
    })
    .await;
    for statement in [
        "ALTER TABLE tollgate.api_tokens RESET (autovacuum_enabled);",
        "VACUUM (ANALYZE) tollgate.api_tokens;",
        "REINDEX INDEX CONCURRENTLY tollgate.api_tokens_token_hash;",
    ] {
        assert!(fixed.contains(statement), "{statement} in {fixed:?}");
    }
    Ok(())
}

#[tokio::test]
async fn an_invalid_index_fails_the_check_until_it_is_built_again() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "invalid").await?;
    db.owner
        .batch_execute(
            "update pg_index set indisvalid = false where indexrelid = 'tollgate.api_tokens_user'::regclass",
        )
        .await?;
    json_of(&db.url(), &["check"], NO);
    let finding = only(&db, "indexes", "0").await?;
    assert_eq!(finding.severity, "fail");
    db.owner.batch_execute(&finding.remedy).await?;
    assert!(health(&db, "indexes", "0").await?.is_empty());
    Ok(())
}

#[tokio::test]
async fn a_sequence_that_runs_out_is_named() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "sequence").await?;
    db.owner
        .batch_execute("alter sequence tollgate.audit_log_id_seq maxvalue 1000; select setval('tollgate.audit_log_id_seq', 990)")
        .await?;
    let finding = only(&db, "tables", "0").await?;
    assert!(finding.detail.contains("audit_log_id_seq") && finding.detail.contains("99 %"), "{finding:?}");
    db.owner.batch_execute(&finding.remedy).await?;
    assert!(health(&db, "tables", "0").await?.is_empty());
    Ok(())
}

#[tokio::test]
async fn a_sequence_that_is_behind_its_table_fails_the_check_until_it_is_set() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "lagging_sequence").await?;
    let queued = "insert into tollgate.webhook_queue (id, webhook, event_epoch, event_id, event, body) select 7, 'w', 1, 1, 'x', '{}'";
    db.owner.batch_execute("select tollgate.define_webhook('w', 'https://example.com/')").await?;
    for (lag, sequence) in [
        ("select setval('tollgate.audit_log_id_seq', 1, false)", "audit_log_id_seq"),
        (queued, "webhook_queue_id_seq"),
    ] {
        db.owner.batch_execute(lag).await?;
        let report = json_of(&db.url(), &["check"], NO);
        assert!(report.to_string().contains(sequence), "{report}");
        let finding = only(&db, "tables", "0").await?;
        assert_eq!(finding.severity, "fail");
        assert!(finding.detail.contains(sequence), "{finding:?}");
        db.owner.batch_execute(&finding.remedy).await?;
        assert!(health(&db, "tables", "0").await?.is_empty());
    }
    Ok(())
}

// ---- Attached tables of users

#[tokio::test]
async fn an_attached_table_that_ends_no_tokens_fails_the_check_until_what_it_prints_was_done() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "users_tables").await?;
    db.owner
        .batch_execute(
            "create table people (id text primary key, gone boolean, plan text);
             create table parts (\"Id\" bigint primary key) partition by range (\"Id\");
             create table parts_1 partition of parts for values from (0) to (1000);
             select tollgate.attach_users_table('people', 'id', active => 'gone is not true');
             select tollgate.attach_users_table('parts', 'Id')",
        )
        .await?;
    assert!(health(&db, "users tables", "0").await?.is_empty());
    let listed = "select string_agg(t::text, ' ' order by t::text) from tollgate.list_users_tables() t";
    let before: String = value(&db.owner, listed).await?;
    for (change, named) in [
        (
            "alter table people disable trigger tollgate_user_changed",
            "tollgate_user_changed of public.people is disabled",
        ),
        ("alter table people disable trigger all", "is disabled"),
        (
            "alter table people enable replica trigger tollgate_user_deleted",
            "tollgate_user_deleted of public.people is disabled",
        ),
        (
            "alter table parts_1 disable trigger tollgate_user_deleted",
            "tollgate_user_deleted of public.parts_1 is disabled",
        ),
        (
            "drop trigger tollgate_user_deleted on people",
            "public.people lacks the trigger tollgate_user_deleted",
        ),
        // The other triggers still have its arguments.
        (
            "drop trigger tollgate_user_changed on people",
            "public.people lacks the trigger tollgate_user_changed",
        ),
        (
            "drop trigger tollgate_users_truncated on parts",
            "public.parts lacks the trigger tollgate_users_truncated",
        ),
        (
            "create table parts_2 partition of parts for values from (1000) to (2000)",
            "tollgate_users_truncated of its partition public.parts_2",
        ),
    ] {
        db.owner.batch_execute(change).await?;
        let found = health(&db, "users tables", "0").await?;
        assert!(!found.is_empty(), "{change}");
        for finding in &found {
            assert_eq!(finding.severity, "fail", "{change}: {finding:?}");
            assert!(finding.detail.contains(named), "{change}: {finding:?}");
            let remedy = finding.remedy.split("; and").next().unwrap_or_default();
            db.owner.batch_execute(remedy).await.with_context(|| remedy.to_owned())?;
        }
        assert!(health(&db, "users tables", "0").await?.is_empty(), "{change}");
        assert_eq!(value::<String>(&db.owner, listed).await?, before, "{change}");
    }
    // As pg_restore --disable-triggers leaves them.
    db.owner
        .batch_execute("alter table people enable trigger all; alter table parts enable trigger all")
        .await?;
    let found = health(&db, "users tables", "0").await?;
    for trigger in
        ["deletion_applied of public.people", "changed of public.people", "deleted of public.parts"]
    {
        let finding = found.iter().find(|finding| finding.detail.contains(trigger));
        let finding = finding.with_context(|| format!("{trigger}: {found:?}"))?;
        assert_eq!(finding.severity, "warn", "{finding:?}");
        let remedy = finding.remedy.split("; and").next().unwrap_or_default();
        db.owner.batch_execute(remedy).await.with_context(|| remedy.to_owned())?;
    }
    assert!(health(&db, "users tables", "0").await?.is_empty());
    // A column that can no longer be the key, or a condition that is no longer valid.
    db.owner
        .batch_execute("alter table people rename id to login; alter table people drop column gone")
        .await?;
    let finding = only(&db, "users tables", "0").await?;
    assert!(finding.detail.contains("gone") && finding.remedy.contains("'login'"), "{finding:?}");
    db.owner
        .batch_execute("select tollgate.attach_users_table('people', 'login', active => 'plan <> ''none''')")
        .await?;
    assert!(health(&db, "users tables", "0").await?.is_empty());
    db.owner.batch_execute("alter table people alter login type numeric using 1").await?;
    let finding = only(&db, "users tables", "0").await?;
    assert_eq!(finding.severity, "fail");
    assert!(finding.detail.contains("the key of a users table is"), "{finding:?}");
    json_of(&db.url(), &["check"], NO);
    db.owner.batch_execute("select tollgate.detach_users_table('people')").await?;
    assert!(health(&db, "users tables", "0").await?.is_empty());
    Ok(())
}

// ---- Arguments and privileges

#[tokio::test]
async fn patience_has_a_range_and_the_function_needs_a_grant() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "asked").await?;
    for patience in ["null", "'-1 s'"] {
        let call = format!("select tollgate.deployment_health({patience})");
        refused(db.operator.batch_execute(&call).await, &SqlState::INVALID_PARAMETER_VALUE);
    }
    refused(
        db.web.batch_execute("select tollgate.deployment_health()").await,
        &SqlState::INSUFFICIENT_PRIVILEGE,
    );
    // Other sessions' statements may contain tokens.
    let other = db.session("postgres").await?;
    let token = issue(&db.owner, "a", &[]).await?.token;
    other
        .batch_execute(&format!(
            "begin; set application_name = '{token}'; select pg_current_xact_id(); select '{token}'"
        ))
        .await?;
    let reported: String =
        value(&db.operator, "select string_agg(h::text, ' ') from tollgate.deployment_health('0') h").await?;
    assert!(reported.contains("process"), "{reported}");
    assert!(!reported.contains(&token[10..30]), "{reported}");
    Ok(())
}
