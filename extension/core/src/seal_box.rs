//! Sealing of private keys with master keys, which are kept outside of the database: AES-256-GCM (NIST SP 800-38D).
//!
//! A sealed value is one version byte, the id of its master key, the nonce, the ciphertext and the tag. The additional
//! data binds it to what it is for, so a value that was copied into another row does not open. A nonce is random: a
//! master key may seal 2^32 values (SP 800-38D, 8.3), and one that rotates every second for a century seals fewer.

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use aws_lc_rs::rand::{SecureRandom as _, SystemRandom};
use core::fmt;
use sha2::{Digest as _, Sha256};
use zeroize::Zeroizing;

pub const KEY_LEN: usize = 32;
pub const ID_LEN: usize = 8;
/// The most keys that a file may hold; two are enough to replace one by another.
pub const MAX_KEYS: usize = 16;
/// The largest key file, in bytes.
pub const MAX_FILE: usize = 64 * 1024;

const VERSION: u8 = 1;
const HEADER: usize = 1 + ID_LEN + NONCE_LEN;
/// What a line of a key file begins with.
const LINE_PREFIX: &str = "tollgate-master-key-1:";

/// Tells which master key sealed a value. It does not disclose the key.
pub type KeyId = [u8; ID_LEN];

pub struct MasterKey {
    id: KeyId,
    key: Zeroizing<[u8; KEY_LEN]>,
}

impl MasterKey {
    /// From the operating system's random source: `SystemRandom` reads it anew in a process that was forked.
    pub fn generate() -> Result<Self, NoRandomness> {
        let mut key = Zeroizing::new([0; KEY_LEN]);
        SystemRandom::new().fill(&mut *key).map_err(|_| NoRandomness)?;
        Ok(Self::from_bytes(&key))
    }

    pub fn from_bytes(key: &[u8; KEY_LEN]) -> Self {
        let mut hash = Sha256::new();
        hash.update(b"tollgate master key id 1\0");
        hash.update(key);
        let mut id = [0; ID_LEN];
        id.copy_from_slice(&hash.finalize()[..ID_LEN]);
        Self { id, key: Zeroizing::new(*key) }
    }

    pub fn id(&self) -> KeyId {
        self.id
    }

    pub fn as_bytes(&self) -> &[u8; KEY_LEN] {
        &self.key
    }

    /// The line of a key file, without its end.
    pub fn to_line(&self) -> Zeroizing<String> {
        let mut line = Zeroizing::new(String::with_capacity(LINE_PREFIX.len() + 2 * KEY_LEN));
        line.push_str(LINE_PREFIX);
        for byte in self.key.iter() {
            line.extend(
                [byte >> 4, byte & 15].map(|half| char::from(b"0123456789abcdef"[usize::from(half)])),
            );
        }
        line
    }

    fn cipher(&self) -> LessSafeKey {
        let key = UnboundKey::new(&AES_256_GCM, &*self.key).expect("a key of this length");
        LessSafeKey::new(key)
    }

    /// Seals a value for what the context names.
    pub fn seal(&self, plaintext: &[u8], context: &Context<'_>) -> Result<Vec<u8>, NoRandomness> {
        let mut nonce = [0; NONCE_LEN];
        SystemRandom::new().fill(&mut nonce).map_err(|_| NoRandomness)?;
        let mut text = Zeroizing::new(plaintext.to_vec());
        let tag = self
            .cipher()
            .seal_in_place_separate_tag(
                Nonce::assume_unique_for_key(nonce),
                Aad::from(context.bytes()),
                &mut text,
            )
            .map_err(|_| NoRandomness)?;
        let mut sealed = Vec::with_capacity(HEADER + text.len() + tag.as_ref().len());
        sealed.push(VERSION);
        sealed.extend_from_slice(&self.id);
        sealed.extend_from_slice(&nonce);
        sealed.extend_from_slice(&text);
        sealed.extend_from_slice(tag.as_ref());
        Ok(sealed)
    }
}

impl fmt::Debug for MasterKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MasterKey({})", id_text(&self.id))
    }
}

/// An id as people see it.
pub fn id_text(id: &KeyId) -> String {
    id.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What a sealed value is for. It opens for nothing else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Context<'a> {
    pub kid: &'a str,
    pub algorithm: &'a str,
    pub purpose: &'a str,
}

