//! `tollgated audit …`: the audit log.

use crate::app::audit;
use crate::app::audit::KnownSeal;
use crate::cli::output;
use crate::config::{AuditCommand, VerifyAuditOptions};
use crate::contract::document::Document;
use crate::error::Result;
use crate::postgres::target::Target;
use crate::process::exit;

pub(super) async fn audit(target: Target, command: AuditCommand) -> Result<u8> {
    match command {
        AuditCommand::Verify(options) => verify(target, options).await,
    }
}

async fn verify(target: Target, options: VerifyAuditOptions) -> Result<u8> {
    let known =
        options.known_seal.zip(options.known_hash).map(|(number, hash)| KnownSeal { number, hash: hash.0 });
    let session = target.connect().await?;
    let verification = audit::verify(&session, known.as_ref()).await?;
    let whole = verification.is_true("whole");
    if options.output.json {
        output::json(&verification)?;
    } else if !options.output.quiet {
        output::line(output::facts(&facts(&verification, whole)))?;
    }
    Ok(if whole { exit::OK } else { exit::NO })
}

fn facts(verification: &Document, whole: bool) -> Vec<(&'static str, String)> {
    let mut facts = vec![("audit log", if whole { "as it was sealed" } else { "CHANGED" }.to_owned())];
    if !whole {
        facts.push(("fault", verification.field("fault")));
        facts.push(("seal", verification.field("seal")));
        facts.push(("events from", verification.moment("first_at")));
        facts.push(("events to", verification.moment("last_at")));
    }
    facts.push(("events checked", verification.field("events")));
    facts.push(("seals checked", verification.field("seals")));
    facts.push(("seals purged", verification.field("purged")));
    // To be kept elsewhere: see --known-seal.
    facts.push(("last seal", verification.field("last_seal")));
    facts.push(("last hash", verification.field("last_hash")));
    facts
}
