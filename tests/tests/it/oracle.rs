//! The probe compared with a hand-written query: whatever was stored, whatever is presented and whenever, both give the
//! same answer.
//!
//! The verifying session may be in a transaction with an old snapshot; the query runs outside of it and so sees what is
//! committed now, which verification promises to see. A token may expire between the two: the query is evaluated for
//! the moments before and after the verification, and one of its two answers must match.

use crate::common::{self, Verification, World};
use anyhow::{Context as _, Result, ensure};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::{Config, RngSeed, TestCaseError, TestRunner};
use tokio_postgres::{Client, Statement};
use tollgate_core::status::Code;
use tollgate_core::token::{self, Prefix};
use uuid::Uuid;

static SHARED: common::Shared = common::Shared::new(&[]);

/// The number of tokens in a run; each step names one of them.
const TOKENS: usize = 3;

/// Networks by the rules of the library's `Net`: an IPv4-mapped IPv6 address or network is the IPv4 one.
const SET_UP: &str = "
    create schema oracle;
    create function oracle.canonical(n inet) returns inet language sql immutable as $$
        select case when family(n) = 6 and masklen(n) >= 96 and set_masklen(n, 128) <<= '::ffff:0:0/96'
                    then set_masklen('0.0.0.0'::inet + (set_masklen(n, 128) - '::ffff:0:0'::inet), masklen(n) - 96)
                    else n end
    $$";

const STORE: &str = "
    insert into tollgate.api_tokens as t (id, token_hash, hint, user_id, name, scopes, metadata,
                                          expires_at, disabled_at, revoked_at, allowed_ips)
    values ($1, sha256(convert_to($2, 'UTF8')), 'x_0000', $3, 'n', $4, jsonb_build_object('of', $3::text),
            coalesce($5::text::timestamptz, clock_timestamp() + $6::bigint * interval '1 microsecond'),
            case when $7 then now() end, case when $8 then now() end,
            (select array_agg(network(n::inet)::cidr) from unnest($9::text[]) n))
    on conflict (id) do update set user_id = excluded.user_id, scopes = excluded.scopes, metadata = excluded.metadata,
        expires_at = excluded.expires_at, disabled_at = excluded.disabled_at, revoked_at = excluded.revoked_at,
        allowed_ips = excluded.allowed_ips";

/// `$5` and `$6`: when; `$4`: whether the token's checksum is right; `$7`: whether a digest is passed.
const ORACLE: &str = "
    select j.code = 'VALID' as valid, j.code, t.id as token_id,
           case when j.code = 'VALID' then t.user_id end as user_id,
           case when j.code = 'VALID' then t.name end as name,
           case when j.code = 'VALID' then t.scopes end as scopes,
           t.expires_at::text as expires_at,
           case when j.code = 'VALID' then t.metadata end as metadata,
           null::integer as rate_limit, null::integer as rate_remaining, null::text as retry_after
    from unnest(array[$5::text::timestamptz, $6::text::timestamptz]) with ordinality moment (at, n)
         left join tollgate.api_tokens t on t.token_hash = sha256(convert_to($1, 'UTF8')),
         lateral (select case
             when not $7 and ($1 is null or not $4 or $1 !~ '^[a-z][a-z0-9_]{0,15}_[0-9a-f]{88}$') then 'MALFORMED'
             when $7 and $1 is null then 'MALFORMED'
             when t.id is null then 'NOT_FOUND'
             when t.revoked_at is not null then 'REVOKED'
             when t.disabled_at is not null then 'DISABLED'
             when t.expires_at <= moment.at then 'EXPIRED'
             when t.allowed_ips is not null and not exists (
                 select from unnest(t.allowed_ips) network
                 where oracle.canonical(network) >>= oracle.canonical($3::text::inet)) then 'IP_NOT_ALLOWED'
             when exists (select from unnest($2::text[]) required
                 where tollgate.scope_grants(t.scopes, required) is not true) then 'INSUFFICIENT_SCOPE'
             else 'VALID' end as code) j
    order by moment.n";

