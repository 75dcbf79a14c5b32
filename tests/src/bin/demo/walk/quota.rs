//! The step with a quota: spent, leased again by the daemon, used up.

use std::time::Instant;

use anyhow::{Context as _, Result};

use super::{ANN, DAEMON_DEADLINE, PAUSE, READ, Request, Walk, answer};

const SET: &str =
    "select tollgate.set_quota($1, amount => 6, per => 'month', time_zone => 'America/New_York', lease => 2)";
const LEFT: &str = "select used, remaining, resets_at::text from tollgate.token_quota($1)";

impl Walk<'_> {
    pub(super) async fn spend_a_quota(&mut self) -> Result<()> {
        self.report.step(
            "A quota: six uses a month, of which the server's memory spends two at a time, and the daemon leases more",
            &[SET, super::VERIFY, LEFT],
        );
        let token = self.create(ANN, "metered", &[READ], None, None).await?;
        self.owner.execute(SET, &[&token.id]).await?;
        let deadline = Instant::now() + DAEMON_DEADLINE;
        let mut used = 0;
        while used < 6 && Instant::now() < deadline {
            match answer(&self.app, &token.secret, &Request::default()).await?.0.as_str() {
                "VALID" => used += 1,
                _ => tokio::time::sleep(PAUSE).await,
            }
        }
        self.report.check("uses, as fast as the daemon leases them", 6, used);
        let (code, _) = answer(&self.app, &token.secret, &Request::default()).await?;
        self.report.check("one more", "QUOTA_EXCEEDED", code);
        let row = self.owner.query_one(LEFT, &[&token.id]).await?;
        let (used, remaining): (i64, i64) = (row.get(0), row.get(1));
        self.report.check("what the quota says", "6 used, 0 left", format!("{used} used, {remaining} left"));
        let resets: Option<String> = row.get(2);
        self.report.aside(format!("It begins anew at {}.", resets.context("a month ends")?));
        Ok(())
    }
}
