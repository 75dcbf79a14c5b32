//! The metrics in Prometheus and Grafana: the page of a live daemon, the alert rules, the dashboard, and that each only names
//! existing metrics.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::common::{self, Shared, issue};
use crate::operator::Db;
use crate::web::{LONG, eventually_answers, eventually_measures, get, metrics, run};
use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tollgate_tests::{dev_dir, eventually_async};

static SHARED: Shared = Shared::new(&[]);

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../contrib/monitoring")
}

/// Runs promtool in the folder of the rules, and returns its output if it succeeds.
fn promtool(arguments: &[&str], input: &str) -> Result<String> {
    let program = dev_dir()?.join("promtool");
    ensure!(program.exists(), "{} is missing: `make promtool` fetches it", program.display());
    let mut child = Command::new(program)
        .args(arguments)
        .current_dir(folder())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    child.stdin.take().context("a pipe")?.write_all(input.as_bytes())?;
    let output = child.wait_with_output()?;
    let text = format!("{}{}", String::from_utf8(output.stdout)?, String::from_utf8(output.stderr)?);
    ensure!(output.status.success(), "promtool {arguments:?}: {text}");
    Ok(text)
}

/// Whether each of these is PromQL: promtool reads expressions only from rules.
fn parse(expressions: &[String]) -> Result<()> {
    let rules: Vec<Value> = expressions
        .iter()
        .enumerate()
        .map(|(n, expression)| json!({"record": format!("expression_{n}"), "expr": expression}))
        .collect();
    let file = tempfile::NamedTempFile::new()?;
    fs::write(&file, json!({"groups": [{"name": "all", "rules": rules}]}).to_string())?;
    promtool(&["check", "rules", file.path().to_str().context("a path in UTF-8")?], "").map(drop)
}

/// Name and expression of each alert.
fn alerts() -> Result<BTreeMap<String, String>> {
    let text = fs::read_to_string(folder().join("alerts.yaml"))?;
    let mut alerts = BTreeMap::new();
    for alert in text.split("- alert: ").skip(1) {
        let (name, rest) = alert.split_once('\n').context("a name")?;
        let (_, expression) = rest.split_once("expr: ").context("an expression")?;
        let (expression, _) = expression.split_once("\n        labels:").context("labels after it")?;
        let expression =
            expression.trim_start_matches(">-").split("\n        for:").next().unwrap_or_default();
        alerts.insert(name.to_owned(), expression.to_owned());
    }
    Ok(alerts)
}

fn dashboard() -> Result<Value> {
    let text = fs::read_to_string(folder().join("grafana-dashboard.json"))?;
    serde_json::from_str(&text).context("the dashboard is JSON")
}

fn panels(dashboard: &Value) -> impl Iterator<Item = &Value> {
    dashboard["panels"].as_array().into_iter().flatten().filter(|panel| panel["type"] != "row")
}

/// The expressions of all panels, as Grafana sends them when everything is selected.
fn expressions(dashboard: &Value) -> Vec<String> {
    panels(dashboard)
        .flat_map(|panel| panel["targets"].as_array().into_iter().flatten())
        .map(|target| target["expr"].as_str().unwrap_or_default())
        .map(|text| {
            ["$cluster", "$database", "$instance"]
                .iter()
                .fold(text.replace("$__rate_interval", "5m"), |text, variable| text.replace(variable, ".*"))
        })
        .collect()
}

/// Our names in a text, whatever surrounds them.
fn named(text: &str) -> BTreeSet<String> {
    text.split(|c: char| !(c.is_ascii_lowercase() || c == '_'))
        .filter(|word| word.starts_with("tollgate_") || word.starts_with("tollgated_"))
        .filter(|word| !word.ends_with('_'))
        .map(str::to_owned)
        .collect()
}

#[test]
fn each_alert_fires_and_does_not_fire_as_its_tests_say() -> Result<()> {
    let text = promtool(&["check", "rules", "alerts.yaml"], "")?;
    assert!(text.contains("SUCCESS"), "{text}");
    let text = promtool(&["test", "rules", "alerts.test.yaml"], "")?;
    assert!(text.contains("SUCCESS"), "{text}");

    // In the first test nothing may fire, and its series are those of every alert; each fires in a later one.
    let tests = fs::read_to_string(folder().join("alerts.test.yaml"))?;
    let mut tests = tests.split("- name: ").skip(1);
    let (quiet, firing) = (tests.next().context("a test")?, tests.collect::<String>());
    assert!(
        quiet.contains("{expr: 'ALERTS{alertstate=\"firing\"}', eval_time: 1h, exp_samples: []}"),
        "{quiet}"
    );
    for (name, expression) in alerts()? {
        assert!(
            firing.contains(&format!("alertname=\"{name}\", alertstate=\"firing\"")),
            "{name} never fires"
        );
        for metric in named(&expression) {
            assert!(
                quiet.contains(&format!("'{metric}{{")),
                "nothing says that {name} can be quiet about {metric}"
            );
        }
    }
    Ok(())
}

