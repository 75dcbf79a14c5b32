//! The digest of a row of values, from which the seals of the audit log are made.

use sha2::{Digest as _, Sha256};

use crate::token::Digest;

/// The SHA-256 of the values, each preceded by its length (4 bytes, big-endian) so that no two rows have the same
/// input; the length of a NULL is -1.
pub fn digest<'a>(values: impl IntoIterator<Item = Option<&'a [u8]>>) -> Digest {
    let mut hasher = Sha256::new();
    for value in values {
        // PostgreSQL's values are shorter than 1 GiB.
        let length = value.map_or(-1, |value| i32::try_from(value.len()).unwrap_or(i32::MAX));
        hasher.update(length.to_be_bytes());
        hasher.update(value.unwrap_or_default());
    }
    hasher.finalize().into()
}
