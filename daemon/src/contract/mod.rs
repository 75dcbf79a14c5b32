//! The SQL contract with the extension: every statement that we send to it, and the shapes that come back.
//!
//! Names here are the names there. Statements are not kept prepared: they are few, and one that outlives an
//! ALTER EXTENSION would fail until its session ends.
//!
//! Which role may call which function is decided in the database (`tollgate.capability_privileges`), and is asked for there.

pub mod audit;
pub mod capabilities;
pub mod daemons;
pub mod document;
pub mod events;
pub mod findings;
pub mod health;
pub mod housekeeping;
pub mod import_keys;
pub mod issuers;
pub mod keys;
pub mod leadership;
mod query;
pub mod quotas;
pub mod schema;
pub mod scopes;
pub mod services;
pub mod sessions;
pub mod stats;
pub mod tokens;
pub mod url_keys;
pub mod usage;
pub mod verifications;
pub mod webhooks;

pub use audit::*;
pub use capabilities::*;
pub use daemons::*;
pub use events::*;
pub use findings::*;
pub use health::*;
pub use housekeeping::*;
pub use import_keys::*;
pub use issuers::*;
pub use keys::*;
pub use leadership::*;
pub use quotas::*;
pub use schema::*;
pub use scopes::*;
pub use services::*;
pub use sessions::*;
pub use stats::*;
pub use tokens::*;
pub use url_keys::*;
pub use usage::*;
pub use verifications::*;
pub use webhooks::*;
