//! Refuses to write in a read-only transaction or on a standby, before any work is done.
#![allow(unsafe_code)]

use core::ffi::CStr;
use pgrx::pg_sys;

/// Without this, a standby refuses only when SPI assigns a transaction id, with an internal error.
pub(crate) fn refuse_if_read_only(function: &CStr) {
    // SAFETY: a C string.
    unsafe { pg_sys::PreventCommandIfReadOnly(function.as_ptr()) };
}
