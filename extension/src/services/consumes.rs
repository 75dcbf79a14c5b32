//! Functions that consume what is good once must be committed before their answer is used. Those of a gateway, which answers
//! others over the network, are therefore not called in a transaction block, where it might be rolled back after the answer.
#![allow(unsafe_code)]

use crate::error::Error;
use crate::store::relations::Relations;
use crate::store::rows::{Open, Table};
use core::cell::Cell;
use pgrx::pg_sys::{self, Oid};

const GATEWAY: &str = "gateway";

thread_local! {
    static CHECKED_IN: Cell<Option<u64>> = const { Cell::new(None) };
}

const CAPABILITIES: Table<3> = Table {
    name: "capabilities",
    relation: |relations: &Relations| relations.capabilities,
    columns: [
        (0, c"role", pg_sys::TEXTOID),
        (1, c"role_oid", pg_sys::OIDOID),
        (2, c"capability", pg_sys::TEXTOID),
    ],
    checked_in: &CHECKED_IN,
};

/// 25001 in a transaction block of a role that is a gateway and nothing else.
pub(crate) fn check(function: &str) -> Result<(), Error> {
    // SAFETY: reads the state of this backend's transaction.
    if !unsafe { pg_sys::IsInTransactionBlock(true) } {
        return Ok(());
    }
    // SAFETY: the outer user exists while it acts.
    let (acting, may_all) = unsafe {
        let acting = pg_sys::GetOuterUserId();
        (acting, pg_sys::superuser_arg(acting))
    };
    if may_all {
        return Ok(());
    }
    let mut held = Vec::new();
    let table = Open::latest(&CAPABILITIES);
    table.each(|row| {
        let role = row.datum(1_usize).map(|role| Oid::from_u32(role.value() as u32));
        held.extend(role.zip(row.text(2_usize)));
    });
    table.close();
    // SAFETY: a look-up in the system catalogue by an oid, which may be of a role that is gone.
    held.retain(|(role, _)| unsafe { pg_sys::has_privs_of_role(acting, *role) });
    if !held.is_empty() && held.iter().all(|(_, capability)| capability == GATEWAY) {
        return Err(Error::consumed_in_a_transaction(function));
    }
    Ok(())
}
