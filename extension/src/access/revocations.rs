//! What was revoked: tokens one by one, and all that a user had. Looked up by the latest snapshot.

use crate::store::current_row::Table;
use core::cell::Cell;
use pgrx::pg_sys;

thread_local! {
    static DENIED_CHECKED_IN: Cell<Option<u64>> = const { Cell::new(None) };
    static USERS_CHECKED_IN: Cell<Option<u64>> = const { Cell::new(None) };
}

const DENIED: Table<2, 3> = Table {
    name: "denied_access_tokens",
    relation: |relations| relations.denied_access_tokens,
    primary_key: |relations| relations.denied_access_tokens_key,
    columns: [
        (0, c"issuer", pg_sys::TEXTOID),
        (1, c"jti", pg_sys::TEXTOID),
        (2, c"expires_at", pg_sys::TIMESTAMPTZOID),
    ],
    value: 2,
    checked_in: &DENIED_CHECKED_IN,
};

const USERS: Table<1, 2> = Table {
    name: "revoked_users",
    relation: |relations| relations.revoked_users,
    primary_key: |relations| relations.revoked_users_key,
    columns: [(0, c"user_id", pg_sys::TEXTOID), (1, c"mark", pg_sys::INT8OID)],
    value: 1,
    checked_in: &USERS_CHECKED_IN,
};

/// Whether this token was revoked.
pub(crate) fn is_denied(issuer: &str, jti: &str) -> bool {
    DENIED.find([issuer, jti]).is_some()
}

/// The mark that the tokens of this user must repeat; `None` if the user's tokens were not revoked as a whole while one
/// of those can still be in use. Then tokens with an earlier mark are good: they were issued after that revocation.
pub(crate) fn mark_of(user_id: &str) -> Option<i64> {
    USERS.find([user_id]).map(|mark| mark.value().cast_signed() as i64)
}
