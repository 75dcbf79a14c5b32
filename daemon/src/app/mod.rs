//! The use cases, each once. The command line is a thin face of them, as the HTTP API will be: it reads what it was given, calls
//! a function here, and prints what came of it.
//!
//! A function here takes a session and plain values, and returns values. It prints nothing and knows no options.

pub mod audit;
pub mod capabilities;
pub mod cleanup;
pub mod events;
pub mod flush;
pub mod import;
pub mod import_keys;
pub mod issuers;
pub mod keys;
pub mod quotas;
pub mod scopes;
pub mod services;
pub mod sessions;
pub mod tokens;
pub mod url_keys;
pub mod verifier;
pub mod webhooks;
