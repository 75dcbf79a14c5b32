//! Issuing inserts its rows without a statement. That what it stores is what a statement stores, and that whatever somebody
//! puts on the tables holds all the same.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Result;
use common::{Shared, code, database, issue, issue_with, refused, value};
use serde_json::Value;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use tollgate_tests::Cluster;

static SHARED: Shared = Shared::new(&[]);

/// Two sessions in a database of the test's own: one that issues, one that changes the tables.
async fn sessions(name: &str) -> Result<(Client, Client, Arc<Cluster>)> {
    let cluster = SHARED.cluster()?;
    database(&cluster, name)?;
    let issuer = cluster.connect("postgres", name).await?;
    issuer.batch_execute("set track_functions = 'all'").await?;
    let other = cluster.connect("postgres", name).await?;
    Ok((issuer, other, cluster))
}

/// Issues a token and says whether it took a statement: only that asks a function for the epoch.
async fn issues_by_statement(issuer: &Client, arguments: &str) -> Result<bool> {
    let calls =
        "select coalesce(pg_stat_get_xact_function_calls('tollgate.current_epoch()'::regprocedure), 0)";
    issuer.batch_execute("begin").await?;
    let before: i64 = value(issuer, calls).await?;
    issue_with(issuer, "direct", arguments).await?;
    let after: i64 = value(issuer, calls).await?;
    issuer.batch_execute("commit").await?;
    Ok(after > before)
}

#[tokio::test]
async fn the_rows_are_those_that_a_statement_inserts() -> Result<()> {
    let (issuer, other, _cluster) = sessions("the_rows").await?;
    let rows = "
        select jsonb_build_array(
            to_jsonb(t) - '{id,token_hash,hint,created_at,expires_at}'::text[],
            t.created_at = now(), t.expires_at - clock_timestamp() between '29 days 23 hours' and '30 days',
            to_jsonb(a) - '{id,xid,at,token_id,detail}'::text[], a.detail - '{hint,expires_at}'::text[],
            a.detail ? 'expires_at', a.detail -> 'expires_at' is not distinct from to_jsonb(t.expires_at),
            a.detail ->> 'hint' = t.hint, a.xid = pg_current_xact_id(), clock_timestamp() - a.at < '1 minute',
            a.id = currval('tollgate.audit_log_id_seq'))
        from tollgate.api_tokens t join tollgate.audit_log a on a.token_id = t.id where t.id = ";
    let many = format!("metadata => '{{\"text\": \"{}\"}}'", "0123456789 ".repeat(1000));
    let cases = [
        "scopes => '{}'",
        "scopes => '{posts:read,posts:*,admin}', expires_in => '30 days'",
        "rate_limit => 10, rate_window => '02:03:04.5'",
        "rate_limit => null, rate_window => '1 day'",
        "allowed_ips => '{10.0.0.0/8,192.0.2.1,2001:db8::/32}', metadata => '{\"a\": [1, null, \"ü\"]}'",
        many.as_str(),
    ];
    other
        .batch_execute("create function pass() returns trigger language plpgsql as 'begin return new; end'")
        .await?;
    for setting in ["set timezone = 'Asia/Kathmandu'", "set intervalstyle = 'iso_8601'"] {
        issuer.batch_execute(setting).await?;
        let mut stored: [Vec<Value>; 2] = Default::default();
        for by_statement in [false, true] {
            if by_statement {
                other
                    .batch_execute("create trigger pass before insert on tollgate.audit_log for each row execute function pass()")
                    .await?;
            }
            for case in cases {
                assert_eq!(issues_by_statement(&issuer, case).await?, by_statement, "{case}");
                issuer.batch_execute("begin").await?;
                let token = issue_with(&issuer, "ü\"direct\\", case).await?;
                stored[usize::from(by_statement)]
                    .push(value(&issuer, &format!("{rows}'{}'", token.id)).await?);
                issuer.batch_execute("commit").await?;
                assert_eq!(
                    code(&other, &token.token).await?.as_str(),
                    if case.contains("allowed") { "IP_NOT_ALLOWED" } else { "VALID" }
                );
            }
        }
        assert_eq!(stored[0], stored[1]);
        for told in &stored[0] {
            assert_eq!(told[5].as_bool(), Some(told[2].is_boolean()), "{told}");
            assert!([1, 6, 7, 8, 9, 10].iter().all(|&i| told[i] == Value::Bool(true)), "{told}");
        }
        other.batch_execute("drop trigger pass on tollgate.audit_log").await?;
    }
    Ok(())
}

