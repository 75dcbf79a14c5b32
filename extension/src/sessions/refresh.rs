//! Refreshing: a presented token is looked up and judged, and then the row is changed, if nothing else has changed it
//! meanwhile.
//!
//! No lock is held while it is judged. Each change names the generation that the decision was made for, so that of
//! several requests with one token the first one refreshes, and the others, once it is committed, find that it did, and
//! are judged again.
#![allow(unsafe_code)]

use super::{SessionsToken, Tokens};
use crate::access::revocations;
use crate::error::Error;
use crate::pg::datum::TextArray;
use crate::pg::sys;
use crate::shmem::{self, SessionEvent};
use crate::store::fresh_snapshot::transaction_keeps_its_snapshot;
use crate::store::sessions::{self, Session};
use crate::store::statements::{Kept, by_index_alone, with_plan};
use crate::tokens::fields;
use crate::verify::limits;
use crate::verify::log;
use crate::verify::presented::Required;
use crate::verify::refusal::Refusal;
use crate::{guc, keys};
use core::cell::Cell;
use pgrx::datum::{DatumWithOid, TimestampWithTimeZone};
use pgrx::pg_sys::{self, Datum};
use pgrx::{JsonB, Uuid};
use serde_json::{Value, json};
use std::rc::Rc;
use tollgate_core::net::Net;
use tollgate_core::refresh::{self, Code, Decision, Key, Presented, RefreshToken, Subject};
use tollgate_core::status;
use tollgate_core::token;

pub(crate) struct Request<'a> {
    pub(crate) token: Option<&'a str>,
    pub(crate) client_id: Option<&'a str>,
    pub(crate) scopes: Option<TextArray<'a>>,
    pub(crate) client: Option<Net>,
    /// The same, as an inet.
    pub(crate) client_ip: Option<Datum>,
}

pub(crate) struct Outcome {
    pub(crate) code: Code,
    /// `None` unless the token is one of the session's.
    pub(crate) session: Option<Uuid>,
    /// With [`Code::Valid`].
    pub(crate) tokens: Option<Tokens>,
}

/// A session, and its token with the right MAC.
struct Found {
    session: Session,
    key: Rc<Key>,
}

const ADVANCE: &str = "
    UPDATE tollgate.sessions s SET generation = $3, refreshed_at = $4, last_address = $5
        WHERE s.id = $1 AND s.generation = $2 AND s.revoked_at IS NULL";

thread_local! {
    static ADVANCE_PLAN: Kept = const { Cell::new(None) };
    static END_PLAN: Kept = const { Cell::new(None) };
    static MISMATCH_PLAN: Kept = const { Cell::new(None) };
    static ELSEWHERE_PLAN: Kept = const { Cell::new(None) };
    static NOTE_PLAN: Kept = const { Cell::new(None) };
    static EPOCH_PLAN: Kept = const { Cell::new(None) };
    static KNOWN_PLAN: Kept = const { Cell::new(None) };
    static TIMELINE_IS_KNOWN: Cell<bool> = const { Cell::new(false) };
    static TIMELINE_PLAN: Kept = const { Cell::new(None) };
}

pub(crate) fn refresh(request: &Request<'_>) -> Result<Outcome, Error> {
    if limits::blocked(request.client).is_some() {
        return Ok(concluded(Code::RateLimited, None, request));
    }
    let Some(presented) = request.token.and_then(|token| refresh::parse(token.as_bytes())) else {
        return Ok(concluded(Code::Malformed, None, request));
    };
    let id = Uuid::from_bytes(presented.session);
    loop {
        let found = match find(&presented)? {
            Ok(found) => found,
            Err(code) => {
                let session = (code == Code::Revoked).then_some(id);
                return Ok(concluded(code, session, request));
            }
        };
        if let Some((code, tokens)) = attempt(id, &found, &presented, request)? {
            let session = (code != Code::NotFound).then_some(id);
            return Ok(Outcome { tokens, ..concluded(code, session, request) });
        }
        // Another request has changed the row. A transaction that keeps its snapshot would never see that.
        if transaction_keeps_its_snapshot() {
            return Err(Error::old_snapshot());
        }
    }
}

