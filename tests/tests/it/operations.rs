//! Operators' work on a database with Tollgate: dump and restore it, upgrade the server, remove Tollgate.

use crate::calls;
use crate::operator::{self, QUEUE_ALL};
use std::collections::BTreeMap;
use std::io::Write as _;
use std::process::Stdio;

use crate::common::{self, Token, code, derive, issue, issue_with, revoke, rotate, value};
use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tollgate_tests::{Cluster, DATABASE, Install, eventually_async};

/// Tokens in every state, with usage, events and seals.
struct Populated {
    /// With the expected verification of each.
    tokens: Vec<(Token, &'static str)>,
    state: Value,
}

/// All data that Tollgate keeps, in a fixed order.
const STATE: &str = "
    select jsonb_build_object(
        'tokens', (select jsonb_agg(to_jsonb(t) order by t.id) from tollgate.api_tokens t),
        'usage', (select jsonb_agg(to_jsonb(u) order by u.token_id) from tollgate.token_usage u),
        'hours', (select jsonb_agg(to_jsonb(h) order by h.token_id, h.hour) from tollgate.usage_hourly h),
        'scopes', (select jsonb_agg(to_jsonb(s) order by s.name) from tollgate.scopes s),
        'audit', (select jsonb_agg(to_jsonb(a) order by a.id) from tollgate.audit_log a),
        'seals', (select jsonb_agg(to_jsonb(s) order by s.seal) from tollgate.audit_seals s),
        'epochs', (select jsonb_agg(to_jsonb(e) order by e.epoch) from tollgate.audit_epochs e),
        'subscriptions', (select jsonb_agg(to_jsonb(s) order by s.name) from tollgate.subscriptions s),
        'capabilities', (select jsonb_agg(to_jsonb(c) - 'role_oid' order by c.role, c.capability) from tollgate.capabilities c),
        'grants', (select jsonb_agg(to_jsonb(g) order by g.role, g.capability) from tollgate.capability_grants g))";

async fn populate(cluster: &Cluster) -> Result<Populated> {
    cluster
        .execute(DATABASE, "create role shop login; select tollgate.grant_capability('shop', 'issuer')")?;
    cluster.execute(DATABASE, "grant select on tollgate.tokens to web")?;
    let owner = cluster.connect("postgres", DATABASE).await?;
    let shop = cluster.connect("shop", DATABASE).await?;
    owner.query("select tollgate.open_subscription('reader')", &[]).await?;
    let plain = issue_with(
        &shop,
        "ann",
        "scopes => '{posts:read,users:*}', metadata => '{\"a\": [1, null]}', allowed_ips => null",
    )
    .await?;
    let parent = issue_with(&shop, "ann", "scopes => '{posts:*}', expires_in => '1 day'").await?;
    let child = derive(&shop, &parent, &["posts:read"]).await?;
    let disabled = issue(&shop, "bob", &[]).await?;
    owner.query("select tollgate.set_api_token_enabled($1, false, 'holidays')", &[&disabled.id]).await?;
    let revoked = issue(&shop, "bob", &[]).await?;
    revoke(&owner, revoked.id).await?;
    let rotated = issue(&shop, "cid", &[]).await?;
    let successor = rotate(&owner, rotated.id, "0").await?;
    let tokens = vec![
        (plain, "VALID"),
        (parent, "VALID"),
        (child, "VALID"),
        (disabled, "DISABLED"),
        (revoked, "REVOKED"),
        (rotated, "EXPIRED"),
        (successor, "VALID"),
    ];
    for (token, expected) in &tokens {
        assert_eq!(code(&shop, &token.token).await?, *expected);
    }
    operator::flush_all(&owner).await?;
    owner.query("select tollgate.seal_audit_log()", &[]).await?;
    // After the seal, so that the end is not sealed.
    owner.query("select tollgate.define_scope('late:scope', 'after the seal')", &[]).await?;
    Ok(Populated { tokens, state: value(&owner, STATE).await? })
}

/// Everything is there, works, and continues.
async fn assert_whole(cluster: &Cluster, before: &Populated) -> Result<()> {
    let owner = cluster.connect("postgres", DATABASE).await?;
    let after: Value = value(&owner, STATE).await?;
    for part in before.state.as_object().context("an object")?.keys() {
        assert_eq!(after[part], before.state[part], "{part}");
    }
    let whole: Value = value(&owner, "select to_jsonb(v) from tollgate.verify_audit_log() v").await?;
    assert_eq!((&whole["whole"], &whole["fault"]), (&json!(true), &Value::Null), "{whole}");

    let shop = cluster.connect("shop", DATABASE).await?;
    for (token, expected) in &before.tokens {
        assert_eq!(code(&shop, &token.token).await?, *expected);
    }
    assert_eq!(code(&shop, &issue(&shop, "dan", &["posts:read"]).await?.token).await?, "VALID");
    assert!(revoke(&shop, before.tokens[1].0.id).await?);
    assert_eq!(code(&shop, &before.tokens[2].0.token).await?, "REVOKED", "a child is still one");
    operator::flush_all(&owner).await?;
    owner.query("select tollgate.seal_audit_log()", &[]).await?;
    assert!(value::<bool>(&owner, "select whole from tollgate.verify_audit_log()").await?);
    // The subscription continues after the events that existed when it was opened.
    let received: i64 = value(
        &owner,
        "select jsonb_array_length((tollgate.read_events(s)).events)::bigint
           from tollgate.open_subscription('reader') s",
    )
    .await?;
    let events: i64 = value(&owner, "select count(*) from tollgate.audit_log where event <> 'scope.defined' and event not like 'capability.%'").await?;
    assert!(received >= events, "{received} of {events} events are received");
    Ok(())
}

fn roles(cluster: &Cluster) -> Result<()> {
    cluster.execute(DATABASE, "create role web login; create role shop login")
}

fn feed(mut command: std::process::Command, input: &[u8]) -> Result<()> {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
    child.stdin.take().context("it was piped")?.write_all(input)?;
    let output = child.wait_with_output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

#[tokio::test]
async fn a_dump_that_is_restored_elsewhere_is_whole() -> Result<()> {
    let cluster = common::start(Cluster::builder().own_identity())?;
    let before = populate(&cluster).await?;
    for format in ["plain", "custom"] {
        let dump = cluster.program("pg_dump").arg(format!("--format={format}")).output()?;
        ensure!(dump.status.success(), "{}", String::from_utf8_lossy(&dump.stderr));
        let other = Cluster::builder().own_identity().extension(false).start()?;
        roles(&other)?;
        let mut restore = other.program(if format == "plain" { "psql" } else { "pg_restore" });
        match format {
            "plain" => restore.args(["--no-psqlrc", "--quiet", "--set=ON_ERROR_STOP=1"]),
            _ => restore.args(["--exit-on-error", "--dbname=postgres"]),
        };
        feed(restore, &dump.stdout)?;
        assert_whole(&other, &before).await.context(format)?;
    }
    Ok(())
}

#[tokio::test]
#[ignore = "long: pg_upgrade, 30 s"]
async fn a_server_is_upgraded_under_its_tokens() -> Result<()> {
    let Some(older) = Install::older()? else {
        let why = format!("{} names no older PostgreSQL", tollgate_tests::OLDER_PG_CONFIG_VAR);
        if Install::under_test()?.major < 18 {
            common::not_run(&why);
            return Ok(());
        }
        return common::not_run_here(&why);
    };
    let mut cluster = common::start(Cluster::builder().install(older))?;
    let before = populate(&cluster).await?;
    let upgraded = Cluster::builder().upgrade(&mut cluster)?;
    assert!(upgraded.major() > cluster.major());
    assert_whole(&upgraded, &before).await
}

#[tokio::test]
async fn dropping_the_extension_leaves_nothing_and_it_can_be_created_again() -> Result<()> {
    // The contents of the catalogues, by name.
    const CATALOGUE: &str = "
        select jsonb_build_object(
            'schemas', (select jsonb_agg(nspname order by nspname) from pg_namespace where nspname !~ '^pg_(toast_)?temp'),
            'relations', (select jsonb_agg(oid::regclass::text order by 1) from pg_class where oid >= 16384 and relname !~ '^pg_toast'),
            'functions', (select jsonb_agg(oid::regprocedure::text order by 1) from pg_proc where oid >= 16384),
            'types', (select jsonb_agg(oid::regtype::text order by 1) from pg_type where oid >= 16384),
            'triggers', (select jsonb_agg(tgname order by 1) from pg_trigger where not tgisinternal),
            'event triggers', (select jsonb_agg(evtname) from pg_event_trigger),
            'privileges', (select count(*) from pg_init_privs where objoid >= 16384),
            'dependencies', (select count(*) from pg_shdepend where dbid = (select oid from pg_database where datname = current_database())))";
    let cluster = Cluster::builder().extension(false).start()?;
    let owner = cluster.connect("postgres", DATABASE).await?;
    owner.batch_execute("create role web login; create table people (id text)").await?;
    let before: Value = value(&owner, CATALOGUE).await?;
    for _ in 0..2 {
        owner.batch_execute("create extension tollgate").await?;
        common::prepare(&cluster, DATABASE)?;
        owner
            .batch_execute(
                "select tollgate.attach_users_table('people', 'id');
                 insert into people values ('ann')",
            )
            .await?;
        let token = issue(&owner, "ann", &["posts:read"]).await?;
        assert_eq!(code(&owner, &token.token).await?, "VALID");
        owner.batch_execute("drop extension tollgate").await?;
        let after: Value = value(&owner, CATALOGUE).await?;
        assert_eq!(after, before);
        // The application's table no longer has our triggers.
        owner.batch_execute("delete from people; truncate people").await?;
    }
    Ok(())
}

// ---- Publications and sequences

/// For a table without a key or a replica identity, UPDATE and DELETE fail as soon as it is published.
#[tokio::test]
async fn every_function_works_while_all_tables_are_published_and_what_it_writes_is_decoded() -> Result<()> {
    let cluster = common::start(Cluster::builder().setting("wal_level", "logical"))?;
    let owner = cluster.connect("postgres", DATABASE).await?;
    let keyless: Option<String> = value(
        &owner,
        "select string_agg(c.relname, ', ') from pg_class c
          where c.relnamespace = 'tollgate'::regnamespace and c.relkind in ('r', 'p') and c.relpersistence = 'p'
            and not (c.relreplident = 'f'
                     or c.relreplident = 'd' and exists (select from pg_index i where i.indrelid = c.oid and i.indisprimary)
                     or c.relreplident = 'i' and exists (select from pg_index i where i.indrelid = c.oid and i.indisreplident))",
    )
    .await?;
    assert_eq!(keyless, None, "tables without a key or a replica identity");
    owner
        .batch_execute(
            "create publication everything for all tables; create role shop; create role colleague",
        )
        .await?;
    owner.batch_execute("select pg_create_logical_replication_slot('capture', 'pgoutput')").await?;
    owner.batch_execute(calls::PREPARATION).await?;
    for (function, call) in calls::all(&owner).await? {
        let token = issue(&owner, "clerk", &["posts:read"]).await?;
        owner.batch_execute(&calls::filled(call, &token, "colleague")).await.context(function)?;
    }
    let token = issue(&owner, "ann", &[]).await?;
    let second = rotate(&owner, token.id, "0").await?;
    assert!(revoke(&owner, second.id).await?);
    owner
        .batch_execute(
            "select tollgate.grant_capability('shop', 'verifier'), tollgate.revoke_capability('shop', 'verifier');
             select tollgate.define_webhook('w', 'https://example.com/'), tollgate.define_scope('x:y', 'x')",
        )
        .await?;
    owner.batch_execute(QUEUE_ALL).await?;
    owner
        .batch_execute(
            "select tollgate.finish_webhook_delivery(c.id, c.lease, 200) from tollgate.claim_webhook_deliveries() c;
             select tollgate.drop_webhook('w'), tollgate.drop_scope('x:y'), tollgate.acquire_leadership('purge');
             select tollgate.report_daemon(gen_random_uuid(), 'h', 1, '1', now(), '[]'), tollgate.seal_audit_log()",
        )
        .await?;
    operator::flush_all(&owner).await?;

    let changes = owner
        .query(
            "select data from pg_logical_slot_get_binary_changes('capture', null, null,
                 'proto_version', '1', 'publication_names', 'everything')",
            &[],
        )
        .await?;
    // Messages of the protocol begin with their kind; a relation (R) has its oid, schema and name, a change of a row that oid.
    let mut names = BTreeMap::new();
    let mut decoded: BTreeMap<String, String> = BTreeMap::new();
    for row in &changes {
        let message: &[u8] = row.get(0);
        let (kind, relation) = (char::from(message[0]), message.get(1..5));
        if kind == 'R' {
            let mut texts = message[5..].split(|byte| *byte == 0).map(String::from_utf8_lossy);
            let name = format!("{}.{}", texts.next().context("a schema")?, texts.next().context("a name")?);
            names.insert(relation, name);
        } else if ['I', 'U', 'D'].contains(&kind) {
            let kinds = decoded.entry(names.get(&relation).context("a relation")?.clone()).or_default();
            if !kinds.contains(kind) {
                kinds.push(kind);
            }
        }
    }
    let ours: Vec<String> = value(
        &owner,
        "select array_agg(c.oid::regclass::text order by c.relname) from pg_class c
         where c.relnamespace = 'tollgate'::regnamespace and c.relkind = 'r' and c.relpersistence = 'p'",
    )
    .await?;
    let unwritten: Vec<&String> = ours.iter().filter(|table| !decoded.contains_key(*table)).collect();
    // Written at installation, hourly, for what is good once, or only where limits or quotas need them.
    let expected = [
        "audit_epochs",
        "carrying_secret",
        "quota_leases",
        "token_slots",
        "usage_hourly",
        "used_assertions",
        "used_urls",
    ];
    let expected = expected.map(|table| format!("tollgate.{table}"));
    assert_eq!(unwritten, expected.iter().collect::<Vec<_>>(), "{decoded:?}");
    assert_eq!(decoded["tollgate.api_tokens"], "IU");
    assert_eq!(decoded["tollgate.audit_log"], "I", "events are only ever added");
    Ok(())
}

/// As after a switch-over by logical replication, which does not replicate sequences.
#[tokio::test]
async fn a_sequence_that_is_behind_its_table_keeps_nothing_from_being_revoked() -> Result<()> {
    let cluster = common::start(Cluster::builder())?;
    let owner = cluster.connect("postgres", DATABASE).await?;
    let before = issue(&owner, "leaver", &[]).await?;
    let later = issue(&owner, "leaver", &[]).await?;
    for _ in 0..30 {
        issue(&owner, "ann", &[]).await?;
    }
    let behind = "select setval('tollgate.audit_log_id_seq', 1, false)";
    // A session that has used it since, and a new one.
    owner.batch_execute(behind).await?;
    assert!(revoke(&owner, before.id).await?);
    owner.batch_execute(behind).await?;
    let fresh = cluster.connect("postgres", DATABASE).await?;
    assert!(revoke(&fresh, later.id).await?);
    assert!(cluster.log().contains("behind its table"), "{}", cluster.log());

    // New sessions check whether it is behind, without a conflict between serializable transactions.
    let (one, other) =
        (cluster.connect("postgres", DATABASE).await?, cluster.connect("postgres", DATABASE).await?);
    for session in [&one, &other] {
        session
            .batch_execute(
                "begin isolation level serializable; insert into tollgate.audit_log (event) values ('test')",
            )
            .await?;
    }
    one.batch_execute("commit").await?;
    other.batch_execute("commit").await?;

    // A row that another session stores beyond the sequence cannot be foreseen: at most one attempt fails.
    owner
        .batch_execute(
            "insert into tollgate.audit_log (id, event) select s.last_value + g, 'test' from tollgate.audit_log_id_seq s, generate_series(1, 20) g",
        )
        .await?;
    for session in [&owner, &fresh] {
        let token = issue(session, "ann", &[]).await;
        assert!(token.is_ok() || issue(session, "ann", &[]).await.is_ok(), "{token:?}");
        let token = issue(session, "ann", &[]).await?;
        assert!(revoke(session, token.id).await?);
    }
    // Also in a savepoint, as an import has for each row.
    owner
        .batch_execute(
            "insert into tollgate.audit_log (id, event) select s.last_value + g, 'test' from tollgate.audit_log_id_seq s, generate_series(1, 5) g",
        )
        .await?;
    owner.batch_execute("begin; savepoint s").await?;
    if issue(&owner, "ann", &[]).await.is_err() {
        owner.batch_execute("rollback to s").await?;
    }
    issue(&owner, "ann", &[]).await?;
    owner.batch_execute("commit").await?;

    owner.batch_execute("select tollgate.define_webhook('w', 'https://example.com/')").await?;
    owner.batch_execute(QUEUE_ALL).await?;
    let waiting: i64 = value(&owner, "select pending from tollgate.webhooks").await?;
    owner.batch_execute("select setval('tollgate.webhook_queue_id_seq', 1, false)").await?;
    issue(&owner, "ann", &[]).await?;
    let queued: i64 = value(&owner, "select events from tollgate.queue_webhook_deliveries()").await?;
    assert_eq!(value::<i64>(&owner, "select pending from tollgate.webhooks").await?, waiting + queued);
    let failures: i64 =
        value(&owner, "select count(*) from tollgate.deployment_health() where severity = 'fail'").await?;
    assert_eq!(failures, 0);
    Ok(())
}

/// As in docs/operations.md.
#[tokio::test]
async fn a_database_moves_to_another_server_by_logical_replication() -> Result<()> {
    const LONG: std::time::Duration = std::time::Duration::from_secs(60);
    let logical = || Cluster::builder().own_identity().setting("wal_level", "logical");
    let old = common::start(logical())?;
    let new = logical().start()?;
    roles(&new)?;
    let owner = old.connect("postgres", DATABASE).await?;
    let target = new.connect("postgres", DATABASE).await?;
    old.execute(DATABASE, "create role shop login; select tollgate.grant_capability('shop', 'issuer')")?;
    new.execute(DATABASE, "select tollgate.grant_capability('shop', 'issuer')")?;
    let copied = issue(&owner, "ann", &["posts:read"]).await?;
    assert_eq!(code(&owner, &copied.token).await?, "VALID");
    operator::flush_all(&owner).await?;
    owner.batch_execute("select tollgate.define_webhook('crm', 'https://example.com/', '{token.*}')").await?;
    // A users table moves with the tokens.
    const PEOPLE: &str = "create table people (id text primary key, banned boolean not null default false);
         select tollgate.attach_users_table('people', 'id', false, active => 'not banned')";
    for database in [&owner, &target] {
        database.batch_execute(PEOPLE).await?;
    }
    owner.batch_execute("insert into people values ('eve'), ('fay')").await?;
    let (eves, fays) = (issue(&owner, "eve", &[]).await?, issue(&owner, "fay", &[]).await?);
    issue(&owner, "bob", &[]).await?;
    owner.batch_execute(QUEUE_ALL).await?;

    owner.batch_execute("create publication everything for all tables").await?;
    let subscribe = format!(
        "create subscription from_old connection 'host={} port={} user=postgres dbname={DATABASE}' publication everything",
        old.socket_dir().display(),
        old.port()
    );
    target.batch_execute(&subscribe).await?;
    let unready = "select count(*) from pg_subscription_rel where srsubstate <> 'r'";
    eventually_async(LONG, "the first copy", async || value::<i64>(&target, unready).await.unwrap() == 0)
        .await;
    // Changes that are streamed from now on.
    let streamed = issue(&owner, "ann", &["posts:*"]).await?;
    let child = derive(&owner, &streamed, &["posts:read"]).await?;
    let revoked = issue(&owner, "bob", &[]).await?;
    assert!(revoke(&owner, revoked.id).await?);
    let rotated = issue(&owner, "cid", &[]).await?;
    let successor = rotate(&owner, rotated.id, "0").await?;
    owner
        .batch_execute(
            "select tollgate.define_scope('late:scope', 'streamed');
             select tollgate.finish_webhook_delivery(c.id, c.lease, 503, 'busy') from tollgate.claim_webhook_deliveries(2) c",
        )
        .await?;
    owner
        .batch_execute(
            "delete from people where id = 'eve'; insert into people values ('guy', true);
             update people set banned = true where id = 'fay'",
        )
        .await?;
    for token in [&copied, &streamed] {
        assert_eq!(code(&owner, &token.token).await?, "VALID");
    }
    operator::flush_all(&owner).await?;

    let sent = "select count(*) from pg_replication_slots where confirmed_flush_lsn >= $1::text::pg_lsn";
    let written: String = value(&owner, "select pg_current_wal_lsn()::text").await?;
    eventually_async(LONG, "all to be received", async || {
        owner.query_one(sent, &[&written]).await.unwrap().get::<_, i64>(0) == 1
    })
    .await;
    target.batch_execute("drop subscription from_old").await?;
    let tables = "select jsonb_build_object(
        'tokens', (select jsonb_agg(to_jsonb(t) order by t.id) from tollgate.api_tokens t),
        'usage', (select jsonb_agg(to_jsonb(u) order by u.token_id) from tollgate.token_usage u),
        'hours', (select jsonb_agg(to_jsonb(h) order by h.token_id, h.hour) from tollgate.usage_hourly h),
        'scopes', (select jsonb_agg(to_jsonb(s) order by s.name) from tollgate.scopes s),
        'webhooks', (select jsonb_agg(to_jsonb(w) order by w.name) from tollgate.webhooks w),
        'queue', (select jsonb_agg(to_jsonb(q) order by q.id) from tollgate.webhook_queue q),
        'events', (select jsonb_agg(to_jsonb(a) - '{id,xid,epoch}'::text[] order by a.at) from tollgate.audit_log a
                    where event not like 'capability.%'))";
    let (was, is): (Value, Value) = (value(&owner, tables).await?, value(&target, tables).await?);
    for part in was.as_object().context("an object")?.keys() {
        assert_eq!(is[part], was[part], "{part}");
        // The only hour is in the usage table.
        let empty = is[part].as_array().is_none_or(Vec::is_empty);
        assert_eq!(empty, part == "hours", "{part}");
    }

