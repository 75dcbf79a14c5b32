//! Service accounts (sql/schema/services): access tokens for programs that prove who they are (RFC 6749 section 4.4), by a
//! secret, by an assertion that they have signed, or by a token of a trusted issuer.
//!
//! The caller never learns why a client was refused: `refusal` puts that into the log, and into an event for those who manage
//! the account.

mod assertion;
pub(crate) mod consumes;
pub(crate) mod credentials;
pub(crate) mod fields;
mod refusal;
pub(crate) mod request;
mod workload;
