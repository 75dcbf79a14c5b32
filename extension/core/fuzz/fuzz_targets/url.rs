//! Nothing that is read as a signed URL makes the parser panic; its canonical form is that of the reference, and is accepted
//! again as it is; and what is signed verifies, until one of its characters is another that is not read as the same. How to
//! run it: `fuzz/Cargo.toml`.

#![no_main]

#[path = "../../tests/reference/url.rs"]
mod reference;

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use tollgate_core::url::{self, Code, Key, Options, Request, SignedUrl};

static KEY: LazyLock<Key> = LazyLock::new(|| Key::new(&[7; 32]));

/// The canonical form of what is accepted.
fn read(url: &str) -> Option<String> {
    let parsed = SignedUrl::parse(url).ok()?;
    assert_eq!(Some(parsed.canonical()), reference::canonical(url).as_deref());
    for now in [i64::MIN, 0, i64::MAX] {
        let _ = parsed.decide(&Request { method: "GET", client: None, now });
    }
    Some(parsed.canonical().to_owned())
}

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    read(text);

    // A URL, a prefix, a subject and headers, one a line, then a place and the character to put there.
    let mut lines = text.split('\n');
    let mut next = || lines.next().filter(|line| !line.is_empty());
    let Some(given) = next() else { return };
    let options = Options {
        expires_at: 1_800_000_000,
        methods: &["GET"],
        path_prefix: next(),
        subject: next(),
        response_headers: next(),
        ..Options::default()
    };
    let Ok(signed) = url::sign(&KEY, given, &options) else { return };
    let canonical = read(&signed).expect("what is signed is well formed");
    let parsed = SignedUrl::parse(&signed).expect("the same");
    assert!(parsed.is_signed_by(&KEY));
    let request = Request { method: "GET", client: None, now: 0 };
    assert_eq!(parsed.decide(&request), Code::Valid);

    let [.., place, other] = data else { return };
    let mut changed = signed.clone().into_bytes();
    let place = usize::from(*place) * changed.len() / 256;
    changed[place] = other & 0x7f;
    let changed = String::from_utf8(changed).expect("ASCII");
    if let Ok(parsed) = SignedUrl::parse(&changed)
        && parsed.is_signed_by(&KEY)
    {
        assert_eq!(parsed.canonical(), canonical);
    }
});
