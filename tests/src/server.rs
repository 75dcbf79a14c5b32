//! One PostgreSQL server with its own data directory: initialised, configured, started, stopped, crashed.
//!
//! Used by the tests, whose servers live as long as a `Cluster`, and by `make up`, whose server outlives the
//! process that started it: so a running server is always identified by its `postmaster.pid`, never only by a handle.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read as _, Seek as _, SeekFrom};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::account::Account;
use crate::install::Install;
use crate::wait::holds_within;

/// Longest path of a Unix socket that every platform takes, less the terminating zero.
const SOCKET_PATH_MAX: usize = 103;

const START_DEADLINE: Duration = Duration::from_secs(60);
const STOP_DEADLINE: Duration = Duration::from_secs(60);

/// How a server is stopped, as in `pg_ctl stop -m`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Shutdown {
    /// Disconnects clients, writes a checkpoint.
    Fast,
    /// No checkpoint: the next start recovers.
    Immediate,
}

impl Shutdown {
    fn signal(self) -> Signal {
        match self {
            Self::Fast => Signal::SIGINT,
            Self::Immediate => Signal::SIGQUIT,
        }
    }
}

#[derive(Debug)]
pub struct Server {
    pub install: Install,
    pub account: Account,
    pub data: PathBuf,
    pub log: PathBuf,
    pub sockets: PathBuf,
    pub port: u16,
    pub settings: BTreeMap<String, String>,
    /// Added to the server's environment.
    pub environment: BTreeMap<String, String>,
    /// Set when this process started the server and so must reap it.
    child: Option<Child>,
}

impl Server {
    /// Creates and starts nothing yet. `sockets` must be short: see [`Server::check_socket_path`].
    pub fn new(
        install: Install,
        account: Account,
        data: PathBuf,
        log: PathBuf,
        sockets: PathBuf,
        port: u16,
    ) -> Self {
        Self {
            install,
            account,
            data,
            log,
            sockets,
            port,
            settings: BTreeMap::new(),
            environment: BTreeMap::new(),
            child: None,
        }
    }

    /// Whether the path of a Unix socket in `directory` is short enough for the operating system.
    pub fn check_socket_path(directory: &Path) -> bool {
        directory.join(".s.PGSQL.65535").as_os_str().len() <= SOCKET_PATH_MAX
    }

    pub fn set(&mut self, name: &str, value: impl Into<String>) {
        self.settings.insert(name.to_owned(), value.into());
    }

    pub fn is_initialised(&self) -> bool {
        self.data.join("PG_VERSION").exists()
    }

    /// A command of this PostgreSQL, run as the server's user, with the server as its default connection.
    pub fn program(&self, name: &str) -> Command {
        let mut command = self.account.command(self.install.program(name));
        command.current_dir("/").env("PGHOST", &self.sockets).env("PGPORT", self.port.to_string());
        command.env("PGUSER", "postgres");
        command
    }

    /// `initdb`, with the superuser `postgres`. The directory's parent must belong to the server's user.
    pub fn initdb(&self, arguments: &[&str]) -> Result<()> {
        let mut command = self.account.command(self.install.program("initdb"));
        command.current_dir("/").arg("--pgdata").arg(&self.data).args([
            "--username=postgres",
            "--encoding=UTF8",
            "--locale=C",
        ]);
        run(command.args(arguments))
    }

