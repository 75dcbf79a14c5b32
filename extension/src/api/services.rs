//! `client_credentials`, the secrets of service accounts, and what their SQL calls.

use super::access::record;
use super::issue::{draw, issued_token, new_id, store};
use crate::access::issuer_fields;
use crate::access::verify::jsonb;
use crate::error::{Error, OrRaise};
use crate::guc;
use crate::pg::fmgr::{Call, sql_function};
use crate::pg::read_only::refuse_if_read_only;
use crate::services::credentials::client_credentials as issue_for;
use crate::services::request::{Code, Credential, Request};
use crate::services::{consumes, fields};
use crate::store::composite;
use crate::store::relations::Composite;
use crate::tokens::fields as token_fields;
use crate::tokens::fields::Ending;
use crate::tokens::issue::NewToken;
use crate::tokens::max_per_user;
use crate::verify::request::client;
use pgrx::IntoDatum;
use pgrx::datum::TimestampWithTimeZone;
use pgrx::pg_sys::Datum;
use pgrx::spi::Spi;
use serde_json::json;
use tollgate_core::service;

const SECRET_NAME: &str = "secret";

sql_function!(client_credentials);
fn client_credentials(call: &Call) -> Option<Datum> {
    const FUNCTION: &str = "tollgate.client_credentials()";
    if guc::audit_issue() {
        refuse_if_read_only(c"tollgate.client_credentials()");
    }
    let client_id = call.text(0).ok_or_else(no_client).or_raise();
    let credential = match (call.bytes(1), call.text(2)) {
        (Some(secret), None) => Credential::Secret(secret),
        (None, Some(assertion)) => {
            consumes::check(FUNCTION).or_raise();
            Credential::Assertion(assertion)
        }
        (secret, _) => Err(not_one(secret.is_some())).or_raise(),
    };
    let request = Request {
        client_id,
        credential,
        scopes: call.text_array(3),
        audience: call.text_array(4),
        client: client(call, 5),
        client_ip: call.datum(5),
    };
    let row = match issue_for(&request).or_raise() {
        Err(code) => [code.as_str().into_datum(), None, None, None, None, None],
        Ok(issued) => {
            let expires_at = TimestampWithTimeZone::try_from(issued.token.expires_at).ok();
            if guc::audit_issue() {
                let detail =
                    json!({ "scopes": issued.scopes, "audience": issued.audience, "client_id": client_id });
                record(&issued.user_id, issued.token.jti, expires_at, detail).or_raise();
            }
            [
                Code::Valid.as_str().into_datum(),
                issued.token.token.into_datum(),
                issued.token.jti.into_datum(),
                expires_at.into_datum(),
                issued.scopes.into_datum(),
                issued.audience.into_datum(),
            ]
        }
    };
    Some(composite::form(Composite::ClientCredentialsToken, row))
}

fn no_client() -> Error {
    Error::argument(
        "client_id",
        "a client must be named",
        "which is NULL",
        "Pass the id of the service account, as the request has it.",
    )
}

fn not_one(both: bool) -> Error {
    Error::argument(
        "assertion",
        "a client proves who it is in one way",
        if both { "which is given together with secret" } else { "which is NULL, like secret" },
        "Pass its secret or its assertion (client_assertion), and leave the other NULL.",
    )
}

sql_function!(create_service_account_secret);
fn create_service_account_secret(call: &Call) -> Option<Datum> {
    refuse_if_read_only(c"tollgate.create_service_account_secret()");
    let id = fields::id(call.text(0)).or_raise();
    let name = token_fields::name(call.text(1).or(Some(SECRET_NAME))).or_raise();
    let ending = Ending::new(call.value(2), call.value(3)).or_raise();
    token_fields::allowed_ips(call.text_array(4)).or_raise();
    // Before any lock on tokens, as a user's row.
    lock(id).or_raise();
    let user_id = service::user_id(id);
    max_per_user::lock(&user_id).or_raise();

    let issued = draw(&guc::token_prefix()).or_raise();
    let token = NewToken {
        event: "token.created",
        id: new_id(),
        digest: &issued.digest(),
        hint: &issued.hint(),
        user_id: &user_id,
        name,
        scopes: &[],
        ending,
        metadata: jsonb("{}"),
        allowed_ips: call.datum(4),
        rate_limit: None,
        rate_window: None,
        parent: None,
    };
    let stored = store(&token).or_raise();
    Some(issued_token(&issued, &token, &stored))
}

/// Raises what the SQL function does.
fn lock(id: &str) -> Result<(), Error> {
    Spi::run_with_args("SELECT tollgate.lock_enabled_service($1)", &[id.into()])
        .map_err(|error| Error::internal(format!("could not lock a service account: {error}")))
}

// Returns the scopes without duplicates.
sql_function!(check_service_fields);
fn check_service_fields(call: &Call) -> Option<Datum> {
    fields::id(call.text(0)).or_raise();
    fields::name(call.text(1)).or_raise();
    fields::audience(call.text_array(3)).or_raise();
    fields::lifetime(call.value(4)).or_raise();
    fields::description(call.text(5)).or_raise();
    fields::owner(call.text(6)).or_raise();
    // Last, since it locks the catalogue of scopes.
    token_fields::scopes(call.text_array(2)).or_raise().into_datum()
}

sql_function!(check_workload_fields);
fn check_workload_fields(call: &Call) -> Option<Datum> {
    issuer_fields::issuer(call.text(0)).or_raise();
    fields::conditions(call.datum(1)).or_raise();
    fields::workload_audience(call.text(2)).or_raise();
    Some(Datum::null())
}

sql_function!(check_consumes);
fn check_consumes(call: &Call) -> Option<Datum> {
    consumes::check(call.text(0).unwrap_or_default()).or_raise();
    Some(Datum::null())
}
