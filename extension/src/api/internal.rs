//! Functions that the schema's SQL calls, so that each rule is written once.

use crate::error::{Error, OrRaise};
use crate::pg::datum;
use crate::pg::fmgr::{Call, sql_function};
use crate::store::{as_role, fresh_snapshot};
use crate::tokens::{fields, max_per_user};
use crate::verify::look_up::look_up_to_end;
use crate::verify::request::client;
use pgrx::datum::TimestampWithTimeZone;
use pgrx::pg_sys::Datum;
use pgrx::{IntoDatum, Uuid};
use tollgate_core::jsonb::Bounds;
use tollgate_core::status::Code;

/// Deepest JSON that is measured: each level is a nested call.
const DEEPEST: usize = 1000;

sql_function!(presented_token_id);
fn presented_token_id(call: &Call) -> Option<Datum> {
    match look_up_to_end(call.bytes(0), client(call, 1)) {
        Ok((_, id, _)) => Uuid::from_bytes(id).into_datum(),
        // A client that has failed too often does not learn whether this is a token.
        Err(refusal) if refusal.code == Code::RateLimited => Error::refused(&refusal).raise(),
        Err(_) => None,
    }
}

// Checks the fields of a token that the first argument names. Returns the scopes without duplicates.
sql_function!(check_token_fields);
fn check_token_fields(call: &Call) -> Option<Datum> {
    let named = |field: &str| {
        call.text_array(0).is_some_and(|keys| keys.present().any(|key| key == field.as_bytes()))
    };
    if named("name") {
        fields::name(call.text(1)).or_raise();
    }
    if named("expires_at") {
        fields::end("expires_at", call.value::<TimestampWithTimeZone>(3).map(i64::from)).or_raise();
    }
    if named("metadata") {
        fields::metadata(call.datum(4), call.bytes(4)).or_raise();
    }
    if named("allowed_ips") {
        fields::allowed_ips(call.text_array(5)).or_raise();
    }
    if named("rate_limit") || named("rate_window") {
        fields::limit(call.value(6), call.value(7)).or_raise();
    }
    if named("scopes") {
        return fields::scopes(call.text_array(2)).or_raise().into_datum();
    }
    call.datum(2)
}

sql_function!(without_token);
fn without_token(call: &Call) -> Option<Datum> {
    fields::without_token(call.text(0).unwrap_or_default(), call.bytes(1)?).or_raise();
    call.datum(1)
}

fn bounds(call: &Call, first: usize) -> Bounds {
    let bound = |n| call.value::<i32>(n).and_then(|bound| usize::try_from(bound).ok()).unwrap_or_default();
    Bounds { bytes: bound(first), depth: bound(first + 1).min(DEEPEST) }
}

sql_function!(json_text_size);
fn json_text_size(call: &Call) -> Option<Datum> {
    let size = datum::json_text_size(call.datum(0)?, bounds(call, 1), |_| ()).ok()?;
    i32::try_from(size).ok()?.into_datum()
}

sql_function!(check_json);
fn check_json(call: &Call) -> Option<Datum> {
    let argument = call.text(0).unwrap_or_default();
    fields::json(argument, call.datum(1)?, bounds(call, 2), "Pass less of it.").or_raise();
    Some(Datum::null())
}

sql_function!(check_snapshot);
fn check_snapshot(call: &Call) -> Option<Datum> {
    fresh_snapshot::check_snapshot(call.datum(0), call.datum(1)).or_raise();
    Some(Datum::null())
}

sql_function!(lock_token_slots);
fn lock_token_slots(call: &Call) -> Option<Datum> {
    max_per_user::lock(call.text(0)?).or_raise();
    Some(Datum::null())
}

sql_function!(claim_token_slot);
fn claim_token_slot(call: &Call) -> Option<Datum> {
    max_per_user::claim(call.text(0)?).or_raise();
    Some(Datum::null())
}

sql_function!(network_contains);
fn network_contains(call: &Call) -> Option<Datum> {
    let (outer, inner) = (datum::net(call.bytes(0)?)?, datum::net(call.bytes(1)?)?);
    outer.contains(&inner).into_datum()
}

sql_function!(query_as);
fn query_as(call: &Call) -> Option<Datum> {
    let query = match call.text_array(2).map(|keys| keys.len()) {
        Some(1) => as_role::query_of_one,
        _ => as_role::query,
    };
    query(call.value(0)?, call.text(1)?, call.datum(2)).or_raise().into_datum()
}
