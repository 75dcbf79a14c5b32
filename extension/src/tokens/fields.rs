//! The allowed fields of a token, checked by the same rules when a token is created, derived, imported or changed.

use crate::error::Error;
use crate::guc;
use crate::pg::datum::TextArray;
use crate::pg::{datum, sys};
use crate::store::scopes as catalogue;
use pgrx::datum::{Interval, TimestampWithTimeZone};
use pgrx::pg_sys::Datum;
use tollgate_core::jsonb::{Bounds, Excess};
use tollgate_core::limit::LONGEST_WINDOW;
use tollgate_core::scope;
use tollgate_core::service;
use tollgate_core::token::{self, Prefix};

const MAX_NAME: usize = 100;
const MAX_USER_ID: usize = 255;
const MAX_YEARS: i128 = 1000;
/// Maximum nesting of free JSON. Parsers give up at 64 to 512 levels, and an event adds some levels around it.
const MAX_DEPTH: usize = 32;
/// Maximum number of scopes, or networks, of one token: each verification may read all of them.
pub(crate) const MAX_LIST: usize = 1000;

const METADATA_HINT: &str =
    "Keep it in a table of your own, and its key here; a superuser may raise tollgate.max_metadata_size.";

const SECOND: i128 = 1_000_000;
const YEAR: i128 = 366 * 86_400 * SECOND;
const LIFETIME_HINT: &str = "Leave it out for a token that does not expire by itself.";

/// No stored, logged or searched value may be a token: users do paste one where a name or a reason belongs.
pub(crate) fn without_token(argument: &str, value: &[u8]) -> Result<(), Error> {
    if !token::contains_secret(value) {
        return Ok(());
    }
    Err(Error::argument(
        argument,
        "this must not contain a token",
        "which has 80 hexadecimal digits or more in a row, as the secret of a token",
        "Leave it out; if it is a real token, revoke it. A digest of this length may be given in base64.",
    ))
}

/// How an argument is empty, for a detail: who left it out in a program did not pass NULL.
fn how_empty(value: Option<&str>) -> &'static str {
    match value {
        None => "which is NULL",
        Some(_) => "which is empty or blank",
    }
}

