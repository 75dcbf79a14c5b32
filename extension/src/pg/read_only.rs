//! Refusing to write where nothing can be written, before any work is done.
#![allow(unsafe_code)]

use core::ffi::CStr;
use pgrx::pg_sys;

/// A standby refuses by itself only once SPI asks for a transaction id, and then with an internal error.
pub(crate) fn refuse_if_read_only(function: &CStr) {
    // SAFETY: a C string.
    unsafe { pg_sys::PreventCommandIfReadOnly(function.as_ptr()) };
}
