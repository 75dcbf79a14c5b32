//! The PostgreSQL functions of the hot path, declared without pgrx's guard.
//!
//! Every function of `pg_sys` is wrapped in a `sigsetjmp` of its own, so that an ERROR becomes a Rust panic. A
//! verification makes about twenty such calls. Here the same C functions are declared bare, to be called only inside
//! [`guarded`], which takes one `sigsetjmp` for all of them.
#![allow(unsafe_code)]

use pgrx::pg_sys::{
    self, Datum, HeapTuple, LWLock, Oid, Relation, ScanKey, Snapshot, SysScanDesc, TupleDesc,
};

/// Runs calls into PostgreSQL; an ERROR raised by any of them becomes a panic that carries the report.
///
/// # Safety
///
/// On an ERROR the frames of `calls` are jumped over: it must hold nothing that needs dropping, and must not panic.
pub(crate) unsafe fn guarded<R: Copy>(calls: impl FnOnce() -> R) -> R {
    // SAFETY: the caller keeps the conditions of `pg_guard_ffi_boundary`, which are those above.
    unsafe { pg_sys::ffi::pg_guard_ffi_boundary(calls) }
}

unsafe extern "C-unwind" {
    pub(crate) fn table_open(relation: Oid, lock: pg_sys::LOCKMODE) -> Relation;
    pub(crate) fn table_close(relation: Relation, lock: pg_sys::LOCKMODE);
    pub(crate) fn GetLatestSnapshot() -> Snapshot;
    pub(crate) fn RegisterSnapshot(snapshot: Snapshot) -> Snapshot;
    pub(crate) fn UnregisterSnapshot(snapshot: Snapshot);
    pub(crate) fn systable_beginscan(
        heap: Relation,
        index: Oid,
        index_ok: bool,
        snapshot: Snapshot,
        nkeys: core::ffi::c_int,
        key: ScanKey,
    ) -> SysScanDesc;
    pub(crate) fn systable_getnext(scan: SysScanDesc) -> HeapTuple;
    pub(crate) fn systable_endscan(scan: SysScanDesc);
    pub(crate) fn heap_deform_tuple(tuple: HeapTuple, desc: TupleDesc, values: *mut Datum, nulls: *mut bool);
    pub(crate) fn heap_form_tuple(desc: TupleDesc, values: *mut Datum, nulls: *mut bool) -> HeapTuple;
    pub(crate) fn HeapTupleHeaderGetDatum(tuple: pg_sys::HeapTupleHeader) -> Datum;

    // These raise nothing as they are used here, and so need no guard.
    pub(crate) fn LWLockAcquire(lock: *mut LWLock, mode: pg_sys::LWLockMode::Type) -> bool;
    pub(crate) fn LWLockRelease(lock: *mut LWLock);
    pub(crate) safe fn GetCurrentTimestamp() -> pg_sys::TimestampTz;
}
