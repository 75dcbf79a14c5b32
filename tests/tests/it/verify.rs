//! Verification: its answers, where it works, and that it leaves nothing behind.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use crate::common::{
    self, Request, Shared, Token, Verification, World, code, issue, issue_with, refused, revoke, value,
};
use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use tokio_postgres::Client;
use tokio_postgres::error::{DbError, SqlState};
use tollgate_tests::{Cluster, DATABASE, eventually_async};

static SHARED: Shared = Shared::new(&[]);

// ---- The verdicts

#[tokio::test]
async fn each_code_is_reported_for_its_own_fault() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    let good = issue(&owner, "verdicts", &["posts:read"]).await?;
    let revoked = issue(&owner, "verdicts", &[]).await?;
    assert!(revoke(&owner, revoked.id).await?);
    let disabled = issue(&owner, "verdicts", &[]).await?;
    set(&owner, &disabled, "disabled_at = now()").await?;
    let expired = issue_with(&owner, "verdicts", "expires_in => '1 hour'").await?;
    set(&owner, &expired, "expires_at = clock_timestamp()").await?;
    let bound = issue_with(&owner, "verdicts", "allowed_ips => '{10.0.0.0/8}'").await?;
    let unknown = unknown_token();

    assert_eq!(code(&web, &good.token).await?, "VALID");
    assert_eq!(code(&web, &revoked.token).await?, "REVOKED");
    assert_eq!(code(&web, &disabled.token).await?, "DISABLED");
    assert_eq!(code(&web, &expired.token).await?, "EXPIRED");
    assert_eq!(code(&web, &bound.token).await?, "IP_NOT_ALLOWED");
    assert_eq!(Request::of(&bound.token).coming_from("11.0.0.1").code(&web).await?, "IP_NOT_ALLOWED");
    assert_eq!(Request::of(&bound.token).coming_from("10.1.2.3").code(&web).await?, "VALID");
    assert_eq!(
        Request::of(&good.token).requiring(&[Some("posts:write")]).code(&web).await?,
        "INSUFFICIENT_SCOPE"
    );
    assert_eq!(Request::of(&good.token).requiring(&[Some("posts:read")]).code(&web).await?, "VALID");
    assert_eq!(code(&web, &unknown).await?, "NOT_FOUND");
    assert_eq!(code(&web, "not a token").await?, "MALFORMED");
    Ok(())
}

#[tokio::test]
async fn the_first_fault_in_the_documented_order_is_the_one_reported() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    let token = issue_with(&owner, "order", "allowed_ips => '{10.0.0.0/8}', expires_in => '1 hour'").await?;
    set(&owner, &token, "revoked_at = now(), disabled_at = now(), expires_at = now()").await?;
    let required = [Some("posts:write")];
    let request = Request::of(&token.token).requiring(&required);

    assert_eq!(request.code(&web).await?, "REVOKED");
    set(&owner, &token, "revoked_at = NULL").await?;
    assert_eq!(request.code(&web).await?, "DISABLED");
    set(&owner, &token, "disabled_at = NULL").await?;
    assert_eq!(request.code(&web).await?, "EXPIRED");
    set(&owner, &token, "expires_at = NULL").await?;
    assert_eq!(request.code(&web).await?, "IP_NOT_ALLOWED");
    set(&owner, &token, "allowed_ips = NULL").await?;
    assert_eq!(request.code(&web).await?, "INSUFFICIENT_SCOPE");
    set(&owner, &token, "scopes = '{posts:write}'").await?;
    assert_eq!(request.code(&web).await?, "VALID");
    Ok(())
}

#[tokio::test]
async fn a_changed_character_is_malformed_or_unknown_and_never_valid() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    let token = issue(&owner, "typos", &[]).await?.token;
    for at in 0..token.len() {
        let mut changed = token.clone().into_bytes();
        changed[at] = if changed[at] == b'a' { b'b' } else { b'a' };
        let changed = String::from_utf8(changed)?;
        // The checksum does not cover the prefix, only the digest does.
        let expected = if at < 3 { "NOT_FOUND" } else { "MALFORMED" };
        assert_eq!(code(&web, &changed).await?, expected, "character {at}");
    }
    for spoilt in [format!(" {token}"), format!("{token} "), format!("Bearer {token}"), token.to_uppercase()]
    {
        assert_eq!(code(&web, &spoilt).await?, "MALFORMED");
    }
    Ok(())
}

#[tokio::test]
async fn there_is_always_exactly_one_row() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    let token = issue(&owner, "one row", &[]).await?.token;
    let huge = "f".repeat(3_000_000);
    let presented =
        [None, Some(""), Some("_"), Some("tgt_"), Some(huge.as_str()), Some("tgt_\u{1F511}"), Some(&token)];
    for token in presented {
        let expected = if token.is_some_and(|token| token.starts_with("tgt_") && token.len() == 92) {
            "VALID"
        } else {
            "MALFORMED"
        };
        // `verify` itself requires one row.
        assert_eq!(Request { token, ..Request::default() }.code(&web).await?, expected);
    }

    let unknown = common::Verification { code: "MALFORMED".into(), ..Verification::default() };
    assert_eq!(Request::default().verify(&web).await?, unknown);
    let of_null: i64 =
        value(&web, "select count(*) from tollgate.verify_api_token_hash(NULL, NULL, NULL)").await?;
    assert_eq!(of_null, 1);
    Ok(())
}

#[tokio::test]
async fn a_valid_token_returns_all_that_was_stored() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    let token = issue_with(
        &owner,
        "teller",
        r#"scopes => '{posts:read,users:*}', expires_in => '1 day', metadata => '{"plan": ["pro", 1.5, null]}'"#,
    )
    .await?;
    let stored = owner
        .query_one("select expires_at::text from tollgate.api_tokens where id = $1", &[&token.id])
        .await?;
    let expected = Verification {
        valid: true,
        code: "VALID".into(),
        token_id: Some(token.id),
        user_id: Some("teller".into()),
        name: Some("a test's".into()),
        scopes: Some(vec!["posts:read".into(), "users:*".into()]),
        expires_at: stored.get(0),
        metadata: Some(json!({"plan": ["pro", 1.5, null]})),
        ..Verification::default()
    };
    assert_eq!(Request::of(&token.token).verify(&web).await?, expected);
    Ok(())
}

