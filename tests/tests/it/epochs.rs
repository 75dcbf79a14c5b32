//! Readers of the audit log keep their place when the database moves to another cluster, and when a standby takes over,
//! even one that lost the last events they received.

use std::io::Write as _;
use std::process::Stdio;
use std::sync::Arc;

use crate::common::{self, refused, value};
use crate::operator::{self, Batch, Cursor, OPERATOR, position, read, read_all, reads};
use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use tollgate_tests::{Cluster, DATABASE, eventually_async};

const LONG: std::time::Duration = std::time::Duration::from_secs(60);

/// Logs an event by a single insertion.
async fn log(client: &Client, name: &str) -> Result<()> {
    client.execute("select tollgate.define_scope($1, 'of the tests')", &[&name]).await?;
    Ok(())
}

async fn log_many(client: &Client, name: &str, count: usize) -> Result<Vec<String>> {
    let names: Vec<String> = (0..count).map(|n| format!("{name}:{n}")).collect();
    for name in &names {
        log(client, name).await?;
    }
    Ok(names)
}

fn names(events: &[Value]) -> Vec<&str> {
    events.iter().filter_map(|event| event["detail"]["scope"].as_str()).collect()
}

fn ids(events: &[Value]) -> Vec<i64> {
    events.iter().filter_map(|event| event["id"].as_i64()).collect()
}

/// The names of the events since a cursor, which advances.
async fn news(client: &Client, cursor: &mut Cursor) -> Result<Vec<String>> {
    let events = read_all(client, cursor, 1000).await?;
    Ok(names(&events).into_iter().map(str::to_owned).collect())
}

/// The same for a stored subscription.
async fn delivered(client: &Client, name: &str) -> Result<Vec<String>> {
    let events = operator::deliver(client, name, 1000, "commit").await?;
    Ok(names(&events).into_iter().map(str::to_owned).collect())
}

/// A page of a stored subscription, which does not advance.
async fn page(owner: &Client, name: &str) -> Result<Batch> {
    let place = format!("select place::text from tollgate.subscriptions where name = '{name}'");
    read(owner, &Cursor(value(owner, &place).await?), 1000).await
}

async fn next_xid(client: &Client) -> Result<i64> {
    value(client, "select pg_snapshot_xmax(pg_current_snapshot())::text::bigint").await
}

async fn epoch(client: &Client) -> Result<i32> {
    value(client, "select max(epoch) from tollgate.audit_log").await
}

/// A cluster with an identity of its own, and the roles of the tests.
fn cluster(extension: bool) -> Result<Arc<Cluster>> {
    let cluster = Cluster::builder().own_identity().extension(extension).start()?;
    cluster.execute(DATABASE, "create role web login; create role tollgated login")?;
    if extension {
        common::prepare(&cluster, DATABASE)?;
        operator::grant(&cluster, DATABASE)?;
    }
    Ok(Arc::new(cluster))
}

fn copy(from: (&Cluster, &str), to: (&Cluster, &str)) -> Result<()> {
    let dump = from.0.program("pg_dump").arg(from.1).output()?;
    ensure!(dump.status.success(), "{}", String::from_utf8_lossy(&dump.stderr));
    let mut psql =
        to.0.program("psql")
            .args(["--no-psqlrc", "--quiet", "--set=ON_ERROR_STOP=1", "--output=/dev/null", to.1])
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
    psql.stdin.take().context("it was piped")?.write_all(&dump.stdout)?;
    let restored = psql.wait_with_output()?;
    ensure!(restored.status.success(), "{}", String::from_utf8_lossy(&restored.stderr));
    Ok(())
}

// ---- Another cluster

