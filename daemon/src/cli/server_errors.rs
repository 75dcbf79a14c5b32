//! What the server says, in the words of the command line: its functions are our commands, its arguments our options.
//!
//! The extension writes its errors for SQL. A text that suits both stays as it is; a function or an argument that it names has
//! another name here.

use clap::CommandFactory as _;
use tokio_postgres::error::SqlState;

use crate::config::Cli;
use crate::contract;
use crate::error::Error;
use crate::postgres::target::Target;

/// What is a command here. What is missing stays as the server says it: a setting, or a function for an administrator's psql.
const COMMANDS: [(&str, &str); 39] = [
    ("capability_grants", "capability list"),
    ("create_api_token", "token create"),
    ("create_service_account", "service create"),
    ("create_service_account_secret", "service secret"),
    ("define_scope", "scope define"),
    ("define_webhook", "webhook create"),
    ("derive_api_token", "token derive"),
    ("distrust_issuer", "issuer distrust"),
    ("distrust_workload", "service distrust-workload"),
    ("drop_scope", "scope drop"),
    ("drop_webhook", "webhook delete"),
    ("enable_service_account", "service enable"),
    ("event_position", "tail"),
    ("find_api_tokens", "token list"),
    ("grant_capability", "capability grant"),
    ("import_api_token", "token import"),
    ("invalidate_sessions", "session invalidate"),
    ("list_api_tokens", "token list"),
    ("list_scopes", "scope list"),
    ("list_sessions", "session list"),
    ("purge_audit_log", "cleanup"),
    ("replay_webhook", "webhook replay"),
    ("revoke_all_api_tokens", "token revoke"),
    ("revoke_all_sessions", "session revoke"),
    ("revoke_api_token", "token revoke"),
    ("revoke_capability", "capability revoke"),
    ("revoke_session", "session revoke"),
    ("revoke_user", "user revoke"),
    ("rotate_api_token", "token rotate"),
    ("service_accounts", "service list"),
    ("set_api_token_enabled", "token enable"),
    ("set_webhook_url", "webhook set-url"),
    ("trust_issuer", "issuer trust"),
    ("trusted_issuers", "issuer list"),
    ("update_api_token", "token update"),
    ("update_service_account", "service update"),
    ("verify_api_token", "token verify"),
    ("verify_audit_log", "audit verify"),
    ("webhooks", "webhook list"),
];

/// Arguments whose options have other names.
const OPTIONS: [(&str, &str); 11] = [
    ("algorithms", "algorithm"),
    ("allowed_ips", "allowed-ip"),
    ("before", "audit-retention"),
    ("delivery", "message"),
    ("events", "event"),
    ("max_tokens", "limit"),
    ("scope_claims", "scope-claim"),
    ("scopes", "scope"),
    ("token_id", "id"),
    ("types", "type"),
    ("user_id", "user"),
];

/// An error as the person reads it who typed this command. If a privilege is missing, the server is asked what gives it.
pub(super) async fn explained(error: Error, target: &Target, command: &str) -> Error {
    let error = error.reworded(|text| in_words_of(command, text));
    if error.sqlstate() != Some(&SqlState::INSUFFICIENT_PRIVILEGE) {
        return error;
    }
    // "permission denied for function create_api_token"; in another language too the name comes last.
    let Some(object) =
        error.message().split_whitespace().last().map(|word| word.trim_matches('"').to_owned())
    else {
        return error;
    };
    let Ok(session) = target.connect().await else { return error };
    match contract::needed_capability(&*session, &object).await {
        Ok(Some((capability, role))) => error.with_remedy(format!(
            "connect as a role that has the capability {capability}, or have an administrator run: \
             SELECT tollgate.grant_capability('{}', '{capability}');",
            role.replace('\'', "''")
        )),
        _ => error,
    }
}

fn in_words_of(command: &str, text: &str) -> String {
    with_options(command, &with_commands(text))
}

