//! Attacks on code that runs with the owner's rights: hostile objects that shadow names, hostile settings, hostile
//! arguments, and attempts to borrow those rights. Each as the strongest ordinary role, which has every capability.

use crate::calls;
use crate::common::{self, Shared, Token, World, error, refused, value};
use anyhow::{Context as _, Result};
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, SimpleQueryMessage};
use tollgate_tests::{Cluster, DATABASE};

static SHARED: Shared = Shared::new(&[]);

// ---- Names

/// A namesake of each function and operator of `pg_catalog` for which PL/pgSQL allows one. It raises TRAP1 when it
/// runs, and logs it, since a rollback does not undo that. PostgreSQL prefers them where `public` comes before
/// `pg_catalog` in the search path.
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
                    'begin raise log ''sprung''; raise exception ''a trap: ' || f.proname || ''' using errcode = ''TRAP1''; end');
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
                'begin raise log ''sprung''; raise exception ''a trap: operator ' || replace(f.oprname, '%', '%%') || ''' using errcode = ''TRAP1''; end');
            execute format('create operator public.%s (%s rightarg = %s, function = public.%I)', f.oprname,
                'leftarg = ' || f.l || ',', f.r, f.name);
        end loop;
    end $$;
"#;

/// Namesakes of types and tables, in the given schema.
fn decoys(schema: &str) -> String {
    let types = [
        "text",
        "uuid",
        "jsonb",
        "bytea",
        "inet",
        "cidr",
        "interval",
        "timestamptz",
        "xid8",
        "regclass",
        "regrole",
        "oid",
        "regprocedure",
    ];
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
        "capabilities",
        "privilege_decisions",
        "object_privileges",
        "pg_class",
        "pg_extension",
        "pg_proc",
        "pg_namespace",
        "pg_roles",
        "pg_type",
        "pg_init_privs",
        "pg_default_acl",
    ];
    let tables = tables.iter().map(|name| format!("create table {schema}.{name} (a_trap int);"));
    tables.chain(types).collect()
}

/// How often a trap has run so far.
fn sprung(cluster: &Cluster) -> usize {
    cluster.log().lines().filter(|line| line.contains("LOG:  sprung")).count()
}

/// Issues without using any operator or cast of the caller's, which the traps would catch.
async fn issue(client: &Client) -> Result<Token> {
    let issued = client
        .simple_query("select id, token from tollgate.create_api_token('clerk', 'n', '{posts:read}')")
        .await?;
    let issued = issued.iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => Some((row.get(0)?.to_owned(), row.get(1)?.to_owned())),
        _ => None,
    });
    let (id, token) = issued.context("a token")?;
    Ok(Token { id: id.parse()?, token })
}

