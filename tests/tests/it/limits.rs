//! Rate limits: of tokens, of users, and of failed attempts from one address. They are exact under concurrency, survive
//! a rollback, and refuse where they cannot be kept.
//!
//! Windows are a day long, so that no test depends on how fast it runs: the allowance does not come back meanwhile.

use std::sync::Arc;
use std::time::Duration;

use crate::common::{
    self, Request, Shared, Token, World, authenticate, code, database, derive, issue, issue_with, refused,
    revoke, rotate, update, value,
};
use anyhow::{Context as _, Result};
use serde_json::json;
use tokio::task::JoinSet;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use tollgate_tests::{Cluster, DATABASE, eventually_async};

static SHARED: Shared = Shared::new(&[]);

const DAY: &str = "rate_window => '1 day'";

/// How many of `times` verifications are accepted; the others must be over the limit.
async fn accepted(client: &Client, request: Request<'_>, times: usize) -> Result<usize> {
    let mut accepted = 0;
    for _ in 0..times {
        match request.code(client).await?.as_str() {
            "VALID" => accepted += 1,
            "RATE_LIMITED" => {}
            other => anyhow::bail!("{other}"),
        }
    }
    Ok(accepted)
}

/// A separate database with settings, and a session of `web` there.
async fn with_settings(cluster: &Cluster, name: &str, settings: &[(&str, &str)]) -> Result<(Client, Client)> {
    database(cluster, name)?;
    for (setting, value) in settings {
        cluster.execute(name, &format!("alter database {name} set {setting} = '{value}'"))?;
    }
    Ok((cluster.connect("postgres", name).await?, cluster.connect("web", name).await?))
}

/// Unflushed uses and denials of a token. They are drained, and stay in memory.
async fn counted(owner: &Client, token: &Token) -> Result<(i64, i64)> {
    let drained = "select uses, denials from tollgate.drain_usage() where token_id = $1";
    let row = owner.query_opt(drained, &[&token.id]).await?.context("the token is not counted")?;
    Ok((row.get(0), row.get(1)))
}

// ---- Of a token

#[tokio::test]
async fn the_limit_passes_at_once_and_the_row_says_what_is_left_and_how_long_to_wait() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    let token = issue_with(&owner, "says", "rate_limit => 3, rate_window => '1 day'").await?;
    for left in [2, 1, 0] {
        let answer = Request::of(&token.token).verify(&web).await?;
        assert_eq!((answer.code.as_str(), answer.user_id.as_deref()), ("VALID", Some("says")));
        assert_eq!(
            (answer.rate_limit, answer.rate_remaining, answer.retry_after),
            (Some(3), Some(left), None)
        );
    }
    let answer = Request::of(&token.token).verify(&web).await?;
    assert_eq!((answer.valid, answer.code.as_str()), (false, "RATE_LIMITED"));
    assert_eq!((answer.rate_limit, answer.rate_remaining), (Some(3), Some(0)));
    assert_eq!((answer.token_id, answer.user_id, answer.scopes), (Some(token.id), None, None));
    let wait =
        format!("select '{}'::interval between '07:00:00' and '08:00:00'", answer.retry_after.unwrap());
    assert!(value::<bool>(&owner, &wait).await?, "{wait}");

    let unlimited = issue(&owner, "says", &[]).await?;
    let answer = Request::of(&unlimited.token).verify(&web).await?;
    assert_eq!((answer.rate_limit, answer.rate_remaining, answer.retry_after), (None, None, None));
    Ok(())
}

#[tokio::test]
async fn the_allowance_comes_back_with_time() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    let token = issue_with(&owner, "back", "rate_limit => 1, rate_window => '0.3 seconds'").await?;
    assert_eq!(code(&web, &token.token).await?, "VALID");
    eventually_async(Duration::from_secs(30), "the token to be admitted again", async || {
        code(&web, &token.token).await.is_ok_and(|code| code == "VALID")
    })
    .await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn sixteen_sessions_together_get_exactly_the_limit() -> Result<()> {
    let World { owner, cluster, .. } = SHARED.world().await?;
    let token = Arc::new(issue_with(&owner, "sixteen", &format!("rate_limit => 500, {DAY}")).await?);
    let mut sessions = JoinSet::new();
    for _ in 0..16 {
        let (web, token) = (cluster.connect("web", DATABASE).await?, Arc::clone(&token));
        sessions.spawn(async move { accepted(&web, Request::of(&token.token), 100).await });
    }
    let mut sum = 0;
    while let Some(accepted) = sessions.join_next().await {
        sum += accepted??;
    }
    assert_eq!(sum, 500, "of 1600");
    assert_eq!(counted(&owner, &token).await?, (500, 1100));
    Ok(())
}

