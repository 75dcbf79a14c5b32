//! Documents whose SQL is run: their blocks, and whether psql's answers match.

use std::io::{Read as _, Write as _};
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context as _, Result, ensure};
use tollgate_tests::{Cluster, DATABASE, TOLLGATED_VAR};

/// Starts a line of a block that shows a line of the answer. In it, `…` matches anything.
const ANSWER: &str = "--> ";
/// Printed by psql before the answers to each script.
const BLOCK: &str = "-- block";
/// Lines of an error or a notice after its first, which documents leave out.
const FURTHER: [&str; 3] = ["DETAIL: ", "HINT: ", "LOCATION: "];

/// The contents of the blocks fenced as a language.
pub(crate) fn blocks<'a>(document: &'a str, language: &str) -> Vec<&'a str> {
    document
        .split(&format!("```{language}\n"))
        .skip(1)
        .filter_map(|rest| rest.split_once("\n```"))
        .map(|(block, _)| block)
        .collect()
}

/// Runs the scripts in order, in one psql session as `make psql` opens it, and returns the lines that each answered, in
/// the form that documents show.
pub(crate) fn run<'a>(
    cluster: &Cluster,
    scripts: impl IntoIterator<Item = &'a str>,
) -> Result<Vec<Vec<String>>> {
    let mut script = String::from("\\set VERBOSITY verbose\n\\set SHOW_CONTEXT never\n");
    for block in scripts {
        script.push_str(&format!("\\echo {BLOCK}\n{block}\n"));
    }
    let tollgated = std::env::var_os(TOLLGATED_VAR).with_context(|| format!("{TOLLGATED_VAR} is not set"))?;
    let path = std::env::join_paths(
        Path::new(&tollgated)
            .parent()
            .map(Path::to_owned)
            .into_iter()
            .chain(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())),
    )?;
    // One pipe, so that errors appear where they occurred.
    let (mut reader, writer) = std::io::pipe()?;
    let mut psql = cluster.program("psql");
    psql.args(["--no-psqlrc", "--quiet", "--no-align", "--tuples-only", "--field-separator", " | "])
        .env("PATH", path)
        .env("DATABASE_URL", cluster.url("postgres", DATABASE))
        .stdin(Stdio::piped())
        .stdout(writer.try_clone()?)
        .stderr(writer);
    let mut child = psql.spawn().context("cannot run psql")?;
    // It holds the ends of the pipe that psql writes to.
    drop(psql);
    let mut stdin = child.stdin.take().context("a pipe was asked for")?;
    let feeder = std::thread::spawn(move || stdin.write_all(script.as_bytes()));
    let mut output = String::new();
    reader.read_to_string(&mut output)?;
    let status = child.wait()?;
    ensure!(status.success(), "psql ended with {status}: {output}");
    feeder.join().map_err(|_| anyhow::anyhow!("the feeder panicked"))??;

    let is_answer =
        |line: &&str| !line.trim().is_empty() && !FURTHER.iter().any(|prefix| line.starts_with(prefix));
    Ok(output
        .split(&format!("{BLOCK}\n"))
        .skip(1)
        .map(|answer| answer.lines().filter(is_answer).map(str::to_owned).collect())
        .collect())
}

/// Panics unless the answer of a block has the lines that it shows.
#[track_caller]
pub(crate) fn assert_answered(block: &str, answer: &[String]) {
    let shown: Vec<&str> = block.lines().filter_map(|line| line.strip_prefix(ANSWER)).collect();
    let same = shown.len() == answer.len()
        && answer.iter().zip(&shown).all(|(line, shown)| is_as_shown(line, shown));
    assert!(same, "this block:\n{block}\n\nanswers:\n{}", answer.join("\n"));
}

/// Whether a line matches the shown one, ignoring spaces at both ends.
fn is_as_shown(line: &str, shown: &str) -> bool {
    let mut parts = shown.trim().split('…');
    let Some(mut rest) = line.trim().strip_prefix(parts.next().unwrap_or_default()) else { return false };
    let mut open = false;
    for part in parts {
        open = true;
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    rest.is_empty() || (open && shown.trim().ends_with('…'))
}

#[test]
fn a_shown_line_matches_itself_and_what_its_ellipsis_stands_for() {
    assert!(is_as_shown("f | EXPIRED | ", "f | EXPIRED |"));
    assert!(is_as_shown("tgt_abc", "tgt_…"));
    assert!(is_as_shown("a 1 b 2", "a … b …"));
    assert!(!is_as_shown("tgt_abc", "tgt_"));
    assert!(!is_as_shown("t | VALID", "f | …"));
    assert!(!is_as_shown("a 1 c", "a … b"));
}
