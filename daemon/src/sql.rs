//! The SQL contract with the extension: every statement that we send to it, and the shapes that come back.
//!
//! Names here are the names there. Statements are not kept prepared: they are few, and one that outlives an
//! ALTER EXTENSION would fail until its session ends.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::pin::pin;

use futures_util::{Stream, StreamExt as _, TryStreamExt as _};
use jiff::Timestamp;
use postgres_types::{FromSql, Json, ToSql};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;
use tokio_postgres::{GenericClient, Statement};
use uuid::Uuid;

use crate::document::Document;
use crate::error::{Doing as _, Error, Result};
use crate::leader::Fence;

/// The channel on which the extension tells that access was taken away.
pub const CHANNEL: &str = "tollgate_events";

/// The functions that the daemon calls, each of which its role must be allowed to execute.
pub const OPERATOR_FUNCTIONS: [&str; 33] = [
    "ack_usage",
    "acquire_leadership",
    "admit_event_reader",
    "advance_subscription",
    "announce_expiries",
    "announce_expiries_after",
    "apply_findings",
    "apply_usage",
    "check_leadership",
    "claim_webhook_deliveries",
    "deployment_health",
    "drain_findings",
    "drain_usage",
    "event_position",
    "has_events",
    "expire_tokens",
    "expire_tokens_after",
    "finish_webhook_delivery",
    "open_subscription",
    "purge_audit_log",
    "purge_tokens",
    "purge_tokens_after",
    "purge_usage",
    "purge_usage_after",
    "purge_webhook_deliveries",
    "queue_webhook_deliveries",
    "read_events",
    "report_daemon",
    "seal_audit_log",
    "stats",
    "subscription_backlogs",
    "usage_applied",
    "usage_pressure",
];

/// The fence of each of these tasks that this session leads from now on; `None` while another does.
pub async fn acquire_leadership(
    client: &impl GenericClient,
    tasks: &[String],
) -> Result<BTreeMap<String, Option<i64>>> {
    const DOING: &str = "ask for leadership";
    let rows = client
        .query("select t, tollgate.acquire_leadership(t) from unnest($1::text[]) t", &[&tasks])
        .await
        .doing(DOING)?;
    rows.iter().map(|row| Ok((row.try_get(0).doing(DOING)?, row.try_get(1).doing(DOING)?))).collect()
}

/// A SELECT without FROM, which fails instead of calling its functions if another daemon leads by now. A person who runs a
/// command leads nothing, and fences nothing.
fn fenced(select: &str, fence: Option<&Fence>) -> String {
    match fence {
        None => select.to_owned(),
        Some(Fence { task, number }) => {
            format!("{select} where tollgate.check_leadership('{task}', {number})")
        }
    }
}

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

/// What is gone through from the front of an index on, a few rows a statement, because it is due by now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Due {
    Expiries,
    Announcements,
    EndedTokens,
    UsageHours,
    WebhookDeliveries,
}

/// A statement that deals with some of [`Due`].
#[derive(Clone, Debug)]
pub struct Walk {
    statement: Statement,
    function: &'static str,
    doing: &'static str,
}

/// Which row was looked at last, in the order of its index. The time is as the server wrote it: it may be infinite.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    at: Option<String>,
    token_id: Option<Uuid>,
}

/// What one statement did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Step {
    /// Fewer than were asked for only at the end.
    pub looked_at: u64,
    pub items: u64,
    pub place: Place,
}

