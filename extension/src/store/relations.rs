//! The oids of our relations. They are looked up once per backend, and again after any of them changed.
#![allow(unsafe_code)]

use crate::error::Error;
use core::cell::Cell;
use core::ffi::CStr;
use pgrx::pg_sys::{self, Datum, Oid};

/// Our composite types. The discriminants index the cache.
#[derive(Clone, Copy)]
pub(crate) enum Composite {
    Verification,
    IssuedToken,
    MemoryStats,
    IssuedAccessToken,
    IssuedSession,
    RefreshedSession,
    ClientCredentialsToken,
    ExchangedToken,
    UrlVerification,
}

impl Composite {
    pub(crate) const ALL: [Composite; 9] = [
        Composite::Verification,
        Composite::IssuedToken,
        Composite::MemoryStats,
        Composite::IssuedAccessToken,
        Composite::IssuedSession,
        Composite::RefreshedSession,
        Composite::ClientCredentialsToken,
        Composite::ExchangedToken,
        Composite::UrlVerification,
    ];
    pub(crate) const COUNT: usize = Composite::ALL.len();

    pub(crate) fn name(self) -> &'static CStr {
        match self {
            Composite::Verification => c"verification",
            Composite::IssuedToken => c"issued_token",
            Composite::MemoryStats => c"memory_stats",
            Composite::IssuedAccessToken => c"issued_access_token",
            Composite::IssuedSession => c"issued_session",
            Composite::RefreshedSession => c"refreshed_session",
            Composite::ClientCredentialsToken => c"client_credentials_token",
            Composite::ExchangedToken => c"exchanged_token",
            Composite::UrlVerification => c"url_verification",
        }
    }
}

#[derive(Clone, Copy)]
pub(crate) struct Relations {
    pub(crate) api_tokens: Oid,
    pub(crate) token_hash_index: Oid,
    pub(crate) foreign_hash_index: Oid,
    pub(crate) token_id_index: Oid,
    pub(crate) scopes: Oid,
    pub(crate) scopes_index: Oid,
    pub(crate) sealed_keys: Oid,
    pub(crate) sealed_keys_index: Oid,
    pub(crate) sealed_keys_signing_index: Oid,
    pub(crate) denied_access_tokens: Oid,
    pub(crate) denied_access_tokens_key: Oid,
    pub(crate) revoked_users: Oid,
    pub(crate) revoked_users_key: Oid,
    pub(crate) sessions: Oid,
    pub(crate) sessions_key: Oid,
    pub(crate) issuers: Oid,
    pub(crate) issuers_key: Oid,
    pub(crate) issuer_keys: Oid,
    pub(crate) issuer_keys_key: Oid,
    pub(crate) quotas: Oid,
    pub(crate) quotas_key: Oid,
    pub(crate) quotas_user: Oid,
    pub(crate) quota_leases: Oid,
    pub(crate) quota_leases_key: Oid,
    pub(crate) used_urls: Oid,
    pub(crate) used_urls_key: Oid,
    pub(crate) services: Oid,
    pub(crate) services_key: Oid,
    pub(crate) service_keys: Oid,
    pub(crate) service_keys_key: Oid,
    pub(crate) service_workloads: Oid,
    pub(crate) service_workloads_key: Oid,
    pub(crate) capabilities: Oid,
    /// Indexed by `Composite`.
    pub(crate) composites: [Oid; Composite::COUNT],
}

thread_local! {
    static CACHE: Cell<Option<Relations>> = const { Cell::new(None) };
    /// Counts the invalidations of our relations, so that other caches can detect that they are stale.
    static EPOCH: Cell<u64> = const { Cell::new(0) };
    /// Counts the invalidations of any relation.
    static CHANGES: Cell<u64> = const { Cell::new(0) };
}

pub(crate) fn init() {
    // SAFETY: called once per process; the callback only clears variables.
    unsafe { pg_sys::CacheRegisterRelcacheCallback(Some(invalidate), Datum::null()) };
}

