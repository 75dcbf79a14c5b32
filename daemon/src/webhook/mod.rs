//! Sends one webhook, after the Standard Webhooks specification (https://www.standardwebhooks.com), to an address that
//! was entered in a database: so only to public addresses, unless the operator of the daemon allows others.
//!
//! The address is checked after the name was resolved, and is the very one that is connected to. Redirects are not
//! followed, proxies not used. Nothing of the answer is read but its head, which is bounded, in bounded time.

mod address;
mod capped;
mod sign;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{CONTENT_TYPE, HOST, RETRY_AFTER, USER_AGENT};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use ipnet::IpNet;
use jiff::Timestamp;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use url::{Host, Url};

use crate::contract::WebhookMessage;
use crate::process::duration;
use capped::Capped;

/// From the look-up of the name to the head of the answer.
pub const DEADLINE: Duration = Duration::from_secs(15);
/// Of each of several addresses, so that one that is silent leaves time for the next.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const MAX_ADDRESSES: usize = 3;
/// Of the head of an answer, with the informational ones (1xx) that come before it.
const MAX_HEAD: usize = 16 * 1024;
/// Of all that a receiver sends, with its certificates and what else belongs to TLS.
const MAX_READ: usize = 128 * 1024;
/// As in `tollgate.define_webhook`.
const MAX_URL: usize = 2000;

/// What came of an attempt: what the receiver answered, or why there was no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Answered {
        status: u16,
        retry_after: Option<Duration>,
    },
    /// A sentence that names neither the address nor a secret.
    Failed(String),
}

impl Outcome {
    pub fn is_delivered(&self) -> bool {
        matches!(self, Self::Answered { status: 200..=299, .. })
    }

    pub fn status(&self) -> Option<u16> {
        match self {
            Self::Answered { status, .. } => Some(*status),
            Self::Failed(_) => None,
        }
    }

    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Answered { retry_after, .. } => *retry_after,
            Self::Failed(_) => None,
        }
    }

    /// The outcome as it is logged and stored.
    pub fn text(&self) -> String {
        match self {
            Self::Answered { status: status @ 300..=399, .. } => {
                format!("the receiver answered {status}, and redirects are not followed")
            }
            Self::Answered { status, .. } => format!("the receiver answered {status}"),
            Self::Failed(why) => why.clone(),
        }
    }
}

#[derive(Clone)]
pub struct Sender {
    tls: Arc<rustls::ClientConfig>,
    allowed: Arc<[IpNet]>,
}

impl std::fmt::Debug for Sender {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sender").field("allowed", &self.allowed).finish_non_exhaustive()
    }
}

impl Sender {
    /// With the system's certificate authorities (`SSL_CERT_FILE` and `SSL_CERT_DIR` name others), and networks beyond the
    /// public ones that may be sent to.
    pub fn new(allowed: &[IpNet]) -> Self {
        let mut roots = rustls::RootCertStore::empty();
        let found = rustls_native_certs::load_native_certs();
        let (_, unusable) = roots.add_parsable_certificates(found.certs);
        if roots.is_empty() || !found.errors.is_empty() {
            tracing::debug!(
                usable = roots.len(),
                unusable,
                errors = found.errors.len(),
                "certificate authorities of the system"
            );
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("ring has what TLS 1.2 and 1.3 need")
            .with_root_certificates(roots)
            .with_no_client_auth();
        Self { tls: Arc::new(tls), allowed: allowed.into() }
    }

    /// Takes no longer than [`DEADLINE`].
    pub async fn send(&self, message: &WebhookMessage) -> Outcome {
        match tokio::time::timeout(DEADLINE, self.try_send(message)).await {
            Ok(Ok(response)) => Outcome::Answered {
                status: response.status().as_u16(),
                // Its other form, a date, is rare, and then our own delays hold.
                retry_after: response
                    .headers()
                    .get(RETRY_AFTER)
                    .and_then(|value| value.to_str().ok()?.trim().parse().ok())
                    .map(|seconds: u32| Duration::from_secs(seconds.into())),
            },
            Ok(Err(why)) => Outcome::Failed(why),
            Err(_) => Outcome::Failed(format!("no answer within {}", duration::text(DEADLINE))),
        }
    }

    async fn try_send(&self, message: &WebhookMessage) -> Result<Response<hyper::body::Incoming>, String> {
        let url = parse(&message.url)?;
        let (host, port) = match (url.host(), url.port_or_known_default()) {
            (Some(host), Some(port @ 1..)) => (host, port),
            _ => return Err("the address names no host, or port 0".to_owned()),
        };
        let encrypted = url.scheme() == "https";
        let socket = self.connect(&host, port, encrypted).await?;
        let request = request(&url, message)?;
        if !encrypted {
            return exchange(socket, request).await;
        }
        let name = match &host {
            Host::Domain(name) => {
                ServerName::try_from((*name).to_owned()).map_err(|error| error.to_string())?
            }
            Host::Ipv4(ip) => ServerName::from(IpAddr::V4(*ip)),
            Host::Ipv6(ip) => ServerName::from(IpAddr::V6(*ip)),
        };
        let socket = TlsConnector::from(self.tls.clone())
            .connect(name, socket)
            .await
            .map_err(|error| format!("TLS failed: {error}"))?;
        exchange(socket, request).await
    }

    async fn connect(
        &self,
        host: &Host<&str>,
        port: u16,
        encrypted: bool,
    ) -> Result<Capped<TcpStream>, String> {
        let found: Vec<SocketAddr> = match host {
            Host::Ipv4(ip) => vec![(*ip, port).into()],
            Host::Ipv6(ip) => vec![(*ip, port).into()],
            Host::Domain(name) => tokio::net::lookup_host((*name, port))
                .await
                .map_err(|error| format!("the name of the receiver cannot be resolved: {error}"))?
                .collect(),
        };
        let permitted = address::permitted(&found, encrypted, &self.allowed)?;
        let mut last = "the name of the receiver has no address".to_owned();
        for address in permitted.into_iter().take(MAX_ADDRESSES) {
            match tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect(address)).await {
                Ok(Ok(socket)) => return Ok(Capped::new(socket, MAX_READ)),
                Ok(Err(error)) => last = format!("could not connect: {error}"),
                Err(_) => last = "could not connect: no answer".to_owned(),
            }
        }
        Err(last)
    }
}

