//! The scope grammar and the acting role, for SQL.
#![allow(unsafe_code)]

use crate::pg::fmgr::{Call, sql_function};
use core::ffi::CStr;
use pgrx::IntoDatum;
use pgrx::pg_sys::{self, Datum};
use tollgate_core::scope;

sql_function!(scope_grants);
fn scope_grants(call: &Call) -> Option<Datum> {
    let granted = call.text_array(0)?;
    scope::any_grants(granted.present(), call.bytes(1)?).into_datum()
}

sql_function!(scope_is_valid);
fn scope_is_valid(call: &Call) -> Option<Datum> {
    scope::is_scope(call.bytes(0)?).into_datum()
}

sql_function!(acting_role);
fn acting_role(_call: &Call) -> Option<Datum> {
    // SAFETY: the outer user exists while it acts; the name is a palloc'ed C string.
    let name = unsafe { CStr::from_ptr(pg_sys::GetUserNameFromId(pg_sys::GetOuterUserId(), false)) };
    name.to_string_lossy().into_owned().into_datum()
}
