//! Tokens of another system: stored as digests only, and verified in their old format only where that is allowed.

use crate::common::{self, Shared, World, authenticate, code, history, issue, refused, rotate, value};
use crate::drivers;
use anyhow::{Context as _, Result, bail, ensure};
use serde_json::json;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use tollgate_tests::{Cluster, DATABASE};
use uuid::Uuid;

static SHARED: Shared = Shared::new(&[]);

async fn import(owner: &Client, user: &str, plaintext: &str) -> Result<Uuid, tokio_postgres::Error> {
    let call =
        "select tollgate.import_api_token($1, 'imported', sha256(convert_to($2, 'UTF8')), '{posts:read}')";
    Ok(owner.query_one(call, &[&user, &plaintext]).await?.get(0))
}

/// For every function that takes a plaintext, whether it knows the token. Leaves it revoked if they do.
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
        for denied in ["verify_api_token($1)).valid", "token_has_scope($1, 'posts:read'))"] {
            let row = owner.query_one(&format!("select (tollgate.{denied}"), &[&foreign]).await?;
            assert!(!row.get::<_, bool>(0), "{foreign:.20}: {denied}");
        }
        refused(authenticate(&owner, foreign).await, &SqlState::INVALID_AUTHORIZATION_SPECIFICATION);
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

/// A session that accepts tokens of other systems.
async fn accepting(world: &World) -> Result<Client> {
    let client = world.cluster.connect("postgres", DATABASE).await?;
    client.batch_execute("set tollgate.accept_foreign_tokens = on").await?;
    Ok(client)
}

#[tokio::test]
async fn a_leaked_token_is_revoked_by_presenting_it_whatever_the_session_accepts() -> Result<()> {
    let world = SHARED.world().await?;
    let World { owner, .. } = &world;
    let accepting = accepting(&world).await?;
    let sanctum = "7|leaked-secret";
    for (plaintext, hash, format) in [
        ("leaked-as-it-is", "sha256('leaked-as-it-is')", "sha256"),
        ("leaked-from-knox", "sha512('leaked-from-knox')", "sha512"),
        (sanctum, "sha256('leaked-secret')", "sanctum"),
    ] {
        let import = format!("select tollgate.import_api_token('mia', 'old', {hash}, format => '{format}')");
        owner.batch_execute(&import).await?;
        assert_eq!(code(&accepting, plaintext).await?, "VALID", "{format}");
        let strict = world.cluster.connect("postgres", DATABASE).await?;
        strict
            .batch_execute(
                "set tollgate.accept_foreign_tokens = off; set tollgate.token_prefix = 'other';
                 set row_security = off; set search_path = ''; set tollgate.notify = off;
                 set tollgate.max_token_lifetime = '1s'; set tollgate.max_tokens_per_user = 1;
                 set timezone = 'Asia/Kathmandu'; set datestyle = 'SQL, DMY'",
            )
            .await?;
        let end = "select tollgate.revoke_presented_token($1, 'found it')";
        assert!(strict.query_one(end, &[&plaintext]).await?.get::<_, bool>(0), "{format}");
        assert_eq!(code(&accepting, plaintext).await?, "REVOKED", "{format}");
        assert!(!strict.query_one(end, &[&plaintext]).await?.get::<_, bool>(0), "{format}");
    }
    Ok(())
}

/// Records the findings of verifications, like the daemon.
async fn record(owner: &Client) -> Result<()> {
    // Twice, so that what the first run recorded is freed.
    for _ in 0..2 {
        owner.batch_execute("select tollgate.apply_findings()").await?;
    }
    Ok(())
}

/// The systems whose packages can be installed make a token here, see tests/drivers: how its digest is computed from what they
/// store, as docs/migrating.md does, and its format.
const MAKES: [(&str, &str, &str); 4] = [
    ("django-rest-knox", "decode($1, 'hex')", "sha512"),
    ("authtoken", "sha256(convert_to($1, 'UTF8'))", "sha256"),
    ("djangorestframework-api-key", "decode(split_part($1, '$$', 2), 'hex')", "sha512"),
    ("better-auth", "decode(translate($1, '-_', '+/') || '=', 'base64')", "sha256"),
];

