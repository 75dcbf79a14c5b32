//! The audit log: whether it is as it was sealed.

use tokio_postgres::Client;

use crate::contract;
use crate::contract::document::Document;
use crate::error::Result;

/// A seal that was kept elsewhere: its number and hash.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KnownSeal {
    pub number: i64,
    pub hash: Vec<u8>,
}

/// `tollgate.audit_verification`, its hash in hexadecimal digits.
pub async fn verify(client: &Client, known: Option<&KnownSeal>) -> Result<Document> {
    contract::verify_audit_log(client, known.map(|seal| seal.number), known.map(|seal| &*seal.hash)).await
}
