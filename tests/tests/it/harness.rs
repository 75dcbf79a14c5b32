//! The harness itself: every other test relies on these.

use std::time::Duration;

use anyhow::Result;
use tollgate_tests::{Cluster, DATABASE, eventually};

use crate::common::{Shared, World};

fn plain() -> Result<Cluster> {
    Cluster::builder().preload(false).extension(false).start()
}

#[tokio::test]
async fn a_cluster_keeps_its_data_and_its_port_through_a_stop_and_a_crash() -> Result<()> {
    let mut cluster = plain()?;
    let port = cluster.port();
    cluster
        .execute(DATABASE, "create role web login; create table kept (n int); grant all on kept to web")?;

    cluster.connect("web", DATABASE).await?.batch_execute("insert into kept values (1)").await?;
    cluster.stop()?;
    assert!(cluster.connect("web", DATABASE).await.is_err(), "a stopped server takes no connection");
    cluster.restart()?;
    cluster.connect("web", DATABASE).await?.batch_execute("insert into kept values (2)").await?;
    cluster.crash()?;
    assert!(cluster.connect("web", DATABASE).await.is_err(), "a crashed server takes no connection");
    cluster.restart()?;

    assert_eq!(cluster.value(DATABASE, "select sum(n) from kept")?.as_deref(), Some("3"));
    assert_eq!(cluster.port(), port);
    assert!(cluster.log().contains("was not properly shut down"), "{}", cluster.log());
    Ok(())
}

#[tokio::test]
async fn a_shared_cluster_runs_as_long_as_a_connection_to_it_is_kept() -> Result<()> {
    static SHARED: Shared = Shared::new(&[]);
    let World { owner, .. } = SHARED.world().await?;
    owner.batch_execute("select 1").await?;
    let data = SHARED.cluster()?.data_dir().to_owned();
    assert!(data.exists());
    drop(owner);
    assert!(!data.exists(), "the last connection stops it");
    Ok(())
}

#[tokio::test]
async fn a_standby_streams_and_can_be_promoted() -> Result<()> {
    let mut primary = plain()?;
    let standby = primary.standby()?;
    primary.execute(DATABASE, "create table seen as select 1 as n")?;
    standby.catch_up_with(&primary)?;
    assert_eq!(standby.value(DATABASE, "select n from seen")?.as_deref(), Some("1"));
    assert!(standby.execute(DATABASE, "insert into seen values (2)").is_err(), "a standby is read only");

    primary.stop()?;
    standby.promote()?;
    standby.execute(DATABASE, "insert into seen values (2)")
}

#[test]
fn settings_apply_at_a_reload_or_at_a_restart() -> Result<()> {
    let mut cluster =
        Cluster::builder().preload(false).extension(false).setting("work_mem", "5MB").start()?;
    assert_eq!(cluster.value(DATABASE, "show work_mem")?.as_deref(), Some("5MB"));
    cluster.configure("work_mem", "6MB")?;
    eventually(Duration::from_secs(10), "the reload", || {
        cluster.value(DATABASE, "show work_mem").is_ok_and(|value| value.as_deref() == Some("6MB"))
    });
    cluster.configure("max_connections", "17")?;
    cluster.restart()?;
    assert_eq!(cluster.value(DATABASE, "show max_connections")?.as_deref(), Some("17"));
    Ok(())
}

#[test]
fn a_dropped_cluster_leaves_neither_a_process_nor_a_file() -> Result<()> {
    let cluster = plain()?;
    let pid_file = std::fs::read_to_string(cluster.data_dir().join("postmaster.pid"))?;
    let pid = pid_file.lines().next().unwrap_or_default().parse()?;
    let data = cluster.data_dir().to_owned();
    drop(cluster);
    assert!(!tollgate_tests::is_alive(nix::unistd::Pid::from_raw(pid)));
    assert!(!data.exists());
    Ok(())
}

#[test]
#[should_panic(expected = "waited 100ms in vain for the impossible")]
fn a_failed_wait_says_what_it_waited_for() {
    eventually(Duration::from_millis(100), "the impossible", || false);
}
