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
use tollgate_core::signature::{Algorithm, PublicKey, SigningKey};

pub(crate) use opened::{reseal, seal};
pub(crate) use purpose::Purpose;

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

/// A key of our own that tokens may be verified with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct OwnKey {
    pub(crate) algorithm: Algorithm,
    /// For `tollgate_core::jwk::PublicKey::from_jwk`. As long as these bytes are the same, so is the key.
    pub(crate) jwk: String,
}

/// Our key of that kid, if it is published, signing or retiring: not one that is withdrawn or gone. The row is read each
/// time, by the latest snapshot.
pub(crate) fn public_key_of(kid: &str) -> Option<OwnKey> {
    let row = keys::verifying(kid, sys::GetCurrentTimestamp())?;
    Some(OwnKey { algorithm: Algorithm::parse(&row.algorithm)?, jwk: row.public_key })
}

/// Signs a text with the key that signs now, verifies it as a token would be, and returns the kid.
pub(crate) fn test(purpose: Purpose) -> Result<String, Error> {
    // Not what a token's signature is of: that has a dot.
    const TEXT: &[u8] = b"a test of the signing key";
    let (kid, signature) = sign_with(purpose, None, |kid, key| (kid.to_owned(), key.sign(TEXT)))?;
    let signature = signature.map_err(|_| Error::internal("the signing key does not sign"))?;
    let verified = public_key_of(&kid).is_some_and(|own| {
        PublicKey::from_jwk(&own.jwk)
            .is_ok_and(|key| key.algorithm() == own.algorithm && key.verify(TEXT, &signature))
    });
    if verified { Ok(kid) } else { Err(Error::damaged_key(&kid)) }
}

pub(crate) fn init() {
    worker::init();
}
