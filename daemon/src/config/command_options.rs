//! The options of the commands that people use by hand: tokens, scopes, completions.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use jiff::Timestamp;
use serde_json::value::RawValue;
use tollgate_core::foreign::Format;
use uuid::Uuid;

use super::common_options::{BatchOptions, OutputOptions};

#[derive(Debug, Subcommand)]
pub enum TokenCommand {
    /// Create a token and print it: the only time it is shown
    #[command(
        after_help = "Example:\n  tollgated token create --user ann --name ci --scope posts:read --expires-in 90d"
    )]
    Create(CreateOptions),
    /// List tokens, the oldest first: of a user, or of all users
    #[command(after_help = "Examples:\n  tollgated token list --user ann\n  \
                            tollgated token list --hint tgt_1a2b\n  \
                            tollgated token list --status expired --limit 100")]
    List(ListOptions),
    /// Verify a token read from a file or standard input; it counts as a use. Exit status 0 if it is valid, 1 if not
    #[command(after_help = "Example:\n  tollgated token verify token.txt --scope posts:read")]
    Verify(VerifyOptions),
    /// Show all that is known of a token, by its id. Exit status 1 if there is none
    #[command(after_help = "Example:\n  tollgated token show 01980f2e-8a6b-7c3d-9e4f-5a6b7c8d9e0f")]
    Show(ShowOptions),
    /// Change a token: what is not named stays as it is. A rotated or revoked token cannot be extended
    #[command(after_help = "Examples:\n  \
                            tollgated token update 01980f2e-8a6b-7c3d-9e4f-5a6b7c8d9e0f --name laptop --expires-in 30d\n  \
                            tollgated token update 01980f2e-8a6b-7c3d-9e4f-5a6b7c8d9e0f --clear rate-limit")]
    Update(UpdateOptions),
    /// Revoke a token by its id or by itself, or all tokens of a user. Exit status 1 if there was nothing to revoke
    #[command(after_help = "Examples:\n  \
                            tollgated token revoke 01980f2e-8a6b-7c3d-9e4f-5a6b7c8d9e0f --reason 'laptop stolen'\n  \
                            tollgated token revoke --presented leaked.txt\n  \
                            tollgated token revoke --user ann --reason 'ann left'")]
    Revoke(RevokeOptions),
    /// Replace a token by a new one, and print that: the only time it is shown
    #[command(
        after_help = "Example:\n  tollgated token rotate 01980f2e-8a6b-7c3d-9e4f-5a6b7c8d9e0f --grace 1d"
    )]
    Rotate(RotateOptions),
    /// Derive a token that may do less from one that is read from a file or standard input, and print it
    #[command(
        after_help = "Example:\n  tollgated token derive parent.txt --name 'nightly job' --scope posts:read --expires-in 1h"
    )]
    Derive(DeriveOptions),
    /// Refuse a token, and those derived from it, until it is enabled again. Exit status 1 if it was disabled already
    #[command(
        after_help = "Example:\n  tollgated token disable 01980f2e-8a6b-7c3d-9e4f-5a6b7c8d9e0f --reason 'under investigation'"
    )]
    Disable(EnabledOptions),
    /// Accept a disabled token again. Exit status 1 if it was not disabled
    #[command(after_help = "Example:\n  tollgated token enable 01980f2e-8a6b-7c3d-9e4f-5a6b7c8d9e0f")]
    Enable(EnabledOptions),
    /// Take over tokens of another system by their digests, from CSV or JSON lines. Exit status 1 if any was refused
    #[command(after_long_help = IMPORT_NOTES)]
    Import(ImportOptions),
}

#[derive(Debug, Args)]
pub struct CreateOptions {
    /// Whose token it is: the application's own key of the user
    #[arg(long, value_name = "USER")]
    pub user: String,

    /// What it is for, so that people recognise it in a list
    #[arg(long)]
    pub name: String,

