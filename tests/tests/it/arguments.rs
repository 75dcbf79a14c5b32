//! Every argument of every granted function, as the catalogue lists them: none accepts a token except those meant for
//! presenting one, where guesses are counted and logged.

use std::collections::{BTreeMap, BTreeSet};

use crate::common::{self, Request, issue, text_of, value};
use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use tollgate_tests::{Cluster, DATABASE};

/// Arguments that take a presented token or its digest.
const PRESENTED: [(&str, &str); 17] = [
    ("admit_event_reader", "token_hash"),
    ("authenticate", "token"),
    ("client_credentials", "assertion"),
    ("client_credentials", "secret"),
    ("derive_api_token", "parent"),
    // Of the two, the last one here is presented below.
    ("exchange_token", "actor_token"),
    ("exchange_token", "subject_token"),
    ("introspect_token", "token"),
    ("refresh_session", "refresh_token"),
    ("revoke_access_token", "token"),
    ("revoke_presented_token", "token"),
    ("revoke_token", "token"),
    ("token_has_scope", "token"),
    ("verify_access_token", "token"),
    ("verify_api_token", "token"),
    ("verify_api_token_hash", "token_hash"),
    ("verify_tokens", "tokens"),
];

/// Functions that take signed tokens alone, to which an API token is malformed.
const SIGNED_ALONE: [&str; 2] = ["revoke_access_token", "verify_access_token"];

/// Takes refresh tokens alone, and says what it found in its row.
const REFRESHES: &str = "refresh_session";

/// Accepts a valid token although its address has used up its failed attempts: streams are read from behind proxies,
/// where one client's guesses would lock out the others. Guesses are counted and logged there as everywhere.
const ADMITS_FROM_A_BLOCKED_ADDRESS: &str = "admit_event_reader";

/// Arguments that are answered without being looked up, stored or shown, so that a policy or a verification does not
/// fail.
const ASKED: [(&str, &str); 24] = [
    ("authenticate", "required_scopes"),
    ("client_ip_from", "forwarded"),
    // What the subject has not is not given.
    ("exchange_token", "audience"),
    ("exchange_token", "scopes"),
    ("introspect_token", "hint"),
    // Stored without anything that may be a token: the receiver of a webhook controls part of it.
    ("finish_webhook_delivery", "error"),
    // What another client says of itself is stored without anything that may be a token.
    ("refresh_session", "client_id"),
    ("refresh_session", "scopes"),
    // The same, of a server that keys are fetched from.
    ("note_issuer_failure", "problem"),
    ("require_scope", "scope"),
    ("scope_grants", "granted"),
    ("scope_grants", "required"),
    ("token_has_all_scopes", "scopes"),
    ("token_has_any_scope", "scopes"),
    ("token_has_scope", "scope"),
    ("verify_access_token", "audience"),
    ("verify_access_token", "required_scopes"),
    ("verify_api_token", "required_scopes"),
    ("verify_api_token_hash", "required_scopes"),
    ("verify_tokens", "audiences"),
    ("verify_tokens", "required_scopes"),
    // A URL is no token, and what was signed is all that is stored of it.
    ("verify_signed_url", "method"),
    ("verify_signed_url", "url"),
    // PostgreSQL truncates it to 63 characters, and there is no such column.
    ("attach_users_table", "key_column"),
];

/// Digests that are no token's plaintext, of 32 bytes, and a key, which is sealed.
const DIGESTS: [(&str, &str); 5] = [
    ("advance_subscription", "proof"),
    ("apply_usage", "signature"),
    ("import_api_token", "token_hash"),
    ("store_import_key", "key"),
    ("verify_audit_log", "known_hash"),
];

struct Argument {
    name: String,
    data_type: String,
    has_default: bool,
}

struct Function {
    name: String,
    signature: String,
    arguments: Vec<Argument>,
}

