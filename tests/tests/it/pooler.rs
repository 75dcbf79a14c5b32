//! The daemon behind a real PgBouncer: in transaction mode it refuses to serve and says why, as does `check`; in
//! session mode it works.

use std::os::unix::process::CommandExt as _;
use std::process::{Child, Stdio};
use std::time::Duration;

use crate::common::{self, Shared};
use crate::operator::{self, Db, OPERATOR};
use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;
use tollgate_tests::{Account, Port, Tollgated, dev_dir, eventually, eventually_async};

static SHARED: Shared = Shared::new(&[]);

const SOON: Duration = Duration::from_secs(60);

/// Configurations of transaction pooling, and how many sessions to wait for.
const TRANSACTION_POOLS: [(&str, i64); 4] = [
    ("", 0),
    // Alternating between two server sessions for our two: each gets its own again, as without a pooler.
    ("server_round_robin = 1\nmin_pool_size = 2", 2),
    ("server_round_robin = 1\nmin_pool_size = 3", 3),
    ("default_pool_size = 1", 0),
];

pub(crate) struct PgBouncer {
    child: Child,
    pub(crate) port: Port,
    directory: TempDir,
}

impl PgBouncer {
    fn start(db: &Db, mode: &str, more: &str) -> Result<Self> {
        Self::before(db.cluster.port(), OPERATOR, mode, more)
    }

    /// In front of the server at `server`, for one role.
    pub(crate) fn before(server: u16, role: &str, mode: &str, more: &str) -> Result<Self> {
        let program = dev_dir()?.join("pgbouncer/run");
        ensure!(program.exists(), "{} is missing: `make pgbouncer` fetches it", program.display());
        let (account, port) = (Account::unprivileged()?, Port::any()?);
        let directory = TempDir::new()?;
        account.private_dir(directory.path())?;
        let users = directory.path().join("users.txt");
        std::fs::write(&users, format!("\"{role}\" \"\"\n"))?;
        let configuration = directory.path().join("pgbouncer.ini");
        std::fs::write(
            &configuration,
            format!(
                "[databases]\n* = host=127.0.0.1 port={server}\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {}\n\
                 unix_socket_dir =\nauth_type = trust\nauth_file = {}\npool_mode = {mode}\n\
                 ignore_startup_parameters = extra_float_digits\n{more}\n",
                port.number,
                users.display()
            ),
        )?;
        let log = std::fs::File::create(directory.path().join("log"))?;
        let mut command = account.command(program);
        command.arg(&configuration).current_dir("/").process_group(0).stdin(Stdio::null());
        command.stdout(log.try_clone()?).stderr(log);
        let child = command.spawn().context("cannot start PgBouncer")?;
        let pooler = Self { child, port, directory };
        eventually(SOON, "PgBouncer", || {
            std::net::TcpStream::connect(("127.0.0.1", pooler.port.number)).is_ok()
        });
        Ok(pooler)
    }

    /// Waits until it has this many server sessions, which it opens once a client has connected.
    async fn fill(&self, db: &Db, sessions: i64) -> Result<()> {
        let (_client, connection) = tokio_postgres::connect(&self.url(db), tokio_postgres::NoTls).await?;
        tokio::spawn(connection);
        let count = "select count(*) from pg_stat_activity where state = 'idle' and usename = 'OPERATOR'
                     and datname = current_database()";
        let count = count.replace("OPERATOR", OPERATOR);
        eventually_async(SOON, "the sessions of PgBouncer", async || {
            common::value::<i64>(&db.owner, &count).await.is_ok_and(|idle| idle >= sessions)
        })
        .await;
        Ok(())
    }

    fn url(&self, db: &Db) -> String {
        format!("postgresql://{OPERATOR}@127.0.0.1:{}/{}", self.port.number, db.name)
    }
}

