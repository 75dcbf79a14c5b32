//! Opening: the row, the first refresh token and the first access token.
#![allow(unsafe_code)]

use super::{SessionsToken, Tokens};
use crate::access::revocations;
use crate::error::Error;
use crate::pg::sys;
use crate::store::statements::{Kept, with_plan};
use crate::tokens::fields;
use crate::{guc, keys};
use core::cell::Cell;
use pgrx::datum::{DatumWithOid, Interval, TimestampWithTimeZone};
use pgrx::pg_sys::{self, Datum};
use pgrx::{Spi, Uuid};
use std::rc::Rc;
use tollgate_core::refresh::{Key, SECRET_LEN, Subject};
use zeroize::Zeroizing;

const SECOND: i128 = 1_000_000;
/// Longest life of a session, in microseconds. The key of its tokens is kept for a day longer after it stopped making new ones
/// (`chain_keys`).
const LONGEST: i128 = 366 * 86_400 * SECOND;
const MAX_CLIENT_ID: usize = 255;
const MAX_LABEL: usize = 100;

const INSERT: &str = "
    WITH opened AS (
        INSERT INTO tollgate.sessions AS s (id, user_id, user_mark, kid, secret, generation, refreshed_at, idle, expires_at, last_address,
                                            client_id, scopes, audience, claims, label, created_at, opened_from)
        -- An interval without days, which are not equally long everywhere.
        VALUES ($1, $2, $3, $4, $5, 1, $6, $7 * interval '1 microsecond', $8, $9, $10, $11, $12, $13, $14, $6, $9)
        RETURNING s.*
    )
    INSERT INTO tollgate.audit_log (event, token_id, user_id, detail)
        SELECT 'session.opened', o.id, o.user_id, jsonb_strip_nulls(jsonb_build_object(
                   'client_id', o.client_id, 'label', o.label, 'scopes', o.scopes, 'audience', o.audience,
                   'expires_at', o.expires_at, 'idle', o.idle, 'client_ip', o.opened_from))
        FROM opened o";

thread_local! {
    static INSERT_PLAN: Kept = const { Cell::new(None) };
}

pub(crate) struct NewSession<'a> {
    pub(crate) user_id: &'a str,
    pub(crate) scopes: Vec<String>,
    pub(crate) audience: Vec<String>,
    pub(crate) client_id: Option<&'a str>,
    /// In microseconds, as the idle time.
    pub(crate) lifetime: i64,
    pub(crate) idle: i64,
    pub(crate) label: Option<&'a str>,
    /// An inet.
    pub(crate) client_ip: Option<Datum>,
    /// A jsonb object.
    pub(crate) claims: Option<Datum>,
    /// The same, as JSON.
    pub(crate) claims_text: &'a str,
}

/// How long a session lives or may be idle, in microseconds.
pub(crate) fn duration(argument: &'static str, given: Option<Interval>) -> Result<i64, Error> {
    let micros = given.map_or(0, |given| given.as_micros());
    match i64::try_from(micros) {
        Ok(micros) if (SECOND..=LONGEST).contains(&i128::from(micros)) => Ok(micros),
        _ => Err(Error::argument(
            argument,
            "a session lives, and may be idle, for a second to 366 days",
            "which is NULL, shorter or longer",
            "Have the user log in again after that time.",
        )),
    }
}

pub(crate) fn client_id(given: Option<&str>) -> Result<Option<&str>, Error> {
    let Some(value) = given else { return Ok(None) };
    fields::without_token("client_id", value.as_bytes())?;
    let visible = |b: u8| b.is_ascii_graphic() || b == b' ';
    if (1..=MAX_CLIENT_ID).contains(&value.len()) && value.bytes().all(visible) {
        Ok(Some(value))
    } else {
        Err(Error::argument(
            "client_id",
            "a client id has 1 to 255 visible ASCII characters",
            "which has others, or another length",
            "Pass the id under which the client is registered, or leave it out if there is only one.",
        ))
    }
}

