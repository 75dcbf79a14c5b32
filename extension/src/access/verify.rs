//! The decision about a presented access token, except for its limits.
//!
//! What costs nothing comes first, so that a refused token is refused cheaply: size and form, issuer, then the key, and
//! only then the signature. The key is selected from the catalogue as it is now, and the signature checked with it once
//! (`shmem::knows_signature`); everything that can change is looked at each time.

use super::ancestry::Heir;
use super::foreign::{self, Foreign};
pub(crate) use super::presented::Presented;
use super::revocations::{self, Revocation};
use super::{CLAIM, EPOCHS, MARK, TYPE, WRONG_TYPE, id_of_digest, sessions};
use crate::store::probe::{Lookup, TokenRow};
use crate::store::public_keys::StoredKey;
use crate::verify::presented::Required;
use crate::verify::request::{Purpose, Request};
use crate::{guc, keys, pg, shmem};
use pgrx::pg_sys::{self, Datum};
use pgrx::{IntoDatum, Uuid, direct_function_call_as_datum};
use serde_json::value::RawValue;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ffi::CString;
use std::rc::Rc;
use std::sync::Arc;
use tollgate_core::ancestry::{self, Ancestor, Ancestry};
use tollgate_core::claims::Claims;
use tollgate_core::delegation::Chain;
use tollgate_core::issuer::{MAX_USER_ID, Rules};
use tollgate_core::json::Json;
use tollgate_core::jws::{self, Header, Parsed};
use tollgate_core::scope;
use tollgate_core::status::Code;
use tollgate_core::token::{self, Digest};

/// A reason of `MALFORMED`, beside those of the parser.
const MISSING: &str = "missing";

/// A token that one of our keys has signed, or one of a trusted issuer's.
pub(crate) struct AccessToken {
    claims: Claims,
    issuer: String,
    id: [u8; 16],
    user_id: String,
    /// Microseconds since 2000-01-01.
    expires_at: i64,
    origin: Origin,
    /// Of what was signed: the signature can be written in other ways.
    digest: Digest,
    /// That signed it.
    key: Rc<StoredKey>,
    header: Arc<Header>,
    /// The mark that its user has, as it was when this was judged.
    users_mark: Option<i64>,
}

enum Origin {
    Ours {
        /// The mark of the user, as it was when the token was issued.
        mark: Option<i64>,
        /// The session that it belongs to.
        session: Option<[u8; 16]>,
        /// What it came of, and ends with.
        ancestry: Ancestry,
    },
    Theirs(Box<Foreign>),
}

/// A token before its signature is checked.
struct Unchecked {
    /// That must have signed it.
    key: Rc<StoredKey>,
    /// `None` for one of its digest.
    id: Option<[u8; 16]>,
    user_id: String,
    expires_at: i64,
    origin: Origin,
}

