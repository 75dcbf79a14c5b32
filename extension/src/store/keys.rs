//! Rows of `tollgate.sealed_keys`, read without a plan, by the latest snapshot: a key that was withdrawn is refused also
//! where the transaction's snapshot still shows it. Nothing is held after a read.
#![allow(unsafe_code)]

use super::relations::{self, Relations};
use crate::error::OrRaise;
use crate::pg::datum;
use core::cell::Cell;
use core::ffi::CStr;
use pgrx::IntoDatum;
use pgrx::pg_sys::{self, Datum, Oid, ScanDirection, ScanKeyData};

/// Columns by position, counted from 0. Columns are only ever appended to the table.
#[derive(Clone, Copy)]
enum Column {
    Kid = 0,
    Purpose = 1,
    Algorithm = 2,
    PublicKey = 3,
    Sealed = 4,
    SignsFrom = 5,
    RetiresAt = 6,
    VerifiesUntil = 7,
    WithdrawnAt = 8,
}

/// The columns that the library was built for.
const EXPECTED: [(Column, &CStr, Oid); 9] = [
    (Column::Kid, c"kid", pg_sys::TEXTOID),
    (Column::Purpose, c"purpose", pg_sys::TEXTOID),
    (Column::Algorithm, c"algorithm", pg_sys::TEXTOID),
    (Column::PublicKey, c"public_key", pg_sys::TEXTOID),
    (Column::Sealed, c"sealed", pg_sys::BYTEAOID),
    (Column::SignsFrom, c"signs_from", pg_sys::TIMESTAMPTZOID),
    (Column::RetiresAt, c"retires_at", pg_sys::TIMESTAMPTZOID),
    (Column::VerifiesUntil, c"verifies_until", pg_sys::TIMESTAMPTZOID),
    (Column::WithdrawnAt, c"withdrawn_at", pg_sys::TIMESTAMPTZOID),
];

thread_local! {
    /// The epoch in which the table's columns were last checked.
    static CHECKED_IN: Cell<Option<u64>> = const { Cell::new(None) };
}

/// A key that signs now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Signing {
    pub(crate) kid: String,
    pub(crate) purpose: String,
    pub(crate) algorithm: String,
    pub(crate) sealed: Vec<u8>,
}

/// A key that verifies now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Verifying {
    pub(crate) algorithm: String,
    pub(crate) public_key: String,
}

/// The key of a purpose that began to sign last. `now` is in microseconds since 2000-01-01, as everywhere.
pub(crate) fn signing(purpose: &str, now: i64) -> Option<Signing> {
    let purpose = purpose.into_datum()?;
    let keys = [text_key(Column::Purpose, purpose), time_key(Column::SignsFrom, now)];
    first(
        |known| known.sealed_keys_signing_index,
        keys,
        ScanDirection::BackwardScanDirection,
        |row| {
            let signs = row.time(Column::RetiresAt).is_none_or(|end| now < end);
            signs.then(|| {
                Some(Signing {
                    kid: row.text(Column::Kid)?,
                    purpose: row.text(Column::Purpose)?,
                    algorithm: row.text(Column::Algorithm)?,
                    sealed: row.bytes(Column::Sealed)?.to_vec(),
                })
            })?
        },
    )
}

/// The key of that kid, unless it is withdrawn or gone.
pub(crate) fn verifying(kid: &str, now: i64) -> Option<Verifying> {
    let keys = [text_key(Column::Kid, kid.into_datum()?)];
    first(
        |known| known.sealed_keys_index,
        keys,
        ScanDirection::ForwardScanDirection,
        |row| {
            let verifies = row.time(Column::WithdrawnAt).is_none()
                && row.time(Column::VerifiesUntil).is_none_or(|end| now < end);
            verifies.then(|| {
                Some(Verifying {
                    algorithm: row.text(Column::Algorithm)?,
                    public_key: row.text(Column::PublicKey)?,
                })
            })?
        },
    )
}

struct Row {
    values: [Datum; EXPECTED.len()],
    nulls: [bool; EXPECTED.len()],
}

