//! No token, and no part of one, appears where it does not belong: whatever is called, with a token in any argument, by
//! a role that has the capability and uses bind values, on a server that logs everything it can.

use crate::calls;
use std::collections::HashSet;

use crate::common::{self, Token, text_of};
use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use tokio_postgres::types::ToSql;
use tokio_postgres::{AsyncMessage, Client};
use tollgate_tests::{Cluster, DATABASE};

/// Length of a part of a token that must not be visible.
const PART: usize = 16;

/// Texts that others may read, and where each was found.
#[derive(Default)]
struct VisibleTexts(Vec<(String, String)>);

impl VisibleTexts {
    fn add(&mut self, place: &str, text: impl Into<String>) {
        self.0.push((place.to_owned(), text.into()));
    }

    /// The texts that contain a part of any of these secrets.
    fn leaks(&self, secrets: &[String]) -> Vec<&(String, String)> {
        let parts_of = |length: usize| -> HashSet<&[u8]> {
            secrets.iter().flat_map(|secret| secret.as_bytes().windows(length)).collect()
        };
        // Any part contains one of the halves into which the text is cut: looking for those alone is much faster.
        let (parts, halves) = (parts_of(PART), parts_of(PART / 2));
        self.0
            .iter()
            .filter(|(_, text)| text.as_bytes().chunks_exact(PART / 2).any(|half| halves.contains(half)))
            .filter(|(_, text)| text.as_bytes().windows(PART).any(|part| parts.contains(part)))
            .collect()
    }
}

/// A session whose every statement is watched.
struct Watched {
    client: Client,
    messages: tokio::sync::mpsc::UnboundedReceiver<AsyncMessage>,
    /// A superuser's session.
    watcher: Client,
    visible: VisibleTexts,
    secrets: Vec<String>,
}

impl Watched {
    /// Runs a statement and records what anyone but its caller may see of it. True if it succeeded.
    async fn run(&mut self, statement: &str, values: &[&(dyn ToSql + Sync)]) -> Result<bool> {
        let answer = self.client.query(statement, values).await;
        let succeeded = answer.is_ok();
        match answer {
            Ok(rows) => {
                let issued =
                    rows.iter().filter(|row| row.columns().iter().any(|column| column.name() == "token"));
                self.secrets.extend(issued.map(|row| row.get::<_, String>("token")));
            }
            Err(error) => {
                let error = error.as_db_error().with_context(|| format!("{statement}: {error}"))?.clone();
                self.visible.add(statement, text_of(&error));
                self.visible.add(statement, format!("{error:?}"));
            }
        }
        while let Ok(message) = self.messages.try_recv() {
            if let AsyncMessage::Notice(notice) = message {
                self.visible.add(statement, format!("{notice:?}"));
            }
        }
        let activity = "select coalesce(string_agg(a::text, E'\n'), '') from pg_stat_activity a";
        self.visible.add(
            &format!("pg_stat_activity, after {statement}"),
            common::value::<String>(&self.watcher, activity).await?,
        );
        Ok(succeeded)
    }

    async fn issue(&mut self) -> Result<Token> {
        let issued = common::issue(&self.client, "clerk", &["posts:read"]).await?;
        self.secrets.push(issued.token.clone());
        Ok(issued)
    }
}

/// One argument of a function, with a valid value.
struct Argument {
    name: String,
    data_type: String,
}

