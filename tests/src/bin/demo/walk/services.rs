//! The step with a service account: a CI job that swaps its platform's token for one of ours, without any secret.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use tollgate_core::jws;
use tollgate_core::signature::{Algorithm, SigningKey};
use uuid::Uuid;

use super::{AUTHENTICATE, POSTS, READ, WRITE, Walk, current_user, visible_posts};

const CREATE: &str = "select tollgate.create_service_account($1, name => 'The nightly report', scopes => $2)";
const TRUST: &str = "select tollgate.trust_issuer($1, user_prefix => $2, audience => $3, jwks => $4)";
const TRUST_WORKLOAD: &str = "select tollgate.trust_workload($1, issuer => $2, conditions => $3)";
const SWAP: &str = "select * from tollgate.client_credentials($1, assertion => $2, scopes => $3)";
const DISABLE: &str = "select tollgate.disable_service_account($1, reason => $2)";
const VERIFY: &str = "select code from tollgate.verify_access_token($1)";

/// app.sql deletes it, and ends the trust in an issuer with this prefix, that an earlier run left.
const ACCOUNT: &str = "demo-report";
const PREFIX: &str = "demo-ci:";

/// A token of the platform, for a job of a repository.
fn job(key: &SigningKey, issuer: &str, audience: &str, repository: &str) -> Result<String> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    let claims = json!({
        "iss": issuer, "sub": "repo:acme/reports:ref:refs/heads/main", "aud": audience, "exp": now + 600, "iat": now,
        "jti": Uuid::new_v4().to_string(), "repository_id": repository, "ref": "refs/heads/main",
    });
    Ok(jws::sign(key, "ci-1", "JWT", &claims.to_string())?)
}

impl Walk<'_> {
    pub(super) async fn service_account(&mut self) -> Result<()> {
        self.report.step(
            "A service account: a CI job gets our token for its platform's, and keeps no secret",
            &[CREATE, TRUST_WORKLOAD, SWAP, AUTHENTICATE, POSTS, DISABLE],
        );
        let issuer = format!("https://{}.example.com", Uuid::new_v4().simple());
        let audience: String =
            self.owner.query_one("select current_setting('tollgate.audience')", &[]).await?.get(0);
        let key = SigningKey::generate(Algorithm::Es256)?;
        let jwk: Value = serde_json::from_str(&key.public_key().to_jwk("ci-1"))?;
        self.owner.execute(CREATE, &[&ACCOUNT, &vec![READ]]).await?;
        self.owner
            .execute(TRUST, &[&issuer, &PREFIX, &vec![audience.as_str()], &json!({ "keys": [jwk] })])
            .await?;
        let conditions = json!({"repository_id": "74", "ref": "refs/heads/main"});
        self.owner.execute(TRUST_WORKLOAD, &[&ACCOUNT, &issuer, &conditions]).await?;

        let (good, other) = (job(&key, &issuer, &audience, "74")?, job(&key, &issuer, &audience, "75")?);
        let (code, token) = self.swap(&good, None).await?;
        self.report.check("a job of the repository", "VALID", code);
        let token = token.context("an access token")?;
        let (code, _) = self.swap(&other, None).await?;
        self.report.check("a job of another repository: it does not learn why", "INVALID_CLIENT", code);
        let (code, _) = self.swap(&good, Some(&[WRITE])).await?;
        self.report.check(&format!("the first asks for {WRITE}"), "INSUFFICIENT_SCOPE", code);

        let expected = self.posts_for(&format!("service:{ACCOUNT}")).await?;
        let transaction = self.app.transaction().await?;
        transaction.query_one(AUTHENTICATE, &[&token]).await?;
        let (user, seen) = (current_user(&transaction).await?, visible_posts(&transaction).await?);
        transaction.commit().await?;
        self.report.check("authenticated with it: who it is", format!("service:{ACCOUNT}"), user);
        self.report.check("the posts it sees", expected, seen);

        let disabled: bool = self.owner.query_one(DISABLE, &[&ACCOUNT, &"the end of the demo"]).await?.get(0);
        self.report.check("the account is disabled", true, disabled);
        let code: String = self.app.query_one(VERIFY, &[&token]).await?.get(0);
        self.report.check("its access token, at once", "REVOKED", code);
        Ok(())
    }

    async fn swap(&self, job: &str, scopes: Option<&[&str]>) -> Result<(String, Option<String>)> {
        let row = self.issuer.query_one(SWAP, &[&ACCOUNT, &job, &scopes]).await?;
        Ok((row.try_get("code")?, row.try_get("access_token")?))
    }
}
