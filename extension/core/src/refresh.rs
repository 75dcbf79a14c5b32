//! Refresh tokens: their format, their MAC, and what a presented one means for its session (RFC 6749 §6, RFC 9700
//! §4.14).
//!
//! A token is `tgr_` and 120 lower-case hexadecimal characters: the session's id (16 bytes), the generation (8 bytes), the
//! MAC (32 bytes), and the CRC-32 of the 112 characters before it, as in [`crate::token`]. The MAC is HMAC-SHA-256 over
//! the issuer, the id, the generation and the session's secret, by a key of the database. So the successor of a token is a
//! function of its session, and a token of any generation, however old, is recognised with certainty, while one that was
//! made up proves nothing.
//!
//! [`decide`] is the whole decision about a token whose MAC is right. What it decides is written by SQL.

use zeroize::Zeroizing;

use crate::mac_key::{MacKey, Use};
use crate::status;
use crate::token::push_hex;

pub const PREFIX: &str = "tgr_";
pub const ID_LEN: usize = 16;
/// Of the secret that each session has.
pub const SECRET_LEN: usize = 32;

const GENERATION_LEN: usize = 8;
const MAC_LEN: usize = 32;
const BODY_LEN: usize = 2 * (ID_LEN + GENERATION_LEN + MAC_LEN);
const CHECKSUM_LEN: usize = 8;
/// Of a token, in characters.
pub const TOKEN_LEN: usize = PREFIX.len() + BODY_LEN + CHECKSUM_LEN;

/// A well-formed token; its MAC is not checked yet.
///
/// It has no `Debug`, which would print the MAC.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct RefreshToken {
    pub session: [u8; ID_LEN],
    /// From 1 on, and less than the greatest number, so that each has a next one.
    pub generation: i64,
    mac: [u8; MAC_LEN],
}

/// Parses a token; `None` if its length, prefix, characters or checksum are wrong. It has one spelling.
pub fn parse(token: &[u8]) -> Option<RefreshToken> {
    let text: &[u8; TOKEN_LEN] = token.try_into().ok()?;
    let digits = text.strip_prefix(PREFIX.as_bytes())?;
    let bytes = bytes_of(digits)?;
    let (body, checksum) = digits.split_at(BODY_LEN);
    if crc32fast::hash(body).to_be_bytes() != bytes[BODY_LEN / 2..] || checksum.len() != CHECKSUM_LEN {
        return None;
    }
    let (session, rest) = bytes.split_first_chunk::<ID_LEN>()?;
    let (generation, rest) = rest.split_first_chunk::<GENERATION_LEN>()?;
    let mac = rest.first_chunk::<MAC_LEN>()?;
    let generation = i64::from_be_bytes(*generation);
    (1..i64::MAX).contains(&generation).then_some(RefreshToken { session: *session, generation, mac: *mac })
}

fn bytes_of(digits: &[u8]) -> Option<[u8; (BODY_LEN + CHECKSUM_LEN) / 2]> {
    let value = |digit: u8| match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    };
    let mut bytes = [0; (BODY_LEN + CHECKSUM_LEN) / 2];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = value(pair[0])? << 4 | value(pair[1])?;
    }
    Some(bytes)
}

/// What the MACs of a session are over, beside the generation.
#[derive(Clone, Copy)]
pub struct Subject<'a> {
    pub issuer: &'a str,
    pub session: &'a [u8; ID_LEN],
    pub secret: &'a [u8; SECRET_LEN],
}

pub enum RefreshTokens {}

impl Use for RefreshTokens {
    const KID: &'static [u8] = b"tollgate refresh key id 1\0";
}

/// A key that makes refresh tokens.
pub type Key = MacKey<RefreshTokens>;

impl Key {
    /// The token of a generation.
    pub fn issue(&self, subject: &Subject<'_>, generation: i64) -> Zeroizing<String> {
        let mac = self.sign(&message(subject, generation));
        // Full capacity from the start: a reallocation would leave a copy that nothing wipes.
        let mut token = Zeroizing::new(String::with_capacity(TOKEN_LEN));
        token.push_str(PREFIX);
        push_hex(&mut token, subject.session);
        push_hex(&mut token, &generation.to_be_bytes());
        push_hex(&mut token, mac.as_ref());
        let checksum = crc32fast::hash(&token.as_bytes()[PREFIX.len()..]);
        push_hex(&mut token, &checksum.to_be_bytes());
        token
    }

    /// Whether this key made the token for this session. Takes the same time whatever the MAC is.
    pub fn made(&self, subject: &Subject<'_>, token: &RefreshToken) -> bool {
        token.session == *subject.session && self.verifies(&message(subject, token.generation), &token.mac)
    }
}

