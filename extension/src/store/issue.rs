//! The statements of issuing, prepared once per backend. They run as the owner of the tables, with search_path pinned by
//! the SQL functions that lead here.
#![allow(unsafe_code)]

use crate::error::Error;
use core::cell::Cell;
use pgrx::Uuid;
use pgrx::datum::{DatumWithOid, Interval, TimestampWithTimeZone};
use pgrx::pg_sys::{self, Datum};
use pgrx::spi::{OwnedPreparedStatement, Spi, SpiError};
use tollgate_core::token::Digest;

pub(crate) struct NewToken<'a> {
    pub(crate) event: &'a str,
    pub(crate) id: Uuid,
    pub(crate) digest: &'a Digest,
    pub(crate) hint: &'a str,
    pub(crate) user_id: &'a str,
    pub(crate) name: &'a str,
    pub(crate) scopes: &'a [String],
    pub(crate) lifetime: Option<Interval>,
    /// A jsonb object.
    pub(crate) metadata: Option<Datum>,
    /// A cidr[] without NULLs.
    pub(crate) allowed_ips: Option<Datum>,
    pub(crate) rate_limit: Option<i32>,
    pub(crate) rate_window: Option<Interval>,
    /// Locked. What is not given of lifetime, metadata, networks and limits is inherited from it.
    pub(crate) parent: Option<Uuid>,
}

pub(crate) struct Stored {
    pub(crate) expires_at: Option<TimestampWithTimeZone>,
    pub(crate) created_at: Option<TimestampWithTimeZone>,
}

const INSERT: &str = "
    WITH parent AS MATERIALIZED (
        -- Without a parent nothing is looked up, however a plan that was made while the table was small would do it.
        SELECT p.* FROM tollgate.api_tokens p WHERE $13 IS NOT NULL AND p.id = $13
    ), issued AS (
        INSERT INTO tollgate.api_tokens AS t (id, token_hash, hint, user_id, name, scopes, expires_at, metadata, allowed_ips,
                                              rate_limit, rate_window, parent_id)
        SELECT $2, $3, $4, $5, $6, $7, coalesce(clock_timestamp() + $8, p.expires_at), coalesce($9, p.metadata),
               coalesce($10, p.allowed_ips), coalesce($11, p.rate_limit),
               CASE WHEN $11 IS NULL THEN p.rate_window ELSE $12 END, p.id
        FROM (SELECT) given LEFT JOIN parent p ON true
        ON CONFLICT (token_hash) DO NOTHING
        RETURNING t.id, t.user_id, t.expires_at, t.created_at, tollgate.issued_detail(t) AS detail
    ), logged AS (
        INSERT INTO tollgate.audit_log (event, token_id, user_id, detail)
        SELECT $1, i.id, i.user_id, i.detail FROM issued i
    )
    SELECT expires_at, created_at FROM issued";

const COVERING: &str = "
    SELECT count(*) FROM (
        SELECT FROM tollgate.scopes s
        WHERE EXISTS (SELECT FROM unnest($1) AS wanted (scope)
                      WHERE s.name = wanted.scope
                         OR (right(wanted.scope, 2) = ':*' AND starts_with(s.name, left(wanted.scope, -1))))
        FOR KEY SHARE OF s) locked";

/// A statement that was prepared, for as long as the process lives.
pub(super) type Kept = Cell<Option<&'static OwnedPreparedStatement>>;

thread_local! {
    static COVERING_PLAN: Kept = const { Cell::new(None) };
    static INSERT_PLAN: Kept = const { Cell::new(None) };
    static LOCK_FOR_ROTATION_PLAN: Kept = const { Cell::new(None) };
    static LOCK_PARENT_PLAN: Kept = const { Cell::new(None) };
    static REPLACE_PLAN: Kept = const { Cell::new(None) };
}

/// Stores a token and its event; `None` if one with its digest is stored already.
pub(crate) fn insert(token: &NewToken<'_>) -> Result<Option<Stored>, Error> {
    // SAFETY: each datum is of the type beside it, and lives as long as the call that it came from.
    let arguments = unsafe {
        [
            DatumWithOid::new(token.event, pg_sys::TEXTOID),
            DatumWithOid::new(token.id, pg_sys::UUIDOID),
            DatumWithOid::new(token.digest.as_slice(), pg_sys::BYTEAOID),
            DatumWithOid::new(token.hint, pg_sys::TEXTOID),
            DatumWithOid::new(token.user_id, pg_sys::TEXTOID),
            DatumWithOid::new(token.name, pg_sys::TEXTOID),
            DatumWithOid::new(token.scopes.to_vec(), pg_sys::TEXTARRAYOID),
            DatumWithOid::new(token.lifetime, pg_sys::INTERVALOID),
            DatumWithOid::new(token.metadata, pg_sys::JSONBOID),
            DatumWithOid::new(token.allowed_ips, pg_sys::CIDRARRAYOID),
            DatumWithOid::new(token.rate_limit, pg_sys::INT4OID),
            DatumWithOid::new(token.rate_window, pg_sys::INTERVALOID),
            DatumWithOid::new(token.parent, pg_sys::UUIDOID),
        ]
    };
    with_plan(&INSERT_PLAN, INSERT, &arguments, |rows| {
        if rows.is_empty() {
            return Ok(None);
        }
        Ok(Some(Stored { expires_at: rows.get(1)?, created_at: rows.get(2)? }))
    })
}

