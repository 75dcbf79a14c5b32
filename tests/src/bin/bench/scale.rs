//! The sizes of what is measured.

use std::time::Duration;

/// The sizes of a run.
pub(crate) struct Scale {
    pub(crate) tokens: u32,
    /// The smaller table, for measuring growth.
    pub(crate) few: u32,
    pub(crate) many: u32,
    pub(crate) clients: usize,
    pub(crate) rounds: u32,
    pub(crate) turn: Duration,
    pub(crate) soak: Duration,
    /// The daemon's flush interval.
    pub(crate) flush_interval: Duration,
    /// Calls per statement, for measurements inside a backend.
    pub(crate) calls: u32,
    /// Rows of the table with policies.
    pub(crate) rows: u32,
    /// Tokens in one flush.
    pub(crate) flushed: u32,
    /// Ended tokens that are deleted.
    pub(crate) ended: u32,
}
