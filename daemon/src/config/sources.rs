//! Where the value of each option comes from: the command line, then the environment, then the configuration file, then the
//! default.
//!
//! The file is not a second list of options: every option that has an environment variable is also a key of the file,
//! named as on the command line with `_` for `-`. Its value becomes clap's default for the option, and is read by the same
//! parser. So an option is added in one place, `options.rs`, and the file, `tollgated config` and the list of faults know it.
//!
//! Own code around clap, and not `config` or `figment`: these know nothing of clap's parsers, and report the first fault only.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error as _;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::parser::ValueSource;
use clap::{Arg, ArgMatches, Command, CommandFactory as _, FromArgMatches as _, Id};
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
    /// Takes none: it is true or false.
    pub flag: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    CommandLine,
    Environment,
    File,
    Default,
}

/// All options of a process.
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
    let unmodified = Cli::command();
    let options = options(&unmodified);
    let arguments = without_empty(arguments.into_iter().collect(), &options);
    // Help shows the defaults, not what the file sets.
    let refuse_arguments = |error| {
        Refusal::CommandLine(unmodified.clone().try_get_matches_from(&arguments).err().unwrap_or(error))
    };
    let mut parser = Parser::new(unmodified.clone(), &options);
    let matches = parser.parse(&arguments).map_err(refuse_arguments)?;
    let mut faults = Vec::new();
    let named = text(&matches, CONFIG).map(PathBuf::from);
    let (file, entries) = read_file(named.as_deref(), &mut faults);
    let entries = known(entries, &options, file.as_deref(), &mut faults);
    parser.command = with_defaults(parser.command, &entries);
    let matches = parser.parse(&arguments).map_err(refuse_arguments)?;
    let (used, values) = innermost(&unmodified, &matches);
    for (key, why) in &parser.wrong {
        faults.push(format!("{}: {why}", source_name(&options[key], values, &entries, file.as_deref())));
    }
    check_connection(values, &mut faults);
    if !faults.is_empty() {
        return Err(Refusal::Faults(refuse(&faults)));
    }
    let settings = used.iter().map(|option| setting(option, values, &entries)).collect();
    let cli = Cli::from_arg_matches(&matches).map_err(Refusal::CommandLine)?;
    let contradictions = cli.contradictions();
    if !contradictions.is_empty() {
        return Err(Refusal::Faults(refuse(&contradictions)));
    }
    Ok(Configuration { cli, settings, file })
}

/// Finds every wrong value, where clap stops at the first: an option whose value is wrong is noted, accepts any value from then
/// on, and the command line is parsed again.
struct Parser<'a> {
    command: Command,
    options: &'a BTreeMap<String, Arg>,
    /// Keys of options, and what is wrong with the value.
    wrong: BTreeMap<String, String>,
}

impl<'a> Parser<'a> {
    fn new(command: Command, options: &'a BTreeMap<String, Arg>) -> Self {
        Self { command, options, wrong: BTreeMap::new() }
    }

    fn parse(&mut self, arguments: &[OsString]) -> Result<ArgMatches, clap::Error> {
        loop {
            let command = without_empty_variables(self.command.clone());
            let error = match command.try_get_matches_from(arguments) {
                Ok(matches) => return Ok(matches),
                Err(error) => error,
            };
            let key = wrong_option(&error).filter(|key| !self.wrong.contains_key(key));
            let Some(option) = key.as_ref().and_then(|key| self.options.get(key)) else { return Err(error) };
            let command = std::mem::take(&mut self.command);
            self.command = accepting_any_value(command, option.get_id());
            self.wrong.insert(key.unwrap_or_default(), why(option, &error));
        }
    }
}

/// The key of the option that an error is about, if a value is what is wrong.
fn wrong_option(error: &clap::Error) -> Option<String> {
    if !matches!(error.kind(), ErrorKind::InvalidValue | ErrorKind::ValueValidation) {
        return None;
    }
    // Such as `--flush-interval <TIME>`.
    let Some(ContextValue::String(usage)) = error.get(ContextKind::InvalidArg) else { return None };
    Some(usage.split(' ').next()?.strip_prefix("--")?.replace('-', "_"))
}

/// What is wrong with a value. That of a secret option is not quoted.
fn why(option: &Arg, error: &clap::Error) -> String {
    let Some(cause) = error.source() else {
        let rendered = error.render().to_string();
        let mut lines = rendered.lines().map(str::trim).filter(|line| !line.is_empty());
        let first = lines.next().unwrap_or_default();
        // The possible values.
        let second = lines.next().filter(|line| line.starts_with('[')).unwrap_or_default();
        return format!("{} {second}", first.strip_prefix("error: ").unwrap_or(first)).trim().to_owned();
    };
    match error.get(ContextKind::InvalidValue) {
        Some(ContextValue::String(value)) if !option.is_hide_env_values_set() => {
            format!("{value:?} cannot be used: {cause}")
        }
        _ => cause.to_string(),
    }
}

fn accepting_any_value(command: Command, id: &Id) -> Command {
    let has_it = command.get_arguments().any(|option| option.get_id() == id);
    let command = if has_it {
        command.mut_arg(id, |option| option.value_parser(clap::value_parser!(OsString)))
    } else {
        command
    };
    command.mut_subcommands(|subcommand| accepting_any_value(subcommand, id))
}

/// Where the value of an option is from, for messages.
fn source_name(
    option: &Arg,
    matches: &ArgMatches,
    entries: &BTreeMap<String, Entry>,
    file: Option<&Path>,
) -> String {
    let key = key(option);
    match (matches.value_source(option.get_id().as_str()), entries.get(&key)) {
        (Some(ValueSource::EnvVariable), _) => environment(option),
        (Some(ValueSource::DefaultValue), Some(entry)) => {
            format!("{}, line {}: {key}", path_text(file), entry.line)
        }
        _ => format!("--{}", option.get_long().unwrap_or_default()),
    }
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

/// An option in the file.
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

fn path_text(file: Option<&Path>) -> String {
    file.map(|path| path.display().to_string()).unwrap_or_default()
}

/// Keeps the options, and reports every other key.
fn known(
    raw: Raw,
    options: &BTreeMap<String, Arg>,
    file: Option<&Path>,
    faults: &mut Vec<String>,
) -> BTreeMap<String, Entry> {
    let mut entries = BTreeMap::new();
    for (key, value, line) in raw {
        let place = format!("{}, line {line}", path_text(file));
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

/// As on the command line.
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

/// The same command line, without variables that are set and empty: that is how Compose, Helm and systemd leave one out.
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

/// Values of the file replace the defaults.
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

/// A connection string can be checked without connecting.
fn check_connection(matches: &ArgMatches, faults: &mut Vec<String>) {
    for (url, password_file) in [("database_url", "password_file"), ("api_database_url", "api_password_file")]
    {
        let Some(url) = text(matches, url).filter(|url| !url.trim().is_empty()) else { continue };
        let password_file = text(matches, password_file).map(PathBuf::from);
        faults.extend(Target::faults(&Secret::new(url), password_file.as_deref()));
    }
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
        if id == "database_url" || id == "api_database_url" {
            values.iter().map(|url| conninfo::masked(url)).collect()
        } else if option.is_hide_env_values_set() {
            vec!["[masked]".to_owned()]
        } else {
            values
        }
    });
    Setting {
        environment: environment(option),
        list: is_list(option),
        flag: !takes_values(option),
        key,
        values,
        source,
    }
}
