//! The daemon's HTTP port: `/livez`, `/readyz`, `/metrics` and `/events`.
//!
//! Everything about a connection is bounded: how many there are, how long a request may take to arrive, how large it may
//! be, and how long a client may leave what it asked for unread.

mod connections;
mod events;
mod metrics;

use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt as _, Full};
use hyper::body::{Body as _, Incoming};
use hyper::header::{
    ALLOW, AUTHORIZATION, CACHE_CONTROL, CONNECTION, CONTENT_TYPE, HOST, HeaderName, HeaderValue,
};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode, Version};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio_io_timeout::TimeoutStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::background::backoff;
use crate::error::{Error, Result};
use connections::{Connection, Connections};

pub use events::{EventStreams, wake_streams};
pub use metrics::Metrics;

/// Far more than scrapers and event streams need; beyond it, the one that has been idle for the longest is closed. Those of
/// running and asked-for event streams stay open, so there are fewer of these, whatever they do.
const MAX_CONNECTIONS: usize = 256;
const _: () = assert!(events::MAX_STREAMS + events::MAX_ASKING <= MAX_CONNECTIONS * 3 / 4);
/// A request must have arrived in full within this time.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// A client that takes nothing for this long is gone, or as good as gone.
const WRITE_TIMEOUT: Duration = Duration::from_secs(20);
/// The longest request, without a body, since none of ours has one.
const MAX_REQUEST: usize = 16 * 1024;

type Body = BoxBody<Bytes, Infallible>;

/// What the port answers with.
#[derive(Debug)]
pub struct Site {
    pub metrics: Metrics,
    pub events: EventStreams,
}

/// The port, taken but not served yet.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
}

impl Server {
    /// Takes the port as soon as no other process has it: that of a daemon that is being replaced is free in a moment. An address
    /// that can never be taken is an error, better at the start than unnoticed.
    pub async fn bind_when_free(address: SocketAddr) -> Result<Self> {
        let mut retries = backoff::delays();
        let mut said = false;
        loop {
            let taken = async {
                let listener = TcpListener::bind(address).await?;
                let address = listener.local_addr()?;
                Ok::<_, std::io::Error>(Self { listener, address })
            };
            match taken.await {
                Ok(server) => return Ok(server),
                Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {
                    if !said {
                        tracing::warn!(
                            "--http-address {address} is in use by another process; trying again until it is free"
                        );
                        said = true;
                    }
                    tokio::time::sleep(retries.next_delay()).await;
                }
                Err(error) => {
                    return Err(Error::usage(format!(
                        "could not listen on --http-address {address}: {error}"
                    ))
                    .with_remedy(
                        "give another one, such as 127.0.0.1:9464, with port 0 for any that is free, or off",
                    ));
                }
            }
        }
    }

    /// Serves until `stop`, then lets running answers end; streams end at once.
    pub async fn run(self, site: Arc<Site>, stop: CancellationToken) -> Result<()> {
        tracing::info!(address = %self.address, "serving HTTP");
        let connections = Connections::new(MAX_CONNECTIONS);
        let tasks = TaskTracker::new();
        // Names that lead to this machine can be anybody's: see `is_rebound`.
        let loopback = self.address.ip().is_loopback();
        loop {
            let accepted = tokio::select! {
                accepted = self.listener.accept() => accepted,
                () = stop.cancelled() => break,
            };
            match accepted {
                Ok((socket, peer)) => {
                    let client = Client { connection: connections.open(), peer, loopback };
                    tasks.spawn(serve(socket, client, site.clone(), stop.clone()));
                }
                Err(error) => {
                    // Such as too many open files: one of them may be had back from an idle connection.
                    tracing::debug!(%error, "could not accept a connection");
                    connections.close_one();
                    tokio::select! {
                        () = tokio::time::sleep(Duration::from_millis(100)) => {}
                        () = stop.cancelled() => break,
                    }
                }
            }
        }
        tasks.close();
        // Who reads slowly must not hold up the shutdown.
        let _ = tokio::time::timeout(Duration::from_secs(1), tasks.wait()).await;
        Ok(())
    }
}

/// Who asks.
struct Client {
    connection: Connection,
    peer: SocketAddr,
    /// Whether the port is on a loopback address.
    loopback: bool,
}

