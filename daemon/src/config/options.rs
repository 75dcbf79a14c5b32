//! Every option: its name, its environment variable, its bounds, its default.
//!
//! An option with an `env` can also stand in the configuration file, see [`crate::config::sources`]; nothing else is needed for
//! that. Its value parser holds the bounds, so that the faults of several options are reported together.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::builder::{OsStringValueParser, TypedValueParser as _};
use clap::{Args, Parser, Subcommand, ValueEnum};
use ipnet::IpNet;
use tollgate_core::token;

use super::api_options::ApiOptions;
use super::command_options::{CompletionsOptions, ScopeCommand, TokenCommand};
use super::common_options::{BatchOptions, OutputOptions, StandbyOptions, bounded};
use super::gateway_options::GatewayOptions;
use super::import_key_options::ImportKeyCommand;
use super::issuer_options::{IssuerCommand, IssuerNetworks};
use super::key_options::KeyCommand;
use super::management_options::{AuditCommand, CapabilityCommand, UserCommand, WebhookCommand};
use super::quota_options::QuotaCommand;
use super::service_options::ServiceCommand;
use super::session_options::SessionCommand;
use super::url_key_options::UrlKeyCommand;
use crate::error::{Error, Result};
use crate::postgres::target::Target;
use crate::process::duration;
use crate::secret::Secret;

const EXIT_CODES: &str = "\
Exit status:
   0  done; for a question: yes
   1  the answer is no (token not valid, nothing to revoke, a check failed, no daemon seen),
      or the work failed
  64  the command line or the configuration is wrong and a person must fix it; nothing was tried
  69  the database cannot be reached
  70  `run` ended because one of its own tasks ended; the log says which and why
  75  `run` was asked to stop and had to abandon a task; the log says which";

const RUN_NOTES: &str = "\
Signals:
  SIGTERM, SIGINT  stop within --shutdown-grace: running work is finished and usage flushed a
                   last time; what is not flushed stays counted in the server.
                   A second one stops at once.
  SIGUSR1          flush usage now

The daemon needs the capability operator, no more: `tollgated check` prints the statement that
grants it. It never gives up on the database, nor on a port that another process has, but waits
and tries again.

Example:
  DATABASE_URL=postgresql://tollgated@db.example.com/app tollgated run --standby postgresql://tollgated@replica/app";

/// The daemon and the command line of Tollgate, API tokens inside PostgreSQL.
#[derive(Debug, Parser)]
#[command(name = "tollgated", version, after_help = EXIT_CODES, max_term_width = 110)]
pub struct Cli {
    /// Read options from this TOML file too: the key flush_interval is --flush-interval. The command line and the
    /// environment come first. --config '' means no file [default: /etc/tollgated/tollgated.toml if it exists]
    #[arg(long, value_name = "PATH", env = "TOLLGATED_CONFIG", global = true,
        value_parser = OsStringValueParser::new().map(PathBuf::from))]
    pub config: Option<PathBuf>,
    #[command(flatten)]
    pub connection: ConnectionOptions,
    #[command(flatten)]
    pub logging: LogOptions,
    #[command(subcommand)]
    pub command: Command,
}

