//! How many live tokens a user has, counted exactly whoever else issues at the same time.
#![allow(unsafe_code)]

use super::latest::{Query, Sight};
use super::relations;
use crate::error::Error;
use crate::guc;
use core::cell::Cell;
use pgrx::IntoDatum;
use pgrx::pg_sys::{self, Oid};
use tollgate_core::token;

thread_local! {
    static LIVE_PLAN: Cell<pg_sys::SPIPlanPtr> = const { Cell::new(core::ptr::null_mut()) };
}

const LIVE: Query = Query {
    statement: c"
        SELECT count(*) FROM tollgate.api_tokens t
        WHERE t.user_id = $1 AND t.revoked_at IS NULL AND t.rotated_to IS NULL
          AND (t.expires_at IS NULL OR t.expires_at > clock_timestamp())",
    plan: &LIVE_PLAN,
};

/// Waits for whoever else adds a live token to this user's, until the transaction ends. Comes before any lock on tokens or on
/// the catalogue of scopes.
/// Not an advisory lock: those are there for everyone to take.
pub(crate) fn lock(user_id: &str) {
    if guc::max_tokens_per_user().is_none() {
        return;
    }
    let [a, b, c, d, e, f, ..] = token::digest(user_id.as_bytes());
    // SAFETY: an existing relation stands for the class of the lock; a collision of the six bytes only makes somebody wait.
    unsafe {
        pg_sys::LockDatabaseObject(
            relations::relations().api_tokens,
            Oid::from(u32::from_ne_bytes([a, b, c, d])),
            u16::from_ne_bytes([e, f]),
            pg_sys::ExclusiveLock.cast_signed(),
        );
    }
}

/// Makes sure that the user may have one more live token than now.
pub(crate) fn claim(user_id: &str) -> Result<(), Error> {
    let Some(limit) = guc::max_tokens_per_user() else { return Ok(()) };
    lock(user_id);
    let live = LIVE.text(Sight::Now, [(pg_sys::TEXTOID, user_id.into_datum())])?;
    let live: i64 = live
        .and_then(|count| count.parse().ok())
        .ok_or_else(|| Error::internal("could not count the tokens of a user"))?;
    if live < i64::from(limit) { Ok(()) } else { Err(Error::too_many_tokens(limit)) }
}
