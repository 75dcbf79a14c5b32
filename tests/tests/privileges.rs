//! Who may do what, who is kept out, and what is told to nobody.

mod common;

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result};
use common::{Shared, World, error, issue, refused, revoke, text_of, value};
use serde_json::json;
use tokio_postgres::error::{DbError, SqlState};
use tokio_postgres::types::ToSql;
use tokio_postgres::{AsyncMessage, Client};
use tollgate_tests::{Cluster, DATABASE};

static SHARED: Shared = Shared::new(&[]);

/// What everyone may call: it discloses nothing but the caller's own context.
const PUBLIC: [&str; 8] = [
    "tollgate.current_scopes()",
    "tollgate.current_token_id()",
    "tollgate.current_user_id()",
    "tollgate.require_scope(text)",
    "tollgate.scope_grants(text[],text)",
    "tollgate.token_has_all_scopes(text[])",
    "tollgate.token_has_any_scope(text[])",
    "tollgate.token_has_scope(text)",
];

/// A call of each function that is granted to somebody, which succeeds with that one grant. `{token}` and `{id}` are of
/// a live token.
const GRANTED: [(&str, &str); 32] = [
    (
        "tollgate.create_api_token(text,text,text[],interval,jsonb,cidr[],integer,interval,text)",
        "create_api_token('clerk', 'n', '{posts:read}', '1 day', '{}', '{10.0.0.0/8}', prefix => 'abc')",
    ),
    (
        "tollgate.verify_api_token(text,text[],inet)",
        "verify_api_token('{token}', '{posts:read}', '10.0.0.1')",
    ),
    ("tollgate.verify_api_token_hash(bytea,text[],inet)", "verify_api_token_hash('\\x00')"),
    ("tollgate.authenticate(text,text[],inet)", "authenticate('{token}', '{posts:read}', '10.0.0.1')"),
    ("tollgate.token_has_scope(text,text)", "token_has_scope('{token}', 'posts:read')"),
    ("tollgate.list_api_tokens(text)", "list_api_tokens('clerk')"),
    ("tollgate.revoke_api_token(uuid,text,text)", "revoke_api_token('{id}', 'clerk', 'over')"),
    ("tollgate.revoke_presented_token(text,text)", "revoke_presented_token('{token}', 'leaked')"),
    ("tollgate.revoke_all_api_tokens(text,text)", "revoke_all_api_tokens('clerk', 'over')"),
    ("tollgate.rotate_api_token(uuid,interval)", "rotate_api_token('{id}', '1 hour')"),
    ("tollgate.update_api_token(uuid,jsonb)", "update_api_token('{id}', '{\"name\": \"other\"}')"),
    ("tollgate.set_api_token_enabled(uuid,boolean,text)", "set_api_token_enabled('{id}', false, 'for now')"),
    (
        "tollgate.derive_api_token(text,text,text[],interval,cidr[])",
        "derive_api_token('{token}', 'n', '{posts:read}', '1 day', '{10.0.0.0/8}')",
    ),
    (
        "tollgate.import_api_token(text,text,bytea,text[],interval,jsonb,cidr[],integer,interval)",
        "import_api_token('clerk', 'n', pg_catalog.sha256('{id}'))",
    ),
    // Raises 28000 as long as nobody is authenticated.
    ("tollgate.revoke_own_api_token(uuid,text)", "revoke_own_api_token('{id}', 'over')"),
    ("tollgate.attach_users_table(regclass,name)", "attach_users_table('pg_temp.clerks_users', 'id')"),
    ("tollgate.define_scope(text,text)", "define_scope('clerk:scope', 'of the clerk')"),
    ("tollgate.drop_scope(text)", "drop_scope('clerk:scope')"),
    ("tollgate.stats()", "stats()"),
    ("tollgate.drain_usage()", "drain_usage()"),
    (
        "tollgate.apply_usage(text,uuid,bigint,tollgate.usage_row[])",
        "apply_usage('node', '00000000-0000-0000-0000-000000000001', 1, '{\"({id},1,2,,)\"}')",
    ),
    ("tollgate.ack_usage(bigint)", "ack_usage(1)"),
    ("tollgate.expire_tokens(integer)", "expire_tokens(10)"),
    ("tollgate.purge_tokens(interval,integer)", "purge_tokens('30 days', 10)"),
    ("tollgate.event_position(bigint)", "event_position(0)"),
    ("tollgate.read_events(bigint,bigint[],integer)", "read_events(0, '{}', 10)"),
    ("tollgate.open_subscription(text)", "open_subscription('clerk')"),
    ("tollgate.advance_subscription(text,bigint,bigint[])", "advance_subscription('clerk', 3, '{}')"),
    (
        "tollgate.report_daemon(uuid,text,integer,text,timestamp with time zone,jsonb)",
        "report_daemon('00000000-0000-0000-0000-000000000002', 'host', 1, '0', '2020-01-01', '{}')",
    ),
    ("tollgate.token_has_scope(text)", "token_has_scope('posts:read')"),
    ("tollgate.current_user_id()", "current_user_id()"),
    ("tollgate.scope_grants(text[],text)", "scope_grants('{posts:*}', 'posts:read')"),
];

