//! `found` and `free_finding`: hand out what verifications found but cannot write, so that it reaches the tables. The
//! SQL side is in `sql/schema/verify/findings.sql`.

use crate::pg::fmgr::{Call, sql_function};
use crate::shmem;
use crate::shmem::Found;
use pgrx::pg_sys::Datum;
use pgrx::prelude::*;
use pgrx::{Inet, IntoDatum, Uuid};

#[pg_extern(sql = false)]
#[allow(clippy::type_complexity)]
fn found() -> TableIterator<
    'static,
    (
        name!(number, i64),
        name!(token_id, Uuid),
        name!(at, Option<TimestampWithTimeZone>),
        name!(client_ip, Option<Inet>),
        name!(token_hash, Option<Vec<u8>>),
    ),
> {
    TableIterator::new(shmem::findings().into_iter().map(|finding| {
        let (client, digest) = match finding.found {
            Found::Digest(digest) => (None, Some(digest.to_vec())),
            Found::Reuse(client) => (client.map(|client| Inet(client.to_string())), None),
        };
        (
            finding.number.cast_signed(),
            Uuid::from_bytes(finding.token_id),
            TimestampWithTimeZone::try_from(finding.at).ok(),
            client,
            digest,
        )
    }))
}

sql_function!(free_finding);
fn free_finding(call: &Call) -> Option<Datum> {
    let number: i64 = call.value(0)?;
    shmem::free_finding(number.cast_unsigned()).into_datum()
}
