//! Says that something is wrong without filling the log with it.

use std::time::Duration;

use tokio::time::Instant;

/// How long the same message is held back.
const REPEAT_AFTER: Duration = Duration::from_secs(60);

/// A condition that may fail again and again: it is said when it begins, when it changes, once a minute while it lasts
/// and when it ends.
#[derive(Debug, Default)]
pub struct FailureLog {
    failing: Option<Failing>,
}

#[derive(Debug)]
struct Failing {
    since: Instant,
    failures: u64,
    said: String,
    said_at: Instant,
}

/// How often, and for how long, it has failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tally {
    pub failures: u64,
    pub lasting: Duration,
}

impl FailureLog {
    /// Notes a failure. `Some` means: say it now.
    pub fn failed(&mut self, message: &str) -> Option<Tally> {
        let now = Instant::now();
        let Some(failing) = &mut self.failing else {
            self.failing = Some(Failing { since: now, failures: 1, said: message.to_owned(), said_at: now });
            return Some(Tally { failures: 1, lasting: Duration::ZERO });
        };
        failing.failures += 1;
        if failing.said == message && now - failing.said_at < REPEAT_AFTER {
            return None;
        }
        failing.said = message.to_owned();
        failing.said_at = now;
        Some(Tally { failures: failing.failures, lasting: now - failing.since })
    }

    /// Notes a success. `Some` means: it had been failing, say that this is over.
    pub fn recovered(&mut self) -> Option<Tally> {
        let failing = self.failing.take()?;
        Some(Tally { failures: failing.failures, lasting: failing.since.elapsed() })
    }
}

/// To what a person reads: whole milliseconds.
pub fn round(duration: Duration) -> Duration {
    Duration::from_millis(u64::try_from(duration.as_millis()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_same_failure_is_said_once_a_minute() {
        let mut log = FailureLog::default();
        assert!(log.failed("down").is_some());
        let mut said = 0;
        for _ in 0..180 {
            tokio::time::advance(Duration::from_secs(1)).await;
            said += u32::from(log.failed("down").is_some());
        }
        assert_eq!(said, 3);
    }

    #[tokio::test(start_paused = true)]
    async fn another_failure_is_said_at_once() {
        let mut log = FailureLog::default();
        assert!(log.failed("down").is_some());
        assert!(log.failed("down").is_none());
        assert_eq!(log.failed("refused"), Some(Tally { failures: 3, lasting: Duration::ZERO }));
    }

    #[tokio::test(start_paused = true)]
    async fn the_end_is_said_once_and_counts_what_was_not_said() {
        let mut log = FailureLog::default();
        assert_eq!(log.recovered(), None);
        log.failed("down");
        log.failed("down");
        tokio::time::advance(Duration::from_secs(7)).await;
        assert_eq!(log.recovered(), Some(Tally { failures: 2, lasting: Duration::from_secs(7) }));
        assert_eq!(log.recovered(), None);
    }
}
