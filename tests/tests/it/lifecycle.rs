//! A token after it was issued: rotated, changed, disabled, enabled, revoked; and the limits that settings impose.

use std::time::Duration;

use crate::common::{
    self, Shared, Token, World, authenticate, code, derive, enable, history, issue, issue_with, refused,
    revoke, rotate, update, value,
};
use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use tokio::sync::mpsc::UnboundedReceiver;
use tokio_postgres::error::{DbError, SqlState};
use tokio_postgres::{AsyncMessage, Client};
use tollgate_tests::{Cluster, DATABASE};
use uuid::Uuid;

static SHARED: Shared = Shared::new(&[]);

async fn set(owner: &Client, id: Uuid, changes: &str) -> Result<()> {
    owner.execute(&format!("update tollgate.api_tokens set {changes} where id = $1"), &[&id]).await?;
    Ok(())
}

/// The parts of a token's row that a rotation must not change.
async fn substance(owner: &Client, id: Uuid) -> Result<Value> {
    let sql =
        "select to_jsonb(t) - '{id,created_at,token_hash,hint,rotated_from,rotated_to,created_by}'::text[]
               from tollgate.api_tokens t where id = $1";
    Ok(owner.query_one(sql, &[&id]).await?.get(0))
}

/// Detail and hint are set, and the detail says this.
#[track_caller]
fn assert_explained(error: &DbError, detail: &str) {
    assert!(error.detail().is_some_and(|text| text.contains(detail)), "{error:?}");
    assert!(error.hint().is_some(), "{error:?}");
}

/// The notifications so far about the tokens of one user.
struct Notifications {
    messages: UnboundedReceiver<AsyncMessage>,
    listener: Client,
    user: String,
}

impl Notifications {
    async fn listen(cluster: &Cluster, user: &str) -> Result<Self> {
        let (listener, messages) = cluster.listen("web", DATABASE).await?;
        listener.batch_execute("listen tollgate_events").await?;
        Ok(Self { messages, listener, user: user.to_owned() })
    }

    async fn all(&mut self) -> Result<Vec<Value>> {
        // Arrives after everything that was committed before.
        self.listener.batch_execute("notify tollgate_events, '{\"fence\": true}'").await?;
        let mut notified = Vec::new();
        let next = async {
            while let Some(message) = self.messages.recv().await {
                let AsyncMessage::Notification(notification) = message else { continue };
                let payload: Value = serde_json::from_str(notification.payload())?;
                if payload["fence"] == true && notification.process_id() == backend(&self.listener).await? {
                    return anyhow::Ok(());
                }
                if payload["user_id"] == self.user.as_str() {
                    notified.push(payload);
                }
            }
            anyhow::bail!("the connection ended")
        };
        tokio::time::timeout(Duration::from_secs(10), next)
            .await
            .context("no notification within 10 s")??;
        Ok(notified)
    }
}

async fn backend(client: &Client) -> Result<i32> {
    value(client, "select pg_backend_pid()").await
}

// ---- Rotation

#[tokio::test]
async fn a_rotated_token_is_the_same_in_all_but_its_secret() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    let old = issue_with(
        &owner,
        "rotated",
        "scopes => '{posts:*,users:read}', expires_in => '1 day', metadata => '{\"plan\": \"pro\"}',
         allowed_ips => '{10.0.0.0/8}', prefix => 'my_app'",
    )
    .await?;
    let before = substance(&owner, old.id).await?;
    let row = owner
        .query_one(
            "select id, token, hint, user_id, name, scopes, expires_at::text, created_at = now()
             from tollgate.rotate_api_token($1)",
            &[&old.id],
        )
        .await?;
    let new = Token { id: row.get(0), token: row.get(1) };
    assert_eq!(substance(&owner, new.id).await?, before);
    assert!(new.token.starts_with("my_app_") && new.token != old.token);
    assert_eq!(row.get::<_, &str>(2), new.token[..11].to_owned());
    assert_eq!((row.get::<_, &str>(3), row.get::<_, &str>(4)), ("rotated", "a test's"));
    assert_eq!(row.get::<_, Vec<&str>>(5), ["posts:*", "users:read"]);
    let links = "select rotated_from, rotated_to, expires_at::text from tollgate.tokens where id = $1";
    let [of_old, of_new] =
        [owner.query_one(links, &[&old.id]).await?, owner.query_one(links, &[&new.id]).await?];
    assert_eq!((of_old.get::<_, Option<Uuid>>(0), of_old.get::<_, Option<Uuid>>(1)), (None, Some(new.id)));
    assert_eq!((of_new.get::<_, Option<Uuid>>(0), of_new.get::<_, Option<Uuid>>(1)), (Some(old.id), None));
    assert_eq!(row.get::<_, &str>(6), of_new.get::<_, &str>(2));
    assert!(row.get::<_, bool>(7));
    let from_there = |token| common::Request::of(token).coming_from("10.1.2.3");
    assert_eq!(from_there(&old.token).code(&web).await?, "EXPIRED");
    assert_eq!(from_there(&new.token).code(&web).await?, "VALID");
    Ok(())
}

#[tokio::test]
async fn in_its_grace_the_old_token_works_but_no_longer_than_it_would_have() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    for (arguments, grace, end) in [
        ("expires_in => null", "1 hour", "1 hour"),
        ("expires_in => '1 day'", "1 hour", "1 hour"),
        ("expires_in => '10 minutes'", "1 hour", "10 minutes"),
    ] {
        let old = issue_with(&owner, "graced", arguments).await?;
        let new = rotate(&owner, old.id, grace).await?;
        for token in [&old, &new] {
            assert_eq!(code(&web, &token.token).await?, "VALID");
        }
        let ends = format!(
            "select expires_at between now() + interval '{end}' - interval '30 s' and now() + interval '{end}'
             from tollgate.api_tokens where id = '{}'",
            old.id
        );
        assert!(value::<bool>(&owner, &ends).await?, "{arguments}, {grace}");
        refused(
            update(&owner, old.id, &json!({"expires_at": null})).await,
            &SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE,
        );
        // It can be ended earlier.
        assert!(revoke(&owner, old.id).await?);
        assert_eq!(code(&web, &old.token).await?, "REVOKED");
        assert_eq!(code(&web, &new.token).await?, "VALID");
    }
    Ok(())
}

