//! The rate limits of a verification: its token's own, its user's, and that on failed attempts from one address; and, before
//! them, its quotas (`quotas`).
//!
//! All three are kept in shared memory, so each server has its own, and none is rolled back with a transaction. They
//! fail closed: without shared memory a limit raises 55000, and without room to remember it, it refuses. A client that
//! fills the room loses only its own limits: see `tollgate_core::usage_table`.

use crate::error::Error;
use crate::pg::sys;
use crate::shmem::{Kind, Owner, Use};
use crate::store::capabilities::{self, acting_role};
use crate::store::probe::{Column, TokenRow};
use crate::verify::quotas::{self, UsedUp};
use crate::{access, guc, shmem};
use pgrx::pg_sys::Oid;
use tollgate_core::limit::{Charge, Limit};
use tollgate_core::net::Net;
use tollgate_core::status::Code;
use tollgate_core::token;

const MINUTE: i64 = 60_000_000;
/// The refusal for lack of room, in microseconds: a flush, every few seconds, makes room.
const NO_ROOM: Charge = Charge { admitted: false, remaining: 0, retry_after: 1_000_000 };

/// A retry that will never be admitted.
pub(crate) const NEVER: u64 = u64::MAX;

/// The state of the limit that decided or, if all admitted the use, of the one with the least left; or that of a quota that
/// is used up, which has no `limit`.
#[derive(Clone, Copy)]
pub(crate) struct Quota {
    pub(crate) limit: Option<u32>,
    pub(crate) charge: Charge,
}

impl Quota {
    fn new(limit: Limit, charge: Option<Charge>) -> Quota {
        Quota { limit: Some(limit.limit()), charge: charge.unwrap_or(NO_ROOM) }
    }

    fn used_up(UsedUp(retry_after): UsedUp) -> Quota {
        let retry_after = retry_after.unwrap_or(NEVER);
        Quota { limit: None, charge: Charge { admitted: false, remaining: 0, retry_after } }
    }
}

/// Counts a use or denial of a token.
pub(crate) fn count(token: &TokenRow, id: &[u8; 16], used: &Use) {
    shmem::count_use(id, &|| owner(token), used);
}

/// Charges an accepted use to its quotas and limits and counts it, as a denial if one of them refuses it.
pub(crate) fn charge_use(token: &TokenRow, id: &[u8; 16], used: &Use) -> (Code, Option<Quota>) {
    let spent = quotas::spend(token.uuid(Column::QuotaId), token.text(Column::UserId), used.at);
    with_quotas(
        spent,
        || count(token, id, &Use { accepted: false, ..*used }),
        || charge_limits(token, id, used),
    )
}

/// Charges limits once units of quotas were spent, and returns those if a limit refuses.
fn with_quotas(
    spent: Result<quotas::Units, UsedUp>,
    count_denial: impl FnOnce(),
    charge_limits: impl FnOnce() -> (Code, Option<Quota>),
) -> (Code, Option<Quota>) {
    match spent {
        Err(used_up) => {
            count_denial();
            (Code::QuotaExceeded, Some(Quota::used_up(used_up)))
        }
        Ok(units) => {
            let (code, quota) = charge_limits();
            if code != Code::Valid {
                units.refund();
            }
            (code, quota)
        }
    }
}

fn charge_limits(token: &TokenRow, id: &[u8; 16], used: &Use) -> (Code, Option<Quota>) {
    let (own, of_user) = (own(token), guc::user_rate_limit());
    if own.is_none() && of_user.is_none() {
        count(token, id, used);
        return (Code::Valid, None);
    }
    require_memory();
    let user = of_user.map(|limit| (limit, key_of(token.text(Column::UserId))));
    let owner = || owner(token);
    let of_user =
        user.map(|(limit, key)| Quota::new(limit, shmem::charge(Kind::User, &key, &owner, limit, used.at)));
    if let Some(refusal) = of_user.filter(|quota| !quota.charge.admitted) {
        count(token, id, &Use { accepted: false, ..*used });
        return (Code::RateLimited, Some(refusal));
    }
    let Some(limit) = own else {
        count(token, id, used);
        return (Code::Valid, of_user);
    };
    let own = Quota::new(limit, shmem::charge_use(id, &owner, used, limit));
    if !own.charge.admitted {
        if let Some((limit, key)) = user {
            shmem::refund(Kind::User, &key, limit);
        }
        return (Code::RateLimited, Some(own));
    }
    let least = of_user.filter(|quota| quota.charge.remaining < own.charge.remaining).unwrap_or(own);
    (Code::Valid, Some(least))
}

