//! Usage by the hour: no count is lost or moved, whichever server is flushed when, and charts get every hour.

use std::collections::BTreeMap;

use crate::common::{self, Shared, Token, code, error, issue, refused, value};
use crate::operator::{
    Db, Generation, OPERATOR, UsageRow, apply, counts, flush_all, issue_many, reads, set, signed, totals,
};
use anyhow::{Context as _, Result};
use jiff::{SignedDuration, Timestamp};
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use uuid::Uuid;

static SHARED: Shared = Shared::new(&[]);

/// Uses and denials by hour.
type Hours = BTreeMap<Timestamp, (i64, i64)>;

async fn activity(
    client: &Client,
    token: Uuid,
    since: Option<Timestamp>,
) -> Result<Vec<(Timestamp, i64, i64)>> {
    let rows = client
        .query("select hour, used, denied from tollgate.token_activity($1, $2)", &[&token, &since])
        .await?;
    Ok(rows.iter().map(|row| (row.get(0), row.get(1), row.get(2))).collect())
}

/// The hours with uses or denials.
async fn busy_hours(client: &Client, token: Uuid) -> Result<Hours> {
    let hours = activity(client, token, None).await?;
    Ok(hours
        .into_iter()
        .filter(|hour| (hour.1, hour.2) != (0, 0))
        .map(|hour| (hour.0, (hour.1, hour.2)))
        .collect())
}

async fn this_hour(client: &Client) -> Result<Timestamp> {
    value(client, "select date_trunc('hour', now(), 'UTC')").await
}

fn hours_before(at: Timestamp, hours: i64) -> Timestamp {
    at - SignedDuration::from_hours(hours)
}

/// Tokens old enough to have been used at any of the times in these tests: a token has no use before it was created.
async fn old_tokens(owner: &Client, count: i32) -> Result<Vec<Uuid>> {
    let tokens: Vec<Uuid> = issue_many(owner, count).await?.iter().map(|token| token.id).collect();
    for &token in &tokens {
        set(owner, token, "created_at = now() - interval '200 days'").await?;
    }
    Ok(tokens)
}

/// A generation of a separate server.
async fn flush_of(owner: &Client, rows: &[UsageRow]) -> Result<Generation> {
    signed(owner, "n", Uuid::new_v4(), 1, rows).await
}

fn row(token: Uuid, uses: i64, denials: i64, last_used_at: Option<Timestamp>) -> UsageRow {
    UsageRow { token_id: token, uses, denials, last_used_at, last_used_ip: None }
}

/// A small, fast, reproducible generator: xorshift64.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

#[tokio::test]
async fn every_use_is_in_one_hour_in_whatever_order_servers_are_flushed() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "orders").await?;
    let tokens = old_tokens(&db.owner, 5).await?;
    for seed in 1..=8 {
        db.owner.batch_execute("truncate tollgate.token_usage, tollgate.usage_hourly").await?;
        let mut dice = Dice(seed);
        let mut expected: BTreeMap<Uuid, Hours> = BTreeMap::new();
        for _ in 0..40 {
            // Keeps the hour from ending between the query and the flush.
            db.operator.batch_execute("begin").await?;
            let now = this_hour(&db.operator).await?;
            let mut rows = Vec::new();
            for &token in &tokens {
                if dice.below(3) == 0 {
                    continue;
                }
                let (uses, denials) = (i64::try_from(dice.below(5))?, i64::try_from(dice.below(3))?);
                // From six hours ago to two hours ahead, or without a time.
                let hour = hours_before(now, i64::try_from(dice.below(9))? - 2);
                let used_at = (dice.below(5) > 0).then(|| hour + SignedDuration::from_mins(17));
                rows.push(row(token, uses, denials, used_at));
                // The clock of another server must not open an hour early.
                let hour = used_at.map_or(now, |_| hour.min(now));
                let sums = expected.entry(token).or_default().entry(hour).or_default();
                *sums = (sums.0 + uses, sums.1 + denials);
            }
            assert!(apply(&db.operator, &flush_of(&db.owner, &rows).await?).await?);
            db.operator.batch_execute("commit").await?;
        }
        for (token, mut hours) in expected {
            let total = hours.values().fold((0, 0), |sum, hour| (sum.0 + hour.0, sum.1 + hour.1));
            assert_eq!(counts(&db.owner, token).await?, total, "seed {seed}");
            hours.retain(|_, sums| *sums != (0, 0));
            assert_eq!(busy_hours(&db.owner, token).await?, hours, "seed {seed}");
        }
    }
    Ok(())
}

