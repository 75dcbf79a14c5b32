//! Errors as RFC 9457 describes them: `application/problem+json` with title, status and detail, and for a refused token its
//! code.

use std::borrow::Cow;

use axum::http::header::{CONTENT_TYPE, HeaderName, HeaderValue, RETRY_AFTER, WWW_AUTHENTICATE};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

/// An error response. `detail` says what the client can do; it must repeat nothing that the client sent.
#[derive(Debug)]
pub(super) struct Problem {
    status: StatusCode,
    detail: Cow<'static, str>,
    code: Option<String>,
    headers: HeaderMap,
}

/// Without `type`, which then means `about:blank`: the status says what kind of problem it is.
#[derive(Serialize)]
struct Document<'a> {
    title: &'a str,
    status: u16,
    detail: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    code: Option<&'a str>,
}

impl Problem {
    pub(super) fn new(status: StatusCode, detail: impl Into<Cow<'static, str>>) -> Self {
        Self { status, detail: detail.into(), code: None, headers: HeaderMap::new() }
    }

    /// 401, with the challenge that RFC 6750, section 3 asks for.
    pub(super) fn unauthorized(challenge: &'static str, detail: impl Into<Cow<'static, str>>) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, detail).header(WWW_AUTHENTICATE, challenge)
    }

    /// 503, to be tried again.
    pub(super) fn unavailable(detail: &'static str) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, detail).header(RETRY_AFTER, "5")
    }

    pub(super) fn header(mut self, name: HeaderName, value: &'static str) -> Self {
        self.headers.insert(name, HeaderValue::from_static(value));
        self
    }

    /// As `tollgate.verification` has it.
    pub(super) fn code(mut self, code: impl Into<String>) -> Self {
        self.code = Some(code.into());
        self
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let document = Document {
            title: self.status.canonical_reason().unwrap_or("Error"),
            status: self.status.as_u16(),
            detail: &self.detail,
            code: self.code.as_deref(),
        };
        // Strings and a number can be written as JSON.
        let body = serde_json::to_string(&document).unwrap_or_default();
        let content_type = [(CONTENT_TYPE, HeaderValue::from_static("application/problem+json"))];
        (self.status, self.headers, content_type, body).into_response()
    }
}
