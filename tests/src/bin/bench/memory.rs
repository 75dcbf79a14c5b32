//! The memory of the server's processes and of the daemon.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use tollgate_tests::{Cluster, Tollgated};

/// Bytes of memory at one moment.
#[derive(Clone, Copy)]
pub(crate) struct Memory {
    /// The private memory of the server's processes.
    pub(crate) private: f64,
    /// The shared memory of the server's processes, as far as it was ever used.
    pub(crate) shared: f64,
    pub(crate) daemon: f64,
}

impl Memory {
    pub(crate) fn of(cluster: &Cluster, daemon: &Tollgated) -> Result<Self> {
        let (mut private, mut shared) = (0.0, 0.0);
        for pid in processes(cluster)? {
            let (its_own, its_part) = memory_of(&pid).unwrap_or_default();
            private += its_own;
            shared += its_part;
        }
        ensure!(private > 0.0, "the memory of the server's processes cannot be read");
        let (daemon, _) = memory_of(&daemon.pid().to_string()).context("the daemon's memory")?;
        Ok(Self { private, shared, daemon })
    }
}

/// The private memory, in bytes, of the process of a server that has the most of it.
pub(crate) fn largest_private(cluster: &Cluster) -> Result<f64> {
    let of_each = processes(cluster)?.into_iter().filter_map(|pid| Some(memory_of(&pid)?.0));
    of_each.max_by(f64::total_cmp).context("the memory of the server's processes cannot be read")
}

/// The postmaster and its children, but autovacuum workers, which come and go.
fn processes(cluster: &Cluster) -> Result<Vec<String>> {
    let postmaster = fs::read_to_string(cluster.data_dir().join("postmaster.pid"))?;
    let postmaster = postmaster.lines().next().context("the postmaster's process id")?.to_owned();
    let mut processes = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let is_ours = name.parse::<u32>().is_ok()
            && (name == postmaster || parent_of(&name).as_deref() == Some(&postmaster));
        // A process whose files cannot be read has ended, as backends do.
        let title = || fs::read_to_string(format!("/proc/{name}/cmdline")).unwrap_or_default();
        if is_ours && !title().contains("autovacuum worker") {
            processes.push(name);
        }
    }
    Ok(processes)
}

/// A process's private pages, and its proportional part of shared ones.
fn memory_of(pid: &str) -> Option<(f64, f64)> {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    Some((kilobytes(&rollup, "Pss_Anon:")? * 1024.0, kilobytes(&rollup, "Pss_Shmem:")? * 1024.0))
}

fn kilobytes(text: &str, field: &str) -> Option<f64> {
    text.lines().find_map(|line| line.strip_prefix(field))?.split_whitespace().next()?.parse().ok()
}

fn parent_of(pid: &str) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // After the program's name in parentheses, which may itself contain spaces and parentheses: the state, the parent.
    stat.rsplit_once(')')?.1.split_whitespace().nth(1).map(str::to_owned)
}
