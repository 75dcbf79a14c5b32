//! Where the value of each option comes from: the command line, else the environment, else the configuration file, else
//! the default.
//!
//! The file is not a second list of options: every option that has an environment variable is also a key of the file,
//! named as on the command line with `_` for `-`, and its value is read by the same parser. So an option is added in one
//! place, `config.rs`, and the file, `tollgated config` and the list of faults know it.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error as _;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use clap::parser::ValueSource;
use clap::{Arg, ArgMatches, Command, CommandFactory as _, FromArgMatches as _};
use toml::{Spanned, Value};

use crate::config::Cli;
use crate::error::Error;
use crate::postgres::conninfo;
use crate::postgres::target::Target;
use crate::secret::Secret;

/// Read when no other file is named, and only if it exists.
pub const DEFAULT_FILE: &str = "/etc/tollgated/tollgated.toml";
/// Of the one option that cannot stand in the file.
const CONFIG: &str = "config";

/// An option with its value and where that is from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// In the file; the option is the same with `--` before it and `-` for `_`.
    pub key: String,
    pub environment: String,
    /// None if nothing is set and there is no default. Secrets are masked.
    pub values: Option<Vec<String>>,
    pub source: Source,
    /// Takes several values.
    pub list: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    CommandLine,
    Environment,
    File,
    Default,
}

/// All that a process is told.
#[derive(Debug)]
pub struct Configuration {
    pub cli: Cli,
    pub settings: Vec<Setting>,
    /// The configuration file, if there is one.
    pub file: Option<PathBuf>,
}

/// Why there is nothing to run.
#[derive(Debug)]
pub enum Refusal {
    /// The command line cannot be understood, or asks for help, which clap writes.
    CommandLine(clap::Error),
    /// Some values are wrong.
    Faults(Error),
}

/// Reads the command line, the environment and the file.
pub fn load(arguments: impl IntoIterator<Item = OsString>) -> Result<Configuration, Refusal> {
    let strict = Cli::command();
    let options = options(&strict);
    let arguments = without_empty(arguments.into_iter().collect(), &options);
    // First without looking at the values, so that one that is wrong does not hide the others.
    let given = without_empty_variables(lenient(strict.clone())).try_get_matches_from(&arguments).map_err(
        |error| {
            // The help of the command line as it is, not as it was bent.
            Refusal::CommandLine(strict.clone().try_get_matches_from(&arguments).err().unwrap_or(error))
        },
    )?;
    let mut faults = Vec::new();
    let named = text(&given, CONFIG).map(PathBuf::from);
    let (file, entries) = read_file(named.as_deref(), &mut faults);
    let entries = known(entries, &options, file.as_deref(), &mut faults);
    let (used, matches) = innermost(&strict, &given);
    for option in used {
        check_given(&option, matches, &mut faults);
    }
    for (key, entry) in &entries {
        for value in &entry.values {
            if let Err(why) = check(&options[key], OsStr::new(value)) {
                faults.push(format!("{}, line {}: {key}: {why}", place(file.as_deref()), entry.line));
            }
        }
    }
    check_connection(matches, &entries, &mut faults);
    if !faults.is_empty() {
        return Err(Refusal::Faults(refuse(&faults)));
    }
    let layered = without_empty_variables(with_defaults(strict.clone(), &entries));
    let matches = layered.try_get_matches_from(&arguments).map_err(Refusal::CommandLine)?;
    let settings = {
        let (used, matches) = innermost(&strict, &matches);
        used.iter().map(|option| setting(option, matches, &entries)).collect()
    };
    let cli = Cli::from_arg_matches(&matches).map_err(Refusal::CommandLine)?;
    let contradictions = cli.contradictions();
    if !contradictions.is_empty() {
        return Err(Refusal::Faults(refuse(&contradictions)));
    }
    Ok(Configuration { cli, settings, file })
}

