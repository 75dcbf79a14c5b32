//! What differs between the major versions of PostgreSQL that Tollgate supports.

#![allow(unsafe_code)]

use core::ffi::c_int;
use pgrx::pg_sys::{IndexScanDesc, Relation, Snapshot};

/// A setting that RESET leaves alone (since 16; before, only a superuser may reset ours, which empties it).
#[cfg(feature = "pg15")]
pub(crate) const GUC_NO_RESET: u32 = 0;
#[cfg(not(feature = "pg15"))]
pub(crate) const GUC_NO_RESET: u32 = pgrx::pg_sys::GUC_NO_RESET;

/// `AddinShmemInitLock`, a macro in C (`lwlocknames.h`, `lwlocklist.h`): the same number in every supported version.
pub(crate) const ADDIN_SHMEM_INIT_LOCK: usize = 21;

/// Begins a scan with one key. Unguarded, as the functions in `sys`; version 18 takes instrumentation, which may be NULL.
///
/// # Safety
///
/// As for `index_beginscan` itself, and only inside `sys::guarded`.
pub(crate) unsafe fn index_beginscan(table: Relation, index: Relation, snapshot: Snapshot) -> IndexScanDesc {
    #[cfg(not(feature = "pg18"))]
    // SAFETY: the caller's promise.
    unsafe {
        unsafe extern "C-unwind" {
            fn index_beginscan(
                table: Relation,
                index: Relation,
                snapshot: Snapshot,
                nkeys: c_int,
                norderbys: c_int,
            ) -> IndexScanDesc;
        }
        index_beginscan(table, index, snapshot, 1, 0)
    }
    #[cfg(feature = "pg18")]
    // SAFETY: the caller's promise.
    unsafe {
        unsafe extern "C-unwind" {
            fn index_beginscan(
                table: Relation,
                index: Relation,
                snapshot: Snapshot,
                instrument: *mut pgrx::pg_sys::IndexScanInstrumentation,
                nkeys: c_int,
                norderbys: c_int,
            ) -> IndexScanDesc;
        }
        index_beginscan(table, index, snapshot, core::ptr::null_mut(), 1, 0)
    }
}
