//! Where `make` keeps things.

use std::path::{Path, PathBuf};

use anyhow::Context as _;

/// The directory where `make` keeps what it downloads and runs. It may be outside the checkout.
pub const DEV_DIR_VAR: &str = "TOLLGATE_DEV_DIR";

/// The checkout's `.dev`, with symbolic links resolved: the unprivileged user may be unable to follow them.
pub fn dev_dir() -> anyhow::Result<PathBuf> {
    let dev = match std::env::var_os(DEV_DIR_VAR) {
        Some(dev) => PathBuf::from(dev),
        None => Path::new(env!("CARGO_MANIFEST_DIR"))
            .parent()
            .context("this crate is in the workspace")?
            .join(".dev"),
    };
    std::fs::create_dir_all(&dev).with_context(|| format!("cannot make {}", dev.display()))?;
    Ok(dev.canonicalize()?)
}
