//! Log lines: on standard error, for people or for machines. Standard output belongs to what a command prints.
//!
//! Each line is written by [`Lines`], which lets nothing through that a terminal would obey, and no second line.

use std::io::{self, IsTerminal as _};
use std::panic::PanicHookInfo;

use tracing::Subscriber;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

use crate::config::{LogFormat, LogOptions};
use crate::error::{Error, Result};
use crate::process::printable;

/// The target of the lines that publish events. They are what `run` is there for, so no level hides them.
pub const EVENTS: &str = "tollgate::events";

/// `default` is the level when none is given.
pub fn start(options: &LogOptions, default: &str) -> Result<()> {
    let directives = options.log_level.as_deref().unwrap_or(default);
    let ansi = io::stderr().is_terminal();
    let subscriber = subscriber(options.log_format, directives, ansi, io::stderr)?;
    // Not init(), which would also take in the records of the `log` crate if any crate in the build asks for that:
    // tokio-postgres writes bind values there.
    tracing::subscriber::set_global_default(subscriber)
        .map_err(|error| Error::failed(format!("could not set up logging: {error}")))?;
    std::panic::set_hook(Box::new(log_panic));
    Ok(())
}

fn subscriber<W>(
    format: LogFormat,
    directives: &str,
    ansi: bool,
    writer: W,
) -> Result<Box<dyn Subscriber + Send + Sync>>
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let filter = EnvFilter::try_new(with_events(directives)).map_err(|error| {
        Error::usage(format!("--log-level does not understand {directives:?}: {error}"))
            .with_remedy("give error, warn, info, debug or trace, or directives such as warn,tollgated=debug")
    })?;
    let writer = Lines { inner: writer, format, ansi: ansi && format == LogFormat::Human };
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(ansi).with_writer(writer);
    Ok(match format {
        LogFormat::Human => Box::new(builder.finish()),
        LogFormat::Json => Box::new(builder.json().flatten_event(true).with_current_span(false).finish()),
    })
}

/// Writes records, each of which is handed over whole.
struct Lines<W> {
    inner: W,
    format: LogFormat,
    ansi: bool,
}

impl<'a, W: MakeWriter<'a>> MakeWriter<'a> for Lines<W> {
    type Writer = Line<W::Writer>;

    fn make_writer(&'a self) -> Self::Writer {
        Line { inner: self.inner.make_writer(), format: self.format, ansi: self.ansi }
    }

    fn make_writer_for(&'a self, metadata: &tracing::Metadata<'_>) -> Self::Writer {
        Line { inner: self.inner.make_writer_for(metadata), format: self.format, ansi: self.ansi }
    }
}

struct Line<W> {
    inner: W,
    format: LogFormat,
    ansi: bool,
}

impl<W: io::Write> io::Write for Line<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(bytes);
        let line = text.strip_suffix('\n').unwrap_or(&text);
        let line = match self.format {
            LogFormat::Json => printable::escape_json(line),
            LogFormat::Human if self.ansi => escape_but_colours(line),
            LogFormat::Human => printable::escape(line),
        };
        self.inner.write_all(format!("{line}\n").as_bytes())?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// The colours are those of `tracing-subscriber`, which escapes what others would add.
fn escape_but_colours(line: &str) -> String {
    let mut parts = line.split("\u{1b}[");
    let mut text = printable::escape(parts.next().unwrap_or_default());
    for part in parts {
        let end = part.find(|c: char| !(c.is_ascii_digit() || c == ';')).unwrap_or(part.len());
        let colour = part[end..].starts_with('m');
        text.push_str(if colour { "\u{1b}[" } else { "\\u{1b}[" });
        text.push_str(&printable::escape(part));
    }
    text
}

/// Who names the events in a directive gets what they ask for.
fn with_events(directives: &str) -> String {
    if directives.contains(EVENTS) { directives.to_owned() } else { format!("{directives},{EVENTS}=info") }
}

/// A panic is logged like everything else, in the same format and to the same place.
fn log_panic(panic: &PanicHookInfo<'_>) {
    let place = panic.location().map(ToString::to_string).unwrap_or_default();
    tracing::error!(place, "panic: {}", panic.payload_as_str().unwrap_or("no text"));
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Buffer(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Buffer {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn logged(format: LogFormat, directives: &str, log: impl FnOnce()) -> String {
        logged_on(false, format, directives, log)
    }

    fn logged_on(terminal: bool, format: LogFormat, directives: &str, log: impl FnOnce()) -> String {
        let buffer = Buffer::default();
        let writer = buffer.clone();
        let subscriber = subscriber(format, directives, terminal, move || writer.clone()).unwrap();
        tracing::subscriber::with_default(subscriber, log);
        String::from_utf8(buffer.0.lock().unwrap().clone()).unwrap()
    }

    #[test]
    fn json_lines_have_the_fields_at_the_top() {
        let line = logged(LogFormat::Json, "info", || {
            tracing::info!(target: EVENTS, id = 7, reason = None::<&str>, event = "token.revoked");
        });
        let value: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(value["target"], EVENTS);
        assert_eq!(value["id"], 7);
        assert_eq!(value["event"], "token.revoked");
        assert!(value.get("reason").is_none());
    }

    #[test]
    fn events_are_logged_at_every_level() {
        let event = || tracing::info!(target: EVENTS, id = 7);
        let chatter = || tracing::info!("chatter");
        assert!(logged(LogFormat::Human, "error", event).contains("id=7"));
        assert_eq!(logged(LogFormat::Human, "error", chatter), "");
        assert_eq!(logged(LogFormat::Human, "info,tollgate::events=off", event), "");
    }

    #[test]
    fn a_line_cannot_be_forged_by_what_is_logged() {
        let line = logged(LogFormat::Human, "info", || {
            tracing::info!(target: EVENTS, reason = "x\n2030-01-01T00:00:00Z ERROR all is lost\u{1b}[2J");
        });
        assert_eq!(line.lines().count(), 1, "{line}");
        assert!(!line.contains('\u{1b}'), "{line:?}");
    }

    #[test]
    fn nothing_hidden_is_logged_neither_as_a_value_nor_within_a_message() {
        const OTHERS: &str = "x\ny\u{1b}[2J\u{1b}]0;owned\u{7}\u{9b}\u{202e}\u{2066}\u{200b}\u{2028}";
        let log = || tracing::warn!(name = OTHERS, error = %OTHERS, "a message: {OTHERS}");
        for format in [LogFormat::Human, LogFormat::Json] {
            let line = logged(format, "info", log);
            let body = line.strip_suffix('\n').unwrap();
            assert!(!body.chars().any(printable::is_hidden), "{line:?}");
            if format == LogFormat::Json {
                let value: serde_json::Value = serde_json::from_str(&line).unwrap();
                assert_eq!((&value["name"], &value["error"]), (&OTHERS.into(), &OTHERS.into()));
            }
        }
        let coloured = logged_on(true, LogFormat::Human, "info", log);
        assert!(coloured.contains("\u{1b}[33m"), "{coloured:?}");
        let plain = anstream::adapter::strip_str(coloured.trim_end()).to_string();
        assert!(!plain.chars().any(printable::is_hidden), "{plain:?}");
        assert!(!coloured.contains("\u{1b}[2J") && !coloured.contains("\u{1b}]"), "{coloured:?}");
    }

    #[test]
    fn a_level_that_does_not_exist_is_refused() {
        let Err(error) = subscriber(LogFormat::Human, "tollgated=loud", false, io::stderr) else {
            panic!("accepted");
        };
        assert!(error.report().contains("--log-level"), "{error}");
    }
}