impl Cli {
    /// What no option shows by itself: values that do not go together.
    pub fn contradictions(&self) -> Vec<String> {
        let standbys = match &self.command {
            Command::Run(options) => &options.standby,
            Command::Config(options) => &options.run.standby,
            _ => return Vec::new(),
        };
        self.connection
            .standbys(standbys, "")
            .err()
            .map(|error| error.message().to_owned())
            .into_iter()
            .collect()
    }
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve a database: flush usage, record expiries, purge ended tokens, log events
    #[command(after_help = format!("{RUN_NOTES}\n\n{EXIT_CODES}"))]
    Run(Box<RunOptions>),
    /// Print events of the audit log, one JSON object a line: the last ones, or those since one
    #[command(
        after_help = "Examples:\n  tollgated tail\n  tollgated tail --since 0\n  tollgated tail --follow"
    )]
    Tail(TailOptions),
    /// Show the server's counters and the daemons with their tasks; exit status 1 if no daemon was seen for 60 s
    #[command(after_help = "Example:\n  tollgated status --json")]
    Status(OutputOptions),
    /// Examine the deployment, from versions to the notification queue, and print what fixes each finding
    #[command(after_help = "Example:\n  tollgated check --strict")]
    Check(CheckOptions),
    /// Print the options in effect for `run`, and where each is from; passwords are masked
    #[command(after_help = "Example:\n  tollgated config --config ./tollgated.toml")]
    Config(Box<ConfigOptions>),
    /// Carry the usage counted so far into the tables, once
    #[command(after_help = "Example:\n  tollgated flush")]
    Flush(FlushOptions),
    /// Record expiries and delete tokens and sessions that ended long ago, once and until done
    #[command(after_help = "Example:\n  tollgated cleanup --retention 30d")]
    Cleanup(CleanupOptions),
    /// Create, list, verify, change, import and revoke tokens
    #[command(subcommand)]
    Token(TokenCommand),
    /// Revoke all that a user has
    #[command(subcommand)]
    User(UserCommand),
    /// List, define and drop scopes
    #[command(subcommand)]
    Scope(ScopeCommand),
    /// Have events sent to other systems
    #[command(subcommand)]
    Webhook(WebhookCommand),
    /// Check the audit log
    #[command(subcommand)]
    Audit(AuditCommand),
    /// List and end sessions
    #[command(subcommand)]
    Session(SessionCommand),
    /// Make, rotate, withdraw and reseal signing keys
    #[command(subcommand)]
    Key(KeyCommand),
    /// Create, rotate, export and withdraw keys that sign URLs
    #[command(subcommand)]
    UrlKey(UrlKeyCommand),
    /// Store, list and drop keys with which another system made the digests of its tokens
    #[command(subcommand)]
    ImportKey(ImportKeyCommand),
    /// Manage service accounts: programs that get access tokens for themselves
    #[command(subcommand)]
    Service(ServiceCommand),
    /// Trust issuers of other systems, so that their access tokens are accepted
    #[command(subcommand)]
    Issuer(IssuerCommand),
    /// Set how often tokens and users may be used in a period of the calendar
    #[command(subcommand)]
    Quota(QuotaCommand),
    /// Say which database role may do what
    #[command(subcommand)]
    Capability(CapabilityCommand),
    /// Print what lets a shell complete this command line
    #[command(after_help = "Example:\n  tollgated completions bash >/etc/bash_completion.d/tollgated")]
    Completions(CompletionsOptions),
    /// Print the manual page, in roff
    #[command(hide = true)]
    Man,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Connection")]
pub struct ConnectionOptions {
    /// The database: postgresql://user@host/db, postgresql:///db?host=/run/postgresql, or "host=… dbname=…".
    /// Prefer the environment variable: arguments are visible to every user of the machine
    #[arg(
        long,
        value_name = "URL",
        env = "DATABASE_URL",
        hide_env_values = true,
        value_parser = Secret::parse,
        global = true
    )]
    pub database_url: Option<Secret>,

    /// Read the password from the first line of this file, at each connection, so that it may change
    #[arg(long, value_name = "PATH", env = "TOLLGATED_PASSWORD_FILE", global = true)]
    pub password_file: Option<PathBuf>,

    /// Longest time that one statement may take
    #[arg(
        long,
        value_name = "TIME",
        env = "TOLLGATED_STATEMENT_TIMEOUT",
        default_value = "60s",
        value_parser = interval,
        global = true
    )]
    pub statement_timeout: Duration,
}

impl ConnectionOptions {
    /// Where to connect to. `application` is what pg_stat_activity shows.
    pub fn target(&self, application: &str) -> Result<Target> {
        let url = self.database_url.clone().unwrap_or_else(|| Secret::new(""));
        Target::parse(&url, self.password_file.as_deref(), application, self.statement_timeout)
    }

    /// The standbys to connect to, with the same settings.
    pub fn standbys(&self, options: &StandbyOptions, application: &str) -> Result<Vec<Target>> {
        let mut targets: Vec<Target> = Vec::new();
        for url in options.urls() {
            let target =
                Target::parse(&url, self.password_file.as_deref(), application, self.statement_timeout)?;
            if targets.iter().any(|other| other.describe() == target.describe()) {
                return Err(Error::usage(format!("--standby names {} twice", target.describe()))
                    .with_remedy("name each standby once"));
            }
            targets.push(target);
        }
        Ok(targets)
    }
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Logging")]
pub struct LogOptions {
    /// How log lines on standard error are written
    #[arg(long, value_enum, env = "TOLLGATED_LOG_FORMAT", default_value_t = LogFormat::Human, global = true)]
    pub log_format: LogFormat,

