//! Trusted issuers, and the keys that are fetched from them.

use std::fmt;

use futures_util::Stream;
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, GenericClient};

use crate::contract;
use crate::contract::document::Document;
use crate::contract::{DueIssuer, Fence, NewIssuer};
use crate::error::Result;
use crate::issuer_keys::{Fetcher, KeySet};

/// Trusts an issuer from now on, or replaces the configuration of one that is trusted.
pub async fn trust(client: &Client, new: &NewIssuer) -> Result<()> {
    contract::trust_issuer(client, new).await
}

/// False if it is not trusted.
pub async fn distrust(client: &Client, issuer: &str, reason: Option<&str>) -> Result<bool> {
    contract::distrust_issuer(client, issuer, reason).await
}

/// Rows of `tollgate.trusted_issuers`.
pub async fn list(client: &Client) -> Result<impl Stream<Item = Result<Document>> + use<>> {
    contract::list_trusted_issuers(client).await
}

/// The issuers whose keys are to be fetched now.
pub async fn due(client: &Client) -> Result<Vec<DueIssuer>> {
    contract::issuers_due(client).await
}

/// Asks the issuer. Needs no session, so that none is held meanwhile.
pub async fn fetch(fetcher: &Fetcher, due: &DueIssuer) -> Result<KeySet, String> {
    fetcher.fetch(&due.issuer, due.jwks_url.as_deref()).await
}

/// What came of fetching the keys of an issuer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// How many keys it has now; `None` if what was there stays.
    pub keys: Option<i32>,
    /// What is wrong, with the set or a key in it.
    pub problem: Option<String>,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.keys {
            Some(1) => f.write_str("1 key")?,
            Some(keys) => write!(f, "{keys} keys")?,
            None => f.write_str("nothing was changed")?,
        }
        match &self.problem {
            Some(problem) => write!(f, "; {problem}"),
            None => Ok(()),
        }
    }
}

/// Has the database store what was fetched, or remember why nothing was.
pub async fn record(
    client: &impl GenericClient,
    fence: Option<&Fence>,
    issuer: &str,
    fetched_from: Option<&str>,
    fetched: Result<KeySet, String>,
) -> Result<Outcome> {
    let problem = match fetched {
        Ok(set) => {
            match contract::store_issuer_keys(client, fence, issuer, fetched_from, &set.text, set.max_age)
                .await
            {
                Ok(stored) => {
                    return Ok(Outcome {
                        keys: (stored.stored > 0).then_some(stored.stored),
                        problem: stored.detail,
                    });
                }
                // What it holds is no key set, but something that is not to be stored at all.
                Err(error) if error.sqlstate() == Some(&SqlState::INVALID_PARAMETER_VALUE) => {
                    error.message().to_owned()
                }
                Err(error) => return Err(error),
            }
        }
        Err(problem) => problem,
    };
    contract::note_issuer_failure(client, fence, issuer, &problem).await?;
    Ok(Outcome { keys: None, problem: Some(problem) })
}
