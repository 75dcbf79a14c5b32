//! Token exchange (RFC 8693): an access token of ours for a presented token of any kind, and for a second one, of the actor
//! who asks for it. What comes of it is never wider than the subject's token, and ends with both.
//!
//! Nothing is stored, so it works on a standby. Each of the two is judged by what is committed now; the new token names
//! what it came of (`tollgate_core::ancestry`), so that what is revoked in between ends it too.

use super::issue::{self, IssuedAccessToken, NewAccessToken};
use super::verify::AccessToken;
use super::{EPOCHS, presented, revocations};
use crate::error::Error;
use crate::guc;
use crate::pg::datum::TextArray;
use crate::pg::sys;
use crate::shmem::Timer;
use crate::store::probe::{Column, TokenRow};
use crate::store::services;
use crate::tokens::fields;
use crate::verify::presented::{Presented, Required};
use crate::verify::request::{Credential, Purpose, Request as Verification};
use crate::verify::verdict::{Accepted, Verdict};
use pgrx::Uuid;
use tollgate_core::ancestry::{Ancestor, Ancestry, Id};
use tollgate_core::delegation::{Chain, MayAct};
use tollgate_core::net::Net;
use tollgate_core::{service, status};

/// Of what is issued (RFC 8693 section 3).
pub(crate) const ISSUED_TYPE: &str = "urn:ietf:params:oauth:token-type:access_token";
const JWT: &str = "urn:ietf:params:oauth:token-type:jwt";
const API_TOKEN: &str = "urn:tollgate:token-type:api-token";

const SECOND: i64 = 1_000_000;

/// The types of a presented token.
#[derive(Clone, Copy)]
pub(crate) enum Kind {
    /// A signed one or an API token: its form says which.
    AccessToken,
    Signed,
    ApiToken,
}

impl Kind {
    pub(crate) fn parse(argument: &str, given: Option<&str>) -> Result<Kind, Error> {
        match given {
            Some(ISSUED_TYPE) => Ok(Kind::AccessToken),
            Some(JWT) => Ok(Kind::Signed),
            Some(API_TOKEN) => Ok(Kind::ApiToken),
            _ => Err(Error::argument(
                argument,
                "a token of this type cannot be exchanged",
                if given.is_none() { "which is NULL" } else { "which is another one" },
                "Exchange an access token (urn:ietf:params:oauth:token-type:access_token), a signed one (urn:ietf:params:oauth:token-type:jwt) \
                 or an API token (urn:tollgate:token-type:api-token).",
            )),
        }
    }

    fn credential(self, token: Option<&str>) -> Credential<'_> {
        match self {
            Kind::AccessToken => Credential::of_any_kind(token, None),
            Kind::Signed => Credential::AccessToken(presented::Presented { token, audience: None }),
            Kind::ApiToken => Credential::ApiToken(Presented::to_verify(token.map(str::as_bytes))),
        }
    }
}

/// A presented token, and what it is said to be.
#[derive(Clone, Copy)]
pub(crate) struct Shown<'a> {
    pub(crate) token: Option<&'a str>,
    pub(crate) kind: Kind,
}

pub(crate) struct Request<'a> {
    pub(crate) subject: Shown<'a>,
    pub(crate) actor: Option<Shown<'a>>,
    pub(crate) scopes: Option<TextArray<'a>>,
    pub(crate) audience: Option<TextArray<'a>>,
    /// In seconds, at most.
    pub(crate) lifetime: i64,
    pub(crate) client: Option<Net>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Code {
    Valid,
    InvalidSubject,
    InvalidActor,
    /// The subject's token says who may act, or the actor's is itself of one who acts for another.
    ActorNotAllowed,
    InsufficientScope,
    InvalidTarget,
    /// There are too many actors, or too much that the token would end with.
    ChainTooLong,
    RateLimited,
}

impl Code {
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Code::Valid => "VALID",
            Code::InvalidSubject => "INVALID_SUBJECT",
            Code::InvalidActor => "INVALID_ACTOR",
            Code::ActorNotAllowed => "ACTOR_NOT_ALLOWED",
            Code::InsufficientScope => "INSUFFICIENT_SCOPE",
            Code::InvalidTarget => "INVALID_TARGET",
            Code::ChainTooLong => "CHAIN_TOO_LONG",
            Code::RateLimited => "RATE_LIMITED",
        }
    }
}

