//! The decision about a presented credential.

pub(crate) mod limits;
pub(crate) mod log;
pub(crate) mod look_up;
pub(crate) mod presented;
pub(crate) mod quotas;
pub(crate) mod refusal;
pub(crate) mod request;
mod scan;
pub(crate) mod verdict;

pub(crate) fn init() {
    scan::init();
}
