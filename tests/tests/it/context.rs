//! The identity of a transaction: it cannot be forged, and it follows its transaction.
//!
//! All of this runs as an ordinary role that may only authenticate, except where a test shows that not even a superuser
//! can do it.

use std::time::Duration;

use crate::common::{
    self, Identity, Shared, Token, World, authenticate, current_user, error, identity, issue, issue_with,
    refused, revoke, update, value,
};
use anyhow::{Context as _, Result};
use tokio_postgres::error::SqlState;
use tokio_postgres::{AsyncMessage, Client};
use tollgate_tests::{Cluster, DATABASE, eventually_async};

static SHARED: Shared = Shared::new(&[]);

// ---- Forging

/// The setting's real value when `victim` is authenticated: the value that a forger would like to set.
async fn stolen(owner: &Client) -> Result<String> {
    let token = issue(owner, "victim", &["admin"]).await?;
    owner.batch_execute("begin").await?;
    authenticate(owner, &token.token).await?;
    let stolen: String = value(owner, "select current_setting('tollgate.context')").await?;
    owner.batch_execute("rollback").await?;
    assert!(stolen.contains("victim"), "this is no identity: {stolen}");
    assert!(!stolen.contains(&token.token[4..20]), "the secret is in the setting");
    Ok(stolen)
}

/// Statements that try to set the value, or to keep a value for later.
fn attempts(forged: &str) -> Vec<String> {
    let forged = format!("'{}'", forged.replace('\'', "''"));
    let templates = [
        "set tollgate.context = {}",
        "set session tollgate.context = {}",
        "set local tollgate.context = {}",
        "set TollGate.Context to {}",
        "select set_config('tollgate.context', {}, false)",
        "select set_config('tollgate.context', {}, true)",
        "select set_config('Tollgate.CONTEXT', {}, true)",
        // One's own identity, to be kept beyond the transaction.
        "select set_config('tollgate.context', current_setting('tollgate.context'), false)",
        "do $$ begin perform set_config('tollgate.context', {}, true); exception when others then null; end $$",
        "do $$ begin execute 'set tollgate.context = ' || quote_literal({}); end $$",
        "set tollgate.context to default",
        "set tollgate.context from current",
        "reset tollgate.context",
        "reset all",
        "discard all",
        "update pg_catalog.pg_settings set setting = {} where name = 'tollgate.context'",
        "alter system set tollgate.context = {}",
        "alter role web set tollgate.context = {}",
        "alter role current_user set tollgate.context = {}",
        "alter role web in database postgres set tollgate.context = {}",
        "alter role all set tollgate.context = {}",
        "alter role web set tollgate.context from current",
        "alter database postgres set tollgate.context = {}",
        "create function forge.f() returns text language sql set tollgate.context = {} as 'select tollgate.current_user_id()'",
        "create function forge.f() returns text language sql set tollgate.context from current as 'select tollgate.current_user_id()'",
        "alter function forge.plain() set tollgate.context = {}",
        "alter function forge.plain() set tollgate.context from current",
        "create procedure forge.p() language sql set tollgate.context = {} as 'select 1'",
    ];
    templates.iter().map(|template| template.replace("{}", &forged)).collect()
}

/// Makes each attempt outside a transaction, inside one, and inside an authenticated one. Only the resulting identity
/// matters, not the outcome of the attempt: `may_end` says whether it may end a real identity.
async fn attempt_all(forger: &Client, own: &Token, user: &str, forged: &str, may_end: bool) -> Result<()> {
    for attempt in attempts(forged) {
        let refusal = forger.batch_execute(&attempt).await.err();
        assert_eq!(identity(forger).await?, None, "after {attempt} ({refusal:?})");
        forger.batch_execute("begin").await?;
        assert_eq!(identity(forger).await?, None, "in a transaction after {attempt}");
        forger.batch_execute("savepoint attempt").await?;
        if forger.batch_execute(&attempt).await.is_err() {
            forger.batch_execute("rollback to attempt").await?;
        }
        assert_eq!(identity(forger).await?, None, "in the transaction of {attempt}");
        forger.batch_execute("rollback").await?;

        forger.batch_execute("begin").await?;
        authenticate(forger, &own.token).await?;
        forger.batch_execute("savepoint attempt").await?;
        if forger.batch_execute(&attempt).await.is_err() {
            forger.batch_execute("rollback to attempt").await?;
        }
        match current_user(forger).await? {
            Some(now) => assert_eq!(now, user, "authenticated, after {attempt}"),
            None => assert!(may_end, "{attempt} ended the identity"),
        }
        // Committed, so that any kept value takes effect.
        forger.batch_execute("commit").await?;
        assert_eq!(identity(forger).await?, None, "after the commit of {attempt}");
        for function in ["forge.f", "forge.plain"] {
            // Without a function of that name there is nothing to call.
            if let Ok(row) = forger.query_one(&format!("select {function}()"), &[]).await {
                assert_eq!(row.get::<_, Option<String>>(0), None, "{function} after {attempt}");
            }
        }
    }
    Ok(())
}

const FORGE: &str = "
    create schema forge;
    create function forge.plain() returns text language sql as 'select tollgate.current_user_id()';
    alter function forge.plain() owner to web;
    grant all on schema forge to web";

#[tokio::test]
async fn no_statement_of_an_ordinary_role_forges_an_identity_or_ends_one() -> Result<()> {
    let cluster = common::start(Cluster::builder())?;
    cluster.execute(DATABASE, FORGE)?;
    let owner = cluster.connect("postgres", DATABASE).await?;
    let web = cluster.connect("web", DATABASE).await?;
    let own = issue(&owner, "honest", &["posts:read"]).await?;
    let forged = stolen(&owner).await?;
    attempt_all(&web, &own, "honest", &forged, false).await?;
    assert_nothing_kept(&cluster).await
}

#[tokio::test]
async fn not_even_a_role_that_was_granted_set_on_the_parameter_forges_an_identity() -> Result<()> {
    let cluster = common::start(Cluster::builder())?;
    cluster.execute(DATABASE, FORGE)?;
    cluster.execute(DATABASE, "grant set, alter system on parameter tollgate.context to web")?;
    let owner = cluster.connect("postgres", DATABASE).await?;
    let web = cluster.connect("web", DATABASE).await?;
    let own = issue(&owner, "honest", &["posts:read"]).await?;
    let forged = stolen(&owner).await?;
    attempt_all(&web, &own, "honest", &forged, true).await?;
    assert_nothing_kept(&cluster).await
}

#[tokio::test]
async fn not_even_a_superuser_forges_an_identity() -> Result<()> {
    let cluster = common::start(Cluster::builder())?;
    cluster.execute(DATABASE, FORGE)?;
    let owner = cluster.connect("postgres", DATABASE).await?;
    let own = issue(&owner, "honest", &["posts:read"]).await?;
    let forged = stolen(&owner).await?;
    attempt_all(&owner, &own, "honest", &forged, true).await?;
    assert_nothing_kept(&cluster).await
}

/// No attempt left anything in the catalogue or a configuration file that takes effect in a later session.
async fn assert_nothing_kept(cluster: &Cluster) -> Result<()> {
    let kept = "
        select concat_ws(' ', 'role or database:', setconfig::text) from pg_db_role_setting
        where setconfig::text like '%victim%'
        union all
        select concat_ws(' ', 'function:', proname, proconfig::text) from pg_proc where proconfig::text like '%victim%'
        union all
        select concat_ws(' ', sourcefile, name, setting) from pg_file_settings where name ilike 'tollgate.context'";
    assert_eq!(cluster.value(DATABASE, kept)?, None);
    for role in ["web", "postgres"] {
        assert_eq!(identity(&cluster.connect(role, DATABASE).await?).await?, None);
    }
    Ok(())
}