#[tokio::test]
async fn a_reader_continues_in_a_restored_database_and_in_one_that_came_back() -> Result<()> {
    let old = cluster(true)?;
    let owner = old.connect("postgres", DATABASE).await?;
    let operator = old.connect(OPERATOR, DATABASE).await?;
    delivered(&operator, "log").await?;
    let mut slow_reader = position(&operator, None).await?;
    // Makes transaction ids of the old cluster much higher than those of a new one.
    for _ in 0..500 {
        owner.batch_execute("select pg_current_xact_id()").await?;
    }
    let open = old.connect("postgres", DATABASE).await?;
    open.batch_execute("begin").await?;
    log(&open, "old:never").await?;
    log(&owner, "old:1").await?;
    let mut reader = slow_reader.clone();
    assert_eq!(news(&operator, &mut reader).await?, ["old:1"]);
    assert_eq!(delivered(&operator, "log").await?, ["old:1"]);
    assert!(!reader.is_at_rest(), "an older transaction is open");
    log(&owner, "old:2").await?;
    let unacknowledged = page(&owner, "log").await?;
    let new = cluster(false)?;
    copy((&old, DATABASE), (&new, DATABASE))?;
    // Delivered by the old one after the dump, and so lost.
    log_many(&owner, "lost", 20).await?;
    let mut deep_reader = reader.clone();
    assert_eq!(news(&operator, &mut deep_reader).await?.len(), 21);

    let new_owner = new.connect("postgres", DATABASE).await?;
    let new_operator = new.connect(OPERATOR, DATABASE).await?;
    assert!(next_xid(&new_owner).await? < next_xid(&owner).await?, "the new cluster is younger");
    assert_eq!(news(&new_operator, &mut slow_reader).await?, ["old:1", "old:2"]);
    assert_eq!(news(&new_operator, &mut reader).await?, ["old:2"]);
    assert_eq!(news(&new_operator, &mut reader).await?, [""; 0]);
    // It is read again: the new database has another secret.
    assert_eq!(names(&unacknowledged.events), ["old:2"]);
    refused(
        operator::advance(&new_operator, "log", &unacknowledged).await,
        &SqlState::INVALID_PARAMETER_VALUE,
    );
    assert_eq!(delivered(&new_operator, "log").await?, ["old:2"]);
    let mut newcomer = position(&new_operator, None).await?;
    let mut from_start = position(&new_operator, Some(0)).await?;
    assert!(newcomer.is_at_rest());

    let late = new.connect("postgres", DATABASE).await?;
    late.batch_execute("begin").await?;
    log(&late, "new:late").await?;
    let written = log_many(&new_owner, "new", 30).await?;
    for cursor in [&mut slow_reader, &mut reader, &mut deep_reader, &mut newcomer] {
        assert_eq!(news(&new_operator, cursor).await?, written);
        assert!(cursor.0.len() < 200, "{cursor:?}");
    }
    assert_eq!(delivered(&new_operator, "log").await?, written);
    late.batch_execute("commit").await?;
    for cursor in [&mut slow_reader, &mut reader, &mut deep_reader, &mut newcomer] {
        assert_eq!(news(&new_operator, cursor).await?, ["new:late"]);
    }
    assert_eq!(delivered(&new_operator, "log").await?, ["new:late"]);
    let everything = news(&new_operator, &mut from_start).await?;
    assert!(everything.ends_with(&written) && everything.contains(&"new:late".to_owned()), "{everything:?}");
    assert_eq!(everything.iter().filter(|name| name.starts_with("lost")).count(), 0);

    // Back in the older cluster, whose transaction ids differ again.
    old.execute(DATABASE, "create database back")?;
    copy((&new, DATABASE), (&old, "back"))?;
    let back_owner = old.connect("postgres", "back").await?;
    let back_operator = old.connect(OPERATOR, "back").await?;
    log(&back_owner, "back:1").await?;
    for cursor in [&mut slow_reader, &mut reader, &mut deep_reader, &mut newcomer, &mut from_start] {
        assert_eq!(news(&back_operator, cursor).await?, ["back:1"]);
        assert_eq!(news(&back_operator, cursor).await?, [""; 0]);
    }
    assert_eq!(delivered(&back_operator, "log").await?, ["back:1"]);
    assert_eq!(epoch(&back_owner).await?, 3, "an epoch is never returned to");
    Ok(())
}

