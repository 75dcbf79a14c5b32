//! Finds out whether a connection pooler in transaction mode stands between us and the server.
//!
//! Such a pooler lends a server's session for one transaction. LISTEN, advisory locks and settings then stay behind in a
//! session that another client gets next, while all of ours seem to work: even a NOTIFY to oneself comes back, since it
//! comes with the answer to the statement that sent it. So two sessions are compared, which cannot be one.

use std::time::Duration;

use tokio_postgres::SimpleQueryMessage;
use tokio_util::sync::CancellationToken;

use crate::background::backoff;
use crate::error::{Doing as _, Error, Kind, Result};
use crate::postgres::pool::Database;
use crate::postgres::session::Session;
use crate::postgres::target::Target;

/// A pooler without a free session keeps us waiting.
const TIMEOUT: Duration = Duration::from_secs(10);
const DOING: &str = "find out whether a pooler is in between";
/// A pooler that lends its sessions in turn, or any of them, may by chance lend us the same ones again: twice out of
/// two, which the second round shows, or at random, which all of ten rounds do not.
const ROUNDS: usize = 10;

/// Waits until the server can be reached, and refuses to go on through a pooler in transaction mode: waiting does not help
/// there. `Ok` also if that cannot be found out; LISTEN is proved again whenever it is used.
pub async fn refuse(target: &Target, stop: &CancellationToken) -> Result<()> {
    let database = Database::new(target.without_settings())?;
    let mut retries = backoff::delays();
    loop {
        let error = match probe(&database, stop).await {
            Ok(()) => return Ok(()),
            Err(error) => error,
        };
        match error.kind() {
            Kind::Unreachable | Kind::ConnectionLost => tokio::time::sleep(retries.next_delay()).await,
            Kind::Usage => return Err(error),
            _ => {
                tracing::warn!(%error, "cannot find out whether a pooler is in between; continuing as if there were none");
                return Ok(());
            }
        }
    }
}

async fn probe(database: &Database, stop: &CancellationToken) -> Result<()> {
    let (one, other) = (database.connect(stop).await?, database.connect(stop).await?);
    examine(&one, &other).await
}

/// Whether two sessions that are ours at the same time are one at the server, or one of them becomes another. They come
/// from [`Target::without_settings`], since what is set in them might be left to another client.
pub async fn examine(one: &Session, other: &Session) -> Result<()> {
    let shared = async {
        let before = identity(one, "").await?;
        for _ in 0..ROUNDS {
            // The other holds a session from here on; asked again, the one gets it if there is but one for both.
            if identity(other, "begin;").await? == before || identity(one, "").await? != before {
                return Ok(true);
            }
            other.batch_execute("commit").await.doing(DOING)?;
        }
        Ok(false)
    };
    let shared = tokio::time::timeout(TIMEOUT, shared)
        .await
        .map_err(|_| Error::failed(format!("could not {DOING}: no answer")))??;
    if !shared {
        return Ok(());
    }
    Err(Error::usage(
        "there is a connection pooler in transaction mode between tollgated and the server, through which LISTEN, advisory \
         locks and settings do not work",
    )
    .with_remedy(
        "connect to the server itself (its own port, not the pooler's), or give this user a pool in session mode \
         (PgBouncer: pool_mode=session in the line of the database or of the user)",
    ))
}

/// Names a session of a server, and is the same for as long as that session lives. Asked `after` another statement.
async fn identity(session: &Session, after: &str) -> Result<String> {
    // Not prepared: a pooler may not know prepared statements.
    let name = "select pg_catalog.pg_backend_pid() || ' ' || pg_catalog.pg_postmaster_start_time()";
    let answer = session.simple_query(&format!("{after}{name}")).await.doing(DOING)?;
    let row = answer.iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => row.get(0),
        _ => None,
    });
    row.map(str::to_owned).ok_or_else(|| Error::failed(format!("could not {DOING}: no answer")))
}
