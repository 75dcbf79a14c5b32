//! The one error of this crate: what was being done, what went wrong, and what the person who reads it can do.
//!
//! PostgreSQL says much more than a sentence when it refuses: SQLSTATE, DETAIL, HINT. All of it is kept and printed.
//! A remedy is added where it is certain. What a SQLSTATE means depends on the statement: 42704 is a type that the
//! extension in this database lacks, or a scope that was never defined. So most remedies are added by the caller, with
//! [`Error::or_remedy`], and only those that hold for every statement stand here.

use std::error::Error as _;
use std::fmt;

use tokio_postgres::error::{DbError, SqlState};

use crate::process::{duration, printable};

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What an error leads to: a retry, an exit code, a log line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The command line or the configuration is wrong. Nothing was attempted.
    Usage,
    /// No connection could be made.
    Unreachable,
    /// A connection broke while it was in use.
    ConnectionLost,
    /// The server understood and refused, or the work failed in another way.
    Failed,
    /// The database's schema is of another version of Tollgate. The work goes on once it is updated.
    OtherSchema,
    /// The wait for something was given up because the process is asked to stop.
    Stopping,
    /// The reader of our standard output has gone.
    BrokenPipe,
}

#[derive(Debug)]
pub struct Error(Box<Inner>);

#[derive(Debug)]
struct Inner {
    kind: Kind,
    message: String,
    sqlstate: Option<SqlState>,
    detail: Option<String>,
    hint: Option<String>,
    /// Which one was violated.
    constraint: Option<String>,
    remedy: Option<String>,
}

