//! A limit on how often something is done, shared by all callers: a number per second, and no more than one second's
//! worth at once.
//!
//! The generic cell rate algorithm: the only state is the moment up to which the allowance is spent. It is stored in
//! atomics that are valid when zero, so that it can be in shared memory.

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering::Relaxed};

const SECOND: i64 = 1_000_000;

#[derive(Debug, Default)]
pub struct Throttle {
    /// In microseconds, by the same clock as `now`.
    spent_until: AtomicI64,
    refused: AtomicU64,
}

impl Throttle {
    /// With the full allowance.
    pub const fn new() -> Throttle {
        Throttle { spent_until: AtomicI64::new(0), refused: AtomicU64::new(0) }
    }

    /// Whether it may be done at `now` (microseconds); if so, how often it was refused since the last time. A clock
    /// that was set back delays it by at most a second.
    pub fn admit(&self, now: i64, per_second: u32) -> Option<u64> {
        self.admit_each(now, (SECOND / i64::from(per_second.max(1))).max(1), SECOND)
    }

    /// The same, at most once in `interval` (microseconds), with no more than one saved up.
    pub fn admit_once_in(&self, now: i64, interval: i64) -> Option<u64> {
        self.admit_each(now, interval, interval)
    }

    fn admit_each(&self, now: i64, interval: i64, saved_up: i64) -> Option<u64> {
        let admitted = self.spent_until.fetch_update(Relaxed, Relaxed, |spent| {
            let behind = now.saturating_sub(saved_up);
            let ahead = spent.saturating_sub(now) > saved_up;
            let spent = if ahead { behind } else { spent.max(behind) };
            let next = spent.saturating_add(interval);
            (next <= now).then_some(next)
        });
        if admitted.is_err() {
            self.refused.fetch_add(1, Relaxed);
            return None;
        }
        Some(self.refused.swap(0, Relaxed))
    }
}
