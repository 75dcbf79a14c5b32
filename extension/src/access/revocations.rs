//! What was revoked: tokens one by one, and all that a user had. Looked up by the latest snapshot.

use crate::store::relations::Relations;
use crate::store::rows::{Table, find_latest, text_keys};
use core::cell::Cell;
use pgrx::pg_sys;

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
    let key = |relations: &Relations| relations.denied_access_tokens_key;
    find_latest(&DENIED, key, text_keys([issuer, jti]), |_| Some(())).is_some()
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
    let key = |relations: &Relations| relations.revoked_users_key;
    find_latest(&USERS, key, text_keys([user_id]), |row| {
        Some(Revocation { mark: row.number(1_usize)?, at: row.number(2_usize)? })
    })
}

/// The mark that the tokens of this user must repeat; `None` if the user's tokens were not revoked as a whole while one
/// of those can still be in use. Then tokens with an earlier mark are good: they were issued after that revocation.
pub(crate) fn mark_of(user_id: &str) -> Option<i64> {
    of_user(user_id).map(|revocation| revocation.mark)
}
