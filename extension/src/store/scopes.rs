//! The scope catalogue, as issuing reads it.
#![allow(unsafe_code)]

use super::fresh_snapshot;
use super::relations;
use super::rows::{Open, Table, text_key};
use super::statements::{Kept, with_plan};
use crate::error::Error;
use core::cell::Cell;
use pgrx::datum::DatumWithOid;
use pgrx::pg_sys;

thread_local! {
    static COVERING_PLAN: Kept = const { Cell::new(None) };
    static CHECKED_IN: Cell<Option<u64>> = const { Cell::new(None) };
}

const COVERING: &str = "
    SELECT count(*) FROM (
        SELECT FROM tollgate.scopes s
        WHERE EXISTS (SELECT FROM unnest($1) AS wanted (scope)
                      WHERE s.name = wanted.scope
                         OR (right(wanted.scope, 2) = ':*' AND starts_with(s.name, left(wanted.scope, -1))))
        FOR KEY SHARE OF s) locked";

const CATALOGUE: Table<1> = Table {
    name: "scopes",
    relation: |relations| relations.scopes,
    columns: [(0, c"name", pg_sys::TEXTOID)],
    checked_in: &CHECKED_IN,
};

/// The scopes that are neither in the catalogue nor, for a wildcard, cover a scope in it. The scopes that cover the
/// others stay until the transaction ends: `drop_scope` waits for it.
pub(crate) fn uncovered(scopes: &[String]) -> Result<Vec<String>, Error> {
    if scopes.is_empty() {
        return Ok(Vec::new());
    }
    // SAFETY: an existing relation.
    unsafe { pg_sys::LockRelationOid(relations::relations().scopes, pg_sys::RowShareLock.cast_signed()) };
    if fresh_snapshot::transaction_keeps_its_snapshot() {
        // The snapshot may show scopes that were dropped since. Locking the rows detects it (40001).
        lock_covering_scopes(scopes)?;
    }
    let mut uncovered: Vec<&String> = scopes.iter().filter(|scope| *scope != "admin").collect();
    if uncovered.is_empty() {
        return Ok(Vec::new());
    }
    let catalogue = Open::new(&CATALOGUE);
    let index = relations::relations().scopes_index;
    uncovered.retain(|scope| {
        let key = text_key(0, pg_sys::DEFAULT_COLLATION_OID, scope);
        catalogue.find(index, [key], |_| Some(())).is_none()
    });
    if uncovered.iter().any(|scope| scope.ends_with(":*")) {
        catalogue.each(|row| {
            let Some(name) = row.bytes(0_usize) else { return };
            uncovered.retain(|scope| {
                !(scope.ends_with(":*") && name.starts_with(&scope.as_bytes()[..scope.len() - 1]))
            });
        });
    }
    catalogue.close();
    Ok(uncovered.into_iter().cloned().collect())
}

/// Locks the rows of the catalogue that cover any of the scopes.
fn lock_covering_scopes(scopes: &[String]) -> Result<(), Error> {
    // SAFETY: the datum is of the type given with it.
    let arguments = [unsafe { DatumWithOid::new(scopes.to_vec(), pg_sys::TEXTARRAYOID) }];
    with_plan(&COVERING_PLAN, COVERING, &arguments, |_| Ok(()))
}
