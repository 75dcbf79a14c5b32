//! Leases more of a quota before a server has used up what it was leased.
//!
//! A verification cannot send a notification, so the servers are asked, often: the primary by the leader, in one call that
//! also grants what it asks for, and each standby by every daemon, which carries the requests to the primary. Nothing is
//! acknowledged: a request that gets lost is made again by a later use, and one that was granted is void.

use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::background::driver::{Report, Task};
use crate::background::leader::Leadership;
use crate::contract;
use crate::error::Result;
use crate::postgres::pool::{Database, OwnSession};
use crate::process::counters;

pub const PERIOD: Duration = Duration::from_millis(200);
/// How often a server is to forget quotas that were removed.
const SWEEP: Duration = Duration::from_secs(600);

#[derive(Debug)]
pub struct LeaseQuotas {
    session: OwnSession,
    leadership: Leadership,
    swept: Option<Instant>,
}

impl LeaseQuotas {
    pub fn new(database: Database, leadership: Leadership) -> Self {
        Self { session: OwnSession::new(database), leadership, swept: None }
    }
}

impl Task for LeaseQuotas {
    fn name(&self) -> &'static str {
        "lease_quotas"
    }

    async fn run(&mut self, stop: &CancellationToken) -> Result<Report> {
        let fence = self.leadership.own_fence(self.name())?;
        let session = self.session.take(stop).await?;
        let leased = contract::lease_quotas(&*session, Some(&fence), None).await?;
        if is_due(&mut self.swept) {
            contract::forget_removed_quotas(&*session).await?;
        }
        self.session.give_back(session);
        counters::QUOTAS_LEASED.add(leased);
        Ok(Report { items: leased, ..Report::default() })
    }
}

/// The same for a standby.
#[derive(Debug)]
pub struct LeaseStandby {
    name: &'static str,
    primary: Database,
    standby: OwnSession,
    swept: Option<Instant>,
}

impl LeaseStandby {
    /// `server` names the standby.
    pub fn new(primary: Database, standby: Database, server: &str) -> Self {
        let name = super::name_at("lease_quotas", server);
        Self { name, primary, standby: OwnSession::new(standby), swept: None }
    }
}

impl Task for LeaseStandby {
    fn name(&self) -> &'static str {
        self.name
    }

    async fn run(&mut self, stop: &CancellationToken) -> Result<Report> {
        let standby = self.standby.take(stop).await?;
        let requests = contract::drain_lease_requests(&*standby).await?;
        if is_due(&mut self.swept) {
            contract::forget_removed_quotas(&*standby).await?;
        }
        self.standby.give_back(standby);
        let Some(requests) = requests else { return Ok(Report::default()) };
        let primary = self.primary.session(stop).await?;
        let leased = contract::lease_quotas(&**primary, None, Some(&requests)).await?;
        counters::QUOTAS_LEASED.add(leased);
        Ok(Report { items: leased, ..Report::default() })
    }
}

fn is_due(last: &mut Option<Instant>) -> bool {
    let is_due = last.is_none_or(|last| last.elapsed() >= SWEEP);
    if is_due {
        *last = Some(Instant::now());
    }
    is_due
}
