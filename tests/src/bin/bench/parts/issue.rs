//! Issuing a token, with its event in the audit log, compared with an INSERT of the bare row into the same table.

use anyhow::Result;
use tollgate_tests::DATABASE;

use super::part::{Outcome, Part, Run, part};
use crate::clients::{Clients, Statement, Takes};
use crate::measure::alternate_numbers;
use crate::report::{Figure, Unit};
use crate::service;
use crate::tokens::Tokens;

pub(super) const PART: Part = part("issue", "create_api_token compared with an INSERT of the bare row", run);

const BACKOFFICE: &str = "backoffice";

const STATEMENTS: [Statement; 2] = [
    Statement {
        sql: "select token is not null, issued.*
              from tollgate.create_api_token('user-' || floor(random() * 100000)::integer, 'key', '{posts:read}') as issued",
        takes: Takes::Nothing,
        expected: b"t",
    },
    Statement {
        sql: "insert into tollgate.api_tokens (id, token_hash, user_id, name, scopes, metadata, hint)
              values (gen_random_uuid(), sha256(uuid_send(gen_random_uuid())),
                      'user-' || floor(random() * 100000)::integer, 'key', '{posts:read}', '{}', 'tgt_0123')
              returning true, id, hint, user_id, name, scopes, expires_at, created_at",
        takes: Takes::Nothing,
        expected: b"t",
    },
];

fn run(run: &Run<'_>) -> Result<Outcome> {
    let tokens = Tokens::new(run.scale.tokens.div_ceil(10))?;
    let cluster = service::with_tokens(service::builder(run.install, run.scale.tokens), &tokens)?;
    cluster.execute(
        DATABASE,
        &format!(
            "create role {BACKOFFICE} login;
             select tollgate.grant_capability('{BACKOFFICE}', 'issuer');
             select tollgate.define_scope('posts:read', 'Read posts');
             grant select, insert on tollgate.api_tokens to {BACKOFFICE};
             grant execute on function tollgate.acting_role to {BACKOFFICE}"
        ),
    )?;
    let connect = || Clients::connect(&cluster, BACKOFFICE, DATABASE, run.scale.clients, &STATEMENTS);
    let (mut durable, mut relaxed) = (connect()?, connect()?);
    relaxed.each("set synchronous_commit = off")?;
    let rates = alternate_numbers("issue", run.scale.rounds, 4, |turn| {
        let clients = if turn < 2 { &mut durable } else { &mut relaxed };
        Ok(clients.run(run.scale.turn, turn % 2, &tokens)?.rate())
    })?;
    let [create, insert, relaxed_create, relaxed_insert] = &rates[..] else { unreachable!() };
    Ok(Outcome {
        conditions: vec![
            format!("{} clients, {} tokens before", run.scale.clients, tokens.len()),
            "each statement a transaction; the bare row has an id, a digest and the defaults, and no event"
                .to_owned(),
            service::conditions(&cluster)?,
        ],
        figures: vec![
            Figure::new("create_api_token ÷ a bare INSERT", Unit::Ratio, &create.over(insert)).at_least(0.4),
            Figure::new(
                "the same with synchronous_commit off for both",
                Unit::Ratio,
                &relaxed_create.over(relaxed_insert),
            ),
            Figure::new("create_api_token", Unit::PerSecond, create),
            Figure::new("bare INSERT", Unit::PerSecond, insert),
            Figure::new("create_api_token, synchronous_commit off", Unit::PerSecond, relaxed_create),
            Figure::new("bare INSERT, synchronous_commit off", Unit::PerSecond, relaxed_insert),
        ],
    })
}
