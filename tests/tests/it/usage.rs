//! Metering: what is counted, and that it reaches the tables exactly once, whatever fails on the way.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::common::{self, Request, Shared, Token, code, issue, refused, revoke, value};
use crate::operator::{
    Db, Generation, OPERATOR, Usage, UsageRow, ack, apply, counts, drain, drained, flush, flush_all,
    issue_many, set, signed, stats, sums, totals, usage, verify_each,
};
use anyhow::{Context as _, Result};
use jiff::Timestamp;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tokio_postgres::AsyncMessage;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use tollgate_tests::{Cluster, DATABASE, eventually_async};
use uuid::Uuid;

static SHARED: Shared = Shared::new(&[]);

const LONG: Duration = Duration::from_secs(30);

async fn now(client: &Client) -> Result<Timestamp> {
    value(client, "select clock_timestamp()").await
}

fn address(text: &str) -> Option<IpAddr> {
    Some(text.parse().unwrap())
}

// ---- What is counted

#[tokio::test]
async fn uses_are_counted_per_token_with_the_time_and_the_address_of_the_last() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "uses").await?;
    let [one, other, idle] = [
        issue(&db.owner, "a", &[]).await?,
        issue(&db.owner, "a", &[]).await?,
        issue(&db.owner, "a", &[]).await?,
    ];

    for address in ["10.1.2.3", "2001:db8::7", "192.0.2.9"] {
        assert_eq!(Request::of(&one.token).coming_from(address).code(&db.web).await?, "VALID");
    }
    let before = now(&db.web).await?;
    assert_eq!(Request::of(&one.token).coming_from("2001:db8::1").code(&db.web).await?, "VALID");
    let after = now(&db.web).await?;
    assert_eq!(Request::of(&other.token).coming_from("10.9.9.9").code(&db.web).await?, "VALID");
    assert_eq!(code(&db.web, &other.token).await?, "VALID");

    let generation = drained(&db.operator).await?;
    assert_eq!(generation.rows.len(), 2, "{generation:?}");
    let row = generation.of(one.id).context("the token was used")?;
    assert_eq!((row.uses, row.denials, row.last_used_ip), (4, 0, address("2001:db8::1")));
    let at = row.last_used_at.context("the token was used")?;
    assert!(before <= at && at <= after, "{before} <= {at} <= {after}");
    // The last use came without an address, so that of an earlier one would be misleading.
    let row = generation.of(other.id).context("the token was used")?;
    assert_eq!((row.uses, row.denials, row.last_used_ip), (2, 0, None));
    assert!(row.last_used_at.is_some_and(|later| later >= at));

    assert!(apply(&db.operator, &generation).await?);
    let stored = usage(&db.owner, one.id).await?;
    assert_eq!(
        stored,
        Some(Usage { uses: 4, denials: 0, last_used_at: Some(at), last_used_ip: address("2001:db8::1") })
    );
    assert_eq!(usage(&db.owner, idle.id).await?, None);
    let shown = db
        .owner
        .query_one(
            "select use_count, denied_count, last_used_at, last_used_ip from tollgate.tokens where id = $1",
            &[&one.id],
        )
        .await?;
    assert_eq!((shown.get::<_, i64>(0), shown.get::<_, i64>(1)), (4, 0));
    assert_eq!((shown.get::<_, Option<Timestamp>>(2), shown.get(3)), (Some(at), address("2001:db8::1")));
    Ok(())
}

#[tokio::test]
async fn every_way_to_verify_counts() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "ways").await?;
    let token = issue(&db.owner, "a", &[]).await?;
    let digest = tollgate_core::token::digest(token.token.as_bytes()).to_vec();

    assert_eq!(code(&db.web, &token.token).await?, "VALID");
    db.web.query_one("select code from tollgate.verify_api_token_hash($1)", &[&digest]).await?;
    common::authenticate(&db.web, &token.token).await?;
    db.web.batch_execute("begin read only").await?;
    assert_eq!(code(&db.web, &token.token).await?, "VALID");
    db.web.batch_execute("commit").await?;
    assert_eq!(drained(&db.operator).await?.counts(token.id), (4, 0));
    Ok(())
}

/// Access tokens are counted under a uuid of version 8, of their user. An id of ours has version 7; a superuser may have
/// stored another.
#[tokio::test]
async fn a_token_whose_id_has_any_version_is_counted_once() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "versions").await?;
    let token = issue(&db.owner, "a", &[]).await?;
    let id: Uuid = "00000000-0000-8000-8000-000000000001".parse()?;
    db.owner.execute("update tollgate.api_tokens set id = $2 where id = $1", &[&token.id, &id]).await?;

    for total in 1..=2 {
        assert_eq!(code(&db.web, &token.token).await?, "VALID");
        flush_all(&db.operator).await?;
        assert_eq!(counts(&db.owner, id).await?, (total, 0));
    }
    Ok(())
}

#[tokio::test]
async fn each_refusal_of_a_known_token_is_a_denial_and_not_a_use() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "denials").await?;
    let token = issue(&db.owner, "a", &[]).await?;
    for (fault, expected) in [
        ("revoked_at = now()", "REVOKED"),
        ("revoked_at = null, disabled_at = now()", "DISABLED"),
        ("disabled_at = null, expires_at = now()", "EXPIRED"),
        ("expires_at = null, allowed_ips = '{10.0.0.0/8}'", "IP_NOT_ALLOWED"),
        ("allowed_ips = null", "INSUFFICIENT_SCOPE"),
    ] {
        set(&db.owner, token.id, fault).await?;
        let request = Request::of(&token.token).requiring(&[Some("posts:read")]).coming_from("192.0.2.1");
        assert_eq!(request.code(&db.web).await?, expected);
        let generation = drained(&db.operator).await?;
        let row = generation.of(token.id).context("the token is known")?;
        assert_eq!((row.uses, row.denials), (0, 1), "{expected}");
        assert_eq!((row.last_used_at, row.last_used_ip), (None, None), "{expected}");
        assert!(apply(&db.operator, &generation).await? && ack(&db.operator, generation.number).await?);
    }
    assert_eq!(usage(&db.owner, token.id).await?, Some(Usage { denials: 5, ..Usage::default() }));

    // A later denial does not change when and from where it was last used.
    assert_eq!(Request::of(&token.token).coming_from("10.0.0.1").code(&db.web).await?, "VALID");
    let request = Request::of(&token.token).requiring(&[Some("posts:read")]).coming_from("192.0.2.1");
    assert_eq!(request.code(&db.web).await?, "INSUFFICIENT_SCOPE");
    flush_all(&db.operator).await?;
    let used = usage(&db.owner, token.id).await?.context("it was used")?;
    assert_eq!((used.uses, used.denials, used.last_used_ip), (1, 6, address("10.0.0.1")));
    assert_eq!(request.code(&db.web).await?, "INSUFFICIENT_SCOPE");
    flush_all(&db.operator).await?;
    assert_eq!(usage(&db.owner, token.id).await?, Some(Usage { denials: 7, ..used }));
    Ok(())
}

