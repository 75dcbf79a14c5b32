//! `/auth`, as reverse proxies ask it: whether a request may pass, and as whom.

use anyhow::Result;

use crate::common::gateway::{Api, access_token, sign};
use crate::common::{Shared, issue};
use crate::operator::Db;
use crate::web::Answer;

static SHARED: Shared = Shared::new(&[]);

const IDENTITY: [&str; 5] = [
    "x-tollgate-user",
    "x-tollgate-token-id",
    "x-tollgate-scopes",
    "x-tollgate-session",
    "x-tollgate-issuer",
];

async fn api(name: &str, arguments: &[&str]) -> Result<(Db, Api)> {
    let db = Db::create(&SHARED.cluster()?, name).await?;
    sign(&db.owner).await?;
    let api = Api::start(&db, arguments).await?;
    Ok((db, api))
}

/// The status and the identity that is passed on.
fn outcome(answer: &Answer) -> (u16, Vec<&str>) {
    let identity = IDENTITY.iter().filter_map(|name| answer.headers.get(*name)).map(String::as_str).collect();
    (answer.status, identity)
}

#[tokio::test]
async fn a_credential_passes_as_its_user_and_nothing_passes_without_one() -> Result<()> {
    let (db, api) = api("auth", &[]).await?;
    let token = issue(&db.owner, "ann, é%", &["posts:*", "users:read"]).await?;
    let id = token.id.to_string();
    let passed = api.get_as(&token.token, "/auth?scope=posts:read").await?;
    assert_eq!(outcome(&passed), (200, vec!["ann%2C%20%C3%A9%25", &id, "posts:*,users:read", "", ""]));
    assert_eq!((passed.body.as_str(), passed.header("cache-control")), ("", "no-store"));
    for header in [format!("X-API-Token: {}", token.token), format!("x-api-key: {}", token.token)] {
        assert_eq!(outcome(&api.get("/auth", &[&header]).await?).0, 200);
    }

    let access = access_token(&db.owner, "ben", &["posts:read"]).await?;
    let passed = api.get_as(&access, "/auth").await?;
    assert_eq!((passed.status, passed.header("x-tollgate-user")), (200, "ben"));
    assert_eq!(passed.header("x-tollgate-issuer"), "https://tollgate.test");

    let nothing = api.get("/auth?scope=posts:read", &[]).await?;
    assert_eq!(outcome(&nothing), (401, vec![]));
    assert_eq!(nothing.header("www-authenticate"), "Bearer scope=\"posts:read\"");
    Ok(())
}
