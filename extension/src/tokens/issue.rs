//! The statements of issuing, prepared once per backend. They run as the owner of the tables, with the search_path
//! pinned by the SQL functions that call them.
#![allow(unsafe_code)]

use crate::error::Error;
use crate::store::statements::{Kept, with_plan};
use crate::tokens::fields::Ending;
use core::cell::Cell;
use pgrx::Uuid;
use pgrx::datum::{DatumWithOid, Interval, TimestampWithTimeZone};
use pgrx::pg_sys::{self, Datum};
use tollgate_core::foreign::Format;
use tollgate_core::token::Digest;

pub(crate) struct NewToken<'a> {
    pub(crate) event: &'a str,
    pub(crate) id: Uuid,
    pub(crate) digest: &'a Digest,
    pub(crate) hint: &'a str,
    pub(crate) user_id: &'a str,
    pub(crate) name: &'a str,
    pub(crate) scopes: &'a [String],
    pub(crate) ending: Ending,
    /// A jsonb object.
    pub(crate) metadata: Option<Datum>,
    /// A cidr[] without NULLs.
    pub(crate) allowed_ips: Option<Datum>,
    pub(crate) rate_limit: Option<i32>,
    pub(crate) rate_window: Option<Interval>,
    /// A locked parent. Lifetime, metadata, networks and limits that are not given are inherited from it.
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
                                              rate_limit, rate_window, parent_id, quota_id)
        -- Days are those of UTC, so that a lifetime is as long in every time zone.
        SELECT $2, $3, $4, $5, $6, $7,
               coalesce($14, (clock_timestamp() AT TIME ZONE 'UTC' + $8) AT TIME ZONE 'UTC', p.expires_at), coalesce($9, p.metadata),
               coalesce($10, p.allowed_ips), coalesce($11, p.rate_limit),
               CASE WHEN $11 IS NULL THEN p.rate_window ELSE $12 END, p.id, p.quota_id
        FROM (SELECT) given LEFT JOIN parent p ON true
        ON CONFLICT (token_hash) DO NOTHING
        RETURNING t.id, t.user_id, t.expires_at, t.created_at, tollgate.issued_detail(t) AS detail
    ), logged AS (
        INSERT INTO tollgate.audit_log (event, token_id, user_id, detail)
        SELECT $1, i.id, i.user_id, i.detail FROM issued i
    )
    SELECT expires_at, created_at FROM issued";

thread_local! {
    static INSERT_PLAN: Kept = const { Cell::new(None) };
    static LOCK_FOR_ROTATION_PLAN: Kept = const { Cell::new(None) };
    static LOCK_PARENT_PLAN: Kept = const { Cell::new(None) };
    static REPLACE_PLAN: Kept = const { Cell::new(None) };
    static IMPORT_PLAN: Kept = const { Cell::new(None) };
    static LOCK_IMPORT_KEY_PLAN: Kept = const { Cell::new(None) };
}

/// Stores a token and its event; `None` if a token with its digest is already stored.
pub(crate) fn insert(token: &NewToken<'_>) -> Result<Option<Stored>, Error> {
    // SAFETY: each datum is of the type given with it, and lives as long as the call that it came from.
    let arguments = unsafe {
        [
            DatumWithOid::new(token.event, pg_sys::TEXTOID),
            DatumWithOid::new(token.id, pg_sys::UUIDOID),
            DatumWithOid::new(token.digest.as_slice(), pg_sys::BYTEAOID),
            DatumWithOid::new(token.hint, pg_sys::TEXTOID),
            DatumWithOid::new(token.user_id, pg_sys::TEXTOID),
            DatumWithOid::new(token.name, pg_sys::TEXTOID),
            DatumWithOid::new(token.scopes.to_vec(), pg_sys::TEXTARRAYOID),
            DatumWithOid::new(token.ending.lifetime, pg_sys::INTERVALOID),
            DatumWithOid::new(token.metadata, pg_sys::JSONBOID),
            DatumWithOid::new(token.allowed_ips, pg_sys::CIDRARRAYOID),
            DatumWithOid::new(token.rate_limit, pg_sys::INT4OID),
            DatumWithOid::new(token.rate_window, pg_sys::INTERVALOID),
            DatumWithOid::new(token.parent, pg_sys::UUIDOID),
            DatumWithOid::new(token.ending.moment, pg_sys::TIMESTAMPTZOID),
        ]
    };
    with_plan(&INSERT_PLAN, INSERT, &arguments, |rows| {
        if rows.is_empty() {
            return Ok(None);
        }
        Ok(Some(Stored { expires_at: rows.get(1)?, created_at: rows.get(2)? }))
    })
}

