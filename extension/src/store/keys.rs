//! Rows of `tollgate.sealed_keys`, by the latest snapshot: a key that was withdrawn is refused also where the
//! transaction's snapshot still shows it.

use super::public_keys::{self, StoredKey};
use super::relations::relations;
use super::rows::{Open, Row, Table, find_latest, prefix_keys, text_key, text_keys, until_key};
use core::cell::Cell;
use pgrx::pg_sys;
use std::rc::Rc;

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

impl From<Column> for usize {
    fn from(column: Column) -> usize {
        column as usize
    }
}

thread_local! {
    static CHECKED_IN: Cell<Option<u64>> = const { Cell::new(None) };
}

const KEYS: Table<9> = Table {
    name: "sealed_keys",
    relation: |relations| relations.sealed_keys,
    columns: [
        (Column::Kid as usize, c"kid", pg_sys::TEXTOID),
        (Column::Purpose as usize, c"purpose", pg_sys::TEXTOID),
        (Column::Algorithm as usize, c"algorithm", pg_sys::TEXTOID),
        (Column::PublicKey as usize, c"public_key", pg_sys::TEXTOID),
        (Column::Sealed as usize, c"sealed", pg_sys::BYTEAOID),
        (Column::SignsFrom as usize, c"signs_from", pg_sys::TIMESTAMPTZOID),
        (Column::RetiresAt as usize, c"retires_at", pg_sys::TIMESTAMPTZOID),
        (Column::VerifiesUntil as usize, c"verifies_until", pg_sys::TIMESTAMPTZOID),
        (Column::WithdrawnAt as usize, c"withdrawn_at", pg_sys::TIMESTAMPTZOID),
    ],
    checked_in: &CHECKED_IN,
};

/// A key with its sealed private half; a secret key has no other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Signing {
    pub(crate) kid: String,
    pub(crate) purpose: String,
    pub(crate) algorithm: String,
    pub(crate) sealed: Vec<u8>,
}

/// The key of a purpose that began to sign last. `now` is in microseconds since 2000-01-01, as everywhere.
pub(crate) fn signing(purpose: &str, now: i64) -> Option<Signing> {
    let purpose = text_key(Column::Purpose as usize, pg_sys::C_COLLATION_OID, purpose);
    let keys = Open::latest(&KEYS);
    let index = relations().sealed_keys_signing_index;
    let found = keys.last(index, [purpose, until_key(Column::SignsFrom as usize, now)], |row| {
        if row.number(Column::RetiresAt).is_some_and(|end| end <= now) {
            return None;
        }
        signing_row(row)
    });
    keys.close();
    found
}

/// The keys of the purposes that begin with a prefix, unless withdrawn. `after` is the first text after all of them.
pub(crate) fn sealed_with_prefix(prefix: &str, after: &str) -> Vec<Signing> {
    let mut found = Vec::new();
    let keys = Open::latest(&KEYS);
    let purposes = prefix_keys(Column::Purpose as usize, prefix, after);
    keys.each_of(relations().sealed_keys_signing_index, purposes, |row| found.extend(signing_row(row)));
    keys.close();
    found
}

/// The public key of that kid, unless it is withdrawn or gone. Secret keys have none.
pub(crate) fn verifying(kid: &str, now: i64) -> Option<Rc<StoredKey>> {
    find(kid, now, |row| {
        Some(public_keys::of_row(row.bytes(Column::Algorithm)?, row.bytes(Column::PublicKey)?))
    })
}

/// The key of that kid and purpose, unless it is withdrawn or gone.
pub(crate) fn sealed(kid: &str, purpose: &str, now: i64) -> Option<Signing> {
    of_kid(kid, now).filter(|row| row.purpose == purpose)
}

/// The key of that kid, unless it is withdrawn or gone.
pub(crate) fn of_kid(kid: &str, now: i64) -> Option<Signing> {
    find(kid, now, signing_row)
}

/// Whether there is a key of that kid and purpose that is neither withdrawn nor gone.
pub(crate) fn is_live(kid: &str, purpose: &str, now: i64) -> bool {
    find(kid, now, |row| (row.bytes(Column::Purpose)? == purpose.as_bytes()).then_some(())).is_some()
}

/// What is read of the key of that kid, unless it is withdrawn or gone.
fn find<T>(kid: &str, now: i64, read: impl FnOnce(&Row<'_>) -> Option<T>) -> Option<T> {
    find_latest(
        &KEYS,
        |relations| relations.sealed_keys_index,
        text_keys([kid]),
        |row| {
            if row.number(Column::WithdrawnAt).is_some()
                || row.number(Column::VerifiesUntil).is_some_and(|end| end <= now)
            {
                return None;
            }
            read(row)
        },
    )
}

fn signing_row(row: &Row<'_>) -> Option<Signing> {
    Some(Signing {
        kid: row.text(Column::Kid)?,
        purpose: row.text(Column::Purpose)?,
        algorithm: row.text(Column::Algorithm)?,
        sealed: row.bytes(Column::Sealed)?.to_vec(),
    })
}
