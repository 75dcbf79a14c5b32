//! The decision about a presented token: for an API token one index probe, the checks, the counting; for an access token
//! its own checks (`access::verify`) and the same counting.
#![allow(unsafe_code)]

use super::limits::{self, Quota};
use super::log;
use super::presented::{Presented, Required};
use super::refusal::{self, Refusal};
use super::request::{Credential, Function, Purpose, Request, client, given_digest};
use crate::access;
use crate::access::verify::{self as signed, AccessToken};
use crate::error::{Error, OrRaise};
use crate::guc;
use crate::identity::{self, Identity};
use crate::keys;
use crate::pg::datum::{self, TextArray};
use crate::pg::fmgr::Call;
use crate::pg::sys;
use crate::shmem::{self, Found, Timer, Use};
use crate::store::probe::{Column, LateColumn, Lookup, TokenRow};
use pgrx::IntoDatum;
use pgrx::pg_sys::{self, Datum};
use tollgate_core::foreign;
use tollgate_core::net::Net;
use tollgate_core::scope;
use tollgate_core::status::{Code, decide};
use tollgate_core::token::{Digest, Fault};

/// A decision, and its token: the row of an API token stays in place until this is closed.
pub(crate) struct Verdict {
    code: Code,
    quota: Option<Quota>,
    /// For a refusal by a limit.
    retry_after: pg_sys::Interval,
    subject: Subject,
}

/// A token that is good for what it was presented for.
#[derive(Clone, Copy)]
pub(crate) enum Accepted<'a> {
    ApiToken(&'a TokenRow),
    AccessToken(&'a AccessToken),
}

/// One of the credentials that are verified together.
pub(crate) struct Item<'a> {
    pub(crate) token: Option<&'a str>,
    /// Joined by spaces.
    pub(crate) scopes: Option<&'a [u8]>,
    pub(crate) client: Option<Net>,
    pub(crate) audience: Option<&'a str>,
}

/// The token that was presented.
enum Subject {
    /// What was presented cannot be a token, or it was not looked up.
    Nothing,
    ApiToken(Lookup),
    AccessToken(AccessToken),
}

impl Verdict {
    /// The lengths of the columns of [`Verdict::columns`], for [`datum::copy`].
    pub(crate) const LENGTHS: [i16; 11] = [
        datum::BY_VALUE,
        datum::VARLENA,
        size_of::<uuid::Bytes>() as i16,
        datum::VARLENA,
        datum::VARLENA,
        datum::VARLENA,
        datum::BY_VALUE,
        datum::VARLENA,
        datum::BY_VALUE,
        datum::BY_VALUE,
        size_of::<pg_sys::Interval>() as i16,
    ];
    pub(crate) const COLUMNS: usize = Verdict::LENGTHS.len();

    /// Does everything that a function does, except forming its row.
    pub(crate) fn of_call(function: Function, call: &Call) -> Self {
        let timer = Timer::start();
        let access_token =
            |audience| Credential::AccessToken(signed::Presented { token: call.text(0), audience });
        let request = Request {
            timer,
            presented: match function {
                Function::VerifyApiTokenHash => {
                    Credential::ApiToken(Presented::by_digest(given_digest(call)))
                }
                Function::VerifyAccessToken => access_token(call.text(3)),
                Function::Authenticate if call.bytes(0).is_some_and(access::is_signed) => access_token(None),
                Function::VerifyApiToken | Function::Authenticate => {
                    Credential::ApiToken(Presented::to_verify(call.bytes(0)))
                }
            },
            required: call.text_array(1).map_or(Required::Nothing, Required::All),
            client: client(call, 2),
            purpose: if function == Function::Authenticate { Purpose::Bind } else { Purpose::Use },
        };
        let verdict = Verdict::decide(&request);
        if request.purpose == Purpose::Bind {
            match verdict.identity() {
                Some((credential, context)) => identity::establish(credential, context.or_raise()),
                None => verdict.raise(),
            }
        }
        verdict
    }

