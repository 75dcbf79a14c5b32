//! Fetches the keys of trusted issuers. The database decides when: once an issuer is trusted, when its keys are as old as it says
//! that they may become, when a token names a key that is not known, and some time after a failure, longer each time.
//!
//! Each issuer is asked beside the task's runs: so one that is slow or dead delays no other.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::task::{AbortHandle, JoinSet};
use tokio_util::sync::CancellationToken;

use super::observe::LatestObservation;
use crate::app::issuers;
use crate::app::issuers::Outcome;
use crate::background::driver::{Report, Task};
use crate::background::leader::Leadership;
use crate::contract;
use crate::contract::{DueIssuer, Fence};
use crate::error::Result;
use crate::issuer_keys::Fetcher;
use crate::postgres::pool::Database;
use crate::process::counters;

pub const PERIOD: Duration = Duration::from_secs(1);
/// The rest waits for the next run.
const AT_ONCE: usize = 16;
/// When the database has recorded nothing, the issuer is due still, and must not be asked each second.
const PAUSE: Duration = Duration::from_secs(30);

#[derive(Debug)]
pub struct FetchKeys {
    database: Database,
    leadership: Leadership,
    fetcher: Fetcher,
    seen: LatestObservation,
    stop: CancellationToken,
    /// By issuer.
    running: BTreeMap<String, AbortHandle>,
    fetches: JoinSet<()>,
}

impl FetchKeys {
    pub fn new(
        database: Database,
        leadership: Leadership,
        fetcher: Fetcher,
        seen: LatestObservation,
        stop: CancellationToken,
    ) -> Self {
        let (running, fetches) = (BTreeMap::new(), JoinSet::new());
        Self { database, leadership, fetcher, seen, stop, running, fetches }
    }

    fn start(&mut self, due: DueIssuer, fence: Fence) {
        let (database, fetcher, stop) = (self.database.clone(), self.fetcher.clone(), self.stop.clone());
        let issuer = due.issuer.clone();
        let fetch = async move {
            match fetch(&database, &fetcher, &due, &fence).await {
                Ok(outcome) => note(&due, &outcome),
                Err(error) => {
                    tracing::warn!(issuer = due.issuer, %error, "what came of fetching the keys of an issuer was not recorded");
                    tokio::select! {
                        () = stop.cancelled() => {}
                        () = tokio::time::sleep(PAUSE) => {}
                    }
                }
            }
        };
        self.running.insert(issuer, self.fetches.spawn(fetch));
    }
}

async fn fetch(database: &Database, fetcher: &Fetcher, due: &DueIssuer, fence: &Fence) -> Result<Outcome> {
    let fetched = issuers::fetch(fetcher, due).await;
    // Also while stopping: what was fetched is stored.
    let session = database.session(&CancellationToken::new()).await?;
    issuers::record(&**session, Some(fence), &due.issuer, due.jwks_url.as_deref(), fetched).await
}

fn note(due: &DueIssuer, outcome: &Outcome) {
    let (issuer, why) = (due.issuer.as_str(), due.reason.as_str());
    if outcome.keys.is_some() {
        counters::KEYS_FETCHED.add(1);
        tracing::info!(issuer, why, "fetched the keys of an issuer: {outcome}");
    } else {
        counters::KEY_FETCHES_FAILED.add(1);
        tracing::warn!(issuer, why, "could not fetch the keys of an issuer: {outcome}");
    }
}

impl Task for FetchKeys {
    fn name(&self) -> &'static str {
        "fetch_keys"
    }

    async fn run(&mut self, stop: &CancellationToken) -> Result<Report> {
        while self.fetches.try_join_next().is_some() {}
        self.running.retain(|_, fetch| !fetch.is_finished());
        let fence = self.leadership.own_fence(self.name())?;
        let session = self.database.session(stop).await?;
        // Not by trying, which the server would log as an error each second.
        if !contract::may_fetch_keys(&**session).await? {
            let is_needed = self.seen.last().is_some_and(|seen| seen.issuers.iter().any(|i| i.is_fetched));
            let note = is_needed.then(|| "the role lacks the capability key_fetcher".to_owned());
            return Ok(Report { note, ..Report::default() });
        }
        let due = contract::issuers_due(&**session).await?;
        drop(session);
        let mut items = 0;
        for due in due {
            if self.running.len() < AT_ONCE && !self.running.contains_key(&due.issuer) {
                self.start(due, fence);
                items += 1;
            }
        }
        Ok(Report { items, ..Report::default() })
    }

    async fn finish(&mut self) -> Result<Option<Report>> {
        // Each ends within its deadline.
        while self.fetches.join_next().await.is_some() {}
        Ok(None)
    }
}