    /// A scope it grants; repeat it, or separate several by commas
    #[arg(long = "scope", value_name = "SCOPE", value_delimiter = ',')]
    pub scopes: Vec<String>,

    /// How long it is valid, such as 90d or 12h [default: until it is revoked]
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    pub expires_in: Option<Duration>,

    /// Until when it is valid, such as 2030-01-02T03:04:05Z
    #[arg(long, value_name = "MOMENT", conflicts_with = "expires_in")]
    pub expires_at: Option<Timestamp>,

    /// A JSON object that verification returns with the token
    #[arg(long, value_name = "JSON", value_parser = parse_object)]
    pub metadata: Option<String>,

    /// A network it may be used from, such as 10.0.0.0/8; repeat it, or separate several by commas
    #[arg(long = "allowed-ip", value_name = "CIDR", value_delimiter = ',')]
    pub allowed_ips: Vec<String>,

    /// What it begins with, in place of the server's tollgate.token_prefix
    #[arg(long)]
    pub prefix: Option<String>,

    /// How many verifications --rate-window allows [default: any number]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(1..))]
    pub rate_limit: Option<i32>,

    /// What --rate-limit is counted over
    #[arg(long, value_name = "TIME", default_value = "1min", value_parser = humantime::parse_duration)]
    pub rate_window: Duration,

    #[command(flatten)]
    pub output: OutputOptions,
}

#[derive(Debug, Args)]
pub struct ListOptions {
    /// The tokens of this user [default: of all users]
    #[arg(long, value_name = "USER")]
    pub user: Option<String>,

    /// Tokens that begin with this, as lists and logs show it, such as tgt_1a2b: prefix and first four characters
    #[arg(long)]
    pub hint: Option<String>,

    /// Tokens of this name
    #[arg(long)]
    pub name: Option<String>,

    /// Tokens in this state
    #[arg(long, value_enum)]
    pub status: Option<TokenStatus>,

    /// At most so many [default: all]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub limit: Option<u64>,

    /// Those after the token with this id: the last one of the page before
    #[arg(long, value_name = "ID")]
    pub after: Option<Uuid>,

    #[command(flatten)]
    pub output: OutputOptions,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TokenStatus {
    Active,
    Disabled,
    Expired,
    Revoked,
}

impl TokenStatus {
    pub fn as_str(self) -> &'static str {
        match self {
            TokenStatus::Active => "active",
            TokenStatus::Disabled => "disabled",
            TokenStatus::Expired => "expired",
            TokenStatus::Revoked => "revoked",
        }
    }
}

/// Where a token is read from. Never the command line: every user of the machine can read that.
#[derive(Debug, Args)]
pub struct PresentedToken {
    /// The file that holds the token; - is standard input. The token itself cannot be given here, since arguments are
    /// visible to every user of the machine
    #[arg(value_name = "FILE", default_value = "-")]
    pub token_file: PathBuf,
}

#[derive(Debug, Args)]
pub struct VerifyOptions {
    #[command(flatten)]
    pub token: PresentedToken,

    /// A scope that it must grant; repeat it, or separate several by commas
    #[arg(long = "scope", value_name = "SCOPE", value_delimiter = ',')]
    pub scopes: Vec<String>,

    /// The address of the client that presented it
    #[arg(long, value_name = "IP")]
    pub client_ip: Option<std::net::IpAddr>,

    /// It is of another system, and stored in the form that was given at its import: the token itself goes to the server, and
    /// not only its SHA-256
    #[arg(long)]
    pub foreign: bool,

    #[command(flatten)]
    pub output: OutputOptions,
}

#[derive(Debug, Args)]
#[command(group(clap::ArgGroup::new("which").required(true).multiple(true).args(["id", "presented", "user"])))]
pub struct RevokeOptions {
    /// The token's id, as `token list` shows it
    pub id: Option<Uuid>,