#[tokio::test]
async fn hostile_objects_are_never_run_nor_read_whatever_the_search_path() -> Result<()> {
    let cluster = common::start(Cluster::builder().extension(true))?;
    cluster.execute(DATABASE, "create role mallory login; create role accomplice login")?;
    cluster.execute(DATABASE, "create database hostile")?;
    cluster.execute(
        "hostile",
        "grant create on schema public to mallory; create schema mallory authorization mallory",
    )?;
    cluster.execute("hostile", &format!("set role mallory; {TRAPS} {}", decoys("public")))?;

    // The installation itself, in a session that searches public first.
    let owner = cluster.connect("postgres", "hostile").await?;
    owner.batch_execute("set search_path = pg_temp, public, pg_catalog; create extension tollgate").await?;
    owner.batch_execute("reset search_path").await?;
    for capability in ["admin", "operator", "key_fetcher", "gateway"] {
        owner.batch_execute(&format!("select tollgate.grant_capability('mallory', '{capability}')")).await?;
    }
    let calls = calls::all(&owner).await?;
    assert_eq!(sprung(&cluster), 0, "while it was installed");

    let mut snapped = 0;
    for role in ["mallory", "postgres"] {
        let caller = cluster.connect(role, "hostile").await?;
        caller.batch_execute(calls::PREPARATION).await?;
        caller
            .batch_execute(
                "create function pg_temp.now() returns pg_catalog.timestamptz language plpgsql
                     as $$ begin raise log 'sprung'; raise exception 'a trap' using errcode = 'TRAP1'; end $$",
            )
            .await?;
        caller.batch_execute(&decoys("pg_temp")).await?;
        caller.batch_execute("set search_path = pg_temp, public, pg_catalog").await?;
        // The traps work.
        for snap in
            ["select length('abc'::pg_catalog.text)", "select 'a'::pg_catalog.text = 'b'", "select now()"]
        {
            assert_eq!(error(caller.batch_execute(snap).await).code().code(), "TRAP1", "{snap}");
            snapped += 1;
        }
        refused(caller.batch_execute("select id from api_tokens").await, &SqlState::UNDEFINED_COLUMN);

        caller
            .batch_execute(
                "select tollgate.define_scope('posts:read', 'reads'), tollgate.define_scope('posts:write', 'writes');
                 select tollgate.define_scope('posts:read', 'reads posts')",
            )
            .await
            .context("define_scope")?;
        for path in [
            "pg_temp, public, pg_catalog",
            "public, pg_catalog, pg_temp",
            "mallory, public, \"$user\", tollgate, pg_catalog",
            "tollgate, pg_temp, public",
            "''",
            "no_such_schema",
            "pg_temp",
        ] {
            caller.batch_execute(&format!("set search_path = {path}")).await?;
            for (_, call) in &calls {
                let simple = calls::filled(call, &issue(&caller).await?, "accomplice");
                caller.batch_execute(&simple).await.with_context(|| format!("{role}, {path}: {simple}"))?;
                // Again in the extended protocol. As text: the client queries the catalogue for types that it does not
                // know, with a statement of its own that would run the trap setter's operators.
                let call_again = calls::filled(call, &issue(&caller).await?, "accomplice");
                let again =
                    caller.query(&format!("select q::pg_catalog.text from ({call_again}) q"), &[]).await;
                if let Err(refusal) = again {
                    let refusal = error::<()>(Err(refusal));
                    // Objects that exist or were dropped already.
                    assert!(
                        [SqlState::DUPLICATE_OBJECT, SqlState::UNDEFINED_OBJECT].contains(refusal.code()),
                        "{role}, {path}: {call}: {refusal:?}"
                    );
                }
            }
        }
        caller.batch_execute("set search_path = pg_temp, public, pg_catalog").await?;
        // Their errors too.
        issue(&caller).await?;
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
            (
                "advance_subscription('unknown', '(00000000-0000-0000-0000-000000000000,1:1:,,,,,)', null)",
                SqlState::UNDEFINED_OBJECT,
            ),
            (
                "read_events('(00000000-0000-0000-0000-000000000001,1:1:,,,,,)')",
                SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE,
            ),
            ("read_events(null)", SqlState::INVALID_PARAMETER_VALUE),
            ("seal_audit_log(0)", SqlState::INVALID_PARAMETER_VALUE),
            ("verify_audit_log(1)", SqlState::INVALID_PARAMETER_VALUE),
            ("purge_audit_log('infinity')", SqlState::INVALID_PARAMETER_VALUE),
            ("apply_usage(null, null, null, null, null)", SqlState::INVALID_PARAMETER_VALUE),
            ("report_daemon(null, null, null, null, null, null)", SqlState::INVALID_PARAMETER_VALUE),
            ("grant_capability('accomplice', 'root')", SqlState::INVALID_PARAMETER_VALUE),
            ("grant_capability('postgres', 'admin')", SqlState::INVALID_PARAMETER_VALUE),
            ("revoke_capability(null, 'admin')", SqlState::INVALID_PARAMETER_VALUE),
        ] {
            refused(caller.batch_execute(&format!("select tollgate.{call}")).await, &code);
        }
        if role == "postgres" {
            let error = error(caller.batch_execute("delete from tollgate.audit_log").await);
            assert!(error.message().contains("append-only"), "{error:?}");
            caller
                .batch_execute("select tollgate.settle_privileges()")
                .await
                .context("what an upgrade does")?;
        }
    }
    assert_eq!(sprung(&cluster), snapped, "traps that were sprung, and those that we sprang ourselves");
    for table in ["public.api_tokens", "public.audit_log", "public.scopes", "public.capabilities"] {
        let rows = cluster.value("hostile", &format!("select count(*) from {table}"))?;
        assert_eq!(rows.as_deref(), Some("0"), "{table}");
    }
    Ok(())
}

