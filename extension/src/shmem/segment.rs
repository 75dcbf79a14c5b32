//! Shared memory and its locks, as PostgreSQL gives them: asked for while the server starts, laid out once, inherited by
//! every backend.
#![allow(unsafe_code)]

use super::table::{Entry, Header, Locks, PARTITIONS, Partition, Sizes, Table};
use crate::{compat, guc, sys};
use core::alloc::Layout;
use core::ffi::CStr;
use core::sync::atomic::{AtomicPtr, AtomicU32, Ordering};
use pgrx::pg_sys;
use pgrx::prelude::*;
use tollgate_core::throttle::Throttle;

const NAME: &CStr = c"tollgate";
/// The lock after those of the partitions.
const CONTROL: usize = PARTITIONS;

pub(super) struct Segment {
    pub(super) table: Table<'static>,
    pub(super) log_throttle: &'static Throttle,
    locks: *mut pg_sys::LWLockPadded,
}

static SEGMENT: AtomicPtr<Segment> = AtomicPtr::new(core::ptr::null_mut());
static mut PREVIOUS_REQUEST: pg_sys::shmem_request_hook_type = None;
static mut PREVIOUS_STARTUP: pg_sys::shmem_startup_hook_type = None;

/// The segment, if the library was loaded when the server started.
pub(super) fn segment() -> Option<&'static Segment> {
    // SAFETY: what is stored is a leaked box.
    unsafe { SEGMENT.load(Ordering::Acquire).as_ref() }
}

pub(super) fn init() {
    // SAFETY: run by the postmaster, which has one thread, while it loads libraries; hooks are chained as every library
    // does.
    unsafe {
        if !pg_sys::process_shared_preload_libraries_in_progress {
            return;
        }
        PREVIOUS_REQUEST = pg_sys::shmem_request_hook;
        pg_sys::shmem_request_hook = Some(request);
        PREVIOUS_STARTUP = pg_sys::shmem_startup_hook;
        pg_sys::shmem_startup_hook = Some(startup);
    }
}

/// Where each part lies, and how much memory they take together.
struct Plan {
    partitions: usize,
    buckets: usize,
    entries: usize,
    log_throttle: usize,
    sizes: Sizes,
    total: Layout,
}

fn plan() -> Plan {
    let sizes = Sizes::for_keys(guc::max_tracked_keys());
    let extend = |layout: Layout, part: Result<Layout, _>| {
        let part = part.expect("the largest setting is far below the address space");
        layout.extend(part).expect("the largest setting is far below the address space")
    };
    let header = Layout::new::<Header>();
    let (layout, partitions) = extend(header, Layout::array::<Partition>(PARTITIONS));
    let (layout, buckets) = extend(layout, Layout::array::<AtomicU32>(sizes.buckets));
    let (layout, entries) = extend(layout, Layout::array::<Entry>(sizes.entries));
    let (layout, log_throttle) = extend(layout, Ok(Layout::new::<Throttle>()));
    Plan { partitions, buckets, entries, log_throttle, sizes, total: layout.pad_to_align() }
}

/// ShmemInitStruct aligns to a cache line of 128 bytes (`PG_CACHE_LINE_SIZE`), which the parts need no more than.
const _: () = assert!(align_of::<Header>() <= 128 && align_of::<Entry>() <= 128);

#[pg_guard]
unsafe extern "C-unwind" fn request() {
    // SAFETY: PostgreSQL calls the hook when it may ask for memory and locks.
    unsafe {
        if let Some(previous) = PREVIOUS_REQUEST {
            previous();
        }
        pg_sys::RequestAddinShmemSpace(plan().total.size());
        pg_sys::RequestNamedLWLockTranche(NAME.as_ptr(), PARTITIONS as i32 + 1);
    }
}

/// Called by the postmaster at start, and again with fresh memory after a crash.
#[pg_guard]
unsafe extern "C-unwind" fn startup() {
    // SAFETY: PostgreSQL calls the hook when shared memory exists. The memory is as large as the plan says, aligned, all
    // zero before the references are made (zero is valid for each part, which is made of atomics), and never unmapped
    // while this process lives.
    unsafe {
        if let Some(previous) = PREVIOUS_STARTUP {
            previous();
        }
        let plan = plan();
        let init_lock = &raw mut (*pg_sys::MainLWLockArray.add(compat::ADDIN_SHMEM_INIT_LOCK)).lock;
        pg_sys::LWLockAcquire(init_lock, pg_sys::LWLockMode::LW_EXCLUSIVE);
        let mut found = false;
        let base = pg_sys::ShmemInitStruct(NAME.as_ptr(), plan.total.size(), &raw mut found).cast::<u8>();
        if !found {
            base.write_bytes(0, plan.total.size());
        }
        let table = Table::new(
            &*base.cast::<Header>(),
            core::slice::from_raw_parts(base.add(plan.partitions).cast::<Partition>(), PARTITIONS),
            core::slice::from_raw_parts(base.add(plan.buckets).cast::<AtomicU32>(), plan.sizes.buckets),
            core::slice::from_raw_parts(base.add(plan.entries).cast::<Entry>(), plan.sizes.entries),
        );
        if !found {
            let boot = *uuid::Uuid::new_v4().as_bytes();
            let seed = uuid::Uuid::new_v4().as_u64_pair().1;
            table.start(boot, seed, sys::GetCurrentTimestamp());
        }
        pg_sys::LWLockRelease(init_lock);
        let locks = pg_sys::GetNamedLWLockTranche(NAME.as_ptr());
        let log_throttle = &*base.add(plan.log_throttle).cast::<Throttle>();
        SEGMENT.store(Box::into_raw(Box::new(Segment { table, log_throttle, locks })), Ordering::Release);
    }
}

/// A lightweight lock that is held.
pub(super) struct Held(*mut pg_sys::LWLock);

impl Drop for Held {
    fn drop(&mut self) {
        // SAFETY: held by this process since `Segment::acquire`.
        unsafe { sys::LWLockRelease(self.0) };
    }
}

impl Segment {
    fn acquire(&self, number: usize, mode: pg_sys::LWLockMode::Type) -> Held {
        assert!(number <= CONTROL);
        // SAFETY: the tranche has CONTROL + 1 locks. Acquiring raises nothing but at 200 locks held at once, and we
        // hold two at the most.
        unsafe {
            let lock = &raw mut (*self.locks.add(number)).lock;
            sys::LWLockAcquire(lock, mode);
            Held(lock)
        }
    }
}

impl Locks for Segment {
    type Guard = Held;

    fn control(&self) -> Held {
        self.acquire(CONTROL, pg_sys::LWLockMode::LW_EXCLUSIVE)
    }

    fn shared(&self, partition: usize) -> Held {
        self.acquire(partition, pg_sys::LWLockMode::LW_SHARED)
    }

    fn exclusive(&self, partition: usize) -> Held {
        self.acquire(partition, pg_sys::LWLockMode::LW_EXCLUSIVE)
    }
}
