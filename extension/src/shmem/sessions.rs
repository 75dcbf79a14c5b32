//! Counters of sessions, of the whole server, since it was started. Refreshing leaves no event in the audit log, so these
//! say how many there were.

use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SessionEvent {
    Opened,
    Refreshed,
    /// A token that was just replaced got its successor again.
    Retried,
    /// A token was refused.
    Refused,
    /// A token ended its session.
    Reused,
}

impl SessionEvent {
    pub(crate) const ALL: [SessionEvent; 5] = [
        SessionEvent::Opened,
        SessionEvent::Refreshed,
        SessionEvent::Retried,
        SessionEvent::Refused,
        SessionEvent::Reused,
    ];

    pub(crate) fn as_str(self) -> &'static str {
        match self {
            SessionEvent::Opened => "opened",
            SessionEvent::Refreshed => "refreshed",
            SessionEvent::Retried => "retried",
            SessionEvent::Refused => "refused",
            SessionEvent::Reused => "reused",
        }
    }
}

/// All zero is a valid value.
#[repr(C, align(64))]
#[derive(Default)]
pub(super) struct Sessions([AtomicU64; SessionEvent::ALL.len()]);

impl Sessions {
    pub(super) fn count(&self, event: SessionEvent) {
        self.0[event as usize].fetch_add(1, Relaxed);
    }

    pub(super) fn of(&self, event: SessionEvent) -> u64 {
        self.0[event as usize].load(Relaxed)
    }
}
