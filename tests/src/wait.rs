//! Waiting for a condition, with a deadline.

use std::time::{Duration, Instant};

const PAUSE: Duration = Duration::from_millis(20);

/// Returns once `condition` holds; panics with `what` if it does not within `deadline`.
#[track_caller]
pub fn eventually(deadline: Duration, what: &str, mut condition: impl FnMut() -> bool) {
    assert!(holds_within(deadline, &mut condition), "waited {deadline:?} in vain for {what}");
}

/// [`eventually`], for a condition that queries the database.
pub async fn eventually_async(deadline: Duration, what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let end = Instant::now() + deadline;
    while !condition().await {
        assert!(Instant::now() < end, "waited {deadline:?} in vain for {what}");
        tokio::time::sleep(PAUSE).await;
    }
}

pub(crate) fn holds_within(deadline: Duration, condition: &mut dyn FnMut() -> bool) -> bool {
    let end = Instant::now() + deadline;
    loop {
        if condition() {
            return true;
        }
        if Instant::now() >= end {
            return false;
        }
        std::thread::sleep(PAUSE);
    }
}
