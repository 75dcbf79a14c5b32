//! `tollgated token …`: tokens by hand.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal as _, Read as _};
use std::path::Path;

use serde_json::value::RawValue;
use serde_json::{Value, json};
use tollgate_core::token;
use zeroize::Zeroizing;

use super::list::List;
use crate::app::tokens;
use crate::app::tokens::{Changes, Ending, Filter, NewToken, Revocation, Search};
use crate::cli::output;
use crate::cli::output::{Column, Tone};
use crate::config::{
    Clearable, CreateOptions, DeriveOptions, EnabledOptions, ListOptions, OutputOptions, RevokeOptions,
    RotateOptions, ShowOptions, TokenCommand, TokenStatus, UpdateOptions, VerifyOptions,
};
use crate::contract::document::Document;
use crate::error::{Error, Result};
use crate::postgres::target::Target;
use crate::process::exit;

/// Far beyond the longest token; a larger file is not one that holds a token.
const LONGEST_INPUT: u64 = 16 * 1024;

pub(super) async fn token(target: Target, command: TokenCommand) -> Result<u8> {
    match command {
        TokenCommand::Create(options) => create(target, options).await,
        TokenCommand::List(options) => list(target, options).await,
        TokenCommand::Verify(options) => verify(target, options).await,
        TokenCommand::Show(options) => show(target, options).await,
        TokenCommand::Update(options) => update(target, options).await,
        TokenCommand::Revoke(options) => revoke(target, options).await,
        TokenCommand::Rotate(options) => rotate(target, options).await,
        TokenCommand::Derive(options) => derive(target, options).await,
        TokenCommand::Disable(options) => set_enabled(target, options, false).await,
        TokenCommand::Enable(options) => set_enabled(target, options, true).await,
        TokenCommand::Import(options) => super::import::import(target, options).await,
    }
}

/// Prints a token at the only time that it can be.
pub(super) fn hand_out(issued: &Value, output: &OutputOptions) -> Result<()> {
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
    let new = NewToken {
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
    };
    let issued = tokens::create(&session, &new).await?;
    hand_out(&issued, &options.output)?;
    Ok(exit::OK)
}

async fn list(target: Target, options: ListOptions) -> Result<u8> {
    const COLUMNS: [Column; 10] = [
        Column::whole("ID"),
        Column::cut("USER"),
        Column::cut("NAME"),
        Column::whole("HINT"),
        Column::whole("STATUS"),
        Column::whole("EXPIRES"),
        Column::spare("LAST USED"),
        Column::spare("USES"),
        Column::spare("DENIALS"),
        Column::cut("SCOPES"),
    ];
    let row = |token: &Document| {
        [
            token.field("id"),
            token.field("user_id"),
            token.field("name"),
            token.field("hint"),
            token.field("status"),
            token.moment("expires_at"),
            token.moment("last_used_at"),
            token.field("use_count"),
            token.field("denied_count"),
            token.field("scopes"),
        ]
    };
    let ListOptions { user, hint, name, status, limit, after, output } = options;
    let session = target.connect().await?;
    let none = match &user {
        Some(user) => format!("{user} has no tokens"),
        None => "there are no tokens".to_owned(),
    };
    let filter = Filter { hint, name, status: status.map(TokenStatus::as_str) };
    let nothing =
        if filter.is_empty() && after.is_none() { none } else { "there are no such tokens".to_owned() };
    let rows = tokens::list(&session, Search { user, filter, limit, after });
    let list = List { key: "id", columns: COLUMNS, row, tone: status_tone };
    match list.print(rows, &output).await? {
        None if output.is_for_people() => output::line(nothing)?,
        Some(last) if output.is_for_people() && Some(last.count) == limit => {
            eprintln!("There may be more: --after {} begins there.", last.key);
        }
        _ => {}
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
    let Some(token) = tokens::show(&session, options.id).await? else {
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

/// What is known of a token, what people ask first at the top; what does not apply to it is left out.
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
        let value = match key {
            "rate_window" => token.duration(key),
            _ if key.ends_with("_at") => token.moment(key),
            _ => token.field(key),
        };
        (name, value)
    })
    .collect()
}

