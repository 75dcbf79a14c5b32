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

/// How long verifications took, as [`stats`] returns it: of those that were measured, one of `one_in`.
#[derive(Clone, Debug, Deserialize)]
pub struct Latency {
    pub one_in: u64,
    pub count: u64,
    /// All durations together, in seconds.
    pub sum: f64,
    pub buckets: Vec<LatencyBucket>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct LatencyBucket {
    /// In seconds; `None` for what took longer than the bucket before.
    pub up_to: Option<f64>,
    /// Of this bucket alone.
    pub count: u64,
}

impl Latency {
    /// `None` where it is not measured.
    pub fn of(stats: &Value) -> Option<Self> {
        serde_json::from_value(stats.get("verification_latency")?.clone()).ok()
    }

    /// The bound within which so many of a hundred lie; `None` if there is no measurement, or no bound.
    pub fn percentile(&self, percent: u64) -> Option<f64> {
        let mut below = 0;
        let bucket = self.buckets.iter().find(|bucket| {
            below += bucket.count;
            below > 0 && below * 100 >= self.count * percent
        });
        bucket?.up_to
    }
}

/// What `/metrics` shows of the server, all of it at one moment.
#[derive(Clone, Debug, Deserialize)]
pub struct Observation {
    /// As [`stats`] returns it.
    pub stats: Value,
    /// Name, pending events, and since when in seconds of the epoch: rows of `tollgate.subscription_backlogs()`.
    pub subscriptions: Vec<Backlog>,
    pub webhooks: Vec<WebhookState>,
    pub keys: KeyStatus,
    /// Those first whose keys could not be fetched.
    pub issuers: Vec<IssuerState>,
    pub notification_queue_usage: f64,
}

/// `tollgate.key_status()`, its times in seconds of the epoch.
#[derive(Clone, Debug, Deserialize)]
pub struct KeyStatus {
    pub master_keys: u64,
    /// `None` where there is no signing key.
    pub can_sign: Option<bool>,
    pub signs_since: Option<f64>,
    /// `None` while the next key is not there.
    pub signs_until: Option<f64>,
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

#[derive(Clone, Debug, Deserialize)]
pub struct IssuerState {
    pub issuer: String,
    /// Whether its keys are fetched; else they were given.
    pub is_fetched: bool,
    pub keys: u64,
    /// Seconds of the epoch.
    pub fetched_at: Option<f64>,
    /// Since the last success.
    pub failures: u64,
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
                  'paused', w.paused_at is not null, 'pending', w.pending, 'dead', w.dead)), '[]') from tollgate.webhooks w), \
             'keys', (select jsonb_build_object('master_keys', k.master_keys, 'can_sign', k.can_sign, \
                  'signs_since', extract(epoch from k.signs_since), 'signs_until', extract(epoch from k.signs_until)) \
                  from tollgate.key_status() k), \
             'issuers', (select coalesce(jsonb_agg(jsonb_build_object('issuer', i.issuer, 'is_fetched', i.keys_from <> 'given', \
                  'keys', i.keys, 'fetched_at', extract(epoch from i.fetched_at), 'failures', i.failures) \
                  order by i.failures = 0, i.issuer), '[]') from tollgate.list_trusted_issuers() i)) \
         from tollgate.stats() s",
        &[],
    )
    .await?;
    serde_json::from_value(observation).map_err(|error| {
        Error::failed(format!("could not read the server's counters: they are something else: {error}"))
            .with_remedy("use a tollgated of the same version as the extension")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn latency(counts: [u64; 3]) -> Latency {
        let bounds = [Some(0.001), Some(0.01), None];
        let buckets = bounds.into_iter().zip(counts).map(|(up_to, count)| LatencyBucket { up_to, count });
        Latency { one_in: 61, count: counts.iter().sum(), sum: 1.0, buckets: buckets.collect() }
    }

    #[test]
    fn a_percentile_is_the_bound_of_the_bucket_that_it_falls_into() {
        assert_eq!(latency([98, 1, 1]).percentile(98), Some(0.001));
        assert_eq!(latency([98, 1, 1]).percentile(99), Some(0.01));
        assert_eq!(latency([98, 1, 1]).percentile(100), None);
        assert_eq!(latency([0, 0, 0]).percentile(50), None);
        assert_eq!(latency([0, 1, 0]).percentile(50), Some(0.01));
    }
}
