//! docs/drivers.md is true: what it shows for each driver is taken from there and run, directly and through PgBouncer in
//! transaction mode. Refusals are distinguished from lost connections; retry_after has the type that it says; no token is in an
//! error text or the server's log; and what the document warns of does put it there.

#[allow(unreachable_pub, reason = "as an application of its own would have it")]
mod tokio_postgres;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tempfile::TempDir;
use tollgate_tests::{Cluster, DATABASE, dev_dir, eventually};

use crate::document;
use crate::pooler::PgBouncer;

const DOCUMENT: &str = include_str!("../../../../docs/drivers.md");

/// The application of the README, whose posts only their authors may read.
const POSTS: &str = "
    create role app login;
    create role locked nologin;
    select tollgate.grant_capability('app', 'verifier');
    select tollgate.define_scope('posts:read', 'Read posts'), tollgate.define_scope('posts:write', 'Write posts');
    create table posts (id bigint generated always as identity primary key, author text not null, title text not null);
    alter table posts enable row level security;
    grant select on posts to app;
    create policy own on posts to app using (author = (select tollgate.current_user_id()));
    insert into posts (author, title) values ('ann', 'A draft'), ('ben', 'Mine')";

/// What each test runs against: a server that logs what servers log by default, and PgBouncer in front of it.
struct Application {
    pooler: PgBouncer,
    cluster: Cluster,
}

impl Application {
    /// One for all tests that run at the same time.
    fn shared() -> Result<Arc<Self>> {
        static RUNNING: Mutex<Weak<Application>> = Mutex::new(Weak::new());
        let mut running = RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(application) = running.upgrade() {
            return Ok(application);
        }
        let cluster = Cluster::start()?;
        cluster.execute(DATABASE, POSTS)?;
        let pooler = PgBouncer::before(cluster.port(), "app", "transaction", "")?;
        let application = Arc::new(Self { pooler, cluster });
        *running = Arc::downgrade(&application);
        Ok(application)
    }

    /// A URL for each way to the server.
    fn urls(&self) -> [String; 2] {
        [self.cluster.port(), self.pooler.port.number]
            .map(|port| format!("postgresql://app@127.0.0.1:{port}/{DATABASE}"))
    }

    /// Tokens of ben's, by the name of the environment variable in which the programs find them.
    fn tokens(&self) -> Result<BTreeMap<&'static str, String>> {
        let issue = |arguments: &str| -> Result<String> {
            let sql = format!("select token from tollgate.create_api_token('ben', 'driver', {arguments})");
            self.cluster.value(DATABASE, &sql)?.context("a token")
        };
        let tokens = BTreeMap::from([
            ("GOOD", issue("'{posts:read}'")?),
            ("REVOKED", issue("'{posts:read}'")?),
            ("NARROW", issue("'{posts:write}'")?),
            ("LIMITED", issue("'{posts:read}', rate_limit => 1, rate_window => '1 hour'")?),
            ("CARELESS", issue("'{posts:read}'")?),
        ]);
        for name in ["REVOKED", "CARELESS"] {
            let sql = format!("select tollgate.revoke_presented_token('{}')", tokens[name]);
            self.cluster.execute(DATABASE, &sql)?;
        }
        Ok(tokens)
    }
}

/// What the document shows under a heading, in the order in which it shows it.
fn section(heading: &str) -> Result<&'static str> {
    let (_, rest) =
        DOCUMENT.split_once(&format!("\n## {heading}\n")).with_context(|| format!("no section {heading}"))?;
    Ok(rest.split("\n## ").next().unwrap_or(rest))
}

/// Of a section, the blocks whose fences say this.
fn code(heading: &str, fences: &[&str]) -> Result<String> {
    let section = section(heading)?;
    let blocks: Vec<&str> = fences.iter().flat_map(|fence| document::blocks(section, fence)).collect();
    ensure!(!blocks.is_empty(), "{heading} shows no {fences:?}");
    Ok(blocks.join("\n\n") + "\n")
}

/// Where `make drivers` and `make drivers-long` put a part.
pub(crate) fn fetched(part: &str) -> Result<PathBuf> {
    let directory = dev_dir()?.join("drivers").join(part);
    ensure!(
        directory.join("pins").exists(),
        "{} is missing: `make drivers` fetches Python's and Node's, `make drivers-long` the others",
        directory.display()
    );
    Ok(directory)
}

