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
    Create(CreateOptions),
    /// List a user's tokens
    List(ListOptions),
    /// Verify a token read from standard input or a file; it counts as a use. Exit status 0 if it is valid, 1 if not
    Verify(VerifyOptions),
    /// Show all that is known of a token, by its id. Exit status 1 if there is none
    Show(ShowOptions),
    /// Revoke a token, by its id or by itself. Exit status 1 if there was nothing to revoke
    Revoke(RevokeOptions),
    /// Replace a token by a new one, and print that: the only time it is shown
    Rotate(RotateOptions),
    /// Derive a token that may do less from one that is read from standard input or a file, and print it
    Derive(DeriveOptions),
    /// Refuse a token, and those derived from it, until it is enabled again. Exit status 1 if it was disabled already
    Disable(EnabledOptions),
    /// Accept a disabled token again. Exit status 1 if it was not disabled
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

    /// How long it is valid, such as 90days or 12h [default: until it is revoked]
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
    /// Whose tokens
    #[arg(long, value_name = "USER")]
    pub user: String,

    #[command(flatten)]
    pub output: OutputOptions,
}

/// Where a token is read from. Never the command line: every user of the machine can read that.
#[derive(Debug, Args)]
pub struct PresentedToken {
    /// Read the token from this file; - is standard input. There is no way to pass it as an argument, since
    /// arguments are visible to every user of the machine
    #[arg(long, value_name = "PATH", default_value = "-")]
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
#[command(group(clap::ArgGroup::new("which").required(true).args(["id", "presented"])))]
pub struct RevokeOptions {
    /// The token's id, as `token list` shows it
    pub id: Option<Uuid>,

    /// Revoke the token that standard input or --token-file holds: for a token that somebody found
    #[arg(long)]
    pub presented: bool,

    #[command(flatten)]
    pub token: PresentedToken,

    /// Revoke it only if it is this user's
    #[arg(long, value_name = "USER", conflicts_with = "presented")]
    pub user: Option<String>,

    /// Why, for the audit log
    #[arg(long, value_name = "TEXT")]
    pub reason: Option<String>,

    #[command(flatten)]
    pub output: OutputOptions,
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

    /// How long the new one is valid, such as 90days or 12h [default: until the old one would have expired]
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

    /// How long it is valid, such as 90days or 12h; never longer than its parent [default: as long as its parent]
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
Tokens that do not have Tollgate's format are accepted only where tollgate.accept_foreign_tokens is on.";

#[derive(Debug, Args)]
pub struct ImportOptions {
    /// The file; - is standard input
    pub file: PathBuf,

    /// What it is [default: by its name: .csv is CSV, .json, .jsonl and .ndjson are JSON lines]
    #[arg(long, value_enum)]
    pub format: Option<ImportFormat>,

    /// Which digest the file has of each token: sha256 of the whole of it; sha512 of the whole of it; sha512-of-hex, of the
    /// bytes that it spells in hex; sanctum, SHA-256 of what follows the bar in id|secret
    #[arg(long, value_name = "FORMAT", default_value = "sha256", value_parser = token_format)]
    pub token_format: Format,

    /// Have the server check every row, and import none
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
    List(OutputOptions),
    /// Add a scope to the catalogue, or describe it anew
    Define(DefineScopeOptions),
    /// Remove a scope from the catalogue; refused while a live token has it
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
    /// Whose
    pub shell: clap_complete::Shell,
}

fn token_format(text: &str) -> Result<Format, String> {
    Format::parse(text).ok_or_else(|| {
        let known = Format::ALL.map(Format::as_str).join(", ");
        format!(
            "it must be one of {known}; with a salt or a key, as of bcrypt, PBKDF2, argon2, Gitea and GitLab, a token cannot \
             be found by its digest"
        )
    })
}

/// The text itself, since numbers of ours do not hold all that the server's do.
fn parse_object(text: &str) -> Result<String, String> {
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
        assert!(parse(&["token", "verify", "tgt_0123"]).is_err(), "a token is not an argument");
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
    fn a_parent_is_never_an_argument() {
        assert!(parse(&["token", "derive", "--name", "n", "--token-file", "f"]).is_ok());
        assert!(parse(&["token", "derive", "tgt_0123", "--name", "n"]).is_err());
    }
}
