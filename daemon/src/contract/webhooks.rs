//! Messages to webhooks: queue, claim, finish.

use tokio_postgres::GenericClient;
use uuid::Uuid;

use super::query::{one, unsigned};
use crate::error::{Doing as _, Result};

/// A message that is to be sent now: `tollgate.webhook_message`.
pub struct WebhookMessage {
    pub id: i64,
    pub lease: Uuid,
    pub webhook: String,
    pub url: String,
    pub message_id: String,
    pub body: String,
    pub attempt: i32,
    pub secrets: Vec<Vec<u8>>,
}

impl std::fmt::Debug for WebhookMessage {
    /// Neither secrets nor the address, whose path may be one.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WebhookMessage")
            .field("webhook", &self.webhook)
            .field("message_id", &self.message_id)
            .field("attempt", &self.attempt)
            .finish_non_exhaustive()
    }
}

/// Queues messages of new events: of how many, and whether there are no more.
pub async fn queue_webhook_deliveries(client: &impl GenericClient, max_events: i32) -> Result<(u64, bool)> {
    const DOING: &str = "queue webhooks";
    let row = client
        .query_one("select events, caught_up from tollgate.queue_webhook_deliveries($1)", &[&max_events])
        .await
        .doing(DOING)?;
    let events = row.try_get(0).doing(DOING)?;
    Ok((unsigned("queue_webhook_deliveries", events)?, row.try_get(1).doing(DOING)?))
}

/// Messages that are due, up to `per_webhook` of each webhook, for as long as the lease lasts.
pub async fn claim_webhook_deliveries(
    client: &impl GenericClient,
    per_webhook: i32,
    lease: std::time::Duration,
) -> Result<Vec<WebhookMessage>> {
    const DOING: &str = "claim webhooks";
    let rows = client
        .query(
            "select id, lease, webhook, url, message_id, body, attempt, secrets \
             from tollgate.claim_webhook_deliveries($1, make_interval(secs => $2))",
            &[&per_webhook, &lease.as_secs_f64()],
        )
        .await
        .doing(DOING)?;
    rows.iter()
        .map(|row| {
            Ok(WebhookMessage {
                id: row.try_get(0).doing(DOING)?,
                lease: row.try_get(1).doing(DOING)?,
                webhook: row.try_get(2).doing(DOING)?,
                url: row.try_get(3).doing(DOING)?,
                message_id: row.try_get(4).doing(DOING)?,
                body: row.try_get(5).doing(DOING)?,
                attempt: row.try_get(6).doing(DOING)?,
                secrets: row.try_get(7).doing(DOING)?,
            })
        })
        .collect()
}

/// What came of a message: a status, or an error; neither if it was not sent. False if the lease had ended.
pub async fn finish_webhook_delivery(
    client: &impl GenericClient,
    message: &WebhookMessage,
    status: Option<u16>,
    error: Option<&str>,
    retry_after: Option<std::time::Duration>,
) -> Result<bool> {
    one(
        client,
        "record what came of a webhook",
        "select tollgate.finish_webhook_delivery($1, $2, $3, $4, make_interval(secs => $5))",
        &[
            &message.id,
            &message.lease,
            &status.map(i32::from),
            &error,
            &retry_after.map(|time| time.as_secs_f64()),
        ],
    )
    .await
}