/// Functions of the schema by signature, with a call that passes NULL for each argument: from a sub-select, since a
/// strict function of constants would be folded away before anybody asks whether it may be called.
async fn functions(owner: &Client) -> Result<BTreeMap<String, String>> {
    let rows = owner
        .query(
            "select p.oid::regprocedure::text,
                    format('select %s(%s)', p.oid::regproc,
                           (select string_agg(format('(select null::%s)', format_type(t, null)), ', ' order by n)
                            from unnest(p.proargtypes) with ordinality a (t, n)))
             from pg_proc p where p.pronamespace = 'tollgate'::regnamespace",
            &[],
        )
        .await?;
    Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
}

/// Tries everything that there is in the schema as a role that was granted nothing.
async fn assert_locked(owner: &Client, stranger: &Client) -> Result<()> {
    let role: String = value(stranger, "select current_user::text").await?;
    let functions = functions(owner).await?;
    assert!(functions.len() > PUBLIC.len() + 20, "these are not all: {functions:?}");
    let denied = |error: &DbError| {
        error.code() == &SqlState::INSUFFICIENT_PRIVILEGE
            && error.message().starts_with("permission denied for")
    };
    let mut open = BTreeSet::new();
    for (function, call) in &functions {
        if !stranger.batch_execute(call).await.is_err_and(|error| error.as_db_error().is_some_and(denied)) {
            open.insert(function.as_str());
        }
    }
    assert_eq!(open, BTreeSet::from(PUBLIC), "functions that anyone may call");

    let relations = owner
        .query(
            "select c.oid::regclass::text, c.relkind::text,
                    (select quote_ident(attname) from pg_attribute where attrelid = c.oid and attnum = 1)
             from pg_class c where c.relnamespace = 'tollgate'::regnamespace and c.relkind not in ('i', 'I', 'c', 't')",
            &[],
        )
        .await?;
    assert!(relations.len() >= 8, "these are not all the relations");
    for row in relations {
        let (relation, kind): (&str, &str) = (row.get(0), row.get(1));
        let column: Option<&str> = row.get(2);
        let column = column.unwrap_or("1");
        let read = [
            format!("select from {relation}"),
            format!("select {column} from {relation}"),
            format!("lock table {relation} in access share mode"),
        ];
        let write = [
            format!("insert into {relation} default values"),
            format!("update {relation} set {column} = default"),
            format!("delete from {relation}"),
            format!("truncate {relation}"),
            format!("copy {relation} to stdout"),
        ];
        let advance = [format!("select nextval('{relation}')"), format!("select setval('{relation}', 1)")];
        let attempts = match kind {
            "S" => [&read[..1], &advance].concat(),
            "v" => read.to_vec(),
            _ => [&read[..], &write].concat(),
        };
        for attempt in attempts {
            let error = error(stranger.batch_execute(&format!("begin; {attempt}")).await);
            assert!(denied(&error), "{attempt}: {error:?}");
            stranger.batch_execute("rollback").await?;
        }
    }

    let granted = "
        select format('%s on %s to %s', a.privilege_type, o.name, coalesce(nullif(a.grantee, 0)::regrole::text, 'public'))
        from (select c.oid::regclass::text, c.relacl, c.relowner from pg_class c
              where c.relnamespace = 'tollgate'::regnamespace
              union all
              select format('%s.%s', c.oid::regclass, t.attname), t.attacl, c.relowner
              from pg_attribute t join pg_class c on c.oid = t.attrelid where c.relnamespace = 'tollgate'::regnamespace
              union all
              select 'the schema', n.nspacl, n.nspowner from pg_namespace n where n.nspname = 'tollgate') o (name, acl, owner),
             aclexplode(o.acl) a
        where a.grantee in (0, $1::text::regrole)
              and (o.name, a.privilege_type, a.grantee) <> ('the schema', 'USAGE', 0)";
    let granted: Vec<String> = owner.query(granted, &[&role]).await?.iter().map(|row| row.get(0)).collect();
    assert!(granted.is_empty(), "granted: {granted:#?}");

    for attempt in [
        "create table tollgate.mine ()",
        "create function tollgate.current_user_id(forged int) returns text language sql as 'select null::text'",
        "create type tollgate.mine as (n int)",
    ] {
        let error = error(stranger.batch_execute(attempt).await);
        assert!(denied(&error), "{attempt}: {error:?}");
    }
    Ok(())
}

