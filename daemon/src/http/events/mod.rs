//! `/events`: the event log as server-sent events, for whoever presents a token with the scope `tollgate:events`.
//!
//! Each reader has a cursor of its own, and hands it back as `Last-Event-ID` when it comes again, so that the daemon need not
//! remember anybody. A batch is read only once the one before it is on its way: a slow reader costs one batch of
//! memory, and nobody else any time.

mod last_event_id;

use std::collections::HashMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::BodyExt as _;
use hyper::body::{Body as HttpBody, Frame, Incoming};
use hyper::header::{
    AUTHORIZATION, CACHE_CONTROL, CONTENT_TYPE, HeaderName, HeaderValue, RETRY_AFTER, WWW_AUTHENTICATE,
};
use hyper::{Request, Response, StatusCode};
use sha2::{Digest as _, Sha256};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::Instant;
use tokio_postgres::error::SqlState;
use tokio_util::sync::CancellationToken;

use super::connections::Held;
use super::{Body, Client, text};
use crate::background::signal::Signal;
use crate::contract;
use crate::contract::Cursor;
use crate::error::{Error, Result};
use crate::postgres::pool::Database;
use crate::process::counters;

pub(super) const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");

/// Of all tokens, and of each.
pub(super) const MAX_STREAMS: usize = 64;
const MAX_STREAMS_PER_TOKEN: usize = 8;
/// Requests whose token is being verified, in the order in which they came. More of them wait before that, in connections that
/// make room for others.
pub(super) const MAX_ASKING: usize = 128;
/// From the request to the first look at the log.
const OPENING_TIMEOUT: Duration = Duration::from_secs(10);
/// Small, since this many events of each reader may be in memory.
const BATCH: i32 = 64;
/// A comment goes out when nothing else does, so that proxies keep the connection and a dead client is noticed; and the
/// token is looked at again.
const HEARTBEAT: Duration = Duration::from_secs(15);
/// How long a client waits before it comes again, in milliseconds.
const RETRY: &str = "retry: 1000\n: tollgate\n\n";

const NOT_AN_ID: &str = "Last-Event-ID is not the id of an event of this stream.\n";

/// An answer that is no stream.
type Refusal = Box<Response<Body>>;

#[derive(Debug)]
pub struct EventStreams {
    database: Database,
    places: Arc<Places>,
    asking: Semaphore,
    /// All readers together use one session at a time, so that a crowd of them never holds up the tasks; and so do those whose
    /// token is verified for the first time, so that they never hold up the readers.
    turn: Arc<Semaphore>,
    first_turn: Semaphore,
    news: watch::Sender<()>,
}

impl EventStreams {
    pub fn new(database: Database) -> Self {
        Self {
            database,
            places: Arc::default(),
            asking: Semaphore::new(MAX_ASKING),
            turn: Arc::new(Semaphore::new(1)),
            first_turn: Semaphore::new(1),
            news: watch::Sender::new(()),
        }
    }

    pub(super) async fn open(
        &self,
        request: &Request<Incoming>,
        client: &Client,
        stop: &CancellationToken,
    ) -> Response<Body> {
        let opened = tokio::time::timeout(OPENING_TIMEOUT, self.try_open(request, client, stop)).await;
        opened.unwrap_or_else(|_| Err(busy("The database takes too long.\n"))).unwrap_or_else(|refusal| {
            counters::STREAMS_REFUSED.add(1);
            *refusal
        })
    }

    /// What costs something comes after what may refuse the request: the token is verified before there is a place for its
    /// reader, and a place is had before the log is read.
    async fn try_open(
        &self,
        request: &Request<Incoming>,
        client: &Client,
        stop: &CancellationToken,
    ) -> std::result::Result<Response<Body>, Refusal> {
        let reader = Reader {
            database: self.database.clone(),
            turn: self.turn.clone(),
            digest: presented(request).ok_or_else(|| {
                unauthorized("Present a token with the scope tollgate:events: Authorization: Bearer …\n")
            })?,
            peer: client.peer,
            stop: stop.clone(),
        };
        let asking = self.asking.acquire().await;
        let held = client.connection.hold();
        let (code, token_id) = reader.verify(&self.first_turn).await.map_err(|error| unavailable(&error))?;
        drop(asking);
        match code.as_str() {
            "VALID" => {}
            "INSUFFICIENT_SCOPE" => {
                return Err(refusal(StatusCode::FORBIDDEN, "The token lacks the scope tollgate:events.\n"));
            }
            "RATE_LIMITED" => {
                let mut refusal = refusal(StatusCode::TOO_MANY_REQUESTS, "Too many requests.\n");
                refusal.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("60"));
                return Err(refusal);
            }
            other => return Err(unauthorized(&format!("The token was refused: {other}.\n"))),
        }
        let start = Start::of(request)?;
        let place = self.places.take(token_id.as_deref(), held)?;
        // Before the first look, so that nothing falls in between.
        let news = self.news.subscribe();
        let cursor = match start {
            Start::At(cursor) => cursor,
            Start::After(since) => reader.position(since).await.map_err(|error| unavailable(&error))?,
        };
        // A first look now, while an error can still be said with a status.
        let first = reader.read(&cursor).await.map_err(|error| refuse_cursor(&error))?;
        drop(first);

