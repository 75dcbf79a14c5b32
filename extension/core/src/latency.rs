//! The latency of verifications: a histogram per database, made of atomics, so that it can be in shared memory.
//! Recording takes no lock and cannot fail.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering::*};

/// The upper bounds of the buckets in nanoseconds, from a microsecond to a second; one more bucket is for longer ones.
pub const BOUNDS: [u64; 19] = [
    1_000,
    2_500,
    5_000,
    10_000,
    25_000,
    50_000,
    100_000,
    250_000,
    500_000,
    1_000_000,
    2_500_000,
    5_000_000,
    10_000_000,
    25_000_000,
    50_000_000,
    100_000_000,
    250_000_000,
    500_000_000,
    1_000_000_000,
];
pub const BUCKETS: usize = BOUNDS.len() + 1;
/// Number of databases of one server that are measured at the same time.
pub const MAX_DATABASES: usize = 64;

const FREE: u32 = 0;
/// While its counts are being cleared for another database. No database has this OID.
const CLEARING: u32 = u32::MAX;

#[repr(C, align(64))]
#[derive(Default)]
pub struct Histogram {
    database: AtomicU32,
    nanoseconds: AtomicU64,
    counts: [AtomicU64; BUCKETS],
}

/// The content of a histogram.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Measured {
    /// The count of each bucket, not cumulative.
    pub counts: [u64; BUCKETS],
    /// The sum of all durations.
    pub nanoseconds: u64,
}

impl Histogram {
    pub fn record(&self, nanoseconds: u64) {
        let bucket = BOUNDS.partition_point(|&bound| bound < nanoseconds);
        self.counts[bucket].fetch_add(1, Relaxed);
        self.nanoseconds.fetch_add(nanoseconds, Relaxed);
    }
}

/// All zero is a valid start.
#[repr(C)]
pub struct Latencies([Histogram; MAX_DATABASES]);

impl Default for Latencies {
    fn default() -> Self {
        Latencies(core::array::from_fn(|_| Histogram::default()))
    }
}

impl Latencies {
    /// The histogram of a database. If it has none, it gets a free one, or that of a dropped database; `None` if there
    /// is neither. Two concurrent callers may each get one; [`Latencies::of`] adds them up.
    pub fn claim(&self, database: u32, is_gone: impl Fn(u32) -> bool) -> Option<&Histogram> {
        let all = || self.0.iter();
        let is = |histogram: &&Histogram| histogram.database.load(Acquire) == database;
        let take = |histogram: &&Histogram, from: u32| {
            let taken = histogram.database.compare_exchange(from, CLEARING, Acquire, Relaxed).is_ok();
            if taken {
                histogram.nanoseconds.store(0, Relaxed);
                histogram.counts.iter().for_each(|count| count.store(0, Relaxed));
                histogram.database.store(database, Release);
            }
            taken
        };
        all().find(is).or_else(|| all().find(|one| take(one, FREE))).or_else(|| {
            all().find(|one| {
                let other = one.database.load(Relaxed);
                other != CLEARING && is_gone(other) && take(one, other)
            })
        })
    }

    /// The measurements of a database; `None` if it has no histogram and none is free.
    pub fn of(&self, database: u32) -> Option<Measured> {
        let mut measured = None;
        for histogram in &self.0 {
            let its = histogram.database.load(Acquire);
            if its == FREE {
                measured.get_or_insert_with(Measured::default);
            } else if its == database {
                let sum = measured.get_or_insert_with(Measured::default);
                sum.nanoseconds = sum.nanoseconds.wrapping_add(histogram.nanoseconds.load(Relaxed));
                for (sum, count) in sum.counts.iter_mut().zip(&histogram.counts) {
                    *sum += count.load(Relaxed);
                }
            }
        }
        measured
    }
}

/// One in this many of a process's verifications is measured. A prime number, so that it does not coincide with a
/// pattern of an application.
pub const ONE_IN: u32 = 61;

/// Counts down to the next verification that is measured. It belongs to one process.
#[derive(Default)]
pub struct Countdown(AtomicU32);

impl Countdown {
    pub const fn new() -> Self {
        Countdown(AtomicU32::new(0))
    }

    /// Whether this one is measured. The first is one of the first [`ONE_IN`], chosen by `seed`: otherwise connections
    /// that verify once would always be measured, with cold caches, or never.
    #[inline]
    pub fn is_due(&self, seed: impl FnOnce() -> u32) -> bool {
        let left = match self.0.load(Relaxed) {
            0 => 1 + seed() % ONE_IN,
            left => left,
        };
        self.0.store(if left > 1 { left - 1 } else { ONE_IN }, Relaxed);
        left == 1
    }
}
