//! An attacker with the daemon's login calls its functions with any arguments: nothing is erased, no reader misses
//! events, nothing is minted, and nothing breaks.

use crate::common::{self, Shared, code, issue, value};
use crate::operator::{self, Db, OPERATOR, counts, flush_all};
use anyhow::{Context as _, Result};
use serde_json::Value;
use tokio_postgres::Client;

static SHARED: Shared = Shared::new(&[("tollgate.min_retention", "30d")]);

/// A normal argument, and absurd ones.
fn values(kind: &str, major: u32) -> (&'static str, Vec<&'static str>) {
    let mut endless = vec!["null", "'infinity'", "'-infinity'"];
    match kind {
        "bigint" => ("1", vec!["null", "-1", "0", "9223372036854775807", "-9223372036854775808"]),
        "integer" => ("1", vec!["null", "-1", "0", "2147483647", "-2147483648"]),
        "interval" => {
            let mut hostile = vec!["null", "'-1 second'", "'0'", "'178000000 years'", "'-178000000 years'"];
            if major >= 17 {
                hostile.extend(["'infinity'", "'-infinity'"]);
            }
            ("'1 year'", hostile)
        }
        "timestamp with time zone" => {
            endless.extend(["'4000-01-01 BC'", "'4714-11-24 00:00+00 BC'", "'294000-01-01'", "now()"]);
            ("now() - interval '1 year'", endless)
        }
        "text" => {
            let mut hostile =
                vec!["null", "''", "repeat('x', 100000)", "repeat('a', 80)", "E'\\x01\\n'", "'%s%n'"];
            // Tasks, and the subscription that only one function moves.
            hostile.extend([
                "'purge'",
                "'purge_audit'",
                "'seal_audit'",
                "'flush_usage'",
                "'tollgate:webhooks'",
            ]);
            ("'x'", hostile)
        }
        "uuid" => (
            "'00000000-0000-0000-0000-000000000001'",
            vec!["null", "'00000000-0000-0000-0000-000000000000'", "'ffffffff-ffff-ffff-ffff-ffffffffffff'"],
        ),
        "bytea" => (
            "'x'",
            vec![
                "null",
                "''",
                "decode(repeat('00', 100000), 'hex')",
                "(select proof from tollgate.read_events(tollgate.event_position()))",
            ],
        ),
        "inet" => ("'10.0.0.1'", vec!["null", "'::/0'", "'0.0.0.0/0'"]),
        "jsonb" => (
            "'{}'",
            vec![
                "null",
                "'null'",
                "'[]'",
                "jsonb_build_object('x', repeat('x', 1000000))",
                "to_jsonb(repeat('a', 80))",
            ],
        ),
        "bigint[]" => ("'{}'", vec!["null", "'{null}'", "'{9223372036854775807,-1}'"]),
        "tollgate.event_cursor" => (
            "'(00000000-0000-0000-0000-000000000000,1:1:,,,,,)'",
            vec![
                "null",
                "tollgate.event_position()",
                "(select next from tollgate.read_events(tollgate.event_position()))",
                "(select next from tollgate.read_events(tollgate.event_position(0), 1))",
                "'(,,,,,,)'",
                "'(00000000-0000-0000-0000-000000000001,1:1:,,,,,)'",
                "'(00000000-0000-0000-0000-000000000000,9223372036854775807:9223372036854775807:,,,,,)'",
                "'(00000000-0000-0000-0000-000000000000,1:1:,00000000-0000-0000-0000-000000000000,1:1:,-1,9223372036854775807,-9223372036854775808)'",
                "'(00000000-0000-0000-0000-000000000000,1:1:,00000000-0000-0000-0000-000000000000,1:1:,9223372036854775807,-1,9223372036854775807)'",
            ],
        ),
        "tollgate.usage_row[]" => (
            "'{}'",
            vec![
                "null",
                "array[null]::tollgate.usage_row[]",
                "array[(null, null, null, null, null)]::tollgate.usage_row[]",
                "(select array[(t.id, -1, -1, '-infinity', null), (t.id, 9223372036854775807, 0, 'infinity', null)]::tollgate.usage_row[] \
                  from tollgate.known t)",
            ],
        ),
        "tollgate.finding[]" => (
            "'{}'",
            vec![
                "null",
                "array[null]::tollgate.finding[]",
                "array[(null, null, null, null)]::tollgate.finding[]",
                "(select array[(t.id, now(), null, null), (t.id, 'infinity', '10.0.0.1', ''), (t.id, '-infinity', null, sha256(''))] \
                  ::tollgate.finding[] from tollgate.known t)",
            ],
        ),
        "tollgate.lease_request[]" => (
            "'{}'",
            vec![
                "null",
                "array[null]::tollgate.lease_request[]",
                "array[(null, null, null, null, null, null)]::tollgate.lease_request[]",
                "(select array[(q.id, gen_random_uuid(), 'infinity', 0, 0, ''), (q.id, q.id, 'infinity', -1, 9223372036854775807, sha256(''))] \
                  ::tollgate.lease_request[] from tollgate.known_quota q)",
            ],
        ),
        other => panic!("no values of type {other}: add some"),
    }
}

