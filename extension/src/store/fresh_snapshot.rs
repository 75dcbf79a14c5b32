//! Queries that see what is committed now. Under REPEATABLE READ a statement sees the transaction's snapshot, which may
//! be old; code that counts tokens, or reports that there is none, must not rely on it.
#![allow(unsafe_code)]

use crate::error::Error;
use core::cell::Cell;
use core::ffi::{CStr, c_char};
use pgrx::pg_sys::{self, Datum, Oid};
use std::thread::LocalKey;

/// A query of one value, prepared once per backend.
pub(crate) struct Query {
    pub(crate) statement: &'static CStr,
    pub(crate) plan: &'static LocalKey<Cell<pg_sys::SPIPlanPtr>>,
}

#[derive(Clone, Copy)]
pub(crate) enum Snapshot {
    Latest,
    /// The same, for a query that locks or writes.
    LatestToWrite,
    /// The transaction's snapshot, which is the latest under READ COMMITTED.
    OfTransaction,
}

impl Query {
    /// The value of the first row as text.
    pub(crate) fn text<const N: usize>(
        &self,
        snapshot: Snapshot,
        arguments: [(Oid, Option<Datum>); N],
    ) -> Result<Option<String>, Error> {
        let mut types = arguments.map(|(oid, _)| oid);
        let mut values = arguments.map(|(_, value)| value.unwrap_or(Datum::null()));
        let nulls =
            arguments.map(|(_, value)| (if value.is_some() { b' ' } else { b'n' }).cast_signed() as c_char);
        // SAFETY: the arguments are of the given types and live as long as the call. On an ERROR the abort of the
        // transaction ends the SPI connection and releases the snapshot.
        unsafe {
            pg_sys::SPI_connect();
            if self.plan.get().is_null() {
                let plan = pg_sys::SPI_prepare(self.statement.as_ptr(), N as i32, types.as_mut_ptr());
                if plan.is_null() || pg_sys::SPI_keepplan(plan) != 0 {
                    return Err(Error::internal("could not prepare a query of the tokens"));
                }
                self.plan.set(plan);
            }
            let registered = pg_sys::RegisterSnapshot(match snapshot {
                Snapshot::Latest | Snapshot::LatestToWrite => pg_sys::GetLatestSnapshot(),
                Snapshot::OfTransaction => pg_sys::GetTransactionSnapshot(),
            });
            let outcome = pg_sys::SPI_execute_snapshot(
                self.plan.get(),
                values.as_mut_ptr(),
                nulls.as_ptr(),
                registered,
                core::ptr::null_mut(),
                !matches!(snapshot, Snapshot::LatestToWrite),
                false,
                1,
            );
            pg_sys::UnregisterSnapshot(registered);
            if outcome != pg_sys::SPI_OK_SELECT.cast_signed() || pg_sys::SPI_processed != 1 {
                return Err(Error::internal("could not query the tokens"));
            }
            let table = &*pg_sys::SPI_tuptable;
            let value = pg_sys::SPI_getvalue(*table.vals, table.tupdesc, 1);
            let text = value.as_ref().map(|start| CStr::from_ptr(start).to_string_lossy().into_owned());
            pg_sys::SPI_finish();
            Ok(text)
        }
    }
}

/// Whether statements may see an older state than the current one.
pub(crate) fn transaction_keeps_its_snapshot() -> bool {
    // SAFETY: a plain variable of this process.
    unsafe { pg_sys::XactIsoLevel >= pg_sys::XACT_REPEATABLE_READ.cast_signed() }
}

thread_local! {
    static TOKENS_PLAN: Cell<pg_sys::SPIPlanPtr> = const { Cell::new(core::ptr::null_mut()) };
    static SESSIONS_PLAN: Cell<pg_sys::SPIPlanPtr> = const { Cell::new(core::ptr::null_mut()) };
}

/// The row versions of a token, and of some users' tokens that are not revoked.
const TOKENS: Query = Query {
    statement: c"
        SELECT string_agg(concat_ws(' ', t.id, t.xmin), ',' ORDER BY t.id)
        FROM tollgate.api_tokens t
        WHERE t.id = $1 OR (t.user_id = ANY ($2) AND t.revoked_at IS NULL)",
    plan: &TOKENS_PLAN,
};

/// Refuses (40001) when the transaction's snapshot does not show these tokens as they are now: a token that it does not
/// show would be neither revoked nor narrowed. Call it once the tokens are locked.
pub(crate) fn check_snapshot(token_id: Option<Datum>, user_ids: Option<Datum>) -> Result<(), Error> {
    if !transaction_keeps_its_snapshot() {
        return Ok(());
    }
    let seen =
        |snapshot| TOKENS.text(snapshot, [(pg_sys::UUIDOID, token_id), (pg_sys::TEXTARRAYOID, user_ids)]);
    if seen(Snapshot::Latest)? == seen(Snapshot::OfTransaction)? {
        Ok(())
    } else {
        Err(Error::old_snapshot())
    }
}

/// Whether a session, or one of some users, is not revoked.
const SESSIONS: Query = Query {
    statement: c"
        SELECT EXISTS (SELECT FROM tollgate.sessions s
                       WHERE s.revoked_at IS NULL AND (s.id = $1 OR s.user_id = ANY ($2 COLLATE \"C\")))",
    plan: &SESSIONS_PLAN,
};

/// Refuses (40001) when sessions that were to be ended are not: the transaction's snapshot does not show them.
pub(crate) fn check_sessions_ended(session: Option<Datum>, user_ids: Option<Datum>) -> Result<(), Error> {
    if !transaction_keeps_its_snapshot() {
        return Ok(());
    }
    let left =
        SESSIONS.text(Snapshot::Latest, [(pg_sys::UUIDOID, session), (pg_sys::TEXTARRAYOID, user_ids)])?;
    if left.as_deref() == Some("t") { Err(Error::old_snapshot()) } else { Ok(()) }
}
