//! The one-shot commands of `tollgated`, run as users, cron and pipes run them.

use std::io::Write as _;
use std::process::{Child, Output, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::Value;
use tollgate_tests::Tollgated;

pub(crate) const LONG: Duration = Duration::from_secs(60);

/// Exit codes, as `tollgated --help` documents them.
pub(crate) const OK: i32 = 0;
pub(crate) const NO: i32 = 1;
pub(crate) const USAGE: i32 = 64;
pub(crate) const UNAVAILABLE: i32 = 69;

/// Runs a command that must exit with this code, and returns its standard output.
#[track_caller]
pub(crate) fn printed(url: &str, arguments: &[&str], code: i32) -> String {
    let output = Tollgated::run(url, arguments).expect("a command that ends");
    expect(&output, arguments, code);
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// [`printed`], with `--json`.
#[track_caller]
pub(crate) fn json_of(url: &str, arguments: &[&str], code: i32) -> Value {
    let text = printed(url, &[arguments, &["--json"]].concat(), code);
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error} in {text}"))
}

/// Its standard error, when it exits with this code.
#[track_caller]
pub(crate) fn failure(url: &str, arguments: &[&str], code: i32) -> String {
    let output = Tollgated::run(url, arguments).expect("a command that ends");
    expect(&output, arguments, code);
    assert_eq!(String::from_utf8_lossy(&output.stdout), "", "{arguments:?}");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[track_caller]
pub(crate) fn expect(output: &Output, arguments: &[&str], code: i32) {
    assert_eq!(
        output.status.code(),
        Some(code),
        "{arguments:?}\n{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Runs a command with some standard input.
pub(crate) fn fed(url: &str, arguments: &[&str], input: &[u8]) -> Result<Output> {
    let mut command = Tollgated::command(url)?;
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn()?;
    let mut stdin = child.stdin.take().context("a pipe")?;
    // A command that does not read all of it has closed its end.
    let _ = stdin.write_all(input);
    drop(stdin);
    ended(&mut child)?;
    Ok(child.wait_with_output()?)
}

/// Waits for a process whose output fits into a pipe.
pub(crate) fn ended(child: &mut Child) -> Result<()> {
    let end = std::time::Instant::now() + LONG;
    while child.try_wait()?.is_none() {
        if std::time::Instant::now() > end {
            child.kill()?;
            anyhow::bail!("it did not end within {LONG:?}");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

pub(crate) fn lines(text: &str) -> Vec<Value> {
    // A line that is still being written is left out.
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    whole
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error} in {line}")))
        .collect()
}
