//! `tollgated run`: starts what runs in the background, waits for a reason to stop, and stops.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use tokio::signal::unix::{Signal as UnixSignal, SignalKind, signal};
use uuid::Uuid;

use crate::background::driver::{Driver, Schedule, TaskStatuses};
use crate::background::leader;
use crate::background::leader::Leadership;
use crate::background::leaderless::LeaderlessTasks;
use crate::background::listener;
use crate::background::shutdown::Shutdown;
use crate::background::signal::Signal;
use crate::background::tasks::observe::LatestObservation;
use crate::background::tasks::{
    announce_expiries, deliver_webhooks, expire_tokens, fetch_keys, flush_standby, flush_usage, heartbeat,
    lease_quotas, observe, publish_events, purge, purge_audit, rotate_keys, seal_audit, watch_usage,
};
use crate::config::{ListenAddress, RunOptions};
use crate::contract::Identity;
use crate::error::{Error, Result};
use crate::http;
use crate::http::{EventStreams, Gateway, Listener, Metrics, Rules, Server, wake_streams};
use crate::issuer_keys::Fetcher;
use crate::postgres::pool::Database;
use crate::postgres::pooler_probe;
use crate::postgres::target::Target;
use crate::process::{exit, systemd};
use crate::webhook::Sender;

/// A run has a few statements, each of which the server cancels at its statement_timeout. A run that takes longer than
/// these together waits for a server that will never answer.
fn run_limit(target: &Target) -> Duration {
    target.statement_timeout() * 4 + Duration::from_secs(30)
}

/// On several threads, so that serving HTTP never delays a task.
pub(super) fn run(target: Target, standbys: Vec<Target>, options: RunOptions) -> Result<u8> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(options.worker_threads.into())
        .enable_all()
        .build()
        .map_err(|error| Error::failed(format!("could not start the runtime: {error}")))?
        .block_on(serve(target, standbys, options))
}

