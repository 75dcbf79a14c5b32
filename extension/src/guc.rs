//! Settings. Each is checked when it is set, and its description gives the reason for its default.
#![allow(unsafe_code)]

use crate::pg::guard;
use core::ffi::{CStr, c_char, c_int, c_void};
use core::sync::atomic::{AtomicPtr, Ordering};
use pgrx::prelude::*;
use pgrx::{GucContext, GucFlags, GucRegistry, GucSetting, PostgresGucEnum, pg_sys};
use std::ffi::CString;
use tollgate_core::limit::Limit;
use tollgate_core::token::{self, DEFAULT_PREFIX, Prefix};

static MAX_TRACKED_KEYS: GucSetting<i32> = GucSetting::<i32>::new(131_072);
static LOG_VERIFICATIONS: GucSetting<LogVerifications> =
    GucSetting::<LogVerifications>::new(LogVerifications::off);
static MAX_LOGGED_VERIFICATIONS: GucSetting<i32> = GucSetting::<i32>::new(100);
static MAX_TOKEN_LIFETIME: GucSetting<i32> = GucSetting::<i32>::new(0);
static MAX_METADATA_SIZE: GucSetting<i32> = GucSetting::<i32>::new(16 * 1024);
static MAX_TOKENS_PER_USER: GucSetting<i32> = GucSetting::<i32>::new(0);
static USER_RATE_LIMIT: GucSetting<i32> = GucSetting::<i32>::new(0);
static USER_RATE_WINDOW: GucSetting<i32> = GucSetting::<i32>::new(60);
static FAILURE_RATE_LIMIT: GucSetting<i32> = GucSetting::<i32>::new(0);
static GATEWAY_FAILURE_RATE_LIMIT: GucSetting<i32> = GucSetting::<i32>::new(6000);
static FAILURE_RATE_WINDOW: GucSetting<i32> = GucSetting::<i32>::new(60);
static ACCEPT_FOREIGN_TOKENS: GucSetting<bool> = GucSetting::<bool>::new(false);
static IDENTITY_CHANGES: GucSetting<bool> = GucSetting::<bool>::new(false);
static NOTIFY: GucSetting<bool> = GucSetting::<bool>::new(true);
static MIN_AUDIT_RETENTION: GucSetting<i32> = GucSetting::<i32>::new(30 * 86_400);
static MIN_RETENTION: GucSetting<i32> = GucSetting::<i32>::new(30 * 86_400);
static MAX_WEBHOOK_BACKLOG: GucSetting<i32> = GucSetting::<i32>::new(100_000);
static MASTER_KEY_FILE: GucSetting<Option<CString>> = GucSetting::<Option<CString>>::new(None);
static MASTER_KEY_COMMAND: GucSetting<Option<CString>> = GucSetting::<Option<CString>>::new(None);
static TOKEN_PREFIX: AtomicPtr<c_char> = AtomicPtr::new(core::ptr::null_mut());
static ISSUER: AtomicPtr<c_char> = AtomicPtr::new(core::ptr::null_mut());
static AUDIENCE: AtomicPtr<c_char> = AtomicPtr::new(core::ptr::null_mut());
static IDENTITY_CLAIMS: AtomicPtr<c_char> = AtomicPtr::new(core::ptr::null_mut());
static ACCESS_TOKEN_LIFETIME: GucSetting<i32> = GucSetting::<i32>::new(600);
static MAX_ACCESS_TOKEN_LIFETIME: GucSetting<i32> = GucSetting::<i32>::new(3600);
static LEEWAY: GucSetting<i32> = GucSetting::<i32>::new(30);
static AUDIT_ISSUE: GucSetting<bool> = GucSetting::<bool>::new(false);
static SIGNATURE_TABLE_SIZE: GucSetting<i32> = GucSetting::<i32>::new(65_536);
static REFRESH_GRACE: GucSetting<i32> = GucSetting::<i32>::new(10);
static REFRESH_GRACE_SAME_ADDRESS: GucSetting<bool> = GucSetting::<bool>::new(false);

/// Longest lifetime of an access token that can be set, in seconds. Denials and revocations of users are kept for twice
/// as long (`purge_denials`).
const LONGEST_ACCESS_TOKEN: i32 = 86_400;
/// Longest issuer, audience or other single identifier, in bytes.
pub(crate) const MAX_IDENTIFIER: usize = 255;

