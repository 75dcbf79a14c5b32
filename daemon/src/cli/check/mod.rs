//! `tollgated check`: goes through everything that a deployment needs, and prints the command that fixes each problem.
//!
//! What can be seen from inside the database is judged there, by `tollgate.deployment_health()`; here is judged what shows
//! only to a client, and what is to be said where that function cannot be called.

mod daemons;
mod finding;
mod identity;
mod log;
mod privileges;

use std::time::{Duration, Instant};

use jiff::Timestamp;
use serde_json::{Value, json};
use tokio_postgres::Client;

use crate::background::listener;
use crate::cli::output;
use crate::config::CheckOptions;
use crate::contract;
use crate::error::{Doing as _, Kind, Result};
use crate::postgres::pooler_probe;
use crate::postgres::session::Session;
use crate::postgres::target::Target;
use crate::process::{duration, exit};
use finding::{Finding, Verdict, describe};
use privileges::Privileges;

/// The oldest major that the extension is built for.
const OLDEST_SERVER: i32 = 15;
const NEWEST_SERVER: i32 = 18;

pub(super) async fn check(target: Target, standbys: Vec<Target>, options: CheckOptions) -> Result<u8> {
    let mut findings = vec![pooler_finding(&target).await?];
    // Through a pooler each answer might be another session's, and what is asked would leave settings and a LISTEN behind.
    if findings[0].verdict != Verdict::Fail {
        let mut session = target.connect().await?;
        findings.extend(examine(&target, &mut session, options.patience).await?);
    }
    for standby in &standbys {
        findings.push(standby_finding(standby).await);
    }
    let ok = findings.iter().all(|finding| match finding.verdict {
        Verdict::Ok => true,
        Verdict::Warn => !options.strict,
        Verdict::Fail => false,
    });
    if options.output.json {
        output::json(&json!({ "ok": ok, "findings": findings }))?;
    } else {
        for finding in &findings {
            if !(options.output.quiet && finding.verdict == Verdict::Ok) {
                output::line(describe(finding))?;
            }
        }
    }
    Ok(if ok { exit::OK } else { exit::NO })
}

/// Whether sessions are ours. Fails if there is no way to the server at all.
async fn pooler_finding(target: &Target) -> Result<Finding> {
    const NAME: &str = "pooler";
    let target = target.without_settings();
    let one = target.connect().await?;
    let examined = async { pooler_probe::examine(&one, &target.connect().await?).await };
    Ok(match examined.await {
        Ok(()) => Finding::ok(NAME, "no pooler in transaction mode is in between"),
        Err(error) if error.kind() == Kind::Usage => {
            let mut finding = Finding::error(NAME, &error);
            finding.detail.push_str("; nothing else was examined through it");
            finding
        }
        Err(error) => Finding::warn(
            NAME,
            format!("cannot tell whether a pooler in transaction mode is in between: {}", error.message()),
            error
                .remedy()
                .or(error.hint())
                .unwrap_or("tollgated check (again, once the server is less busy)"),
        ),
    })
}

async fn examine(target: &Target, session: &mut Session, patience: Duration) -> Result<Vec<Finding>> {
    let server = Server::ask(session).await?;
    let mut findings = vec![
        connection(target, &server),
        version(server.version_num),
        recovery(server.in_recovery),
        role(&server),
        clock(session).await?,
    ];
    let extension = Extension::ask(session).await?;
    let installed = extension.installed.is_some();
    findings.push(extension_finding(&extension));
    if installed {
        let privileges = Privileges::ask(session).await?;
        findings.extend(privileges.findings(&server.quoted_role));
        if privileges.are_those_of_the_daemon() {
            findings.extend(contents(session, patience).await);
        }
    }
    findings.push(if server.in_recovery {
        Finding::warn("listen", "a standby takes no LISTEN", "connect to the primary")
    } else {
        match listener::begin(session).await {
            Ok(()) => Finding::ok("listen", "a notification of our own came back"),
            Err(error) => Finding::error("listen", &error),
        }
    });
    if installed {
        findings.extend(log::logging(session).await?);
        findings.push(log::auto_explain(session).await?);
        findings.push(identity::identity_changes(session).await?);
    }
    Ok(findings)
}

