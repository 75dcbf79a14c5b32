//! Asking the processor for memory ahead of its use.
//!
//! With many tokens nearly each of the cache lines that a verification looks at comes from memory, as far away as a few
//! hundred instructions, and one says where the next is. What can be told of them early is asked for early.
#![allow(unsafe_code)]

/// Has a cache line fetched. Any address will do: there is no fault, and nothing is read as far as the program can see.
#[inline]
pub(crate) fn prefetch<T>(line: *const T) {
    // SAFETY: as said, by the definition of both instructions.
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
