//! Operations on very many rows: whether the cost per row grows with their number, and how much verifications slow down
//! meanwhile.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use hdrhistogram::Histogram;
use tollgate_tests::{Cluster, DATABASE, Tollgated};

use super::part::{Outcome, Part, Run, part_with_daemon};
use crate::clients::{Clients, Statement};
use crate::measure::{Progress, Series, percentile, timed};
use crate::memory::largest_private;
use crate::report::{Figure, Unit, count};
use crate::service::{self, OPERATOR, VERIFY, WEB};
use crate::tokens::Tokens;

pub(super) const PART: Part =
    part_with_daemon("bulk", "the cost per row at N and at 10 N, and p99 of verification meanwhile", run);

const STATEMENTS: [Statement; 1] = [VERIFY];
const DEADLINE: Duration = Duration::from_mins(10);

/// One kind of bulk operation. `:n` stands for the number of rows.
struct Shape {
    name: &'static str,
    prepare: &'static str,
    work: Work,
}

enum Work {
    Sql(&'static str),
    /// A command of the daemon's, and its arguments.
    Command(&'static [&'static str]),
}

/// A session that touches none of our tables: with as many processors as clients, any computing session takes time from
/// them, and this measures how much of the slowdown of verifications is due to that.
const COMPUTES: &str = "select sum(sqrt(g)) from generate_series(1, 20000000) g";

/// The first two would also do what the others leave behind.
const SHAPES: [Shape; 10] = [
    Shape {
        name: "tollgated cleanup of tokens that expired in one moment",
        prepare: "select count(tollgate.create_api_token('e:n', 'k', expires_in => '1 day')) from generate_series(1, :n);
                  update tollgate.api_tokens set expires_at = now() where user_id = 'e:n'",
        work: Work::Command(&["cleanup", "--retention", "0s", "--quiet"]),
    },
    Shape {
        name: "sealing the log",
        // First what is unsealed by now, which is not measured.
        prepare: "select tollgate.seal_audit_log(1000000);
                  select count(tollgate.create_api_token('s' || g, 'k')) from generate_series(1, :n) g",
        work: Work::Sql("select tollgate.seal_audit_log(1000000)"),
    },
    Shape {
        name: "issuing in one transaction",
        prepare: "",
        work: Work::Sql(
            "select count(tollgate.create_api_token('i' || g, 'k')) from generate_series(1, :n) g",
        ),
    },
    Shape {
        name: "importing in one transaction",
        prepare: "",
        work: Work::Sql(
            "select count(tollgate.import_api_token('m' || g, 'k', sha256((:n || ' ' || g)::bytea))) from generate_series(1, :n) g",
        ),
    },
    Shape {
        name: "deleting users of an attached table",
        prepare: "create table bench.users_:n (id text primary key);
                  insert into bench.users_:n select 'd:n-' || g from generate_series(1, :n) g;
                  select count(tollgate.create_api_token(id, 'k')) from bench.users_:n;
                  select tollgate.attach_users_table('bench.users_:n', 'id', false)",
        work: Work::Sql("delete from bench.users_:n"),
    },
    Shape {
        name: "revoking all tokens of a user",
        prepare: "select count(tollgate.create_api_token('one :n', 'k')) from generate_series(1, :n)",
        work: Work::Sql("select tollgate.revoke_all_api_tokens('one :n')"),
    },
    Shape {
        name: "announcing expiries, a thousand at a time",
        prepare: "select count(tollgate.create_api_token('a', 'k', expires_in => '1 day')) from generate_series(1, :n)",
        work: Work::Sql(
            "do $$ begin loop exit when tollgate.announce_expiries('7 days', 1000) < 1000; commit; end loop; end $$",
        ),
    },
    Shape {
        name: "a try of each message of a webhook that is down",
        prepare: "select tollgate.define_webhook('down:n', 'https://127.0.0.1/');
                  insert into tollgate.webhook_queue (webhook, event_epoch, event_id, event, body)
                      select 'down:n', 1, g, 'token.created', '{}' from generate_series(1, :n) g",
        // Each is tried once: the next time is after the run.
        work: Work::Sql(
            "do $$ declare claimed bigint; begin
                 loop
                     select count(tollgate.finish_webhook_delivery(c.id, c.lease, 503, null, '1 day')) into claimed
                         from tollgate.claim_webhook_deliveries(1000) c;
                     exit when claimed = 0;
                     commit;
                 end loop;
             end $$",
        ),
    },
    Shape {
        name: "listing all tokens of a user, a thousand at a time",
        prepare: "select count(tollgate.create_api_token('l:n', 'k')) from generate_series(1, :n)",
        work: Work::Sql(
            "do $$ declare place uuid; begin
                 loop
                     select f.continue_after into place
                         from tollgate.find_api_tokens('l:n', max_tokens => 1000, after => place) f;
                     exit when place is null;
                 end loop;
             end $$",
        ),
    },
    Shape {
        name: "tollgated tail --since 0",
        prepare: "alter table tollgate.audit_log disable trigger append_only;
                  truncate tollgate.audit_log;
                  alter table tollgate.audit_log enable always trigger append_only;
                  insert into tollgate.audit_log (event, user_id) select 'bench', 'u' || g from generate_series(1, :n) g",
        work: Work::Command(&["tail", "--since", "0"]),
    },
];

/// A session's private memory, with work_mem at its default.
const MOST_MEMORY: f64 = 64.0 * 1024.0 * 1024.0;