#[tokio::test]
async fn authenticate_counts_its_refusals_although_it_raises() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "raising").await?;
    let token = issue(&db.owner, "a", &[]).await?;
    let lacking = db
        .web
        .query_one("select code from tollgate.authenticate($1, array['posts:read'])", &[&token.token])
        .await;
    refused(lacking, &SqlState::INSUFFICIENT_PRIVILEGE);
    revoke(&db.owner, token.id).await?;
    let revoked = common::authenticate(&db.web, &token.token).await;
    refused(revoked, &SqlState::INVALID_AUTHORIZATION_SPECIFICATION);
    assert_eq!(drained(&db.operator).await?.counts(token.id), (0, 2));
    Ok(())
}

#[tokio::test]
async fn checking_a_scope_is_an_outcome_and_not_a_use() -> Result<()> {
    let cluster = Arc::new(common::start(Cluster::builder())?);
    let db = Db::only(&cluster).await?;
    let token = issue(&db.owner, "a", &["posts:read"]).await?;

    for scope in ["posts:read", "users:read"] {
        for presented in [token.token.as_str(), "junk"] {
            db.web.query_one("select tollgate.token_has_scope($1, $2)", &[&presented, &scope]).await?;
        }
    }
    assert_eq!(drain(&db.operator).await?, None);
    // Guesses are counted here as in any other function.
    let outcomes = stats(&db.operator).await?["verifications"].clone();
    for (code, count) in [("VALID", 1), ("INSUFFICIENT_SCOPE", 1), ("MALFORMED", 2)] {
        assert_eq!(outcomes[code], json!(count), "{code}: {outcomes}");
    }

    db.web.batch_execute("begin").await?;
    common::authenticate(&db.web, &token.token).await?;
    for reader in ["token_has_scope('posts:read')", "current_user_id()", "require_scope('posts:read')"] {
        db.web.query_one(&format!("select tollgate.{reader}"), &[]).await?;
    }
    db.web.batch_execute("commit").await?;
    assert_eq!(drained(&db.operator).await?.counts(token.id), (1, 0), "only authenticate itself is a use");
    Ok(())
}

#[tokio::test]
async fn unknown_and_malformed_tokens_are_counted_by_their_code_alone() -> Result<()> {
    let cluster = Arc::new(common::start(Cluster::builder())?);
    let db = Db::only(&cluster).await?;
    let gone = issue(&db.owner, "a", &[]).await?;
    db.owner.execute("delete from tollgate.api_tokens where id = $1", &[&gone.id]).await?;
    for presented in [gone.token.as_str(), "junk", "", "tgt_0"] {
        code(&db.web, presented).await?;
    }
    refused(common::authenticate(&db.web, "more junk").await, &SqlState::INVALID_AUTHORIZATION_SPECIFICATION);
    assert_eq!(drain(&db.operator).await?, None);
    let stats = stats(&db.operator).await?;
    assert_eq!(
        stats["verifications"],
        json!({"VALID": 0, "MALFORMED": 4, "UNTRUSTED_ISSUER": 0, "UNKNOWN_KEY": 0, "BAD_SIGNATURE": 0,
               "NOT_FOUND": 1, "REVOKED": 0, "DISABLED": 0, "EXPIRED": 0, "NOT_YET_VALID": 0, "WRONG_AUDIENCE": 0,
               "IP_NOT_ALLOWED": 0, "INSUFFICIENT_SCOPE": 0, "RATE_LIMITED": 0, "QUOTA_EXCEEDED": 0})
    );
    assert_eq!((&stats["tracked_keys"], &stats["overflowed"]), (&json!(0), &json!(0)));
    Ok(())
}

/// A thief who tries scopes or addresses with a stolen token must not be able to undo the traces.
#[tokio::test]
async fn usage_is_not_rolled_back_with_the_transaction_that_caused_it() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "rolledback").await?;
    let token = issue(&db.owner, "a", &[]).await?;
    let denied = Request::of(&token.token).requiring(&[Some("users:write")]);

    db.web.batch_execute("begin").await?;
    assert_eq!(code(&db.web, &token.token).await?, "VALID");
    assert_eq!(denied.code(&db.web).await?, "INSUFFICIENT_SCOPE");
    db.web.batch_execute("rollback").await?;

    db.web.batch_execute("begin; savepoint s").await?;
    assert_eq!(code(&db.web, &token.token).await?, "VALID");
    assert_eq!(denied.code(&db.web).await?, "INSUFFICIENT_SCOPE");
    db.web.batch_execute("rollback to s; commit").await?;

    let failing = db
        .web
        .query_one("select 1 / (select count(*) - 1 from tollgate.verify_api_token($1))", &[&token.token])
        .await;
    refused(failing, &SqlState::DIVISION_BY_ZERO);

    // The session ends in the middle of its transaction.
    let doomed = db.session("web").await?;
    doomed.batch_execute("begin").await?;
    assert_eq!(code(&doomed, &token.token).await?, "VALID");
    drop(doomed);

    assert_eq!(drained(&db.operator).await?.counts(token.id), (4, 2));
    Ok(())
}

// ---- Drain, apply, acknowledge

#[tokio::test]
async fn nothing_to_flush_is_no_rows_and_closes_no_generation() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "nothing").await?;
    for _ in 0..3 {
        assert_eq!(drain(&db.operator).await?, None);
    }
    let before = stats(&db.operator).await?;
    assert_eq!(before["closed_generation"], Value::Null);
    let token = issue(&db.owner, "a", &[]).await?;
    code(&db.web, &token.token).await?;
    let generation = drained(&db.operator).await?;
    assert_eq!(before["generation"], json!(generation.number), "the empty drains used no numbers up");
    Ok(())
}

#[tokio::test]
async fn the_same_rows_are_handed_out_until_acknowledged_while_counting_goes_on() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "again").await?;
    let [one, two] = [issue(&db.owner, "a", &[]).await?, issue(&db.owner, "a", &[]).await?];
    for _ in 0..3 {
        code(&db.web, &one.token).await?;
    }
    let first = drained(&db.operator).await?;
    assert_eq!((first.counts(one.id), first.rows.len()), ((3, 0), 1));

    code(&db.web, &one.token).await?;
    code(&db.web, &two.token).await?;
    assert_eq!(sums(&drained(&db.operator).await?), sums(&first));
    let elsewhere = drained(&db.session(OPERATOR).await?).await?;
    assert_eq!(sums(&elsewhere), sums(&first), "another session gets the same");
    assert!(apply(&db.operator, &first).await?);
    assert_eq!(sums(&drained(&db.operator).await?), sums(&first), "applied is not acknowledged");
    code(&db.web, &one.token).await?;

    assert!(ack(&db.operator, first.number).await?);
    let second = drained(&db.operator).await?;
    assert!(second.number > first.number);
    assert_eq!((&second.node, second.boot), (&first.node, first.boot));
    assert_eq!((second.counts(one.id), second.counts(two.id)), ((2, 0), (1, 0)));
    assert!(apply(&db.operator, &second).await? && ack(&db.operator, second.number).await?);
    assert_eq!(drain(&db.operator).await?, None);
    assert_eq!((counts(&db.owner, one.id).await?, counts(&db.owner, two.id).await?), ((5, 0), (1, 0)));
    Ok(())
}

