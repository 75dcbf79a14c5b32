//! `/events`: every event once its transaction has committed, to every authorised reader, across broken connections;
//! and a reader that does not read harms no other.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use crate::common::{Shared, Token, issue, issue_with, revoke, value};
use crate::operator::Db;
use crate::web::{
    self, LONG, begin, eventually_answers, eventually_measures, get, metrics, request, run_api,
};
use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::JoinSet;
use tokio_postgres::Client;
use tollgate_tests::{Tollgated, eventually_async};

static SHARED: Shared = Shared::new(&[]);

/// A few intervals of the scan, and much less than the time after which the daemon scans in any case.
const SOON: Duration = Duration::from_secs(10);

async fn db(name: &str) -> Result<Db> {
    let db = Db::create(&SHARED.cluster()?, name).await?;
    db.owner.execute("select tollgate.define_scope('tollgate:events', 'Read events')", &[]).await?;
    Ok(db)
}

async fn reader(owner: &Client) -> Result<Token> {
    issue(owner, "reader", &["tollgate:events"]).await
}

/// One received event.
#[derive(Clone, Debug)]
struct StreamEvent {
    id: String,
    event: String,
    data: Value,
    /// The raw text.
    text: String,
}

impl StreamEvent {
    fn number(&self) -> i64 {
        self.data["id"].as_i64().unwrap_or_default()
    }
}

struct Stream {
    lines: BufReader<TcpStream>,
}

impl Stream {
    async fn open(address: SocketAddr, token: &str, from: &str, last_id: Option<&str>) -> Result<Self> {
        let mut headers = vec![format!("Authorization: Bearer {token}")];
        headers.extend(last_id.map(|id| format!("Last-Event-ID: {id}")));
        let headers: Vec<&str> = headers.iter().map(String::as_str).collect();
        let (answer, lines) = begin(address, &request(&format!("/events{from}"), &headers)).await?;
        ensure!(answer.status == 200, "{answer:?}");
        ensure!(answer.headers["content-type"] == "text/event-stream", "{answer:?}");
        ensure!(answer.headers["cache-control"] == "no-store", "{answer:?}");
        Ok(Self { lines })
    }

    /// The next event; `None` at the end of the stream. Chunk sizes and comments are skipped.
    async fn next(&mut self) -> Result<Option<StreamEvent>> {
        let (mut id, mut event) = (None, None);
        loop {
            let mut line = String::new();
            let read = tokio::time::timeout(LONG, self.lines.read_line(&mut line)).await;
            if read.context("no event came")?? == 0 {
                return Ok(None);
            }
            match line.trim_end().split_once(": ") {
                Some(("id", text)) => id = Some(text.to_owned()),
                Some(("event", text)) => event = Some(text.to_owned()),
                Some(("data", text)) => {
                    let (id, event) = (id.context("an id")?, event.context("a name")?);
                    return Ok(Some(StreamEvent {
                        id,
                        event,
                        data: serde_json::from_str(text)?,
                        text: text.to_owned(),
                    }));
                }
                _ => {}
            }
        }
    }

    async fn take(&mut self, count: usize) -> Result<Vec<StreamEvent>> {
        let mut all = Vec::new();
        while all.len() < count {
            all.push(self.next().await?.context("the stream ended")?);
        }
        Ok(all)
    }
}

fn numbers(received: &[StreamEvent]) -> Vec<i64> {
    received.iter().map(StreamEvent::number).collect()
}

