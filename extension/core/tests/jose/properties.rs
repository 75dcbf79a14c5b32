//! What holds for every token and every text.

use std::sync::LazyLock;

use proptest::collection::{btree_map, vec};
use proptest::prelude::*;
use serde_json::{Value, json};
use tollgate_core::json::{self, Fault, Json};
use tollgate_core::jwk::{Jwk, KeySet};
use tollgate_core::jws::{self, Algorithm};
use tollgate_core::signature::{Material, PublicKey, SigningKey};

use crate::attacks::verdict;
use crate::corpus::{Verdict, forge, header};
use crate::{KEYS, key};

/// Any JSON value that may be in a token.
fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        // serde_json reads others to the last bit only with a feature that slows it down.
        any::<i32>().prop_map(|eighths| Value::from(f64::from(eighths) / 8.0)),
        "[^\0]{0,12}".prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 24, 4, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..4).prop_map(Value::from),
            btree_map("[^\0]{0,6}", inner, 0..4)
                .prop_map(|members| Value::Object(members.into_iter().collect())),
        ]
    })
}

fn claims() -> impl Strategy<Value = Value> {
    (btree_map("own_[^\0]{0,8}", value(), 0..5), any::<Option<u32>>(), ".{0,9}").prop_map(
        |(own, exp, sub)| {
            let mut claims: serde_json::Map<String, Value> = own.into_iter().collect();
            claims.extend(exp.map(|exp| ("exp".to_owned(), exp.into())));
            claims.insert("sub".to_owned(), sub.replace('\0', "").into());
            Value::Object(claims)
        },
    )
}

/// Text that is JSON, or almost.
fn almost_json() -> impl Strategy<Value = String> {
    const PIECES: &[&str] = &[
        "{",
        "}",
        "[",
        "]",
        ",",
        ":",
        "\"",
        "\"a\"",
        "\"a\":",
        "\\u0061",
        "\\ud800",
        "\\u0000",
        "\\",
        "0",
        "-0",
        "1.5",
        "1e9",
        "1e-9999",
        "null",
        "true",
        " ",
        "\n",
        "é",
        "\0",
        "{\"a\":1,\"a\":2}",
        "[[[[[[[[",
        "]]]]]]]]",
    ];
    let pieces = vec(proptest::sample::select(PIECES), 0..24).prop_map(|pieces| pieces.concat());
    prop_oneof![pieces, value().prop_map(|value| value.to_string())]
}

fn same(ours: &Json, theirs: &Value) -> bool {
    match (ours, theirs) {
        (Json::Null, Value::Null) => true,
        (Json::Bool(one), Value::Bool(other)) => one == other,
        (Json::Number(one), Value::Number(other)) => one == other,
        (Json::Text(one), Value::String(other)) => one == other,
        (Json::List(one), Value::Array(other)) => {
            one.len() == other.len() && one.iter().zip(other).all(|(one, other)| same(one, other))
        }
        (Json::Object(one), Value::Object(other)) => {
            one.len() == other.len()
                && one.iter().all(|(name, one)| other.get(name).is_some_and(|other| same(one, other)))
        }
        _ => false,
    }
}

/// A token of each algorithm, to be damaged.
static TOKENS: LazyLock<[String; 3]> =
    LazyLock::new(|| KEYS.each_ref().map(|key| forge(key, header(key.algorithm()), crate::corpus::PAYLOAD)));

