//! How long to wait between attempts: longer each time, up to a few seconds, and not in step with other processes.

use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};

const FIRST: Duration = Duration::from_millis(200);
/// Short enough that a server that recovers is used soon, long enough not to slow its recovery. Jitter adds up to as much
/// again.
const LONGEST: Duration = Duration::from_secs(5);

/// Delays without end.
#[derive(Debug)]
pub struct Delays(ExponentialBackoff);

/// From the first delay on; to be called after every success.
pub fn delays() -> Delays {
    Delays(
        ExponentialBuilder::new()
            .with_min_delay(FIRST)
            .with_max_delay(LONGEST)
            .with_factor(2.0)
            .with_jitter()
            .without_max_times()
            .build(),
    )
}

impl Delays {
    pub fn next_delay(&mut self) -> Duration {
        self.0.next().unwrap_or(LONGEST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_grow_from_the_first_to_the_longest_and_never_end() {
        let mut delays = delays();
        let all: Vec<Duration> = std::iter::repeat_with(|| delays.next_delay()).take(1000).collect();
        assert!(all[0] >= FIRST && all[0] <= 2 * FIRST, "{:?}", all[0]);
        assert!(all.iter().all(|delay| *delay <= 2 * LONGEST), "{:?}", all.iter().max());
        assert!(all[20..].iter().all(|delay| *delay >= LONGEST), "{:?}", all[20..].iter().min());
    }

    #[test]
    fn two_that_fail_together_do_not_retry_together() {
        let (mut one, mut other) = (delays(), delays());
        let differ = (0..20).filter(|_| one.next_delay() != other.next_delay()).count();
        assert!(differ > 10, "{differ} of 20 delays differ");
    }
}
