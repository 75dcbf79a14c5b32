//! Shared memory and its locks, obtained from PostgreSQL: requested at server start, laid out once, inherited by every
//! backend.
#![allow(unsafe_code)]

use super::findings::Findings;
use super::lease_requests::LeaseRequests;
use super::master_keys::{self, MasterKeys};
use super::restart;
use super::sessions::Sessions;
use super::spin::SpinLock;
use super::unknown_keys::UnknownKeys;
use crate::guc;
use crate::pg::{compat, guard, sys};
use core::alloc::Layout;
use core::ffi::{CStr, c_int};
use core::sync::atomic::{AtomicPtr, Ordering};
use pgrx::pg_sys;
use tollgate_core::hints::{self, Bucket, Hints};
use tollgate_core::latency::Latencies;
use tollgate_core::signature_table::{self, SignatureTable};
use tollgate_core::throttle::Throttle;
use tollgate_core::usage_table::{self, Control, Header};

type Group = usage_table::Group<SpinLock>;
pub(super) type Table<'a> = usage_table::Table<'a, SpinLock>;

const NAME: &CStr = c"tollgate";
const MASTER_KEYS_NAME: &CStr = c"tollgate master keys";
/// The control lock, the locks for inserting, and that of the master keys.
const LOCKS: c_int = 2 + usage_table::INSERT_LOCKS as c_int;

pub(super) struct Segment {
    pub(super) table: Table<'static>,
    pub(super) hints: Hints<'static>,
    pub(super) log_throttle: &'static Throttle,
    pub(super) import_key_throttle: &'static Throttle,
    pub(super) findings: &'static Findings,
    pub(super) lease_requests: &'static LeaseRequests,
    pub(super) latencies: &'static Latencies,
    pub(super) sessions: &'static Sessions,
    pub(super) unknown_keys: &'static UnknownKeys,
    master_keys: &'static MasterKeys,
    pub(super) signatures: SignatureTable<'static>,
    locks: *mut pg_sys::LWLockPadded,
}

static SEGMENT: AtomicPtr<Segment> = AtomicPtr::new(core::ptr::null_mut());
static mut PREVIOUS_REQUEST: pg_sys::shmem_request_hook_type = None;
static mut PREVIOUS_STARTUP: pg_sys::shmem_startup_hook_type = None;

/// The segment, if the library was loaded when the server started.
pub(super) fn segment() -> Option<&'static Segment> {
    // SAFETY: the pointer is to a leaked box.
    unsafe { SEGMENT.load(Ordering::Acquire).as_ref() }
}