#[tokio::test]
async fn nothing_in_the_options_of_a_connection_forges_an_identity() -> Result<()> {
    for preload in [true, false] {
        let cluster = common::start(Cluster::builder().preload(preload))?;
        let owner = cluster.connect("postgres", DATABASE).await?;
        let own = issue(&owner, "honest", &["posts:read"]).await?;
        let forged = stolen(&owner).await?.replace('\\', "\\\\").replace(' ', "\\ ");
        for role in ["web", "postgres"] {
            for options in [
                format!("-c tollgate.context={forged}"),
                format!("--tollgate.context={forged}"),
                format!("-c TOLLGATE.CONTEXT={forged}"),
            ] {
                let mut config = cluster.config(role, DATABASE);
                config.options(&options);
                let Ok((client, connection)) = config.connect(tokio_postgres::NoTls).await else {
                    assert!(preload, "an unknown setting is no reason to refuse a connection");
                    continue;
                };
                tokio::spawn(connection);
                assert_eq!(identity(&client).await?, None, "{role}, preloaded {preload}: {options}");
                client.batch_execute("begin").await?;
                assert_eq!(identity(&client).await?, None);
                authenticate(&client, &own.token).await?;
                assert_eq!(current_user(&client).await?.as_deref(), Some("honest"));
                client.batch_execute("commit").await?;
                assert_eq!(identity(&client).await?, None);
                // On a server that preloads it, RESET returns to the value given with the connection.
                client.batch_execute("reset all").await?;
                assert_eq!(identity(&client).await?, None);
            }
        }
    }
    Ok(())
}

#[tokio::test]
async fn a_line_in_the_configuration_file_forges_no_identity() -> Result<()> {
    let mut cluster = common::start(Cluster::builder())?;
    let owner = cluster.connect("postgres", DATABASE).await?;
    let forged = stolen(&owner).await?;
    let web = cluster.connect("web", DATABASE).await?;
    assert_eq!(identity(&web).await?, None);

    cluster.configure("tollgate.context", &forged)?;
    cluster.configure("work_mem", "5MB")?;
    eventually_async(Duration::from_secs(10), "the reload", async || {
        value::<String>(&web, "show work_mem").await.is_ok_and(|value| value == "5MB")
            || cluster.log().contains("contains errors")
    })
    .await;
    assert_eq!(identity(&web).await?, None);
    assert_eq!(identity(&cluster.connect("web", DATABASE).await?).await?, None);
    drop((owner, web));

    // A server that refuses to start with such a line forges nothing either.
    if cluster.restart().is_ok() {
        for role in ["web", "postgres"] {
            assert_eq!(identity(&cluster.connect(role, DATABASE).await?).await?, None);
        }
    } else {
        assert!(cluster.log().contains("tollgate.context"), "{}", cluster.log());
    }
    Ok(())
}

#[tokio::test]
async fn a_placeholder_set_before_the_library_loads_forges_no_identity() -> Result<()> {
    let cluster = common::start(Cluster::builder().preload(false))?;
    let owner = cluster.connect("postgres", DATABASE).await?;
    let own = issue(&owner, "honest", &["posts:read"]).await?;
    let forged = stolen(&owner).await?;
    let literal = format!("'{}'", forged.replace('\'', "''"));

    for (set, end) in [
        (format!("set tollgate.context = {literal}"), ""),
        (format!("begin; set local tollgate.context = {literal}"), "commit"),
        (format!("begin; set tollgate.context = {literal}"), "commit"),
        (
            format!(
                "begin; set tollgate.context = 'x'; savepoint a; set local tollgate.context = {literal}; savepoint b"
            ),
            "rollback to a; commit",
        ),
        (format!("begin; select set_config('tollgate.context', {literal}, false)"), "rollback"),
    ] {
        let web = cluster.connect("web", DATABASE).await?;
        web.batch_execute(&set).await?;
        let placed: String = value(&web, "select current_setting('tollgate.context')").await?;
        assert_eq!(placed, forged, "the library was loaded too early for this test: {set}");

        assert_eq!(identity(&web).await?, None, "{set}");
        web.batch_execute(if end.is_empty() { "select 1" } else { end }).await?;
        assert_eq!(identity(&web).await?, None, "{set}; {end}");
        web.batch_execute("begin").await?;
        authenticate(&web, &own.token).await?;
        assert_eq!(current_user(&web).await?.as_deref(), Some("honest"));
        web.batch_execute("commit").await?;
        assert_eq!(identity(&web).await?, None, "{set}; {end}, after another identity");
        error(web.batch_execute(&set).await);
        web.batch_execute("rollback").await?;
        assert_eq!(identity(&web).await?, None);
    }

    // A superuser may leave these in the catalogue while nothing checks them.
    for forgery in [
        format!("alter role web set tollgate.context = {literal}"),
        format!("alter database postgres set tollgate.context = {literal}"),
        format!(
            "create function public.forged() returns text language sql set tollgate.context = {literal}
             as 'select tollgate.current_user_id()'"
        ),
    ] {
        let fresh = cluster.connect("postgres", DATABASE).await?;
        fresh.batch_execute(&forgery).await?;
    }
    let web = cluster.connect("web", DATABASE).await?;
    assert_eq!(identity(&web).await?, None);
    for _ in 0..2 {
        let web = cluster.connect("web", DATABASE).await?;
        // Called twice: the first call loads the library in the middle of the function.
        for _ in 0..2 {
            if let Ok(row) = web.query_one("select public.forged()", &[]).await {
                assert_eq!(row.get::<_, Option<String>>(0), None);
            }
            assert_eq!(identity(&web).await?, None);
        }
        web.batch_execute("begin").await?;
        authenticate(&web, &own.token).await?;
        assert_eq!(current_user(&web).await?.as_deref(), Some("honest"));
        web.batch_execute("reset all; commit").await?;
        assert_eq!(identity(&web).await?, None);
    }
    Ok(())
}

#[tokio::test]
async fn the_setting_is_in_no_list_of_settings() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    let token = issue(&owner, "listed", &[]).await?;
    for client in [&owner, &web] {
        client.batch_execute("begin").await?;
        authenticate(client, &token.token).await?;
        let listed: i64 =
            value(client, "select count(*) from pg_settings where name ilike 'tollgate.context'").await?;
        assert_eq!(listed, 0);
        for row in client.query("show all", &[]).await? {
            assert_ne!(row.get::<_, &str>(0), "tollgate.context");
        }
        client.batch_execute("commit").await?;
    }
    Ok(())
}

#[tokio::test]
async fn the_value_that_a_session_can_see_holds_neither_the_token_nor_its_digest() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    let token = issue(&owner, "secret", &["posts:read"]).await?;
    web.batch_execute("begin").await?;
    authenticate(&web, &token.token).await?;
    let shown: String = value(&web, "show tollgate.context").await?;
    let body = token.token.rsplit('_').next().context("a body")?;
    for part in body.as_bytes().windows(8) {
        assert!(!shown.contains(std::str::from_utf8(part)?), "{shown}");
    }
    let digest = tollgate_core::token::digest(token.token.as_bytes());
    let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    assert!(!shown.contains(&digest));
    web.batch_execute("commit").await?;
    Ok(())
}

// ---- Begin and end

#[tokio::test]
async fn authenticating_makes_the_token_the_identity_of_the_transaction() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    let token = issue(&owner, "someone", &["posts:*", "users:read"]).await?;
    for begin in ["begin", "begin read only", "begin isolation level serializable"] {
        assert_eq!(identity(&web).await?, None);
        web.batch_execute(begin).await?;
        let row = web
            .query_one(
                "select v.code, v.user_id from tollgate.authenticate($1, array['posts:read']) v",
                &[&token.token],
            )
            .await?;
        assert_eq!((row.get(0), row.get(1)), ("VALID", "someone"));
        let expected = Identity {
            token_id: token.id,
            user_id: "someone".into(),
            scopes: vec!["posts:*".into(), "users:read".into()],
        };
        assert_eq!(identity(&web).await?, Some(expected));
        web.batch_execute("commit").await?;
        assert_eq!(identity(&web).await?, None);
    }
    Ok(())
}