/// Sets when the grace of a rotated token ended.
async fn end_grace(owner: &Client, id: Uuid, ago: &str) -> Result<()> {
    set(owner, id, &format!("expires_at = now() - interval '{ago}'")).await
}

/// Records the findings of verifications, like the daemon.
async fn record(owner: &Client) -> Result<()> {
    owner.batch_execute("select tollgate.apply_findings()").await?;
    Ok(())
}

async fn reuses(owner: &Client, id: Uuid) -> Result<Vec<Value>> {
    let log = history(owner, id).await?;
    Ok(log
        .into_iter()
        .filter(|(event, _)| event == "token.reuse_detected")
        .map(|(_, detail)| detail)
        .collect())
}

#[tokio::test]
async fn a_rotated_token_that_is_presented_after_its_grace_is_an_event_at_most_once_a_minute() -> Result<()> {
    let World { owner, web, cluster } = SHARED.world().await?;
    let old = issue(&owner, "reused", &["posts:read"]).await?;
    let new = rotate(&owner, old.id, "1 hour").await?;
    let presented =
        async |token: &Token| common::Request::of(&token.token).coming_from("2001:db8::7").code(&web).await;
    assert_eq!(presented(&old).await?, "VALID");
    record(&owner).await?;
    assert_eq!(reuses(&owner, old.id).await?, [] as [Value; 0], "within its grace");

    end_grace(&owner, old.id, "1 second").await?;
    for _ in 0..3 {
        assert_eq!(presented(&old).await?, "EXPIRED");
        record(&owner).await?;
    }
    let notified = reuses(&owner, old.id).await?;
    assert_eq!(notified.len(), 1, "{notified:?}");
    assert_eq!(
        (&notified[0]["client_ip"], &notified[0]["rotated_to"]),
        (&json!("2001:db8::7"), &json!(new.id))
    );
    assert!(notified[0]["presented_at"].is_string() && notified[0].get("revokes").is_none(), "{notified:?}");
    assert_eq!(code(&web, &new.token).await?, "VALID", "it is recorded, and no more");

    // A minute later, whichever function it is presented to, and without an address.
    let other = cluster.connect("postgres", DATABASE).await?;
    for (n, call) in
        ["authenticate($1)", "token_has_scope($1, 'posts:read')", "derive_api_token($1, 'n', '{}', null)"]
            .iter()
            .enumerate()
    {
        set(&owner, old.id, "reuse_detected_at = reuse_detected_at - interval '1 minute'").await?;
        // Refused or false.
        let _ = other.query(&format!("select from tollgate.{call}"), &[&old.token]).await;
        record(&owner).await?;
        let notified = reuses(&owner, old.id).await?;
        assert_eq!((notified.len(), notified[n + 1].get("client_ip")), (n + 2, None), "{call}");
    }
    // Revoking it by presenting it means that it was found.
    set(&owner, old.id, "reuse_detected_at = null").await?;
    owner.query_one("select tollgate.revoke_presented_token($1)", &[&old.token]).await?;
    assert_eq!(presented(&old).await?, "REVOKED");
    record(&owner).await?;
    assert_eq!(reuses(&owner, old.id).await?.len(), 4);
    // Nor for a token that only expired.
    let brief = issue(&owner, "reused", &[]).await?;
    end_grace(&owner, brief.id, "1 second").await?;
    assert_eq!(presented(&brief).await?, "EXPIRED");
    record(&owner).await?;
    assert_eq!(reuses(&owner, brief.id).await?, [] as [Value; 0]);
    for token in [old.id, brief.id] {
        let left = format!("select count(*) from tollgate.found() where token_id = '{token}'");
        record(&owner).await?;
        assert_eq!(value::<i64>(&owner, &left).await?, 0);
    }
    Ok(())
}

#[tokio::test]
async fn reuse_revokes_the_successors_and_their_descendants_where_the_rotation_requested_it() -> Result<()> {
    let World { owner, web, cluster } = SHARED.world().await?;
    let mut notified = Notifications::listen(&cluster, "thief").await?;
    let first = issue(&owner, "thief", &["posts:read"]).await?;
    let row = owner
        .query_one(
            "select id, token from tollgate.rotate_api_token($1, revoke_on_reuse => true)",
            &[&first.id],
        )
        .await?;
    let second = Token { id: row.get(0), token: row.get(1) };
    let third = rotate(&owner, second.id, "1 hour").await?;
    let child = derive(&owner, &third, &["posts:read"]).await?;
    let other = issue(&owner, "thief", &[]).await?;
    notified.all().await?;
    assert_eq!(code(&web, &first.token).await?, "EXPIRED");
    record(&owner).await?;
    for token in [&second, &third, &child] {
        assert_eq!(code(&web, &token.token).await?, "REVOKED");
        let log = history(&owner, token.id).await?;
        let (event, detail) = log.last().context("an event")?;
        assert_eq!((event.as_str(), &detail["reused"]), ("token.revoked", &json!(first.id)));
    }
    assert_eq!(code(&web, &other.token).await?, "VALID");
    // A receiver may request just this event.
    owner
        .batch_execute("begin; select tollgate.define_webhook('alarm', 'https://example.com/', '{token.reuse_detected}'); rollback")
        .await?;
    assert_eq!(reuses(&owner, first.id).await?[0]["revokes"], true);
    let notified = notified.all().await?;
    assert_eq!(
        (notified.len(), &notified[0]["event"], &notified[0]["count"]),
        (1, &json!("token.revoked"), &json!(3))
    );
    Ok(())
}