/// Beside the tests.
pub(crate) fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("drivers").join(name)
}

fn succeed(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("cannot run {command:?}"))?;
    ensure!(output.status.success(), "{command:?}:\n{}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// What the packages whose tokens docs/migrating.md takes over store: of each its name, a token, and what it stores of it.
pub(crate) fn print_stored() -> Result<String> {
    let (python, node) = (fetched("python")?, fetched("node")?);
    let directory = tempfile::tempdir()?;
    fs::copy(source("node/stored.mjs"), directory.path().join("stored.mjs"))?;
    symlink(node.join("node_modules"), directory.path().join("node_modules"))?;
    let mut printed = String::new();
    for (program, script) in [
        (python.join("bin/python"), source("python/stored.py")),
        (node.join("node"), directory.path().join("stored.mjs")),
    ] {
        let output = Command::new(program).arg(script).output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        printed += &String::from_utf8(output.stdout)?;
    }
    Ok(printed)
}

/// Where a warned-about way puts the token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Leak {
    ServerLog,
    Output,
}

/// A program that runs a section of the document: see tests/drivers.
struct Program {
    /// Of the section.
    heading: &'static str,
    /// Where it was made, and runs.
    directory: TempDir,
    command: Vec<PathBuf>,
}

impl Program {
    fn new(
        heading: &'static str,
        directory: TempDir,
        command: impl IntoIterator<Item = impl Into<PathBuf>>,
    ) -> Self {
        Self { heading, directory, command: command.into_iter().map(Into::into).collect() }
    }

    fn python(heading: &'static str, name: &str) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        fs::write(directory.path().join("example.py"), code(heading, &["python", "python warned"])?)?;
        if section(heading)?.contains("```python settings") {
            fs::write(directory.path().join("settings.py"), code(heading, &["python settings"])?)?;
        }
        fs::copy(source("python/run.py"), directory.path().join("run.py"))?;
        Ok(Self::new(
            heading,
            directory,
            [fetched("python")?.join("bin/python"), "run.py".into(), name.into()],
        ))
    }

    fn node(heading: &'static str, name: &str) -> Result<Self> {
        let (directory, fetched) = (tempfile::tempdir()?, fetched("node")?);
        fs::write(directory.path().join("example.mjs"), code(heading, &["js", "js warned"])?)?;
        fs::copy(source("node/run.mjs"), directory.path().join("run.mjs"))?;
        symlink(fetched.join("node_modules"), directory.path().join("node_modules"))?;
        Ok(Self::new(heading, directory, [fetched.join("node"), "run.mjs".into(), name.into()]))
    }

    fn go() -> Result<Self> {
        let (directory, fetched) = (tempfile::tempdir()?, fetched("go")?);
        let example = format!("package main\n\n{}", code("pgx", &["go", "go warned"])?);
        fs::write(directory.path().join("example.go"), example)?;
        fs::copy(source("go/run.go"), directory.path().join("run.go"))?;
        let root = fetched.join("usr/lib/go");
        let packages = std::env::join_paths([
            fetched.join("usr/share/gocode"),
            // Debian's packages that this machine has installed.
            PathBuf::from("/usr/share/gocode"),
        ])?;
        let mut build = Command::new(root.join("bin/go"));
        build.args(["build", "-o", "run", "."]).current_dir(directory.path());
        build.env("GOROOT", &root).env("GOPATH", packages).env("GO111MODULE", "off").env("GOFLAGS", "");
        succeed(build.env("GOCACHE", dev_dir()?.join("drivers/go-cache")))?;
        Ok(Self::new("pgx", directory, ["./run"]))
    }

