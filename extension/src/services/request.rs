//! What a client asks for, and the answer in one word.

use crate::pg::datum::TextArray;
use pgrx::pg_sys::Datum;
use tollgate_core::net::Net;
use tollgate_core::status;

pub(crate) struct Request<'a> {
    pub(crate) client_id: &'a str,
    pub(crate) credential: Credential<'a>,
    pub(crate) scopes: Option<TextArray<'a>>,
    pub(crate) audience: Option<TextArray<'a>>,
    pub(crate) client: Option<Net>,
    /// The same, as an inet.
    pub(crate) client_ip: Option<Datum>,
}

pub(crate) enum Credential<'a> {
    Secret(&'a [u8]),
    Assertion(&'a str),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Code {
    Valid,
    /// Whatever is wrong with the client or its credentials.
    InvalidClient,
    InsufficientScope,
    WrongAudience,
    RateLimited,
}

impl Code {
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Code::Valid => "VALID",
            Code::InvalidClient => "INVALID_CLIENT",
            Code::InsufficientScope => status::Code::InsufficientScope.as_str(),
            Code::WrongAudience => status::Code::WrongAudience.as_str(),
            Code::RateLimited => status::Code::RateLimited.as_str(),
        }
    }
}
