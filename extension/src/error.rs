//! The errors that users see. Each has an SQLSTATE, a sentence, a detail and a hint that says what the reader can do.
//! None ever contains a token or part of one.
#![allow(unsafe_code)]

use crate::pg::sys;
use crate::verify::refusal;
use crate::verify::refusal::Refusal;
use core::ffi::c_int;
use pgrx::pg_sys;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::{PgLogLevel, PgSqlErrorCode};
use std::ffi::CString;
use tollgate_core::status::Code;
use tollgate_core::token;

/// The hint for attaching a users table by another column.
const REATTACH: &str =
    "Attach it again, with tollgate.attach_users_table(), by the column that now has the user_id.";

const MASTER_KEY_HINT: &str = "`tollgated key init FILE` makes a master key; name the file in tollgate.master_key_file in postgresql.conf, \
     outside of the data directory, and reload the configuration.";

pub(crate) struct Error {
    sqlstate: PgSqlErrorCode,
    message: String,
    detail: Option<String>,
    hint: Option<String>,
}

impl Error {
    fn new(sqlstate: PgSqlErrorCode, message: impl Into<String>) -> Self {
        Error { sqlstate, message: message.into(), detail: None, hint: None }
    }

    fn detail(mut self, detail: impl Into<String>) -> Self {
        self.detail = Some(detail.into());
        self
    }

    fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// A bad argument: the detail names it, and says what is wrong with it.
    pub(crate) fn argument(name: &str, message: impl Into<String>, offence: &str, hint: &str) -> Self {
        Error::new(PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE, message)
            .detail(format!("Argument: {name}{}{offence}.", if offence.is_empty() { "" } else { ", " }))
            .hint(hint)
    }

    /// A presented token that was refused. The detail is JSON, for programs: see [`Refusal::to_json`].
    pub(crate) fn refused(refusal: &Refusal) -> Self {
        if refusal.code == Code::QuotaExceeded {
            let hint = match refusal.retry_after {
                Some(retry_after) => format!("Try again in {}.", duration(retry_after)),
                None => "Add credits with tollgate.add_credits().".to_owned(),
            };
            return Error::new(PgSqlErrorCode::ERRCODE_CONFIGURATION_LIMIT_EXCEEDED, "the quota is used up")
                .detail(refusal.to_json())
                .hint(hint);
        }
        if let Some(retry_after) = refusal.retry_after {
            return Error::new(
                PgSqlErrorCode::ERRCODE_CONFIGURATION_LIMIT_EXCEEDED,
                "the token is over a rate limit",
            )
            .detail(refusal.to_json())
            .hint(format!("Try again in {}.", duration(retry_after)));
        }
        let (sqlstate, message, hint) = match refusal.code {
            Code::InsufficientScope => (
                PgSqlErrorCode::ERRCODE_INSUFFICIENT_PRIVILEGE,
                "the token lacks a required scope",
                "Present a token that was issued with every scope that this operation requires.",
            ),
            Code::IpNotAllowed => (
                PgSqlErrorCode::ERRCODE_INVALID_AUTHORIZATION_SPECIFICATION,
                "the token was refused",
                "The token is bound to networks: pass the client's address as client_ip, and check that it is in one of them.",
            ),
            Code::Malformed => (
                PgSqlErrorCode::ERRCODE_INVALID_AUTHORIZATION_SPECIFICATION,
                "the token was refused",
                "Pass the whole token as it was issued, without \"Bearer \", quotes or spaces around it.",
            ),
            Code::UntrustedIssuer => (
                PgSqlErrorCode::ERRCODE_INVALID_AUTHORIZATION_SPECIFICATION,
                "the token was refused",
                "Present a token of the issuer that tollgate.issuer names, or of one that tollgate.trust_issuer() was called for.",
            ),
            Code::UnknownKey | Code::BadSignature => (
                PgSqlErrorCode::ERRCODE_INVALID_AUTHORIZATION_SPECIFICATION,
                "the token was refused",
                "Pass the whole token as it was issued, and log in again if its key was withdrawn.",
            ),
            Code::NotYetValid => (
                PgSqlErrorCode::ERRCODE_INVALID_AUTHORIZATION_SPECIFICATION,
                "the token was refused",
                "Present it once it is valid, and check that the clocks of your servers agree.",
            ),
            Code::WrongAudience => (
                PgSqlErrorCode::ERRCODE_INVALID_AUTHORIZATION_SPECIFICATION,
                "the token was refused",
                "Present a token that was issued for this service, whose name is in the setting tollgate.audience or the argument audience.",
            ),
            _ => (
                PgSqlErrorCode::ERRCODE_INVALID_AUTHORIZATION_SPECIFICATION,
                "the token was refused",
                "Issue a new token with tollgate.create_api_token() if its user should still have access.",
            ),
        };
        Error::new(sqlstate, message).detail(refusal.to_json()).hint(hint)
    }

