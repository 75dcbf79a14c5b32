//! Issuing: the claims, as JSON, and the signature. Nothing is stored.
#![allow(unsafe_code)]

use super::{EPOCHS, MARK, TYPE, revocations};
use crate::error::Error;
use crate::pg::datum::{self, TextArray};
use crate::pg::sys;
use crate::tokens::fields;
use crate::{guc, keys};
use core::ffi::CStr;
use pgrx::Uuid;
use pgrx::datum::Interval;
use pgrx::pg_sys::{self, Datum};
use tollgate_core::ancestry::Ancestry;
use tollgate_core::json::{self, quote};
use tollgate_core::jsonb::Bounds;
use tollgate_core::jws::{self, SignError};

/// What a token has at most, so that the whole stays far below the size that a verifier reads.
const MAX_CLAIMS: Bounds = Bounds { bytes: 4096, depth: 30 };
pub(crate) const MAX_AUDIENCES: usize = 16;

/// Names of claims that have a meaning for us or for other readers of our tokens (RFC 7519 section 4.1, RFC 8693, RFC
/// 7800, RFC 9068), and so are not the caller's.
const RESERVED: [&str; 16] = [
    "iss",
    "sub",
    "aud",
    "exp",
    "nbf",
    "iat",
    "jti",
    "scope",
    "client_id",
    "sid",
    "act",
    "may_act",
    "cnf",
    "root",
    "from",
    MARK,
];

pub(crate) struct NewAccessToken<'a> {
    pub(crate) user_id: &'a str,
    pub(crate) scopes: &'a [String],
    pub(crate) audience: &'a [String],
    /// In seconds.
    pub(crate) lifetime: i64,
    /// The members of the caller's object, as JSON: `"a":1,"b":[]`.
    pub(crate) own: &'a str,
    /// The session that it belongs to.
    pub(crate) session: Option<Uuid>,
    /// The client of the session, or the service account; without one it is the role that asks for the token.
    pub(crate) client_id: Option<&'a str>,
    /// What it came of, and ends with.
    pub(crate) ancestry: &'a Ancestry,
    /// The claim `act`, as JSON.
    pub(crate) act: Option<&'a str>,
}

pub(crate) struct IssuedAccessToken {
    pub(crate) token: String,
    pub(crate) jti: Uuid,
    /// Microseconds since 2000-01-01.
    pub(crate) expires_at: i64,
}

/// The audiences that were given, or else that of the setting.
pub(crate) fn audience(given: Option<TextArray<'_>>) -> Result<Vec<String>, Error> {
    const HINT: &str = "Name the service that the token is for, or let a superuser set tollgate.audience.";
    let Some(given) = given else {
        return guc::audience().map(|audience| vec![audience.to_owned()]).ok_or_else(|| {
            Error::argument(
                "audience",
                "an access token needs an audience",
                "which is NULL, while tollgate.audience is not set",
                HINT,
            )
        });
    };
    let refuse = |offence: &str| {
        Error::argument(
            "audience",
            format!("an access token is for 1 to {MAX_AUDIENCES} audiences"),
            offence,
            HINT,
        )
    };
    if given.dimensions() != 1 || given.has_nulls() || !(1..=MAX_AUDIENCES).contains(&given.len()) {
        return Err(refuse("which is empty or too long, has a NULL, or has more than one dimension"));
    }
    given
        .present()
        .map(|one| {
            fields::without_token("audience", one)?;
            let one = String::from_utf8_lossy(one);
            if guc::is_identifier(&one) {
                Ok(one.into_owned())
            } else {
                Err(refuse("with one that is no URL or other name of 1 to 255 visible ASCII characters"))
            }
        })
        .collect()
}

/// In seconds; rounded down, as the claims are.
pub(crate) fn lifetime(given: Option<Interval>) -> Result<i64, Error> {
    const SECOND: i128 = 1_000_000;
    let Some(given) = given else { return Ok(guc::access_token_lifetime()) };
    let longest = guc::max_access_token_lifetime();
    let seconds = given.as_micros() / SECOND;
    match i64::try_from(seconds) {
        Ok(seconds) if (1..=longest).contains(&seconds) => Ok(seconds),
        _ => Err(Error::argument(
            "lifetime",
            format!("an access token lives for 1 to {longest} seconds"),
            "which is shorter or longer",
            "A superuser may set tollgate.max_access_token_lifetime. For longer access, issue another token when one ends.",
        )),
    }
}

