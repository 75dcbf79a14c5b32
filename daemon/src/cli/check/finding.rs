//! What `check` finds: a verdict on one aspect of a deployment, and the command that fixes it.

use std::borrow::Cow;

use serde::Serialize;

use crate::cli::output;
use crate::cli::output::{Text, Tone};
use crate::contract::Health;
use crate::error::Error;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Verdict {
    Ok,
    /// Works, but not as one would wish.
    Warn,
    /// The daemon cannot do its work.
    Fail,
}

#[derive(Debug, PartialEq, Serialize)]
pub(super) struct Finding {
    pub(super) name: Cow<'static, str>,
    pub(super) verdict: Verdict,
    pub(super) detail: String,
    /// The command that fixes it.
    pub(super) remedy: Option<String>,
}

impl Finding {
    pub(super) fn ok(name: &'static str, detail: impl Into<String>) -> Self {
        Self { name: name.into(), verdict: Verdict::Ok, detail: detail.into(), remedy: None }
    }

    pub(super) fn warn(name: &'static str, detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { name: name.into(), verdict: Verdict::Warn, detail: detail.into(), remedy: Some(remedy.into()) }
    }

    pub(super) fn fail(name: &'static str, detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { name: name.into(), verdict: Verdict::Fail, detail: detail.into(), remedy: Some(remedy.into()) }
    }

    pub(super) fn error(name: &'static str, error: &Error) -> Self {
        let remedy = error.remedy().or(error.hint()).map(str::to_owned);
        Self { name: name.into(), verdict: Verdict::Fail, detail: error.message().to_owned(), remedy }
    }
}

impl From<Health> for Finding {
    fn from(health: Health) -> Self {
        let verdict = match health.severity.as_str() {
            "ok" => Verdict::Ok,
            "fail" => Verdict::Fail,
            // A severity that only a later version knows: showing it is better than dropping it.
            _ => Verdict::Warn,
        };
        Self { name: health.aspect.into(), verdict, detail: health.detail, remedy: health.remedy }
    }
}

/// One line, and one more for each command.
pub(super) fn describe(finding: &Finding) -> Text {
    let verdict = match finding.verdict {
        Verdict::Ok => output::painted("ok  ", Tone::Good),
        Verdict::Warn => output::painted("warn", Tone::Doubtful),
        Verdict::Fail => output::painted("FAIL", Tone::Bad),
    };
    let first = verdict.and(format!("  {:13}  {}", finding.name, finding.detail));
    let commands = finding.remedy.iter().flat_map(|remedy| remedy.lines());
    commands.fold(first, |text, line| text.then(format!("      {:13}  to fix it: {line}", "")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finding_is_one_line_and_one_more_for_each_command_that_fixes_it() {
        let line = describe(&Finding::ok("server", "fine"));
        assert_eq!(anstream::adapter::strip_str(line.as_str()).to_string(), "ok    server         fine");
        let text = describe(&Finding::fail("role", "bad", "one;\ntwo;"));
        assert_eq!(text.as_str().lines().count(), 3);
        assert!(text.as_str().lines().skip(1).all(|line| line.contains("to fix it: ")));
    }
}
