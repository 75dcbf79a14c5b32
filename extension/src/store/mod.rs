//! Where our tables are touched: which relations they are, the index probe of verification, the statements of issuing, what
//! is read without one, and what must be seen as it is now, whatever snapshot the transaction has.

pub(crate) mod as_role;
pub(crate) mod composite;
pub(crate) mod condition;
pub(crate) mod fresh_snapshot;
pub(crate) mod probe;
pub(crate) mod relations;
pub(crate) mod rows;
pub(crate) mod scopes;
pub(crate) mod statements;
pub(crate) mod users;

pub(crate) fn init() {
    relations::init();
}