/// What was presented, and why it is refused.
pub(crate) struct Judged {
    pub(crate) code: Code,
    /// For [`Code::Malformed`], and for a trusted issuer's token that is none of those that are accepted.
    pub(crate) reason: Option<&'static str>,
    /// `None` for one that no key has signed that it should.
    pub(crate) token: Option<AccessToken>,
    /// The API token that it came of, if it came of one; to be closed.
    pub(crate) root: Option<Lookup>,
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
        match &self.origin {
            Origin::Ours { session, .. } => *session,
            Origin::Theirs(_) => None,
        }
    }

    /// `None` for one of another issuer.
    pub(crate) fn ancestry(&self) -> Option<&Ancestry> {
        match &self.origin {
            Origin::Ours { ancestry, .. } => Some(ancestry),
            Origin::Theirs(_) => None,
        }
    }

    /// How its issuer is trusted; `None` for one of ours.
    pub(crate) fn terms(&self) -> Option<&Rules> {
        match &self.origin {
            Origin::Ours { .. } => None,
            Origin::Theirs(foreign) => Some(foreign.rules()),
        }
    }

    /// With this mark, what comes of it is refused if its user was revoked since it was judged.
    pub(crate) fn users_mark(&self) -> Option<i64> {
        self.users_mark
    }

    /// The key of its issuer, ours or another one, that signed it.
    pub(crate) fn kid(&self) -> &str {
        self.header.kid.as_deref().unwrap_or_default()
    }

    /// This token, in the list of what another one came of.
    pub(crate) fn as_ancestor(&self) -> Ancestor {
        match &self.origin {
            Origin::Ours { .. } => Ancestor::AccessToken(self.id),
            Origin::Theirs(foreign) => Ancestor::Foreign(ancestry::Foreign {
                issuer: self.issuer.clone(),
                jti: denial(&self.claims, &self.digest).into_owned(),
                issued_at: self.claims.iat().unwrap_or_default(),
                kid: self.kid().to_owned(),
                terms: foreign::terms(foreign.rules(), &self.key.digest),
            }),
        }
    }

    pub(crate) fn parsed_claims(&self) -> &Claims {
        &self.claims
    }

    pub(crate) fn scopes(&self) -> impl Iterator<Item = &str> {
        let (ours, theirs) = match &self.origin {
            Origin::Ours { .. } => (self.claims.scope().ok(), &[][..]),
            Origin::Theirs(foreign) => (None, &foreign.scopes[..]),
        };
        ours.into_iter().flatten().chain(theirs.iter().map(String::as_str))
    }

    pub(crate) fn grants(&self, required: &[u8]) -> bool {
        scope::any_grants(self.scopes().map(str::as_bytes), required)
    }

    /// All claims, as jsonb. What the parser accepts PostgreSQL reads.
    pub(crate) fn claims(&self) -> Option<Datum> {
        pg::jsonb::of_object(self.claims.members()).or_else(|| jsonb(self.claims.as_str()))
    }

    /// Its actors, the outermost first, as users are named here; `None` for a claim `act` that does not name them so.
    pub(crate) fn actors(&self) -> Option<Chain> {
        let Some(act) = self.claims.get("act") else { return Some(Chain::default()) };
        Chain::parse(act, |issuer, sub| match self.terms() {
            None => issuer.is_none().then(|| sub.to_owned()),
            Some(rules) if issuer.is_none_or(|issuer| issuer == self.issuer) => rules.user_named(sub),
            Some(_) => None,
        })
    }

    /// The claim `act`, as JSON. What another issuer calls its actors may be the name of a user or a service account here, so
    /// they get the names that its users have; if that cannot be done, there is an actor without a name.
    pub(crate) fn actor(&self) -> Option<String> {
        if self.terms().is_none() {
            return self.claim("act");
        }
        self.claims.get("act")?;
        Some(self.actors().and_then(|actors| actors.to_json()).unwrap_or_else(|| "{}".to_owned()))
    }

    /// A claim, as JSON.
    pub(crate) fn claim(&self, name: &str) -> Option<String> {
        let value = self.claims.get(name)?;
        if value.is_exact() {
            return serde_json::to_string(value).ok();
        }
        self.as_signed().get(name).map(|value| value.get().to_owned())
    }

    /// The claims with these names, as JSON.
    pub(crate) fn claims_named<'n>(&self, names: impl Iterator<Item = &'n str>) -> String {
        let kept: BTreeMap<&str, &Json> =
            names.filter_map(|name| self.claims.get(name).map(|value| (name, value))).collect();
        let written = if kept.values().all(|value| value.is_exact()) {
            serde_json::to_string(&kept)
        } else {
            let mut all = self.as_signed();
            all.retain(|name, _| kept.contains_key(name.as_str()));
            serde_json::to_string(&all)
        };
        written.unwrap_or_default()
    }

    /// For claims that have numbers which are not kept as they were written.
    fn as_signed(&self) -> BTreeMap<String, &RawValue> {
        serde_json::from_str(self.claims.as_str()).unwrap_or_default()
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
        Err((code, reason)) => Judged { code, reason, token: None, root: None },
        Ok(mut token) => {
            let revocation = revocations::of_user(&token.user_id);
            token.users_mark = revocation.map(|revocation| revocation.mark);
            let root = token.ancestry().and_then(|ancestry| ancestry.root).map(|id| Lookup::open_id(&id));
            let root_row = root.as_ref().and_then(Lookup::token);
            let (code, reason) = refusal(&token, revocation, root_row, presented, request, now())
                .map_or((Code::Valid, None), |r| r);
            Judged { code, reason, token: Some(token), root }
        }
    }
}

/// Checks the form, the issuer, the key and the signature.
fn open(presented: &Presented<'_>, now: &impl Fn() -> i64) -> Result<AccessToken, Refused> {
    let text = presented.token.ok_or((Code::Malformed, Some(MISSING)))?;
    let parsed = jws::parse(text).map_err(|fault| (Code::Malformed, Some(fault.as_str())))?;
    let issuer = parsed.claims.iss().ok_or((Code::Malformed, Some(CLAIM)))?.to_owned();
    let Unchecked { key, id, user_id, expires_at, origin } =
        if guc::issuer() == Some(&issuer) { ours(&parsed)? } else { theirs(&parsed, &issuer, now())? };

    let digest = token::digest(parsed.signing_input);
    let seen = shmem::signature_key(&key.algorithm, &key.digest, &digest, &parsed.signature);
    if !shmem::knows_signature(&seen) {
        if !key.key().is_some_and(|key| parsed.is_signed_by(key)) {
            return Err((Code::BadSignature, None));
        }
        // Tokens that are over do not take the room of others.
        if expires_at > now() {
            shmem::note_signature(&seen);
        }
    }
    let id = id.unwrap_or_else(|| id_of_digest(&digest));
    Ok(AccessToken {
        claims: parsed.claims,
        issuer,
        id,
        user_id,
        expires_at,
        origin,
        digest,
        key,
        header: parsed.header,
        users_mark: None,
    })
}

