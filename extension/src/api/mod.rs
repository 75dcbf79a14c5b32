//! The functions that users call. Each is thin: it reads its arguments, calls the inner modules and forms a result. Its
//! `CREATE FUNCTION`, comment and grants are in `sql/schema`, under the same name.

mod access;
mod audit;
mod derive;
mod exchange;
mod findings;
mod identity;
mod internal;
mod issue;
mod issuers;
mod keys;
mod leadership;
mod quotas;
mod replication;
mod rotate;
mod scopes;
mod services;
mod sessions;
mod stats;
mod urls;
mod usage;
mod users;
mod verify;

pub(crate) fn init() {
    replication::init();
}
