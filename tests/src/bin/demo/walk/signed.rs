//! The steps with signed tokens: a login, its refresh, a theft, a key that is withdrawn, and another issuer.

use std::net::IpAddr;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use tokio_postgres::{Client, GenericClient};
use tollgate_core::jws;
use tollgate_core::signature::{Algorithm, PublicKey, SigningKey};
use uuid::Uuid;

use super::{
    ANN, AUTHENTICATE, BEN, CLIENT, EVENT_DEADLINE, MODERATE, POSTS, READ, Request, STRANGER, WRITE,
    WRITE_POST, Walk, answer_to, current_user, outcome, posts, requiring, visible_posts,
};
use crate::tail::Tail;

const OPEN: &str = "select * from tollgate.open_session(user_id => $1, scopes => $2, client_id => 'web',
    label => $3, client_ip => $4)";
const REFRESH: &str = "select * from tollgate.refresh_session($1, client_id => 'web', client_ip => $2)";
const VERIFY: &str = "select * from tollgate.verify_access_token($1, required_scopes => $2, client_ip => $3)";
const LOG_OUT: &str = "select tollgate.revoke_session($1, user_id => $2, reason => $3)";
const ROTATE: &str = "select tollgate.rotate_signing_key(signs_in => '0')";
const WITHDRAW: &str = "select tollgate.withdraw_signing_key($1, reason => $2)";
const TRUST: &str = "select tollgate.trust_issuer($1, user_prefix => $2, audience => $3, jwks => $4,
    scopes => '{demo:posts:read}')";
const DISTRUST: &str = "select tollgate.distrust_issuer($1, reason => $2)";

/// Of the users of the other issuer: app.sql ends the trust in one that an earlier run left.
const PREFIX: &str = "demo-idp:";

/// What a session gives its client, at its opening and at each refresh.
struct Session {
    id: Uuid,
    access: String,
    refresh: String,
}

async fn open(client: &Client, user: &str, scopes: &[&str], label: &str) -> Result<Session> {
    let row = client.query_one(OPEN, &[&user, &scopes, &label, &CLIENT]).await?;
    Ok(Session {
        id: row.try_get("session_id")?,
        access: row.try_get("access_token")?,
        refresh: row.try_get("refresh_token")?,
    })
}

/// The code; and the session with its next tokens, if there are any.
async fn refresh(client: &Client, token: &str, from: IpAddr) -> Result<(String, Option<Session>)> {
    let row = client.query_one(REFRESH, &[&token, &from]).await?;
    let code: String = row.try_get("code")?;
    let next = match row.try_get::<_, Option<String>>("refresh_token")? {
        Some(refresh) => {
            Some(Session { id: row.try_get("session_id")?, access: row.try_get("access_token")?, refresh })
        }
        None => None,
    };
    Ok((code, next))
}

async fn verified(client: &impl GenericClient, token: &str, request: &Request<'_>) -> Result<String> {
    Ok(answer_to(client, VERIFY, token, request).await?.1)
}

/// What a service finds that has nothing but the published keys.
fn checked_by(jwks: &Value, token: &str) -> Result<&'static str> {
    let parsed = jws::parse(token)?;
    let kid = parsed.header.kid.as_deref().context("our tokens name their key")?;
    let published = jwks["keys"].as_array().into_iter().flatten().find(|jwk| jwk["kid"] == kid);
    let key = PublicKey::from_jwk(&published.context("its key is published")?.to_string())?;
    Ok(if parsed.is_signed_by(&key) { "signed by our key" } else { "not signed by our key" })
}

/// A token of the other issuer, for its user ann, with more scopes than the issuer may give here.
fn foreign(key: &SigningKey, kid: &str, issuer: &str, audience: &str) -> Result<String> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    let claims = json!({
        "iss": issuer, "sub": "ann", "aud": audience, "exp": now + 600, "iat": now,
        "jti": Uuid::new_v4().to_string(), "scope": format!("{READ} {WRITE} {MODERATE} admin"),
    });
    Ok(jws::sign(key, kid, "JWT", &claims.to_string())?)
}

