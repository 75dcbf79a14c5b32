//! Shared by the tests of usage, events and the daemon: the daemon's role, a database per test, and the daemon's
//! protocols by hand.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use jiff::Timestamp;
use postgres_types::ToSql;
use serde_json::Value;
use tokio_postgres::Client;
use tollgate_tests::{Cluster, DATABASE};
use uuid::Uuid;

use crate::common;

/// An ordinary role that may do what the daemon needs, and nothing else.
pub(crate) const OPERATOR: &str = "tollgated";

/// What the capability gives, as the database says it, without the event that granting it leaves.
pub(crate) const GRANTS: &str = "
    do $$ declare given record; begin
        for given in select * from tollgate.capability_objects('operator') loop
            execute format('grant %s on %s %s to tollgated', given.privilege,
                           case given.object_type when 'VIEW' then 'TABLE' else given.object_type end, given.object);
        end loop;
    end $$";

/// A database per test, so that tests can share a server and still have their own counters and log.
pub(crate) struct Db {
    pub(crate) cluster: Arc<Cluster>,
    pub(crate) name: String,
    /// The superuser, which owns the extension.
    pub(crate) owner: Client,
    /// An application's ordinary role: it verifies and authenticates.
    pub(crate) web: Client,
    /// The ordinary role of [`OPERATOR`].
    pub(crate) operator: Client,
}

impl Db {
    pub(crate) async fn create(cluster: &Arc<Cluster>, name: &str) -> Result<Self> {
        common::database(cluster, name)?;
        grant(cluster, name)?;
        Self::connect(cluster, name).await
    }

    /// For a cluster that [`common::start`] created for one test.
    pub(crate) async fn only(cluster: &Arc<Cluster>) -> Result<Self> {
        grant(cluster, DATABASE)?;
        Self::connect(cluster, DATABASE).await
    }

    async fn connect(cluster: &Arc<Cluster>, name: &str) -> Result<Self> {
        Ok(Self {
            cluster: Arc::clone(cluster),
            name: name.to_owned(),
            owner: cluster.connect("postgres", name).await?,
            web: cluster.connect("web", name).await?,
            operator: cluster.connect(OPERATOR, name).await?,
        })
    }

    /// One more connection.
    pub(crate) async fn session(&self, role: &str) -> Result<Client> {
        self.cluster.connect(role, &self.name).await
    }

    /// The address at which the daemon finds this database, as the operator.
    pub(crate) fn url(&self) -> String {
        self.cluster.url(OPERATOR, &self.name)
    }
}

/// Grants the operator, which is created at the first call, what the daemon needs in a database.
pub(crate) fn grant(cluster: &Cluster, database: &str) -> Result<()> {
    cluster.execute(
        database,
        "do $$ begin
             create role tollgated login;
         exception when duplicate_object or unique_violation then
             -- Another test was faster.
         end $$",
    )?;
    cluster.execute(database, GRANTS)
}

/// `tollgate.usage_row`.
#[derive(Clone, Debug, PartialEq, ToSql)]
#[postgres(name = "usage_row")]
pub(crate) struct UsageRow {
    pub(crate) token_id: Uuid,
    pub(crate) uses: i64,
    pub(crate) denials: i64,
    pub(crate) last_used_at: Option<Timestamp>,
    pub(crate) last_used_ip: Option<IpAddr>,
}

/// The result of `drain_usage()`.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Generation {
    pub(crate) node: String,
    pub(crate) boot: Uuid,
    pub(crate) number: i64,
    /// By token.
    pub(crate) rows: Vec<UsageRow>,
    pub(crate) signature: Vec<u8>,
}

impl Generation {
    pub(crate) fn of(&self, token: Uuid) -> Option<&UsageRow> {
        self.rows.iter().find(|row| row.token_id == token)
    }