    /// error, warn, info, debug, trace, or directives such as "warn,tollgated::background::driver=debug".
    /// Events are logged at every level [default: info for `run`, warn otherwise]
    #[arg(long, value_name = "LEVEL", env = "TOLLGATED_LOG_LEVEL", global = true)]
    pub log_level: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    Human,
    Json,
}

#[derive(Clone, Debug, Args)]
pub struct CheckOptions {
    /// How long a transaction, a subscriber or a standby may be behind before it is reported
    #[arg(long, value_name = "TIME", default_value = "5min", value_parser = patience)]
    pub patience: Duration,

    /// Exit with status 1 on warnings too, not on failures alone
    #[arg(long)]
    pub strict: bool,

    #[command(flatten)]
    pub standby: StandbyOptions,
    #[command(flatten)]
    pub output: OutputOptions,
}

#[derive(Clone, Debug, Args)]
pub struct FlushOptions {
    #[command(flatten)]
    pub standby: StandbyOptions,
    #[command(flatten)]
    pub output: OutputOptions,
}

#[derive(Clone, Debug, Args)]
pub struct RetentionOptions {
    /// How long tokens and sessions are kept after they ended
    #[arg(
        long,
        value_name = "TIME",
        env = "TOLLGATED_RETENTION",
        default_value = "30d",
        value_parser = retention
    )]
    pub retention: Duration,

    /// How long the usage of each hour is kept; the totals stay for as long as the token
    #[arg(
        long,
        value_name = "TIME",
        env = "TOLLGATED_USAGE_RETENTION",
        default_value = "90d",
        value_parser = retention
    )]
    pub usage_retention: Duration,

    /// How long the audit log is kept, at least 1d; or off, for ever. Only what is sealed and was read by every
    /// subscription is deleted
    #[arg(long, value_name = "TIME", env = "TOLLGATED_AUDIT_RETENTION", default_value = "off")]
    pub audit_retention: AuditRetention,
}

