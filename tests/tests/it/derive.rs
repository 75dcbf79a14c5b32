//! Families: a derived token never exceeds its parent, from its first moment on, and ends with it.

use crate::common::{
    self, Request, Shared, Token, World, code, derive, enable, history, issue, issue_with, refused, revoke,
    rotate, update, value,
};
use anyhow::Result;
use serde_json::{Value, json};
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use tollgate_tests::DATABASE;
use uuid::Uuid;

static SHARED: Shared = Shared::new(&[]);

/// A grandparent with a child and a grandchild, and a second child.
struct Family {
    root: Token,
    child: Token,
    grandchild: Token,
    other: Token,
}

impl Family {
    async fn of(owner: &Client, user: &str) -> Result<Self> {
        let root = issue_with(owner, user, "scopes => '{posts:*,users:read}'").await?;
        let child = derive(owner, &root, &["posts:*"]).await?;
        let grandchild = derive(owner, &child, &["posts:read", "posts:comments:*"]).await?;
        let other = derive(owner, &root, &["users:read"]).await?;
        Ok(Self { root, child, grandchild, other })
    }

    async fn codes(&self, client: &Client) -> Result<[String; 4]> {
        Ok([
            code(client, &self.root.token).await?,
            code(client, &self.child.token).await?,
            code(client, &self.grandchild.token).await?,
            code(client, &self.other.token).await?,
        ])
    }
}

async fn scopes(owner: &Client, token: &Token) -> Result<Vec<String>> {
    value(owner, &format!("select scopes from tollgate.tokens where id = '{}'", token.id)).await
}

async fn derive_with(client: &Client, parent: &str, arguments: &str) -> Result<Token, tokio_postgres::Error> {
    let call =
        format!("select id, token from tollgate.derive_api_token(parent => $1, name => 'n', {arguments})");
    let row = client.query_one(&call, &[&parent]).await?;
    Ok(Token { id: row.get(0), token: row.get(1) })
}

#[tokio::test]
async fn a_derived_token_inherits_what_it_is_not_given() -> Result<()> {
    let World { owner, web, cluster } = SHARED.world().await?;
    owner
        .batch_execute(
            "create role holder login; grant execute on function tollgate.derive_api_token to holder",
        )
        .await?;
    let holder = cluster.connect("holder", DATABASE).await?;
    let parent = issue_with(
        &owner,
        "heir",
        "scopes => '{posts:*}', expires_in => '1 day', metadata => '{\"plan\": \"pro\"}', allowed_ips => '{10.0.0.0/8}'",
    )
    .await?;
    let child =
        derive_with(&holder, &parent.token, "scopes => '{posts:read,posts:read}', expires_in => null")
            .await?;
    let row = owner
        .query_one(
            "select c.user_id, c.scopes, c.expires_at = p.expires_at, c.metadata = p.metadata,
                    c.allowed_ips = p.allowed_ips, c.parent_id, c.created_by, c.hint
             from tollgate.tokens c, tollgate.tokens p where c.id = $1 and p.id = $2",
            &[&child.id, &parent.id],
        )
        .await?;
    assert_eq!((row.get::<_, &str>(0), row.get::<_, Vec<&str>>(1)), ("heir", vec!["posts:read"]));
    assert!((2..=4).all(|column| row.get::<_, bool>(column)), "{row:?}");
    assert_eq!((row.get::<_, Uuid>(5), row.get::<_, &str>(6)), (parent.id, "holder"));
    assert_eq!(row.get::<_, &str>(7), &child.token[..8]);
    let request = Request::of(&child.token).coming_from("10.1.1.1");
    assert_eq!(request.requiring(&[Some("posts:read")]).code(&web).await?, "VALID");
    assert_eq!(request.requiring(&[Some("posts:write")]).code(&web).await?, "INSUFFICIENT_SCOPE");

    let lesser =
        "scopes => '{posts:comments:*}', expires_in => '1 hour', allowed_ips => '{10.2.0.0/16,10.3.3.3}'";
    let lesser = derive_with(&holder, &parent.token, lesser).await?;
    let log = history(&owner, lesser.id).await?;
    assert_eq!((log.len(), log[0].0.as_str()), (1, "token.derived"));
    assert_eq!(
        (&log[0].1["parent_id"], &log[0].1["allowed_ips"]),
        (&json!(parent.id), &json!(["10.2.0.0/16", "10.3.3.3/32"]))
    );
    Ok(())
}

