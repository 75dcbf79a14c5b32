//! The claims of a signed token (RFC 7519 §4), with the types that the RFC gives them.
//!
//! Times are microseconds since 1970-01-01 00:00 UTC.

use crate::json::{self, Json, Number, Object};
use crate::malformed::Fault;
use crate::status::Code;

/// The latest time, in seconds: the end of the year 9999.
pub const MAX_TIME: i64 = 253_402_300_799;

/// The payload of a token. The claims that RFC 7519 registers have the right types, or are absent.
#[derive(Clone, Debug, PartialEq)]
pub struct Claims {
    text: String,
    members: Object,
}

impl Claims {
    pub fn parse(text: String) -> Result<Claims, Fault> {
        let claims = Claims { members: json::parse_object(&text)?, text };
        for name in ["iss", "sub", "jti"] {
            claims.text(name)?;
        }
        for name in ["exp", "nbf", "iat"] {
            claims.time(name)?;
        }
        match claims.members.get("aud") {
            None | Some(Json::Text(_)) => {}
            // An empty list would be a token without an audience, which is easily taken for one for every audience.
            Some(Json::List(list)) if !list.is_empty() && list.iter().all(|one| one.as_text().is_some()) => {}
            Some(_) => return Err(Fault::Claim),
        }
        Ok(claims)
    }

    /// The JSON as it was signed.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    pub fn members(&self) -> &Object {
        &self.members
    }

    pub fn get(&self, name: &str) -> Option<&Json> {
        self.members.get(name)
    }

    /// A claim that must be a text where it is present.
    pub fn text(&self, name: &str) -> Result<Option<&str>, Fault> {
        self.members.get(name).map(|value| value.as_text().ok_or(Fault::Claim)).transpose()
    }

    /// A claim that must be an integer where it is present.
    pub fn integer(&self, name: &str) -> Result<Option<i64>, Fault> {
        let integer = |value: &Json| if let Json::Number(number) = value { number.as_i64() } else { None };
        self.members.get(name).map(|value| integer(value).ok_or(Fault::Claim)).transpose()
    }

    /// A claim that must be a NumericDate where it is present: seconds since 1970, which may have a fraction, not
    /// negative and not beyond [`MAX_TIME`].
    pub fn time(&self, name: &str) -> Result<Option<i64>, Fault> {
        let time = |value: &Json| if let Json::Number(number) = value { microseconds(number) } else { None };
        self.members.get(name).map(|value| time(value).ok_or(Fault::Claim)).transpose()
    }

    pub fn iss(&self) -> Option<&str> {
        self.members.get("iss")?.as_text()
    }

    pub fn sub(&self) -> Option<&str> {
        self.members.get("sub")?.as_text()
    }

    pub fn jti(&self) -> Option<&str> {
        self.members.get("jti")?.as_text()
    }

    /// The audiences, whether they were written as one text or as a list.
    pub fn aud(&self) -> impl Iterator<Item = &str> {
        let aud = self.members.get("aud");
        let list = if let Some(Json::List(list)) = aud { list } else { &[][..] };
        aud.and_then(Json::as_text).into_iter().chain(list.iter().filter_map(Json::as_text))
    }

    pub fn exp(&self) -> Option<i64> {
        self.time("exp").ok().flatten()
    }

    pub fn nbf(&self) -> Option<i64> {
        self.time("nbf").ok().flatten()
    }

    pub fn iat(&self) -> Option<i64> {
        self.time("iat").ok().flatten()
    }

    pub fn client_id(&self) -> Result<Option<&str>, Fault> {
        self.text("client_id")
    }

    pub fn sid(&self) -> Result<Option<&str>, Fault> {
        self.text("sid")
    }

    /// The scopes: words with spaces between them (RFC 8693 §4.2).
    pub fn scope(&self) -> Result<impl Iterator<Item = &str>, Fault> {
        let scope = self.text("scope")?.unwrap_or_default();
        Ok(scope.split(' ').filter(|word| !word.is_empty()))
    }

    /// Whether the token is valid at this time. A token without `exp` would never end and is malformed; it ends at
    /// `exp`, not after it. `leeway` is for the clocks of others and is 0 for tokens of our own.
    pub fn check_times(&self, now: i64, leeway: i64) -> Result<(), Code> {
        let exp = self.exp().ok_or(Code::Malformed)?;
        if exp.saturating_add(leeway) <= now {
            return Err(Code::Expired);
        }
        let is_to_come = |time: Option<i64>| time.is_some_and(|time| time.saturating_sub(leeway) > now);
        if is_to_come(self.nbf()) || is_to_come(self.iat()) { Err(Code::NotYetValid) } else { Ok(()) }
    }
}

