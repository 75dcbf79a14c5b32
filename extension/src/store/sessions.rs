//! Rows of `tollgate.sessions`, by the latest snapshot: a session that was ended is over also where the transaction's
//! snapshot still shows it.
#![allow(unsafe_code)]

use super::rows::{Row, Table, find_latest, uuid_key};
use crate::pg::datum;
use core::cell::Cell;
use pgrx::pg_sys::{self, Datum};
use tollgate_core::net::Net;
use tollgate_core::refresh::SECRET_LEN;

/// Columns by position, counted from 0. Columns are only ever appended to the table.
#[derive(Clone, Copy)]
enum Column {
    Id = 0,
    UserId = 1,
    UserMark = 2,
    Kid = 3,
    Secret = 4,
    Generation = 5,
    RefreshedAt = 6,
    Idle = 7,
    ExpiresAt = 8,
    RevokedAt = 9,
    LastAddress = 10,
    ClientId = 11,
    Scopes = 12,
    Audience = 13,
    Claims = 14,
}

impl From<Column> for usize {
    fn from(column: Column) -> usize {
        column as usize
    }
}

thread_local! {
    static CHECKED_IN: Cell<Option<u64>> = const { Cell::new(None) };
}

const SESSIONS: Table<15> = Table {
    name: "sessions",
    relation: |relations| relations.sessions,
    columns: [
        (Column::Id as usize, c"id", pg_sys::UUIDOID),
        (Column::UserId as usize, c"user_id", pg_sys::TEXTOID),
        (Column::UserMark as usize, c"user_mark", pg_sys::INT8OID),
        (Column::Kid as usize, c"kid", pg_sys::TEXTOID),
        (Column::Secret as usize, c"secret", pg_sys::BYTEAOID),
        (Column::Generation as usize, c"generation", pg_sys::INT8OID),
        (Column::RefreshedAt as usize, c"refreshed_at", pg_sys::TIMESTAMPTZOID),
        (Column::Idle as usize, c"idle", pg_sys::INTERVALOID),
        (Column::ExpiresAt as usize, c"expires_at", pg_sys::TIMESTAMPTZOID),
        (Column::RevokedAt as usize, c"revoked_at", pg_sys::TIMESTAMPTZOID),
        (Column::LastAddress as usize, c"last_address", pg_sys::INETOID),
        (Column::ClientId as usize, c"client_id", pg_sys::TEXTOID),
        (Column::Scopes as usize, c"scopes", pg_sys::TEXTARRAYOID),
        (Column::Audience as usize, c"audience", pg_sys::TEXTARRAYOID),
        (Column::Claims as usize, c"claims", pg_sys::JSONBOID),
    ],
    checked_in: &CHECKED_IN,
};

/// What a refresh needs of a session. Times are microseconds since 2000-01-01.
pub(crate) struct Session {
    pub(crate) user_id: String,
    pub(crate) mark: Option<i64>,
    pub(crate) kid: String,
    pub(crate) secret: [u8; SECRET_LEN],
    pub(crate) generation: i64,
    pub(crate) refreshed_at: i64,
    pub(crate) idle: i64,
    pub(crate) expires_at: i64,
    pub(crate) is_revoked: bool,
    pub(crate) last_address: Option<Net>,
    pub(crate) client_id: Option<String>,
    pub(crate) scopes: Vec<String>,
    pub(crate) audience: Vec<String>,
    /// An object, as JSON.
    pub(crate) claims: String,
}

/// What a verification needs of a session that is not revoked.
pub(crate) struct Unrevoked {
    pub(crate) user_id: String,
    pub(crate) mark: Option<i64>,
    pub(crate) kid: String,
}

pub(crate) fn session(id: &[u8; 16]) -> Option<Session> {
    find(id, |row| {
        Some(Session {
            user_id: row.text(Column::UserId)?,
            mark: row.number(Column::UserMark),
            kid: row.text(Column::Kid)?,
            secret: row.bytes(Column::Secret)?.try_into().ok()?,
            generation: row.number(Column::Generation)?,
            refreshed_at: row.number(Column::RefreshedAt)?,
            idle: row.datum(Column::Idle).map(microseconds)?,
            expires_at: row.number(Column::ExpiresAt)?,
            is_revoked: row.datum(Column::RevokedAt).is_some(),
            last_address: row.bytes(Column::LastAddress).and_then(datum::net),
            client_id: row.text(Column::ClientId),
            scopes: row.texts(Column::Scopes).unwrap_or_default(),
            audience: row.texts(Column::Audience).unwrap_or_default(),
            claims: row.datum(Column::Claims).map(datum::json_text)?,
        })
    })
}

/// `None` if there is none, or it is revoked.
pub(crate) fn unrevoked(id: &[u8; 16]) -> Option<Unrevoked> {
    find(id, |row| {
        if row.datum(Column::RevokedAt).is_some() {
            return None;
        }
        Some(Unrevoked {
            user_id: row.text(Column::UserId)?,
            mark: row.number(Column::UserMark),
            kid: row.text(Column::Kid)?,
        })
    })
}

fn find<T>(id: &[u8; 16], read: impl FnOnce(&Row<'_>) -> Option<T>) -> Option<T> {
    find_latest(&SESSIONS, |relations| relations.sessions_key, [uuid_key(Column::Id as usize, id)], read)
}

/// An interval, in microseconds. Ours have neither months nor days; one that was stored by hand is taken for 30 days a
/// month, as PostgreSQL compares them.
fn microseconds(interval: Datum) -> i64 {
    const DAY: i64 = 86_400_000_000;
    // SAFETY: a column of type interval, in a row that is pinned.
    let pg_sys::Interval { time, day, month } = unsafe { *interval.cast_mut_ptr::<pg_sys::Interval>() };
    let days = i64::from(month) * 30 + i64::from(day);
    days.saturating_mul(DAY).saturating_add(time)
}