#[derive(Clone, Debug, Args)]
pub struct RunOptions {
    /// How often usage is carried from the server's memory into its tables
    #[arg(long, value_name = "TIME", env = "TOLLGATED_FLUSH_INTERVAL", default_value = "5s",
        value_parser = interval)]
    pub flush_interval: Duration,

    #[command(flatten)]
    pub standby: StandbyOptions,

    /// How often expiries are recorded; tokens past their time are refused without it
    #[arg(long, value_name = "TIME", env = "TOLLGATED_EXPIRE_INTERVAL", default_value = "5s",
        value_parser = interval)]
    pub expire_interval: Duration,

    /// How often ended tokens and sessions are deleted
    #[arg(long, value_name = "TIME", env = "TOLLGATED_PURGE_INTERVAL", default_value = "1h",
        value_parser = interval)]
    pub purge_interval: Duration,

    #[command(flatten)]
    pub retention: RetentionOptions,

    /// How often the event log is looked at behind LISTEN, which only announces the urgent ones
    #[arg(long, value_name = "TIME", env = "TOLLGATED_PUBLISH_INTERVAL", default_value = "1s",
        value_parser = interval)]
    pub publish_interval: Duration,

    /// How often new events of the audit log are sealed, so that it shows when they are changed afterwards
    #[arg(long, value_name = "TIME", env = "TOLLGATED_SEAL_INTERVAL", default_value = "1min",
        value_parser = interval)]
    pub seal_interval: Duration,

    /// How long a key signs until the next one does, which is made a day earlier; or off. Without a signing key none is
    /// made
    #[arg(long, value_name = "TIME", env = "TOLLGATED_KEY_ROTATION", default_value = "90d")]
    pub key_rotation: KeyRotation,

    /// How long before its end a token or a session is announced, as token.expiring or session.expires_soon; 0 for never
    #[arg(long, value_name = "TIME", env = "TOLLGATED_EXPIRY_NOTICE", default_value = "7d",
        value_parser = notice)]
    pub expiry_notice: Duration,

    /// Where /livez, /readyz and /metrics are served, or off. They take no credential: keep them off public networks
    // Also by the name that it had when there was one address.
    #[arg(
        long,
        alias = "http-address",
        value_name = "ADDRESS",
        env = "TOLLGATED_OPS_ADDRESS",
        default_value = "127.0.0.1:9464"
    )]
    pub ops_address: ListenAddress,

    /// Where /events is served, to clients that present a token, or off
    #[arg(long, value_name = "ADDRESS", env = "TOLLGATED_API_ADDRESS", default_value = "off")]
    pub api_address: ListenAddress,

    #[command(flatten)]
    pub api: ApiOptions,
    #[command(flatten)]
    pub gateway: GatewayOptions,

    /// Threads that run tasks and serve HTTP
    #[arg(long, value_name = "N", env = "TOLLGATED_WORKER_THREADS", default_value_t = 2,
        value_parser = clap::value_parser!(u16).range(1..=64))]
    pub worker_threads: u16,

    /// A network that webhooks may be sent to, also by http, although it is not public, such as 10.1.0.0/16; repeat
    /// it, or separate several by commas
    #[arg(long, value_name = "CIDR", env = "TOLLGATED_WEBHOOK_ALLOW", value_delimiter = ',')]
    pub webhook_allow: Vec<IpNet>,

    #[command(flatten)]
    pub issuer_networks: IssuerNetworks,

    #[command(flatten)]
    pub batch: BatchOptions,

    /// The name under which the server remembers which events were logged; daemons that share it share the work
    #[arg(long, value_name = "NAME", env = "TOLLGATED_SUBSCRIPTION", default_value = "log",
        value_parser = subscription)]
    pub subscription: String,

    /// How long running work and the last flush may take when the daemon is asked to stop
    #[arg(long, value_name = "TIME", env = "TOLLGATED_SHUTDOWN_GRACE", default_value = "20s",
        value_parser = grace)]
    pub shutdown_grace: Duration,

    /// Write the process id to this file, and remove it at the end
    #[arg(long, value_name = "PATH", env = "TOLLGATED_PID_FILE")]
    pub pid_file: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct ConfigOptions {
    #[command(flatten)]
    pub run: RunOptions,
    #[command(flatten)]
    pub output: OutputOptions,
}

#[derive(Debug, Args)]
pub struct TailOptions {
    /// Begin after the event with this id; 0 begins with the first one that the log has
    #[arg(long, value_name = "ID", value_parser = clap::value_parser!(i64).range(0..))]
    pub since: Option<i64>,

    /// Begin with the last events, so many of them; 0 begins with the next one that comes
    #[arg(short = 'n', long, value_name = "N", default_value_t = 10, conflicts_with = "since",
        value_parser = clap::value_parser!(i64).range(0..=10_000))]
    pub last: i64,

    /// Go on with new events as they come, through reconnects; without it, end once all are printed
    #[arg(short, long)]
    pub follow: bool,

    #[command(flatten)]
    pub batch: BatchOptions,
}

#[derive(Debug, Args)]
pub struct CleanupOptions {
    #[command(flatten)]
    pub retention: RetentionOptions,
    #[command(flatten)]
    pub batch: BatchOptions,
    #[command(flatten)]
    pub output: OutputOptions,
}

/// An address to listen on, or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListenAddress(pub Option<SocketAddr>);

impl FromStr for ListenAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "off" => Ok(Self(None)),
            _ => text.parse().map(|address| Self(Some(address))).map_err(|_| {
                "it is neither off nor an IP address with a port, such as 127.0.0.1:9464 or [::1]:9464"
                    .to_owned()
            }),
        }
    }
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(address) => address.fmt(f),
            None => f.write_str("off"),
        }
    }
}

/// How long the audit log is kept, or that it is for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AuditRetention(pub Option<Duration>);

impl FromStr for AuditRetention {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "off" {
            return Ok(Self(None));
        }
        // A zero may be meant as "off", and a log that is gone cannot be had back.
        bounded(text, Duration::from_hours(24), MOST_RETENTION)
            .map(|time| Self(Some(time)))
            .map_err(|fault| format!("{fault}; or as off, to keep all of it"))
    }
}

