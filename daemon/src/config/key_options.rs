//! Options of the commands for keys.

use std::path::PathBuf;
use std::time::Duration;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, Subcommand};
use tollgate_core::signature::Algorithm;

use super::common_options::{OutputOptions, StandbyOptions};

#[derive(Debug, Subcommand)]
pub enum KeyCommand {
    /// Make a master key, in a new file
    #[command(after_help = "Example:\n  tollgated key init /etc/tollgate/master.key")]
    Init(InitKeyOptions),
    /// List the signing keys and their states
    #[command(after_help = "Example:\n  tollgated key list")]
    List(OutputOptions),
    /// Make the next signing key, which takes over once it has been in the JWKS for a day; the first one signs at once
    #[command(
        after_help = "Examples:\n  tollgated key rotate\n  tollgated key rotate --algorithm EdDSA --signs-in 2d"
    )]
    Rotate(RotateKeyOptions),
    /// Store a private key that was made elsewhere, in PEM (PKCS#8), as the next signing key
    #[command(after_help = "Example:\n  tollgated key import key.pem")]
    Import(ImportKeyOptions),
    /// End a signing key at once: what it signed is refused from now on
    #[command(
        after_help = "Example:\n  tollgated key withdraw wOWtFvXo0MsGRJZ-D4hBmX8dL5Pd8nUZ1Y2S8cIFxQw --reason leaked"
    )]
    Withdraw(WithdrawKeyOptions),
    /// Seal all private keys with the first master key, once it is loaded on the primary and each standby
    #[command(after_help = "Example:\n  tollgated key reseal --standby postgresql://boss@replica/app")]
    Reseal(ResealOptions),
}

#[derive(Debug, Args)]
pub struct InitKeyOptions {
    /// The file to make, outside of the server's data directory
    pub file: PathBuf,

    #[command(flatten)]
    pub output: OutputOptions,
}

#[derive(Debug, Args)]
pub struct RotateKeyOptions {
    /// Its algorithm [default: that of the latest key, or else ES256]
    #[arg(long, value_parser = algorithm())]
    pub algorithm: Option<Algorithm>,

    /// When it begins to sign [default: 1d; at once, if no key signs]
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    pub signs_in: Option<Duration>,

    #[command(flatten)]
    pub output: OutputOptions,
}

fn algorithm() -> impl TypedValueParser<Value = Algorithm> {
    PossibleValuesParser::new(Algorithm::ALL.map(Algorithm::as_str))
        .try_map(|name| Algorithm::parse(&name).ok_or("there is no such algorithm"))
}

#[derive(Debug, Args)]
pub struct ImportKeyOptions {
    /// The file with the key; - is standard input
    #[arg(default_value = "-")]
    pub file: PathBuf,

    /// When it begins to sign [default: 1d; at once, if no key signs]
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    pub signs_in: Option<Duration>,

    #[command(flatten)]
    pub output: OutputOptions,
}

#[derive(Debug, Args)]
pub struct WithdrawKeyOptions {
    /// The key's kid, as `key list` shows it
    #[arg(allow_hyphen_values = true)]
    pub kid: String,

    /// Why, for the audit log
    #[arg(long, value_name = "TEXT")]
    pub reason: Option<String>,

    #[command(flatten)]
    pub output: OutputOptions,
}

#[derive(Debug, Args)]
pub struct ResealOptions {
    #[command(flatten)]
    pub standby: StandbyOptions,

    #[command(flatten)]
    pub output: OutputOptions,
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::config::{Cli, Command};

    #[test]
    fn a_kid_may_begin_with_a_hyphen() {
        let kid = "-OWtFvXo0MsGRJZ-D4hBmX8dL5Pd8nUZ1Y2S8cIFxQw";
        match Cli::try_parse_from(["tollgated", "key", "withdraw", kid]).unwrap().command {
            Command::Key(KeyCommand::Withdraw(options)) => assert_eq!(options.kid, kid),
            other => panic!("{other:?}"),
        }
    }
}