#[tokio::test]
async fn scopes_are_answered_from_the_identity() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    let token = issue(&owner, "scoped", &["posts:*", "users:read"]).await?;
    // The question, and the answer when authenticated. Without an identity every answer is false.
    let questions = [
        ("token_has_scope('posts:read')", true),
        ("token_has_scope('posts:comments:read')", true),
        ("token_has_scope('posts')", false),
        ("token_has_scope('users:write')", false),
        ("token_has_scope('')", false),
        ("token_has_scope('*')", false),
        ("token_has_scope(null)", false),
        ("token_has_any_scope('{users:write,posts:read}')", true),
        ("token_has_any_scope('{users:write,null}')", false),
        ("token_has_any_scope('{}')", false),
        ("token_has_any_scope(null)", false),
        ("token_has_all_scopes('{users:read,posts:read}')", true),
        ("token_has_all_scopes('{users:read,users:write}')", false),
        ("token_has_all_scopes('{users:read,null}')", false),
        ("token_has_all_scopes('{{users:read},{posts:read}}')", true),
        ("token_has_all_scopes('{}')", false),
        ("token_has_all_scopes(null)", false),
    ];
    for (question, _) in questions {
        let answer: bool = value(&web, &format!("select tollgate.{question}")).await?;
        assert!(!answer, "{question} without an identity");
    }
    web.batch_execute("begin").await?;
    authenticate(&web, &token.token).await?;
    for (question, expected) in questions {
        let answer: bool = value(&web, &format!("select tollgate.{question}")).await?;
        assert_eq!(answer, expected, "{question}");
    }
    web.batch_execute("commit").await?;
    Ok(())
}

#[tokio::test]
async fn requiring_a_scope_that_is_not_granted_is_42501_and_says_why() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    let token = issue(&owner, "required", &["posts:read"]).await?;
    let require = "select tollgate.require_scope($1)";

    let anonymous = refused(web.query(require, &[&"posts:read"]).await, &SqlState::INSUFFICIENT_PRIVILEGE);
    assert!(anonymous.message().contains("posts:read"), "{anonymous:?}");
    assert!(anonymous.detail().is_some_and(|detail| detail.contains("INSUFFICIENT_SCOPE")));
    assert!(anonymous.hint().is_some_and(|hint| hint.contains("no identity: call tollgate.authenticate")));

    web.batch_execute("begin").await?;
    authenticate(&web, &token.token).await?;
    web.query(require, &[&"posts:read"]).await?;
    let lacking = refused(web.query(require, &[&"posts:write"]).await, &SqlState::INSUFFICIENT_PRIVILEGE);
    assert!(lacking.message().contains("posts:write"), "{lacking:?}");
    assert!(lacking.detail().is_some_and(|detail| detail.contains("posts:write")));
    assert!(lacking.hint().is_some());
    web.batch_execute("rollback; begin").await?;
    authenticate(&web, &token.token).await?;
    refused(web.query(require, &[&None::<&str>]).await, &SqlState::INSUFFICIENT_PRIVILEGE);
    web.batch_execute("rollback").await?;
    Ok(())
}

#[tokio::test]
async fn a_refused_token_raises_and_keeps_nothing_new() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    let first = issue(&owner, "first", &["posts:read"]).await?;
    let revoked = issue(&owner, "revoked", &[]).await?;
    revoke(&owner, revoked.id).await?;
    let disabled = issue(&owner, "disabled", &[]).await?;
    let expired = issue_with(&owner, "expired", "expires_in => '1 hour'").await?;
    owner
        .execute(
            "update tollgate.api_tokens set disabled_at = case id when $1 then now() end,
                    expires_at = case id when $2 then now() end where id in ($1, $2)",
            &[&disabled.id, &expired.id],
        )
        .await?;
    let bound = issue_with(&owner, "bound", "allowed_ips => '{10.0.0.0/8}'").await?;
    let mut unknown = revoked.token.clone();
    unknown.replace_range(..3, "abc");

    let refusals = [
        (Some("junk"), "MALFORMED"),
        (None, "MALFORMED"),
        (Some(unknown.as_str()), "NOT_FOUND"),
        (Some(&revoked.token), "REVOKED"),
        (Some(&disabled.token), "DISABLED"),
        (Some(&expired.token), "EXPIRED"),
        (Some(&bound.token), "IP_NOT_ALLOWED"),
        (Some(&first.token), "INSUFFICIENT_SCOPE"),
    ];
    for (token, code) in refusals {
        let call = "select tollgate.authenticate($1, array['posts:write'], '11.0.0.1')::text";
        web.batch_execute("begin").await?;
        let sqlstate = if code == "INSUFFICIENT_SCOPE" {
            SqlState::INSUFFICIENT_PRIVILEGE
        } else {
            SqlState::INVALID_AUTHORIZATION_SPECIFICATION
        };
        let error = refused(web.query(call, &[&token]).await, &sqlstate);
        let detail: serde_json::Value = serde_json::from_str(error.detail().unwrap_or_default())?;
        assert_eq!(detail["code"], code, "{error:?}");
        assert!(error.hint().is_some(), "{error:?}");
        web.batch_execute("rollback; begin").await?;
        assert_eq!(identity(&web).await?, None);

        authenticate(&web, &first.token).await?;
        web.batch_execute("savepoint s").await?;
        refused(web.query(call, &[&token]).await, &sqlstate);
        web.batch_execute("rollback to s").await?;
        assert_eq!(current_user(&web).await?.as_deref(), Some("first"), "{code}");
        web.batch_execute("commit").await?;
    }
    Ok(())
}

#[tokio::test]
async fn an_identity_outside_a_transaction_block_that_nothing_used_is_warned_of() -> Result<()> {
    let World { owner, cluster, web: _ } = SHARED.world().await?;
    let token = issue(&owner, "warned", &[]).await?.token;
    owner
        .batch_execute(
            "create schema warned;
             create function warned.log_in(token text) returns text language plpgsql as
                 'begin return (select user_id from tollgate.authenticate(token)); end';
             create function warned.whoami(token text) returns text language plpgsql as
                 'begin perform from tollgate.authenticate(token); return tollgate.current_user_id(); end';
             create function warned.two_statements(token text) returns text language sql as
                 'select from tollgate.authenticate(token); select tollgate.current_user_id()';
             create procedure warned.and_commits(token text) language plpgsql as
                 'begin perform from tollgate.authenticate(token); commit; end';
             grant usage on schema warned to web",
        )
        .await?;
    let (web, mut messages) = cluster.listen("web", DATABASE).await?;
    let call = format!("from tollgate.authenticate('{token}')");
    for (statements, warns) in [
        (format!("select valid {call}"), true),
        (format!("select warned.log_in('{token}')"), true),
        (format!("do $$ begin perform {call}; end $$"), true),
        (format!("call warned.and_commits('{token}')"), true),
        (format!("select tollgate.current_user_id() {call}"), false),
        (format!("select warned.whoami('{token}')"), false),
        (format!("select warned.two_statements('{token}')"), false),
        (format!("do $$ begin perform {call}; perform tollgate.current_user_id(); end $$"), false),
        // Several statements in one message form a transaction block, whatever follows.
        (format!("select valid {call}; select tollgate.current_user_id()"), false),
        (format!("select valid {call}; select 1"), false),
        (format!("begin; select valid {call}; commit"), false),
        (format!("begin; savepoint s; select valid {call}; rollback to s; commit"), false),
    ] {
        web.batch_execute(&statements).await?;
        // Messages arrive in order, so earlier ones come before this.
        web.batch_execute("do $$ begin raise notice 'done'; end $$").await?;
        let mut warnings = Vec::new();
        while let Some(message) = messages.recv().await {
            match message {
                AsyncMessage::Notice(notice) if notice.message() == "done" => break,
                AsyncMessage::Notice(notice) => warnings.push(notice),
                _ => {}
            }
        }
        assert_eq!(warnings.len(), usize::from(warns), "{statements}: {warnings:?}");
        for warning in warnings {
            assert_eq!(warning.code(), &SqlState::NO_ACTIVE_SQL_TRANSACTION);
            assert_eq!(warning.severity(), "WARNING");
            assert!(warning.hint().is_some_and(|hint| hint.contains("BEGIN")), "{warning:?}");
        }
    }
    // A failing one reports its error only.
    error(web.batch_execute(&format!("select 1 / (select 0 {call})")).await);
    Ok(())
}