    /// The detail names no token: the second caller must not learn who the first one was.
    pub(crate) fn second_identity() -> Self {
        Error::new(
            PgSqlErrorCode::ERRCODE_ACTIVE_SQL_TRANSACTION,
            "this transaction is already authenticated with another token",
        )
        .detail(
            "A transaction has one identity until it ends, also after ROLLBACK TO a savepoint: cursors and \
             sub-selects may have been answered by it.",
        )
        .hint("End the transaction, and authenticate in a new one.")
    }

    /// Like PostgreSQL's warning about SET LOCAL outside a transaction block.
    pub(crate) fn unused_identity() -> Self {
        Error::new(
            PgSqlErrorCode::ERRCODE_NO_ACTIVE_SQL_TRANSACTION,
            "authenticate() outside a transaction block has no effect on later statements",
        )
        .detail("The identity ended with its statement, before anything used it.")
        .hint("Call BEGIN first; or, to check a token only, tollgate.verify_api_token().")
    }

    pub(crate) fn missing_scope(scope: &str, authenticated: bool) -> Self {
        // The requested scope may be of any length.
        let shown: String = token::redact(scope).chars().take(140).collect();
        let error = Error::new(
            PgSqlErrorCode::ERRCODE_INSUFFICIENT_PRIVILEGE,
            format!("permission denied: scope {shown:?} is required"),
        );
        let refusal = Refusal {
            missing_scopes: vec![refusal::shown(Some(scope.as_bytes()))],
            ..Refusal::new(Code::InsufficientScope)
        };
        error.detail(refusal.to_json()).hint(if authenticated {
            "Authenticate with a token that was issued with this scope."
        } else {
            "This transaction has no identity: call tollgate.authenticate(token) first, in the same transaction."
        })
    }

    /// A transaction whose snapshot does not show the current state of the tokens.
    pub(crate) fn old_snapshot() -> Self {
        Error::new(
            PgSqlErrorCode::ERRCODE_T_R_SERIALIZATION_FAILURE,
            "could not serialize access due to concurrent changes of tokens",
        )
        .detail("Tokens were issued or changed after this transaction took its snapshot.")
        .hint("Retry the transaction, or use READ COMMITTED.")
    }

    /// A user who is in none of the attached tables; the detail names the tables and their keys.
    pub(crate) fn no_such_user(tables: &[String]) -> Self {
        Error::new(PgSqlErrorCode::ERRCODE_FOREIGN_KEY_VIOLATION, "there is no such user")
            .detail(format!("Argument: user_id, which is no key in {}.", tables.join(", nor in ")))
            .hint(
                "Insert the user first, in the same transaction if need be. The user_id is the text of the key, \
                 byte for byte. attach_users_table() with require_user => false lets tokens be issued for others too.",
            )
    }

    /// A user who is inactive by the condition of an attached table.
    pub(crate) fn inactive_user() -> Self {
        Error::new(PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE, "the user is not active")
            .detail("Argument: user_id; the condition that attach_users_table() was given as active is not true for it, or it is a service account that is disabled.")
            .hint("Activate the user first, in the same transaction if need be.")
    }

    pub(crate) fn consumed_in_a_transaction(function: &str) -> Self {
        Error::new(
            PgSqlErrorCode::ERRCODE_ACTIVE_SQL_TRANSACTION,
            format!("{function} cannot run inside a transaction block"),
        )
        .detail("What it consumes might be rolled back after it was answered, and then be used again.")
        .hint("Call it in a statement of its own, and answer after its COMMIT.")
    }