#[derive(Clone, Debug)]
enum Step {
    Store { token: usize, state: State },
    Forget { token: usize },
    Begin { level: &'static str },
    End,
    Ask(Ask),
}

#[derive(Clone, Debug)]
struct State {
    user_id: String,
    scopes: Vec<String>,
    expiry: Expiry,
    disabled: bool,
    revoked: bool,
    networks: Option<Vec<String>>,
}

#[derive(Clone, Debug)]
enum Expiry {
    At(Option<&'static str>),
    /// Microseconds from now.
    In(i64),
}

#[derive(Clone, Debug)]
struct Ask {
    presented: Presented,
    required: Option<Vec<Option<String>>>,
    client_ip: Option<String>,
}

#[derive(Clone, Debug)]
enum Presented {
    Token(usize),
    Changed { token: usize, at: prop::sample::Index, to: char },
    Cut { token: usize, len: prop::sample::Index },
    Text(Option<String>),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..TOKENS, state()).prop_map(|(token, state)| Step::Store { token, state }),
        1 => (0..TOKENS).prop_map(|token| Step::Forget { token }),
        1 => select(vec!["read committed", "repeatable read", "serializable", "repeatable read, read only"])
            .prop_map(|level| Step::Begin { level }),
        1 => Just(Step::End),
        8 => ask().prop_map(Step::Ask),
    ]
}

fn state() -> impl Strategy<Value = State> {
    let expiry = prop_oneof![
        3 => Just(Expiry::At(None)),
        2 => select(vec!["infinity", "-infinity", "2000-01-01 00:00:00+00", "1970-01-01+00", "2200-01-01+00"])
            .prop_map(|at| Expiry::At(Some(at))),
        2 => (-3_000_000..3_000_000i64).prop_map(Expiry::In),
        // About to expire, or just expired, while the next steps run.
        2 => (-500..2_000i64).prop_map(Expiry::In),
    ];
    let networks = option::of(vec(network(), 1..4));
    (
        "[a-zé用]{1,4}",
        vec(granted(), 0..5),
        expiry,
        prop::bool::weighted(0.15),
        prop::bool::weighted(0.15),
        networks,
    )
        .prop_map(|(user_id, scopes, expiry, disabled, revoked, networks)| State {
            user_id,
            scopes,
            expiry,
            disabled,
            revoked,
            networks,
        })
}

fn ask() -> impl Strategy<Value = Ask> {
    let presented = prop_oneof![
        12 => (0..TOKENS).prop_map(Presented::Token),
        1 => (0..TOKENS, any::<prop::sample::Index>(), select(vec!['0', 'a', 'f', '_', 'A', 'z', 'é']))
            .prop_map(|(token, at, to)| Presented::Changed { token, at, to }),
        1 => (0..TOKENS, any::<prop::sample::Index>()).prop_map(|(token, len)| Presented::Cut { token, len }),
        1 => option::of("\\PC{0,100}").prop_map(Presented::Text),
        2 => ("[a-z0-9_]?[a-z][a-z0-9_]{0,17}", "[0-9a-f]{80}")
            .prop_map(|(prefix, body)| Presented::Text(Some(format!("{prefix}_{body}{}", checksum(&body))))),
    ];
    let required = option::of(vec(prop_oneof![12 => scope().prop_map(Some), 1 => Just(None)], 0..3));
    let client_ip = option::weighted(0.85, network());
    (presented, required, client_ip).prop_map(|(presented, required, client_ip)| Ask {
        presented,
        required,
        client_ip,
    })
}

/// From few enough segments that grants often match.
fn scope() -> impl Strategy<Value = String> {
    prop_oneof![
        12 => vec(select(vec!["a", "b", "0"]), 1..4).prop_map(|segments| segments.join(":")),
        1 => select(vec!["", "*", "admin", "a:", ":a", "a::b", "A", "a:*", "a:*:b", "é"]).prop_map(str::to_owned),
        1 => Just("a:".repeat(63) + "ab"),
        1 => Just("a:".repeat(64) + "a"),
    ]
}

fn granted() -> impl Strategy<Value = String> {
    prop_oneof![
        4 => scope(),
        4 => scope().prop_map(|scope| scope + ":*"),
        1 => Just("admin".to_owned()),
    ]
}

