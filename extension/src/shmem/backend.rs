//! The process and the database that the caller is in, which the shared structures tell apart.
#![allow(unsafe_code)]

use pgrx::pg_sys::{self, Datum, Oid};

pub(super) fn process() -> usize {
    // SAFETY: a plain variable of this process.
    unsafe { pg_sys::MyProcPid }.cast_unsigned() as usize
}

pub(super) fn database() -> u32 {
    // SAFETY: a plain variable of this process.
    unsafe { pg_sys::MyDatabaseId.to_u32() }
}

pub(super) fn database_exists(database: u32) -> bool {
    // SAFETY: a look-up in the system catalogue.
    unsafe {
        pg_sys::SearchSysCacheExists(
            pg_sys::SysCacheIdentifier::DATABASEOID as i32,
            Datum::from(Oid::from(database)),
            Datum::null(),
            Datum::null(),
            Datum::null(),
        )
    }
}
