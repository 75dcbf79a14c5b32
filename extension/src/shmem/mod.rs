//! Counters that all backends share: how often each token was used or refused, when and from where last; and the state of
//! rate limits, of tokens, users and client addresses.
//!
//! This folder holds the only shared-memory code. The data structures, free of unsafe code and of PostgreSQL, are in the crate `tollgate-core`
//! (`usage_table`, `hints`); `segment` obtains the memory from PostgreSQL and hands out those slices; this file is what the rest calls.
//! Beside the counters there are hints at where tokens are found, `findings`, what is to be recorded, and `latency`, how long verifications took; `restart` carries counters and limits over a clean
//! restart of the server.
//!
//! Locking, in one place:
//!
//! * Each group of entries has one of PostgreSQL's spinlocks (`spin`), in the cache line that says where in the group a key
//!   is. It is held to write in the group: to count, to charge, to give a slot to another key. That takes some tens of
//!   instructions, which call nothing, allocate nothing and cannot fail. Nobody holds two.
//! * Each bucket of findings has one too.
//! * Who gives a key an entry holds one of a few lightweight locks (LWLock), chosen by the key, so that it does not get two.
//! * The control lock, another LWLock, is about generations: whoever drains or acknowledges holds it.
//! * Spinlocks are taken inside an LWLock, never the other way round. Nobody holds two LWLocks.
//! * A backend that is killed while it holds a lock makes the postmaster restart all of them with fresh memory. One that is
//!   stopped (SIGSTOP, a debugger) while it holds a spinlock makes others wait, and after about a minute PostgreSQL takes
//!   that for a stuck spinlock and restarts all of them.
//!
//! Usage and charges are never rolled back with the transaction that caused it.

mod findings;
mod latency;
mod restart;
mod segment;
mod spin;

use crate::error::Error;
use crate::pg::prefetch::prefetch;
use crate::pg::sys;
pub(crate) use findings::{Finding, Found};
pub(crate) use latency::Timer;
use pgrx::pg_sys::{self, Datum, Oid};
use segment::segment;
pub(crate) use tollgate_core::hints::Location;
use tollgate_core::latency::Measured;
use tollgate_core::limit::{Charge, Limit};
use tollgate_core::status::Code;
use tollgate_core::throttle::Throttle;
use tollgate_core::token::Digest;
use tollgate_core::usage_table::{self, Refusal};
pub(crate) use tollgate_core::usage_table::{Drained, Kind, Owner, Use};

pub(crate) fn init() {
    segment::init();
}

/// Whether there is shared memory: the library was loaded when the server started.
pub(crate) fn exists() -> bool {
    segment().is_some()
}

/// Counts an outcome. Without shared memory it does nothing.
pub(crate) fn count_outcome(code: Code) {
    if let Some(segment) = segment() {
        segment.table.count_outcome(process(), code);
    }
}

/// Counts a use or denial of a token. Without shared memory it does nothing.
pub(crate) fn count_use(token: &[u8; 16], owner: &dyn Fn() -> Owner, used: &Use) {
    if let Some(segment) = segment() {
        segment.table.count_use(segment, process(), database(), token, owner, used);
    }
}

/// Charges a use to a limit of its token and counts it, as a denial if it is refused. `None` if there is no room, or no
/// shared memory.
pub(crate) fn charge_use(
    token: &[u8; 16],
    owner: &dyn Fn() -> Owner,
    used: &Use,
    limit: Limit,
) -> Option<Charge> {
    let segment = segment()?;
    segment.table.charge_use(segment, process(), database(), token, owner, used, limit)
}

/// Charges a limit. `None` if there is no room, or no shared memory.
pub(crate) fn charge(
    kind: Kind,
    id: &[u8; 16],
    owner: &dyn Fn() -> Owner,
    limit: Limit,
    now: i64,
) -> Option<Charge> {
    let segment = segment()?;
    segment.table.charge(segment, process(), database(), kind, id, owner, limit, now)
}

/// What a charge would say; `None` for what was not charged lately.
pub(crate) fn look(kind: Kind, id: &[u8; 16], limit: Limit, now: i64) -> Option<Charge> {
    segment()?.table.with_limiter(database(), kind, id, |state| limit.look(state, now))
}

/// Takes back a charge.
pub(crate) fn refund(kind: Kind, id: &[u8; 16], limit: Limit) {
    if let Some(segment) = segment() {
        segment.table.with_limiter(database(), kind, id, |state| limit.refund(state));
    }
}

