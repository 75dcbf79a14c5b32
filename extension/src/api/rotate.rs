//! `rotate_api_token`: a new secret for a token that otherwise stays the same. The rest is in
//! `sql/schema/tokens/lifecycle.sql`.

use super::issue::{draw, new_id, warn_of_likely_mistakes};
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
    if users::lock_user_of(token_id).is_some_and(|user_state| user_state.inactive) {
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
    warn_of_likely_mistakes(None, new.stored.expires_at);
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

/// The prefix in the hint, or the setting's prefix for a token whose hint has none, such as an imported one.
fn prefix_of(hint: &str) -> Prefix {
    hint.rsplit_once('_').and_then(|(prefix, _)| Prefix::parse(prefix).ok()).unwrap_or_else(guc::token_prefix)
}
