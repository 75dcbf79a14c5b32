//! Connections: where to, how they are set up, how they are kept.
//!
//! The daemon never gives up on a server. Whoever needs a session asks [`Database::session`]; if there is none to be
//! had, that is an error which the caller's own schedule retries, with jittered backoff. That the server is out of
//! reach is said here, once for everybody.

use std::ops::{Deref, DerefMut};
use std::str::FromStr as _;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use deadpool::managed::{self, Metrics, Pool, PoolError, RecycleError, RecycleResult, Timeouts};
use tokio::sync::mpsc;
use tokio_postgres::config::{Host, SslMode};
use tokio_postgres::{AsyncMessage, Client, Config, NoTls, Notification};
use tokio_util::sync::CancellationToken;

use crate::complaint::Complaint;
use crate::config::Secret;
use crate::counters;
use crate::driver::round;
use crate::error::{Doing as _, Error, Result};

/// A socket must open within this time, unless the connection string says otherwise.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Authentication and set-up must be over within this time.
const GREETING_TIMEOUT: Duration = Duration::from_secs(10);
/// Locks are waited for no longer: what holds one is a person or a migration, and every task comes again.
const LOCK_TIMEOUT: Duration = Duration::from_secs(5);
/// A network that fails silently is noticed within minutes, not hours.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);
const TCP_USER_TIMEOUT: Duration = Duration::from_secs(60);
/// An idle session is asked for a sign of life before it is used again.
const RECYCLE_TIMEOUT: Duration = Duration::from_secs(5);
/// Tasks are short and wake at different times, so few sessions serve all of them.
const POOL_SIZE: usize = 5;

/// Where to connect to, and as what.
#[derive(Clone, Debug)]
pub struct Target {
    config: Config,
    statement_timeout: Duration,
}

impl Target {
    /// Understands both forms of a connection string. No error quotes any part of it that might be a password.
    pub fn parse(url: &Secret, application: &str, statement_timeout: Duration) -> Result<Self> {
        let text = url.expose().trim();
        let mut config = Config::from_str(text).map_err(|error| explain_syntax(text, &error))?;
        if config.get_ssl_mode() == SslMode::Require {
            return Err(no_tls("require"));
        }
        if config.get_hosts().is_empty() && config.get_hostaddrs().is_empty() {
            return Err(Error::usage("the connection string names no host").with_remedy(
                "name one: postgresql://user@host/dbname, or the directory of the server's Unix socket, \
                 postgresql:///dbname?host=/run/postgresql",
            ));
        }
        // An @ in a password that is not written %40 makes the rest of the password a part of the host's name,
        // which would then be shown in messages and asked of a name server.
        if config.get_hosts().iter().any(|host| matches!(host, Host::Tcp(name) if name.contains('@'))) {
            return Err(Error::usage("the connection string has more than one @ before the host")
                .with_remedy("write an @ within user or password as %40"));
        }
        if config.get_application_name().is_none() {
            config.application_name(application);
        }
        if config.get_connect_timeout().is_none() {
            config.connect_timeout(CONNECT_TIMEOUT);
        }
        if config.get_tcp_user_timeout().is_none() {
            config.tcp_user_timeout(TCP_USER_TIMEOUT);
        }
        if config.get_keepalives_idle() == Config::new().get_keepalives_idle() {
            config.keepalives_idle(KEEPALIVE_IDLE);
        }
        Ok(Self { config, statement_timeout })
    }

    pub fn statement_timeout(&self) -> Duration {
        self.statement_timeout
    }

    /// For messages: user, hosts and database, no password.
    pub fn describe(&self) -> String {
        let ports = self.config.get_ports();
        let port = |i: usize| ports.get(i).or(ports.first()).copied().unwrap_or(5432);
        let named = self.config.get_hosts().iter().map(|host| match host {
            Host::Tcp(name) => name.clone(),
            Host::Unix(path) => path.display().to_string(),
        });
        let hosts: Vec<String> = if self.config.get_hosts().is_empty() {
            self.config.get_hostaddrs().iter().map(ToString::to_string).collect()
        } else {
            named.collect()
        };
        let hosts: Vec<String> =
            hosts.iter().enumerate().map(|(i, host)| format!("{host}:{}", port(i))).collect();
        let user = self.config.get_user().map(|user| format!("{user}@")).unwrap_or_default();
        let database = self.config.get_dbname().or(self.config.get_user()).unwrap_or_default();
        format!("{user}{}/{database}", hosts.join(","))
    }

