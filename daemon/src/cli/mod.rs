//! The commands. `run` serves; the others do one thing and end.

mod audit;
mod capability;
mod check;
mod cleanup;
mod config;
mod flush;
mod import;
mod import_key;
mod issuer;
mod key;
mod list;
pub mod output;
mod progress;
mod quota;
mod run;
mod scope;
mod server_errors;
mod service;
mod session;
mod shell;
mod status;
mod tail;
mod token;
mod url_key;
mod user;
mod webhook;

use std::future::Future;

use crate::config::file_trust;
use crate::config::sources::Configuration;
use crate::config::{
    AuditCommand, CapabilityCommand, Command, ImportKeyCommand, IssuerCommand, KeyCommand, QuotaCommand,
    ScopeCommand, ServiceCommand, SessionCommand, StandbyOptions, TokenCommand, UrlKeyCommand, UserCommand,
    WebhookCommand,
};
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
        Command::Key(KeyCommand::Init(options)) => return key::init(options),
        _ => {}
    }
    let cli = configuration.cli;
    let serves = matches!(cli.command, Command::Run(_));
    // A person who runs a command is to see what the server remarks on it.
    logging::start(&cli.logging, if serves { "info" } else { "warn,tollgated::notice=info" })?;
    let application = format!("tollgated {}", name(&cli.command));
    let target = cli.connection.target(&application)?;
    file_trust::warn_of(configuration.file.into_iter().chain(target.files()));
    let standbys = |options: &StandbyOptions| {
        let standbys = cli.connection.standbys(options, &application)?;
        let known = target.files();
        file_trust::warn_of(standbys.iter().flat_map(Target::files).filter(|file| !known.contains(file)));
        Ok::<_, Error>(standbys)
    };
    let command_name = name(&cli.command);
    let asked = target.clone();
    match cli.command {
        Command::Run(options) => {
            let standbys = standbys(&options.standby)?;
            return run::run(target, standbys, *options);
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
        Command::User(command) => block_on(user::user(target, command)),
        Command::Scope(command) => block_on(scope::scope(target, command)),
        Command::Webhook(command) => block_on(webhook::webhook(target, command)),
        Command::Audit(command) => block_on(audit::audit(target, command)),
        Command::Session(command) => block_on(session::session(target, command)),
        Command::Key(KeyCommand::List(output)) => block_on(key::list(target, &output)),
        Command::Key(KeyCommand::Rotate(options)) => block_on(key::rotate(target, options)),
        Command::Key(KeyCommand::Import(options)) => block_on(key::import(target, options)),
        Command::Key(KeyCommand::Withdraw(options)) => block_on(key::withdraw(target, options)),
        Command::Key(KeyCommand::Reseal(options)) => {
            let standbys = standbys(&options.standby)?;
            block_on(key::reseal(target, standbys, options))
        }
        Command::UrlKey(command) => block_on(url_key::url_key(target, command)),
        Command::ImportKey(command) => block_on(import_key::import_key(target, command)),
        Command::Issuer(command) => block_on(issuer::issuer(target, command)),
        Command::Quota(command) => block_on(quota::quota(target, command)),
        Command::Service(command) => block_on(service::service(target, command)),
        Command::Capability(command) => block_on(capability::capability(target, command)),
        // Answered above, without a connection.
        Command::Config(_) | Command::Completions(_) | Command::Man | Command::Key(KeyCommand::Init(_)) => {
            Ok(exit::OK)
        }
    }
    .or_else(|error| block_on(async { Err(server_errors::explained(error, &asked, command_name).await) }))
}

