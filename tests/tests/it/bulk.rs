//! The cost per row of bulk operations does not depend on the number of rows. It is measured in pages of tables and
//! indexes that the server reads, not in time: ten times as many rows may cost at most twelve times as much.

use std::sync::Arc;

use crate::common::{self, Shared, database, value};
use crate::operator::QUEUE_ALL;
use anyhow::{Context as _, Result};
use tokio_postgres::Client;
use tollgate_tests::{Cluster, Tollgated};

/// With room for few locks: an operation on ten thousand rows must not take one for each.
static SHARED: Shared = Shared::new(&[
    ("autovacuum", "off"),
    ("tollgate.accept_foreign_tokens", "on"),
    ("max_locks_per_transaction", "10"),
    ("max_connections", "30"),
]);

const FEW: u32 = 500;
const MOST_GROWTH: f64 = 12.0;

/// The number of pages that a statement reads, including what it calls.
async fn pages(client: &Client, statement: &str) -> Result<f64> {
    let rows =
        client.query(&format!("explain (analyze, buffers, timing off, format json) {statement}"), &[]).await;
    let plan: serde_json::Value = rows.with_context(|| statement.to_owned())?[0].get(0);
    let count = |key: &str| plan[0]["Plan"][key].as_f64().with_context(|| format!("no {key} in {plan}"));
    Ok(count("Shared Hit Blocks")? + count("Shared Read Blocks")?)
}

/// A database with the extension, in which `prepare` ran for `n` rows.
async fn prepared(cluster: &Arc<Cluster>, name: &str, n: u32, prepare: &str) -> Result<Client> {
    let name = format!("{name}_{n}");
    database(cluster, &name)?;
    let owner = cluster.connect("postgres", &name).await?;
    owner.batch_execute(&prepare.replace(":n", &n.to_string())).await?;
    // Also while the table is still empty: plans made then are used for later rows.
    owner.batch_execute("vacuum analyze").await?;
    Ok(owner)
}

fn assert_linear(what: &str, few: f64, many: f64) {
    assert!(few > 0.0, "{what}: nothing was counted");
    assert!(many / few <= MOST_GROWTH, "{what}: {few} pages for {FEW} rows, {many} for ten times as many");
}

/// One statement, for n rows and for ten times as many.
async fn is_linear(name: &str, prepare: &str, statement: &str) -> Result<()> {
    let cluster = SHARED.cluster()?;
    let mut counted = Vec::new();
    for n in [FEW, 10 * FEW] {
        let owner = prepared(&cluster, name, n, prepare).await?;
        counted.push(pages(&owner, &statement.replace(":n", &n.to_string())).await?);
    }
    assert_linear(name, counted[0], counted[1]);
    Ok(())
}

/// A statement that costs the same for a table of n rows and of ten times as many.
async fn is_constant(name: &str, prepare: &str, statement: &str) -> Result<()> {
    let cluster = SHARED.cluster()?;
    let mut counted = Vec::new();
    for n in [FEW, 10 * FEW] {
        let owner = prepared(&cluster, name, n, prepare).await?;
        pages(&owner, statement).await?;
        counted.push(pages(&owner, statement).await?);
    }
    assert!(counted[1] <= 1.5 * counted[0] + 5.0, "{name}: {counted:?}");
    Ok(())
}

const TOKENS: &str = "select count(tollgate.create_api_token('u' || g, 'k')) from generate_series(1, :n) g";
const OF_ONE: &str = "select count(tollgate.create_api_token('ann', 'k')) from generate_series(1, :n) g";
const SOON_OVER: &str = "select count(tollgate.create_api_token('u' || g, 'k', expires_in => '1 day')) from generate_series(1, :n) g";
/// A third of them have a child.
const FAMILIES: &str = "
    create table parents as select (tollgate.create_api_token('ann', 'k')).token from generate_series(1, :n / 3);
    select count(tollgate.derive_api_token(p.token, 'd', '{}', null)) from parents p;
    select count(tollgate.create_api_token('ann', 'k')) from generate_series(1, :n / 3)";

// ---- Issuing

#[tokio::test]
async fn issuing_in_one_transaction() -> Result<()> {
    is_linear("issuing", "", TOKENS).await
}

#[tokio::test]
async fn importing_in_one_transaction() -> Result<()> {
    let import = "select count(tollgate.import_api_token('u' || g, 'k', sha256(g::text::bytea))) from generate_series(1, :n) g";
    is_linear("importing", "", import).await
}