    /// Hosts beyond this machine, to which the connection goes in plain text.
    pub fn plaintext_hosts(&self) -> Vec<&str> {
        self.config
            .get_hosts()
            .iter()
            .filter_map(|host| match host {
                Host::Tcp(name) if !is_local(name) => Some(name.as_str()),
                _ => None,
            })
            .collect()
    }

    /// Makes a connection, and sets it up so that nothing on it can wait for ever.
    pub async fn connect(&self) -> Result<Session> {
        // Bounded, since a wake-up that is not taken yet stands for all that follow it.
        let (sender, notifications) = mpsc::channel(64);
        let hosts = self.config.get_hosts().len().max(self.config.get_hostaddrs().len()).max(1);
        let deadline = self.config.get_connect_timeout().copied().unwrap_or(CONNECT_TIMEOUT)
            * u32::try_from(hosts).unwrap_or(u32::MAX)
            + GREETING_TIMEOUT;
        let greeting = async {
            let (client, connection) = self
                .config
                .connect(NoTls)
                .await
                .map_err(|error| Error::connecting(&self.describe(), &error))?;
            // It ends when the client is dropped or the connection breaks, and is in nobody's way until then.
            tokio::spawn(pump(connection, sender));
            client.batch_execute(&self.set_up()).await.doing("set up the session")?;
            Ok(Session { client, notifications })
        };
        match tokio::time::timeout(deadline, greeting).await {
            Ok(result) => result,
            Err(_) => Err(Error::connect_timeout(&self.describe(), deadline)),
        }
    }

    /// Settings of the role or of the database must not change what our statements mean.
    ///
    /// - The time-outs keep a run bounded; the last one frees what we held if this process stops in the middle.
    /// - A usage is acknowledged once its transaction has committed, so the commit must be a durable one.
    /// - Bind values may be tokens. The rest of that is for whoever may set log_parameter_max_length: see
    ///   [`hide_bind_values`].
    fn set_up(&self) -> String {
        format!(
            "set search_path to pg_catalog, pg_temp;\
             set timezone to 'UTC';\
             set datestyle to 'ISO, YMD';\
             set intervalstyle to 'iso_8601';\
             set default_transaction_isolation to 'read committed';\
             set default_transaction_read_only to off;\
             set statement_timeout to {};\
             set lock_timeout to {};\
             set idle_in_transaction_session_timeout to {};\
             set log_parameter_max_length_on_error to 0;\
             select set_config('synchronous_commit', 'on', false) where current_setting('synchronous_commit') = 'off'",
            self.statement_timeout.as_millis(),
            LOCK_TIMEOUT.min(self.statement_timeout).as_millis(),
            self.statement_timeout.as_millis(),
        )
    }
}

/// Keeps the values of this session's statements out of the server's log, where this role may decide that. To be called
/// before a statement one of whose values is a token.
pub async fn hide_bind_values(client: &Client) -> Result<()> {
    client
        .batch_execute(
            "select set_config('log_parameter_max_length', '0', false) \
             where has_parameter_privilege('log_parameter_max_length', 'set')",
        )
        .await
        .doing("keep bind values out of the server's log")
}

/// A connection that is set up.
#[derive(Debug)]
pub struct Session {
    client: Client,
    notifications: mpsc::Receiver<Notification>,
}

impl Session {
    /// The next notification on any channel that this session listens on; `None` once the connection is gone.
    pub async fn notification(&mut self) -> Option<Notification> {
        self.notifications.recv().await
    }

    /// The client, and its notifications beside it.
    pub fn split(&mut self) -> (&mut Client, &mut mpsc::Receiver<Notification>) {
        (&mut self.client, &mut self.notifications)
    }
}

impl Deref for Session {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.client
    }
}

impl DerefMut for Session {
    fn deref_mut(&mut self) -> &mut Client {
        &mut self.client
    }
}

