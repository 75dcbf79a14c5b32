//! Which signed tokens had a good signature, so that each signature is checked once and not at every request.
//!
//! An entry says one thing: this key of this database has signed exactly these bytes. That can never become false, so
//! nothing here expires, nothing has to be kept consistent with a table, and an entry that a rolled-back transaction
//! left behind is as true as any other. It says nothing about whether the key is still trusted, or the token still
//! good: a caller looks here only after it has selected the key from the catalogue, and checks everything else each
//! time.
//!
//! Nothing is locked. A slot is two words of 64 bits; a reader that sees one word of an old entry and one of a new one
//! compares 128 bits that belong to neither, which match another token's digest as rarely as any 128 bits do.

use crate::token::Digest;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};
use sha2::{Digest as _, Sha256};

/// Entries in one cache line.
const SLOTS_PER_BUCKET: usize = 4;

#[repr(C, align(64))]
#[derive(Default)]
pub struct Bucket([Slot; SLOTS_PER_BUCKET]);

/// All zero: empty.
#[repr(C)]
#[derive(Default)]
struct Slot([AtomicU64; 2]);

#[derive(Clone, Copy)]
pub struct SignatureTable<'a>(&'a [Bucket]);

/// The number of buckets for a number of signatures; none for none.
pub fn buckets_for(signatures: usize) -> usize {
    signatures.div_ceil(SLOTS_PER_BUCKET)
}

/// The key of an entry. It covers the whole token, as the digest of what was signed and the signature, the key that was
/// selected for it, and the database that selected it: memory is of the whole cluster, and two databases may trust
/// different keys under one name.
pub fn key(database: u32, algorithm: &str, public_key: &Digest, signed: &Digest, signature: &[u8]) -> Digest {
    let mut hasher = Sha256::new();
    hasher.update(database.to_be_bytes());
    // The name of an algorithm has a few characters; the length keeps the fields apart.
    hasher.update([algorithm.len() as u8]);
    hasher.update(algorithm);
    hasher.update(public_key);
    hasher.update(signed);
    hasher.update(signature);
    hasher.finalize().into()
}

impl<'a> SignatureTable<'a> {
    pub fn new(buckets: &'a [Bucket]) -> Self {
        SignatureTable(buckets)
    }

    /// Whether the signature was found good. False is no statement: it may have been replaced.
    pub fn contains(&self, key: &Digest) -> bool {
        let Some((bucket, parts)) = self.bucket(key) else { return false };
        bucket.0.iter().any(|slot| slot.holds(parts))
    }

    /// Call this only for a signature that was checked with this key and is good.
    pub fn note(&self, key: &Digest) {
        let Some((bucket, parts)) = self.bucket(key) else { return };
        if bucket.0.iter().any(|slot| slot.holds(parts)) {
            return;
        }
        let free = bucket.0.iter().find(|slot| slot.holds([0, 0]));
        // Full: replaces one that the key selects, as good as at random.
        let slot = free.unwrap_or(&bucket.0[usize::from(key[31]) % SLOTS_PER_BUCKET]);
        for (word, part) in slot.0.iter().zip(parts) {
            word.store(part, Relaxed);
        }
    }

    /// A digest is as random as a hash: one part of it selects the bucket, two others are compared. `None` in a table
    /// without room.
    fn bucket(&self, key: &Digest) -> Option<(&'a Bucket, [u64; 2])> {
        let word = |at: usize| u64::from_le_bytes(key[at..at + 8].try_into().expect("eight bytes"));
        let number = (u128::from(word(0)) * self.0.len() as u128) >> 64;
        Some((self.0.get(number as usize)?, [word(8), word(16)]))
    }
}

impl Slot {
    fn holds(&self, parts: [u64; 2]) -> bool {
        self.0.iter().zip(parts).all(|(word, part)| word.load(Relaxed) == part)
    }
}
