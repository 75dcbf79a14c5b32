//! `tollgated`, the daemon beside Tollgate's PostgreSQL extension, and its command line.
//!
//! All state is in PostgreSQL: the daemon may be killed at any moment and started anywhere. It does what the extension
//! cannot do from within a backend: come back after a while, and outlive a connection.

pub mod backoff;
pub mod cli;
pub mod complaint;
pub mod config;
pub mod conninfo;
pub mod counters;
pub mod db;
pub mod document;
pub mod driver;
pub mod error;
pub mod exit;
pub mod file_trust;
pub mod http;
pub mod layers;
pub mod leader;
pub mod listener;
pub mod logging;
pub mod output;
pub mod pooler;
pub mod printable;
pub mod shutdown;
pub mod sql;
pub mod systemd;
pub mod target;
pub mod tasks;
pub mod tls;
pub mod unled;
pub mod webhook;