#[tokio::test]
async fn a_flush_within_an_hour_writes_one_row_a_token_and_the_next_hour_one_more() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "writes").await?;
    let tokens = old_tokens(&db.owner, 20).await?;
    let now = this_hour(&db.owner).await?;
    let stored = async || value::<i64>(&db.owner, "select count(*) from tollgate.usage_hourly").await;
    for (hours_ago, expected) in [(3, 0), (3, 0), (2, 20), (2, 20), (1, 40)] {
        let rows: Vec<UsageRow> =
            tokens.iter().map(|&token| row(token, 1, 0, Some(hours_before(now, hours_ago)))).collect();
        assert!(apply(&db.operator, &flush_of(&db.owner, &rows).await?).await?);
        assert_eq!(stored().await?, expected, "{hours_ago} hours ago");
    }
    Ok(())
}

/// The time of a flush of a few tokens must not depend on the number of tokens, whatever the statistics say.
#[tokio::test]
async fn a_flush_reads_the_rows_it_is_about_and_no_others() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "few").await?;
    let tokens = issue_many(&db.owner, 3_000).await?;
    let all: Vec<UsageRow> = tokens.iter().map(|token| row(token.id, 1, 0, None)).collect();
    assert!(apply(&db.operator, &flush_of(&db.owner, &all).await?).await?);
    db.owner.batch_execute("analyze").await?;
    for (count, number) in [(1, 1), (1_000, 2)] {
        let ids: Vec<String> =
            tokens[..count].iter().map(|token| format!("('{}'::uuid)", token.id)).collect();
        let statement = format!(
            "select tollgate.apply_usage('few', boot, {number}, rows, tollgate.signature_of_usage('few', boot, {number}, rows))
             from (select uuid '00000000-0000-0000-0000-00000000000f' as boot,
                          array_agg(row(t.id, 1, 0, null, null)::tollgate.usage_row) as rows from (values {}) t (id)) g",
            ids.join(",")
        );
        let read = reads(&db.owner, "token_usage", "token_usage_pkey", &statement).await?;
        assert_eq!(read.scanned, 0, "{count} tokens: {read:?}");
        let count = i64::try_from(count)?;
        assert!(read.scans_of_index >= count && read.fetched <= 3 * count, "{count} tokens: {read:?}");
    }
    Ok(())
}

#[tokio::test]
async fn a_chart_has_every_hour_since_the_token_came_or_was_asked_for() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "chart").await?;
    let token = issue(&db.owner, "a", &[]).await?;
    set(&db.owner, token.id, "created_at = now() - interval '6 hours'").await?;
    db.owner.batch_execute("begin").await?;
    let now = this_hour(&db.owner).await?;
    for (hours_ago, uses, denials) in [(4, 3, 1), (1, 2, 0), (0, 5, 0)] {
        let rows = [row(token.id, uses, denials, Some(hours_before(now, hours_ago)))];
        assert!(apply(&db.owner, &flush_of(&db.owner, &rows).await?).await?);
    }
    let hour = |hours_ago, used, denied| (hours_before(now, hours_ago), used, denied);
    let whole = [
        hour(6, 0, 0),
        hour(5, 0, 0),
        hour(4, 3, 1),
        hour(3, 0, 0),
        hour(2, 0, 0),
        hour(1, 2, 0),
        hour(0, 5, 0),
    ];
    for since in [None, Some(hours_before(now, 30)), Some(Timestamp::MIN)] {
        if since != Some(Timestamp::MIN) {
            assert_eq!(activity(&db.owner, token.id, since).await?, whole, "{since:?}");
        }
    }
    let forever = "select count(*) from tollgate.token_activity($1, '-infinity')";
    assert_eq!(db.owner.query_one(forever, &[&token.id]).await?.get::<_, i64>(0), 7);
    // The hour that contains the time is reported whole.
    let since = hours_before(now, 4) + SignedDuration::from_mins(59);
    assert_eq!(activity(&db.owner, token.id, Some(since)).await?, whole[2..]);
    assert_eq!(activity(&db.owner, token.id, Some(hours_before(now, -1))).await?, []);
    let never = "select count(*) from tollgate.token_activity($1, 'infinity')";
    assert_eq!(db.owner.query_one(never, &[&token.id]).await?.get::<_, i64>(0), 0);
    assert_eq!(activity(&db.owner, Uuid::new_v4(), None).await?, []);
    db.owner.batch_execute("commit").await?;
    Ok(())
}