#[tokio::test]
async fn a_refused_token_returns_only_its_id_and_expiry() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    let token = issue_with(&owner, "refused", r#"scopes => '{posts:read}', metadata => '{"a": 1}'"#).await?;
    let faults = [
        ("REVOKED", "revoked_at = now()"),
        ("DISABLED", "revoked_at = NULL, disabled_at = now()"),
        ("EXPIRED", "disabled_at = NULL, expires_at = '2020-02-02 02:02:02+00'"),
        ("IP_NOT_ALLOWED", "expires_at = '2220-02-02 02:02:02+00', allowed_ips = '{10.0.0.0/8}'"),
        ("INSUFFICIENT_SCOPE", "allowed_ips = NULL"),
    ];
    for (fault, change) in faults {
        set(&owner, &token, change).await?;
        let expires_at = value(
            &owner,
            &format!("select expires_at::text from tollgate.api_tokens where id = '{}'", token.id),
        )
        .await?;
        let refused = Verification {
            code: fault.into(),
            token_id: Some(token.id),
            expires_at,
            ..Verification::default()
        };
        let answer = Request::of(&token.token).requiring(&[Some("users:read")]).verify(&web).await?;
        assert_eq!(answer, refused);
    }

    let nothing = Verification { code: "NOT_FOUND".into(), ..Verification::default() };
    assert_eq!(Request::of(&unknown_token()).verify(&web).await?, nothing);
    Ok(())
}

#[tokio::test]
async fn required_scopes_are_all_required() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    let token = issue(&owner, "scopes", &["posts:*", "users:read"]).await?.token;
    let valid: [&[Option<&str>]; 4] = [
        &[],
        &[Some("posts:read"), Some("users:read")],
        &[Some("posts:comments:read")],
        &[Some("posts:read"), Some("posts:read")],
    ];
    for required in valid {
        assert_eq!(Request::of(&token).requiring(required).code(&web).await?, "VALID", "{required:?}");
    }
    let refused: [&[Option<&str>]; 7] = [
        &[Some("users:write")],
        &[Some("posts:read"), Some("users:write")],
        &[Some("posts")],
        &[Some("")],
        &[Some("Posts:read")],
        // A required NULL is a value that was lost on the way, and must not be granted.
        &[None],
        &[Some("posts:read"), None],
    ];
    for required in refused {
        let code = Request::of(&token).requiring(required).code(&web).await?;
        assert_eq!(code, "INSUFFICIENT_SCOPE", "{required:?}");
    }

    let admin = issue(&owner, "scopes", &["admin"]).await?.token;
    assert_eq!(Request::of(&admin).requiring(&[Some("anything:at-all")]).code(&web).await?, "VALID");
    assert_eq!(Request::of(&admin).requiring(&[Some("not a scope")]).code(&web).await?, "INSUFFICIENT_SCOPE");
    let two_dimensions = web
        .query_one(
            "select v.code from tollgate.verify_api_token($1, array[['posts:read'], ['users:write']]) v",
            &[&token],
        )
        .await?;
    assert_eq!(two_dimensions.get::<_, &str>(0), "INSUFFICIENT_SCOPE");
    Ok(())
}

#[tokio::test]
async fn networks_are_matched_by_the_address_that_the_application_saw() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    let token = issue_with(
        &owner,
        "networks",
        "allowed_ips => '{10.0.0.0/8, 192.0.2.7, 2001:db8::/32, ::ffff:198.51.100.0/120}'",
    )
    .await?
    .token;
    let allowed = [
        "10.0.0.0",
        "10.255.255.255",
        "192.0.2.7",
        "2001:db8::1",
        "2001:db8:ffff::",
        "198.51.100.9",
        // As a dual-stack server reports an IPv4 client (RFC 4291 §2.5.5.2).
        "::ffff:10.1.2.3",
        "::ffff:192.0.2.7",
        "::ffff:198.51.100.200",
        // A network of clients within an allowed one.
        "10.1.0.0/16",
    ];
    for client in allowed {
        assert_eq!(Request::of(&token).coming_from(client).code(&web).await?, "VALID", "{client}");
    }
    let refused = [
        "11.0.0.0",
        "9.255.255.255",
        "192.0.2.6",
        "192.0.2.7/31",
        "2001:db9::1",
        "::10.1.2.3",
        "::ffff:11.0.0.1",
        "198.51.101.1",
        "10.0.0.0/7",
        "0.0.0.0/0",
        "::/0",
    ];
    for client in refused {
        assert_eq!(Request::of(&token).coming_from(client).code(&web).await?, "IP_NOT_ALLOWED", "{client}");
    }
    assert_eq!(Request::of(&token).code(&web).await?, "IP_NOT_ALLOWED");

    let everywhere = issue_with(&owner, "networks", "allowed_ips => '{0.0.0.0/0}'").await?.token;
    assert_eq!(Request::of(&everywhere).coming_from("203.0.113.1").code(&web).await?, "VALID");
    assert_eq!(Request::of(&everywhere).coming_from("::ffff:203.0.113.1").code(&web).await?, "VALID");
    assert_eq!(Request::of(&everywhere).coming_from("2001:db8::1").code(&web).await?, "IP_NOT_ALLOWED");
    Ok(())
}

#[tokio::test]
async fn a_digest_verifies_as_its_token_does() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    let token =
        issue_with(&owner, "digest", "scopes => '{posts:read}', allowed_ips => '{10.0.0.0/8}'").await?;
    let digest = tollgate_core::token::digest(token.token.as_bytes()).to_vec();
    let sql = format!(
        "select {} from tollgate.verify_api_token_hash($1, $2, $3::text::inet) v",
        Verification::COLUMNS
    );
    let required = vec!["posts:read"];
    let by_digest = web.query_one(&sql, &[&digest, &required, &"10.0.0.1"]).await?;
    let by_token = Request::of(&token.token)
        .requiring(&[Some("posts:read")])
        .coming_from("10.0.0.1")
        .verify(&web)
        .await?;
    assert_eq!(Verification::of(&by_digest), by_token);
    assert!(by_token.valid);

    let code_of = async |digest: Option<&[u8]>, required: &[&str]| -> Result<String> {
        let row = web
            .query_one(
                "select v.code from tollgate.verify_api_token_hash($1, $2, '10.0.0.1') v",
                &[&digest, &required],
            )
            .await?;
        Ok(row.get(0))
    };
    assert_eq!(code_of(Some(&digest), &["posts:write"]).await?, "INSUFFICIENT_SCOPE");
    assert_eq!(code_of(Some(&[0; 32]), &[]).await?, "NOT_FOUND");
    for length in [0, 1, 31, 33, 64, 10_000] {
        let mut wrong = digest.clone();
        wrong.resize(length, 0);
        assert_eq!(code_of(Some(&wrong), &[]).await?, "MALFORMED", "{length} bytes");
    }
    assert_eq!(code_of(None, &[]).await?, "MALFORMED");
    // The token itself, sent in place of its digest.
    assert_eq!(code_of(Some(token.token.as_bytes()), &[]).await?, "MALFORMED");
    Ok(())
}

