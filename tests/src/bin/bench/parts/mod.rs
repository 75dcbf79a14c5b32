//! What is measured, a part a file.

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

/// What a part is to be measured on.
pub(crate) struct Run<'a> {
    pub(crate) install: &'a Install,
    pub(crate) scale: &'a Scale,
}

pub(crate) struct Outcome {
    /// Under which the figures were measured: what somebody needs to judge them.
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

/// A part that needs nothing but a server.
const fn part(name: &'static str, about: &'static str, run: fn(&Run<'_>) -> Result<Outcome>) -> Part {
    Part { name, about, needs_daemon: false, run }
}

/// A part in which the daemon is at work.
const fn part_with_daemon(
    name: &'static str,
    about: &'static str,
    run: fn(&Run<'_>) -> Result<Outcome>,
) -> Part {
    Part { name, about, needs_daemon: true, run }
}
