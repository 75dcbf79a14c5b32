//! A verification in FROM, executed by a custom scan.
//!
//! For `SELECT … FROM tollgate.verify_api_token($1)` PostgreSQL would form a composite value, store it in a tuplestore,
//! fetch it again and deform it, which together costs as much as finding the token. The custom scan copies only the
//! columns that are needed. Only the speed changes: the function is called as often, the same privilege is checked, and
//! EXPLAIN shows its name.
//!
//! `plan` offers the node to the planner, if the call is simple enough; `exec` executes it.

mod exec;
mod plan;

pub(crate) fn init() {
    plan::init();
}