/// With any batch size, and wherever in the log the batches end.
#[tokio::test]
async fn batches_go_across_epochs_without_a_gap() -> Result<()> {
    let old = cluster(true)?;
    let owner = old.connect("postgres", DATABASE).await?;
    log_many(&owner, "old", 9).await?;
    let new = cluster(false)?;
    copy((&old, DATABASE), (&new, DATABASE))?;
    let (owner, operator) =
        (new.connect("postgres", DATABASE).await?, new.connect(OPERATOR, DATABASE).await?);
    let open = new.connect("postgres", DATABASE).await?;
    open.batch_execute("begin").await?;
    log(&open, "new:open").await?;
    log_many(&owner, "new", 9).await?;
    let mut start = position(&operator, Some(0)).await?;
    let all = ids(&read_all(&operator, &mut start.clone(), 1000).await?);
    for size in 1..=20 {
        let mut cursor = start.clone();
        assert_eq!(ids(&read_all(&operator, &mut cursor, size).await?), all, "in batches of {size}");
        // From every place in between, as `tail --since` starts.
        let since = all[usize::try_from(size)? % all.len()];
        let mut cursor = position(&operator, Some(since)).await?;
        let rest: Vec<i64> = all.iter().copied().filter(|&id| id > since).collect();
        assert_eq!(ids(&read_all(&operator, &mut cursor, size).await?), rest, "after {since}");
    }
    open.batch_execute("commit").await?;
    assert_eq!(read_all(&operator, &mut start, 3).await?.len(), all.len() + 1);
    Ok(())
}

// ---- A standby that takes over

#[tokio::test]
async fn a_reader_continues_after_a_promotion_also_with_transactions_prepared_before_it() -> Result<()> {
    let mut primary = Arc::into_inner(cluster(true)?).context("not shared")?;
    let standby = primary.standby()?;
    let owner = primary.connect("postgres", DATABASE).await?;
    let operator = primary.connect(OPERATOR, DATABASE).await?;
    delivered(&operator, "log").await?;
    let mut reader = position(&operator, None).await?;
    owner.batch_execute("begin").await?;
    log(&owner, "p:prepared").await?;
    owner.batch_execute("prepare transaction 'p'").await?;
    log(&owner, "p:1").await?;
    standby.catch_up_with(&primary)?;
    let replica = standby.connect(OPERATOR, DATABASE).await?;
    assert_eq!(
        news(&replica, &mut reader).await?,
        [""; 0],
        "a standby does not know what runs on the primary"
    );
    assert_eq!(delivered(&operator, "log").await?, ["p:1"]);
    log(&owner, "p:2").await?;
    let unacknowledged = page(&owner, "log").await?;
    assert_eq!(names(&unacknowledged.events), ["p:2"]);
    standby.catch_up_with(&primary)?;
    drop((owner, operator));
    primary.stop()?;

    standby.promote()?;
    let owner = standby.connect("postgres", DATABASE).await?;
    // The session survived the promotion.
    assert_eq!(news(&replica, &mut reader).await?, ["p:1", "p:2"]);
    let written = log_many(&owner, "s", 3).await?;
    assert_eq!(epoch(&owner).await?, 2);
    assert_eq!(news(&replica, &mut reader).await?, written);
    // What was read of the primary can be acknowledged here.
    replica.batch_execute("begin").await?;
    operator::advance(&replica, "log", &unacknowledged).await?;
    replica.batch_execute("rollback").await?;
    let sealed: i64 = value(&owner, "select events from tollgate.seal_audit_log()").await?;
    let unsealed: Vec<String> = owner
        .query(
            "select a.detail ->> 'scope' from tollgate.audit_log a, tollgate.audit_seals s
             where (a.epoch, a.xid) >= (s.epoch, s.xid) order by a.epoch, a.xid, a.id",
            &[],
        )
        .await?
        .iter()
        .map(|row| row.get(0))
        .collect();
    assert!(sealed > 0 && unsealed.starts_with(&["p:1".into(), "p:2".into()]), "{unsealed:?}");
    let mut since = position(&replica, Some(reader_last(&owner).await?)).await?;

    owner.batch_execute("commit prepared 'p'").await?;
    assert_eq!(news(&replica, &mut reader).await?, ["p:prepared"]);
    assert_eq!(news(&replica, &mut since).await?, ["p:prepared"]);
    assert_eq!(news(&replica, &mut reader).await?, [""; 0]);
    assert!(reader.is_at_rest(), "{reader:?}");
    assert_eq!(
        delivered(&replica, "log").await?,
        ["p:prepared", "p:2", "s:0", "s:1", "s:2"].map(str::to_owned)
    );
    value::<i64>(&owner, "select events from tollgate.seal_audit_log()").await?;
    let whole: bool = value(&owner, "select whole from tollgate.verify_audit_log()").await?;
    assert!(whole);

    // At the end of a long log of two epochs, none of it is read again.
    owner
        .batch_execute(
            "insert into tollgate.audit_log (event) select 'test' from generate_series(1, 20000);
             analyze tollgate.audit_log",
        )
        .await?;
    read_all(&replica, &mut reader, 100_000).await?;
    log(&owner, "s:end").await?;
    let call = format!("select * from tollgate.read_events('{}')", reader.0);
    let reads = reads(&replica, "audit_log", "audit_log_position", &call).await?;
    assert!(reads.scanned == 0 && reads.scans_of_index > 0 && reads.fetched < 20, "{reads:?}");
    assert_eq!(news(&replica, &mut reader).await?, ["s:end"]);
    Ok(())
}