pub(crate) fn user_id(given: Option<&str>) -> Result<&str, Error> {
    let value = given.filter(|text| !text.trim().is_empty()).unwrap_or_default();
    match value.chars().count() {
        1..=MAX_USER_ID if service::id_of(value).is_some() => Err(Error::argument(
            "user_id",
            "this user is a service account",
            "which begins with \"service:\"",
            "Give the account a secret with tollgate.create_service_account_secret(id), with which it gets access tokens by tollgate.client_credentials().",
        )),
        1..=MAX_USER_ID => without_token("user_id", value.as_bytes()).map(|()| value),
        0 => Err(Error::argument(
            "user_id",
            "a token needs a user",
            how_empty(given),
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

pub(crate) fn name(given: Option<&str>) -> Result<&str, Error> {
    let value = given.filter(|text| !text.trim().is_empty()).unwrap_or_default();
    match value.chars().count() {
        1..=MAX_NAME => without_token("name", value.as_bytes()).map(|()| value),
        0 => Err(Error::argument(
            "name",
            "a token needs a name",
            how_empty(given),
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

/// The scopes without duplicates, each of which the catalogue covers.
pub(crate) fn scopes(value: Option<TextArray<'_>>) -> Result<Vec<String>, Error> {
    const HINT: &str = "Define scopes with tollgate.define_scope(name, description); grant them as they are, by a wildcard such as \
                        posts:* that covers at least one, or all of them by admin.";
    let Some(array) = value else {
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
    let undefined = catalogue::uncovered(&scopes)?;
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

/// The scopes that were asked for, or all; `None` if one is not granted.
pub(crate) fn narrowed(granted: &[String], asked: Option<TextArray<'_>>) -> Option<Vec<String>> {
    let Some(asked) = asked else { return Some(granted.to_vec()) };
    // No token has more.
    if asked.len() > MAX_LIST {
        return None;
    }
    let mut scopes: Vec<String> = Vec::new();
    for one in asked.iter() {
        let one = one.filter(|one| scope::is_grantable(one))?;
        if !scope::any_grants(granted.iter().map(String::as_bytes), one) {
            return None;
        }
        let one = String::from_utf8_lossy(one);
        if !scopes.iter().any(|seen| *seen == one) {
            scopes.push(one.into_owned());
        }
    }
    Some(scopes)
}

/// Names offenders, only the first if there are many, and no part of a token that was passed by mistake.
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

/// When a token ends: after a time, at a moment, or like its parent or predecessor, if it has one.
#[derive(Clone, Copy)]
pub(crate) struct Ending {
    pub(crate) lifetime: Option<Interval>,
    pub(crate) moment: Option<TimestampWithTimeZone>,
}

impl Ending {
    /// The moment is not checked here: see [`end`].
    pub(crate) fn new(
        expires_in: Option<Interval>,
        expires_at: Option<TimestampWithTimeZone>,
    ) -> Result<Self, Error> {
        if expires_in.is_some() && expires_at.is_some() {
            return Err(Error::argument(
                "expires_at",
                "a token ends after a time or at a moment, not both",
                "which is given together with expires_in",
                "Leave one of them NULL.",
            ));
        }
        Ok(Ending { lifetime: lifetime(expires_in)?, moment: expires_at })
    }

    pub(crate) fn is_given(&self) -> bool {
        self.lifetime.is_some() || self.moment.is_some()
    }

    /// The argument that was given, for messages.
    pub(crate) fn argument(&self) -> &'static str {
        if self.moment.is_some() { "expires_at" } else { "expires_in" }
    }
}

/// A moment in the past, for a token that another system issued; `None` if not given.
pub(crate) fn past(
    argument: &str,
    value: Option<TimestampWithTimeZone>,
) -> Result<Option<TimestampWithTimeZone>, Error> {
    /// 1970, in microseconds since 2000.
    const FIRST: i64 = -946_684_800_000_000;
    match value.map(i64::from) {
        Some(at) if !(FIRST..=sys::GetCurrentTimestamp()).contains(&at) => Err(Error::argument(
            argument,
            "this must lie in the past, and after 1970",
            "which does not",
            "Give the moment as the other system has it, or leave it out if there was none.",
        )),
        _ => Ok(value),
    }
}

/// Positive and finite. An infinite interval (since PostgreSQL 17) compares as longer, or more negative, than any
/// other.
fn lifetime(value: Option<Interval>) -> Result<Option<Interval>, Error> {
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

pub(crate) fn grace(value: Option<Interval>) -> Result<Interval, Error> {
    match value {
        Some(value) if (0..=MAX_YEARS * YEAR).contains(&value.as_micros()) => Ok(value),
        _ => Err(Error::argument(
            "grace",
            format!("the grace of a rotation is from nothing to {MAX_YEARS} years"),
            "which is missing, negative or longer",
            "Give how long the old token keeps working next to the new one, such as 1 day; 0 ends it at once.",
        )),
    }
}

/// In the unit that the setting was most likely given in.
fn lifetime_text(seconds: i32) -> String {
    match seconds {
        s if s % 86_400 == 0 => format!("{} days", s / 86_400),
        s if s % 3600 == 0 => format!("{} hours", s / 3600),
        s => format!("{s} s"),
    }
}

fn not_positive() -> Error {
    Error::argument("expires_in", "the lifetime of a token must be positive", "which is not", LIFETIME_HINT)
}

/// The end of a token, in microseconds since 2000-01-01, just before it is stored. `argument` is the argument it came
/// from.
pub(crate) fn end(argument: &str, end: Option<i64>) -> Result<(), Error> {
    let remaining = end.map(|end| i128::from(end) - i128::from(sys::GetCurrentTimestamp()));
    match remaining {
        // Whether a mixed interval such as '-1 month 31 days' is positive depends on the calendar.
        Some(..=0) if argument == "expires_in" => return Err(not_positive()),
        Some(..=0) => {
            return Err(Error::argument(
                argument,
                "the expiry of a token must lie in the future",
                "which does not",
                "To end a token now, revoke it.",
            ));
        }
        _ => finite_end(argument, end)?,
    }
    let Some(longest) = guc::max_token_lifetime() else { return Ok(()) };
    let allowed =
        format!("The setting tollgate.max_token_lifetime allows {} from now", lifetime_text(longest));
    match remaining {
        Some(micros) if micros <= i128::from(longest) * SECOND => Ok(()),
        Some(_) => Err(Error::argument(
            argument,
            "the token would live longer than is allowed",
            "which is too far away",
            &format!("{allowed}: let it end sooner, and rotate it in time."),
        )),
        None => Err(Error::argument(
            argument,
            "the token would never expire, and that is not allowed",
            "which is not given",
            &format!("{allowed}: give it an expiry, and rotate it in time."),
        )),
    }
}

/// The rules for any end. Infinity is later than all other times.
pub(crate) fn finite_end(argument: &str, end: Option<i64>) -> Result<(), Error> {
    match end.map(|end| i128::from(end) - i128::from(sys::GetCurrentTimestamp())) {
        Some(micros) if micros > MAX_YEARS * YEAR => Err(Error::argument(
            argument,
            format!("the expiry of a token must be finite, and at most {MAX_YEARS} years from now"),
            "which is later",
            LIFETIME_HINT,
        )),
        _ => Ok(()),
    }
}

/// A jsonb value, and its content.
pub(crate) fn metadata(datum: Option<Datum>, value: Option<&[u8]>) -> Result<(), Error> {
    // The header of a jsonb container (jsonb.h): the flag of an object is in its fourth bit from the top.
    const JB_FOBJECT: u32 = 0x2000_0000;
    let header = value.and_then(|content| content.first_chunk().copied()).map(u32::from_ne_bytes);
    if header.is_some_and(|header| header & JB_FOBJECT != 0) {
        let bounds = Bounds { bytes: guc::max_metadata_size(), depth: MAX_DEPTH };
        return datum.map_or(Ok(()), |datum| json("metadata", datum, bounds, METADATA_HINT));
    }
    Err(Error::argument(
        "metadata",
        "the metadata of a token is a JSON object",
        "which is not an object",
        "Pass '{}' for none, or an object such as {\"plan\": \"pro\"}.",
    ))
}

/// Free JSON: it is stored, logged, and sent to the readers of events.
pub(crate) fn json(argument: &str, value: Datum, bounds: Bounds, hint: &str) -> Result<(), Error> {
    let mut token = Ok(());
    let size = datum::json_text_size(value, bounds, |text| {
        if token.is_ok() {
            token = without_token(argument, text);
        }
    });
    match size {
        Ok(_) => token,
        Err(Excess::Depth) => Err(Error::argument(
            argument,
            format!("the JSON of {argument} is nested at most {} levels deep", bounds.depth),
            "which is nested deeper",
            hint,
        )),
        Err(Excess::Bytes | Excess::Malformed) => Err(Error::argument(
            argument,
            format!("the JSON of {argument} has at most {} bytes as text", bounds.bytes),
            "which has more",
            hint,
        )),
    }
}

pub(crate) fn allowed_ips(value: Option<TextArray<'_>>) -> Result<(), Error> {
    let well_formed = value.is_none_or(|array| {
        array.dimensions() == 1
            && (1..=MAX_LIST).contains(&array.len())
            && array.iter().all(|network| network.and_then(datum::net).is_some())
    });
    if well_formed {
        return Ok(());
    }
    Err(Error::argument(
        "allowed_ips",
        format!("the networks of a token are a list of 1 to {MAX_LIST}, without NULLs"),
        "which is empty or too long, has a NULL, or has more than one dimension",
        "Leave it out for a token that may be used from anywhere.",
    ))
}

/// A number of verifications per window; without a limit the window is ignored.
pub(crate) fn limit(limit: Option<i32>, window: Option<Interval>) -> Result<(), Error> {
    let Some(limit) = limit else { return Ok(()) };
    if limit < 1 {
        return Err(Error::argument(
            "rate_limit",
            "a rate limit is a positive number",
            "which is not",
            "Leave it out for a token without a limit; to refuse a token altogether, disable it.",
        ));
    }
    if !window.is_some_and(|window| (1..=i128::from(LONGEST_WINDOW)).contains(&window.as_micros())) {
        return Err(Error::argument(
            "rate_window",
            "the window of a rate limit is positive and at most a day",
            "which is missing or out of that range",
            "Give the time in which so many uses are allowed, such as 1 minute. A longer budget is a quota, which belongs in a table of the application.",
        ));
    }
    Ok(())
}

pub(crate) fn prefix(value: Option<&str>) -> Result<Prefix, Error> {
    let Some(value) = value else { return Ok(guc::token_prefix()) };
    Prefix::parse(value).map_err(|error| {
        Error::argument(
            "prefix",
            error.to_string(),
            "",
            "Leave it out for the prefix that the setting tollgate.token_prefix names.",
        )
    })
}