#[tokio::test]
async fn a_presented_token_can_be_checked_for_one_scope() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    let token = issue(&owner, "asked", &["posts:*"]).await?;
    let bound = issue_with(&owner, "asked", "scopes => '{posts:*}', allowed_ips => '{0.0.0.0/0}'").await?;
    let ask = async |token: Option<&str>, scope: Option<&str>| -> Result<Option<bool>> {
        Ok(web.query_one("select tollgate.token_has_scope($1, $2)", &[&token, &scope]).await?.get(0))
    };
    assert_eq!(ask(Some(&token.token), Some("posts:read")).await?, Some(true));
    for (token, scope) in [
        (Some(token.token.as_str()), Some("users:read")),
        (Some(&token.token), None),
        (Some(&token.token), Some("")),
        (Some(&bound.token), Some("posts:read")),
        (Some(&unknown_token()), Some("posts:read")),
        (Some("junk"), Some("posts:read")),
        (None, Some("posts:read")),
        (None, None),
    ] {
        assert_eq!(ask(token, scope).await?, Some(false), "{scope:?}");
    }
    revoke(&owner, token.id).await?;
    assert_eq!(ask(Some(&token.token), Some("posts:read")).await?, Some(false));
    Ok(())
}

#[tokio::test]
async fn metadata_and_scopes_stored_out_of_line_come_back_whole() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    let digits =
        value::<String>(&owner, "select string_agg(md5(n::text), '-') from generate_series(1, 3200) n")
            .await?;
    let metadata = json!({ "digits": digits, "zeros": "0 ".repeat(25_000) });
    let scopes: Vec<String> =
        (0..3000).map(|n| format!("posts:{n:x}:{}:*", "x".repeat(1 + n % 40))).collect();
    let row =
        owner.query_one("select id, token from tollgate.create_api_token('large', 'large')", &[]).await?;
    let (id, token): (uuid::Uuid, String) = (row.get(0), row.get(1));
    // By hand: no function accepts as much.
    owner
        .execute(
            "update tollgate.api_tokens set scopes = $2, metadata = $3 where id = $1",
            &[&id, &scopes, &metadata],
        )
        .await?;
    let out_of_line: i64 = value(
        &owner,
        &format!(
            "select pg_relation_size(c.reltoastrelid) from pg_class c where c.oid = 'tollgate.api_tokens'::regclass
             and (select pg_column_size(metadata) > 50000 from tollgate.api_tokens where id = '{id}')"
        ),
    )
    .await?;
    assert!(out_of_line > 100_000, "{out_of_line} bytes are out of line: this tests nothing");

    let answer = Request::of(&token).requiring(&[Some("posts:bb7:x:y")]).verify(&web).await?;
    assert_eq!(answer.code, "INSUFFICIENT_SCOPE");
    let last = format!("{}write", scopes[2999].trim_end_matches('*'));
    let answer = Request::of(&token).requiring(&[Some(&last)]).verify(&web).await?;
    assert_eq!(answer.code, "VALID");
    assert_eq!(answer.metadata, Some(metadata));
    assert_eq!(answer.scopes, Some(scopes.clone()));

    web.batch_execute("begin").await?;
    common::authenticate(&web, &token).await?;
    let identity = common::identity(&web).await?;
    assert_eq!(identity.map(|identity| identity.scopes), Some(scopes));
    web.batch_execute("rollback").await?;
    Ok(())
}

#[tokio::test]
async fn user_ids_and_names_may_be_in_any_script() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    let long = "\u{1F511}".repeat(255);
    for user in ["Grüße, \"O'Brien\"\\", "用户-12", "مستخدم", "\u{1F469}\u{200D}\u{1F4BB}\n\t", long.as_str()]
    {
        let row = owner
            .query_one("select token from tollgate.create_api_token($1, left($1, 100))", &[&user])
            .await?;
        let token: String = row.get(0);
        let answer = Request::of(&token).verify(&web).await?;
        assert_eq!(answer.user_id.as_deref(), Some(user));
        assert_eq!(answer.name, Some(user.chars().take(100).collect()));
        web.batch_execute("begin").await?;
        common::authenticate(&web, &token).await?;
        assert_eq!(common::current_user(&web).await?.as_deref(), Some(user));
        web.batch_execute("commit").await?;
    }
    Ok(())
}

// ---- Where it works

#[tokio::test]
async fn it_works_in_transactions_of_every_kind() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    let token = issue(&owner, "transactions", &[]).await?.token;
    for kind in [
        "read only",
        "read write",
        "isolation level read committed",
        "isolation level repeatable read",
        "isolation level repeatable read, read only",
        "isolation level serializable",
        "isolation level serializable, read only, deferrable",
    ] {
        // Both as the statement that takes the transaction's snapshot, and after it.
        for first in ["", "select 1"] {
            web.batch_execute(&format!("begin transaction {kind}; {first}")).await?;
            assert_eq!(code(&web, &token).await?, "VALID", "{kind}");
            assert_eq!(code(&web, &unknown_token()).await?, "NOT_FOUND", "{kind}");
            web.batch_execute("commit").await?;
        }
    }
    Ok(())
}

#[tokio::test]
async fn it_works_inside_functions_of_every_kind() -> Result<()> {
    let World { owner, cluster: _cluster, web } = SHARED.world().await?;
    let token = issue(&owner, "functions", &["posts:read"]).await?;
    owner
        .batch_execute(
            "create schema functions;
             create function functions.by_assignment(t text) returns text language plpgsql as $$
                 declare
                     v tollgate.verification;
                     -- An array variable is an expanded object, which no other caller passes.
                     required text[] := array['posts:read'];
                 begin
                     required := required || array['posts:read'];
                     v := tollgate.verify_api_token(t, required);
                     return v.code;
                 end $$;
             create function functions.by_select(t text) returns text language plpgsql stable as $$
                 declare c text;
                 begin
                     select v.code into c from tollgate.verify_api_token(t) v;
                     return c;
                 end $$;
             create function functions.dynamically(t text) returns text language plpgsql as $$
                 declare c text;
                 begin
                     execute 'select (tollgate.verify_api_token($1)).code' into c using t;
                     return c;
                 end $$;
             create function functions.in_sql(t text) returns text language sql as
                 'select v.code from tollgate.verify_api_token(t) v';
             create function functions.as_definer(t text) returns text language sql security definer
                 set search_path = pg_catalog, pg_temp as 'select v.code from tollgate.verify_api_token(t) v';
             create function functions.caught(t text) returns text language plpgsql as $$
                 declare c text;
                 begin
                     begin
                         c := (tollgate.verify_api_token(t)).code;
                         perform 1 / 0;
                     exception when division_by_zero then
                         return (tollgate.verify_api_token(t)).code;
                     end;
                     return 'not reached: ' || c;
                 end $$;
             grant usage on schema functions to web",
        )
        .await?;
    let callers = ["by_assignment", "by_select", "dynamically", "in_sql", "as_definer", "caught"];
    for _ in 0..8 {
        for caller in callers {
            let sql = format!("select functions.{caller}($1)");
            let answer: String = web.query_one(&sql, &[&token.token]).await?.get(0);
            assert_eq!(answer, "VALID", "{caller}");
        }
    }
    revoke(&owner, token.id).await?;
    for caller in callers {
        let sql = format!("select functions.{caller}($1)");
        let answer: String = web.query_one(&sql, &[&token.token]).await?.get(0);
        assert_eq!(answer, "REVOKED", "{caller}");
    }
    Ok(())
}

