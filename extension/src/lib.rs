//! Tollgate: API tokens inside PostgreSQL. This file only wires the modules together.
//!
//! Where to look: what users call is in `api`, one function by the name SQL gives it; where our tables are touched, in
//! `store`; how a verification in FROM is executed, in `scan`; where memory is
//! shared between backends, in `shmem`; the identity of a transaction, in `context`; how errors of PostgreSQL pass through Rust,
//! in `guard`; the rules themselves, free of PostgreSQL, in the crate `tollgate-core`. What needs secrecy, hashing or speed is written in Rust; statements over
//! sets of rows are written in SQL, in `sql/schema`, where every object stands with its comment.

use pgrx::prelude::*;

mod api;
mod compat;
mod context;
mod datum;
mod error;
mod fields;
mod fmgr;
mod guard;
mod guc;
mod limits;
mod log;
mod prefetch;
mod presented;
mod refusal;
mod scan;
mod shmem;
mod store;
mod sys;

#[cfg(any(test, feature = "pg_test"))]
mod tests;

pgrx::pg_module_magic!(name, version);

/// Called once per process when the library is loaded: by the postmaster if it is in `shared_preload_libraries`, else
/// by each backend at its first use.
#[allow(unsafe_code)]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn _PG_init() {
    guard::init();
    // SAFETY: called by PostgreSQL, in a frame that owns nothing.
    unsafe {
        guard::entry(|| {
            guc::init();
            context::init();
            shmem::init();
            guc::reserve_prefix();
            store::init();
            scan::init();
            api::init();
        });
    }
}

extension_sql_file!("../../sql/schema/install.sql", name = "install", bootstrap);
extension_sql_file!("../../sql/schema/replication.sql", name = "replication", requires = ["install"]);
extension_sql_file!("../../sql/schema/epochs.sql", name = "epochs", requires = ["replication"]);
extension_sql_file!("../../sql/schema/audit.sql", name = "audit", requires = ["epochs"]);
extension_sql_file!("../../sql/schema/events.sql", name = "events", requires = ["audit"]);
extension_sql_file!("../../sql/schema/seals.sql", name = "seals", requires = ["events"]);
extension_sql_file!("../../sql/schema/tokens.sql", name = "tokens", requires = ["seals"]);
extension_sql_file!("../../sql/schema/scopes.sql", name = "scopes", requires = ["tokens"]);
extension_sql_file!("../../sql/schema/usage.sql", name = "usage", requires = ["scopes"]);
extension_sql_file!("../../sql/schema/verify.sql", name = "verify", requires = ["usage"]);
extension_sql_file!("../../sql/schema/issue.sql", name = "issue", requires = ["verify"]);
extension_sql_file!("../../sql/schema/families.sql", name = "families", requires = ["issue"]);
extension_sql_file!("../../sql/schema/lifecycle.sql", name = "lifecycle", requires = ["families"]);
extension_sql_file!("../../sql/schema/revoke.sql", name = "revoke", requires = ["lifecycle"]);
extension_sql_file!("../../sql/schema/findings.sql", name = "findings", requires = ["revoke"]);
extension_sql_file!("../../sql/schema/users_table.sql", name = "users_table", requires = ["findings"]);
extension_sql_file!("../../sql/schema/housekeeping.sql", name = "housekeeping", requires = ["users_table"]);
extension_sql_file!("../../sql/schema/webhooks.sql", name = "webhooks", requires = ["housekeeping"]);
extension_sql_file!("../../sql/schema/leadership.sql", name = "leadership", requires = ["webhooks"]);
extension_sql_file!("../../sql/schema/stats.sql", name = "stats", requires = ["leadership"]);
extension_sql_file!("../../sql/schema/health.sql", name = "health", requires = ["stats"]);
extension_sql_file!("../../sql/schema/decisions.sql", name = "decisions", requires = ["health"]);
extension_sql_file!("../../sql/schema/capabilities.sql", name = "capabilities", requires = ["decisions"]);
extension_sql_file!(
    "../../sql/schema/privileges.sql",
    name = "privileges",
    requires = ["capabilities"],
    finalize
);

/// What `cargo pgrx test` asks of the crate: the settings of its test server.
#[cfg(test)]
pub mod pg_test {
    pub fn setup(_options: Vec<&str>) {}

    #[must_use]
    pub fn postgresql_conf_options() -> Vec<&'static str> {
        vec!["shared_preload_libraries = 'tollgate'", "tollgate.max_tracked_keys = 16384"]
    }
}
