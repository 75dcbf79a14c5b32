//! The scope grammar: a table of cases, and the reference implementation as the oracle.

#[path = "reference/scope.rs"]
mod reference;

use proptest::prelude::*;
use tollgate_core::scope::{
    ADMIN, MAX_SCOPE_LEN, any_grants, grants, is_grantable, is_scope, wildcard_prefix,
};

const CONCRETE: &[&str] = &[
    "a",
    "0",
    "admin",
    "posts",
    "posts:read",
    "posts:comments:read",
    "admin:read",
    "a.b-c_d",
    "0.1-2_3",
    "a-",
    "a.",
    "a_",
    "a--b",
    "a:b:c:d:e:f:g:h:i:j",
    "2fa:verify",
];

const WILDCARDS: &[&str] = &["a:*", "posts:*", "posts:comments:*", "admin:*", "0:*", "a.b-c_d:*"];

const MALFORMED: &[&str] = &[
    "",
    "*",
    "**",
    ":",
    "::",
    ":*",
    "*:",
    "*:*",
    "*:read",
    "a:",
    ":a",
    "a::b",
    "a::*",
    "a:*:b",
    "a:*:*",
    "a:**",
    "a:b*",
    "a*",
    "a*b",
    "A",
    "Posts:read",
    "posts:Read",
    "_a",
    "-a",
    ".a",
    "a:_b",
    "a:-b",
    "a:.b",
    " a",
    "a ",
    "a b",
    "a\t",
    "a\n",
    "a\0",
    "a:b\0",
    "a/b",
    "a,b",
    "a;b",
    "\u{e9}",
    "a\u{e9}",
    "\u{430}dmin",
];

/// granted, required, whether it is granted.
const CASES: &[(&str, &str, bool)] = &[
    ("users:read", "users:read", true),
    ("users:read", "users:write", false),
    ("users:read", "users:reader", false),
    ("users:reader", "users:read", false),
    ("users:*", "users:read", true),
    ("posts:*", "posts:comments:read", true),
    ("posts:*", "posts:comments", true),
    ("posts", "posts:read", false),
    ("posts:read", "posts", false),
    ("posts:*", "posts", false),
    ("posts:*", "posts:", false),
    ("posts:*", "postsx:read", false),
    ("posts:*", "post:read", false),
    ("posts:*", "users:posts:read", false),
    ("posts:*", "admin", false),
    ("posts:comments:*", "posts:comments:read", true),
    ("posts:comments:*", "posts:comments", false),
    ("posts:comments:*", "posts:read", false),
    ("posts:comments:*", "posts:commentsx:read", false),
    // A required scope may be a wildcard: it is granted by a scope that grants all of it.
    ("posts:*", "posts:*", true),
    ("posts:*", "posts:comments:*", true),
    ("posts:comments:*", "posts:*", false),
    ("posts:read", "posts:*", false),
    ("posts", "posts:*", false),
    ("users:*", "posts:*", false),
    ("admin", "admin", true),
    ("admin", "posts", true),
    ("admin", "posts:comments:read", true),
    ("admin", "posts:*", true),
    ("admin", "admin:*", true),
    ("admin", "admin:read", true),
    // Scopes of Tollgate's own are granted by name.
    ("admin", "tollgate:tokens", false),
    ("admin", "tollgate:*", false),
    ("admin", "tollgate", true),
    ("admin", "tollgated:tokens", true),
    ("tollgate:*", "tollgate:tokens", true),
    ("tollgate:tokens", "tollgate:tokens", true),
    ("admin:*", "admin:read", true),
    ("admin:*", "admin", false),
    ("admin:*", "posts:read", false),
    ("admin:read", "admin", false),
    ("posts:admin", "posts:read", false),
    ("administrator", "posts", false),
    ("admi", "posts", false),
    // Granted scopes in a form that no token can have.
    ("*", "posts:read", false),
    ("*", "*", false),
    (":*", ":read", false),
    ("*:*", "posts:read", false),
    ("*:read", "posts:read", false),
    ("posts*", "posts:read", false),
    ("posts:re*", "posts:read", false),
    ("posts::*", "posts::read", false),
    ("posts:*:read", "posts:comments:read", false),
    ("ADMIN", "posts:read", false),
    ("Admin", "Admin", false),
    ("", "", false),
    ("", "posts", false),
    ("posts", "", false),
    ("a:", "a:", false),
    ("a::b", "a::b", false),
    ("A", "A", false),
    ("posts:*", "posts:*:read", false),
    ("posts:*", "posts:**", false),
    ("posts:*", "posts::read", false),
    ("posts:*", "posts:Read", false),
    ("posts:*", "posts:read\0", false),
    ("posts:*", "posts:read ", false),
    ("admin", "", false),
    ("admin", "*", false),
    ("admin", "Posts", false),
    ("admin", "posts:", false),
    ("admin\0", "posts", false),
    ("admin ", "posts", false),
];