#[tokio::test]
async fn nothing_is_derived_that_its_parent_lacks() -> Result<()> {
    let World { owner, cluster: _cluster, .. } = SHARED.world().await?;
    let parent = issue_with(
        &owner,
        "wider",
        "scopes => '{posts:*}', expires_in => '1 day', allowed_ips => '{10.0.0.0/8,2001:db8::/32}'",
    )
    .await?;
    for (arguments, argument) in [
        ("scopes => '{admin}', expires_in => null", "scopes"),
        ("scopes => '{posts:read,users:read}', expires_in => null", "scopes"),
        ("scopes => '{users:*}', expires_in => null", "scopes"),
        ("scopes => null, expires_in => null", "scopes"),
        ("scopes => '{posts:none}', expires_in => null", "scopes"),
        ("scopes => '{}', expires_in => '25 hours'", "expires_in"),
        ("scopes => '{}', expires_in => '0'", "expires_in"),
        ("scopes => '{}', expires_in => null, allowed_ips => '{0.0.0.0/0}'", "allowed_ips"),
        ("scopes => '{}', expires_in => null, allowed_ips => '{10.0.0.0/9,11.0.0.0/9}'", "allowed_ips"),
        ("scopes => '{}', expires_in => null, allowed_ips => '{2001:db8::/31}'", "allowed_ips"),
        ("scopes => '{}', expires_in => null, allowed_ips => '{}'", "allowed_ips"),
    ] {
        let error =
            refused(derive_with(&owner, &parent.token, arguments).await, &SqlState::INVALID_PARAMETER_VALUE);
        assert!(
            error.detail().is_some_and(|detail| detail.starts_with(&format!("Argument: {argument}"))),
            "{error:?}"
        );
        assert!(error.hint().is_some(), "{error:?}");
    }
    // An IPv4 network, however it is written.
    derive_with(
        &owner,
        &parent.token,
        "scopes => '{}', expires_in => null, allowed_ips => '{::ffff:10.0.0.0/104}'",
    )
    .await?;
    // A parent that does not expire may have children that do.
    let eternal = issue(&owner, "wider", &[]).await?;
    derive_with(&owner, &eternal.token, "scopes => '{}', expires_in => '100 years'").await?;
    assert_eq!(value::<i64>(&owner, "select count(*) from tollgate.list_api_tokens('wider')").await?, 4);
    Ok(())
}

#[tokio::test]
async fn only_a_valid_token_has_children() -> Result<()> {
    let World { owner, cluster: _cluster, .. } = SHARED.world().await?;
    let unknown = issue(&owner, "childless", &[]).await?.token.replacen("tgt", "abc", 1);
    let mut presented =
        vec![(None, "MALFORMED"), (Some("junk".to_owned()), "MALFORMED"), (Some(unknown), "NOT_FOUND")];
    for (changes, code) in [
        ("revoked_at = now()", "REVOKED"),
        ("disabled_at = now()", "DISABLED"),
        ("expires_at = now()", "EXPIRED"),
    ] {
        let token = issue(&owner, "childless", &[]).await?;
        owner
            .execute(&format!("update tollgate.api_tokens set {changes} where id = $1"), &[&token.id])
            .await?;
        presented.push((Some(token.token), code));
    }
    for (token, code) in presented {
        let call = "select tollgate.derive_api_token($1, 'n', '{}', null)";
        let error =
            refused(owner.query(call, &[&token]).await, &SqlState::INVALID_AUTHORIZATION_SPECIFICATION);
        assert!(error.detail().is_some_and(|detail| detail.contains(code)), "{error:?}");
    }
    Ok(())
}

#[tokio::test]
async fn a_line_has_at_most_eight_generations_below_its_root() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    let mut line = vec![issue(&owner, "deep", &["admin"]).await?];
    for _ in 0..8 {
        line.push(derive(&owner, line.last().expect("a root"), &["admin"]).await?);
    }
    let error = refused(derive(&owner, &line[8], &["admin"]).await, &SqlState::PROGRAM_LIMIT_EXCEEDED);
    assert!(error.detail().is_some() && error.hint().is_some(), "{error:?}");
    derive(&owner, &line[7], &["admin"]).await?;
    // Down to the last of them.
    update(&owner, line[0].id, &json!({"scopes": ["posts:read"]})).await?;
    for token in &line {
        assert_eq!(scopes(&owner, token).await?, ["posts:read"]);
    }
    revoke(&owner, line[0].id).await?;
    for token in &line {
        assert_eq!(code(&web, &token.token).await?, "REVOKED");
    }
    Ok(())
}

