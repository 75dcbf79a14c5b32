//! What the routes of the API ask the database, and what they answer when it refuses or cannot be asked.
//!
//! The login has the capability `gateway`: each of its functions takes the credential of the caller and decides by it alone. So
//! nothing here decides anything; it asks, within a bounded time, and puts the answer into HTTP's words.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::http::StatusCode;
use serde::Deserialize;
use tokio_util::sync::CancellationToken;

use super::problem::{Challenge, Problem};
use crate::app::verifier::Verifier;
use crate::contract::{Credential, Verified};
use crate::error::{Error, Kind, Result};
use crate::postgres::pool::{Database, PooledSession};
use crate::postgres::target::Target;
use crate::process::failure_log::FailureLog;

/// Sessions for what is not verifying. Each statement takes milliseconds, so few serve many.
const SESSIONS: usize = 8;
/// Requests that wait for one of them. Beyond it a client is better refused at once.
const MOST_WAITING: usize = 256;
/// When to try again while the database cannot be asked.
const RETRY: Duration = Duration::from_secs(2);

const UNAVAILABLE: &str = "The database cannot be asked now. Try again later.";

/// The state of the API's routes.
#[derive(Clone, Debug)]
pub struct Gateway(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    database: Database,
    verifier: Verifier,
    limit: Duration,
    stop: CancellationToken,
    failures: Mutex<FailureLog>,
}

impl Gateway {
    /// The state, and what has to run for it. No request waits for the database longer than `limit`.
    pub fn new(
        target: Target,
        limit: Duration,
        stop: CancellationToken,
    ) -> Result<(Self, impl Future<Output = Result<()>>)> {
        let database = Database::with_pool(target, SESSIONS, limit)?;
        let (verifier, run) = Verifier::new(&database, limit, stop.clone());
        let failures = Mutex::default();
        Ok((Self(Arc::new(Inner { database, verifier, limit, stop, failures })), run))
    }

    /// A session for one statement: each is a transaction of its own. 503 if there is none within the time limit.
    pub(super) async fn session(&self) -> Result<PooledSession, Problem> {
        if self.0.database.waiting() >= MOST_WAITING {
            return Err(unavailable("Too many requests wait for the database. Try again later."));
        }
        let session = tokio::time::timeout(self.0.limit, self.0.database.session(&self.0.stop)).await;
        match session {
            Ok(Ok(session)) => Ok(session),
            Ok(Err(error)) => {
                // Logged where connections are made.
                tracing::debug!(%error, "no session for a request");
                Err(unavailable(UNAVAILABLE))
            }
            Err(_) => Err(unavailable("The database takes too long to answer. Try again later.")),
        }
    }

    /// What a credential is worth, with whatever else is verified at the moment.
    pub(super) async fn verify(&self, credential: Credential) -> Result<Verified, Problem> {
        self.0.verifier.verify(credential).await.map_err(|error| self.problem(&error))
    }

    /// The answer to a request for which a statement failed.
    pub(super) fn problem(&self, error: &Error) -> Problem {
        let problem = problem(error);
        if problem.status().is_server_error() {
            let mut failures = self.0.failures.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(tally) = failures.failed(&error.to_string()) {
                tracing::warn!(requests = tally.failures, "requests of the API fail: {error}");
            }
        }
        problem
    }
}

fn unavailable(detail: &'static str) -> Problem {
    Problem::new(StatusCode::SERVICE_UNAVAILABLE, detail).retry_after(RETRY)
}

/// The detail of an error that `tollgate.authenticate` raises.
#[derive(Debug, Default, Deserialize)]
struct Refusal {
    code: String,
    #[serde(default)]
    missing_scopes: Vec<String>,
    /// In seconds.
    retry_after: Option<f64>,
}

