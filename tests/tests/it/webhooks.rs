//! Webhooks with real receivers: signed, retried, bounded, and never sent to forbidden addresses.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::common::{self, Shared, issue, refused, revoke, value};
use crate::operator::{self, Db, QUEUE_ALL};
use crate::web::{self, LONG, eventually_answers, eventually_measures, metrics, run};
use anyhow::{Context as _, Result};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit as _, Mac as _};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::ServerConfig;
use rustls::pki_types::PrivateKeyDer;
use serde_json::Value;
use sha2::Sha256;
use tokio::io::{
    AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, BufReader,
};
use tokio::net::TcpListener;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use tokio_rustls::TlsAcceptor;
use tollgate_tests::{DATABASE, Tollgated, eventually_async};

static SHARED: Shared = Shared::new(&[]);

const ALLOW: &str = "--webhook-allow=127.0.0.0/8";

async fn db(name: &str) -> Result<Db> {
    Db::create(&SHARED.cluster()?, name).await
}

/// How a receiver handles a request.
#[derive(Clone, Debug)]
enum Reply {
    Status(u16),
    Redirect(String),
    /// Reads it all, and never answers.
    Hang,
    /// Sends a byte of the head per second.
    Drip,
    /// A head that never ends.
    HugeHead,
    /// One informational answer after another.
    Informational,
    /// An answer whose body never ends.
    HugeBody,
    /// Closes without an answer.
    Close,
}

#[derive(Clone, Debug)]
struct Received {
    headers: BTreeMap<String, String>,
    body: String,
}

impl Received {
    fn id(&self) -> &str {
        &self.headers["webhook-id"]
    }

    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_default()
    }

    /// Whether one of its signatures was made with this secret; computed here, not by the code under test.
    fn is_signed_with(&self, secret: &str) -> bool {
        let key = STANDARD.decode(secret.strip_prefix("whsec_").unwrap_or_default()).unwrap();
        let mut hmac = Hmac::<Sha256>::new_from_slice(&key).unwrap();
        hmac.update(format!("{}.{}.{}", self.id(), self.headers["webhook-timestamp"], self.body).as_bytes());
        let expected = format!("v1,{}", STANDARD.encode(hmac.finalize().into_bytes()));
        self.headers["webhook-signature"].split(' ').any(|signature| signature == expected)
    }
}

/// A server that records the requests it receives.
struct Receiver {
    address: SocketAddr,
    received: Arc<Mutex<Vec<Received>>>,
    reply: Arc<Mutex<Reply>>,
    /// How many clients gave up waiting for an answer.
    left: Arc<AtomicUsize>,
    /// How many bytes of informational answers were read.
    sent: Arc<AtomicUsize>,
}

impl Receiver {
    async fn start(reply: Reply) -> Result<Self> {
        Self::listen(reply, None).await
    }

    async fn listen(reply: Reply, tls: Option<TlsAcceptor>) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let receiver = Self {
            address: listener.local_addr()?,
            received: Arc::default(),
            reply: Arc::new(Mutex::new(reply)),
            left: Arc::default(),
            sent: Arc::default(),
        };
        let (received, reply, left, sent) =
            (receiver.received.clone(), receiver.reply.clone(), receiver.left.clone(), receiver.sent.clone());
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let (received, reply, left, sent, tls) =
                    (received.clone(), reply.clone(), left.clone(), sent.clone(), tls.clone());
                tokio::spawn(async move {
                    match tls {
                        None => drop(converse(socket, &received, &reply, &left, &sent).await),
                        Some(tls) => {
                            if let Ok(socket) = tls.accept(socket).await {
                                drop(converse(socket, &received, &reply, &left, &sent).await);
                            }
                        }
                    }
                });
            }
        });
        Ok(receiver)
    }

    fn url(&self) -> String {
        format!("http://{}/hook?x=1", self.address)
    }

    fn behave(&self, reply: Reply) {
        *self.reply.lock().unwrap_or_else(PoisonError::into_inner) = reply;
    }

    fn received(&self) -> Vec<Received> {
        self.received.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    async fn eventually_has(&self, count: usize) -> Vec<Received> {
        eventually_async(LONG, &format!("{count} webhooks"), async || self.received().len() >= count).await;
        self.received()
    }
}

