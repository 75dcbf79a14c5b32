//! The daemon's HTTP listeners: liveness, readiness, metrics, and refused requests.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::common::{self, Shared, issue, issue_with, revoke};
use crate::operator::{self, Db, OPERATOR};
use crate::web::{LONG, begin, eventually_answers, eventually_measures, get, metrics, request, run, run_api};
use anyhow::{Context as _, Result};
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tollgate_tests::{Cluster, DATABASE, Tollgated, eventually_async};

static SHARED: Shared = Shared::new(&[]);

async fn db(name: &str) -> Result<Db> {
    Db::create(&SHARED.cluster()?, name).await
}

#[tokio::test]
async fn it_is_alive_at_once_and_ready_while_the_database_answers() -> Result<()> {
    let mut cluster = common::start(Cluster::builder())?;
    operator::grant(&cluster, DATABASE)?;
    let (_daemon, address) = run(&cluster.url(OPERATOR, DATABASE), &[]).await?;
    eventually_answers(address, "/readyz", 200).await;
    eventually_measures(address, "tollgated_listens_total", |count| count == 1.0).await;
    cluster.stop()?;
    eventually_answers(address, "/readyz", 503).await;
    let page = metrics(address).await?;
    assert_eq!(page["tollgated_ready"], 0.0);
    assert!(!page.keys().any(|name| name.starts_with("tollgate_")), "stale: {page:?}");
    assert_eq!(get(address, "/livez", &[]).await?.status, 200, "nothing is wrong with the process");
    eventually_measures(address, "tollgated_connect_failures_total", |count| count >= 1.0).await;
    cluster.restart()?;
    eventually_answers(address, "/readyz", 200).await;
    eventually_measures(address, "tollgated_listens_total", |count| count >= 2.0).await;
    Ok(())
}

#[tokio::test]
async fn it_is_not_ready_before_it_was_ever_connected() -> Result<()> {
    let (_daemon, address) = run("postgresql://unused@127.0.0.1:1/nowhere", &[]).await?;
    eventually_measures(address, "tollgated_connect_failures_total", |count| count >= 1.0).await;
    assert_eq!(get(address, "/readyz", &[]).await?.status, 503);
    assert_eq!(get(address, "/livez", &[]).await?.status, 200);
    Ok(())
}

#[tokio::test]
async fn its_metrics_count_what_happened() -> Result<()> {
    let db = db("measured").await?;
    let (_daemon, address) = run(&db.url(), &["--flush-interval=100ms", "--expire-interval=100ms"]).await?;
    eventually_answers(address, "/readyz", 200).await;
    // Events are logged from the start of the subscription on.
    let pending = "tollgate_subscription_pending_events{subscription=\"log\"}";
    eventually_measures(address, pending, |_| true).await;
    let before = metrics(address).await?;
    let valid = "tollgate_verifications_total{code=\"VALID\"}";

    let token = issue(&db.owner, "ann", &["posts:read"]).await?;
    issue_with(&db.owner, "ann", "expires_in => '1 second'").await?;
    for _ in 0..3 {
        assert_eq!(common::code(&db.web, &token.token).await?, "VALID");
    }
    assert!(revoke(&db.owner, token.id).await?);
    // Other tests share the server, and so its counters.
    eventually_measures(address, valid, |count| count >= before[valid] + 3.0).await;
    eventually_measures(address, "tollgated_expired_tokens_total", |count| count == 1.0).await;
    eventually_measures(address, "tollgated_flushed_tokens_total", |count| count >= 1.0).await;
    eventually_measures(address, "tollgated_logged_events_total", |count| count >= 3.0).await;
    eventually_measures(address, pending, |count| count == 0.0).await;

    let page = metrics(address).await?;
    for (name, least) in [
        ("tollgated_task_runs_total{task=\"flush_usage\"}", 1.0),
        ("tollgated_resident_memory_bytes", 1e6),
        ("tollgate_tracked_keys_limit", 1.0),
        ("tollgate_table_bytes{table=\"audit_log\"}", 8192.0),
        ("tollgate_metering", 1.0),
    ] {
        assert!(page[name] >= least, "{name}: {}", page[name]);
    }
    assert!((0.0..1.0).contains(&page["tollgate_notification_queue_usage_ratio"]));
    let text = get(address, "/metrics", &[]).await?.body;
    assert!(
        !text.contains(&token.token) && !text.contains(&token.id.to_string()) && !text.contains("\"ann\"")
    );
    Ok(())
}