/// Who serves us, and whom it takes us for.
struct Server {
    version_num: i32,
    version: String,
    in_recovery: bool,
    quoted_role: String,
    superuser: bool,
}

impl Server {
    async fn ask(client: &Client) -> Result<Self> {
        const DOING: &str = "ask the server what it is";
        let row = client
            .query_one(
                "select current_setting('server_version_num')::int, current_setting('server_version'), \
                        pg_is_in_recovery(), quote_ident(current_user), r.rolsuper \
                 from pg_roles r where r.rolname = current_user",
                &[],
            )
            .await
            .doing(DOING)?;
        Ok(Self {
            version_num: row.try_get(0).doing(DOING)?,
            version: row.try_get(1).doing(DOING)?,
            in_recovery: row.try_get(2).doing(DOING)?,
            quoted_role: row.try_get(3).doing(DOING)?,
            superuser: row.try_get(4).doing(DOING)?,
        })
    }
}

fn connection(target: &Target, server: &Server) -> Finding {
    let place = format!("{}, PostgreSQL {}", target.describe(), server.version);
    let plaintext = target.plaintext_hosts();
    if plaintext.is_empty() {
        return Finding::ok("connection", place);
    }
    Finding::warn(
        "connection",
        format!("{place}; encryption is not insisted on to {}", plaintext.join(", ")),
        "give sslmode=verify-full and sslrootcert in the connection string",
    )
}

fn version(version_num: i32) -> Finding {
    let major = version_num / 10_000;
    if major < OLDEST_SERVER {
        Finding::fail(
            "server",
            format!("PostgreSQL {major} is older than {OLDEST_SERVER}, the oldest that Tollgate supports"),
            format!("upgrade the server to PostgreSQL {OLDEST_SERVER} or later (pg_upgrade)"),
        )
    } else if major > NEWEST_SERVER {
        Finding::warn(
            "server",
            format!("PostgreSQL {major} is newer than {NEWEST_SERVER}, the newest that this version knows"),
            "upgrade Tollgate",
        )
    } else {
        Finding::ok("server", format!("PostgreSQL {major} is supported"))
    }
}

fn recovery(in_recovery: bool) -> Finding {
    if in_recovery {
        return Finding::fail(
            "primary",
            "this server is a standby: usage cannot be applied and nothing can be recorded here",
            "connect to the primary, or list all hosts with target_session_attrs=read-write",
        );
    }
    Finding::ok("primary", "the server takes writes")
}

/// That usage can be carried from there.
async fn standby_finding(standby: &Target) -> Finding {
    const NAME: &str = "standby";
    let place = standby.describe();
    let asked = async {
        let session = standby.connect().await?;
        let server = Server::ask(&session).await?;
        let stats = contract::stats(&*session).await?;
        Ok((server.in_recovery, stats))
    };
    match asked.await {
        Err(error) => Finding::error(NAME, &error),
        Ok((_, stats)) if stats.get("metering").and_then(Value::as_bool) != Some(true) => Finding::fail(
            NAME,
            format!("{place}: {}", output::field(&stats, "metering_detail")),
            "add tollgate to shared_preload_libraries in the standby's postgresql.conf and restart it",
        ),
        Ok((false, _)) => Finding::warn(
            NAME,
            format!(
                "{place} is no standby: its usage is flushed by the daemon that names it in --database-url"
            ),
            "if it was promoted, name it in --database-url; else name its standbys in --standby",
        ),
        Ok((true, _)) => Finding::ok(NAME, format!("{place} is a standby that counts usage")),
    }
}

fn role(server: &Server) -> Finding {
    let role = &server.quoted_role;
    if server.superuser {
        return Finding::warn(
            "role",
            format!("{role} is a superuser, and the daemon needs a few functions only"),
            "create role tollgated login; select tollgate.grant_capability('tollgated', 'operator')",
        );
    }
    Finding::ok("role", format!("{role} is an ordinary role"))
}

