//! Accepts connections and serves a router on them.
//!
//! Not `axum::serve`, which bounds nothing. Here everything about a connection is bounded: how many there are, how long a
//! request may take to arrive, how large it may be, and how long a client may leave its response unread.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::http::Request;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio_io_timeout::TimeoutStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::ServiceExt as _;

use super::connections::{Client, Connections};
use super::rules::Rules;
use crate::background::backoff;
use crate::error::{Error, Result};

/// Far more than scrapers need, and more than event streams need. Beyond it, the connection that has been idle for the longest
/// is closed. Connections of running and requested event streams stay open, so there are fewer of these.
const MAX_OPS_CONNECTIONS: usize = 64;
pub(super) const MAX_API_CONNECTIONS: usize = 256;
/// The head of a request must have arrived within this time.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// A client that takes nothing for this long is gone, or as good as gone.
const WRITE_TIMEOUT: Duration = Duration::from_secs(20);
/// The longest head of a request.
const MAX_REQUEST: usize = 16 * 1024;

/// Which of the two it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listener {
    Ops,
    Api,
}

impl Listener {
    /// In logs, and of the task that serves it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ops => "ops",
            Self::Api => "api",
        }
    }

    fn max_connections(self) -> usize {
        match self {
            Self::Ops => MAX_OPS_CONNECTIONS,
            Self::Api => MAX_API_CONNECTIONS,
        }
    }
}

/// A listener that is not served yet.
#[derive(Debug)]
pub struct Server {
    listener: Listener,
    address: SocketAddr,
    rules: Arc<Rules>,
    /// None while another process has the address.
    socket: Option<TcpListener>,
}

impl Server {
    /// Fails if the address can never be used: better at the start than unnoticed. One that is in use is tried again by
    /// [`Server::run`], since the process that has it may end, and the daemon's work does not depend on it.
    pub async fn bind(listener: Listener, address: SocketAddr, rules: Rules) -> Result<Self> {
        let socket = bind(listener, address).await?;
        if socket.is_none() {
            tracing::warn!(
                listener = listener.name(),
                %address,
                "the address is in use, will try again: give --{}-address another one, port 0 for any free port, or off",
                listener.name()
            );
        }
        Ok(Self { listener, address, rules: Arc::new(rules), socket })
    }

    /// Serves until `stop`, then lets running responses end; streams end at once.
    pub async fn run(self, router: Router, stop: CancellationToken) -> Result<()> {
        let mut retries = backoff::delays();
        let mut bound = self.socket;
        let socket = loop {
            if let Some(socket) = bound {
                break socket;
            }
            tokio::select! {
                () = tokio::time::sleep(retries.next_delay()) => {}
                () = stop.cancelled() => return Ok(()),
            }
            bound = bind(self.listener, self.address).await?;
        };
        let address = socket.local_addr().unwrap_or(self.address);
        tracing::info!(listener = self.listener.name(), %address, "serving HTTP");
        let connections = Connections::new(self.listener.max_connections());
        let tasks = TaskTracker::new();
        // Any name may resolve to a loopback address: see `request_checks`.
        let is_loopback = address.ip().is_loopback();
        loop {
            let accepted = tokio::select! {
                accepted = socket.accept() => accepted,
                () = stop.cancelled() => break,
            };
            match accepted {
                Ok((socket, peer)) => {
                    let client = Client {
                        connection: Arc::new(connections.open()),
                        peer,
                        is_loopback,
                        rules: self.rules.clone(),
                    };
                    tasks.spawn(serve(socket, client, router.clone(), stop.clone()));
                }
                Err(error) => {
                    // Such as too many open files: an idle connection gives one back.
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
        // A client that reads slowly must not delay the shutdown.
        let _ = tokio::time::timeout(Duration::from_secs(1), tasks.wait()).await;
        Ok(())
    }
}

/// None if the address is in use.
async fn bind(listener: Listener, address: SocketAddr) -> Result<Option<TcpListener>> {
    match TcpListener::bind(address).await {
        Ok(socket) => Ok(Some(socket)),
        Err(error) if error.kind() == ErrorKind::AddrInUse => Ok(None),
        Err(error) => {
            let option = format!("--{}-address", listener.name());
            Err(Error::usage(format!("could not listen on {option} {address}: {error}")).with_remedy(format!(
                "give {option} an address of this machine, such as 127.0.0.1:9464, with port 0 for any free port, or off"
            )))
        }
    }
}

async fn serve(socket: TcpStream, client: Client, router: Router, stop: CancellationToken) {
    // Events are small, and are to arrive at once.
    let _ = socket.set_nodelay(true);
    let mut socket = TimeoutStream::new(socket);
    socket.set_write_timeout(Some(WRITE_TIMEOUT));
    let service = service_fn(|mut request: Request<Incoming>| {
        client.connection.touch();
        request.extensions_mut().insert(client.clone());
        router.clone().oneshot(request)
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
