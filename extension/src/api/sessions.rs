//! `open_session`, `refresh_session`, and what the SQL of sessions calls.

use super::users;
use crate::access::issue;
use crate::error::{Error, OrRaise};
use crate::pg::datum;
use crate::pg::fmgr::{Call, sql_function};
use crate::pg::read_only::refuse_if_read_only;
use crate::services::consumes;
use crate::sessions::Tokens;
use crate::sessions::open::{self, NewSession, duration};
use crate::sessions::refresh::{self, Request};
use crate::shmem::{self, SessionEvent};
use crate::store::composite;
use crate::store::fresh_snapshot::check_sessions_ended as check_ended;
use crate::store::relations::Composite;
use crate::tokens::fields;
use crate::verify::request::client;
use pgrx::datum::TimestampWithTimeZone;
use pgrx::pg_sys::Datum;
use pgrx::{IntoDatum, Uuid};

sql_function!(open_session);
fn open_session(call: &Call) -> Option<Datum> {
    refuse_if_read_only(c"tollgate.open_session()");
    let user_id = fields::user_id(call.text(0)).or_raise();
    let scopes = fields::scopes(call.text_array(1)).or_raise();
    let audience = issue::audience(call.text_array(2)).or_raise();
    let client_id = open::client_id(call.text(3)).or_raise();
    let lifetime = duration("lifetime", call.value(4)).or_raise();
    let idle = duration("idle", call.value(5)).or_raise();
    let label = open::label(call.text(6)).or_raise();
    let own = issue::own_claims(call.datum(8)).or_raise();
    if users::lock_user(user_id).inactive {
        Error::inactive_user().raise();
    }
    let (session, tokens) = open::open(NewSession {
        user_id,
        scopes,
        audience,
        client_id,
        lifetime,
        idle,
        label,
        client_ip: call.datum(7),
        claims: call.datum(8),
        claims_text: &format!("{{{own}}}"),
    })
    .or_raise();
    shmem::count_session(SessionEvent::Opened);
    let [access_token, access_expires_at, refresh_token, expires_at, scopes, audience] =
        columns(Some(tokens));
    Some(composite::form(
        Composite::IssuedSession,
        [session.into_datum(), access_token, access_expires_at, refresh_token, expires_at, scopes, audience],
    ))
}

sql_function!(refresh_session);
fn refresh_session(call: &Call) -> Option<Datum> {
    refuse_if_read_only(c"tollgate.refresh_session()");
    consumes::check("tollgate.refresh_session()").or_raise();
    let outcome = refresh::refresh(&Request {
        token: call.text(0),
        client_id: call.text(1),
        scopes: call.text_array(2),
        client: client(call, 3),
        client_ip: call.datum(3),
    })
    .or_raise();
    let [access_token, access_expires_at, refresh_token, expires_at, scopes, audience] =
        columns(outcome.tokens);
    Some(composite::form(
        Composite::RefreshedSession,
        [
            outcome.code.as_str().into_datum(),
            outcome.session.into_datum(),
            access_token,
            access_expires_at,
            refresh_token,
            expires_at,
            scopes,
            audience,
        ],
    ))
}

/// The columns that both rows have.
fn columns(tokens: Option<Tokens>) -> [Option<Datum>; 6] {
    let time = |micros: i64| TimestampWithTimeZone::try_from(micros).ok().into_datum();
    let Some(tokens) = tokens else { return [None; 6] };
    [
        Some(datum::text(&tokens.access.token)),
        time(tokens.access.expires_at),
        Some(datum::text(&tokens.refresh)),
        time(tokens.expires_at),
        Some(datum::text_array(tokens.scopes.iter().map(String::as_str))),
        Some(datum::text_array(tokens.audience.iter().map(String::as_str))),
    ]
}

sql_function!(is_refresh_token);
fn is_refresh_token(call: &Call) -> Option<Datum> {
    call.bytes(0).is_some_and(|text| tollgate_core::refresh::parse(text).is_some()).into_datum()
}

sql_function!(presented_session_id);
fn presented_session_id(call: &Call) -> Option<Datum> {
    let session: Option<Uuid> = refresh::session_of(call.text(0), client(call, 1)).or_raise();
    session.into_datum()
}

sql_function!(check_sessions_ended);
fn check_sessions_ended(call: &Call) -> Option<Datum> {
    check_ended(call.datum(0), call.datum(1)).or_raise();
    Some(Datum::null())
}
