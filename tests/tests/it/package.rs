//! The Debian packages, installed with apt into a clean root and started there as systemd would.
//!
//! That needs root, for chroot, and what `make package clean-roots` makes, which `make test-long` sees to. Without them the
//! tests say so and are not run, and in CI they fail. The images are made of the packages, and run.

use std::ffi::OsStr;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::common::{not_run, not_run_here};
use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;
use tollgate_tests::{Install, PG_CONFIG_VAR, TOLLGATED_VAR, dev_dir};

const LONG: Duration = Duration::from_secs(60);

/// The exit status by which a script in packaging says so, with the reason in its last line.
const CANNOT_BE_RUN_HERE: i32 = 3;

/// A copy of the clean root. Everything that runs in it is stopped at the end.
struct Root {
    directory: TempDir,
    /// Of PostgreSQL.
    major: u32,
    daemon: Option<Child>,
}

impl Root {
    fn copy_of(clean: &Path, major: u32) -> Result<Self> {
        let parent = clean.parent().context("a directory above it")?;
        let directory = tempfile::Builder::new().prefix("package-").tempdir_in(parent)?;
        let root = Self { directory, major, daemon: None };
        let copied =
            Command::new("cp").args(["-a", "--reflink=auto", "-T"]).arg(clean).arg(root.path()).status()?;
        ensure!(copied.success(), "could not copy {}", clean.display());
        // Other users must be able to enter it.
        std::fs::set_permissions(root.path(), std::fs::Permissions::from_mode(0o755))?;
        Ok(root)
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    /// A shell command inside, as this user, without inherited variables.
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

    fn sql(&self, user: &str, database: &str, sql: &str) -> Result<String> {
        let sql = sql.replace('\'', "'\\''");
        Ok(self
            .run(user, &format!("psql -XqAt -v ON_ERROR_STOP=1 -d {database} -c '{sql}'"))?
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
        let lock = &format!("var/lib/postgresql/{}/main/postmaster.pid", self.major);
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

/// The packages, and a clean root of this release of Debian; `None` where they cannot be had, which only a person's machine
/// may say.
fn packages(suite: &str) -> Result<Option<(PathBuf, PathBuf)>> {
    let (packages, root) = (dev_dir()?.join("package"), dev_dir()?.join(format!("clean-root-{suite}")));
    if nix::unistd::geteuid().is_root() && packages.exists() && root.exists() {
        return Ok(Some((packages, root)));
    }
    let missing = format!("{} and {}", packages.display(), root.display());
    not_run_here(&format!("it needs root, and {missing}, which `make package clean-roots` makes"))?;
    Ok(None)
}

/// The notifications that a service manager receives. It reads continuously, like systemd: unread ones would block the
/// sender.
struct Manager(Receiver<String>);

impl Manager {
    fn listen(path: &Path) -> Result<Self> {
        if path.exists() {
            std::fs::remove_file(path)?;
        }
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

    fn receives(&self, state: &str) -> Result<()> {
        while self.0.recv_timeout(LONG).with_context(|| format!("{state} was not reported"))? != state {}
        Ok(())
    }
}

/// The values of a key of a unit file.
fn values<'a>(unit: &'a str, key: &str) -> Vec<&'a str> {
    unit.lines().filter_map(|line| line.strip_prefix(key)?.strip_prefix('=')).collect()
}

/// Starts the daemon by the command line, as the user in its unit, with the packaged configuration.
fn start(root: &mut Root, unit: &str) -> Result<Manager> {
    let manager = Manager::listen(&root.path().join("run/notify"))?;
    let [user, exec] = [values(unit, "User"), values(unit, "ExecStart")].map(|values| values[0].to_owned());
    let environment = values(unit, "Environment").join(" ");
    let log = std::fs::File::create(root.path().join("var/log/tollgated"))?;
    let mut command = root.command(&format!("{user}:{user}"), &format!("{environment} exec {exec}"));
    command.env("NOTIFY_SOCKET", "/run/notify").env("WATCHDOG_USEC", "300000").stderr(log);
    root.daemon = Some(command.spawn()?);
    Ok(manager)
}

/// The daemons of all roots listen on the same port.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn install_and_serve(suite: &str, major: u32) -> Result<()> {
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let Some((packages, clean)) = packages(suite)? else { return Ok(()) };
    let mut root = Root::copy_of(&clean, major)?;
    let mut debs = Vec::new();
    for entry in std::fs::read_dir(packages)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with("tollgated_") || name.starts_with(&format!("postgresql-{major}-tollgate_")) {
            std::fs::copy(entry.path(), root.path().join("tmp").join(&name))?;
            debs.push(format!("/tmp/{name}"));
        }
    }
    ensure!(debs.len() == 2, "make package made no packages for PostgreSQL {major}: {debs:?}");
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
    let settings = format!("/etc/postgresql/{major}/main/postgresql.conf");
    root.run("root", &format!("pg_createcluster --encoding UTF8 {major} main -- --no-sync"))?;
    root.run(
        "root",
        &format!(
            "echo \"listen_addresses = ''\" >>{settings}; echo \"shared_preload_libraries = 'tollgate'\" >>{settings}"
        ),
    )?;
    root.run("root", &format!("pg_ctlcluster {major} main start >/dev/null 2>&1 </dev/null"))?;
    root.sql("postgres", "postgres", "create role tollgated login")?;
    root.sql("postgres", "postgres", "create database second")?;
    for database in ["postgres", "second"] {
        root.sql("postgres", database, "create extension tollgate")?;
        root.sql("postgres", database, "select tollgate.grant_capability('tollgated', 'operator')")?;
    }

    let unit = root.read("usr/lib/systemd/system/tollgated.service")?;
    serve(&mut root, &unit, "postgres", "tollgated check")?;
    // A second database, by an instance of the other unit.
    let configuration =
        "database_url = \"host=/var/run/postgresql user=tollgated dbname=second\"\nops_address = \"off\"";
    root.run(
        "root",
        &format!("umask 027; printf '%s\\n' '{configuration}' >/etc/tollgated/second.toml; chgrp tollgated /etc/tollgated/second.toml"),
    )?;
    let unit = root.read("usr/lib/systemd/system/tollgated@.service")?.replace("%i", "second");
    serve(&mut root, &unit, "second", "tollgated --config /etc/tollgated/second.toml check")?;

    // What a person configured outlives a removal, as Debian has it.
    root.stop_server(Signal::SIGINT)?;
    root.run("root", &format!("apt-get remove -q -y tollgated postgresql-{major}-tollgate"))?;
    root.run("root", "test -e /etc/tollgated/tollgated.toml && ! test -e /usr/bin/tollgated")?;
    Ok(())
}

/// The daemon of this unit notifies systemd, carries usage, and finds nothing wrong.
fn serve(root: &mut Root, unit: &str, database: &str, check: &str) -> Result<()> {
    let manager = start(root, unit)?;
    manager.receives("READY=1")?;
    manager.receives("WATCHDOG=1")?;
    let token =
        root.sql("postgres", database, "select token from tollgate.create_api_token('ann', 'packaged')")?;
    let code =
        root.sql("postgres", database, &format!("select code from tollgate.verify_api_token('{token}')"))?;
    assert_eq!(code, "VALID");
    let end = Instant::now() + LONG;
    while root.sql("postgres", database, "select coalesce(sum(use_count), 0) from tollgate.token_usage")?
        != "1"
    {
        ensure!(Instant::now() < end, "the use was not flushed:\n{}", root.read("var/log/tollgated")?);
        std::thread::sleep(Duration::from_millis(100));
    }
    // As the daemon's user, with its own settings: nothing fails, and the daemon is seen.
    let check = root.run("tollgated:tollgated", check)?;
    assert!(check.contains("without a failing task"), "{check}");

    let mut daemon = root.daemon.take().context("a daemon")?;
    kill(Pid::from_raw(daemon.id().try_into()?), Signal::SIGTERM)?;
    manager.receives("STOPPING=1")?;
    let status = daemon.wait()?;
    assert!(status.success(), "{status}\n{}", root.read("var/log/tollgated")?);
    Ok(())
}

#[test]
#[ignore = "long: installs packages in a clean root"]
fn the_packages_install_on_a_clean_debian_12_and_serve_two_databases() -> Result<()> {
    install_and_serve("bookworm", 15)
}

#[test]
#[ignore = "long: installs packages in a clean root"]
fn the_packages_install_on_a_clean_debian_13_and_serve_two_databases() -> Result<()> {
    install_and_serve("trixie", 17)
}

/// The output of a program; `None` where there is none, which only a person's machine may say.
fn output_of(program: &str, arguments: &[&OsStr]) -> Result<Option<Output>> {
    match Command::new(program).args(arguments).output() {
        Ok(output) => Ok(Some(output)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            not_run_here(&format!("there is no {program} here"))?;
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}

/// Of the PostgreSQL and the daemon that the tests run with.
#[test]
#[ignore = "long: builds the packages, 15 to 50 s"]
fn the_packages_have_what_debian_wants_of_them() -> Result<()> {
    if output_of("dpkg-deb", &["--version".as_ref()])?.is_none() {
        return Ok(());
    }
    let directory = tempfile::tempdir()?;
    let pg_config = std::env::var_os(PG_CONFIG_VAR).context(PG_CONFIG_VAR)?;
    let built = Command::new(repository().join("packaging/build.sh"))
        .args([directory.path().as_os_str(), &pg_config])
        .env("TOLLGATED", std::env::var_os(TOLLGATED_VAR).context(TOLLGATED_VAR)?)
        .env("COMPRESSION", "gzip")
        .output()?;
    ensure!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    let major = Install::under_test()?.major;
    let mut debs: Vec<PathBuf> =
        std::fs::read_dir(directory.path())?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    debs.sort();
    let mut contents = String::new();
    for (deb, package) in debs.iter().zip([format!("postgresql-{major}-tollgate"), "tollgated".to_owned()]) {
        let fields =
            ["--field".as_ref(), deb.as_os_str(), "Package".as_ref(), "Version".as_ref(), "Depends".as_ref()];
        let fields = output_of("dpkg-deb", &fields)?.context("fields")?;
        let fields = String::from_utf8(fields.stdout)?;
        assert!(fields.contains(&format!("Package: {package}\n")), "{fields}");
        assert!(fields.contains(&format!("Version: {}-1\n", env!("CARGO_PKG_VERSION"))), "{fields}");
        assert!(fields.contains("libc6 (>= 2."), "{fields}");
        let listed = output_of("dpkg-deb", &["--contents".as_ref(), deb.as_os_str()])?.context("contents")?;
        contents += &String::from_utf8(listed.stdout)?;
    }
    for path in [
        format!("/usr/lib/postgresql/{major}/lib/tollgate.so"),
        format!("/usr/share/postgresql/{major}/extension/tollgate--{}.sql", env!("CARGO_PKG_VERSION")),
        format!("/usr/share/doc/postgresql-{major}-tollgate/copyright"),
        "/usr/bin/tollgated".into(),
        "/usr/lib/systemd/system/tollgated.service".into(),
        "/usr/lib/systemd/system/tollgated@.service".into(),
        "/usr/share/man/man8/tollgated.8.gz".into(),
        "/usr/share/doc/tollgated/changelog.Debian.gz".into(),
    ] {
        assert!(contents.lines().any(|line| line.ends_with(&format!(".{path}"))), "no {path} in\n{contents}");
    }
    // That a first version closes no bug report of Debian's is no matter outside of Debian.
    let mut arguments: Vec<&OsStr> =
        ["--fail-on=error,warning", "--suppress-tags=initial-upload-closes-no-bugs"]
            .map(AsRef::as_ref)
            .into();
    arguments.extend(debs.iter().map(|deb| deb.as_os_str()));
    if let Some(lintian) = output_of("lintian", &arguments)? {
        let said = String::from_utf8_lossy(&lintian.stdout).into_owned();
        ensure!(lintian.status.success(), "{said}{}", String::from_utf8_lossy(&lintian.stderr));
    }
    Ok(())
}

/// They have PostgreSQL 18, so they are tried when that is tested.
#[test]
#[ignore = "long: makes images of Debian, some minutes"]
fn the_images_are_made_and_run_and_carry_the_use_of_a_token() -> Result<()> {
    if Install::under_test()?.major != 18 {
        not_run("the images have PostgreSQL 18: they are tried when that is tested");
        return Ok(());
    }
    let (packages, images) = (dev_dir()?.join("package"), dev_dir()?.join("images"));
    if !packages.exists() {
        return not_run_here(&format!("there is no {}, which `make package` makes", packages.display()));
    }
    for (script, arguments) in
        [("images.sh", vec![packages.as_path(), images.as_path()]), ("try-images.sh", vec![&images])]
    {
        let run = Command::new(repository().join("packaging").join(script)).args(arguments).output()?;
        let said = String::from_utf8_lossy(&run.stderr);
        if run.status.code() == Some(CANNOT_BE_RUN_HERE) {
            not_run(said.lines().last().context("the reason")?);
            return Ok(());
        }
        ensure!(
            run.status.success(),
            "{script}: {}\n{}{said}",
            run.status,
            String::from_utf8_lossy(&run.stdout)
        );
    }
    Ok(())
}

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// What systemd makes of a word that it does not know is a line in its log, and no protection.
#[test]
fn the_units_are_understood_by_systemd_which_finds_them_hardened() -> Result<()> {
    for name in ["tollgated.service", "tollgated@.service"] {
        let unit = repository().join("packaging/tollgated").join(name);
        let text = std::fs::read_to_string(&unit)?;
        assert_eq!(values(&text, "Type"), ["notify"]);
        let security = ["security", "--offline=true", "--threshold=20", "--no-pager"].map(OsStr::new);
        let Some(verdict) = output_of("systemd-analyze", &[&security[..], &[unit.as_os_str()]].concat())?
        else {
            return Ok(());
        };
        assert!(verdict.status.success(), "{name}: {}", String::from_utf8_lossy(&verdict.stdout));
        // It also looks for what only the package brings.
        let verified = output_of("systemd-analyze", &["verify".as_ref(), unit.as_os_str()])?
            .context("systemd-analyze")?;
        let warnings = String::from_utf8_lossy(&verified.stderr).into_owned();
        let others: Vec<&str> = warnings
            .lines()
            .filter(|line| {
                !line.contains("/usr/bin/tollgated is not executable") && !line.contains("'man tollgated(8)'")
            })
            .collect();
        assert_eq!(others, Vec::<&str>::new(), "{name}");
    }
    Ok(())
}

/// If only one of them were hardened later, it would go unnoticed.
#[test]
fn the_units_for_one_database_and_for_several_differ_in_the_configuration_alone() -> Result<()> {
    let lines = |name: &str| -> Result<Vec<String>> {
        let text = std::fs::read_to_string(repository().join("packaging/tollgated").join(name))?;
        let plain = text.replace(" for %i", "");
        let same = |line: &&str| !line.starts_with('#') && !line.starts_with("Environment=");
        Ok(plain.lines().filter(same).map(str::to_owned).collect())
    };
    assert_eq!(lines("tollgated@.service")?, lines("tollgated.service")?);
    Ok(())
}