/// What `tollgate.define_webhook` lets in. It is checked here again, since the table can be written to in other ways too.
fn parse(address: &str) -> Result<Url, String> {
    // The parser skips line breaks and tabs, and encodes what is not ASCII.
    if address.len() > MAX_URL || !address.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(
            "the address is too long, or has characters that are not to be written as they are".to_owned()
        );
    }
    let url = Url::parse(address).map_err(|error| format!("the address is no URL: {error}"))?;
    if !["http", "https"].contains(&url.scheme()) {
        return Err("the address is neither https nor http".to_owned());
    }
    if !url.username().is_empty() || url.password().is_some() || url.fragment().is_some() {
        return Err("the address has a user, a password or a fragment".to_owned());
    }
    Ok(url)
}

fn request(url: &Url, message: &WebhookMessage) -> Result<Request<Full<Bytes>>, String> {
    let at = Timestamp::now().as_second();
    let target = &url[url::Position::BeforePath..url::Position::AfterQuery];
    Request::post(target)
        .header(HOST, &url[url::Position::BeforeHost..url::Position::AfterPort])
        .header(USER_AGENT, concat!("tollgated/", env!("CARGO_PKG_VERSION")))
        .header(CONTENT_TYPE, "application/json")
        .header("webhook-id", &message.message_id)
        .header("webhook-timestamp", at)
        .header(
            "webhook-signature",
            sign::signatures(&message.secrets, &message.message_id, at, &message.body),
        )
        .body(Full::from(message.body.clone()))
        .map_err(|_| "the address cannot be asked for".to_owned())
}

/// One request and the head of its answer; the rest of it is left unread.
async fn exchange(
    socket: impl AsyncRead + AsyncWrite + Unpin,
    request: Request<Full<Bytes>>,
) -> Result<Response<hyper::body::Incoming>, String> {
    let broken = |error: hyper::Error| format!("the connection broke: {error}");
    let (mut sender, connection) = hyper::client::conn::http1::Builder::new()
        .max_buf_size(MAX_HEAD)
        .handshake(TokioIo::new(Capped::new(socket, MAX_HEAD)))
        .await
        .map_err(broken)?;
    let mut answer = std::pin::pin!(sender.send_request(request));
    tokio::select! {
        biased;
        answer = answer.as_mut() => answer,
        // The last it did may have been to hand over the answer, to a request that has not looked yet.
        _ = connection => answer.await,
    }
    .map_err(broken)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_plain_and_has_a_host_and_nothing_secret_or_unsent() {
        for good in ["https://crm.example/hook?x=1", "http://[::1]:8080/", "https://crm.example"] {
            assert!(parse(good).is_ok(), "{good}");
        }
        let long = format!("https://crm.example/{}", "x".repeat(MAX_URL));
        for bad in [
            "https://ann:secret@crm.example/",
            "https://ann@crm.example/",
            "https://crm.example/#fragment",
            "https://crm.example/\n",
            "https://crm\t.example/",
            "https://crm.example/é",
            "https://:443/",
            "https://crm.example:99999999/",
            "ftp://crm.example/",
            "file:///etc/passwd",
            "crm.example",
            "",
            &long,
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[tokio::test]
    async fn no_more_is_read_than_was_agreed() {
        use tokio::io::AsyncReadExt as _;
        let mut endless = Capped::new(tokio::io::repeat(b'x'), 1000);
        let mut read = Vec::new();
        assert!(endless.read_to_end(&mut read).await.is_err());
        assert!(read.len() < 100_000, "{}", read.len());
    }
}
