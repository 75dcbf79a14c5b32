//! Outcomes of verifications in the server's log: what a line contains, what it never contains, and how many there may
//! be.

use std::time::Duration;

use crate::common::{self, authenticate, code, issue, refused, revoke, value};
use anyhow::{Context as _, Result};
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use tollgate_tests::{Builder, Cluster, DATABASE, eventually_async};

const LONG: Duration = Duration::from_secs(30);

async fn start(builder: Builder) -> Result<(Cluster, Client, Client)> {
    let cluster = common::start(builder)?;
    let owner = cluster.connect("postgres", DATABASE).await?;
    let web = cluster.connect("web", DATABASE).await?;
    Ok((cluster, owner, web))
}

fn logging(what: &str) -> Builder {
    Cluster::builder().setting("tollgate.log_verifications", what)
}

/// The lines about verifications, without the server's line prefix.
fn lines(cluster: &Cluster) -> Vec<String> {
    const MARK: &str = "LOG:  tollgate: ";
    cluster.log().lines().filter_map(|line| line.split_once(MARK)).map(|(_, line)| line.to_owned()).collect()
}

fn outcomes(cluster: &Cluster) -> Vec<String> {
    let code = |line: &str| Some(line.split_once("code=")?.1.split(' ').next()?.to_owned());
    lines(cluster).iter().filter_map(|line| code(line)).collect()
}

#[tokio::test]
async fn nothing_is_logged_unless_asked_for_and_then_failures_or_all() -> Result<()> {
    let (cluster, owner, web) = start(Cluster::builder()).await?;
    let (good, bad) = (issue(&owner, "ann", &["posts:read"]).await?, issue(&owner, "ann", &[]).await?);
    revoke(&owner, bad.id).await?;
    let each = async || -> Result<()> {
        code(&web, &good.token).await?;
        code(&web, &bad.token).await?;
        code(&web, "junk").await?;
        authenticate(&web, &good.token).await?;
        refused(authenticate(&web, &bad.token).await, &SqlState::INVALID_AUTHORIZATION_SPECIFICATION);
        // A pure check is not a use, but guesses can be made through it.
        let _: bool =
            web.query_one("select tollgate.token_has_scope($1, 'posts:read')", &[&bad.token]).await?.get(0);
        Ok(())
    };
    each().await?;
    assert_eq!(lines(&cluster), [""; 0]);
    let set = async |what: &str| -> Result<()> {
        owner.batch_execute(&format!("alter system set tollgate.log_verifications = '{what}'")).await?;
        owner.batch_execute("select pg_reload_conf()").await?;
        eventually_async(LONG, "the setting to arrive", async || {
            value::<String>(&web, "show tollgate.log_verifications").await.unwrap() == what
        })
        .await;
        Ok(())
    };
    set("failures").await?;
    each().await?;
    assert_eq!(outcomes(&cluster), ["REVOKED", "MALFORMED", "REVOKED", "REVOKED"]);
    set("all").await?;
    each().await?;
    assert_eq!(outcomes(&cluster)[4..], ["VALID", "REVOKED", "MALFORMED", "VALID", "REVOKED", "REVOKED"]);
    let wrong = owner.batch_execute("set tollgate.log_verifications = sometimes").await;
    refused(wrong, &SqlState::INVALID_PARAMETER_VALUE);
    for setting in ["log_verifications = off", "max_logged_verifications = 1"] {
        let error = common::error(web.batch_execute(&format!("set tollgate.{setting}")).await);
        assert!(
            [&SqlState::INSUFFICIENT_PRIVILEGE, &SqlState::CANT_CHANGE_RUNTIME_PARAM].contains(&error.code()),
            "{error:?}"
        );
    }
    Ok(())
}

#[tokio::test]
async fn a_line_says_which_token_from_where_and_for_what() -> Result<()> {
    let (cluster, owner, web) = start(logging("all")).await?;
    let token = issue(&owner, "ann", &["posts:read"]).await?;
    let verify = "select tollgate.verify_api_token($1, $2, $3::text::inet)";
    for (required, ip) in [
        (Some(vec!["posts:read", "posts:write"]), Some("203.0.113.7")),
        (Some(vec![]), Some("2001:db8::7")),
        (None, None),
    ] {
        web.execute(verify, &[&token.token, &required, &ip]).await?;
    }
    let id = token.id;
    assert_eq!(
        lines(&cluster),
        [
            format!(
                "verification code=INSUFFICIENT_SCOPE token_id={id} client_ip=203.0.113.7 required=posts:read,posts:write reason=-"
            ),
            format!("verification code=VALID token_id={id} client_ip=2001:db8::7 required=- reason=-"),
            format!("verification code=VALID token_id={id} client_ip=- required=- reason=-"),
        ]
    );
    Ok(())
}

