//! Reading the event log as an outbox: the cost of an event for its readers, in small transactions and in huge ones,
//! and the cost of measuring a backlog.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use tollgate_tests::{Cluster, DATABASE, Tollgated, eventually};

use super::part::{Outcome, Part, Run, part_with_daemon};
use crate::clients::socket;
use crate::measure::{Progress, Series, timed};
use crate::report::{Figure, Unit, count};
use crate::service::{self, OPERATOR};
use crate::wire::Connection;

pub(super) const PART: Part = part_with_daemon(
    "events",
    "events of one transaction that readers and webhook queues take in a second",
    run,
);

/// The daemon's page size.
const PAGE: u32 = 1000;
/// At more waiting messages a webhook is disabled, so the queue is emptied before that.
const QUEUED: u32 = 50_000;

/// What the daemon asks the server every few seconds (`observe` in `daemon/src/contract/stats.rs`).
const OBSERVE: &str = "
    select jsonb_build_object(
        'stats', to_jsonb(s), 'notification_queue_usage', pg_notification_queue_usage(),
        'subscriptions', (select coalesce(jsonb_agg(jsonb_build_object('name', b.name, 'pending', b.pending,
             'oldest_at', extract(epoch from b.oldest_at))), '[]') from tollgate.subscription_backlogs() b),
        'webhooks', (select coalesce(jsonb_agg(jsonb_build_object('name', w.name, 'enabled', w.enabled,
             'paused', w.paused_at is not null, 'pending', w.pending, 'dead', w.dead)), '[]') from tollgate.webhooks w))
    from tollgate.stats() s";
const DEADLINE: Duration = Duration::from_mins(10);

struct Reader {
    connection: Connection,
    longest_cursor: usize,
}

impl Reader {
    fn connect(cluster: &Cluster) -> Result<Self> {
        Ok(Self {
            connection: Connection::prepare(&socket(cluster), "postgres", DATABASE, &[])?,
            longest_cursor: 0,
        })
    }

    /// Reads a number of events like the daemon, page by page from the subscription; returns microseconds per event.
    fn read(&mut self, events: u32) -> Result<f64> {
        let (read, time) = timed(|| {
            let mut read = 0;
            loop {
                let answer = self.connection.simple(
                    "select concat_ws(' ', jsonb_array_length(page.events), page.caught_up, length(page.next::text),
                                      length(page.events::text), tollgate.advance_subscription('bench', page.next, page.proof))
                     from (select r.* from (select s from tollgate.open_subscription('bench') s offset 0) as o,
                                  lateral tollgate.read_events(o.s, 1000) as r offset 0) as page",
                )?;
                let answer = answer.context("no other reader")?;
                let fields: Vec<&str> = answer.split(' ').collect();
                read += fields[0].parse::<u32>()?;
                self.longest_cursor = self.longest_cursor.max(fields[2].parse()?);
                if fields[1] == "t" {
                    return Ok(read);
                }
            }
        })?;
        ensure!(read == events, "{read} events were read of {events}");
        Ok(time.as_secs_f64() * 1e6 / f64::from(events))
    }

    fn cursor_of(&mut self, subscription: &str) -> Result<usize> {
        let length =
            format!("select length(place::text) from tollgate.subscriptions where name = '{subscription}'");
        Ok(self.connection.simple(&length)?.context("a subscription")?.parse()?)
    }

    /// The same for a webhook's queue.
    fn queue(&mut self, events: u32) -> Result<f64> {
        let mut total = Duration::ZERO;
        let mut queued = 0;
        let mut since = 0;
        loop {
            let (answer, time) = timed(|| {
                self.connection.simple(&format!(
                    "select concat_ws(' ', events, caught_up) from tollgate.queue_webhook_deliveries({PAGE})"
                ))
            })?;
            total += time;
            self.longest_cursor = self.longest_cursor.max(self.cursor_of("tollgate:webhooks")?);
            let answer = answer.context("an answer")?;
            let (taken, caught_up) = answer.split_once(' ').context("two fields")?;
            queued += taken.parse::<u32>()?;
            since += taken.parse::<u32>()?;
            if since >= QUEUED || caught_up == "t" {
                self.connection.simple("truncate tollgate.webhook_queue")?;
                since = 0;
            }
            if caught_up == "t" {
                break;
            }
        }
        ensure!(queued == events, "{queued} events were queued of {events}");
        Ok(total.as_secs_f64() * 1e6 / f64::from(events))
    }
}

fn write(cluster: &Cluster, events: u32) -> Result<()> {
    cluster.execute(
        DATABASE,
        &format!(
            "insert into tollgate.audit_log (event, token_id, user_id)
                 select 'token.created', gen_random_uuid(), 'user-' || n from generate_series(1, {events}) as n"
        ),
    )
}

