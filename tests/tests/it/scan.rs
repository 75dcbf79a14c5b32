//! A verification in FROM runs in our custom scan, and rows are found where they were last seen. Both only affect the
//! speed.

use std::sync::Arc;
use std::time::Duration;

use crate::common::{self, Shared, Token, World, code, issue, issue_with, refused, value};
use anyhow::{Context as _, Result};
use serde_json::Value;
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, SimpleQueryMessage};
use tollgate_tests::{Cluster, DATABASE, eventually_async};

static SHARED: Shared = Shared::new(&[]);

/// The node's name in EXPLAIN.
const NODE: &str = "Custom Scan (verify_api_token)";
const CALL: &str = "tollgate.verify_api_token($1)";
/// The same call, in a form that PostgreSQL's function scan executes.
const PLAIN_CALL: &str = "tollgate.verify_api_token($1) with ordinality";

async fn plan(client: &Client, sql: &str) -> Result<String> {
    let rows =
        client.query(&format!("explain (costs off) {sql}"), &[]).await.with_context(|| sql.to_owned())?;
    Ok(rows.iter().map(|row| row.get::<_, String>(0) + "\n").collect())
}

async fn uses(owner: &Client, token: &Token) -> Result<i64> {
    let sql =
        "select coalesce(sum(uses + denials), 0)::bigint from tollgate.drain_usage() where token_id = $1";
    let count = owner.query_one(sql, &[&token.id]).await?.get(0);
    owner.execute("with d as materialized (select distinct node, boot, generation from tollgate.drain_usage()),
              a as materialized (select generation, tollgate.apply_usage(node, boot, generation, '{}', tollgate.signature_of_usage(node, boot, generation, '{}')) as applied from d)
         select tollgate.ack_usage(generation) from a where applied", &[]).await?;
    Ok(count)
}

#[tokio::test]
async fn a_call_in_from_is_planned_as_our_node_and_others_are_not() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    owner
        .batch_execute(
            "create table if not exists public.people (name text); grant select on public.people to web",
        )
        .await?;
    for ours in [
        "select * from tollgate.verify_api_token('x')",
        "select code from tollgate.verify_api_token('x', array['posts:read'], '10.0.0.1') where valid",
        "select count(*) from tollgate.verify_api_token(lower('X') || 'y')",
        "select * from people p left join tollgate.verify_api_token('x') v on v.user_id = p.name",
    ] {
        assert!(plan(&web, ours).await?.contains(NODE), "{ours}");
    }
    assert!(
        plan(&web, "select * from tollgate.authenticate('x')").await?.contains("Custom Scan (authenticate)")
    );
    let by_hash = "select * from tollgate.verify_api_token_hash(sha256('x'))";
    assert!(plan(&web, by_hash).await?.contains("Custom Scan (verify_api_token_hash)"));
    for theirs in [
        "select v from tollgate.verify_api_token('x') v",
        "select * from tollgate.verify_api_token('x') with ordinality",
        "select * from rows from (tollgate.verify_api_token('x'), generate_series(1, 2)) v",
        "select * from people p, lateral tollgate.verify_api_token(p.name) v",
        "select * from people p, tollgate.verify_api_token('x') v for update of p",
        "select * from tollgate.verify_api_token((select max(name) from people))",
        "select (tollgate.verify_api_token('x')).*",
        "select * from generate_series(1, 3)",
    ] {
        // Only the owner may use FOR UPDATE.
        let plan = plan(&owner, theirs).await?;
        assert!(!plan.contains("Custom Scan"), "{theirs}: {plan}");
    }
    Ok(())
}

#[tokio::test]
async fn a_foreign_function_is_not_taken_for_ours() -> Result<()> {
    let World { owner, web, cluster } = SHARED.world().await?;
    cluster.execute(DATABASE, "create database without_tollgate")?;
    let other = cluster.connect("postgres", "without_tollgate").await?;
    other
        .batch_execute(
            "create schema tollgate; create type tollgate.verification as (valid boolean, code text);
             create function tollgate.verify_api_token(text) returns tollgate.verification
                 language sql volatile as $$ select true, 'a forgery' $$",
        )
        .await?;
    let sql = "select code from tollgate.verify_api_token('x')";
    assert!(!plan(&other, sql).await?.contains("Custom Scan"));
    assert_eq!(value::<String>(&other, sql).await?, "a forgery");

    owner.batch_execute("create schema if not exists mine; grant usage on schema mine to web").await?;
    owner
        .batch_execute(
            "create function mine.verify_api_token(text) returns setof tollgate.verification
                 language sql volatile as 'select (v).* from tollgate.verify_api_token($1) v'",
        )
        .await?;
    assert!(!plan(&web, "select code from mine.verify_api_token('x')").await?.contains(NODE));
    Ok(())
}