#[tokio::test]
async fn a_named_prepared_statement_with_a_generic_plan_sees_a_revocation() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    let token = issue(&owner, "prepared", &[]).await?;
    web.batch_execute("prepare ask(text) as select v.code from tollgate.verify_api_token($1) v").await?;
    let execute = format!("execute ask('{}')", token.token);
    let ask = async || -> Result<String> {
        let messages = web.simple_query(&execute).await?;
        let row = messages.iter().find_map(|message| match message {
            tokio_postgres::SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
            _ => None,
        });
        Ok(row.unwrap_or_default())
    };
    for _ in 0..8 {
        assert_eq!(ask().await?, "VALID");
    }
    let generic: i64 =
        value(&web, "select generic_plans from pg_prepared_statements where name = 'ask'").await?;
    assert!(generic > 0, "this was to test a generic plan");
    revoke(&owner, token.id).await?;
    assert_eq!(ask().await?, "REVOKED");
    Ok(())
}

#[tokio::test]
async fn a_cursor_verifies_each_row_at_the_moment_it_is_fetched() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    let tokens = [
        issue(&owner, "cursor", &[]).await?,
        issue(&owner, "cursor", &[]).await?,
        issue(&owner, "cursor", &[]).await?,
    ];
    let presented = tokens.each_ref().map(|token| format!("'{}'", token.token)).join(", ");
    web.batch_execute(&format!(
        "begin isolation level repeatable read;
         declare answers scroll cursor for
             select (tollgate.verify_api_token(t)).code from unnest(array[{presented}]) t"
    ))
    .await?;
    assert_eq!(value::<String>(&web, "fetch next from answers").await?, "VALID");
    revoke(&owner, tokens[1].id).await?;
    assert_eq!(value::<String>(&web, "fetch next from answers").await?, "REVOKED");
    assert_eq!(value::<String>(&web, "fetch next from answers").await?, "VALID");
    web.batch_execute("commit").await?;

    web.batch_execute(&format!(
        "begin;
         declare kept cursor with hold for
             select (tollgate.verify_api_token(t)).code from unnest(array[{presented}]) t;
         commit"
    ))
    .await?;
    let kept = web.query("fetch all from kept", &[]).await?;
    let kept: Vec<&str> = kept.iter().map(|row| row.get(0)).collect();
    assert_eq!(kept, ["VALID", "REVOKED", "VALID"]);
    web.batch_execute("close kept").await?;
    Ok(())
}

#[tokio::test]
async fn a_hot_standby_verifies_and_learns_of_a_revocation() -> Result<()> {
    let primary = common::start(Cluster::builder())?;
    let standby = primary.standby()?;
    let owner = primary.connect("postgres", DATABASE).await?;
    let web = standby.connect("web", DATABASE).await?;
    let token = issue(&owner, "standby", &["posts:read"]).await?;
    standby.catch_up_with(&primary)?;

    assert_eq!(code(&web, &token.token).await?, "VALID");
    web.batch_execute("begin isolation level repeatable read; select 1").await?;
    assert_eq!(code(&web, &token.token).await?, "VALID");
    common::authenticate(&web, &token.token).await?;
    assert_eq!(common::current_user(&web).await?.as_deref(), Some("standby"));

    revoke(&owner, token.id).await?;
    standby.catch_up_with(&primary)?;
    assert_eq!(code(&web, &token.token).await?, "REVOKED", "in a snapshot older than the revocation");
    web.batch_execute("commit").await?;
    assert_eq!(code(&web, &token.token).await?, "REVOKED");
    Ok(())
}

#[tokio::test]
async fn it_works_without_being_preloaded() -> Result<()> {
    let cluster = common::start(Cluster::builder().preload(false))?;
    let owner = cluster.connect("postgres", DATABASE).await?;
    let web = cluster.connect("web", DATABASE).await?;
    let token = issue(&owner, "unloaded", &["posts:read"]).await?;
    assert_eq!(code(&web, &token.token).await?, "VALID");
    assert_eq!(
        Request::of(&token.token).requiring(&[Some("users:read")]).code(&web).await?,
        "INSUFFICIENT_SCOPE"
    );
    revoke(&owner, token.id).await?;
    assert_eq!(code(&web, &token.token).await?, "REVOKED");

    let row =
        owner.query_one("select metering, metering_detail, verifications from tollgate.stats()", &[]).await?;
    assert!(!row.get::<_, bool>(0));
    assert!(row.get::<_, &str>(1).contains("shared_preload_libraries"));
    assert_eq!(row.get::<_, Option<serde_json::Value>>(2), None);
    for needs_memory in ["select * from tollgate.drain_usage()", "select tollgate.ack_usage(1)"] {
        let error =
            refused(owner.batch_execute(needs_memory).await, &SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE);
        assert!(error.hint().is_some_and(|hint| hint.contains("shared_preload_libraries")), "{error:?}");
    }
    Ok(())
}

// ---- Which state it sees

#[tokio::test]
async fn a_revoked_token_is_refused_inside_an_older_snapshot() -> Result<()> {
    let World { owner, web, cluster } = SHARED.world().await?;
    for level in ["repeatable read", "serializable", "serializable, read only"] {
        let token = issue(&owner, "snapshots", &[]).await?;
        let older = cluster.connect("postgres", DATABASE).await?;
        older.batch_execute(&format!("begin isolation level {level}")).await?;
        let seen = "select revoked_at is null from tollgate.api_tokens where id = $1";
        assert!(older.query_one(seen, &[&token.id]).await?.get::<_, bool>(0));
        web.batch_execute(&format!("begin isolation level {level}; select count(*) from pg_class")).await?;
        assert_eq!(code(&web, &token.token).await?, "VALID", "{level}");

        assert!(revoke(&owner, token.id).await?);
        assert_eq!(code(&web, &token.token).await?, "REVOKED", "{level}");
        assert_eq!(code(&older, &token.token).await?, "REVOKED", "{level}");
        // The snapshot is still old: an ordinary query there still sees the token as valid.
        assert!(older.query_one(seen, &[&token.id]).await?.get::<_, bool>(0), "{level}");
        web.batch_execute("commit").await?;
        older.batch_execute("commit").await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_token_is_valid_in_the_transaction_that_issues_it_and_gone_after_its_rollback() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    owner.batch_execute("begin").await?;
    let token = issue(&owner, "own", &[]).await?;
    assert_eq!(code(&owner, &token.token).await?, "VALID");
    assert_eq!(code(&web, &token.token).await?, "NOT_FOUND", "seen before its commit");
    owner.batch_execute("rollback").await?;
    assert_eq!(code(&owner, &token.token).await?, "NOT_FOUND");

    owner.batch_execute("begin isolation level repeatable read; select 1; savepoint s").await?;
    let token = issue(&owner, "own", &[]).await?;
    assert_eq!(code(&owner, &token.token).await?, "VALID");
    owner.batch_execute("rollback to s").await?;
    assert_eq!(code(&owner, &token.token).await?, "NOT_FOUND");
    owner.batch_execute("commit").await?;
    Ok(())
}

#[tokio::test]
async fn a_revocation_is_seen_at_once_by_its_own_transaction_and_undone_with_it() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    let token = issue(&owner, "undone", &[]).await?;
    for level in ["read committed", "repeatable read"] {
        owner.batch_execute(&format!("begin isolation level {level}; select 1; savepoint s")).await?;
        revoke(&owner, token.id).await?;
        assert_eq!(code(&owner, &token.token).await?, "REVOKED");
        // Others continue undisturbed, and without waiting, until it is committed.
        assert_eq!(code(&web, &token.token).await?, "VALID");
        owner.batch_execute("rollback to s").await?;
        assert_eq!(code(&owner, &token.token).await?, "VALID");
        owner.batch_execute("commit").await?;
    }
    let in_one_statement = format!(
        "select case when tollgate.revoke_api_token('{}') then (tollgate.verify_api_token('{}')).code end",
        token.id, token.token
    );
    assert_eq!(value::<String>(&owner, &in_one_statement).await?, "REVOKED");
    assert_eq!(code(&web, &token.token).await?, "REVOKED");
    Ok(())
}