#[tokio::test]
async fn revoking_a_token_revokes_its_descendants_and_no_other_token() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    let family = Family::of(&owner, "revoked").await?;
    assert_eq!(family.codes(&web).await?, ["VALID"; 4]);
    owner.execute("select tollgate.revoke_api_token($1, reason => 'lost')", &[&family.child.id]).await?;
    assert_eq!(family.codes(&web).await?, ["VALID", "REVOKED", "REVOKED", "VALID"]);
    let last = |log: Vec<(String, Value)>| log.last().cloned();
    assert_eq!(
        last(history(&owner, family.child.id).await?),
        Some(("token.revoked".to_owned(), json!({"reason": "lost"})))
    );
    assert_eq!(
        last(history(&owner, family.grandchild.id).await?),
        Some(("token.revoked".to_owned(), json!({"reason": "lost", "ancestor": family.child.id})))
    );
    assert!(!revoke(&owner, family.grandchild.id).await?);
    revoke(&owner, family.root.id).await?;
    assert_eq!(family.codes(&web).await?, ["REVOKED"; 4]);
    assert_eq!(history(&owner, family.grandchild.id).await?.len(), 2, "revoked once");

    let family = Family::of(&owner, "revoked").await?;
    assert_eq!(value::<i64>(&owner, "select tollgate.revoke_all_api_tokens('revoked')").await?, 4);
    assert_eq!(family.codes(&web).await?, ["REVOKED"; 4]);
    Ok(())
}

#[tokio::test]
async fn narrowing_a_token_narrows_its_descendants_and_widening_does_not() -> Result<()> {
    let World { owner, web: _web, cluster: _cluster } = SHARED.world().await?;
    owner.batch_execute("set timezone = 'UTC'").await?;
    let family = Family::of(&owner, "narrowed").await?;
    update(&owner, family.root.id, &json!({"scopes": ["posts:comments:read", "posts:write", "users:*"]}))
        .await?;
    assert_eq!(scopes(&owner, &family.child).await?, ["posts:comments:read", "posts:write"]);
    assert_eq!(scopes(&owner, &family.grandchild).await?, ["posts:comments:read"]);
    assert_eq!(scopes(&owner, &family.other).await?, ["users:read"]);
    assert_eq!(
        history(&owner, family.grandchild.id).await?.last(),
        Some(&(
            "token.updated".to_owned(),
            json!({"ancestor": family.root.id, "changes": {"scopes": {
                "from": ["posts:read", "posts:comments:*"], "to": ["posts:comments:read"]}}})
        ))
    );
    assert_eq!(history(&owner, family.other.id).await?.len(), 1, "it was not touched");
    update(&owner, family.root.id, &json!({"scopes": ["admin"]})).await?;
    assert_eq!(scopes(&owner, &family.child).await?, ["posts:comments:read", "posts:write"]);

    let field = async |token: &Token, field: &str| -> Result<Value> {
        value(&owner, &format!("select to_jsonb({field}) from tollgate.tokens where id = '{}'", token.id))
            .await
    };
    update(&owner, family.grandchild.id, &json!({"expires_at": "2990-01-01T00:00:00+00:00"})).await?;
    update(&owner, family.root.id, &json!({"expires_at": "2995-01-01T00:00:00+00:00"})).await?;
    assert_eq!(field(&family.child, "expires_at").await?, "2995-01-01T00:00:00+00:00");
    assert_eq!(field(&family.grandchild, "expires_at").await?, "2990-01-01T00:00:00+00:00");

    update(
        &owner,
        family.child.id,
        &json!({"allowed_ips": ["10.1.0.0/16", "::ffff:10.2.0.0/112", "192.0.2.0/24"]}),
    )
    .await?;
    update(&owner, family.root.id, &json!({"allowed_ips": ["10.0.0.0/8", "192.0.2.7/32"]})).await?;
    assert_eq!(
        field(&family.grandchild, "allowed_ips").await?,
        json!(["10.1.0.0/16", "192.0.2.7/32", "::ffff:10.2.0.0/112"])
    );
    assert_eq!(field(&family.other, "allowed_ips").await?, json!(["10.0.0.0/8", "192.0.2.7/32"]));
    // Nothing in common: no address is allowed, rather than any address.
    update(&owner, family.root.id, &json!({"allowed_ips": ["198.51.100.0/24"]})).await?;
    assert_eq!(field(&family.grandchild, "allowed_ips").await?, json!([]));
    for address in ["198.51.100.1", "10.1.0.1"] {
        let request = Request::of(&family.grandchild.token).coming_from(address);
        assert_eq!(request.code(&owner).await?, "IP_NOT_ALLOWED");
    }
    Ok(())
}