#[tokio::test]
async fn every_shape_of_query_gives_what_the_function_scan_gives() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    owner
        .batch_execute(
            "create table if not exists public.posts (id integer, author text, title text);
             truncate public.posts;
             insert into public.posts select i, case when i % 2 = 0 then 'shapes' else 'other' end, 'post ' || i
                 from generate_series(1, 6) i;
             grant select on public.posts to web",
        )
        .await?;
    let tokens = [
        issue_with(&owner, "shapes", "scopes => '{posts:read,users:read}', metadata => '{\"plan\": \"pro\"}'").await?,
        issue_with(&owner, "shapes", "expires_in => '1 hour'").await?,
        // Stored out of line, and compressed.
        issue_with(&owner, "shapes", "metadata => jsonb_build_object('long', (select string_agg(md5(i::text), ' ') from generate_series(1, 450) i))").await?,
        issue_with(&owner, "shapes", "metadata => jsonb_build_object('long', repeat('x', 9000))").await?,
        issue_with(&owner, "shapes", "allowed_ips => '{10.0.0.0/8}'").await?,
    ];
    let presented = tokens.iter().map(|token| token.token.as_str()).chain(["not a token"]);
    let shapes = [
        "select v.valid, v.code, v.token_id, v.user_id, v.name, v.scopes, v.expires_at, v.metadata, v.rate_limit, v.rate_remaining, v.retry_after from {} v",
        "select v.metadata, v.code, v.code as again from {} v",
        "select v.expires_at::text || 'x' as x, length(v.metadata::text) from {} v",
        "select 1 as one from {} v",
        "select count(*) from {} v",
        "select v.user_id from {} v where v.valid",
        "select v.name from {} v where v.code = 'MALFORMED' or v.scopes @> '{posts:read}'",
        "select v.code from {} v where v.valid is null",
        "select v.code from {} v where $1 is null",
        "select p.id, v.code from posts p, {} v where p.author = v.user_id order by p.id",
        "select p.id, v.code from posts p left join {} v on v.user_id = p.author and v.valid order by p.id",
        "select v.code, p.title from {} v left join posts p on p.author = v.user_id order by p.id",
        "select p.id from posts p where exists (select from {} v where v.user_id = p.author) order by p.id",
        "select p.id, (select v.code || p.id from {} v where v.user_id = p.author) as x from posts p order by p.id",
        "select p.id from posts p where p.author in (select v.user_id from {} v) order by p.id",
        "select p.id, x.code from posts p, lateral (select v.code from {} v where v.user_id = p.author offset 0) x order by p.id",
        "with v as materialized (select v.code, v.user_id from {} v) select a.code, b.user_id from v a, v b",
        "select a.code, b.code as other from {} a, {} b",
        "select v.code from {} v union all select 'end'",
        "select distinct v.user_id, v.scopes from {} v order by 1 limit 1",
        "select unnest(v.scopes) as scope from {} v order by 1",
        "select v.code, count(p.id) from {} v join posts p on true group by v.code having count(*) > 1",
        "select x.c from (select coalesce(v.name, 'none') as c from {} v) x right join posts p on x.c = p.title",
        "select row_number() over (order by v.code) as n, v.code from {} v",
    ];
    web.batch_execute("set plan_cache_mode = force_generic_plan").await?;
    for token in presented {
        for shape in shapes {
            for planner in
                ["", "set enable_nestloop = off", "set enable_hashjoin = off", "set enable_material = off"]
            {
                web.batch_execute(&format!(
                    "reset enable_nestloop; reset enable_hashjoin; reset enable_material; {planner}"
                ))
                .await?;
                let mut results = Vec::new();
                for call in [CALL, PLAIN_CALL] {
                    let sql = format!(
                        "select coalesce(jsonb_agg(to_jsonb(r)), '[]') from ({}) r",
                        shape.replace("{}", call)
                    );
                    let row = web.query_one(&sql, &[&token]).await.with_context(|| sql.clone())?;
                    results.push(row.get::<_, Value>(0));
                }
                assert_eq!(results[0], results[1], "{shape}, {planner}");
            }
        }
    }
    Ok(())
}

/// The column names and the rows as text, as the executor describes them.
async fn shown(client: &Client, sql: &str) -> Result<Vec<Vec<Option<String>>>> {
    let messages = client.simple_query(sql).await.with_context(|| sql.to_owned())?;
    let row = |message: &SimpleQueryMessage| match message {
        SimpleQueryMessage::RowDescription(columns) => {
            Some(columns.iter().map(|column| Some(column.name().to_owned())).collect())
        }
        SimpleQueryMessage::Row(row) => Some((0..row.len()).map(|n| row.get(n).map(str::to_owned)).collect()),
        _ => None,
    };
    Ok(messages.iter().filter_map(row).collect())
}

