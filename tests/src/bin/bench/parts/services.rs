//! What applications without a person behind them call: client credentials, introspection, exchange, signed URLs, and
//! verifications of tokens with a quota, each compared with what it adds to.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use tollgate_tests::{Cluster, DATABASE, Tollgated, eventually};

use super::part::{Outcome, Part, Run, part_with_daemon};
use crate::clients::{ADDRESS, Clients, REQUIRED, Statement, Takes, socket};
use crate::measure::{alternate_numbers, timed};
use crate::report::{Figure, Unit};
use crate::service::{self, OPERATOR, VERIFY, WEB};
use crate::tokens::{Tokens, id};
use crate::wire::Connection;

pub(super) const PART: Part = part_with_daemon(
    "services",
    "client credentials, introspection, exchange, signed URLs and quotas, compared with verifying and issuing",
    run,
);

const BACKOFFICE: &str = "backoffice";

const INTROSPECT: Statement = Statement {
    sql: "select t ->> 'active', t from tollgate.introspect_token($1, client_ip => $3::inet) t, (select $2::text) required",
    takes: Takes::TokenAndChecks,
    expected: b"true",
};
const ISSUE: Statement = Statement {
    sql: "select i.audience, i.* from tollgate.issue_access_token('user-1', '{posts:read,posts:write}') i",
    takes: Takes::Nothing,
    expected: b"{https://api.test}",
};
const CLIENT_CREDENTIALS: Statement = Statement {
    sql: "select c.* from tollgate.client_credentials('bench', $1) c",
    takes: Takes::Token,
    expected: b"VALID",
};

fn run(run: &Run<'_>) -> Result<Outcome> {
    let count = run.scale.tokens.div_ceil(10);
    let tokens = Tokens::new(count)?;
    let builder = service::builder(run.install, count).setting("autovacuum", "off");
    let cluster = service::with_tokens(builder, &tokens)?;
    // An access token has no limit of its own, so neither has an API token here.
    cluster.execute(DATABASE, "update tollgate.api_tokens set rate_limit = null, rate_window = null")?;
    cluster.execute(
        DATABASE,
        &format!(
            "create role {BACKOFFICE} login;
             select tollgate.grant_capability('{BACKOFFICE}', 'issuer');
             select tollgate.define_scope('posts:read', 'Read posts'), tollgate.define_scope('posts:write', 'Write posts');
             select tollgate.create_signing_key();
             grant usage on schema bench to {BACKOFFICE}"
        ),
    )?;
    cluster.execute(DATABASE, "vacuum (freeze, analyze) tollgate.api_tokens")?;
    cluster.execute(DATABASE, "checkpoint")?;

    let mut figures = introspecting(run, &cluster, &tokens)?;
    figures.extend(exchanging(run, &cluster, &tokens)?);
    figures.extend(client_credentials(run, &cluster)?);
    figures.extend(signed_urls(run, &cluster)?);
    figures.extend(with_quotas(run, &cluster, &tokens)?);
    Ok(Outcome {
        conditions: vec![
            format!("{} clients, {count} API tokens, random, without limits", run.scale.clients),
            "what is issued is signed by ES256; inside a backend: one client and one token".to_owned(),
            service::conditions(&cluster)?,
        ],
        figures,
    })
}

fn introspecting(run: &Run<'_>, cluster: &Cluster, tokens: &Tokens) -> Result<Vec<Figure>> {
    let statements = [VERIFY, INTROSPECT];
    let mut clients = Clients::connect(cluster, WEB, DATABASE, run.scale.clients, &statements)?;
    for statement in 0..statements.len() {
        clients.warm_up(statement, tokens, 0..tokens.len())?;
    }
    let rates = alternate_numbers("services, introspecting", run.scale.rounds, 2, |turn| {
        let done = clients.run(run.scale.turn, turn, tokens)?;
        service::flush(cluster, DATABASE)?;
        Ok(done.rate())
    })?;
    let [verify, introspect] = &rates[..] else { unreachable!() };
    Ok(vec![
        Figure::new(
            "introspect_token of an API token ÷ verify_api_token, round trip",
            Unit::Ratio,
            &introspect.over(verify),
        )
        .at_least(0.8),
        Figure::new("introspect_token", Unit::PerSecond, introspect),
    ])
}

/// Inside a backend: by round trips, one would be compared with two.
fn exchanging(run: &Run<'_>, cluster: &Cluster, tokens: &Tokens) -> Result<Vec<Figure>> {
    let calls = (run.scale.calls / 20).max(200);
    let mut backoffice = backend(cluster, BACKOFFICE)?;
    let token = tokens.get(tokens.len() / 2);
    let turns = [
        format!("bench.empty('{token}', '{REQUIRED}', '{ADDRESS}')"),
        format!("tollgate.verify_api_token('{token}', '{REQUIRED}', '{ADDRESS}')"),
        "tollgate.issue_access_token('user-1', '{posts:read,posts:write}')".to_owned(),
        format!("tollgate.exchange_token('{token}', client_ip => '{ADDRESS}')"),
    ];
    let nanoseconds = alternate_numbers("services, exchanging", run.scale.rounds, turns.len(), |turn| {
        time_of(&mut backoffice, &turns[turn], calls)
    })?;
    let code = backoffice
        .simple(&format!("select code from tollgate.exchange_token('{token}', client_ip => '{ADDRESS}')"))?;
    ensure!(code.as_deref() == Some("VALID"), "an exchange came back as {code:?}");
    let [empty, verify, issue, exchange] = &nanoseconds[..] else { unreachable!() };
    let exchange = exchange.minus(empty);
    Ok(vec![
        Figure::new(
            "the cost of verifying and issuing ÷ that of exchange_token, inside a backend",
            Unit::Ratio,
            &verify.minus(empty).with(&issue.minus(empty), |verify, issue| verify + issue).over(&exchange),
        )
        .at_least(0.8),
        Figure::new("exchange_token inside a backend", Unit::Microseconds, &exchange.times(1e-3)),
    ])
}

