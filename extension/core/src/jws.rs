//! JSON Web Signatures in compact serialization (RFC 7515), read strictly (RFC 8725), and signed tokens in them.
//!
//! Parsing decides nothing about trust. A verifier selects a key by issuer and `kid`, and asks
//! [`Compact::is_signed_by`]: the algorithm is the key's, and a header that names another is refused. A header cannot
//! bring a key or say where one is: `jwk`, `jku`, `x5c`, `x5u`, `x5t` are never looked at.

use std::cell::RefCell;
use std::error::Error;
use std::fmt;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

use crate::claims::Claims;
use crate::json::{self, Object};
use crate::jwk::MAX_KID_LEN;
pub use crate::malformed::Fault;
pub use crate::signature::Algorithm;
use crate::signature::{PublicKey, SigningKey};

/// Length of the longest token in bytes.
pub const MAX_LEN: usize = 8 * 1024;

/// Whether a presented value has the form of a signed token, and not of one that is looked up by its digest: two dots, and
/// the beginning that the encoding of a JSON object has.
pub fn is_signed(presented: &[u8]) -> bool {
    presented.starts_with(b"eyJ") && presented.iter().filter(|&&byte| byte == b'.').count() == 2
}

/// What is read of a header (JOSE header, RFC 7515 §4).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// What the token says that its signature is. The key decides.
    pub alg: Algorithm,
    pub kid: Option<String>,
    pub typ: Option<String>,
}

thread_local! {
    /// The header that was read last, as it was encoded: all tokens that a key signs have the same one.
    static LAST: RefCell<Option<(String, Arc<Header>)>> = const { RefCell::new(None) };
}

impl Header {
    fn decode(encoded: &str) -> Result<Arc<Header>, Fault> {
        LAST.with_borrow_mut(|last| match last {
            Some((of, header)) if of == encoded => Ok(Arc::clone(header)),
            _ => {
                let header = Arc::new(Header::parse(&decode_text(encoded)?)?);
                *last = Some((encoded.to_owned(), Arc::clone(&header)));
                Ok(header)
            }
        })
    }

    fn parse(text: &str) -> Result<Header, Fault> {
        let members = json::parse_object(text)?;
        // RFC 7515 §4.1.11; `b64` (RFC 7797) would be one of them, and is refused without being named in it too.
        if members.contains_key("crit") || members.contains_key("b64") {
            return Err(Fault::Critical);
        }
        let alg = text_of(&members, "alg")?.ok_or(Fault::Header)?;
        let kid = text_of(&members, "kid")?;
        if kid.is_some_and(|kid| kid.len() > MAX_KID_LEN) {
            return Err(Fault::Header);
        }
        Ok(Header {
            alg: Algorithm::parse(alg).ok_or(Fault::Algorithm)?,
            kid: kid.map(str::to_owned),
            typ: text_of(&members, "typ")?.map(str::to_owned),
        })
    }

    /// Whether `typ` is this media type, such as `at+jwt`: without regard to case, and `application/` may be left out
    /// (RFC 7515 §4.1.9, RFC 9068 §4).
    pub fn is_type(&self, expected: &str) -> bool {
        const PREFIX: &str = "application/";
        let Some(typ) = &self.typ else { return false };
        let typ = match typ.split_at_checked(PREFIX.len()) {
            Some((prefix, rest)) if prefix.eq_ignore_ascii_case(PREFIX) => rest,
            _ => typ,
        };
        typ.eq_ignore_ascii_case(expected)
    }
}

fn text_of<'m>(members: &'m Object, name: &str) -> Result<Option<&'m str>, Fault> {
    members.get(name).map(|value| value.as_text().ok_or(Fault::Header)).transpose()
}

/// A signature with what it signs, whatever its payload is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compact<'t> {
    pub header: Arc<Header>,
    pub payload: Vec<u8>,
    /// What was signed: the header and the payload as they were encoded, and the dot between them.
    pub signing_input: &'t [u8],
    pub signature: Vec<u8>,
}

