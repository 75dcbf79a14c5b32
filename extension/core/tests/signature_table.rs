//! The table of good signatures: it knows what was noted, and nothing else.

use tollgate_core::signature_table::{Bucket, SignatureTable, buckets_for, key};
use tollgate_core::token::{Digest, digest};

fn table(signatures: usize) -> SignatureTable<'static> {
    SignatureTable::new(Vec::leak((0..buckets_for(signatures)).map(|_| Bucket::default()).collect()))
}

fn one(n: u32) -> Digest {
    key(1, "ES256", &digest(b"a key"), &digest(b"signed"), &n.to_be_bytes())
}

#[test]
fn only_what_was_noted_is_known() {
    let table = table(1000);
    assert!(!table.contains(&one(1)));
    table.note(&one(1));
    table.note(&one(1));
    assert!(table.contains(&one(1)) && !table.contains(&one(2)));
}

#[test]
fn another_database_algorithm_key_token_or_signature_is_another_entry() {
    let table = table(1000);
    let [first, second, token, other] =
        ["a key", "another", "token", "tokem"].map(|text| digest(text.as_bytes()));
    table.note(&key(1, "ES256", &first, &token, b"signature"));
    for other in [
        key(2, "ES256", &first, &token, b"signature"),
        key(1, "EdDSA", &first, &token, b"signature"),
        key(1, "ES256", &second, &token, b"signature"),
        key(1, "ES256", &first, &other, b"signature"),
        key(1, "ES256", &first, &token, b"signaturf"),
        key(1, "ES256", &first, &token, b"signature "),
        key(1, "ES256", &token, &first, b"signature"),
        // The length of the algorithm's name is a part of it.
        key(1, "ES25", &first, &token, b"signature"),
    ] {
        assert!(!table.contains(&other));
    }
    assert!(table.contains(&key(1, "ES256", &first, &token, b"signature")));
}

#[test]
fn a_full_table_forgets_and_never_invents() {
    const SIGNATURES: u32 = 10_000;
    let table = table(1000);
    for n in 0..SIGNATURES {
        table.note(&one(n));
        assert!(table.contains(&one(n)), "the newest is known");
    }
    let known = (0..SIGNATURES).filter(|n| table.contains(&one(*n))).count();
    assert!(known > 900 && known <= 1000, "{known}");
    assert!((SIGNATURES..3 * SIGNATURES).all(|n| !table.contains(&one(n))));
}

#[test]
fn a_table_without_room_knows_nothing() {
    let table = table(0);
    table.note(&one(1));
    assert!(!table.contains(&one(1)));
}

#[test]
fn a_slot_that_is_written_and_read_at_once_never_shows_a_signature_that_was_not_noted() {
    let table = table(1);
    std::thread::scope(|scope| {
        for part in 0..2_u32 {
            scope.spawn(move || (0..20_000).for_each(|n| table.note(&one(2 * n + part))));
        }
        scope.spawn(move || assert!((100_000..120_000).all(|n| !table.contains(&one(n)))));
    });
}