/// A token, what the system stores of it, and the same as above.
const MADE: [[&str; 4]; 3] = [
    // By django-rest-knox 4.2.0 (with Django 4.2.30), which cannot be installed beside 5: by its AuthToken.objects.create.
    [
        "96cf14379f73433bbd2b9747ee4ed67613ef6ec6f53695bb2decb84179a40a29",
        "cfc24031ba35cf750c8e2b548c0e37d3f5856906f5c0f552755cac6ac5c3cd8e11489863c981a8a2bd8070efacdabec401be772cc97aa91365c75ab435ca4c93",
        "decode($1, 'hex')",
        "sha512-of-hex",
    ],
    // By hand, as the documentation of Laravel Sanctum says: `printf %s SECRET | sha256sum`.
    [
        "42|vTbHkq1Qx0e7JrPzWn3YdCmA8sLfGu5oXi6Kt2Eb4c1d9a0f",
        "cd4fe66826fe0842a8860b704bcb6d25f47efc2345ef1e217f762812189ce6b1",
        "decode($1, 'hex')",
        "sanctum",
    ],
    // By hand, as that of Unkey says: `printf %s KEY | openssl dgst -sha256 -binary | base64`.
    [
        "unkey_3ZkVf8c1tQm9WnB7",
        "u6r+Gc5Dipl1u/Vq7KPXrUBvJipsSFR5GttF0d1CT3k=",
        "decode(translate($1, '-_', '+/'), 'base64')",
        "sha256",
    ],
];

/// All of them, made now where that is possible.
fn tokens_of_other_systems() -> Result<Vec<[String; 4]>> {
    let mut tokens: Vec<_> = MADE.iter().map(|made| made.map(str::to_owned)).collect();
    for line in drivers::print_stored()?.lines() {
        let [system, token, stored] = line.split(' ').collect::<Vec<_>>()[..] else {
            bail!("not as it should be: {line}")
        };
        let (_, digest, format) =
            MAKES.iter().find(|(name, ..)| *name == system).with_context(|| line.to_owned())?;
        tokens.push([token, stored, digest, format].map(str::to_owned));
    }
    ensure!(tokens.len() == MADE.len() + MAKES.len(), "{tokens:?}");
    Ok(tokens)
}

#[tokio::test]
async fn tokens_of_each_system_verify_and_have_our_digest_from_their_first_use_on() -> Result<()> {
    let world = SHARED.world().await?;
    let World { owner, .. } = &world;
    let accepting = accepting(&world).await?;
    for [plaintext, stored, digest, format] in &tokens_of_other_systems()? {
        let call = format!(
            "select tollgate.import_api_token('moved', 'n', {digest}, '{{posts:read}}', format => $2)"
        );
        let bytes = plaintext.as_bytes();
        let id: Uuid = owner.query_one(&call, &[stored, format]).await?.get(0);
        let row = "select token_hash = sha256($2), foreign_format from tollgate.api_tokens where id = $1";
        let state = async || -> Result<(bool, Option<String>)> {
            let row = owner.query_one(row, &[&id, &bytes]).await?;
            Ok((row.get(0), row.get(1)))
        };
        let foreign = format != "sha256";
        let before = if foreign { (false, Some(format.clone())) } else { (true, None) };
        assert_eq!(state().await?, before);
        assert_eq!(code(owner, plaintext).await?, "MALFORMED", "{format}");
        record(owner).await?;
        assert_eq!(state().await?, before, "{format}: it was not used");

        // Every way to use it recognises it, in a read-only transaction.
        accepting.batch_execute("begin read only").await?;
        assert_eq!(code(&accepting, plaintext).await?, "VALID", "{format}");
        authenticate(&accepting, plaintext).await?;
        accepting.batch_execute("commit").await?;
        assert_eq!(state().await?, before, "{format}: a verification writes nothing");
        record(owner).await?;
        assert_eq!(state().await?, (true, None), "{format}");
        assert_eq!(code(&accepting, plaintext).await?, "VALID", "{format}");
        let left: i64 =
            value(owner, &format!("select count(*) from tollgate.found() where token_id = '{id}'")).await?;
        assert_eq!(left, 0, "{format}");

        // It is not imported a second time, used or not.
        refused(owner.query_one(&call, &[stored, format]).await, &SqlState::UNIQUE_VIOLATION);
        assert!(common::revoke(owner, id).await?);
        assert_eq!(code(&accepting, plaintext).await?, "REVOKED", "{format}");
        refused(owner.query_one(&call, &[stored, format]).await, &SqlState::UNIQUE_VIOLATION);
    }
    Ok(())
}

