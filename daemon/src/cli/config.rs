//! `tollgated config`: the values in effect and where each is from, in the form of the configuration file.

use std::io::Write as _;

use serde_json::{Value, json};

use crate::config::sources::{Configuration, Setting, Source};
use crate::error::{Error, Result};
use crate::process::{exit, printable};

pub(super) fn config(configuration: &Configuration, as_json: bool) -> Result<u8> {
    let text = if as_json {
        // The line breaks are between the values; within them JSON has none.
        printable::escape_json_lines(&format!("{:#}\n", describe_json(configuration)))
    } else {
        describe(configuration)
    };
    std::io::stdout().write_all(text.as_bytes()).map_err(Error::output)?;
    Ok(exit::OK)
}

fn describe(configuration: &Configuration) -> String {
    let head = match &configuration.file {
        Some(file) => format!("# With {}.\n", printable::escape(&file.display().to_string())),
        None => "# Without a configuration file.\n".to_owned(),
    };
    let lines: Vec<(String, String)> = configuration.settings.iter().map(line).collect();
    let width = lines.iter().map(|(text, _)| text.chars().count()).max().unwrap_or_default();
    lines.iter().fold(head, |text, (setting, source)| format!("{text}{setting:<width$}  # {source}\n"))
}

fn line(setting: &Setting) -> (String, String) {
    let value = match &setting.values {
        None => return (format!("# {} =", setting.key), "not set".to_owned()),
        Some(values) if setting.list => {
            format!("[{}]", values.iter().map(|value| string(value)).collect::<Vec<_>>().join(", "))
        }
        Some(values) if setting.flag => is_on(values).to_string(),
        Some(values) => string(values.first().map(String::as_str).unwrap_or_default()),
    };
    (format!("{} = {value}", setting.key), source(setting))
}

fn is_on(values: &[String]) -> bool {
    values.first().is_some_and(|value| value == "true")
}

/// A string of TOML in double quotes.
fn string(text: &str) -> String {
    let quoted = text.replace('\\', "\\\\").replace('"', "\\\"");
    format!("\"{}\"", printable::escape_toml(&quoted))
}

fn source(setting: &Setting) -> String {
    match setting.source {
        Source::CommandLine => format!("command line, --{}", setting.key.replace('_', "-")),
        Source::Environment => format!("environment, {}", setting.environment),
        Source::File => "file".to_owned(),
        Source::Default => "default".to_owned(),
    }
}

fn describe_json(configuration: &Configuration) -> Value {
    let settings: Vec<Value> = configuration
        .settings
        .iter()
        .map(|setting| {
            let value = match &setting.values {
                None => Value::Null,
                Some(values) if setting.list => json!(values),
                Some(values) if setting.flag => json!(is_on(values)),
                Some(values) => json!(values.first()),
            };
            let source = match setting.source {
                Source::CommandLine => "command line",
                Source::Environment => "environment",
                Source::File => "file",
                Source::Default => "default",
            };
            json!({"key": setting.key, "environment": setting.environment, "value": value, "source": source})
        })
        .collect();
    json!({"file": configuration.file, "settings": settings})
}