        let (sender, frames) = mpsc::channel(1);
        tokio::spawn(reader.tell(cursor, token_id, news, sender, place));
        let mut response = Response::new(Frames(frames).boxed());
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        // Nginx would else keep events until it has a buffer full of them.
        headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
        Ok(response)
    }
}

/// The places that are taken, by token.
#[derive(Debug, Default)]
struct Places(Mutex<HashMap<String, usize>>);

impl Places {
    fn take(self: &Arc<Self>, token_id: Option<&str>, held: Held) -> std::result::Result<Place, Refusal> {
        let token_id = token_id.unwrap_or_default().to_owned();
        let mut taken = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let own = taken.get(&token_id).copied().unwrap_or_default();
        if own >= MAX_STREAMS_PER_TOKEN {
            let mut refusal = refusal(
                StatusCode::TOO_MANY_REQUESTS,
                format!(
                    "This token has {MAX_STREAMS_PER_TOKEN} streams already: end one, or use another token.\n"
                ),
            );
            refusal.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("5"));
            return Err(refusal);
        }
        if taken.values().sum::<usize>() >= MAX_STREAMS {
            return Err(busy("Too many readers.\n"));
        }
        taken.insert(token_id.clone(), own + 1);
        Ok(Place { all: self.clone(), token_id, _held: held })
    }
}

/// One of them, until it is dropped.
#[derive(Debug)]
struct Place {
    all: Arc<Places>,
    token_id: String,
    /// The connection stays open for as long.
    _held: Held,
}

impl Drop for Place {
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

/// Wakes all readers: at once for what is notified, and when a periodic look finds anything else.
pub async fn wake_streams(
    site: Arc<super::Site>,
    notified: Signal,
    period: Duration,
    stop: CancellationToken,
) -> Result<()> {
    let streams = &site.events;
    let mut seen: Option<Cursor> = None;
    loop {
        tokio::select! {
            () = notified.woken() => {
                streams.news.send_replace(());
                continue;
            }
            () = tokio::time::sleep(period) => {}
            () = stop.cancelled() => return Ok(()),
        }
        if streams.news.receiver_count() == 0 {
            seen = None;
            continue;
        }
        match look(&streams.database, seen.take(), &stop).await {
            Ok((cursor, anything)) => {
                seen = Some(cursor);
                if anything {
                    streams.news.send_replace(());
                }
            }
            // Readers then look for themselves, and find out what is wrong.
            Err(_) => {
                streams.news.send_replace(());
            }
        }
    }
}

async fn look(database: &Database, seen: Option<Cursor>, stop: &CancellationToken) -> Result<(Cursor, bool)> {
    let session = database.session(stop).await?;
    let Some(seen) = seen else {
        return Ok((contract::event_position(&**session, None).await?, true));
    };
    if contract::has_events(&**session, &seen).await? {
        return Ok((contract::event_position(&**session, None).await?, true));
    }
    Ok((seen, false))
}

/// Where to begin.
enum Start {
    At(Cursor),
    /// Of `tollgate.event_position`.
    After(Option<i64>),
}

impl Start {
    fn of(request: &Request<Incoming>) -> std::result::Result<Self, Refusal> {
        if let Some(id) = request.headers().get(LAST_EVENT_ID).filter(|id| !id.is_empty()) {
            let cursor = id.to_str().ok().and_then(last_event_id::decode);
            return cursor.map(Self::At).ok_or_else(|| refusal(StatusCode::BAD_REQUEST, NOT_AN_ID));
        }
        let query = request.uri().query().unwrap_or_default();
        let mut given = query.split('&').filter_map(|pair| pair.strip_prefix("since="));
        match (given.next().map(str::parse::<i64>), given.next()) {
            (None, _) => Ok(Self::After(None)),
            (Some(Ok(since)), None) if since >= 0 => Ok(Self::After(Some(since))),
            _ => Err(refusal(StatusCode::BAD_REQUEST, "since is 0, or the number of an event.\n")),
        }
    }
}

/// The digest of the token in the request; the token itself is kept nowhere.
fn presented(request: &Request<Incoming>) -> Option<Vec<u8>> {
    let value = request.headers().get(AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| Sha256::digest(token.trim()).to_vec())
}

struct Reader {
    database: Database,
    turn: Arc<Semaphore>,
    digest: Vec<u8>,
    peer: SocketAddr,
    stop: CancellationToken,
}

impl Reader {
    /// The code, and the token's id.
    async fn verify(&self, turn: &Semaphore) -> Result<(String, Option<String>)> {
        let _turn = turn.acquire().await;
        let session = self.database.session(&self.stop).await?;
        let ip = self.peer.ip().to_canonical();
        let (code, token_id) = contract::admit_event_reader(&**session, &self.digest, ip).await?;
        Ok((code, token_id.map(|id| id.to_string())))
    }

