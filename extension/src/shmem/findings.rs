//! What verifications found but cannot write, for the daemon to record: an imported token in another format that was
//! presented for the first time, with its new digest; a token that was presented after its rotation.
//!
//! A finding stays until it is recorded in the tables, or for an hour: the daemon may fail at any moment and start
//! again. There is one finding of each kind per token. If there is no room, a finding is dropped, and found again at
//! the next presentation. A verification takes a spinlock for this, only in these rare cases.

use super::spin::SpinLock;
use core::sync::atomic::{AtomicI64, AtomicU8, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::net::IpAddr;
use tollgate_core::net::Net;
use tollgate_core::token::Digest;
use tollgate_core::usage_table::SpinLock as _;

const BUCKETS: usize = 64;
const SLOTS_PER_BUCKET: usize = 8;
/// In microseconds. For a database that was dropped, or that has no daemon.
const LONGEST: i64 = 3_600_000_000;

const FREE: u8 = 0;
const DIGEST: u8 = 1;
const REUSE: u8 = 2;

/// What was found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Found {
    /// The token has this digest.
    Digest(Digest),
    /// It was replaced, and then presented again, from this address.
    Reuse(Option<Net>),
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Finding {
    /// For [`Findings::free`]; unique between two starts of the server.
    pub(crate) number: u64,
    pub(crate) token_id: [u8; 16],
    /// Microseconds since 2000-01-01.
    pub(crate) at: i64,
    pub(crate) found: Found,
}

/// Protected by the bucket's lock.
#[repr(C)]
#[derive(Default)]
struct Slot {
    number: AtomicU64,
    token_id: [AtomicU64; 2],
    at: AtomicI64,
    /// A digest, or an address in network order in the first two words.
    payload: [AtomicU64; 4],
    database: AtomicU32,
    kind: AtomicU8,
    /// Of an address: 4 or 6, and its prefix length; 0 for none.
    family: AtomicU8,
    bits: AtomicU8,
}

#[repr(C, align(64))]
#[derive(Default)]
struct Bucket {
    lock: SpinLock,
    slots: [Slot; SLOTS_PER_BUCKET],
}

#[repr(C, align(64))]
pub(super) struct Findings {
    next_number: AtomicU64,
    buckets: [Bucket; BUCKETS],
}

impl Findings {
    /// For memory that is all zero.
    pub(super) fn start(&self) {
        self.next_number.store(1, Relaxed);
        for bucket in &self.buckets {
            bucket.lock.init();
        }
    }

    pub(super) fn note(&self, database: u32, token_id: &[u8; 16], found: &Found, at: i64) {
        let id = halves(token_id);
        let kind = kind(found);
        let mut address = [0; 16];
        let (payload, family, bits) = match found {
            Found::Digest(digest) => (words(digest), 0, 0),
            Found::Reuse(None) => ([0; 4], 0, 0),
            Found::Reuse(Some(client)) => {
                let family = match client.addr() {
                    IpAddr::V4(v4) => {
                        address[..4].copy_from_slice(&v4.octets());
                        4
                    }
                    IpAddr::V6(v6) => {
                        address = v6.octets();
                        6
                    }
                };
                let [high, low] = halves(&address);
                ([high, low, 0, 0], family, client.bits())
            }
        };
        let bucket = &self.buckets[(id[0] ^ id[1]) as usize % BUCKETS];
        let number = self.next_number.fetch_add(1, Relaxed);
        let _held = bucket.lock.hold();
        let mut room = None;
        for slot in &bucket.slots {
            let taken = slot.kind.load(Relaxed);
            if taken == FREE || at.saturating_sub(slot.at.load(Relaxed)) > LONGEST {
                room = room.or(Some(slot));
            } else if taken == kind && slot.is_of(database, id) {
                // The first one counts.
                return;
            }
        }
        let Some(slot) = room else { return };
        slot.number.store(number, Relaxed);
        for (to, from) in slot.token_id.iter().zip(id) {
            to.store(from, Relaxed);
        }
        slot.at.store(at, Relaxed);
        for (to, from) in slot.payload.iter().zip(payload) {
            to.store(from, Relaxed);
        }
        slot.database.store(database, Relaxed);
        slot.family.store(family, Relaxed);
        slot.bits.store(bits, Relaxed);
        slot.kind.store(kind, Relaxed);
    }

    /// All findings of a database, at most a few hundred.
    pub(super) fn of(&self, database: u32) -> Vec<Finding> {
        let mut all = Vec::with_capacity(BUCKETS * SLOTS_PER_BUCKET);
        for bucket in &self.buckets {
            let mut found = [None; SLOTS_PER_BUCKET];
            {
                let _held = bucket.lock.hold();
                for (finding, slot) in found.iter_mut().zip(&bucket.slots) {
                    if slot.database.load(Relaxed) == database {
                        *finding = slot.read();
                    }
                }
            }
            all.extend(found.into_iter().flatten().map(Raw::finding));
        }
        all
    }

    /// False if there is no such finding.
    pub(super) fn free(&self, database: u32, number: u64) -> bool {
        self.buckets.iter().any(|bucket| {
            let _held = bucket.lock.hold();
            let its = |slot: &&Slot| {
                slot.kind.load(Relaxed) != FREE
                    && slot.number.load(Relaxed) == number
                    && slot.database.load(Relaxed) == database
            };
            let slot = bucket.slots.iter().find(its);
            if let Some(slot) = slot {
                slot.kind.store(FREE, Relaxed);
            }
            slot.is_some()
        })
    }
}

/// A slot as it was read under the lock.
#[derive(Clone, Copy)]
struct Raw {
    number: u64,
    token_id: [u64; 2],
    at: i64,
    payload: [u64; 4],
    kind: u8,
    family: u8,
    bits: u8,
}

impl Slot {
    fn is_of(&self, database: u32, id: [u64; 2]) -> bool {
        self.database.load(Relaxed) == database
            && self.token_id[0].load(Relaxed) == id[0]
            && self.token_id[1].load(Relaxed) == id[1]
    }

    fn read(&self) -> Option<Raw> {
        let kind = self.kind.load(Relaxed);
        (kind != FREE).then(|| Raw {
            number: self.number.load(Relaxed),
            token_id: [self.token_id[0].load(Relaxed), self.token_id[1].load(Relaxed)],
            at: self.at.load(Relaxed),
            payload: [
                self.payload[0].load(Relaxed),
                self.payload[1].load(Relaxed),
                self.payload[2].load(Relaxed),
                self.payload[3].load(Relaxed),
            ],
            kind,
            family: self.family.load(Relaxed),
            bits: self.bits.load(Relaxed),
        })
    }
}

impl Raw {
    fn finding(self) -> Finding {
        let address = joined([self.payload[0], self.payload[1]]);
        let found = match (self.kind, self.family) {
            (DIGEST, _) => {
                let mut digest = [0; 32];
                digest[..16].copy_from_slice(&address);
                digest[16..].copy_from_slice(&joined([self.payload[2], self.payload[3]]));
                Found::Digest(digest)
            }
            (_, 4) => Found::Reuse(Net::v4([address[0], address[1], address[2], address[3]], self.bits)),
            (_, 6) => Found::Reuse(Net::v6(address, self.bits)),
            _ => Found::Reuse(None),
        };
        Finding { number: self.number, token_id: joined(self.token_id), at: self.at, found }
    }
}

fn kind(found: &Found) -> u8 {
    match found {
        Found::Digest(_) => DIGEST,
        Found::Reuse(_) => REUSE,
    }
}

fn halves(bytes: &[u8; 16]) -> [u64; 2] {
    let number = u128::from_be_bytes(*bytes);
    [(number >> 64) as u64, number as u64]
}

fn joined([high, low]: [u64; 2]) -> [u8; 16] {
    (u128::from(high) << 64 | u128::from(low)).to_be_bytes()
}

fn words(digest: &Digest) -> [u64; 4] {
    let (first, second) = digest.split_first_chunk::<16>().unwrap_or((&[0; 16], &[]));
    let second = second.first_chunk().unwrap_or(&[0; 16]);
    let ([a, b], [c, d]) = (halves(first), halves(second));
    [a, b, c, d]
}