// ---- One identity

/// The error for a second token.
async fn assert_bound(client: &Client, other: &str) -> Result<()> {
    client.batch_execute("savepoint assert_bound").await?;
    let error = refused(authenticate(client, other).await, &SqlState::ACTIVE_SQL_TRANSACTION);
    assert!(error.detail().is_some_and(|detail| detail.contains("savepoint")), "{error:?}");
    assert!(error.hint().is_some_and(|hint| hint.contains("new one")), "{error:?}");
    client.batch_execute("rollback to assert_bound; release assert_bound").await?;
    Ok(())
}

#[tokio::test]
async fn a_transaction_authenticates_with_one_token_only() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    let first = issue(&owner, "one", &["posts:read"]).await?;
    let namesake = issue(&owner, "one", &["posts:read"]).await?;
    let derived = common::derive(&owner, &first, &["posts:read"]).await?;
    let other = issue_with(&owner, "other", "rate_limit => 1, rate_window => '1 day'").await?;
    let revoked = issue(&owner, "revoked", &[]).await?;
    revoke(&owner, revoked.id).await?;

    web.batch_execute("begin").await?;
    // A refused token binds nothing.
    for refusal in [&revoked.token, "junk"] {
        web.batch_execute("savepoint s").await?;
        refused(authenticate(&web, refusal).await, &SqlState::INVALID_AUTHORIZATION_SPECIFICATION);
        web.batch_execute("rollback to s").await?;
    }
    authenticate(&web, &first.token).await?;
    for another in [&other, &namesake, &derived] {
        assert_bound(&web, &another.token).await?;
        assert_eq!(identity(&web).await?.map(|identity| identity.token_id), Some(first.id));
    }
    // The other token was valid: an attempt that is not allowed here is not a use, and charges no limit. A check of it
    // changes nothing.
    assert_eq!(common::code(&web, &other.token).await?, "VALID");
    assert_eq!(current_user(&web).await?.as_deref(), Some("one"));
    // The same token is verified again.
    authenticate(&web, &first.token).await?;
    update(&owner, first.id, &serde_json::json!({"scopes": []})).await?;
    authenticate(&web, &first.token).await?;
    assert_eq!(identity(&web).await?.map(|identity| identity.scopes), Some(Vec::new()));
    web.batch_execute("savepoint s").await?;
    revoke(&owner, first.id).await?;
    refused(authenticate(&web, &first.token).await, &SqlState::INVALID_AUTHORIZATION_SPECIFICATION);
    web.batch_execute("rollback to s").await?;
    assert_eq!(current_user(&web).await?.as_deref(), Some("one"), "that of before");
    assert_bound(&web, &namesake.token).await?;
    web.batch_execute("commit").await?;

    // A rotated token has another secret.
    web.batch_execute("begin").await?;
    authenticate(&web, &namesake.token).await?;
    let successor = common::rotate(&owner, namesake.id, "1 hour").await?;
    assert_bound(&web, &successor.token).await?;
    web.batch_execute("commit").await?;
    Ok(())
}

#[tokio::test]
async fn the_end_of_an_identity_before_its_transactions_frees_nothing() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    let ann = issue(&owner, "ann", &[]).await?.token;
    let ben = issue(&owner, "ben", &[]).await?.token;
    // Rolled back to a savepoint, by the client and by an exception.
    web.batch_execute("begin; savepoint s").await?;
    authenticate(&web, &ann).await?;
    web.batch_execute("rollback to s").await?;
    assert_eq!(identity(&web).await?, None);
    assert_bound(&web, &ben).await?;
    assert_eq!(identity(&web).await?, None);
    authenticate(&web, &ann).await?;
    assert_eq!(current_user(&web).await?.as_deref(), Some("ann"));
    web.batch_execute("rollback").await?;

    let block = format!(
        "do $$ begin
             begin
                 perform from tollgate.authenticate('{ann}');
                 raise division_by_zero;
             exception when division_by_zero then null;
             end;
             begin
                 perform from tollgate.authenticate('{ben}');
                 raise 'bound to two';
             exception when active_sql_transaction then null;
             end;
             if tollgate.current_user_id() is not null then raise 'still authenticated'; end if;
         end $$"
    );
    web.batch_execute(&block).await?;
    web.batch_execute("begin").await?;
    web.batch_execute(&block).await?;
    assert_bound(&web, &ben).await?;
    web.batch_execute("commit").await?;

    // Expired.
    let short = issue_with(&owner, "short", "expires_in => '500 milliseconds'").await?.token;
    web.batch_execute("begin").await?;
    authenticate(&web, &short).await?;
    eventually_async(Duration::from_secs(10), "the identity to expire", async || {
        current_user(&web).await.is_ok_and(|user| user.is_none())
    })
    .await;
    assert_bound(&web, &ben).await?;
    web.batch_execute("commit").await?;

    // Emptied, which superusers may do.
    owner.batch_execute("begin").await?;
    authenticate(&owner, &ann).await?;
    owner.batch_execute("set local tollgate.context = ''").await?;
    assert_eq!(identity(&owner).await?, None);
    assert_bound(&owner, &ben).await?;
    owner.batch_execute("rollback").await?;
    Ok(())
}

#[tokio::test]
async fn each_top_level_transaction_may_have_another_identity() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    let ann = issue(&owner, "ann", &[]).await?.token;
    let ben = issue(&owner, "ben", &[]).await?.token;
    for end in [
        "commit; begin",
        "rollback; begin",
        "commit and chain",
        "rollback and chain",
        "prepare transaction 'each'; rollback prepared 'each'; begin",
    ] {
        web.batch_execute("begin").await?;
        authenticate(&web, &ann).await?;
        for statement in end.split("; ") {
            web.batch_execute(statement).await?;
        }
        assert_eq!(identity(&web).await?, None, "{end}");
        authenticate(&web, &ben).await?;
        assert_eq!(current_user(&web).await?.as_deref(), Some("ben"), "{end}");
        assert_bound(&web, &ann).await?;
        web.batch_execute("commit").await?;
    }
    // By an error, immediately and at the COMMIT.
    web.batch_execute("begin").await?;
    authenticate(&web, &ann).await?;
    error(web.batch_execute("select 1 / 0").await);
    web.batch_execute("commit; begin").await?;
    authenticate(&web, &ben).await?;
    web.batch_execute("commit").await?;

    owner
        .batch_execute(
            "create schema chained;
             create procedure chained.run(tokens text[], inout seen text[]) language plpgsql as $$
                 declare token text;
                 begin
                     foreach token in array tokens loop
                         perform from tollgate.authenticate(token);
                         seen := seen || tollgate.current_user_id();
                         commit;
                         perform from tollgate.authenticate(tokens[1]);
                         rollback;
                     end loop;
                 end $$;
             grant usage on schema chained to web",
        )
        .await?;
    let row = web.query_one("call chained.run($1, '{}')", &[&vec![&ann, &ben]]).await?;
    assert_eq!(row.get::<_, Vec<&str>>(0), ["ann", "ben"]);
    Ok(())
}