/// The session of a token that is to be ended, of whatever generation; `None` if it is none of ours. A client that has
/// failed too often does not learn whether it is.
pub(crate) fn session_of(token: Option<&str>, client: Option<Net>) -> Result<Option<Uuid>, Error> {
    let limited = |quota: limits::Quota| {
        let retry_after = Some(quota.charge.retry_after);
        Error::refused(&Refusal { retry_after, ..Refusal::new(status::Code::RateLimited) })
    };
    if let Some(quota) = limits::blocked(client) {
        return Err(limited(quota));
    }
    if let Some(presented) = token.and_then(|token| refresh::parse(token.as_bytes()))
        && find(&presented)?.is_ok()
    {
        return Ok(Some(Uuid::from_bytes(presented.session)));
    }
    match limits::charge_failure(client, sys::GetCurrentTimestamp()) {
        Some(quota) => Err(limited(quota)),
        None => Ok(None),
    }
}

/// What a session is to the token that would refresh it now.
pub(crate) struct Refreshable {
    pub(crate) id: Uuid,
    pub(crate) session: Session,
    /// When it is over unless it is refreshed, in microseconds since 2000-01-01.
    pub(crate) end: i64,
}

/// The session that a token would refresh now, which changes nothing; `None` for any other token, which is a failed attempt.
pub(crate) fn refreshable(token: &str, client: Option<Net>) -> Result<Option<Refreshable>, Error> {
    if limits::blocked(client).is_some() {
        return Ok(None);
    }
    let presented = refresh::parse(token.as_bytes());
    let found = presented.map(|presented| find(&presented)).transpose()?.and_then(Result::ok);
    if let (Some(presented), Some(Found { session, .. })) = (presented, found) {
        let state = state_of(&session, revocations::mark_of(&session.user_id));
        let as_presented = Presented {
            generation: presented.generation,
            by_other_client: false,
            from_elsewhere: session.last_address != client,
        };
        // Whether a failover set it back is found out when it is refreshed.
        let decision = refresh::decide(&state, &as_presented, &grace(), sys::GetCurrentTimestamp(), || false);
        if matches!(decision, Decision::Refresh | Decision::Retry) {
            let id = Uuid::from_bytes(presented.session);
            return Ok(Some(Refreshable { id, end: state.end(), session }));
        }
    }
    limits::charge_failure(client, sys::GetCurrentTimestamp());
    Ok(None)
}

/// `mark` is what the user has now.
fn state_of(session: &Session, mark: Option<i64>) -> refresh::Session {
    refresh::Session {
        generation: session.generation,
        refreshed_at: session.refreshed_at,
        idle: session.idle,
        expires_at: session.expires_at,
        is_revoked: session.is_revoked || mark.is_some_and(|mark| session.mark != Some(mark)),
    }
}

fn grace() -> refresh::Grace {
    refresh::Grace { length: guc::refresh_grace(), same_address: guc::refresh_grace_same_address() }
}

/// Looks for the session of a token, and checks its MAC.
fn find(presented: &RefreshToken) -> Result<Result<Found, Code>, Error> {
    let issuer = guc::issuer().ok_or_else(Error::no_issuer)?;
    let Some(session) = sessions::session(&presented.session) else { return Ok(Err(Code::NotFound)) };
    let Some(key) = keys::refresh_key_of(&session.kid)? else {
        // What it made cannot be distinguished from a guess any more, and the session is over.
        return Ok(Err(Code::Revoked));
    };
    let subject = Subject { issuer, session: &presented.session, secret: &session.secret };
    let is_ours = key.made(&subject, presented);
    Ok(if is_ours { Ok(Found { session, key }) } else { Err(Code::NotFound) })
}