#[tokio::test]
async fn a_token_that_was_imported_in_two_forms_is_one_token_and_the_other_row_ends_at_once() -> Result<()> {
    let world = SHARED.world().await?;
    let World { owner, .. } = &world;
    let accepting = accepting(&world).await?;
    let call = "select tollgate.import_api_token('twice', 'n', sha512('twofold'), format => 'sha512')";
    let foreign: Uuid = value(owner, call).await?;
    assert_eq!(code(&accepting, "twofold").await?, "VALID");
    let own: Uuid = value(owner, "select tollgate.import_api_token('twice', 'n', sha256('twofold'))").await?;
    owner.batch_execute("select tollgate.apply_findings()").await?;
    let events = history(owner, foreign).await?;
    let (event, detail) = events.last().cloned().unwrap_or_default();
    assert_eq!(
        (event.as_str(), &detail["reason"], &detail["same_as"]),
        ("token.revoked", &json!("imported twice"), &json!(own))
    );
    // It is freed, and not tried again.
    owner.batch_execute("select tollgate.apply_findings()").await?;
    let left = format!("select count(*) from tollgate.found() where token_id = '{foreign}'");
    assert_eq!(value::<i64>(owner, &left).await?, 0);
    assert_eq!(history(owner, foreign).await?.len(), events.len());
    assert_eq!(code(&accepting, "twofold").await?, "VALID");
    // Nor does it come back when the other is revoked and purged.
    assert!(common::revoke(owner, own).await?);
    owner.execute("delete from tollgate.api_tokens where id = $1", &[&own]).await?;
    assert_eq!(code(&accepting, "twofold").await?, "REVOKED");
    Ok(())
}

#[tokio::test]
async fn a_token_in_a_foreign_format_works_like_any_other_before_its_first_use() -> Result<()> {
    let world = SHARED.world().await?;
    let World { owner, .. } = &world;
    let accepting = accepting(&world).await?;
    let call =
        "select tollgate.import_api_token('early', 'n', sha512('early'), '{posts:read}', format => 'sha512')";
    let id: Uuid = value(owner, call).await?;
    let child: String = value(
        &accepting,
        "select (tollgate.derive_api_token('early', 'child', '{posts:read}', '1 day')).token",
    )
    .await?;
    assert_eq!(code(owner, &child).await?, "VALID");
    let successor = rotate(owner, id, "0").await?;
    assert_eq!(code(owner, &successor.token).await?, "VALID");
    assert_eq!(code(&accepting, "early").await?, "EXPIRED");
    Ok(())
}