#[tokio::test]
async fn work_begun_by_one_identity_is_never_finished_by_another() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    posts(&owner, "mixed", 9).await?;
    owner
        .batch_execute(
            "grant delete on mixed.posts to web;
             create policy own_deletes on mixed.posts for delete to web using
                 ((select tollgate.token_has_scope('posts:write')) and author = (select tollgate.current_user_id()));
             create function mixed.as_user(token text) returns bigint language plpgsql
                 set search_path = pg_catalog, pg_temp as $$
                 begin
                     perform from tollgate.authenticate(token);
                     return (select count(*) from mixed.posts);
                 end $$",
        )
        .await?;
    let anna = issue(&owner, "anna", &["posts:*"]).await?.token;
    let bert = issue(&owner, "bert", &[]).await?.token;

    // A cursor whose rows are fetched one by one.
    web.batch_execute("begin").await?;
    authenticate(&web, &anna).await?;
    web.batch_execute("declare mixed no scroll cursor for select id from mixed.posts order by id").await?;
    assert_eq!(web.query("fetch 1 from mixed", &[]).await?.len(), 1);
    assert_bound(&web, &bert).await?;
    let rest = web.query("fetch all from mixed", &[]).await?;
    assert_eq!(rest.iter().map(|row| row.get(0)).collect::<Vec<i32>>(), [6, 9]);
    web.batch_execute("rollback").await?;

    // A held cursor, whose rows are computed at the COMMIT, and which would authenticate there.
    web.batch_execute("begin").await?;
    authenticate(&web, &anna).await?;
    web.batch_execute(&format!(
        "declare held cursor with hold for select user_id from tollgate.authenticate('{bert}')"
    ))
    .await?;
    refused(web.batch_execute("commit").await, &SqlState::ACTIVE_SQL_TRANSACTION);
    assert_eq!(identity(&web).await?, None);

    // One statement, part of which authenticates. Otherwise the deletion would combine anna's scopes with bert's name.
    for mixing in [
        "with a as materialized (select valid from tollgate.authenticate($1))
             delete from mixed.posts where (select valid from a)",
        "delete from mixed.posts where (select (tollgate.authenticate($1)).valid)",
        "select mixed.as_user($1), count(*) from mixed.posts",
        "select p.id from mixed.posts p, tollgate.authenticate($1) a where p.author = a.user_id",
    ] {
        web.batch_execute("begin").await?;
        authenticate(&web, &anna).await?;
        refused(web.query(mixing, &[&bert]).await, &SqlState::ACTIVE_SQL_TRANSACTION);
        web.batch_execute("rollback").await?;
    }
    assert_eq!(value::<i64>(&owner, "select count(*) from mixed.posts").await?, 9);

    // A function with a SET clause: the identity that it authenticates stays that of the transaction.
    web.batch_execute("begin").await?;
    assert_eq!(web.query_one("select mixed.as_user($1)", &[&anna]).await?.get::<_, i64>(0), 3);
    assert_eq!(current_user(&web).await?.as_deref(), Some("anna"));
    assert_bound(&web, &bert).await?;
    web.batch_execute("commit").await?;
    Ok(())
}

/// Like PostgREST, which runs each request in one transaction over pooled connections.
#[tokio::test]
async fn requests_that_authenticate_before_their_query_have_an_identity_each() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    posts(&owner, "requests", 9).await?;
    owner
        .batch_execute(
            "create function requests.before() returns void language plpgsql as $$
                 declare token text := nullif(current_setting('request.headers', true), '')::json ->> 'x-api-key';
                 begin
                     if token is not null then
                         perform from tollgate.authenticate(token);
                     end if;
                 end $$",
        )
        .await?;
    let anna = issue(&owner, "anna", &["posts:read"]).await?.token;
    let bert = issue(&owner, "bert", &["posts:read"]).await?.token;
    for (token, ids) in [
        (Some(&anna), vec![3, 6, 9]),
        (Some(&bert), vec![1, 4, 7]),
        (None, vec![]),
        (Some(&anna), vec![3, 6, 9]),
    ] {
        let headers = serde_json::json!({ "x-api-key": token }).to_string();
        web.batch_execute("begin isolation level read committed read only").await?;
        web.query("select set_config('request.headers', $1, true)", &[&headers]).await?;
        web.batch_execute("select requests.before()").await?;
        let rows = web.query("select id from requests.posts order by id", &[]).await?;
        assert_eq!(rows.iter().map(|row| row.get(0)).collect::<Vec<i32>>(), ids);
        web.batch_execute("commit").await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_superuser_may_let_transactions_change_their_identity() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    let broad = issue(&owner, "broad", &["admin"]).await?;
    let narrow = issue(&owner, "narrow", &["posts:read"]).await?;
    refused(web.batch_execute("set tollgate.identity_changes = on").await, &SqlState::INSUFFICIENT_PRIVILEGE);

    owner.batch_execute("begin; set local tollgate.identity_changes = on").await?;
    authenticate(&owner, &broad.token).await?;
    authenticate(&owner, &narrow.token).await?;
    let now = identity(&owner).await?.context("an identity")?;
    assert_eq!(
        (now.user_id.as_str(), now.token_id, now.scopes),
        ("narrow", narrow.id, vec!["posts:read".into()])
    );
    assert!(!value::<bool>(&owner, "select tollgate.token_has_scope('users:read')").await?);
    // Once it is off again, the last identity stays.
    owner.batch_execute("set local tollgate.identity_changes = off").await?;
    assert_bound(&owner, &broad.token).await?;
    authenticate(&owner, &narrow.token).await?;
    owner.batch_execute("commit").await?;
    assert_eq!(identity(&owner).await?, None);
    Ok(())
}

#[tokio::test]
async fn an_identity_ends_with_its_transaction_however_that_ends() -> Result<()> {
    let World { owner, web, cluster } = SHARED.world().await?;
    let token = issue(&owner, "ends", &[]).await?;
    for end in ["commit", "rollback", "abort", "end", "commit and chain", "rollback and chain"] {
        web.batch_execute("begin").await?;
        authenticate(&web, &token.token).await?;
        assert_eq!(current_user(&web).await?.as_deref(), Some("ends"));
        web.batch_execute(end).await?;
        assert_eq!(identity(&web).await?, None, "{end}");
        if end.ends_with("chain") {
            web.batch_execute("commit").await?;
        }
    }
    // By an error.
    web.batch_execute("begin").await?;
    authenticate(&web, &token.token).await?;
    error(web.batch_execute("select 1 / 0").await);
    web.batch_execute("rollback").await?;
    assert_eq!(identity(&web).await?, None);
    // A statement outside a transaction block is its own transaction.
    authenticate(&web, &token.token).await?;
    assert_eq!(identity(&web).await?, None);
    // Several in one message are one transaction.
    let together =
        format!("select tollgate.authenticate('{}'); select tollgate.current_user_id()", token.token);
    let answers = web.simple_query(&together).await?;
    let answers = answers.iter().filter_map(|message| match message {
        tokio_postgres::SimpleQueryMessage::Row(row) => row.get(0),
        _ => None,
    });
    assert_eq!(answers.last(), Some("ends"));
    assert_eq!(identity(&web).await?, None);
    // The end of the session leaves nothing for the next one that gets its process id.
    web.batch_execute("begin").await?;
    authenticate(&web, &token.token).await?;
    drop(web);
    assert_eq!(identity(&cluster.connect("web", DATABASE).await?).await?, None);
    Ok(())
}

