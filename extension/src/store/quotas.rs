//! Rows of `tollgate.quotas` and `tollgate.quota_leases`, by the latest snapshot, and the periods of quotas. What they mean
//! is said in `sql/schema/quotas/quotas.sql`.
#![allow(unsafe_code)]

use super::relations;
use super::rows::{self, Row, Table, find_latest, text_key, uuid_key};
use crate::pg::sys;
use core::cell::Cell;
use pgrx::datum::TimestampWithTimeZone;
use pgrx::pg_sys::{self, Datum};
use pgrx::{IntoDatum, direct_function_call};
use tollgate_core::quota::Lease;

/// Columns of `quotas` by position, counted from 0. Columns are only ever appended to the table.
#[derive(Clone, Copy)]
enum Column {
    Id = 0,
    UserId = 2,
    Amount = 3,
    Per = 4,
    TimeZone = 5,
    Lease = 6,
    WithoutDaemon = 7,
    EndsAt = 8,
    Taken = 9,
    Holder = 10,
}

/// Of `quota_leases`.
#[derive(Clone, Copy)]
enum LeaseColumn {
    QuotaId = 0,
    Holder = 1,
    EndsAt = 2,
    Granted = 3,
}

impl From<Column> for usize {
    fn from(column: Column) -> usize {
        column as usize
    }
}

impl From<LeaseColumn> for usize {
    fn from(column: LeaseColumn) -> usize {
        column as usize
    }
}

thread_local! {
    static CHECKED_IN: Cell<Option<u64>> = const { Cell::new(None) };
    static LEASES_CHECKED_IN: Cell<Option<u64>> = const { Cell::new(None) };
    /// The epoch in which no user had a quota.
    static NO_USER_IN: Cell<Option<u64>> = const { Cell::new(None) };
}

const QUOTAS: Table<10> = Table {
    name: "quotas",
    relation: |relations| relations.quotas,
    columns: [
        (Column::Id as usize, c"id", pg_sys::UUIDOID),
        (Column::UserId as usize, c"user_id", pg_sys::TEXTOID),
        (Column::Amount as usize, c"amount", pg_sys::INT8OID),
        (Column::Per as usize, c"per", pg_sys::TEXTOID),
        (Column::TimeZone as usize, c"time_zone", pg_sys::TEXTOID),
        (Column::Lease as usize, c"lease", pg_sys::INT8OID),
        (Column::WithoutDaemon as usize, c"without_daemon", pg_sys::TEXTOID),
        (Column::EndsAt as usize, c"ends_at", pg_sys::TIMESTAMPTZOID),
        (Column::Taken as usize, c"taken", pg_sys::INT8OID),
        (Column::Holder as usize, c"holder", pg_sys::UUIDOID),
    ],
    checked_in: &CHECKED_IN,
};

const LEASES: Table<4> = Table {
    name: "quota_leases",
    relation: |relations| relations.quota_leases,
    columns: [
        (LeaseColumn::QuotaId as usize, c"quota_id", pg_sys::UUIDOID),
        (LeaseColumn::Holder as usize, c"holder", pg_sys::UUIDOID),
        (LeaseColumn::EndsAt as usize, c"ends_at", pg_sys::TIMESTAMPTZOID),
        (LeaseColumn::Granted as usize, c"granted", pg_sys::INT8OID),
    ],
    checked_in: &LEASES_CHECKED_IN,
};

/// The row of a quota. Times are microseconds since 2000-01-01.
pub(crate) struct Quota {
    pub(crate) id: [u8; 16],
    amount: i64,
    per: String,
    time_zone: String,
    lease: i64,
    is_open: bool,
    ends_at: i64,
    taken: i64,
    holder: Option<[u8; 16]>,
}

/// What this server may spend of a quota now, and how much of it is free.
pub(crate) struct Share {
    pub(crate) lease: Lease,
    /// Units that are not leased to any server.
    pub(crate) rest: u64,
}

pub(crate) fn of_id(id: &[u8; 16]) -> Option<Quota> {
    let key = uuid_key(Column::Id as usize, id);
    find_latest(&QUOTAS, |relations| relations.quotas_key, [key], read)
}

