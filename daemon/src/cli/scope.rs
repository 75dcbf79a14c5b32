//! `tollgated scope …`: the catalogue of scopes by hand.

use serde_json::json;

use crate::config::{DefineScopeOptions, DropScopeOptions, OutputOptions, ScopeCommand};
use crate::db::Target;
use crate::error::Result;
use crate::{exit, output, sql};

pub(super) async fn scope(target: Target, command: ScopeCommand) -> Result<u8> {
    match command {
        ScopeCommand::List(output) => list(target, &output).await,
        ScopeCommand::Define(options) => define(target, options).await,
        ScopeCommand::Drop(options) => drop(target, options).await,
    }
}

async fn list(target: Target, output: &OutputOptions) -> Result<u8> {
    let session = target.connect().await?;
    let scopes = sql::list_scopes(&*session).await?;
    if output.json {
        output::json(&scopes)?;
    } else if output.quiet {
        for scope in &scopes {
            output::line(output::field(scope, "name"))?;
        }
    } else if scopes.is_empty() {
        output::line("there are no scopes: define one with `tollgated scope define`")?;
    } else {
        let rows = scopes.iter().map(|scope| {
            [
                output::field(scope, "name"),
                output::moment(scope, "defined_at"),
                output::field(scope, "defined_by"),
                output::field(scope, "description"),
            ]
        });
        output::line(output::table(["NAME", "DEFINED", "BY", "DESCRIPTION"], rows))?;
    }
    Ok(exit::OK)
}

async fn define(target: Target, options: DefineScopeOptions) -> Result<u8> {
    let session = target.connect().await?;
    sql::define_scope(&*session, &options.name, &options.description).await?;
    done(&options.output, "defined", &options.name)
}

async fn drop(target: Target, options: DropScopeOptions) -> Result<u8> {
    let session = target.connect().await?;
    sql::drop_scope(&*session, &options.name).await?;
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