    /// The uses and denials of a token, both 0 if it is not in it.
    pub(crate) fn counts(&self, token: Uuid) -> (i64, i64) {
        self.of(token).map_or((0, 0), |row| (row.uses, row.denials))
    }
}

/// The part of a generation that is the same whenever it is drained: node, boot and number, and per token uses and
/// denials. The last use may be later each time.
pub(crate) fn sums(generation: &Generation) -> (&str, Uuid, i64, Vec<(Uuid, i64, i64)>) {
    let rows = generation.rows.iter().map(|row| (row.token_id, row.uses, row.denials)).collect();
    (&generation.node, generation.boot, generation.number, rows)
}

/// `None` if there is nothing to flush. Fails unless all rows are of one generation and each token has only one.
pub(crate) async fn drain(client: &Client) -> Result<Option<Generation>> {
    let rows = client
        .query(
            "select node, boot, generation, token_id, uses, denials, last_used_at, last_used_ip, signature
             from tollgate.drain_usage() order by token_id",
            &[],
        )
        .await?;
    let Some(first) = rows.first() else { return Ok(None) };
    let mut drained = Generation {
        node: first.get(0),
        boot: first.get(1),
        number: first.get(2),
        rows: Vec::new(),
        signature: first.get(8),
    };
    for row in &rows {
        let key: (String, Uuid, i64) = (row.get(0), row.get(1), row.get(2));
        ensure!(key == (drained.node.clone(), drained.boot, drained.number), "two generations at once");
        let usage = UsageRow {
            token_id: row.get(3),
            uses: row.get(4),
            denials: row.get(5),
            last_used_at: row.get(6),
            last_used_ip: row.get(7),
        };
        ensure!(drained.of(usage.token_id).is_none(), "two rows of {}", usage.token_id);
        drained.rows.push(usage);
    }
    Ok(Some(drained))
}

/// [`drain`], where there must be something.
pub(crate) async fn drained(client: &Client) -> Result<Generation> {
    drain(client).await?.context("something was counted")
}

pub(crate) async fn apply(client: &Client, generation: &Generation) -> Result<bool> {
    let row = client
        .query_one(
            "select tollgate.apply_usage($1, $2, $3, $4, $5)",
            &[
                &generation.node,
                &generation.boot,
                &generation.number,
                &generation.rows,
                &generation.signature,
            ],
        )
        .await?;
    Ok(row.get(0))
}

/// A generation that no server handed out, but with a valid signature.
pub(crate) async fn signed(
    owner: &Client,
    node: &str,
    boot: Uuid,
    number: i64,
    rows: &[UsageRow],
) -> Result<Generation> {
    let signature = owner
        .query_one("select tollgate.signature_of_usage($1, $2, $3, $4)", &[&node, &boot, &number, &rows])
        .await?
        .get(0);
    Ok(Generation { node: node.to_owned(), boot, number, rows: rows.to_vec(), signature })
}

pub(crate) async fn ack(client: &Client, generation: i64) -> Result<bool> {
    Ok(client.query_one("select tollgate.ack_usage($1)", &[&generation]).await?.get(0))
}

/// Drain, apply, acknowledge; false if there was nothing.
pub(crate) async fn flush(client: &Client) -> Result<bool> {
    let Some(generation) = drain(client).await? else { return Ok(false) };
    apply(client, &generation).await?;
    ack(client, generation.number).await?;
    Ok(true)
}

/// Until nothing is left.
pub(crate) async fn flush_all(client: &Client) -> Result<()> {
    while flush(client).await? {}
    Ok(())
}

/// A row of `token_usage`, as of the last flush.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Usage {
    pub(crate) uses: i64,
    pub(crate) denials: i64,
    pub(crate) last_used_at: Option<Timestamp>,
    pub(crate) last_used_ip: Option<IpAddr>,
}

