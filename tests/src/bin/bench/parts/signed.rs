//! Signed access tokens: the round trip and the call of a verification compared with those of an API token, the signature's
//! share in issuing and in a first verification, a transaction that authenticates, and whether keys that are replaced under
//! load cost a valid token.

use std::fs;
use std::hint::black_box;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use anyhow::{Context as _, Result, ensure};
use tollgate_core::jws::Compact;
use tollgate_tests::{Cluster, DATABASE};

use super::part::{Outcome, Part, Run, part};
use crate::clients::{ADDRESS, Clients, REQUIRED, Statement, Takes, socket};
use crate::measure::{Series, alternate_numbers, timed};
use crate::report::{Figure, Unit};
use crate::service::{self, VERIFY, WEB};
use crate::signer::Signer;
use crate::tokens::Tokens;
use crate::wire::Connection;

pub(super) const PART: Part = part(
    "signed",
    "signed access tokens: verified, issued, authenticated with, while keys are replaced",
    run,
);

/// Issues and verifies, as one application may.
const BACKOFFICE: &str = "backoffice";

/// A signed token is verified by the function of its kind, and authenticated with as any token is.
const VERIFY_SIGNED: Statement =
    Statement { sql: "select * from tollgate.verify_access_token($1, $2, $3)", ..VERIFY };
const AUTHENTICATE: Statement =
    Statement { sql: "select * from tollgate.authenticate($1, $2, $3)", ..VERIFY };
const CURRENT_USER: Statement =
    Statement { sql: "select tollgate.current_user_id() is not null", takes: Takes::Nothing, expected: b"t" };
const STATEMENTS: [Statement; 4] = [VERIFY, VERIFY_SIGNED, AUTHENTICATE, CURRENT_USER];

const ISSUE: Statement = Statement {
    sql: "select access_token from tollgate.issue_access_token('user-1', '{posts:read,posts:write}')",
    takes: Takes::Nothing,
    expected: b"",
};

fn run(run: &Run<'_>) -> Result<Outcome> {
    let count = run.scale.tokens.div_ceil(10);
    let opaque = Tokens::new(count)?;
    let builder = service::builder(run.install, count)
        .setting("autovacuum", "off")
        .setting("tollgate.signature_table_size", &(u64::from(count) * 4).max(262_144).to_string());
    let cluster = service::with_tokens(builder, &opaque)?;
    // A signed token has no limit of its own, so neither has an API token here.
    cluster.execute(DATABASE, "update tollgate.api_tokens set rate_limit = null, rate_window = null")?;
    cluster.execute(DATABASE, "vacuum (freeze, analyze) tollgate.api_tokens")?;
    cluster.execute(DATABASE, "checkpoint")?;
    cluster.execute(
        DATABASE,
        &format!(
            "create role {BACKOFFICE} login;
             select tollgate.grant_capability('{BACKOFFICE}', 'issuer'), tollgate.grant_capability('{BACKOFFICE}', 'verifier');
             select tollgate.define_scope('posts:read', 'Read posts'), tollgate.define_scope('posts:write', 'Write posts');
             grant usage on schema bench to {BACKOFFICE}"
        ),
    )?;
    let signer = Signer::on(&cluster)?;
    let signed = signer.tokens(0..count)?;

    let mut figures = round_trips(run, &cluster, &opaque, &signed)?;
    figures.extend(inside(run, &cluster, &opaque, &signed)?);
    figures.extend(first_time(run, &cluster, &signer, count)?);
    figures.extend(issuing(run, &cluster, &signer, &signed)?);
    figures.extend(while_keys_are_replaced(run, &cluster)?);
    Ok(Outcome {
        conditions: vec![
            format!("{} clients, {count} tokens of each kind, random, of a user each", run.scale.clients),
            "ES256; expiry, networks, scopes and metering on, no limits".to_owned(),
            format!("inside a backend: one client, {} calls in a statement", run.scale.calls),
            service::conditions(&cluster)?,
        ],
        figures,
    })
}

