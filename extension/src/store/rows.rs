//! Rows of our small tables, read without a plan: by an index, or all of them. They are the rows that a statement
//! starting now would see, or, with [`Open::latest`], those that are committed now, whatever snapshot the transaction has.
#![allow(unsafe_code)]

use super::relations::{self, Relations, relations};
use crate::error::OrRaise;
use crate::pg::datum::{self, TextArray};
use core::cell::Cell;
use core::ffi::CStr;
use pgrx::IntoDatum;
use pgrx::pg_sys::{self, Datum, Oid, ScanKeyData};
use std::thread::LocalKey;

const LOCK: pg_sys::LOCKMODE = pg_sys::AccessShareLock.cast_signed();

/// Position, counted from 0, name and type.
type Column = (usize, &'static CStr, Oid);

/// Those of [`Row::bytes`].
const VARLENA_TYPES: [Oid; 5] =
    [pg_sys::TEXTOID, pg_sys::BYTEAOID, pg_sys::INETOID, pg_sys::TEXTARRAYOID, pg_sys::JSONBOID];

/// A table whose columns, up to the last one that is read, are fixed by number.
pub(crate) struct Table<const N: usize> {
    pub(crate) name: &'static str,
    pub(crate) relation: fn(&Relations) -> Oid,
    pub(crate) columns: [Column; N],
    /// The epoch in which the columns were last checked.
    pub(crate) checked_in: &'static LocalKey<Cell<Option<u64>>>,
}

/// An open table. Plain pointers: on an ERROR the transaction's resource owner releases what they point to.
pub(crate) struct Open {
    table: pg_sys::Relation,
    columns: &'static [Column],
    snapshot: pg_sys::Snapshot,
    /// The lock that is released when this is closed.
    lock_to_release: pg_sys::LOCKMODE,
}

/// A row in a page that is pinned while it is read. Columns are those that its table names.
pub(crate) struct Row<'a> {
    columns: &'static [Column],
    values: &'a [Datum],
    nulls: &'a [bool],
}

impl Row<'_> {
    /// A column by position, counted from 0.
    pub(crate) fn datum(&self, column: impl Into<usize>) -> Option<Datum> {
        let place = column.into();
        (!self.nulls[place]).then(|| self.values[place])
    }

    /// The content of a value of variable length.
    pub(crate) fn bytes(&self, column: impl Into<usize>) -> Option<&[u8]> {
        let place = column.into();
        let is_varlena =
            self.columns.iter().any(|(at, _, kind)| *at == place && VARLENA_TYPES.contains(kind));
        assert!(is_varlena, "column {place} is not of a type of variable length");
        // SAFETY: the column is of such a type, as the table's columns were checked, and the row is pinned as long as this
        // lives.
        self.datum(place).map(|datum| unsafe { datum::varlena(datum) })
    }

    pub(crate) fn text(&self, column: impl Into<usize>) -> Option<String> {
        self.bytes(column).map(owned)
    }

    pub(crate) fn texts(&self, column: impl Into<usize>) -> Option<Vec<String>> {
        self.bytes(column).map(|array| TextArray::parse(array).present().map(owned).collect())
    }

    /// A bigint, or a time in microseconds since 2000-01-01.
    pub(crate) fn number(&self, column: impl Into<usize>) -> Option<i64> {
        self.datum(column).map(|datum| datum.value().cast_signed() as i64)
    }
}

fn owned(text: &[u8]) -> String {
    String::from_utf8_lossy(text).into_owned()
}

/// What `read` makes of the row with these keys that is committed now. It must not point into the row.
pub(crate) fn find_latest<const N: usize, const K: usize, T>(
    table: &'static Table<N>,
    index: fn(&Relations) -> Oid,
    keys: [ScanKeyData; K],
    read: impl FnOnce(&Row<'_>) -> Option<T>,
) -> Option<T> {
    let table = Open::latest(table);
    let found = table.find(index(&relations()), keys, read);
    table.close();
    found
}

impl Open {
    /// Opens a table. Its lock is kept until the transaction ends, like the locks of a query.
    pub(crate) fn new<const N: usize>(table: &'static Table<N>) -> Self {
        let columns = &table.columns;
        let table = open(table);
        // SAFETY: as SPI does before each statement. The snapshot stays registered until this is closed.
        let snapshot = unsafe {
            pg_sys::CommandCounterIncrement();
            pg_sys::RegisterSnapshot(pg_sys::GetTransactionSnapshot())
        };
        Open { table, columns, snapshot, lock_to_release: pg_sys::NoLock.cast_signed() }
    }

    /// Opens a table to read what is committed now: an older snapshot would not show a revocation. Nothing is held once
    /// it is closed.
    pub(crate) fn latest<const N: usize>(table: &'static Table<N>) -> Self {
        let columns = &table.columns;
        let table = open(table);
        // SAFETY: the snapshot stays registered until this is closed.
        let snapshot = unsafe { pg_sys::RegisterSnapshot(pg_sys::GetLatestSnapshot()) };
        Open { table, columns, snapshot, lock_to_release: LOCK }
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

    /// Calls `look` for each row with these keys, in the order of the index.
    pub(crate) fn each_of<const K: usize>(
        &self,
        index: Oid,
        mut keys: [ScanKeyData; K],
        mut look: impl FnMut(&Row<'_>),
    ) {
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
            while let Some(tuple) = pg_sys::systable_getnext(scan).as_mut() {
                self.look_at(tuple, &mut look);
            }
            pg_sys::systable_endscan(scan);
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
        look(&Row { columns: self.columns, values: &values, nulls: &nulls })
    }

    /// The role that the table belongs to.
    pub(crate) fn owner(&self) -> Oid {
        // SAFETY: the table is open.
        unsafe { (*(*self.table).rd_rel).relowner }
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

/// The values of the first columns, of type text, compared byte by byte.
pub(crate) fn text_keys<const K: usize>(values: [&str; K]) -> [ScanKeyData; K] {
    core::array::from_fn(|place| {
        let text = values[place].into_datum().expect("a text is not NULL");
        text_key(place, pg_sys::C_COLLATION_OID, text)
    })
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
