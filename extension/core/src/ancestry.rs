//! What an access token of ours came of, and ends with: the claims `root` and `from`.
//!
//! A token that was exchanged, or that a service account got for its secret, must not outlive what it came of. So it names
//! that, and each verification looks at all of it. The list is flat and bounded: a token that came of another one repeats
//! what that one names.
//!
//! Times are microseconds since 1970-01-01 00:00 UTC.

use std::fmt::Write as _;

use crate::claims::{Claims, MAX_TIME};
use crate::json::{Json, Object, quote};
use crate::malformed::Fault;

/// How many a token names at most, beside its root: each costs a verification a look-up.
pub const MAX: usize = 16;

const SECOND: i64 = 1_000_000;

/// A uuid.
pub type Id = [u8; 16];

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ancestry {
    /// `root`: the API token that it came of, on which its uses are counted.
    pub root: Option<Id>,
    /// `from`: what else it ends with, at most [`MAX`].
    pub from: Vec<Ancestor>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ancestor {
    /// `jti`: an access token of ours. It ends when that is revoked.
    AccessToken(Id),
    /// A token of a trusted issuer.
    Foreign(Foreign),
    /// `sid`: a session, beside the token's own.
    Session(Id),
    /// `tok`: an API token, beside the root, such as that of an actor.
    ApiToken(Id),
    /// `usr` and `rev`: a user, beside the token's own, with the mark that the user had.
    User { id: String, mark: Option<i64> },
    /// `kid`: a key of ours that signed another of these, where it is not the token's own.
    Key(String),
}

/// `iss`, `jti`, `iat`, `kid` and `terms`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Foreign {
    pub issuer: String,
    /// Under which it is listed when it is revoked.
    pub jti: String,
    /// In whole seconds.
    pub issued_at: i64,
    /// The key of the issuer that signed it.
    pub kid: String,
    /// A digest of how the issuer was trusted then (`Rules::digest`): with other terms it might not be accepted.
    pub terms: String,
}

impl Ancestry {
    /// Reads the claims of a token. What is not understood is refused, since the token might end with it.
    pub fn of(claims: &Claims) -> Result<Ancestry, Fault> {
        let root = match claims.text("root")? {
            None => None,
            Some(root) => Some(id_of(root).ok_or(Fault::Claim)?),
        };
        let from = match claims.get("from") {
            None => Vec::new(),
            Some(Json::List(list)) if (1..=MAX).contains(&list.len()) => {
                let all: Option<Vec<Ancestor>> =
                    list.iter().map(|one| one.as_object().and_then(Ancestor::of)).collect();
                all.ok_or(Fault::Claim)?
            }
            Some(_) => return Err(Fault::Claim),
        };
        Ok(Ancestry { root, from })
    }

    pub fn is_empty(&self) -> bool {
        self.root.is_none() && self.from.is_empty()
    }

    /// False if there is no room for one more.
    #[must_use]
    pub fn add(&mut self, ancestor: Ancestor) -> bool {
        if self.from.contains(&ancestor) {
            return true;
        }
        let is_room = self.from.len() < MAX;
        if is_room {
            self.from.push(ancestor);
        }
        is_room
    }

