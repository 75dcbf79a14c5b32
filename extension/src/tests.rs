//! Tests of behaviour that SQL cannot reach, or not reliably.
//!
//! Tests that call PostgreSQL are functions of schema `tests`, which `cargo pgrx test` calls inside a server, in a
//! transaction that is rolled back. The others need no server.

mod datum;
mod identity;
mod layout;
