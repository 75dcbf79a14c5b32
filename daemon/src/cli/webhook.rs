//! `tollgated webhook …`: where events are sent to.

use serde_json::{Value, json};

use super::list::List;
use super::token::read_secret;
use crate::app::webhooks;
use crate::app::webhooks::Switch;
use crate::cli::output;
use crate::cli::output::{Column, Tone};
use crate::config::{
    CreateWebhookOptions, OutputOptions, ReplayOptions, RotateSecretOptions, WebhookAddress, WebhookCommand,
    WebhookMessagesOptions, WebhookOptions, WebhookUrlOptions,
};
use crate::contract::document::Document;
use crate::error::Result;
use crate::postgres::target::Target;
use crate::process::exit;

pub(super) async fn webhook(target: Target, command: WebhookCommand) -> Result<u8> {
    match command {
        WebhookCommand::Create(options) => create(target, options).await,
        WebhookCommand::List(output) => list(target, &output).await,
        WebhookCommand::Show(options) => show(target, options).await,
        WebhookCommand::Messages(options) => messages(target, options).await,
        WebhookCommand::SetUrl(options) => set_url(target, options).await,
        WebhookCommand::RotateSecret(options) => rotate_secret(target, options).await,
        WebhookCommand::Pause(options) => switch(target, options, Switch::Pause).await,
        WebhookCommand::Resume(options) => switch(target, options, Switch::Resume).await,
        WebhookCommand::Disable(options) => switch(target, options, Switch::Disable).await,
        WebhookCommand::Enable(options) => switch(target, options, Switch::Enable).await,
        WebhookCommand::Replay(options) => replay(target, options).await,
        WebhookCommand::Delete(options) => delete(target, options).await,
    }
}

fn address(from: WebhookAddress) -> Result<String> {
    match from {
        WebhookAddress { url: Some(url), .. } => Ok(url),
        WebhookAddress { url_file, .. } => {
            let file = url_file.unwrap_or_else(|| "-".into());
            read_secret(&file, "address", "Address (not shown): ").map(|text| text.to_string())
        }
    }
}

/// Prints a secret at the only time that it can be.
fn hand_out(name: &str, secret: &str, output: &OutputOptions) -> Result<u8> {
    if output.json {
        output::json(&json!({ "webhook": name, "secret": secret }))?;
    } else if output.quiet {
        output::line(secret)?;
    } else {
        output::line(output::facts(&[("webhook", name.to_owned()), ("secret", secret.to_owned())]))?;
        eprintln!("Give the secret to the receiver now: it cannot be shown again.");
    }
    Ok(exit::OK)
}

async fn create(target: Target, options: CreateWebhookOptions) -> Result<u8> {
    let url = address(options.address)?;
    let events = (!options.events.is_empty()).then_some(options.events.as_slice());
    let session = target.connect().await?;
    let secret = webhooks::define(&session, &options.name, &url, events).await?;
    hand_out(&options.name, &secret, &options.output)
}

async fn list(target: Target, options: &OutputOptions) -> Result<u8> {
    let columns = [
        Column::whole("NAME"),
        Column::whole("STATUS"),
        Column::whole("PENDING"),
        Column::whole("DEAD"),
        Column::spare("LAST SUCCESS"),
        Column::spare("LAST FAILURE"),
        Column::cut("URL"),
        Column::cut("LAST ERROR"),
    ];
    let row = |webhook: &Document| {
        [
            webhook.field("name"),
            status(webhook).to_owned(),
            webhook.field("pending"),
            webhook.field("dead"),
            webhook.moment("last_success_at"),
            webhook.moment("last_failure_at"),
            webhook.field("url"),
            webhook.field("last_error"),
        ]
    };
    let session = target.connect().await?;
    let rows = webhooks::list(&session).await?;
    let list = List { key: "name", columns, row, tone: status_tone };
    if list.print(rows, options).await?.is_none() && options.is_for_people() {
        output::line("there are no webhooks: make one with `tollgated webhook create`")?;
    }
    Ok(exit::OK)
}

fn status(webhook: &Document) -> &'static str {
    if !webhook.is_true("enabled") {
        "disabled"
    } else if webhook.has("paused_at") {
        "paused"
    } else {
        "active"
    }
}

fn status_tone(cell: &str) -> Tone {
    match cell {
        "active" | "disabled" => Tone::of(cell),
        "paused" => Tone::Doubtful,
        _ => Tone::Plain,
    }
}