async fn reader_last(owner: &Client) -> Result<i64> {
    value(owner, "select max(id) from tollgate.audit_log").await
}

#[tokio::test]
async fn a_reader_that_is_ahead_of_the_promoted_standby_misses_nothing() -> Result<()> {
    let mut primary = Arc::into_inner(cluster(true)?).context("not shared")?;
    let mut standby = primary.standby()?;
    let owner = primary.connect("postgres", DATABASE).await?;
    let operator = primary.connect(OPERATOR, DATABASE).await?;
    log_many(&owner, "p", 3).await?;
    let behind = position(&operator, Some(0)).await?;
    standby.catch_up_with(&primary)?;
    standby.stop()?;

    // The standby never receives these; three readers do, one of them while an older transaction was open.
    let mut readers = vec![behind.clone(), behind.clone()];
    let open = primary.connect("postgres", DATABASE).await?;
    open.batch_execute("begin").await?;
    log(&open, "lost:open").await?;
    let lost = log_many(&owner, "lost", 100).await?;
    let mut remembering = behind.clone();
    let received = read_all(&operator, &mut remembering, 1000).await?;
    let lost_ids = ids(&received);
    assert!(names(&received).ends_with(&lost.iter().map(String::as_str).collect::<Vec<_>>()));
    open.batch_execute("rollback").await?;
    read_all(&operator, &mut readers[1], 1000).await?;
    let horizon = next_xid(&owner).await?;
    drop((owner, operator, open));
    primary.stop_immediately()?;

    standby.restart()?;
    standby.promote()?;
    let owner = standby.connect("postgres", DATABASE).await?;
    let operator = standby.connect(OPERATOR, DATABASE).await?;
    assert!(next_xid(&owner).await? < horizon, "transaction ids are used a second time");
    readers.push(remembering);
    for reader in &mut readers[1..] {
        assert_eq!(news(&operator, reader).await?, [""; 0], "nothing is new yet");
    }
    let late = standby.connect("postgres", DATABASE).await?;
    late.batch_execute("begin").await?;
    log(&late, "s:late").await?;
    let written = log_many(&owner, "s", 80).await?;
    let again: i64 = owner
        .query_one("select count(*) from tollgate.audit_log where epoch = 2 and id = any ($1)", &[&lost_ids])
        .await?
        .get(0);
    assert!(again > 10, "ids are used a second time");
    for size in [1, 7, 79, 80, 81, 1000] {
        for reader in &readers[1..] {
            let mut cursor = reader.clone();
            let events = read_all(&operator, &mut cursor, size).await?;
            assert_eq!(names(&events), written, "in batches of {size}");
        }
        let mut cursor = readers[0].clone();
        assert!(
            names(&read_all(&operator, &mut cursor, size).await?)
                .ends_with(&written.iter().map(String::as_str).collect::<Vec<_>>())
        );
    }
    for reader in &mut readers {
        read_all(&operator, reader, 1000).await?;
    }
    late.batch_execute("commit").await?;
    for reader in &mut readers {
        assert_eq!(news(&operator, reader).await?, ["s:late"]);
        assert_eq!(news(&operator, reader).await?, [""; 0]);
        assert!(reader.is_at_rest(), "{reader:?}");
    }
    Ok(())
}

