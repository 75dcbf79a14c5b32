//! The epoch that an event written now is of (`sql/schema/epochs.sql`), unless it is a new one.
#![allow(unsafe_code)]

use super::relations;
use super::rows::{Open, Row, Table};
use core::cell::Cell;
use pgrx::pg_sys::{self, Datum};

thread_local! {
    static CHECKED_IN: Cell<Option<u64>> = const { Cell::new(None) };
}

const EPOCH: usize = 0;
const SYSTEM_IDENTIFIER: usize = 3;
const TIMELINE: usize = 4;

const EPOCHS: Table<3> = Table {
    name: "audit_epochs",
    relation: |relations| relations.audit_epochs,
    columns: [
        (EPOCH, c"epoch", pg_sys::INT4OID),
        (SYSTEM_IDENTIFIER, c"system_identifier", pg_sys::INT8OID),
        (TIMELINE, c"timeline", pg_sys::INT4OID),
    ],
    checked_in: &CHECKED_IN,
};

/// As `current_epoch()` says, whose place it is to register another one: then this is `None`.
pub(crate) fn registered() -> Option<Datum> {
    let epochs = Open::new(&EPOCHS);
    let newest = epochs.last(relations::relations().audit_epochs_index, of_this_server);
    epochs.close();
    newest.flatten()
}

/// The number of an epoch, by value, if it is that of this cluster on its timeline.
fn of_this_server(row: &Row<'_>) -> Option<Datum> {
    // SAFETY: numbers in shared memory; nothing writes on a server in recovery.
    let (cluster, timeline) = unsafe {
        (pg_sys::GetSystemIdentifier().cast_signed(), pg_sys::GetWALInsertionTimeLine().cast_signed())
    };
    let is_ours = row.datum(SYSTEM_IDENTIFIER)? == Datum::from(cluster)
        && row.datum(TIMELINE)? == Datum::from(timeline);
    if is_ours { row.datum(EPOCH) } else { None }
}
