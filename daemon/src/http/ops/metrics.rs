//! `/metrics`: what the daemon knows, in the OpenMetrics text format.
//!
//! A scrape collects values from memory and asks no server. Names follow Prometheus' conventions: `tollgated_` is this
//! process, `tollgate_` the database server. Every metric has the label `database`, which distinguishes the daemons of several.
//! Other labels are names of tasks, codes, subscriptions, webhooks and issuers: a bounded number,
//! and none of them a secret. To add a metric, add it to one of the groups below, to the dashboard or the alerts if people
//! should see it, and to docs/metrics.md.

use std::fmt;
use std::time::Duration;

use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse as _, Response};
use jiff::Timestamp;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Registry, Unit};

use crate::background::driver::TaskStatuses;
use crate::background::leaderless::LeaderlessTasks;
use crate::background::tasks::observe::LatestObservation;
use crate::contract::{Latency, Observation};
use crate::postgres::pool::Database;
use crate::process::counters;

const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Of objects that users may create without limit, so many are shown.
const MAX_NAMES: usize = 100;

/// `GET /metrics`.
pub(in crate::http) async fn metrics(State(metrics): State<Metrics>) -> Response {
    let label = ("database".into(), metrics.database.name().to_owned().into());
    let mut registry = Registry::with_labels(std::iter::once(label));
    registry.register_collector(Box::new(metrics));
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = encode(&mut text, &registry);
    ([(CONTENT_TYPE, OPENMETRICS)], text).into_response()
}

/// Where the values are.
#[derive(Clone, Debug)]
pub struct Metrics {
    statuses: TaskStatuses,
    seen: LatestObservation,
    leaderless: LeaderlessTasks,
    database: Database,
    /// How often signing keys are replaced, unless that is switched off.
    key_rotation: Option<Duration>,
    started: Timestamp,
}