/// The standby's horizon is below that of the reader, which received everything in between.
#[tokio::test]
async fn a_promotion_that_undoes_the_end_of_a_prepared_transaction_delivers_nothing_else_twice() -> Result<()>
{
    let mut primary = Arc::into_inner(cluster(true)?).context("not shared")?;
    let mut standby = primary.standby()?;
    let owner = primary.connect("postgres", DATABASE).await?;
    let operator = primary.connect(OPERATOR, DATABASE).await?;
    let mut reader = position(&operator, None).await?;
    owner.batch_execute("begin").await?;
    log(&owner, "p:prepared").await?;
    owner.batch_execute("prepare transaction 'p'").await?;
    log_many(&owner, "p", 5).await?;
    standby.catch_up_with(&primary)?;
    standby.stop()?;
    owner.batch_execute("commit prepared 'p'").await?;
    assert_eq!(news(&operator, &mut reader).await?.len(), 6);
    assert!(reader.is_at_rest(), "{reader:?}");
    drop((owner, operator));
    primary.stop_immediately()?;

    standby.restart()?;
    standby.promote()?;
    let owner = standby.connect("postgres", DATABASE).await?;
    let operator = standby.connect(OPERATOR, DATABASE).await?;
    let written = log_many(&owner, "s", 5).await?;
    for size in [1, 4, 5, 1000] {
        let mut cursor = reader.clone();
        assert_eq!(names(&read_all(&operator, &mut cursor, size).await?), written, "in batches of {size}");
    }
    assert_eq!(news(&operator, &mut reader).await?, written);
    owner.batch_execute("commit prepared 'p'").await?;
    assert_eq!(news(&operator, &mut reader).await?, ["p:prepared"], "committed again");
    assert_eq!(news(&operator, &mut reader).await?, [""; 0]);
    assert!(reader.is_at_rest(), "{reader:?}");
    Ok(())
}

#[tokio::test]
async fn a_cursor_of_a_diverged_copy_is_refused() -> Result<()> {
    let mut primary = Arc::into_inner(cluster(true)?).context("not shared")?;
    let (one, other) = (primary.standby()?, primary.standby()?);
    let owner = primary.connect("postgres", DATABASE).await?;
    log(&owner, "p:1").await?;
    let operator = primary.connect(OPERATOR, DATABASE).await?;
    let start = position(&operator, None).await?;
    one.catch_up_with(&primary)?;
    other.catch_up_with(&primary)?;
    drop((owner, operator));
    primary.stop()?;
    let mut cursors = Vec::new();
    for copy in [&one, &other] {
        copy.promote()?;
        log(&copy.connect("postgres", DATABASE).await?, "copy:1").await?;
        let mut cursor = start.clone();
        assert_eq!(news(&copy.connect(OPERATOR, DATABASE).await?, &mut cursor).await?, ["copy:1"]);
        cursors.push(cursor);
    }
    for (copy, foreign) in [(&one, &cursors[1]), (&other, &cursors[0])] {
        let client = copy.connect(OPERATOR, DATABASE).await?;
        let read = client
            .query_one("select tollgate.read_events($1::text::tollgate.event_cursor)", &[&foreign.0])
            .await;
        let error = refused(read, &SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE);
        assert!(error.hint().is_some_and(|hint| hint.contains("event_position")), "{error:?}");
    }
    Ok(())
}

// ---- Another database that subscribes to the log

/// With `wal_level = logical`.
fn publisher(extension: bool) -> Result<Arc<Cluster>> {
    let cluster =
        Cluster::builder().own_identity().extension(false).setting("wal_level", "logical").start()?;
    cluster
        .execute(DATABASE, "create role web login; create role tollgated login; create extension tollgate")?;
    if extension {
        common::prepare(&cluster, DATABASE)?;
    }
    operator::grant(&cluster, DATABASE)?;
    Ok(Arc::new(cluster))
}

