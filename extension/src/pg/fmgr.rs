//! The fmgr calling convention: exporting a Rust function so that SQL can call it.
//!
//! `#[pg_extern]` converts each argument into an owned Rust value. The functions of `api` read their arguments in place
//! and form their own result rows, so they use [`sql_function!`] instead; their `CREATE FUNCTION` statements are in
//! `sql/schema`.
#![allow(unsafe_code)]

use crate::pg::datum;
use pgrx::pg_sys::{self, Datum};

/// Exports a Rust function under the symbol that `CREATE FUNCTION … AS 'MODULE_PATHNAME', '…'` names.
macro_rules! sql_function {
    ($name:ident) => {
        #[allow(unsafe_code)]
        const _: () = {
            #[unsafe(export_name = concat!("pg_finfo_", stringify!($name)))]
            extern "C" fn finfo() -> *const ::pgrx::pg_sys::Pg_finfo_record {
                static V1: ::pgrx::pg_sys::Pg_finfo_record =
                    ::pgrx::pg_sys::Pg_finfo_record { api_version: 1 };
                &raw const V1
            }

            #[unsafe(export_name = stringify!($name))]
            unsafe extern "C-unwind" fn entry(
                fcinfo: ::pgrx::pg_sys::FunctionCallInfo,
            ) -> ::pgrx::pg_sys::Datum {
                // SAFETY: PostgreSQL calls this with a valid fcinfo. The guard raises an ERROR once every Rust frame is
                // unwound.
                unsafe {
                    $crate::pg::guard::entry(move || {
                        let call = $crate::pg::fmgr::Call::new(fcinfo);
                        match $name(&call) {
                            Some(datum) => datum,
                            None => call.null(),
                        }
                    })
                }
            }
        };
    };
}
pub(crate) use sql_function;

/// A call of one of our functions. Its arguments live as long as it does.
pub(crate) struct Call(pg_sys::FunctionCallInfo);

impl Call {
    /// # Safety
    ///
    /// `fcinfo` is the valid argument of a function that PostgreSQL is calling, and outlives the value.
    pub(crate) unsafe fn new(fcinfo: pg_sys::FunctionCallInfo) -> Self {
        Call(fcinfo)
    }

    /// For functions of PostgreSQL's that take the whole call.
    pub(super) fn info(&self) -> pg_sys::FunctionCallInfo {
        self.0
    }

    /// An argument as it was passed; `None` for NULL and for one that the SQL signature does not have.
    pub(crate) fn datum(&self, n: usize) -> Option<Datum> {
        // SAFETY: fcinfo is valid, and args has nargs elements.
        unsafe {
            let info = &*self.0;
            if n >= usize::try_from(info.nargs).unwrap_or(0) {
                return None;
            }
            let arg = &info.args.as_slice(n + 1)[n];
            (!arg.isnull).then_some(arg.value)
        }
    }

    /// An argument of a varlena type that is not an array: its content, detoasted if need be.
    pub(crate) fn bytes(&self, n: usize) -> Option<&[u8]> {
        // SAFETY: the SQL signature declares a varlena type here, and arguments live as long as the call.
        self.datum(n).map(|datum| unsafe { datum::varlena(datum) })
    }

    /// An argument of type text, in a database whose encoding is UTF-8 (install.sql accepts no other).
    pub(crate) fn text(&self, n: usize) -> Option<&str> {
        self.bytes(n).map(|bytes| core::str::from_utf8(bytes).expect("text in a UTF-8 database"))
    }

    /// An argument of type text[].
    pub(crate) fn text_array(&self, n: usize) -> Option<datum::TextArray<'_>> {
        self.bytes(n).map(datum::TextArray::parse)
    }

    /// An argument of a type passed by value or of fixed length, converted by pgrx.
    pub(crate) fn value<T: pgrx::FromDatum>(&self, n: usize) -> Option<T> {
        // SAFETY: the SQL signature declares T's type here.
        self.datum(n).and_then(|datum| unsafe { T::from_datum(datum, false) })
    }

    /// The trigger data; `None` if the function was not called by a trigger.
    pub(crate) fn trigger(&self) -> Option<&pg_sys::TriggerData> {
        // SAFETY: fcinfo is valid; the tag of its context gives its type, and it outlives the call.
        unsafe {
            let context = (*self.0).context;
            (!context.is_null() && (*context).type_ == pg_sys::NodeTag::T_TriggerData)
                .then(|| &*context.cast())
        }
    }

    /// Makes the call return NULL.
    pub(crate) fn null(&self) -> Datum {
        // SAFETY: fcinfo is valid and ours to write the null flag of.
        unsafe { (*self.0).isnull = true };
        Datum::null()
    }
}
