//! Queries of tables that are not ours, with the rights of their owners.
//!
//! While PostgreSQL plans a query it may run functions that the table's owner put into an index or a constraint. With
//! our rights, the owner could do anything as the owner of the extension. PostgreSQL's own foreign keys switch to the
//! owner in the same way.
#![allow(unsafe_code)]

use super::statements::by_index_alone;
use crate::error::Error;
use core::cell::RefCell;
use core::ffi::c_int;
use pgrx::datum::DatumWithOid;
use pgrx::pg_sys::{self, Datum, Oid};
use pgrx::spi::{OwnedPreparedStatement, Spi, SpiError};
use std::collections::HashMap;
use std::rc::Rc;

/// Runs `work` with the rights of a role, as a restricted operation (`SECURITY_RESTRICTED_OPERATION`). Settings that it
/// changes are restored afterwards: they are the caller's.
pub(crate) fn run<R>(role: Oid, work: impl FnOnce() -> R) -> R {
    const FLAGS: u32 = pg_sys::SECURITY_LOCAL_USERID_CHANGE
        | pg_sys::SECURITY_RESTRICTED_OPERATION
        | pg_sys::SECURITY_NOFORCE_RLS;
    // SAFETY: variables of this process. On an ERROR the end of the (sub)transaction restores them.
    let (own_role, own_context, settings) = unsafe {
        let (mut role, mut context): (Oid, c_int) = (Oid::INVALID, 0);
        pg_sys::GetUserIdAndSecContext(&raw mut role, &raw mut context);
        (role, context, pg_sys::NewGUCNestLevel())
    };
    // SAFETY: as above; the role exists, as it owns something.
    unsafe { pg_sys::SetUserIdAndSecContext(role, own_context | FLAGS.cast_signed()) };
    let outcome = work();
    // SAFETY: as above.
    unsafe {
        pg_sys::AtEOXact_GUC(false, settings);
        pg_sys::SetUserIdAndSecContext(own_role, own_context);
    }
    outcome
}

thread_local! {
    static PREPARED: RefCell<HashMap<String, Rc<OwnedPreparedStatement>>> = RefCell::default();
}

/// The number of queries whose plans are kept. There is one for each attached table.
const KEPT: usize = 64;

/// Runs a query of one argument, a text[], and returns the text[] in its first row.
pub(crate) fn query(
    role: Oid,
    query: &str,
    argument: Option<Datum>,
) -> Result<Option<Vec<Option<String>>>, Error> {
    // SAFETY: the datum is of the type given with it, and lives as long as the call that it came from.
    let arguments = [unsafe { DatumWithOid::new(argument, pg_sys::TEXTARRAYOID) }];
    run(role, || Spi::connect(|client| client.select(query, Some(1), &arguments)?.first().get_one()))
        .map_err(|error| not_read(&error))
}

/// [`query`] for an argument of one element, which differs for each changed row: planning it each time would take most
/// of the time.
pub(crate) fn query_of_one(
    role: Oid,
    query: &str,
    argument: Option<Datum>,
) -> Result<Option<Vec<Option<String>>>, Error> {
    // SAFETY: as above.
    let arguments = [unsafe { DatumWithOid::new(argument, pg_sys::TEXTARRAYOID) }];
    run(role, || {
        by_index_alone(|| {
            Spi::connect(|client| {
                let known = PREPARED.with_borrow(|all| all.get(query).cloned());
                let prepared = match known {
                    Some(prepared) => prepared,
                    None => {
                        let types = arguments.each_ref().map(|argument| pg_sys::PgOid::from(argument.oid()));
                        let prepared = Rc::new(client.prepare(query, &types)?.keep());
                        PREPARED.with_borrow_mut(|all| {
                            if all.len() >= KEPT {
                                all.clear();
                            }
                            all.insert(query.to_owned(), prepared.clone());
                        });
                        prepared
                    }
                };
                client.select(&*prepared, Some(1), &arguments)?.first().get_one()
            })
        })
    })
    .map_err(|error| not_read(&error))
}

pub(super) fn not_read(error: &SpiError) -> Error {
    Error::internal(format!("could not read a table of users: {error}"))
}
