//! `sign_url`, `verify_signed_url`, and what the SQL of keys for URLs calls.

use crate::access::verify::jsonb;
use crate::error::OrRaise;
use crate::keys;
use crate::pg::datum;
use crate::pg::fmgr::{Call, sql_function};
use crate::store::composite;
use crate::store::relations::Composite;
use crate::urls::{sign, verify};
use crate::verify::request::client;
use pgrx::IntoDatum;
use pgrx::datum::TimestampWithTimeZone;
use pgrx::pg_sys::Datum;
use tollgate_core::url::Code;

sql_function!(sign_url);
fn sign_url(call: &Call) -> Option<Datum> {
    let signed = sign::sign(&sign::Arguments {
        url: call.text(0),
        expires_in: call.value(1),
        expires_at: call.value(2),
        methods: call.text_array(3),
        path_prefix: call.text(4),
        network: call.bytes(5).and_then(datum::net),
        is_for_one_use: call.value(6).unwrap_or_default(),
        subject: call.text(7),
        not_before: call.value(8),
        response_headers: call.datum(9),
        key: call.text(10),
    });
    signed.or_raise().into_datum()
}

sql_function!(verify_signed_url);
fn verify_signed_url(call: &Call) -> Option<Datum> {
    let judged = verify::verify(call.text(0), call.text(1), client(call, 2)).or_raise();
    let is_valid = judged.code == Code::Valid;
    let signed = judged.signed.as_ref();
    let headers = signed.filter(|_| is_valid).and_then(|signed| signed.url.response_headers.as_deref());
    Some(composite::form(
        Composite::UrlVerification,
        [
            is_valid.into_datum(),
            judged.code.as_str().into_datum(),
            judged.reason.into_datum(),
            signed.and_then(|signed| signed.url.subject.as_deref()).into_datum(),
            signed.map(|signed| signed.key_name.as_str()).into_datum(),
            signed.map(|signed| signed.url.key_id.as_str()).into_datum(),
            signed.and_then(|signed| TimestampWithTimeZone::try_from(signed.expires_at).ok()).into_datum(),
            signed.map(|signed| signed.url.once.is_some()).into_datum(),
            headers.and_then(jsonb),
        ],
    ))
}

sql_function!(url_key_text);
fn url_key_text(call: &Call) -> Option<Datum> {
    let key = keys::url_key_of(call.text(0)?).or_raise()?;
    key.key.to_text().as_str().into_datum()
}
