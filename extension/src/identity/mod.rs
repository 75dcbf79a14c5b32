//! The identity of a transaction: the token that it has authenticated with, of whatever kind.
//!
//! It is the value of one string setting, `tollgate.context`, set with GUC_ACTION_LOCAL. So PostgreSQL itself ends it
//! with the transaction (it never outlives a turn in a connection pool), restores it at ROLLBACK TO SAVEPOINT, and
//! passes it to parallel workers. It cannot be forged: the check hook accepts a value only from `authenticate` (a flag
//! in this module), from the leader of a starting parallel worker, or the empty string. A superuser's SET is refused
//! like any other. The value does not contain the secret.
//!
//! A transaction has at most one identity: it is bound to the first token that authenticates, until its top-level end.
//! A savepoint that rolls the setting back does not undo the binding, because open cursors and sub-selects may have
//! been answered by that identity. Parallel workers get the setting from their leader; they need no binding, since
//! PostgreSQL does not let a worker set a setting.
#![allow(unsafe_code)]

use crate::error::Error;
use crate::guc;
use crate::pg::{compat, guard, sys};
use core::cell::{Cell, RefCell};
use core::ffi::{CStr, c_char, c_void};
use core::sync::atomic::AtomicPtr;
use pgrx::pg_sys;
use serde::{Deserialize, Serialize};
use std::ffi::CString;
use tollgate_core::token::Digest;

const NAME: &CStr = c"tollgate.context";

/// The most bytes of the claims that an identity keeps: each parallel worker copies them.
pub(crate) const MAX_CLAIMS: usize = 4096;

/// What a transaction is bound to.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Credential {
    /// By its id.
    ApiToken([u8; 16]),
    /// By the digest of what was signed.
    AccessToken(Digest),
}

#[derive(Serialize, Deserialize)]
pub(crate) struct Identity {
    /// Of an access token its jti.
    pub(crate) token_id: [u8; 16],
    pub(crate) user_id: String,
    pub(crate) scopes: Vec<String>,
    /// Microseconds since 2000-01-01, as `timestamptz`.
    pub(crate) expires_at: Option<i64>,
    /// Of an access token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) signed: Option<Signed>,
}

#[derive(Serialize, Deserialize)]
pub(crate) struct Signed {
    pub(crate) issuer: String,
    /// Those that `tollgate.identity_claims` names, as JSON.
    pub(crate) claims: String,
    /// The claim `act`, as JSON.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) actor: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) session: Option<[u8; 16]>,
}

static VALUE: AtomicPtr<c_char> = AtomicPtr::new(core::ptr::null_mut());

thread_local! {
    /// What the setting's value says, only while `establish` sets it.
    static ESTABLISHING: RefCell<Option<Identity>> = const { RefCell::new(None) };
    /// What the setting's value says, as the assign hook was given or has parsed it.
    static CURRENT: RefCell<Option<Identity>> = const { RefCell::new(None) };
    /// The token that the top-level transaction is bound to.
    static BOUND: Cell<Option<Credential>> = const { Cell::new(None) };
    /// Whether the identity was established outside a transaction block, and nothing has read it since.
    static UNUSED: Cell<bool> = const { Cell::new(false) };
}

pub(crate) fn init() {
    let flags = pg_sys::GUC_NO_SHOW_ALL
        | pg_sys::GUC_NO_RESET_ALL
        | compat::GUC_NO_RESET
        | pg_sys::GUC_NOT_IN_SAMPLE
        | pg_sys::GUC_DISALLOW_IN_FILE
        | pg_sys::GUC_DISALLOW_IN_AUTO_FILE;
    // SAFETY: called once per process with static strings; the hooks meet the contracts of their types.
    unsafe {
        pg_sys::DefineCustomStringVariable(
            NAME.as_ptr(),
            c"The authenticated token of this transaction.".as_ptr(),
            c"Set by tollgate.authenticate() alone and empty outside of a transaction that called it, which is why it \
              has no other default."
                .as_ptr(),
            VALUE.as_ptr(),
            c"".as_ptr(),
            pg_sys::GucContext::PGC_SUSET,
            flags.cast_signed(),
            Some(check),
            Some(assign),
            None,
        );
        pg_sys::RegisterXactCallback(Some(at_transaction_event), core::ptr::null_mut());
    }
}