#[tokio::test]
async fn real_uses_and_denials_are_in_the_hour_in_which_they_happened() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "real").await?;
    let token: Token = issue(&db.owner, "a", &[]).await?;
    let before = this_hour(&db.owner).await?;
    for _ in 0..3 {
        assert_eq!(code(&db.web, &token.token).await?, "VALID");
    }
    flush_all(&db.operator).await?;
    let denied = common::Request::of(&token.token).requiring(&[Some("posts:read")]);
    assert_eq!(denied.code(&db.web).await?, "INSUFFICIENT_SCOPE");
    flush_all(&db.operator).await?;
    let after = this_hour(&db.owner).await?;
    let hours = busy_hours(&db.owner, token.id).await?;
    // The hour may end during this test.
    assert!(hours.keys().all(|&hour| before <= hour && hour <= after), "{hours:?}");
    assert_eq!(hours.values().fold((0, 0), |sum, hour| (sum.0 + hour.0, sum.1 + hour.1)), (3, 1));
    Ok(())
}

/// The state after an update from a version that kept no hours.
#[tokio::test]
async fn totals_from_before_hourly_counts_are_kept_and_belong_to_no_hour() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "older").await?;
    let token = old_tokens(&db.owner, 1).await?[0];
    db.owner
        .execute(
            "insert into tollgate.token_usage (token_id, use_count, denied_count) values ($1, 7, 2)",
            &[&token],
        )
        .await?;
    assert_eq!(busy_hours(&db.owner, token).await?, Hours::new());
    let now = this_hour(&db.owner).await?;
    assert!(
        apply(&db.operator, &flush_of(&db.owner, &[row(token, 3, 1, Some(hours_before(now, 1)))]).await?)
            .await?
    );
    assert_eq!(counts(&db.owner, token).await?, (10, 3));
    assert_eq!(busy_hours(&db.owner, token).await?, Hours::from([(hours_before(now, 1), (3, 1))]));
    Ok(())
}

#[tokio::test]
async fn a_token_that_a_flush_names_twice_is_counted_once_and_holds_up_no_other() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "double").await?;
    let tokens: Vec<Uuid> = issue_many(&db.owner, 3).await?.iter().map(|token| token.id).collect();
    let [known, new, other] = tokens[..] else { panic!("{tokens:?}") };
    assert!(apply(&db.operator, &flush_of(&db.owner, &[row(known, 1, 0, None)]).await?).await?);
    let doubled = flush_of(
        &db.owner,
        &[
            row(known, 3, 1, None),
            row(new, 3, 1, None),
            row(known, 3, 1, None),
            row(new, 3, 1, None),
            row(other, 5, 2, None),
        ],
    )
    .await?;
    assert!(apply(&db.operator, &doubled).await?);
    assert_eq!(counts(&db.owner, known).await?, (4, 1));
    assert_eq!(counts(&db.owner, new).await?, (3, 1));
    assert_eq!(counts(&db.owner, other).await?, (5, 2));
    assert_eq!(totals(&db.owner).await?, (12, 4));
    for (token, sums) in [(known, (4, 1)), (new, (3, 1)), (other, (5, 2))] {
        let hours = busy_hours(&db.owner, token).await?;
        assert_eq!(hours.values().fold((0, 0), |sum, hour| (sum.0 + hour.0, sum.1 + hour.1)), sums);
    }
    assert!(!apply(&db.operator, &doubled).await?, "once");
    assert_eq!(totals(&db.owner).await?, (12, 4));
    Ok(())
}

