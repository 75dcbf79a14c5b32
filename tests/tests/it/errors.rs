//! Errors that pass through the library: a client gets everything that PostgreSQL reports, and nothing meant for
//! developers. The servers here run with RUST_BACKTRACE=1.

use std::sync::Arc;

use crate::common::{self, issue, refused, text_of, value};
use anyhow::{Context as _, Result};
use tokio_postgres::Client;
use tokio_postgres::error::{DbError, SqlState};
use tollgate_tests::{Builder, Cluster, DATABASE};

fn builder() -> Builder {
    Cluster::builder().environment("RUST_BACKTRACE", "1").environment("RUST_LIB_BACKTRACE", "1")
}

async fn start() -> Result<(Client, Client, Arc<Cluster>)> {
    let cluster = Arc::new(common::start(builder())?);
    let owner = cluster.connect("postgres", DATABASE).await?;
    let web = cluster.connect("web", DATABASE).await?;
    Ok((owner, web, cluster))
}

const ISSUE: &str = "select tollgate.create_api_token('ann', 'key')";

fn fields(error: &DbError) -> [Option<&str>; 5] {
    [error.schema(), error.table(), error.column(), error.datatype(), error.constraint()]
}

#[tokio::test]
async fn an_error_of_postgresql_keeps_every_field() -> Result<()> {
    let (owner, _web, _cluster) = start().await?;
    owner
        .batch_execute("alter table tollgate.api_tokens add constraint not_ann check (user_id <> 'ann')")
        .await?;
    let error = refused(owner.batch_execute(ISSUE).await, &SqlState::CHECK_VIOLATION);
    let table = [Some("tollgate"), Some("api_tokens"), None, None, Some("not_ann")];
    assert_eq!(fields(&error), table, "{error:?}");
    assert!(error.detail().is_some_and(|detail| detail.starts_with("Failing row contains")), "{error:?}");
    let context = error.where_().unwrap_or_default();
    assert!(context.contains("SQL statement"), "{error:?}");
    owner.batch_execute("alter table tollgate.api_tokens drop constraint not_ann").await?;

    // A trigger's error, through two calls of ours, although another error was caught in between.
    owner
        .batch_execute(
            "create function public.refuse() returns trigger language plpgsql as $$
             begin
                 begin perform 1 / 0; exception when division_by_zero then null; end;
                 raise exception 'refused' using errcode = '23514', detail = 'a detail', hint = 'a hint', schema = 's',
                     table = 't', column = 'c', datatype = 'd', constraint = 'k';
             end $$;
             create trigger refuse before insert on tollgate.api_tokens for each row execute function public.refuse()",
        )
        .await?;
    let error = refused(owner.batch_execute(ISSUE).await, &SqlState::CHECK_VIOLATION);
    assert_eq!(fields(&error), [Some("s"), Some("t"), Some("c"), Some("d"), Some("k")], "{error:?}");
    assert_eq!((error.detail(), error.hint()), (Some("a detail"), Some("a hint")));
    let context = error.where_().unwrap_or_default();
    assert_eq!(context.matches("PL/pgSQL function public.refuse() line").count(), 1, "{context}");
    owner.batch_execute("drop trigger refuse on tollgate.api_tokens").await?;

    // For an argument that is evaluated in our plan node.
    owner
        .batch_execute("create domain public.narrow as text constraint short check (length(value) < 5)")
        .await?;
    for call in [
        "select * from tollgate.verify_api_token(lower($1)::public.narrow)",
        "select tollgate.verify_api_token(lower($1)::public.narrow)",
    ] {
        let error = refused(owner.query(call, &[&"too long"]).await, &SqlState::CHECK_VIOLATION);
        assert_eq!(
            fields(&error),
            [Some("public"), None, None, Some("narrow"), Some("short")],
            "{call}: {error:?}"
        );
    }
    Ok(())
}

