//! Rows of `tollgate.sessions`, by the latest snapshot: a session that was ended is over also where the transaction's
//! snapshot still shows it.
#![allow(unsafe_code)]

use super::relations::relations;
use super::rows::{Open, Row, Table, uuid_key};
use crate::pg::datum::{self, TextArray};
use core::cell::Cell;
use pgrx::pg_sys::{self, Datum};
use pgrx::{IntoDatum, Uuid};
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
            user_id: text(row, Column::UserId)?,
            mark: number(row, Column::UserMark),
            kid: text(row, Column::Kid)?,
            secret: bytes(row, Column::Secret)?.try_into().ok()?,
            generation: number(row, Column::Generation)?,
            refreshed_at: number(row, Column::RefreshedAt)?,
            idle: row.datum(Column::Idle as usize).map(microseconds)?,
            expires_at: number(row, Column::ExpiresAt)?,
            is_revoked: row.datum(Column::RevokedAt as usize).is_some(),
            last_address: bytes(row, Column::LastAddress).and_then(datum::net),
            client_id: text(row, Column::ClientId),
            scopes: texts(row, Column::Scopes),
            audience: texts(row, Column::Audience),
            // SAFETY: a column of type jsonb (SESSIONS was checked).
            claims: row.datum(Column::Claims as usize).map(|json| unsafe { datum::json_text(json) })?,
        })
    })
}

/// `None` if there is none, or it is revoked.
pub(crate) fn unrevoked(id: &[u8; 16]) -> Option<Unrevoked> {
    find(id, |row| {
        if row.datum(Column::RevokedAt as usize).is_some() {
            return None;
        }
        Some(Unrevoked {
            user_id: text(row, Column::UserId)?,
            mark: number(row, Column::UserMark),
            kid: text(row, Column::Kid)?,
        })
    })
}

fn find<T>(id: &[u8; 16], read: impl FnOnce(&Row<'_>) -> Option<T>) -> Option<T> {
    let key = uuid_key(Column::Id as usize, Uuid::from_bytes(*id).into_datum()?);
    let sessions = Open::latest(&SESSIONS);
    let found = sessions.find(relations().sessions_key, [key], read);
    sessions.close();
    found
}

fn bytes<'r>(row: &'r Row<'_>, column: Column) -> Option<&'r [u8]> {
    // SAFETY: a column of a varlena type (SESSIONS was checked), in a row that is pinned as long as this lives.
    row.datum(column as usize).map(|datum| unsafe { datum::varlena(datum) })
}

fn text(row: &Row<'_>, column: Column) -> Option<String> {
    Some(String::from_utf8_lossy(bytes(row, column)?).into_owned())
}

fn texts(row: &Row<'_>, column: Column) -> Vec<String> {
    let owned = |text: &[u8]| String::from_utf8_lossy(text).into_owned();
    bytes(row, column).map_or_else(Vec::new, |array| TextArray::parse(array).present().map(owned).collect())
}

/// A bigint or a time.
fn number(row: &Row<'_>, column: Column) -> Option<i64> {
    row.datum(column as usize).map(|datum| datum.value().cast_signed() as i64)
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