const LIMITED: &str = "set tollgate.max_tokens_per_user = 100000";

#[tokio::test]
async fn issuing_for_many_users_who_have_a_limit() -> Result<()> {
    is_linear("issuing_limited", LIMITED, TOKENS).await
}

#[tokio::test]
async fn issuing_in_one_transaction_for_a_user_who_has_a_limit() -> Result<()> {
    is_linear("issuing_limited_to_one", LIMITED, OF_ONE).await
}

#[tokio::test]
async fn importing_in_turns_for_users_who_have_a_limit() -> Result<()> {
    let import = "select count(tollgate.import_api_token('u' || g % 3, 'k', sha256(g::text::bytea))) from generate_series(1, :n) g";
    is_linear("importing_limited", LIMITED, import).await
}

#[tokio::test]
async fn a_limit_does_not_count_ended_tokens() -> Result<()> {
    let ended = format!(
        "{LIMITED}; {OF_ONE};
         update tollgate.api_tokens set revoked_at = case when id::text < '8' then now() end, expires_at = now(), expired_at = now()"
    );
    is_constant("ended_limited", &ended, "select tollgate.create_api_token('ann', 'k')").await
}

#[tokio::test]
async fn the_cost_of_a_page_of_a_list_depends_on_its_size() -> Result<()> {
    let page = "select * from tollgate.list_api_tokens('ann', 100, (select id from tollgate.api_tokens offset 100 limit 1))";
    is_constant("page_of_list", OF_ONE, page).await?;
    let page = "select * from tollgate.tokens where id > '00000000-0000-0000-0000-000000000000' order by id limit 100";
    is_constant("page_of_view", TOKENS, page).await?;
    // Of tokens of all users: by a hint, and a page of all of them.
    let found = "select * from tollgate.find_api_tokens(hint => (select hint from tollgate.api_tokens limit 1), max_tokens => 1)";
    is_constant("page_of_search_by_hint", TOKENS, found).await?;
    let found = "select * from tollgate.find_api_tokens(status => 'active', max_tokens => 100)";
    is_constant("page_of_search", TOKENS, found).await
}

#[tokio::test]
async fn a_page_of_a_search_looks_at_ten_thousand_tokens_at_most() -> Result<()> {
    const MANY: u32 = 21_000;
    const NEEDLE: &str = "
        insert into tollgate.api_tokens (id, token_hash, user_id, name, scopes, metadata, hint)
            select ('00000000-0000-7000-8000-' || lpad(g::text, 12, '0'))::uuid, sha256(g::text::bytea), 'ann',
                   case g when :n then 'needle' else 'hay' end, '{}', '{}', 'tgt_0123'
            from generate_series(1, :n) g";
    let cluster = SHARED.cluster()?;
    let owner = prepared(&cluster, "needle", MANY, NEEDLE).await?;
    for by in ["", "user_id => 'ann', ", "hint => 'tgt_0123', "] {
        let page = format!(
            "select cardinality(f.tokens), right(f.continue_after::text, 12)::integer
             from tollgate.find_api_tokens({by}name => 'needle', after => ('00000000-0000-7000-8000-' || lpad($1::integer::text, 12, '0'))::uuid) f"
        );
        let mut after = Some(0);
        let mut found = Vec::new();
        while let Some(place) = after {
            let row = owner.query_one(&page, &[&place]).await?;
            after = row.get(1);
            found.push((row.get::<_, i32>(0), after));
        }
        assert_eq!(found, [(0, Some(10_000)), (0, Some(20_000)), (1, None)], "{by}");
    }
    let url = cluster.url("postgres", &format!("needle_{MANY}"));
    let listed = Tollgated::run(&url, &["token", "list", "--name=needle", "--quiet"])?;
    let listed = String::from_utf8(listed.stdout)?;
    assert_eq!(listed.trim_end(), format!("00000000-0000-7000-8000-{MANY:012}"));
    Ok(())
}

#[tokio::test]
async fn listing_the_tokens_of_a_user() -> Result<()> {
    is_linear("listing", OF_ONE, "select count(*) from tollgate.list_api_tokens('ann')").await
}

// ---- Revoking

#[tokio::test]
async fn revoking_all_of_a_user() -> Result<()> {
    is_linear("revoking_all", OF_ONE, "select tollgate.revoke_all_api_tokens('ann')").await
}

