//! What a client's assertion must say (RFC 7523 section 3, RFC 7521 section 5.2): a token that a service account signs with a
//! key of its own to prove who it is. Its signature, and that it was not used before, are checked elsewhere.
//!
//! Times are microseconds since 1970-01-01 00:00 UTC.

use std::fmt;

use crate::claims::Claims;
use crate::issuer::is_cut_off;
use crate::jws::Header;
use crate::status::Code;
use crate::token;

/// How far ahead an assertion may end: one that leaks is of no use for long.
pub const LONGEST: i64 = 300 * 1_000_000;
/// Length of the longest `jti` in characters.
pub const MAX_JTI: usize = 255;

/// The types that are accepted: RFC 7519, the one that RFC 7523 is being updated to require, and none at all. Not those of
/// other tokens, which a client may hand to others.
const TYPES: [&str; 2] = ["JWT", "client-authentication+jwt"];

/// What an assertion is compared with.
#[derive(Clone, Copy, Debug)]
pub struct Expected<'a> {
    pub client_id: &'a str,
    /// The name of the one that it is presented to, which must be its only audience.
    pub audience: &'a str,
    pub now: i64,
    /// How far the client's clock may be from ours.
    pub leeway: i64,
    /// Those that may have been issued before this are refused, because it may be unknown here that they were used.
    pub accepts_from: Option<i64>,
}

/// What is kept of a good one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Assertion {
    pub jti: String,
    /// When it is over, but for the leeway.
    pub end: i64,
}

/// The first claim, or part of the header, that is missing or wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    Typ,
    Iss,
    Sub,
    Aud,
    Exp,
    Expired,
    /// It ends later than [`LONGEST`] allows.
    TooLong,
    Iat,
    NotYetValid,
    /// It may have been used where that is not known any more.
    FromBefore,
    Jti,
}

