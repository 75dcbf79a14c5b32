//! Signing and verifying: ES256 and RS256 (RFC 7518), EdDSA with Ed25519 (RFC 8037).
//!
//! This is the only module that calls the cryptographic library for them. A key has one algorithm, which nothing in a
//! token can change. Each key passes [`PublicKey::new`], whether it comes from a JWK, from PKCS#8 or was just generated,
//! so that what makes a key too weak stands once.
//!
//! Random numbers come from the library's generator, which each process seeds from the operating system: it notices a
//! fork (`MADV_WIPEONFORK`, and by asking the operating system each time where the kernel lacks it), so backends that
//! were forked from one postmaster never share its state. ECDSA's nonces depend on the private key and the message too.

use std::error::Error;
use std::fmt;

use aws_lc_rs::encoding::{AsDer, Pkcs8V1Der};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::{KeyPair as RsaKeyPair, KeySize, PublicKeyComponents};
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED, ECDSA_P256_SHA256_FIXED_SIGNING, ED25519, EcdsaKeyPair, Ed25519KeyPair,
    KeyPair as _, ParsedPublicKey, RSA_PKCS1_2048_8192_SHA256, RSA_PKCS1_SHA256,
};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use zeroize::Zeroizing;

/// The algorithms of JSON Web Signatures that exist here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Algorithm {
    /// ECDSA over P-256 with SHA-256.
    Es256,
    /// Ed25519.
    EdDsa,
    /// RSASSA-PKCS1-v1_5 with SHA-256.
    Rs256,
}

impl Algorithm {
    pub const ALL: [Algorithm; 3] = [Algorithm::Es256, Algorithm::EdDsa, Algorithm::Rs256];

    /// The name of RFC 7518 or 8037.
    pub const fn as_str(self) -> &'static str {
        match self {
            Algorithm::Es256 => "ES256",
            Algorithm::EdDsa => "EdDSA",
            Algorithm::Rs256 => "RS256",
        }
    }

    /// Names are compared exactly: `es256` is no algorithm.
    pub fn parse(name: &str) -> Option<Algorithm> {
        Algorithm::ALL.into_iter().find(|algorithm| algorithm.as_str() == name)
    }
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// The numbers of a public key. Those of RSA are big-endian and have no leading zeros.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Material {
    P256 { x: [u8; 32], y: [u8; 32] },
    Ed25519 { x: [u8; 32] },
    Rsa { n: Vec<u8>, e: Vec<u8> },
}

/// Why a key is not used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Weakness {
    /// Of P-256: it is not on the curve.
    Point,
    /// Of Ed25519: the number is not less than the field's prime.
    NotCanonical,
    /// Of Ed25519: a point of small order, for which anyone can sign.
    SmallOrder,
    /// An RSA modulus that is shorter than [`MIN_RSA_BITS`] or longer than [`MAX_RSA_BITS`].
    RsaSize,
    /// An RSA modulus that is even, or has leading zeros.
    RsaModulus,
    /// An RSA exponent that is less than 65537, longer than 4 bytes or even, or has leading zeros.
    RsaExponent,
    /// An RSA modulus as a faulty library of smart cards made them: it can be factored (CVE-2017-15361).
    Roca,
    /// The library refuses it for another reason.
    Refused,
}

pub const MIN_RSA_BITS: usize = 2048;
pub const MAX_RSA_BITS: usize = 8192;

impl fmt::Display for Weakness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Weakness::Point => f.write_str("its point is not on the curve P-256"),
            Weakness::NotCanonical => f.write_str("its point on Ed25519 is not encoded canonically"),
            Weakness::SmallOrder => f.write_str("its point on Ed25519 has a small order"),
            Weakness::RsaSize => write!(f, "an RSA key must have {MIN_RSA_BITS} to {MAX_RSA_BITS} bits"),
            Weakness::RsaModulus => f.write_str("its RSA modulus is even or has leading zeros"),
            Weakness::RsaExponent => f.write_str(
                "its RSA exponent must be odd, at least 65537, and at most 4 bytes without leading zeros",
            ),
            Weakness::Roca => f.write_str("its RSA modulus can be factored (CVE-2017-15361)"),
            Weakness::Refused => f.write_str("it is not a valid key"),
        }
    }
}

impl Error for Weakness {}

/// A public key, checked and ready to verify with.
#[derive(Clone)]
pub struct PublicKey {
    material: Material,
    parsed: ParsedPublicKey,
}