fn problem(error: &Error) -> Problem {
    let Some(sqlstate) = error.sqlstate() else {
        return match error.kind() {
            Kind::Unreachable | Kind::ConnectionLost | Kind::Stopping => unavailable(UNAVAILABLE),
            _ => internal(),
        };
    };
    let refusal: Option<Refusal> = error.detail().and_then(|detail| serde_json::from_str(detail).ok());
    // What the extension says never repeats a credential.
    let said = |status| {
        let mut problem = Problem::new(status, sentence(error));
        if let Some(hint) = error.hint() {
            problem = problem.hint(hint);
        }
        problem
    };
    match (sqlstate.code(), refusal) {
        ("28000", Some(refusal)) => refused(&refusal.code),
        ("42501", Some(refusal)) if !refusal.missing_scopes.is_empty() => {
            lacks_scope(&refusal.missing_scopes.join(" "))
        }
        ("53400", Some(refusal)) => limited(
            &refusal.code,
            refusal.retry_after.and_then(|wait| Duration::try_from_secs_f64(wait).ok()),
        ),
        // Of PostgreSQL itself: the login lacks the capability.
        ("42501", None) if error.message().contains("permission denied for ") => internal(),
        ("42501", _) => said(StatusCode::FORBIDDEN),
        ("42704", _) if !is_in_statement(error) => said(StatusCode::NOT_FOUND),
        ("55000" | "42710" | "23505" | "2BP01" | "54000", _) => said(StatusCode::CONFLICT),
        // Serialization, deadlocks, locks, time-outs: the same may succeed later.
        ("25006" | "40001" | "40P01" | "55P03" | "55006", _) => unavailable(UNAVAILABLE),
        (code, _) if ["08", "53", "57", "58"].contains(&&code[..2]) => unavailable(UNAVAILABLE),
        (code, _) if code.starts_with("22") => {
            let mut problem = said(StatusCode::BAD_REQUEST);
            if let Some(detail) = error.detail() {
                problem = problem.member("argument", detail);
            }
            problem
        }
        _ => internal(),
    }
}

/// What is asked of a schema that does not have it is our mistake, not the caller's.
fn is_in_statement(error: &Error) -> bool {
    error.remedy().is_some_and(|remedy| remedy.contains("CREATE EXTENSION"))
}

fn sentence(error: &Error) -> String {
    let message = error.message();
    // "could not revoke the token: there is no such token"
    let said = match message.strip_prefix("could not ") {
        Some(rest) => rest.split_once(": ").map_or(message, |(_, said)| said),
        None => message,
    };
    let mut letters = said.chars();
    let first = letters.next().map(|first| first.to_uppercase().to_string()).unwrap_or_default();
    format!("{first}{}.", letters.as_str())
}

fn internal() -> Problem {
    Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "This cannot be answered. The daemon's log says why.")
}

/// 401 for a credential that is not good for this.
pub(super) fn refused(code: &str) -> Problem {
    let detail = match code {
        "EXPIRED" => "The credential has expired.",
        "REVOKED" => "The credential was revoked.",
        "DISABLED" => "The credential is disabled.",
        "IP_NOT_ALLOWED" => "The credential may not be used from this address.",
        "NOT_YET_VALID" => "The credential is not valid yet.",
        "WRONG_AUDIENCE" => "The credential is for another audience.",
        _ => "The credential was refused.",
    };
    Problem::unauthorized(&Challenge::invalid_token(), detail).code(code)
}

/// 403 for one that lacks scopes, which are separated by spaces.
pub(super) fn lacks_scope(scopes: &str) -> Problem {
    Problem::insufficient_scope(scopes, "The credential lacks a scope that is needed.")
}

/// 429; without a time for a budget that is used up for good.
pub(super) fn limited(code: &str, retry_after: Option<Duration>) -> Problem {
    let detail = match code {
        "QUOTA_EXCEEDED" => "The quota is used up.",
        _ => "Too many requests.",
    };
    let problem = Problem::new(StatusCode::TOO_MANY_REQUESTS, detail).code(code);
    match retry_after {
        Some(wait) => problem.retry_after(wait),
        None => problem,
    }
}

/// The same for an answer of [`Gateway::verify`] that is not valid; `scopes` are those that were required.
pub(super) fn refusal(verified: &Verified, scopes: &str) -> Problem {
    match verified.code.as_str() {
        "INSUFFICIENT_SCOPE" => lacks_scope(scopes),
        code @ ("RATE_LIMITED" | "QUOTA_EXCEEDED") => limited(code, verified.retry_after),
        // The copy of the data here is too old to decide.
        "STALE" => unavailable(UNAVAILABLE),
        code => refused(code),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_database_says_is_repeated_as_a_sentence() {
        for (message, expected) in [
            ("could not revoke the token: there is no such token", "There is no such token."),
            ("could not list: a: b", "A: b."),
            ("it broke", "It broke."),
        ] {
            assert_eq!(sentence(&Error::failed(message)), expected);
        }
    }
}
