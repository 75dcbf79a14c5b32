//! A server with tokens in it, set up as one in production would be, and what the daemon does to it.

use std::fs::{self, File};
use std::io::{BufWriter, Write as _};
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use anyhow::{Result, ensure};
use tollgate_tests::{Builder, Cluster, DATABASE, Install};

use crate::clients::{ADDRESS, REQUIRED, Statement, Takes, socket};
use crate::tokens::{Tokens, hash, id};
use crate::wire::Connection;

/// An ordinary role: a superuser would be spared the checks of privileges.
pub(crate) const WEB: &str = "web";
/// The daemon's.
pub(crate) const OPERATOR: &str = "tollgated";

/// All that a verification can check: revoked, disabled, expired, networks, scopes; and the limit and the metering.
pub(crate) const VERIFY: Statement = Statement {
    sql: "select * from tollgate.verify_api_token($1, $2, $3)",
    takes: Takes::TokenAndChecks,
    expected: b"t",
};

/// Tokens that are copied in one go.
const CHUNK: u32 = 250_000;

/// Good for a long time, and under a limit that is never reached: a billion at once.
const COLUMNS: &str =
    "id, token_hash, user_id, name, scopes, metadata, hint, created_by, expires_at, rate_limit, rate_window";

/// As in production: durable, vacuumed, and with memory that holds table and indexes. `tokens` are all that will be in use.
pub(crate) fn builder(install: &Install, tokens: u32) -> Builder {
    let megabytes = (u64::from(tokens) * 600 / 1_000_000).max(256);
    Cluster::builder()
        .install(install.clone())
        .setting("fsync", "on")
        .setting("full_page_writes", "on")
        .setting("shared_buffers", &format!("{megabytes}MB"))
        .setting("maintenance_work_mem", "512MB")
        .setting("checkpoint_timeout", "30min")
        .setting("max_wal_size", "16GB")
        .setting("tollgate.max_tracked_keys", &tracked_keys(tokens).to_string())
}

/// Room for each token, as a service would have whose tokens are all in use, and then some: partitions fill unevenly, and a
/// token under a limit is refused where there is no room for it.
fn tracked_keys(tokens: u32) -> u64 {
    u64::from(tokens) * 5 / 4 + 131_072
}

/// What every part says of its server.
pub(crate) fn conditions(cluster: &Cluster) -> Result<String> {
    let settings =
        ["shared_buffers", "tollgate.max_tracked_keys", "fsync", "synchronous_commit", "autovacuum"]
            .iter()
            .map(|name| {
                let value = cluster.value(DATABASE, &format!("show {name}"))?;
                Ok(format!("{name} {}", value.unwrap_or_default()))
            })
            .collect::<Result<Vec<_>>>()?;
    Ok(settings.join(", "))
}

/// Roles, and the schema for what the benchmark adds.
pub(crate) fn prepare(cluster: &Cluster, database: &str) -> Result<()> {
    cluster.execute(
        database,
        &format!(
            "do $$ begin
                 create role {WEB} login;
                 create role {OPERATOR} login;
             exception when duplicate_object then
                 -- In the cluster's other database.
             end $$;
             select tollgate.grant_capability('{WEB}', 'verifier');
             select tollgate.grant_capability('{OPERATOR}', 'operator');
             grant select on tollgate.api_tokens to {WEB};
             create schema bench;
             grant usage on schema bench to {WEB};
             -- Declared like a verification, and does nothing: what calling a function costs by itself.
             create function bench.empty(token text, required_scopes text[], client_ip inet) returns integer
                 language internal volatile parallel unsafe as 'pg_backend_pid'"
        ),
    )
}