/// A token of another system, with that system's data about it.
pub(crate) struct ImportedToken<'a> {
    pub(crate) token: &'a NewToken<'a>,
    pub(crate) format: &'a Format,
    /// The key by which it is found until it has a digest of its own.
    pub(crate) foreign_hash: Option<Digest>,
    pub(crate) created_at: Option<TimestampWithTimeZone>,
    pub(crate) last_used_at: Option<TimestampWithTimeZone>,
    pub(crate) disabled_at: Option<TimestampWithTimeZone>,
    pub(crate) revoked_at: Option<TimestampWithTimeZone>,
}

const IMPORT: &str = "
    WITH imported AS (
        INSERT INTO tollgate.api_tokens AS t (id, token_hash, hint, user_id, name, scopes, expires_at, metadata, allowed_ips,
                                              rate_limit, rate_window, foreign_hash, foreign_format, created_at, disabled_at,
                                              revoked_at, expired_at)
        SELECT $1, $2, $3, $4, $5, $6, e.expires_at, $8, $9, $10, CASE WHEN $10 IS NOT NULL THEN $11 END,
               $12, CASE WHEN $12 IS NOT NULL THEN $13 END, coalesce($14, now()), $16, $17,
               -- There is no event for what happened elsewhere.
               CASE WHEN e.expires_at <= clock_timestamp() THEN clock_timestamp() END
        FROM (SELECT coalesce($18, (clock_timestamp() AT TIME ZONE 'UTC' + $7) AT TIME ZONE 'UTC')) e (expires_at)
        ON CONFLICT DO NOTHING
        RETURNING t.id, t.user_id, t.expires_at, t.created_at, tollgate.issued_detail(t) AS detail
    ), used AS (
        INSERT INTO tollgate.token_usage (token_id, use_count, denied_count, last_used_at)
        SELECT i.id, 0, 0, $15 FROM imported i WHERE $15 IS NOT NULL
    ), logged AS (
        INSERT INTO tollgate.audit_log (event, token_id, user_id, detail)
        SELECT 'token.imported', i.id, i.user_id, i.detail || jsonb_strip_nulls(jsonb_build_object(
            'format', nullif($13, 'sha256'), 'created_at', $14, 'last_used_at', $15, 'disabled_at', $16, 'revoked_at', $17))
        FROM imported i
    )
    SELECT expires_at, created_at FROM imported";

/// Stores a token of another system and its event; `None` if it is already stored.
pub(crate) fn import(imported: &ImportedToken<'_>) -> Result<Option<Stored>, Error> {
    let token = imported.token;
    // SAFETY: each datum is of the type given with it, and lives as long as the call that it came from.
    let arguments = unsafe {
        [
            DatumWithOid::new(token.id, pg_sys::UUIDOID),
            DatumWithOid::new(token.digest.as_slice(), pg_sys::BYTEAOID),
            DatumWithOid::new(token.hint, pg_sys::TEXTOID),
            DatumWithOid::new(token.user_id, pg_sys::TEXTOID),
            DatumWithOid::new(token.name, pg_sys::TEXTOID),
            DatumWithOid::new(token.scopes.to_vec(), pg_sys::TEXTARRAYOID),
            DatumWithOid::new(token.ending.lifetime, pg_sys::INTERVALOID),
            DatumWithOid::new(token.metadata, pg_sys::JSONBOID),
            DatumWithOid::new(token.allowed_ips, pg_sys::CIDRARRAYOID),
            DatumWithOid::new(token.rate_limit, pg_sys::INT4OID),
            DatumWithOid::new(token.rate_window, pg_sys::INTERVALOID),
            DatumWithOid::new(imported.foreign_hash.as_ref().map(Digest::as_slice), pg_sys::BYTEAOID),
            DatumWithOid::new(imported.format.to_string(), pg_sys::TEXTOID),
            DatumWithOid::new(imported.created_at, pg_sys::TIMESTAMPTZOID),
            DatumWithOid::new(imported.last_used_at, pg_sys::TIMESTAMPTZOID),
            DatumWithOid::new(imported.disabled_at, pg_sys::TIMESTAMPTZOID),
            DatumWithOid::new(imported.revoked_at, pg_sys::TIMESTAMPTZOID),
            DatumWithOid::new(token.ending.moment, pg_sys::TIMESTAMPTZOID),
        ]
    };
    with_plan(&IMPORT_PLAN, IMPORT, &arguments, |rows| {
        if rows.is_empty() {
            return Ok(None);
        }
        Ok(Some(Stored { expires_at: rows.get(1)?, created_at: rows.get(2)? }))
    })
}