    // The new one works, and continues.
    let shop = new.connect("shop", DATABASE).await?;
    for (token, expected) in [
        (&copied, "VALID"),
        (&streamed, "VALID"),
        (&child, "VALID"),
        (&revoked, "REVOKED"),
        (&rotated, "EXPIRED"),
        (&successor, "VALID"),
        (&eves, "REVOKED"),
        (&fays, "DISABLED"),
    ] {
        assert_eq!(code(&shop, &token.token).await?, expected);
    }
    let waiting: i64 = value(&target, "select pending from tollgate.webhooks").await?;
    target.batch_execute(QUEUE_ALL).await?;
    assert!(revoke(&shop, streamed.id).await?);
    assert_eq!(code(&shop, &child.token).await?, "REVOKED");
    let issued = issue(&shop, "dan", &["late:scope"]).await?;
    assert_eq!(code(&shop, &issued.token).await?, "VALID");
    target.batch_execute(QUEUE_ALL).await?;
    let queued = value::<i64>(&target, "select pending from tollgate.webhooks").await? - waiting;
    assert_eq!(queued, 3, "a token, its child, and a new one");
    target.batch_execute("select tollgate.seal_audit_log()").await?;
    assert!(value::<bool>(&target, "select whole from tollgate.verify_audit_log()").await?);
    let failures: Option<String> = value(
        &target,
        "select string_agg(detail, '; ') from tollgate.deployment_health() where severity = 'fail'",
    )
    .await?;
    assert_eq!(failures, None);

