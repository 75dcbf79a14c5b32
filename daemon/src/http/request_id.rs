//! The id of a request: in every response, in problem documents, in log lines and traces, so that one can be found by the other.
//!
//! A trusted proxy may have made one already. From others an id is not taken: it would let a client write into the log, or
//! repeat the id of another request.

use std::fmt;

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use tollgate_core::token;
use uuid::Uuid;

pub(super) const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

const LONGEST: usize = 128;

tokio::task_local! {
    static CURRENT: RequestId;
}

/// Visible ASCII, without what a log line or a header would have to escape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RequestId(HeaderValue);

impl RequestId {
    pub(super) fn of(headers: &HeaderMap, from_trusted_proxy: bool) -> Self {
        let mut given = headers.get_all(X_REQUEST_ID).iter();
        match (given.next(), given.next()) {
            (Some(id), None) if from_trusted_proxy && is_well_formed(id.as_bytes()) => Self(id.clone()),
            _ => Self::new(),
        }
    }

    fn new() -> Self {
        let mut text = [0; uuid::fmt::Hyphenated::LENGTH];
        let text = Uuid::new_v4().hyphenated().encode_lower(&mut text);
        Self(HeaderValue::from_str(text).unwrap_or(HeaderValue::from_static("")))
    }

    pub(super) fn as_str(&self) -> &str {
        self.0.to_str().unwrap_or_default()
    }

    pub(super) fn value(&self) -> HeaderValue {
        self.0.clone()
    }

    /// Runs what answers the request.
    pub(super) async fn scope<F: Future>(self, answer: F) -> F::Output {
        CURRENT.scope(self, answer).await
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Of the request that is being answered.
pub(super) fn current() -> Option<RequestId> {
    CURRENT.try_with(Clone::clone).ok()
}

/// UUIDs, ULIDs, and what nginx, Envoy and the clouds' balancers make. A token is none: it would be logged.
fn is_well_formed(id: &[u8]) -> bool {
    let known = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_:=/+".contains(byte);
    (1..=LONGEST).contains(&id.len()) && id.iter().all(known) && !token::contains_secret(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(value: &str, trusted: bool) -> RequestId {
        let mut headers = HeaderMap::new();
        headers.insert(X_REQUEST_ID, HeaderValue::from_bytes(value.as_bytes()).unwrap());
        RequestId::of(&headers, trusted)
    }

    #[test]
    fn an_id_of_a_trusted_proxy_is_kept_if_it_is_well_formed() {
        for given in [
            "7f9c24e8-3b0a-4c57-9f2e-1a2b3c4d5e6f",
            "1-67891233-abcdef012345678912345678",
            "Root=1-6;a",
            "a b",
            "é",
            "",
            &"x".repeat(129),
        ] {
            let kept = id(given, true).as_str() == given;
            assert_eq!(kept, given.starts_with("7f9c") || given.starts_with("1-67"), "{given}");
            assert_ne!(id(given, false).as_str(), given);
        }
        let mut twice = HeaderMap::new();
        twice.append(X_REQUEST_ID, HeaderValue::from_static("a"));
        twice.append(X_REQUEST_ID, HeaderValue::from_static("b"));
        assert_eq!(RequestId::of(&twice, true).as_str().len(), 36);
    }

    #[test]
    fn a_token_is_no_request_id() {
        let token = token::issue(&token::Prefix::parse("tgt").unwrap(), &[7; token::ENTROPY_LEN]);
        assert_ne!(id(token.token(), true).as_str(), token.token());
        assert_ne!(id("eyJhbGciOiJFUzI1NiJ9.e30.c2ln", true).as_str(), "eyJhbGciOiJFUzI1NiJ9.e30.c2ln");
    }
}
