//! Rows of our small tables, read without a plan: by an index, or all of them. They are the rows that a statement
//! starting now would see, or, with [`Open::latest`], those that are committed now, whatever snapshot the transaction has.
#![allow(unsafe_code)]

use super::relations::{self, Relations};
use crate::error::OrRaise;
use core::cell::Cell;
use core::ffi::CStr;
use pgrx::pg_sys::{self, Datum, Oid, ScanKeyData};
use std::thread::LocalKey;

const LOCK: pg_sys::LOCKMODE = pg_sys::AccessShareLock.cast_signed();

/// A table whose columns, up to the last one that is read, are fixed by number.
pub(crate) struct Table<const N: usize> {
    pub(crate) name: &'static str,
    pub(crate) relation: fn(&Relations) -> Oid,
    pub(crate) columns: [(usize, &'static CStr, Oid); N],
    /// The epoch in which the columns were last checked.
    pub(crate) checked_in: &'static LocalKey<Cell<Option<u64>>>,
}

/// An open table. Plain pointers: on an ERROR the transaction's resource owner releases what they point to.
pub(crate) struct Open {
    table: pg_sys::Relation,
    snapshot: pg_sys::Snapshot,
    /// The lock that is released when this is closed.
    lock_to_release: pg_sys::LOCKMODE,
}

/// A row in a page that is pinned while it is read.
pub(crate) struct Row<'a> {
    values: &'a [Datum],
    nulls: &'a [bool],
}

impl Row<'_> {
    /// A column by position, counted from 0.
    pub(crate) fn datum(&self, place: usize) -> Option<Datum> {
        (!self.nulls[place]).then(|| self.values[place])
    }
}

impl Open {
    /// Opens a table. Its lock is kept until the transaction ends, like the locks of a query.
    pub(crate) fn new<const N: usize>(table: &Table<N>) -> Self {
        let table = open(table);
        // SAFETY: as SPI does before each statement. The snapshot stays registered until this is closed.
        let snapshot = unsafe {
            pg_sys::CommandCounterIncrement();
            pg_sys::RegisterSnapshot(pg_sys::GetTransactionSnapshot())
        };
        Open { table, snapshot, lock_to_release: pg_sys::NoLock.cast_signed() }
    }

    /// Opens a table to read what is committed now: an older snapshot would not show a revocation. Nothing is held once
    /// it is closed.
    pub(crate) fn latest<const N: usize>(table: &Table<N>) -> Self {
        let table = open(table);
        // SAFETY: the snapshot stays registered until this is closed.
        let snapshot = unsafe { pg_sys::RegisterSnapshot(pg_sys::GetLatestSnapshot()) };
        Open { table, snapshot, lock_to_release: LOCK }
    }

