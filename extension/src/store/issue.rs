//! The statements of issuing, prepared once per backend. They run as the owner of the tables, with search_path pinned by
//! the SQL functions that lead here.
#![allow(unsafe_code)]

use super::direct::{Compiled, Table, Target};
use super::epoch;
use crate::error::Error;
use crate::sys;
use core::cell::{Cell, RefCell};
use core::ffi::{CStr, c_char};
use pgrx::datum::{DatumWithOid, Interval, TimestampWithTimeZone};
use pgrx::pg_sys::{self, Datum};
use pgrx::spi::{OwnedPreparedStatement, Spi, SpiError};
use pgrx::{FromDatum, IntoDatum, JsonB, Uuid, direct_function_call_as_datum};
use serde_json::json;
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
    /// Whether the digest is that of a secret that was just drawn, so that no other token has it.
    pub(crate) is_drawn: bool,
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
        INSERT INTO tollgate.api_tokens (id, token_hash, hint, user_id, name, scopes, expires_at, metadata, allowed_ips,
                                         rate_limit, rate_window, parent_id)
        SELECT $2, $3, $4, $5, $6, $7, coalesce(clock_timestamp() + $8, p.expires_at), coalesce($9, p.metadata),
               coalesce($10, p.allowed_ips), coalesce($11, p.rate_limit),
               CASE WHEN $11 IS NULL THEN p.rate_window ELSE $12 END, p.id
        FROM (SELECT) given LEFT JOIN parent p ON true
        ON CONFLICT (token_hash) DO NOTHING
        RETURNING id, user_id, name, hint, scopes, expires_at, allowed_ips, rate_limit, rate_window, parent_id, created_at
    ), logged AS (
        INSERT INTO tollgate.audit_log (event, token_id, user_id, detail)
        SELECT $1, i.id, i.user_id,
               jsonb_strip_nulls(jsonb_build_object('name', i.name, 'hint', i.hint, 'scopes', i.scopes,
                                                    'expires_at', i.expires_at, 'allowed_ips', i.allowed_ips,
                                                    'rate_limit', i.rate_limit, 'rate_window', i.rate_window,
                                                    'parent_id', i.parent_id))
        FROM issued i
    )
    SELECT expires_at, created_at FROM issued";

const COVERING: &str = "
    SELECT count(*) FROM (
        SELECT FROM tollgate.scopes s
        WHERE EXISTS (SELECT FROM unnest($1) AS wanted (scope)
                      WHERE s.name = wanted.scope
                         OR (right(wanted.scope, 2) = ':*' AND starts_with(s.name, left(wanted.scope, -1))))
        FOR KEY SHARE OF s) locked";

const TOKENS: Table<12> = Table {
    relation: |relations| Some(relations.api_tokens),
    given: [
        (c"id", pg_sys::UUIDOID),
        (c"token_hash", pg_sys::BYTEAOID),
        (c"hint", pg_sys::TEXTOID),
        (c"user_id", pg_sys::TEXTOID),
        (c"name", pg_sys::TEXTOID),
        (c"scopes", pg_sys::TEXTARRAYOID),
        (c"expires_at", pg_sys::TIMESTAMPTZOID),
        (c"metadata", pg_sys::JSONBOID),
        (c"allowed_ips", pg_sys::CIDRARRAYOID),
        (c"rate_limit", pg_sys::INT4OID),
        (c"rate_window", pg_sys::INTERVALOID),
        (c"parent_id", pg_sys::UUIDOID),
    ],
    told: (c"created_at", pg_sys::TIMESTAMPTZOID),
    kept: &TOKENS_COMPILED,
};

const AUDIT_LOG: Table<5> = Table {
    relation: |relations| Some(relations.audit_log),
    given: [
        (c"event", pg_sys::TEXTOID),
        (c"token_id", pg_sys::UUIDOID),
        (c"user_id", pg_sys::TEXTOID),
        (c"detail", pg_sys::JSONBOID),
        (c"epoch", pg_sys::INT4OID),
    ],
    told: (c"id", pg_sys::INT8OID),
    kept: &AUDIT_LOG_COMPILED,
};

thread_local! {
    static AUDIT_LOG_COMPILED: Cell<*mut Compiled> = const { Cell::new(core::ptr::null_mut()) };
    static TOKENS_COMPILED: Cell<*mut Compiled> = const { Cell::new(core::ptr::null_mut()) };
    static COVERING_PLAN: RefCell<Option<OwnedPreparedStatement>> = const { RefCell::new(None) };
    static INSERT_PLAN: RefCell<Option<OwnedPreparedStatement>> = const { RefCell::new(None) };
    static LOCK_FOR_ROTATION_PLAN: RefCell<Option<OwnedPreparedStatement>> = const { RefCell::new(None) };
    static LOCK_PARENT_PLAN: RefCell<Option<OwnedPreparedStatement>> = const { RefCell::new(None) };
    static REPLACE_PLAN: RefCell<Option<OwnedPreparedStatement>> = const { RefCell::new(None) };
}