#[tokio::test]
async fn a_prepared_schema_is_not_adopted() -> Result<()> {
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

// ---- Settings

/// Settings that any role may change, and that affect how PostgreSQL reads or writes.
const CONTRARY: &str = "
    set standard_conforming_strings = off; set escape_string_warning = off; set backslash_quote = on;
    set quote_all_identifiers = on; set transform_null_equals = on; set array_nulls = off;
    set bytea_output = escape; set datestyle = 'German, DMY'; set intervalstyle = sql_standard; set timezone = 'Asia/Kathmandu';
    set client_encoding = latin1; set row_security = off; set check_function_bodies = off;
    set plpgsql.extra_errors = 'all'; set plpgsql.extra_warnings = 'all'; set plpgsql.check_asserts = off;
    set constraint_exclusion = on; set from_collapse_limit = 1; set plan_cache_mode = force_generic_plan;
    set enable_indexscan = off; set enable_bitmapscan = off; set default_transaction_deferrable = on; set jit = on; set jit_above_cost = 0";

#[tokio::test]
async fn no_setting_of_the_caller_changes_what_a_function_does() -> Result<()> {
    let World { owner, cluster, .. } = SHARED.world().await?;
    owner
        .batch_execute("create role plain login; create role contrarian login; create role confederate login")
        .await?;
    let mut states = Vec::new();
    for (role, settings) in [("plain", ""), ("contrarian", CONTRARY)] {
        let database = format!("of_{role}");
        common::database(&cluster, &database)?;
        let owner = cluster.connect("postgres", &database).await?;
        for capability in ["admin", "operator", "key_fetcher", "gateway"] {
            owner
                .batch_execute(&format!("select tollgate.grant_capability('{role}', '{capability}')"))
                .await?;
        }
        let client = cluster.connect(role, &database).await?;
        client.batch_execute(settings).await?;
        client.batch_execute(calls::PREPARATION).await?;
        for (_, call) in calls::all(&owner).await? {
            let call = calls::filled(call, &issue(&client).await?, "confederate");
            client.batch_execute(&call).await.with_context(|| format!("{role}: {call}"))?;
        }
        // The events, without what differs each time, and the resulting state.
        let log = "select string_agg(concat_ws(' ', event, user_id, detail ->> 'name', array(select jsonb_object_keys(detail) order by 1)), E'\\n' order by id) from tollgate.audit_log";
        let left = "select string_agg(concat_ws(' ', state, capability, objects, role = 'web'), E'\\n' order by capability, state) from tollgate.capability_grants";
        states.push((value::<String>(&owner, log).await?, value::<String>(&owner, left).await?));
    }
    assert!(states[0].0.lines().count() > 30, "{}", states[0].0);
    assert_eq!(states[0], states[1]);
    Ok(())
}

// ---- Arguments

#[tokio::test]
async fn code_of_the_callers_types_runs_with_the_callers_rights() -> Result<()> {
    let World { owner, cluster, .. } = SHARED.world().await?;
    common::database(&cluster, "witnessed")?;
    let owner_here = cluster.connect("postgres", "witnessed").await?;
    owner.batch_execute("create role trudy login").await?;
    owner_here
        .batch_execute(
            "select tollgate.grant_capability('trudy', 'admin'), tollgate.grant_capability('trudy', 'operator');
             create schema trudy authorization trudy",
        )
        .await?;
    let trudy = cluster.connect("trudy", "witnessed").await?;
    trudy
        .batch_execute(
            "create function trudy.witness() returns boolean language plpgsql volatile as $$
             begin
                 raise log 'witness: % as %', coalesce(current_setting('application_name'), ''), current_user;
                 return true;
             end $$;
             create domain trudy.words as text check (trudy.witness());
             create domain trudy.lists as text[] check (trudy.witness());
             create domain trudy.documents as jsonb check (trudy.witness());
             create domain trudy.addresses as inet check (trudy.witness());
             create type trudy.thing as (n int);
             create function trudy.to_text(trudy.thing) returns text language plpgsql as $$ begin perform trudy.witness(); return 'thing:x'; end $$;
             create function trudy.to_uuid(trudy.thing) returns uuid language plpgsql as $$ begin perform trudy.witness(); return '00000000-0000-0000-0000-000000000003'; end $$;
             create function trudy.to_role(trudy.thing) returns regrole language plpgsql as $$ begin perform trudy.witness(); return 'trudy'::regrole; end $$;
             create function trudy.to_usage(trudy.thing) returns tollgate.usage_row language plpgsql as $$ begin perform trudy.witness(); return null; end $$;
             create cast (trudy.thing as text) with function trudy.to_text as implicit;
             create cast (trudy.thing as uuid) with function trudy.to_uuid as implicit;
             create cast (trudy.thing as regrole) with function trudy.to_role as implicit;
             create cast (trudy.thing as tollgate.usage_row) with function trudy.to_usage as implicit;
             create table trudy.kept (id uuid default '00000000-0000-0000-0000-000000000004', note text default trudy.witness()::text);
             create function trudy.on_insert() returns trigger language plpgsql as $$ begin perform trudy.witness(); return new; end $$;
             create trigger on_insert before insert on trudy.kept for each row execute function trudy.on_insert();
             alter table trudy.kept enable row level security;
             alter table trudy.kept force row level security;
             create policy all_of_them on trudy.kept using (trudy.witness()) with check (trudy.witness());
             create view trudy.listing as select t.name, trudy.witness() from tollgate.list_api_tokens('clerk') t;
             create function trudy.wrapped(name text default trudy.witness()::text) returns text language sql
                 as $$ select t.token from tollgate.create_api_token('clerk', name) t where trudy.witness() $$",
        )
        .await?;
    let attacks = [
        "select tollgate.define_scope('a:b'::trudy.words, 'c'::trudy.words)",
        "select tollgate.define_scope(row(1)::trudy.thing, row(1)::trudy.thing)",
        "select tollgate.create_api_token('clerk'::trudy.words, 'n'::trudy.words, '{a:b}'::trudy.lists, metadata => '{}'::trudy.documents)",
        "select tollgate.verify_api_token('x'::trudy.words, '{a:b}'::trudy.lists, '10.0.0.1'::trudy.addresses)",
        "select tollgate.revoke_api_token(row(1)::trudy.thing, row(1)::trudy.thing, row(1)::trudy.thing)",
        "select tollgate.revoke_all_api_tokens(row(1)::trudy.thing)",
        "select tollgate.list_api_tokens(row(1)::trudy.thing)",
        "select tollgate.grant_capability(row(1)::trudy.thing, 'verifier'::trudy.words)",
        "select tollgate.apply_usage('n'::trudy.words, row(1)::trudy.thing, 1, array[row(1)::trudy.thing::tollgate.usage_row], '')",
        "select tollgate.report_daemon(row(1)::trudy.thing, 'h'::trudy.words, 1, 'v'::trudy.words, '2020-01-01', '{}'::trudy.documents)",
        "insert into trudy.kept (id) select id from tollgate.create_api_token('clerk', 'kept')",
        "select * from trudy.listing",
        "select trudy.wrapped()",
        "select tollgate.token_has_scope('a:b'::trudy.words)",
    ];
    for (n, attack) in attacks.iter().enumerate() {
        trudy.batch_execute(&format!("set application_name = 'attack {n}.'")).await?;
        let result = trudy.batch_execute(attack).await;
        // Its arguments have been evaluated by then.
        if attack.contains("apply_usage") {
            refused(result, &SqlState::INVALID_PARAMETER_VALUE);
        } else {
            result.with_context(|| (*attack).to_owned())?;
        }
        let log = cluster.log();
        let ran: Vec<&str> =
            log.lines().filter(|line| line.contains(&format!("witness: attack {n}. as "))).collect();
        assert!(!ran.is_empty(), "its code did not run: {attack}");
        assert!(ran.iter().all(|line| line.ends_with(" as trudy")), "{attack}: {ran:?}");
    }
    Ok(())
}

// ---- Borrowed rights

/// Attempts of an ordinary role on objects that it does not own.
const TRESPASSES: &[&str] = &[
    "create trigger t before insert on tollgate.api_tokens execute function eve.on_change()",
    "create rule r as on insert to tollgate.audit_log do also select eve.witness()",
    "create policy p on tollgate.api_tokens using (eve.witness())",
    "create index on tollgate.api_tokens ((eve.witness()))",
    "create statistics eve.s on user_id, name from tollgate.api_tokens",
    "create table eve.child () inherits (tollgate.api_tokens)",
    "create table eve.pointing (id uuid references tollgate.api_tokens)",
    "create publication all_of_it for table tollgate.api_tokens",
    "create event trigger e on ddl_command_end execute function eve.on_ddl()",
    "create or replace function tollgate.current_user_id() returns text language sql as 'select ''forged''::text'",
    "create function tollgate.current_user_id(text) returns text language sql as 'select ''forged''::text'",
    "create operator tollgate.= (leftarg = text, rightarg = text, function = eve.same)",
    "create cast (text as tollgate.verification) with function eve.forge(text)",
    "create function eve.forge_row(text) returns tollgate.memory_stats language sql as 'select null::tollgate.memory_stats'",
    "alter function tollgate.authenticate(text, text[], inet) reset all",
    "alter function tollgate.create_api_token security invoker",
    "alter function tollgate.create_api_token set search_path = eve",
    "alter function tollgate.create_api_token owner to eve",
    "alter table tollgate.audit_log disable trigger append_only",
    "alter table tollgate.capabilities disable trigger all",
    "alter type tollgate.verification add attribute more text",
    "alter schema tollgate rename to gone",
    "alter extension tollgate add function eve.witness()",
    "alter extension tollgate update",
    "alter default privileges for role postgres grant all on tables to eve",
    "drop extension tollgate cascade",
    "drop function tollgate.authenticate(text, text[], inet) cascade",
    "comment on function tollgate.stats() is 'mine'",
    "grant all on tollgate.api_tokens to eve",
    "grant execute on function tollgate.notify_token_event to eve",
    "insert into tollgate.capabilities (role, capability) values ('eve', 'admin')",
    "select setval('tollgate.audit_log_id_seq', 1)",
    "copy tollgate.api_tokens to stdout",
    "lock table tollgate.capabilities",
    "alter role postgres set log_parameter_max_length = 0",
    "alter role eve superuser",
    "set session authorization postgres",
    "set role postgres",
];

#[tokio::test]
async fn the_owners_rights_cannot_be_borrowed() -> Result<()> {
    let World { owner, cluster, .. } = SHARED.world().await?;
    common::database(&cluster, "borrowed")?;
    let owner_here = cluster.connect("postgres", "borrowed").await?;
    owner.batch_execute("create role eve login; create role victim login").await?;
    owner_here
        .batch_execute(
            "grant create on database borrowed to eve; create schema eve authorization eve; grant usage on schema eve to public;
             select tollgate.grant_capability('eve', 'admin'), tollgate.grant_capability('eve', 'operator'),
                    tollgate.grant_capability('victim', 'admin')",
        )
        .await?;
    let eve = cluster.connect("eve", "borrowed").await?;
    eve.batch_execute(
        "create function eve.witness() returns boolean language sql immutable as 'select true';
         create function eve.same(text, text) returns boolean language sql immutable as 'select true';
         create function eve.forge(text) returns tollgate.verification language sql as 'select null::tollgate.verification';
         create function eve.on_change() returns trigger language plpgsql as $$ begin return new; end $$;
         create function eve.on_ddl() returns event_trigger language plpgsql as $$ begin null; end $$;
         create table eve.capabilities (role text, role_oid oid, capability text)",
    )
    .await?;
    let state = "select md5(string_agg(o::text, ',' order by o::text)) from (
        select p::text from pg_proc p where pronamespace = 'tollgate'::regnamespace
        union all select c::text from (select oid, relname, relowner, relacl, relkind, relhasrules, relhastriggers, relrowsecurity from pg_class
                                       where relnamespace = 'tollgate'::regnamespace) c
        union all select a::text from pg_attribute a join pg_class c on c.oid = a.attrelid where c.relnamespace = 'tollgate'::regnamespace
        union all select t::text from pg_trigger t join pg_class c on c.oid = t.tgrelid where c.relnamespace = 'tollgate'::regnamespace
        union all select n::text from pg_namespace n where nspname = 'tollgate'
        union all select r::text from pg_roles r where rolname in ('eve', 'victim', 'postgres')
        union all select s::text from pg_db_role_setting s where setrole = 'postgres'::regrole
        union all select e::text from pg_extension e union all select c::text from tollgate.capabilities c) o (o)";
    let before: String = value(&owner_here, state).await?;

    for trespass in TRESPASSES {
        let refusal = error(eve.batch_execute(&format!("begin; {trespass}")).await);
        let refused =
            [SqlState::INSUFFICIENT_PRIVILEGE, SqlState::INVALID_PARAMETER_VALUE].contains(refusal.code());
        assert!(refused, "{trespass}: {refusal:?}");
        eve.batch_execute("rollback").await?;
    }
    // A role can pass on only what it was granted with that right: these warn, and do nothing.
    eve.batch_execute(
        "grant execute on function tollgate.create_api_token to public; grant select on tollgate.tokens to public;
         grant usage on schema tollgate to public with grant option",
    )
    .await
    .or_else(|error| if error.code() == Some(&SqlState::INVALID_GRANT_OPERATION) { Ok(()) } else { Err(error) })?;

    // Our triggers on her tables.
    let functions = owner_here
        .query(
            "select p.oid::regprocedure::text from pg_proc p
             where p.pronamespace = 'tollgate'::regnamespace and p.prorettype = 'trigger'::regtype",
            &[],
        )
        .await?;
    assert!(functions.len() >= 3, "these are not all");
    for function in functions {
        let function: &str = function.get(0);
        for timing in ["before insert", "after insert"] {
            let statement = format!(
                "create trigger t {timing} on eve.capabilities for each row execute function {function}"
            );
            refused(eve.batch_execute(&statement).await, &SqlState::INSUFFICIENT_PRIVILEGE);
        }
    }
    assert_eq!(value::<String>(&owner_here, state).await?, before, "something of ours has changed");

    // Objects that she creates on top of ours run with her rights, whichever role uses them, and she has none any more.
    eve.batch_execute(
        "create view eve.tokens as select * from tollgate.tokens;
         create function eve.issue() returns text language sql security definer as $$ select token from tollgate.create_api_token('v', 'n') $$;
         create function eve.scopes() returns bigint language sql security definer as $$ select count(*) from tollgate.stats() $$;
         grant select on eve.tokens to victim",
    )
    .await?;
    let refusal = error(
        eve.batch_execute(
            "create view eve.digests as select * from tollgate.api_tokens; select * from eve.digests",
        )
        .await,
    );
    assert_eq!(refusal.code(), &SqlState::INSUFFICIENT_PRIVILEGE);
    owner_here
        .batch_execute("select tollgate.revoke_capability('eve', 'admin'), tollgate.revoke_capability('eve', 'operator')")
        .await?;
    let victim = cluster.connect("victim", "borrowed").await?;
    for client in [&eve, &victim] {
        for borrowed in ["select * from eve.tokens", "select eve.issue()", "select eve.scopes()"] {
            refused(client.batch_execute(borrowed).await, &SqlState::INSUFFICIENT_PRIVILEGE);
        }
    }
    Ok(())
}