#[tokio::test]
async fn acknowledging_what_was_not_handed_out_does_nothing() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "wrongack").await?;
    assert!(!ack(&db.operator, 1).await?, "nothing was drained yet");
    let token = issue(&db.owner, "a", &[]).await?;
    code(&db.web, &token.token).await?;
    let first = drained(&db.operator).await?;
    let wrong = [0, 1, -1, first.number - 1, first.number + 1, -first.number, i64::MAX, i64::MIN];
    for number in wrong {
        assert!(!ack(&db.operator, number).await?, "{number}");
    }
    let nothing: Option<bool> = value(&db.operator, "select tollgate.ack_usage(null)").await?;
    assert_eq!(nothing, None);
    assert_eq!(drained(&db.operator).await?, first);

    assert!(apply(&db.operator, &first).await? && ack(&db.operator, first.number).await?);
    assert!(!ack(&db.operator, first.number).await?, "acknowledged already");
    code(&db.web, &token.token).await?;
    // The open generation is not the closed one, and a late acknowledgement of the previous one frees nothing.
    assert!(!ack(&db.operator, first.number + 1).await?);
    let second = drained(&db.operator).await?;
    assert!(!ack(&db.operator, first.number).await?);
    assert_eq!(drained(&db.operator).await?, second);
    Ok(())
}

#[tokio::test]
async fn a_generation_counts_once_however_often_it_is_applied() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "twice").await?;
    let token = issue(&db.owner, "a", &[]).await?;
    code(&db.web, &token.token).await?;
    let first = drained(&db.operator).await?;
    assert!(apply(&db.operator, &first).await?);
    assert!(!apply(&db.operator, &first).await?);
    assert!(!apply(&db.session(OPERATOR).await?, &first).await?);
    assert!(ack(&db.operator, first.number).await?);
    assert!(!apply(&db.operator, &first).await?);

    code(&db.web, &token.token).await?;
    code(&db.web, &token.token).await?;
    let second = drained(&db.operator).await?;
    assert!(apply(&db.operator, &second).await?);
    // A carrier that had hung since the previous generation.
    assert!(!apply(&db.operator, &first).await?);
    assert!(!apply(&db.operator, &second).await?);
    assert_eq!(counts(&db.owner, token.id).await?, (3, 0));
    Ok(())
}

#[tokio::test]
async fn an_apply_that_is_rolled_back_can_be_repeated() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "reapplied").await?;
    let token = issue(&db.owner, "a", &[]).await?;
    code(&db.web, &token.token).await?;
    let generation = drained(&db.operator).await?;
    db.operator.batch_execute("begin").await?;
    assert!(apply(&db.operator, &generation).await?);
    db.operator.batch_execute("rollback").await?;
    assert_eq!(counts(&db.owner, token.id).await?, (0, 0));
    assert!(apply(&db.operator, &generation).await?);
    assert_eq!(counts(&db.owner, token.id).await?, (1, 0));
    Ok(())
}

#[tokio::test]
async fn server_starts_and_nodes_are_distinguished() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "nodes").await?;
    let token = issue(&db.owner, "a", &[]).await?;
    code(&db.web, &token.token).await?;
    let own = drained(&db.operator).await?;
    let another_boot = signed(&db.owner, &own.node, Uuid::new_v4(), own.number, &own.rows).await?;
    let another_node = signed(&db.owner, "standby", own.boot, own.number, &own.rows).await?;
    for generation in [&own, &another_boot, &another_node] {
        assert!(apply(&db.operator, generation).await?);
        assert!(!apply(&db.operator, generation).await?);
    }
    // The generations of one server start say nothing about another: numbers are compared within one only.
    let low_number = signed(&db.owner, &own.node, Uuid::new_v4(), 5, &own.rows).await?;
    assert!(apply(&db.operator, &low_number).await?);
    assert_eq!(counts(&db.owner, token.id).await?, (4, 0));
    Ok(())
}

#[tokio::test]
async fn the_newest_use_stays_whatever_the_order_in_which_servers_are_flushed() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "newest").await?;
    let token = issue(&db.owner, "a", &[]).await?;
    let began = Timestamp::now().as_second() - 600;
    let at = |second: i64| Timestamp::from_second(began + second).ok();
    let row = |uses, denials, last_used_at, last_used_ip| UsageRow {
        token_id: token.id,
        uses,
        denials,
        last_used_at,
        last_used_ip,
    };
    let carry = async |row: UsageRow| -> Result<Option<Usage>> {
        let generation = signed(&db.owner, "n", Uuid::new_v4(), 1, &[row]).await?;
        assert!(apply(&db.operator, &generation).await?);
        usage(&db.owner, token.id).await
    };
    let stored =
        |uses, denials, last_used_at, last_used_ip| Some(Usage { uses, denials, last_used_at, last_used_ip });

    assert_eq!(carry(row(0, 2, None, None)).await?, stored(0, 2, None, None));
    let newest = (at(10), address("10.0.0.10"));
    assert_eq!(carry(row(1, 0, newest.0, newest.1)).await?, stored(1, 2, newest.0, newest.1));
    // Older, but flushed later; then refused only.
    assert_eq!(carry(row(2, 0, at(5), address("10.0.0.5"))).await?, stored(3, 2, newest.0, newest.1));
    assert_eq!(carry(row(0, 1, None, None)).await?, stored(3, 3, newest.0, newest.1));
    assert_eq!(carry(row(1, 0, at(11), None)).await?, stored(4, 3, at(11), None));
    assert_eq!(carry(row(1, 0, at(12), address("::1"))).await?, stored(5, 3, at(12), address("::1")));
    Ok(())
}

#[tokio::test]
async fn apply_takes_no_null() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "nulls").await?;
    for arguments in [
        "null, gen_random_uuid(), 1, '{}', ''",
        "'n', null, 1, '{}', ''",
        "'n', gen_random_uuid(), null, '{}', ''",
        "'n', gen_random_uuid(), 1, null, ''",
        "'n', gen_random_uuid(), 1, '{}', null",
    ] {
        let answer = db.operator.query_one(&format!("select tollgate.apply_usage({arguments})"), &[]).await;
        let error = refused(answer, &SqlState::INVALID_PARAMETER_VALUE);
        assert!(error.detail().is_some() && error.hint().is_some(), "{error:?}");
    }
    Ok(())
}

