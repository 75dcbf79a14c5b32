//! `make bench`: what a verification costs beside the query that a user would write by hand.
//!
//! Three statements are compared, in turn, in several rounds of one run, since a machine's speed drifts: `select 1` (the
//! ceiling: a round trip that does nothing), the hand-written lookup, and `verify_api_token`. Both of the latter get the
//! whole token as their one bound parameter and return the same eleven columns. Tokens are random among all there are.
//!
//! It is measured twice over:
//! - with a client of our own that holds the tokens in memory and sends just what `pgbench -M prepared` sends. pgbench
//!   has no way to bind a random text without asking the server for it, so this is the truest measure of one statement;
//! - with pgbench itself, whose script first fetches a token by a random number into a variable. What that fetch alone
//!   costs is measured too, in the same round, and subtracted ("net").
//!
//! Tokens are made from their numbers, so the client knows them; `create_api_token` would be the only other place that
//! does. Rows go straight into the table, as its owner.

mod wire;

use std::fs::{self, File};
use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use sha2::{Digest as _, Sha256};
use tollgate_core::token::{ENTROPY_LEN, Issued, Prefix, issue};
use tollgate_tests::{Cluster, DATABASE, Install};
use uuid::Uuid;

use crate::wire::Connection;

/// An ordinary role: a superuser would be spared the checks of privileges.
const ROLE: &str = "web";

/// Without any of the checks that a verification makes: the query in its cheapest form.
const BY_HAND: &str = "select true as valid, 'VALID' as code, id as token_id, user_id, name, scopes, expires_at, metadata, \
                       rate_limit, null::integer as rate_remaining, null::interval as retry_after \
                       from tollgate.api_tokens where token_hash = sha256($1)";
const VERIFY: &str = "select * from tollgate.verify_api_token($1)";
const FETCH: &str = "\\set n random(0, :tokens - 1)\nselect token from bench.tokens where n = :n \\gset\n";

#[derive(Parser)]
#[command(about = "Compares verification with the query that one would write by hand")]
struct Options {
    /// A PostgreSQL with the extension installed; may be given several times
    #[arg(long, required = true)]
    pg_config: Vec<PathBuf>,
    /// Tokens in the table
    #[arg(long, default_value_t = 1_000_000)]
    tokens: u32,
    /// Connections at work at the same time
    #[arg(long, default_value_t = 4)]
    clients: usize,
    /// How often each statement has its turn
    #[arg(long, default_value_t = 9, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// How long a turn is, in seconds
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    seconds: u32,
    /// Leave out the part with pgbench itself
    #[arg(long)]
    no_pgbench: bool,
}

fn main() -> Result<()> {
    let options = Options::parse();
    let tokens: Vec<String> = (0..options.tokens).map(|number| token(number).token().to_owned()).collect();
    for pg_config in &options.pg_config {
        bench(&options, Install::from_pg_config(pg_config)?, &tokens)?;
    }
    Ok(())
}

