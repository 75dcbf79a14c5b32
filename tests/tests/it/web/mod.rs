//! HTTP by hand, so that nothing comes between a test and what the daemon sends.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;
use tollgate_tests::{Tollgated, eventually_async};

pub(crate) const LONG: Duration = Duration::from_secs(60);

/// A daemon that serves on any free port, and its ops listener.
pub(crate) async fn run(url: &str, arguments: &[&str]) -> Result<(Tollgated, SocketAddr)> {
    let mut command = Tollgated::command(url)?;
    command.args(["run", "--log-format=json", "--ops-address=127.0.0.1:0", "--publish-interval=100ms"]);
    start(command.args(arguments)).await
}

/// The same, with its api listener.
pub(crate) async fn run_api(url: &str, arguments: &[&str]) -> Result<(Tollgated, SocketAddr, SocketAddr)> {
    let (daemon, ops) = run(url, &[arguments, &["--api-address=127.0.0.1:0"]].concat()).await?;
    let api = api_of(&daemon).await;
    Ok((daemon, ops, api))
}

pub(crate) async fn api_of(daemon: &Tollgated) -> SocketAddr {
    eventually_async(LONG, "the daemon to serve its api", async || daemon.address("api").is_some()).await;
    daemon.address("api").expect("it serves")
}

pub(crate) async fn start(command: &mut std::process::Command) -> Result<(Tollgated, SocketAddr)> {
    let mut daemon = Tollgated::spawn_command(command)?;
    let mut address = None;
    eventually_async(LONG, "the daemon to serve HTTP", async || {
        assert!(daemon.is_running(), "it ended instead:\n{}", daemon.log());
        address = daemon.address("ops");
        address.is_some()
    })
    .await;
    Ok((daemon, address.context("an address")?))
}

#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: BTreeMap<String, String>,
    pub(crate) body: String,
}

/// Sends a request and reads the head of the answer.
pub(crate) async fn begin(address: SocketAddr, request: &str) -> Result<(Answer, BufReader<TcpStream>)> {
    let mut socket = BufReader::new(TcpStream::connect(address).await?);
    socket.write_all(request.as_bytes()).await?;
    let mut status = String::new();
    socket.read_line(&mut status).await?;
    let status = status.split(' ').nth(1).with_context(|| format!("no answer to {request}: {status:?}"))?;
    let mut answer = Answer { status: status.parse()?, headers: BTreeMap::new(), body: String::new() };
    loop {
        let mut line = String::new();
        ensure!(socket.read_line(&mut line).await? > 0, "the head of the answer ends early");
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        answer.headers.insert(name.to_ascii_lowercase(), value.trim_start().to_owned());
    }
    Ok((answer, socket))
}

/// `headers` are lines without line ends.
pub(crate) fn request(path: &str, headers: &[&str]) -> String {
    let mut text = format!("GET {path} HTTP/1.1\r\n");
    if !headers.iter().any(|header| header.starts_with("Host:")) {
        text.push_str("Host: localhost\r\n");
    }
    for header in headers {
        text.push_str(&format!("{header}\r\n"));
    }
    text + "\r\n"
}

/// The whole answer.
pub(crate) async fn get(address: SocketAddr, path: &str, headers: &[&str]) -> Result<Answer> {
    send(address, "GET", path, headers, "").await
}

/// The whole answer to a request of any kind; a body gets its length.
pub(crate) async fn send(
    address: SocketAddr,
    method: &str,
    path: &str,
    headers: &[&str],
    body: &str,
) -> Result<Answer> {
    let length = format!("Content-Length: {}", body.len());
    let more: &[&str] = if body.is_empty() { &[] } else { &[&length] };
    let headers = [headers, more, &["Connection: close"]].concat();
    let head = request(path, &headers).replacen("GET", method, 1);
    let (mut answer, mut socket) = begin(address, &(head + body)).await?;
    tokio::time::timeout(LONG, socket.read_to_string(&mut answer.body)).await??;
    Ok(answer)
}

pub(crate) async fn eventually_answers(address: SocketAddr, path: &str, status: u16) {
    eventually_async(LONG, &format!("{path} to answer {status}"), async || {
        get(address, path, &[]).await.is_ok_and(|answer| answer.status == status)
    })
    .await;
}

/// The samples of a metrics page: name with labels, except that of the database, and value.
pub(crate) async fn metrics(address: SocketAddr) -> Result<BTreeMap<String, f64>> {
    let page = get(address, "/metrics", &[]).await?;
    ensure!(page.status == 200, "{page:?}");
    page.body
        .lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| {
            let (name, value) = line.rsplit_once(' ').with_context(|| line.to_owned())?;
            Ok((without_database(name)?, value.parse().with_context(|| line.to_owned())?))
        })
        .collect()
}

fn without_database(name: &str) -> Result<String> {
    let (metric, labels) =
        name.split_once("{database=\"").with_context(|| format!("{name} says no database"))?;
    let (_, others) = labels.split_once('"').with_context(|| name.to_owned())?;
    Ok(match others.strip_prefix(',') {
        Some(others) => format!("{metric}{{{others}"),
        None => metric.to_owned(),
    })
}

/// A value from the daemon's `/proc/PID/status`, in bytes.
pub(crate) fn memory(daemon: &Tollgated, name: &str) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.pid()))?;
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let kilobytes = line.and_then(|line| line.trim().strip_suffix(" kB")).with_context(|| status.clone())?;
    Ok(kilobytes.trim().parse::<u64>()? * 1024)
}

pub(crate) async fn eventually_measures(address: SocketAddr, name: &str, is: impl Fn(f64) -> bool) {
    let mut last = None;
    eventually_async(LONG, &format!("a good value of {name}"), async || {
        last = metrics(address).await.ok().and_then(|page| page.get(name).copied());
        last.is_some_and(&is)
    })
    .await;
}