/// All granted functions.
async fn functions(owner: &Client) -> Result<Vec<Function>> {
    let query = "
        select p.proname::text, p.oid::regprocedure::text, coalesce(p.proargnames[a.n], ''), format_type(a.type, null),
               a.n > p.pronargs - p.pronargdefaults
          from (select distinct d.object::regprocedure as oid from tollgate.privilege_decisions d
                 where d.object_type = 'FUNCTION' and d.given_to <> 'internal') g
          join pg_proc p on p.oid = g.oid, unnest(p.proargtypes) with ordinality a (type, n)
         order by p.oid::regprocedure::text, a.n";
    let mut functions: Vec<Function> = Vec::new();
    for row in owner.query(query, &[]).await? {
        let argument = Argument { name: row.get(2), data_type: row.get(3), has_default: row.get(4) };
        let signature: String = row.get(1);
        match functions.last_mut() {
            Some(last) if last.signature == signature => last.arguments.push(argument),
            _ => functions.push(Function { name: row.get(0), signature, arguments: vec![argument] }),
        }
    }
    assert!(functions.len() > 40, "{}", functions.len());
    Ok(functions)
}

/// A valid argument, in SQL.
fn sound(function: &str, argument: &Argument, token: &str) -> String {
    match (function, argument.name.as_str(), argument.data_type.as_str()) {
        (_, "token" | "parent" | "subject_token", _) => format!("'{token}'"),
        ("define_scope", "name", _) => "'clerk:scope'".to_owned(),
        (_, "url", _) => "'https://example.com/'".to_owned(),
        (_, "capability", _) => "'verifier'".to_owned(),
        (_, "role", _) => "'web'".to_owned(),
        (_, "table", _) => "'users'".to_owned(),
        (_, "scope", _) => "'posts:read'".to_owned(),
        (_, _, "text" | "name") => "'clerk'".to_owned(),
        (_, _, "text[]") => "array['posts:read']".to_owned(),
        (_, _, "uuid") => "gen_random_uuid()".to_owned(),
        (_, _, "bytea") => "sha256('')".to_owned(),
        (_, _, "jsonb") => "'{}'".to_owned(),
        (_, _, "interval") => "'1 day'".to_owned(),
        (_, _, "boolean") => "true".to_owned(),
        (_, _, "timestamp with time zone") => "now()".to_owned(),
        (_, _, "inet") => "'192.0.2.1'".to_owned(),
        (_, _, "smallint" | "integer" | "bigint") => "1".to_owned(),
        (_, _, "tollgate.event_cursor") => "tollgate.event_position()".to_owned(),
        (_, _, array) if array.ends_with("[]") => "'{}'".to_owned(),
        (_, name, other) => panic!("{function} takes {name} of type {other}: say here what is sound"),
    }
}

/// A call with one argument set to the expression, and valid values for the others that have no default.
fn call(function: &Function, argument: &str, expression: &str, token: &str) -> String {
    let arguments = function.arguments.iter().filter_map(|one| {
        if one.name == argument {
            Some(format!("\"{}\" => {expression}", one.name))
        } else if one.has_default {
            None
        } else {
            Some(format!("\"{}\" => {}", one.name, sound(&function.name, one, token)))
        }
    });
    format!("select * from tollgate.{}({})", function.name, arguments.collect::<Vec<_>>().join(", "))
}

fn is_listed(list: &[(&str, &str)], function: &Function, argument: &Argument) -> bool {
    list.contains(&(function.name.as_str(), argument.name.as_str()))
}

/// The ways to put a text, `$1`, into an argument of a type; empty if there is none.
fn ways(data_type: &str) -> &'static [&'static str] {
    match data_type {
        "text" | "name" | "character varying" => {
            &["$1::text", "'see ' || $1::text || '.'", "upper($1::text)"]
        }
        "text[]" => &["array[$1::text]", "array['posts:read', 'x' || $1::text]"],
        "jsonb" => &[
            "jsonb_build_object($1::text, 1)",
            "jsonb_build_object('metadata', jsonb_build_object('a', jsonb_build_array(1, jsonb_build_object('b', $1::text))))",
            "jsonb_build_object('a', jsonb_build_array(jsonb_build_object('x' || $1::text, null)))",
        ],
        _ => &[],
    }
}

