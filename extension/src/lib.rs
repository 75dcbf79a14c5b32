//! Tollgate: API tokens inside PostgreSQL. This file only wires the modules together.
//!
//! Where to find things: the functions that users call are in `api`, under the name that SQL gives them; the decision
//! about a credential in `verify`; the identity of a transaction in `identity`; issuing in `tokens`, `access`,
//! `sessions` and `services`; signed URLs in `urls`; signing keys in `keys`; access to our tables in `store`; shared memory in `shmem`; calls to PostgreSQL and
//! its errors in `pg`; the rules themselves, independent of PostgreSQL, in the crate `tollgate-core`. Code that needs secrecy, hashing or speed is written in
//! Rust; statements over sets of rows are written in SQL, in `sql/schema`, where every object has its comment.

use pgrx::prelude::*;

mod access;
mod api;
mod error;
mod guc;
mod identity;
mod keys;
mod pg;
mod services;
mod sessions;
mod shmem;
mod store;
mod tokens;
mod urls;
mod verify;

#[cfg(any(test, feature = "pg_test"))]
mod tests;

pgrx::pg_module_magic!(name, version);

/// Called once per process when the library is loaded: by the postmaster if it is in `shared_preload_libraries`,
/// otherwise by each backend at first use.
#[allow(unsafe_code)]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn _PG_init() {
    pg::guard::init();
    // SAFETY: called by PostgreSQL, in a frame that owns nothing.
    unsafe {
        pg::guard::entry(|| {
            guc::init();
            identity::init();
            shmem::init();
            keys::init();
            guc::reserve_prefix();
            store::init();
            verify::init();
            api::init();
        });
    }
}

extension_sql_file!("../../sql/schema/base/install.sql", name = "install", bootstrap);
extension_sql_file!("../../sql/schema/base/replication.sql", name = "replication", requires = ["install"]);
extension_sql_file!("../../sql/schema/base/epochs.sql", name = "epochs", requires = ["replication"]);
extension_sql_file!("../../sql/schema/audit/audit.sql", name = "audit", requires = ["epochs"]);
extension_sql_file!("../../sql/schema/audit/events.sql", name = "events", requires = ["audit"]);
extension_sql_file!("../../sql/schema/audit/seals.sql", name = "seals", requires = ["events"]);
extension_sql_file!("../../sql/schema/tokens/tokens.sql", name = "tokens", requires = ["seals"]);
extension_sql_file!("../../sql/schema/tokens/scopes.sql", name = "scopes", requires = ["tokens"]);
extension_sql_file!("../../sql/schema/usage/usage.sql", name = "usage", requires = ["scopes"]);
extension_sql_file!("../../sql/schema/quotas/quotas.sql", name = "quotas", requires = ["usage"]);
extension_sql_file!("../../sql/schema/verify/verify.sql", name = "verify", requires = ["quotas"]);
extension_sql_file!("../../sql/schema/tokens/issue.sql", name = "issue", requires = ["verify"]);
extension_sql_file!("../../sql/schema/tokens/families.sql", name = "families", requires = ["issue"]);
extension_sql_file!("../../sql/schema/tokens/lifecycle.sql", name = "lifecycle", requires = ["families"]);
extension_sql_file!("../../sql/schema/tokens/revoke.sql", name = "revoke", requires = ["lifecycle"]);
extension_sql_file!("../../sql/schema/access/access.sql", name = "access", requires = ["revoke"]);
extension_sql_file!("../../sql/schema/access/issuers.sql", name = "issuers", requires = ["access"]);
extension_sql_file!("../../sql/schema/access/exchange.sql", name = "exchange", requires = ["issuers"]);
extension_sql_file!("../../sql/schema/verify/findings.sql", name = "findings", requires = ["exchange"]);
extension_sql_file!("../../sql/schema/tokens/users_table.sql", name = "users_table", requires = ["findings"]);
extension_sql_file!(
    "../../sql/schema/base/housekeeping.sql",
    name = "housekeeping",
    requires = ["users_table"]
);
extension_sql_file!("../../sql/schema/delivery/webhooks.sql", name = "webhooks", requires = ["housekeeping"]);
extension_sql_file!("../../sql/schema/keys/keys.sql", name = "keys", requires = ["webhooks"]);
extension_sql_file!("../../sql/schema/keys/import_keys.sql", name = "import_keys", requires = ["keys"]);
extension_sql_file!("../../sql/schema/sessions/sessions.sql", name = "sessions", requires = ["import_keys"]);
extension_sql_file!("../../sql/schema/services/accounts.sql", name = "services", requires = ["sessions"]);
extension_sql_file!("../../sql/schema/services/workloads.sql", name = "workloads", requires = ["services"]);
extension_sql_file!("../../sql/schema/urls/urls.sql", name = "urls", requires = ["workloads"]);
extension_sql_file!("../../sql/schema/gateway/verify.sql", name = "gateway_verify", requires = ["urls"]);
extension_sql_file!(
    "../../sql/schema/base/leadership.sql",
    name = "leadership",
    requires = ["gateway_verify"]
);
extension_sql_file!("../../sql/schema/usage/stats.sql", name = "stats", requires = ["leadership"]);
extension_sql_file!("../../sql/schema/base/health.sql", name = "health", requires = ["stats"]);
extension_sql_file!(
    "../../sql/schema/base/privilege_decisions.sql",
    name = "privilege_decisions",
    requires = ["health"]
);
extension_sql_file!(
    "../../sql/schema/base/capabilities.sql",
    name = "capabilities",
    requires = ["privilege_decisions"]
);
extension_sql_file!(
    "../../sql/schema/base/privileges.sql",
    name = "privileges",
    requires = ["capabilities"],
    finalize
);

/// Required by `cargo pgrx test`: the settings of its test server.
#[cfg(test)]
pub mod pg_test {
    pub fn setup(_options: Vec<&str>) {}

    #[must_use]
    pub fn postgresql_conf_options() -> Vec<&'static str> {
        vec!["shared_preload_libraries = 'tollgate'", "tollgate.max_tracked_keys = 16384"]
    }
}
