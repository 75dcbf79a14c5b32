//! What a part of the benchmark is: its name, what it needs, and what it returns.

use anyhow::Result;
use tollgate_tests::Install;

use crate::report::Figure;
use crate::scale::Scale;

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

/// A part that needs only a server.
pub(super) const fn part(
    name: &'static str,
    about: &'static str,
    run: fn(&Run<'_>) -> Result<Outcome>,
) -> Part {
    Part { name, about, needs_daemon: false, run }
}

/// A part that needs the daemon.
pub(super) const fn part_with_daemon(
    name: &'static str,
    about: &'static str,
    run: fn(&Run<'_>) -> Result<Outcome>,
) -> Part {
    Part { name, about, needs_daemon: true, run }
}