async fn serve(target: Target, standbys: Vec<Target>, options: RunOptions) -> Result<u8> {
    // Before anything is started, so that no signal finds the default handler in place.
    let mut signals = Signals::install()?;
    let _pid_file = options.pid_file.as_deref().map(PidFile::write).transpose()?;
    announce(&target, &standbys, &options);

    let gateway = options.gateway.target()?;
    let limit = run_limit(&target);
    let every = |period| Schedule { period, limit };
    let ops = bind(Listener::Ops, options.ops_address, Rules::ops()).await?;
    let api = bind(Listener::Api, options.api_address, Rules::api(&options.api)).await?;
    let database_name = target.describe();
    let database = Database::new(target.clone())?;
    let shutdown = Shutdown::default();
    let leadership = Leadership::default();
    let statuses = TaskStatuses::new(leadership.clone());
    let driver = Driver::new(shutdown.clone(), statuses.clone(), options.shutdown_grace)
        .retry_when(database.restored())
        .with_schema_of(database.clone());
    let mut flush_now = vec![Signal::default()];
    let events_came = Signal::default();
    let streams_wake = Signal::default();
    let webhooks_wake = Signal::default();
    let look_now = Signal::default();
    let report = Signal::default();
    let batch_size = options.batch.batch_size;
    let audit_retention = options.retention.audit_retention.0;
    let seen = LatestObservation::default();
    let leaderless = LeaderlessTasks::default();

    // Before there is any connection to the database: /readyz says so.
    if let Some(server) = ops {
        let metrics = Metrics::new(
            statuses.clone(),
            seen.clone(),
            leaderless.clone(),
            database.clone(),
            options.key_rotation.0,
        );
        shutdown.spawn("ops", server.run(http::ops_router(metrics), shutdown.token().clone()));
    }
    if let Some(server) = api {
        let streams = Arc::new(EventStreams::new(database.clone(), shutdown.token().clone()));
        let gateway = match gateway {
            Some(target) => {
                let (gateway, run) =
                    Gateway::new(target, options.gateway.api_timeout, shutdown.token().clone())?;
                shutdown.spawn("verifier", run);
                Some(gateway)
            }
            None => {
                tracing::warn!(
                    "serving /events alone: the rest of the API needs a database login of its own, --api-database-url"
                );
                None
            }
        };
        let router = http::api_router(streams.clone(), gateway);
        shutdown.spawn("api", server.run(router, shutdown.token().clone()));
        shutdown
            .spawn("event_streams", wake_streams(streams, streams_wake.clone(), options.publish_interval));
    }
    // Before the first connection to the database, which may come up later; and until after the last flush, which may be slow
    // but must not hang.
    let _watchdog = systemd::ready(&format!("serving {database_name}"));
    tokio::select! {
        result = pooler_probe::refuse(&target, shutdown.token()) => result?,
        () = signals.until_stop(&shutdown, &flush_now) => {
            return Ok(stop(&shutdown, &mut signals, options.shutdown_grace).await);
        }
    }
    shutdown.spawn(
        "listener",
        listener::run(
            database.clone(),
            vec![events_came.clone(), streams_wake.clone(), webhooks_wake.clone()],
            (seen.clone(), look_now.clone()),
            shutdown.token().clone(),
        ),
    );
    driver.start(
        deliver_webhooks::DeliverWebhooks::new(
            database.clone(),
            Sender::new(&options.webhook_allow),
            batch_size,
            webhooks_wake.clone(),
            shutdown.token().clone(),
        ),
        every(options.publish_interval),
        webhooks_wake,
    );
    if !options.expiry_notice.is_zero() {
        driver.start_led(
            announce_expiries::AnnounceExpiries::new(
                database.clone(),
                leadership.clone(),
                options.expiry_notice,
                batch_size,
            ),
            every(announce_expiries::PERIOD.min(options.expire_interval * 12)),
            Signal::default(),
        );
    }
    driver.start_led(
        flush_usage::FlushUsage::new(database.clone(), leadership.clone()),
        every(options.flush_interval),
        flush_now[0].clone(),
    );
    for standby in standbys {
        let signal = Signal::default();
        flush_now.push(signal.clone());
        let server = standby.describe();
        // One for both, so that a standby that is out of reach is logged once.
        let standby = Database::new(standby)?;
        driver.start(
            flush_standby::FlushStandby::new(database.clone(), standby.clone(), &server),
            every(options.flush_interval),
            signal.clone(),
        );
        driver.start(
            lease_quotas::LeaseStandby::new(database.clone(), standby.clone(), &server),
            every(lease_quotas::PERIOD),
            Signal::default(),
        );
        driver.start(
            watch_usage::WatchUsage::of_standby(standby, server, signal),
            every(watch_usage::PERIOD),
            Signal::default(),
        );
    }
    driver.start(
        watch_usage::WatchUsage::new(database.clone(), flush_now[0].clone()),
        every(watch_usage::PERIOD),
        Signal::default(),
    );
    driver.start_led(
        lease_quotas::LeaseQuotas::new(database.clone(), leadership.clone()),
        every(lease_quotas::PERIOD),
        Signal::default(),
    );
    driver.start(
        publish_events::PublishEvents::new(database.clone(), options.subscription, batch_size),
        every(options.publish_interval),
        events_came,
    );
    driver.start_led(
        expire_tokens::ExpireTokens::new(database.clone(), leadership.clone(), batch_size),
        every(options.expire_interval),
        Signal::default(),
    );
    driver.start_led(
        purge::Purge::new(database.clone(), leadership.clone(), options.retention, batch_size),
        every(options.purge_interval),
        Signal::default(),
    );
    if let Some(retention) = audit_retention {
        driver.start_led(
            purge_audit::PurgeAudit::new(database.clone(), leadership.clone(), retention, batch_size),
            every(options.purge_interval),
            Signal::default(),
        );
    }
    if let Some(rotation) = options.key_rotation.0 {
        driver.start_led(
            rotate_keys::RotateKeys::new(database.clone(), leadership.clone(), rotation),
            every(rotate_keys::PERIOD),
            Signal::default(),
        );
    }
    driver.start_led(
        fetch_keys::FetchKeys::new(
            database.clone(),
            leadership.clone(),
            Fetcher::new(&options.issuer_networks.issuer_allow),
            seen.clone(),
            shutdown.token().clone(),
        ),
        every(fetch_keys::PERIOD),
        Signal::default(),
    );
    driver.start_led(
        seal_audit::SealAudit::new(database.clone(), leadership.clone(), batch_size),
        every(options.seal_interval),
        Signal::default(),
    );
    // After all tasks that a metric or /readyz may show.
    driver.start(observe::Observe::new(database.clone(), seen), every(observe::PERIOD), look_now);
    let leading = database.clone();
    driver.start(
        heartbeat::Heartbeat::new(database, identity(), statuses, leaderless),
        every(heartbeat::PERIOD),
        report.clone(),
    );
    // Last, when all tasks are registered for it.
    shutdown.spawn("leadership", leader::run(leading, leadership, report, shutdown.token().clone()));

    signals.until_stop(&shutdown, &flush_now).await;
    systemd::stopping();
    Ok(stop(&shutdown, &mut signals, options.shutdown_grace).await)
}

/// Waits for everything to end, and logs what did not.
async fn stop(shutdown: &Shutdown, signals: &mut Signals, grace: Duration) -> u8 {
    shutdown.begin();
    let abandoned = tokio::select! {
        drained = shutdown.drain(grace) => drained.err().map(|names| (names, "the grace is over")),
        name = signals.stop_signal() => {
            tracing::warn!(signal = name, "asked to stop again");
            shutdown.drain(Duration::ZERO).await.err().map(|names| (names, "asked to stop at once"))
        }
    };
    if let Some((names, why)) = &abandoned {
        tracing::error!(stuck = names.join(", "), "{why}: stopped without waiting for {}", names.join(", "));
    }
    if let Some(fault) = shutdown.fault() {
        tracing::error!("stopped because {fault}");
        return exit::FAULT;
    }
    if abandoned.is_some() {
        return exit::ABANDONED;
    }
    tracing::info!("stopped");
    exit::OK
}

