//! Many sessions on the same few tokens and families: in any order, the result is a state that a single session could
//! have reached, and no session is the victim of a deadlock.

use std::collections::BTreeMap;

use crate::common::{self, Shared, issue_with, value};
use anyhow::{Context as _, Result};
use tokio::task::JoinHandle;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

static SHARED: Shared = Shared::new(&[]);

const SESSIONS: u64 = 8;
const STEPS: u64 = 400;

/// A seeded generator (splitmix64), so that a run can be repeated.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % sides
    }

    fn one_of<'a>(&mut self, choices: &[&'a str]) -> &'a str {
        choices[usize::try_from(self.roll(choices.len() as u64)).expect("a small number")]
    }
}

/// A change of some token. The plaintexts of all tokens are in a table of the test, by their ids.
fn change(dice: &mut Dice) -> String {
    // Mostly a live one, since most soon are not.
    let any = "(select t.id from tollgate.tokens t where t.status <> 'revoked' or random() < 0.05 order by random() limit 1)";
    let scopes =
        dice.one_of(&["{admin}", "{posts:*}", "{posts:read}", "{posts:read,users:*}", "{users:read}", "{}"]);
    let networks =
        dice.one_of(&["null", "'{10.0.0.0/8}'", "'{10.1.0.0/16,192.0.2.0/24}'", "'{10.1.2.0/24}'"]);
    let seconds = dice.one_of(&["0.05", "1", "100", "1000", "100000"]);
    match dice.roll(16) {
        0 | 1 => format!(
            "insert into plain select id, token from tollgate.rotate_api_token({any}, make_interval(secs => {}))",
            dice.one_of(&["0", "0.02", "100"])
        ),
        2..=6 => format!(
            "insert into plain select d.id, d.token from plain p,
                 lateral tollgate.derive_api_token(p.token, 'n', '{scopes}', {}, {networks}) d
             where p.id = {any}",
            if dice.roll(2) == 0 { "null".to_owned() } else { format!("make_interval(secs => {seconds})") }
        ),
        7 | 8 => format!(
            "select tollgate.update_api_token({any}, '{{\"scopes\": [{}]}}')",
            scopes
                .trim_matches(['{', '}'])
                .split(',')
                .filter(|one| !one.is_empty())
                .map(|one| format!("\"{one}\""))
                .collect::<Vec<_>>()
                .join(",")
        ),
        9 => format!(
            "select tollgate.update_api_token({any}, jsonb_build_object('allowed_ips', {networks}::cidr[]))"
        ),
        10 => format!(
            "select tollgate.update_api_token({any}, jsonb_build_object('expires_at', now() + make_interval(secs => {seconds})))"
        ),
        11 => format!(
            "select tollgate.update_api_token({any}, '{{\"expires_at\": null, \"name\": \"again\"}}')"
        ),
        12 if dice.roll(4) == 0 => format!(
            "select tollgate.{}",
            dice.one_of(&[
                "define_scope('race:scope', 'come and gone')",
                "drop_scope('race:scope')",
                "drop_scope('posts:write')"
            ])
        ),
        12 => format!("select tollgate.set_api_token_enabled({any}, {})", dice.one_of(&["true", "false"])),
        13 => format!("select tollgate.set_api_token_enabled({any}, true)"),
        14 => match dice.roll(12) {
            0 => format!("select tollgate.revoke_all_api_tokens('u{}')", dice.roll(3)),
            1 => format!("delete from race_users where id = 'u{}'", dice.roll(3)),
            2 | 3 => format!(
                "update race_users set banned = {} where id = 'u{}'",
                dice.one_of(&["true", "false", "not banned"]),
                dice.roll(3)
            ),
            4 | 5 => "select tollgate.expire_tokens(100), tollgate.purge_tokens('0', 100)".to_owned(),
            _ => format!("select tollgate.revoke_api_token({any})"),
        },
        _ => format!(
            "insert into race_users values ('u{0}') on conflict do nothing;
             insert into plain select id, token from tollgate.create_api_token('u{0}', 'n', '{scopes}')",
            dice.roll(3)
        ),
    }
}

