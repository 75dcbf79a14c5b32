//! Issuing, listing and revoking tokens: what is stored, recorded and notified, and what is refused.

use std::collections::HashSet;
use std::time::Duration;

use crate::common::{self, Shared, Token, World, code, error, issue, issue_with, refused, revoke, value};
use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use tokio::sync::mpsc::UnboundedReceiver;
use tokio_postgres::error::SqlState;
use tokio_postgres::{AsyncMessage, Client, NoTls};
use tollgate_tests::{Cluster, DATABASE};
use uuid::Uuid;

/// Event, token, user, actor, detail without its expires_at, whether it has one.
type Logged = (String, Option<Uuid>, Option<String>, String, Value, bool);

static SHARED: Shared = Shared::new(&[]);

// ---- Arguments

#[tokio::test]
async fn each_bad_argument_is_22023_with_a_detail_that_names_it_and_stores_nothing() -> Result<()> {
    let World { owner, cluster, .. } = SHARED.world().await?;
    // The argument, its value in SQL, and what else the detail must name.
    let mut bad = vec![
        ("user_id", "null", ""),
        ("user_id", "''", ""),
        ("user_id", "E' \\t\\n\\u00a0'", "blank"),
        ("user_id", "repeat('ü', 256)", "256 characters"),
        ("name", "null", ""),
        ("name", "''", ""),
        ("name", "' '", "blank"),
        ("name", "repeat('ü', 101)", "101 characters"),
        ("scopes", "null", ""),
        ("scopes", "array[null]::text[]", "NULL"),
        ("scopes", "array['posts:read', null]", "NULL"),
        ("scopes", "array[['posts:read'], ['posts:write']]", "dimension"),
        ("scopes", "'{posts:none}'", r#""posts:none""#),
        ("scopes", "'{posts:none,posts:read,none:*,undefined}'", r#""posts:none", "none:*", "undefined""#),
        (
            "scopes",
            "'{Posts:read,posts:read,*,posts:,:a,a::b,\"a b\",posts:*:read}'",
            r#""Posts:read", "*", "posts:", ":a", "a::b", "a b", "posts:*:read""#,
        ),
        ("scopes", "'{\"\"}'", r#""""#),
        ("scopes", "array[repeat('z', 129)]", "zzz"),
        ("scopes", "array_fill('posts:read'::text, '{1001}')", "1001"),
        // The first of many.
        (
            "scopes",
            "(select array_agg('none:' || n) from generate_series(1, 30) n)",
            r#""none:10" and 20 more"#,
        ),
        ("scopes", "'{admin:*}'", r#""admin:*""#),
        ("expires_in", "'0'", ""),
        ("expires_in", "'-1 microsecond'", ""),
        ("expires_in", "'1 month -31 days'", ""),
        ("expires_in", "'-178000000 years'", ""),
        ("expires_in", "'1100 years'", ""),
        ("expires_in", "'178000000 years'", ""),
        ("metadata", "null", ""),
        ("metadata", "'[]'", ""),
        ("metadata", "'[{}]'", ""),
        ("metadata", "'1'", ""),
        ("metadata", "'\"{}\"'", ""),
        ("metadata", "'null'", ""),
        ("metadata", "'true'", ""),
        ("allowed_ips", "'{}'", ""),
        ("allowed_ips", "'{10.0.0.0/8,null}'", ""),
        ("allowed_ips", "'{{10.0.0.0/8},{11.0.0.0/8}}'", ""),
        ("allowed_ips", "array_fill('10.0.0.0/8'::cidr, '{1001}')", ""),
        ("prefix", "''", ""),
        ("prefix", "'Tgt'", ""),
        ("prefix", "'1a'", ""),
        ("prefix", "'_a'", ""),
        ("prefix", "'a-b'", ""),
        ("prefix", "'é'", ""),
        ("prefix", "repeat('a', 17)", ""),
    ];
    if cluster.major() >= 17 {
        bad.extend([("expires_in", "'infinity'", ""), ("expires_in", "'-infinity'", "")]);
    }
    let stored = "select (select count(*) from tollgate.api_tokens where name = 'bad' or user_id = 'bad')
                       + (select count(*) from tollgate.audit_log where user_id = 'bad' or detail ->> 'name' = 'bad')";
    for (argument, bad, offenders) in bad {
        let mut arguments = vec![("user_id", "'bad'"), ("name", "'bad'")];
        arguments.retain(|(name, _)| *name != argument);
        arguments.push((argument, bad));
        let arguments: Vec<String> =
            arguments.iter().map(|(name, value)| format!("{name} => {value}")).collect();
        let call = format!("select tollgate.create_api_token({})", arguments.join(", "));
        let error = refused(owner.batch_execute(&call).await, &SqlState::INVALID_PARAMETER_VALUE);
        let detail = error.detail().with_context(|| format!("{call}: {error:?}"))?;
        assert!(detail.starts_with(&format!("Argument: {argument}")), "{call}: {error:?}");
        assert!(detail.contains(offenders), "{call}: {error:?}");
        assert!(!detail.contains("\"posts:read\""), "a good scope is no offender: {error:?}");
        assert!(error.hint().is_some(), "{call}: {error:?}");
        assert_eq!(value::<i64>(&owner, stored).await?, 0, "{call}");
    }
    Ok(())
}

#[tokio::test]
async fn arguments_at_their_limits_are_accepted() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    for arguments in [
        "scopes => '{}'",
        "scopes => '{admin}'",
        "scopes => '{posts:*,posts:comments:*,users:read,admin}'",
        "scopes => array_fill('posts:read'::text, '{1000}')",
        "expires_in => '1 second'",
        "expires_in => '999 years'",
        "expires_in => '1 month -27 days'",
        "expires_in => null",
        "metadata => '{}'",
        "allowed_ips => null",
        "allowed_ips => '{0.0.0.0/0,::/0}'",
        "allowed_ips => array_fill('10.0.0.0/8'::cidr, '{1000}')",
        "prefix => 'a'",
        "prefix => 'a_b_0_'",
        "prefix => 'abcdefghijklmnop'",
    ] {
        issue_with(&owner, "limits", arguments).await?;
    }
    let longest = owner
        .query_one(
            "select token, length(user_id), length(name)
             from tollgate.create_api_token(repeat('ü', 255), repeat('ü', 100))",
            &[],
        )
        .await?;
    assert_eq!((longest.get::<_, i32>(1), longest.get::<_, i32>(2)), (255, 100));
    assert_eq!(code(&web, longest.get(0)).await?, "VALID");
    Ok(())
}

/// A JSON object of this many bytes as text.
fn object_of(bytes: usize) -> String {
    format!("{{\"k\": \"{}\"}}", "x".repeat(bytes - 9))
}

/// An object nested this deep.
fn nested(depth: usize) -> String {
    format!("{}{{}}{}", "{\"k\": ".repeat(depth - 1), "}".repeat(depth - 1))
}

#[tokio::test]
async fn metadata_is_limited_everywhere_and_unchanged_below_the_limit() -> Result<()> {
    let World { owner, web, .. } = SHARED.world().await?;
    owner.batch_execute("set tollgate.max_metadata_size = '1kB'").await?;
    let token = issue(&owner, "doors", &[]).await?;
    let create = "select (tollgate.create_api_token('doors', 'n', metadata => $1::text::jsonb)).id";
    let import = "select tollgate.import_api_token('doors', 'n', sha256(random()::text::bytea), metadata => $1::text::jsonb)";
    let update = format!(
        "select (tollgate.update_api_token('{}', jsonb_build_object('metadata', $1::text::jsonb))).id",
        token.id
    );
    let doors = [create, import, &update];
    let whole = "{\"n\": 12345678901234567890123, \"d\": -0.10}".to_owned();
    for door in doors {
        for good in [object_of(1024), nested(32), whole.clone()] {
            let id: Uuid = owner.query_one(door, &[&good]).await.with_context(|| door.to_owned())?.get(0);
            let stored = format!(
                "select metadata = $1::text::jsonb and metadata::text = $1::text::jsonb::text from tollgate.tokens where id = '{id}'"
            );
            assert!(owner.query_one(&stored, &[&good]).await?.get::<_, bool>(0), "{door}: {good}");
        }
        for (bad, words) in [
            (object_of(1025), "has at most 1024 bytes"),
            (format!("{{\"n\": [{}]}}", "1e1000,".repeat(3) + "1"), "has at most 1024 bytes"),
            (nested(33), "at most 32 levels"),
        ] {
            let error = refused(owner.query_one(door, &[&bad]).await, &SqlState::INVALID_PARAMETER_VALUE);
            assert!(error.message().contains(words), "{door}: {error:?}");
            assert!(error.detail().is_some_and(|detail| detail.contains("metadata")), "{door}: {error:?}");
            assert!(error.hint().is_some(), "{door}: {error:?}");
        }
    }
    for changes in [
        nested(65),
        object_of(600_001),
        "{\"rate_limit\": 1e400}".to_owned(),
        "{\"scopes\": [[[[[[[[[[\"a\"]]]]]]]]]]}".to_owned(),
        format!("{{\"name\": {}}}", nested(40)),
    ] {
        let update = "select tollgate.update_api_token($1, $2::text::jsonb)";
        let error =
            refused(owner.query(update, &[&token.id, &changes]).await, &SqlState::INVALID_PARAMETER_VALUE);
        assert!(error.detail().is_some() && error.hint().is_some(), "{error:?}");
    }

    // Existing metadata stays, and is passed on to derived tokens and successors.
    owner.execute(&update, &[&object_of(1000)]).await?;
    owner.batch_execute("set tollgate.max_metadata_size = 64").await?;
    let child = common::derive(&owner, &token, &[]).await?;
    let successor = common::rotate(&owner, token.id, "1 day").await?;
    for id in [child.id, successor.id] {
        let size: i32 = value(
            &owner,
            &format!("select octet_length(metadata::text) from tollgate.tokens where id = '{id}'"),
        )
        .await?;
        assert_eq!(size, 1000);
    }
    let longer = "select tollgate.derive_api_token($1, repeat('x', 101), '{}', null)";
    refused(owner.query(longer, &[&child.token]).await, &SqlState::INVALID_PARAMETER_VALUE);

    for (setting, code) in
        [("63", SqlState::INVALID_PARAMETER_VALUE), ("'257kB'", SqlState::INVALID_PARAMETER_VALUE)]
    {
        refused(owner.batch_execute(&format!("set tollgate.max_metadata_size = {setting}")).await, &code);
    }
    refused(
        web.batch_execute("set tollgate.max_metadata_size = '1kB'").await,
        &SqlState::INSUFFICIENT_PRIVILEGE,
    );
    Ok(())
}

// ---- What a token is

#[tokio::test]
async fn a_token_has_the_documented_format_and_only_its_digest_is_stored() -> Result<()> {
    let World { owner, cluster: _cluster, .. } = SHARED.world().await?;
    owner.batch_execute("begin").await?;
    let issued = owner
        .query_one(
            "select id, token, hint, user_id, name, scopes, expires_at::text, created_at::text
             from tollgate.create_api_token('format', 'of a token', '{users:read,posts:*,users:read}',
                 '1 month', '{\"a\": 1}', '{10.0.0.0/8}')",
            &[],
        )
        .await?;
    let (id, token): (Uuid, String) = (issued.get(0), issued.get(1));
    let stored = owner
        .query_one(
            "select t.hint, t.user_id, t.name, t.scopes, t.expires_at::text, t.created_at::text,
                    t.token_hash = sha256(convert_to($2, 'UTF8')), t.metadata, t.allowed_ips::text,
                    t.created_at = now(),
                    t.expires_at between now() + interval '1 month' and clock_timestamp() + interval '1 month',
                    concat_ws(' ', t.*::text, (select string_agg(a::text, ' ') from tollgate.audit_log a
                                               where a.token_id = t.id))
             from tollgate.api_tokens t where t.id = $1",
            &[&id, &token],
        )
        .await?;
    owner.batch_execute("commit").await?;

    let parsed = tollgate_core::token::parse(token.as_bytes()).context("a well-formed token")?;
    assert_eq!(parsed.prefix, "tgt");
    assert_eq!(token.len(), 4 + 80 + 8);
    assert_eq!(issued.get::<_, &str>(2), parsed.hint());
    assert_eq!(parsed.hint(), token[..8]);
    assert_eq!(issued.get::<_, &str>(3), "format");
    assert_eq!(issued.get::<_, &str>(4), "of a token");
    assert_eq!(issued.get::<_, Vec<&str>>(5), ["users:read", "posts:*"], "each once, in the order given");
    for (of_issued, of_stored) in [(2, 0), (3, 1), (4, 2), (6, 4), (7, 5)] {
        assert_eq!(issued.get::<_, &str>(of_issued), stored.get::<_, &str>(of_stored));
    }
    assert_eq!(issued.get::<_, Vec<&str>>(5), stored.get::<_, Vec<&str>>(3));
    assert!(stored.get::<_, bool>(6), "another digest");
    assert_eq!(stored.get::<_, Value>(7), json!({"a": 1}));
    assert_eq!(stored.get::<_, &str>(8), "{10.0.0.0/8}");
    assert!(stored.get::<_, bool>(9), "created at another time than that of the transaction");
    assert!(stored.get::<_, bool>(10), "expires earlier or later than a month from now");
    let everything: &str = stored.get(11);
    for part in parsed.body.windows(12) {
        assert!(!everything.contains(std::str::from_utf8(part)?), "a part of the secret is stored");
    }
    Ok(())
}

#[tokio::test]
async fn no_two_tokens_are_alike() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    let rows = owner
        .query(
            "select i.id, i.token from generate_series(1, 1000) n,
                 lateral tollgate.create_api_token('many ' || n, 'n') i",
            &[],
        )
        .await?;
    let mut ids = HashSet::new();
    let mut chunks = HashSet::new();
    for row in &rows {
        ids.insert(row.get::<_, Uuid>(0));
        let token: &str = row.get(1);
        let parsed = tollgate_core::token::parse(token.as_bytes()).context("a well-formed token")?;
        // Not only the whole: no 8 bytes of a good generator repeat in any place.
        for chunk in parsed.body.chunks(16) {
            assert!(chunks.insert(chunk.to_vec()), "a repetition");
        }
    }
    assert_eq!(ids.len(), 1000);
    assert_eq!(code(&web, rows[999].get(1)).await?, "VALID");
    Ok(())
}

#[tokio::test]
async fn the_prefix_comes_from_the_setting_unless_the_call_names_one() -> Result<()> {
    let World { owner, web, cluster } = SHARED.world().await?;
    let prefix_of = |token: Token| token.token[..token.token.len() - 89].to_owned();
    assert_eq!(prefix_of(issue(&owner, "prefixes", &[]).await?), "tgt");
    owner.batch_execute("set tollgate.token_prefix = 'my_app_2'").await?;
    let own = issue(&owner, "prefixes", &[]).await?;
    assert_eq!(code(&web, &own.token).await?, "VALID");
    assert_eq!(prefix_of(own), "my_app_2");
    assert_eq!(prefix_of(issue_with(&owner, "prefixes", "prefix => 'other'").await?), "other");
    for bad in ["'Tgt'", "'a-b'", "'é'", "''", "'abcdefghijklmnopq'", "'1'"] {
        let set = format!("set tollgate.token_prefix = {bad}");
        let error = refused(owner.batch_execute(&set).await, &SqlState::INVALID_PARAMETER_VALUE);
        assert!(error.detail().is_some_and(|detail| detail.contains("prefix")), "{error:?}");
    }
    assert_eq!(
        prefix_of(issue(&owner, "prefixes", &[]).await?),
        "my_app_2",
        "a refused value changes nothing"
    );

    cluster
        .execute(DATABASE, "create role brand login; alter role brand set tollgate.token_prefix = 'brand'")?;
    cluster.execute(DATABASE, "grant execute on function tollgate.create_api_token to brand")?;
    let brand = cluster.connect("brand", DATABASE).await?;
    assert_eq!(prefix_of(issue(&brand, "prefixes", &[]).await?), "brand");
    let unknown = error(owner.batch_execute("set tollgate.token_prefx = 'typo'").await);
    assert!(unknown.message().contains("tollgate.token_prefx"), "{unknown:?}");
    Ok(())
}

// ---- Records

#[tokio::test]
async fn each_change_is_recorded_with_who_did_it() -> Result<()> {
    let World { owner, cluster, .. } = SHARED.world().await?;
    owner
        .batch_execute(
            "create role issuer login;
             create role team;
             grant team to issuer;
             grant execute on function tollgate.create_api_token, tollgate.revoke_api_token,
                 tollgate.define_scope, tollgate.drop_scope to team, issuer;
             create schema recorded;
             create function recorded.wrapper(who text) returns uuid language sql security definer
                 set search_path = pg_catalog, pg_temp as
                 'select id from tollgate.create_api_token(who, ''wrapped'')';
             grant usage on schema recorded to issuer",
        )
        .await?;
    let issuer = cluster.connect("issuer", DATABASE).await?;
    let by_login = issue_with(&issuer, "recorded", "scopes => '{posts:read}', expires_in => '1 day'").await?;
    revoke_because(&issuer, by_login.id, Some("leaked")).await?;
    issuer.batch_execute("select tollgate.define_scope('recorded:scope', 'first')").await?;
    issuer.batch_execute("set role team").await?;
    let by_team = issue(&issuer, "recorded", &[]).await?;
    revoke_because(&issuer, by_team.id, None).await?;
    issuer.batch_execute("select tollgate.define_scope('recorded:scope', 'second')").await?;
    issuer.batch_execute("select tollgate.define_scope('recorded:scope', 'second')").await?;
    issuer.batch_execute("select tollgate.drop_scope('recorded:scope'); reset role").await?;
    let wrapped: Uuid = value(&issuer, "select recorded.wrapper('recorded')").await?;

    let log = owner
        .query(
            "select event, token_id, user_id, actor, detail - 'expires_at', detail ? 'expires_at', client_addr::text
             from tollgate.audit_log
             where user_id = 'recorded' or detail ->> 'scope' = 'recorded:scope' order by id",
            &[],
        )
        .await?;
    let log: Vec<Logged> = log
        .iter()
        .map(|row| (row.get(0), row.get(1), row.get(2), row.get(3), row.get(4), row.get(5)))
        .collect();
    let user = Some("recorded".to_owned());
    let created = |token: &Token, scopes: &[&str]| json!({"name": "a test's", "hint": token.token[..8], "scopes": scopes});
    let event = |event: &str, id: Option<Uuid>, actor: &str, detail: Value, expires: bool| {
        (event.to_owned(), id, id.and(user.clone()), actor.to_owned(), detail, expires)
    };
    let scope = |description: &str| json!({"scope": "recorded:scope", "description": description});
    let hint = log.last().map(|row| row.4["hint"].clone());
    let expected = vec![
        event("token.created", Some(by_login.id), "issuer", created(&by_login, &["posts:read"]), true),
        event("token.revoked", Some(by_login.id), "issuer", json!({"reason": "leaked"}), false),
        event("scope.defined", None, "issuer", scope("first"), false),
        event("token.created", Some(by_team.id), "team", created(&by_team, &[]), false),
        event("token.revoked", Some(by_team.id), "team", json!({}), false),
        // Defining it again unchanged was not a change.
        event(
            "scope.defined",
            None,
            "team",
            json!({"scope": "recorded:scope", "description": "second",
                   "changes": {"description": {"from": "first", "to": "second"}}}),
            false,
        ),
        event("scope.dropped", None, "team", scope("second"), false),
        event(
            "token.created",
            Some(wrapped),
            "issuer",
            json!({"name": "wrapped", "hint": hint, "scopes": []}),
            false,
        ),
    ];
    assert_eq!(log, expected);

    let creators = owner
        .query("select id, created_by from tollgate.list_api_tokens('recorded') order by created_at", &[])
        .await?;
    let creators: Vec<(Uuid, &str)> = creators.iter().map(|row| (row.get(0), row.get(1))).collect();
    assert_eq!(creators, [(by_login.id, "issuer"), (by_team.id, "team"), (wrapped, "issuer")]);
    Ok(())
}

#[tokio::test]
async fn the_clients_address_is_recorded_where_there_is_one() -> Result<()> {
    let World { owner, cluster, .. } = SHARED.world().await?;
    let mut config = tokio_postgres::Config::new();
    config.host("127.0.0.1").port(cluster.port()).user("postgres").dbname(DATABASE);
    let (over_tcp, connection) = config.connect(NoTls).await?;
    tokio::spawn(connection);
    let remote = issue(&over_tcp, "addressed", &[]).await?;
    let local = issue(&owner, "addressed", &[]).await?;
    for (token, address) in [(remote, Some("127.0.0.1")), (local, None)] {
        let row = owner
            .query_one("select host(client_addr) from tollgate.audit_log where token_id = $1", &[&token.id])
            .await?;
        assert_eq!(row.get::<_, Option<&str>>(0), address);
    }
    Ok(())
}

#[tokio::test]
async fn a_rollback_leaves_neither_a_token_nor_a_record() -> Result<()> {
    let World { owner, cluster: _cluster, .. } = SHARED.world().await?;
    let kept = issue(&owner, "rolled back", &[]).await?;
    let left = "select (select count(*) from tollgate.api_tokens where user_id = 'rolled back' and revoked_at is null),
                       (select count(*) from tollgate.audit_log where user_id = 'rolled back')";
    for undo in ["rollback", "rollback to s; commit"] {
        owner.batch_execute("begin; savepoint s").await?;
        let gone = issue(&owner, "rolled back", &[]).await?;
        assert!(revoke(&owner, gone.id).await? && revoke(&owner, kept.id).await?);
        owner.batch_execute(undo).await?;
        let row = owner.query_one(left, &[]).await?;
        assert_eq!((row.get::<_, i64>(0), row.get::<_, i64>(1)), (1, 1), "{undo}");
        assert_eq!(code(&owner, &kept.token).await?, "VALID");
        assert_eq!(code(&owner, &gone.token).await?, "NOT_FOUND");
    }
    Ok(())
}

// ---- Revoking

#[tokio::test]
async fn revoking_returns_whether_it_did_and_does_it_once() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    let token = issue(&owner, "revoker", &[]).await?;
    let ask = async |id: Option<Uuid>, user: Option<&str>| -> Result<bool> {
        Ok(owner.query_one("select tollgate.revoke_api_token($1, $2)", &[&id, &user]).await?.get(0))
    };
    assert!(!ask(Some(Uuid::nil()), None).await?, "unknown");
    assert!(!ask(None, None).await?, "NULL");
    assert!(!ask(Some(token.id), Some("another user")).await?, "another user's");
    assert!(!ask(Some(token.id), Some("")).await?, "no user's");
    assert_eq!(code(&web, &token.token).await?, "VALID");
    assert!(ask(Some(token.id), Some("revoker")).await?);
    assert_eq!(code(&web, &token.token).await?, "REVOKED");
    assert!(!ask(Some(token.id), Some("revoker")).await?, "revoked already");
    assert!(!ask(Some(token.id), None).await?, "revoked already");
    let events =
        "select count(*) from tollgate.audit_log where user_id = 'revoker' and event = 'token.revoked'";
    assert_eq!(value::<i64>(&owner, events).await?, 1);
    // An expired or disabled token is revoked too: it might be enabled again.
    let expired = issue(&owner, "revoker", &[]).await?;
    expire(&owner, &expired).await?;
    assert!(ask(Some(expired.id), None).await?);
    Ok(())
}

#[tokio::test]
async fn of_two_sessions_that_revoke_at_the_same_time_one_does() -> Result<()> {
    let World { owner, cluster, .. } = SHARED.world().await?;
    let token = issue(&owner, "contended", &[]).await?;
    let other = cluster.connect("postgres", DATABASE).await?;
    owner.batch_execute("begin").await?;
    assert!(revoke(&owner, token.id).await?);
    let waiting = tokio::spawn(async move { revoke(&other, token.id).await });
    common::wait_until_blocked(&owner).await?;
    owner.batch_execute("commit").await?;
    assert!(!waiting.await??, "revoked twice");
    let events =
        "select count(*) from tollgate.audit_log where user_id = 'contended' and event = 'token.revoked'";
    assert_eq!(value::<i64>(&owner, events).await?, 1);
    Ok(())
}

#[tokio::test]
async fn all_tokens_of_a_user_are_revoked_and_no_others() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    let mut own = Vec::new();
    for _ in 0..3 {
        own.push(issue(&owner, "everything", &[]).await?);
    }
    revoke(&owner, own[0].id).await?;
    let others = issue(&owner, "everything else", &[]).await?;
    let all = "select tollgate.revoke_all_api_tokens($1, 'left the company')";
    for (user, expected) in [("everything", 2), ("everything", 0), ("unknown", 0)] {
        assert_eq!(owner.query_one(all, &[&user]).await?.get::<_, i64>(0), expected, "{user:?}");
    }
    for token in &own {
        assert_eq!(code(&web, &token.token).await?, "REVOKED");
    }
    assert_eq!(code(&web, &others.token).await?, "VALID");
    let reasons = owner
        .query(
            "select a.detail ->> 'reason', t.revoked_reason from tollgate.audit_log a
             join tollgate.api_tokens t on t.id = a.token_id
             where a.user_id = 'everything' and a.event = 'token.revoked' order by a.id",
            &[],
        )
        .await?;
    let reasons: Vec<(Option<&str>, Option<&str>)> =
        reasons.iter().map(|row| (row.get(0), row.get(1))).collect();
    let given = (Some("left the company"), Some("left the company"));
    assert_eq!(reasons, [(None, None), given, given]);
    Ok(())
}

