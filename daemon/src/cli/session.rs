//! `tollgated session …`: sessions by hand.

use serde_json::json;

use super::list::List;
use super::progress;
use crate::app::sessions;
use crate::app::sessions::End;
use crate::cli::output;
use crate::cli::output::{Column, Tone};
use crate::config::{InvalidateSessionsOptions, ListSessionsOptions, RevokeSessionOptions, SessionCommand};
use crate::contract::document::Document;
use crate::error::{Error, Result};
use crate::postgres::target::Target;
use crate::process::exit;

pub(super) async fn session(target: Target, command: SessionCommand) -> Result<u8> {
    match command {
        SessionCommand::List(options) => list(target, &options).await,
        SessionCommand::Revoke(options) => revoke(target, &options).await,
        SessionCommand::Invalidate(options) => invalidate(target, &options).await,
    }
}

async fn list(target: Target, options: &ListSessionsOptions) -> Result<u8> {
    let columns = [
        Column::whole("ID"),
        Column::cut("CLIENT"),
        Column::cut("LABEL"),
        Column::whole("OPENED"),
        Column::whole("REFRESHED"),
        Column::whole("ENDS"),
        Column::spare("IDLE UNTIL"),
        Column::spare("OPENED FROM"),
        Column::whole("LAST FROM"),
        Column::spare("REFRESHES"),
        Column::cut("SCOPES"),
    ];
    let row = |session: &Document| {
        [
            session.field("id"),
            session.field("client_id"),
            session.field("label"),
            session.moment("created_at"),
            session.moment("refreshed_at"),
            session.moment("expires_at"),
            session.moment("idle_until"),
            session.field("opened_from"),
            session.field("last_address"),
            session.field("refreshes"),
            session.field("scopes"),
        ]
    };
    let connection = target.connect().await?;
    let rows = sessions::list(&connection, &options.user).await?;
    let list = List { key: "id", columns, row, tone: |_| Tone::Plain };
    if list.print(rows, &options.output).await?.is_none() && options.output.is_for_people() {
        output::line(format!("{} has no sessions", options.user))?;
    }
    Ok(exit::OK)
}

async fn revoke(target: Target, options: &RevokeSessionOptions) -> Result<u8> {
    let what = match (options.id, options.user.as_deref()) {
        (Some(id), user) => End::Session { id, user },
        (None, Some(user)) => End::User(user),
        // The command line has one of them.
        (None, None) => return Err(Error::usage("name a session or a user")),
    };
    let connection = target.connect().await?;
    let ended = sessions::revoke(&connection, what, options.reason.as_deref()).await?;
    if options.output.json {
        output::json(&json!({ "revoked": ended }))?;
    } else if !options.output.quiet {
        output::line(match ended {
            0 => "nothing was revoked: there is no such session, or it has ended already".to_owned(),
            1 => "1 session was revoked".to_owned(),
            _ => format!("{ended} sessions were revoked"),
        })?;
    }
    Ok(if ended > 0 { exit::OK } else { exit::NO })
}

async fn invalidate(target: Target, options: &InvalidateSessionsOptions) -> Result<u8> {
    let connection = target.connect().await?;
    let bar = progress::bar("ending sessions", None, "rows", !options.output.is_for_people());
    let ended = sessions::invalidate(&connection, options.before, |count| {
        bar.set_position(count);
        bar.tick();
    })
    .await?;
    bar.finish_and_clear();
    if options.output.json {
        output::json(&json!({ "invalidated": ended }))?;
    } else if !options.output.quiet {
        output::line(format!(
            "ended {ended} sessions that were opened or last refreshed before {}",
            options.before
        ))?;
    }
    Ok(exit::OK)
}
