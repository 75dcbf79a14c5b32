//! What a presented credential is (RFC 7662): an API token, an access token of ours or of a trusted issuer, or a refresh
//! token. It is judged like a verification, but is not used; the answer says nothing of one that is not active.

use super::EPOCHS;
use super::issue::members_of;
use super::verify::AccessToken;
use crate::error::Error;
use crate::guc;
use crate::sessions::refresh::{self, Refreshable};
use crate::shmem::Timer;
use crate::store::probe::{Column, TokenRow};
use crate::verify::presented::Required;
use crate::verify::request::{Credential, Purpose, Request};
use crate::verify::verdict::{Accepted, Verdict};
use tollgate_core::delegation::SERVICE;
use tollgate_core::json::quote;
use tollgate_core::net::Net;
use tollgate_core::refresh::parse;

const INACTIVE: &str = r#"{"active": false}"#;
/// Claims that are shown as they were signed; of another issuer's token not those that name clients and actors.
const CLAIMS: [&str; 9] = ["client_id", "iat", "nbf", "sub", "aud", "iss", "jti", "act", "sid"];

/// The answer, as JSON.
pub(crate) fn introspect(token: Option<&str>, client: Option<Net>) -> Result<String, Error> {
    if let Some(token) = token.filter(|token| parse(token.as_bytes()).is_some()) {
        let found = refresh::refreshable(token, client)?;
        return Ok(found.map_or_else(|| INACTIVE.to_owned(), |found| of_session(&found)));
    }
    let verdict = Verdict::decide(&Request {
        timer: Timer::start(),
        presented: Credential::of_any_kind(token, None),
        required: Required::Nothing,
        client,
        purpose: Purpose::Introspect,
    });
    let answer = match verdict.accepted() {
        None => INACTIVE.to_owned(),
        Some(Accepted::ApiToken(row)) => of_api_token(row),
        Some(Accepted::AccessToken(token)) => of_access_token(token),
    };
    verdict.close();
    Ok(answer)
}

fn of_api_token(row: &TokenRow) -> String {
    let user_id = row.text(Column::UserId);
    let scopes: Vec<_> = row
        .array(Column::Scopes)
        .into_iter()
        .flat_map(|all| all.present())
        .map(String::from_utf8_lossy)
        .collect();
    let mut answer = Answer::new(user_id, &scopes.join(" "));
    answer.text("client_id", user_id.strip_prefix(SERVICE).unwrap_or_else(|| row.text(Column::CreatedBy)));
    answer.text("token_type", "Bearer");
    answer.time("exp", row.timestamp(Column::ExpiresAt));
    answer.time("iat", row.timestamp(Column::CreatedAt));
    answer.text("sub", user_id);
    for (name, value) in [("aud", guc::audience()), ("iss", guc::issuer())] {
        if let Some(value) = value.filter(|value| !value.is_empty()) {
            answer.text(name, value);
        }
    }
    answer.text("jti", &uuid::Uuid::from_bytes(row.id()).to_string());
    answer.done()
}

fn of_access_token(token: &AccessToken) -> String {
    let scopes: Vec<&str> = token.scopes().collect();
    let mut answer = Answer::new(token.user_id(), &scopes.join(" "));
    answer.text("token_type", "Bearer");
    // Another issuer's may be refused before its own end.
    let signed = token.parsed_claims().exp().map(|exp| exp - EPOCHS);
    answer.time("exp", signed.map(|exp| exp.min(token.expires_at())));
    let is_ours = token.terms().is_none();
    let shown = CLAIMS.into_iter().filter(|name| is_ours || !["client_id", "act"].contains(name));
    answer.members(members_of(&token.claims_named(shown)));
    if let Some(actor) = token.actor().filter(|_| !is_ours) {
        answer.members(&format!(r#""act":{actor}"#));
    }
    answer.done()
}

fn of_session(found: &Refreshable) -> String {
    let Refreshable { id, session, end } = found;
    let mut answer = Answer::new(&session.user_id, &session.scopes.join(" "));
    if let Some(client_id) = &session.client_id {
        answer.text("client_id", client_id);
    }
    answer.time("exp", Some(*end));
    answer.text("sub", &session.user_id);
    if let Some(issuer) = guc::issuer() {
        answer.text("iss", issuer);
    }
    let audience: Vec<String> = session.audience.iter().map(|one| quote(one)).collect();
    answer.members(&format!(r#""aud":[{}]"#, audience.join(",")));
    answer.text("sid", &uuid::Uuid::from_bytes(*id.as_bytes()).to_string());
    answer.done()
}

/// The answer about an active token, as it is written.
struct Answer(String);

impl Answer {
    fn new(user_id: &str, scope: &str) -> Self {
        let mut answer = Answer(String::with_capacity(512));
        answer.0.push_str(r#"{"active":true"#);
        answer.text("scope", scope);
        answer.text("username", user_id);
        answer
    }

    fn members(&mut self, members: &str) {
        if !members.is_empty() {
            self.0.push(',');
            self.0.push_str(members);
        }
    }

    fn text(&mut self, name: &str, value: &str) {
        self.members(&format!(r#""{name}":{}"#, quote(value)));
    }

    /// In microseconds since 2000-01-01; nothing for one that never comes.
    fn time(&mut self, name: &str, micros: Option<i64>) {
        if let Some(micros) = micros.filter(|&micros| micros != i64::MAX) {
            let seconds = micros.saturating_add(EPOCHS).div_euclid(1_000_000);
            self.members(&format!(r#""{name}":{seconds}"#));
        }
    }

    fn done(mut self) -> String {
        self.0.push('}');
        self.0
    }
}