#[tokio::test]
async fn a_stolen_table_of_digests_gives_no_access_and_every_guess_counts() -> Result<()> {
    let world = SHARED.world().await?;
    let World { owner, .. } = &world;
    let accepting = accepting(&world).await?;
    accepting
        .batch_execute(
            "set tollgate.failure_rate_limit = 6; set tollgate.failure_rate_window = '1h';
             select tollgate.import_api_token('robbed', 'n', sha512('robbed'), format => 'sha512');
             select tollgate.import_api_token('robbed', 'n', sha256('robbed too'), format => 'sanctum')",
        )
        .await?;
    let hex: String = value(owner, "select encode(sha512('robbed'), 'hex')").await?;
    let other: String = value(owner, "select encode(sha256('robbed too'), 'hex')").await?;
    let guesses = [
        hex.clone(),
        other.clone(),
        format!("1|{other}"),
        format!("sha512:{hex}"),
        "robbed too".into(),
        "|robbed too".into(),
    ];
    for guess in &guesses {
        let refused = common::Request::of(guess).coming_from("192.0.2.77").code(&accepting).await?;
        assert_eq!(refused, "NOT_FOUND", "{guess}");
    }
    let blocked = common::Request::of("robbed").coming_from("192.0.2.77").code(&accepting).await?;
    assert_eq!(blocked, "RATE_LIMITED");
    assert_eq!(code(&accepting, "robbed").await?, "VALID");
    // Nor by its digest: that of the whole token is not known yet, and no other is valid.
    for digest in
        ["sha256(sha512('robbed'))", "sha256('sha512'::bytea || '\\x00'::bytea || sha512('robbed'))"]
    {
        let call = format!("select code from tollgate.verify_api_token_hash({digest})");
        assert_eq!(value::<String>(owner, &call).await?, "NOT_FOUND", "{digest}");
    }
    Ok(())
}

#[tokio::test]
async fn more_tokens_than_fit_into_memory_get_their_digests_when_used_again() -> Result<()> {
    const TOKENS: i64 = 1200;
    let cluster = common::start(Cluster::builder())?;
    let owner = cluster.connect("postgres", DATABASE).await?;
    owner
        .batch_execute(&format!(
            "set tollgate.accept_foreign_tokens = on;
             select count(tollgate.import_api_token('crowd', 'n', sha512(convert_to('crowd ' || n, 'UTF8')), format => 'sha512'))
               from generate_series(1, {TOKENS}) n"
        ))
        .await?;
    let use_all = format!(
        "select count(*) filter (where (tollgate.verify_api_token('crowd ' || n)).valid) from generate_series(1, {TOKENS}) n"
    );
    let waiting = "select count(*) from tollgate.api_tokens where foreign_format is not null";
    let mut before = TOKENS;
    for _ in 0..20 {
        assert_eq!(
            value::<i64>(&owner, &use_all).await?,
            TOKENS,
            "each is found, with a digest of its own or without"
        );
        let found: i64 = value(&owner, "select count(*) from tollgate.found()").await?;
        assert!((1..=512).contains(&found), "{found}");
        let taken: i64 = value(&owner, "select tollgate.apply_findings()").await?;
        assert_eq!(taken, found);
        // Frees them.
        owner.batch_execute("select tollgate.apply_findings()").await?;
        let now: i64 = value(&owner, waiting).await?;
        assert_eq!(now, before - taken);
        if now == 0 {
            return Ok(());
        }
        before = now;
    }
    panic!("{before} tokens still have no digest")
}