#[test]
fn an_alert_speaks_only_of_labels_that_it_has() -> Result<()> {
    let rules = fs::read_to_string(folder().join("alerts.yaml"))?;
    let tests = fs::read_to_string(folder().join("alerts.test.yaml"))?;
    for rule in rules.split("- alert: ").skip(1) {
        let name = rule.lines().next().unwrap_or_default();
        let mark = format!("alertname=\"{name}\", alertstate=\"firing\"");
        let fired =
            tests.lines().find(|line| line.contains(&mark)).with_context(|| format!("{name} fires"))?;
        for label in rule.split("$labels.").skip(1) {
            let label =
                label.split(|c: char| !(c.is_ascii_lowercase() || c == '_')).next().unwrap_or_default();
            assert!(fired.contains(&format!("{label}=\"")), "{name} names the label {label}, of {fired}");
        }
    }
    Ok(())
}

#[test]
fn the_dashboard_is_of_expressions_that_parse_with_units_and_variables() -> Result<()> {
    let dashboard = dashboard()?;
    let expressions = expressions(&dashboard);
    assert!(expressions.len() >= 30, "{expressions:#?}");
    parse(&expressions)?;
    assert!(parse(&["sum(".to_owned()]).is_err(), "and promtool would say if they did not");
    let mut ids = BTreeSet::new();
    for panel in panels(&dashboard) {
        assert!(panel["fieldConfig"]["defaults"]["unit"].is_string(), "no unit: {}", panel["title"]);
        assert_eq!(panel["datasource"]["uid"], "${datasource}", "{}", panel["title"]);
        assert!(ids.insert(panel["id"].to_string()), "two panels have the id {}", panel["id"]);
        for target in panel["targets"].as_array().context("targets")? {
            let text = target["expr"].as_str().context("an expression")?;
            // If one of several servers is selected, it must be shown without the others.
            assert_eq!(text.matches("$cluster").count(), text.matches('{').count(), "{text}");
            for metric in named(text).iter().filter(|name| !text.contains(&format!("\"{name}\""))) {
                assert!(text.contains(&format!("{metric}{{")), "{metric} of every server: {text}");
            }
        }
    }
    let variables = dashboard["templating"]["list"].as_array().context("variables")?;
    let names: Vec<&str> = variables.iter().filter_map(|variable| variable["name"].as_str()).collect();
    assert_eq!(names, ["datasource", "cluster", "database", "instance"]);
    Ok(())
}

#[test]
fn figures_that_every_daemon_reads_from_the_server_are_never_summed() -> Result<()> {
    let mut all: Vec<String> = expressions(&dashboard()?);
    all.extend(alerts()?.into_values());
    let mut read = 0;
    for expression in &all {
        for (at, _) in expression.match_indices("tollgate_") {
            read += 1;
            // The innermost aggregation around it.
            let before = &expression[..at];
            let around = ["sum", "avg", "count", "max", "min", "group"]
                .iter()
                .filter_map(|operator| Some((before.rfind(&format!("{operator} by ("))?, *operator)))
                .max();
            let operator = around.map_or("none", |(_, operator)| operator);
            assert!(
                ["max", "min"].contains(&operator),
                "{operator} of what each daemon repeats: {expression}"
            );
        }
    }
    assert!(read > 30, "{read}");
    Ok(())
}

/// The page in the format that promtool reads, in which a counter is declared under the name of its samples.
fn classic(page: &str) -> String {
    let counters: BTreeSet<&str> =
        page.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.strip_suffix(" counter")).collect();
    let line = |line: &str| {
        let mut words = line.splitn(4, ' ');
        match (words.next(), words.next(), words.next(), words.next()) {
            (Some("#"), Some(kind), Some(name), Some(rest)) if counters.contains(name) => {
                format!("# {kind} {name}_total {rest}\n")
            }
            _ if line == "# EOF" => String::new(),
            _ => format!("{line}\n"),
        }
    };
    page.lines().map(line).collect()
}

