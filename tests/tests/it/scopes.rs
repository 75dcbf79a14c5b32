//! The scope grammar in SQL, and the catalogue: what may be granted, and that nothing granted loses its meaning.

use crate::common::{self, Shared, World, code, error, issue, issue_with, refused, revoke, value};
use anyhow::Result;
use tokio_postgres::error::SqlState;
use tollgate_tests::DATABASE;

static SHARED: Shared = Shared::new(&[]);

#[tokio::test]
async fn a_scope_grants_what_the_grammar_says() -> Result<()> {
    let World { web, cluster: _cluster, .. } = SHARED.world().await?;
    let longest = format!("a:{}", "b".repeat(126));
    let too_long = format!("a:{}", "b".repeat(127));
    let cases: &[(&[&str], &str, bool)] = &[
        (&["posts:read"], "posts:read", true),
        (&["posts:read"], "posts:write", false),
        (&["posts"], "posts", true),
        (&["posts"], "posts:read", false),
        (&["posts:read"], "posts", false),
        (&["users:*"], "users:read", true),
        (&["posts:*"], "posts:comments:read", true),
        (&["posts:*"], "posts", false),
        (&["posts:*"], "postsx:read", false),
        (&["posts:*"], "users:read", false),
        (&["posts:*"], "posts:*", true),
        (&["posts:*"], "posts:comments:*", true),
        (&["posts:comments:*"], "posts:*", false),
        (&["posts:comments:*"], "posts:comments:read", true),
        (&["posts:comments:*"], "posts:read", false),
        (&["admin"], "anything:at:all", true),
        (&["admin"], "admin", true),
        (&["admin"], "posts:*", true),
        (&["admin:*"], "admin", false),
        (&["admin:*"], "posts:read", false),
        (&["Admin"], "posts:read", false),
        (&["users:read", "posts:*"], "posts:read", true),
        (&[], "posts:read", false),
        // Another case, alphabet or a blank makes a different scope, or none.
        (&["posts:read"], "posts:Read", false),
        (&["posts:Read"], "posts:Read", false),
        (&["posts:read"], " posts:read", false),
        // Malformed on either side.
        (&["*"], "posts:read", false),
        (&["*"], "*", false),
        (&["posts*"], "posts:read", false),
        (&["posts:*:read"], "posts:x:read", false),
        (&[":*"], ":read", false),
        (&[""], "", false),
        (&["admin"], "", false),
        (&["admin"], "*", false),
        (&["admin"], "a::b", false),
        (&["admin"], "a:", false),
        (&["admin"], ":a", false),
        (&["admin"], "_a", false),
        (&["admin"], "é", false),
        (&["admin"], "a b", false),
        (&["posts:*"], "posts:", false),
        (&["posts:*"], "posts::read", false),
        (&["a.b-c_d:0"], "a.b-c_d:0", true),
        (&["admin"], &longest, true),
        (&["admin"], &too_long, false),
        (&["a:*"], &too_long, false),
    ];
    let granted = "select tollgate.scope_grants($1, $2)";
    for (carried, required, expected) in cases {
        let answer: bool = web.query_one(granted, &[carried, required]).await?.get(0);
        assert_eq!(answer, *expected, "{carried:?} grants {required}");
        // A NULL among the granted scopes grants nothing and breaks nothing.
        let with_null = web
            .query_one("select tollgate.scope_grants($1 || array[null]::text[], $2)", &[carried, required])
            .await?;
        assert_eq!(with_null.get::<_, bool>(0), *expected, "{carried:?} and NULL grant {required}");
    }
    for (carried, required) in [(None, Some("a")), (Some(vec!["a"]), None), (None, None)] {
        let answer: Option<bool> = web.query_one(granted, &[&carried, &required]).await?.get(0);
        assert_eq!(answer, None);
    }
    Ok(())
}