async fn converse(
    socket: impl AsyncRead + AsyncWrite + Unpin,
    received: &Mutex<Vec<Received>>,
    reply: &Mutex<Reply>,
    left: &AtomicUsize,
    sent: &AtomicUsize,
) -> Result<()> {
    let mut socket = BufReader::new(socket);
    let mut line = String::new();
    socket.read_line(&mut line).await?;
    assert_eq!(line.trim_end(), "POST /hook?x=1 HTTP/1.1");
    let mut headers = BTreeMap::new();
    loop {
        let mut line = String::new();
        socket.read_line(&mut line).await?;
        let Some((name, value)) = line.trim_end().split_once(": ") else { break };
        headers.insert(name.to_ascii_lowercase(), value.to_owned());
    }
    let mut body = vec![0; headers.get("content-length").context("a length")?.parse()?];
    socket.read_exact(&mut body).await?;
    let one = Received { headers, body: String::from_utf8(body)? };
    received.lock().unwrap_or_else(PoisonError::into_inner).push(one);
    let reply = reply.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let filler = vec![b'x'; 64 * 1024];
    match reply {
        Reply::Status(status) => {
            socket
                .write_all(format!("HTTP/1.1 {status} x\r\nContent-Length: 2\r\n\r\nok").as_bytes())
                .await?;
        }
        Reply::Redirect(to) => {
            let head = format!("HTTP/1.1 302 x\r\nLocation: {to}\r\nContent-Length: 0\r\n\r\n");
            socket.write_all(head.as_bytes()).await?;
        }
        Reply::Hang => {
            let _ = socket.read_to_end(&mut Vec::new()).await;
            left.fetch_add(1, Ordering::SeqCst);
        }
        Reply::Drip => {
            for byte in b"HTTP/1.1 200 ok and so on and so on and so on" {
                socket.write_all(&[*byte]).await?;
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
        Reply::HugeHead => {
            socket.write_all(b"HTTP/1.1 200 ok\r\nX-Long: ").await?;
            loop {
                socket.write_all(&filler).await?;
            }
        }
        Reply::Informational => loop {
            let many = "HTTP/1.1 102 Processing\r\n\r\n".repeat(1000);
            socket.write_all(many.as_bytes()).await?;
            sent.fetch_add(many.len(), Ordering::SeqCst);
        },
        Reply::HugeBody => {
            socket.write_all(b"HTTP/1.1 200 ok\r\nTransfer-Encoding: chunked\r\n\r\n").await?;
            loop {
                socket.write_all(b"10000\r\n").await?;
                socket.write_all(&filler).await?;
                socket.write_all(b"\r\n").await?;
            }
        }
        Reply::Close => {}
    }
    Ok(())
}

async fn define(owner: &Client, name: &str, url: &str, events: &str) -> Result<String> {
    let sql = format!("select tollgate.define_webhook($1, $2, {events})");
    Ok(owner.query_one(&sql, &[&name, &url]).await?.get(0))
}

/// State, attempts and error of messages that wait or were given up.
async fn deliveries(owner: &Client) -> Result<Vec<(String, i32, Option<String>)>> {
    let sql = "select state, attempts, last_error from tollgate.webhook_deliveries order by id";
    Ok(owner.query(sql, &[]).await?.iter().map(|row| (row.get(0), row.get(1), row.get(2))).collect())
}

/// Makes waiting messages due.
async fn make_due(owner: &Client) -> Result<()> {
    let sql =
        "update tollgate.webhook_queue set next_attempt_at = now() where dead_at is null and lease is null";
    owner.execute(sql, &[]).await?;
    Ok(())
}

#[tokio::test]
async fn events_arrive_in_order_signed_and_only_those_that_are_wanted() -> Result<()> {
    let db = db("signed").await?;
    let receiver = Receiver::start(Reply::Status(204)).await?;
    let secret = define(&db.owner, "crm", &receiver.url(), "'{token.*}'").await?;
    let (daemon, address) = run(&db.url(), &[ALLOW]).await?;
    let mut expected = Vec::new();
    for _ in 0..10 {
        let one = issue(&db.owner, "ann", &[]).await?;
        assert!(revoke(&db.owner, one.id).await?);
        expected.extend([("token.created", one.id.to_string()), ("token.revoked", one.id.to_string())]);
    }
    db.owner.execute("select tollgate.define_scope('x:y', 'Not wanted')", &[]).await?;
    let all = receiver.eventually_has(20).await;
    let recorded: Vec<(String, String)> = all
        .iter()
        .map(|one| {
            let json = one.json();
            let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
            assert_eq!(json["type"], json["data"]["event"]);
            assert!(json["timestamp"].is_string());
            let id = format!("evt_{}_{}", json["data"]["epoch"], json["data"]["id"]);
            assert_eq!(one.id(), id);
            (text(&json["type"]), text(&json["data"]["token_id"]))
        })
        .collect();
    let expected: Vec<(String, String)> =
        expected.into_iter().map(|(event, id)| (event.to_owned(), id)).collect();
    assert_eq!(recorded, expected);
    for one in &all {
        assert!(one.is_signed_with(&secret), "{one:?}");
        assert!(!one.is_signed_with("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"));
        assert_eq!(one.headers["content-type"], "application/json");
        assert_eq!(one.headers["host"], receiver.address.to_string());
        let at: i64 = one.headers["webhook-timestamp"].parse()?;
        assert!((jiff::Timestamp::now().as_second() - at).abs() < 300);
    }
    eventually_async(LONG, "nothing to be left", async || deliveries(&db.owner).await.unwrap().is_empty())
        .await;
    assert!(metrics(address).await?["tollgated_webhook_attempts_total{outcome=\"delivered\"}"] >= 20.0);
    let log: String = value(&db.owner, "select string_agg(a::text, '') from tollgate.audit_log a").await?;
    let secret = secret.trim_start_matches("whsec_");
    assert!(!daemon.log().contains(secret) && !db.cluster.log().contains(secret) && !log.contains(secret));
    assert!(!daemon.log().contains("/hook") && !log.contains("/hook"), "a path may be a secret");
    Ok(())
}

#[tokio::test]
async fn during_a_rotation_both_secrets_sign_and_afterwards_the_new_one_alone() -> Result<()> {
    let db = db("rotation").await?;
    let receiver = Receiver::start(Reply::Status(200)).await?;
    let old = define(&db.owner, "crm", &receiver.url(), "'{token.created}'").await?;
    let new: String = value(&db.owner, "select tollgate.rotate_webhook_secret('crm', '1 hour')").await?;
    assert_ne!(old, new);
    let (_daemon, _) = run(&db.url(), &[ALLOW]).await?;
    issue(&db.owner, "ann", &[]).await?;
    let all = receiver.eventually_has(1).await;
    assert!(all[0].is_signed_with(&old) && all[0].is_signed_with(&new));
    assert_eq!(all[0].headers["webhook-signature"].split(' ').count(), 2);
    db.owner.execute("update tollgate.webhook_endpoints set previous_until = now()", &[]).await?;
    issue(&db.owner, "ann", &[]).await?;
    let all = receiver.eventually_has(2).await;
    assert!(!all[1].is_signed_with(&old) && all[1].is_signed_with(&new));
    Ok(())
}

#[tokio::test]
async fn failed_messages_are_retried_with_the_same_id_then_dead_and_can_be_replayed() -> Result<()> {
    let db = db("retried").await?;
    let receiver = Receiver::start(Reply::Status(500)).await?;
    define(&db.owner, "crm", &receiver.url(), "'{token.created}'").await?;
    let (_daemon, address) = run(&db.url(), &[ALLOW]).await?;
    issue(&db.owner, "ann", &[]).await?;
    let mut waits = Vec::new();
    for attempt in 1..=10 {
        receiver.eventually_has(attempt).await;
        eventually_async(LONG, "the failure to be recorded", async || {
            deliveries(&db.owner).await.unwrap().iter().any(|(state, attempts, error)| {
                state != "sending" && *attempts == attempt as i32 && error.is_some()
            })
        })
        .await;
        let wait: Option<f64> = value(
            &db.owner,
            "select extract(epoch from next_attempt_at - last_attempt_at)::float8 from tollgate.webhook_deliveries",
        )
        .await?;
        waits.extend(wait);
        make_due(&db.owner).await?;
    }
    let plan = [5.0, 300.0, 1800.0, 7200.0, 18e3, 36e3, 50400.0, 72e3, 86400.0];
    assert_eq!(waits.len(), plan.len(), "{waits:?}");
    for (wait, planned) in waits.iter().zip(plan) {
        assert!(*wait >= planned && *wait <= planned * 1.2 + 20.0, "{wait} for {planned}");
    }
    let all = receiver.received();
    assert_eq!(all.iter().map(Received::id).collect::<BTreeSet<_>>().len(), 1);
    assert_eq!(all.iter().map(|one| one.body.as_str()).collect::<BTreeSet<_>>().len(), 1);
    assert_eq!(
        deliveries(&db.owner).await?,
        [("dead".to_owned(), 10, Some("the receiver answered 500".to_owned()))]
    );
    eventually_measures(address, "tollgate_webhook_dead_messages{webhook=\"crm\"}", |count| count == 1.0)
        .await;

    receiver.behave(Reply::Status(200));
    assert_eq!(value::<i64>(&db.owner, "select tollgate.replay_webhook('crm')").await?, 1);
    let all = receiver.eventually_has(11).await;
    assert_eq!(all[10].id(), all[0].id());
    eventually_async(LONG, "nothing to be left", async || deliveries(&db.owner).await.unwrap().is_empty())
        .await;
    Ok(())
}

#[tokio::test]
async fn a_receiver_that_is_gone_is_not_called_again() -> Result<()> {
    let db = db("gone").await?;
    let receiver = Receiver::start(Reply::Status(410)).await?;
    define(&db.owner, "crm", &receiver.url(), "null").await?;
    let (_daemon, address) = run(&db.url(), &[ALLOW]).await?;
    eventually_measures(address, "tollgate_webhook_enabled{webhook=\"crm\"}", |enabled| enabled == 0.0).await;
    let reason: String = value(&db.owner, "select disabled_reason from tollgate.webhooks").await?;
    assert!(reason.contains("410"), "{reason}");
    let recorded: String = value(
        &db.owner,
        "select detail ->> 'reason' from tollgate.audit_log where event = 'webhook.disabled'",
    )
    .await?;
    assert!(recorded.contains("410"), "{recorded}");
    issue(&db.owner, "ann", &[]).await?;
    // Waits for another event that would have been sent before: that of a second webhook.
    let second = Receiver::start(Reply::Status(200)).await?;
    define(&db.owner, "other", &second.url(), "'{token.created}'").await?;
    issue(&db.owner, "ann", &[]).await?;
    second.eventually_has(1).await;
    assert_eq!(receiver.received().len(), 1);
    Ok(())
}

#[tokio::test]
async fn misbehaving_receivers_are_given_up_in_time_and_delay_no_other() -> Result<()> {
    let db = db("misbehave").await?;
    let elsewhere = Receiver::start(Reply::Status(200)).await?;
    let cases = [
        ("hangs", Reply::Hang, "no answer within"),
        ("drips", Reply::Drip, "no answer within"),
        ("head", Reply::HugeHead, "the connection broke"),
        ("1xx", Reply::Informational, "the connection broke"),
        ("closes", Reply::Close, "the connection broke"),
        ("redirects", Reply::Redirect(elsewhere.url()), "redirects are not followed"),
    ];
    let mut receivers = Vec::new();
    for (name, reply, _) in &cases {
        let receiver = Receiver::start(reply.clone()).await?;
        define(&db.owner, name, &receiver.url(), "'{token.created}'").await?;
        receivers.push(receiver);
    }
    let huge = Receiver::start(Reply::HugeBody).await?;
    define(&db.owner, "huge", &huge.url(), "'{token.created}'").await?;
    let well = Receiver::start(Reply::Status(200)).await?;
    define(&db.owner, "well", &well.url(), "'{token.created}'").await?;
    let (mut daemon, address) = run(&db.url(), &[ALLOW]).await?;
    eventually_answers(address, "/readyz", 200).await;
    let before = web::memory(&daemon, "VmRSS")?;
    issue(&db.owner, "ann", &[]).await?;
    for receiver in &receivers {
        receiver.eventually_has(1).await;
    }
    for count in 2..=5 {
        issue(&db.owner, "ann", &[]).await?;
        well.eventually_has(count).await;
    }
    // All of these were created and have arrived while the daemon was waiting for the answer to the first one here.
    let hangs = &receivers[0];
    assert_eq!((hangs.received().len(), hangs.left.load(Ordering::SeqCst)), (1, 0));
    for (name, _, error) in &cases {
        let sql = format!("select coalesce(last_error, '') from tollgate.webhooks where name = '{name}'");
        eventually_async(LONG, &format!("{name} to fail with {error:?}"), async || {
            value::<String>(&db.owner, &sql).await.unwrap().contains(error)
        })
        .await;
    }
    huge.eventually_has(5).await;
    // Unread data still fits into the buffers of two sockets, for each attempt.
    let informational = receivers[3].sent.load(Ordering::SeqCst) / receivers[3].received().len();
    assert!(informational < 20_000_000, "{informational} bytes of informational answers were read");
    assert!(elsewhere.received().is_empty(), "a redirect was followed");
    eventually_async(LONG, "no client to wait for it", async || hangs.left.load(Ordering::SeqCst) >= 1).await;
    // At its peak: memory that it freed again counts too.
    let most = web::memory(&daemon, "VmHWM")?;
    assert!(most < before + 30_000_000, "from {before} to {most} bytes");
    assert!(daemon.is_running());
    Ok(())
}

#[tokio::test]
async fn nothing_is_sent_inside_unless_it_was_allowed() -> Result<()> {
    let db = db("inside").await?;
    let receiver = Receiver::start(Reply::Status(200)).await?;
    let port = receiver.address.port();
    for (name, host) in [
        ("loopback", "127.0.0.1"),
        ("name", "localhost"),
        ("mapped", "[::ffff:127.0.0.1]"),
        ("decimal", "127.0.0.2"),
        ("metadata", "169.254.169.254"),
        ("private", "10.0.0.1"),
    ] {
        define(&db.owner, name, &format!("http://{host}:{port}/hook?x=1"), "'{token.created}'").await?;
    }
    // Not by `define_webhook`, which refuses it; the daemon checks again.
    db.owner
        .execute(
            "update tollgate.webhook_endpoints set url = replace(url, '127.0.0.2', '2130706433') where name = 'decimal'",
            &[],
        )
        .await?;
    let (_daemon, _) = run(&db.url(), &["--webhook-allow=192.0.2.0/24"]).await?;
    issue(&db.owner, "ann", &[]).await?;
    eventually_async(LONG, "all to be refused", async || {
        let rows = deliveries(&db.owner).await.unwrap();
        rows.len() == 6
            && rows
                .iter()
                .all(|(_, _, error)| error.as_deref().is_some_and(|error| error.contains("not a public one")))
    })
    .await;
    assert!(receiver.received().is_empty());
    Ok(())
}

/// A certificate authority, and a server with a certificate of it for these names.
fn authority(names: &[&str]) -> Result<(String, TlsAcceptor)> {
    let mut params = CertificateParams::new(Vec::new())?;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
    let key = KeyPair::generate()?;
    let names: Vec<String> = names.iter().map(ToString::to_string).collect();
    let certificate = CertificateParams::new(names)?.signed_by(&key, &issuer)?;
    let key = PrivateKeyDer::try_from(key.serialize_der()).map_err(anyhow::Error::msg)?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], key)?;
    Ok((issuer.pem(), TlsAcceptor::from(Arc::new(config))))
}