    /// For an item of `verify_tokens`: a use of a credential of any kind.
    pub(crate) fn of_item(item: &Item<'_>) -> Self {
        Verdict::decide(&Request {
            timer: Timer::start(),
            presented: Credential::of_any_kind(item.token, item.audience),
            required: item.scopes.map_or(Required::Nothing, Required::Joined),
            client: item.client,
            purpose: Purpose::Use,
        })
    }

    /// Raises the error of a refusal.
    pub(crate) fn raise(self) -> ! {
        let refusal = Refusal::last().unwrap_or_else(|| Refusal::new(self.code));
        self.close();
        Error::refused(&refusal).raise()
    }

    /// Decides on a request, and counts the outcome.
    pub(crate) fn decide(request: &Request<'_>) -> Self {
        if let Some(quota) = limits::blocked(request.client) {
            return Verdict::counted(Code::RateLimited, Some(quota), Subject::Nothing, request, None, None);
        }
        match &request.presented {
            Credential::ApiToken(presented) => Verdict::of_api_token(presented, request),
            Credential::AccessToken(presented) => Verdict::of_access_token(presented, request),
        }
    }

    fn of_api_token(presented: &Presented<'_>, request: &Request<'_>) -> Self {
        if presented.can_be_guessed()
            && let Some(quota) = limits::blocked_login()
        {
            return Verdict::counted(Code::RateLimited, Some(quota), Subject::Nothing, request, None, None);
        }
        let lookup = find(presented);
        let token = lookup.as_ref().and_then(Lookup::token);
        // Read after the look-up, so that an expiry that passed meanwhile counts.
        let now = sys::GetCurrentTimestamp();
        let code = match (&lookup, token) {
            (None, _) => Code::Malformed,
            (_, None) => Code::NotFound,
            (_, Some(token)) => judge(token, request, now),
        };
        // Before anything is counted or charged: nothing is wrong with the token.
        if request.purpose == Purpose::Bind
            && code == Code::Valid
            && let Some(token) = token
        {
            identity::may_bind(identity::Credential::ApiToken(token.id())).or_raise();
        }
        let id = token.map(TokenRow::id);
        let used = Use { accepted: code == Code::Valid, at: now, client: request.client };
        let (code, quota) = match (token, &id) {
            _ if !request.purpose.is_use() => (code, None),
            (Some(token), Some(id)) if used.accepted => limits::charge_use(token, id, &used),
            (Some(token), Some(id)) => {
                limits::count(token, id, &used);
                (code, None)
            }
            _ => (code, None),
        };
        if code == Code::Expired
            && let Some(token) = token
        {
            note_reuse(token, request, now);
        }
        let reason = presented.digest.err().filter(|_| code == Code::Malformed).map(Fault::as_str);
        Verdict::concluded(
            code,
            quota,
            lookup.map_or(Subject::Nothing, Subject::ApiToken),
            request,
            id,
            reason,
        )
    }

    fn of_access_token(presented: &signed::Presented<'_>, request: &Request<'_>) -> Self {
        let judged = signed::judge(presented, request, || sys::GetCurrentTimestamp());
        let (mut code, mut quota) = (judged.code, None);
        // What came of an API token is limited as that is, and counted there.
        let root = judged.root.as_ref().and_then(Lookup::token);
        if let Some(token) = &judged.token {
            if request.purpose == Purpose::Bind && code == Code::Valid {
                identity::may_bind(identity::Credential::AccessToken(token.digest())).or_raise();
            }
            let used =
                Use { accepted: code == Code::Valid, at: sys::GetCurrentTimestamp(), client: request.client };
            match root {
                _ if !request.purpose.is_use() => {}
                Some(root) if used.accepted => (code, quota) = limits::charge_use(root, &root.id(), &used),
                Some(root) => limits::count(root, &root.id(), &used),
                None if used.accepted => {
                    (code, quota) = limits::charge_use_of_user(token.user_id(), &used);
                }
                None => limits::count_on_user(token.user_id(), &used),
            }
        }
        if let Some(root) = judged.root {
            root.close();
        }
        let id = judged.token.as_ref().map(AccessToken::id);
        let subject = judged.token.map_or(Subject::Nothing, Subject::AccessToken);
        Verdict::concluded(code, quota, subject, request, id, judged.reason)
    }

