//! `create_api_token` draws the secret, stores its digest, and returns the plaintext once. `import_api_token` stores
//! the digest of a token that another system issued.

#![allow(unsafe_code)]

use super::users;
use crate::error::{Error, OrRaise};
use crate::pg::fmgr::{Call, sql_function};
use crate::pg::read_only::refuse_if_read_only;
use crate::pg::sys;
use crate::store::composite;
use crate::store::relations::Composite;
use crate::tokens::fields::Ending;
use crate::tokens::issue::{ImportedToken, NewToken, Stored};
use crate::tokens::{fields, issue, max_per_user};
use pgrx::datum::TimestampWithTimeZone;
use pgrx::pg_sys::Datum;
use pgrx::{IntoDatum, Uuid};
use tollgate_core::foreign::Format;
use tollgate_core::token::{self, Digest, ENTROPY_LEN, Issued, Prefix};
use zeroize::Zeroizing;

/// The hint of a token of which only the digest is known.
const IMPORTED_HINT: &str = "imported";

sql_function!(create_api_token);
fn create_api_token(call: &Call) -> Option<Datum> {
    refuse_if_read_only(c"tollgate.create_api_token()");
    let user_id = fields::user_id(call.text(0)).or_raise();
    if users::lock_user(user_id).inactive {
        Error::inactive_user().raise();
    }
    max_per_user::lock(user_id).or_raise();
    let name = fields::name(call.text(1)).or_raise();
    let scopes = fields::scopes(call.text_array(2)).or_raise();
    let ending = Ending::new(call.value(3), call.value(9)).or_raise();
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
        ending,
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
    let user_state = users::lock_user(user_id);
    max_per_user::lock(user_id).or_raise();
    let name = fields::name(call.text(1)).or_raise();
    let format = foreign_format(call.text(9)).or_raise();
    let given = call.bytes(2).filter(|bytes| bytes.len() == format.digest_len());
    let given = given.ok_or_else(|| not_a_digest(&format)).or_raise();
    if let Some(key) = format.import_key() {
        issue::lock_import_key(key).or_raise();
    }
    let foreign_hash = (format != Format::Sha256).then(|| format.key(given));
    // Until the digest is known, a random number that is the digest of nothing.
    let digest: Digest = match given.try_into() {
        Ok(digest) if foreign_hash.is_none() => digest,
        _ => unknown_digest().or_raise(),
    };
    let scopes = fields::scopes(call.text_array(3)).or_raise();
    let ending = Ending::new(call.value(4), call.value(10)).or_raise();
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
        ending,
        metadata: call.datum(5),
        allowed_ips: call.datum(6),
        rate_limit: call.value(7),
        rate_window: call.value(8),
        parent: None,
    };
    store_imported(&ImportedToken {
        token: &token,
        format: &format,
        foreign_hash,
        created_at: fields::past("created_at", call.value(11)).or_raise(),
        last_used_at: fields::past("last_used_at", call.value(12)).or_raise(),
        disabled_at: fields::past("disabled_at", call.value(13)).or_raise(),
        revoked_at: fields::past("revoked_at", call.value(14)).or_raise(),
    })
    .or_raise();
    if user_state.inactive {
        users::apply_user_state(user_id);
    }
    token.id.into_datum()
}

/// Stores a token of another system. One that is already revoked or expired does not count towards its user's maximum,
/// and may have had any lifetime.
fn store_imported(imported: &ImportedToken<'_>) -> Result<(), Error> {
    let ImportedToken { token, revoked_at, .. } = imported;
    let is_past = |end: TimestampWithTimeZone| i64::from(end) <= sys::GetCurrentTimestamp();
    let has_expired = token.ending.moment.is_some_and(is_past);
    if has_expired {
        fields::past("expires_at", token.ending.moment)?;
    }
    let is_live = !has_expired && revoked_at.is_none();
    if is_live {
        max_per_user::claim(token.user_id)?;
    }
    let stored = issue::import(imported)?.ok_or_else(Error::duplicate_digest)?;
    if is_live {
        fields::end(token.ending.argument(), stored.expires_at.map(i64::from))?;
        warn_of_likely_mistakes(Some(token.name), stored.expires_at);
    } else if !has_expired {
        fields::finite_end(token.ending.argument(), stored.expires_at.map(i64::from))?;
    }
    Ok(())
}

fn foreign_format(name: Option<&str>) -> Result<Format, Error> {
    let name = name.unwrap_or_default();
    Format::parse(name).ok_or_else(|| {
        Error::argument(
            "format",
            "tokens in this form cannot be imported",
            "which is NULL or not one of sha256, sha512, sha512-of-hex, sanctum and hmac-sha256:KEY",
            "With a salt, as of bcrypt, PBKDF2, argon2, Gitea and GitLab, a token cannot be found by its digest. Let the \
             application check those as before, and import each by sha256() of the token when it is next presented.",
        )
    })
}

fn not_a_digest(format: &Format) -> Error {
    Error::argument(
        "token_hash",
        format!(
            "a token is imported by a digest of its plaintext, {} bytes in this format",
            format.digest_len()
        ),
        "which is NULL or of another length",
        "Pass the digest as bytea, such as decode(hex_digest, 'hex'); never the token itself.",
    )
}

fn unknown_digest() -> Result<Digest, Error> {
    Ok(token::digest(entropy()?.as_slice()))
}

pub(super) fn draw(prefix: &Prefix) -> Result<Issued, Error> {
    Ok(token::issue(prefix, &*entropy()?))
}

pub(super) fn new_id() -> Uuid {
    Uuid::from_bytes(*uuid::Uuid::now_v7().as_bytes())
}

/// Stores a token, after checking that its user may have one more and that its end, which depends on the calendar, is
/// allowed.
pub(super) fn store(token: &NewToken<'_>) -> Result<Stored, Error> {
    max_per_user::claim(token.user_id)?;
    let stored = issue::insert(token)?.ok_or_else(Error::duplicate_digest)?;
    fields::end(token.ending.argument(), stored.expires_at.map(i64::from))?;
    warn_of_likely_mistakes(Some(token.name), stored.expires_at);
    Ok(stored)
}

/// Warns of two likely mistakes: an interval without a unit, which is in seconds, so that '90' ends after a minute and
/// a half (a token for one job may well live for five minutes); and scopes given as the name because the user was left
/// out.
pub(super) fn warn_of_likely_mistakes(name: Option<&str>, expires_at: Option<TimestampWithTimeZone>) {
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

/// Bytes from the operating system's random number generator.
fn entropy() -> Result<Zeroizing<[u8; ENTROPY_LEN]>, Error> {
    let mut bytes = Zeroizing::new([0; ENTROPY_LEN]);
    getrandom::fill(bytes.as_mut_slice()).map_err(|error| {
        Error::internal(format!("the operating system returned no random bytes: {error}"))
    })?;
    Ok(bytes)
}
