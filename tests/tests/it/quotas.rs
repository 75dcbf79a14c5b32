//! Quotas: what they bind, when they refuse and for how long, what stays when they change, and who may do what. A daemon's
//! leases are granted by hand here; `quota_faults` has real daemons, and things that break.

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use tollgate_tests::{Cluster, DATABASE, eventually_async};
use uuid::Uuid;

use crate::commands::{LONG, NO, OK, json_of, printed};
use crate::common::{self, Request, Shared, Token, code, issue, issue_with, refused, rotate, value};
use crate::operator::Db;

static SHARED: Shared = Shared::new(&[]);

/// How many of `times` verifications are accepted; the others have spent their quota.
async fn accepted(client: &Client, token: &Token, times: usize) -> Result<usize> {
    let mut accepted = 0;
    for _ in 0..times {
        match code(client, &token.token).await?.as_str() {
            "VALID" => accepted += 1,
            "QUOTA_EXCEEDED" => {}
            other => anyhow::bail!("{other}"),
        }
    }
    Ok(accepted)
}

async fn set(owner: &Client, arguments: &str) -> Result<(), tokio_postgres::Error> {
    owner.batch_execute(&format!("select tollgate.set_quota({arguments})")).await
}

/// What the daemon does several times a second: how many leases were granted.
async fn lease(db: &Db) -> Result<i64> {
    value(&db.operator, "select tollgate.lease_quotas()").await
}

/// used, leased and remaining of the only quota that a token spends.
async fn left(owner: &Client, token: &Token) -> Result<(i64, i64, i64)> {
    let row =
        owner.query_one("select used, leased, remaining from tollgate.token_quota($1)", &[&token.id]).await?;
    Ok((row.get(0), row.get(1), row.get(2)))
}

async fn created(name: &str) -> Result<(Db, Token)> {
    let db = Db::create(&SHARED.cluster()?, name).await?;
    let token = issue(&db.owner, "ann", &[]).await?;
    Ok((db, token))
}

// ---- Spending

#[tokio::test]
async fn a_quota_is_spent_lease_by_lease_and_refuses_once_nothing_is_left() -> Result<()> {
    let (db, token) = created("spent").await?;
    let other = issue(&db.owner, "ann", &[]).await?;
    set(&db.owner, &format!("'{}', amount => 10, per => 'lifetime', lease => 4", token.id)).await?;
    assert_eq!(left(&db.owner, &token).await?, (0, 4, 10));
    assert_eq!(accepted(&db.web, &token, 5).await?, 4);
    let answer = Request::of(&token.token).verify(&db.web).await?;
    assert_eq!((answer.valid, answer.code.as_str()), (false, "QUOTA_EXCEEDED"));
    assert_eq!((answer.retry_after.as_deref(), answer.rate_limit), (Some("00:00:01"), None));
    assert_eq!((answer.token_id, answer.user_id), (Some(token.id), None));
    assert_eq!(left(&db.owner, &token).await?, (4, 0, 6));

    assert_eq!((lease(&db).await?, lease(&db).await?), (1, 0), "no more than is asked for");
    assert_eq!(left(&db.owner, &token).await?, (4, 4, 6));
    assert_eq!(accepted(&db.web, &token, 3).await?, 3);
    // Before it is used up.
    assert_eq!(lease(&db).await?, 1);
    assert_eq!(accepted(&db.web, &token, 5).await?, 3);
    assert_eq!((left(&db.owner, &token).await?, lease(&db).await?), ((10, 0, 0), 0));
    let answer = Request::of(&token.token).verify(&db.web).await?;
    assert_eq!((answer.code.as_str(), answer.retry_after), ("QUOTA_EXCEEDED", None));
    assert_eq!(code(&db.web, &other.token).await?, "VALID", "it is that of one token");

    let error =
        refused(common::authenticate(&db.web, &token.token).await, &SqlState::CONFIGURATION_LIMIT_EXCEEDED);
    let detail: Value = serde_json::from_str(error.detail().context("a detail")?)?;
    assert_eq!(detail, json!({"code": "QUOTA_EXCEEDED"}));
    let denied: i64 = value(
        &db.owner,
        "select coalesce(sum(denials), 0)::bigint from tollgate.drain_usage() where uses > 1",
    )
    .await?;
    assert_eq!(denied, 6, "refusals are counted as denials");
    Ok(())
}

