//! The master keys, which the background worker reads and every backend may need. They are in pages of their own that
//! core dumps leave out (Linux: `MADV_DONTDUMP`).
//!
//! Protected by an LWLock of our tranche: they are written at start and reload, and read when a backend opens a key that
//! it has not opened yet. The generation is read without the lock, to tell whether what was opened may still be used.
//!
//! A backend that misses a key asks the worker to read them again: it counts the request and sets the worker's latch.
#![allow(unsafe_code)]

use core::sync::atomic::{
    AtomicPtr, AtomicU8, AtomicU32, AtomicU64, Ordering::Acquire, Ordering::Relaxed, Ordering::Release,
};
use pgrx::pg_sys;
use tollgate_core::seal_box::{KEY_LEN, MAX_KEYS, MasterKey};
use zeroize::Zeroizing;

const WORDS: usize = KEY_LEN / 8;
/// In bytes.
const LONGEST_FAULT: usize = 400;

#[repr(C)]
pub(super) struct MasterKeys {
    /// Grows when the keys change; 0 until they are first read.
    generation: AtomicU64,
    /// Of the process that reads the keys; null while there is none.
    reader: AtomicPtr<pg_sys::Latch>,
    /// How often backends have asked it to read them.
    requests: AtomicU64,
    /// How many requests there were when it began to read what is stored here.
    answered: AtomicU64,
    count: AtomicU32,
    fault_length: AtomicU32,
    fault: [AtomicU8; LONGEST_FAULT],
    keys: [[AtomicU64; WORDS]; MAX_KEYS],
}

impl MasterKeys {
    pub(super) fn generation(&self) -> u64 {
        self.generation.load(Acquire)
    }

    pub(super) fn set_reader(&self, latch: *mut pg_sys::Latch) {
        self.reader.store(latch, Release);
    }

    pub(super) fn requests(&self) -> u64 {
        self.requests.load(Acquire)
    }

    /// The number of this request; `None` without a reader.
    pub(super) fn request(&self) -> Option<u64> {
        let reader = self.reader.load(Acquire);
        if reader.is_null() {
            return None;
        }
        let request = self.requests.fetch_add(1, Release) + 1;
        // SAFETY: the latch of a process is in shared memory for good. If another process has it by now, that one wakes
        // for nothing, as every process must expect.
        unsafe { pg_sys::SetLatch(reader) };
        Some(request)
    }

    pub(super) fn answer(&self, requests: u64) {
        self.answered.store(requests, Release);
    }

    pub(super) fn answered(&self) -> u64 {
        self.answered.load(Acquire)
    }

    /// Under the lock.
    pub(super) fn store(&self, keys: &[MasterKey]) {
        self.set_fault("");
        let same = self.generation() > 0
            && self.load().iter().map(MasterKey::as_bytes).eq(keys.iter().map(MasterKey::as_bytes));
        if same {
            return;
        }
        for (n, slot) in self.keys.iter().enumerate() {
            let empty = [0; KEY_LEN];
            let key = keys.get(n).map_or(&empty, MasterKey::as_bytes);
            for (to, from) in slot.iter().zip(key.as_chunks::<8>().0) {
                to.store(u64::from_ne_bytes(*from), Relaxed);
            }
        }
        self.count.store(keys.len().min(MAX_KEYS) as u32, Relaxed);
        self.generation.fetch_add(1, Release);
    }

    /// Under the lock. The keys stay; the first time, that there are none counts as read.
    pub(super) fn store_fault(&self, fault: &str) {
        self.set_fault(fault);
        if self.generation() == 0 {
            self.generation.store(1, Release);
        }
    }

    fn set_fault(&self, fault: &str) {
        let fault = &fault[..fault.floor_char_boundary(LONGEST_FAULT)];
        for (to, from) in self.fault.iter().zip(fault.bytes()) {
            to.store(from, Relaxed);
        }
        self.fault_length.store(fault.len() as u32, Relaxed);
    }

    /// Under the lock.
    pub(super) fn load(&self) -> Vec<MasterKey> {
        let count = self.count.load(Relaxed) as usize;
        let mut keys = Vec::with_capacity(count);
        for slot in self.keys.iter().take(count) {
            let mut key = Zeroizing::new([0; KEY_LEN]);
            for (to, from) in key.as_chunks_mut::<8>().0.iter_mut().zip(slot) {
                *to = from.load(Relaxed).to_ne_bytes();
            }
            keys.push(MasterKey::from_bytes(&key));
        }
        keys
    }

    /// Under the lock.
    pub(super) fn fault(&self) -> Option<String> {
        let length = self.fault_length.load(Relaxed) as usize;
        let bytes = self.fault.iter().take(length).map(|byte| byte.load(Relaxed)).collect::<Vec<u8>>();
        (length > 0).then(|| String::from_utf8_lossy(&bytes).into_owned())
    }
}

fn page() -> usize {
    unsafe extern "C" {
        safe fn getpagesize() -> core::ffi::c_int;
    }
    usize::try_from(getpagesize()).unwrap_or(4096)
}

/// What to request for whole pages at any address.
pub(super) fn size() -> usize {
    size_of::<MasterKeys>().next_multiple_of(page()) + page()
}

/// Where the keys are in a block of that size.
///
/// # Safety
///
/// The block is of [`size`] bytes, is all zero, and is never unmapped while this process lives.
pub(super) unsafe fn place(block: *mut u8) -> &'static MasterKeys {
    // SAFETY: within the block by its size; zero is valid for atomics. madvise changes no content, and where it is
    // refused, as for huge pages, the keys may be in core dumps.
    unsafe {
        let start = block.map_addr(|address| address.next_multiple_of(page()));
        #[cfg(target_os = "linux")]
        {
            use core::ffi::{c_int, c_void};
            unsafe extern "C" {
                fn madvise(start: *mut c_void, length: usize, advice: c_int) -> c_int;
            }
            const MADV_DONTDUMP: c_int = 16;
            let length = size_of::<MasterKeys>().next_multiple_of(page());
            madvise(start.cast(), length, MADV_DONTDUMP);
        }
        &*start.cast::<MasterKeys>()
    }
}
