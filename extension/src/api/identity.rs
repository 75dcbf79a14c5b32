//! Functions that read the identity set by `authenticate`, for use in policies: they look nothing up, and allocate
//! nothing to answer yes or no.

use crate::access::verify::jsonb;
use crate::error::Error;
use crate::identity;
use crate::identity::Identity;
use crate::pg::fmgr::{Call, sql_function};
use pgrx::pg_sys::Datum;
use pgrx::{IntoDatum, Uuid};
use tollgate_core::scope;

fn grants(context: &Identity, required: &[u8]) -> bool {
    scope::any_grants(context.scopes.iter().map(String::as_bytes), required)
}

sql_function!(context_has_scope);
fn context_has_scope(call: &Call) -> Option<Datum> {
    let granted = call.bytes(0).and_then(|required| identity::read(|context| grants(context, required)));
    granted.unwrap_or(false).into_datum()
}

sql_function!(context_has_any_scope);
fn context_has_any_scope(call: &Call) -> Option<Datum> {
    let granted = call
        .text_array(0)
        .and_then(|required| identity::read(|context| required.present().any(|one| grants(context, one))));
    granted.unwrap_or(false).into_datum()
}

sql_function!(context_has_all_scopes);
fn context_has_all_scopes(call: &Call) -> Option<Datum> {
    let granted = call.text_array(0).filter(|required| required.len() > 0).and_then(|required| {
        identity::read(|context| required.iter().all(|one| one.is_some_and(|one| grants(context, one))))
    });
    granted.unwrap_or(false).into_datum()
}

sql_function!(require_scope);
fn require_scope(call: &Call) -> Option<Datum> {
    let required = call.text(0).unwrap_or_default();
    let granted = identity::read(|context| grants(context, required.as_bytes()));
    if granted != Some(true) {
        Error::missing_scope(required, granted.is_some()).raise();
    }
    Some(Datum::null())
}

sql_function!(current_token_id);
fn current_token_id(_call: &Call) -> Option<Datum> {
    identity::read(|context| Uuid::from_bytes(context.token_id).into_datum()).flatten()
}

sql_function!(current_user_id);
fn current_user_id(_call: &Call) -> Option<Datum> {
    identity::read(|context| context.user_id.as_str().into_datum()).flatten()
}

sql_function!(current_claims);
fn current_claims(_call: &Call) -> Option<Datum> {
    identity::read(|context| context.signed.as_ref().and_then(|signed| jsonb(&signed.claims))).flatten()
}

sql_function!(current_actor);
fn current_actor(_call: &Call) -> Option<Datum> {
    identity::read(|context| context.signed.as_ref().and_then(|signed| jsonb(signed.actor.as_deref()?)))
        .flatten()
}

sql_function!(current_issuer);
fn current_issuer(_call: &Call) -> Option<Datum> {
    identity::read(|context| context.signed.as_ref().and_then(|signed| signed.issuer.as_str().into_datum()))
        .flatten()
}

sql_function!(current_session_id);
fn current_session_id(_call: &Call) -> Option<Datum> {
    identity::read(|context| {
        let session = context.signed.as_ref().and_then(|signed| signed.session);
        session.and_then(|session| Uuid::from_bytes(session).into_datum())
    })
    .flatten()
}

sql_function!(current_scopes);
fn current_scopes(_call: &Call) -> Option<Datum> {
    identity::read(|context| context.scopes.clone().into_datum()).flatten()
}