async fn rotate(target: Target, options: RotateOptions) -> Result<u8> {
    let session = target.connect().await?;
    let ending = Ending { expires_in: options.expires_in, expires_at: options.expires_at };
    let issued =
        tokens::rotate(&session, options.id, options.grace, &ending, options.revoke_on_reuse).await?;
    hand_out(&issued, &options.output)?;
    Ok(exit::OK)
}

async fn derive(target: Target, options: DeriveOptions) -> Result<u8> {
    let parent = read_token(&options.parent.token_file)?;
    let session = target.connect().await?;
    let networks = (!options.allowed_ips.is_empty()).then_some(options.allowed_ips.as_slice());
    let ending = Ending { expires_in: options.expires_in, expires_at: options.expires_at };
    let issued = tokens::derive(&session, &parent, &options.name, &options.scopes, &ending, networks).await?;
    hand_out(&issued, &options.output)?;
    Ok(exit::OK)
}

async fn update(target: Target, options: UpdateOptions) -> Result<u8> {
    let changes = changes(&options)?;
    let session = target.connect().await?;
    let token = tokens::update(&session, options.id, &changes).await?;
    if options.output.json {
        output::json(&token)?;
    } else if !options.output.quiet {
        output::line(output::facts(&known(&token)))?;
    }
    Ok(exit::OK)
}

/// What was named, as `tollgate.update_api_token` takes it.
fn changes(options: &UpdateOptions) -> Result<Changes> {
    let mut fields: BTreeMap<&str, Box<RawValue>> = BTreeMap::new();
    let mut set = |key: &'static str, value: Value| {
        // A value of ours is always JSON.
        if let Ok(value) = serde_json::value::to_raw_value(&value) {
            fields.insert(key, value);
        }
    };
    if let Some(name) = &options.name {
        set("name", json!(name));
    }
    if !options.scopes.is_empty() {
        set("scopes", json!(options.scopes));
    }
    if let Some(time) = options.expires_at {
        set("expires_at", json!(time.to_string()));
    }
    if !options.allowed_ips.is_empty() {
        set("allowed_ips", json!(options.allowed_ips));
    }
    if let Some(limit) = options.rate_limit {
        set("rate_limit", json!(limit));
    }
    if let Some(window) = options.rate_window {
        set("rate_window", json!(format!("{} seconds", window.as_secs_f64())));
    }
    // The text itself, since numbers of ours do not hold all that the server's do.
    if let Some(metadata) = options.metadata.as_deref().and_then(|text| serde_json::from_str(text).ok()) {
        fields.insert("metadata", metadata);
    }
    for clear in &options.clear {
        let key = match clear {
            Clearable::Scopes => "scopes",
            Clearable::Expiry => "expires_at",
            Clearable::Metadata => "metadata",
            Clearable::AllowedIps => "allowed_ips",
            Clearable::RateLimit => "rate_limit",
        };
        if (*clear == Clearable::Expiry && options.expires_in.is_some())
            || fields.insert(key, RawValue::NULL.to_owned()).is_some()
        {
            return Err(Error::usage(format!("--clear names what is also set: {}", key.replace('_', " ")))
                .with_remedy("either set it or clear it"));
        }
    }
    let fields = serde_json::to_string(&fields)
        .map_err(|error| Error::failed(format!("could not write JSON: {error}")))?;
    Ok(Changes { fields, expires_in: options.expires_in })
}

async fn set_enabled(target: Target, options: EnabledOptions, enabled: bool) -> Result<u8> {
    let session = target.connect().await?;
    let changed = tokens::set_enabled(&session, options.id, enabled, options.reason.as_deref()).await?;
    let word = if enabled { "enabled" } else { "disabled" };
    let otherwise = format!("nothing was {word}: there is no such token, or it is {word} already");
    output::changed(&options.output, word, changed, &otherwise)
}

