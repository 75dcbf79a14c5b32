//! Connections: where to, how they are set up, how they are kept.
//!
//! The daemon never gives up on a server. A task that needs a session asks [`Database::session`]; if there is none,
//! that is an error which the caller's own schedule retries, with jittered backoff. That the server is out of
//! reach is logged here, once for all tasks.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use deadpool::managed::{self, Metrics, Pool, PoolError, RecycleError, RecycleResult, Timeouts};
use tokio::sync::watch;
use tokio_postgres::Client;
use tokio_util::sync::CancellationToken;

use crate::error::{Doing as _, Error, Kind, Result};
use crate::postgres::session::Session;
use crate::postgres::target::Target;
use crate::process::counters;
use crate::process::failure_log::{FailureLog, round};

/// An idle session is asked for a sign of life before it is used again.
const RECYCLE_TIMEOUT: Duration = Duration::from_secs(5);
/// Tasks are short and wake at different times, so few sessions serve all of them.
const POOL_SIZE: usize = 5;
/// A session that was not needed for so long is closed: the server keeps a process of some megabytes for each.
const MOST_IDLE: Duration = Duration::from_secs(30);

/// Keeps the values of this session's statements out of the server's log, where this role may decide that. To be called
/// before a statement one of whose values is a token.
pub async fn hide_bind_values(client: &Client) -> Result<()> {
    client
        .batch_execute(
            "select set_config('log_parameter_max_length', '0', false) \
             where has_parameter_privilege('log_parameter_max_length', 'set')",
        )
        .await
        .doing("keep bind values out of the server's log")
}

/// The database that the daemon serves.
#[derive(Clone, Debug)]
pub struct Database {
    connector: Arc<Connector>,
    pool: Pool<Sessions>,
}

pub type PooledSession = managed::Object<Sessions>;

impl Database {
    pub fn new(target: Target) -> Result<Self> {
        let wait = target.statement_timeout();
        Self::with_pool(target, POOL_SIZE, wait)
    }

    /// With room for so many sessions in the pool, for one of which a task waits for so long.
    pub fn with_pool(target: Target, size: usize, wait: Duration) -> Result<Self> {
        let connector = Arc::new(Connector {
            target,
            failures: Mutex::default(),
            trusted: Mutex::default(),
            attempts: Mutex::default(),
            restored: watch::Sender::new(0),
            made: AtomicU64::new(0),
        });
        let pool = Pool::builder(Sessions(connector.clone()))
            .max_size(size)
            // Few of them work, as long as few are needed.
            .queue_mode(managed::QueueMode::Lifo)
            .runtime(deadpool::Runtime::Tokio1)
            .timeouts(Timeouts {
                wait: Some(wait),
                // Target::connect has its own, which names the server.
                create: None,
                recycle: Some(RECYCLE_TIMEOUT),
            })
            .build()
            .map_err(|error| Error::failed(format!("could not set up the pool of sessions: {error}")))?;
        Ok(Self { connector, pool })
    }

    /// A session to use and drop. Gives up when `stop` is cancelled.
    pub async fn session(&self, stop: &CancellationToken) -> Result<PooledSession> {
        // Superfluous ones are closed here; some task asks every few seconds.
        self.pool.retain(|_, metrics| metrics.last_used() < MOST_IDLE);
        tokio::select! {
            biased;
            session = self.pool.get() => session.map_err(explain_pool),
            () = stop.cancelled() => Err(Error::stopping()),
        }
    }

    /// A connection of one's own, to keep.
    pub async fn connect(&self, stop: &CancellationToken) -> Result<Session> {
        tokio::select! {
            biased;
            session = self.connector.connect() => session,
            () = stop.cancelled() => Err(Error::stopping()),
        }
    }

    /// Ends every connection that there is, and every attempt to make one: the network they went through was found
    /// dead, and waiting on them would take minutes. No work is lost that a kill would not lose.
    pub fn cut(&self) {
        let dead = std::mem::take(&mut *lock(&self.connector.trusted));
        dead.cancel();
    }

    /// Announces that there is a way to the server again: those that wait before trying, and those that began to
    /// try when there was none.
    pub fn restore(&self) {
        self.connector.restored.send_modify(|times| *times += 1);
        let hanging = std::mem::take(&mut *lock(&self.connector.attempts));
        hanging.cancel();
    }