#[tokio::test]
async fn findings_made_up_by_an_operator_are_ignored() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    let old = issue(&owner, "framed", &[]).await?;
    let row = "select id, token from tollgate.rotate_api_token($1, revoke_on_reuse => true)";
    let row = owner.query_one(row, &[&old.id]).await?;
    let new: String = row.get(1);
    for signature in
        ["null", "''", "sha256('')", "(select sha256(string_agg(proname, '')::bytea) from pg_proc)"]
    {
        let call = format!(
            "select tollgate.apply_findings(array[row('{}', now(), null, {signature})::tollgate.finding])",
            old.id
        );
        owner.batch_execute(&call).await.with_context(|| call.clone())?;
    }
    for bad in ["null", "array_fill(null::tollgate.finding, array[1001])"] {
        let call = owner.batch_execute(&format!("select tollgate.apply_findings({bad})")).await;
        refused(call, &SqlState::INVALID_PARAMETER_VALUE);
    }
    assert_eq!(reuses(&owner, old.id).await?, [] as [Value; 0]);
    assert_eq!(code(&web, &new).await?, "VALID");
    Ok(())
}

#[tokio::test]
async fn a_successor_may_be_given_another_end() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    let parent = issue_with(&owner, "renewed", "expires_in => '10 days'").await?;
    for (arguments, end) in [
        ("expires_in => '90 days'", "now() + interval '2160 hours'"),
        ("expires_at => '2099-01-02 03:04Z'", "timestamptz '2099-01-02 03:04Z'"),
        ("grace => '1 hour'", "now() + interval '24 hours'"),
    ] {
        let old = issue_with(&owner, "renewed", "expires_in => '1 day'").await?;
        let call = format!(
            "select (t).token, abs(extract(epoch from (t).expires_at - ({end}))) < 60
               from tollgate.rotate_api_token($1, {arguments}) t"
        );
        let row = owner.query_one(&call, &[&old.id]).await?;
        assert!(row.get::<_, bool>(1), "{arguments}");
        assert_eq!(code(&web, row.get(0)).await?, "VALID");
    }
    let child = derive(&owner, &parent, &[]).await?;
    for (token, arguments, argument) in [
        (&child, "expires_in => '11 days'", "expires_in"),
        (&child, "expires_at => '2099-01-01'", "expires_at"),
        (&parent, "expires_in => '0'", "expires_in"),
        (&parent, "expires_at => now() - interval '1 second'", "expires_at"),
        (&parent, "expires_at => 'infinity'", "expires_at"),
        (&parent, "expires_in => '1 day', expires_at => '2099-01-01'", "expires_at"),
    ] {
        let call = format!("select tollgate.rotate_api_token('{}', {arguments})", token.id);
        let error = refused(owner.batch_execute(&call).await, &SqlState::INVALID_PARAMETER_VALUE);
        assert_explained(&error, &format!("Argument: {argument}"));
    }
    Ok(())
}

#[tokio::test]
async fn a_token_that_is_over_or_was_rotated_has_no_successor() -> Result<()> {
    let World { owner, cluster: _cluster, .. } = SHARED.world().await?;
    let error = refused(rotate(&owner, Uuid::nil(), "0").await, &SqlState::UNDEFINED_OBJECT);
    assert_explained(&error, &Uuid::nil().to_string());
    for (state, changes) in [
        ("revoked", "revoked_at = now()"),
        ("expired", "expires_at = now()"),
        ("disabled", "disabled_at = now()"),
        ("rotated already", "rotated_to = id"),
    ] {
        let token = issue(&owner, "over", &[]).await?;
        set(&owner, token.id, changes).await?;
        let error = refused(rotate(&owner, token.id, "0").await, &SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE);
        assert_eq!(error.message(), format!("the token is {state}"));
        assert_explained(&error, &token.id.to_string());
    }
    let token = issue(&owner, "over", &[]).await?;
    let successor = rotate(&owner, token.id, "1 day").await?;
    let error = refused(rotate(&owner, token.id, "1 day").await, &SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE);
    assert!(error.hint().is_some_and(|hint| hint.contains(&successor.id.to_string())), "{error:?}");
    rotate(&owner, successor.id, "0").await?;
    assert_eq!(value::<i64>(&owner, "select count(*) from tollgate.list_api_tokens('over')").await?, 7);

    for (bad, argument) in [("-1 second", "grace"), ("1100 years", "grace")] {
        assert_explained(
            &refused(rotate(&owner, token.id, bad).await, &SqlState::INVALID_PARAMETER_VALUE),
            argument,
        );
    }
    let null = owner.batch_execute(&format!("select tollgate.rotate_api_token('{}', null)", token.id)).await;
    assert_explained(&refused(null, &SqlState::INVALID_PARAMETER_VALUE), "grace");
    let null = owner.batch_execute("select tollgate.rotate_api_token(null)").await;
    assert_explained(&refused(null, &SqlState::INVALID_PARAMETER_VALUE), "token_id");
    Ok(())
}

#[tokio::test]
async fn a_successor_is_purged_only_after_the_token_that_names_it() -> Result<()> {
    // A separate server: tokens that other tests let end would be purged, too.
    let cluster = common::start(Cluster::builder())?;
    let owner = cluster.connect("postgres", DATABASE).await?;
    let first = issue(&owner, "kept", &[]).await?;
    let second = rotate(&owner, first.id, "1 hour").await?;
    let third = rotate(&owner, second.id, "0").await?;
    revoke(&owner, third.id).await?;
    let purge = async || -> Result<Vec<Uuid>> {
        // As if all that ended had done so long ago; the first one is in its grace.
        owner.batch_execute("update tollgate.api_tokens set expired_at = expires_at where user_id = 'kept' and expires_at <= now()").await?;
        owner
            .batch_execute(
                "do $$ begin for i in 1 .. 5 loop perform tollgate.purge_tokens('0', 1000); end loop; end $$",
            )
            .await?;
        let rows = owner
            .query("select id from tollgate.api_tokens where user_id = 'kept' order by created_at", &[])
            .await?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    };
    assert_eq!(purge().await?, [first.id, second.id, third.id], "each is named by one that is there");
    let error = refused(rotate(&owner, first.id, "0").await, &SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE);
    assert!(error.hint().is_some_and(|hint| hint.contains(&second.id.to_string())), "{error:?}");
    revoke(&owner, first.id).await?;
    assert!(purge().await?.is_empty(), "once that is gone, all go");
    Ok(())
}