    /// Revoke the token that this file, or standard input, holds: for a token that was found somewhere
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = "-", conflicts_with_all = ["id", "user"])]
    pub presented: Option<PathBuf>,

    /// With an ID: revoke it only if it is this user's. Alone: revoke all tokens of this user
    #[arg(long, value_name = "USER")]
    pub user: Option<String>,

    /// Why, for the audit log
    #[arg(long, value_name = "TEXT")]
    pub reason: Option<String>,

    #[command(flatten)]
    pub output: OutputOptions,
}

#[derive(Debug, Args)]
#[command(group(clap::ArgGroup::new("changes").required(true).multiple(true).args(
    ["name", "scopes", "expires_in", "expires_at", "metadata", "allowed_ips", "rate_limit", "rate_window", "clear"])))]
pub struct UpdateOptions {
    /// The token's id, as `token list` shows it
    pub id: Uuid,

    /// What it is for, so that people recognise it in a list
    #[arg(long)]
    pub name: Option<String>,

    /// A scope it grants from now on, in place of those that it grants; repeat it, or separate several by commas
    #[arg(long = "scope", value_name = "SCOPE", value_delimiter = ',')]
    pub scopes: Vec<String>,

    /// How long it is valid from now on, such as 90d or 12h
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    pub expires_in: Option<Duration>,

    /// Until when it is valid, such as 2030-01-02T03:04:05Z
    #[arg(long, value_name = "MOMENT", conflicts_with = "expires_in")]
    pub expires_at: Option<Timestamp>,

    /// A JSON object that verification returns with the token, in place of the one that it has
    #[arg(long, value_name = "JSON", value_parser = parse_object)]
    pub metadata: Option<String>,

    /// A network it may be used from, in place of those that it has; repeat it, or separate several by commas
    #[arg(long = "allowed-ip", value_name = "CIDR", value_delimiter = ',')]
    pub allowed_ips: Vec<String>,

    /// How many verifications the rate window allows
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(1..))]
    pub rate_limit: Option<i32>,

    /// What the rate limit is counted over
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    pub rate_window: Option<Duration>,

    /// Take away what it has: its scopes, its expiry, ...; repeat it, or separate several by commas
    #[arg(long, value_enum, value_name = "WHAT", value_delimiter = ',')]
    pub clear: Vec<Clearable>,

    #[command(flatten)]
    pub output: OutputOptions,
}

/// What a token can be without.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Clearable {
    Scopes,
    Expiry,
    Metadata,
    AllowedIps,
    RateLimit,
}

#[derive(Debug, Args)]
pub struct ShowOptions {
    /// The token's id, as `token list` shows it
    pub id: Uuid,

    #[command(flatten)]
    pub output: OutputOptions,
}

#[derive(Debug, Args)]
pub struct RotateOptions {
    /// The token's id, as `token list` shows it
    pub id: Uuid,

    /// How long the old one is still accepted, but never beyond its expiry
    #[arg(long, value_name = "TIME", default_value = "0s", value_parser = humantime::parse_duration)]
    pub grace: Duration,

    /// How long the new one is valid, such as 90d or 12h [default: until the old one would have expired]
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    pub expires_in: Option<Duration>,

    /// Until when the new one is valid, such as 2030-01-02T03:04:05Z
    #[arg(long, value_name = "MOMENT", conflicts_with = "expires_in")]
    pub expires_at: Option<Timestamp>,

    /// Revoke the new one, and those that replace it, if the old one is presented after the grace
    #[arg(long)]
    pub revoke_on_reuse: bool,

    #[command(flatten)]
    pub output: OutputOptions,
}

#[derive(Debug, Args)]
pub struct DeriveOptions {
    #[command(flatten)]
    pub parent: PresentedToken,

    /// What it is for, so that people recognise it in a list
    #[arg(long)]
    pub name: String,

    /// A scope it grants, of those of its parent; repeat it, or separate several by commas
    #[arg(long = "scope", value_name = "SCOPE", value_delimiter = ',')]
    pub scopes: Vec<String>,

    /// How long it is valid, such as 90d or 12h; never longer than its parent [default: as long as its parent]
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    pub expires_in: Option<Duration>,

