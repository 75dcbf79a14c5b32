//! The decision about a presented access token, except for its limits.
//!
//! What costs nothing comes first, so that a refused token is refused cheaply: size and form, issuer, then the key, and
//! only then the signature. The key is selected from the catalogue as it is now, and the signature checked with it once
//! (`shmem::knows_signature`); everything that can change is looked at each time.

pub(crate) use super::presented::Presented;
use super::{EPOCHS, MARK, MAX_USER_ID, TYPE, revocations, sessions};
use crate::verify::presented::Required;
use crate::verify::request::{Purpose, Request};
use crate::{guc, keys, shmem};
use core::cell::RefCell;
use pgrx::pg_sys::{self, Datum};
use pgrx::{IntoDatum, Uuid, direct_function_call_as_datum};
use serde_json::value::RawValue;
use std::collections::BTreeMap;
use std::ffi::CString;
use tollgate_core::claims::Claims;
use tollgate_core::jws;
use tollgate_core::scope;
use tollgate_core::signature::PublicKey;
use tollgate_core::status::Code;
use tollgate_core::token::{self, Digest};

/// Reasons of `MALFORMED`, beside those of the parser.
const MISSING: &str = "missing";
const WRONG_TYPE: &str = "type";
const CLAIM: &str = "claim";

/// A token that one of our keys has signed.
pub(crate) struct AccessToken {
    claims: Claims,
    issuer: String,
    id: [u8; 16],
    user_id: String,
    /// Microseconds since 2000-01-01.
    expires_at: i64,
    mark: Option<i64>,
    /// The session that it belongs to.
    session: Option<[u8; 16]>,
    /// Of what was signed: the signature can be written in other ways.
    digest: Digest,
}

/// What was presented, and why it is refused.
pub(crate) struct Judged {
    pub(crate) code: Code,
    /// For [`Code::Malformed`].
    pub(crate) reason: Option<&'static str>,
    /// `None` for one that none of our keys has signed.
    pub(crate) token: Option<AccessToken>,
}

type Refused = (Code, Option<&'static str>);

impl AccessToken {
    pub(crate) fn id(&self) -> [u8; 16] {
        self.id
    }

    pub(crate) fn user_id(&self) -> &str {
        &self.user_id
    }

    pub(crate) fn issuer(&self) -> &str {
        &self.issuer
    }

    pub(crate) fn expires_at(&self) -> i64 {
        self.expires_at
    }

    pub(crate) fn digest(&self) -> Digest {
        self.digest
    }

    pub(crate) fn session(&self) -> Option<[u8; 16]> {
        self.session
    }

    pub(crate) fn scopes(&self) -> impl Iterator<Item = &str> {
        self.claims.scope().into_iter().flatten()
    }

    pub(crate) fn grants(&self, required: &[u8]) -> bool {
        scope::any_grants(self.scopes().map(str::as_bytes), required)
    }

    /// All claims, as jsonb. What the parser accepts PostgreSQL reads.
    pub(crate) fn claims(&self) -> Option<Datum> {
        jsonb(self.claims.as_str())
    }

    /// The claims with these names, as JSON, each as it was signed.
    pub(crate) fn claims_named<'n>(&self, names: impl Iterator<Item = &'n str>) -> String {
        let all: BTreeMap<&str, &RawValue> = serde_json::from_str(self.claims.as_str()).unwrap_or_default();
        let kept: BTreeMap<&str, &RawValue> =
            names.filter_map(|name| all.get(name).map(|value| (name, *value))).collect();
        serde_json::to_string(&kept).unwrap_or_default()
    }
}

/// A text that is JSON, as jsonb.
pub(crate) fn jsonb(text: &str) -> Option<Datum> {
    let text = CString::new(text).ok()?;
    // SAFETY: the input function of jsonb takes a C string and returns a value of that type.
    #[allow(unsafe_code)]
    unsafe {
        direct_function_call_as_datum(pg_sys::jsonb_in, &[Some(Datum::from(text.as_ptr()))])
    }
}

pub(crate) fn judge(presented: &Presented<'_>, request: &Request<'_>, now: impl Fn() -> i64) -> Judged {
    match open(presented, &now) {
        Err((code, reason)) => Judged { code, reason, token: None },
        Ok(token) => {
            let (code, reason) =
                refusal(&token, presented, request, now()).map_or((Code::Valid, None), |r| r);
            Judged { code, reason, token: Some(token) }
        }
    }
}

