//! The digest of a row of values: never changes, and differs for different rows.

use proptest::prelude::*;
use tollgate_core::seal::digest;

fn of(row: &[Option<Vec<u8>>]) -> [u8; 32] {
    digest(row.iter().map(Option::as_deref))
}

/// Seals are kept for years: these bytes must never change. Computed with sha256sum.
#[test]
fn the_digest_is_that_of_lengths_and_values() {
    let hex: String = digest([Some(b"ab".as_slice()), None, Some(b"".as_slice())])
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect();
    assert_eq!(hex, "a4e3375e9a4c61a1565b588348229bf7fd6b8086dba0f0065a888d3a3b60d87e");
}

proptest! {
    #[test]
    fn rows_that_differ_have_digests_that_differ(
        one in prop::collection::vec(prop::option::of(prop::collection::vec(0..3_u8, 0..4)), 0..4),
        other in prop::collection::vec(prop::option::of(prop::collection::vec(0..3_u8, 0..4)), 0..4),
    ) {
        prop_assert_eq!(one == other, of(&one) == of(&other));
    }
}