/// To be called some time before [`hint`].
pub(crate) fn prefetch_hint(digest: &Digest) {
    if let Some(segment) = segment() {
        prefetch(segment.hints.line(digest));
    }
}

/// Where the row of a token may be.
pub(crate) fn hint(digest: &Digest) -> Option<Location> {
    let segment = segment()?;
    let location = segment.hints.find(digest)?;
    if let Some(line) = segment.table.group_line(location.group as usize) {
        prefetch(line);
    }
    Some(location)
}

/// Remembers where the row of a token was found.
pub(crate) fn note_hint(digest: &Digest, token: &[u8; 16], location: Location) {
    if let Some(segment) = segment() {
        let group = segment.table.group_of(database(), token) as u32;
        segment.hints.note(digest, Location { group, ..location });
    }
}

/// To be called some time before a use of the token is counted or charged.
pub(crate) fn prefetch_counters(token: &[u8; 16]) {
    if let Some(segment) = segment() {
        segment.table.entry_lines(database(), token).for_each(prefetch);
    }
}

/// Closes the counters of this database, unless closed ones are still to be acknowledged, and copies them.
pub(crate) fn drain() -> Result<Drained, Error> {
    let segment = segment().ok_or_else(|| Error::needs_preload("usage metering"))?;
    let drain = || segment.table.drain(segment, database());
    let drained = match drain() {
        Err(Refusal::TooManyDatabases) => {
            for gone in segment.table.databases(segment).into_iter().filter(|&oid| !database_exists(oid)) {
                segment.table.forget(segment, gone);
            }
            drain()
        }
        drained => drained,
    };
    drained.map_err(|refusal| match refusal {
        Refusal::TooManyDatabases => Error::too_many_databases(usage_table::MAX_DATABASES),
        Refusal::OutOfMemory(bytes) => Error::out_of_memory(bytes),
    })
}

#[allow(unsafe_code)]
fn database_exists(database: u32) -> bool {
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

/// The name of this server and of this start of it, and what was drained of this database and not acknowledged, without its rows.
pub(crate) fn handed_out() -> Option<([u8; tollgate_core::usage_file::NODE_LEN], [u8; 16], Option<Drained>)> {
    let segment = segment()?;
    let (node, closed) = segment.table.handed_out(segment, database());
    Some((node, segment.table.boot(), closed))
}

/// How much of the room is taken by counters that are not flushed, from 0 to 1, and how many uses found none.
pub(crate) fn pressure() -> Result<(f64, u64), Error> {
    let segment = segment().ok_or_else(|| Error::needs_preload("usage metering"))?;
    Ok((segment.table.pressure(), segment.table.overflowed()))
}

/// Has something recorded of a token. Without shared memory it is not.
pub(crate) fn note_finding(token: &[u8; 16], found: &Found, at: i64) {
    if let Some(segment) = segment() {
        segment.findings.note(database(), token, found, at);
    }
}

/// What is to be recorded in this database.
pub(crate) fn findings() -> Vec<Finding> {
    segment().map(|segment| segment.findings.of(database())).unwrap_or_default()
}

/// Drops a finding that is recorded; false if there is no such one.
pub(crate) fn free_finding(number: u64) -> bool {
    segment().is_some_and(|segment| segment.findings.free(database(), number))
}

/// The bound on logged verifications of the whole server; `None` without shared memory.
pub(crate) fn log_throttle() -> Option<&'static Throttle> {
    segment().map(|segment| segment.log_throttle)
}

/// What `stats` shows; `None` without shared memory.
pub(crate) fn stats() -> Option<usage_table::Stats> {
    segment().map(|segment| segment.table.stats(segment, database()))
}

/// Keys that cannot make room for others now; `None` without shared memory.
pub(crate) fn busy_keys() -> Option<u64> {
    Some(segment()?.table.busy(sys::GetCurrentTimestamp()))
}

/// How long verifications of this database took; `None` if that is not measured.
pub(crate) fn latency() -> Option<Measured> {
    segment()?.latencies.of(database())
}

#[allow(unsafe_code)]
fn process() -> usize {
    // SAFETY: a plain variable of this process.
    unsafe { pg_sys::MyProcPid }.cast_unsigned() as usize
}

#[allow(unsafe_code)]
fn database() -> u32 {
    // SAFETY: a plain variable of this process.
    unsafe { pg_sys::MyDatabaseId.to_u32() }
}
