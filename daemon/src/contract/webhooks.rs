//! Webhooks: define and change them; and their messages: queue, claim, finish.

use futures_util::Stream;
use postgres_types::Json;
use tokio_postgres::GenericClient;
use uuid::Uuid;

use super::document::Document;
use super::query::{documents, many, one, unsigned};
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

/// Rows of `tollgate.webhooks`.
pub async fn list_webhooks<C: GenericClient>(
    client: &C,
) -> Result<impl Stream<Item = Result<Document>> + use<C>> {
    let statement = "select to_jsonb(w) from tollgate.webhooks w order by w.name";
    documents(client, "list the webhooks", statement, &[]).await
}

/// The row of `tollgate.webhooks`; `None` if there is no webhook of that name.
pub async fn show_webhook(client: &impl GenericClient, name: &str) -> Result<Option<Document>> {
    let rows = many::<Json<Document>>(
        client,
        "look up the webhook",
        "select to_jsonb(w) from tollgate.webhooks w where w.name = $1",
        &[&name],
    )
    .await?;
    Ok(rows.into_iter().next().map(|Json(row)| row))
}

/// Rows of `tollgate.webhook_deliveries` of a webhook, the oldest first, at most so many.
pub async fn list_webhook_deliveries<C: GenericClient>(
    client: &C,
    name: &str,
    limit: i64,
) -> Result<impl Stream<Item = Result<Document>> + use<C>> {
    documents(
        client,
        "list the messages",
        "select to_jsonb(d) from (select * from tollgate.webhook_deliveries d where d.webhook = $1 \
         order by d.created_at, d.id limit $2) d",
        &[&name, &limit],
    )
    .await
}

/// The secret that messages are signed with.
pub async fn define_webhook(
    client: &impl GenericClient,
    name: &str,
    url: &str,
    events: Option<&[String]>,
) -> Result<String> {
    one(client, "define the webhook", "select tollgate.define_webhook($1, $2, $3)", &[&name, &url, &events])
        .await
}

/// The new secret.
pub async fn rotate_webhook_secret(
    client: &impl GenericClient,
    name: &str,
    grace: std::time::Duration,
) -> Result<String> {
    one(
        client,
        "rotate the secret",
        "select tollgate.rotate_webhook_secret($1, make_interval(secs => $2))",
        &[&name, &grace.as_secs_f64()],
    )
    .await
}

/// False if it was so already.
pub async fn set_webhook_enabled(client: &impl GenericClient, name: &str, enabled: bool) -> Result<bool> {
    let doing = if enabled { "enable the webhook" } else { "disable the webhook" };
    one(client, doing, "select tollgate.set_webhook_enabled($1, $2)", &[&name, &enabled]).await
}

/// False if it was so already.
pub async fn set_webhook_paused(client: &impl GenericClient, name: &str, paused: bool) -> Result<bool> {
    match paused {
        true => one(client, "pause the webhook", "select tollgate.pause_webhook($1)", &[&name]).await,
        false => one(client, "resume the webhook", "select tollgate.resume_webhook($1)", &[&name]).await,
    }
}

/// False if that was its address already.
pub async fn set_webhook_url(client: &impl GenericClient, name: &str, url: &str) -> Result<bool> {
    one(client, "change the address", "select tollgate.set_webhook_url($1, $2)", &[&name, &url]).await
}

/// False if there is no webhook of that name.
pub async fn drop_webhook(client: &impl GenericClient, name: &str) -> Result<bool> {
    one(client, "delete the webhook", "select tollgate.drop_webhook($1)", &[&name]).await
}

/// How many messages are sent again.
pub async fn replay_webhook(client: &impl GenericClient, name: &str, message: Option<i64>) -> Result<u64> {
    let count =
        one(client, "replay messages", "select tollgate.replay_webhook($1, $2)", &[&name, &message]).await?;
    unsigned("replay_webhook", count)
}