/// An address or a network, from a part of the two address spaces so small that one often contains another.
fn network() -> impl Strategy<Value = String> {
    let v4 = (0..2u8, select(vec![0u8, 1, 255]), prop_oneof![4 => Just(32u8), 3 => 23..=31u8, 1 => 0..=22u8])
        .prop_map(|(c, d, bits)| (format!("10.0.{c}.{d}"), bits));
    prop_oneof![
        4 => v4.clone().prop_map(|(address, bits)| format!("{address}/{bits}")),
        2 => v4.prop_map(|(address, bits)| format!("::ffff:{address}/{}", 96 + bits)),
        2 => (0..2u8, select(vec![0u16, 0x8000]), prop_oneof![Just(128u8), 111..=128u8, 0..=128u8])
            .prop_map(|(high, low, bits)| format!("2001:db8::{high:x}:{low:x}/{bits}")),
        1 => (80..=128u8).prop_map(|bits| format!("::ffff:10.0.1.1/{bits}")),
    ]
}

struct Session<'a> {
    web: &'a Client,
    owner: &'a Client,
    store: Statement,
    oracle: Statement,
    verify: Statement,
    verify_hash: Statement,
    /// Ids and plaintexts.
    tokens: [(Uuid, String); TOKENS],
}

impl Session<'_> {
    async fn run(&self, steps: &[Step]) -> Result<()> {
        for step in steps {
            self.step(step).await.with_context(|| format!("at {step:?}"))?;
        }
        Ok(())
    }

    async fn step(&self, step: &Step) -> Result<()> {
        match step {
            Step::Store { token, state } => {
                let (id, token) = &self.tokens[*token];
                let (at, micros) = match &state.expiry {
                    Expiry::At(at) => (*at, None),
                    Expiry::In(micros) => (None, Some(*micros)),
                };
                self.owner
                    .execute(
                        &self.store,
                        &[
                            id,
                            token,
                            &state.user_id,
                            &state.scopes,
                            &at,
                            &micros,
                            &state.disabled,
                            &state.revoked,
                            &state.networks,
                        ],
                    )
                    .await?;
            }
            Step::Forget { token } => {
                let forget = "delete from tollgate.api_tokens where id = $1";
                self.owner.execute(forget, &[&self.tokens[*token].0]).await?;
            }
            Step::Begin { level } => {
                let begin = format!("rollback; begin isolation level {level}; select count(*) from pg_class");
                self.web.batch_execute(&begin).await?;
            }
            Step::End => self.web.batch_execute("rollback").await?,
            Step::Ask(ask) => self.ask(ask).await?,
        }
        Ok(())
    }

    async fn ask(&self, ask: &Ask) -> Result<()> {
        let presented = self.presented(&ask.presented);
        let checksum_fits = presented.as_deref().is_some_and(checksum_fits);
        let digest = presented.as_deref().map(|token| token::digest(token.as_bytes()).to_vec());
        for by_digest in [false, true] {
            let before = self.now().await?;
            let row = if by_digest {
                self.web.query(&self.verify_hash, &[&digest, &ask.required, &ask.client_ip]).await?
            } else {
                self.web.query(&self.verify, &[&presented, &ask.required, &ask.client_ip]).await?
            };
            let after = self.now().await?;
            ensure!(row.len() == 1, "{} rows", row.len());
            let answer = Verification::of(&row[0]);
            let expected: Vec<Verification> = self
                .owner
                .query(
                    &self.oracle,
                    &[&presented, &ask.required, &ask.client_ip, &checksum_fits, &before, &after, &by_digest],
                )
                .await?
                .iter()
                .map(Verification::of)
                .collect();
            ensure!(expected.len() == 2, "the oracle found {} rows for two moments", expected.len());
            ensure!(
                expected.contains(&answer),
                "by {}: verified as {answer:?}, expected {:?} (or, a moment before, {:?})",
                if by_digest { "digest" } else { "token" },
                expected[1],
                expected[0]
            );
        }
        Ok(())
    }

    async fn now(&self) -> Result<String> {
        common::value(self.owner, "select clock_timestamp()::text").await
    }

    fn presented(&self, presented: &Presented) -> Option<String> {
        match presented {
            Presented::Token(token) => Some(self.tokens[*token].1.clone()),
            Presented::Changed { token, at, to } => {
                let token = &self.tokens[*token].1;
                let at = at.index(token.len());
                Some(format!("{}{to}{}", &token[..at], &token[at + 1..]))
            }
            Presented::Cut { token, len } => {
                let token = &self.tokens[*token].1;
                Some(token[..len.index(token.len())].to_owned())
            }
            Presented::Text(text) => text.clone(),
        }
    }
}

