//! `lock_leadership`: takes the lock by which a session leads a task.
#![allow(unsafe_code)]

use crate::pg::fmgr::{Call, sql_function};
use pgrx::IntoDatum;
use pgrx::datum::TimestampWithTimeZone;
use pgrx::pg_sys::LockAcquireResult;
use pgrx::pg_sys::{self, Datum};
use tollgate_core::seal;

/// The classid of the lock in pg_locks: "tgld". The objid is made from the task's name.
const CLASS: u32 = 0x7467_6c64;
/// The objsubid in pg_locks. The SQL functions for advisory locks only use 1 (one key) and 2 (two keys).
const KIND: u16 = 3;

sql_function!(lock_leadership);
fn lock_leadership(call: &Call) -> Option<Datum> {
    let [a, b, c, d, ..] = seal::digest(core::iter::once(call.bytes(0)));
    call.datum(0)?;
    let task = u32::from_be_bytes([a, b, c, d]);
    // SAFETY: a plain variable of this process.
    let database = unsafe { pg_sys::MyDatabaseId.to_u32() };
    let tag = pg_sys::LOCKTAG {
        locktag_field1: database,
        locktag_field2: CLASS,
        locktag_field3: task,
        locktag_field4: KIND,
        locktag_type: pg_sys::LockTagType::LOCKTAG_ADVISORY as u8,
        locktag_lockmethodid: pg_sys::USER_LOCKMETHOD as u8,
    };
    let mode = pg_sys::ExclusiveLock as pg_sys::LOCKMODE;
    // SAFETY: a session lock, which outlives the transaction, taken without waiting. An ERROR, for example because the
    // lock table is full, finds nothing here that needs dropping.
    let result = unsafe { pg_sys::LockAcquire(&raw const tag, mode, true, true) };
    match result {
        LockAcquireResult::LOCKACQUIRE_NOT_AVAIL => return None,
        LockAcquireResult::LOCKACQUIRE_ALREADY_HELD | LockAcquireResult::LOCKACQUIRE_ALREADY_CLEAR => {
            // PostgreSQL counts how often a session holds a lock; this session held it before.
            // SAFETY: this session holds it.
            unsafe { pg_sys::LockRelease(&raw const tag, mode, true) };
        }
        _ => {}
    }
    // SAFETY: a plain variable of this process.
    let began = unsafe { pg_sys::MyStartTimestamp };
    TimestampWithTimeZone::try_from(began).ok().into_datum()
}
