//! `tollgated tail --follow` as a child process whose lines are read as they arrive.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::time::{Instant, timeout_at};
use uuid::Uuid;

/// The child process ends when this is dropped.
pub(crate) struct Tail {
    child: Child,
    lines: UnboundedReceiver<String>,
}

impl Tail {
    /// Follows the events after the one with this id, so that none is missed while the child starts.
    pub(crate) fn follow(since: i64) -> Result<Self> {
        let mut child = crate::tollgated()
            .args(["tail", "--follow", "--since", &since.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context(crate::NO_TOLLGATED)?;
        let stdout = child.stdout.take().context("standard output is a pipe")?;
        let (sender, lines) = unbounded_channel();
        // Ends when the child does, or when the receiver was dropped.
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Ok(Self { child, lines })
    }

    /// The next event of this kind about this token, with its line.
    pub(crate) async fn event(
        &mut self,
        kind: &str,
        token: Uuid,
        within: Duration,
    ) -> Result<(Value, String)> {
        let deadline = Instant::now() + within;
        loop {
            let line = match timeout_at(deadline, self.lines.recv()).await {
                Ok(Some(line)) => line,
                Ok(None) => bail!("tollgated tail ended: {}", self.child.wait()?),
                Err(_) => bail!("tollgated tail did not print {kind} of token {token} within {within:?}"),
            };
            let event: Value = serde_json::from_str(&line)
                .with_context(|| format!("tollgated tail printed no JSON: {line}"))?;
            if event["event"] == kind && event["token_id"] == token.to_string() {
                return Ok((event, line));
            }
        }
    }
}

impl Drop for Tail {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