/// The state that must not change, or may only grow.
async fn state(owner: &Client) -> Result<Value> {
    value(
        owner,
        "select jsonb_build_object(
            'tokens', (select jsonb_agg(to_jsonb(t) order by t.id) from tollgate.api_tokens t),
            'capabilities', (select count(*) from tollgate.capabilities),
            'scopes', (select count(*) from tollgate.scopes),
            'quotas', (select jsonb_agg(to_jsonb(q)) from tollgate.quotas q),
            'leases', (select count(*) from tollgate.quota_leases),
            'webhooks', (select count(*) from tollgate.webhooks),
            'usage', (select jsonb_agg(to_jsonb(u) order by u.token_id) from tollgate.token_usage u),
            'purged', tollgate.last_purged_seal(),
            'first event', (select min(id) from tollgate.audit_log),
            'subscriber', (select s.place::text from tollgate.subscriptions s where s.name = 'x'),
            'issuers', (select jsonb_agg(i) from tollgate.trusted_issuers i), 'keys', (select jsonb_agg(k) from tollgate.issuer_keys k),
            'many daemons', (select count(*) > 110 from tollgate.daemon_reports))",
    )
    .await
}

#[tokio::test]
async fn no_arguments_of_an_operators_function_erase_blind_or_mint() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "hostile").await?;
    // Named as the functions name what they are about.
    operator::deliver(&db.operator, "x", 1000, "commit").await?;
    let delivered: i64 = value(&db.owner, "select max(id) from tollgate.audit_log").await?;
    let token = issue(&db.owner, "ann", &[]).await?;
    let ended = issue(&db.owner, "ann", &[]).await?;
    common::revoke(&db.owner, ended.id).await?;
    assert_eq!(code(&db.web, &token.token).await?, "VALID");
    flush_all(&db.operator).await?;
    db.owner
        .batch_execute(
            "create view tollgate.known as select id from tollgate.api_tokens where revoked_at is null;
             grant select on tollgate.known to tollgated;
             select tollgate.set_quota(user_id => 'ben', amount => 10, per => 'lifetime');
             create view tollgate.known_quota as select id from tollgate.quotas;
             grant select on tollgate.known_quota to tollgated;
             -- Nor may one that fetches keys touch those that were given.
             select tollgate.grant_capability('tollgated', 'key_fetcher'),
                    tollgate.trust_issuer('x', 'x:', '{https://api.test}', jwks => '{\"keys\": [{\"kty\": \"EC\", \"crv\": \"P-256\",
                        \"kid\": \"1\", \"x\": \"MKBCTNIcKUSDii11ySs3526iDZ8AiTo7Tu6KPAqv7D4\",
                        \"y\": \"4Etl6SRW2YiLUrN5vfvVHuhp7x8PxltmWWlbbM4IFyM\"}]}')",
        )
        .await?;
    let events: i64 = value(&db.owner, "select count(*) from tollgate.audit_log").await?;
    db.operator.execute("select tollgate.seal_audit_log()", &[]).await?;
    let before = state(&db.owner).await?;

    let functions = db
        .owner
        .query(
            "select p.proname::text, array(select format_type(t, null) from unnest(p.proargtypes) with ordinality a (t, n) order by n)
             from pg_proc p
             where p.pronamespace = 'tollgate'::regnamespace and has_function_privilege('tollgated', p.oid, 'execute')
               and not has_function_privilege('web', p.oid, 'execute')
             order by 1",
            &[],
        )
        .await?;
    assert!(functions.len() > 20, "{}", functions.len());
    let major = tollgate_tests::Install::under_test()?.major;
    let mut uses = 1;
    for function in &functions {
        let (name, kinds): (&str, Vec<String>) = (function.get(0), function.get(1));
        let session = db.session(OPERATOR).await?;
        session.batch_execute("set statement_timeout = '30s'").await?;
        let mut calls = vec![format!(
            "select tollgate.{name}({})",
            kinds.iter().map(|kind| values(kind, major).0).collect::<Vec<_>>().join(", ")
        )];
        for (place, kind) in kinds.iter().enumerate() {
            for hostile in values(kind, major).1 {
                let arguments: Vec<&str> = kinds
                    .iter()
                    .enumerate()
                    .map(|(n, kind)| if n == place { hostile } else { values(kind, major).0 })
                    .collect();
                calls.push(format!("select tollgate.{name}({})", arguments.join(", ")));
            }
        }
        for call in &calls {
            if let Err(error) = session.batch_execute(call).await {
                let error = error.as_db_error().with_context(|| call.clone())?;
                let class = &error.code().code()[..2];
                assert!(["22", "25", "42", "54", "55"].contains(&class), "{call}: {error:?}");
                assert!(!error.message().contains(&"a".repeat(80)), "{call}: {error:?}");
            }
        }
        assert_eq!(state(&db.owner).await?, before, "after {name}");
        assert_eq!(code(&db.web, &token.token).await?, "VALID", "after {name}");
        uses += 1;
    }
    let left: i64 = value(&db.owner, "select count(*) from tollgate.audit_log").await?;
    assert!(left >= events, "{left} of {events}");
    // Nothing is hidden: later uses are counted, the seals hold, and the log can be followed.
    flush_all(&db.operator).await?;
    assert_eq!(counts(&db.owner, token.id).await?, (uses, 0));
    assert!(value::<bool>(&db.owner, "select whole from tollgate.verify_audit_log()").await?);
    let mut cursor = operator::position(&db.operator, Some(0)).await?;
    let received = operator::read_all(&db.operator, &mut cursor, 1000).await?;
    assert!(i64::try_from(received.len())? >= events, "{} of {events}", received.len());
    // The subscriber whose name they had receives all that happened since.
    let received = operator::deliver(&db.operator, "x", 1000, "commit").await?;
    let received: Vec<i64> = received.iter().filter_map(|event| event["id"].as_i64()).collect();
    let since = format!("select array_agg(id order by id) from tollgate.audit_log where id > {delivered}");
    let happened: Vec<i64> = value(&db.owner, &since).await?;
    assert!(happened.len() >= 3 && received == happened, "{received:?} of {happened:?}");
    Ok(())
}