fn client_credentials(run: &Run<'_>, cluster: &Cluster) -> Result<Vec<Figure>> {
    let mut owner = Connection::prepare(&socket(cluster), "postgres", DATABASE, &[])?;
    owner.simple("select tollgate.create_service_account('bench', 'Bench', '{posts:read,posts:write}')")?;
    let secret = owner
        .simple("select token from tollgate.create_service_account_secret('bench')")?
        .context("a secret")?;
    let secrets = Tokens::of_texts(&[secret])?;
    let statements = [ISSUE, CLIENT_CREDENTIALS];
    let mut clients = Clients::connect(cluster, BACKOFFICE, DATABASE, run.scale.clients, &statements)?;
    let rates = alternate_numbers("services, client credentials", run.scale.rounds, 2, |turn| {
        Ok(clients.run(run.scale.turn, turn, &secrets)?.rate())
    })?;
    let [issue, credentials] = &rates[..] else { unreachable!() };
    Ok(vec![
        Figure::new(
            "client_credentials by a secret ÷ issue_access_token, round trip",
            Unit::Ratio,
            &credentials.over(issue),
        )
        .at_least(0.8),
        Figure::new("client_credentials by a secret", Unit::PerSecond, credentials),
    ])
}

fn signed_urls(run: &Run<'_>, cluster: &Cluster) -> Result<Vec<Figure>> {
    let mut owner = Connection::prepare(&socket(cluster), "postgres", DATABASE, &[])?;
    owner.simple("select tollgate.create_url_key()")?;
    let url = owner
        .simple(
            "select tollgate.sign_url('https://cdn.example.com/videos/7/index.m3u8', expires_in => '1 day')",
        )?
        .context("a URL")?;
    let mut web = backend(cluster, WEB)?;
    let code = web.simple(&format!("select code from tollgate.verify_signed_url('{url}')"))?;
    ensure!(code.as_deref() == Some("VALID"), "a signed URL came back as {code:?}");
    let turns = [
        format!("bench.empty('{url}', '{REQUIRED}', '{ADDRESS}')"),
        format!("tollgate.verify_signed_url('{url}', 'GET', '{ADDRESS}')"),
    ];
    let nanoseconds = alternate_numbers("services, signed URLs", run.scale.rounds, turns.len(), |turn| {
        time_of(&mut web, &turns[turn], run.scale.calls)
    })?;
    let [empty, verify] = &nanoseconds[..] else { unreachable!() };
    Ok(vec![
        Figure::new(
            "verify_signed_url inside a backend",
            Unit::Microseconds,
            &verify.minus(empty).times(1e-3),
        )
        .at_most(3.0),
    ])
}

/// Of one token with a quota, for which there is a lease, and one without.
fn with_quotas(run: &Run<'_>, cluster: &Cluster, tokens: &Tokens) -> Result<Vec<Figure>> {
    let (without, with) = (tokens.len() / 3, tokens.len() / 2);
    let with_id = id(u32::try_from(with)?);
    cluster.execute(
        DATABASE,
        &format!(
            "select tollgate.set_quota(token_id => '{with_id}', amount => 1000000000, per => 'month', lease => 500000000)"
        ),
    )?;
    let daemon = Tollgated::spawn(&cluster.url(OPERATOR, DATABASE), &["run", "--log-format=json"])?;
    let statements = [VERIFY];
    let mut clients = Clients::connect(cluster, WEB, DATABASE, run.scale.clients, &statements)?;
    let verify = format!(
        "select code from tollgate.verify_api_token('{}', '{REQUIRED}', '{ADDRESS}')",
        tokens.get(with)
    );
    eventually(Duration::from_secs(30), "the daemon to lease", || {
        cluster.value(DATABASE, &verify).is_ok_and(|code| code.as_deref() == Some("VALID"))
    });
    drop(daemon);
    let one = |index: usize| Tokens::of_texts(&[tokens.get(index).to_owned()]);
    let each = [one(without)?, one(with)?];
    let rates = alternate_numbers("services, quotas", run.scale.rounds, 2, |turn| {
        let done = clients.run(run.scale.turn, 0, &each[turn])?;
        service::flush(cluster, DATABASE)?;
        Ok(done.rate())
    })?;
    let [without, with] = &rates[..] else { unreachable!() };
    Ok(vec![
        Figure::new(
            "verify_api_token of a token with a quota ÷ of one without, round trip",
            Unit::Ratio,
            &with.over(without),
        )
        .at_least(0.97),
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

/// Nanoseconds of a call, of which a statement makes many.
fn time_of(connection: &mut Connection, call: &str, calls: u32) -> Result<f64> {
    let sql = format!("select count({call}) from generate_series(1, {calls})");
    let (counted, time) = timed(|| connection.simple(&sql))?;
    ensure!(counted == Some(calls.to_string()), "{counted:?} calls where {calls} were expected");
    Ok(time.as_secs_f64() * 1e9 / f64::from(calls))
}
