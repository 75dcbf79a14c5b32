//! `tollgated`, the daemon beside Tollgate's PostgreSQL extension, and its command line.
//!
//! All state is in PostgreSQL: the daemon may be killed at any moment and started anywhere. It does what the extension
//! cannot do from within a backend: come back after a while, and outlive a connection.

pub mod app;
pub mod background;
pub mod cli;
pub mod config;
pub mod contract;
pub mod error;
pub mod hex;
pub mod http;
pub mod issuer_keys;
pub mod outbound;
pub mod postgres;
pub mod process;
pub mod secret;
pub mod webhook;
