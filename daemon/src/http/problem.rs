//! Errors as RFC 9457 describes them: `application/problem+json` with title, status and detail, for a refused token its code,
//! and the headers that go with an error: the challenge, the limit, and when to try again.

use std::borrow::Cow;
use std::time::Duration;

use axum::http::header::{CONTENT_TYPE, HeaderName, HeaderValue, RETRY_AFTER, WWW_AUTHENTICATE};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::{Map, Value};

use super::request_id;

/// An error response. `detail` says what the client can do; it must repeat nothing that the client sent.
#[derive(Debug)]
pub(super) struct Problem(Box<Inner>);

#[derive(Debug)]
struct Inner {
    status: StatusCode,
    detail: Cow<'static, str>,
    code: Option<String>,
    hint: Option<String>,
    others: Map<String, Value>,
    headers: HeaderMap,
}

/// Without `type`, which then means `about:blank`: the status says what kind of problem it is.
#[derive(Serialize)]
struct Document<'a> {
    title: &'a str,
    status: u16,
    detail: &'a str,
    /// The same as `detail`, for clients that look for a message.
    message: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    code: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    hint: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    request_id: Option<String>,
    #[serde(flatten)]
    others: &'a Map<String, Value>,
}

impl Problem {
    pub(super) fn new(status: StatusCode, detail: impl Into<Cow<'static, str>>) -> Self {
        Self(Box::new(Inner {
            status,
            detail: detail.into(),
            code: None,
            hint: None,
            others: Map::new(),
            headers: HeaderMap::new(),
        }))
    }

    /// 401. Says no error code if nothing was presented.
    pub(super) fn unauthorized(challenge: &Challenge, detail: impl Into<Cow<'static, str>>) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, detail).challenge(challenge)
    }

    /// 403, since the credential lacks a scope, which both the challenge and `scope` name.
    pub(super) fn insufficient_scope(scope: &str, detail: impl Into<Cow<'static, str>>) -> Self {
        Self::new(StatusCode::FORBIDDEN, detail)
            .challenge(&Challenge::insufficient_scope(scope))
            .code("INSUFFICIENT_SCOPE")
            .member("scope", scope)
    }

    /// 429.
    pub(super) fn too_many_requests(wait: Duration, detail: impl Into<Cow<'static, str>>) -> Self {
        Self::new(StatusCode::TOO_MANY_REQUESTS, detail).retry_after(wait)
    }

    /// 503, to be tried again.
    pub(super) fn unavailable(detail: &'static str) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, detail).retry_after(Duration::from_secs(5))
    }

    pub(super) fn status(&self) -> StatusCode {
        self.0.status
    }

    pub(super) fn detail(&self) -> &str {
        &self.0.detail
    }

    pub(super) fn headers(&self) -> &HeaderMap {
        &self.0.headers
    }

    pub(super) fn header(mut self, name: HeaderName, value: impl Into<HeaderField>) -> Self {
        self.0.headers.insert(name, value.into().0);
        self
    }

    /// What RFC 6750, section 3 asks for.
    pub(super) fn challenge(self, challenge: &Challenge) -> Self {
        self.header(WWW_AUTHENTICATE, challenge.value())
    }

    /// Whole seconds, and at least one: an earlier attempt would fail too.
    pub(super) fn retry_after(self, wait: Duration) -> Self {
        let seconds = whole_seconds(wait).max(1);
        self.header(RETRY_AFTER, HeaderValue::from(seconds))
    }

    pub(super) fn rate_limit(mut self, limit: &RateLimit) -> Self {
        self.0.headers.extend(limit.headers());
        self
    }

    /// As `tollgate.verification` has it.
    pub(super) fn code(mut self, code: impl Into<String>) -> Self {
        self.0.code = Some(code.into());
        self
    }