fn any_of(granted: &[&str], required: &str) -> bool {
    any_grants(granted.iter().map(|s| s.as_bytes()), required.as_bytes())
}

#[test]
fn each_form_is_distinguished_from_the_others() {
    for s in CONCRETE.iter().map(|s| s.as_bytes()) {
        let shown = s.escape_ascii();
        assert!(is_scope(s) && is_grantable(s) && wildcard_prefix(s).is_none(), "{shown}");
    }
    for s in WILDCARDS.iter().map(|s| s.as_bytes()) {
        let shown = s.escape_ascii();
        assert!(!is_scope(s) && is_grantable(s), "{shown}");
        assert_eq!(wildcard_prefix(s), Some(&s[..s.len() - 1]), "{shown}");
    }
    for s in MALFORMED.iter().map(|s| s.as_bytes()) {
        let shown = s.escape_ascii();
        assert!(!is_scope(s) && !is_grantable(s) && wildcard_prefix(s).is_none(), "{shown}");
    }
    assert_eq!(wildcard_prefix(b"posts:*"), Some(&b"posts:"[..]));
}

#[test]
fn the_table_of_cases_holds() {
    for &(granted, required, expected) in CASES {
        assert_eq!(grants(granted.as_bytes(), required.as_bytes()), expected, "{granted:?} of {required:?}");
        assert_eq!(any_of(&[granted], required), expected, "{granted:?} of {required:?}, as a list");
        assert_eq!(
            reference::grants(granted.as_bytes(), required.as_bytes()),
            expected,
            "{granted:?} of {required:?}, by the reference"
        );
    }
}

#[test]
fn admin_grants_every_well_formed_scope_and_nothing_malformed() {
    for s in CONCRETE.iter().chain(WILDCARDS) {
        assert!(grants(ADMIN.as_bytes(), s.as_bytes()), "{s:?}");
    }
    for s in MALFORMED {
        assert!(!grants(ADMIN.as_bytes(), s.as_bytes()), "{s:?}");
    }
}

#[test]
fn malformed_scopes_neither_grant_nor_are_granted() {
    for bad in MALFORMED {
        for other in CONCRETE.iter().chain(WILDCARDS).chain(MALFORMED) {
            assert!(!grants(bad.as_bytes(), other.as_bytes()), "{bad:?} granted {other:?}");
            assert!(!grants(other.as_bytes(), bad.as_bytes()), "{other:?} granted {bad:?}");
        }
    }
}

#[test]
fn every_single_byte_is_judged_as_the_grammar_says() {
    for b in 0..=u8::MAX {
        let alone = [b];
        let starts = b.is_ascii_lowercase() || b.is_ascii_digit();
        assert_eq!(is_scope(&alone), starts, "{b}");
        assert_eq!(is_scope(&[b, b'a']), starts, "{b}");
        assert_eq!(is_scope(&[b'a', b]), starts || b"_.-".contains(&b), "{b}");
        assert_eq!(is_scope(&[b'a', b, b'a']), starts || b"_.-:".contains(&b), "{b}");
        assert_eq!(is_grantable(&[b'a', b':', b]), starts || b == b'*', "{b}");
    }
}

#[test]
fn the_length_limit_is_128_and_counts_the_wildcard() {
    let longest = "a".repeat(MAX_SCOPE_LEN);
    assert_eq!(longest.len(), 128);
    assert!(is_scope(longest.as_bytes()) && grants(longest.as_bytes(), longest.as_bytes()));
    let too_long = "a".repeat(MAX_SCOPE_LEN + 1);
    assert!(!is_scope(too_long.as_bytes()) && !is_grantable(too_long.as_bytes()));
    assert!(!grants(too_long.as_bytes(), too_long.as_bytes()));
    assert!(!grants(ADMIN.as_bytes(), too_long.as_bytes()));

    let longest_wildcard = format!("{}:*", "a".repeat(MAX_SCOPE_LEN - 2));
    let under_it = format!("{}:r", "a".repeat(MAX_SCOPE_LEN - 2));
    assert!(is_grantable(longest_wildcard.as_bytes()));
    assert!(grants(longest_wildcard.as_bytes(), under_it.as_bytes()));
    let too_long_wildcard = format!("{}:*", "a".repeat(MAX_SCOPE_LEN - 1));
    assert!(!is_grantable(too_long_wildcard.as_bytes()));
    assert_eq!(wildcard_prefix(too_long_wildcard.as_bytes()), None);
    assert!(!grants(b"a:*", format!("a:{too_long}").as_bytes()));
}