/// Judges a token, and does what was decided; `None` if the row has changed since it was read.
fn attempt(
    id: Uuid,
    found: &Found,
    token: &RefreshToken,
    request: &Request<'_>,
) -> Result<Option<(Code, Option<Tokens>)>, Error> {
    let Found { session, key } = found;
    let mark = revocations::mark_of(&session.user_id);
    let state = state_of(session, mark);
    let bound_to = session.client_id.as_deref();
    let presented = Presented {
        generation: token.generation,
        by_other_client: bound_to.is_some() && bound_to != request.client_id,
        from_elsewhere: session.last_address != request.client,
    };
    // Read after the row, so that an end that passed meanwhile counts.
    let mut now = sys::GetCurrentTimestamp();
    let mut timeline = Ok(0);
    let decision = refresh::decide(&state, &presented, &grace(), now, || {
        timeline = timeline_began();
        timeline.as_ref().is_ok_and(|&began| session.refreshed_at < began)
    });
    timeline?;
    match decision {
        Decision::OtherClient => {
            note_mismatch(id, request)?;
            return Ok(Some((Code::NotFound, None)));
        }
        Decision::Revoked => return Ok(Some((Code::Revoked, None))),
        Decision::Expired => return Ok(Some((Code::Expired, None))),
        Decision::Reuse => {
            let is_ended = end(id, session.generation, token.generation, request)?;
            return Ok(is_ended.then_some((Code::Reused, None)));
        }
        Decision::Refresh | Decision::Retry | Decision::Recover => {}
    }
    let Some(scopes) = fields::narrowed(&session.scopes, request.scopes) else {
        return Ok(Some((Code::InsufficientScope, None)));
    };
    let next = decision.next(&state, &presented);
    if decision != Decision::Retry && begin_timeline()? {
        now = sys::GetCurrentTimestamp();
    }
    let mut refreshed = state;
    if decision == Decision::Retry {
        if presented.from_elsewhere {
            note_elsewhere(id, session.generation, request)?;
        }
    } else {
        if !advance(id, session.generation, next, now, request)? {
            return Ok(None);
        }
        refreshed.refreshed_at = now;
        note_changes(id, session, &presented, decision, request)?;
    }
    let access = SessionsToken {
        session: id,
        user_id: &session.user_id,
        mark,
        client_id: bound_to,
        scopes: &scopes,
        audience: &session.audience,
        claims: &session.claims,
        end: refreshed.end(),
    }
    .issue(now)?;
    let issuer = guc::issuer().ok_or_else(Error::no_issuer)?;
    let subject = Subject { issuer, session: &token.session, secret: &session.secret };
    let tokens = Tokens {
        access,
        refresh: key.issue(&subject, next),
        expires_at: session.expires_at,
        scopes,
        audience: session.audience.clone(),
    };
    shmem::count_session(if decision == Decision::Retry {
        SessionEvent::Retried
    } else {
        SessionEvent::Refreshed
    });
    Ok(Some((Code::Valid, Some(tokens))))
}

/// Counts and logs an outcome, and charges a failed attempt to the client.
fn concluded(code: Code, session: Option<Uuid>, request: &Request<'_>) -> Outcome {
    let exceeded = code.is_failed_attempt()
        && limits::charge_failure(request.client, sys::GetCurrentTimestamp()).is_some();
    // What a token did to its session is said in any case: it is not a guess.
    let (code, session) =
        if exceeded && code != Code::Reused { (Code::RateLimited, None) } else { (code, session) };
    match code {
        Code::Valid => {}
        Code::Reused => shmem::count_session(SessionEvent::Reused),
        _ => shmem::count_session(SessionEvent::Refused),
    }
    if let Some(code) = code.of_verification().filter(|&code| code != status::Code::Valid) {
        let id = session.map(|id| *id.as_bytes());
        log::verification(code, id.as_ref(), request.client.as_ref(), &Required::Nothing, None);
    }
    Outcome { code, session, tokens: None }
}

/// The next generation. False if the row has changed since it was read.
fn advance(id: Uuid, from: i64, to: i64, now: i64, request: &Request<'_>) -> Result<bool, Error> {
    // SAFETY: each datum is of the type given with it, and lives as long as the call that it came from.
    let arguments = unsafe {
        [
            DatumWithOid::new(id, pg_sys::UUIDOID),
            DatumWithOid::new(from, pg_sys::INT8OID),
            DatumWithOid::new(to, pg_sys::INT8OID),
            DatumWithOid::new(TimestampWithTimeZone::try_from(now).ok(), pg_sys::TIMESTAMPTZOID),
            DatumWithOid::new(request.client_ip, pg_sys::INETOID),
        ]
    };
    by_index_alone(|| with_plan(&ADVANCE_PLAN, ADVANCE, &arguments, |rows| Ok(!rows.is_empty())))
}

/// Ends a session of which another token than the latest one was presented. False if the row has changed since it was
/// read.
fn end(id: Uuid, generation: i64, presented: i64, request: &Request<'_>) -> Result<bool, Error> {
    // SAFETY: as above.
    let arguments = unsafe {
        [
            DatumWithOid::new(id, pg_sys::UUIDOID),
            DatumWithOid::new(generation, pg_sys::INT8OID),
            DatumWithOid::new(presented, pg_sys::INT8OID),
            DatumWithOid::new(request.client_ip, pg_sys::INETOID),
        ]
    };
    let statement = "SELECT tollgate.end_reused_session($1, $2, $3, $4)";
    with_plan(&END_PLAN, statement, &arguments, |rows| Ok(rows.get::<bool>(1)?.unwrap_or_default()))
}

