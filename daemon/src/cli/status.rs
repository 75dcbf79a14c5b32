//! `tollgated status`: the server's counters, the daemons, and the status of their tasks.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use serde_json::{Value, json};

use crate::background::driver::{Outcome, Status};
use crate::background::leaderless::is_alive;
use crate::cli::output;
use crate::cli::output::{Column, Text, Tone};
use crate::contract::{self, Latency};
use crate::error::Result;
use crate::postgres::target::Target;
use crate::process::{duration, exit};

/// So much of an error stands in the table; the whole of it stands beneath.
const MOST_OF_A_REMARK: usize = 60;

/// How many daemons that are gone are listed.
const MOST_GONE: usize = 3;

pub(super) async fn status(target: Target, json: bool) -> Result<u8> {
    let session = target.connect().await?;
    let stats = contract::stats(&*session).await?;
    let daemons = contract::daemons(&*session).await?;
    let healthy = daemons.iter().any(is_alive);
    if json {
        output::json(&json!({ "healthy": healthy, "stats": stats, "daemons": daemons }))?;
    } else {
        output::line(describe(&stats, &daemons))?;
    }
    Ok(if healthy { exit::OK } else { exit::NO })
}

fn seconds_since_seen(daemon: &Value) -> Option<f64> {
    daemon.get("seconds_since_seen").and_then(Value::as_f64)
}

fn describe(stats: &Value, daemons: &[Value]) -> Text {
    let mut text = output::facts(&server(stats));
    if !daemons.iter().any(is_alive) {
        text = text.then("").then(
            "No daemon was seen within 60 s: start one with `tollgated run`. Until then usage is counted but not \
             flushed, expiries are not recorded, and nothing is purged.",
        );
    }
    let (alive, gone): (Vec<&Value>, Vec<&Value>) = daemons.iter().partition(|daemon| is_alive(daemon));
    for daemon in alive {
        text = text.then("").then(describe_daemon(daemon));
    }
    // The latest show which daemon served here last; one that restarts in a loop would leave hundreds.
    if !gone.is_empty() {
        text = text.then("").then("gone:");
        for daemon in gone.iter().take(MOST_GONE) {
            text = text.then(format!("  {}", headline(daemon)));
        }
        if let Some(more @ 1..) = gone.len().checked_sub(MOST_GONE) {
            text = text.then(format!("  and {more} more within the last day"));
        }
    }
    text
}

fn server(stats: &Value) -> Vec<(&'static str, String)> {
    let text = |name| output::field(stats, name);
    let metering = match stats.get("metering").and_then(Value::as_bool) {
        Some(true) => format!("on since {}", output::moment(stats, "started_at")),
        // The server's own words, which begin with "Off".
        _ => text("metering_detail"),
    };
    let mut facts = vec![
        ("extension", format!("{} (library {})", text("extension_version"), text("library_version"))),
        ("metering", metering),
        ("verifications", verifications(stats.get("verifications"))),
    ];
    if let Some(latency) = Latency::of(stats).filter(|latency| latency.count > 0) {
        facts.push(("duration", durations(&latency)));
    }
    if stats.get("tracked_keys").is_some_and(|keys| !keys.is_null()) {
        facts.push((
            "shared memory",
            format!(
                "{} keys, {} of them busy, of {}; {} overflowed",
                text("tracked_keys"),
                text("busy_keys"),
                text("max_tracked_keys"),
                text("overflowed")
            ),
        ));
    }
    facts.push((
        "flushes",
        format!("{}, last at {}", text("flushes"), output::moment(stats, "last_flush_at")),
    ));
    facts.push((
        "tables",
        format!(
            "{} in {}, usage {}, audit log {}",
            tokens(stats),
            bytes(stats, "api_tokens_bytes"),
            bytes(stats, "token_usage_bytes"),
            bytes(stats, "audit_log_bytes")
        ),
    ));
    facts
}

fn tokens(stats: &Value) -> String {
    match stats.get("tokens_estimate").and_then(Value::as_u64) {
        Some(count) => format!("about {count} tokens"),
        None => "an unknown number of tokens (until ANALYZE tollgate.api_tokens)".to_owned(),
    }
}

