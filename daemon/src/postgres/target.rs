//! Where to connect to and as whom, and how one connection is made: hosts in turn, TLS as configured, a session set up so that
//! nothing on it can wait for ever.
//!
//! tokio-postgres' `Config` reads hosts, addresses, ports and time-outs. The loop over the hosts is ours, since `Config::connect`
//!
//! - waits without limit for a host that accepts the connection and then does not answer;
//! - takes one password for all hosts, where a password file has one for each;
//! - knows neither the fallbacks of sslmode allow and prefer, nor verify-ca and verify-full;
//! - asks for `transaction_read_only`, which a role may have set on a primary, and knows no target_session_attrs primary,
//!   standby and prefer-standby;
//! - reports the error of the last host only.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr as _;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio_postgres::config;
use tokio_postgres::config::{LoadBalanceHosts, SslMode, SslNegotiation};
use tokio_postgres::tls::MakeTlsConnect;
use tokio_postgres::{Config, NoTls, Socket};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::error::{Doing as _, Error, Kind, Result};
use crate::postgres::conninfo::{Login, Options};
use crate::postgres::session::{Session, pump};
use crate::postgres::{conninfo, tls};
use crate::secret::Secret;

/// A host must be connected to, and must answer, within this time, unless the connection string says otherwise. Short, since
/// the next host waits behind a dead one, and each connection is tried again.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Locks are waited for no longer: their holder is a person or a migration, and every task runs again.
const LOCK_TIMEOUT: Duration = Duration::from_secs(5);
/// A transaction that is idle for so long belongs to a daemon that was frozen or cut off, and its locks block another daemon.
/// Long enough for a batch of events to be written to a slow log.
const ABANDONED: Duration = Duration::from_secs(10);
/// A network that fails silently is noticed within minutes, not hours. (The lease of `leader.rs` is faster where there is
/// one.)
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);
const TCP_USER_TIMEOUT: Duration = Duration::from_secs(60);
/// Settings that not every server has, with our values: the first came with PostgreSQL 14, the others with 17.
const OPTIONAL_SETTINGS: [(&str, &str); 3] =
    [("idle_session_timeout", "0"), ("transaction_timeout", "0"), ("restrict_nonsystem_relation_kind", "")];

/// Where to connect to, and as what.
#[derive(Clone, Debug)]
pub struct Target {
    hosts: Vec<Host>,
    /// Without host, password and sslmode, which differ from host to host.
    base: Config,
    role: Role,
    tls: tls::Settings,
    password: Password,
    connect_timeout: Duration,
    statement_timeout: Duration,
    /// Whether sessions get our settings.
    set_up: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Host {
    /// A name, an address, or the directory of a Unix socket.
    name: String,
    /// Where to find it, if a name server is not to be asked.
    address: Option<IpAddr>,
    port: u16,
}

impl Host {
    fn is_socket(&self) -> bool {
        self.name.starts_with(['/', '@'])
    }

    fn describe(&self) -> String {
        format!("{}:{}", self.name, self.port)
    }
}

#[derive(Clone, Debug)]
enum Password {
    None,
    Given(Secret),
    /// Its first line.
    File(PathBuf),
    /// In libpq's format, by login.
    Passfile(PathBuf),
}

/// `target_session_attrs`. Whether transactions are read-only by default does not count: we set that ourselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Any,
    Primary,
    Standby,
    PreferStandby,
}

impl Target {
    /// Understands both forms of a connection string. No error quotes any part of it that might be a password.
    pub fn parse(
        url: &Secret,
        password_file: Option<&Path>,
        application: &str,
        statement_timeout: Duration,
    ) -> Result<Self> {
        let mut faults = Vec::new();
        let target = Self::read(url, password_file, application, statement_timeout, &mut faults);
        match (target, faults.first()) {
            (Some(target), None) => Ok(target),
            (_, Some(fault)) => Err(Error::usage(fault.clone())),
            (None, None) => Err(Error::usage("no database is named").with_remedy(
                "set DATABASE_URL, or give --database-url, such as postgresql://user@host/dbname or \
                 postgresql:///dbname?host=/run/postgresql",
            )),
        }
    }

