//! The daemon's HTTP port: `/livez`, `/readyz`, `/metrics` and `/events`.
//!
//! Everything about a connection is bounded: how many there are, how long a request may take to arrive, how large it may
//! be, and how long a client may leave what it asked for unread.

mod events;
mod metrics;
mod position;

use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, HOST, HeaderName, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_io_timeout::TimeoutStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::error::{Error, Result};

pub use events::{EventStreams, wake_streams};
pub use metrics::Metrics;

/// Far more than scrapers and event streams need; beyond it, new connections wait.
const MAX_CONNECTIONS: usize = 256;
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
    /// Fails if the address is not to be had: better at the start than unnoticed.
    pub async fn bind(address: SocketAddr) -> Result<Self> {
        let taken = async {
            let listener = TcpListener::bind(address).await?;
            let address = listener.local_addr()?;
            Ok::<_, std::io::Error>(Self { listener, address })
        };
        taken.await.map_err(|error| {
            Error::usage(format!("could not listen on --http-address {address}: {error}")).with_remedy(
                "give another one, such as 127.0.0.1:9464, with port 0 for any that is free, or off",
            )
        })
    }

    /// Serves until `stop`, then lets running answers end; streams end at once.
    pub async fn run(self, site: Arc<Site>, stop: CancellationToken) -> Result<()> {
        tracing::info!(address = %self.address, "serving HTTP");
        let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let connections = TaskTracker::new();
        // Names that lead to this machine can be anybody's: see `is_rebound`.
        let loopback = self.address.ip().is_loopback();
        loop {
            let place = tokio::select! {
                place = places.clone().acquire_owned() => place,
                () = stop.cancelled() => break,
            };
            let accepted = tokio::select! {
                accepted = self.listener.accept() => accepted,
                () = stop.cancelled() => break,
            };
            match accepted {
                Ok((socket, peer)) => {
                    let (site, stop) = (site.clone(), stop.clone());
                    connections.spawn(async move {
                        serve(socket, peer, loopback, site, stop).await;
                        drop(place);
                    });
                }
                Err(error) => {
                    // Such as too many open files: it will not be better at once.
                    tracing::debug!(%error, "could not accept a connection");
                    tokio::select! {
                        () = tokio::time::sleep(Duration::from_millis(100)) => {}
                        () = stop.cancelled() => break,
                    }
                }
            }
        }
        connections.close();
        // Who reads slowly must not hold up the shutdown.
        let _ = tokio::time::timeout(Duration::from_secs(1), connections.wait()).await;
        Ok(())
    }
}

async fn serve(
    socket: TcpStream,
    peer: SocketAddr,
    loopback: bool,
    site: Arc<Site>,
    stop: CancellationToken,
) {
    // Events are small and each is to arrive now.
    let _ = socket.set_nodelay(true);
    let mut socket = TimeoutStream::new(socket);
    socket.set_write_timeout(Some(WRITE_TIMEOUT));
    let service = service_fn(|request| answer(request, peer, loopback, &site, &stop));
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(REQUEST_TIMEOUT)
        .max_buf_size(MAX_REQUEST)
        .serve_connection(TokioIo::new(Box::pin(socket)), service);
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%peer, %error, "an HTTP connection broke");
    }
}

async fn answer(
    request: Request<Incoming>,
    peer: SocketAddr,
    loopback: bool,
    site: &Site,
    stop: &CancellationToken,
) -> std::result::Result<Response<Body>, Infallible> {
    if loopback && is_rebound(&request) {
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
        "/readyz" if site.metrics.is_ready() => match site.metrics.unled() {
            tasks if tasks.is_empty() => text(StatusCode::OK, "ok\n"),
            tasks => text(StatusCode::SERVICE_UNAVAILABLE, format!("no daemon leads {}\n", tasks.join(", "))),
        },
        "/readyz" => text(StatusCode::SERVICE_UNAVAILABLE, "no connection to the database\n"),
        "/metrics" => {
            let mut page = text(StatusCode::OK, site.metrics.page());
            page.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(metrics::CONTENT));
            page
        }
        _ => site.events.open(&request, peer, stop).await,
    })
}

/// A page in a browser can have a name of its own lead to this machine, and then read what it serves. It cannot have the
/// browser ask for localhost or for an address.
fn is_rebound(request: &Request<Incoming>) -> bool {
    let Some(host) = request.headers().get(HOST) else { return false };
    let Ok(host) = host.to_str() else { return true };
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    };
    !(name.eq_ignore_ascii_case("localhost") || name.parse::<IpAddr>().is_ok())
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
