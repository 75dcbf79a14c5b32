//! What every request must pass before a route sees it, and the headers that every response gets.

use std::net::IpAddr;

use axum::Extension;
use axum::body::HttpBody as _;
use axum::extract::Request;
use axum::http::header::{
    AUTHORIZATION, CACHE_CONTROL, CONNECTION, HOST, HeaderName, HeaderValue, X_CONTENT_TYPE_OPTIONS,
};
use axum::http::{StatusCode, Version};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};

use super::connections::Client;
use super::problem::Problem;

pub(super) const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");

/// The outermost middleware of both listeners.
pub(super) async fn check(Extension(client): Extension<Client>, request: Request, next: Next) -> Response {
    let mut response = match is_unambiguous(&request) {
        Err(why) => Problem::new(StatusCode::BAD_REQUEST, why).header(CONNECTION, "close").into_response(),
        Ok(()) if client.is_loopback && is_rebound(&request) => Problem::new(
            StatusCode::MISDIRECTED_REQUEST,
            "Use localhost or an IP address as the host: this listener serves no other name.",
        )
        .into_response(),
        Ok(()) => next.run(request).await,
    };
    let headers = response.headers_mut();
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

/// Refuses a request that a proxy in front of this listener might read in another way (RFC 9112, sections 3.2 and 3.2.2).
fn is_unambiguous(request: &Request) -> std::result::Result<(), &'static str> {
    if request.uri().scheme().is_some() || request.uri().authority().is_some() {
        return Err("Request a path, not an absolute URL: this is not a proxy.");
    }
    let count = |name: HeaderName| request.headers().get_all(name).iter().count();
    match count(HOST) {
        1 => {}
        0 if request.version() < Version::HTTP_11 => {}
        _ => return Err("A request has exactly one Host header."),
    }
    if request.headers().get(HOST).is_some_and(|host| host_name(host).is_none()) {
        return Err("The Host header is a name or an address, optionally with a port.");
    }
    if count(AUTHORIZATION) > 1 || count(LAST_EVENT_ID) > 1 {
        return Err("A request has at most one Authorization and one Last-Event-ID header.");
    }
    // Otherwise the server would go on reading for as long as the client sends.
    if !request.body().is_end_stream() {
        return Err("Requests have no body here.");
    }
    Ok(())
}

/// DNS rebinding: a page in a browser can point a name of its own at this machine, and then read what is served here. It
/// cannot make the browser send `localhost` or an address as the host.
fn is_rebound(request: &Request) -> bool {
    let name = request.headers().get(HOST).and_then(host_name);
    name.is_some_and(|name| !(name.eq_ignore_ascii_case("localhost") || name.parse::<IpAddr>().is_ok()))
}

/// The name or the address in a Host header, without brackets and port; `None` if it is malformed.
fn host_name(host: &HeaderValue) -> Option<&str> {
    let host = host.to_str().ok()?;
    let (name, port) = match host.strip_prefix('[') {
        Some(rest) => {
            let (address, port) = rest.split_once(']')?;
            address.parse::<std::net::Ipv6Addr>().ok()?;
            (address, port)
        }
        None => {
            let end = host.find(':').unwrap_or(host.len());
            let (name, port) = host.split_at(end);
            let known = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
            if name.is_empty() || !name.bytes().all(known) {
                return None;
            }
            (name, port)
        }
    };
    let sound = match port.strip_prefix(':') {
        Some(port) => port.bytes().all(|byte| byte.is_ascii_digit()) && port.parse::<u16>().is_ok(),
        None => port.is_empty(),
    };
    sound.then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_header_is_a_name_or_an_address_perhaps_with_a_port() {
        for (host, name) in [
            ("localhost", Some("localhost")),
            ("LOCALHOST:9464", Some("LOCALHOST")),
            ("127.0.0.1:80", Some("127.0.0.1")),
            ("[::1]", Some("::1")),
            ("[::1]:9464", Some("::1")),
            ("", None),
            (":80", None),
            ("localhost:", None),
            ("localhost:http", None),
            ("localhost:+80", None),
            ("localhost:65536", None),
            ("localhost, evil.example", None),
            ("evil.example@localhost", None),
            ("localhost/evil", None),
            ("[::1", None),
            ("[::1]80", None),
            ("[evil.example]", None),
            ("::1", None),
        ] {
            let value = HeaderValue::from_str(host).unwrap();
            assert_eq!(host_name(&value), name, "{host}");
        }
    }
}
