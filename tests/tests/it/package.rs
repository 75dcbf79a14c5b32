//! The Debian packages, installed with apt into a clean root and started there as systemd would start them.
//!
//! Needs root, for chroot, and what `tests/setup/clean-root.sh` and `make package` make; `make test` sees to both on
//! PostgreSQL 15. Without them the test says so and is not run.

use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

const LONG: Duration = Duration::from_secs(60);

/// What a copy of the clean root is made for. Whatever runs in it is stopped at the end.
struct Root {
    directory: TempDir,
    daemon: Option<Child>,
}

impl Root {
    fn copy_of(clean: &Path) -> Result<Self> {
        let parent = clean.parent().context("a directory above it")?;
        let directory = tempfile::Builder::new().prefix("package-").tempdir_in(parent)?;
        let root = Self { directory, daemon: None };
        let copied =
            Command::new("cp").args(["-a", "--reflink=auto", "-T"]).arg(clean).arg(root.path()).status()?;
        ensure!(copied.success(), "could not copy {}", clean.display());
        // Other users live in it.
        std::fs::set_permissions(root.path(), std::fs::Permissions::from_mode(0o755))?;
        Ok(root)
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    /// A shell command inside, as this user, with nothing inherited.
    fn command(&self, user: &str, script: &str) -> Command {
        let mut command = Command::new("chroot");
        command.arg("--userspec").arg(user).arg(self.path());
        command.args(["/bin/sh", "-ec", script]);
        command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("LC_ALL", "C");
        command.env("DEBIAN_FRONTEND", "noninteractive").stdin(Stdio::null()).current_dir("/");
        command
    }

    fn try_run(&self, user: &str, script: &str) -> Result<Output> {
        Ok(self.command(user, script).output()?)
    }

    fn run(&self, user: &str, script: &str) -> Result<String> {
        let output = self.try_run(user, script)?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(
            output.status.success(),
            "{script}\n{}\n{text}{}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(text)
    }

    fn sql(&self, user: &str, sql: &str) -> Result<String> {
        let sql = sql.replace('\'', "'\\''");
        Ok(self
            .run(user, &format!("psql -XqAt -v ON_ERROR_STOP=1 -d postgres -c '{sql}'"))?
            .trim()
            .to_owned())
    }

    fn read(&self, path: &str) -> Result<String> {
        std::fs::read_to_string(self.path().join(path)).with_context(|| path.to_owned())
    }
}

impl Root {
    /// Stops the server, which pg_ctlcluster does not do without /proc.
    fn stop_server(&self, how: Signal) -> Result<()> {
        let lock = "var/lib/postgresql/15/main/postmaster.pid";
        let Ok(text) = self.read(lock) else { return Ok(()) };
        let process = text.lines().next().context("a process")?.parse()?;
        kill(Pid::from_raw(process), how)?;
        let end = Instant::now() + LONG;
        while self.path().join(lock).exists() {
            ensure!(Instant::now() < end, "the server did not stop");
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        if let Some(daemon) = &mut self.daemon {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
        if let Err(error) = self.stop_server(Signal::SIGQUIT) {
            eprintln!("{error:#}");
        }
    }
}

/// `None` where they cannot be had, which only a person's machine may say.
fn packages() -> Result<Option<(PathBuf, PathBuf)>> {
    let named = |name| std::env::var_os(name).map(PathBuf::from);
    match (named("TOLLGATE_TEST_PACKAGES"), named("TOLLGATE_TEST_CLEAN_ROOT")) {
        (Some(packages), Some(root)) if nix::unistd::geteuid().is_root() => Ok(Some((packages, root))),
        _ => {
            eprintln!(
                "NOT RUN: the test of the packages needs root, TOLLGATE_TEST_PACKAGES and TOLLGATE_TEST_CLEAN_ROOT, which \
                 make test names on PostgreSQL 15"
            );
            Ok(None)
        }
    }
}

/// What a service manager hears. It reads all the time, as systemd does: what is not read blocks the sender.
struct Manager(Receiver<String>);

impl Manager {
    fn listen(path: &Path) -> Result<Self> {
        let socket = UnixDatagram::bind(path)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o777))?;
        let (sender, receiver) = channel();
        std::thread::spawn(move || {
            let mut message = [0; 4096];
            while let Ok(length) = socket.recv(&mut message) {
                for line in String::from_utf8_lossy(&message[..length]).lines() {
                    if sender.send(line.to_owned()).is_err() {
                        return;
                    }
                }
            }
        });
        Ok(Self(receiver))
    }

    fn is_told(&self, state: &str) -> Result<()> {
        while self.0.recv_timeout(LONG).with_context(|| format!("{state} was not told"))? != state {}
        Ok(())
    }
}

/// The values of a key of a unit file.
fn values<'a>(unit: &'a str, key: &str) -> Vec<&'a str> {
    unit.lines().filter_map(|line| line.strip_prefix(key)?.strip_prefix('=')).collect()
}