/// How long verifications took inside the server.
fn durations(latency: &Latency) -> String {
    let within = |percent| match latency.percentile(percent) {
        Some(seconds) => format!("within {}", took(seconds * 1000.0)),
        None => "longer than a second".to_owned(),
    };
    format!(
        "half {}, 99 % {} (of {} that were measured, one of {})",
        within(50),
        within(99),
        latency.count,
        latency.one_in
    )
}

/// The codes that occurred, the most frequent first.
fn verifications(counts: Option<&Value>) -> String {
    let Some(Value::Object(counts)) = counts else { return "-".to_owned() };
    let mut counts: Vec<(&str, u64)> =
        counts.iter().filter_map(|(code, count)| Some((code.as_str(), count.as_u64()?))).collect();
    counts.retain(|(_, count)| *count > 0);
    counts.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    if counts.is_empty() {
        return "none since the server started".to_owned();
    }
    counts.iter().map(|(code, count)| format!("{count} {code}")).collect::<Vec<_>>().join(", ")
}

fn bytes(stats: &Value, name: &str) -> String {
    match stats.get(name).and_then(Value::as_u64) {
        Some(bytes) => indicatif::BinaryBytes(bytes).to_string(),
        None => "-".to_owned(),
    }
}

fn headline(daemon: &Value) -> String {
    let text = |name| output::field(daemon, name);
    let seen = match seconds_since_seen(daemon) {
        Some(seconds) => {
            format!("seen {} ago", duration::text(Duration::from_secs(seconds.max(0.0) as u64)))
        }
        None => "never seen".to_owned(),
    };
    format!(
        "daemon {} on {}, process {}, started {}, {seen}",
        text("version"),
        text("hostname"),
        text("pid"),
        output::moment(daemon, "started_at"),
    )
}

fn describe_daemon(daemon: &Value) -> Text {
    let description = Text::from(headline(daemon));
    let clock = Clock::of(daemon);
    // Tasks of another version's daemon may look different. What cannot be read is no reason to show nothing.
    let tasks = daemon.get("tasks").cloned().unwrap_or_default();
    match serde_json::from_value::<BTreeMap<String, Status>>(tasks) {
        Ok(tasks) => {
            let table =
                output::table(COLUMNS, tasks.iter().map(|(name, status)| row(name, status, &clock)), |_| {
                    Tone::Plain
                });
            // Those that the table cuts, whole.
            tasks
                .iter()
                .filter_map(|(name, status)| Some((name, status.last_error.as_deref()?)))
                .filter(|(_, error)| output::cut(error, MOST_OF_A_REMARK) != **error)
                .fold(description.then(table), |text, (name, error)| text.then(format!("{name}: {error}")))
        }
        Err(error) => description.then(format!("its tasks cannot be read: {error}")),
    }
}

const COLUMNS: [Column; 9] = [
    Column::whole("TASK"),
    Column::whole("LAST RUN"),
    Column::spare("TOOK"),
    Column::whole("OUTCOME"),
    Column::spare("ITEMS"),
    Column::spare("TOTAL"),
    Column::whole("FAILURES"),
    Column::whole("NEXT RUN"),
    Column::cut("REMARK"),
];

fn row(name: &str, status: &Status, clock: &Clock) -> [String; 9] {
    [
        name.to_owned(),
        clock.ago(status.last_started_at),
        status.last_duration_ms.map_or("-".to_owned(), took),
        status.last_outcome.map_or("-", Outcome::as_str).to_owned(),
        status.last_items.to_string(),
        status.items.to_string(),
        status.consecutive_failures.to_string(),
        clock.until(status.next_run_at),
        remark(status, clock),
    ]
}