impl Argument {
    fn in_order(&self) -> &'static str {
        match self.data_type.as_str() {
            "text" | "name" => "'posts:read'",
            "text[]" => "'{posts:read}'",
            "jsonb" => "'{}'",
            "bytea" => r"'\x00'",
            "uuid" => "'00000000-0000-0000-0000-000000000005'",
            "boolean" => "true",
            "integer" | "bigint" => "1",
            "bigint[]" => "'{}'",
            "interval" => "'1 day'",
            "timestamp with time zone" => "now()",
            "inet" => "'10.0.0.1'",
            "inet[]" => "'{10.0.0.1}'",
            "cidr" => "'10.0.0.0/8'",
            "cidr[]" => "'{10.0.0.0/8}'",
            "regrole" => "'colleague'",
            "regclass" => "'pg_class'",
            "tollgate.usage_row[]" => "'{}'",
            "tollgate.event_cursor" => "'(00000000-0000-0000-0000-000000000000,1:1:,,,,,)'",
            other => panic!("say in leaks.rs what to pass for an argument of type {other}"),
        }
    }

    /// The token in every form that fits this argument; empty if no text does.
    fn holding(&self, text: &str) -> Vec<Box<dyn ToSql + Sync>> {
        match self.data_type.as_str() {
            "text" | "name" => vec![Box::new(text.to_owned())],
            "text[]" => vec![Box::new(vec![text.to_owned()]), Box::new(vec![None, Some(text.to_owned())])],
            "bytea" => vec![Box::new(text.as_bytes().to_vec())],
            "jsonb" => vec![
                Box::new(json!(text)),
                Box::new(json!([text])),
                Box::new(json!({ text: text })),
                Box::new(
                    json!({"name": text, "scopes": [text], "expires_at": text, "allowed_ips": [text], "rate_window": text}),
                ),
            ],
            _ => Vec::new(),
        }
    }

    fn placeholder(&self) -> String {
        if self.data_type == "name" { "$1::text::name".to_owned() } else { format!("$1::{}", self.data_type) }
    }
}

/// Every granted function, with its arguments.
async fn functions(owner: &Client) -> Result<Vec<(String, Vec<Argument>)>> {
    let rows = owner
        .query(
            "select p.oid::regproc::text,
                    array(select jsonb_build_array(coalesce(p.proargnames[n], ''), format_type(t, null))
                          from unnest(p.proargtypes) with ordinality a (t, n) order by n)
             from pg_proc p
             where p.oid in (select d.object::regprocedure from tollgate.privilege_decisions d
                             where d.object_type = 'FUNCTION' and d.given_to <> 'internal')",
            &[],
        )
        .await?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    Ok(rows
        .iter()
        .map(|row| {
            let arguments: Vec<Value> = row.get(1);
            let arguments =
                arguments.iter().map(|one| Argument { name: text(&one[0]), data_type: text(&one[1]) });
            (row.get(0), arguments.collect())
        })
        .collect())
}

/// Forms in which a token is passed by mistake.
fn misshapen(token: &str) -> [String; 6] {
    [
        token.to_owned(),
        format!("Bearer {token}"),
        token[..token.len() - 1].to_owned(),
        token.to_uppercase(),
        format!("{{\"{token}\"}}"),
        token.repeat(12),
    ]
}

