//! Signing keys: which key signs, which verify, and how a private key is opened.
//!
//! `store::keys` reads the rows, by the latest snapshot; `shmem` holds the master keys, which `worker` reads from where
//! `source` says. What is opened stays in the backend that opened it, as long as its row and the master keys are the
//! same. Without a master key nothing is signed; verifying needs none.

mod opened;
mod purpose;
mod source;
mod worker;

use crate::error::Error;
use crate::pg::sys;
use crate::store::keys;
use crate::store::public_keys::StoredKey;
use std::rc::Rc;
use tollgate_core::foreign::ImportKey;
use tollgate_core::refresh;
use tollgate_core::signature::{Algorithm, SigningKey};

pub(crate) use opened::{UrlKey, reseal, seal, seal_import_key, seal_mac_key};
pub(crate) use purpose::{Purpose, SIGNED_URL, TOKEN_IMPORT};

/// Signs with the key that signs for this purpose now; with an algorithm, only if it is one of that. The row is read
/// each time, by the latest snapshot: a key that was withdrawn signs nothing more.
pub(crate) fn sign_with<T>(
    purpose: Purpose,
    algorithm: Option<Algorithm>,
    sign: impl FnOnce(&str, &SigningKey) -> T,
) -> Result<T, Error> {
    let row = keys::signing(purpose.as_str(), sys::GetCurrentTimestamp());
    let row = row.ok_or_else(Error::no_signing_key)?;
    if let Some(wanted) = algorithm.filter(|wanted| wanted.as_str() != row.algorithm) {
        return Err(Error::other_algorithm(wanted.as_str(), &row.algorithm));
    }
    let key = opened::open(&row)?;
    Ok(sign(&row.kid, &key))
}

/// Our key of that kid, if it is published, signing or retiring: not one that is withdrawn or gone. The row is read each
/// time, by the latest snapshot.
pub(crate) fn public_key_of(kid: &str) -> Option<Rc<StoredKey>> {
    keys::verifying(kid, sys::GetCurrentTimestamp())
}

/// The key that makes the refresh tokens of new sessions, with its kid; `None` if there is none. The row is read each
/// time, by the latest snapshot, here and below.
pub(crate) fn refresh_key() -> Result<Option<(String, Rc<refresh::Key>)>, Error> {
    let Some(row) = keys::signing(Purpose::RefreshToken.as_str(), sys::GetCurrentTimestamp()) else {
        return Ok(None);
    };
    let key = opened::open_refresh_key(&row)?;
    Ok(Some((row.kid, key)))
}

/// The key of a session; `None` if it is withdrawn or gone.
pub(crate) fn refresh_key_of(kid: &str) -> Result<Option<Rc<refresh::Key>>, Error> {
    let row = keys::sealed(kid, Purpose::RefreshToken.as_str(), sys::GetCurrentTimestamp());
    row.map(|row| opened::open_refresh_key(&row)).transpose()
}

/// Whether sessions of that key may go on: not if it is withdrawn or gone. Needs no master key.
pub(crate) fn has_refresh_key(kid: &str) -> bool {
    keys::is_live(kid, Purpose::RefreshToken.as_str(), sys::GetCurrentTimestamp())
}

/// The key of that name that signs URLs; `None` if there is none. The row is read each time, by the latest snapshot.
pub(crate) fn url_key(name: &str) -> Result<Option<Rc<UrlKey>>, Error> {
    let row = keys::signing(&format!("{SIGNED_URL}{name}"), sys::GetCurrentTimestamp());
    row.map(|row| opened::open_url_key(&row)).transpose()
}

/// The key of that id that URLs may be signed with; `None` if it is withdrawn or gone, or signs something else.
pub(crate) fn url_key_of(kid: &str) -> Result<Option<Rc<UrlKey>>, Error> {
    let row = keys::of_kid(kid, sys::GetCurrentTimestamp());
    row.filter(|row| row.purpose.starts_with(SIGNED_URL)).map(|row| opened::open_url_key(&row)).transpose()
}

/// The keys by which other systems made the digests of imported tokens, each with its name; an error for one that does not
/// open. The rows are read each time, by the latest snapshot.
pub(crate) fn import_keys() -> impl Iterator<Item = (String, Result<Rc<ImportKey>, Error>)> {
    keys::sealed_with_prefix(purpose::TOKEN_IMPORT, purpose::AFTER_TOKEN_IMPORT)
        .into_iter()
        .map(|row| (row.purpose[TOKEN_IMPORT.len()..].to_owned(), opened::open_import_key(&row)))
}

/// Signs a text with the key that signs now, verifies it as a token would be, and returns the kid. Of refresh tokens it
/// opens the key.
pub(crate) fn test(purpose: Purpose) -> Result<String, Error> {
    if purpose == Purpose::RefreshToken {
        return refresh_key()?.map(|(kid, _)| kid).ok_or_else(Error::no_signing_key);
    }
    // Not what a token's signature is of: that has a dot.
    const TEXT: &[u8] = b"a test of the signing key";
    let (kid, signature) = sign_with(purpose, None, |kid, key| (kid.to_owned(), key.sign(TEXT)))?;
    let signature = signature.map_err(|_| Error::internal("the signing key does not sign"))?;
    let verified = public_key_of(&kid).is_some_and(|stored| {
        stored
            .key()
            .is_some_and(|key| key.algorithm().as_str() == stored.algorithm && key.verify(TEXT, &signature))
    });
    if verified { Ok(kid) } else { Err(Error::damaged_key(&kid)) }
}

pub(crate) fn init() {
    worker::init();
}
