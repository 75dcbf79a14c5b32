//! The daemon under test, as a real process.

use std::fs::File;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::account::Account;
use crate::wait::holds_within;

/// Names the daemon's binary.
pub const TOLLGATED_VAR: &str = "TOLLGATE_TEST_TOLLGATED";

/// A one-shot command that takes longer has hung.
const RUN_DEADLINE: Duration = Duration::from_secs(60);

/// A running daemon. Killed when dropped.
#[derive(Debug)]
pub struct Tollgated {
    child: Child,
    directory: TempDir,
}

impl Tollgated {
    /// Starts `tollgated ARGUMENTS`, with the database's address in its environment.
    pub fn spawn(database_url: &str, arguments: &[&str]) -> Result<Self> {
        Self::spawn_command(Self::command(database_url)?.args(arguments))
    }

    /// Runs a one-shot command to its end.
    pub fn run(database_url: &str, arguments: &[&str]) -> Result<Output> {
        Self::run_command(Self::command(database_url)?.args(arguments))
    }

    /// [`Tollgated::run`], with additional environment variables.
    pub fn run_command(command: &mut Command) -> Result<Output> {
        let mut process = Self::spawn_command(command)?;
        let status = process.wait(RUN_DEADLINE).with_context(|| format!("{command:?}"))?;
        Ok(Output { status, stdout: process.read("stdout")?.into(), stderr: process.read("stderr")?.into() })
    }

    /// For more environment variables than [`Tollgated::spawn`] sets. Pass it to [`Tollgated::spawn_command`].
    pub fn command(database_url: &str) -> Result<Command> {
        let Some(binary) = std::env::var_os(TOLLGATED_VAR) else {
            bail!(
                "{TOLLGATED_VAR} is not set: these tests need the daemon's binary. \
                 Run them with `make test`, or name it in that variable."
            )
        };
        let mut command = Account::unprivileged()?.command(PathBuf::from(binary));
        command.env("DATABASE_URL", database_url).env("RUST_BACKTRACE", "1").current_dir("/");
        // Many run at the same time: those that must serve HTTP take a port of their own.
        command.env("TOLLGATED_OPS_ADDRESS", "off");
        Ok(command)
    }

    /// The address of its HTTP listener `ops` or `api`; `None` until it listens.
    pub fn address(&self, listener: &str) -> Option<SocketAddr> {
        let is_it =
            |line: &serde_json::Value| line["message"] == "serving HTTP" && line["listener"] == listener;
        let log = self.log();
        let mut lines = log.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
        lines.find(is_it)?["address"].as_str()?.parse().ok()
    }

    pub fn spawn_command(command: &mut Command) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("tollgated-").tempdir()?;
        let file = |name: &str| File::create(directory.path().join(name));
        command.stdin(Stdio::null()).stdout(file("stdout")?).stderr(file("stderr")?);
        let child = command.spawn().with_context(|| format!("cannot run {:?}", command.get_program()))?;
        Ok(Self { child, directory })
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its output so far.
    pub fn stdout(&self) -> String {
        self.read("stdout").unwrap_or_else(|error| format!("{error:#}"))
    }

    /// Its log so far, from standard error.
    pub fn log(&self) -> String {
        self.read("stderr").unwrap_or_else(|error| format!("{error:#}"))
    }

    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Asks it to stop, with SIGTERM. See [`Tollgated::wait`].
    pub fn terminate(&self) -> Result<()> {
        self.signal(Signal::SIGTERM)
    }

    /// SIGKILL, and waits until it is gone.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(Pid::from_raw(i32::try_from(self.child.id())?), signal)?)
    }

    /// Waits for the process to end by itself; one that does not within `deadline` is killed, which is an error.
    pub fn wait(&mut self, deadline: Duration) -> Result<ExitStatus> {
        let mut status = None;
        let ended = holds_within(deadline, &mut || {
            status = self.child.try_wait().ok().flatten();
            status.is_some()
        });
        if !ended {
            self.kill()?;
        }
        ensure!(ended, "tollgated still ran after {deadline:?}; its log:\n{}", self.log());
        status.context("an ended process has a status")
    }

    fn read(&self, name: &str) -> Result<String> {
        let bytes = std::fs::read(self.directory.path().join(name))?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}

impl Drop for Tollgated {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- the daemon's log ---\n{}", self.log());
        }
        // An error means that it has already ended.
        let _ = self.kill();
    }
}
