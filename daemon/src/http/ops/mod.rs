//! The routes of the ops listener.

mod health;
mod metrics;

pub(super) use health::{livez, readyz};
pub use metrics::Metrics;
pub(super) use metrics::metrics;