async fn verify(target: Target, options: VerifyOptions) -> Result<u8> {
    let presented = read_token(&options.token.token_file)?;
    let session = target.connect().await?;
    let scopes = (!options.scopes.is_empty()).then_some(options.scopes.as_slice());
    let verification =
        tokens::verify(&session, &presented, options.foreign, scopes, options.client_ip).await?;
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
            let value = match key {
                "expires_at" => verification.moment(key),
                "retry_after" => verification.duration(key),
                _ => verification.field(key),
            };
            facts.push((name, value));
        }
    }
    facts
}

async fn revoke(target: Target, options: RevokeOptions) -> Result<u8> {
    let presented = options.presented.as_deref().map(read_token).transpose()?;
    let reason = options.reason.as_deref();
    let user = options.user.as_deref();
    let (what, otherwise) = match (&presented, options.id, user) {
        (Some(token), ..) => {
            (Revocation::Presented(token), "nothing to revoke: the token is unknown or revoked already")
        }
        (None, Some(id), None) => {
            (Revocation::Token { id, user }, "nothing to revoke: no such token, or it is revoked already")
        }
        (None, Some(id), Some(_)) => (
            Revocation::Token { id, user },
            "nothing to revoke: that user has no such token, or it is revoked already",
        ),
        (None, None, user) => {
            return revoke_all(target, user.unwrap_or_default(), reason, &options.output).await;
        }
    };
    let session = target.connect().await?;
    let revoked = tokens::revoke(&session, what, reason).await? > 0;
    output::changed(&options.output, "revoked", revoked, otherwise)
}

/// Revokes all API tokens of a user.
async fn revoke_all(target: Target, user: &str, reason: Option<&str>, output: &OutputOptions) -> Result<u8> {
    let session = target.connect().await?;
    let revoked = tokens::revoke(&session, Revocation::User(user), reason).await?;
    if output.json {
        output::json(&json!({ "revoked": revoked }))?;
    } else if !output.quiet {
        output::line(match revoked {
            0 => format!("nothing to revoke: {user} has no token that is not revoked"),
            1 => format!("revoked 1 token of {user}"),
            _ => format!("revoked {revoked} tokens of {user}"),
        })?;
    }
    Ok(if revoked > 0 { exit::OK } else { exit::NO })
}

fn read_token(from: &Path) -> Result<Zeroizing<String>> {
    read_secret(from, "token", "Token (not shown): ")
}

/// Reads what must not be an argument: `what` it is, for messages.
pub(super) fn read_secret(from: &Path, what: &str, prompt: &str) -> Result<Zeroizing<String>> {
    let text = if from == Path::new("-") {
        if io::stdin().is_terminal() {
            Zeroizing::new(rpassword::prompt_password(prompt).map_err(unreadable("the terminal"))?)
        } else {
            read_all(io::stdin().lock(), "standard input")?
        }
    } else {
        // A token may have been given in the place of a file's name.
        let name = token::redact(&from.display().to_string());
        let file = std::fs::File::open(from)
            .map_err(|error| Error::usage(format!("could not read the {what} from {name}: {error}")))?;
        read_all(file, &name)?
    };
    let trimmed = text.trim();
    if trimmed.is_empty() {
        return Err(Error::usage(format!("there is no {what} in what was read"))
            .with_remedy("pass it on standard input, or name the file that holds it"));
    }
    Ok(Zeroizing::new(trimmed.to_owned()))
}

/// `name` is what is read, for messages. None of them quotes what it holds.
fn read_all(from: impl io::Read, name: &str) -> Result<Zeroizing<String>> {
    // The full capacity from the start: a reallocation would leave a copy behind.
    let mut text = Zeroizing::new(String::with_capacity(LONGEST_INPUT as usize + 1));
    from.take(LONGEST_INPUT + 1).read_to_string(&mut text).map_err(unreadable(name))?;
    if text.len() as u64 > LONGEST_INPUT {
        return Err(Error::usage(format!("{name} holds over {LONGEST_INPUT} bytes, which is too much")));
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
        let book = vec![b'a'; 20_000];
        assert_eq!(read_all(&book[..], "x").unwrap_err().kind(), Kind::Usage);
        assert!(read_all(&[0xff, 0xfe][..], "x").is_err());
    }

    #[test]
    fn a_missing_token_file_is_named() {
        let error = read_token(Path::new("/nonexistent/token")).unwrap_err();
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
