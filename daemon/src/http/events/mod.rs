//! `/events`: the event log as server-sent events, for programs that present a token with the scope `tollgate:events`.
//!
//! Each reader has its own cursor, and sends it back as `Last-Event-ID` when it reconnects, so the daemon keeps no state per
//! reader. The next batch is read only once the last one is on its way: a slow reader costs one batch of memory, and delays
//! no other reader.

mod last_event_id;

use std::collections::HashMap;
use std::convert::Infallible;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Extension;
use axum::body::Body;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::header::{CONTENT_TYPE, HeaderValue};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse as _, Response};
use bytes::Bytes;
use futures_util::stream;
use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::Instant;
use tokio_postgres::error::SqlState;
use tokio_util::sync::CancellationToken;

use super::connections::Client;
use super::connections::Held;
use super::credential::Presented;
use super::peer::ClientIp;
use super::problem::{Challenge, Problem};
use super::request_checks::LAST_EVENT_ID;
use super::server::MAX_API_CONNECTIONS;
use crate::app::events::{Follower, Watch};
use crate::background::signal::Signal;
use crate::contract;
use crate::contract::Cursor;
use crate::error::{Error, Result};
use crate::postgres::pool::Database;
use crate::process::counters;
use crate::secret::Secret;

/// Of all tokens together, and of each.
const MAX_STREAMS: usize = 64;
const MAX_STREAMS_PER_TOKEN: usize = 8;
/// Requests whose token is being verified, in the order in which they came. More of them wait before that, on connections that
/// may be closed to make room for others.
const MAX_VERIFYING: usize = 128;
// Their connections stay open, and others need some.
const _: () = assert!(MAX_STREAMS + MAX_VERIFYING <= MAX_API_CONNECTIONS * 3 / 4);
/// From the request to the first look at the log.
const OPENING_TIMEOUT: Duration = Duration::from_secs(10);
/// Small, since this many events of each reader may be in memory.
const PAGE: i32 = 64;
/// A comment is sent when nothing else is, so that proxies keep the connection and a dead client is noticed; and the token is
/// verified again.
const HEARTBEAT: Duration = Duration::from_secs(15);
/// How long a client waits before it reconnects, in milliseconds.
const RETRY: &str = "retry: 1000\n: tollgate\n\n";

const SCOPE: &str = "tollgate:events";
const NOT_AN_ID: &str = "Last-Event-ID is not the id of an event of this stream.";

#[derive(Debug)]
pub struct EventStreams {
    database: Database,
    slots: Arc<Slots>,
    verifying: Semaphore,
    /// All readers together use one database session at a time, so that many of them never delay the tasks; so do requests
    /// whose token is verified for the first time, so that these never delay the readers.
    reading: Arc<Semaphore>,
    opening: Semaphore,
    new_events: watch::Sender<()>,
    stop: CancellationToken,
}

impl EventStreams {
    pub fn new(database: Database, stop: CancellationToken) -> Self {
        Self {
            database,
            slots: Arc::default(),
            verifying: Semaphore::new(MAX_VERIFYING),
            reading: Arc::new(Semaphore::new(1)),
            opening: Semaphore::new(1),
            new_events: watch::Sender::new(()),
            stop,
        }
    }

    /// Cheap checks come first: the token is verified before a slot is taken for its reader, and a slot is taken before the log
    /// is read.
    async fn try_open(
        &self,
        credential: Option<Secret>,
        headers: &HeaderMap,
        start: &Result<Query<Start>, QueryRejection>,
        (client, ip): (&Client, ClientIp),
    ) -> Result<Response, Problem> {
        let credential = credential.ok_or_else(|| {
            Problem::unauthorized(
                &Challenge::nothing_presented().scope(SCOPE),
                "Present a token with the scope tollgate:events: Authorization: Bearer …",
            )
        })?;
        // All that is kept of it.
        let digest = Sha256::digest(credential.expose()).to_vec();
        drop(credential);
        let reader = Reader {
            database: self.database.clone(),
            reading: self.reading.clone(),
            digest,
            ip: ip.0,
            stop: self.stop.clone(),
        };
        let verifying = self.verifying.acquire().await;
        let held = client.connection.hold();
        let (code, token_id) = reader.verify(&self.opening).await.map_err(|error| unavailable(&error))?;
        drop(verifying);
        match code.as_str() {
            "VALID" => {}
            "INSUFFICIENT_SCOPE" => {
                let detail = "The token lacks the scope tollgate:events.";
                return Err(Problem::insufficient_scope(SCOPE, detail));
            }
            "RATE_LIMITED" | "QUOTA_EXCEEDED" => {
                let problem = Problem::too_many_requests(Duration::from_secs(60), "Too many requests.");
                return Err(problem.code(code));
            }
            _ => {
                let problem = Problem::unauthorized(&Challenge::invalid_token(), "The token was refused.");
                return Err(problem.code(code));
            }
        }
        let start = begin_at(headers, start)?;
        let slot = self.slots.take(token_id.as_deref(), held)?;
        // Before the first read, so that no event falls in between.
        let new_events = self.new_events.subscribe();
        let log = match start {
            Begin::At(cursor) => Follower::at(cursor, PAGE),
            Begin::After(since) => reader.begin(since).await.map_err(|error| unavailable(&error))?,
        };
        // Read once now, while an error can still be answered with a status.
        let first = reader.read(&log).await.map_err(|error| refused_cursor(&error))?;
        drop(first);

        let (sender, frames) = mpsc::channel(1);
        tokio::spawn(reader.stream(log, token_id, new_events, sender, slot));
        let frames = stream::unfold(frames, async |mut frames| {
            frames.recv().await.map(|frame: Bytes| (Ok::<_, Infallible>(frame), frames))
        });
        let mut response = Body::from_stream(frames).into_response();
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
        // Otherwise nginx buffers events.
        headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
        Ok(response)
    }
}

