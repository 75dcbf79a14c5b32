//! Options of the commands for import keys.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use super::common_options::OutputOptions;

#[derive(Debug, Subcommand)]
pub enum ImportKeyCommand {
    /// Store the secret key of HMAC-SHA256 of another system, sealed; one of that name is replaced
    #[command(
        after_help = "Examples:\n  tollgated import-key store devise key.hex --encoding hex\n  tollgated import-key store app < pepper.txt"
    )]
    Store(StoreImportKeyOptions),
    /// List the import keys, and whether tokens still need them
    #[command(after_help = "Example:\n  tollgated import-key list")]
    List(OutputOptions),
    /// Delete a key that no token needs any more
    #[command(after_help = "Example:\n  tollgated import-key drop devise")]
    Drop(DropImportKeyOptions),
}

#[derive(Debug, Args)]
pub struct StoreImportKeyOptions {
    /// The name of the key, after the system that it is of; tokens are imported as hmac-sha256:NAME
    pub name: String,

    /// The file with the key; - is standard input. White space around it is left out
    #[arg(default_value = "-")]
    pub file: PathBuf,

    /// How the key is written; a text is taken as it is, in UTF-8
    #[arg(long, value_enum, default_value_t = KeyEncoding::Text)]
    pub encoding: KeyEncoding,

    #[command(flatten)]
    pub output: OutputOptions,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum KeyEncoding {
    Text,
    Hex,
    Base64,
}

#[derive(Debug, Args)]
pub struct DropImportKeyOptions {
    /// The name of the key
    pub name: String,

    #[command(flatten)]
    pub output: OutputOptions,
}
