//! Support for logical replication: detecting apply workers, and ids that no sequence returns twice.
#![allow(unsafe_code)]

use crate::error::Error;
use crate::pg::fmgr::{Call, sql_function};
use core::cell::Cell;
use core::ffi::c_void;
use pgrx::datum::DatumWithOid;
use pgrx::pg_sys::{self, Datum, Oid};
use pgrx::{FromDatum, IntoDatum, Spi, direct_function_call};

sql_function!(is_logical_worker);
fn is_logical_worker(_call: &Call) -> Option<Datum> {
    // SAFETY: reads a variable of this process.
    unsafe { pg_sys::IsLogicalWorker() }.into_datum()
}

/// A sequence that was found to be ahead of its table, and the last number that this session took from it.
#[derive(Clone, Copy)]
struct Checked {
    sequence: Oid,
    last: i64,
}

thread_local! {
    /// There are two such sequences.
    static CHECKED: [Cell<Option<Checked>>; 2] = const { [Cell::new(None), Cell::new(None)] };
}

pub(crate) fn init() {
    // SAFETY: called once per process; the callbacks only clear variables.
    unsafe {
        pg_sys::RegisterXactCallback(Some(at_end), core::ptr::null_mut());
        pg_sys::RegisterSubXactCallback(Some(at_end_of_subtransaction), core::ptr::null_mut());
    }
}

/// The transaction may have failed because an id was in use already.
fn forget() {
    CHECKED.with(|checked| checked.iter().for_each(|one| one.set(None)));
}

/// No guard here or below: these callbacks call nothing that can fail.
unsafe extern "C-unwind" fn at_end(event: pg_sys::XactEvent::Type, _arg: *mut c_void) {
    if event == pg_sys::XactEvent::XACT_EVENT_ABORT {
        forget();
    }
}

unsafe extern "C-unwind" fn at_end_of_subtransaction(
    event: pg_sys::SubXactEvent::Type,
    _subtransaction: pg_sys::SubTransactionId,
    _parent: pg_sys::SubTransactionId,
    _arg: *mut c_void,
) {
    if event == pg_sys::SubXactEvent::SUBXACT_EVENT_ABORT_SUB {
        forget();
    }
}

sql_function!(next_id);
fn next_id(call: &Call) -> Option<Datum> {
    let sequence: Oid = call.value(0)?;
    let known =
        CHECKED.with(|checked| checked.iter().find_map(|one| one.get().filter(|c| c.sequence == sequence)));
    let mut id = nextval(sequence);
    if known.is_none_or(|known| id <= known.last) && greatest_id(sequence).is_some_and(|taken| id <= taken) {
        id = advance(sequence);
    }
    CHECKED.with(|checked| {
        let same = |one: &&Cell<Option<Checked>>| one.get().is_none_or(|c| c.sequence == sequence);
        // A sequence that was dropped and created again replaces another entry.
        checked.iter().find(same).unwrap_or(&checked[0]).set(Some(Checked { sequence, last: id }));
    });
    id.into_datum()
}

fn nextval(sequence: Oid) -> i64 {
    // SAFETY: nextval(regclass), which checks its argument and never returns NULL.
    unsafe { direct_function_call(pg_sys::nextval_oid, &[sequence.into_datum()]) }
        .expect("nextval returns a number")
}

/// The greatest id in the table of a sequence, read from the end of the primary key, which has that column only.
///
/// Not a query: in a SERIALIZABLE transaction PostgreSQL would record a conflict with every transaction that inserts
/// after it. SnapshotSelf is not an MVCC snapshot, so no predicate lock is taken (`SerializationNeededForRead`), and
/// rows that others committed after this transaction began are visible.
fn greatest_id(sequence: Oid) -> Option<i64> {
    let lock = pg_sys::AccessShareLock.cast_signed();
    let (mut table, mut column) = (Oid::INVALID, 0);
    // SAFETY: everything that is opened is closed again; on an ERROR the transaction's resource owner does so. The row
    // is deformed while it is pinned, and the value read from it is passed by value.
    unsafe {
        if !pg_sys::sequenceIsOwned(sequence, b'a'.cast_signed(), &raw mut table, &raw mut column) {
            return None;
        }
        let relation = pg_sys::table_open(table, lock);
        pg_sys::list_free(pg_sys::RelationGetIndexList(relation));
        let key = pg_sys::index_open((*relation).rd_pkindex, lock);
        let snapshot = &raw mut pg_sys::SnapshotSelfData;
        let scan = pg_sys::systable_beginscan_ordered(relation, key, snapshot, 0, core::ptr::null_mut());
        let last = pg_sys::systable_getnext_ordered(scan, pg_sys::ScanDirection::BackwardScanDirection);
        let id = last.as_mut().and_then(|row| {
            let descriptor = (*relation).rd_att;
            let columns = usize::try_from((*descriptor).natts).unwrap_or(0);
            let (mut values, mut nulls) = (vec![Datum::null(); columns], vec![true; columns]);
            pg_sys::heap_deform_tuple(row, descriptor, values.as_mut_ptr(), nulls.as_mut_ptr());
            let place = usize::try_from(column - 1).unwrap_or(usize::MAX);
            i64::from_datum(*values.get(place)?, *nulls.get(place)?)
        });
        pg_sys::systable_endscan_ordered(scan);
        pg_sys::index_close(key, lock);
        pg_sys::table_close(relation, lock);
        id
    }
}

/// Moves a sequence that is behind its table past the greatest id, and takes the next number.
fn advance(sequence: Oid) -> i64 {
    // One session at a time; otherwise one could move the sequence back after another moved it ahead and went on. This
    // lock does not block nextval().
    let lock = pg_sys::ShareUpdateExclusiveLock.cast_signed();
    // SAFETY: an existing relation. On an ERROR the transaction releases the lock.
    unsafe { pg_sys::LockRelationOid(sequence, lock) };
    let mut id = nextval(sequence);
    if let Some(taken) = greatest_id(sequence).filter(|taken| id <= *taken) {
        // SAFETY: each datum is of the type given with it.
        let arguments = unsafe {
            [DatumWithOid::new(sequence, pg_sys::REGCLASSOID), DatumWithOid::new(taken, pg_sys::INT8OID)]
        };
        let set = Spi::connect_mut(|client| {
            client.update("SELECT tollgate.advance_sequence($1, $2)", Some(1), &arguments).map(drop)
        });
        set.unwrap_or_else(|error| Error::internal(format!("could not set a sequence: {error}")).raise());
        id = nextval(sequence);
    }
    // SAFETY: taken above.
    unsafe { pg_sys::UnlockRelationOid(sequence, lock) };
    id
}
