//! `create_api_token`: validates, draws the secret, stores its digest, and hands the plaintext out once.

#![allow(unsafe_code)]

use crate::datum;
use crate::error::{Error, OrRaise};
use crate::fmgr::{Call, sql_function};
use crate::guc;
use crate::store::composite::{self, Composite};
use crate::store::issue::{self, NewToken};
use crate::sys;
use pgrx::datum::Interval;
use pgrx::pg_sys::{self, Datum};
use pgrx::{IntoDatum, Uuid};
use tollgate_core::scope;
use tollgate_core::token::{self, Digest, ENTROPY_LEN, Prefix};
use zeroize::Zeroizing;

const MAX_NAME: usize = 100;
const MAX_USER_ID: usize = 255;
const MAX_YEARS: i128 = 1000;
/// Scopes, or networks, of one token: each verification may look at all of them.
const MAX_LIST: usize = 1000;

sql_function!(token_digest);
fn token_digest(call: &Call) -> Option<Datum> {
    let presented = call.bytes(0)?;
    token::parse(presented)?;
    let digest: Digest = token::digest(presented);
    digest.as_slice().into_datum()
}

sql_function!(create_api_token);
fn create_api_token(call: &Call) -> Option<Datum> {
    // Before SPI assigns a transaction id, which on a standby is an internal error.
    // SAFETY: a C string.
    unsafe { pg_sys::PreventCommandIfReadOnly(c"tollgate.create_api_token()".as_ptr()) };
    let user_id = user_id(call.text(0)).or_raise();
    let name = name(call.text(1)).or_raise();
    let scopes = scopes(call).or_raise();
    let lifetime = lifetime(call.value(3)).or_raise();
    let metadata = metadata(call).or_raise();
    let allowed_ips = allowed_ips(call).or_raise();
    if call.datum(6).is_some() {
        Error::limits_unsupported().raise();
    }
    let prefix = prefix(call.text(8)).or_raise();

    let issued = token::issue(&prefix, &entropy().or_raise());
    let digest = issued.digest();
    let hint = issued.hint();
    let id = Uuid::from_bytes(*uuid::Uuid::now_v7().as_bytes());
    let stored = issue::insert(&NewToken {
        id,
        digest: &digest,
        hint: &hint,
        user_id,
        name,
        scopes: &scopes,
        lifetime,
        metadata,
        allowed_ips,
    })
    .or_raise();
    // A mixed interval such as '-1 month 31 days' is positive or not according to the calendar.
    if stored.expires_at.is_some_and(|end| i64::from(end) <= sys::GetCurrentTimestamp()) {
        not_positive().raise();
    }

    Some(composite::form(
        Composite::IssuedToken,
        [
            id.into_datum(),
            issued.token().into_datum(),
            hint.into_datum(),
            user_id.into_datum(),
            name.into_datum(),
            scopes.into_datum(),
            stored.expires_at.into_datum(),
            stored.created_at.into_datum(),
        ],
    ))
}

fn user_id(value: Option<&str>) -> Result<&str, Error> {
    let value = value.filter(|text| !text.trim().is_empty()).unwrap_or_default();
    match value.chars().count() {
        1..=MAX_USER_ID => Ok(value),
        0 => Err(Error::argument(
            "user_id",
            "a token needs a user",
            "which is NULL, empty or blank",
            "Pass the key of the user in your application, as text.",
        )),
        length => Err(Error::argument(
            "user_id",
            format!("a user id has at most {MAX_USER_ID} characters"),
            &format!("of {length} characters"),
            "Pass the key of the user in your application, or a digest of it if it is that long.",
        )),
    }
}

fn name(value: Option<&str>) -> Result<&str, Error> {
    let value = value.filter(|text| !text.trim().is_empty()).unwrap_or_default();
    match value.chars().count() {
        1..=MAX_NAME => Ok(value),
        0 => Err(Error::argument(
            "name",
            "a token needs a name",
            "which is NULL, empty or blank",
            "Say what the token is for, so that its owner knows later which one to revoke.",
        )),
        length => Err(Error::argument(
            "name",
            format!("the name of a token has at most {MAX_NAME} characters"),
            &format!("of {length} characters"),
            "Shorten it; what does not fit may go into metadata.",
        )),
    }
}

