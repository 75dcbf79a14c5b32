//! Public keys as our tables have them. Parsing a JWK takes a good part of the time that checking a signature takes, so
//! those that were read lately are kept. They are found by the bytes of the row, which are read each time: what is kept
//! says nothing about whether a key is still there.

use core::cell::OnceCell;
use std::cell::RefCell;
use std::rc::Rc;
use tollgate_core::signature::PublicKey;
use tollgate_core::token::{self, Digest};

const KEPT: usize = 8;

pub(crate) struct StoredKey {
    /// That its row names.
    pub(crate) algorithm: String,
    jwk: String,
    /// Of the JWK's bytes.
    pub(crate) digest: Digest,
    parsed: OnceCell<Option<PublicKey>>,
}

thread_local! {
    static READ_LATELY: RefCell<Vec<Rc<StoredKey>>> = const { RefCell::new(Vec::new()) };
}

impl StoredKey {
    /// `None` if the JWK is no key that is used.
    pub(crate) fn key(&self) -> Option<&PublicKey> {
        self.parsed.get_or_init(|| PublicKey::from_jwk(&self.jwk).ok()).as_ref()
    }
}

/// The key of a row.
pub(super) fn of_row(algorithm: &[u8], jwk: &[u8]) -> Rc<StoredKey> {
    READ_LATELY.with_borrow_mut(|kept| {
        let same = |one: &&Rc<StoredKey>| one.jwk.as_bytes() == jwk && one.algorithm.as_bytes() == algorithm;
        if let Some(known) = kept.iter().find(same) {
            return Rc::clone(known);
        }
        let owned = |text| String::from_utf8_lossy(text).into_owned();
        let (algorithm, digest) = (owned(algorithm), token::digest(jwk));
        let key = Rc::new(StoredKey { algorithm, jwk: owned(jwk), digest, parsed: OnceCell::new() });
        if kept.len() >= KEPT {
            kept.remove(0);
        }
        kept.push(Rc::clone(&key));
        key
    })
}