    pub(crate) fn no_key_column(table: &str, column: &str) -> Self {
        Error::new(
            PgSqlErrorCode::ERRCODE_UNDEFINED_COLUMN,
            format!("the key column of the users table {table} no longer exists"),
        )
        .detail(format!(
            "The table was attached by its column {column:?}, whose text is the user_id of tokens."
        ))
        .hint(REATTACH)
    }

    pub(crate) fn virtual_key(table: &str, column: &str) -> Self {
        Error::new(PgSqlErrorCode::ERRCODE_WRONG_OBJECT_TYPE, "the key of a users table must be stored")
            .detail(format!("Column {column:?} of {table} is a virtual generated column, whose values triggers are not handed."))
            .hint("Name a column that it is computed from, or generate it STORED.")
    }

    pub(crate) fn unfit_key(table: &str, column: &str, data_type: &str, why: &str) -> Self {
        Error::new(
            PgSqlErrorCode::ERRCODE_DATATYPE_MISMATCH,
            "the key of a users table is a uuid, an integer or a text, or a domain of these",
        )
        .detail(format!("Column {column:?} of {table} is of type {data_type}: {why}."))
        .hint("Add a column GENERATED ALWAYS AS (...) STORED of type text, which has the user_id of tokens, and attach by that one.")
    }

    /// The `active` argument of `attach_users_table`.
    pub(crate) fn unfit_condition(offence: &str, hint: &str) -> Self {
        Error::argument("active", "this cannot be the condition under which a user is active", offence, hint)
    }

    pub(crate) fn too_many_tokens(limit: i32) -> Self {
        Error::new(
            PgSqlErrorCode::ERRCODE_CONFIGURATION_LIMIT_EXCEEDED,
            "the user has as many live tokens as are allowed",
        )
        .detail(format!("The setting tollgate.max_tokens_per_user allows {limit}."))
        .hint("Revoke a token that is not needed any more, then try again.")
    }

    /// A warning for an issued token. `remaining` is in microseconds.
    pub(crate) fn short_life(remaining: i64) -> Self {
        // In tenths of a second, which hides the time that issuing took.
        let tenths = u64::try_from(remaining).unwrap_or(0).div_ceil(100_000);
        let remaining = duration(tenths * 100_000);
        Error::new(PgSqlErrorCode::ERRCODE_SUCCESSFUL_COMPLETION, format!("the token expires in {remaining}"))
            .hint("An interval without a unit is in seconds: write 90 days for ninety days.")
    }

    /// A warning for an issued token.
    pub(crate) fn name_like_a_list() -> Self {
        Error::new(
            PgSqlErrorCode::ERRCODE_SUCCESSFUL_COMPLETION,
            "the name of the token looks like a list of scopes",
        )
        .hint("The arguments are user_id, name, scopes: pass the user first, or name them as in scopes => '{posts:read}'.")
    }

    pub(crate) fn duplicate_digest() -> Self {
        Error::new(PgSqlErrorCode::ERRCODE_UNIQUE_VIOLATION, "a token with this digest is already stored")
            .detail("Argument: token_hash.")
            .hint("It was imported before, or two tokens of the other system are the same.")
    }

    /// Access tokens name their issuer.
    pub(crate) fn no_issuer() -> Self {
        Error::new(
            PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            "this database issues no access tokens",
        )
        .detail("The setting tollgate.issuer is empty.")
        .hint("A superuser sets it with ALTER DATABASE … SET tollgate.issuer = 'https://…'.")
    }

    /// The claims that an identity would keep.
    pub(crate) fn too_many_claims(bytes: usize, most: usize) -> Self {
        Error::new(
            PgSqlErrorCode::ERRCODE_PROGRAM_LIMIT_EXCEEDED,
            format!("an identity keeps at most {most} bytes of claims"),
        )
        .detail(format!("Those that tollgate.identity_claims names have {bytes} bytes in this token."))
        .hint("Name fewer or smaller claims there.")
    }

    pub(crate) fn too_deep(limit: i32) -> Self {
        Error::new(
            PgSqlErrorCode::ERRCODE_PROGRAM_LIMIT_EXCEEDED,
            format!("a token cannot be derived through more than {limit} generations"),
        )
        .detail("Argument: parent.")
        .hint("Derive it from one of the parent's ancestors.")
    }

