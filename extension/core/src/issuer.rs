//! What comes of a token of a trusted issuer: which user, which scopes, and until when. The issuer decides within bounds
//! that it cannot leave; its signature is checked elsewhere.
//!
//! Names of claims are paths: `sub`, `realm_access.roles`, `https://example.com/roles`. A dot may be a part of a name or
//! lead into an object. A token in which a path could be read in both ways is refused, so that none who can add a claim
//! to a token can hide another one.
//!
//! Times are microseconds since 1970-01-01 00:00 UTC.

use crate::claims::Claims;
use crate::json::{Json, Object};
use crate::jws::Header;
use crate::scope;
use crate::service;
use crate::status::Code;
use crate::token;

/// The most characters of a user id, with the prefix.
pub const MAX_USER_ID: usize = 255;
/// Length of the longest path in bytes.
pub const MAX_PATH: usize = 128;

/// The types that are accepted where none is configured: RFC 9068, RFC 7519, and none at all.
const USUAL_TYPES: [&str; 3] = ["at+jwt", "JWT", ""];

/// How an issuer is trusted.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rules {
    /// What the user ids of this issuer begin with.
    pub user_prefix: String,
    /// Where that is empty: the prefixes of the other issuers.
    pub other_prefixes: Vec<String>,
    /// A token must be for one of these.
    pub audience: Vec<String>,
    /// The accepted types in the header; "" is none. `None` for the usual ones.
    pub types: Option<Vec<String>>,
    /// The path of the claim that names the user.
    pub user_claim: String,
    /// The paths of the claims that name scopes: words with spaces between them, or a list. Without any, each token has
    /// all that may come of one.
    pub scope_claims: Vec<String>,
    /// The scopes that may come of a token.
    pub scopes: Vec<String>,
    /// Claims by path, and the value that each must have.
    pub required: Object,
    /// How long after `iat` a token is accepted at most.
    pub max_lifetime: i64,
}

/// Why nothing comes of a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Its type is none that is accepted.
    Type,
    /// A claim is missing, of the wrong type, or ambiguous.
    Claim,
    /// It names no user, or one whom this issuer may not name.
    User,
    /// A claim does not have the value that is required.
    Required,
}

/// What comes of a token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapped {
    pub user_id: String,
    pub scopes: Vec<String>,
    /// When it is over, but for the leeway.
    pub end: i64,
}

impl Rules {
    pub fn map(&self, header: &Header, claims: &Claims) -> Result<Mapped, Fault> {
        if !self.accepts_type(header) {
            return Err(Fault::Type);
        }
        for (path, value) in &self.required {
            if claim(claims, path)? != Some(value) {
                return Err(Fault::Required);
            }
        }
        Ok(Mapped { user_id: self.user_id(claims)?, scopes: self.scopes(claims)?, end: self.end(claims)? })
    }

    fn accepts_type(&self, header: &Header) -> bool {
        let accepts = |accepted: &str| match accepted {
            "" => header.typ.is_none(),
            one => header.is_type(one),
        };
        match &self.types {
            Some(types) => types.iter().any(|one| accepts(one)),
            None => USUAL_TYPES.into_iter().any(accepts),
        }
    }

    fn user_id(&self, claims: &Claims) -> Result<String, Fault> {
        let name = claim(claims, &self.user_claim)?.and_then(Json::as_text).ok_or(Fault::User)?;
        // An address that was not verified is anyone's.
        if is_email(&self.user_claim) && claims.get("email_verified") != Some(&Json::Bool(true)) {
            return Err(Fault::User);
        }
        self.user_named(name).ok_or(Fault::User)
    }