/// Under load for a while, with an allowance that comes back: the times are the server's own.
#[tokio::test(flavor = "multi_thread")]
async fn no_stretch_of_time_sees_more_than_the_limit_and_its_share() -> Result<()> {
    const LIMIT: usize = 40;
    const WINDOW: f64 = 0.4;
    let World { owner, cluster, .. } = SHARED.world().await?;
    let arguments = format!("rate_limit => {LIMIT}, rate_window => '{WINDOW} seconds'");
    let token = Arc::new(issue_with(&owner, "stretch", &arguments).await?);
    let mut sessions = JoinSet::new();
    for _ in 0..16 {
        let (web, token) = (cluster.connect("web", DATABASE).await?, Arc::clone(&token));
        sessions.spawn(async move {
            // Before and after each verification: it was charged in between.
            let sql = "select extract(epoch from clock_timestamp())::float8,
                              (tollgate.verify_api_token($1)).valid, extract(epoch from clock_timestamp())::float8";
            let mut admitted = Vec::new();
            for _ in 0..400 {
                let row = web.query_one(sql, &[&token.token]).await?;
                if row.get(1) {
                    admitted.push((row.get::<_, f64>(0), row.get::<_, f64>(2)));
                }
            }
            anyhow::Ok(admitted)
        });
    }
    let mut admitted = Vec::new();
    while let Some(of_session) = sessions.join_next().await {
        admitted.extend(of_session??);
    }
    assert!(admitted.len() > LIMIT, "the allowance came back: {}", admitted.len());
    for (start, _) in &admitted {
        // Those that certainly fell into a period that begins here.
        let mut ends: Vec<f64> =
            admitted.iter().filter(|(before, _)| before >= start).map(|(_, after)| *after).collect();
        ends.sort_by(f64::total_cmp);
        for (earlier, end) in ends.iter().enumerate() {
            let share = (end - start) / WINDOW * LIMIT as f64;
            assert!(
                (earlier + 1) as f64 <= LIMIT as f64 + share + 1e-3,
                "{} in {} s",
                earlier + 1,
                end - start
            );
        }
    }
    Ok(())
}

#[tokio::test]
async fn only_what_passed_every_other_check_is_charged() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    let arguments =
        format!("scopes => '{{posts:read}}', allowed_ips => '{{10.0.0.0/8}}', rate_limit => 1, {DAY}");
    let token = issue_with(&owner, "order", &arguments).await?;
    let good = Request::of(&token.token).coming_from("10.1.1.1");
    let write = [Some("posts:write")];
    for _ in 0..3 {
        let scopeless = good.requiring(&write).verify(&web).await?;
        assert_eq!((scopeless.code.as_str(), scopeless.rate_limit), ("INSUFFICIENT_SCOPE", None));
        assert_eq!(Request::of(&token.token).code(&web).await?, "IP_NOT_ALLOWED");
        let pure: bool =
            web.query_one("select tollgate.token_has_scope($1, 'posts:read')", &[&token.token]).await?.get(0);
        assert!(!pure, "without an address it is not valid");
    }
    assert_eq!(accepted(&web, good, 5).await?, 1);
    assert_eq!(good.requiring(&write).code(&web).await?, "INSUFFICIENT_SCOPE", "the limit is asked last");
    revoke(&owner, token.id).await?;
    assert_eq!(good.code(&web).await?, "REVOKED");
    Ok(())
}

#[tokio::test]
async fn a_pure_check_of_a_scope_neither_charges_nor_is_limited() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    let token =
        issue_with(&owner, "pure", &format!("scopes => '{{posts:read}}', rate_limit => 1, {DAY}")).await?;
    let has_scope = async || -> Result<bool> {
        Ok(web.query_one("select tollgate.token_has_scope($1, 'posts:read')", &[&token.token]).await?.get(0))
    };
    assert!(has_scope().await? && has_scope().await?);
    assert_eq!(accepted(&web, Request::of(&token.token), 3).await?, 1);
    assert!(has_scope().await?);
    Ok(())
}