/// Of signed tokens that were seen before, and of API tokens: a verification, and a transaction.
fn round_trips(run: &Run<'_>, cluster: &Cluster, opaque: &Tokens, signed: &Tokens) -> Result<Vec<Figure>> {
    let mut clients = Clients::connect(cluster, WEB, DATABASE, run.scale.clients, &STATEMENTS)?;
    clients.warm_up(0, opaque, 0..opaque.len())?;
    clients.warm_up(1, signed, 0..signed.len())?;
    let rates = alternate_numbers("signed, round trips", run.scale.rounds, 4, |turn| {
        let tokens = [opaque, signed][turn % 2];
        let done = if turn < 2 {
            clients.run(run.scale.turn, turn, tokens)?
        } else {
            clients.repeat(run.scale.turn, |_, connection, random| {
                connection.simple("begin")?;
                connection.execute("2", &[tokens.random(random), REQUIRED, ADDRESS], b"t")?;
                connection.execute("3", &[], b"t")?;
                connection.simple("commit")?;
                Ok(())
            })?
        };
        service::flush(cluster, DATABASE)?;
        Ok(done.rate())
    })?;
    let [verify, verify_signed, transaction, transaction_signed] = &rates[..] else { unreachable!() };
    let per_second = |what: &str, rate: &Series| Figure::new(what, Unit::PerSecond, rate);
    Ok(vec![
        Figure::new(
            "cost of verify_access_token, seen before ÷ verify_api_token, round trip",
            Unit::Ratio,
            &verify.over(verify_signed),
        )
        .at_most(1.15),
        Figure::new(
            "begin; authenticate; current_user_id; commit with a signed token ÷ with an API token",
            Unit::Ratio,
            &transaction_signed.over(transaction),
        )
        .at_least(0.87),
        per_second("verify_api_token, no limits", verify),
        per_second("verify_access_token, seen before", verify_signed),
        per_second("transactions with an API token", transaction),
        per_second("transactions with a signed token", transaction_signed),
    ])
}

/// Without the round trip, of one token that was seen before.
fn inside(run: &Run<'_>, cluster: &Cluster, opaque: &Tokens, signed: &Tokens) -> Result<Vec<Figure>> {
    let calls = run.scale.calls;
    let mut web = backend(cluster, WEB)?;
    let some = signed.len() / 2;
    let turns = [
        ("bench.empty", signed.get(some)),
        ("tollgate.verify_access_token", signed.get(some)),
        ("tollgate.verify_api_token", opaque.get(some)),
    ];
    let nanoseconds = alternate_numbers("signed, inside a backend", run.scale.rounds, turns.len(), |turn| {
        let (function, token) = turns[turn];
        let call = format!("{function}('{token}', '{REQUIRED}', '{ADDRESS}')");
        time_of(&mut web, &call, &format!("generate_series(1, {calls})"), calls)
    })?;
    let [empty, signed, opaque] = &nanoseconds[..] else { unreachable!() };
    let microseconds =
        |what: &str, series: &Series| Figure::new(what, Unit::Microseconds, &series.minus(empty).times(1e-3));
    Ok(vec![
        microseconds("verify_access_token inside a backend, seen before", signed).at_most(10.0),
        microseconds("verify_api_token inside a backend, no limits", opaque),
    ])
}