#[tokio::test]
async fn a_derived_token_is_not_widened_beyond_its_parent() -> Result<()> {
    let World { owner, cluster: _cluster, .. } = SHARED.world().await?;
    let parent = issue_with(
        &owner,
        "bounded",
        "scopes => '{posts:*}', expires_in => '1 day', allowed_ips => '{10.0.0.0/8}'",
    )
    .await?;
    let child = derive_with(
        &owner,
        &parent.token,
        "scopes => '{posts:read}', expires_in => '1 hour', allowed_ips => '{10.1.0.0/16}'",
    )
    .await?;
    for (key, wider) in [
        ("scopes", json!(["posts:read", "users:read"])),
        ("scopes", json!(["admin"])),
        ("expires_at", json!("2999-01-01")),
        ("expires_at", Value::Null),
        ("allowed_ips", json!(["10.0.0.0/7"])),
        ("allowed_ips", Value::Null),
    ] {
        let error = refused(
            update(&owner, child.id, &json!({ key: wider })).await,
            &SqlState::INVALID_PARAMETER_VALUE,
        );
        assert!(error.detail().is_some_and(|detail| detail.contains(key)), "{error:?}");
    }
    update(&owner, child.id, &json!({"scopes": ["posts:*"], "allowed_ips": ["10.0.0.0/8"]})).await?;
    let to_the_end = "select tollgate.update_api_token(c.id, jsonb_build_object('expires_at', p.expires_at))
                      from tollgate.tokens c join tollgate.tokens p on p.id = c.parent_id where c.id = $1";
    owner.execute(to_the_end, &[&child.id]).await?;
    Ok(())
}

#[tokio::test]
async fn limits_are_inherited_and_narrowed_like_the_rest() -> Result<()> {
    let World { owner, cluster: _cluster, .. } = SHARED.world().await?;
    // By hand, since a child may not have more than its parent.
    let set = async |token: &Token, limit: &str| {
        let sql =
            format!("update tollgate.api_tokens set (rate_limit, rate_window) = ({limit}) where id = $1");
        owner.execute(&sql, &[&token.id]).await
    };
    let limit = async |token: &Token| -> Result<String> {
        let sql = format!(
            "select concat_ws(' in ', rate_limit, rate_window) from tollgate.tokens where id = '{}'",
            token.id
        );
        value(&owner, &sql).await
    };
    let root = issue(&owner, "limits", &["posts:*"]).await?;
    set(&root, "60, '1 minute'").await?;
    let heir = derive(&owner, &root, &["posts:*"]).await?;
    assert_eq!(limit(&heir).await?, "60 in 00:01:00");
    for (before, after) in [
        ("null, null", "60 in 00:01:00"),
        ("61, '1 hour'", "60 in 00:01:00"),
        ("60, '59 seconds'", "60 in 00:01:00"),
        ("2, '1 second'", "60 in 00:01:00"),
        ("1, '1 second'", "1 in 00:00:01"),
        ("10, '1 hour'", "10 in 01:00:00"),
    ] {
        update(&owner, root.id, &json!({"scopes": ["posts:*"]})).await?;
        set(&heir, before).await?;
        update(&owner, root.id, &json!({"scopes": ["posts:read"]})).await?;
        assert_eq!(limit(&heir).await?, after, "{before}");
    }
    let error = refused(
        update(&owner, heir.id, &json!({"rate_limit": null})).await,
        &SqlState::INVALID_PARAMETER_VALUE,
    );
    assert!(error.detail().is_some_and(|detail| detail.contains("rate_limit")), "{error:?}");
    Ok(())
}