    /// Charges a failed attempt to the client and, if it was a guess, to the login.
    fn concluded(
        code: Code,
        quota: Option<Quota>,
        subject: Subject,
        request: &Request<'_>,
        token_id: Option<[u8; 16]>,
        reason: Option<&'static str>,
    ) -> Self {
        if code.is_failed_attempt()
            && let Some(quota) = charge_failure(request, sys::GetCurrentTimestamp())
        {
            // Not even the id of a known token is returned.
            subject.close();
            let nothing = Subject::Nothing;
            return Verdict::counted(Code::RateLimited, Some(quota), nothing, request, token_id, None);
        }
        Verdict::counted(code, quota, subject, request, token_id, reason)
    }

    fn counted(
        code: Code,
        quota: Option<Quota>,
        subject: Subject,
        request: &Request<'_>,
        token_id: Option<[u8; 16]>,
        reason: Option<&'static str>,
    ) -> Self {
        shmem::count_outcome(code);
        if let Some(timer) = request.timer {
            timer.stop();
        }
        log::verification(code, token_id.as_ref(), request.client.as_ref(), &request.required, reason);
        let verdict = Verdict::new(code, quota, subject);
        if code == Code::Valid {
            Refusal::forget();
        } else {
            verdict.refusal(request, reason).remember();
        }
        verdict
    }

    #[cold]
    fn refusal(&self, request: &Request<'_>, reason: Option<&'static str>) -> Refusal {
        let granted = |one: &[u8]| match &self.subject {
            Subject::Nothing => false,
            Subject::ApiToken(lookup) => lookup
                .token()
                .and_then(|token| token.array(Column::Scopes))
                .is_some_and(|scopes| scope::any_grants(scopes.present(), one)),
            Subject::AccessToken(token) => token.grants(one),
        };
        Refusal {
            code: self.code,
            reason,
            missing_scopes: match self.code {
                Code::InsufficientScope => refusal::missing(&request.required, granted),
                _ => Vec::new(),
            },
            retry_after: self.quota.filter(|_| self.will_pass()).map(|quota| quota.charge.retry_after),
        }
    }

    fn new(code: Code, quota: Option<Quota>, subject: Subject) -> Self {
        let micros = quota.map_or(0, |quota| quota.charge.retry_after.cast_signed());
        let retry_after = pg_sys::Interval { time: micros, day: 0, month: 0 };
        Verdict { code, quota, retry_after, subject }
    }

