//! `tollgated token …`: tokens by hand.

use std::io::{self, IsTerminal as _, Read as _};
use std::path::Path;

use serde_json::{Value, json};
use tollgate_core::token;
use zeroize::Zeroizing;

use super::list::List;
use crate::cli::output;
use crate::cli::output::Tone;
use crate::config::{
    CreateOptions, DeriveOptions, EnabledOptions, ListOptions, OutputOptions, PresentedToken, RevokeOptions,
    RotateOptions, ShowOptions, TokenCommand, VerifyOptions,
};
use crate::contract;
use crate::contract::Ending;
use crate::contract::document::Document;
use crate::error::{Error, Result};
use crate::postgres::pool::hide_bind_values;
use crate::postgres::target::Target;
use crate::process::exit;

/// Far beyond the longest token; a larger file is not one that holds a token.
const LONGEST_INPUT: u64 = 4096;

pub(super) async fn token(target: Target, command: TokenCommand) -> Result<u8> {
    match command {
        TokenCommand::Create(options) => create(target, options).await,
        TokenCommand::List(options) => list(target, options).await,
        TokenCommand::Verify(options) => verify(target, options).await,
        TokenCommand::Show(options) => show(target, options).await,
        TokenCommand::Revoke(options) => revoke(target, options).await,
        TokenCommand::Rotate(options) => rotate(target, options).await,
        TokenCommand::Derive(options) => derive(target, options).await,
        TokenCommand::Disable(options) => set_enabled(target, options, false).await,
        TokenCommand::Enable(options) => set_enabled(target, options, true).await,
        TokenCommand::Import(options) => super::import::import(target, options).await,
    }
}

/// Prints a token at the only time that it can be.
fn hand_out(issued: &Value, output: &OutputOptions) -> Result<()> {
    if output.json {
        return output::json(issued);
    }
    if output.quiet {
        return output::line(output::field(issued, "token"));
    }
    output::line(output::facts(&[
        ("id", output::field(issued, "id")),
        ("token", output::field(issued, "token")),
        ("user", output::field(issued, "user_id")),
        ("name", output::field(issued, "name")),
        ("scopes", output::field(issued, "scopes")),
        ("expires", output::moment(issued, "expires_at")),
    ]))?;
    eprintln!("Keep the token now: it is stored nowhere and cannot be shown again.");
    Ok(())
}

async fn create(target: Target, options: CreateOptions) -> Result<u8> {
    let session = target.connect().await?;
    let issued = contract::create_api_token(
        &*session,
        &contract::NewToken {
            user_id: &options.user,
            name: &options.name,
            scopes: &options.scopes,
            ending: Ending { expires_in: options.expires_in, expires_at: options.expires_at },
            metadata: options.metadata.as_deref().unwrap_or("{}"),
            // No list is every network; an empty one would be none.
            allowed_ips: (!options.allowed_ips.is_empty()).then_some(options.allowed_ips.as_slice()),
            rate_limit: options.rate_limit,
            rate_window: options.rate_window,
            prefix: options.prefix.as_deref(),
        },
    )
    .await?;
    hand_out(&issued, &options.output)?;
    Ok(exit::OK)
}

async fn list(target: Target, options: ListOptions) -> Result<u8> {
    const HEADING: [&str; 9] =
        ["ID", "NAME", "HINT", "STATUS", "USES", "DENIALS", "LAST USED", "EXPIRES", "SCOPES"];
    let row = |token: &Document| {
        [
            token.field("id"),
            token.field("name"),
            token.field("hint"),
            token.field("status"),
            token.field("use_count"),
            token.field("denied_count"),
            token.moment("last_used_at"),
            token.moment("expires_at"),
            token.field("scopes"),
        ]
    };
    let session = target.connect().await?;
    let tokens = contract::list_api_tokens(&*session, &options.user).await?;
    let list = List { key: "id", heading: HEADING, row, tone: status_tone };
    if !list.print(tokens, &options.output).await? && options.output.is_for_people() {
        output::line(format!("{} has no tokens", options.user))?;
    }
    Ok(exit::OK)
}

/// Of the cells of a list, only the status has one.
fn status_tone(cell: &str) -> Tone {
    match cell {
        "active" | "disabled" | "expired" | "revoked" => Tone::of(cell),
        _ => Tone::Plain,
    }
}

async fn show(target: Target, options: ShowOptions) -> Result<u8> {
    let session = target.connect().await?;
    let Some(token) = contract::show_api_token(&*session, options.id).await? else {
        if options.output.json {
            output::json(&Value::Null)?;
        } else {
            output::line("there is no such token; perhaps it ended long ago and was purged")?;
        }
        return Ok(exit::NO);
    };
    if options.output.json {
        output::json(&token)?;
    } else if options.output.quiet {
        output::line(token.field("status"))?;
    } else {
        output::line(output::facts(&known(&token)))?;
    }
    Ok(exit::OK)
}