#[tokio::test]
async fn the_data_of_the_other_system_is_imported() -> Result<()> {
    let world = SHARED.world().await?;
    let World { owner, .. } = &world;
    let accepting = accepting(&world).await?;
    let import = async |name: &str, arguments: &str| -> Result<Uuid> {
        let call = format!(
            "select tollgate.import_api_token('known', '{name}', sha256('known {name}'), created_at => '2021-02-03 04:05Z',
                 last_used_at => '2024-05-06 07:08Z', {arguments})"
        );
        value(owner, &call).await
    };
    for (name, arguments, status, expected) in [
        ("live", "expires_in => '30 days'", "active", "VALID"),
        ("over", "expires_at => '2023-01-02 03:04Z'", "expired", "EXPIRED"),
        ("off", "disabled_at => '2023-01-02 03:04Z'", "disabled", "DISABLED"),
        ("gone", "revoked_at => '2023-01-02 03:04Z', expires_at => '2022-01-01Z'", "revoked", "REVOKED"),
    ] {
        let id = import(name, arguments).await?;
        let shown = owner
            .query_one(
                "select status, created_at = '2021-02-03 04:05Z', last_used_at = '2024-05-06 07:08Z', use_count
                   from tollgate.tokens where id = $1",
                &[&id],
            )
            .await?;
        assert_eq!(
            (
                shown.get::<_, &str>(0),
                shown.get::<_, bool>(1),
                shown.get::<_, bool>(2),
                shown.get::<_, i64>(3)
            ),
            (status, true, true, 0),
            "{name}"
        );
        assert_eq!(code(&accepting, &format!("known {name}")).await?, expected, "{name}");
        owner.batch_execute("select tollgate.expire_tokens(1000)").await?;
        let log = history(owner, id).await?;
        let events: Vec<&str> = log.iter().map(|(event, _)| event.as_str()).collect();
        assert_eq!(events, ["token.imported"], "{name}: what happened elsewhere is no news");
        assert_eq!(log[0].1.get("format"), None);
        assert!(
            log[0].1["created_at"].as_str().is_some_and(|at| at.starts_with("2021-02-03T")),
            "{:?}",
            log[0].1
        );
    }
    // Ended tokens do not count towards their user's maximum, and their lifetimes are not limited.
    let capped = world.cluster.connect("postgres", DATABASE).await?;
    capped
        .batch_execute("set tollgate.max_tokens_per_user = 1; set tollgate.max_token_lifetime = '1d'")
        .await?;
    for n in 0..3 {
        let call = format!(
            "select tollgate.import_api_token('capped', 'n', sha256('capped {n}'), revoked_at => '2023-01-02Z')"
        );
        capped.batch_execute(&call).await?;
    }
    for (argument, bad) in [
        ("created_at", "now() + interval '1 hour'"),
        ("last_used_at", "'infinity'"),
        ("disabled_at", "'-infinity'"),
        ("revoked_at", "'1066-10-14'"),
        ("expires_at", "'-infinity'"),
        ("expires_at", "'infinity'"),
        ("expires_at", "now() - interval '1 day', expires_in => '1 day'"),
    ] {
        let call =
            format!("select tollgate.import_api_token('known', 'n', sha256('never'), {argument} => {bad})");
        let error = refused(owner.batch_execute(&call).await, &SqlState::INVALID_PARAMETER_VALUE);
        assert!(error.detail().is_some_and(|detail| detail.contains(argument)), "{call}: {error:?}");
    }
    Ok(())
}

#[tokio::test]
async fn an_unsupported_format_is_refused_with_a_hint() -> Result<()> {
    let World { owner, cluster: _cluster, .. } = SHARED.world().await?;
    for format in ["'bcrypt'", "'pbkdf2'", "'gitea'", "'gitlab'", "'SHA256'", "''", "null"] {
        let call = format!("select tollgate.import_api_token('n', 'n', sha256('n'), format => {format})");
        let error = refused(owner.batch_execute(&call).await, &SqlState::INVALID_PARAMETER_VALUE);
        assert!(error.detail().is_some_and(|detail| detail.starts_with("Argument: format")), "{error:?}");
        assert!(error.hint().is_some_and(|hint| hint.contains("next presented")), "{error:?}");
    }
    for (format, digest) in [("sha512", "sha256('n')"), ("sanctum", "sha512('n')"), ("sha512-of-hex", "''")] {
        let call = format!("select tollgate.import_api_token('n', 'n', {digest}, format => '{format}')");
        let error = refused(owner.batch_execute(&call).await, &SqlState::INVALID_PARAMETER_VALUE);
        assert!(error.detail().is_some_and(|detail| detail.starts_with("Argument: token_hash")), "{error:?}");
    }
    Ok(())
}

#[tokio::test]
async fn an_imported_token_is_like_any_other() -> Result<()> {
    let World { owner, web, cluster } = SHARED.world().await?;
    // A token in our own format, of another database, needs no setting.
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

    // Its successor has our format.
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
