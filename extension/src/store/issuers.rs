//! Rows of `tollgate.issuers` and `tollgate.issuer_keys`, by the latest snapshot: an issuer that was distrusted, and a key
//! that it withdrew, are refused also where the transaction's snapshot still shows them.
#![allow(unsafe_code)]

use super::relations::relations;
use super::rows::{Open, Row, Table, text_key};
use crate::pg::datum::{self, TextArray};
use core::cell::Cell;
use pgrx::IntoDatum;
use pgrx::pg_sys::{self, ScanKeyData};

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
pub(crate) struct Key {
    pub(crate) algorithm: String,
    pub(crate) jwk: String,
}

/// The issuer of exactly this name, unless it is not trusted.
pub(crate) fn issuer(name: &str) -> Option<Issuer> {
    let keys = keys([name]);
    let issuers = Open::latest(&ISSUERS);
    let found = issuers.find(relations().issuers_key, keys, |row| {
        if row.datum(Column::DistrustedAt as usize).is_some() {
            return None;
        }
        Some(Issuer {
            user_prefix: text(row, Column::UserPrefix as usize)?,
            other_prefixes: texts(row, Column::OtherPrefixes)?,
            audience: texts(row, Column::Audience)?,
            algorithms: texts(row, Column::Algorithms)?,
            types: texts(row, Column::Types),
            user_claim: text(row, Column::UserClaim as usize)?,
            scope_claims: texts(row, Column::ScopeClaims)?,
            scopes: texts(row, Column::Scopes)?,
            required_claims: text(row, Column::RequiredClaims as usize)?,
            max_lifetime: (row.datum(Column::MaxLifetime as usize)?.value() as i32).into(),
            accepts_from: row.datum(Column::AcceptsFrom as usize).map(|at| at.value().cast_signed() as i64),
            keys_given: row.datum(Column::KeysGiven as usize)?.value() != 0,
        })
    });
    issuers.close();
    found
}

/// The key of an issuer with exactly this kid.
pub(crate) fn key(issuer: &str, kid: &str) -> Option<Key> {
    let keys = keys([issuer, kid]);
    let table = Open::latest(&KEYS);
    let found = table.find(relations().issuer_keys_key, keys, |row| {
        Some(Key { algorithm: text(row, 2)?, jwk: text(row, 3)? })
    });
    table.close();
    found
}

fn keys<const K: usize>(values: [&str; K]) -> [ScanKeyData; K] {
    core::array::from_fn(|place| {
        let text = values[place].into_datum().expect("a text is not NULL");
        text_key(place, pg_sys::C_COLLATION_OID, text)
    })
}

fn bytes<'r>(row: &'r Row<'_>, place: usize) -> Option<&'r [u8]> {
    // SAFETY: a column of a varlena type (the tables were checked), in a row that is pinned as long as this lives.
    row.datum(place).map(|datum| unsafe { datum::varlena(datum) })
}

fn text(row: &Row<'_>, place: usize) -> Option<String> {
    Some(String::from_utf8_lossy(bytes(row, place)?).into_owned())
}

fn texts(row: &Row<'_>, column: Column) -> Option<Vec<String>> {
    let list = TextArray::parse(bytes(row, column as usize)?);
    Some(list.present().map(|one| String::from_utf8_lossy(one).into_owned()).collect())
}