#[tokio::test]
async fn a_rotation_is_recorded_with_both_tokens_and_notified_once() -> Result<()> {
    let World { owner, cluster, .. } = SHARED.world().await?;
    let old = issue(&owner, "recorded", &["posts:read"]).await?;
    let mut notified = Notifications::listen(&cluster, "recorded").await?;
    let new = rotate(&owner, old.id, "1 hour").await?;
    let end: Value = value(
        &owner,
        &format!("select to_jsonb(expires_at) from tollgate.api_tokens where id = '{}'", old.id),
    )
    .await?;
    assert_eq!(
        history(&owner, old.id).await?[1..],
        [(
            "token.rotated".to_owned(),
            json!({"rotated_to": new.id, "changes": {"expires_at": {"from": null, "to": end}}})
        )]
    );
    assert_eq!(
        history(&owner, new.id).await?,
        [(
            "token.created".to_owned(),
            json!({"name": "a test's", "hint": new.token[..8], "scopes": ["posts:read"], "rotated_from": old.id})
        )]
    );
    assert_eq!(
        notified.all().await?,
        [json!({"event": "token.rotated", "token_id": old.id, "user_id": "recorded", "reason": null})]
    );
    Ok(())
}

// ---- Changes

#[tokio::test]
async fn each_key_changes_what_it_names_and_null_clears_it() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    let token = issue_with(&owner, "changed", "scopes => '{posts:read}'").await?;
    let later = "2999-01-02T03:04:05+00:00";
    owner.batch_execute("set timezone = 'UTC'").await?;
    let null = Value::Null;
    let unchanged = substance(&owner, token.id).await?;
    for (key, to, from) in [
        ("name", json!("laptop"), json!("a test's")),
        ("scopes", json!(["posts:*", "users:read"]), json!(["posts:read"])),
        ("expires_at", json!(later), null.clone()),
        ("metadata", json!({"plan": {"of": 1}}), json!({})),
        ("allowed_ips", json!(["10.0.0.0/8", "2001:db8::/32"]), null.clone()),
    ] {
        let row = owner
            .query_one(
                "select to_jsonb(t) from tollgate.update_api_token($1, $2) t",
                &[&token.id, &json!({key: to})],
            )
            .await?;
        let row: Value = row.get(0);
        assert_eq!((&row["id"], &row[key], &row["status"]), (&json!(token.id), &to, &json!("active")));
        let log = history(&owner, token.id).await?;
        let changes = json!({"changes": {key: {"from": from, "to": to}}});
        assert_eq!(log.last(), Some(&("token.updated".to_owned(), changes)));
    }
    let request = common::Request::of(&token.token).coming_from("10.1.1.1");
    let verified = request.verify(&web).await?;
    assert_eq!((verified.code.as_str(), verified.name.as_deref()), ("VALID", Some("laptop")));
    assert_eq!(verified.scopes.as_deref(), Some(&["posts:*".to_owned(), "users:read".to_owned()][..]));
    assert_eq!(verified.metadata, Some(json!({"plan": {"of": 1}})));
    assert_eq!(code(&web, &token.token).await?, "IP_NOT_ALLOWED");

    update(
        &owner,
        token.id,
        &json!({"scopes": null, "expires_at": null, "metadata": null, "allowed_ips": null,
                "rate_limit": null, "rate_window": null, "name": "a test's"}),
    )
    .await?;
    let mut cleared = unchanged;
    cleared["scopes"] = json!([]);
    assert_eq!(substance(&owner, token.id).await?, cleared);

    // An unchanged value is not an event.
    let events = history(&owner, token.id).await?.len();
    for same in [json!({}), json!({"name": "a test's", "scopes": [], "metadata": {}})] {
        update(&owner, token.id, &same).await?;
    }
    assert_eq!(history(&owner, token.id).await?.len(), events);
    Ok(())
}

