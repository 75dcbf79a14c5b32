//! Tests of what SQL cannot reach, or only by luck.
//!
//! What calls PostgreSQL is a function of schema `tests`, which `cargo pgrx test` calls inside a server, in a transaction
//! that is rolled back. The rest needs none.

mod context;
mod datum;
mod layout;
#[cfg(test)]
mod places;
#[cfg(test)]
mod table;
