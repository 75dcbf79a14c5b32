//! The commands. `run` serves; the others do one thing and end.

mod check;
mod cleanup;
mod config;
mod flush;
mod import;
mod list;
pub mod output;
mod progress;
mod run;
mod scope;
mod shell;
mod status;
mod tail;
mod token;

use std::future::Future;

use crate::config::file_trust;
use crate::config::sources::Configuration;
use crate::config::{Command, ScopeCommand, StandbyOptions, TokenCommand};
use crate::error::{Error, Result};
use crate::postgres::target::Target;
use crate::process::{exit, logging};

/// Runs the command and returns the exit code.
pub fn run(configuration: Configuration) -> Result<u8> {
    // They need no database.
    match &configuration.cli.command {
        Command::Config(options) => return config::config(&configuration, options.output.json),
        Command::Completions(options) => return shell::completions(options),
        Command::Man => return shell::man(),
        _ => {}
    }
    let cli = configuration.cli;
    let serves = matches!(cli.command, Command::Run(_));
    logging::start(&cli.logging, if serves { "info" } else { "warn" })?;
    let application = format!("tollgated {}", name(&cli.command));
    let target = cli.connection.target(&application)?;
    file_trust::warn_of(configuration.file.into_iter().chain(target.files()));
    let standbys = |options: &StandbyOptions| {
        let standbys = cli.connection.standbys(options, &application)?;
        let known = target.files();
        file_trust::warn_of(standbys.iter().flat_map(Target::files).filter(|file| !known.contains(file)));
        Ok::<_, Error>(standbys)
    };
    match cli.command {
        Command::Run(options) => {
            let standbys = standbys(&options.standby)?;
            run::run(target, standbys, options)
        }
        Command::Tail(options) => block_on(tail::tail(target, options)),
        Command::Status(output) => block_on(status::status(target, output.json)),
        Command::Check(options) => {
            let standbys = standbys(&options.standby)?;
            block_on(check::check(target, standbys, options))
        }
        Command::Flush(options) => {
            let standbys = standbys(&options.standby)?;
            block_on(flush::flush(target, standbys, &options.output))
        }
        Command::Cleanup(options) => block_on(cleanup::cleanup(target, options)),
        Command::Token(command) => block_on(token::token(target, command)),
        Command::Scope(command) => block_on(scope::scope(target, command)),
        // Answered above, without a connection.
        Command::Config(_) | Command::Completions(_) | Command::Man => Ok(exit::OK),
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
        Command::Token(TokenCommand::Show(_)) => "token show",
        Command::Token(TokenCommand::Rotate(_)) => "token rotate",
        Command::Token(TokenCommand::Derive(_)) => "token derive",
        Command::Token(TokenCommand::Disable(_)) => "token disable",
        Command::Token(TokenCommand::Enable(_)) => "token enable",
        Command::Token(TokenCommand::Import(_)) => "token import",
        Command::Scope(ScopeCommand::List(_)) => "scope list",
        Command::Scope(ScopeCommand::Define(_)) => "scope define",
        Command::Scope(ScopeCommand::Drop(_)) => "scope drop",
        Command::Completions(_) => "completions",
        Command::Man => "man",
    }
}

/// On one thread: a command waits for one server at a time.
fn block_on(future: impl Future<Output = Result<u8>>) -> Result<u8> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Error::failed(format!("could not start the runtime: {error}")))?
        .block_on(future)
}