#[tokio::test]
async fn pending_events_are_counted_while_none_are_published() -> Result<()> {
    let db = db("pending").await?;
    db.operator.execute("select tollgate.open_subscription('elsewhere')", &[]).await?;
    for _ in 0..5 {
        issue(&db.owner, "ann", &[]).await?;
    }
    let (_daemon, address) = run(&db.url(), &[]).await?;
    let pending = "tollgate_subscription_pending_events{subscription=\"elsewhere\"}";
    eventually_measures(address, pending, |count| count == 5.0).await;
    let since = "tollgate_subscription_oldest_pending_timestamp_seconds{subscription=\"elsewhere\"}";
    assert!(metrics(address).await?[since] > 1.7e9);
    Ok(())
}

#[tokio::test]
async fn a_foreign_host_name_that_resolves_here_is_not_served() -> Result<()> {
    let (_daemon, address) = run("postgresql://unused@127.0.0.1:1/nowhere", &[]).await?;
    for host in ["evil.example", "evil.example:80", "localhost.evil.example", "127.0.0.1.evil.example"] {
        for path in ["/metrics", "/nothing", "/livez"] {
            let answer = get(address, path, &[&format!("Host: {host}")]).await?;
            assert_eq!(answer.status, 421, "{host} {path}");
        }
    }
    for host in ["localhost", "LOCALHOST:9464", "127.0.0.1:9464", "[::1]:9464", "[::1]"] {
        assert_eq!(get(address, "/livez", &[&format!("Host: {host}")]).await?.status, 200, "{host}");
    }
    Ok(())
}

#[tokio::test]
async fn ambiguous_requests_are_refused() -> Result<()> {
    let (_daemon, address) = run("postgresql://unused@127.0.0.1:1/nowhere", &[]).await?;
    for request in [
        "GET /livez HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
        "GET /livez HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
        "GET http://evil.example/livez HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "GET http://localhost/livez HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "GET /livez HTTP/1.1\r\n\r\n",
        "GET /livez HTTP/1.1\r\nHost:\r\n\r\n",
        "GET /livez HTTP/1.1\r\nHost: localhost, evil.example\r\n\r\n",
        "GET /livez HTTP/1.1\r\nHost: localhost:x\r\n\r\n",
        "GET /livez HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nhello",
        "GET /livez HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "GET /events HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer a\r\nAuthorization: Bearer b\r\n\r\n",
        "GET /events HTTP/1.1\r\nHost: localhost\r\nLast-Event-ID: 1\r\nLast-Event-ID: 2\r\n\r\n",
    ] {
        assert_eq!(begin(address, request).await?.0.status, 400, "{request}");
    }
    for request in
        ["GET /livez HTTP/1.0\r\n\r\n", "GET /livez HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n"]
    {
        assert_eq!(begin(address, request).await?.0.status, 200, "{request}");
    }
    Ok(())
}