/// The command as it is typed, and as pg_stat_activity shows it.
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
        Command::Token(TokenCommand::Update(_)) => "token update",
        Command::Token(TokenCommand::Rotate(_)) => "token rotate",
        Command::Token(TokenCommand::Derive(_)) => "token derive",
        Command::Token(TokenCommand::Disable(_)) => "token disable",
        Command::Token(TokenCommand::Enable(_)) => "token enable",
        Command::Token(TokenCommand::Import(_)) => "token import",
        Command::Scope(ScopeCommand::List(_)) => "scope list",
        Command::Scope(ScopeCommand::Define(_)) => "scope define",
        Command::User(UserCommand::Revoke(_)) => "user revoke",
        Command::Scope(ScopeCommand::Drop(_)) => "scope drop",
        Command::Webhook(WebhookCommand::Create(_)) => "webhook create",
        Command::Webhook(WebhookCommand::List(_)) => "webhook list",
        Command::Webhook(WebhookCommand::Show(_)) => "webhook show",
        Command::Webhook(WebhookCommand::Messages(_)) => "webhook messages",
        Command::Webhook(WebhookCommand::SetUrl(_)) => "webhook set-url",
        Command::Webhook(WebhookCommand::RotateSecret(_)) => "webhook rotate-secret",
        Command::Webhook(WebhookCommand::Pause(_)) => "webhook pause",
        Command::Webhook(WebhookCommand::Resume(_)) => "webhook resume",
        Command::Webhook(WebhookCommand::Disable(_)) => "webhook disable",
        Command::Webhook(WebhookCommand::Enable(_)) => "webhook enable",
        Command::Webhook(WebhookCommand::Replay(_)) => "webhook replay",
        Command::Webhook(WebhookCommand::Delete(_)) => "webhook delete",
        Command::Audit(AuditCommand::Verify(_)) => "audit verify",
        Command::Session(SessionCommand::List(_)) => "session list",
        Command::Session(SessionCommand::Revoke(_)) => "session revoke",
        Command::Session(SessionCommand::Invalidate(_)) => "session invalidate",
        Command::Key(KeyCommand::Init(_)) => "key init",
        Command::Key(KeyCommand::List(_)) => "key list",
        Command::Key(KeyCommand::Rotate(_)) => "key rotate",
        Command::Key(KeyCommand::Import(_)) => "key import",
        Command::Key(KeyCommand::Withdraw(_)) => "key withdraw",
        Command::Key(KeyCommand::Reseal(_)) => "key reseal",
        Command::ImportKey(ImportKeyCommand::Store(_)) => "import-key store",
        Command::ImportKey(ImportKeyCommand::List(_)) => "import-key list",
        Command::ImportKey(ImportKeyCommand::Drop(_)) => "import-key drop",
        Command::UrlKey(UrlKeyCommand::Create(_)) => "url-key create",
        Command::UrlKey(UrlKeyCommand::List(_)) => "url-key list",
        Command::UrlKey(UrlKeyCommand::Rotate(_)) => "url-key rotate",
        Command::UrlKey(UrlKeyCommand::Export(_)) => "url-key export",
        Command::UrlKey(UrlKeyCommand::Withdraw(_)) => "url-key withdraw",
        Command::Issuer(IssuerCommand::Trust(_)) => "issuer trust",
        Command::Issuer(IssuerCommand::List(_)) => "issuer list",
        Command::Issuer(IssuerCommand::Distrust(_)) => "issuer distrust",
        Command::Issuer(IssuerCommand::Fetch(_)) => "issuer fetch",
        Command::Quota(QuotaCommand::Set(_)) => "quota set",
        Command::Quota(QuotaCommand::Add(_)) => "quota add",
        Command::Quota(QuotaCommand::List(_)) => "quota list",
        Command::Quota(QuotaCommand::Show(_)) => "quota show",
        Command::Quota(QuotaCommand::Remove(_)) => "quota remove",
        Command::Service(ServiceCommand::Create(_)) => "service create",
        Command::Service(ServiceCommand::List(_)) => "service list",
        Command::Service(ServiceCommand::Show(_)) => "service show",
        Command::Service(ServiceCommand::Update(_)) => "service update",
        Command::Service(ServiceCommand::Disable(_)) => "service disable",
        Command::Service(ServiceCommand::Enable(_)) => "service enable",
        Command::Service(ServiceCommand::Delete(_)) => "service delete",
        Command::Service(ServiceCommand::Secret(_)) => "service secret",
        Command::Service(ServiceCommand::Keys(_)) => "service keys",
        Command::Service(ServiceCommand::TrustWorkload(_)) => "service trust-workload",
        Command::Service(ServiceCommand::DistrustWorkload(_)) => "service distrust-workload",
        Command::Capability(CapabilityCommand::List(_)) => "capability list",
        Command::Capability(CapabilityCommand::Grant(_)) => "capability grant",
        Command::Capability(CapabilityCommand::Revoke(_)) => "capability revoke",
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
