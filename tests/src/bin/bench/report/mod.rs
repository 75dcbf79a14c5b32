//! What was measured: as a table for people, as JSON, and as a section of docs/performance.md.

mod document;
mod machine;
mod results;
mod table;

pub(crate) use document::{rewrite, section};
pub(crate) use machine::Machine;
pub(crate) use results::{Figure, Measured, Report, Unit, Version};
pub(crate) use table::{count, print};