/// The flushing role may report any time: a chart starts when the token was created, and never in the future.
#[tokio::test]
async fn a_use_before_the_token_was_created_is_in_its_first_hour() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "younger").await?;
    let token = issue(&db.owner, "a", &[]).await?.id;
    db.owner.batch_execute("begin").await?;
    let now = this_hour(&db.owner).await?;
    set(&db.owner, token, "created_at = date_trunc('hour', now(), 'UTC') - interval '90 minutes'").await?;
    for hours_ago in [1, 30, 30 * 24] {
        assert!(
            apply(
                &db.owner,
                &flush_of(&db.owner, &[row(token, 1, 0, Some(hours_before(now, hours_ago)))]).await?
            )
            .await?
        );
    }
    let expected = Hours::from([(hours_before(now, 2), (2, 0)), (hours_before(now, 1), (1, 0))]);
    assert_eq!(busy_hours(&db.owner, token).await?, expected);
    db.owner.batch_execute("commit").await?;
    Ok(())
}

// ---- Retention

#[tokio::test]
async fn old_hours_are_purged_in_batches_and_the_totals_stay() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "retention").await?;
    let token = old_tokens(&db.owner, 1).await?[0];
    let now = this_hour(&db.owner).await?;
    for days_ago in [100, 99, 98, 80, 0] {
        let rows = [row(token, 1, 0, Some(hours_before(now, days_ago * 24)))];
        assert!(apply(&db.operator, &flush_of(&db.owner, &rows).await?).await?);
    }
    let purge = async |arguments: &str| {
        value::<i64>(&db.operator, &format!("select tollgate.purge_usage({arguments})")).await
    };
    assert_eq!(purge("'101 days'").await?, 0);
    assert_eq!(purge("batch_size => 2").await?, 2);
    let left = busy_hours(&db.owner, token).await?;
    assert_eq!(
        left.into_keys().collect::<Vec<_>>(),
        [98, 80, 0].map(|days_ago| hours_before(now, days_ago * 24)),
        "the oldest go first"
    );
    assert_eq!(purge("batch_size => 2").await?, 1);
    assert_eq!(purge("'0'").await?, 1);
    assert_eq!(
        busy_hours(&db.owner, token).await?.len(),
        1,
        "the latest hour of a token stays with its totals"
    );
    assert_eq!(counts(&db.owner, token).await?, (5, 0));
    for arguments in ["null", "'-1 day'", "'2000 years'", "'1 day', 0", "'1 day', null"] {
        let answer = db.operator.query_one(&format!("select tollgate.purge_usage({arguments})"), &[]).await;
        assert_eq!(error(answer).code(), &SqlState::INVALID_PARAMETER_VALUE, "{arguments}");
    }
    Ok(())
}

#[tokio::test]
async fn the_totals_of_users_whose_access_tokens_are_no_longer_used_are_purged() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "users").await?;
    let now = this_hour(&db.owner).await?;
    let user = async |name: &str| {
        value::<Uuid>(&db.owner, &format!("select tollgate.usage_id_of_user('{name}')")).await
    };
    let (gone, present) = (user("gone").await?, user("present").await?);
    let token = old_tokens(&db.owner, 1).await?[0];
    // An API token keeps its totals, whatever version its id has.
    let odd: Uuid = "11111111-1111-8111-8111-111111111111".parse()?;
    set(&db.owner, token, &format!("id = '{odd}'")).await?;
    let rows: Vec<UsageRow> = [(gone, 100), (present, 80), (odd, 100)]
        .map(|(id, days)| row(id, 1, 0, Some(hours_before(now, days * 24))))
        .into();
    assert!(apply(&db.operator, &flush_of(&db.owner, &rows).await?).await?);
    // The hour of a use before a token or a user was known is that of the flush.
    db.owner
        .batch_execute(&format!(
            "update tollgate.token_usage set hour = now() - interval '100 days' where token_id in ('{odd}', '{gone}')"
        ))
        .await?;
    let step = "select looked_at, purged from tollgate.purge_user_usage_after('90 days', 1000)";
    let first = db.operator.query_one(step, &[]).await?;
    assert_eq!((first.get::<_, i64>(0), first.get::<_, i64>(1)), (3, 1));
    let purge = "select tollgate.purge_usage('90 days', 1)";
    assert_eq!(value::<i64>(&db.operator, purge).await?, 0);
    db.owner.batch_execute("update tollgate.token_usage set hour = now() - interval '91 days'").await?;
    assert_eq!(value::<i64>(&db.operator, purge).await?, 1);
    assert_eq!(value::<i64>(&db.operator, purge).await?, 0);
    let left = db.owner.query("select token_id from tollgate.token_usage", &[]).await?;
    assert_eq!(left.iter().map(|row| row.get(0)).collect::<Vec<Uuid>>(), [odd]);
    Ok(())
}

