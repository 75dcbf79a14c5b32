//! Rows of our composite types, formed from datums without a detour through text.
#![allow(unsafe_code)]

use super::relations::{self, Composite};
use crate::error::Error;
use crate::pg::sys;
use core::cell::Cell;
use pgrx::pg_sys::{self, Datum};

thread_local! {
    /// Row descriptors, copied to memory that lives as long as the backend, with the epoch they were read in.
    static DESCRIPTORS: Cell<[Option<(u64, pg_sys::TupleDesc)>; Composite::COUNT]> = const { Cell::new([None; Composite::COUNT]) };
}

/// Forms a row with one value per column.
pub(crate) fn form<const N: usize>(composite: Composite, columns: [Option<Datum>; N]) -> Datum {
    let descriptor = descriptor(composite, N);
    let mut values = columns.map(|column| column.unwrap_or(Datum::null()));
    let mut nulls = columns.map(|column| column.is_none());
    // SAFETY: the descriptor has N columns; each datum is of its column's type, as the callers' literals show next to
    // the CREATE TYPE. The closure holds nothing that needs dropping.
    unsafe {
        sys::guarded(|| {
            let tuple = sys::heap_form_tuple(descriptor, values.as_mut_ptr(), nulls.as_mut_ptr());
            sys::HeapTupleHeaderGetDatum((*tuple).t_data)
        })
    }
}

fn descriptor(composite: Composite, columns: usize) -> pg_sys::TupleDesc {
    let epoch = relations::epoch();
    if let Some((read_in, descriptor)) = DESCRIPTORS.get()[composite as usize]
        && read_in == epoch
    {
        return descriptor;
    }
    let relation = relations::relations().composites[composite as usize];
    // SAFETY: the type of an existing relation; the copy is made in memory that is never freed.
    let descriptor = unsafe {
        let previous = pg_sys::MemoryContextSwitchTo(pg_sys::TopMemoryContext);
        let descriptor = pg_sys::lookup_rowtype_tupdesc_copy(pg_sys::get_rel_type_id(relation), -1);
        pg_sys::MemoryContextSwitchTo(previous);
        descriptor
    };
    // SAFETY: just copied.
    let natts = usize::try_from(unsafe { (*descriptor).natts }).unwrap_or(0);
    if natts != columns {
        // SAFETY: just copied, and not used yet.
        unsafe { pg_sys::FreeTupleDesc(descriptor) };
        Error::unknown_layout(format!(
            "Type tollgate.{} has {natts} columns, the library knows {columns}.",
            composite.name().to_string_lossy()
        ))
        .raise();
    }
    let mut all = DESCRIPTORS.get();
    if let Some((_, stale)) = all[composite as usize].replace((epoch, descriptor)) {
        // SAFETY: copied here earlier and no longer used: rows carry their type's oid, not its descriptor.
        unsafe { pg_sys::FreeTupleDesc(stale) };
    }
    DESCRIPTORS.set(all);
    descriptor
}