#[tokio::test]
async fn a_caught_error_is_not_reported_in_place_of_the_next_one() -> Result<()> {
    let (owner, web, _cluster) = start().await?;
    // The same session and call: first a caught error of PostgreSQL, then one of ours.
    owner
        .batch_execute(
            "create function public.caught() returns trigger language plpgsql as $$
             begin
                 begin
                     raise exception 'caught' using errcode = '22023', constraint = 'k';
                 exception when others then null;
                 end;
                 perform tollgate.create_api_token('', 'key');
                 return new;
             end $$;
             create trigger caught before insert on tollgate.api_tokens for each row execute function public.caught()",
        )
        .await?;
    let error = refused(owner.batch_execute(ISSUE).await, &SqlState::INVALID_PARAMETER_VALUE);
    assert_eq!((error.message(), error.constraint()), ("a token needs a user", None), "{error:?}");
    let error = refused(
        web.query("select * from tollgate.authenticate('junk')", &[]).await,
        &SqlState::INVALID_AUTHORIZATION_SPECIFICATION,
    );
    assert_eq!(error.detail(), Some(r#"{"code":"MALFORMED","reason":"prefix"}"#), "{error:?}");
    Ok(())
}

#[tokio::test]
async fn no_error_shows_a_backtrace() -> Result<()> {
    let (owner, web, _cluster) = start().await?;
    let token = issue(&owner, "ann", &["posts:read"]).await?;
    owner.batch_execute("create role guest login").await?;
    owner
        .batch_execute("alter table tollgate.api_tokens add constraint not_ben check (user_id <> 'ben')")
        .await?;
    let calls = [
        "select tollgate.create_api_token('ben', 'key')".to_owned(),
        "select tollgate.create_api_token('', 'key')".to_owned(),
        "select tollgate.rotate_api_token(null)".to_owned(),
        "select tollgate.rotate_api_token(gen_random_uuid())".to_owned(),
        "select tollgate.import_api_token('ann', 'x', 'short')".to_owned(),
        "select tollgate.derive_api_token('junk', 'x', '{}', null)".to_owned(),
        "select tollgate.require_scope('posts:read')".to_owned(),
        "set tollgate.context = 'x'".to_owned(),
        "set tollgate.token_prefix = 'X!'".to_owned(),
        "select * from tollgate.authenticate('junk')".to_owned(),
        "select * from tollgate.authenticate('junk', array['x'], '10.0.0.1')".to_owned(),
        "begin read only; select tollgate.create_api_token('ann', 'key')".to_owned(),
        format!("set role guest; select * from tollgate.verify_api_token('{}')", token.token),
        format!("set role guest; select tollgate.verify_api_token('{}')", token.token),
    ];
    for call in calls {
        let error = owner.batch_execute(&call).await.err().with_context(|| call.clone())?;
        let error = error.as_db_error().context("an error of the server's")?.clone();
        owner.batch_execute("rollback; reset role").await?;
        let text = text_of(&error);
        assert!(!text.contains(".rs") && !text.contains("   0: "), "{call}: {text}");
        assert!(error.detail().is_none_or(|detail| !detail.contains('\n')), "{call}: {text}");
    }
    let denied = refused(
        web.query("select * from tollgate.create_api_token('ann', 'x')", &[]).await,
        &SqlState::INSUFFICIENT_PRIVILEGE,
    );
    assert_eq!(denied.detail(), None);
    Ok(())
}

/// Kilobytes of a backend's private memory.
fn resident(pid: i32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).context("RssAnon")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

#[tokio::test]
async fn a_cancel_that_comes_while_an_outcome_is_logged_leaves_nothing_behind() -> Result<()> {
    let cluster = Arc::new(common::start(
        builder()
            .setting("tollgate.log_verifications", "all")
            .setting("tollgate.max_logged_verifications", "1000000"),
    )?);
    let owner = cluster.connect("postgres", DATABASE).await?;
    let pid: i32 = value(&owner, "select pg_backend_pid()").await?;
    // A pending cancel is processed when the line is written, by errfinish.
    let canceled =
        "select pg_cancel_backend(pg_backend_pid()), tollgate.verify_api_token('junk', array['x'])";
    let error = refused(owner.batch_execute(canceled).await, &SqlState::QUERY_CANCELED);
    assert_eq!(error.detail(), None);
    let often = |times: u32| {
        format!(
            "do $$
             declare required text[] := (select array_agg(repeat('x', 128)) from generate_series(1, 8));
             begin
                 for i in 1..{times} loop
                     begin
                         perform pg_cancel_backend(pg_backend_pid()), tollgate.verify_api_token('junk', required);
                         raise 'not canceled';
                     exception when query_canceled then null;
                     end;
                 end loop;
             end $$"
        )
    };
    owner.batch_execute(&often(1000)).await?;
    let before = resident(pid)?;
    owner.batch_execute(&often(10_000)).await?;
    let grown = resident(pid)?.saturating_sub(before);
    // A line has more than a kilobyte.
    assert!(grown < 4000, "{grown} kB of 10,000 lines are still there");
    Ok(())
}