#[tokio::test]
async fn a_scope_is_defined_under_a_well_formed_name_with_a_description() -> Result<()> {
    let World { owner, cluster: _cluster, .. } = SHARED.world().await?;
    let define = "select tollgate.define_scope($1, $2)";
    let longest = "z".repeat(128);
    for name in ["a", "0", "a:b:c:d:e:f", "a.b-c_d", "administrator", "admin:users", longest.as_str()] {
        owner.query(define, &[&name, &"ü".repeat(1000)]).await?;
    }
    let too_long = "z".repeat(129);
    for name in [
        None,
        Some(""),
        Some("*"),
        Some("a:*"),
        Some("A"),
        Some("a b"),
        Some("a:"),
        Some("é"),
        Some("admin"),
        Some(too_long.as_str()),
    ] {
        let error = refused(owner.query(define, &[&name, &"d"]).await, &SqlState::INVALID_PARAMETER_VALUE);
        assert_eq!(error.detail(), Some("Argument: name."), "{name:?}: {error:?}");
        assert!(error.hint().is_some(), "{name:?}: {error:?}");
    }
    // A name that looks like a token is kept out of the log, where nothing is ever erased.
    for name in ["0123456789abcdef", "posts:0123456789abcdef0123:read"] {
        let error = refused(owner.query(define, &[&name, &"d"]).await, &SqlState::INVALID_PARAMETER_VALUE);
        assert!(!common::text_of(&error).contains("0123456789abcdef"), "{error:?}");
    }
    owner.query(define, &[&"0123456789abcde:g", &"d"]).await?;
    for description in [None, Some("ü".repeat(1001))] {
        let error =
            refused(owner.query(define, &[&"b:c", &description]).await, &SqlState::INVALID_PARAMETER_VALUE);
        assert_eq!(error.detail(), Some("Argument: description."), "{error:?}");
    }
    let defined: i64 =
        value(&owner, "select count(*) from tollgate.scopes where name in ('b:c', 'admin', '*')").await?;
    assert_eq!(defined, 0);
    Ok(())
}

#[tokio::test]
async fn a_token_has_scopes_of_the_catalogue_or_a_wildcard_over_them_or_admin() -> Result<()> {
    let cluster = SHARED.cluster()?;
    common::database(&cluster, "catalogue")?;
    let owner = cluster.connect("postgres", "catalogue").await?;
    owner.batch_execute("delete from tollgate.scopes").await?;
    issue(&owner, "u", &[]).await?;
    issue(&owner, "u", &["admin"]).await?;
    refused(
        owner.batch_execute("select tollgate.create_api_token('u', 'n', '{a:b}')").await,
        &SqlState::INVALID_PARAMETER_VALUE,
    );

    for scope in ["a:b", "x:y:z", "p_q:r", "solo"] {
        owner.query("select tollgate.define_scope($1, 'd')", &[&scope]).await?;
    }
    for good in ["a:b", "a:*", "x:*", "x:y:*", "x:y:z", "p_q:*", "solo"] {
        issue(&owner, "u", &[good]).await?;
    }
    // The last ones only resemble defined ones: "_" is not a pattern, and "x:y" is not a scope by itself.
    for bad in ["a:b:*", "a", "b:*", "solo:*", "x:y", "x:y:z:*", "pxq:*", "xx:*", "admin:*"] {
        let call = format!("select tollgate.create_api_token('u', 'n', '{{a:b,{bad}}}')");
        let error = refused(owner.batch_execute(&call).await, &SqlState::INVALID_PARAMETER_VALUE);
        let detail = error.detail().unwrap_or_default();
        assert!(detail.contains(&format!("\"{bad}\"")) && !detail.contains("\"a:b\""), "{bad}: {error:?}");
    }
    Ok(())
}

