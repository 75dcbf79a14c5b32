//! A test's own PostgreSQL: an empty cluster in a temporary directory, removed when dropped.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};
use nix::unistd::Pid;
use tempfile::TempDir;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio_postgres::{AsyncMessage, Client, Config, NoTls, SimpleQueryMessage};

use crate::account::Account;
use crate::dev_dir::dev_dir;
use crate::install::Install;
use crate::port::Port;
use crate::server::{self, Server, Shutdown, is_alive};

/// The database that tests use unless they need another.
pub const DATABASE: &str = "postgres";

/// The master key of [`Builder::master_key`].
pub const MASTER_KEY: &str = "6d61737465722d6b65792d6f662d7468652d74657374732d3031323334353637";

/// The settings of every test server. Tests do not cover durability against a power failure of the machine.
const SETTINGS: &[(&str, &str)] = &[
    ("fsync", "off"),
    ("full_page_writes", "off"),
    ("lc_messages", "C"),
    ("timezone", "UTC"),
    ("log_timezone", "UTC"),
    ("log_line_prefix", "%m [%p] %q%u@%d/%a "),
    ("max_prepared_transactions", "10"),
    ("wal_level", "replica"),
    ("wal_keep_size", "64MB"),
    ("wal_retrieve_retry_interval", "100ms"),
    // Tokens that tests purge ended only a moment ago.
    ("tollgate.min_retention", "0"),
    ("tollgate.issuer", "https://tollgate.test"),
    ("tollgate.audience", "https://api.test"),
];

/// A database that [`Cluster::create_database`] copies, in clusters that are copies themselves.
const TEMPLATE: &str = "with_tollgate";

const INITDB: &[&str] = &["--auth=trust", "--no-sync", "--no-instructions"];

#[derive(Clone, Debug)]
pub struct Builder {
    preload: bool,
    extension: bool,
    own_identity: bool,
    master_key: bool,
    settings: Vec<(String, String)>,
    environment: Vec<(String, String)>,
    install: Option<Install>,
    within: Option<PathBuf>,
}

impl Builder {
    /// Whether `shared_preload_libraries` has the extension; yes by default.
    #[must_use]
    pub fn preload(mut self, preload: bool) -> Self {
        self.preload = preload;
        self
    }

    /// Whether the extension is created in [`DATABASE`]; yes by default.
    #[must_use]
    pub fn extension(mut self, extension: bool) -> Self {
        self.extension = extension;
        self
    }

    /// A separate system identifier, which costs a second; otherwise all clusters have that of the template they are
    /// copied from.
    #[must_use]
    pub fn own_identity(mut self) -> Self {
        self.own_identity = true;
        self
    }

    /// Whether it has [`MASTER_KEY`], in a file beside the data directory: see [`Cluster::master_key_file`]; yes by
    /// default.
    #[must_use]
    pub fn master_key(mut self, master_key: bool) -> Self {
        self.master_key = master_key;
        self
    }

    /// A line of `postgresql.conf`.
    #[must_use]
    pub fn setting(mut self, name: &str, value: &str) -> Self {
        self.settings.push((name.to_owned(), value.to_owned()));
        self
    }