#[test]
fn a_list_grants_what_one_of_its_scopes_grants() {
    assert!(any_of(&["users:read", "posts:*"], "posts:read"));
    assert!(any_of(&["posts:*", "users:read"], "posts:read"));
    assert!(any_of(&["users:read", "admin"], "posts:read"));
    assert!(!any_of(&["users:read", "posts:write"], "posts:read"));
    assert!(!any_of(&["users", "posts"], "posts:read"));
    assert!(!any_of(&[], "posts:read"));
    assert!(!any_of(&["", "*", "admin:*"], "posts:read"));
    assert!(!any_of(&["admin"], "*"));
}

#[test]
fn comparing_scopes_allocates_nothing() {
    let allocations = allocation_counter::measure(|| {
        for (granted, required, _) in CASES {
            std::hint::black_box(grants(granted.as_bytes(), required.as_bytes()));
            std::hint::black_box(any_grants([granted.as_bytes()].into_iter(), required.as_bytes()));
        }
    });
    assert_eq!(allocations.count_total, 0);
}

/// From few enough characters that two of these are often related.
fn near_scope() -> impl Strategy<Value = String> {
    prop_oneof![
        4 => "[ab](:[ab]){0,3}(:\\*)?",
        3 => "[abA*:._-]{0,7}",
        1 => "admin|admin:\\*|admin:[ab]|\\*|",
        1 => "[ab]{1,2}(:[ab][ab._-]{0,2}){0,3}:?\\*?",
    ]
}

/// Lengths just below and just above the limit.
fn long_scope() -> impl Strategy<Value = String> {
    (120_usize..136, "|:\\*|:a|\\*|:").prop_map(|(len, end)| format!("{}{end}", "a".repeat(len)))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(5_000))]

    #[test]
    fn arbitrary_bytes_are_judged_as_the_reference_says(
        a in prop::collection::vec(any::<u8>(), 0..150), b in prop::collection::vec(any::<u8>(), 0..150)
    ) {
        prop_assert_eq!(is_scope(&a), reference::is_scope(&a));
        prop_assert_eq!(is_grantable(&a), reference::is_grantable(&a));
        prop_assert_eq!(grants(&a, &b), reference::grants(&a, &b));
        prop_assert_eq!(grants(&a, &a), reference::grants(&a, &a));
    }

    #[test]
    fn scopes_are_judged_as_the_reference_says(s in prop_oneof![near_scope(), long_scope()]) {
        let s = s.as_bytes();
        prop_assert_eq!(is_scope(s), reference::is_scope(s));
        prop_assert_eq!(is_grantable(s), reference::is_grantable(s));
        prop_assert_eq!(wildcard_prefix(s).is_some(), reference::is_wildcard(s));
    }

    #[test]
    fn pairs_of_scopes_grant_as_the_reference_says(granted in near_scope(), required in near_scope()) {
        prop_assert_eq!(
            grants(granted.as_bytes(), required.as_bytes()),
            reference::grants(granted.as_bytes(), required.as_bytes())
        );
    }

    #[test]
    fn a_wildcard_grants_what_begins_with_its_prefix_as_the_reference_says(
        base in prop_oneof![near_scope(), long_scope()], rest in near_scope()
    ) {
        let granted = format!("{base}:*");
        let required = format!("{base}:{rest}");
        prop_assert_eq!(
            grants(granted.as_bytes(), required.as_bytes()),
            reference::grants(granted.as_bytes(), required.as_bytes())
        );
    }

    #[test]
    fn granting_is_transitive(a in near_scope(), b in near_scope(), c in near_scope()) {
        let granted = |x: &str, y: &str| grants(x.as_bytes(), y.as_bytes());
        prop_assert!(!(granted(&a, &b) && granted(&b, &c)) || granted(&a, &c), "{a:?} {b:?} {c:?}");
    }

    #[test]
    fn a_list_grants_just_when_one_of_it_does(
        list in prop::collection::vec(near_scope(), 0..5), required in near_scope()
    ) {
        let one_does = list.iter().any(|g| grants(g.as_bytes(), required.as_bytes()));
        prop_assert_eq!(any_grants(list.iter().map(String::as_bytes), required.as_bytes()), one_does);
    }
}