fn bench(options: &Options, install: Install, tokens: &[String]) -> Result<()> {
    println!("==> {}: loading {} tokens", install.version, tokens.len());
    let cluster = Cluster::builder()
        .install(install)
        // The table and its indexes fit, as those of a service's tokens should.
        .setting("shared_buffers", "1GB")
        .setting("autovacuum", "off")
        .setting("checkpoint_timeout", "1h")
        .setting("max_wal_size", "8GB")
        // Room for each token, as a service would have whose tokens are all in use.
        .setting("tollgate.max_tracked_keys", &options.tokens.max(1024).to_string())
        .start()?;
    load(&cluster, tokens)?;

    println!(
        "==> {}: {} clients, {} rounds of {} s a statement, {} tokens, metering on",
        cluster.install().version,
        options.clients,
        options.rounds,
        options.seconds,
        tokens.len()
    );
    let statements =
        [("select 1", "select 1", &b"1"[..]), ("by hand", BY_HAND, b"t"), ("verify_api_token", VERIFY, b"t")];
    let mut results = statements.map(|(name, ..)| Series::new(name));
    let mut cpu = statements.map(|(name, ..)| Series::new(name));
    let mut verified = 0;
    // Connected once, as a pool's connections are. A new backend takes a page fault for each page of the shared memory
    // that it touches first, which at random among a million tokens would be most of what is measured.
    let socket = cluster.socket_dir().join(format!(".s.PGSQL.{}", cluster.port()));
    let prepared = statements.map(|(_, sql, _)| sql);
    let mut connections = (0..options.clients)
        .map(|_| Connection::prepare(&socket, ROLE, DATABASE, &prepared))
        .collect::<Result<Vec<_>>>()?;
    // Each token once: what is of interest is a service that has been up for a while.
    warm_up(&mut connections, "1", tokens)?;
    for some in tokens.chunks(tokens.len().div_ceil(4)) {
        warm_up(&mut connections, "2", some)?;
        verified += some.len() as u64;
        flush(&cluster)?;
    }
    let mut progress = Progress::new("own client", (options.rounds + 1) * 3);
    for round in 0..=options.rounds {
        for turn in order(round) {
            let (_, sql, expected) = statements[turn];
            let length = Duration::from_secs(u64::from(options.seconds));
            let parameters = if sql.contains("$1") { tokens } else { &[] };
            let done = run(&mut connections, length, &turn.to_string(), parameters, expected)?;
            // The first round warms the caches up.
            if round > 0 {
                results[turn].values.push(done.executions as f64 / done.seconds);
                if let Some(nanoseconds) = done.backend_cpu {
                    cpu[turn].values.push(nanoseconds as f64 / done.executions as f64 / 1000.0);
                }
            }
            if sql == VERIFY {
                verified += done.executions;
                flush(&cluster)?;
            }
            progress.step();
        }
    }
    check_metering(&cluster, verified)?;
    report("executions per second", &results, 0);
    let [ceiling, by_hand, verify] = &results;
    verify.over(by_hand, "verify / by hand").print(3);
    verify.over(ceiling, "verify / select 1").print(3);
    // Where other work shares the machine, this says more than the values do.
    if cpu.iter().all(|series| !series.values.is_empty()) {
        report("server's CPU, microseconds", &cpu, 1);
        let [_, by_hand, verify] = &cpu;
        by_hand.over(verify, "by hand / verify").print(3);
    }

    if !options.no_pgbench {
        with_pgbench(options, &cluster, tokens)?;
    }
    println!();
    Ok(())
}

/// Every second round goes backwards, so that a machine that slows down or speeds up favours no statement.
fn order(round: u32) -> [usize; 3] {
    if round.is_multiple_of(2) { [0, 1, 2] } else { [2, 1, 0] }
}

/// Rounds of pgbench, with a fetch of the token before each statement.
fn with_pgbench(options: &Options, cluster: &Cluster, tokens: &[String]) -> Result<()> {
    copy_in(cluster, "bench.tokens (n, token)", tokens, |row, number, token| {
        write!(row, "{number}\t{token}")
    })?;
    cluster.execute(DATABASE, "alter table bench.tokens add primary key (n)")?;
    cluster.execute(DATABASE, "vacuum (freeze, analyze) bench.tokens")?;

    let scripts = tempfile::tempdir()?;
    let script = |name: &str, sql: &str| -> Result<PathBuf> {
        let path = scripts.path().join(name);
        fs::write(&path, sql.replace("$1", ":token"))?;
        Ok(path)
    };
    let scripts = [
        ("fetch alone", script("fetch.sql", FETCH)?),
        ("fetch, by hand", script("by_hand.sql", &format!("{FETCH}{BY_HAND};\n"))?),
        ("fetch, verify", script("verify.sql", &format!("{FETCH}{VERIFY};\n"))?),
    ];
    let mut results = scripts.each_ref().map(|(name, _)| Series::new(name));
    let mut progress = Progress::new("pgbench", (options.rounds + 1) * 3);
    for round in 0..=options.rounds {
        for turn in order(round) {
            let rate = pgbench(options, cluster, &scripts[turn].1, tokens.len())?;
            flush(cluster)?;
            if round > 0 {
                results[turn].values.push(rate);
            }
            progress.step();
        }
    }
    report("pgbench, tps", &results, 0);
    let [fetch, by_hand, verify] = &results;
    verify.over(by_hand, "verify / by hand, gross").print(3);
    let net = |all: &Series, what: &'static str| Series {
        name: what,
        values: all
            .values
            .iter()
            .zip(&fetch.values)
            .map(|(all, fetch)| 1.0 / (1.0 / all - 1.0 / fetch))
            .collect(),
    };
    net(verify, "verify").over(&net(by_hand, "by hand"), "verify / by hand, net").print(3);
    Ok(())
}

/// The measurements of one statement, a number a round.
struct Series {
    name: &'static str,
    values: Vec<f64>,
}

fn report(heading: &str, series: &[Series], decimals: usize) {
    println!("{heading:<28} {:>9} {:>9} {:>9}", "median", "min", "max");
    for series in series {
        series.print(decimals);
    }
}

