//! The SQL contract with the extension: every statement that we send to it, and the shapes that come back.
//!
//! Names here are the names there. Statements are not kept prepared: they are few, and one that outlives an
//! ALTER EXTENSION would fail until its session ends.

pub mod audit;
pub mod daemons;
pub mod document;
pub mod events;
pub mod findings;
pub mod health;
pub mod housekeeping;
pub mod leadership;
mod query;
pub mod schema;
pub mod scopes;
pub mod stats;
pub mod tokens;
pub mod usage;
pub mod webhooks;

pub use audit::*;
pub use daemons::*;
pub use events::*;
pub use findings::*;
pub use health::*;
pub use housekeeping::*;
pub use leadership::*;
pub use schema::*;
pub use scopes::*;
pub use stats::*;
pub use tokens::*;
pub use usage::*;
pub use webhooks::*;

/// The functions that the daemon calls, each of which its role must be allowed to execute.
pub const OPERATOR_FUNCTIONS: [&str; 33] = [
    "ack_usage",
    "acquire_leadership",
    "admit_event_reader",
    "advance_subscription",
    "announce_expiries",
    "announce_expiries_after",
    "apply_findings",
    "apply_usage",
    "check_leadership",
    "claim_webhook_deliveries",
    "deployment_health",
    "drain_findings",
    "drain_usage",
    "event_position",
    "has_events",
    "expire_tokens",
    "expire_tokens_after",
    "finish_webhook_delivery",
    "open_subscription",
    "purge_audit_log",
    "purge_tokens",
    "purge_tokens_after",
    "purge_usage",
    "purge_usage_after",
    "purge_webhook_deliveries",
    "queue_webhook_deliveries",
    "read_events",
    "report_daemon",
    "seal_audit_log",
    "stats",
    "subscription_backlogs",
    "usage_applied",
    "usage_pressure",
];
