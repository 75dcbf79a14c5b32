//! Why the last verification of this session was refused: returned by `last_refusal`, and in the detail of the error
//! that `authenticate` raises, in the same form. It outlives the transaction, which such an error aborts.

use crate::verify::presented::Required;
use core::cell::Cell;
use core::fmt::Write as _;
use serde_json::json;
use tollgate_core::status::Code;
use tollgate_core::token;

/// Maximum number of missing scopes that are named, and maximum length of each.
const MOST_SCOPES: usize = 8;
const MOST_CHARACTERS: usize = 128;

#[derive(Clone)]
pub(crate) struct Refusal {
    pub(crate) code: Code,
    /// For MALFORMED, and some UNTRUSTED_ISSUER.
    pub(crate) reason: Option<&'static str>,
    /// For INSUFFICIENT_SCOPE: the missing scopes. "NULL" is a required NULL.
    pub(crate) missing_scopes: Vec<String>,
    /// For a refusal by a limit, in microseconds.
    pub(crate) retry_after: Option<u64>,
}

thread_local! {
    static LAST: Cell<Option<Refusal>> = const { Cell::new(None) };
}

impl Refusal {
    pub(crate) fn new(code: Code) -> Self {
        Refusal { code, reason: None, missing_scopes: Vec::new(), retry_after: None }
    }

    /// `{"code": …}`, and the other members that have a value.
    pub(crate) fn to_json(&self) -> String {
        let mut json = json!({ "code": self.code.as_str() });
        if let Some(reason) = self.reason {
            json["reason"] = reason.into();
        }
        if !self.missing_scopes.is_empty() {
            json["missing_scopes"] = self.missing_scopes.clone().into();
        }
        if let Some(micros) = self.retry_after {
            // Rounded up to milliseconds, so that a retry is not too early.
            json["retry_after"] = (micros.div_ceil(1000) as f64 / 1000.0).into();
        }
        json.to_string()
    }

    pub(crate) fn remember(self) {
        LAST.set(Some(self));
    }

    pub(crate) fn last() -> Option<Refusal> {
        let last = LAST.take();
        LAST.set(last.clone());
        last
    }

    /// Called after a verification that refused nothing.
    #[inline]
    pub(crate) fn forget() {
        drop(LAST.take());
    }
}

/// The required scopes that are not granted, in a form that may be shown.
pub(crate) fn missing(required: &Required<'_>, granted: impl Fn(&[u8]) -> bool) -> Vec<String> {
    let missing = required.iter().filter(|one| !one.is_some_and(&granted));
    missing.take(MOST_SCOPES).map(shown).collect()
}

/// Required scopes come from the application, which may take them from anywhere: only scope characters are shown, up to
/// a maximum length, and no part of a token.
pub(crate) fn shown(scope: Option<&[u8]>) -> String {
    let Some(scope) = scope else { return "NULL".to_owned() };
    // Redact first: after the replacement a token in capital letters would no longer be a run of digits.
    let redacted = token::redact(&String::from_utf8_lossy(&scope[..scope.len().min(4 * MOST_CHARACTERS)]));
    let mut shown: String = redacted
        .chars()
        .take(MOST_CHARACTERS)
        .map(|one| match one {
            'a'..='z' | '0'..='9' | '_' | '.' | ':' | '*' | '-' | '…' => one,
            _ => '?',
        })
        .collect();
    if redacted.chars().nth(MOST_CHARACTERS).is_some() || scope.len() > 4 * MOST_CHARACTERS {
        shown.push('…');
    }
    shown
}

/// Appends a list of required scopes to a log line.
pub(crate) fn push_scopes(line: &mut String, required: &Required<'_>) {
    for (n, scope) in required.iter().take(MOST_SCOPES).enumerate() {
        if n > 0 {
            line.push(',');
        }
        line.push_str(&shown(scope));
    }
    if required.len() > MOST_SCOPES {
        let _ = write!(line, ",…{} more", required.len() - MOST_SCOPES);
    }
}