    /// Everything that is wrong with a connection string; empty if there is none.
    pub fn faults(url: &Secret, password_file: Option<&Path>) -> Vec<String> {
        let mut faults = Vec::new();
        Self::read(url, password_file, "", Duration::from_secs(60), &mut faults);
        faults
    }

    /// The files that decide to whom and as whom we connect.
    pub fn files(&self) -> Vec<PathBuf> {
        let mut files = self.tls.files();
        if let Password::File(path) | Password::Passfile(path) = &self.password {
            files.push(path.clone());
        }
        files
    }

    fn read(
        url: &Secret,
        password_file: Option<&Path>,
        application: &str,
        statement_timeout: Duration,
        faults: &mut Vec<String>,
    ) -> Option<Self> {
        // An empty variable counts as not set, as with libpq.
        let environment = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let named = !url.expose().trim().is_empty();
        if !named && environment("PGHOST").is_none() {
            return None;
        }
        let mut options = match conninfo::parse(url.expose()) {
            Ok(options) => options,
            Err(why) => {
                faults.push(why);
                return None;
            }
        };
        conninfo::complete(&mut options, environment);
        let tls = tls::Settings::take(&mut options, faults);
        let password = password(&mut options, password_file, faults);
        let role_wanted = options.remove("target_session_attrs");
        let addressed = base(&options, faults);
        let hosts = hosts(&addressed, faults);
        let role = role(role_wanted.as_deref(), hosts.len() > 1, faults);
        options.retain(|name, _| !["host", "hostaddr", "port"].contains(&name.as_str()));
        // What is wrong is known already.
        let mut base = base(&options, &mut Vec::new());
        if base.get_application_name().is_none() {
            base.application_name(application);
        }
        if base.get_tcp_user_timeout().is_none() {
            base.tcp_user_timeout(TCP_USER_TIMEOUT);
        }
        if !options.contains_key("keepalives_idle") {
            base.keepalives_idle(KEEPALIVE_IDLE);
        }
        let connect_timeout = base.get_connect_timeout().copied().unwrap_or(CONNECT_TIMEOUT);
        base.connect_timeout(connect_timeout);
        if tls.direct {
            base.ssl_negotiation(SslNegotiation::Direct);
        }
        Some(Self { hosts, base, role, tls, password, connect_timeout, statement_timeout, set_up: true })
    }

    /// The same, but its sessions keep the settings of the role and the database, since a pooler may hand them on.
    pub fn without_settings(&self) -> Self {
        Self { set_up: false, ..self.clone() }
    }

    pub fn statement_timeout(&self) -> Duration {
        self.statement_timeout
    }

    /// For messages: user, hosts and database, no password.
    pub fn describe(&self) -> String {
        let hosts: Vec<String> = self.hosts.iter().map(Host::describe).collect();
        self.describe_at(&hosts.join(","))
    }

    fn describe_at(&self, hosts: &str) -> String {
        let user = self.base.get_user().map(|user| format!("{user}@")).unwrap_or_default();
        format!("{user}{hosts}/{}", self.database_name())
    }

    pub fn database_name(&self) -> &str {
        self.base.get_dbname().or(self.base.get_user()).unwrap_or_default()
    }

    /// Hosts on other machines to which the connection is, or may be, unencrypted.
    pub fn plaintext_hosts(&self) -> Vec<&str> {
        if self.tls.mode >= tls::Mode::Require {
            return Vec::new();
        }
        self.hosts
            .iter()
            .filter(|host| !host.is_socket() && !is_local(&host.name))
            .map(|host| host.name.as_str())
            .collect()
    }

    /// Connects to the first host that is suitable.
    pub async fn connect(&self) -> Result<Session> {
        self.connect_until(&CancellationToken::new()).await
    }

