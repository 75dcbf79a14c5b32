//! `tollgated scope …`: the catalogue of scopes by hand.

use serde_json::json;

use super::list::List;
use crate::cli::output;
use crate::cli::output::Tone;
use crate::config::{DefineScopeOptions, DropScopeOptions, OutputOptions, ScopeCommand};
use crate::contract;
use crate::contract::document::Document;
use crate::error::Result;
use crate::postgres::target::Target;
use crate::process::exit;

pub(super) async fn scope(target: Target, command: ScopeCommand) -> Result<u8> {
    match command {
        ScopeCommand::List(output) => list(target, &output).await,
        ScopeCommand::Define(options) => define(target, options).await,
        ScopeCommand::Drop(options) => drop(target, options).await,
    }
}

async fn list(target: Target, options: &OutputOptions) -> Result<u8> {
    let row = |scope: &Document| {
        [
            scope.field("name"),
            scope.moment("defined_at"),
            scope.field("defined_by"),
            scope.field("description"),
        ]
    };
    let session = target.connect().await?;
    let scopes = contract::list_scopes(&*session).await?;
    let list =
        List { key: "name", heading: ["NAME", "DEFINED", "BY", "DESCRIPTION"], row, tone: |_| Tone::Plain };
    if !list.print(scopes, options).await? && options.is_for_people() {
        output::line("there are no scopes: define one with `tollgated scope define`")?;
    }
    Ok(exit::OK)
}

async fn define(target: Target, options: DefineScopeOptions) -> Result<u8> {
    let session = target.connect().await?;
    contract::define_scope(&*session, &options.name, &options.description).await?;
    done(&options.output, "defined", &options.name)
}

async fn drop(target: Target, options: DropScopeOptions) -> Result<u8> {
    let session = target.connect().await?;
    contract::drop_scope(&*session, &options.name).await?;
    done(&options.output, "dropped", &options.name)
}

fn done(output: &OutputOptions, what: &str, name: &str) -> Result<u8> {
    if output.json {
        output::json(&json!({ what: name }))?;
    } else if !output.quiet {
        output::line(format!("{what} {name}"))?;
    }
    Ok(exit::OK)
}
