//! The cost of a verification inside a backend, without the round trip: many calls in one statement, minus as many of a
//! function that is declared alike and does nothing.

use std::hint::black_box;
use std::time::Instant;

use anyhow::{Result, ensure};
use tollgate_core::latency::{Countdown, Histogram};
use tollgate_tests::DATABASE;

use super::part::{Outcome, Part, Run, part};
use crate::clients::{ADDRESS, Clients, REQUIRED, Statement, socket};
use crate::measure::{Series, alternate_numbers, timed};
use crate::report::{Figure, Unit};
use crate::service::{self, VERIFY, WEB};
use crate::tokens::Tokens;
use crate::wire::Connection;

pub(super) const PART: Part =
    part("backend", "calls inside a backend: of a hot, an unknown, a malformed token", run);

/// Verifications of malformed and unknown tokens.
const REFUSED: Statement = Statement { expected: b"f", ..VERIFY };

fn run(run: &Run<'_>) -> Result<Outcome> {
    let (calls, count) = (run.scale.calls, run.scale.tokens.div_ceil(10));
    let tokens = Tokens::new(count)?;
    let cluster =
        service::with_tokens(service::builder(run.install, count).setting("autovacuum", "off"), &tokens)?;
    let unknown = Tokens::of(count..2 * count)?;
    let malformed = tokens.malformed();
    let some = tokens.len() / 2;
    let turns = [
        ("bench.empty", tokens.get(some), None),
        ("tollgate.verify_api_token", tokens.get(some), Some("VALID")),
        ("tollgate.verify_api_token", unknown.get(some), Some("NOT_FOUND")),
        ("tollgate.verify_api_token", malformed.get(some), Some("MALFORMED")),
    ];
    let mut web = Connection::prepare(&socket(&cluster), WEB, DATABASE, &[])?;
    web.share_processor(0);
    // Keeps the generated numbers in memory.
    web.simple("set work_mem = '256MB'")?;
    for (function, token, code) in turns {
        let call = format!("{function}('{token}', '{REQUIRED}', '{ADDRESS}')");
        if let Some(code) = code {
            let answer = web.simple(&format!("select code from {call}"))?;
            ensure!(answer.as_deref() == Some(code), "{answer:?} where {code} was expected");
        }
    }
    let nanoseconds = alternate_numbers("backend", run.scale.rounds, turns.len(), |turn| {
        let (function, token, _) = turns[turn];
        let loops = format!(
            "select count({function}('{token}', '{REQUIRED}', '{ADDRESS}')) from generate_series(1, {calls})"
        );
        let (counted, time) = timed(|| web.simple(&loops))?;
        ensure!(counted == Some(calls.to_string()), "{counted:?} calls where {calls} were expected");
        Ok(time.as_secs_f64() * 1e9 / f64::from(calls))
    })?;
    let [empty, calls_of @ ..] = &nanoseconds[..] else { unreachable!() };
    let inside: Vec<Series> = calls_of.iter().map(|series| series.minus(empty).times(1e-3)).collect();

    let measuring = alternate_numbers("backend, latency", run.scale.rounds, 2, |turn| {
        Ok(if turn == 0 { measured(calls) } else { unmeasured(calls) })
    })?;
    let mut clients = Clients::connect(&cluster, WEB, DATABASE, run.scale.clients, &[VERIFY, REFUSED])?;
    clients.warm_up(0, &tokens, 0..tokens.len())?;
    let presented = [(0, &tokens), (1, &unknown), (1, &malformed)];
    let rates = alternate_numbers("backend, round trips", run.scale.rounds, presented.len(), |turn| {
        let (statement, tokens) = presented[turn];
        Ok(clients.run(run.scale.turn, statement, tokens)?.rate())
    })?;
    let round_trip = |what: &str, refused: &Series| {
        Figure::new(&format!("{what} ÷ a valid one, round trip"), Unit::Ratio, &rates[0].over(refused))
            .at_most(1.0)
    };
    Ok(Outcome {
        conditions: vec![
            format!("one client, {calls} calls in a statement, the same token again and again, of {count}"),
            "less as many calls of an internal function that is declared alike and does nothing".to_owned(),
            format!("round trips: {} clients, random among {count} of each", run.scale.clients),
            "expiry, networks, scopes, metering and a limit on".to_owned(),
            service::conditions(&cluster)?,
        ],
        figures: vec![
            Figure::new("one verification inside a backend, hot token", Unit::Microseconds, &inside[0])
                .at_most(2.0),
            round_trip("unknown token", &rates[1]),
            round_trip("malformed token", &rates[2]),
            Figure::new("malformed token, inside a backend", Unit::Microseconds, &inside[2]).at_most(0.5),
            Figure::new("unknown token, inside a backend", Unit::Microseconds, &inside[1]),
            Figure::new(
                "measuring the latencies of verifications, a verification",
                Unit::Nanoseconds,
                &measuring[0].minus(&measuring[1]),
            ),
            Figure::new("a call of an empty function", Unit::Microseconds, &empty.times(1e-3)),
        ],
    })
}

/// Nanoseconds per verification of what measures its latency: a countdown, and two readings of the clock and a count in
/// the histogram of one in so many.
fn measured(calls: u32) -> f64 {
    let (countdown, histogram) = (Countdown::new(), Histogram::default());
    let begin = Instant::now();
    for _ in 0..calls {
        let since = countdown.is_due(|| 1).then(Instant::now);
        if let Some(since) = black_box(since) {
            histogram.record(u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX));
        }
    }
    black_box(&histogram);
    begin.elapsed().as_nanos() as f64 / f64::from(calls)
}

/// The same loop without it.
fn unmeasured(calls: u32) -> f64 {
    let begin = Instant::now();
    for call in 0..calls {
        black_box(call);
    }
    begin.elapsed().as_nanos() as f64 / f64::from(calls)
}