#[tokio::test]
async fn whatever_somebody_adds_to_the_tables_holds_at_once() -> Result<()> {
    let (issuer, other, _cluster) = sessions("whatever").await?;
    let plain = "scopes => '{}'";
    other
        .batch_execute(
            "create table seen (what text);
             create function see() returns trigger language plpgsql
                 as 'begin insert into public.seen values (tg_name); return new; end';
             create function allowed(text) returns boolean immutable language sql as 'select true'",
        )
        .await?;
    for (table, column) in [("api_tokens", "user_id"), ("audit_log", "user_id")] {
        assert!(!issues_by_statement(&issuer, plain).await?);

        // A constraint, which needs no statement, and again when the function that it calls becomes another.
        let constraint =
            format!("alter table tollgate.{table} add constraint added check (allowed({column}))");
        other.batch_execute(&constraint).await?;
        assert!(!issues_by_statement(&issuer, plain).await?);
        let replace = |body: &str| {
            format!(
                "create or replace function allowed(text) returns boolean immutable language sql as '{body}'"
            )
        };
        other.batch_execute(&replace("select $1 <> ''refused''")).await?;
        for _ in 0..2 {
            let sql = "select tollgate.create_api_token('refused', 'key')";
            let error = refused(issuer.batch_execute(sql).await, &SqlState::CHECK_VIOLATION);
            let told = format!("relation \"{table}\" violates check constraint \"added\"");
            assert!(error.message().contains(&told), "{error:?}");
        }
        issuer.batch_execute("begin; savepoint s").await?;
        refused(issue_refused(&issuer).await, &SqlState::CHECK_VIOLATION);
        issuer.batch_execute("rollback to s").await?;
        issue(&issuer, "direct", &["posts:read"]).await?;
        issuer.batch_execute("commit").await?;
        other.batch_execute(&format!("alter table tollgate.{table} drop constraint added")).await?;
        other.batch_execute(&replace("select true")).await?;
        issue(&issuer, "refused", &[]).await?;

        // What fires.
        for (what, drop) in [
            (
                "create trigger added before insert on tollgate.{} for each row execute function see()",
                "trigger added on tollgate.{}",
            ),
            (
                "create trigger added after insert on tollgate.{} for each statement execute function see()",
                "trigger added on tollgate.{}",
            ),
        ] {
            other.batch_execute(&what.replace("{}", table)).await?;
            assert!(issues_by_statement(&issuer, plain).await?, "{what}");
            assert_eq!(
                value::<i64>(&other, "with d as (delete from seen returning 1) select count(*) from d")
                    .await?,
                1,
                "{what}"
            );
            other.batch_execute(&format!("drop {}", drop.replace("{}", table))).await?;
            assert!(!issues_by_statement(&issuer, plain).await?, "{what}");
        }

        // The statement cannot follow a rule, and says so.
        let rule = format!("create rule added as on insert to tollgate.{table} do also select 1");
        other.batch_execute(&rule).await?;
        refused(issue_refused(&issuer).await, &SqlState::FEATURE_NOT_SUPPORTED);
        other.batch_execute(&format!("drop rule added on tollgate.{table}")).await?;
        assert!(!issues_by_statement(&issuer, plain).await?);

        let unique = format!("unique in {table}");
        // Another default, another column, another index, one index less.
        other
            .batch_execute(&format!(
                "alter table tollgate.{table} add added text default upper('added');
                 create unique index added on tollgate.{table} ({column}) where {column} = 'unique in {table}'"
            ))
            .await?;
        issue(&issuer, &unique, &[]).await?;
        let sql = format!("select tollgate.create_api_token('{unique}', 'key')");
        let error = refused(issuer.batch_execute(&sql).await, &SqlState::UNIQUE_VIOLATION);
        assert!(error.message().contains("\"added\""), "{error:?}");
        let added = format!("select distinct added from tollgate.{table} where {column} = '{unique}'");
        assert_eq!(value::<String>(&other, &added).await?, "ADDED");
        other
            .batch_execute(&format!(
                "drop index tollgate.added;
                 alter table tollgate.{table} alter added set default 'other'"
            ))
            .await?;
        issue(&issuer, &unique, &[]).await?;
        assert_eq!(value::<i64>(&other, &added.replace("distinct added", "count(distinct added)")).await?, 2);

        // An index of a kind that keeps something over rows.
        other.batch_execute(&format!("create index added on tollgate.{table} using brin ({column})")).await?;
        assert!(issues_by_statement(&issuer, plain).await?);
        other.batch_execute("drop index tollgate.added").await?;
        other.batch_execute(&format!("alter table tollgate.{table} drop column added")).await?;
        assert!(!issues_by_statement(&issuer, plain).await?);

        // A type that may refuse what it accepted before.
        let added = format!("create domain added as text; alter table tollgate.{table} add added added");
        other.batch_execute(&added).await?;
        assert!(issues_by_statement(&issuer, plain).await?);
        other.batch_execute("drop domain added cascade").await?;
        assert!(!issues_by_statement(&issuer, plain).await?);
    }
    Ok(())
}