    /// A variable of the server's environment.
    #[must_use]
    pub fn environment(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Another PostgreSQL than the one that `make test` chose.
    #[must_use]
    pub fn install(mut self, install: Install) -> Self {
        self.install = Some(install);
        self
    }

    /// A directory to create it in, such as that of a small file system.
    #[must_use]
    pub fn within(mut self, directory: &Path) -> Self {
        self.within = Some(directory.to_owned());
        self
    }

    /// Upgrades another cluster, which it stops, with `pg_upgrade`. The extension is the one that was there.
    pub fn upgrade(self, older: &mut Cluster) -> Result<Cluster> {
        let install = self.install.map_or_else(Install::under_test, Ok)?;
        let mut newer = Cluster::prepare(install, Account::unprivileged()?, None)?;
        let checksums: &[&str] = if newer.major() >= 18 { &["--no-data-checksums"] } else { &[] };
        newer.server.initdb(&[INITDB, checksums].concat())?;
        newer.server.settings.clone_from(&older.server.settings);
        for (name, value) in self.settings {
            newer.server.set(&name, value);
        }
        newer.server.write_configuration()?;
        older.stop()?;
        let mut upgrade = newer.server.program("pg_upgrade");
        upgrade.current_dir(newer.socket_dir()).arg("--old-bindir").arg(older.install().bin_dir());
        upgrade.arg("--new-bindir").arg(newer.install().bin_dir());
        upgrade.arg("--old-datadir").arg(older.data_dir()).arg("--new-datadir").arg(newer.data_dir());
        upgrade.arg("--socketdir").arg(newer.socket_dir()).arg("--no-sync");
        upgrade.arg(format!("--old-port={}", older.port())).arg(format!("--new-port={}", newer.port()));
        // Otherwise they set the options of the same names.
        server::run(upgrade.env_remove("PGHOST").env_remove("PGPORT"))?;
        newer.server.start()?;
        Ok(newer)
    }

    pub fn start(self) -> Result<Cluster> {
        let install = self.install.map_or_else(Install::under_test, Ok)?;
        let account = Account::unprivileged()?;
        let template =
            (!self.own_identity).then(|| template(&install, &account, self.extension)).transpose()?;
        let mut cluster = Cluster::prepare(install, account, self.within.as_deref())?;
        match &template {
            Some(template) => copy(template, &cluster.server.data)?,
            None => cluster.server.initdb(INITDB)?,
        }
        for (name, value) in SETTINGS {
            cluster.server.set(name, *value);
        }
        if self.preload {
            cluster.server.set("shared_preload_libraries", "tollgate");
        }
        if self.master_key {
            cluster.write_master_keys(&[MASTER_KEY])?;
            let file = cluster.master_key_file().display().to_string();
            cluster.server.set("tollgate.master_key_file", file);
        }
        for (name, value) in self.settings {
            cluster.server.set(&name, value);
        }
        cluster.server.environment.extend(self.environment);
        cluster.server.start()?;
        cluster.has_template = template.is_some() && self.extension;
        if self.extension && !cluster.has_template {
            cluster.execute(DATABASE, "create extension tollgate")?;
        }
        Ok(cluster)
    }
}

/// A running server, with the superuser `postgres`. Any user may connect as any role, without a password.
#[derive(Debug)]
pub struct Cluster {
    server: Server,
    has_template: bool,
    _port: Port,
    // Dropped after the server has stopped: see `drop`.
    _directory: TempDir,
}

impl Cluster {
    /// Preloaded, with the extension created in [`DATABASE`].
    pub fn start() -> Result<Self> {
        Self::builder().start()
    }

    pub fn builder() -> Builder {
        Builder {
            preload: true,
            extension: true,
            own_identity: false,
            master_key: true,
            settings: Vec::new(),
            environment: Vec::new(),
            install: None,
            within: None,
        }
    }

    fn prepare(install: Install, account: Account, within: Option<&Path>) -> Result<Self> {
        let parent = within.map_or_else(clusters_dir, |directory| Ok(directory.to_owned()))?;
        let directory =
            tempfile::Builder::new().prefix(&format!("{}-", std::process::id())).tempdir_in(&parent)?;
        account.private_dir(directory.path())?;
        let port = Port::any()?;
        let at = |name: &str| directory.path().join(name);
        let server =
            Server::new(install, account, at("data"), at("log"), directory.path().into(), port.number);
        Ok(Self { server, has_template: false, _port: port, _directory: directory })
    }

    /// A hot standby of this server, streaming from it, with the same settings. It may lag: see
    /// [`Cluster::catch_up_with`].
    pub fn standby(&self) -> Result<Self> {
        let mut standby = Self::prepare(self.server.install.clone(), self.server.account.clone(), None)?;
        let mut backup = self.server.program("pg_basebackup");
        backup.arg("--pgdata").arg(&standby.server.data);
        server::run(backup.args([
            "--write-recovery-conf",
            "--wal-method=stream",
            "--checkpoint=fast",
            "--no-sync",
        ]))?;
        standby.server.settings.clone_from(&self.server.settings);
        standby.server.start()?;
        Ok(standby)
    }

    /// Waits until this standby has replayed all that `primary` has written so far.
    pub fn catch_up_with(&self, primary: &Self) -> Result<()> {
        let written =
            primary.value(DATABASE, "select pg_current_wal_lsn()")?.context("a primary has a position")?;
        let replayed = format!("select pg_last_wal_replay_lsn() >= '{written}'::pg_lsn");
        let deadline = std::time::Duration::from_secs(30);
        let caught_up = crate::wait::holds_within(deadline, &mut || {
            self.value(DATABASE, &replayed).is_ok_and(|value| value.as_deref() == Some("t"))
        });
        anyhow::ensure!(
            caught_up,
            "the standby has not replayed {written} after {deadline:?}:\n{}",
            self.log()
        );
        Ok(())
    }