#[tokio::test]
async fn anyone_who_finds_a_token_can_revoke_it() -> Result<()> {
    let World { owner, web, cluster } = SHARED.world().await?;
    cluster.execute(
        DATABASE,
        "create role finder login; grant execute on function tollgate.revoke_presented_token to finder",
    )?;
    let finder = cluster.connect("finder", DATABASE).await?;
    let token = issue(&owner, "found", &[]).await?;
    let unknown = token.token.replacen("tgt", "abc", 1);
    let present = async |token: Option<&str>| -> Result<bool> {
        let call = "select tollgate.revoke_presented_token($1, 'in a public repository')";
        Ok(finder.query_one(call, &[&token]).await?.get(0))
    };
    for wrong in [None, Some(""), Some("junk"), Some(unknown.as_str()), Some(&token.token[1..])] {
        assert!(!present(wrong).await?, "{wrong:?}");
    }
    assert_eq!(code(&web, &token.token).await?, "VALID");
    assert!(present(Some(&token.token)).await?);
    assert!(!present(Some(&token.token)).await?, "a second time");
    assert_eq!(code(&web, &token.token).await?, "REVOKED");
    let log = owner
        .query_one(
            "select actor, detail from tollgate.audit_log where token_id = $1 and event = 'token.revoked'",
            &[&token.id],
        )
        .await?;
    assert_eq!(log.get::<_, &str>(0), "finder");
    assert_eq!(log.get::<_, Value>(1), json!({"reason": "in a public repository"}));
    Ok(())
}

