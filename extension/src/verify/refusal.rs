//! What was wrong with the last verification of this session: told by `last_refusal`, and in the detail of what
//! `authenticate` raises, in the same words. It outlives the transaction, which such an error ends.

use crate::verify::presented::Required;
use core::cell::Cell;
use core::fmt::Write as _;
use serde_json::json;
use tollgate_core::status::Code;
use tollgate_core::token::{self, Fault};

/// Of the scopes that are missing, so many are named, and of each so many characters.
const MOST_SCOPES: usize = 8;
const MOST_CHARACTERS: usize = 128;

#[derive(Clone)]
pub(crate) struct Refusal {
    pub(crate) code: Code,
    /// Of what is malformed.
    pub(crate) fault: Option<Fault>,
    /// Of a token that lacks a required scope: those it lacks. "NULL" is a required NULL.
    pub(crate) missing_scopes: Vec<String>,
    /// Of what is over a limit, in microseconds.
    pub(crate) retry_after: Option<u64>,
}

thread_local! {
    static LAST: Cell<Option<Refusal>> = const { Cell::new(None) };
}

impl Refusal {
    pub(crate) fn new(code: Code) -> Self {
        Refusal { code, fault: None, missing_scopes: Vec::new(), retry_after: None }
    }

    /// `{"code": …}`, and of the other members those that say something.
    pub(crate) fn to_json(&self) -> String {
        let mut told = json!({ "code": self.code.as_str() });
        if let Some(fault) = self.fault {
            told["reason"] = fault.as_str().into();
        }
        if !self.missing_scopes.is_empty() {
            told["missing_scopes"] = self.missing_scopes.clone().into();
        }
        if let Some(micros) = self.retry_after {
            // Rounded up to milliseconds: no sooner will do.
            told["retry_after"] = (micros.div_ceil(1000) as f64 / 1000.0).into();
        }
        told.to_string()
    }

    pub(crate) fn remember(self) {
        LAST.set(Some(self));
    }

    pub(crate) fn last() -> Option<Refusal> {
        let last = LAST.take();
        LAST.set(last.clone());
        last
    }

    /// After a verification that refused nothing.
    #[inline]
    pub(crate) fn forget() {
        drop(LAST.take());
    }
}

/// The required scopes that are not granted, as they may be shown.
pub(crate) fn missing(required: &Required<'_>, granted: impl Fn(&[u8]) -> bool) -> Vec<String> {
    let missing = required.iter().filter(|one| !one.is_some_and(&granted));
    missing.take(MOST_SCOPES).map(shown).collect()
}

/// Required scopes come from the application, and who knows from where it has them: only what scopes are made of, not much
/// of it, and no part of a token.
pub(crate) fn shown(scope: Option<&[u8]>) -> String {
    let Some(scope) = scope else { return "NULL".to_owned() };
    // Before anything is replaced: what is left of a token in capital letters would be no run of digits any more.
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

/// A list of required scopes on a line of the log.
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