#[tokio::test]
async fn a_charge_outlives_the_rollback_of_its_transaction() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    let token = issue_with(&owner, "rollback", &format!("rate_limit => 2, {DAY}")).await?;
    web.batch_execute("begin").await?;
    authenticate(&web, &token.token).await?;
    web.batch_execute("savepoint s").await?;
    authenticate(&web, &token.token).await?;
    web.batch_execute("rollback to s; rollback").await?;
    assert_eq!(code(&web, &token.token).await?, "RATE_LIMITED");
    Ok(())
}

#[tokio::test]
async fn authenticate_raises_53400_and_says_when_to_retry() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    let token = issue_with(&owner, "raises", "rate_limit => 1, rate_window => '1 day'").await?;
    web.batch_execute("begin").await?;
    authenticate(&web, &token.token).await?;
    let error = refused(authenticate(&web, &token.token).await, &SqlState::CONFIGURATION_LIMIT_EXCEEDED);
    let detail: serde_json::Value = serde_json::from_str(error.detail().context("a detail")?)?;
    assert_eq!(detail["code"], "RATE_LIMITED");
    assert!((80_000.0..=86_400.0).contains(&detail["retry_after"].as_f64().context("seconds")?), "{detail}");
    let hint = error.hint().context("a hint")?;
    let seconds: u32 = hint
        .strip_prefix("Try again in ")
        .and_then(|rest| rest.strip_suffix(" s."))
        .with_context(|| hint.to_owned())?
        .parse()?;
    assert!((80_000..=86_400).contains(&seconds), "{hint}");
    web.batch_execute("rollback").await?;
    assert_eq!(common::identity(&web).await?, None);
    Ok(())
}

#[tokio::test]
async fn a_changed_limit_holds_at_the_next_verification() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    let token = issue(&owner, "changed", &[]).await?;
    let request = Request::of(&token.token);
    assert_eq!(accepted(&web, request, 20).await?, 20);
    update(&owner, token.id, &json!({"rate_limit": 5, "rate_window": "1 day"})).await?;
    assert_eq!(accepted(&web, request, 20).await?, 5, "what was used without a limit is not charged");
    update(&owner, token.id, &json!({"rate_limit": 8, "rate_window": "1 day"})).await?;
    assert_eq!(accepted(&web, request, 20).await?, 0, "a spent allowance stays spent");
    update(&owner, token.id, &json!({"rate_limit": null})).await?;
    assert_eq!(accepted(&web, request, 20).await?, 20);
    Ok(())
}

#[tokio::test]
async fn derived_tokens_of_a_limited_one_have_its_limit_each() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    let token =
        issue_with(&owner, "family", &format!("scopes => '{{posts:*}}', rate_limit => 4, {DAY}")).await?;
    let child = derive(&owner, &token, &["posts:read"]).await?;
    let successor = rotate(&owner, token.id, "1 hour").await?;
    for one in [&token, &child, &successor] {
        assert_eq!(accepted(&web, Request::of(&one.token), 10).await?, 4);
    }
    Ok(())
}

#[tokio::test]
async fn an_imported_token_is_limited_too() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    let import =
        format!("select tollgate.import_api_token('imported', 'n', sha256('known'), rate_limit => 2, {DAY})");
    owner.batch_execute(&import).await?;
    let verify = "select code from tollgate.verify_api_token_hash(sha256('known'))";
    let mut codes = Vec::new();
    for _ in 0..3 {
        codes.push(value::<String>(&web, verify).await?);
    }
    assert_eq!(codes, ["VALID", "VALID", "RATE_LIMITED"]);
    Ok(())
}

// ---- Of a user