#[tokio::test]
async fn a_pooled_connection_is_handed_on_without_an_identity() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    let mut tokens = Vec::new();
    for n in 0..4 {
        tokens.push(issue(&owner, &format!("pooled {n}"), &[]).await?);
    }
    for round in 0..12 {
        let n = round % tokens.len();
        web.batch_execute("begin").await?;
        assert_eq!(identity(&web).await?, None, "round {round}");
        authenticate(&web, &tokens[n].token).await?;
        assert_eq!(current_user(&web).await?, Some(format!("pooled {n}")));
        match round % 3 {
            0 => web.batch_execute("commit").await?,
            1 => web.batch_execute("rollback").await?,
            _ => {
                error(web.batch_execute("select 1 / 0").await);
                web.batch_execute("rollback").await?;
            }
        }
        assert_eq!(identity(&web).await?, None, "round {round}");
        // Statements that poolers send between two clients.
        web.batch_execute(["discard all", "reset all", "deallocate all", ""][round % 4]).await?;
    }
    Ok(())
}

#[tokio::test]
async fn an_expiry_ends_the_identity_inside_its_transaction() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    let token = issue_with(&owner, "short", "scopes => '{admin}', expires_in => '700 milliseconds'").await?;
    web.batch_execute("begin isolation level repeatable read").await?;
    authenticate(&web, &token.token).await?;
    assert_eq!(current_user(&web).await?.as_deref(), Some("short"));
    assert!(value::<bool>(&web, "select tollgate.token_has_scope('posts:read')").await?);
    eventually_async(Duration::from_secs(10), "the identity to expire", async || {
        current_user(&web).await.is_ok_and(|user| user.is_none())
    })
    .await;
    assert_eq!(identity(&web).await?, None);
    for question in [
        "token_has_scope('posts:read')",
        "token_has_any_scope('{posts:read}')",
        "token_has_all_scopes('{posts:read}')",
    ] {
        assert!(!value::<bool>(&web, &format!("select tollgate.{question}")).await?, "{question}");
    }
    refused(
        web.query("select tollgate.require_scope('posts:read')", &[]).await,
        &SqlState::INSUFFICIENT_PRIVILEGE,
    );
    web.batch_execute("rollback").await?;
    Ok(())
}

// ---- Within the transaction

#[tokio::test]
async fn savepoints_keep_and_restore_the_identity() -> Result<()> {
    let World { owner, cluster, web: _ } = SHARED.world().await?;
    // Several identities, as test suites may have them in one transaction.
    let web = cluster.connect("postgres", DATABASE).await?;
    web.batch_execute("set tollgate.identity_changes = on").await?;
    let a = issue(&owner, "a", &[]).await?.token;
    let b = issue(&owner, "b", &[]).await?.token;
    let c = issue(&owner, "c", &[]).await?.token;
    let user = async || current_user(&web).await;

    web.batch_execute("begin; savepoint one").await?;
    authenticate(&web, &a).await?;
    web.batch_execute("savepoint two").await?;
    authenticate(&web, &b).await?;
    web.batch_execute("savepoint three").await?;
    authenticate(&web, &c).await?;
    assert_eq!(user().await?.as_deref(), Some("c"));
    web.batch_execute("rollback to three").await?;
    assert_eq!(user().await?.as_deref(), Some("b"));
    web.batch_execute("release three").await?;
    assert_eq!(user().await?.as_deref(), Some("b"));
    web.batch_execute("release two").await?;
    assert_eq!(user().await?.as_deref(), Some("b"));
    web.batch_execute("savepoint four").await?;
    authenticate(&web, &c).await?;
    web.batch_execute("release four").await?;
    assert_eq!(user().await?.as_deref(), Some("c"));
    web.batch_execute("rollback to one").await?;
    assert_eq!(user().await?, None);
    // Rolling back to the same savepoint again changes nothing.
    web.batch_execute("rollback to one").await?;
    assert_eq!(user().await?, None);
    authenticate(&web, &b).await?;
    web.batch_execute("savepoint five").await?;
    error(web.batch_execute("select 1 / 0").await);
    web.batch_execute("rollback to five").await?;
    assert_eq!(user().await?.as_deref(), Some("b"));
    web.batch_execute("release one; commit").await?;
    assert_eq!(user().await?, None);
    Ok(())
}

#[tokio::test]
async fn an_error_caught_in_plpgsql_undoes_an_authentication_in_its_block() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    owner
        .batch_execute(
            "create schema caught;
             create function caught.inside(outer_token text, inner_token text) returns text[] language plpgsql as $$
                 declare seen text[];
                 begin
                     if outer_token is not null then
                         perform tollgate.authenticate(outer_token);
                     end if;
                     begin
                         perform tollgate.authenticate(inner_token);
                         seen := seen || tollgate.current_user_id();
                         perform 1 / 0;
                     exception when division_by_zero then
                         seen := seen || tollgate.current_user_id();
                     end;
                     return seen || tollgate.current_user_id();
                 end $$;
             create function caught.refusal(good text, bad text) returns text language plpgsql as $$
                 begin
                     perform tollgate.authenticate(good);
                     begin
                         perform tollgate.authenticate(bad);
                     exception when invalid_authorization_specification then
                         null;
                     end;
                     return tollgate.current_user_id();
                 end $$;
             create function caught.released(token text) returns text language plpgsql as $$
                 begin
                     begin
                         perform tollgate.authenticate(token);
                     exception when others then
                         raise;
                     end;
                     return tollgate.current_user_id();
                 end $$;
             grant usage on schema caught to web",
        )
        .await?;
    let outer = issue(&owner, "outer", &[]).await?.token;
    let inner = issue(&owner, "inner", &[]).await?.token;
    for (outer_token, before) in [(Some(inner.as_str()), Some("inner")), (None, None)] {
        web.batch_execute("begin").await?;
        let row = web.query_one("select caught.inside($1, $2)", &[&outer_token, &inner]).await?;
        let seen: Vec<Option<&str>> = row.get(0);
        assert_eq!(seen, [Some("inner"), before, before]);
        assert_eq!(current_user(&web).await?.as_deref(), before, "after the function");
        web.batch_execute("commit").await?;
    }
    web.batch_execute("begin").await?;
    let row = web.query_one("select caught.refusal($1, 'junk')", &[&outer]).await?;
    assert_eq!(row.get::<_, Option<&str>>(0), Some("outer"));
    web.batch_execute("commit; begin").await?;
    let row = web.query_one("select caught.released($1)", &[&inner]).await?;
    assert_eq!(row.get::<_, Option<&str>>(0), Some("inner"), "no error, nothing undone");
    assert_eq!(current_user(&web).await?.as_deref(), Some("inner"));
    web.batch_execute("commit").await?;
    Ok(())
}

#[tokio::test]
async fn a_prepared_transaction_takes_no_identity_with_it() -> Result<()> {
    let World { owner, web, cluster } = SHARED.world().await?;
    let token = issue(&owner, "two phases", &[]).await?;
    for end in ["commit prepared 'context'", "rollback prepared 'context'"] {
        web.batch_execute("begin").await?;
        authenticate(&web, &token.token).await?;
        assert_eq!(current_user(&web).await?.as_deref(), Some("two phases"));
        web.batch_execute("prepare transaction 'context'").await?;
        assert_eq!(identity(&web).await?, None, "after PREPARE TRANSACTION");
        web.batch_execute("begin").await?;
        assert_eq!(identity(&web).await?, None);
        web.batch_execute("commit").await?;
        let other = cluster.connect("web", DATABASE).await?;
        other.batch_execute(end).await?;
        assert_eq!(identity(&other).await?, None, "{end}");
        assert_eq!(identity(&web).await?, None, "{end}");
    }
    Ok(())
}