#[tokio::test]
async fn no_argument_accepts_a_token_and_none_is_repeated_stored_or_logged() -> Result<()> {
    let cluster = common::start(Cluster::builder().setting("tollgate.log_verifications", "all"))?;
    let owner = cluster.connect("postgres", DATABASE).await?;
    owner.batch_execute("create table users (clerk text)").await?;
    let token = issue(&owner, "victim", &["posts:read"]).await?;
    let secret = &token.token[4..];
    // What remains of it in capital letters, where only scope characters are shown.
    let masked = secret.replace(|c: char| c.is_ascii_alphabetic(), "?");
    let shows = |text: &str| {
        let shows_part = |of: &str| (0..of.len() - 16).any(|at| text.contains(&of[at..at + 16]));
        shows_part(&masked) || shows_part(secret) || shows_part(&secret.to_uppercase())
    };
    let (mut tried, mut taken) = (BTreeSet::new(), Vec::new());
    for function in functions(&owner).await? {
        for argument in &function.arguments {
            if is_listed(&PRESENTED, &function, argument) || is_listed(&DIGESTS, &function, argument) {
                continue;
            }
            assert_ne!(argument.data_type, "bytea", "{}: decide about {}", function.signature, argument.name);
            for way in ways(&argument.data_type) {
                let call = call(&function, &argument.name, &as_type(way, &argument.data_type), &token.token);
                // Otherwise its text would be in the statement.
                let (call, own) = match call.split_once(&format!("'{}'", token.token)) {
                    Some((before, after)) => (format!("{before}$2::text{after}"), true),
                    None => (call, false),
                };
                let given: [&(dyn tokio_postgres::types::ToSql + Sync); 2] = [&token.token, &token.token];
                let result = owner.query(&call, &given[..if own { 2 } else { 1 }]).await;
                tried.insert(format!("{}.{}", function.name, argument.name));
                let error = match &result {
                    Ok(_) => None,
                    Err(error) => Some(error.as_db_error().with_context(|| format!("{call}: {error}"))?),
                };
                if let Some(error) = error {
                    assert!(!shows(&text_of(error)), "{call}: {error:?}");
                }
                if !is_listed(&ASKED, &function, argument) {
                    let code = error.map(tokio_postgres::error::DbError::code);
                    if code != Some(&SqlState::INVALID_PARAMETER_VALUE) {
                        taken.push(format!("{call}: {result:?}"));
                    }
                }
            }
        }
    }
    assert!(taken.is_empty(), "{}", taken.join("\n"));
    for (function, argument) in ASKED {
        assert!(tried.contains(&format!("{function}.{argument}")), "{function} takes no {argument}");
    }
    assert!(tried.len() > 40, "{tried:?}");
    let tables = "select c.oid::regclass::text from pg_class c
                  where c.relnamespace = 'tollgate'::regnamespace and c.relkind in ('r', 'p', 'm')";
    for row in owner.query(tables, &[]).await? {
        let table: String = row.get(0);
        let kept: Option<String> =
            value(&owner, &format!("select string_agg(t::text, e'\\n') from {table} t")).await?;
        assert!(!shows(&kept.unwrap_or_default()), "a token in {table}");
    }
    assert!(!shows(&cluster.log()), "a token in the log");
    assert_eq!(common::code(&owner, &token.token).await?, "VALID");
    Ok(())
}

fn as_type(way: &str, data_type: &str) -> String {
    if data_type == "name" { format!("({way})::name") } else { way.to_owned() }
}

