//! Server functions that the audit log needs: where an event was written, the digests that seals are made of, and the
//! only way to purge events.
#![allow(unsafe_code)]

use crate::error::Error;
use crate::pg::fmgr::{Call, sql_function};
use core::cell::Cell;
use pgrx::datum::DatumWithOid;
use pgrx::pg_sys::{self, Datum};
use pgrx::{IntoDatum, Spi};
use tollgate_core::{seal, token};

sql_function!(system_identifier);
fn system_identifier(_call: &Call) -> Option<Datum> {
    // SAFETY: reads a number from shared memory.
    unsafe { pg_sys::GetSystemIdentifier() }.cast_signed().into_datum()
}

sql_function!(wal_timeline);
fn wal_timeline(_call: &Call) -> Option<Datum> {
    // SAFETY: reads from shared memory; a server that has left recovery never enters it again.
    unsafe {
        if pg_sys::RecoveryInProgress() {
            return None;
        }
        pg_sys::GetWALInsertionTimeLine().cast_signed().into_datum()
    }
}

thread_local! {
    /// True only while `purge_audit_log` runs its statement. Not a setting, because any user could set it from SQL.
    static PURGING: Cell<bool> = const { Cell::new(false) };
}

sql_function!(is_purging_audit_log);
fn is_purging_audit_log(_call: &Call) -> Option<Datum> {
    PURGING.get().into_datum()
}

sql_function!(purge_audit_log);
fn purge_audit_log(call: &Call) -> Option<Datum> {
    struct Permit;
    impl Drop for Permit {
        fn drop(&mut self) {
            PURGING.set(false);
        }
    }

    // SAFETY: each datum is of the type given with it.
    let arguments = unsafe {
        [
            DatumWithOid::new(call.datum(0), pg_sys::TIMESTAMPTZOID),
            DatumWithOid::new(call.datum(1), pg_sys::INT4OID),
        ]
    };
    PURGING.set(true);
    let _permit = Permit;
    let removed = Spi::connect_mut(|client| {
        client
            .update("SELECT tollgate.purge_sealed_events($1, $2)", Some(1), &arguments)?
            .first()
            .get_one::<i64>()
    });
    removed
        .unwrap_or_else(|error| Error::internal(format!("could not purge the audit log: {error}")).raise())
        .into_datum()
}

sql_function!(digest_of);
fn digest_of(call: &Call) -> Option<Datum> {
    let fields = call.text_array(0)?;
    seal::digest(fields.iter()).as_slice().into_datum()
}

sql_function!(json_digest);
fn json_digest(call: &Call) -> Option<Datum> {
    token::digest(call.bytes(0)?).as_slice().into_datum()
}
