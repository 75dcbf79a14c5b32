//! `derive_api_token`: the holder of a token creates a token with fewer rights from it.

use super::issue::{draw, issued_token, new_id, store};
use super::users;
use crate::error::{Error, OrRaise};
use crate::guc;
use crate::pg::datum::TextArray;
use crate::pg::fmgr::{Call, sql_function};
use crate::pg::read_only::refuse_if_read_only;
use crate::pg::{datum, sys};
use crate::store::probe;
use crate::store::probe::Column;
use crate::tokens::fields::Ending;
use crate::tokens::issue::NewToken;
use crate::tokens::{fields, issue};
use crate::verify::look_up::look_up_parent;
use crate::verify::refusal::Refusal;
use crate::verify::request::client;
use pgrx::Uuid;
use pgrx::pg_sys::Datum;
use tollgate_core::scope;
use tollgate_core::service;
use tollgate_core::status::{Code, decide};
use tollgate_core::token::Digest;

/// Generations below an issued token. Every change of a token reads all of its ancestors and descendants.
const MAX_DEPTH: i32 = 8;

sql_function!(derive_api_token);
fn derive_api_token(call: &Call) -> Option<Datum> {
    refuse_if_read_only(c"tollgate.derive_api_token()");
    // Guessed tokens count as failed attempts, as in a verification.
    let found = look_up_parent(call.bytes(0), client(call, 5));
    let (digest, parent) = match found {
        Ok((digest, id, Ok(()))) => (digest, Uuid::from_bytes(id)),
        Ok((.., Err(refusal))) | Err(refusal) => Error::refused(&refusal).raise(),
    };

    match users::lock_user_of(parent) {
        Some(user_state) if user_state.inactive => refused(Code::Disabled).raise(),
        Some(_) => {}
        None => refused(Code::NotFound).raise(),
    }
    // The parent is locked from here on, so what the probe finds stays true until the child is stored.
    let Some((user_id, ancestors)) = issue::lock_parent(parent).or_raise() else {
        refused(Code::NotFound).raise()
    };
    if service::id_of(&user_id).is_some() {
        Error::argument(
            "parent",
            "nothing is derived from the secret of a service account",
            "",
            "Give the account another secret with tollgate.create_service_account_secret(id).",
        )
        .raise();
    }
    if ancestors >= MAX_DEPTH {
        Error::too_deep(MAX_DEPTH).raise();
    }
    let name = fields::name(call.text(1)).or_raise();
    let scopes = fields::scopes(call.text_array(2)).or_raise();
    let ending = Ending::new(call.value(3), call.value(6)).or_raise();
    fields::allowed_ips(call.text_array(4)).or_raise();
    let parents_end = within_parent(&digest, &scopes, call.text_array(4)).or_raise();

    let issued = draw(&guc::token_prefix()).or_raise();
    let token = NewToken {
        event: "token.derived",
        id: new_id(),
        digest: &issued.digest(),
        hint: &issued.hint(),
        user_id: &user_id,
        name,
        scopes: &scopes,
        ending,
        metadata: None,
        allowed_ips: call.datum(4),
        rate_limit: None,
        rate_window: None,
        parent: Some(parent),
    };
    let stored = store(&token).or_raise();
    let end = stored.expires_at.map(i64::from);
    if parents_end.is_some_and(|parents_end| end.is_none_or(|end| end > parents_end)) {
        exceeds(
            ending.argument(),
            "would outlive its parent",
            "Leave it out for one that ends with its parent.",
        )
        .raise();
    }
    Some(issued_token(&issued, &token, &stored))
}

/// For a token that ended between the look-up and the lock.
fn refused(code: Code) -> Error {
    Error::refused(&Refusal::new(code))
}

fn exceeds(argument: &str, how: &str, hint: &str) -> Error {
    Error::argument(argument, format!("a derived token {how}"), "which is more than the parent has", hint)
}

/// Checks the locked parent and what the child requests of it. Returns when the parent ends.
///
/// The parent's networks do not decide whether it may have children: the child inherits them.
fn within_parent(
    digest: &Digest,
    scopes: &[String],
    networks: Option<TextArray<'_>>,
) -> Result<Option<i64>, Error> {
    probe::with_token(digest, |parent| {
        let Some(parent) = parent else { return Err(refused(Code::NotFound)) };
        let end = parent.timestamp(Column::ExpiresAt);
        let code = decide(
            parent.datum(Column::RevokedAt).is_some(),
            parent.datum(Column::DisabledAt).is_some(),
            end,
            sys::GetCurrentTimestamp(),
            || true,
            || true,
        );
        if code != Code::Valid {
            return Err(refused(code));
        }
        let granted = |one: &String| {
            let parents = parent.array(Column::Scopes);
            parents.is_some_and(|parents| scope::any_grants(parents.present(), one.as_bytes()))
        };
        if !scopes.iter().all(granted) {
            return Err(exceeds(
                "scopes",
                "cannot have a scope that its parent lacks",
                "Ask for scopes that the parent's scopes grant.",
            ));
        }
        let inside = |outer: TextArray<'_>| {
            let covered = |inner| outer.present().filter_map(datum::net).any(|outer| outer.contains(&inner));
            networks.is_none_or(|networks| networks.present().filter_map(datum::net).all(covered))
        };
        if !parent.array(Column::AllowedIps).is_none_or(inside) {
            return Err(exceeds(
                "allowed_ips",
                "cannot be used from where its parent cannot",
                "Give networks inside those of the parent, or leave them out for the same ones.",
            ));
        }
        Ok(end)
    })
}
