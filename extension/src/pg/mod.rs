//! PostgreSQL plumbing: calling its functions, reading its values and nodes, and passing its errors through Rust.

pub(crate) mod compat;
pub(crate) mod datum;
pub(crate) mod fmgr;
pub(crate) mod guard;
pub(crate) mod jsonb;
pub(crate) mod list;
pub(crate) mod prefetch;
pub(crate) mod read_only;
pub(crate) mod row_set;
pub(crate) mod sys;
pub(crate) mod wait;
