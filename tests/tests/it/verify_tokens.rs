//! Credentials that are verified together, as the HTTP API does it: each as if it were alone.

use anyhow::Result;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use crate::common::gateway::{self, GATEWAY};
use crate::common::{Shared, Token, issue, issue_with, refused, revoke, value};
use crate::operator::{Db, drain};

static SHARED: Shared = Shared::new(&[]);

const AUDIENCE: &str = "https://api.test";

/// A database with a signing key, and the connection of a gateway.
async fn db(name: &str) -> Result<(Db, Client)> {
    let db = Db::create(&SHARED.cluster()?, name).await?;
    gateway::grant(&db.cluster, name)?;
    db.owner.batch_execute("select tollgate.create_signing_key('ES256', '0')").await?;
    let gateway = db.session(GATEWAY).await?;
    Ok((db, gateway))
}

/// Of each token, in their order, the code and the user.
async fn verify(
    client: &Client,
    tokens: &[Option<&str>],
    more: &str,
) -> Result<Vec<(String, Option<String>)>> {
    let sql = format!("select code, user_id from tollgate.verify_tokens($1{more})");
    Ok(client.query(&sql, &[&tokens]).await?.iter().map(|row| (row.get(0), row.get(1))).collect())
}

fn of(code: &str, user: Option<&str>) -> (String, Option<String>) {
    (code.to_owned(), user.map(str::to_owned))
}

async fn signed(db: &Db, user: &str, audience: &str) -> Result<String> {
    value(
        &db.owner,
        &format!("select access_token from tollgate.issue_access_token('{user}', '{{posts:read}}', '{{{audience}}}')"),
    )
    .await
}

#[tokio::test]
async fn each_of_a_batch_is_judged_by_what_belongs_to_it_and_in_its_place() -> Result<()> {
    let (db, gateway) = db("batch").await?;
    let ann = issue(&db.owner, "ann", &["posts:*"]).await?;
    let ben =
        issue_with(&db.owner, "ben", "scopes => '{users:read}', allowed_ips => '{192.0.2.0/24}'").await?;
    let gone = issue(&db.owner, "cid", &[]).await?;
    revoke(&db.owner, gone.id).await?;
    let (here, there) =
        (signed(&db, "dan", AUDIENCE).await?, signed(&db, "eve", "https://other.test").await?);
    let forged = here.replace("eyJ", "eyK");
    let tokens = [
        Some(ann.token.as_str()),
        Some(&ann.token),
        Some(&ben.token),
        Some(&ben.token),
        Some(&gone.token),
        Some(&here),
        Some(&there),
        Some(&there),
        Some("junk"),
        Some(""),
        None,
        Some(&forged),
        Some(&ann.token),
    ];
    let more = ", array['posts:read posts:write', 'users:read', 'users:read', null, null, 'posts:read', null, null, null, null, null, null, ''],
        array[null, '10.0.0.1', '192.0.2.7', '192.0.3.7', null, null, null, null, null, null, null, null, null]::inet[],
        array[null, null, null, null, null, null, null, 'https://other.test', null, null, null, null, null]";
    let expected = [
        of("VALID", Some("ann")),
        of("INSUFFICIENT_SCOPE", None),
        of("VALID", Some("ben")),
        of("IP_NOT_ALLOWED", None),
        of("REVOKED", None),
        of("VALID", Some("dan")),
        of("WRONG_AUDIENCE", None),
        of("VALID", Some("eve")),
        of("MALFORMED", None),
        of("MALFORMED", None),
        of("MALFORMED", None),
        of("MALFORMED", None),
        of("VALID", Some("ann")),
    ];
    assert_eq!(verify(&gateway, &tokens, more).await?, expected);
    // An entry for each, or none at all.
    let valid: Vec<_> = verify(&gateway, &tokens[..2], "").await?;
    assert_eq!(valid, [of("VALID", Some("ann")), of("VALID", Some("ann"))]);
    assert_eq!(verify(&gateway, &[], "").await?, []);
    assert_eq!(value::<i64>(&gateway, "select count(*) from tollgate.verify_tokens(null)").await?, 0);
    Ok(())
}

#[tokio::test]
async fn each_of_a_batch_is_counted_and_limited_once() -> Result<()> {
    let (db, gateway) = db("batch_counts").await?;
    let token = issue(&db.owner, "ann", &["posts:read"]).await?;
    let slow = issue_with(&db.owner, "ben", "rate_limit => 2, rate_window => '1 day'").await?;
    let (fast, slow_token) = (Some(token.token.as_str()), Some(slow.token.as_str()));
    let tokens = [fast, slow_token, fast, slow_token, Some("junk"), slow_token, fast];
    let codes: Vec<String> = verify(&gateway, &tokens, "").await?.into_iter().map(|(code, _)| code).collect();
    assert_eq!(codes, ["VALID", "VALID", "VALID", "VALID", "MALFORMED", "RATE_LIMITED", "VALID"]);
    let drained = drain(&db.operator).await?.expect("uses");
    assert_eq!((drained.counts(token.id), drained.counts(slow.id)), ((3, 0), (2, 1)));
    Ok(())
}

