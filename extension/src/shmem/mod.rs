//! Counters that all backends share: how often each token was used or refused, and when and from where last; and the
//! state of rate limits, of tokens, users and client addresses.
//!
//! This folder holds the only shared-memory code. The data structures, free of unsafe code and of PostgreSQL, are in
//! the crate `tollgate-core` (`usage_table`, `hints`); `segment` obtains the memory from PostgreSQL and hands out those
//! slices; this file is what the rest calls. The segment also holds hints at where tokens are stored, `findings` to be
//! recorded, `lease_requests`, `latency`, the histogram of verifications, `master_keys`, and, without a lock, the counters of `sessions` and two
//! tables, of good signatures and of `unknown_keys` of issuers; `restart` carries counters and limits over a clean restart of
//! the server.
//!
//! Locking rules:
//!
//! * Each group of entries has one of PostgreSQL's spinlocks (`spin`), in the cache line that says where in the group a
//!   key is. It is held to write in the group: to count, to charge, to give a slot to another key. That takes some tens
//!   of instructions, which call nothing, allocate nothing and cannot fail. A backend never holds two.
//! * Each bucket of findings has one too, and the list of quotas of which more is to be leased.
//! * A backend that adds an entry for a key holds one of a few lightweight locks (LWLock), chosen by the key, so that
//!   the key does not get two entries.
//! * The control lock, another LWLock, protects the generations: it is held to drain and to acknowledge.
//! * The lock of the master keys, another LWLock, is held while they are copied in or out.
//! * Spinlocks are taken inside an LWLock, never the other way round. A backend never holds two LWLocks.
//! * If a backend is killed while it holds a lock, the postmaster restarts all of them with fresh memory. If one is
//!   stopped (SIGSTOP, a debugger) while it holds a spinlock, others wait, and after about a minute PostgreSQL reports
//!   a stuck spinlock and restarts all of them.
//!
//! Usage and charges are never rolled back with the transaction that caused it.

mod backend;
mod findings;
mod latency;
mod lease_requests;
mod master_keys;
mod restart;
mod segment;
mod sessions;
mod spin;
mod unknown_keys;

use crate::error::Error;
use crate::pg::prefetch::prefetch;
use crate::pg::sys;
use backend::{database, database_exists, process};
pub(crate) use findings::{Finding, Found};
pub(crate) use latency::Timer;
use pgrx::pg_sys;
use segment::segment;
pub(crate) use sessions::SessionEvent;
pub(crate) use tollgate_core::hints::Location;
use tollgate_core::latency::Measured;
use tollgate_core::limit::{Charge, Limit};
use tollgate_core::quota::{Lease, Spent, State as QuotaState};
use tollgate_core::seal_box::MasterKey;
use tollgate_core::signature_table;
use tollgate_core::status::Code;
use tollgate_core::throttle::Throttle;
use tollgate_core::token::Digest;
use tollgate_core::usage_table::{self, Refusal};
pub(crate) use tollgate_core::usage_table::{Drained, Kind, Owner, Use};

pub(crate) fn init() {
    segment::init();
}

/// Whether shared memory exists, that is, whether the library was loaded at server start.
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

/// Charges a use to its token's limit and counts it, as a denial if it is refused. `None` without room or without
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

/// Charges a limit. `None` without room or without shared memory.
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

/// The answer that a charge would get; `None` for a key that was not charged lately.
pub(crate) fn peek(kind: Kind, id: &[u8; 16], limit: Limit, now: i64) -> Option<Charge> {
    segment()?.table.with_limiter(database(), kind, id, |state| limit.peek(state, now))
}

/// Refunds a charge.
pub(crate) fn refund(kind: Kind, id: &[u8; 16], limit: Limit) {
    if let Some(segment) = segment() {
        segment.table.with_limiter(database(), kind, id, |state| limit.refund(state));
    }
}

/// Spends a unit of what is remembered of a quota; `None` if the tables may say more.
pub(crate) fn spend(quota: &[u8; 16], now: i64) -> Option<Spent> {
    let segment = segment()?;
    let spent = segment.table.spend(database(), quota, now)?;
    if spent.more_wanted {
        segment.lease_requests.note(database(), quota);
    }
    Some(spent)
}