proptest! {
    #[test]
    fn what_was_signed_is_what_is_read(claims in claims(), algorithm in 0..2_usize, kid in "[^\0]{0,40}") {
        let signer = key(Algorithm::ALL[algorithm]);
        let text = claims.to_string();
        let token = jws::sign(signer, &kid, "at+jwt", &text).unwrap();
        let read = jws::parse(&token).unwrap();
        prop_assert!(read.is_signed_by(signer.public_key()));
        prop_assert_eq!(read.claims.as_str(), text);
        prop_assert_eq!(read.header.kid.as_ref(), Some(&kid));
        for (name, value) in claims.as_object().unwrap() {
            prop_assert!(same(read.claims.get(name).unwrap(), value));
        }
    }

    #[test]
    fn a_token_with_a_changed_character_never_verifies(
        algorithm in 0..3_usize, place in any::<prop::sample::Index>(), replacement in any::<char>(), letter in "[A-Za-z0-9_.-]",
    ) {
        let token = &TOKENS[algorithm];
        let key = KEYS[algorithm].public_key();
        let at = place.index(token.len());
        let (before, after) = (&token[..at], &token[at + 1..]);
        for changed in [
            format!("{before}{replacement}{after}"),
            format!("{before}{letter}{after}"),
            format!("{before}{after}"),
            format!("{before}{letter}{}", &token[at..]),
            format!("{before}{replacement}{}", &token[at..]),
            before.to_owned(),
            after.to_owned(),
        ] {
            let found = verdict(&changed, key);
            prop_assert_eq!(found == Verdict::Accepted, &changed == token, "{}", changed);
        }
    }

    #[test]
    fn a_token_with_a_changed_bit_of_its_bytes_never_verifies(
        algorithm in 0..3_usize, part in 0..3_usize, place in any::<prop::sample::Index>(), bit in 0..8_u8,
    ) {
        let mut parts: Vec<Vec<u8>> = TOKENS[algorithm].split('.').map(crate::decode).collect();
        let at = place.index(parts[part].len());
        parts[part][at] ^= 1_u8 << bit;
        let token = parts.iter().map(|part| crate::encode(part)).collect::<Vec<_>>().join(".");
        prop_assert_ne!(verdict(&token, KEYS[algorithm].public_key()), Verdict::Accepted);
    }

    #[test]
    fn no_text_makes_the_parser_panic(text in any::<String>(), header in almost_json(), payload in almost_json()) {
        let key = key(Algorithm::EdDsa).public_key();
        let encoded = format!("{}.{}.{}", crate::encode(header.as_bytes()), crate::encode(payload.as_bytes()), "AAAA");
        for token in [text.clone(), format!("{text}.{text}.{text}"), encoded] {
            prop_assert_ne!(verdict(&token, key), Verdict::Accepted);
        }
        let _ = (Jwk::parse(&text), KeySet::parse(&text), Jwk::parse(&header), KeySet::parse(&header));
        let _ = (SigningKey::from_pkcs8(text.as_bytes()), SigningKey::from_pkcs8_pem(&text));
    }

    /// The reference is serde_json, which keeps the last of two members.
    #[test]
    fn strict_json_is_json_and_means_the_same(text in almost_json()) {
        let theirs = serde_json::from_str::<Value>(&text);
        match (json::parse(&text), theirs) {
            (Ok(ours), Ok(theirs)) => prop_assert!(same(&ours, &theirs), "{} {:?}", text, ours),
            (Ok(_), Err(error)) => prop_assert!(false, "{} {}", text, error),
            (Err(fault), Ok(_)) => prop_assert!(!matches!(fault, Fault::Syntax | Fault::NotAnObject), "{} {:?}", text, fault),
            (Err(_), Err(_)) => {}
        }
    }

    #[test]
    fn no_member_of_a_key_makes_reading_panic(
        kty in 0..4_usize, crv in 0..2_usize, x in vec(any::<u8>(), 31..33), n in vec(any::<u8>(), 255..257), loose in "[A-Za-z0-9_=-]{0,4}",
    ) {
        let (x, n) = (crate::encode(&x), crate::encode(&n));
        let mut jwk = json!({"kty": (["EC", "OKP", "RSA", "oct"][kty]), "x": x, "y": x, "n": n, "e": "AQAB"});
        if kty < 2 {
            jwk["crv"] = ["P-256", "Ed25519"][crv].into();
        }
        for member in ["", "x", "n", "e"] {
            jwk[member] = loose.clone().into();
            if let Ok(key) = PublicKey::from_jwk(&jwk.to_string()) {
                let read = Jwk::parse(&key.to_jwk("k")).unwrap();
                prop_assert_eq!(&read.key, &key);
                prop_assert_eq!(key.thumbprint().len(), 43);
            }
        }
    }

    #[test]
    fn no_number_makes_a_key_that_verifies_zeros(x in any::<[u8; 32]>(), mut n in vec(any::<u8>(), 256), e in vec(any::<u8>(), 0..5)) {
        n[255] |= 1;
        let e = [&e[..], &[1, 0, 1]].concat();
        for material in [Material::Ed25519 { x }, Material::P256 { x, y: x }, Material::Rsa { n, e }] {
            if let Ok(key) = PublicKey::new(material) {
                prop_assert!(!key.verify(b"message", &[0; 64]));
                prop_assert!(!key.verify(b"message", &[0; 256]));
                prop_assert!(!key.verify(b"message", &[]));
            }
        }
    }

    #[test]
    fn a_damaged_private_key_is_refused_or_whole(
        algorithm in 0..3_usize, place in any::<prop::sample::Index>(), byte in any::<u8>(), cut in any::<prop::sample::Index>(),
    ) {
        let der = KEYS[algorithm].to_pkcs8().unwrap();
        let mut changed = der.to_vec();
        changed[place.index(der.len())] = byte;
        for bytes in [&changed[..], &der[..cut.index(der.len())]] {
            if let Ok(key) = SigningKey::from_pkcs8(bytes) {
                let signature = key.sign(b"message").unwrap();
                prop_assert!(key.public_key().verify(b"message", &signature));
            }
        }
    }
}