    /// What to do, where the database knows.
    pub(super) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.0.hint = Some(hint.into());
        self
    }

    /// One more member of the document (RFC 9457, section 3.2).
    pub(super) fn member(mut self, name: &'static str, value: impl Into<Value>) -> Self {
        self.0.others.insert(name.to_owned(), value.into());
        self
    }

    /// The same error as RFC 6749, section 5.2 writes it, for what is below `/oauth`.
    pub(super) fn into_oauth_response(self) -> Response {
        let error = match self.0.status {
            StatusCode::SERVICE_UNAVAILABLE => "temporarily_unavailable",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request",
        };
        let body = serde_json::json!({"error": error, "error_description": self.0.detail}).to_string();
        let content_type = [(CONTENT_TYPE, HeaderValue::from_static("application/json"))];
        (self.0.status, self.0.headers, content_type, body).into_response()
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let document = Document {
            title: self.0.status.canonical_reason().unwrap_or("Error"),
            status: self.0.status.as_u16(),
            detail: &self.0.detail,
            message: &self.0.detail,
            code: self.0.code.as_deref(),
            hint: self.0.hint.as_deref(),
            request_id: request_id::current().map(|id| id.as_str().to_owned()),
            others: &self.0.others,
        };
        // Strings and numbers can be written as JSON.
        let body = serde_json::to_string(&document).unwrap_or_default();
        let content_type = [(CONTENT_TYPE, HeaderValue::from_static("application/problem+json"))];
        (self.0.status, self.0.headers, content_type, body).into_response()
    }
}

/// The value of a header, from text that is known to fit into one or from such a value.
pub(super) struct HeaderField(HeaderValue);

impl From<&'static str> for HeaderField {
    fn from(text: &'static str) -> Self {
        Self(HeaderValue::from_static(text))
    }
}

impl From<HeaderValue> for HeaderField {
    fn from(value: HeaderValue) -> Self {
        Self(value)
    }
}

/// A value of `WWW-Authenticate` (RFC 6750, section 3). `request_checks` adds where the metadata of RFC 9728 is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Challenge {
    error: Option<&'static str>,
    scope: Option<String>,
}

impl Challenge {
    /// Nothing was presented, so there is no error yet.
    pub(super) fn nothing_presented() -> Self {
        Self { error: None, scope: None }
    }

    pub(super) fn invalid_request() -> Self {
        Self { error: Some("invalid_request"), scope: None }
    }

    pub(super) fn invalid_token() -> Self {
        Self { error: Some("invalid_token"), scope: None }
    }

    pub(super) fn insufficient_scope(scope: &str) -> Self {
        Self { error: Some("insufficient_scope"), scope: None }.scope(scope)
    }

    /// What is needed, several separated by spaces.
    pub(super) fn scope(mut self, scope: &str) -> Self {
        // What RFC 6749, section 3.3 lets a scope consist of: nothing in it ends the quoted string.
        let allowed = |c: &char| c.is_ascii() && matches!(c, ' ' | '!' | '#'..='[' | ']'..='~');
        self.scope = Some(scope.chars().filter(allowed).collect());
        self
    }

    pub(super) fn value(&self) -> HeaderValue {
        let error = self.error.map(|error| format!("error=\"{error}\""));
        let scope = self.scope.as_ref().map(|scope| format!("scope=\"{scope}\""));
        let parameters: Vec<String> = error.into_iter().chain(scope).collect();
        let text = format!("Bearer {}", parameters.join(", "));
        HeaderValue::from_str(text.trim_end()).unwrap_or(HeaderValue::from_static("Bearer"))
    }
}

/// What is left of a limit, as draft-ietf-httpapi-ratelimit-headers-10 writes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RateLimit {
    /// So many requests …
    pub(super) limit: u64,
    /// … in this time.
    pub(super) window: Duration,
    pub(super) remaining: u64,
    /// Until all of it is there again.
    pub(super) reset: Duration,
}

