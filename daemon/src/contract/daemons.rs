//! The daemons that serve a database, as they report themselves.

use jiff::Timestamp;
use postgres_types::Json;
use serde_json::Value;
use tokio_postgres::GenericClient;
use uuid::Uuid;

use super::document::Document;
use super::query::many;
use crate::error::{Doing as _, Result};

/// Who this daemon is, for as long as it runs.
#[derive(Clone, Debug)]
pub struct Identity {
    pub instance: Uuid,
    pub hostname: String,
    pub pid: i32,
    pub started_at: Timestamp,
}

pub async fn report_daemon(client: &impl GenericClient, who: &Identity, tasks: &Value) -> Result<()> {
    client
        .execute(
            "select tollgate.report_daemon($1, $2, $3, $4, $5, $6)",
            &[&who.instance, &who.hostname, &who.pid, &env!("CARGO_PKG_VERSION"), &who.started_at, tasks],
        )
        .await
        .doing("report to the server")
        .map(drop)
}

/// The daemons and their tasks, each with `seconds_since_seen` by the server's own clock, the latest first.
pub async fn daemons(client: &impl GenericClient) -> Result<Vec<Value>> {
    let daemons = many::<Json<Document>>(
        client,
        "read which daemons there are",
        "select to_jsonb(d) || jsonb_build_object('seconds_since_seen', \
             extract(epoch from clock_timestamp() - d.last_seen_at)) \
         from tollgate.daemons d order by d.last_seen_at desc, d.instance",
        &[],
    )
    .await?;
    Ok(daemons.into_iter().map(|Json(daemon)| daemon.into_value()).collect())
}
