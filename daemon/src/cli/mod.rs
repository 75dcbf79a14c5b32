//! The commands. `run` serves; the others do one thing and end.

mod check;
mod cleanup;
mod config;
mod flush;
mod run;
mod status;
mod tail;
mod token;

use std::future::Future;

use crate::config::{Command, StandbyOptions, TokenCommand};
use crate::error::{Error, Result};
use crate::layers::Layers;
use crate::logging;

/// Runs the command and returns the exit code.
pub fn run(layers: Layers) -> Result<u8> {
    if let Command::Config(options) = &layers.cli.command {
        return config::config(&layers, options.output.json);
    }
    let cli = layers.cli;
    let serves = matches!(cli.command, Command::Run(_));
    logging::start(&cli.logging, if serves { "info" } else { "warn" })?;
    let application = format!("tollgated {}", name(&cli.command));
    let target = cli.connection.target(&application)?;
    let standbys = |options: &StandbyOptions| cli.connection.standbys(options, &application);
    match cli.command {
        Command::Run(options) => {
            let standbys = standbys(&options.standby)?;
            block_on(run::run(target, standbys, options))
        }
        Command::Tail(options) => block_on(tail::tail(target, options)),
        Command::Status(output) => block_on(status::status(target, output.json)),
        Command::Check(options) => {
            let standbys = standbys(&options.standby)?;
            block_on(check::check(target, standbys, options.output.json))
        }
        Command::Flush(options) => {
            let standbys = standbys(&options.standby)?;
            block_on(flush::flush(target, standbys, options.output.json))
        }
        Command::Cleanup(options) => block_on(cleanup::cleanup(target, options)),
        // Answered above, without a connection.
        Command::Config(_) => Ok(crate::exit::OK),
        Command::Token(command) => block_on(token::token(target, command)),
    }
}

/// What pg_stat_activity shows.
fn name(command: &Command) -> &'static str {
    match command {
        Command::Run(_) => "run",
        Command::Tail(_) => "tail",
        Command::Status(_) => "status",
        Command::Check(_) => "check",
        Command::Config(_) => "config",
        Command::Flush(_) => "flush",
        Command::Cleanup(_) => "cleanup",
        Command::Token(TokenCommand::Create(_)) => "token create",
        Command::Token(TokenCommand::List(_)) => "token list",
        Command::Token(TokenCommand::Verify(_)) => "token verify",
        Command::Token(TokenCommand::Revoke(_)) => "token revoke",
    }
}

/// One thread: all that is done here is to wait for a server.
fn block_on(future: impl Future<Output = Result<u8>>) -> Result<u8> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Error::failed(format!("could not start the runtime: {error}")))?
        .block_on(future)
}