fn note_mismatch(id: Uuid, request: &Request<'_>) -> Result<(), Error> {
    // What an application takes from a request may be anything.
    let client_id = request.client_id.map(|given| {
        let shown: String = token::redact(given).chars().take(255).collect();
        shown
    });
    // SAFETY: as above.
    let arguments = unsafe {
        [
            DatumWithOid::new(id, pg_sys::UUIDOID),
            DatumWithOid::new(client_id, pg_sys::TEXTOID),
            DatumWithOid::new(request.client_ip, pg_sys::INETOID),
        ]
    };
    with_plan(&MISMATCH_PLAN, "SELECT tollgate.note_client_mismatch($1, $2, $3)", &arguments, |_| Ok(()))
}

fn note_elsewhere(id: Uuid, generation: i64, request: &Request<'_>) -> Result<(), Error> {
    // SAFETY: as above.
    let arguments = unsafe {
        [
            DatumWithOid::new(id, pg_sys::UUIDOID),
            DatumWithOid::new(generation, pg_sys::INT8OID),
            DatumWithOid::new(request.client_ip, pg_sys::INETOID),
        ]
    };
    with_plan(&ELSEWHERE_PLAN, "SELECT tollgate.note_retry_elsewhere($1, $2, $3)", &arguments, |_| Ok(()))
}

/// The events of a refresh: it follows a failover, or comes from another address than before. Any other leaves none.
fn note_changes(
    id: Uuid,
    session: &Session,
    presented: &Presented,
    decision: Decision,
    request: &Request<'_>,
) -> Result<(), Error> {
    let address = |net: Option<Net>| net.map_or(Value::Null, |net| net.to_string().into());
    if decision == Decision::Recover {
        let detail = json!({
            "generation": presented.generation,
            "latest": session.generation,
            "client_ip": address(request.client),
        });
        note("session.recovered", id, &session.user_id, detail)?;
    }
    // An address that is not known is no other one.
    if presented.from_elsewhere && session.last_address.is_some() && request.client.is_some() {
        let detail =
            json!({ "client_ip": address(request.client), "last_address": address(session.last_address) });
        note("session.address_changed", id, &session.user_id, detail)?;
    }
    Ok(())
}

fn note(event: &str, id: Uuid, user_id: &str, detail: Value) -> Result<(), Error> {
    // SAFETY: as above.
    let arguments = unsafe {
        [
            DatumWithOid::new(event, pg_sys::TEXTOID),
            DatumWithOid::new(id, pg_sys::UUIDOID),
            DatumWithOid::new(user_id, pg_sys::TEXTOID),
            DatumWithOid::new(JsonB(detail), pg_sys::JSONBOID),
        ]
    };
    with_plan(&NOTE_PLAN, "SELECT tollgate.note_session($1, $2, $3, $4)", &arguments, |_| Ok(()))
}

/// Registers the present timeline before anything is refreshed on it, so that what was refreshed since is not taken for
/// what was refreshed before. True unless it was known.
pub(crate) fn begin_timeline() -> Result<bool, Error> {
    // A server writes one timeline until it ends.
    if TIMELINE_IS_KNOWN.get() {
        return Ok(false);
    }
    let is_known = with_plan(&KNOWN_PLAN, "SELECT tollgate.timeline_is_known()", &[], |rows| {
        Ok(rows.get::<bool>(1)?.unwrap_or_default())
    })?;
    if is_known {
        TIMELINE_IS_KNOWN.set(true);
    } else {
        with_plan(&EPOCH_PLAN, "SELECT tollgate.current_epoch()", &[], |_| Ok(()))?;
    }
    Ok(!is_known)
}

/// When this server began to write its present timeline, in microseconds since 2000-01-01.
fn timeline_began() -> Result<i64, Error> {
    with_plan(&TIMELINE_PLAN, "SELECT tollgate.timeline_began()", &[], |rows| {
        Ok(rows.get::<TimestampWithTimeZone>(1)?.map_or(i64::MIN, i64::from))
    })
}