    pub(crate) fn needs_preload(what: &str) -> Self {
        Error::new(
            PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            format!("{what} needs shared memory, and tollgate was not loaded at server start"),
        )
        .hint("Add tollgate to shared_preload_libraries in postgresql.conf and restart the server.")
    }

    pub(crate) fn too_many_databases(limit: usize) -> Self {
        Error::new(
            PgSqlErrorCode::ERRCODE_PROGRAM_LIMIT_EXCEEDED,
            format!("usage of more than {limit} databases cannot be flushed by one server"),
        )
        .hint("Tollgate still verifies tokens here. Move databases to another server.")
    }

    /// The file that carries counters over a restart. Logged only: no client is connected when it is read or written.
    pub(crate) fn usage_file(message: impl Into<String>, detail: impl Into<String>, hint: &str) -> Self {
        Error::new(PgSqlErrorCode::ERRCODE_IO_ERROR, message).detail(detail).hint(hint)
    }

    /// An informational message.
    pub(crate) fn note(message: impl Into<String>) -> Self {
        Error::new(PgSqlErrorCode::ERRCODE_SUCCESSFUL_COMPLETION, message)
    }

    pub(crate) fn out_of_memory(bytes: usize) -> Self {
        Error::new(PgSqlErrorCode::ERRCODE_OUT_OF_MEMORY, "out of memory")
            .detail(format!("The counters to hand out take {bytes} bytes."))
            .hint("Nothing is lost: the next flush carries them. Free memory, or lower tollgate.max_tracked_keys.")
    }

    /// `why` there is none, if the server is configured to have one.
    pub(crate) fn no_master_key(why: Option<&str>) -> Self {
        Error::new(
            PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            "this server has no master key, so no sealed key can be used",
        )
        .detail(why.unwrap_or(
            "The settings tollgate.master_key_file and tollgate.master_key_command are both empty.",
        ))
        .hint(MASTER_KEY_HINT)
    }

    pub(crate) fn unknown_master_key(id: &str) -> Self {
        Error::new(
            PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            "the signing key is sealed with a master key that this server does not have",
        )
        .detail(format!("The id of the master key is {id}."))
        .hint("Add it to tollgate.master_key_file, and reload the configuration; if it is lost, withdraw the signing key and create another.")
    }

    pub(crate) fn no_signing_key() -> Self {
        Error::new(PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE, "there is no signing key")
            .detail("No key of this database is in the state signing: see tollgate.signing_keys.")
            .hint("Create one with tollgate.create_signing_key().")
    }

    /// `name` is a name that keys may have.
    pub(crate) fn no_url_key(name: &str) -> Self {
        Error::new(
            PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            format!("there is no key named {name} that signs URLs"),
        )
        .detail("No key of that name is in the state signing: see tollgate.url_keys.")
        .hint("Create one with tollgate.create_url_key().")
    }

    pub(crate) fn other_algorithm(wanted: &str, found: &str) -> Self {
        Error::new(PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE, "no key of that algorithm signs")
            .detail(format!("Wanted is {wanted}; the key that signs is of {found}."))
            .hint("Create a key of that algorithm with tollgate.create_signing_key().")
    }

    /// A sealed key that does not open: someone who may write the table changed it.
    pub(crate) fn damaged_key(kid: &str) -> Self {
        Error::new(
            PgSqlErrorCode::ERRCODE_DATA_CORRUPTED,
            "the signing key does not open: it was changed, or sealed for another use",
        )
        .detail(format!("Its kid is {kid}."))
        .hint("Withdraw it with tollgate.withdraw_signing_key(), create another, and find out who changed tollgate.sealed_keys.")
    }

    /// The same of an import key.
    pub(crate) fn damaged_import_key(name: &str) -> Self {
        Error::new(
            PgSqlErrorCode::ERRCODE_DATA_CORRUPTED,
            format!("the import key {name} does not open: it was changed, or sealed for another use"),
        )
        .detail("Tokens that were imported with it and not used yet are refused.")
        .hint("Restore its row of tollgate.sealed_keys, and find out who changed it.")
    }

    pub(crate) fn is_damaged(&self) -> bool {
        self.sqlstate == PgSqlErrorCode::ERRCODE_DATA_CORRUPTED
    }