/// Logs the settings, which explain the rest of the log.
fn announce(target: &Target, standbys: &[Target], options: &RunOptions) {
    let time = |duration| crate::process::duration::text(duration);
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        pid = std::process::id(),
        database = target.describe(),
        standbys = standbys.iter().map(Target::describe).collect::<Vec<_>>().join(" "),
        flush_interval = time(options.flush_interval),
        ops_address = %options.ops_address,
        api_address = %options.api_address,
        worker_threads = options.worker_threads,
        expiry_notice = time(options.expiry_notice),
        key_rotation = %options.key_rotation,
        expire_interval = time(options.expire_interval),
        purge_interval = time(options.purge_interval),
        retention = time(options.retention.retention),
        usage_retention = time(options.retention.usage_retention),
        audit_retention = %options.retention.audit_retention,
        publish_interval = time(options.publish_interval),
        seal_interval = time(options.seal_interval),
        subscription = options.subscription,
        batch_size = options.batch.batch_size,
        statement_timeout = time(target.statement_timeout()),
        shutdown_grace = time(options.shutdown_grace),
        "starting"
    );
    let plaintext: Vec<&str> =
        std::iter::once(target).chain(standbys).flat_map(Target::plaintext_hosts).collect();
    if !plaintext.is_empty() {
        tracing::warn!(
            "the connection to {} may go unencrypted: give sslmode=verify-full and sslrootcert in the connection string",
            plaintext.join(", ")
        );
    }
}

async fn bind(listener: Listener, address: ListenAddress, rules: Rules) -> Result<Option<Server>> {
    match address.0 {
        Some(address) => Server::bind(listener, address, rules).await.map(Some),
        None => Ok(None),
    }
}

fn identity() -> Identity {
    Identity {
        instance: Uuid::new_v4(),
        hostname: gethostname::gethostname().to_string_lossy().into_owned(),
        pid: i32::try_from(std::process::id()).unwrap_or_default(),
        started_at: Timestamp::now(),
    }
}

struct Signals {
    terminate: UnixSignal,
    interrupt: UnixSignal,
    user1: UnixSignal,
}

impl Signals {
    fn install() -> Result<Self> {
        let handler = |kind| {
            signal(kind)
                .map_err(|error| Error::failed(format!("could not install a signal handler: {error}")))
        };
        Ok(Self {
            terminate: handler(SignalKind::terminate())?,
            interrupt: handler(SignalKind::interrupt())?,
            user1: handler(SignalKind::user_defined1())?,
        })
    }

    /// Serves signals until one asks to stop or something has failed.
    async fn until_stop(&mut self, shutdown: &Shutdown, flush_now: &[Signal]) {
        loop {
            tokio::select! {
                _ = self.user1.recv() => {
                    tracing::info!(signal = "SIGUSR1", "flushing usage now");
                    flush_now.iter().for_each(Signal::wake);
                }
                _ = self.terminate.recv() => {
                    tracing::info!(signal = "SIGTERM", "stopping");
                    return;
                }
                _ = self.interrupt.recv() => {
                    tracing::info!(signal = "SIGINT", "stopping");
                    return;
                }
                () = shutdown.token().cancelled() => return,
            }
        }
    }

    async fn stop_signal(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

/// Removed when dropped, unless another process has put its own id there by then.
struct PidFile {
    path: PathBuf,
    content: String,
}

impl PidFile {
    fn write(path: &Path) -> Result<Self> {
        let content = format!("{}\n", std::process::id());
        // Written beside it and then renamed, so that a reader never sees half of it.
        let draft = path.with_extension(format!("{}.tmp", std::process::id()));
        fs::File::create(&draft)
            .and_then(|mut file| file.write_all(content.as_bytes()))
            .and_then(|()| fs::rename(&draft, path))
            .map_err(|error| {
                let _ = fs::remove_file(&draft);
                Error::usage(format!("could not write the --pid-file {}: {error}", path.display()))
            })?;
        Ok(Self { path: path.to_owned(), content })
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        if fs::read_to_string(&self.path).is_ok_and(|content| content == self.content) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("tollgated-{}-{name}", std::process::id()))
    }

    #[test]
    fn a_pid_file_holds_the_id_and_goes_with_the_process() {
        let path = place("own.pid");
        let file = PidFile::write(&path).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap().trim(), std::process::id().to_string());
        drop(file);
        assert!(!path.exists());
    }

    #[test]
    fn a_pid_file_of_a_successor_is_left_alone() {
        let path = place("successor.pid");
        let file = PidFile::write(&path).unwrap();
        fs::write(&path, "1\n").unwrap();
        drop(file);
        assert_eq!(fs::read_to_string(&path).unwrap(), "1\n");
        fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_pid_file_that_cannot_be_written_is_named() {
        let Err(error) = PidFile::write(Path::new("/nonexistent/dir/x.pid")) else { panic!("written") };
        assert!(error.message().contains("/nonexistent/dir/x.pid"), "{error}");
    }
}
