//! The machine on which the figures were measured.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;
use std::time::Instant;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::measure::Series;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Machine {
    pub(crate) processor: String,
    /// The number of processors that this process may use.
    pub(crate) processors: usize,
    /// In bytes.
    pub(crate) memory: u64,
    pub(crate) system: String,
    /// Microseconds to write 8 KiB durably to the disk of the clusters.
    pub(crate) fdatasync: f64,
}

impl Machine {
    pub(crate) fn describe(disk: &Path) -> Result<Self> {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let field = |text: &str, name: &str| {
            text.lines()
                .find_map(|line| line.strip_prefix(name)?.split_once(':'))
                .map(|(_, value)| value.trim().to_owned())
        };
        let memory = field(&read("/proc/meminfo"), "MemTotal")
            .and_then(|value| value.split(' ').next()?.parse::<u64>().ok())
            .map_or(0, |kilobytes| kilobytes * 1024);
        let kernel = read("/proc/sys/kernel/osrelease");
        Ok(Self {
            processor: field(&read("/proc/cpuinfo"), "model name")
                .unwrap_or_else(|| std::env::consts::ARCH.to_owned()),
            processors: std::thread::available_parallelism()?.get(),
            memory,
            system: format!("{} {}", std::env::consts::OS, kernel.trim()).trim().to_owned(),
            fdatasync: fdatasync(disk)?,
        })
    }
}

fn fdatasync(disk: &Path) -> Result<f64> {
    let directory = tempfile::tempdir_in(disk)?;
    let mut file = File::create(directory.path().join("fdatasync"))?;
    let mut times = Series::default();
    for _ in 0..50 {
        let begin = Instant::now();
        file.write_all(&[0; 8192])?;
        file.sync_data()?;
        times.0.push(begin.elapsed().as_secs_f64() * 1e6);
    }
    Ok(times.median())
}