impl fmt::Display for AuditRetention {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(time) => f.write_str(&duration::text(time)),
            None => f.write_str("off"),
        }
    }
}

/// How long a key signs; not at all by itself without one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyRotation(pub Option<Duration>);

impl FromStr for KeyRotation {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "off" {
            return Ok(Self(None));
        }
        bounded(text, Duration::from_hours(48), Duration::from_hours(24 * 3650))
            .map(|time| Self(Some(time)))
            .map_err(|fault| format!("{fault}; or as off, to rotate by hand"))
    }
}

impl fmt::Display for KeyRotation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(time) => f.write_str(&duration::text(time)),
            None => f.write_str("off"),
        }
    }
}

/// Takes connection strings out of a message that quotes the command line, for they may hold a password, and tokens that
/// were typed where they do not belong.
pub fn mask_arguments<'a>(message: &str, arguments: impl IntoIterator<Item = &'a str>) -> String {
    let mut masked = message.to_owned();
    for argument in arguments {
        // `--option=value` is quoted both whole and without the option.
        for part in std::iter::once(argument).chain(argument.split_once('=').map(|(_, value)| value)) {
            if part.contains("://") || part.contains("password") {
                masked = masked.replace(part, "[masked]");
            }
        }
    }
    token::redact(&masked)
}

/// Less would load the server for nothing; more than a day is surely a wrong unit.
fn interval(text: &str) -> Result<Duration, String> {
    bounded(text, Duration::from_millis(100), Duration::from_hours(24))
}

fn grace(text: &str) -> Result<Duration, String> {
    bounded(text, Duration::from_millis(100), Duration::from_hours(1))
}

/// What PostgreSQL's timestamps can still be reckoned with.
const MOST_RETENTION: Duration = Duration::from_hours(24 * 36_525);

fn retention(text: &str) -> Result<Duration, String> {
    bounded(text, Duration::ZERO, MOST_RETENTION)
}

fn patience(text: &str) -> Result<Duration, String> {
    bounded(text, Duration::ZERO, Duration::from_hours(24 * 365))
}

fn notice(text: &str) -> Result<Duration, String> {
    bounded(text, Duration::ZERO, Duration::from_hours(24 * 3650))
}

