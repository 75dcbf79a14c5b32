//! Options of the commands for trusted issuers.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};
use ipnet::IpNet;

use super::command_options::parse_object;
use super::common_options::OutputOptions;

#[derive(Debug, Subcommand)]
pub enum IssuerCommand {
    /// Accept access tokens of another issuer, or replace the configuration of one that is trusted already
    #[command(
        after_help = "Examples:\n  tollgated issuer trust https://example.eu.auth0.com/ --user-prefix auth0: \
                      --audience https://api.example.com --scope posts:read,posts:write\n  \
                      tollgated issuer trust https://token.actions.githubusercontent.com --user-prefix github: \
                      --audience https://api.example.com --scope deploy \
                      --required-claims '{\"repository_id\": \"1296269\"}'"
    )]
    Trust(Box<TrustOptions>),
    /// List the trusted issuers, and how fetching their keys goes
    #[command(after_help = "Example:\n  tollgated issuer list")]
    List(OutputOptions),
    /// Trust an issuer no more: its tokens are refused from now on. Exit status 1 if it is not trusted
    #[command(
        after_help = "Example:\n  tollgated issuer distrust https://example.eu.auth0.com/ --reason 'moved to Keycloak'"
    )]
    Distrust(DistrustOptions),
    /// Fetch the keys of the issuers for which that is due, once; `run` does so by itself. Exit status 1 if any failed
    #[command(after_help = "Example:\n  tollgated issuer fetch")]
    Fetch(FetchOptions),
}

#[derive(Debug, Args)]
pub struct TrustOptions {
    /// The issuer, exactly as its tokens name it in `iss`, a slash at the end included
    pub issuer: String,

    /// What the ids of its users begin with here, so that its ann is not yours: no other issuer's prefix may begin with it.
    /// '' for at most one issuer, whose users then are yours
    #[arg(long, value_name = "TEXT")]
    pub user_prefix: String,

    /// The audience that its tokens must be for; repeat it for several, of which one suffices
    #[arg(long, value_name = "AUDIENCE", required = true)]
    pub audience: Vec<String>,

    /// Its key set (JWKS), in a file; - is standard input [default: fetched by the daemon]
    #[arg(long, value_name = "FILE", conflicts_with = "jwks_url")]
    pub jwks: Option<PathBuf>,

    /// Where its key set is fetched from [default: where its discovery document says]
    #[arg(long, value_name = "URL")]
    pub jwks_url: Option<String>,

    /// A scope that its tokens may grant here, and no other; repeat it, or separate several by commas
    #[arg(long = "scope", value_name = "SCOPE", value_delimiter = ',')]
    pub scopes: Vec<String>,

    /// The claim that names the user, after the prefix [default: sub]
    #[arg(long, value_name = "CLAIM")]
    pub user_claim: Option<String>,

    /// A claim that names scopes, such as roles or realm_access.roles; repeat it, or separate several by commas
    /// [default: scope and scp]
    #[arg(long = "scope-claim", value_name = "PATH", value_delimiter = ',')]
    pub scope_claims: Vec<String>,

    /// An algorithm of its keys; repeat it, or separate several by commas [default: RS256, ES256 and EdDSA]
    #[arg(long = "algorithm", value_name = "ALGORITHM", value_delimiter = ',')]
    pub algorithms: Vec<String>,

    /// A value of the header typ that is accepted, such as at+jwt; repeat it, or separate several by commas
    #[arg(long = "type", value_name = "TYP", value_delimiter = ',')]
    pub types: Vec<String>,

    /// Claims that its tokens must have, with exactly these values, as a JSON object
    #[arg(long, value_name = "JSON", value_parser = parse_object)]
    pub required_claims: Option<String>,

    /// How long after it was issued a token is accepted at most [default: 1d]
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    pub max_lifetime: Option<Duration>,

    #[command(flatten)]
    pub output: OutputOptions,
}

#[derive(Debug, Args)]
pub struct DistrustOptions {
    /// The issuer, as `issuer list` shows it
    pub issuer: String,

    /// Why, for the audit log
    #[arg(long, value_name = "TEXT")]
    pub reason: Option<String>,

    #[command(flatten)]
    pub output: OutputOptions,
}

#[derive(Debug, Args)]
pub struct FetchOptions {
    #[command(flatten)]
    pub networks: IssuerNetworks,

    #[command(flatten)]
    pub output: OutputOptions,
}

#[derive(Clone, Debug, Args)]
pub struct IssuerNetworks {
    /// A network that keys of issuers may be fetched from although it is not public, such as 10.1.0.0/16, by https; on this
    /// machine itself also by http. Repeat it, or separate several by commas
    #[arg(long, value_name = "CIDR", env = "TOLLGATED_ISSUER_ALLOW", value_delimiter = ',')]
    pub issuer_allow: Vec<IpNet>,
}
