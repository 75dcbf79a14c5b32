//! What users call. Each function here is thin: it reads its arguments, asks the inner modules and forms a result. Its
//! `CREATE FUNCTION`, comment and grants stand in `sql/schema`, under the same name.

mod audit;
mod derive;
mod findings;
mod identity;
mod internal;
mod issue;
mod leadership;
mod replication;
mod rotate;
mod scopes;
mod stats;
mod usage;
mod users;
mod verify;

pub(crate) fn init() {
    replication::init();
}