fn run(run: &Run<'_>) -> Result<Outcome> {
    let many = run.scale.ended / 5;
    let few = many / 10;
    let tokens = Tokens::new(run.scale.tokens.div_ceil(10))?;
    let cluster = service::with_tokens(
        service::builder(run.install, run.scale.tokens).setting("tollgate.accept_foreign_tokens", "on"),
        &tokens,
    )?;
    let mut clients = Clients::connect(&cluster, WEB, DATABASE, run.scale.clients, &STATEMENTS)?;
    clients.warm_up(0, &tokens, 0..tokens.len())?;
    let rate = clients.run(run.scale.turn, 0, &tokens)?.rate() / 4.0;

    let quiet = percentile(&clients.latencies_for(run.scale.turn, Some(rate), 0, &tokens)?, 0.99);
    let (times, _) = latencies_during(&mut clients, rate, &tokens, || cluster.execute(DATABASE, COMPUTES))?;
    let beside_computing = percentile(&times, 0.99);
    let series = |value: f64| Series(vec![value]);
    let mut figures = vec![Figure::new(
        "a session that only computes: p99 of verification meanwhile ÷ quiet",
        Unit::Ratio,
        &series(beside_computing / quiet),
    )];
    let mut progress = Progress::new("bulk", SHAPES.len());
    for shape in &SHAPES {
        let prepare = |n: u32| -> Result<()> {
            // One statement each, so that each is a transaction.
            for statement in shape.prepare.split(';').filter(|statement| !statement.trim().is_empty()) {
                cluster.execute(DATABASE, &statement.replace(":n", &n.to_string()))?;
            }
            cluster.execute(DATABASE, "vacuum analyze tollgate.api_tokens")?;
            cluster.execute(DATABASE, "checkpoint")
        };
        let mut memory = 0.0;
        let mut cost = |n: u32| -> Result<f64> {
            prepare(n)?;
            let ((), time) = timed(|| {
                memory = memory_during(&cluster, || shape.work.run(&cluster, n))?;
                Ok(())
            })?;
            Ok(time.as_secs_f64() * 1e6 / f64::from(n))
        };
        let (cost_of_few, cost_of_many) = (cost(few)?, cost(many)?);
        // Another number, since it is part of names.
        let beside = few + 1;
        prepare(beside)?;
        let quiet = clients.latencies_for(run.scale.turn, Some(rate), 0, &tokens)?;
        let (times, _) = latencies_during(&mut clients, rate, &tokens, || shape.work.run(&cluster, beside))?;
        let meanwhile = percentile(&times, 0.99);
        let meanwhile_over_quiet = meanwhile / percentile(&quiet, 0.99);
        let name = shape.name;
        let growth = series(cost_of_many / cost_of_few);
        figures.extend([
            Figure::new(&format!("{name}: cost per row at 10 N ÷ at N"), Unit::Ratio, &growth).at_most(1.5),
            Figure::new(&format!("{name}: per row at N"), Unit::Microseconds, &series(cost_of_few)),
            Figure::new(&format!("{name}: per row at 10 N"), Unit::Microseconds, &series(cost_of_many)),
            Figure::new(
                &format!("{name}: p99 of verification meanwhile ÷ quiet"),
                Unit::Ratio,
                &series(meanwhile_over_quiet),
            )
            .at_most(2.0),
            Figure::new(
                &format!("{name}: p99 of verification meanwhile ÷ beside a session that only computes"),
                Unit::Ratio,
                &series(meanwhile / beside_computing),
            ),
            Figure::new(&format!("{name}: private memory of a backend"), Unit::Bytes, &series(memory))
                .at_most(MOST_MEMORY),
        ]);
        progress.step();
    }
    Ok(Outcome {
        conditions: vec![
            format!("N is {}, beside {} live tokens; each once", count(few), tokens.len()),
            format!(
                "{} clients, {rate:.0} verifications a second, a quarter of what there can be, beside N once more",
                run.scale.clients
            ),
            service::conditions(&cluster)?,
        ],
        figures,
    })
}

/// The latencies of verifications during some work, and the time that the work took.
fn latencies_during(
    clients: &mut Clients<'_>,
    rate: f64,
    tokens: &Tokens,
    work: impl FnOnce() -> Result<()> + Send,
) -> Result<(Histogram<u64>, Duration)> {
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let work = scope.spawn(|| {
            let ran = timed(work);
            // Even if it failed: the clients would run for ever.
            stop.store(true, Ordering::Relaxed);
            ran
        });
        let times = clients.latencies(Some(rate), &stop, 0, tokens)?;
        let ((), time) = work.join().expect("failing work returns an error")?;
        Ok((times, time))
    })
}

/// The most private memory that a process of the server had during some work.
fn memory_during(cluster: &Cluster, work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let watcher = scope.spawn(|| -> Result<f64> {
            let mut most = largest_private(cluster)?;
            while !stop.load(Ordering::Relaxed) {
                thread::sleep(Duration::from_millis(50));
                most = most.max(largest_private(cluster)?);
            }
            Ok(most)
        });
        let worked = work();
        stop.store(true, Ordering::Relaxed);
        let most = watcher.join().expect("a failing watcher returns an error");
        worked?;
        most
    })
}

impl Work {
    fn run(&self, cluster: &Cluster, n: u32) -> Result<()> {
        match self {
            Self::Sql(statement) => cluster.execute(DATABASE, &statement.replace(":n", &n.to_string())),
            Self::Command(arguments) => {
                let url = cluster.url(OPERATOR, DATABASE);
                let mut daemon = Tollgated::spawn(&url, arguments)?;
                let status = daemon.wait(DEADLINE)?;
                ensure!(status.success(), "tollgated {arguments:?}: {status}\n{}", daemon.log());
                Ok(())
            }
        }
    }
}
