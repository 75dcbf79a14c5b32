//! Row-level security: the cost of a policy that is evaluated once per statement, and of one evaluated per row.

use anyhow::{Result, ensure};
use tollgate_tests::DATABASE;

use super::part::{Outcome, Part, Run, part};
use crate::clients::{REQUIRED, socket};
use crate::measure::{Series, alternate_numbers, timed};
use crate::report::{Figure, Unit};
use crate::service::{self, WEB};
use crate::tokens::Tokens;
use crate::wire::Connection;

pub(super) const PART: Part = part("policy", "row-level security: count(*) with and without a policy", run);

/// Number of counts in a turn: a single one takes only milliseconds.
const COUNTS: u32 = 10;

const COUNT: &str = "select count(*) from bench.posts";

fn run(run: &Run<'_>) -> Result<Outcome> {
    let rows = run.scale.rows;
    let tokens = Tokens::new(1000)?;
    let cluster =
        service::with_tokens(service::builder(run.install, 2_000_000).setting("autovacuum", "off"), &tokens)?;
    cluster.execute(
        DATABASE,
        &format!(
            "create table bench.posts (id bigint not null, author text not null, scope text not null, title text not null);
             insert into bench.posts
                 select n, 'user-' || n % 1000, (array['posts:read', 'posts:write', 'posts:delete'])[1 + n % 3], 'Title ' || n
                 from generate_series(1, {rows}) n;
             create policy read on bench.posts for select to {WEB}
                 using ((select tollgate.token_has_scope('posts:read')));
             grant select on bench.posts to {WEB}"
        ),
    )?;
    cluster.execute(DATABASE, "vacuum (freeze, analyze) bench.posts")?;

    let mut web = Connection::prepare(&socket(&cluster), WEB, DATABASE, &[])?;
    web.share_processor(0);
    web.simple("set max_parallel_workers_per_gather = 0")?;
    let authenticate =
        format!("begin; select valid from tollgate.authenticate('{}', '{REQUIRED}')", tokens.get(7));
    let mut count_all = |sql: &str| -> Result<f64> {
        web.simple(&authenticate)?;
        web.simple(sql)?;
        let (_, time) = timed(|| {
            for _ in 0..COUNTS {
                let counted = web.simple(sql)?;
                ensure!(
                    counted == Some(rows.to_string()),
                    "{counted:?} rows where {rows} were expected: {sql}"
                );
            }
            Ok(())
        })?;
        web.simple("commit")?;
        Ok(time.as_secs_f64() * 1e9 / f64::from(COUNTS * rows))
    };
    let turns = [
        (false, COUNT),
        (true, COUNT),
        (false, "select count(scope) from bench.posts"),
        (false, "select count(tollgate.token_has_scope(scope)) from bench.posts"),
    ];
    let per_row = alternate_numbers("policy", run.scale.rounds, turns.len(), |turn| {
        let (policy, sql) = turns[turn];
        // The same table and the same session, so that only the policy differs.
        let switch = if policy { "enable" } else { "disable" };
        cluster.execute(DATABASE, &format!("alter table bench.posts {switch} row level security"))?;
        count_all(sql)
    })?;
    let [without, with, scan, calls] = &per_row[..] else { unreachable!() };
    let nanoseconds = |what: &str, series: &Series| Figure::new(what, Unit::Nanoseconds, series);
    Ok(Outcome {
        conditions: vec![
            format!("one client, {rows} rows, no parallel workers"),
            "policy: (select tollgate.token_has_scope('posts:read'))".to_owned(),
            "per row: count(token_has_scope(scope)) less count(scope), of three scopes in turn".to_owned(),
            service::conditions(&cluster)?,
        ],
        figures: vec![
            Figure::new("count(*) with a policy ÷ without", Unit::Ratio, &with.over(without)).at_most(1.30),
            nanoseconds("token_has_scope(column), a row", &calls.minus(scan)).at_most(60.0),
            nanoseconds("count(*) without a policy, a row", without),
            nanoseconds("count(*) with a policy, a row", with),
        ],
    })
}