/// What is known of a token, in the order in which one asks; what does not apply to it is left out.
fn known(token: &Document) -> Vec<(&'static str, String)> {
    [
        ("id", "id"),
        ("user", "user_id"),
        ("name", "name"),
        ("hint", "hint"),
        ("status", "status"),
        ("scopes", "scopes"),
        ("expires", "expires_at"),
        ("allowed ips", "allowed_ips"),
        ("rate limit", "rate_limit"),
        ("rate window", "rate_window"),
        ("metadata", "metadata"),
        ("created", "created_at"),
        ("created by", "created_by"),
        ("disabled", "disabled_at"),
        ("revoked", "revoked_at"),
        ("reason", "revoked_reason"),
        ("parent", "parent_id"),
        ("rotated from", "rotated_from"),
        ("uses", "use_count"),
        ("denials", "denied_count"),
        ("last used", "last_used_at"),
        ("last used from", "last_used_ip"),
    ]
    .into_iter()
    .filter(|(_, key)| token.has(key))
    .map(|(name, key)| {
        let time = key.ends_with("_at");
        (name, if time { token.moment(key) } else { token.field(key) })
    })
    .collect()
}

async fn rotate(target: Target, options: RotateOptions) -> Result<u8> {
    let session = target.connect().await?;
    let ending = Ending { expires_in: options.expires_in, expires_at: options.expires_at };
    let issued =
        contract::rotate_api_token(&*session, options.id, options.grace, &ending, options.revoke_on_reuse)
            .await?;
    hand_out(&issued, &options.output)?;
    Ok(exit::OK)
}

async fn derive(target: Target, options: DeriveOptions) -> Result<u8> {
    let parent = read_token(&options.parent)?;
    let session = target.connect().await?;
    hide_bind_values(&session).await?;
    let networks = (!options.allowed_ips.is_empty()).then_some(options.allowed_ips.as_slice());
    let issued = contract::derive_api_token(
        &*session,
        &parent,
        &options.name,
        &options.scopes,
        &Ending { expires_in: options.expires_in, expires_at: options.expires_at },
        networks,
    )
    .await?;
    hand_out(&issued, &options.output)?;
    Ok(exit::OK)
}

async fn set_enabled(target: Target, options: EnabledOptions, enabled: bool) -> Result<u8> {
    let session = target.connect().await?;
    let changed =
        contract::set_api_token_enabled(&*session, options.id, enabled, options.reason.as_deref()).await?;
    let word = if enabled { "enabled" } else { "disabled" };
    if options.output.json {
        output::json(&json!({ word: changed }))?;
    } else if !options.output.quiet {
        output::line(match changed {
            true => word.to_owned(),
            false => format!("nothing was {word}: there is no such token, or it is {word} already"),
        })?;
    }
    Ok(if changed { exit::OK } else { exit::NO })
}

async fn verify(target: Target, options: VerifyOptions) -> Result<u8> {
    let presented = read_token(&options.token)?;
    let session = target.connect().await?;
    let scopes = (!options.scopes.is_empty()).then_some(options.scopes.as_slice());
    let verification = if options.foreign {
        hide_bind_values(&session).await?;
        contract::verify_api_token(&*session, &presented, scopes, options.client_ip).await?
    } else {
        // Only the digest leaves this process, so that the token is in no log on the way.
        let digest = token::digest(presented.as_bytes());
        let mut verification =
            contract::verify_api_token_hash(&*session, &digest, scopes, options.client_ip).await?;
        // A digest tells the server nothing of the shape, so what it cannot say is said here.
        if verification.field("code") == "NOT_FOUND" && token::parse(presented.as_bytes()).is_none() {
            verification.set("code", "MALFORMED");
        }
        verification
    };
    let valid = verification.is_true("valid");
    if options.output.json {
        output::json(&verification)?;
    } else if !options.output.quiet {
        output::line(output::facts(&verdict(&verification)))?;
    }
    Ok(if valid { exit::OK } else { exit::NO })
}

/// What is not known of a refused token is left out.
fn verdict(verification: &Document) -> Vec<(&'static str, String)> {
    let mut facts = vec![("code", verification.field("code"))];
    for (name, key) in [
        ("token id", "token_id"),
        ("user", "user_id"),
        ("name", "name"),
        ("scopes", "scopes"),
        ("expires", "expires_at"),
        ("metadata", "metadata"),
        ("rate limit", "rate_limit"),
        ("remaining", "rate_remaining"),
        ("retry after", "retry_after"),
    ] {
        if verification.has(key) {
            let value = if key == "expires_at" { verification.moment(key) } else { verification.field(key) };
            facts.push((name, value));
        }
    }
    facts
}