impl Series {
    fn new(name: &'static str) -> Self {
        Self { name, values: Vec::new() }
    }

    /// The ratios round by round: what slows the machine for a while slows both.
    fn over(&self, other: &Self, name: &'static str) -> Self {
        Self {
            name,
            values: self.values.iter().zip(&other.values).map(|(ours, theirs)| ours / theirs).collect(),
        }
    }

    fn print(&self, decimals: usize) {
        let mut sorted = self.values.clone();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        let median = if sorted.len() % 2 == 1 {
            sorted[middle]
        } else {
            f64::midpoint(sorted[middle - 1], sorted[middle])
        };
        let (min, max) = (sorted[0], sorted[sorted.len() - 1]);
        println!("  {:<26} {median:>9.decimals$} {min:>9.decimals$} {max:>9.decimals$}", self.name);
    }
}

/// What all connections did in one turn.
#[derive(Default)]
struct Done {
    executions: u64,
    seconds: f64,
    /// Nanoseconds, of all backends together.
    backend_cpu: Option<u64>,
}

/// Runs one statement with each of the parameters once.
fn warm_up(connections: &mut [Connection], statement: &str, parameters: &[String]) -> Result<()> {
    let share = parameters.len().div_ceil(connections.len());
    thread::scope(|scope| {
        let workers: Vec<_> = connections
            .iter_mut()
            .zip(parameters.chunks(share))
            .map(|(connection, share)| {
                scope
                    .spawn(|| share.iter().try_for_each(|one| connection.execute(statement, Some(one), b"t")))
            })
            .collect();
        for worker in workers {
            worker.join().map_err(|_| anyhow::anyhow!("a client panicked"))??;
        }
        Ok(())
    })
}

/// Runs one statement on all connections for a while, each time with one of the parameters, if it takes any.
fn run(
    connections: &mut [Connection],
    length: Duration,
    statement: &str,
    parameters: &[String],
    expected: &[u8],
) -> Result<Done> {
    let (start, stop) = (Barrier::new(connections.len() + 1), AtomicBool::new(false));
    thread::scope(|scope| {
        let workers: Vec<_> = connections
            .iter_mut()
            .enumerate()
            .map(|(number, connection)| {
                let (start, stop) = (&start, &stop);
                scope.spawn(move || -> Result<(u64, Option<u64>)> {
                    connection.share_processor(number);
                    start.wait();
                    let before = connection.backend_cpu();
                    let mut random = Random::new();
                    let mut executions = 0;
                    while !stop.load(Ordering::Relaxed) {
                        let parameter = random.one_of(parameters).map(String::as_str);
                        connection.execute(statement, parameter, expected)?;
                        executions += 1;
                    }
                    Ok((
                        executions,
                        connection.backend_cpu().zip(before).map(|(after, before)| after - before),
                    ))
                })
            })
            .collect();
        start.wait();
        let begin = Instant::now();
        thread::sleep(length);
        stop.store(true, Ordering::Relaxed);
        let mut done = Done { backend_cpu: Some(0), ..Done::default() };
        for worker in workers {
            let (executions, cpu) = worker.join().map_err(|_| anyhow::anyhow!("a client panicked"))??;
            done.executions += executions;
            done.backend_cpu = done.backend_cpu.zip(cpu).map(|(sum, cpu)| sum + cpu);
        }
        done.seconds = begin.elapsed().as_secs_f64();
        Ok(done)
    })
}

fn pgbench(options: &Options, cluster: &Cluster, script: &Path, tokens: usize) -> Result<f64> {
    let mut command = cluster.program("pgbench");
    command.env("PGUSER", ROLE).args(["--no-vacuum", "--protocol=prepared", "--jobs=2"]);
    command.arg(format!("--client={}", options.clients)).arg(format!("--time={}", options.seconds));
    command.arg(format!("--define=tokens={tokens}")).arg("--file=-");
    let output = command.stdin(File::open(script)?).stderr(Stdio::inherit()).output()?;
    ensure!(output.status.success(), "pgbench failed: {}", output.status);
    let report = String::from_utf8_lossy(&output.stdout);
    report
        .lines()
        .find_map(|line| line.strip_prefix("tps = ")?.split(' ').next()?.parse().ok())
        .with_context(|| format!("pgbench reported no tps:\n{report}"))
}

