//! PostgreSQL's spinlock, `slock_t` (`storage/spin.h`).
//!
//! A backend that waits for one spins a little, then sleeps between attempts and shows the wait event `SpinDelay`. It
//! does not answer to cancel or terminate meanwhile, and after about a minute it takes the lock for stuck, as everywhere
//! in PostgreSQL, and ends all backends (PANIC). So the rules of `spin.h` hold: between [`SpinLock::hold`] and the drop of
//! its guard there are some tens of instructions, with no call of PostgreSQL's, no allocation and no panic.
#![allow(unsafe_code)]

#[cfg(not(test))]
mod server {
    use core::cell::UnsafeCell;
    use pgrx::pg_sys::slock_t;

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
    pub(in super::super) struct SpinLock(UnsafeCell<slock_t>);

    // SAFETY: made to be shared; only the three functions above touch it.
    unsafe impl Sync for SpinLock {}

    pub(in super::super) struct Held<'a>(&'a SpinLock);

    impl SpinLock {
        /// Before anybody takes it.
        pub(in super::super) fn init(&self) {
            // SAFETY: a valid address, which nobody else uses yet.
            unsafe { init(self.0.get()) };
        }

        #[inline]
        pub(in super::super) fn hold(&self) -> Held<'_> {
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
}
#[cfg(not(test))]
pub(super) use server::SpinLock;
#[cfg(test)]
pub(crate) use threads::SpinLock;

/// The same for threads: unit tests have no server, whose `s_lock` is what a waiter calls.
#[cfg(test)]
mod threads {
    use core::sync::atomic::{AtomicBool, Ordering::*};

    #[repr(transparent)]
    #[derive(Default)]
    pub(crate) struct SpinLock(AtomicBool);

    pub(crate) struct Held<'a>(&'a SpinLock);

    impl SpinLock {
        pub(crate) fn init(&self) {
            self.0.store(false, Release);
        }

        pub(crate) fn hold(&self) -> Held<'_> {
            while self.0.swap(true, Acquire) {
                std::thread::yield_now();
            }
            Held(self)
        }
    }

    impl Drop for Held<'_> {
        fn drop(&mut self) {
            self.0.0.store(false, Release);
        }
    }
}
