//! The token format: published vectors, every way to damage a token, and the reference parser as the oracle.

#[path = "reference/token.rs"]
mod reference;

use proptest::prelude::*;
use tollgate_core::token::{self, DEFAULT_PREFIX, ENTROPY_LEN, Fault, MAX_PREFIX_LEN, Prefix, PrefixError};

/// Computed with Python's `zlib.crc32` and `hashlib.sha256`, entropy 00 01 02 … 27.
const KNOWN_TOKEN: &str =
    "tgt_000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f20212223242526271c6b8706";
const KNOWN_DIGEST: &str = "39e5dce1871f9ac1925424e1ee4f5741cf8cb9a1d704e00ff1adde85400caa02";
/// Likewise, entropy all zero.
const ZERO_TOKEN: &str =
    "my_app_000000000000000000000000000000000000000000000000000000000000000000000000000000007ef74675";
const ZERO_DIGEST: &str = "f8a55d0500923a738077277073c2ddef27685e4cca95d114f148032b838c1a66";

const TAIL_LEN: usize = 2 * ENTROPY_LEN + 8;

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn counting_entropy() -> [u8; ENTROPY_LEN] {
    std::array::from_fn(|i| u8::try_from(i).unwrap())
}

fn issue(prefix: &str, entropy: &[u8; ENTROPY_LEN]) -> String {
    token::issue(&Prefix::parse(prefix).unwrap(), entropy).token().to_owned()
}

/// A damaged token must be malformed. Only damage to the prefix, which the checksum does not cover, may parse, and then
/// to a digest under which nothing is stored.
fn assert_caught(original: &str, damaged: &[u8]) {
    assert_ne!(original.as_bytes(), damaged);
    let shown = damaged.escape_ascii();
    if let Some(parsed) = token::parse(damaged) {
        let tail = &original[original.len() - TAIL_LEN - 1..];
        assert!(damaged.ends_with(tail.as_bytes()), "damage after the prefix went unnoticed: {shown}");
        assert_ne!(parsed.prefix, &original[..original.len() - tail.len()], "{shown}");
    }
    assert_ne!(token::digest(original.as_bytes()), token::digest(damaged), "{shown}");
}

fn entropy() -> impl Strategy<Value = [u8; ENTROPY_LEN]> {
    prop::array::uniform(any::<u8>())
}

fn prefix() -> impl Strategy<Value = String> {
    "[a-z][a-z0-9_]{0,15}"
}