/// The caller's claims, as the members of an object; empty for none.
pub(crate) fn own_claims(given: Option<Datum>) -> Result<String, Error> {
    const HINT: &str =
        "Pass an object such as {\"plan\": \"pro\"}; what a token always has comes from the other arguments.";
    let refuse = |message: &str, offence: &str| Error::argument("claims", message, offence, HINT);
    let Some(given) = given else {
        return Err(refuse("claims are a JSON object", "which is NULL"));
    };
    fields::json("claims", given, MAX_CLAIMS, "Keep it in a table, and its key in the token.")?;
    let text = datum::json_text(given);
    let Ok(members) = json::parse_object(&text) else {
        return Err(refuse(
            "claims are a JSON object",
            "which is not an object, or has a number that other readers cannot read",
        ));
    };
    if let Some(name) = RESERVED.into_iter().find(|name| members.contains_key(*name)) {
        return Err(refuse(
            "claims may not replace those that a token always has",
            &format!("with the claim {name}"),
        ));
    }
    Ok(members_of(&text).to_owned())
}

/// What is between the braces of an object.
pub(crate) fn members_of(object: &str) -> &str {
    object.strip_prefix('{').and_then(|rest| rest.strip_suffix('}')).unwrap_or_default()
}

pub(crate) fn issue(new: &NewAccessToken<'_>) -> Result<IssuedAccessToken, Error> {
    // The mark as it is now: one that is revoked meanwhile is refused.
    issue_within(new, revocations::mark_of(new.user_id), None)
}

/// For a token that comes of something that was judged before. With the mark that the user had then it is refused if the
/// user was revoked since; and it is over by the end, in microseconds since 2000-01-01.
pub(crate) fn issue_within(
    new: &NewAccessToken<'_>,
    mark: Option<i64>,
    end: Option<i64>,
) -> Result<IssuedAccessToken, Error> {
    let issuer = guc::issuer().ok_or_else(Error::no_issuer)?.to_owned();
    let jti = uuid::Uuid::now_v7();
    let issued_at = (sys::GetCurrentTimestamp() + EPOCHS).div_euclid(1_000_000);
    let latest = end.map_or(i64::MAX, |end| end.saturating_add(EPOCHS).div_euclid(1_000_000));
    let end = latest.min(issued_at + new.lifetime);

    let audience = match new.audience {
        [one] => quote(one),
        several => format!("[{}]", several.iter().map(|one| quote(one)).collect::<Vec<_>>().join(",")),
    };
    let mut claims = format!(
        r#"{{"iss":{},"sub":{},"aud":{audience},"exp":{end},"nbf":{issued_at},"iat":{issued_at},"jti":"{jti}","client_id":{},"scope":{}"#,
        quote(&issuer),
        quote(new.user_id),
        new.client_id.map_or_else(|| quote(&acting_role()), quote),
        quote(&new.scopes.join(" ")),
    );
    if let Some(session) = new.session {
        claims.push_str(&format!(r#","sid":"{}""#, uuid::Uuid::from_bytes(*session.as_bytes())));
    }
    if let Some(mark) = mark {
        claims.push_str(&format!(r#","{MARK}":{mark}"#));
    }
    if let Some(act) = new.act {
        claims.push_str(&format!(r#","act":{act}"#));
    }
    if !new.own.is_empty() {
        claims.push(',');
        claims.push_str(new.own);
    }

    let signed = keys::sign_with(keys::Purpose::AccessToken, None, |kid, key| {
        claims.push_str(&new.ancestry.members(kid));
        claims.push('}');
        jws::sign(key, kid, TYPE, &claims)
    })?;
    let token = signed.map_err(|error| match error {
        SignError::Refused(jws::Fault::Size) => Error::argument(
            "scopes",
            format!("an access token has at most {} bytes", jws::MAX_LEN),
            "which together with the claims has more",
            "Grant a wildcard such as posts:* instead of each scope that it covers.",
        ),
        error => Error::internal(format!("could not sign an access token: {error}")),
    })?;
    Ok(IssuedAccessToken {
        token,
        jti: Uuid::from_bytes(*jti.as_bytes()),
        expires_at: end * 1_000_000 - EPOCHS,
    })
}

/// The client of the token (RFC 9068 section 2.2): the role of the application that asked for it.
fn acting_role() -> String {
    // SAFETY: the outer user exists while it acts; the name is a palloc'ed C string.
    let name = unsafe { CStr::from_ptr(pg_sys::GetUserNameFromId(pg_sys::GetOuterUserId(), false)) };
    name.to_string_lossy().into_owned()
}