#[tokio::test]
async fn a_change_is_refused_where_issuing_is_refused_and_its_value_is_not_repeated() -> Result<()> {
    let World { owner, cluster: _cluster, .. } = SHARED.world().await?;
    let token = issue(&owner, "unchanged", &["posts:read"]).await?;
    let before = substance(&owner, token.id).await?;
    let secret = token.token.as_str();
    for (changes, names) in [
        (json!({"nmae": "typo"}), "changes"),
        (json!({"user_id": "mallory"}), "changes"),
        (json!({"token_hash": "\\x00"}), "changes"),
        (json!({secret: 1}), "changes"),
        (json!([]), "changes"),
        (json!("name"), "changes"),
        (Value::Null, "changes"),
        (json!({"name": null}), "name"),
        (json!({"name": " "}), "name"),
        (json!({"name": 1}), "name"),
        (json!({"name": "x".repeat(101)}), "name"),
        (json!({"scopes": "posts:read"}), "scopes"),
        (json!({"scopes": ["posts:none"]}), "scopes"),
        (json!({"scopes": ["Posts"]}), "scopes"),
        (json!({"scopes": [null]}), "scopes"),
        (json!({"scopes": [["posts:read"], ["posts:write"]]}), "scopes"),
        (json!({"scopes": [["posts:read"], "posts:write"]}), "scopes"),
        (json!({"scopes": [secret]}), "changes"),
        (json!({"expires_at": "2000-01-01"}), "expires_at"),
        (json!({"expires_at": "infinity"}), "expires_at"),
        (json!({"expires_at": "-infinity"}), "expires_at"),
        (json!({"expires_at": "9999-01-01"}), "expires_at"),
        (json!({"expires_at": "300000-01-01"}), "expires_at"),
        (json!({"expires_at": 7}), "expires_at"),
        (json!({"expires_at": secret}), "changes"),
        (json!({"metadata": []}), "metadata"),
        (json!({"metadata": "{}"}), "metadata"),
        (json!({"allowed_ips": []}), "allowed_ips"),
        (json!({"allowed_ips": "10.0.0.0/8"}), "allowed_ips"),
        (json!({"allowed_ips": [null]}), "allowed_ips"),
        (json!({"allowed_ips": ["10.0.0.1/8"]}), "allowed_ips"),
        (json!({"allowed_ips": [secret]}), "changes"),
        (json!({"rate_limit": 0}), "rate_limit"),
        (json!({"rate_limit": 99_999_999_999_i64}), "rate_limit"),
        (json!({"rate_limit": "many"}), "rate_limit"),
        (json!({"rate_limit": 1, "rate_window": "0"}), "rate_window"),
        (json!({"rate_limit": 1, "rate_window": "25 hours"}), "rate_window"),
        (json!({"rate_window": secret}), "changes"),
    ] {
        let error = refused(update(&owner, token.id, &changes).await, &SqlState::INVALID_PARAMETER_VALUE);
        assert_explained(&error, names);
        assert!(!common::text_of(&error).contains(&secret[4..20]), "{error:?}");
    }
    refused(update(&owner, Uuid::nil(), &json!({})).await, &SqlState::UNDEFINED_OBJECT);
    assert_eq!(substance(&owner, token.id).await?, before);
    assert_eq!(history(&owner, token.id).await?.len(), 1);

    revoke(&owner, token.id).await?;
    let error = refused(
        update(&owner, token.id, &json!({"name": "late"})).await,
        &SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE,
    );
    assert_explained(&error, &token.id.to_string());
    Ok(())
}

#[tokio::test]
async fn changes_that_take_access_away_are_notified_and_no_others() -> Result<()> {
    let World { owner, cluster, .. } = SHARED.world().await?;
    let token = issue_with(&owner, "notified", "scopes => '{posts:*}', expires_in => '1 day'").await?;
    let mut notified = Notifications::listen(&cluster, "notified").await?;
    let narrowed =
        json!({"event": "token.updated", "token_id": token.id, "user_id": "notified", "reason": null});
    for (changes, takes_away) in [
        (json!({"name": "other"}), false),
        (json!({"metadata": {"a": 1}}), false),
        (json!({"scopes": ["posts:*", "users:read"]}), false),
        (json!({"scopes": ["posts:*"]}), true),
        (json!({"scopes": ["posts:read"]}), true),
        (json!({"scopes": ["posts:write"]}), true),
        (json!({"scopes": ["admin"]}), false),
        (json!({"expires_at": null}), false),
        (json!({"expires_at": "2999-01-01"}), true),
        (json!({"expires_at": "2999-01-02"}), false),
        (json!({"allowed_ips": ["10.0.0.0/8"]}), true),
        (json!({"allowed_ips": ["10.0.0.0/7"]}), false),
        (json!({"allowed_ips": ["10.0.0.0/8", "11.0.0.0/9"]}), true),
        (json!({"allowed_ips": null}), false),
    ] {
        update(&owner, token.id, &changes).await?;
        let expected = if takes_away { vec![narrowed.clone()] } else { vec![] };
        assert_eq!(notified.all().await?, expected, "{changes}");
    }
    Ok(())
}

#[tokio::test]
async fn a_later_expiry_brings_a_token_back_whose_next_end_is_recorded_too() -> Result<()> {
    let World { owner, web, cluster } = SHARED.world().await?;
    common::database(&cluster, "revived")?;
    let revived = cluster.connect("postgres", "revived").await?;
    let token = issue(&revived, "back", &["posts:read"]).await?;
    for round in 1..=2 {
        set(&revived, token.id, "expires_at = now()").await?;
        assert_eq!(value::<i64>(&revived, "select tollgate.expire_tokens()").await?, 1, "round {round}");
        update(&revived, token.id, &json!({"name": format!("still expired {round}")})).await?;
        assert_eq!(code(&revived, &token.token).await?, "EXPIRED");
        update(&revived, token.id, &json!({"expires_at": "2999-01-01"})).await?;
        assert_eq!(code(&revived, &token.token).await?, "VALID");
        assert_eq!(value::<i64>(&revived, "select tollgate.expire_tokens()").await?, 0);
    }
    let ends =
        history(&revived, token.id).await?.iter().filter(|(event, _)| event == "token.expired").count();
    assert_eq!(ends, 2);

    // Meanwhile nothing kept its scope in the catalogue.
    set(&revived, token.id, "expires_at = now()").await?;
    revived.batch_execute("select tollgate.drop_scope('posts:read')").await?;
    let back = update(&revived, token.id, &json!({"expires_at": null})).await;
    assert_explained(&refused(back, &SqlState::INVALID_PARAMETER_VALUE), "posts:read");
    update(&revived, token.id, &json!({"expires_at": null, "scopes": ["users:read"]})).await?;
    assert_eq!(code(&revived, &token.token).await?, "VALID");
    drop((owner, web));
    Ok(())
}

// ---- Disabling