fn microseconds(seconds: &Number) -> Option<i64> {
    const MICROSECONDS: i64 = 1_000_000;
    if let Some(whole) = seconds.as_i64() {
        return (0..=MAX_TIME).contains(&whole).then(|| whole * MICROSECONDS);
    }
    // A double has enough digits for microseconds until the year 2255, and for hundredths of seconds after it.
    let seconds = seconds.as_f64()?;
    #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation)]
    (0.0..=MAX_TIME as f64).contains(&seconds).then(|| (seconds * MICROSECONDS as f64).round() as i64)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: i64 = 1_000_000;

    fn claims(text: &str) -> Claims {
        Claims::parse(text.to_owned()).unwrap_or_else(|fault| panic!("{text}: {fault}"))
    }

    #[test]
    fn claims_are_read_with_their_types() {
        let text = r#"{"iss":"https://a","sub":"ann","aud":["x","y"],"exp":100,"nbf":1.5,"iat":0,"jti":"j",
            "scope":"a:b  c","client_id":"c","sid":"s","generation":9223372036854775807,"own":{"a":[null]}}"#;
        let all = claims(text);
        assert_eq!([all.iss(), all.sub(), all.jti()], [Some("https://a"), Some("ann"), Some("j")]);
        assert_eq!(all.aud().collect::<Vec<_>>(), ["x", "y"]);
        assert_eq!([all.exp(), all.nbf(), all.iat()], [Some(100 * SECOND), Some(1_500_000), Some(0)]);
        assert_eq!(all.scope().unwrap().collect::<Vec<_>>(), ["a:b", "c"]);
        assert_eq!([all.client_id(), all.sid()], [Ok(Some("c")), Ok(Some("s"))]);
        assert_eq!(all.integer("generation"), Ok(Some(i64::MAX)));
        assert!(matches!(all.get("own"), Some(Json::Object(_))));
        assert_eq!(all.as_str(), text);

        let none = claims("{}");
        assert_eq!([none.iss(), none.sub(), none.jti()], [None; 3]);
        assert_eq!([none.exp(), none.nbf(), none.iat()], [None; 3]);
        assert_eq!((none.aud().count(), none.scope().unwrap().count()), (0, 0));
        assert_eq!(claims(r#"{"aud":"x"}"#).aud().collect::<Vec<_>>(), ["x"]);
    }

    #[test]
    fn a_registered_claim_of_another_type_is_refused() {
        let other =
            ["null", "true", "1", "-1", r#""x""#, r#""1""#, "[]", r#"["x"]"#, "[1]", r#"["x",null]"#, "{}"];
        let allowed: [(&str, &[&str]); 7] = [
            ("iss", &[r#""x""#, r#""1""#]),
            ("sub", &[r#""x""#, r#""1""#]),
            ("jti", &[r#""x""#, r#""1""#]),
            ("aud", &[r#""x""#, r#""1""#, r#"["x"]"#]),
            ("exp", &["1"]),
            ("nbf", &["1"]),
            ("iat", &["1"]),
        ];
        for (name, allowed) in allowed {
            for value in other {
                let parsed = Claims::parse(format!(r#"{{"{name}":{value}}}"#));
                assert_eq!(
                    parsed.err(),
                    (!allowed.contains(&value)).then_some(Fault::Claim),
                    "{name}: {value}"
                );
            }
        }
        let wrong = claims(r#"{"scope":["a"],"client_id":1,"sid":null,"n":1.5}"#);
        assert!(wrong.scope().is_err());
        assert_eq!([wrong.client_id(), wrong.sid()], [Err(Fault::Claim); 2]);
        assert_eq!(wrong.integer("n"), Err(Fault::Claim));
    }

    #[test]
    fn a_time_is_a_number_of_seconds_within_its_range() {
        for (value, expected) in [
            ("0", Some(0)),
            ("-0", Some(0)),
            ("0.0000004", Some(0)),
            ("1700000000.123456", Some(1_700_000_000_123_456)),
            ("1.7e9", Some(1_700_000_000 * SECOND)),
            ("253402300799", Some(MAX_TIME * SECOND)),
            ("253402300799.5", None),
            ("253402300800", None),
            ("9223372036854775807", None),
            ("18446744073709551615", None),
            ("1e300", None),
            ("-0.1", None),
            ("-1", None),
            ("-9223372036854775808", None),
        ] {
            let parsed = Claims::parse(format!(r#"{{"exp":{value}}}"#));
            assert_eq!(parsed.ok().and_then(|claims| claims.exp()), expected, "{value}");
        }
    }

    #[test]
    fn times_are_compared_at_their_boundaries_and_with_leeway() {
        let at = |text: &str, now, leeway| claims(text).check_times(now, leeway);
        let token = r#"{"iat":10,"nbf":20,"exp":30}"#;
        for (now, leeway, expected) in [
            (20 * SECOND, 0, Ok(())),
            (20 * SECOND - 1, 0, Err(Code::NotYetValid)),
            (30 * SECOND - 1, 0, Ok(())),
            (30 * SECOND, 0, Err(Code::Expired)),
            (15 * SECOND, 5 * SECOND, Ok(())),
            (15 * SECOND - 1, 5 * SECOND, Err(Code::NotYetValid)),
            (35 * SECOND - 1, 5 * SECOND, Ok(())),
            (35 * SECOND, 5 * SECOND, Err(Code::Expired)),
            (0, i64::MAX, Ok(())),
            (i64::MAX, 0, Err(Code::Expired)),
        ] {
            assert_eq!(at(token, now, leeway), expected, "{now} {leeway}");
        }
        assert_eq!(at(r#"{"iat":11,"exp":30}"#, 10 * SECOND, 0), Err(Code::NotYetValid));
        assert_eq!(at(r#"{"iat":1,"nbf":2}"#, 10 * SECOND, 0), Err(Code::Malformed));
    }
}