fn load(cluster: &Cluster, tokens: &[String]) -> Result<()> {
    cluster.execute(
        DATABASE,
        &format!(
            "create role {ROLE} login;
             grant execute on function tollgate.verify_api_token to {ROLE};
             grant select on tollgate.api_tokens to {ROLE};
             create schema bench;
             create table bench.tokens (n integer not null, token text not null);
             grant usage on schema bench to {ROLE};
             grant select on bench.tokens to {ROLE}"
        ),
    )?;
    let columns = "tollgate.api_tokens (id, token_hash, user_id, name, scopes, metadata, hint)";
    copy_in(cluster, columns, tokens, |row, number, token| {
        let hash: String =
            Sha256::digest(token.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect();
        let (id, user) = (Uuid::from_bytes(entropy(number, "id")), number / 10);
        let metadata = r#"{"plan": "pro"}"#;
        write!(
            row,
            "{id}\t\\\\x{hash}\tuser-{user}\tkey {number}\t{{posts:read,posts:write}}\t{metadata}\t{}",
            &token[..8]
        )
    })?;
    cluster.execute(DATABASE, "vacuum (freeze, analyze) tollgate.api_tokens")?;
    cluster.execute(DATABASE, "checkpoint")
}

/// Copies a row for each token into `table`, by way of a file that the server reads.
fn copy_in(
    cluster: &Cluster,
    table: &str,
    tokens: &[String],
    row: impl Fn(&mut BufWriter<File>, u32, &str) -> std::io::Result<()>,
) -> Result<()> {
    let path = cluster.socket_dir().join("rows");
    let mut file = BufWriter::new(File::create(&path)?);
    for (number, token) in (0..).zip(tokens) {
        row(&mut file, number, token)?;
        writeln!(file)?;
    }
    file.into_inner()?;
    cluster.execute(DATABASE, &format!("copy {table} from '{}'", path.display()))?;
    Ok(fs::remove_file(&path)?)
}

/// What the daemon does every few seconds. Between the turns, so that it costs none of them.
fn flush(cluster: &Cluster) -> Result<()> {
    cluster.execute(
        DATABASE,
        "select tollgate.apply_usage(node, boot, generation,
                    array_agg((token_id, uses, denials, last_used_at, last_used_ip)::tollgate.usage_row))
           from tollgate.drain_usage() group by node, boot, generation",
    )?;
    cluster.execute(
        DATABASE,
        "select tollgate.ack_usage(generation) from (select distinct generation from tollgate.drain_usage()) as drained",
    )
}

/// That every verification was counted: the speed of a server that does less is not worth knowing.
fn check_metering(cluster: &Cluster, verified: u64) -> Result<()> {
    let counted = cluster.value(DATABASE, "select coalesce(sum(use_count), 0) from tollgate.token_usage")?;
    ensure!(
        counted.as_deref() == Some(verified.to_string().as_str()),
        "{verified} verifications were made, and {counted:?} counted"
    );
    Ok(())
}

fn token(number: u32) -> Issued {
    let mut bytes = [0; ENTROPY_LEN];
    for (chunk, part) in bytes.chunks_mut(16).zip(["1", "2", "3"]) {
        let random = entropy(number, part);
        chunk.copy_from_slice(&random[..chunk.len()]);
    }
    issue(&Prefix::default(), &bytes)
}

/// The same for the same number in every run.
fn entropy(number: u32, part: &str) -> [u8; 16] {
    let digest = Sha256::digest(format!("tollgate bench {part} {number}"));
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&digest[..16]);
    bytes
}

/// SplitMix64: a few instructions a number, which is all that is asked of it.
struct Random(u64);

impl Random {
    fn new() -> Self {
        let (high, low) = Uuid::new_v4().as_u64_pair();
        Self(high ^ low)
    }

    fn one_of<'a, T>(&mut self, all: &'a [T]) -> Option<&'a T> {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^= x >> 31;
        let bits = x as usize;
        all.get(bits.checked_rem(all.len())?)
    }
}

/// A line that says how far it is, where somebody watches.
struct Progress {
    what: &'static str,
    done: u32,
    all: u32,
}

impl Progress {
    fn new(what: &'static str, all: u32) -> Self {
        Self { what, done: 0, all }
    }

    fn step(&mut self) {
        use std::io::IsTerminal as _;
        self.done += 1;
        let mut terminal = std::io::stderr();
        if terminal.is_terminal() {
            let end = if self.done == self.all { "\r\x1b[K" } else { "" };
            // Nothing depends on it.
            let _ = write!(terminal, "\r  {}: {} of {} turns{end}", self.what, self.done, self.all);
        }
    }
}
