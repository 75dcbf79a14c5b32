//! `rotate_api_token`: a new secret for a token that stays what it is. The rest is in `sql/schema/lifecycle.sql`.

use super::issue::{draw, new_id, say_what_may_not_be_meant};
use super::users;
use crate::error::{Error, OrRaise};
use crate::guc;
use crate::pg::fmgr::{Call, sql_function};
use crate::pg::read_only::refuse_if_read_only;
use crate::store::composite;
use crate::store::relations::Composite;
use crate::tokens::fields::Ending;
use crate::tokens::{fields, issue};
use pgrx::pg_sys::Datum;
use pgrx::{IntoDatum, Uuid};
use tollgate_core::token::Prefix;

sql_function!(rotate_api_token);
fn rotate_api_token(call: &Call) -> Option<Datum> {
    refuse_if_read_only(c"tollgate.rotate_api_token()");
    let grace = fields::grace(call.value(1)).or_raise();
    let ending = Ending::new(call.value(2), call.value(3)).or_raise();
    let revoke_on_reuse = call.value(4).unwrap_or(false);
    let token_id: Uuid = call.value(0).ok_or_else(no_token).or_raise();
    if users::admit_user_of(token_id).is_some_and(|standing| standing.inactive) {
        Error::inactive_user().raise();
    }
    let old = issue::lock_for_rotation(token_id).or_raise();
    if !ending.is_given() {
        fields::end("expires_at", old.expires_at.map(i64::from)).or_raise();
    }

    let issued = draw(&prefix_of(&old.hint)).or_raise();
    let (id, hint) = (new_id(), issued.hint());
    let new =
        issue::replace(token_id, id, &issued.digest(), &hint, grace, ending, revoke_on_reuse).or_raise();
    if ending.is_given() {
        fields::end(ending.argument(), new.stored.expires_at.map(i64::from)).or_raise();
    }
    say_what_may_not_be_meant(None, new.stored.expires_at);
    Some(composite::form(
        Composite::IssuedToken,
        [
            id.into_datum(),
            issued.token().into_datum(),
            hint.into_datum(),
            new.user_id.into_datum(),
            new.name.into_datum(),
            new.scopes.into_datum(),
            new.stored.expires_at.into_datum(),
            new.stored.created_at.into_datum(),
        ],
    ))
}

fn no_token() -> Error {
    Error::argument(
        "token_id",
        "there is no token to rotate",
        "which is NULL",
        "Pass the id of a live token.",
    )
}

/// The prefix that a hint shows; that of the setting for a token whose hint shows none, as of one that was imported.
fn prefix_of(hint: &str) -> Prefix {
    hint.rsplit_once('_').and_then(|(prefix, _)| Prefix::parse(prefix).ok()).unwrap_or_else(guc::token_prefix)
}
