//! The credential of a request: a token in `Authorization: Bearer` (RFC 6750, section 2.1), and not in the query, since
//! URLs are logged.

use axum::http::HeaderMap;
use axum::http::header::AUTHORIZATION;
use sha2::{Digest as _, Sha256};

/// The digest of the token, which is all that the daemon keeps of it. `None` if there is no token.
pub(super) fn bearer_digest(headers: &HeaderMap) -> Option<Vec<u8>> {
    let value = headers.get(AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| Sha256::digest(token.trim()).to_vec())
}