#[tokio::test]
async fn where_the_row_is_the_result_its_columns_have_the_names_and_values_of_the_function_scan() -> Result<()>
{
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    let token = issue_with(
        &owner,
        "results",
        "scopes => '{posts:read}', metadata => '{\"plan\": \"pro\"}', expires_in => '1 hour', rate_limit => 1000000,
         rate_window => '1 second'",
    )
    .await?;
    let all = "valid, code, token_id, user_id, name, scopes, expires_at, metadata, rate_limit, retry_after";
    let backwards = all.rsplit(", ").collect::<Vec<_>>().join(", ");
    for presented in [&token.token, "not a token"] {
        for columns in [
            all,
            &backwards,
            "valid",
            "code as verdict, user_id as \"Who?\", expires_at",
            "name as a_name_that_is_longer_than_a_name_may_be_which_is_sixty_three_bytes_and_not_more",
            "code, code as again",
            "code, upper(code)",
        ] {
            let from = |call: &str| {
                format!("select {columns} from {}", call.replace("$1", &format!("'{presented}'")))
            };
            assert_eq!(shown(&web, &from(CALL)).await?, shown(&web, &from(PLAIN_CALL)).await?, "{columns}");
            // Materialized and read again.
            let sorted = |call: &str| from(call) + " order by 1 limit 1";
            assert_eq!(
                shown(&web, &sorted(CALL)).await?,
                shown(&web, &sorted(PLAIN_CALL)).await?,
                "{columns}"
            );
        }
    }
    let starred = shown(&web, &format!("select * from tollgate.verify_api_token('{}')", token.token)).await?;
    let names: Vec<&str> = starred[0].iter().flatten().map(String::as_str).collect();
    let expected = all.replace("rate_limit", "rate_limit, rate_remaining");
    assert_eq!(names, expected.split(", ").collect::<Vec<_>>());
    Ok(())
}

#[tokio::test]
async fn a_plan_is_explained_the_same_before_and_after_it_has_run_or_failed_to() -> Result<()> {
    let World { owner, cluster, .. } = SHARED.world().await?;
    owner.batch_execute("create role explainer login").await?;
    let token = issue(&owner, "explained", &[]).await?;
    let client = cluster.connect("explainer", DATABASE).await?;
    let grant = "grant execute on function tollgate.verify_api_token to explainer";
    owner.batch_execute(grant).await?;
    client
        .batch_execute(
            "set plan_cache_mode = force_generic_plan;
             prepare verify(text) as select code, user_id as who from tollgate.verify_api_token($1)",
        )
        .await?;
    let execute = format!("execute verify('{}')", token.token);
    let explain = format!("explain (verbose, costs off) {execute}");
    let before = shown(&client, &explain).await?;
    assert!(format!("{before:?}").contains("Output: code, user_id"), "{before:?}");
    let result = shown(&client, &execute).await?;
    owner.batch_execute("revoke execute on function tollgate.verify_api_token from explainer").await?;
    refused(client.simple_query(&execute).await, &SqlState::INSUFFICIENT_PRIVILEGE);
    owner.batch_execute(grant).await?;
    for _ in 0..3 {
        assert_eq!(shown(&client, &explain).await?, before);
        assert_eq!(shown(&client, &execute).await?, result);
    }
    // Without any column of the function.
    client
        .batch_execute("prepare constant(text) as select 1 as one from tollgate.verify_api_token($1)")
        .await?;
    let execute = format!("execute constant('{}')", token.token);
    let explain = format!("explain (verbose, costs off) {execute}");
    let before = shown(&client, &explain).await?;
    assert!(format!("{before:?}").contains("Output: 1"), "{before:?}");
    for _ in 0..3 {
        assert_eq!(shown(&client, &execute).await?, [[Some("one".to_owned())], [Some("1".to_owned())]]);
        assert_eq!(shown(&client, &explain).await?, before);
    }
    Ok(())
}

#[tokio::test]
async fn one_prepared_statement_runs_in_two_portals_at_once() -> Result<()> {
    let World { owner, mut web, cluster: _cluster } = SHARED.world().await?;
    let tokens = [issue(&owner, "first", &[]).await?, issue(&owner, "second", &[]).await?];
    let transaction = web.transaction().await?;
    let union = format!("select user_id, name from {CALL} union all select 'end', $1");
    for sql in [&format!("select user_id, name from {CALL}"), &union] {
        let statement = transaction.prepare(sql).await?;
        let portals = [
            transaction.bind(&statement, &[&tokens[0].token]).await?,
            transaction.bind(&statement, &[&tokens[1].token]).await?,
        ];
        for (portal, expected) in portals.iter().zip(["first", "second"]) {
            let rows = transaction.query_portal(portal, 1).await?;
            assert_eq!(rows[0].get::<_, String>(0), expected);
        }
    }
    Ok(())
}

