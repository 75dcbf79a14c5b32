//! Signed tokens: the examples of the RFCs, and our own read back.

use tollgate_core::jws::{self, Algorithm, Compact, Fault, MAX_LEN, SignError};
use tollgate_core::signature::PublicKey;

use crate::{KEYS, key};

#[test]
fn the_examples_of_the_rfcs_are_accepted_and_no_other_message() {
    for (jwk, token, payload) in [
        (
            // RFC 8037 §A.4
            r#"{"kty":"OKP","crv":"Ed25519","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}"#,
            "eyJhbGciOiJFZERTQSJ9.RXhhbXBsZSBvZiBFZDI1NTE5IHNpZ25pbmc.hgyY0il_MGCjP0JzlnLWG1PPOt7-09PGcvMg3AIbQR6dWbhijcNR4ki4iylGjg5BhVsPt9g7sVvpAr_MuM0KAg",
            "Example of Ed25519 signing",
        ),
        (
            // RFC 7515 §A.3
            r#"{"kty":"EC","crv":"P-256","x":"f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU","y":"x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"}"#,
            "eyJhbGciOiJFUzI1NiJ9.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ.DtEhU3ljbEg8L38VWAfUAqOyKAM6-Xx-F4GawxaepmXFCgfTjDxw5djxLa8ISlSApmWQxfKTUJqPP3-Kg6NU1Q",
            "{\"iss\":\"joe\",\r\n \"exp\":1300819380,\r\n \"http://example.com/is_root\":true}",
        ),
    ] {
        let key = PublicKey::from_jwk(jwk).unwrap();
        let read = Compact::parse(token).unwrap();
        assert_eq!(read.payload, payload.as_bytes());
        assert!(read.is_signed_by(&key));
        assert!(!key.verify(b"another", &read.signature));
    }
}

#[test]
fn a_token_of_ours_is_read_back_and_verified_by_its_key_alone() {
    let claims =
        r#"{"iss":"https://a.example","sub":"ann","aud":"api","exp":1700000000,"scope":"posts:read"}"#;
    for signer in KEYS.iter() {
        let kid = signer.public_key().thumbprint();
        let token = jws::sign(signer, &kid, "at+jwt", claims).unwrap();
        let read = jws::parse(&token).unwrap();
        assert_eq!((read.header.alg, read.header.kid.as_deref()), (signer.algorithm(), Some(&*kid)));
        assert!(read.header.is_type("at+jwt"));
        assert_eq!(read.claims.as_str(), claims);
        assert_eq!(read.claims.sub(), Some("ann"));
        for key in KEYS.iter() {
            assert_eq!(read.is_signed_by(key.public_key()), key.algorithm() == signer.algorithm());
        }
    }
}

#[test]
fn a_type_is_compared_as_a_media_type() {
    let is_access_token = |typ: &str| {
        let token = jws::sign(key(Algorithm::EdDsa), "k", typ, "{}").unwrap();
        jws::parse(&token).unwrap().header.is_type("at+jwt")
    };
    for typ in ["at+jwt", "AT+JWT", "application/at+jwt", "Application/At+Jwt"] {
        assert!(is_access_token(typ), "{typ}");
    }
    for typ in
        ["", "JWT", "at", "at+jwt ", "application/", "application/application/at+jwt", "text/at+jwt", "ä"]
    {
        assert!(!is_access_token(typ), "{typ}");
    }
}

#[test]
fn what_would_be_refused_is_not_signed() {
    let key = key(Algorithm::Es256);
    for (claims, fault) in [
        ("", Fault::Json),
        ("[]", Fault::Json),
        (r#"{"a":1,"a":2}"#, Fault::DuplicateName),
        (r#"{"a":"\u0000"}"#, Fault::Nul),
        (r#"{"exp":"1"}"#, Fault::Claim),
        (r#"{"aud":[]}"#, Fault::Claim),
    ] {
        assert_eq!(jws::sign(key, "k", "at+jwt", claims), Err(SignError::Refused(fault)), "{claims}");
    }
    for kid in ["a\0", &"k".repeat(257)] {
        assert_eq!(jws::sign(key, kid, "at+jwt", "{}"), Err(SignError::Refused(Fault::Header)));
    }
    let of_size =
        |filler: usize| jws::sign(key, "k", "at+jwt", &format!(r#"{{"a":"{}"}}"#, "x".repeat(filler)));
    let longest = (0..MAX_LEN).rev().find_map(|filler| of_size(filler).ok()).unwrap();
    assert!((MAX_LEN - 2..=MAX_LEN).contains(&longest.len()), "{}", longest.len());
    jws::parse(&longest).unwrap();
    assert_eq!(of_size(MAX_LEN), Err(SignError::Refused(Fault::Size)));
}