#[tokio::test]
async fn an_impossible_row_is_skipped_and_the_others_are_applied() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "skipped").await?;
    let (good, bad) = (issue(&db.owner, "a", &[]).await?, issue(&db.owner, "b", &[]).await?);
    let (owner, mut notices) = db.cluster.listen("postgres", &db.name).await?;
    let rows = |bad: &str| format!("array[('{}', 1, 1, null, null), {bad}]::tollgate.usage_row[]", good.id);
    let skipped = [
        format!("('{}', -1, 0, null, null)", bad.id),
        format!("('{}', 0, -1, null, null)", bad.id),
        format!("('{}', 9223372036854775807, 0, null, null)", bad.id),
        format!("('{}', null, 0, null, null)", bad.id),
        format!("('{}', 1, 1, null, null)", good.id),
        "(null, 1, 1, null, null)".to_owned(),
        "null".to_owned(),
    ];
    for (number, bad) in (1..).zip(&skipped) {
        let (boot, rows) = (Uuid::new_v4(), rows(bad));
        let call = format!(
            "select tollgate.apply_usage('n', '{boot}', 1, {rows}, tollgate.signature_of_usage('n', '{boot}', 1, {rows}))"
        );
        assert!(value::<bool>(&owner, &call).await?, "{bad}");
        assert_eq!(counts(&db.owner, good.id).await?, (number, number), "{bad}");
        let Ok(AsyncMessage::Notice(notice)) = notices.try_recv() else {
            anyhow::bail!("no warning of {bad}")
        };
        assert!(notice.message().contains("skipped 1 of 2"), "{notice:?}");
    }
    assert_eq!(counts(&db.owner, bad.id).await?, (0, 0));
    Ok(())
}

#[tokio::test]
async fn sums_stop_at_the_largest_number_and_fail_no_later_flush() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "largest").await?;
    let token = issue(&db.owner, "a", &[]).await?;
    code(&db.web, &token.token).await?;
    flush_all(&db.operator).await?;
    db.owner
        .batch_execute(
            "update tollgate.token_usage set use_count = 9223372036854775806, hour_used = 9223372036854775806,
                                             denied_count = 9223372036854775806, hour_denied = 9223372036854775806",
        )
        .await?;
    for _ in 0..2 {
        let row = UsageRow {
            token_id: token.id,
            uses: 1000,
            denials: 1000,
            last_used_at: None,
            last_used_ip: None,
        };
        assert!(apply(&db.operator, &signed(&db.owner, "n", Uuid::new_v4(), 1, &[row]).await?).await?);
        assert_eq!(counts(&db.owner, token.id).await?, (i64::MAX, i64::MAX));
    }
    code(&db.web, &token.token).await?;
    flush_all(&db.operator).await?;
    Ok(())
}

#[tokio::test]
async fn a_use_is_neither_before_its_token_nor_in_the_future() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "times").await?;
    for (time, kept) in [
        ("-infinity", "u.last_used_at = t.created_at"),
        ("4000-01-01 00:00 BC", "u.last_used_at = t.created_at"),
        ("infinity", "u.last_used_at <= now()"),
        ("290000-01-01 00:00", "u.last_used_at <= now()"),
    ] {
        let token = issue(&db.owner, "a", &[]).await?;
        for _ in 0..2 {
            let (boot, rows) = (
                Uuid::new_v4(),
                format!("array[('{}', 1, 0, '{time}', null)]::tollgate.usage_row[]", token.id),
            );
            let call = format!(
                "select tollgate.apply_usage('n', '{boot}', 1, {rows}, tollgate.signature_of_usage('n', '{boot}', 1, {rows}))"
            );
            assert!(value::<bool>(&db.owner, &call).await?, "{time}");
        }
        assert_eq!(counts(&db.owner, token.id).await?, (2, 0));
        let held = format!(
            "select {kept} and u.hour = date_bin('1 hour', u.last_used_at, timestamptz 'epoch')
             from tollgate.token_usage u join tollgate.api_tokens t on t.id = u.token_id where t.id = '{}'",
            token.id
        );
        assert!(value::<bool>(&db.owner, &held).await?, "{time}");
        let hours = format!("select count(*) from tollgate.token_activity('{}')", token.id);
        assert!(value::<i64>(&db.owner, &hours).await? <= 2, "{time}");
    }
    Ok(())
}

async fn refused_to_apply(operator: &Client, generation: &Generation) {
    let error = apply(operator, generation).await.expect_err("this should have been refused");
    let error = error.downcast_ref::<tokio_postgres::Error>().and_then(tokio_postgres::Error::as_db_error);
    assert_eq!(
        error.map(tokio_postgres::error::DbError::code),
        Some(&SqlState::INVALID_PARAMETER_VALUE),
        "{error:?}"
    );
}

/// The carrier of counters cannot change them: it can neither invent a use, nor leave one out, nor make what a server
/// or a standby hands out later count as applied.
#[tokio::test]
async fn counters_that_no_server_handed_out_are_not_applied() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "madeup").await?;
    let [used, unused] = [issue(&db.owner, "a", &[]).await?, issue(&db.owner, "b", &[]).await?];
    code(&db.web, &used.token).await?;
    code(&db.web, &used.token).await?;
    let own = drained(&db.operator).await?;
    let mut more = own.clone();
    more.rows[0].uses += 1;
    let mut another = own.clone();
    another.rows[0].token_id = unused.id;
    let mut twice = own.clone();
    twice.rows.extend_from_within(..);
    for made_up in [
        Generation { rows: Vec::new(), ..own.clone() },
        more,
        another,
        twice,
        Generation { number: own.number + 1, ..own.clone() },
        Generation { boot: Uuid::new_v4(), ..own.clone() },
        Generation { node: "standby".into(), ..own.clone() },
        Generation {
            node: "standby".into(),
            boot: Uuid::new_v4(),
            number: 1,
            rows: Vec::new(),
            signature: Vec::new(),
        },
        Generation { signature: own.signature[1..].to_vec(), ..own.clone() },
    ] {
        refused_to_apply(&db.operator, &made_up).await;
    }
    for peek in [
        "select * from tollgate.carrying_secret",
        "select tollgate.carrying_signature('usage', '{}')",
        "select tollgate.signature_of_usage('n', gen_random_uuid(), 1, '{}')",
        "select * from tollgate.close_usage()",
    ] {
        refused(db.operator.query(peek, &[]).await, &SqlState::INSUFFICIENT_PRIVILEGE);
    }
    // Neither does it count in another database of the same server.
    let other = Db::create(&SHARED.cluster()?, "madeup_too").await?;
    refused_to_apply(&other.operator, &own).await;
    // In any order.
    let mut reversed = own.clone();
    reversed.rows.reverse();
    assert!(apply(&db.operator, &reversed).await?);
    assert!(ack(&db.operator, own.number).await?);
    assert_eq!((counts(&db.owner, used.id).await?, counts(&db.owner, unused.id).await?), ((2, 0), (0, 0)));
    let known: i64 = value(&db.owner, "select count(*) from tollgate.usage_flushes").await?;
    assert_eq!(known, 1);
    Ok(())
}

