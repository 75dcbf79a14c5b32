//! Signing. Nothing is stored.

use crate::access::EPOCHS;
use crate::error::Error;
use crate::keys;
use crate::pg::datum::{self, TextArray};
use crate::pg::sys;
use crate::tokens::fields;
use pgrx::datum::{Interval, TimestampWithTimeZone};
use pgrx::pg_sys::Datum;
use tollgate_core::jsonb::Bounds;
use tollgate_core::net::Net;
use tollgate_core::url::{self, Fault, Options, Unfit};

const SECOND: i64 = 1_000_000;
const DEFAULT_LIFETIME: i64 = 3600 * SECOND;
/// In microseconds. A key verifies for a day longer after it was replaced (`chain_keys`).
const LONGEST: i64 = 366 * 86_400 * SECOND;
const MAX_KEY_NAME: usize = 63;
/// More than any set of methods has.
const MAX_METHODS: usize = 100;

const URL_HINT: &str =
    "Pass it as a browser would request it, such as https://media.example.com/videos/7/index.m3u8?hd=1.";
const HEADERS_HINT: &str = "Pass an object such as {\"Content-Disposition\": \"attachment\"}.";

/// The arguments of `sign_url`.
pub(crate) struct Arguments<'a> {
    pub(crate) url: Option<&'a str>,
    pub(crate) expires_in: Option<Interval>,
    pub(crate) expires_at: Option<TimestampWithTimeZone>,
    pub(crate) methods: Option<TextArray<'a>>,
    pub(crate) path_prefix: Option<&'a str>,
    pub(crate) network: Option<Net>,
    pub(crate) is_for_one_use: bool,
    pub(crate) subject: Option<&'a str>,
    pub(crate) not_before: Option<TimestampWithTimeZone>,
    /// A jsonb value.
    pub(crate) response_headers: Option<Datum>,
    pub(crate) key: Option<&'a str>,
}

pub(crate) fn sign(given: &Arguments<'_>) -> Result<String, Error> {
    let url = url_of(given.url)?;
    let expires_at = end(given.expires_in, given.expires_at)?;
    // A second that is not over has not begun.
    let not_before = given.not_before.map(|start| -(-since_1970(i64::from(start))).div_euclid(SECOND));
    if not_before.is_some_and(|start| start >= expires_at) {
        return Err(refused(Unfit::Times));
    }
    let methods = methods(given.methods)?;
    for (name, value) in [("path_prefix", given.path_prefix), ("subject", given.subject)] {
        fields::without_token(name, value.unwrap_or_default().as_bytes())?;
    }
    let response_headers = given.response_headers.map(headers).transpose()?;
    let name = key_name(given.key)?;
    let options = Options {
        expires_at,
        not_before,
        methods: &methods.iter().map(String::as_str).collect::<Vec<_>>(),
        path_prefix: given.path_prefix,
        network: given.network,
        once: given.is_for_one_use.then(random).transpose()?,
        subject: given.subject,
        response_headers: response_headers.as_deref(),
    };
    let key = keys::url_key(name)?.ok_or_else(|| Error::no_url_key(name))?;
    url::sign(&key.key, url, &options).map_err(refused)
}

fn url_of(given: Option<&str>) -> Result<&str, Error> {
    let Some(url) = given else {
        return Err(Error::argument("url", "a URL must be given", "which is NULL", URL_HINT));
    };
    fields::without_token("url", url.as_bytes())?;
    Ok(url)
}

fn since_1970(time: i64) -> i64 {
    time.saturating_add(EPOCHS)
}

/// In seconds since 1970, rounded down.
fn end(expires_in: Option<Interval>, expires_at: Option<TimestampWithTimeZone>) -> Result<i64, Error> {
    let now = sys::GetCurrentTimestamp();
    let (argument, remaining) = match (expires_in, expires_at) {
        (Some(_), Some(_)) => {
            return Err(Error::argument(
                "expires_at",
                "a signed URL ends after a time or at a moment, not both",
                "which is given together with expires_in",
                "Leave one of them NULL.",
            ));
        }
        (None, None) => ("expires_in", i128::from(DEFAULT_LIFETIME)),
        (Some(time), None) => ("expires_in", time.as_micros()),
        (None, Some(moment)) => ("expires_at", i128::from(i64::from(moment)) - i128::from(now)),
    };
    match i64::try_from(remaining) {
        Ok(remaining) if (SECOND..=LONGEST).contains(&remaining) => {
            Ok((since_1970(now) + remaining).div_euclid(SECOND))
        }
        _ => Err(Error::argument(
            argument,
            "a signed URL lives for a second to 366 days",
            "which is less or more",
            "Sign another one when it is asked for again; who holds it can pass it on.",
        )),
    }
}