async fn logged(owner: &Client) -> Result<Vec<i64>> {
    let rows = owner.query("select id from tollgate.audit_log order by id", &[]).await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// By its scan, at the default interval: nothing wakes it.
#[tokio::test]
async fn a_revocation_without_notification_still_reaches_the_log_and_the_streams() -> Result<()> {
    let db = db("unnotified").await?;
    let token = reader(&db.owner).await?;
    let mut command = Tollgated::command(&db.url())?;
    command.args(["run", "--log-format=json", "--ops-address=127.0.0.1:0", "--api-address=127.0.0.1:0"]);
    let (daemon, ops) = web::start(&mut command).await?;
    let api = web::api_of(&daemon).await;
    eventually_answers(ops, "/readyz", 200).await;
    let mut stream = Stream::open(api, &token.token, "", None).await?;
    db.owner.batch_execute("set tollgate.notify = off").await?;
    for _ in 0..3 {
        let phone = issue(&db.owner, "ann", &[]).await?;
        assert!(revoke(&db.owner, phone.id).await?);
        let id = phone.id.to_string();
        let received =
            tokio::time::timeout(SOON, stream.take(2)).await.context("the stream is too late")??;
        assert_eq!(received[1].event, "token.revoked");
        assert_eq!(received[1].data["token_id"], id.as_str());
        eventually_async(SOON, "the daemon to log it", async || {
            daemon.log().lines().any(|line| line.contains(&id) && line.contains("token.revoked"))
        })
        .await;
    }
    Ok(())
}

#[tokio::test]
async fn a_reader_receives_what_happens_from_now_on() -> Result<()> {
    let db = db("from_now").await?;
    let token = reader(&db.owner).await?;
    let (_daemon, ops, api) = run_api(&db.url(), &[]).await?;
    let mut stream = Stream::open(api, &token.token, "", None).await?;
    let phone = issue(&db.owner, "ann", &["posts:read"]).await?;
    assert!(revoke(&db.owner, phone.id).await?);
    let received = stream.take(2).await?;
    assert_eq!([received[0].event.as_str(), received[1].event.as_str()], ["token.created", "token.revoked"]);
    assert_eq!(received[1].data["event"], "token.revoked");
    assert_eq!(received[1].data["token_id"], phone.id.to_string());
    assert_eq!(received[1].data["user_id"], "ann");
    assert!(received[1].data["epoch"].is_i64(), "{:?}", received[1].data);
    eventually_measures(ops, "tollgated_event_streams", |count| count == 1.0).await;
    drop(stream);
    eventually_measures(ops, "tollgated_event_streams", |count| count == 0.0).await;
    Ok(())
}

/// Events that a superuser wrote by hand: numbers beyond 64 bits, a name that would be a line of the stream, too much
/// data.
#[tokio::test]
async fn an_odd_event_is_sent_unchanged_or_marked_and_the_next_one_follows() -> Result<()> {
    let db = db("odd").await?;
    let token = reader(&db.owner).await?;
    let (_daemon, _, api) = run_api(&db.url(), &[]).await?;
    let mut stream = Stream::open(api, &token.token, "", None).await?;
    let write = "insert into tollgate.audit_log (event, detail) values
        (e'odd\\nid: 1\\nevent: token.revoked', '{}'), ('odd', (repeat('[', 200) || repeat(']', 200))::jsonb), ('odd', '{\"n\": 12345678901234567890123}')";
    db.owner.batch_execute(write).await?;
    revoke(&db.owner, issue(&db.owner, "ann", &[]).await?.id).await?;
    let received = stream.take(5).await?;
    let names: Vec<&str> = received.iter().map(|received| received.event.as_str()).collect();
    assert_eq!(names, ["message", "odd", "odd", "token.created", "token.revoked"]);
    assert!(received[1].data["detail"]["unreadable"].is_string(), "{:?}", received[1]);
    assert!(received[1].data["id"].is_i64());
    assert!(received[2].text.contains("\"n\": 12345678901234567890123"), "{}", received[2].text);
    Ok(())
}

#[tokio::test]
async fn only_a_token_with_the_scope_reads_and_only_while_it_is_valid() -> Result<()> {
    let db = db("scope").await?;
    let (good, other) = (reader(&db.owner).await?, issue(&db.owner, "ann", &["posts:read"]).await?);
    let (daemon, ops, api) = run_api(&db.url(), &[]).await?;
    let asked = async |authorization: Option<&str>| -> Result<u16> {
        let header = authorization.map(|value| format!("Authorization: {value}"));
        let headers: Vec<&str> = header.as_deref().into_iter().collect();
        Ok(get(api, "/events", &headers).await?.status)
    };
    assert_eq!(asked(None).await?, 401);
    assert_eq!(asked(Some("Bearer")).await?, 401);
    assert_eq!(asked(Some("Bearer nonsense")).await?, 401);
    assert_eq!(asked(Some(&format!("Basic {}", good.token))).await?, 401);
    let lacking = get(api, "/events", &[&format!("Authorization: Bearer {}", other.token)]).await?;
    assert_eq!(
        (lacking.status, lacking.headers["www-authenticate"].contains("insufficient_scope")),
        (403, true)
    );
    assert_eq!(serde_json::from_str::<Value>(&lacking.body)?["code"], "INSUFFICIENT_SCOPE");
    let in_query = get(api, &format!("/events?token={}", good.token), &[]).await?;
    assert_eq!(in_query.status, 401, "addresses end up in logs");
    let refused = metrics(ops).await?["tollgated_event_streams_refused_total"];
    assert_eq!(refused, 6.0);

    let mut stream = Stream::open(api, &good.token, "", None).await?;
    assert!(revoke(&db.owner, good.id).await?);
    // The stream ends, whether or not it delivered that event.
    while stream.next().await?.is_some() {}
    assert_eq!(asked(Some(&format!("Bearer {}", good.token))).await?, 401);
    for token in [&good, &other] {
        assert!(!daemon.log().contains(&token.token), "in the log");
    }
    Ok(())
}

#[tokio::test]
async fn a_reader_that_returns_with_the_last_id_misses_nothing_not_even_late_commits() -> Result<()> {
    let db = db("late").await?;
    let token = reader(&db.owner).await?;
    let (_daemon, _, api) = run_api(&db.url(), &[]).await?;
    // Its row has the lower number, and commits after the others were delivered.
    let mut late = db.session("postgres").await?;
    let transaction = late.transaction().await?;
    let hidden: i64 = transaction
        .query_one("insert into tollgate.audit_log (event) values ('token.created') returning id", &[])
        .await?
        .get(0);
    let mut stream = Stream::open(api, &token.token, "?since=0", None).await?;
    let before = logged(&db.owner).await?;
    let mut all = numbers(&stream.take(before.len()).await?);
    for _ in 0..5 {
        issue(&db.owner, "ann", &[]).await?;
    }
    let mut received = stream.take(3).await?;
    all.extend(numbers(&received));
    drop(stream);
    transaction.commit().await?;

    let last = received.pop().context("an event")?.id;
    let mut stream = Stream::open(api, &token.token, "", Some(&last)).await?;
    let rest = numbers(&stream.take(3).await?);
    assert!(rest.contains(&hidden), "{hidden} is not among {rest:?}");
    all.extend(rest);
    let unique: BTreeSet<i64> = all.iter().copied().collect();
    assert_eq!(unique.len(), all.len(), "received twice: {all:?}");
    assert_eq!(unique, logged(&db.owner).await?.into_iter().collect());
    Ok(())
}

#[tokio::test]
async fn a_killed_daemon_loses_no_event_and_another_one_continues() -> Result<()> {
    let db = db("killed").await?;
    let token = reader(&db.owner).await?;
    let mut received: Vec<StreamEvent> = Vec::new();
    for round in 0..3 {
        let (mut daemon, ops, api) = run_api(&db.url(), &[]).await?;
        eventually_answers(ops, "/readyz", 200).await;
        let last = received.last().map(|event| event.id.clone());
        let mut stream = Stream::open(api, &token.token, "?since=0", last.as_deref()).await?;
        for _ in 0..20 {
            let one = issue(&db.owner, "ann", &[]).await?;
            revoke(&db.owner, one.id).await?;
        }
        received.extend(stream.take(20 + round).await?);
        daemon.kill()?;
    }
    let (_daemon, _, api) = run_api(&db.url(), &[]).await?;
    let last = received.last().map(|event| event.id.clone());
    let mut stream = Stream::open(api, &token.token, "", last.as_deref()).await?;
    let there = logged(&db.owner).await?;
    while numbers(&received).into_iter().collect::<BTreeSet<_>>() != there.iter().copied().collect() {
        received.push(stream.next().await?.context("the stream ended")?);
        ensure!(received.len() <= 2 * there.len(), "not all of {there:?} in {:?}", numbers(&received));
    }
    // A single reader, without late commits: once each, and in order.
    assert_eq!(numbers(&received), there);
    Ok(())
}

#[tokio::test]
async fn an_id_that_cannot_be_followed_is_refused_and_says_what_to_do() -> Result<()> {
    let db = db("elsewhere").await?;
    let token = reader(&db.owner).await?;
    let (_daemon, _, api) = run_api(&db.url(), &[]).await?;
    let authorization = format!("Authorization: Bearer {}", token.token);
    let asked = async |path: &str, id: &str| -> Result<(u16, String)> {
        let id = format!("Last-Event-ID: {id}");
        let answer = get(api, path, &[&authorization, &id]).await?;
        Ok((answer.status, answer.body))
    };
    for id in ["7", "nonsense", "(7)", "(00000000-0000-0000-0000-000000000000,7,,,,,)"] {
        assert_eq!(asked("/events", id).await?.0, 400, "{id}");
    }
    let (status, body) = asked("/events", "(01234567-89ab-cdef-0123-456789abcdef,5:5:,,,,,)").await?;
    assert_eq!(status, 410);
    assert!(body.contains("since=0"), "{body}");
    assert_eq!(get(api, "/events?since=x", &[&authorization]).await?.status, 400);
    Ok(())
}

#[tokio::test]
async fn a_reader_that_never_reads_delays_no_other_and_is_cut_off() -> Result<()> {
    let db = db("stalled").await?;
    let token = reader(&db.owner).await?;
    // Much more than sockets hold.
    db.owner
        .execute(
            "insert into tollgate.audit_log (event, detail)
             select 'token.updated', jsonb_build_object('filler', repeat('x', 4000)) from generate_series(1, 8000)",
            &[],
        )
        .await?;
    let mut tokens = Vec::new();
    for _ in 0..4 {
        tokens.push(reader(&db.owner).await?);
    }
    let (_daemon, ops, api) = run_api(&db.url(), &[]).await?;
    eventually_answers(ops, "/readyz", 200).await;
    let before = metrics(ops).await?["tollgated_resident_memory_bytes"];
    let mut stalled = Vec::new();
    for number in 0..20 {
        let socket = TcpSocket::new_v4()?;
        socket.set_recv_buffer_size(4096)?;
        let mut socket = socket.connect(api).await?;
        let authorization = format!("Authorization: Bearer {}", tokens[number % 4].token);
        socket.write_all(request("/events?since=0", &[&authorization]).as_bytes()).await?;
        stalled.push(socket);
    }
    eventually_measures(ops, "tollgated_event_streams", |count| count == 20.0).await;
    let mut lively = Stream::open(api, &token.token, "", None).await?;
    for _ in 0..50 {
        let one = issue(&db.owner, "ann", &[]).await?;
        assert!(revoke(&db.owner, one.id).await?);
        let received = lively.take(2).await?;
        assert_eq!(received[1].data["token_id"], one.id.to_string());
    }
    let after = metrics(ops).await?["tollgated_resident_memory_bytes"];
    assert!(after - before < 60e6, "from {before} to {after} bytes");
    // Readers that take nothing are disconnected; the one that reads stays.
    eventually_measures(ops, "tollgated_event_streams", |count| count == 1.0).await;
    let mut rest = Vec::new();
    let mut one = stalled.pop().context("a socket")?;
    tokio::time::timeout(LONG, one.read_to_end(&mut rest)).await.context("still open")?.ok();
    issue(&db.owner, "ann", &[]).await?;
    assert_eq!(lively.take(1).await?[0].event, "token.created");
    Ok(())
}

/// Tokens for the maximum number of readers, and one more.
async fn readers(owner: &Client) -> Result<Vec<Token>> {
    let mut tokens = Vec::new();
    for _ in 0..9 {
        tokens.push(reader(owner).await?);
    }
    Ok(tokens)
}

/// The maximum number of streams: eight for each of eight tokens.
async fn fill(api: SocketAddr, tokens: &[Token]) -> Result<Vec<Stream>> {
    let mut streams = Vec::new();
    for token in &tokens[..8] {
        for _ in 0..8 {
            streams.push(Stream::open(api, &token.token, "", None).await?);
        }
    }
    Ok(streams)
}

#[tokio::test]
async fn the_number_of_readers_is_limited_and_the_next_one_is_asked_to_retry_later() -> Result<()> {
    let db = db("crowd").await?;
    let tokens = readers(&db.owner).await?;
    let (_daemon, ops, api) = run_api(&db.url(), &[]).await?;
    let mut streams = fill(api, &tokens).await?;
    let authorization = format!("Authorization: Bearer {}", tokens[8].token);
    let refused = get(api, "/events", &[&authorization]).await?;
    assert_eq!(refused.status, 503);
    assert!(refused.headers.contains_key("retry-after"));
    issue(&db.owner, "ann", &[]).await?;
    for stream in &mut streams {
        assert_eq!(stream.take(1).await?[0].event, "token.created");
    }
    drop(streams.pop());
    eventually_measures(ops, "tollgated_event_streams", |count| count == 63.0).await;
    Stream::open(api, &tokens[8].token, "", None).await?;
    Ok(())
}

#[tokio::test]
async fn one_token_has_eight_streams_at_most_and_leaves_the_rest_to_others() -> Result<()> {
    let db = db("share").await?;
    let (greedy, other) = (reader(&db.owner).await?, reader(&db.owner).await?);
    let (_daemon, ops, api) = run_api(&db.url(), &[]).await?;
    let mut streams = Vec::new();
    for _ in 0..8 {
        streams.push(Stream::open(api, &greedy.token, "", None).await?);
    }
    let authorization = format!("Authorization: Bearer {}", greedy.token);
    let refused = get(api, "/events", &[&authorization]).await?;
    assert_eq!(refused.status, 429);
    assert!(refused.headers.contains_key("retry-after"));
    streams.push(Stream::open(api, &other.token, "", None).await?);
    issue(&db.owner, "ann", &[]).await?;
    for stream in &mut streams {
        assert_eq!(stream.take(1).await?[0].event, "token.created");
    }
    // A freed place can be used again.
    drop(streams.remove(0));
    eventually_measures(ops, "tollgated_event_streams", |count| count == 8.0).await;
    Stream::open(api, &greedy.token, "", None).await?;
    Ok(())
}

#[tokio::test]
async fn junk_of_any_amount_shuts_no_reader_out_and_ends_no_stream() -> Result<()> {
    let db = db("junk").await?;
    let tokens = readers(&db.owner).await?;
    let (_daemon, ops, api) = run_api(&db.url(), &[]).await?;
    eventually_answers(ops, "/readyz", 200).await;
    let mut junk = JoinSet::new();
    for number in 0..100 {
        junk.spawn(async move {
            let authorization = format!("Authorization: Bearer tgt_nonsense{number}");
            loop {
                // The daemon closes connections when there are too many of them.
                if let Ok(answer) = get(api, "/events", &[&authorization]).await {
                    assert!([401, 503].contains(&answer.status), "{answer:?}");
                }
            }
        });
    }
    eventually_measures(ops, "tollgated_event_streams_refused_total", |count| count >= 100.0).await;
    let mut streams = fill(api, &tokens).await?;
    issue(&db.owner, "ann", &[]).await?;
    for stream in &mut streams {
        assert_eq!(stream.take(1).await?[0].event, "token.created");
    }
    assert!(junk.try_join_next().is_none(), "they continue");
    Ok(())
}

#[tokio::test]
async fn idle_connections_end_no_stream() -> Result<()> {
    let db = db("idle").await?;
    let token = reader(&db.owner).await?;
    let (_daemon, _, api) = run_api(&db.url(), &[]).await?;
    let mut stream = Stream::open(api, &token.token, "", None).await?;
    let mut idle = Vec::new();
    for _ in 0..600 {
        idle.push(TcpStream::connect(api).await?);
    }
    assert_eq!(get(api, "/events", &[]).await?.status, 401);
    issue(&db.owner, "ann", &[]).await?;
    assert_eq!(stream.take(1).await?[0].event, "token.created");
    Ok(())
}

#[tokio::test]
async fn failures_of_an_address_neither_end_its_streams_nor_block_a_valid_token() -> Result<()> {
    let db = db("proxy").await?;
    db.cluster.execute(
        &db.name,
        &format!(
            "alter database {0} set tollgate.failure_rate_limit = 3;
             alter database {0} set tollgate.failure_rate_window = '1d'",
            db.name
        ),
    )?;
    let here = "scopes => '{tollgate:events}', allowed_ips => '{127.0.0.0/8}'";
    let (good, bound) = (reader(&db.owner).await?, issue_with(&db.owner, "reader", here).await?);
    let elsewhere = "scopes => '{tollgate:events}', allowed_ips => '{10.0.0.0/8}'";
    let elsewhere = issue_with(&db.owner, "reader", elsewhere).await?;
    let unscoped = issue_with(&db.owner, "reader", "allowed_ips => '{127.0.0.0/8}'").await?;
    let (_daemon, _, api) = run_api(&db.url(), &[]).await?;
    let mut streams = Vec::new();
    for token in [&good, &bound] {
        streams.push(Stream::open(api, &token.token, "", None).await?);
    }
    let asked = async |token: &str| -> Result<u16> {
        Ok(get(api, "/events", &[&format!("Authorization: Bearer {token}")]).await?.status)
    };
    for _ in 0..3 {
        assert_eq!(asked("nonsense").await?, 401);
    }
    assert_eq!(asked("nonsense").await?, 429, "guesses have used it up");
    for (token, stream) in [&good, &bound].into_iter().zip(&mut streams) {
        // An event about its token makes a stream check the token again.
        let sql = "select tollgate.update_api_token($1, '{\"name\": \"renamed\"}')";
        db.owner.execute(sql, &[&token.id]).await?;
        while stream.take(1).await?[0].data["token_id"] != token.id.to_string() {}
        issue(&db.owner, "ann", &[]).await?;
        while stream.take(1).await?[0].data["user_id"] != "ann" {}
        // And another reader with it is admitted.
        Stream::open(api, &token.token, "", None).await?;
    }
    assert_eq!(asked(&elsewhere.token).await?, 401);
    assert_eq!(asked(&unscoped.token).await?, 403);
    for (token, stream) in [&good, &bound].into_iter().zip(&mut streams) {
        assert!(revoke(&db.owner, token.id).await?);
        while stream.next().await?.is_some() {}
        assert_eq!(asked(&token.token).await?, 401);
    }
    Ok(())
}

#[tokio::test]
async fn a_stream_continues_when_its_token_has_used_up_its_limit() -> Result<()> {
    let db = db("used_up").await?;
    let limited = "scopes => '{tollgate:events}', rate_limit => 1, rate_window => '1 day'";
    let token = issue_with(&db.owner, "reader", limited).await?;
    let (_daemon, _, api) = run_api(&db.url(), &[]).await?;
    let mut stream = Stream::open(api, &token.token, "", None).await?;
    let authorization = format!("Authorization: Bearer {}", token.token);
    assert_eq!(get(api, "/events", &[&authorization]).await?.status, 429);
    db.owner.execute("select tollgate.update_api_token($1, '{\"name\": \"renamed\"}')", &[&token.id]).await?;
    assert_eq!(stream.take(1).await?[0].event, "token.updated");
    issue(&db.owner, "ann", &[]).await?;
    assert_eq!(stream.take(1).await?[0].event, "token.created");
    assert!(revoke(&db.owner, token.id).await?);
    while stream.next().await?.is_some() {}
    Ok(())
}

#[tokio::test]
async fn an_expired_token_receives_nothing_more() -> Result<()> {
    let db = db("expires").await?;
    let token =
        issue_with(&db.owner, "reader", "scopes => '{tollgate:events}', expires_in => '2 seconds'").await?;
    let (_daemon, _, api) = run_api(&db.url(), &["--expire-interval=100ms"]).await?;
    let mut stream = Stream::open(api, &token.token, "", None).await?;
    while stream.next().await?.is_some() {}
    let expired: bool =
        value(&db.owner, "select exists (select from tollgate.audit_log where event = 'token.expired')")
            .await?;
    assert!(expired);
    Ok(())
}

#[tokio::test]
async fn a_stream_ends_when_the_daemon_is_stopped() -> Result<()> {
    let db = db("ends").await?;
    let token = reader(&db.owner).await?;
    let (mut daemon, _, api) = run_api(&db.url(), &[]).await?;
    let mut stream = Stream::open(api, &token.token, "", None).await?;
    daemon.terminate()?;
    while stream.next().await?.is_some() {}
    assert!(daemon.wait(Duration::from_secs(30))?.success(), "{}", daemon.log());
    Ok(())
}
