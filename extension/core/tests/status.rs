//! Verification codes: their names, and the order of the checks for every combination of faults.

use std::cell::RefCell;
use std::collections::HashSet;

use tollgate_core::status::{Code, decide};

const NOW: i64 = 1_000_000;

#[test]
fn the_codes_have_the_documented_names_in_the_documented_order() {
    let names = [
        "VALID",
        "MALFORMED",
        "UNTRUSTED_ISSUER",
        "UNKNOWN_KEY",
        "BAD_SIGNATURE",
        "NOT_FOUND",
        "REVOKED",
        "DISABLED",
        "EXPIRED",
        "NOT_YET_VALID",
        "WRONG_AUDIENCE",
        "IP_NOT_ALLOWED",
        "INSUFFICIENT_SCOPE",
        "RATE_LIMITED",
        "QUOTA_EXCEEDED",
    ];
    assert_eq!(Code::ALL.map(Code::as_str), names);
    assert_eq!(Code::ALL.map(|code| code.to_string()), names);
    assert_eq!(format!("{:>12}|{:<9}|", Code::NotFound, Code::Valid), "   NOT_FOUND|VALID    |");
}

#[test]
fn each_code_has_a_place_of_its_own() {
    for (place, code) in Code::ALL.into_iter().enumerate() {
        assert_eq!(code.index(), place);
    }
    assert_eq!(Code::ALL.into_iter().collect::<HashSet<_>>().len(), Code::ALL.len());
}

#[test]
fn the_first_fault_in_order_decides_for_every_combination() {
    let ends = [
        (None, false),
        (Some(i64::MIN), true),
        (Some(0), true),
        (Some(NOW - 1), true),
        (Some(NOW), true),
        (Some(NOW + 1), false),
        (Some(i64::MAX), false),
    ];
    for faults in 0..16_u8 {
        for (expires_at, expired) in ends {
            let [revoked, disabled, ip_fault, scope_fault] = [0, 1, 2, 3].map(|bit| faults & (1 << bit) != 0);
            let found = [
                (revoked, Code::Revoked),
                (disabled, Code::Disabled),
                (expired, Code::Expired),
                (ip_fault, Code::IpNotAllowed),
                (scope_fault, Code::InsufficientScope),
                (true, Code::Valid),
            ];
            let (_, expected) = found.into_iter().find(|(fault, _)| *fault).unwrap();

            let asked = RefCell::new(Vec::new());
            let ask = |what, answer| {
                asked.borrow_mut().push(what);
                answer
            };
            let code = decide(
                revoked,
                disabled,
                expires_at,
                NOW,
                || ask("address", !ip_fault),
                || ask("scopes", !scope_fault),
            );
            assert_eq!(code, expected, "faults {faults:04b}, ends {expires_at:?}");

            let expected_questions: &[&str] = match expected {
                Code::Revoked | Code::Disabled | Code::Expired => &[],
                Code::IpNotAllowed => &["address"],
                _ => &["address", "scopes"],
            };
            assert_eq!(asked.into_inner(), expected_questions, "faults {faults:04b}, ends {expires_at:?}");
        }
    }
}

#[test]
fn a_token_ends_at_its_expiry_and_not_a_microsecond_earlier() {
    let at = |now| decide(false, false, Some(NOW), now, || true, || true);
    assert_eq!(at(NOW - 1), Code::Valid);
    assert_eq!(at(NOW), Code::Expired);
    assert_eq!(at(NOW + 1), Code::Expired);
}