/// None, or one name and value.
type Labels = Vec<(&'static str, String)>;

impl Metrics {
    pub fn new(
        statuses: TaskStatuses,
        seen: LatestObservation,
        leaderless: LeaderlessTasks,
        database: Database,
        key_rotation: Option<Duration>,
    ) -> Self {
        Self { statuses, seen, leaderless, database, key_rotation, started: Timestamp::now() }
    }

    /// From the first answer of the server on, while it is connected.
    pub(super) fn is_ready(&self) -> bool {
        self.seen.last().is_some()
    }

    /// Tasks that no daemon has led for three periods.
    pub(super) fn leaderless(&self) -> Vec<String> {
        self.leaderless.tasks().into_iter().collect()
    }

    fn process(&self, page: &mut Page<'_>) {
        let version = [(vec![("version", env!("CARGO_PKG_VERSION").to_owned())], 1.0)];
        page.gauge("tollgated_build_info", "The version of the daemon", version);
        page.gauge1("tollgated_start_time_seconds", "When the daemon started", seconds(self.started));
        if let Some(bytes) = resident_bytes() {
            page.gauge1("tollgated_resident_memory_bytes", "Memory of the daemon", bytes);
        }
        let ready = f64::from(u8::from(self.is_ready()));
        page.gauge1("tollgated_ready", "Whether the daemon is connected to the database, 0 or 1", ready);
        page.counter1(
            "tollgated_connects",
            "Connections made to the database",
            float(self.database.connections()),
        );
        for (name, help, count) in [
            (
                "tollgated_connect_failures",
                "Attempts to connect to the database that failed",
                &counters::CONNECT_FAILURES,
            ),
            ("tollgated_listens", "Times that listening for events began", &counters::LISTENS),
            ("tollgated_verified_credentials", "Credentials verified for the HTTP API", &counters::VERIFIED),
            (
                "tollgated_verify_statements",
                "Statements that verified credentials for the HTTP API",
                &counters::VERIFY_STATEMENTS,
            ),
            ("tollgated_streamed_events", "Events sent on /events", &counters::STREAMED_EVENTS),
            (
                "tollgated_event_streams_refused",
                "Requests for /events that were refused",
                &counters::STREAMS_REFUSED,
            ),
        ] {
            page.counter1(name, help, float(count.get()));
        }
        page.counter1(
            "tollgated_quota_leases",
            "Leases of quotas that this daemon had granted",
            float(counters::QUOTAS_LEASED.get()),
        );
        page.gauge1("tollgated_event_streams", "Readers of /events now", float(counters::STREAMS.get()));
        page.gauge(
            "tollgated_key_rotation_seconds",
            "How long a signing key signs until the next one does; absent where that is off",
            self.key_rotation.map(|every| (Labels::new(), every.as_secs_f64())),
        );
        let attempts = [("delivered", &counters::WEBHOOKS_DELIVERED), ("failed", &counters::WEBHOOKS_FAILED)];
        page.counter(
            "tollgated_webhook_attempts",
            "Attempts to send a webhook, by outcome",
            attempts.map(|(outcome, count)| (vec![("outcome", outcome.to_owned())], float(count.get()))),
        );
        let fetches = [("fetched", &counters::KEYS_FETCHED), ("failed", &counters::KEY_FETCHES_FAILED)];
        page.counter(
            "tollgated_key_fetches",
            "Attempts to fetch the keys of an issuer, by outcome",
            fetches.map(|(outcome, count)| (vec![("outcome", outcome.to_owned())], float(count.get()))),
        );
    }

    fn tasks(&self, page: &mut Page<'_>) {
        let statuses = self.statuses.snapshot();
        let each = |value: &dyn Fn(&crate::background::driver::Status) -> Option<f64>| -> Vec<(Labels, f64)> {
            let of = |(name, status): (&&'static str, _)| {
                Some((vec![("task", (*name).to_owned())], value(status)?))
            };
            statuses.iter().filter_map(of).collect()
        };
        page.counter("tollgated_task_runs", "Runs of each task", each(&|s| Some(float(s.runs))));
        page.counter("tollgated_task_failures", "Runs that failed", each(&|s| Some(float(s.failures))));
        page.counter(
            "tollgated_task_items",
            "Tokens, events or rows handled",
            each(&|s| Some(float(s.items))),
        );
        page.counter("tollgated_task_busy_seconds", "Time spent in runs", each(&|s| Some(s.busy_seconds)));
        page.gauge(
            "tollgated_task_last_duration_seconds",
            "How long the last run took",
            each(&|s| s.last_duration_ms.map(|ms| ms / 1e3)),
        );
        page.gauge(
            "tollgated_task_last_success_timestamp_seconds",
            "When the last run that succeeded ended",
            // A daemon that does not lead a task does not run it, which is no failure.
            each(&|s| s.last_success_at.filter(|_| s.leads != Some(false)).map(seconds)),
        );
        page.gauge(
            "tollgated_task_consecutive_failures",
            "Failed runs since the last one that succeeded",
            each(&|s| Some(float(s.consecutive_failures))),
        );
        page.gauge(
            "tollgated_task_leader",
            "Whether this daemon leads the task, for tasks that have a leader, 0 or 1",
            each(&|s| s.leads.map(|leads| f64::from(u8::from(leads)))),
        );
        let leaderless = self.leaderless.tasks();
        page.gauge(
            "tollgated_task_unled",
            "Whether no daemon has led the task for three periods, for tasks that have a leader, 0 or 1",
            statuses.iter().filter(|(_, status)| status.leads.is_some()).map(|(name, _)| {
                (vec![("task", (*name).to_owned())], f64::from(u8::from(leaderless.contains(*name))))
            }),
        );
        page.gauge("tollgated_task_period_seconds", "How often it runs", each(&|s| Some(s.period_seconds)));

        let items = |task: &str| statuses.get(task).map_or(0.0, |status| float(status.items));
        for (name, help, task) in [
            ("tollgated_expired_tokens", "Expiries recorded by this daemon", "expire_tokens"),
            ("tollgated_announced_expiries", "Expiries announced by this daemon", "announce_expiries"),
            ("tollgated_purged_rows", "Tokens, sessions and hours of usage deleted by this daemon", "purge"),
            ("tollgated_purged_events", "Events of the audit log deleted by this daemon", "purge_audit"),
            ("tollgated_flushed_tokens", "Tokens whose usage this daemon flushed", "flush_usage"),
            ("tollgated_logged_events", "Events that this daemon logged", "publish_events"),
            ("tollgated_sealed_events", "Events that this daemon sealed", "seal_audit"),
        ] {
            page.counter1(name, help, items(task));
        }
        if let Some(flush) = statuses.get("flush_usage").filter(|flush| flush.leads != Some(false)) {
            page.gauge1("tollgated_flush_last_tokens", "Tokens in the last flush", float(flush.last_items));
            let lag = flush.last_success_at.unwrap_or(self.started);
            let lag = Timestamp::now().duration_since(lag).as_secs_f64().max(0.0);
            page.gauge1("tollgated_flush_lag_seconds", "Time since the last flush that succeeded", lag);
        }
    }
}

/// What the server counts.
fn server(page: &mut Page<'_>, observation: &Observation) {
    let stats = &observation.stats;
    if let Some(codes) = stats["verifications"].as_object() {
        let codes =
            codes.iter().filter_map(|(code, count)| Some((vec![("code", code.clone())], count.as_f64()?)));
        page.counter("tollgate_verifications", "Verifications since the server started, by code", codes);
    }
    if let Some(latency) = Latency::of(stats) {
        page.histogram(
            "tollgate_verification_seconds",
            "How long verifications took inside the server, of those that were measured",
            &latency,
        );
    }
    if let Some(outcomes) = stats["sessions"].as_object() {
        let outcomes = outcomes
            .iter()
            .filter_map(|(outcome, count)| Some((vec![("outcome", outcome.clone())], count.as_f64()?)));
        page.counter(
            "tollgate_sessions",
            "Sessions opened, and attempts to refresh one, since the server started, by outcome",
            outcomes,
        );
    }
    for (name, help, field) in [
        ("tollgate_overflowed_uses", "Uses that found no room in shared memory", "overflowed"),
        ("tollgate_usage_flushes", "Flushes of usage into the tables", "flushes"),
    ] {
        if let Some(count) = stats[field].as_f64() {
            page.counter1(name, help, count);
        }
    }
    for (name, help, field) in [
        ("tollgate_tracked_keys", "Keys in shared memory", "tracked_keys"),
        (
            "tollgate_busy_keys",
            "Of them, those that cannot make room: counts not flushed, or a limit in use",
            "busy_keys",
        ),
        ("tollgate_tracked_keys_limit", "Keys that shared memory has room for", "max_tracked_keys"),
        ("tollgate_tokens", "Tokens, estimated once they are many", "tokens_estimate"),
    ] {
        if let Some(value) = stats[field].as_f64() {
            page.gauge1(name, help, value);
        }
    }
    if let Some(metering) = stats["metering"].as_bool() {
        page.gauge1("tollgate_metering", "Whether uses are counted, 0 or 1", f64::from(u8::from(metering)));
    }
    let flushed = stats["last_flush_at"].as_str().and_then(|at| at.parse::<Timestamp>().ok());
    if let Some(at) = flushed {
        page.gauge1(
            "tollgate_last_flush_timestamp_seconds",
            "When usage was last flushed, by any daemon",
            seconds(at),
        );
    }
    let sizes = ["api_tokens", "token_usage", "audit_log"].into_iter().filter_map(|table| {
        Some((vec![("table", table.to_owned())], stats[format!("{table}_bytes")].as_f64()?))
    });
    page.gauge("tollgate_table_bytes", "Size of a table with its indexes", sizes);
    page.gauge1(
        "tollgate_notification_queue_usage_ratio",
        "How full the server's queue of notifications is; above 0.5 revocations are not notified, at 1 commits that notify fail",
        observation.notification_queue_usage,
    );

    let keys = &observation.keys;
    page.gauge1("tollgate_master_keys", "Master keys that the server has loaded", float(keys.master_keys));
    for (name, help, value) in [
        (
            "tollgate_can_sign",
            "Whether the server can sign access tokens, 0 or 1; absent where there is no signing key",
            keys.can_sign.map(|can| f64::from(u8::from(can))),
        ),
        (
            "tollgate_signing_key_since_timestamp_seconds",
            "Since when the present signing key signs",
            keys.signs_since,
        ),
        (
            "tollgate_signing_key_until_timestamp_seconds",
            "Until when it signs, once the key that replaces it is there",
            keys.signs_until,
        ),
    ] {
        page.gauge(name, help, value.map(|value| (Labels::new(), value)));
    }

    let subscriptions = || observation.subscriptions.iter().take(MAX_NAMES);
    page.gauge(
        "tollgate_subscription_pending_events",
        "Events that a subscriber has not received yet, counted up to 10000",
        subscriptions().filter_map(|s| Some((vec![("subscription", s.name.clone())], float(s.pending?)))),
    );
    page.gauge(
        "tollgate_subscription_oldest_pending_timestamp_seconds",
        "When the oldest of them happened",
        subscriptions().filter_map(|s| Some((vec![("subscription", s.name.clone())], s.oldest_at?))),
    );
    let webhooks = || observation.webhooks.iter().take(MAX_NAMES);
    let of = |name: &str| vec![("webhook", name.to_owned())];
    page.gauge(
        "tollgate_webhook_enabled",
        "Whether a webhook receives messages, unless it is paused, 0 or 1",
        webhooks().map(|w| (of(&w.name), f64::from(u8::from(w.enabled)))),
    );
    page.gauge(
        "tollgate_webhook_paused",
        "Whether the messages of a webhook wait for resume_webhook, 0 or 1",
        webhooks().map(|w| (of(&w.name), f64::from(u8::from(w.paused)))),
    );
    page.gauge(
        "tollgate_webhook_pending_messages",
        "Messages that wait for a webhook",
        webhooks().map(|w| (of(&w.name), float(w.pending))),
    );
    page.gauge(
        "tollgate_webhook_dead_messages",
        "Messages to a webhook that were given up",
        webhooks().map(|w| (of(&w.name), float(w.dead))),
    );
    let issuers = || observation.issuers.iter().take(MAX_NAMES);
    let of = |name: &str| vec![("issuer", name.to_owned())];
    page.gauge(
        "tollgate_issuer_keys",
        "Keys of a trusted issuer",
        issuers().map(|i| (of(&i.issuer), float(i.keys))),
    );
    let fetched = || issuers().filter(|issuer| issuer.is_fetched);
    page.gauge(
        "tollgate_issuer_keys_fetched_timestamp_seconds",
        "When the keys of a trusted issuer were last fetched",
        fetched().filter_map(|i| Some((of(&i.issuer), i.fetched_at?))),
    );
    page.gauge(
        "tollgate_issuer_fetch_failures",
        "Attempts to fetch the keys of a trusted issuer that failed since the last one that succeeded",
        fetched().map(|i| (of(&i.issuer), float(i.failures))),
    );
}

impl Collector for Metrics {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut page = Page { encoder, result: Ok(()) };
        self.process(&mut page);
        self.tasks(&mut page);
        if let Some(observation) = self.seen.last() {
            server(&mut page, &observation);
        }
        page.result
    }
}

