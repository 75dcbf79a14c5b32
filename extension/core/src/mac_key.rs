//! Secret keys of HMAC-SHA-256 (RFC 2104), each for one use.

use std::marker::PhantomData;

use aws_lc_rs::hmac;
use aws_lc_rs::rand::{SecureRandom as _, SystemRandom};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use zeroize::Zeroizing;

use crate::seal_box::NoRandomness;

/// Of a key, in bytes.
pub const KEY_LEN: usize = 32;
/// The algorithm of the keys, as RFC 7518 names it.
pub const ALGORITHM: &str = "HS256";

/// What keys are used for. The key of one use is not taken for that of another.
pub trait Use {
    /// What the names of the keys are a MAC of.
    const KID: &'static [u8];
}

/// A key. Its memory is wiped when it is dropped.
pub struct MacKey<U> {
    bytes: Zeroizing<[u8; KEY_LEN]>,
    key: hmac::Key,
    of: PhantomData<U>,
}

/// A name for a key that nothing of the key follows from, of the length of one that does.
pub fn random_kid() -> Result<String, NoRandomness> {
    let mut bytes = [0; KEY_LEN];
    SystemRandom::new().fill(&mut bytes).map_err(|_| NoRandomness)?;
    Ok(URL_SAFE_NO_PAD.encode(bytes))
}

impl<U: Use> MacKey<U> {
    pub fn generate() -> Result<Self, NoRandomness> {
        let mut bytes = Zeroizing::new([0; KEY_LEN]);
        SystemRandom::new().fill(&mut *bytes).map_err(|_| NoRandomness)?;
        Ok(Self::new(&bytes))
    }

    pub fn new(bytes: &[u8; KEY_LEN]) -> Self {
        let key = hmac::Key::new(hmac::HMAC_SHA256, bytes);
        Self { bytes: Zeroizing::new(*bytes), key, of: PhantomData }
    }

    /// `None` if it does not have [`KEY_LEN`] bytes.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self::new)
    }

    pub fn as_bytes(&self) -> &[u8; KEY_LEN] {
        &self.bytes
    }

    /// The name of the key, which discloses nothing of it: 43 characters, as an RFC 7638 thumbprint has.
    pub fn kid(&self) -> String {
        URL_SAFE_NO_PAD.encode(self.sign(U::KID))
    }

    pub(crate) fn sign(&self, message: &[u8]) -> hmac::Tag {
        hmac::sign(&self.key, message)
    }

    /// Takes the same time whatever the MAC is.
    pub(crate) fn verifies(&self, message: &[u8], mac: &[u8]) -> bool {
        hmac::verify(&self.key, message, mac).is_ok()
    }
}