#[tokio::test]
async fn revoking_families() -> Result<()> {
    is_linear("revoking_families", FAMILIES, "select tollgate.revoke_all_api_tokens('ann')").await
}

#[tokio::test]
async fn revoking_one_with_many_descendants() -> Result<()> {
    let prepare = "
        create table root as select (tollgate.create_api_token('ann', 'k')).*;
        select count(tollgate.derive_api_token(token, 'd', '{}', null)) from root, generate_series(1, :n)";
    is_linear("revoking_one", prepare, "select tollgate.revoke_api_token(id) from root").await
}

#[tokio::test]
async fn deleting_users_of_an_attached_table() -> Result<()> {
    let prepare = format!(
        "create table users (id text primary key); insert into users select 'u' || g from generate_series(1, :n) g;
         select tollgate.attach_users_table('users', 'id'); {TOKENS}"
    );
    is_linear("deleting_users", &prepare, "delete from users").await
}

#[tokio::test]
async fn deleting_users_of_a_partitioned_table() -> Result<()> {
    let prepare = format!(
        "create table users (id text primary key) partition by hash (id);
         create table users_0 partition of users for values with (modulus 2, remainder 0);
         create table users_1 partition of users for values with (modulus 2, remainder 1);
         insert into users select 'u' || g from generate_series(1, :n) g;
         select tollgate.attach_users_table('users', 'id'); {TOKENS}"
    );
    is_linear("deleting_partitioned", &prepare, "delete from users").await
}

#[tokio::test]
async fn truncating_an_attached_table_of_users() -> Result<()> {
    let prepare = format!(
        "create table users (id text primary key); insert into users select 'u' || g from generate_series(1, :n) g;
         select tollgate.attach_users_table('users', 'id'); {TOKENS};
         create function empty_users() returns void language sql as 'truncate users'"
    );
    is_linear("truncating", &prepare, "select empty_users()").await
}

#[tokio::test]
async fn truncating_a_partitioned_table_of_users_reads_each_partition_once() -> Result<()> {
    // A page for each row, and no user whose tokens are looked for.
    let table = "create table users (id text, filler text) PARTITIONED;
                 alter table users alter filler set storage plain; PARTS
                 insert into users select null, repeat('x', 5000) from generate_series(1, :n);
                 select tollgate.attach_users_table('users', 'id', require_user => false);
                 create function empty_users() returns void language sql as 'truncate users'";
    let parts = "create table users_0 partition of users for values from (0) to (1);
                 create table users_1 partition of users default;";
    let cluster = SHARED.cluster()?;
    let mut counted = Vec::new();
    for (name, partitioned, parts) in
        [("once", "", ""), ("once_parted", "partition by range (length(filler))", parts)]
    {
        let prepare = table.replace("PARTITIONED", partitioned).replace("PARTS", parts);
        let owner = prepared(&cluster, name, FEW, &prepare).await?;
        counted.push(pages(&owner, "select empty_users()").await?);
    }
    assert!(counted[0] >= f64::from(FEW) && counted[1] < counted[0] * 1.5, "{counted:?}");
    Ok(())
}

#[tokio::test]
async fn issuing_for_users_of_an_attached_table() -> Result<()> {
    let prepare = "
        create table users (id text primary key, gone boolean); insert into users select 'u' || g from generate_series(1, :n) g;
        select tollgate.attach_users_table('users', 'id', active => 'gone is not true')";
    is_linear("issuing_attached", prepare, TOKENS).await
}

#[tokio::test]
async fn deactivating_users_of_an_attached_table() -> Result<()> {
    let prepare = format!(
        "create table users (id text primary key, gone boolean); insert into users select 'u' || g from generate_series(1, :n) g;
         select tollgate.attach_users_table('users', 'id', active => 'gone is not true'); {TOKENS}"
    );
    is_linear("switching_off", &prepare, "update users set gone = true").await
}

/// A chunk has a thousand families, or fifty thousand users: more than the other tests here have.
#[tokio::test]
async fn more_tokens_than_fit_into_one_step_are_all_revoked() -> Result<()> {
    let prepare = "
        create table users (id text primary key); insert into users select 'u' || g from generate_series(1, :n) g;
         select tollgate.attach_users_table('users', 'id');
         insert into tollgate.api_tokens (id, token_hash, user_id, name, scopes, metadata, hint)
             select gen_random_uuid(), sha256(id::bytea), id, 'k', '{}', '{}', 'h' from users";
    let cluster = SHARED.cluster()?;
    let owner = prepared(&cluster, "steps", 51_234, prepare).await?;
    owner.batch_execute("listen tollgate_events; delete from users").await?;
    let left: i64 =
        value(&owner, "select count(*) from tollgate.api_tokens where revoked_at is null").await?;
    assert_eq!(left, 0);
    let events: i64 = value(
        &owner,
        "select count(distinct token_id) from tollgate.audit_log where event = 'token.revoked'",
    )
    .await?;
    assert_eq!(events, 51_234);
    Ok(())
}