/// Which verification outcomes are logged. The names are the values of the setting.
#[derive(Clone, Copy, PartialEq, Eq, PostgresGucEnum)]
#[allow(non_camel_case_types)]
pub(crate) enum LogVerifications {
    off,
    failures,
    all,
}

pub(crate) fn init() {
    // SAFETY: a plain read of a flag of this process; the strings are static, and the hook meets the contract of its
    // type.
    unsafe {
        // Also defined without preloading, where it has no effect. Otherwise a server that configures it without
        // preloading the library would warn of an unknown setting, which hides the real problem.
        let context = || {
            if pg_sys::process_shared_preload_libraries_in_progress {
                GucContext::Postmaster
            } else {
                GucContext::Sighup
            }
        };
        GucRegistry::define_int_guc(
            c"tollgate.max_tracked_keys",
            c"Number of tokens, users and addresses that are counted or limited at a time.",
            c"Up to 160 bytes of shared memory each. The default takes 18 MB and suits a service of which no more than \
              131072 tokens are in use within a few seconds; tokens that do not fit are still verified, but not counted.",
            &MAX_TRACKED_KEYS,
            1024,
            64 * 1024 * 1024,
            context(),
            GucFlags::default(),
        );
        GucRegistry::define_int_guc(
            c"tollgate.signature_table_size",
            c"Number of signed tokens of which the server remembers that their signature is good.",
            c"16 bytes of shared memory each; 0 remembers none. The default takes 1 MB and suits a service of which no more than \
              65536 signed tokens are in use at a time. The signature of a token that does not fit is checked at each \
              verification, which takes some tens of microseconds longer and changes nothing else.",
            &SIGNATURE_TABLE_SIZE,
            0,
            64 * 1024 * 1024,
            context(),
            GucFlags::default(),
        );
        GucRegistry::define_enum_guc(
            c"tollgate.log_verifications",
            c"Which outcomes of verifications are written to the server's log: off, failures or all.",
            c"The default is off because logging every request takes much space and records who used what when; \
              failures logs refused attempts only. A line contains no token and no part of the statement.",
            &LOG_VERIFICATIONS,
            GucContext::Suset,
            GucFlags::default(),
        );
        GucRegistry::define_int_guc(
            c"tollgate.max_logged_verifications",
            c"Maximum number of verifications that the whole server logs per second.",
            c"Any client that presents tokens can cause failures, and must not fill the disk with them: the default is \
              at most some 2 GB a day. Lines left out are counted, and the next line reports how many.",
            &MAX_LOGGED_VERIFICATIONS,
            1,
            100_000,
            GucContext::Sighup,
            GucFlags::default(),
        );
        pg_sys::DefineCustomStringVariable(
            c"tollgate.token_prefix".as_ptr(),
            c"Prefix of issued tokens.".as_ptr(),
            c"A letter, then up to 15 letters, digits or underscores, all lower-case. The default names the issuer \
              (Tollgate), so that secret scanners can recognise a token; set your product's own."
                .as_ptr(),
            TOKEN_PREFIX.as_ptr(),
            c"tgt".as_ptr(),
            pg_sys::GucContext::PGC_USERSET,
            0,
            Some(check_token_prefix),
            None,
            None,
        );
    }
    // A limit that its subject could raise would be none, so only superusers, and roles that were granted SET, can set
    // these.
    GucRegistry::define_int_guc(
        c"tollgate.max_token_lifetime",
        c"Maximum lifetime of a token, from the moment its expiry is set.",
        c"In seconds; 0 is no limit. With one, tokens without an expiry can be neither issued nor rotated, and are not \
          ended either. The default sets no limit, because how long a token is good for is for the application to \
          say, and tokens of a machine are often meant to last.",
        &MAX_TOKEN_LIFETIME,
        0,
        i32::MAX,
        GucContext::Suset,
        GucFlags::UNIT_S,
    );
    GucRegistry::define_int_guc(
        c"tollgate.max_tokens_per_user",
        c"Maximum number of live tokens per user.",
        c"0 is no limit. Counted are tokens that are neither revoked nor expired, disabled and derived ones too; one \
          that was rotated counts no more. The default sets no limit, because with one those who issue tokens for the \
          same user at the same time have to wait for each other, and each counts those that there are.",
        &MAX_TOKENS_PER_USER,
        0,
        100_000,
        GucContext::Suset,
        GucFlags::default(),
    );
    GucRegistry::define_int_guc(
        c"tollgate.max_metadata_size",
        c"Maximum size of a token's metadata, in bytes.",
        c"As text, as PostgreSQL prints it. The default of 16 kB is far beyond what a plan or a few flags take: metadata is handed \
          out at each verification, and both its old and its new value go to the readers of events when it changes.",
        &MAX_METADATA_SIZE,
        64,
        256 * 1024,
        GucContext::Suset,
        GucFlags::UNIT_BYTE,
    );
    define_rate_limits();
    // Read by the schema's SQL functions.
    GucRegistry::define_int_guc(
        c"tollgate.min_audit_retention",
        c"Minimum time that events stay in the audit log.",
        c"In seconds; purge_audit_log() refuses to remove younger ones. The default is a month, which leaves time to \
          review the log: without a minimum, a role that may purge it, such as the daemon's, could erase its own traces.",
        &MIN_AUDIT_RETENTION,
        0,
        i32::MAX,
        GucContext::Suset,
        GucFlags::UNIT_S,
    );
    GucRegistry::define_int_guc(
        c"tollgate.min_retention",
        c"How long tokens that ended, usage and undeliverable webhook messages are kept at least.",
        c"In seconds; purge_tokens(), purge_usage() and purge_webhook_deliveries() refuse to delete younger ones. The default is \
          a month, for the same reason as that of tollgate.min_audit_retention: what a bill or an inquiry needs must not \
          depend on the daemon's role.",
        &MIN_RETENTION,
        0,
        i32::MAX,
        GucContext::Suset,
        GucFlags::UNIT_S,
    );
    GucRegistry::define_int_guc(
        c"tollgate.max_webhook_backlog",
        c"Maximum number of messages that wait for a webhook.",
        c"At this number, dead messages included, the webhook is disabled and no more events are kept for it. The default is \
          about 50 MB, enough for a receiver that was down for days, and is delivered within minutes.",
        &MAX_WEBHOOK_BACKLOG,
        100,
        10_000_000,
        GucContext::Suset,
        GucFlags::default(),
    );
    GucRegistry::define_bool_guc(
        c"tollgate.notify",
        c"Whether a change that takes access away sends a notification.",
        c"On by default, so that listeners are notified at once. Off for transactions that are to be PREPAREd, which PostgreSQL does \
          not allow after a NOTIFY. Any role may set it, since it protects nothing: the change takes effect in any case, and a reader of the \
          log finds it there within a second.",
        &NOTIFY,
        GucContext::Userset,
        GucFlags::default(),
    );
    GucRegistry::define_bool_guc(
        c"tollgate.accept_foreign_tokens",
        c"Whether tokens in other formats than Tollgate's are accepted.",
        c"For tokens stored by import_api_token(), which keep the format of the system that issued them. Off by \
          default, because Tollgate's own format lets typos and junk be refused without a look-up.",
        &ACCEPT_FOREIGN_TOKENS,
        GucContext::Suset,
        GucFlags::default(),
    );
    define_identity_changes();
    define_access_tokens();
    define_sessions();
    define_master_keys();
}

