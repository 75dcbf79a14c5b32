//! The step with services that call each other for a user: A, B and C.

use anyhow::{Context as _, Result};
use serde_json::Value;
use tokio_postgres::Client;

use super::{
    ANN, AUTHENTICATE, POSTS, READ, Request, WRITE, Walk, answer_to, current_user, requiring, visible_posts,
};

const EXCHANGE: &str = "select * from tollgate.exchange_token($1, scopes => $2, actor_token => $3,
    actor_token_type => 'urn:ietf:params:oauth:token-type:access_token')";
const ACTOR: &str = "select tollgate.current_actor()";
const INTROSPECT: &str = "select tollgate.introspect_token($1)";
const REVOKE_ANY: &str = "select tollgate.revoke_token($1, reason => $2)";
const VERIFY_SIGNED: &str =
    "select * from tollgate.verify_access_token($1, required_scopes => $2, client_ip => $3)";

/// The code, and the token if there is one.
async fn exchange(
    client: &Client,
    subject: &str,
    scopes: &[&str],
    actor: &str,
) -> Result<(String, Option<String>)> {
    let row = client.query_one(EXCHANGE, &[&subject, &scopes, &actor]).await?;
    Ok((row.try_get("code")?, row.try_get("access_token")?))
}

impl Walk<'_> {
    pub(super) async fn call_for_a_user(&mut self) -> Result<()> {
        self.report.step(
            "On behalf of a user: A calls B, which calls C, each with a token that it got in exchange",
            &[EXCHANGE, AUTHENTICATE, ACTOR, POSTS, INTROSPECT, REVOKE_ANY],
        );
        let user = self.create(ANN, "for A", &["demo:posts:*"], None, None).await?;
        let a = self.create("demo:service-a", "of A", &[], None, None).await?;
        let b = self.create("demo:service-b", "of B", &[], None, None).await?;

        let (code, for_b) = exchange(&self.issuer, &user.secret, &[READ, WRITE], &a.secret).await?;
        self.report.check("A exchanges Ann's token, for B", "VALID", &code);
        let for_b = for_b.with_context(|| format!("an exchange came back as {code}"))?;
        let (code, for_c) = exchange(&self.issuer, &for_b, &[READ], &b.secret).await?;
        self.report.check("B exchanges that one, for C", "VALID", &code);
        let for_c = for_c.with_context(|| format!("an exchange came back as {code}"))?;
        let (code, _) = exchange(&self.issuer, &for_c, &[WRITE], &b.secret).await?;
        self.report.check("B asks for more than it has", "INSUFFICIENT_SCOPE", code);

        let expected = self.posts_for(ANN).await?;
        let transaction = self.app.transaction().await?;
        transaction.query_one(AUTHENTICATE, &[&for_c]).await?;
        let (whose, seen) = (current_user(&transaction).await?, visible_posts(&transaction).await?);
        let actor: Value = transaction.query_one(ACTOR, &[]).await?.get(0);
        transaction.commit().await?;
        let name = |actor: &Value| actor["sub"].as_str().unwrap_or("no one").to_owned();
        self.report.check("C: for whom it is", ANN, whose);
        self.report.check("who acts", "demo:service-b", name(&actor));
        self.report.check("who acted before", "demo:service-a", name(&actor["act"]));
        self.report.check("the posts it sees", expected, seen);
        let (came, _) = answer_to(&self.app, VERIFY_SIGNED, &for_c, &requiring(&[WRITE])).await?;
        self.report.check(&format!("needs {WRITE}, which B did not ask for"), "INSUFFICIENT_SCOPE", came);

        let active = |answer: &Value| if answer["active"] == true { "active" } else { "inactive" };
        let answer: Value = self.app.query_one(INTROSPECT, &[&for_c]).await?.get(0);
        self.report.check("introspected", "active", active(&answer));
        self.app.execute(REVOKE_ANY, &[&user.secret, &"lost"]).await?;
        let (came, _) = answer_to(&self.app, VERIFY_SIGNED, &for_c, &Request::default()).await?;
        self.report.check("Ann's token is revoked: C's, at once", "REVOKED", came);
        let answer: Value = self.app.query_one(INTROSPECT, &[&for_c]).await?.get(0);
        self.report.check("introspected again", "inactive", active(&answer));
        Ok(())
    }
}
