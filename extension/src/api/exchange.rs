//! `exchange_token`, `introspect_token`, and what the SQL of revoking a presented credential calls.

use super::access::record;
use crate::access::exchange::{self, Code, Exchanged, ISSUED_TYPE, Kind, Request, Shown};
use crate::access::verify::jsonb;
use crate::access::{introspect, is_signed, issue};
use crate::error::{Error, OrRaise};
use crate::guc;
use crate::pg::fmgr::{Call, sql_function};
use crate::pg::read_only::refuse_if_read_only;
use crate::store::composite;
use crate::store::relations::Composite;
use crate::verify::request::client;
use pgrx::IntoDatum;
use pgrx::datum::TimestampWithTimeZone;
use pgrx::pg_sys::Datum;
use serde_json::json;

sql_function!(exchange_token);
fn exchange_token(call: &Call) -> Option<Datum> {
    let is_audited = guc::audit_issue();
    if is_audited {
        refuse_if_read_only(c"tollgate.exchange_token()");
    }
    let request = Request {
        subject: Shown {
            token: call.text(0),
            kind: Kind::parse("subject_token_type", call.text(1)).or_raise(),
        },
        scopes: call.text_array(2),
        audience: call.text_array(3),
        lifetime: issue::lifetime(call.value(4)).or_raise(),
        actor: actor(call).or_raise(),
        client: client(call, 7),
    };
    let (code, reason, exchanged) = match exchange::exchange(&request).or_raise() {
        Ok(exchanged) => (Code::Valid, None, Some(exchanged)),
        Err((code, reason)) => (code, reason, None),
    };
    let Some(Exchanged { issued, user_id, scopes, audience, act }) = exchanged else {
        let columns = [code.as_str().into_datum(), reason.into_datum(), None, None, None, None, None, None];
        return Some(composite::form(Composite::ExchangedToken, columns));
    };
    let expires_at = TimestampWithTimeZone::try_from(issued.expires_at).ok();
    if is_audited {
        let act = act.and_then(|act| serde_json::from_str::<serde_json::Value>(&act).ok());
        let mut detail = json!({ "scopes": scopes, "audience": audience });
        if let Some(act) = act {
            detail["act"] = act;
        }
        record(&user_id, issued.jti, expires_at, detail).or_raise();
    }
    Some(composite::form(
        Composite::ExchangedToken,
        [
            code.as_str().into_datum(),
            None,
            issued.token.into_datum(),
            issued.jti.into_datum(),
            expires_at.into_datum(),
            scopes.into_datum(),
            audience.into_datum(),
            ISSUED_TYPE.into_datum(),
        ],
    ))
}

fn actor(call: &Call) -> Result<Option<Shown<'_>>, Error> {
    match (call.text(5), call.text(6)) {
        (None, None) => Ok(None),
        (token @ Some(_), kind @ Some(_)) => {
            Ok(Some(Shown { token, kind: Kind::parse("actor_token_type", kind)? }))
        }
        (token, _) => Err(Error::argument(
            if token.is_none() { "actor_token" } else { "actor_token_type" },
            "an actor's token has a type",
            "which is NULL, while the other is given",
            "Pass both, or neither where no one acts for the user.",
        )),
    }
}

sql_function!(introspect_token);
fn introspect_token(call: &Call) -> Option<Datum> {
    jsonb(&introspect::introspect(call.text(0), client(call, 2)).or_raise())
}

sql_function!(is_signed_token);
fn is_signed_token(call: &Call) -> Option<Datum> {
    call.bytes(0).is_some_and(is_signed).into_datum()
}
