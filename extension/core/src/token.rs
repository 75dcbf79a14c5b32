//! The token format: `<prefix>_<80 hex><8 hex>`.
//!
//! The 80 lower-case hexadecimal characters are 40 random bytes, the 8 after them the CRC-32 (IEEE 802.3) of those 80
//! characters. The checksum rejects most typos and junk without a look-up, and lets a secret scanner confirm a find
//! offline. It is not secret and covers only the 80 characters: a token is authenticated by its [`digest`], which
//! covers every byte of it.
//!
//! A prefix may itself contain `_`, so a token is always parsed from the right, where every length is fixed.

use std::borrow::Cow;
use std::error::Error;
use std::fmt;

use sha2::{Digest as _, Sha256};
use zeroize::Zeroizing;

/// Number of random bytes in a token.
pub const ENTROPY_LEN: usize = 40;
/// Length of the stored digest (SHA-256) in bytes.
pub const DIGEST_LEN: usize = 32;
/// Length of the longest prefix in characters.
pub const MAX_PREFIX_LEN: usize = 16;
/// The prefix of a token when the issuer specifies none.
pub const DEFAULT_PREFIX: &str = "tgt";

/// The SHA-256 of the whole token, which is stored in its place.
pub type Digest = [u8; DIGEST_LEN];

const BODY_LEN: usize = 2 * ENTROPY_LEN;
const CHECKSUM_LEN: usize = 8;
const TAIL_LEN: usize = BODY_LEN + CHECKSUM_LEN;
/// Characters of the body that a hint shows: enough to recognise a token in a list, 16 of its 320 bits.
const HINT_LEN: usize = 4;

/// A token's prefix, `[a-z][a-z0-9_]{0,15}`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Prefix(String);

impl Prefix {
    /// Accepts a well-formed prefix; the error says what is wrong with another.
    pub fn parse(prefix: &str) -> Result<Prefix, PrefixError> {
        if is_prefix(prefix.as_bytes()) {
            return Ok(Prefix(prefix.to_owned()));
        }
        let length = prefix.chars().count();
        Err(match prefix.chars().next() {
            None => PrefixError::Empty,
            Some(_) if length > MAX_PREFIX_LEN => PrefixError::TooLong { length },
            Some(first) if !first.is_ascii_lowercase() => PrefixError::BadStart,
            Some(_) => PrefixError::BadCharacter {
                position: 1 + prefix
                    .chars()
                    .position(|c| !c.is_ascii() || !is_prefix_byte(c as u8))
                    .unwrap_or_default(),
            },
        })
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Default for Prefix {
    fn default() -> Self {
        Prefix(DEFAULT_PREFIX.to_owned())
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why a prefix was refused.
///
/// The text never repeats the value: a user may pass a whole token as the prefix, and the message is logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PrefixError {
    Empty,
    /// In characters.
    TooLong {
        length: usize,
    },
    BadStart,
    /// The first character that is not allowed, counted from 1.
    BadCharacter {
        position: usize,
    },
}

impl fmt::Display for PrefixError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PrefixError::Empty => f.write_str("a token prefix must not be empty"),
            PrefixError::TooLong { length } => {
                write!(f, "a token prefix has at most {MAX_PREFIX_LEN} characters, this one has {length}")
            }
            PrefixError::BadStart => {
                f.write_str("a token prefix must begin with a lower-case letter (a to z)")
            }
            PrefixError::BadCharacter { position } => write!(
                f,
                "a token prefix may contain only a to z, 0 to 9 and \"_\"; character {position} is none of them"
            ),
        }
    }
}

impl Error for PrefixError {}

/// A text that is safe to show: each run of 16 or more hexadecimal digits, such as those of a token passed by mistake,
/// is replaced by an ellipsis.
pub fn redact(text: &str) -> String {
    const RUN: usize = 16;
    let text = without_signed_tokens(text);
    let mut shown = String::with_capacity(text.len());
    let mut rest = text.as_ref();
    while let Some(start) = rest.find(|c: char| c.is_ascii_hexdigit()) {
        let (before, run) = rest.split_at(start);
        let end = run.find(|c: char| !c.is_ascii_hexdigit()).unwrap_or(run.len());
        shown.push_str(before);
        shown.push_str(if end < RUN { &run[..end] } else { "…" });
        rest = &run[end..];
    }
    shown.push_str(rest);
    shown
}

/// Replaces what may be a signed token, or the beginning of one.
fn without_signed_tokens(text: &str) -> Cow<'_, str> {
    const SHORTEST: usize = 16;
    const START: &str = "eyJ";
    let is_part = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if !text.contains(START) {
        return text.into();
    }
    let mut shown = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find(START) {
        let (before, run) = rest.split_at(start);
        let end = run.find(|c: char| !is_part(c)).unwrap_or(run.len());
        shown.push_str(before);
        shown.push_str(if end < SHORTEST { &run[..end] } else { "…" });
        rest = &run[end..];
    }
    shown.push_str(rest);
    shown.into()
}

