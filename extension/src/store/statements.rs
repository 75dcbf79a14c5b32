//! Statements that are prepared once per backend.
#![allow(unsafe_code)]

use crate::error::Error;
use core::cell::Cell;
use pgrx::datum::DatumWithOid;
use pgrx::pg_sys;
use pgrx::spi::{OwnedPreparedStatement, Spi, SpiError};

/// A statement that was prepared, for as long as the process lives.
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
        // A trigger may lead here again.
        read(client.update(prepared, Some(1), arguments)?.first())
    })
    .map_err(|error| Error::internal(format!("could not store a token: {error}")))
}