impl Walk {
    pub async fn prepare(client: &impl GenericClient, fence: Option<&Fence>, what: Due) -> Result<Self> {
        let (function, time, done, doing) = match what {
            Due::Expiries => ("expire_tokens_after", "expires_at", "expired", "record expiries"),
            Due::Announcements => ("announce_expiries_after", "expires_at", "announced", "announce expiries"),
            Due::EndedTokens => ("purge_tokens_after", "ended_at", "purged", "delete ended tokens"),
            Due::UsageHours => ("purge_usage_after", "hour", "purged", "delete old hours of usage"),
            Due::WebhookDeliveries => ("purge_webhook_deliveries", "", "", "delete old webhook messages"),
        };
        // Called in a SELECT without FROM, for the fence; OFFSET keeps that a sub-select, so that it is called once.
        let call = match what {
            Due::Expiries => format!("select tollgate.{function}($2, $3::text::timestamptz, $4), $1::float8"),
            Due::WebhookDeliveries => format!("select tollgate.{function}(make_interval(secs => $1), $2)"),
            _ => format!(
                "select tollgate.{function}(make_interval(secs => $1), $2, $3::text::timestamptz, $4)"
            ),
        };
        let columns = match what {
            // They leave none behind.
            Due::WebhookDeliveries => "s.r, s.r, $3::text, $4::uuid".to_owned(),
            _ => format!("(s.r).looked_at, (s.r).{done}, (s.r).{time}::text, (s.r).token_id"),
        };
        let statement = format!("select {columns} from ({} offset 0) s (r)", fenced(&call, fence));
        Ok(Self { statement: client.prepare(&statement).await.doing(doing)?, function, doing })
    }

    /// Looks at up to `most` after a place, and deals with those that are due. The time is what they are kept for after they
    /// ended, or how long before their end they are announced.
    pub async fn step(
        &self,
        client: &impl GenericClient,
        time: std::time::Duration,
        most: i32,
        place: &Place,
    ) -> Result<Step> {
        let seconds = time.as_secs_f64();
        let values: [&(dyn ToSql + Sync); 4] = [&seconds, &most, &place.at, &place.token_id];
        let row = client.query_one(&self.statement, &values).await.doing(self.doing)?;
        let count = |column| unsigned(self.function, row.try_get(column).doing(self.doing)?);
        Ok(Step {
            looked_at: count(0)?,
            items: count(1)?,
            place: Place {
                at: row.try_get(2).doing(self.doing)?,
                token_id: row.try_get(3).doing(self.doing)?,
            },
        })
    }
}

/// Removes sealed events of the audit log that are older than the retention, whole stretches of at least `max_events` together if
/// there are as many, and says how many.
pub async fn purge_audit_log(
    client: &impl GenericClient,
    fence: Option<&Fence>,
    retention: std::time::Duration,
    max_events: i32,
) -> Result<u64> {
    let count = one(
        client,
        "delete old events of the audit log",
        &fenced("select tollgate.purge_audit_log(now() - make_interval(secs => $1), $2)", fence),
        &[&retention.as_secs_f64(), &max_events],
    )
    .await?;
    unsigned("purge_audit_log", count)
}

/// A place in the event log, as the server writes it. What is in it is the server's business; we keep it and hand it back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cursor(pub String);

