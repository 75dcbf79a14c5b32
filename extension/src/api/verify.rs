//! `verify_api_token` and its kin: the hot path. Parse, checksum, digest, one index probe, checks, count.

use crate::context::{self, Context};
use crate::datum::{self, TextArray};
use crate::error::Error;
use crate::fmgr::{Call, sql_function};
use crate::limits::{self, Quota};
use crate::log;
use crate::presented;
use crate::shmem::{self, Use};
use crate::store::composite::{self, Composite};
use crate::store::probe::{Column, Lookup, TokenRow};
use crate::sys;
use core::ffi::CStr;
use pgrx::IntoDatum;
use pgrx::pg_sys::{self, Datum};
use tollgate_core::net::Net;
use tollgate_core::scope;
use tollgate_core::status::{Code, decide};
use tollgate_core::token::Digest;

/// The functions that return a row of type `verification`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Function {
    VerifyApiToken,
    VerifyApiTokenHash,
    Authenticate,
}

impl Function {
    pub(crate) const ALL: [Function; 3] =
        [Function::VerifyApiToken, Function::VerifyApiTokenHash, Function::Authenticate];

    pub(crate) const fn name(self) -> &'static CStr {
        match self {
            Function::VerifyApiToken => c"verify_api_token",
            Function::VerifyApiTokenHash => c"verify_api_token_hash",
            Function::Authenticate => c"authenticate",
        }
    }
}

sql_function!(verify_api_token);
fn verify_api_token(call: &Call) -> Option<Datum> {
    Some(as_composite(Function::VerifyApiToken, call))
}

sql_function!(verify_api_token_hash);
fn verify_api_token_hash(call: &Call) -> Option<Datum> {
    Some(as_composite(Function::VerifyApiTokenHash, call))
}

sql_function!(authenticate);
fn authenticate(call: &Call) -> Option<Datum> {
    Some(as_composite(Function::Authenticate, call))
}

sql_function!(presented_token_has_scope);
fn presented_token_has_scope(call: &Call) -> Option<Datum> {
    let request =
        Request { digest: presented_digest(call), required: Required::One(call.bytes(1)), client: None };
    let verdict = Verdict::on(&request, Metering::Uncounted);
    let granted = verdict.code == Code::Valid;
    verdict.close();
    granted.into_datum()
}

fn as_composite(function: Function, call: &Call) -> Datum {
    let verdict = Verdict::of(function, call);
    let row = composite::form(Composite::Verification, verdict.columns());
    verdict.close();
    row
}

struct Request<'a> {
    /// `None` for what cannot be a token.
    digest: Option<Digest>,
    required: Required<'a>,
    /// What the application saw, never the peer of the database connection.
    client: Option<Net>,
}