    /// [`Target::connect`], and ends the connection when `cut` is cancelled.
    pub async fn connect_until(&self, cut: &CancellationToken) -> Result<Session> {
        let mut hosts: Vec<&Host> = self.hosts.iter().collect();
        // Config does the same to the addresses of one name.
        if self.base.get_load_balance_hosts() == LoadBalanceHosts::Random {
            hosts.sort_by_cached_key(|_| Uuid::new_v4());
        }
        let roles: &[Role] = match self.role {
            Role::PreferStandby => &[Role::Standby, Role::Any],
            Role::Any => &[Role::Any],
            Role::Primary => &[Role::Primary],
            Role::Standby => &[Role::Standby],
        };
        let mut errors: BTreeMap<String, Error> = BTreeMap::new();
        for role in roles {
            for host in &hosts {
                let limited = tokio::time::timeout(self.connect_timeout, self.connect_to(host, *role, cut));
                match limited.await {
                    Ok(Ok(session)) => return Ok(session),
                    Ok(Err(error)) => errors.insert(host.describe(), error),
                    Err(_) => errors.insert(
                        host.describe(),
                        Error::connect_timeout(&self.describe_at(&host.describe()), self.connect_timeout),
                    ),
                };
            }
        }
        let several = errors.len() > 1;
        let whole = errors.values().map(|error| error.message().to_owned()).collect::<Vec<_>>().join("; ");
        match errors.into_values().next_back() {
            Some(error) if !several => Err(error),
            _ => Err(Error::new(Kind::Unreachable, format!("no host is suitable: {whole}")).with_remedy(
                "start one of the servers, or correct the hosts and target_session_attrs in the connection string",
            )),
        }
    }

    async fn connect_to(&self, host: &Host, role: Role, cut: &CancellationToken) -> Result<Session> {
        let mut config = self.base.clone();
        config.host(&host.name).port(host.port);
        if let Some(address) = host.address {
            config.hostaddr(address);
        }
        if let Some(password) = self.password(host)? {
            config.password(password.expose());
        }
        let session = self.open(&mut config, host, cut).await?;
        if self.set_up {
            session.batch_execute(&self.settings()).await.doing("set up the session")?;
        }
        if role != Role::Any {
            let row = session
                .query_one("select pg_is_in_recovery()", &[])
                .await
                .doing("ask the server whether it is a standby")?;
            let standby: bool = row.try_get(0).doing("ask the server whether it is a standby")?;
            if standby != (role == Role::Standby) {
                let (is, wanted) = if standby { ("standby", "primary") } else { ("primary", "standby") };
                let place = self.describe_at(&host.describe());
                return Err(Error::new(
                    Kind::Unreachable,
                    format!("{place} is a {is}, and a {wanted} is wanted"),
                ));
            }
        }
        Ok(session)
    }

    /// The connection, encrypted or not, in the order that sslmode says.
    async fn open(&self, config: &mut Config, host: &Host, cut: &CancellationToken) -> Result<Session> {
        let failed = |error: &tokio_postgres::Error| {
            let server = self.describe_at(&host.describe());
            match tls::explain(error) {
                Some((why, remedy)) => {
                    Error::new(Kind::Unreachable, format!("could not connect to {server}: {why}"))
                        .with_remedy(remedy)
                }
                None => Error::connecting(&server, error),
            }
        };
        // A Unix socket is on this machine.
        if host.is_socket() {
            config.ssl_negotiation(SslNegotiation::Postgres);
            return start(config.ssl_mode(SslMode::Disable), NoTls, cut)
                .await
                .map_err(|error| failed(&error));
        }
        let connector = || self.tls.connector();
        let plain = |config: &Config| {
            let mut config = config.clone();
            config.ssl_mode(SslMode::Disable);
            config
        };
        match self.tls.mode {
            tls::Mode::Disable => start(&plain(config), NoTls, cut).await.map_err(|error| failed(&error)),
            tls::Mode::Allow => match start(&plain(config), NoTls, cut).await {
                Err(error) if is_refusal(&error) => {
                    config.ssl_mode(SslMode::Require);
                    // If that fails too, the first refusal is the more useful.
                    start(config, connector()?, cut).await.map_err(|_| failed(&error))
                }
                result => result.map_err(|error| failed(&error)),
            },
            tls::Mode::Prefer => {
                config.ssl_mode(SslMode::Prefer);
                match start(config, connector()?, cut).await {
                    Err(error) if is_refusal(&error) || tls::is_handshake(&error) => {
                        start(&plain(config), NoTls, cut).await.map_err(|_| failed(&error))
                    }
                    result => result.map_err(|error| failed(&error)),
                }
            }
            tls::Mode::Require | tls::Mode::VerifyCa | tls::Mode::VerifyFull => {
                config.ssl_mode(SslMode::Require);
                start(config, connector()?, cut).await.map_err(|error| failed(&error))
            }
        }
    }

