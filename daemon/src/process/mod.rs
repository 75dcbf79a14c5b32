//! The process and its surroundings: log, exit status, systemd, counters.

pub mod counters;
pub mod duration;
pub mod exit;
pub mod failure_log;
pub mod logging;
pub mod printable;
pub mod systemd;