impl<'t> Compact<'t> {
    pub fn parse(token: &'t str) -> Result<Compact<'t>, Fault> {
        if token.len() > MAX_LEN {
            return Err(Fault::Size);
        }
        let (signing_input, signature) = token.rsplit_once('.').ok_or(Fault::Parts)?;
        let (header, payload) = signing_input.split_once('.').ok_or(Fault::Parts)?;
        if header.is_empty() || signature.is_empty() || payload.contains('.') {
            return Err(Fault::Parts);
        }
        Ok(Compact {
            header: Header::decode(header)?,
            payload: decode(payload)?,
            signing_input: signing_input.as_bytes(),
            signature: decode(signature)?,
        })
    }

    /// Whether this key made the signature, by the key's algorithm, which the header must name.
    pub fn is_signed_by(&self, key: &PublicKey) -> bool {
        self.header.alg == key.algorithm() && key.verify(self.signing_input, &self.signature)
    }
}

/// A signed token (RFC 7519): a signature whose payload is an object of claims. Nothing is verified yet.
#[derive(Clone, Debug, PartialEq)]
pub struct Parsed<'t> {
    pub header: Arc<Header>,
    pub claims: Claims,
    pub signing_input: &'t [u8],
    pub signature: Vec<u8>,
}

impl Parsed<'_> {
    /// As [`Compact::is_signed_by`].
    pub fn is_signed_by(&self, key: &PublicKey) -> bool {
        self.header.alg == key.algorithm() && key.verify(self.signing_input, &self.signature)
    }
}

pub fn parse(token: &str) -> Result<Parsed<'_>, Fault> {
    let Compact { header, payload, signing_input, signature } = Compact::parse(token)?;
    if payload.is_empty() {
        return Err(Fault::Parts);
    }
    let claims = Claims::parse(String::from_utf8(payload).map_err(|_| Fault::Json)?)?;
    Ok(Parsed { header, claims, signing_input, signature })
}

/// Why nothing was signed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SignError {
    /// The token would be refused by [`parse`].
    Refused(Fault),
    Failed,
}

impl fmt::Display for SignError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SignError::Refused(Fault::Size) => write!(f, "a signed token has at most {MAX_LEN} bytes"),
            SignError::Refused(fault) => write!(f, "the claims cannot be signed: {fault}"),
            SignError::Failed => crate::signature::Failed.fmt(f),
        }
    }
}

impl Error for SignError {}

/// Signs an object of claims. What [`parse`] would refuse is not signed.
pub fn sign(key: &SigningKey, kid: &str, typ: &str, claims: &str) -> Result<String, SignError> {
    Claims::parse(claims.to_owned()).map_err(SignError::Refused)?;
    let token = sign_payload(key, kid, typ, claims.as_bytes())?;
    if token.len() > MAX_LEN {
        return Err(SignError::Refused(Fault::Size));
    }
    Ok(token)
}

fn sign_payload(key: &SigningKey, kid: &str, typ: &str, payload: &[u8]) -> Result<String, SignError> {
    if kid.len() > MAX_KID_LEN || kid.contains('\0') || typ.contains('\0') {
        return Err(SignError::Refused(Fault::Header));
    }
    let (alg, kid, typ) = (key.algorithm(), json::quote(kid), json::quote(typ));
    let mut token = URL_SAFE_NO_PAD.encode(format!(r#"{{"alg":"{alg}","kid":{kid},"typ":{typ}}}"#));
    token.push('.');
    URL_SAFE_NO_PAD.encode_string(payload, &mut token);
    let signature = key.sign(token.as_bytes()).map_err(|_| SignError::Failed)?;
    token.push('.');
    URL_SAFE_NO_PAD.encode_string(signature, &mut token);
    Ok(token)
}

/// The engine refuses padding, foreign characters, and bits after the last byte that are not zero.
fn decode(part: &str) -> Result<Vec<u8>, Fault> {
    URL_SAFE_NO_PAD.decode(part).map_err(|_| Fault::Encoding)
}

fn decode_text(part: &str) -> Result<String, Fault> {
    String::from_utf8(decode(part)?).map_err(|_| Fault::Json)
}
