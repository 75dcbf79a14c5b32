//! `make bench`: the cost of Tollgate compared with the alternatives, and whether that cost grows.
//!
//! Each part is a file in `parts/`, with a server of its own, and can be run by itself (`--only`, `--list`). All figures
//! are of turns that alternate within one run (`measure.rs`); most are ratios. What it is compared with is written here
//! from its public description. `report` turns the JSON of a run into the results in docs/performance.md.

mod clients;
mod measure;
mod memory;
mod parts;
mod peers;
mod report;
mod scale;
mod service;
mod signer;
mod tokens;
mod wire;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use clap::{Args, Parser, Subcommand};
use tollgate_tests::{Install, TOLLGATED_VAR, dev_dir};

use crate::parts::{PARTS, Part, Run};
use crate::report::{Machine, Measured, Report, Version};
use crate::scale::Scale;

#[derive(Parser)]
#[command(about = "Measures Tollgate against the alternatives")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Measure
    Run(Options),
    /// Rewrite the results in docs/performance.md from what a run wrote with --json
    Report {
        /// The JSON file of a run; of several, a later one's parts replace those of the same name
        #[arg(long, required = true)]
        json: Vec<PathBuf>,
        #[arg(long, default_value = "docs/performance.md")]
        document: PathBuf,
    },
}

#[derive(Args)]
struct Options {
    /// A PostgreSQL with the extension installed; may be given several times
    #[arg(long, required_unless_present = "list")]
    pg_config: Vec<PathBuf>,
    /// Only these parts, with commas between them
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// List the parts and exit
    #[arg(long)]
    list: bool,
    /// Use very small sizes, to check within seconds that each part works; the figures are meaningless
    #[arg(long)]
    quick: bool,
    /// Write all results to a file, for `report` and other programs
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Tokens in the table [default: 1000000]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    tokens: Option<u32>,
    /// Number of concurrent connections
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..=100))]
    clients: u8,
    /// Number of rounds, in each of which every compared thing has a turn [default: 7]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: Option<u32>,
    /// Length of a turn, in seconds [default: 2]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    seconds: Option<u64>,
    /// Length of the full load of `soak`, in seconds [default: 600]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    soak: Option<u64>,
}

impl Options {
    fn scale(&self) -> Scale {
        let full = Scale {
            tokens: 1_000_000,
            few: 10_000,
            many: 10_000_000,
            clients: self.clients.into(),
            rounds: 7,
            turn: Duration::from_secs(2),
            soak: Duration::from_mins(10),
            flush_interval: Duration::from_secs(5),
            calls: 500_000,
            rows: 1_000_000,
            flushed: 200_000,
            ended: 1_000_000,
        };
        let quick = Scale {
            tokens: 2000,
            few: 200,
            many: 4000,
            rounds: 1,
            turn: Duration::from_millis(100),
            soak: Duration::from_secs(2),
            flush_interval: Duration::from_millis(200),
            calls: 500,
            rows: 2000,
            flushed: 500,
            ended: 1000,
            ..full
        };
        let chosen = if self.quick { quick } else { full };
        Scale {
            tokens: self.tokens.unwrap_or(chosen.tokens),
            rounds: self.rounds.unwrap_or(chosen.rounds),
            turn: self.seconds.map_or(chosen.turn, Duration::from_secs),
            soak: self.soak.map_or(chosen.soak, Duration::from_secs),
            ..chosen
        }
    }

    fn parts(&self) -> Result<Vec<&'static Part>> {
        if let Some(unknown) = self.only.iter().find(|name| PARTS.iter().all(|part| part.name != **name)) {
            bail!("there is no part {unknown}; --list names them");
        }
        Ok(PARTS
            .iter()
            .filter(|part| self.only.is_empty() || self.only.iter().any(|name| name == part.name))
            .collect())
    }
}

fn main() -> Result<ExitCode> {
    match Arguments::parse().command {
        Command::Run(options) if options.list => {
            for part in PARTS {
                println!("{:<10} {}", part.name, part.about);
            }
        }
        Command::Run(options) => run(&options)?,
        Command::Report { json, document } => write_section(&json, &document)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn run(options: &Options) -> Result<()> {
    let (parts, scale) = (options.parts()?, options.scale());
    ensure!(
        std::env::var_os(TOLLGATED_VAR).is_some() || !parts.iter().any(|part| part.needs_daemon),
        "{TOLLGATED_VAR} must name the daemon's binary, as `make bench` does"
    );
    let installs =
        options.pg_config.iter().map(|path| Install::from_pg_config(path)).collect::<Result<Vec<_>>>()?;
    let mut report = Report {
        command: command(options),
        began_at: jiff::Timestamp::now(),
        quick: options.quick,
        machine: Machine::describe(&dev_dir()?)?,
        versions: Vec::new(),
    };
    for install in &installs {
        report.versions.push(Version {
            postgres: install.version.clone(),
            major: install.major,
            parts: Vec::new(),
        });
        for part in &parts {
            eprintln!("==> {}: {}: {}", install.version, part.name, part.about);
            let begin = Instant::now();
            let outcome = (part.run)(&Run { install, scale: &scale })
                .with_context(|| format!("{} on {}", part.name, install.version))?;
            let unknown = outcome.figures.iter().find(|figure| !figure.median.is_finite());
            ensure!(unknown.is_none(), "{} was not measured", unknown.map_or("", |figure| &figure.what));
            eprintln!("    {:.0} s", begin.elapsed().as_secs_f64());
            let measured = Measured {
                part: part.name.to_owned(),
                seconds: begin.elapsed().as_secs_f64(),
                conditions: outcome.conditions,
                figures: outcome.figures,
            };
            report.versions.last_mut().expect("one was added").parts.push(measured);
            // After each part, so that an error in a later one does not lose an hour's work.
            if let Some(path) = &options.json {
                fs::write(path, serde_json::to_vec_pretty(&report)?)
                    .with_context(|| format!("cannot write {}", path.display()))?;
            }
        }
        report::print(report.versions.last().expect("one was added"));
    }
    Ok(())
}

/// The command with which a reader can repeat the run.
fn command(options: &Options) -> String {
    let mut arguments = Vec::new();
    if !options.only.is_empty() {
        arguments.push(format!("--only {}", options.only.join(",")));
    }
    if options.quick {
        arguments.push("--quick".to_owned());
    }
    if options.clients != 4 {
        arguments.push(format!("--clients {}", options.clients));
    }
    let sizes = [
        ("--tokens", options.tokens.map(u64::from)),
        ("--rounds", options.rounds.map(u64::from)),
        ("--seconds", options.seconds),
        ("--soak", options.soak),
    ];
    arguments.extend(sizes.iter().filter_map(|(name, value)| Some(format!("{name} {}", (*value)?))));
    if arguments.is_empty() {
        "make bench".into()
    } else {
        format!("make bench ARGS='{}'", arguments.join(" "))
    }
}

fn write_section(json: &[PathBuf], document: &Path) -> Result<()> {
    let read =
        |path: &Path| fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()));
    let mut runs = json.iter().map(|json| -> Result<Report> {
        serde_json::from_str(&read(json)?)
            .with_context(|| format!("{} is not what a run wrote", json.display()))
    });
    let mut report = runs.next().context("no run")??;
    for run in runs {
        report.add(run?);
    }
    let text = report::rewrite(&read(document)?, &report::section(&report)?)
        .with_context(|| document.display().to_string())?;
    fs::write(document, text).with_context(|| format!("cannot write {}", document.display()))
}