impl PublicKey {
    /// Checks a key. The numbers of a P-256 key are checked to be on the curve; those of Ed25519 are not, but nothing
    /// verifies by a point that is not on it.
    pub fn new(material: Material) -> Result<PublicKey, Weakness> {
        let parsed = match &material {
            Material::P256 { x, y } => {
                let point = [&[4], &x[..], y].concat(); // uncompressed, SEC 1 §2.3.3
                ParsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, point).map_err(|_| Weakness::Point)?
            }
            Material::Ed25519 { x } => {
                check_ed25519(x)?;
                ParsedPublicKey::new(&ED25519, x).map_err(|_| Weakness::Refused)?
            }
            Material::Rsa { n, e } => {
                check_rsa(n, e)?;
                let components = PublicKeyComponents { n, e };
                let parsed = components.to_parsed_public_key(&RSA_PKCS1_2048_8192_SHA256);
                parsed.map_err(|_| Weakness::Refused)?
            }
        };
        Ok(PublicKey { material, parsed })
    }

    pub fn algorithm(&self) -> Algorithm {
        match self.material {
            Material::P256 { .. } => Algorithm::Es256,
            Material::Ed25519 { .. } => Algorithm::EdDsa,
            Material::Rsa { .. } => Algorithm::Rs256,
        }
    }

    pub fn material(&self) -> &Material {
        &self.material
    }

    /// Whether the key's algorithm made this signature of this message. ECDSA signatures are 64 bytes, r and s.
    pub fn verify(&self, message: &[u8], signature: &[u8]) -> bool {
        self.parsed.verify_sig(message, signature).is_ok()
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.material.fmt(f)
    }
}

impl PartialEq for PublicKey {
    fn eq(&self, other: &Self) -> bool {
        self.material == other.material
    }
}

impl Eq for PublicKey {}

/// RFC 8032 §5.1.3 refuses what is not canonical. RFC 8037 §5 is silent on small orders, for which one signature fits
/// any message.
fn check_ed25519(x: &[u8; 32]) -> Result<(), Weakness> {
    const PRIME: [u8; 32] = {
        let mut prime = [0xff; 32];
        (prime[0], prime[31]) = (0xed, 0x7f);
        prime
    };
    // The y of the points whose order divides 8: of order 4, 1, 8, 8 and 2.
    const SMALL: [[u8; 32]; 5] = {
        let (zero, mut one, mut minus_one) = ([0; 32], [0; 32], PRIME);
        (one[0], minus_one[0]) = (1, 0xec);
        [
            zero,
            one,
            *b"\x26\xe8\x95\x8f\xc2\xb2\x27\xb0\x45\xc3\xf4\x89\xf2\xef\x98\xf0\xd5\xdf\xac\x05\xd3\xc6\x33\x39\xb1\x38\x02\x88\x6d\x53\xfc\x05",
            *b"\xc7\x17\x6a\x70\x3d\x4d\xd8\x4f\xba\x3c\x0b\x76\x0d\x10\x67\x0f\x2a\x20\x53\xfa\x2c\x39\xcc\xc6\x4e\xc7\xfd\x77\x92\xac\x03\x7a",
            minus_one,
        ]
    };
    let mut y = *x;
    y[31] &= 0x7f; // the other bit is the sign of the point's x
    if SMALL.contains(&y) {
        Err(Weakness::SmallOrder)
    } else if y.iter().rev().ge(PRIME.iter().rev()) {
        Err(Weakness::NotCanonical)
    } else {
        Ok(())
    }
}

fn check_rsa(n: &[u8], e: &[u8]) -> Result<(), Weakness> {
    match (n.first(), n.last()) {
        (Some(1..), Some(last)) if last & 1 == 1 => {}
        _ => return Err(Weakness::RsaModulus),
    }
    let bits = 8 * n.len() - n[0].leading_zeros() as usize;
    if !(MIN_RSA_BITS..=MAX_RSA_BITS).contains(&bits) {
        return Err(Weakness::RsaSize);
    }
    let exponent = e.iter().take(5).fold(0, |value, &byte| value << 8 | u64::from(byte));
    if e.first() == Some(&0) || e.len() > 4 || exponent < 65537 || exponent & 1 == 0 {
        return Err(Weakness::RsaExponent);
    }
    if is_roca(n) { Err(Weakness::Roca) } else { Ok(()) }
}