/// The scopes without repetitions, each of which the catalogue covers.
fn scopes(call: &Call) -> Result<Vec<String>, Error> {
    const HINT: &str = "Define scopes with tollgate.define_scope(name, description); grant them as they are, by a wildcard such as \
                        posts:* that covers at least one, or all of them by admin.";
    let Some(array) = call.text_array(2) else {
        return Err(Error::argument(
            "scopes",
            "the scopes of a token cannot be NULL",
            "",
            "Pass '{}' for a token without scopes.",
        ));
    };
    if array.dimensions() > 1 || array.has_nulls() {
        return Err(Error::argument(
            "scopes",
            "scopes are a list without NULLs",
            "which has a NULL or more than one dimension",
            HINT,
        ));
    }
    if array.len() > MAX_LIST {
        return Err(Error::argument(
            "scopes",
            format!("a token has at most {MAX_LIST} scopes"),
            &format!("of {} elements", array.len()),
            "Grant a wildcard such as posts:* instead of each scope that it covers.",
        ));
    }
    let mut scopes: Vec<String> = Vec::with_capacity(array.len());
    for scope in array.present().map(String::from_utf8_lossy) {
        if !scopes.iter().any(|seen| *seen == scope) {
            scopes.push(scope.into_owned());
        }
    }
    let malformed: Vec<&str> =
        scopes.iter().map(String::as_str).filter(|one| !scope::is_grantable(one.as_bytes())).collect();
    if !malformed.is_empty() {
        return Err(Error::argument(
            "scopes",
            "a token cannot be issued with malformed scopes",
            &format!("with {}", quoted(&malformed)),
            "A scope is segments joined by \":\", each of a-z, 0-9, \"_\", \".\" and \"-\"; a wildcard ends in \":*\".",
        ));
    }
    let undefined = issue::uncovered_scopes(&scopes)?;
    if !undefined.is_empty() {
        let undefined: Vec<&str> = undefined.iter().map(String::as_str).collect();
        return Err(Error::argument(
            "scopes",
            "a token cannot be issued with undefined scopes",
            &format!("with {}", quoted(&undefined)),
            HINT,
        ));
    }
    Ok(scopes)
}

/// Names offenders, the first of them if there are many, and no part of a token that was passed by mistake.
fn quoted(offenders: &[&str]) -> String {
    const NAMED: usize = 10;
    let named = offenders.iter().take(NAMED).map(|one| {
        let shown: String = token::redact(one).chars().take(140).collect();
        format!("{shown:?}")
    });
    let named = named.collect::<Vec<_>>().join(", ");
    match offenders.len() {
        ..=NAMED => named,
        many => format!("{named} and {} more", many - NAMED),
    }
}

const LIFETIME_HINT: &str = "Pass NULL for a token that does not expire by itself.";

fn not_positive() -> Error {
    Error::argument("expires_in", "the lifetime of a token must be positive", "which is not", LIFETIME_HINT)
}

/// Positive and finite. An infinite interval (since PostgreSQL 17) is the longest of all, or the most negative.
fn lifetime(value: Option<Interval>) -> Result<Option<Interval>, Error> {
    const YEAR: i128 = 366 * 86_400 * 1_000_000;
    match value.as_ref().map(Interval::as_micros) {
        Some(..=0) => Err(not_positive()),
        Some(micros) if micros > MAX_YEARS * YEAR => Err(Error::argument(
            "expires_in",
            format!("the lifetime of a token must be finite, and is at most {MAX_YEARS} years"),
            "which is longer",
            LIFETIME_HINT,
        )),
        _ => Ok(value),
    }
}

fn metadata(call: &Call) -> Result<Datum, Error> {
    // The header of a jsonb container (jsonb.h): the flag of an object is in its fourth bit from the top.
    const JB_FOBJECT: u32 = 0x2000_0000;
    let header = call.bytes(4).and_then(|content| content.first_chunk().copied()).map(u32::from_ne_bytes);
    match (header, call.datum(4)) {
        (Some(header), Some(datum)) if header & JB_FOBJECT != 0 => Ok(datum),
        _ => Err(Error::argument(
            "metadata",
            "the metadata of a token is a JSON object",
            "which is not an object",
            "Pass '{}' for none, or an object such as {\"plan\": \"pro\"}.",
        )),
    }
}

fn allowed_ips(call: &Call) -> Result<Option<Datum>, Error> {
    let Some(array) = call.text_array(5) else { return Ok(None) };
    let well_formed = array.dimensions() == 1
        && (1..=MAX_LIST).contains(&array.len())
        && array.iter().all(|network| network.and_then(datum::net).is_some());
    if !well_formed {
        return Err(Error::argument(
            "allowed_ips",
            format!("the networks of a token are a list of 1 to {MAX_LIST}, without NULLs"),
            "which is empty or too long, has a NULL, or has more than one dimension",
            "Pass NULL for a token that may be used from anywhere.",
        ));
    }
    Ok(call.datum(5))
}

fn prefix(value: Option<&str>) -> Result<Prefix, Error> {
    let Some(value) = value else { return Ok(guc::token_prefix()) };
    Prefix::parse(value).map_err(|error| {
        Error::argument(
            "prefix",
            error.to_string(),
            "",
            "Leave it NULL for the prefix that the setting tollgate.token_prefix names.",
        )
    })
}

/// Bytes of the operating system's random number generator.
fn entropy() -> Result<Zeroizing<[u8; ENTROPY_LEN]>, Error> {
    let mut bytes = Zeroizing::new([0; ENTROPY_LEN]);
    getrandom::fill(bytes.as_mut_slice())
        .map_err(|error| Error::internal(format!("the operating system gave no random numbers: {error}")))?;
    Ok(bytes)
}
