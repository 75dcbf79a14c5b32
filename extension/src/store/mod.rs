//! Access to our tables: the oids of the relations, the index probe of verification, the statements of issuing, reads
//! without a plan, and reads of the current state whatever snapshot the transaction has.

pub(crate) mod as_role;
pub(crate) mod capabilities;
pub(crate) mod composite;
pub(crate) mod condition;
pub(crate) mod fresh_snapshot;
pub(crate) mod issuers;
pub(crate) mod keys;
pub(crate) mod probe;
pub(crate) mod public_keys;
pub(crate) mod quotas;
pub(crate) mod relations;
pub(crate) mod rows;
pub(crate) mod scopes;
pub(crate) mod services;
pub(crate) mod sessions;
pub(crate) mod statements;
pub(crate) mod used_urls;
pub(crate) mod users;

pub(crate) fn init() {
    relations::init();
}
