//! HTTP requests to addresses that were entered in a database: so only to public ones, unless the operator of the daemon
//! allows others.
//!
//! The address is checked after the name was resolved, and is the very one that is connected to. Redirects are not
//! followed, proxies not used. What is read is bounded; the caller bounds the time.

mod address;
mod capped;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use hyper::header::{HOST, USER_AGENT};
use hyper::http::request::Builder;
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use url::{Host, Url};

pub use address::{Plain, Rules};
use capped::Capped;

/// Of each of several addresses, so that one that is silent leaves time for the next.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const MAX_ADDRESSES: usize = 3;
/// Of the head of an answer, with the informational ones (1xx) that come before it.
const MAX_HEAD: usize = 16 * 1024;
/// With the certificates and what else belongs to TLS, and what frames a body.
const MAX_OVERHEAD: usize = 128 * 1024;
/// As in `tollgate.define_webhook`.
const MAX_URL: usize = 2000;

#[derive(Clone)]
pub struct Client {
    tls: Arc<rustls::ClientConfig>,
    rules: Rules,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").field("rules", &self.rules).finish_non_exhaustive()
    }
}

impl Client {
    /// With the system's certificate authorities (`SSL_CERT_FILE` and `SSL_CERT_DIR` name others).
    pub fn new(rules: Rules) -> Self {
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
        Self { tls: Arc::new(tls), rules }
    }

    /// Sends the request that [`request`] began, and reads the head of the answer; of its body nothing without
    /// `max_body`, or all of it, if it is no longer. The reason of a failure names neither the address nor a secret.
    pub async fn send(
        &self,
        url: &Url,
        request: Request<Full<Bytes>>,
        max_body: Option<usize>,
    ) -> Result<Response<Bytes>, String> {
        let (host, port) = match (url.host(), url.port_or_known_default()) {
            (Some(host), Some(port @ 1..)) => (host, port),
            _ => return Err("the address names no host, or port 0".to_owned()),
        };
        let encrypted = url.scheme() == "https";
        let socket = self.connect(&host, port, encrypted, max_body.unwrap_or_default()).await?;
        if !encrypted {
            return exchange(socket, request, max_body).await;
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
        exchange(socket, request, max_body).await
    }

    async fn connect(
        &self,
        host: &Host<&str>,
        port: u16,
        encrypted: bool,
        max_body: usize,
    ) -> Result<Capped<TcpStream>, String> {
        let found: Vec<SocketAddr> = match host {
            Host::Ipv4(ip) => vec![(*ip, port).into()],
            Host::Ipv6(ip) => vec![(*ip, port).into()],
            Host::Domain(name) => tokio::net::lookup_host((*name, port))
                .await
                .map_err(|error| format!("the name of the host cannot be resolved: {error}"))?
                .collect(),
        };
        let permitted = self.rules.permitted(&found, encrypted)?;
        let mut last = "the name of the host has no address".to_owned();
        for address in permitted.into_iter().take(MAX_ADDRESSES) {
            match tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect(address)).await {
                Ok(Ok(socket)) => return Ok(Capped::new(socket, MAX_OVERHEAD + max_body)),
                Ok(Err(error)) => last = format!("could not connect: {error}"),
                Err(_) => last = "could not connect: no answer".to_owned(),
            }
        }
        Err(last)
    }
}

/// An address that may be asked: checked before it is resolved, whatever the database let in.
pub fn parse(address: &str) -> Result<Url, String> {
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

/// The beginning of a request to this address.
pub fn request(method: Method, url: &Url) -> Builder {
    Request::builder()
        .method(method)
        .uri(&url[url::Position::BeforePath..url::Position::AfterQuery])
        .header(HOST, &url[url::Position::BeforeHost..url::Position::AfterPort])
        .header(USER_AGENT, concat!("tollgated/", env!("CARGO_PKG_VERSION")))
}

/// One request and its answer; the connection ends with it.
async fn exchange(
    socket: impl AsyncRead + AsyncWrite + Unpin,
    request: Request<Full<Bytes>>,
    max_body: Option<usize>,
) -> Result<Response<Bytes>, String> {
    let broken = |error: hyper::Error| format!("the connection broke: {error}");
    let socket = TokioIo::new(Capped::new(socket, MAX_HEAD + max_body.map_or(0, |most| MAX_OVERHEAD + most)));
    let (mut sender, connection) = hyper::client::conn::http1::Builder::new()
        .max_buf_size(MAX_HEAD)
        .handshake(socket)
        .await
        .map_err(broken)?;
    let answered = async {
        let (head, body) = sender.send_request(request).await.map_err(broken)?.into_parts();
        let body = match max_body {
            None => Bytes::new(),
            Some(most) => Limited::new(body, most)
                .collect()
                .await
                .map_err(|error| match error.is::<LengthLimitError>() {
                    true => format!("the answer is longer than {} kB", most / 1024),
                    false => format!("the connection broke: {error}"),
                })?
                .to_bytes(),
        };
        Ok::<_, String>(Response::from_parts(head, body))
    };
    let mut answered = std::pin::pin!(answered);
    tokio::select! {
        biased;
        answer = answered.as_mut() => answer,
        // The last it did may have been to hand over the answer, to a request that has not looked yet.
        _ = connection => answered.await,
    }
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

    /// Answers one request over a pipe with these bytes, and then ends or waits.
    async fn answered(bytes: &[u8], max_body: Option<usize>) -> Result<Response<Bytes>, String> {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let (ours, mut theirs) = tokio::io::duplex(64 * 1024);
        let bytes = bytes.to_vec();
        tokio::spawn(async move {
            let mut request = [0; 1024];
            let _ = theirs.read(&mut request).await;
            let _ = theirs.write_all(&bytes).await;
        });
        let url = parse("http://a.example/x").unwrap();
        exchange(ours, request(Method::GET, &url).body(Full::default()).unwrap(), max_body).await
    }

    #[tokio::test]
    async fn a_body_is_read_as_far_as_it_may_be() {
        let whole = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello";
        assert_eq!(answered(whole, Some(5)).await.unwrap().body(), "hello");
        assert_eq!(answered(whole, None).await.unwrap().body(), "");
        let why = answered(whole, Some(4)).await.unwrap_err();
        assert!(why.contains("is longer"), "{why}");
        // Until the connection ends.
        let until_end = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhello";
        assert_eq!(answered(until_end, Some(5)).await.unwrap().body(), "hello");
        let cut = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhello";
        assert!(answered(cut, Some(100)).await.is_err());
        let chunked =
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n";
        assert_eq!(answered(chunked, Some(5)).await.unwrap().body(), "hello");
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
