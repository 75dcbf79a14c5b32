//! Compares the scope grammar with the reference implementation, on the two sides of the input's first newline and on
//! related pairs derived from them. How to run it: `fuzz/Cargo.toml`.

#![no_main]

#[path = "../../tests/reference/scope.rs"]
mod reference;

use libfuzzer_sys::fuzz_target;
use tollgate_core::scope;

fn agree_with_the_reference(granted: &[u8], required: &[u8]) {
    assert_eq!(scope::is_scope(granted), reference::is_scope(granted));
    assert_eq!(scope::is_grantable(granted), reference::is_grantable(granted));
    assert_eq!(scope::wildcard_prefix(granted).is_some(), reference::is_wildcard(granted));
    let expected = reference::grants(granted, required);
    assert_eq!(scope::grants(granted, required), expected);
    assert_eq!(scope::any_grants([granted].into_iter(), required), expected);
}

fuzz_target!(|data: &[u8]| {
    let mut sides = data.splitn(2, |&b| b == b'\n');
    let a = sides.next().unwrap_or_default();
    let b = sides.next().unwrap_or_default();
    agree_with_the_reference(a, b);
    agree_with_the_reference(b, a);
    agree_with_the_reference(a, a);
    agree_with_the_reference(scope::ADMIN.as_bytes(), a);
    agree_with_the_reference(&[a, b":*"].concat(), &[a, b":", b].concat());
    agree_with_the_reference(&[a, b":*"].concat(), &[a, b].concat());
});