#[tokio::test]
async fn a_use_that_a_check_or_a_limit_refuses_costs_nothing() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "refused_uses").await?;
    let arguments = "scopes => '{posts:read}', rate_limit => 2, rate_window => '1 day'";
    let token = issue_with(&db.owner, "ann", arguments).await?;
    set(&db.owner, &format!("'{}', amount => 10, per => 'day', lease => 5", token.id)).await?;
    set(&db.owner, "user_id => 'ann', amount => 20, per => 'day'").await?;
    for (required, expected) in [
        ("users:read", "INSUFFICIENT_SCOPE"),
        ("posts:read", "VALID"),
        ("posts:read", "VALID"),
        ("posts:read", "RATE_LIMITED"),
    ] {
        let required = [Some(required)];
        assert_eq!(Request::of(&token.token).requiring(&required).code(&db.web).await?, expected);
    }
    let used = "select array_agg(q.used) from tollgate.list_quotas() q";
    assert_eq!(value::<Vec<i64>>(&db.owner, used).await?, [2, 2]);
    Ok(())
}

#[tokio::test]
async fn a_use_is_charged_to_both_quotas_or_to_none() -> Result<()> {
    let (db, token) = created("both_quotas").await?;
    set(&db.owner, &format!("'{}', amount => 5, per => 'day', lease => 5", token.id)).await?;
    set(&db.owner, "user_id => 'ann', amount => 3, per => 'month', lease => 3").await?;
    assert_eq!(accepted(&db.web, &token, 6).await?, 3);
    let rows = db.owner.query("select used, remaining from tollgate.token_quota($1)", &[&token.id]).await?;
    let rows: Vec<(i64, i64)> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
    assert_eq!(rows, [(3, 2), (3, 0)], "its own first");
    Ok(())
}

#[tokio::test]
async fn a_users_quota_holds_over_all_tokens_and_access_tokens_and_from_the_next_use_on() -> Result<()> {
    let (db, token) = created("users").await?;
    db.owner
        .batch_execute("select tollgate.grant_capability('web', 'verifier'), tollgate.create_signing_key()")
        .await?;
    let access: String =
        value(&db.owner, "select (tollgate.issue_access_token('ann', '{posts:read}')).access_token").await?;
    let verify = async |token: &str| -> Result<String> {
        Ok(db.web.query_one("select code from tollgate.verify_access_token($1)", &[&token]).await?.get(0))
    };
    // The session has learned that no user has a quota, and is in a transaction that keeps its snapshot.
    assert_eq!(code(&db.web, &token.token).await?, "VALID");
    db.web.batch_execute("begin isolation level repeatable read").await?;
    assert_eq!(
        (code(&db.web, &token.token).await?, verify(&access).await?),
        ("VALID".into(), "VALID".into())
    );
    set(&db.owner, "user_id => 'ann', amount => 4, per => 'week', lease => 4").await?;
    let later = issue(&db.owner, "ann", &[]).await?;
    let ben = issue(&db.owner, "ben", &[]).await?;
    for _ in 0..2 {
        assert_eq!(code(&db.web, &token.token).await?, "VALID");
        assert_eq!(verify(&access).await?, "VALID");
    }
    assert_eq!(code(&db.web, &token.token).await?, "QUOTA_EXCEEDED");
    db.web.batch_execute("commit").await?;
    assert_eq!(code(&db.web, &later.token).await?, "QUOTA_EXCEEDED");
    assert_eq!(verify(&access).await?, "QUOTA_EXCEEDED");
    assert_eq!(code(&db.web, &ben.token).await?, "VALID");
    let used: i64 = value(&db.owner, "select used from tollgate.user_quota('ann')").await?;
    assert_eq!(used, 4);
    Ok(())
}

