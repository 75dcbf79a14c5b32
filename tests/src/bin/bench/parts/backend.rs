//! What a verification costs inside a backend, without the round trip: many calls in one statement, less as many of a
//! function that is declared alike and does nothing.

use anyhow::{Result, ensure};
use tollgate_tests::DATABASE;

use super::{Outcome, Part, Run, part};
use crate::clients::{ADDRESS, REQUIRED, socket};
use crate::measure::{Series, alternate_numbers, timed};
use crate::report::{Figure, Unit};
use crate::service::{self, WEB};
use crate::tokens::{Tokens, token};
use crate::wire::Connection;

pub(super) const PART: Part =
    part("backend", "calls inside a backend: of a hot, an unknown, a malformed token", run);

fn run(run: &Run<'_>) -> Result<Outcome> {
    let (calls, count) = (run.scale.calls, run.scale.tokens.div_ceil(10));
    let tokens = Tokens::new(count)?;
    let cluster =
        service::with_tokens(service::builder(run.install, count).setting("autovacuum", "off"), &tokens)?;
    let (valid, unknown) = (tokens.get(tokens.len() / 2), token(count));
    let malformed = malformed(valid);
    let turns = [
        ("bench.empty", valid, None),
        ("tollgate.verify_api_token", valid, Some("VALID")),
        ("tollgate.verify_api_token", unknown.token(), Some("NOT_FOUND")),
        ("tollgate.verify_api_token", &malformed, Some("MALFORMED")),
    ];
    let mut web = Connection::prepare(&socket(&cluster), WEB, DATABASE, &[])?;
    web.share_processor(0);
    // The numbers stay in memory.
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
    let [empty, valid, unknown, malformed] = &nanoseconds[..] else { unreachable!() };
    let [valid, unknown, malformed] = [valid, unknown, malformed].map(|series| series.minus(empty));
    let micros = |series: &Series| series.times(1e-3);
    Ok(Outcome {
        conditions: vec![
            format!("one client, {calls} calls in a statement, the same token again and again, of {count}"),
            "less as many calls of an internal function that is declared alike and does nothing".to_owned(),
            "expiry, networks, scopes, metering and a limit on".to_owned(),
            service::conditions(&cluster)?,
        ],
        figures: vec![
            Figure::new("one verification inside a backend, hot token", Unit::Microseconds, &micros(&valid))
                .at_most(2.0),
            Figure::new("unknown token ÷ valid token, inside a backend", Unit::Ratio, &unknown.over(&valid))
                .at_most(1.0),
            Figure::new(
                "malformed token ÷ valid token, inside a backend",
                Unit::Ratio,
                &malformed.over(&valid),
            )
            .at_most(1.0),
            Figure::new("malformed token, inside a backend", Unit::Microseconds, &micros(&malformed))
                .at_most(0.5),
            Figure::new("unknown token, inside a backend", Unit::Microseconds, &micros(&unknown)),
            Figure::new("a call of an empty function", Unit::Microseconds, &micros(empty)),
        ],
    })
}

/// With another last character, so that only the checksum tells.
fn malformed(token: &str) -> String {
    let (rest, last) = token.split_at(token.len() - 1);
    format!("{rest}{}", if last == "0" { "1" } else { "0" })
}