fn ours(parsed: &Parsed<'_>) -> Result<Unchecked, Refused> {
    let malformed = || (Code::Malformed, Some(CLAIM));
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
    let ancestry = Ancestry::of(claims).map_err(|_| malformed())?;

    let kid = parsed.header.kid.as_deref().ok_or((Code::UnknownKey, None))?;
    let key = keys::public_key_of(kid).ok_or((Code::UnknownKey, None))?;
    let origin = Origin::Ours { mark, session, ancestry };
    Ok(Unchecked { key, id: Some(id), user_id, expires_at, origin })
}

fn theirs(parsed: &Parsed<'_>, issuer: &str, now: i64) -> Result<Unchecked, Refused> {
    let foreign::Accepted { key, user_id, expires_at, foreign } = foreign::accept(parsed, issuer, now)?;
    let origin = Origin::Theirs(Box::new(foreign));
    Ok(Unchecked { key, id: None, user_id, expires_at, origin })
}

/// Under which id a token is listed when it is revoked: its jti, or the digest of what was signed where it has none that
/// can be stored.
fn denial<'c>(claims: &'c Claims, digest: &Digest) -> Cow<'c, str> {
    const LONGEST: usize = 255;
    match claims.jti() {
        Some(jti) if (1..=LONGEST).contains(&jti.chars().count()) && !token::contains_secret(jti) => {
            Cow::Borrowed(jti)
        }
        _ => Cow::Owned(uuid::Uuid::from_bytes(id_of_digest(digest)).to_string()),
    }
}

/// Under which issuer and id a token is listed when it is revoked; `None` for one that cannot be read.
pub(crate) fn denial_of(token: &str) -> Option<[String; 2]> {
    let parsed = jws::parse(token).ok()?;
    let issuer = parsed.claims.iss()?.to_owned();
    let denial = denial(&parsed.claims, &token::digest(parsed.signing_input));
    Some([issuer, denial.into_owned()])
}

/// Why a token is refused that was signed as it should be. In the order of the codes.
fn refusal(
    token: &AccessToken,
    revocation: Option<Revocation>,
    root: Option<&TokenRow>,
    presented: &Presented<'_>,
    request: &Request<'_>,
    now: i64,
) -> Option<Refused> {
    let refuse = |code| Some((code, None));
    let claims = &token.claims;
    let is_revoked = match &token.origin {
        Origin::Ours { mark, .. } => revocation.is_some_and(|revocation| *mark != Some(revocation.mark)),
        Origin::Theirs(foreign) => foreign.is_cut_off(claims, revocation.map(|revocation| revocation.at)),
    };
    if is_revoked || revocations::is_denied(&token.issuer, &denial(claims, &token.digest)) {
        return refuse(Code::Revoked);
    }
    if let Some(session) = &token.session()
        && !sessions::is_live(session, &token.user_id, revocation.map(|revocation| revocation.mark))
    {
        return refuse(Code::Revoked);
    }
    let inherited = match token.ancestry() {
        // One that is refused for now can still be revoked.
        Some(ancestry) if request.purpose != Purpose::End && !ancestry.is_empty() => {
            let scopes = token.scopes().collect();
            Heir { ancestry, user_id: &token.user_id, scopes, client: request.client }.fault(root, now)
        }
        _ => None,
    };
    if let Some(code) = inherited.filter(|code| code.index() < Code::NotYetValid.index()) {
        return refuse(code);
    }
    let times = match &token.origin {
        Origin::Ours { .. } => claims.check_times(now + EPOCHS, 0),
        Origin::Theirs(foreign) => foreign.check_times(claims, now),
    };
    if let Err(code) = times {
        return refuse(code);
    }
    if request.purpose == Purpose::End {
        return None;
    }
    let is_for_us = match &token.origin {
        Origin::Ours { .. } if request.purpose.is_for_any_audience() => true,
        Origin::Ours { .. } => {
            let audience = presented.audience.or(guc::audience()).filter(|audience| !audience.is_empty());
            audience.is_some_and(|audience| claims.aud().any(|one| one == audience))
        }
        Origin::Theirs(foreign) => foreign.is_for(claims, presented.audience),
    };
    if !is_for_us {
        return refuse(Code::WrongAudience);
    }
    if let Some(code) = inherited {
        return refuse(code);
    }
    let granted = |one: Option<&[u8]>| one.is_some_and(|one| token.grants(one));
    let granted = match &request.required {
        Required::Nothing => true,
        Required::One(one) => granted(*one),
        Required::All(_) | Required::Joined(_) => request.required.iter().all(granted),
    };
    if granted { None } else { refuse(Code::InsufficientScope) }
}

/// A uuid, in the one way in which we write it, by which it is also revoked.
fn uuid_of(jti: &str) -> Option<[u8; 16]> {
    let uuid = uuid::Uuid::try_parse(jti).ok()?;
    let mut written = uuid::Uuid::encode_buffer();
    (uuid.hyphenated().encode_lower(&mut written) == jti).then(|| *uuid.as_bytes())
}

pub(crate) fn uuid_datum(id: [u8; 16]) -> Option<Datum> {
    Uuid::from_bytes(id).into_datum()
}
