//! Signed URLs (sql/schema/urls/urls.sql): what arguments are allowed, and the decision about a presented one. The form is in
//! `tollgate_core::url`, the keys are in `keys`, and what was used is in `store::used_urls`.

pub(crate) mod sign;
pub(crate) mod verify;
