//! Options of the commands for quotas.

use clap::{Args, Subcommand, ValueEnum};
use uuid::Uuid;

use super::common_options::OutputOptions;

#[derive(Debug, Subcommand)]
pub enum QuotaCommand {
    /// Set how often a token or a user may be used in an hour, a day, a week, a month, or in all
    #[command(
        after_help = "Examples:\n  tollgated quota set --user 42 --amount 10000 --per month --time-zone America/New_York\n  \
                      tollgated quota set --token 0198f5c1-2f3a-7c4d-9e5b-6a7b8c9d0e1f --amount 500 --per lifetime"
    )]
    Set(SetQuotaOptions),
    /// Add uses to a quota for a lifetime
    #[command(after_help = "Example:\n  tollgated quota add --user 42 1000")]
    Add(AddCreditsOptions),
    /// List all quotas, and what is left of them
    #[command(after_help = "Example:\n  tollgated quota list")]
    List(ListQuotasOptions),
    /// Show the quotas that a token spends, its own and its user's, or that of a user. Exit status 1 if there is none
    #[command(after_help = "Example:\n  tollgated quota show --user 42")]
    Show(ShowQuotaOptions),
    /// Remove a quota. Exit status 1 if there is none
    #[command(after_help = "Example:\n  tollgated quota remove --user 42 --reason 'unlimited plan'")]
    Remove(RemoveQuotaOptions),
}

#[derive(Clone, Debug, Args)]
#[group(required = true, multiple = false)]
pub struct QuotaSubjectOptions {
    /// The id of a token: what is derived from it, or replaces it, spends the same quota
    #[arg(long, value_name = "ID")]
    pub token: Option<Uuid>,

    /// A user, or a service account as service:ID: all tokens and access tokens of the user spend the quota
    #[arg(long, value_name = "USER")]
    pub user: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Per {
    Hour,
    Day,
    Week,
    Month,
    Lifetime,
}

impl Per {
    pub fn as_str(self) -> &'static str {
        match self {
            Per::Hour => "hour",
            Per::Day => "day",
            Per::Week => "week",
            Per::Month => "month",
            Per::Lifetime => "lifetime",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum WithoutDaemon {
    Closed,
    Open,
}

impl WithoutDaemon {
    pub fn as_str(self) -> &'static str {
        match self {
            WithoutDaemon::Closed => "closed",
            WithoutDaemon::Open => "open",
        }
    }
}

#[derive(Debug, Args)]
pub struct SetQuotaOptions {
    #[command(flatten)]
    pub subject: QuotaSubjectOptions,

    /// How many uses
    #[arg(long, value_name = "N")]
    pub amount: i64,

    /// In what period of the calendar; lifetime is for ever
    #[arg(long, value_enum)]
    pub per: Per,

    /// In which time zone days, weeks and months begin: UTC, or a name such as Europe/Berlin
    #[arg(long, value_name = "ZONE", default_value = "UTC")]
    pub time_zone: String,

    /// How many uses a server takes at a time, and a crash may cost [default: a hundredth, or, of less than 1000, 10 or a
    /// quarter]
    #[arg(long, value_name = "N")]
    pub lease: Option<i64>,

    /// What a server does once its lease is used up and no daemon has leased more: refuse, or go on
    #[arg(long, value_enum, default_value_t = WithoutDaemon::Closed)]
    pub without_daemon: WithoutDaemon,

    #[command(flatten)]
    pub output: OutputOptions,
}

#[derive(Debug, Args)]
pub struct AddCreditsOptions {
    #[command(flatten)]
    pub subject: QuotaSubjectOptions,

    /// How many uses to add
    pub credits: i64,

    #[command(flatten)]
    pub output: OutputOptions,
}

#[derive(Debug, Args)]
pub struct ListQuotasOptions {
    /// At most so many
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(1..))]
    pub limit: Option<i32>,

    /// Those after the quota with this id
    #[arg(long, value_name = "ID")]
    pub after: Option<Uuid>,

    #[command(flatten)]
    pub output: OutputOptions,
}

#[derive(Debug, Args)]
pub struct ShowQuotaOptions {
    #[command(flatten)]
    pub subject: QuotaSubjectOptions,

    #[command(flatten)]
    pub output: OutputOptions,
}

#[derive(Debug, Args)]
pub struct RemoveQuotaOptions {
    #[command(flatten)]
    pub subject: QuotaSubjectOptions,

    /// Why, for the audit log
    #[arg(long, value_name = "TEXT")]
    pub reason: Option<String>,

    #[command(flatten)]
    pub output: OutputOptions,
}
