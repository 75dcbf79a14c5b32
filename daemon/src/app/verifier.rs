//! Verifies what is presented over HTTP. What arrives together is verified together, by one statement; what arrives alone
//! waits for nothing.
//!
//! A few lanes, each with a connection of its own, take what waits and ask for all of it at once. While a lane waits for an
//! answer more comes, which is the next batch: its size follows the load, without a timer. A request that came after the
//! statement was sent is never answered by it, so that a revocation acknowledged before the request came always counts. There
//! is a second lane so that a batch that takes long delays no other.
//!
//! Everything is bounded: how many wait, how long each does, how many are asked for at once. Those whose client has gone by the
//! time their batch is sent are left out of it, and are counted nowhere.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tokio_postgres::Statement;
use tokio_util::sync::CancellationToken;

use crate::contract;
use crate::contract::{Credential, Verified};
use crate::error::{Error, Kind, Result};
use crate::postgres::pool::Database;
use crate::postgres::session::Session;
use crate::process::counters;

const LANES: usize = 2;
/// Beyond it a client is better refused at once: this many take longer than it waits.
const MOST_WAITING: usize = 4096;
/// Answered in some milliseconds.
const MOST_AT_ONCE: usize = 256;
/// After a connection could not be made, what waits is refused for so long without another attempt: a server at its limit of
/// connections has other things to do.
const PAUSE: Duration = Duration::from_millis(200);
/// Requests that run when the daemon stops still get their answers.
const FAREWELL: Duration = Duration::from_secs(2);

/// Shared by all that waited for the same statement.
pub type Failure = Arc<Error>;

#[derive(Clone, Debug)]
pub struct Verifier {
    queue: mpsc::Sender<Waiting>,
    limit: Duration,
}

#[derive(Debug)]
struct Waiting {
    credential: Credential,
    answer: oneshot::Sender<Result<Verified, Failure>>,
}

impl Verifier {
    /// The verifier, and what has to run for it. No answer takes longer than `limit`.
    pub fn new(
        database: &Database,
        limit: Duration,
        stop: CancellationToken,
    ) -> (Self, impl Future<Output = Result<()>> + use<>) {
        let (queue, waiting) = mpsc::channel(MOST_WAITING);
        let waiting = Arc::new(tokio::sync::Mutex::new(waiting));
        let lanes: Vec<Lane> = (0..LANES)
            .map(|_| Lane {
                database: database.clone(),
                waiting: waiting.clone(),
                limit,
                stop: stop.clone(),
                session: None,
                failed: None,
            })
            .collect();
        let run = async move {
            let mut running = tokio::task::JoinSet::new();
            for lane in lanes {
                running.spawn(lane.run());
            }
            let ended = async {
                while let Some(ended) = running.join_next().await {
                    ended
                        .map_err(|error| Error::failed(format!("a lane of verifications ended: {error}")))?;
                }
                Ok(())
            };
            let stopped = async {
                stop.cancelled().await;
                tokio::time::sleep(FAREWELL).await;
            };
            tokio::select! {
                result = ended => result,
                () = stopped => Ok(()),
            }
        };
        (Self { queue, limit }, run)
    }

    /// A future that is dropped takes its credential out of the queue.
    pub async fn verify(&self, credential: Credential) -> Result<Verified, Failure> {
        let (answer, answered) = oneshot::channel();
        if self.queue.try_send(Waiting { credential, answer }).is_err() {
            return Err(unavailable("too many requests wait for the database"));
        }
        match tokio::time::timeout(self.limit, answered).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => Err(unavailable("the daemon is stopping")),
            Err(_) => Err(Arc::new(too_slow())),
        }
    }
}

fn too_slow() -> Error {
    Error::new(Kind::Unreachable, "the database takes too long to answer")
}

fn unavailable(why: &str) -> Failure {
    Arc::new(Error::new(Kind::Unreachable, why))
}

struct Lane {
    database: Database,
    waiting: Arc<tokio::sync::Mutex<mpsc::Receiver<Waiting>>>,
    limit: Duration,
    stop: CancellationToken,
    session: Option<(Session, Statement)>,
    /// When a connection could not be made last, and why.
    failed: Option<(Instant, Failure)>,
}

impl Lane {
    async fn run(mut self) {
        let mut batch = Vec::new();
        loop {
            // Held until something comes, so that the lanes take turns.
            let taken = self.waiting.lock().await.recv_many(&mut batch, MOST_AT_ONCE).await;
            if taken == 0 {
                return;
            }
            batch.retain(|one| !one.answer.is_closed());
            if batch.is_empty() {
                continue;
            }
            match self.ask(&mut batch).await {
                Ok(answers) => {
                    for (one, answer) in batch.drain(..).zip(answers) {
                        let _ = one.answer.send(Ok(answer));
                    }
                }
                Err(failure) => {
                    for one in batch.drain(..) {
                        let _ = one.answer.send(Err(failure.clone()));
                    }
                }
            }
        }
    }

    async fn ask(&mut self, batch: &mut Vec<Waiting>) -> Result<Vec<Verified>, Failure> {
        let (session, statement) = self.session().await?;
        // Connecting may have taken longer than they waited.
        batch.retain(|one| !one.answer.is_closed());
        if batch.is_empty() {
            self.session = Some((session, statement));
            return Ok(Vec::new());
        }
        let credentials: Vec<&Credential> = batch.iter().map(|one| &one.credential).collect();
        counters::VERIFIED.add(credentials.len() as u64);
        counters::VERIFY_STATEMENTS.add(1);
        let asked = contract::verify_tokens(&session, &statement, &credentials);
        let answers = tokio::time::timeout(self.limit, asked).await;
        match answers {
            Ok(Ok(answers)) => {
                self.session = Some((session, statement));
                Ok(answers)
            }
            // Not asked again: some may have been counted. The session is dropped, since its state, and what its statement
            // means, are in doubt.
            Ok(Err(error)) => Err(Arc::new(error)),
            Err(_) => Err(Arc::new(too_slow())),
        }
    }

    /// The session that this lane has, or a new one.
    async fn session(&mut self) -> Result<(Session, Statement), Failure> {
        if let Some((session, statement)) = self.session.take()
            && !session.is_closed()
        {
            return Ok((session, statement));
        }
        if let Some((at, failure)) = &self.failed
            && at.elapsed() < PAUSE
        {
            return Err(failure.clone());
        }
        let made = async {
            let session = self.database.connect(&self.stop).await?;
            let statement = contract::prepare_verify_tokens(&session).await?;
            Ok((session, statement))
        };
        let made: Result<_> = match tokio::time::timeout(self.limit, made).await {
            Ok(made) => made,
            Err(_) => Err(too_slow()),
        };
        match made {
            Ok(made) => {
                self.failed = None;
                Ok(made)
            }
            Err(error) => {
                let failure = Arc::new(error);
                self.failed = Some((Instant::now(), failure.clone()));
                Err(failure)
            }
        }
    }
}