/// Whatever else the row says.
#[tokio::test]
async fn only_a_generation_that_was_handed_out_is_applied_or_acknowledged() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "handedout").await?;
    let token = issue(&db.owner, "a", &[]).await?;
    code(&db.web, &token.token).await?;
    let own = drained(&db.operator).await?;
    // Not even with a signature, such as one from a restored state of the server.
    let unknown = async |number| signed(&db.owner, &own.node, own.boot, number, &[]).await;
    for number in [own.number + 1, own.number + 1000, i64::MAX, own.number - 1, 0, -1, i64::MIN] {
        refused_to_apply(&db.operator, &unknown(number).await?).await;
    }
    let early = db.operator.query_one("select tollgate.ack_usage($1)", &[&own.number]).await;
    refused(early, &SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE);
    assert!(apply(&db.operator, &own).await?);
    assert!(ack(&db.operator, own.number).await?);
    refused_to_apply(&db.operator, &unknown(own.number + 1).await?).await;
    code(&db.web, &token.token).await?;
    flush_all(&db.operator).await?;
    assert_eq!(counts(&db.owner, token.id).await?, (2, 0));

    // An impossible record, however it got there, loses nothing either.
    code(&db.web, &token.token).await?;
    db.owner.batch_execute("update tollgate.usage_flushes set generation = generation + 1000000").await?;
    let next = drained(&db.operator).await?;
    let early = db.operator.query_one("select tollgate.ack_usage($1)", &[&next.number]).await;
    refused(early, &SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE);
    flush_all(&db.operator).await?;
    assert_eq!(counts(&db.owner, token.id).await?, (3, 0));
    Ok(())
}

#[tokio::test]
async fn a_carrier_may_fail_at_any_step() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "dying").await?;
    let token = issue(&db.owner, "a", &[]).await?;
    let mut uses = 0;
    for _ in 0..3 {
        for steps in 0..4 {
            code(&db.web, &token.token).await?;
            uses += 1;
            let doomed = db.session(OPERATOR).await?;
            let generation = drained(&doomed).await?;
            // It dies after the drain, in the middle of the apply's transaction, before or after the acknowledgement.
            if steps == 1 {
                doomed.batch_execute("begin").await?;
                assert!(apply(&doomed, &generation).await?);
            }
            if steps >= 2 {
                assert!(apply(&doomed, &generation).await?);
            }
            if steps == 3 {
                assert!(ack(&doomed, generation.number).await?);
            }
            drop(doomed);
            code(&db.web, &token.token).await?;
            uses += 1;
            flush_all(&db.operator).await?;
            assert_eq!(counts(&db.owner, token.id).await?, (uses, 0), "died after {steps} steps");
        }
    }
    Ok(())
}

#[tokio::test]
async fn usage_of_deleted_tokens_is_dropped() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "deleted").await?;
    let [kept, deleted] = [issue(&db.owner, "a", &[]).await?, issue(&db.owner, "a", &[]).await?];
    code(&db.web, &kept.token).await?;
    code(&db.web, &deleted.token).await?;
    db.owner.execute("delete from tollgate.api_tokens where id = $1", &[&deleted.id]).await?;
    let generation = drained(&db.operator).await?;
    assert_eq!(generation.rows.len(), 2);
    assert!(apply(&db.operator, &generation).await? && ack(&db.operator, generation.number).await?);
    assert_eq!(usage(&db.owner, deleted.id).await?, None);
    assert_eq!(counts(&db.owner, kept.id).await?, (1, 0));
    assert_eq!(drain(&db.operator).await?, None);
    Ok(())
}

/// The daemon's tasks run concurrently: a token that is still presented may be purged while its denials are applied.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flush_that_meets_a_purge_leaves_no_usage_of_a_token_that_is_gone() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "orphans").await?;
    let token = issue(&db.owner, "a", &[]).await?;
    code(&db.web, &token.token).await?;
    flush_all(&db.operator).await?;
    set(&db.owner, token.id, "revoked_at = now() - interval '40 days'").await?;
    assert_eq!(code(&db.web, &token.token).await?, "REVOKED");

    let purging = db.session(OPERATOR).await?;
    purging.batch_execute("begin").await?;
    assert_eq!(value::<i64>(&purging, "select tollgate.purge_tokens()").await?, 1);
    let generation = drained(&db.operator).await?;
    let flushing = tokio::spawn({
        let operator = db.session(OPERATOR).await?;
        async move { apply(&operator, &generation).await }
    });
    eventually_async(LONG, "the flush to wait for the purge, or to be done", async || {
        flushing.is_finished()
            || value::<bool>(
                &db.owner,
                "select exists (select from pg_stat_activity where wait_event_type = 'Lock'
                     and datname = current_database())",
            )
            .await
            .unwrap()
    })
    .await;
    purging.batch_execute("commit").await?;
    assert!(flushing.await??);
    assert_eq!(usage(&db.owner, token.id).await?, None, "this row would never be deleted");
    Ok(())
}

// ---- Exactness under concurrency

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_carriers_at_once_count_everything_once() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "carriers").await?;
    let tokens = issue_many(&db.owner, 20).await?;
    let stop = Arc::new(AtomicBool::new(false));
    let mut carriers = Vec::new();
    for _ in 0..2 {
        let (operator, stop) = (db.session(OPERATOR).await?, Arc::clone(&stop));
        carriers.push(tokio::spawn(async move {
            let mut carried = 0;
            while !stop.load(Ordering::Relaxed) {
                carried += i32::from(flush(&operator).await?);
            }
            anyhow::Ok(carried)
        }));
    }
    const ROUNDS: i64 = 150;
    for _ in 0..ROUNDS {
        assert_eq!(verify_each(&db.web, &tokens).await?, 20);
    }
    stop.store(true, Ordering::Relaxed);
    for carrier in carriers {
        assert!(carrier.await?? > 0, "a carrier that carried nothing tests nothing");
    }
    flush_all(&db.operator).await?;
    for token in &tokens {
        assert_eq!(counts(&db.owner, token.id).await?, (ROUNDS, 0));
    }
    Ok(())
}