#[tokio::test]
async fn what_is_rotated_or_derived_from_a_token_spends_its_quota() -> Result<()> {
    let (db, first) = created("family").await?;
    let token = rotate(&db.owner, first.id, "1 hour").await?;
    let older = common::derive(&db.owner, &first, &[]).await?;
    set(&db.owner, &format!("'{}', amount => 8, per => 'lifetime', lease => 8", token.id)).await?;
    let child = common::derive(&db.owner, &token, &[]).await?;
    let next = rotate(&db.owner, token.id, "1 hour").await?;
    for one in [&first, &older, &token, &child, &next] {
        assert_eq!(accepted(&db.web, one, 1).await?, 1);
    }
    assert_eq!(left(&db.owner, &next).await?, (5, 3, 3));
    let remaining: Option<i64> = db
        .owner
        .query_one("select quota_remaining from tollgate.tokens where id = $1", &[&child.id])
        .await?
        .get(0);
    assert_eq!(remaining, Some(3));
    assert_eq!(accepted(&db.web, &child, 9).await?, 3);
    assert_eq!(accepted(&db.web, &next, 1).await?, 0);

    let invalid = &SqlState::INVALID_PARAMETER_VALUE;
    let of_child = format!("'{}', amount => 100, per => 'day'", child.id);
    let error = refused(set(&db.owner, &of_child).await, invalid);
    assert!(error.detail().is_some_and(|detail| detail.contains(&token.id.to_string())), "{error:?}");
    let of_old = format!("'{}', amount => 100, per => 'day'", token.id);
    refused(set(&db.owner, &of_old).await, &SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE);
    assert!(value::<bool>(&db.owner, &format!("select tollgate.remove_quota('{}')", next.id)).await?);
    for one in [&first, &older, &token, &child, &next] {
        assert_eq!(accepted(&db.web, one, 1).await?, 1);
    }
    Ok(())
}

#[tokio::test]
async fn a_token_in_its_grace_spends_the_quota_though_the_one_that_replaced_it_has_ended() -> Result<()> {
    let (db, first) = created("line").await?;
    let second = rotate(&db.owner, first.id, "1 hour").await?;
    let third = rotate(&db.owner, second.id, "0").await?;
    for per in ["day", "week"] {
        set(&db.owner, &format!("'{}', amount => 3, per => '{per}', lease => 3", third.id)).await?;
        assert_eq!(accepted(&db.web, &first, 5).await?, 3);
        assert_eq!(accepted(&db.web, &third, 1).await?, 0);
    }
    Ok(())
}

#[tokio::test]
async fn a_server_that_is_no_longer_the_primary_keeps_its_first_lease_and_is_granted_more() -> Result<()> {
    let (db, token) = created("switched_over").await?;
    set(&db.owner, &format!("'{}', amount => 10, per => 'lifetime', lease => 2", token.id)).await?;
    let elsewhere =
        "select tollgate.grant_lease(id, gen_random_uuid(), ends_at, 0, 0, true) from tollgate.quotas";
    assert!(value::<bool>(&db.owner, elsewhere).await?);
    assert_eq!(accepted(&db.web, &token, 3).await?, 2);
    assert_eq!(lease(&db).await?, 1);
    assert_eq!(accepted(&db.web, &token, 3).await?, 2);
    Ok(())
}