/// Keeps an import key from being dropped until the end of the transaction, which imports a token that needs it.
pub(crate) fn lock_import_key(name: &str) -> Result<(), Error> {
    // SAFETY: the datum is of the type given with it.
    let arguments = [unsafe { DatumWithOid::new(name, pg_sys::TEXTOID) }];
    with_plan(&LOCK_IMPORT_KEY_PLAN, "SELECT tollgate.lock_import_key($1)", &arguments, |_| Ok(()))
}

/// What a token that is to be rotated passes on to its successor.
pub(crate) struct Predecessor {
    pub(crate) hint: String,
    pub(crate) expires_at: Option<TimestampWithTimeZone>,
}

/// Locks a token and checks that it may be rotated.
pub(crate) fn lock_for_rotation(token_id: Uuid) -> Result<Predecessor, Error> {
    // SAFETY: the datum is of the type given with it.
    let arguments = [unsafe { DatumWithOid::new(token_id, pg_sys::UUIDOID) }];
    let statement = "SELECT t.hint, t.expires_at FROM tollgate.lock_for_rotation($1) t";
    with_plan(&LOCK_FOR_ROTATION_PLAN, statement, &arguments, |rows| {
        Ok(Predecessor { hint: rows.get(1)?.unwrap_or_default(), expires_at: rows.get(2)? })
    })
}

/// The row of a successor, which takes everything but its secret from the token it replaces.
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
    ending: Ending,
    revoke_on_reuse: bool,
) -> Result<Successor, Error> {
    // SAFETY: each datum is of the type given with it.
    let arguments = unsafe {
        [
            DatumWithOid::new(token_id, pg_sys::UUIDOID),
            DatumWithOid::new(successor, pg_sys::UUIDOID),
            DatumWithOid::new(digest.as_slice(), pg_sys::BYTEAOID),
            DatumWithOid::new(hint, pg_sys::TEXTOID),
            DatumWithOid::new(grace, pg_sys::INTERVALOID),
            DatumWithOid::new(ending.lifetime, pg_sys::INTERVALOID),
            DatumWithOid::new(ending.moment, pg_sys::TIMESTAMPTZOID),
            DatumWithOid::new(revoke_on_reuse, pg_sys::BOOLOID),
        ]
    };
    let statement = "
        SELECT t.user_id, t.name, t.scopes, t.expires_at, t.created_at
        FROM tollgate.replace_token($1, $2, $3, $4, $5, $6, $7, $8) t";
    with_plan(&REPLACE_PLAN, statement, &arguments, |rows| {
        Ok(Successor {
            user_id: rows.get(1)?,
            name: rows.get(2)?,
            scopes: rows.get(3)?,
            stored: Stored { expires_at: rows.get(4)?, created_at: rows.get(5)? },
        })
    })
}

/// Locks the family of a token that is to get a child, and returns its user and its number of ancestors. `None` if the
/// token no longer exists.
pub(crate) fn lock_parent(token_id: Uuid) -> Result<Option<(String, i32)>, Error> {
    // SAFETY: the datum is of the type given with it.
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