#[tokio::test]
async fn a_certificate_must_be_of_a_trusted_authority_and_for_that_name() -> Result<()> {
    let db = db("certificates").await?;
    let (trusted, right) = authority(&["localhost"])?;
    let (_, stranger) = authority(&["localhost"])?;
    let directory = tempfile::tempdir()?;
    let bundle = directory.path().join("ca.pem");
    std::fs::write(&bundle, trusted)?;
    std::fs::set_permissions(directory.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let good = Receiver::listen(Reply::Status(200), Some(right)).await?;
    let bad = Receiver::listen(Reply::Status(200), Some(stranger)).await?;
    let url =
        |host: &str, receiver: &Receiver| format!("https://{host}:{}/hook?x=1", receiver.address.port());
    define(&db.owner, "good", &url("localhost", &good), "'{token.created}'").await?;
    define(&db.owner, "stranger", &url("localhost", &bad), "'{token.created}'").await?;
    define(&db.owner, "wrong-name", &url("127.0.0.1", &good), "'{token.created}'").await?;
    let mut command = Tollgated::command(&db.url())?;
    command.args([
        "run",
        "--log-format=json",
        "--publish-interval=100ms",
        "--webhook-allow=127.0.0.0/8,::1/128",
    ]);
    command.args(["--ops-address=127.0.0.1:0"]).env("SSL_CERT_FILE", &bundle);
    let (_daemon, _) = web::start(&mut command).await?;
    issue(&db.owner, "ann", &[]).await?;
    good.eventually_has(1).await;
    eventually_async(LONG, "both others to fail", async || {
        let rows = deliveries(&db.owner).await.unwrap();
        rows.len() == 2
            && rows.iter().all(|(_, _, error)| error.as_deref().is_some_and(|e| e.contains("TLS failed")))
    })
    .await;
    assert_eq!((good.received().len(), bad.received().len()), (1, 0));
    Ok(())
}

#[tokio::test]
async fn daemons_that_are_killed_lose_nothing_and_repeat_only_with_the_same_id() -> Result<()> {
    let db = db("killed").await?;
    let receiver = Receiver::start(Reply::Status(200)).await?;
    define(&db.owner, "crm", &receiver.url(), "'{token.created}'").await?;
    let mut expected = BTreeSet::new();
    for round in 1..=4 {
        let (mut daemon, _) = run(&db.url(), &[ALLOW]).await?;
        let (mut rival, _) = run(&db.url(), &[ALLOW]).await?;
        for _ in 0..15 {
            expected.insert(issue(&db.owner, "ann", &[]).await?.id.to_string());
        }
        receiver.eventually_has(round * 5).await;
        daemon.kill()?;
        rival.kill()?;
        // They may be about to commit one more claim.
        let alive = "select count(*) from pg_stat_activity where application_name = 'tollgated run' and datname = 'killed'";
        eventually_async(LONG, "their sessions to end", async || {
            value::<i64>(&db.owner, alive).await.unwrap() == 0
        })
        .await;
        // Leases of the killed daemons are made free now, as they would be in a minute.
        let free = "update tollgate.webhook_queue set next_attempt_at = now() where lease is not null";
        db.owner.execute(free, &[]).await?;
    }
    let (_daemon, _) = run(&db.url(), &[ALLOW]).await?;
    let tokens = |all: &[Received]| -> BTreeSet<String> {
        all.iter().filter_map(|one| Some(one.json()["data"]["token_id"].as_str()?.to_owned())).collect()
    };
    eventually_async(LONG, "all to arrive", async || tokens(&receiver.received()) == expected).await;
    eventually_async(LONG, "nothing to be left", async || deliveries(&db.owner).await.unwrap().is_empty())
        .await;
    let mut bodies: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for one in receiver.received() {
        bodies.entry(one.id().to_owned()).or_default().insert(one.body.clone());
    }
    assert_eq!(bodies.len(), expected.len(), "one id for each event");
    assert!(bodies.values().all(|bodies| bodies.len() == 1), "an id identifies one message");
    Ok(())
}

#[tokio::test]
async fn no_secret_is_shown_twice_and_only_administrators_may_define() -> Result<()> {
    let db = db("secrets").await?;
    let secret = define(&db.owner, "crm", "https://example.com/hooks/s3cr3t", "null").await?;
    let secret = secret.trim_start_matches("whsec_").to_owned();
    let hex: String = STANDARD.decode(&secret)?.iter().map(|byte| format!("{byte:02x}")).collect();
    for view in ["webhooks", "webhook_deliveries"] {
        let rows: Option<String> =
            value(&db.owner, &format!("select string_agg(v::text, '') from tollgate.{view} v")).await?;
        let rows = rows.unwrap_or_default();
        assert!(!rows.contains(&secret) && !rows.contains(&hex), "{view}: {rows}");
    }
    let log: String = value(&db.owner, "select string_agg(a::text, '') from tollgate.audit_log a").await?;
    assert!(!log.contains(&secret) && !log.contains(&hex) && !log.contains("s3cr3t"), "{log}");
    for sql in [
        "select tollgate.define_webhook('x', 'https://example.com/')",
        "select tollgate.rotate_webhook_secret('crm')",
        "select tollgate.pause_webhook('crm')",
        "select tollgate.resume_webhook('crm')",
        "select tollgate.set_webhook_url('crm', 'https://example.com/')",
        "select * from tollgate.webhook_endpoints",
        "select * from tollgate.webhook_queue",
    ] {
        refused(db.operator.query(sql, &[]).await, &SqlState::INSUFFICIENT_PRIVILEGE);
        refused(db.web.query(sql, &[]).await, &SqlState::INSUFFICIENT_PRIVILEGE);
    }
    Ok(())
}

#[tokio::test]
async fn an_address_is_stored_in_normalised_form() -> Result<()> {
    let db = db("one_form").await?;
    for (number, (given, kept)) in [
        ("https://Example.COM", "https://example.com/"),
        ("https://example.com:443/Path?X=%2F", "https://example.com/Path?X=%2F"),
        ("http://example.com:80?x", "http://example.com/?x"),
        ("http://example.com:443/", "http://example.com:443/"),
        ("https://example.com:08443/", "https://example.com:8443/"),
        ("https://1e100.net/", "https://1e100.net/"),
        ("https://10.0.0.1:1/", "https://10.0.0.1:1/"),
        ("https://[2001:0DB8::0:1]:65535/", "https://[2001:db8::1]:65535/"),
        ("https://a_b.example/~x/[]", ""),
        ("https://a_b.example/~x/", "https://a_b.example/~x/"),
    ]
    .into_iter()
    .enumerate()
    {
        let name = format!("hook{number}");
        let defined = define(&db.owner, &name, given, "null").await;
        assert_eq!(defined.is_ok(), !kept.is_empty(), "{given}: {defined:?}");
        let sql = format!("select coalesce((select url from tollgate.webhooks where name = '{name}'), '')");
        assert_eq!(value::<String>(&db.owner, &sql).await?, kept, "{given}");
    }
    Ok(())
}

#[tokio::test]
async fn names_addresses_and_events_that_make_no_sense_are_refused_without_being_quoted() -> Result<()> {
    let db = db("arguments").await?;
    define(&db.owner, "taken", "https://example.com/", "null").await?;
    for (arguments, code) in [
        ("null, 'https://example.com/'", SqlState::INVALID_PARAMETER_VALUE),
        ("'Upper', 'https://example.com/'", SqlState::INVALID_PARAMETER_VALUE),
        ("'x', null", SqlState::INVALID_PARAMETER_VALUE),
        ("'x', 'ftp://example.com/'", SqlState::INVALID_PARAMETER_VALUE),
        ("'x', 'https://user:hunter2@example.com/'", SqlState::INVALID_PARAMETER_VALUE),
        ("'x', 'https://example.com/#hunter2'", SqlState::INVALID_PARAMETER_VALUE),
        ("'x', 'https://example.com#'", SqlState::INVALID_PARAMETER_VALUE),
        ("'x', 'https://:443/'", SqlState::INVALID_PARAMETER_VALUE),
        ("'x', 'https://'", SqlState::INVALID_PARAMETER_VALUE),
        ("'x', 'https:///path'", SqlState::INVALID_PARAMETER_VALUE),
        ("'x', 'https://example.com:0/'", SqlState::INVALID_PARAMETER_VALUE),
        ("'x', 'https://example.com:/'", SqlState::INVALID_PARAMETER_VALUE),
        ("'x', 'https://example.com:65536/'", SqlState::INVALID_PARAMETER_VALUE),
        ("'x', 'https://example.com:99999999/'", SqlState::INVALID_PARAMETER_VALUE),
        ("'x', 'https://example.com:80:80/'", SqlState::INVALID_PARAMETER_VALUE),
        ("'x', 'https://-.example.com/'", SqlState::INVALID_PARAMETER_VALUE),
        ("'x', 'https://example..com/'", SqlState::INVALID_PARAMETER_VALUE),
        ("'x', 'https://example.com./'", SqlState::INVALID_PARAMETER_VALUE),
        ("'x', 'https://2130706433/'", SqlState::INVALID_PARAMETER_VALUE),
        ("'x', 'https://0x7f.1/'", SqlState::INVALID_PARAMETER_VALUE),
        ("'x', 'https://127.1/'", SqlState::INVALID_PARAMETER_VALUE),
        ("'x', 'https://010.0.0.1/'", SqlState::INVALID_PARAMETER_VALUE),
        ("'x', 'https://1.2.3.256/'", SqlState::INVALID_PARAMETER_VALUE),
        ("'x', 'https://[::1/'", SqlState::INVALID_PARAMETER_VALUE),
        ("'x', 'https://[example]/'", SqlState::INVALID_PARAMETER_VALUE),
        ("'x', 'https://[1.2.3.4]/'", SqlState::INVALID_PARAMETER_VALUE),
        ("'x', 'https://::1/'", SqlState::INVALID_PARAMETER_VALUE),
        ("'x', E'https://example.com\\\\@hunter2/'", SqlState::INVALID_PARAMETER_VALUE),
        ("'x', 'https://example.com/%zz'", SqlState::INVALID_PARAMETER_VALUE),
        ("'x', 'https://example.com/\"<>'", SqlState::INVALID_PARAMETER_VALUE),
        ("'x', 'https://example.com/' || repeat('x', 2000)", SqlState::INVALID_PARAMETER_VALUE),
        ("'x', 'https://' || repeat('x', 64) || '.com/'", SqlState::INVALID_PARAMETER_VALUE),
        ("'x', E'https://example.com/\\r\\nX-Hunter2: 1'", SqlState::INVALID_PARAMETER_VALUE),
        ("'x', 'https://example.com/', '{}'", SqlState::INVALID_PARAMETER_VALUE),
        ("'x', 'https://example.com/', '{nonsense}'", SqlState::INVALID_PARAMETER_VALUE),
        ("'x', 'https://example.com/', '{token.*, null}'", SqlState::INVALID_PARAMETER_VALUE),
        ("'taken', 'https://example.com/'", SqlState::DUPLICATE_OBJECT),
    ] {
        let sql = format!("select tollgate.define_webhook({arguments})");
        let error = refused(db.owner.query(&sql, &[]).await, &code);
        assert!(error.hint().is_some(), "{arguments}");
        assert!(!common::text_of(&error).to_lowercase().contains("hunter2"), "{error:?}");
    }
    for sql in [
        "select tollgate.rotate_webhook_secret('unknown')",
        "select tollgate.set_webhook_enabled('unknown', true)",
        "select tollgate.replay_webhook('unknown')",
        "select tollgate.pause_webhook('unknown')",
        "select tollgate.resume_webhook('unknown')",
        "select tollgate.set_webhook_url('unknown', 'https://example.com/')",
    ] {
        refused(db.owner.query(sql, &[]).await, &SqlState::UNDEFINED_OBJECT);
    }
    let sql = "select tollgate.set_webhook_url('taken', 'https://example.com/#hunter2')";
    refused(db.owner.query(sql, &[]).await, &SqlState::INVALID_PARAMETER_VALUE);
    for n in 2..=64 {
        define(&db.owner, &format!("hook-{n}"), "https://example.com/", "null").await?;
    }
    let sql = "select tollgate.define_webhook('one-more', 'https://example.com/')";
    refused(db.owner.query(sql, &[]).await, &SqlState::PROGRAM_LIMIT_EXCEEDED);
    Ok(())
}

/// An operator who moves the cursor forward would have receivers miss what happened, and one who moves it back have it sent anew.
#[tokio::test]
async fn the_cursor_of_the_webhooks_cannot_be_moved_past_what_was_queued() -> Result<()> {
    let db = db("moved_cursor").await?;
    define(&db.owner, "crm", "https://example.com/", "'{token.created}'").await?;
    issue(&db.owner, "ann", &[]).await?;
    for place in ["tollgate.event_position()", "tollgate.event_position(0)"] {
        let call = format!("select tollgate.advance_subscription('tollgate:webhooks', {place}, null)");
        refused(db.operator.execute(&call, &[]).await, &SqlState::INSUFFICIENT_PRIVILEGE);
    }
    db.operator.batch_execute(QUEUE_ALL).await?;
    let pending = "select pending from tollgate.webhooks";
    assert_eq!(value::<i64>(&db.owner, pending).await?, 1);
    db.operator.batch_execute(QUEUE_ALL).await?;
    assert_eq!(value::<i64>(&db.owner, pending).await?, 1);
    // Nor are there more subscriptions than an administrator can look through.
    let open = "select count(o) from generate_series(1, 99) n, tollgate.open_subscription('s' || n) o";
    db.operator.execute(open, &[]).await?;
    let one_more = db.operator.execute("select tollgate.open_subscription('one more')", &[]).await;
    refused(one_more, &SqlState::PROGRAM_LIMIT_EXCEEDED);
    db.operator.execute("select tollgate.open_subscription('s1')", &[]).await?;
    Ok(())
}

/// Messages of each webhook, counted by the trigger and by looking.
async fn assert_counted(owner: &Client) -> Result<()> {
    let sql = "select string_agg(concat_ws(' ', w.name, w.pending, w.dead, b.sending), ',' order by w.name),
                      string_agg(concat_ws(' ', w.name, q.waiting, q.dead, case when b.webhook is not null then q.sending end), ',' order by w.name)
                 from tollgate.webhooks w left join tollgate.webhook_backlogs b on b.webhook = w.name,
                      lateral (select count(*) - count(q.dead_at) as waiting, count(q.dead_at) as dead,
                                     count(q.lease) filter (where q.dead_at is null) as sending
                                 from tollgate.webhook_queue q where q.webhook = w.name) q";
    let row = owner.query_one(sql, &[]).await?;
    let (kept, counted): (Option<String>, Option<String>) = (row.get(0), row.get(1));
    assert_eq!(kept, counted);
    Ok(())
}

#[tokio::test]
async fn a_webhook_whose_queue_is_full_is_disabled_and_old_messages_are_purged() -> Result<()> {
    const FULL: i64 = 1000;
    let db = db("overfull").await?;
    db.owner.batch_execute("alter database overfull set tollgate.max_webhook_backlog = 1000").await?;
    let operator = db.session(operator::OPERATOR).await?;
    define(&db.owner, "crm", "https://example.com/", "null").await?;
    define(&db.owner, "other", "https://example.com/", "'{token.created}'").await?;
    let write = "insert into tollgate.audit_log (event, detail) select 'test.event', '{}' from generate_series(1, 100)";
    for _ in 0..9 {
        db.owner.batch_execute(write).await?;
        operator.batch_execute(QUEUE_ALL).await?;
    }
    let enabled = "select enabled from tollgate.webhooks where name = 'crm'";
    assert!(value::<bool>(&db.owner, enabled).await?);
    // Including the events about the webhooks themselves.
    db.owner.batch_execute(write).await?;
    operator.batch_execute(QUEUE_ALL).await?;
    issue(&db.owner, "ann", &[]).await?;
    operator.batch_execute(QUEUE_ALL).await?;
    assert!(!value::<bool>(&db.owner, enabled).await?);
    let reason: String =
        value(&db.owner, "select disabled_reason from tollgate.webhooks where name = 'crm'").await?;
    assert_eq!(reason, "1000 messages wait for it");
    let queued: i64 =
        value(&db.owner, "select count(*) from tollgate.webhook_queue where webhook = 'crm'").await?;
    assert!((FULL..FULL + 10).contains(&queued), "{queued}: nothing more was queued");
    let of_other: i64 =
        value(&db.owner, "select pending from tollgate.webhooks where name = 'other'").await?;
    assert_eq!(of_other, 1, "another webhook continues");
    assert_counted(&db.owner).await?;

    db.owner
        .batch_execute("update tollgate.webhook_queue set created_at = now() - interval '40 days'")
        .await?;
    let purged: i64 = value(&operator, "select tollgate.purge_webhook_deliveries('30 days', 100000)").await?;
    assert_eq!(purged, queued, "and not what waits for one that is enabled");
    assert_counted(&db.owner).await?;
    for name in ["crm", "other"] {
        assert!(value::<bool>(&db.owner, &format!("select tollgate.drop_webhook('{name}')")).await?);
    }
    let left: i64 =
        value(&db.owner, "select count(*) from tollgate.subscriptions where name like 'tollgate:%'").await?;
    assert_eq!(left, 0, "a subscription without readers would hold up the purge of the log");
    Ok(())
}

#[tokio::test]
async fn the_numbers_of_messages_are_right_however_the_queue_is_changed() -> Result<()> {
    let db = db("counted").await?;
    for name in ["a", "b", "c"] {
        define(&db.owner, name, "https://example.com/", "null").await?;
    }
    let fill = "insert into tollgate.webhook_queue (webhook, event_epoch, event_id, event, body, dead_at)
                select w, 1, g, 'x', '{}', case when g % 4 = 0 then now() end
                from unnest('{a,b}'::text[]) w, generate_series(1, 10) g";
    for change in [
        fill,
        "update tollgate.webhook_queue set dead_at = now() where event_id = 1",
        "update tollgate.webhook_queue set dead_at = null where event_id = 4 and webhook = 'a'",
        "update tollgate.webhook_queue set webhook = 'c' where event_id in (2, 4)",
        "delete from tollgate.webhook_queue where event_id in (3, 8)",
        "select tollgate.replay_webhook('b')",
        "select tollgate.drop_webhook('b')",
        "begin; truncate tollgate.webhook_queue; rollback",
        "begin; savepoint s; delete from tollgate.webhook_queue; rollback to s; commit",
        QUEUE_ALL,
        "select tollgate.claim_webhook_deliveries()",
        "select tollgate.finish_webhook_delivery(id, lease, 200) from tollgate.webhook_queue where lease is not null and webhook = 'a'",
        "truncate tollgate.webhook_queue",
    ] {
        db.owner.batch_execute(change).await.with_context(|| change.to_owned())?;
        assert_counted(&db.owner).await.with_context(|| change.to_owned())?;
    }
    let left: i64 = value(&db.owner, "select sum(pending + dead)::bigint from tollgate.webhooks").await?;
    assert_eq!(left, 0);

    // A dump has the messages, and not their numbers.
    db.owner.batch_execute(&fill.replace("{a,b}", "{a,c}")).await?;
    let dump = db.cluster.program("pg_dump").arg("counted").output()?;
    db.cluster.execute(DATABASE, "create database counted_again")?;
    let mut restore = db.cluster.program("psql");
    restore.args(["--no-psqlrc", "--quiet", "--set=ON_ERROR_STOP=1", "--output=/dev/null", "counted_again"]);
    let mut restore = restore.stdin(std::process::Stdio::piped()).spawn()?;
    std::io::Write::write_all(&mut restore.stdin.take().context("it was piped")?, &dump.stdout)?;
    assert!(restore.wait()?.success());
    let again = db.cluster.connect("postgres", "counted_again").await?;
    assert_counted(&again).await?;
    assert_eq!(value::<i64>(&again, "select sum(pending + dead)::bigint from tollgate.webhooks").await?, 20);
    Ok(())
}

#[tokio::test]
async fn waiting_messages_are_brought_forward_after_an_outage() -> Result<()> {
    let db = db("forward").await?;
    define(&db.owner, "crm", "https://example.com/", "'{token.created}'").await?;
    for _ in 0..4 {
        issue(&db.owner, "ann", &[]).await?;
    }
    db.operator.batch_execute(QUEUE_ALL).await?;
    let fail = "select count(tollgate.finish_webhook_delivery(c.id, c.lease, 503, 'busy', '20 hours'))
                  from tollgate.claim_webhook_deliveries($1) c";
    db.operator.execute(fail, &[&3]).await?;
    // One is being sent, which is left alone.
    let sending: i64 =
        db.operator.query_one("select id from tollgate.claim_webhook_deliveries(1)", &[]).await?.get(0);
    let waiting: i64 =
        value(&db.owner, "select min(id) from tollgate.webhook_deliveries where state = 'waiting'").await?;
    let replay = async |delivery: Option<i64>| -> Result<i64> {
        Ok(db.owner.query_one("select tollgate.replay_webhook('crm', $1)", &[&delivery]).await?.get(0))
    };
    assert_eq!(replay(Some(waiting)).await?, 1);
    assert_eq!(replay(Some(waiting)).await?, 0, "it is due already");
    assert_eq!(replay(Some(sending)).await?, 0);
    db.owner
        .execute("update tollgate.webhook_queue set dead_at = now() where id = $1", &[&(waiting + 1)])
        .await?;
    assert_eq!(replay(None).await?, 2, "one that was given up, and one that waits");
    let due: i64 = value(
        &db.owner,
        "select count(*) from tollgate.webhook_deliveries where state = 'waiting' and attempts = 0 and next_attempt_at <= now()",
    )
    .await?;
    assert_eq!(due, 3);
    let recorded: i64 = value(
        &db.owner,
        "select sum((detail ->> 'messages')::bigint)::bigint from tollgate.audit_log where event = 'webhook.replayed'",
    )
    .await?;
    assert_eq!(recorded, 3);
    Ok(())
}

#[tokio::test]
async fn a_webhook_that_is_paused_moved_and_given_a_new_secret_loses_nothing() -> Result<()> {
    let db = db("paused").await?;
    let first = Receiver::start(Reply::Status(200)).await?;
    let second = Receiver::start(Reply::Status(200)).await?;
    let beside = Receiver::start(Reply::Status(200)).await?;
    let old = define(&db.owner, "crm", &first.url(), "'{token.created}'").await?;
    define(&db.owner, "beside", &beside.url(), "'{token.created}'").await?;
    let (daemon, address) = run(&db.url(), &[ALLOW]).await?;
    issue(&db.owner, "ann", &[]).await?;
    first.eventually_has(1).await;
    eventually_async(LONG, "nothing to be left", async || deliveries(&db.owner).await.unwrap().is_empty())
        .await;
    assert!(value::<bool>(&db.owner, "select tollgate.pause_webhook('crm')").await?);
    assert!(!value::<bool>(&db.owner, "select tollgate.pause_webhook('crm')").await?);
    eventually_measures(address, "tollgate_webhook_paused{webhook=\"crm\"}", |paused| paused == 1.0).await;
    for _ in 0..3 {
        issue(&db.owner, "ann", &[]).await?;
    }
    beside.eventually_has(4).await;
    let state: (bool, bool, i64) = {
        let row = db
            .owner
            .query_one(
                "select enabled, paused_at is not null, pending from tollgate.webhooks where name = 'crm'",
                &[],
            )
            .await?;
        (row.get(0), row.get(1), row.get(2))
    };
    assert_eq!(state, (true, true, 3));
    db.owner.execute("select tollgate.set_webhook_url('crm', $1)", &[&second.url()]).await?;
    let new: String = value(&db.owner, "select tollgate.rotate_webhook_secret('crm', '0')").await?;
    assert!(value::<bool>(&db.owner, "select tollgate.resume_webhook('crm')").await?);
    assert!(!value::<bool>(&db.owner, "select tollgate.resume_webhook('crm')").await?);
    let all = second.eventually_has(3).await;
    assert!(all.iter().all(|one| one.is_signed_with(&new) && !one.is_signed_with(&old)));
    assert_eq!((first.received().len(), all.len()), (1, 3));
    let recorded: String = value(
        &db.owner,
        "select string_agg(event || coalesce(' ' || (detail ->> 'to'), ''), ', ' order by id) from tollgate.audit_log
          where event in ('webhook.paused', 'webhook.moved', 'webhook.rotated', 'webhook.resumed')",
    )
    .await?;
    assert_eq!(
        recorded,
        format!("webhook.paused, webhook.moved {}, webhook.rotated, webhook.resumed", second.address)
    );
    assert!(!daemon.log().contains("/hook"), "a path may be a secret");
    Ok(())
}

#[tokio::test]
async fn a_webhook_can_be_dropped_while_messages_of_it_are_queued_and_sent() -> Result<()> {
    let db = db("dropped").await?;
    let (other, third) = (db.session("postgres").await?, db.session("postgres").await?);
    for (first, second) in [
        (
            "select tollgate.drop_webhook('w')",
            "select tollgate.finish_webhook_delivery(id, lease, 200) from tollgate.webhook_queue where lease is not null",
        ),
        (
            "select tollgate.finish_webhook_delivery(id, lease, 200) from tollgate.webhook_queue where lease is not null",
            "select tollgate.drop_webhook('w')",
        ),
        ("select tollgate.drop_webhook('w')", QUEUE_ALL),
        (QUEUE_ALL, "select tollgate.drop_webhook('w')"),
    ] {
        define(&db.owner, "w", "https://example.com/", "null").await?;
        db.owner.batch_execute(&format!("{QUEUE_ALL}; select tollgate.claim_webhook_deliveries(1)")).await?;
        issue(&db.owner, "ann", &[]).await?;
        db.owner.batch_execute(&format!("begin; {first}")).await?;
        let waits = "select exists (select from pg_stat_activity where wait_event_type = 'Lock' and datname = 'dropped')";
        let ended = other.batch_execute(second);
        let end_first = async {
            // Either the second waits for the first, or it does not need to.
            for _ in 0..20 {
                if value::<bool>(&third, waits).await? {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            db.owner.batch_execute("commit").await?;
            anyhow::Ok(())
        };
        let (ended, first_ended) = tokio::join!(ended, end_first);
        ended.with_context(|| format!("{second} after {first}"))?;
        first_ended?;
        let left: i64 = value(&db.owner, "select count(*) from tollgate.webhooks").await?;
        assert_eq!(left, 0, "{second} after {first}");
    }
    Ok(())
}

#[tokio::test]
async fn each_webhook_has_its_share_of_a_claim_and_all_of_it_has_a_bound() -> Result<()> {
    let db = db("shares").await?;
    for name in ["busy", "gone", "late", "leased"] {
        define(&db.owner, name, "https://example.com/", "'{token.created}'").await?;
    }
    let fill = async |webhook: &str, count: i32, bytes: i32, due: &str| -> Result<()> {
        let sql = format!(
            "insert into tollgate.webhook_queue (webhook, event_epoch, event_id, event, body, next_attempt_at)
             select $1, 1, g, 'token.created', repeat('x', $3), {due} from generate_series(1, $2) g"
        );
        db.owner.execute(&sql, &[&webhook, &count, &bytes]).await?;
        Ok(())
    };
    let claim = async |most: i32| -> Result<Vec<(String, usize)>> {
        let rows = db
            .operator
            .query("select webhook, body from tollgate.claim_webhook_deliveries($1)", &[&most])
            .await?;
        Ok(rows.iter().map(|row| (row.get(0), row.get::<_, String>(1).len())).collect())
    };
    let of = |claimed: &[(String, usize)], name: &str| {
        claimed.iter().filter(|(webhook, _)| webhook == name).count()
    };
    fill("gone", 1000, 10, "now() + interval '1 hour'").await?;
    fill("busy", 1000, 10, "now() - interval '1 hour'").await?;
    fill("leased", 100, 10, "now() - interval '2 hours'").await?;
    let first = claim(8).await?;
    assert_eq!((first.len(), of(&first, "busy"), of(&first, "leased")), (16, 8, 8));
    // The others are being sent to, which does not affect this one.
    fill("late", 10, 10, "now()").await?;
    let second = claim(8).await?;
    assert_eq!((second.len(), of(&second, "late")), (8, 8));
    assert_eq!(claim(8).await?.len(), 0);

    db.owner.batch_execute("delete from tollgate.webhook_queue").await?;
    for name in ["busy", "gone", "late"] {
        // Each is larger than a share, and together they exceed what a call returns.
        fill(name, 3, 1_500_000, "now()").await?;
    }
    let large = claim(8).await?;
    assert_eq!(large.iter().map(|(_, bytes)| *bytes).collect::<Vec<_>>(), [1_500_000; 2]);
    assert_eq!(large.iter().map(|(name, _)| name).collect::<BTreeSet<_>>().len(), 2, "one of each");
    let rest = claim(8).await?;
    assert_eq!(rest.len(), 1, "and then it is the turn of the third");
    assert!(!large.contains(&rest[0]));

    db.owner.batch_execute("delete from tollgate.webhook_queue").await?;
    fill("busy", 2, 5_000_000, "now()").await?;
    fill("late", 100, 10_000, "now()").await?;
    let claimed = claim(1000).await?;
    assert_eq!((of(&claimed, "busy"), of(&claimed, "late")), (1, 0), "one that is larger comes alone");
    assert_eq!(of(&claim(1000).await?, "late"), 6, "and a share is 62500 bytes");
    Ok(())
}