#[tokio::test]
async fn a_token_pasted_into_a_stored_text_is_not_stored() -> Result<()> {
    let World { owner, cluster: _cluster, .. } = SHARED.world().await?;
    for round in 0..4 {
        let token = issue(&owner, "pasted", &[]).await?;
        let secret = token.token.as_str();
        let reason = format!("found {secret} in a log");
        let call = match round {
            0 => {
                "select tollgate.revoke_api_token(i, reason => r) from (select $1::text, $2::text, $3::uuid) v (t, r, i)"
            }
            1 => {
                "select tollgate.revoke_presented_token(t, r) from (select $1::text, $2::text, $3::uuid) v (t, r, i)"
            }
            2 => {
                "select tollgate.revoke_all_api_tokens('pasted', r) from (select $1::text, $2::text, $3::uuid) v (t, r, i)"
            }
            _ => {
                "select tollgate.set_api_token_enabled(i, false, r) from (select $1::text, $2::text, $3::uuid) v (t, r, i)"
            }
        };
        let error = refused(
            owner.execute(call, &[&secret, &reason, &token.id]).await,
            &SqlState::INVALID_PARAMETER_VALUE,
        );
        assert!(error.detail().is_some_and(|detail| detail.starts_with("Argument: reason, ")), "{error:?}");
        assert!(!common::text_of(&error).contains(&secret[30..46]), "{error:?}");
        let kept: i64 = owner
            .query_one(
                "select (select count(*) from tollgate.audit_log a where a::text like '%' || $1 || '%')
                      + (select count(*) from tollgate.api_tokens t where t::text like '%' || $1 || '%')",
                &[&&secret[30..46]],
            )
            .await?
            .get(0);
        assert_eq!(kept, 0, "round {round}");
    }
    let token = issue(&owner, "pasted", &[]).await?;
    for call in [
        "select tollgate.create_api_token('pasted', $1)",
        "select tollgate.define_scope('pasted:scope', 'as of ' || $1)",
        "select tollgate.update_api_token((select id from tollgate.tokens where user_id = 'pasted' limit 1), jsonb_build_object('name', $1::text))",
    ] {
        refused(owner.execute(call, &[&token.token]).await, &SqlState::INVALID_PARAMETER_VALUE);
    }
    Ok(())
}

