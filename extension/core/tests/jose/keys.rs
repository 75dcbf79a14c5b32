//! Public keys as JWK, private keys as PKCS#8: which are accepted, and which are too weak.

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use tollgate_core::jwk::{Fault, Jwk, KeySet, MAX_KEYS, MAX_KID_LEN};
use tollgate_core::jws::Algorithm;
use tollgate_core::signature::{Material, Pkcs8Fault, PublicKey, SigningKey, Weakness};

use crate::{KEYS, key};

/// RFC 7638 §3.1.
const RSA_N: &str = "0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78LhWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1L6tSoc_BJECPebWKRXjBZCiFV4n3oknjhMstn64tZ_2W-5JsGY4Hc5n9yBXArwl93lqt7_RN5w6Cf0h4QyQ5v-65YGjQR0_FDW2QvzqY368QQMicAtaSqzs8KJZgnYb9c7d0zgdAZHzu6qMQvRL5hajrn1n91CbOpbISD08qNLyrdkt-bFTWhAI4vMQFh6WeZu0fM4lFd2NcRwr3XPksINHaQ-G_xBniIqbw0Ls1jF44-csFCur-kEgU8awapJzKnqDKgw";
/// RFC 8037 §A.2.
const ED25519_X: &str = "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo";
/// RFC 7515 §A.3.
const P256_X: &str = "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU";
const P256_Y: &str = "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0";