pub(crate) async fn usage(owner: &Client, token: Uuid) -> Result<Option<Usage>> {
    let row = owner
        .query_opt(
            "select use_count, denied_count, last_used_at, last_used_ip from tollgate.token_usage where token_id = $1",
            &[&token],
        )
        .await?;
    Ok(row.map(|row| Usage {
        uses: row.get(0),
        denials: row.get(1),
        last_used_at: row.get(2),
        last_used_ip: row.get(3),
    }))
}

/// Flushed uses and denials of a token, both 0 if it has none.
pub(crate) async fn counts(owner: &Client, token: Uuid) -> Result<(i64, i64)> {
    Ok(usage(owner, token).await?.map_or((0, 0), |usage| (usage.uses, usage.denials)))
}

/// Flushed uses and denials of all tokens together.
pub(crate) async fn totals(owner: &Client) -> Result<(i64, i64)> {
    let row = owner
        .query_one(
            "select coalesce(sum(use_count), 0)::bigint, coalesce(sum(denied_count), 0)::bigint
             from tollgate.token_usage",
            &[],
        )
        .await?;
    Ok((row.get(0), row.get(1)))
}

/// `stats()`, as JSON.
pub(crate) async fn stats(client: &Client) -> Result<Value> {
    common::value(client, "select to_jsonb(s) from tollgate.stats() s").await
}

/// Issues many tokens at once.
pub(crate) async fn issue_many(owner: &Client, count: i32) -> Result<Vec<common::Token>> {
    let rows = owner
        .query(
            "select t.id, t.token from generate_series(1, $1) n,
                 lateral tollgate.create_api_token('many', 'number ' || n) t",
            &[&count],
        )
        .await?;
    Ok(rows.iter().map(|row| common::Token { id: row.get(0), token: row.get(1) }).collect())
}

/// Verifies each of these once, in one statement, and returns how many were valid.
pub(crate) async fn verify_each(client: &Client, tokens: &[common::Token]) -> Result<i64> {
    let tokens: Vec<&str> = tokens.iter().map(|token| token.token.as_str()).collect();
    let row = client
        .query_one(
            "select count(*) filter (where v.valid) from unnest($1::text[]) t, lateral tollgate.verify_api_token(t) v",
            &[&tokens],
        )
        .await?;
    Ok(row.get(0))
}

/// Changes a token behind Tollgate's back, as its owner.
pub(crate) async fn set(owner: &Client, token: Uuid, changes: &str) -> Result<()> {
    let changed =
        owner.execute(&format!("update tollgate.api_tokens set {changes} where id = $1"), &[&token]).await?;
    ensure!(changed == 1, "{changed} rows changed by {changes}");
    Ok(())
}

/// How a table was read.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Reads {
    /// Rows read by scanning the table.
    pub(crate) scanned: i64,
    /// Rows fetched through any index.
    pub(crate) fetched: i64,
    /// Scans of the given index.
    pub(crate) scans_of_index: i64,
}

/// What a statement reads of one of our tables. Within a transaction, whose own counters are exact immediately.
pub(crate) async fn reads(client: &Client, table: &str, index: &str, statement: &str) -> Result<Reads> {
    let counters = format!(
        "select pg_stat_get_xact_tuples_returned(t.oid),
                pg_stat_get_xact_tuples_fetched(t.oid) + (
                    select sum(pg_stat_get_xact_tuples_fetched(i.indexrelid))::bigint
                    from pg_index i where i.indrelid = t.oid),
                pg_stat_get_xact_numscans('tollgate.{index}'::regclass)
         from pg_class t where t.oid = 'tollgate.{table}'::regclass"
    );
    client.batch_execute("begin").await?;
    let before = client.query_one(&counters, &[]).await?;
    client.batch_execute(statement).await?;
    let after = client.query_one(&counters, &[]).await?;
    client.batch_execute("commit").await?;
    let count = |column: usize| after.get::<_, i64>(column) - before.get::<_, i64>(column);
    Ok(Reads { scanned: count(0), fetched: count(1), scans_of_index: count(2) })
}

