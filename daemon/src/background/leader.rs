//! Which of several daemons does the work of which only one is needed.
//!
//! Leadership of a task is a session lock of the server's, which `tollgate.acquire_leadership()` takes and no other function
//! can, on a connection that serves nothing else. Two clocks bound it:
//!
//! - The server ends the session of a leader it has not heard from for [`SERVER_PATIENCE`]: one that is frozen or cut off
//!   by a network that fails silently. One that was killed closes its socket and loses the lock at once.
//! - The leader itself begins no run later than [`LEASE`] after it sent the last question that was answered. That is
//!   shorter, so a daemon that was frozen finds itself no leader before it does anything, and two never begin a run at
//!   the same time.
//!
//! A run that has begun may still send a statement after a freeze in its midst. The statement names the [`Fence`] that was
//! given out with the lock, and the server refuses it if another came to lead meanwhile.
//!
//! The same connection is the first to notice a dead network, since it asks once a second: then all others are cut, and
//! told when there is a way again.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::background::signal::Signal;
use crate::contract::{self, Fence};
use crate::error::{Doing as _, Error, Kind, Result};
use crate::postgres::pool::{Database, Session};
use crate::process::failure_log::FailureLog;

/// How often the locks are asked for, those that are held included.
const PERIOD: Duration = Duration::from_secs(1);
/// An answer that takes longer means that the network or the server is dead.
const ANSWER: Duration = Duration::from_secs(3);
/// How long leadership counts after the question whose answer confirmed it.
const LEASE: Duration = Duration::from_secs(3);
/// After this silence the server gives the locks to another. Longer than [`LEASE`].
const SERVER_PATIENCE: Duration = Duration::from_millis(4500);
/// Between attempts to connect: short, since everything else waits for this one.
const RETRY: Duration = Duration::from_millis(500);

/// A task's leadership as [`Leadership::snapshot`] shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Led {
    pub now: bool,
    /// How often it was won.
    pub terms: u64,
    /// When it was last confirmed.
    pub last_at: Option<Timestamp>,
}

/// What this daemon leads, shared by the tasks, the status and the metrics.
#[derive(Clone, Debug, Default)]
pub struct Leadership(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    seats: Mutex<BTreeMap<String, TaskState>>,
    changed: Notify,
}

#[derive(Clone, Copy, Debug, Default)]
struct TaskState {
    /// Until when the lock is surely ours.
    until: Option<Instant>,
    /// How often it was won.
    terms: u64,
    /// The last that was given out to us. Kept beyond the lease, for the last run before the process ends: whether it
    /// still counts is the server's to say.
    fence: Option<i64>,
    last_at: Option<Timestamp>,
}

impl Leadership {
    /// Stands for a seat. To be called before [`run`] begins.
    pub fn stand(&self, seat: &str) {
        self.seats().entry(seat.to_owned()).or_default();
    }

    pub fn leads(&self, seat: &str) -> bool {
        self.seats().get(seat).is_some_and(TaskState::holds)
    }

    /// Waits until this daemon leads.
    pub async fn led(&self, seat: &str) {
        loop {
            let changed = self.0.changed.notified();
            tokio::pin!(changed);
            // Before looking, so that no change falls between.
            changed.as_mut().enable();
            if self.leads(seat) {
                return;
            }
            changed.await;
        }
    }

    /// What a statement of the task is to name; `None` if this daemon never led it.
    pub fn fence(&self, task: &'static str) -> Option<Fence> {
        self.seats().get(task).and_then(|seat| seat.fence).map(|number| Fence { task, number })
    }

    /// [`Leadership::fence`], for a run that begins because this daemon leads.
    pub fn own_fence(&self, task: &'static str) -> Result<Fence> {
        self.fence(task).ok_or_else(|| Error::failed(format!("this daemon does not lead the task {task}")))
    }

    /// Every seat.
    pub fn snapshot(&self) -> BTreeMap<String, Led> {
        let led = |seat: &TaskState| Led { now: seat.holds(), terms: seat.terms, last_at: seat.last_at };
        self.seats().iter().map(|(name, seat)| (name.clone(), led(seat))).collect()
    }

    /// Says whether anything changed.
    fn confirm(&self, held: &BTreeMap<String, Option<i64>>, asked: Instant) -> bool {
        let mut news = false;
        for (name, seat) in self.seats().iter_mut() {
            let fence = held.get(name).copied().flatten();
            let holds = fence.is_some();
            if holds {
                seat.fence = fence;
                seat.last_at = Some(Timestamp::now());
            }
            if holds && seat.until.is_none() {
                seat.terms += 1;
                news = true;
                tracing::info!(task = name, "leads");
            } else if !holds && seat.until.is_some() {
                news = true;
            }
            // A freeze between asking and here must not lengthen the lease.
            seat.until = holds.then(|| asked + LEASE);
        }
        if news {
            self.0.changed.notify_waiters();
        }
        news
    }

    /// Says whether there was anything to lose.
    fn lose(&self) -> bool {
        let mut lost = Vec::new();
        for (name, seat) in self.seats().iter_mut() {
            if seat.until.take().is_some() {
                lost.push(name.clone());
            }
        }
        if !lost.is_empty() {
            tracing::warn!(tasks = lost.join(", "), "leads no more");
            self.0.changed.notify_waiters();
        }
        !lost.is_empty()
    }

