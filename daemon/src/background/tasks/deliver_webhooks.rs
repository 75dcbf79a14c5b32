//! Sends webhooks: new events are queued in the database, and what is due there is claimed under a lease and sent.
//!
//! Each webhook has one sender at a time, in order, beside the task's runs: so a slow or dead receiver delays
//! no other webhook. What is claimed is bounded, in bytes too; if the process dies, another claims it after the lease.

use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::background::driver::{Report, Task};
use crate::background::signal::Signal;
use crate::contract;
use crate::contract::WebhookMessage;
use crate::error::Result;
use crate::postgres::pool::Database;
use crate::process::counters;
use crate::webhook::{DEADLINE, Sender};

/// Of each webhook, at a time. There are 64 of those at most.
const PER_WEBHOOK: i32 = 8;
/// Enough to send all of them, if the receiver is not at its slowest.
const LEASE: Duration = Duration::from_secs(60);
/// What remains of a lease must suffice to send a message and to record that.
const MARGIN: Duration = Duration::from_secs(25);

#[derive(Debug)]
pub struct DeliverWebhooks {
    database: Database,
    sender: Sender,
    batch_size: i32,
    /// Of this task itself: a sender that has delivered all its messages asks for more.
    signal: Signal,
    senders: JoinSet<()>,
    stop: CancellationToken,
}

impl DeliverWebhooks {
    pub fn new(
        database: Database,
        sender: Sender,
        batch_size: i32,
        signal: Signal,
        stop: CancellationToken,
    ) -> Self {
        Self { database, sender, batch_size, signal, senders: JoinSet::new(), stop }
    }

    /// Sends the messages of one webhook.
    fn start(&mut self, messages: Vec<WebhookMessage>, until: Instant) {
        let (database, sender, signal, stop) =
            (self.database.clone(), self.sender.clone(), self.signal.clone(), self.stop.clone());
        self.senders.spawn(async move {
            if send_all(&database, &sender, messages, until, &stop).await {
                signal.wake();
            }
        });
    }
}

impl Task for DeliverWebhooks {
    fn name(&self) -> &'static str {
        "deliver_webhooks"
    }

    async fn run(&mut self, stop: &CancellationToken) -> Result<Report> {
        while self.senders.try_join_next().is_some() {}
        let session = self.database.session(stop).await?;
        let (_, caught_up) = contract::queue_webhook_deliveries(&**session, self.batch_size).await?;
        let until = Instant::now() + LEASE - MARGIN;
        let claimed = contract::claim_webhook_deliveries(&**session, PER_WEBHOOK, LEASE).await?;
        drop(session);
        let items = u64::try_from(claimed.len()).unwrap_or_default();
        let mut rest = claimed.into_iter().peekable();
        while let Some(first) = rest.next() {
            let mut messages = vec![first];
            while let Some(next) = rest.next_if(|next| next.webhook == messages[0].webhook) {
                messages.push(next);
            }
            self.start(messages, until);
        }
        Ok(Report { items, more: !caught_up, note: None })
    }

    async fn finish(&mut self) -> Result<Option<Report>> {
        // Each ends after the message that it is sending now.
        while self.senders.join_next().await.is_some() {}
        Ok(None)
    }
}

/// True if all of them arrived, so that the next ones may follow at once. After a failure the rest waits for the task's next
/// run, so that a receiver in trouble gets a pause.
async fn send_all(
    database: &Database,
    sender: &Sender,
    messages: Vec<WebhookMessage>,
    until: Instant,
    stop: &CancellationToken,
) -> bool {
    let mut well = true;
    for message in messages {
        let recorded = if well && Instant::now() < until && !stop.is_cancelled() {
            let outcome = sender.send(&message).await;
            well = outcome.is_delivered();
            let text = (!well).then(|| outcome.text());
            if let Some(text) = &text {
                counters::WEBHOOKS_FAILED.add(1);
                tracing::warn!(
                    webhook = message.webhook,
                    message = message.message_id,
                    attempt = message.attempt,
                    "a webhook was not delivered: {text}"
                );
            } else {
                counters::WEBHOOKS_DELIVERED.add(1);
            }
            record(database, &message, outcome.status(), text.as_deref(), outcome.retry_after()).await
        } else {
            well = false;
            record(database, &message, None, None, None).await
        };
        if let Err(error) = recorded {
            // Its lease ends by itself, and then it is sent again with the same id.
            tracing::debug!(webhook = message.webhook, message = message.message_id, %error, "not recorded");
            return false;
        }
    }
    well
}

async fn record(
    database: &Database,
    message: &WebhookMessage,
    status: Option<u16>,
    error: Option<&str>,
    retry_after: Option<Duration>,
) -> Result<bool> {
    // Also while stopping: what was sent is recorded as sent.
    let session = database.session(&CancellationToken::new()).await?;
    let recorded = tokio::time::timeout(
        DEADLINE,
        contract::finish_webhook_delivery(&**session, message, status, error, retry_after),
    );
    recorded.await.unwrap_or_else(|_| Err(crate::error::Error::failed("the server did not answer in time")))
}