#[tokio::test]
async fn a_lease_is_granted_durably_whatever_the_session_says() -> Result<()> {
    let (db, token) = created("durable").await?;
    set(&db.owner, &format!("'{}', amount => 10, per => 'lifetime', lease => 2", token.id)).await?;
    assert_eq!(accepted(&db.web, &token, 3).await?, 2);
    let setting = "select current_setting('synchronous_commit')";
    for (granted, within) in [(1, "on"), (0, "off")] {
        db.operator.batch_execute("set synchronous_commit = off; begin").await?;
        assert_eq!(lease(&db).await?, granted);
        assert_eq!(value::<String>(&db.operator, setting).await?, within);
        db.operator.batch_execute("commit").await?;
        assert_eq!(value::<String>(&db.operator, setting).await?, "off");
    }
    Ok(())
}

// ---- Periods

#[tokio::test]
async fn a_period_ends_and_the_next_one_begins_with_a_lease_though_nothing_was_written() -> Result<()> {
    let (db, token) = created("periods").await?;
    set(&db.owner, &format!("'{}', amount => 6, per => 'month', lease => 3", token.id)).await?;
    // This one is about to end.
    db.owner.batch_execute("update tollgate.quotas set ends_at = clock_timestamp() + interval '2 s'").await?;
    assert_eq!(accepted(&db.web, &token, 1).await?, 1);
    lease(&db).await?;
    eventually_async(LONG, "the end of the period", async || {
        value::<bool>(&db.owner, "select ends_at <= clock_timestamp() from tollgate.quotas").await.unwrap()
    })
    .await;
    let before: String = value(&db.owner, "select xmin::text from tollgate.quotas").await?;
    assert_eq!(left(&db.owner, &token).await?, (0, 3, 6));
    assert_eq!(accepted(&db.web, &token, 5).await?, 3);
    assert_eq!(value::<String>(&db.owner, "select xmin::text from tollgate.quotas").await?, before);
    assert_eq!(left(&db.owner, &token).await?, (3, 0, 3));
    assert_eq!(lease(&db).await?, 1);
    assert_eq!(accepted(&db.web, &token, 5).await?, 3);
    let answer = Request::of(&token.token).verify(&db.web).await?;
    assert_eq!(answer.code, "QUOTA_EXCEEDED");
    // Until the first of the next month.
    let until: bool = db
        .owner
        .query_one(
            "select abs(extract(epoch from clock_timestamp() + $1::text::interval
                 - (date_trunc('month', clock_timestamp(), 'UTC') + interval '1 month'))) < 90000",
            &[&answer.retry_after],
        )
        .await?
        .get(0);
    assert!(until, "{answer:?}");
    Ok(())
}

#[tokio::test]
async fn a_clock_that_goes_back_does_not_bring_the_earlier_period_back() -> Result<()> {
    let (db, token) = created("clock").await?;
    set(&db.owner, &format!("'{}', amount => 6, per => 'month', lease => 3", token.id)).await?;
    // As if the server had been in a later month already.
    db.owner
        .batch_execute("update tollgate.quotas set ends_at = ends_at + interval '3 months', taken = 5")
        .await?;
    db.owner
        .batch_execute("insert into tollgate.quota_leases select id, holder, ends_at, 5 from tollgate.quotas")
        .await?;
    assert_eq!(accepted(&db.web, &token, 9).await?, 5);
    assert_eq!(lease(&db).await?, 1);
    assert_eq!(accepted(&db.web, &token, 9).await?, 1);
    assert_eq!((left(&db.owner, &token).await?, lease(&db).await?), ((6, 0, 0), 0));
    Ok(())
}

