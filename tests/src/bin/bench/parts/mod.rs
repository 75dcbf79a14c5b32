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
mod policy;
mod soak;
mod verify;

use anyhow::Result;
use tollgate_tests::Install;

use crate::Scale;
use crate::report::Figure;

pub(crate) struct Part {
    pub(crate) name: &'static str,
    pub(crate) about: &'static str,
    pub(crate) needs_daemon: bool,
    pub(crate) run: fn(&Run<'_>) -> Result<Outcome>,
}

/// What a part needs to run.
pub(crate) struct Run<'a> {
    pub(crate) install: &'a Install,
    pub(crate) scale: &'a Scale,
}

pub(crate) struct Outcome {
    /// The conditions under which the figures were measured.
    pub(crate) conditions: Vec<String>,
    pub(crate) figures: Vec<Figure>,
}

pub(crate) const PARTS: &[Part] = &[
    verify::PART,
    durable::PART,
    backend::PART,
    growth::PART,
    policy::PART,
    flush::PART,
    issue::PART,
    latency::PART,
    cleanup::PART,
    bulk::PART,
    events::PART,
    soak::PART,
];

/// A part that needs only a server.
const fn part(name: &'static str, about: &'static str, run: fn(&Run<'_>) -> Result<Outcome>) -> Part {
    Part { name, about, needs_daemon: false, run }
}

/// A part that needs the daemon.
const fn part_with_daemon(
    name: &'static str,
    about: &'static str,
    run: fn(&Run<'_>) -> Result<Outcome>,
) -> Part {
    Part { name, about, needs_daemon: true, run }
}