    /// What `read` makes of a row with these keys, which are columns of the index.
    pub(crate) fn find<const K: usize, T>(
        &self,
        index: Oid,
        mut keys: [ScanKeyData; K],
        read: impl FnOnce(&Row<'_>) -> Option<T>,
    ) -> Option<T> {
        // SAFETY: the keys outlive the scan, which is ended before anything that it uses.
        unsafe {
            let scan = pg_sys::systable_beginscan(
                self.table,
                index,
                true,
                self.snapshot,
                K as i32,
                keys.as_mut_ptr(),
            );
            let tuple = pg_sys::systable_getnext(scan).as_mut();
            let found = tuple.and_then(|tuple| self.look_at(tuple, read));
            pg_sys::systable_endscan(scan);
            found
        }
    }

    /// The same of the last of these rows, in the order of the index.
    pub(crate) fn last<const K: usize, T>(
        &self,
        index: Oid,
        mut keys: [ScanKeyData; K],
        read: impl FnOnce(&Row<'_>) -> Option<T>,
    ) -> Option<T> {
        // SAFETY: the keys outlive the scan, which is ended before anything that it uses; the index is closed last.
        unsafe {
            let index = pg_sys::index_open(index, LOCK);
            let scan = pg_sys::systable_beginscan_ordered(
                self.table,
                index,
                self.snapshot,
                K as i32,
                keys.as_mut_ptr(),
            );
            let backward = pg_sys::ScanDirection::BackwardScanDirection;
            let tuple = pg_sys::systable_getnext_ordered(scan, backward).as_mut();
            let found = tuple.and_then(|tuple| self.look_at(tuple, read));
            pg_sys::systable_endscan_ordered(scan);
            pg_sys::index_close(index, LOCK);
            found
        }
    }

    /// Calls `look` for each row, in no particular order.
    pub(crate) fn each(&self, mut look: impl FnMut(&Row<'_>)) {
        // SAFETY: no index and no keys; the scan is ended before anything that it uses.
        unsafe {
            let scan = pg_sys::systable_beginscan(
                self.table,
                Oid::INVALID,
                false,
                self.snapshot,
                0,
                core::ptr::null_mut(),
            );
            while let Some(tuple) = pg_sys::systable_getnext(scan).as_mut() {
                self.look_at(tuple, &mut look);
            }
            pg_sys::systable_endscan(scan);
        }
    }

    /// # Safety
    ///
    /// The row belongs to this table, and is pinned.
    unsafe fn look_at<T>(&self, tuple: &mut pg_sys::HeapTupleData, look: impl FnOnce(&Row<'_>) -> T) -> T {
        // SAFETY: the descriptor is that of the table, which is open.
        let descriptor = unsafe { (*self.table).rd_att };
        // SAFETY: as above.
        let columns = usize::try_from(unsafe { (*descriptor).natts }).unwrap_or(0);
        let (mut values, mut nulls) = (vec![Datum::null(); columns], vec![true; columns]);
        // SAFETY: there is room for each column.
        unsafe { pg_sys::heap_deform_tuple(tuple, descriptor, values.as_mut_ptr(), nulls.as_mut_ptr()) };
        look(&Row { values: &values, nulls: &nulls })
    }

    pub(crate) fn close(self) {
        // SAFETY: no scan is running.
        unsafe {
            pg_sys::UnregisterSnapshot(self.snapshot);
            pg_sys::table_close(self.table, self.lock_to_release);
        }
    }
}

/// Opens a table, and checks its columns if it may have changed. Its indexes are to be looked up after this: waiting for
/// the lock processes invalidations.
fn open<const N: usize>(table: &Table<N>) -> pg_sys::Relation {
    loop {
        let oid = (table.relation)(&relations::relations());
        // SAFETY: any oid may be passed.
        let relation = unsafe { pg_sys::try_table_open(oid, LOCK) };
        if relation.is_null() {
            relations::forget();
            continue;
        }
        let epoch = relations::epoch();
        if table.checked_in.get() != Some(epoch) {
            relations::check_columns(oid, table.name, table.columns).or_raise();
            table.checked_in.set(Some(epoch));
        }
        return relation;
    }
}

/// The value of a column of type text, by position, counted from 0; with the column's collation.
pub(crate) fn text_key(place: usize, collation: Oid, text: Datum) -> ScanKeyData {
    key(place, pg_sys::BTEqualStrategyNumber, pg_sys::TEXTOID, collation, pg_sys::F_TEXTEQ, text)
}

/// The value of a column of type uuid.
pub(crate) fn uuid_key(place: usize, id: Datum) -> ScanKeyData {
    key(place, pg_sys::BTEqualStrategyNumber, pg_sys::UUIDOID, Oid::INVALID, pg_sys::F_UUID_EQ, id)
}

/// The latest value of a column of type timestamptz, in microseconds since 2000-01-01.
pub(crate) fn until_key(place: usize, time: i64) -> ScanKeyData {
    let (strategy, function) = (pg_sys::BTLessEqualStrategyNumber, pg_sys::F_TIMESTAMPTZ_LE);
    key(place, strategy, pg_sys::TIMESTAMPTZOID, Oid::INVALID, function, Datum::from(time))
}

fn key(
    place: usize,
    strategy: u32,
    data_type: Oid,
    collation: Oid,
    function: u32,
    value: Datum,
) -> ScanKeyData {
    let mut key = ScanKeyData::default();
    // SAFETY: fills a key that is ours; a value that is a pointer lives in the memory context of the call.
    unsafe {
        pg_sys::ScanKeyEntryInitialize(
            &raw mut key,
            0,
            place as i16 + 1,
            strategy as pg_sys::StrategyNumber,
            data_type,
            collation,
            Oid::from(function),
            value,
        );
    }
    key
}