#[tokio::test]
async fn enabling_a_token_does_not_enable_descendants_that_were_disabled_by_themselves() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    let family = Family::of(&owner, "switched").await?;
    let [v, d] = ["VALID", "DISABLED"];

    assert!(enable(&owner, family.root.id, false).await?);
    assert_eq!(family.codes(&web).await?, [d; 4]);
    // Nothing below it can be enabled, and the error says what to enable first.
    let error = refused(
        enable(&owner, family.grandchild.id, true).await,
        &SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE,
    );
    assert!(error.hint().is_some_and(|hint| hint.contains(&family.root.id.to_string())), "{error:?}");
    assert!(enable(&owner, family.root.id, true).await?);
    assert_eq!(family.codes(&web).await?, [v; 4]);

    // Disabled by itself before its ancestor, and after it.
    for before in [true, false] {
        if before {
            assert!(enable(&owner, family.child.id, false).await?);
            assert_eq!(family.codes(&web).await?, [v, d, d, v]);
        }
        assert!(enable(&owner, family.root.id, false).await?);
        if !before {
            assert!(enable(&owner, family.child.id, false).await?, "it was disabled, but not by itself");
        }
        assert!(!enable(&owner, family.child.id, false).await?, "by itself already");
        assert!(enable(&owner, family.root.id, true).await?);
        assert_eq!(family.codes(&web).await?, [v, d, d, v]);
        assert!(enable(&owner, family.child.id, true).await?);
        assert_eq!(family.codes(&web).await?, [v; 4]);
    }
    let events: Vec<String> =
        history(&owner, family.other.id).await?.into_iter().map(|(event, _)| event).collect();
    let [off, on] = ["token.disabled", "token.enabled"];
    assert_eq!(events, ["token.derived", off, on, off, on, off, on]);
    Ok(())
}

#[tokio::test]
async fn the_descendants_of_a_rotated_token_end_with_it_and_a_rotated_child_stays_one() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    let family = Family::of(&owner, "rotated").await?;
    let child = rotate(&owner, family.child.id, "0").await?;
    assert_eq!(family.codes(&web).await?, ["VALID", "EXPIRED", "EXPIRED", "VALID"]);
    assert_eq!(
        history(&owner, family.grandchild.id)
            .await?
            .last()
            .map(|(event, detail)| { (event.clone(), detail["reason"].clone(), detail["ancestor"].clone()) }),
        Some(("token.updated".to_owned(), json!("rotated"), json!(family.child.id)))
    );
    let grandchild = derive(&owner, &child, &["posts:read"]).await?;
    update(&owner, family.root.id, &json!({"scopes": ["posts:read"]})).await?;
    assert_eq!(scopes(&owner, &child).await?, ["posts:read"]);
    revoke(&owner, family.root.id).await?;
    for token in [&child, &grandchild] {
        assert_eq!(code(&web, &token.token).await?, "REVOKED");
    }

    let family = Family::of(&owner, "rotated").await?;
    let root = rotate(&owner, family.root.id, "1 hour").await?;
    assert_eq!(family.codes(&web).await?, ["VALID"; 4]);
    let soon =
        "select bool_and(expires_at <= now() + interval '1 hour') from tollgate.tokens where id = any ($1)";
    let ids = [family.child.id, family.grandchild.id, family.other.id];
    assert!(owner.query_one(soon, &[&ids.as_slice()]).await?.get::<_, bool>(0));
    revoke(&owner, root.id).await?;
    assert_eq!(family.codes(&web).await?, ["VALID"; 4], "in its grace it stands on its own");
    Ok(())
}

#[tokio::test]
async fn a_token_is_purged_after_its_descendants_however_small_the_batches_are() -> Result<()> {
    let World { cluster, .. } = SHARED.world().await?;
    common::database(&cluster, "purged")?;
    let owner = cluster.connect("postgres", "purged").await?;
    let family = Family::of(&owner, "purged").await?;
    let missing = "select count(*) from tollgate.api_tokens t where parent_id is not null
                   and not exists (select from tollgate.api_tokens p where p.id = t.parent_id)";
    // Expired, but not recorded in all of them: the parent must wait for its child.
    owner
        .batch_execute("update tollgate.api_tokens set expires_at = now() - interval '1 hour', expired_at = now() where name <> 'derived'")
        .await?;
    let purge = "select tollgate.purge_tokens('0', 1)";
    assert_eq!(value::<i64>(&owner, purge).await?, 0);
    owner
        .batch_execute(
            "update tollgate.api_tokens set expires_at = now() - interval '1 hour', expired_at = now()",
        )
        .await?;
    for _ in 0..4 {
        assert_eq!(value::<i64>(&owner, purge).await?, 1);
        assert_eq!(value::<i64>(&owner, missing).await?, 0);
    }
    assert_eq!(family.codes(&owner).await?, ["NOT_FOUND"; 4]);
    Ok(())
}

