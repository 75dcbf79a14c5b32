//! `tollgated issuer …`: issuers of other systems whose tokens are accepted.

use std::fs::File;
use std::io;
use std::io::Read as _;
use std::path::Path;

use serde_json::json;

use super::list::List;
use crate::app::issuers;
use crate::cli::output;
use crate::cli::output::{Column, Tone};
use crate::config::{DistrustOptions, FetchOptions, IssuerCommand, OutputOptions, TrustOptions};
use crate::contract::NewIssuer;
use crate::contract::document::Document;
use crate::error::{Error, Result};
use crate::issuer_keys::Fetcher;
use crate::postgres::target::Target;
use crate::process::exit;

/// The server takes no longer one.
const LONGEST_SET: u64 = tollgate_core::jwk::MAX_SET_LEN as u64;

pub(super) async fn issuer(target: Target, command: IssuerCommand) -> Result<u8> {
    match command {
        IssuerCommand::Trust(options) => trust(target, *options).await,
        IssuerCommand::List(output) => list(target, &output).await,
        IssuerCommand::Distrust(options) => distrust(target, options).await,
        IssuerCommand::Fetch(options) => fetch(target, options).await,
    }
}

async fn trust(target: Target, options: TrustOptions) -> Result<u8> {
    let jwks = options.jwks.as_deref().map(read_key_set).transpose()?;
    let given = |list: Vec<String>| (!list.is_empty()).then_some(list);
    let new = NewIssuer {
        issuer: options.issuer,
        user_prefix: options.user_prefix,
        audience: options.audience,
        jwks,
        jwks_url: options.jwks_url,
        scopes: given(options.scopes),
        user_claim: options.user_claim,
        scope_claims: given(options.scope_claims),
        algorithms: given(options.algorithms),
        types: given(options.types),
        required_claims: options.required_claims,
        max_lifetime: options.max_lifetime,
    };
    let session = target.connect().await?;
    issuers::trust(&session, &new).await?;
    output::done(&options.output, "trusted", &new.issuer)
}

pub(super) fn read_key_set(from: &Path) -> Result<String> {
    let shown = from.display();
    let unreadable =
        |error: io::Error| Error::usage(format!("could not read the key set from {shown}: {error}"));
    let mut text = String::new();
    if from == Path::new("-") {
        io::stdin().lock().take(LONGEST_SET + 1).read_to_string(&mut text).map_err(unreadable)?;
    } else {
        let file = File::open(from).map_err(unreadable)?;
        file.take(LONGEST_SET + 1).read_to_string(&mut text).map_err(unreadable)?;
    }
    if text.len() as u64 > LONGEST_SET {
        return Err(Error::usage(format!("{shown} holds over {LONGEST_SET} bytes, which is too much")));
    }
    Ok(text)
}

async fn list(target: Target, options: &OutputOptions) -> Result<u8> {
    let columns = [
        Column::whole("ISSUER"),
        Column::whole("PREFIX"),
        Column::whole("KEYS"),
        Column::spare("FETCHED"),
        Column::spare("FAILURES"),
        Column::cut("SCOPES"),
        Column::cut("PROBLEM"),
    ];
    let row = |issuer: &Document| {
        [
            issuer.field("issuer"),
            issuer.field("user_prefix"),
            issuer.field("keys"),
            issuer.moment("fetched_at"),
            issuer.field("failures"),
            issuer.field("scopes"),
            issuer.field("problem"),
        ]
    };
    let session = target.connect().await?;
    let rows = issuers::list(&session).await?;
    let list = List { key: "issuer", columns, row, tone: |_| Tone::Plain };
    if list.print(rows, options).await?.is_none() && options.is_for_people() {
        output::line("no issuer is trusted: trust one with `tollgated issuer trust`")?;
    }
    Ok(exit::OK)
}

async fn distrust(target: Target, options: DistrustOptions) -> Result<u8> {
    let session = target.connect().await?;
    let distrusted = issuers::distrust(&session, &options.issuer, options.reason.as_deref()).await?;
    output::changed(
        &options.output,
        "distrusted",
        distrusted,
        "nothing was changed: there is no such trusted issuer",
    )
}

async fn fetch(target: Target, options: FetchOptions) -> Result<u8> {
    let fetcher = Fetcher::new(&options.networks.issuer_allow);
    let session = target.connect().await?;
    let mut all_well = true;
    let mut fetched = Vec::new();
    for due in issuers::due(&session).await? {
        let outcome = issuers::fetch(&fetcher, &due).await;
        let outcome = issuers::record(&*session, None, &due.issuer, due.jwks_url.as_deref(), outcome).await?;
        all_well &= outcome.keys.is_some();
        if options.output.quiet {
            output::line(due.issuer.as_str())?;
        } else if !options.output.json {
            output::line(format!("{}: {outcome}", due.issuer))?;
        }
        fetched.push(json!({ "issuer": due.issuer, "keys": outcome.keys, "problem": outcome.problem }));
    }
    if options.output.json {
        output::json(&fetched)?;
    } else if fetched.is_empty() && options.output.is_for_people() {
        output::line("no issuer is due")?;
    }
    Ok(if all_well { exit::OK } else { exit::NO })
}