#[tokio::test]
async fn a_disabled_token_is_refused_until_it_is_enabled() -> Result<()> {
    let World { owner, web, cluster } = SHARED.world().await?;
    let token = issue(&owner, "switched", &[]).await?;
    let mut notified = Notifications::listen(&cluster, "switched").await?;
    assert!(!enable(&owner, token.id, true).await?, "enabled already");
    assert!(enable(&owner, token.id, false).await?);
    assert!(!enable(&owner, token.id, false).await?, "disabled already");
    assert_eq!(code(&web, &token.token).await?, "DISABLED");
    assert_eq!(
        notified.all().await?,
        [json!({"event": "token.disabled", "token_id": token.id, "user_id": "switched", "reason": "a test"})]
    );
    assert!(enable(&owner, token.id, true).await?);
    assert_eq!(code(&web, &token.token).await?, "VALID");
    assert_eq!(notified.all().await?, Vec::<Value>::new());
    let because = json!({"reason": "a test"});
    assert_eq!(
        history(&owner, token.id).await?[1..],
        [("token.disabled".to_owned(), because.clone()), ("token.enabled".to_owned(), because)]
    );

    assert!(!enable(&owner, Uuid::nil(), false).await?, "unknown");
    revoke(&owner, token.id).await?;
    for enabled in [true, false] {
        assert!(!enable(&owner, token.id, enabled).await?, "revoked");
    }
    let null = format!("select tollgate.set_api_token_enabled('{}', null)", token.id);
    assert_explained(
        &refused(owner.batch_execute(&null).await, &SqlState::INVALID_PARAMETER_VALUE),
        "enabled",
    );
    let long = format!("select tollgate.set_api_token_enabled('{}', true, repeat('x', 1001))", token.id);
    assert_explained(
        &refused(owner.batch_execute(&long).await, &SqlState::INVALID_PARAMETER_VALUE),
        "reason",
    );
    Ok(())
}

// ---- Revocation

#[tokio::test]
async fn a_revocation_in_an_old_snapshot_succeeds_or_asks_for_a_retry() -> Result<()> {
    let World { owner, web, cluster } = SHARED.world().await?;
    let old = cluster.connect("postgres", DATABASE).await?;
    for isolation in ["repeatable read", "serializable"] {
        let begin = format!("begin isolation level {isolation}; select from tollgate.api_tokens");
        let seen = issue(&owner, "snapshot", &[]).await?;
        old.batch_execute(&begin).await?;
        let unseen = issue(&owner, "snapshot", &[]).await?;
        let unseen_child = derive(&owner, &seen, &[]).await?;
        let others = issue(&owner, "snapshot of another", &[]).await?;
        for call in [
            format!("revoke_api_token('{}')", unseen.id),
            format!("revoke_api_token('{}')", seen.id),
            "revoke_all_api_tokens('snapshot')".to_owned(),
            "revoke_all_api_tokens('snapshot of another')".to_owned(),
            format!("revoke_presented_token('{}')", others.token),
            format!("set_api_token_enabled('{}', false)", unseen.id),
            format!("rotate_api_token('{}')", unseen.id),
            format!("update_api_token('{}', '{{}}')", unseen.id),
        ] {
            old.batch_execute("savepoint s").await?;
            let result = old.batch_execute(&format!("select tollgate.{call}")).await;
            let error = refused(result, &SqlState::T_R_SERIALIZATION_FAILURE);
            assert!(error.hint().is_some(), "{call}: {error:?}");
            old.batch_execute("rollback to s").await?;
        }
        // A token that does not exist is not worth a retry.
        assert!(!revoke(&old, Uuid::nil()).await?);
        old.batch_execute("rollback").await?;

        old.batch_execute(&begin).await?;
        assert!(revoke(&old, seen.id).await?);
        assert!(!revoke(&old, seen.id).await?);
        let rest = "select tollgate.revoke_all_api_tokens('snapshot')";
        assert_eq!(value::<i64>(&old, rest).await?, 1);
        old.batch_execute("commit").await?;
        for token in [&seen, &unseen, &unseen_child] {
            assert_eq!(code(&web, &token.token).await?, "REVOKED");
        }
        owner.batch_execute("select tollgate.revoke_all_api_tokens('snapshot of another')").await?;
    }
    Ok(())
}

#[tokio::test]
async fn an_authenticated_user_revokes_own_tokens_and_no_others() -> Result<()> {
    let World { owner, cluster, .. } = SHARED.world().await?;
    owner
        .batch_execute(
            "create role own login;
             grant execute on function tollgate.authenticate, tollgate.revoke_own_api_token to own",
        )
        .await?;
    let own = cluster.connect("own", DATABASE).await?;
    let [mine, second, others] = [
        issue(&owner, "own", &[]).await?,
        issue(&owner, "own", &[]).await?,
        issue(&owner, "another user", &[]).await?,
    ];
    let ask = async |id: Option<Uuid>| {
        own.query_one("select tollgate.revoke_own_api_token($1, 'mine')", &[&id]).await
    };
    for id in [Some(mine.id), None] {
        let error = refused(ask(id).await, &SqlState::INVALID_AUTHORIZATION_SPECIFICATION);
        assert_explained(&error, "identity");
    }
    own.batch_execute("begin").await?;
    authenticate(&own, &mine.token).await?;
    for (id, expected) in [
        (Some(others.id), false),
        (None, false),
        (Some(Uuid::nil()), false),
        (Some(second.id), true),
        (Some(second.id), false),
        (Some(mine.id), true),
    ] {
        assert_eq!(ask(id).await?.get::<_, bool>(0), expected, "{id:?}");
    }
    own.batch_execute("commit").await?;
    for (token, expected) in [(mine, "REVOKED"), (second, "REVOKED"), (others, "VALID")] {
        assert_eq!(code(&owner, &token.token).await?, expected);
    }
    Ok(())
}

// ---- Settings