impl Error {
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self(Box::new(Inner {
            kind,
            message: message.into(),
            sqlstate: None,
            detail: None,
            hint: None,
            constraint: None,
            remedy: None,
        }))
    }

    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(Kind::Usage, message)
    }

    pub fn failed(message: impl Into<String>) -> Self {
        Self::new(Kind::Failed, message)
    }

    pub fn stopping() -> Self {
        Self::new(Kind::Stopping, "the daemon is stopping")
    }

    /// Standard output could not be written to.
    #[expect(clippy::needless_pass_by_value, reason = "the shape that map_err wants")]
    pub fn output(error: std::io::Error) -> Self {
        match error.kind() {
            std::io::ErrorKind::BrokenPipe => {
                Self::new(Kind::BrokenPipe, "standard output was closed by its reader")
            }
            _ => Self::failed(format!("could not write to standard output: {error}")),
        }
    }

    #[must_use]
    pub fn with_remedy(mut self, remedy: impl Into<String>) -> Self {
        self.0.remedy = Some(remedy.into());
        self
    }

    /// Adds a remedy for one SQLSTATE, as it is for this statement, unless there is one already.
    #[must_use]
    pub fn or_remedy(mut self, sqlstate: &SqlState, remedy: &str) -> Self {
        if self.sqlstate() == Some(sqlstate) && self.0.remedy.is_none() {
            self.0.remedy = Some(remedy.to_owned());
        }
        self
    }

    /// Puts other words in the place of the server's detail and hint.
    #[must_use]
    pub fn reworded(mut self, words: impl Fn(&str) -> String) -> Self {
        for text in [&mut self.0.detail, &mut self.0.hint].into_iter().flatten() {
            *text = words(text);
        }
        self
    }

    /// Adds a sentence to the detail.
    #[must_use]
    pub fn with_detail(mut self, sentence: &str) -> Self {
        self.0.detail = Some(match self.0.detail.take() {
            Some(detail) => format!("{detail} {sentence}"),
            None => sentence.to_owned(),
        });
        self
    }

    /// A failure of a statement on a connection that had been made. `doing` completes "could not …".
    pub fn statement(doing: &str, error: &tokio_postgres::Error) -> Self {
        match error.as_db_error() {
            Some(refusal) => {
                let lost = is_unavailable(refusal.code());
                Self::refused(if lost { Kind::ConnectionLost } else { Kind::Failed }, doing, refusal)
            }
            None => {
                let kind =
                    if error.is_closed() || is_io(error) { Kind::ConnectionLost } else { Kind::Failed };
                Self::new(kind, format!("could not {doing}: {}", with_causes(error)))
            }
        }
    }

    /// A failure to make a connection, but for those of TLS, which the module `tls` explains. `target` names the server, without a
    /// password.
    pub fn connecting(target: &str, error: &tokio_postgres::Error) -> Self {
        let doing = format!("connect to {target}");
        match error.as_db_error() {
            Some(refusal) => Self::refused(Kind::Unreachable, &doing, refusal),
            None => {
                let causes = with_causes(error);
                // Said already.
                let causes = causes.strip_prefix("error connecting to server: ").unwrap_or(&causes);
                let failure = Self::new(Kind::Unreachable, format!("could not {doing}: {causes}"));
                match io_kind(error) {
                    Some(std::io::ErrorKind::ConnectionRefused | std::io::ErrorKind::NotFound) => failure
                        .with_remedy("start the server, or correct host and port in the connection string"),
                    Some(std::io::ErrorKind::PermissionDenied) => {
                        failure.with_remedy("give this user access to the socket's directory")
                    }
                    _ => failure,
                }
            }
        }
    }

    /// A connection that took too long to make.
    pub fn connect_timeout(target: &str, after: std::time::Duration) -> Self {
        Self::new(
            Kind::Unreachable,
            format!("could not connect to {target}: no answer within {}", duration::text(after)),
        )
    }

    fn refused(kind: Kind, doing: &str, refusal: &DbError) -> Self {
        let mut error = Self::new(kind, format!("could not {doing}: {}", refusal.message()));
        error.0.detail = refusal.detail().map(str::to_owned);
        error.0.hint = refusal.hint().map(str::to_owned);
        error.0.constraint = refusal.constraint().map(str::to_owned);
        error.0.remedy = remedy(refusal.code(), refusal.message(), refusal.position().is_some())
            // The extension's own hint says the same, and says it for this server.
            .filter(|_| {
                *refusal.code() != SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE || refusal.hint().is_none()
            })
            .map(str::to_owned);
        error.0.sqlstate = Some(refusal.code().clone());
        error
    }

    pub fn kind(&self) -> Kind {
        self.0.kind
    }

    pub fn sqlstate(&self) -> Option<&SqlState> {
        self.0.sqlstate.as_ref()
    }

    /// The sentence alone, without SQLSTATE, detail, hint and remedy.
    pub fn message(&self) -> &str {
        &self.0.message
    }

    pub fn detail(&self) -> Option<&str> {
        self.0.detail.as_deref()
    }

    pub fn hint(&self) -> Option<&str> {
        self.0.hint.as_deref()
    }

    /// The constraint that a refused statement violates.
    pub fn constraint(&self) -> Option<&str> {
        self.0.constraint.as_deref()
    }

    pub fn remedy(&self) -> Option<&str> {
        self.0.remedy.as_deref()
    }

    /// The error over several lines, for a terminal.
    pub fn report(&self) -> String {
        let mut text = printable::escape_lines(&self.0.message, "");
        for (name, value) in [
            ("sqlstate", self.0.sqlstate.as_ref().map(SqlState::code)),
            ("detail", self.0.detail.as_deref()),
            ("hint", self.0.hint.as_deref()),
            ("to fix it", self.0.remedy.as_deref()),
        ] {
            if let Some(value) = value {
                text.push_str("\n  ");
                text.push_str(name);
                text.push_str(": ");
                text.push_str(&printable::escape_lines(value, "    "));
            }
        }
        text
    }
}

/// The error on one line, for a log.
impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)?;
        if let Some(sqlstate) = &self.0.sqlstate {
            write!(f, " (SQLSTATE {})", sqlstate.code())?;
        }
        for (name, value) in [
            ("DETAIL", self.0.detail.as_deref()),
            ("HINT", self.0.hint.as_deref()),
            ("TO FIX IT", self.0.remedy.as_deref()),
        ] {
            if let Some(value) = value {
                write!(f, "; {name}: {}", value.replace('\n', " "))?;
            }
        }
        Ok(())
    }
}

impl std::error::Error for Error {}

/// Says what was being done when a statement failed.
pub trait Doing<T> {
    /// `what` completes "could not …".
    fn doing(self, what: &str) -> Result<T>;
}

