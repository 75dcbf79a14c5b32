//! The vectors of C2SP/wycheproof: every `invalid` one is refused, every `valid` one of our algorithms accepted.

use std::collections::BTreeMap;

use serde_json::Value;
use tollgate_core::jwk::{Fault, KeySet};
use tollgate_core::jws::Compact;
use tollgate_core::signature::Weakness;

const SIGNATURES: &str = include_str!("../vectors/json_web_signature_test.json");
const KEYS: &str = include_str!("../vectors/json_web_key_test.json");

/// Whether a set of keys accepts a signature by the one that its header names.
fn accepts(keys: &Value, token: &str) -> bool {
    let keys = match keys {
        Value::Object(members) if members.contains_key("keys") => keys.to_string(),
        one => format!(r#"{{"keys":[{one}]}}"#),
    };
    let (Ok(set), Ok(read)) = (KeySet::parse(&keys), Compact::parse(token)) else { return false };
    set.keys.iter().any(|jwk| jwk.kid == read.header.kid && read.is_signed_by(&jwk.key))
}

/// Runs a file, and counts what was accepted, refused, and refused although valid, by algorithm.
fn run(file: &str) -> BTreeMap<(&'static str, String), usize> {
    let file: Value = serde_json::from_str(file).unwrap();
    let mut counts = BTreeMap::new();
    for group in file["testGroups"].as_array().unwrap() {
        // A group without `public` has symmetric keys only.
        let keys = group.get("public").unwrap_or(&group["private"]);
        let alg = keys.pointer("/keys/0/alg").or(keys.get("alg")).and_then(Value::as_str).unwrap_or("");
        for test in group["tests"].as_array().unwrap() {
            let token = test["jws"].as_str().map_or_else(|| test["jws"].to_string(), str::to_owned);
            let outcome = match (test["result"].as_str().unwrap(), accepts(keys, &token)) {
                ("valid", true) => "accepted",
                ("valid", false) => "not ours",
                ("invalid", false) => "refused",
                (result, accepted) => panic!("{result}, accepted: {accepted}: {test}"),
            };
            let alg = if outcome == "refused" { "" } else { alg };
            *counts.entry((outcome, alg.to_owned())).or_default() += 1;
        }
    }
    counts
}

#[track_caller]
fn assert_counts(file: &str, expected: &[(&'static str, &str, usize)]) {
    let expected = expected.iter().map(|&(outcome, alg, count)| ((outcome, alg.to_owned()), count)).collect();
    assert_eq!(run(file), expected);
}

// None is `acceptable`, which `run` would panic at.
#[test]
fn every_signature_is_refused_or_accepted_as_it_should_be() {
    assert_counts(
        SIGNATURES,
        &[
            ("accepted", "ES256", 2),
            ("accepted", "RS256", 8),
            ("refused", "", 355),
            // A secret that signer and verifier share does not exist here.
            ("not ours", "HS256", 10),
            // Of RSA there is one scheme, that of most identity providers.
            ("not ours", "PS256", 8),
            ("not ours", "PS384", 4),
            ("not ours", "PS512", 4),
            ("not ours", "RS384", 4),
            ("not ours", "RS512", 4),
            // On P-521, with a name that is none.
            ("not ours", "ES521", 2),
        ],
    );
}

#[test]
fn every_key_is_refused_or_accepted_as_it_should_be() {
    assert_counts(
        KEYS,
        &[
            ("accepted", "RS256", 1),
            ("refused", "", 21),
            // A set with symmetric keys is not one to publish.
            ("not ours", "HS256", 2),
            ("not ours", "HS384", 1),
            ("not ours", "HS512", 1),
        ],
    );
}

#[test]
fn a_key_that_can_be_factored_is_recognised() {
    let file: Value = serde_json::from_str(KEYS).unwrap();
    let groups = file["testGroups"].as_array().unwrap();
    let roca = groups.iter().find(|group| group["comment"] == "jws_rsa_roca_key").unwrap();
    let set = KeySet::parse(&roca["public"].to_string()).unwrap();
    assert_eq!(set.keys, []);
    assert_eq!(
        set.ignored.iter().map(|(_, fault)| *fault).collect::<Vec<_>>(),
        [Fault::Weak(Weakness::Roca)]
    );
}
