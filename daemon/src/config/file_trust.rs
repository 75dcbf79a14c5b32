//! Whether others may write the files that this process believes: its configuration, passwords, keys and certificates.
//! An attacker who can write one of them can have the daemon connect elsewhere, or as another role.
//!
//! It is a warning, not a refusal: a daemon that does not start after a `chmod` flushes nothing.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use nix::unistd::geteuid;

const WRITABLE_BY_OTHERS: u32 = 0o022;
/// Of a directory: files of others cannot be renamed or deleted.
const STICKY: u32 = 0o1000;

/// Says it of each file, once.
pub fn warn_of(files: impl IntoIterator<Item = PathBuf>) {
    let mut files: Vec<PathBuf> = files.into_iter().collect();
    files.sort();
    files.dedup();
    for file in files {
        if let Some(why) = weakness(&file) {
            tracing::warn!("others may change {}, which tollgated trusts: {why}", file.display());
        }
    }
}

/// Why others may change a file or put another in its place, and the command against it. `None` if they may not, or if there
/// is no such file.
fn weakness(file: &Path) -> Option<String> {
    let real = fs::canonicalize(file).ok()?;
    let named = std::path::absolute(file).ok()?;
    // Where the name is a link, its directory counts too.
    let paths = real.ancestors().chain(named.ancestors().skip(1));
    paths.into_iter().find_map(|path| {
        let metadata = fs::metadata(path).ok()?;
        let mode = metadata.permissions().mode();
        let path = path.display();
        if metadata.uid() != 0 && metadata.uid() != geteuid().as_raw() {
            return Some(format!("{path} belongs to user {}; run: chown root {path}", metadata.uid()));
        }
        let shared = metadata.is_dir() && mode & STICKY != 0;
        (mode & WRITABLE_BY_OTHERS != 0 && !shared)
            .then(|| format!("{path} has mode {:04o}; run: chmod go-w {path}", mode & 0o7777))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn a_file_that_others_may_write_or_replace_is_named_with_the_command_against_it() {
        let directory = std::env::temp_dir().join(format!("tollgated-trust-{}", std::process::id()));
        fs::create_dir(&directory).unwrap();
        let (file, link) = (directory.join("file"), directory.join("link"));
        fs::write(&file, "").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        for (directory_mode, file_mode, word) in [
            (0o755, 0o644, None),
            (0o755, 0o664, Some(format!("chmod go-w {}", file.display()))),
            (0o755, 0o602, Some(format!("chmod go-w {}", file.display()))),
            (0o775, 0o600, Some(format!("chmod go-w {}", directory.display()))),
            (0o777, 0o600, Some(format!("chmod go-w {}", directory.display()))),
            (0o1777, 0o600, None),
        ] {
            set(&directory, directory_mode);
            set(&file, file_mode);
            for path in [&file, &link] {
                let found = weakness(path);
                assert_eq!(found.is_some(), word.is_some(), "{directory_mode:o} {file_mode:o}: {found:?}");
                assert!(found.unwrap_or_default().contains(word.as_deref().unwrap_or_default()));
            }
        }
        assert_eq!(weakness(&directory.join("none")), None);
        fs::remove_dir_all(&directory).unwrap();
    }
}