impl Row {
    fn datum(&self, column: Column) -> Option<Datum> {
        (!self.nulls[column as usize]).then(|| self.values[column as usize])
    }

    fn bytes(&self, column: Column) -> Option<&[u8]> {
        // SAFETY: a column of a varlena type (EXPECTED was checked), in a row that is pinned as long as this lives.
        self.datum(column).map(|datum| unsafe { datum::varlena(datum) })
    }

    fn text(&self, column: Column) -> Option<String> {
        Some(String::from_utf8_lossy(self.bytes(column)?).into_owned())
    }

    fn time(&self, column: Column) -> Option<i64> {
        self.datum(column).map(|datum| datum.value().cast_signed() as i64)
    }
}

/// Reads the first row that a scan of an index finds.
fn first<const N: usize, T>(
    index: fn(&Relations) -> Oid,
    mut keys: [ScanKeyData; N],
    direction: ScanDirection::Type,
    read: impl FnOnce(&Row) -> Option<T>,
) -> Option<T> {
    let lock = pg_sys::AccessShareLock.cast_signed();
    loop {
        let known = relations::relations();
        let epoch = relations::epoch();
        // SAFETY: any oid may be passed. Everything that is opened is closed again; on an ERROR the transaction's resource
        // owner does so. The row is copied out while it is pinned.
        unsafe {
            let table = pg_sys::try_table_open(known.sealed_keys, lock);
            if table.is_null() {
                relations::forget();
                continue;
            }
            // Waiting for the lock processes invalidations: the index may have been replaced.
            if relations::epoch() != epoch {
                pg_sys::table_close(table, lock);
                continue;
            }
            if CHECKED_IN.get() != Some(epoch) {
                let columns = EXPECTED.map(|(column, name, oid)| (column as usize, name, oid));
                relations::check_columns(known.sealed_keys, "sealed_keys", columns).or_raise();
                CHECKED_IN.set(Some(epoch));
            }
            let index = pg_sys::index_open(index(&known), lock);
            let snapshot = pg_sys::RegisterSnapshot(pg_sys::GetLatestSnapshot());
            let scan =
                pg_sys::systable_beginscan_ordered(table, index, snapshot, N as i32, keys.as_mut_ptr());
            let found = pg_sys::systable_getnext_ordered(scan, direction);
            let result = found.as_mut().and_then(|tuple| {
                let mut row = Row { values: [Datum::null(); _], nulls: [true; _] };
                for (n, (value, null)) in row.values.iter_mut().zip(&mut row.nulls).enumerate() {
                    *value = pg_sys::heap_getattr(tuple, n as i32 + 1, (*table).rd_att, null);
                }
                read(&row)
            });
            pg_sys::systable_endscan_ordered(scan);
            pg_sys::UnregisterSnapshot(snapshot);
            pg_sys::index_close(index, lock);
            pg_sys::table_close(table, lock);
            return result;
        }
    }
}

fn text_key(column: Column, value: Datum) -> ScanKeyData {
    key(column, pg_sys::BTEqualStrategyNumber, pg_sys::TEXTOID, pg_sys::F_TEXTEQ, value)
}

fn time_key(column: Column, value: i64) -> ScanKeyData {
    let value = Datum::from(value);
    key(column, pg_sys::BTLessEqualStrategyNumber, pg_sys::TIMESTAMPTZOID, pg_sys::F_TIMESTAMPTZ_LE, value)
}

/// For `systable_beginscan_ordered`, which takes columns of the table, and translates them into columns of the index.
fn key(column: Column, strategy: u32, data_type: Oid, function: u32, value: Datum) -> ScanKeyData {
    let mut key = ScanKeyData::default();
    // SAFETY: fills a key that is ours; the columns of type text have the collation "C".
    unsafe {
        pg_sys::ScanKeyEntryInitialize(
            &raw mut key,
            0,
            column as i16 + 1,
            strategy as pg_sys::StrategyNumber,
            data_type,
            pg_sys::C_COLLATION_OID,
            Oid::from(function),
            value,
        );
    }
    key
}