#[tokio::test]
async fn a_scope_is_not_dropped_while_a_live_token_has_it() -> Result<()> {
    let World { owner, cluster: _cluster, .. } = SHARED.world().await?;
    let define = "select tollgate.define_scope('carried:scope', 'd')";
    let drop = "select tollgate.drop_scope('carried:scope')";
    let in_use = async || -> Result<()> {
        let error = refused(owner.batch_execute(drop).await, &SqlState::DEPENDENT_OBJECTS_STILL_EXIST);
        assert!(error.message().contains("carried:scope"), "{error:?}");
        assert!(error.detail().is_some() && error.hint().is_some(), "{error:?}");
        Ok(())
    };
    owner.batch_execute(define).await?;
    let first = issue(&owner, "carrier", &["carried:scope", "posts:read"]).await?;
    let second = issue(&owner, "carrier", &["carried:scope"]).await?;
    in_use().await?;
    revoke(&owner, first.id).await?;
    in_use().await?;
    // A disabled token has not ended: it may be enabled again.
    owner.execute("update tollgate.api_tokens set disabled_at = now() where id = $1", &[&second.id]).await?;
    in_use().await?;
    owner.execute("update tollgate.api_tokens set expires_at = now() where id = $1", &[&second.id]).await?;
    owner.batch_execute(drop).await?;

    // Wildcards and admin do not refer to this one scope.
    owner.batch_execute(define).await?;
    issue(&owner, "carrier", &["carried:*", "admin"]).await?;
    owner.batch_execute(drop).await?;
    refused(owner.batch_execute(drop).await, &SqlState::UNDEFINED_OBJECT);
    refused(owner.batch_execute("select tollgate.drop_scope(null)").await, &SqlState::UNDEFINED_OBJECT);
    Ok(())
}

#[tokio::test]
async fn an_undefined_scope_cannot_be_dropped() -> Result<()> {
    let World { owner, cluster: _cluster, .. } = SHARED.world().await?;
    // Dropping a scope must not require revoking every administrator's tokens first.
    issue(&owner, "administrator", &["admin", "posts:*"]).await?;
    for name in ["admin", "posts:*", "no:such"] {
        refused(owner.query("select tollgate.drop_scope($1)", &[&name]).await, &SqlState::UNDEFINED_OBJECT);
    }
    Ok(())
}

#[tokio::test]
async fn a_token_being_issued_blocks_the_drop_of_its_scope() -> Result<()> {
    let World { owner, cluster, .. } = SHARED.world().await?;
    for (level, end) in
        [("read committed", "commit"), ("repeatable read", "commit"), ("read committed", "rollback")]
    {
        owner.batch_execute("select tollgate.define_scope('race:one', 'd')").await?;
        owner.batch_execute(&format!("begin isolation level {level}")).await?;
        let token = issue(&owner, "racer", &["race:one"]).await?;
        let dropper = cluster.connect("postgres", DATABASE).await?;
        let drop =
            tokio::spawn(
                async move { dropper.batch_execute("select tollgate.drop_scope('race:one')").await },
            );
        common::wait_until_blocked(&owner).await?;
        owner.batch_execute(end).await?;
        let dropped = drop.await?;
        if end == "commit" {
            refused(dropped, &SqlState::DEPENDENT_OBJECTS_STILL_EXIST);
            assert_eq!(code(&owner, &token.token).await?, "VALID");
            revoke(&owner, token.id).await?;
            owner.batch_execute("select tollgate.drop_scope('race:one')").await?;
        } else {
            dropped?;
        }
    }
    Ok(())
}

