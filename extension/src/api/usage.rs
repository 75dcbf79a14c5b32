//! `drain_usage` and `ack_usage`: the way of the counters out of shared memory. `apply_usage` is SQL. And `usage_pressure`,
//! which says when they must take it.
#![allow(unsafe_code)]

use crate::error::OrRaise;
use crate::fmgr::{Call, sql_function};
use crate::shmem;
use pgrx::pg_sys::Datum;
use pgrx::prelude::*;
use pgrx::{Inet, IntoDatum, Uuid};

#[pg_extern(sql = false)]
#[allow(clippy::type_complexity)]
fn drain_usage() -> TableIterator<
    'static,
    (
        name!(node, String),
        name!(boot, Uuid),
        name!(generation, i64),
        name!(token_id, Uuid),
        name!(uses, i64),
        name!(denials, i64),
        name!(last_used_at, Option<TimestampWithTimeZone>),
        name!(last_used_ip, Option<Inet>),
    ),
> {
    let drained = shmem::drain().or_raise();
    let node = String::from_utf8_lossy(&drained.node).trim_end_matches('\0').to_owned();
    let boot = Uuid::from_bytes(drained.boot);
    TableIterator::new(drained.rows.into_iter().map(move |row| {
        (
            node.clone(),
            boot,
            drained.generation.cast_signed(),
            Uuid::from_bytes(row.token_id),
            row.uses.cast_signed(),
            row.denials.cast_signed(),
            row.last_used.and_then(|(at, _)| TimestampWithTimeZone::try_from(at).ok()),
            row.last_used.and_then(|(_, client)| client).map(|client| Inet(client.to_string())),
        )
    }))
}

sql_function!(ack_usage);
fn ack_usage(call: &Call) -> Option<Datum> {
    let generation: i64 = call.value(0)?;
    shmem::acknowledge(generation.cast_unsigned()).or_raise().into_datum()
}

#[pg_extern(sql = false)]
fn usage_pressure() -> TableIterator<'static, (name!(pressure, f64), name!(overflowed, i64))> {
    let (pressure, overflowed) = shmem::pressure().or_raise();
    TableIterator::once((pressure, overflowed.cast_signed()))
}
