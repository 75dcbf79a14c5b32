//! The rows of a function that returns a set of them, kept in the executor's tuplestore.
#![allow(unsafe_code)]

use crate::error::Error;
use crate::pg::fmgr::Call;
use crate::pg::sys;
use core::marker::PhantomData;
use pgrx::pg_sys::{self, Datum};

/// The set that a call returns. The rows are copied into it.
pub(crate) struct RowSet<'a> {
    store: *mut pg_sys::Tuplestorestate,
    descriptor: pg_sys::TupleDesc,
    call: PhantomData<&'a Call>,
}

impl<'a> RowSet<'a> {
    /// Raises where a set is not accepted, and if its rows have another number of columns.
    pub(crate) fn of(call: &'a Call, columns: usize) -> Self {
        // SAFETY: a call by PostgreSQL of a function that is declared to return a set of a composite type. The function
        // checks that its caller accepts one, and stores these.
        let (store, descriptor, natts) = unsafe {
            pg_sys::InitMaterializedSRF(call.info(), 0);
            let set = (*call.info()).resultinfo.cast::<pg_sys::ReturnSetInfo>();
            ((*set).setResult, (*set).setDesc, (*(*set).setDesc).natts)
        };
        if usize::try_from(natts) != Ok(columns) {
            Error::unknown_layout(format!(
                "The rows of the set have {natts} columns, the library knows {columns}."
            ))
            .raise();
        }
        RowSet { store, descriptor, call: PhantomData }
    }

    /// Each value is of its column's type.
    pub(crate) fn push<const N: usize>(&self, columns: [Option<Datum>; N]) {
        let mut values = columns.map(|column| column.unwrap_or(Datum::null()));
        let mut nulls = columns.map(|column| column.is_none());
        // SAFETY: the tuplestore of the running call, and its descriptor, which has N columns. The closure holds nothing
        // that needs dropping.
        unsafe {
            sys::guarded(|| {
                sys::tuplestore_putvalues(
                    self.store,
                    self.descriptor,
                    values.as_mut_ptr(),
                    nulls.as_mut_ptr(),
                );
            });
        }
    }
}
