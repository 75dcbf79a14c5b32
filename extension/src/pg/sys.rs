//! The PostgreSQL functions of the hot path, declared without pgrx's guard.
//!
//! Every function of `pg_sys` is wrapped in a `sigsetjmp` of its own, so that an ERROR becomes a Rust panic. A
//! verification makes about twenty such calls. Here the same C functions are declared bare, to be called only inside
//! [`guarded`], which takes one `sigsetjmp` for all of them.
#![allow(unsafe_code)]

use core::ffi::{c_char, c_int};
use pgrx::pg_sys::{
    self, Datum, HeapTuple, IndexScanDesc, JsonbParseState, JsonbValue, Numeric, Oid, Relation, ScanKey,
    Snapshot, SysScanDesc, TupleDesc, TupleTableSlot,
};

/// Runs calls into PostgreSQL; an ERROR raised by any of them becomes a panic that carries the report.
///
/// # Safety
///
/// An ERROR jumps over the frames of `calls`: it must hold nothing that needs dropping, and must not panic. So it must
/// not call the functions of `pg_sys` either, which panic on an ERROR.
pub(crate) unsafe fn guarded<R: Copy>(calls: impl FnOnce() -> R) -> R {
    // SAFETY: the caller meets the conditions of `pg_guard_ffi_boundary`, which are those above.
    unsafe { pg_sys::ffi::pg_guard_ffi_boundary(calls) }
}

