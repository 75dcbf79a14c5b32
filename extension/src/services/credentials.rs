//! `client_credentials`: who calls, what was asked for, and the access token.

use super::refusal::{Condition, Refusal};
use super::request::{Code, Credential, Request};
use super::{assertion, workload};
use crate::access::issue::{self, IssuedAccessToken, NewAccessToken};
use crate::access::revocations;
use crate::error::Error;
use crate::guc;
use crate::pg::datum::TextArray;
use crate::pg::sys;
use crate::shmem::Use;
use crate::store::services::{self, Service};
use crate::tokens::fields;
use crate::verify::limits;
use crate::verify::look_up::look_up_secret;
use tollgate_core::ancestry::{Ancestor, Ancestry, Id};
use tollgate_core::jws;
use tollgate_core::net::Net;
use tollgate_core::{service, status};

pub(crate) struct Issued {
    pub(crate) token: IssuedAccessToken,
    pub(crate) user_id: String,
    pub(crate) scopes: Vec<String>,
    pub(crate) audience: Vec<String>,
}

/// What a client has shown.
struct Proof {
    /// The secret, which the access token ends with.
    root: Option<Id>,
    /// When the secret ends, in microseconds since 2000-01-01.
    end: Option<i64>,
    /// The workload's token and its user, which the access token ends with.
    ancestors: Vec<Ancestor>,
    /// One that its client has signed is good once.
    single: Option<assertion::Single>,
}

/// Issues what was asked for. Fails where nothing can be issued, and never for a bad client.
pub(crate) fn client_credentials(request: &Request<'_>) -> Result<Result<Issued, Code>, Error> {
    if limits::blocked(request.client).is_some() {
        return Ok(Err(Code::RateLimited));
    }
    match attempt(request)? {
        Ok(issued) => Ok(Ok(issued)),
        Err(refusal) => refusal.conclude(request).map(Err),
    }
}

fn attempt(request: &Request<'_>) -> Result<Result<Issued, Refusal>, Error> {
    let user_id = service::user_id(request.client_id);
    // Read before all else: what takes something away from the account gives it a new one, and with an earlier one the token
    // is refused.
    let mark = revocations::mark_of(&user_id);
    let proof = match prove(request, &user_id)? {
        Ok(proof) => proof,
        Err(refusal) => return Ok(Err(refusal)),
    };
    let Some(account) = account(request.client_id) else {
        return Ok(Err(Refusal::client(Condition::Account)));
    };
    if account.is_disabled {
        return Ok(Err(Refusal::client(Condition::Disabled)));
    }
    let Some(scopes) = fields::narrowed(&account.scopes, request.scopes) else {
        return Ok(Err(Refusal::asked_beyond(Code::InsufficientScope)));
    };
    let Some(audience) = audience(&account, request.audience)? else {
        return Ok(Err(Refusal::asked_beyond(Code::WrongAudience)));
    };
    if let Some(single) = &proof.single
        && !single.consume(request.client_id)?
    {
        return Ok(Err(Refusal::client(Condition::Replayed)));
    }
    // A use of the secret is counted on that.
    if proof.root.is_none() {
        let used = Use { accepted: true, at: sys::GetCurrentTimestamp(), client: request.client };
        let (code, _) = limits::charge_use_of_user(&user_id, &used);
        if code != status::Code::Valid {
            return Ok(Err(Refusal::limited()));
        }
    }

    let longest = guc::max_access_token_lifetime();
    let ancestry = Ancestry { root: proof.root, from: proof.ancestors };
    let new = NewAccessToken {
        user_id: &user_id,
        scopes: &scopes,
        audience: &audience,
        lifetime: account.lifetime.unwrap_or_else(guc::access_token_lifetime).min(longest),
        own: "",
        session: None,
        client_id: Some(request.client_id),
        ancestry: &ancestry,
        act: None,
    };
    let token = issue::issue_within(&new, mark, proof.end)?;
    Ok(Ok(Issued { token, user_id, scopes, audience }))
}

fn account(id: &str) -> Option<Service> {
    services::service(id).filter(|_| service::is_id(id))
}

fn prove(request: &Request<'_>, user_id: &str) -> Result<Result<Proof, Refusal>, Error> {
    match request.credential {
        Credential::Secret(secret) => Ok(by_secret(secret, user_id, request.client)),
        Credential::Assertion(text) => {
            let parsed = match jws::parse(text) {
                Ok(parsed) => parsed,
                Err(fault) => return Ok(Err(Refusal::client(Condition::Malformed(fault)))),
            };
            // An issuer of the name of the client would be asked for no token.
            if parsed.claims.iss() == Some(request.client_id) {
                let single = assertion::prove(&parsed, request.client_id)?;
                Ok(single.map(|single| Proof {
                    root: None,
                    end: None,
                    ancestors: Vec::new(),
                    single: Some(single),
                }))
            } else {
                let ancestors = workload::prove(text, request);
                Ok(ancestors.map(|ancestors| Proof { root: None, end: None, ancestors, single: None }))
            }
        }
    }
}

fn by_secret(secret: &[u8], user_id: &str, client: Option<Net>) -> Result<Proof, Refusal> {
    let found = look_up_secret(secret, client).map_err(|code| match code {
        code if code.is_for_now() => Refusal::limited(),
        // A failed attempt was charged to the client where it is one.
        code => Refusal::charged(Condition::Secret(code)),
    })?;
    if found.user_id != user_id {
        return Err(Refusal::client(Condition::OfAnother));
    }
    Ok(Proof { root: Some(found.id), end: found.expires_at, ancestors: Vec::new(), single: None })
}

/// The audiences that were asked for, or all; `None` if the account has not one of them.
fn audience(account: &Service, asked: Option<TextArray<'_>>) -> Result<Option<Vec<String>>, Error> {
    let all = match &account.audience {
        Some(audience) => audience.clone(),
        None => issue::audience(None)?,
    };
    let Some(asked) = asked else { return Ok(Some(all)) };
    if !(1..=issue::MAX_AUDIENCES).contains(&asked.len()) || asked.has_nulls() {
        return Ok(None);
    }
    let asked: Vec<&[u8]> = asked.present().collect();
    let is_its = |one: &&[u8]| all.iter().any(|known| known.as_bytes() == *one);
    if !asked.iter().all(is_its) {
        return Ok(None);
    }
    Ok(Some(all.iter().filter(|one| asked.contains(&one.as_bytes())).cloned().collect()))
}
