//! Refused access, and the rules for every object. Who may do what is in capabilities.rs, attacks are in attacks.rs.

use crate::calls;
use crate::capabilities::PUBLIC;
use std::collections::{BTreeMap, BTreeSet};

use crate::common::{self, Shared, World, error, issue, refused, value};
use anyhow::{Context as _, Result};
use tokio_postgres::Client;
use tokio_postgres::error::{DbError, SqlState};
use tollgate_tests::DATABASE;

static SHARED: Shared = Shared::new(&[]);

/// Functions of the schema by signature, with a call that passes NULL for each argument: from a sub-select, since the
/// planner would fold a strict function of constants before its privilege is checked.
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

/// Tries everything in the schema as a role without grants.
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
    let heir = cluster.connect("heir", "lavish").await?;
    assert_locked(&owner, &heir).await?;
    // The public functions do work.
    for (question, answer) in
        [("scope_grants('{posts:*}', 'posts:read')", true), ("token_has_scope('posts:read')", false)]
    {
        assert_eq!(value::<bool>(&heir, &format!("select tollgate.{question}")).await?, answer);
    }
    assert_eq!(common::identity(&heir).await?, None);
    Ok(())
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
    owner.batch_execute("create role clerk login; create role colleague login").await?;
    let clerk = cluster.connect("clerk", DATABASE).await?;
    clerk.batch_execute(calls::PREPARATION).await?;
    let calls = calls::all(&owner).await?;
    let granted: BTreeMap<&str, &str> =
        calls.iter().filter(|(function, _)| !PUBLIC.contains(function)).copied().collect();
    let comments = "select p.oid::regprocedure::text from pg_proc p
        where p.pronamespace = 'tollgate'::regnamespace and obj_description(p.oid, 'pg_proc') not like '%Internal%'";
    let documented: BTreeSet<String> =
        owner.query(comments, &[]).await?.iter().map(|row| row.get(0)).collect();
    let known: BTreeSet<String> =
        granted.keys().chain(&PUBLIC).map(|&function| function.to_owned()).collect();
    assert_eq!(documented, known, "functions that are not internal must be tried here");

    let privileges = "select p.oid::regprocedure::text from pg_proc p
        where p.pronamespace = 'tollgate'::regnamespace and has_function_privilege('clerk', p.oid, 'execute')";
    for (function, call) in calls.iter().filter(|(function, _)| granted.contains_key(function)) {
        let token = issue(&owner, "clerk", &["posts:read"]).await?;
        let own = function.contains("revoke_own");
        // The call in the list authenticates first.
        let call = if own { "revoke_own_api_token('{id}')" } else { call };
        let call = calls::filled(call, &token, "colleague");
        refused(clerk.batch_execute(&call).await, &SqlState::INSUFFICIENT_PRIVILEGE);
        owner.batch_execute(&format!("grant execute on function {function} to clerk")).await?;
        let may: BTreeSet<String> =
            owner.query(privileges, &[]).await?.iter().map(|row| row.get(0)).collect();
        let expected = PUBLIC.iter().copied().chain([*function]).map(str::to_owned).collect();
        assert_eq!(may, expected);
        let result = clerk.batch_execute(&call).await;
        if own {
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
            "update tollgate.audit_log set actor = 'forged'".to_owned(),
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
