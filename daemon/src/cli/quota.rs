//! `tollgated quota …`: how often tokens and users may be used.

use futures_util::Stream;

use super::list::{Last, List};
use crate::app::quotas;
use crate::cli::output;
use crate::cli::output::{Column, Tone};
use crate::config::{OutputOptions, QuotaCommand, QuotaSubjectOptions, SetQuotaOptions};
use crate::contract::document::Document;
use crate::contract::{NewQuota, QuotaSubject};
use crate::error::{Error, Result};
use crate::postgres::target::Target;
use crate::process::exit;

pub(super) async fn quota(target: Target, command: QuotaCommand) -> Result<u8> {
    match command {
        QuotaCommand::Set(options) => set(target, options).await,
        QuotaCommand::Add(options) => {
            let (subject, name) = subject(options.subject)?;
            let amount = quotas::add_credits(&*target.connect().await?, &subject, options.credits).await?;
            output::done(&options.output, "credited", &format!("{name}: {amount} uses in all"))
        }
        QuotaCommand::List(options) => {
            let session = target.connect().await?;
            let rows = quotas::list(&session, options.limit, options.after).await?;
            if print(rows, &options.output).await?.is_none() && options.output.is_for_people() {
                output::line("no token and no user has a quota: set one with `tollgated quota set`")?;
            }
            Ok(exit::OK)
        }
        QuotaCommand::Show(options) => {
            let (subject, name) = subject(options.subject)?;
            let session = target.connect().await?;
            let rows = quotas::show(&session, &subject).await?;
            let found = print(rows, &options.output).await?.is_some();
            if !found && options.output.is_for_people() {
                output::line(format!("{name} has no quota"))?;
            }
            Ok(if found { exit::OK } else { exit::NO })
        }
        QuotaCommand::Remove(options) => {
            let (subject, _) = subject(options.subject)?;
            let session = target.connect().await?;
            let removed = quotas::remove(&session, &subject, options.reason.as_deref()).await?;
            output::changed(&options.output, "removed", removed, "nothing was changed: it has no quota")
        }
    }
}

/// Whose quota it is, and how that is said.
fn subject(options: QuotaSubjectOptions) -> Result<(QuotaSubject, String)> {
    match (options.token, options.user) {
        (Some(id), None) => Ok((QuotaSubject::Token(id), id.to_string())),
        (None, Some(user)) => Ok((QuotaSubject::User(user.clone()), user)),
        _ => Err(Error::usage("give either --token or --user")),
    }
}

async fn set(target: Target, options: SetQuotaOptions) -> Result<u8> {
    let (subject, name) = subject(options.subject)?;
    let new = NewQuota {
        amount: options.amount,
        per: options.per.as_str().to_owned(),
        time_zone: options.time_zone,
        lease: options.lease,
        without_daemon: options.without_daemon.as_str().to_owned(),
    };
    quotas::set(&*target.connect().await?, &subject, &new).await?;
    output::done(&options.output, "set", &name)
}

async fn print(rows: impl Stream<Item = Result<Document>>, options: &OutputOptions) -> Result<Option<Last>> {
    let columns = [
        Column::cut("OF"),
        Column::whole("AMOUNT"),
        Column::whole("PER"),
        Column::whole("USED"),
        Column::spare("LEASED"),
        Column::whole("REMAINING"),
        Column::spare("RESETS"),
    ];
    let row = |quota: &Document| {
        let token = quota.field("token_id");
        [
            if token.is_empty() { quota.field("user_id") } else { token },
            quota.field("amount"),
            quota.field("per"),
            quota.field("used"),
            quota.field("leased"),
            quota.field("remaining"),
            quota.moment("resets_at"),
        ]
    };
    List { key: "id", columns, row, tone: |_| Tone::Plain }.print(rows, options).await
}