#[tokio::test]
async fn periods_follow_the_calendar_of_their_time_zone() -> Result<()> {
    let (db, _) = created("calendar").await?;
    for (per, zone, at, end) in [
        ("month", "America/New_York", "2026-11-01 03:59:59+00", "2026-11-01 04:00:00+00"),
        ("month", "America/New_York", "2026-11-01 04:00:00+00", "2026-12-01 05:00:00+00"),
        ("month", "UTC", "2024-02-29 23:59:59.999999+00", "2024-03-01 00:00:00+00"),
        ("month", "America/New_York", "2027-01-31 12:00:00+00", "2027-02-01 05:00:00+00"),
        // Of 23 and 25 hours.
        ("day", "America/New_York", "2026-03-08 05:00:00+00", "2026-03-09 04:00:00+00"),
        ("day", "America/New_York", "2026-11-01 04:00:00+00", "2026-11-02 05:00:00+00"),
        ("week", "Europe/Berlin", "2026-03-28 12:00:00+00", "2026-03-29 22:00:00+00"),
        ("week", "UTC", "2026-11-30 00:00:00+00", "2026-12-07 00:00:00+00"),
        ("hour", "Asia/Kolkata", "2026-01-01 00:29:59+00", "2026-01-01 00:30:00+00"),
        // The hour that comes twice is two hours.
        ("hour", "America/New_York", "2026-11-01 05:30:00+00", "2026-11-01 06:00:00+00"),
        ("hour", "America/New_York", "2026-11-01 06:30:00+00", "2026-11-01 07:00:00+00"),
        ("lifetime", "UTC", "2026-11-01 06:30:00+00", "infinity"),
    ] {
        let call = "select tollgate.quota_period_end($1, $2, $3::text::timestamptz) = $4::text::timestamptz";
        let row = db.owner.query_one(call, &[&per, &zone, &at, &end]).await?;
        assert!(row.get::<_, bool>(0), "{per} {zone} {at}");
    }
    // Whatever the moment, its period ends later, within a period's longest length, and is that of the moment before its end.
    let odd = "select string_agg(concat_ws(' ', per, zone, at, e.\"end\"), ', ') from unnest('{hour,day,week,month}'::text[]) per,
                   unnest('{UTC,America/New_York,America/Sao_Paulo,Australia/Lord_Howe,Asia/Kathmandu}'::text[]) zone,
                   generate_series(timestamptz '2017-10-01', '2018-03-31', interval '7 hours 13 minutes') at,
                   lateral (select tollgate.quota_period_end(per, zone, at) as \"end\") e
               where not (e.\"end\" > at and e.\"end\" <= at + replace('1 ' || per, '1 month', '31 days')::interval + interval '90 minutes'
                          and tollgate.quota_period_end(per, zone, e.\"end\" - interval '1 microsecond') = e.\"end\")";
    assert_eq!(value::<Option<String>>(&db.owner, odd).await?, None);
    Ok(())
}

// ---- Changes

#[tokio::test]
async fn a_change_of_the_amount_or_the_lease_keeps_what_was_used_and_another_period_begins_anew() -> Result<()>
{
    let (db, token) = created("changes").await?;
    let set = async |arguments: &str| set(&db.owner, &format!("'{}', {arguments}", token.id)).await;
    set("amount => 10, per => 'day', lease => 4").await?;
    assert_eq!(accepted(&db.web, &token, 3).await?, 3);
    set("amount => 20, per => 'day'").await?;
    assert_eq!(left(&db.owner, &token).await?, (3, 1, 17));
    // What was leased counts as spent.
    set("amount => 20, per => 'day', lease => 6").await?;
    assert_eq!(left(&db.owner, &token).await?, (4, 6, 16));
    set("amount => 3, per => 'day', lease => 1").await?;
    assert_eq!((left(&db.owner, &token).await?, accepted(&db.web, &token, 2).await?), ((3, 0, 0), 0));
    set("amount => 3, per => 'week', time_zone => 'Asia/Tokyo', lease => 1").await?;
    assert_eq!((left(&db.owner, &token).await?, accepted(&db.web, &token, 2).await?), ((0, 1, 3), 1));
    let events = common::history(&db.owner, token.id).await?;
    let (event, detail) = events.last().context("an event")?;
    assert_eq!(event, "quota.set");
    let expected = json!({"amount": 3, "per": "week", "time_zone": "Asia/Tokyo", "lease": 1, "without_daemon": "closed", "amount_before": 3});
    assert_eq!(detail, &expected);
    Ok(())
}

#[tokio::test]
async fn credits_add_to_a_lifetime_and_a_removed_quota_binds_no_more_and_is_forgotten() -> Result<()> {
    let (db, token) = created("credits").await?;
    let add = async |credits: i64| {
        let call = "select tollgate.add_credits(user_id => 'ann', credits => $1)";
        db.owner.query_one(call, &[&credits]).await.map(|row| row.get::<_, i64>(0))
    };
    refused(add(1).await, &SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE);
    set(&db.owner, "user_id => 'ann', amount => 2, per => 'lifetime', lease => 2").await?;
    assert_eq!(accepted(&db.web, &token, 3).await?, 2);
    assert_eq!((lease(&db).await?, accepted(&db.web, &token, 3).await?, lease(&db).await?), (0, 0, 0));
    assert_eq!((add(5).await?, lease(&db).await?), (7, 0), "no server has asked since");
    assert_eq!((accepted(&db.web, &token, 1).await?, lease(&db).await?), (0, 1));
    assert_eq!(accepted(&db.web, &token, 3).await?, 2);
    for absurd in [0, -1, i64::MAX] {
        refused(add(absurd).await, &SqlState::INVALID_PARAMETER_VALUE);
    }
    let remembered = "select count(*) from tollgate.remembered_quotas()";
    assert_eq!(value::<i64>(&db.owner, remembered).await?, 1);
    let remove = "select tollgate.remove_quota(user_id => 'ann', reason => 'paid')";
    assert_eq!(
        (value::<bool>(&db.owner, remove).await?, value::<bool>(&db.owner, remove).await?),
        (true, false)
    );
    assert_eq!(accepted(&db.web, &token, 3).await?, 3);
    assert_eq!(value::<i64>(&db.operator, "select tollgate.forget_removed_quotas()").await?, 1);
    assert_eq!(value::<i64>(&db.owner, remembered).await?, 0);
    let events =
        "select string_agg(event, ' ' order by id) from tollgate.audit_log where event like 'quota.%'";
    assert_eq!(value::<String>(&db.owner, events).await?, "quota.set quota.credited quota.removed");
    Ok(())
}

#[tokio::test]
async fn an_open_quota_goes_on_without_a_daemon_and_ends_where_it_should() -> Result<()> {
    let (db, token) = created("open").await?;
    set(
        &db.owner,
        &format!("'{}', amount => 12, per => 'day', lease => 3, without_daemon => 'open'", token.id),
    )
    .await?;
    assert_eq!(accepted(&db.web, &token, 9).await?, 9);
    assert_eq!(left(&db.owner, &token).await?, (9, 0, 3));
    // What was spent beyond the lease is leased then, and as much again as there is.
    assert_eq!(lease(&db).await?, 1);
    assert_eq!(left(&db.owner, &token).await?, (9, 3, 3));
    assert_eq!(accepted(&db.web, &token, 9).await?, 3);
    assert_eq!(left(&db.owner, &token).await?, (12, 0, 0));
    Ok(())
}

// ---- Who may do what

#[tokio::test]
async fn nonsense_is_refused_and_never_repeated() -> Result<()> {
    let (db, token) = created("nonsense").await?;
    let digits = "a".repeat(80);
    for (arguments, named) in [
        ("amount => 1, per => 'day'".to_owned(), "token_id and user_id"),
        (format!("'{}', 'ann', 1, 'day'", token.id), "token_id and user_id"),
        ("user_id => ' ', amount => 1, per => 'day'".to_owned(), "user_id"),
        ("user_id => 'ann', amount => 0, per => 'day'".to_owned(), "amount"),
        ("user_id => 'ann', amount => -5, per => 'day'".to_owned(), "amount"),
        ("user_id => 'ann', amount => 9223372036854775807, per => 'day'".to_owned(), "amount"),
        ("user_id => 'ann', per => 'day'".to_owned(), "amount"),
        ("user_id => 'ann', amount => 1".to_owned(), "per"),
        ("user_id => 'ann', amount => 1, per => 'year'".to_owned(), "per"),
        ("user_id => 'ann', amount => 5, per => 'day', lease => 6".to_owned(), "lease"),
        ("user_id => 'ann', amount => 5, per => 'day', lease => 0".to_owned(), "lease"),
        (
            "user_id => 'ann', amount => 5, per => 'day', without_daemon => 'maybe'".to_owned(),
            "without_daemon",
        ),
        ("user_id => 'ann', amount => 5, per => 'day', time_zone => 'Mars/Olympus'".to_owned(), "time_zone"),
        ("user_id => 'ann', amount => 5, per => 'day', time_zone => 'EST'".to_owned(), "time_zone"),
        (format!("user_id => 'ann', amount => 5, per => 'day', time_zone => '{digits}'"), "time_zone"),
        (format!("user_id => '{}', amount => 5, per => 'day'", token.token), "user_id"),
    ] {
        let error = refused(set(&db.owner, &arguments).await, &SqlState::INVALID_PARAMETER_VALUE);
        let text = common::text_of(&error);
        assert!(
            text.contains(named) && !text.contains(&digits) && !text.contains("Mars"),
            "{arguments}: {text}"
        );
    }
    let unknown = format!("'{}', amount => 1, per => 'day'", Uuid::nil());
    refused(set(&db.owner, &unknown).await, &SqlState::UNDEFINED_OBJECT);
    let none: i64 = value(&db.owner, "select count(*) from tollgate.quotas").await?;
    assert_eq!(none, 0);
    Ok(())
}

#[tokio::test]
async fn an_operator_can_neither_invent_a_request_nor_have_one_granted_twice() -> Result<()> {
    let (db, token) = created("operator").await?;
    set(&db.owner, &format!("'{}', amount => 100, per => 'day', lease => 2", token.id)).await?;
    let denied = &SqlState::INSUFFICIENT_PRIVILEGE;
    refused(set(&db.operator, "user_id => 'ann', amount => 1, per => 'day'").await, denied);
    assert_eq!(accepted(&db.web, &token, 2).await?, 2);
    // As a daemon takes them on a standby, signed.
    let requests: String =
        value(&db.operator, "select array_agg(w)::text from tollgate.drain_lease_requests() w").await?;
    let lease = async |requests: &str| {
        let call = "select tollgate.lease_quotas($1::text::tollgate.lease_request[])";
        db.operator.query_one(call, &[&requests]).await.map(|row| row.get::<_, i64>(0))
    };
    let taken = "select taken from tollgate.quotas";
    for forged in [
        requests.replace(",2,2,", ",2,50,"),
        requests.replace(",2,2,", ",2,-9223372036854775808,"),
        requests.replace(",2,2,", ",-9223372036854775808,9223372036854775807,"),
        requests.replace(",2,2,", ",,,"),
        "{NULL}".to_owned(),
        "{\"(,,,,,)\"}".to_owned(),
        "{}".to_owned(),
    ] {
        assert_ne!(forged, requests);
        assert_eq!(lease(&forged).await?, 0, "{forged}");
    }
    refused(
        db.operator.query_one("select tollgate.lease_quotas(null)", &[]).await,
        &SqlState::INVALID_PARAMETER_VALUE,
    );
    assert_eq!(value::<i64>(&db.owner, taken).await?, 2);
    assert_eq!((lease(&requests).await?, lease(&requests).await?), (1, 0));
    assert_eq!(value::<i64>(&db.owner, taken).await?, 4);

    // Another database has another signature, even one that was copied from this.
    let copy = "operator_copy";
    let (dump, _) = created(copy).await?;
    let elsewhere: i64 = dump
        .operator
        .query_one("select tollgate.lease_quotas($1::text::tollgate.lease_request[])", &[&requests])
        .await?
        .get(0);
    assert_eq!(elsewhere, 0);
    Ok(())
}

// ---- Memory

#[tokio::test]
async fn without_shared_memory_a_quota_raises_and_other_tokens_are_verified() -> Result<()> {
    let cluster = common::start(Cluster::builder().preload(false))?;
    let (owner, web) =
        (cluster.connect("postgres", DATABASE).await?, cluster.connect("web", DATABASE).await?);
    let (bound, free) = (issue(&owner, "ann", &[]).await?, issue(&owner, "ben", &[]).await?);
    set(&owner, &format!("'{}', amount => 1, per => 'day'", bound.id)).await?;
    assert_eq!(code(&web, &free.token).await?, "VALID");
    let call = "select code from tollgate.verify_api_token($1)";
    refused(web.query_one(call, &[&bound.token]).await, &SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE);
    Ok(())
}

#[tokio::test]
async fn a_full_memory_refuses_what_it_cannot_remember() -> Result<()> {
    let cluster = common::start(Cluster::builder().setting("tollgate.max_tracked_keys", "1024"))?;
    let owner = cluster.connect("postgres", DATABASE).await?;
    owner
        .batch_execute(
            "create temporary table many as
                 select t.id, t.token from generate_series(1, 1200) n, lateral tollgate.create_api_token('user ' || n, 'n') t;
             select tollgate.set_quota(id, amount => 2, per => 'lifetime', lease => 2) from many",
        )
        .await?;
    let uses =
        "select count(*) from many m, generate_series(1, $1) n, lateral tollgate.verify_api_token(case when n > 0 then m.token end) v
                where v.code = 'VALID'";
    let uses = async |times: i32| -> Result<i64> { Ok(owner.query_one(uses, &[&times]).await?.get(0)) };
    let found_room = uses(1).await?;
    assert!((500..1000).contains(&found_room), "{found_room}");
    assert_eq!(uses(3).await?, found_room, "each that has a place spends its two, and no other any");
    let free = issue(&owner, "free", &[]).await?;
    assert_eq!(code(&owner, &free.token).await?, "VALID");
    Ok(())
}

// ---- The command line

#[tokio::test]
async fn quotas_are_set_shown_and_removed_from_the_command_line() -> Result<()> {
    let (db, token) = created("quota_commands").await?;
    let url = db.cluster.url("postgres", &db.name);
    let id = token.id.to_string();
    let set = ["quota", "set", "--token", &id, "--amount=200", "--per=month", "--time-zone=America/New_York"];
    assert_eq!(json_of(&url, &set, OK), json!({"set": id}));
    let set = ["quota", "set", "--user=ann", "--amount=5", "--per=lifetime"];
    assert_eq!(json_of(&url, &set, OK), json!({"set": "ann"}));
    assert_eq!(accepted(&db.web, &token, 1).await?, 1);
    assert!(printed(&url, &["quota", "add", "--user=ann", "10"], OK).contains("15 uses in all"));
    let shown = json_of(&url, &["quota", "show", "--token", &id], OK);
    assert_eq!(
        (&shown[0]["amount"], &shown[0]["used"], &shown[1]["user_id"], &shown[1]["remaining"]),
        (&json!(200), &json!(1), &json!("ann"), &json!(14))
    );
    let table = printed(&url, &["quota", "list"], OK);
    assert!(table.contains("REMAINING") && table.contains("lifetime") && table.contains(&id), "{table}");
    let remove = ["quota", "remove", "--user=ann"];
    assert_eq!(json_of(&url, &remove, OK), json!({"removed": true}));
    assert_eq!(json_of(&url, &remove, NO), json!({"removed": false}));
    assert!(printed(&url, &["quota", "show", "--user=ann"], NO).contains("ann has no quota"));
    Ok(())
}
