//! `tollgated cleanup`: records expiries and deletes what ended long ago, once and until done.

use serde_json::json;

use super::progress;
use crate::app::cleanup;
use crate::app::cleanup::{Cleaned, Retention, Stage};
use crate::cli::output;
use crate::config::CleanupOptions;
use crate::error::Result;
use crate::postgres::target::Target;
use crate::process::exit;

pub(super) async fn cleanup(target: Target, options: CleanupOptions) -> Result<u8> {
    let mut session = target.connect().await?;
    let retention = Retention {
        tokens: options.retention.retention,
        usage: options.retention.usage_retention,
        audit: options.retention.audit_retention.0,
    };
    let bar = progress::bar("recording expiries", None, "rows", !options.output.is_for_people());
    let cleaned = cleanup::clean_up(&mut session, &retention, options.batch.batch_size, |stage, count| {
        bar.set_message(match stage {
            Stage::Expiries => "recording expiries",
            Stage::EndedTokens => "deleting ended tokens",
            Stage::EndedSessions => "deleting ended sessions",
            Stage::UsageHours => "deleting old hours of usage",
            Stage::AuditEvents => "deleting old events of the audit log",
        });
        bar.set_position(count);
        bar.tick();
    })
    .await?;
    bar.finish_and_clear();

    let Cleaned { expired, purged, purged_sessions, purged_hours, purged_events } = cleaned;
    if options.output.json {
        output::json(&json!({
            "expired": expired, "purged": purged, "purged_sessions": purged_sessions, "purged_hours": purged_hours,
            "purged_events": purged_events
        }))?;
    } else if !options.output.quiet {
        output::line(format!(
            "recorded {expired} expiries, deleted {purged} ended tokens, {purged_sessions} ended sessions, {purged_hours} old \
             hours of usage and {purged_events} old events of the audit log"
        ))?;
    }
    Ok(exit::OK)
}