#[tokio::test]
async fn an_argument_is_taken_from_wherever_it_comes() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    let token = issue(&owner, "arguments", &["posts:read"]).await?;
    web.batch_execute(
        "create function pg_temp.in_sql(t text, s text[]) returns text language sql volatile as
             'select code from tollgate.verify_api_token(t, s)';
         create function pg_temp.in_plpgsql(t text, s text[]) returns text language plpgsql volatile as $$
         declare found text; copy text := t;
         begin
             select code into found from tollgate.verify_api_token(copy, s || null::text[], null);
             return found;
         end $$;
         create function pg_temp.dynamic(t text, s text[]) returns text language plpgsql volatile as $$
         declare found text;
         begin
             execute 'select code from tollgate.verify_api_token($1, $2)' into found using t, s;
             return found;
         end $$;
         prepare prepared(varchar, text[]) as select code from tollgate.verify_api_token($1, $2)",
    )
    .await?;
    for (scopes, expected) in
        [("'{posts:read}'", "VALID"), ("'{posts:write}'", "INSUFFICIENT_SCOPE"), ("null", "VALID")]
    {
        let token = &token.token;
        for call in [
            format!("select pg_temp.in_sql('{token}', {scopes})"),
            format!("select pg_temp.in_plpgsql('{token}', {scopes})"),
            format!("select pg_temp.dynamic('{token}', {scopes})"),
            format!("execute prepared('{token}', {scopes})"),
            format!("select code from tollgate.verify_api_token('{token}', {scopes})"),
            format!(
                "select code from tollgate.verify_api_token(left('{token}', 5) || substr('{token}', 6), {scopes})"
            ),
        ] {
            // Seven times: a prepared statement uses a generic plan from the sixth execution on.
            for _ in 0..7 {
                assert_eq!(shown(&web, &call).await?[1][0].as_deref(), Some(expected), "{call}");
            }
        }
    }
    let nothing = "select code from tollgate.verify_api_token(null)";
    assert_eq!(shown(&web, nothing).await?[1][0].as_deref(), Some("MALFORMED"));
    Ok(())
}

#[tokio::test]
async fn one_scan_is_one_use_however_often_it_is_rescanned() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    let token = issue(&owner, "rescans", &[]).await?;
    web.batch_execute("set enable_material = off; set enable_hashjoin = off; set enable_mergejoin = off")
        .await?;
    uses(&owner, &token).await?;
    let joined = "select count(*) from generate_series(1, 50) g left join tollgate.verify_api_token($1) v on v.user_id <> g::text";
    assert_eq!(web.query_one(joined, &[&token.token]).await?.get::<_, i64>(0), 50);
    assert_eq!(uses(&owner, &token).await?, 1);
    let correlated = "select count((select v.code from tollgate.verify_api_token($1) v where v.user_id <> g::text)) from generate_series(1, 50) g";
    assert_eq!(web.query_one(correlated, &[&token.token]).await?.get::<_, i64>(0), 50);
    assert_eq!(uses(&owner, &token).await?, 1);
    // If no row is requested, it verifies nothing.
    web.query("select from tollgate.verify_api_token($1) limit 0", &[&token.token]).await?;
    web.query("select from generate_series(1, 0) g, tollgate.verify_api_token($1)", &[&token.token]).await?;
    assert_eq!(uses(&owner, &token).await?, 0);
    Ok(())
}

#[tokio::test]
async fn a_cursor_shows_the_row_as_of_its_fetch_and_scrolls() -> Result<()> {
    let World { owner, mut web, cluster: _cluster } = SHARED.world().await?;
    let token = issue(&owner, "cursors", &["posts:read"]).await?;
    let transaction = web.transaction().await?;
    let declare = format!(
        "declare c scroll cursor for select code, scopes from tollgate.verify_api_token('{}')",
        token.token
    );
    transaction.batch_execute(&declare).await?;
    let first: String = transaction.query_one("fetch next from c", &[]).await?.get(0);
    // Updated, deleted and vacuumed meanwhile: the fetched row stays the same.
    owner
        .execute("update tollgate.api_tokens set scopes = '{users:read}' where id = $1", &[&token.id])
        .await?;
    owner.batch_execute("vacuum (freeze, disable_page_skipping) tollgate.api_tokens").await?;
    assert!(transaction.query("fetch next from c", &[]).await?.is_empty());
    let again = transaction.query_one("fetch prior from c", &[]).await?;
    assert_eq!((first.as_str(), again.get::<_, Vec<String>>(1)), ("VALID", vec!["posts:read".to_owned()]));
    transaction.commit().await?;

    let held = format!(
        "begin; declare h cursor with hold for select code from tollgate.verify_api_token('{}'); commit",
        token.token
    );
    web.batch_execute(&held).await?;
    assert_eq!(web.query_one("fetch next from h", &[]).await?.get::<_, String>(0), "VALID");
    Ok(())
}

/// The result of each of these fetches from a cursor on a call: the code, or nothing.
async fn fetched(web: &Client, declare: &str, fetches: &[&str]) -> Result<Vec<Option<String>>> {
    web.batch_execute(&format!("begin; {declare}")).await?;
    let mut found = Vec::new();
    for fetch in fetches {
        let row = web.query_opt(&format!("{fetch} from c"), &[]).await.with_context(|| declare.to_owned())?;
        found.push(row.map(|row| row.get(0)));
    }
    web.batch_execute("commit").await?;
    Ok(found)
}

