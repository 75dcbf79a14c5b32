//! Looks up a presented token for a caller that is about to change it: judged and counted like a verification, but not
//! as a use of the token.

use super::presented::{Presented, Required};
use super::refusal::Refusal;
use super::request::{Credential, Purpose, Request};
use super::verdict::Verdict;
use crate::access::verify::{self as signed, Judged};
use crate::pg::sys;
use crate::shmem::Timer;
use crate::store::probe::Column;
use tollgate_core::net::Net;
use tollgate_core::status::Code;
use tollgate_core::token::Digest;

/// A presented token that is stored: its stored digest, its id, and whether it would be accepted.
pub(crate) type LookedUp = (Digest, [u8; 16], Result<(), Refusal>);

/// For a token that another is to be derived from: judges it like a verification, from any address, and counts and logs
/// the attempt, but not as a use of the token.
pub(crate) fn look_up_parent(presented: Option<&[u8]>, client: Option<Net>) -> Result<LookedUp, Refusal> {
    look_up(|| Presented::to_verify(presented), client, Purpose::Derive)
}

/// The same for a token that is to be revoked: any stored token qualifies.
pub(crate) fn look_up_to_end(presented: Option<&[u8]>, client: Option<Net>) -> Result<LookedUp, Refusal> {
    look_up(|| Presented::to_end(presented), client, Purpose::End)
}

/// An API token that proves who calls.
pub(crate) struct Secret {
    pub(crate) id: [u8; 16],
    pub(crate) user_id: String,
    /// In microseconds since 2000-01-01.
    pub(crate) expires_at: Option<i64>,
}

/// For a client of `client_credentials`: a use of the token. The code is that of a refusal.
pub(crate) fn look_up_secret(presented: &[u8], client: Option<Net>) -> Result<Secret, Code> {
    let verdict = Verdict::decide(&Request {
        timer: Timer::start(),
        presented: Credential::ApiToken(Presented::to_verify(Some(presented))),
        required: Required::Nothing,
        client,
        purpose: Purpose::Use,
    });
    let code = verdict.code();
    let secret = verdict.stored().map(|token| Secret {
        id: token.id(),
        user_id: token.text(Column::UserId).to_owned(),
        expires_at: token.timestamp(Column::ExpiresAt),
    });
    verdict.close();
    secret.filter(|_| code == Code::Valid).ok_or(code)
}

/// For a token of a workload, which is no use of its user, and whose failed attempts the caller charges.
pub(crate) fn look_up_workload(presented: &str, client: Option<Net>) -> Judged {
    let presented = signed::Presented { token: Some(presented), audience: None };
    let request = Request {
        timer: None,
        presented: Credential::AccessToken(presented),
        required: Required::Nothing,
        client,
        purpose: Purpose::Check,
    };
    signed::judge(&presented, &request, || sys::GetCurrentTimestamp())
}

/// For an access token that is to be revoked: one of ours that would be accepted somewhere. The verdict says which.
pub(crate) fn look_up_access_token(presented: Option<&str>, client: Option<Net>) -> Verdict {
    Verdict::decide(&Request {
        timer: Timer::start(),
        presented: Credential::AccessToken(signed::Presented { token: presented, audience: None }),
        required: Required::Nothing,
        client,
        purpose: Purpose::End,
    })
}

fn look_up<'a>(
    parse: impl FnOnce() -> Presented<'a>,
    client: Option<Net>,
    purpose: Purpose,
) -> Result<LookedUp, Refusal> {
    let timer = Timer::start();
    let request = Request {
        timer,
        presented: Credential::ApiToken(parse()),
        required: Required::Nothing,
        client,
        purpose,
    };
    let verdict = Verdict::decide(&request);
    let stored = verdict.stored().map(|token| (token.digest(), token.id()));
    let code = verdict.code();
    verdict.close();
    let refusal = || Refusal::last().unwrap_or_else(|| Refusal::new(code));
    match stored {
        Some((digest, id)) if code == Code::Valid => Ok((digest, id, Ok(()))),
        Some((digest, id)) => Ok((digest, id, Err(refusal()))),
        None => Err(refusal()),
    }
}