    /// Makes this standby a primary.
    pub fn promote(&self) -> Result<()> {
        let promoted = self.value(DATABASE, "select pg_promote(wait => true, wait_seconds => 60)")?;
        anyhow::ensure!(promoted.as_deref() == Some("t"), "the standby was not promoted:\n{}", self.log());
        Ok(())
    }

    /// Stops the server cleanly, disconnecting all clients.
    pub fn stop(&mut self) -> Result<()> {
        self.server.stop(Shutdown::Fast)
    }

    /// Stops the server without a checkpoint, as `pg_ctl stop -m immediate`.
    pub fn stop_immediately(&mut self) -> Result<()> {
        self.server.stop(Shutdown::Immediate)
    }

    /// SIGKILL to the postmaster and all its children.
    pub fn crash(&mut self) -> Result<()> {
        self.server.crash()
    }

    /// Stops the server cleanly if it runs, and starts it with the current settings, on the same port.
    pub fn restart(&mut self) -> Result<()> {
        self.server.stop(Shutdown::Fast)?;
        self.server.start()
    }

    /// Sets a line of `postgresql.conf`, and reloads it. A setting that needs a restart takes effect at the next one.
    pub fn configure(&mut self, name: &str, value: &str) -> Result<()> {
        self.server.set(name, value);
        self.server.reload()
    }

    /// The server's log so far.
    pub fn log(&self) -> String {
        self.server.log().unwrap_or_else(|error| format!("{error:#}"))
    }

    /// The server's major version.
    pub fn major(&self) -> u32 {
        self.server.install.major
    }

    pub fn install(&self) -> &Install {
        &self.server.install
    }

    pub fn data_dir(&self) -> &Path {
        &self.server.data
    }

    /// Where its master keys are, if it has any.
    pub fn master_key_file(&self) -> PathBuf {
        self.server.sockets.join("master.key")
    }

    /// Writes the file of its master keys, each of 64 hexadecimal digits; the server reads it at the next reload.
    pub fn write_master_keys(&self, keys: &[&str]) -> Result<()> {
        let file = self.master_key_file();
        let text: String = keys.iter().map(|key| format!("tollgate-master-key-1:{key}\n")).collect();
        fs::write(&file, text)?;
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600))?;
        self.server.account.own(&file)
    }

    /// The directory of the Unix socket.
    pub fn socket_dir(&self) -> &Path {
        &self.server.sockets
    }

    /// On 127.0.0.1; stays the same for the cluster's life.
    pub fn port(&self) -> u16 {
        self.server.port
    }

    /// One of PostgreSQL's own programs (`pg_dump`, `pgbench`, …), connecting here as the superuser.
    pub fn program(&self, name: &str) -> Command {
        let mut command = self.server.program(name);
        command.env("PGDATABASE", DATABASE);
        command
    }

    /// For programs that connect over TCP, such as the daemon.
    pub fn url(&self, role: &str, database: &str) -> String {
        format!("postgres://{role}@127.0.0.1:{}/{database}", self.port())
    }

    /// For connections with settings of their own.
    pub fn config(&self, role: &str, database: &str) -> Config {
        let mut config = Config::new();
        config.host_path(self.socket_dir()).port(self.port()).user(role).dbname(database);
        config
    }

    pub async fn connect(&self, role: &str, database: &str) -> Result<Client> {
        Ok(self.listen(role, database).await?.0)
    }

    /// A connection, and the notices and notifications that arrive on it.
    pub async fn listen(
        &self,
        role: &str,
        database: &str,
    ) -> Result<(Client, UnboundedReceiver<AsyncMessage>)> {
        connect(&self.config(role, database)).await
    }

    /// Runs SQL as the superuser, possibly several statements: for set-up, from sync and async tests alike.
    pub fn execute(&self, database: &str, sql: &str) -> Result<()> {
        self.simple_query(database, sql)?;
        Ok(())
    }

    /// Another database with the extension.
    pub fn create_database(&self, name: &str) -> Result<()> {
        if self.has_template {
            return self.execute(DATABASE, &format!("create database {name} template {TEMPLATE}"));
        }
        self.execute(DATABASE, &format!("create database {name}"))?;
        self.execute(name, "create extension tollgate")
    }

    /// The first column of the first row, as text; `None` for no row and for NULL.
    pub fn value(&self, database: &str, sql: &str) -> Result<Option<String>> {
        let answer = self.simple_query(database, sql)?;
        Ok(answer
            .iter()
            .find_map(|message| match message {
                SimpleQueryMessage::Row(row) => Some(row.get(0).map(str::to_owned)),
                _ => None,
            })
            .flatten())
    }

    fn simple_query(&self, database: &str, sql: &str) -> Result<Vec<SimpleQueryMessage>> {
        let config = self.config("postgres", database);
        // A separate thread, since the caller's may already be driving a runtime.
        std::thread::scope(|scope| {
            let worker = scope.spawn(|| {
                tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
                    let (client, _) = connect(&config).await?;
                    client.simple_query(sql).await.with_context(|| format!("in: {sql}"))
                })
            });
            worker.join().map_err(|_| anyhow::anyhow!("the connection's thread panicked"))?
        })
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log();
            let lines: Vec<&str> = log.lines().collect();
            eprintln!(
                "--- the end of the server's log ---\n{}",
                lines[lines.len().saturating_sub(40)..].join("\n")
            );
        }
        if let Err(error) = self.server.stop(Shutdown::Immediate) {
            eprintln!("{error:#}");
        }
    }
}