/// Whether a text has as many hexadecimal digits in a row as the secret part of a token, or a signed token.
pub fn contains_secret(text: impl AsRef<[u8]>) -> bool {
    let text = text.as_ref();
    text.len() >= SHORTEST_SECRET
        && (text.split(|b| !b.is_ascii_hexdigit()).any(|run| run.len() >= BODY_LEN)
            || contains_signed_token(text))
}

/// A signature of 32 bytes, the shortest there is, as base64url.
const SHORTEST_SIGNATURE: usize = 43;
/// The beginning of a header, an empty payload, and a signature, with dots between them.
const SHORTEST_SECRET: usize = 3 + 1 + 1 + SHORTEST_SIGNATURE;

/// Whether a text contains a JWS in its compact form (RFC 7515): three parts of base64url with dots between them, of which
/// the first begins as the encoding of an object that begins with a name does.
fn contains_signed_token(text: &[u8]) -> bool {
    let is_base64url = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
    text.split(|&b| !is_base64url(b) && b != b'.').any(|run| {
        let mut parts = run.split(|&b| b == b'.').peekable();
        while let Some(first) = parts.next() {
            let mut rest = parts.clone();
            let is_header = first.windows(3).any(|start| start == b"eyJ");
            if is_header
                && rest.next().is_some()
                && rest.next().is_some_and(|last| last.len() >= SHORTEST_SIGNATURE)
            {
                return true;
            }
        }
        false
    })
}

/// Why a presented value cannot be a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fault {
    /// No value: NULL.
    Missing,
    Empty,
    /// It still has the scheme of an `Authorization` header in front.
    Scheme,
    /// White space or an invisible character, at an end or inside.
    Whitespace,
    /// It is in quotation marks or angle brackets.
    Quotes,
    /// Nothing before the last `_`, no `_` at all, or a malformed prefix.
    Prefix,
    /// Too few or too many characters after the prefix.
    Length,
    /// A character after the prefix that is neither a digit nor a to f, such as an upper-case letter.
    Characters,
    /// Every character is allowed, but some differ from the issued ones.
    Checksum,
}

impl Fault {
    pub const ALL: [Fault; 9] = [
        Fault::Missing,
        Fault::Empty,
        Fault::Scheme,
        Fault::Whitespace,
        Fault::Quotes,
        Fault::Prefix,
        Fault::Length,
        Fault::Characters,
        Fault::Checksum,
    ];

    /// The name in SQL and in the log.
    pub const fn as_str(self) -> &'static str {
        match self {
            Fault::Missing => "missing",
            Fault::Empty => "empty",
            Fault::Scheme => "scheme",
            Fault::Whitespace => "whitespace",
            Fault::Quotes => "quotes",
            Fault::Prefix => "prefix",
            Fault::Length => "length",
            Fault::Characters => "characters",
            Fault::Checksum => "checksum",
        }
    }
}

/// Classifies a value that [`parse`] refused.
#[cold]
pub fn fault(presented: &[u8]) -> Fault {
    if presented.is_empty() {
        return Fault::Empty;
    }
    // A guess consists of token characters only, and skips this more expensive check.
    let is_plain = |&b: &u8| b.is_ascii_alphanumeric() || b == b'_';
    if let Some(fault) = (!presented.iter().all(is_plain)).then(|| fault_around(presented)).flatten() {
        return fault;
    }
    let Some(split) = presented.iter().rposition(|&b| b == b'_') else { return Fault::Prefix };
    let (prefix, tail) = (&presented[..split], &presented[split + 1..]);
    let Some(lower) = lower_case(prefix).filter(|lower| is_prefix(&lower[..prefix.len()])) else {
        return Fault::Prefix;
    };
    if tail.len() != TAIL_LEN {
        Fault::Length
    } else if lower[..split] != *prefix || !tail.iter().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
        Fault::Characters
    } else {
        Fault::Checksum
    }
}

/// `None` if it is too long for a prefix.
fn lower_case(prefix: &[u8]) -> Option<[u8; MAX_PREFIX_LEN]> {
    let mut lower = [0; MAX_PREFIX_LEN];
    lower.get_mut(..prefix.len())?.copy_from_slice(prefix);
    lower.make_ascii_lowercase();
    Some(lower)
}

/// Characters around a token that were copied together with it, or between its parts.
fn fault_around(presented: &[u8]) -> Option<Fault> {
    let text = String::from_utf8_lossy(presented);
    let invisible =
        |c: char| c.is_whitespace() || c.is_control() || matches!(c, '\u{200b}'..='\u{200f}' | '\u{feff}');
    let first_word = text.trim_start().split(invisible).next().unwrap_or_default();
    let schemes = ["bearer", "token", "basic", "apikey", "api-key"];
    if first_word.len() < text.trim().len()
        && schemes.iter().any(|one| first_word.trim_end_matches(':').eq_ignore_ascii_case(one))
    {
        return Some(Fault::Scheme);
    }
    if text.contains(invisible) {
        return Some(Fault::Whitespace);
    }
    let quotes = ['"', '\'', '`', '<', '>', '“', '”', '‘', '’'];
    (text.starts_with(quotes) || text.ends_with(quotes)).then_some(Fault::Quotes)
}