#[tokio::test]
async fn a_subscriber_reads_each_event_once_as_it_arrives() -> Result<()> {
    let (old, new) = (publisher(true)?, publisher(false)?);
    let owner = old.connect("postgres", DATABASE).await?;
    let new_owner = new.connect("postgres", DATABASE).await?;
    let new_operator = new.connect(OPERATOR, DATABASE).await?;
    owner
        .batch_execute(
            "alter database postgres set tollgate.min_audit_retention = 0; select pg_current_xact_id()",
        )
        .await?;
    let owner = {
        drop(owner);
        old.connect("postgres", DATABASE).await?
    };
    log_many(&owner, "early", 5).await?;
    value::<i64>(&owner, "select events from tollgate.seal_audit_log()").await?;
    // An event of its own, and a reader that has its id.
    new_owner.batch_execute("select tollgate.open_subscription('own'); create role other; select tollgate.grant_capability('other', 'issuer')").await?;
    let mut reader = position(&new_operator, None).await?;
    let mut from_start = position(&new_operator, Some(0)).await?;
    let own = read_all(&new_operator, &mut from_start, 10).await?.len();

    owner.batch_execute("create publication everything for all tables").await?;
    let subscribe = format!(
        "create subscription from_old connection 'host={} port={} user=postgres dbname={DATABASE}' publication everything",
        old.socket_dir().display(),
        old.port()
    );
    new_owner.batch_execute(&subscribe).await?;
    let unready = "select count(*) from pg_subscription_rel where srsubstate <> 'r'";
    eventually_async(LONG, "the first copy", async || value::<i64>(&new_owner, unready).await.unwrap() == 0)
        .await;
    let copied: Vec<String> = news(&new_operator, &mut reader).await?;
    assert!(
        copied.ends_with(&["early:0", "early:1", "early:2", "early:3", "early:4"].map(str::to_owned)),
        "{copied:?}"
    );
    let all: i64 = value(&owner, "select count(*) from tollgate.audit_log").await?;
    let here: i64 = value(&new_owner, "select count(*) from tollgate.audit_log").await?;
    assert_eq!(here, all + i64::try_from(own)?);

    // Four sessions write at once, one commits last what it wrote first, and one rolls back.
    let late = old.connect("postgres", DATABASE).await?;
    late.batch_execute("begin").await?;
    log(&late, "late:0").await?;
    let gone = old.connect("postgres", DATABASE).await?;
    gone.batch_execute("begin").await?;
    log(&gone, "gone:0").await?;
    gone.batch_execute("rollback").await?;
    let mut writers = tokio::task::JoinSet::new();
    for n in 0..4 {
        let writer = old.connect("postgres", DATABASE).await?;
        writers.spawn(async move { log_many(&writer, &format!("w{n}"), 25).await });
    }
    let mut received = Vec::new();
    eventually_async(LONG, "a hundred events", async || {
        received.extend(news(&new_operator, &mut reader).await.unwrap());
        received.len() >= 100
    })
    .await;
    let mut written = Vec::new();
    while let Some(names) = writers.join_next().await {
        written.push(names??);
    }
    for names in &written {
        let in_order: Vec<&String> = received.iter().filter(|name| names.contains(name)).collect();
        assert_eq!(in_order, names.iter().collect::<Vec<_>>());
    }
    assert_eq!(received.len(), 100);
    late.batch_execute("commit").await?;
    let mut rest = Vec::new();
    eventually_async(LONG, "the late one", async || {
        rest.extend(news(&new_operator, &mut reader).await.unwrap());
        !rest.is_empty()
    })
    .await;
    assert_eq!(rest, ["late:0"]);
    for size in [1, 7, 1000] {
        let mut cursor = position(&new_operator, Some(0)).await?;
        let everything = read_all(&new_operator, &mut cursor, size).await?;
        assert_eq!(
            everything.len(),
            copied.len() + 101 + own + no_scopes(&new_owner).await?,
            "in batches of {size}"
        );
    }

    // The subscriber seals its own log; a purge of the old log does not purge the new one.
    let sealed: i64 = value(&new_owner, "select events from tollgate.seal_audit_log()").await?;
    let here: i64 = value(&new_owner, "select count(*) from tollgate.audit_log").await?;
    assert_eq!(sealed, here);
    value::<i64>(&owner, "select events from tollgate.seal_audit_log()").await?;
    let purged: i64 = value(&owner, "select tollgate.purge_audit_log(now())").await?;
    assert!(purged > 100, "{purged}");
    log(&owner, "after:purge").await?;
    eventually_async(LONG, "what follows the purge", async || {
        news(&new_operator, &mut reader).await.unwrap().contains(&"after:purge".to_owned())
    })
    .await;
    let still: i64 = value(&new_owner, "select count(*) from tollgate.audit_log").await?;
    assert_eq!(still, here + 2, "with the event of the purge");
    assert!(value::<bool>(&new_owner, "select whole from tollgate.verify_audit_log()").await?);
    let local: bool = value(
        &new_owner,
        "select (select count(distinct system_identifier) from tollgate.audit_epochs) = 1
            and (select count(*) from tollgate.audit_seals) = 1
            and (select count(*) from tollgate.subscriptions) = 1
            and (select bool_and(role in ('other')) from tollgate.capabilities)",
    )
    .await?;
    assert!(local, "data of one cluster was replicated");

    // A dump may be restored by a session in an apply worker's role: events keep their places.
    new_owner
        .batch_execute(
            "set session_replication_role = replica;
             insert into tollgate.audit_log (id, epoch, xid, event) values (1000000, 1, '3', 'test');
             insert into tollgate.audit_seals select 100, epoch, xid, events, first_at, last_at, sealed_at, in_order, any_order, hash
                 from tollgate.audit_seals;
             reset session_replication_role",
        )
        .await?;
    let kept: bool = value(
        &new_owner,
        "select exists (select from tollgate.audit_log where id = 1000000 and epoch = 1 and xid = '3')
            and exists (select from tollgate.audit_seals where seal = 100)",
    )
    .await?;
    assert!(kept);
    new_owner.batch_execute("drop subscription from_old").await?;
    Ok(())
}

