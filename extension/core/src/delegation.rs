//! Who acts for a user (RFC 8693 §4.1) and who may (§4.4): the claims `act` and `may_act`.
//!
//! Actors are named as users are here, so that an issuer's actor is never taken for one of ours or of another issuer's.
//! Only the outermost one acts; those inside it say how the token came to it, and decide nothing.

use crate::json::{Json, Object, quote};
pub use crate::service::PREFIX as SERVICE;
use crate::token;

/// How many actors a token names at most.
pub const MAX_DEPTH: usize = 8;
/// The most characters of a name.
const MAX_NAME: usize = 255;

/// The actors of a token, by user id, the outermost first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chain(Vec<String>);

impl Chain {
    /// Reads a claim `act`. `user_id` is what a `sub` of that issuer is here, where an actor names one; `None` refuses it.
    /// `None` for one that is deeper, or none.
    pub fn parse(act: &Json, user_id: impl Fn(Option<&str>, &str) -> Option<String>) -> Option<Chain> {
        let mut chain = Vec::new();
        let mut next = Some(act);
        while let Some(act) = next {
            let act = act.as_object()?;
            let issuer = act.get("iss").map(|iss| iss.as_text().ok_or(())).transpose().ok()?;
            let sub = user_id(issuer, act.get("sub")?.as_text()?)?;
            let is_name = (1..=MAX_NAME).contains(&sub.chars().count()) && !token::contains_secret(&sub);
            if chain.len() >= MAX_DEPTH || !is_name {
                return None;
            }
            chain.push(sub);
            next = act.get("act");
        }
        Some(Chain(chain))
    }

    /// With one more actor, to whom those before have led; `None` if there are too many.
    pub fn led_to(mut self, actor: &str) -> Option<Chain> {
        self.0.insert(0, actor.to_owned());
        (self.0.len() <= MAX_DEPTH).then_some(self)
    }

    /// The claim; `None` without an actor.
    pub fn to_json(&self) -> Option<String> {
        self.0.iter().rev().fold(None, |inner: Option<String>, actor| {
            let mut act = format!(r#"{{"sub":{}"#, quote(actor));
            if let Some(client_id) = actor.strip_prefix(SERVICE) {
                act.push_str(&format!(r#","client_id":{}"#, quote(client_id)));
            }
            if let Some(inner) = inner {
                act.push_str(&format!(r#","act":{inner}"#));
            }
            act.push('}');
            Some(act)
        })
    }
}

/// Who may act for the user: one party, as its issuer names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MayAct {
    pub issuer: String,
    pub sub: String,
}

impl MayAct {
    /// Reads a claim `may_act` of a token of this issuer. `None` for one that says more than who: then no actor is known
    /// to be meant.
    pub fn parse(may_act: &Json, issuer: &str) -> Option<MayAct> {
        let members: &Object = may_act.as_object()?;
        if members.keys().any(|name| name != "iss" && name != "sub") {
            return None;
        }
        let issuer = match members.get("iss") {
            None => issuer,
            Some(issuer) => issuer.as_text()?,
        };
        Some(MayAct { issuer: issuer.to_owned(), sub: members.get("sub")?.as_text()?.to_owned() })
    }

    /// Whether it is this party.
    pub fn is(&self, issuer: &str, sub: &str) -> bool {
        self.issuer == issuer && self.sub == sub
    }

    /// The claim, as one of any issuer's.
    pub fn to_json(&self) -> String {
        format!(r#"{{"iss":{},"sub":{}}}"#, quote(&self.issuer), quote(&self.sub))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::json::parse;

    fn chain(act: &str) -> Option<Chain> {
        Chain::parse(&parse(act).unwrap(), |issuer, sub| issuer.is_none().then(|| format!("idp:{sub}")))
    }

    fn nested(depth: usize) -> String {
        let mut act = String::from(r#"{"sub":"0"}"#);
        for n in 1..depth {
            act = format!(r#"{{"sub":"{n}","act":{act}}}"#);
        }
        act
    }

    #[test]
    fn actors_are_named_as_users_are_and_nest() {
        // Nothing but the names is kept: another issuer's client is none of ours.
        let two = chain(r#"{"sub":"b","client_id":"b","act":{"sub":"\"a"}}"#).unwrap();
        assert_eq!(two.to_json().as_deref(), Some(r#"{"sub":"idp:b","act":{"sub":"idp:\"a"}}"#));
        let three = two.led_to("service:c").unwrap().to_json().unwrap();
        assert!(three.starts_with(r#"{"sub":"service:c","client_id":"c","act":{"sub":"idp:b""#), "{three}");
        assert_eq!(Chain::default().to_json(), None);
    }

    #[test]
    fn a_chain_is_bounded_and_each_actor_has_a_name() {
        let most = chain(&nested(MAX_DEPTH)).unwrap();
        assert_eq!(most.led_to("one more"), None);
        assert!(chain(&nested(MAX_DEPTH - 1)).unwrap().led_to("the last").is_some());
        let long = "x".repeat(MAX_NAME);
        for act in [
            &nested(MAX_DEPTH + 1),
            "{}",
            "[]",
            r#""a""#,
            r#"{"sub":7}"#,
            r#"{"sub":"a","iss":"https://other"}"#,
            r#"{"sub":"a","iss":null}"#,
            r#"{"sub":"a","act":{"sub":null}}"#,
            r#"{"sub":"a","act":null}"#,
            &format!(r#"{{"sub":"{long}"}}"#),
        ] {
            assert_eq!(chain(act), None, "{act}");
        }
    }

    #[test]
    fn the_party_that_may_act_is_of_an_issuer() {
        let read = |text: &str| MayAct::parse(&parse(text).unwrap(), "https://idp");
        let one = read(r#"{"sub":"b"}"#).unwrap();
        assert!(
            one.is("https://idp", "b") && !one.is("https://tollgate", "b") && !one.is("https://idp", "B")
        );
        let other = read(r#"{"sub":"b","iss":"https://tollgate"}"#).unwrap();
        assert!(other.is("https://tollgate", "b") && !other.is("https://idp", "b"));
        assert_eq!(read(&other.to_json()), Some(other));
        for text in [
            "{}",
            "[]",
            r#"{"sub":1}"#,
            r#"{"iss":"i"}"#,
            r#"{"sub":"b","iss":1}"#,
            r#"{"sub":"b","client_id":"b"}"#,
        ] {
            assert_eq!(read(text), None, "{text}");
        }
    }
}