#[tokio::test]
async fn a_cursor_moves_in_both_directions_as_one_on_a_function_scan_does() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    let token = issue(&owner, "backward", &[]).await?;
    let fetches = [
        "fetch backward 1",
        "fetch next",
        "fetch backward 1",
        "fetch next",
        "fetch next",
        "fetch next",
        "fetch backward 1",
        "fetch relative 0",
        "fetch prior",
        "fetch last",
        "fetch first",
        "fetch absolute -1",
        "fetch forward 1",
        "fetch backward 1",
    ];
    for scroll in ["", "scroll"] {
        for condition in ["", "where valid", "where not valid", "join generate_series(1, 1) on true"] {
            let call = format!("tollgate.verify_api_token('{}')", token.token);
            let declare =
                |call: &str| format!("declare c {scroll} cursor for select code from {call} {condition}");
            // A join without SCROLL only moves forward, whatever is below.
            let fetches = if condition.starts_with("join") && scroll.is_empty() {
                &["fetch next", "fetch next"][..]
            } else {
                &fetches[..]
            };
            let ours = fetched(&web, &declare(&call), fetches).await?;
            let theirs = fetched(&web, &declare(&format!("{call} with ordinality")), fetches).await?;
            assert_eq!(ours, theirs, "{scroll} {condition}");
        }
    }
    let no_scroll = format!(
        "begin; declare c no scroll cursor for select code from tollgate.verify_api_token('{}')",
        token.token
    );
    web.batch_execute(&no_scroll).await?;
    refused(web.query("fetch backward 1 from c", &[]).await, &SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE);
    web.batch_execute("rollback").await?;
    Ok(())
}

/// Calls that return while their statement continues.
fn open_calls(token: &Token) -> [String; 5] {
    let call = format!("tollgate.verify_api_token('{}')", token.token);
    [
        format!("select valid from {call}"),
        format!("select v.* from {call} v, generate_series(1, 1000)"),
        format!("select ({call}).metadata"),
        format!("select valid from tollgate.authenticate('{}')", token.token),
        format!(
            "select tollgate.token_has_scope('{}', 'posts:read') from generate_series(1, 1000)",
            token.token
        ),
    ]
}

const PINNED: Duration = Duration::from_secs(20);

#[tokio::test]
async fn an_open_cursor_on_a_verification_holds_no_pin_and_no_lock() -> Result<()> {
    // Its own database: no other test pins its pages.
    let cluster = SHARED.cluster()?;
    common::database(&cluster, "unpinned")?;
    let owner = cluster.connect("postgres", "unpinned").await?;
    let web = cluster.connect("web", "unpinned").await?;
    owner.batch_execute("create extension pg_buffercache").await?;
    let metadata = "metadata => jsonb_build_object('long', (select string_agg(md5(i::text), ' ') from generate_series(1, 450) i))";
    let token = issue_with(&owner, "held", metadata).await?;
    let pid: i32 = value(&web, "select pg_backend_pid()").await?;
    // The second time our hint leads to the row.
    for call in open_calls(&token).into_iter().cycle().take(10) {
        web.batch_execute(&format!("begin; declare c cursor for {call}; fetch 1 from c")).await?;
        // The checkpointer pins a page for as long as it writes it; the cursor's pin would stay.
        let pins = "select count(*) from pg_buffercache where pinning_backends > 0 and reldatabase = (
                 select oid from pg_database where datname = current_database())
                 and relfilenode in (select pg_relation_filenode(c.oid) from pg_class c
                                     where relnamespace = 'tollgate'::regnamespace and relkind in ('r', 'i'))";
        eventually_async(PINNED, "no page to be pinned", async || {
            value::<i64>(&owner, pins).await.unwrap() == 0
        })
        .await;
        let locks: i64 = value(
            &owner,
            &format!(
                "select count(*) from pg_locks where pid = {pid} and relation in (
                     'tollgate.api_tokens'::regclass, 'tollgate.api_tokens_token_hash'::regclass)"
            ),
        )
        .await?;
        assert_eq!(locks, 0, "{call}");
        let vacuuming = cluster.connect("postgres", "unpinned").await?;
        vacuuming.batch_execute("set lock_timeout = '20s'; set statement_timeout = '20s'").await?;
        vacuuming
            .batch_execute("vacuum (freeze, disable_page_skipping) tollgate.api_tokens")
            .await
            .with_context(|| call.clone())?;
        web.batch_execute("fetch all from c; commit").await?;
    }
    Ok(())
}

#[tokio::test]
async fn values_stored_out_of_line_survive_their_row() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    let metadata = "metadata => jsonb_build_object('long', (select string_agg(md5(i::text), ' ') from generate_series(1, 450) i))";
    let token = issue_with(&owner, "gone", metadata).await?;
    let declare = format!(
        "begin; declare c cursor for select length(metadata ->> 'long'), user_id from tollgate.verify_api_token('{}'),
             generate_series(1, 3); fetch 1 from c",
        token.token
    );
    web.batch_execute(&declare).await?;
    owner.batch_execute(&format!("delete from tollgate.api_tokens where id = '{}'", token.id)).await?;
    owner.batch_execute("vacuum full tollgate.api_tokens").await?;
    let rows = web.query("fetch all from c", &[]).await?;
    let row = |row: &tokio_postgres::Row| (row.get::<_, i32>(0), row.get::<_, String>(1));
    assert_eq!(rows.iter().map(row).collect::<Vec<_>>(), vec![(14849, "gone".to_owned()); 2]);
    web.batch_execute("commit").await?;
    Ok(())
}

