//! Rows of our small tables, read without a plan: by their primary key, or all of them. They are the rows that a
//! statement starting now would see.
#![allow(unsafe_code)]

use super::relations::{self, Relations};
use crate::error::OrRaise;
use core::cell::Cell;
use core::ffi::CStr;
use pgrx::pg_sys::{self, Datum, Oid};
use std::thread::LocalKey;

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
        loop {
            let oid = (table.relation)(&relations::relations());
            // SAFETY: any oid may be passed. The snapshot stays registered until this is closed.
            unsafe {
                let relation = pg_sys::try_table_open(oid, pg_sys::AccessShareLock.cast_signed());
                if relation.is_null() {
                    relations::forget();
                    continue;
                }
                let epoch = relations::epoch();
                if table.checked_in.get() != Some(epoch) {
                    relations::check_columns(oid, table.name, table.columns).or_raise();
                    table.checked_in.set(Some(epoch));
                }
                // As SPI does before each statement.
                pg_sys::CommandCounterIncrement();
                let snapshot = pg_sys::RegisterSnapshot(pg_sys::GetTransactionSnapshot());
                return Open { table: relation, snapshot };
            }
        }
    }

    /// Whether a row has this text in the indexed first column.
    pub(crate) fn has(&self, index: Oid, text: Datum) -> bool {
        let mut key = pg_sys::ScanKeyData::default();
        // SAFETY: the key outlives the scan; the column is of type text, and the collation is the column's. The scan is
        // ended before anything that it uses.
        unsafe {
            pg_sys::ScanKeyEntryInitialize(
                &raw mut key,
                0,
                1,
                pg_sys::BTEqualStrategyNumber as pg_sys::StrategyNumber,
                pg_sys::TEXTOID,
                pg_sys::DEFAULT_COLLATION_OID,
                pg_sys::Oid::from(pg_sys::F_TEXTEQ),
                text,
            );
            let scan = pg_sys::systable_beginscan(self.table, index, true, self.snapshot, 1, &raw mut key);
            let found = !pg_sys::systable_getnext(scan).is_null();
            pg_sys::systable_endscan(scan);
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
    unsafe fn look_at(&self, tuple: &mut pg_sys::HeapTupleData, look: &mut impl FnMut(&Row<'_>)) {
        // SAFETY: the descriptor is that of the table, which is open.
        let descriptor = unsafe { (*self.table).rd_att };
        // SAFETY: as above.
        let columns = usize::try_from(unsafe { (*descriptor).natts }).unwrap_or(0);
        let (mut values, mut nulls) = (vec![Datum::null(); columns], vec![true; columns]);
        // SAFETY: there is room for each column.
        unsafe { pg_sys::heap_deform_tuple(tuple, descriptor, values.as_mut_ptr(), nulls.as_mut_ptr()) };
        look(&Row { values: &values, nulls: &nulls });
    }

    pub(crate) fn close(self) {
        // SAFETY: no scan is running.
        unsafe {
            pg_sys::UnregisterSnapshot(self.snapshot);
            pg_sys::table_close(self.table, pg_sys::NoLock.cast_signed());
        }
    }
}