/// Each part has a fixed length, or its length before it.
fn message(subject: &Subject<'_>, generation: i64) -> Zeroizing<Vec<u8>> {
    const DOMAIN: &[u8] = b"tollgate refresh token 1\0";
    let issuer = subject.issuer.as_bytes();
    let parts: [&[u8]; 6] = [
        DOMAIN,
        &(issuer.len() as u64).to_be_bytes(),
        issuer,
        subject.session,
        &generation.to_be_bytes(),
        subject.secret,
    ];
    let mut message = Zeroizing::new(Vec::with_capacity(parts.iter().map(|part| part.len()).sum()));
    parts.iter().for_each(|part| message.extend_from_slice(part));
    message
}

/// The `code` of a refresh.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Code {
    Valid,
    Malformed,
    NotFound,
    Revoked,
    Expired,
    Reused,
    InsufficientScope,
    RateLimited,
}

impl Code {
    /// The code as SQL returns it: that of a verification, where there is one.
    pub const fn as_str(self) -> &'static str {
        match self.of_verification() {
            Some(code) => code.as_str(),
            None => "REUSED",
        }
    }

    /// `None` for [`Code::Reused`].
    pub const fn of_verification(self) -> Option<status::Code> {
        Some(match self {
            Code::Valid => status::Code::Valid,
            Code::Malformed => status::Code::Malformed,
            Code::NotFound => status::Code::NotFound,
            Code::Revoked => status::Code::Revoked,
            Code::Expired => status::Code::Expired,
            Code::InsufficientScope => status::Code::InsufficientScope,
            Code::RateLimited => status::Code::RateLimited,
            Code::Reused => return None,
        })
    }

    /// As [`status::Code::is_failed_attempt`].
    pub const fn is_failed_attempt(self) -> bool {
        match self.of_verification() {
            Some(code) => code.is_failed_attempt(),
            None => true,
        }
    }
}

/// A session, as its row has it. Times are microseconds since any one epoch.
#[derive(Clone, Copy, Debug)]
pub struct Session {
    /// Of the latest token.
    pub generation: i64,
    pub refreshed_at: i64,
    /// How long it may go without a refresh.
    pub idle: i64,
    pub expires_at: i64,
    /// By its row, its user or its key.
    pub is_revoked: bool,
}

/// A token with the right MAC.
#[derive(Clone, Copy, Debug)]
pub struct Presented {
    pub generation: i64,
    /// By another client than the one that the session is bound to.
    pub by_other_client: bool,
    /// From another address than the last refresh.
    pub from_elsewhere: bool,
}

#[derive(Clone, Copy, Debug)]
pub struct Grace {
    /// How long the token that was just replaced gets the same successor again.
    pub length: i64,
    /// Only from the address that replaced it.
    pub same_address: bool,
}

/// What a token is to its session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// The latest one: the session is refreshed, to the next generation.
    Refresh,
    /// The one before, within the grace: it gets the latest one again.
    Retry,
    /// One after the latest, in a session that a failover set back: it was issued and lost. The session is refreshed, to
    /// the generation after it.
    Recover,
    /// One that was replaced or, since only the key makes them, one that this server never issued: the session ends.
    Reuse,
    Expired,
    Revoked,
    /// The session is of another client: it is as if there were none.
    OtherClient,
}

/// A session ends in its last second already: an access token, whose times are whole seconds, must not outlive it.
pub const LAST: i64 = 1_000_000;

impl Session {
    /// When it is over unless it is refreshed.
    pub fn end(&self) -> i64 {
        self.expires_at.min(self.refreshed_at.saturating_add(self.idle))
    }
}

impl Decision {
    /// The generation that the client gets.
    pub fn next(self, session: &Session, presented: &Presented) -> i64 {
        match self {
            Decision::Recover => presented.generation.saturating_add(1),
            Decision::Retry => session.generation,
            _ => session.generation.saturating_add(1),
        }
    }
}

/// Decides on a token. `was_set_back` says whether the session was last refreshed before this server began to write its
/// present timeline, so that a later refresh may have been lost; it is asked only if that matters.
pub fn decide(
    session: &Session,
    presented: &Presented,
    grace: &Grace,
    now: i64,
    was_set_back: impl FnOnce() -> bool,
) -> Decision {
    if presented.by_other_client {
        return Decision::OtherClient;
    }
    if session.is_revoked {
        return Decision::Revoked;
    }
    if session.end().saturating_sub(LAST) < now {
        return Decision::Expired;
    }
    match presented.generation.saturating_sub(session.generation) {
        0 => Decision::Refresh,
        -1 if now.saturating_sub(session.refreshed_at) < grace.length
            && !(grace.same_address && presented.from_elsewhere) =>
        {
            Decision::Retry
        }
        1 if was_set_back() => Decision::Recover,
        _ => Decision::Reuse,
    }
}
