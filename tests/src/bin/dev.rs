//! `make up` and `make down`: a private cluster and a daemon that stay running, all under `.dev/`.
//!
//! `up` establishes a state rather than doing steps, so it can be run at any time: running parts stay, dead ones are
//! started again, and new builds are put to use.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use clap::{Args, Parser};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sha2::{Digest as _, Sha256};
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Config, NoTls};
use tollgate_core::seal_box::MasterKey;
use tollgate_tests::{Account, Install, Port, Server, Shutdown, dev_dir, is_alive, stop_data_dir};

/// The database of the extension and the daemon.
const DATABASE: &str = "tollgate";

/// Ports at which the search for a free one begins, so that a cluster usually keeps its own: 25418 for PostgreSQL 18.
const PORT_BASE: u16 = 25_400;

const DAEMON_START: Duration = Duration::from_secs(20);
/// A little more than the daemon needs at most to write its last usage.
const DAEMON_STOP: Duration = Duration::from_secs(30);

#[derive(Parser)]
#[command(about = "The servers behind `make up` and `make down`")]
enum Command {
    /// Start a cluster and the daemon, if they do not run already
    Up(Up),
    /// Stop the daemon and every cluster cleanly
    Down,
}

#[derive(Args)]
struct Up {
    /// The PostgreSQL that the extension was installed into
    #[arg(long)]
    pg_config: PathBuf,
    /// The daemon's binary, where an unprivileged user can run it
    #[arg(long)]
    tollgated: PathBuf,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    match Command::parse() {
        Command::Up(options) => up(&options).await,
        Command::Down => down(),
    }
}

async fn up(options: &Up) -> Result<()> {
    let dev = dev_dir()?;
    let account = Account::unprivileged()?;
    let install = Install::from_pg_config(&options.pg_config)?;
    let daemon = Daemon { binary: options.tollgated.clone(), account: account.clone(), dev: dev.clone() };

    let (mut server, _port) = prepare(&dev, install, account)?;
    let password = password(&dev)?;
    start(&mut server, &daemon)?;
    create_database(&server, &daemon, &password).await?;

    let url = format!("postgres://postgres:{password}@127.0.0.1:{}/{DATABASE}", server.port);
    daemon.start(&server, &url).await?;
    write_environment(&dev, &server, &daemon, &password, &url)?;

    println!();
    println!("{} and tollgated are running.", server.install.version);
    println!("  connect:  make psql PG={}", server.install.major);
    println!("            or:  . .dev/env; psql   (DATABASE_URL, PATH and PGDATA are in .dev/env)");
    println!("  logs:     .dev/log/");
    println!("  stop:     make down");
    Ok(())
}

fn down() -> Result<()> {
    let dev = dev_dir()?;
    stop_daemon(&dev)?;
    for entry in fs::read_dir(&dev)?.flatten() {
        let name = entry.file_name();
        if let Some(major) = name.to_str().and_then(|name| name.strip_prefix("data-"))
            && stop_data_dir(&entry.path(), Shutdown::Fast)?
        {
            println!("==> PostgreSQL {major} stopped");
        }
    }
    Ok(())
}

