//! The parts of the benchmark, one file each.

mod backend;
mod bulk;
mod cleanup;
mod durable;
mod events;
mod flush;
mod growth;
mod issue;
mod latency;
mod part;
mod policy;
mod services;
mod sessions;
mod signed;
mod soak;
mod verify;

pub(crate) use part::{Part, Run};

pub(crate) const PARTS: &[Part] = &[
    verify::PART,
    durable::PART,
    backend::PART,
    growth::PART,
    policy::PART,
    signed::PART,
    sessions::PART,
    services::PART,
    flush::PART,
    issue::PART,
    latency::PART,
    cleanup::PART,
    bulk::PART,
    events::PART,
    soak::PART,
];
