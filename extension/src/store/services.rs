//! Rows of service accounts, by the latest snapshot: an account that was disabled, a key and a workload that it does not trust
//! any more are refused also where the transaction's snapshot still shows them.

use super::relations::relations;
use super::rows::{Open, Table, find_latest, text_keys};
use core::cell::Cell;
use pgrx::pg_sys;

/// Columns of `tollgate.services` by position, counted from 0. Columns are only ever appended to the table.
#[derive(Clone, Copy)]
enum Column {
    Id = 0,
    Scopes = 1,
    Audience = 2,
    Lifetime = 3,
    DisabledAt = 4,
    JwksUrl = 5,
}

impl From<Column> for usize {
    fn from(column: Column) -> usize {
        column as usize
    }
}

thread_local! {
    static SERVICES_CHECKED_IN: Cell<Option<u64>> = const { Cell::new(None) };
    static KEYS_CHECKED_IN: Cell<Option<u64>> = const { Cell::new(None) };
    static WORKLOADS_CHECKED_IN: Cell<Option<u64>> = const { Cell::new(None) };
}

const SERVICES: Table<6> = Table {
    name: "services",
    relation: |relations| relations.services,
    columns: [
        (Column::Id as usize, c"id", pg_sys::TEXTOID),
        (Column::Scopes as usize, c"scopes", pg_sys::TEXTARRAYOID),
        (Column::Audience as usize, c"audience", pg_sys::TEXTARRAYOID),
        (Column::Lifetime as usize, c"lifetime", pg_sys::INT4OID),
        (Column::DisabledAt as usize, c"disabled_at", pg_sys::TIMESTAMPTZOID),
        (Column::JwksUrl as usize, c"jwks_url", pg_sys::TEXTOID),
    ],
    checked_in: &SERVICES_CHECKED_IN,
};

const KEYS: Table<4> = Table {
    name: "service_keys",
    relation: |relations| relations.service_keys,
    columns: [
        (0, c"account_id", pg_sys::TEXTOID),
        (1, c"kid", pg_sys::TEXTOID),
        (2, c"algorithm", pg_sys::TEXTOID),
        (3, c"jwk", pg_sys::TEXTOID),
    ],
    checked_in: &KEYS_CHECKED_IN,
};

const WORKLOADS: Table<5> = Table {
    name: "service_workloads",
    relation: |relations| relations.service_workloads,
    columns: [
        (0, c"account_id", pg_sys::TEXTOID),
        (1, c"issuer", pg_sys::TEXTOID),
        (2, c"id", pg_sys::UUIDOID),
        (3, c"conditions", pg_sys::TEXTOID),
        (4, c"audience", pg_sys::TEXTOID),
    ],
    checked_in: &WORKLOADS_CHECKED_IN,
};

/// A service account.
pub(crate) struct Service {
    pub(crate) scopes: Vec<String>,
    /// `None` for that of the setting.
    pub(crate) audience: Option<Vec<String>>,
    /// In seconds.
    pub(crate) lifetime: Option<i64>,
    pub(crate) is_disabled: bool,
    /// Whether its keys are fetched, and not given.
    pub(crate) is_fetched: bool,
}

/// What a token must say to prove an account, beside being one of its issuer.
pub(crate) struct Workload {
    /// A JSON object.
    pub(crate) conditions: String,
    pub(crate) audience: Option<String>,
}

pub(crate) fn service(id: &str) -> Option<Service> {
    find_latest(
        &SERVICES,
        |relations| relations.services_key,
        text_keys([id]),
        |row| {
            Some(Service {
                scopes: row.texts(Column::Scopes)?,
                audience: row.texts(Column::Audience),
                lifetime: row.datum(Column::Lifetime).map(|seconds| (seconds.value() as i32).into()),
                is_disabled: row.datum(Column::DisabledAt).is_some(),
                is_fetched: row.datum(Column::JwksUrl).is_some(),
            })
        },
    )
}

/// The public key of an account with this kid, as a JWK, which says its algorithm too.
pub(crate) fn key(account: &str, kid: &str) -> Option<String> {
    let index = |relations: &super::relations::Relations| relations.service_keys_key;
    find_latest(&KEYS, index, text_keys([account, kid]), |row| row.text(3_usize))
}

/// The workloads of an issuer that an account trusts.
pub(crate) fn workloads(account: &str, issuer: &str) -> Vec<Workload> {
    let mut workloads = Vec::new();
    let table = Open::latest(&WORKLOADS);
    table.each_of(relations().service_workloads_key, text_keys([account, issuer]), |row| {
        let conditions = row.text(3_usize);
        let audience = row.text(4_usize);
        workloads.extend(conditions.map(|conditions| Workload { conditions, audience }));
    });
    table.close();
    workloads
}
