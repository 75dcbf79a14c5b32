//! `make bench` works: each of its parts runs once, at sizes so small that its figures mean nothing, but must be there
//! and consistent.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tollgate_tests::PG_CONFIG_VAR;

fn bench() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bench"));
    command.env("RUST_LIB_BACKTRACE", "0");
    command
}

/// Its output, if it succeeds.
fn output(command: &mut Command) -> Result<String> {
    let output = command.output()?;
    ensure!(output.status.success(), "{}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

fn unit(figure: &Value) -> &str {
    figure["unit"].as_str().unwrap_or_default()
}

fn names_of_parts() -> Result<Vec<String>> {
    let list = output(bench().args(["run", "--list"]))?;
    Ok(list.lines().filter_map(|line| Some(line.split_whitespace().next()?.to_owned())).collect())
}

#[test]
#[ignore = "long: 45 s"]
fn every_part_of_the_benchmark_runs_and_reports_its_figures() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let json = directory.path().join("bench.json");
    let pg_config = std::env::var(PG_CONFIG_VAR).context(PG_CONFIG_VAR)?;
    let table = output(bench().args(["run", "--quick", "--pg-config", &pg_config, "--json"]).arg(&json))?;

    let report: Value = serde_json::from_slice(&std::fs::read(&json)?)?;
    let parts = report["versions"][0]["parts"].as_array().context("parts")?;
    let names: Vec<&str> = parts.iter().filter_map(|part| part["part"].as_str()).collect();
    assert_eq!(names, names_of_parts()?);
    for part in parts {
        let figures = part["figures"].as_array().context("figures")?;
        assert!(figures.iter().any(|figure| !figure["target"].is_null()), "no target in {part}");
        for figure in figures {
            let what = figure["what"].as_str().context("a name")?;
            let number =
                |name: &str| figure[name].as_f64().with_context(|| format!("{what} was not measured"));
            let (min, median, max) = (number("min")?, number("median")?, number("max")?);
            assert!(min <= median && median <= max && max.is_finite(), "{what}: {figure}");
            // Zero means that no work was done. A time may be the difference of two, which at these sizes is noise.
            if ["ratio", "per_second"].contains(&unit(figure)) {
                assert!(min > 0.0, "{what}: {figure}");
            }
            assert!(table.contains(what), "{what} is not in the table:\n{table}");
        }
    }
    // Its figures must not get into the document.
    let document = directory.path().join("performance.md");
    std::fs::write(&document, "untouched")?;
    output(bench().arg("report").arg("--json").arg(&json).arg("--document").arg(&document))
        .expect_err("refused");
    assert_eq!(std::fs::read_to_string(&document)?, "untouched");
    Ok(())
}

#[test]
fn each_part_is_explained() -> Result<()> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/performance.md");
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    for name in names_of_parts()? {
        assert!(text.contains(&format!("\n## {name}\n")), "no section {name:?} in docs/performance.md");
    }
    Ok(())
}
