//! Which capabilities the acting role has, where a function is stricter with one of them than its privileges say.
#![allow(unsafe_code)]

use super::relations::Relations;
use super::rows::{Open, Table};
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

/// The role that acts, outside of the functions that run as the owner.
pub(crate) fn acting_role() -> Oid {
    // SAFETY: a plain read of the state of this backend.
    unsafe { pg_sys::GetOuterUserId() }
}

/// That role, if all that it may do here is what a gateway may.
pub(crate) fn only_a_gateway() -> Option<Oid> {
    let acting = acting_role();
    // SAFETY: the outer user exists while it acts.
    if unsafe { pg_sys::superuser_arg(acting) } {
        return None;
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
    let is_one = !held.is_empty() && held.iter().all(|(_, capability)| capability == GATEWAY);
    is_one.then_some(acting)
}
