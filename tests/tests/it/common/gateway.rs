//! The login of the HTTP API: a role with the capability gateway and no other.

use anyhow::Result;
use tollgate_tests::Cluster;

/// An ordinary role that may do what the HTTP API needs, and nothing else.
pub(crate) const GATEWAY: &str = "gateway_login";

/// Grants that role, which is created at the first call, its capability in a database.
pub(crate) fn grant(cluster: &Cluster, database: &str) -> Result<()> {
    cluster.execute(
        database,
        "do $$ begin
             create role gateway_login login;
         exception when duplicate_object or unique_violation then
             -- Another test was faster.
         end $$;
         select tollgate.grant_capability('gateway_login', 'gateway')",
    )
}