impl Walk<'_> {
    pub(super) async fn sessions(&mut self, tail: &mut Tail) -> Result<()> {
        let first = self.log_in().await?;
        let second = self.refresh(&first).await?;
        self.steal(&first, &second, tail).await
    }

    async fn log_in(&mut self) -> Result<Session> {
        self.report.step(
            "Log in: a session, which is one row, with a signed access token and a refresh token",
            &["select tollgate.create_signing_key()", OPEN, VERIFY, AUTHENTICATE, POSTS],
        );
        let signing =
            "select count(*) from tollgate.signing_keys where purpose = 'access_token' and state = 'signing'";
        if self.owner.query_one(signing, &[]).await?.get::<_, i64>(0) == 0 {
            self.owner.execute("select tollgate.create_signing_key()", &[]).await?;
        }
        let session = open(&self.issuer, BEN, &[READ], "laptop").await?;

        let jwks: Value = self.owner.query_one("select tollgate.jwks()", &[]).await?.get(0);
        self.report.check(
            "a service that has jwks() and no database",
            "signed by our key",
            checked_by(&jwks, &session.access)?,
        );
        let came = verified(&self.app, &session.access, &Request::default()).await?;
        self.report.check("the application verifies it", "VALID, demo:ben", came);
        let came = verified(&self.app, &session.access, &requiring(&[WRITE])).await?;
        self.report.check(&format!("the same, needs {WRITE}"), "INSUFFICIENT_SCOPE", came);

        let expected = self.posts_for(BEN).await?;
        let transaction = self.app.transaction().await?;
        transaction.query_one(AUTHENTICATE, &[&session.access]).await?;
        let (user, seen) = (current_user(&transaction).await?, visible_posts(&transaction).await?);
        let id: Option<Uuid> =
            transaction.query_one("select tollgate.current_session_id()", &[]).await?.get(0);
        transaction.commit().await?;
        self.report.check("authenticated with it: who it is", BEN, user);
        self.report.check("the posts it sees", expected, seen);
        self.report.check("its session, as the policies may ask", true, id == Some(session.id));
        Ok(session)
    }

    /// What row-level security shows to a user who may read posts.
    pub(super) async fn posts_for(&self, user: &str) -> Result<String> {
        let readable = "select id from tollgate_demo.posts where published or author = $1 order by id";
        let rows = self.owner.query(readable, &[&user]).await?;
        Ok(posts(&rows.iter().map(|row| row.get(0)).collect::<Vec<i64>>()))
    }

    async fn refresh(&mut self, first: &Session) -> Result<Session> {
        self.report.step(
            "Refresh: the next tokens; asked again, the same ones, so no answer can get lost",
            &[REFRESH],
        );
        let (code, second) = refresh(&self.issuer, &first.refresh, CLIENT).await?;
        let second = second.with_context(|| format!("a refresh came back as {code}"))?;
        self.report.check("its client refreshes", "VALID", code);
        let (code, again) = refresh(&self.issuer, &first.refresh, CLIENT).await?;
        let same = again.is_some_and(|again| again.refresh == second.refresh);
        self.report.check(
            "the same again, since the answer was lost",
            "VALID, the same token",
            format!("{code}, {}", if same { "the same token" } else { "another token" }),
        );
        let came = verified(&self.app, &first.access, &Request::default()).await?;
        self.report.check("the earlier access token, until its end", "VALID, demo:ben", came);
        Ok(second)
    }

    async fn steal(&mut self, first: &Session, second: &Session, tail: &mut Tail) -> Result<()> {
        self.report.step(
            "Theft: an earlier refresh token, however old, ends the session, and the tokens that came of it since",
            &[REFRESH, "$ tollgated tail --follow"],
        );
        let (code, third) = refresh(&self.issuer, &second.refresh, CLIENT).await?;
        let third = third.with_context(|| format!("a refresh came back as {code}"))?;
        self.report.check("its client refreshes once more", "VALID", code);
        let (code, _) = refresh(&self.issuer, &first.refresh, STRANGER).await?;
        self.report.check(&format!("a thief refreshes, from {STRANGER}"), "REUSED", code);
        let (code, _) = refresh(&self.issuer, &third.refresh, CLIENT).await?;
        self.report.check("its client, with the latest refresh token", "REVOKED", code);
        let came = verified(&self.app, &third.access, &Request::default()).await?;
        self.report.check("the latest access token, at once", "REVOKED", came);

        let (event, line) = tail.event("session.reuse_detected", first.id, EVENT_DEADLINE).await?;
        let field = |name: &str| {
            let text = event["detail"][name].as_str().or(event[name].as_str()).unwrap_or("missing");
            text.split('/').next().unwrap_or_default().to_owned()
        };
        self.report.check("the event at tollgated tail: the thief's address", STRANGER, field("client_ip"));
        self.report.check("the client's address", CLIENT, field("last_address"));
        self.report.aside(line);
        Ok(())
    }

    pub(super) async fn withdraw_a_key(&mut self) -> Result<()> {
        self.report.step(
            "Keys: the next one signs, and one that leaked is withdrawn with all that it signed",
            &[ROTATE, WITHDRAW, LOG_OUT],
        );
        let session = open(&self.issuer, ANN, &["demo:posts:*"], "phone").await?;
        let kid = jws::parse(&session.access)?.header.kid.clone().context("our tokens name their key")?;
        self.owner.execute(ROTATE, &[]).await?;
        let came = verified(&self.app, &session.access, &Request::default()).await?;
        self.report.check("replaced: a token that the key signed", "VALID, demo:ann", came);
        let withdrawn: bool = self.owner.query_one(WITHDRAW, &[&kid, &"leaked"]).await?.get(0);
        self.report.check("the key is withdrawn", true, withdrawn);
        let came = verified(&self.app, &session.access, &Request::default()).await?;
        self.report.check("that token", "UNKNOWN_KEY", came);
        let (code, next) = refresh(&self.issuer, &session.refresh, CLIENT).await?;
        let next = next.with_context(|| format!("a refresh came back as {code}"))?;
        let came = verified(&self.app, &next.access, &Request::default()).await?;
        self.report.check("refreshed, by the next key", "VALID, demo:ann", came);

        let ended: bool = self.issuer.query_one(LOG_OUT, &[&session.id, &ANN, &"logged out"]).await?.get(0);
        self.report.check("the session is ended", true, ended);
        let came = verified(&self.app, &next.access, &Request::default()).await?;
        self.report.check("its access token, at once", "REVOKED", came);
        Ok(())
    }

    pub(super) async fn trust_another_issuer(&mut self) -> Result<()> {
        self.report.step(
            "Another issuer: its users by their own names, with what was granted and no more",
            &[TRUST, VERIFY, AUTHENTICATE, POSTS, WRITE_POST, DISTRUST],
        );
        // One of its own for each run: after the trust has ended, tokens that are not clearly newer stay refused.
        let issuer = format!("https://{}.example.com", Uuid::new_v4().simple());
        let audience: String =
            self.owner.query_one("select current_setting('tollgate.audience')", &[]).await?.get(0);
        let (key, attacker) =
            (SigningKey::generate(Algorithm::Es256)?, SigningKey::generate(Algorithm::Es256)?);
        let kid = key.public_key().thumbprint();
        let jwk: Value = serde_json::from_str(&key.public_key().to_jwk(&kid))?;
        let token = foreign(&key, &kid, &issuer, &audience)?;
        let came = verified(&self.app, &token, &Request::default()).await?;
        self.report.check("a token of an issuer that is not trusted", "UNTRUSTED_ISSUER", came);

        self.owner
            .execute(TRUST, &[&issuer, &PREFIX, &vec![audience.as_str()], &json!({ "keys": [jwk] })])
            .await?;
        let ann = format!("{PREFIX}ann");
        let came = verified(&self.app, &token, &Request::default()).await?;
        self.report.check("the same token, trusted for reading posts", format!("VALID, {ann}"), came);
        let came = verified(&self.app, &token, &requiring(&[WRITE])).await?;
        self.report.check("it claims to be admin, and writing needs more", "INSUFFICIENT_SCOPE", came);
        let forged = foreign(&attacker, &kid, &issuer, &audience)?;
        let came = verified(&self.app, &forged, &Request::default()).await?;
        self.report.check("one that another key has signed", "BAD_SIGNATURE", came);

        let expected = self.posts_for(&ann).await?;
        let transaction = self.app.transaction().await?;
        transaction.query_one(AUTHENTICATE, &[&token]).await?;
        let (user, seen) = (current_user(&transaction).await?, visible_posts(&transaction).await?);
        let posted = transaction.execute(WRITE_POST, &[&ANN, &"In Ann's name"]).await;
        transaction.rollback().await?;
        self.report.check("authenticated with it: not our Ann", &ann, user);
        self.report.check("the posts it sees: published ones", expected, seen);
        self.report.check("it writes in Ann's name", "refused, 42501", outcome(&posted));

        let ended: bool = self.owner.query_one(DISTRUST, &[&issuer, &"the end of the demo"]).await?.get(0);
        self.report.check("the trust is ended", true, ended);
        let came = verified(&self.app, &token, &Request::default()).await?;
        self.report.check("its token", "UNTRUSTED_ISSUER", came);
        Ok(())
    }
}
