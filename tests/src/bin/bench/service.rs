//! A server with tokens, set up as in production, and the daemon's work on it.

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

/// An ordinary role: a superuser would skip the privilege checks.
pub(crate) const WEB: &str = "web";
/// The daemon's role.
pub(crate) const OPERATOR: &str = "tollgated";

/// Every check of a verification: revoked, disabled, expired, networks, scopes; and the limit and the metering.
pub(crate) const VERIFY: Statement = Statement {
    sql: "select * from tollgate.verify_api_token($1, $2, $3)",
    takes: Takes::TokenAndChecks,
    expected: b"t",
};

/// Number of tokens per COPY.
const CHUNK: u32 = 250_000;

/// Long-lived, and with a limit that is never reached: a billion at once.
const COLUMNS: &str =
    "id, token_hash, user_id, name, scopes, metadata, hint, created_by, expires_at, rate_limit, rate_window";

/// As in production: durable, vacuumed, and with memory for table and indexes. `tokens` is the number that will be in
/// use.
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

/// Room for each token, as for a service whose tokens are all in use, and some more: groups fill unevenly, and a token
/// with a limit is refused where there is no room for it.
fn tracked_keys(tokens: u32) -> u64 {
    u64::from(tokens) * 5 / 4 + 131_072
}

/// The server's settings, for the conditions of every part.
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

/// Creates the roles, and the schema for the benchmark's own objects.
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

/// Inserts these tokens as the owner: `create_api_token` would take an hour for ten million, and does not keep their
/// plaintext. Indexes are built afterwards.
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
        workers.into_iter().try_for_each(|worker| worker.join().expect("a failing loader returns an error"))
    })?;
    // Also makes the indexes valid again.
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

/// Checks that limits are counted: otherwise the server would do less than is measured.
fn check_limited(cluster: &Cluster, tokens: &Tokens) -> Result<()> {
    let sql = "select code || ' ' || rate_remaining from tollgate.verify_api_token($1, $2, $3)";
    let mut owner = Connection::prepare(&socket(cluster), "postgres", DATABASE, &[sql])?;
    owner.execute("0", &[tokens.get(0), REQUIRED, ADDRESS], b"VALID 999999999")
}

/// What the daemon does every few seconds. Called between the turns, so that it does not slow them.
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

/// Checks that every verification was counted.
pub(crate) fn check_metering(cluster: &Cluster, verified: u64) -> Result<()> {
    let counted = cluster.value(DATABASE, "select coalesce(sum(use_count), 0) from tollgate.token_usage")?;
    ensure!(
        counted.as_deref() == Some(verified.to_string().as_str()),
        "{verified} verifications were made, and {counted:?} counted"
    );
    Ok(())
}