pub(super) fn init() {
    // SAFETY: run by the postmaster, which has one thread, while it loads libraries; hooks are chained as usual.
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

/// The number of groups and buckets, their offsets, and the size of the whole segment.
struct Plan {
    groups: usize,
    groups_at: usize,
    buckets: usize,
    buckets_at: usize,
    log_throttle_at: usize,
    import_key_throttle_at: usize,
    findings_at: usize,
    lease_requests_at: usize,
    latencies_at: usize,
    sessions_at: usize,
    unknown_keys_at: usize,
    signatures: usize,
    signatures_at: usize,
    total: Layout,
}

fn plan() -> Plan {
    const FITS: &str = "the largest setting is far below the address space";
    let keys = guc::max_tracked_keys();
    let (groups, buckets) = (usage_table::groups_for(keys), hints::buckets_for(keys));
    let layout = Layout::new::<Header>();
    let (layout, groups_at) = layout.extend(Layout::array::<Group>(groups).expect(FITS)).expect(FITS);
    let (layout, buckets_at) = layout.extend(Layout::array::<Bucket>(buckets).expect(FITS)).expect(FITS);
    let (layout, log_throttle_at) = layout.extend(Layout::new::<Throttle>()).expect(FITS);
    let (layout, import_key_throttle_at) = layout.extend(Layout::new::<Throttle>()).expect(FITS);
    let (layout, findings_at) = layout.extend(Layout::new::<Findings>()).expect(FITS);
    let (layout, lease_requests_at) = layout.extend(Layout::new::<LeaseRequests>()).expect(FITS);
    let (layout, latencies_at) = layout.extend(Layout::new::<Latencies>()).expect(FITS);
    let (layout, sessions_at) = layout.extend(Layout::new::<Sessions>()).expect(FITS);
    let (layout, unknown_keys_at) = layout.extend(Layout::new::<UnknownKeys>()).expect(FITS);
    let signatures = signature_table::buckets_for(guc::signature_table_size());
    let (layout, signatures_at) =
        layout.extend(Layout::array::<signature_table::Bucket>(signatures).expect(FITS)).expect(FITS);
    let total = layout.pad_to_align();
    Plan {
        groups,
        groups_at,
        buckets,
        buckets_at,
        log_throttle_at,
        import_key_throttle_at,
        findings_at,
        lease_requests_at,
        latencies_at,
        sessions_at,
        unknown_keys_at,
        signatures,
        signatures_at,
        total,
    }
}

/// ShmemInitStruct aligns to a cache line of 128 bytes (`PG_CACHE_LINE_SIZE`), which is enough for each part.
const _: () = assert!(align_of::<Header>() <= 128 && align_of::<Group>() <= 128);

unsafe extern "C-unwind" fn request() {
    // SAFETY: PostgreSQL calls the hook when memory and locks may be requested. An ERROR of another library's hook
    // jumps over a frame that owns nothing.
    unsafe {
        if let Some(previous) = PREVIOUS_REQUEST {
            previous();
        }
        guard::entry(|| {
            pg_sys::RequestAddinShmemSpace(plan().total.size());
            pg_sys::RequestAddinShmemSpace(master_keys::size());
            pg_sys::RequestNamedLWLockTranche(NAME.as_ptr(), LOCKS);
        });
    }
}

/// Called by the postmaster at start, and again with fresh memory after a crash.
unsafe extern "C-unwind" fn startup() {
    // SAFETY: PostgreSQL calls the hook when shared memory exists. An ERROR of another library's hook jumps over a frame that
    // owns nothing.
    unsafe {
        if let Some(previous) = PREVIOUS_STARTUP {
            previous();
        }
        guard::entry(set_up);
    }
}

fn set_up() {
    // SAFETY: shared memory exists. Our segment has the planned size and alignment, is all zero before references to it
    // are made (zero is valid for each part, which consists of atomics), and is never unmapped while this process
    // lives.
    unsafe {
        let plan = plan();
        let init_lock = &raw mut (*pg_sys::MainLWLockArray.add(compat::ADDIN_SHMEM_INIT_LOCK)).lock;
        pg_sys::LWLockAcquire(init_lock, pg_sys::LWLockMode::LW_EXCLUSIVE);
        let mut found = false;
        let base = pg_sys::ShmemInitStruct(NAME.as_ptr(), plan.total.size(), &raw mut found).cast::<u8>();
        if !found {
            base.write_bytes(0, plan.total.size());
        }
        let mut keys_found = false;
        let keys_base =
            pg_sys::ShmemInitStruct(MASTER_KEYS_NAME.as_ptr(), master_keys::size(), &raw mut keys_found)
                .cast::<u8>();
        if !keys_found {
            keys_base.write_bytes(0, master_keys::size());
        }
        let master_keys = master_keys::place(keys_base);
        let groups = core::slice::from_raw_parts(base.add(plan.groups_at).cast::<Group>(), plan.groups);
        let buckets = core::slice::from_raw_parts(base.add(plan.buckets_at).cast::<Bucket>(), plan.buckets);
        let table = Table::new(&*base.cast::<Header>(), groups);
        if !found {
            let boot = *uuid::Uuid::new_v4().as_bytes();
            let seed = uuid::Uuid::new_v4().as_u64_pair().1;
            table.start(&restart::node(), &boot, seed, sys::GetCurrentTimestamp());
        }
        pg_sys::LWLockRelease(init_lock);
        if !found {
            restart::restore(&table);
        }
        let log_throttle = &*base.add(plan.log_throttle_at).cast::<Throttle>();
        let import_key_throttle = &*base.add(plan.import_key_throttle_at).cast::<Throttle>();
        let findings = &*base.add(plan.findings_at).cast::<Findings>();
        let lease_requests = &*base.add(plan.lease_requests_at).cast::<LeaseRequests>();
        let latencies = &*base.add(plan.latencies_at).cast::<Latencies>();
        let sessions = &*base.add(plan.sessions_at).cast::<Sessions>();
        let unknown_keys = &*base.add(plan.unknown_keys_at).cast::<UnknownKeys>();
        let signatures = core::slice::from_raw_parts(
            base.add(plan.signatures_at).cast::<signature_table::Bucket>(),
            plan.signatures,
        );
        let signatures = SignatureTable::new(signatures);
        if !found {
            findings.start();
            lease_requests.start();
        }
        let locks = pg_sys::GetNamedLWLockTranche(NAME.as_ptr());
        let hints = Hints::new(buckets);
        let segment: &'static Segment = Box::leak(Box::new(Segment {
            table,
            hints,
            log_throttle,
            import_key_throttle,
            findings,
            lease_requests,
            latencies,
            sessions,
            unknown_keys,
            master_keys,
            signatures,
            locks,
        }));
        SEGMENT.store(core::ptr::from_ref(segment).cast_mut(), Ordering::Release);
        if !found {
            restart::save_at_exit(&segment.table);
        }
    }
}

/// A held lock.
pub(super) struct Held(*mut pg_sys::LWLock);

impl Drop for Held {
    fn drop(&mut self) {
        // SAFETY: held by this process since `Segment::lock`.
        unsafe { pg_sys::LWLockRelease(self.0) };
    }
}

impl Segment {
    fn lock(&self, number: usize) -> Held {
        debug_assert!(number < LOCKS as usize);
        // SAFETY: one of the locks of our tranche.
        unsafe {
            let lock = &raw mut (*self.locks.add(number)).lock;
            pg_sys::LWLockAcquire(lock, pg_sys::LWLockMode::LW_EXCLUSIVE);
            Held(lock)
        }
    }
}

impl Segment {
    /// The master keys, while their lock is held.
    pub(super) fn with_master_keys<R>(&self, look: impl FnOnce(&MasterKeys) -> R) -> R {
        let _held = self.lock(1 + usage_table::INSERT_LOCKS);
        look(self.master_keys)
    }

    /// Without the lock: for what is read and written by itself.
    pub(super) fn master_key_state(&self) -> &'static MasterKeys {
        self.master_keys
    }
}

impl Control for Segment {
    type Guard = Held;

    fn hold(&self) -> Held {
        self.lock(0)
    }

    fn hold_to_insert(&self, number: usize) -> Held {
        self.lock(1 + number)
    }
}