    /// The user id of a name that the issuer gives; `None` for one that it may not give.
    pub fn user_named(&self, name: &str) -> Option<String> {
        let user_id = format!("{}{name}", self.user_prefix);
        let is_allowed = !name.trim().is_empty()
            && user_id.chars().count() <= MAX_USER_ID
            && !token::contains_secret(&user_id)
            && !self.other_prefixes.iter().any(|other| user_id.starts_with(other))
            // Whatever the prefix is.
            && service::id_of(&user_id).is_none();
        is_allowed.then_some(user_id)
    }

    /// A digest of all of this: with another one a token could be refused, or something else come of it.
    pub fn digest(&self) -> String {
        // Each text in quotation marks, and each field by its name.
        let digest = token::digest(format!("{self:?}").as_bytes());
        digest[..8].iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Those that the token names and that are allowed, in the order of the token.
    fn scopes(&self, claims: &Claims) -> Result<Vec<String>, Fault> {
        if self.scope_claims.is_empty() {
            return Ok(self.scopes.clone());
        }
        let mut scopes: Vec<String> = Vec::new();
        for path in &self.scope_claims {
            let named = match claim(claims, path)? {
                None => Vec::new(),
                Some(Json::Text(words)) => words.split(' ').collect(),
                Some(value) => value.as_texts().ok_or(Fault::Claim)?,
            };
            for scope in named {
                if self.allows(scope) && !scopes.iter().any(|known| known == scope) {
                    scopes.push(scope.to_owned());
                }
            }
        }
        Ok(scopes)
    }

    /// A wildcard of a token is allowed by one that covers it.
    fn allows(&self, scope: &str) -> bool {
        scope::any_grants(self.scopes.iter().map(String::as_bytes), scope.as_bytes())
    }

    /// A token without `iat` could be of any age, and one without `exp` would never end.
    fn end(&self, claims: &Claims) -> Result<i64, Fault> {
        let (exp, iat) = (claims.exp().ok_or(Fault::Claim)?, claims.iat().ok_or(Fault::Claim)?);
        Ok(exp.min(iat.saturating_add(self.max_lifetime)))
    }

    /// Whether the token is valid at this time.
    pub fn check_times(&self, claims: &Claims, now: i64, leeway: i64) -> Result<(), Code> {
        claims.check_times(now, leeway)?;
        let end = self.end(claims).map_err(|_| Code::Malformed)?;
        if end.saturating_add(leeway) <= now { Err(Code::Expired) } else { Ok(()) }
    }

    pub fn is_for(&self, claims: &Claims) -> bool {
        claims.aud().any(|one| self.audience.iter().any(|expected| expected == one))
    }
}

/// Whether a token may have been issued before this time. `iat` has whole seconds in most tokens, and comes from a clock
/// that may be ahead by the leeway.
pub fn is_cut_off(issued_at: Option<i64>, cut_off: i64, leeway: i64) -> bool {
    const SECOND: i64 = 1_000_000;
    let second = cut_off.saturating_add(SECOND - 1).div_euclid(SECOND).saturating_mul(SECOND);
    issued_at.is_none_or(|iat| iat <= second.saturating_add(leeway))
}

/// The first of these paths at which there is another value, none, or more than one.
pub fn unmet<'r>(claims: &Claims, required: &'r Object) -> Option<&'r str> {
    required
        .iter()
        .find(|(path, value)| claim(claims, path) != Ok(Some(value)))
        .map(|(path, _)| path.as_str())
}

/// Whether a path may be configured.
pub fn is_path(path: &str) -> bool {
    (1..=MAX_PATH).contains(&path.len()) && !path.contains(|c: char| c.is_control() || c.is_whitespace())
}

fn is_email(path: &str) -> bool {
    path.rsplit('.').next() == Some("email")
}

/// The claim at a path.
fn claim<'c>(claims: &'c Claims, path: &str) -> Result<Option<&'c Json>, Fault> {
    let mut found = Vec::new();
    readings(claims.members(), path, &mut found);
    match found[..] {
        [] => Ok(None),
        [one] => Ok(Some(one)),
        _ => Err(Fault::Claim),
    }
}