// ---- Housekeeping

#[tokio::test]
async fn announcing_costs_nothing_when_all_tokens_are_announced() -> Result<()> {
    let cluster = SHARED.cluster()?;
    let mut counted = Vec::new();
    for n in [FEW, 10 * FEW] {
        let owner = prepared(&cluster, "announced", n, SOON_OVER).await?;
        owner.batch_execute("select tollgate.announce_expiries('7 days', 100000)").await?;
        owner.batch_execute("vacuum").await?;
        pages(&owner, "select tollgate.announce_expiries('7 days', 1000)").await?;
        counted.push(pages(&owner, "select tollgate.announce_expiries('7 days', 1000)").await?);
    }
    assert!(counted[1] <= counted[0] + 2.0, "{counted:?}");
    Ok(())
}

/// While an older snapshot exists, such as that of pg_dump, handled tokens stay in the indexes. On a separate server,
/// like all tests that measure with an old snapshot: one of another test would count as well.
#[tokio::test]
async fn a_batch_beside_an_old_snapshot_does_not_pass_over_tokens_handled_before() -> Result<()> {
    let tokens = "insert into tollgate.api_tokens (id, token_hash, user_id, name, scopes, metadata, hint, expires_at)
                  select gen_random_uuid(), sha256(g::text::bytea), 'u' || g, 'k', '{}', '{}', 'h', now() + interval '1 day'
                  from generate_series(1, :n) g";
    let used = "insert into tollgate.usage_hourly select gen_random_uuid(), date_bin('1 hour', now(), 'epoch') - (1 + g % 3) * interval '1 hour', 1, 1
                from generate_series(1, :n) g";
    let walks = [
        ("expire_tokens", format!("{tokens}; update tollgate.api_tokens set expires_at = now()"), ""),
        ("announce_expiries", tokens.to_owned(), "'7 days', "),
        ("purge_tokens", format!("{tokens}; update tollgate.api_tokens set revoked_at = now()"), "'0', "),
        ("purge_usage", used.to_owned(), "'0', "),
    ];
    let cluster = Arc::new(common::start(Cluster::builder().setting("autovacuum", "off"))?);
    for (function, prepare, argument) in walks {
        let mut counted = Vec::new();
        for n in [FEW, 10 * FEW] {
            let owner = prepared(&cluster, function, n, &prepare).await?;
            let holder = cluster.connect("postgres", &format!("{function}_{n}")).await?;
            holder
                .batch_execute("begin isolation level repeatable read; select from pg_class limit 1")
                .await?;
            owner
                .batch_execute("create temp table step (place timestamptz, token_id uuid, looked_at bigint, done bigint)")
                .await?;
            for after in ["", "_after"] {
                owner.batch_execute("truncate step").await?;
                let step = |most: u32| match after {
                    "" => format!(
                        "with before as (delete from step)
                         insert into step (done) select tollgate.{function}({argument}{most})"
                    ),
                    _ => format!(
                        "with before as (delete from step returning place, token_id)
                         insert into step select s.* from (select) one left join before b on true,
                             tollgate.{function}_after({argument}{most}, b.place, b.token_id) s"
                    ),
                };
                let mut left = n / 3;
                while left > 0 {
                    owner.batch_execute(&step(left.min(1000))).await?;
                    left -= left.min(1000);
                }
                for _ in 0..3 {
                    owner.batch_execute(&step(1)).await?;
                }
                counted.push(pages(&owner, &step(1)).await?);
                assert_eq!(value::<i64>(&owner, "select done from step").await?, 1, "{function}{after}");
            }
        }
        for (few, many) in counted[..2].iter().zip(&counted[2..]) {
            assert!(*many <= 1.5 * few + 5.0, "{function}: {counted:?}");
        }
    }
    Ok(())
}

