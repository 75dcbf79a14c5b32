//! Quotas of which this server should lease more, for the daemon to take. A wish that finds no room, or that a daemon
//! takes and then fails, is made again by a later use of the quota.

use super::spin::SpinLock;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use tollgate_core::usage_table::SpinLock as _;

const BUCKETS: usize = 64;
const WISHES_PER_BUCKET: usize = 32;

/// All zero: none.
#[repr(C)]
#[derive(Default)]
struct Wish {
    quota: [AtomicU64; 2],
    database: AtomicU32,
}

/// Protected by its lock.
#[repr(C, align(64))]
#[derive(Default)]
struct Bucket {
    lock: SpinLock,
    wishes: [Wish; WISHES_PER_BUCKET],
}

#[repr(C, align(64))]
pub(super) struct QuotaWishes([Bucket; BUCKETS]);

impl QuotaWishes {
    /// For memory that is all zero.
    pub(super) fn start(&self) {
        for bucket in &self.0 {
            bucket.lock.init();
        }
    }

    pub(super) fn note(&self, database: u32, quota: &[u8; 16]) {
        let id = halves(quota);
        let bucket = &self.0[(id[0] ^ id[1]) as usize % BUCKETS];
        let _held = bucket.lock.hold();
        let mut room = None;
        for wish in &bucket.wishes {
            let of = wish.database.load(Relaxed);
            if of == database && wish.id() == id {
                return;
            }
            if of == 0 {
                room = room.or(Some(wish));
            }
        }
        // A database that has no daemon must not keep others from wishing.
        let wish = room.unwrap_or(&bucket.wishes[(id[0] >> 32) as usize % WISHES_PER_BUCKET]);
        for (to, from) in wish.quota.iter().zip(id) {
            to.store(from, Relaxed);
        }
        wish.database.store(database, Relaxed);
    }

    /// All wishes of a database, at most some thousand, which are gone then.
    pub(super) fn take(&self, database: u32) -> Vec<[u8; 16]> {
        let mut all = Vec::new();
        for bucket in &self.0 {
            let mut taken = [None; WISHES_PER_BUCKET];
            {
                let _held = bucket.lock.hold();
                for (to, wish) in taken.iter_mut().zip(&bucket.wishes) {
                    if wish.database.load(Relaxed) == database {
                        wish.database.store(0, Relaxed);
                        *to = Some(wish.id());
                    }
                }
            }
            all.extend(taken.into_iter().flatten().map(joined));
        }
        all
    }
}

impl Wish {
    fn id(&self) -> [u64; 2] {
        [self.quota[0].load(Relaxed), self.quota[1].load(Relaxed)]
    }
}

fn halves(bytes: &[u8; 16]) -> [u64; 2] {
    let number = u128::from_be_bytes(*bytes);
    [(number >> 64) as u64, number as u64]
}

fn joined([high, low]: [u64; 2]) -> [u8; 16] {
    (u128::from(high) << 64 | u128::from(low)).to_be_bytes()
}