/// The allowed errors of a change that comes too late or exceeds something.
const REFUSALS: [SqlState; 9] = [
    SqlState::FOREIGN_KEY_VIOLATION,
    SqlState::INVALID_PARAMETER_VALUE,
    SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE,
    SqlState::INVALID_AUTHORIZATION_SPECIFICATION,
    SqlState::UNDEFINED_OBJECT,
    SqlState::CONFIGURATION_LIMIT_EXCEEDED,
    SqlState::PROGRAM_LIMIT_EXCEEDED,
    SqlState::DEPENDENT_OBJECTS_STILL_EXIST,
    SqlState::INVALID_TRANSACTION_STATE,
];

/// Each of these must be empty. `t` is a token, `p` its parent.
const VIOLATIONS: [(&str, &str); 17] = [
    (
        "of a missing user",
        "t.revoked_at is null and not exists (select from race_users u where u.id = t.user_id)",
    ),
    (
        "enabled though its user is not active",
        "t.revoked_at is null and t.disabled_at is null
         and not exists (select from race_users u where u.id = t.user_id and not u.banned)",
    ),
    (
        "disabled with an active user",
        "t.revoked_at is null and t.disabled_with_user
         and exists (select from race_users u where u.id = t.user_id and not u.banned)",
    ),
    (
        "disabled with its user without being disabled, or through an ancestor too",
        "t.disabled_with_user and (t.disabled_at is null or t.disabled_via is not null)",
    ),
    ("a parent that is not there", "t.parent_id is not null and p.id is null"),
    ("a child of another user", "p.user_id <> t.user_id"),
    ("a live child of a revoked parent", "p.revoked_at is not null and t.revoked_at is null"),
    ("an enabled child of a disabled parent", "p.disabled_at is not null and t.disabled_at is null and t.revoked_at is null"),
    (
        "a child that outlives its parent",
        "t.revoked_at is null and p.id is not null and coalesce(t.expires_at, 'infinity') > coalesce(p.expires_at, 'infinity')",
    ),
    (
        "a child with a scope that its parent lacks",
        "t.revoked_at is null and exists (select from unnest(t.scopes) s where not tollgate.scope_grants(p.scopes, s))",
    ),
    (
        "a child with a network that its parent lacks",
        "t.revoked_at is null and p.allowed_ips is not null
         and (t.allowed_ips is null or exists (select from unnest(t.allowed_ips) n where not n <<= any (p.allowed_ips)))",
    ),
    (
        "disabled through one that is not disabled by itself",
        "t.revoked_at is null and t.disabled_via is not null
         and not exists (select from tollgate.api_tokens a where a.id = t.disabled_via and a.disabled_at is not null
                         and a.disabled_via is null)",
    ),
    (
        "rotated more than once",
        "(select count(*) from tollgate.audit_log a where a.token_id = t.id and a.event = 'token.rotated')
             <> (t.rotated_to is not null)::int",
    ),
    (
        "a successor that its predecessor does not know",
        "exists (select from tollgate.api_tokens s where s.rotated_from = t.id and t.rotated_to is distinct from s.id)",
    ),
    (
        "not issued once",
        "(select count(*) from tollgate.audit_log a where a.token_id = t.id and a.event in ('token.created', 'token.derived')) <> 1",
    ),
    (
        "revoked and not recorded once, or the reverse",
        "(select count(*) from tollgate.audit_log a where a.token_id = t.id and a.event = 'token.revoked')
             <> (t.revoked_at is not null)::int",
    ),
    (
        "another state than the log says",
        "t.revoked_at is null and (
             (t.disabled_at is not null) is distinct from (
                 select (array_agg(a.event order by a.id desc))[1] = 'token.disabled' from tollgate.audit_log a
                 where a.token_id = t.id and a.event in ('token.disabled', 'token.enabled'))
             and (t.disabled_at is not null or exists (select from tollgate.audit_log a where a.token_id = t.id and a.event = 'token.disabled'))
          or t.expires_at is distinct from (
                 select (array_agg((coalesce(a.detail #> '{changes,expires_at,to}', a.detail -> 'expires_at') #>> '{}')::timestamptz order by a.id desc))[1]
                 from tollgate.audit_log a where a.token_id = t.id and a.event <> 'token.expired'
                   and (a.detail #> '{changes,expires_at}' is not null or a.event in ('token.created', 'token.derived'))))",
    ),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_happens_at_once_ends_in_a_legal_state_and_without_deadlock() -> Result<()> {
    let cluster = SHARED.cluster()?;
    common::database(&cluster, "races")?;
    let owner = cluster.connect("postgres", "races").await?;
    owner
        .batch_execute(
            "create table plain (id uuid, token text);
             create table race_users (id text primary key, banned boolean not null default false);
             insert into race_users values ('u0'), ('u1'), ('u2');
             select tollgate.attach_users_table('race_users', 'id', active => 'not banned');
             select tollgate.define_scope('admin:of', 'the races')",
        )
        .await?;
    for n in 0..6 {
        let token = issue_with(&owner, &format!("u{}", n % 3), "scopes => '{admin}'").await?;
        owner.execute("insert into plain values ($1, $2)", &[&token.id, &token.token]).await?;
    }
    let seed = 0x70_11_6a_7e;
    let mut sessions = Vec::new();
    for n in 0..SESSIONS {
        let session = cluster.connect("postgres", "races").await?;
        // Half of them also take the locks of a limit.
        let isolation = if n % 4 == 3 { "repeatable read" } else { "read committed" };
        session
            .batch_execute(&format!(
                "set default_transaction_isolation = '{isolation}';
                 set tollgate.max_tokens_per_user = {}",
                if n % 2 == 0 { 40 } else { 0 }
            ))
            .await?;
        sessions.push(tokio::spawn(race(session, Dice(seed + n))));
    }
    // Each transaction leaves a legal state, so every snapshot shows one, not only the last.
    while !sessions.iter().all(JoinHandle::is_finished) {
        assert_legal(&owner).await?;
    }
    assert_legal(&owner).await?;
    let mut outcomes: BTreeMap<String, u64> = BTreeMap::new();
    for session in sessions {
        for (outcome, times) in session.await?? {
            *outcomes.entry(outcome).or_default() += times;
        }
    }
    println!("{outcomes:?}");
    assert!(outcomes["done"] > SESSIONS * STEPS / 4, "too little was done: {outcomes:?}");
    let events: i64 = value(&owner, "select count(distinct event) from tollgate.audit_log").await?;
    assert!(events >= 8, "not much happened: {events} kinds of events");
    Ok(())
}

async fn assert_legal(owner: &Client) -> Result<()> {
    for (what, condition) in VIOLATIONS {
        let found: Vec<String> = value(
            owner,
            &format!(
                "select coalesce(array_agg(t.id::text), '{{}}')
                 from tollgate.api_tokens t left join tollgate.api_tokens p on p.id = t.parent_id where {condition}"
            ),
        )
        .await
        .context(what)?;
        assert!(found.is_empty(), "{what}: {found:?}");
    }
    Ok(())
}

async fn race(session: Client, mut dice: Dice) -> Result<BTreeMap<String, u64>> {
    let mut outcomes = BTreeMap::new();
    for _ in 0..STEPS {
        let sql = change(&mut dice);
        let outcome = match session.batch_execute(&sql).await {
            Ok(()) => "done".to_owned(),
            Err(error) => {
                let error = error.as_db_error().context("the connection ended")?;
                let retry = error.code() == &SqlState::T_R_SERIALIZATION_FAILURE;
                anyhow::ensure!(retry || REFUSALS.contains(error.code()), "{sql}: {error:?}");
                error.code().code().to_owned()
            }
        };
        *outcomes.entry(outcome).or_default() += 1;
    }
    Ok(outcomes)
}