fn define_master_keys() {
    GucRegistry::define_string_guc(
        c"tollgate.master_key_file",
        c"File with the master keys that private keys are sealed with.",
        c"An absolute path outside of the data directory, so that no backup contains it. One key a line, as `tollgated key init` \
          writes it: the first one seals, all open. As a TLS key, it must not be accessible to others. Empty by default: without a \
          master key nothing is signed, and everything else works.",
        &MASTER_KEY_FILE,
        GucContext::Sighup,
        GucFlags::SUPERUSER_ONLY,
    );
    GucRegistry::define_string_guc(
        c"tollgate.master_key_command",
        c"Shell command that prints the master keys, instead of tollgate.master_key_file.",
        c"For keys that a key management service keeps: run at server start, at a reload and when a key is missing, for at most \
          a minute. It prints what the file would contain, and exits with status 0. Empty by default.",
        &MASTER_KEY_COMMAND,
        GucContext::Sighup,
        GucFlags::SUPERUSER_ONLY,
    );
}

/// `None` if it is empty.
pub(crate) fn master_key_file() -> Option<CString> {
    MASTER_KEY_FILE.get().filter(|path| !path.is_empty())
}

/// `None` if it is empty.
pub(crate) fn master_key_command() -> Option<CString> {
    MASTER_KEY_COMMAND.get().filter(|command| !command.is_empty())
}

