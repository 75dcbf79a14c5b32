//! `tollgated capability …`: which database role may do what.

use serde_json::json;

use super::list::List;
use crate::app::capabilities;
use crate::cli::output;
use crate::cli::output::{Column, Tone};
use crate::config::{CapabilityCommand, CapabilityOptions, OutputOptions};
use crate::contract::document::Document;
use crate::error::Result;
use crate::postgres::target::Target;
use crate::process::exit;

pub(super) async fn capability(target: Target, command: CapabilityCommand) -> Result<u8> {
    match command {
        CapabilityCommand::List(output) => list(target, &output).await,
        CapabilityCommand::Grant(options) => change(target, options, true).await,
        CapabilityCommand::Revoke(options) => change(target, options, false).await,
    }
}

async fn list(target: Target, options: &OutputOptions) -> Result<u8> {
    let columns = [
        Column::whole("ROLE"),
        Column::whole("CAPABILITY"),
        Column::whole("STATE"),
        Column::spare("GRANTED"),
        Column::spare("BY"),
        Column::cut("MEMBERS"),
        Column::cut("OBJECTS"),
    ];
    let row = |grant: &Document| {
        [
            grant.field("role"),
            grant.field("capability"),
            grant.field("state"),
            grant.moment("granted_at"),
            grant.field("granted_by"),
            grant.field("members"),
            grant.field("objects"),
        ]
    };
    let session = target.connect().await?;
    let grants = capabilities::list(&session).await?;
    let list = List { key: "role", columns, row, tone: |_| Tone::Plain };
    if list.print(grants, options).await?.is_none() && options.is_for_people() {
        output::line("no role has a capability: give one with `tollgated capability grant`")?;
    }
    Ok(exit::OK)
}

async fn change(target: Target, options: CapabilityOptions, grant: bool) -> Result<u8> {
    let CapabilityOptions { role, capability, output } = options;
    let capability = capability.as_str();
    let session = target.connect().await?;
    let (done, to) = if grant {
        capabilities::grant(&session, &role, capability).await?;
        ("granted", "to")
    } else {
        capabilities::revoke(&session, &role, capability).await?;
        ("revoked", "from")
    };
    if output.json {
        output::json(&json!({ done: capability, "role": role }))?;
    } else if !output.quiet {
        output::line(format!("{done} {capability} {to} {role}"))?;
    }
    Ok(exit::OK)
}
