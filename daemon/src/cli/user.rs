//! `tollgated user …`: all that a user has.

use serde_json::json;

use crate::app::tokens;
use crate::cli::output;
use crate::config::{RevokeUserOptions, UserCommand};
use crate::error::Result;
use crate::postgres::target::Target;
use crate::process::exit;

pub(super) async fn user(target: Target, command: UserCommand) -> Result<u8> {
    match command {
        UserCommand::Revoke(options) => revoke(target, &options).await,
    }
}

async fn revoke(target: Target, options: &RevokeUserOptions) -> Result<u8> {
    let session = target.connect().await?;
    let revoked = tokens::revoke_user(&session, &options.user, options.reason.as_deref()).await?;
    if options.output.json {
        output::json(&json!({ "revoked": revoked }))?;
    } else if !options.output.quiet {
        let tokens = if revoked == 1 { "1 API token".to_owned() } else { format!("{revoked} API tokens") };
        output::line(format!(
            "revoked {tokens} of {}, and every session and access token from before now",
            options.user
        ))?;
    }
    Ok(exit::OK)
}