fn define_identity_changes() {
    GucRegistry::define_bool_guc(
        c"tollgate.identity_changes",
        c"Whether a transaction may authenticate with different tokens.",
        c"For test suites that run many requests in one transaction and roll it back. Off by default, because cursors and \
          sub-selects that one identity started would continue as another; never enable it where requests are served.",
        &IDENTITY_CHANGES,
        GucContext::Suset,
        GucFlags::default(),
    );
}

fn define_access_tokens() {
    // SAFETY: called once per process, with static strings and hooks that meet the contract of their type.
    unsafe {
        for (name, short, long, value, default, check) in [
            (
                c"tollgate.issuer",
                c"The issuer that signed access tokens name, and that their verification accepts.",
                c"The claim iss: usually the https URL at which clients find your keys. Empty by default, because it must be \
                  yours: without it no access tokens are issued, and all are refused as UNTRUSTED_ISSUER. Give each database \
                  its own.",
                &ISSUER,
                c"",
                check_issuer as Check,
            ),
            (
                c"tollgate.audience",
                c"The audience that signed access tokens must name, unless the caller gives another one.",
                c"One of the values of the claim aud: usually the URL of your API. Also the audience of issued tokens, if none \
                  is given. Empty by default, because a token that was issued for another service must not be accepted \
                  here: without it every signed token is refused as WRONG_AUDIENCE.",
                &AUDIENCE,
                c"",
                check_audience,
            ),
            (
                c"tollgate.identity_claims",
                c"Names of the claims of a signed token that current_claims() returns after authenticate().",
                c"Separated by commas. The default has those that say what the token is; name your own claims that policies \
                  read. Every parallel worker gets them, so a transaction keeps those that are named, up to 4096 bytes.",
                &IDENTITY_CLAIMS,
                c"iss,sub,aud,client_id,jti,iat,exp",
                check_identity_claims,
            ),
        ] {
            pg_sys::DefineCustomStringVariable(
                name.as_ptr(),
                short.as_ptr(),
                long.as_ptr(),
                value.as_ptr(),
                default.as_ptr(),
                pg_sys::GucContext::PGC_SUSET,
                0,
                Some(check),
                None,
                None,
            );
        }
    }
    GucRegistry::define_int_guc(
        c"tollgate.access_token_lifetime",
        c"Lifetime of an access token, unless the caller gives another one.",
        c"In seconds. The default is ten minutes: elsewhere than in this database a token cannot be revoked, and ends with \
          its lifetime.",
        &ACCESS_TOKEN_LIFETIME,
        1,
        LONGEST_ACCESS_TOKEN,
        GucContext::Suset,
        GucFlags::UNIT_S,
    );
    GucRegistry::define_int_guc(
        c"tollgate.max_access_token_lifetime",
        c"Maximum lifetime of an access token.",
        c"In seconds. The default is an hour: a role that may issue must not issue tokens that other services accept for \
          days.",
        &MAX_ACCESS_TOKEN_LIFETIME,
        1,
        LONGEST_ACCESS_TOKEN,
        GucContext::Suset,
        GucFlags::UNIT_S,
    );
    GucRegistry::define_int_guc(
        c"tollgate.leeway",
        c"How far the clock of a trusted issuer may be from ours.",
        c"In seconds. Its tokens are accepted so much before they begin and after they end, and after a revocation those are \
          refused that are not younger by so much. The default allows for clocks that are set by NTP and a slow request. \
          Tokens of our own have none.",
        &LEEWAY,
        0,
        300,
        GucContext::Suset,
        GucFlags::UNIT_S,
    );
    GucRegistry::define_bool_guc(
        c"tollgate.audit_issue",
        c"Whether each issued access token leaves an event in the audit log.",
        c"Off by default, because issuing then writes, and access tokens are issued every few minutes to every client.",
        &AUDIT_ISSUE,
        GucContext::Suset,
        GucFlags::default(),
    );
}

fn define_sessions() {
    GucRegistry::define_int_guc(
        c"tollgate.refresh_grace",
        c"How long a refresh token that was just replaced still gets its successor.",
        c"In seconds, from the refresh on; 0 not at all. The default of 10 is for a client that lost the answer and tries again, \
          and for two windows of one browser at once: both get the same successor. After it, a token that was replaced ends \
          its session, because one of the two who have it has stolen it.",
        &REFRESH_GRACE,
        0,
        60,
        GucContext::Suset,
        GucFlags::UNIT_S,
    );
    GucRegistry::define_bool_guc(
        c"tollgate.refresh_grace_same_address",
        c"Whether the grace of a refresh token is only for the address that replaced it.",
        c"Off by default, because a phone may change its network between two attempts; such a retry is an event then \
          (session.retried_elsewhere). On, it ends the session: a thief who refreshes right behind the owner gets nothing.",
        &REFRESH_GRACE_SAME_ADDRESS,
        GucContext::Suset,
        GucFlags::default(),
    );
}