fn remark(status: &Status, clock: &Clock) -> String {
    let mut remarks = Vec::new();
    // Most runs take milliseconds, and some always coincide with the report: only a long one is worth a word.
    if status.running
        && let Some(seconds @ 5..) = clock.seconds_before_report(status.last_started_at)
    {
        remarks.push(format!("running for {seconds}s"));
    }
    match status.leads {
        Some(true) => remarks.push("leads".to_owned()),
        Some(false) => remarks.push("another daemon leads".to_owned()),
        None => {}
    }
    remarks.extend(status.last_error.as_deref().map(|error| output::cut(error, MOST_OF_A_REMARK)));
    remarks.extend(status.note.clone());
    remarks.join("; ")
}

/// Turns the times in a daemon's report into "ago" and "in", by the daemon's own clock and the server's: the clock of
/// this machine does not matter.
struct Clock {
    reported_at: Option<Timestamp>,
    seconds_since: i64,
}

impl Clock {
    fn of(daemon: &Value) -> Self {
        Self {
            reported_at: daemon.get("last_seen_at").and_then(Value::as_str).and_then(|at| at.parse().ok()),
            seconds_since: seconds_since_seen(daemon).unwrap_or_default() as i64,
        }
    }

    fn seconds_before_report(&self, time: Option<Timestamp>) -> Option<i64> {
        Some(self.reported_at?.duration_since(time?).as_secs())
    }

    fn ago(&self, time: Option<Timestamp>) -> String {
        match self.seconds_before_report(time) {
            Some(seconds) => format!("{} ago", seconds_text(seconds + self.seconds_since)),
            None => "-".to_owned(),
        }
    }

    fn until(&self, time: Option<Timestamp>) -> String {
        match self.seconds_before_report(time).map(|seconds| -seconds - self.seconds_since) {
            Some(seconds @ 1..) => format!("in {}", seconds_text(seconds)),
            // It has come since the report, or the next run is going on.
            Some(_) => "due".to_owned(),
            None => "-".to_owned(),
        }
    }
}

fn seconds_text(seconds: i64) -> String {
    duration::text(Duration::from_secs(seconds.max(0).unsigned_abs()))
}