    /// Starts the server and waits until it accepts connections. Does nothing if it already runs.
    pub fn start(&mut self) -> Result<()> {
        let deadline = Instant::now() + START_DEADLINE;
        self.write_configuration()?;
        while self.pid().is_none() {
            let log_length = fs::metadata(&self.log).map_or(0, |log| log.len());
            self.spawn()?;
            if self.wait_until_ready(deadline)? {
                return Ok(());
            }
            let output = self.log_from(log_length)?;
            // The leftovers of a crashed postmaster are gone once the last of its children has exited.
            let temporary = output.contains("pre-existing shared memory block")
                || output.contains("lock file \"postmaster.pid\" already exists");
            if !temporary || Instant::now() > deadline {
                bail!("PostgreSQL did not start from {}:\n{output}", self.data.display());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        self.wait_until_ready(deadline)?;
        Ok(())
    }

    /// Stops the server. Does nothing when it is down.
    pub fn stop(&mut self, how: Shutdown) -> Result<()> {
        let Some(pid) = self.pid() else { return Ok(()) };
        signal_and_wait(pid, how.signal(), &mut || !self.runs(pid)).context(self.log.display().to_string())
    }

    /// Kills the postmaster and all its children with SIGKILL, as a power failure would.
    pub fn crash(&mut self) -> Result<()> {
        let Some(postmaster) = self.pid() else { return Ok(()) };
        let children = children_of(postmaster);
        kill(postmaster, Signal::SIGKILL).or_else(ignore_gone)?;
        for child in children {
            kill(child, Signal::SIGKILL).or_else(ignore_gone)?;
        }
        if !holds_within(STOP_DEADLINE, &mut || !self.runs(postmaster)) {
            bail!("the killed PostgreSQL (process {postmaster}) is still there");
        }
        Ok(())
    }

    /// Writes the settings and makes the server read them; those that need a restart take effect at the next one.
    pub fn reload(&mut self) -> Result<()> {
        self.write_configuration()?;
        if let Some(pid) = self.pid() {
            kill(pid, Signal::SIGHUP)?;
        }
        Ok(())
    }

    /// The postmaster's process id, if it runs.
    pub fn pid(&mut self) -> Option<Pid> {
        let pid = Pid::from_raw(self.pid_file_line(0)?.parse().ok()?);
        self.runs(pid).then_some(pid)
    }

    /// The server's log since it was initialised.
    pub fn log(&self) -> Result<String> {
        self.log_from(0)
    }

    fn log_from(&self, offset: u64) -> Result<String> {
        let mut file =
            File::open(&self.log).with_context(|| format!("cannot read {}", self.log.display()))?;
        file.seek(SeekFrom::Start(offset))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    fn spawn(&mut self) -> Result<()> {
        let log = File::options()
            .create(true)
            .append(true)
            .open(&self.log)
            .with_context(|| format!("cannot open {}", self.log.display()))?;
        let mut command = self.account.command(self.install.program("postgres"));
        command.arg("-D").arg(&self.data).current_dir(&self.data);
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).envs(&self.environment);
        // Ctrl-C in the terminal must reach the caller only, not a server that outlives it.
        command.process_group(0);
        let child = command.spawn().with_context(|| format!("cannot run {:?}", command.get_program()))?;
        self.child = Some(child);
        Ok(())
    }

    /// True once connections are accepted, false if the server ended instead.
    fn wait_until_ready(&mut self, deadline: Instant) -> Result<bool> {
        loop {
            if let Some(child) = &mut self.child
                && child.try_wait()?.is_some()
            {
                self.child = None;
                return Ok(false);
            }
            let own =
                self.child.as_ref().is_none_or(|child| self.pid_file_line(0) == Some(child.id().to_string()));
            if own && self.pid_file_line(7).is_some_and(|status| status.trim() == "ready") {
                return Ok(true);
            }
            if Instant::now() > deadline {
                bail!("PostgreSQL is not ready after {START_DEADLINE:?}; its log:\n{}", self.log()?);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// A line of `postmaster.pid`: 0 is the process id, 7 the state.
    fn pid_file_line(&self, index: usize) -> Option<String> {
        pid_file_line(&self.data, index)
    }

    fn runs(&mut self, pid: Pid) -> bool {
        if let Some(child) = &mut self.child
            && i64::from(child.id()) == i64::from(pid.as_raw())
        {
            let ended = matches!(child.try_wait(), Ok(Some(_)));
            if ended {
                self.child = None;
            }
            return !ended;
        }
        is_postmaster_of(pid, &self.data)
    }

    /// The whole configuration is ours: nothing that initdb wrote for this machine is kept.
    pub fn write_configuration(&self) -> Result<()> {
        let mut text = format!(
            "listen_addresses = '127.0.0.1'\nport = {}\nunix_socket_directories = '{}'\nunix_socket_permissions = 0700\n",
            self.port,
            quote(&self.sockets.to_string_lossy())
        );
        for (name, value) in &self.settings {
            text.push_str(&format!("{name} = '{}'\n", quote(value)));
        }
        let path = self.data.join("postgresql.conf");
        // At once: a process that still handles an earlier reload must not read half of it.
        let part = self.data.join("postgresql.conf.part");
        fs::write(&part, text).with_context(|| format!("cannot write {}", part.display()))?;
        self.account.own(&part)?;
        fs::rename(&part, &path).with_context(|| format!("cannot replace {}", path.display()))
    }
}

/// Whether a process exists and is not an unreaped zombie.
pub fn is_alive(pid: Pid) -> bool {
    if kill(pid, None) == Err(nix::errno::Errno::ESRCH) {
        return false;
    }
    process_state(pid).is_none_or(|(state, _)| state != 'Z')
}

/// Stops the server that runs in a data directory. False if none does.
pub fn stop_data_dir(data: &Path, how: Shutdown) -> Result<bool> {
    let Some(pid) = postmaster_of(data) else { return Ok(false) };
    signal_and_wait(pid, how.signal(), &mut || !is_postmaster_of(pid, data))?;
    Ok(true)
}

fn signal_and_wait(pid: Pid, signal: Signal, gone: &mut dyn FnMut() -> bool) -> Result<()> {
    kill(pid, signal).or_else(ignore_gone)?;
    if !holds_within(STOP_DEADLINE, gone) {
        bail!("PostgreSQL (process {pid}) did not stop within {STOP_DEADLINE:?}");
    }
    Ok(())
}

fn pid_file_line(data: &Path, index: usize) -> Option<String> {
    let content = fs::read_to_string(data.join("postmaster.pid")).ok()?;
    content.lines().nth(index).map(str::to_owned)
}

fn postmaster_of(data: &Path) -> Option<Pid> {
    let pid = Pid::from_raw(pid_file_line(data, 0)?.parse().ok()?);
    is_postmaster_of(pid, data).then_some(pid)
}

/// Whether `pid` serves this data directory: a stale `postmaster.pid` may name any process.
fn is_postmaster_of(pid: Pid, data: &Path) -> bool {
    if !is_alive(pid) {
        return false;
    }
    match fs::read_link(format!("/proc/{pid}/cwd")) {
        Ok(directory) => directory == data,
        Err(_) => !Path::new("/proc/self/cwd").exists(),
    }
}

/// Runs a command to its end; if it fails, its output is the error.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("cannot run {:?}", command.get_program()))?;
    if !output.status.success() {
        bail!(
            "{:?} failed ({}):\n{}{}",
            command.get_program(),
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(())
}

fn quote(value: &str) -> String {
    value.replace('\\', "\\\\").replace('\'', "''")
}

fn ignore_gone(error: nix::errno::Errno) -> nix::Result<()> {
    if error == nix::errno::Errno::ESRCH { Ok(()) } else { Err(error) }
}

/// State and parent of a process, where the system has a `/proc`.
fn process_state(pid: Pid) -> Option<(char, Pid)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the program's name in parentheses, which may itself contain spaces and parentheses.
    let mut fields = stat.get(stat.rfind(')')? + 1..)?.split_whitespace();
    let state = fields.next()?.chars().next()?;
    let parent = fields.next()?.parse().ok()?;
    Some((state, Pid::from_raw(parent)))
}

fn children_of(parent: Pid) -> Vec<Pid> {
    let Ok(processes) = fs::read_dir("/proc") else { return Vec::new() };
    processes
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .map(Pid::from_raw)
        .filter(|&pid| process_state(pid).is_some_and(|(_, its_parent)| its_parent == parent))
        .collect()
}