/// Moves the bytes of a connection until it ends, and hands on its notifications.
async fn pump<S, T>(
    mut connection: tokio_postgres::Connection<S, T>,
    notifications: mpsc::Sender<Notification>,
) where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
    T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    loop {
        match std::future::poll_fn(|cx| connection.poll_message(cx)).await {
            Some(Ok(AsyncMessage::Notification(notification))) => {
                // Full or closed: a wake-up is pending already, or nobody waits for one.
                let _ = notifications.try_send(notification);
            }
            Some(Ok(AsyncMessage::Notice(notice))) => {
                tracing::debug!(severity = notice.severity(), "the server says: {}", notice.message());
            }
            Some(Ok(_)) => {}
            Some(Err(error)) => {
                tracing::debug!(%error, "a connection broke");
                return;
            }
            None => return,
        }
    }
}

/// The database that the daemon serves.
#[derive(Clone, Debug)]
pub struct Database {
    connector: Arc<Connector>,
    pool: Pool<Sessions>,
}

pub type PooledSession = managed::Object<Sessions>;

impl Database {
    pub fn new(target: Target) -> Result<Self> {
        let connector = Arc::new(Connector { target, complaint: Mutex::default() });
        let pool = Pool::builder(Sessions(connector.clone()))
            .max_size(POOL_SIZE)
            .runtime(deadpool::Runtime::Tokio1)
            .timeouts(Timeouts {
                wait: Some(connector.target.statement_timeout),
                // Target::connect has its own, which names the server.
                create: None,
                recycle: Some(RECYCLE_TIMEOUT),
            })
            .build()
            .map_err(|error| Error::failed(format!("could not set up the pool of sessions: {error}")))?;
        Ok(Self { connector, pool })
    }

    /// A session to use and drop. Gives up when `stop` is cancelled.
    pub async fn session(&self, stop: &CancellationToken) -> Result<PooledSession> {
        tokio::select! {
            biased;
            session = self.pool.get() => session.map_err(explain_pool),
            () = stop.cancelled() => Err(Error::stopping()),
        }
    }

    /// A connection of one's own, to keep.
    pub async fn connect(&self, stop: &CancellationToken) -> Result<Session> {
        tokio::select! {
            biased;
            session = self.connector.connect() => session,
            () = stop.cancelled() => Err(Error::stopping()),
        }
    }
}

/// Makes every connection of the daemon, and says when that fails and when it works again.
#[derive(Debug)]
struct Connector {
    target: Target,
    complaint: Mutex<Complaint>,
}

impl Connector {
    async fn connect(&self) -> Result<Session> {
        let result = self.target.connect().await;
        let mut complaint = self.complaint.lock().unwrap_or_else(PoisonError::into_inner);
        match &result {
            Ok(_) => {
                counters::CONNECTS.add(1);
                if let Some(tally) = complaint.recovered() {
                    tracing::info!(
                        attempts = tally.failures,
                        "connected to {} after {}",
                        self.target.describe(),
                        humantime::format_duration(round(tally.lasting))
                    );
                }
            }
            Err(error) => {
                counters::CONNECT_FAILURES.add(1);
                if let Some(tally) = complaint.failed(&error.to_string()) {
                    tracing::warn!(
                        attempts = tally.failures,
                        "{error}; trying again, for as long as it takes"
                    );
                }
            }
        }
        result
    }
}

/// What the pool holds.
#[derive(Debug)]
pub struct Sessions(Arc<Connector>);

impl managed::Manager for Sessions {
    type Type = Session;
    type Error = Error;

    async fn create(&self) -> Result<Session> {
        self.0.connect().await
    }

    /// A run that was cut short leaves a session whose server side may still be at work, so a session must answer
    /// before it is used again.
    async fn recycle(&self, session: &mut Session, _: &Metrics) -> RecycleResult<Error> {
        if session.is_closed() {
            return Err(RecycleError::message("closed"));
        }
        session.check_connection().await.map_err(|_| RecycleError::message("broken"))
    }
}

fn explain_pool(error: PoolError<Error>) -> Error {
    match error {
        PoolError::Backend(error) => error,
        PoolError::Timeout(_) => {
            Error::failed("no session became free in time: other tasks hold all of them")
        }
        other => Error::failed(format!("no session could be had: {other}")),
    }
}

