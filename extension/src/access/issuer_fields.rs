//! How an issuer may be trusted: the rules for the arguments of `trust_issuer`, except for those that need the other
//! issuers.

use crate::error::Error;
use crate::guc;
use crate::pg::datum::{self, TextArray};
use crate::tokens::fields;
use pgrx::datum::Interval;
use pgrx::pg_sys::Datum;
use tollgate_core::json::{self, Json};
use tollgate_core::jsonb::Bounds;
use tollgate_core::jws::Algorithm;
use tollgate_core::{issuer, service};

const MAX_PREFIX: usize = 64;
const MAX_LIST: usize = 16;
const MAX_TYPE: usize = 64;
const MAX_REQUIRED: usize = 32;
const REQUIRED_BOUNDS: Bounds = Bounds { bytes: 4096, depth: 2 };

const SECOND: i128 = 1_000_000;
/// As the constraint of `tollgate.issuers` has it. Revocations of users are kept for a day longer (`purge_denials`).
const LIFETIMES: core::ops::RangeInclusive<i128> = 60 * SECOND..=7 * 86_400 * SECOND;

pub(crate) fn issuer(given: Option<&str>) -> Result<(), Error> {
    const HINT: &str = "Pass the claim iss of its tokens, exactly as it is there: a URL or another name of 1 to 255 visible ASCII characters.";
    let refuse = |message: &str, offence: &str| Err(Error::argument("issuer", message, offence, HINT));
    let Some(given) = given else {
        return refuse("an issuer must be named", "which is NULL");
    };
    fields::without_token("issuer", given.as_bytes())?;
    if !guc::is_identifier(given) {
        return refuse("this is no name of an issuer", "which is empty, too long, or has other characters");
    }
    // Under these names the keys of service accounts are fetched.
    if service::id_of(given).is_some() {
        return refuse("this is no name of an issuer", "which begins with \"service:\"");
    }
    if guc::issuer() == Some(given) {
        return refuse("tokens of this issuer are our own", "which is the setting tollgate.issuer");
    }
    Ok(())
}

pub(crate) fn user_prefix(given: Option<&str>) -> Result<(), Error> {
    const HINT: &str = "Give what the user ids of this issuer begin with, such as \"auth0:\"; '' if they are the user ids of your application.";
    let refuse = |message: &str, offence: &str| Err(Error::argument("user_prefix", message, offence, HINT));
    let Some(given) = given else {
        return refuse("the users of an issuer need a prefix", "which is NULL");
    };
    fields::without_token("user_prefix", given.as_bytes())?;
    if given.chars().count() > MAX_PREFIX || given.contains(char::is_control) {
        return refuse("a prefix has at most 64 characters", "which is longer, or has control characters");
    }
    if service::could_be_named_by(given) {
        return refuse(
            "a user of this issuer could be taken for a service account",
            "with which user ids could begin with \"service:\"",
        );
    }
    Ok(())
}

pub(crate) fn audience(given: Option<TextArray<'_>>) -> Result<(), Error> {
    let rule = Rule {
        argument: "audience",
        message: "an issuer is trusted for 1 to 16 audiences",
        hint: "Name the values of the claim aud that tokens for your service have, such as https://api.example.com.",
        least: 1,
    };
    rule.check(given, guc::is_identifier)
}

pub(crate) fn user_claim(given: Option<&str>) -> Result<(), Error> {
    const HINT: &str = "Name the claim that never changes for a user and is never given to another one: sub, or the id of your provider.";
    let given = given.unwrap_or_default();
    fields::without_token("user_claim", given.as_bytes())?;
    if issuer::is_path(given) {
        return Ok(());
    }
    let message = "a claim that names the user is needed";
    Err(Error::argument("user_claim", message, "which is NULL, empty, too long, or has spaces", HINT))
}

pub(crate) fn scope_claims(given: Option<TextArray<'_>>) -> Result<(), Error> {
    let rule = Rule {
        argument: "scope_claims",
        message: "scopes come from at most 16 claims",
        hint: "Name the claims that hold scopes, such as scope or realm_access.roles; '{}' if each token has all scopes that the issuer was given.",
        least: 0,
    };
    rule.check(given, issuer::is_path)
}