/// Microseconds per event until the daemon has logged all events of one transaction, from its commit.
fn logged(cluster: &Cluster, events: u32) -> Result<f64> {
    let mut command = Tollgated::command(&cluster.url(OPERATOR, DATABASE))?;
    let daemon = Tollgated::spawn_command(command.args(["run", "--log-format=json"]))?;
    let is_logged =
        "select count(*) from tollgate.subscription_backlogs() where name = 'log' and pending = 0";
    let all_logged = || cluster.value(DATABASE, is_logged).is_ok_and(|count| count.as_deref() == Some("1"));
    eventually(DEADLINE, "the daemon to subscribe", all_logged);
    write(cluster, events)?;
    let ((), time) = timed(|| {
        eventually(DEADLINE, "the daemon to log all events", all_logged);
        Ok(())
    })?;
    let lines = daemon.log().lines().filter(|line| line.contains("\"token.created\"")).count();
    ensure!(lines >= events as usize, "{lines} events were logged of {events}");
    Ok(time.as_secs_f64() * 1e6 / f64::from(events))
}

fn run(run: &Run<'_>) -> Result<Outcome> {
    let (many, few, pending) = (run.scale.rows, run.scale.rows / 100, run.scale.many);
    // Nothing is verified here, and a look counts the keys in use.
    let cluster = service::builder(run.install, run.scale.few).start()?;
    service::prepare(&cluster, DATABASE)?;
    let mut reader = Reader::connect(&cluster)?;
    reader.connection.simple("select tollgate.open_subscription('bench')")?;
    let mut other = Connection::prepare(&socket(&cluster), "postgres", DATABASE, &[])?;
    let mut progress = Progress::new("events", 7);

    let mut small = Vec::new();
    for _ in 0..5 {
        write(&cluster, few)?;
        small.push(reader.read(few)?);
    }
    let small = Series(small);
    progress.step();
    write(&cluster, many)?;
    let large = reader.read(many)?;
    progress.step();

    other.simple("begin")?;
    other.simple("insert into tollgate.audit_log (event) values ('bench.open')")?;
    write(&cluster, many)?;
    let beside = reader.read(many)?;
    other.simple("commit")?;
    reader.read(1)?;
    progress.step();

    reader.connection.simple("select tollgate.define_webhook('bench', 'https://127.0.0.1/')")?;
    reader.read(1)?;
    reader.queue(1)?;
    let mut small_queue = Vec::new();
    for _ in 0..5 {
        write(&cluster, few)?;
        small_queue.push(reader.queue(few)?);
    }
    write(&cluster, many)?;
    let queued = reader.queue(many)?;
    progress.step();
    other.simple("begin")?;
    other.simple("insert into tollgate.audit_log (event) values ('bench.open')")?;
    write(&cluster, many)?;
    let queued_beside = reader.queue(many)?;
    other.simple("commit")?;
    reader.queue(1)?;
    reader.connection.simple("select tollgate.drop_webhook('bench')")?;
    progress.step();

    let logged = logged(&cluster, many)?;
    progress.step();

    write(&cluster, pending)?;
    let mut look = || -> Result<f64> {
        let looks = timed(|| reader.connection.simple(OBSERVE))?;
        Ok(looks.1.as_secs_f64() * 1e6)
    };
    look()?;
    let looks = Series((0..10).map(|_| look()).collect::<Result<_>>()?);
    progress.step();

    let one = |what: &str, unit: Unit, value: f64| Figure::new(what, unit, &Series(vec![value]));
    Ok(Outcome {
        conditions: vec![
            format!(
                "one reader, {PAGE} events a page, each page with the commit of the subscription's place"
            ),
            format!(
                "{} events of one transaction; {} for the cost of few; {} pending for the look",
                count(many),
                count(few),
                count(pending)
            ),
            format!(
                "the queue of one webhook, emptied every {} messages, which does not count",
                count(QUEUED)
            ),
            service::conditions(&cluster)?,
        ],
        figures: vec![
            one("events read, of one transaction", Unit::PerSecond, 1e6 / large).at_least(50_000.0),
            one("events read, beside an open transaction", Unit::PerSecond, 1e6 / beside).at_least(50_000.0),
            one("events logged by the daemon", Unit::PerSecond, 1e6 / logged).at_least(50_000.0),
            one("events queued for a webhook", Unit::PerSecond, 1e6 / queued).at_least(20_000.0),
            one("events queued, beside an open transaction", Unit::PerSecond, 1e6 / queued_beside)
                .at_least(20_000.0),
            one(
                "cost of queueing an event among many ÷ among few",
                Unit::Ratio,
                queued / Series(small_queue).median(),
            )
            .at_most(1.3),
            one("cost of an event among many ÷ among few", Unit::Ratio, large / small.median()).at_most(1.3),
            one("the longest cursor", Unit::Bytes, reader.longest_cursor as f64).at_most(8192.0),
            Figure::new("the daemon's look at the server, with all that pending", Unit::Microseconds, &looks)
                .at_most(20_000.0),
        ],
    })
}
