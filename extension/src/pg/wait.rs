//! Waiting in a backend, without being deaf to cancel and terminate.
#![allow(unsafe_code)]

use core::time::Duration;
use pgrx::pg_sys;
use std::time::Instant;

/// Waits until a condition holds, at most for a time; looks every 10 ms.
pub(crate) fn until(at_most: Duration, holds: impl Fn() -> bool) {
    let start = Instant::now();
    while !holds() && start.elapsed() < at_most {
        pg_sys::check_for_interrupts!();
        // SAFETY: sleeps.
        unsafe { pg_sys::pg_usleep(10_000) };
    }
}