impl Cursor {
    /// The place after an event of the page that was read from here: its last field is the next id.
    pub fn after(&self, id: i64) -> Self {
        let fields = self.0.rsplit_once(',').map_or("", |(fields, _)| fields);
        Self(format!("{fields},{})", id.saturating_add(1)))
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Event {
    pub id: i64,
    /// Together with the id it names an event for good: a promoted standby may give out ids again.
    #[serde(default)]
    pub epoch: Option<i64>,
    #[serde(default)]
    pub at: Option<String>,
    #[serde(default)]
    pub event: Option<String>,
    #[serde(default)]
    pub token_id: Option<String>,
    #[serde(default)]
    pub user_id: Option<String>,
    #[serde(default)]
    pub actor: Option<String>,
    #[serde(default)]
    pub client_addr: Option<String>,
    /// Text, as far as the extension is concerned; but whatever is in the log must come out of it.
    #[serde(default)]
    pub reason: Box<RawValue>,
    #[serde(default)]
    pub detail: Box<RawValue>,
}

/// Events after a cursor, in commit order, and the cursor after them: some 4 MB at most.
#[derive(Clone, Debug)]
pub struct Batch {
    pub events: Vec<Event>,
    /// The place before the events, in the batch that they are of: see [`Cursor::after`].
    pub start: Cursor,
    pub next: Cursor,
    /// There were no more of them.
    pub caught_up: bool,
}

/// The cursor from now on (`None`), from the beginning (0), or after the event with that id.
pub async fn event_position(client: &impl GenericClient, since: Option<i64>) -> Result<Cursor> {
    one(
        client,
        "find the place in the event log",
        "select p::text from tollgate.event_position($1) p",
        &[&since],
    )
    .await
    .map(Cursor)
}

/// Whether there may be events after a cursor, at a cost that does not depend on how many.
pub async fn has_events(client: &impl GenericClient, after: &Cursor) -> Result<bool> {
    one(client, "look for events", "select tollgate.has_events($1::text::tollgate.event_cursor)", &[&after.0])
        .await
}

pub async fn read_events(client: &impl GenericClient, after: &Cursor, max_events: i32) -> Result<Batch> {
    const DOING: &str = "read events";
    let row = client
        .query_one(
            "select b.events::text, b.cursor::text, b.next::text, b.caught_up \
             from tollgate.read_events($1::text::tollgate.event_cursor, $2) b",
            &[&after.0, &max_events],
        )
        .await
        .doing(DOING)?;
    Ok(Batch {
        events: events(row.try_get(0).doing(DOING)?)?,
        start: Cursor(row.try_get(1).doing(DOING)?),
        next: Cursor(row.try_get(2).doing(DOING)?),
        caught_up: row.try_get(3).doing(DOING)?,
    })
}

fn events(array: &str) -> Result<Vec<Event>> {
    serde_json::from_str(array).map_err(|error| {
        Error::failed(format!("could not read events: read_events() returned something else: {error}"))
            .with_remedy("use a tollgated of the same version as the extension")
    })
}

/// The cursor kept under this name, locked until the transaction ends; `None` while another session holds it.
pub async fn open_subscription(
    transaction: &tokio_postgres::Transaction<'_>,
    name: &str,
) -> Result<Option<Cursor>> {
    const DOING: &str = "open the subscription";
    let row = transaction
        .query_opt("select s::text from tollgate.open_subscription($1) s", &[&name])
        .await
        .doing(DOING)?;
    row.map(|row| row.try_get(0).doing(DOING).map(Cursor)).transpose()
}

/// Moves the cursor kept under this name; in the transaction that opened it.
pub async fn advance_subscription(
    transaction: &tokio_postgres::Transaction<'_>,
    name: &str,
    to: &Cursor,
) -> Result<()> {
    transaction
        .execute("select tollgate.advance_subscription($1, $2::text::tollgate.event_cursor)", &[&name, &to.0])
        .await
        .doing("advance the subscription")
        .map(drop)
}

/// What a call of `seal_audit_log` did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sealed {
    pub events: u64,
    /// Number and hash of the seal; `None` if there was nothing to seal.
    pub seal: Option<(i64, Vec<u8>)>,
}

/// Seals the next stretch of the event log, of about `batch_size` events at most.
pub async fn seal_audit_log(
    client: &impl GenericClient,
    fence: Option<&Fence>,
    batch_size: i32,
) -> Result<Sealed> {
    const DOING: &str = "seal the event log";
    let call = fenced("select tollgate.seal_audit_log($1) as sealed", fence);
    // OFFSET, or it would be called once for each column.
    let statement = format!("select (sealed).events, (sealed).seal, (sealed).hash from ({call} offset 0) s");
    let row = client.query_one(&statement, &[&batch_size]).await.doing(DOING)?;
    let (seal, hash): (Option<i64>, Option<Vec<u8>>) =
        (row.try_get(1).doing(DOING)?, row.try_get(2).doing(DOING)?);
    Ok(Sealed { events: unsigned("seal_audit_log", row.try_get(0).doing(DOING)?)?, seal: seal.zip(hash) })
}

/// A message that is to be sent now: `tollgate.webhook_message`.
pub struct WebhookMessage {
    pub id: i64,
    pub lease: Uuid,
    pub webhook: String,
    pub url: String,
    pub message_id: String,
    pub body: String,
    pub attempt: i32,
    pub secrets: Vec<Vec<u8>>,
}

impl std::fmt::Debug for WebhookMessage {
    /// Neither secrets nor the address, whose path may be one.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WebhookMessage")
            .field("webhook", &self.webhook)
            .field("message_id", &self.message_id)
            .field("attempt", &self.attempt)
            .finish_non_exhaustive()
    }
}

