//! Rows of `tollgate.issuers` and `tollgate.issuer_keys`, by the latest snapshot: an issuer that was distrusted, and a key
//! that it withdrew, are refused also where the transaction's snapshot still shows them.

use super::public_keys::{self, StoredKey};
use super::rows::{Table, find_latest, text_keys};
use core::cell::Cell;
use pgrx::pg_sys;
use std::rc::Rc;

/// Columns by position, counted from 0. Columns are only ever appended to the table.
#[derive(Clone, Copy)]
enum Column {
    Issuer = 0,
    UserPrefix = 1,
    Audience = 2,
    Algorithms = 3,
    Types = 4,
    UserClaim = 5,
    ScopeClaims = 6,
    Scopes = 7,
    RequiredClaims = 8,
    MaxLifetime = 9,
    AcceptsFrom = 10,
    OtherPrefixes = 11,
    DistrustedAt = 12,
    KeysGiven = 13,
}

impl From<Column> for usize {
    fn from(column: Column) -> usize {
        column as usize
    }
}

thread_local! {
    static ISSUERS_CHECKED_IN: Cell<Option<u64>> = const { Cell::new(None) };
    static KEYS_CHECKED_IN: Cell<Option<u64>> = const { Cell::new(None) };
}

const ISSUERS: Table<14> = Table {
    name: "issuers",
    relation: |relations| relations.issuers,
    columns: [
        (Column::Issuer as usize, c"issuer", pg_sys::TEXTOID),
        (Column::UserPrefix as usize, c"user_prefix", pg_sys::TEXTOID),
        (Column::Audience as usize, c"audience", pg_sys::TEXTARRAYOID),
        (Column::Algorithms as usize, c"algorithms", pg_sys::TEXTARRAYOID),
        (Column::Types as usize, c"types", pg_sys::TEXTARRAYOID),
        (Column::UserClaim as usize, c"user_claim", pg_sys::TEXTOID),
        (Column::ScopeClaims as usize, c"scope_claims", pg_sys::TEXTARRAYOID),
        (Column::Scopes as usize, c"scopes", pg_sys::TEXTARRAYOID),
        (Column::RequiredClaims as usize, c"required_claims", pg_sys::TEXTOID),
        (Column::MaxLifetime as usize, c"max_lifetime", pg_sys::INT4OID),
        (Column::AcceptsFrom as usize, c"accepts_from", pg_sys::TIMESTAMPTZOID),
        (Column::OtherPrefixes as usize, c"other_prefixes", pg_sys::TEXTARRAYOID),
        (Column::DistrustedAt as usize, c"distrusted_at", pg_sys::TIMESTAMPTZOID),
        (Column::KeysGiven as usize, c"keys_given", pg_sys::BOOLOID),
    ],
    checked_in: &ISSUERS_CHECKED_IN,
};

const KEYS: Table<4> = Table {
    name: "issuer_keys",
    relation: |relations| relations.issuer_keys,
    columns: [
        (0, c"issuer", pg_sys::TEXTOID),
        (1, c"kid", pg_sys::TEXTOID),
        (2, c"algorithm", pg_sys::TEXTOID),
        (3, c"jwk", pg_sys::TEXTOID),
    ],
    checked_in: &KEYS_CHECKED_IN,
};

/// An issuer that is trusted now.
pub(crate) struct Issuer {
    pub(crate) user_prefix: String,
    pub(crate) other_prefixes: Vec<String>,
    pub(crate) audience: Vec<String>,
    pub(crate) algorithms: Vec<String>,
    pub(crate) types: Option<Vec<String>>,
    pub(crate) user_claim: String,
    pub(crate) scope_claims: Vec<String>,
    pub(crate) scopes: Vec<String>,
    /// A JSON object.
    pub(crate) required_claims: String,
    /// In seconds.
    pub(crate) max_lifetime: i64,
    /// Tokens from before this are refused. In microseconds since 2000-01-01.
    pub(crate) accepts_from: Option<i64>,
    /// Whether its keys are given, and not fetched.
    pub(crate) keys_given: bool,
}

/// A public key of an issuer.
pub(crate) type Key = Rc<StoredKey>;

/// The issuer of exactly this name, unless it is not trusted.
pub(crate) fn issuer(name: &str) -> Option<Issuer> {
    find_latest(
        &ISSUERS,
        |relations| relations.issuers_key,
        text_keys([name]),
        |row| {
            if row.datum(Column::DistrustedAt).is_some() {
                return None;
            }
            Some(Issuer {
                user_prefix: row.text(Column::UserPrefix)?,
                other_prefixes: row.texts(Column::OtherPrefixes)?,
                audience: row.texts(Column::Audience)?,
                algorithms: row.texts(Column::Algorithms)?,
                types: row.texts(Column::Types),
                user_claim: row.text(Column::UserClaim)?,
                scope_claims: row.texts(Column::ScopeClaims)?,
                scopes: row.texts(Column::Scopes)?,
                required_claims: row.text(Column::RequiredClaims)?,
                max_lifetime: (row.datum(Column::MaxLifetime)?.value() as i32).into(),
                accepts_from: row.number(Column::AcceptsFrom),
                keys_given: row.datum(Column::KeysGiven)?.value() != 0,
            })
        },
    )
}

/// The key of an issuer with exactly this kid.
pub(crate) fn key(issuer: &str, kid: &str) -> Option<Key> {
    find_latest(
        &KEYS,
        |relations| relations.issuer_keys_key,
        text_keys([issuer, kid]),
        |row| Some(public_keys::of_row(row.bytes(2_usize)?, row.bytes(3_usize)?)),
    )
}
