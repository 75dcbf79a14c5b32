//! The options of the commands that manage what surrounds tokens: users, webhooks, the audit log, capabilities.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};

use super::common_options::OutputOptions;

#[derive(Debug, Subcommand)]
pub enum UserCommand {
    /// End all access that a user has now: API tokens, sessions and access tokens. The user may log in again at once
    #[command(after_help = "Example:\n  tollgated user revoke ann --reason 'ann left'")]
    Revoke(RevokeUserOptions),
}

#[derive(Debug, Args)]
pub struct RevokeUserOptions {
    /// The application's own key of the user
    pub user: String,

    /// Why, for the audit log
    #[arg(long, value_name = "TEXT")]
    pub reason: Option<String>,

    #[command(flatten)]
    pub output: OutputOptions,
}

#[derive(Debug, Subcommand)]
pub enum WebhookCommand {
    /// Have events sent to an address, and print the secret that signs them: the only time it is shown
    #[command(
        after_help = "Examples:\n  tollgated webhook create audit https://audit.example.com/tollgate\n  \
                            tollgated webhook create chat --url-file url.txt --event 'token.*'"
    )]
    Create(CreateWebhookOptions),
    /// List the webhooks, and what is to be delivered to them
    #[command(after_help = "Example:\n  tollgated webhook list --json")]
    List(OutputOptions),
    /// Show all that is known of a webhook. Exit status 1 if there is none
    #[command(after_help = "Example:\n  tollgated webhook show audit")]
    Show(WebhookOptions),
    /// List the messages of a webhook that are not delivered, the oldest first
    #[command(after_help = "Example:\n  tollgated webhook messages audit --limit 20")]
    Messages(WebhookMessagesOptions),
    /// Send to another address from now on, with the same secret. Exit status 1 if that was its address already
    #[command(after_help = "Example:\n  tollgated webhook set-url audit https://audit.example.com/v2")]
    SetUrl(WebhookUrlOptions),
    /// Replace the secret, and print the new one: the only time it is shown
    #[command(after_help = "Example:\n  tollgated webhook rotate-secret audit --grace 1d")]
    RotateSecret(RotateSecretOptions),
    /// Keep what is to be delivered, and send nothing until it is resumed. Exit status 1 if it was paused already
    #[command(after_help = "Example:\n  tollgated webhook pause audit")]
    Pause(WebhookOptions),
    /// Send again, also what was kept meanwhile. Exit status 1 if it was not paused
    #[command(after_help = "Example:\n  tollgated webhook resume audit")]
    Resume(WebhookOptions),
    /// Keep no events for it from now on, and send nothing. Exit status 1 if it was disabled already
    #[command(after_help = "Example:\n  tollgated webhook disable audit")]
    Disable(WebhookOptions),
    /// Keep and send events again. Exit status 1 if it was not disabled
    #[command(after_help = "Example:\n  tollgated webhook enable audit")]
    Enable(WebhookOptions),
    /// Send messages that were given up, or that wait for another attempt, now. Exit status 1 if there are none
    #[command(
        after_help = "Examples:\n  tollgated webhook replay audit\n  tollgated webhook replay audit --message 1234"
    )]
    Replay(ReplayOptions),
    /// Delete a webhook, its secret, and what was to be delivered. Exit status 1 if there is none
    #[command(after_help = "Example:\n  tollgated webhook delete audit")]
    Delete(WebhookOptions),
}

/// Where events are sent to. The path of an address is often a secret, so it can be read from a file.
#[derive(Debug, Args)]
#[command(group(clap::ArgGroup::new("address").required(true).args(["url", "url_file"])))]
pub struct WebhookAddress {
    /// Where to, such as https://example.com/events. Arguments are visible to every user of the machine: if the address
    /// is a secret, give --url-file
    pub url: Option<String>,

    /// Read the address from this file; - is standard input
    #[arg(long, value_name = "FILE")]
    pub url_file: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct CreateWebhookOptions {
    /// What it is called: 1 to 63 of a-z, 0-9, "_", "." and "-"
    pub name: String,

    #[command(flatten)]
    pub address: WebhookAddress,

    /// An event to send, such as token.revoked, or token.* for all that begin so; repeat it, or separate several by
    /// commas [default: all events]
    #[arg(long = "event", value_name = "EVENT", value_delimiter = ',')]
    pub events: Vec<String>,

    #[command(flatten)]
    pub output: OutputOptions,
}

#[derive(Debug, Args)]
pub struct WebhookOptions {
    /// The webhook, as `webhook list` shows it
    pub name: String,

    #[command(flatten)]
    pub output: OutputOptions,
}

#[derive(Debug, Args)]
pub struct WebhookMessagesOptions {
    /// The webhook, as `webhook list` shows it
    pub name: String,