/// `GET /events`.
pub(super) async fn open(
    State(streams): State<Arc<EventStreams>>,
    Extension(client): Extension<Client>,
    Extension(ip): Extension<ClientIp>,
    Presented(credential): Presented,
    headers: HeaderMap,
    start: Result<Query<Start>, QueryRejection>,
) -> Response {
    let opened =
        tokio::time::timeout(OPENING_TIMEOUT, streams.try_open(credential, &headers, &start, (&client, ip)))
            .await;
    opened
        .unwrap_or_else(|_| Err(Problem::unavailable("The database takes too long to answer.")))
        .unwrap_or_else(|refusal| {
            counters::STREAMS_REFUSED.add(1);
            refusal.into_response()
        })
}

/// How many streams each token has.
#[derive(Debug, Default)]
struct Slots(Mutex<HashMap<String, usize>>);

impl Slots {
    fn take(self: &Arc<Self>, token_id: Option<&str>, held: Held) -> Result<Slot, Problem> {
        let token_id = token_id.unwrap_or_default().to_owned();
        let mut taken = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let own = taken.get(&token_id).copied().unwrap_or_default();
        if own >= MAX_STREAMS_PER_TOKEN {
            let detail = format!(
                "This token has {MAX_STREAMS_PER_TOKEN} streams already: end one, or use another token."
            );
            return Err(Problem::too_many_requests(Duration::from_secs(5), detail));
        }
        if taken.values().sum::<usize>() >= MAX_STREAMS {
            return Err(Problem::unavailable("There are too many readers."));
        }
        taken.insert(token_id.clone(), own + 1);
        Ok(Slot { all: self.clone(), token_id, _held: held })
    }
}

/// One stream of a token, until it is dropped.
#[derive(Debug)]
struct Slot {
    all: Arc<Slots>,
    token_id: String,
    /// The connection stays open for as long.
    _held: Held,
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut taken = self.all.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(own) = taken.get_mut(&self.token_id) {
            *own -= 1;
            if *own == 0 {
                taken.remove(&self.token_id);
            }
        }
    }
}

/// Wakes all readers: at once when an event is notified, and when a periodic look finds other events.
pub async fn wake_streams(streams: Arc<EventStreams>, notified: Signal, period: Duration) -> Result<()> {
    let stop = &streams.stop;
    let mut watch = Watch::default();
    loop {
        tokio::select! {
            () = notified.woken() => {
                streams.new_events.send_replace(());
                continue;
            }
            () = tokio::time::sleep(period) => {}
            () = stop.cancelled() => return Ok(()),
        }
        if streams.new_events.receiver_count() == 0 {
            watch.reset();
            continue;
        }
        // After an error readers look themselves, and meet it.
        if look(&streams.database, &mut watch, stop).await.unwrap_or(true) {
            streams.new_events.send_replace(());
        }
    }
}

async fn look(database: &Database, watch: &mut Watch, stop: &CancellationToken) -> Result<bool> {
    let session = database.session(stop).await?;
    watch.has_grown(&**session).await
}

/// The query of a request. `since` is 0, or the number of an event.
#[derive(Debug, Deserialize)]
pub(super) struct Start {
    since: Option<i64>,
}

/// Where a stream begins.
enum Begin {
    At(Cursor),
    /// As `tollgate.event_position` takes it.
    After(Option<i64>),
}

/// `Last-Event-ID` goes before `since`: a client that reconnects repeats its URL.
fn begin_at(headers: &HeaderMap, start: &Result<Query<Start>, QueryRejection>) -> Result<Begin, Problem> {
    let refuse = |why| Problem::new(StatusCode::BAD_REQUEST, why);
    if let Some(id) = headers.get(LAST_EVENT_ID).filter(|id| !id.is_empty()) {
        let cursor = id.to_str().ok().and_then(last_event_id::decode);
        return cursor.map(Begin::At).ok_or_else(|| refuse(NOT_AN_ID));
    }
    match start {
        Ok(Query(Start { since })) if since.is_none_or(|since| since >= 0) => Ok(Begin::After(*since)),
        _ => Err(refuse("since is 0, or the number of an event.")),
    }
}

