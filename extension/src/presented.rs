//! What a caller presents, and under which digest that would be stored. Every function that takes a plaintext asks here.

use crate::guc;
use tollgate_core::token::{self, Digest};

/// Longer than any header that a web server accepts; nobody is to have us digest megabytes.
const MAX_FOREIGN_LEN: usize = 8192;

/// `None` for what cannot be a token, which its checksum tells without a look-up. Tokens of another system have no
/// checksum of ours, so while those are accepted anything may be one.
#[inline]
pub(crate) fn digest(presented: &[u8]) -> Option<Digest> {
    let may_be_token = token::parse(presented).is_some()
        || (guc::accept_foreign_tokens() && (1..=MAX_FOREIGN_LEN).contains(&presented.len()));
    may_be_token.then(|| token::digest(presented))
}