pub(crate) fn label(given: Option<&str>) -> Result<Option<&str>, Error> {
    let Some(value) = given else { return Ok(None) };
    fields::without_token("label", value.as_bytes())?;
    match value.chars().count() {
        ..=MAX_LABEL => Ok(Some(value)),
        length => Err(Error::argument(
            "label",
            format!("the label of a session has at most {MAX_LABEL} characters"),
            &format!("of {length} characters"),
            "Say what its user recognises it by, such as the browser and the system.",
        )),
    }
}

pub(crate) fn open(new: NewSession<'_>) -> Result<(Uuid, Tokens), Error> {
    let issuer = guc::issuer().ok_or_else(Error::no_issuer)?.to_owned();
    let (kid, key) = key()?;
    // As it is now: if it changes before this is committed, the session is over.
    let mark = revocations::mark_of(new.user_id);
    let id = *uuid::Uuid::now_v7().as_bytes();
    let secret = secret()?;
    let now = sys::GetCurrentTimestamp();
    let expires_at = now + new.lifetime;
    let session = Uuid::from_bytes(id);
    let access = SessionsToken {
        session,
        user_id: new.user_id,
        mark,
        client_id: new.client_id,
        scopes: &new.scopes,
        audience: &new.audience,
        claims: new.claims_text,
        end: expires_at.min(now + new.idle),
    }
    .issue(now)?;
    let time = |micros: i64| TimestampWithTimeZone::try_from(micros).ok();
    // SAFETY: each datum is of the type given with it, and lives as long as the call that it came from.
    let arguments = unsafe {
        [
            DatumWithOid::new(session, pg_sys::UUIDOID),
            DatumWithOid::new(new.user_id, pg_sys::TEXTOID),
            DatumWithOid::new(mark, pg_sys::INT8OID),
            DatumWithOid::new(kid, pg_sys::TEXTOID),
            DatumWithOid::new(secret.as_slice(), pg_sys::BYTEAOID),
            DatumWithOid::new(time(now), pg_sys::TIMESTAMPTZOID),
            DatumWithOid::new(new.idle, pg_sys::INT8OID),
            DatumWithOid::new(time(expires_at), pg_sys::TIMESTAMPTZOID),
            DatumWithOid::new(new.client_ip, pg_sys::INETOID),
            DatumWithOid::new(new.client_id, pg_sys::TEXTOID),
            DatumWithOid::new(new.scopes.clone(), pg_sys::TEXTARRAYOID),
            DatumWithOid::new(new.audience.clone(), pg_sys::TEXTARRAYOID),
            DatumWithOid::new(new.claims, pg_sys::JSONBOID),
            DatumWithOid::new(new.label, pg_sys::TEXTOID),
        ]
    };
    with_plan(&INSERT_PLAN, INSERT, &arguments, |_| Ok(()))?;
    let refresh = key.issue(&Subject { issuer: &issuer, session: &id, secret: &secret }, 1);
    Ok((session, Tokens { access, refresh, expires_at, scopes: new.scopes, audience: new.audience }))
}

/// The key of new sessions, which the first one creates.
fn key() -> Result<(String, Rc<Key>), Error> {
    if let Some(found) = keys::refresh_key()? {
        return Ok(found);
    }
    Spi::run("SELECT tollgate.create_refresh_key()")
        .map_err(|error| Error::internal(format!("could not create the key of refresh tokens: {error}")))?;
    keys::refresh_key()?.ok_or_else(|| Error::internal("the key of refresh tokens was not created"))
}

fn secret() -> Result<Zeroizing<[u8; SECRET_LEN]>, Error> {
    let mut secret = Zeroizing::new([0; SECRET_LEN]);
    getrandom::fill(secret.as_mut_slice())
        .map_err(|error| Error::internal(format!("the operating system gave no random bytes: {error}")))?;
    Ok(secret)
}
