//! Counters that all backends share: how often each token was used or refused, when and from where last.
//!
//! This folder holds the only shared-memory code. `table` is the data structure, written without unsafe over slices of
//! atomics; `segment` obtains the memory from PostgreSQL and hands out those slices; this file is what the rest calls.
//!
//! Locking, in one place:
//!
//! * The table is cut into partitions, each with a lightweight lock. The lock is about structure: shared to look up an
//!   entry and count in it, exclusive to insert or evict one and to close counters. Counters are atomics, so those who
//!   hold the lock shared count at the same time.
//! * One more lock, the control lock, is about generations: whoever drains or acknowledges holds it exclusively, and takes
//!   the partitions' locks one after the other inside it. Nobody takes it while holding a partition's.
//! * Under a lock nothing calls PostgreSQL, allocates, or can fail. A backend that is killed while it holds one makes the
//!   postmaster restart all of them with fresh memory.
//!
//! Usage is never rolled back with the transaction that caused it.

mod segment;
mod table;

use crate::error::Error;
use crate::sys;
use pgrx::pg_sys::{self, Datum, Oid};
use segment::segment;
use table::Refusal;
pub(crate) use table::{Kind, UsageRow, Use};
use tollgate_core::status::Code;
use tollgate_core::throttle::Throttle;

pub(crate) fn init() {
    segment::init();
}

/// Counts an outcome, and for a known token its use or denial. Without shared memory it does nothing.
#[allow(unsafe_code)]
pub(crate) fn record(code: Code, token: Option<(&[u8; 16], Use)>) {
    let Some(segment) = segment() else { return };
    // SAFETY: plain variables of this process.
    let (process, database) = unsafe { (pg_sys::MyProcPid, pg_sys::MyDatabaseId.to_u32()) };
    segment.table.count_outcome(process.cast_unsigned() as usize, code);
    if let Some((id, used)) = token {
        segment.table.count_use(segment, database, Kind::Token, id, &used);
    }
}

/// What `drain_usage` hands out.
pub(crate) struct Drained {
    pub(crate) boot: [u8; 16],
    pub(crate) generation: u64,
    pub(crate) rows: Vec<UsageRow>,
}

/// Closes the counters of this database, unless closed ones are still to be acknowledged, and copies them.
pub(crate) fn drain() -> Result<Drained, Error> {
    let segment = segment().ok_or_else(|| Error::needs_preload("usage metering"))?;
    let drain = || segment.table.drain(segment, database(), sys::GetCurrentTimestamp());
    let drained = match drain() {
        Err(Refusal::TooManyDatabases) => {
            for gone in segment.table.databases(segment).into_iter().filter(|&oid| !exists(oid)) {
                segment.table.forget(segment, gone);
            }
            drain()
        }
        drained => drained,
    };
    let (generation, rows) = drained.map_err(|refusal| match refusal {
        Refusal::TooManyDatabases => Error::too_many_databases(table::MAX_DATABASES),
        Refusal::OutOfMemory(bytes) => Error::out_of_memory(bytes),
    })?;
    Ok(Drained { boot: segment.table.boot(), generation, rows })
}

#[allow(unsafe_code)]
fn exists(database: u32) -> bool {
    // SAFETY: a look-up in the system catalogue.
    unsafe {
        pg_sys::SearchSysCacheExists(
            pg_sys::SysCacheIdentifier::DATABASEOID as i32,
            Datum::from(Oid::from(database)),
            Datum::null(),
            Datum::null(),
            Datum::null(),
        )
    }
}

/// Frees the closed counters of this database if they are of that generation.
pub(crate) fn acknowledge(generation: u64) -> Result<bool, Error> {
    let segment = segment().ok_or_else(|| Error::needs_preload("usage metering"))?;
    Ok(segment.table.acknowledge(segment, database(), generation))
}

/// The bound on logged verifications of the whole server; `None` without shared memory.
pub(crate) fn log_throttle() -> Option<&'static Throttle> {
    segment().map(|segment| segment.log_throttle)
}

/// What `stats` shows; `None` without shared memory.
pub(crate) fn stats() -> Option<table::Stats> {
    segment().map(|segment| segment.table.stats(segment, database()))
}

#[allow(unsafe_code)]
fn database() -> u32 {
    // SAFETY: a plain variable of this process.
    unsafe { pg_sys::MyDatabaseId.to_u32() }
}