async fn revoke(target: Target, options: RevokeOptions) -> Result<u8> {
    let reason = options.reason.as_deref();
    let revoked = match options.id {
        Some(id) => {
            let session = target.connect().await?;
            contract::revoke_api_token(&*session, id, options.user.as_deref(), reason).await?
        }
        None => {
            let token = read_token(&options.token)?;
            let session = target.connect().await?;
            hide_bind_values(&session).await?;
            contract::revoke_presented_token(&*session, &token, reason).await?
        }
    };
    if options.output.json {
        output::json(&json!({ "revoked": revoked }))?;
    } else if options.output.quiet {
        // The exit status says it.
    } else if revoked {
        output::line("revoked")?;
    } else {
        output::line(match (&options.id, &options.user) {
            (None, _) => "nothing to revoke: the token is unknown or revoked already",
            (Some(_), None) => "nothing to revoke: no such token, or it is revoked already",
            (Some(_), Some(_)) => "nothing to revoke: that user has no such token, or it is revoked already",
        })?;
    }
    Ok(if revoked { exit::OK } else { exit::NO })
}

fn read_token(from: &PresentedToken) -> Result<Zeroizing<String>> {
    let token = if from.token_file == Path::new("-") {
        if io::stdin().is_terminal() {
            Zeroizing::new(
                rpassword::prompt_password("Token (not shown): ").map_err(unreadable("the terminal"))?,
            )
        } else {
            read_all(io::stdin().lock(), "standard input")?
        }
    } else {
        // A token may have been given in the place of a file's name.
        let name = token::redact(&from.token_file.display().to_string());
        let file = std::fs::File::open(&from.token_file)
            .map_err(|error| Error::usage(format!("could not read the token from {name}: {error}")))?;
        read_all(file, &name)?
    };
    let trimmed = token.trim();
    if trimmed.is_empty() {
        return Err(Error::usage("there is no token in what was read")
            .with_remedy("pass it on standard input, or name its file with --token-file"));
    }
    Ok(Zeroizing::new(trimmed.to_owned()))
}

/// `name` is what is read, for messages. None of them quotes what it holds.
fn read_all(from: impl io::Read, name: &str) -> Result<Zeroizing<String>> {
    // The full capacity from the start: a reallocation would leave a copy behind.
    let mut text = Zeroizing::new(String::with_capacity(LONGEST_INPUT as usize + 1));
    from.take(LONGEST_INPUT + 1).read_to_string(&mut text).map_err(unreadable(name))?;
    if text.len() as u64 > LONGEST_INPUT {
        return Err(Error::usage(format!("{name} holds more than a token: over {LONGEST_INPUT} bytes")));
    }
    Ok(text)
}

fn unreadable(name: &str) -> impl FnOnce(io::Error) -> Error {
    move |error| Error::failed(format!("could not read the token from {name}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    #[test]
    fn a_token_is_read_whole_and_a_book_is_refused() {
        assert_eq!(read_all(&b"tgt_abc\n"[..], "x").unwrap().trim(), "tgt_abc");
        let book = vec![b'a'; 5000];
        assert_eq!(read_all(&book[..], "x").unwrap_err().kind(), Kind::Usage);
        assert!(read_all(&[0xff, 0xfe][..], "x").is_err());
    }

    #[test]
    fn a_missing_token_file_is_named() {
        let from = PresentedToken { token_file: "/nonexistent/token".into() };
        let error = read_token(&from).unwrap_err();
        assert!(error.message().contains("/nonexistent/token"), "{error}");
    }

    #[test]
    fn a_refusal_shows_only_what_is_known() {
        let document = |value: Value| serde_json::from_value::<Document>(value).unwrap();
        let refused =
            document(json!({"valid": false, "code": "NOT_FOUND", "token_id": null, "scopes": null}));
        assert_eq!(verdict(&refused), [("code", "NOT_FOUND".to_owned())]);
        let valid = document(json!({"valid": true, "code": "VALID", "user_id": "ann", "scopes": ["a", "b"],
                                    "expires_at": "2030-01-02T03:04:05+00:00"}));
        let facts = verdict(&valid);
        assert!(facts.contains(&("scopes", "a, b".to_owned())));
        assert!(facts.contains(&("expires", "2030-01-02 03:04:05Z".to_owned())));
    }
}