/// Spends a unit of what the tables say of a quota. The inner `None`: nothing is left. The outer one: there is no room to
/// remember it.
///
/// More is asked for only where there is more (`rest`).
pub(crate) fn spend_of(quota: &[u8; 16], lease: &Lease, rest: u64, now: i64) -> Option<Option<Spent>> {
    let segment = segment()?;
    let spent = segment.table.spend_of(segment, process(), database(), quota, lease, now)?;
    if rest > 0 && spent.is_none_or(|spent| spent.more_wanted) {
        segment.lease_requests.note(database(), quota);
    }
    Some(spent)
}

/// Returns a unit of a quota.
pub(crate) fn refund_quota(quota: &[u8; 16], spent: Spent) {
    if let Some(segment) = segment() {
        segment.table.with_quota(database(), quota, |state| state.refund(spent.ends_at));
    }
}

/// What is remembered of a quota.
pub(crate) fn quota(quota: &[u8; 16]) -> Option<QuotaState> {
    segment()?.table.with_quota(database(), quota, |state| *state)
}

/// The quotas of this database of which something is remembered.
pub(crate) fn quotas() -> Vec<[u8; 16]> {
    segment().map(|segment| segment.table.quotas(database())).unwrap_or_default()
}

/// Forgets a quota that is no more.
pub(crate) fn forget_quota(quota: &[u8; 16]) {
    if let Some(segment) = segment() {
        segment.table.forget_quota(database(), quota);
    }
}

/// Takes the quotas of this database of which more is to be leased.
pub(crate) fn take_lease_requests() -> Vec<[u8; 16]> {
    segment().map(|segment| segment.lease_requests.take(database())).unwrap_or_default()
}

/// The name under which this server holds leases.
pub(crate) fn lease_holder() -> Option<[u8; 16]> {
    Some(segment()?.table.holder())
}

/// The time for quotas, which never goes back while the server runs.
pub(crate) fn quota_time(now: i64) -> i64 {
    segment().map_or(now, |segment| segment.table.latest(now))
}

/// Call this some time before [`hint`].
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

/// Stores where the row of a token was found.
pub(crate) fn note_hint(digest: &Digest, token: &[u8; 16], location: Location) {
    if let Some(segment) = segment() {
        let group = segment.table.group_of(database(), token) as u32;
        segment.hints.note(digest, Location { group, ..location });
    }
}

/// Whether this database has checked the signature of a token with this key and found it good. Without shared memory, or
/// once it was replaced, it is checked again.
pub(crate) fn knows_signature(key: &Digest) -> bool {
    segment().is_some_and(|segment| segment.signatures.contains(key))
}

/// Notes that a signature was checked and is good.
pub(crate) fn note_signature(key: &Digest) {
    if let Some(segment) = segment() {
        segment.signatures.note(key);
    }
}

/// The key of a token's entry in the table of good signatures.
pub(crate) fn signature_key(
    algorithm: &str,
    public_key: &Digest,
    signed: &Digest,
    signature: &[u8],
) -> Digest {
    signature_table::key(database(), algorithm, public_key, signed, signature)
}

/// Notes that a token of a trusted issuer names a key that the issuer does not have. Without shared memory it does nothing.
pub(crate) fn note_unknown_key(issuer: &str, now: i64) {
    if let Some(segment) = segment() {
        segment.unknown_keys.note(database(), issuer, now);
    }
}

/// When that was noted last, in microseconds since 2000-01-01.
pub(crate) fn unknown_key_at(issuer: &str) -> Option<i64> {
    segment()?.unknown_keys.at(database(), issuer)
}

/// Call this some time before a use of the token is counted or charged.
pub(crate) fn prefetch_counters(token: &[u8; 16]) {
    if let Some(segment) = segment() {
        segment.table.entry_lines(database(), token).for_each(prefetch);
    }
}

/// Closes the counters of this database, unless closed ones are still unacknowledged, and copies them.
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

/// Frees the closed counters of this database if their generation matches.
pub(crate) fn acknowledge(generation: u64) -> Result<bool, Error> {
    let segment = segment().ok_or_else(|| Error::needs_preload("usage metering"))?;
    Ok(segment.table.acknowledge(segment, database(), generation))
}

/// The name of this server, the id of this server start, and the drained and unacknowledged generation of this
/// database, without its rows.
pub(crate) fn handed_out() -> Option<([u8; tollgate_core::usage_file::NODE_LEN], [u8; 16], Option<Drained>)> {
    let segment = segment()?;
    let (node, closed) = segment.table.handed_out(segment, database());
    Some((node, segment.table.boot(), closed))
}

