//! Refreshing a session, compared with an UPDATE of one row by its primary key, and with 1,000,000 sessions compared with
//! 10,000: a database with many and one with few, on one server.

use std::ops::Range;
use std::sync::Mutex;
use std::thread;

use anyhow::{Result, ensure};
use tollgate_tests::{Cluster, DATABASE};

use super::part::{Outcome, Part, Run, part};
use crate::clients::{ADDRESS, Clients, Statement, Takes, socket};
use crate::measure::{Series, alternate_numbers};
use crate::report::{Figure, Unit, count};
use crate::service;
use crate::wire::Connection;

pub(super) const PART: Part =
    part("sessions", "refresh_session compared with an UPDATE of one row, and with many sessions", run);

const BACKOFFICE: &str = "backoffice";
/// The database with few sessions.
const FEW: &str = "few";
/// Concurrent connections, beside those of the other parts.
const MANY_CLIENTS: usize = 16;

/// The columns `code` and `refresh_token`, of what a client gets.
const REFRESH: Statement = Statement {
    sql: "select r.* from tollgate.refresh_session($1, client_ip => $2::inet) as r",
    takes: Takes::Nothing,
    expected: b"",
};
const CODE_AND_TOKEN: [usize; 2] = [0, 4];

/// By the primary key, of a row like that of a session.
const UPDATE: Statement = Statement {
    sql: "update bench.plain set generation = generation + 1, refreshed_at = clock_timestamp() where id = $1::uuid returning id",
    takes: Takes::Nothing,
    expected: b"",
};
const STATEMENTS: [Statement; 2] = [REFRESH, UPDATE];

/// The sessions of a database: of each, its id and the refresh token that its client has now.
struct Sessions {
    ids: Vec<String>,
    tokens: Vec<Mutex<String>>,
}

impl Sessions {
    /// Opens so many, each of a user of its own.
    fn open(cluster: &Cluster, database: &str, number: u32) -> Result<Self> {
        const AT_ONCE: u32 = 10_000;
        let workers = u32::try_from(thread::available_parallelism()?.get())?;
        let share = number.div_ceil(workers).max(1);
        let opened = thread::scope(|scope| {
            let workers: Vec<_> = (0..workers)
                .map(|worker| {
                    let (first, end) = ((worker * share).min(number), ((worker + 1) * share).min(number));
                    scope.spawn(move || -> Result<Vec<String>> {
                        let mut connection =
                            Connection::prepare(&socket(cluster), BACKOFFICE, database, &[])?;
                        let mut opened = Vec::new();
                        for first in (first..end).step_by(AT_ONCE as usize) {
                            let last = (first + AT_ONCE).min(end) - 1;
                            // A field of the result for each: the call itself is made once.
                            opened.extend(connection.all(&format!(
                                "select s.session_id || ' ' || s.refresh_token from generate_series({first}, {last}) n,
                                     tollgate.open_session('user-' || n, '{{posts:read,posts:write}}', client_ip => '{ADDRESS}') s"
                            ))?);
                        }
                        Ok(opened)
                    })
                })
                .collect();
            workers
                .into_iter()
                .map(|worker| worker.join().expect("a failing worker returns an error"))
                .collect::<Result<Vec<_>>>()
        })?;
        let (mut ids, mut tokens) = (Vec::new(), Vec::new());
        for (id, token) in opened.iter().flatten().filter_map(|one| one.split_once(' ')) {
            ids.push(id.to_owned());
            tokens.push(Mutex::new(token.to_owned()));
        }
        ensure!(ids.len() == number as usize, "{} sessions where {number} were opened", ids.len());
        Ok(Self { ids, tokens })
    }

    /// Of so many clients, those of one: no other refreshes them.
    fn share(&self, client: usize, clients: usize) -> Range<usize> {
        self.ids.len() * client / clients..self.ids.len() * (client + 1) / clients
    }
}

/// One of the two databases.
struct Side<'a> {
    sessions: Sessions,
    clients: Clients<'a>,
    relaxed: Clients<'a>,
}

