//! Options of the commands for keys that sign URLs.

use std::time::Duration;

use clap::{Args, Subcommand};

use super::common_options::OutputOptions;

#[derive(Debug, Subcommand)]
pub enum UrlKeyCommand {
    /// Create a key, which signs at once
    #[command(after_help = "Examples:\n  tollgated url-key create\n  tollgated url-key create downloads")]
    Create(CreateUrlKeyOptions),
    /// List the keys that sign URLs, and their states
    #[command(after_help = "Example:\n  tollgated url-key list")]
    List(OutputOptions),
    /// Create the next key of a name; what the present one signed stays good
    #[command(after_help = "Example:\n  tollgated url-key rotate downloads --signs-in 2d")]
    Rotate(RotateUrlKeyOptions),
    /// Print a key, for a server at the edge that verifies without the database; it could sign, too
    #[command(
        after_help = "Example:\n  tollgated url-key export wOWtFvXo0MsGRJZ-D4hBmX8dL5Pd8nUZ1Y2S8cIFxQw"
    )]
    Export(ExportUrlKeyOptions),
    /// End a key at once: what it signed is refused from now on
    #[command(
        after_help = "Example:\n  tollgated url-key withdraw wOWtFvXo0MsGRJZ-D4hBmX8dL5Pd8nUZ1Y2S8cIFxQw --reason leaked"
    )]
    Withdraw(WithdrawUrlKeyOptions),
}

#[derive(Debug, Args)]
pub struct CreateUrlKeyOptions {
    /// What its URLs are for
    #[arg(default_value = "default")]
    pub name: String,

    #[command(flatten)]
    pub output: OutputOptions,
}

#[derive(Debug, Args)]
pub struct RotateUrlKeyOptions {
    /// The name of the key
    #[arg(default_value = "default")]
    pub name: String,

    /// When the next key begins to sign [default: 1d]
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    pub signs_in: Option<Duration>,

    #[command(flatten)]
    pub output: OutputOptions,
}

#[derive(Debug, Args)]
pub struct ExportUrlKeyOptions {
    /// The key's id, as `url-key list` shows it
    #[arg(allow_hyphen_values = true)]
    pub key_id: String,

    #[command(flatten)]
    pub output: OutputOptions,
}

#[derive(Debug, Args)]
pub struct WithdrawUrlKeyOptions {
    /// The key's id, as `url-key list` shows it
    #[arg(allow_hyphen_values = true)]
    pub key_id: String,

    /// Why, for the audit log
    #[arg(long, value_name = "TEXT")]
    pub reason: Option<String>,

    #[command(flatten)]
    pub output: OutputOptions,
}