    /// Until when it is valid, such as 2030-01-02T03:04:05Z
    #[arg(long, value_name = "MOMENT", conflicts_with = "expires_in")]
    pub expires_at: Option<Timestamp>,

    /// A network it may be used from, of those of its parent; repeat it, or separate several by commas
    #[arg(long = "allowed-ip", value_name = "CIDR", value_delimiter = ',')]
    pub allowed_ips: Vec<String>,

    #[command(flatten)]
    pub output: OutputOptions,
}

#[derive(Debug, Args)]
pub struct EnabledOptions {
    /// The token's id, as `token list` shows it
    pub id: Uuid,

    /// Why, for the audit log
    #[arg(long, value_name = "TEXT")]
    pub reason: Option<String>,

    #[command(flatten)]
    pub output: OutputOptions,
}

const IMPORT_NOTES: &str = "\
Columns of the CSV's heading, or keys of each JSON object:
  user_id      whose token it is (required)
  name         what it is for (required)
  token_hash   the digest that --token-format names, in hex (with or without \\x) or in base64 (required)
  scopes       JSON: an array; CSV: separated by spaces
  expires_at   a time such as 2030-01-02T03:04:05Z, also a past one; nothing for a token that does not expire
  created_at, last_used_at, disabled_at, revoked_at
               times, as the other system has them; nothing where there was none
  metadata     a JSON object
  allowed_ips  networks such as 10.0.0.0/8; JSON: an array; CSV: separated by spaces
  rate_limit   how many verifications rate_window allows
  rate_window  such as 1min

A row whose digest is there already is left as it is, so an import that was interrupted is begun again with the same
file. Rows that are refused are listed with their line and the reason; the others are imported all the same.
Tokens that do not have Tollgate's format are accepted only where tollgate.accept_foreign_tokens is on.

Example:
  tollgated token import tokens.csv --dry-run";

#[derive(Debug, Args)]
pub struct ImportOptions {
    /// The file; - is standard input
    pub file: PathBuf,

    /// What it is [default: by its name: .csv is CSV, .json, .jsonl and .ndjson are JSON lines]
    #[arg(long, value_enum)]
    pub format: Option<ImportFormat>,

    /// Which digest the file has of each token: sha256 of the whole of it; sha512 of the whole of it; sha512-of-hex, of the
    /// bytes that it spells in hex; sanctum, SHA-256 of what follows the bar in id|secret;
    /// hmac-sha256:NAME, HMAC of the whole of it with the import key of that name
    #[arg(long, value_name = "FORMAT", default_value = "sha256", value_parser = token_format)]
    pub token_format: Format,

    /// Have the server check every row, and import none; of the file's own rows, only those that repeat one of the first million
    /// count as there already
    #[arg(long)]
    pub dry_run: bool,

    #[command(flatten)]
    pub batch: BatchOptions,

    #[command(flatten)]
    pub output: OutputOptions,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ImportFormat {
    Csv,
    /// One JSON object a line
    Jsonl,
}

#[derive(Debug, Subcommand)]
pub enum ScopeCommand {
    /// List the catalogue of scopes
    #[command(after_help = "Example:\n  tollgated scope list --json")]
    List(OutputOptions),
    /// Add a scope to the catalogue, or change its description
    #[command(after_help = "Example:\n  tollgated scope define posts:read 'Read posts and their comments'")]
    Define(DefineScopeOptions),
    /// Remove a scope from the catalogue; refused while a live token has it
    #[command(after_help = "Example:\n  tollgated scope drop posts:read")]
    Drop(DropScopeOptions),
}

#[derive(Debug, Args)]
pub struct DefineScopeOptions {
    /// Such as posts:read
    pub name: String,

    /// What a token with it may do, in a sentence
    pub description: String,

    #[command(flatten)]
    pub output: OutputOptions,
}

#[derive(Debug, Args)]
pub struct DropScopeOptions {
    /// Such as posts:read
    pub name: String,

