//! What the SQL of trusted issuers calls: the rules for their fields, reading a key set, and when a token by an unknown key
//! was presented.

use crate::access::{issuer_fields as fields, key_set};
use crate::error::OrRaise;
use crate::pg::fmgr::{Call, sql_function};
use crate::shmem;
use crate::tokens::fields as token_fields;
use pgrx::IntoDatum;
use pgrx::datum::TimestampWithTimeZone;
use pgrx::pg_sys::Datum;
use pgrx::prelude::*;

sql_function!(check_issuer_fields);
fn check_issuer_fields(call: &Call) -> Option<Datum> {
    fields::issuer(call.text(0)).or_raise();
    fields::user_prefix(call.text(1)).or_raise();
    fields::audience(call.text_array(2)).or_raise();
    fields::user_claim(call.text(4)).or_raise();
    fields::scope_claims(call.text_array(5)).or_raise();
    fields::algorithms(call.text_array(6)).or_raise();
    fields::types(call.text_array(7)).or_raise();
    fields::required_claims(call.datum(8)).or_raise();
    fields::max_lifetime(call.value(9)).or_raise();
    // Last, since it locks the catalogue of scopes.
    token_fields::scopes(call.text_array(3)).or_raise();
    Some(Datum::null())
}

#[pg_extern(sql = false)]
#[allow(clippy::type_complexity)]
fn read_jwks(
    jwks: &str,
    algorithms: Vec<String>,
) -> TableIterator<
    'static,
    (
        name!(kid, Option<String>),
        name!(algorithm, Option<&'static str>),
        name!(jwk, Option<String>),
        name!(problem, Option<String>),
    ),
> {
    TableIterator::new(key_set::read(jwks, &algorithms).into_iter().map(|key| match key {
        Ok(key) => (Some(key.kid), Some(key.algorithm), Some(key.jwk), None),
        Err(problem) => (None, None, None, Some(problem)),
    }))
}

sql_function!(unknown_key_at);
fn unknown_key_at(call: &Call) -> Option<Datum> {
    let at = shmem::unknown_key_at(call.text(0)?)?;
    TimestampWithTimeZone::try_from(at).ok().into_datum()
}
