//! What was revoked: tokens one by one, and all that a user had. Looked up by the latest snapshot.

use crate::store::relations::{Relations, relations};
use crate::store::rows::{Open, Row, Table, text_key};
use core::cell::Cell;
use pgrx::IntoDatum;
use pgrx::pg_sys::{self, Oid, ScanKeyData};

thread_local! {
    static DENIED_CHECKED_IN: Cell<Option<u64>> = const { Cell::new(None) };
    static USERS_CHECKED_IN: Cell<Option<u64>> = const { Cell::new(None) };
}

const DENIED: Table<3> = Table {
    name: "denied_access_tokens",
    relation: |relations| relations.denied_access_tokens,
    columns: [
        (0, c"issuer", pg_sys::TEXTOID),
        (1, c"jti", pg_sys::TEXTOID),
        (2, c"expires_at", pg_sys::TIMESTAMPTZOID),
    ],
    checked_in: &DENIED_CHECKED_IN,
};

const USERS: Table<3> = Table {
    name: "revoked_users",
    relation: |relations| relations.revoked_users,
    columns: [
        (0, c"user_id", pg_sys::TEXTOID),
        (1, c"mark", pg_sys::INT8OID),
        (2, c"revoked_at", pg_sys::TIMESTAMPTZOID),
    ],
    checked_in: &USERS_CHECKED_IN,
};

/// Whether this token was revoked.
pub(crate) fn is_denied(issuer: &str, jti: &str) -> bool {
    find(&DENIED, |relations| relations.denied_access_tokens_key, [issuer, jti], |_| Some(())).is_some()
}

/// When all that a user had was revoked last.
#[derive(Clone, Copy)]
pub(crate) struct Revocation {
    /// What tokens of ours must repeat.
    pub(crate) mark: i64,
    /// In microseconds since 2000-01-01.
    pub(crate) at: i64,
}

pub(crate) fn of_user(user_id: &str) -> Option<Revocation> {
    find(
        &USERS,
        |relations| relations.revoked_users_key,
        [user_id],
        |row| {
            let number = |place| row.datum(place).map(|datum| datum.value().cast_signed() as i64);
            Some(Revocation { mark: number(1)?, at: number(2)? })
        },
    )
}

/// The mark that the tokens of this user must repeat; `None` if the user's tokens were not revoked as a whole while one
/// of those can still be in use. Then tokens with an earlier mark are good: they were issued after that revocation.
pub(crate) fn mark_of(user_id: &str) -> Option<i64> {
    of_user(user_id).map(|revocation| revocation.mark)
}

/// Reads the row with this primary key, whose columns are the first ones of the table. What is read must not point into
/// the row.
fn find<const N: usize, const K: usize, T>(
    table: &Table<N>,
    primary_key: fn(&Relations) -> Oid,
    key: [&str; K],
    read: impl FnOnce(&Row<'_>) -> Option<T>,
) -> Option<T> {
    let keys: [ScanKeyData; K] = core::array::from_fn(|place| {
        let text = key[place].into_datum().expect("a text is not NULL");
        text_key(place, pg_sys::C_COLLATION_OID, text)
    });
    let table = Open::latest(table);
    let found = table.find(primary_key(&relations()), keys, read);
    table.close();
    found
}
