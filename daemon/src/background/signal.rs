//! Wakes a task or a stream early.

use std::sync::Arc;

use tokio::sync::Notify;

/// Wakes a task before its period is over. Signals that come while it runs count as one, and are not lost.
#[derive(Clone, Debug, Default)]
pub struct Signal(Arc<Notify>);

impl Signal {
    pub fn wake(&self) {
        self.0.notify_one();
    }

    /// Resolves once for any number of [`Signal::wake`] since the last time.
    pub async fn woken(&self) {
        self.0.notified().await;
    }
}