struct Extension {
    installed: Option<String>,
    available: Option<String>,
}

impl Extension {
    async fn ask(client: &Client) -> Result<Self> {
        const DOING: &str = "look for the extension";
        let row = client
            .query_one(
                "select (select extversion from pg_extension where extname = 'tollgate'), \
                        (select default_version::text from pg_available_extensions where name = 'tollgate')",
                &[],
            )
            .await
            .doing(DOING)?;
        Ok(Self { installed: row.try_get(0).doing(DOING)?, available: row.try_get(1).doing(DOING)? })
    }
}

fn extension_finding(extension: &Extension) -> Finding {
    const NAME: &str = "extension";
    match (&extension.installed, &extension.available) {
        (None, None) => Finding::fail(
            NAME,
            "tollgate is neither in this database nor on this server",
            "install Tollgate's files on the server, then run CREATE EXTENSION tollgate in this database",
        ),
        (None, Some(version)) => Finding::fail(
            NAME,
            format!("tollgate {version} is on this server but not in this database"),
            "CREATE EXTENSION tollgate; (in this database, as a superuser)",
        ),
        (Some(installed), Some(available)) if installed != available => Finding::warn(
            NAME,
            format!("tollgate {installed} is in this database, {available} is on this server"),
            "ALTER EXTENSION tollgate UPDATE; (in this database, as a superuser)",
        ),
        (Some(installed), _) => Finding::ok(NAME, format!("tollgate {installed}")),
    }
}

/// That the functions not only may be called but answer, and what they say of the server.
async fn contents(session: &Session, patience: Duration) -> Vec<Finding> {
    let mut findings = match contract::stats(&**session).await {
        Ok(stats) => stats_findings(&stats),
        Err(error) => vec![Finding::error("stats", &error)],
    };
    let read = async {
        let cursor = contract::event_position(&**session, None).await?;
        contract::read_events(&**session, &cursor, 1).await
    };
    findings.push(match read.await {
        Ok(_) => Finding::ok("events", "the event log can be read"),
        Err(error) => Finding::error("events", &error),
    });
    match contract::daemons(&**session).await {
        Ok(daemons) => findings.extend(daemons::findings(&daemons)),
        Err(error) => findings.push(Finding::error("daemons", &error)),
    }
    match contract::deployment_health(&**session, patience).await {
        Ok(health) => findings.extend(health.into_iter().map(Finding::from)),
        Err(error) => findings.push(Finding::error("health", &error)),
    }
    findings
}

/// How far the two clocks may be apart before the times in the daemon's log and the server's no longer match.
const MOST_SKEW: Duration = Duration::from_secs(2);

/// The clock of this machine against the server's, which alone decides what has expired.
async fn clock(client: &Client) -> Result<Finding> {
    const DOING: &str = "ask the server for the time";
    let (sent, asked) = (Timestamp::now(), Instant::now());
    let row = client.query_one("select clock_timestamp()", &[]).await.doing(DOING)?;
    let server: Timestamp = row.try_get(0).doing(DOING)?;
    Ok(skew(sent, asked.elapsed(), server))
}

/// The server looked at its clock at some time between the question and the answer.
fn skew(sent: Timestamp, took: Duration, server: Timestamp) -> Finding {
    let ahead = server.duration_since(sent);
    let took = jiff::SignedDuration::try_from(took).unwrap_or(jiff::SignedDuration::MAX);
    let (off, direction) = if ahead.is_negative() {
        (ahead.abs(), "behind")
    } else {
        ((ahead - took).max(jiff::SignedDuration::ZERO), "ahead of")
    };
    let off = off.unsigned_abs();
    if off <= MOST_SKEW {
        return Finding::ok("clock", "the server's clock agrees with this machine's");
    }
    Finding::warn(
        "clock",
        format!(
            "the server's clock is {} {direction} this machine's; tokens expire by the server's",
            duration::text(Duration::from_secs(off.as_secs()))
        ),
        "timedatectl set-ntp true (on the machine whose clock is wrong), and see timedatectl timesync-status",
    )
}