/// Of tokens that the server sees for the first time, each round others, compared with the library's check of their
/// signatures.
fn first_time(run: &Run<'_>, cluster: &Cluster, signer: &Signer, seen: u32) -> Result<Vec<Figure>> {
    let each = (run.scale.calls / 50).max(200);
    let rounds = run.scale.rounds + 1;
    let mut batches = Vec::new();
    for round in 0..rounds {
        let first = seen + round * each;
        let tokens = signer.tokens(first..first + each)?;
        let path = cluster.socket_dir().join("fresh");
        let lines: String = (0..tokens.len()).map(|index| format!("{}\n", tokens.get(index))).collect();
        fs::write(&path, lines)?;
        cluster.execute(
            DATABASE,
            &format!(
                "create table bench.fresh_{round} (token text not null);
                 copy bench.fresh_{round} from '{}';
                 grant select on bench.fresh_{round} to {WEB}",
                path.display()
            ),
        )?;
        fs::remove_file(&path)?;
        batches.push(tokens);
    }
    let mut web = backend(cluster, WEB)?;
    // Otherwise what is measured would be a refusal.
    let more = signer.tokens(seen + rounds * each..seen + rounds * each + 1)?;
    let code = web.simple(&format!(
        "select code from tollgate.verify_access_token('{}', '{REQUIRED}', '{ADDRESS}')",
        more.get(0)
    ))?;
    ensure!(code.as_deref() == Some("VALID"), "{code:?} where VALID was expected");

    let mut turns_taken = [0; 3];
    let nanoseconds = alternate_numbers("signed, first time", run.scale.rounds, 3, |turn| {
        let round: usize = turns_taken[turn];
        turns_taken[turn] += 1;
        let call = |function: &str| format!("{function}(token, '{REQUIRED}', '{ADDRESS}')");
        let table = format!("bench.fresh_{round}");
        match turn {
            0 => time_of(&mut web, &call("bench.empty"), &table, each),
            1 => time_of(&mut web, &call("tollgate.verify_access_token"), &table, each),
            _ => {
                let tokens = &batches[round];
                let parsed: Vec<Compact<'_>> = (0..tokens.len())
                    .map(|index| Compact::parse(tokens.get(index)))
                    .collect::<Result<_, _>>()?;
                let (good, time) = timed(|| {
                    Ok(parsed.iter().filter(|token| token.is_signed_by(signer.public_key())).count())
                })?;
                ensure!(good == tokens.len(), "{good} of {} signatures are good", tokens.len());
                Ok(time.as_secs_f64() * 1e9 / f64::from(each))
            }
        }
    })?;
    let [empty, first, bare] = &nanoseconds[..] else { unreachable!() };
    let first = first.minus(empty);
    Ok(vec![
        Figure::new(
            "cost of verify_access_token inside a backend, first time ÷ the bare signature check",
            Unit::Ratio,
            &first.over(bare),
        )
        .at_most(1.3),
        Figure::new(
            "verify_access_token inside a backend, first time",
            Unit::Microseconds,
            &first.times(1e-3),
        ),
        Figure::new("the bare signature check", Unit::Microseconds, &bare.times(1e-3)),
    ])
}

/// Unaudited, compared with the library's signature of as many bytes.
fn issuing(run: &Run<'_>, cluster: &Cluster, signer: &Signer, signed: &Tokens) -> Result<Vec<Figure>> {
    let calls = (run.scale.calls / 20).max(200);
    let mut backoffice = backend(cluster, BACKOFFICE)?;
    let issue = "tollgate.issue_access_token('user-1', '{posts:read,posts:write}')";
    let empty = format!("bench.empty('user-1', '{REQUIRED}', '{ADDRESS}')");
    let rows = format!("generate_series(1, {calls})");
    let message = signed.get(0).rsplit_once('.').context("a signed token has dots")?.0.as_bytes();
    let nanoseconds = alternate_numbers("signed, issuing", run.scale.rounds, 3, |turn| match turn {
        0 => time_of(&mut backoffice, &empty, &rows, calls),
        1 => time_of(&mut backoffice, issue, &rows, calls),
        _ => {
            let ((), time) = timed(|| {
                for _ in 0..calls {
                    black_box(signer.key().sign(black_box(message))?);
                }
                Ok(())
            })?;
            Ok(time.as_secs_f64() * 1e9 / f64::from(calls))
        }
    })?;
    let [empty, issue, bare] = &nanoseconds[..] else { unreachable!() };
    let issue = issue.minus(empty);
    Ok(vec![
        Figure::new(
            "cost of issue_access_token inside a backend, unaudited ÷ the bare signature",
            Unit::Ratio,
            &issue.over(bare),
        )
        .at_most(1.8),
        Figure::new("issue_access_token inside a backend", Unit::Microseconds, &issue.times(1e-3)),
        Figure::new("the bare signature", Unit::Microseconds, &bare.times(1e-3)),
    ])
}

