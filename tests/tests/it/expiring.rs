//! `token.expiring`: told of ahead of time, once for each expiry.

use std::time::Duration;

use crate::common::{Shared, history, issue_with, refused, revoke, value};
use crate::operator::{self, Db};
use anyhow::Result;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use tollgate_tests::{Tollgated, eventually_async};
use uuid::Uuid;

static SHARED: Shared = Shared::new(&[]);

async fn db(name: &str) -> Result<Db> {
    Db::create(&SHARED.cluster()?, name).await
}

async fn announce(operator: &Client, notice: &str) -> Result<i64> {
    let sql = format!("select tollgate.announce_expiries('{notice}')");
    value(operator, &sql).await
}

/// How often it was announced.
async fn announced(owner: &Client, token: Uuid) -> Result<usize> {
    Ok(history(owner, token).await?.iter().filter(|(event, _)| event == "token.expiring").count())
}

#[tokio::test]
async fn a_token_is_announced_once_and_anew_when_its_expiry_changes() -> Result<()> {
    let db = db("once").await?;
    let soon = issue_with(&db.owner, "ann", "expires_in => '2 days'").await?;
    let later = issue_with(&db.owner, "ann", "expires_in => '20 days'").await?;
    let never = issue_with(&db.owner, "ann", "scopes => '{}'").await?;
    assert_eq!(announce(&db.operator, "7 days").await?, 1);
    assert_eq!(announce(&db.operator, "7 days").await?, 0);
    assert_eq!(announced(&db.owner, soon.id).await?, 1);
    let detail = history(&db.owner, soon.id).await?.pop().map(|(_, detail)| detail).unwrap_or_default();
    assert_eq!(detail["name"], "a test's");
    assert!(detail["expires_at"].is_string(), "{detail}");

    let change = "select from tollgate.update_api_token($1, jsonb_build_object('expires_at', now() + $2::text::interval))";
    db.owner.execute(change, &[&soon.id, &"3 days"]).await?;
    assert_eq!(announce(&db.operator, "7 days").await?, 1);
    assert_eq!(announced(&db.owner, soon.id).await?, 2);
    db.owner.execute(change, &[&soon.id, &"30 days"]).await?;
    assert_eq!(announce(&db.operator, "7 days").await?, 0);
    assert_eq!(announce(&db.operator, "21 days").await?, 1);
    assert_eq!((announced(&db.owner, later.id).await?, announced(&db.owner, never.id).await?), (1, 0));
    Ok(())
}

#[tokio::test]
async fn nobody_is_told_of_what_nobody_need_replace() -> Result<()> {
    let db = db("needless").await?;
    let revoked = issue_with(&db.owner, "ann", "expires_in => '1 day'").await?;
    assert!(revoke(&db.owner, revoked.id).await?);
    let rotated = issue_with(&db.owner, "ann", "expires_in => '30 days'").await?;
    db.owner.execute("select from tollgate.rotate_api_token($1, '1 hour')", &[&rotated.id]).await?;
    let parent = issue_with(&db.owner, "ann", "scopes => '{posts:read}'").await?;
    db.owner
        .execute(
            "select from tollgate.derive_api_token($1, 'one run', '{posts:read}', '5 minutes')",
            &[&parent.token],
        )
        .await?;
    // It is dealt with once, so that it is not in the way of others for as long as it lives.
    assert_eq!(announce(&db.operator, "7 days").await?, 1);
    assert_eq!(announce(&db.operator, "7 days").await?, 0);
    let told: i64 =
        value(&db.owner, "select count(*) from tollgate.audit_log where event = 'token.expiring'").await?;
    assert_eq!(told, 0);
    Ok(())
}

#[tokio::test]
async fn two_daemons_announce_a_token_once() -> Result<()> {
    let db = db("rivals").await?;
    for _ in 0..50 {
        issue_with(&db.owner, "ann", "expires_in => '1 day'").await?;
    }
    let other = db.session(operator::OPERATOR).await?;
    let batch = "select tollgate.announce_expiries('7 days', 7)";
    let mut total = 0;
    loop {
        let (one, two) = tokio::join!(value::<i64>(&db.operator, batch), value::<i64>(&other, batch));
        let round = one? + two?;
        total += round;
        if round == 0 {
            break;
        }
    }
    assert_eq!(total, 50);
    let events: i64 =
        value(&db.owner, "select count(*) from tollgate.audit_log where event = 'token.expiring'").await?;
    assert_eq!(events, 50);
    Ok(())
}

#[tokio::test]
async fn a_notice_or_batch_that_makes_no_sense_is_refused() -> Result<()> {
    let db = db("senseless").await?;
    for arguments in ["null", "'-1 day'", "'11 years'", "'1 day', 0", "'1 day', null"] {
        let sql = format!("select tollgate.announce_expiries({arguments})");
        refused(db.operator.execute(&sql, &[]).await, &SqlState::INVALID_PARAMETER_VALUE);
    }
    Ok(())
}

#[tokio::test]
async fn the_daemon_announces_ahead_of_time_unless_told_not_to() -> Result<()> {
    let db = db("daemon").await?;
    let token = issue_with(&db.owner, "ann", "expires_in => '3 days'").await?;
    let mut silent = Tollgated::spawn(&db.url(), &["run", "--expiry-notice=0"])?;
    eventually_async(Duration::from_secs(60), "the daemon to work", async || {
        silent.log().contains("token.created") || silent.log().contains("sealed the audit log")
    })
    .await;
    silent.terminate()?;
    silent.wait(Duration::from_secs(60))?;
    assert_eq!(announced(&db.owner, token.id).await?, 0);
    let _daemon = Tollgated::spawn(&db.url(), &["run"])?;
    eventually_async(Duration::from_secs(60), "the expiry to be announced", async || {
        announced(&db.owner, token.id).await.unwrap() == 1
    })
    .await;
    Ok(())
}