    /// Message and detail, for the server's log.
    pub(crate) fn text(&self) -> String {
        match &self.detail {
            Some(detail) => format!("{}. {detail}", self.message),
            None => self.message.to_string(),
        }
    }

    pub(crate) fn unfit_pem(offence: &str) -> Self {
        Error::argument(
            "pem",
            "this is not a private key that can sign",
            offence,
            "Pass one PEM block of PKCS#8 (BEGIN PRIVATE KEY) with a key for ES256, EdDSA or RS256; openssl pkcs8 -topk8 -nocrypt \
             converts others.",
        )
    }

    /// Logged only.
    pub(crate) fn master_keys_unread(why: &str) -> Self {
        Error::new(
            PgSqlErrorCode::ERRCODE_CONFIG_FILE_ERROR,
            "tollgate: could not read the master keys; those that were read before stay in use",
        )
        .detail(why)
        .hint(MASTER_KEY_HINT)
    }

    /// The tables do not have the layout that this library was built for.
    pub(crate) fn unknown_layout(detail: impl Into<String>) -> Self {
        Error::new(
            PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            "the tables of extension tollgate do not match the library that is loaded",
        )
        .detail(detail)
        .hint("Run ALTER EXTENSION tollgate UPDATE, and restart the server if the library was replaced.")
    }

    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Error::new(PgSqlErrorCode::ERRCODE_INTERNAL_ERROR, message)
    }

    #[track_caller]
    pub(crate) fn raise(self) -> ! {
        let mut report = ErrorReport::new(self.sqlstate, self.message, "");
        if let Some(detail) = self.detail {
            report = report.set_detail(detail);
        }
        if let Some(hint) = self.hint {
            report = report.set_hint(hint);
        }
        report.report(PgLogLevel::ERROR);
        unreachable!("an ERROR does not return")
    }

    /// Writes it to the server's log.
    pub(crate) fn log(self) {
        self.report(pg_sys::LOG);
    }

    /// Sends it to the calling client as a WARNING.
    pub(crate) fn warn(self) {
        self.report(pg_sys::WARNING);
    }

    /// Sends it to the calling client as a NOTICE.
    pub(crate) fn notice(self) {
        self.report(pg_sys::NOTICE);
    }

    /// Reports it at a level below ERROR.
    fn report(self, level: u32) {
        let text = |text: &str| CString::new(text.replace('\0', "")).unwrap_or_default();
        let (message, detail, hint) =
            (text(&self.message), self.detail.as_deref().map(text), self.hint.as_deref().map(text));
        let pointer = |text: &Option<CString>| text.as_ref().map(|text| text.as_ptr());
        let (message, sqlstate) = (message.as_ptr(), self.sqlstate as c_int);
        let (detail, hint) = (pointer(&detail), pointer(&hint));
        // SAFETY: the calls that ereport() expands to; each format takes one string, which outlives the closure. At
        // this level errfinish processes interrupts, which may raise an ERROR: the closure holds nothing that needs
        // dropping.
        unsafe {
            sys::guarded(|| {
                if sys::errstart(level.cast_signed(), core::ptr::null()) {
                    sys::errcode(sqlstate);
                    sys::errmsg_internal(c"%s".as_ptr(), message);
                    if let Some(detail) = detail {
                        sys::errdetail_internal(c"%s".as_ptr(), detail);
                    }
                    if let Some(hint) = hint {
                        sys::errhint(c"%s".as_ptr(), hint);
                    }
                    sys::errfinish(c"error.rs".as_ptr(), 0, c"report".as_ptr());
                }
            });
        }
    }
}

/// Raises the error of a `Result` as a PostgreSQL ERROR.
pub(crate) trait OrRaise<T> {
    fn or_raise(self) -> T;
}

impl<T> OrRaise<T> for Result<T, Error> {
    #[track_caller]
    fn or_raise(self) -> T {
        self.unwrap_or_else(|error| error.raise())
    }
}

/// A duration for messages, rounded up so that a retry after it is not too early.
fn duration(micros: u64) -> String {
    match micros.div_ceil(1000) {
        millis @ 0..1000 => format!("{millis} ms"),
        millis => format!("{} s", millis.div_ceil(1000)),
    }
}