fn define_rate_limits() {
    const LONGEST_WINDOW: i32 = (tollgate_core::limit::LONGEST_WINDOW / 1_000_000) as i32;
    let limit = |name, short, long, setting| {
        GucRegistry::define_int_guc(
            name,
            short,
            long,
            setting,
            0,
            i32::MAX,
            GucContext::Suset,
            GucFlags::default(),
        );
    };
    let window = |name, short, long, setting| {
        GucRegistry::define_int_guc(
            name,
            short,
            long,
            setting,
            1,
            LONGEST_WINDOW,
            GucContext::Suset,
            GucFlags::UNIT_S,
        );
    };
    limit(
        c"tollgate.user_rate_limit",
        c"Maximum number of verifications per tollgate.user_rate_window for all tokens of a user together.",
        c"0 is no limit. Uses refused by a token's own limit do not count. Each server keeps its own count, in shared \
          memory. The default sets no limit, because the right limit depends on the application.",
        &USER_RATE_LIMIT,
    );
    window(
        c"tollgate.user_rate_window",
        c"Time window of tollgate.user_rate_limit.",
        c"In seconds. The whole limit may be used at once; after that the uses are spread evenly over the window. The default is a minute, as that \
          of a token's limit.",
        &USER_RATE_WINDOW,
    );
    limit(
        c"tollgate.failure_rate_limit",
        c"Maximum number of failed attempts per tollgate.failure_rate_window from one client address.",
        c"0 is no limit. Beyond it everything from the address is refused, valid tokens too, until part of the window has \
          passed. IPv6 addresses are taken by their /64; without client_ip nothing is limited. The default sets no \
          limit, because many people may share an address, and Tollgate's own tokens cannot be guessed: set one where \
          tokens of another system are accepted.",
        &FAILURE_RATE_LIMIT,
    );
    limit(
        c"tollgate.gateway_failure_rate_limit",
        c"Maximum number of failed guesses per tollgate.failure_rate_window through one login that is only a gateway.",
        c"0 is no limit. Such a login asserts the addresses of its clients. Beyond the limit it is refused what is not in \
          Tollgate's own format (tollgate.accept_foreign_tokens), valid or not; Tollgate's own tokens and signed tokens, \
          which cannot be guessed, are verified as before. The default, 100 a second, is more than clients mistype, and \
          too little to guess by.",
        &GATEWAY_FAILURE_RATE_LIMIT,
    );
    window(
        c"tollgate.failure_rate_window",
        c"Time window of tollgate.failure_rate_limit and tollgate.gateway_failure_rate_limit.",
        c"In seconds. The default is a minute, after which a user who mistyped has all attempts again.",
        &FAILURE_RATE_WINDOW,
    );
}

/// Called after the last setting is defined: from then on PostgreSQL rejects unknown settings under our prefix.
pub(crate) fn reserve_prefix() {
    // SAFETY: called once, from _PG_init, with a static string.
    unsafe { pg_sys::MarkGUCPrefixReserved(c"tollgate".as_ptr()) };
}

pub(crate) fn max_tracked_keys() -> usize {
    usize::try_from(MAX_TRACKED_KEYS.get()).unwrap_or(0)
}

#[inline]
pub(crate) fn log_verifications() -> LogVerifications {
    LOG_VERIFICATIONS.get()
}

pub(crate) fn max_logged_verifications() -> u32 {
    u32::try_from(MAX_LOGGED_VERIFICATIONS.get()).unwrap_or(1)
}

/// In seconds; `None` is no limit.
pub(crate) fn max_token_lifetime() -> Option<i32> {
    Some(MAX_TOKEN_LIFETIME.get()).filter(|seconds| *seconds > 0)
}

/// In bytes, as text.
pub(crate) fn max_metadata_size() -> usize {
    usize::try_from(MAX_METADATA_SIZE.get()).unwrap_or_default()
}