#[tokio::test]
async fn a_role_without_grants_is_refused_everything_but_the_public_functions() -> Result<()> {
    let World { owner, cluster, .. } = SHARED.world().await?;
    owner.batch_execute("create role stranger login").await?;
    let stranger = cluster.connect("stranger", DATABASE).await?;
    assert_locked(&owner, &stranger).await?;
    // What is public does work, and so is not merely a name.
    for (question, answer) in
        [("scope_grants('{posts:*}', 'posts:read')", true), ("token_has_scope('posts:read')", false)]
    {
        assert_eq!(value::<bool>(&stranger, &format!("select tollgate.{question}")).await?, answer);
    }
    assert_eq!(common::identity(&stranger).await?, None);
    Ok(())
}

#[tokio::test]
async fn default_privileges_of_the_installing_role_give_nothing_away() -> Result<()> {
    let cluster = SHARED.cluster()?;
    cluster.execute(DATABASE, "create role heir login")?;
    cluster.execute(DATABASE, "create database lavish")?;
    cluster.execute(
        "lavish",
        "alter default privileges grant all on tables to public, heir;
         alter default privileges grant all on sequences to public, heir;
         alter default privileges grant all on functions to public, heir;
         alter default privileges grant all on types to public, heir;
         alter default privileges grant all on schemas to public, heir;
         alter default privileges grant all on tables to heir with grant option;
         create extension tollgate",
    )?;
    let owner = cluster.connect("postgres", "lavish").await?;
    assert_locked(&owner, &cluster.connect("heir", "lavish").await?).await
}

#[tokio::test]
async fn default_privileges_that_take_away_leave_the_public_functions_public() -> Result<()> {
    let cluster = SHARED.cluster()?;
    cluster.execute(DATABASE, "create role pauper login")?;
    cluster.execute(DATABASE, "create database miserly")?;
    cluster.execute(
        "miserly",
        "alter default privileges revoke all on functions from public;
         alter default privileges revoke all on types from public;
         create extension tollgate",
    )?;
    let pauper = cluster.connect("pauper", "miserly").await?;
    assert_eq!(common::identity(&pauper).await?, None);
    assert!(value::<bool>(&pauper, "select tollgate.scope_grants('{admin}', 'a')").await?);
    Ok(())
}

