//! `tollgated flush`: carries everything counted so far into the tables.

use serde_json::json;

use super::progress;
use crate::app::flush;
use crate::cli::output;
use crate::config::OutputOptions;
use crate::error::Result;
use crate::postgres::target::Target;
use crate::process::exit;

pub(super) async fn flush(target: Target, standbys: Vec<Target>, output: &OutputOptions) -> Result<u8> {
    let session = target.connect().await?;
    let bar = progress::bar("flushing usage", None, "tokens", !output.is_for_people());
    let totals = flush::flush(&session, standbys, |tokens| {
        bar.set_position(tokens);
        bar.tick();
    })
    .await?;
    bar.finish_and_clear();
    if output.json {
        output::json(&json!({
            "metering": totals.off.is_none(),
            "metering_detail": totals.off,
            "generations": totals.rounds,
            "tokens": totals.tokens,
            "uses": totals.uses,
            "denials": totals.denials,
            "lagging_standbys": totals.lagging,
        }))?;
    } else if !output.quiet || totals.off.is_some() {
        output::line(match &totals.off {
            Some(note) => note.clone(),
            None => format!(
                "flushed {} uses and {} denials of {} tokens in {} generations",
                totals.uses, totals.denials, totals.tokens, totals.rounds
            ),
        })?;
        for standby in &totals.lagging {
            output::line(format!(
                "{standby} is behind: its uses are in the tables, but it has not replayed that yet; flush it again to go on"
            ))?;
        }
    }
    Ok(if totals.off.is_none() { exit::OK } else { exit::NO })
}