/// Writes metrics, until one cannot be written.
struct Page<'a> {
    encoder: DescriptorEncoder<'a>,
    result: fmt::Result,
}

impl Page<'_> {
    /// The name without `_total`, which is added.
    fn counter(&mut self, name: &str, help: &str, samples: impl IntoIterator<Item = (Labels, f64)>) {
        self.write(name, help, MetricType::Counter, samples);
    }

    fn gauge(&mut self, name: &str, help: &str, samples: impl IntoIterator<Item = (Labels, f64)>) {
        self.write(name, help, MetricType::Gauge, samples);
    }

    /// Without labels.
    fn counter1(&mut self, name: &str, help: &str, value: f64) {
        self.counter(name, help, [(Labels::new(), value)]);
    }

    /// Without labels.
    fn gauge1(&mut self, name: &str, help: &str, value: f64) {
        self.gauge(name, help, [(Labels::new(), value)]);
    }

    fn histogram(&mut self, name: &str, help: &str, latency: &Latency) {
        if self.result.is_ok() {
            self.result = self.try_histogram(name, help, latency);
        }
    }

    fn try_histogram(&mut self, name: &str, help: &str, latency: &Latency) -> fmt::Result {
        let (stem, unit) = unit_of(name);
        let mut metric = self.encoder.encode_descriptor(stem, help, unit.as_ref(), MetricType::Histogram)?;
        let buckets: Vec<(f64, u64)> = latency
            .buckets
            .iter()
            .map(|bucket| (bucket.up_to.unwrap_or(f64::INFINITY), bucket.count))
            .collect();
        metric.encode_histogram::<NoLabelSet>(latency.sum, latency.count, &buckets, None)
    }

    fn write(
        &mut self,
        name: &str,
        help: &str,
        kind: MetricType,
        samples: impl IntoIterator<Item = (Labels, f64)>,
    ) {
        if self.result.is_ok() {
            self.result = self.try_write(name, help, kind, samples);
        }
    }

    fn try_write(
        &mut self,
        name: &str,
        help: &str,
        kind: MetricType,
        samples: impl IntoIterator<Item = (Labels, f64)>,
    ) -> fmt::Result {
        let (stem, unit) = unit_of(name);
        let is_counter = matches!(kind, MetricType::Counter);
        let mut metric = self.encoder.encode_descriptor(stem, help, unit.as_ref(), kind)?;
        for (labels, value) in samples {
            let mut sample = metric.encode_family(&labels)?;
            if is_counter {
                sample.encode_counter::<NoLabelSet, _, f64>(&value, None)?;
            } else {
                sample.encode_gauge(&value)?;
            }
        }
        Ok(())
    }
}

