//! The network fails silently, and the primary is replaced by its standby: the daemon recovers and neither loses nor
//! skips an event.

use crate::common;
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use crate::operator::{self, Db};
use anyhow::Result;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tollgate_tests::{Cluster, DATABASE, Tollgated, eventually_async};

const SOON: Duration = Duration::from_secs(60);
const CUT: Duration = Duration::from_secs(30);
/// The time within which the daemon must be back after the repair.
const RECOVERY: Duration = Duration::from_secs(10);

const EAGER: [&str; 6] = [
    "run",
    "--log-format=json",
    "--flush-interval=200ms",
    "--expire-interval=200ms",
    "--publish-interval=200ms",
    "--shutdown-grace=5s",
];

/// A network path that can go dead: connections stay open, new ones are accepted, and no byte passes. After the repair
/// only new ones work, as behind a replaced router.
struct Path {
    address: SocketAddr,
    /// Incremented at every cut and repair; odd during a cut.
    state: watch::Sender<u64>,
}

impl Path {
    async fn to(server: u16) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let path = Self { address: listener.local_addr()?, state: watch::Sender::new(0) };
        let state = path.state.clone();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let state = state.subscribe();
                tokio::spawn(async move {
                    let Ok(server) = TcpStream::connect(("127.0.0.1", server)).await else { return };
                    let (client_in, client_out) = client.into_split();
                    let (server_in, server_out) = server.into_split();
                    tokio::join!(
                        forward(client_in, server_out, state.clone()),
                        forward(server_in, client_out, state)
                    );
                });
            }
        });
        Ok(path)
    }

    fn cut(&self) {
        self.state.send_modify(|state| *state += 1);
    }

    fn repair(&self) {
        self.cut();
    }
}

/// Forwards bytes until the first cut, then holds both ends open and silent for ever.
async fn forward(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    mut state: watch::Receiver<u64>,
) {
    let works = state.borrow_and_update().is_multiple_of(2);
    if works {
        let mut buffer = vec![0; 16 * 1024];
        loop {
            tokio::select! {
                biased;
                _ = state.changed() => break,
                read = from.read(&mut buffer) => match read {
                    Ok(length @ 1..) if to.write_all(&buffer[..length]).await.is_ok() => {}
                    _ => return,
                },
            }
        }
    }
    std::future::pending::<()>().await;
}

fn published(daemon: &Tollgated) -> Vec<i64> {
    let log = daemon.log();
    // A line that is still being written is not JSON yet.
    let lines = log.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    lines.filter(|line| line["target"] == "tollgate::events").filter_map(|line| line["id"].as_i64()).collect()
}

async fn logged(client: &tokio_postgres::Client) -> Result<BTreeSet<i64>> {
    let rows = client.query("select id from tollgate.audit_log", &[]).await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

async fn subscribed(owner: &tokio_postgres::Client, name: &str) -> bool {
    let found = owner.query("select 1 from tollgate.subscriptions where name = $1", &[&name]).await;
    found.is_ok_and(|rows| rows.len() == 1)
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "long: the network is cut for 30 s"]
async fn it_recovers_soon_after_a_cut_that_left_connections_half_open() -> Result<()> {
    let cluster = Arc::new(common::start(Cluster::builder())?);
    let db = Db::only(&cluster).await?;
    let path = Path::to(cluster.port()).await?;
    let url = format!("postgresql://{}@{}/{DATABASE}", operator::OPERATOR, path.address);
    let daemon = Tollgated::spawn(&url, &[&EAGER[..], &["--subscription=cut"]].concat())?;
    let token = common::issue(&db.owner, "ann", &[]).await?;
    assert_eq!(common::code(&db.web, &token.token).await?, "VALID");
    eventually_async(SOON, "the first flush", async || {
        operator::counts(&db.owner, token.id).await.is_ok_and(|counts| counts == (1, 0))
    })
    .await;
    eventually_async(SOON, "LISTEN", async || daemon.log().contains("listening")).await;
    // A new subscription starts with what happens from then on.
    eventually_async(SOON, "the subscription", async || subscribed(&db.owner, "cut").await).await;
    let earlier = logged(&db.owner).await?;
    path.cut();
    let end = tokio::time::Instant::now() + CUT;
    for _ in 0..20 {
        assert_eq!(common::code(&db.web, &token.token).await?, "VALID");
        let other = common::issue(&db.owner, "bob", &[]).await?;
        assert!(common::revoke(&db.owner, other.id).await?);
    }
    // The cut itself is tested; nothing is waited for meanwhile.
    tokio::time::sleep_until(end).await;
    path.repair();
    eventually_async(RECOVERY, "the recovery", async || {
        operator::counts(&db.owner, token.id).await.is_ok_and(|counts| counts == (21, 0))
    })
    .await;
    let expected: BTreeSet<i64> = logged(&db.owner).await?.difference(&earlier).copied().collect();
    assert_eq!(expected.len(), 40);
    eventually_async(RECOVERY, "all events", async || {
        expected.is_subset(&published(&daemon).into_iter().collect())
    })
    .await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn it_follows_a_promoted_standby_and_skips_no_event() -> Result<()> {
    let mut primary = common::start(Cluster::builder())?;
    operator::grant(&primary, DATABASE)?;
    let owner = primary.connect("postgres", DATABASE).await?;
    let standby = primary.standby()?;
    let url = format!(
        "postgresql://{}@127.0.0.1:{},127.0.0.1:{}/{DATABASE}",
        operator::OPERATOR,
        standby.port(),
        primary.port()
    );
    // Although the standby is listed first, the primary is served.
    let mut daemon = Tollgated::spawn(&url, &[&EAGER[..], &["--subscription=follow"]].concat())?;
    // A new subscription starts with what happens from then on.
    eventually_async(SOON, "the subscription", async || subscribed(&owner, "follow").await).await;
    let earlier = logged(&owner).await?;
    for _ in 0..10 {
        let token = common::issue(&owner, "ann", &[]).await?;
        assert!(common::revoke(&owner, token.id).await?);
    }
    let before = logged(&owner).await?;
    standby.catch_up_with(&primary)?;
    primary.stop_immediately()?;
    standby.promote()?;
    let owner = standby.connect("postgres", DATABASE).await?;
    for _ in 0..10 {
        let token = common::issue(&owner, "bob", &[]).await?;
        assert!(common::revoke(&owner, token.id).await?);
    }
    let after = logged(&owner).await?;
    assert!(after.len() >= before.len() + 20 && before.is_subset(&after));
    let expected: BTreeSet<i64> = after.difference(&earlier).copied().collect();
    eventually_async(SOON, "all events of both", async || {
        expected.is_subset(&published(&daemon).into_iter().collect())
    })
    .await;
    daemon.terminate()?;
    assert!(daemon.wait(SOON)?.success(), "{}", daemon.log());
    Ok(())
}
