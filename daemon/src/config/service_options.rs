//! Options of the commands for service accounts.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};
use jiff::Timestamp;
use uuid::Uuid;

use super::command_options::parse_object;
use super::common_options::OutputOptions;

#[derive(Debug, Subcommand)]
pub enum ServiceCommand {
    /// Create a service account, for a program that acts for itself
    #[command(
        after_help = "Example:\n  tollgated service create ci --name 'Nightly build' --scope posts:read --owner 'team build'"
    )]
    Create(CreateServiceOptions),
    /// List the service accounts, and when each was last used
    #[command(after_help = "Example:\n  tollgated service list")]
    List(OutputOptions),
    /// Show all that is known of a service account. Exit status 1 if there is none
    #[command(after_help = "Example:\n  tollgated service show ci")]
    Show(ServiceOptions),
    /// Change a service account: what is not named stays. With fewer scopes or audiences the access tokens that it has end
    #[command(after_help = "Example:\n  tollgated service update ci --scope posts:read")]
    Update(UpdateServiceOptions),
    /// Refuse a service account and all that it has until it is enabled again. Exit status 1 if there is none that is enabled
    #[command(after_help = "Example:\n  tollgated service disable ci --reason 'under investigation'")]
    Disable(EndServiceOptions),
    /// Accept a service account and its secrets again. Exit status 1 if there is none that is disabled
    #[command(after_help = "Example:\n  tollgated service enable ci")]
    Enable(EndServiceOptions),
    /// Delete a service account, and end all that it has. Exit status 1 if there is none
    #[command(after_help = "Example:\n  tollgated service delete ci --reason 'the build moved'")]
    Delete(EndServiceOptions),
    /// Create a secret of a service account and print it: the only time it is shown. `token list --user service:ID` lists
    /// them, `token rotate` and `token revoke` replace and end one
    #[command(after_help = "Example:\n  tollgated service secret ci --expires-in 90d")]
    Secret(SecretOptions),
    /// Replace the keys with which a service account signs assertions
    #[command(after_help = "Examples:\n  tollgated service keys ci --jwks keys.json\n  \
                      tollgated service keys ci --jwks-url https://ci.example.com/jwks.json")]
    Keys(ServiceKeysOptions),
    /// Let tokens of a trusted issuer prove a service account, if their claims have these values, and print the id of this trust
    #[command(
        after_help = "Example:\n  tollgated service trust-workload ci https://token.actions.githubusercontent.com \
                      --conditions '{\"repository_id\": \"1296269\", \"ref\": \"refs/heads/main\"}'"
    )]
    TrustWorkload(TrustWorkloadOptions),
    /// Trust a workload no more, and end the access tokens of its account. Exit status 1 if there is none
    #[command(
        after_help = "Example:\n  tollgated service distrust-workload 0197f2e4-8a6b-4c3d-9e4f-5a6b7c8d9e0f"
    )]
    DistrustWorkload(DistrustWorkloadOptions),
}

#[derive(Debug, Args)]
pub struct CreateServiceOptions {
    /// Its id: 1 to 63 of a-z, 0-9, "_", "." and "-". It is the client_id, and the user service:ID
    pub id: String,

    /// What it is for, so that people recognise it in a list
    #[arg(long)]
    pub name: String,

    #[command(flatten)]
    pub fields: ServiceFields,

    #[command(flatten)]
    pub output: OutputOptions,
}

#[derive(Debug, Args)]
#[command(group(clap::ArgGroup::new("changes").required(true).multiple(true).args(
    ["name", "scopes", "audience", "lifetime", "description", "owner"])))]
pub struct UpdateServiceOptions {
    /// The service account, as `service list` shows it
    pub id: String,

    /// What it is for, so that people recognise it in a list
    #[arg(long)]
    pub name: Option<String>,

    #[command(flatten)]
    pub fields: ServiceFields,

    #[command(flatten)]
    pub output: OutputOptions,
}

/// What a service account may have, and what is known of it.
#[derive(Debug, Args)]
pub struct ServiceFields {
    /// A scope that its access tokens may have, and no other; repeat it, or separate several by commas
    #[arg(long = "scope", value_name = "SCOPE", value_delimiter = ',')]
    pub scopes: Vec<String>,

    /// An audience that its access tokens may be for; repeat it for several [default: the server's tollgate.audience]
    #[arg(long, value_name = "AUDIENCE")]
    pub audience: Vec<String>,

    /// How long its access tokens live, such as 5m [default: the server's tollgate.access_token_lifetime]
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    pub lifetime: Option<Duration>,