/// As when the daemon flushes the primary and a standby at the same time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn servers_that_are_flushed_at_once_do_not_deadlock() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "servers").await?;
    let tokens = issue_many(&db.owner, 3).await?;
    let mut rows: Vec<UsageRow> = tokens
        .iter()
        .map(|token| UsageRow {
            token_id: token.id,
            uses: 1,
            denials: 2,
            last_used_at: Some(Timestamp::now()),
            last_used_ip: None,
        })
        .collect();
    rows.sort_by_key(|row| row.token_id);
    let generation =
        async |node: &str, rows: &[UsageRow]| signed(&db.owner, node, Uuid::new_v4(), 1, rows).await;
    assert!(apply(&db.operator, &generation("first", &rows).await?).await?);

    // Both reach the token in the middle and wait there: if each had started at a different end, they would deadlock.
    let holder = db.session("postgres").await?;
    let middle = rows[1].token_id;
    holder.batch_execute("begin").await?;
    holder.execute("select from tollgate.token_usage where token_id = $1 for update", &[&middle]).await?;
    let mut carriers = Vec::new();
    for node in ["primary", "standby"] {
        let (operator, generation) = (db.session(OPERATOR).await?, generation(node, &rows).await?);
        // Other joins might return the rows in another order.
        operator.batch_execute("set enable_hashjoin = off; set enable_mergejoin = off").await?;
        carriers.push(tokio::spawn(async move { apply(&operator, &generation).await }));
        rows.reverse();
    }
    eventually_async(LONG, "both to wait", async || {
        let waiting = "select count(*) from pg_stat_activity where wait_event_type = 'Lock'
            and datname = current_database()";
        value::<i64>(&db.owner, waiting).await.unwrap() == 2
    })
    .await;
    holder.batch_execute("rollback").await?;
    for carrier in carriers {
        assert!(carrier.await??);
    }
    for token in &tokens {
        assert_eq!(counts(&db.owner, token.id).await?, (3, 6));
    }
    Ok(())
}

