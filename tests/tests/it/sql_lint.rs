//! The rules for every object of the extension, read from the catalogue after installing it. `make lint` runs this
//! alone.

use std::sync::Arc;

use anyhow::Result;
use tollgate_tests::{Cluster, DATABASE};

use crate::common::Shared;

static SHARED: Shared = Shared::new(&[]);

/// Tables that a dump leaves out: their content applies to this cluster only.
const NOT_DUMPED: &[&str] = &[
    "carrying_secret",
    "daemon_reports",
    "housekeeping_cursors",
    "leaderships",
    "token_slots",
    "usage_flushes",
    "webhook_backlogs",
];

/// The extension's functions.
const FUNCTIONS: &str = "
    select pg_catalog.regexp_replace(f.oid::pg_catalog.regprocedure::text, '^tollgate\\.', '') as name, f.*, l.lanname
      from pg_catalog.pg_depend as d
      join pg_catalog.pg_extension as e on e.oid = d.refobjid and e.extname = 'tollgate'
      join pg_catalog.pg_proc as f on f.oid = d.objid
      join pg_catalog.pg_language as l on l.oid = f.prolang
     where d.classid = 'pg_catalog.pg_proc'::pg_catalog.regclass and d.deptype = 'e'";

/// The names that a query returns, in order.
async fn names(query: &str) -> Result<(Arc<Cluster>, Vec<String>)> {
    let cluster = SHARED.cluster()?;
    let client = cluster.connect("postgres", DATABASE).await?;
    let rows = client.query(query, &[]).await?;
    let mut names: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
    names.sort();
    Ok((cluster, names))
}

/// A query must return no objects, but must look at some.
async fn none(query: &str, what_is_wrong: &str) -> Result<()> {
    let (_, offenders) = names(query).await?;
    assert!(offenders.is_empty(), "{what_is_wrong}: {offenders:#?}");
    Ok(())
}

#[tokio::test]
async fn every_object_has_a_comment() -> Result<()> {
    none(
        // Excludes the types that belong to a table or another type, and the sequences of serial columns.
        "select pg_catalog.pg_describe_object(d.classid, d.objid, d.objsubid)
           from pg_catalog.pg_depend as d
           join pg_catalog.pg_extension as e on e.oid = d.refobjid and e.extname = 'tollgate'
           left join pg_catalog.pg_type as t on d.classid = 'pg_catalog.pg_type'::pg_catalog.regclass and t.oid = d.objid
           left join pg_catalog.pg_class as r on r.oid = t.typrelid
           left join pg_catalog.pg_class as s on d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass and s.oid = d.objid
          where d.deptype = 'e'
            and coalesce(t.typcategory, '') <> 'A'
            and coalesce(r.relkind, 'c') = 'c'
            and coalesce(s.relkind, 'r') <> 'S'
            and not exists (select from pg_catalog.pg_description as c
                             where (c.classoid, c.objoid, c.objsubid) = (d.classid, d.objid, d.objsubid))",
        "objects without a comment",
    )
    .await
}

#[tokio::test]
async fn everyone_may_use_the_schema_and_only_the_owner_creates_in_it() -> Result<()> {
    let (_, grants) = names(
        "select pg_catalog.concat_ws(' ', case acl.grantee when 0 then 'PUBLIC' else acl.grantee::pg_catalog.regrole::text end, acl.privilege_type)
           from pg_catalog.pg_namespace as n, pg_catalog.aclexplode(n.nspacl) as acl
          where n.nspname = 'tollgate' and acl.grantee is distinct from n.nspowner",
    )
    .await?;
    assert_eq!(grants, ["PUBLIC USAGE"]);
    Ok(())
}

#[tokio::test]
async fn every_function_that_runs_as_the_owner_or_is_written_in_sql_pins_its_search_path() -> Result<()> {
    none(
        &format!(
            "select name from ({FUNCTIONS}) as f
              where (prosecdef or lanname <> 'c')
                and not coalesce(proconfig @> array['search_path=pg_catalog, pg_temp'], false)"
        ),
        "functions without SET search_path = pg_catalog, pg_temp",
    )
    .await
}

/// `enable_sort = off` and similar settings add ten billion to a plan's estimated cost, so no plan is too cheap for JIT then.
#[tokio::test]
async fn a_function_that_restricts_the_planner_is_not_compiled_for_each_call() -> Result<()> {
    none(
        &format!(
            "select name from ({FUNCTIONS}) as f
              where proconfig::text ~ 'enable_' and not coalesce(proconfig @> array['jit=off'], false)"
        ),
        "functions with SET enable_… = off and without SET jit = off",
    )
    .await
}

#[tokio::test]
async fn no_function_finds_its_objects_through_the_callers_search_path() -> Result<()> {
    none(
        &format!(
            "select name from ({FUNCTIONS}) as f
               join pg_catalog.pg_language as l on l.oid = f.prolang
              where l.lanname in ('sql', 'plpgsql') and f.prosqlbody is null
                and not coalesce(proconfig @> array['search_path=pg_catalog, pg_temp'], false)"
        ),
        "functions that neither pin search_path nor have a body bound at creation (BEGIN ATOMIC)",
    )
    .await
}

/// Newer minor releases of PostgreSQL refuse to add a column to a table (0A000) whose row a stored expression is given, so
/// an upgrade of the extension could not.
#[tokio::test]
async fn no_function_with_a_bound_body_takes_a_row_of_a_table() -> Result<()> {
    none(
        &format!(
            "select name from ({FUNCTIONS}) as f
              where f.prosqlbody is not null
                and exists (select from pg_catalog.unnest(f.proargtypes) as argument (type)
                              join pg_catalog.pg_type as t on t.oid = argument.type
                              join pg_catalog.pg_class as c on c.relkind in ('r', 'p') and c.reltype in (t.oid, t.typelem))"
        ),
        "functions with a body bound at creation (BEGIN ATOMIC) that take a row of a table",
    )
    .await
}

#[tokio::test]
async fn every_argument_of_every_function_has_a_name() -> Result<()> {
    none(
        &format!(
            "select name from ({FUNCTIONS}) as f
              where pronargs > 0 and (proargnames is null or '' = any (proargnames[1:pronargs]))"
        ),
        "functions with arguments that cannot be given by name",
    )
    .await
}

#[tokio::test]
async fn a_dump_includes_every_table_except_those_about_this_cluster() -> Result<()> {
    let (_, left_out) = names(
        "select r.relname::text
           from pg_catalog.pg_class as r
          where r.relnamespace = 'tollgate'::pg_catalog.regnamespace and r.relkind in ('r', 'S')
            and r.oid not in (select pg_catalog.unnest(e.extconfig)
                                from pg_catalog.pg_extension as e where e.extname = 'tollgate')",
    )
    .await?;
    assert_eq!(left_out, NOT_DUMPED);
    Ok(())
}

#[tokio::test]
async fn everything_is_in_our_schema() -> Result<()> {
    none(
        "select pg_catalog.pg_describe_object(d.classid, d.objid, d.objsubid)
           from pg_catalog.pg_depend as d
           join pg_catalog.pg_extension as e on e.oid = d.refobjid and e.extname = 'tollgate',
                pg_catalog.pg_identify_object(d.classid, d.objid, d.objsubid) as o
          where d.deptype = 'e' and o.type <> 'schema' and o.schema is distinct from 'tollgate'",
        "objects outside the schema tollgate",
    )
    .await
}