/// Clients that never leave by themselves. Each sends something repeatedly, so that none is closed as idle. Returns
/// once the daemon has accepted most of them.
async fn crowd(address: SocketAddr, count: usize, sends: &'static str) -> JoinSet<()> {
    let begun = Arc::new(AtomicUsize::new(0));
    let mut clients = JoinSet::new();
    for _ in 0..count {
        let begun = begun.clone();
        clients.spawn(async move {
            let Ok(mut socket) = TcpStream::connect(address).await else { return };
            begun.fetch_add(1, Ordering::SeqCst);
            let mut answer = [0; 4096];
            loop {
                if socket.write_all(sends.as_bytes()).await.is_err() {
                    return;
                }
                let next = tokio::time::sleep(Duration::from_millis(500));
                tokio::select! {
                    read = socket.read(&mut answer) => if !matches!(read, Ok(1..)) { return },
                    () = next => continue,
                }
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
        });
    }
    eventually_async(LONG, "the crowd to come", async || begun.load(Ordering::SeqCst) == count).await;
    clients
}

#[tokio::test]
async fn any_number_of_other_connections_leaves_room_for_an_answer() -> Result<()> {
    let (mut daemon, address) = run("postgresql://unused@127.0.0.1:1/nowhere", &[]).await?;
    // Whole requests, and heads that never end, with a new byte each time.
    for sends in ["GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n", "G"] {
        let _crowd = crowd(address, 400, sends).await;
        for _ in 0..20 {
            let answer = tokio::time::timeout(LONG, get(address, "/livez", &[])).await;
            assert_eq!(answer.with_context(|| format!("{sends:?} keep it busy"))??.status, 200);
        }
    }
    let sockets = std::fs::read_dir(format!("/proc/{}/fd", daemon.pid()))?.count();
    assert!(sockets < 400, "{sockets} files are open");
    assert!(daemon.is_running());
    Ok(())
}

#[tokio::test]
async fn invalid_requests_are_refused_and_cost_nothing() -> Result<()> {
    let (mut daemon, address) = run("postgresql://unused@127.0.0.1:1/nowhere", &[]).await?;
    let absent = get(address, "/events", &[]).await?;
    assert_eq!((absent.status, absent.headers["content-type"].as_str()), (404, "application/problem+json"));
    let head = request("/metrics", &["Connection: close"]).replace("GET", "HEAD");
    let (answer, mut rest) = begin(address, &head).await?;
    assert_eq!((answer.status, answer.headers["cache-control"].as_str()), (200, "no-store"));
    assert_eq!(rest.read_to_end(&mut Vec::new()).await?, 0, "the answer to HEAD has a body");
    let (refused, _) = begin(address, &request("/metrics", &[]).replace("GET", "DELETE")).await?;
    assert_eq!((refused.status, refused.headers["allow"].as_str()), (405, "GET,HEAD"));
    let long = format!("X-Long: {}", "x".repeat(1 << 20));
    // The daemon may close before all of it was sent.
    if let Ok(answer) = get(address, "/metrics", &[&long]).await {
        assert!([431, 400].contains(&answer.status), "{}", answer.status);
    }
    // Half a request, and never the rest.
    let mut slow = tokio::net::TcpStream::connect(address).await?;
    slow.write_all(b"GET /livez HTTP/1.1\r\nHost: local").await?;
    let mut rest = Vec::new();
    tokio::time::timeout(LONG, slow.read_to_end(&mut rest)).await.context("it is let hang")??;
    assert!(daemon.is_running());
    Ok(())
}

#[tokio::test]
async fn a_port_in_use_is_reported_and_served_once_it_is_free() -> Result<()> {
    let (mut first, address) = run("postgresql://unused@127.0.0.1:1/nowhere", &[]).await?;
    let flag = format!("--ops-address={address}");
    let mut command = Tollgated::command("postgresql://unused@127.0.0.1:1/nowhere")?;
    let mut second = Tollgated::spawn_command(command.args(["run", "--log-format=json", &flag]))?;
    eventually_async(LONG, "the second to report it", async || {
        assert!(second.is_running(), "{}", second.log());
        second.log().contains("the address is in use")
    })
    .await;
    first.kill()?;
    eventually_async(LONG, "the second to serve", async || second.address("ops") == Some(address)).await;
    assert_eq!(get(address, "/livez", &[]).await?.status, 200);
    assert_eq!(second.log().matches("the address is in use").count(), 1);
    // Only another configuration helps with these.
    for wrong in ["localhost:9464", "9464", "192.0.2.1:9464"] {
        let flag = format!("--ops-address={wrong}");
        let refused = Tollgated::run("postgresql://unused@127.0.0.1:1/nowhere", &["run", &flag])?;
        assert_eq!(refused.status.code(), Some(64), "{wrong}");
        let error = String::from_utf8(refused.stderr)?;
        assert!(error.contains("--ops-address") && error.contains("off"), "{error}");
    }
    Ok(())
}

#[tokio::test]
async fn the_api_listener_is_off_by_default_and_serves_no_metrics() -> Result<()> {
    let (daemon, ops) = run("postgresql://unused@127.0.0.1:1/nowhere", &[]).await?;
    assert_eq!((daemon.address("ops"), daemon.address("api")), (Some(ops), None));
    let (_daemon, _, api) = run_api("postgresql://unused@127.0.0.1:1/nowhere", &[]).await?;
    for path in ["/metrics", "/livez", "/readyz"] {
        assert_eq!(get(api, path, &[]).await?.status, 404, "{path}");
    }
    let secret = "tgt_not-a-token";
    let unreachable = get(api, "/events", &[&format!("Authorization: Bearer {secret}")]).await?;
    assert_eq!(unreachable.status, 503);
    for (refused, status) in [(get(api, "/events", &[]).await?, 401), (unreachable, 503)] {
        assert_eq!(refused.headers["content-type"], "application/problem+json");
        let problem: Value = serde_json::from_str(&refused.body)?;
        assert_eq!(problem["status"], status);
        assert!(problem["title"].is_string() && problem["detail"].is_string(), "{problem}");
        assert!(!refused.body.contains(secret), "{problem}");
    }
    Ok(())
}

#[tokio::test]
async fn it_stops_in_time_with_connections_open() -> Result<()> {
    let db = db("stopped").await?;
    let (mut daemon, address) = run(&db.url(), &["--shutdown-grace=20s"]).await?;
    eventually_answers(address, "/readyz", 200).await;
    let _idle = tokio::net::TcpStream::connect(address).await?;
    daemon.terminate()?;
    assert!(daemon.wait(Duration::from_secs(20))?.success(), "{}", daemon.log());
    Ok(())
}