fn run(run: &Run<'_>) -> Result<Outcome> {
    let (few, many) = (run.scale.few, run.scale.tokens);
    let cluster = service::builder(run.install, many)
        .setting("autovacuum", "off")
        .setting("shared_buffers", &format!("{}MB", (u64::from(many) * 3000 / 1_000_000).max(256)))
        .setting("tollgate.max_tracked_keys", "131072")
        .start()?;
    cluster.execute(DATABASE, &format!("create database {FEW}"))?;
    cluster.execute(FEW, "create extension tollgate")?;
    let mut sides = [side(run, &cluster, FEW, few)?, side(run, &cluster, DATABASE, many)?];

    // Few, so that most pages are in the WAL already, and a turn writes what a service writes between two checkpoints.
    cluster.execute(FEW, "insert into bench.plain select * from tollgate.sessions")?;
    cluster.execute(FEW, "vacuum (freeze, analyze) bench.plain")?;
    cluster.execute(FEW, "checkpoint")?;
    let mut sixteen = connect(&cluster, FEW, MANY_CLIENTS)?;
    let rates = alternate_numbers("sessions, durable", run.scale.rounds, 4, |turn| {
        let [Side { sessions, clients, .. }, _] = &mut sides;
        let (clients, number) =
            if turn < 2 { (clients, run.scale.clients) } else { (&mut sixteen, MANY_CLIENTS) };
        if turn % 2 == 0 {
            refresh(run, clients, number, sessions)
        } else {
            update(run, clients, number, sessions)
        }
    })?;
    let [refresh_four, update_four, refresh_sixteen, update_sixteen] = &rates[..] else { unreachable!() };

    let costs = alternate_numbers("sessions, few and many", run.scale.rounds, 4, |turn| {
        let Side { sessions, clients, relaxed } = &mut sides[turn % 2];
        let clients = if turn < 2 { clients } else { relaxed };
        Ok(run.scale.clients as f64 * 1e6 / refresh(run, clients, run.scale.clients, sessions)?)
    })?;
    let [of_few, of_many, relaxed_few, relaxed_many] = &costs[..] else { unreachable!() };

    let beside = |clients: usize, refresh: &Series, update: &Series| {
        let what = format!("refresh_session ÷ an UPDATE of one row, durable, {clients} clients");
        Figure::new(&what, Unit::Ratio, &refresh.over(update)).at_least(0.75)
    };
    let per_second = |what: String, rate: &Series| Figure::new(&what, Unit::PerSecond, rate);
    let names = format!("at {} sessions ÷ at {}", count(many), count(few));
    Ok(Outcome {
        conditions: vec![
            format!(
                "{} and {MANY_CLIENTS} clients, a session of {} at random",
                run.scale.clients,
                count(few)
            ),
            "each statement a transaction; a refresh makes an ES256 access token and the next refresh token"
                .to_owned(),
            service::conditions(&cluster)?,
        ],
        figures: vec![
            beside(run.scale.clients, refresh_four, update_four),
            beside(MANY_CLIENTS, refresh_sixteen, update_sixteen),
            Figure::new(&format!("cost of a refresh {names}"), Unit::Ratio, &of_many.over(of_few))
                .at_most(1.4),
            Figure::new(
                &format!("the same with synchronous_commit off, {names}"),
                Unit::Ratio,
                &relaxed_many.over(relaxed_few),
            ),
            per_second(format!("refresh_session, {} clients", run.scale.clients), refresh_four),
            per_second(format!("UPDATE of one row, {} clients", run.scale.clients), update_four),
            per_second(format!("refresh_session, {MANY_CLIENTS} clients"), refresh_sixteen),
            per_second(format!("UPDATE of one row, {MANY_CLIENTS} clients"), update_sixteen),
            Figure::new("a refresh, synchronous_commit off", Unit::Microseconds, relaxed_few),
        ],
    })
}

fn connect<'a>(cluster: &Cluster, database: &str, clients: usize) -> Result<Clients<'a>> {
    Clients::connect(cluster, BACKOFFICE, database, clients, &STATEMENTS)
}

fn side<'a>(run: &Run<'_>, cluster: &Cluster, database: &str, number: u32) -> Result<Side<'a>> {
    service::prepare(cluster, database)?;
    cluster.execute(
        database,
        &format!(
            "do $$ begin
                 create role {BACKOFFICE} login;
             exception when duplicate_object then
                 -- In the cluster's other database.
             end $$;
             select tollgate.grant_capability('{BACKOFFICE}', 'issuer');
             grant usage on schema bench to {BACKOFFICE};
             select tollgate.define_scope('posts:read', 'Read posts'), tollgate.define_scope('posts:write', 'Write posts');
             select tollgate.create_signing_key();
             create table bench.plain (like tollgate.sessions, primary key (id)) with (fillfactor = 50);
             grant select, update on bench.plain to {BACKOFFICE}"
        ),
    )?;
    let sessions = Sessions::open(cluster, database, number)?;
    cluster.execute(database, "vacuum (freeze, analyze) tollgate.sessions")?;
    cluster.execute(database, "checkpoint")?;
    let clients = connect(cluster, database, run.scale.clients)?;
    let mut relaxed = connect(cluster, database, run.scale.clients)?;
    relaxed.each("set synchronous_commit = off")?;
    Ok(Side { sessions, clients, relaxed })
}

/// Refreshes a second, of random sessions.
fn refresh(run: &Run<'_>, clients: &mut Clients<'_>, number: usize, sessions: &Sessions) -> Result<f64> {
    let done = clients.repeat(run.scale.turn, |client, connection, random| {
        let share = sessions.share(client, number);
        let mut token =
            sessions.tokens[share.start + random.below(share.len())].lock().expect("no client panics");
        let [code, next] = connection.columns("0", &[token.as_str(), ADDRESS], CODE_AND_TOKEN)?;
        ensure!(code == "VALID" && next != *token, "a refresh came back as {code}");
        *token = next;
        Ok(())
    })?;
    Ok(done.rate())
}

/// UPDATEs a second, of the rows of random sessions.
fn update(run: &Run<'_>, clients: &mut Clients<'_>, number: usize, sessions: &Sessions) -> Result<f64> {
    let done = clients.repeat(run.scale.turn, |client, connection, random| {
        let share = sessions.share(client, number);
        let id = &sessions.ids[share.start + random.below(share.len())];
        connection.execute("1", &[id], id.as_bytes())
    })?;
    Ok(done.rate())
}