/// Events that [`news`] leaves out: those of the old database that are not about a scope.
async fn no_scopes(new_owner: &Client) -> Result<usize> {
    let count: i64 = value(
        new_owner,
        "select count(*) from tollgate.audit_log where detail ->> 'scope' is null and detail ->> 'role' <> 'other'",
    )
    .await?;
    Ok(usize::try_from(count)?)
}

// ---- The register

#[tokio::test]
async fn no_session_waits_for_another_to_register_an_epoch_and_all_register_the_same() -> Result<()> {
    let cluster = cluster(false)?;
    cluster.execute(DATABASE, "create extension tollgate")?;
    let clients = [
        cluster.connect("postgres", DATABASE).await?,
        cluster.connect("postgres", DATABASE).await?,
        cluster.connect("postgres", DATABASE).await?,
    ];
    let operator = &clients[2];
    let mut reader = position(operator, None).await?;
    assert_eq!(read(operator, &reader, 10).await?.events, [Value::Null; 0]);
    for (n, client) in clients.iter().enumerate() {
        client.batch_execute("set statement_timeout = '20s'; begin").await?;
        log(client, &format!("first:{n}")).await?;
    }
    for (client, end) in clients.iter().zip(["rollback", "commit", "rollback"]) {
        client.batch_execute(end).await?;
    }
    log(operator, "second").await?;
    assert_eq!(news(operator, &mut reader).await?.len(), 2);
    let registered: i64 = value(operator, "select count(*) from tollgate.audit_epochs").await?;
    let epochs: i64 = value(
        operator,
        "select count(distinct (epoch, identity, system_identifier, timeline)) from tollgate.audit_epochs",
    )
    .await?;
    assert_eq!((registered, epochs), (1, 1));
    Ok(())
}
