//! JSON Web Keys (RFC 7517) and their thumbprints (RFC 7638): public keys as issuers publish them, and as we do.
//!
//! A set that holds a secret is refused as a whole: its issuer has published it. A key of another kind than ours, or for
//! another purpose than verifying, is left out of a set.

use std::collections::BTreeSet;
use std::error::Error;
use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use sha2::{Digest as _, Sha256};

use crate::json::{self, Json, Object};
use crate::signature::{Algorithm, Material, PublicKey, Weakness};

/// Length of the longest set in bytes. Those of the large identity providers, with certificates, have some 20 KB.
pub const MAX_SET_LEN: usize = 256 * 1024;
/// How many keys a set may have.
pub const MAX_KEYS: usize = 256;
/// Length of the longest `kid` in bytes, in keys and in tokens.
pub const MAX_KID_LEN: usize = 256;

/// The members that only a private or a symmetric key has.
const SECRETS: [&str; 9] = ["d", "p", "q", "dp", "dq", "qi", "oth", "k", "priv"];

/// Why a JSON Web Key is not used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fault {
    /// Longer than [`MAX_SET_LEN`], or more than [`MAX_KEYS`].
    Size,
    Json(json::Fault),
    /// The member of this name is missing, or of the wrong type, length or encoding.
    Member(&'static str),
    /// It holds a private or symmetric key.
    Secret,
    /// `kty`, `crv` or `alg` is none of ours, or they do not fit each other.
    Unsupported,
    /// `use` or `key_ops` says that it is not for verifying signatures.
    Purpose,
    /// Two keys of a set have the same `kid`.
    DuplicateKid,
    Weak(Weakness),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Size => write!(f, "a key set has at most {MAX_SET_LEN} bytes and {MAX_KEYS} keys"),
            Fault::Json(json::Fault::DuplicateName) => {
                f.write_str("an object has two members of the same name")
            }
            Fault::Json(_) => f.write_str("it is not a JSON object as RFC 7517 has it"),
            Fault::Member(name) => write!(f, "the member \"{name}\" is missing or malformed"),
            Fault::Secret => {
                f.write_str("it holds a private or symmetric key, which must never be published")
            }
            Fault::Unsupported => f.write_str("it is not a key of ES256, EdDSA (Ed25519) or RS256"),
            Fault::Purpose => f.write_str("\"use\" or \"key_ops\" says that it does not verify signatures"),
            Fault::DuplicateKid => f.write_str("two keys have the same \"kid\""),
            Fault::Weak(weakness) => weakness.fmt(f),
        }
    }
}

impl Error for Fault {}

impl From<json::Fault> for Fault {
    fn from(fault: json::Fault) -> Self {
        Fault::Json(fault)
    }
}

/// A public key of a set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Jwk {
    pub kid: Option<String>,
    pub key: PublicKey,
}

impl Jwk {
    pub fn parse(text: &str) -> Result<Jwk, Fault> {
        if text.len() > MAX_SET_LEN {
            return Err(Fault::Size);
        }
        Jwk::from_object(&json::parse_object(text)?)
    }

    /// Members that we do not know are ignored, `x5c`, `x5t` and `x5u` among them: a key is trusted for where it came
    /// from, not for a certificate.
    pub fn from_object(members: &Object) -> Result<Jwk, Fault> {
        refuse_secrets(members)?;
        let kid = kid(members)?;
        // First, so that a key for encryption is known as one, whatever its algorithm.
        check_purpose(members)?;
        let algorithm = algorithm(members)?;
        let material = match algorithm {
            Algorithm::Es256 => Material::P256 { x: fixed(members, "x")?, y: fixed(members, "y")? },
            Algorithm::EdDsa => Material::Ed25519 { x: fixed(members, "x")? },
            Algorithm::Rs256 => Material::Rsa { n: bytes(members, "n")?, e: bytes(members, "e")? },
        };
        let key = PublicKey::new(material).map_err(Fault::Weak)?;
        Ok(Jwk { kid: kid.map(str::to_owned), key })
    }
}

/// A JWK Set (RFC 7517 §5).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeySet {
    pub keys: Vec<Jwk>,
    /// The keys that were left out: their `kid` and the reason.
    pub ignored: Vec<(Option<String>, Fault)>,
}

impl KeySet {
    pub fn parse(text: &str) -> Result<KeySet, Fault> {
        if text.len() > MAX_SET_LEN {
            return Err(Fault::Size);
        }
        let members = json::parse_object(text)?;
        let Some(Json::List(list)) = members.get("keys") else { return Err(Fault::Member("keys")) };
        if list.len() > MAX_KEYS {
            return Err(Fault::Size);
        }
        let (mut set, mut kids) = (KeySet { keys: Vec::new(), ignored: Vec::new() }, BTreeSet::new());
        for element in list {
            let members = element.as_object().ok_or(Fault::Member("keys"))?;
            refuse_secrets(members)?;
            match Jwk::from_object(members) {
                Ok(jwk) if jwk.kid.is_some() && !kids.insert(jwk.kid.clone()) => {
                    return Err(Fault::DuplicateKid);
                }
                Ok(jwk) => set.keys.push(jwk),
                Err(fault) => set.ignored.push((kid(members).ok().flatten().map(str::to_owned), fault)),
            }
        }
        Ok(set)
    }
}

