//! The walk of `make demo`: what Tollgate does, end to end, on the server and with the daemon that `make up` started.
//!
//! It needs DATABASE_URL (a superuser) and `tollgated` on the PATH; `.dev/env` sets both. Everything it creates is
//! named after it (schema `tollgate_demo`, roles `tollgate_demo_*`, users and scopes `demo:*`), so it can be run again,
//! and does not touch anything else in the database. The exit status is 0 only if every check passed.

mod report;
mod tail;
mod walk;

use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result};
use tokio_postgres::{Client, Config, NoTls};

use crate::report::Report;

const NO_TOLLGATED: &str =
    "cannot run tollgated: is it on the PATH? `make demo` puts it there, and so does `. .dev/env`";

const LEFT: &str = "\
The application stays (schema tollgate_demo), and so does Ann's token, until the next run. To be Ann:
    begin;
    set role tollgate_demo_app;
    select user_id from tollgate.authenticate('her token, from step 3');
    select * from tollgate_demo.posts;
    commit;";

#[tokio::main]
async fn main() -> ExitCode {
    let mut report = Report::new();
    if let Err(error) = walk::walk(&mut report).await {
        report.stopped(&error);
    }
    if !report.conclude() {
        return ExitCode::FAILURE;
    }
    println!("{LEFT}");
    ExitCode::SUCCESS
}

/// Takes DATABASE_URL from the inherited environment.
fn tollgated() -> Command {
    Command::new("tollgated")
}

fn owner() -> Result<Config> {
    let url = std::env::var("DATABASE_URL")
        .context("DATABASE_URL is not set: run `make demo`, or `. .dev/env` first")?;
    // The text is not repeated: it may contain a password.
    let mut config: Config = url.parse().context("DATABASE_URL is not a connection string")?;
    config.application_name("tollgate demo");
    Ok(config)
}

async fn connect(config: &Config) -> Result<Client> {
    let (client, connection) = config
        .connect(NoTls)
        .await
        .with_context(|| format!("cannot connect as {}", config.get_user().unwrap_or("the default user")))?;
    // The client reports a failed connection.
    tokio::spawn(connection);
    Ok(client)
}