#[tokio::test]
async fn the_hours_of_a_token_go_with_it() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "gone").await?;
    let tokens = old_tokens(&db.owner, 2).await?;
    let now = this_hour(&db.owner).await?;
    for hours_ago in [2, 1, 0] {
        let rows: Vec<UsageRow> =
            tokens.iter().map(|&token| row(token, 1, 0, Some(hours_before(now, hours_ago)))).collect();
        assert!(apply(&db.operator, &flush_of(&db.owner, &rows).await?).await?);
    }
    set(&db.owner, tokens[0], "revoked_at = now() - interval '40 days'").await?;
    assert_eq!(value::<i64>(&db.operator, "select tollgate.purge_tokens()").await?, 1);
    let left = db.owner.query("select distinct token_id from tollgate.usage_hourly", &[]).await?;
    let left: Vec<Uuid> = left.iter().map(|row| row.get(0)).collect();
    assert_eq!(left, [tokens[1]]);
    activity(&db.owner, tokens[1], None).await?.first().context("the other has its hours")?;
    Ok(())
}

/// As an operator: retention for billing and audits does not depend on the daemon's role.
#[tokio::test]
async fn no_role_purges_data_within_the_owners_retention() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "kept").await?;
    let token = issue(&db.owner, "a", &[]).await?;
    code(&db.web, &token.token).await?;
    flush_all(&db.operator).await?;
    db.owner
        .batch_execute(
            "update tollgate.api_tokens set revoked_at = now() - interval '20 days';
             insert into tollgate.usage_hourly select id, date_bin('1 hour', now(), 'epoch') - interval '20 days', 1, 0 from tollgate.api_tokens;
             select tollgate.define_webhook('w', 'https://example.com/');
             insert into tollgate.webhook_queue (webhook, event_epoch, event_id, event, body, dead_at)
                 values ('w', 1, 1, 'x', '{}', now() - interval '20 days');
             alter database kept set tollgate.min_retention = '30d'",
        )
        .await?;
    let operator = db.session(OPERATOR).await?;
    for change in [
        "set tollgate.min_retention = 0",
        "alter role current_user set tollgate.min_retention = 0",
        "alter database kept set tollgate.min_retention = 0",
    ] {
        refused(operator.batch_execute(change).await, &SqlState::INSUFFICIENT_PRIVILEGE);
    }
    let purges = [
        "purge_sessions",
        "purge_sessions_after",
        "purge_tokens",
        "purge_tokens_after",
        "purge_usage",
        "purge_usage_after",
        "purge_user_usage_after",
        "purge_webhook_deliveries",
    ];
    for purge in purges {
        for retention in ["'0'", "'10 days'", "'29 days 23:59'", "'-1 day'", "null"] {
            let call = format!("select tollgate.{purge}({retention}, 100)");
            refused(operator.batch_execute(&call).await, &SqlState::INVALID_PARAMETER_VALUE);
        }
        operator.batch_execute(&format!("select tollgate.{purge}('30 days', 100)")).await?;
    }
    let counted =
        "select (select count(*) from tollgate.api_tokens) + (select count(*) from tollgate.usage_hourly)
                        + (select count(*) from tollgate.webhook_queue)";
    assert_eq!(value::<i64>(&db.owner, counted).await?, 3);
    db.owner.batch_execute("alter database kept set tollgate.min_retention = '10d'").await?;
    let operator = db.session(OPERATOR).await?;
    for purge in ["purge_usage", "purge_tokens", "purge_webhook_deliveries"] {
        operator.batch_execute(&format!("select tollgate.{purge}('10 days', 100)")).await?;
    }
    assert_eq!(value::<i64>(&db.owner, counted).await?, 0);
    Ok(())
}