/// Charges an accepted use of an access token to its user's quota and limit and counts it on the user, as a denial if one of
/// them refuses it.
pub(crate) fn charge_use_of_user(user_id: &str, used: &Use) -> (Code, Option<Quota>) {
    with_quotas(
        quotas::spend(None, user_id, used.at),
        || count_on_user(user_id, &Use { accepted: false, ..*used }),
        || charge_limit_of_user(user_id, used),
    )
}

fn charge_limit_of_user(user_id: &str, used: &Use) -> (Code, Option<Quota>) {
    let Some(limit) = guc::user_rate_limit() else {
        count_on_user(user_id, used);
        return (Code::Valid, None);
    };
    require_memory();
    let owner = || owner_of_access_tokens(user_id);
    let quota = Quota::new(limit, shmem::charge(Kind::User, &key_of(user_id), &owner, limit, used.at));
    count_on_user(user_id, &Use { accepted: quota.charge.admitted, ..*used });
    let code = if quota.charge.admitted { Code::Valid } else { Code::RateLimited };
    (code, Some(quota))
}

/// Counts a use or denial of an access token, of which nothing is stored, on its user.
pub(crate) fn count_on_user(user_id: &str, used: &Use) {
    shmem::count_use(&access::usage_id(user_id), &|| owner_of_access_tokens(user_id), used);
}

/// The answer to a client that has used up its failed attempts. Checked before any look-up, so that a guessing client
/// learns nothing, not even from a right guess.
pub(crate) fn blocked(client: Option<Net>) -> Option<Quota> {
    let (limit, client) = (guc::failure_rate_limit()?, client?);
    require_memory();
    let now = sys::GetCurrentTimestamp();
    let charge = shmem::peek(Kind::Address, &client.subscriber(), limit, now)?;
    (!charge.admitted).then_some(Quota::new(limit, Some(charge)))
}

/// Charges a failed attempt to the client's address. If that exceeds the limit, as several concurrent attempts may, the
/// answer is the limit's refusal instead of the fault.
pub(crate) fn charge_failure(client: Option<Net>, now: i64) -> Option<Quota> {
    let (limit, client) = (guc::failure_rate_limit()?, client?);
    let charge = shmem::charge(Kind::Address, &client.subscriber(), &Owner::default, limit, now);
    let quota = Quota::new(limit, charge);
    (!quota.charge.admitted).then_some(quota)
}

/// The answer to a login that has used up its guesses. Such a login asserts the addresses of its clients, so that those alone
/// would not stop one that was stolen. Only what can be guessed is refused: a client that sends junk must not end the service
/// for all others.
pub(crate) fn blocked_login() -> Option<Quota> {
    let limit = guc::gateway_failure_rate_limit()?;
    let charge = shmem::peek(Kind::Address, &key_of_login(acting_role()), limit, sys::GetCurrentTimestamp())?;
    (!charge.admitted).then_some(Quota::new(limit, Some(charge)))
}

/// Charges a wrong guess to the login, if that is a gateway and nothing else.
#[cold]
pub(crate) fn charge_failure_of_login(now: i64) -> Option<Quota> {
    let limit = guc::gateway_failure_rate_limit()?;
    let login = capabilities::only_a_gateway()?;
    require_memory();
    let quota =
        Quota::new(limit, shmem::charge(Kind::Address, &key_of_login(login), &Owner::default, limit, now));
    (!quota.charge.admitted).then_some(quota)
}

/// In the place of an address, of which none looks like this: the last half of an IPv6 network is zero.
fn key_of_login(login: Oid) -> [u8; 16] {
    key_of(&format!("login {}", login.to_u32()))
}

/// The functions that write a token require a window with a limit; if it was removed by hand, a minute is used.
fn own(token: &TokenRow) -> Option<Limit> {
    let limit = token.int(Column::RateLimit)?;
    let window = token.interval(Column::RateWindow).unwrap_or(MINUTE);
    Limit::new(limit, window).or_else(|| Limit::new(1, MINUTE))
}

fn key_of(user_id: &str) -> [u8; 16] {
    let digest = token::digest(user_id.as_bytes());
    *digest.first_chunk().expect("a digest is longer")
}

/// The beginning of a digest.
fn hash(text: &str) -> u64 {
    let digest = token::digest(text.as_bytes());
    u64::from_le_bytes(*digest.first_chunk().expect("a digest is longer"))
}

/// All access tokens together share the room of one issuing role.
fn owner_of_access_tokens(user_id: &str) -> Owner {
    Owner { creator: hash("access tokens"), user: hash(user_id) }
}

/// Called only for a token that is not in shared memory yet.
fn owner(token: &TokenRow) -> Owner {
    Owner { creator: hash(token.text(Column::CreatedBy)), user: hash(token.text(Column::UserId)) }
}

fn require_memory() {
    if !shmem::exists() {
        Error::needs_preload("rate limiting").raise();
    }
}
