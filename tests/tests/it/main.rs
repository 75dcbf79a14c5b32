//! Tests from outside, as users work: the installed extension on real servers, the daemon, ordinary roles, real
//! drivers.
//!
//! One binary with a module per topic, so that only one is linked: `make test ONLY='usage:: events::'` runs some of
//! them. Long tests are marked `#[ignore = "long: why"]` and run by `make test-long`.

mod activity;
mod arguments;
mod attacks;
mod bench;
mod bulk;
mod calls;
mod capabilities;
mod check;
mod cli;
mod commands;
mod common;
mod config;
mod context;
mod daemon;
mod derive;
mod document;
mod drivers;
mod epochs;
mod errors;
mod events;
mod expiring;
mod faults;
mod harness;
mod hostile;
mod housekeeping;
mod http;
mod import;
mod import_cli;
mod issue;
mod layout;