#[tokio::test]
async fn no_token_is_given_a_longer_life_than_the_setting_allows() -> Result<()> {
    let World { owner, web: _web, cluster } = SHARED.world().await?;
    let session = cluster.connect("postgres", DATABASE).await?;
    let eternal = issue(&owner, "long", &[]).await?;
    let long = issue_with(&owner, "long", "expires_in => '1 year'").await?;
    let short = issue_with(&owner, "long", "expires_in => '1 hour'").await?;
    session.batch_execute("set tollgate.max_token_lifetime = '1d'").await?;
    for call in [
        "create_api_token('long', 'n')".to_owned(),
        "create_api_token('long', 'n', expires_in => '25 hours')".to_owned(),
        "import_api_token('long', 'n', sha256('long'))".to_owned(),
        "import_api_token('long', 'n', sha256('long'), expires_in => '2 days')".to_owned(),
        format!("derive_api_token('{}', 'n', '{{}}', null)", eternal.token),
        format!("derive_api_token('{}', 'n', '{{}}', '2 days')", eternal.token),
        format!("rotate_api_token('{}')", eternal.id),
        format!("rotate_api_token('{}')", long.id),
        format!("update_api_token('{}', '{{\"expires_at\": null}}')", short.id),
        format!("update_api_token('{}', '{{\"expires_at\": \"2999-01-01\"}}')", short.id),
    ] {
        let result = session.batch_execute(&format!("select tollgate.{call}")).await;
        let error = refused(result, &SqlState::INVALID_PARAMETER_VALUE);
        assert_explained(&error, "Argument: expires_");
        assert!(error.hint().is_some_and(|hint| hint.contains("tollgate.max_token_lifetime")), "{error:?}");
    }
    for call in [
        "create_api_token('long', 'n', expires_in => '1 day')".to_owned(),
        format!("derive_api_token('{}', 'n', '{{}}', '1 hour')", eternal.token),
        format!("derive_api_token('{}', 'n', '{{}}', null)", short.token),
        format!("rotate_api_token('{}')", short.id),
        // An unchanged expiry stays, and all other fields may be changed.
        format!("update_api_token('{}', '{{\"name\": \"eternal\"}}')", eternal.id),
        format!(
            "update_api_token('{}', jsonb_build_object('expires_at', now() + interval '1 hour'))",
            eternal.id
        ),
        format!("rotate_api_token('{}')", eternal.id),
    ] {
        session.batch_execute(&format!("select tollgate.{call}")).await.with_context(|| call.clone())?;
    }
    Ok(())
}

#[tokio::test]
async fn a_lifetime_is_as_long_in_every_time_zone_and_never_longer_than_the_cap_says() -> Result<()> {
    let World { owner, cluster, .. } = SHARED.world().await?;
    let session = cluster.connect("postgres", DATABASE).await?;
    let root = issue(&owner, "zoned", &[]).await?;
    for zone in ["UTC", "Australia/Sydney", "America/New_York", "Europe/Berlin", "Asia/Kathmandu"] {
        session.batch_execute(&format!("set timezone = '{zone}'")).await?;
        // Some of these end after a daylight-saving change, whenever it is now.
        for days in [1, 30, 90, 150, 180, 240, 300, 365] {
            session.batch_execute(&format!("set tollgate.max_token_lifetime = '{days}d'")).await?;
            for call in [
                format!("create_api_token('zoned', 'n', expires_in => '{days} days')"),
                format!("derive_api_token('{}', 'n', '{{}}', '{days} days')", root.token),
                format!(
                    "rotate_api_token((tollgate.create_api_token('zoned', 'n', expires_in => '1 hour')).id, expires_in => '{days} days')"
                ),
            ] {
                let exact = format!(
                    "select abs(extract(epoch from t.expires_at - clock_timestamp()) - {days} * 86400) < 60 from tollgate.{call} t"
                );
                assert!(value::<bool>(&session, &exact).await?, "{call} in {zone}");
            }
            let import = format!(
                "select tollgate.import_api_token('zoned', 'n', sha256('{zone} {days}'), expires_in => '{days} days')"
            );
            session.batch_execute(&import).await.with_context(|| format!("{days} days in {zone}"))?;
        }
        // Months and years are those of the calendar in UTC.
        session.batch_execute("set tollgate.max_token_lifetime = 0").await?;
        for lifetime in ["1 month", "1 year 2 months 3 days 04:05:06"] {
            let exact = format!(
                "select abs(extract(epoch from t.expires_at at time zone 'UTC'
                                                - (clock_timestamp() at time zone 'UTC' + interval '{lifetime}'))) < 60
                   from tollgate.create_api_token('zoned', 'n', expires_in => '{lifetime}') t"
            );
            assert!(value::<bool>(&session, &exact).await?, "{lifetime} in {zone}");
        }
    }
    // And so is the grace of a rotation.
    session.batch_execute("set timezone = 'Australia/Sydney'").await?;
    for days in [90, 180, 270] {
        let old = issue(&session, "zoned", &[]).await?;
        rotate(&session, old.id, &format!("{days} days")).await?;
        let exact = format!(
            "select abs(extract(epoch from expires_at - clock_timestamp()) - {days} * 86400) < 60
               from tollgate.api_tokens where id = '{}'",
            old.id
        );
        assert!(value::<bool>(&session, &exact).await?, "{days} days");
    }
    Ok(())
}