#[tokio::test]
async fn a_verification_on_a_standby_conflicts_with_no_recovery() -> Result<()> {
    let primary = Arc::new(common::start(
        Cluster::builder().setting("max_standby_streaming_delay", "10ms").setting("autovacuum", "off"),
    )?);
    let owner = primary.connect("postgres", DATABASE).await?;
    let token = issue(&owner, "standby", &["posts:read"]).await?;
    let doomed = issue(&owner, "standby", &[]).await?;
    let standby = primary.standby()?;
    // Dead to all, on the page of the other: pruning it waits only for pins of the page.
    owner.batch_execute(&format!("delete from tollgate.api_tokens where id = '{}'", doomed.id)).await?;
    standby.catch_up_with(&primary)?;
    let web = standby.connect("web", DATABASE).await?;
    web.batch_execute(&format!(
        "begin; declare c cursor for select code from tollgate.verify_api_token('{}'), generate_series(1, 3); fetch 1 from c",
        token.token
    ))
    .await?;
    for step in [
        "vacuum (freeze, disable_page_skipping) tollgate.api_tokens",
        "reindex index tollgate.api_tokens_token_hash",
    ] {
        owner.batch_execute(step).await?;
        standby.catch_up_with(&primary)?;
        assert_eq!(web.query("fetch 1 from c", &[]).await.with_context(|| step.to_owned())?.len(), 1);
    }
    web.batch_execute("commit").await?;
    assert_eq!(code(&web, &token.token).await?, "VALID");
    let conflicts: i64 = value(
        &web,
        "select sum(confl_lock + confl_snapshot + confl_bufferpin)::bigint from pg_stat_database_conflicts",
    )
    .await?;
    assert_eq!(conflicts, 0);
    Ok(())
}

#[tokio::test]
async fn a_cached_plan_is_the_same_after_each_execution_and_after_an_error() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    let token = issue(&owner, "cached", &["posts:read"]).await?;
    web.batch_execute(
        "set plan_cache_mode = force_generic_plan;
         prepare p (text, int) as select v.*, 1 / $2 as one from tollgate.verify_api_token($1) v;
         prepare q (text) as select * from tollgate.authenticate($1)",
    )
    .await?;
    let p = |by: i32| format!("execute p ('{}', {by})", token.token);
    let first = plan(&web, &p(1)).await?;
    for _ in 0..3 {
        assert_eq!(shown(&web, &p(1)).await?[1][1].as_deref(), Some("VALID"));
        refused(web.batch_execute(&p(0)).await, &SqlState::DIVISION_BY_ZERO);
        refused(
            web.batch_execute("execute q ('junk')").await,
            &SqlState::INVALID_AUTHORIZATION_SPECIFICATION,
        );
        let row = shown(&web, &format!("execute q ('{}')", token.token)).await?;
        assert_eq!(row[1][1].as_deref(), Some("VALID"));
        assert_eq!(plan(&web, &p(1)).await?, first);
    }
    Ok(())
}

#[tokio::test]
async fn the_privilege_is_checked_each_time_a_plan_is_run() -> Result<()> {
    let World { owner, cluster, .. } = SHARED.world().await?;
    owner.batch_execute("create role guest login").await?;
    let token = issue(&owner, "privileges", &[]).await?;
    let guest = cluster.connect("guest", DATABASE).await?;
    let sql = "select code from tollgate.verify_api_token($1)";
    let error = refused(guest.query(sql, &[&token.token]).await, &SqlState::INSUFFICIENT_PRIVILEGE);
    assert_eq!(error.message(), "permission denied for function verify_api_token");

    let grant = "grant execute on function tollgate.verify_api_token to guest";
    owner.batch_execute(grant).await?;
    let prepared = guest.prepare(sql).await?;
    for _ in 0..7 {
        assert_eq!(guest.query_one(&prepared, &[&token.token]).await?.get::<_, String>(0), "VALID");
    }
    owner.batch_execute("revoke execute on function tollgate.verify_api_token from guest").await?;
    refused(guest.query(&prepared, &[&token.token]).await, &SqlState::INSUFFICIENT_PRIVILEGE);
    owner.batch_execute(grant).await?;
    assert_eq!(guest.query_one(&prepared, &[&token.token]).await?.get::<_, String>(0), "VALID");
    Ok(())
}

#[tokio::test]
async fn a_prepared_plan_outlives_the_extension_that_it_was_made_for() -> Result<()> {
    let cluster = Arc::new(common::start(Cluster::builder())?);
    let owner = cluster.connect("postgres", DATABASE).await?;
    let prepared = owner.prepare("select code from tollgate.verify_api_token($1)").await?;
    let token = issue(&owner, "before", &[]).await?;
    assert_eq!(owner.query_one(&prepared, &[&token.token]).await?.get::<_, String>(0), "VALID");
    let other = cluster.connect("postgres", DATABASE).await?;
    other.batch_execute("drop extension tollgate").await?;
    // As for any dropped function.
    assert!(owner.query(&prepared, &[&token.token]).await.is_err());
    other.batch_execute("create extension tollgate").await?;
    let token = issue(&owner, "after", &[]).await?;
    assert_eq!(owner.query_one(&prepared, &[&token.token]).await?.get::<_, String>(0), "VALID");
    Ok(())
}