/// Verifies on a separate connection: each token equally often, every tenth time with a scope that none has.
async fn load(client: &Client, tokens: &[Token], verifications: usize) -> Result<()> {
    let statement = client.prepare("select v.valid from tollgate.verify_api_token($1, $2) v").await?;
    for n in 0..verifications {
        let required = (n / tokens.len() % 10 == 9).then(|| vec!["users:write"]);
        let row = client.query_one(&statement, &[&tokens[n % tokens.len()].token, &required]).await?;
        assert_eq!(row.get::<_, bool>(0), required.is_none());
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn counts_are_exact_under_concurrency() -> Result<()> {
    const CLIENTS: i64 = 8;
    const EACH: usize = 5_000;
    let db = Db::create(&SHARED.cluster()?, "concurrent").await?;
    let tokens: Arc<Vec<Token>> = Arc::new(issue_many(&db.owner, 100).await?);
    let stop = Arc::new(AtomicBool::new(false));
    let carrier = tokio::spawn({
        let (operator, stop) = (db.session(OPERATOR).await?, Arc::clone(&stop));
        async move {
            let mut carried = 0;
            while !stop.load(Ordering::Relaxed) {
                carried += i32::from(flush(&operator).await?);
            }
            anyhow::Ok(carried)
        }
    });
    let mut clients = Vec::new();
    for _ in 0..CLIENTS {
        let (web, tokens) = (db.session("web").await?, Arc::clone(&tokens));
        clients.push(tokio::spawn(async move { load(&web, &tokens, EACH).await }));
    }
    for client in clients {
        client.await??;
    }
    stop.store(true, Ordering::Relaxed);
    assert!(carrier.await?? > 10, "this was to flush in the middle of the traffic");
    flush_all(&db.operator).await?;

    let each = i64::try_from(EACH)? * CLIENTS / 100;
    for token in tokens.iter() {
        assert_eq!(counts(&db.owner, token.id).await?, (each * 9 / 10, each / 10));
    }
    assert_eq!(totals(&db.owner).await?, (36_000, 4_000));
    Ok(())
}

// ---- Room

#[tokio::test]
async fn tokens_beyond_the_room_are_verified_and_reported_as_overflow() -> Result<()> {
    let cluster = Arc::new(common::start(Cluster::builder().setting("tollgate.max_tracked_keys", "1024"))?);
    let db = Db::only(&cluster).await?;
    let tokens = issue_many(&db.owner, 3_000).await?;
    let before = stats(&db.operator).await?;
    assert_eq!((&before["max_tracked_keys"], &before["overflowed"]), (&json!(1024), &json!(0)));
    assert!(!before["metering_detail"].as_str().unwrap_or_default().contains("max_tracked_keys"));

    for _ in 0..2 {
        assert_eq!(verify_each(&db.web, &tokens).await?, 3_000, "tokens without room are still verified");
    }
    let full = stats(&db.operator).await?;
    let overflowed = full["overflowed"].as_i64().context("a number")?;
    let tracked = full["tracked_keys"].as_i64().context("a number")?;
    assert!((1024..2048).contains(&tracked), "{full}");
    assert!(full["metering_detail"].as_str().unwrap_or_default().contains("max_tracked_keys"), "{full}");
    assert_eq!(full["metering"], json!(true));
    assert_eq!(full["verifications"]["VALID"], json!(6_000));
    flush_all(&db.operator).await?;
    assert_eq!(totals(&db.owner).await?, (6_000 - overflowed, 0));

    // Flushed counters make room for others.
    let others = issue_many(&db.owner, 256).await?;
    assert_eq!(verify_each(&db.web, &others).await?, 256);
    let after = stats(&db.operator).await?["overflowed"].as_i64().context("a number")? - overflowed;
    flush_all(&db.operator).await?;
    let mut counted = 0;
    for token in &others {
        counted += counts(&db.owner, token.id).await?.0;
    }
    assert_eq!(counted, 256 - after);
    assert!(counted > 200, "{counted} of 256 found room although everything was flushed");
    Ok(())
}

/// An entry that is closed and not acknowledged holds counts just like an open one.
#[tokio::test]
async fn unflushed_counters_make_no_room() -> Result<()> {
    let cluster = Arc::new(common::start(Cluster::builder().setting("tollgate.max_tracked_keys", "1024"))?);
    let db = Db::only(&cluster).await?;
    let tokens = issue_many(&db.owner, 3_000).await?;
    verify_each(&db.web, &tokens).await?;
    let generation = drained(&db.operator).await?;
    let fits: BTreeMap<Uuid, i64> = generation.rows.iter().map(|row| (row.token_id, row.uses)).collect();
    assert!(fits.len() > 900, "{} tokens found room", fits.len());
    verify_each(&db.web, &tokens).await?;
    let again = drained(&db.operator).await?;
    assert!(sums(&again) == sums(&generation), "something was evicted before it was acknowledged");
    assert!(apply(&db.operator, &generation).await? && ack(&db.operator, generation.number).await?);

    let next = drained(&db.operator).await?;
    assert!(next.rows.iter().all(|row| fits.contains_key(&row.token_id) && row.uses == 1));
    assert_eq!(next.rows.len(), fits.len(), "tokens with an entry are still counted");
    Ok(())
}

// ---- Databases, standbys, servers without shared memory

#[tokio::test]
async fn databases_of_a_server_have_their_counters_to_themselves() -> Result<()> {
    let cluster = SHARED.cluster()?;
    let original = Db::create(&cluster, "original").await?;
    let token = issue(&original.owner, "a", &[]).await?;
    drop(original);
    // A copy has the same tokens, with the same ids. There must be no connections to the copied database.
    eventually_async(LONG, "a copy to be made", async || {
        cluster.execute(DATABASE, "create database copied template original").is_ok()
    })
    .await;
    let original = cluster.connect(OPERATOR, "original").await?;
    let copied = cluster.connect(OPERATOR, "copied").await?;
    let web_of_original = cluster.connect("web", "original").await?;
    let web_of_copied = cluster.connect("web", "copied").await?;

    for _ in 0..3 {
        code(&web_of_original, &token.token).await?;
    }
    code(&web_of_copied, &token.token).await?;
    let of_original = drained(&original).await?;
    assert_eq!((of_original.counts(token.id), of_original.rows.len()), ((3, 0), 1));
    let of_copied = drained(&copied).await?;
    assert_eq!((of_copied.counts(token.id), of_copied.rows.len()), ((1, 0), 1));

    assert!(apply(&original, &of_original).await?);
    assert!(ack(&original, of_original.number).await?);
    assert_eq!(drain(&original).await?, None);
    assert_eq!(
        drained(&copied).await?,
        of_copied,
        "an acknowledgement frees the counters of its database alone"
    );
    assert!(apply(&copied, &of_copied).await? && ack(&copied, of_copied.number).await?);
    for (database, uses) in [("original", 3), ("copied", 1)] {
        assert_eq!(counts(&cluster.connect("postgres", database).await?, token.id).await?, (uses, 0));
    }
    Ok(())
}

#[tokio::test]
async fn a_standby_counts_and_is_drained_while_the_primary_keeps_the_books() -> Result<()> {
    let mut cluster = Arc::new(common::start(Cluster::builder())?);
    let db = Db::only(&cluster).await?;
    let standby = cluster.standby()?;
    let token = issue(&db.owner, "a", &["posts:read"]).await?;
    standby.catch_up_with(&cluster)?;
    let web = standby.connect("web", DATABASE).await?;
    let operator = standby.connect(OPERATOR, DATABASE).await?;
    assert!(value::<bool>(&operator, "select pg_is_in_recovery()").await?);

    for _ in 0..3 {
        assert_eq!(Request::of(&token.token).coming_from("10.0.0.1").code(&web).await?, "VALID");
    }
    let denied = Request::of(&token.token).requiring(&[Some("users:read")]);
    assert_eq!(denied.code(&web).await?, "INSUFFICIENT_SCOPE");
    assert_eq!(code(&db.web, &token.token).await?, "VALID");

    let of_standby = drained(&operator).await?;
    let of_primary = drained(&db.operator).await?;
    assert_eq!((of_standby.counts(token.id), of_primary.counts(token.id)), ((3, 1), (1, 0)));
    assert_ne!(of_standby.boot, of_primary.boot);
    assert_eq!(drained(&operator).await?, of_standby);
    refused(
        operator
            .query_one(
                "select tollgate.apply_usage($1, $2, $3, $4, $5)",
                &[
                    &of_standby.node,
                    &of_standby.boot,
                    &of_standby.number,
                    &of_standby.rows,
                    &of_standby.signature,
                ],
            )
            .await,
        &SqlState::READ_ONLY_SQL_TRANSACTION,
    );
    for (generation, server) in [(&of_standby, &operator), (&of_primary, &db.operator)] {
        assert!(apply(&db.operator, generation).await?);
        standby.catch_up_with(&cluster)?;
        assert!(ack(server, generation.number).await?);
        assert_eq!(drain(server).await?, None);
    }
    assert_eq!(counts(&db.owner, token.id).await?, (4, 1));
    assert_eq!(stats(&operator).await?["verifications"]["VALID"], json!(3));

    // What was counted before a promotion is still there after it.
    assert_eq!(code(&web, &token.token).await?, "VALID");
    standby.catch_up_with(&cluster)?;
    drop(db);
    Arc::get_mut(&mut cluster).context("no other holder")?.stop()?;
    standby.promote()?;
    flush_all(&operator).await?;
    assert_eq!(counts(&standby.connect("postgres", DATABASE).await?, token.id).await?, (5, 1));
    Ok(())
}

#[tokio::test]
async fn without_preload_tokens_are_verified_and_metering_says_why_it_is_off() -> Result<()> {
    let cluster = Arc::new(common::start(Cluster::builder().preload(false))?);
    let db = Db::only(&cluster).await?;
    let token = issue(&db.owner, "a", &[]).await?;
    assert_eq!(code(&db.web, &token.token).await?, "VALID");
    for call in ["select * from tollgate.drain_usage()", "select tollgate.ack_usage(1)"] {
        let answer = db.operator.query_one(call, &[]).await;
        let error = refused(answer, &SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE);
        assert!(error.hint().is_some_and(|hint| hint.contains("shared_preload_libraries")), "{error:?}");
    }
    let stats = stats(&db.operator).await?;
    assert_eq!(stats["metering"], json!(false));
    assert!(stats["metering_detail"].as_str().unwrap_or_default().contains("shared_preload_libraries"));
    for counter in [
        "started_at",
        "boot",
        "verifications",
        "verification_latency",
        "tracked_keys",
        "busy_keys",
        "max_tracked_keys",
        "overflowed",
        "generation",
        "closed_generation",
    ] {
        assert_eq!(stats[counter], Value::Null, "{counter}");
    }
    assert_eq!(stats["flushes"], json!(0));

    // Usage can still be applied: for a standby that is preloaded.
    let row = UsageRow { token_id: token.id, uses: 2, denials: 0, last_used_at: None, last_used_ip: None };
    let generation = signed(&db.owner, "standby", Uuid::new_v4(), 1, &[row]).await?;
    assert!(apply(&db.operator, &generation).await?);
    assert_eq!(counts(&db.owner, token.id).await?, (2, 0));
    Ok(())
}

#[tokio::test]
async fn the_number_of_tokens_is_counted_while_they_are_few_and_else_unknown_before_analyze() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "estimated").await?;
    let estimate = async || Ok::<_, anyhow::Error>(stats(&db.operator).await?["tokens_estimate"].clone());
    db.owner.batch_execute("alter table tollgate.api_tokens set (autovacuum_enabled = off)").await?;
    assert_eq!(estimate().await?, json!(0));
    issue_many(&db.owner, 3).await?;
    assert_eq!(estimate().await?, json!(3));
    let more = "insert into tollgate.api_tokens (id, token_hash, user_id, name, scopes, metadata, hint)
                select gen_random_uuid(), sha256(gen_random_uuid()::text::bytea), 'bulk', 'n', '{}', '{}', 'x' from generate_series(1, 10000)";
    db.owner.batch_execute(more).await?;
    assert_eq!(estimate().await?, Value::Null);
    db.owner.batch_execute("analyze tollgate.api_tokens").await?;
    assert_eq!(estimate().await?, json!(10_003));
    // By its current size.
    db.owner.batch_execute(more).await?;
    let twice = estimate().await?.as_i64().context("a number")?;
    assert!((19_000..=21_000).contains(&twice), "{twice}");
    Ok(())
}

