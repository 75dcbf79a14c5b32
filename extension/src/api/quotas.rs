//! What the SQL of quotas (`sql/schema/quotas/quotas.sql`) needs of the server: periods, and what is in shared memory.
#![allow(unsafe_code)]

use crate::pg::fmgr::{Call, sql_function};
use crate::shmem;
use crate::store::{quotas, relations};
use pgrx::pg_sys::{self, Datum};
use pgrx::prelude::*;
use pgrx::{IntoDatum, Uuid};
use tollgate_core::limit;
use tollgate_core::quota::State;

sql_function!(quota_period_end);
fn quota_period_end(call: &Call) -> Option<Datum> {
    let at = call.value::<TimestampWithTimeZone>(2)?;
    Some(Datum::from(quotas::period_end(call.text(0)?, call.text(1)?, at.into())))
}

sql_function!(lease_holder);
fn lease_holder(_call: &Call) -> Option<Datum> {
    Uuid::from_bytes(shmem::lease_holder()?).into_datum()
}

sql_function!(forget_quota);
fn forget_quota(call: &Call) -> Option<Datum> {
    let id: Uuid = call.value(0)?;
    shmem::forget_quota(id.as_bytes());
    None
}

// A trigger. Other backends may remember that no user has a quota.
sql_function!(note_user_quota);
fn note_user_quota(_call: &Call) -> Option<Datum> {
    let table = relations::relations().quotas;
    // SAFETY: a table of this database, which the trigger's statement has locked; others process this once it is committed.
    unsafe { pg_sys::CacheInvalidateRelcacheByRelid(table) };
    Some(Datum::null())
}

type Remembered = (Uuid, Option<TimestampWithTimeZone>, i64, i64);

fn row(id: [u8; 16], state: State) -> Remembered {
    let is_for_ever = state.ends_at >= limit::LAST.cast_signed();
    let ends_at = if is_for_ever { i64::MAX } else { state.ends_at };
    let units = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
    (
        Uuid::from_bytes(id),
        TimestampWithTimeZone::try_from(ends_at).ok(),
        units(state.granted),
        units(state.spent),
    )
}

#[pg_extern(sql = false)]
#[allow(clippy::type_complexity)]
fn remembered_quota(
    quota_id: Uuid,
) -> TableIterator<
    'static,
    (
        name!(quota_id, Uuid),
        name!(ends_at, Option<TimestampWithTimeZone>),
        name!(granted, i64),
        name!(spent, i64),
    ),
> {
    let id = *quota_id.as_bytes();
    TableIterator::new(shmem::quota(&id).map(|state| row(id, state)))
}

#[pg_extern(sql = false)]
#[allow(clippy::type_complexity)]
fn take_lease_requests() -> TableIterator<
    'static,
    (
        name!(quota_id, Uuid),
        name!(ends_at, Option<TimestampWithTimeZone>),
        name!(granted, i64),
        name!(spent, i64),
    ),
> {
    let requests = shmem::take_lease_requests().into_iter();
    TableIterator::new(requests.filter_map(|id| Some(row(id, shmem::quota(&id)?))))
}

#[pg_extern(sql = false)]
fn remembered_quotas() -> SetOfIterator<'static, Uuid> {
    SetOfIterator::new(shmem::quotas().into_iter().map(Uuid::from_bytes))
}
