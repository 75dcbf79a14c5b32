//! Notifies the service manager, if one started us (NOTIFY_SOCKET): that we are up, that we are alive, that we stop.
//!
//! Up means that everything runs, not that the database answers: it may come up after us, and is waited for without end. The
//! status line, which `systemctl status` shows, says which of the two it is.

use std::time::Duration;

use sd_notify::NotifyState;
use tokio::task::JoinHandle;

/// To be called once everything runs. The sign of life is given by the loop that everything else runs on, and ends with it.
pub fn ready(status: &str) -> Watchdog {
    notify(&[NotifyState::Ready, NotifyState::Status(status)]);
    let Some(limit) = sd_notify::watchdog_enabled() else { return Watchdog(None) };
    Watchdog(Some(tokio::spawn(async move {
        let mut ticks = tokio::time::interval(period(limit));
        loop {
            ticks.tick().await;
            notify(&[NotifyState::Watchdog]);
        }
    })))
}

pub fn stopping() {
    notify(&[NotifyState::Stopping, NotifyState::Status("finishing what was begun, and flushing usage")]);
}

/// Gives signs of life until it is dropped.
#[derive(Debug)]
pub struct Watchdog(Option<JoinHandle<()>>);

impl Drop for Watchdog {
    fn drop(&mut self) {
        if let Some(task) = &self.0 {
            task.abort();
        }
    }
}

/// As sd_watchdog_enabled(3) advises, with room for one that comes late.
fn period(limit: Duration) -> Duration {
    (limit / 3).max(Duration::from_millis(10))
}

/// A failure is only logged: the service manager notices by itself when nothing comes.
fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!(%error, "could not notify the service manager");
    }
}