#[tokio::test]
async fn no_token_and_no_part_of_one_is_visible_to_anyone_but_the_caller() -> Result<()> {
    let cluster = common::start(
        Cluster::builder()
            .preload(false)
            .setting("shared_preload_libraries", "tollgate,pg_stat_statements")
            .setting("pg_stat_statements.track", "all")
            .setting("log_statement", "all")
            .setting("log_min_duration_statement", "0")
            .setting("log_min_messages", "debug2")
            .setting("log_min_error_statement", "debug5")
            .setting("log_error_verbosity", "verbose")
            .setting("log_parameter_max_length", "-1")
            .setting("log_parameter_max_length_on_error", "-1")
            .setting("track_activity_query_size", "32kB"),
    )?;
    let owner = cluster.connect("postgres", DATABASE).await?;
    owner
        .batch_execute(
            "create extension pg_stat_statements; create role teller login; create role colleague login; create role careless login;
             select tollgate.grant_capability('teller', c) from unnest('{admin,operator,key_fetcher,gateway}'::text[]) c;
             grant execute on function tollgate.verify_api_token to careless",
        )
        .await?;
    let (client, messages) = cluster.listen("teller", DATABASE).await?;
    client.batch_execute(calls::PREPARATION).await?;
    client.batch_execute("set client_min_messages = debug2").await?;
    let mut watched =
        Watched { client, messages, watcher: owner, visible: VisibleTexts::default(), secrets: Vec::new() };

    // Each function as it is meant to be called.
    for (function, call) in calls::all(&watched.watcher).await? {
        let token = watched.issue().await?;
        let bound = calls::filled(&call.replace("'{token}'", "$1"), &token, "colleague");
        let values: &[&(dyn ToSql + Sync)] = if bound.contains("$1") { &[&token.token] } else { &[] };
        assert!(
            watched.run(&bound, values).await?,
            "{function}: {:?}",
            watched.visible.0.iter().rev().find(|(p, _)| *p == bound)
        );
    }

    // Each with a token in every argument that can take one, with valid other arguments and without. Then once more with
    // the same token, because one function may show what another stored under it.
    let token = watched.issue().await?.token;
    watched.secrets.push(token.to_uppercase());
    let functions = functions(&watched.watcher).await?;
    let mut refusals = 0;
    let both_times = functions.iter().map(|one| (one, true)).chain(functions.iter().map(|one| (one, false)));
    for ((function, arguments), is_first) in both_times {
        for (n, argument) in arguments.iter().enumerate() {
            for shape in misshapen(&token) {
                for value in argument.holding(&shape) {
                    for in_order in [true, false].into_iter().take(if is_first { 2 } else { 1 }) {
                        let passed =
                            arguments.iter().enumerate().map(|(i, other)| match (i == n, in_order) {
                                (true, _) => argument.placeholder(),
                                (false, true) => other.in_order().to_owned(),
                                (false, false) => format!("null::{}", other.data_type),
                            });
                        let passed = passed.collect::<Vec<_>>().join(", ");
                        let statement = format!("select * from {function}({passed}) /* {} */", argument.name);
                        refusals += usize::from(!watched.run(&statement, &[&*value]).await?);
                        if !is_first {
                            continue;
                        }
                        // In a read-only transaction the messages differ.
                        watched.client.batch_execute("begin read only").await?;
                        watched.run(&statement, &[&*value]).await?;
                        watched.client.batch_execute("rollback").await?;
                    }
                }
            }
        }
    }
    assert!(refusals > 50, "only {refusals} calls were refused");

    // Our settings take a value as well, and PostgreSQL words the refusal.
    for setting in ["tollgate.token_prefix", "tollgate.context", "tollgate.no_such"] {
        let token = watched.issue().await?.token;
        assert!(!watched.run("select set_config($1, $2, false)", &[&setting, &token]).await?);
    }

    let statements = "select string_agg(query, E'\n') from pg_stat_statements";
    let statements: String = common::value(&watched.watcher, statements).await?;
    assert!(
        statements.contains("tollgate.authenticate($1"),
        "pg_stat_statements does not see it: {statements}"
    );
    watched.visible.add("pg_stat_statements", statements);

    // For roles without a capability everything is logged, so tokens would appear here.
    let careless = cluster.connect("careless", DATABASE).await?;
    let decoy = watched.issue().await?.token;
    watched.secrets.pop();
    careless.query("select * from tollgate.verify_api_token($1)", &[&decoy]).await?;
    let log = cluster.log();
    assert!(log.contains(&decoy), "the log shows no bind values at all");
    assert!(log.contains("the token was refused"), "the log shows no errors");
    for line in log.lines() {
        watched.visible.add("the log", line);
    }

    let leaks = watched.visible.leaks(&watched.secrets);
    assert!(
        leaks.is_empty(),
        "{} of {} texts: {:#?}",
        leaks.len(),
        watched.visible.0.len(),
        &leaks[..leaks.len().min(20)]
    );
    Ok(())
}

// ---- auto_explain