#[tokio::test]
async fn a_reason_has_at_most_1000_characters() -> Result<()> {
    let World { owner, cluster: _cluster, .. } = SHARED.world().await?;
    let token = issue(&owner, "reasons", &[]).await?;
    for call in [
        format!("select tollgate.revoke_api_token('{}', reason => repeat('ü', 1001))", token.id),
        "select tollgate.revoke_all_api_tokens('reasons', repeat('ü', 1001))".to_owned(),
        format!("select tollgate.revoke_presented_token('{}', repeat('ü', 1001))", token.token),
    ] {
        let error = refused(owner.batch_execute(&call).await, &SqlState::INVALID_PARAMETER_VALUE);
        assert!(error.detail().is_some_and(|detail| detail.contains("reason")), "{error:?}");
        assert_eq!(code(&owner, &token.token).await?, "VALID");
    }
    assert!(revoke_because(&owner, token.id, Some(&"ü".repeat(1000))).await?);
    Ok(())
}

#[tokio::test]
async fn changes_are_refused_in_a_read_only_transaction() -> Result<()> {
    let World { owner, cluster: _cluster, .. } = SHARED.world().await?;
    let token = issue(&owner, "read only", &[]).await?;
    for change in changes(&token, "read only") {
        owner.batch_execute("begin read only").await?;
        refused(owner.batch_execute(&change).await, &SqlState::READ_ONLY_SQL_TRANSACTION);
        owner.batch_execute("rollback").await?;
    }
    Ok(())
}

