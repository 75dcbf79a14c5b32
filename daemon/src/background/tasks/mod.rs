//! What runs in the background, one file a task. The driver says when; see [`crate::background::driver::Task`] for the rules.

pub mod announce_expiries;
pub mod deliver_webhooks;
pub mod expire_tokens;
pub mod fetch_keys;
pub mod flush_standby;
pub mod flush_usage;
pub mod heartbeat;
pub mod lease_quotas;
pub mod observe;
pub mod publish_events;
pub mod purge;
pub mod purge_audit;
pub mod rotate_keys;
pub mod seal_audit;
pub mod steps;
pub mod watch_usage;

use tokio::time::Instant;

/// The name of a task that runs once for each of several servers.
fn name_at(task: &str, server: &str) -> &'static str {
    // It lives as long as the process, as the names of other tasks do.
    String::leak(format!("{task} {server}"))
}

/// Between two batches of deletions: as long as the last one took, which is the longer the busier the server is.
pub async fn rest(started: Instant) {
    tokio::time::sleep(started.elapsed()).await;
}
