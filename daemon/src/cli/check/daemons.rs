//! The daemons that serve the database: whether there is one, and whether its tasks succeed.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use serde_json::Value;

use super::finding::Finding;
use crate::background::driver::{Outcome, Status};
use crate::background::leaderless::{GONE_AFTER_SECONDS, is_alive, leaderless};
use crate::cli::output;

const NAME: &str = "daemons";

pub(super) fn findings(daemons: &[Value]) -> Vec<Finding> {
    let alive: Vec<&Value> = daemons.iter().filter(|daemon| is_alive(daemon)).collect();
    if alive.is_empty() {
        return vec![Finding::warn(
            NAME,
            format!(
                "none was seen within {GONE_AFTER_SECONDS} s: usage is not flushed, expiries are not recorded, nothing is \
                 purged or published"
            ),
            "tollgated run; or systemctl enable --now tollgated, and journalctl -u tollgated if it does not stay",
        )];
    }
    let mut findings: Vec<Finding> = alive.iter().flat_map(|daemon| of(daemon)).collect();
    for (task, lasting) in leaderless(daemons, Timestamp::now()) {
        findings.push(Finding::fail(
            NAME,
            format!(
                "no daemon has led the task {task} for {}, so its work is not done",
                crate::process::duration::text(Duration::from_secs(lasting.as_secs()))
            ),
            "SELECT pg_terminate_backend(l.pid) FROM pg_locks l, tollgate.leaderships t WHERE l.locktype = 'advisory' AND \
             l.objsubid = 3 AND l.pid = t.pid; (as a superuser: ends the sessions that hold these locks; daemons connect anew)",
        ));
    }
    if findings.is_empty() {
        let them: Vec<String> = alive.iter().map(|daemon| name(daemon)).collect();
        findings.push(Finding::ok(NAME, format!("{} without a failing task", them.join(", "))));
    }
    findings
}

fn name(daemon: &Value) -> String {
    format!("process {} on {}", output::field(daemon, "pid"), output::field(daemon, "hostname"))
}

fn of(daemon: &Value) -> Vec<Finding> {
    let mut findings = Vec::new();
    let (theirs, ours) = (output::field(daemon, "version"), env!("CARGO_PKG_VERSION"));
    if theirs != ours {
        findings.push(Finding::warn(
            NAME,
            format!("{} is version {theirs}, this tollgated is {ours}", name(daemon)),
            "systemctl restart tollgated (there, once both are of one version)",
        ));
    }
    // Tasks of another version's daemon may look different.
    let tasks = daemon.get("tasks").cloned().unwrap_or_default();
    for (task, status) in serde_json::from_value::<BTreeMap<String, Status>>(tasks).unwrap_or_default() {
        if status.last_outcome == Some(Outcome::Waiting) {
            findings.push(Finding::warn(
                NAME,
                format!(
                    "the task {task} of {} waits: {}",
                    name(daemon),
                    status.last_error.as_deref().unwrap_or("the schema is of another version")
                ),
                "bring extension and daemon to one version; the task goes on by itself",
            ));
        }
        if status.consecutive_failures > 0 {
            findings.push(Finding::warn(
                NAME,
                format!(
                    "the task {task} of {} has failed {} times in a row: {}",
                    name(daemon),
                    status.consecutive_failures,
                    status.last_error.as_deref().unwrap_or("it was cut short")
                ),
                "journalctl -u tollgated (there) has the whole error",
            ));
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::cli::check::finding::Verdict;

    fn daemon(seconds: f64, version: &str, failures: u64) -> Value {
        json!({"pid": 7, "hostname": "db1", "version": version, "seconds_since_seen": seconds,
               "tasks": {"purge": {"consecutive_failures": failures, "last_error": "no such table"}}})
    }

    #[test]
    fn one_that_was_not_seen_lately_is_none() {
        for daemons in [&[][..], &[daemon(61.0, env!("CARGO_PKG_VERSION"), 0)]] {
            assert_eq!(findings(daemons)[0].verdict, Verdict::Warn);
        }
        let found = findings(&[daemon(61.0, "0.0.1", 9), daemon(9.0, env!("CARGO_PKG_VERSION"), 0)]);
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!(found[0].verdict, Verdict::Ok);
    }

    #[test]
    fn an_old_version_and_a_failing_task_are_reported() {
        let found = findings(&[daemon(1.0, "0.0.1", 3)]);
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].detail.contains("0.0.1"), "{found:?}");
        assert!(found[1].detail.contains("purge") && found[1].detail.contains("no such table"), "{found:?}");
    }
}