/// A position in the event log.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Cursor(pub(crate) String);

impl Cursor {
    /// Whether it remembers nothing: no transaction was running, and no batch is in progress.
    pub(crate) fn is_at_rest(&self) -> bool {
        self.0.ends_with(":,,,,,)")
    }
}

/// The result of `read_events`.
#[derive(Clone, Debug)]
pub(crate) struct Batch {
    pub(crate) events: Vec<Value>,
    pub(crate) next: Cursor,
    pub(crate) caught_up: bool,
    pub(crate) proof: Vec<u8>,
}

impl Batch {
    pub(crate) fn ids(&self) -> Vec<i64> {
        self.events.iter().filter_map(|event| event["id"].as_i64()).collect()
    }
}

pub(crate) async fn position(client: &Client, since: Option<i64>) -> Result<Cursor> {
    let row = client.query_one("select p::text from tollgate.event_position($1) p", &[&since]).await?;
    Ok(Cursor(row.get(0)))
}

pub(crate) async fn read(client: &Client, after: &Cursor, max_events: i32) -> Result<Batch> {
    let row = client
        .query_one(
            "select events, next::text, caught_up, proof from tollgate.read_events($1::text::tollgate.event_cursor, $2)",
            &[&after.0, &max_events],
        )
        .await?;
    let events: Value = row.get(0);
    Ok(Batch {
        events: events.as_array().context("events are an array")?.clone(),
        next: Cursor(row.get(1)),
        caught_up: row.get(2),
        proof: row.get(3),
    })
}

/// The cursor of a subscription; none while another session has it.
pub(crate) async fn open(client: &Client, name: &str) -> Result<Option<Cursor>> {
    let row = client.query_opt("select s::text from tollgate.open_subscription($1) s", &[&name]).await?;
    Ok(row.map(|row| Cursor(row.get(0))))
}

pub(crate) async fn advance(client: &Client, name: &str, batch: &Batch) -> Result<(), tokio_postgres::Error> {
    client
        .execute(
            "select tollgate.advance_subscription($1, $2::text::tollgate.event_cursor, $3)",
            &[&name, &batch.next.0, &batch.proof],
        )
        .await
        .map(drop)
}

/// All events since the cursor of a subscription, read and moved page by page in one transaction, which ends as `end` says.
pub(crate) async fn deliver(client: &Client, name: &str, page: i32, end: &str) -> Result<Vec<Value>> {
    client.batch_execute("begin").await?;
    let mut cursor = open(client, name).await?.context("no other session delivers")?;
    let mut events = Vec::new();
    loop {
        let batch = read(client, &cursor, page).await?;
        advance(client, name, &batch).await?;
        events.extend(batch.events);
        cursor = batch.next;
        if batch.caught_up {
            break;
        }
    }
    client.batch_execute(end).await?;
    Ok(events)
}

/// Queues the messages of all events. One call may end in the middle, where an event's transaction was still running
/// beside others when the batch before it was read.
pub(crate) const QUEUE_ALL: &str =
    "do $$ begin while not (select caught_up from tollgate.queue_webhook_deliveries()) loop end loop; end $$";

/// Reads until there is nothing more; the cursor ends up there.
pub(crate) async fn read_all(client: &Client, cursor: &mut Cursor, batch_size: i32) -> Result<Vec<Value>> {
    let mut events = Vec::new();
    let mut received = BTreeSet::new();
    loop {
        let batch = read(client, cursor, batch_size).await?;
        ensure!(batch.events.len() <= usize::try_from(batch_size)?, "more than asked for");
        // Without this, a cursor that does not advance would be read from for ever.
        ensure!(batch.ids().into_iter().all(|id| received.insert(id)), "received twice: {:?}", batch.ids());
        events.extend(batch.events);
        *cursor = batch.next;
        if batch.caught_up {
            return Ok(events);
        }
    }
}
