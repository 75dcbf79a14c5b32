//! Prefetching memory.
//!
//! With many tokens nearly every cache line that a verification reads comes from main memory, which takes as long as a
//! few hundred instructions, and each line holds the address of the next. Addresses that are known early are prefetched
//! early.
#![allow(unsafe_code)]

/// Prefetches a cache line. Any address is allowed: there is no fault, and the program reads nothing.
#[inline]
pub(crate) fn prefetch<T>(line: *const T) {
    // SAFETY: both instructions are defined to have no effect that a program can see.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(line.cast());
    }
    #[cfg(target_arch = "aarch64")]
    unsafe {
        core::arch::asm!("prfm pldl1keep, [{}]", in(reg) line, options(nostack, preserves_flags, readonly));
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = line;
}