#[tokio::test]
async fn changes_are_refused_on_a_standby() -> Result<()> {
    let primary = common::start(Cluster::builder())?;
    let standby = primary.standby()?;
    let token = issue(&primary.connect("postgres", DATABASE).await?, "standby", &[]).await?;
    standby.catch_up_with(&primary)?;
    let owner = standby.connect("postgres", DATABASE).await?;
    let listed: i64 = value(&owner, "select count(*) from tollgate.list_api_tokens('standby')").await?;
    assert_eq!(listed, 1);
    let mut otherwise = Vec::new();
    for change in changes(&token, "standby") {
        let refusal = error(owner.batch_execute(&change).await);
        if refusal.code() != &SqlState::READ_ONLY_SQL_TRANSACTION {
            otherwise.push((change, refusal.code().code().to_owned(), refusal.message().to_owned()));
        }
    }
    assert!(otherwise.is_empty(), "refused, but not as read only: {otherwise:#?}");
    Ok(())
}

/// A call of every function that changes something.
fn changes(token: &Token, user: &str) -> Vec<String> {
    vec![
        format!("select tollgate.create_api_token('{user}', 'n')"),
        format!("select tollgate.create_api_token('{user}', 'n', '{{posts:read}}')"),
        format!("select tollgate.revoke_api_token('{}')", token.id),
        format!("select tollgate.revoke_all_api_tokens('{user}')"),
        format!("select tollgate.revoke_presented_token('{}')", token.token),
        format!("select tollgate.rotate_api_token('{}')", token.id),
        format!("select tollgate.update_api_token('{}', '{{\"name\": \"other\"}}')", token.id),
        format!("select tollgate.set_api_token_enabled('{}', false)", token.id),
        format!("select tollgate.derive_api_token('{}', 'n', '{{}}', null)", token.token),
        format!("select tollgate.import_api_token('{user}', 'n', sha256('{user}'))"),
        "select tollgate.define_scope('a:b', 'c')".to_owned(),
        "select tollgate.drop_scope('posts:comments:read')".to_owned(),
    ]
}

