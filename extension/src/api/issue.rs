//! `create_api_token` draws the secret, stores its digest, and hands the plaintext out once. `import_api_token` stores the
//! digest of a token that another system issued.

#![allow(unsafe_code)]

use super::users;
use crate::error::{Error, OrRaise};
use crate::fields;
use crate::fmgr::{Call, sql_function};
use crate::store::composite::{self, Composite};
use crate::store::issue::{self, NewToken, Stored};
use crate::store::quota;
use crate::sys;
use core::ffi::CStr;
use pgrx::datum::TimestampWithTimeZone;
use pgrx::pg_sys::{self, Datum};
use pgrx::{IntoDatum, Uuid};
use tollgate_core::token::{self, Digest, ENTROPY_LEN, Issued, Prefix};
use zeroize::Zeroizing;

/// Of a token of which nothing but the digest is known.
const IMPORTED_HINT: &str = "imported";

sql_function!(create_api_token);
fn create_api_token(call: &Call) -> Option<Datum> {
    refuse_if_read_only(c"tollgate.create_api_token()");
    let user_id = fields::user_id(call.text(0)).or_raise();
    if users::admit(user_id).inactive {
        Error::inactive_user().raise();
    }
    quota::lock(user_id);
    let name = fields::name(call.text(1)).or_raise();
    let scopes = fields::scopes(call.text_array(2)).or_raise();
    let lifetime = fields::lifetime(call.value(3)).or_raise();
    fields::metadata(call.datum(4), call.bytes(4)).or_raise();
    fields::allowed_ips(call.text_array(5)).or_raise();
    fields::limit(call.value(6), call.value(7)).or_raise();
    let prefix = fields::prefix(call.text(8)).or_raise();

    let issued = draw(&prefix).or_raise();
    let token = NewToken {
        event: "token.created",
        id: new_id(),
        digest: &issued.digest(),
        hint: &issued.hint(),
        user_id,
        name,
        scopes: &scopes,
        lifetime,
        metadata: call.datum(4),
        allowed_ips: call.datum(5),
        rate_limit: call.value(6),
        rate_window: call.value(7),
        parent: None,
    };
    let stored = store(&token).or_raise();
    Some(issued_token(&issued, &token, &stored))
}

sql_function!(import_api_token);
fn import_api_token(call: &Call) -> Option<Datum> {
    refuse_if_read_only(c"tollgate.import_api_token()");
    let user_id = fields::user_id(call.text(0)).or_raise();
    let standing = users::admit(user_id);
    quota::lock(user_id);
    let name = fields::name(call.text(1)).or_raise();
    let digest: Digest =
        call.bytes(2).and_then(|bytes| bytes.try_into().ok()).ok_or_else(not_a_digest).or_raise();
    let scopes = fields::scopes(call.text_array(3)).or_raise();
    let lifetime = fields::lifetime(call.value(4)).or_raise();
    fields::metadata(call.datum(5), call.bytes(5)).or_raise();
    fields::allowed_ips(call.text_array(6)).or_raise();
    fields::limit(call.value(7), call.value(8)).or_raise();

    let token = NewToken {
        event: "token.imported",
        id: new_id(),
        digest: &digest,
        hint: IMPORTED_HINT,
        user_id,
        name,
        scopes: &scopes,
        lifetime,
        metadata: call.datum(5),
        allowed_ips: call.datum(6),
        rate_limit: call.value(7),
        rate_window: call.value(8),
        parent: None,
    };
    store(&token).or_raise();
    if standing.inactive {
        users::settle(user_id);
    }
    token.id.into_datum()
}

fn not_a_digest() -> Error {
    Error::argument(
        "token_hash",
        "a token is imported by the SHA-256 digest of its plaintext",
        "which is NULL or not of 32 bytes",
        "Pass the digest as bytea, such as decode(hex_digest, 'hex'); never the token itself.",
    )
}

/// A standby refuses by itself only once SPI asks for a transaction id, and then with an internal error.
pub(super) fn refuse_if_read_only(function: &CStr) {
    // SAFETY: a C string.
    unsafe { pg_sys::PreventCommandIfReadOnly(function.as_ptr()) };
}

pub(super) fn draw(prefix: &Prefix) -> Result<Issued, Error> {
    Ok(token::issue(prefix, &*entropy()?))
}

pub(super) fn new_id() -> Uuid {
    Uuid::from_bytes(*uuid::Uuid::now_v7().as_bytes())
}

/// Stores a token, if its user may have one more and its end, which the calendar decides, is one that a token may have.
pub(super) fn store(token: &NewToken<'_>) -> Result<Stored, Error> {
    quota::claim(token.user_id)?;
    let stored = issue::insert(token)?.ok_or_else(Error::duplicate_digest)?;
    fields::end("expires_in", stored.expires_at.map(i64::from))?;
    say_what_may_not_be_meant(Some(token.name), stored.expires_at);
    Ok(stored)
}

/// What is allowed, and yet mostly a mistake: an interval without a unit, which is in seconds, so that '90' ends after a
/// minute and a half (five minutes are what a token for one job may well have); and scopes in the place of the name,
/// because the user was left out.
pub(super) fn say_what_may_not_be_meant(name: Option<&str>, expires_at: Option<TimestampWithTimeZone>) {
    const SHORT_LIFE: i64 = 120_000_000;
    let remaining = expires_at.map(|end| i64::from(end).saturating_sub(sys::GetCurrentTimestamp()));
    if let Some(remaining @ ..SHORT_LIFE) = remaining {
        Error::short_life(remaining).notice();
    }
    if name.is_some_and(|name| name.starts_with('{') && name.ends_with('}')) {
        Error::name_like_a_list().notice();
    }
}

pub(super) fn issued_token(issued: &Issued, token: &NewToken<'_>, stored: &Stored) -> Datum {
    composite::form(
        Composite::IssuedToken,
        [
            token.id.into_datum(),
            issued.token().into_datum(),
            token.hint.into_datum(),
            token.user_id.into_datum(),
            token.name.into_datum(),
            token.scopes.to_vec().into_datum(),
            stored.expires_at.into_datum(),
            stored.created_at.into_datum(),
        ],
    )
}

/// Bytes of the operating system's random number generator.
fn entropy() -> Result<Zeroizing<[u8; ENTROPY_LEN]>, Error> {
    let mut bytes = Zeroizing::new([0; ENTROPY_LEN]);
    getrandom::fill(bytes.as_mut_slice())
        .map_err(|error| Error::internal(format!("the operating system gave no random numbers: {error}")))?;
    Ok(bytes)
}
