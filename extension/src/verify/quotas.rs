//! The quotas of a verification: its token's own, which the token shares with its family, and its user's.
//!
//! A unit is spent in shared memory, of what this server was leased; the tables are read only when that is used up, or the
//! period is over. It is spent once everything else has passed, and returned if a rate limit then refuses. Without shared
//! memory a quota raises 55000, and without room to remember it, it refuses.

use crate::error::Error;
use crate::shmem;
use crate::store::quotas;
use crate::store::quotas::{Quota, Share};
use tollgate_core::quota::Spent;

/// When more may be leased to this server, or there may be room, in microseconds.
const SOON: u64 = 1_000_000;

/// The units that a use has spent.
pub(crate) struct Units([Option<([u8; 16], Spent)>; 2]);

/// A quota is used up: the time until there may be more of it, in microseconds; `None` for ever.
#[derive(Clone, Copy)]
pub(crate) struct UsedUp(pub(crate) Option<u64>);

/// Spends a unit of each quota: of a token, by its id, and of a user.
#[inline]
pub(crate) fn spend(own: Option<[u8; 16]>, user_id: &str, now: i64) -> Result<Units, UsedUp> {
    let mut units = Units([None; 2]);
    if let Some(id) = own {
        units.0[0] = spend_one(&id, None, now)?;
    }
    if let Some(quota) = quotas::of_user(user_id) {
        let id = quota.id;
        match spend_one(&id, Some(quota), now) {
            Ok(spent) => units.0[1] = spent,
            Err(used_up) => {
                units.refund();
                return Err(used_up);
            }
        }
    }
    Ok(units)
}

impl Units {
    pub(crate) fn refund(self) {
        for (id, spent) in self.0.into_iter().flatten() {
            shmem::refund_quota(&id, spent);
        }
    }
}

fn spend_one(id: &[u8; 16], known: Option<Quota>, now: i64) -> Result<Option<([u8; 16], Spent)>, UsedUp> {
    if let Some(spent) = shmem::spend(id, now) {
        return Ok(Some((*id, spent)));
    }
    let Some(holder) = shmem::lease_holder() else { Error::needs_preload("a quota").raise() };
    // `None`: it was removed.
    let Some(quota) = known.or_else(|| quotas::of_id(id)) else { return Ok(None) };
    let now = shmem::quota_time(now);
    let Share { lease, rest } = quota.share_of(&holder, now);
    match shmem::spend_of(id, &lease, rest, now) {
        Some(Some(spent)) => Ok(Some((*id, spent))),
        None => Err(UsedUp(Some(SOON))),
        Some(None) if rest > 0 => Err(UsedUp(Some(SOON))),
        Some(None) if lease.ends_at == i64::MAX => Err(UsedUp(None)),
        Some(None) => Err(UsedUp(Some(lease.ends_at.abs_diff(now)))),
    }
}