/// Queues messages of new events: of how many, and whether there are no more.
pub async fn queue_webhook_deliveries(client: &impl GenericClient, max_events: i32) -> Result<(u64, bool)> {
    const DOING: &str = "queue webhooks";
    let row = client
        .query_one("select events, caught_up from tollgate.queue_webhook_deliveries($1)", &[&max_events])
        .await
        .doing(DOING)?;
    let events = row.try_get(0).doing(DOING)?;
    Ok((unsigned("queue_webhook_deliveries", events)?, row.try_get(1).doing(DOING)?))
}

/// Messages that are due, up to `per_webhook` of each webhook, for as long as the lease lasts.
pub async fn claim_webhook_deliveries(
    client: &impl GenericClient,
    per_webhook: i32,
    lease: std::time::Duration,
) -> Result<Vec<WebhookMessage>> {
    const DOING: &str = "claim webhooks";
    let rows = client
        .query(
            "select id, lease, webhook, url, message_id, body, attempt, secrets \
             from tollgate.claim_webhook_deliveries($1, make_interval(secs => $2))",
            &[&per_webhook, &lease.as_secs_f64()],
        )
        .await
        .doing(DOING)?;
    rows.iter()
        .map(|row| {
            Ok(WebhookMessage {
                id: row.try_get(0).doing(DOING)?,
                lease: row.try_get(1).doing(DOING)?,
                webhook: row.try_get(2).doing(DOING)?,
                url: row.try_get(3).doing(DOING)?,
                message_id: row.try_get(4).doing(DOING)?,
                body: row.try_get(5).doing(DOING)?,
                attempt: row.try_get(6).doing(DOING)?,
                secrets: row.try_get(7).doing(DOING)?,
            })
        })
        .collect()
}

/// What came of a message: a status, or an error; neither if it was not sent. False if the lease had ended.
pub async fn finish_webhook_delivery(
    client: &impl GenericClient,
    message: &WebhookMessage,
    status: Option<u16>,
    error: Option<&str>,
    retry_after: Option<std::time::Duration>,
) -> Result<bool> {
    one(
        client,
        "record what came of a webhook",
        "select tollgate.finish_webhook_delivery($1, $2, $3, $4, make_interval(secs => $5))",
        &[
            &message.id,
            &message.lease,
            &status.map(i32::from),
            &error,
            &retry_after.map(|time| time.as_secs_f64()),
        ],
    )
    .await
}

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

/// The server's counters, as the JSON object of the row: what a later version adds is passed on.
pub async fn stats(client: &impl GenericClient) -> Result<Value> {
    one(client, "read the server's counters", "select to_jsonb(s) from tollgate.stats() s", &[]).await
}

/// The code of a token that asks to read events, and its id.
pub async fn admit_event_reader(
    client: &impl GenericClient,
    token_hash: &[u8],
    client_ip: IpAddr,
) -> Result<(String, Option<Uuid>)> {
    const DOING: &str = "verify a reader of events";
    let row = client
        .query_one(
            "select code, token_id from tollgate.admit_event_reader($1, $2)",
            &[&token_hash, &client_ip],
        )
        .await
        .doing(DOING)?;
    Ok((row.try_get(0).doing(DOING)?, row.try_get(1).doing(DOING)?))
}

