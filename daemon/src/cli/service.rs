//! `tollgated service …`: service accounts by hand.

use serde_json::{Value, json};

use super::issuer::read_key_set;
use super::list::List;
use super::token::hand_out;
use crate::app::services;
use crate::app::services::ServiceFields;
use crate::cli::output;
use crate::cli::output::{Column, Tone};
use crate::config;
use crate::config::{
    CreateServiceOptions, DistrustWorkloadOptions, EndServiceOptions, OutputOptions, SecretOptions,
    ServiceCommand, ServiceKeysOptions, ServiceOptions, TrustWorkloadOptions, UpdateServiceOptions,
};
use crate::contract::Ending;
use crate::contract::document::Document;
use crate::error::Result;
use crate::postgres::target::Target;
use crate::process::exit;

pub(super) async fn service(target: Target, command: ServiceCommand) -> Result<u8> {
    match command {
        ServiceCommand::Create(options) => create(target, options).await,
        ServiceCommand::List(output) => list(target, &output).await,
        ServiceCommand::Show(options) => show(target, &options).await,
        ServiceCommand::Update(options) => update(target, options).await,
        ServiceCommand::Disable(options) => set_enabled(target, &options, false).await,
        ServiceCommand::Enable(options) => set_enabled(target, &options, true).await,
        ServiceCommand::Delete(options) => delete(target, &options).await,
        ServiceCommand::Secret(options) => secret(target, options).await,
        ServiceCommand::Keys(options) => keys(target, options).await,
        ServiceCommand::TrustWorkload(options) => trust_workload(target, options).await,
        ServiceCommand::DistrustWorkload(options) => distrust_workload(target, &options).await,
    }
}

fn fields(name: Option<String>, given: config::ServiceFields) -> ServiceFields {
    let list = |list: Vec<String>| (!list.is_empty()).then_some(list);
    ServiceFields {
        name,
        scopes: list(given.scopes),
        audience: list(given.audience),
        lifetime: given.lifetime,
        description: given.description,
        owner: given.owner,
    }
}

async fn create(target: Target, options: CreateServiceOptions) -> Result<u8> {
    let session = target.connect().await?;
    services::create(&session, &options.id, &fields(Some(options.name), options.fields)).await?;
    output::done(&options.output, "created", &options.id)
}

async fn update(target: Target, options: UpdateServiceOptions) -> Result<u8> {
    let session = target.connect().await?;
    services::update(&session, &options.id, &fields(options.name, options.fields)).await?;
    output::done(&options.output, "updated", &options.id)
}

async fn list(target: Target, options: &OutputOptions) -> Result<u8> {
    let columns = [
        Column::whole("ID"),
        Column::cut("NAME"),
        Column::whole("ENABLED"),
        Column::whole("LAST USED"),
        Column::spare("SECRETS"),
        Column::spare("KEYS"),
        Column::cut("OWNER"),
        Column::cut("SCOPES"),
    ];
    let row = |account: &Document| {
        [
            account.field("id"),
            account.field("name"),
            account.field("enabled"),
            account.moment("last_used_at"),
            account.field("secrets"),
            account.field("kids"),
            account.field("owner"),
            account.field("scopes"),
        ]
    };
    let session = target.connect().await?;
    let list = List { key: "id", columns, row, tone: |_| Tone::Plain };
    if list.print(services::list(&session), options).await?.is_none() && options.is_for_people() {
        output::line("there is no service account: create one with `tollgated service create`")?;
    }
    Ok(exit::OK)
}

async fn show(target: Target, options: &ServiceOptions) -> Result<u8> {
    let session = target.connect().await?;
    let Some(account) = services::show(&session, &options.id).await? else {
        if options.output.json {
            output::json(&Value::Null)?;
        } else {
            output::line("there is no such service account")?;
        }
        return Ok(exit::NO);
    };
    if options.output.json {
        output::json(&account)?;
    } else if options.output.quiet {
        output::line(account.field("enabled"))?;
    } else {
        output::line(output::facts(&known(&account)))?;
    }
    Ok(exit::OK)
}

/// What is known of an account; what does not apply to it is left out.
fn known(account: &Document) -> Vec<(&'static str, String)> {
    [
        ("id", "id"),
        ("user", "user_id"),
        ("name", "name"),
        ("description", "description"),
        ("owner", "owner"),
        ("enabled", "enabled"),
        ("disabled", "disabled_at"),
        ("reason", "disabled_reason"),
        ("scopes", "scopes"),
        ("audience", "audience"),
        ("lifetime", "lifetime"),
        ("secrets", "secrets"),
        ("keys", "kids"),
        ("keys from", "jwks_url"),
        ("keys fetched", "keys_fetched_at"),
        ("problem", "problem"),
        ("workloads", "workloads"),
        ("last used", "last_used_at"),
        ("created", "created_at"),
        ("created by", "created_by"),
    ]
    .into_iter()
    .filter(|(_, key)| account.has(key))
    .map(|(name, key)| {
        let value = match key {
            "lifetime" => account.duration(key),
            _ if key.ends_with("_at") => account.moment(key),
            _ => account.field(key),
        };
        (name, value)
    })
    .collect()
}

async fn set_enabled(target: Target, options: &EndServiceOptions, enabled: bool) -> Result<u8> {
    let session = target.connect().await?;
    let changed = services::set_enabled(&session, &options.id, enabled, options.reason.as_deref()).await?;
    let word = if enabled { "enabled" } else { "disabled" };
    let otherwise = format!("nothing was {word}: there is no such service account, or it is {word} already");
    output::changed(&options.output, word, changed, &otherwise)
}

async fn delete(target: Target, options: &EndServiceOptions) -> Result<u8> {
    let session = target.connect().await?;
    let deleted = services::delete(&session, &options.id, options.reason.as_deref()).await?;
    output::changed(
        &options.output,
        "deleted",
        deleted,
        "nothing was deleted: there is no such service account",
    )
}

async fn secret(target: Target, options: SecretOptions) -> Result<u8> {
    let session = target.connect().await?;
    let ending = Ending { expires_in: options.expires_in, expires_at: options.expires_at };
    // No list is every network; an empty one would be none.
    let networks = (!options.allowed_ips.is_empty()).then_some(options.allowed_ips.as_slice());
    let issued =
        services::create_secret(&session, &options.id, options.name.as_deref(), &ending, networks).await?;
    hand_out(&issued, &options.output)?;
    Ok(exit::OK)
}

async fn keys(target: Target, options: ServiceKeysOptions) -> Result<u8> {
    let jwks = options.jwks.as_deref().map(read_key_set).transpose()?;
    let session = target.connect().await?;
    services::set_keys(&session, &options.id, jwks.as_deref(), options.jwks_url.as_deref()).await?;
    output::done(&options.output, "changed", &options.id)
}

async fn trust_workload(target: Target, options: TrustWorkloadOptions) -> Result<u8> {
    let session = target.connect().await?;
    let TrustWorkloadOptions { id, issuer, conditions, audience, output } = options;
    let workload = services::trust_workload(&session, &id, &issuer, &conditions, audience.as_deref()).await?;
    if output.json {
        output::json(&json!({ "workload": workload }))?;
    } else {
        output::line(workload.to_string())?;
    }
    Ok(exit::OK)
}

async fn distrust_workload(target: Target, options: &DistrustWorkloadOptions) -> Result<u8> {
    let session = target.connect().await?;
    let reason = options.reason.as_deref();
    let distrusted = services::distrust_workload(&session, options.workload_id, reason).await?;
    output::changed(&options.output, "distrusted", distrusted, "nothing was changed: there is no such trust")
}
