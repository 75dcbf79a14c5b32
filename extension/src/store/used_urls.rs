//! Rows of `tollgate.used_urls`, which only this adds to.
#![allow(unsafe_code)]

use super::as_role;
use super::rows::{Open, Table, find_latest, uuid_key};
use super::statements::{Kept, with_plan};
use crate::error::Error;
use core::cell::Cell;
use pgrx::datum::{DatumWithOid, TimestampWithTimeZone};
use pgrx::{Uuid, pg_sys};

thread_local! {
    static CHECKED_IN: Cell<Option<u64>> = const { Cell::new(None) };
    static INSERT_PLAN: Kept = const { Cell::new(None) };
}

const USED: Table<2> = Table {
    name: "used_urls",
    relation: |relations| relations.used_urls,
    columns: [(0, c"id", pg_sys::UUIDOID), (1, c"expires_at", pg_sys::TIMESTAMPTZOID)],
    checked_in: &CHECKED_IN,
};

const INSERT: &str = "INSERT INTO tollgate.used_urls (id, expires_at) VALUES ($1, $2)
    ON CONFLICT ON CONSTRAINT used_urls_pkey DO NOTHING RETURNING true";

/// Whether a use of it is committed.
pub(crate) fn is_used(id: [u8; 16]) -> bool {
    find_latest(&USED, |relations| relations.used_urls_key, [uuid_key(0, &id)], |_| Some(())).is_some()
}

/// Stores a use, and says whether it is the first. Waits for one whose transaction is running. `expires_at` is in
/// microseconds since 2000-01-01.
pub(crate) fn note_use(id: [u8; 16], expires_at: i64) -> Result<bool, Error> {
    let table = Open::latest(&USED);
    let owner = table.owner();
    table.close();
    // SAFETY: each datum is of the type given with it.
    let arguments = unsafe {
        [
            DatumWithOid::new(Uuid::from_bytes(id), pg_sys::UUIDOID),
            DatumWithOid::new(TimestampWithTimeZone::try_from(expires_at).ok(), pg_sys::TIMESTAMPTZOID),
        ]
    };
    // The caller may verify, and has no privileges on the table.
    let is_first =
        as_role::run(owner, || with_plan(&INSERT_PLAN, INSERT, &arguments, |rows| Ok(!rows.is_empty())))?;
    if is_first {
        // Before the answer reaches the client, whatever synchronous_commit is: a crash must not make it good again.
        // SAFETY: sets a flag of the transaction.
        unsafe { pg_sys::ForceSyncCommit() };
    }
    Ok(is_first)
}