/// Whether a modulus is a power of 65537 modulo each small prime, as those of Infineon's RSALib are; of others, one in
/// 2^27 (Nemec et al., "The Return of Coppersmith's Attack", §3.2).
fn is_roca(n: &[u8]) -> bool {
    const PRIMES: [u32; 39] = [
        2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97, 101,
        103, 107, 109, 113, 127, 131, 137, 139, 149, 151, 157, 163, 167,
    ];
    PRIMES.into_iter().all(|prime| {
        let rest = n.iter().fold(0, |rest, &byte| (rest << 8 | u32::from(byte)) % prime);
        let mut power = 1;
        for _ in 0..prime {
            if power == rest {
                return true;
            }
            power = power * (65537 % prime) % prime;
        }
        false
    })
}

/// A private key with its public half. The library wipes its memory when it is dropped.
pub struct SigningKey {
    private: Private,
    public: PublicKey,
}

enum Private {
    P256(EcdsaKeyPair),
    Ed25519(Ed25519KeyPair),
    Rsa(Box<RsaKeyPair>),
}

/// The library could not generate a key, sign or encode: it has no memory or no random numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failed;

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the cryptographic library failed")
    }
}

impl Error for Failed {}

/// Why something is not a private key that can be used. The text never repeats any of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pkcs8Fault {
    /// No `-----BEGIN PRIVATE KEY-----` with its end and base64 in between.
    Pem,
    /// `BEGIN ENCRYPTED PRIVATE KEY`.
    Encrypted,
    /// `BEGIN RSA PRIVATE KEY`, `BEGIN EC PRIVATE KEY` and others that are not PKCS#8.
    NotPkcs8,
    /// More than one private key.
    Several,
    /// Not PKCS#8, damaged, or none of P-256, Ed25519 and RSA.
    Der,
    Weak(Weakness),
}

impl fmt::Display for Pkcs8Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Pkcs8Fault::Pem => f.write_str("it is not PEM with one block BEGIN PRIVATE KEY"),
            Pkcs8Fault::Encrypted => {
                f.write_str("it is encrypted; `openssl pkcs8 -in key.pem -topk8 -nocrypt` decrypts it")
            }
            Pkcs8Fault::NotPkcs8 => {
                f.write_str("it is not PKCS#8; `openssl pkcs8 -in key.pem -topk8 -nocrypt` converts it")
            }
            Pkcs8Fault::Several => f.write_str("it has more than one private key"),
            Pkcs8Fault::Der => f.write_str("it is damaged, or not a key of P-256, Ed25519 or RSA"),
            Pkcs8Fault::Weak(weakness) => weakness.fmt(f),
        }
    }
}

impl Error for Pkcs8Fault {}

