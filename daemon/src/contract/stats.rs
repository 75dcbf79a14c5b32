//! The server's counters and backlogs.

use serde::Deserialize;
use serde_json::Value;
use tokio_postgres::GenericClient;

use super::query::one;
use crate::error::{Error, Result};

/// The server's counters, as the JSON object of the row: what a later version adds is passed on.
pub async fn stats(client: &impl GenericClient) -> Result<Value> {
    one(client, "read the server's counters", "select to_jsonb(s) from tollgate.stats() s", &[]).await
}

/// What `/metrics` shows of the server, all of it at one moment.
#[derive(Clone, Debug, Deserialize)]
pub struct Observation {
    /// As [`stats`] returns it.
    pub stats: Value,
    /// Name, pending events, and since when in seconds of the epoch: rows of `tollgate.subscription_backlogs()`.
    pub subscriptions: Vec<Backlog>,
    pub webhooks: Vec<WebhookState>,
    pub notification_queue_usage: f64,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Backlog {
    pub name: String,
    /// `None` for a cursor that the server cannot follow.
    pub pending: Option<u64>,
    pub oldest_at: Option<f64>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct WebhookState {
    pub name: String,
    pub enabled: bool,
    pub paused: bool,
    pub pending: u64,
    pub dead: u64,
}

pub async fn observe(client: &impl GenericClient) -> Result<Observation> {
    let observation: Value = one(
        client,
        "read the server's counters",
        "select jsonb_build_object(\
             'stats', to_jsonb(s), 'notification_queue_usage', pg_notification_queue_usage(), \
             'subscriptions', (select coalesce(jsonb_agg(jsonb_build_object('name', b.name, 'pending', b.pending, \
                  'oldest_at', extract(epoch from b.oldest_at))), '[]') from tollgate.subscription_backlogs() b), \
             'webhooks', (select coalesce(jsonb_agg(jsonb_build_object('name', w.name, 'enabled', w.enabled, \
                  'paused', w.paused_at is not null, 'pending', w.pending, 'dead', w.dead)), '[]') from tollgate.webhooks w)) \
         from tollgate.stats() s",
        &[],
    )
    .await?;
    serde_json::from_value(observation).map_err(|error| {
        Error::failed(format!("could not read the server's counters: they are something else: {error}"))
            .with_remedy("use a tollgated of the same version as the extension")
    })
}