    /// At most so many
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(i64).range(1..=100_000))]
    pub limit: i64,

    #[command(flatten)]
    pub output: OutputOptions,
}

#[derive(Debug, Args)]
pub struct WebhookUrlOptions {
    /// The webhook, as `webhook list` shows it
    pub name: String,

    #[command(flatten)]
    pub address: WebhookAddress,

    #[command(flatten)]
    pub output: OutputOptions,
}

#[derive(Debug, Args)]
pub struct RotateSecretOptions {
    /// The webhook, as `webhook list` shows it
    pub name: String,

    /// How long messages are signed with the old secret as well
    #[arg(long, value_name = "TIME", default_value = "1d", value_parser = humantime::parse_duration)]
    pub grace: Duration,

    #[command(flatten)]
    pub output: OutputOptions,
}

#[derive(Debug, Args)]
pub struct ReplayOptions {
    /// The webhook, as `webhook list` shows it
    pub name: String,

    /// Only the message with this id, as `webhook messages` shows it
    #[arg(long, value_name = "ID")]
    pub message: Option<i64>,

    #[command(flatten)]
    pub output: OutputOptions,
}

#[derive(Debug, Subcommand)]
pub enum AuditCommand {
    /// Check the audit log against its seals. Exit status 1 if something was changed
    #[command(after_help = "Examples:\n  tollgated audit verify --statement-timeout 1h\n  \
                            tollgated audit verify --known-seal 42 --known-hash 3b1f… (64 digits, as an earlier run printed them)")]
    Verify(VerifyAuditOptions),
}

#[derive(Debug, Args)]
pub struct VerifyAuditOptions {
    /// The number of a seal that was kept elsewhere: it shows whether the log was sealed anew since then
    #[arg(long, value_name = "N", requires = "known_hash", value_parser = clap::value_parser!(i64).range(1..))]
    pub known_seal: Option<i64>,

    /// The hash of that seal, 64 hexadecimal digits
    #[arg(long, value_name = "HEX", requires = "known_seal", value_parser = hash)]
    pub known_hash: Option<Hash>,

    #[command(flatten)]
    pub output: OutputOptions,
}

/// A SHA-256 hash.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hash(pub Vec<u8>);

fn hash(text: &str) -> Result<Hash, String> {
    let digits = text.as_bytes();
    let hash: Option<Vec<u8>> =
        digits.chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()).collect();
    match hash {
        Some(hash) if digits.len() == 64 && digits.iter().all(u8::is_ascii_hexdigit) => Ok(Hash(hash)),
        _ => Err("it must be 64 hexadecimal digits".to_owned()),
    }
}

#[derive(Debug, Subcommand)]
pub enum CapabilityCommand {
    /// List which database role may do what
    #[command(after_help = "Example:\n  tollgated capability list")]
    List(OutputOptions),
    /// Let a database role do what belongs to a capability
    #[command(after_help = "Example:\n  tollgated capability grant web verifier")]
    Grant(CapabilityOptions),
    /// Take from a database role what belongs to a capability
    #[command(after_help = "Example:\n  tollgated capability revoke web verifier")]
    Revoke(CapabilityOptions),
}

#[derive(Debug, Args)]
pub struct CapabilityOptions {
    /// The database role, such as the one that your application logs in as
    pub role: String,

    /// What it may do
    #[arg(value_enum)]
    pub capability: Capability,

    #[command(flatten)]
    pub output: OutputOptions,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Capability {
    /// Verify tokens, act for them, and end those that are presented
    Verifier,
    /// Also create, list, rotate and revoke tokens of every user
    Issuer,
    /// Also manage scopes, webhooks and capabilities
    Admin,
    /// What this daemon needs
    Operator,
    /// What it needs beside that to fetch the keys of trusted issuers
    #[value(name = "key_fetcher")]
    KeyFetcher,
    /// What the HTTP API's login needs, and nothing else
    Gateway,
}

impl Capability {
    pub fn as_str(self) -> &'static str {
        match self {
            Capability::Verifier => "verifier",
            Capability::Issuer => "issuer",
            Capability::Admin => "admin",
            Capability::Operator => "operator",
            Capability::KeyFetcher => "key_fetcher",
            Capability::Gateway => "gateway",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hash_is_64_hexadecimal_digits() {
        assert_eq!(hash(&"0a".repeat(32)), Ok(Hash(vec![10; 32])));
        for wrong in ["", "0a", &"0a".repeat(33), &"+a".repeat(32), &"ä".repeat(32)] {
            assert!(hash(wrong).is_err(), "{wrong}");
        }
    }
}
