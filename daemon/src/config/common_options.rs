//! Options that several commands share, and how a time within bounds is read.

use std::time::Duration;

use clap::Args;

use crate::process::duration;
use crate::secret::Secret;

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

#[derive(Clone, Debug, Args)]
pub struct StandbyOptions {
    /// A hot standby on which tokens are verified too, for its usage to be carried to the primary: a connection string
    /// as for --database-url. Repeat it, or separate several URLs by spaces
    #[arg(
        long = "standby",
        value_name = "URL",
        env = "TOLLGATED_STANDBY",
        hide_env_values = true,
        value_parser = Secret::parse
    )]
    standbys: Vec<Secret>,
}

impl StandbyOptions {
    /// One connection string each. The form `host=… dbname=…` has spaces of its own.
    pub(super) fn urls(&self) -> impl Iterator<Item = Secret> {
        self.standbys.iter().flat_map(|text| {
            let text = text.expose().trim();
            let urls: Vec<&str> =
                if text.contains("://") { text.split_whitespace().collect() } else { vec![text] };
            urls.into_iter().filter(|url| !url.is_empty()).map(Secret::new).collect::<Vec<_>>()
        })
    }
}

pub(super) fn bounded(text: &str, least: Duration, most: Duration) -> Result<Duration, String> {
    let value = humantime::parse_duration(text).map_err(|error| format!("{error}; write it as 5s or 1h"))?;
    let shown = duration::text;
    if value < least {
        return Err(format!("it must be at least {}", shown(least)));
    }
    if value > most {
        return Err(format!("it must be at most {}", shown(most)));
    }
    Ok(value)
}