/// What the token that is to be rotated tells of its successor.
pub(crate) struct Predecessor {
    pub(crate) hint: String,
    pub(crate) expires_at: Option<TimestampWithTimeZone>,
}

/// Locks a token and makes sure that it may be rotated.
pub(crate) fn lock_for_rotation(token_id: Uuid) -> Result<Predecessor, Error> {
    // SAFETY: the datum is of the type beside it.
    let arguments = [unsafe { DatumWithOid::new(token_id, pg_sys::UUIDOID) }];
    let statement = "SELECT t.hint, t.expires_at FROM tollgate.lock_for_rotation($1) t";
    with_plan(&LOCK_FOR_ROTATION_PLAN, statement, &arguments, |rows| {
        Ok(Predecessor { hint: rows.get(1)?.unwrap_or_default(), expires_at: rows.get(2)? })
    })
}

/// The row of a successor, which has all but its secret from the token it replaces.
pub(crate) struct Successor {
    pub(crate) user_id: Option<String>,
    pub(crate) name: Option<String>,
    pub(crate) scopes: Option<Vec<String>>,
    pub(crate) stored: Stored,
}

pub(crate) fn replace(
    token_id: Uuid,
    successor: Uuid,
    digest: &Digest,
    hint: &str,
    grace: Interval,
) -> Result<Successor, Error> {
    // SAFETY: each datum is of the type beside it.
    let arguments = unsafe {
        [
            DatumWithOid::new(token_id, pg_sys::UUIDOID),
            DatumWithOid::new(successor, pg_sys::UUIDOID),
            DatumWithOid::new(digest.as_slice(), pg_sys::BYTEAOID),
            DatumWithOid::new(hint, pg_sys::TEXTOID),
            DatumWithOid::new(grace, pg_sys::INTERVALOID),
        ]
    };
    let statement = "
        SELECT t.user_id, t.name, t.scopes, t.expires_at, t.created_at FROM tollgate.replace_token($1, $2, $3, $4, $5) t";
    with_plan(&REPLACE_PLAN, statement, &arguments, |rows| {
        Ok(Successor {
            user_id: rows.get(1)?,
            name: rows.get(2)?,
            scopes: rows.get(3)?,
            stored: Stored { expires_at: rows.get(4)?, created_at: rows.get(5)? },
        })
    })
}

/// Locks the family of a token that is to have a child, and says whose it is and how many ancestors it has. `None` if there
/// is no such token any more.
pub(crate) fn lock_parent(token_id: Uuid) -> Result<Option<(String, i32)>, Error> {
    // SAFETY: the datum is of the type beside it.
    let arguments = [unsafe { DatumWithOid::new(token_id, pg_sys::UUIDOID) }];
    let statement = "
        SELECT t.user_id, (SELECT count(*)::integer FROM tollgate.ancestors(t.id))
        FROM tollgate.lock_token($1, true) t WHERE t.id IS NOT NULL";
    with_plan(&LOCK_PARENT_PLAN, statement, &arguments, |rows| {
        if rows.is_empty() {
            return Ok(None);
        }
        Ok(rows.get::<String>(1)?.zip(rows.get::<i32>(2)?))
    })
}

/// Locks the rows of the catalogue that cover some of the scopes.
pub(crate) fn lock_covering_scopes(scopes: &[String]) -> Result<(), Error> {
    // SAFETY: the datum is of the type beside it.
    let arguments = [unsafe { DatumWithOid::new(scopes.to_vec(), pg_sys::TEXTARRAYOID) }];
    with_plan(&COVERING_PLAN, COVERING, &arguments, |_| Ok(()))
}

pub(super) fn with_plan<R>(
    plan: &'static std::thread::LocalKey<Kept>,
    statement: &str,
    arguments: &[DatumWithOid<'_>],
    read: impl FnOnce(pgrx::spi::SpiTupleTable<'_>) -> Result<R, SpiError>,
) -> Result<R, Error> {
    let types: Vec<_> = arguments.iter().map(|argument| pg_sys::PgOid::from(argument.oid())).collect();
    Spi::connect_mut(|client| {
        let prepared = match plan.get() {
            Some(prepared) => prepared,
            None => {
                let prepared: &_ = Box::leak(Box::new(client.prepare_mut(statement, &types)?.keep()));
                plan.set(Some(prepared));
                prepared
            }
        };
        // A trigger may lead here again.
        read(client.update(prepared, Some(1), arguments)?.first())
    })
    .map_err(|error| Error::internal(format!("could not store a token: {error}")))
}
