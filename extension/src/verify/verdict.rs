//! The decision about a presented token: one index probe, the checks, the counting.
#![allow(unsafe_code)]

use super::limits::{self, Quota};
use super::log;
use super::presented::{Presented, Required};
use super::refusal::{self, Refusal};
use super::request::{Function, Purpose, Request, client, given_digest};
use crate::error::{Error, OrRaise};
use crate::identity::{self, Identity};
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

/// A decision, and the row of its token, which stays in place until this is closed.
pub(crate) struct Verdict {
    code: Code,
    quota: Option<Quota>,
    /// For a refusal by a limit.
    retry_after: pg_sys::Interval,
    /// `None` for a request that needed no look-up.
    lookup: Option<Lookup>,
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
        let request = Request {
            timer,
            presented: match function {
                Function::VerifyApiTokenHash => Presented::by_digest(given_digest(call)),
                Function::VerifyApiToken | Function::Authenticate => Presented::to_verify(call.bytes(0)),
            },
            required: call.text_array(1).map_or(Required::Nothing, Required::All),
            client: client(call, 2),
            purpose: if function == Function::Authenticate { Purpose::Bind } else { Purpose::Use },
        };
        let verdict = Verdict::decide(&request);
        if request.purpose == Purpose::Bind {
            match verdict.accepted().map(context_of) {
                Some(context) => identity::establish(&context),
                None => {
                    let refusal = Refusal::last().unwrap_or_else(|| Refusal::new(verdict.code));
                    verdict.close();
                    Error::refused(&refusal).raise()
                }
            }
        }
        verdict
    }

    /// Decides on a request, and counts the outcome.
    pub(crate) fn decide(request: &Request<'_>) -> Self {
        if let Some(quota) = limits::blocked(request.client) {
            return Verdict::counted(Code::RateLimited, Some(quota), None, request, None);
        }
        let lookup = find(&request.presented);
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
            identity::may_bind(&token.id()).or_raise();
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
        if code.is_failed_attempt()
            && let Some(quota) = limits::charge_failure(request.client, now)
        {
            // Not even the id of a known token is returned.
            if let Some(lookup) = lookup {
                lookup.close();
            }
            return Verdict::counted(Code::RateLimited, Some(quota), None, request, id);
        }
        Verdict::counted(code, quota, lookup, request, id)
    }

    fn counted(
        code: Code,
        quota: Option<Quota>,
        lookup: Option<Lookup>,
        request: &Request<'_>,
        token_id: Option<[u8; 16]>,
    ) -> Self {
        shmem::count_outcome(code);
        if let Some(timer) = request.timer {
            timer.stop();
        }
        let fault = request.presented.digest.err().filter(|_| code == Code::Malformed);
        log::verification(code, token_id.as_ref(), request.client.as_ref(), &request.required, fault);
        let verdict = Verdict::new(code, quota, lookup);
        if code == Code::Valid {
            Refusal::forget();
        } else {
            verdict.refusal(request, fault).remember();
        }
        verdict
    }

    #[cold]
    fn refusal(&self, request: &Request<'_>, fault: Option<Fault>) -> Refusal {
        let scopes = self.token().and_then(|token| token.array(Column::Scopes));
        let granted = |one: &[u8]| scopes.is_some_and(|scopes| scope::any_grants(scopes.present(), one));
        Refusal {
            code: self.code,
            fault,
            missing_scopes: match self.code {
                Code::InsufficientScope => refusal::missing(&request.required, granted),
                _ => Vec::new(),
            },
            retry_after: self
                .quota
                .filter(|_| self.code == Code::RateLimited)
                .map(|quota| quota.charge.retry_after),
        }
    }

    fn new(code: Code, quota: Option<Quota>, lookup: Option<Lookup>) -> Self {
        let micros = quota.map_or(0, |quota| quota.charge.retry_after.cast_signed());
        let retry_after = pg_sys::Interval { time: micros, day: 0, month: 0 };
        Verdict { code, quota, retry_after, lookup }
    }

    pub(super) fn token(&self) -> Option<&TokenRow> {
        self.lookup.as_ref().and_then(Lookup::token)
    }

    pub(crate) fn code(&self) -> Code {
        self.code
    }

    fn accepted(&self) -> Option<&TokenRow> {
        self.token().filter(|_| self.code == Code::Valid)
    }

    /// The row that SQL gets, as values that point to where they are stored until this is closed. For a refused token
    /// it has only the id and the expiry: a caller that forgets to check `valid` must not get an identity.
    pub(crate) fn columns(&self) -> [Option<Datum>; Verdict::COLUMNS] {
        let known = |column| self.token().and_then(|token| token.datum(column));
        let granted = |column| self.accepted().and_then(|token| token.datum(column));
        [
            (self.code == Code::Valid).into_datum(),
            Some(Datum::from(CODES[self.code.index()].as_ptr())),
            known(Column::Id),
            granted(Column::UserId),
            granted(Column::Name),
            granted(Column::Scopes),
            known(Column::ExpiresAt),
            granted(Column::Metadata),
            self.quota.and_then(|quota| quota.limit.cast_signed().into_datum()),
            self.quota.and_then(|quota| quota.charge.remaining.cast_signed().into_datum()),
            (self.code == Code::RateLimited).then(|| Datum::from(&raw const self.retry_after)),
        ]
    }

    pub(crate) fn close(self) {
        if let Some(lookup) = self.lookup {
            lookup.close();
        }
    }
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
    let Some(lookup) = foreign::keys(presented).find_map(|key| Lookup::open_foreign(&key)) else {
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
        || request.purpose.is_from_anywhere() || address_allowed(token, request.client),
        || scopes_granted(token, &request.required),
    )
}

fn address_allowed(token: &TokenRow, client: Option<Net>) -> bool {
    let Some(networks) = token.array(Column::AllowedIps) else { return true };
    client.is_some_and(|client| {
        networks.present().filter_map(datum::net).any(|network| network.contains(&client))
    })
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

fn context_of(token: &TokenRow) -> Identity {
    let owned = |bytes| String::from_utf8_lossy(bytes).into_owned();
    Identity {
        token_id: token.id(),
        user_id: token.text(Column::UserId).to_owned(),
        scopes: token
            .array(Column::Scopes)
            .map_or_else(Vec::new, |scopes| scopes.present().map(owned).collect()),
        expires_at: token.timestamp(Column::ExpiresAt),
    }
}