/// Whether a token may become the identity of this transaction: 25001 if that is bound to another one.
pub(crate) fn may_bind(credential: Credential) -> Result<(), Error> {
    match BOUND.get() {
        Some(bound) if bound != credential && !guc::identity_changes() => Err(Error::second_identity()),
        _ => Ok(()),
    }
}

/// Makes a verified token that passed [`may_bind`] the identity of the transaction.
pub(crate) fn establish(credential: Credential, context: Identity) {
    struct Permit;
    impl Drop for Permit {
        fn drop(&mut self) {
            ESTABLISHING.set(None);
        }
    }

    let value = serde_json::to_string(&context).expect("strings and numbers always serialise");
    let value = CString::new(value).expect("JSON escapes NUL");
    ESTABLISHING.set(Some(context));
    let _permit = Permit;
    guc::set_local(NAME, &value);
    // Last, so that a setting that could not be set binds nothing.
    BOUND.set(Some(credential));
    // SAFETY: a plain read of the state of this backend's transaction.
    UNUSED.set(!unsafe { pg_sys::IsTransactionBlock() });
}

/// Reads the identity of the transaction; `None` if it has none, or if its token has expired since.
pub(crate) fn read<R>(reader: impl FnOnce(&Identity) -> R) -> Option<R> {
    CURRENT.with_borrow(|current| {
        let context = current.as_ref()?;
        UNUSED.set(false);
        if context.expires_at.is_some_and(|end| end <= sys::GetCurrentTimestamp()) {
            return None;
        }
        Some(reader(context))
    })
}

unsafe extern "C-unwind" fn check(
    new: *mut *mut c_char,
    _extra: *mut *mut c_void,
    _source: pg_sys::GucSource::Type,
) -> bool {
    // SAFETY: PostgreSQL passes a pointer to a C string or NULL; the flag is a plain variable of this process, true
    // only while a parallel worker restores its leader's state.
    unsafe {
        guard::entry(|| {
            let empty = (*new).as_ref().is_none_or(|start| CStr::from_ptr(start).is_empty());
            if empty || pg_sys::InitializingParallelWorker || ESTABLISHING.with_borrow(Option::is_some) {
                return true;
            }
            guc::refuse(NAME, "It is set by tollgate.authenticate() alone.");
            false
        })
    }
}

unsafe extern "C-unwind" fn assign(new: *const c_char, _extra: *mut c_void) {
    // SAFETY: PostgreSQL passes a C string or NULL.
    unsafe {
        guard::entry(|| {
            let value = new.as_ref().map(|start| CStr::from_ptr(start));
            // A savepoint that is rolled back, and a leader of parallel workers, give it as text.
            let parse = |text: &CStr| serde_json::from_slice(text.to_bytes()).ok();
            let context = value.filter(|text| !text.is_empty());
            CURRENT.set(context.and_then(|text| ESTABLISHING.take().or_else(|| parse(text))));
        });
    }
}

/// PostgreSQL calls this for top-level transactions only: at COMMIT, COMMIT AND CHAIN, a procedure's COMMIT, ROLLBACK
/// and PREPARE TRANSACTION, but not for savepoints. No statement runs between this and the reset of the setting.
unsafe extern "C-unwind" fn at_transaction_event(event: pg_sys::XactEvent::Type, _arg: *mut c_void) {
    // SAFETY: called by PostgreSQL, in a frame that owns nothing.
    unsafe {
        guard::entry(|| match event {
            pg_sys::XactEvent::XACT_EVENT_PRE_COMMIT if UNUSED.take() => Error::unused_identity().warn(),
            pg_sys::XactEvent::XACT_EVENT_COMMIT
            | pg_sys::XactEvent::XACT_EVENT_ABORT
            | pg_sys::XactEvent::XACT_EVENT_PREPARE => {
                BOUND.set(None);
                UNUSED.set(false);
            }
            _ => {}
        });
    }
}