/// While no user has a quota, nothing is looked up: a backend remembers that until the table is said to have changed, which
/// a trigger does for each quota of a user (`note_user_quota`).
pub(crate) fn of_user(user_id: &str) -> Option<Quota> {
    // SAFETY: may be called wherever a lock may be taken, which does the same.
    unsafe { pg_sys::AcceptInvalidationMessages() };
    if NO_USER_IN.get() == Some(relations::epoch()) || !any_user() {
        return None;
    }
    let key = text_key(Column::UserId as usize, pg_sys::C_COLLATION_OID, user_id);
    find_latest(&QUOTAS, |relations| relations.quotas_user, [key], read)
}

/// Whether any user has a quota.
#[cold]
fn any_user() -> bool {
    let table = rows::Open::latest(&QUOTAS);
    let epoch = relations::epoch();
    let any = table.find(relations::relations().quotas_user, [], |_| Some(())).is_some();
    table.close();
    if !any {
        // A quota that was committed after the snapshot was taken also changes the epoch after that.
        NO_USER_IN.set(Some(epoch));
    }
    any
}

fn read(row: &Row<'_>) -> Option<Quota> {
    Some(Quota {
        id: row.uuid(Column::Id)?,
        amount: row.number(Column::Amount)?,
        per: row.text(Column::Per)?,
        time_zone: row.text(Column::TimeZone)?,
        lease: row.number(Column::Lease)?,
        is_open: row.bytes(Column::WithoutDaemon)? == b"open",
        ends_at: row.number(Column::EndsAt)?,
        taken: row.number(Column::Taken)?,
        holder: row.uuid(Column::Holder),
    })
}

impl Quota {
    /// What a server of this name may spend.
    pub(crate) fn share_of(&self, holder: &[u8; 16], now: i64) -> Share {
        let is_present = now < self.ends_at;
        let ends_at = if is_present { self.ends_at } else { period_end(&self.per, &self.time_zone, now) };
        let standing = if self.holder.is_some() { self.lease } else { 0 };
        let taken = if is_present { self.taken } else { standing };
        let (granted_until, granted) = granted(&self.id, holder).unwrap_or((i64::MIN, 0));
        let granted = if granted_until == ends_at {
            granted
        } else if self.holder.as_ref() == Some(holder) && !sys::is_in_recovery() {
            self.lease
        } else {
            0
        };
        let [granted, rest] = [granted, self.amount - taken].map(|units| u64::try_from(units).unwrap_or(0));
        let beyond = if self.is_open { rest } else { 0 };
        Share { lease: Lease { ends_at, granted, beyond }, rest }
    }
}

/// The end of the period that a server was last granted something in, and how much in all.
fn granted(quota: &[u8; 16], holder: &[u8; 16]) -> Option<(i64, i64)> {
    let keys =
        [uuid_key(LeaseColumn::QuotaId as usize, quota), uuid_key(LeaseColumn::Holder as usize, holder)];
    find_latest(
        &LEASES,
        |relations| relations.quota_leases_key,
        keys,
        |row| Some((row.number(LeaseColumn::EndsAt)?, row.number(LeaseColumn::Granted)?)),
    )
}

/// When the period ends that a moment is in; `i64::MAX` for a lifetime. Times are microseconds since 2000-01-01.
pub(crate) fn period_end(per: &str, time_zone: &str, at: i64) -> i64 {
    const HOUR: i64 = 3_600_000_000;
    // From the beginning of a period this leads into the next one, however long days and months are.
    let ahead = match per {
        "hour" => return truncate(per, time_zone, at) + HOUR,
        "day" => 36 * HOUR,
        "week" => 252 * HOUR,
        "month" => 45 * 24 * HOUR,
        _ => return i64::MAX,
    };
    truncate(per, time_zone, truncate(per, time_zone, at) + ahead)
}

/// `date_trunc(text, timestamptz, text)`.
fn truncate(per: &str, time_zone: &str, at: i64) -> i64 {
    let arguments = [per.into_datum(), Some(Datum::from(at)), time_zone.into_datum()];
    // SAFETY: arguments of the types that the function has.
    let start: Option<TimestampWithTimeZone> =
        unsafe { direct_function_call(pg_sys::timestamptz_trunc_zone, &arguments) };
    start.map_or(at, i64::from)
}
