//! Tokens of other systems: how those systems store them, and the key under which an imported token is found.
//!
//! A format is supported if its digest can be computed from the presented token, without a salt or a key; otherwise
//! every imported token would have to be tried. The other system's digest is never stored: the key is a digest of it
//! and of the format's name, so that formats cannot collide.

use sha2::{Digest as _, Sha256, Sha512};

use crate::token::Digest;

/// How another system stores its tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// SHA-256 of the whole token, as Tollgate stores its own. better-auth, Unkey, and most self-written systems.
    Sha256,
    /// SHA-512 of the whole token: django-rest-knox 5, djangorestframework-api-key 3.
    Sha512,
    /// SHA-512 of the bytes that the token encodes in hexadecimal: django-rest-knox 4.2.
    Sha512OfHex,
    /// SHA-256 of what follows the number and the bar in `id|secret`: Laravel Sanctum.
    Sanctum,
}

impl Format {
    pub const ALL: [Format; 4] = [Format::Sha256, Format::Sha512, Format::Sha512OfHex, Format::Sanctum];
    /// The formats whose tokens are not found under [`crate::token::digest`] of the whole token.
    const FOREIGN: [Format; 3] = [Format::Sha512, Format::Sha512OfHex, Format::Sanctum];

    pub const fn as_str(self) -> &'static str {
        match self {
            Format::Sha256 => "sha256",
            Format::Sha512 => "sha512",
            Format::Sha512OfHex => "sha512-of-hex",
            Format::Sanctum => "sanctum",
        }
    }

    pub fn parse(name: &str) -> Option<Format> {
        Format::ALL.into_iter().find(|format| format.as_str() == name)
    }

    /// Length in bytes of the digest that the other system stores.
    pub const fn digest_len(self) -> usize {
        match self {
            Format::Sha256 | Format::Sanctum => 32,
            Format::Sha512 | Format::Sha512OfHex => 64,
        }
    }

    /// The key of a token in this format with this digest.
    pub fn key(self, digest: &[u8]) -> Digest {
        Sha256::new().chain_update(self.as_str()).chain_update([0]).chain_update(digest).finalize().into()
    }

    /// The key of a presented token; `None` if it cannot have this format.
    fn key_of(self, presented: &[u8]) -> Option<Digest> {
        match self {
            Format::Sha256 => Some(self.key(&Sha256::digest(presented))),
            Format::Sha512 => Some(self.key(&Sha512::digest(presented))),
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

/// The keys under which a presented token may be found, at most one per format, so that a guess costs a fixed number of
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

    fn found(presented: &str, format: Format, digest: &[u8]) -> bool {
        keys(presented.as_bytes()).any(|key| key == format.key(digest))
    }

    #[test]
    fn each_form_is_found_by_what_its_system_hands_out_and_by_nothing_else() {
        let secret = "ZmFrZS1zYW5jdHVtLXNlY3JldA8d2f1c3a";
        let digest = Sha256::digest(secret);
        for good in [format!("1|{secret}"), format!("12345678901234567890|{secret}")] {
            assert!(found(&good, Format::Sanctum, &digest), "{good}");
        }
        for bad in [secret.to_owned(), format!("|{secret}"), format!("x|{secret}"), format!("1|{secret} ")] {
            assert!(!found(&bad, Format::Sanctum, &digest), "{bad}");
        }
        assert!(found("é", Format::Sha512, &Sha512::digest("é")));
        assert!(found("00ffAb", Format::Sha512OfHex, &Sha512::digest([0, 0xff, 0xab])));
        for bad in ["00ffA", "00ffAg", ""] {
            assert!(!found(bad, Format::Sha512OfHex, &Sha512::digest([0, 0xff, 0xab])), "{bad}");
        }
    }

    #[test]
    fn a_digest_is_no_token_and_no_form_finds_that_of_another() {
        let digest = Sha512::digest("secret");
        let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        for presented in ["secret", "1|secret", &hex, &format!("1|{hex}"), &format!("sha512\0{hex}")] {
            for format in [Format::Sha512OfHex, Format::Sanctum] {
                assert!(!found(presented, format, &digest), "{presented}");
            }
        }
        assert!(!found(&hex, Format::Sha512, &digest));
    }

    #[test]
    fn a_guess_costs_a_fixed_number_of_digests() {
        for presented in ["", "1|2|3|4", &"ab".repeat(4096), "0|ab"] {
            assert!(keys(presented.as_bytes()).count() <= Format::FOREIGN.len());
        }
        for format in Format::ALL {
            assert_eq!(Format::parse(format.as_str()), Some(format));
        }
    }
}
