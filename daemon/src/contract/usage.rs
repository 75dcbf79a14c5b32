//! Counters of use: drain, apply, acknowledge.

use std::net::IpAddr;
use std::pin::pin;

use futures_util::TryStreamExt as _;
use jiff::Timestamp;
use postgres_types::{FromSql, ToSql};
use tokio_postgres::GenericClient;
use uuid::Uuid;

use super::leadership::{Fence, fenced};
use super::query::{one, unsigned};
use crate::error::{Doing as _, Error, Result};

/// What one token was used in one generation of counters: `tollgate.usage_row`.
#[derive(Clone, Debug, PartialEq, FromSql, ToSql)]
#[postgres(name = "usage_row")]
pub struct UsageRow {
    pub token_id: Uuid,
    pub uses: i64,
    pub denials: i64,
    pub last_used_at: Option<Timestamp>,
    pub last_used_ip: Option<IpAddr>,
}

/// Counters that the server has closed and keeps until they are acknowledged.
#[derive(Clone, Debug, PartialEq)]
pub struct Generation {
    pub node: String,
    pub boot: Uuid,
    pub number: i64,
    pub rows: Vec<UsageRow>,
    /// By which the database knows that a server of its own handed them out.
    pub signature: Vec<u8>,
}

/// `None` when nothing was counted.
pub async fn drain_usage(client: &impl GenericClient) -> Result<Option<Generation>> {
    const DOING: &str = "drain usage";
    // Row by row: as the client collects them they would take several times as much memory.
    let rows = client
        .query_raw(
            "select node, boot, generation, token_id, uses, denials, last_used_at, last_used_ip, signature \
             from tollgate.drain_usage()",
            std::iter::empty::<&(dyn ToSql + Sync)>(),
        )
        .await
        .doing(DOING)?;
    let mut rows = pin!(rows);
    let mut generation: Option<Generation> = None;
    while let Some(row) = rows.try_next().await.doing(DOING)? {
        let usage = UsageRow {
            token_id: row.try_get(3).doing(DOING)?,
            uses: row.try_get(4).doing(DOING)?,
            denials: row.try_get(5).doing(DOING)?,
            last_used_at: row.try_get(6).doing(DOING)?,
            last_used_ip: row.try_get(7).doing(DOING)?,
        };
        let (node, boot, number) =
            (row.try_get(0).doing(DOING)?, row.try_get(1).doing(DOING)?, row.try_get(2).doing(DOING)?);
        match &mut generation {
            None => {
                let signature = row.try_get(8).doing(DOING)?;
                generation = Some(Generation { node, boot, number, rows: vec![usage], signature });
            }
            Some(first) if first.node == node && first.boot == boot && first.number == number => {
                first.rows.push(usage);
            }
            // To acknowledge one would drop the other.
            Some(_) => {
                return Err(Error::failed(
                    "could not drain usage: drain_usage() returned two generations at once",
                ));
            }
        }
    }
    Ok(generation)
}

/// Adds the counters to the tables. False when they had been added before.
pub async fn apply_usage(
    client: &impl GenericClient,
    fence: Option<&Fence>,
    generation: &Generation,
) -> Result<bool> {
    one(
        client,
        "apply usage",
        &fenced("select tollgate.apply_usage($1, $2, $3, $4, $5)", fence),
        &[&generation.node, &generation.boot, &generation.number, &generation.rows, &generation.signature],
    )
    .await
}

/// Whether the database, of which this server may be a standby, has these counters.
pub async fn usage_applied(client: &impl GenericClient, generation: &Generation) -> Result<bool> {
    one(
        client,
        "ask whether usage was applied",
        "select tollgate.usage_applied($1, $2, $3)",
        &[&generation.node, &generation.boot, &generation.number],
    )
    .await
}

/// Lets the server forget the counters; only once [`apply_usage`] has committed.
pub async fn ack_usage(client: &impl GenericClient, generation: i64) -> Result<bool> {
    one(client, "acknowledge usage", "select tollgate.ack_usage($1)", &[&generation]).await
}

/// How near the server is to having no room for counters.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pressure {
    /// Which part of the room holds counters that are not flushed, from 0 to 1.
    pub pressure: f64,
    /// Uses that found no room since the server started, in all its databases.
    pub overflowed: u64,
}

pub async fn usage_pressure(client: &impl GenericClient) -> Result<Pressure> {
    const DOING: &str = "read how full the table of counters is";
    let row = client
        .query_one("select pressure, overflowed from tollgate.usage_pressure()", &[])
        .await
        .doing(DOING)?;
    let overflowed = unsigned("usage_pressure", row.try_get(1).doing(DOING)?)?;
    Ok(Pressure { pressure: row.try_get(0).doing(DOING)?, overflowed })
}
