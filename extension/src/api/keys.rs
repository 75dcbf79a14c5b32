//! What the SQL of signing keys calls: making, reading and resealing private keys, and which master keys there are.

use crate::error::{Error, OrRaise};
use crate::keys::{self, Purpose, SIGNED_URL, TOKEN_IMPORT};
use crate::pg::fmgr::{Call, sql_function};
use crate::shmem;
use pgrx::IntoDatum;
use pgrx::pg_sys::Datum;
use tollgate_core::mac_key::{self, MacKey, Use};
use tollgate_core::refresh::RefreshTokens;
use tollgate_core::seal_box::{Context, id_text};
use tollgate_core::signature::{Algorithm, SigningKey};
use tollgate_core::url::Urls;

/// Of a PEM block; one with an RSA key of 8192 bits has 6.4 kB.
const LONGEST_PEM: usize = 16 * 1024;

fn purpose(text: Option<&str>) -> Purpose {
    text.and_then(Purpose::parse)
        .unwrap_or_else(|| Error::internal("there is no such purpose of a key").raise())
}

sql_function!(make_key);
fn make_key(call: &Call) -> Option<Datum> {
    if let Some(purpose) = of_url(call.text(1)) {
        return make_mac_key::<Urls>(purpose);
    }
    if purpose(call.text(1)) == Purpose::RefreshToken {
        return make_mac_key::<RefreshTokens>(Purpose::RefreshToken.as_str());
    }
    let algorithm = call.text(0).and_then(Algorithm::parse).unwrap_or_else(|| {
        let hint = "It is one of ES256, EdDSA and RS256.";
        Error::argument("algorithm", "there is no such algorithm for signing keys", "", hint).raise()
    });
    let key = SigningKey::generate(algorithm)
        .unwrap_or_else(|_| Error::internal("a key could not be generated").raise());
    stored(&key, purpose(call.text(1)))
}

/// A purpose of keys that sign URLs.
fn of_url(purpose: Option<&str>) -> Option<&str> {
    purpose.filter(|purpose| purpose.starts_with(SIGNED_URL))
}

fn make_mac_key<U: Use>(purpose: &str) -> Option<Datum> {
    let key =
        MacKey::<U>::generate().unwrap_or_else(|_| Error::internal("a key could not be generated").raise());
    let sealed = keys::seal_mac_key(&key, purpose).or_raise();
    vec![Some(key.kid()), Some(mac_key::ALGORITHM.to_owned()), None, Some(hex(&sealed))].into_datum()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

sql_function!(read_key);
fn read_key(call: &Call) -> Option<Datum> {
    let pem = call.text(0).unwrap_or_else(|| Error::unfit_pem("which is NULL").raise());
    if pem.len() > LONGEST_PEM {
        Error::unfit_pem("which is longer than 16 kB").raise();
    }
    let key =
        SigningKey::from_pkcs8_pem(pem).unwrap_or_else(|fault| Error::unfit_pem(&fault.to_string()).raise());
    stored(&key, purpose(call.text(1)))
}

sql_function!(seal_import_key);
/// The kid is drawn at random: one that follows from the key could be compared with those of guessed keys.
fn seal_import_key(call: &Call) -> Option<Datum> {
    let (key, purpose) = (call.bytes(0)?, call.text(1)?);
    let kid = mac_key::random_kid();
    let kid = kid.unwrap_or_else(|_| Error::internal("a key could not be generated").raise());
    let sealed = keys::seal_import_key(key, &kid, purpose).or_raise();
    vec![Some(kid), Some(mac_key::ALGORITHM.to_owned()), None, Some(hex(&sealed))].into_datum()
}

/// What the table stores of a key.
fn stored(key: &SigningKey, purpose: Purpose) -> Option<Datum> {
    let (public, algorithm) = (key.public_key(), key.algorithm());
    let kid = public.thumbprint();
    let sealed = keys::seal(key, &kid, algorithm, purpose).or_raise();
    let jwk = public.to_jwk(&kid);
    vec![kid, algorithm.as_str().to_owned(), jwk, hex(&sealed)].into_datum()
}

sql_function!(reseal_key);
fn reseal_key(call: &Call) -> Option<Datum> {
    let context = Context { kid: call.text(1)?, algorithm: call.text(2)?, purpose: call.text(3)? };
    keys::reseal(call.bytes(0)?, &context).or_raise().into_datum()
}

sql_function!(master_key_ids);
fn master_key_ids(_call: &Call) -> Option<Datum> {
    let (_, masters) = shmem::master_keys();
    masters.iter().map(|key| id_text(&key.id())).collect::<Vec<String>>().into_datum()
}

sql_function!(master_key_fault);
fn master_key_fault(_call: &Call) -> Option<Datum> {
    shmem::master_key_fault()?.into_datum()
}

sql_function!(test_signing_key);
fn test_signing_key(call: &Call) -> Option<Datum> {
    if let Some(name) = of_url(call.text(0)).and_then(|purpose| purpose.strip_prefix(SIGNED_URL)) {
        let key = keys::url_key(name).or_raise();
        return key.unwrap_or_else(|| Error::no_url_key(name).raise()).key.kid().into_datum();
    }
    if let Some(name) = call.text(0).and_then(|purpose| purpose.strip_prefix(TOKEN_IMPORT)) {
        let opened = keys::import_keys().find(|(other, _)| other == name).map(|(_, key)| key);
        opened.transpose().or_raise();
        return name.into_datum();
    }
    keys::test(purpose(call.text(0))).or_raise().into_datum()
}