/// Checks the form, the issuer, the key and the signature.
fn open(presented: &Presented<'_>, now: &impl Fn() -> i64) -> Result<AccessToken, Refused> {
    let text = presented.token.ok_or((Code::Malformed, Some(MISSING)))?;
    let parsed = jws::parse(text).map_err(|fault| (Code::Malformed, Some(fault.as_str())))?;
    let malformed = || (Code::Malformed, Some(CLAIM));

    let issuer = parsed.claims.iss().ok_or_else(malformed)?.to_owned();
    if guc::issuer() != Some(&issuer) {
        return Err((Code::UntrustedIssuer, None));
    }
    if !parsed.header.is_type(TYPE) {
        return Err((Code::Malformed, Some(WRONG_TYPE)));
    }
    let claims = &parsed.claims;
    let user_id = claims.sub().ok_or_else(malformed)?.to_owned();
    if !(1..=MAX_USER_ID).contains(&user_id.chars().count()) || claims.scope().is_err() {
        return Err(malformed());
    }
    let id = claims.jti().and_then(uuid_of).ok_or_else(malformed)?;
    let expires_at = claims.exp().ok_or_else(malformed)? - EPOCHS;
    let mark = claims.integer(MARK).map_err(|_| malformed())?;
    let session = match claims.sid() {
        Ok(None) => None,
        Ok(Some(sid)) => Some(uuid_of(sid).ok_or_else(malformed)?),
        Err(_) => return Err(malformed()),
    };

    let kid = parsed.header.kid.as_deref().ok_or((Code::UnknownKey, None))?;
    let key = keys::public_key_of(kid).ok_or((Code::UnknownKey, None))?;
    let seen =
        shmem::signature_key(key.algorithm.as_str(), &token::digest(key.jwk.as_bytes()), text.as_bytes());
    if !shmem::knows_signature(&seen) {
        if !with_key(&key.jwk, |key| parsed.is_signed_by(key)) {
            return Err((Code::BadSignature, None));
        }
        // Tokens that are over do not take the room of others.
        if expires_at > now() {
            shmem::note_signature(&seen);
        }
    }
    let digest = token::digest(parsed.signing_input);
    Ok(AccessToken { claims: parsed.claims, issuer, id, user_id, expires_at, mark, session, digest })
}

thread_local! {
    /// Keys that were parsed lately, by the JWK that the catalogue has: to parse one takes a good part of the time that
    /// checking a signature takes.
    static PARSED: RefCell<Vec<(String, PublicKey)>> = const { RefCell::new(Vec::new()) };
}

/// What is asked of the key, false if it is no key.
fn with_key(jwk: &str, ask: impl FnOnce(&PublicKey) -> bool) -> bool {
    const KEPT: usize = 8;
    PARSED.with_borrow_mut(|parsed| {
        if let Some((_, key)) = parsed.iter().find(|(known, _)| known == jwk) {
            return ask(key);
        }
        let Ok(key) = PublicKey::from_jwk(jwk) else { return false };
        if parsed.len() >= KEPT {
            parsed.remove(0);
        }
        parsed.push((jwk.to_owned(), key));
        parsed.last().is_some_and(|(_, key)| ask(key))
    })
}

/// Why a token of ours is refused. In the order of the codes.
fn refusal(
    token: &AccessToken,
    presented: &Presented<'_>,
    request: &Request<'_>,
    now: i64,
) -> Option<Refused> {
    let refuse = |code| Some((code, None));
    let jti = token.claims.jti().unwrap_or_default();
    let mark = revocations::mark_of(&token.user_id);
    if revocations::is_denied(&token.issuer, jti) || mark.is_some_and(|mark| token.mark != Some(mark)) {
        return refuse(Code::Revoked);
    }
    if let Some(session) = &token.session
        && !sessions::is_live(session, &token.user_id, mark)
    {
        return refuse(Code::Revoked);
    }
    if let Err(code) = token.claims.check_times(now + EPOCHS, 0) {
        return refuse(code);
    }
    if request.purpose == Purpose::End {
        return None;
    }
    let audience = presented.audience.or(guc::audience()).filter(|audience| !audience.is_empty());
    if !audience.is_some_and(|audience| token.claims.aud().any(|one| one == audience)) {
        return refuse(Code::WrongAudience);
    }
    let granted = |one: Option<&[u8]>| one.is_some_and(|one| token.grants(one));
    let granted = match &request.required {
        Required::Nothing => true,
        Required::One(one) => granted(*one),
        Required::All(all) => all.iter().all(granted),
    };
    if granted { None } else { refuse(Code::InsufficientScope) }
}

/// A uuid, in the one way in which we write it, by which it is also revoked.
fn uuid_of(jti: &str) -> Option<[u8; 16]> {
    let uuid = uuid::Uuid::try_parse(jti).ok()?;
    (uuid.hyphenated().to_string() == jti).then(|| *uuid.as_bytes())
}

pub(crate) fn uuid_datum(id: [u8; 16]) -> Option<Datum> {
    Uuid::from_bytes(id).into_datum()
}