impl<T> Doing<T> for std::result::Result<T, tokio_postgres::Error> {
    fn doing(self, what: &str) -> Result<T> {
        self.map_err(|error| Error::statement(what, &error))
    }
}

/// Refusals that speak of the server's or the connection's state, not of what was asked.
fn is_unavailable(sqlstate: &SqlState) -> bool {
    sqlstate.code().starts_with("08")
        || [
            SqlState::ADMIN_SHUTDOWN,
            SqlState::CRASH_SHUTDOWN,
            SqlState::CANNOT_CONNECT_NOW,
            SqlState::TOO_MANY_CONNECTIONS,
            SqlState::IDLE_IN_TRANSACTION_SESSION_TIMEOUT,
            SqlState::IDLE_SESSION_TIMEOUT,
        ]
        .contains(sqlstate)
}

/// What fixes an error, where the SQLSTATE always means the same. `in_statement`: PostgreSQL points at a place in our
/// statement, which names something that it does not know; what a function raises by itself has no such place.
fn remedy(sqlstate: &SqlState, message: &str, in_statement: bool) -> Option<&'static str> {
    // By name, since every release of tokio-postgres may add codes and these are constants, not variants.
    Some(match sqlstate {
        s if *s == SqlState::INSUFFICIENT_PRIVILEGE => {
            "run `tollgated check`: it prints the statement that grants what is missing"
        }
        s if [
            SqlState::INVALID_SCHEMA_NAME,
            SqlState::UNDEFINED_FUNCTION,
            SqlState::UNDEFINED_TABLE,
            SqlState::UNDEFINED_COLUMN,
        ]
        .contains(s)
            || (*s == SqlState::UNDEFINED_OBJECT && in_statement) =>
        {
            "run CREATE EXTENSION tollgate in this database, or ALTER EXTENSION tollgate UPDATE if it is there; `tollgated check` says which"
        }
        s if *s == SqlState::UNDEFINED_FILE => {
            "install Tollgate's library on the server (its directory is what `pg_config --pkglibdir` prints there)"
        }
        s if *s == SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE => {
            "add tollgate to shared_preload_libraries in postgresql.conf and restart the server"
        }
        s if *s == SqlState::READ_ONLY_SQL_TRANSACTION => {
            "connect to the primary: name it in the connection string, or list all hosts with target_session_attrs=read-write"
        }
        s if *s == SqlState::INVALID_CATALOG_NAME => {
            "create the database, or correct dbname in the connection string"
        }
        s if *s == SqlState::INVALID_PASSWORD => {
            "correct the user in the connection string, and the password there, in --password-file, PGPASSWORD or ~/.pgpass"
        }
        s if *s == SqlState::INVALID_AUTHORIZATION_SPECIFICATION && message.contains("no encryption") => {
            "the server admits this host over TLS only: give sslmode=require or more, or admit it in pg_hba.conf (`host`, not `hostssl`)"
        }
        s if *s == SqlState::INVALID_AUTHORIZATION_SPECIFICATION => {
            "create the role with LOGIN, or admit it in pg_hba.conf and reload the server"
        }
        s if *s == SqlState::TOO_MANY_CONNECTIONS => {
            "raise max_connections, or close connections that are not needed"
        }
        s if *s == SqlState::QUERY_CANCELED => "raise --statement-timeout",
        s if *s == SqlState::LOCK_NOT_AVAILABLE => {
            "end the transaction that holds the lock: see pg_blocking_pids() and pg_stat_activity"
        }
        _ => return None,
    })
}

fn is_io(error: &tokio_postgres::Error) -> bool {
    io_kind(error).is_some()
}

fn io_kind(error: &tokio_postgres::Error) -> Option<std::io::ErrorKind> {
    error.source().and_then(|cause| cause.downcast_ref::<std::io::Error>()).map(std::io::Error::kind)
}