    // Tokens that are issued here for users who are kept there.
    const STAFF: &str = "create table staff (id text primary key, banned boolean not null default false)";
    owner.batch_execute(STAFF).await?;
    owner
        .batch_execute(
            "insert into staff values ('hal', true), ('ida', false), ('joe', false), ('kim', false);
             create publication only_staff for table staff",
        )
        .await?;
    target.batch_execute(STAFF).await?;
    target
        .batch_execute("select tollgate.attach_users_table('staff', 'id', false, active => 'not banned')")
        .await?;
    let mut staff = Vec::new();
    for name in ["hal", "ida", "joe", "kim"] {
        staff.push(issue(&target, name, &[]).await?);
    }
    let turn_into = async |expected: &str| {
        eventually_async(LONG, expected, async || {
            let mut codes = Vec::new();
            for token in &staff {
                codes.push(code(&target, &token.token).await.unwrap());
            }
            codes.join(" ") == expected
        })
        .await;
    };
    let subscribe = subscribe.replace("from_old", "staff_of_old").replace("everything", "only_staff");
    target.batch_execute(&subscribe).await?;
    turn_into("DISABLED VALID VALID VALID").await;
    owner
        .batch_execute(
            "delete from staff where id = 'ida'; update staff set banned = true where id = 'joe';
             update staff set banned = false where id = 'hal'",
        )
        .await?;
    turn_into("VALID REVOKED DISABLED VALID").await;
    owner.batch_execute("truncate staff").await?;
    turn_into("REVOKED REVOKED REVOKED REVOKED").await;
    assert!(
        value::<bool>(
            &target,
            "select not exists (select from tollgate.deployment_health('0') where aspect = 'users tables' and severity <> 'ok')"
        )
        .await?
    );
    target.batch_execute("drop subscription staff_of_old").await?;
    Ok(())
}
