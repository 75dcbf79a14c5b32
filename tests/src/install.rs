//! An installation of PostgreSQL: where its programs and the extension's files are.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use sha2::{Digest as _, Sha256};

/// Names the `pg_config` of the PostgreSQL that the tests run on.
pub const PG_CONFIG_VAR: &str = "TOLLGATE_TEST_PG_CONFIG";

/// Names the `pg_config` of an older PostgreSQL with the extension, to upgrade from, where there is one.
pub const OLDER_PG_CONFIG_VAR: &str = "TOLLGATE_TEST_OLDER_PG_CONFIG";

#[derive(Clone, Debug)]
pub struct Install {
    /// As `pg_config --version` prints it.
    pub version: String,
    pub major: u32,
    bin_dir: PathBuf,
    library_dir: PathBuf,
    share_dir: PathBuf,
}

impl Install {
    /// The PostgreSQL that `make test` chose.
    pub fn under_test() -> Result<Self> {
        match std::env::var_os(PG_CONFIG_VAR) {
            Some(path) => Self::from_pg_config(Path::new(&path)),
            None => bail!(
                "{PG_CONFIG_VAR} is not set: these tests need a PostgreSQL with the extension installed. \
                 Run them with `make test`, or name its pg_config in that variable."
            ),
        }
    }

    /// An older PostgreSQL.
    pub fn older() -> Result<Option<Self>> {
        std::env::var_os(OLDER_PG_CONFIG_VAR).map(|path| Self::from_pg_config(Path::new(&path))).transpose()
    }

    pub fn from_pg_config(pg_config: &Path) -> Result<Self> {
        let ask = |what: &str| -> Result<String> {
            let output = Command::new(pg_config)
                .arg(what)
                .output()
                .with_context(|| format!("cannot run {}", pg_config.display()))?;
            if !output.status.success() {
                bail!("{} {what} failed: {}", pg_config.display(), String::from_utf8_lossy(&output.stderr));
            }
            Ok(String::from_utf8(output.stdout)?.trim().to_owned())
        };
        let version = ask("--version")?;
        let major = version
            .strip_prefix("PostgreSQL ")
            .and_then(|rest| rest.split(|c: char| !c.is_ascii_digit()).next())
            .and_then(|digits| digits.parse().ok())
            .with_context(|| format!("{} reports an unknown version: {version}", pg_config.display()))?;
        let directory = |what: &str| -> Result<PathBuf> {
            let path = PathBuf::from(ask(what)?);
            path.canonicalize().with_context(|| format!("pg_config {what}: {}", path.display()))
        };
        Ok(Self {
            version,
            major,
            bin_dir: directory("--bindir")?,
            library_dir: directory("--pkglibdir")?,
            share_dir: directory("--sharedir")?,
        })
    }

    pub fn bin_dir(&self) -> &Path {
        &self.bin_dir
    }

    pub fn program(&self, name: &str) -> PathBuf {
        self.bin_dir.join(name)
    }

    /// Tollgate's shared library, where `make install` puts it.
    pub fn library(&self) -> PathBuf {
        self.library_dir.join(format!("tollgate{}", std::env::consts::DLL_SUFFIX))
    }

    /// Changes with what CREATE EXTENSION runs.
    pub fn scripts_digest(&self) -> Result<String> {
        let mut files = fs::read_dir(self.extension_dir())?
            .flatten()
            .filter(|entry| entry.file_name().to_string_lossy().starts_with("tollgate"))
            .map(|entry| entry.path())
            .collect::<Vec<_>>();
        files.sort();
        let mut digest = Sha256::new();
        for file in files {
            digest.update(fs::read(file)?);
        }
        Ok(digest.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect())
    }

    /// The folder of control files and install scripts.
    pub fn extension_dir(&self) -> PathBuf {
        self.share_dir.join("extension")
    }
}