unsafe extern "C-unwind" {
    pub(crate) fn try_table_open(relation: Oid, lock: pg_sys::LOCKMODE) -> Relation;
    pub(crate) fn table_close(relation: Relation, lock: pg_sys::LOCKMODE);
    pub(crate) fn CommandCounterIncrement();
    pub(crate) fn GetTransactionSnapshot() -> Snapshot;
    pub(crate) fn GetLatestSnapshot() -> Snapshot;
    pub(crate) fn RegisterSnapshot(snapshot: Snapshot) -> Snapshot;
    pub(crate) fn UnregisterSnapshot(snapshot: Snapshot);
    pub(crate) fn index_open(index: Oid, lock: pg_sys::LOCKMODE) -> Relation;
    pub(crate) fn index_close(index: Relation, lock: pg_sys::LOCKMODE);
    pub(crate) fn ScanKeyEntryInitialize(
        key: ScanKey,
        flags: c_int,
        column: pg_sys::AttrNumber,
        strategy: pg_sys::StrategyNumber,
        subtype: Oid,
        collation: Oid,
        function: pg_sys::RegProcedure,
        argument: Datum,
    );
    pub(crate) fn systable_beginscan(
        table: Relation,
        index: Oid,
        index_is_ok: bool,
        snapshot: Snapshot,
        nkeys: c_int,
        keys: ScanKey,
    ) -> SysScanDesc;
    pub(crate) fn systable_getnext(scan: SysScanDesc) -> HeapTuple;
    pub(crate) fn systable_endscan(scan: SysScanDesc);
    pub(crate) fn systable_beginscan_ordered(
        table: Relation,
        index: Relation,
        snapshot: Snapshot,
        nkeys: c_int,
        keys: ScanKey,
    ) -> SysScanDesc;
    pub(crate) fn systable_getnext_ordered(
        scan: SysScanDesc,
        direction: pg_sys::ScanDirection::Type,
    ) -> HeapTuple;
    pub(crate) fn systable_endscan_ordered(scan: SysScanDesc);
    pub(crate) fn index_rescan(
        scan: IndexScanDesc,
        keys: ScanKey,
        nkeys: c_int,
        orderbys: ScanKey,
        norderbys: c_int,
    );
    pub(crate) fn index_getnext_tid(
        scan: IndexScanDesc,
        direction: pg_sys::ScanDirection::Type,
    ) -> pg_sys::ItemPointer;
    pub(crate) fn index_fetch_heap(scan: IndexScanDesc, slot: *mut TupleTableSlot) -> bool;
    pub(crate) fn index_endscan(scan: IndexScanDesc);
    pub(crate) fn LockBuffer(buffer: pg_sys::Buffer, mode: c_int);
    pub(crate) fn ReleaseBuffer(buffer: pg_sys::Buffer);
    pub(crate) fn heap_hot_search_buffer(
        tid: pg_sys::ItemPointer,
        table: Relation,
        buffer: pg_sys::Buffer,
        snapshot: Snapshot,
        tuple: HeapTuple,
        all_dead: *mut bool,
        first_call: bool,
    ) -> bool;
    pub(crate) fn ExecStorePinnedBufferHeapTuple(
        tuple: HeapTuple,
        slot: *mut TupleTableSlot,
        buffer: pg_sys::Buffer,
    ) -> *mut TupleTableSlot;
    pub(crate) fn table_slot_create(table: Relation, list: *mut *mut pg_sys::List) -> *mut TupleTableSlot;
    pub(crate) fn slot_getsomeattrs_int(slot: *mut TupleTableSlot, columns: c_int);
    pub(crate) fn ExecDropSingleTupleTableSlot(slot: *mut TupleTableSlot);
    pub(crate) fn heap_form_tuple(desc: TupleDesc, values: *mut Datum, nulls: *mut bool) -> HeapTuple;
    pub(crate) fn tuplestore_putvalues(
        store: *mut pg_sys::Tuplestorestate,
        descriptor: TupleDesc,
        values: *const Datum,
        nulls: *const bool,
    );
    pub(crate) fn HeapTupleHeaderGetDatum(tuple: pg_sys::HeapTupleHeader) -> Datum;
    pub(crate) fn cstring_to_text_with_len(text: *const c_char, length: c_int) -> *mut pg_sys::text;
    pub(crate) fn construct_array(
        elements: *mut Datum,
        count: c_int,
        element_type: Oid,
        length: c_int,
        by_value: bool,
        align: c_char,
    ) -> *mut pg_sys::ArrayType;
    pub(crate) fn pushJsonbValue(
        state: *mut *mut JsonbParseState,
        token: pg_sys::JsonbIteratorToken::Type,
        value: *mut JsonbValue,
    ) -> *mut JsonbValue;
    pub(crate) fn JsonbValueToJsonb(value: *mut JsonbValue) -> *mut pg_sys::Jsonb;
    pub(crate) fn int64_to_numeric(value: i64) -> Numeric;
    pub(crate) fn datumCopy(value: Datum, by_value: bool, length: c_int) -> Datum;
    pub(crate) fn detoast_external_attr(value: *mut pg_sys::varlena) -> *mut pg_sys::varlena;
    pub(crate) fn datum_image_eq(one: Datum, other: Datum, by_value: bool, length: c_int) -> bool;
    pub(crate) fn get_partition_ancestors(relation: Oid) -> *mut pg_sys::List;
    pub(crate) fn errstart(level: c_int, domain: *const c_char) -> bool;
    pub(crate) fn errcode(sqlstate: c_int) -> c_int;
    pub(crate) fn errmsg_internal(format: *const c_char, ...) -> c_int;
    pub(crate) fn errdetail_internal(format: *const c_char, ...) -> c_int;
    pub(crate) fn errhint(format: *const c_char, ...) -> c_int;
    pub(crate) fn errhidestmt(hide: bool) -> c_int;
    pub(crate) fn errhidecontext(hide: bool) -> c_int;
    pub(crate) fn errfinish(file: *const c_char, line: c_int, function: *const c_char);
    pub(crate) fn ExecScan(
        node: *mut pg_sys::ScanState,
        access: pg_sys::ExecScanAccessMtd,
        recheck: pg_sys::ExecScanRecheckMtd,
    ) -> *mut TupleTableSlot;

    pub(crate) fn ExecScanReScan(node: *mut pg_sys::ScanState);

    // As used here these raise no ERROR, and so need no guard.
    pub(crate) fn toast_raw_datum_size(value: Datum) -> usize;
    pub(crate) fn ExecStoreVirtualTuple(slot: *mut TupleTableSlot) -> *mut TupleTableSlot;
    safe fn RecoveryInProgress() -> bool;
    pub(crate) safe fn GetCurrentTimestamp() -> pg_sys::TimestampTz;
}

/// Whether this server is a standby.
pub(crate) fn is_in_recovery() -> bool {
    RecoveryInProgress()
}
