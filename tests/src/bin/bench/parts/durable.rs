//! The design that writes on every request, on a slow disk: where durable data has to cross a network, a commit costs
//! that much. A verification writes nothing and waits for no disk.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use tempfile::TempDir;
use tollgate_tests::{DATABASE, dev_dir};

use super::part::{Outcome, Part, Run, part};
use crate::clients::{Clients, Statement};
use crate::measure::{Series, alternate_numbers};
use crate::peers::{self, WRITE};
use crate::report::{Figure, Unit};
use crate::service::{self, VERIFY, WEB};
use crate::tokens::Tokens;

pub(super) const PART: Part =
    part("durable", "compared with a design that writes at each request, where an fsync takes 2 ms", run);

const STATEMENTS: [Statement; 2] = [VERIFY, WRITE];

fn run(run: &Run<'_>) -> Result<Outcome> {
    let tokens = Tokens::new(run.scale.tokens.div_ceil(10))?;
    let (_directory, library) = slow_disk()?;
    let builder = service::builder(run.install, run.scale.tokens.div_ceil(10) * 2)
        .setting("autovacuum", "off")
        .environment("LD_PRELOAD", &library.display().to_string());
    let cluster = service::with_tokens(builder, &tokens)?;
    peers::create_written(&cluster)?;

    let mut clients = Clients::connect(&cluster, WEB, DATABASE, run.scale.clients, &STATEMENTS)?;
    clients.warm_up(0, &tokens, 0..tokens.len())?;
    let rates = alternate_numbers("durable", run.scale.rounds, 2, |turn| {
        let rate = clients.run(run.scale.turn, turn, &tokens)?.rate();
        service::flush(&cluster, DATABASE)?;
        Ok(rate)
    })?;
    let [verify, write] = &rates[..] else { unreachable!() };
    ensure_slow(write, run.scale.clients)?;
    Ok(Outcome {
        conditions: vec![
            format!("{} clients, {} tokens, random", run.scale.clients, tokens.len()),
            "in place of fsync and fdatasync the server sleeps for 2 ms, by a library loaded with LD_PRELOAD"
                .to_owned(),
            service::conditions(&cluster)?,
        ],
        figures: vec![
            Figure::new(
                "verify ÷ a design that writes at each request, fsync of 2 ms",
                Unit::Ratio,
                &verify.over(write),
            )
            .at_least(20.0),
            Figure::new("fsync of 2 ms: verify", Unit::PerSecond, verify),
            Figure::new("fsync of 2 ms: design that writes", Unit::PerSecond, write),
        ],
    })
}

/// Compiles the library that simulates the disk, where the server's user can read it.
fn slow_disk() -> Result<(TempDir, PathBuf)> {
    let parent = dev_dir()?.join("tmp");
    fs::create_dir_all(&parent)?;
    let directory = tempfile::Builder::new().prefix("bench-").tempdir_in(parent)?;
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755))?;
    let (source, library) = (directory.path().join("fsync.c"), directory.path().join("fsync.so"));
    fs::write(&source, include_str!("fsync.c"))?;
    let status = Command::new(std::env::var_os("CC").unwrap_or_else(|| "cc".into()))
        .args(["-O2", "-shared", "-fPIC", "-o"])
        .args([&library, &source])
        .status()
        .context("cannot run the C compiler")?;
    ensure!(status.success(), "the C compiler failed: {status}");
    Ok((directory, library))
}

/// If the server did not load the library, the design that writes would look better than it is. Commits share a flush,
/// and a second one may have begun: no client has more than one commit in 2 ms.
fn ensure_slow(write: &Series, clients: usize) -> Result<()> {
    let most = clients as f64 / 0.002;
    ensure!(write.max() <= most * 1.05, "{} commits a second with an fsync of 2 ms", write.max());
    Ok(())
}