#[tokio::test]
async fn the_owner_of_a_users_table_can_run_nothing_with_the_extension_owners_rights() -> Result<()> {
    let World { owner, cluster, .. } = SHARED.world().await?;
    common::database(&cluster, "attached")?;
    let owner_here = cluster.connect("postgres", "attached").await?;
    owner.batch_execute("create role landlord login").await?;
    owner_here
        .batch_execute(
            "select tollgate.grant_capability('landlord', 'admin');
             create schema landlord authorization landlord",
        )
        .await?;
    let landlord = cluster.connect("landlord", "attached").await?;
    landlord
        .batch_execute(
            "create table landlord.whole (id text, note text);
             create table landlord.parted (id text, note text) partition by list (id);
             create table landlord.part partition of landlord.parted default;
             select tollgate.attach_users_table('landlord.whole', 'id'), tollgate.attach_users_table('landlord.parted', 'id');
             create function landlord.evil(n int) returns int language plpgsql immutable
                 as $$ begin raise log 'evil as %', current_user; return 1; end $$;
             create function landlord.evil_too(text) returns boolean language plpgsql immutable
                 as $$ begin raise log 'evil as %', current_user; return true; end $$;
             create index on landlord.whole ((landlord.evil(1)));
             create index on landlord.whole (note) where landlord.evil(2) = 1;
             alter table landlord.whole add check (landlord.evil(3) = 1);
             create index on landlord.parted ((landlord.evil(4)));
             alter table landlord.part add check (landlord.evil(5) = 1);
             create table landlord.child () inherits (landlord.whole);
             create index on landlord.child ((landlord.evil(6)));
             create statistics landlord.s on (landlord.evil_too(note)), id from landlord.whole;
             insert into landlord.whole values ('ann', ''), ('ben', ''), ('cid', ''), ('ann', '');
             insert into landlord.parted values ('dan', ''), ('eve', ''), ('fay', '');
             analyze landlord.whole;
             alter table landlord.whole enable row level security; alter table landlord.whole force row level security;
             create policy p on landlord.whole using (landlord.evil_too(id));
             set constraint_exclusion = on",
        )
        .await?;
    let mut tokens = Vec::new();
    for user in ["ann", "ben", "cid", "dan", "eve", "fay"] {
        tokens.push((user, common::issue(&landlord, user, &[]).await?.token));
    }
    for (change, departed) in [
        (
            "delete from landlord.whole where ctid = (select min(ctid) from landlord.whole where id = 'ann')",
            "",
        ),
        ("delete from landlord.whole where id = 'ann'", "ann"),
        ("update landlord.whole set id = 'zoe' where id = 'ben'", "ben"),
        ("delete from landlord.part where id = 'dan'", "dan"),
        ("update landlord.parted set id = 'zoe' where id = 'eve'", "eve"),
        ("truncate landlord.whole", "cid"),
        ("truncate landlord.parted", "fay"),
    ] {
        landlord.batch_execute(change).await.with_context(|| change.to_owned())?;
        tokens.retain(|(user, _)| *user != departed);
        for (user, token) in &tokens {
            assert_eq!(common::code(&landlord, token).await?, "VALID", "{user}, after {change}");
        }
        let live: i64 =
            value(&owner_here, "select count(*) from tollgate.tokens where status = 'active'").await?;
        assert_eq!(usize::try_from(live)?, tokens.len(), "after {change}");
    }
    let log = cluster.log();
    let ran: Vec<&str> = log.lines().filter(|line| line.contains("LOG:  evil as ")).collect();
    assert!(!ran.is_empty(), "none of it was run at all");
    assert!(ran.iter().all(|line| line.ends_with("evil as landlord")), "{ran:#?}");
    Ok(())
}