    fn seats(&self) -> MutexGuard<'_, BTreeMap<String, TaskState>> {
        // Each change is a plain assignment.
        self.0.seats.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl TaskState {
    fn holds(&self) -> bool {
        self.until.is_some_and(|until| Instant::now() < until)
    }
}

/// Holds and seeks leadership until `stop`, through every loss of the connection.
///
/// `news` is woken at each gain and loss.
pub async fn run(
    database: Database,
    leadership: Leadership,
    news: Signal,
    stop: CancellationToken,
) -> Result<()> {
    let mut failed = false;
    let mut complaint = FailureLog::default();
    loop {
        let error = tokio::select! {
            biased;
            () = stop.cancelled() => return Ok(()),
            result = reign(&database, &leadership, &news, &mut failed, &mut complaint) => match result {
                Ok(never) => match never {},
                Err(error) => error,
            },
        };
        if leadership.lose() {
            news.wake();
        }
        // Once, at the moment of the loss: a connection that is made while this one cannot be is a good one.
        if error.kind() == Kind::ConnectionLost && !failed {
            tracing::warn!(%error, "lost the server: connecting anew");
            database.cut();
            failed = true;
        } else if !matches!(error.kind(), Kind::Unreachable | Kind::ConnectionLost)
            && let Some(tally) = complaint.failed(&error.to_string())
        {
            tracing::warn!(failures = tally.failures, %error, "cannot stand for leadership, will try again");
        }
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            () = tokio::time::sleep(RETRY) => {}
        }
    }
}

/// One connection's life.
async fn reign(
    database: &Database,
    leadership: &Leadership,
    news: &Signal,
    failed: &mut bool,
    complaint: &mut FailureLog,
) -> Result<std::convert::Infallible> {
    // `run` looks after the shutdown.
    let session = database.connect(&CancellationToken::new()).await?;
    session
        // From PostgreSQL 14 on; before, a frozen leader keeps its locks, and a killed one loses them all the same.
        .batch_execute(&format!(
            "select set_config(name, '{}', false) from pg_settings where name = 'idle_session_timeout'",
            SERVER_PATIENCE.as_millis()
        ))
        .await
        .doing("set up the leader's session")?;
    if std::mem::take(failed) {
        // Those that tried at the same time as we did, and hang, are not waited for.
        database.restore();
    }
    loop {
        let asked = Instant::now();
        let held = tokio::time::timeout(ANSWER, ask(&session, leadership)).await.map_err(|_| {
            Error::new(
                Kind::ConnectionLost,
                format!("no answer from the server within {}", crate::process::duration::text(ANSWER)),
            )
        })??;
        complaint.recovered();
        if leadership.confirm(&held, asked) {
            news.wake();
        }
        tokio::time::sleep_until(asked + PERIOD).await;
    }
}

/// The fences of the seats, of those that are ours, after asking for those that are not.
async fn ask(session: &Session, leadership: &Leadership) -> Result<BTreeMap<String, Option<i64>>> {
    let names: Vec<String> = leadership.seats().keys().cloned().collect();
    contract::acquire_leadership(&**session, &names).await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(names: &[&str]) -> BTreeMap<String, Option<i64>> {
        names.iter().map(|name| ((*name).to_owned(), Some(7))).collect()
    }

    #[test]
    fn the_lease_ends_before_the_server_gives_the_lock_away() {
        assert!(LEASE < SERVER_PATIENCE && PERIOD < LEASE && SERVER_PATIENCE < Duration::from_secs(5));
    }

    #[tokio::test(start_paused = true)]
    async fn leadership_ends_with_its_lease_even_if_nobody_says_so() {
        let leadership = Leadership::default();
        leadership.stand("purge");
        leadership.stand("seal");
        leadership.confirm(&held(&["purge"]), Instant::now());
        assert!(leadership.leads("purge") && !leadership.leads("seal"));
        tokio::time::sleep(LEASE).await;
        assert!(!leadership.leads("purge"));
        let led = leadership.snapshot()["purge"];
        assert_eq!((led.now, led.terms), (false, 1));
        assert_eq!(leadership.fence("purge"), Some(Fence { task: "purge", number: 7 }));
        assert_eq!(leadership.fence("seal"), None);
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_was_asked_for_before_a_freeze_confirms_nothing() {
        let leadership = Leadership::default();
        leadership.stand("purge");
        let asked = Instant::now();
        tokio::time::sleep(Duration::from_secs(60)).await;
        leadership.confirm(&held(&["purge"]), asked);
        assert!(!leadership.leads("purge"));
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_for_leadership_hears_of_it_and_of_its_loss() {
        let leadership = Leadership::default();
        leadership.stand("purge");
        let waiting = tokio::spawn({
            let leadership = leadership.clone();
            async move { leadership.led("purge").await }
        });
        tokio::task::yield_now().await;
        leadership.confirm(&held(&["purge"]), Instant::now());
        waiting.await.unwrap();
        leadership.lose();
        assert!(!leadership.leads("purge"));
        leadership.confirm(&held(&["purge"]), Instant::now());
        let led = leadership.snapshot()["purge"];
        assert_eq!((led.now, led.terms), (true, 2));
    }
}