fn stats_findings(stats: &Value) -> Vec<Finding> {
    let (library, extension) =
        (output::field(stats, "library_version"), output::field(stats, "extension_version"));
    let ours = env!("CARGO_PKG_VERSION");
    let versions = if library != extension {
        Finding::fail(
            "library",
            format!("the server has loaded library {library}, and the database has extension {extension}"),
            "ALTER EXTENSION tollgate UPDATE; if the library is the older one: restart the server",
        )
    } else if library != ours {
        Finding::warn(
            "library",
            format!("library and extension are {library}, this tollgated is {ours}"),
            "install one version of both",
        )
    } else {
        Finding::ok("library", format!("{library}, as the extension and this tollgated"))
    };
    let metering = match stats.get("metering").and_then(Value::as_bool) {
        Some(true) => Finding::ok("metering", "usage is counted"),
        _ => Finding::fail(
            "metering",
            output::field(stats, "metering_detail"),
            "add tollgate to shared_preload_libraries in postgresql.conf and restart the server",
        ),
    };
    vec![versions, metering]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_answer_is_no_wrong_clock() {
        let sent: Timestamp = "2030-01-01T00:00:00Z".parse().unwrap();
        let at = |seconds: i64, took| {
            skew(sent, Duration::from_secs(took), sent + jiff::SignedDuration::from_secs(seconds))
        };
        for (ahead, took) in [(0, 0), (30, 30), (15, 30), (0, 30), (2, 0), (-2, 0), (32, 30)] {
            assert_eq!(at(ahead, took).verdict, Verdict::Ok, "{ahead} {took}");
        }
        for (ahead, took, words) in [(-3, 0, "3s behind"), (-3, 30, "3s behind"), (35, 30, "5s ahead of")] {
            let finding = at(ahead, took);
            assert_eq!(finding.verdict, Verdict::Warn);
            assert!(finding.detail.contains(words), "{}", finding.detail);
        }
    }

    #[test]
    fn servers_that_are_too_old_fail_and_those_that_are_too_new_warn() {
        assert_eq!(version(140_012).verdict, Verdict::Fail);
        assert_eq!(version(150_000).verdict, Verdict::Ok);
        assert_eq!(version(180_001).verdict, Verdict::Ok);
        assert_eq!(version(190_000).verdict, Verdict::Warn);
    }

    #[test]
    fn a_missing_extension_is_created_and_an_old_one_updated() {
        let finding = |installed: Option<&str>, available: Option<&str>| {
            extension_finding(&Extension {
                installed: installed.map(str::to_owned),
                available: available.map(str::to_owned),
            })
        };
        assert_eq!(finding(None, None).verdict, Verdict::Fail);
        assert!(finding(None, Some("0.1.0")).remedy.unwrap().contains("CREATE EXTENSION tollgate"));
        let old = finding(Some("0.1.0"), Some("0.2.0"));
        assert_eq!(old.verdict, Verdict::Warn);
        assert!(old.remedy.unwrap().contains("ALTER EXTENSION tollgate UPDATE"));
        assert_eq!(finding(Some("0.1.0"), Some("0.1.0")).verdict, Verdict::Ok);
    }

    #[test]
    fn a_library_of_another_version_than_the_extension_fails() {
        let ours = env!("CARGO_PKG_VERSION");
        let verdicts = |library: &str, extension: &str, metering: bool| {
            stats_findings(
                &json!({"library_version": library, "extension_version": extension, "metering": metering,
                                   "metering_detail": "not preloaded"}),
            )
            .into_iter()
            .map(|finding| finding.verdict)
            .collect::<Vec<_>>()
        };
        assert_eq!(verdicts(ours, ours, true), [Verdict::Ok, Verdict::Ok]);
        assert_eq!(verdicts("9.9.9", ours, true), [Verdict::Fail, Verdict::Ok]);
        assert_eq!(verdicts("9.9.9", "9.9.9", false), [Verdict::Warn, Verdict::Fail]);
    }
}
