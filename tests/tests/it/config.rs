//! The daemon's configuration: where an option's value comes from, how it is shown, and how it is refused.

use std::path::PathBuf;
use std::process::Output;

use anyhow::Result;
use serde_json::Value;
use tempfile::TempDir;
use tollgate_tests::{Account, Tollgated};

/// A directory that the daemon's user can read, with a configuration file.
struct Place {
    directory: TempDir,
}

impl Place {
    fn new(content: &str) -> Result<Self> {
        let directory = TempDir::new()?;
        Account::unprivileged()?.private_dir(directory.path())?;
        let place = Self { directory };
        std::fs::write(place.file(), content)?;
        Ok(place)
    }

    fn file(&self) -> PathBuf {
        self.directory.path().join("tollgated.toml")
    }
}

/// An address that never answers: a connection attempt in these tests would hang.
const NOWHERE: &str = "postgresql://ann:hunter2@192.0.2.1:9/app";

fn run(url: &str, environment: &[(&str, &str)], arguments: &[&str]) -> Result<Output> {
    let mut command = Tollgated::command(url)?;
    command.envs(environment.iter().copied()).args(arguments);
    Tollgated::run_command(&mut command)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn setting<'a>(settings: &'a Value, key: &str) -> (&'a str, &'a str) {
    let found = settings["settings"].as_array().into_iter().flatten().find(|setting| setting["key"] == key);
    let found = found.unwrap_or_else(|| panic!("no {key} in {settings}"));
    (found["value"].as_str().unwrap_or_default(), found["source"].as_str().unwrap_or_default())
}

#[test]
fn the_command_line_goes_before_the_environment_before_the_file_before_the_default() -> Result<()> {
    let place = Place::new(
        "flush_interval = \"7s\"\npurge_interval = \"8min\"\nseal_interval = \"9min\"\nbatch_size = 10\n",
    )?;
    let file = place.file().display().to_string();
    let environment = [
        ("TOLLGATED_CONFIG", file.as_str()),
        ("TOLLGATED_PURGE_INTERVAL", "18min"),
        ("TOLLGATED_SEAL_INTERVAL", "19min"),
    ];
    let output = run(NOWHERE, &environment, &["config", "--json", "--seal-interval", "29min"])?;
    assert!(output.status.success(), "{}", text(&output.stderr));
    let settings: Value = serde_json::from_slice(&output.stdout)?;
    assert_eq!(settings["file"], file);
    assert_eq!(setting(&settings, "seal_interval"), ("29min", "command line"));
    assert_eq!(setting(&settings, "purge_interval"), ("18min", "environment"));
    assert_eq!(setting(&settings, "flush_interval"), ("7s", "file"));
    assert_eq!(setting(&settings, "batch_size"), ("10", "file"));
    assert_eq!(setting(&settings, "expire_interval"), ("5s", "default"));
    Ok(())
}