/// Why nothing is issued: the code, and for a presented token the code of its verification or the claim that is wrong.
pub(crate) type Refused = (Code, Option<&'static str>);

pub(crate) struct Exchanged {
    pub(crate) issued: IssuedAccessToken,
    pub(crate) user_id: String,
    pub(crate) scopes: Vec<String>,
    pub(crate) audience: Vec<String>,
    /// The claim `act`, as JSON.
    pub(crate) act: Option<String>,
}

/// For whom the token is to be, by a token that is good.
struct Subject {
    user_id: String,
    /// The mark that the user had when the token was judged.
    mark: Option<i64>,
    scopes: Vec<String>,
    /// For which it may be.
    audience: Vec<String>,
    /// For which it is if none is asked for.
    default_audience: Vec<String>,
    /// In microseconds since 2000-01-01.
    end: Option<i64>,
    session: Option<[u8; 16]>,
    root: Option<Id>,
    /// What the new token ends with.
    ancestors: Vec<Ancestor>,
    chain: Chain,
    may_act: Option<MayAct>,
    /// The client of an access token of ours.
    client_id: Option<String>,
}

/// Who asks for it, by another token that is good.
struct Actor {
    user_id: String,
    issuer: String,
    /// As the issuer names it.
    sub: String,
    /// For which it may have a token, beside the subject's.
    audience: Vec<String>,
    end: Option<i64>,
    ancestors: Vec<Ancestor>,
    acts_for_another: bool,
}

/// What may be issued.
struct Granted {
    subject: Subject,
    ancestry: Ancestry,
    client_id: Option<String>,
    scopes: Vec<String>,
    audience: Vec<String>,
    end: Option<i64>,
    lifetime: i64,
}

/// Judges both tokens, and issues what was asked for. Fails where nothing can be issued, and never for a bad token.
pub(crate) fn exchange(request: &Request<'_>) -> Result<Result<Exchanged, Refused>, Error> {
    match grant(request) {
        Ok(granted) => issue(granted).map(Ok),
        Err(refused) => Ok(Err(refused)),
    }
}

fn grant(request: &Request<'_>) -> Result<Granted, Refused> {
    let mut subject = judged(&request.subject, request.client, Code::InvalidSubject, subject_of)??;
    let actor = match &request.actor {
        Some(shown) => Some(judged(shown, request.client, Code::InvalidActor, actor_of)?),
        None => None,
    };
    if let Some(actor) = &actor {
        let is_meant = subject.may_act.as_ref().is_none_or(|may_act| may_act.is(&actor.issuer, &actor.sub));
        if !is_meant || actor.acts_for_another {
            return Err((Code::ActorNotAllowed, None));
        }
        let chain = core::mem::take(&mut subject.chain);
        subject.chain = chain.led_to(&actor.user_id).ok_or((Code::ChainTooLong, Some("act")))?;
    }
    let mut ancestry = Ancestry { root: subject.root, from: Vec::new() };
    let ancestors = subject.ancestors.iter().chain(actor.iter().flat_map(|actor| &actor.ancestors));
    if !ancestors.cloned().all(|one| ancestry.add(one)) {
        return Err((Code::ChainTooLong, Some("from")));
    }
    let scopes = fields::narrowed(&subject.scopes, request.scopes).ok_or((Code::InsufficientScope, None))?;
    let audience = match request.audience {
        // Without tollgate.audience there may be none.
        None if subject.default_audience.is_empty() => return Err((Code::InvalidTarget, None)),
        None => subject.default_audience.clone(),
        Some(asked) => {
            let of_actor = actor.as_ref().map_or(&[][..], |actor| &actor.audience[..]);
            within(&[&subject.audience[..], of_actor], asked).ok_or((Code::InvalidTarget, None))?
        }
    };

    let end = [subject.end, actor.as_ref().and_then(|actor| actor.end)].into_iter().flatten().min();
    let seconds = |time: i64| time.saturating_add(EPOCHS).div_euclid(SECOND);
    let remaining = end.map(|end| seconds(end) - seconds(sys::GetCurrentTimestamp()));
    if remaining.is_some_and(|remaining| remaining < 1) {
        // In its last second: what came of it would be over.
        let of = if end == subject.end { Code::InvalidSubject } else { Code::InvalidActor };
        return Err((of, Some(status::Code::Expired.as_str())));
    }
    let actors_id = actor.and_then(|actor| service::id_of(&actor.user_id).map(str::to_owned));
    let client_id = actors_id.or_else(|| subject.client_id.clone());
    Ok(Granted { subject, ancestry, client_id, scopes, audience, end, lifetime: request.lifetime })
}

fn issue(granted: Granted) -> Result<Exchanged, Error> {
    let Granted { subject, ancestry, client_id, scopes, audience, end, lifetime } = granted;
    let act = subject.chain.to_json();
    let own =
        subject.may_act.map_or_else(String::new, |may_act| format!(r#""may_act":{}"#, may_act.to_json()));
    let new = NewAccessToken {
        user_id: &subject.user_id,
        scopes: &scopes,
        audience: &audience,
        lifetime,
        own: &own,
        session: subject.session.map(Uuid::from_bytes),
        client_id: client_id.as_deref(),
        ancestry: &ancestry,
        act: act.as_deref(),
    };
    let issued = issue::issue_within(&new, subject.mark, end)?;
    Ok(Exchanged { issued, user_id: subject.user_id, scopes, audience, act })
}

/// Judges a presented token, as a use of it, and reads it while it is there.
fn judged<T>(
    shown: &Shown<'_>,
    client: Option<Net>,
    refusal: Code,
    read: impl FnOnce(Accepted<'_>) -> T,
) -> Result<T, Refused> {
    let verdict = Verdict::decide(&Verification {
        timer: Timer::start(),
        presented: shown.kind.credential(shown.token),
        required: Required::Nothing,
        client,
        purpose: Purpose::Exchange,
    });
    let (code, read) = (verdict.code(), verdict.accepted().map(read));
    verdict.close();
    read.ok_or(match code {
        code if code.is_for_now() => (Code::RateLimited, None),
        code => (refusal, Some(code.as_str())),
    })
}

fn subject_of(accepted: Accepted<'_>) -> Result<Subject, Refused> {
    match accepted {
        // A secret proves who calls, to client_credentials, and is no token of the account.
        Accepted::ApiToken(row) if service::id_of(row.text(Column::UserId)).is_some() => {
            Err((Code::InvalidSubject, Some("secret")))
        }
        Accepted::ApiToken(row) => Ok(subject_of_api_token(row)),
        Accepted::AccessToken(token) => subject_of_access_token(token),
    }
}

fn subject_of_api_token(row: &TokenRow) -> Subject {
    let user_id = row.text(Column::UserId).to_owned();
    let scopes = row.array(Column::Scopes).map_or_else(Vec::new, |scopes| {
        scopes.present().map(|scope| String::from_utf8_lossy(scope).into_owned()).collect()
    });
    Subject {
        // Of a user who is revoked, the root is too.
        mark: revocations::mark_of(&user_id),
        user_id,
        scopes,
        audience: own_audience(),
        default_audience: own_audience(),
        end: row.timestamp(Column::ExpiresAt),
        session: None,
        root: Some(row.id()),
        ancestors: Vec::new(),
        chain: Chain::default(),
        may_act: None,
        client_id: None,
    }
}

fn subject_of_access_token(token: &AccessToken) -> Result<Subject, Refused> {
    let claims = token.parsed_claims();
    let unreadable = |claim| (Code::InvalidSubject, Some(claim));
    let chain = token.actors().ok_or(unreadable("act"))?;
    let may_act = match claims.get("may_act") {
        None => None,
        Some(may_act) => Some(MayAct::parse(may_act, token.issuer()).ok_or(unreadable("may_act"))?),
    };
    let mut audience: Vec<String> = claims
        .aud()
        .filter(|&one| token.terms().is_none_or(|rules| rules.audience.iter().any(|known| known == one)))
        .map(str::to_owned)
        .collect();
    let mut default_audience = audience.clone();
    // Another issuer's is accepted here for what that issuer calls this service.
    if token.terms().is_some() {
        default_audience = own_audience();
        audience.extend(own_audience());
    }
    let root = token.ancestry().and_then(|ancestry| ancestry.root);
    Ok(Subject {
        user_id: token.user_id().to_owned(),
        mark: token.users_mark(),
        scopes: token.scopes().map(str::to_owned).collect(),
        audience,
        default_audience,
        end: Some(end_of(token)),
        session: token.session(),
        root,
        ancestors: ancestors_by(token),
        chain,
        may_act,
        client_id: claims.client_id().ok().flatten().filter(|_| token.terms().is_none()).map(str::to_owned),
    })
}

fn actor_of(accepted: Accepted<'_>) -> Actor {
    match accepted {
        Accepted::ApiToken(row) => {
            let user_id = row.text(Column::UserId).to_owned();
            // Read before what the account may do: with an earlier mark the token is refused when that is narrowed.
            let mark = revocations::mark_of(&user_id);
            let account = service::id_of(&user_id).and_then(services::service);
            Actor {
                issuer: guc::issuer().unwrap_or_default().to_owned(),
                sub: user_id.clone(),
                audience: account
                    .map_or_else(Vec::new, |account| account.audience.unwrap_or_else(own_audience)),
                end: row.timestamp(Column::ExpiresAt),
                ancestors: vec![Ancestor::ApiToken(row.id()), Ancestor::User { id: user_id.clone(), mark }],
                acts_for_another: false,
                user_id,
            }
        }
        Accepted::AccessToken(token) => {
            let claims = token.parsed_claims();
            let root = token.ancestry().and_then(|ancestry| ancestry.root);
            let user = Ancestor::User { id: token.user_id().to_owned(), mark: token.users_mark() };
            let mut ancestors = ancestors_by(token);
            ancestors.extend(root.map(Ancestor::ApiToken));
            ancestors.extend(token.session().map(Ancestor::Session));
            ancestors.push(user);
            let is_service = token.terms().is_none() && service::id_of(token.user_id()).is_some();
            Actor {
                user_id: token.user_id().to_owned(),
                issuer: token.issuer().to_owned(),
                sub: claims.sub().unwrap_or_default().to_owned(),
                audience: if is_service { claims.aud().map(str::to_owned).collect() } else { Vec::new() },
                end: Some(end_of(token)),
                ancestors,
                acts_for_another: claims.get("act").is_some(),
            }
        }
    }
}

/// When a token ends, without the leeway that another issuer's clock is given.
fn end_of(token: &AccessToken) -> i64 {
    let leeway = if token.terms().is_some() { guc::leeway() } else { 0 };
    token.expires_at().saturating_sub(leeway)
}

/// The token itself, its key, and what it came of, except for its root and its session.
fn ancestors_by(token: &AccessToken) -> Vec<Ancestor> {
    let mut ancestors = token.ancestry().map_or_else(Vec::new, |ancestry| ancestry.from.clone());
    ancestors.push(token.as_ancestor());
    if token.terms().is_none() {
        ancestors.push(Ancestor::Key(token.kid().to_owned()));
    }
    ancestors
}

fn own_audience() -> Vec<String> {
    guc::audience().filter(|audience| !audience.is_empty()).map(str::to_owned).into_iter().collect()
}

/// The audiences that were asked for, each once; `None` if one is not allowed, or there are none or too many.
fn within(allowed: &[&[String]], asked: TextArray<'_>) -> Option<Vec<String>> {
    if !(1..=issue::MAX_AUDIENCES).contains(&asked.len()) {
        return None;
    }
    let mut audience: Vec<String> = Vec::new();
    for one in asked.iter() {
        let one = one?;
        let known = allowed.iter().copied().flatten().find(|known| known.as_bytes() == one)?;
        if !audience.contains(known) {
            audience.push(known.clone());
        }
    }
    Some(audience)
}
