//! `tollgated scope …`: the catalogue of scopes by hand.

use super::list::List;
use crate::app::scopes;
use crate::cli::output;
use crate::cli::output::{Column, Tone};
use crate::config::{DefineScopeOptions, DropScopeOptions, OutputOptions, ScopeCommand};
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
    let scopes = scopes::list(&session).await?;
    let columns =
        [Column::whole("NAME"), Column::whole("DEFINED"), Column::spare("BY"), Column::cut("DESCRIPTION")];
    let list = List { key: "name", columns, row, tone: |_| Tone::Plain };
    if list.print(scopes, options).await?.is_none() && options.is_for_people() {
        output::line("there are no scopes: define one with `tollgated scope define`")?;
    }
    Ok(exit::OK)
}

async fn define(target: Target, options: DefineScopeOptions) -> Result<u8> {
    let session = target.connect().await?;
    scopes::define(&session, &options.name, &options.description).await?;
    output::done(&options.output, "defined", &options.name)
}

async fn drop(target: Target, options: DropScopeOptions) -> Result<u8> {
    let session = target.connect().await?;
    scopes::drop(&session, &options.name).await?;
    output::done(&options.output, "dropped", &options.name)
}