/// `tollgate.define_scope(name, description)` is `tollgated scope define`.
fn with_commands(text: &str) -> String {
    const SCHEMA: &str = "tollgate.";
    let mut words = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once(SCHEMA) {
        words.push_str(before);
        let end = after.find(|c: char| !c.is_ascii_lowercase() && c != '_').unwrap_or(after.len());
        let (name, behind) = after.split_at(end);
        match COMMANDS.iter().find(|(function, _)| *function == name) {
            Some((_, command)) => {
                words.push_str("`tollgated ");
                words.push_str(command);
                words.push('`');
                rest = match behind.strip_prefix('(').and_then(|list| list.split_once(')')) {
                    Some((_, behind)) => behind,
                    None => behind,
                };
            }
            None => {
                words.push_str(SCHEMA);
                words.push_str(name);
                rest = behind;
            }
        }
    }
    words + rest
}

/// `Argument: changes, key scopes` is `Option: --scope`.
fn with_options(command: &str, text: &str) -> String {
    let Some(rest) = text.strip_prefix("Argument: ") else { return text.to_owned() };
    let rest = rest.strip_prefix("changes, key ").unwrap_or(rest);
    let end = rest.find(|c: char| !c.is_ascii_lowercase() && c != '_').unwrap_or(rest.len());
    let (argument, behind) = rest.split_at(end);
    let other = OPTIONS.iter().find(|(known, _)| *known == argument).map_or(argument, |(_, option)| *option);
    match [argument, other].iter().find_map(|name| option(command, &name.replace('_', "-"))) {
        Some(option) => format!("Option: {option}{behind}"),
        None => text.to_owned(),
    }
}

/// An option as it is typed, or the name of an argument without one, if the command has it.
fn option(command: &str, name: &str) -> Option<String> {
    let root = Cli::command();
    let command = command.split(' ').try_fold(&root, |command, word| command.find_subcommand(word))?;
    command.get_arguments().find_map(|argument| {
        if argument.get_long() == Some(name) {
            return Some(format!("--{name}"));
        }
        let positional = argument.is_positional() && argument.get_id().as_str().replace('_', "-") == name;
        positional.then(|| name.to_uppercase())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_function_of_the_server_is_a_command() {
        for (said, words) in [
            (
                "Scopes are defined with tollgate.define_scope(name, description).",
                "Scopes are defined with `tollgated scope define`.",
            ),
            (
                "tollgate.webhooks lists them; tollgate.define_webhook(name, url) makes one.",
                "`tollgated webhook list` lists them; `tollgated webhook create` makes one.",
            ),
            (
                "The setting tollgate.max_token_lifetime allows 90 days",
                "The setting tollgate.max_token_lifetime allows 90 days",
            ),
            ("tollgate.", "tollgate."),
            ("tollgate.webhooks", "`tollgated webhook list`"),
            ("tollgate.webhooks(", "`tollgated webhook list`("),
        ] {
            assert_eq!(with_commands(said), words);
        }
    }

    #[test]
    fn every_command_that_is_named_exists() {
        for (_, command) in COMMANDS {
            let root = Cli::command();
            let found = command.split(' ').try_fold(&root, |command, word| command.find_subcommand(word));
            assert!(found.is_some(), "{command}");
        }
    }

    #[test]
    fn an_argument_is_the_option_of_the_command_that_has_it() {
        for (command, said, words) in [
            ("token create", "Argument: scopes, with 'x'.", "Option: --scope, with 'x'."),
            ("token update", "Argument: changes, key allowed_ips.", "Option: --allowed-ip."),
            ("scope drop", "Argument: name.", "Option: NAME."),
            ("token rotate", "Argument: token_id, of 1.", "Option: ID, of 1."),
            ("session invalidate", "Argument: before.", "Option: --before."),
            ("cleanup", "Argument: before.", "Option: --audit-retention."),
            ("token create", "Argument: nothing_of_ours.", "Argument: nothing_of_ours."),
            ("status", "Something else.", "Something else."),
        ] {
            assert_eq!(with_options(command, said), words);
        }
    }
}
