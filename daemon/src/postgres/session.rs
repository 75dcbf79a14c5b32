//! One connection to the server: its client, and the notifications that arrive beside the answers.

use std::ops::{Deref, DerefMut};

use tokio::sync::mpsc;
use tokio_postgres::error::{DbError, Severity};
use tokio_postgres::{AsyncMessage, Client, Notification};
use tokio_util::sync::CancellationToken;

/// A connection that is set up.
#[derive(Debug)]
pub struct Session {
    client: Client,
    notifications: mpsc::Receiver<Notification>,
}

impl Session {
    pub(crate) fn new(client: Client, notifications: mpsc::Receiver<Notification>) -> Self {
        Self { client, notifications }
    }

    /// The next notification on any channel that this session listens on; `None` once the connection is gone.
    pub async fn notification(&mut self) -> Option<Notification> {
        self.notifications.recv().await
    }

    /// The client, and its notifications beside it.
    pub fn split(&mut self) -> (&mut Client, &mut mpsc::Receiver<Notification>) {
        (&mut self.client, &mut self.notifications)
    }
}

impl Deref for Session {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.client
    }
}

impl DerefMut for Session {
    fn deref_mut(&mut self) -> &mut Client {
        &mut self.client
    }
}

/// Moves the bytes of a connection until it ends or is cut, and hands on its notifications.
pub(crate) async fn pump<S, T>(
    mut connection: tokio_postgres::Connection<S, T>,
    notifications: mpsc::Sender<Notification>,
    cut: CancellationToken,
) where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
    T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    loop {
        let message = tokio::select! {
            biased;
            // Dropping the connection fails whatever waits for an answer on it.
            () = cut.cancelled() => return,
            message = std::future::poll_fn(|cx| connection.poll_message(cx)) => message,
        };
        match message {
            Some(Ok(AsyncMessage::Notification(notification))) => {
                // Full or closed: a wake-up is pending already, or none is waited for.
                let _ = notifications.try_send(notification);
            }
            Some(Ok(AsyncMessage::Notice(notice))) => {
                say(&notice);
            }
            Some(Ok(_)) => {}
            Some(Err(error)) => {
                tracing::debug!(%error, "a connection broke");
                return;
            }
            None => return,
        }
    }
}

/// Logs what the server remarks on a statement. Warnings and notices have a target of their own, so that a command shows them to the
/// person who runs it.
fn say(notice: &DbError) {
    match notice.parsed_severity() {
        Some(Severity::Warning | Severity::Notice) => {
            let more = [notice.detail(), notice.hint()]
                .into_iter()
                .flatten()
                .fold(String::new(), |text, part| text + " " + part);
            tracing::info!(target: "tollgated::notice", "{}.{more}", notice.message());
        }
        _ => tracing::debug!(severity = notice.severity(), "the server says: {}", notice.message()),
    }
}
