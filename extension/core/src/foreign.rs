//! Tokens of other systems: how those systems store them, and the key under which an imported token is found.
//!
//! A format is supported if its digest can be computed from the presented token alone, or with one of the few secret keys
//! of HMAC that are stored for this; with a salt for each token, every imported token would have to be tried. The other
//! system's digest is never stored: the key is a digest of it and of the format's name, so that formats cannot collide.

use core::fmt;

use aws_lc_rs::hmac;
use sha2::{Digest as _, Sha256, Sha512};

use crate::token::Digest;

/// What the name of the format of tokens with HMAC begins with; the name of the secret key follows.
const HMAC: &str = "hmac-sha256:";
/// Of the name of a secret key.
const MAX_NAME_LEN: usize = 63;
/// Of a secret key, in bytes.
pub const MAX_IMPORT_KEY_LEN: usize = 1024;

/// How another system stores its tokens.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// SHA-256 of the whole token, as Tollgate stores its own. better-auth, Unkey, and most self-written systems.
    Sha256,
    /// SHA-512 of the whole token: django-rest-knox 5, djangorestframework-api-key 3.
    Sha512,
    /// SHA-512 of the bytes that the token encodes in hexadecimal: django-rest-knox 4.2.
    Sha512OfHex,
    /// SHA-256 of what follows the number and the bar in `id|secret`: Laravel Sanctum.
    Sanctum,
    /// HMAC-SHA-256 of the whole token, with the secret key of that name: Devise's `TokenGenerator`, and systems that call
    /// the key a pepper.
    HmacSha256(String),
}

impl Format {
    /// Those without a secret key.
    pub const UNKEYED: [Format; 4] = [Format::Sha256, Format::Sha512, Format::Sha512OfHex, Format::Sanctum];
    /// The formats without a secret key whose tokens are not found under [`crate::token::digest`] of the whole token.
    const FOREIGN: [Format; 3] = [Format::Sha512, Format::Sha512OfHex, Format::Sanctum];

    /// The name, in two parts.
    fn name(&self) -> [&str; 2] {
        match self {
            Format::Sha256 => ["sha256", ""],
            Format::Sha512 => ["sha512", ""],
            Format::Sha512OfHex => ["sha512-of-hex", ""],
            Format::Sanctum => ["sanctum", ""],
            Format::HmacSha256(key) => [HMAC, key],
        }
    }

    pub fn parse(name: &str) -> Option<Format> {
        match name.strip_prefix(HMAC) {
            Some(key) => is_import_key_name(key).then(|| Format::HmacSha256(key.to_owned())),
            None => Format::UNKEYED.into_iter().find(|format| format.name()[0] == name),
        }
    }

    /// The name of its secret key, if it has one.
    pub fn import_key(&self) -> Option<&str> {
        match self {
            Format::HmacSha256(key) => Some(key),
            _ => None,
        }
    }

    /// Length in bytes of the digest that the other system stores.
    pub const fn digest_len(&self) -> usize {
        match self {
            Format::Sha256 | Format::Sanctum | Format::HmacSha256(_) => 32,
            Format::Sha512 | Format::Sha512OfHex => 64,
        }
    }

    /// The key of a token in this format with this digest.
    pub fn key(&self, digest: &[u8]) -> Digest {
        let [name, import_key] = self.name();
        let hash = Sha256::new().chain_update(name).chain_update(import_key);
        hash.chain_update([0]).chain_update(digest).finalize().into()
    }

    /// The key of a presented token; `None` if it cannot have this format.
    fn key_of(&self, presented: &[u8]) -> Option<Digest> {
        match self {
            Format::Sha256 => Some(self.key(&Sha256::digest(presented))),
            Format::Sha512 => Some(self.key(&Sha512::digest(presented))),
            Format::HmacSha256(_) => None,
            Format::Sha512OfHex => {
                if presented.is_empty() || !presented.len().is_multiple_of(2) {
                    return None;
                }
                let mut hash = Sha512::new();
                for pair in presented.chunks_exact(2) {
                    hash.update([hex(pair[0])? << 4 | hex(pair[1])?]);
                }
                Some(self.key(&hash.finalize()))
            }
            Format::Sanctum => {
                let bar = presented.iter().position(|&b| b == b'|')?;
                let (id, secret) = (&presented[..bar], &presented[bar + 1..]);
                let is_id = (1..=20).contains(&id.len()) && id.iter().all(u8::is_ascii_digit);
                (is_id && !secret.is_empty()).then(|| self.key(&Sha256::digest(secret)))
            }
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.name().concat())
    }
}

/// Whether a secret key may have this name: a-z, 0-9, `_`, `.` and `-`, and the first is a letter or a digit.
fn is_import_key_name(name: &str) -> bool {
    let is_first = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    name.len() <= MAX_NAME_LEN
        && name.bytes().next().is_some_and(is_first)
        && name.bytes().all(|byte| is_first(byte) || b"_.-".contains(&byte))
}

/// The secret key of HMAC with which another system made its digests.
pub struct ImportKey {
    format: Format,
    key: hmac::Key,
}

