//! How the process ends: one token that everything waits on, one tracker that everything runs in.
//!
//! Everything that runs here is long-lived and ends only on request. If it ends by itself, the process would look healthy
//! without it, so that is a fault, which is logged by name and stops everything else.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::error::Result;

#[derive(Clone, Debug, Default)]
pub struct Shutdown {
    token: CancellationToken,
    tracker: TaskTracker,
    /// Names by a number of their own, since nothing says that names are unique.
    running: Arc<Mutex<Running>>,
    fault: Arc<OnceLock<String>>,
}

#[derive(Debug, Default)]
struct Running {
    next: u64,
    names: BTreeMap<u64, &'static str>,
}

impl Shutdown {
    /// Cancelled when the process is to stop, for whatever reason.
    pub fn token(&self) -> &CancellationToken {
        &self.token
    }

    /// Asks everything to stop.
    pub fn begin(&self) {
        self.token.cancel();
    }

    /// What ended by itself, and why: the reason for an unrequested shutdown.
    pub fn fault(&self) -> Option<&str> {
        self.fault.get().map(String::as_str)
    }

    /// Runs a future that must not end before the token is cancelled.
    pub fn spawn<F>(&self, name: &'static str, future: F)
    where
        F: Future<Output = Result<()>> + Send + 'static,
    {
        let number = {
            let mut running = self.running();
            running.next += 1;
            let number = running.next;
            running.names.insert(number, name);
            number
        };
        // A task of its own, so that a panic comes back as a value.
        let handle = self.tracker.spawn(future);
        let shutdown = self.clone();
        self.tracker.spawn(async move {
            let ended = handle.await;
            let asked = shutdown.token.is_cancelled();
            let fault = match ended {
                Ok(Ok(())) if asked => None,
                Ok(Ok(())) => Some(format!("{name} ended without being asked to")),
                Ok(Err(error)) if asked => {
                    tracing::warn!(task = name, %error, "failed while stopping");
                    None
                }
                Ok(Err(error)) => Some(format!("{name} ended: {error}")),
                Err(failure) if failure.is_panic() => {
                    Some(format!("{name} panicked: {}", panic_text(failure)))
                }
                // The runtime is going down and takes its tasks with it.
                Err(_) => None,
            };
            if let Some(fault) = fault {
                tracing::error!(task = name, "{fault}; stopping the process");
                // The first fault is the cause; what falls over after it is not.
                let _ = shutdown.fault.set(fault);
                shutdown.token.cancel();
            }
            shutdown.running().names.remove(&number);
        });
    }

    /// Waits for everything to end, once [`Shutdown::begin`] was called. The error names what was still running when
    /// the grace was over.
    pub async fn drain(&self, grace: Duration) -> std::result::Result<(), Vec<&'static str>> {
        self.tracker.close();
        match tokio::time::timeout(grace, self.tracker.wait()).await {
            Ok(()) => Ok(()),
            Err(_) => Err(self.running().names.values().copied().collect()),
        }
    }

    fn running(&self) -> std::sync::MutexGuard<'_, Running> {
        // A map of names is whole after every statement, so a poisoned lock says nothing about it.
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn panic_text(failure: tokio::task::JoinError) -> String {
    let payload = failure.into_panic();
    payload
        .downcast_ref::<&str>()
        .map(ToString::to_string)
        .or_else(|| payload.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "for a reason that is no text".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    #[tokio::test(start_paused = true)]
    async fn what_stops_when_asked_is_no_fault() {
        let shutdown = Shutdown::default();
        let token = shutdown.token().clone();
        shutdown.spawn("patient", async move {
            token.cancelled().await;
            Ok(())
        });
        shutdown.begin();
        assert_eq!(shutdown.drain(Duration::from_secs(1)).await, Ok(()));
        assert_eq!(shutdown.fault(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn what_returns_by_itself_stops_everything_and_is_named() {
        let shutdown = Shutdown::default();
        shutdown.spawn("hasty", async { Ok(()) });
        shutdown.token().cancelled().await;
        assert_eq!(shutdown.drain(Duration::from_secs(1)).await, Ok(()));
        assert!(shutdown.fault().is_some_and(|fault| fault.starts_with("hasty ended")));
    }

    #[tokio::test(start_paused = true)]
    async fn an_error_and_a_panic_are_named_with_their_text() {
        let shutdown = Shutdown::default();
        shutdown.spawn("broken", async { Err(Error::failed("no more socks")) });
        shutdown.token().cancelled().await;
        assert!(shutdown.fault().is_some_and(|fault| fault.contains("no more socks")));

        let shutdown = Shutdown::default();
        shutdown.spawn("panicky", async { panic!("out of {}", "shoes") });
        shutdown.token().cancelled().await;
        assert!(shutdown.fault().is_some_and(|fault| fault.contains("panicked: out of shoes")));
    }

    #[tokio::test(start_paused = true)]
    async fn what_outlives_the_grace_is_named_and_nothing_else_is() {
        let shutdown = Shutdown::default();
        let token = shutdown.token().clone();
        shutdown.spawn("patient", async move {
            token.cancelled().await;
            Ok(())
        });
        shutdown.spawn("stuck", std::future::pending());
        shutdown.begin();
        assert_eq!(shutdown.drain(Duration::from_secs(5)).await, Err(vec!["stuck"]));
    }
}