/// The fraction of the room taken by unflushed counters, from 0 to 1, and how many uses found no room.
pub(crate) fn pressure() -> Result<(f64, u64), Error> {
    let segment = segment().ok_or_else(|| Error::needs_preload("usage metering"))?;
    Ok((segment.table.pressure(), segment.table.overflowed()))
}

/// Notes a finding about a token. Without shared memory it is lost.
pub(crate) fn note_finding(token: &[u8; 16], found: &Found, at: i64) {
    if let Some(segment) = segment() {
        segment.findings.note(database(), token, found, at);
    }
}

/// The findings of this database that are not recorded yet.
pub(crate) fn findings() -> Vec<Finding> {
    segment().map(|segment| segment.findings.of(database())).unwrap_or_default()
}

/// Removes a recorded finding; false if there is no such finding.
pub(crate) fn free_finding(number: u64) -> bool {
    segment().is_some_and(|segment| segment.findings.free(database(), number))
}

/// The bound on logged verifications of the whole server; `None` without shared memory.
pub(crate) fn log_throttle() -> Option<&'static Throttle> {
    segment().map(|segment| segment.log_throttle)
}

/// The bound on what is logged about import keys that do not open, of the whole server; `None` without shared memory.
pub(crate) fn import_key_throttle() -> Option<&'static Throttle> {
    segment().map(|segment| segment.import_key_throttle)
}

/// The figures that `stats` shows; `None` without shared memory.
pub(crate) fn stats() -> Option<usage_table::Stats> {
    segment().map(|segment| segment.table.stats(segment, database()))
}

/// Counts what happened to a session. Without shared memory it does nothing.
pub(crate) fn count_session(event: SessionEvent) {
    if let Some(segment) = segment() {
        segment.sessions.count(event);
    }
}

/// How often that happened since the server started; `None` without shared memory.
pub(crate) fn sessions(event: SessionEvent) -> Option<u64> {
    Some(segment()?.sessions.of(event))
}

/// Keys that cannot make room for others now; `None` without shared memory.
pub(crate) fn busy_keys() -> Option<u64> {
    Some(segment()?.table.busy(sys::GetCurrentTimestamp()))
}

/// The latency of verifications in this database; `None` if it is not measured.
pub(crate) fn latency() -> Option<Measured> {
    segment()?.latencies.of(database())
}

/// Grows when the master keys change, also when they were taken away; 0 until they are first read. `None` without
/// shared memory.
pub(crate) fn master_key_generation() -> Option<u64> {
    segment().map(|segment| segment.master_key_state().generation())
}

/// Asks the background worker to read the master keys again; `None` where none runs. For [`master_keys_answered`].
pub(crate) fn request_master_keys() -> Option<u64> {
    segment()?.master_key_state().request()
}

/// Whether the worker has read the master keys since this request.
pub(crate) fn master_keys_answered(request: u64) -> bool {
    segment().is_some_and(|segment| segment.master_key_state().answered() >= request)
}

/// For the worker: its latch, which a request sets.
pub(crate) fn set_master_key_reader(latch: *mut pg_sys::Latch) {
    if let Some(segment) = segment() {
        segment.master_key_state().set_reader(latch);
    }
}

/// For the worker: how many requests there were.
pub(crate) fn master_key_requests() -> u64 {
    segment().map_or(0, |segment| segment.master_key_state().requests())
}

/// For the worker: so many requests have had their effect.
pub(crate) fn answer_master_key_requests(requests: u64) {
    if let Some(segment) = segment() {
        segment.master_key_state().answer(requests);
    }
}

/// A copy of the master keys, the sealing one first, and the generation it is of; empty without shared memory.
pub(crate) fn master_keys() -> (u64, Vec<MasterKey>) {
    segment()
        .map_or((0, Vec::new()), |segment| segment.with_master_keys(|keys| (keys.generation(), keys.load())))
}

/// Why the master keys could not be read when that was last tried.
pub(crate) fn master_key_fault() -> Option<String> {
    segment()?.with_master_keys(master_keys::MasterKeys::fault)
}

/// What the background worker has read; on a fault the earlier keys stay.
pub(crate) fn set_master_keys(read: Result<&[MasterKey], &str>) {
    if let Some(segment) = segment() {
        segment.with_master_keys(|keys| match read {
            Ok(read) => keys.store(read),
            Err(fault) => keys.store_fault(fault),
        });
    }
}
