//! `memory_stats`: the part of `stats` that is in shared memory.

use crate::pg::fmgr::{Call, sql_function};
use crate::shmem::SessionEvent;
use crate::store::composite;
use crate::store::relations::Composite;
use crate::{guc, shmem};
use pgrx::datum::TimestampWithTimeZone;
use pgrx::pg_sys::Datum;
use pgrx::{IntoDatum, JsonB, Uuid};
use serde_json::{Value, json};
use tollgate_core::latency::{BOUNDS, Measured, ONE_IN};
use tollgate_core::status::Code;

const VERSION: &str = env!("CARGO_PKG_VERSION");

sql_function!(memory_stats);
fn memory_stats(_call: &Call) -> Option<Datum> {
    let Some(stats) = shmem::stats() else {
        let detail =
            "Off: tollgate is not in shared_preload_libraries, so uses are neither counted nor limited.";
        return Some(composite::form(
            Composite::MemoryStats,
            [
                VERSION.into_datum(),
                false.into_datum(),
                detail.into_datum(),
                None,
                None,
                None,
                None,
                None,
                None,
                None,
                None,
                None,
                None,
                None,
            ],
        ));
    };
    let detail = if stats.overflowed == 0 {
        "On: every use since the server started was counted."
    } else {
        "On, but too small: some uses found no room, and limited tokens were refused. Raise tollgate.max_tracked_keys, or flush more often."
    };
    let outcomes = Code::ALL
        .iter()
        .map(|code| (code.as_str().to_owned(), stats.outcomes[code.index()].into()))
        .collect();
    let sessions = SessionEvent::ALL
        .iter()
        .filter_map(|&event| Some((event.as_str().to_owned(), shmem::sessions(event)?.into())))
        .collect();
    Some(composite::form(
        Composite::MemoryStats,
        [
            VERSION.into_datum(),
            true.into_datum(),
            detail.into_datum(),
            TimestampWithTimeZone::try_from(stats.started_at).ok().into_datum(),
            Uuid::from_bytes(stats.boot).into_datum(),
            JsonB(Value::Object(outcomes)).into_datum(),
            shmem::latency().map(|measured| JsonB(json_of(&measured))).into_datum(),
            stats.tracked.cast_signed().into_datum(),
            shmem::busy_keys().map(u64::cast_signed).into_datum(),
            i64::try_from(guc::max_tracked_keys()).ok().into_datum(),
            stats.overflowed.cast_signed().into_datum(),
            stats.generation.map(u64::cast_signed).into_datum(),
            stats.closed_generation.map(u64::cast_signed).into_datum(),
            JsonB(Value::Object(sessions)).into_datum(),
        ],
    ))
}

/// In seconds. The last bucket has no bound.
fn json_of(measured: &Measured) -> Value {
    let seconds = |nanoseconds: u64| nanoseconds as f64 / 1e9;
    let bounds = BOUNDS.into_iter().map(Some).chain([None]);
    let buckets: Vec<Value> = bounds
        .zip(measured.counts)
        .map(|(bound, count)| json!({ "up_to": bound.map(seconds), "count": count }))
        .collect();
    json!({
        "one_in": ONE_IN,
        "count": measured.counts.iter().sum::<u64>(),
        "sum": seconds(measured.nanoseconds),
        "buckets": buckets,
    })
}
