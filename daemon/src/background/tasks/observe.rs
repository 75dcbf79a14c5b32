//! Looks at the server's counters every few seconds, for `/metrics` and `/readyz`: they answer from memory, so that neither
//! many scrapers nor a server that hangs can do harm.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::background::driver::{Report, Task};
use crate::contract;
use crate::contract::Observation;
use crate::error::Result;
use crate::postgres::pool::Database;

pub const PERIOD: Duration = Duration::from_secs(5);

/// The last observation; nothing while the server is out of reach.
#[derive(Clone, Debug, Default)]
pub struct LatestObservation(Arc<Mutex<Option<Arc<Observation>>>>);

impl LatestObservation {
    pub fn last(&self) -> Option<Arc<Observation>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// To be called when the server is known to be gone.
    pub fn forget(&self) {
        self.put(None);
    }

    fn put(&self, observation: Option<Observation>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = observation.map(Arc::new);
    }
}

#[derive(Debug)]
pub struct Observe {
    database: Database,
    seen: LatestObservation,
}

impl Observe {
    pub fn new(database: Database, seen: LatestObservation) -> Self {
        Self { database, seen }
    }
}

impl Task for Observe {
    fn name(&self) -> &'static str {
        "observe"
    }

    async fn run(&mut self, stop: &CancellationToken) -> Result<Report> {
        // A run that is cut short, because the server does not answer, must leave nothing behind.
        let last = self.seen.last();
        let looked = tokio::time::timeout(PERIOD, async {
            let session = self.database.session(stop).await?;
            contract::observe(&**session).await
        })
        .await
        .unwrap_or_else(|_| {
            Err(crate::error::Error::failed("could not read the server's counters: no answer in time"))
        });
        match looked {
            Ok(observation) => {
                if last.is_none() {
                    tracing::info!("ready");
                }
                self.seen.put(Some(observation));
                Ok(Report { items: 1, ..Report::default() })
            }
            Err(error) => {
                self.seen.forget();
                Err(error)
            }
        }
    }
}
