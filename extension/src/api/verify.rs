//! `verify_api_token` and the other functions that take a presented token.
#![allow(unsafe_code)]

use crate::error::Error;
use crate::pg::datum::{self, TextArray};
use crate::pg::fmgr::{Call, sql_function};
use crate::pg::row_set::RowSet;
use crate::shmem::Timer;
use crate::store::composite;
use crate::store::relations::Composite;
use crate::verify::presented::{Presented, Required};
use crate::verify::refusal::Refusal;
use crate::verify::request::{Credential, Function, Purpose, Request, client};
use crate::verify::verdict::{Item, Verdict};
use pgrx::pg_sys::{self, Datum};
use pgrx::{IntoDatum, direct_function_call_as_datum};
use std::ffi::CString;
use tollgate_core::net::{Net, client_of};
use tollgate_core::status::Code;

sql_function!(verify_api_token);
fn verify_api_token(call: &Call) -> Option<Datum> {
    Some(as_composite(Function::VerifyApiToken, call))
}

sql_function!(verify_api_token_hash);
fn verify_api_token_hash(call: &Call) -> Option<Datum> {
    Some(as_composite(Function::VerifyApiTokenHash, call))
}

sql_function!(authenticate);
fn authenticate(call: &Call) -> Option<Datum> {
    Some(as_composite(Function::Authenticate, call))
}

sql_function!(verify_access_token);
fn verify_access_token(call: &Call) -> Option<Datum> {
    Some(as_composite(Function::VerifyAccessToken, call))
}

/// The most credentials that are verified by one call.
const MAX_ITEMS: usize = 1000;

sql_function!(verify_tokens);
fn verify_tokens(call: &Call) -> Option<Datum> {
    let rows = RowSet::of(call, Verdict::COLUMNS);
    let tokens = call.text_array(0).unwrap_or_else(TextArray::empty);
    if tokens.len() > MAX_ITEMS {
        let detail = format!("{} of at most {MAX_ITEMS}", tokens.len());
        Error::argument(
            "tokens",
            "too many tokens are to be verified at once",
            &detail,
            "Verify them in several calls.",
        )
        .raise();
    }
    let same_length = |n, name| {
        let array = call.text_array(n);
        if array.is_some_and(|array| array.len() != tokens.len()) {
            Error::argument(
                name,
                "each token needs an entry of its own",
                "which has another length than tokens",
                "Give as many as there are tokens, NULL for a token without, or NULL for all.",
            )
            .raise();
        }
        array
    };
    let scopes = same_length(1, "required_scopes");
    let clients = same_length(2, "client_ips");
    let audiences = same_length(3, "audiences");
    let mut scopes = scopes.map(|array| array.iter());
    let mut clients = clients.map(|array| array.iter());
    let mut audiences = audiences.map(|array| array.iter());
    let text = |bytes| core::str::from_utf8(bytes).expect("text in a UTF-8 database");
    for token in tokens.iter() {
        pg_sys::check_for_interrupts!();
        let verdict = Verdict::of_item(&Item {
            token: token.map(text),
            scopes: scopes.as_mut().and_then(Iterator::next).flatten(),
            client: clients.as_mut().and_then(Iterator::next).flatten().and_then(datum::net),
            audience: audiences.as_mut().and_then(Iterator::next).flatten().map(text),
        });
        rows.push(verdict.columns());
        verdict.close();
    }
    Some(Datum::null())
}

sql_function!(presented_token_has_scope);
fn presented_token_has_scope(call: &Call) -> Option<Datum> {
    let timer = Timer::start();
    let request = Request {
        timer,
        presented: Credential::ApiToken(Presented::to_verify(call.bytes(0))),
        required: Required::One(call.bytes(1)),
        client: client(call, 2),
        purpose: Purpose::Check,
    };
    let verdict = Verdict::decide(&request);
    let granted = verdict.code() == Code::Valid;
    verdict.close();
    granted.into_datum()
}

sql_function!(last_refusal);
fn last_refusal(_call: &Call) -> Option<Datum> {
    let json = CString::new(Refusal::last()?.to_json()).expect("JSON escapes NUL");
    // SAFETY: the input function of jsonb takes a C string and returns a value of that type.
    unsafe { direct_function_call_as_datum(pg_sys::jsonb_in, &[Some(Datum::from(json.as_ptr()))]) }
}

sql_function!(client_ip_from);
fn client_ip_from(call: &Call) -> Option<Datum> {
    let trusted: Vec<Net> =
        call.text_array(1).map_or_else(Vec::new, |all| all.present().filter_map(datum::net).collect());
    let is_trusted = |hop: &Net| trusted.iter().any(|network| network.contains(hop));
    pgrx::Inet(client_of(call.text(0)?, is_trusted)?.to_string()).into_datum()
}

fn as_composite(function: Function, call: &Call) -> Datum {
    let verdict = Verdict::of_call(function, call);
    let row = composite::form(Composite::Verification, verdict.columns());
    verdict.close();
    row
}
