//! `tollgated url-key …`: keys that sign URLs.

use serde_json::json;

use super::key::{new_key, state_tone};
use super::list::List;
use crate::app::url_keys;
use crate::cli::output;
use crate::cli::output::Column;
use crate::config::{ExportUrlKeyOptions, OutputOptions, UrlKeyCommand, WithdrawUrlKeyOptions};
use crate::contract::document::Document;
use crate::error::Result;
use crate::postgres::target::Target;
use crate::process::exit;

pub(super) async fn url_key(target: Target, command: UrlKeyCommand) -> Result<u8> {
    match command {
        UrlKeyCommand::List(output) => list(target, &output).await,
        UrlKeyCommand::Create(options) => {
            let session = target.connect().await?;
            new_key(&options.output, "key_id", &url_keys::create(&session, &options.name).await?)
        }
        UrlKeyCommand::Rotate(options) => {
            let session = target.connect().await?;
            new_key(
                &options.output,
                "key_id",
                &url_keys::rotate(&session, &options.name, options.signs_in).await?,
            )
        }
        UrlKeyCommand::Export(options) => export(target, options).await,
        UrlKeyCommand::Withdraw(options) => withdraw(target, options).await,
    }
}

async fn list(target: Target, options: &OutputOptions) -> Result<u8> {
    let columns = [
        Column::whole("NAME"),
        Column::whole("KEY ID"),
        Column::whole("STATE"),
        Column::whole("SIGNS FROM"),
        Column::spare("RETIRES"),
        Column::spare("VERIFIES UNTIL"),
        Column::cut("WITHDRAWN BECAUSE"),
    ];
    let row = |key: &Document| {
        [
            key.field("name"),
            key.field("key_id"),
            key.field("state"),
            key.moment("signs_from"),
            key.moment("retires_at"),
            key.moment("verifies_until"),
            key.field("withdrawn_reason"),
        ]
    };
    let session = target.connect().await?;
    let rows = url_keys::list(&session).await?;
    let list = List { key: "key_id", columns, row, tone: state_tone };
    if list.print(rows, options).await?.is_none() && options.is_for_people() {
        output::line("there are no keys for URLs: create one with `tollgated url-key create`")?;
    }
    Ok(exit::OK)
}

async fn export(target: Target, options: ExportUrlKeyOptions) -> Result<u8> {
    let session = target.connect().await?;
    let key = url_keys::export(&session, &options.key_id).await?;
    if options.output.json {
        output::json(&json!({ "key_id": options.key_id, "key": key.expose() }))?;
    } else {
        output::line(key.expose())?;
    }
    Ok(exit::OK)
}

async fn withdraw(target: Target, options: WithdrawUrlKeyOptions) -> Result<u8> {
    let session = target.connect().await?;
    let withdrawn = url_keys::withdraw(&session, &options.key_id, options.reason.as_deref()).await?;
    output::changed(
        &options.output,
        "withdrawn",
        withdrawn,
        "nothing was withdrawn: there is no such key, or it is withdrawn already",
    )
}
