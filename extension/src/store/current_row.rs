//! A row of a small table by its text key, as it is now: read with the latest snapshot, whatever snapshot the
//! transaction has, since an older one would not show a revocation. One descent of one index, no plan, no row lock;
//! nothing is held afterwards.
#![allow(unsafe_code)]

use super::relations::{self, Relations};
use crate::error::OrRaise;
use core::cell::Cell;
use core::ffi::CStr;
use pgrx::IntoDatum;
use pgrx::pg_sys::{self, Datum, Oid};
use std::thread::LocalKey;

/// A table with a primary key of `K` columns of type text COLLATE "C", its first ones.
pub(crate) struct Table<const K: usize, const N: usize> {
    pub(crate) name: &'static str,
    pub(crate) relation: fn(&Relations) -> Oid,
    pub(crate) primary_key: fn(&Relations) -> Oid,
    /// Those that are read, by position, counted from 0.
    pub(crate) columns: [(usize, &'static CStr, Oid); N],
    /// The column that [`Table::find`] returns: of a type that is passed by value, NOT NULL.
    pub(crate) value: usize,
    /// The epoch in which the columns were last checked.
    pub(crate) checked_in: &'static LocalKey<Cell<Option<u64>>>,
}

impl<const K: usize, const N: usize> Table<K, N> {
    /// The value in the row with this key.
    pub(crate) fn find(&self, key: [&str; K]) -> Option<Datum> {
        let keys: [pg_sys::ScanKeyData; K] = core::array::from_fn(|n| scan_key(n, key[n]));
        loop {
            let relations = relations::relations();
            let epoch = relations::epoch();
            if self.checked_in.get() != Some(epoch) {
                relations::check_columns((self.relation)(&relations), self.name, self.columns).or_raise();
                self.checked_in.set(Some(epoch));
            }
            let lock = pg_sys::AccessShareLock.cast_signed();
            // SAFETY: any oid may be passed.
            let table = unsafe { pg_sys::try_table_open((self.relation)(&relations), lock) };
            // Waiting for the lock processes invalidations: the table may be gone, or its index replaced.
            if table.is_null() {
                relations::forget();
                continue;
            }
            // SAFETY: an open table, and its index while nothing has changed; closed again. On an ERROR the
            // transaction's resource owner releases both.
            unsafe {
                let found = (relations::epoch() == epoch)
                    .then(|| self.value_in(table, (self.primary_key)(&relations), keys));
                pg_sys::table_close(table, lock);
                if let Some(value) = found {
                    return value;
                }
            }
        }
    }

    /// # Safety
    ///
    /// The table is open, and the index one of its.
    unsafe fn value_in(
        &self,
        table: pg_sys::Relation,
        index: Oid,
        mut keys: [pg_sys::ScanKeyData; K],
    ) -> Option<Datum> {
        // SAFETY: the keys outlive the scan, which is ended before its snapshot is released. The value is passed by
        // value (`columns` was checked), so it outlives the row.
        unsafe {
            let snapshot = pg_sys::RegisterSnapshot(pg_sys::GetLatestSnapshot());
            let scan = pg_sys::systable_beginscan(table, index, true, snapshot, K as i32, keys.as_mut_ptr());
            let value = pg_sys::systable_getnext(scan).as_mut().map(|row| {
                let descriptor = (*table).rd_att;
                let columns = usize::try_from((*descriptor).natts).unwrap_or(0);
                let (mut values, mut nulls) = (vec![Datum::null(); columns], vec![true; columns]);
                pg_sys::heap_deform_tuple(row, descriptor, values.as_mut_ptr(), nulls.as_mut_ptr());
                values[self.value]
            });
            pg_sys::systable_endscan(scan);
            pg_sys::UnregisterSnapshot(snapshot);
            value
        }
    }
}

fn scan_key(place: usize, text: &str) -> pg_sys::ScanKeyData {
    let mut key = pg_sys::ScanKeyData::default();
    let argument = text.into_datum().expect("a text is not NULL");
    // SAFETY: fills a key that is ours; the text lives in the memory context of the call.
    unsafe {
        pg_sys::ScanKeyEntryInitialize(
            &raw mut key,
            0,
            place as i16 + 1,
            pg_sys::BTEqualStrategyNumber as pg_sys::StrategyNumber,
            pg_sys::TEXTOID,
            pg_sys::C_COLLATION_OID,
            pg_sys::Oid::from(pg_sys::F_TEXTEQ),
            argument,
        );
    }
    key
}
