//! Where our tables are touched: which relations they are, the index probe of verification, the statements of issuing.

pub(crate) mod composite;
pub(crate) mod issue;
pub(crate) mod probe;
pub(crate) mod relations;

pub(crate) fn init() {
    relations::init();
}