/// Each client issues tokens and verifies them, and the first one that it issued, while the signing key is replaced ten
/// times.
fn while_keys_are_replaced(run: &Run<'_>, cluster: &Cluster) -> Result<Vec<Figure>> {
    const TIMES: u32 = 10;
    let statements = [ISSUE, VERIFY_SIGNED];
    let mut clients = Clients::connect(cluster, BACKOFFICE, DATABASE, run.scale.clients, &statements)?;
    let first: Vec<Mutex<Option<String>>> = (0..run.scale.clients).map(|_| Mutex::new(None)).collect();
    let (refused, replaced) = (AtomicU64::new(0), AtomicBool::new(false));
    let pause = run.scale.turn / 2;
    let (tokens, seconds) = thread::scope(|scope| {
        let replacing = scope.spawn(|| -> Result<()> {
            let mut owner = Connection::prepare(&socket(cluster), "postgres", DATABASE, &[])?;
            let replacing = (0..TIMES).try_for_each(|_| {
                owner.simple("select tollgate.rotate_signing_key('0')")?;
                thread::sleep(pause);
                Ok(())
            });
            replaced.store(true, Ordering::Relaxed);
            replacing
        });
        let (mut tokens, mut seconds) = (0, 0.0);
        while !replaced.load(Ordering::Relaxed) {
            let done = clients.repeat(pause, |number, connection, _| {
                let [token] = connection.columns("0", &[], [0])?;
                let mut first = first[number].lock().expect("a client does not panic");
                let first = first.get_or_insert_with(|| token.clone());
                for token in [token.as_str(), first.as_str()] {
                    let [valid] = connection.columns("1", &[token, REQUIRED, ADDRESS], [0])?;
                    refused.fetch_add(u64::from(valid != "t"), Ordering::Relaxed);
                }
                Ok(())
            })?;
            tokens += done.executions;
            seconds += done.seconds;
        }
        replacing.join().expect("a failing connection returns an error")?;
        anyhow::Ok((tokens, seconds))
    })?;
    let refused = Series(vec![refused.into_inner() as f64]);
    Ok(vec![
        Figure::new("valid tokens refused while the signing key is replaced", Unit::Rows, &refused)
            .at_most(0.0),
        Figure::new(
            "tokens issued and verified while the signing key is replaced",
            Unit::PerSecond,
            &Series(vec![tokens as f64 / seconds]),
        ),
    ])
}

/// A connection for statements with many calls, which shares a processor with this thread.
fn backend(cluster: &Cluster, role: &str) -> Result<Connection> {
    let mut connection = Connection::prepare(&socket(cluster), role, DATABASE, &[])?;
    connection.share_processor(0);
    // Keeps the generated numbers in memory.
    connection.simple("set work_mem = '256MB'; set max_parallel_workers_per_gather = 0")?;
    Ok(connection)
}

/// Nanoseconds of a call, of which a statement makes one for each row.
fn time_of(connection: &mut Connection, call: &str, rows: &str, calls: u32) -> Result<f64> {
    let (counted, time) = timed(|| connection.simple(&format!("select count({call}) from {rows}")))?;
    ensure!(counted == Some(calls.to_string()), "{counted:?} calls where {calls} were expected");
    Ok(time.as_secs_f64() * 1e9 / f64::from(calls))
}
