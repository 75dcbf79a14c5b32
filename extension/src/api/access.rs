//! `issue_access_token`, and what the SQL of access tokens calls.
#![allow(unsafe_code)]

use super::users;
use crate::access::issue::NewAccessToken;
use crate::access::{self, issue, verify};
use crate::error::{Error, OrRaise};
use crate::guc;
use crate::pg::datum;
use crate::pg::fmgr::{Call, sql_function};
use crate::pg::read_only::refuse_if_read_only;
use crate::store::composite;
use crate::store::relations::Composite;
use crate::store::statements::{Kept, with_plan};
use crate::tokens::fields;
use crate::verify::look_up::look_up_access_token;
use crate::verify::request::client;
use core::cell::Cell;
use pgrx::datum::{DatumWithOid, TimestampWithTimeZone};
use pgrx::pg_sys::{self, Datum};
use pgrx::{IntoDatum, JsonB, Uuid};
use serde_json::{Value, json};
use tollgate_core::ancestry::Ancestry;
use tollgate_core::status::Code;

thread_local! {
    static RECORD_PLAN: Kept = const { Cell::new(None) };
}

sql_function!(issue_access_token);
fn issue_access_token(call: &Call) -> Option<Datum> {
    let is_audited = guc::audit_issue();
    if is_audited {
        refuse_if_read_only(c"tollgate.issue_access_token()");
    }
    let user_id = fields::user_id(call.text(0)).or_raise();
    let scopes = fields::scopes(call.text_array(1)).or_raise();
    let audience = issue::audience(call.text_array(2)).or_raise();
    let lifetime = issue::lifetime(call.value(3)).or_raise();
    let own = issue::own_claims(call.datum(4)).or_raise();
    if users::lock_user(user_id).inactive {
        Error::inactive_user().raise();
    }
    let new = NewAccessToken {
        user_id,
        scopes: &scopes,
        audience: &audience,
        lifetime,
        own: &own,
        session: None,
        client_id: None,
        ancestry: &Ancestry::default(),
        act: None,
    };
    let issued = issue::issue(&new).or_raise();
    let expires_at = TimestampWithTimeZone::try_from(issued.expires_at).ok();
    if is_audited {
        let detail = json!({ "scopes": scopes, "audience": audience, "lifetime": lifetime });
        record(user_id, issued.jti, expires_at, detail).or_raise();
    }
    Some(composite::form(
        Composite::IssuedAccessToken,
        [
            Some(datum::text(&issued.token)),
            issued.jti.into_datum(),
            expires_at.into_datum(),
            Some(datum::text_array(scopes.iter().map(String::as_str))),
            Some(datum::text_array(audience.iter().map(String::as_str))),
        ],
    ))
}

/// Records that a token was issued.
pub(super) fn record(
    user_id: &str,
    jti: Uuid,
    expires_at: Option<TimestampWithTimeZone>,
    detail: Value,
) -> Result<(), Error> {
    // SAFETY: each datum is of the type given with it.
    let arguments = unsafe {
        [
            DatumWithOid::new(jti, pg_sys::UUIDOID),
            DatumWithOid::new(user_id, pg_sys::TEXTOID),
            DatumWithOid::new(JsonB(detail), pg_sys::JSONBOID),
            DatumWithOid::new(expires_at, pg_sys::TIMESTAMPTZOID),
        ]
    };
    let statement = "SELECT tollgate.record_issue($1, $2, $3 || jsonb_build_object('expires_at', $4))";
    with_plan(&RECORD_PLAN, statement, &arguments, |_| Ok(()))
}

sql_function!(presented_access_token);
fn presented_access_token(call: &Call) -> Option<Datum> {
    let verdict = look_up_access_token(call.text(0), client(call, 1));
    // A client that has failed too often does not learn whether this is a token.
    if verdict.code() == Code::RateLimited {
        verdict.raise()
    }
    let row = composite::form(Composite::Verification, verdict.columns());
    verdict.close();
    Some(row)
}

sql_function!(denial_of);
fn denial_of(call: &Call) -> Option<Datum> {
    verify::denial_of(call.text(0)?)?.to_vec().into_datum()
}

sql_function!(usage_id_of_user);
fn usage_id_of_user(call: &Call) -> Option<Datum> {
    verify::uuid_datum(access::usage_id(call.text(0)?))
}
