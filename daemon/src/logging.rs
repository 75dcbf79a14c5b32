//! Log lines: on standard error, for people or for machines. Standard output belongs to what a command prints.

use std::io::{self, IsTerminal as _};
use std::panic::PanicHookInfo;

use tracing::Subscriber;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

use crate::config::{LogFormat, LogOptions};
use crate::error::{Error, Result};

/// The target of the lines that tell of events. They are what `run` is there for, so no level hides them.
pub const EVENTS: &str = "tollgate::events";

/// `default` is the level when none is given.
pub fn start(options: &LogOptions, default: &str) -> Result<()> {
    let directives = options.log_level.as_deref().unwrap_or(default);
    let subscriber = subscriber(options.log_format, directives, io::stderr().is_terminal(), io::stderr)?;
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
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(ansi).with_writer(writer);
    Ok(match format {
        LogFormat::Human => Box::new(builder.finish()),
        LogFormat::Json => Box::new(builder.json().flatten_event(true).with_current_span(false).finish()),
    })
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
        let buffer = Buffer::default();
        let writer = buffer.clone();
        let subscriber = subscriber(format, directives, false, move || writer.clone()).unwrap();
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
    fn a_level_that_does_not_exist_is_refused() {
        let Err(error) = subscriber(LogFormat::Human, "tollgated=loud", false, io::stderr) else {
            panic!("accepted");
        };
        assert!(error.report().contains("--log-level"), "{error}");
    }
}
