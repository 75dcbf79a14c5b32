//! Webhooks: where events are sent to.

use futures_util::Stream;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use crate::contract;
use crate::contract::document::Document;
use crate::error::{Error, Result};

/// Rows of `tollgate.webhooks`.
pub async fn list(client: &Client) -> Result<impl Stream<Item = Result<Document>> + use<>> {
    contract::list_webhooks(client).await
}

/// `None` if there is no webhook of that name.
pub async fn show(client: &Client, name: &str) -> Result<Option<Document>> {
    contract::show_webhook(client, name).await
}

/// The messages of a webhook that are not delivered, the oldest first: rows of `tollgate.webhook_deliveries`.
pub async fn messages(
    client: &Client,
    name: &str,
    limit: i64,
) -> Result<impl Stream<Item = Result<Document>> + use<>> {
    contract::list_webhook_deliveries(client, name, limit).await
}

/// Returns the secret: the only time that it is shown.
pub async fn define(client: &Client, name: &str, url: &str, events: Option<&[String]>) -> Result<String> {
    contract::define_webhook(client, name, url, events).await
}

/// Returns the new secret: the only time that it is shown.
pub async fn rotate_secret(client: &Client, name: &str, grace: std::time::Duration) -> Result<String> {
    contract::rotate_webhook_secret(client, name, grace).await.map_err(no_such_webhook)
}

/// What can be switched: whether events are kept for it, and whether what is kept is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Switch {
    Enable,
    Disable,
    Pause,
    Resume,
}

/// False if it was so already.
pub async fn switch(client: &Client, name: &str, switch: Switch) -> Result<bool> {
    match switch {
        Switch::Enable => contract::set_webhook_enabled(client, name, true).await,
        Switch::Disable => contract::set_webhook_enabled(client, name, false).await,
        Switch::Pause => contract::set_webhook_paused(client, name, true).await,
        Switch::Resume => contract::set_webhook_paused(client, name, false).await,
    }
    .map_err(no_such_webhook)
}

/// False if that was its address already.
pub async fn set_url(client: &Client, name: &str, url: &str) -> Result<bool> {
    contract::set_webhook_url(client, name, url).await.map_err(no_such_webhook)
}

/// False if there is no webhook of that name.
pub async fn drop(client: &Client, name: &str) -> Result<bool> {
    contract::drop_webhook(client, name).await
}

/// Has messages sent now, all of the webhook or one, and says how many.
pub async fn replay(client: &Client, name: &str, message: Option<i64>) -> Result<u64> {
    contract::replay_webhook(client, name, message).await.map_err(no_such_webhook)
}

fn no_such_webhook(error: Error) -> Error {
    error.or_remedy(&SqlState::UNDEFINED_OBJECT, "give a name as `tollgated webhook list` shows it")
}