impl Drop for PgBouncer {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = std::fs::read_to_string(self.directory.path().join("log")).unwrap_or_default();
            eprintln!("--- PgBouncer's log ---\n{log}");
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The next user of its sessions finds no lock, no LISTEN, and the settings of the role and the database.
async fn assert_left_unchanged(db: &Db, pooler: &PgBouncer) -> Result<()> {
    let locks: i64 = common::value(
        &db.owner,
        "select count(*) from pg_locks where locktype = 'advisory' and classid = x'74676c64'::int::oid
         and database = (select oid from pg_database where datname = current_database())",
    )
    .await?;
    ensure!(locks == 0, "{locks} locks");
    let (client, connection) = tokio_postgres::connect(&pooler.url(db), tokio_postgres::NoTls).await?;
    tokio::spawn(connection);
    let answer = client
        .simple_query("select current_setting('search_path'), count(c) from pg_listening_channels() c")
        .await?;
    let found = answer.iter().find_map(|message| match message {
        tokio_postgres::SimpleQueryMessage::Row(row) => Some(format!("{:?} {:?}", row.get(0), row.get(1))),
        _ => None,
    });
    ensure!(found.as_deref() == Some("Some(\"\\\"$user\\\", public\") Some(\"0\")"), "{found:?}");
    Ok(())
}

#[tokio::test]
async fn a_pooler_in_transaction_mode_is_named_at_start_and_left_as_it_was() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "pooled").await?;
    for (more, sessions) in TRANSACTION_POOLS {
        let pooler = PgBouncer::start(&db, "transaction", more)?;
        pooler.fill(&db, sessions).await?;
        let mut daemon = Tollgated::spawn(&pooler.url(&db), &["run"])?;
        let status = daemon.wait(SOON).with_context(|| format!("behind a pooler with {more:?}"))?;
        let log = daemon.log();
        assert_eq!(status.code(), Some(64), "{more}: {log}");
        assert!(
            log.contains("pooler in transaction mode") && log.contains("pool_mode=session"),
            "{more}: {log}"
        );
        assert_left_unchanged(&db, &pooler).await.context(more)?;
    }
    Ok(())
}

#[tokio::test]
async fn check_names_a_pooler_in_transaction_mode_and_leaves_it_as_it_was() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "pooled_check").await?;
    for (more, sessions) in TRANSACTION_POOLS {
        let pooler = PgBouncer::start(&db, "transaction", more)?;
        pooler.fill(&db, sessions).await?;
        let output = Tollgated::run(&pooler.url(&db), &["check", "--json"])?;
        assert_eq!(output.status.code(), Some(1), "{more}: {}", String::from_utf8_lossy(&output.stderr));
        let report: Value = serde_json::from_slice(&output.stdout)?;
        assert_eq!(report["ok"], json!(false), "{more}");
        let findings = report["findings"].as_array().context("findings")?;
        // A query through it might be answered by any session.
        assert_eq!(findings.len(), 1, "{more}: {report}");
        let found = &findings[0];
        assert_eq!(
            (&found["name"], &found["verdict"]),
            (&json!("pooler"), &json!("fail")),
            "{more}: {report}"
        );
        let text = found.to_string();
        assert!(
            text.contains("pooler in transaction mode") && text.contains("pool_mode=session"),
            "{more}: {text}"
        );
        assert_left_unchanged(&db, &pooler).await.context(more)?;
    }
    let pooler = PgBouncer::start(&db, "session", "")?;
    let output = Tollgated::run(&pooler.url(&db), &["check", "--json"])?;
    let report: Value = serde_json::from_slice(&output.stdout)?;
    let findings = report["findings"].as_array().context("findings")?;
    for name in ["pooler", "listen", "privileges"] {
        let found = findings.iter().find(|finding| finding["name"] == name);
        assert_eq!(found.map(|finding| &finding["verdict"]), Some(&json!("ok")), "{name}: {report}");
    }
    Ok(())
}

#[tokio::test]
async fn a_pooler_in_session_mode_is_as_good_as_none() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "pooled_session").await?;
    let pooler = PgBouncer::start(&db, "session", "")?;
    let daemon =
        Tollgated::spawn(&pooler.url(&db), &["run", "--publish-interval=24h", "--flush-interval=100ms"])?;
    let token = common::issue(&db.owner, "ann", &[]).await?;
    assert_eq!(common::code(&db.web, &token.token).await?, "VALID");
    eventually_async(SOON, "a flush", async || {
        operator::counts(&db.owner, token.id).await.is_ok_and(|counts| counts == (1, 0))
    })
    .await;
    eventually_async(SOON, "LISTEN", async || daemon.log().contains("listening")).await;
    assert!(common::revoke(&db.owner, token.id).await?);
    // Only a notification can have triggered it.
    eventually_async(SOON, "the revocation", async || daemon.log().contains("token.revoked")).await;
    Ok(())
}
