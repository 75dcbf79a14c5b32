//! How errors pass through Rust.
//!
//! PostgreSQL raises an error by `siglongjmp`. pgrx catches it where Rust called PostgreSQL, unwinds the Rust frames as
//! a panic, and raises the error again where PostgreSQL called Rust, but keeps only the SQLSTATE, message, detail and
//! hint. [`entry`] keeps all of it: an error context callback copies the `ErrorData` while the error is being raised
//! (`CopyErrorData`), and the copy is raised again (`ThrowErrorData`).
#![allow(unsafe_code)]

use core::ffi::{CStr, c_char, c_int, c_void};
use core::ptr;
use pgrx::PgLogLevel;
use pgrx::pg_sys::panic::{CaughtError, ErrorReportWithLevel};
use pgrx::pg_sys::{self, ErrorData};
use std::any::Any;
use std::io::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

/// A backtrace must not reach the client, which is where pgrx's panic hook puts it with `RUST_BACKTRACE=1`. An ERROR
/// needs no backtrace; a panic of ours is logged with its location.
pub(crate) fn init() {
    std::panic::set_hook(Box::new(|info| {
        let payload = info.payload();
        if !(payload.is::<&str>() || payload.is::<String>()) {
            return;
        }
        if let Some(location) = info.location() {
            let _ = writeln!(std::io::stderr(), "tollgate: panicked at {location}");
        }
    }));
}

unsafe extern "C-unwind" {
    // Without pgrx's guard: these are called where an ERROR has no Rust frame to unwind.
    fn CopyErrorData() -> *mut ErrorData;
    fn FreeErrorData(error: *mut ErrorData);
    fn ThrowErrorData(error: *mut ErrorData);
    fn geterrcode() -> c_int;
}

/// The last error that was raised below an [`entry`], whether or not something caught it.
struct LastError {
    error: *mut ErrorData,
    /// Lives until the call ends.
    context: pg_sys::MemoryContext,
}

/// Runs the body of a function that PostgreSQL called. A PostgreSQL ERROR or a panic unwinds `body`, and is then raised
/// as a PostgreSQL ERROR.
///
/// # Safety
///
/// Called by PostgreSQL, in a frame that owns nothing.
pub(crate) unsafe fn entry<R>(body: impl FnOnce() -> R) -> R {
    // SAFETY: variables of this process. The callback is removed from the stack before its argument goes out of scope:
    // here, or by the code that catches an ERROR and restores the stack.
    let (outcome, last) = unsafe {
        let mut last = LastError { error: ptr::null_mut(), context: pg_sys::CurrentMemoryContext };
        let mut callback = pg_sys::ErrorContextCallback {
            previous: pg_sys::error_context_stack,
            callback: Some(keep),
            arg: (&raw mut last).cast(),
        };
        pg_sys::error_context_stack = &raw mut callback;
        let outcome = catch_unwind(AssertUnwindSafe(body));
        pg_sys::error_context_stack = callback.previous;
        (outcome, last.error)
    };
    let payload = match outcome {
        Ok(result) => {
            if !last.is_null() {
                // SAFETY: `keep` made it. Freeing raises nothing.
                unsafe { FreeErrorData(last) };
            }
            return result;
        }
        Err(payload) => payload,
    };
    // SAFETY: a copy that `keep` made, or NULL.
    if unsafe { is_of(last, payload.as_ref()) } {
        drop(payload);
        // SAFETY: nothing is left that needs dropping. The copy is freed with its memory context.
        unsafe { ThrowErrorData(last) };
        unreachable!("an ERROR does not return");
    }
    // SAFETY: as above; pgrx raises a panic or an error of ours.
    unsafe { pg_sys::panic::pgrx_extern_c_guard(move || resume_unwind(payload)) }
}

/// Called by `errfinish` for each message, before it is sent or logged.
unsafe extern "C-unwind" fn keep(last: *mut c_void) {
    // SAFETY: the argument is that of the callback, whose `entry` is still running. An ERROR here skips no frame of
    // ours that owns something.
    unsafe {
        let last = last.cast::<LastError>();
        // Out of memory: there is none for a copy.
        if geterrcode() == pg_sys::errcodes::PgSqlErrorCode::ERRCODE_OUT_OF_MEMORY as c_int {
            return;
        }
        let previous = pg_sys::CurrentMemoryContext;
        pg_sys::CurrentMemoryContext = (*last).context;
        let error = CopyErrorData();
        pg_sys::CurrentMemoryContext = previous;
        let superseded = if (*error).elevel == PgLogLevel::ERROR as c_int {
            core::mem::replace(&mut (*last).error, error)
        } else {
            error
        };
        if !superseded.is_null() {
            FreeErrorData(superseded);
        }
    }
}

/// Whether this is the error that pgrx caught. It is not if another error was raised and caught while this one unwound.
unsafe fn is_of(error: *const ErrorData, payload: &(dyn Any + Send)) -> bool {
    // SAFETY: a copy that `keep` made, whose texts are C strings or NULL.
    unsafe {
        let (Some(error), Some(CaughtError::PostgresError(caught))) =
            (error.as_ref(), payload.downcast_ref::<CaughtError>())
        else {
            return false;
        };
        let same = |text: *const c_char, caught: Option<&str>| {
            let text = text.as_ref().map(|start| CStr::from_ptr(start).to_string_lossy());
            text.as_deref() == caught
        };
        let caught: &ErrorReportWithLevel = caught;
        error.sqlerrcode == caught.sql_error_code() as c_int
            && same(error.message, Some(caught.message()))
            && same(error.detail, caught.detail())
            && same(error.hint, caught.hint())
    }
}