/// Texts and JSON in arguments have limits: larger ones are refused with a complete error, or not stored.
#[tokio::test]
async fn every_argument_has_a_limit_of_size_and_depth() -> Result<()> {
    let cluster = common::start(Cluster::builder())?;
    let owner = cluster.connect("postgres", DATABASE).await?;
    owner.batch_execute("create table users (clerk text)").await?;
    let token = issue(&owner, "victim", &["posts:read"]).await?;
    let mut tried = 0;
    for function in functions(&owner).await? {
        for argument in &function.arguments {
            for large in too_much(&argument.data_type) {
                let call = call(&function, &argument.name, large, &token.token);
                tried += 1;
                let Err(error) = owner.query(&call, &[]).await else { continue };
                let error = error.as_db_error().with_context(|| format!("{call}: {error}"))?;
                assert!(text_of(error).len() < 3000, "{call}: {}", text_of(error).len());
                // Functions that look something up just do not find it.
                let class = &error.code().code()[..2];
                assert!(["22", "28", "42", "53", "55"].contains(&class), "{call}: {error:?}");
                assert!(error.hint().is_some() && error.detail().is_some(), "{call}: {error:?}");
            }
        }
    }
    assert!(tried > 60, "{tried}");
    let tables = "select c.oid::regclass::text from pg_class c
                  where c.relnamespace = 'tollgate'::regnamespace and c.relkind in ('r', 'p', 'm')";
    for row in owner.query(tables, &[]).await? {
        let table: String = row.get(0);
        let longest: Option<i32> =
            value(&owner, &format!("select max(octet_length(t::text)) from {table} t")).await?;
        assert!(longest.unwrap_or_default() < 50_000, "a row of {longest:?} bytes in {table}");
    }
    Ok(())
}

/// In SQL.
fn too_much(data_type: &str) -> &'static [&'static str] {
    match data_type {
        "text" => &["repeat('x', 2000000)", "repeat(e'\\n', 2000000)"],
        "text[]" => &["array[repeat('x', 2000000)]", "array_fill('posts:read'::text, '{200000}')"],
        "jsonb" => &[
            "jsonb_build_object('k', repeat('x', 2000000))",
            "jsonb_build_object('metadata', jsonb_build_object('k', repeat('x', 2000000)))",
            "jsonb_build_object(repeat('x', 2000000), 1)",
            "(repeat('{\"metadata\":', 500) || '{}' || repeat('}', 500))::jsonb",
            "('{\"k\": [' || repeat('1e131071,', 10000) || '1]}')::jsonb",
        ],
        _ => &[],
    }
}

#[tokio::test]
async fn keys_and_values_that_only_look_like_a_token_together_are_accepted() -> Result<()> {
    let cluster = common::start(Cluster::builder())?;
    let owner = cluster.connect("postgres", DATABASE).await?;
    let digest = "0123456789abcdef".repeat(4);
    let metadata = json!({ &digest: &digest, "list": [&digest, &digest], "deep": { "d": &digest } });
    let stored = owner
        .query_one(
            "select (tollgate.create_api_token($1, 'n', metadata => $2)).user_id",
            &[&digest, &metadata],
        )
        .await?;
    assert_eq!(stored.get::<_, &str>(0), digest);
    Ok(())
}

