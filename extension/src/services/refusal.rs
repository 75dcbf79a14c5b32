//! Why a client was refused: charged to its address, written to the log (as `tollgate.log_verifications` selects), and
//! recorded for the account at most once a minute. The caller gets a code alone.
#![allow(unsafe_code)]

use super::request::{Code, Request};
use crate::error::Error;
use crate::pg::sys;
use crate::store::fresh_snapshot::transaction_keeps_its_snapshot;
use crate::store::statements::{Kept, with_plan};
use crate::verify::{limits, log};
use core::cell::Cell;
use core::fmt;
use pgrx::datum::DatumWithOid;
use pgrx::pg_sys;
use tollgate_core::assertion::Fault;
use tollgate_core::jws;
use tollgate_core::service;
use tollgate_core::status;

thread_local! {
    static NOTE_PLAN: Kept = const { Cell::new(None) };
}

/// What is not as it should be.
pub(super) enum Condition {
    /// There is no such account.
    Account,
    Disabled,
    /// The secret, as a verification of it says.
    Secret(status::Code),
    OfAnother,
    /// No signed token.
    Malformed(jws::Fault),
    /// The account has no key of this kid.
    Kid,
    Signature,
    Assertion(Fault),
    Replayed,
    /// The token of a trusted issuer, as a verification of it says.
    Workload(status::Code),
    Ours,
    NoWorkload,
    /// At this path.
    Claim(String),
    Audience,
    /// More was asked for than the account has.
    Asked,
    Limited,
}

impl fmt::Display for Condition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Condition::Account => f.write_str("there is no such service account"),
            Condition::Disabled => f.write_str("the service account is disabled"),
            Condition::Secret(code) => write!(f, "the secret is {code}"),
            Condition::OfAnother => f.write_str("the secret is of another user"),
            Condition::Malformed(fault) => write!(f, "the assertion is no signed token: {fault}"),
            Condition::Kid => f.write_str("the assertion names no key of the account (kid)"),
            Condition::Signature => f.write_str("the key of the account did not sign the assertion"),
            Condition::Assertion(fault) => write!(f, "the assertion: {fault}"),
            Condition::Replayed => f.write_str("the assertion was used before (jti)"),
            Condition::Workload(code) => write!(f, "the token of the workload is {code}"),
            Condition::Ours => f.write_str("the token is one of our own"),
            Condition::NoWorkload => f.write_str("the account trusts no workload of this issuer"),
            Condition::Claim(path) => write!(f, "the claim {path} has another value"),
            Condition::Audience => f.write_str("the token is not for the audience of the workload"),
            Condition::Asked => f.write_str("more was asked for than the account has"),
            Condition::Limited => f.write_str("too many uses"),
        }
    }
}

pub(super) struct Refusal {
    code: Code,
    condition: Condition,
    /// Whether a failed attempt is still to be charged to the client's address.
    is_to_be_charged: bool,
}

impl Refusal {
    pub(super) fn client(condition: Condition) -> Self {
        Refusal { code: Code::InvalidClient, condition, is_to_be_charged: true }
    }

    pub(super) fn charged(condition: Condition) -> Self {
        Refusal { is_to_be_charged: false, ..Refusal::client(condition) }
    }

    pub(super) fn asked_beyond(code: Code) -> Self {
        Refusal { code, condition: Condition::Asked, is_to_be_charged: false }
    }

    pub(super) fn limited() -> Self {
        Refusal { code: Code::RateLimited, condition: Condition::Limited, is_to_be_charged: false }
    }

    /// The code that the caller gets.
    pub(super) fn conclude(&self, request: &Request<'_>) -> Result<Code, Error> {
        let condition = self.condition.to_string();
        // An application takes the id from a request, where it may be anything.
        let is_id = service::is_id(request.client_id);
        let shown = if is_id { request.client_id } else { "-" };
        log::client(self.code.as_str(), shown, request.client.as_ref(), &condition);
        if is_id && self.code == Code::InvalidClient && may_write() {
            note(request, &condition)?;
        }
        let exceeded = self.is_to_be_charged
            && limits::charge_failure(request.client, sys::GetCurrentTimestamp()).is_some();
        Ok(if exceeded { Code::RateLimited } else { self.code })
    }
}

/// Not on a standby; nor in a transaction that keeps its snapshot, where a row that was changed since is an error.
fn may_write() -> bool {
    // SAFETY: a plain variable of this process.
    let is_read_only = unsafe { pg_sys::XactReadOnly };
    !is_read_only && !sys::is_in_recovery() && !transaction_keeps_its_snapshot()
}

fn note(request: &Request<'_>, condition: &str) -> Result<(), Error> {
    // SAFETY: each datum is of the type given with it, and lives as long as the call that it came from.
    let arguments = unsafe {
        [
            DatumWithOid::new(request.client_id, pg_sys::TEXTOID),
            DatumWithOid::new(condition, pg_sys::TEXTOID),
            DatumWithOid::new(request.client_ip, pg_sys::INETOID),
        ]
    };
    with_plan(&NOTE_PLAN, "SELECT tollgate.note_service_refusal($1, $2, $3)", &arguments, |_| Ok(()))
}