/// Starts the daemon by the command line, as the user that its unit says, with the configuration that the package brings.
fn start(root: &mut Root, unit: &str) -> Result<Manager> {
    let manager = Manager::listen(&root.path().join("run/notify"))?;
    let [user, exec] = [values(unit, "User"), values(unit, "ExecStart")].map(|values| values[0].to_owned());
    let log = std::fs::File::create(root.path().join("var/log/tollgated"))?;
    let mut command = root.command(&format!("{user}:{user}"), &format!("exec {exec}"));
    command.env("NOTIFY_SOCKET", "/run/notify").env("WATCHDOG_USEC", "300000").stderr(log);
    root.daemon = Some(command.spawn()?);
    Ok(manager)
}

#[test]
fn the_packages_install_on_a_clean_debian_and_serve_a_token() -> Result<()> {
    let Some((packages, clean)) = packages()? else { return Ok(()) };
    let mut root = Root::copy_of(&clean)?;
    let mut debs = Vec::new();
    for entry in std::fs::read_dir(packages)? {
        let entry = entry?;
        std::fs::copy(entry.path(), root.path().join("tmp").join(entry.file_name()))?;
        debs.push(format!("/tmp/{}", entry.file_name().to_string_lossy()));
    }
    assert_eq!(debs.len(), 2, "{debs:?}");
    // All that they depend on is there, and apt knows of no other packages.
    root.run("root", &format!("apt-get install -q -y --no-install-recommends {}", debs.join(" ")))?;
    assert_eq!(root.run("root", "dpkg --audit")?, "");
    for path in [
        "/usr/share/doc/tollgated/copyright",
        "/usr/share/man/man8/tollgated.8.gz",
        "/usr/share/bash-completion/completions/tollgated",
    ] {
        root.run("root", &format!("test -s {path} && dpkg -S {path}"))?;
    }
    assert_eq!(
        root.run("root", "stat -c '%U:%G %a' /etc/tollgated/tollgated.toml")?.trim(),
        "root:tollgated 640"
    );
    root.run("root", "pg_createcluster --encoding UTF8 15 main -- --no-sync && echo \"listen_addresses = ''\" >>/etc/postgresql/15/main/postgresql.conf")?;
    root.run(
        "root",
        "echo \"shared_preload_libraries = 'tollgate'\" >>/etc/postgresql/15/main/postgresql.conf",
    )?;
    root.run("root", "pg_ctlcluster 15 main start >/dev/null 2>&1 </dev/null")?;
    root.sql("postgres", "create extension tollgate; create role tollgated login; create role web login")?;
    root.sql("postgres", "select tollgate.grant_capability('tollgated', 'operator')")?;

    let unit = root.read("usr/lib/systemd/system/tollgated.service")?;
    let manager = start(&mut root, &unit)?;
    manager.is_told("READY=1")?;
    manager.is_told("WATCHDOG=1")?;
    let token = root.sql("postgres", "select token from tollgate.create_api_token('ann', 'packaged')")?;
    let code = root.sql("postgres", &format!("select code from tollgate.verify_api_token('{token}')"))?;
    assert_eq!(code, "VALID");
    let end = Instant::now() + LONG;
    while root.sql("postgres", "select coalesce(sum(use_count), 0) from tollgate.token_usage")? != "1" {
        ensure!(Instant::now() < end, "the use was not flushed:\n{}", root.read("var/log/tollgated")?);
        std::thread::sleep(Duration::from_millis(100));
    }
    // As the daemon's user, with its own settings: nothing fails, and the daemon is seen.
    let check = root.run("tollgated:tollgated", "tollgated check")?;
    assert!(check.contains("without a failing task"), "{check}");

    let mut daemon = root.daemon.take().context("a daemon")?;
    kill(Pid::from_raw(daemon.id().try_into()?), Signal::SIGTERM)?;
    manager.is_told("STOPPING=1")?;
    let status = daemon.wait()?;
    assert!(status.success(), "{status}\n{}", root.read("var/log/tollgated")?);

    // What a person configured outlives a removal, as Debian has it.
    root.stop_server(Signal::SIGINT)?;
    root.run("root", "apt-get remove -q -y tollgated postgresql-15-tollgate")?;
    root.run("root", "test -e /etc/tollgated/tollgated.toml && ! test -e /usr/bin/tollgated")?;
    Ok(())
}

/// What systemd makes of a word that it does not know is a line in its log, and no protection.
#[test]
fn the_unit_is_one_that_systemd_understands_and_finds_hardened() -> Result<()> {
    let unit = Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/tollgated/tollgated.service");
    let text = std::fs::read_to_string(&unit)?;
    assert_eq!(values(&text, "Type"), ["notify"]);
    let analyze = |arguments: &[&str]| Command::new("systemd-analyze").args(arguments).arg(&unit).output();
    let verdict = match analyze(&["security", "--offline=true", "--threshold=20", "--no-pager"]) {
        Ok(verdict) => verdict,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            eprintln!("NOT RUN: there is no systemd-analyze to look at the unit with");
            return Ok(());
        }
        Err(error) => return Err(error.into()),
    };
    assert!(verdict.status.success(), "{}", String::from_utf8_lossy(&verdict.stdout));
    // It also looks for what only the package brings.
    let verified = analyze(&["verify"])?;
    let complaints = String::from_utf8_lossy(&verified.stderr).into_owned();
    let others: Vec<&str> = complaints
        .lines()
        .filter(|line| {
            !line.contains("/usr/bin/tollgated is not executable") && !line.contains("'man tollgated(8)'")
        })
        .collect();
    assert_eq!(others, Vec::<&str>::new());
    Ok(())
}
