//! Times a sample of verifications, from the call to the moment when its outcome is counted. Two clock readings and two
//! additions in shared memory are too expensive for each, and a few thousand give the same result.

use super::backend::{database, database_exists, process};
use super::segment::segment;
use std::sync::OnceLock;
use std::time::Instant;
use tollgate_core::latency::{Countdown, Histogram};

static COUNTDOWN: Countdown = Countdown::new();

/// The start of a measured verification.
#[derive(Clone, Copy)]
pub(crate) struct Timer {
    histogram: &'static Histogram,
    since: Instant,
}

impl Timer {
    /// Called before anything else. `None` for a verification that is not measured.
    #[inline]
    pub(crate) fn start() -> Option<Self> {
        if COUNTDOWN.is_due(|| process() as u32) { Timer::begin() } else { None }
    }

    #[cold]
    fn begin() -> Option<Self> {
        let histogram = histogram()?;
        Some(Timer { histogram, since: Instant::now() })
    }

    #[cold]
    pub(crate) fn stop(self) {
        self.histogram.record(u64::try_from(self.since.elapsed().as_nanos()).unwrap_or(u64::MAX));
    }
}

/// The histogram of this database. If there is none, the next measurement tries again: another database may have been
/// dropped by then.
fn histogram() -> Option<&'static Histogram> {
    static MINE: OnceLock<&'static Histogram> = OnceLock::new();
    if let Some(mine) = MINE.get() {
        return Some(mine);
    }
    let histogram = segment()?.latencies.claim(database(), |oid| !database_exists(oid))?;
    Some(MINE.get_or_init(|| histogram))
}