/// `None` is no limit.
pub(crate) fn max_tokens_per_user() -> Option<i32> {
    Some(MAX_TOKENS_PER_USER.get()).filter(|tokens| *tokens > 0)
}

/// For all tokens of a user together; `None` is no limit.
#[inline]
pub(crate) fn user_rate_limit() -> Option<Limit> {
    rate_limit(USER_RATE_LIMIT.get(), &USER_RATE_WINDOW)
}

/// For failed attempts from one address; `None` is no limit.
#[inline]
pub(crate) fn failure_rate_limit() -> Option<Limit> {
    rate_limit(FAILURE_RATE_LIMIT.get(), &FAILURE_RATE_WINDOW)
}

/// For failed guesses of one login; `None` is no limit.
pub(crate) fn gateway_failure_rate_limit() -> Option<Limit> {
    rate_limit(GATEWAY_FAILURE_RATE_LIMIT.get(), &FAILURE_RATE_WINDOW)
}

#[inline]
fn rate_limit(limit: i32, window: &GucSetting<i32>) -> Option<Limit> {
    (limit > 0).then(|| Limit::new(limit, i64::from(window.get()) * 1_000_000)).flatten()
}

/// The number of signatures; 0 is no table.
pub(crate) fn signature_table_size() -> usize {
    usize::try_from(SIGNATURE_TABLE_SIZE.get()).unwrap_or(0)
}

/// `None` if it is not set.
pub(crate) fn issuer() -> Option<&'static str> {
    text_of(&ISSUER)
}

/// `None` if it is not set.
pub(crate) fn audience() -> Option<&'static str> {
    text_of(&AUDIENCE)
}

pub(crate) fn identity_claims() -> impl Iterator<Item = &'static str> {
    text_of(&IDENTITY_CLAIMS).unwrap_or_default().split(',').map(str::trim).filter(|name| !name.is_empty())
}

/// In seconds; never more than the maximum.
pub(crate) fn access_token_lifetime() -> i64 {
    max_access_token_lifetime().min(ACCESS_TOKEN_LIFETIME.get().into())
}

/// In seconds.
pub(crate) fn max_access_token_lifetime() -> i64 {
    MAX_ACCESS_TOKEN_LIFETIME.get().into()
}

/// In microseconds.
pub(crate) fn refresh_grace() -> i64 {
    i64::from(REFRESH_GRACE.get()) * 1_000_000
}

pub(crate) fn refresh_grace_same_address() -> bool {
    REFRESH_GRACE_SAME_ADDRESS.get()
}

/// In microseconds.
pub(crate) fn leeway() -> i64 {
    i64::from(LEEWAY.get()) * 1_000_000
}

pub(crate) fn audit_issue() -> bool {
    AUDIT_ISSUE.get()
}

/// The value of a string setting, `None` if it is empty. Use it before anything that may change a setting.
fn text_of(setting: &'static AtomicPtr<c_char>) -> Option<&'static str> {
    let value = setting.load(Ordering::Relaxed);
    if value.is_null() {
        return None;
    }
    // SAFETY: the variable of a string setting holds a C string that lives until the setting changes, which the callers
    // do not cause while they use it.
    unsafe { CStr::from_ptr(value) }.to_str().ok().filter(|text| !text.is_empty())
}

pub(crate) fn accept_foreign_tokens() -> bool {
    ACCEPT_FOREIGN_TOKENS.get()
}

pub(crate) fn identity_changes() -> bool {
    IDENTITY_CHANGES.get()
}

pub(crate) fn token_prefix() -> Prefix {
    let value = TOKEN_PREFIX.load(Ordering::Relaxed);
    let text = if value.is_null() {
        DEFAULT_PREFIX
    } else {
        // SAFETY: the variable of a string setting holds a C string that lives until the setting changes.
        unsafe { CStr::from_ptr(value) }.to_str().unwrap_or(DEFAULT_PREFIX)
    };
    Prefix::parse(text).unwrap_or_else(|error| error!("tollgate.token_prefix: {error}"))
}

unsafe extern "C-unwind" fn check_token_prefix(
    new: *mut *mut c_char,
    _extra: *mut *mut c_void,
    _source: pg_sys::GucSource::Type,
) -> bool {
    // SAFETY: PostgreSQL passes a pointer to a C string, which may be NULL.
    unsafe {
        guard::entry(|| {
            let value = (*new).as_ref().map(|start| CStr::from_ptr(start));
            match value.and_then(|text| text.to_str().ok()).map(Prefix::parse) {
                Some(Ok(_)) => true,
                Some(Err(error)) => {
                    refuse(c"tollgate.token_prefix", &format!("{error}."));
                    false
                }
                None => false,
            }
        })
    }
}

type Check = unsafe extern "C-unwind" fn(*mut *mut c_char, *mut *mut c_void, pg_sys::GucSource::Type) -> bool;

/// An issuer or an audience (StringOrURI, RFC 7519 section 2), short and without anything invisible.
pub(crate) fn is_identifier(text: &str) -> bool {
    (1..=MAX_IDENTIFIER).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_graphic() && b != b'"' && b != b'\\')
        && !token::contains_secret(text)
}