enum Required<'a> {
    Nothing,
    /// NULL is granted by nothing.
    One(Option<&'a [u8]>),
    All(TextArray<'a>),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Metering {
    Counted,
    Uncounted,
}

impl<'a> Request<'a> {
    fn new(digest: Option<Digest>, call: &'a Call) -> Self {
        Request {
            digest,
            required: call.text_array(1).map_or(Required::Nothing, Required::All),
            client: call.bytes(2).and_then(datum::net),
        }
    }

    fn log(&self, code: Code, token_id: Option<&[u8; 16]>) {
        let required = match self.required {
            Required::All(scopes) => Some(scopes),
            _ => None,
        };
        log::verification(code, token_id, self.client.as_ref(), required);
    }
}

/// The digest of the token in the first argument; `None` if it is malformed, see [`presented::digest`].
fn presented_digest(call: &Call) -> Option<Digest> {
    call.bytes(0).and_then(presented::digest)
}

/// A decision, and the row of the token that it is about, which stays in place until this is closed.
pub(crate) struct Verdict {
    code: Code,
    quota: Option<Quota>,
    /// Of a refusal by a limit.
    retry_after: pg_sys::Interval,
    /// `None` for a request that needed no look-up.
    lookup: Option<Lookup>,
}

impl Verdict {
    /// Of [`Verdict::columns`], each a type that PostgreSQL is born with.
    pub(crate) const TYPES: [pg_sys::Oid; 11] = [
        pg_sys::BOOLOID,
        pg_sys::TEXTOID,
        pg_sys::UUIDOID,
        pg_sys::TEXTOID,
        pg_sys::TEXTOID,
        pg_sys::TEXTARRAYOID,
        pg_sys::TIMESTAMPTZOID,
        pg_sys::JSONBOID,
        pg_sys::INT4OID,
        pg_sys::INT4OID,
        pg_sys::INTERVALOID,
    ];
    pub(crate) const COLUMNS: usize = Verdict::TYPES.len();

    /// Does what a function does, short of forming its row.
    pub(crate) fn of(function: Function, call: &Call) -> Self {
        let digest = match function {
            Function::VerifyApiTokenHash => call.bytes(0).and_then(|bytes| bytes.try_into().ok()),
            Function::VerifyApiToken | Function::Authenticate => presented_digest(call),
        };
        let verdict = Verdict::on(&Request::new(digest, call), Metering::Counted);
        if function == Function::Authenticate {
            match (verdict.accepted().map(context_of), verdict.quota) {
                (Some(context), _) => context::establish(&context),
                (None, Some(quota)) => Error::rate_limited(quota.charge.retry_after).raise(),
                (None, None) => Error::refused(verdict.code).raise(),
            }
        }
        verdict
    }

    /// Decides on a request, and counts the outcome.
    fn on(request: &Request<'_>, metering: Metering) -> Self {
        if metering == Metering::Counted
            && let Some(quota) = limits::blocked(request.client)
        {
            return Verdict::counted(Code::RateLimited, Some(quota), None, request, None);
        }
        let lookup = request.digest.as_ref().map(Lookup::open);
        let token = lookup.as_ref().and_then(Lookup::token);
        // After the look-up: an expiry counts that passed meanwhile.
        let now = sys::GetCurrentTimestamp();
        let code = match (&lookup, token) {
            (None, _) => Code::Malformed,
            (_, None) => Code::NotFound,
            (_, Some(token)) => judge(token, request, now),
        };
        if metering == Metering::Uncounted {
            return Verdict::new(code, None, lookup);
        }
        let id = token.map(TokenRow::id);
        let used = Use { accepted: code == Code::Valid, at: now, client: request.client };
        let (code, quota) = match (token, &id) {
            (Some(token), Some(id)) if used.accepted => limits::admit(token, id, &used),
            (Some(token), Some(id)) => {
                limits::count(token, id, &used);
                (code, None)
            }
            _ => (code, None),
        };
        if code.is_failed_attempt()
            && let Some(quota) = limits::charge_failure(request.client, now)
        {
            // Not even the id of a token that is known.
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
        request.log(code, token_id.as_ref());
        Verdict::new(code, quota, lookup)
    }

    fn new(code: Code, quota: Option<Quota>, lookup: Option<Lookup>) -> Self {
        let micros = quota.map_or(0, |quota| quota.charge.retry_after.cast_signed());
        let retry_after = pg_sys::Interval { time: micros, day: 0, month: 0 };
        Verdict { code, quota, retry_after, lookup }
    }

    fn token(&self) -> Option<&TokenRow> {
        self.lookup.as_ref().and_then(Lookup::token)
    }

    fn accepted(&self) -> Option<&TokenRow> {
        self.token().filter(|_| self.code == Code::Valid)
    }

    /// The row that SQL sees, as values that point to where they lie until this is closed. Of a refused token it tells the
    /// id and the expiry alone: a caller who forgets to look at `valid` must not be handed an identity.
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

fn judge(token: &TokenRow, request: &Request<'_>, now: i64) -> Code {
    decide(
        token.datum(Column::RevokedAt).is_some(),
        token.datum(Column::DisabledAt).is_some(),
        token.timestamp(Column::ExpiresAt),
        now,
        || address_allowed(token, request.client),
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

/// The codes as values of type text, so that none has to be made per call.
static CODES: [[u8; 24]; Code::ALL.len()] = {
    let mut texts = [[0; 24]; Code::ALL.len()];
    let mut i = 0;
    while i < Code::ALL.len() {
        texts[Code::ALL[i].index()] = datum::short_text(Code::ALL[i].as_str());
        i += 1;
    }
    texts
};

fn context_of(token: &TokenRow) -> Context {
    let owned = |bytes| String::from_utf8_lossy(bytes).into_owned();
    Context {
        token_id: token.id(),
        user_id: token.text(Column::UserId).to_owned(),
        scopes: token
            .array(Column::Scopes)
            .map_or_else(Vec::new, |scopes| scopes.present().map(owned).collect()),
        expires_at: token.timestamp(Column::ExpiresAt),
    }
}
