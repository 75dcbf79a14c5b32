//! Exit codes, after sysexits.h where it has one that fits.

use crate::error::Kind;

/// Done; for a question: yes.
pub const OK: u8 = 0;
/// The answer is no, or the work failed.
pub const NO: u8 = 1;
/// EX_USAGE: the command line or the configuration is wrong.
pub const USAGE: u8 = 64;
/// EX_UNAVAILABLE: the database cannot be reached.
pub const UNAVAILABLE: u8 = 69;
/// EX_SOFTWARE: the daemon ended because one of its own tasks did.
pub const FAULT: u8 = 70;
/// EX_TEMPFAIL: the daemon was asked to stop and had to abandon a task.
pub const ABANDONED: u8 = 75;

pub fn code(kind: Kind) -> u8 {
    match kind {
        Kind::Usage => USAGE,
        Kind::Unreachable | Kind::ConnectionLost => UNAVAILABLE,
        Kind::Failed | Kind::OtherSchema | Kind::Stopping => NO,
        // `| head` has seen enough.
        Kind::BrokenPipe => OK,
    }
}
