//! Rows of our small tables, read without a plan: by an index, or all of them. They are the rows that a statement
//! starting now would see, or, with [`Open::latest`], those that are committed now, whatever snapshot the transaction has.
#![allow(unsafe_code)]

use super::relations::{self, Relations};
use crate::error::OrRaise;
use crate::pg::datum::{self, TextArray};
use crate::pg::sys;
use core::cell::Cell;
use core::ffi::{CStr, c_char};
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
#[derive(Clone, Copy)]
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

    pub(crate) fn uuid(&self, column: impl Into<usize>) -> Option<[u8; 16]> {
        let place = column.into();
        let is_uuid = self.columns.iter().any(|(at, _, kind)| *at == place && *kind == pg_sys::UUIDOID);
        assert!(is_uuid, "column {place} is not of type uuid");
        // SAFETY: a uuid is 16 bytes by reference, in a row that is pinned as long as this lives.
        self.datum(place).map(|datum| unsafe { *datum.cast_mut_ptr::<[u8; 16]>() })
    }

    /// A bigint, or a time in microseconds since 2000-01-01.
    pub(crate) fn number(&self, column: impl Into<usize>) -> Option<i64> {
        self.datum(column).map(|datum| datum.value().cast_signed() as i64)
    }
}

fn owned(text: &[u8]) -> String {
    String::from_utf8_lossy(text).into_owned()
}

/// A scan of an open table, and the slot of its present row.
#[derive(Clone, Copy)]
struct Scan {
    scan: pg_sys::SysScanDesc,
    /// Of a scan in the order of an index.
    index: pg_sys::Relation,
}

/// A column, by position, counted from 0, and its value.
#[derive(Clone, Copy)]
pub(crate) struct Key<'a> {
    place: usize,
    value: Value<'a>,
}

