//! Reading and creating PostgreSQL's nodes and lists of nodes.
#![allow(unsafe_code)]

use core::ffi::c_void;
use pgrx::pg_sys::{self, List, Node, NodeTag};

/// `makeNode`.
pub(crate) unsafe fn new_node<T>(tag: NodeTag) -> *mut T {
    // SAFETY: zeroed memory is how PostgreSQL makes a node of any type; each begins with its tag.
    unsafe {
        let node = pg_sys::palloc0(size_of::<T>()).cast::<T>();
        (*node.cast::<Node>()).type_ = tag;
        node
    }
}

pub(crate) unsafe fn list_len(list: *const List) -> usize {
    // SAFETY: a list, or NULL for an empty one.
    unsafe { list.as_ref() }.map_or(0, |list| usize::try_from(list.length).unwrap_or(0))
}

/// The nth element of a list of at least n + 1 nodes.
pub(crate) unsafe fn list_nth(list: *const List, n: usize) -> *mut c_void {
    // SAFETY: the caller's promise.
    unsafe { (*(*list).elements.add(n)).ptr_value }
}
