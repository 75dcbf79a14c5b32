//! The statements of issuing, prepared once per backend. They run as the owner of the tables, with search_path pinned by
//! the SQL functions that lead here.
#![allow(unsafe_code)]

use super::relations;
use crate::error::Error;
use core::cell::RefCell;
use pgrx::Uuid;
use pgrx::datum::{DatumWithOid, Interval, TimestampWithTimeZone};
use pgrx::pg_sys::{self, Datum};
use pgrx::spi::{OwnedPreparedStatement, Spi, SpiError};
use tollgate_core::token::Digest;

pub(crate) struct NewToken<'a> {
    pub(crate) id: Uuid,
    pub(crate) digest: &'a Digest,
    pub(crate) hint: &'a str,
    pub(crate) user_id: &'a str,
    pub(crate) name: &'a str,
    pub(crate) scopes: &'a [String],
    pub(crate) lifetime: Option<Interval>,
    /// A jsonb object.
    pub(crate) metadata: Datum,
    /// A cidr[] without NULLs.
    pub(crate) allowed_ips: Option<Datum>,
}

pub(crate) struct Stored {
    pub(crate) expires_at: Option<TimestampWithTimeZone>,
    pub(crate) created_at: Option<TimestampWithTimeZone>,
}

const INSERT: &str = "
    WITH issued AS (
        INSERT INTO tollgate.api_tokens (id, token_hash, hint, user_id, name, scopes, expires_at, metadata, allowed_ips)
        VALUES ($1, $2, $3, $4, $5, $6, clock_timestamp() + $7, $8, $9)
        RETURNING id, user_id, name, hint, scopes, expires_at, allowed_ips, created_at
    ), logged AS (
        INSERT INTO tollgate.audit_log (event, token_id, user_id, detail)
        SELECT 'token.created', i.id, i.user_id,
               jsonb_strip_nulls(jsonb_build_object('name', i.name, 'hint', i.hint, 'scopes', i.scopes,
                                                    'expires_at', i.expires_at, 'allowed_ips', i.allowed_ips))
        FROM issued i
    )
    SELECT expires_at, created_at FROM issued";

const UNCOVERED: &str = "
    SELECT coalesce(array_agg(wanted.scope ORDER BY wanted.n), '{}')
    FROM unnest($1) WITH ORDINALITY AS wanted (scope, n)
    WHERE wanted.scope <> 'admin' AND NOT EXISTS (
        SELECT FROM tollgate.scopes s
        WHERE s.name = wanted.scope
           OR (right(wanted.scope, 2) = ':*' AND starts_with(s.name, left(wanted.scope, -1))))";

const COVERING: &str = "
    SELECT count(*) FROM (
        SELECT FROM tollgate.scopes s
        WHERE EXISTS (SELECT FROM unnest($1) AS wanted (scope)
                      WHERE s.name = wanted.scope
                         OR (right(wanted.scope, 2) = ':*' AND starts_with(s.name, left(wanted.scope, -1))))
        FOR KEY SHARE OF s) locked";

thread_local! {
    static COVERING_PLAN: RefCell<Option<OwnedPreparedStatement>> = const { RefCell::new(None) };
    static INSERT_PLAN: RefCell<Option<OwnedPreparedStatement>> = const { RefCell::new(None) };
    static UNCOVERED_PLAN: RefCell<Option<OwnedPreparedStatement>> = const { RefCell::new(None) };
}

/// Stores a token and its event.
pub(crate) fn insert(token: &NewToken<'_>) -> Result<Stored, Error> {
    // SAFETY: each datum is of the type beside it, and lives as long as the call that it came from.
    let arguments = unsafe {
        [
            DatumWithOid::new(token.id, pg_sys::UUIDOID),
            DatumWithOid::new(token.digest.as_slice(), pg_sys::BYTEAOID),
            DatumWithOid::new(token.hint, pg_sys::TEXTOID),
            DatumWithOid::new(token.user_id, pg_sys::TEXTOID),
            DatumWithOid::new(token.name, pg_sys::TEXTOID),
            DatumWithOid::new(token.scopes.to_vec(), pg_sys::TEXTARRAYOID),
            DatumWithOid::new(token.lifetime, pg_sys::INTERVALOID),
            DatumWithOid::new(token.metadata, pg_sys::JSONBOID),
            DatumWithOid::new(token.allowed_ips, pg_sys::CIDRARRAYOID),
        ]
    };
    with_plan(&INSERT_PLAN, INSERT, &arguments, |rows| {
        Ok(Stored { expires_at: rows.get(1)?, created_at: rows.get(2)? })
    })
}

/// The scopes that the catalogue neither holds nor, for a wildcard, has one of. Whatever they are found covered by stays
/// until the transaction ends: `drop_scope` waits for it.
pub(crate) fn uncovered_scopes(scopes: &[String]) -> Result<Vec<String>, Error> {
    if scopes.is_empty() {
        return Ok(Vec::new());
    }
    // SAFETY: an existing relation, a plain variable of this process.
    let old_snapshot = unsafe {
        pg_sys::LockRelationOid(relations::relations().scopes, pg_sys::RowShareLock.cast_signed());
        pg_sys::XactIsoLevel >= pg_sys::XACT_REPEATABLE_READ.cast_signed()
    };
    if old_snapshot {
        // The snapshot may show what has been dropped since. Locking the rows notices (40001).
        // SAFETY: the datum is of the type beside it.
        let arguments = [unsafe { DatumWithOid::new(scopes.to_vec(), pg_sys::TEXTARRAYOID) }];
        with_plan(&COVERING_PLAN, COVERING, &arguments, |_| Ok(()))?;
    }
    // SAFETY: the datum is of the type beside it.
    let arguments = [unsafe { DatumWithOid::new(scopes.to_vec(), pg_sys::TEXTARRAYOID) }];
    with_plan(&UNCOVERED_PLAN, UNCOVERED, &arguments, |rows| Ok(rows.get_one()?.unwrap_or_default()))
}

fn with_plan<R>(
    plan: &'static std::thread::LocalKey<RefCell<Option<OwnedPreparedStatement>>>,
    statement: &str,
    arguments: &[DatumWithOid<'_>],
    read: impl FnOnce(pgrx::spi::SpiTupleTable<'_>) -> Result<R, SpiError>,
) -> Result<R, Error> {
    let types: Vec<_> = arguments.iter().map(|argument| pg_sys::PgOid::from(argument.oid())).collect();
    Spi::connect_mut(|client| {
        plan.with_borrow_mut(|kept| {
            if kept.is_none() {
                *kept = Some(client.prepare_mut(statement, &types)?.keep());
            }
            let prepared = kept.as_ref().ok_or(SpiError::InvalidPosition)?;
            read(client.update(prepared, Some(1), arguments)?.first())
        })
    })
    .map_err(|error| Error::internal(format!("could not store a token: {error}")))
}