#[tokio::test]
async fn expressions_of_a_users_table_run_as_its_owner_and_leave_no_setting_behind() -> Result<()> {
    let World { owner, cluster, .. } = SHARED.world().await?;
    common::database(&cluster, "evaluated")?;
    let owner_here = cluster.connect("postgres", "evaluated").await?;
    owner.batch_execute("create role squire login; create role issuer login").await?;
    owner_here
        .batch_execute(
            "select tollgate.grant_capability('squire', 'admin'), tollgate.grant_capability('issuer', 'issuer');
             create schema squire authorization squire; grant create, usage on schema public to squire",
        )
        .await?;
    let squire = cluster.connect("squire", "evaluated").await?;
    let issuer = cluster.connect("issuer", "evaluated").await?;
    squire
        .batch_execute(
            "create function squire.evil(text) returns boolean language plpgsql immutable as $$
             declare setting record;
             begin
                 raise log 'wicked as %, %', current_user, session_user;
                 for setting in select * from (values ('search_path', 'squire'), ('work_mem', '64kB'), ('lock_timeout', '1min'), ('role', 'postgres'), ('role', 'none'), ('session_authorization', 'postgres'),
                                                     ('session_replication_role', 'replica'), ('tollgate.max_tokens_per_user', '1')) s (name, value)
                 loop
                     begin
                         perform set_config(setting.name, setting.value, false);
                         if setting.name <> all ('{search_path,work_mem,lock_timeout}') then raise log 'wicked and has set %', setting.name; end if;
                     exception when others then
                         null;
                     end;
                 end loop;
                 begin
                     execute 'create temporary table caught ()';
                     raise log 'wicked and has made a table';
                 exception when others then
                     null;
                 end;
                 return true;
             end $$;
             create domain squire.word as text check (squire.evil(value));
             create table squire.users (
                 id text primary key, word squire.word, computed text generated always as (squire.evil(word)::text) stored,
                 check (squire.evil(id)));
             create index on squire.users ((squire.evil(word)));
             create unique index on squire.users (id) where squire.evil(id);
             insert into squire.users values ('ann', 'x'), ('ben', 'x'), ('cid', 'x'), ('dan', 'x');
             alter table squire.users enable row level security; alter table squire.users force row level security;
             create policy p on squire.users using (squire.evil(id));
             -- What an unqualified name would find, were it looked for in the caller's search path.
             create function public.evil_equals(text, text) returns boolean language sql immutable as 'select squire.evil($1)';
             create operator public.= (leftarg = text, rightarg = text, procedure = public.evil_equals);
             create function public.starts_with(text, text) returns boolean language sql immutable as 'select squire.evil($1)';
             -- A condition is read, too: a literal of an array of a domain has the domain's check run.
             select tollgate.attach_users_table('squire.users', 'id',
                 active => $$squire.evil(id) and word <> all ('{y}'::squire.word[])$$)",
        )
        .await?;
    // The settings of other sessions are theirs.
    issuer.batch_execute("set search_path = public, pg_catalog; set lock_timeout = '1h'").await?;
    let settings = "select pg_catalog.concat_ws(', ', pg_catalog.current_setting('search_path'), pg_catalog.current_setting('work_mem'),
        pg_catalog.current_setting('role'), pg_catalog.current_setting('lock_timeout'), current_user)";
    for session in [&issuer, &owner_here] {
        let before: String = value(session, settings).await?;
        let token = common::issue(session, "ann", &[]).await?;
        session
            .batch_execute(&format!(
                "select pg_catalog.count(tollgate.import_api_token('ben', 'n', pg_catalog.sha256('{0}')));
                 select pg_catalog.count(tollgate.derive_api_token('{1}', 'n', '{{}}', null));
                 select pg_catalog.count(tollgate.rotate_api_token('{0}'))",
                token.id, token.token
            ))
            .await?;
        refused(
            session.batch_execute("select tollgate.create_api_token('zoe', 'n')").await,
            &SqlState::FOREIGN_KEY_VIOLATION,
        );
        assert_eq!(value::<String>(session, settings).await?, before);
    }
    // The extension's owner changes users, too, and attaches another role's table.
    owner_here
        .batch_execute(
            "alter table squire.users no force row level security;
             select tollgate.attach_users_table('squire.users', 'id', on_inactive => 'revoke')",
        )
        .await?;
    for change in ["delete from squire.users where id = 'ann'", "truncate squire.users"] {
        squire.batch_execute(change).await.with_context(|| change)?;
    }
    let live: i64 =
        value(&owner_here, "select count(*) from tollgate.tokens where status = 'active'").await?;
    assert_eq!(live, 0);
    let log = cluster.log();
    let ran: Vec<&str> = log.lines().filter(|line| line.contains("LOG:  wicked ")).collect();
    assert!(ran.iter().any(|line| line.contains("wicked as squire, issuer")), "{ran:#?}");
    // In a session of their own they may set anything.
    let harmful: Vec<_> = ran
        .iter()
        .filter(|line| match line.contains("wicked as ") {
            true => !line.contains("wicked as squire, "),
            false => !line.contains("squire@evaluated"),
        })
        .collect();
    assert!(harmful.is_empty(), "{harmful:#?}");
    Ok(())
}
