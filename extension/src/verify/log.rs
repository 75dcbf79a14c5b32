//! Verification outcomes in the server's log, as `tollgate.log_verifications` selects them.
//!
//! Each is one line of `key=value` pairs in this order: code, token_id, client_ip, required, reason; "-" for a missing
//! value. A client that presents tokens cannot inject text: ids and addresses are printed by us, and of required scopes
//! only scope characters, up to a maximum length. The line goes to the server's log only, without the statement, its
//! context and its bind values, which contain the token. The number of lines is limited for the whole server (for each
//! session, if the library is not preloaded), and the next line reports how many were left out. Nothing is written to a
//! table, so it works on standbys.
#![allow(unsafe_code)]

use crate::error::Error;
use crate::guc::LogVerifications;
use crate::pg::sys;
use crate::verify::presented::Required;
use crate::verify::refusal;
use crate::{guc, shmem};
use core::fmt::Write as _;
use pgrx::pg_sys;
use std::ffi::CString;
use tollgate_core::net::Net;
use tollgate_core::status::Code;
use tollgate_core::throttle::Throttle;
use tollgate_core::token;

/// Used without shared memory.
static OF_THIS_SESSION: Throttle = Throttle::new();

/// Logs an outcome, if the setting selects it.
#[inline]
pub(crate) fn verification(
    code: Code,
    token_id: Option<&[u8; 16]>,
    client: Option<&Net>,
    required: &Required<'_>,
    reason: Option<&str>,
) {
    let wanted = guc::log_verifications();
    if wanted == LogVerifications::off || (wanted == LogVerifications::failures && code == Code::Valid) {
        return;
    }
    write(code, token_id, client, required, reason);
}

#[cold]
fn write(
    code: Code,
    token_id: Option<&[u8; 16]>,
    client: Option<&Net>,
    required: &Required<'_>,
    reason: Option<&str>,
) {
    if is_admitted() {
        emit(&line(code, token_id, client, required, reason));
    }
}

/// Whether one more line may be logged; says first how many were not.
fn is_admitted() -> bool {
    let throttle = shmem::log_throttle().unwrap_or(&OF_THIS_SESSION);
    let most = guc::max_logged_verifications();
    let Some(left_out) = throttle.admit(sys::GetCurrentTimestamp(), most) else { return false };
    if left_out > 0 {
        emit(&format!(
            "tollgate: {left_out} verifications were not logged, because tollgate.max_logged_verifications is {most}"
        ));
    }
    true
}

/// Logs why a client of `client_credentials` was refused, which it does not learn. What is passed may be shown: `client_id`
/// is that of an account.
#[cold]
pub(crate) fn client(code: &str, client_id: &str, client: Option<&Net>, condition: &str) {
    if guc::log_verifications() == LogVerifications::off {
        return;
    }
    if !is_admitted() {
        return;
    }
    let mut line = format!("tollgate: client_credentials code={code} client_id={}", token::redact(client_id));
    let _ = match client {
        Some(net) => write!(line, " client_ip={net}"),
        None => write!(line, " client_ip=-"),
    };
    let _ = write!(line, " condition={}", token::redact(condition));
    emit(&line);
}

/// Logs that a token may be refused because an import key does not open, at most once a minute of the whole server.
#[cold]
pub(crate) fn unopened_import_key(name: &str, error: &Error) {
    static OF_THIS_SESSION: Throttle = Throttle::new();
    const MINUTE: i64 = 60_000_000;
    let throttle = shmem::import_key_throttle().unwrap_or(&OF_THIS_SESSION);
    if throttle.admit_once_in(sys::GetCurrentTimestamp(), MINUTE).is_some() {
        emit(&format!(
            "tollgate: tokens that were imported with the key {name} are refused: {}",
            error.text()
        ));
    }
}

fn line(
    code: Code,
    token_id: Option<&[u8; 16]>,
    client: Option<&Net>,
    required: &Required<'_>,
    reason: Option<&str>,
) -> String {
    let mut line = format!("tollgate: verification code={code} token_id=");
    let _ = match token_id {
        Some(id) => write!(line, "{}", uuid::Uuid::from_bytes(*id)),
        None => write!(line, "-"),
    };
    let _ = match client {
        Some(net) => write!(line, " client_ip={net}"),
        None => write!(line, " client_ip=-"),
    };
    line.push_str(" required=");
    match required.len() {
        0 => line.push('-'),
        _ => refusal::push_scopes(&mut line, required),
    }
    line.push_str(" reason=");
    line.push_str(reason.unwrap_or("-"));
    line
}

/// Writes one line to the server's log only.
fn emit(line: &str) {
    // The text above contains no NUL byte.
    let Ok(line) = CString::new(line) else { return };
    let text = line.as_ptr();
    // SAFETY: the calls that ereport() expands to; the format takes the one string, which outlives the closure. At this
    // level errfinish processes interrupts, which may raise an ERROR: the closure holds nothing that needs dropping.
    unsafe {
        sys::guarded(|| {
            if sys::errstart(pg_sys::LOG_SERVER_ONLY.cast_signed(), core::ptr::null()) {
                sys::errmsg_internal(c"%s".as_ptr(), text);
                sys::errhidestmt(true);
                sys::errhidecontext(true);
                sys::errfinish(c"log.rs".as_ptr(), 0, c"verification".as_ptr());
            }
        });
    }
}