fn refuse(faults: &[String]) -> Error {
    let message = match faults {
        [fault] => format!("the configuration is wrong: {fault}"),
        _ => format!("the configuration is wrong in {} places:\n  {}", faults.len(), faults.join("\n  ")),
    };
    Error::usage(message).with_remedy(
        "nothing was tried; `tollgated config` prints the values in effect and where they are from",
    )
}

/// What the file says of one option.
#[derive(Debug)]
struct Entry {
    values: Vec<String>,
    line: usize,
}

/// Key, value and line of everything in the file.
type Raw = Vec<(String, Value, usize)>;

fn read_file(named: Option<&Path>, faults: &mut Vec<String>) -> (Option<PathBuf>, Raw) {
    let path = match named {
        // The way to say: no file at all.
        Some(path) if path.as_os_str().is_empty() => return (None, Raw::new()),
        Some(path) => path,
        None => Path::new(DEFAULT_FILE),
    };
    let content = match std::fs::read_to_string(path) {
        Ok(content) => content,
        Err(error) if named.is_none() && error.kind() == std::io::ErrorKind::NotFound => {
            return (None, Raw::new());
        }
        Err(error) => {
            faults.push(format!("cannot read the configuration file {}: {error}", path.display()));
            return (Some(path.to_owned()), Raw::new());
        }
    };
    let line = |offset: usize| content[..offset.min(content.len())].matches('\n').count() + 1;
    let raw = match toml::from_str::<BTreeMap<Spanned<String>, Value>>(&content) {
        Ok(table) => table
            .into_iter()
            .map(|(key, value)| {
                let line = line(key.span().start);
                (key.into_inner(), value, line)
            })
            .collect(),
        Err(error) => {
            // Not as it prints itself: it quotes the line, which may hold a password.
            let line = error.span().map(|span| format!(", line {}", line(span.start))).unwrap_or_default();
            faults.push(format!("{}{line}: this is not TOML: {}", path.display(), error.message().trim()));
            Raw::new()
        }
    };
    (Some(path.to_owned()), raw)
}

fn place(file: Option<&Path>) -> String {
    file.map(|path| path.display().to_string()).unwrap_or_default()
}

/// Keeps what is an option, and complains of the rest.
fn known(
    raw: Raw,
    options: &BTreeMap<String, Arg>,
    file: Option<&Path>,
    faults: &mut Vec<String>,
) -> BTreeMap<String, Entry> {
    let mut entries = BTreeMap::new();
    for (key, value, line) in raw {
        let place = format!("{}, line {line}", place(file));
        let Some(option) = options.get(&key) else {
            let near = options
                .keys()
                .map(|option| (strsim::jaro_winkler(option, &key), option))
                .filter(|(likeness, _)| *likeness > 0.85)
                .max_by(|one, other| one.0.total_cmp(&other.0));
            let advice = near.map(|(_, option)| format!(", but there is {option}")).unwrap_or_default();
            faults.push(format!("{place}: there is no option {key}{advice}"));
            continue;
        };
        match values(&value, option) {
            Ok(values) => {
                entries.insert(key, Entry { values, line });
            }
            Err(why) => faults.push(format!("{place}: {key}: {why}")),
        }
    }
    entries
}

/// As the command line would have it.
fn values(value: &Value, option: &Arg) -> Result<Vec<String>, String> {
    let one = |value: &Value| match value {
        Value::String(text) => Ok(text.clone()),
        Value::Integer(number) => Ok(number.to_string()),
        Value::Float(number) => Ok(number.to_string()),
        Value::Boolean(truth) if !takes_values(option) => Ok(truth.to_string()),
        other => Err(format!("a {} does not fit here", other.type_str())),
    };
    match value {
        Value::Array(list) if is_list(option) => list.iter().map(one).collect(),
        value if takes_values(option) || value.is_bool() => Ok(vec![one(value)?]),
        _ => Err("it is true or false".to_owned()),
    }
}