#[tokio::test]
async fn stats_shows_the_status_of_the_server() -> Result<()> {
    let cluster = Arc::new(common::start(Cluster::builder())?);
    let db = Db::only(&cluster).await?;
    let tokens = issue_many(&db.owner, 30).await?;
    let before = stats(&db.operator).await?;
    assert_eq!((&before["metering"], &before["flushes"]), (&json!(true), &json!(0)));
    assert_eq!((&before["last_flush_at"], &before["closed_generation"]), (&Value::Null, &Value::Null));
    assert_eq!(before["library_version"], before["extension_version"]);
    assert_eq!(before["tokens_estimate"], json!(30));
    assert_eq!(before["tracked_keys"], json!(0));
    let setting: i64 =
        value(&db.owner, "select current_setting('tollgate.max_tracked_keys')::bigint").await?;
    assert_eq!((&before["max_tracked_keys"], setting), (&json!(131_072), 131_072));
    for table in ["api_tokens", "token_usage", "audit_log"] {
        let size: i64 =
            value(&db.owner, &format!("select pg_total_relation_size('tollgate.{table}')")).await?;
        assert_eq!(before[format!("{table}_bytes")], json!(size));
    }
    let started: bool = value(
        &db.operator,
        "select s.started_at between pg_postmaster_start_time() - interval '1 minute' and clock_timestamp()
         from tollgate.stats() s",
    )
    .await?;
    assert!(started);

    verify_each(&db.web, &tokens).await?;
    code(&db.web, "junk").await?;
    revoke(&db.owner, tokens[0].id).await?;
    code(&db.web, &tokens[0].token).await?;
    let counted = stats(&db.operator).await?;
    assert_eq!((&counted["tracked_keys"], &counted["busy_keys"]), (&json!(30), &json!(30)));
    for (outcome, count) in [("VALID", 30), ("MALFORMED", 1), ("REVOKED", 1), ("NOT_FOUND", 0)] {
        assert_eq!(counted["verifications"][outcome], json!(count), "{outcome}");
    }

    let generation = drained(&db.operator).await?;
    let closed = stats(&db.operator).await?;
    assert_eq!(closed["boot"], json!(generation.boot));
    assert_eq!(closed["closed_generation"], json!(generation.number));
    apply(&db.operator, &generation).await?;
    ack(&db.operator, generation.number).await?;
    let after = stats(&db.operator).await?;
    assert_eq!((&after["flushes"], &after["closed_generation"]), (&json!(1), &Value::Null));
    assert!(after["generation"].as_i64() > Some(generation.number), "{after}");
    assert!(after["last_flush_at"].is_string(), "{after}");
    // Their counts are flushed, so they make room for others.
    assert_eq!((&after["tracked_keys"], &after["busy_keys"]), (&json!(30), &json!(0)));
    assert_eq!((&after["boot"], &after["started_at"]), (&before["boot"], &before["started_at"]));
    Ok(())
}

// ---- A crash of the server

/// A backend that is killed may have held one of our locks: PostgreSQL then restarts all of them, with fresh memory.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_killed_backend_counting_begins_anew_and_what_was_drained_can_still_be_applied() -> Result<()>
{
    let cluster = Arc::new(common::start(Cluster::builder())?);
    let db = Db::only(&cluster).await?;
    let tokens: Arc<Vec<Token>> = Arc::new(issue_many(&db.owner, 50).await?);
    drop(db);
    let mut expected = 0;
    let mut boots = Vec::new();
    let mut last_number = 0;
    for _ in 0..4 {
        let operator = cluster.connect(OPERATOR, DATABASE).await?;
        let mut clients = Vec::new();
        let mut processes: Vec<i32> = Vec::new();
        for _ in 0..4 {
            let (web, tokens) = (cluster.connect("web", DATABASE).await?, Arc::clone(&tokens));
            processes.push(value(&web, "select pg_backend_pid()").await?);
            // Until the server throws it out.
            clients.push(tokio::spawn(async move { while load(&web, &tokens, 1_000).await.is_ok() {} }));
        }
        eventually_async(LONG, "some traffic", async || {
            stats(&operator).await.is_ok_and(|stats| stats["verifications"]["VALID"].as_i64() > Some(200))
        })
        .await;
        let generation = drained(&operator).await?;
        assert!(!boots.contains(&generation.boot), "each start has a boot id of its own");
        assert!(generation.number > last_number, "{} is not after {last_number}", generation.number);
        boots.push(generation.boot);
        last_number = generation.number;

        kill(Pid::from_raw(processes[0]), Signal::SIGKILL)?;
        for client in clients {
            client.await?;
        }
        eventually_async(LONG, "the server to be back", async || {
            cluster.connect(OPERATOR, DATABASE).await.is_ok()
        })
        .await;
        let operator = cluster.connect(OPERATOR, DATABASE).await?;
        let fresh = stats(&operator).await?;
        assert_eq!(fresh["verifications"]["VALID"], json!(0));
        assert_ne!(fresh["boot"], json!(generation.boot));
        assert_eq!(drain(&operator).await?, None);

        assert!(!ack(&operator, generation.number).await?, "the server no longer knows of it");
        assert!(apply(&operator, &generation).await?);
        assert!(!apply(&operator, &generation).await?);
        expected += generation.rows.iter().map(|row| row.uses).sum::<i64>();
        let owner = cluster.connect("postgres", DATABASE).await?;
        assert_eq!(totals(&owner).await?.0, expected);
    }
    assert!(expected > 800);
    Ok(())
}

#[tokio::test]
async fn after_a_crash_of_the_whole_server_the_books_are_as_they_were_at_the_last_flush() -> Result<()> {
    let mut cluster = Arc::new(common::start(Cluster::builder())?);
    let db = Db::only(&cluster).await?;
    let token = issue(&db.owner, "a", &[]).await?;
    code(&db.web, &token.token).await?;
    flush_all(&db.operator).await?;
    code(&db.web, &token.token).await?;
    let lost = drained(&db.operator).await?;
    drop(db);
    let server = Arc::get_mut(&mut cluster).context("no other holder")?;
    server.crash()?;
    server.restart()?;

    let operator = cluster.connect(OPERATOR, DATABASE).await?;
    let owner = cluster.connect("postgres", DATABASE).await?;
    let web = cluster.connect("web", DATABASE).await?;
    assert_eq!(counts(&owner, token.id).await?, (1, 0));
    assert_eq!(code(&web, &token.token).await?, "VALID");
    let next = drained(&operator).await?;
    assert!(next.number > lost.number && next.boot != lost.boot);
    assert!(apply(&operator, &next).await? && ack(&operator, next.number).await?);
    assert_eq!(counts(&owner, token.id).await?, (2, 0));
    Ok(())
}