/// The server of this major version, created if necessary, with its current configuration.
fn prepare(dev: &Path, install: Install, account: Account) -> Result<(Server, Option<Port>)> {
    let data = dev.join(format!("data-{}", install.major));
    let log = dev.join("log").join(format!("postgresql-{}.log", install.major));
    fs::create_dir_all(dev.join("log"))?;
    let sockets = sockets_dir(dev);
    account.private_dir(&sockets)?;

    let mut server = Server::new(install, account, data, log, sockets, 0);
    let mut lease = None;
    match server.pid() {
        Some(_) => server.port = running_port(&server.data)?,
        None => {
            let port = Port::lease(PORT_BASE + u16::try_from(server.install.major)?)?;
            server.port = port.number;
            lease = Some(port);
        }
    }
    server.set("shared_preload_libraries", "tollgate");
    server.set("lc_messages", "C");
    server.set("log_line_prefix", "%m [%p] %q%u@%d/%a ");
    server.set("tollgate.issuer", "https://id.example.com");
    server.set("tollgate.audience", "https://api.example.com");
    server.set("tollgate.master_key_file", master_key(&server)?.display().to_string());

    if !server.is_initialised() {
        println!("==> making a cluster of {} in {}", server.install.version, server.data.display());
        server.account.private_dir(&server.data)?;
        server.initdb(&["--auth=trust", "--no-instructions"])?;
    }
    // The socket is in a private directory; every user of this machine can reach the port.
    fs::write(
        server.data.join("pg_hba.conf"),
        "local all all trust\nlocal replication all trust\nhost all all 127.0.0.1/32 scram-sha-256\n",
    )?;
    Ok((server, lease))
}

/// Starts the server, or restarts it if it runs another build of the extension or another PostgreSQL.
fn start(server: &mut Server, daemon: &Daemon) -> Result<()> {
    let library = server.install.library();
    let built = format!("{} {}\n", server.install.bin_dir().display(), digest(&library)?);
    let loaded = file_about(&server.data, "loaded");
    if server.pid().is_some() && fs::read_to_string(&loaded).unwrap_or_default() != built {
        println!("==> the extension was rebuilt: restarting PostgreSQL {}", server.install.major);
        stop_daemon(&daemon.dev)?;
        server.stop(Shutdown::Fast)?;
    }
    if server.pid().is_none() {
        println!("==> starting {} on port {}", server.install.version, server.port);
        server.start()?;
        fs::write(&loaded, built)?;
    }
    Ok(())
}

/// Creates the database and the extension, or updates them to the current build.
async fn create_database(server: &Server, daemon: &Daemon, password: &str) -> Result<()> {
    let maintenance = connect(server, "postgres").await?;
    // A utility statement takes no parameters; the password is hexadecimal.
    maintenance.batch_execute(&format!("alter role postgres password '{password}'")).await?;

    let script = install_script(&server.install)?;
    let created_from = file_about(&server.data, "created-from");
    let built = format!("{}\n", digest(&script)?);
    let exists = maintenance
        .query_opt("select from pg_catalog.pg_database where datname = $1", &[&DATABASE])
        .await?
        .is_some();
    if exists {
        let client = connect(server, DATABASE).await?;
        let versions = client
            .query_opt(
                "select installed_version, default_version from pg_catalog.pg_available_extensions
                  where name = 'tollgate' and installed_version is not null",
                &[],
            )
            .await?;
        if let Some(row) = versions {
            let (installed, default): (String, String) = (row.get(0), row.get(1));
            if installed != default {
                println!("==> updating the extension from {installed} to {default}");
                match client.batch_execute("alter extension tollgate update").await {
                    Ok(()) => {
                        fs::write(&created_from, built)?;
                        return Ok(());
                    }
                    // Versions that were not released have no script from one to the next.
                    Err(error) if error.code() == Some(&SqlState::INVALID_PARAMETER_VALUE) => {}
                    Err(error) => return Err(error.into()),
                }
            } else if fs::read_to_string(&created_from).unwrap_or_default() == built {
                return Ok(());
            }
        }
        drop(client);
        set_aside(&maintenance, daemon).await?;
    }
    println!("==> creating the database {DATABASE} and the extension in it");
    maintenance.batch_execute(&format!("create database {DATABASE}")).await?;
    connect(server, DATABASE).await?.batch_execute("create extension tollgate").await?;
    fs::write(&created_from, built)?;
    Ok(())
}