/// The options that can be set in the file, by key.
fn options(command: &Command) -> BTreeMap<String, Arg> {
    command
        .get_arguments()
        .chain(command.get_subcommands().flat_map(Command::get_arguments))
        .filter(|option| is_configurable(option))
        .map(|option| (key(option), option.clone()))
        .collect()
}

fn is_configurable(option: &Arg) -> bool {
    option.get_env().is_some() && option.get_long().is_some() && option.get_id() != CONFIG
}

fn takes_values(option: &Arg) -> bool {
    option.get_action().takes_values()
}

fn is_list(option: &Arg) -> bool {
    matches!(option.get_action(), clap::ArgAction::Append)
}

fn key(option: &Arg) -> String {
    option.get_long().unwrap_or_default().replace('-', "_")
}

/// The options of the command that was given, the global ones first, and its values.
fn innermost<'a>(command: &Command, matches: &'a ArgMatches) -> (Vec<Arg>, &'a ArgMatches) {
    let mut used: Vec<Arg> =
        command.get_arguments().filter(|option| is_configurable(option)).cloned().collect();
    let (mut command, mut matches) = (command, matches);
    while let Some((name, inner)) = matches.subcommand() {
        let Some(subcommand) = command.find_subcommand(name) else { break };
        used.extend(subcommand.get_arguments().filter(|option| is_configurable(option)).cloned());
        (command, matches) = (subcommand, inner);
    }
    (used, matches)
}

/// The command line without the options whose value is empty, which counts as no value. `--config ''` stays: no file at all.
///
/// An option that is not configurable is left alone: an empty reason, say, is for the command to judge.
fn without_empty(arguments: Vec<OsString>, options: &BTreeMap<String, Arg>) -> Vec<OsString> {
    let longs: BTreeSet<OsString> = options
        .values()
        .filter(|option| takes_values(option))
        .map(|option| OsString::from(format!("--{}", option.get_long().unwrap_or_default())))
        .collect();
    let mut kept = Vec::with_capacity(arguments.len());
    let mut rest = arguments.into_iter().peekable();
    while let Some(argument) = rest.next() {
        if argument == "--" {
            kept.push(argument);
            kept.extend(rest);
            break;
        }
        if longs.contains(&argument) && rest.next_if(|value| value.is_empty()).is_some() {
            continue;
        }
        let is_empty = argument
            .to_str()
            .and_then(|text| text.strip_suffix('='))
            .is_some_and(|long| longs.contains(OsStr::new(long)));
        if !is_empty {
            kept.push(argument);
        }
    }
    kept
}

/// The same command line, which does not look at variables that are set and empty: that is how Compose, Helm and systemd say
/// that there is none.
fn without_empty_variables(command: Command) -> Command {
    let is_empty = |option: &&Arg| {
        option.get_env().is_some_and(|name| std::env::var_os(name).is_some_and(|value| value.is_empty()))
    };
    let ids: Vec<_> =
        command.get_arguments().filter(is_empty).map(|option| option.get_id().clone()).collect();
    let command =
        ids.into_iter().fold(command, |command, id| command.mut_arg(id, |option| option.env(None::<&str>)));
    command.mut_subcommands(without_empty_variables)
}

/// The same command line with any value allowed.
fn lenient(command: Command) -> Command {
    let ids: Vec<_> = command
        .get_arguments()
        .filter(|option| is_configurable(option) && takes_values(option))
        .map(|option| option.get_id().clone())
        .collect();
    let command = ids.into_iter().fold(command, |command, id| {
        command.mut_arg(id, |option| option.value_parser(clap::value_parser!(OsString)))
    });
    command.mut_subcommands(lenient)
}

/// What the file says takes the place of the defaults.
fn with_defaults(command: Command, entries: &BTreeMap<String, Entry>) -> Command {
    let found: Vec<_> = command
        .get_arguments()
        .filter(|option| is_configurable(option))
        .filter_map(|option| Some((option.get_id().clone(), entries.get(&key(option))?.values.clone())))
        .collect();
    let command = found
        .into_iter()
        .fold(command, |command, (id, values)| command.mut_arg(id, |option| option.default_values(values)));
    command.mut_subcommands(|subcommand| with_defaults(subcommand, entries))
}