#[test]
fn empty_values_in_the_environment_or_on_the_command_line_count_as_not_given() -> Result<()> {
    let place = Place::new("flush_interval = \"7s\"\nretention = \"3days\"\n")?;
    let file = place.file().display().to_string();
    // Every variable, as Compose and Helm set those without a value.
    let shown = run(NOWHERE, &[], &["config", "--json", "--config", ""])?;
    assert!(shown.status.success(), "{}", text(&shown.stderr));
    let defaults: Value = serde_json::from_slice(&shown.stdout)?;
    assert_eq!(defaults["file"], Value::Null);
    let names: Vec<String> = defaults["settings"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|setting| setting["environment"].as_str().map(str::to_owned))
        .filter(|name| !["DATABASE_URL", "TOLLGATED_OPS_ADDRESS"].contains(&name.as_str()))
        .chain(
            [
                "PGHOST",
                "PGHOSTADDR",
                "PGPORT",
                "PGUSER",
                "PGDATABASE",
                "PGPASSWORD",
                "PGPASSFILE",
                "PGSSLMODE",
            ]
            .map(str::to_owned),
        )
        .collect();
    assert!(names.len() > 20 && names.contains(&"TOLLGATED_RETENTION".to_owned()), "{names:?}");
    let empty: Vec<(&str, &str)> =
        names.iter().map(String::as_str).chain(["TOLLGATED_CONFIG"]).map(|name| (name, "")).collect();
    let output = run(NOWHERE, &empty, &["config", "--json"])?;
    assert!(output.status.success(), "{}", text(&output.stderr));
    let settings: Value = serde_json::from_slice(&output.stdout)?;
    assert_eq!(settings["settings"], defaults["settings"]);

    let environment = [("TOLLGATED_SEAL_INTERVAL", "19min"), ("TOLLGATED_RETENTION", "")];
    let arguments = ["--config", &file, "--seal-interval", "", "--flush-interval=", "--batch-size", ""];
    let output = run(NOWHERE, &environment, &[&["config", "--json"], &arguments[..]].concat())?;
    assert!(output.status.success(), "{}", text(&output.stderr));
    let settings: Value = serde_json::from_slice(&output.stdout)?;
    assert_eq!(setting(&settings, "seal_interval"), ("19min", "environment"));
    assert_eq!(setting(&settings, "flush_interval"), ("7s", "file"));
    assert_eq!(setting(&settings, "retention"), ("3days", "file"));
    assert_eq!(setting(&settings, "batch_size"), ("1000", "default"));

    // No database is named, and the error says so.
    let output = run("", &[("PGHOST", "")], &["status"])?;
    assert_eq!(output.status.code(), Some(64));
    assert!(text(&output.stderr).contains("no database is named"), "{}", text(&output.stderr));
    Ok(())
}

#[test]
fn the_output_of_config_is_a_configuration_file_without_passwords() -> Result<()> {
    let place = Place::new("subscription = \"it's \\\"mine\\\"\"\n")?;
    let file = place.file().display().to_string();
    let output = run(NOWHERE, &[], &["config", "--config", &file])?;
    let printed = text(&output.stdout);
    assert!(printed.contains("host=192.0.2.1") && printed.contains("environment, DATABASE_URL"), "{printed}");
    assert!(!printed.contains("hunter2"), "{printed}");
    // Again, with the output as the file; only the masked connection string cannot be used.
    let kept: Vec<&str> = printed.lines().filter(|line| !line.starts_with("database_url")).collect();
    std::fs::write(place.file(), kept.join("\n"))?;
    let again = run(NOWHERE, &[], &["config", "--json", "--config", &file])?;
    assert!(again.status.success(), "{}", text(&again.stderr));
    let settings: Value = serde_json::from_slice(&again.stdout)?;
    assert_eq!(setting(&settings, "subscription"), ("it's \"mine\"", "file"));
    assert_eq!(setting(&settings, "retention"), ("30d", "file"));
    Ok(())
}

#[test]
fn every_fault_is_reported_at_once_before_connecting_and_without_a_password() -> Result<()> {
    let place = Place::new(
        "flush_intervl = \"5s\"\nflush_interval = \"soon\"\nretention = { days = 3 }\nbatch_size = 0\naudit_retention = \"0s\"\n\
         database_url = \"host=192.0.2.1 port=x sslmode=hunter2 password=hunter2\"\n",
    )?;
    let file = place.file().display().to_string();
    let mut command = Tollgated::command("")?;
    command.env_remove("DATABASE_URL").env("TOLLGATED_LOG_FORMAT", "xml");
    command.args(["run", "--config", &file, "--purge-interval", "3days"]);
    let output = Tollgated::run_command(&mut command)?;
    assert_eq!(output.status.code(), Some(64));
    let failure = text(&output.stderr);
    for words in [
        "wrong in 9 places",
        "line 1: there is no option flush_intervl, but there is flush_interval",
        "line 2: flush_interval: \"soon\"",
        "line 3: retention: a table does not fit here",
        "line 4: batch_size: \"0\"",
        "line 5: audit_retention: \"0s\" cannot be used: it must be at least 1d; or as off, to keep all of it",
        "TOLLGATED_LOG_FORMAT: ",
        "--purge-interval: \"3days\" cannot be used: it must be at most 1d",
        "a bad value for the option port",
        "an sslmode that does not exist",
    ] {
        assert!(failure.contains(words), "{words:?} in {failure}");
    }
    assert!(!failure.contains("hunter2"), "{failure}");
    Ok(())
}

