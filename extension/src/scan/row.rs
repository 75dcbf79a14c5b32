//! The descriptor of a result that consists of columns of ours.
//!
//! The executor looks the type of each column up in the catalogue, each time, which is a tenth of what a verification takes.
//! Ours never change, so they are looked up once per process.
#![allow(unsafe_code)]

use super::plan::list_nth;
use crate::api::verify::Verdict;
use crate::{compat, sys};
use core::ffi::c_int;
use core::ptr;
use core::sync::atomic::{AtomicPtr, Ordering};
use pgrx::pg_sys::{self, AttrNumber, TupleDesc};

/// Of all columns, without names.
static ALL: AtomicPtr<pg_sys::TupleDescData> = AtomicPtr::new(ptr::null_mut());

/// Describes such columns, counted from 0, under the names that the targets give them.
///
/// # Safety
///
/// One target entry for each column; in [`sys::guarded`].
pub(super) unsafe fn describe(columns: &[usize], targets: *const pg_sys::List) -> TupleDesc {
    // SAFETY: every number is that of a column that there is; a name has room for NAMEDATALEN bytes, with which it is made.
    unsafe {
        let all = all();
        let descriptor = sys::CreateTemplateTupleDesc(columns.len() as c_int);
        for (n, &column) in columns.iter().enumerate() {
            sys::TupleDescCopyEntry(descriptor, number(n), all, number(column));
            let name = (*list_nth(targets, n).cast::<pg_sys::TargetEntry>()).resname;
            if !name.is_null() {
                sys::namestrcpy(compat::column_name(descriptor, n), name);
            }
        }
        descriptor
    }
}

unsafe fn all() -> TupleDesc {
    let known = ALL.load(Ordering::Relaxed);
    if !known.is_null() {
        return known;
    }
    // SAFETY: types that are always there. Kept as long as the process, and only once it is whole.
    unsafe {
        let previous = pg_sys::MemoryContextSwitchTo(pg_sys::TopMemoryContext);
        let descriptor = sys::CreateTemplateTupleDesc(Verdict::COLUMNS as c_int);
        for (n, data_type) in Verdict::TYPES.into_iter().enumerate() {
            sys::TupleDescInitEntry(descriptor, number(n), ptr::null(), data_type, -1, 0);
        }
        pg_sys::MemoryContextSwitchTo(previous);
        ALL.store(descriptor, Ordering::Relaxed);
        descriptor
    }
}

/// As PostgreSQL counts columns.
fn number(n: usize) -> AttrNumber {
    n as AttrNumber + 1
}
