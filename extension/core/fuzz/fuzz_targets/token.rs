//! Compares the token parser with the reference parser: on raw bytes, which rarely have the right length, and on a
//! token made from them and then damaged, which reaches every later check. How to run it: `fuzz/Cargo.toml`.

#![no_main]

#[path = "../../tests/reference/token.rs"]
mod reference;

use libfuzzer_sys::fuzz_target;
use tollgate_core::refresh;
use tollgate_core::token::{self, ENTROPY_LEN, Prefix};

fn agree_with_the_reference(bytes: &[u8]) {
    let parsed = token::parse(bytes);
    let expected = reference::parse(bytes);
    assert_eq!(parsed.is_some(), expected.is_some());
    if let (Some(parsed), Some((prefix, body, _))) = (&parsed, expected) {
        assert_eq!(parsed.prefix, prefix);
        assert_eq!(parsed.body, body.as_bytes());
        assert_eq!(parsed.hint(), format!("{prefix}_{}", &body[..4]));
    }
    let _ = token::digest(bytes);
    // A refresh token is none of these, and has one spelling too.
    if let Some(refresh_token) = refresh::parse(bytes) {
        assert!(parsed.is_none() && bytes.starts_with(refresh::PREFIX.as_bytes()));
        assert!((1..i64::MAX).contains(&refresh_token.generation));
    }
}

fuzz_target!(|data: &[u8]| {
    agree_with_the_reference(data);

    // 40 bytes of entropy, the prefix up to a NUL, then a list of (position, byte) to overwrite.
    let Some((entropy, rest)) = data.split_first_chunk::<ENTROPY_LEN>() else { return };
    let mut fields = rest.splitn(2, |&b| b == 0);
    let prefix = String::from_utf8_lossy(fields.next().unwrap_or_default());
    let damage = fields.next().unwrap_or_default();
    let prefix = Prefix::parse(&prefix).unwrap_or_default();

    let issued = token::issue(&prefix, entropy);
    let parsed = token::parse(issued.token().as_bytes()).expect("an issued token is well formed");
    assert_eq!(parsed.prefix, prefix.as_str());
    assert_eq!(issued.hint(), parsed.hint());
    assert_eq!(issued.digest(), token::digest(issued.token().as_bytes()));

    let mut bytes = issued.token().as_bytes().to_vec();
    for change in damage.chunks_exact(2) {
        let position = usize::from(change[0]) % bytes.len();
        bytes[position] = change[1];
    }
    agree_with_the_reference(&bytes);
    if bytes != issued.token().as_bytes() {
        assert_ne!(token::digest(&bytes), issued.digest());
    }
});