async fn connect(config: &Config) -> Result<(Client, UnboundedReceiver<AsyncMessage>)> {
    let (client, mut connection) = config.connect(NoTls).await.context("cannot connect")?;
    let (sender, receiver) = unbounded_channel();
    tokio::spawn(async move {
        // The client reports a failed connection.
        while let Some(Ok(message)) = std::future::poll_fn(|context| connection.poll_message(context)).await {
            // Most tests do not listen.
            let _ = sender.send(message);
        }
    });
    Ok((client, receiver))
}

/// The directory for the clusters of the tests, after removing those that killed test runs left in it.
fn clusters_dir() -> Result<PathBuf> {
    let short = dev_dir()?.join("tmp/clusters");
    let parent = if Server::check_socket_path(&short.join("4194304-abcdef")) {
        short
    } else {
        std::env::temp_dir().join("tollgate-clusters")
    };
    fs::create_dir_all(&parent).with_context(|| format!("cannot make {}", parent.display()))?;
    for entry in fs::read_dir(&parent)?.flatten() {
        let name = entry.file_name();
        let owner = name.to_str().and_then(|name| name.split('-').next()?.parse().ok());
        if owner.is_some_and(|owner| !is_alive(Pid::from_raw(owner))) {
            abandon(&entry.path());
        }
    }
    Ok(parent)
}

/// Best effort: another test process may be sweeping at the same time.
fn abandon(directory: &Path) {
    let _ = server::stop_data_dir(&directory.join("data"), Shutdown::Immediate);
    let _ = fs::remove_dir_all(directory);
}

/// A data directory for each version of PostgreSQL, which tests copy: freshly initialised, or with the extension in
/// [`DATABASE`] and [`TEMPLATE`]. initdb takes a second, and creating the extension a fifth of one.
fn template(install: &Install, account: &Account, extension: bool) -> Result<PathBuf> {
    let parent = dev_dir()?.join("tmp/templates");
    fs::create_dir_all(&parent)?;
    let lock = File::create(parent.join("lock"))?;
    lock.lock()?;
    let name: String = install
        .version
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' })
        .collect();
    let empty = parent.join(&name);
    if !empty.exists() {
        let cluster = Cluster::prepare(install.clone(), account.clone(), Some(&parent))?;
        cluster.server.initdb(INITDB)?;
        fs::rename(&cluster.server.data, &empty)?;
    }
    if !extension {
        return Ok(empty);
    }
    let prefix = format!("{name}-tollgate-");
    let name = format!("{prefix}{}", install.scripts_digest()?);
    let template = parent.join(&name);
    if !template.exists() {
        // Of scripts that were replaced.
        for entry in fs::read_dir(&parent)?.flatten() {
            if entry.file_name().to_string_lossy().starts_with(&prefix) {
                fs::remove_dir_all(entry.path())?;
            }
        }
        let mut cluster = Cluster::prepare(install.clone(), account.clone(), Some(&parent))?;
        copy(&empty, &cluster.server.data)?;
        for (name, value) in SETTINGS {
            cluster.server.set(name, *value);
        }
        cluster.server.start()?;
        cluster.execute(DATABASE, "create extension tollgate")?;
        cluster.execute(DATABASE, &format!("create database {TEMPLATE} template {DATABASE}"))?;
        cluster.server.stop(Shutdown::Fast)?;
        fs::rename(&cluster.server.data, &template)?;
    }
    Ok(template)
}

fn copy(data: &Path, to: &Path) -> Result<()> {
    server::run(Command::new("cp").arg("-a").arg(data).arg(to))
}
