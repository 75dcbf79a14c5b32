//! `tollgated key …`: the master key and the signing keys by hand.

use serde_json::json;
use tollgate_core::signature::Algorithm;

use super::list::List;
use super::token::read_secret;
use crate::app::keys;
use crate::cli::output;
use crate::cli::output::{Column, Tone};
use crate::config::{
    ImportKeyOptions, InitKeyOptions, OutputOptions, ResealOptions, RotateKeyOptions, WithdrawKeyOptions,
};
use crate::contract::document::Document;
use crate::error::Result;
use crate::postgres::target::Target;
use crate::process::exit;

/// Needs no database.
pub(super) fn init(options: &InitKeyOptions) -> Result<u8> {
    let id = keys::init(&options.file)?;
    if options.output.json {
        output::json(&json!({ "file": options.file, "master_key": id }))?;
    } else if options.output.quiet {
        output::line(id)?;
    } else {
        let facts = [("file", options.file.display().to_string()), ("master key", id)];
        output::line(output::facts(&facts))?;
        eprintln!(
            "Give it to the server's user (chown), name it in tollgate.master_key_file, and reload the configuration.\n\
             Keep a copy apart from the database's backups: without it no signing key can be used."
        );
    }
    Ok(exit::OK)
}

pub(super) async fn list(target: Target, options: &OutputOptions) -> Result<u8> {
    let columns = [
        Column::whole("KID"),
        Column::spare("FOR"),
        Column::whole("ALGORITHM"),
        Column::whole("STATE"),
        Column::whole("SIGNS FROM"),
        Column::spare("RETIRES"),
        Column::spare("VERIFIES UNTIL"),
        Column::spare("MASTER KEY"),
        Column::cut("WITHDRAWN BECAUSE"),
    ];
    let row = |key: &Document| {
        [
            key.field("kid"),
            key.field("purpose"),
            key.field("algorithm"),
            key.field("state"),
            key.moment("signs_from"),
            key.moment("retires_at"),
            key.moment("verifies_until"),
            key.field("master_key"),
            key.field("withdrawn_reason"),
        ]
    };
    let session = target.connect().await?;
    let rows = keys::list(&session).await?;
    let list = List { key: "kid", columns, row, tone: state_tone };
    if list.print(rows, options).await?.is_none() && options.is_for_people() {
        output::line("there are no signing keys: make one with `tollgated key rotate`")?;
    }
    Ok(exit::OK)
}

pub(super) fn state_tone(cell: &str) -> Tone {
    match cell {
        "signing" => Tone::Good,
        "retiring" => Tone::Doubtful,
        "withdrawn" => Tone::Bad,
        _ => Tone::Plain,
    }
}

/// Prints the id of a new key, in JSON under this name.
pub(super) fn new_key(output: &OutputOptions, name: &str, id: &str) -> Result<u8> {
    if output.json {
        output::json(&json!({ name: id }))?;
    } else {
        output::line(id)?;
    }
    Ok(exit::OK)
}

pub(super) async fn rotate(target: Target, options: RotateKeyOptions) -> Result<u8> {
    let session = target.connect().await?;
    let algorithm = options.algorithm.map(Algorithm::as_str);
    let kid = keys::rotate(&session, algorithm, options.signs_in).await?;
    new_key(&options.output, "kid", &kid)
}

pub(super) async fn import(target: Target, options: ImportKeyOptions) -> Result<u8> {
    let pem = read_secret(&options.file, "key", "Key (not shown): ")?;
    let session = target.connect().await?;
    let kid = keys::import(&session, &pem, options.signs_in).await?;
    new_key(&options.output, "kid", &kid)
}

pub(super) async fn withdraw(target: Target, options: WithdrawKeyOptions) -> Result<u8> {
    let session = target.connect().await?;
    let withdrawn = keys::withdraw(&session, &options.kid, options.reason.as_deref()).await?;
    output::changed(
        &options.output,
        "withdrawn",
        withdrawn,
        "nothing was withdrawn: there is no such key, or it is withdrawn already",
    )
}

pub(super) async fn reseal(target: Target, standbys: Vec<Target>, options: ResealOptions) -> Result<u8> {
    let session = target.connect().await?;
    let resealed = keys::reseal(&session, &standbys).await?;
    if options.output.json {
        output::json(&json!({ "resealed": resealed }))?;
    } else if !options.output.quiet {
        output::line(match resealed {
            0 => "all keys are sealed with the first master key already".to_owned(),
            1 => "1 key was resealed".to_owned(),
            _ => format!("{resealed} keys were resealed"),
        })?;
    }
    Ok(exit::OK)
}