#[tokio::test]
async fn a_drop_in_progress_blocks_issuing_tokens_with_scopes() -> Result<()> {
    let World { owner, cluster, .. } = SHARED.world().await?;
    for end in ["commit", "rollback"] {
        owner.batch_execute("select tollgate.define_scope('race:two', 'd')").await?;
        owner.batch_execute("begin; select tollgate.drop_scope('race:two')").await?;
        let issuer = cluster.connect("postgres", DATABASE).await?;
        // Verification and tokens without scopes do not use the catalogue.
        let free = issue(&issuer, "racer", &[]).await?;
        assert_eq!(code(&issuer, &free.token).await?, "VALID");
        let call = "select tollgate.create_api_token('racer', 'n', '{race:two}')";
        let issued = tokio::spawn(async move { issuer.batch_execute(call).await });
        common::wait_until_blocked(&owner).await?;
        owner.batch_execute(end).await?;
        let issued = issued.await?;
        if end == "commit" {
            let error = refused(issued, &SqlState::INVALID_PARAMETER_VALUE);
            assert!(error.detail().is_some_and(|detail| detail.contains("race:two")), "{error:?}");
        } else {
            issued?;
        }
    }
    Ok(())
}

#[tokio::test]
async fn a_snapshot_older_than_a_drop_issues_no_token_with_the_dropped_scope() -> Result<()> {
    let World { owner, cluster, .. } = SHARED.world().await?;
    for level in ["repeatable read", "serializable"] {
        owner.batch_execute("select tollgate.define_scope('race:three', 'd')").await?;
        let older = cluster.connect("postgres", DATABASE).await?;
        older.batch_execute(&format!("begin isolation level {level}; select count(*) from pg_class")).await?;
        owner.batch_execute("select tollgate.drop_scope('race:three')").await?;
        let refusal = error(
            older
                .batch_execute("select tollgate.create_api_token('racer', 'n', '{race:three}'); commit")
                .await,
        );
        assert!(
            [SqlState::INVALID_PARAMETER_VALUE, SqlState::T_R_SERIALIZATION_FAILURE].contains(refusal.code()),
            "{level}: {refusal:?}"
        );
    }
    Ok(())
}

#[tokio::test]
async fn a_drop_sees_the_token_of_its_own_transaction() -> Result<()> {
    let World { owner, cluster: _cluster, .. } = SHARED.world().await?;
    owner.batch_execute("begin; select tollgate.define_scope('own:scope', 'd')").await?;
    let token = issue(&owner, "own", &["own:scope"]).await?;
    owner.batch_execute("savepoint s").await?;
    refused(
        owner.batch_execute("select tollgate.drop_scope('own:scope')").await,
        &SqlState::DEPENDENT_OBJECTS_STILL_EXIST,
    );
    owner.batch_execute("rollback to s").await?;
    revoke(&owner, token.id).await?;
    owner.batch_execute("select tollgate.drop_scope('own:scope'); commit").await?;
    Ok(())
}

#[tokio::test]
async fn a_drop_with_an_older_snapshot_is_refused() -> Result<()> {
    let World { owner, cluster: _cluster, .. } = SHARED.world().await?;
    for level in ["repeatable read", "serializable"] {
        owner.batch_execute(&format!("begin isolation level {level}")).await?;
        let error = refused(
            owner.batch_execute("select tollgate.drop_scope('posts:read')").await,
            &SqlState::INVALID_TRANSACTION_STATE,
        );
        assert!(error.hint().is_some_and(|hint| hint.contains("READ COMMITTED")), "{error:?}");
        owner.batch_execute("rollback").await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_dropped_scope_is_recorded_and_its_tokens_are_as_they_were() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    owner.batch_execute("select tollgate.define_scope('gone:scope', 'd')").await?;
    let token = issue_with(&owner, "gone", "scopes => '{gone:*}'").await?;
    owner.batch_execute("select tollgate.drop_scope('gone:scope')").await?;
    let row = web
        .query_one("select v.code from tollgate.verify_api_token($1, '{gone:scope}') v", &[&token.token])
        .await?;
    assert_eq!(
        row.get::<_, &str>(0),
        "VALID",
        "the catalogue is asked when a token is issued, not when it is used"
    );
    let events = "select string_agg(event, ' ' order by id) from tollgate.audit_log where detail ->> 'scope' = 'gone:scope'";
    assert_eq!(value::<String>(&owner, events).await?, "scope.defined scope.dropped");
    Ok(())
}