    fn password(&self, host: &Host) -> Result<Option<Secret>> {
        match &self.password {
            Password::None => Ok(None),
            Password::Given(password) => Ok(Some(password.clone())),
            Password::File(path) => conninfo::first_line(path).map(Some),
            Password::Passfile(path) => {
                let user = self.base.get_user().map_or_else(whoami, str::to_owned);
                let dbname = self.base.get_dbname().unwrap_or(&user);
                let login = Login { host: &host.name, port: host.port, dbname, user: &user };
                Ok(conninfo::password_from(path, login))
            }
        }
    }

    /// Settings of the role or of the database must change neither what our statements mean nor how long a session lives.
    ///
    /// - The time-outs keep a run bounded; the last one frees what we held if this process stops in the middle.
    /// - A session that waits, as the one that listens does, is not ended for being idle; nor is a transaction, whose
    ///   statements are bounded, for being long. An error that is expected ends a statement, and not the session.
    /// - A usage is acknowledged once its transaction has committed, so the commit must be a durable one.
    /// - Bind values may be tokens. Only some roles may set log_parameter_max_length: see
    ///   [`crate::postgres::pool::hide_bind_values`].
    fn settings(&self) -> String {
        let optional: String = OPTIONAL_SETTINGS
            .iter()
            .map(|(name, value)| {
                format!(
                    "select pg_catalog.set_config('{name}', '{value}', false) \
                         where pg_catalog.current_setting('{name}', true) is not null;"
                )
            })
            .collect();
        format!(
            // First those by which the server may end the session.
            "{optional}\
             set search_path to pg_catalog, pg_temp;\
             set timezone to 'UTC';\
             set datestyle to 'ISO, YMD';\
             set intervalstyle to 'iso_8601';\
             set default_transaction_isolation to 'read committed';\
             set default_transaction_read_only to off;\
             set statement_timeout to {};\
             set lock_timeout to {};\
             set idle_in_transaction_session_timeout to {};\
             set log_parameter_max_length_on_error to 0;\
             set exit_on_error to off;\
             set row_security to on;\
             set jit to off;\
             select set_config('synchronous_commit', 'on', false) where current_setting('synchronous_commit') = 'off'",
            self.statement_timeout.as_millis(),
            LOCK_TIMEOUT.min(self.statement_timeout).as_millis(),
            ABANDONED.as_millis(),
        )
    }
}

async fn start<T>(
    config: &Config,
    tls: T,
    cut: &CancellationToken,
) -> std::result::Result<Session, tokio_postgres::Error>
where
    T: MakeTlsConnect<Socket> + Send,
    T::Stream: Send + 'static,
{
    let (client, connection) = config.connect(tls).await?;
    // Bounded, since a wake-up that is not taken yet stands for all that follow it.
    let (sender, notifications) = mpsc::channel(64);
    // It ends when the client is dropped, or the connection breaks or is cut.
    tokio::spawn(pump(connection, sender, cut.clone()));
    Ok(Session::new(client, notifications))
}

/// The server refused the login, which it may do only because of the encryption or the lack of it.
fn is_refusal(error: &tokio_postgres::Error) -> bool {
    error.code().is_some_and(|code| code.code().starts_with("28"))
}

fn whoami() -> String {
    let id = nix::unistd::geteuid();
    nix::unistd::User::from_uid(id).ok().flatten().map(|user| user.name).unwrap_or_default()
}

