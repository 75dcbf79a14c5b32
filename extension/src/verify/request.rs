//! A verification request: which credential is presented, from where, what for, and which scopes it must have.
#![allow(unsafe_code)]

use super::presented::{Presented, Required};
use crate::access::presented::Presented as PresentedAccessToken;
use crate::pg::datum;
use crate::pg::fmgr::Call;
use crate::shmem::Timer;
use core::ffi::CStr;
use tollgate_core::jws;
use tollgate_core::net::Net;
use tollgate_core::token::{Digest, Fault};

/// The functions that return a row of type `verification`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Function {
    VerifyApiToken,
    VerifyApiTokenHash,
    Authenticate,
    VerifyAccessToken,
}

impl Function {
    pub(crate) const ALL: [Function; 4] = [
        Function::VerifyApiToken,
        Function::VerifyApiTokenHash,
        Function::Authenticate,
        Function::VerifyAccessToken,
    ];

    pub(crate) const fn name(self) -> &'static CStr {
        match self {
            Function::VerifyApiToken => c"verify_api_token",
            Function::VerifyApiTokenHash => c"verify_api_token_hash",
            Function::Authenticate => c"authenticate",
            Function::VerifyAccessToken => c"verify_access_token",
        }
    }
}

/// The address that the application saw, in an argument.
pub(crate) fn client(call: &Call, argument: usize) -> Option<Net> {
    call.bytes(argument).and_then(datum::net)
}

/// What is presented.
pub(crate) enum Credential<'a> {
    ApiToken(Presented<'a>),
    AccessToken(PresentedAccessToken<'a>),
}

impl<'a> Credential<'a> {
    /// Of whatever kind it has the form of; `audience` is for a signed token.
    pub(crate) fn of_any_kind(token: Option<&'a str>, audience: Option<&'a str>) -> Self {
        match token {
            Some(text) if jws::is_signed(text.as_bytes()) => {
                Credential::AccessToken(PresentedAccessToken { token, audience })
            }
            _ => Credential::ApiToken(Presented::to_verify(token.map(str::as_bytes))),
        }
    }
}

pub(crate) struct Request<'a> {
    /// Started before the token was parsed.
    pub(crate) timer: Option<Timer>,
    pub(crate) presented: Credential<'a>,
    pub(crate) required: Required<'a>,
    /// The address that the application saw, never the peer of the database connection.
    pub(crate) client: Option<Net>,
    pub(crate) purpose: Purpose,
}

/// The purpose for which a token is presented.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// A use of the token, which is charged to its limits.
    Use,
    /// A use that makes it the identity of the transaction.
    Bind,
    /// A use for another token. One of ours may be for any audience here: what it gets is for no others.
    Exchange,
    /// To check for a scope. For this and the following, failed attempts are counted and outcomes are logged, but
    /// nothing is counted or charged to the token.
    Check,
    /// To say what it is, whatever its audience.
    Introspect,
    /// To derive another, which inherits its networks: allowed from any address.
    Derive,
    /// To revoke it: allowed from any address.
    End,
}

impl Purpose {
    pub(crate) fn is_use(self) -> bool {
        matches!(self, Purpose::Use | Purpose::Bind | Purpose::Exchange)
    }

    pub(crate) fn is_for_any_audience(self) -> bool {
        matches!(self, Purpose::Exchange | Purpose::Introspect)
    }

    pub(crate) fn is_from_anywhere(self) -> bool {
        matches!(self, Purpose::Derive | Purpose::End)
    }
}

/// The digest in the first argument.
pub(super) fn given_digest(call: &Call) -> Result<Digest, Fault> {
    call.bytes(0).ok_or(Fault::Missing)?.try_into().map_err(|_| Fault::Length)
}
