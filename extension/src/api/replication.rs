//! What logical replication asks for: to know its workers, and ids that no sequence gives out a second time.
#![allow(unsafe_code)]

use crate::error::Error;
use crate::fmgr::{Call, sql_function};
use core::cell::Cell;
use core::ffi::c_void;
use pgrx::datum::DatumWithOid;
use pgrx::pg_sys::{self, Datum, Oid};
use pgrx::{IntoDatum, Spi, direct_function_call, pg_guard};

sql_function!(is_logical_worker);
fn is_logical_worker(_call: &Call) -> Option<Datum> {
    // SAFETY: looks at a variable of this process.
    unsafe { pg_sys::IsLogicalWorker() }.into_datum()
}

/// A sequence that was found to be ahead of its table, and the last number that this session got of it.
#[derive(Clone, Copy)]
struct Checked {
    sequence: Oid,
    last: i64,
}

thread_local! {
    /// There are two such sequences.
    static CHECKED: [Cell<Option<Checked>>; 2] = const { [Cell::new(None), Cell::new(None)] };
}

pub(crate) fn init() {
    // SAFETY: called once per process; the callbacks only clear variables.
    unsafe {
        pg_sys::RegisterXactCallback(Some(at_end), core::ptr::null_mut());
        pg_sys::RegisterSubXactCallback(Some(at_end_of_subtransaction), core::ptr::null_mut());
    }
}

/// What failed may have failed for an id that was there already.
fn forget() {
    CHECKED.with(|checked| checked.iter().for_each(|one| one.set(None)));
}

#[pg_guard]
unsafe extern "C-unwind" fn at_end(event: pg_sys::XactEvent::Type, _arg: *mut c_void) {
    if event == pg_sys::XactEvent::XACT_EVENT_ABORT {
        forget();
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn at_end_of_subtransaction(
    event: pg_sys::SubXactEvent::Type,
    _subtransaction: pg_sys::SubTransactionId,
    _parent: pg_sys::SubTransactionId,
    _arg: *mut c_void,
) {
    if event == pg_sys::SubXactEvent::SUBXACT_EVENT_ABORT_SUB {
        forget();
    }
}

sql_function!(next_id);
fn next_id(call: &Call) -> Option<Datum> {
    let sequence: Oid = call.value(0)?;
    let known =
        CHECKED.with(|checked| checked.iter().find_map(|one| one.get().filter(|c| c.sequence == sequence)));
    if known.is_none() {
        advance(sequence);
    }
    let mut id = nextval(sequence);
    if known.is_some_and(|known| id <= known.last) {
        advance(sequence);
        id = nextval(sequence);
    }
    CHECKED.with(|checked| {
        let same = |one: &&Cell<Option<Checked>>| one.get().is_none_or(|c| c.sequence == sequence);
        // A sequence that was made anew takes the place of another.
        checked.iter().find(same).unwrap_or(&checked[0]).set(Some(Checked { sequence, last: id }));
    });
    id.into_datum()
}

fn nextval(sequence: Oid) -> i64 {
    // SAFETY: nextval(regclass), which checks what it is given, and never returns NULL.
    unsafe { direct_function_call(pg_sys::nextval_oid, &[sequence.into_datum()]) }
        .expect("nextval returns a number")
}

/// Sees to it that the sequence is not behind its table.
fn advance(sequence: Oid) {
    // SAFETY: an oid.
    let argument = || unsafe { DatumWithOid::new(sequence, pg_sys::REGCLASSOID) };
    let outcome = Spi::connect_mut(|client| {
        let behind = "SELECT b.behind FROM tollgate.sequences_behind($1) b";
        if client.update(behind, Some(1), &[argument()])?.is_empty() {
            return Ok::<(), pgrx::spi::Error>(());
        }
        // One at a time, or one would set back what another has set and gone on from. It holds up no nextval().
        let lock = pg_sys::ShareUpdateExclusiveLock.cast_signed();
        // SAFETY: an existing relation. On an ERROR the transaction releases the lock.
        unsafe { pg_sys::LockRelationOid(sequence, lock) };
        client.update("SELECT tollgate.advance_sequence($1)", Some(1), &[argument()])?;
        // SAFETY: taken above.
        unsafe { pg_sys::UnlockRelationOid(sequence, lock) };
        Ok(())
    });
    outcome.unwrap_or_else(|error| Error::internal(format!("could not look at a sequence: {error}")).raise());
}
