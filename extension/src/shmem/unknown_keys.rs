//! When a token of a trusted issuer was last presented that a key has signed which the issuer does not have: it may have a
//! new one. The daemon asks for this, and fetches the keys at most once a minute for each issuer, whatever is presented.
//!
//! Nothing is locked and nothing is exact. Issuers that fall on the same slot replace each other, and a reader may see
//! the name of one with the time of the other: the next token corrects that.

use core::sync::atomic::{AtomicI64, AtomicU64, Ordering::Relaxed};
use tollgate_core::token;

const SLOTS: usize = 1024;

/// All zero: empty.
#[repr(C)]
#[derive(Default)]
struct Slot {
    whose: AtomicU64,
    /// Microseconds since 2000-01-01.
    at: AtomicI64,
}

#[repr(C, align(64))]
pub(super) struct UnknownKeys([Slot; SLOTS]);

impl UnknownKeys {
    pub(super) fn note(&self, database: u32, issuer: &str, now: i64) {
        let whose = whose(database, issuer);
        let slot = self.slot(whose);
        slot.at.store(now, Relaxed);
        slot.whose.store(whose, Relaxed);
    }

    pub(super) fn at(&self, database: u32, issuer: &str) -> Option<i64> {
        let whose = whose(database, issuer);
        let slot = self.slot(whose);
        (slot.whose.load(Relaxed) == whose).then(|| slot.at.load(Relaxed))
    }

    fn slot(&self, whose: u64) -> &Slot {
        &self.0[whose as usize % SLOTS]
    }
}

/// Memory is of the whole cluster, and an issuer may be trusted by several databases. Never 0.
fn whose(database: u32, issuer: &str) -> u64 {
    let digest = token::digest(format!("{database} {issuer}").as_bytes());
    u64::from_be_bytes(*digest.first_chunk().expect("a digest is longer")) | 1 << 63
}
