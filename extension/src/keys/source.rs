//! Where master keys come from: a file that only the server may read, or a command.
#![allow(unsafe_code)]

use core::ffi::{CStr, c_int};
use core::time::Duration;
use pgrx::pg_sys;
use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read};
use std::os::fd::AsRawFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Instant;
use tollgate_core::seal_box::MAX_FILE;
use zeroize::Zeroizing;

/// As long as a server may take to start for it.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(60);

pub(super) struct Text {
    pub(super) bytes: Zeroizing<Vec<u8>>,
    /// For messages.
    pub(super) origin: String,
}

/// Reads a file, by the rules for `ssl_key_file`: owned by the server's user with mode 0600 or less, or by root with
/// 0640 or less. A symbolic link is followed, as secrets are mounted by them; what it leads to is judged.
pub(super) fn file(path: &CStr) -> Result<Text, String> {
    let path = Path::new(OsStr::from_bytes(path.to_bytes()));
    let origin = format!("file \"{}\"", path.display());
    if !path.is_absolute() {
        return Err(format!("{origin}: tollgate.master_key_file must be an absolute path"));
    }
    let fault = |error: &dyn core::fmt::Display| format!("{origin}: {error}");
    // Not waiting for a writer, if it is a pipe.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(O_NONBLOCK)
        .open(path)
        .map_err(|error| fault(&format!("it could not be opened: {}", error.kind())))?;
    let metadata = file.metadata().map_err(|error| fault(&error.kind()))?;
    if !metadata.is_file() {
        return Err(fault(&"it is not a regular file"));
    }
    // SAFETY: returns a number.
    let own = unsafe { geteuid() };
    let (uid, mode) = (metadata.uid(), metadata.mode());
    let is_private = uid == own && mode & 0o077 == 0 || uid == 0 && mode & 0o027 == 0;
    if !is_private {
        return Err(fault(
            &"it is accessible to others: it must belong to the server's user with mode 0600 or less, or to root with mode \
              0640 or less",
        ));
    }
    if is_in_data_directory(path) {
        return Err(fault(&"it is in the data directory, and so in each backup: move it elsewhere"));
    }
    let bytes = read_some(file).map_err(|error| fault(&error.kind()))?;
    Ok(Text { bytes, origin })
}

/// `O_NONBLOCK`.
#[cfg(target_os = "linux")]
const O_NONBLOCK: c_int = 0o4000;
#[cfg(not(target_os = "linux"))]
const O_NONBLOCK: c_int = 4;

unsafe extern "C" {
    fn geteuid() -> u32;
    fn kill(process: c_int, signal: c_int) -> c_int;
}

fn is_in_data_directory(path: &Path) -> bool {
    // SAFETY: a C string that is set when the server starts.
    let data = unsafe { CStr::from_ptr(pg_sys::DataDir) };
    let (Ok(path), Ok(data)) = (path.canonicalize(), fs::canonicalize(OsStr::from_bytes(data.to_bytes())))
    else {
        return false;
    };
    path.starts_with(data)
}

/// No more than is looked at, and one byte, which shows that there is more.
fn read_some(from: impl Read) -> std::io::Result<Zeroizing<Vec<u8>>> {
    let mut bytes = Zeroizing::new(Vec::with_capacity(MAX_FILE + 1));
    from.take(MAX_FILE as u64 + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Runs a command by the shell, as `ssl_passphrase_command`, and returns what it prints. In a process group of its own,
/// which is killed when it takes too long or the worker is to stop.
pub(super) fn command(command: &CStr) -> Result<Text, String> {
    let origin = "the output of tollgate.master_key_command".to_owned();
    let mut child = Command::new("/bin/sh")
        .arg("-c")
        .arg(OsStr::from_bytes(command.to_bytes()))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .process_group(0)
        .spawn()
        .map_err(|error| format!("tollgate.master_key_command could not be run: {}", error.kind()))?;
    let outcome = output_of(&mut child);
    if outcome.is_err() {
        // SAFETY: the group of a child that was not waited for.
        unsafe { kill(-c_int::try_from(child.id()).unwrap_or_default(), SIGKILL) };
    }
    let status = child.wait();
    let bytes = outcome?;
    match status {
        Ok(status) if status.success() => Ok(Text { bytes, origin }),
        Ok(status) => Err(format!("tollgate.master_key_command failed with {status}")),
        Err(error) => Err(format!("tollgate.master_key_command: {}", error.kind())),
    }
}

const SIGKILL: c_int = 9;

/// Whether this process was asked to end.
pub(super) fn is_to_stop() -> bool {
    // SAFETY: a flag that the handler of SIGTERM sets.
    unsafe { (&raw const pg_sys::ShutdownRequestPending).read_volatile() != 0 }
}

/// Reads until the end, and waits for that on the latch, so that the server can stop meanwhile.
fn output_of(child: &mut Child) -> Result<Zeroizing<Vec<u8>>, String> {
    let start = Instant::now();
    let mut pipe = File::from(std::os::fd::OwnedFd::from(child.stdout.take().expect("its output is piped")));
    let mut bytes = Zeroizing::new(Vec::with_capacity(MAX_FILE + 1));
    let mut chunk = Zeroizing::new([0; 4096]);
    loop {
        let left = COMMAND_TIMEOUT.saturating_sub(start.elapsed());
        // SAFETY: the latch of this process, and an open pipe.
        let events = unsafe {
            let events = pg_sys::WaitLatchOrSocket(
                pg_sys::MyLatch,
                (pg_sys::WL_LATCH_SET
                    | pg_sys::WL_SOCKET_READABLE
                    | pg_sys::WL_TIMEOUT
                    | pg_sys::WL_EXIT_ON_PM_DEATH) as c_int,
                pipe.as_raw_fd(),
                left.as_millis() as _,
                pg_sys::PG_WAIT_EXTENSION,
            );
            pg_sys::ResetLatch(pg_sys::MyLatch);
            events as u32
        };
        if is_to_stop() {
            return Err("the server is stopping".to_owned());
        }
        if left.is_zero() {
            return Err(format!(
                "tollgate.master_key_command took longer than {} s",
                COMMAND_TIMEOUT.as_secs()
            ));
        }
        if events & pg_sys::WL_SOCKET_READABLE == 0 {
            continue;
        }
        match pipe.read(&mut *chunk) {
            Ok(0) => return Ok(bytes),
            Ok(read) => bytes.extend_from_slice(&chunk[..read]),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(format!("tollgate.master_key_command: {}", error.kind())),
        }
        if bytes.len() > MAX_FILE {
            return Err(format!("tollgate.master_key_command printed more than {MAX_FILE} bytes"));
        }
    }
}
