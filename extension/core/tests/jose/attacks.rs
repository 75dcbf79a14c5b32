//! Each hostile token of the corpus is refused, for the reason that it is hostile for.

use std::collections::BTreeSet;

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::KeyPair;
use aws_lc_rs::signature::{RSA_PKCS1_SHA384, RSA_PKCS1_SHA512, RSA_PSS_SHA256};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use tollgate_core::jws::{self, Algorithm, Fault};
use tollgate_core::signature::PublicKey;

use crate::corpus::{self, PAYLOAD, Verdict};
use crate::{ATTACKER, key};

pub(crate) fn verdict(token: &str, key: &PublicKey) -> Verdict {
    match jws::parse(token) {
        Err(fault) => Verdict::Malformed(fault),
        Ok(parsed) if parsed.is_signed_by(key) => Verdict::Accepted,
        Ok(_) => Verdict::BadSignature,
    }
}

#[test]
fn every_hostile_token_is_refused_for_what_it_is() {
    let corpus = corpus::corpus(key, &ATTACKER);
    for case in &corpus {
        let found = verdict(&case.token, key(case.algorithm).public_key());
        assert_eq!(found, case.verdict, "{}", case.name);
    }
    let names: BTreeSet<&str> = corpus.iter().map(|case| &*case.name).collect();
    assert_eq!(names.len(), corpus.len(), "two cases have the same name");
    for fault in Fault::ALL {
        assert!(corpus.iter().any(|case| case.verdict == Verdict::Malformed(fault)), "no case of {fault}");
    }
}

#[test]
fn a_token_without_an_end_is_not_valid() {
    for payload in ["{}", r#"{"iat":1,"nbf":1}"#] {
        let token = corpus::forge(key(Algorithm::Es256), corpus::header(Algorithm::Es256), payload);
        let parsed = jws::parse(&token).unwrap();
        assert!(parsed.claims.check_times(0, i64::MAX).is_err());
    }
}

#[test]
fn an_rsa_signature_of_another_scheme_is_refused() {
    let signer = key(Algorithm::Rs256);
    let pair = KeyPair::from_pkcs8(&signer.to_pkcs8().unwrap()).unwrap();
    for alg in ["RS256", "RS384"] {
        let header = format!(r#"{{"alg":"{alg}"}}"#);
        let input = format!("{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(PAYLOAD));
        for (n, scheme) in [
            &RSA_PKCS1_SHA384 as &'static dyn aws_lc_rs::signature::RsaEncoding,
            &RSA_PKCS1_SHA512,
            &RSA_PSS_SHA256,
        ]
        .into_iter()
        .enumerate()
        {
            let mut signature = vec![0; pair.public_modulus_len()];
            pair.sign(scheme, &SystemRandom::new(), input.as_bytes(), &mut signature).unwrap();
            let token = format!("{input}.{}", URL_SAFE_NO_PAD.encode(&signature));
            let expected =
                if alg == "RS256" { Verdict::BadSignature } else { Verdict::Malformed(Fault::Algorithm) };
            assert_eq!(verdict(&token, signer.public_key()), expected, "{alg}, scheme {n}");
        }
    }
}