#[tokio::test]
async fn an_error_while_a_row_is_held_leaves_the_session_as_good_as_before() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    let token = issue(&owner, "errors", &[]).await?;
    for _ in 0..3 {
        let failing = "select 1 / (length(code) - 5) from tollgate.verify_api_token($1)";
        refused(web.query(failing, &[&token.token]).await, &SqlState::DIVISION_BY_ZERO);
        let caught = format!(
            "do $$ begin
                 perform 1 / (length(code) - 5) from tollgate.verify_api_token('{}');
             exception when division_by_zero then null; end $$",
            token.token
        );
        web.batch_execute(&caught).await?;
        refused(
            web.query("select * from tollgate.authenticate($1)", &[&"no token"]).await,
            &SqlState::INVALID_AUTHORIZATION_SPECIFICATION,
        );
        assert_eq!(code(&web, &token.token).await?, "VALID");
    }
    Ok(())
}

// ---- Rows are found wherever they are

/// The verification result of a token, and the current name in its row.
async fn named(client: &Client, token: &Token) -> Result<(String, Option<String>)> {
    let row =
        client.query_one("select code, name from tollgate.verify_api_token($1)", &[&token.token]).await?;
    Ok((row.get(0), row.get(1)))
}

fn valid(name: &str) -> (String, Option<String>) {
    ("VALID".into(), Some(name.into()))
}

#[tokio::test]
async fn a_row_is_found_wherever_it_has_moved_since_it_was_last_seen() -> Result<()> {
    let cluster = Arc::new(common::start(Cluster::builder().setting("autovacuum", "off"))?);
    let (owner, web) =
        (cluster.connect("postgres", DATABASE).await?, cluster.connect("web", DATABASE).await?);
    let mut tokens = Vec::new();
    for _ in 0..40 {
        tokens.push(issue(&owner, "movers", &[]).await?);
    }
    for (n, step) in [
        // Each on top of the previous ones: within the page, to another, away and back, to another file.
        "update tollgate.api_tokens set name = 'a'",
        "update tollgate.api_tokens set name = 'b', metadata = jsonb_build_object('long', repeat('x', 1500))",
        "vacuum tollgate.api_tokens",
        "update tollgate.api_tokens set name = 'c', expires_at = now() + interval '1 day'",
        "delete from tollgate.api_tokens where ctid in (select ctid from tollgate.api_tokens order by id limit 20)",
        "vacuum tollgate.api_tokens",
        "insert into tollgate.api_tokens (id, token_hash, user_id, name, scopes, metadata, hint)
             select gen_random_uuid(), sha256(i::text::bytea), 'others', 'other', '{}', '{}', 'x' from generate_series(1, 300) i",
        "vacuum full tollgate.api_tokens",
        "delete from tollgate.api_tokens where user_id = 'others'",
        "vacuum (truncate) tollgate.api_tokens",
        "cluster tollgate.api_tokens using api_tokens_pkey",
        "reindex index tollgate.api_tokens_token_hash",
    ]
    .into_iter()
    .enumerate()
    {
        owner.batch_execute(step).await?;
        let names = owner
            .query("select id, name from tollgate.api_tokens where user_id = 'movers'", &[])
            .await?
            .iter()
            .map(|row| (row.get(0), row.get(1)))
            .collect::<std::collections::HashMap<uuid::Uuid, String>>();
        for client in [&web, &owner] {
            for token in &tokens {
                let expected =
                    names.get(&token.id).map_or_else(|| ("NOT_FOUND".into(), None), |name| valid(name));
                assert_eq!(named(client, token).await?, expected, "after step {n}: {step}");
            }
        }
    }
    Ok(())
}

#[tokio::test]
async fn rows_are_found_although_their_pages_leave_the_buffers_all_the_time() -> Result<()> {
    // Sixteen buffers, or a few more, for a table of many hundred pages; and fewer hints than tokens.
    let builder =
        Cluster::builder().setting("shared_buffers", "256kB").setting("tollgate.max_tracked_keys", "1024");
    let cluster = Arc::new(common::start(builder)?);
    let (owner, web) =
        (cluster.connect("postgres", DATABASE).await?, cluster.connect("web", DATABASE).await?);
    owner
        .batch_execute(
            "insert into tollgate.api_tokens (id, token_hash, user_id, name, scopes, metadata, hint)
                 select gen_random_uuid(), sha256(i::text::bytea), 'many', 'number ' || i, '{}', jsonb_build_object('fill', repeat('x', 300)), 'x'
                 from generate_series(1, 5000) i",
        )
        .await?;
    let wrong = "select count(*) from generate_series(1, 5000) i, lateral (select v.name from tollgate.verify_api_token_hash(sha256(i::text::bytea)) v) v
                 where v.name is distinct from 'number ' || i";
    owner.batch_execute("grant execute on function tollgate.verify_api_token_hash to web").await?;
    for _ in 0..3 {
        assert_eq!(value::<i64>(&web, wrong).await?, 0);
    }
    Ok(())
}