/// Stores a token and its event; `None` if one with its digest is stored already.
pub(crate) fn insert(token: &NewToken<'_>) -> Result<Option<Stored>, Error> {
    if token.is_drawn
        && token.parent.is_none()
        && let Some(stored) = insert_directly(token)
    {
        return Ok(Some(stored));
    }
    insert_by_statement(token)
}

/// The same as the statement; `None` if only that will do.
fn insert_directly(token: &NewToken<'_>) -> Option<Stored> {
    let epoch = epoch::registered()?;
    let mut tokens = Target::open(&TOKENS)?;
    let mut log = Target::open(&AUDIT_LOG)?;
    let expires_at = token.lifetime.map(from_now);
    let created_at = tokens.insert([
        token.id.into_datum(),
        token.digest.as_slice().into_datum(),
        token.hint.into_datum(),
        token.user_id.into_datum(),
        token.name.into_datum(),
        token.scopes.to_vec().into_datum(),
        expires_at,
        token.metadata,
        token.allowed_ips,
        token.rate_limit.into_datum(),
        token.rate_limit.and(token.rate_window).into_datum(),
        None,
    ]);
    log.insert([
        token.event.into_datum(),
        token.id.into_datum(),
        token.user_id.into_datum(),
        detail(token, expires_at).into_datum(),
        Some(epoch),
    ]);
    // SAFETY: both are timestamps, passed by value.
    let time = |datum: Option<Datum>| unsafe {
        TimestampWithTimeZone::from_datum(datum.unwrap_or(Datum::null()), datum.is_none())
    };
    Some(Stored { expires_at: time(expires_at), created_at: time(created_at) })
}

/// `clock_timestamp() + $1`.
fn from_now(lifetime: Interval) -> Datum {
    let arguments = [Some(Datum::from(sys::GetCurrentTimestamp())), lifetime.into_datum()];
    // SAFETY: a function of these arguments, which is strict and returns no NULL.
    let sum = unsafe { direct_function_call_as_datum(pg_sys::timestamptz_pl_interval, &arguments) };
    sum.unwrap_or(Datum::null())
}

/// What the event says of the token, as `jsonb_build_object` writes it.
fn detail(token: &NewToken<'_>, expires_at: Option<Datum>) -> JsonB {
    let mut detail = json!({ "name": token.name, "hint": token.hint, "scopes": token.scopes });
    if let Some(expires_at) = expires_at {
        // SAFETY: given no buffer, it returns a palloc'ed C string.
        let text = unsafe {
            text_of(pg_sys::JsonEncodeDateTime(
                core::ptr::null_mut(),
                expires_at,
                pg_sys::TIMESTAMPTZOID,
                core::ptr::null(),
            ))
        };
        detail["expires_at"] = text.into();
    }
    if let Some(networks) = token.allowed_ips {
        detail["allowed_ips"] = networks_as_text(networks).into();
    }
    if let Some(limit) = token.rate_limit {
        detail["rate_limit"] = limit.into();
        if let Some(window) = token.rate_window.into_datum() {
            // SAFETY: the output function of the datum's type.
            let text =
                unsafe { text_of(pg_sys::OidOutputFunctionCall(pg_sys::F_INTERVAL_OUT.into(), window)) };
            detail["rate_window"] = text.into();
        }
    }
    JsonB(detail)
}

/// The elements of a cidr[] without NULLs.
fn networks_as_text(networks: Datum) -> Vec<String> {
    let (mut elements, mut count) = (core::ptr::null_mut(), 0);
    // SAFETY: an array of cidr, whose length varies and whose alignment is that of int; the elements are written one after
    // another to where they are read.
    unsafe {
        pg_sys::deconstruct_array(
            pg_sys::pg_detoast_datum(networks.cast_mut_ptr()).cast(),
            pg_sys::CIDROID,
            -1,
            false,
            pg_sys::TYPALIGN_INT as core::ffi::c_char,
            &raw mut elements,
            core::ptr::null_mut(),
            &raw mut count,
        );
        (0..usize::try_from(count).unwrap_or(0))
            .map(|i| text_of(pg_sys::OidOutputFunctionCall(pg_sys::F_CIDR_OUT.into(), *elements.add(i))))
            .collect()
    }
}

/// # Safety
///
/// A C string.
unsafe fn text_of(text: *const c_char) -> String {
    // SAFETY: the caller's promise.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

fn insert_by_statement(token: &NewToken<'_>) -> Result<Option<Stored>, Error> {
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
