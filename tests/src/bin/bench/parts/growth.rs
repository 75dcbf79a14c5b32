//! Whether a verification costs more with more tokens: a database with few and one with many, on one server.

use anyhow::Result;
use tollgate_tests::{Cluster, DATABASE};

use super::part::{Outcome, Part, Run, part};
use crate::clients::{ADDRESS, Clients, REQUIRED, Statement};
use crate::measure::{Series, alternate_numbers, timed};
use crate::report::{Figure, Unit, count};
use crate::service::{self, VERIFY, WEB};
use crate::tokens::{Random, Tokens};
use crate::wire::Connection;

pub(super) const PART: Part =
    part("growth", "the cost at 10,000,000 tokens compared with that at 10,000", run);

const STATEMENTS: [Statement; 1] = [VERIFY];
/// The database with few tokens.
const FEW: &str = "few";

/// One of the two databases.
struct Side<'a> {
    tokens: Tokens,
    clients: Clients<'a>,
    backend: Connection,
}

fn run(run: &Run<'_>) -> Result<Outcome> {
    let (few, many) = (run.scale.few, run.scale.many);
    let cluster = service::builder(run.install, few + many)
        .setting("autovacuum", "off")
        .setting("jit", "off")
        .start()?;
    cluster.execute(DATABASE, &format!("create database {FEW}"))?;
    cluster.execute(FEW, "create extension tollgate")?;
    let mut sides = [side(run, &cluster, FEW, few)?, side(run, &cluster, DATABASE, many)?];

    let costs = alternate_numbers("growth, round trips", run.scale.rounds, 2, |turn| {
        let side = &mut sides[turn];
        Ok(run.scale.clients as f64 * 1e6 / side.clients.run(run.scale.turn, 0, &side.tokens)?.rate())
    })?;
    let [of_few, of_many] = &costs[..] else { unreachable!() };

    // First a call that does nothing, then one that verifies, each with all tokens of the sample.
    let functions = ["bench.empty", "tollgate.verify_api_token"];
    let sample = run.scale.calls;
    let inside = alternate_numbers("growth, inside a backend", run.scale.rounds, 4, |turn| {
        let (side, function) = (&mut sides[turn / 2], functions[turn % 2]);
        let all = calling(function, sample);
        let (_, time) = timed(|| side.backend.simple(&all))?;
        Ok(time.as_secs_f64() * 1e6 / f64::from(sample))
    })?;
    let [empty_few, verify_few, empty_many, verify_many] = &inside[..] else { unreachable!() };
    let (inside_few, inside_many) = (verify_few.minus(empty_few), verify_many.minus(empty_many));

    let at = |what: &str, tokens: u32, series: &Series| {
        Figure::new(&format!("{what} at {} tokens", count(tokens)), Unit::Microseconds, series)
    };
    let names = format!("at {} tokens ÷ at {}", count(many), count(few));
    Ok(Outcome {
        conditions: vec![
            format!("{} clients, tokens random among all, all of them tracked", run.scale.clients),
            format!("inside a backend: {sample} random tokens a statement"),
            "api_tokens unlogged".to_owned(),
            service::conditions(&cluster)?,
        ],
        figures: vec![
            Figure::new(&format!("cost of a verification {names}"), Unit::Ratio, &of_many.over(of_few))
                .at_most(1.5),
            Figure::new(
                &format!("the same inside a backend, without the round trip, {names}"),
                Unit::Ratio,
                &inside_many.over(&inside_few),
            ),
            at("a verification's round trip", few, of_few),
            at("a verification's round trip", many, of_many),
            at("inside a backend", few, &inside_few),
            at("inside a backend", many, &inside_many),
        ],
    })
}

fn side<'a>(run: &Run<'_>, cluster: &Cluster, name: &str, number: u32) -> Result<Side<'a>> {
    let tokens = Tokens::new(number)?;
    service::prepare(cluster, name)?;
    // The tables are only read. Writing ten million rows and their indexes to the WAL would take minutes.
    cluster.execute(name, UNLOGGED)?;
    service::load(cluster, name, &tokens)?;
    // So many that nearly every page of shared memory holds the counters of one of them.
    let presented = 3 * run.scale.calls;
    present(cluster, name, &tokens, presented)?;
    let mut clients = Clients::connect(cluster, WEB, name, run.scale.clients, &STATEMENTS)?;
    let mut backend = Connection::prepare(&crate::clients::socket(cluster), WEB, name, &[])?;
    clients.each(TOUCH)?;
    backend.simple(TOUCH)?;
    // Also touches each token's shared memory: the first touch of a page is a page fault, which takes as long as
    // several verifications, and happens once in a connection's life.
    let all = calling("tollgate.verify_api_token", presented);
    clients.each(&all)?;
    backend.simple(&all)?;
    clients.run(run.scale.turn, 0, &tokens)?;
    backend.share_processor(0);
    Ok(Side { tokens, clients, backend })
}

/// A number of calls of a function in one statement, with the tokens of the sample.
fn calling(function: &str, calls: u32) -> String {
    format!(
        "select count({function}(token, '{REQUIRED}', '{ADDRESS}'))
         from (select token from bench.presented limit {calls}) as presented"
    )
}

/// Referencing tables first, as PostgreSQL requires.
const UNLOGGED: &str = "do $$
    declare
        referring regclass;
    begin
        for referring in
            select conrelid from pg_constraint where contype = 'f' and confrelid = 'tollgate.api_tokens'::regclass
        loop
            execute format('alter table %s set unlogged', referring);
        end loop;
        alter table tollgate.api_tokens set unlogged;
    end $$";

/// Makes a backend read each page of the table and of the index once: by a bitmap scan, because a sequential scan of a
/// large table would not leave it in shared buffers.
const TOUCH: &str = "set enable_seqscan = off; set enable_indexscan = off; set work_mem = '256MB';
    set max_parallel_workers_per_gather = 0;
    select count(metadata) from tollgate.api_tokens where user_id >= '';
    select count(*) from tollgate.api_tokens where token_hash >= '';
    reset all";

/// A table of random tokens, for statements that verify one per row.
fn present(cluster: &Cluster, database: &str, tokens: &Tokens, sample: u32) -> Result<()> {
    let mut random = Random::new();
    let rows: String = (0..sample).map(|_| format!("{}\n", tokens.random(&mut random))).collect();
    let path = cluster.socket_dir().join("presented");
    std::fs::write(&path, rows)?;
    cluster.execute(
        database,
        &format!(
            "create table bench.presented (token text not null);
             grant select on bench.presented to {WEB};
             copy bench.presented from '{}'",
            path.display()
        ),
    )?;
    std::fs::remove_file(&path)?;
    cluster.execute(database, "vacuum (freeze, analyze) bench.presented")
}