/// tokio-postgres says only the kind of an error and leaves the rest to its sources.
fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        cause = inner.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal() -> Error {
        let mut error = Error::failed("could not drain usage: tollgate is not preloaded");
        error.0.sqlstate = Some(SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE);
        error.0.detail = Some("Nothing is counted.\nNothing is limited.".into());
        error.0.hint = Some("Preload it.".into());
        error.0.remedy = Some("do this".into());
        error
    }

    #[test]
    fn a_log_line_has_everything_the_server_said_and_no_line_break() {
        assert_eq!(
            refusal().to_string(),
            "could not drain usage: tollgate is not preloaded (SQLSTATE 55000); \
             DETAIL: Nothing is counted. Nothing is limited.; HINT: Preload it.; TO FIX IT: do this"
        );
    }

    #[test]
    fn a_report_has_a_line_for_each_part_and_none_for_a_part_that_is_missing() {
        assert_eq!(
            refusal().report(),
            "could not drain usage: tollgate is not preloaded\n  sqlstate: 55000\n  \
             detail: Nothing is counted.\n    Nothing is limited.\n  hint: Preload it.\n  to fix it: do this"
        );
        assert_eq!(Error::failed("it broke").report(), "it broke");
    }

    #[test]
    fn errors_of_the_server_s_state_are_distinguished_from_errors_of_the_request() {
        for sqlstate in [SqlState::ADMIN_SHUTDOWN, SqlState::CANNOT_CONNECT_NOW, SqlState::CONNECTION_FAILURE]
        {
            assert!(is_unavailable(&sqlstate), "{sqlstate:?}");
        }
        for sqlstate in [SqlState::INSUFFICIENT_PRIVILEGE, SqlState::QUERY_CANCELED] {
            assert!(!is_unavailable(&sqlstate), "{sqlstate:?}");
        }
    }

    #[test]
    fn a_missing_privilege_and_a_missing_extension_name_the_command_that_fixes_them() {
        let grant =
            remedy(&SqlState::INSUFFICIENT_PRIVILEGE, "permission denied for function drain_usage", false);
        assert!(grant.is_some_and(|text| text.contains("tollgated check")));
        for (sqlstate, message, in_statement) in [
            (SqlState::INVALID_SCHEMA_NAME, "schema \"tollgate\" does not exist", false),
            (SqlState::UNDEFINED_OBJECT, "type \"tollgate.usage_row\" does not exist", true),
        ] {
            let extension = remedy(&sqlstate, message, in_statement);
            assert!(extension.is_some_and(|text| text.contains("CREATE EXTENSION tollgate")), "{message}");
        }
        assert_eq!(remedy(&SqlState::DIVISION_BY_ZERO, "division by zero", false), None);
    }

    #[test]
    fn what_a_function_does_not_find_is_no_missing_extension() {
        assert_eq!(remedy(&SqlState::UNDEFINED_OBJECT, "there is no scope 'tollgate:x'", false), None);
    }

    #[test]
    fn a_remedy_is_added_for_its_sqlstate_alone_and_replaces_none() {
        let error = || refusal().or_remedy(&SqlState::UNDEFINED_OBJECT, "list the scopes");
        assert_eq!(error().remedy(), Some("do this"));
        let mut other = Error::failed("no");
        other.0.sqlstate = Some(SqlState::UNDEFINED_OBJECT);
        assert_eq!(
            other.or_remedy(&SqlState::UNDEFINED_OBJECT, "list the scopes").remedy(),
            Some("list the scopes")
        );
        assert_eq!(
            Error::failed("no").or_remedy(&SqlState::UNDEFINED_OBJECT, "list the scopes").remedy(),
            None
        );
    }

    #[test]
    fn a_server_that_requires_tls_is_distinguished_from_one_without_that_role() {
        let tls = remedy(
            &SqlState::INVALID_AUTHORIZATION_SPECIFICATION,
            "no pg_hba.conf entry for host \"10.0.0.1\", user \"a\", database \"b\", no encryption",
            false,
        );
        assert!(tls.is_some_and(|text| text.contains("TLS")));
        let role = remedy(&SqlState::INVALID_AUTHORIZATION_SPECIFICATION, "role \"a\" does not exist", false);
        assert!(role.is_some_and(|text| text.contains("LOGIN")));
    }

    #[test]
    fn a_closed_pipe_is_no_failure() {
        let pipe = std::io::Error::from(std::io::ErrorKind::BrokenPipe);
        assert_eq!(Error::output(pipe).kind(), Kind::BrokenPipe);
        let full = std::io::Error::from(std::io::ErrorKind::StorageFull);
        assert_eq!(Error::output(full).kind(), Kind::Failed);
    }
}
