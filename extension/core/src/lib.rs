//! Tollgate's rules, independent of PostgreSQL: the format of a token, which scope grants which, which networks contain
//! an address, and the order in which a token is checked.
//!
//! Everything here is a pure function of its arguments. Nothing reads a clock, a setting or a random source: the caller
//! passes them in, so that each rule can be tested at its boundaries. Only [`signature`], [`seal_box`], [`refresh`] and [`url`]
//! draw random numbers, for keys, signatures and nonces, from their library's generator. The functions that verification
//! calls ([`token::parse`], [`token::digest`], [`scope::grants`], [`net::Net::contains`], [`status::decide`]) neither
//! allocate nor panic.

#![forbid(unsafe_code)]

pub mod ancestry;
pub mod assertion;
pub mod claims;
pub mod delegation;
pub mod foreign;
pub mod hints;
pub mod issuer;
pub mod json;
pub mod jsonb;
pub mod jwk;
pub mod jws;
pub mod latency;
pub mod limit;
pub mod mac_key;
pub mod malformed;
pub mod net;
pub mod quota;
pub mod refresh;
pub mod scope;
pub mod seal;
pub mod seal_box;
pub mod service;
pub mod signature;
pub mod signature_table;
pub mod status;
pub mod throttle;
pub mod token;
pub mod url;
pub mod usage_file;
pub mod usage_table;