/// Each function starts again at the front before it reports that there are no more.
#[tokio::test]
async fn tokens_that_a_walk_has_passed_are_found_before_it_reports_the_end() -> Result<()> {
    let cluster = SHARED.cluster()?;
    let owner = prepared(&cluster, "passed", 30, SOON_OVER).await?;
    let first = "(select id from tollgate.api_tokens order by id limit 1)";
    let call = async |call: &str| value::<i64>(&owner, &format!("select tollgate.{call}")).await;
    assert_eq!(call("announce_expiries('7 days', 10)").await?, 10);
    let earlier =
        format!("update tollgate.api_tokens set expires_at = now() + interval '1 hour' where id = {first}");
    owner.batch_execute(&earlier).await?;
    // The front was checked a moment ago, so this time it is not.
    assert_eq!(call("announce_expiries('7 days', 100)").await?, 20);
    assert_eq!(call("announce_expiries('7 days', 100)").await?, 1);
    owner.batch_execute("update tollgate.api_tokens set expires_at = now() - interval '1 minute'").await?;
    assert_eq!(call("expire_tokens(10)").await?, 10);
    let again = format!(
        "update tollgate.api_tokens set expires_at = now() - interval '1 hour', expired_at = null where id = {first}"
    );
    owner.batch_execute(&again).await?;
    assert_eq!(call("expire_tokens(100)").await?, 21);
    assert_eq!(call("purge_tokens('0', 10)").await?, 10);
    // It ended before the purged ones.
    owner.batch_execute("select tollgate.create_api_token('late', 'k'); update tollgate.api_tokens set revoked_at = '2020-01-01' where user_id = 'late'").await?;
    assert_eq!(call("purge_tokens('0', 100)").await?, 21);
    Ok(())
}

/// Deletes like the daemon: rounds of small steps, until one deletes nothing.
async fn purging_is_linear(name: &str, prepare: &str) -> Result<()> {
    let cluster = SHARED.cluster()?;
    let mut counted = Vec::new();
    for n in [FEW, 10 * FEW] {
        let owner = prepared(&cluster, name, n, prepare).await?;
        owner.batch_execute("create temp table step (ended_at timestamptz, token_id uuid, looked_at bigint, purged bigint)").await?;
        let (mut sum, mut purged_in_round) = (0.0, 0);
        loop {
            let step = "
                with place as (delete from step returning ended_at, token_id)
                insert into step select p.* from (select) one left join place on true,
                    tollgate.purge_tokens_after('0', 10, place.ended_at, place.token_id) p";
            sum += pages(&owner, step).await?;
            let row = owner.query_one("select looked_at, purged from step", &[]).await?;
            purged_in_round += row.get::<_, i64>(1);
            if row.get::<_, i64>(0) < 10 {
                if purged_in_round == 0 {
                    break;
                }
                purged_in_round = 0;
                owner.batch_execute("truncate step").await?;
            }
        }
        let left: i64 = value(&owner, "select count(*) from tollgate.api_tokens").await?;
        assert_eq!(left, 0);
        counted.push(sum);
    }
    assert_linear(name, counted[0], counted[1]);
    Ok(())
}

#[tokio::test]
async fn purging_tokens_that_ended_in_one_moment() -> Result<()> {
    purging_is_linear("purging", &format!("{OF_ONE}; update tollgate.api_tokens set revoked_at = now()"))
        .await
}

/// Each is kept as long as the one that it replaced, and all end at the same time.
#[tokio::test]
async fn purging_a_token_that_was_rotated_often() -> Result<()> {
    let rotated = "update tollgate.api_tokens t set revoked_at = now(), rotated_from = p.before
                   from (select id, lag(id) over (order by id) as before from tollgate.api_tokens) p where p.id = t.id";
    purging_is_linear("purging_rotated", &format!("{OF_ONE}; {rotated}")).await
}

#[tokio::test]
async fn purging_families_whose_parents_ended_first() -> Result<()> {
    let revoke = "update tollgate.api_tokens set revoked_at = now() - interval '1 second' * (parent_id is null)::integer";
    purging_is_linear("purging_families", &format!("{FAMILIES}; {revoke}")).await
}

// ---- Capabilities

