//! The rules for the fields of a service account, and of a workload that it trusts.

use crate::access::{issue, issuer_fields};
use crate::error::Error;
use crate::guc;
use crate::pg::datum::TextArray;
use crate::tokens::fields;
use pgrx::datum::Interval;
use pgrx::pg_sys::Datum;
use tollgate_core::service;

const MAX_NAME: usize = 100;
const MAX_DESCRIPTION: usize = 1000;
const MAX_OWNER: usize = 255;

pub(crate) fn id(given: Option<&str>) -> Result<&str, Error> {
    const HINT: &str = "Choose 1 to 63 of a-z, 0-9, \"_\", \".\" and \"-\", beginning with a letter or a digit: it is the client_id.";
    let value = given.unwrap_or_default();
    fields::without_token("id", value.as_bytes())?;
    if service::is_id(value) {
        return Ok(value);
    }
    let offence =
        if given.is_none() { "which is NULL" } else { "which has other characters, or another length" };
    Err(Error::argument("id", "this is no id of a service account", offence, HINT))
}

pub(crate) fn name(given: Option<&str>) -> Result<(), Error> {
    let hint = "Say what the account is for, so that people recognise it in a list.";
    match given.filter(|name| !name.trim().is_empty()) {
        Some(name) => text("name", Some(name), MAX_NAME, hint),
        None => Err(Error::argument(
            "name",
            "a service account needs a name",
            "which is NULL, empty or blank",
            hint,
        )),
    }
}

pub(crate) fn description(given: Option<&str>) -> Result<(), Error> {
    text("description", given, MAX_DESCRIPTION, "Shorten it, or put a link to a document there.")
}

pub(crate) fn owner(given: Option<&str>) -> Result<(), Error> {
    const HINT: &str = "Name the team or the person who is asked about the account.";
    if given.is_some_and(|owner| owner.trim().is_empty()) {
        return Err(Error::argument("owner", "an owner has a name", "which is empty or blank", HINT));
    }
    text("owner", given, MAX_OWNER, HINT)
}

pub(crate) fn audience(given: Option<TextArray<'_>>) -> Result<(), Error> {
    given.map_or(Ok(()), |given| issue::audience(Some(given)).map(drop))
}

pub(crate) fn lifetime(given: Option<Interval>) -> Result<(), Error> {
    issue::lifetime(given).map(drop)
}

/// What the token of a workload must say.
pub(crate) fn conditions(given: Option<Datum>) -> Result<(), Error> {
    let conditions = issuer_fields::claims("conditions", given)?;
    if conditions > 0 {
        return Ok(());
    }
    Err(Error::argument(
        "conditions",
        "a workload is trusted by at least one condition",
        "which has none",
        "Name claims that distinguish it from all others of the issuer, such as {\"repository_id\": \"74\"}.",
    ))
}

pub(crate) fn workload_audience(given: Option<&str>) -> Result<(), Error> {
    let Some(given) = given else { return Ok(()) };
    fields::without_token("audience", given.as_bytes())?;
    if guc::is_identifier(given) {
        return Ok(());
    }
    Err(Error::argument(
        "audience",
        "this is no audience",
        "which is no URL or other name of 1 to 255 visible ASCII characters",
        "Name the value of the claim aud that the tokens of this workload have, or leave it out for those of its issuer.",
    ))
}

fn text(argument: &str, given: Option<&str>, most: usize, hint: &str) -> Result<(), Error> {
    let Some(given) = given else { return Ok(()) };
    fields::without_token(argument, given.as_bytes())?;
    match given.chars().count() {
        length if length > most => Err(Error::argument(
            argument,
            format!("the {argument} of a service account has at most {most} characters"),
            &format!("of {length} characters"),
            hint,
        )),
        _ => Ok(()),
    }
}