    /// Changes at each [`Database::restore`].
    pub fn restored(&self) -> watch::Receiver<u64> {
        self.connector.restored.subscribe()
    }

    pub fn name(&self) -> &str {
        self.connector.target.database_name()
    }

    /// How many tasks wait for a session.
    pub fn waiting(&self) -> usize {
        self.pool.status().waiting
    }

    /// How many connections were made so far.
    pub fn connections(&self) -> u64 {
        self.connector.made.load(Ordering::Relaxed)
    }
}

/// A session that one task keeps to itself: what its work leaves a server's process with in memory, it does not leave
/// with one process after another.
#[derive(Debug)]
pub struct OwnSession {
    database: Database,
    session: Option<Session>,
}

impl OwnSession {
    pub fn new(database: Database) -> Self {
        Self { database, session: None }
    }

    /// The session that was given back, or a new one. Gives up when `stop` is cancelled.
    pub async fn take(&mut self, stop: &CancellationToken) -> Result<Session> {
        match self.session.take().filter(|session| !session.is_closed()) {
            Some(session) => Ok(session),
            None => self.database.connect(stop).await,
        }
    }

    /// For the next time; not after an error, nor after a run that was cut short.
    pub fn give_back(&mut self, session: Session) {
        self.session = Some(session);
    }
}

/// Makes every connection of the daemon, and says when that fails and when it works again.
#[derive(Debug)]
struct Connector {
    target: Target,
    failures: Mutex<FailureLog>,
    /// Cancelled when the connections made with it are to be cut.
    trusted: Mutex<CancellationToken>,
    /// Cancelled when an attempt that hangs is better begun anew.
    attempts: Mutex<CancellationToken>,
    restored: watch::Sender<u64>,
    made: AtomicU64,
}

impl Connector {
    async fn connect(&self) -> Result<Session> {
        let cut = lock(&self.trusted).clone();
        let anew = lock(&self.attempts).clone();
        let result = tokio::select! {
            biased;
            result = self.target.connect_until(&cut) => result,
            () = cut.cancelled() => return Err(Error::new(Kind::Unreachable, "the network failed meanwhile")),
            () = anew.cancelled() => return Err(Error::new(Kind::Unreachable, "the network came back meanwhile")),
        };
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        match &result {
            Ok(_) => {
                self.made.fetch_add(1, Ordering::Relaxed);
                if let Some(tally) = failures.recovered() {
                    tracing::info!(
                        attempts = tally.failures,
                        "connected to {} after {}",
                        self.target.describe(),
                        crate::process::duration::text(round(tally.lasting))
                    );
                }
            }
            Err(error) => {
                counters::CONNECT_FAILURES.add(1);
                if let Some(tally) = failures.failed(&error.to_string()) {
                    tracing::warn!(
                        attempts = tally.failures,
                        "{error}; trying again, for as long as it takes"
                    );
                }
            }
        }
        result
    }
}

/// What the pool holds.
#[derive(Debug)]
pub struct Sessions(Arc<Connector>);

impl managed::Manager for Sessions {
    type Type = Session;
    type Error = Error;

    async fn create(&self) -> Result<Session> {
        self.0.connect().await
    }

    /// A run that was cut short leaves a session whose server side may still be at work, so a session must answer
    /// before it is used again.
    async fn recycle(&self, session: &mut Session, _: &Metrics) -> RecycleResult<Error> {
        if session.is_closed() {
            return Err(RecycleError::message("closed"));
        }
        session.check_connection().await.map_err(|_| RecycleError::message("broken"))
    }
}

fn lock(token: &Mutex<CancellationToken>) -> std::sync::MutexGuard<'_, CancellationToken> {
    // It is only ever replaced whole.
    token.lock().unwrap_or_else(PoisonError::into_inner)
}

fn explain_pool(error: PoolError<Error>) -> Error {
    match error {
        PoolError::Backend(error) => error,
        PoolError::Timeout(_) => {
            Error::failed("no session became free in time: other tasks hold all of them")
        }
        other => Error::failed(format!("no session could be had: {other}")),
    }
}
