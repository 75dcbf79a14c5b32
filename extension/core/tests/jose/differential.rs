//! Compared with the crate jsonwebtoken: what is accepted here, it accepts; where it accepts more, the reason is listed.

use jsonwebtoken::jwk::Jwk;
use jsonwebtoken::{DecodingKey, Validation};
use serde_json::Value;
use tollgate_core::jws::Fault;

use crate::corpus::{self, Of, Stricter};
use crate::{ATTACKER, key};

const STRICTER: &[Stricter] = &[
    Stricter { of: Of::Fault(Fault::Size), why: "it has no limit of size" },
    Stricter { of: Of::Fault(Fault::Depth), why: "its limit is serde_json's, 128" },
    Stricter {
        of: Of::Fault(Fault::DuplicateName),
        why: "of two claims that it does not know it takes the last",
    },
    Stricter { of: Of::Fault(Fault::Nul), why: "it stores nothing in PostgreSQL" },
    Stricter {
        of: Of::Fault(Fault::Claim),
        why: "it leaves the types to the application, where it checks no claims",
    },
    Stricter { of: Of::Case("a kid of 257 bytes"), why: "it has no limit of size" },
    Stricter { of: Of::Case(r#"header {"alg":"ES256","kid":null}"#), why: "it takes null for absent" },
    Stricter { of: Of::Case(r#"header {"alg":"ES256","typ":null}"#), why: "it takes null for absent" },
    Stricter { of: Of::Case(r#"header with "crit":null"#), why: "it takes null for absent" },
    Stricter {
        of: Of::Case(r#"header with "crit":["b64"],"b64":true"#),
        why: "it knows RFC 7797, and true is the default",
    },
    Stricter { of: Of::Case(r#"header with "b64":true"#), why: "it knows RFC 7797, and true is the default" },
    Stricter { of: Of::Case(r#"header "{\"alg\":\"ES256\",\"a\":1e-99999}""#), why: "it rounds to 0" },
    Stricter { of: Of::Case(r#"payload "{\"alg\":\"ES256\",\"a\":1e-99999}""#), why: "it rounds to 0" },
];

fn jsonwebtoken_accepts(token: &str, jwk: &str) -> bool {
    let jwk: Jwk = serde_json::from_str(jwk).unwrap();
    let algorithm = jwk.common.key_algorithm.unwrap().to_string().parse().unwrap();
    let mut validation = Validation::new(algorithm);
    validation.required_spec_claims.clear();
    validation.validate_exp = false;
    validation.validate_aud = false;
    jsonwebtoken::decode::<Value>(token, &DecodingKey::from_jwk(&jwk).unwrap(), &validation).is_ok()
}

#[test]
fn what_is_accepted_here_is_accepted_by_jsonwebtoken_and_where_it_accepts_more_the_reason_is_listed() {
    let corpus = corpus::corpus(key, &ATTACKER);
    let accepts = |case: &corpus::Case| {
        jsonwebtoken_accepts(&case.token, &key(case.algorithm).public_key().to_jwk("one"))
    };
    assert_eq!(corpus::differences(&corpus, STRICTER, accepts), [""; 0]);
}
