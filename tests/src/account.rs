//! The operating-system user that servers and daemons run as.
//!
//! PostgreSQL refuses to run as root, so root runs both as an unprivileged user; other users run them as themselves.

use std::ffi::OsStr;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result};
use nix::unistd::{User, geteuid};

#[derive(Clone, Debug)]
pub struct Account {
    other: Option<User>,
}

impl Account {
    /// The caller, or for root the user `postgres`, or `nobody` where there is none. The Makefile has the same rule.
    pub fn unprivileged() -> Result<Self> {
        if !geteuid().is_root() {
            return Ok(Self { other: None });
        }
        for name in ["postgres", "nobody"] {
            if let Some(user) = User::from_name(name)? {
                return Ok(Self { other: Some(user) });
            }
        }
        anyhow::bail!("root needs a user `postgres` or `nobody` to run PostgreSQL as, and neither exists")
    }

    /// A command run as this user, without inherited variables that would change what a server or a client does.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        for (name, _) in std::env::vars_os() {
            if name.to_str().is_some_and(|name| name.starts_with("PG") || name.starts_with("TOLLGATED_")) {
                command.env_remove(name);
            }
        }
        // In a server's environment these put a backtrace into the client's error messages.
        command.env_remove("RUST_BACKTRACE").env_remove("RUST_LIB_BACKTRACE");
        command.env("LC_ALL", "C");
        if let Some(user) = &self.other {
            command
                .uid(user.uid.as_raw())
                .gid(user.gid.as_raw())
                .env("HOME", &user.dir)
                .env("USER", &user.name);
        }
        command
    }

    /// Makes this user the owner of `path`.
    pub fn own(&self, path: &Path) -> Result<()> {
        if let Some(user) = &self.other {
            std::os::unix::fs::chown(path, Some(user.uid.as_raw()), Some(user.gid.as_raw()))
                .with_context(|| format!("cannot give {} to the user {}", path.display(), user.name))?;
        }
        Ok(())
    }

    /// Creates the directory `path`, accessible only to this user.
    pub fn private_dir(&self, path: &Path) -> Result<()> {
        use std::os::unix::fs::PermissionsExt as _;
        std::fs::create_dir_all(path).with_context(|| format!("cannot make {}", path.display()))?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o700))?;
        self.own(path)
    }
}