const IDENTIFIER: &str = "It is a URL or another name of 1 to 255 visible ASCII characters, without spaces, quotes and backslashes.";

unsafe extern "C-unwind" fn check_issuer(
    new: *mut *mut c_char,
    _extra: *mut *mut c_void,
    _source: pg_sys::GucSource::Type,
) -> bool {
    // SAFETY: PostgreSQL passes a pointer to a C string, which may be NULL.
    unsafe { guard::entry(|| accepts(c"tollgate.issuer", new, IDENTIFIER, is_identifier)) }
}

unsafe extern "C-unwind" fn check_audience(
    new: *mut *mut c_char,
    _extra: *mut *mut c_void,
    _source: pg_sys::GucSource::Type,
) -> bool {
    // SAFETY: PostgreSQL passes a pointer to a C string, which may be NULL.
    unsafe { guard::entry(|| accepts(c"tollgate.audience", new, IDENTIFIER, is_identifier)) }
}

unsafe extern "C-unwind" fn check_identity_claims(
    new: *mut *mut c_char,
    _extra: *mut *mut c_void,
    _source: pg_sys::GucSource::Type,
) -> bool {
    const LIST: &str =
        "It is a list of at most 64 names of claims, separated by commas, of 2000 characters together.";
    let is_list = |text: &str| {
        text.len() <= 2000
            && text.split(',').count() <= 64
            && !text.contains(char::is_control)
            && !token::contains_secret(text)
    };
    // SAFETY: PostgreSQL passes a pointer to a C string, which may be NULL.
    unsafe { guard::entry(|| accepts(c"tollgate.identity_claims", new, LIST, is_list)) }
}

/// Whether a string setting may have this value, which may be empty.
///
/// # Safety
///
/// What PostgreSQL passes to a check hook.
unsafe fn accepts(
    name: &CStr,
    new: *mut *mut c_char,
    rule: &str,
    is_good: impl FnOnce(&str) -> bool,
) -> bool {
    // SAFETY: as the caller promises.
    let value = unsafe { (*new).as_ref().map(|start| CStr::from_ptr(start)) };
    let is_good = value.is_none_or(|text| text.is_empty() || text.to_str().is_ok_and(is_good));
    if !is_good {
        refuse(name, rule);
    }
    is_good
}

/// Called in a check hook: reports why the value is refused. PostgreSQL's own message would repeat the value, which may
/// be a token.
pub(crate) fn refuse(name: &CStr, detail: &str) {
    let message = format!("invalid value for parameter \"{}\"", name.to_string_lossy());
    // SAFETY: PostgreSQL reads the pointers right after the hook returned.
    unsafe {
        pg_sys::GUC_check_errmsg_string = copied(&message);
        pg_sys::GUC_check_errdetail_string = copied(detail);
    }
}

/// A C string in the memory context of the statement.
fn copied(text: &str) -> *mut c_char {
    // SAFETY: writes what was just allocated.
    unsafe {
        let copy = pg_sys::palloc(text.len() + 1).cast::<u8>();
        core::ptr::copy_nonoverlapping(text.as_ptr(), copy, text.len());
        *copy.add(text.len()) = 0;
        copy.cast()
    }
}

/// Sets a setting until the transaction ends.
pub(crate) fn set_local(name: &CStr, value: &CStr) {
    // SAFETY: both are C strings; PostgreSQL copies the value.
    unsafe {
        let _: c_int = pg_sys::set_config_option(
            name.as_ptr(),
            value.as_ptr(),
            pg_sys::GucContext::PGC_SUSET,
            pg_sys::GucSource::PGC_S_SESSION,
            pg_sys::GucAction::GUC_ACTION_LOCAL,
            true,
            0,
            false,
        );
    }
}
