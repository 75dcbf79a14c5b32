//! Listens for urgent events and wakes the tasks and streams that wait for them.
//!
//! A notification is a wake-up and nothing more: it is lost while the daemon does not listen and in a fail-over, so its payload
//! is ignored, and events are read from the log. LISTEN comes first and the wake-up after it, so that
//! nothing falls between the two.

use std::time::Duration;

use tokio::sync::mpsc;
use tokio_postgres::{Client, Notification};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::background::backoff;
use crate::background::signal::Signal;
use crate::background::tasks::observe::LatestObservation;
use crate::contract::CHANNEL;
use crate::error::{Doing as _, Error, Kind, Result};
use crate::postgres::pool::Database;
use crate::postgres::session::Session;
use crate::process::counters;
use crate::process::failure_log::{FailureLog, round};

/// A listener only waits, so it would not notice a dead connection without asking the server.
const PING_PERIOD: Duration = Duration::from_secs(30);
const PING_TIMEOUT: Duration = Duration::from_secs(10);
/// How long our own notification may take to arrive.
const PROOF_TIMEOUT: Duration = Duration::from_secs(5);

/// Listens until `stop`, through every loss of the connection.
///
/// A broken listening connection is often the first sign that the server is gone: the last observation of the server is then
/// dropped, and made again.
pub async fn run(
    database: Database,
    signals: Vec<Signal>,
    (seen, look_now): (LatestObservation, Signal),
    stop: CancellationToken,
) -> Result<()> {
    let mut failure_log = FailureLog::default();
    let mut retries = backoff::delays();
    let mut first = true;
    let mut restored = database.restored();
    while !stop.is_cancelled() {
        restored.mark_unchanged();
        let error = match listen(&database, &signals, &stop, &mut failure_log, &mut retries, first).await {
            Ok(()) => return Ok(()),
            Err(error) => error,
        };
        seen.forget();
        look_now.wake();
        first = false;
        // A server that cannot be reached is logged where connections are made.
        if error.kind() != Kind::Unreachable
            && let Some(tally) = failure_log.failed(&error.to_string())
        {
            tracing::warn!(
                failures = tally.failures,
                %error,
                "cannot listen for events; the periodic scan finds them"
            );
        }
        tokio::select! {
            () = tokio::time::sleep(retries.next_delay()) => {}
            _ = restored.changed() => {}
            () = stop.cancelled() => {}
        }
    }
    Ok(())
}

/// One connection's life. Ends well only with `stop`.
async fn listen(
    database: &Database,
    signals: &[Signal],
    stop: &CancellationToken,
    failure_log: &mut FailureLog,
    retries: &mut backoff::Delays,
    first: bool,
) -> Result<()> {
    let mut session = match database.connect(stop).await {
        Err(error) if error.kind() == Kind::Stopping => return Ok(()),
        session => session?,
    };
    tokio::select! {
        result = begin(&mut session) => result?,
        () = stop.cancelled() => return Ok(()),
    }
    *retries = backoff::delays();
    counters::LISTENS.add(1);
    match failure_log.recovered() {
        Some(tally) => {
            tracing::info!(
                "listens for events again after {}",
                crate::process::duration::text(round(tally.lasting))
            );
        }
        None if first => tracing::info!(channel = CHANNEL, "listening"),
        None => tracing::debug!(channel = CHANNEL, "listening"),
    }
    // For notifications that were sent while nothing listened.
    signals.iter().for_each(Signal::wake);
    loop {
        tokio::select! {
            notification = session.notification() => match notification {
                Some(_) => signals.iter().for_each(Signal::wake),
                None => return Err(lost()),
            },
            () = tokio::time::sleep(PING_PERIOD) => {
                tokio::select! {
                    answer = tokio::time::timeout(PING_TIMEOUT, session.check_connection()) => match answer {
                        Ok(answer) => answer.doing("reach the server on the listening connection")?,
                        Err(_) => return Err(lost()),
                    },
                    () = stop.cancelled() => return Ok(()),
                }
            }
            () = stop.cancelled() => return Ok(()),
        }
    }
}

/// LISTEN, with the proof that it works.
pub async fn begin(session: &mut Session) -> Result<()> {
    let (client, notifications) = session.split();
    client.batch_execute(&format!("listen {CHANNEL}")).await.doing("LISTEN")?;
    prove(client, notifications).await
}

/// Sends a notification to ourselves and waits for it: a pooler that hands each transaction to another server session accepts
/// LISTEN and then delivers nothing.
async fn prove(client: &Client, notifications: &mut mpsc::Receiver<Notification>) -> Result<()> {
    const DOING: &str = "prove that LISTEN works";
    // A channel of its own, so that other listeners are not woken.
    let channel = format!("tollgate_proof_{}", Uuid::new_v4().simple());
    client.batch_execute(&format!("listen {channel}; notify {channel}")).await.doing(DOING)?;
    let heard = tokio::time::timeout(PROOF_TIMEOUT, async {
        loop {
            match notifications.recv().await {
                Some(notification) if notification.channel() == channel => return Ok(()),
                Some(_) => {}
                None => return Err(lost()),
            }
        }
    });
    match heard.await {
        Ok(result) => result?,
        Err(_) => {
            return Err(Error::failed(format!(
                "LISTEN does not work on this connection: a notification of our own did not come back within {}",
                crate::process::duration::text(PROOF_TIMEOUT)
            ))
            .with_remedy(
                "connect to the server itself, not through a pooler in transaction mode (PgBouncer: pool_mode = \
                 session for this user)",
            ));
        }
    }
    client.batch_execute(&format!("unlisten {channel}")).await.doing(DOING)
}

fn lost() -> Error {
    Error::new(Kind::ConnectionLost, "the listening connection was lost")
}