#[tokio::test]
async fn a_batch_with_too_many_or_too_few_entries_is_an_error_of_its_own() -> Result<()> {
    let (db, gateway) = db("batch_sizes").await?;
    for (call, argument) in [
        ("array['a', 'b'], array['posts:read']", "required_scopes"),
        ("array['a'], null, array['10.0.0.1', '10.0.0.2']::inet[]", "client_ips"),
        ("array['a'], null, null, '{}'", "audiences"),
        ("array_fill('a'::text, '{1001}')", "tokens"),
    ] {
        let refusal = refused(
            gateway.query(&format!("select * from tollgate.verify_tokens({call})"), &[]).await,
            &SqlState::INVALID_PARAMETER_VALUE,
        );
        assert!(refusal.detail().is_some_and(|detail| detail.contains(argument)), "{call}: {refusal:?}");
    }
    let most = "select count(*) from tollgate.verify_tokens(array_fill('a'::text, '{1000}'))";
    assert_eq!(value::<i64>(&gateway, most).await?, 1000);
    drop(db);
    Ok(())
}

#[tokio::test]
async fn a_login_that_guesses_under_many_addresses_is_stopped_but_not_what_cannot_be_guessed() -> Result<()> {
    let (db, _) = db("guesses").await?;
    db.owner
        .batch_execute(
            "alter database guesses set tollgate.accept_foreign_tokens = on;
             alter database guesses set tollgate.gateway_failure_rate_limit = 5;
             alter database guesses set tollgate.failure_rate_window = '1d';
             select tollgate.import_api_token('fay', 'old', sha256('a key of another system'))",
        )
        .await?;
    let own = issue(&db.owner, "ann", &[]).await?;
    let (gateway, web) = (db.session(GATEWAY).await?, db.session("web").await?);
    let code = async |client: &Client, token: &str, n: u8| -> Result<String> {
        let sql = "select code from tollgate.verify_tokens(array[$1], null, array[$2::text::inet])";
        Ok(client.query_one(sql, &[&token, &format!("192.0.2.{n}")]).await?.get(0))
    };
    let imported = "a key of another system";
    for n in 1..=5 {
        assert_eq!(code(&gateway, imported, n).await?, "VALID");
        assert_eq!(code(&gateway, "a guess", n).await?, "NOT_FOUND");
    }
    // Each from an address of its own.
    assert_eq!(code(&gateway, "a guess", 6).await?, "RATE_LIMITED");
    assert_eq!(code(&gateway, imported, 7).await?, "RATE_LIMITED", "a right guess does not show");
    assert_eq!(code(&gateway, &own.token, 8).await?, "VALID", "what cannot be guessed is accepted");
    let signed = signed(&db, "dan", AUDIENCE).await?;
    assert_eq!(code(&gateway, &signed, 9).await?, "VALID");
    // Another login, which is no gateway, has guesses of its own.
    assert_eq!(crate::common::code(&web, imported).await?, "VALID");
    for _ in 0..6 {
        assert_eq!(crate::common::code(&web, "a guess").await?, "NOT_FOUND");
    }
    Ok(())
}

#[tokio::test]
async fn a_function_that_acts_for_a_credential_has_its_identity_and_needs_its_scope() -> Result<()> {
    let (db, gateway) = db("acting").await?;
    // As the functions of the gateway are: definer functions whose first step it is.
    db.owner
        .batch_execute(
            "create function tollgate.act_in_a_test(credential text, scope text) returns text language plpgsql security definer
                 set search_path = pg_catalog, pg_temp as $$
             begin
                 perform tollgate.act_for($1, $2, '192.0.2.1');
                 return concat_ws(' ', tollgate.current_user_id(), tollgate.current_scopes(), tollgate.token_has_scope($2));
             end $$;
             grant execute on function tollgate.act_in_a_test to gateway_login",
        )
        .await?;
    let act = async |credential: Option<&str>, scope: &str| -> Result<String, tokio_postgres::Error> {
        let row = gateway.query_one("select tollgate.act_in_a_test($1, $2)", &[&credential, &scope]).await?;
        Ok(row.get(0))
    };
    let token = issue(&db.owner, "ann", &["posts:read"]).await?;
    assert_eq!(act(Some(&token.token), "posts:read").await?, "ann {posts:read} t");
    let access = signed(&db, "ben", AUDIENCE).await?;
    assert_eq!(act(Some(&access), "posts:read").await?, "ben {posts:read} t");
    let refusal =
        refused(act(Some(&token.token), "tollgate:tokens").await, &SqlState::INSUFFICIENT_PRIVILEGE);
    assert_eq!(
        refusal.detail(),
        Some(r#"{"code":"INSUFFICIENT_SCOPE","missing_scopes":["tollgate:tokens"]}"#)
    );
    for nothing in [None, Some(""), Some("junk")] {
        refused(act(nothing, "posts:read").await, &SqlState::INVALID_AUTHORIZATION_SPECIFICATION);
    }
    revoke(&db.owner, token.id).await?;
    refused(act(Some(&token.token), "posts:read").await, &SqlState::INVALID_AUTHORIZATION_SPECIFICATION);
    // Nothing of it is left for the next statement.
    assert_eq!(value::<Option<String>>(&gateway, "select tollgate.current_user_id()").await?, None);
    // A second caller in one transaction is refused, as for authenticate.
    let other: Token = issue(&db.owner, "cid", &["posts:read"]).await?;
    gateway.batch_execute("begin").await?;
    act(Some(&access), "posts:read").await?;
    refused(act(Some(&other.token), "posts:read").await, &SqlState::ACTIVE_SQL_TRANSACTION);
    gateway.batch_execute("rollback").await?;
    // It is not the gateway's to call.
    refused(
        gateway.query("select tollgate.act_for($1, 'posts:read', null)", &[&access]).await,
        &SqlState::INSUFFICIENT_PRIVILEGE,
    );
    Ok(())
}