    #[command(flatten)]
    pub output: OutputOptions,
}

#[derive(Debug, Args)]
pub struct CompletionsOptions {
    /// The shell to write it for
    pub shell: clap_complete::Shell,
}

fn token_format(text: &str) -> Result<Format, String> {
    Format::parse(text).ok_or_else(|| {
        let known = Format::UNKEYED.map(|format| format.to_string()).join(", ");
        format!(
            "it must be one of {known}, or hmac-sha256: and the name of an import key; with a salt, as of bcrypt, PBKDF2, argon2, Gitea and GitLab, a token cannot \
             be found by its digest"
        )
    })
}

/// The text itself, since numbers of ours do not hold all that the server's do.
pub(super) fn parse_object(text: &str) -> Result<String, String> {
    match serde_json::from_str::<&RawValue>(text) {
        Ok(value) if value.get().starts_with('{') => Ok(text.to_owned()),
        Ok(_) => Err("it must be a JSON object, such as {\"team\": \"billing\"}".to_owned()),
        Err(error) => Err(format!("it is not JSON: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::config::{Cli, Command};

    fn parse(arguments: &[&str]) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(std::iter::once(&"tollgated").chain(arguments))
    }

    #[test]
    fn a_token_is_revoked_by_its_id_or_by_itself_and_not_by_both() {
        let id = "018f4a6e-0000-7000-8000-000000000000";
        assert!(parse(&["token", "revoke", id, "--user", "ann"]).is_ok());
        assert!(parse(&["token", "revoke", "--presented", "--reason", "found it"]).is_ok());
        assert!(parse(&["token", "revoke"]).is_err());
        assert!(parse(&["token", "revoke", id, "--presented"]).is_err());
        assert!(parse(&["token", "revoke", "--presented", "--user", "ann"]).is_err());
        assert!(parse(&["token", "revoke", "--user", "ann"]).is_ok());
    }

    #[test]
    fn scopes_may_be_repeated_or_separated_by_commas() {
        let cli =
            parse(&["token", "create", "--user", "a", "--name", "n", "--scope", "x:y,z", "--scope", "w"]);
        match cli.unwrap().command {
            Command::Token(TokenCommand::Create(options)) => assert_eq!(options.scopes, ["x:y", "z", "w"]),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn metadata_must_be_an_object() {
        assert!(parse_object("{\"a\": 1}").is_ok());
        assert!(parse_object("[1]").is_err_and(|error| error.contains("object")));
        assert!(parse_object("{").is_err_and(|error| error.contains("not JSON")));
    }

    #[test]
    fn a_token_is_read_from_a_file_or_standard_input() {
        let file = |arguments: &[&str]| match parse(arguments).unwrap().command {
            Command::Token(TokenCommand::Verify(options)) => Some(options.token.token_file),
            Command::Token(TokenCommand::Derive(options)) => Some(options.parent.token_file),
            Command::Token(TokenCommand::Revoke(options)) => options.presented,
            other => panic!("{other:?}"),
        };
        assert_eq!(file(&["token", "verify"]), Some("-".into()));
        assert_eq!(file(&["token", "verify", "f"]), Some("f".into()));
        assert_eq!(file(&["token", "derive", "f", "--name", "n"]), Some("f".into()));
        assert_eq!(file(&["token", "revoke", "--presented"]), Some("-".into()));
        assert_eq!(file(&["token", "revoke", "--presented", "f"]), Some("f".into()));
    }

    #[test]
    fn a_change_names_at_least_one_thing() {
        let id = "018f4a6e-0000-7000-8000-000000000000";
        assert!(parse(&["token", "update", id]).is_err());
        assert!(parse(&["token", "update", id, "--name", "n"]).is_ok());
        assert!(parse(&["token", "update", id, "--clear", "expiry,scopes"]).is_ok());
        assert!(parse(&["token", "update", id, "--clear", "name"]).is_err());
    }
}
