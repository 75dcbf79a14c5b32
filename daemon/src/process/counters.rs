//! What this process counts of itself, where it happens; `/metrics` reads it.

use std::sync::atomic::{AtomicU64, Ordering};

/// A number that only grows, or a level that goes up and down.
#[derive(Debug, Default)]
pub struct Count(AtomicU64);

impl Count {
    const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    pub fn add(&self, number: u64) {
        self.0.fetch_add(number, Ordering::Relaxed);
    }

    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// One more, until the guard is dropped.
    pub fn hold(&'static self) -> Held {
        self.add(1);
        Held(self)
    }
}

/// See [`Count::hold`].
#[derive(Debug)]
pub struct Held(&'static Count);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Attempts to connect to the server that failed.
pub static CONNECT_FAILURES: Count = Count::new();
/// Times that LISTEN began, which is once more than it was lost.
pub static LISTENS: Count = Count::new();
/// Readers of `/events` now, those refused, and the events that were sent to them.
pub static STREAMS: Count = Count::new();
pub static STREAMS_REFUSED: Count = Count::new();
pub static STREAMED_EVENTS: Count = Count::new();
/// Attempts to send a webhook, by what came of them.
pub static WEBHOOKS_DELIVERED: Count = Count::new();
pub static WEBHOOKS_FAILED: Count = Count::new();
/// Credentials that were verified for HTTP, and the statements that did it.
pub static VERIFIED: Count = Count::new();
pub static VERIFY_STATEMENTS: Count = Count::new();
/// Leases of quotas that were granted.
pub static QUOTAS_LEASED: Count = Count::new();
/// Attempts to fetch the keys of an issuer, by what came of them.
pub static KEYS_FETCHED: Count = Count::new();
pub static KEY_FETCHES_FAILED: Count = Count::new();