    fn java() -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let jar = fetched("java")?.join("usr/share/java/postgresql.jar");
        let path = std::env::join_paths([Path::new("."), &jar])?;
        fs::write(directory.path().join("Posts.java"), code("JDBC", &["java"])?)?;
        fs::copy(source("java/Run.java"), directory.path().join("Run.java"))?;
        let mut compile = Command::new("javac");
        compile.current_dir(directory.path()).arg("-cp").arg(&path).args(["Run.java", "Posts.java"]);
        succeed(&mut compile)?;
        Ok(Self::new("JDBC", directory, ["java".into(), "-cp".into(), PathBuf::from(path), "Run".into()]))
    }

    fn sqlx() -> Result<Self> {
        let directory = tempfile::tempdir()?;
        fs::create_dir(directory.path().join("src"))?;
        for file in ["Cargo.toml", "Cargo.lock", "src/main.rs"] {
            fs::copy(source("sqlx").join(file), directory.path().join(file))?;
        }
        fs::write(directory.path().join("src/example.rs"), code("sqlx", &["rust"])?)?;
        let target = dev_dir()?.join("drivers/sqlx-target");
        let mut build = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        build.args(["build", "--quiet", "--locked"]).current_dir(directory.path());
        succeed(build.env("CARGO_TARGET_DIR", &target))?;
        Ok(Self::new("sqlx", directory, [target.join("debug/drivers-sqlx")]))
    }

    /// What it prints for people and programs, and what it reports as errors.
    fn run(&self, url: &str, tokens: &BTreeMap<&str, String>, careless: bool) -> Result<(String, String)> {
        let mut command = Command::new(&self.command[0]);
        command.args(&self.command[1..]).current_dir(self.directory.path()).env("URL", url).envs(tokens);
        if careless {
            command.arg("careless");
        }
        let output = command.output().with_context(|| format!("cannot run {command:?}"))?;
        let (printed, errors) = (String::from_utf8(output.stdout)?, String::from_utf8(output.stderr)?);
        ensure!(output.status.success() != careless, "{command:?}: {}\n{printed}{errors}", output.status);
        Ok((printed, errors))
    }
}

/// The digits of a token, which say more than its prefix.
fn digits(token: &str) -> &str {
    token.split_once('_').map_or(token, |(_, digits)| digits)
}

/// What the document says of the types that a driver gives `retry_after` and its seconds.
fn types_of_retry_after(heading: &str) -> Result<[&'static str; 2]> {
    let mut rows = section("What they have in common")?.lines().filter_map(|line| {
        let [_, drivers, interval, seconds, _] = line.split('|').map(str::trim).collect::<Vec<_>>()[..]
        else {
            return None;
        };
        drivers.split(", ").any(|driver| driver == heading).then_some([interval, seconds])
    });
    rows.next_back().with_context(|| format!("no row for {heading}"))
}

