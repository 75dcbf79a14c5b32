//! Where the row of a token was last seen: in which block, at which offset, in which shared buffer.
//!
//! A hint is never trusted: a reader reads the table row that the latest snapshot shows, and compares the whole digest;
//! if the row is another one, or the page has left its buffer, the index is used. So nothing here is locked, nothing
//! has to be kept consistent with the table, and a torn or stale hint only costs time.

use crate::token::Digest;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Hints in one cache line.
const HINTS_PER_BUCKET: usize = 4;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Location {
    pub block: u32,
    /// The line pointer that the index points to; counted from 1.
    pub offset: u16,
    /// Counted from 1.
    pub buffer: u32,
    /// The group of counters that holds or held the token's entry: the lower 24 bits of its number.
    pub group: u32,
}

#[repr(C, align(64))]
#[derive(Default)]
pub struct Bucket([Slot; HINTS_PER_BUCKET]);

#[repr(C)]
#[derive(Default)]
struct Slot {
    /// Block (32 bits) and buffer (32). All zero: no hint, since buffers are numbered from 1.
    page: AtomicU64,
    /// Offset (16 bits), group (24) and a part of the digest (24).
    row: AtomicU64,
}

const GROUP_BITS: u32 = 24;

#[derive(Clone, Copy)]
pub struct Hints<'a>(&'a [Bucket]);

/// The number of buckets for a number of keys, with room for half as many hints again, so that few replace each other.
pub fn buckets_for(keys: usize) -> usize {
    (keys * 3 / 2).div_ceil(HINTS_PER_BUCKET).max(1)
}

impl<'a> Hints<'a> {
    pub fn new(buckets: &'a [Bucket]) -> Self {
        Hints(buckets)
    }

    /// The cache line that [`Hints::find`] will read, for a caller that can prefetch it.
    pub fn line(&self, digest: &Digest) -> *const Bucket {
        self.bucket(digest).0
    }

    pub fn find(&self, digest: &Digest) -> Option<Location> {
        let (bucket, part) = self.bucket(digest);
        bucket.0.iter().find_map(|hint| {
            let row = hint.row.load(Relaxed);
            let page = hint.page.load(Relaxed);
            (row >> (16 + GROUP_BITS) == part && page != 0).then_some(Location {
                block: (page >> 32) as u32,
                offset: row as u16,
                buffer: page as u32,
                group: (row >> 16) as u32 & ((1 << GROUP_BITS) - 1),
            })
        })
    }

    /// Replaces an older hint for the same token, or fills an empty slot, or replaces another token's hint.
    pub fn note(&self, digest: &Digest, place: Location) {
        let (bucket, part) = self.bucket(digest);
        let of = |wanted: &dyn Fn(&Slot) -> bool| bucket.0.iter().find(|hint| wanted(hint));
        let victim = &bucket.0[usize::from(digest[31]) % HINTS_PER_BUCKET];
        let hint = of(&|hint| hint.row.load(Relaxed) >> (16 + GROUP_BITS) == part)
            .or_else(|| of(&|hint| hint.page.load(Relaxed) == 0))
            .unwrap_or(victim);
        let group = u64::from(place.group) & ((1 << GROUP_BITS) - 1);
        hint.row.store((part << (16 + GROUP_BITS)) | (group << 16) | u64::from(place.offset), Relaxed);
        hint.page.store((u64::from(place.block) << 32) | u64::from(place.buffer), Relaxed);
    }

    /// A digest is as random as a hash: one part of it selects the bucket, another is compared.
    fn bucket(&self, digest: &Digest) -> (&'a Bucket, u64) {
        let word = |at: usize| u64::from_le_bytes(digest[at..at + 8].try_into().expect("eight bytes"));
        let number = (u128::from(word(0)) * self.0.len() as u128) >> 64;
        (&self.0[number as usize], word(8) >> (16 + GROUP_BITS))
    }
}