fn checksum_fits(token: &str) -> bool {
    let split = token.len().checked_sub(88).filter(|&at| token.is_char_boundary(at));
    split.is_some_and(|at| {
        let (body, last) = token[at..].split_at_checked(80).unwrap_or_default();
        checksum(body) == last
    })
}

/// CRC-32 (IEEE 802.3), bit by bit as the standard defines it.
fn checksum(body: &str) -> String {
    let mut crc = u32::MAX;
    for byte in body.bytes() {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ 0xedb8_8320 } else { crc >> 1 };
        }
    }
    format!("{:08x}", !crc)
}

/// `cases` runs from a fixed seed; `PROPTEST_RNG_SEED` and `PROPTEST_CASES` choose others.
fn runner(cases: u32) -> TestRunner {
    let mut config = Config { failure_persistence: None, max_shrink_iters: 2000, ..Config::default() };
    if std::env::var_os("PROPTEST_CASES").is_none() {
        config.cases = cases;
    }
    if std::env::var_os("PROPTEST_RNG_SEED").is_none() {
        config.rng_seed = RngSeed::Fixed(0x7011_6a7e);
    }
    TestRunner::new(config)
}

#[test]
fn verification_answers_as_the_query_by_hand_does() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let World { owner, web, cluster } = runtime.block_on(SHARED.world())?;
    cluster.execute(tollgate_tests::DATABASE, SET_UP)?;
    let select = |function: &str| {
        format!("select {} from tollgate.{function}($1, $2, $3::text::inet) v", Verification::COLUMNS)
    };
    let session = runtime.block_on(async {
        anyhow::Ok(Session {
            store: owner.prepare(STORE).await?,
            oracle: owner.prepare(ORACLE).await?,
            verify: web.prepare(&select("verify_api_token")).await?,
            verify_hash: web.prepare(&select("verify_api_token_hash")).await?,
            web: &web,
            owner: &owner,
            tokens: std::array::from_fn(|n| {
                let prefix = ["tgt", "my_app", "a"][n];
                let prefix = Prefix::parse(prefix).expect("a well-formed prefix");
                let issued = token::issue(&prefix, &std::array::from_fn(|i| (i * 7 + n) as u8));
                (Uuid::new_v4(), issued.token().to_owned())
            }),
        })
    })?;

    runner(400)
        .run(&vec(step(), 1..16), |steps| {
            runtime
                .block_on(async {
                    web.batch_execute("rollback").await?;
                    owner.batch_execute("delete from tollgate.api_tokens").await?;
                    session.run(&steps).await
                })
                .map_err(|error| TestCaseError::fail(format!("{error:#}")))
        })
        .map_err(|error| anyhow::anyhow!("{error}"))?;

    // A generator that never reaches a code would prove nothing about it.
    let counters: serde_json::Value =
        runtime.block_on(common::value(&owner, "select verifications from tollgate.stats()"))?;
    // The oracle knows API tokens only, and none with a limit or a quota.
    let never = [
        Code::UntrustedIssuer,
        Code::UnknownKey,
        Code::BadSignature,
        Code::NotYetValid,
        Code::WrongAudience,
        Code::RateLimited,
        Code::QuotaExceeded,
    ];
    for code in Code::ALL.iter().filter(|code| !never.contains(code)) {
        assert!(counters[code.as_str()].as_u64() >= Some(20), "{code} was hardly met: {counters}");
    }
    Ok(())
}

#[test]
fn the_oracles_checksum_is_the_published_one() {
    // Computed with Python's `zlib.crc32`.
    let zeros = "0".repeat(80);
    assert_eq!(checksum(&zeros), "7ef74675");
    assert!(checksum_fits(&format!("my_app_{zeros}7ef74675")));
    assert!(!checksum_fits(&format!("my_app_{zeros}7ef74676")));
    assert!(!checksum_fits("short"));
}