struct Reader {
    database: Database,
    reading: Arc<Semaphore>,
    digest: Vec<u8>,
    ip: IpAddr,
    stop: CancellationToken,
}

impl Reader {
    /// The code, and the token's id.
    async fn verify(&self, turn: &Semaphore) -> Result<(String, Option<String>)> {
        let _turn = turn.acquire().await;
        let session = self.database.session(&self.stop).await?;
        let (code, token_id) = contract::admit_event_reader(&**session, &self.digest, self.ip).await?;
        Ok((code, token_id.map(|id| id.to_string())))
    }

    async fn begin(&self, since: Option<i64>) -> Result<Follower> {
        let _turn = self.reading.acquire().await;
        let session = self.database.session(&self.stop).await?;
        Follower::begin(&**session, since, PAGE).await
    }

    async fn read(&self, log: &Follower) -> Result<contract::Batch> {
        let _turn = self.reading.acquire().await;
        let session = self.database.session(&self.stop).await?;
        log.read(&**session).await
    }

    /// Sends events until the client, its token or the daemon is gone. A client that is cut off reconnects with the last id.
    async fn stream(
        self,
        mut log: Follower,
        token_id: Option<String>,
        mut new_events: watch::Receiver<()>,
        frames: mpsc::Sender<Bytes>,
        slot: Slot,
    ) {
        let _held = counters::STREAMS.hold();
        let _slot = slot;
        if !self.send(&frames, RETRY.into()).await {
            return;
        }
        let mut verified = Instant::now();
        loop {
            // Events that come from here on wake the next round.
            new_events.mark_unchanged();
            let batch = match self.read(&log).await {
                Ok(batch) => batch,
                Err(error) => {
                    tracing::debug!(peer = %self.ip, %error, "ends an event stream");
                    return;
                }
            };
            let concerned = batch.events.iter().any(|event| event.token_id == token_id);
            if concerned || verified.elapsed() >= HEARTBEAT {
                match self.verify(&self.reading).await {
                    // Limits are checked last: nothing else is wrong with the token, and the stream has begun already.
                    Ok((code, _)) if ["VALID", "RATE_LIMITED", "QUOTA_EXCEEDED"].contains(&code.as_str()) => {
                        verified = Instant::now();
                    }
                    _ => return,
                }
            }
            if !batch.events.is_empty() {
                let sent = u64::try_from(batch.events.len()).unwrap_or_default();
                if !self.send(&frames, write_events(&batch)).await {
                    return;
                }
                counters::STREAMED_EVENTS.add(sent);
            }
            if !log.pass(batch) {
                continue;
            }
            tokio::select! {
                changed = new_events.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(HEARTBEAT) => {
                    if !self.send(&frames, Bytes::from_static(b": alive\n\n")).await {
                        return;
                    }
                }
                () = frames.closed() => return,
                () = self.stop.cancelled() => return,
            }
        }
    }

    /// False once the client is gone.
    async fn send(&self, frames: &mpsc::Sender<Bytes>, frame: Bytes) -> bool {
        tokio::select! {
            sent = frames.send(frame) => sent.is_ok(),
            () = self.stop.cancelled() => false,
        }
    }
}

fn write_events(batch: &contract::Batch) -> Bytes {
    let mut out = String::new();
    for (event, cursor) in batch.events.iter().zip(last_event_id::cursors(batch)) {
        // The database writes JSON without line breaks. Names are ours, unless a superuser wrote one by hand.
        let data = serde_json::to_string(event).unwrap_or_default();
        let name = event.event.as_deref().filter(|name| name.bytes().all(|byte| byte.is_ascii_graphic()));
        let name = name.unwrap_or("message");
        out.push_str(&format!("id: {}\nevent: {name}\ndata: {data}\n\n", last_event_id::encode(&cursor)));
    }
    out.into()
}

fn unavailable(error: &Error) -> Problem {
    // The reason is for the operators.
    tracing::debug!(%error, "could not begin an event stream");
    Problem::unavailable("The database cannot be reached now.")
}

fn refused_cursor(error: &Error) -> Problem {
    if error.sqlstate() == Some(&SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE) {
        return Problem::new(
            StatusCode::GONE,
            "Last-Event-ID belongs to another history than this database has, as after an older state was restored: \
             start again without it, or with since=0.",
        );
    }
    if matches!(error.sqlstate(), Some(state) if state.code().starts_with("22")) {
        return Problem::new(StatusCode::BAD_REQUEST, NOT_AN_ID);
    }
    unavailable(error)
}