#[test]
fn crc_32_and_sha_256_agree_with_the_published_vectors() {
    assert_eq!(crc32fast::hash(b"123456789"), 0xcbf4_3926);
    assert_eq!(reference::crc32(b"123456789"), 0xcbf4_3926);
    assert_eq!(crc32fast::hash(b""), 0);
    // FIPS 180-4, examples of the NIST Cryptographic Standards and Guidelines.
    let published = [
        ("", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
        ("abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
        (
            "abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1",
        ),
    ];
    for (message, expected) in published {
        assert_eq!(hex(&token::digest(message.as_bytes())), expected, "{message:?}");
    }
    assert_eq!(
        hex(&token::digest(&[b'a'; 1_000_000])),
        "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"
    );
}

#[test]
fn known_entropy_makes_the_known_token_digest_and_hint() {
    let issued = token::issue(&Prefix::default(), &counting_entropy());
    assert_eq!(issued.token(), KNOWN_TOKEN);
    assert_eq!(hex(&issued.digest()), KNOWN_DIGEST);
    assert_eq!(hex(&token::digest(KNOWN_TOKEN.as_bytes())), KNOWN_DIGEST);
    assert_eq!(issued.hint(), "tgt_0001");

    let issued = token::issue(&Prefix::parse("my_app").unwrap(), &[0; ENTROPY_LEN]);
    assert_eq!(issued.token(), ZERO_TOKEN);
    assert_eq!(hex(&issued.digest()), ZERO_DIGEST);
    assert_eq!(issued.hint(), "my_app_0000");
}

#[test]
fn debug_output_of_an_issued_token_shows_nothing_of_it() {
    let issued = token::issue(&Prefix::default(), &counting_entropy());
    assert_eq!(format!("{issued:?}"), "Issued([redacted])");
    assert_eq!(format!("{issued:#?}"), "Issued([redacted])");
}

#[test]
fn every_byte_at_every_position_of_a_token_is_caught() {
    for original in [KNOWN_TOKEN, ZERO_TOKEN] {
        assert!(token::parse(original.as_bytes()).is_some());
        for position in 0..original.len() {
            for byte in 0..=u8::MAX {
                let mut damaged = original.as_bytes().to_vec();
                damaged[position] = byte;
                if byte != original.as_bytes()[position] {
                    assert_caught(original, &damaged);
                }
            }
        }
    }
}

#[test]
fn every_lost_doubled_or_added_character_behind_the_prefix_is_malformed() {
    for original in [KNOWN_TOKEN, ZERO_TOKEN] {
        for position in original.len() - TAIL_LEN..original.len() {
            let mut shorter = original.as_bytes().to_vec();
            shorter.remove(position);
            assert!(token::parse(&shorter).is_none(), "without {position}");
            for byte in 0..=u8::MAX {
                let mut longer = original.as_bytes().to_vec();
                longer.insert(position + 1, byte);
                assert!(token::parse(&longer).is_none(), "{byte} after {position}");
            }
        }
        assert!(token::parse(format!("{original}\n").as_bytes()).is_none());
        assert!(token::parse(format!(" {original}").as_bytes()).is_none());
        assert!(token::parse(format!("Bearer {original}").as_bytes()).is_none());
    }
}

#[test]
fn a_token_in_upper_case_is_malformed() {
    let (prefix, tail) = KNOWN_TOKEN.rsplit_once('_').unwrap();
    assert!(token::parse(format!("{prefix}_{}", tail.to_uppercase()).as_bytes()).is_none());
    assert!(token::parse(KNOWN_TOKEN.to_uppercase().as_bytes()).is_none());
    // With a checksum of the upper-case spelling, so that only the case is wrong.
    let body = tail[..80].to_uppercase();
    let checksum = reference::crc32(body.as_bytes());
    assert!(token::parse(format!("{prefix}_{body}{checksum:08x}").as_bytes()).is_none());
}

#[test]
fn a_prefix_with_underscores_is_read_from_the_right() {
    for prefix in ["a", "a_", "a__", "my_app", "a_b_c_d_e_f_g_h_", "x_0123456789abcd", "tgt_tgt"] {
        let text = issue(prefix, &counting_entropy());
        let parsed = token::parse(text.as_bytes()).unwrap();
        assert_eq!(parsed.prefix, prefix);
        assert_eq!(parsed.body, &KNOWN_TOKEN.as_bytes()[4..84]);
        assert_eq!(parsed.hint(), format!("{prefix}_0001"));
    }
}

#[test]
fn the_right_tail_without_a_proper_prefix_is_malformed() {
    let tail = &KNOWN_TOKEN[4..];
    for bad in ["", "_", "_a", "0a", "A", "tgT", "tg-t", "tgt ", "\u{e9}", "a\0", "abcdefghijklmnopq"] {
        assert!(token::parse(format!("{bad}_{tail}").as_bytes()).is_none(), "{bad:?}");
    }
    for no_separator in [tail.to_owned(), format!("_{tail}"), format!("tgt{tail}"), format!("tgt-{tail}")] {
        assert!(token::parse(no_separator.as_bytes()).is_none(), "{no_separator:?}");
    }
    assert!(token::parse(format!("{}_{tail}", "a".repeat(MAX_PREFIX_LEN)).as_bytes()).is_some());
}

#[test]
fn a_prefix_is_refused_with_a_reason_that_does_not_repeat_it() {
    let refused = [
        ("", PrefixError::Empty, "a token prefix must not be empty"),
        (
            KNOWN_TOKEN,
            PrefixError::TooLong { length: 92 },
            "a token prefix has at most 16 characters, this one has 92",
        ),
        ("Tgt", PrefixError::BadStart, "a token prefix must begin with a lower-case letter (a to z)"),
        ("_tgt", PrefixError::BadStart, "a token prefix must begin with a lower-case letter (a to z)"),
        ("1tgt", PrefixError::BadStart, "a token prefix must begin with a lower-case letter (a to z)"),
        ("\u{e9}", PrefixError::BadStart, "a token prefix must begin with a lower-case letter (a to z)"),
        (
            "tg-t",
            PrefixError::BadCharacter { position: 3 },
            "a token prefix may contain only a to z, 0 to 9 and \"_\"; character 3 is none of them",
        ),
        // 16 characters in more than 16 bytes.
        (
            "tgt\u{e9}\u{e9}\u{e9}\u{e9}\u{e9}\u{e9}\u{e9}\u{e9}\u{e9}\u{e9}\u{e9}\u{e9}\u{e9}",
            PrefixError::BadCharacter { position: 4 },
            "a token prefix may contain only a to z, 0 to 9 and \"_\"; character 4 is none of them",
        ),
        (
            "tgt\n",
            PrefixError::BadCharacter { position: 4 },
            "a token prefix may contain only a to z, 0 to 9 and \"_\"; character 4 is none of them",
        ),
    ];
    for (prefix, error, sentence) in refused {
        assert_eq!(Prefix::parse(prefix), Err(error), "{prefix:?}");
        assert_eq!(error.to_string(), sentence);
    }
    assert_eq!(Prefix::parse(DEFAULT_PREFIX), Ok(Prefix::default()));
}

/// Needs a counting allocator, which a dev-dependency installs.
#[test]
fn verification_allocates_nothing() {
    let allocations = allocation_counter::measure(|| {
        for token in [KNOWN_TOKEN, ZERO_TOKEN, "tgt_nonsense", ""] {
            let parsed = token::parse(std::hint::black_box(token.as_bytes()));
            std::hint::black_box(parsed.map(|p| p.prefix.len()));
            std::hint::black_box(token::digest(token.as_bytes()));
        }
    });
    assert_eq!(allocations.count_total, 0);
    let control = allocation_counter::measure(|| drop(std::hint::black_box(vec![0_u8; 64])));
    assert_eq!(control.count_total, 1, "the counter must be counting");
}

#[test]
fn a_text_with_a_token_in_it_is_recognised() {
    for text in [KNOWN_TOKEN, &format!("Bearer {KNOWN_TOKEN}."), &KNOWN_TOKEN.to_uppercase(), &"0".repeat(80)]
    {
        assert!(token::contains_secret(text), "{text}");
    }
    for text in ["", "deploy key", &"0".repeat(79), &format!("{}-{}", "0".repeat(79), "f".repeat(79))] {
        assert!(!token::contains_secret(text), "{text}");
    }
}

/// The example of RFC 7515, appendix A.3.
const SIGNED_TOKEN: &str = "eyJhbGciOiJFUzI1NiJ9.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ.DtEhU3ljbEg8L38VWAfUAqOyKAM6-Xx-F4GawxaepmXFCgfTjDxw5djxLa8ISlSApmWQxfKTUJqPP3-Kg6NU1Q";

#[test]
fn a_text_with_a_signed_token_in_it_is_recognised() {
    for text in
        [SIGNED_TOKEN, &format!("Bearer {SIGNED_TOKEN}."), &format!("it.was.x{SIGNED_TOKEN}, he said")]
    {
        assert!(token::contains_secret(text), "{text}");
    }
    let (body, signature) = SIGNED_TOKEN.rsplit_once('.').unwrap();
    for text in
        ["eyJ", "eyJ.eyJ.eyJ", body, signature, "a.b.c", "https://example.com/eyJhbGciOi.html", "..", "eyJ.."]
    {
        assert!(!token::contains_secret(text), "{text}");
    }
}

#[test]
fn nothing_of_a_signed_token_is_left_in_a_redacted_text() {
    assert_eq!(token::redact(&format!("see {SIGNED_TOKEN}, please")), "see …, please");
    assert_eq!(token::redact(&SIGNED_TOKEN[..60]), "…");
    assert_eq!(token::redact("eyJ is how they begin"), "eyJ is how they begin");
}

#[test]
fn no_sixteen_characters_of_a_token_are_left_in_a_redacted_text() {
    assert_eq!(token::redact(KNOWN_TOKEN), "tgt_…");
    assert_eq!(
        token::redact(&format!("Bearer {KNOWN_TOKEN}, \"{}\"", &KNOWN_TOKEN[..40])),
        "Bearer tgt_…, \"tgt_…\""
    );
    assert_eq!(token::redact("posts:read, 0123456789abcde, façade"), "posts:read, 0123456789abcde, façade");
    for start in 0..KNOWN_TOKEN.len() - 16 {
        let part = &KNOWN_TOKEN[start..];
        let shown = token::redact(part);
        assert!(!(0..=part.len() - 16).any(|at| shown.contains(&part[at..at + 16])), "from {start}: {shown}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn an_issued_token_parses_back_to_what_it_was_made_of(prefix in prefix(), entropy in entropy()) {
        let issued = token::issue(&Prefix::parse(&prefix).unwrap(), &entropy);
        let parsed = token::parse(issued.token().as_bytes()).expect("an issued token is well formed");
        prop_assert_eq!(parsed.prefix, &prefix);
        prop_assert_eq!(parsed.body.escape_ascii().to_string(), hex(&entropy));
        prop_assert_eq!(parsed.hint(), issued.hint());
        prop_assert_eq!(issued.digest(), token::digest(issued.token().as_bytes()));
        prop_assert_eq!(
            reference::parse(issued.token().as_bytes()).map(|(prefix, body, _)| (prefix, body)),
            Some((prefix, hex(&entropy)))
        );
    }

    #[test]
    fn arbitrary_bytes_parse_as_the_reference_says(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let parsed = token::parse(&bytes).map(|p| p.prefix.to_owned());
        prop_assert_eq!(parsed, reference::parse(&bytes).map(|(prefix, ..)| prefix));
        prop_assert_eq!(token::digest(&bytes).len(), token::DIGEST_LEN);
    }

    /// Close enough to a token that every rule of the format decides some of the cases, with a correct checksum.
    #[test]
    fn almost_tokens_parse_as_the_reference_says(
        prefix in "[a-zA-Z0-9_-]{0,4}|[a-z][a-z0-9_]{13,17}",
        separator in "_|-|__|",
        body in "[0-9a-f]{80}|[0-9a-f]{79}|[0-9a-f]{81}|[0-9a-f]{40}[0-9a-gA-F_]{40}",
        checksum_fits in prop::bool::weighted(0.9),
    ) {
        let checksum = reference::crc32(body.as_bytes()) ^ u32::from(!checksum_fits);
        let text = format!("{prefix}{separator}{body}{checksum:08x}");
        let parsed = token::parse(text.as_bytes()).map(|p| (p.prefix.to_owned(), p.body.to_vec()));
        let expected = reference::parse(text.as_bytes()).map(|(prefix, body, _)| (prefix, body.into_bytes()));
        prop_assert_eq!(parsed, expected);
    }

    #[test]
    fn a_prefix_is_accepted_just_when_a_token_with_it_parses(prefix in "[a-z][a-z0-9_]{0,17}|\\PC{0,18}") {
        let text = format!("{prefix}_{}", &KNOWN_TOKEN[4..]);
        prop_assert_eq!(Prefix::parse(&prefix).is_ok(), token::parse(text.as_bytes()).is_some());
    }
}

// Fewer cases: each of them damages every position of a token.
proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn every_single_character_change_is_caught(
        prefix in prefix(), entropy in entropy(), substitutes in prop::array::uniform8(any::<u8>())
    ) {
        let original = issue(&prefix, &entropy);
        for position in 0..original.len() {
            for substitute in substitutes.into_iter().chain(*b"0f_gA") {
                let mut damaged = original.clone().into_bytes();
                if std::mem::replace(&mut damaged[position], substitute) != substitute {
                    assert_caught(&original, &damaged);
                }
            }
        }
    }

    #[test]
    fn two_neighbouring_characters_swapped_are_caught(prefix in prefix(), entropy in entropy()) {
        let original = issue(&prefix, &entropy);
        // The pair across body and checksum is left out: a CRC guarantees nothing about it.
        let body_start = prefix.len() + 1;
        let last_of_body = body_start + 2 * ENTROPY_LEN - 1;
        for position in (0..original.len() - 1).filter(|&p| p != last_of_body) {
            let mut damaged = original.clone().into_bytes();
            damaged.swap(position, position + 1);
            if damaged != original.as_bytes() {
                assert_caught(&original, &damaged);
            }
        }
    }
}

#[test]
fn each_fault_has_a_name_of_its_own_and_a_case() {
    let body = &KNOWN_TOKEN[4..];
    let cases: [(String, Fault); 8] = [
        (String::new(), Fault::Empty),
        (format!("Bearer {KNOWN_TOKEN}"), Fault::Scheme),
        (format!("{KNOWN_TOKEN}\r\n"), Fault::Whitespace),
        (format!("“{KNOWN_TOKEN}”"), Fault::Quotes),
        (body.to_owned(), Fault::Prefix),
        (KNOWN_TOKEN[..40].to_owned(), Fault::Length),
        (format!("TGT_{body}"), Fault::Characters),
        (KNOWN_TOKEN.replacen('0', "1", 1), Fault::Checksum),
    ];
    for (presented, fault) in &cases {
        assert!(token::parse(presented.as_bytes()).is_none(), "{presented}");
        assert_eq!(token::fault(presented.as_bytes()), *fault, "{presented}");
    }
    let names: std::collections::HashSet<&str> = Fault::ALL.iter().map(|fault| fault.as_str()).collect();
    assert_eq!(names.len(), Fault::ALL.len());
    // A word that only begins like a scheme is not one.
    assert_eq!(token::fault(b"bearer"), Fault::Prefix);
}

proptest! {
    #[test]
    fn whatever_is_presented_has_a_fault(presented in proptest::collection::vec(any::<u8>(), 0..200)) {
        let fault = token::fault(&presented);
        prop_assert_eq!(fault == Fault::Empty, presented.is_empty());
        prop_assert_ne!(fault, Fault::Missing);
    }
}
