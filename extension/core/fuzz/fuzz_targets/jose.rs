//! Nothing that is read as a signed token, a key or a set of keys makes the parsers panic; what they accept is JSON for
//! serde_json too and means the same; and a token is accepted in one spelling only. Tried on raw bytes, and on a header
//! and a payload (the two sides of the input's first newline) with a valid signature, without which most checks are not
//! reached. How to run it: `fuzz/Cargo.toml`.

#![no_main]

use std::sync::LazyLock;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use libfuzzer_sys::fuzz_target;
use serde_json::Value;
use tollgate_core::json::{self, Json};
use tollgate_core::jwk::{Jwk, KeySet};
use tollgate_core::jws;
use tollgate_core::signature::SigningKey;

/// PKCS#8 of an Ed25519 key whose seed is 32 times `s`.
const PKCS8: &[u8] =
    b"\x30\x2e\x02\x01\x00\x30\x05\x06\x03\x2b\x65\x70\x04\x22\x04\x20ssssssssssssssssssssssssssssssss";

static KEY: LazyLock<SigningKey> = LazyLock::new(|| SigningKey::from_pkcs8(PKCS8).expect("a private key"));

fn is_same(ours: &Json, theirs: &Value) -> bool {
    match (ours, theirs) {
        (Json::Null, Value::Null) => true,
        (Json::Bool(one), Value::Bool(other)) => one == other,
        (Json::Number(one), Value::Number(other)) => one == other,
        (Json::Text(one), Value::String(other)) => one == other,
        (Json::List(one), Value::Array(other)) => {
            one.len() == other.len() && one.iter().zip(other).all(|(one, other)| is_same(one, other))
        }
        (Json::Object(one), Value::Object(other)) => {
            one.len() == other.len()
                && one.iter().all(|(name, one)| other.get(name).is_some_and(|other| is_same(one, other)))
        }
        _ => false,
    }
}

fn read_json(text: &str) {
    let Ok(ours) = json::parse(text) else { return };
    let theirs: Value = serde_json::from_str(text).expect("serde_json accepts what is stricter");
    assert!(is_same(&ours, &theirs));
}

fn read_key(text: &str) {
    if let Ok(Jwk { kid, key }) = Jwk::parse(text) {
        let again = Jwk::parse(&key.to_jwk(kid.as_deref().unwrap_or_default())).expect("a key of ours");
        assert_eq!(again.key, key);
        assert_eq!(again.key.thumbprint(), key.thumbprint());
        assert!(!key.verify(b"message", &[0; 64]));
    }
    let _ = KeySet::parse(text);
    let _ = KeySet::parse(&format!(r#"{{"keys":[{text}]}}"#));
}

/// Whether the parser accepts it and the signature is the key's.
fn read_token(token: &str) -> bool {
    let Ok(parsed) = jws::parse(token) else { return false };
    read_json(parsed.claims.as_str());
    let payload = URL_SAFE_NO_PAD.encode(parsed.claims.as_str());
    let signature = URL_SAFE_NO_PAD.encode(&parsed.signature);
    assert!(token.ends_with(&format!(".{payload}.{signature}")));
    assert!(token.as_bytes().starts_with(parsed.signing_input));
    let claims = &parsed.claims;
    let _ = (
        claims.check_times(0, 0),
        claims.check_times(i64::MAX, i64::MAX),
        claims.check_times(i64::MIN, i64::MIN),
    );
    let _ = (claims.scope().map(Iterator::count), claims.aud().count(), claims.client_id(), claims.sid());
    parsed.is_signed_by(KEY.public_key())
}

fuzz_target!(|data: &[u8]| {
    if let Ok(text) = std::str::from_utf8(data) {
        assert!(!read_token(text));
        read_json(text);
        read_key(text);
        let _ = SigningKey::from_pkcs8_pem(text);
        if let Ok(token) = jws::sign(&KEY, "kid", "at+jwt", text) {
            assert!(read_token(&token));
        }
    }
    if let Ok(key) = SigningKey::from_pkcs8(data) {
        let signature = key.sign(b"message").expect("a key that was accepted signs");
        assert!(key.public_key().verify(b"message", &signature));
    }

    let mut sides = data.splitn(2, |&b| b == b'\n');
    let [header, payload] = [(); 2].map(|()| URL_SAFE_NO_PAD.encode(sides.next().unwrap_or_default()));
    let input = format!("{header}.{payload}");
    let signature = KEY.sign(input.as_bytes()).expect("it signs");
    let token = format!("{input}.{}", URL_SAFE_NO_PAD.encode(&signature));
    if read_token(&token) {
        let mut damaged = signature;
        damaged[data.len() % 64] ^= 1 << (data.len() / 64 % 8);
        assert!(!read_token(&format!("{input}.{}", URL_SAFE_NO_PAD.encode(damaged))));
    }
});