async fn show(target: Target, options: WebhookOptions) -> Result<u8> {
    let session = target.connect().await?;
    let Some(webhook) = webhooks::show(&session, &options.name).await? else {
        if options.output.json {
            output::json(&Value::Null)?;
        } else if !options.output.quiet {
            output::line(format!("there is no webhook {}", options.name))?;
        }
        return Ok(exit::NO);
    };
    if options.output.json {
        output::json(&webhook)?;
    } else if options.output.quiet {
        output::line(status(&webhook))?;
    } else {
        output::line(output::facts(&known(&webhook)))?;
    }
    Ok(exit::OK)
}

/// What is known of a webhook; what does not apply to it is left out.
fn known(webhook: &Document) -> Vec<(&'static str, String)> {
    let mut facts = vec![("webhook", webhook.field("name")), ("status", status(webhook).to_owned())];
    for (name, key) in [
        ("url", "url"),
        ("events", "events"),
        ("disabled because", "disabled_reason"),
        ("paused since", "paused_at"),
        ("pending", "pending"),
        ("dead", "dead"),
        ("last success", "last_success_at"),
        ("last failure", "last_failure_at"),
        ("last error", "last_error"),
        ("old secret until", "old_secret_until"),
        ("created", "created_at"),
        ("created by", "created_by"),
    ] {
        if webhook.has(key) {
            let time = key.ends_with("_at") || key.ends_with("_until");
            facts.push((name, if time { webhook.moment(key) } else { webhook.field(key) }));
        }
    }
    facts
}

async fn messages(target: Target, options: WebhookMessagesOptions) -> Result<u8> {
    let columns = [
        Column::whole("ID"),
        Column::whole("EVENT"),
        Column::whole("STATE"),
        Column::whole("ATTEMPTS"),
        Column::whole("NEXT ATTEMPT"),
        Column::spare("QUEUED"),
        Column::spare("MESSAGE"),
        Column::cut("LAST ERROR"),
    ];
    let row = |message: &Document| {
        [
            message.field("id"),
            message.field("event"),
            message.field("state"),
            message.field("attempts"),
            message.moment("next_attempt_at"),
            message.moment("created_at"),
            message.field("message_id"),
            message.field("last_error"),
        ]
    };
    let session = target.connect().await?;
    let rows = webhooks::messages(&session, &options.name, options.limit).await?;
    let list = List { key: "id", columns, row, tone: |_| Tone::Plain };
    if list.print(rows, &options.output).await?.is_none() && options.output.is_for_people() {
        output::line("there are no messages that are not delivered")?;
    }
    Ok(exit::OK)
}

async fn set_url(target: Target, options: WebhookUrlOptions) -> Result<u8> {
    let url = address(options.address)?;
    let session = target.connect().await?;
    let changed = webhooks::set_url(&session, &options.name, &url).await?;
    output::changed(&options.output, "changed", changed, "nothing was changed: that is its address already")
}

async fn rotate_secret(target: Target, options: RotateSecretOptions) -> Result<u8> {
    let session = target.connect().await?;
    let secret = webhooks::rotate_secret(&session, &options.name, options.grace).await?;
    hand_out(&options.name, &secret, &options.output)
}

async fn switch(target: Target, options: WebhookOptions, switch: Switch) -> Result<u8> {
    let (done, otherwise) = match switch {
        Switch::Enable => ("enabled", "nothing was enabled: it is enabled already"),
        Switch::Disable => ("disabled", "nothing was disabled: it is disabled already"),
        Switch::Pause => ("paused", "nothing was paused: it is paused already"),
        Switch::Resume => ("resumed", "nothing was resumed: it is not paused"),
    };
    let session = target.connect().await?;
    let changed = webhooks::switch(&session, &options.name, switch).await?;
    output::changed(&options.output, done, changed, otherwise)
}

async fn replay(target: Target, options: ReplayOptions) -> Result<u8> {
    let session = target.connect().await?;
    let replayed = webhooks::replay(&session, &options.name, options.message).await?;
    if options.output.json {
        output::json(&json!({ "replayed": replayed }))?;
    } else if !options.output.quiet {
        output::line(match replayed {
            0 => "there are no messages to send again".to_owned(),
            1 => "1 message is sent again".to_owned(),
            _ => format!("{replayed} messages are sent again"),
        })?;
    }
    Ok(if replayed > 0 { exit::OK } else { exit::NO })
}

async fn delete(target: Target, options: WebhookOptions) -> Result<u8> {
    let session = target.connect().await?;
    let deleted = webhooks::drop(&session, &options.name).await?;
    output::changed(&options.output, "deleted", deleted, "nothing was deleted: there is no such webhook")
}
