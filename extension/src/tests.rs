//! Tests of what SQL cannot reach, or only by luck.
//!
//! What calls PostgreSQL is a function of schema `tests`, which `cargo pgrx test` calls inside a server, in a transaction
//! that is rolled back. The rest needs none.

mod datum;
mod identity;
mod layout;
