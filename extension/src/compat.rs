//! What differs between the major versions of PostgreSQL that Tollgate supports.

use pgrx::pg_sys;

/// A setting that RESET leaves alone (since 16; before, only a superuser may reset ours, which empties it).
#[cfg(feature = "pg15")]
pub(crate) const GUC_NO_RESET: u32 = 0;
#[cfg(not(feature = "pg15"))]
pub(crate) const GUC_NO_RESET: u32 = pg_sys::GUC_NO_RESET;

/// `AddinShmemInitLock`, a macro in C (`lwlocknames.h`, `lwlocklist.h`): the same number in every supported version.
pub(crate) const ADDIN_SHMEM_INIT_LOCK: usize = 21;