impl Context<'_> {
    /// Each part with its length, so that no two contexts have the same bytes.
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = b"tollgate sealed key 1\0".to_vec();
        for part in [self.kid, self.algorithm, self.purpose] {
            bytes.extend_from_slice(&(part.len() as u64).to_be_bytes());
            bytes.extend_from_slice(part.as_bytes());
        }
        bytes
    }
}

/// The operating system gave no random bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoRandomness;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Sealed by a master key that is not at hand.
    UnknownKey(KeyId),
    /// Not a sealed value, or changed since it was sealed, or sealed for another use.
    Damaged,
}

/// Which master key a value was sealed with; `None` if it is none.
pub fn sealed_by(sealed: &[u8]) -> Option<KeyId> {
    let (&VERSION, rest) = sealed.split_first()? else { return None };
    rest.first_chunk().copied()
}

/// Opens a value that one of these master keys sealed for the same context.
pub fn open(keys: &[MasterKey], sealed: &[u8], context: &Context<'_>) -> Result<Zeroizing<Vec<u8>>, Refusal> {
    let id = sealed_by(sealed).ok_or(Refusal::Damaged)?;
    let nonce: [u8; NONCE_LEN] =
        sealed.get(1 + ID_LEN..HEADER).and_then(|nonce| nonce.try_into().ok()).ok_or(Refusal::Damaged)?;
    let key = keys.iter().find(|key| key.id == id).ok_or(Refusal::UnknownKey(id))?;
    let mut text = Zeroizing::new(sealed[HEADER..].to_vec());
    let len = key
        .cipher()
        .open_in_place(Nonce::assume_unique_for_key(nonce), Aad::from(context.bytes()), &mut text)
        .map_err(|_| Refusal::Damaged)?
        .len();
    text.truncate(len);
    Ok(text)
}

/// What is wrong with a key file. It repeats nothing of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileFault {
    Empty,
    TooLarge,
    TooMany,
    /// By its number, from 1.
    NotAKey(usize),
    /// All bytes are the same, as in a placeholder.
    Placeholder(usize),
    /// The key of that line is in an earlier one too.
    Repeated(usize),
}

impl fmt::Display for FileFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => f.write_str("it holds no key"),
            Self::TooLarge => write!(f, "it is larger than {MAX_FILE} bytes"),
            Self::TooMany => write!(f, "it holds more than {MAX_KEYS} keys"),
            Self::NotAKey(line) => {
                write!(f, "line {line} is not {LINE_PREFIX} followed by {} hexadecimal digits", 2 * KEY_LEN)
            }
            Self::Placeholder(line) => write!(f, "line {line} is a placeholder, not a key"),
            Self::Repeated(line) => write!(f, "line {line} repeats a key"),
        }
    }
}

/// The keys of a file, one a line; the first seals, all open. Empty lines and lines that begin with `#` are left out.
pub fn parse_file(text: &[u8]) -> Result<Vec<MasterKey>, FileFault> {
    if text.len() > MAX_FILE {
        return Err(FileFault::TooLarge);
    }
    let mut keys: Vec<MasterKey> = Vec::new();
    for (number, line) in text.split(|&byte| byte == b'\n').enumerate() {
        let (number, line) = (number + 1, line.trim_ascii());
        if line.is_empty() || line.starts_with(b"#") {
            continue;
        }
        let digits = line.strip_prefix(LINE_PREFIX.as_bytes()).ok_or(FileFault::NotAKey(number))?;
        let key = from_hex(digits).ok_or(FileFault::NotAKey(number))?;
        if key.iter().all(|byte| *byte == key[0]) {
            return Err(FileFault::Placeholder(number));
        }
        let key = MasterKey::from_bytes(&key);
        if keys.iter().any(|other| other.id == key.id) {
            return Err(FileFault::Repeated(number));
        }
        if keys.len() == MAX_KEYS {
            return Err(FileFault::TooMany);
        }
        keys.push(key);
    }
    if keys.is_empty() { Err(FileFault::Empty) } else { Ok(keys) }
}

fn from_hex(digits: &[u8]) -> Option<Zeroizing<[u8; KEY_LEN]>> {
    if digits.len() != 2 * KEY_LEN {
        return None;
    }
    let half = |digit: u8| char::from(digit).to_digit(16).and_then(|half| u8::try_from(half).ok());
    let mut key = Zeroizing::new([0; KEY_LEN]);
    for (byte, pair) in key.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = half(pair[0])? << 4 | half(pair[1])?;
    }
    Some(key)
}