// ---- Lists

#[tokio::test]
async fn a_list_shows_the_users_tokens_oldest_first_with_their_status_and_never_the_digest() -> Result<()> {
    let World { owner, cluster, .. } = SHARED.world().await?;
    cluster.execute(
        DATABASE,
        "create role lister login; grant execute on function tollgate.list_api_tokens to lister",
    )?;
    let lister = cluster.connect("lister", DATABASE).await?;
    let active = issue_with(&owner, "listed", "scopes => '{posts:read}', expires_in => '1 day'").await?;
    let expired = issue(&owner, "listed", &[]).await?;
    expire(&owner, &expired).await?;
    let disabled = issue(&owner, "listed", &[]).await?;
    owner
        .execute("update tollgate.api_tokens set disabled_at = now() where id = $1", &[&disabled.id])
        .await?;
    let revoked = issue(&owner, "listed", &[]).await?;
    expire(&owner, &revoked).await?;
    revoke_because(&owner, revoked.id, Some("old")).await?;
    issue(&owner, "listed by another name", &[]).await?;

    let rows = lister
        .query("select id, status, hint, revoked_reason, use_count, to_jsonb(t)::text from tollgate.list_api_tokens('listed') t", &[])
        .await?;
    let listed: Vec<(Uuid, &str, &str, Option<&str>, i64)> =
        rows.iter().map(|row| (row.get(0), row.get(1), row.get(2), row.get(3), row.get(4))).collect();
    assert_eq!(
        listed,
        [
            (active.id, "active", &active.token[..8], None, 0),
            (expired.id, "expired", &expired.token[..8], None, 0),
            (disabled.id, "disabled", &disabled.token[..8], None, 0),
            (revoked.id, "revoked", &revoked.token[..8], Some("old"), 0),
        ]
    );
    for (row, token) in rows.iter().zip([active, expired, disabled, revoked]) {
        let digest = tollgate_core::token::digest(token.token.as_bytes());
        let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        let text: &str = row.get(5);
        assert!(!text.contains(&digest) && !text.contains(&token.token[4..20]), "{text}");
    }
    assert!(lister.query("select from tollgate.list_api_tokens('unknown')", &[]).await?.is_empty());
    Ok(())
}

#[tokio::test]
async fn listing_or_revoking_without_a_user_is_an_error() -> Result<()> {
    let World { owner, cluster: _cluster, .. } = SHARED.world().await?;
    issue(&owner, "ann", &[]).await?;
    for call in [
        "select * from tollgate.list_api_tokens($1)",
        "select tollgate.revoke_all_api_tokens($1)",
        "select * from tollgate.create_api_token($1, 'a name')",
        "select tollgate.import_api_token($1, 'a name', sha256('x'))",
    ] {
        for user in [None, Some(""), Some(" \t\n")] {
            let error = refused(owner.query(call, &[&user]).await, &SqlState::INVALID_PARAMETER_VALUE);
            let expected = match user {
                None => "Argument: user_id, which is NULL.",
                Some(_) => "Argument: user_id, which is empty or blank.",
            };
            assert_eq!(error.detail(), Some(expected), "{call}");
            assert!(error.hint().is_some(), "{call}");
        }
    }
    Ok(())
}

