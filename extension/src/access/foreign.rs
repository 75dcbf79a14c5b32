//! Tokens of trusted issuers: whether the issuer is trusted, which of its keys must have signed the token, and what comes
//! of it. The rules are in `tollgate_core::issuer`.

use super::{CLAIM, EPOCHS, WRONG_TYPE};
use crate::store::issuers::{self, Key};
use crate::{guc, shmem};
use tollgate_core::claims::Claims;
use tollgate_core::issuer::{Fault, Mapped, Rules, is_cut_off};
use tollgate_core::json;
use tollgate_core::jws::Parsed;
use tollgate_core::status::Code;

/// Reasons, beside those of tokens of ours.
const USER: &str = "user";
const REQUIRED: &str = "required_claims";

/// What of the trust in an issuer is asked about a token that it has signed.
pub(crate) struct Foreign {
    rules: Rules,
    pub(crate) scopes: Vec<String>,
    /// Microseconds since 2000-01-01.
    accepts_from: Option<i64>,
}

/// A token as its issuer may have signed it.
pub(crate) struct Accepted {
    /// That must have signed it.
    pub(crate) key: Key,
    pub(crate) user_id: String,
    /// From when on it is refused, in microseconds since 2000-01-01.
    pub(crate) expires_at: i64,
    pub(crate) foreign: Foreign,
}

pub(crate) fn accept(
    parsed: &Parsed<'_>,
    issuer: &str,
    now: i64,
) -> Result<Accepted, (Code, Option<&'static str>)> {
    const UNTRUSTED: (Code, Option<&str>) = (Code::UntrustedIssuer, None);
    let trusted = issuers::issuer(issuer).ok_or(UNTRUSTED)?;
    let rules = Rules {
        user_prefix: trusted.user_prefix,
        other_prefixes: trusted.other_prefixes,
        audience: trusted.audience,
        types: trusted.types,
        user_claim: trusted.user_claim,
        scope_claims: trusted.scope_claims,
        scopes: trusted.scopes,
        required: json::parse_object(&trusted.required_claims).map_err(|_| UNTRUSTED)?,
        max_lifetime: trusted.max_lifetime * 1_000_000,
    };
    let Mapped { user_id, scopes, end } =
        rules.map(&parsed.header, &parsed.claims).map_err(|fault| match fault {
            Fault::Type => (Code::Malformed, Some(WRONG_TYPE)),
            Fault::Claim => (Code::Malformed, Some(CLAIM)),
            Fault::User => (Code::Malformed, Some(USER)),
            Fault::Required => (Code::UntrustedIssuer, Some(REQUIRED)),
        })?;
    let kid = parsed.header.kid.as_deref().ok_or((Code::UnknownKey, None))?;
    let Some(key) = issuers::key(issuer, kid) else {
        if !trusted.keys_given {
            shmem::note_unknown_key(issuer, now);
        }
        return Err((Code::UnknownKey, None));
    };
    if !trusted.algorithms.contains(&key.algorithm) {
        return Err((Code::UnknownKey, None));
    }
    let expires_at = end.saturating_add(guc::leeway()) - EPOCHS;
    let foreign = Foreign { rules, scopes, accepts_from: trusted.accepts_from };
    Ok(Accepted { key, user_id, expires_at, foreign })
}

impl Foreign {
    /// Whether it may have been issued before the trust in its issuer was renewed, or before this time, in microseconds
    /// since 2000-01-01.
    pub(crate) fn is_cut_off(&self, claims: &Claims, revoked_at: Option<i64>) -> bool {
        let cut_off = revoked_at.max(self.accepts_from);
        cut_off.is_some_and(|at| is_cut_off(claims, at.saturating_add(EPOCHS), guc::leeway()))
    }

    /// `now` is in microseconds since 2000-01-01.
    pub(crate) fn check_times(&self, claims: &Claims, now: i64) -> Result<(), Code> {
        self.rules.check_times(claims, now + EPOCHS, guc::leeway())
    }

    /// Whether it is for one of the audiences of the issuer, and for the one that the caller names, if any.
    pub(crate) fn is_for(&self, claims: &Claims, named: Option<&str>) -> bool {
        self.rules.is_for(claims)
            && named.is_none_or(|named| !named.is_empty() && claims.aud().any(|one| one == named))
    }
}