#[tokio::test]
async fn the_page_of_a_live_daemon_pleases_promtool_and_is_all_that_is_shown_or_documented() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "shown").await?;
    db.owner.execute("select tollgate.define_webhook('crm', 'https://crm.invalid/')", &[]).await?;
    // The key that signs, and the next one.
    let create = "select tollgate.create_signing_key() from generate_series(1, 2)";
    db.owner.execute(create, &[]).await?;
    let trust = "select tollgate.trust_issuer('https://id.invalid', 'id:', '{https://api.test}')";
    db.owner.execute(trust, &[]).await?;
    let (_daemon, address) = run(&db.url(), &["--flush-interval=100ms"]).await?;
    eventually_answers(address, "/readyz", 200).await;
    eventually_measures(address, "tollgate_signing_key_until_timestamp_seconds", |until| until > 1.7e9).await;
    eventually_measures(address, "tollgate_webhook_enabled{webhook=\"crm\"}", |enabled| enabled == 1.0).await;
    // Events that are never read have an oldest one.
    db.operator.execute("select tollgate.open_subscription('elsewhere')", &[]).await?;
    let token = issue(&db.owner, "ann", &[]).await?;
    let since = "tollgate_subscription_oldest_pending_timestamp_seconds{subscription=\"elsewhere\"}";
    eventually_measures(address, since, |since| since > 0.0).await;
    // The leader shows the metrics of flushes, and the time of the last one once something was flushed.
    db.owner.query_one("select code from tollgate.verify_api_token($1)", &[&token.token]).await?;
    eventually_measures(address, "tollgate_last_flush_timestamp_seconds", |at| at > 1.7e9).await;
    eventually_measures(address, "tollgated_task_leader{task=\"flush_usage\"}", |leads| leads == 1.0).await;

    let page = get(address, "/metrics", &[]).await?.body;
    let text = promtool(&["check", "metrics"], &classic(&page))?;
    assert_eq!(text, "");
    let failure = promtool(&["check", "metrics"], "# TYPE x counter\nx 1\n").expect_err("it is refused");
    assert!(failure.to_string().contains("_total"), "{failure}");

    let mut there: BTreeSet<String> = metrics(address)
        .await?
        .keys()
        .map(|name| name.split('{').next().unwrap_or(name).to_owned())
        .collect();
    let typed = page.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next());
    there.extend(typed.map(str::to_owned));

    let shown = [("dashboard", expressions(&dashboard()?)), ("alerts", alerts()?.into_values().collect())];
    for (file, expressions) in shown {
        let used = named(&expressions.concat());
        assert!(used.len() >= 15, "{file}: {used:?}");
        let unknown: Vec<&String> = used.difference(&there).collect();
        assert!(unknown.is_empty(), "{file} uses {unknown:?}, of {there:#?}");
    }
    let documented = named(include_str!("../../../docs/metrics.md"));
    // The type of a counter is declared without `_total`; a histogram has samples with several names.
    let parts = ["_bucket", "_sum", "_count"];
    let samples = there.iter().filter(|name| {
        !there.contains(&format!("{name}_total"))
            && !parts.iter().any(|part| name.strip_suffix(part).is_some_and(|whole| there.contains(whole)))
    });
    let undocumented: Vec<&String> = samples.filter(|name| !documented.contains(*name)).collect();
    assert!(undocumented.is_empty(), "not in docs/metrics.md: {undocumented:?}");
    let gone: Vec<&String> = documented.iter().filter(|name| !there.contains(*name)).collect();
    assert!(gone.is_empty(), "in docs/metrics.md, and not there: {gone:?}");
    Ok(())
}

#[tokio::test]
async fn the_histogram_is_of_the_verifications_in_this_database() -> Result<()> {
    let cluster = SHARED.cluster()?;
    let db = Db::create(&cluster, "timed").await?;
    let other = Db::create(&cluster, "timed_elsewhere").await?;
    let token = issue(&db.owner, "ann", &[]).await?.token;
    let measured = async |db: &Db| -> Result<Value> {
        common::value(&db.owner, "select verification_latency from tollgate.stats()").await
    };
    let one_in = measured(&db).await?["one_in"].as_i64().context("a number")?;
    // Three rounds of one session, of which one call each is measured, whatever its code.
    let calls = "select count(tollgate.verify_api_token(case when n % 2 = 0 then $1 else 'x' end)) from generate_series(1, $2::bigint) n";
    db.owner.query_one(calls, &[&token, &(3 * one_in)]).await?;
    let latency = measured(&db).await?;
    assert_eq!(latency["count"], json!(3), "{latency}");
    let buckets = latency["buckets"].as_array().context("buckets")?;
    assert_eq!(buckets.iter().filter_map(|bucket| bucket["count"].as_i64()).sum::<i64>(), 3, "{latency}");
    assert_eq!(buckets.last().map(|bucket| &bucket["up_to"]), Some(&Value::Null));
    assert!(latency["sum"].as_f64().is_some_and(|sum| sum > 0.0), "{latency}");
    assert_eq!(measured(&other).await?["count"], json!(0));

    let (_daemon, address) = run(&db.url(), &[]).await?;
    eventually_measures(address, "tollgate_verification_seconds_count", |count| count == 3.0).await;
    let page = metrics(address).await?;
    let bucket =
        |le: &str| page.get(&format!("tollgate_verification_seconds_bucket{{le=\"{le}\"}}")).copied();
    assert_eq!((bucket("+Inf"), bucket("1.0").is_some()), (Some(3.0), true), "{page:#?}");
    eventually_async(LONG, "both databases to be distinguished", async || {
        let text = get(address, "/metrics", &[]).await.unwrap().body;
        text.contains("tollgate_verification_seconds_count{database=\"timed\"} 3")
    })
    .await;
    Ok(())
}