#[tokio::test]
async fn all_tokens_of_a_user_share_the_users_limit() -> Result<()> {
    let cluster = SHARED.cluster()?;
    let settings = [("tollgate.user_rate_limit", "10"), ("tollgate.user_rate_window", "1d")];
    let (owner, web) = with_settings(&cluster, "per_user", &settings).await?;
    let (one, two) = (issue(&owner, "u", &[]).await?, issue(&owner, "u", &[]).await?);
    let other = issue(&owner, "v", &[]).await?;
    assert_eq!(accepted(&web, Request::of(&one.token), 6).await?, 6);
    let answer = Request::of(&two.token).verify(&web).await?;
    assert_eq!((answer.rate_limit, answer.rate_remaining), (Some(10), Some(3)));
    assert_eq!(accepted(&web, Request::of(&two.token), 6).await?, 3);
    let answer = Request::of(&one.token).verify(&web).await?;
    assert_eq!(
        (answer.code.as_str(), answer.rate_limit, answer.rate_remaining),
        ("RATE_LIMITED", Some(10), Some(0))
    );
    assert!(answer.retry_after.is_some());
    assert_eq!(accepted(&web, Request::of(&other.token), 3).await?, 3, "another user has an own allowance");
    assert_eq!(counted(&owner, &one).await?, (6, 1));
    Ok(())
}