#[tokio::test]
async fn the_same_digest_in_two_databases_is_two_tokens() -> Result<()> {
    let World { owner, cluster, .. } = SHARED.world().await?;
    common::database(&cluster, "twin")?;
    let twin = cluster.connect("postgres", "twin").await?;
    let insert = "insert into tollgate.api_tokens (id, token_hash, user_id, name, scopes, metadata, hint)
                  values (gen_random_uuid(), sha256('twins'), $1, 'twin', '{}', '{}', 'x')";
    owner.execute(insert, &[&"here"]).await?;
    twin.execute(insert, &[&"there"]).await?;
    let user = "select user_id from tollgate.verify_api_token_hash(sha256('twins'))";
    for _ in 0..5 {
        assert_eq!(value::<String>(&owner, user).await?, "here");
        assert_eq!(value::<String>(&twin, user).await?, "there");
    }
    Ok(())
}

#[tokio::test]
async fn a_hint_shows_an_older_transaction_the_current_state() -> Result<()> {
    let World { owner, mut web, cluster: _cluster } = SHARED.world().await?;
    let token = issue(&owner, "hints", &[]).await?;
    assert_eq!(code(&web, &token.token).await?, "VALID");
    let transaction = web
        .build_transaction()
        .isolation_level(tokio_postgres::IsolationLevel::RepeatableRead)
        .start()
        .await?;
    transaction.query_one("select 1", &[]).await?;
    for (change, expected) in [
        ("disabled_at = now()", "DISABLED"),
        ("disabled_at = null", "VALID"),
        ("revoked_at = now()", "REVOKED"),
    ] {
        owner
            .batch_execute(&format!("update tollgate.api_tokens set {change} where id = '{}'", token.id))
            .await?;
        assert_eq!(
            transaction
                .query_one("select code from tollgate.verify_api_token($1)", &[&token.token])
                .await?
                .get::<_, String>(0),
            expected
        );
    }
    Ok(())
}

/// Tokens whose rows are continuously updated, moved and vacuumed are found by every verification.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn no_verification_misses_a_row_that_is_on_the_move() -> Result<()> {
    let cluster = Arc::new(common::start(Cluster::builder())?);
    let owner = cluster.connect("postgres", DATABASE).await?;
    let mut tokens = Vec::new();
    for _ in 0..20 {
        tokens.push(issue(&owner, "on the move", &[]).await?);
    }
    let tokens = Arc::new(tokens);
    let mut verifiers = Vec::new();
    for _ in 0..3 {
        let (client, tokens) = (cluster.connect("web", DATABASE).await?, Arc::clone(&tokens));
        verifiers.push(tokio::spawn(async move {
            for n in 0..3000 {
                assert_eq!(code(&client, &tokens[n % tokens.len()].token).await?, "VALID");
            }
            anyhow::Ok(())
        }));
    }
    let mover = tokio::spawn(async move {
        let mut round = 0;
        loop {
            round += 1;
            // Every other one leaves its page: expires_at is indexed.
            owner
                .batch_execute("update tollgate.api_tokens set name = name || 'x' where random() < 0.5")
                .await?;
            owner.batch_execute("update tollgate.api_tokens set name = 'n', expires_at = now() + interval '1 day' where random() < 0.5").await?;
            if round % 5 == 0 {
                owner.batch_execute("vacuum tollgate.api_tokens").await?;
            }
        }
        #[allow(unreachable_code)]
        anyhow::Ok(())
    });
    for verifier in verifiers {
        verifier.await??;
    }
    assert!(!mover.is_finished(), "the mover failed");
    mover.abort();
    Ok(())
}

#[tokio::test]
async fn lookups_by_hints_leave_nothing_pinned_and_no_memory_behind() -> Result<()> {
    let World { owner, web, cluster } = SHARED.world().await?;
    let token = issue(&owner, "pins", &[]).await?;
    // A page that stays pinned blocks VACUUM FREEZE for ever; a pin that is not released warns at commit.
    for _ in 0..200 {
        web.query("select v.code, v.name from tollgate.verify_api_token($1) v", &[&token.token]).await?;
    }
    owner.execute("update tollgate.api_tokens set name = 'z' where id = $1", &[&token.id]).await?;
    let vacuumed = cluster.connect("postgres", DATABASE).await?;
    let done =
        tokio::spawn(async move { vacuumed.batch_execute("vacuum (freeze) tollgate.api_tokens").await });
    eventually_async(Duration::from_secs(20), "VACUUM to get its locks", async || done.is_finished()).await;
    assert!(!cluster.log().contains("leak"), "{}", cluster.log());
    Ok(())
}
