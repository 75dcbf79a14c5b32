//! `close_usage` and `free_usage` move the counters out of shared memory. `handed_out_usage` says which are being
//! moved, for the SQL of `apply_usage` and `ack_usage` knows what is on it. And `usage_pressure`, which says when they
//! must take it.
#![allow(unsafe_code)]

use crate::error::OrRaise;
use crate::pg::fmgr::{Call, sql_function};
use crate::shmem;
use pgrx::pg_sys::Datum;
use pgrx::prelude::*;
use pgrx::{Inet, IntoDatum, Uuid};

#[pg_extern(sql = false)]
#[allow(clippy::type_complexity)]
fn close_usage() -> TableIterator<
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
    let node = name(&drained.node);
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

sql_function!(free_usage);
fn free_usage(call: &Call) -> Option<Datum> {
    let generation: i64 = call.value(0)?;
    shmem::acknowledge(generation.cast_unsigned()).or_raise().into_datum()
}

fn name(node: &[u8]) -> String {
    String::from_utf8_lossy(node).trim_end_matches('\0').to_owned()
}

#[pg_extern(sql = false)]
#[allow(clippy::type_complexity)]
fn handed_out_usage() -> TableIterator<
    'static,
    (
        name!(this_node, String),
        name!(this_boot, Uuid),
        name!(node, Option<String>),
        name!(boot, Option<Uuid>),
        name!(generation, Option<i64>),
    ),
> {
    TableIterator::new(shmem::handed_out().map(|(this_node, this_boot, closed)| {
        let generation = closed.as_ref().map(|closed| closed.generation.cast_signed());
        (
            name(&this_node),
            Uuid::from_bytes(this_boot),
            closed.as_ref().map(|closed| name(&closed.node)),
            closed.as_ref().map(|closed| Uuid::from_bytes(closed.boot)),
            generation,
        )
    }))
}

#[pg_extern(sql = false)]
fn usage_pressure() -> TableIterator<'static, (name!(pressure, f64), name!(overflowed, i64))> {
    let (pressure, overflowed) = shmem::pressure().or_raise();
    TableIterator::once((pressure, overflowed.cast_signed()))
}
