//! A verification in FROM, executed by a plan node of its own.
//!
//! For `SELECT … FROM tollgate.verify_api_token($1)` PostgreSQL would form a composite value, put it into a tuplestore,
//! take it out again and tear it apart: together as costly as finding the token. A custom scan copies the columns that are
//! wanted, and no more. It changes nothing but the speed: the function is called
//! as often, checked for the same privilege, and seen by EXPLAIN under its name.
//!
//! `plan` offers the node to the planner, where the call is simple enough; `exec` runs it.

mod exec;
mod plan;

pub(crate) fn init() {
    plan::init();
}