#[tokio::test]
async fn an_expiry_takes_effect_by_the_clock_and_not_by_the_transactions_time() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    web.batch_execute("begin isolation level repeatable read; select now()").await?;
    let token = issue_with(&owner, "clock", "expires_in => '700 milliseconds'").await?;
    assert_eq!(code(&web, &token.token).await?, "VALID");
    eventually_async(Duration::from_secs(10), "the token to expire", async || {
        code(&web, &token.token).await.is_ok_and(|code| code == "EXPIRED")
    })
    .await;
    web.batch_execute("commit").await?;
    let late: bool = value(
        &owner,
        &format!("select expires_at <= now() from tollgate.api_tokens where id = '{}'", token.id),
    )
    .await?;
    assert!(late, "it was refused before its time");
    Ok(())
}

#[tokio::test]
async fn infinite_expiries_are_understood() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    let token = issue(&owner, "infinite", &[]).await?;
    set(&owner, &token, "expires_at = 'infinity'").await?;
    assert_eq!(code(&web, &token.token).await?, "VALID");
    set(&owner, &token, "expires_at = '-infinity'").await?;
    assert_eq!(code(&web, &token.token).await?, "EXPIRED");
    Ok(())
}

// ---- What it leaves behind

#[tokio::test]
async fn it_takes_no_lock_that_a_writer_would_wait_for() -> Result<()> {
    let World { owner, web, cluster } = SHARED.world().await?;
    let token = issue(&owner, "locks", &["posts:read"]).await?;
    web.batch_execute("begin isolation level repeatable read").await?;
    assert_eq!(code(&web, &token.token).await?, "VALID");
    common::authenticate(&web, &token.token).await?;
    assert_eq!(Request::of(&token.token).requiring(&[Some("nope")]).code(&web).await?, "INSUFFICIENT_SCOPE");

    let pid: i32 = value(&web, "select pg_backend_pid()").await?;
    let locks = owner
        .query(
            "select locktype || ' ' || mode from pg_locks
             where pid = $1 and not (locktype = 'relation' and mode = 'AccessShareLock')
                   and not (locktype = 'virtualxid')",
            &[&pid],
        )
        .await?;
    let locks: Vec<&str> = locks.iter().map(|row| row.get(0)).collect();
    assert!(locks.is_empty(), "{locks:?}");
    let xmax: String =
        value(&owner, &format!("select xmax::text from tollgate.api_tokens where id = '{}'", token.id))
            .await?;
    assert_eq!(xmax, "0");

    let writer = cluster.connect("postgres", DATABASE).await?;
    writer.batch_execute("set lock_timeout = '5s'").await?;
    set(&writer, &token, "name = 'changed'").await?;
    assert!(revoke(&writer, token.id).await?);
    assert_eq!(code(&web, &token.token).await?, "REVOKED");
    web.batch_execute("commit").await?;
    Ok(())
}

#[tokio::test]
async fn it_waits_for_no_writer() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    let token = issue(&owner, "waits", &[]).await?;
    owner.batch_execute("begin").await?;
    owner.execute("select from tollgate.api_tokens where id = $1 for update", &[&token.id]).await?;
    set(&owner, &token, "name = 'half way', disabled_at = now()").await?;
    web.batch_execute("set lock_timeout = '5s'").await?;
    assert_eq!(code(&web, &token.token).await?, "VALID");
    owner.batch_execute("rollback").await?;
    Ok(())
}

#[tokio::test]
async fn it_assigns_no_transaction_id() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    let token = issue(&owner, "xid", &["posts:read"]).await?;
    for level in ["read committed", "repeatable read", "serializable"] {
        web.batch_execute(&format!("begin isolation level {level}")).await?;
        for presented in [token.token.as_str(), &unknown_token(), "junk"] {
            code(&web, presented).await?;
            web.query("select tollgate.token_has_scope($1, 'posts:read')", &[&presented]).await?;
        }
        common::authenticate(&web, &token.token).await?;
        let assigned: Option<String> = value(&web, "select pg_current_xact_id_if_assigned()::text").await?;
        assert_eq!(assigned, None, "{level}");
        web.batch_execute("commit").await?;
    }
    Ok(())
}

#[tokio::test]
async fn it_writes_no_wal() -> Result<()> {
    let cluster = common::start(Cluster::builder().setting("autovacuum", "off"))?;
    let owner = cluster.connect("postgres", DATABASE).await?;
    let web = cluster.connect("web", DATABASE).await?;
    let valid = issue(&owner, "wal", &["posts:read"]).await?;
    let revoked = issue(&owner, "wal", &[]).await?;
    revoke(&owner, revoked.id).await?;
    let expired = issue(&owner, "wal", &[]).await?;
    set(&owner, &expired, "expires_at = now()").await?;
    let presented =
        format!("'{}', '{}', '{}', '{}', 'junk'", valid.token, revoked.token, expired.token, unknown_token());
    let many = format!(
        "select v.code, count(*) from generate_series(1, 500), unnest(array[{presented}]) t,
             lateral tollgate.verify_api_token(t) v group by 1 order by 1"
    );
    // Reading a page for the first time may write to it (hint bits, pruning); VACUUM does that here in advance.
    owner.batch_execute("vacuum (freeze) tollgate.api_tokens").await?;
    owner.batch_execute("checkpoint").await?;
    let codes = web.query(&many, &[]).await?;
    let codes: Vec<&str> = codes.iter().map(|row| row.get(0)).collect();
    assert_eq!(codes, ["EXPIRED", "MALFORMED", "NOT_FOUND", "REVOKED", "VALID"]);

    // The server's own processes may write something at any time, but not in each of the rounds.
    let position = "select pg_current_wal_insert_lsn()::text";
    let mut written = Vec::new();
    for _ in 0..5 {
        let before: String = value(&owner, position).await?;
        web.query(&many, &[]).await?;
        web.batch_execute("begin").await?;
        common::authenticate(&web, &valid.token).await?;
        web.batch_execute("commit").await?;
        let after: String = value(&owner, position).await?;
        if before == after {
            return Ok(());
        }
        written.push((before, after));
    }
    panic!("each of the rounds wrote WAL: {written:?}");
}

