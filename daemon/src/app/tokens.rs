//! Tokens: issue, find, verify, change, revoke.

use std::net::IpAddr;

use futures_util::{Stream, StreamExt as _, TryStreamExt as _, stream};
use serde_json::Value;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use tollgate_core::token;
use uuid::Uuid;

use crate::contract;
use crate::contract::document::Document;
pub use crate::contract::{Changes, Ending, Filter, NewToken, Page};
use crate::error::{Error, Result};
use crate::postgres::pool::hide_bind_values;

/// So many rows are asked for at a time, however many are wanted.
const PAGE: i32 = 1000;

/// The issued token, with the plaintext in it: the only time that it is there.
pub async fn create(client: &Client, new: &NewToken<'_>) -> Result<Value> {
    contract::create_api_token(client, new).await
}

/// The same, of a token that may do less than its parent.
pub async fn derive(
    client: &Client,
    parent: &str,
    name: &str,
    scopes: &[String],
    ending: &Ending,
    allowed_ips: Option<&[String]>,
) -> Result<Value> {
    hide_bind_values(client).await?;
    contract::derive_api_token(client, parent, name, scopes, ending, allowed_ips).await
}

/// The same, of the successor of a token.
pub async fn rotate(
    client: &Client,
    id: Uuid,
    grace: std::time::Duration,
    ending: &Ending,
    revoke_on_reuse: bool,
) -> Result<Value> {
    contract::rotate_api_token(client, id, grace, ending, revoke_on_reuse).await.map_err(no_such_token)
}

/// Whose tokens are listed, and which of them.
#[derive(Clone, Debug, Default)]
pub struct Search {
    pub user: Option<String>,
    pub filter: Filter,
    /// All of them without one.
    pub limit: Option<u64>,
    /// Those behind the one with this id.
    pub after: Option<Uuid>,
}

/// Rows of `tollgate.tokens` in the order of their ids, page by page, so that any number of them can be listed.
pub fn list(client: &Client, search: Search) -> impl Stream<Item = Result<Document>> {
    let begin = (search.after, search.limit.unwrap_or(u64::MAX));
    stream::try_unfold(Some(begin), move |place| {
        let search = search.clone();
        async move {
            let Some((after, left)) = place.filter(|(_, left)| *left > 0) else { return Ok(None) };
            let page = Page { size: PAGE.min(i32::try_from(left).unwrap_or(PAGE)), after };
            let (rows, next) = match &search.user {
                // Who may list one user's tokens need not be allowed to search those of all.
                Some(user) if search.filter.is_empty() => {
                    let rows = contract::list_api_tokens(client, user, page).await?;
                    // A page that is not whole is the last one.
                    let whole = rows.last().filter(|_| rows.len() == page.size as usize);
                    let next = whole.and_then(|last| last.field("id").parse().ok());
                    (rows, next)
                }
                user => contract::find_api_tokens(client, user.as_deref(), &search.filter, page).await?,
            };
            let next = next.map(|after| (Some(after), left - rows.len() as u64));
            Ok(Some((stream::iter(rows).map(Ok), next)))
        }
    })
    .try_flatten()
}

/// The row of `tollgate.tokens`; `None` if there is no such token.
pub async fn show(client: &Client, id: Uuid) -> Result<Option<Document>> {
    contract::show_api_token(client, id).await
}

/// `tollgate.verification` of a token that was presented. Only its digest leaves this process, unless it is of another system: then
/// the server must compute the digest, in the form that was given at the import.
pub async fn verify(
    client: &Client,
    presented: &str,
    foreign: bool,
    scopes: Option<&[String]>,
    client_ip: Option<IpAddr>,
) -> Result<Document> {
    if foreign {
        hide_bind_values(client).await?;
        return contract::verify_api_token(client, presented, scopes, client_ip).await;
    }
    let digest = token::digest(presented.as_bytes());
    let mut verification = contract::verify_api_token_hash(client, &digest, scopes, client_ip).await?;
    // A digest does not show the server whether the token was well-formed.
    if verification.field("code") == "NOT_FOUND" && token::parse(presented.as_bytes()).is_none() {
        verification.set("code", "MALFORMED");
    }
    Ok(verification)
}

/// The row of `tollgate.tokens` after the change.
pub async fn update(client: &Client, id: Uuid, changes: &Changes) -> Result<Document> {
    contract::update_api_token(client, id, changes).await.map_err(no_such_token)
}

/// False when unknown or so already.
pub async fn set_enabled(client: &Client, id: Uuid, enabled: bool, reason: Option<&str>) -> Result<bool> {
    contract::set_api_token_enabled(client, id, enabled, reason).await
}

/// What is revoked.
#[derive(Clone, Copy, Debug)]
pub enum Revocation<'a> {
    /// One token, if it is that user's, where one is named.
    Token { id: Uuid, user: Option<&'a str> },
    /// A token by itself.
    Presented(&'a str),
    /// All API tokens of a user.
    User(&'a str),
}

/// How many tokens were named and revoked. Those derived from them are revoked with them, and are counted only for a user.
pub async fn revoke(client: &Client, what: Revocation<'_>, reason: Option<&str>) -> Result<u64> {
    match what {
        Revocation::Token { id, user } => {
            contract::revoke_api_token(client, id, user, reason).await.map(u64::from)
        }
        Revocation::Presented(token) => {
            hide_bind_values(client).await?;
            contract::revoke_presented_token(client, token, reason).await.map(u64::from)
        }
        Revocation::User(user) => contract::revoke_all_api_tokens(client, user, reason).await,
    }
}

/// Ends all access that a user has now, and returns how many API tokens there were.
pub async fn revoke_user(client: &Client, user: &str, reason: Option<&str>) -> Result<u64> {
    contract::revoke_user(client, user, reason).await
}

fn no_such_token(error: Error) -> Error {
    error.or_remedy(&SqlState::UNDEFINED_OBJECT, "give the id of a token as `tollgated token list` shows it")
}
