//! Carries counters and the state of limits over a clean restart: the postmaster writes them to a file as it exits,
//! next to PostgreSQL's own statistics, and reads them when it starts.
//!
//! A file must never be read twice, or its uses would be counted twice. So it is removed, durably, before its content
//! is in memory; it is written only after the shutdown checkpoint, so not at an immediate shutdown or a crash; and it
//! is read only by the cluster, and at the checkpoint, that it was written at. One case remains: a data directory that
//! is copied while the server is down includes the file, and the copy reads the same counters.
#![allow(unsafe_code)]

use super::spin::SpinLock;
use crate::error::Error;
use crate::pg::{guard, sys};
use core::ffi::{CStr, c_int};
use pgrx::pg_sys::{self, Datum};
use std::fs::File;
use std::io::{self, BufReader, BufWriter};
use tollgate_core::usage_file::{self, Head, NODE_LEN, Reader, Shutdown};
use tollgate_core::usage_table::{self, Restored};

type Table<'a> = usage_table::Table<'a, SpinLock>;

/// Relative to the data directory, which is the postmaster's working directory.
const FILE: &CStr = c"pg_stat/tollgate_usage.stat";
const DRAFT: &CStr = c"pg_stat/tollgate_usage.stat.tmp";

const LOST: &str =
    "Uses since the last flush before the shutdown are not counted, and rate limits start again.";

/// The name of the server in its generations: its `cluster_name`, or else the system identifier, which a cluster shares
/// with its standbys.
pub(super) fn node() -> [u8; NODE_LEN] {
    // SAFETY: a string setting of PostgreSQL: a C string or NULL.
    let name = unsafe { pg_sys::cluster_name.as_ref().map(|start| CStr::from_ptr(start).to_bytes()) };
    let identifier;
    let name = match name {
        Some(name) if !name.is_empty() => name,
        _ => {
            // SAFETY: reads a number from shared memory, which is set up before the hooks of libraries run.
            identifier = unsafe { pg_sys::GetSystemIdentifier() }.to_string();
            identifier.as_bytes()
        }
    };
    let mut node = [0; NODE_LEN];
    for (to, from) in node.iter_mut().zip(name) {
        *to = *from;
    }
    node
}

/// Called by the process that starts the server, which exits last.
pub(super) fn save_at_exit(table: &'static Table<'static>) {
    // SAFETY: the callback's argument is the one passed here.
    unsafe { pg_sys::on_shmem_exit(Some(save), Datum::from(core::ptr::from_ref(table))) };
}

/// Before the first use is counted.
pub(super) fn restore(table: &Table<'_>) {
    let file = match File::open(path(FILE)) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return,
        Err(error) => return unread(&format!("it could not be opened: {error}")),
    };
    // SAFETY: a C string; at this level it reports and returns.
    if unsafe { pg_sys::durable_unlink(FILE.as_ptr(), pg_sys::LOG as c_int) } != 0 {
        return unread("it could not be removed, and so could be read twice");
    }
    let mut reader = match Reader::open(BufReader::new(file)) {
        Ok(reader) => reader,
        Err(fault) => return unread(&fault.to_string()),
    };
    let head = reader.head().clone();
    if last_shutdown() != Some(head.shutdown) {
        return unread("it was written by another cluster, or not at the last shutdown");
    }
    let mut fault = None;
    let records = core::iter::from_fn(|| match reader.next()? {
        Ok(record) => Some(record),
        Err(error) => {
            fault = Some(error);
            None
        }
    });
    let restored = table.restore(&head, records);
    match fault {
        Some(error) => unread(&format!("the rest of it could not be read: {error}")),
        None => report(&head, &restored),
    }
}

fn report(head: &Head, restored: &Restored) {
    let (kept, all, file) = (restored.kept, head.records, path(FILE));
    if all == 0 {
        return;
    }
    if kept == all {
        Error::note(format!("tollgate: restored the usage and limits of {kept} keys from file \"{file}\""))
            .log();
        return;
    }
    let [tokens, users, addresses, quotas] = restored.lost_limits;
    let Restored { lost_counters, lost_uses, .. } = restored;
    Error::usage_file(
        format!("tollgate: restored the usage and limits of {kept} of {all} keys from file \"{file}\""),
        format!(
            "The table is smaller than it was before the restart. Dropped: the limits of {tokens} tokens, {users} users and \
             {addresses} addresses, which start again; {lost_uses} uses and denials of {lost_counters} tokens, which are not \
             counted; {quotas} quotas, because of which all leases of quotas count as spent."
        ),
        "Raise tollgate.max_tracked_keys; before a restart that lowers it, flush usage, and wait until limits are full again.",
    )
    .log();
}

fn unread(why: &str) {
    Error::usage_file(
        format!("tollgate: ignored file \"{}\": {why}", path(FILE)),
        LOST,
        "Nothing needs to be done; tokens are verified and counted as before.",
    )
    .log();
}

/// Called when the postmaster exits, after all its children, and when it restarts them after a crash. There must be no
/// ERROR: nothing could catch it.
unsafe extern "C-unwind" fn save(code: c_int, argument: Datum) {
    // SAFETY: called by PostgreSQL, in a frame that owns nothing, with the argument of `save_at_exit`.
    unsafe {
        guard::entry(|| {
            if let Some(table) = argument.cast_mut_ptr::<Table<'static>>().as_ref().filter(|_| code == 0) {
                write(table);
            }
        });
    }
}

fn write(table: &Table<'_>) {
    // The code is 0 after an immediate shutdown too.
    let Some(shutdown) = last_shutdown() else { return };
    // Also without records: the leases that nothing was spent of are still this server's.
    let (head, records) = table.save(shutdown, sys::GetCurrentTimestamp());
    let written = File::create(path(DRAFT)).and_then(|file| {
        let mut to = BufWriter::new(file);
        usage_file::write(&mut to, &head, records)
    });
    // SAFETY: C strings; at this level it reports and returns. It flushes both the file and its directory entry to
    // disk.
    let done = written.map(|()| unsafe {
        pg_sys::durable_rename(DRAFT.as_ptr(), FILE.as_ptr(), pg_sys::LOG as c_int) == 0
    });
    let why = match done {
        Ok(true) => return,
        Ok(false) => "its draft could not be renamed".to_owned(),
        Err(error) => error.to_string(),
    };
    // It may have filled the disk.
    let _ = std::fs::remove_file(path(DRAFT));
    Error::usage_file(
        format!("tollgate: could not write file \"{}\": {why}", path(FILE)),
        LOST,
        "Flush usage before the server is shut down, with tollgated flush.",
    )
    .log();
}

/// The shutdown that the control file records; `None` unless it was a clean one.
fn last_shutdown() -> Option<Shutdown> {
    let mut intact = false;
    // SAFETY: reads the control file, which every server has read before this point, into fresh memory.
    let control = unsafe { pg_sys::get_controlfile(pg_sys::DataDir, &raw mut intact).as_ref() }?;
    let clean =
        matches!(control.state, pg_sys::DBState::DB_SHUTDOWNED | pg_sys::DBState::DB_SHUTDOWNED_IN_RECOVERY);
    (intact && clean).then_some(Shutdown {
        system_identifier: control.system_identifier,
        checkpoint: control.checkPoint,
        timeline: control.checkPointCopy.ThisTimeLineID,
    })
}

fn path(name: &CStr) -> &str {
    name.to_str().unwrap_or_default()
}
