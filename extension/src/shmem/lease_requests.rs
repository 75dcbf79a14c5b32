//! Quotas of which this server should lease more, for the daemon to take. A request that finds no room, or that a daemon
//! takes and then fails, is made again by a later use of the quota.

use super::spin::SpinLock;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use tollgate_core::usage_table::SpinLock as _;

const BUCKETS: usize = 64;
const REQUESTS_PER_BUCKET: usize = 32;

/// All zero: none.
#[repr(C)]
#[derive(Default)]
struct Request {
    quota: [AtomicU64; 2],
    database: AtomicU32,
}

/// Protected by its lock.
#[repr(C, align(64))]
#[derive(Default)]
struct Bucket {
    lock: SpinLock,
    requests: [Request; REQUESTS_PER_BUCKET],
}

#[repr(C, align(64))]
pub(super) struct LeaseRequests([Bucket; BUCKETS]);

impl LeaseRequests {
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
        for request in &bucket.requests {
            let of = request.database.load(Relaxed);
            if of == database && request.id() == id {
                return;
            }
            if of == 0 {
                room = room.or(Some(request));
            }
        }
        // A database that has no daemon must not keep others from asking.
        let request = room.unwrap_or(&bucket.requests[(id[0] >> 32) as usize % REQUESTS_PER_BUCKET]);
        for (to, from) in request.quota.iter().zip(id) {
            to.store(from, Relaxed);
        }
        request.database.store(database, Relaxed);
    }

    /// All requests of a database, at most some thousand, which are gone then.
    pub(super) fn take(&self, database: u32) -> Vec<[u8; 16]> {
        let mut all = Vec::new();
        for bucket in &self.0 {
            let mut taken = [None; REQUESTS_PER_BUCKET];
            {
                let _held = bucket.lock.hold();
                for (to, request) in taken.iter_mut().zip(&bucket.requests) {
                    if request.database.load(Relaxed) == database {
                        request.database.store(0, Relaxed);
                        *to = Some(request.id());
                    }
                }
            }
            all.extend(taken.into_iter().flatten().map(joined));
        }
        all
    }
}

impl Request {
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