fn took(milliseconds: f64) -> String {
    if milliseconds < 0.1 {
        format!("{:.1}µs", milliseconds * 1000.0)
    } else if milliseconds < 1000.0 {
        format!("{milliseconds:.1}ms")
    } else {
        format!("{:.1}s", milliseconds / 1000.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn daemon(seconds: f64) -> Value {
        let task = Status {
            last_outcome: Some(Outcome::Failed),
            last_error: Some("no luck".into()),
            ..Status::default()
        };
        json!({"hostname": "h", "pid": 1, "version": "0.1.0", "started_at": "2030-01-02T03:04:05+00:00",
               "seconds_since_seen": seconds, "tasks": {"purge": task}})
    }

    #[test]
    fn a_daemon_that_was_not_seen_for_a_minute_is_gone() {
        assert!(is_alive(&daemon(59.9)));
        assert!(!is_alive(&daemon(60.1)));
        assert!(!is_alive(&json!({})));
    }

    #[test]
    fn the_description_says_which_task_failed_and_why() {
        let text = describe(&json!({"metering": true}), &[daemon(3.2)]).as_str().to_owned();
        assert!(text.contains("purge") && text.contains("failed") && text.contains("no luck"), "{text}");
        assert!(text.contains("seen 3s ago"), "{text}");
        assert!(!text.contains("No daemon"), "{text}");
    }

    #[test]
    fn a_long_error_is_cut_in_the_table_and_whole_beneath_it() {
        let error = format!("could not purge: {}", "x".repeat(100));
        let task = Status { last_error: Some(error.clone()), ..Status::default() };
        let text = describe_daemon(&json!({"tasks": {"purge": task, "flush": Status::default()}}));
        let lines: Vec<&str> = text.as_str().lines().collect();
        assert!(lines.iter().any(|line| line.starts_with(" purge ") && line.ends_with("x…")), "{lines:?}");
        assert!(lines.contains(&&*format!("purge: {error}")), "{lines:?}");
    }

    fn at(text: &str) -> Option<Timestamp> {
        Some(text.parse().unwrap())
    }

    #[test]
    fn times_are_relative_to_now_by_the_clocks_of_daemon_and_server() {
        let clock = Clock { reported_at: at("2030-01-02T03:04:10Z"), seconds_since: 3 };
        assert_eq!(clock.ago(at("2030-01-02T03:04:05Z")), "8s ago");
        assert_eq!(clock.until(at("2030-01-02T04:04:10Z")), "in 59m 57s");
        assert_eq!(clock.until(at("2030-01-02T03:04:12Z")), "due");
        assert_eq!((clock.ago(None), clock.until(None)), ("-".to_owned(), "-".to_owned()));
        // A daemon whose clock is ahead has not run in the future.
        assert_eq!(clock.ago(at("2030-01-02T03:05:00Z")), "0s ago");
    }

    #[test]
    fn only_a_run_that_takes_long_is_remarked_on() {
        let clock = |text| Clock { reported_at: at(text), seconds_since: 0 };
        let status =
            Status { running: true, last_started_at: at("2030-01-02T03:04:05Z"), ..Status::default() };
        assert_eq!(remark(&status, &clock("2030-01-02T03:04:06Z")), "");
        assert_eq!(remark(&status, &clock("2030-01-02T03:05:05Z")), "running for 60s");
        assert_eq!(remark(&Status { running: false, ..status }, &clock("2030-01-02T03:05:05Z")), "");
    }

    #[test]
    fn of_the_daemons_that_are_gone_only_the_latest_are_listed_and_without_their_tasks() {
        let daemons: Vec<Value> =
            std::iter::once(daemon(1.0)).chain((0..10).map(|_| daemon(3600.0))).collect();
        let text = describe(&json!({}), &daemons).as_str().to_owned();
        assert_eq!(text.matches("seen 1h ago").count(), MOST_GONE, "{text}");
        assert_eq!(text.matches("no luck").count(), 1, "{text}");
        assert!(text.contains("and 7 more"), "{text}");
        assert!(!describe(&json!({}), &daemons[..1]).as_str().contains("gone"));
        assert!(!describe(&json!({}), &daemons[..4]).as_str().contains("more"));
    }

    #[test]
    fn no_daemon_is_said_with_its_consequences() {
        for daemons in [vec![], vec![daemon(3600.0)]] {
            assert!(describe(&json!({}), &daemons).as_str().contains("No daemon was seen"));
        }
    }

    #[test]
    fn metering_that_is_off_is_shown_with_the_reason() {
        let text = describe(&json!({"metering": false, "metering_detail": "Off: not preloaded."}), &[])
            .as_str()
            .to_owned();
        assert!(text.contains("metering       Off: not preloaded."), "{text}");
        assert!(!text.contains("shared memory"), "{text}");
    }

    #[test]
    fn what_is_not_known_is_said_to_be_unknown() {
        assert_eq!(tokens(&json!({"tokens_estimate": 0})), "about 0 tokens");
        assert!(tokens(&json!({"tokens_estimate": null})).starts_with("an unknown number of tokens"));
        assert!(!describe(&json!({"metering": true}), &[]).as_str().contains("duration"));
    }

    #[test]
    fn durations_are_shown_as_bounds() {
        let stats = json!({"verification_latency": {"one_in": 61, "count": 3, "sum": 0.1, "buckets": [
            {"up_to": 0.000005, "count": 2}, {"up_to": 0.25, "count": 1}, {"up_to": null, "count": 0}]}});
        let text = describe(&stats, &[]).as_str().to_owned();
        assert!(text.contains("half within 5.0µs, 99 % within 250.0ms (of 3 that"), "{text}");
    }

    #[test]
    fn only_codes_that_occurred_are_shown_the_most_frequent_first() {
        let counts = json!({"VALID": 5, "EXPIRED": 0, "MALFORMED": 9});
        assert_eq!(verifications(Some(&counts)), "9 MALFORMED, 5 VALID");
        assert_eq!(verifications(Some(&json!({"VALID": 0}))), "none since the server started");
        assert_eq!(verifications(None), "-");
    }
}
