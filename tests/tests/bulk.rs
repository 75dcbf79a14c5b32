//! What is done to very many rows costs so much for each of them, however many there are. Counted is what the server has to
//! look at, pages of tables and indexes, and not time: ten times as many rows may cost at most twelve times as much.

mod common;

use std::sync::Arc;

use anyhow::{Context as _, Result};
use common::{Shared, database, value};
use tokio_postgres::Client;
use tollgate_tests::Cluster;

static SHARED: Shared = Shared::new(&[("autovacuum", "off"), ("tollgate.accept_foreign_tokens", "on")]);

const FEW: u32 = 1000;
const MOST_GROWTH: f64 = 12.0;

/// How many pages a statement looks at, in all that it calls too.
async fn pages(client: &Client, statement: &str) -> Result<f64> {
    let rows =
        client.query(&format!("explain (analyze, buffers, timing off, format json) {statement}"), &[]).await;
    let plan: serde_json::Value = rows.with_context(|| statement.to_owned())?[0].get(0);
    let count = |key: &str| plan[0]["Plan"][key].as_f64().with_context(|| format!("no {key} in {plan}"));
    Ok(count("Shared Hit Blocks")? + count("Shared Read Blocks")?)
}

/// The same of a statement that is repeated until it returns less than a batch.
async fn pages_until_done(client: &Client, call: &str, batch: i64) -> Result<f64> {
    let mut sum = 0.0;
    loop {
        client.batch_execute("create temp table if not exists done (n bigint); truncate done").await?;
        sum += pages(client, &format!("insert into done select {call}")).await?;
        if value::<i64>(client, "select n from done").await? < batch {
            return Ok(sum);
        }
    }
}

/// A database with the extension, in which `prepare` was run for so many rows.
async fn prepared(cluster: &Arc<Cluster>, name: &str, n: u32, prepare: &str) -> Result<Client> {
    let name = format!("{name}_{n}");
    database(cluster, &name)?;
    let owner = cluster.connect("postgres", &name).await?;
    owner.batch_execute(&prepare.replace(":n", &n.to_string())).await?;
    // Also where the table is still empty: what is planned then is what later rows go by.
    owner.batch_execute("vacuum analyze").await?;
    Ok(owner)
}

fn assert_linear(what: &str, few: f64, many: f64) {
    assert!(few > 0.0, "{what}: nothing was counted");
    assert!(many / few <= MOST_GROWTH, "{what}: {few} pages for {FEW} rows, {many} for ten times as many");
}

/// One statement, of so many rows and of ten times as many.
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

/// A batch of ten at a time, until there are no more. On a server of its own: each batch passes over the entries of indexes
/// that earlier ones have left dead, and it does so by way of the table for as long as any transaction of the server is open
/// that began before, also one of another test in another database.
async fn is_linear_in_batches(name: &str, prepare: &str, call: &str) -> Result<()> {
    let cluster = Arc::new(common::start(Cluster::builder().setting("autovacuum", "off"))?);
    let mut counted = Vec::new();
    for n in [FEW, 10 * FEW] {
        let owner = prepared(&cluster, name, n, prepare).await?;
        counted.push(pages_until_done(&owner, call, 10).await?);
    }
    assert_linear(name, counted[0], counted[1]);
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
async fn issuing_for_users_of_an_attached_table() -> Result<()> {
    let prepare = "
        create table users (id text primary key, gone boolean); insert into users select 'u' || g from generate_series(1, :n) g;
        select tollgate.attach_users_table('users', 'id', active => 'gone is not true')";
    is_linear("issuing_attached", prepare, TOKENS).await
}

#[tokio::test]
async fn switching_off_users_of_an_attached_table() -> Result<()> {
    let prepare = format!(
        "create table users (id text primary key, gone boolean); insert into users select 'u' || g from generate_series(1, :n) g;
         select tollgate.attach_users_table('users', 'id', active => 'gone is not true'); {TOKENS}"
    );
    is_linear("switching_off", &prepare, "update users set gone = true").await
}

/// A chunk of them is a thousand families, or fifty thousand users: more than the others of these tests have.
#[tokio::test]
async fn more_than_fits_into_one_step_is_revoked_to_the_last() -> Result<()> {
    let prepare = format!(
        "create table users (id text primary key); insert into users select 'u' || g from generate_series(1, :n) g;
         select tollgate.attach_users_table('users', 'id'); {TOKENS}"
    );
    let cluster = SHARED.cluster()?;
    let owner = prepared(&cluster, "steps", 51_234, &prepare).await?;
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

// ---- What time does

#[tokio::test]
async fn announcing_what_ends_soon() -> Result<()> {
    is_linear_in_batches("announcing", SOON_OVER, "tollgate.announce_expiries('7 days', 10)").await
}

#[tokio::test]
async fn a_look_for_what_is_to_be_announced_costs_nothing_when_all_is() -> Result<()> {
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

#[tokio::test]
async fn recording_expiries() -> Result<()> {
    let prepare = format!("{SOON_OVER}; update tollgate.api_tokens set expires_at = now()");
    is_linear_in_batches("expiring", &prepare, "tollgate.expire_tokens(10)").await
}

/// As the daemon deletes: rounds of small steps, until one deletes nothing.
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
async fn purging_what_ended_in_one_moment() -> Result<()> {
    purging_is_linear("purging", &format!("{OF_ONE}; update tollgate.api_tokens set revoked_at = now()"))
        .await
}

#[tokio::test]
async fn purging_families_whose_parents_ended_first() -> Result<()> {
    let revoke = "update tollgate.api_tokens set revoked_at = now() - interval '1 second' * (parent_id is null)::integer";
    purging_is_linear("purging_families", &format!("{FAMILIES}; {revoke}")).await
}

// ---- The log

#[tokio::test]
async fn sealing_and_verifying_the_log() -> Result<()> {
    is_linear("sealing", TOKENS, "select tollgate.seal_audit_log(1000000)").await?;
    let sealed = format!("{TOKENS}; select tollgate.seal_audit_log(1000000)");
    is_linear("verifying_seals", &sealed, "select tollgate.verify_audit_log()").await
}