/// Panics unless the lines that a program printed say that each token was treated as the document says.
#[track_caller]
fn assert_refusals(printed: &str, rounds: usize, types: [&str; 2]) {
    let lines: Vec<&str> = printed.lines().collect();
    assert_eq!(lines.len(), rounds * 7, "{printed}");
    for round in lines.chunks(7) {
        let refused = |line: &str, name: &str, status: &str, code: &str| -> Value {
            let detail =
                line.strip_prefix(&format!("{name} {status} ")).unwrap_or_else(|| panic!("{name}: {line}"));
            let detail: Value =
                serde_json::from_str(detail).unwrap_or_else(|error| panic!("{line}: {error}"));
            assert_eq!(detail["code"], code, "{line}");
            detail
        };
        assert_eq!(round[0], r#"good ["Mine"]"#);
        refused(round[1], "revoked", "401", "REVOKED");
        refused(round[2], "narrow", "403", "INSUFFICIENT_SCOPE");
        let limited = refused(round[4], "limited", "429", "RATE_LIMITED");
        assert!(limited["retry_after"].as_f64().is_some_and(|seconds| seconds > 0.0), "{limited}");
        let ["retry_after", interval, number, seconds] = round[5].split(' ').collect::<Vec<_>>()[..] else {
            panic!("{}", round[5])
        };
        let [said, of_seconds] = types;
        assert!(
            said.trim_start_matches("`datetime.").trim_matches('`').starts_with(interval),
            "{interval}: {said}"
        );
        assert_eq!(of_seconds.trim_matches('`'), number);
        assert!(seconds.parse::<f64>().is_ok_and(|seconds| seconds > 0.0 && seconds <= 3600.0), "{seconds}");
        assert_eq!(round[6], "lost no refusal");
    }
}

/// Runs a program both ways and, if the document warns of something, that too.
fn check(program: &Program, rounds: usize, warned: Option<Leak>) -> Result<()> {
    let application = Application::shared()?;
    let tokens = application.tokens()?;
    for url in application.urls() {
        let (printed, errors) = program.run(&url, &tokens, false)?;
        assert_refusals(&printed, rounds, types_of_retry_after(program.heading)?);
        assert!(errors.contains("the token was refused"), "no error text to look at: {errors}");
        for (name, token) in &tokens {
            assert!(!errors.contains(digits(token)), "{name} is in an error text: {errors}");
            assert!(!application.cluster.log().contains(digits(token)), "{name} is in the server's log");
        }
    }
    let Some(leak) = warned else { return Ok(()) };
    let (printed, errors) = program.run(&application.urls()[0], &tokens, true)?;
    let careless = digits(&tokens["CARELESS"]);
    match leak {
        Leak::ServerLog => eventually(Duration::from_secs(10), "the token in the server's log", || {
            application.cluster.log().contains(careless)
        }),
        Leak::Output => assert!((printed + &errors).contains(careless), "the warning is not true"),
    }
    Ok(())
}

#[test]
fn psycopg_keeps_the_token_to_itself_unless_its_cursor_is_of_the_client() -> Result<()> {
    // A connection, a pool, and a pool of asynchronous connections.
    check(&Program::python("psycopg 3", "psycopg")?, 3, Some(Leak::ServerLog))
}

#[test]
fn asyncpg_keeps_the_token_to_itself_unless_queries_are_logged() -> Result<()> {
    check(&Program::python("asyncpg", "asyncpg")?, 1, Some(Leak::Output))
}

#[test]
fn sqlalchemy_shows_the_token_in_errors_unless_parameters_are_hidden() -> Result<()> {
    check(&Program::python("SQLAlchemy", "sqlalchemy")?, 1, Some(Leak::Output))
}

#[test]
fn django_writes_the_token_into_the_statement_unless_the_server_binds_it() -> Result<()> {
    check(&Program::python("Django", "django")?, 1, Some(Leak::ServerLog))
}

#[test]
fn node_postgres_keeps_the_token_to_itself_unless_it_is_in_the_text() -> Result<()> {
    check(&Program::node("node-postgres", "node-postgres")?, 1, Some(Leak::ServerLog))
}

#[test]
fn postgres_js_shows_the_token_in_errors_when_it_debugs() -> Result<()> {
    check(&Program::node("postgres.js", "postgres.js")?, 1, Some(Leak::Output))
}

#[test]
fn typeorm_shows_the_token_in_errors_unless_they_are_replaced() -> Result<()> {
    check(&Program::node("TypeORM", "typeorm")?, 1, Some(Leak::Output))
}

#[test]
#[ignore = "long: compiles Go"]
fn pgx_writes_the_token_into_the_statement_with_the_simple_protocol() -> Result<()> {
    check(&Program::go()?, 1, Some(Leak::ServerLog))
}

#[test]
#[ignore = "long: compiles Java"]
fn jdbc_writes_the_token_into_the_statement_in_simple_mode() -> Result<()> {
    check(&Program::java()?, 1, Some(Leak::ServerLog))
}

#[test]
#[ignore = "long: compiles sqlx"]
fn sqlx_keeps_the_token_to_itself() -> Result<()> {
    check(&Program::sqlx()?, 1, None)
}

/// Whether tokio-postgres has logged what is searched for.
struct Logged;

static CARELESS: Mutex<String> = Mutex::new(String::new());
static FOUND: AtomicBool = AtomicBool::new(false);

impl log::Log for Logged {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.target().starts_with("tokio_postgres")
    }

    fn log(&self, record: &log::Record<'_>) {
        let careless = CARELESS.lock().unwrap_or_else(PoisonError::into_inner);
        if self.enabled(record.metadata())
            && !careless.is_empty()
            && record.args().to_string().contains(&*careless)
        {
            FOUND.store(true, Ordering::Relaxed);
        }
    }

    fn flush(&self) {}
}

