//! Signed tokens and their keys: JWS, JWT and JWK.

mod keys;
mod tokens;

use std::sync::LazyLock;

use tollgate_core::jws::Algorithm;
use tollgate_core::signature::SigningKey;

/// A key of each algorithm; that of RSA takes a while to make.
static KEYS: LazyLock<[SigningKey; 3]> =
    LazyLock::new(|| Algorithm::ALL.map(|algorithm| SigningKey::generate(algorithm).unwrap()));

fn key(algorithm: Algorithm) -> &'static SigningKey {
    KEYS.iter().find(|key| key.algorithm() == algorithm).unwrap()
}