    /// What people should know of it
    #[arg(long, value_name = "TEXT")]
    pub description: Option<String>,

    /// The team or the person who is asked about it
    #[arg(long, value_name = "TEXT")]
    pub owner: Option<String>,
}

#[derive(Debug, Args)]
pub struct ServiceOptions {
    /// The service account, as `service list` shows it
    pub id: String,

    #[command(flatten)]
    pub output: OutputOptions,
}

#[derive(Debug, Args)]
pub struct EndServiceOptions {
    /// The service account, as `service list` shows it
    pub id: String,

    /// Why, for the audit log
    #[arg(long, value_name = "TEXT")]
    pub reason: Option<String>,

    #[command(flatten)]
    pub output: OutputOptions,
}

#[derive(Debug, Args)]
pub struct SecretOptions {
    /// The service account, as `service list` shows it
    pub id: String,

    /// What it is called, so that people recognise it in a list [default: secret]
    #[arg(long)]
    pub name: Option<String>,

    /// How long it is valid, such as 90d or 12h [default: until it is revoked]
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    pub expires_in: Option<Duration>,

    /// Until when it is valid, such as 2030-01-02T03:04:05Z
    #[arg(long, value_name = "MOMENT", conflicts_with = "expires_in")]
    pub expires_at: Option<Timestamp>,

    /// A network it may be used from, such as 10.0.0.0/8; repeat it, or separate several by commas
    #[arg(long = "allowed-ip", value_name = "CIDR", value_delimiter = ',')]
    pub allowed_ips: Vec<String>,

    #[command(flatten)]
    pub output: OutputOptions,
}

#[derive(Debug, Args)]
#[command(group(clap::ArgGroup::new("source").required(true).args(["jwks", "jwks_url", "none"])))]
pub struct ServiceKeysOptions {
    /// The service account, as `service list` shows it
    pub id: String,

    /// Its public key set (JWKS), in a file; - is standard input
    #[arg(long, value_name = "FILE")]
    pub jwks: Option<PathBuf>,

    /// Where the daemon fetches its key set from
    #[arg(long, value_name = "URL")]
    pub jwks_url: Option<String>,

    /// Take its keys away
    #[arg(long)]
    pub none: bool,

    #[command(flatten)]
    pub output: OutputOptions,
}

#[derive(Debug, Args)]
pub struct TrustWorkloadOptions {
    /// The service account, as `service list` shows it
    pub id: String,

    /// The issuer of its tokens, as `issuer list` shows it
    pub issuer: String,

    /// Claims that its tokens must have, with exactly these values, as a JSON object; one of them on an id that is never given
    /// to another
    #[arg(long, value_name = "JSON", value_parser = parse_object)]
    pub conditions: String,

    /// An audience that its tokens must be for [default: one of those of the issuer]
    #[arg(long, value_name = "AUDIENCE")]
    pub audience: Option<String>,

    #[command(flatten)]
    pub output: OutputOptions,
}

#[derive(Debug, Args)]
pub struct DistrustWorkloadOptions {
    /// The id of the trust, as `service show` has it
    pub workload_id: Uuid,

    /// Why, for the audit log
    #[arg(long, value_name = "TEXT")]
    pub reason: Option<String>,

    #[command(flatten)]
    pub output: OutputOptions,
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use crate::config::Cli;

    fn parses(arguments: &[&str]) -> bool {
        Cli::try_parse_from([&["tollgated", "service"], arguments].concat()).is_ok()
    }

    #[test]
    fn an_update_changes_something_and_keys_have_one_source() {
        assert!(parses(&["update", "ci", "--owner", "a"]) && parses(&["update", "ci", "--scope", "a,b"]));
        assert!(!parses(&["update", "ci"]));
        for source in [&["--jwks", "-"][..], &["--jwks-url", "https://a.example"], &["--none"]] {
            assert!(parses(&[&["keys", "ci"], source].concat()), "{source:?}");
        }
        assert!(!parses(&["keys", "ci"]) && !parses(&["keys", "ci", "--none", "--jwks", "-"]));
    }

    #[test]
    fn conditions_are_an_object() {
        assert!(parses(&["trust-workload", "ci", "https://a.example", "--conditions", "{\"sub\": \"a\"}"]));
        assert!(!parses(&["trust-workload", "ci", "https://a.example", "--conditions", "sub"]));
        assert!(!parses(&["trust-workload", "ci", "https://a.example"]));
    }
}