    pub(crate) fn accepted(&self) -> Option<Accepted<'_>> {
        if self.code != Code::Valid {
            return None;
        }
        match &self.subject {
            Subject::Nothing => None,
            Subject::ApiToken(lookup) => lookup.token().map(Accepted::ApiToken),
            Subject::AccessToken(token) => Some(Accepted::AccessToken(token)),
        }
    }

    /// The row of an API token.
    pub(super) fn stored(&self) -> Option<&TokenRow> {
        match &self.subject {
            Subject::ApiToken(lookup) => lookup.token(),
            Subject::Nothing | Subject::AccessToken(_) => None,
        }
    }

    /// Whether the same request will be admitted later.
    fn will_pass(&self) -> bool {
        self.code.is_for_now() && self.quota.is_some_and(|quota| quota.charge.retry_after != limits::NEVER)
    }

    pub(crate) fn code(&self) -> Code {
        self.code
    }

    /// The identity that an accepted token gives.
    fn identity(&self) -> Option<(identity::Credential, Result<Identity, Error>)> {
        if self.code != Code::Valid {
            return None;
        }
        match &self.subject {
            Subject::Nothing => None,
            Subject::ApiToken(lookup) => lookup
                .token()
                .map(|token| (identity::Credential::ApiToken(token.id()), Ok(identity_of_row(token)))),
            Subject::AccessToken(token) => {
                Some((identity::Credential::AccessToken(token.digest()), identity_of_claims(token)))
            }
        }
    }

    /// The row that SQL gets, as values that point to where they are stored until this is closed.
    pub(crate) fn columns(&self) -> [Option<Datum>; Verdict::COLUMNS] {
        core::array::from_fn(|column| self.column(column))
    }

    /// A column of that row, counted from 0. For a refused token only the id and the expiry are known: a caller that
    /// forgets to check `valid` must not get an identity.
    pub(crate) fn column(&self, column: usize) -> Option<Datum> {
        match column {
            0 => (self.code == Code::Valid).into_datum(),
            1 => Some(Datum::from(CODES[self.code.index()].as_ptr())),
            8 => self.quota.and_then(|quota| quota.limit?.cast_signed().into_datum()),
            9 => self
                .quota
                .filter(|quota| quota.limit.is_some())
                .and_then(|quota| quota.charge.remaining.cast_signed().into_datum()),
            10 => self.will_pass().then(|| Datum::from(&raw const self.retry_after)),
            _ => match &self.subject {
                Subject::Nothing => None,
                Subject::ApiToken(lookup) => {
                    lookup.token().and_then(|token| self.column_of_row(token, column))
                }
                Subject::AccessToken(token) => self.column_of_claims(token, column),
            },
        }
    }

    fn column_of_row(&self, token: &TokenRow, column: usize) -> Option<Datum> {
        let granted = |column| if self.code == Code::Valid { token.datum(column) } else { None };
        match column {
            2 => token.datum(Column::Id),
            3 => granted(Column::UserId),
            4 => granted(Column::Name),
            5 => granted(Column::Scopes),
            6 => token.datum(Column::ExpiresAt),
            _ => granted(Column::Metadata),
        }
    }

    /// An access token has no name.
    fn column_of_claims(&self, token: &AccessToken, column: usize) -> Option<Datum> {
        let is_granted = self.code == Code::Valid;
        match column {
            2 => signed::uuid_datum(token.id()),
            3 if is_granted => Some(datum::text(token.user_id())),
            5 if is_granted => Some(datum::text_array(token.scopes())),
            6 => Some(Datum::from(token.expires_at())),
            7 if is_granted => token.claims(),
            _ => None,
        }
    }

    pub(crate) fn close(self) {
        self.subject.close();
    }
}

impl Subject {
    fn close(self) {
        if let Subject::ApiToken(lookup) = self {
            lookup.close();
        }
    }
}

fn charge_failure(request: &Request<'_>, now: i64) -> Option<Quota> {
    let of_login = match &request.presented {
        Credential::ApiToken(presented) if presented.can_be_guessed() => limits::charge_failure_of_login(now),
        _ => None,
    };
    limits::charge_failure(request.client, now).or(of_login)
}

/// Looks for a token by the digest of the presented value, and then as one in another format.
#[inline]
fn find(presented: &Presented<'_>) -> Option<Lookup> {
    let digest = presented.digest.as_ref().ok()?;
    let lookup = Lookup::open(digest);
    match presented.foreign {
        Some(foreign) if lookup.token().is_none() => Some(find_foreign(lookup, digest, foreign)),
        _ => Some(lookup),
    }
}

/// Looks for a token that was imported in another format. The daemon, not this function, stores its digest so that
/// later look-ups find it directly.
#[cold]
fn find_foreign(not_found: Lookup, digest: &Digest, presented: &[u8]) -> Lookup {
    let found = foreign::keys(presented)
        .find_map(|key| Lookup::open_foreign(&key))
        .or_else(|| find_with_import_key(presented));
    let Some(lookup) = found else {
        // It may have been given its digest meanwhile.
        not_found.close();
        return Lookup::open(digest);
    };
    not_found.close();
    if let Some(token) = lookup.token()
        && !sys::is_in_recovery()
    {
        shmem::note_finding(&token.id(), &Found::Digest(*digest), sys::GetCurrentTimestamp());
    }
    lookup
}

