//! The harness of the tests of the installed extension and of the daemon, and of `make up`: real PostgreSQL servers in
//! directories of their own, and real `tollgated` processes.
//!
//! ```no_run
//! # use std::time::Duration;
//! use tollgate_tests::{Cluster, DATABASE, Tollgated, eventually};
//!
//! # #[tokio::main] async fn main() -> anyhow::Result<()> {
//! // Preloaded, with the extension created in the database `postgres`. Gone when dropped, also in a panic.
//! let mut cluster = Cluster::start()?;
//! cluster.execute(DATABASE, "create role web login; grant usage on schema tollgate to web")?;
//!
//! let web = cluster.connect("web", DATABASE).await?; // a tokio_postgres::Client, over the Unix socket
//! web.query_one("select tollgate.current_user_id()", &[]).await?;
//!
//! let daemon = Tollgated::spawn(&cluster.url("postgres", DATABASE), &["run"])?;
//! cluster.crash()?; // SIGKILL to the postmaster and all its children
//! cluster.restart()?; // on the same port
//! eventually(Duration::from_secs(10), "the daemon to reconnect", || daemon.log().contains("reconnected"));
//!
//! let standby = cluster.standby()?; // a hot standby, streaming
//! standby.catch_up_with(&cluster)?;
//! # Ok(()) }
//! ```
//!
//! Rules for tests:
//! - A test does not choose the PostgreSQL or the daemon: `make test` sets them in the environment ([`PG_CONFIG_VAR`],
//!   [`OLDER_PG_CONFIG_VAR`], [`TOLLGATED_VAR`]), and runs everything once for each server version.
//! - Wait with [`eventually`] or [`eventually_async`] for a condition; never sleep for luck.
//! - Security is tested as an ordinary role: neither grants nor row security restrict a superuser.
//! - A cluster costs about half a second. Tests that neither stop, crash nor configure theirs share one per file
//!   (`tests/tests/it/common`), and use users and roles of their own.

mod account;
mod cluster;
mod dev_dir;
mod install;
mod port;
mod server;
mod tollgated;
mod wait;

pub use account::Account;
pub use cluster::{Builder, Cluster, DATABASE, MASTER_KEY};
pub use dev_dir::{DEV_DIR_VAR, dev_dir};
pub use install::{Install, OLDER_PG_CONFIG_VAR, PG_CONFIG_VAR};
pub use port::Port;
pub use server::{Server, Shutdown, is_alive, stop_data_dir};
pub use tollgated::{TOLLGATED_VAR, Tollgated};
pub use wait::{eventually, eventually_async};