impl SigningKey {
    /// A new key; of RSA, with 2048 bits.
    pub fn generate(algorithm: Algorithm) -> Result<SigningKey, Failed> {
        let private = match algorithm {
            Algorithm::Es256 => EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).map(Private::P256),
            Algorithm::EdDsa => Ed25519KeyPair::generate().map(Private::Ed25519),
            Algorithm::Rs256 => RsaKeyPair::generate(KeySize::Rsa2048).map(|key| Private::Rsa(Box::new(key))),
        };
        SigningKey::new(private.map_err(|_| Failed)?).map_err(|_| Failed)
    }

    /// Reads PKCS#8 in DER (RFC 5208, 5958). The public half is computed, and where the file has one it must be equal.
    pub fn from_pkcs8(der: &[u8]) -> Result<SigningKey, Pkcs8Fault> {
        // The library ignores what follows.
        if !is_one_sequence(der) {
            return Err(Pkcs8Fault::Der);
        }
        let private = Ed25519KeyPair::from_pkcs8(der)
            .map(Private::Ed25519)
            .or_else(|_| EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, der).map(Private::P256))
            .or_else(|_| RsaKeyPair::from_pkcs8(der).map(|key| Private::Rsa(Box::new(key))))
            .map_err(|_| Pkcs8Fault::Der)?;
        SigningKey::new(private).map_err(Pkcs8Fault::Weak)
    }

    /// Reads one private key in PEM (RFC 7468), as `openssl genpkey` writes it. Text around it is allowed.
    pub fn from_pkcs8_pem(text: &str) -> Result<SigningKey, Pkcs8Fault> {
        const BEGIN: &str = "-----BEGIN PRIVATE KEY-----";
        const END: &str = "-----END PRIVATE KEY-----";
        let Some((before, rest)) = text.split_once(BEGIN) else {
            return Err(if text.contains("-----BEGIN ENCRYPTED PRIVATE KEY-----") {
                Pkcs8Fault::Encrypted
            } else if text.contains("PRIVATE KEY-----") {
                Pkcs8Fault::NotPkcs8
            } else {
                Pkcs8Fault::Pem
            });
        };
        let (body, after) = rest.split_once(END).ok_or(Pkcs8Fault::Pem)?;
        if [before, after].iter().any(|around| around.contains("PRIVATE KEY-----")) {
            return Err(Pkcs8Fault::Several);
        }
        // Full capacity from the start: a reallocation would leave a copy that nothing wipes.
        let mut encoded = Zeroizing::new(String::with_capacity(body.len()));
        encoded.extend(body.chars().filter(|c| !c.is_ascii_whitespace()));
        let mut der = Zeroizing::new(vec![0; body.len()]);
        let length = STANDARD.decode_slice(encoded.as_bytes(), &mut der).map_err(|_| Pkcs8Fault::Pem)?;
        SigningKey::from_pkcs8(der.get(..length).ok_or(Pkcs8Fault::Pem)?)
    }

    fn new(private: Private) -> Result<SigningKey, Weakness> {
        let material = match &private {
            Private::P256(key) => match key.public_key().as_ref().split_first_chunk::<33>() {
                Some(([4, x @ ..], y)) => {
                    Material::P256 { x: *x, y: y.try_into().map_err(|_| Weakness::Point)? }
                }
                _ => return Err(Weakness::Point),
            },
            Private::Ed25519(key) => {
                let x = key.public_key().as_ref().try_into().map_err(|_| Weakness::Refused)?;
                Material::Ed25519 { x }
            }
            Private::Rsa(key) => {
                let public = key.public_key();
                Material::Rsa {
                    n: public.modulus().big_endian_without_leading_zero().to_vec(),
                    e: public.exponent().big_endian_without_leading_zero().to_vec(),
                }
            }
        };
        Ok(SigningKey { private, public: PublicKey::new(material)? })
    }

    pub fn algorithm(&self) -> Algorithm {
        self.public.algorithm()
    }

    pub fn public_key(&self) -> &PublicKey {
        &self.public
    }

    /// PKCS#8 version 1 in DER, to be sealed.
    pub fn to_pkcs8(&self) -> Result<Zeroizing<Vec<u8>>, Failed> {
        // The library wipes what it returns.
        let copy = |der: &[u8]| Zeroizing::new(der.to_vec());
        match &self.private {
            Private::P256(key) => key.to_pkcs8v1().map(|der| copy(der.as_ref())),
            Private::Ed25519(key) => key.to_pkcs8v1().map(|der| copy(der.as_ref())),
            Private::Rsa(key) => AsDer::<Pkcs8V1Der<'_>>::as_der(&**key).map(|der| copy(der.as_ref())),
        }
        .map_err(|_| Failed)
    }

    /// Signs a message as the key's algorithm does.
    pub fn sign(&self, message: &[u8]) -> Result<Vec<u8>, Failed> {
        let random = SystemRandom::new();
        match &self.private {
            Private::P256(key) => key.sign(&random, message).map(|signature| signature.as_ref().to_vec()),
            Private::Ed25519(key) => key.try_sign(message).map(|signature| signature.as_ref().to_vec()),
            Private::Rsa(key) => {
                let mut signature = vec![0; key.public_modulus_len()];
                key.sign(&RSA_PKCS1_SHA256, &random, message, &mut signature).map(|()| signature)
            }
        }
        .map_err(|_| Failed)
    }
}

/// Whether a SEQUENCE in DER ends where the bytes end.
fn is_one_sequence(der: &[u8]) -> bool {
    match *der {
        [0x30, length @ ..=0x7f, ref content @ ..] => content.len() == usize::from(length),
        [0x30, 0x81, length, ref content @ ..] => content.len() == usize::from(length),
        [0x30, 0x82, high, low, ref content @ ..] => {
            content.len() == usize::from(u16::from_be_bytes([high, low]))
        }
        _ => false,
    }
}

impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SigningKey").field(&self.public).finish()
    }
}