#[tokio::test]
async fn granting_a_capability_to_one_role_after_another() -> Result<()> {
    // On a separate server, since catalogue rows that a transaction of another test may see are not removed.
    let cluster = Arc::new(common::start(Cluster::builder().setting("autovacuum", "off"))?);
    let mut counted = Vec::new();
    for n in [10, 100] {
        let roles = format!(
            "do $$ begin for i in 1 .. {n} loop execute format('create role granted_{n}_%s', i); end loop; end $$"
        );
        let owner = prepared(&cluster, "granting", n, &roles).await?;
        let mut sum = 0.0;
        for role in 1..=n {
            // Each in its own transaction: within a single one, none of the catalogue's old rows is removed.
            sum +=
                pages(&owner, &format!("select tollgate.grant_capability('granted_{n}_{role}', 'issuer')"))
                    .await?;
        }
        counted.push(sum);
    }
    assert_linear("granting", counted[0], counted[1]);
    Ok(())
}

// ---- The log

#[tokio::test]
async fn sealing_and_verifying_the_log() -> Result<()> {
    is_linear("sealing", TOKENS, "select tollgate.seal_audit_log(1000000)").await?;
    let sealed = format!("{TOKENS}; select tollgate.seal_audit_log(1000000)");
    is_linear("verifying_seals", &sealed, "select tollgate.verify_audit_log()").await
}

// ---- Webhooks

/// Five receivers that are gone: n messages wait for each, and half as many were given up.
const BACKLOG: &str = "
    select count(tollgate.define_webhook('gone' || g, 'https://example.com/')) from generate_series(1, 5) g;
    insert into tollgate.webhook_queue (webhook, event_epoch, event_id, event, body, attempts, next_attempt_at, dead_at)
        select 'gone' || w, 1, g, 'token.created', '{}', 3, now() + interval '2 hours', case when g % 3 = 0 then now() end
        from generate_series(1, 5) w, generate_series(1, :n) g;
    select tollgate.define_webhook('well', 'https://example.com/', '{token.created}');
    select tollgate.queue_webhook_deliveries(1000);
    update tollgate.webhook_queue set next_attempt_at = now() + interval '2 hours'";

#[tokio::test]
async fn messages_for_receivers_that_are_gone_cost_nothing_per_second_or_event() -> Result<()> {
    const ISSUE: &str = "select (tollgate.create_api_token('ann', 'k')).id";
    const ONE: &str =
        "select * from tollgate.webhook_deliveries where webhook = 'well' and state = 'sending' limit 1";
    let finish = "select tollgate.finish_webhook_delivery(id, lease, 200) from tollgate.webhook_queue
         where lease is not null and webhook = 'well'";
    let cluster = SHARED.cluster()?;
    let mut counted: Vec<Vec<(&str, f64)>> = Vec::new();
    for n in [FEW, 10 * FEW] {
        let owner = prepared(&cluster, "backlog", n, BACKLOG).await?;
        owner.batch_execute(QUEUE_ALL).await?;
        let mut costs = Vec::new();
        // The first round fills the session's caches.
        for _ in 0..2 {
            costs.clear();
            let idle = "select count(*) from tollgate.claim_webhook_deliveries()";
            costs.push(("an idle claim", pages(&owner, idle).await?));
            owner.batch_execute(ISSUE).await?;
            let queue = "select tollgate.queue_webhook_deliveries(1000)";
            costs.push(("queueing an event", pages(&owner, queue).await?));
            owner.batch_execute(QUEUE_ALL).await?;
            owner
                .batch_execute(
                    "update tollgate.webhook_queue set next_attempt_at = now() + interval '2 hours'
                      where webhook <> 'well' and attempts = 0",
                )
                .await?;
            costs.push(("a claim of one", pages(&owner, idle).await?));
            assert!(owner.query_opt(ONE, &[]).await?.is_some());
            costs.push(("saying what came of it", pages(&owner, finish).await?));
            costs.push((
                "the view",
                pages(&owner, "select count(pending), count(dead) from tollgate.webhooks").await?,
            ));
            costs.push((
                "a purge of nothing",
                pages(&owner, "select tollgate.purge_webhook_deliveries()").await?,
            ));
        }
        counted.push(costs);
    }
    for ((what, few), (_, many)) in counted[0].iter().zip(&counted[1]) {
        // Indexes are at most one level deeper, for six webhooks and a few indexes.
        assert!(
            *many <= few * 1.5 + 20.0,
            "{what}: {few} pages beside {FEW} messages, {many} beside ten times as many"
        );
    }
    Ok(())
}