impl PublicKey {
    /// Reads a public JSON Web Key; its `kid` is ignored.
    pub fn from_jwk(text: &str) -> Result<PublicKey, Fault> {
        Jwk::parse(text).map(|jwk| jwk.key)
    }

    /// The public JSON Web Key, with `alg` and `use`.
    pub fn to_jwk(&self, kid: &str) -> String {
        let required = self.required_members();
        // Written by hand for the order of its members, which people read.
        let required = required.trim_matches(['{', '}']);
        let (kid, alg) = (json::quote(kid), self.algorithm());
        format!(r#"{{{required},"kid":{kid},"alg":"{alg}","use":"sig"}}"#)
    }

    /// The SHA-256 thumbprint of RFC 7638, which identifies the key among all.
    pub fn thumbprint_digest(&self) -> [u8; 32] {
        Sha256::digest(self.required_members()).into()
    }

    /// The thumbprint in base64url: 43 characters.
    pub fn thumbprint(&self) -> String {
        URL_SAFE_NO_PAD.encode(self.thumbprint_digest())
    }

    /// The required members in the order of their names, without white space (RFC 7638 §3.2, RFC 8037 §2).
    fn required_members(&self) -> String {
        let encode = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
        match self.material() {
            Material::P256 { x, y } => {
                format!(r#"{{"crv":"P-256","kty":"EC","x":"{}","y":"{}"}}"#, encode(x), encode(y))
            }
            Material::Ed25519 { x } => format!(r#"{{"crv":"Ed25519","kty":"OKP","x":"{}"}}"#, encode(x)),
            Material::Rsa { n, e } => format!(r#"{{"e":"{}","kty":"RSA","n":"{}"}}"#, encode(e), encode(n)),
        }
    }
}

fn refuse_secrets(members: &Object) -> Result<(), Fault> {
    let is_symmetric = members.get("kty").and_then(Json::as_text) == Some("oct");
    if is_symmetric || SECRETS.iter().any(|&name| members.contains_key(name)) {
        return Err(Fault::Secret);
    }
    Ok(())
}

/// The text of a member, if there is one.
fn optional<'m>(members: &'m Object, name: &'static str) -> Result<Option<&'m str>, Fault> {
    members.get(name).map(|value| value.as_text().ok_or(Fault::Member(name))).transpose()
}

fn required<'m>(members: &'m Object, name: &'static str) -> Result<&'m str, Fault> {
    optional(members, name)?.ok_or(Fault::Member(name))
}

fn kid(members: &Object) -> Result<Option<&str>, Fault> {
    let kid = optional(members, "kid")?;
    if kid.is_some_and(|kid| kid.len() > MAX_KID_LEN) { Err(Fault::Member("kid")) } else { Ok(kid) }
}

/// What the key's type says; `alg` may only say the same.
fn algorithm(members: &Object) -> Result<Algorithm, Fault> {
    let algorithm = match (required(members, "kty")?, optional(members, "crv")?) {
        ("EC", Some("P-256")) => Algorithm::Es256,
        ("OKP", Some("Ed25519")) => Algorithm::EdDsa,
        ("RSA", None) => Algorithm::Rs256,
        _ => return Err(Fault::Unsupported),
    };
    match optional(members, "alg")? {
        Some(alg) if alg != algorithm.as_str() => Err(Fault::Unsupported),
        _ => Ok(algorithm),
    }
}

/// RFC 7517 §4.2 and §4.3. `sign` beside `verify` is what a careless export of a key pair says; it changes nothing.
fn check_purpose(members: &Object) -> Result<(), Fault> {
    if optional(members, "use")?.is_some_and(|purpose| purpose != "sig") {
        return Err(Fault::Purpose);
    }
    let Some(operations) = members.get("key_ops") else { return Ok(()) };
    let operations = operations.as_texts().ok_or(Fault::Member("key_ops"))?;
    let is_for_signatures = operations.iter().all(|&operation| matches!(operation, "sign" | "verify"));
    let is_unique = operations.iter().collect::<BTreeSet<_>>().len() == operations.len();
    match (is_unique, is_for_signatures && operations.contains(&"verify")) {
        (false, _) => Err(Fault::Member("key_ops")),
        (true, false) => Err(Fault::Purpose),
        (true, true) => Ok(()),
    }
}

fn bytes(members: &Object, name: &'static str) -> Result<Vec<u8>, Fault> {
    URL_SAFE_NO_PAD.decode(required(members, name)?).map_err(|_| Fault::Member(name))
}

fn fixed(members: &Object, name: &'static str) -> Result<[u8; 32], Fault> {
    bytes(members, name)?.try_into().map_err(|_| Fault::Member(name))
}