#[test]
fn a_file_that_cannot_be_read_is_named_and_not_quoted() -> Result<()> {
    let place = Place::new("database_url = \"password=hunter2\n")?;
    let file = place.file().display().to_string();
    let output = run(NOWHERE, &[], &["run", "--config", &file])?;
    assert_eq!(output.status.code(), Some(64));
    let failure = text(&output.stderr);
    assert!(failure.contains(&format!("{file}, line 1: this is not TOML")), "{failure}");
    assert!(!failure.contains("hunter2"), "{failure}");
    let output = run(NOWHERE, &[], &["run", "--config", "/nonexistent.toml"])?;
    assert_eq!(output.status.code(), Some(64));
    assert!(text(&output.stderr).contains("/nonexistent.toml"), "{}", text(&output.stderr));
    Ok(())
}

#[test]
fn two_passwords_are_refused() -> Result<()> {
    let place = Place::new("password_file = \"/nonexistent/password\"\n")?;
    let file = place.file().display().to_string();
    let output = run(NOWHERE, &[], &["run", "--config", &file])?;
    assert_eq!(output.status.code(), Some(64));
    assert!(text(&output.stderr).contains("two passwords"), "{}", text(&output.stderr));
    Ok(())
}

#[test]
fn files_that_others_may_write_are_named_once_with_the_command_against_it() -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    let place = Place::new("statement_timeout = \"7s\"\n")?;
    let file = |name: &str| place.directory.path().join(name);
    let password = file("password");
    std::fs::write(&password, "hunter2\n")?;
    let set = |path: &std::path::Path, mode: u32| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
    };
    let url = "host=127.0.0.1 port=1 user=ann dbname=app";
    let (config, password_file) = (place.file().display().to_string(), password.display().to_string());
    let warned = || -> Result<String> {
        let arguments = ["status", "--config", &config, "--password-file", &password_file];
        let output = run(url, &[], &arguments)?;
        assert_eq!(output.status.code(), Some(69), "{}", text(&output.stderr));
        Ok(text(&output.stderr))
    };
    for path in [&place.file(), &password] {
        set(path, 0o644)?;
    }
    assert!(!warned()?.contains("others may change"), "{}", warned()?);
    set(&place.file(), 0o664)?;
    set(&password, 0o646)?;
    let warning = warned()?;
    for path in [&config, &password_file] {
        assert_eq!(warning.matches(&format!("chmod go-w {path}")).count(), 1, "{path} in {warning}");
    }
    set(&place.file(), 0o644)?;
    set(&password, 0o644)?;
    set(place.directory.path(), 0o777)?;
    let warning = warned()?;
    assert!(warning.contains(&format!("chmod go-w {}", place.directory.path().display())), "{warning}");
    assert!(!warning.contains("hunter2"), "{warning}");
    // And a file of passwords by login.
    set(place.directory.path(), 0o755)?;
    std::fs::write(file("pgpass"), "*:*:*:*:hunter2\n")?;
    set(&file("pgpass"), 0o666)?;
    let passfile = file("pgpass").display().to_string();
    let output = run(&format!("{url} passfile={passfile}"), &[], &["status"])?;
    assert!(text(&output.stderr).contains(&format!("chmod go-w {passfile}")), "{}", text(&output.stderr));
    Ok(())
}

#[test]
fn help_shows_the_options_as_they_are() -> Result<()> {
    let output = run(NOWHERE, &[], &["run", "--help"])?;
    let help = text(&output.stdout).split_whitespace().collect::<Vec<_>>().join(" ");
    for words in ["--config <PATH>", "[possible values: human, json]", "TOLLGATED_PASSWORD_FILE"] {
        assert!(help.contains(words), "{words} in {help}");
    }
    Ok(())
}