#[tokio::test]
async fn an_end_is_a_time_or_a_moment_and_not_both() -> Result<()> {
    let World { owner, cluster, .. } = SHARED.world().await?;
    let session = cluster.connect("postgres", DATABASE).await?;
    let root = issue_with(&owner, "momentary", "expires_at => '2098-01-01Z'").await?;
    let calls = |plaintext: &str, arguments: &str| {
        [
            format!("create_api_token('momentary', 'n', {arguments})"),
            format!("import_api_token('momentary', 'n', sha256('{plaintext}'), {arguments})"),
            format!("derive_api_token('{}', 'n', '{{}}', {arguments})", root.token),
        ]
    };
    for call in calls("good", "expires_in => null, expires_at => '2097-06-05 04:03:02.1Z'") {
        let id = if call.starts_with("import") { "t" } else { "t.id" };
        let ids: Uuid = value(&session, &format!("select {id} from tollgate.{call} t")).await?;
        let exact = format!(
            "select expires_at = '2097-06-05 04:03:02.1Z' from tollgate.api_tokens where id = '{ids}'"
        );
        assert!(value::<bool>(&session, &exact).await?, "{call}");
    }
    session.batch_execute("set tollgate.max_token_lifetime = '30d'").await?;
    for bad in [
        "expires_in => '1 day', expires_at => now() + interval '1 day'",
        "expires_in => null, expires_at => 'infinity'",
        "expires_in => null, expires_at => '-infinity'",
        "expires_in => null, expires_at => '3099-01-01'",
        "expires_in => null, expires_at => now() + interval '31 days'",
    ] {
        for call in calls("bad", bad) {
            let result = session.batch_execute(&format!("select tollgate.{call}")).await;
            assert_explained(&refused(result, &SqlState::INVALID_PARAMETER_VALUE), "Argument: expires_at");
        }
    }
    for call in [
        &calls("good", "expires_in => null, expires_at => now()")[0],
        &calls("good", "expires_in => null, expires_at => now()")[2],
    ] {
        let result = session.batch_execute(&format!("select tollgate.{call}")).await;
        assert_explained(&refused(result, &SqlState::INVALID_PARAMETER_VALUE), "Argument: expires_at");
    }
    Ok(())
}

#[tokio::test]
async fn a_user_has_no_more_live_tokens_than_the_setting_allows() -> Result<()> {
    let World { owner, cluster, .. } = SHARED.world().await?;
    let session = cluster.connect("postgres", DATABASE).await?;
    session.batch_execute("set tollgate.max_tokens_per_user = 3").await?;
    let first = issue(&session, "many", &[]).await?;
    let second = issue(&session, "many", &[]).await?;
    let child = derive(&session, &first, &[]).await?;
    let full = [
        "create_api_token('many', 'n')".to_owned(),
        "import_api_token('many', 'n', sha256('many'))".to_owned(),
        format!("derive_api_token('{}', 'n', '{{}}', null)", second.token),
    ];
    let assert_full = async || {
        for call in &full {
            let result = session.batch_execute(&format!("select tollgate.{call}")).await;
            let error = refused(result, &SqlState::CONFIGURATION_LIMIT_EXCEEDED);
            assert_explained(&error, "allows 3");
        }
    };
    assert_full().await;
    issue(&session, "many others", &[]).await?;
    // Disabled tokens count, since they may be enabled; replaced ones do not.
    enable(&session, child.id, false).await?;
    assert_full().await;
    let second = rotate(&session, second.id, "1 hour").await?;
    assert_full().await;
    // An expired one does not, and then cannot come back.
    set(&owner, second.id, "expires_at = now()").await?;
    let third = issue(&session, "many", &[]).await?;
    assert_full().await;
    let back = update(&session, second.id, &json!({"expires_at": null})).await;
    refused(back, &SqlState::CONFIGURATION_LIMIT_EXCEEDED);
    revoke(&owner, third.id).await?;
    update(&session, second.id, &json!({"expires_at": null})).await?;
    assert_full().await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_number_of_tokens_is_exact_under_concurrent_issuing() -> Result<()> {
    let World { owner, cluster, .. } = SHARED.world().await?;
    // Under REPEATABLE READ the first token of a user, issued by several at once, would be a serialization failure.
    owner.batch_execute("set tollgate.max_tokens_per_user = 10").await?;
    issue(&owner, "crowd", &[]).await?;
    let mut issuers = Vec::new();
    for n in 0..8 {
        let session = cluster.connect("postgres", DATABASE).await?;
        let isolation = if n % 2 == 0 { "read committed" } else { "repeatable read" };
        session
            .batch_execute(&format!(
                "set tollgate.max_tokens_per_user = 10;
                 set default_transaction_isolation = '{isolation}'"
            ))
            .await?;
        issuers.push(tokio::spawn(async move {
            let mut issued = 0;
            for _ in 0..5 {
                // With a snapshot from before the others finished.
                session.batch_execute("begin; select from tollgate.scopes").await?;
                match session.batch_execute("select tollgate.create_api_token('crowd', 'n')").await {
                    Ok(()) => {
                        session.batch_execute("commit").await?;
                        issued += 1;
                    }
                    result => {
                        refused(result, &SqlState::CONFIGURATION_LIMIT_EXCEEDED);
                        session.batch_execute("rollback").await?;
                    }
                }
            }
            anyhow::Ok(issued)
        }));
    }
    let mut issued = 1;
    for issuer in issuers {
        issued += issuer.await??;
    }
    let live: i64 = value(&owner, "select count(*) from tollgate.list_api_tokens('crowd')").await?;
    assert_eq!((issued, live), (10, 10));
    Ok(())
}

#[tokio::test]
async fn limits_cannot_be_raised_by_their_subjects_and_every_setting_says_why() -> Result<()> {
    let World { owner, web, cluster: _cluster } = SHARED.world().await?;
    for (setting, value) in
        [("max_token_lifetime", "0"), ("max_tokens_per_user", "0"), ("accept_foreign_tokens", "on")]
    {
        let set = web.batch_execute(&format!("set tollgate.{setting} = {value}")).await;
        refused(set, &SqlState::INSUFFICIENT_PRIVILEGE);
        for bad in ["'-1'", "'often'", "'99999999999'"] {
            let set = owner.batch_execute(&format!("set tollgate.{setting} = {bad}")).await;
            refused(set, &SqlState::INVALID_PARAMETER_VALUE);
        }
    }
    let silent: Vec<String> = value(
        &owner,
        "select coalesce(array_agg(name), '{}') from pg_settings
         where name like 'tollgate.%' and extra_desc !~* 'default'",
    )
    .await?;
    assert!(silent.is_empty(), "settings that do not say why their default is what it is: {silent:?}");
    Ok(())
}