#[tokio::test]
async fn an_error_in_the_middle_of_a_verification_leaks_nothing() -> Result<()> {
    let World { owner, cluster, .. } = SHARED.world().await?;
    let good = issue(&owner, "errors", &[]).await?;
    // Over its limit, which authenticate raises while the row is pinned.
    let limited = issue_with(&owner, "errors", "rate_limit => 1, rate_window => '1 day'").await?;
    assert_eq!(code(&owner, &limited.token).await?, "VALID");
    let (client, mut messages) = cluster.listen("web", DATABASE).await?;
    let sql = format!(
        "do $$ begin
             for n in 1..3000 loop
                 begin
                     perform tollgate.authenticate('{}');
                     raise exception 'not refused';
                 exception when configuration_limit_exceeded then
                     if (tollgate.verify_api_token('{}')).code <> 'VALID' then raise exception 'not valid'; end if;
                 end;
             end loop;
         end $$",
        limited.token, good.token
    );
    client.batch_execute(&sql).await?;
    for end in ["commit", "rollback"] {
        client.batch_execute("begin; savepoint s").await?;
        let error = client.query("select tollgate.authenticate($1)::text", &[&limited.token]).await;
        refused(error, &SqlState::CONFIGURATION_LIMIT_EXCEEDED);
        client.batch_execute("rollback to s").await?;
        assert_eq!(code(&client, &good.token).await?, "VALID");
        client.batch_execute(end).await?;
    }
    while let Ok(message) = messages.try_recv() {
        if let tokio_postgres::AsyncMessage::Notice(notice) = message {
            panic!("{}", common::text_of(&notice));
        }
    }
    // Nothing is held that a vacuum or a change of the table would wait for.
    let pid: i32 = value(&client, "select pg_backend_pid()").await?;
    let held = "select count(*) from pg_locks where pid = $1 and locktype <> 'virtualxid'";
    assert_eq!(owner.query_one(held, &[&pid]).await?.get::<_, i64>(0), 0);
    let log = cluster.log();
    assert!(!log.contains("leak") && !log.contains("not closed"), "{log}");
    Ok(())
}

// ---- During changes of the table

/// Sessions that verify continuously while something else happens.
struct Busy {
    stop: Arc<AtomicBool>,
    verified: Arc<AtomicU64>,
    sessions: Vec<tokio::task::JoinHandle<Vec<String>>>,
}

/// A failing test must not wait for them for ever.
impl Drop for Busy {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

impl Busy {
    /// `expected` judges each answer: a code, or the SQLSTATE and message of an error. [`Busy::stop`] returns those
    /// that it does not accept.
    async fn start(
        cluster: &Cluster,
        database: &str,
        token: &str,
        expected: fn(&str) -> bool,
    ) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let verified = Arc::new(AtomicU64::new(0));
        let mut sessions = Vec::new();
        // Named prepared statements, unnamed ones, and transactions of several verifications.
        for kind in 0..3 {
            let client = cluster.connect("web", database).await?;
            let (stop, verified, token) = (Arc::clone(&stop), Arc::clone(&verified), token.to_owned());
            sessions.push(tokio::spawn(async move {
                let mut unexpected = Vec::new();
                let text = "select v.code from tollgate.verify_api_token($1) v";
                let prepared = client.prepare(text).await.expect("a statement to prepare");
                while !stop.load(Ordering::Relaxed) {
                    if kind == 2
                        && client.batch_execute("begin isolation level repeatable read").await.is_err()
                    {
                        break;
                    }
                    for _ in 0..if kind == 2 { 4 } else { 1 } {
                        let answer = if kind == 0 {
                            client.query_one(&prepared, &[&token]).await
                        } else {
                            client.query_one(text, &[&token]).await
                        };
                        let answer = match answer {
                            Ok(row) => row.get::<_, String>(0),
                            Err(error) => match error.as_db_error() {
                                Some(error) => format!("{}: {}", error.code().code(), error.message()),
                                None => {
                                    unexpected.push(error.to_string());
                                    return unexpected;
                                }
                            },
                        };
                        if !expected(&answer) && unexpected.len() < 10 {
                            unexpected.push(answer);
                        }
                        verified.fetch_add(1, Ordering::Relaxed);
                    }
                    if kind == 2 && client.batch_execute("rollback").await.is_err() {
                        break;
                    }
                }
                unexpected
            }));
        }
        let busy = Self { stop, verified, sessions };
        busy.go_on().await;
        Ok(busy)
    }

    /// Waits until each session has done many more verifications.
    async fn go_on(&self) {
        let target = self.verified.load(Ordering::Relaxed) + 60;
        eventually_async(Duration::from_secs(20), "the sessions to continue verifying", async || {
            self.verified.load(Ordering::Relaxed) > target
        })
        .await;
    }