    /// The claims of a token that the key of this kid signs, as further members of an object: empty, or from a comma on.
    pub fn members(&self, kid: &str) -> String {
        let mut members = String::new();
        if let Some(root) = &self.root {
            let _ = write!(members, r#","root":"{}""#, text_of(root));
        }
        let is_of_others = |one: &&Ancestor| !matches!(one, Ancestor::Key(other) if other == kid);
        let from: Vec<String> = self.from.iter().filter(is_of_others).map(Ancestor::to_json).collect();
        if !from.is_empty() {
            let _ = write!(members, r#","from":[{}]"#, from.join(","));
        }
        members
    }
}

impl Ancestor {
    fn of(object: &Object) -> Option<Ancestor> {
        let text = |name: &str| object.get(name)?.as_text().map(str::to_owned);
        let id = |name: &str| id_of(object.get(name)?.as_text()?);
        let integer = |name: &str| {
            if let Json::Number(number) = object.get(name)? { number.as_i64() } else { None }
        };
        let names: Vec<&str> = object.keys().map(String::as_str).collect();
        Some(match names[..] {
            ["jti"] => Ancestor::AccessToken(id("jti")?),
            ["iat", "iss", "jti", "kid", "terms"] => Ancestor::Foreign(Foreign {
                issuer: text("iss")?,
                jti: text("jti")?,
                issued_at: integer("iat").filter(|iat| (0..=MAX_TIME).contains(iat))? * SECOND,
                kid: text("kid")?,
                terms: text("terms")?,
            }),
            ["sid"] => Ancestor::Session(id("sid")?),
            ["tok"] => Ancestor::ApiToken(id("tok")?),
            ["usr"] => Ancestor::User { id: text("usr")?, mark: None },
            ["rev", "usr"] => Ancestor::User { id: text("usr")?, mark: Some(integer("rev")?) },
            ["kid"] => Ancestor::Key(text("kid")?),
            _ => return None,
        })
    }

    fn to_json(&self) -> String {
        match self {
            Ancestor::AccessToken(jti) => format!(r#"{{"jti":"{}"}}"#, text_of(jti)),
            Ancestor::Foreign(Foreign { issuer, jti, issued_at, kid, terms }) => format!(
                r#"{{"iss":{},"jti":{},"iat":{},"kid":{},"terms":{}}}"#,
                quote(issuer),
                quote(jti),
                issued_at.div_euclid(SECOND),
                quote(kid),
                quote(terms)
            ),
            Ancestor::Session(id) => format!(r#"{{"sid":"{}"}}"#, text_of(id)),
            Ancestor::ApiToken(id) => format!(r#"{{"tok":"{}"}}"#, text_of(id)),
            Ancestor::User { id, mark: None } => format!(r#"{{"usr":{}}}"#, quote(id)),
            Ancestor::User { id, mark: Some(mark) } => format!(r#"{{"usr":{},"rev":{mark}}}"#, quote(id)),
            Ancestor::Key(kid) => format!(r#"{{"kid":{}}}"#, quote(kid)),
        }
    }
}

/// A uuid in the one way in which we write it (RFC 9562 §4), with small letters.
fn id_of(text: &str) -> Option<Id> {
    let bytes = text.as_bytes();
    let is_hyphen = |at: usize| matches!(at, 8 | 13 | 18 | 23);
    if bytes.len() != 36 || (0..36).any(|at| is_hyphen(at) != (bytes[at] == b'-')) {
        return None;
    }
    let digit = |byte: u8| match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    };
    let digits: Option<Vec<u8>> =
        bytes.iter().filter(|&&byte| byte != b'-').map(|&byte| digit(byte)).collect();
    let digits = digits?;
    let mut id = [0; 16];
    for (byte, pair) in id.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = pair[0] << 4 | pair[1];
    }
    Some(id)
}

fn text_of(id: &Id) -> String {
    let mut text = String::with_capacity(36);
    for (at, byte) in id.iter().enumerate() {
        if matches!(at, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        let _ = write!(text, "{byte:02x}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "0192d2f4-6c1e-7abc-8def-0123456789ab";

    fn read(members: &str) -> Result<Ancestry, Fault> {
        Ancestry::of(&Claims::parse(format!("{{{}}}", members.trim_start_matches(','))).unwrap())
    }

    fn id() -> Id {
        id_of(TEXT).unwrap()
    }

    fn foreign() -> Ancestor {
        Ancestor::Foreign(Foreign {
            issuer: "https://\"idp\"".to_owned(),
            jti: "j".to_owned(),
            issued_at: 1_700_000_000 * SECOND,
            kid: "k".to_owned(),
            terms: "0011".to_owned(),
        })
    }

    fn one_of_each() -> Vec<Ancestor> {
        vec![
            Ancestor::AccessToken(id()),
            foreign(),
            Ancestor::Session(id()),
            Ancestor::ApiToken(id()),
            Ancestor::User { id: "service:\\a".to_owned(), mark: None },
            Ancestor::User { id: "ann".to_owned(), mark: Some(7) },
            Ancestor::Key("other".to_owned()),
        ]
    }

    #[test]
    fn what_is_written_is_read_back() {
        let all = Ancestry { root: Some(id()), from: one_of_each() };
        assert_eq!(read(&all.members("own")), Ok(all.clone()));
        assert_eq!(read(&Ancestry::default().members("own")), Ok(Ancestry::default()));
        assert_eq!(Ancestry::default().members("own"), "");
        // The key that signs the token is looked at anyway.
        let keys = Ancestry { root: None, from: vec![Ancestor::Key("own".to_owned())] };
        assert_eq!(keys.members("own"), "");
        assert_eq!(read(&keys.members("new")), Ok(keys));
        assert_eq!(text_of(&id()), TEXT);
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        let seventeen = vec![format!(r#"{{"sid":"{TEXT}"}}"#); MAX + 1].join(",");
        for members in [
            r#""root":7"#,
            r#""root":"7""#,
            &format!(r#""root":"{}""#, TEXT.to_uppercase()),
            &format!(r#""root":"{}""#, TEXT.replace('-', "")),
            &format!(r#""root":"{}""#, TEXT.replace("-7", "7-")),
            &format!(r#""root":"{}""#, TEXT.replace('d', "g")),
            r#""from":{}"#,
            r#""from":[]"#,
            r#""from":null"#,
            r#""from":["jti"]"#,
            r#""from":[{}]"#,
            r#""from":[{"new":"x"}]"#,
            r#""from":[{"jti":"x"}]"#,
            &format!(r#""from":[{{"jti":"{TEXT}","new":1}}]"#),
            &format!(r#""from":[{{"sid":"{TEXT}","tok":"{TEXT}"}}]"#),
            r#""from":[{"usr":7}]"#,
            r#""from":[{"usr":"ann","rev":"7"}]"#,
            r#""from":[{"usr":"ann","rev":1.5}]"#,
            r#""from":[{"rev":7}]"#,
            r#""from":[{"iss":"i","jti":"j","iat":-1,"kid":"k","terms":"t"}]"#,
            r#""from":[{"iss":"i","jti":"j","iat":253402300800,"kid":"k","terms":"t"}]"#,
            r#""from":[{"iss":"i","jti":"j"}]"#,
            &format!(r#""from":[{seventeen}]"#),
        ] {
            assert_eq!(read(members), Err(Fault::Claim), "{members}");
        }
    }

    #[test]
    fn the_list_is_bounded_and_names_each_once() {
        let mut ancestry = Ancestry::default();
        for n in 0..u8::try_from(MAX).unwrap() {
            assert!(ancestry.add(Ancestor::Session([n; 16])));
            assert!(ancestry.add(Ancestor::Session([n; 16])));
        }
        assert_eq!(ancestry.from.len(), MAX);
        assert!(!ancestry.add(Ancestor::Session([99; 16])));
        assert!(ancestry.add(Ancestor::Session([0; 16])));
        assert_eq!(ancestry.from.len(), MAX);
    }
}
