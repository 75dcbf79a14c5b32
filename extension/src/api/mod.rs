//! What users call. Each function here is thin: it reads its arguments, asks the inner modules and forms a result. Its
//! `CREATE FUNCTION`, comment and grants stand in `sql/schema`, under the same name.

mod audit;
mod context;
mod derive;
mod internal;
mod issue;
mod leadership;
mod rotate;
mod scopes;
mod stats;
mod usage;
mod users;
pub(crate) mod verify;
