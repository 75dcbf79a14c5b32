//! The round trip of a verification, compared with the alternatives.

use anyhow::Result;
use tollgate_tests::{Cluster, DATABASE};

use super::part::{Outcome, Part, Run, part};
use crate::clients::{Clients, Statement, Takes};
use crate::measure::{Series, alternate};
use crate::peers::{self, CHECKED, CONSTANTS, FUNCTION, LOOKUP, NOTHING, WRITE};
use crate::report::{Figure, Unit};
use crate::service::{self, VERIFY, WEB};
use crate::tokens::Tokens;

pub(super) const PART: Part =
    part("verify", "a verification's round trip compared with the alternatives", run);

const TOKEN_ALONE: Statement =
    Statement { sql: "select * from tollgate.verify_api_token($1)", takes: Takes::Token, expected: b"t" };

const STATEMENTS: [Statement; 8] =
    [NOTHING, CONSTANTS, LOOKUP, CHECKED, FUNCTION, WRITE, VERIFY, TOKEN_ALONE];
const CHECKING: usize = 3;
const WRITING: usize = 5;
const VERIFYING: [usize; 2] = [6, 7];

fn run(run: &Run<'_>) -> Result<Outcome> {
    let tokens = Tokens::new(run.scale.tokens)?;
    let builder = service::builder(run.install, run.scale.tokens * 2).setting("autovacuum", "off");
    let cluster = service::with_tokens(builder, &tokens)?;
    peers::create_function(&cluster)?;
    peers::create_written(&cluster)?;
    let conditions = vec![
        format!("{} clients, {} tokens, random", run.scale.clients, tokens.len()),
        "expiry, networks, scopes, metering and a limit on".to_owned(),
        service::conditions(&cluster)?,
    ];

    let mut clients = Clients::connect(&cluster, WEB, DATABASE, run.scale.clients, &STATEMENTS)?;
    // For the design that writes, if it gives up durability.
    let mut relaxed = Clients::connect(&cluster, WEB, DATABASE, run.scale.clients, &STATEMENTS)?;
    relaxed.each("set synchronous_commit = off")?;
    relaxed.warm_up(WRITING, &tokens, 0..tokens.len())?;
    let mut verified = 1 + warm_up(&cluster, &mut clients, &tokens)?;
    let turns = alternate("verify", run.scale.rounds, STATEMENTS.len() + 1, |turn| {
        let done = match STATEMENTS.get(turn) {
            Some(_) => clients.run(run.scale.turn, turn, &tokens)?,
            None => relaxed.run(run.scale.turn, WRITING, &tokens)?,
        };
        if VERIFYING.contains(&turn) {
            verified += done.executions;
            service::flush(&cluster, DATABASE)?;
        }
        Ok((done.rate(), done.cost()))
    })?;
    service::check_metering(&cluster, verified)?;

    let series = |of: fn(&(f64, f64)) -> f64| -> Vec<Series> {
        turns.iter().map(|rounds| rounds.iter().map(of).collect()).collect()
    };
    let (rates, costs) = (series(|turn| turn.0), series(|turn| turn.1));
    let [nothing, constants, lookup, checked, function, write, verify, alone, relaxed] = &rates[..] else {
        unreachable!()
    };
    let ratio = |what: &str, peer: &Series| Figure::new(what, Unit::Ratio, &verify.over(peer));
    let mut figures = vec![
        ratio("verify ÷ hand-written prepared lookup, with the same checks", checked).at_least(1.25),
        ratio("verify ÷ plpgsql function", function).at_least(1.3),
        ratio("verify ÷ a design that writes at each request", write).at_least(6.0),
        ratio("verify ÷ the same with synchronous_commit off", relaxed),
        ratio("verify ÷ a prepared SELECT of eleven constants of the same types", constants),
        ratio("verify ÷ SELECT 1", nothing),
        ratio("verify ÷ the lookup without any check", lookup),
        Figure::new(
            "verify, the token alone ÷ the lookup without any check",
            Unit::Ratio,
            &alone.over(lookup),
        ),
        Figure::new("verify, the token alone ÷ SELECT 1", Unit::Ratio, &alone.over(nothing)),
    ];
    let names = [
        "SELECT 1",
        "eleven constants",
        "lookup",
        "lookup with checks",
        "plpgsql function",
        "design that writes",
        "verify",
        "verify, the token alone",
        "design that writes, synchronous_commit off",
    ];
    for (name, (rate, cost)) in names.iter().zip(rates.iter().zip(&costs)) {
        figures.push(Figure::new(&format!("{name}: executions"), Unit::PerSecond, rate));
        // Where the operating system reports it.
        if cost.median().is_finite() {
            let what = format!("{name}: processor time of the server");
            figures.push(Figure::new(&what, Unit::Microseconds, cost));
        }
    }
    Ok(Outcome { conditions, figures })
}

/// Verifies each token once: the figures are for a service that has been up for a while. Returns the number of
/// verifications.
fn warm_up(cluster: &Cluster, clients: &mut Clients<'_>, tokens: &Tokens) -> Result<u64> {
    clients.warm_up(CHECKING, tokens, 0..tokens.len())?;
    let quarter = tokens.len().div_ceil(4);
    for first in (0..tokens.len()).step_by(quarter) {
        clients.warm_up(VERIFYING[0], tokens, first..tokens.len().min(first + quarter))?;
        service::flush(cluster, DATABASE)?;
    }
    Ok(tokens.len() as u64)
}
