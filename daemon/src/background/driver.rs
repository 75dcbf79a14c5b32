//! Runs the background tasks.
//!
//! A task is woken by a signal and by a period, takes no input, is idempotent, and does a bounded piece of work per run.
//! So a lost signal costs at most a period, a run that is repeated or cut short does no harm, and no task keeps
//! another or the shutdown waiting. The outcome of each run is in [`TaskStatuses`].

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::background::backoff;
use crate::background::leader::Leadership;
use crate::background::shutdown::Shutdown;
use crate::background::signal::Signal;
use crate::contract;
use crate::error::{Error, Kind, Result};
use crate::postgres::pool::Database;
use crate::process::failure_log::{FailureLog, round};

/// A piece of background work. `run` may be called at any time and any number of times.
pub trait Task: Send + 'static {
    /// The name in logs, in `tollgated status` and in reports.
    fn name(&self) -> &'static str;

    /// Does one bounded piece of work. Once `stop` is cancelled it begins nothing new, but finishes what it has begun.
    fn run(&mut self, stop: &CancellationToken) -> impl Future<Output = Result<Report>> + Send;

    /// Work that remains when the process stops; by default none. The shutdown's grace bounds it.
    fn finish(&mut self) -> impl Future<Output = Result<Option<Report>>> + Send {
        async { Ok(None) }
    }
}

/// What a run did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Tokens, events or rows, as the task's name suggests.
    pub items: u64,
    /// There is more to do: run again at once.
    pub more: bool,
    /// Why the task cannot do its work; logged when it changes.
    pub note: Option<String>,
}

/// When a task runs, and how long a run may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// From the start of one run to the start of the next.
    pub period: Duration,
    /// A run that takes longer is cut short: its connection must be presumed dead.
    pub limit: Duration,
}

/// The status of a task. Times are wall-clock, durations are measured.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Status {
    pub period_seconds: f64,
    pub running: bool,
    /// Whether this daemon leads the task; None for tasks without a leader.
    pub leads: Option<bool>,
    /// When it last led.
    pub led_at: Option<Timestamp>,
    pub runs: u64,
    pub last_started_at: Option<Timestamp>,
    pub last_duration_ms: Option<f64>,
    pub last_outcome: Option<Outcome>,
    pub last_items: u64,
    pub items: u64,
    pub last_success_at: Option<Timestamp>,
    pub consecutive_failures: u64,
    pub failures: u64,
    pub busy_seconds: f64,
    pub last_error: Option<String>,
    pub note: Option<String>,
    pub next_run_at: Option<Timestamp>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    Ok,
    Failed,
    /// Cut short by its limit or by the shutdown.
    Cut,
    /// Not possible with the database's schema, which is of another version.
    Waiting,
}

impl Outcome {
    pub fn as_str(self) -> &'static str {
        match self {
            Outcome::Ok => "ok",
            Outcome::Failed => "failed",
            Outcome::Cut => "cut",
            Outcome::Waiting => "waiting",
        }
    }
}

/// The status of every task, by name.
#[derive(Clone, Debug, Default)]
pub struct TaskStatuses {
    statuses: Arc<Mutex<BTreeMap<&'static str, Status>>>,
    leadership: Leadership,
}

impl TaskStatuses {
    pub fn new(leadership: Leadership) -> Self {
        Self { statuses: Arc::default(), leadership }
    }

