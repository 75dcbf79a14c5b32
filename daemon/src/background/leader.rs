//! Leadership: of several daemons, one runs the tasks that need to run only once.
//!
//! Leadership of a task is a session lock in the server, which `tollgate.acquire_leadership()` takes and no other function
//! can, on a connection that serves nothing else. Two clocks bound it:
//!
//! - The server ends the session of a leader it has not heard from for [`SERVER_PATIENCE`]: one that is frozen or cut off
//!   by a network that fails silently. One that was killed closes its socket and loses the lock at once.
//! - The leader itself begins no run later than [`LEASE`] after it sent the last question that was answered. That is
//!   shorter, so a daemon that was frozen finds itself no leader before it does anything, and two never begin a run at
//!   the same time.
//!
//! A run may still send a statement after the process was frozen during it. The statement carries the [`Fence`] that came with
//! the lock, and the server refuses it if another daemon has led since.
//!
//! The same connection is the first to notice a dead network, since it asks once a second: then all other connections are cut,
//! and tasks that back off are woken once the server can be reached again.

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
use crate::postgres::pool::Database;
use crate::postgres::session::Session;
use crate::process::failure_log::FailureLog;

/// How often the locks are asked for, those that are held included.
const PERIOD: Duration = Duration::from_secs(1);
/// An answer that takes longer means that the network or the server is dead.
const ANSWER: Duration = Duration::from_secs(3);
/// How long leadership counts after the question whose answer confirmed it.
const LEASE: Duration = Duration::from_secs(3);
/// After this silence the server gives the locks to another. Longer than [`LEASE`].
const SERVER_PATIENCE: Duration = Duration::from_millis(4500);
/// Between attempts to connect: short, since all led tasks wait for it.
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
    tasks: Mutex<BTreeMap<String, TaskState>>,
    changed: Notify,
}

#[derive(Clone, Copy, Debug, Default)]
struct TaskState {
    /// Until when the lock is surely ours.
    until: Option<Instant>,
    /// How often it was won.
    terms: u64,
    /// The last that we were given. Kept beyond the lease, for the last run before the process ends: the server decides
    /// whether it is still valid.
    fence: Option<i64>,
    last_at: Option<Timestamp>,
}

impl Leadership {
    /// Competes for the leadership of a task. To be called before [`run`] begins.
    pub fn compete_for(&self, task: &str) {
        self.tasks().entry(task.to_owned()).or_default();
    }

    pub fn leads(&self, task: &str) -> bool {
        self.tasks().get(task).is_some_and(TaskState::holds)
    }

    /// Waits until this daemon leads.
    pub async fn until_leading(&self, task: &str) {
        loop {
            let changed = self.0.changed.notified();
            tokio::pin!(changed);
            // Before looking, so that no change falls between.
            changed.as_mut().enable();
            if self.leads(task) {
                return;
            }
            changed.await;
        }
    }

    /// What a statement of the task carries; `None` if this daemon never led it.
    pub fn fence(&self, task: &'static str) -> Option<Fence> {
        self.tasks().get(task).and_then(|state| state.fence).map(|number| Fence { task, number })
    }

    /// [`Leadership::fence`], for a run that begins because this daemon leads.
    pub fn own_fence(&self, task: &'static str) -> Result<Fence> {
        self.fence(task).ok_or_else(|| Error::failed(format!("this daemon does not lead the task {task}")))
    }

    /// Every task.
    pub fn snapshot(&self) -> BTreeMap<String, Led> {
        let led = |state: &TaskState| Led { now: state.holds(), terms: state.terms, last_at: state.last_at };
        self.tasks().iter().map(|(name, state)| (name.clone(), led(state))).collect()
    }

    /// Returns whether anything changed.
    fn confirm(&self, held: &BTreeMap<String, Option<i64>>, asked: Instant) -> bool {
        let mut changed = false;
        for (name, state) in self.tasks().iter_mut() {
            let fence = held.get(name).copied().flatten();
            let holds = fence.is_some();
            if holds {
                state.fence = fence;
                state.last_at = Some(Timestamp::now());
            }
            if holds && state.until.is_none() {
                state.terms += 1;
                changed = true;
                tracing::info!(task = name, "leads");
            } else if !holds && state.until.is_some() {
                changed = true;
            }
            // A freeze between asking and here must not lengthen the lease.
            state.until = holds.then(|| asked + LEASE);
        }
        if changed {
            self.0.changed.notify_waiters();
        }
        changed
    }

    /// Returns whether there was anything to lose.
    fn lose(&self) -> bool {
        let mut lost = Vec::new();
        for (name, state) in self.tasks().iter_mut() {
            if state.until.take().is_some() {
                lost.push(name.clone());
            }
        }
        if !lost.is_empty() {
            tracing::warn!(tasks = lost.join(", "), "leads no more");
            self.0.changed.notify_waiters();
        }
        !lost.is_empty()
    }

    fn tasks(&self) -> MutexGuard<'_, BTreeMap<String, TaskState>> {
        // Each change is a plain assignment.
        self.0.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl TaskState {
    fn holds(&self) -> bool {
        self.until.is_some_and(|until| Instant::now() < until)
    }
}

/// Keeps and seeks leadership until `stop`, through every loss of the connection.
///
/// `changed` is woken at each gain and loss.
pub async fn run(
    database: Database,
    leadership: Leadership,
    changed: Signal,
    stop: CancellationToken,
) -> Result<()> {
    let mut failed = false;
    let mut failure_log = FailureLog::default();
    loop {
        let error = tokio::select! {
            biased;
            () = stop.cancelled() => return Ok(()),
            result = keep_leadership(&database, &leadership, &changed, &mut failed, &mut failure_log) => match result {
                Ok(never) => match never {},
                Err(error) => error,
            },
        };
        if leadership.lose() {
            changed.wake();
        }
        // Once, at the moment of the loss: a connection that is made while this one cannot be is a good one.
        if error.kind() == Kind::ConnectionLost && !failed {
            tracing::warn!(%error, "lost the server: connecting anew");
            database.cut();
            failed = true;
        } else if !matches!(error.kind(), Kind::Unreachable | Kind::ConnectionLost)
            && let Some(tally) = failure_log.failed(&error.to_string())
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
async fn keep_leadership(
    database: &Database,
    leadership: &Leadership,
    changed: &Signal,
    failed: &mut bool,
    failure_log: &mut FailureLog,
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
        // Attempts that began at the same time, and hang, are not waited for.
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
        failure_log.recovered();
        if leadership.confirm(&held, asked) {
            changed.wake();
        }
        tokio::time::sleep_until(asked + PERIOD).await;
    }
}

/// Asks for leadership of every task, and returns the fences of those that we lead.
async fn ask(session: &Session, leadership: &Leadership) -> Result<BTreeMap<String, Option<i64>>> {
    let names: Vec<String> = leadership.tasks().keys().cloned().collect();
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
    async fn leadership_ends_with_its_lease_even_without_an_answer() {
        let leadership = Leadership::default();
        leadership.compete_for("purge");
        leadership.compete_for("seal");
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
        leadership.compete_for("purge");
        let asked = Instant::now();
        tokio::time::sleep(Duration::from_secs(60)).await;
        leadership.confirm(&held(&["purge"]), asked);
        assert!(!leadership.leads("purge"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_waiting_task_starts_when_leadership_is_gained_and_stops_when_it_is_lost() {
        let leadership = Leadership::default();
        leadership.compete_for("purge");
        let waiting = tokio::spawn({
            let leadership = leadership.clone();
            async move { leadership.until_leading("purge").await }
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
