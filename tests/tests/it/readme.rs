//! The README keeps its word: its SQL runs, in its order, and says what the README says that it says; and its GRANTs let
//! each role do what they are for, and no more.

use crate::document;
use std::time::Duration;

use anyhow::Result;
use tollgate_core::token::{self, ENTROPY_LEN, Prefix};
use tollgate_tests::{Cluster, DATABASE, Tollgated, eventually};

const README: &str = include_str!("../../../README.md");

/// A fresh server on which all of the README's SQL has run, and what each block answered.
fn after_the_readme() -> Result<(Cluster, Vec<Vec<String>>)> {
    let cluster = Cluster::start()?;
    let answers = document::run(&cluster, document::blocks(README, "sql"))?;
    Ok((cluster, answers))
}

#[test]
fn its_sql_runs_in_its_order_and_answers_as_it_shows() -> Result<()> {
    let (_cluster, answers) = after_the_readme()?;
    let blocks = document::blocks(README, "sql");
    assert!(blocks.len() >= 10, "the README's blocks of SQL were not found");
    assert_eq!(answers.len(), blocks.len());
    for (block, answer) in blocks.iter().zip(&answers) {
        document::assert_answered(block, answer);
    }
    Ok(())
}

/// Each guide, on data of the other system's documented shape.
#[test]
fn the_guides_to_migrating_run_and_answer_as_they_show() -> Result<()> {
    let cluster = Cluster::start()?;
    let blocks = document::blocks(include_str!("../../../docs/migrating.md"), "sql");
    let answers = document::run(&cluster, blocks.iter().copied())?;
    assert!(blocks.len() >= 8 && answers.len() == blocks.len());
    // The first answers for the scopes, with nothing to see.
    for (block, answer) in blocks.iter().zip(&answers).skip(1) {
        document::assert_answered(block, answer);
    }
    Ok(())
}

#[tokio::test]
async fn its_roles_have_the_capabilities_that_it_says() -> Result<()> {
    let (cluster, _) = after_the_readme()?;
    let owner = cluster.connect("postgres", DATABASE).await?;
    let rows = owner
        .query(
            "select role || ' ' || capability || ' ' || state from tollgate.capability_grants order by 1",
            &[],
        )
        .await?;
    let held: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
    let expected = [
        "app verifier granted",
        "backoffice issuer granted",
        "boss admin granted",
        "tollgated operator granted",
    ];
    assert_eq!(held, expected);
    Ok(())
}

#[tokio::test]
async fn its_roles_do_their_work() -> Result<()> {
    let (cluster, _) = after_the_readme()?;
    let web = cluster.connect("backoffice", DATABASE).await?;
    let row = web
        .query_one("select id, token from tollgate.create_api_token('dan', 'web', '{posts:read}')", &[])
        .await?;
    let (id, secret): (uuid::Uuid, String) = (row.get(0), row.get(1));
    let listed = web.query("select * from tollgate.list_api_tokens('dan')", &[]).await?;
    assert_eq!(listed.len(), 1);

    let app = cluster.connect("app", DATABASE).await?;
    let verified = app.query_one("select code from tollgate.verify_api_token($1)", &[&secret]).await?;
    assert_eq!(verified.get::<_, &str>(0), "VALID");
    // As PostgREST makes it.
    app.batch_execute("begin read only").await?;
    let headers = serde_json::json!({ "x-api-key": secret }).to_string();
    app.query("select set_config('request.headers', $1, true)", &[&headers]).await?;
    app.query("select public.authenticate_request()", &[]).await?;
    let user = app.query_one("select tollgate.current_user_id()", &[]).await?;
    assert_eq!(user.get::<_, Option<&str>>(0), Some("dan"));
    app.batch_execute("commit; begin read only").await?;
    app.query("select public.authenticate_request()", &[]).await?;
    let user = app.query_one("select tollgate.current_user_id()", &[]).await?;
    assert_eq!(user.get::<_, Option<&str>>(0), None, "a request without a key has no identity");
    app.batch_execute("commit").await?;

    let boss = cluster.connect("boss", DATABASE).await?;
    boss.batch_execute("select tollgate.define_scope('posts:pin', 'Pin posts')").await?;
    boss.batch_execute("select tollgate.drop_scope('posts:pin')").await?;
    let seen = boss.query("select from tollgate.tokens where id = $1", &[&id]).await?;
    assert_eq!(seen.len(), 1);

    let url = cluster.url("tollgated", DATABASE);
    let check = Tollgated::run(&url, &["check"])?;
    assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stdout));
    let daemon = Tollgated::spawn(&url, &["run"])?;
    eventually(Duration::from_secs(30), "the daemon to flush the use of the token", || {
        let uses = format!("select use_count from tollgate.tokens where id = '{id}'");
        // By the application: its verification, and its authentication.
        cluster.value(DATABASE, &uses).is_ok_and(|uses| uses.as_deref() == Some("2"))
    });
    let status = Tollgated::run(&url, &["status"])?;
    assert!(status.status.success(), "{}", String::from_utf8_lossy(&status.stdout));
    daemon.terminate()
}

#[test]
fn after_its_settings_no_token_of_the_application_reaches_the_log() -> Result<()> {
    let (mut cluster, _) = after_the_readme()?;
    // Everything that can be logged is. Only bind values are at stake: whoever writes a token into a statement logs it.
    cluster.configure("log_statement", "all")?;
    cluster.configure("log_min_duration_statement", "0")?;
    cluster.configure("log_parameter_max_length", "-1")?;
    cluster.configure("log_parameter_max_length_on_error", "-1")?;
    eventually(Duration::from_secs(10), "the reload", || {
        cluster
            .value(DATABASE, "show log_min_duration_statement")
            .is_ok_and(|value| value.as_deref() == Some("0"))
    });
    cluster.execute(DATABASE, "create role careless login; grant app to careless")?;
    // Of the right form, and issued by nobody.
    let issued = token::issue(&Prefix::default(), &[0x5a; ENTROPY_LEN]);
    let (secret, body) = (issued.token(), "5a".repeat(ENTROPY_LEN));

    let present = |role: &str| -> Result<()> {
        let config = cluster.config(role, DATABASE);
        tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
            let (client, connection) = config.connect(tokio_postgres::NoTls).await?;
            tokio::spawn(connection);
            let row = client.query_one("select code from tollgate.verify_api_token($1)", &[&secret]).await?;
            assert_eq!(row.get::<_, &str>(0), "NOT_FOUND");
            let refused = client.query_one("select tollgate.authenticate($1)", &[&secret]).await;
            assert!(refused.is_err(), "nobody issued this token");
            anyhow::Ok(())
        })
    };
    present("app")?;
    assert!(cluster.log().contains("tollgate.verify_api_token($1)"), "the server logged the statements");
    assert!(!cluster.log().contains(&body), "the log holds a token");
    present("careless")?;
    assert!(cluster.log().contains(&body), "without the settings it would");
    Ok(())
}
