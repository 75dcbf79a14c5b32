//! Why a text is no signed token (RFC 7515, RFC 7519), whatever key would be tried.

use std::error::Error;
use std::fmt;

use crate::json;

/// Why a text is no signed token of ours or of a trusted issuer, whatever key would be tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fault {
    /// Longer than [`MAX_LEN`].
    Size,
    /// Not three parts with dots between them, or no header, payload or signature.
    Parts,
    /// A part is not base64url without padding, or not the one way to write its bytes.
    Encoding,
    /// The header or the payload is not JSON, or not an object.
    Json,
    /// Two members of an object have the same name.
    DuplicateName,
    /// Nested too deeply.
    Depth,
    /// A text contains U+0000.
    Nul,
    /// A parameter of the header is missing or has the wrong type, or `kid` is too long.
    Header,
    /// `alg` is none of ours: `none`, HMAC and misspelt names are not either.
    Algorithm,
    /// `crit` or `b64`: an extension that must be understood, and none is.
    Critical,
    /// A registered claim has the wrong type, or a time is out of range.
    Claim,
}

impl Fault {
    pub const ALL: [Fault; 11] = [
        Fault::Size,
        Fault::Parts,
        Fault::Encoding,
        Fault::Json,
        Fault::DuplicateName,
        Fault::Depth,
        Fault::Nul,
        Fault::Header,
        Fault::Algorithm,
        Fault::Critical,
        Fault::Claim,
    ];

    /// The name in SQL and in the log.
    pub const fn as_str(self) -> &'static str {
        match self {
            Fault::Size => "size",
            Fault::Parts => "parts",
            Fault::Encoding => "encoding",
            Fault::Json => "json",
            Fault::DuplicateName => "duplicate-name",
            Fault::Depth => "depth",
            Fault::Nul => "nul",
            Fault::Header => "header",
            Fault::Algorithm => "algorithm",
            Fault::Critical => "critical",
            Fault::Claim => "claim",
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl Error for Fault {}

impl From<json::Fault> for Fault {
    fn from(fault: json::Fault) -> Self {
        match fault {
            json::Fault::DuplicateName => Fault::DuplicateName,
            json::Fault::Depth => Fault::Depth,
            json::Fault::Nul => Fault::Nul,
            json::Fault::Syntax | json::Fault::Exponent | json::Fault::NotAnObject => Fault::Json,
        }
    }
}
