//! A key set of another issuer, as it was given or fetched: which of its keys are stored, and what is wrong with the others.

use tollgate_core::json::quote;
use tollgate_core::jwk::{Fault, Jwk, KeySet};
use tollgate_core::token;

/// A key as it is stored.
pub(crate) struct Usable {
    pub(crate) kid: String,
    pub(crate) algorithm: &'static str,
    /// Its public members alone.
    pub(crate) jwk: String,
}

/// The keys in the order of the set; for one that is left out, what is wrong with it. A set that is refused as a whole
/// is one such text.
pub(crate) fn read(jwks: &str, algorithms: &[String]) -> Vec<Result<Usable, String>> {
    let set = match KeySet::parse(jwks) {
        Ok(set) => set,
        Err(fault) => return vec![Err(format!("the key set is refused: {fault}"))],
    };
    let usable = set.keys.iter().map(|key| usable(key, algorithms));
    // Keys for encryption belong there, and are not for us.
    let unusable = set.ignored.iter().filter(|(_, fault)| *fault != Fault::Purpose);
    let unusable = unusable.map(|(kid, fault)| Err(problem(kid.as_deref(), &fault.to_string())));
    usable.chain(unusable).collect()
}

fn usable(key: &Jwk, algorithms: &[String]) -> Result<Usable, String> {
    let kid = key.kid.as_deref().filter(|kid| !kid.is_empty());
    let algorithm = key.key.algorithm().as_str();
    match kid {
        None => Err(problem(None, "it has no \"kid\", by which tokens name it")),
        Some(kid) if token::contains_secret(kid) => Err(problem(None, "its \"kid\" looks like a token")),
        Some(kid) if !algorithms.iter().any(|one| one == algorithm) => {
            Err(problem(Some(kid), &format!("its algorithm {algorithm} is not accepted of this issuer")))
        }
        Some(kid) => Ok(Usable { kid: kid.to_owned(), algorithm, jwk: key.key.to_jwk(kid) }),
    }
}

fn problem(kid: Option<&str>, what: &str) -> String {
    match kid {
        Some(kid) => {
            let shown: String = token::redact(kid).chars().take(40).collect();
            format!("key {}: {what}", quote(&shown))
        }
        None => format!("a key: {what}"),
    }
}