/// Each way to read a path. A member is looked at once at most, since only one series of names leads to it.
fn readings<'j>(object: &'j Object, path: &str, found: &mut Vec<&'j Json>) {
    found.extend(object.get(path));
    for (at, _) in path.match_indices('.') {
        if let Some(inner) = object.get(&path[..at]).and_then(Json::as_object) {
            readings(inner, &path[at + 1..], found);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::json;
    use crate::jws::Algorithm;

    const SECOND: i64 = 1_000_000;

    fn rules() -> Rules {
        Rules {
            user_prefix: "idp:".to_owned(),
            audience: vec!["api".to_owned()],
            user_claim: "sub".to_owned(),
            scope_claims: vec!["scope".to_owned(), "realm_access.roles".to_owned()],
            scopes: vec!["posts:*".to_owned(), "users:read".to_owned()],
            max_lifetime: 100 * SECOND,
            ..Rules::default()
        }
    }

    fn claims(members: &str) -> Claims {
        let text = format!(r#"{{"exp":1000,"iat":500{members}}}"#);
        Claims::parse(text.clone()).unwrap_or_else(|fault| panic!("{text}: {fault}"))
    }

    fn header(typ: Option<&str>) -> Header {
        Header { alg: Algorithm::Es256, kid: None, typ: typ.map(str::to_owned) }
    }

    fn map(rules: &Rules, members: &str) -> Result<Mapped, Fault> {
        rules.map(&header(None), &claims(members))
    }

    fn user(rules: &Rules, members: &str) -> Result<String, Fault> {
        map(rules, members).map(|mapped| mapped.user_id)
    }

    fn scopes(rules: &Rules, members: &str) -> Result<Vec<String>, Fault> {
        map(rules, &format!(r#","sub":"ann"{members}"#)).map(|mapped| mapped.scopes)
    }

    #[test]
    fn a_user_is_the_prefix_and_the_claim_as_it_is() {
        let mut rules = rules();
        assert_eq!(user(&rules, r#","sub":"ann""#), Ok("idp:ann".to_owned()));
        assert_eq!(user(&rules, r#","sub":"Ann""#), Ok("idp:Ann".to_owned()), "case counts");
        assert_eq!(user(&rules, r#","sub":" é ""#), Ok("idp: é ".to_owned()));
        let longest = "é".repeat(MAX_USER_ID - 4);
        assert!(user(&rules, &format!(r#","sub":"{longest}""#)).is_ok());
        for none in ["", r#","sub":"""#, r#","sub":"  ""#, &format!(r#","sub":"{longest}x""#)] {
            assert_eq!(user(&rules, none), Err(Fault::User), "{none}");
        }
        assert_eq!(user(&rules, &format!(r#","sub":"{}""#, "0a".repeat(40))), Err(Fault::User));
        rules.user_claim = "oid".to_owned();
        assert_eq!(user(&rules, r#","sub":"ann","oid":"7""#), Ok("idp:7".to_owned()));
        for other in ["", r#","oid":7"#, r#","oid":["7"]"#, r#","oid":null"#, r#","OID":"7""#] {
            assert_eq!(user(&rules, &format!(r#","sub":"ann"{other}"#)), Err(Fault::User), "{other}");
        }
    }

    #[test]
    fn other_terms_have_another_digest() {
        let (known, mut others) = (rules(), vec![rules(); 4]);
        assert_eq!(rules().digest(), known.digest());
        others[0].user_prefix = "idp".to_owned();
        others[1].scopes.pop();
        others[2].max_lifetime -= 1;
        others[3].required.insert("a".to_owned(), Json::Null);
        assert!(others.iter().all(|other| other.digest() != known.digest()));
    }

    #[test]
    fn the_issuer_without_a_prefix_names_no_user_of_another() {
        let rules = Rules {
            user_prefix: String::new(),
            other_prefixes: vec!["idp:".to_owned(), "gh/".to_owned()],
            ..rules()
        };
        assert_eq!(user(&rules, r#","sub":"ann""#), Ok("ann".to_owned()));
        assert_eq!(user(&rules, r#","sub":"IDP:ann""#), Ok("IDP:ann".to_owned()));
        for other in ["idp:ann", "idp:", "gh/ann"] {
            assert_eq!(user(&rules, &format!(r#","sub":"{other}""#)), Err(Fault::User), "{other}");
        }
    }

    #[test]
    fn no_issuer_names_a_service_account() {
        for (prefix, sub) in [("", "service:ci"), ("serv", "ice:ci"), ("service:", "ci"), ("", "service:")] {
            let rules = Rules { user_prefix: prefix.to_owned(), ..rules() };
            assert_eq!(user(&rules, &format!(r#","sub":"{sub}""#)), Err(Fault::User), "{prefix} {sub}");
        }
        let rules = Rules { user_prefix: String::new(), ..rules() };
        assert_eq!(user(&rules, r#","sub":"services:ci""#), Ok("services:ci".to_owned()));
    }

    #[test]
    fn an_address_names_a_user_only_if_it_was_verified() {
        for (claim, before, after) in [("email", "", ""), ("contact.email", r#""contact":{"#, "}")] {
            let rules = Rules { user_claim: claim.to_owned(), ..rules() };
            for (verified, is_good) in [
                (r#","email_verified":true"#, true),
                (r#","email_verified":false"#, false),
                (r#","email_verified":"true""#, false),
                (r#","email_verified":1"#, false),
                ("", false),
            ] {
                let answer = user(&rules, &format!(r#",{before}"email":"a@b.c"{after}{verified}"#));
                assert_eq!(answer.is_ok(), is_good, "{claim} {verified}: {answer:?}");
            }
        }
    }

    #[test]
    fn scopes_are_those_of_the_token_that_are_allowed() {
        let all = rules();
        for (members, expected) in [
            ("", &[][..]),
            (r#","scope":"posts:read users:read  posts:read""#, &["posts:read", "users:read"]),
            (r#","scope":"posts:a:b posts:* posts users:* users:write *""#, &["posts:a:b", "posts:*"]),
            (r#","scope":["posts:read","users:read posts:write"]"#, &["posts:read"]),
            (r#","realm_access":{"roles":["users:read","Posts:Read","admin"]}"#, &["users:read"]),
            (r#","scope":"admin tollgate:tokens tollgate:* posts:read""#, &["posts:read"]),
            (r#","scope":"","realm_access":{}"#, &[]),
        ] {
            assert_eq!(scopes(&all, members).unwrap(), expected, "{members}");
        }
        let fixed = Rules { scope_claims: Vec::new(), ..rules() };
        assert_eq!(scopes(&fixed, r#","scope":"admin""#).unwrap(), ["posts:*", "users:read"]);
        for wrong in [
            r#","scope":1"#,
            r#","scope":null"#,
            r#","scope":{"a":"posts:read"}"#,
            r#","scope":["posts:read",1]"#,
            r#","realm_access":{"roles":[[]]}"#,
        ] {
            assert_eq!(scopes(&all, wrong), Err(Fault::Claim), "{wrong}");
        }
    }

    #[test]
    fn all_power_comes_from_outside_only_where_it_was_named() {
        let with = |ceiling: &[&str]| {
            let ceiling = ceiling.iter().map(|&one| one.to_owned()).collect();
            let rules = Rules { scopes: ceiling, ..rules() };
            scopes(&rules, r#","scope":"admin tollgate:tokens posts:read""#).unwrap()
        };
        assert_eq!(with(&[]), [""; 0]);
        assert_eq!(with(&["admin"]), ["admin", "posts:read"]);
        assert_eq!(with(&["tollgate:tokens"]), ["tollgate:tokens"]);
        assert_eq!(with(&["tollgate:*"]), ["tollgate:tokens"]);
        assert_eq!(with(&["admin", "tollgate:tokens"]), ["admin", "tollgate:tokens", "posts:read"]);
    }

    #[test]
    fn a_path_is_read_in_one_way_or_not_at_all() {
        let read = |path: &str, members: &str| claim(&claims(members), path).map(Option::<&Json>::cloned);
        let text = |text: &str| Ok(Some(Json::Text(text.to_owned())));
        for (path, members, expected) in [
            ("a.b", r#","a":{"b":"x"}"#, text("x")),
            ("a.b", r#","a.b":"x""#, text("x")),
            ("a.b", r#","a.b":"x","a":{"b":"y"}"#, Err(Fault::Claim)),
            ("a.b", r#","a.b":"x","a":{"c":"y"}"#, text("x")),
            ("a.b", r#","a":"x""#, Ok(None)),
            ("a.b.c", r#","a.b":{"c":"x"}"#, text("x")),
            ("a.b.c", r#","a.b":{"c":"x"},"a":{"b":{"c":"x"}}"#, Err(Fault::Claim)),
            ("kubernetes.io.pod.name", r#","kubernetes.io":{"pod":{"name":"x"}}"#, text("x")),
            ("https://a.b/roles", r#","https://a.b/roles":"x""#, text("x")),
            ("A", r#","a":"x""#, Ok(None)),
        ] {
            assert_eq!(read(path, members), expected, "{path} of {members}");
        }
        let many = "a.".repeat(60) + "a";
        assert_eq!(read(&many, r#","a":{"a":{"a":1}},"a.a":{"a.a":{}}"#), Ok(None));
        for path in ["sub", "a.b", "https://a/b"] {
            assert!(is_path(path), "{path}");
        }
        for path in ["", "a b", "a\n", &"x".repeat(MAX_PATH + 1)] {
            assert!(!is_path(path), "{path:?}");
        }
    }

    #[test]
    fn a_required_claim_has_exactly_the_value() {
        let required =
            json::parse_object(r#"{"repository_id":"74","ok":true,"n":12,"k.ns":"prod"}"#).unwrap();
        let rules = Rules { required, ..rules() };
        let good = r#","sub":"a","repository_id":"74","ok":true,"n":12,"k":{"ns":"prod"}"#;
        assert!(map(&rules, good).is_ok());
        for (from, to) in [
            (r#""74""#, r#""740""#),
            (r#""74""#, "74"),
            (r#""74""#, r#"["74"]"#),
            (r#""ok":true"#, r#""ok":"true""#),
            (r#""n":12"#, r#""n":12.0"#),
            (r#""n":12"#, r#""n":12.00000000000000000001"#),
            (r#""n":12"#, r#""m":12"#),
            ("prod", "Prod"),
        ] {
            assert_eq!(map(&rules, &good.replace(from, to)), Err(Fault::Required), "{to}");
        }
    }

    #[test]
    fn the_first_condition_that_is_not_met_is_named() {
        let required = json::parse_object(r#"{"a":"1","b.c":true,"d":7}"#).unwrap();
        let of = |members: &str| unmet(&claims(members), &required).map(str::to_owned);
        assert_eq!(of(r#","a":"1","b":{"c":true},"d":7"#), None);
        for (members, path) in [
            ("", "a"),
            (r#","a":1,"b":{"c":true},"d":7"#, "a"),
            (r#","a":["1"],"b":{"c":true},"d":7"#, "a"),
            (r#","a":"1","b":{"c":"true"},"d":7"#, "b.c"),
            // Two readings.
            (r#","a":"1","b":{"c":true},"b.c":true,"d":7"#, "b.c"),
            (r#","a":"1","b":{"c":true},"d":"7""#, "d"),
        ] {
            assert_eq!(of(members).as_deref(), Some(path), "{members}");
        }
        assert_eq!(unmet(&claims(""), &Object::new()), None);
    }

    #[test]
    fn the_type_is_a_usual_one_or_one_that_was_named() {
        let accepted = |types: Option<&[&str]>, typ: Option<&str>| {
            let types = types.map(|types| types.iter().map(|&one| one.to_owned()).collect());
            let claims = claims(r#","sub":"ann""#);
            match (Rules { types, ..rules() }).map(&header(typ), &claims) {
                Ok(_) => true,
                Err(fault) => {
                    assert_eq!(fault, Fault::Type);
                    false
                }
            }
        };
        for typ in [None, Some("JWT"), Some("jwt"), Some("at+jwt"), Some("application/at+jwt")] {
            assert!(accepted(None, typ), "{typ:?}");
        }
        for typ in ["logout+jwt", "secevent+jwt", "dpop+jwt", "", "JWS"] {
            assert!(!accepted(None, Some(typ)), "{typ:?}");
        }
        assert!(accepted(Some(&["at+jwt"]), Some("at+jwt")) && !accepted(Some(&["at+jwt"]), Some("JWT")));
        assert!(!accepted(Some(&["at+jwt"]), None) && accepted(Some(&["at+jwt", ""]), None));
    }

    #[test]
    fn a_token_ends_with_its_age_and_needs_a_time_of_issue() {
        let rules = rules();
        let at = |now: i64, leeway: i64| rules.check_times(&claims(""), now * SECOND, leeway * SECOND);
        assert_eq!(map(&rules, r#","sub":"ann""#).unwrap().end, 600 * SECOND, "before its exp");
        assert_eq!([at(500, 0), at(599, 0), at(629, 30)], [Ok(()); 3]);
        assert_eq!([at(600, 0), at(630, 30)], [Err(Code::Expired); 2]);
        assert_eq!([at(499, 0), at(469, 30)], [Err(Code::NotYetValid); 2]);
        assert_eq!(at(470, 30), Ok(()));
        let long = Rules { max_lifetime: 1000 * SECOND, ..rules.clone() };
        assert_eq!(map(&long, r#","sub":"ann""#).unwrap().end, 1000 * SECOND);
        for members in [r#"{"exp":1000,"sub":"ann"}"#, r#"{"iat":500,"sub":"ann"}"#] {
            let claims = Claims::parse(members.to_owned()).unwrap();
            assert_eq!(rules.map(&header(None), &claims), Err(Fault::Claim), "{members}");
            assert!(rules.check_times(&claims, 550 * SECOND, 0).is_err(), "{members}");
        }
    }

    #[test]
    fn a_cut_off_is_rounded_up_and_allows_for_a_clock_that_is_ahead() {
        let issued = claims("");
        for (cut_off, leeway, is_cut_off_then) in [
            (499 * SECOND, 0, false),
            (499 * SECOND + 1, 0, true),
            (500 * SECOND, 0, true),
            (470 * SECOND, 30, true),
            (469 * SECOND, 30, false),
            (i64::MAX, 30, true),
            (i64::MIN, 30, false),
        ] {
            assert_eq!(
                is_cut_off(issued.iat(), cut_off, leeway * SECOND),
                is_cut_off_then,
                "{cut_off} {leeway}"
            );
        }
        assert!(is_cut_off(None, 0, 0), "of an unknown age");
    }

    #[test]
    fn an_audience_is_one_of_those_that_are_expected() {
        let rules = Rules { audience: vec!["a".to_owned(), "b".to_owned()], ..rules() };
        for (aud, is_for) in [
            ("", false),
            (r#","aud":"b""#, true),
            (r#","aud":["x","a"]"#, true),
            (r#","aud":["x","A",""]"#, false),
        ] {
            assert_eq!(rules.is_for(&claims(aud)), is_for, "{aud}");
        }
        assert!(!Rules { audience: Vec::new(), ..rules }.is_for(&claims(r#","aud":"b""#)));
    }
}
