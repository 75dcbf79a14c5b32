//! How soon others hear of a revocation: from its commit to whoever listens, at hundreds of revocations a second.

use std::collections::HashMap;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use hdrhistogram::Histogram;
use serde_json::Value;
use tokio_postgres::AsyncMessage;
use tollgate_tests::{Cluster, DATABASE};

use super::{Outcome, Part, Run, part};
use crate::clients::socket;
use crate::measure::{Series, histogram, percentile};
use crate::report::{Figure, Unit};
use crate::service;
use crate::tokens::{Tokens, id};
use crate::wire::Connection;

pub(super) const PART: Part = part("latency", "from a revocation's commit to those who listen", run);

/// Revocations a second, of all sessions together.
const RATE: u32 = 500;
/// One alone waits for the disk at each.
const SESSIONS: u32 = 4;
/// Whoever has not heard by then never will.
const DEADLINE: Duration = Duration::from_secs(30);

/// When each revocation's commit was acknowledged, or when a subscriber received it.
type Moments = HashMap<String, Instant>;

fn run(run: &Run<'_>) -> Result<Outcome> {
    let seconds = run.scale.turn.as_secs_f64() * 2.0;
    let in_a_round = ((f64::from(RATE) * seconds) as u32).max(SESSIONS);
    let tokens = Tokens::new((run.scale.rounds + 1) * in_a_round)?;
    let cluster = service::with_tokens(
        // NOTIFY has commits queue for one another: waiting for a disk of 2 ms each, there could be no 500 in a second.
        service::builder(run.install, 1).setting("synchronous_commit", "off"),
        &tokens,
    )?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let mut sql = SqlListener::new(&cluster, &runtime)?;
    let mut revokers = (0..SESSIONS)
        .map(|_| {
            Connection::prepare(
                &socket(&cluster),
                "postgres",
                DATABASE,
                &["select tollgate.revoke_api_token($1)"],
            )
        })
        .collect::<Result<Vec<_>>>()?;
    let (mut median, mut tail, mut made) = (Series::default(), Series::default(), Series::default());
    for round in 0..=run.scale.rounds {
        let numbers: Vec<u32> = (round * in_a_round..(round + 1) * in_a_round).collect();
        let (committed, rate) = revoke(&mut revokers, &numbers)?;
        let times = delays(&committed, &sql.receive(committed.len())?)?;
        // The first warms up.
        if round > 0 {
            median.0.push(percentile(&times, 0.5) / 1000.0);
            made.0.push(rate);
            tail.0.push(percentile(&times, 0.99) / 1000.0);
        }
    }
    Ok(Outcome {
        conditions: vec![
            format!("{RATE} revocations a second by {SESSIONS} sessions, {in_a_round} a round"),
            "from when the session that revokes has the commit's acknowledgement; what was heard before counts as 0".to_owned(),
            service::conditions(&cluster)?,
        ],
        figures: vec![
            Figure::new("revocation to SQL listener, p99", Unit::Milliseconds, &tail).at_most(10.0),
            Figure::new("revocation to SQL listener, p50", Unit::Milliseconds, &median),
            // Else the latency is that of a lesser load.
            Figure::new("revocations made", Unit::PerSecond, &made).at_least(f64::from(RATE) * 0.95),
        ],
    })
}

/// Revokes these tokens at [`RATE`], and returns when each was acknowledged, and how many a second
/// there were indeed.
fn revoke(revokers: &mut [Connection], numbers: &[u32]) -> Result<(Moments, f64)> {
    let begin = Instant::now();
    let sessions = revokers.len();
    thread::scope(|scope| {
        let workers: Vec<_> = revokers
            .iter_mut()
            .enumerate()
            .map(|(session, connection)| {
                scope.spawn(move || -> Result<Vec<(String, Instant)>> {
                    let mut acknowledged = Vec::new();
                    for position in (session..numbers.len()).step_by(sessions) {
                        let due = begin + Duration::from_secs_f64(position as f64 / f64::from(RATE));
                        thread::sleep(due.saturating_duration_since(Instant::now()));
                        let id = id(numbers[position]).to_string();
                        connection.execute("0", &[&id], b"t")?;
                        acknowledged.push((id, Instant::now()));
                    }
                    Ok(acknowledged)
                })
            })
            .collect();
        let mut moments = Moments::new();
        for worker in workers {
            moments.extend(worker.join().expect("a session that fails says so")?);
        }
        Ok((moments, numbers.len() as f64 / begin.elapsed().as_secs_f64()))
    })
}

/// How long after its commit each was received, in nanoseconds.
fn delays(committed: &Moments, received: &Moments) -> Result<Histogram<u64>> {
    let mut times = histogram();
    for (token, committed) in committed {
        let received =
            received.get(token).with_context(|| format!("the revocation of {token} was not heard of"))?;
        times.record(u64::try_from(received.saturating_duration_since(*committed).as_nanos())?)?;
    }
    Ok(times)
}

/// A session that has issued LISTEN, and a task that notes when each notification arrives.
struct SqlListener<'a> {
    runtime: &'a tokio::runtime::Runtime,
    heard: tokio::sync::mpsc::UnboundedReceiver<(String, Instant)>,
    // Listens for as long as it lives.
    _client: tokio_postgres::Client,
}

impl<'a> SqlListener<'a> {
    fn new(cluster: &Cluster, runtime: &'a tokio::runtime::Runtime) -> Result<Self> {
        let (client, mut messages) = runtime.block_on(cluster.listen("postgres", DATABASE))?;
        runtime.block_on(client.batch_execute("listen tollgate_events"))?;
        let (sender, heard) = tokio::sync::mpsc::unbounded_channel();
        runtime.spawn(async move {
            while let Some(message) = messages.recv().await {
                let now = Instant::now();
                let AsyncMessage::Notification(notification) = message else { continue };
                if let Some(token) = token_of(notification.payload()) {
                    // Nobody waits any more, at the end.
                    let _ = sender.send((token, now));
                }
            }
        });
        Ok(Self { runtime, heard, _client: client })
    }

    /// Waits for so many.
    fn receive(&mut self, count: usize) -> Result<Moments> {
        let heard = &mut self.heard;
        self.runtime.block_on(async {
            let mut moments = Moments::new();
            while moments.len() < count {
                let next = tokio::time::timeout(DEADLINE, heard.recv()).await;
                let (token, moment) =
                    next.context("waited in vain for a notification")?.context("the listener ended")?;
                moments.insert(token, moment);
            }
            Ok(moments)
        })
    }
}

fn token_of(payload: &str) -> Option<String> {
    serde_json::from_str::<Value>(payload).ok()?.get("token_id")?.as_str().map(str::to_owned)
}