impl RateLimit {
    /// `RateLimit-Policy` and `RateLimit`, also for a response that is no error.
    pub(super) fn headers(&self) -> [(HeaderName, HeaderValue); 2] {
        let value = |text: String| HeaderValue::from_str(&text).unwrap_or(HeaderValue::from_static(""));
        let (window, reset) = (whole_seconds(self.window).max(1), whole_seconds(self.reset));
        [
            (
                HeaderName::from_static("ratelimit-policy"),
                value(format!("\"default\";q={};w={window}", self.limit)),
            ),
            (
                HeaderName::from_static("ratelimit"),
                value(format!("\"default\";r={};t={reset}", self.remaining)),
            ),
        ]
    }
}

fn whole_seconds(time: Duration) -> u64 {
    time.as_secs() + u64::from(time.subsec_nanos() > 0)
}

#[cfg(test)]
mod tests {
    use axum::body::to_bytes;

    use super::*;

    async fn parts(response: Response) -> (StatusCode, HeaderMap, Value) {
        let (parts, body) = response.into_parts();
        let body = to_bytes(body, 1 << 16).await.unwrap();
        (parts.status, parts.headers, serde_json::from_slice(&body).unwrap())
    }

    #[tokio::test]
    async fn a_problem_has_its_detail_as_message_too() {
        let problem =
            Problem::insufficient_scope("tollgate:tokens", "The token lacks the scope.").hint("Add it.");
        let (status, headers, document) = parts(problem.into_response()).await;
        assert_eq!(status, 403);
        assert_eq!(headers["content-type"], "application/problem+json");
        assert_eq!(
            headers["www-authenticate"],
            "Bearer error=\"insufficient_scope\", scope=\"tollgate:tokens\""
        );
        assert_eq!(
            document,
            serde_json::json!({
                "title": "Forbidden", "status": 403, "detail": "The token lacks the scope.",
                "message": "The token lacks the scope.", "code": "INSUFFICIENT_SCOPE", "hint": "Add it.",
                "scope": "tollgate:tokens",
            })
        );
    }

    #[tokio::test]
    async fn below_oauth_it_is_never_a_problem_document() {
        for (status, error) in [
            (400, "invalid_request"),
            (413, "invalid_request"),
            (503, "temporarily_unavailable"),
            (500, "server_error"),
        ] {
            let problem = Problem::new(StatusCode::from_u16(status).unwrap(), "No.").code("X");
            let (found, headers, document) = parts(problem.into_oauth_response()).await;
            assert_eq!(
                (found.as_u16(), &headers["content-type"]),
                (status, &HeaderValue::from_static("application/json"))
            );
            assert_eq!(document, serde_json::json!({"error": error, "error_description": "No."}));
        }
    }

    #[test]
    fn a_challenge_has_no_error_code_if_nothing_was_presented() {
        for (challenge, expected) in [
            (Challenge::nothing_presented(), "Bearer"),
            (Challenge::nothing_presented().scope("a b"), "Bearer scope=\"a b\""),
            (Challenge::invalid_token(), "Bearer error=\"invalid_token\""),
            (Challenge::invalid_request(), "Bearer error=\"invalid_request\""),
            (
                Challenge::insufficient_scope("posts:read\", x=\"\\\r\n\u{e9}"),
                "Bearer error=\"insufficient_scope\", scope=\"posts:read, x=\"",
            ),
        ] {
            assert_eq!(challenge.value(), expected);
        }
    }

    #[test]
    fn a_limit_is_written_as_structured_fields_and_waiting_is_rounded_up() {
        let limit = RateLimit {
            limit: 100,
            window: Duration::from_secs(60),
            remaining: 7,
            reset: Duration::from_millis(1500),
        };
        let problem = Problem::too_many_requests(Duration::from_millis(1), "Wait.").rate_limit(&limit);
        assert_eq!(problem.headers()["ratelimit-policy"], "\"default\";q=100;w=60");
        assert_eq!(problem.headers()["ratelimit"], "\"default\";r=7;t=2");
        assert_eq!(problem.headers()["retry-after"], "1");
    }
}