impl ImportKey {
    /// `None` if no key has that name, or that length.
    pub fn new(name: &str, bytes: &[u8]) -> Option<ImportKey> {
        if !is_import_key_name(name) || !(1..=MAX_IMPORT_KEY_LEN).contains(&bytes.len()) {
            return None;
        }
        let key = hmac::Key::new(hmac::HMAC_SHA256, bytes);
        Some(ImportKey { format: Format::HmacSha256(name.to_owned()), key })
    }

    /// The key under which a presented token may be found.
    pub fn key_of(&self, presented: &[u8]) -> Digest {
        self.format.key(hmac::sign(&self.key, presented).as_ref())
    }
}

/// The keys under which a presented token may be found, at most one per format without a secret key, so that a guess costs a fixed number of
/// digests. The formats that are tried depend only on the token's shape.
pub fn keys(presented: &[u8]) -> impl Iterator<Item = Digest> {
    Format::FOREIGN.into_iter().filter_map(move |format| format.key_of(presented))
}

fn hex(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).map(|value| value as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(presented: &str, format: &Format, digest: &[u8]) -> bool {
        keys(presented.as_bytes()).any(|key| key == format.key(digest))
    }

    #[test]
    fn each_form_is_found_by_what_its_system_hands_out_and_by_nothing_else() {
        let secret = "ZmFrZS1zYW5jdHVtLXNlY3JldA8d2f1c3a";
        let digest = Sha256::digest(secret);
        for good in [format!("1|{secret}"), format!("12345678901234567890|{secret}")] {
            assert!(found(&good, &Format::Sanctum, &digest), "{good}");
        }
        for bad in [secret.to_owned(), format!("|{secret}"), format!("x|{secret}"), format!("1|{secret} ")] {
            assert!(!found(&bad, &Format::Sanctum, &digest), "{bad}");
        }
        assert!(found("é", &Format::Sha512, &Sha512::digest("é")));
        assert!(found("00ffAb", &Format::Sha512OfHex, &Sha512::digest([0, 0xff, 0xab])));
        for bad in ["00ffA", "00ffAg", ""] {
            assert!(!found(bad, &Format::Sha512OfHex, &Sha512::digest([0, 0xff, 0xab])), "{bad}");
        }
    }

    #[test]
    fn a_digest_is_no_token_and_no_form_finds_that_of_another() {
        let digest = Sha512::digest("secret");
        let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        for presented in ["secret", "1|secret", &hex, &format!("1|{hex}"), &format!("sha512\0{hex}")] {
            for format in [Format::Sha512OfHex, Format::Sanctum] {
                assert!(!found(presented, &format, &digest), "{presented}");
            }
        }
        assert!(!found(&hex, &Format::Sha512, &digest));
    }

    #[test]
    fn a_guess_costs_a_fixed_number_of_digests() {
        for presented in ["", "1|2|3|4", &"ab".repeat(4096), "0|ab"] {
            assert!(keys(presented.as_bytes()).count() <= Format::FOREIGN.len());
        }
        for format in Format::UNKEYED {
            assert_eq!(Format::parse(&format.to_string()), Some(format));
        }
    }

    #[test]
    fn a_digest_with_a_secret_key_is_found_with_that_key_alone() {
        // RFC 4231, test case 2.
        let digest = [
            0x5b, 0xdc, 0xc1, 0x46, 0xbf, 0x60, 0x75, 0x4e, 0x6a, 0x04, 0x24, 0x26, 0x08, 0x95, 0x75, 0xc7,
            0x5a, 0x00, 0x3f, 0x08, 0x9d, 0x27, 0x39, 0x83, 0x9d, 0xec, 0x58, 0xb9, 0x64, 0xec, 0x38, 0x43,
        ];
        let presented = b"what do ya want for nothing?";
        let format = Format::parse("hmac-sha256:app").unwrap();
        assert_eq!((format.to_string().as_str(), format.import_key()), ("hmac-sha256:app", Some("app")));
        let key = ImportKey::new("app", b"Jefe").unwrap().key_of(presented);
        assert_eq!(key, format.key(&digest));
        for (name, secret) in [("app", &b"jefe"[..]), ("app", b"Jefe "), ("other", b"Jefe")] {
            assert_ne!(ImportKey::new(name, secret).unwrap().key_of(presented), key);
        }
        assert!(!found("what do ya want for nothing?", &format, &digest));
        assert_ne!(format.key(&digest), Format::Sha256.key(&digest));
    }

    #[test]
    fn a_secret_key_has_a_name_and_a_length() {
        for bad in ["", "A", "-a", "a b", "a:b", "\u{e9}", &"a".repeat(64)] {
            assert_eq!(Format::parse(&format!("hmac-sha256:{bad}")), None, "{bad}");
            assert!(ImportKey::new(bad, b"secret").is_none(), "{bad}");
        }
        for good in ["a", "0", "a_b.c-d", &"a".repeat(63)] {
            assert!(Format::parse(&format!("hmac-sha256:{good}")).is_some(), "{good}");
        }
        assert_eq!(Format::parse("hmac-sha256"), None);
        assert!(ImportKey::new("a", &[]).is_none());
        assert!(ImportKey::new("a", &[0; MAX_IMPORT_KEY_LEN]).is_some());
        assert!(ImportKey::new("a", &[0; MAX_IMPORT_KEY_LEN + 1]).is_none());
    }
}
