//! The number of live tokens of a user, counted exactly even while other sessions issue.
#![allow(unsafe_code)]

use crate::error::Error;
use crate::guc;
use crate::store::fresh_snapshot::{Query, Snapshot};
use crate::store::statements::by_index_alone;
use core::cell::{Cell, RefCell};
use pgrx::IntoDatum;
use pgrx::pg_sys;
use std::collections::HashMap;
use tollgate_core::token::{self, Digest};

thread_local! {
    static LOCK_PLAN: Cell<pg_sys::SPIPlanPtr> = const { Cell::new(core::ptr::null_mut()) };
    static LIVE_PLAN: Cell<pg_sys::SPIPlanPtr> = const { Cell::new(core::ptr::null_mut()) };
    static COUNTED: RefCell<HashMap<Digest, Counted>> = RefCell::default();
    /// The slot that was locked last, and the (sub)transaction that holds the lock.
    static LOCKED: Cell<Option<(Place, i64)>> = const { Cell::new(None) };
}

/// Adds the row or locks the existing one: ON CONFLICT DO UPDATE locks a row even if its WHERE is false.
const LOCK: Query = Query {
    statement: c"
        WITH added AS (
            INSERT INTO tollgate.token_slots AS s (user_hash) VALUES ($1)
            ON CONFLICT ON CONSTRAINT token_slots_pkey DO UPDATE SET user_hash = s.user_hash WHERE false
            RETURNING s.user_hash)
        SELECT count(*) FROM added",
    plan: &LOCK_PLAN,
};

/// Uses the index of live tokens, and reads no further than the limit.
const LIVE: Query = Query {
    statement: c"
        SELECT count(*) FROM (
            SELECT FROM tollgate.api_tokens t
            WHERE t.user_id = $1 AND t.revoked_at IS NULL AND t.rotated_to IS NULL AND t.expired_at IS NULL
              AND (t.expires_at IS NULL OR t.expires_at > clock_timestamp())
            LIMIT $2) live",
    plan: &LIVE_PLAN,
};

/// An upper bound on a user's live tokens.
#[derive(Clone, Copy)]
struct Counted {
    /// The transaction and subtransaction in which it was counted. While these last the user is locked, so no other
    /// session adds a token.
    by: Place,
    live: i64,
}

/// A transaction and a subtransaction of it.
type Place = (u64, pg_sys::SubTransactionId);

/// Counts are remembered for this many users: a transaction that issues for more counts some of them again.
const REMEMBERED: usize = 1000;

fn present_transaction() -> Place {
    // SAFETY: within a transaction, which is about to write.
    unsafe { (pg_sys::GetTopFullTransactionId().value, pg_sys::GetCurrentSubTransactionId()) }
}

/// The key of a user in `token_slots`. A collision only makes another session wait.
fn hash(user: &Digest) -> i64 {
    let [a, b, c, d, e, f, g, h, ..] = *user;
    i64::from_be_bytes([a, b, c, d, e, f, g, h])
}

/// Waits for other sessions that add a live token for this user, and locks the user until the transaction ends. Call it
/// before any lock on tokens or on the scope catalogue.
///
/// A table row per user, because a transaction may issue for any number of users and the server's lock table has room
/// for some thousands of locks. Not an advisory lock, because any role can take those.
pub(crate) fn lock(user_id: &str) -> Result<(), Error> {
    if guc::max_tokens_per_user().is_none() {
        return Ok(());
    }
    let slot = Some((present_transaction(), hash(&token::digest(user_id.as_bytes()))));
    if LOCKED.get() == slot {
        return Ok(());
    }
    LOCK.text(Snapshot::LatestToWrite, [(pg_sys::INT8OID, slot.and_then(|(_, hash)| hash.into_datum()))])?;
    LOCKED.set(slot);
    Ok(())
}

/// Checks that the user may have one more live token.
pub(crate) fn claim(user_id: &str) -> Result<(), Error> {
    let Some(limit) = guc::max_tokens_per_user() else {
        // Tokens issued without a limit are not counted, so remembered counts would be too low.
        COUNTED.with_borrow_mut(HashMap::clear);
        return Ok(());
    };
    let most = i64::from(limit);
    let (user, by) = (token::digest(user_id.as_bytes()), present_transaction());
    let known = COUNTED.with_borrow(|counted| counted.get(&user).copied()).filter(|known| known.by == by);
    if known.is_none() {
        lock(user_id)?;
    }
    // Other sessions may have ended tokens of the user since, so a count that is too high is no reason to refuse.
    let live = match known {
        Some(known) if known.live < most => known.live,
        _ => count(user_id, most)?,
    };
    if live >= most {
        return Err(Error::too_many_tokens(limit));
    }
    COUNTED.with_borrow_mut(|counted| {
        if counted.len() >= REMEMBERED {
            counted.clear();
        }
        counted.insert(user, Counted { by, live: live + 1 });
    });
    Ok(())
}

fn count(user_id: &str, most: i64) -> Result<i64, Error> {
    let arguments = [(pg_sys::TEXTOID, user_id.into_datum()), (pg_sys::INT8OID, most.into_datum())];
    by_index_alone(|| LIVE.text(Snapshot::Latest, arguments))?
        .and_then(|count| count.parse().ok())
        .ok_or_else(|| Error::internal("could not count the tokens of a user"))
}
