//! What every request must pass before a route sees it, and the headers that every response gets.

use std::net::IpAddr;
use std::time::Duration;

use axum::Extension;
use axum::body::{Body, HttpBody as _};
use axum::extract::Request;
use axum::http::header::{
    AUTHORIZATION, CACHE_CONTROL, CONNECTION, HOST, HeaderName, HeaderValue, WWW_AUTHENTICATE,
    X_CONTENT_TYPE_OPTIONS,
};
use axum::http::{Method, StatusCode, Uri, Version};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt as _;
use tokio::sync::{Semaphore, SemaphorePermit};

use super::connections::Client;
use super::peer::{ClientIp, FromTrustedProxy, Malformed};
use super::problem::Problem;
use super::request_id::{RequestId, X_REQUEST_ID};

pub(super) const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");

/// A body must have arrived within this time.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);
/// Beyond so many bytes, a body takes from what all of them may have together. So no client needs that for a usual request.
const SMALL_BODY: usize = 16 * 1024;
const MAX_BODIES: usize = 16 * 1024 * 1024;
static BODIES: Semaphore = Semaphore::const_new(MAX_BODIES);

/// The outermost middleware of both listeners.
pub(super) async fn check(
    Extension(client): Extension<Client>,
    mut request: Request,
    next: Next,
) -> Response {
    let from_proxy = client.rules.proxies.contains(client.peer.ip().to_canonical());
    let id = RequestId::of(request.headers(), from_proxy);
    let is_oauth = request.uri().path().starts_with("/oauth/");
    let answer = async {
        let checked = async {
            is_unambiguous(&mut request)?;
            is_for_this_host(&request, &client, from_proxy)?;
            let ip = client.rules.proxies.client_ip(client.peer, request.headers()).map_err(|Malformed| {
                Problem::new(StatusCode::BAD_REQUEST, "The Forwarded header is malformed.")
            })?;
            request.extensions_mut().insert(ClientIp(ip));
            request.extensions_mut().insert(FromTrustedProxy(from_proxy));
            with_body(request, client.rules.max_body).await
        };
        match checked.await {
            Ok(request) => next.run(request).await,
            Err(problem) if is_oauth => problem.into_oauth_response(),
            Err(problem) => problem.into_response(),
        }
    };
    let mut response = id.clone().scope(answer).await;
    let headers = response.headers_mut();
    // A route may say otherwise.
    headers.entry(CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(X_REQUEST_ID, id.value());
    if let (Some(metadata), Some(challenge)) =
        (&client.rules.resource_metadata, headers.get(WWW_AUTHENTICATE))
    {
        let challenge = with_metadata(challenge, metadata);
        headers.insert(WWW_AUTHENTICATE, challenge);
    }
    response
}

/// A Bearer challenge with the place of the resource's metadata (RFC 9728, section 5.1); others as they are.
fn with_metadata(challenge: &HeaderValue, metadata: &HeaderValue) -> HeaderValue {
    let separator = match challenge.as_bytes() {
        b"Bearer" => " ",
        other if other.starts_with(b"Bearer ") => ", ",
        _ => return challenge.clone(),
    };
    let value = [challenge.as_bytes(), separator.as_bytes(), metadata.as_bytes()].concat();
    HeaderValue::from_bytes(&value).unwrap_or_else(|_| challenge.clone())
}

/// The connection ends too: what else came on it may be read in two ways.
fn bad_request(why: &'static str) -> Problem {
    Problem::new(StatusCode::BAD_REQUEST, why).header(CONNECTION, "close")
}

/// Refuses a request that a proxy in front of this listener might read in another way (RFC 9112, sections 3.2 and 3.2.2;
/// RFC 9113, section 8.3.1). Behind it every request has a path and at most one Host header.
fn is_unambiguous(request: &mut Request) -> Result<(), Problem> {
    if request.version() == Version::HTTP_2 {
        take_authority(request)?;
    } else if request.uri().scheme().is_some() || request.uri().authority().is_some() {
        return Err(bad_request("Request a path, not an absolute URL: this is not a proxy."));
    }
    let count = |name: HeaderName| request.headers().get_all(name).iter().count();
    match count(HOST) {
        1 => {}
        0 if request.version() < Version::HTTP_11 => {}
        _ => return Err(bad_request("A request has exactly one Host header.")),
    }
    if request.headers().get(HOST).is_some_and(|host| host_name(host).is_none()) {
        return Err(bad_request("The Host header is a name or an address, optionally with a port."));
    }
    if count(AUTHORIZATION) > 1 || count(LAST_EVENT_ID) > 1 {
        return Err(bad_request("A request has at most one Authorization and one Last-Event-ID header."));
    }
    Ok(())
}

/// HTTP/2 has the host as `:authority`. It becomes the Host header, which must say the same if there is one.
fn take_authority(request: &mut Request) -> Result<(), Problem> {
    let parts = std::mem::take(request.uri_mut()).into_parts();
    if request.method() == Method::CONNECT {
        return Err(bad_request("Request a path: this is not a proxy."));
    }
    if let Some(authority) = parts.authority {
        let authority = HeaderValue::from_str(authority.as_str())
            .map_err(|_| bad_request("The authority is a name or an address, optionally with a port."))?;
        if request.headers().get(HOST).is_some_and(|host| *host != authority) {
            return Err(bad_request("The Host header and the authority are the same."));
        }
        request.headers_mut().insert(HOST, authority);
    }
    *request.uri_mut() = parts.path_and_query.map(Uri::from).unwrap_or_default();
    Ok(())
}

/// See [`is_rebound`]. A proxy passes on the host that its own client asked for, which is for the proxy to check.
fn is_for_this_host(request: &Request, client: &Client, from_proxy: bool) -> Result<(), Problem> {
    if client.is_loopback && !from_proxy && is_rebound(request, client.rules.public_host.as_deref()) {
        return Err(Problem::new(
            StatusCode::MISDIRECTED_REQUEST,
            "Use localhost or an IP address as the host: this listener serves no other name.",
        ));
    }
    Ok(())
}

/// Reads the body whole, so that no route waits for a slow client, and refuses one where there is none to be.
async fn with_body(request: Request, most: usize) -> Result<Request, Problem> {
    if request.body().is_end_stream() {
        return Ok(request);
    }
    let may_have_one =
        matches!(*request.method(), Method::POST | Method::PUT | Method::PATCH | Method::DELETE);
    if most == 0 || !may_have_one {
        // Otherwise the server would go on reading for as long as the client sends.
        return Err(bad_request("Requests have no body here."));
    }
    let too_large = || {
        let detail = format!("The body of a request has at most {most} bytes.");
        Problem::new(StatusCode::PAYLOAD_TOO_LARGE, detail).header(CONNECTION, "close")
    };
    if request.body().size_hint().lower() > u64::try_from(most).unwrap_or(u64::MAX) {
        return Err(too_large());
    }
    let (parts, body) = request.into_parts();
    let body = match tokio::time::timeout(BODY_TIMEOUT, read(body, most)).await {
        Ok(Ok(body)) => body,
        Ok(Err(Unread::TooLarge)) => return Err(too_large()),
        Ok(Err(Unread::Broken)) => return Err(bad_request("The body ended early, or is malformed.")),
        Err(_) => {
            let problem = Problem::new(StatusCode::REQUEST_TIMEOUT, "The body took too long to arrive.");
            return Err(problem.header(CONNECTION, "close"));
        }
    };
    Ok(Request::from_parts(parts, Body::from(body)))
}

enum Unread {
    TooLarge,
    Broken,
}

async fn read(mut body: Body, most: usize) -> Result<Bytes, Unread> {
    let expected = body.size_hint().upper().and_then(|upper| usize::try_from(upper).ok());
    let expected = u32::try_from(expected.unwrap_or(most).min(most)).map_err(|_| Unread::TooLarge)?;
    let mut all = BytesMut::new();
    let mut share: Option<SemaphorePermit<'_>> = None;
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame.map_err(|_| Unread::Broken)?.into_data() else { continue };
        if all.len() + data.len() > most {
            return Err(Unread::TooLarge);
        }
        if share.is_none() && all.len() + data.len() > SMALL_BODY {
            // All of it at once: bodies that each held a part and waited for more would wait for each other.
            share = Some(BODIES.acquire_many(expected).await.map_err(|_| Unread::Broken)?);
        }
        all.extend_from_slice(&data);
    }
    Ok(all.freeze())
}

/// DNS rebinding: a page in a browser can point a name of its own at this machine, and then read what is served here. It
/// cannot make the browser send `localhost` or an address as the host.
fn is_rebound(request: &Request, public_host: Option<&str>) -> bool {
    let name = request.headers().get(HOST).and_then(host_name);
    name.is_some_and(|name| {
        let known = ["localhost"].into_iter().chain(public_host);
        !(known.into_iter().any(|known| name.eq_ignore_ascii_case(known)) || name.parse::<IpAddr>().is_ok())
    })
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