#[tokio::test]
async fn tokio_postgres_keeps_the_token_to_itself_unless_its_query_is_logged() -> Result<()> {
    use std::fmt::Write as _;

    use ::tokio_postgres::NoTls;
    use ::tokio_postgres::types::Type;

    let source = include_str!("tokio_postgres.rs");
    assert_eq!(
        source.split_once("\n\n").map(|(_, code)| code),
        Some(&*code("tokio-postgres", &["rust", "rust warned"])?)
    );

    let application = Application::shared()?;
    let tokens = application.tokens()?;
    let address = "203.0.113.7".parse()?;
    for url in application.urls() {
        let (mut client, connection) = ::tokio_postgres::connect(&url, NoTls).await?;
        tokio::spawn(connection);
        let (mut printed, mut errors) = (String::new(), String::new());
        let mut print = |printed: &mut String,
                         name: &str,
                         result: Result<Vec<String>, ::tokio_postgres::Error>|
         -> Result<()> {
            match result {
                Ok(titles) => writeln!(printed, "{name} {titles:?}")?,
                Err(error) => {
                    writeln!(errors, "{error} {error:#?}")?;
                    match tokio_postgres::refusal(&error) {
                        Some((status, detail)) => writeln!(printed, "{name} {status} {detail}")?,
                        None => writeln!(printed, "{name} no refusal")?,
                    }
                }
            }
            Ok(())
        };
        for name in ["good", "revoked", "narrow", "limited", "limited"] {
            let token = &tokens[&*name.to_uppercase()];
            print(&mut printed, name, tokio_postgres::posts(&mut client, token, address).await)?;
        }
        // Whatever session of the server it is, no identity was left in it.
        let user = client.query_typed("select tollgate.current_user_id()", &[]).await?;
        assert_eq!(user[0].get::<_, Option<&str>>(0), None);
        let wait =
            "select retry_after, extract(epoch from retry_after)::float8 from tollgate.verify_api_token($1)";
        let row = client.query_typed(wait, &[(&tokens["LIMITED"], Type::TEXT)]).await?.remove(0);
        assert_eq!(row.columns()[0].type_(), &Type::INTERVAL);
        assert!(row.try_get::<_, String>(0).is_err());
        writeln!(printed, "retry_after nothing f64 {}", row.get::<_, f64>(1))?;
        let lost = client.query_typed("select pg_terminate_backend(pg_backend_pid())", &[]).await;
        print(&mut printed, "lost", lost.map(|_| Vec::new()))?;

        assert_refusals(&printed, 1, types_of_retry_after("tokio-postgres")?);
        for (name, token) in &tokens {
            assert!(!errors.contains(digits(token)), "{name} is in an error text: {errors}");
            assert!(!application.cluster.log().contains(digits(token)), "{name} is in the server's log");
        }
    }

    // The SQLSTATEs of refusals are raised for other reasons too.
    let url = application.urls()[0].replace("app@", "locked@");
    let error = ::tokio_postgres::connect(&url, NoTls).await.err().context("it may not log in")?;
    assert_eq!(
        (error.code().map(::tokio_postgres::error::SqlState::code), tokio_postgres::refusal(&error)),
        (Some("28000"), None)
    );
    let (client, connection) = ::tokio_postgres::connect(&application.urls()[0], NoTls).await?;
    tokio::spawn(connection);
    let error =
        client.query_typed("select from tollgate.api_tokens", &[]).await.err().context("not its table")?;
    assert_eq!(
        (error.code().map(::tokio_postgres::error::SqlState::code), tokio_postgres::refusal(&error)),
        (Some("42501"), None)
    );

    // Other tests log meanwhile, which does not matter.
    log::set_logger(&Logged).map_err(|error| anyhow::anyhow!("{error}"))?;
    tokens["CARELESS"].clone_into(&mut CARELESS.lock().unwrap_or_else(PoisonError::into_inner));
    let (mut client, connection) = ::tokio_postgres::connect(&application.urls()[0], NoTls).await?;
    tokio::spawn(connection);
    for (level, expected) in [(log::LevelFilter::Info, false), (log::LevelFilter::Debug, true)] {
        log::set_max_level(level);
        assert!(tokio_postgres::posts(&mut client, &tokens["CARELESS"], address).await.is_err());
        assert!(!FOUND.load(Ordering::Relaxed), "query_typed logs it, at level {level}");
        assert!(tokio_postgres::careless_posts(&client, &tokens["CARELESS"]).await.is_err());
        assert_eq!(FOUND.load(Ordering::Relaxed), expected, "at level {level}");
    }
    log::set_max_level(log::LevelFilter::Off);
    Ok(())
}