#[tokio::test]
async fn a_grant_on_one_function_is_enough_for_it_and_for_it_alone() -> Result<()> {
    let World { owner, cluster, .. } = SHARED.world().await?;
    owner.batch_execute("create role clerk login").await?;
    let clerk = cluster.connect("clerk", DATABASE).await?;
    clerk.batch_execute("create temporary table clerks_users (id int)").await?;
    let granted: BTreeMap<&str, &str> =
        GRANTED.iter().filter(|(function, _)| !PUBLIC.contains(function)).copied().collect();
    let comments = "select p.oid::regprocedure::text from pg_proc p
        where p.pronamespace = 'tollgate'::regnamespace and obj_description(p.oid, 'pg_proc') not like '%Internal%'";
    let documented: BTreeSet<String> =
        owner.query(comments, &[]).await?.iter().map(|row| row.get(0)).collect();
    let known: BTreeSet<String> =
        granted.keys().chain(&PUBLIC).map(|&function| function.to_owned()).collect();
    assert_eq!(documented, known, "functions that are not internal must be tried here");

    let privileges = "select p.oid::regprocedure::text from pg_proc p
        where p.pronamespace = 'tollgate'::regnamespace and has_function_privilege('clerk', p.oid, 'execute')";
    for (function, call) in GRANTED.iter().filter(|(function, _)| granted.contains_key(function)) {
        let token = issue(&owner, "clerk", &["posts:read"]).await?;
        let call = call.replace("{token}", &token.token).replace("{id}", &token.id.to_string());
        let call = format!("select * from tollgate.{call}");
        refused(clerk.batch_execute(&call).await, &SqlState::INSUFFICIENT_PRIVILEGE);
        owner.batch_execute(&format!("grant execute on function {function} to clerk")).await?;
        let may: BTreeSet<String> =
            owner.query(privileges, &[]).await?.iter().map(|row| row.get(0)).collect();
        let expected = PUBLIC.iter().copied().chain([*function]).map(str::to_owned).collect();
        assert_eq!(may, expected);
        let result = clerk.batch_execute(&call).await;
        if function.contains("revoke_own") {
            refused(result, &SqlState::INVALID_AUTHORIZATION_SPECIFICATION);
        } else {
            result.with_context(|| format!("with the one grant: {call}"))?;
        }
        owner.batch_execute(&format!("revoke execute on function {function} from clerk")).await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_granted_view_shows_no_digest_and_opens_no_table() -> Result<()> {
    let World { owner, cluster, .. } = SHARED.world().await?;
    owner.batch_execute("create role viewer login; grant select on tollgate.tokens to viewer").await?;
    issue(&owner, "viewed", &[]).await?;
    let viewer = cluster.connect("viewer", DATABASE).await?;
    let seen: i64 = value(&viewer, "select count(*) from tollgate.tokens where user_id = 'viewed'").await?;
    assert_eq!(seen, 1);
    refused(viewer.batch_execute("select from tollgate.api_tokens").await, &SqlState::INSUFFICIENT_PRIVILEGE);
    refused(
        viewer.batch_execute("select token_hash from tollgate.tokens").await,
        &SqlState::UNDEFINED_COLUMN,
    );
    Ok(())
}

#[tokio::test]
async fn a_schema_that_somebody_prepared_is_not_adopted() -> Result<()> {
    let cluster = SHARED.cluster()?;
    cluster.execute(DATABASE, "create role squatter login")?;
    cluster.execute(DATABASE, "create database squatted")?;
    cluster.execute(
        "squatted",
        "create schema tollgate authorization squatter;
         set role squatter;
         create table tollgate.api_tokens (mine text);
         create function tollgate.current_user_id() returns text language sql as 'select ''forged''::text'",
    )?;
    let owner = cluster.connect("postgres", "squatted").await?;
    refused(owner.batch_execute("create extension tollgate").await, &SqlState::DUPLICATE_SCHEMA);
    refused(
        owner.batch_execute("create extension tollgate schema tollgate").await,
        &SqlState::FEATURE_NOT_SUPPORTED,
    );
    let left: i64 = value(
        &owner,
        "select (select count(*) from pg_extension where extname = 'tollgate')
              + (select count(*) from pg_class where relnamespace = 'tollgate'::regnamespace and relname <> 'api_tokens')
              + (select count(*) from pg_proc where pronamespace = 'tollgate'::regnamespace and proowner <> 'squatter'::regrole)",
    )
    .await?;
    assert_eq!(left, 0, "something of the extension is there");
    owner.batch_execute("drop schema tollgate cascade; create extension tollgate").await?;
    Ok(())
}

#[tokio::test]
async fn only_a_superuser_installs_it() -> Result<()> {
    let cluster = SHARED.cluster()?;
    cluster.execute(DATABASE, "create role builder login createdb createrole")?;
    cluster.execute(DATABASE, "create database built owner builder")?;
    let builder = cluster.connect("builder", "built").await?;
    refused(builder.batch_execute("create extension tollgate").await, &SqlState::INSUFFICIENT_PRIVILEGE);
    Ok(())
}

#[tokio::test]
async fn the_audit_log_refuses_every_change_even_to_a_superuser() -> Result<()> {
    let World { owner, cluster: _cluster, .. } = SHARED.world().await?;
    let token = issue(&owner, "audited", &[]).await?;
    let content = "select md5(string_agg(a::text, ',' order by id)) from tollgate.audit_log a where user_id = 'audited'";
    let before: String = value(&owner, content).await?;
    for role in ["origin", "replica", "local"] {
        owner.batch_execute(&format!("set session_replication_role = {role}")).await?;
        for change in [
            "update tollgate.audit_log set actor = 'nobody'".to_owned(),
            format!("update tollgate.audit_log set detail = '{{}}' where token_id = '{}'", token.id),
            "update tollgate.audit_log set event = event where false".to_owned(),
            "delete from tollgate.audit_log".to_owned(),
            "delete from only tollgate.audit_log where id = 1".to_owned(),
            "truncate tollgate.audit_log".to_owned(),
            "truncate tollgate.api_tokens, tollgate.audit_log restart identity cascade".to_owned(),
            "merge into tollgate.audit_log a using (values (1)) v (n) on true when matched then delete"
                .to_owned(),
            "insert into tollgate.audit_log (id, event) overriding system value
                 select min(id), 'x' from tollgate.audit_log on conflict (id) do update set event = 'x'"
                .to_owned(),
        ] {
            let error = refused(owner.batch_execute(&change).await, &SqlState::INSUFFICIENT_PRIVILEGE);
            assert!(error.message().contains("append-only"), "{change}: {error:?}");
        }
    }
    owner.batch_execute("reset session_replication_role").await?;
    assert_eq!(value::<String>(&owner, content).await?, before);
    Ok(())
}

#[tokio::test]
async fn every_function_that_runs_as_the_owner_pins_its_search_path() -> Result<()> {
    let World { owner, cluster: _cluster, .. } = SHARED.world().await?;
    let loose = "select p.oid::regprocedure::text from pg_proc p
        where p.pronamespace = 'tollgate'::regnamespace
          and (p.prosecdef or p.prolang <> (select oid from pg_language where lanname = 'c'))
          and p.proconfig is distinct from array['search_path=pg_catalog, pg_temp']";
    let loose = owner.query(loose, &[]).await?;
    assert!(loose.is_empty(), "{:?}", loose.iter().map(|row| row.get(0)).collect::<Vec<String>>());
    Ok(())
}

#[tokio::test]
async fn every_object_says_what_it_is_for() -> Result<()> {
    let World { owner, cluster: _cluster, .. } = SHARED.world().await?;
    let silent = "
        select 'function ' || p.oid::regprocedure from pg_proc p
        where p.pronamespace = 'tollgate'::regnamespace and obj_description(p.oid, 'pg_proc') is null
        union all
        select 'relation ' || c.oid::regclass from pg_class c
        where c.relnamespace = 'tollgate'::regnamespace and c.relkind in ('r', 'v') and obj_description(c.oid, 'pg_class') is null
        union all
        select 'type ' || t.oid::regtype from pg_type t join pg_class c on c.oid = t.typrelid
        where t.typnamespace = 'tollgate'::regnamespace and c.relkind = 'c' and obj_description(t.oid, 'pg_type') is null";
    let silent = owner.query(silent, &[]).await?;
    assert!(silent.is_empty(), "{:?}", silent.iter().map(|row| row.get(0)).collect::<Vec<String>>());
    Ok(())
}

// ---- Hostile surroundings

/// A namesake of each function and each operator of `pg_catalog` that PL/pgSQL can be one of, which raises TRAP1 when it
/// runs. PostgreSQL prefers them wherever `public` stands before `pg_catalog` in the search path.
const TRAPS: &str = r#"
    do $$
    declare
        f record;
    begin
        for f in
            select distinct on (p.proname, p.proargtypes) p.proname,
                   (select string_agg(format_type(t, null), ', ' order by n)
                    from unnest(p.proargtypes) with ordinality a (t, n)) as arguments,
                   format_type(p.prorettype, null) as result, p.proretset
            from pg_catalog.pg_proc p
            where p.pronamespace = 'pg_catalog'::regnamespace and p.prokind <> 'p'
              and not exists (
                  select from unnest(p.proargtypes::oid[]) t join pg_catalog.pg_type y on y.oid = t
                  where y.typtype = 'p' and y.typname not in ('anyelement', 'anyarray', 'anynonarray'))
              and not exists (
                  select from pg_catalog.pg_type y where y.oid = p.prorettype
                  and y.typtype = 'p' and y.typname not in ('anyelement', 'anyarray', 'void', 'record'))
        loop
            begin
                execute format('create function public.%I(%s) returns %s %s language plpgsql as %L',
                    f.proname, f.arguments, case when f.proretset then 'setof' else '' end, f.result,
                    'begin raise exception ''a trap: ' || f.proname || ''' using errcode = ''TRAP1''; end');
            exception when invalid_function_definition or datatype_mismatch then
                -- A polymorphic result that its arguments do not determine.
                null;
            end;
        end loop;
        for f in
            select o.oprname, format_type(nullif(o.oprleft, 0), null) as l, format_type(o.oprright, null) as r,
                   'trap_' || o.oid as name
            from pg_catalog.pg_operator o
            where o.oprnamespace = 'pg_catalog'::regnamespace and o.oprcode <> 0
              and not exists (
                  select from pg_catalog.pg_type y where y.oid in (o.oprleft, o.oprright)
                  and y.typtype = 'p' and y.typname not in ('anyelement', 'anyarray', 'anynonarray'))
        loop
            execute format('create function public.%I(%s) returns boolean language plpgsql as %L', f.name,
                concat_ws(', ', f.l, f.r),
                'begin raise exception ''a trap: operator ' || replace(f.oprname, '%', '%%') || ''' using errcode = ''TRAP1''; end');
            execute format('create operator public.%s (%s rightarg = %s, function = public.%I)', f.oprname,
                'leftarg = ' || f.l || ',', f.r, f.name);
        end loop;
    end $$;
"#;

/// Namesakes of types and tables, in the schema that is named.
fn decoys(schema: &str) -> String {
    let types =
        ["text", "uuid", "jsonb", "bytea", "inet", "cidr", "interval", "timestamptz", "xid8", "regclass"];
    let types = types.iter().map(|name| format!("create type {schema}.{name} as (a_trap int);"));
    let tables = [
        "api_tokens",
        "audit_log",
        "scopes",
        "tokens",
        "token_usage",
        "usage_flushes",
        "subscriptions",
        "daemon_reports",
        "pg_class",
        "pg_extension",
        "pg_proc",
        "pg_namespace",
    ];
    let tables = tables.iter().map(|name| format!("create table {schema}.{name} (a_trap int);"));
    tables.chain(types).collect()
}

#[tokio::test]
async fn hostile_objects_in_public_and_pg_temp_are_never_run_nor_read() -> Result<()> {
    let cluster = SHARED.cluster()?;
    cluster.execute(DATABASE, "create role mallory login")?;
    cluster.execute(DATABASE, "create database hostile")?;
    cluster.execute("hostile", "grant create on schema public to mallory")?;
    cluster.execute("hostile", &format!("set role mallory; {TRAPS} {}", decoys("public")))?;

    // The installation itself, in a session that looks into public first.
    let owner = cluster.connect("postgres", "hostile").await?;
    owner.batch_execute("set search_path = public, pg_catalog; create extension tollgate").await?;
    for (function, _) in GRANTED {
        cluster.execute("hostile", &format!("grant execute on function {function} to mallory"))?;
    }

    for role in ["mallory", "postgres"] {
        let caller = cluster.connect(role, "hostile").await?;
        caller.batch_execute("create temporary table clerks_users (id int)").await?;
        caller.batch_execute(&decoys("pg_temp")).await?;
        caller.batch_execute("set search_path = pg_temp, public, pg_catalog").await?;
        // The traps are set.
        for snapped in
            ["select length('abc'::pg_catalog.text)", "select 'a'::pg_catalog.text = 'b'", "select now()"]
        {
            assert_eq!(error(caller.batch_execute(snapped).await).code().code(), "TRAP1", "{snapped}");
        }
        refused(caller.batch_execute("select id from api_tokens").await, &SqlState::UNDEFINED_COLUMN);

        caller
            .batch_execute(
                "begin;
                 select tollgate.define_scope('posts:read', 'reads'), tollgate.define_scope('posts:write', 'writes');
                 select tollgate.define_scope('posts:read', 'reads posts')",
            )
            .await
            .context("define_scope")?;
        caller.batch_execute("commit").await?;
        for round in 0..2 {
            for (_, call) in GRANTED.iter().filter(|(function, _)| !function.contains("revoke_own")) {
                let issued = caller
                    .simple_query(
                        "select id, token from tollgate.create_api_token('clerk', 'n', '{posts:read}')",
                    )
                    .await?;
                let issued = issued.iter().find_map(|message| match message {
                    tokio_postgres::SimpleQueryMessage::Row(row) => Some((row.get(0)?, row.get(1)?)),
                    _ => None,
                });
                let (id, token) = issued.context("a token")?;
                let call = call.replace("{token}", token).replace("{id}", id);
                caller
                    .batch_execute(&format!("select * from tollgate.{call}"))
                    .await
                    .with_context(|| format!("{role}, round {round}: {call}"))?;
            }
        }
        // Their refusals too.
        for (call, code) in [
            ("authenticate('junk')", SqlState::INVALID_AUTHORIZATION_SPECIFICATION),
            ("create_api_token('', 'n')", SqlState::INVALID_PARAMETER_VALUE),
            ("create_api_token('u', 'n', '{no:such}')", SqlState::INVALID_PARAMETER_VALUE),
            ("define_scope('No', 'd')", SqlState::INVALID_PARAMETER_VALUE),
            ("drop_scope('posts:read')", SqlState::DEPENDENT_OBJECTS_STILL_EXIST),
            ("drop_scope('no:such')", SqlState::UNDEFINED_OBJECT),
            ("require_scope('posts:read')", SqlState::INSUFFICIENT_PRIVILEGE),
            ("revoke_own_api_token(null)", SqlState::INVALID_AUTHORIZATION_SPECIFICATION),
            ("expire_tokens(0)", SqlState::INVALID_PARAMETER_VALUE),
            ("purge_tokens('-1 day')", SqlState::INVALID_PARAMETER_VALUE),
            ("advance_subscription('nobody', 0, '{}')", SqlState::UNDEFINED_OBJECT),
            ("apply_usage(null, null, null, null)", SqlState::INVALID_PARAMETER_VALUE),
        ] {
            refused(caller.batch_execute(&format!("select tollgate.{call}")).await, &code);
        }
        if role == "postgres" {
            let error = error(caller.batch_execute("delete from tollgate.audit_log").await);
            assert!(error.message().contains("append-only"), "{error:?}");
        }
    }
    for table in ["public.api_tokens", "public.audit_log", "public.scopes"] {
        let rows = cluster.value("hostile", &format!("select count(*) from {table}"))?;
        assert_eq!(rows.as_deref(), Some("0"), "{table}");
    }
    Ok(())
}

// ---- What is told to nobody

#[tokio::test]
async fn no_error_and_no_log_line_holds_a_token_or_a_part_of_one() -> Result<()> {
    let cluster = common::start(
        Cluster::builder()
            .setting("log_statement", "none")
            .setting("log_min_error_statement", "panic")
            .setting("log_min_messages", "debug1")
            .setting("log_error_verbosity", "verbose"),
    )?;
    let (owner, mut messages) = cluster.listen("postgres", DATABASE).await?;
    owner.batch_execute("set client_min_messages = debug1").await?;
    let live = issue(&owner, "live", &["posts:read"]).await?;
    let revoked = issue(&owner, "revoked", &[]).await?;
    revoke(&owner, revoked.id).await?;

    let token = live.token.as_str();
    let bearer = format!("Bearer {token}");
    let cut = &token[..token.len() - 1];
    let twice = token.repeat(2);
    let many = token.repeat(12);
    let document = json!([token]);
    let scopes = vec![token];
    let (bearers, cuts) = (vec![bearer.as_str()], vec![cut]);
    let calls: Vec<(&str, Vec<&(dyn ToSql + Sync)>)> = vec![
        ("select tollgate.authenticate($1)::text", vec![&revoked.token]),
        ("select tollgate.authenticate($1)::text", vec![&bearer]),
        ("select tollgate.authenticate($1)::text", vec![&cut]),
        ("select tollgate.authenticate($1, array['posts:write'])::text", vec![&token]),
        ("select tollgate.authenticate($1, $2)::text", vec![&token, &scopes]),
        ("select tollgate.require_scope($1)", vec![&token]),
        ("select tollgate.require_scope($1)", vec![&bearer]),
        ("select tollgate.create_api_token($1, 'n')::text", vec![&many]),
        ("select tollgate.create_api_token('u', $1)::text", vec![&twice]),
        ("select tollgate.create_api_token('u', 'n', $1)::text", vec![&scopes]),
        ("select tollgate.create_api_token('u', 'n', $1)::text", vec![&bearers]),
        ("select tollgate.create_api_token('u', 'n', $1)::text", vec![&cuts]),
        ("select tollgate.create_api_token('u', 'n', metadata => $1)::text", vec![&document]),
        ("select tollgate.create_api_token('u', 'n', prefix => $1)::text", vec![&token]),
        ("select tollgate.define_scope($1, 'd')", vec![&bearer]),
        ("select tollgate.define_scope('a:b', $1)", vec![&many]),
        ("select tollgate.drop_scope($1)", vec![&token]),
        ("select tollgate.drop_scope($1)", vec![&bearer]),
        ("select tollgate.revoke_presented_token($1, $2)", vec![&token, &many]),
        ("select tollgate.revoke_all_api_tokens($1, $2)", vec![&token, &many]),
        ("select tollgate.advance_subscription($1, 0, '{}')", vec![&token]),
        // In a transaction that writes nothing.
        ("read only: select tollgate.revoke_presented_token($1)", vec![&token]),
        ("read only: select tollgate.create_api_token('u', $1)::text", vec![&token]),
    ];
    let mut told = Vec::new();
    for (call, parameters) in &calls {
        let statement = match call.strip_prefix("read only: ") {
            Some(statement) => {
                owner.batch_execute("begin read only").await?;
                statement
            }
            None => call,
        };
        let refusal = error(owner.query(statement, parameters).await);
        told.push(((*call).to_owned(), text_of(&refusal)));
        owner.batch_execute("rollback").await?;
    }
    while let Ok(message) = messages.try_recv() {
        if let AsyncMessage::Notice(notice) = message {
            told.push(("a notice".to_owned(), text_of(&notice)));
        }
    }
    let log = cluster.log();
    assert!(log.contains("the token was refused"), "the log is not where it was looked for:\n{log}");
    told.extend(log.lines().map(|line| ("the log".to_owned(), line.to_owned())));

    let mut parts = BTreeSet::new();
    for secret in [&live.token, &revoked.token] {
        for part in secret.as_bytes().windows(16) {
            parts.insert(std::str::from_utf8(part)?);
        }
    }
    let leaks: Vec<_> =
        told.iter().filter(|(_, text)| parts.iter().any(|part| text.contains(part))).collect();
    assert!(leaks.is_empty(), "{} of {} texts hold a part of a token: {leaks:#?}", leaks.len(), told.len());
    Ok(())
}