/// The extension's SQL changed without a new version, as it does during development, and there is no upgrade script for
/// that. The database may contain something of value: it is renamed, not dropped.
async fn set_aside(maintenance: &Client, daemon: &Daemon) -> Result<()> {
    stop_daemon(&daemon.dev)?;
    let aside = format!("{DATABASE}_{}", jiff::Zoned::now().strftime("%Y%m%d_%H%M%S"));
    println!(
        "==> the extension's SQL is not what the database {DATABASE} was made with: renaming that to {aside}"
    );
    println!("    (to be rid of it: drop database {aside})");
    maintenance
        .execute(
            "select pg_catalog.pg_terminate_backend(pid) from pg_catalog.pg_stat_activity where datname = $1",
            &[&DATABASE],
        )
        .await?;
    maintenance.batch_execute(&format!("alter database {DATABASE} rename to {aside}")).await?;
    Ok(())
}

struct Daemon {
    binary: PathBuf,
    account: Account,
    dev: PathBuf,
}

impl Daemon {
    /// Starts the daemon, unless this build of it already runs for this server.
    async fn start(&self, server: &Server, url: &str) -> Result<()> {
        let database = connect(server, DATABASE).await?;
        let started_with = self.dev.join("tollgated.started-with");
        let wanted = format!("{:?} {}\n", fs::metadata(&self.binary)?.modified()?, server.port);
        if daemon_pid(&self.dev).is_some() {
            if fs::read_to_string(&started_with).unwrap_or_default() == wanted {
                return Ok(());
            }
            stop_daemon(&self.dev)?;
        }
        let log_path = self.dev.join("log/tollgated.log");
        println!("==> starting tollgated, which logs to {}", log_path.display());
        let log = File::options().create(true).append(true).open(&log_path)?;
        let mut command = self.account.command(&self.binary);
        command.arg("run").env("DATABASE_URL", url).current_dir("/").process_group(0);
        if std::env::var_os("TOLLGATED_OPS_ADDRESS").is_none() {
            // Its usual port may be in use by another checkout's daemon. The log says which one it took.
            command.env("TOLLGATED_OPS_ADDRESS", "127.0.0.1:0");
        }
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let mut child = command.spawn().with_context(|| format!("cannot run {}", self.binary.display()))?;
        fs::write(self.dev.join("tollgated.pid"), format!("{}\n", child.id()))?;
        fs::write(&started_with, wanted)?;

        let pid = i32::try_from(child.id())?;
        let end = std::time::Instant::now() + DAEMON_START;
        let reported =
            "select from tollgate.daemons where pid = $1 and last_seen_at > now() - interval '1 minute'";
        while database.query_opt(reported, &[&pid]).await?.is_none() {
            let ended = child.try_wait()?;
            if ended.is_some() || std::time::Instant::now() > end {
                let log = fs::read_to_string(&log_path)?;
                let lines: Vec<&str> = log.lines().collect();
                let state = ended
                    .map_or("has not reported to the database".into(), |status| format!("ended ({status})"));
                bail!(
                    "tollgated {state}; its log ends with:\n{}",
                    lines[lines.len().saturating_sub(20)..].join("\n")
                );
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    }
}

/// The running daemon that `up` started. A process id alone proves nothing: it may have been given to another program.
fn daemon_pid(dev: &Path) -> Option<Pid> {
    let pid = Pid::from_raw(fs::read_to_string(dev.join("tollgated.pid")).ok()?.trim().parse().ok()?);
    let is_ours = match fs::read_to_string(format!("/proc/{pid}/comm")) {
        Ok(name) => name.trim() == "tollgated",
        Err(_) => !Path::new("/proc/self/comm").exists(),
    };
    (is_alive(pid) && is_ours).then_some(pid)
}

fn stop_daemon(dev: &Path) -> Result<()> {
    if let Some(pid) = daemon_pid(dev) {
        kill(pid, Signal::SIGTERM)?;
        let end = std::time::Instant::now() + DAEMON_STOP;
        while daemon_pid(dev).is_some() {
            ensure!(
                std::time::Instant::now() < end,
                "tollgated (process {pid}) has not stopped within {DAEMON_STOP:?}; see .dev/log/tollgated.log"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        println!("==> tollgated stopped");
    }
    match fs::remove_file(dev.join("tollgated.pid")) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}

/// Two files with the same content: one for the last started PostgreSQL, one for each major version.
fn write_environment(dev: &Path, server: &Server, daemon: &Daemon, password: &str, url: &str) -> Result<()> {
    let daemon_dir = daemon.binary.parent().context("the daemon's binary is in a directory")?;
    let text = format!(
        "# Written by `make up`. To be read by a shell: . .dev/env\n\
         export DATABASE_URL='{url}'\n\
         export PGDATA='{}'\n\
         export PGHOST=127.0.0.1 PGPORT={} PGUSER=postgres PGPASSWORD={password} PGDATABASE={DATABASE}\n\
         export PATH='{}':'{}':\"$PATH\"\n",
        server.data.display(),
        server.port,
        server.install.bin_dir().display(),
        daemon_dir.display(),
    );
    for name in ["env".to_owned(), format!("env-{}", server.install.major)] {
        let path = dev.join(name);
        fs::write(&path, &text)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
    }
    Ok(())
}

/// The file with the master key of this cluster's signing keys, created once.
fn master_key(server: &Server) -> Result<PathBuf> {
    let path = file_about(&server.data, "master-key");
    if !path.exists() {
        let Ok(key) = MasterKey::generate() else { bail!("the system has no random numbers") };
        let mut file = File::options().create_new(true).write(true).mode(0o600).open(&path)?;
        writeln!(file, "{}", *key.to_line())?;
        server.account.own(&path)?;
    }
    Ok(path)
}

/// The superuser's password for connections over TCP, created once.
fn password(dev: &Path) -> Result<String> {
    let path = dev.join("password");
    if let Ok(password) = fs::read_to_string(&path) {
        return Ok(password.trim().to_owned());
    }
    let mut bytes = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    let password = bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let mut file = File::options().create(true).truncate(true).write(true).mode(0o600).open(&path)?;
    file.write_all(password.as_bytes())?;
    Ok(password)
}

async fn connect(server: &Server, database: &str) -> Result<Client> {
    let mut config = Config::new();
    config.host_path(&server.sockets).port(server.port).user("postgres").dbname(database);
    let (client, connection) =
        config.connect(NoTls).await.with_context(|| format!("cannot connect to the database {database}"))?;
    // The client reports the end of the connection.
    tokio::spawn(connection);
    Ok(client)
}

/// The script that `create extension` runs for the version that was built.
fn install_script(install: &Install) -> Result<PathBuf> {
    let directory = install.extension_dir();
    let control = fs::read_to_string(directory.join("tollgate.control"))
        .with_context(|| format!("the extension is not installed in {}", directory.display()))?;
    let version = control
        .lines()
        .find_map(|line| {
            line.strip_prefix("default_version")?.trim().strip_prefix('=')?.trim().split('\'').nth(1)
        })
        .context("tollgate.control names no default_version")?;
    Ok(directory.join(format!("tollgate--{version}.sql")))
}

fn sockets_dir(dev: &Path) -> PathBuf {
    let short = dev.join("run");
    if Server::check_socket_path(&short) {
        return short;
    }
    let digest = Sha256::digest(dev.as_os_str().as_encoded_bytes());
    std::env::temp_dir()
        .join(format!("tollgate-{:02x}{:02x}{:02x}{:02x}", digest[0], digest[1], digest[2], digest[3]))
}

fn running_port(data: &Path) -> Result<u16> {
    let pid_file = fs::read_to_string(data.join("postmaster.pid"))?;
    Ok(pid_file.lines().nth(3).context("postmaster.pid names no port")?.trim().parse()?)
}

/// One of our own files about a data directory.
fn file_about(data: &Path, what: &str) -> PathBuf {
    data.with_extension(what)
}

fn digest(path: &Path) -> Result<String> {
    let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect())
}