/// OpenMetrics declares the unit that a name ends with.
fn unit_of(name: &str) -> (&str, Option<Unit>) {
    [Unit::Seconds, Unit::Bytes]
        .into_iter()
        .find_map(|unit| Some((name.strip_suffix(unit.as_str())?.strip_suffix('_')?, Some(unit))))
        .unwrap_or((name, None))
}

#[expect(clippy::cast_precision_loss, reason = "Prometheus knows only doubles")]
fn float(number: u64) -> f64 {
    number as f64
}

fn seconds(at: Timestamp) -> f64 {
    at.duration_since(Timestamp::UNIX_EPOCH).as_secs_f64()
}

/// On Linux; left out elsewhere.
fn resident_bytes() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(float(kilobytes * 1024))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Sample;

    impl Collector for Sample {
        fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
            let mut page = Page { encoder, result: Ok(()) };
            let name = "a\"} 1\n\\".to_owned();
            page.gauge("pending", "Help", [(vec![("subscription", name)], 2.0)]);
            page.counter1("busy_seconds", "Help", 0.5);
            page.result
        }
    }

    #[test]
    fn a_name_in_a_label_cannot_write_metrics_and_units_are_declared() {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(Sample));
        let mut text = String::new();
        encode(&mut text, &registry).unwrap();
        assert_eq!(
            text,
            "# HELP pending Help\n# TYPE pending gauge\npending{subscription=\"a\\\"} 1\\n\\\\\"} 2.0\n\
             # HELP busy_seconds Help\n# TYPE busy_seconds counter\n# UNIT busy_seconds seconds\n\
             busy_seconds_total 0.5\n# EOF\n"
        );
    }
}
