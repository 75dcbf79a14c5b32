//! The hints at the places of rows: what was noted last is found, and what was not noted is not.

#[path = "../shmem/places.rs"]
#[allow(clippy::duplicate_mod, reason = "it asks PostgreSQL for nothing, so it is compiled here once more")]
mod subject;

use std::collections::HashMap;
use subject::{Bucket, Place, Places, buckets_for};
use tollgate_core::token::{Digest, digest};

fn places(keys: usize) -> Places<'static> {
    Places::new(Vec::leak((0..buckets_for(keys)).map(|_| Bucket::default()).collect()))
}

fn one(n: u32) -> (Digest, Place) {
    let place = Place {
        block: n.wrapping_mul(0x9e37_79b9),
        offset: (n % 0xffff) as u16 + 1,
        buffer: n + 1,
        group: n % (1 << 24),
    };
    (digest(&n.to_be_bytes()), place)
}

#[test]
fn what_was_noted_last_is_found_and_nothing_else() {
    let places = places(1000);
    let (digest, first) = one(1);
    assert_eq!(places.find(&digest), None);
    places.prefetch(&digest);
    assert_eq!(places.find(&digest), None, "asked for early, not made");
    places.note(&digest, first);
    assert_eq!(places.find(&digest), Some(first));
    let (other, second) = one(2);
    assert_eq!(places.find(&other), None);
    places.note(&digest, second);
    assert_eq!(places.find(&digest), Some(second), "moved");
    // No buffer: not a heap, or not a shared one.
    places.note(&other, Place { buffer: 0, ..first });
    assert_eq!(places.find(&digest), Some(second));
}

#[test]
fn as_many_as_were_asked_for_are_nearly_all_found_each_at_its_own_place() {
    const KEYS: u32 = 100_000;
    let places = places(KEYS as usize);
    for (digest, place) in (0..KEYS).map(one) {
        places.note(&digest, place);
    }
    let mut found = 0;
    for (digest, place) in (0..KEYS).map(one) {
        if let Some(hint) = places.find(&digest) {
            assert_eq!(hint, place);
            found += 1;
        }
    }
    assert!(found > KEYS * 9 / 10, "{found}");
}

#[test]
fn in_a_table_that_is_far_too_small_the_newest_are_found() {
    let places = places(1);
    let mut noted = HashMap::new();
    for (digest, place) in (0..1000).map(one) {
        places.note(&digest, place);
        noted.insert(digest, place);
        assert_eq!(places.find(&digest), Some(place));
    }
    let found: Vec<_> =
        noted.iter().filter_map(|(digest, place)| Some((places.find(digest)?, *place))).collect();
    assert!(!found.is_empty() && found.len() <= 8);
    assert!(found.iter().all(|(hint, place)| hint == place));
}