/// Delivered messages stay in the indexes as long as an older transaction is open, such as that of a dump.
#[tokio::test]
async fn a_claim_beside_an_old_snapshot_does_not_pass_over_delivered_messages() -> Result<()> {
    let cluster = SHARED.cluster()?;
    let mut counted = Vec::new();
    for n in [FEW, 10 * FEW] {
        let prepare = "
            select tollgate.define_webhook('w', 'https://example.com/');
            insert into tollgate.webhook_queue (webhook, event_epoch, event_id, event, body)
                select 'w', 1, g, 'token.created', '{}' from generate_series(1, :n + 100) g";
        let owner = prepared(&cluster, "old_snapshot", n, prepare).await?;
        let dump = cluster.connect("postgres", &format!("old_snapshot_{n}")).await?;
        dump.batch_execute("begin isolation level repeatable read; select 1 from tollgate.api_tokens")
            .await?;
        for _ in 0..n / FEW {
            let deliver = format!(
                "select from tollgate.claim_webhook_deliveries({FEW});
                 delete from tollgate.webhook_queue where lease is not null"
            );
            owner.batch_execute(&deliver).await?;
        }
        let claim = "select from tollgate.claim_webhook_deliveries(8)";
        counted.push(pages(&owner, claim).await?);
        let left: i64 =
            value(&owner, "select count(*) from tollgate.webhook_deliveries where state = 'sending'").await?;
        assert_eq!(left, 8);
    }
    assert!(counted[1] <= counted[0] * 1.5 + 20.0, "{counted:?}");
    Ok(())
}

#[tokio::test]
async fn replaying_waiting_messages() -> Result<()> {
    is_linear("replaying", BACKLOG, "select tollgate.replay_webhook('gone1')").await
}

#[tokio::test]
async fn dropping_a_webhook_with_waiting_messages() -> Result<()> {
    is_linear("dropping", BACKLOG, "select tollgate.drop_webhook('gone1')").await
}