/// Puts these tokens into the table, as its owner: `create_api_token` would take an hour for ten million, and keeps their
/// plaintext to itself. Indexes are built afterwards.
pub(crate) fn load(cluster: &Cluster, database: &str, tokens: &Tokens) -> Result<()> {
    let indexes = "pg_catalog.pg_index set indisready = false, indisvalid = false";
    let mut owner = Connection::prepare(&socket(cluster), "postgres", database, &[])?;
    owner.simple(&format!("update {indexes} where indrelid = 'tollgate.api_tokens'::regclass"))?;
    let (next, count) = (AtomicU32::new(0), u32::try_from(tokens.len())?);
    thread::scope(|scope| {
        let workers: Vec<_> = (0..thread::available_parallelism()?.get())
            .map(|worker| {
                let next = &next;
                scope.spawn(move || -> Result<()> {
                    let mut owner = Connection::prepare(&socket(cluster), "postgres", database, &[])?;
                    loop {
                        let first = next.fetch_add(CHUNK, Ordering::Relaxed);
                        if first >= count {
                            return Ok(());
                        }
                        let path = cluster.socket_dir().join(format!("rows-{worker}"));
                        write_rows(&path, tokens, first..count.min(first + CHUNK))?;
                        owner.simple(&format!(
                            "copy tollgate.api_tokens ({COLUMNS}) from '{}'",
                            path.display()
                        ))?;
                        fs::remove_file(&path)?;
                    }
                })
            })
            .collect();
        workers.into_iter().try_for_each(|worker| worker.join().expect("a loader that fails says so"))
    })?;
    // Makes the indexes valid again, too.
    owner.simple("reindex table tollgate.api_tokens")?;
    owner.simple("vacuum (freeze, analyze) tollgate.api_tokens")?;
    owner.simple("checkpoint")?;
    Ok(())
}

fn write_rows(path: &Path, tokens: &Tokens, numbers: Range<u32>) -> Result<()> {
    let mut file = BufWriter::new(File::create(path)?);
    for number in numbers {
        let token = tokens.get(number as usize);
        let (id, hash, user, hint) = (id(number), hash(token), number / 10, &token[..8]);
        writeln!(
            file,
            "{id}\t\\\\x{hash}\tuser-{user}\tkey {number}\t{{posts:read,posts:write}}\t{{\"plan\": \"pro\"}}\t{hint}\tbench\t\
             2999-01-01\t1000000000\t1 hour"
        )?;
    }
    file.into_inner()?;
    Ok(())
}

/// A server with these tokens, all of them live.
pub(crate) fn with_tokens(builder: Builder, tokens: &Tokens) -> Result<Cluster> {
    let cluster = builder.start()?;
    prepare(&cluster, DATABASE)?;
    load(&cluster, DATABASE, tokens)?;
    check_limited(&cluster, tokens)?;
    Ok(cluster)
}

/// That limits are counted: the speed of a server that does less is not worth knowing.
fn check_limited(cluster: &Cluster, tokens: &Tokens) -> Result<()> {
    let sql = "select code || ' ' || rate_remaining from tollgate.verify_api_token($1, $2, $3)";
    let mut owner = Connection::prepare(&socket(cluster), "postgres", DATABASE, &[sql])?;
    owner.execute("0", &[tokens.get(0), REQUIRED, ADDRESS], b"VALID 999999999")
}

/// What the daemon does every few seconds, as often as there is something. Between the turns, so that it costs none of them.
pub(crate) fn flush(cluster: &Cluster, database: &str) -> Result<()> {
    let mut owner = Connection::prepare(&socket(cluster), "postgres", database, &[])?;
    loop {
        owner.simple(
            "select tollgate.apply_usage(node, boot, generation,
                        array_agg((token_id, uses, denials, last_used_at, last_used_ip)::tollgate.usage_row), signature)
               from tollgate.drain_usage() group by node, boot, generation, signature",
        )?;
        let acknowledged = owner.simple(
            "select tollgate.ack_usage(generation)
               from (select distinct generation from tollgate.drain_usage()) as drained",
        )?;
        if acknowledged.is_none() {
            return Ok(());
        }
    }
}

/// That every verification was counted.
pub(crate) fn check_metering(cluster: &Cluster, verified: u64) -> Result<()> {
    let counted = cluster.value(DATABASE, "select coalesce(sum(use_count), 0) from tollgate.token_usage")?;
    ensure!(
        counted.as_deref() == Some(verified.to_string().as_str()),
        "{verified} verifications were made, and {counted:?} counted"
    );
    Ok(())
}