fn rsa() -> String {
    format!(r#"{{"kty":"RSA","n":"{RSA_N}","e":"AQAB","alg":"RS256","kid":"2011-04-29"}}"#)
}

fn ed25519() -> String {
    format!(r#"{{"kty":"OKP","crv":"Ed25519","x":"{ED25519_X}"}}"#)
}

fn p256() -> String {
    format!(r#"{{"kty":"EC","crv":"P-256","x":"{P256_X}","y":"{P256_Y}"}}"#)
}

fn fault(jwk: &str) -> Option<Fault> {
    PublicKey::from_jwk(jwk).err()
}

/// A JWK with one more member, or another value of a member.
fn with(jwk: &str, name: &str, value: &str) -> String {
    let mut members: serde_json::Map<String, serde_json::Value> = serde_json::from_str(jwk).unwrap();
    members.insert(name.to_owned(), serde_json::from_str(value).unwrap());
    serde_json::Value::Object(members).to_string()
}

#[test]
fn thumbprints_are_those_of_the_rfcs() {
    let thumbprint = |jwk: &str| PublicKey::from_jwk(jwk).unwrap().thumbprint();
    assert_eq!(thumbprint(&rsa()), "NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs");
    assert_eq!(thumbprint(&ed25519()), "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k");
    // Computed with jwcrypto.
    assert_eq!(thumbprint(&p256()), "oKIywvGUpTVTyxMQ3bwIIeQUudfr_CkLMjCE19ECD-U");
}

#[test]
fn a_published_key_is_read_back_and_holds_nothing_private() {
    for key in KEYS.iter() {
        let kid = key.public_key().thumbprint();
        let text = key.public_key().to_jwk(&kid);
        let read = Jwk::parse(&text).unwrap();
        assert_eq!((read.kid.as_deref(), &read.key), (Some(&*kid), key.public_key()));
        assert_eq!(read.key.algorithm(), key.algorithm());
        let members: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&text).unwrap();
        let names: Vec<&str> = members.keys().map(String::as_str).collect();
        let expected: &[&str] = match key.algorithm() {
            Algorithm::Es256 => &["alg", "crv", "kid", "kty", "use", "x", "y"],
            Algorithm::EdDsa => &["alg", "crv", "kid", "kty", "use", "x"],
            Algorithm::Rs256 => &["alg", "e", "kid", "kty", "n", "use"],
        };
        assert_eq!(names, expected);
        assert_eq!(members["alg"], key.algorithm().as_str());
        assert_eq!(members["use"], "sig");
        let set = KeySet::parse(&format!(r#"{{"keys":[{text}]}}"#)).unwrap();
        assert_eq!((set.keys, set.ignored), (vec![read], vec![]));
    }
    let odd = r#"a"b\c"#;
    assert_eq!(Jwk::parse(&KEYS[0].public_key().to_jwk(odd)).unwrap().kid.as_deref(), Some(odd));
}

#[test]
fn a_key_is_used_for_what_it_is_for() {
    for jwk in [rsa(), ed25519(), p256()] {
        let alg = PublicKey::from_jwk(&jwk).unwrap().algorithm().as_str();
        for (name, value) in [
            ("use", r#""sig""#.to_owned()),
            ("alg", format!(r#""{alg}""#)),
            ("key_ops", r#"["verify"]"#.to_owned()),
            ("key_ops", r#"["sign","verify"]"#.to_owned()),
            ("x5c", r#"["MII"]"#.to_owned()),
            ("x5u", r#""https://evil.example""#.to_owned()),
            ("ext", "true".to_owned()),
            ("own", "{}".to_owned()),
        ] {
            assert_eq!(fault(&with(&jwk, name, &value)), None, "{name} {value}");
        }
        for (name, value, expected) in [
            ("use", r#""enc""#, Fault::Purpose),
            ("use", r#""SIG""#, Fault::Purpose),
            ("use", "null", Fault::Member("use")),
            ("use", r#"["sig"]"#, Fault::Member("use")),
            ("key_ops", "[]", Fault::Purpose),
            ("key_ops", r#"["sign"]"#, Fault::Purpose),
            ("key_ops", r#"["encrypt"]"#, Fault::Purpose),
            ("key_ops", r#"["verify","encrypt"]"#, Fault::Purpose),
            ("key_ops", r#"["verify","verify"]"#, Fault::Member("key_ops")),
            ("key_ops", r#""verify""#, Fault::Member("key_ops")),
            ("key_ops", r#"["verify",1]"#, Fault::Member("key_ops")),
            ("alg", r#""HS256""#, Fault::Unsupported),
            ("alg", r#""none""#, Fault::Unsupported),
            ("alg", r#""RS384""#, Fault::Unsupported),
            ("alg", r#""PS256""#, Fault::Unsupported),
            ("alg", r#""es256""#, Fault::Unsupported),
            ("alg", "null", Fault::Member("alg")),
            ("kty", r#""oct""#, Fault::Secret),
            ("kty", r#""AKP""#, Fault::Unsupported),
            ("kty", r#""ec""#, Fault::Unsupported),
            ("kty", "1", Fault::Member("kty")),
            ("crv", r#""P-384""#, Fault::Unsupported),
            ("crv", r#""secp256k1""#, Fault::Unsupported),
            ("crv", r#""X25519""#, Fault::Unsupported),
            ("crv", r#""Ed448""#, Fault::Unsupported),
            ("kid", "1", Fault::Member("kid")),
            ("d", r#""AQ""#, Fault::Secret),
            ("k", r#""AQ""#, Fault::Secret),
            ("p", "null", Fault::Secret),
            ("oth", "[]", Fault::Secret),
        ] {
            assert_eq!(fault(&with(&jwk, name, value)), Some(expected), "{name} {value}");
        }
        let long = |len: usize| with(&jwk, "kid", &format!("{:?}", "k".repeat(len)));
        assert_eq!(fault(&long(MAX_KID_LEN)), None);
        assert_eq!(fault(&long(MAX_KID_LEN + 1)), Some(Fault::Member("kid")));
        assert!(matches!(fault(&jwk.replacen('{', r#"{"kty":"EC","#, 1)), Some(Fault::Json(_))));
    }
    for (one, other) in [("RS256", ed25519()), ("ES256", ed25519()), ("EdDSA", p256()), ("RS256", p256())] {
        assert_eq!(fault(&with(&other, "alg", &format!("{one:?}"))), Some(Fault::Unsupported), "{one}");
    }
    // As Keycloak has it in each set.
    let encrypts = with(&with(&p256(), "alg", r#""RSA-OAEP""#), "use", r#""enc""#);
    assert_eq!(fault(&encrypts), Some(Fault::Purpose));
}

#[test]
fn a_number_of_a_key_has_one_spelling() {
    for (jwk, name, good) in [
        (rsa(), "n", RSA_N),
        (rsa(), "e", "AQAB"),
        (ed25519(), "x", ED25519_X),
        (p256(), "x", P256_X),
        (p256(), "y", P256_Y),
    ] {
        let name = match name {
            "n" => "n",
            "e" => "e",
            "x" => "x",
            _ => "y",
        };
        let leading_zero = URL_SAFE_NO_PAD.encode([&[0], &*URL_SAFE_NO_PAD.decode(good).unwrap()].concat());
        for bad in [
            String::new(),
            "A".to_owned(),
            format!("{good}="),
            format!("{good} "),
            format!(" {good}"),
            format!("{good}\n"),
            good.replacen('A', "+", 1) + "/",
            leading_zero,
            STANDARD.encode(b"\xff\xff\xff\xfe"),
        ] {
            assert!(fault(&with(&jwk, name, &format!("{bad:?}"))).is_some(), "{name} {bad}");
        }
        for wrong in ["null", "65537", "[1]"] {
            assert_eq!(fault(&with(&jwk, name, wrong)), Some(Fault::Member(name)));
        }
        let mut members: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&jwk).unwrap();
        members.remove(name);
        assert_eq!(fault(&serde_json::Value::Object(members).to_string()), Some(Fault::Member(name)));
    }
    // The last character of 32 bytes encodes 4 bits and two that must be zero.
    let loose = ED25519_X.strip_suffix('o').unwrap().to_owned() + "p";
    assert_eq!(fault(&with(&ed25519(), "x", &format!("{loose:?}"))), Some(Fault::Member("x")));
}

#[test]
fn a_point_that_is_not_on_the_curve_is_refused() {
    let P256 { x, y } = p256_numbers();
    let weakness = |x, y| PublicKey::new(Material::P256 { x, y }).err();
    assert_eq!(weakness(x, y), None);
    let mut beside = y;
    beside[31] ^= 1;
    for (x, y) in [(x, beside), (y, x), ([0; 32], [0; 32]), ([0xff; 32], y), (x, [0xff; 32]), (x, [0; 32])] {
        assert_eq!(weakness(x, y), Some(Weakness::Point));
    }
}

struct P256 {
    x: [u8; 32],
    y: [u8; 32],
}

fn p256_numbers() -> P256 {
    let decode = |text| URL_SAFE_NO_PAD.decode(text).unwrap().try_into().unwrap();
    P256 { x: decode(P256_X), y: decode(P256_Y) }
}

#[test]
fn an_ed25519_key_of_small_order_or_not_canonical_is_refused() {
    let weakness = |x| PublicKey::new(Material::Ed25519 { x }).err();
    let hex = |digits: &str| -> [u8; 32] {
        let byte = |i| u8::from_str_radix(&digits[2 * i..2 * i + 2], 16).unwrap();
        std::array::from_fn(byte)
    };
    // The blacklist of libsodium's ge25519_has_small_order: each also with the other sign.
    for digits in [
        "0000000000000000000000000000000000000000000000000000000000000000",
        "0100000000000000000000000000000000000000000000000000000000000000",
        "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
        "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
        "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    ] {
        let mut x = hex(digits);
        assert_eq!(weakness(x), Some(Weakness::SmallOrder), "{digits}");
        x[31] ^= 0x80;
        assert_eq!(weakness(x), Some(Weakness::SmallOrder), "-{digits}");
    }
    let mut prime = [0xff; 32];
    (prime[0], prime[31]) = (0xed, 0x7f);
    for above in 0..19 {
        let mut x = prime;
        x[0] += above;
        assert_eq!(weakness(x), Some(Weakness::NotCanonical), "p + {above}");
        x[31] |= 0x80;
        assert_eq!(weakness(x), Some(Weakness::NotCanonical), "p + {above}, negative");
    }
    let mut below = prime;
    below[0] -= 2;
    assert_eq!(weakness(below), None);
}

#[test]
fn a_weak_rsa_key_is_refused() {
    let n = URL_SAFE_NO_PAD.decode(RSA_N).unwrap();
    let weakness = |n: &[u8], e: &[u8]| PublicKey::new(Material::Rsa { n: n.to_vec(), e: e.to_vec() }).err();
    for e in [&[1, 0, 1][..], &[1, 0, 3], &[0xff, 0xff, 0xff, 0xff]] {
        assert_eq!(weakness(&n, e), None, "{e:?}");
    }
    for e in [&[][..], &[0], &[1], &[3], &[17], &[0xff, 0xff], &[1, 0, 0], &[0, 1, 0, 1], &[1, 0, 0, 0, 1]] {
        assert_eq!(weakness(&n, e), Some(Weakness::RsaExponent), "{e:?}");
    }
    let mut even = n.clone();
    even[255] &= 0xfe;
    assert_eq!(weakness(&even, &[1, 0, 1]), Some(Weakness::RsaModulus));
    assert_eq!(weakness(&[&[0], &*n].concat(), &[1, 0, 1]), Some(Weakness::RsaModulus));
    assert_eq!(weakness(&[], &[1, 0, 1]), Some(Weakness::RsaModulus));
    let mut shorter = n.clone();
    shorter[0] = 0x7f; // 2047 bits
    for n in [&shorter[..], &n[1..], &n[128..], &[1; 1][..], &[0xff; 1025], &[0xff; 100_000]] {
        assert_eq!(weakness(n, &[1, 0, 1]), Some(Weakness::RsaSize), "{} bytes", n.len());
    }
}

#[test]
fn a_set_leaves_out_what_it_cannot_use_and_is_refused_for_what_must_not_be_in_it() {
    let with_kid = |jwk: &str, kid: &str| with(jwk, "kid", &format!("{kid:?}"));
    let set = |keys: &[String]| KeySet::parse(&format!(r#"{{"keys":[{}]}}"#, keys.join(",")));
    let (one, other) = (with_kid(&p256(), "a"), with_kid(&ed25519(), "b"));
    let encryption = with(&with_kid(&rsa(), "c"), "use", r#""enc""#);
    let mixed =
        set(&[one.clone(), encryption, other.clone(), r#"{"kty":"EC","crv":"P-521"}"#.into(), ed25519()])
            .unwrap();
    let kids: Vec<Option<&str>> = mixed.keys.iter().map(|jwk| jwk.kid.as_deref()).collect();
    assert_eq!(kids, [Some("a"), Some("b"), None]);
    assert_eq!(mixed.ignored, [(Some("c".to_owned()), Fault::Purpose), (None, Fault::Unsupported)]);

    assert_eq!(set(&[one.clone(), with_kid(&other, "a")]), Err(Fault::DuplicateKid));
    assert_eq!(set(&[one.clone(), with(&other, "d", r#""AQ""#)]), Err(Fault::Secret));
    assert_eq!(set(&[one.clone(), r#"{"kty":"oct","kid":"x"}"#.into()]), Err(Fault::Secret));
    assert_eq!(set(&[one, "1".into()]), Err(Fault::Member("keys")));
    for not_a_set in ["{}", r#"{"keys":{}}"#, r#"{"keys":null}"#] {
        assert_eq!(KeySet::parse(not_a_set), Err(Fault::Member("keys")), "{not_a_set}");
    }
    for not_json in ["", "<html>", "[]", r#"{"keys":[],"keys":[]}"#] {
        assert!(matches!(KeySet::parse(not_json), Err(Fault::Json(_))), "{not_json}");
    }
    assert_eq!(set(&[]).map(|set| set.keys.len()), Ok(0));
    assert_eq!(set(&vec!["{}".to_owned(); MAX_KEYS]).map(|set| set.ignored.len()), Ok(MAX_KEYS));
    assert_eq!(set(&vec!["{}".to_owned(); MAX_KEYS + 1]), Err(Fault::Size));
    assert_eq!(KeySet::parse(&" ".repeat(1_000_000)), Err(Fault::Size));
}

fn pem(label: &str, der: &[u8]) -> String {
    let encoded = STANDARD.encode(der);
    let lines: Vec<&str> =
        encoded.as_bytes().chunks(64).map(|line| std::str::from_utf8(line).unwrap()).collect();
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", lines.join("\n"))
}

#[test]
fn a_private_key_is_read_back_from_pkcs8() {
    for key in KEYS.iter() {
        let der = key.to_pkcs8().unwrap();
        let text = pem("PRIVATE KEY", &der);
        let crlf = text.replace('\n', "\r\n");
        let commented = format!("Bag Attributes\n    friendlyName: ann\n{text}\n# the end");
        for read in [
            SigningKey::from_pkcs8(&der),
            SigningKey::from_pkcs8_pem(&text),
            SigningKey::from_pkcs8_pem(&crlf),
            SigningKey::from_pkcs8_pem(&commented),
        ] {
            let read = read.unwrap();
            assert_eq!(read.public_key(), key.public_key());
            assert_eq!(*read.to_pkcs8().unwrap(), *der);
            let signature = read.sign(b"message").unwrap();
            assert!(key.public_key().verify(b"message", &signature));
            assert!(!key.public_key().verify(b"another", &signature));
        }
    }
}

#[test]
fn a_file_that_is_not_one_private_key_is_refused_with_the_reason() {
    let der = key(Algorithm::EdDsa).to_pkcs8().unwrap();
    let good = pem("PRIVATE KEY", &der);
    for (text, expected) in [
        (String::new(), Pkcs8Fault::Pem),
        ("-----BEGIN PRIVATE KEY-----".to_owned(), Pkcs8Fault::Pem),
        (good.replace("-----END", "-----ENDE"), Pkcs8Fault::Pem),
        (good.replace("-----\nM", "-----\n!"), Pkcs8Fault::Pem),
        (pem("PUBLIC KEY", &der), Pkcs8Fault::Pem),
        (pem("CERTIFICATE", &der), Pkcs8Fault::Pem),
        (pem("ENCRYPTED PRIVATE KEY", &der), Pkcs8Fault::Encrypted),
        (pem("RSA PRIVATE KEY", &der), Pkcs8Fault::NotPkcs8),
        (pem("EC PRIVATE KEY", &der), Pkcs8Fault::NotPkcs8),
        (pem("OPENSSH PRIVATE KEY", &der), Pkcs8Fault::NotPkcs8),
        (good.repeat(2), Pkcs8Fault::Several),
        (good.clone() + &pem("EC PRIVATE KEY", &der), Pkcs8Fault::Several),
        (pem("PRIVATE KEY", b""), Pkcs8Fault::Der),
        (pem("PRIVATE KEY", b"\x30\x00"), Pkcs8Fault::Der),
        (pem("PRIVATE KEY", &der[..der.len() - 1]), Pkcs8Fault::Der),
        (pem("PRIVATE KEY", &[&der[..], b"x"].concat()), Pkcs8Fault::Der),
    ] {
        assert_eq!(SigningKey::from_pkcs8_pem(&text).err(), Some(expected), "{text}");
    }
}

#[test]
fn debug_shows_no_private_key() {
    for key in KEYS.iter() {
        assert_eq!(format!("{key:?}"), format!("SigningKey({:?})", key.public_key()));
    }
}