#[tokio::test]
async fn uses_refused_by_a_tokens_own_limit_are_not_charged_to_its_user() -> Result<()> {
    let cluster = SHARED.cluster()?;
    let settings = [("tollgate.user_rate_limit", "10"), ("tollgate.user_rate_window", "1d")];
    let (owner, web) = with_settings(&cluster, "per_user_and_token", &settings).await?;
    let limited = issue_with(&owner, "u", &format!("rate_limit => 2, {DAY}")).await?;
    let free = issue(&owner, "u", &[]).await?;
    let answer = Request::of(&limited.token).verify(&web).await?;
    assert_eq!(
        (answer.rate_limit, answer.rate_remaining),
        (Some(2), Some(1)),
        "of the limit with the least left"
    );
    assert_eq!(accepted(&web, Request::of(&limited.token), 50).await?, 1);
    assert_eq!(accepted(&web, Request::of(&free.token), 50).await?, 8);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn sixteen_sessions_of_one_user_get_exactly_the_users_limit() -> Result<()> {
    let cluster = SHARED.cluster()?;
    let settings = [("tollgate.user_rate_limit", "300"), ("tollgate.user_rate_window", "1d")];
    let (owner, _) = with_settings(&cluster, "per_user_load", &settings).await?;
    let mut sessions = JoinSet::new();
    for _ in 0..16 {
        let (web, token) = (cluster.connect("web", "per_user_load").await?, issue(&owner, "u", &[]).await?);
        sessions.spawn(async move { accepted(&web, Request::of(&token.token), 50).await });
    }
    let mut sum = 0;
    while let Some(accepted) = sessions.join_next().await {
        sum += accepted??;
    }
    assert_eq!(sum, 300, "of 800");
    Ok(())
}

// ---- Of failed attempts from an address

const FAILURES: [(&str, &str); 2] =
    [("tollgate.failure_rate_limit", "3"), ("tollgate.failure_rate_window", "1d")];
const UNKNOWN: &str =
    "tgt_000000000000000000000000000000000000000000000000000000000000000000000000000000007ef74675";

#[tokio::test]
async fn an_address_that_failed_too_often_is_refused_whatever_it_presents() -> Result<()> {
    let cluster = SHARED.cluster()?;
    let (owner, web) = with_settings(&cluster, "failures", &FAILURES).await?;
    let good = issue(&owner, "u", &["posts:read"]).await?;
    let revoked = issue(&owner, "u", &[]).await?;
    revoke(&owner, revoked.id).await?;
    let from = "192.0.2.1";
    let write = [Some("posts:write")];
    // Successes, and tokens that only lack a scope, are not failed attempts.
    for _ in 0..5 {
        assert_eq!(Request::of(&good.token).coming_from(from).code(&web).await?, "VALID");
        let scopeless = Request::of(&good.token).requiring(&write).coming_from(from);
        assert_eq!(scopeless.code(&web).await?, "INSUFFICIENT_SCOPE");
    }
    for (token, code) in [(UNKNOWN, "NOT_FOUND"), ("junk", "MALFORMED"), (&revoked.token, "REVOKED")] {
        assert_eq!(Request::of(token).coming_from(from).code(&web).await?, code);
    }
    for token in [UNKNOWN, "junk", &revoked.token, &good.token] {
        let answer = Request::of(token).coming_from(from).verify(&web).await?;
        assert_eq!(
            (answer.code.as_str(), answer.token_id),
            ("RATE_LIMITED", None),
            "it shows nothing of the token"
        );
        assert_eq!((answer.rate_limit, answer.rate_remaining), (Some(3), Some(0)));
        assert!(answer.retry_after.is_some());
    }
    let raised =
        web.query("select tollgate.authenticate($1, null, $2::text::inet)", &[&good.token, &from]).await;
    refused(raised, &SqlState::CONFIGURATION_LIMIT_EXCEEDED);
    for other in [Some("192.0.2.2"), Some("2001:db8::1"), None] {
        let request = Request { client_ip: other, ..Request::of(&good.token) };
        assert_eq!(request.code(&web).await?, "VALID", "{other:?}");
    }
    Ok(())
}

#[tokio::test]
async fn an_ipv6_client_is_its_64_bit_network_and_a_mapped_address_the_ipv4_one() -> Result<()> {
    let cluster = SHARED.cluster()?;
    let (owner, web) = with_settings(&cluster, "failures6", &FAILURES).await?;
    let good = issue(&owner, "u", &[]).await?;
    for from in ["2001:db8:0:1::1", "2001:db8:0:1:ffff::", "2001:db8:0:1::9/48"] {
        assert_eq!(Request::of(UNKNOWN).coming_from(from).code(&web).await?, "NOT_FOUND");
    }
    assert_eq!(Request::of(&good.token).coming_from("2001:db8:0:1::abcd").code(&web).await?, "RATE_LIMITED");
    assert_eq!(Request::of(&good.token).coming_from("2001:db8:0:2::1").code(&web).await?, "VALID");
    for from in ["10.0.0.1", "::ffff:10.0.0.1", "10.0.0.1/24"] {
        assert_eq!(Request::of(UNKNOWN).coming_from(from).code(&web).await?, "NOT_FOUND");
    }
    assert_eq!(Request::of(&good.token).coming_from("10.0.0.1").code(&web).await?, "RATE_LIMITED");
    assert_eq!(Request::of(&good.token).coming_from("10.0.0.2").code(&web).await?, "VALID");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn sixteen_guessers_at_one_address_get_no_more_answers_than_the_limit() -> Result<()> {
    let cluster = SHARED.cluster()?;
    let settings = [("tollgate.failure_rate_limit", "100"), ("tollgate.failure_rate_window", "1d")];
    drop(with_settings(&cluster, "guessers", &settings).await?);
    let mut sessions = JoinSet::new();
    for _ in 0..16 {
        let web = cluster.connect("web", "guessers").await?;
        sessions.spawn(async move {
            let mut answered = 0;
            for _ in 0..50 {
                let answer = Request::of(UNKNOWN).coming_from("192.0.2.7").code(&web).await?;
                answered += usize::from(answer == "NOT_FOUND");
            }
            anyhow::Ok(answered)
        });
    }
    let mut answered = 0;
    while let Some(of_session) = sessions.join_next().await {
        answered += of_session??;
    }
    assert_eq!(answered, 100, "of 800");
    Ok(())
}

#[tokio::test]
async fn no_ordinary_role_can_lift_a_limit() -> Result<()> {
    let World { web, cluster: _cluster, .. } = SHARED.world().await?;
    for setting in ["user_rate_limit", "user_rate_window", "failure_rate_limit", "failure_rate_window"] {
        let set = web.batch_execute(&format!("set tollgate.{setting} = 1")).await;
        refused(set, &SqlState::INSUFFICIENT_PRIVILEGE);
    }
    Ok(())
}

// ---- Where limits cannot be kept

#[tokio::test]
async fn without_shared_memory_a_limit_raises_and_an_unlimited_token_passes() -> Result<()> {
    let cluster = common::start(Cluster::builder().preload(false))?;
    let owner = cluster.connect("postgres", DATABASE).await?;
    let web = cluster.connect("web", DATABASE).await?;
    let free = issue(&owner, "u", &[]).await?;
    let limited = issue_with(&owner, "u", "rate_limit => 10").await?;
    let from = Request::of(&free.token).coming_from("10.0.0.1");
    assert_eq!(from.code(&web).await?, "VALID");
    for call in ["verify_api_token", "authenticate"] {
        let sql = format!("select (tollgate.{call}($1)).valid");
        let error =
            refused(web.query(&sql, &[&limited.token]).await, &SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE);
        assert!(error.hint().is_some_and(|hint| hint.contains("shared_preload_libraries")), "{error:?}");
    }
    revoke(&owner, limited.id).await?;
    assert_eq!(code(&web, &limited.token).await?, "REVOKED", "what needs no limit is answered");

    cluster.execute(DATABASE, &format!("alter database {DATABASE} set tollgate.user_rate_limit = 10"))?;
    let web = cluster.connect("web", DATABASE).await?;
    let sql = "select (tollgate.verify_api_token($1, null, '10.0.0.1')).valid";
    refused(web.query(sql, &[&free.token]).await, &SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE);
    cluster.execute(DATABASE, &format!("alter database {DATABASE} reset tollgate.user_rate_limit"))?;
    cluster.execute(DATABASE, &format!("alter database {DATABASE} set tollgate.failure_rate_limit = 10"))?;
    let web = cluster.connect("web", DATABASE).await?;
    refused(web.query(sql, &[&free.token]).await, &SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE);
    assert_eq!(code(&web, &free.token).await?, "VALID", "nothing is limited without an address");
    Ok(())
}

#[tokio::test]
async fn where_the_table_is_full_a_limited_token_is_refused_and_an_unlimited_one_passes() -> Result<()> {
    let cluster = common::start(Cluster::builder().setting("tollgate.max_tracked_keys", "1024"))?;
    let owner = cluster.connect("postgres", DATABASE).await?;
    let limited = issue_with(&owner, "full", &format!("rate_limit => 1000, {DAY}")).await?;
    let kept = issue_with(&owner, "kept", &format!("rate_limit => 5, {DAY}")).await?;
    assert_eq!(accepted(&owner, Request::of(&kept.token), 3).await?, 3);
    // Uses that are never flushed.
    let fill = "select count(*) from (
            select tollgate.verify_api_token(t.token)
            from generate_series(1, 3000) n, tollgate.create_api_token('full', 'n' || n) t) v";
    assert_eq!(value::<i64>(&owner, fill).await?, 3000);
    let overflowed: i64 = value(&owner, "select overflowed from tollgate.stats()").await?;
    assert!(overflowed > 0);
    let answer = Request::of(&limited.token).verify(&owner).await?;
    assert_eq!((answer.code.as_str(), answer.rate_remaining), ("RATE_LIMITED", Some(0)));
    assert_eq!(answer.retry_after.as_deref(), Some("00:00:01"));
    let free = issue(&owner, "free", &[]).await?;
    assert_eq!(code(&owner, &free.token).await?, "VALID");
    assert_eq!(accepted(&owner, Request::of(&kept.token), 5).await?, 2, "a limiter in use is never evicted");

    // Once flushed, there is room.
    let flush =
        "with d as materialized (select distinct node, boot, generation from tollgate.drain_usage()),
              a as materialized (select generation, tollgate.apply_usage(node, boot, generation, '{}', tollgate.signature_of_usage(node, boot, generation, '{}')) as applied from d)
         select tollgate.ack_usage(generation) from a where applied";
    assert!(value::<bool>(&owner, flush).await?);
    assert_eq!(code(&owner, &limited.token).await?, "VALID");
    assert_eq!(value::<i64>(&owner, fill).await?, 3000);
    assert!(value::<bool>(&owner, flush).await?);
    let answer = Request::of(&kept.token).verify(&owner).await?;
    assert_eq!(answer.code, "RATE_LIMITED", "nor when all else was flushed and replaced");
    assert_ne!(answer.retry_after.as_deref(), Some("00:00:01"), "there was room");
    Ok(())
}

#[tokio::test]
async fn addresses_that_fail_cannot_take_the_room_of_tokens() -> Result<()> {
    let cluster = common::start(Cluster::builder().setting("tollgate.max_tracked_keys", "1024"))?;
    let settings = [("tollgate.failure_rate_limit", "1"), ("tollgate.failure_rate_window", "1d")];
    let (owner, _) = with_settings(&cluster, "flood", &settings).await?;
    let flood = "select count(*) from (
            select tollgate.verify_api_token('junk', null, '10.0.0.0'::inet + n) from generate_series(1, 20000) n) v";
    assert_eq!(value::<i64>(&owner, flood).await?, 20_000);
    let issued = "select count(*) filter (where v.valid) from (
            select (tollgate.verify_api_token(t.token)).* from generate_series(1, 300) n,
                lateral tollgate.create_api_token('u' || n, 'n', rate_limit => 5) t) v";
    assert_eq!(value::<i64>(&owner, issued).await?, 300);
    assert_eq!(value::<i64>(&owner, "select overflowed from tollgate.stats()").await?, 0);
    // The last addresses that failed are still remembered.
    let last = "select code from tollgate.verify_api_token('junk', null, '10.0.0.0'::inet + 20000)";
    assert_eq!(value::<String>(&owner, last).await?, "RATE_LIMITED");
    Ok(())
}

