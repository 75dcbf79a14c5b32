//! Differences between the major versions of PostgreSQL that Tollgate supports.

#![allow(unsafe_code)]

use core::ffi::c_int;
use pgrx::pg_sys::{self, IndexScanDesc, Relation, Snapshot};

/// A setting that RESET does not change. Since 16; in 15 only a superuser may reset ours, which empties it.
#[cfg(feature = "pg15")]
pub(crate) const GUC_NO_RESET: u32 = 0;
#[cfg(not(feature = "pg15"))]
pub(crate) const GUC_NO_RESET: u32 = pgrx::pg_sys::GUC_NO_RESET;

/// `AddinShmemInitLock`, a macro in C (`lwlocknames.h`, `lwlocklist.h`): the same number in every supported version.
pub(crate) const ADDIN_SHMEM_INIT_LOCK: usize = 21;

/// Begins a scan with one key. Unguarded, like the functions in `sys`; version 18 takes instrumentation, which may be
/// NULL.
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

/// Pins a buffer if it still holds that block of a table; false if not. Unguarded, like the functions in `sys`; version
/// 16 renamed the table's physical identity.
///
/// # Safety
///
/// As for `ReadRecentBuffer` itself, and only inside `sys::guarded`.
pub(crate) unsafe fn pin_if_still(
    table: Relation,
    block: pg_sys::BlockNumber,
    buffer: pg_sys::Buffer,
) -> bool {
    #[cfg(not(feature = "pg15"))]
    use pg_sys::RelFileLocator as Locator;
    #[cfg(feature = "pg15")]
    use pg_sys::RelFileNode as Locator;
    unsafe extern "C-unwind" {
        fn ReadRecentBuffer(
            locator: Locator,
            fork: pg_sys::ForkNumber::Type,
            block: pg_sys::BlockNumber,
            buffer: pg_sys::Buffer,
        ) -> bool;
    }
    // SAFETY: the caller's promise; the table is open.
    unsafe {
        #[cfg(feature = "pg15")]
        let locator = (*table).rd_node;
        #[cfg(not(feature = "pg15"))]
        let locator = (*table).rd_locator;
        ReadRecentBuffer(locator, pg_sys::ForkNumber::MAIN_FORKNUM, block, buffer)
    }
}

/// Raises 42501 unless the current user may execute a function, and calls `object_access_hook` (for auditing
/// extensions) as the executor does.
pub(crate) fn check_may_execute(function: pg_sys::Oid) {
    // SAFETY: look-ups in the system catalogue, and the hook of another library with the argument it expects.
    unsafe {
        let user = pg_sys::GetUserId();
        #[cfg(feature = "pg15")]
        let result = pg_sys::pg_proc_aclcheck(function, user, pg_sys::ACL_EXECUTE);
        #[cfg(not(feature = "pg15"))]
        let result =
            pg_sys::object_aclcheck(pg_sys::ProcedureRelationId, function, user, pg_sys::ACL_EXECUTE.into());
        if result != pg_sys::AclResult::ACLCHECK_OK {
            pg_sys::aclcheck_error(
                result,
                pg_sys::ObjectType::OBJECT_FUNCTION,
                pg_sys::get_func_name(function),
            );
        }
        let hook = pg_sys::object_access_hook;
        if hook.is_some() {
            pg_sys::RunFunctionExecuteHook(function);
        }
    }
}
