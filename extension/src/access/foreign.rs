//! Tokens of trusted issuers: whether the issuer is trusted, which of its keys must have signed the token, and what comes
//! of it. The rules are in `tollgate_core::issuer`.

use super::{CLAIM, EPOCHS, WRONG_TYPE, revocations};
use crate::store::issuers::{self, Key};
use crate::{guc, shmem};
use tollgate_core::ancestry;
use tollgate_core::claims::Claims;
use tollgate_core::issuer::{Fault, Mapped, Rules, is_cut_off};
use tollgate_core::json;
use tollgate_core::jws::Parsed;
use tollgate_core::status::Code;
use tollgate_core::token::Digest;

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
    let Trusted { rules, algorithms, accepts_from, keys_given } = trusted(issuer).ok_or(UNTRUSTED)?;
    let Mapped { user_id, scopes, end } =
        rules.map(&parsed.header, &parsed.claims).map_err(|fault| match fault {
            Fault::Type => (Code::Malformed, Some(WRONG_TYPE)),
            Fault::Claim => (Code::Malformed, Some(CLAIM)),
            Fault::User => (Code::Malformed, Some(USER)),
            Fault::Required => (Code::UntrustedIssuer, Some(REQUIRED)),
        })?;
    let kid = parsed.header.kid.as_deref().ok_or((Code::UnknownKey, None))?;
    let Some(key) = issuers::key(issuer, kid) else {
        if !keys_given {
            shmem::note_unknown_key(issuer, now);
        }
        return Err((Code::UnknownKey, None));
    };
    if !algorithms.contains(&key.algorithm) {
        return Err((Code::UnknownKey, None));
    }
    let expires_at = end.saturating_add(guc::leeway()) - EPOCHS;
    let foreign = Foreign { rules, scopes, accepts_from };
    Ok(Accepted { key, user_id, expires_at, foreign })
}

/// How an issuer is trusted now.
struct Trusted {
    rules: Rules,
    algorithms: Vec<String>,
    /// Microseconds since 2000-01-01.
    accepts_from: Option<i64>,
    keys_given: bool,
}

fn trusted(issuer: &str) -> Option<Trusted> {
    let found = issuers::issuer(issuer)?;
    let rules = Rules {
        user_prefix: found.user_prefix,
        other_prefixes: found.other_prefixes,
        audience: found.audience,
        types: found.types,
        user_claim: found.user_claim,
        scope_claims: found.scope_claims,
        scopes: found.scopes,
        required: json::parse_object(&found.required_claims).ok()?,
        max_lifetime: found.max_lifetime * 1_000_000,
    };
    Some(Trusted {
        rules,
        algorithms: found.algorithms,
        accepts_from: found.accepts_from,
        keys_given: found.keys_given,
    })
}

/// A digest of how an issuer is trusted, and of the key that signed: with another one a token might not be accepted.
pub(crate) fn terms(rules: &Rules, key: &Digest) -> String {
    let key: String = key[..8].iter().map(|byte| format!("{byte:02x}")).collect();
    rules.digest() + &key
}

/// Whether a token that was accepted once, and from which ours came, would still be.
pub(crate) fn is_good(token: &ancestry::Foreign) -> bool {
    let Some(trusted) = trusted(&token.issuer) else { return false };
    let key = issuers::key(&token.issuer, &token.kid);
    key.is_some_and(|key| {
        trusted.algorithms.contains(&key.algorithm) && terms(&trusted.rules, &key.digest) == token.terms
    }) && !cuts_off(trusted.accepts_from, Some(token.issued_at))
        && !revocations::is_denied(&token.issuer, &token.jti)
}

/// Whether a token is refused that may have been issued before this time, in microseconds since 2000-01-01.
fn cuts_off(cut_off: Option<i64>, issued_at: Option<i64>) -> bool {
    cut_off.is_some_and(|at| is_cut_off(issued_at, at.saturating_add(EPOCHS), guc::leeway()))
}

impl Foreign {
    /// Whether it may have been issued before the trust in its issuer was renewed, or before this time, in microseconds
    /// since 2000-01-01.
    pub(crate) fn is_cut_off(&self, claims: &Claims, revoked_at: Option<i64>) -> bool {
        cuts_off(revoked_at.max(self.accepts_from), claims.iat())
    }

    pub(crate) fn rules(&self) -> &Rules {
        &self.rules
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