/// A plan made for given bind values contains them as constants, and auto_explain logs plans.
#[tokio::test]
async fn auto_explain_logs_tokens_where_the_documents_say_and_nowhere_else() -> Result<()> {
    let builder = Cluster::builder()
        .preload(false)
        .setting("shared_preload_libraries", "tollgate,auto_explain")
        .setting("auto_explain.log_min_duration", "0")
        .setting("auto_explain.log_nested_statements", "on");
    let builder = if tollgate_tests::Install::under_test()?.major >= 16 {
        builder.setting("auto_explain.log_parameter_max_length", "0")
    } else {
        builder
    };
    let cluster = common::start(builder)?;
    let owner = cluster.connect("postgres", DATABASE).await?;
    owner
        .batch_execute(
            "create role colleague login; create table posts as select 1 as id;
             create function logged_in(token text) returns text language plpgsql as $$
                 declare answer tollgate.verification;
                 begin
                     answer := tollgate.authenticate(token);
                     return answer.user_id;
                 end $$",
        )
        .await?;
    // For a statement with a new token: whether the log contains the token, and whether it contains the statement.
    let log_of = async |statement: &str, settings: &str| -> Result<(bool, bool)> {
        let session = cluster.connect("postgres", DATABASE).await?;
        session.batch_execute(calls::PREPARATION).await?;
        session.batch_execute(settings).await?;
        let token = common::issue(&owner, "clerk", &["posts:read"]).await?;
        let statement = calls::replaced(statement, &token, "colleague");
        let before = cluster.log().len();
        let values: &[&(dyn ToSql + Sync)] = if statement.contains("$1") { &[&token.token] } else { &[] };
        session.query(&statement, values).await.with_context(|| statement.clone())?;
        let log = cluster.log().split_off(before);
        let mut visible = VisibleTexts::default();
        visible.add(&statement, log.as_str());
        Ok((!visible.leaks(&[token.token]).is_empty(), log.contains(&statement)))
    };

    // Without log_verbose no call shows the token,
    for (function, call) in calls::all(&owner).await? {
        let statement = format!("select * from tollgate.{}", call.replace("'{token}'", "$1"));
        let (leaks, written) = log_of(&statement, "").await?;
        assert!(written, "auto_explain did not write {function}");
        assert!(!leaks, "{function}");
    }
    // and with it these do, which are the forms that the documents show. Within PL/pgSQL an expression has no plan.
    let verbose = "set auto_explain.log_verbose = on";
    for statement in [
        "select * from tollgate.authenticate($1)",
        "select user_id from tollgate.authenticate($1, client_ip => '10.0.0.1')",
        "select valid, code from tollgate.verify_api_token($1, '{posts:read}') v where v.valid",
        "select p.id from posts p left join tollgate.verify_api_token($1) v on v.valid",
        "with a as materialized (select valid from tollgate.authenticate($1)) select from posts where (select valid from a)",
    ] {
        assert_eq!(log_of(statement, verbose).await?, (false, true), "{statement}");
    }
    // The plans within our own functions: the token is passed to them by a setting, which appears in no plan.
    let token = common::issue(&owner, "clerk", &["posts:read"]).await?.token;
    owner.query("select set_config('my.token', $1, false)", &[&token]).await?;
    owner.batch_execute("set auto_explain.log_verbose = on").await?;
    let before = cluster.log().len();
    for call in [
        "authenticate(t)",
        "verify_api_token(t)",
        "token_has_scope(t, 'posts:read')",
        "derive_api_token(t, 'n', '{posts:read}', '1 day')",
        "revoke_presented_token(t)",
    ] {
        owner
            .batch_execute(&format!(
                "do $$ declare t text := current_setting('my.token'); x text; begin x := tollgate.{call}; end $$"
            ))
            .await?;
    }
    let nested = cluster.log().split_off(before);
    assert!(nested.contains("tollgate.lock_token"), "the nested statements are not there: {nested}");
    let mut visible = VisibleTexts::default();
    nested.lines().for_each(|line| visible.add("a nested statement", line));
    assert!(visible.leaks(&[token]).is_empty(), "{nested}");

    // The cases that the documents warn of.
    for (statement, settings) in [
        ("select from posts where tollgate.token_has_scope($1, 'posts:read')", ""),
        ("select from posts where (tollgate.verify_api_token($1)).valid", ""),
        ("select tollgate.authenticate($1)", verbose),
        ("select tollgate.revoke_presented_token($1)", verbose),
        ("select token from tollgate.derive_api_token($1, 'n', '{}', null)", verbose),
        ("select * from tollgate.authenticate($1) with ordinality", verbose),
        ("select a from tollgate.authenticate($1) a", verbose),
        ("select logged_in($1)", verbose),
        ("select set_config('request.headers', $1, true)", verbose),
    ] {
        assert_eq!(log_of(statement, settings).await?, (true, true), "{statement}");
        let generic = format!("{settings}; set plan_cache_mode = force_generic_plan");
        assert_eq!(log_of(statement, &generic).await?, (false, true), "a generic plan of {statement}");
    }
    Ok(())
}