/// An issuing role can fill the table, for any number of users, but only at the expense of tokens that it issued
/// itself.
#[tokio::test]
async fn an_issuer_changes_neither_counts_nor_limits_of_others_here_or_in_another_database() -> Result<()> {
    let cluster = common::start(Cluster::builder().setting("tollgate.max_tracked_keys", "1024"))?;
    let settings = [("tollgate.user_rate_limit", "50"), ("tollgate.user_rate_window", "1d")];
    let (owner, web) = with_settings(&cluster, "attacked", &settings).await?;
    let (owner_of_other, web_of_other) = with_settings(&cluster, "other", &settings).await?;
    cluster.execute(
        "attacked",
        "create role mallory login;
         select tollgate.grant_capability('mallory', 'issuer'), tollgate.grant_capability('mallory', 'verifier')",
    )?;
    let mallory = cluster.connect("mallory", "attacked").await?;
    let flood = async |limit: &str| {
        let sql = format!(
            "select count(*) from (select tollgate.verify_api_token(t.token) from generate_series(1, 1500) n,
                 lateral tollgate.create_api_token('made up ' || n, 'n'{limit}) t) v"
        );
        value::<i64>(&mallory, &sql).await
    };
    let limit = format!(", rate_limit => 1, {DAY}");
    let sides = [(&owner, &web), (&owner_of_other, &web_of_other)];
    let mut tokens = Vec::new();
    for (owner, _) in sides {
        tokens.push((
            issue_with(owner, "ann", &format!("rate_limit => 2, {DAY}")).await?,
            issue_with(owner, "ben", &format!("rate_limit => 2, {DAY}")).await?,
            issue(owner, "cleo", &[]).await?,
            issue(owner, "dan", &[]).await?,
        ));
    }
    let expect = async |web: &Client, token: &Token, codes: &[&str]| {
        for expected in codes {
            assert_eq!(code(web, &token.token).await?, *expected);
        }
        anyhow::Ok(())
    };
    // Before the flood: used up, and counted.
    for ((_, web), (ann, _, cleo, _)) in sides.into_iter().zip(&tokens) {
        expect(web, ann, &["VALID", "VALID", "RATE_LIMITED"]).await?;
        expect(web, cleo, &["VALID"]).await?;
    }
    assert_eq!(flood(&limit).await?, 1500);
    assert_eq!(flood("").await?, 1500);
    for ((_, web), (ann, ben, cleo, dan)) in sides.into_iter().zip(&tokens) {
        expect(web, ann, &["RATE_LIMITED"]).await?;
        expect(web, ben, &["VALID", "VALID", "RATE_LIMITED"]).await?;
        expect(web, cleo, &["VALID"]).await?;
        expect(web, dan, &["VALID"]).await?;
    }
    assert_eq!(flood(&limit).await?, 1500);
    for ((owner, _), (ann, ben, cleo, dan)) in sides.into_iter().zip(&tokens) {
        for (token, expected) in [(ann, (2, 2)), (ben, (2, 1)), (cleo, (2, 0)), (dan, (1, 0))] {
            assert_eq!(counted(owner, token).await?, expected);
        }
    }
    // A window that would keep room for longer is refused.
    let longer =
        "select tollgate.create_api_token('u', 'n', rate_limit => 1, rate_window => '1 day 1 microsecond')";
    refused(mallory.query(longer, &[]).await, &SqlState::INVALID_PARAMETER_VALUE);
    let by_hand =
        format!("update tollgate.api_tokens set rate_window = '366 days' where id = '{}'", tokens[0].0.id);
    refused(owner.query(&by_hand, &[]).await, &SqlState::CHECK_VIOLATION);
    Ok(())
}