/// Deletes like the daemon: a few at a time.
#[tokio::test]
async fn purging_given_up_messages() -> Result<()> {
    let prepare = format!("{BACKLOG}; update tollgate.webhook_queue set dead_at = now() - interval '40 days', created_at = now() - interval '50 days'
                            where dead_at is not null");
    let cluster = SHARED.cluster()?;
    let mut counted = Vec::new();
    for n in [FEW, 10 * FEW] {
        let owner = prepared(&cluster, "purging_given_up", n, &prepare).await?;
        let dead = "select count(*) from tollgate.webhook_queue where dead_at is not null";
        let mut sum = 0.0;
        for _ in 0..value::<i64>(&owner, dead).await? / 50 + 1 {
            sum += pages(&owner, "select tollgate.purge_webhook_deliveries('30 days', 50)").await?;
        }
        assert_eq!(value::<i64>(&owner, dead).await?, 0);
        counted.push(sum);
    }
    assert_linear("purging what was given up", counted[0], counted[1]);
    Ok(())
}

#[tokio::test]
async fn a_step_of_purging_messages_does_not_pass_what_the_ones_before_it_removed() -> Result<()> {
    let queue = "
        select tollgate.define_webhook(w, 'https://example.com/') from unnest(array['gone', 'well']) w;
        insert into tollgate.webhook_queue (webhook, event_epoch, event_id, event, body, created_at, dead_at)
            select w, 1, g, 'x', '{}', now() - interval '40 days', DEAD from generate_series(1, :n) g, unnest(array['gone', 'well']) w";
    let cluster = Arc::new(common::start(Cluster::builder().setting("autovacuum", "off"))?);
    for (name, dead, disable) in [
        ("given_up", "now() - interval '35 days'", ""),
        ("disabled", "null", "; select tollgate.set_webhook_enabled('gone', false)"),
    ] {
        let prepare = format!("{}{disable}", queue.replace("DEAD", dead));
        let mut counted = Vec::new();
        for n in [FEW, 10 * FEW] {
            let owner = prepared(&cluster, name, n, &prepare).await?;
            let holder = cluster.connect("postgres", &format!("{name}_{n}")).await?;
            holder
                .batch_execute("begin isolation level repeatable read; select from pg_class limit 1")
                .await?;
            let purge = format!("select tollgate.purge_webhook_deliveries('30 days', {})", n / 2);
            owner.batch_execute(&purge).await?;
            let step = "select tollgate.purge_webhook_deliveries('30 days', 1)";
            for _ in 0..3 {
                assert_eq!(value::<i64>(&owner, step).await?, 1, "{name}");
            }
            counted.push(pages(&owner, step).await?);
        }
        assert!(counted[1] <= 1.5 * counted[0] + 5.0, "{name}: {counted:?}");
    }
    Ok(())
}

/// The message counts of a webhook change with each message. While an older transaction is open, old versions stay.
#[tokio::test]
async fn message_counts_changed_often_beside_an_old_snapshot_are_found_at_once() -> Result<()> {
    let cluster = Arc::new(common::start(Cluster::builder().setting("autovacuum", "off"))?);
    let mut counted: Vec<[f64; 4]> = Vec::new();
    for n in [FEW, 10 * FEW] {
        let prepare = "
            select tollgate.define_webhook('w', 'https://example.com/');
            insert into tollgate.webhook_queue (webhook, event_epoch, event_id, event, body) select 'w', 1, g, 'x', '{}' from generate_series(1, 100) g;
            select tollgate.queue_webhook_deliveries(1000)";
        let owner = prepared(&cluster, "counters", n, prepare).await?;
        let holder = cluster.connect("postgres", &format!("counters_{n}")).await?;
        holder.batch_execute("begin isolation level repeatable read; select from pg_class limit 1").await?;
        let change = format!(
            "do $$ begin for i in 1..{n} loop perform tollgate.change_webhook_backlog('w', 0, 0, 0); commit; end loop; end $$"
        );
        owner.batch_execute(&change).await?;
        let mut costs = [0.0; 4];
        // The first round fills the session's caches.
        for _ in 0..2 {
            owner.batch_execute("insert into tollgate.audit_log (event, detail) values ('x', '{}')").await?;
            let finish = "select tollgate.finish_webhook_delivery(id, lease, 200)
                          from (select * from tollgate.webhook_queue where lease is not null limit 1) q";
            costs = [
                pages(&owner, "select tollgate.queue_webhook_deliveries(1000)").await?,
                pages(&owner, "select from tollgate.claim_webhook_deliveries(1)").await?,
                pages(&owner, finish).await?,
                pages(&owner, "select count(pending) from tollgate.webhooks").await?,
            ];
        }
        let row = owner
            .query_one(
                "select pending, (select count(*) from tollgate.webhook_queue) from tollgate.webhooks",
                &[],
            )
            .await?;
        assert_eq!(row.get::<_, i64>(0), row.get::<_, i64>(1));
        counted.push(costs);
    }
    for (few, many) in counted[0].iter().zip(counted[1]) {
        assert!(many <= 1.5 * few + 5.0, "{counted:?}");
    }
    Ok(())
}

/// The pages that one call reads depend on what it removes, not on how much there is to remove or to keep.
#[tokio::test]
async fn a_step_of_purging_the_log_costs_the_same_however_many_seals_there_are() -> Result<()> {
    let cluster = Arc::new(common::start(Cluster::builder().setting("autovacuum", "off"))?);
    let owner = cluster.connect("postgres", tollgate_tests::DATABASE).await?;
    owner.batch_execute("set tollgate.min_audit_retention = 0").await?;
    let mut counted = Vec::new();
    for n in [200, 2000] {
        let write = format!(
            "do $$ begin for i in 1..{n} loop insert into tollgate.audit_log (event) values ('test'); commit; end loop; end $$"
        );
        owner.batch_execute(&write).await?;
        owner
            .batch_execute(&format!(
                "select (tollgate.seal_audit_log(1)).events from generate_series(1, {n})"
            ))
            .await?;
        owner.batch_execute("vacuum analyze").await?;
        pages(&owner, "select tollgate.purge_audit_log(now(), 1)").await?;
        let removes = pages(&owner, "select tollgate.purge_audit_log(now(), 1)").await?;
        // A subscriber that does not advance, and nothing that is old enough.
        owner.batch_execute("select tollgate.open_subscription('slow')").await?;
        let back = "update tollgate.subscriptions set place = tollgate.event_position(0) where name = 'slow'";
        owner.batch_execute(back).await?;
        let is_held_up = pages(&owner, "select tollgate.purge_audit_log(now(), 1)").await?;
        owner.batch_execute("select tollgate.drop_subscription('slow')").await?;
        let is_too_young =
            pages(&owner, "select tollgate.purge_audit_log(now() - interval '1 hour', 1)").await?;
        counted.push([removes, is_held_up, is_too_young]);
    }
    for (few, many) in counted[0].iter().zip(counted[1]) {
        assert!(many <= few * 1.5, "{counted:?}");
    }
    Ok(())
}