#[derive(Clone, Copy)]
enum Value<'a> {
    /// With the column's collation.
    Text(&'a str, Oid),
    /// A text of the collation "C", or a later one.
    From(&'a str),
    /// A text before this one, likewise.
    Before(&'a str),
    Uuid(&'a [u8; 16]),
    /// A timestamptz, or an earlier one.
    Until(i64),
}

/// What `read` makes of the row with these keys that is committed now. It must not point into the row.
pub(crate) fn find_latest<const N: usize, const K: usize, T>(
    table: &'static Table<N>,
    index: fn(&Relations) -> Oid,
    keys: [Key<'_>; K],
    read: impl FnOnce(&Row<'_>) -> Option<T>,
) -> Option<T> {
    loop {
        let (relations, epoch) = table.checked();
        // SAFETY: the closure holds nothing that needs dropping.
        let begun = unsafe {
            sys::guarded(|| {
                let open = Open::begin(table, &relations, epoch, true)?;
                let mut scan_keys = scan_keys(&keys);
                let scan = Scan::by(&open, index(&relations), &mut scan_keys);
                Some((open, scan, scan.next(&open)))
            })
        };
        let Some((open, scan, is_found)) = begun else { continue };
        let found = if is_found { read(&open.row(scan)) } else { None };
        // SAFETY: ends what was begun, in the opposite order; the row is not used any more.
        unsafe {
            sys::guarded(|| {
                scan.end();
                open.end();
            });
        }
        return found;
    }
}

impl<const N: usize> Table<N> {
    /// The oids of the relations, and their epoch, in which the columns are what the library was built for.
    fn checked(&self) -> (Relations, u64) {
        let relations = relations::relations();
        let epoch = relations::epoch();
        if self.checked_in.get() != Some(epoch) {
            relations::check_columns((self.relation)(&relations), self.name, self.columns).or_raise();
            self.checked_in.set(Some(epoch));
        }
        (relations, epoch)
    }

    fn open(&'static self, latest: bool) -> Open {
        loop {
            let (relations, epoch) = self.checked();
            // SAFETY: the closure holds nothing that needs dropping.
            let open = unsafe { sys::guarded(|| Open::begin(self, &relations, epoch, latest)) };
            if let Some(open) = open {
                return open;
            }
        }
    }
}

impl Open {
    /// Opens a table. Its lock is kept until the transaction ends, like the locks of a query.
    pub(crate) fn new<const N: usize>(table: &'static Table<N>) -> Self {
        table.open(false)
    }

    /// Opens a table to read what is committed now: an older snapshot would not show a revocation. Nothing is held once
    /// it is closed.
    pub(crate) fn latest<const N: usize>(table: &'static Table<N>) -> Self {
        table.open(true)
    }

    /// `None` if the relations have changed since their oids were looked up: waiting for the lock processes
    /// invalidations.
    ///
    /// # Safety
    ///
    /// Only inside `sys::guarded`.
    unsafe fn begin<const N: usize>(
        table: &'static Table<N>,
        relations: &Relations,
        epoch: u64,
        latest: bool,
    ) -> Option<Self> {
        let columns = &table.columns;
        // SAFETY: any oid may be passed. The snapshot stays registered until this is ended.
        unsafe {
            let table = sys::try_table_open((table.relation)(relations), LOCK);
            if table.is_null() {
                relations::forget();
                return None;
            }
            if relations::epoch() != epoch {
                sys::table_close(table, LOCK);
                return None;
            }
            let (snapshot, lock_to_release) = if latest {
                (sys::GetLatestSnapshot(), LOCK)
            } else {
                // As SPI does before each statement.
                sys::CommandCounterIncrement();
                (sys::GetTransactionSnapshot(), pg_sys::NoLock.cast_signed())
            };
            Some(Open { table, columns, snapshot: sys::RegisterSnapshot(snapshot), lock_to_release })
        }
    }

    /// # Safety
    ///
    /// No scan is running. Only inside `sys::guarded`.
    unsafe fn end(self) {
        // SAFETY: as the caller promises.
        unsafe {
            sys::UnregisterSnapshot(self.snapshot);
            sys::table_close(self.table, self.lock_to_release);
        }
    }

    /// What `read` makes of a row with these keys, which are columns of the index.
    pub(crate) fn find<const K: usize, T>(
        &self,
        index: Oid,
        keys: [Key<'_>; K],
        read: impl FnOnce(&Row<'_>) -> Option<T>,
    ) -> Option<T> {
        // SAFETY: the closures hold nothing that needs dropping.
        unsafe {
            self.read(
                || {
                    let scan = Scan::by(self, index, &mut scan_keys(&keys));
                    (scan, scan.next(self))
                },
                read,
            )
        }
    }

    /// The same of the last of these rows, in the order of the index.
    pub(crate) fn last<const K: usize, T>(
        &self,
        index: Oid,
        keys: [Key<'_>; K],
        read: impl FnOnce(&Row<'_>) -> Option<T>,
    ) -> Option<T> {
        // SAFETY: the closures hold nothing that needs dropping.
        unsafe {
            self.read(
                || {
                    let scan = Scan::in_order(self, index, &mut scan_keys(&keys));
                    (scan, scan.previous(self))
                },
                read,
            )
        }
    }

    /// # Safety
    ///
    /// `begin` begins a scan of this table, for a row of it, as it may inside `sys::guarded`.
    unsafe fn read<T>(
        &self,
        begin: impl FnOnce() -> (Scan, bool),
        read: impl FnOnce(&Row<'_>) -> Option<T>,
    ) -> Option<T> {
        // SAFETY: the caller's promise.
        let (scan, is_found) = unsafe { sys::guarded(begin) };
        let found = if is_found { read(&self.row(scan)) } else { None };
        // SAFETY: the row is not used any more.
        unsafe { sys::guarded(|| scan.end()) };
        found
    }

    /// Calls `look` for each row with these keys, in the order of the index.
    pub(crate) fn each_of<const K: usize>(&self, index: Oid, keys: [Key<'_>; K], look: impl FnMut(&Row<'_>)) {
        // SAFETY: the closure holds nothing that needs dropping.
        let scan = unsafe { sys::guarded(|| Scan::by(self, index, &mut scan_keys(&keys))) };
        self.each_in(scan, look);
    }

    /// Calls `look` for each row, in no particular order.
    pub(crate) fn each(&self, look: impl FnMut(&Row<'_>)) {
        // SAFETY: the closure holds nothing that needs dropping.
        let scan = unsafe { sys::guarded(|| Scan::of_all(self)) };
        self.each_in(scan, look);
    }

    /// Calls `look` for each row of a scan of this table, and ends it.
    fn each_in(&self, scan: Scan, mut look: impl FnMut(&Row<'_>)) {
        // SAFETY: the closures hold nothing that needs dropping, and the scan is ended before anything that it uses.
        unsafe {
            while sys::guarded(|| scan.next(self)) {
                look(&self.row(scan));
            }
            sys::guarded(|| scan.end());
        }
    }

    /// The row of a scan of this table, which is pinned until the scan goes on or ends.
    fn row(&self, scan: Scan) -> Row<'_> {
        let width = self.width();
        // SAFETY: the slot holds a row of which as many columns are deformed.
        unsafe {
            let slot = &*(*scan.scan).slot;
            Row {
                columns: self.columns,
                values: core::slice::from_raw_parts(slot.tts_values, width),
                nulls: core::slice::from_raw_parts(slot.tts_isnull, width),
            }
        }
    }

    /// The number of columns up to the last one that is read.
    fn width(&self) -> usize {
        self.columns.iter().map(|(place, ..)| place + 1).max().unwrap_or(0)
    }

    /// The role that the table belongs to.
    pub(crate) fn owner(&self) -> Oid {
        // SAFETY: the table is open.
        unsafe { (*(*self.table).rd_rel).relowner }
    }

    pub(crate) fn close(self) {
        // SAFETY: no scan is running.
        unsafe { sys::guarded(|| self.end()) };
    }
}

/// All of these only inside `sys::guarded`. A scan is ended before its table is closed.
impl Scan {
    /// # Safety
    ///
    /// An index of the table, and keys of its columns.
    unsafe fn by(open: &Open, index: Oid, keys: &mut [ScanKeyData]) -> Self {
        // SAFETY: the caller's promise; the scan copies the keys.
        let scan = unsafe {
            sys::systable_beginscan(
                open.table,
                index,
                true,
                open.snapshot,
                keys.len() as i32,
                keys.as_mut_ptr(),
            )
        };
        Scan { scan, index: core::ptr::null_mut() }
    }

    /// # Safety
    ///
    /// As `by`.
    unsafe fn in_order(open: &Open, index: Oid, keys: &mut [ScanKeyData]) -> Self {
        // SAFETY: as above.
        unsafe {
            let index = sys::index_open(index, LOCK);
            let scan = sys::systable_beginscan_ordered(
                open.table,
                index,
                open.snapshot,
                keys.len() as i32,
                keys.as_mut_ptr(),
            );
            Scan { scan, index }
        }
    }

    unsafe fn of_all(open: &Open) -> Self {
        // SAFETY: no index and no keys.
        let scan = unsafe {
            sys::systable_beginscan(open.table, Oid::INVALID, false, open.snapshot, 0, core::ptr::null_mut())
        };
        Scan { scan, index: core::ptr::null_mut() }
    }

    /// Whether there is another row; the columns that are read are deformed.
    unsafe fn next(self, open: &Open) -> bool {
        // SAFETY: the caller's promise.
        unsafe { self.deform(open, sys::systable_getnext(self.scan)) }
    }

    /// The same, against the order of the index.
    unsafe fn previous(self, open: &Open) -> bool {
        let backward = pg_sys::ScanDirection::BackwardScanDirection;
        // SAFETY: the caller's promise.
        unsafe { self.deform(open, sys::systable_getnext_ordered(self.scan, backward)) }
    }

    unsafe fn deform(self, open: &Open, tuple: pg_sys::HeapTuple) -> bool {
        if tuple.is_null() {
            return false;
        }
        // SAFETY: the slot holds the row, of which no column is deformed yet.
        unsafe { sys::slot_getsomeattrs_int((*self.scan).slot, open.width() as i32) };
        true
    }

    unsafe fn end(self) {
        // SAFETY: the caller's promise; the index is closed last.
        unsafe {
            if self.index.is_null() {
                sys::systable_endscan(self.scan);
            } else {
                sys::systable_endscan_ordered(self.scan);
                sys::index_close(self.index, LOCK);
            }
        }
    }
}

/// The value of a column of type text, by position, counted from 0; with the column's collation.
pub(crate) fn text_key(place: usize, collation: Oid, text: &str) -> Key<'_> {
    Key { place, value: Value::Text(text, collation) }
}

/// The values of the first columns, of type text, compared byte by byte.
pub(crate) fn text_keys<const K: usize>(values: [&str; K]) -> [Key<'_>; K] {
    core::array::from_fn(|place| text_key(place, pg_sys::C_COLLATION_OID, values[place]))
}

/// The texts that begin with a prefix, in a column of the collation "C". `after` is the first text after all of them.
pub(crate) fn prefix_keys<'a>(place: usize, prefix: &'a str, after: &'a str) -> [Key<'a>; 2] {
    [Key { place, value: Value::From(prefix) }, Key { place, value: Value::Before(after) }]
}

/// The value of a column of type uuid.
pub(crate) fn uuid_key(place: usize, id: &[u8; 16]) -> Key<'_> {
    Key { place, value: Value::Uuid(id) }
}

/// The latest value of a column of type timestamptz, in microseconds since 2000-01-01.
pub(crate) fn until_key(place: usize, time: i64) -> Key<'static> {
    Key { place, value: Value::Until(time) }
}

/// Keys as a scan takes them; the values live as long as `keys`, or in the current memory context.
///
/// # Safety
///
/// Only inside `sys::guarded`.
unsafe fn scan_keys<const K: usize>(keys: &[Key<'_>; K]) -> [ScanKeyData; K] {
    keys.each_ref().map(|Key { place, value }| {
        // SAFETY: the text is copied.
        let copy = |text: &str| unsafe {
            Datum::from(sys::cstring_to_text_with_len(text.as_ptr().cast::<c_char>(), text.len() as i32))
        };
        let (strategy, data_type, collation, function, argument) = match *value {
            Value::Text(text, collation) => {
                (pg_sys::BTEqualStrategyNumber, pg_sys::TEXTOID, collation, pg_sys::F_TEXTEQ, copy(text))
            }
            Value::From(text) => {
                let (strategy, function) = (pg_sys::BTGreaterEqualStrategyNumber, pg_sys::F_TEXT_GE);
                (strategy, pg_sys::TEXTOID, pg_sys::C_COLLATION_OID, function, copy(text))
            }
            Value::Before(text) => {
                let (strategy, function) = (pg_sys::BTLessStrategyNumber, pg_sys::F_TEXT_LT);
                (strategy, pg_sys::TEXTOID, pg_sys::C_COLLATION_OID, function, copy(text))
            }
            Value::Uuid(id) => {
                let (strategy, function) = (pg_sys::BTEqualStrategyNumber, pg_sys::F_UUID_EQ);
                (strategy, pg_sys::UUIDOID, Oid::INVALID, function, Datum::from(id.as_ptr()))
            }
            Value::Until(time) => {
                let (strategy, function) = (pg_sys::BTLessEqualStrategyNumber, pg_sys::F_TIMESTAMPTZ_LE);
                (strategy, pg_sys::TIMESTAMPTZOID, Oid::INVALID, function, Datum::from(time))
            }
        };
        let mut key = ScanKeyData::default();
        // SAFETY: fills a key that is ours.
        unsafe {
            sys::ScanKeyEntryInitialize(
                &raw mut key,
                0,
                *place as i16 + 1,
                strategy as pg_sys::StrategyNumber,
                data_type,
                collation,
                Oid::from(function),
                argument,
            );
        }
        key
    })
}
