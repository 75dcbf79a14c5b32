//! Tollgate's rules, free of PostgreSQL: what a token looks like, what a scope grants, which networks hold an
//! address, and which verdict a token deserves.
//!
//! Everything here is a pure function of its arguments. Nothing reads a clock, a setting or a random source: the
//! caller passes them in, so that each rule can be tested to its edges. What verification calls ([`token::parse`],
//! [`token::digest`], [`scope::grants`], [`net::Net::contains`], [`status::decide`]) neither allocates nor panics.

#![forbid(unsafe_code)]

pub mod foreign;
pub mod hints;
pub mod jsonb;
pub mod latency;
pub mod limit;
pub mod net;
pub mod scope;
pub mod seal;
pub mod status;
pub mod throttle;
pub mod token;
pub mod usage_file;
pub mod usage_table;
