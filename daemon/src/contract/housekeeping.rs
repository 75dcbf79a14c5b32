//! What is due by time, dealt with in steps.

use postgres_types::ToSql;
use tokio_postgres::{GenericClient, Statement};
use uuid::Uuid;

use super::leadership::{Fence, fenced};
use super::query::unsigned;
use crate::error::{Doing as _, Result};

/// What is gone through from the front of an index on, a few rows a statement, because it is due by now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Due {
    Expiries,
    Announcements,
    SessionAnnouncements,
    EndedTokens,
    EndedSessions,
    UsageHours,
    UserUsage,
    WebhookDeliveries,
    Denials,
    UsedUrls,
}

/// A statement that deals with some of [`Due`].
#[derive(Clone, Debug)]
pub struct Walk {
    statement: Statement,
    function: &'static str,
    doing: &'static str,
}

/// Which row was looked at last, in the order of its index. The time is as the server wrote it: it may be infinite. The id is
/// that of a token, of a session, or under which a user's usage is counted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    at: Option<String>,
    id: Option<Uuid>,
}

/// What one statement did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Step {
    /// Fewer than were asked for only at the end.
    pub looked_at: u64,
    pub items: u64,
    pub place: Place,
}

impl Walk {
    pub async fn prepare(client: &impl GenericClient, fence: Option<&Fence>, what: Due) -> Result<Self> {
        let (function, time, done, doing) = match what {
            Due::Expiries => ("expire_tokens_after", "expires_at", "expired", "record expiries"),
            Due::Announcements => ("announce_expiries_after", "expires_at", "announced", "announce expiries"),
            Due::SessionAnnouncements => ("announce_session_expiries", "", "", "announce ends of sessions"),
            Due::EndedSessions => ("purge_sessions_after", "", "", "delete ended sessions"),
            Due::EndedTokens => ("purge_tokens_after", "ended_at", "purged", "delete ended tokens"),
            Due::UsageHours => ("purge_usage_after", "hour", "purged", "delete old hours of usage"),
            Due::UserUsage => ("purge_user_usage_after", "", "", "delete old usage of users"),
            Due::WebhookDeliveries => ("purge_webhook_deliveries", "", "", "delete old webhook messages"),
            Due::Denials => ("purge_denials", "", "", "delete revocations that no access token outlives"),
            Due::UsedUrls => ("purge_used_urls", "", "", "delete uses of signed URLs that are over"),
        };
        // Called in a SELECT without FROM, for the fence; OFFSET keeps that a sub-select, so that it is called once.
        let call = match what {
            Due::Expiries => format!("select tollgate.{function}($2, $3::text::timestamptz, $4), $1::float8"),
            Due::WebhookDeliveries | Due::SessionAnnouncements => {
                format!("select tollgate.{function}(make_interval(secs => $1), $2)")
            }
            Due::EndedSessions | Due::UserUsage => {
                format!("select tollgate.{function}(make_interval(secs => $1), $2, $4)")
            }
            Due::Denials | Due::UsedUrls => format!("select tollgate.{function}($2), $1::float8"),
            _ => format!(
                "select tollgate.{function}(make_interval(secs => $1), $2, $3::text::timestamptz, $4)"
            ),
        };
        let columns = match what {
            // They leave none behind.
            Due::WebhookDeliveries | Due::SessionAnnouncements | Due::Denials | Due::UsedUrls => {
                "s.r, s.r, $3::text, $4::uuid".to_owned()
            }
            // In the order of their ids.
            Due::EndedSessions => "(s.r).looked_at, (s.r).purged, $3::text, (s.r).session_id".to_owned(),
            Due::UserUsage => "(s.r).looked_at, (s.r).purged, $3::text, (s.r).usage_id".to_owned(),
            _ => format!("(s.r).looked_at, (s.r).{done}, (s.r).{time}::text, (s.r).token_id"),
        };
        let statement = format!("select {columns} from ({} offset 0) s (r)", fenced(&call, fence));
        Ok(Self { statement: client.prepare(&statement).await.doing(doing)?, function, doing })
    }

    /// Looks at up to `most` after a place, and deals with those that are due. The time is what they are kept for after they
    /// ended, or how long before their end they are announced.
    pub async fn step(
        &self,
        client: &impl GenericClient,
        time: std::time::Duration,
        most: i32,
        place: &Place,
    ) -> Result<Step> {
        let seconds = time.as_secs_f64();
        let values: [&(dyn ToSql + Sync); 4] = [&seconds, &most, &place.at, &place.id];
        let row = client.query_one(&self.statement, &values).await.doing(self.doing)?;
        let count = |column| unsigned(self.function, row.try_get(column).doing(self.doing)?);
        Ok(Step {
            looked_at: count(0)?,
            items: count(1)?,
            place: Place { at: row.try_get(2).doing(self.doing)?, id: row.try_get(3).doing(self.doing)? },
        })
    }
}
