//! Tasks of which one daemon does all the work, and which no daemon has led for some time.
//!
//! The cause is a session that holds the lock and is no daemon, or daemons that cannot ask for it: each of them works, so
//! nothing but this shows that the task is not run.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde_json::Value;

use crate::background::driver::Status;

/// A daemon that has not reported for longer counts as gone. It reports every ten seconds.
pub const GONE_AFTER_SECONDS: f64 = 60.0;
/// Of a task's periods.
const PATIENCE: u32 = 3;
/// No period counts as shorter: reports are as old as that.
const SHORTEST: Duration = Duration::from_secs(10);

/// The tasks that were found leaderless at each of the last two looks, since after an outage the reports of one look may be
/// older than it.
#[derive(Clone, Debug, Default)]
pub struct LeaderlessTasks(Arc<Mutex<Looks>>);

#[derive(Debug, Default)]
struct Looks {
    last: BTreeSet<String>,
    twice: BTreeSet<String>,
}

impl LeaderlessTasks {
    pub fn tasks(&self) -> BTreeSet<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).twice.clone()
    }

    pub fn put(&self, tasks: BTreeMap<String, Duration>) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let last = std::mem::replace(&mut known.last, tasks.into_keys().collect());
        let twice: BTreeSet<String> = known.last.intersection(&last).cloned().collect();
        for task in twice.difference(&known.twice) {
            tracing::warn!(
                task,
                "no daemon leads this task: does a session hold its lock that is no daemon? `tollgated check` says more"
            );
        }
        known.twice = twice;
    }
}

pub fn is_alive(daemon: &Value) -> bool {
    daemon
        .get("seconds_since_seen")
        .and_then(Value::as_f64)
        .is_some_and(|seconds| seconds <= GONE_AFTER_SECONDS)
}

/// From the rows of `tollgate.daemons`: each task that a daemon competes for and none has led for three periods, and for how long.
pub fn leaderless(daemons: &[Value], now: Timestamp) -> BTreeMap<String, Duration> {
    let mut tasks: BTreeMap<String, TaskState> = BTreeMap::new();
    for daemon in daemons {
        let alive = is_alive(daemon);
        let since =
            daemon.get("started_at").and_then(Value::as_str).and_then(|at| at.parse::<Timestamp>().ok());
        // Tasks of another version's daemon may look different.
        let statuses = daemon.get("tasks").cloned().unwrap_or_default();
        for (task, status) in serde_json::from_value::<BTreeMap<String, Status>>(statuses).unwrap_or_default()
        {
            let Some(leads) = status.leads else { continue };
            let state = tasks.entry(task).or_default();
            state.last_at = state.last_at.max(status.led_at);
            if alive {
                state.led |= leads;
                state.wanted_since = [state.wanted_since, since].into_iter().flatten().min();
                let period = Duration::try_from_secs_f64(status.period_seconds).unwrap_or_default();
                state.period = state.period.max(period);
            }
        }
    }
    tasks.into_iter().filter_map(|(task, state)| Some((task, state.leaderless_for(now)?))).collect()
}

#[derive(Default)]
struct TaskState {
    led: bool,
    last_at: Option<Timestamp>,
    wanted_since: Option<Timestamp>,
    period: Duration,
}

impl TaskState {
    fn leaderless_for(&self, now: Timestamp) -> Option<Duration> {
        // Before any daemon was there to lead it, the task was not expected to run.
        let since = self.wanted_since?.max(self.last_at.unwrap_or(Timestamp::MIN));
        let lasting = now.duration_since(since).max(SignedDuration::ZERO).unsigned_abs();
        (!self.led && lasting > self.period.max(SHORTEST) * PATIENCE).then_some(lasting)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(1_900_000_000 + seconds).unwrap()
    }

    fn daemon(seen: f64, leads: bool, led_at: Option<i64>, period: f64) -> Value {
        json!({"seconds_since_seen": seen, "started_at": at(0).to_string(), "tasks": {
            "purge": {"leads": leads, "led_at": led_at.map(|second| at(second).to_string()), "period_seconds": period},
            "heartbeat": {"period_seconds": 10.0}}})
    }

    fn tasks(daemons: &[Value], now: i64) -> Vec<String> {
        leaderless(daemons, at(now)).into_keys().collect()
    }

    #[test]
    fn a_task_without_a_leader_for_three_periods_is_named() {
        let waiting = daemon(1.0, false, None, 20.0);
        assert_eq!(tasks(std::slice::from_ref(&waiting), 60), Vec::<String>::new());
        assert_eq!(tasks(std::slice::from_ref(&waiting), 61), ["purge"]);
        let was_led = daemon(100.0, true, Some(30), 20.0);
        assert_eq!(tasks(&[waiting.clone(), was_led.clone()], 90), Vec::<String>::new());
        assert_eq!(tasks(&[waiting, was_led], 91), ["purge"]);
    }

    #[test]
    fn a_task_that_one_leads_is_led_and_one_without_a_daemon_is_not_wanted() {
        let (waiting, leading) = (daemon(1.0, false, None, 1.0), daemon(1.0, true, Some(1), 1.0));
        assert_eq!(tasks(&[waiting, leading], 1000), Vec::<String>::new());
        assert_eq!(tasks(&[daemon(100.0, false, None, 1.0)], 1000), Vec::<String>::new());
    }

    #[test]
    fn only_a_task_that_two_looks_found_is_reported() {
        let leaderless = LeaderlessTasks::default();
        let found = || BTreeMap::from([("purge".to_owned(), Duration::from_secs(60))]);
        leaderless.put(found());
        assert!(leaderless.tasks().is_empty());
        leaderless.put(found());
        assert_eq!(leaderless.tasks().into_iter().collect::<Vec<_>>(), ["purge"]);
        leaderless.put(BTreeMap::new());
        assert!(leaderless.tasks().is_empty());
    }

    #[test]
    fn short_periods_count_as_long_as_reports_are_old() {
        assert_eq!(tasks(&[daemon(1.0, false, None, 0.1)], 30), Vec::<String>::new());
        assert_eq!(tasks(&[daemon(1.0, false, None, 0.1)], 31), ["purge"]);
    }
}
