//! The verification codes, and the order of the checks.

use std::fmt;

/// The `code` of a verification.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Code {
    Valid,
    /// Not in the format of a token, or its checksum is wrong.
    Malformed,
    /// A signed token of an issuer that is not trusted.
    UntrustedIssuer,
    /// A signed token by a key that its issuer does not have, or no longer.
    UnknownKey,
    /// The key did not make this signature.
    BadSignature,
    /// In the format of a token, but not stored.
    NotFound,
    Revoked,
    Disabled,
    Expired,
    /// A signed token from the future.
    NotYetValid,
    /// A signed token that is for others, or no audience is configured.
    WrongAudience,
    /// The token is bound to networks, and the client's address is in none of them or unknown.
    IpNotAllowed,
    InsufficientScope,
    RateLimited,
    /// The token, or its user, has spent its quota.
    QuotaExceeded,
}

impl Code {
    /// Every code, at the position that [`Code::index`] returns.
    pub const ALL: [Code; 15] = [
        Code::Valid,
        Code::Malformed,
        Code::UntrustedIssuer,
        Code::UnknownKey,
        Code::BadSignature,
        Code::NotFound,
        Code::Revoked,
        Code::Disabled,
        Code::Expired,
        Code::NotYetValid,
        Code::WrongAudience,
        Code::IpNotAllowed,
        Code::InsufficientScope,
        Code::RateLimited,
        Code::QuotaExceeded,
    ];

    /// The code as SQL returns it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Code::Valid => "VALID",
            Code::Malformed => "MALFORMED",
            Code::UntrustedIssuer => "UNTRUSTED_ISSUER",
            Code::UnknownKey => "UNKNOWN_KEY",
            Code::BadSignature => "BAD_SIGNATURE",
            Code::NotFound => "NOT_FOUND",
            Code::Revoked => "REVOKED",
            Code::Disabled => "DISABLED",
            Code::Expired => "EXPIRED",
            Code::NotYetValid => "NOT_YET_VALID",
            Code::WrongAudience => "WRONG_AUDIENCE",
            Code::IpNotAllowed => "IP_NOT_ALLOWED",
            Code::InsufficientScope => "INSUFFICIENT_SCOPE",
            Code::RateLimited => "RATE_LIMITED",
            Code::QuotaExceeded => "QUOTA_EXCEEDED",
        }
    }

    /// Whether it is a failed attempt: not a token, or not one that is currently usable from that address.
    pub const fn is_failed_attempt(self) -> bool {
        !matches!(self, Code::Valid | Code::InsufficientScope | Code::RateLimited | Code::QuotaExceeded)
    }

    /// Whether a later attempt may succeed: a limit or a quota was used up.
    pub const fn is_for_now(self) -> bool {
        matches!(self, Code::RateLimited | Code::QuotaExceeded)
    }

    /// The position of this code in [`Code::ALL`], for arrays of counters.
    pub const fn index(self) -> usize {
        self as usize
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// The decision about a stored token, except for limits and quotas, which are charged only after this has returned
/// [`Code::Valid`].
///
/// The first fault in the order of [`Code::ALL`] is reported. Times are microseconds since any one epoch; a token ends
/// at `expires_at`, not after it, so PostgreSQL's `-infinity` (`i64::MIN`) has always ended and `infinity` never. The
/// address and the scopes are checked only if no earlier check has decided.
#[inline]
pub fn decide(
    revoked: bool,
    disabled: bool,
    expires_at: Option<i64>,
    now: i64,
    ip_allowed: impl FnOnce() -> bool,
    scopes_ok: impl FnOnce() -> bool,
) -> Code {
    if revoked {
        Code::Revoked
    } else if disabled {
        Code::Disabled
    } else if expires_at.is_some_and(|end| end <= now) {
        Code::Expired
    } else if !ip_allowed() {
        Code::IpNotAllowed
    } else if !scopes_ok() {
        Code::InsufficientScope
    } else {
        Code::Valid
    }
}