/// Looks for a token that was imported with a secret key of the other system. A key that does not open finds none, and
/// verification goes on: others need no key.
fn find_with_import_key(presented: &[u8]) -> Option<Lookup> {
    keys::import_keys().find_map(|(name, key)| match key {
        Ok(key) => Lookup::open_foreign(&key.key_of(presented)),
        Err(error) => {
            log::unopened_import_key(&name, &error);
            None
        }
    })
}

/// Notes that a replaced token was presented after its grace: its owner has the new one, so this may be a thief. The
/// daemon records it.
#[cold]
fn note_reuse(token: &TokenRow, request: &Request<'_>, now: i64) {
    // Revoking a found token is the right response to it.
    if request.purpose != Purpose::End && token.has(LateColumn::RotatedTo) {
        shmem::note_finding(&token.id(), &Found::Reuse(request.client), now);
    }
}

fn judge(token: &TokenRow, request: &Request<'_>, now: i64) -> Code {
    decide(
        token.datum(Column::RevokedAt).is_some(),
        token.datum(Column::DisabledAt).is_some(),
        token.timestamp(Column::ExpiresAt),
        now,
        || request.purpose.is_from_anywhere() || token.allows(request.client),
        || scopes_granted(token, &request.required),
    )
}

fn scopes_granted(token: &TokenRow, required: &Required<'_>) -> bool {
    let granted = |one: Option<&[u8]>, scopes: TextArray<'_>| {
        one.is_some_and(|one| scope::any_grants(scopes.present(), one))
    };
    match required {
        Required::Nothing => true,
        Required::One(one) => token.array(Column::Scopes).is_some_and(|scopes| granted(*one, scopes)),
        Required::All(all) => {
            token.array(Column::Scopes).is_some_and(|scopes| all.iter().all(|one| granted(one, scopes)))
        }
        Required::Joined(_) => {
            token.array(Column::Scopes).is_some_and(|scopes| required.iter().all(|one| granted(one, scopes)))
        }
    }
}

/// The codes as values of type text, built at compile time so that no call allocates one.
static CODES: [[u8; 24]; Code::ALL.len()] = {
    let mut texts = [[0; 24]; Code::ALL.len()];
    let mut i = 0;
    while i < Code::ALL.len() {
        texts[Code::ALL[i].index()] = datum::short_text(Code::ALL[i].as_str());
        i += 1;
    }
    texts
};

fn identity_of_row(token: &TokenRow) -> Identity {
    let owned = |bytes| String::from_utf8_lossy(bytes).into_owned();
    Identity {
        token_id: token.id(),
        user_id: token.text(Column::UserId).to_owned(),
        scopes: token
            .array(Column::Scopes)
            .map_or_else(Vec::new, |scopes| scopes.present().map(owned).collect()),
        expires_at: token.timestamp(Column::ExpiresAt),
        signed: None,
    }
}

/// Refuses claims that are too large to keep: a policy must not find one missing that the token has.
fn identity_of_claims(token: &AccessToken) -> Result<Identity, Error> {
    let claims = token.claims_named(guc::identity_claims());
    let actor = token.actor();
    let length = claims.len() + actor.as_ref().map_or(0, String::len);
    if length > identity::MAX_CLAIMS {
        return Err(Error::too_many_claims(length, identity::MAX_CLAIMS));
    }
    Ok(Identity {
        token_id: token.id(),
        user_id: token.user_id().to_owned(),
        scopes: token.scopes().map(str::to_owned).collect(),
        expires_at: Some(token.expires_at()),
        signed: Some(identity::Signed {
            issuer: token.issuer().to_owned(),
            claims,
            actor,
            session: token.session(),
        }),
    })
}