pub(crate) fn algorithms(given: Option<TextArray<'_>>) -> Result<(), Error> {
    let rule = Rule {
        argument: "algorithms",
        message: "there is no such algorithm for signed tokens",
        hint: "Each is one of ES256, EdDSA and RS256.",
        least: 1,
    };
    rule.check(given, |one| Algorithm::parse(one).is_some())
}

/// NULL for the usual ones.
pub(crate) fn types(given: Option<TextArray<'_>>) -> Result<(), Error> {
    let rule = Rule {
        argument: "types",
        message: "these are not types of tokens",
        hint: "Name the values of typ in the header of its tokens, such as at+jwt, and '' for tokens without; or leave it out for at+jwt, JWT and none.",
        least: 1,
    };
    let is_type = |one: &str| one.len() <= MAX_TYPE && one.bytes().all(|b| b.is_ascii_graphic());
    given.map_or(Ok(()), |given| rule.check(Some(given), is_type))
}

pub(crate) fn required_claims(given: Option<Datum>) -> Result<(), Error> {
    claims("required_claims", given).map(drop)
}

/// Claims, by path, and the value that each must have. Returns how many there are.
pub(crate) fn claims(argument: &str, given: Option<Datum>) -> Result<usize, Error> {
    const HINT: &str =
        "Pass an object of claims and their values, such as {\"repository_id\": \"74\"}; '{}' for none.";
    let refuse = |offence: &str| {
        let message =
            format!("{} are an object of at most {MAX_REQUIRED} claims", argument.replace('_', " "));
        Err(Error::argument(argument, message, offence, HINT))
    };
    let Some(given) = given else { return refuse("which is NULL") };
    fields::json(argument, given, REQUIRED_BOUNDS, HINT)?;
    let Ok(members) = json::parse_object(&datum::json_text(given)) else {
        return refuse("which is no object");
    };
    // A number with a fraction could be written in several ways.
    let is_value = |value: &Json| match value {
        Json::Text(_) | Json::Bool(_) => true,
        Json::Number(number) => number.as_i64().is_some() || number.as_u64().is_some(),
        _ => false,
    };
    if members.len() > MAX_REQUIRED {
        return refuse("which has more");
    }
    if !members.iter().all(|(path, value)| issuer::is_path(path) && is_value(value)) {
        return refuse(
            "with a value that is no text, integer or boolean, or a name that is empty, too long or has spaces",
        );
    }
    Ok(members.len())
}

pub(crate) fn max_lifetime(given: Option<Interval>) -> Result<(), Error> {
    if given.is_some_and(|given| LIFETIMES.contains(&given.as_micros())) {
        return Ok(());
    }
    Err(Error::argument(
        "max_lifetime",
        "a token of another issuer is accepted for 1 minute to 7 days after its issue",
        "which is NULL, shorter or longer",
        "Give how long the tokens of this issuer live, such as 1 hour.",
    ))
}

/// The rule for a list.
struct Rule {
    argument: &'static str,
    message: &'static str,
    hint: &'static str,
    least: usize,
}

impl Rule {
    fn check(&self, given: Option<TextArray<'_>>, is_good: impl Fn(&str) -> bool) -> Result<(), Error> {
        let refuse = |offence: &str| Err(Error::argument(self.argument, self.message, offence, self.hint));
        let Some(given) = given else { return refuse("which is NULL") };
        if given.dimensions() > 1 || given.has_nulls() {
            return refuse("which has a NULL, or more than one dimension");
        }
        for one in given.present() {
            fields::without_token(self.argument, one)?;
        }
        if !(self.least..=MAX_LIST).contains(&given.len()) {
            return refuse("which is empty or too long");
        }
        if given.present().all(|one| is_good(&String::from_utf8_lossy(one))) {
            return Ok(());
        }
        refuse("with an element that is none")
    }
}