/// Checks what the command line or the environment says of one option.
fn check_given(option: &Arg, matches: &ArgMatches, faults: &mut Vec<String>) {
    let id = option.get_id().as_str();
    let name = match matches.value_source(id) {
        Some(ValueSource::CommandLine) => format!("--{}", option.get_long().unwrap_or_default()),
        Some(ValueSource::EnvVariable) => environment(option),
        _ => return,
    };
    if !takes_values(option) {
        return;
    }
    for value in matches.get_raw(id).into_iter().flatten() {
        if let Err(why) = check(option, value) {
            faults.push(format!("{name}: {why}"));
        }
    }
}

/// Reads a value as the command line would.
fn check(option: &Arg, value: &OsStr) -> Result<(), String> {
    if !takes_values(option) {
        return Ok(());
    }
    let mut argument = OsString::from(format!("--{}=", option.get_long().unwrap_or_default()));
    argument.push(value);
    let alone = option
        .clone()
        .env(None::<&str>)
        .global(false)
        .required(false)
        .conflicts_with(clap::builder::Resettable::Reset);
    let result = Command::new("tollgated").no_binary_name(true).arg(alone).try_get_matches_from([argument]);
    let Err(error) = result else { return Ok(()) };
    let why = match error.source() {
        Some(cause) => cause.to_string(),
        None => {
            let rendered = error.render().to_string();
            let mut lines = rendered.lines().map(str::trim).filter(|line| !line.is_empty());
            let first = lines.next().unwrap_or_default();
            let first = first.strip_prefix("error: ").unwrap_or(first);
            // The possible values.
            let second = lines.next().filter(|line| line.starts_with('[')).unwrap_or_default();
            return Err(format!("{first} {second}").trim().to_owned());
        }
    };
    if option.is_hide_env_values_set() {
        return Err(why);
    }
    Err(format!("{:?} cannot be used: {why}", value.to_string_lossy()))
}

/// What is wrong with the connection string shows without connecting.
fn check_connection(matches: &ArgMatches, entries: &BTreeMap<String, Entry>, faults: &mut Vec<String>) {
    let value = |id: &str| {
        let from_file = || entries.get(id).and_then(|entry| entry.values.first().cloned());
        text(matches, id).or_else(from_file)
    };
    let Some(url) = value("database_url") else { return };
    let password_file = value("password_file").map(PathBuf::from);
    faults.extend(Target::faults(&Secret::new(url), password_file.as_deref()));
}

fn text(matches: &ArgMatches, id: &str) -> Option<String> {
    let value = matches.try_get_raw(id).ok()??.next()?;
    Some(value.to_string_lossy().into_owned())
}

fn environment(option: &Arg) -> String {
    option.get_env().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

fn setting(option: &Arg, matches: &ArgMatches, entries: &BTreeMap<String, Entry>) -> Setting {
    let id = option.get_id().as_str();
    let key = key(option);
    let raw =
        matches.get_raw(id).map(|values| values.map(|value| value.to_string_lossy().into_owned()).collect());
    let source = match matches.value_source(id) {
        Some(ValueSource::CommandLine) => Source::CommandLine,
        Some(ValueSource::EnvVariable) => Source::Environment,
        _ if entries.contains_key(&key) => Source::File,
        _ => Source::Default,
    };
    let values = raw.map(|values: Vec<String>| {
        if id == "database_url" {
            values.iter().map(|url| conninfo::masked(url)).collect()
        } else if option.is_hide_env_values_set() {
            vec!["[masked]".to_owned()]
        } else {
            values
        }
    });
    Setting { environment: environment(option), list: is_list(option), key, values, source }
}
