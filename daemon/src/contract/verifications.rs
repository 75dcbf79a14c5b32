//! Credentials that are presented, and what they are worth.

use std::net::IpAddr;
use std::time::Duration;

use jiff::Timestamp;
use tokio_postgres::{Client, Row, Statement};
use tollgate_core::{jws, scope};
use uuid::Uuid;

use crate::error::{Doing as _, Error, Result};
use crate::secret::Secret;

const DOING: &str = "verify credentials";

/// Longer ones are malformed: no header has room for them, and the extension looks at no more.
const MOST_BYTES: usize = 8192;
/// As many as a token can have of its own, and more than anyone asks for.
const MOST_SCOPES: usize = 64;
const LONGEST_AUDIENCE: usize = 2048;

/// One that was presented, and what for. Only what PostgreSQL takes as a value gets here, so that no statement about several
/// fails for one of them.
#[derive(Clone, Debug)]
pub struct Credential {
    token: Secret,
    /// Joined by spaces.
    scopes: Option<String>,
    client_ip: IpAddr,
    audience: Option<String>,
}

/// Why there is nothing to ask the database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unsound {
    /// No text that could be a credential.
    Token,
    /// What is no scope is granted by none.
    Scope,
    Audience,
}

impl Credential {
    /// `scopes` are those that it must grant, each of them; `audience` that which a signed token must name, unless it is the
    /// server's own.
    pub fn new<'a>(
        token: Secret,
        scopes: impl IntoIterator<Item = &'a str>,
        client_ip: IpAddr,
        audience: Option<&str>,
    ) -> Result<Self, Unsound> {
        let is_text = |text: &str, longest| !text.contains('\0') && text.len() <= longest;
        if !is_text(token.expose(), MOST_BYTES) {
            return Err(Unsound::Token);
        }
        if audience.is_some_and(|audience| audience.is_empty() || !is_text(audience, LONGEST_AUDIENCE)) {
            return Err(Unsound::Audience);
        }
        let scopes: Vec<&str> = scopes.into_iter().collect();
        if scopes.len() > MOST_SCOPES || !scopes.iter().all(|one| scope::is_scope(one.as_bytes())) {
            return Err(Unsound::Scope);
        }
        let scopes = (!scopes.is_empty()).then(|| scopes.join(" "));
        Ok(Self { token, scopes, client_ip, audience: audience.map(str::to_owned) })
    }

    /// Whether it has the form of a signed token.
    pub fn is_signed(&self) -> bool {
        jws::is_signed(self.token.expose().as_bytes())
    }
}

/// A row of `tollgate.verification`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Verified {
    pub code: String,
    pub token_id: Option<Uuid>,
    /// Of one that is valid; so are the scopes, the issuer and the session.
    pub user_id: Option<String>,
    pub scopes: Vec<String>,
    pub expires_at: Option<Timestamp>,
    /// Of a signed token.
    pub issuer: Option<String>,
    pub session: Option<String>,
    pub limit: Option<Limit>,
    /// Where a later attempt may succeed.
    pub retry_after: Option<Duration>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    pub limit: u32,
    pub remaining: u32,
}

impl Verified {
    pub fn is_valid(&self) -> bool {
        self.code == "VALID"
    }
}

/// Kept by each session that verifies: planning takes as long as verifying some.
pub async fn prepare_verify_tokens(client: &Client) -> Result<Statement> {
    client
        .prepare(
            "select v.code, v.token_id, v.user_id, v.scopes, v.expires_at, v.metadata ->> 'iss', v.metadata ->> 'sid', \
                    v.rate_limit, v.rate_remaining, extract(epoch from v.retry_after)::float8 \
             from tollgate.verify_tokens($1, $2, $3, $4) v",
        )
        .await
        .doing(DOING)
}

/// What each of them is worth, in their order, by one statement.
pub async fn verify_tokens(
    client: &Client,
    statement: &Statement,
    credentials: &[&Credential],
) -> Result<Vec<Verified>> {
    let tokens: Vec<&str> = credentials.iter().map(|one| one.token.expose()).collect();
    let scopes: Vec<Option<&str>> = credentials.iter().map(|one| one.scopes.as_deref()).collect();
    let addresses: Vec<IpAddr> = credentials.iter().map(|one| one.client_ip).collect();
    let audiences: Vec<Option<&str>> = credentials.iter().map(|one| one.audience.as_deref()).collect();
    let rows = client.query(statement, &[&tokens, &scopes, &addresses, &audiences]).await.doing(DOING)?;
    if rows.len() != credentials.len() {
        return Err(Error::failed(format!(
            "could not {DOING}: {} answers to {}",
            rows.len(),
            credentials.len()
        )));
    }
    rows.iter().zip(credentials).map(|(row, one)| read(row, one.is_signed()).doing(DOING)).collect()
}

fn read(row: &Row, is_signed: bool) -> Result<Verified, tokio_postgres::Error> {
    let unsigned = |count: Option<i32>| count.and_then(|count| u32::try_from(count).ok());
    let limit = unsigned(row.try_get(7)?).zip(unsigned(row.try_get(8)?));
    let wait: Option<f64> = row.try_get(9)?;
    // The metadata of an API token are what its issuer wrote.
    let claim = |column: usize| if is_signed { row.try_get(column) } else { Ok(None) };
    Ok(Verified {
        code: row.try_get(0)?,
        token_id: row.try_get(1)?,
        user_id: row.try_get(2)?,
        scopes: row.try_get::<_, Option<Vec<String>>>(3)?.unwrap_or_default(),
        expires_at: row.try_get(4)?,
        issuer: claim(5)?,
        session: claim(6)?,
        limit: limit.map(|(limit, remaining)| Limit { limit, remaining }),
        retry_after: wait.and_then(|wait| Duration::try_from_secs_f64(wait).ok()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unsound(token: &str, scopes: &[&str], audience: Option<&str>) -> Option<Unsound> {
        let address = "192.0.2.1".parse().unwrap();
        Credential::new(Secret::new(token), scopes.iter().copied(), address, audience).err()
    }

    #[test]
    fn what_would_fail_the_statement_of_all_or_be_granted_by_accident_is_refused_before() {
        for token in ["tgt_1", "", "é", &"a".repeat(MOST_BYTES)] {
            assert_eq!(unsound(token, &["posts:read", "a.b_c-d:0"], Some("https://api.test")), None);
        }
        assert_eq!(unsound("a\0b", &[], None), Some(Unsound::Token));
        assert_eq!(unsound(&"a".repeat(MOST_BYTES + 1), &[], None), Some(Unsound::Token));
        for scope in
            ["", "posts:", ":read", "posts::read", "posts:*", "Posts", "a b", "-a", "a:_b", "a\0", "é"]
        {
            assert_eq!(unsound("t", &["posts:read", scope], None), Some(Unsound::Scope), "{scope:?}");
        }
        assert_eq!(unsound("t", &[&"a".repeat(129)], None), Some(Unsound::Scope));
        assert_eq!(unsound("t", &["a"; 65], None), Some(Unsound::Scope));
        assert_eq!(unsound("t", &[], Some("")), Some(Unsound::Audience));
        assert_eq!(unsound("t", &[], Some("a\0")), Some(Unsound::Audience));
    }
}