impl Fault {
    pub fn as_str(self) -> &'static str {
        match self {
            Fault::Typ => "typ is one of another token",
            Fault::Iss => "iss is not the client",
            Fault::Sub => "sub is not the client",
            Fault::Aud => "aud is not the issuer alone",
            Fault::Exp => "exp is missing",
            Fault::Expired => "exp has passed",
            Fault::TooLong => "exp is more than 5 minutes ahead",
            Fault::Iat => "iat is missing",
            Fault::NotYetValid => "iat or nbf lies ahead",
            Fault::FromBefore => "iat is from before this server was promoted or restored",
            Fault::Jti => "jti is missing or too long",
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// Checks everything but the signature, and whether it was used.
pub fn check(header: &Header, claims: &Claims, expected: &Expected<'_>) -> Result<Assertion, Fault> {
    if header.typ.is_some() && !TYPES.into_iter().any(|one| header.is_type(one)) {
        return Err(Fault::Typ);
    }
    if claims.iss() != Some(expected.client_id) {
        return Err(Fault::Iss);
    }
    if claims.sub() != Some(expected.client_id) {
        return Err(Fault::Sub);
    }
    // One that is also for another could be presented here by that one.
    let mut audiences = claims.aud();
    if audiences.next() != Some(expected.audience) || audiences.next().is_some() {
        return Err(Fault::Aud);
    }
    let end = claims.exp().ok_or(Fault::Exp)?;
    claims.iat().ok_or(Fault::Iat)?;
    match claims.check_times(expected.now, expected.leeway) {
        Ok(()) => {}
        Err(Code::Expired) => return Err(Fault::Expired),
        Err(_) => return Err(Fault::NotYetValid),
    }
    if end.saturating_sub(expected.leeway) > expected.now.saturating_add(LONGEST) {
        return Err(Fault::TooLong);
    }
    if expected.accepts_from.is_some_and(|from| is_cut_off(claims.iat(), from, expected.leeway)) {
        return Err(Fault::FromBefore);
    }
    let is_good = |jti: &&str| (1..=MAX_JTI).contains(&jti.chars().count()) && !token::contains_secret(jti);
    let jti = claims.jti().filter(is_good).ok_or(Fault::Jti)?;
    Ok(Assertion { jti: jti.to_owned(), end })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::jws::Algorithm;

    const SECOND: i64 = 1_000_000;
    const NOW: i64 = 1_000_000 * SECOND;
    const ISSUER: &str = "https://tollgate.test";

    fn header(typ: Option<&str>) -> Header {
        Header { alg: Algorithm::Es256, kid: None, typ: typ.map(str::to_owned) }
    }

    fn expected() -> Expected<'static> {
        Expected { client_id: "ci", audience: ISSUER, now: NOW, leeway: 30 * SECOND, accepts_from: None }
    }

    /// A good one with this text replaced by another one.
    fn with(from: &str, to: &str) -> Result<Assertion, Fault> {
        with_expected(from, to, &expected())
    }

    fn with_expected(from: &str, to: &str, expected: &Expected<'_>) -> Result<Assertion, Fault> {
        let good =
            r#"{"iss":"ci","sub":"ci","aud":"https://tollgate.test","exp":1000060,"iat":1000000,"jti":"1"}"#;
        assert!(good.contains(from), "{from}");
        let text = good.replacen(from, to, 1);
        let claims = Claims::parse(text.clone()).unwrap_or_else(|fault| panic!("{text}: {fault}"));
        check(&header(Some("JWT")), &claims, expected)
    }

    #[test]
    fn a_good_one_gives_what_makes_it_single() {
        let good = Assertion { jti: "1".to_owned(), end: NOW + 60 * SECOND };
        assert_eq!(with("", ""), Ok(good.clone()));
        assert_eq!(with(r#""https://tollgate.test""#, r#"["https://tollgate.test"]"#), Ok(good.clone()));
        let claims = Claims::parse(
            r#"{"iss":"ci","sub":"ci","aud":"https://tollgate.test","exp":1000060,"iat":1000000,"jti":"1"}"#
                .to_owned(),
        )
        .unwrap();
        for typ in [None, Some("jwt"), Some("client-authentication+jwt")] {
            assert_eq!(check(&header(typ), &claims, &expected()), Ok(good.clone()), "{typ:?}");
        }
        for typ in ["at+jwt", "logout+jwt", "dpop+jwt", ""] {
            assert_eq!(check(&header(Some(typ)), &claims, &expected()), Err(Fault::Typ), "{typ}");
        }
    }

    #[test]
    fn each_claim_must_be_there_and_be_right() {
        for (from, to, fault) in [
            (r#""iss":"ci","#, "", Fault::Iss),
            (r#""iss":"ci""#, r#""iss":"cj""#, Fault::Iss),
            (r#""iss":"ci""#, r#""iss":"service:ci""#, Fault::Iss),
            (r#""sub":"ci","#, "", Fault::Sub),
            (r#""sub":"ci""#, r#""sub":"admin""#, Fault::Sub),
            (r#""aud":"https://tollgate.test","#, "", Fault::Aud),
            (r#""https://tollgate.test""#, r#""https://tollgate.test/""#, Fault::Aud),
            (r#""https://tollgate.test""#, r#"["https://tollgate.test","https://b"]"#, Fault::Aud),
            (r#""https://tollgate.test""#, r#"["https://b","https://tollgate.test"]"#, Fault::Aud),
            (
                r#""https://tollgate.test""#,
                r#"["https://tollgate.test","https://tollgate.test"]"#,
                Fault::Aud,
            ),
            (r#""exp":1000060,"#, "", Fault::Exp),
            (r#""iat":1000000,"#, "", Fault::Iat),
            (r#","jti":"1""#, "", Fault::Jti),
            (r#""jti":"1""#, r#""jti":"""#, Fault::Jti),
        ] {
            assert_eq!(with(from, to), Err(fault), "{to} for {from}");
        }
        let long = |length: usize| with(r#""jti":"1""#, &format!(r#""jti":"{}""#, "é".repeat(length)));
        assert!(long(MAX_JTI).is_ok());
        assert_eq!(long(MAX_JTI + 1), Err(Fault::Jti));
        assert_eq!(with(r#""jti":"1""#, &format!(r#""jti":"{}""#, "0a".repeat(40))), Err(Fault::Jti));
    }

    #[test]
    fn its_times_are_compared_at_their_boundaries() {
        let exp = |at: i64| with("1000060", &at.to_string()).map(|one| one.end / SECOND);
        assert_eq!([exp(999_971), exp(1_000_330)], [Ok(999_971), Ok(1_000_330)], "with the leeway");
        assert_eq!([exp(999_970), exp(1_000_331)], [Err(Fault::Expired), Err(Fault::TooLong)]);
        let iat = |at: i64| with(r#""iat":1000000"#, &format!(r#""iat":{at}"#)).map(drop);
        assert_eq!([iat(1), iat(1_000_030)], [Ok(()); 2]);
        assert_eq!(iat(1_000_031), Err(Fault::NotYetValid));
        assert_eq!(with(r#""jti""#, r#""nbf":1000031,"jti""#), Err(Fault::NotYetValid));
    }

    #[test]
    fn one_from_before_the_present_timeline_is_refused() {
        let since = |seconds: i64| {
            let expected = Expected { accepts_from: Some(NOW + seconds * SECOND), ..expected() };
            with_expected("", "", &expected).map(drop)
        };
        assert_eq!(since(-31), Ok(()));
        // The clock of the client may be ahead by the leeway.
        assert_eq!([since(-30), since(0), since(1)], [Err(Fault::FromBefore); 3]);
    }
}
