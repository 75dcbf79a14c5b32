//! The hints at rows: the last noted hint is found, and a hint that was not noted is not.

use std::collections::HashMap;
use tollgate_core::hints::{Bucket, Hints, Location, buckets_for};
use tollgate_core::token::{Digest, digest};

fn hints(keys: usize) -> Hints<'static> {
    Hints::new(Vec::leak((0..buckets_for(keys)).map(|_| Bucket::default()).collect()))
}

fn one(n: u32) -> (Digest, Location) {
    let location = Location {
        block: n.wrapping_mul(0x9e37_79b9),
        offset: (n % 0xffff) as u16 + 1,
        buffer: n + 1,
        group: n % (1 << 24),
    };
    (digest(&n.to_be_bytes()), location)
}

#[test]
fn the_last_noted_hint_is_found_and_nothing_else() {
    let hints = hints(1000);
    let (digest, first) = one(1);
    assert_eq!(hints.find(&digest), None);
    hints.line(&digest);
    assert_eq!(hints.find(&digest), None, "prefetched, not created");
    hints.note(&digest, first);
    assert_eq!(hints.find(&digest), Some(first));
    let (other, second) = one(2);
    assert_eq!(hints.find(&other), None);
    hints.note(&digest, second);
    assert_eq!(hints.find(&digest), Some(second), "moved");
    // No buffer: not a heap, or not a shared buffer.
    hints.note(&other, Location { buffer: 0, ..first });
    assert_eq!(hints.find(&digest), Some(second));
}

#[test]
fn nearly_all_of_the_requested_number_are_found_each_at_its_own_place() {
    const KEYS: u32 = 100_000;
    let hints = hints(KEYS as usize);
    for (digest, location) in (0..KEYS).map(one) {
        hints.note(&digest, location);
    }
    let mut found = 0;
    for (digest, location) in (0..KEYS).map(one) {
        if let Some(hint) = hints.find(&digest) {
            assert_eq!(hint, location);
            found += 1;
        }
    }
    assert!(found > KEYS * 9 / 10, "{found}");
}

#[test]
fn in_a_table_that_is_far_too_small_the_newest_are_found() {
    let hints = hints(1);
    let mut noted = HashMap::new();
    for (digest, location) in (0..1000).map(one) {
        hints.note(&digest, location);
        noted.insert(digest, location);
        assert_eq!(hints.find(&digest), Some(location));
    }
    let found: Vec<_> =
        noted.iter().filter_map(|(digest, location)| Some((hints.find(digest)?, *location))).collect();
    assert!(!found.is_empty() && found.len() <= 8);
    assert!(found.iter().all(|(hint, location)| hint == location));
}