fn is_local(host: &str) -> bool {
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

fn no_tls(mode: &str) -> Error {
    Error::usage(format!(
        "the connection string asks for sslmode={mode}, and this version of tollgated does not speak TLS"
    ))
    .with_remedy(
        "connect over a Unix socket, over the loopback address or through a tunnel, or give sslmode=disable if the \
         network in between is trusted",
    )
}

/// What libpq understands, whether or not we do: only these words may be quoted from a connection string.
const OPTIONS: [&str; 34] = [
    "authtype",
    "channel_binding",
    "client_encoding",
    "connect_timeout",
    "dbname",
    "fallback_application_name",
    "gssdelegation",
    "gssencmode",
    "gsslib",
    "host",
    "hostaddr",
    "keepalives",
    "keepalives_count",
    "krbsrvname",
    "load_balance_hosts",
    "max_protocol_version",
    "min_protocol_version",
    "options",
    "passfile",
    "password",
    "port",
    "replication",
    "require_auth",
    "requirepeer",
    "requiressl",
    "service",
    "sslcert",
    "sslcompression",
    "sslcrl",
    "sslkey",
    "sslmode",
    "sslpassword",
    "sslrootcert",
    "target_session_attrs",
];

/// tokio-postgres quotes what it could not read, which may be a piece of a password. So its text is only looked at.
fn explain_syntax(text: &str, error: &tokio_postgres::Error) -> Error {
    let cause = std::error::Error::source(error).map(ToString::to_string).unwrap_or_default();
    let named = cause.split('`').nth(1);
    if named == Some("sslmode") {
        return match sslmode(text) {
            Some(mode @ ("verify-ca" | "verify-full")) => no_tls(mode),
            _ => Error::usage("the connection string has an sslmode that does not exist")
                .with_remedy("give sslmode=disable or sslmode=prefer"),
        };
    }
    match named.filter(|name| OPTIONS.contains(name)) {
        Some(name) if cause.starts_with("unknown option") => Error::usage(format!(
            "the connection string has the option {name}, which tollgated does not know"
        ))
        .with_remedy(format!("leave {name} out")),
        Some(name) => Error::usage(format!("the connection string has a bad value for the option {name}")),
        None => Error::usage("the connection string cannot be read").with_remedy(
            "write it as postgresql://user:password@host:port/dbname, special characters as %XX, or as \
             \"host=… dbname=… user=…\", values with spaces in single quotes",
        ),
    }
}

fn sslmode(text: &str) -> Option<&str> {
    let (_, rest) = text.split_once("sslmode")?;
    let value = rest.trim_start().strip_prefix('=')?.trim_start().trim_start_matches('\'');
    value.split(|c: char| !(c.is_ascii_alphanumeric() || c == '-')).next()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    fn parse(url: &str) -> Result<Target> {
        Target::parse(&Secret::new(url), "tollgated test", Duration::from_secs(60))
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
            assert!(!target.set_up().contains("hunter2"));
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
    fn encryption_that_is_asked_for_is_never_silently_left_out() {
        for mode in ["require", "verify-ca", "verify-full"] {
            for url in [format!("postgresql://db/app?sslmode={mode}"), format!("host=db sslmode = '{mode}'")]
            {
                let error = parse(&url).unwrap_err();
                assert_eq!(error.kind(), Kind::Usage);
                assert!(error.message().contains(&format!("sslmode={mode}")), "{url}: {error}");
            }
        }
        assert!(parse("postgresql://db/app?sslmode=yes").unwrap_err().message().contains("does not exist"));
        assert!(parse("postgresql://db/app?sslmode=disable").is_ok());
        assert!(parse("postgresql://db/app?sslmode=prefer").is_ok());
    }

    #[test]
    fn only_hosts_beyond_this_machine_count_as_plaintext() {
        assert_eq!(
            parse("host=/run/postgresql,localhost,127.0.0.1,::1,db").unwrap().plaintext_hosts(),
            ["db"]
        );
    }

    #[test]
    fn options_that_are_not_understood_are_named() {
        let error = parse("postgresql://db/app?sslrootcert=/etc/ca.pem").unwrap_err();
        assert!(error.message().contains("sslrootcert"), "{error}");
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
        assert_eq!(target.config.get_connect_timeout(), Some(&Duration::from_secs(3)));
        assert_eq!(target.config.get_keepalives_idle(), Duration::from_secs(7));
        assert_eq!(target.config.get_application_name(), Some("mine"));
        let target = parse("postgresql://db/app").unwrap();
        assert_eq!(target.config.get_connect_timeout(), Some(&CONNECT_TIMEOUT));
        assert_eq!(target.config.get_keepalives_idle(), KEEPALIVE_IDLE);
        assert_eq!(target.config.get_application_name(), Some("tollgated test"));
    }
}