fn subscription(text: &str) -> Result<String, String> {
    match text.chars().count() {
        1..=100 => Ok(text.to_owned()),
        length => Err(format!("it takes a name of 1 to 100 characters, not of {length}")),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    fn parse(arguments: &[&str]) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(std::iter::once(&"tollgated").chain(arguments))
    }

    fn run(arguments: &[&str]) -> Box<RunOptions> {
        match parse(&[&["run"], arguments].concat()).unwrap().command {
            Command::Run(options) => options,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn each_command_has_an_example_in_its_help() {
        fn leaves(command: &clap::Command, path: &str, without: &mut Vec<String>) {
            for subcommand in command.get_subcommands().filter(|subcommand| !subcommand.is_hide_set()) {
                let path = format!("{path} {}", subcommand.get_name());
                if subcommand.has_subcommands() {
                    leaves(subcommand, &path, without);
                    continue;
                }
                let help = subcommand.get_after_long_help().or(subcommand.get_after_help());
                let help = help.map(ToString::to_string).unwrap_or_default();
                if !help.lines().any(|line| line.trim() == path || line.contains(&format!("{path} "))) {
                    without.push(path);
                }
            }
        }
        let mut without = Vec::new();
        leaves(&Cli::command(), "tollgated", &mut without);
        assert_eq!(without, Vec::<String>::new());
    }

    #[test]
    fn run_has_the_documented_defaults() {
        let options = run(&[]);
        assert_eq!(options.flush_interval, Duration::from_secs(5));
        assert_eq!(options.publish_interval, Duration::from_secs(1));
        assert_eq!(options.seal_interval, Duration::from_secs(60));
        assert_eq!(options.retention.retention, Duration::from_hours(30 * 24));
        assert_eq!(options.retention.usage_retention, Duration::from_hours(90 * 24));
        assert_eq!(options.retention.audit_retention, AuditRetention(None), "no log is deleted unasked");
        assert_eq!(options.standby.urls().count(), 0);
        assert_eq!(options.subscription, "log");
        assert_eq!(options.batch.batch_size, 1000);
    }

    #[test]
    fn keys_are_rotated_every_2_days_or_more_seldom_or_not_at_all() {
        assert_eq!("off".parse(), Ok(KeyRotation(None)));
        assert_eq!("2d".parse(), Ok(KeyRotation(Some(Duration::from_hours(48)))));
        assert!("47h".parse::<KeyRotation>().is_err_and(|fault| fault.contains("at least 2d")));
        assert!("11years".parse::<KeyRotation>().is_err_and(|fault| fault.contains("at most")));
    }

    #[test]
    fn values_that_cannot_be_meant_are_refused_with_the_option_and_the_bound() {
        for (arguments, words) in [
            (["--flush-interval", "1ms"], ["--flush-interval", "at least 100ms"]),
            (["--purge-interval", "2days"], ["--purge-interval", "at most 1d"]),
            (["--shutdown-grace", "0s"], ["--shutdown-grace", "at least 100ms"]),
            (["--retention", "200years"], ["--retention", "at most"]),
            (["--usage-retention", "200years"], ["--usage-retention", "at most"]),
            (["--audit-retention", "0"], ["--audit-retention", "off"]),
            (["--audit-retention", "0s"], ["--audit-retention", "at least 1d; or as off"]),
            (["--audit-retention", "23h"], ["--audit-retention", "at least 1d"]),
            (["--audit-retention", "200years"], ["--audit-retention", "at most"]),
            (["--subscription", ""], ["--subscription", "1 to 100 characters"]),
        ] {
            let error = parse(&[&["run"], &arguments[..]].concat()).unwrap_err().to_string();
            for word in words {
                assert!(error.contains(word), "{word:?} in {error}");
            }
        }
    }

    #[test]
    fn an_interval_without_a_unit_is_refused() {
        assert!(parse(&["run", "--flush-interval", "5"]).is_err());
        assert!(parse(&["run", "--batch-size", "0"]).is_err());
        assert!(parse(&["run", "--batch-size", "100001"]).is_err());
    }

    #[test]
    fn a_connection_string_is_never_shown() {
        let cli = parse(&["status", "--database-url", "postgresql://u:hunter2@h/d"]).unwrap();
        assert!(!format!("{cli:?}").contains("hunter2"));
        assert_eq!(
            cli.connection.database_url.as_ref().map(Secret::expose),
            Some("postgresql://u:hunter2@h/d")
        );
        let help = Cli::command().render_long_help().to_string();
        assert!(help.contains("DATABASE_URL") && !help.contains("DATABASE_URL="), "{help}");
    }

    #[test]
    fn a_misplaced_connection_string_is_masked_in_the_error_about_it() {
        for argument in
            ["postgresql://u:hunter2@h/d", "--databse-url=postgresql://u:hunter2@h/d", "password=hunter2"]
        {
            let message = parse(&["status", argument]).unwrap_err().render().to_string();
            let masked = mask_arguments(&message, [argument]);
            assert!(!masked.contains("hunter2"), "{masked}");
        }
    }

    #[test]
    fn standbys_are_repeated_or_separated_by_spaces_and_each_is_named_once() {
        let found = |arguments: &[&str]| {
            let options = ConnectionOptions {
                database_url: None,
                password_file: None,
                statement_timeout: Duration::from_secs(60),
            };
            let targets = options.standbys(&run(arguments).standby, "tollgated test");
            targets.map(|targets| targets.iter().map(Target::describe).collect::<Vec<_>>())
        };
        let expected = ["ann@one:5432/app", "ann@two:5433/app"];
        let (one, two) = ("postgresql://ann@one/app", "postgres://ann@two:5433/app");
        assert_eq!(found(&["--standby", one, "--standby", two]).unwrap(), expected);
        assert_eq!(found(&["--standby", &format!(" {one}\n{two} ")]).unwrap(), expected);
        assert_eq!(found(&["--standby", "host=one user=ann dbname=app"]).unwrap(), expected[..1]);
        assert!(found(&["--standby", ""]).unwrap().is_empty());
        assert_eq!(
            found(&["--standby", one, "--standby", one]).unwrap_err().kind(),
            crate::error::Kind::Usage
        );
        let secret = run(&["--standby", "postgresql://u:hunter2@h/d"]);
        assert!(!format!("{secret:?}").contains("hunter2"));
    }
}
