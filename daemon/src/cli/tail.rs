//! `tollgated tail`: prints events, one JSON object a line.
//!
//! The place in the log lives as long as the process, so a lost connection neither loses nor repeats an event.

use std::io::{self, Write};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use serde::Serialize;
use serde_json::value::RawValue;

use crate::app::events::Follower;
use crate::background::backoff;
use crate::background::listener;
use crate::cli::output;
use crate::config::TailOptions;
use crate::contract::Event;
use crate::error::{Error, Kind, Result};
use crate::postgres::session::Session;
use crate::postgres::target::Target;
use crate::process::exit;
use crate::process::failure_log::FailureLog;

/// Not every event is notified, so the log is looked at this often.
const POLL_PERIOD: Duration = Duration::from_secs(1);

pub(super) async fn tail(target: Target, options: TailOptions) -> Result<u8> {
    tokio::select! {
        result = print(&target, &options) => result.map(|()| exit::OK),
        () = reader_is_gone() => Ok(exit::OK),
    }
}

async fn print(target: &Target, options: &TailOptions) -> Result<()> {
    let mut session = target.connect().await?;
    let mut log = Follower::begin(&*session, begin(options), options.batch.batch_size).await?;
    if !options.follow {
        while !print_page(&session, &mut log).await? {}
        return Ok(());
    }
    let mut failures = FailureLog::default();
    let mut retries = backoff::delays();
    loop {
        let error = match follow(&mut session, &mut log, &mut failures).await {
            Err(error) if error.kind() == Kind::ConnectionLost => error,
            Err(error) => return Err(error),
            Ok(never) => match never {},
        };
        log_failure(&mut failures, &error);
        session = loop {
            tokio::time::sleep(retries.next_delay()).await;
            match target.connect().await {
                Ok(session) => break session,
                Err(error) => log_failure(&mut failures, &error),
            }
        };
        retries = backoff::delays();
    }
}

/// Where reading begins, as `event_position` takes it: after an event, or with the last events of so many.
fn begin(options: &TailOptions) -> Option<i64> {
    match (options.since, options.last) {
        (Some(id), _) => Some(id),
        (None, 0) => None,
        (None, last) => Some(-last),
    }
}

fn log_failure(failures: &mut FailureLog, error: &Error) {
    if let Some(tally) = failures.failed(&error.to_string()) {
        tracing::warn!(failures = tally.failures, "{error}; trying again, and continuing where it stopped");
    }
}

/// Prints what comes until the connection is lost.
async fn follow(
    session: &mut Session,
    log: &mut Follower,
    failures: &mut FailureLog,
) -> Result<std::convert::Infallible> {
    let mut listens = match listener::begin(session).await {
        Ok(()) => true,
        Err(error) if error.kind() == Kind::ConnectionLost => return Err(error),
        Err(error) => {
            tracing::warn!(%error, "cannot be notified of events; looking for them every second instead");
            false
        }
    };
    if let Some(tally) = failures.recovered() {
        tracing::info!(failures = tally.failures, "connected again");
    }
    loop {
        while !print_page(session, log).await? {}
        tokio::select! {
            notification = session.notification(), if listens => listens = notification.is_some(),
            () = tokio::time::sleep(POLL_PERIOD) => {}
        }
    }
}

/// True once there is nothing more.
async fn print_page(session: &Session, log: &mut Follower) -> Result<bool> {
    let page = log.read(&**session).await?;
    write_lines(io::stdout().lock(), &page.events)?;
    Ok(log.pass(page))
}

/// The documented keys, in the documented order.
#[derive(Serialize)]
struct Line<'a> {
    id: i64,
    epoch: Option<i64>,
    at: Option<&'a str>,
    event: Option<&'a str>,
    token_id: Option<&'a str>,
    user_id: Option<&'a str>,
    actor: Option<&'a str>,
    reason: &'a RawValue,
    detail: &'a RawValue,
}

fn write_lines(mut out: impl Write, events: &[Event]) -> Result<()> {
    let mut text = String::new();
    for event in events {
        let line = Line {
            id: event.id,
            epoch: event.epoch,
            at: event.at.as_deref(),
            event: event.event.as_deref(),
            token_id: event.token_id.as_deref(),
            user_id: event.user_id.as_deref(),
            actor: event.actor.as_deref(),
            reason: &event.reason,
            detail: &event.detail,
        };
        text.push_str(&output::json_line(&line)?);
    }
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(Error::output)
}

/// Resolves when the reader of our output has closed its end: without this, `tail --follow | head -1` would hang until
/// the next event. Never resolves if standard output is no pipe.
async fn reader_is_gone() {
    let (sender, gone) = tokio::sync::oneshot::channel();
    // poll(2) reports errors and hang-ups whether or not they are asked for, so nothing else is. It blocks, so it has a
    // thread, which ends with the process; tokio's own pool would wait for it.
    let watcher = std::thread::Builder::new().name("stdout".to_owned()).spawn(move || {
        let stdout = io::stdout();
        let mut watched = [PollFd::new(&stdout, PollFlags::empty())];
        loop {
            match poll(&mut watched, None) {
                Err(Errno::INTR) => {}
                Ok(_) if !watched[0].revents().is_empty() => {
                    let _ = sender.send(());
                    return;
                }
                _ => return,
            }
        }
    });
    if watcher.is_ok() && gone.await.is_ok() {
        return;
    }
    std::future::pending::<()>().await;
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn event(id: i64) -> Event {
        serde_json::from_value(json!({
            "id": id, "epoch": 1, "at": "2030-01-02T03:04:05+00:00", "event": "token.revoked", "token_id": null,
            "user_id": "ann", "actor": "app", "client_addr": "10.0.0.1", "reason": "a\nb", "detail": {"k": 1}
        }))
        .unwrap()
    }

    #[test]
    fn a_line_is_one_object_with_the_documented_keys_in_order() {
        let mut out = Vec::new();
        write_lines(&mut out, &[event(1), event(2)]).unwrap();
        let text = String::from_utf8(out).unwrap();
        assert_eq!(
            text.lines().next().unwrap(),
            r#"{"id":1,"epoch":1,"at":"2030-01-02T03:04:05+00:00","event":"token.revoked","token_id":null,"user_id":"ann","actor":"app","reason":"a\nb","detail":{"k":1}}"#
        );
        assert_eq!(text.lines().count(), 2);
        assert!(text.ends_with('\n'));
    }

    #[test]
    fn no_events_print_nothing() {
        let mut out = Vec::new();
        write_lines(&mut out, &[]).unwrap();
        assert!(out.is_empty());
    }

    #[test]
    fn a_closed_pipe_is_distinguished_from_a_full_disk() {
        struct Closed;
        impl Write for Closed {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        assert_eq!(write_lines(Closed, &[event(1)]).unwrap_err().kind(), Kind::BrokenPipe);
    }
}