#[tokio::test]
async fn it_stays_after_functions_with_settings_and_owners_of_their_own() -> Result<()> {
    let World { owner, web, cluster } = SHARED.world().await?;
    owner
        .batch_execute(
            "create schema wrapped;
             create role wrapped_web login;
             create function wrapped.log_in(token text) returns text language plpgsql security definer
                 set search_path = pg_catalog, pg_temp set work_mem = '1MB' as $$
                 begin
                     perform tollgate.authenticate(token);
                     return tollgate.current_user_id();
                 end $$;
             create function wrapped.log_in_deeper(token text) returns text language sql
                 set work_mem = '2MB' as 'select wrapped.log_in(token)';
             create procedure wrapped.in_two_parts(token text, inout seen text[]) language plpgsql as $$
                 begin
                     perform tollgate.authenticate(token);
                     seen := array[tollgate.current_user_id()];
                     commit;
                     seen := seen || tollgate.current_user_id();
                 end $$;
             grant usage on schema wrapped to public",
        )
        .await?;
    let token = issue(&owner, "wrapped", &[]).await?.token;
    for caller in ["wrapped.log_in", "wrapped.log_in_deeper"] {
        web.batch_execute("begin").await?;
        let row = web.query_one(&format!("select {caller}($1)"), &[&token]).await?;
        assert_eq!(row.get::<_, Option<&str>>(0), Some("wrapped"));
        assert_eq!(current_user(&web).await?.as_deref(), Some("wrapped"), "after {caller}");
        web.batch_execute("commit").await?;
        assert_eq!(identity(&web).await?, None);
    }
    // Before 16, superusers may hide the identity from functions that only they may call.
    let nameless = "create function wrapped.nameless() returns text language sql
        set tollgate.context = '' as 'select tollgate.current_user_id()'";
    if cluster.major() >= 16 {
        refused(owner.batch_execute(nameless).await, &SqlState::FEATURE_NOT_SUPPORTED);
    } else {
        owner.batch_execute(nameless).await?;
        owner.batch_execute("begin").await?;
        authenticate(&owner, &token).await?;
        assert_eq!(value::<Option<String>>(&owner, "select wrapped.nameless()").await?, None);
        assert_eq!(current_user(&owner).await?.as_deref(), Some("wrapped"), "given back");
        owner.batch_execute("commit").await?;
    }
    let row = web.query_one("call wrapped.in_two_parts($1, null)", &[&token]).await?;
    assert_eq!(row.get::<_, Vec<Option<&str>>>(0), [Some("wrapped"), None], "across COMMIT in a procedure");
    Ok(())
}

#[tokio::test]
async fn it_stays_while_roles_change() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    owner.batch_execute("create role clerk_of_web; grant clerk_of_web to web").await?;
    let token = issue(&owner, "constant", &[]).await?.token;
    web.batch_execute("begin").await?;
    authenticate(&web, &token).await?;
    for change in [
        "set local role clerk_of_web",
        "reset role",
        "set role clerk_of_web",
        "set session authorization default",
    ] {
        web.batch_execute(change).await?;
        assert_eq!(current_user(&web).await?.as_deref(), Some("constant"), "{change}");
    }
    web.batch_execute("commit").await?;
    // The session's role outlives the transaction, the identity does not.
    assert_eq!(identity(&web).await?, None);
    web.batch_execute("reset role").await?;
    Ok(())
}

#[tokio::test]
async fn a_deferred_trigger_still_sees_the_identity() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    owner
        .batch_execute(
            "create schema deferred;
             create table deferred.rows (n int);
             create table deferred.log (who text);
             create function deferred.note() returns trigger language plpgsql security definer as $$
                 begin insert into deferred.log values (tollgate.current_user_id()); return null; end $$;
             create constraint trigger note after insert on deferred.rows
                 deferrable initially deferred for each row execute function deferred.note();
             grant usage on schema deferred to web;
             grant insert on deferred.rows to web",
        )
        .await?;
    let token = issue(&owner, "deferred", &[]).await?.token;
    web.batch_execute("begin").await?;
    authenticate(&web, &token).await?;
    web.batch_execute("insert into deferred.rows values (1); commit; insert into deferred.rows values (2)")
        .await?;
    let log = owner.query("select who from deferred.log", &[]).await?;
    let log: Vec<Option<&str>> = log.iter().map(|row| row.get(0)).collect();
    assert_eq!(log, [Some("deferred"), None]);
    Ok(())
}

// ---- Row-level security

/// A table of `rows` posts by two users, each of whom sees their own.
async fn posts(owner: &Client, schema: &str, rows: u32) -> Result<()> {
    owner
        .batch_execute(&format!(
            "create schema {schema};
             create table {schema}.posts (id int, author text, body text);
             insert into {schema}.posts
                 select n, case n % 3 when 0 then 'anna' when 1 then 'bert' else 'carl' end, md5(n::text)
                 from generate_series(1, {rows}) n;
             alter table {schema}.posts enable row level security;
             create policy own on {schema}.posts for select to web using
                 ((select tollgate.token_has_scope('posts:read')) and author = (select tollgate.current_user_id()));
             grant usage on schema {schema} to web;
             grant select on {schema}.posts to web"
        ))
        .await?;
    owner.batch_execute(&format!("vacuum analyze {schema}.posts")).await?;
    Ok(())
}

#[tokio::test]
async fn each_identity_sees_the_rows_that_its_policies_allow() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    posts(&owner, "policies", 9).await?;
    let anna = issue(&owner, "anna", &["posts:*"]).await?.token;
    let bert = issue(&owner, "bert", &["users:read"]).await?.token;
    let ids = async || -> Result<Vec<i32>> {
        let rows = web.query("select id from policies.posts order by id", &[]).await?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    };
    assert!(ids().await?.is_empty());
    web.batch_execute("begin").await?;
    authenticate(&web, &anna).await?;
    assert_eq!(ids().await?, [3, 6, 9]);
    web.batch_execute("commit; begin").await?;
    // The same prepared statement, another identity.
    authenticate(&web, &bert).await?;
    assert!(ids().await?.is_empty());
    web.batch_execute("commit").await?;
    assert!(ids().await?.is_empty());
    Ok(())
}

#[tokio::test]
async fn a_cursor_held_beyond_its_transaction_keeps_the_rows_of_its_identity() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    posts(&owner, "held", 9).await?;
    let bert = issue(&owner, "bert", &["posts:read"]).await?.token;
    web.batch_execute("begin").await?;
    authenticate(&web, &bert).await?;
    web.batch_execute("declare own cursor with hold for select id from held.posts order by id").await?;
    web.batch_execute("commit").await?;
    assert_eq!(identity(&web).await?, None);
    let rows = web.query("fetch all from own", &[]).await?;
    assert_eq!(rows.iter().map(|row| row.get(0)).collect::<Vec<i32>>(), [1, 4, 7]);
    web.batch_execute("close own").await?;

    // Without an identity a held cursor has nothing to keep.
    web.batch_execute("begin; declare none cursor with hold for select id from held.posts; commit").await?;
    assert!(web.query("fetch all from none", &[]).await?.is_empty());
    Ok(())
}

#[tokio::test]
async fn a_condition_on_a_constant_scope_is_a_one_time_filter() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    owner
        .batch_execute(
            "create schema gated;
             create table gated.posts as select n as id from generate_series(1, 1000) n;
             create view gated.readable as select * from gated.posts where tollgate.token_has_scope('posts:read');
             grant usage on schema gated to web;
             grant select on gated.readable to web",
        )
        .await?;
    let explain = "explain (analyze, costs off, timing off, summary off) select * from gated.readable";
    let plan = plan_of(&web, explain).await?;
    assert!(plan.contains("One-Time Filter: tollgate.token_has_scope('posts:read'::text)"), "{plan}");
    assert!(plan.contains("(never executed)"), "{plan}");

    let token = issue(&owner, "gated", &["posts:read"]).await?.token;
    web.batch_execute("begin").await?;
    authenticate(&web, &token).await?;
    let plan = plan_of(&web, explain).await?;
    assert!(plan.contains("One-Time Filter") && !plan.contains("(never executed)"), "{plan}");
    assert_eq!(value::<i64>(&web, "select count(*) from gated.readable").await?, 1000);
    web.batch_execute("commit").await?;
    Ok(())
}

