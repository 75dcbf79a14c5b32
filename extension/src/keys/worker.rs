//! The background worker that reads the master keys into shared memory: at server start, on standbys too, and at each
//! reload of the configuration. It has no database.
//!
//! A fault is logged and shown by `tollgated check`; the keys that were read before stay in use, as with TLS keys.
#![allow(unsafe_code)]

use super::source;
use crate::error::Error;
use crate::guc;
use crate::pg::guard;
use crate::shmem;
use core::time::Duration;
use pgrx::bgworkers::{BackgroundWorker, BackgroundWorkerBuilder, BgWorkerStartTime, SignalWakeFlags};
use pgrx::pg_sys::{self, Datum};
use tollgate_core::seal_box;

pub(super) fn init() {
    // SAFETY: a flag of this process.
    if !unsafe { pg_sys::process_shared_preload_libraries_in_progress } {
        return;
    }
    BackgroundWorkerBuilder::new("tollgate master keys")
        .set_type("tollgate master keys")
        .set_library("tollgate")
        .set_function("tollgate_master_keys_main")
        .enable_shmem_access(None)
        .set_start_time(BgWorkerStartTime::PostmasterStart)
        .set_restart_time(Some(Duration::from_secs(1)))
        .load();
}

/// Called by PostgreSQL in the process of the worker.
#[unsafe(no_mangle)]
pub(super) extern "C-unwind" fn tollgate_master_keys_main(_argument: Datum) {
    // SAFETY: called by PostgreSQL, in a frame that owns nothing.
    unsafe { guard::entry(run) };
}

fn run() {
    BackgroundWorker::attach_signal_handlers(SignalWakeFlags::SIGHUP | SignalWakeFlags::SIGTERM);
    loop {
        read();
        // Asked before each wait: a command that is waited for resets the latch too.
        while !BackgroundWorker::sighup_received() {
            if BackgroundWorker::sigterm_received() || !BackgroundWorker::wait_latch(None) {
                return;
            }
        }
        // SAFETY: in the worker's main loop, where PostgreSQL's own processes do this.
        unsafe { pg_sys::ProcessConfigFile(pg_sys::GucContext::PGC_SIGHUP) };
    }
}

fn read() {
    let text = match (guc::master_key_file(), guc::master_key_command()) {
        (None, None) => return shmem::set_master_keys(Ok(&[])),
        (Some(_), Some(_)) => {
            return fault(
                "tollgate.master_key_file and tollgate.master_key_command are both set: empty one of them",
            );
        }
        (Some(path), None) => source::file(&path),
        (None, Some(command)) => source::command(&command),
    };
    let keys = text.and_then(|text| {
        seal_box::parse_file(&text.bytes).map_err(|fault| format!("{}: {fault}", text.origin))
    });
    match keys {
        Ok(keys) => shmem::set_master_keys(Ok(&keys)),
        // The server is stopping.
        Err(_) if source::is_to_stop() => {}
        Err(why) => fault(&why),
    }
}

fn fault(why: &str) {
    shmem::set_master_keys(Err(why));
    Error::master_keys_unread(why).log();
}
