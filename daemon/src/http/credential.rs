//! The credential that a request presents: `Authorization: Bearer` (RFC 6750, section 2.1), `X-API-Token`, `X-API-Key`, and
//! `?api_token=` where that is allowed, since URLs are logged. Cookies are never looked at, so no page of another site can act
//! for its visitor.
//!
//! What the credential is worth is for the database to decide. Here it is only found, whatever it looks like, and refused if
//! there are two: what stands between may have checked the other one (RFC 6750, section 2).

use std::convert::Infallible;

use axum::extract::FromRequestParts;
use axum::http::header::{AUTHORIZATION, HeaderName, HeaderValue};
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode};

use super::connections::Client;
use super::problem::{Challenge, Problem};
use crate::secret::Secret;

pub(super) const X_API_TOKEN: HeaderName = HeaderName::from_static("x-api-token");
pub(super) const X_API_KEY: HeaderName = HeaderName::from_static("x-api-key");
pub(super) const QUERY_PARAMETER: &str = "api_token";

/// What a request presents, if anything: an argument of a handler. Two are a 400.
#[derive(Clone, Debug)]
pub(super) struct Presented(pub(super) Option<Secret>);

/// The same for a handler that answers two by itself.
#[derive(Clone, Debug)]
pub(super) struct TryPresented(pub(super) Result<Option<Secret>, Ambiguous>);

/// A request presents more than one credential, or one in more than one way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ambiguous;

impl From<Ambiguous> for Problem {
    fn from(_: Ambiguous) -> Self {
        Self::new(
            StatusCode::BAD_REQUEST,
            "The request presents more than one credential. Send one, in one way: Authorization: Bearer, X-API-Token or X-API-Key.",
        )
        .challenge(&Challenge::invalid_request())
    }
}

/// Finds the credential. `query` is read only where it may hold one.
pub(super) fn presented(headers: &HeaderMap, query: Option<&str>) -> Result<Option<Secret>, Ambiguous> {
    // Of other schemes, such as Basic, this knows nothing.
    let bearer = headers.get_all(AUTHORIZATION).iter().filter_map(bearer);
    let named = [X_API_TOKEN, X_API_KEY].into_iter().flat_map(|name| headers.get_all(name).iter()).map(text);
    let in_query = query.into_iter().flat_map(|query| {
        let parameters = url::form_urlencoded::parse(query.as_bytes());
        parameters.filter(|(name, _)| name == QUERY_PARAMETER).map(|(_, value)| value.into_owned())
    });
    let mut all = bearer.chain(named).chain(in_query).map(Secret::new);
    let first = all.next();
    if all.next().is_some() { Err(Ambiguous) } else { Ok(first) }
}

/// A header that is no UTF-8 becomes text that is no credential.
fn text(value: &HeaderValue) -> String {
    String::from_utf8_lossy(value.as_bytes()).trim().to_owned()
}

fn bearer(value: &HeaderValue) -> Option<String> {
    let value = text(value);
    let (scheme, token) = value.split_once(' ').unwrap_or((&value, ""));
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim().to_owned())
}

fn find(parts: &Parts) -> Result<Option<Secret>, Ambiguous> {
    let in_query = parts.extensions.get::<Client>().is_some_and(|client| client.rules.token_in_query);
    presented(&parts.headers, parts.uri.query().filter(|_| in_query))
}

impl<S: Sync> FromRequestParts<S> for Presented {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        find(parts).map(Self).map_err(Problem::from)
    }
}

impl<S: Sync> FromRequestParts<S> for TryPresented {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Infallible> {
        Ok(Self(find(parts)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(lines: &[(&'static str, &str)], query: Option<&str>) -> Result<Option<String>, Ambiguous> {
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            headers.append(HeaderName::from_static(name), HeaderValue::from_bytes(value.as_bytes()).unwrap());
        }
        presented(&headers, query).map(|found| found.map(|secret| secret.expose().to_owned()))
    }

    #[test]
    fn one_credential_is_found_wherever_it_may_stand() {
        for (lines, query) in [
            (&[("authorization", "Bearer secret")][..], None),
            (&[("authorization", "bEARER   secret ")], None),
            (&[("x-api-token", "secret")], None),
            (&[("x-api-key", " secret")], Some("a=b")),
            (&[], Some("a=b&api_token=secret")),
            (&[], Some("api%5Ftoken=%73ecret")),
            (&[("authorization", "Basic dXNlcjpwYXNz"), ("x-api-key", "secret")], None),
        ] {
            assert_eq!(find(lines, query), Ok(Some("secret".to_owned())), "{lines:?} {query:?}");
        }
    }

    #[test]
    fn other_schemes_and_cookies_are_none() {
        for lines in [
            &[][..],
            &[("authorization", "Basic dXNlcjpwYXNz")],
            &[("authorization", "BearerX secret")],
            &[("cookie", "api_token=secret; Authorization=Bearer secret")],
            &[("proxy-authorization", "Bearer secret")],
        ] {
            assert_eq!(find(lines, None), Ok(None), "{lines:?}");
        }
    }

    #[test]
    fn what_is_no_token_is_presented_all_the_same_and_so_refused_as_one() {
        assert_eq!(find(&[("authorization", "Bearer")], None), Ok(Some(String::new())));
        assert_eq!(find(&[("authorization", "Bearer a b")], None), Ok(Some("a b".to_owned())));
        assert_eq!(find(&[("x-api-key", "")], None), Ok(Some(String::new())));
    }

    #[test]
    fn two_are_refused_even_if_they_are_the_same() {
        for (lines, query) in [
            (&[("authorization", "Bearer a"), ("authorization", "Bearer a")][..], None),
            (&[("authorization", "Bearer a"), ("x-api-token", "a")], None),
            (&[("x-api-key", "a"), ("x-api-token", "a")], None),
            (&[("x-api-key", "a"), ("x-api-key", "")], None),
            (&[("x-api-key", "a")], Some("api_token=a")),
            (&[], Some("api_token=a&api_token=b")),
        ] {
            assert_eq!(find(lines, query), Err(Ambiguous), "{lines:?} {query:?}");
        }
    }
}
