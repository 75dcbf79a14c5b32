//! API tokens: their fields, and the statements that issue them.

pub(crate) mod fields;
pub(crate) mod issue;
pub(crate) mod max_per_user;