async fn serve(socket: TcpStream, client: Client, site: Arc<Site>, stop: CancellationToken) {
    // Events are small and each is to arrive now.
    let _ = socket.set_nodelay(true);
    let mut socket = TimeoutStream::new(socket);
    socket.set_write_timeout(Some(WRITE_TIMEOUT));
    let service = service_fn(|request| {
        client.connection.touch();
        answer(request, &client, &site, &stop)
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(REQUEST_TIMEOUT)
        .max_buf_size(MAX_REQUEST)
        .serve_connection(TokioIo::new(Box::pin(socket)), service);
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = client.connection.closed() => return,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(peer = %client.peer, %error, "an HTTP connection broke");
    }
}

async fn answer(
    request: Request<Incoming>,
    client: &Client,
    site: &Site,
    stop: &CancellationToken,
) -> std::result::Result<Response<Body>, Infallible> {
    if let Err(why) = is_plain(&request) {
        let mut refusal = text(StatusCode::BAD_REQUEST, why);
        refusal.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        return Ok(refusal);
    }
    if client.loopback && is_rebound(&request) {
        return Ok(text(
            StatusCode::MISDIRECTED_REQUEST,
            "Ask for localhost or an IP address: this port serves no other name.\n",
        ));
    }
    let path = request.uri().path();
    if !["/livez", "/readyz", "/metrics", "/events"].contains(&path) {
        return Ok(text(StatusCode::NOT_FOUND, "There are /livez, /readyz, /metrics and /events.\n"));
    }
    if ![Method::GET, Method::HEAD].contains(request.method()) {
        let mut refusal = text(StatusCode::METHOD_NOT_ALLOWED, "Only GET and HEAD.\n");
        refusal.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return Ok(refusal);
    }
    Ok(match path {
        // Whoever can answer at all is alive.
        "/livez" => text(StatusCode::OK, "ok\n"),
        "/readyz" if site.metrics.is_ready() => match site.metrics.leaderless() {
            tasks if tasks.is_empty() => text(StatusCode::OK, "ok\n"),
            tasks => text(StatusCode::SERVICE_UNAVAILABLE, format!("no daemon leads {}\n", tasks.join(", "))),
        },
        "/readyz" => text(StatusCode::SERVICE_UNAVAILABLE, "no connection to the database\n"),
        "/metrics" => {
            let mut page = text(StatusCode::OK, site.metrics.page());
            page.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(metrics::CONTENT));
            page
        }
        _ => site.events.open(&request, client, stop).await,
    })
}

/// Whether the request can be understood in one way only. Where two readers of it may differ, such as this port and a proxy
/// before it, or [`is_rebound`] and whatever else looks at the name, it is refused (RFC 9112, sections 3.2 and 3.2.2).
fn is_plain(request: &Request<Incoming>) -> std::result::Result<(), &'static str> {
    if request.uri().scheme().is_some() || request.uri().authority().is_some() {
        return Err("Ask for a path, such as /livez, not for a whole address: this port is no proxy.\n");
    }
    let count = |name: HeaderName| request.headers().get_all(name).iter().count();
    match count(HOST) {
        1 => {}
        0 if request.version() < Version::HTTP_11 => {}
        _ => return Err("A request has one Host header.\n"),
    }
    if request.headers().get(HOST).is_some_and(|host| host_name(host).is_none()) {
        return Err("The Host header is a name or an address, perhaps with a port.\n");
    }
    if count(AUTHORIZATION) > 1 || count(events::LAST_EVENT_ID) > 1 {
        return Err("A request has Authorization and Last-Event-ID once at most.\n");
    }
    // Else the connection would be read on, for as long as somebody sends.
    if !request.body().is_end_stream() {
        return Err("No request here has a body.\n");
    }
    Ok(())
}

/// A page in a browser can have a name of its own lead to this machine, and then read what it serves. It cannot have the
/// browser ask for localhost or for an address.
fn is_rebound(request: &Request<Incoming>) -> bool {
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

/// A short answer, never kept by anybody in between.
fn text(status: StatusCode, text: impl Into<Bytes>) -> Response<Body> {
    let mut response = Response::new(Full::new(text.into()).boxed());
    *response.status_mut() = status;
    let headers: [(HeaderName, &'static str); 2] =
        [(CONTENT_TYPE, "text/plain; charset=utf-8"), (CACHE_CONTROL, "no-store")];
    for (name, value) in headers {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    response
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
