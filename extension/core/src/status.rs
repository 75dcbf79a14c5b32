//! The verdicts on a presented token, and the order in which its faults are looked for.

use std::fmt;

/// The `code` of a verification.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Code {
    Valid,
    /// Not in the shape of a token, or its checksum does not fit.
    Malformed,
    /// In the shape of a token, but none that is stored.
    NotFound,
    Revoked,
    Disabled,
    Expired,
    /// The token is bound to networks, and the client's address is in none of them or unknown.
    IpNotAllowed,
    InsufficientScope,
    RateLimited,
}

impl Code {
    /// Every code, each at the place that [`Code::index`] says.
    pub const ALL: [Code; 9] = [
        Code::Valid,
        Code::Malformed,
        Code::NotFound,
        Code::Revoked,
        Code::Disabled,
        Code::Expired,
        Code::IpNotAllowed,
        Code::InsufficientScope,
        Code::RateLimited,
    ];

    /// The code as SQL returns it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Code::Valid => "VALID",
            Code::Malformed => "MALFORMED",
            Code::NotFound => "NOT_FOUND",
            Code::Revoked => "REVOKED",
            Code::Disabled => "DISABLED",
            Code::Expired => "EXPIRED",
            Code::IpNotAllowed => "IP_NOT_ALLOWED",
            Code::InsufficientScope => "INSUFFICIENT_SCOPE",
            Code::RateLimited => "RATE_LIMITED",
        }
    }

    /// Whether nobody was authenticated: the token is not one, or not one that is good now and from there.
    pub const fn is_failed_attempt(self) -> bool {
        !matches!(self, Code::Valid | Code::InsufficientScope | Code::RateLimited)
    }

    /// The place of this code in [`Code::ALL`], for arrays of counters.
    pub const fn index(self) -> usize {
        self as usize
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// The verdict on a stored token, short of its rate limit: that is charged only after this has said [`Code::Valid`].
///
/// The first fault in the order of [`Code::ALL`] is the one reported. Times are microseconds since any one epoch; a token
/// ends at `expires_at`, not after it, so PostgreSQL's `-infinity` (`i64::MIN`) has always ended and `infinity` never.
/// The address and the scopes are looked at only when nothing before them has decided.
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
