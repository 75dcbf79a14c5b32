//! Statements that are prepared once per backend.
#![allow(unsafe_code)]

use crate::error::Error;
use core::cell::Cell;
use pgrx::datum::DatumWithOid;
use pgrx::pg_sys;
use pgrx::spi::{OwnedPreparedStatement, Spi, SpiError};

/// A prepared statement that is kept for the life of the process.
pub(crate) type Kept = Cell<Option<&'static OwnedPreparedStatement>>;

pub(crate) fn with_plan<R>(
    plan: &'static std::thread::LocalKey<Kept>,
    statement: &str,
    arguments: &[DatumWithOid<'_>],
    read: impl FnOnce(pgrx::spi::SpiTupleTable<'_>) -> Result<R, SpiError>,
) -> Result<R, Error> {
    let types: Vec<_> = arguments.iter().map(|argument| pg_sys::PgOid::from(argument.oid())).collect();
    Spi::connect_mut(|client| {
        let prepared = match plan.get() {
            Some(prepared) => prepared,
            None => {
                let prepared: &_ = Box::leak(Box::new(client.prepare_mut(statement, &types)?.keep()));
                plan.set(Some(prepared));
                prepared
            }
        };
        // A trigger may call this again.
        read(client.update(prepared, Some(1), arguments)?.first())
    })
    .map_err(|error| Error::internal(format!("could not store a token: {error}")))
}

/// A plan made while the table was empty would use a sequential scan, and is cached. RI_Initial_Check, of PostgreSQL's
/// foreign keys, changes settings in the same way.
pub(crate) fn by_index_alone<T>(query: impl FnOnce() -> T) -> T {
    // SAFETY: settings of this session, for the duration of the query. On an ERROR the abort of the transaction
    // restores them.
    let level = unsafe { pg_sys::NewGUCNestLevel() };
    for (setting, value) in [
        (c"enable_seqscan", c"off"),
        (c"enable_bitmapscan", c"off"),
        (c"plan_cache_mode", c"force_generic_plan"),
    ] {
        // SAFETY: the same; the names and values are C strings.
        unsafe {
            pg_sys::set_config_option(
                setting.as_ptr(),
                value.as_ptr(),
                pg_sys::GucContext::PGC_USERSET,
                pg_sys::GucSource::PGC_S_SESSION,
                pg_sys::GucAction::GUC_ACTION_SAVE,
                true,
                0,
                false,
            );
        }
    }
    let answer = query();
    // SAFETY: the level that was opened above.
    unsafe { pg_sys::AtEOXact_GUC(true, level) };
    answer
}