async fn issue_refused(issuer: &Client) -> Result<(), tokio_postgres::Error> {
    issuer.batch_execute("select tollgate.create_api_token('refused', 'key')").await
}

#[tokio::test]
async fn each_row_is_in_each_index() -> Result<()> {
    let (issuer, other, cluster) = sessions("each_index").await?;
    for i in 0..50 {
        let expiry = if i % 2 == 0 { "expires_in => '1 hour'" } else { "scopes => '{posts:*}'" };
        assert!(!issues_by_statement(&issuer, expiry).await?);
        if i == 25 {
            other.batch_execute("reindex table concurrently tollgate.api_tokens").await?;
            other.batch_execute("reindex table tollgate.audit_log").await?;
        }
    }
    // While others issue, indexes come, are filled and go.
    let busy = cluster.connect("postgres", "each_index").await?;
    let done = Arc::new(AtomicBool::new(false));
    let issuing = tokio::spawn({
        let done = Arc::clone(&done);
        async move {
            let mut issued = 0;
            while !done.load(Ordering::Relaxed) {
                issue(&busy, "busy", &[]).await?;
                issued += 1;
            }
            anyhow::Ok(issued)
        }
    });
    for _ in 0..3 {
        other.batch_execute("reindex table concurrently tollgate.api_tokens").await?;
        other.batch_execute("create index concurrently extra on tollgate.api_tokens (name)").await?;
        other.batch_execute("drop index concurrently tollgate.extra").await?;
    }
    done.store(true, Ordering::Relaxed);
    assert!(issuing.await?? > 0);
    other.batch_execute("create extension amcheck").await?;
    let checked: i64 = value(
        &other,
        "select count(*) from (
             select bt_index_check(i.indexrelid, true) from pg_index i
             where i.indrelid in ('tollgate.api_tokens'::regclass, 'tollgate.audit_log'::regclass)) checked",
    )
    .await?;
    assert!(checked >= 9, "{checked}");
    let expiring: i64 = value(
        &other,
        "with off as (select set_config('enable_seqscan', 'off', false))
         select count(*) from off, tollgate.api_tokens
         where expires_at is not null and expired_at is null and revoked_at is null",
    )
    .await?;
    assert_eq!(expiring, 25);
    Ok(())
}

#[tokio::test]
async fn a_scope_is_found_in_the_catalogue_as_it_is_for_the_transaction() -> Result<()> {
    let (issuer, other, _cluster) = sessions("catalogue").await?;
    for level in ["read committed", "repeatable read"] {
        issuer
            .batch_execute(&format!(
                "begin isolation level {level}; select tollgate.define_scope('mine:a', 'x')"
            ))
            .await?;
        issue(&issuer, "direct", &["mine:a", "mine:*"]).await?;
        issuer.batch_execute("rollback").await?;
        let sql = "select tollgate.create_api_token('direct', 'key', '{mine:a,posts:read,mine:*,admin,posts:*,post:*}')";
        let error = refused(issuer.batch_execute(sql).await, &SqlState::INVALID_PARAMETER_VALUE);
        assert!(error.detail().unwrap_or_default().contains(r#""mine:a", "mine:*", "post:*""#), "{error:?}");
    }
    issuer.batch_execute("begin isolation level repeatable read; select 1").await?;
    other.batch_execute("select tollgate.drop_scope('users:write')").await?;
    let sql = "select tollgate.create_api_token('direct', 'key', '{users:write}')";
    refused(issuer.batch_execute(sql).await, &SqlState::T_R_SERIALIZATION_FAILURE);
    issuer.batch_execute("rollback").await?;
    Ok(())
}
