//! Tokens of another system: known by their digests alone, and verified in their old format only where that is allowed.

mod common;

use anyhow::Result;
use common::{Shared, World, authenticate, code, history, issue, refused, rotate, value};
use serde_json::json;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use tollgate_tests::DATABASE;
use uuid::Uuid;

static SHARED: Shared = Shared::new(&[]);

async fn import(owner: &Client, user: &str, plaintext: &str) -> Result<Uuid, tokio_postgres::Error> {
    let call =
        "select tollgate.import_api_token($1, 'imported', sha256(convert_to($2, 'UTF8')), '{posts:read}')";
    Ok(owner.query_one(call, &[&user, &plaintext]).await?.get(0))
}

/// Of every function that takes a plaintext, whether it knows the token. Leaves it revoked if they do.
async fn known(client: &Client, plaintext: &str) -> Result<Vec<bool>> {
    let mut known = vec![code(client, plaintext).await? == "VALID"];
    known.push(authenticate(client, plaintext).await.is_ok());
    for (call, expected) in
        [("token_has_scope($1, 'posts:read')", "true"), ("revoke_presented_token($1)", "true")]
    {
        let row = client.query_one(&format!("select tollgate.{call}::text"), &[&plaintext]).await?;
        known.push(row.get::<_, &str>(0) == expected);
    }
    Ok(known)
}

#[tokio::test]
async fn a_token_of_another_format_is_accepted_only_where_the_setting_says_so() -> Result<()> {
    let World { owner, cluster, .. } = SHARED.world().await?;
    let accepting = cluster.connect("postgres", DATABASE).await?;
    accepting.batch_execute("set tollgate.accept_foreign_tokens = on").await?;
    let longest = "x".repeat(8192);
    for foreign in ["sk_live_51H", "f47ac10b-58cc-4372-a567-0e02b2c3d479", "é ☃", &longest] {
        let id = import(&owner, "foreign", foreign).await?;
        assert_eq!(known(&owner, foreign).await?, [false; 4], "{foreign:.20}");
        assert_eq!(code(&owner, foreign).await?, "MALFORMED", "without a look-up");
        let derived = "select tollgate.derive_api_token($1, 'n', '{}', null)";
        refused(owner.execute(derived, &[&foreign]).await, &SqlState::INVALID_AUTHORIZATION_SPECIFICATION);
        accepting.execute(derived, &[&foreign]).await?;
        assert_eq!(known(&accepting, foreign).await?, [true; 4], "{foreign:.20}");
        assert_eq!(code(&accepting, foreign).await?, "REVOKED");
        assert_eq!(history(&owner, id).await?.len(), 2);
    }
    for never in ["", &"x".repeat(8193)] {
        import(&owner, "foreign", never).await?;
        assert_eq!(code(&accepting, never).await?, "MALFORMED");
    }
    assert_eq!(code(&accepting, "sk_live_52H").await?, "NOT_FOUND");
    let own = issue(&owner, "foreign", &["posts:read"]).await?;
    assert_eq!(known(&accepting, &own.token).await?, [true; 4]);
    Ok(())
}

#[tokio::test]
async fn an_imported_token_is_like_any_other() -> Result<()> {
    let World { owner, web, cluster } = SHARED.world().await?;
    // One of our own format, of another database, needs no setting.
    common::database(&cluster, "elsewhere")?;
    let theirs = issue(&cluster.connect("postgres", "elsewhere").await?, "moved", &[]).await?;
    assert_eq!(code(&web, &theirs.token).await?, "NOT_FOUND");
    let row = owner
        .query_one(
            "select tollgate.import_api_token('moved', 'from there', sha256(convert_to($1, 'UTF8')), '{posts:*,posts:*}',
                 '1 day', '{\"plan\": \"pro\"}', '{10.0.0.0/8}')",
            &[&theirs.token],
        )
        .await?;
    let id: Uuid = row.get(0);
    let verified = common::Request::of(&theirs.token).coming_from("10.0.0.1").verify(&web).await?;
    assert_eq!((verified.code.as_str(), verified.token_id), ("VALID", Some(id)));
    assert_eq!(verified.scopes, Some(vec!["posts:*".to_owned()]));
    assert_eq!(verified.metadata, Some(json!({"plan": "pro"})));
    let log = history(&owner, id).await?;
    assert_eq!((log[0].0.as_str(), &log[0].1["hint"]), ("token.imported", &json!("imported")));
    assert_eq!(log[0].1["name"], "from there");

    // Its successor is one of ours.
    let session = cluster.connect("postgres", DATABASE).await?;
    session.batch_execute("set tollgate.token_prefix = 'ours'").await?;
    assert!(rotate(&session, id, "0").await?.token.starts_with("ours_"));
    Ok(())
}

#[tokio::test]
async fn a_digest_is_imported_once_and_no_error_repeats_it() -> Result<()> {
    let World { owner, cluster: _cluster, .. } = SHARED.world().await?;
    let own = issue(&owner, "twice", &[]).await?;
    import(&owner, "twice", "once").await?;
    for plaintext in ["once", &own.token] {
        let error = refused(import(&owner, "twice", plaintext).await, &SqlState::UNIQUE_VIOLATION);
        assert!(error.detail().is_some_and(|detail| detail.contains("token_hash")), "{error:?}");
        assert!(error.hint().is_some(), "{error:?}");
        let digest = tollgate_core::token::digest(plaintext.as_bytes());
        let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        assert!(!format!("{error:?}").contains(&digest[..16]), "{error:?}");
    }
    for (argument, bad) in [
        ("token_hash", "null"),
        ("token_hash", "'\\x00'"),
        ("token_hash", "sha512('a')"),
        ("user_id", "''"),
        ("name", "''"),
        ("scopes", "'{none}'"),
        ("expires_in", "'0'"),
        ("metadata", "'[]'"),
        ("allowed_ips", "'{}'"),
        ("rate_limit", "0"),
        ("rate_window", "'0', rate_limit => 1"),
    ] {
        let mut arguments = vec![("user_id", "'twice'"), ("name", "'n'"), ("token_hash", "sha256('never')")];
        arguments.retain(|(name, _)| *name != argument);
        arguments.push((argument, bad));
        let arguments: Vec<String> =
            arguments.iter().map(|(name, value)| format!("{name} => {value}")).collect();
        let call = format!("select tollgate.import_api_token({})", arguments.join(", "));
        let error = refused(owner.batch_execute(&call).await, &SqlState::INVALID_PARAMETER_VALUE);
        assert!(
            error.detail().is_some_and(|detail| detail.starts_with(&format!("Argument: {argument}"))),
            "{call}: {error:?}"
        );
    }
    assert_eq!(value::<i64>(&owner, "select count(*) from tollgate.list_api_tokens('twice')").await?, 2);
    Ok(())
}