fn is_local(host: &str) -> bool {
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// The hosts of a configuration, with their addresses and ports.
fn hosts(config: &Config, faults: &mut Vec<String>) -> Vec<Host> {
    let (names, addresses, ports) = (config.get_hosts(), config.get_hostaddrs(), config.get_ports());
    let count = names.len().max(addresses.len());
    if count == 0 {
        faults.push(
            "the connection string names no host: name one, postgresql://user@host/dbname, or the directory of the \
             server's Unix socket, postgresql:///dbname?host=/run/postgresql"
                .to_owned(),
        );
        return Vec::new();
    }
    if [names.len(), addresses.len()].iter().any(|length| ![0, count].contains(length))
        || ![0, 1, count].contains(&ports.len())
    {
        faults.push(
            "the connection string has lists of host, hostaddr and port that differ in length".to_owned(),
        );
        return Vec::new();
    }
    let host = |i: usize| {
        let address = addresses.get(i).copied();
        let name = match (names.get(i), address) {
            (Some(config::Host::Unix(path)), _) => path.to_string_lossy().into_owned(),
            (Some(config::Host::Tcp(name)), _) => name.clone(),
            (None, address) => address.map(|address| address.to_string()).unwrap_or_default(),
        };
        Host { name, address, port: ports.get(i).or(ports.first()).copied().unwrap_or(5432) }
    };
    let hosts: Vec<Host> = (0..count).map(host).collect();
    if hosts.iter().any(|host| host.name.is_empty()) {
        faults.push("the connection string has an empty host".to_owned());
    }
    if hosts.iter().any(|host| host.port == 0) {
        faults.push(bad_value("port"));
    }
    hosts
}

fn password(options: &mut Options, file: Option<&Path>, faults: &mut Vec<String>) -> Password {
    let given = options.remove("password").filter(|password| !password.is_empty());
    let passfile = options.remove("passfile").filter(|path| !path.is_empty()).map(PathBuf::from);
    match (given, file) {
        (Some(_), Some(_)) => {
            faults.push(
                "there are two passwords: one in the connection string, one in --password-file".to_owned(),
            );
            Password::None
        }
        (Some(password), None) => Password::Given(Secret::new(password)),
        (None, Some(path)) => {
            if let Err(error) = conninfo::first_line(path) {
                faults.push(error.message().to_owned());
            }
            Password::File(path.to_owned())
        }
        (None, None) => match std::env::var("PGPASSWORD").ok().filter(|password| !password.is_empty()) {
            Some(password) => Password::Given(Secret::new(password)),
            None => passfile.or_else(conninfo::default_passfile).map_or(Password::None, Password::Passfile),
        },
    }
}

/// Of several hosts, the primary by default: the daemon has nothing to do on the others.
fn role(named: Option<&str>, several: bool, faults: &mut Vec<String>) -> Role {
    match named {
        None | Some("") if several => Role::Primary,
        None | Some("" | "any") => Role::Any,
        Some("read-write" | "primary") => Role::Primary,
        Some("read-only" | "standby") => Role::Standby,
        Some("prefer-standby") => Role::PreferStandby,
        Some(_) => {
            faults.push(
                "the connection string has a target_session_attrs that does not exist: give any, read-write, read-only, \
                 primary, standby or prefer-standby"
                    .to_owned(),
            );
            Role::Any
        }
    }
}

fn bad_value(option: &str) -> String {
    format!("the connection string has a bad value for the option {option}")
}

/// What tokio-postgres understands as it is, and faults for the rest.
fn base(options: &Options, faults: &mut Vec<String>) -> Config {
    const KNOWN: [&str; 15] = [
        "application_name",
        "channel_binding",
        "connect_timeout",
        "dbname",
        "host",
        "hostaddr",
        "keepalives",
        "keepalives_idle",
        "keepalives_interval",
        "keepalives_retries",
        "load_balance_hosts",
        "options",
        "port",
        "tcp_user_timeout",
        "user",
    ];
    let mut text = String::new();
    for (name, value) in options {
        // libpq's name for it.
        let name = if name == "keepalives_count" { "keepalives_retries" } else { name };
        if !KNOWN.contains(&name) {
            // An unknown word may be a piece of a password.
            let shown =
                if OPTIONS.contains(&name) { format!("the option {name}") } else { "an option".to_owned() };
            faults.push(format!(
                "the connection string has {shown} that tollgated does not support: leave it out"
            ));
            continue;
        }
        if value.is_empty() {
            continue;
        }
        let pair = format!("{name}={} ", conninfo::quote(value));
        if Config::from_str(&pair).is_err() {
            faults.push(bad_value(name));
            continue;
        }
        text.push_str(&pair);
    }
    Config::from_str(&text).unwrap_or_default()
}

/// Options of libpq that we do not support: only these words may be quoted from a connection string.
const OPTIONS: [&str; 22] = [
    "authtype",
    "client_encoding",
    "fallback_application_name",
    "gssdelegation",
    "gssencmode",
    "gsslib",
    "krbsrvname",
    "max_protocol_version",
    "min_protocol_version",
    "replication",
    "require_auth",
    "requirepeer",
    "requiressl",
    "service",
    "ssl_max_protocol_version",
    "ssl_min_protocol_version",
    "sslcertmode",
    "sslcompression",
    "sslcrl",
    "sslcrldir",
    "sslpassword",
    "sslsni",
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    fn parse(url: &str) -> Result<Target> {
        Target::parse(&Secret::new(url), None, "tollgated test", Duration::from_secs(60))
    }

    #[test]
    fn both_forms_reach_a_unix_socket() {
        for url in [
            "postgresql:///app?host=/run/postgresql&port=5433&user=ann",
            "postgresql://ann@%2Frun%2Fpostgresql:5433/app",
            "host=/run/postgresql port=5433 user=ann dbname=app",
            "host='/run/postgresql' port = 5433 user=ann dbname='app'",
        ] {
            assert_eq!(parse(url).unwrap().describe(), "ann@/run/postgresql:5433/app", "{url}");
        }
    }

    #[test]
    fn several_hosts_are_all_described() {
        assert_eq!(
            parse("postgresql://ann@one,two:5433/app").unwrap().describe(),
            "ann@one:5432,two:5433/app"
        );
        assert_eq!(parse("hostaddr=127.0.0.1 user=ann").unwrap().describe(), "ann@127.0.0.1:5432/ann");
    }

    #[test]
    fn a_password_is_in_no_description_and_no_debug_output() {
        for url in ["postgresql://ann:hunter2@db/app", "host=db user=ann password=hunter2"] {
            let target = parse(url).unwrap();
            assert!(!target.describe().contains("hunter2"));
            assert!(!format!("{target:?}").contains("hunter2"));
            assert!(!target.settings().contains("hunter2"));
        }
    }

    #[test]
    fn no_error_about_a_connection_string_quotes_a_password() {
        for url in [
            "host=db password=hunter2 hunter3=x",
            "host=db password=hun hunter2",
            "host=db password='hunter2",
            "host=db password=x hunter2='y'",
            "postgresql://ann:p@hunter2@db/app",
            "postgresql://ann:p?hunter2=1/app",
            "postgresql://ann@db/app?hunter2=hunter2",
            "postgresql://ann@db/app?password=hunter2&port=hunter2",
        ] {
            let error = parse(url).unwrap_err();
            assert_eq!(error.kind(), Kind::Usage, "{url}");
            assert!(!error.report().contains("hunter"), "{url}: {}", error.report());
        }
    }

    #[test]
    fn what_is_wrong_with_the_encryption_is_all_said_at_once() {
        let faults = |url: &str| Target::faults(&Secret::new(url), None);
        for (url, words) in [
            ("postgresql://db/app?sslmode=yes", vec!["sslmode that does not exist"]),
            (
                "postgresql://db/app?sslmode=verify-full&sslrootcert=/nonexistent/ca.pem",
                vec!["/nonexistent/ca.pem"],
            ),
            ("postgresql://db/app?sslmode=require&sslrootcert=system", vec!["sslrootcert=system"]),
            ("postgresql://db/app?sslnegotiation=direct", vec!["sslnegotiation=direct"]),
            (
                "postgresql://db:x/app?sslmode=1&target_session_attrs=2&service=3&connect_timeout=4s",
                vec!["port", "sslmode", "target_session_attrs", "service", "connect_timeout"],
            ),
        ] {
            let found = faults(url);
            assert_eq!(found.len(), words.len(), "{url}: {found:?}");
            for word in words {
                assert!(found.iter().any(|fault| fault.contains(word)), "{word} in {found:?}");
            }
        }
        assert!(faults("postgresql://db/app?sslmode=disable").is_empty());
        assert!(faults("postgresql://db/app?sslmode=require").is_empty());
    }

    #[test]
    fn among_several_hosts_the_primary_is_wanted_by_default() {
        assert_eq!(parse("host=one,two").unwrap().role, Role::Primary);
        assert_eq!(parse("host=one").unwrap().role, Role::Any);
        assert_eq!(parse("host=one,two target_session_attrs=any").unwrap().role, Role::Any);
        assert_eq!(parse("host=one target_session_attrs=prefer-standby").unwrap().role, Role::PreferStandby);
    }

    #[test]
    fn only_hosts_beyond_this_machine_count_as_plaintext() {
        assert_eq!(
            parse("host=/run/postgresql,localhost,127.0.0.1,::1,db").unwrap().plaintext_hosts(),
            ["db"]
        );
    }

    #[test]
    fn hosts_addresses_and_ports_go_together_or_are_refused() {
        let target = parse("host=one,two hostaddr=10.0.0.1,::1 port=5433 load_balance_hosts=random").unwrap();
        assert_eq!(target.hosts[1].address, Some("::1".parse().unwrap()));
        assert_eq!(target.hosts.iter().map(Host::describe).collect::<Vec<_>>(), ["one:5433", "two:5433"]);
        assert_eq!(target.base.get_load_balance_hosts(), LoadBalanceHosts::Random);
        for (wrong, words) in [
            ("host=one,two hostaddr=10.0.0.1", "differ in length"),
            ("host=one,two port=1,2,3", "differ in length"),
            ("host=one,,two", "empty host"),
            ("host=one hostaddr=hunter2", "bad value for the option hostaddr"),
            ("host=one port=0", "bad value for the option port"),
            ("host=one load_balance_hosts=hunter2", "bad value for the option load_balance_hosts"),
        ] {
            let error = parse(wrong).unwrap_err();
            assert!(error.message().contains(words), "{wrong}: {error}");
            assert!(!error.report().contains("hunter2"), "{wrong}: {error}");
        }
    }

    #[test]
    fn options_that_are_not_understood_are_named() {
        let error = parse("postgresql://db/app?sslcrl=/etc/crl.pem").unwrap_err();
        assert!(error.message().contains("sslcrl"), "{error}");
        let error = parse("postgresql://db/app?connect_timeout=soon").unwrap_err();
        assert!(error.message().contains("connect_timeout"), "{error}");
    }

    #[test]
    fn a_connection_string_without_a_host_says_how_to_name_one() {
        let error = parse("postgresql:///app").unwrap_err();
        assert!(error.report().contains("host=/run/postgresql"), "{}", error.report());
    }

    #[test]
    fn our_own_time_outs_yield_to_those_in_the_connection_string() {
        let target =
            parse("postgresql://db/app?connect_timeout=3&keepalives_idle=7&application_name=mine").unwrap();
        assert_eq!(target.base.get_connect_timeout(), Some(&Duration::from_secs(3)));
        assert_eq!(target.base.get_keepalives_idle(), Duration::from_secs(7));
        assert_eq!(target.base.get_application_name(), Some("mine"));
        let target = parse("postgresql://db/app").unwrap();
        assert_eq!(target.base.get_connect_timeout(), Some(&CONNECT_TIMEOUT));
        assert_eq!(target.base.get_keepalives_idle(), KEEPALIVE_IDLE);
        assert_eq!(target.base.get_application_name(), Some("tollgated test"));
    }
}