fn methods(given: Option<TextArray<'_>>) -> Result<Vec<String>, Error> {
    let given = given
        .filter(|given| given.dimensions() <= 1 && given.len() <= MAX_METHODS && !given.has_nulls())
        .ok_or_else(|| refused(Unfit::Methods))?;
    given
        .present()
        .map(|method| {
            fields::without_token("methods", method)?;
            Ok(String::from_utf8_lossy(method).into_owned())
        })
        .collect()
}

/// As JSON.
fn headers(given: Datum) -> Result<String, Error> {
    const BOUNDS: Bounds = Bounds { bytes: url::MAX_HEADERS_LEN, depth: 2 };
    fields::json("response_headers", given, BOUNDS, HEADERS_HINT)?;
    Ok(datum::json_text(given))
}

fn key_name(given: Option<&str>) -> Result<&str, Error> {
    let name = given.unwrap_or_default();
    fields::without_token("key", name.as_bytes())?;
    let is_of_name = |b: u8| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'_' | b'.' | b'-');
    if (1..=MAX_KEY_NAME).contains(&name.len()) && name.bytes().all(is_of_name) {
        return Ok(name);
    }
    Err(Error::argument(
        "key",
        "a key for URLs is named by 1 to 63 characters, of a-z, 0-9, \"_\", \".\" and \"-\"",
        "which is NULL, has others or another length",
        "Pass the name that create_url_key() was called with, or leave it out for the key named default.",
    ))
}

fn random() -> Result<[u8; 16], Error> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes)
        .map_err(|error| Error::internal(format!("the operating system gave no random bytes: {error}")))?;
    Ok(bytes)
}

fn refused(unfit: Unfit) -> Error {
    let argument = Error::argument;
    match unfit {
        Unfit::Url(fault) => argument("url", "this URL cannot be signed", offence(fault), URL_HINT),
        Unfit::Signed => argument(
            "url",
            "this URL is signed already",
            "with a parameter whose name begins with tgu_",
            "Sign it without those parameters.",
        ),
        Unfit::Times => argument(
            "not_before",
            "a signed URL begins before it ends",
            "which is not before the end, or before 1970",
            "Leave it out for one that is valid at once.",
        ),
        Unfit::Methods => argument(
            "methods",
            "the methods of a signed URL are 1 to 9, each of 1 to 16 capital letters",
            "which is NULL, empty or too long, has a NULL, or has others",
            "Leave it out for GET and HEAD.",
        ),
        Unfit::Prefix => argument(
            "path_prefix",
            "a path prefix ends with a slash, and the path of the URL begins with it",
            "which does not, or is followed by what has escapes or semicolons",
            "Give the folder that the URL is in, such as /videos/7/.",
        ),
        Unfit::Subject => argument(
            "subject",
            "a subject has 1 to 255 characters",
            "which is empty or longer",
            "Pass the key of the user that the URL is for, or leave it out.",
        ),
        Unfit::Headers => argument(
            "response_headers",
            "pinned headers are an object of 1 to 16 header names, each with a text of visible ASCII characters and spaces",
            "which is another one",
            HEADERS_HINT,
        ),
    }
}

fn offence(fault: Fault) -> &'static str {
    match fault {
        Fault::Size => "which is longer than 8192 bytes with its signature",
        Fault::Character => {
            "which has a space, a backslash, a control character, or one that is not ASCII: those need an escape such as %20"
        }
        Fault::Fragment => "which has a fragment, and no server receives those",
        Fault::Scheme => "which does not begin with https:// or http://",
        Fault::Host => "which has a user, no host, or a host or port that is not written as in DNS",
        Fault::Escape => "which has a % without two hexadecimal digits, or %00",
        Fault::DotSegment => "whose path has a segment . or .., which servers resolve differently",
        Fault::Parameter => "which has parameters that begin with tgu_",
    }
}