/// The parts of a well-formed token.
///
/// It has no `Debug`: the body is the secret, which a derived one would print.
#[derive(Clone, Copy)]
pub struct Parsed<'a> {
    pub prefix: &'a str,
    /// The 80 hexadecimal characters between prefix and checksum.
    pub body: &'a [u8],
}

impl Parsed<'_> {
    /// The part of the token that may be shown: its prefix, `_` and the first 4 characters of the body.
    pub fn hint(&self) -> String {
        let mut hint = String::with_capacity(self.prefix.len() + 1 + HINT_LEN);
        hint.push_str(self.prefix);
        hint.push('_');
        hint.extend(self.body.iter().take(HINT_LEN).copied().map(char::from));
        hint
    }
}

/// Parses a token; `None` if its shape, prefix or checksum is wrong.
///
/// Upper-case hexadecimal is malformed: a token has one spelling, since its digest would not find another.
#[inline]
pub fn parse(token: &[u8]) -> Option<Parsed<'_>> {
    let (head, tail) = token.split_last_chunk::<TAIL_LEN>()?;
    let (b'_', prefix) = head.split_last()? else { return None };
    if !is_prefix(prefix) || !is_lower_hex(tail) {
        return None;
    }
    let (body, checksum) = tail.split_first_chunk::<BODY_LEN>()?;
    if crc32fast::hash(body) != hex_value(checksum) {
        return None;
    }
    Some(Parsed { prefix: std::str::from_utf8(prefix).ok()?, body })
}

/// The digest under which a token is stored and found. Takes any bytes; [`parse`] checks whether they are a token.
#[inline]
pub fn digest(token: &[u8]) -> Digest {
    Sha256::digest(token).into()
}

/// A token that was just issued: the only time that its plaintext exists on our side.
///
/// Its memory is wiped when it is dropped, and `Debug` does not show it.
pub struct Issued {
    token: Zeroizing<String>,
    hint_len: usize,
}

impl Issued {
    /// The plaintext, only to be returned to the caller that requested the token.
    pub fn token(&self) -> &str {
        &self.token
    }

    pub fn digest(&self) -> Digest {
        digest(self.token.as_bytes())
    }

    /// Same as [`Parsed::hint`].
    pub fn hint(&self) -> String {
        self.token[..self.hint_len].to_owned()
    }
}

impl fmt::Debug for Issued {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Issued([redacted])")
    }
}

/// Builds the token for these random bytes.
///
/// `entropy` must come from the operating system's cryptographic generator, and be wiped by the caller afterwards.
pub fn issue(prefix: &Prefix, entropy: &[u8; ENTROPY_LEN]) -> Issued {
    let head_len = prefix.as_str().len() + 1;
    // Full capacity from the start: a reallocation would leave a copy of the secret that nothing wipes.
    let mut token = Zeroizing::new(String::with_capacity(head_len + TAIL_LEN));
    token.push_str(prefix.as_str());
    token.push('_');
    push_hex(&mut token, entropy);
    let checksum = crc32fast::hash(&token.as_bytes()[head_len..]);
    push_hex(&mut token, &checksum.to_be_bytes());
    Issued { token, hint_len: head_len + HINT_LEN }
}

fn is_prefix(prefix: &[u8]) -> bool {
    prefix.len() <= MAX_PREFIX_LEN
        && prefix.first().is_some_and(u8::is_ascii_lowercase)
        && prefix.iter().all(|&b| is_prefix_byte(b))
}

fn is_prefix_byte(b: u8) -> bool {
    matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'_')
}

fn is_lower_hex(text: &[u8; TAIL_LEN]) -> bool {
    // No early exit: a fold over a fixed length compiles to a handful of vector instructions.
    text.iter().fold(true, |ok, &b| ok & (b.is_ascii_digit() | matches!(b, b'a'..=b'f')))
}

/// The number that hexadecimal digits encode; the caller has checked them.
fn hex_value(digits: &[u8]) -> u32 {
    digits.iter().fold(0, |value, &b| {
        let digit = if b.is_ascii_digit() { b - b'0' } else { b.wrapping_sub(b'a').wrapping_add(10) };
        (value << 4) | u32::from(digit & 0xf)
    })
}

pub(crate) fn push_hex(out: &mut String, bytes: &[u8]) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    for &b in bytes {
        out.push(char::from(DIGITS[usize::from(b >> 4)]));
        out.push(char::from(DIGITS[usize::from(b & 0xf)]));
    }
}
