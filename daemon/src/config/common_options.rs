//! Options that several commands share.

use clap::Args;

#[derive(Clone, Debug, Args)]
pub struct OutputOptions {
    /// Print JSON for machines
    #[arg(long)]
    pub json: bool,

    /// Print only what was asked for: no hints, no progress; of something that is done, nothing or its id alone
    #[arg(short, long, conflicts_with = "json")]
    pub quiet: bool,
}

impl OutputOptions {
    pub fn is_for_people(&self) -> bool {
        !self.json && !self.quiet
    }
}

#[derive(Clone, Debug, Args)]
pub struct BatchOptions {
    /// Tokens or events handled in one transaction
    #[arg(long, value_name = "N", env = "TOLLGATED_BATCH_SIZE", default_value_t = 1000,
        value_parser = clap::value_parser!(i32).range(1..=100_000))]
    pub batch_size: i32,
}