#[tokio::test]
async fn guesses_are_counted_and_logged_at_every_function_that_takes_a_token() -> Result<()> {
    let cluster = common::start(
        Cluster::builder()
            .setting("tollgate.failure_rate_limit", "3")
            .setting("tollgate.failure_rate_window", "1h")
            .setting("tollgate.log_verifications", "failures"),
    )?;
    let owner = cluster.connect("postgres", DATABASE).await?;
    owner.execute("select tollgate.define_scope('tollgate:events', 'of the test')", &[]).await?;
    let good = issue(&owner, "ann", &["posts:read", "tollgate:events"]).await?;
    let unknown = issue(&owner, "ann", &[]).await?.token.replacen("tgt", "abc", 1);
    let functions = functions(&owner).await?;
    let mut seen = BTreeMap::new();
    for (n, function) in functions.iter().enumerate() {
        let Some(argument) = function.arguments.iter().find(|one| is_listed(&PRESENTED, function, one))
        else {
            continue;
        };
        let is_signed_alone = SIGNED_ALONE.contains(&function.name.as_str());
        let at = format!("192.0.2.{n}");
        assert!(
            function
                .arguments
                .iter()
                .any(|one| (one.name == "client_ip" && one.data_type == "inet") || one.name == "client_ips"),
            "{} gets no address",
            function.signature
        );
        let expression = match argument.data_type.as_str() {
            "bytea" => "sha256(convert_to($1::text, 'UTF8'))",
            "text[]" => "array[$1::text]",
            _ => "$1::text",
        };
        let arguments = function.arguments.iter().filter_map(|one| {
            let expression = match one.name.as_str() {
                "client_ip" => format!("'{at}'"),
                "client_ips" => format!("'{{{at}}}'"),
                name if name == argument.name => expression.to_owned(),
                _ if one.has_default => return None,
                _ => sound(&function.name, one, ""),
            };
            Some(format!("\"{}\" => {expression}", one.name))
        });
        let arguments = arguments.collect::<Vec<_>>().join(", ");
        let call = format!("select to_jsonb(r) from tollgate.{}({arguments}) r", function.name);
        let present = async |token: &str| -> Result<(Option<SqlState>, Value)> {
            match owner.query_one(&call, &[&token]).await {
                Ok(row) => Ok((None, row.get(0))),
                Err(error) => {
                    let error = error.as_db_error().with_context(|| format!("{call}: {error}"))?;
                    Ok((Some(error.code().clone()), Value::Null))
                }
            }
        };
        for _ in 0..3 {
            let (_, answer) = present(&unknown).await?;
            if function.name == REFRESHES {
                assert_eq!(answer["code"], "MALFORMED");
                continue;
            }
            let refusal: Value = value(&owner, "select tollgate.last_refusal()").await?;
            let expected = match is_signed_alone {
                true => json!({"code": "MALFORMED", "reason": "parts"}),
                false => json!({"code": "NOT_FOUND"}),
            };
            assert_eq!(refusal, expected, "{}", function.signature);
        }
        let code = if is_signed_alone || function.name == REFRESHES { "MALFORMED" } else { "NOT_FOUND" };
        let line = format!("verification code={code} token_id=- client_ip={at} ");
        assert_eq!(cluster.log().matches(&line).count(), 3, "{}", function.signature);
        let (error, answer) = present(&good.token).await?;
        if function.name == ADMITS_FROM_A_BLOCKED_ADDRESS {
            assert_eq!(error, None, "{}", function.signature);
            assert_eq!(answer["code"], "VALID", "{}: {answer}", function.signature);
            let (error, answer) = present(&unknown).await?;
            assert_eq!(error, None, "{}", function.signature);
            assert_eq!(answer["code"], "RATE_LIMITED", "{}: {answer}", function.signature);
        } else {
            // Not even a right guess is confirmed.
            match error {
                Some(error) => {
                    assert_eq!(error, SqlState::CONFIGURATION_LIMIT_EXCEEDED, "{}", function.signature);
                }
                None => assert!(
                    [json!(false), json!({"active": false})].contains(&answer)
                        || answer["code"] == "RATE_LIMITED",
                    "{}: {answer}",
                    function.signature
                ),
            }
        }
        let verified = Request::of(&good.token).coming_from(&at).code(&owner).await?;
        assert_eq!(verified, "RATE_LIMITED", "{}", function.signature);
        seen.insert(function.name.clone(), argument.name.clone());
    }
    let listed: BTreeMap<String, String> =
        PRESENTED.iter().map(|&(function, argument)| (function.to_owned(), argument.to_owned())).collect();
    assert_eq!(seen, listed);
    assert_eq!(common::code(&owner, &good.token).await?, "VALID");
    Ok(())
}