/// Looks up our relations.
pub(crate) fn relations() -> Relations {
    if let Some(found) = CACHE.get() {
        return found;
    }
    loop {
        let epoch = EPOCH.get();
        // SAFETY: look-ups in the system catalogue by C strings.
        let schema = unsafe { pg_sys::get_namespace_oid(c"tollgate".as_ptr(), true) };
        let found = Relations {
            api_tokens: in_schema(schema, c"api_tokens"),
            token_hash_index: in_schema(schema, c"api_tokens_token_hash"),
            foreign_hash_index: in_schema(schema, c"api_tokens_foreign_hash"),
            token_id_index: in_schema(schema, c"api_tokens_pkey"),
            scopes: in_schema(schema, c"scopes"),
            scopes_index: in_schema(schema, c"scopes_pkey"),
            sealed_keys: in_schema(schema, c"sealed_keys"),
            sealed_keys_index: in_schema(schema, c"sealed_keys_pkey"),
            sealed_keys_signing_index: in_schema(schema, c"sealed_keys_signing"),
            denied_access_tokens: in_schema(schema, c"denied_access_tokens"),
            denied_access_tokens_key: in_schema(schema, c"denied_access_tokens_pkey"),
            revoked_users: in_schema(schema, c"revoked_users"),
            revoked_users_key: in_schema(schema, c"revoked_users_pkey"),
            sessions: in_schema(schema, c"sessions"),
            sessions_key: in_schema(schema, c"sessions_pkey"),
            issuers: in_schema(schema, c"issuers"),
            issuers_key: in_schema(schema, c"issuers_pkey"),
            issuer_keys: in_schema(schema, c"issuer_keys"),
            issuer_keys_key: in_schema(schema, c"issuer_keys_pkey"),
            quotas: in_schema(schema, c"quotas"),
            quotas_key: in_schema(schema, c"quotas_pkey"),
            quotas_user: in_schema(schema, c"quotas_user"),
            quota_leases: in_schema(schema, c"quota_leases"),
            quota_leases_key: in_schema(schema, c"quota_leases_pkey"),
            used_urls: in_schema(schema, c"used_urls"),
            used_urls_key: in_schema(schema, c"used_urls_pkey"),
            services: in_schema(schema, c"services"),
            services_key: in_schema(schema, c"services_pkey"),
            service_keys: in_schema(schema, c"service_keys"),
            service_keys_key: in_schema(schema, c"service_keys_pkey"),
            service_workloads: in_schema(schema, c"service_workloads"),
            service_workloads_key: in_schema(schema, c"service_workloads_pkey"),
            capabilities: in_schema(schema, c"capabilities"),
            composites: Composite::ALL.map(|composite| in_schema(schema, composite.name())),
        };
        // The look-ups themselves may have processed an invalidation.
        if EPOCH.get() == epoch {
            CACHE.set(Some(found));
            return found;
        }
    }
}

/// How often any of our relations may have changed.
pub(crate) fn epoch() -> u64 {
    EPOCH.get()
}

/// How often any relation of the database may have changed.
pub(crate) fn changes() -> u64 {
    CHANGES.get()
}

/// Call this when a relation turns out not to exist any more.
pub(crate) fn forget() {
    CACHE.set(None);
    EPOCH.set(EPOCH.get() + 1);
}

/// Refuses a table that was changed by hand, rather than misread it. `columns` are those that are read, by position,
/// counted from 0.
pub(crate) fn check_columns<const N: usize>(
    relation: Oid,
    table: &str,
    columns: [(usize, &CStr, Oid); N],
) -> Result<(), Error> {
    for (place, name, column_type) in columns {
        let number = place as i16 + 1;
        // SAFETY: look-ups in the system catalogue; the name is a palloc'ed C string or NULL.
        let matches = unsafe {
            let found = pg_sys::get_attname(relation, number, true);
            !found.is_null()
                && CStr::from_ptr(found) == name
                && pg_sys::get_atttype(relation, number) == column_type
        };
        if !matches {
            return Err(Error::unknown_layout(format!(
                "Column {number} of tollgate.{table} is not {}.",
                name.to_string_lossy()
            )));
        }
    }
    Ok(())
}

/// The oid of a relation in our schema.
fn in_schema(schema: Oid, name: &CStr) -> Oid {
    // SAFETY: a look-up in the system catalogue by a C string.
    let oid = unsafe { pg_sys::get_relname_relid(name.as_ptr(), schema) };
    if oid == Oid::INVALID {
        Error::unknown_layout(format!("There is no relation tollgate.{}.", name.to_string_lossy())).raise();
    }
    oid
}

/// Called by PostgreSQL whenever a relation changed, whenever a lock is taken: it may only set a mark. Not guarded: it
/// calls nothing that can fail.
unsafe extern "C-unwind" fn invalidate(_arg: Datum, relation: Oid) {
    let ours = |cached: Relations| {
        let tables = [
            cached.api_tokens,
            cached.token_hash_index,
            cached.foreign_hash_index,
            cached.token_id_index,
            cached.scopes,
            cached.scopes_index,
            cached.sealed_keys,
            cached.sealed_keys_index,
            cached.sealed_keys_signing_index,
            cached.denied_access_tokens,
            cached.denied_access_tokens_key,
            cached.revoked_users,
            cached.revoked_users_key,
            cached.sessions,
            cached.sessions_key,
            cached.issuers,
            cached.issuers_key,
            cached.issuer_keys,
            cached.issuer_keys_key,
            cached.quotas,
            cached.quotas_key,
            cached.quotas_user,
            cached.quota_leases,
            cached.quota_leases_key,
            cached.used_urls,
            cached.used_urls_key,
            cached.services,
            cached.services_key,
            cached.service_keys,
            cached.service_keys_key,
            cached.service_workloads,
            cached.service_workloads_key,
            cached.capabilities,
        ];
        tables.contains(&relation) || cached.composites.contains(&relation)
    };
    CHANGES.set(CHANGES.get() + 1);
    if relation == Oid::INVALID || CACHE.get().is_none_or(ours) {
        forget();
    }
}