/// What `/metrics` shows of the server, all of it at one moment.
#[derive(Clone, Debug, Deserialize)]
pub struct Observation {
    /// As [`stats`] returns it.
    pub stats: Value,
    /// Name, pending events, and since when in seconds of the epoch: rows of `tollgate.subscription_backlogs()`.
    pub subscriptions: Vec<Backlog>,
    pub webhooks: Vec<WebhookState>,
    pub notification_queue_usage: f64,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Backlog {
    pub name: String,
    /// `None` for a cursor that the server cannot follow.
    pub pending: Option<u64>,
    pub oldest_at: Option<f64>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct WebhookState {
    pub name: String,
    pub enabled: bool,
    pub paused: bool,
    pub pending: u64,
    pub dead: u64,
}

pub async fn observe(client: &impl GenericClient) -> Result<Observation> {
    let observation: Value = one(
        client,
        "read the server's counters",
        "select jsonb_build_object(\
             'stats', to_jsonb(s), 'notification_queue_usage', pg_notification_queue_usage(), \
             'subscriptions', (select coalesce(jsonb_agg(jsonb_build_object('name', b.name, 'pending', b.pending, \
                  'oldest_at', extract(epoch from b.oldest_at))), '[]') from tollgate.subscription_backlogs() b), \
             'webhooks', (select coalesce(jsonb_agg(jsonb_build_object('name', w.name, 'enabled', w.enabled, \
                  'paused', w.paused_at is not null, 'pending', w.pending, 'dead', w.dead)), '[]') from tollgate.webhooks w)) \
         from tollgate.stats() s",
        &[],
    )
    .await?;
    serde_json::from_value(observation).map_err(|error| {
        Error::failed(format!("could not read the server's counters: they are something else: {error}"))
            .with_remedy("use a tollgated of the same version as the extension")
    })
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

/// A row of `tollgate.deployment_health`.
#[derive(Clone, Debug, PartialEq)]
pub struct Health {
    pub aspect: String,
    pub severity: String,
    pub detail: String,
    pub mend: Option<String>,
}

/// What is amiss, as seen from inside; a transaction or a delay counts once it lasts longer than `patience`.
pub async fn deployment_health(
    client: &impl GenericClient,
    patience: std::time::Duration,
) -> Result<Vec<Health>> {
    const DOING: &str = "look at the health of the deployment";
    let rows = client
        .query(
            "select aspect, severity, detail, mend from tollgate.deployment_health(make_interval(secs => $1))",
            &[&patience.as_secs_f64()],
        )
        .await
        .doing(DOING)?;
    rows.iter()
        .map(|row| {
            Ok(Health {
                aspect: row.try_get(0).doing(DOING)?,
                severity: row.try_get(1).doing(DOING)?,
                detail: row.try_get(2).doing(DOING)?,
                mend: row.try_get(3).doing(DOING)?,
            })
        })
        .collect()
}

/// What a standby found and cannot write, as it stands in `tollgate.finding[]`: signed, and nothing that we look into.
#[derive(Clone, Debug, PartialEq)]
pub struct Findings(String);

/// `None` if it found nothing.
pub async fn drain_findings(client: &impl GenericClient) -> Result<Option<Findings>> {
    let text: Option<String> = one(
        client,
        "drain findings",
        "select array_agg(f)::text from (select f from tollgate.drain_findings() f limit 1000) f",
        &[],
    )
    .await?;
    Ok(text.map(Findings))
}

/// Has recorded what verifications found and could not write: those of this server, and those of a standby. How many they were.
pub async fn apply_findings(
    client: &impl GenericClient,
    fence: Option<&Fence>,
    findings: Option<&Findings>,
) -> Result<u64> {
    const DOING: &str = "record what verifications found";
    let statement =
        fenced("select tollgate.apply_findings(coalesce($1::text, '{}')::tollgate.finding[])", fence);
    let rows = client.query(&statement, &[&findings.map(|findings| &findings.0)]).await.doing(DOING)?;
    match rows.first() {
        Some(row) => unsigned("apply_findings", row.try_get(0).doing(DOING)?),
        None => Ok(0),
    }
}

/// When a token is to end; not both.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ending {
    pub expires_in: Option<std::time::Duration>,
    pub expires_at: Option<Timestamp>,
}

impl Ending {
    fn seconds(&self) -> Option<f64> {
        self.expires_in.map(|time| time.as_secs_f64())
    }
}

/// What a new token is to be.
#[derive(Debug)]
pub struct NewToken<'a> {
    pub user_id: &'a str,
    pub name: &'a str,
    pub scopes: &'a [String],
    pub ending: Ending,
    /// JSON.
    pub metadata: &'a str,
    pub allowed_ips: Option<&'a [String]>,
    pub rate_limit: Option<i32>,
    pub rate_window: std::time::Duration,
    pub prefix: Option<&'a str>,
}

/// `tollgate.issued_token`, with the plaintext in it.
pub async fn create_api_token(client: &impl GenericClient, new: &NewToken<'_>) -> Result<Value> {
    one(
        client,
        "create the token",
        "select to_jsonb(t) from tollgate.create_api_token(\
             user_id => $1, name => $2, scopes => $3, expires_in => make_interval(secs => $4), \
             metadata => $5::text::jsonb, allowed_ips => $6::text[]::cidr[], rate_limit => $7, \
             rate_window => make_interval(secs => $8), prefix => $9, expires_at => $10) t",
        &[
            &new.user_id,
            &new.name,
            &new.scopes,
            &new.ending.seconds(),
            &new.metadata,
            &new.allowed_ips,
            &new.rate_limit,
            &new.rate_window.as_secs_f64(),
            &new.prefix,
            &new.ending.expires_at,
        ],
    )
    .await
}

/// A token to be taken over by its digest.
#[derive(Clone, Debug, PartialEq)]
pub struct Imported {
    pub user_id: String,
    pub name: String,
    pub token_hash: Vec<u8>,
    pub scopes: Vec<String>,
    pub expires_at: Option<Timestamp>,
    pub created_at: Option<Timestamp>,
    pub last_used_at: Option<Timestamp>,
    pub disabled_at: Option<Timestamp>,
    pub revoked_at: Option<Timestamp>,
    /// JSON, as it was given.
    pub metadata: String,
    pub allowed_ips: Option<Vec<String>>,
    pub rate_limit: Option<i32>,
    pub rate_window: Option<std::time::Duration>,
}

/// What [`import_api_token`] takes, prepared once for many.
pub async fn prepare_import(client: &impl GenericClient) -> Result<tokio_postgres::Statement> {
    client
        .prepare(
            "select tollgate.import_api_token(\
                 user_id => $1, name => $2, token_hash => $3, scopes => $4, expires_at => $5, \
                 metadata => $6::text::jsonb, allowed_ips => $7::text[]::cidr[], rate_limit => $8, \
                 rate_window => make_interval(secs => $9), format => $10, created_at => $11, \
                 last_used_at => $12, disabled_at => $13, revoked_at => $14)",
        )
        .await
        .doing("prepare the import")
}

pub async fn import_api_token(
    client: &impl GenericClient,
    statement: &tokio_postgres::Statement,
    new: &Imported,
    format: &str,
) -> Result<()> {
    client
        .execute(
            statement,
            &[
                &new.user_id,
                &new.name,
                &new.token_hash,
                &new.scopes,
                &new.expires_at,
                &new.metadata,
                &new.allowed_ips,
                &new.rate_limit,
                &new.rate_window.unwrap_or(std::time::Duration::from_secs(60)).as_secs_f64(),
                &format,
                &new.created_at,
                &new.last_used_at,
                &new.disabled_at,
                &new.revoked_at,
            ],
        )
        .await
        .doing("import the token")
        .map(drop)
}

/// The row of `tollgate.tokens`; `None` if there is no such token.
pub async fn show_api_token(client: &impl GenericClient, token_id: Uuid) -> Result<Option<Document>> {
    let rows = many::<Json<Document>>(
        client,
        "look up the token",
        "select to_jsonb(t) from tollgate.tokens t where t.id = $1",
        &[&token_id],
    )
    .await?;
    Ok(rows.into_iter().next().map(|Json(row)| row))
}

/// `tollgate.issued_token`, with the plaintext in it.
pub async fn rotate_api_token(
    client: &impl GenericClient,
    token_id: Uuid,
    grace: std::time::Duration,
    ending: &Ending,
    revoke_on_reuse: bool,
) -> Result<Value> {
    one(
        client,
        "rotate the token",
        "select to_jsonb(t) from tollgate.rotate_api_token(\
             $1, make_interval(secs => $2), make_interval(secs => $3), $4, $5) t",
        &[&token_id, &grace.as_secs_f64(), &ending.seconds(), &ending.expires_at, &revoke_on_reuse],
    )
    .await
}

/// `tollgate.issued_token`, with the plaintext in it. The parent is a bind value: see [`crate::db::hide_bind_values`].
pub async fn derive_api_token(
    client: &impl GenericClient,
    parent: &str,
    name: &str,
    scopes: &[String],
    ending: &Ending,
    allowed_ips: Option<&[String]>,
) -> Result<Value> {
    one(
        client,
        "derive the token",
        "select to_jsonb(t) from tollgate.derive_api_token(\
             $1, $2, $3, make_interval(secs => $4), $5::text[]::cidr[], expires_at => $6) t",
        &[&parent, &name, &scopes, &ending.seconds(), &allowed_ips, &ending.expires_at],
    )
    .await
}

/// False when unknown or so already.
pub async fn set_api_token_enabled(
    client: &impl GenericClient,
    token_id: Uuid,
    enabled: bool,
    reason: Option<&str>,
) -> Result<bool> {
    one(
        client,
        if enabled { "enable the token" } else { "disable the token" },
        "select tollgate.set_api_token_enabled($1, $2, $3)",
        &[&token_id, &enabled, &reason],
    )
    .await
}

/// Rows of `tollgate.list_scopes`.
pub async fn list_scopes<C: GenericClient>(
    client: &C,
) -> Result<impl Stream<Item = Result<Document>> + use<C>> {
    documents(client, "list the scopes", "select to_jsonb(s) from tollgate.list_scopes() s", &[]).await
}

pub async fn define_scope(client: &impl GenericClient, name: &str, description: &str) -> Result<()> {
    client
        .execute("select tollgate.define_scope($1, $2)", &[&name, &description])
        .await
        .doing("define the scope")
        .map(drop)
}

pub async fn drop_scope(client: &impl GenericClient, name: &str) -> Result<()> {
    client.execute("select tollgate.drop_scope($1)", &[&name]).await.doing("drop the scope").map(drop)
}

/// Rows of `tollgate.tokens`.
pub async fn list_api_tokens<C: GenericClient>(
    client: &C,
    user_id: &str,
) -> Result<impl Stream<Item = Result<Document>> + use<C>> {
    documents(
        client,
        "list tokens",
        "select to_jsonb(t) from tollgate.list_api_tokens($1) t order by t.created_at, t.id",
        &[&user_id],
    )
    .await
}

/// `tollgate.verification`.
pub async fn verify_api_token_hash(
    client: &impl GenericClient,
    token_hash: &[u8],
    required_scopes: Option<&[String]>,
    client_ip: Option<IpAddr>,
) -> Result<Document> {
    verify(client, "verify_api_token_hash", &token_hash, required_scopes, client_ip).await
}

/// [`verify_api_token_hash`] of a token that may be stored in the form of another system. The token is a
/// bind value: see [`crate::db::hide_bind_values`].
pub async fn verify_api_token(
    client: &impl GenericClient,
    token: &str,
    required_scopes: Option<&[String]>,
    client_ip: Option<IpAddr>,
) -> Result<Document> {
    verify(client, "verify_api_token", &token, required_scopes, client_ip).await
}

async fn verify(
    client: &impl GenericClient,
    function: &str,
    presented: &(dyn ToSql + Sync),
    required_scopes: Option<&[String]>,
    client_ip: Option<IpAddr>,
) -> Result<Document> {
    let statement = format!("select to_jsonb(v) from tollgate.{function}($1, $2, $3) v");
    let Json(verification) =
        one(client, "verify the token", &statement, &[presented, &required_scopes, &client_ip]).await?;
    Ok(verification)
}

/// False when unknown, not that user's, or revoked already.
pub async fn revoke_api_token(
    client: &impl GenericClient,
    token_id: Uuid,
    user_id: Option<&str>,
    reason: Option<&str>,
) -> Result<bool> {
    one(
        client,
        "revoke the token",
        "select tollgate.revoke_api_token($1, $2, $3)",
        &[&token_id, &user_id, &reason],
    )
    .await
}

/// False when unknown or revoked already. The token is a bind value: see [`crate::db::hide_bind_values`].
pub async fn revoke_presented_token(
    client: &impl GenericClient,
    token: &str,
    reason: Option<&str>,
) -> Result<bool> {
    one(client, "revoke the token", "select tollgate.revoke_presented_token($1, $2)", &[&token, &reason])
        .await
}

async fn one<T: for<'a> FromSql<'a>>(
    client: &impl GenericClient,
    doing: &str,
    statement: &str,
    values: &[&(dyn ToSql + Sync)],
) -> Result<T> {
    client.query_one(statement, values).await.doing(doing)?.try_get(0).doing(doing)
}

async fn many<T: for<'a> FromSql<'a>>(
    client: &impl GenericClient,
    doing: &str,
    statement: &str,
    values: &[&(dyn ToSql + Sync)],
) -> Result<Vec<T>> {
    let rows = client.query(statement, values).await.doing(doing)?;
    rows.iter().map(|row| row.try_get(0).doing(doing)).collect()
}

/// Rows as they come: the server is asked for more only as they are taken, so that a few of them are in memory.
async fn documents<C: GenericClient>(
    client: &C,
    doing: &'static str,
    statement: &str,
    values: &[&(dyn ToSql + Sync)],
) -> Result<impl Stream<Item = Result<Document>> + use<C>> {
    let rows = client.query_raw(statement, values.iter().copied()).await.doing(doing)?;
    Ok(rows.map(move |row| row.and_then(|row| row.try_get(0)).doing(doing).map(|Json(document)| document)))
}

fn unsigned(function: &str, count: i64) -> Result<u64> {
    u64::try_from(count)
        .map_err(|_| Error::failed(format!("{function}() returned {count}, which is no count")))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[expect(clippy::needless_pass_by_value, reason = "for json!")]
    fn read(array: Value) -> Result<Vec<Event>> {
        events(&array.to_string())
    }

    #[test]
    fn whatever_json_an_event_holds_is_read_as_it_is() {
        let deep = "[".repeat(100_000) + &"]".repeat(100_000);
        for value in ["1e400", "12345678901234567890123", "-0.10", &deep] {
            let read =
                events(&format!(r#"[{{"id": 1, "detail": {{"n": {value}}}, "new": {value}}}, {{"id": 2}}]"#))
                    .unwrap();
            assert_eq!((read[0].detail.get(), read[1].id), (&*format!(r#"{{"n": {value}}}"#), 2));
        }
    }

    #[test]
    fn an_event_of_the_extension_is_read_whole() {
        let read = read(json!([{
            "id": 7, "epoch": 2, "at": "2030-01-02T03:04:05.678901+00:00", "event": "token.revoked",
            "token_id": "018f4a6e-0000-7000-8000-000000000000", "user_id": "ann", "actor": "app",
            "client_addr": "10.0.0.1", "reason": "leaked", "detail": {"by": "scanner"}
        }]))
        .unwrap();
        assert_eq!(read.len(), 1);
        assert_eq!((read[0].id, read[0].epoch), (7, Some(2)));
        assert_eq!(read[0].event.as_deref(), Some("token.revoked"));
        assert_eq!(read[0].reason.get(), r#""leaked""#);
        assert_eq!(read[0].detail.get(), r#"{"by":"scanner"}"#);
    }

    #[test]
    fn an_event_of_a_kind_we_have_never_heard_of_is_read_all_the_same() {
        let read =
            read(json!([{"id": 8, "event": "moon.landed", "token_id": null, "phase": "full"}])).unwrap();
        assert_eq!(read[0].event.as_deref(), Some("moon.landed"));
        assert_eq!((&read[0].token_id, read[0].reason.get()), (&None, "null"));
    }

    #[test]
    fn what_is_no_array_of_events_is_an_error_and_not_an_empty_batch() {
        for other in [json!(null), json!({}), json!([{"event": "without an id"}])] {
            assert!(read(other.clone()).is_err(), "{other}");
        }
        assert!(read(json!([])).unwrap().is_empty());
    }

    #[test]
    fn a_negative_count_is_an_error() {
        assert!(unsigned("expire_tokens", -1).is_err());
        assert_eq!(unsigned("expire_tokens", 3).unwrap(), 3);
    }
}