    pub fn snapshot(&self) -> BTreeMap<&'static str, Status> {
        let leads = self.leadership.snapshot();
        let mut statuses = self.lock().clone();
        for (name, status) in &mut statuses {
            let led = leads.get(*name);
            status.leads = led.map(|led| led.now);
            status.led_at = led.and_then(|led| led.last_at);
        }
        statuses
    }

    fn update(&self, name: &'static str, change: impl FnOnce(&mut Status)) {
        change(self.lock().entry(name).or_default());
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<&'static str, Status>> {
        // Every change is a few plain assignments, so a panic leaves a valid status.
        self.statuses.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Starts tasks and keeps their statuses.
#[derive(Clone, Debug)]
pub struct Driver {
    shutdown: Shutdown,
    statuses: TaskStatuses,
    run_grace: Duration,
    restored: Option<watch::Receiver<u64>>,
    database: Option<Database>,
}

impl Driver {
    /// `grace` is the time that the shutdown has. A run may use half of it, so that [`Task::finish`] has the other.
    pub fn new(shutdown: Shutdown, statuses: TaskStatuses, grace: Duration) -> Self {
        Self { shutdown, statuses, run_grace: grace / 2, restored: None, database: None }
    }

    /// A task that waits after a failure runs again when this changes: the server can be reached again.
    #[must_use]
    pub fn retry_when(mut self, restored: watch::Receiver<u64>) -> Self {
        self.restored = Some(restored);
        self
    }

    /// A task that fails because the schema of this database is of another version is not failing, but waits for the update.
    #[must_use]
    pub fn with_schema_of(mut self, database: Database) -> Self {
        self.database = Some(database);
        self
    }

    /// [`Driver::start`], for a task that only the leader among several daemons runs.
    pub fn start_led<T: Task>(&self, task: T, schedule: Schedule, signal: Signal) {
        let leadership = self.statuses.leadership.clone();
        leadership.compete_for(task.name());
        self.launch(task, schedule, signal, Some(leadership));
    }

    /// Runs the task at once, then whenever its period is over or `signal` wakes it, until the shutdown.
    pub fn start<T: Task>(&self, task: T, schedule: Schedule, signal: Signal) {
        self.launch(task, schedule, signal, None);
    }

    fn launch<T: Task>(&self, task: T, schedule: Schedule, signal: Signal, leadership: Option<Leadership>) {
        let name = task.name();
        self.statuses.update(name, |status| status.period_seconds = schedule.period.as_secs_f64());
        let run = Run {
            name,
            task,
            schedule,
            signal,
            stop: self.shutdown.token().clone(),
            run_grace: self.run_grace,
            statuses: self.statuses.clone(),
            failure_log: FailureLog::default(),
            note: None,
            leadership,
            restored: self.restored.clone(),
            database: self.database.clone(),
        };
        self.shutdown.spawn(name, run.drive());
    }
}

/// A task between its runs.
struct Run<T> {
    name: &'static str,
    task: T,
    schedule: Schedule,
    signal: Signal,
    stop: CancellationToken,
    run_grace: Duration,
    statuses: TaskStatuses,
    failure_log: FailureLog,
    note: Option<String>,
    leadership: Option<Leadership>,
    restored: Option<watch::Receiver<u64>>,
    database: Option<Database>,
}

/// What follows a run.
#[derive(Debug, PartialEq)]
enum Next {
    AtOnce,
    /// After this time, or when signalled.
    Wait(Duration),
    /// After this time and not before: a signal must not defeat a backoff. It is kept until then.
    BackOff(Duration),
}

impl<T: Task> Run<T> {
    async fn drive(mut self) -> Result<()> {
        let mut retries = None;
        while !self.stop.is_cancelled() {
            if let Some(leadership) = &self.leadership
                && !leadership.leads(self.name)
            {
                tokio::select! {
                    () = self.stop.cancelled() => {}
                    () = leadership.until_leading(self.name) => {}
                }
                continue;
            }
            if let Some(restored) = &mut self.restored {
                restored.mark_unchanged();
            }
            let started = Instant::now();
            let next = match self.run_once().await {
                Ok(report) => {
                    retries = None;
                    if report.more { Next::AtOnce } else { Next::Wait(self.until_next(started)) }
                }
                Err(_) => Next::BackOff(retries.get_or_insert_with(backoff::delays).next_delay()),
            };
            self.rest(next).await;
        }
        self.finish().await;
        Ok(())
    }

    /// Runs are a period apart from start to start. One that took longer than its period is followed by a full
    /// period of rest, or a slow server would get no rest at all.
    fn until_next(&self, started: Instant) -> Duration {
        match self.schedule.period.checked_sub(started.elapsed()) {
            Some(rest) if !rest.is_zero() => rest,
            _ => self.schedule.period,
        }
    }

    async fn rest(&mut self, next: Next) {
        let wait = match next {
            Next::AtOnce => Duration::ZERO,
            Next::Wait(wait) | Next::BackOff(wait) => wait,
        };
        let due = jiff::SignedDuration::try_from(wait)
            .ok()
            .and_then(|wait| Timestamp::now().checked_add(wait).ok());
        self.statuses.update(self.name, |status| status.next_run_at = due);
        match next {
            // Other tasks run in between.
            Next::AtOnce => tokio::task::yield_now().await,
            Next::Wait(wait) => {
                tokio::select! {
                    () = self.stop.cancelled() => {}
                    () = tokio::time::sleep(wait) => {}
                    () = self.signal.woken() => {}
                }
            }
            Next::BackOff(wait) => {
                tokio::select! {
                    () = self.stop.cancelled() => {}
                    () = tokio::time::sleep(wait) => {}
                    () = changed(&mut self.restored) => {}
                }
            }
        }
    }

    async fn run_once(&mut self) -> Result<Report> {
        let started = Instant::now();
        self.statuses.update(self.name, |status| {
            status.running = true;
            status.runs += 1;
            status.last_started_at = Some(Timestamp::now());
            status.next_run_at = None;
        });
        let limit = self.schedule.limit;
        let outcome = tokio::select! {
            result = self.task.run(&self.stop) => Some(result),
            () = tokio::time::sleep(limit) => None,
            () = grace_is_over(&self.stop, self.run_grace) => None,
        };
        let mut result = outcome.unwrap_or_else(|| {
            Err(Error::failed(format!(
                "cut short after {}: no answer from the server",
                crate::process::duration::text(round(started.elapsed()))
            )))
        });
        if let Err(error) = &result
            && contract::may_be_of_another_version(error)
            && let Some(database) = self.database.clone()
            && let Some(other) = other_schema(database, self.stop.clone(), limit).await
        {
            tracing::debug!(task = self.name, %error, "the schema is of another version");
            result = Err(other);
        }
        self.record(started, &result);
        self.log_outcome(&result);
        result
    }

    /// Its outcome is logged, but neither counted against the task nor retried.
    async fn finish(&mut self) {
        let started = Instant::now();
        let result = match self.task.finish().await {
            Ok(None) => return,
            Ok(Some(report)) => Ok(report),
            Err(error) => Err(error),
        };
        self.record(started, &result);
        match result {
            Ok(report) => {
                tracing::info!(task = self.name, items = report.items, "last run before stopping: done");
            }
            Err(error) => tracing::warn!(task = self.name, %error, "last run before stopping: failed"),
        }
    }

    /// Updates the status after a run.
    fn record(&self, started: Instant, result: &Result<Report>) {
        let took = started.elapsed();
        self.statuses.update(self.name, |status| {
            status.running = false;
            status.busy_seconds += took.as_secs_f64();
            status.last_duration_ms = Some((took.as_secs_f64() * 1e6).round() / 1e3);
            match result {
                Ok(report) => {
                    status.last_outcome = Some(Outcome::Ok);
                    status.last_items = report.items;
                    status.items += report.items;
                    status.last_success_at = Some(Timestamp::now());
                    status.consecutive_failures = 0;
                    status.last_error = None;
                    status.note.clone_from(&report.note);
                }
                Err(error) if error.kind() == Kind::Stopping => status.last_outcome = Some(Outcome::Cut),
                Err(error) if error.kind() == Kind::OtherSchema => {
                    status.last_outcome = Some(Outcome::Waiting);
                    status.last_items = 0;
                    status.consecutive_failures = 0;
                    status.last_error = Some(error.to_string());
                }
                Err(error) => {
                    status.last_outcome = Some(Outcome::Failed);
                    status.last_items = 0;
                    status.consecutive_failures += 1;
                    status.failures += 1;
                    status.last_error = Some(error.to_string());
                }
            }
        });
    }

    /// Logs the outcome of a run if it differs from the last.
    fn log_outcome(&mut self, result: &Result<Report>) {
        match result {
            Ok(report) => {
                if let Some(tally) = self.failure_log.recovered() {
                    tracing::info!(
                        task = self.name,
                        failures = tally.failures,
                        "works again after {}",
                        crate::process::duration::text(round(tally.lasting))
                    );
                }
                self.log_note(report);
                tracing::debug!(task = self.name, items = report.items, more = report.more, "ran");
            }
            Err(error) => {
                let tally = match error.kind() {
                    // A server that cannot be reached is logged once for all tasks, where connections are made.
                    Kind::Unreachable | Kind::Stopping => None,
                    _ => self.failure_log.failed(&error.to_string()),
                };
                match tally {
                    Some(_) if error.kind() == Kind::OtherSchema => {
                        tracing::warn!(task = self.name, "waits: {error}");
                    }
                    Some(tally) => {
                        tracing::warn!(task = self.name, failures = tally.failures, %error, "failed, will try again");
                    }
                    None => tracing::debug!(task = self.name, %error, "failed"),
                }
            }
        }
    }

    fn log_note(&mut self, report: &Report) {
        if report.note == self.note {
            return;
        }
        match (&report.note, &self.note) {
            (Some(note), _) => tracing::warn!(task = self.name, "{note}"),
            (None, Some(note)) => tracing::info!(task = self.name, "no longer so: {note}"),
            (None, None) => {}
        }
        self.note.clone_from(&report.note);
    }
}

/// What to do about the schema, if it is of another version.
async fn other_schema(database: Database, stop: CancellationToken, limit: Duration) -> Option<Error> {
    let version = async {
        let session = database.session(&stop).await?;
        contract::schema_version(&**session).await
    };
    contract::other_version(&tokio::time::timeout(limit, version).await.ok()?.ok()??)
}

/// Never, if there is nothing to watch.
async fn changed(watched: &mut Option<watch::Receiver<u64>>) {
    if let Some(watched) = watched
        && watched.changed().await.is_ok()
    {
        return;
    }
    std::future::pending::<()>().await;
}

async fn grace_is_over(stop: &CancellationToken, grace: Duration) {
    stop.cancelled().await;
    tokio::time::sleep(grace).await;
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    const PERIOD: Duration = Duration::from_secs(10);
    const LIMIT: Duration = Duration::from_secs(30);
    const GRACE: Duration = Duration::from_secs(10);

    /// What a run of the task under test does.
    enum Act {
        Report(Report),
        Take(Duration),
        Fail,
        Hang,
    }

    #[derive(Clone, Default)]
    struct Runs(Arc<Mutex<Vec<Instant>>>);

    impl Runs {
        fn seconds(&self, from: Instant) -> Vec<u64> {
            self.0.lock().unwrap().iter().map(|at| (*at - from).as_secs()).collect()
        }

        fn count(&self) -> usize {
            self.0.lock().unwrap().len()
        }
    }

    /// Does what the script says, one act a run, and nothing once it is played out.
    struct Scripted {
        script: VecDeque<Act>,
        runs: Runs,
        finished: Arc<Mutex<u32>>,
    }

    impl Task for Scripted {
        fn name(&self) -> &'static str {
            "scripted"
        }

        async fn run(&mut self, _stop: &CancellationToken) -> Result<Report> {
            self.runs.0.lock().unwrap().push(Instant::now());
            match self.script.pop_front() {
                None => Ok(Report::default()),
                Some(Act::Report(report)) => Ok(report),
                Some(Act::Take(time)) => {
                    tokio::time::sleep(time).await;
                    Ok(Report::default())
                }
                Some(Act::Fail) => Err(Error::failed("no luck")),
                Some(Act::Hang) => std::future::pending().await,
            }
        }

        async fn finish(&mut self) -> Result<Option<Report>> {
            *self.finished.lock().unwrap() += 1;
            Ok(Some(Report { items: 7, ..Report::default() }))
        }
    }

    struct Stage {
        shutdown: Shutdown,
        statuses: TaskStatuses,
        signal: Signal,
        runs: Runs,
        finished: Arc<Mutex<u32>>,
        began: Instant,
    }

    impl Stage {
        fn play(script: impl IntoIterator<Item = Act>) -> Self {
            let stage = Stage {
                shutdown: Shutdown::default(),
                statuses: TaskStatuses::default(),
                signal: Signal::default(),
                runs: Runs::default(),
                finished: Arc::default(),
                began: Instant::now(),
            };
            let task = Scripted {
                script: script.into_iter().collect(),
                runs: stage.runs.clone(),
                finished: stage.finished.clone(),
            };
            Driver::new(stage.shutdown.clone(), stage.statuses.clone(), GRACE).start(
                task,
                Schedule { period: PERIOD, limit: LIMIT },
                stage.signal.clone(),
            );
            stage
        }

        fn status(&self) -> Status {
            self.statuses.snapshot().remove("scripted").unwrap()
        }

        async fn pass(&self, seconds: u64) {
            tokio::time::sleep(Duration::from_secs(seconds)).await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_runs_at_once_and_then_every_period() {
        let stage = Stage::play([]);
        stage.pass(35).await;
        assert_eq!(stage.runs.seconds(stage.began), [0, 10, 20, 30]);
    }

    #[tokio::test(start_paused = true)]
    async fn periods_count_from_start_to_start() {
        let stage = Stage::play([Act::Take(Duration::from_secs(4))]);
        stage.pass(15).await;
        assert_eq!(stage.runs.seconds(stage.began), [0, 10]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_run_longer_than_its_period_is_followed_by_a_full_rest() {
        let stage = Stage::play([Act::Take(Duration::from_secs(12))]);
        stage.pass(25).await;
        assert_eq!(stage.runs.seconds(stage.began), [0, 22]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_signal_wakes_and_many_signals_during_a_run_count_as_one() {
        let stage = Stage::play([Act::Take(Duration::from_secs(3))]);
        stage.pass(1).await;
        for _ in 0..5 {
            stage.signal.wake();
        }
        stage.pass(5).await;
        assert_eq!(stage.runs.seconds(stage.began), [0, 3]);
        stage.signal.wake();
        stage.pass(1).await;
        assert_eq!(stage.runs.seconds(stage.began), [0, 3, 6]);
    }

    #[tokio::test(start_paused = true)]
    async fn more_work_is_done_at_once() {
        let more = || Act::Report(Report { items: 5, more: true, note: None });
        let stage = Stage::play([more(), more(), Act::Report(Report { items: 2, ..Report::default() })]);
        stage.pass(1).await;
        assert_eq!(stage.runs.seconds(stage.began), [0, 0, 0]);
        let status = stage.status();
        assert_eq!((status.runs, status.last_items, status.items), (3, 2, 12));
        assert_eq!(status.last_outcome, Some(Outcome::Ok));
    }

    #[tokio::test(start_paused = true)]
    async fn failures_are_counted_and_retried_sooner_than_the_period_and_ever_more_slowly() {
        let stage = Stage::play((0..4).map(|_| Act::Fail));
        stage.pass(1).await;
        let early = stage.runs.count();
        assert!((2..=4).contains(&early), "{early} runs in the first second");
        stage.pass(60).await;
        let status = stage.status();
        assert_eq!(status.consecutive_failures, 0);
        assert_eq!(status.last_error, None);
        let at = stage.runs.0.lock().unwrap().clone();
        assert!(at[1] - at[0] < at[4] - at[3], "the delays grow: {at:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_failure_stays_in_the_status_until_a_run_succeeds() {
        let stage = Stage::play((0..100).map(|_| Act::Fail));
        stage.pass(5).await;
        let status = stage.status();
        assert_eq!(status.last_outcome, Some(Outcome::Failed));
        assert_eq!(status.last_error.as_deref(), Some("no luck"));
        assert_eq!(status.consecutive_failures, status.runs);
        assert!(status.next_run_at.is_some());
        assert_eq!(status.last_success_at, None);
    }

    #[tokio::test(start_paused = true)]
    async fn signals_do_not_defeat_a_backoff_but_are_not_forgotten() {
        let stage = Stage::play((0..8).map(|_| Act::Fail));
        stage.pass(5).await;
        let before = stage.runs.count();
        for _ in 0..1000 {
            stage.signal.wake();
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
        assert_eq!(stage.runs.count(), before);
        // It succeeds after the eighth failure; the signal that was kept makes it run twice then, not once.
        stage.pass(60).await;
        let at = stage.runs.seconds(stage.began);
        assert_eq!(at[8], at[9], "{at:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_run_that_hangs_is_cut_at_its_limit_and_tried_again() {
        let stage = Stage::play([Act::Hang]);
        stage.pass(29).await;
        assert!(stage.status().running);
        stage.pass(3).await;
        assert_eq!(stage.runs.count(), 2);
        assert_eq!(stage.status().last_outcome, Some(Outcome::Ok));
    }

    #[tokio::test(start_paused = true)]
    async fn the_shutdown_wakes_a_sleeping_task_and_lets_it_finish_once() {
        let stage = Stage::play([]);
        stage.pass(3).await;
        stage.shutdown.begin();
        assert_eq!(stage.shutdown.drain(GRACE).await, Ok(()));
        assert_eq!(stage.began.elapsed(), Duration::from_secs(3));
        assert_eq!(*stage.finished.lock().unwrap(), 1);
        assert_eq!(stage.runs.count(), 1);
        assert_eq!(stage.status().items, 7);
    }

    #[tokio::test(start_paused = true)]
    async fn the_shutdown_does_not_wait_for_a_backoff() {
        let stage = Stage::play((0..1000).map(|_| Act::Fail));
        stage.pass(300).await;
        let before = Instant::now();
        stage.shutdown.begin();
        assert_eq!(stage.shutdown.drain(GRACE).await, Ok(()));
        assert_eq!(before.elapsed(), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn the_shutdown_lets_a_run_end() {
        let stage = Stage::play([Act::Take(Duration::from_secs(6))]);
        stage.pass(3).await;
        stage.shutdown.begin();
        assert_eq!(stage.shutdown.drain(GRACE).await, Ok(()));
        assert_eq!(stage.began.elapsed(), Duration::from_secs(6));
        assert_eq!((stage.runs.count(), *stage.finished.lock().unwrap()), (1, 1));
    }

    #[tokio::test(start_paused = true)]
    async fn a_run_that_hangs_leaves_half_of_the_grace_to_the_last_run() {
        let stage = Stage::play([Act::Hang]);
        stage.pass(3).await;
        stage.shutdown.begin();
        assert_eq!(stage.shutdown.drain(GRACE).await, Ok(()));
        assert_eq!(stage.began.elapsed(), Duration::from_secs(3) + GRACE / 2);
        assert_eq!(*stage.finished.lock().unwrap(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_note_stays_in_the_status_while_it_holds() {
        let off = || Act::Report(Report { note: Some("metering off".into()), ..Report::default() });
        let stage = Stage::play([off(), off()]);
        stage.pass(15).await;
        assert_eq!(stage.status().note.as_deref(), Some("metering off"));
        assert_eq!(stage.status().consecutive_failures, 0);
        stage.pass(10).await;
        assert_eq!(stage.status().note, None);
    }
}