#[tokio::test]
async fn a_token_that_ends_within_two_minutes_has_a_notice_however_it_was_issued() -> Result<()> {
    let World { owner, cluster, .. } = SHARED.world().await?;
    let (client, mut messages) = cluster.listen("postgres", DATABASE).await?;
    let mut notices = async |call: &str| -> Result<Vec<(String, String)>> {
        client.batch_execute(call).await.with_context(|| call.to_owned())?;
        client.batch_execute("do $$ begin raise notice 'done'; end $$").await?;
        let mut notices = Vec::new();
        while let Some(message) = messages.recv().await {
            match message {
                AsyncMessage::Notice(notice) if notice.message() == "done" => break,
                AsyncMessage::Notice(notice) => {
                    assert_eq!(notice.severity(), "NOTICE");
                    notices.push((notice.message().to_owned(), notice.hint().unwrap_or_default().to_owned()));
                }
                _ => {}
            }
        }
        Ok(notices)
    };
    let parent = issue_with(&owner, "short", "expires_in => '1 hour'").await?;
    let brief = issue_with(&owner, "short", "expires_in => '110 seconds'").await?;
    // A call, and the text of the notice.
    for (call, notified) in [
        ("create_api_token('short', 'a name', expires_in => '90')".to_owned(), Some("90 s")),
        ("create_api_token('short', 'a name', expires_in => '1 second')".to_owned(), Some("1 s")),
        ("import_api_token('short', 'a name', sha256('1'), expires_in => '30')".to_owned(), Some("30 s")),
        (format!("derive_api_token('{}', 'a name', '{{}}', '59')", parent.token), Some("59 s")),
        // One that ends with its parent, one that replaces another.
        (format!("derive_api_token('{}', 'a name', '{{}}', null)", brief.token), Some(" s")),
        (format!("rotate_api_token('{}')", brief.id), Some(" s")),
        (format!("rotate_api_token('{}')", parent.id), None),
        ("create_api_token('short', 'a name', expires_in => '90 days')".to_owned(), None),
        ("create_api_token('short', 'a name', expires_in => '3 minutes')".to_owned(), None),
        ("create_api_token('short', 'a name')".to_owned(), None),
        ("import_api_token('short', 'a name', sha256('2'))".to_owned(), None),
    ] {
        let notices = notices(&format!("select tollgate.{call}")).await?;
        assert_eq!(notices.len(), usize::from(notified.is_some()), "{call}: {notices:?}");
        for ((message, hint), notified) in notices.iter().zip(notified) {
            assert!(message.starts_with("the token expires in ") && message.ends_with(notified), "{message}");
            assert!(hint.contains("seconds") && hint.contains("90 days"), "{hint}");
        }
    }

    for (call, notified) in [
        ("create_api_token('laptop', '{posts:read}')", true),
        ("create_api_token('laptop', '{}')", true),
        ("import_api_token('laptop', '{posts:read}', sha256('3'))", true),
        ("create_api_token('ann', 'laptop', '{posts:read}')", false),
        ("create_api_token('ann', '{laptop')", false),
    ] {
        let notices = notices(&format!("select tollgate.{call}")).await?;
        assert_eq!(notices.len(), usize::from(notified), "{call}: {notices:?}");
        for (message, hint) in notices {
            assert!(message.contains("list of scopes") && !message.contains('{'), "{message}");
            assert!(hint.contains("user_id, name, scopes"), "{hint}");
        }
    }
    Ok(())
}

// ---- Notifications

#[tokio::test]
async fn a_revocation_notifies_once_it_is_committed_and_issuing_does_not() -> Result<()> {
    let World { owner, cluster, .. } = SHARED.world().await?;
    let mut events = Events::listen(&cluster, "notified").await?;
    let first = issue(&owner, "notified", &[]).await?;
    let second = issue(&owner, "notified", &[]).await?;
    // Rolled back, so never notified.
    owner.batch_execute("begin").await?;
    revoke(&owner, first.id).await?;
    owner.batch_execute("rollback; begin; savepoint s").await?;
    revoke(&owner, first.id).await?;
    owner.batch_execute("rollback to s; commit").await?;

    revoke_because(&owner, second.id, Some("lost \"laptop\"\n☃")).await?;
    assert_eq!(
        events.next().await?,
        json!({"event": "token.revoked", "token_id": second.id, "user_id": "notified", "reason": "lost \"laptop\"\n☃"})
    );
    revoke(&owner, second.id).await?;
    revoke(&owner, first.id).await?;
    assert_eq!(
        events.next().await?,
        json!({"event": "token.revoked", "token_id": first.id, "user_id": "notified", "reason": null}),
        "revoking again is no event"
    );
    events.assert_silent(&owner).await
}

#[tokio::test]
async fn revoking_all_tokens_of_a_user_is_one_notification() -> Result<()> {
    let World { owner, cluster, .. } = SHARED.world().await?;
    let mut events = Events::listen(&cluster, "bulk").await?;
    for _ in 0..5 {
        issue(&owner, "bulk", &[]).await?;
    }
    for _ in 0..2 {
        owner.batch_execute("select tollgate.revoke_all_api_tokens('bulk', 'gone')").await?;
    }
    assert_eq!(events.next().await?, json!({"event": "token.revoked", "user_id": "bulk", "count": 5}));
    events.assert_silent(&owner).await
}

#[tokio::test]
async fn the_longest_reason_of_the_longest_user_fits_into_a_notification() -> Result<()> {
    let World { owner, cluster, .. } = SHARED.world().await?;
    // Each of these takes six bytes of JSON, the maximum for any character.
    let user = "\u{1}".repeat(255);
    let mut events = Events::listen(&cluster, &user).await?;
    let token = issue(&owner, &user, &[]).await?;
    let reason = "\u{2}".repeat(1000);
    revoke_because(&owner, token.id, Some(&reason)).await?;
    let notified = events.next().await?;
    assert!(
        notified["reason"]
            .as_str()
            .is_some_and(|notified| notified.len() >= 100 && reason.starts_with(notified)),
        "{notified}"
    );
    let logged: String =
        value(&owner, &format!("select detail ->> 'reason' from tollgate.audit_log where token_id = '{}' and event = 'token.revoked'", token.id)).await?;
    assert_eq!(logged, reason);
    Ok(())
}

#[tokio::test]
async fn issuing_can_be_prepared_for_two_phases_and_revoking_cannot() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    owner.batch_execute("begin").await?;
    let token = issue(&owner, "prepared", &[]).await?;
    owner.batch_execute("prepare transaction 'issue'").await?;
    assert_eq!(code(&web, &token.token).await?, "NOT_FOUND");
    owner.batch_execute("commit prepared 'issue'").await?;
    assert_eq!(code(&web, &token.token).await?, "VALID");

    owner.batch_execute("begin").await?;
    revoke(&owner, token.id).await?;
    refused(owner.batch_execute("prepare transaction 'revoke'").await, &SqlState::FEATURE_NOT_SUPPORTED);
    assert_eq!(code(&web, &token.token).await?, "VALID");
    Ok(())
}

/// The notifications about one user: the tests of this file share a cluster, and so a channel.
struct Events {
    user: String,
    messages: UnboundedReceiver<AsyncMessage>,
    _listener: Client,
}

impl Events {
    async fn listen(cluster: &Cluster, user: &str) -> Result<Self> {
        let (listener, messages) = cluster.listen("web", DATABASE).await?;
        listener.batch_execute("listen tollgate_events").await?;
        Ok(Self { user: user.to_owned(), messages, _listener: listener })
    }

