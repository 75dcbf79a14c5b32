//! The catalogue of scopes, as issuing asks it.
#![allow(unsafe_code)]

use super::latest;
use super::relations;
use super::rows::{Open, Table};
use crate::datum;
use crate::error::Error;
use crate::store::issue;
use core::cell::Cell;
use pgrx::IntoDatum;
use pgrx::pg_sys;

thread_local! {
    static CHECKED_IN: Cell<Option<u64>> = const { Cell::new(None) };
}

const CATALOGUE: Table<1> = Table {
    name: "scopes",
    relation: |relations| relations.scopes,
    columns: [(0, c"name", pg_sys::TEXTOID)],
    checked_in: &CHECKED_IN,
};

/// The scopes that the catalogue neither holds nor, for a wildcard, has one of. Whatever they are found covered by stays
/// until the transaction ends: `drop_scope` waits for it.
pub(crate) fn uncovered(scopes: &[String]) -> Result<Vec<String>, Error> {
    if scopes.is_empty() {
        return Ok(Vec::new());
    }
    // SAFETY: an existing relation.
    unsafe { pg_sys::LockRelationOid(relations::relations().scopes, pg_sys::RowShareLock.cast_signed()) };
    if latest::transaction_keeps_its_snapshot() {
        // The snapshot may show what has been dropped since. Locking the rows notices (40001).
        issue::lock_covering_scopes(scopes)?;
    }
    let mut uncovered: Vec<&String> = scopes.iter().filter(|scope| *scope != "admin").collect();
    if uncovered.is_empty() {
        return Ok(Vec::new());
    }
    let catalogue = Open::new(&CATALOGUE);
    let index = relations::relations().scopes_index;
    uncovered.retain(|scope| {
        let name = scope.as_str().into_datum();
        !name.is_some_and(|name| catalogue.has(index, name))
    });
    if uncovered.iter().any(|scope| scope.ends_with(":*")) {
        catalogue.each(|row| {
            // SAFETY: the column is of type text, and the row pinned.
            let Some(name) = row.datum(0).map(|name| unsafe { datum::varlena(name) }) else { return };
            uncovered.retain(|scope| {
                !(scope.ends_with(":*") && name.starts_with(&scope.as_bytes()[..scope.len() - 1]))
            });
        });
    }
    catalogue.close();
    Ok(uncovered.into_iter().cloned().collect())
}