    async fn position(&self, since: Option<i64>) -> Result<Cursor> {
        let _turn = self.turn.acquire().await;
        let session = self.database.session(&self.stop).await?;
        contract::event_position(&**session, since).await
    }

    async fn read(&self, cursor: &Cursor) -> Result<contract::Batch> {
        let _turn = self.turn.acquire().await;
        let session = self.database.session(&self.stop).await?;
        contract::read_events(&**session, cursor, BATCH).await
    }

    /// Tells of events until the client, its token or the daemon is gone. Whoever is cut off comes again with the last id.
    async fn tell(
        self,
        mut cursor: Cursor,
        token_id: Option<String>,
        mut news: watch::Receiver<()>,
        frames: mpsc::Sender<Bytes>,
        place: Place,
    ) {
        let _held = counters::STREAMS.hold();
        let _place = place;
        if !self.send(&frames, RETRY.into()).await {
            return;
        }
        let mut verified = Instant::now();
        loop {
            // What comes from here on is news for the next round.
            news.mark_unchanged();
            let batch = match self.read(&cursor).await {
                Ok(batch) => batch,
                Err(error) => {
                    tracing::debug!(peer = %self.peer, %error, "ends an event stream");
                    return;
                }
            };
            let concerned = batch.events.iter().any(|event| event.token_id == token_id);
            if concerned || verified.elapsed() >= HEARTBEAT {
                match self.verify(&self.turn).await {
                    // A limit is looked at after all else: nothing is wrong with the token, and the stream has begun already.
                    Ok((code, _)) if ["VALID", "RATE_LIMITED"].contains(&code.as_str()) => {
                        verified = Instant::now();
                    }
                    _ => return,
                }
            }
            if !batch.events.is_empty() {
                let told = u64::try_from(batch.events.len()).unwrap_or_default();
                if !self.send(&frames, write_events(&batch)).await {
                    return;
                }
                counters::STREAMED_EVENTS.add(told);
            }
            let caught_up = batch.caught_up;
            cursor = batch.next;
            if !caught_up {
                continue;
            }
            tokio::select! {
                changed = news.changed() => if changed.is_err() { return },
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

    /// False once nobody takes it.
    async fn send(&self, frames: &mpsc::Sender<Bytes>, frame: Bytes) -> bool {
        tokio::select! {
            sent = frames.send(frame) => sent.is_ok(),
            () = self.stop.cancelled() => false,
        }
    }
}

fn write_events(batch: &contract::Batch) -> Bytes {
    let mut out = String::new();
    for (event, place) in batch.events.iter().zip(last_event_id::places(batch)) {
        // The server writes JSON without line breaks. A name is of ours, unless a superuser wrote it by hand.
        let data = serde_json::to_string(event).unwrap_or_default();
        let name = event.event.as_deref().filter(|name| name.bytes().all(|byte| byte.is_ascii_graphic()));
        let name = name.unwrap_or("message");
        out.push_str(&format!("id: {}\nevent: {name}\ndata: {data}\n\n", last_event_id::encode(&place)));
    }
    out.into()
}

/// The frames of a stream, as they come.
struct Frames(mpsc::Receiver<Bytes>);

impl HttpBody for Frames {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<std::result::Result<Frame<Bytes>, Infallible>>> {
        self.0.poll_recv(cx).map(|bytes| bytes.map(|bytes| Ok(Frame::data(bytes))))
    }
}

fn refusal(status: StatusCode, why: impl Into<Bytes>) -> Refusal {
    Box::new(text(status, why))
}

fn unauthorized(why: &str) -> Refusal {
    let mut refusal = refusal(StatusCode::UNAUTHORIZED, why.to_owned());
    refusal.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    refusal
}

fn busy(why: &'static str) -> Refusal {
    let mut refusal = refusal(StatusCode::SERVICE_UNAVAILABLE, why);
    refusal.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("5"));
    refusal
}

fn unavailable(error: &Error) -> Refusal {
    // The reason is for those who run the daemon.
    tracing::debug!(%error, "could not begin an event stream");
    busy("The database cannot be asked now.\n")
}

fn refuse_cursor(error: &Error) -> Refusal {
    if error.sqlstate() == Some(&SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE) {
        return refusal(
            StatusCode::GONE,
            "Last-Event-ID is of another history than this database has, as after restoring an older state: \
             begin anew without it, or with since=0.\n",
        );
    }
    if matches!(error.sqlstate(), Some(state) if state.code().starts_with("22")) {
        return refusal(StatusCode::BAD_REQUEST, NOT_AN_ID);
    }
    unavailable(error)
}
