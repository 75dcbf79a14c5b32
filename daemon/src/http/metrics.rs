//! `/metrics`: what the daemon knows, in the format of Prometheus.
//!
//! A page is made of values that are at hand, at the moment it is asked for. Names follow Prometheus' conventions:
//! `tollgated_` is this process, `tollgate_` the server. Labels are names of tasks, codes, subscriptions and webhooks: a
//! bounded number, and none of them a secret. To add a metric, add it to one of the groups below, to the dashboard or the
//! alerts if people should see it, and to docs/metrics.md.

use std::sync::atomic::AtomicU64;

use jiff::Timestamp;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::background::driver::TaskStatuses;
use crate::background::leaderless::LeaderlessTasks;
use crate::background::tasks::observe::LatestObservation;
use crate::contract::Observation;
use crate::postgres::pool::Database;
use crate::process::counters;

pub(super) const CONTENT: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Of what people may make as many as they like, so many are shown.
const MAX_NAMES: usize = 100;

/// Where the values are.
#[derive(Clone, Debug)]
pub struct Metrics {
    statuses: TaskStatuses,
    seen: LatestObservation,
    leaderless: LeaderlessTasks,
    database: Database,
    started: Timestamp,
}

type Labels = Vec<(&'static str, String)>;

impl Metrics {
    pub fn new(
        statuses: TaskStatuses,
        seen: LatestObservation,
        leaderless: LeaderlessTasks,
        database: Database,
    ) -> Self {
        Self { statuses, seen, leaderless, database, started: Timestamp::now() }
    }

    /// From the first answer of the server on, while it is connected.
    pub(super) fn is_ready(&self) -> bool {
        self.seen.last().is_some()
    }

    /// Tasks that no daemon has led for three periods.
    pub(super) fn leaderless(&self) -> Vec<String> {
        self.leaderless.tasks().into_iter().collect()
    }

    pub(super) fn page(&self) -> String {
        let mut page = Page::default();
        self.process(&mut page);
        self.tasks(&mut page);
        if let Some(observation) = self.seen.last() {
            server(&mut page, &observation);
        }
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = encode(&mut text, &page.0);
        text
    }

    fn process(&self, page: &mut Page) {
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
            ("tollgated_streamed_events", "Events told on /events", &counters::STREAMED_EVENTS),
            (
                "tollgated_event_streams_refused",
                "Readers of /events that were turned away",
                &counters::STREAMS_REFUSED,
            ),
        ] {
            page.counter1(name, help, float(count.get()));
        }
        page.gauge1("tollgated_event_streams", "Readers of /events now", float(counters::STREAMS.get()));
        let attempts = [("delivered", &counters::WEBHOOKS_DELIVERED), ("failed", &counters::WEBHOOKS_FAILED)];
        page.counter(
            "tollgated_webhook_attempts",
            "Attempts to send a webhook, by what came of them",
            attempts.map(|(outcome, count)| (vec![("outcome", outcome.to_owned())], float(count.get()))),
        );
    }

    fn tasks(&self, page: &mut Page) {
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
            // Who does not lead succeeds in nothing, and nothing is wrong with that.
            each(&|s| s.last_success_at.filter(|_| s.leads != Some(false)).map(seconds)),
        );
        page.gauge(
            "tollgated_task_consecutive_failures",
            "Failed runs since the last one that succeeded",
            each(&|s| Some(float(s.consecutive_failures))),
        );
        page.gauge(
            "tollgated_task_leader",
            "Of tasks that one daemon does for all: whether it is this one, 0 or 1",
            each(&|s| s.leads.map(|leads| f64::from(u8::from(leads)))),
        );
        let leaderless = self.leaderless.tasks();
        page.gauge(
            "tollgated_task_unled",
            "Of tasks that one daemon does for all: whether none has led it for three periods, 0 or 1",
            statuses.iter().filter(|(_, status)| status.leads.is_some()).map(|(name, _)| {
                (vec![("task", (*name).to_owned())], f64::from(u8::from(leaderless.contains(*name))))
            }),
        );
        page.gauge("tollgated_task_period_seconds", "How often it runs", each(&|s| Some(s.period_seconds)));

        let items = |task: &str| statuses.get(task).map_or(0.0, |status| float(status.items));
        for (name, help, task) in [
            ("tollgated_expired_tokens", "Expiries recorded by this daemon", "expire_tokens"),
            ("tollgated_announced_expiries", "Expiries announced by this daemon", "announce_expiries"),
            ("tollgated_purged_rows", "Tokens and hours of usage deleted by this daemon", "purge"),
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
fn server(page: &mut Page, observation: &Observation) {
    let stats = &observation.stats;
    if let Some(codes) = stats["verifications"].as_object() {
        let codes =
            codes.iter().filter_map(|(code, count)| Some((vec![("code", code.clone())], count.as_f64()?)));
        page.counter("tollgate_verifications", "Verifications since the server started, by code", codes);
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
        ("tollgate_tracked_keys_limit", "Keys that shared memory has room for", "max_tracked_keys"),
        ("tollgate_tokens", "Tokens, as the planner estimates", "tokens_estimate"),
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
            "When usage was last flushed, by anybody",
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

    let subscriptions = || observation.subscriptions.iter().take(MAX_NAMES);
    page.gauge(
        "tollgate_subscription_pending_events",
        "Events that a subscriber was not told of yet, counted up to 10000",
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
        "Whether events are kept for a webhook, and sent unless it is paused, 0 or 1",
        webhooks().map(|w| (of(&w.name), f64::from(u8::from(w.enabled)))),
    );
    page.gauge(
        "tollgate_webhook_paused",
        "Whether what is kept for a webhook waits for resume_webhook, 0 or 1",
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
}

/// A page in the making.
#[derive(Default)]
struct Page(Registry);

impl Page {
    /// The name without `_total`, which is added.
    fn counter(&mut self, name: &str, help: &str, samples: impl IntoIterator<Item = (Labels, f64)>) {
        let family = Family::<Labels, Counter<f64, AtomicU64>>::default();
        for (labels, value) in samples {
            family.get_or_create(&labels).inc_by(value);
        }
        self.0.register(name, help, family);
    }

    fn gauge(&mut self, name: &str, help: &str, samples: impl IntoIterator<Item = (Labels, f64)>) {
        let family = Family::<Labels, Gauge<f64, AtomicU64>>::default();
        for (labels, value) in samples {
            family.get_or_create(&labels).set(value);
        }
        self.0.register(name, help, family);
    }

    /// Without labels.
    fn counter1(&mut self, name: &str, help: &str, value: f64) {
        let counter = Counter::<f64, AtomicU64>::default();
        counter.inc_by(value);
        self.0.register(name, help, counter);
    }

    /// Without labels.
    fn gauge1(&mut self, name: &str, help: &str, value: f64) {
        let gauge = Gauge::<f64, AtomicU64>::default();
        gauge.set(value);
        self.0.register(name, help, gauge);
    }
}

#[expect(clippy::cast_precision_loss, reason = "Prometheus knows nothing but doubles")]
fn float(number: u64) -> f64 {
    number as f64
}

fn seconds(at: Timestamp) -> f64 {
    at.duration_since(Timestamp::UNIX_EPOCH).as_secs_f64()
}

/// Of Linux; elsewhere it is left out.
fn resident_bytes() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(float(kilobytes * 1024))
}