    async fn next(&mut self) -> Result<Value> {
        let next = async {
            while let Some(message) = self.messages.recv().await {
                if let AsyncMessage::Notification(notification) = message {
                    assert_eq!(notification.channel(), "tollgate_events");
                    let payload: Value = serde_json::from_str(notification.payload())?;
                    if payload["user_id"] == self.user {
                        return Ok(payload);
                    }
                }
            }
            anyhow::bail!("the connection ended")
        };
        tokio::time::timeout(Duration::from_secs(10), next).await.context("no notification within 10 s")?
    }

    /// Nothing was notified before the event of one more token, which comes after all earlier ones.
    async fn assert_silent(&mut self, owner: &Client) -> Result<()> {
        let fence = issue(owner, &self.user, &[]).await?;
        revoke_because(owner, fence.id, Some("a fence")).await?;
        let next = self.next().await?;
        assert_eq!(next["reason"], "a fence", "an event too many: {next}");
        Ok(())
    }
}

async fn revoke_because(client: &Client, id: Uuid, reason: Option<&str>) -> Result<bool> {
    let call = "select tollgate.revoke_api_token($1, reason => $2)";
    Ok(client.query_one(call, &[&id, &reason]).await?.get(0))
}

/// Lets a token expire, as its owner, behind Tollgate's back.
async fn expire(owner: &Client, token: &Token) -> Result<()> {
    owner.execute("update tollgate.api_tokens set expires_at = now() where id = $1", &[&token.id]).await?;
    Ok(())
}

// ---- Changes made to our tables

/// A separate database, whose tables the test changes.
async fn changed(name: &str) -> Result<(Client, std::sync::Arc<Cluster>)> {
    let cluster = SHARED.cluster()?;
    common::database(&cluster, name)?;
    Ok((cluster.connect("postgres", name).await?, cluster))
}

#[tokio::test]
async fn a_trigger_on_the_tokens_may_issue_another_token() -> Result<()> {
    let (owner, _cluster) = changed("nested").await?;
    owner
        .batch_execute(
            "create function public.issue_another() returns trigger language plpgsql security definer as $$
             begin
                 if new.name = 'outer' then
                     perform tollgate.create_api_token(new.user_id, 'inner', '{posts:read}');
                     perform tollgate.import_api_token(new.user_id, 'imported', sha256(new.id::text::bytea));
                 end if;
                 return null;
             end $$;
             create trigger another after insert on tollgate.api_tokens for each row
                 execute function public.issue_another()",
        )
        .await?;
    for level in ["read committed", "repeatable read"] {
        owner.batch_execute(&format!("begin isolation level {level}")).await?;
        owner.batch_execute("select tollgate.create_api_token('ann', 'outer', '{posts:read}')").await?;
        owner.batch_execute("commit").await?;
    }
    let names: String = value(
        &owner,
        "select string_agg(name || ' ' || n, ', ' order by name)
         from (select name, count(*) as n from tollgate.api_tokens group by name) t",
    )
    .await?;
    assert_eq!(names, "imported 2, inner 2, outer 2");
    let rotated: String = value(
        &owner,
        "select string_agg(r.name, ',') from tollgate.api_tokens t, tollgate.rotate_api_token(t.id) r where t.name = 'outer'",
    )
    .await?;
    assert_eq!(rotated, "outer,outer");
    Ok(())
}

#[tokio::test]
async fn every_way_of_issuing_logs_the_same_detail() -> Result<()> {
    let (owner, _cluster) = changed("details").await?;
    let more =
        "expires_in => '1 day', allowed_ips => '{10.0.0.0/8}', rate_limit => 10, rate_window => '02:03:04.5'";
    let created = issue_with(&owner, "ann", &format!("scopes => '{{posts:read}}', {more}")).await?;
    let derived = "select tollgate.derive_api_token($1, 'derived', '{posts:read}', null)";
    owner.query(derived, &[&created.token]).await?;
    let imported = format!(
        "select tollgate.import_api_token('ann', 'imported', sha256('x'), scopes => '{{posts:read}}', {more})"
    );
    owner.batch_execute(&imported).await?;
    owner.query("select tollgate.rotate_api_token($1)", &[&created.id]).await?;
    let differing: i64 = value(
        &owner,
        "select count(*) from tollgate.audit_log a join tollgate.api_tokens t on t.id = a.token_id
         where a.event in ('token.created', 'token.derived', 'token.imported') and a.detail - '{expires_at}'::text[]
             is distinct from jsonb_strip_nulls(jsonb_build_object(
                 'name', t.name, 'hint', t.hint, 'scopes', t.scopes, 'allowed_ips', t.allowed_ips,
                 'rate_limit', t.rate_limit, 'rate_window', t.rate_window, 'parent_id', t.parent_id,
                 'rotated_from', t.rotated_from))",
    )
    .await?;
    assert_eq!(differing, 0);
    let events: i64 = value(
        &owner,
        "select count(*) from tollgate.audit_log where detail ? 'expires_at'
             and event in ('token.created', 'token.derived', 'token.imported')",
    )
    .await?;
    assert_eq!(events, 4);
    Ok(())
}

#[tokio::test]
async fn a_scope_is_found_in_the_catalogue_as_it_is_for_the_transaction() -> Result<()> {
    let (issuer, cluster) = changed("catalogue").await?;
    let other = cluster.connect("postgres", "catalogue").await?;
    for level in ["read committed", "repeatable read"] {
        issuer
            .batch_execute(&format!(
                "begin isolation level {level}; select tollgate.define_scope('mine:a', 'x')"
            ))
            .await?;
        issue(&issuer, "ann", &["mine:a", "mine:*"]).await?;
        issuer.batch_execute("rollback").await?;
        let sql = "select tollgate.create_api_token('ann', 'key', '{mine:a,posts:read,mine:*,admin,posts:*,post:*}')";
        let error = refused(issuer.batch_execute(sql).await, &SqlState::INVALID_PARAMETER_VALUE);
        assert!(error.detail().unwrap_or_default().contains(r#""mine:a", "mine:*", "post:*""#), "{error:?}");
    }
    issuer.batch_execute("begin isolation level repeatable read; select 1").await?;
    other.batch_execute("select tollgate.drop_scope('users:write')").await?;
    let sql = "select tollgate.create_api_token('ann', 'key', '{users:write}')";
    refused(issuer.batch_execute(sql).await, &SqlState::T_R_SERIALIZATION_FAILURE);
    issuer.batch_execute("rollback").await?;
    Ok(())
}