#[tokio::test]
async fn no_child_escapes_a_concurrent_revocation() -> Result<()> {
    let World { owner, web, cluster } = SHARED.world().await?;
    // Revoked while the child is being derived.
    let parent = issue(&owner, "slipping", &["admin"]).await?;
    owner.batch_execute("begin").await?;
    revoke(&owner, parent.id).await?;
    let other = cluster.connect("postgres", DATABASE).await?;
    let presented = parent.clone();
    let waiting = tokio::spawn(async move { derive(&other, &presented, &["admin"]).await });
    common::wait_until_blocked(&owner).await?;
    owner.batch_execute("commit").await?;
    let error = refused(waiting.await?, &SqlState::INVALID_AUTHORIZATION_SPECIFICATION);
    assert!(error.detail().is_some_and(|detail| detail.contains("REVOKED")), "{error:?}");

    // Derived, at some depth, while an ancestor is being revoked.
    let root = issue(&owner, "slipping", &["admin"]).await?;
    let parent = derive(&owner, &root, &["admin"]).await?;
    owner.batch_execute("begin").await?;
    let child = derive(&owner, &parent, &["admin"]).await?;
    for call in ["revoke_api_token", "revoke_all_api_tokens"] {
        let argument = if call == "revoke_api_token" { root.id.to_string() } else { "slipping".to_owned() };
        let other = cluster.connect("postgres", DATABASE).await?;
        let call = format!("set lock_timeout = '100ms'; select tollgate.{call}('{argument}')");
        refused(other.batch_execute(&call).await, &SqlState::LOCK_NOT_AVAILABLE);
    }
    let other = cluster.connect("postgres", DATABASE).await?;
    let waiting = tokio::spawn(async move { revoke(&other, root.id).await });
    common::wait_until_blocked(&owner).await?;
    owner.batch_execute("commit").await?;
    assert!(waiting.await??);
    assert_eq!(code(&web, &child.token).await?, "REVOKED");
    Ok(())
}

#[tokio::test]
async fn a_child_of_a_token_rotated_during_a_revocation_of_all_is_revoked_too() -> Result<()> {
    let World { owner: revoker, web, cluster } = SHARED.world().await?;
    let mut rotator = cluster.connect("postgres", DATABASE).await?;
    let mut holder = cluster.connect("postgres", DATABASE).await?;
    let mut deriver = cluster.connect("postgres", DATABASE).await?;
    let first = issue(&rotator, "rush", &["posts:read"]).await?;
    let last = issue(&rotator, "rush", &[]).await?;

    // The revoking session waits for the first token, which is being rotated, and then for the last. Meanwhile another
    // session derives from the successor, which it did not see when it began.
    let rotation = rotator.transaction().await?;
    let successor = rotate(rotation.client(), first.id, "0").await?;
    let hold = holder.transaction().await?;
    hold.execute("select from tollgate.api_tokens where id = $1 for update", &[&last.id]).await?;
    let revoking =
        tokio::spawn(
            async move { revoker.query_one("select tollgate.revoke_all_api_tokens('rush')", &[]).await },
        );
    common::wait_until_blocked(rotation.client()).await?;
    rotation.commit().await?;
    common::wait_until_blocked(hold.client()).await?;
    let derivation = deriver.transaction().await?;
    let child = derive(derivation.client(), &successor, &["posts:read"]).await?;
    hold.rollback().await?;
    common::wait_until_blocked(derivation.client()).await?;
    derivation.commit().await?;

    assert_eq!(revoking.await??.get::<_, i64>(0), 4);
    for token in [&first, &last, &successor, &child] {
        assert_eq!(code(&web, &token.token).await?, "REVOKED");
    }
    Ok(())
}
