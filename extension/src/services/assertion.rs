//! A token that a service account has signed with a key of its own, to prove who it is (RFC 7523). The rules are in
//! `tollgate_core::assertion`; here are its key, and that it is used once.
//!
//! What was used is stored in the transaction that issues the token, and committed with it. Two at once: the second waits for
//! the first, and is refused. A standby that is promoted may lack the last uses, so assertions from before its timeline began
//! are refused there.
#![allow(unsafe_code)]

use super::refusal::{Condition, Refusal};
use crate::access::EPOCHS;
use crate::error::Error;
use crate::guc;
use crate::pg::read_only::refuse_if_read_only;
use crate::pg::sys;
use crate::sessions::refresh::begin_timeline;
use crate::shmem;
use crate::store::services;
use crate::store::statements::{Kept, by_index_alone, with_plan};
use core::cell::Cell;
use pgrx::datum::{DatumWithOid, TimestampWithTimeZone};
use pgrx::pg_sys;
use tollgate_core::assertion::{self, Assertion, Expected};
use tollgate_core::jws::Parsed;
use tollgate_core::service;
use tollgate_core::signature::PublicKey;

const CONSUME: &str = "
    INSERT INTO tollgate.used_assertions AS u (client_id, jti, expires_at) VALUES ($1, $2, $3)
        ON CONFLICT ON CONSTRAINT used_assertions_pkey DO NOTHING
        RETURNING true";

thread_local! {
    static CONSUME_PLAN: Kept = const { Cell::new(None) };
    static ACCEPTED_PLAN: Kept = const { Cell::new(None) };
}

/// One that is good, if it was not used.
pub(super) struct Single(Assertion);

pub(super) fn prove(parsed: &Parsed<'_>, client_id: &str) -> Result<Result<Single, Refusal>, Error> {
    refuse_if_read_only(c"tollgate.client_credentials()");
    let refuse = |condition| Ok(Err(Refusal::client(condition)));
    let Some(kid) = parsed.header.kid.as_deref() else { return refuse(Condition::Kid) };
    let Some(jwk) = services::key(client_id, kid) else {
        if services::service(client_id).is_some_and(|account| account.is_fetched) {
            shmem::note_unknown_key(&service::user_id(client_id), sys::GetCurrentTimestamp());
        }
        return refuse(Condition::Kid);
    };
    // The algorithm is the key's.
    if !PublicKey::from_jwk(&jwk).is_ok_and(|key| parsed.is_signed_by(&key)) {
        return refuse(Condition::Signature);
    }
    let expected = Expected {
        client_id,
        audience: guc::issuer().ok_or_else(Error::no_issuer)?,
        now: sys::GetCurrentTimestamp() + EPOCHS,
        leeway: guc::leeway(),
        accepts_from: accepted_from()?.map(|from| from + EPOCHS),
    };
    match assertion::check(&parsed.header, &parsed.claims, &expected) {
        Ok(good) => Ok(Ok(Single(good))),
        Err(fault) => refuse(Condition::Assertion(fault)),
    }
}

impl Single {
    /// Stores that it is used; false if it was.
    pub(super) fn consume(&self, client_id: &str) -> Result<bool, Error> {
        let end = TimestampWithTimeZone::try_from(self.0.end - EPOCHS).ok();
        // SAFETY: each datum is of the type given with it.
        let arguments = unsafe {
            [
                DatumWithOid::new(client_id, pg_sys::TEXTOID),
                DatumWithOid::new(self.0.jti.as_str(), pg_sys::TEXTOID),
                DatumWithOid::new(end, pg_sys::TIMESTAMPTZOID),
            ]
        };
        let is_first =
            by_index_alone(|| with_plan(&CONSUME_PLAN, CONSUME, &arguments, |rows| Ok(!rows.is_empty())))?;
        // Before the answer reaches the client, whatever synchronous_commit is: a crash must not make it good again.
        // SAFETY: sets a flag of the transaction.
        unsafe { pg_sys::ForceSyncCommit() };
        Ok(is_first)
    }
}

/// When the present timeline began, if there was another one, in microseconds since 2000-01-01. Registers it first, so that
/// what is used on it from now on is not taken for what was used before.
fn accepted_from() -> Result<Option<i64>, Error> {
    begin_timeline()?;
    with_plan(&ACCEPTED_PLAN, "SELECT tollgate.assertions_accepted_from()", &[], |rows| {
        Ok(rows.get::<TimestampWithTimeZone>(1)?.map(i64::from))
    })
}
