//! The background worker that reads the master keys into shared memory: at server start, on standbys too, at each reload
//! of the configuration, and when a backend asks because it misses one. It has no database.
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
use std::time::Instant;
use tollgate_core::seal_box;

/// Between two readings that backends ask for: the command may be a service's.
const PAUSE: Duration = Duration::from_secs(1);

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
    // SAFETY: the latch of this process, which is set up.
    shmem::set_master_key_reader(unsafe { pg_sys::MyLatch });
    loop {
        let requests = shmem::master_key_requests();
        read();
        shmem::answer_master_key_requests(requests);
        if !wait_for_reason(requests) {
            return;
        }
    }
}

/// Waits until the keys are to be read again; false when the server stops.
fn wait_for_reason(answered: u64) -> bool {
    let read = Instant::now();
    loop {
        // Asked before each wait: a command that is waited for resets the latch too.
        if BackgroundWorker::sighup_received() {
            // SAFETY: in the worker's main loop, where PostgreSQL's own processes do this.
            unsafe { pg_sys::ProcessConfigFile(pg_sys::GucContext::PGC_SIGHUP) };
            return true;
        }
        let is_asked = shmem::master_key_requests() != answered;
        let pause = PAUSE.saturating_sub(read.elapsed());
        if is_asked && pause.is_zero() {
            return true;
        }
        if BackgroundWorker::sigterm_received() || !BackgroundWorker::wait_latch(is_asked.then_some(pause)) {
            return false;
        }
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
