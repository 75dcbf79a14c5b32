//! Signed access tokens: what a presented one is, ours or a trusted issuer's, and issuing. Nothing that was issued is
//! stored; what was revoked is (sql/schema/access/access.sql), and is looked up at each verification.

mod ancestry;
pub(crate) mod exchange;
mod foreign;
pub(crate) mod introspect;
pub(crate) mod issue;
pub(crate) mod issuer_fields;
pub(crate) mod key_set;
pub(crate) mod presented;
pub(crate) mod revocations;
pub(crate) mod sessions;
pub(crate) mod verify;

pub(crate) use tollgate_core::jws::is_signed;
use tollgate_core::token::{self, Digest};

/// The media type of our tokens, in the header's `typ` (RFC 9068 section 2.1).
pub(crate) const TYPE: &str = "at+jwt";
/// The claim that repeats the mark of the user (`revoked_users`) at the time of issue; absent without one.
pub(crate) const MARK: &str = "rev";
/// Reasons of `MALFORMED`, beside those of the parser.
const WRONG_TYPE: &str = "type";
const CLAIM: &str = "claim";

/// Microseconds from 1970, from which the times of claims count, to 2000, from which PostgreSQL's do.
pub(crate) const EPOCHS: i64 = 946_684_800_000_000;

/// The id under which the access tokens of a user are counted.
pub(crate) fn usage_id(user_id: &str) -> [u8; 16] {
    id_of_digest(&token::digest(user_id.as_bytes()))
}

/// A digest as a uuid of version 8 (RFC 9562 section 5.8). Tokens of ours have version 7.
pub(crate) fn id_of_digest(digest: &Digest) -> [u8; 16] {
    let mut id: [u8; 16] = *digest.first_chunk().expect("a digest is longer");
    id[6] = id[6] & 0x0f | 0x80;
    id[8] = id[8] & 0x3f | 0x80;
    id
}