    async fn stop(mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        for session in std::mem::take(&mut self.sessions) {
            let unexpected = session.await?;
            assert!(unexpected.is_empty(), "unexpected answers: {unexpected:#?}");
        }
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rebuilding_the_table_or_its_indexes_disturbs_no_verification() -> Result<()> {
    let cluster = SHARED.cluster()?;
    common::database(&cluster, "rebuilt")?;
    let owner = cluster.connect("postgres", "rebuilt").await?;
    let token = issue(&owner, "rebuilt", &[]).await?;
    let other = issue(&owner, "rebuilt", &[]).await?;
    let idle = cluster.connect("web", "rebuilt").await?;
    assert_eq!(code(&idle, &token.token).await?, "VALID");

    let busy = Busy::start(&cluster, "rebuilt", &token.token, |answer| answer == "VALID").await?;
    for rebuild in [
        "reindex index tollgate.api_tokens_token_hash",
        "reindex index concurrently tollgate.api_tokens_token_hash",
        "reindex table tollgate.api_tokens",
        "reindex table concurrently tollgate.api_tokens",
        "vacuum full tollgate.api_tokens",
        "cluster tollgate.api_tokens using api_tokens_pkey",
        "vacuum (freeze, analyze) tollgate.api_tokens",
        // A session that waits for this finds another index under the name.
        "drop index tollgate.api_tokens_token_hash;
         create unique index api_tokens_token_hash on tollgate.api_tokens (token_hash)",
        // An upgrade of the extension may append columns.
        "alter table tollgate.api_tokens add column added text default 'x'",
    ] {
        for _ in 0..3 {
            owner.batch_execute(rebuild).await?;
            if rebuild.starts_with("alter") {
                break;
            }
            busy.go_on().await;
        }
        assert_eq!(code(&idle, &token.token).await?, "VALID", "{rebuild}");
        assert_eq!(code(&idle, &other.token).await?, "VALID", "{rebuild}");
    }
    busy.go_on().await;
    busy.stop().await?;

    revoke(&owner, token.id).await?;
    assert_eq!(code(&idle, &token.token).await?, "REVOKED");
    assert_eq!(code(&idle, &issue(&owner, "rebuilt", &[]).await?.token).await?, "VALID");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_survives_the_extension_being_dropped_and_created_again() -> Result<()> {
    let cluster = SHARED.cluster()?;
    common::database(&cluster, "recreated")?;
    let owner = cluster.connect("postgres", "recreated").await?;
    let web = cluster.connect("web", "recreated").await?;
    let prepared = web.prepare("select v.code from tollgate.verify_api_token($1) v").await?;

    for round in 0..3 {
        let token = issue(&owner, "recreated", &[]).await?;
        assert_eq!(code(&web, &token.token).await?, "VALID", "round {round}");
        let answer = web.query_one(&prepared, &[&token.token]).await?;
        assert_eq!(answer.get::<_, &str>(0), "VALID", "round {round}");
        // Meanwhile a verification reports that the token, or the function, is gone: never that a token is valid when
        // it is not, and nothing that looks like a fault of the server.
        let busy = Busy::start(&cluster, "recreated", &token.token, |answer| {
            ["VALID", "NOT_FOUND"].contains(&answer)
                || ["3F000", "42883", "42501", "42P01", "25P02", "55000"].contains(&&answer[..5])
        })
        .await?;
        owner.batch_execute("drop extension tollgate cascade; create extension tollgate").await?;
        common::prepare(&cluster, "recreated")?;
        busy.go_on().await;
        assert_eq!(code(&web, &token.token).await?, "NOT_FOUND", "round {round}");
        busy.stop().await?;

        let fresh = issue(&owner, "recreated", &[]).await?;
        assert_eq!(code(&web, &fresh.token).await?, "VALID", "round {round}");
        let answer = web.query_one(&prepared, &[&fresh.token]).await?;
        assert_eq!(answer.get::<_, &str>(0), "VALID", "round {round}");
        revoke(&owner, fresh.id).await?;
        assert_eq!(code(&web, &fresh.token).await?, "REVOKED", "round {round}");
    }

    owner.batch_execute("drop extension tollgate cascade").await?;
    let error = common::error(web.query_one(&prepared, &[&"x"]).await);
    assert!(["3F000", "42883"].contains(&error.code().code()), "{error:?}");
    Ok(())
}

#[tokio::test]
async fn a_table_that_was_changed_by_hand_is_refused_rather_than_misread() -> Result<()> {
    let cluster = SHARED.cluster()?;
    common::database(&cluster, "tampered")?;
    let owner = cluster.connect("postgres", "tampered").await?;
    let web = cluster.connect("web", "tampered").await?;
    let token = issue(&owner, "tampered", &[]).await?.token;
    assert_eq!(code(&web, &token).await?, "VALID");
    for (change, undo) in [
        (
            "alter table tollgate.api_tokens rename column revoked_at to withdrawn_at",
            "alter table tollgate.api_tokens rename column withdrawn_at to revoked_at",
        ),
        (
            "alter table tollgate.api_tokens rename to tokens_table",
            "alter table tollgate.tokens_table rename to api_tokens",
        ),
        (
            "alter index tollgate.api_tokens_token_hash rename to other",
            "alter index tollgate.other rename to api_tokens_token_hash",
        ),
        (
            "alter type tollgate.verification add attribute more text",
            "alter type tollgate.verification drop attribute more",
        ),
    ] {
        owner.batch_execute(change).await?;
        let answer = web.query_one("select (tollgate.verify_api_token($1)).code", &[&token]).await;
        let error = refused(answer, &SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE);
        assert!(error.detail().is_some() && error.hint().is_some(), "{error:?}");
        owner.batch_execute(undo).await?;
        if !change.starts_with("alter type") {
            assert_eq!(code(&web, &token).await?, "VALID", "{undo}");
        }
    }
    Ok(())
}

/// Changes a token behind Tollgate's back, as its owner.
#[tokio::test]
async fn the_last_refusal_says_what_exactly_was_wrong_and_never_repeats_it() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    let token = issue(&owner, "refused", &["posts:read"]).await?;
    let good = token.token.as_str();
    let last = async || value::<Option<Value>>(&web, "select tollgate.last_refusal()").await;
    let mut typo = good.to_owned();
    typo.replace_range(10..11, if &good[10..11] == "0" { "1" } else { "0" });
    let malformed = [
        (None, "missing"),
        (Some(String::new()), "empty"),
        (Some(format!("Bearer {good}")), "scheme"),
        (Some(format!(" bearer {good}")), "scheme"),
        (Some(format!("Token: {good}")), "scheme"),
        (Some(format!("{good}\n")), "whitespace"),
        (Some(format!("{} {}", &good[..20], &good[20..])), "whitespace"),
        (Some(format!("\u{feff}{good}")), "whitespace"),
        (Some(format!("\"{good}\"")), "quotes"),
        (Some(good[4..].to_owned()), "prefix"),
        (Some(format!("9{good}")), "prefix"),
        (Some("junk".to_owned()), "prefix"),
        (Some(good[..good.len() - 1].to_owned()), "length"),
        (Some(format!("{good}0")), "length"),
        (Some(good.to_uppercase()), "characters"),
        (Some(format!("{}g", &good[..good.len() - 1])), "characters"),
        (Some(typo), "checksum"),
    ];
    for (presented, reason) in &malformed {
        let row = web.query_one("select code from tollgate.verify_api_token($1)", &[presented]).await?;
        assert_eq!(row.get::<_, &str>(0), "MALFORMED");
        let expected = json!({"code": "MALFORMED", "reason": reason});
        assert_eq!(last().await?, Some(expected.clone()), "{presented:?}");
        // The error of authenticate says the same, and aborting its transaction does not reset it.
        web.batch_execute("begin").await?;
        let raised = web.query("select valid from tollgate.authenticate($1)", &[presented]).await;
        let error = refused(raised, &SqlState::INVALID_AUTHORIZATION_SPECIFICATION);
        assert_eq!(serde_json::from_str::<Value>(error.detail().unwrap_or_default())?, expected);
        web.batch_execute("rollback").await?;
        assert_eq!(last().await?, Some(expected), "{presented:?}");
    }
    // Each way to verify sets it, in FROM as well as elsewhere, and a success clears it.
    for call in [
        "select * from tollgate.verify_api_token($1, '{posts:read,posts:write,users:read}')",
        "select tollgate.verify_api_token_hash(sha256($1::text::bytea), '{posts:read,posts:write,users:read}')",
        "select * from tollgate.verify_api_token_hash(sha256($1::text::bytea), '{posts:read,posts:write,users:read}')",
    ] {
        web.query_one(call, &[&good]).await?;
        let expected = json!({"code": "INSUFFICIENT_SCOPE", "missing_scopes": ["posts:write", "users:read"]});
        assert_eq!(last().await?, Some(expected), "{call}");
        assert_eq!(code(&web, good).await?, "VALID");
        assert_eq!(last().await?, None, "{call}");
    }
    web.query_one("select tollgate.token_has_scope($1, $2)", &[&good, &"posts:write"]).await?;
    assert_eq!(last().await?, Some(json!({"code": "INSUFFICIENT_SCOPE", "missing_scopes": ["posts:write"]})));
    // A required scope may be anything, even a token, and there may be many.
    let many: Vec<&str> = std::iter::once(good).chain(["\"}\u{1b}"; 30]).collect();
    web.query_one("select * from tollgate.verify_api_token($1, $2)", &[&good, &many]).await?;
    let refusal = last().await?.context("a refusal")?;
    assert_eq!(refusal["missing_scopes"].as_array().map(Vec::len), Some(8), "{refusal}");
    assert!(!refusal.to_string().contains(&good[4..20]), "{refusal}");
    web.query_one("select * from tollgate.verify_api_token_hash('')", &[]).await?;
    assert_eq!(last().await?, Some(json!({"code": "MALFORMED", "reason": "length"})));
    Ok(())
}

#[tokio::test]
async fn a_refusal_by_authenticate_has_the_code_the_scopes_and_the_time_for_programs() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    let token =
        issue_with(&owner, "programs", "scopes => '{posts:read}', rate_limit => 1, rate_window => '1 hour'")
            .await?;
    let call = "select valid from tollgate.authenticate($1, $2)";
    let detail = |error: &DbError| serde_json::from_str::<Value>(error.detail().unwrap_or_default());
    let error = refused(
        web.query(call, &[&token.token, &["posts:write"].as_slice()]).await,
        &SqlState::INSUFFICIENT_PRIVILEGE,
    );
    assert_eq!(detail(&error)?, json!({"code": "INSUFFICIENT_SCOPE", "missing_scopes": ["posts:write"]}));
    code(&web, &token.token).await?;
    let error = refused(
        web.query(call, &[&token.token, &None::<Vec<String>>]).await,
        &SqlState::CONFIGURATION_LIMIT_EXCEEDED,
    );
    let detail = detail(&error)?;
    assert_eq!(detail["code"], "RATE_LIMITED");
    assert!(
        detail["retry_after"].as_f64().is_some_and(|seconds| seconds > 3000.0 && seconds <= 3600.0),
        "{detail}"
    );
    let last: Value = value(&web, "select tollgate.last_refusal()").await?;
    assert_eq!(last["code"], "RATE_LIMITED");
    // Where a scope is required of the identity.
    let error = refused(
        web.query("select tollgate.require_scope('posts:write')", &[]).await,
        &SqlState::INSUFFICIENT_PRIVILEGE,
    );
    assert_eq!(
        serde_json::from_str::<Value>(error.detail().unwrap_or_default())?,
        json!({"code": "INSUFFICIENT_SCOPE", "missing_scopes": ["posts:write"]})
    );
    Ok(())
}

#[tokio::test]
async fn the_clients_address_is_the_last_hop_that_is_not_a_trusted_proxy() -> Result<()> {
    let World { web, cluster: _cluster, .. } = SHARED.world().await?;
    let of = async |forwarded: Option<&str>, trusted: Option<&str>| -> Result<Option<String>> {
        let call = match trusted {
            None => "select host(tollgate.client_ip_from($1)) from (select $2::text) v",
            Some(_) => "select host(tollgate.client_ip_from($1, $2::text::cidr[]))",
        };
        Ok(web.query_one(call, &[&forwarded, &trusted]).await?.get(0))
    };
    for (forwarded, expected) in [
        ("203.0.113.7", Some("203.0.113.7")),
        ("203.0.113.7:443", Some("203.0.113.7")),
        ("2001:db8::7", Some("2001:db8::7")),
        ("[2001:db8::7]", Some("2001:db8::7")),
        ("\"[2001:db8::7]:443\"", Some("2001:db8::7")),
        ("::ffff:203.0.113.7", Some("203.0.113.7")),
        ("203.0.113.7, 10.0.0.1, 127.0.0.1", Some("203.0.113.7")),
        // Addresses that the client made up come before those that a proxy saw.
        ("192.0.2.1, 203.0.113.7, 10.0.0.1", Some("203.0.113.7")),
        ("testclient, 203.0.113.7", Some("203.0.113.7")),
        (" , 203.0.113.7 ,, ", Some("203.0.113.7")),
        ("10.0.0.9, 10.0.0.1", Some("10.0.0.9")),
        ("fe80::1%eth0", Some("fe80::1")),
        ("", None),
        (" , ", None),
        ("testclient", None),
        ("unknown, 10.0.0.1", None),
        ("203.0.113.7, _hidden, 10.0.0.1", None),
        ("203.0.113.7:port", None),
        ("[2001:db8::7", None),
        ("[2001:db8::7]x", None),
        ("203.0.113.256", None),
        ("203.0.113", None),
        ("203.0.113.7%eth0", None),
        ("203.0.113.7; drop table users", None),
        ("/tmp/socket", None),
    ] {
        assert_eq!(of(Some(forwarded), None).await?.as_deref(), expected, "{forwarded:?}");
    }
    assert_eq!(of(None, None).await?, None);
    let list = Some("192.0.2.1, 203.0.113.7, 10.0.0.1");
    assert_eq!(of(list, Some("{}")).await?.as_deref(), Some("10.0.0.1"));
    assert_eq!(of(list, Some("{10.0.0.0/8,203.0.113.0/24}")).await?.as_deref(), Some("192.0.2.1"));
    assert_eq!(of(list, Some("{0.0.0.0/0,NULL}")).await?.as_deref(), Some("192.0.2.1"));
    let many = "10.0.0.1,".repeat(100_000);
    assert_eq!(of(Some(&format!("203.0.113.7,{many}")), None).await?.as_deref(), Some("203.0.113.7"));
    Ok(())
}

async fn set(owner: &Client, token: &Token, changes: &str) -> Result<()> {
    let sql = format!("update tollgate.api_tokens set {changes} where id = $1");
    let changed = owner.execute(&sql, &[&token.id]).await?;
    anyhow::ensure!(changed == 1, "{changed} rows changed by {sql}");
    Ok(())
}

/// A well-formed token that was never issued.
fn unknown_token() -> String {
    let entropy = std::array::from_fn(|n| u8::try_from(n).unwrap_or_default());
    tollgate_core::token::issue(&tollgate_core::token::Prefix::default(), &entropy).token().to_owned()
}