/// PostgreSQL evaluates a policy for each scanned row, unless it is a sub-select.
#[tokio::test]
async fn a_policy_on_a_constant_scope_in_a_sub_select_is_evaluated_once() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    owner
        .batch_execute(
            "create schema once;
             create table once.posts as select n as id from generate_series(1, 1000) n;
             alter table once.posts enable row level security;
             create policy readers on once.posts for select to web
                 using ((select tollgate.token_has_scope('posts:read')));
             grant usage on schema once to web;
             grant select on once.posts to web",
        )
        .await?;
    let token = issue(&owner, "once", &["posts:read"]).await?.token;
    for (token, expected) in [(None, 0), (Some(token), 1000)] {
        web.batch_execute("begin").await?;
        if let Some(token) = token {
            authenticate(&web, &token).await?;
        }
        let explain =
            "explain (analyze, verbose, costs off, timing off, summary off) select * from once.posts";
        let plan = plan_of(&web, explain).await?;
        let lines: Vec<&str> = plan.lines().map(str::trim).collect();
        let at = lines.iter().position(|line| line.starts_with("InitPlan 1")).context(plan.clone())?;
        assert!(lines[at + 1].contains("loops=1)"), "{plan}");
        assert_eq!(lines[at + 2], "Output: tollgate.token_has_scope('posts:read'::text)", "{plan}");
        assert_eq!(plan.matches("token_has_scope").count(), 1, "{plan}");
        assert_eq!(value::<i64>(&web, "select count(*) from once.posts").await?, expected);
        web.batch_execute("commit").await?;
    }
    Ok(())
}

async fn plan_of(client: &Client, explain: &str) -> Result<String> {
    let lines = client.query(explain, &[]).await?;
    Ok(lines.iter().map(|line| line.get::<_, String>(0)).collect::<Vec<_>>().join("\n"))
}

// ---- Parallel workers

const PARALLEL: &str = "
    set parallel_setup_cost = 0; set parallel_tuple_cost = 0; set min_parallel_table_scan_size = 0;
    set max_parallel_workers_per_gather = 2; set parallel_leader_participation = off";
const SERIAL: &str = "set max_parallel_workers_per_gather = 0";

#[tokio::test]
async fn a_parallel_plan_under_row_security_returns_the_same_rows_as_a_serial_one() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    posts(&owner, "parallel", 30_000).await?;
    let anna = issue(&owner, "anna", &["posts:read"]).await?.token;
    let bert = issue(&owner, "bert", &["posts:*"]).await?.token;
    let carl = issue(&owner, "carl", &["users:read"]).await?.token;
    let query = "select count(*), md5(string_agg(id || author || body, ',' order by id)) from parallel.posts
                 where tollgate.token_has_any_scope('{posts:read}')";
    let explain = format!("explain (analyze, costs off, timing off, summary off) {query}");
    let rows = async |settings: &str| -> Result<(i64, Option<String>)> {
        web.batch_execute(settings).await?;
        let row = web.query_one(query, &[]).await?;
        Ok((row.get(0), row.get(1)))
    };
    for (token, expected) in [(Some(&anna), 10_000), (Some(&bert), 10_000), (Some(&carl), 0), (None, 0)] {
        web.batch_execute("begin").await?;
        if let Some(token) = token {
            authenticate(&web, token).await?;
        }
        let serial = rows(SERIAL).await?;
        let parallel = rows(PARALLEL).await?;
        assert_eq!(serial.0, expected);
        assert_eq!(parallel, serial);
        if expected > 0 {
            let plan = plan_of(&web, &explain).await?;
            assert!(launched(&plan) > 0, "no worker took part:\n{plan}");
        }
        web.batch_execute("rollback").await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_worker_sees_the_identity_of_its_leader_at_that_moment() -> Result<()> {
    let World { owner, web, cluster } = SHARED.world().await?;
    let force = if cluster.major() >= 16 { "debug_parallel_query" } else { "force_parallel_mode" };
    let a = issue(&owner, "a, with 'quotes' and ☃", &["posts:read"]).await?;
    let b = issue(&owner, "b", &["users:*"]).await?;
    web.batch_execute(&format!("{PARALLEL}; set {force} = on")).await?;
    let explain = "explain (analyze, costs off, timing off, summary off)
        select tollgate.current_token_id(), tollgate.current_user_id(), tollgate.current_scopes()";
    let in_worker = async || -> Result<Option<Identity>> {
        let plan = plan_of(&web, explain).await?;
        assert_eq!(launched(&plan), 1, "not in a worker:\n{plan}");
        identity(&web).await
    };
    assert_eq!(in_worker().await?, None);
    web.batch_execute("begin").await?;
    authenticate(&web, &a.token).await?;
    let seen = in_worker().await?.context("an identity")?;
    assert_eq!((seen.token_id, seen.user_id.as_str()), (a.id, "a, with 'quotes' and ☃"));
    // The worker has bound nothing, and the leader is still bound.
    assert_bound(&web, &b.token).await?;
    assert_eq!(in_worker().await?.map(|identity| identity.token_id), Some(a.id));
    web.batch_execute("rollback; begin; savepoint s").await?;
    assert_eq!(in_worker().await?, None);
    authenticate(&web, &b.token).await?;
    let seen = in_worker().await?.context("an identity")?;
    assert_eq!((seen.token_id, seen.scopes), (b.id, vec!["users:*".into()]));
    web.batch_execute("rollback to s").await?;
    assert_eq!(in_worker().await?, None);
    authenticate(&web, &b.token).await?;
    assert_eq!(in_worker().await?.map(|identity| identity.token_id), Some(b.id));
    web.batch_execute("commit").await?;
    assert_eq!(in_worker().await?, None);
    Ok(())
}

#[tokio::test]
async fn verifying_is_never_done_in_a_worker() -> Result<()> {
    let World { owner, web, cluster } = SHARED.world().await?;
    posts(&owner, "unsafe", 3000).await?;
    let token = issue(&owner, "anna", &["posts:read"]).await?.token;
    owner.batch_execute("alter table unsafe.posts disable row level security").await?;
    web.batch_execute(PARALLEL).await?;
    for function in ["verify_api_token", "authenticate"] {
        let plan = plan_of(
            &web,
            &format!("explain (costs off) select count(*) from unsafe.posts where (tollgate.{function}(body)).valid"),
        )
        .await?;
        assert!(!plan.contains("Gather"), "{plan}");
    }

    // A wrapper that claims otherwise gets an error, and the server goes on.
    owner
        .batch_execute(
            "create function unsafe.wrapper(token text) returns text language plpgsql parallel safe as
                 'begin return (tollgate.authenticate(token)).code; end';
             grant execute on function unsafe.wrapper to web",
        )
        .await?;
    let started: String = value(&owner, "select pg_postmaster_start_time()::text").await?;
    let wrapped = format!("select count(*) from unsafe.posts where unsafe.wrapper('{token}') = body");
    let error = error(web.query(&wrapped, &[]).await);
    assert!(error.message().contains("parallel"), "{error:?}");
    assert_eq!(identity(&web).await?, None);
    assert_eq!(common::code(&web, &token).await?, "VALID", "in the same session");
    assert_eq!(value::<String>(&owner, "select pg_postmaster_start_time()::text").await?, started);
    assert!(!cluster.log().contains("was terminated by signal"), "{}", cluster.log());
    Ok(())
}

/// The number of workers in a plan shown by EXPLAIN ANALYZE.
fn launched(plan: &str) -> u32 {
    plan.lines()
        .filter_map(|line| line.trim().strip_prefix("Workers Launched: "))
        .filter_map(|count| count.parse::<u32>().ok())
        .sum()
}