#[tokio::test]
async fn a_line_holds_neither_token_nor_statement_nor_anything_that_was_smuggled_in() -> Result<()> {
    // These settings make PostgreSQL add everything it can to a line.
    let builder = logging("all")
        .setting("log_min_error_statement", "debug5")
        .setting("log_parameter_max_length_on_error", "-1")
        .setting("log_error_verbosity", "verbose");
    let (cluster, owner, _) = start(builder).await?;
    let token = issue(&owner, "ann", &[]).await?;
    let (web, mut notices) = cluster.listen("web", DATABASE).await?;
    web.batch_execute("set client_min_messages = log").await?;
    let mut hostile = vec![
        Some("x\nLOG:  tollgate: verification code=VALID"),
        Some("\u{1b}[31m\u{202e} required=\"y\""),
        Some(token.token.as_str()),
        None,
    ];
    let long = "a:".repeat(5000);
    hostile.push(Some(&long));
    hostile.extend([Some("more"); 20]);
    // In a function, which has a context, and with the token as a bind value.
    web.query("select v.code from tollgate.verify_api_token($1, $2) v", &[&token.token, &hostile]).await?;
    owner.execute("do $$ begin perform tollgate.verify_api_token('in a literal'); end $$", &[]).await?;
    let log = cluster.log();
    let about = lines(&cluster);
    assert_eq!(about.len(), 0, "with verbose errors the SQLSTATE comes in between");
    let written: Vec<&str> = log.lines().filter(|line| line.contains("tollgate: verification")).collect();
    assert_eq!(written.len(), 2, "{written:?}");
    assert!(written[0].len() < 1000, "{}", written[0]);
    assert!(written[0].ends_with(",more,more,more,…17 more reason=-"), "{}", written[0]);
    assert!(!written[0].contains(['\u{1b}', '"', '\u{202e}']), "{}", written[0]);
    for start in 0..token.token.len() - 16 {
        assert!(!log.contains(&token.token[start..start + 16]), "a part of the token in {log}");
    }
    for word in ["STATEMENT", "CONTEXT", "literal", "unnamed portal"] {
        assert!(!log.contains(word), "{word} in {log}");
    }
    web.batch_execute("select 1").await?;
    assert!(notices.try_recv().is_err(), "the client gets no message");
    Ok(())
}

#[tokio::test]
async fn a_client_that_presents_tokens_cannot_fill_the_log() -> Result<()> {
    let (cluster, _, web) =
        start(logging("failures").setting("tollgate.max_logged_verifications", "1")).await?;
    let mut presented = 5000;
    let many = format!(
        "select count(*) from generate_series(1, {presented}) n, tollgate.verify_api_token('junk' || n)"
    );
    assert_eq!(value::<i64>(&web, &many).await?, presented);
    // The limit is the whole server's: another session does not raise it.
    for _ in 0..30 {
        let session = cluster.connect("web", DATABASE).await?;
        code(&session, "junk").await?;
        presented += 1;
    }
    assert!(lines(&cluster).len() < 30, "{} lines", lines(&cluster).len());
    let before = lines(&cluster).len();
    eventually_async(LONG, "the next line", async || {
        code(&web, "junk").await.unwrap();
        presented += 1;
        lines(&cluster).len() > before
    })
    .await;
    let left_out: i64 = lines(&cluster)
        .iter()
        .filter_map(|line| {
            line.strip_suffix(
                " verifications were not logged, because tollgate.max_logged_verifications is 1",
            )
        })
        .map(|count| count.parse::<i64>().context("a number"))
        .sum::<Result<i64>>()?;
    assert_eq!(i64::try_from(outcomes(&cluster).len())? + left_out, presented, "each is logged or counted");
    Ok(())
}

#[tokio::test]
async fn a_standby_logs_and_so_does_a_server_that_did_not_preload_the_library() -> Result<()> {
    let (cluster, owner, _) = start(logging("all")).await?;
    let token = issue(&owner, "ann", &[]).await?;
    let standby = cluster.standby()?;
    standby.catch_up_with(&cluster)?;
    code(&standby.connect("web", DATABASE).await?, &token.token).await?;
    assert_eq!(outcomes(&standby), ["VALID"]);

    let (cluster, _, web) =
        start(logging("all").preload(false).setting("tollgate.max_logged_verifications", "2")).await?;
    let many = "select count(*) from generate_series(1, 1000) n, tollgate.verify_api_token('junk' || n)";
    assert_eq!(value::<i64>(&web, many).await?, 1000);
    let lines = outcomes(&cluster).len();
    assert!((2..100).contains(&lines), "{lines} lines");
    Ok(())
}
