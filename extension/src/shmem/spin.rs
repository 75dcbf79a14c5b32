//! PostgreSQL's spinlock, `slock_t` (`storage/spin.h`).
//!
//! A waiting backend spins a little, then sleeps between attempts and shows the wait event `SpinDelay`. Meanwhile it
//! does not react to cancel or terminate, and after about a minute it reports a stuck spinlock, as everywhere in
//! PostgreSQL, and ends all backends (PANIC). So the rules of `spin.h` apply: between [`SpinLock::hold`] and the drop
//! of its guard there are some tens of instructions, without calls of PostgreSQL, allocations or panics.
#![allow(unsafe_code)]

use core::cell::UnsafeCell;
use pgrx::pg_sys::slock_t;
use tollgate_core::usage_table;

// The macros of spin.h as functions, from the C file that pgrx links in (`pgrx-cshim.c`). Without pgrx's guard: a
// spinlock raises nothing below PANIC, which does not return.
unsafe extern "C" {
    #[link_name = "SpinLockInit__pgrx_cshim"]
    fn init(lock: *mut slock_t);
    #[link_name = "SpinLockAcquire__pgrx_cshim"]
    fn acquire(lock: *mut slock_t);
    #[link_name = "SpinLockRelease__pgrx_cshim"]
    fn release(lock: *mut slock_t);
}

#[repr(transparent)]
#[derive(Default)]
pub(super) struct SpinLock(UnsafeCell<slock_t>);

// SAFETY: made to be shared; only the three functions above touch it.
unsafe impl Sync for SpinLock {}

pub(super) struct Held<'a>(&'a SpinLock);

impl usage_table::SpinLock for SpinLock {
    type Guard<'a> = Held<'a>;

    fn init(&self) {
        // SAFETY: a valid address, which nothing else uses yet.
        unsafe { init(self.0.get()) };
    }

    #[inline]
    fn hold(&self) -> Held<'_> {
        // SAFETY: `init` was called when the segment was laid out.
        unsafe { acquire(self.0.get()) };
        Held(self)
    }
}

impl Drop for Held<'_> {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: held since `hold`.
        unsafe { release(self.0.0.get()) };
    }
}
