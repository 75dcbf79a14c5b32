//! Fetches the key set of a trusted issuer: from the address that was given, or the one that its discovery document names
//! (OpenID Connect Discovery 1.0 §4). What is in a set is judged by the database, which stores it.

mod headers;

use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{ACCEPT, CONNECTION};
use hyper::{Method, StatusCode};
use ipnet::IpNet;
use serde::Deserialize;
use tollgate_core::jwk::MAX_SET_LEN;

use crate::outbound;
use crate::outbound::{Client, Plain, Rules};
use crate::process::duration;

/// From the look-up of the name to the last byte of the last document.
pub const DEADLINE: Duration = Duration::from_secs(5);

/// A key set as the issuer serves it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeySet {
    pub text: String,
    /// How long it may be kept, if the issuer says so.
    pub max_age: Option<Duration>,
}

#[derive(Clone, Debug)]
pub struct Fetcher(Client);

impl Fetcher {
    /// With networks beyond the public ones that may be asked.
    pub fn new(allowed: &[IpNet]) -> Self {
        Self(Client::new(Rules::new(allowed, "--issuer-allow", Plain::Loopback)))
    }

    /// Takes no longer than [`DEADLINE`]. The reason of a failure is a sentence in our own words: it repeats nothing that the
    /// issuer sent.
    pub async fn fetch(&self, issuer: &str, jwks_url: Option<&str>) -> Result<KeySet, String> {
        tokio::time::timeout(DEADLINE, self.try_fetch(issuer, jwks_url))
            .await
            .unwrap_or_else(|_| Err(format!("no whole answer within {}", duration::text(DEADLINE))))
    }

    async fn try_fetch(&self, issuer: &str, jwks_url: Option<&str>) -> Result<KeySet, String> {
        let address = match jwks_url {
            Some(address) => address.to_owned(),
            None => {
                let document = self.get(&discovery_address(issuer)).await;
                let found = document.and_then(|(text, _)| jwks_uri(&text, issuer));
                found.map_err(|why| format!("the discovery document: {why}"))?
            }
        };
        let (text, max_age) = self.get(&address).await.map_err(|why| format!("the key set: {why}"))?;
        Ok(KeySet { text, max_age })
    }

    /// A JSON document, and how long its server says that it may be kept.
    async fn get(&self, address: &str) -> Result<(String, Option<Duration>), String> {
        let url = outbound::parse(address)?;
        let request = outbound::request(Method::GET, &url)
            .header(ACCEPT, "application/json, application/jwk-set+json")
            .header(CONNECTION, "close")
            .body(Full::<Bytes>::default())
            .map_err(|_| "the address cannot be asked for".to_owned())?;
        let (head, body) = self.0.send(&url, request, Some(MAX_SET_LEN)).await?.into_parts();
        match head.status {
            StatusCode::OK => {}
            status if status.is_redirection() => {
                return Err(format!(
                    "the issuer answered {}, and redirects are not followed",
                    status.as_u16()
                ));
            }
            status => return Err(format!("the issuer answered {}", status.as_u16())),
        }
        if !headers::is_json(&head.headers) {
            return Err("the answer is not of a JSON content type".to_owned());
        }
        if !headers::is_plain(&head.headers) {
            return Err("the answer is compressed, which was not asked for".to_owned());
        }
        let text = String::from_utf8(body.into()).map_err(|_| "the answer is not UTF-8".to_owned())?;
        Ok((text, headers::max_age(&head.headers)))
    }
}

fn discovery_address(issuer: &str) -> String {
    format!("{}/.well-known/openid-configuration", issuer.strip_suffix('/').unwrap_or(issuer))
}

/// The address of the key set, from a document that is of this issuer and no other (§4.3): else one issuer could
/// make another's keys its own.
fn jwks_uri(document: &str, issuer: &str) -> Result<String, String> {
    #[derive(Deserialize)]
    struct Discovered {
        issuer: String,
        jwks_uri: String,
    }
    let found: Discovered = serde_json::from_str(document)
        .map_err(|_| "it is not a JSON object with the texts \"issuer\" and \"jwks_uri\"".to_owned())?;
    if found.issuer == issuer {
        return Ok(found.jwks_uri);
    }
    let bare = |issuer: &str| issuer.trim_end_matches('/').to_owned();
    Err(match bare(&found.issuer) == bare(issuer) {
        true => "its \"issuer\" differs from the trusted one by the slash at the end",
        false => "its \"issuer\" is another one than the trusted one",
    }
    .to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_discovery_document_is_found_below_the_issuer() {
        for (issuer, address) in [
            ("https://a.example", "https://a.example/.well-known/openid-configuration"),
            ("https://a.example/", "https://a.example/.well-known/openid-configuration"),
            ("https://a.example/realms/x", "https://a.example/realms/x/.well-known/openid-configuration"),
        ] {
            assert_eq!(discovery_address(issuer), address);
        }
    }

    #[test]
    fn a_discovery_document_must_be_of_exactly_this_issuer() {
        const ISSUER: &str = "https://a.example";
        let found = |text: &str| jwks_uri(text, ISSUER);
        let good = r#"{"issuer": "https://a.example", "jwks_uri": "https://keys.example/", "other": [1]}"#;
        assert_eq!(found(good), Ok("https://keys.example/".to_owned()));
        for (text, words) in [
            (r#"{"issuer": "https://b.example", "jwks_uri": "https://a.example/"}"#, "another one"),
            (r#"{"issuer": "https://A.example", "jwks_uri": "https://a.example/"}"#, "another one"),
            (r#"{"issuer": "https://a.example/", "jwks_uri": "https://a.example/"}"#, "slash"),
            (r#"{"issuer": "https://a.example"}"#, "jwks_uri"),
            (r#"{"issuer": "https://a.example", "jwks_uri": null}"#, "jwks_uri"),
            // The last of two would be a matter of taste.
            (
                r#"{"issuer": "https://b.example", "issuer": "https://a.example", "jwks_uri": "https://a.example/"}"#,
                "jwks_uri",
            ),
            ("[]", "jwks_uri"),
            ("<html>", "jwks_uri"),
        ] {
            let why = found(text).unwrap_err();
            assert!(why.contains(words), "{text}: {why}");
            assert!(!why.contains("b.example"), "it repeats what was sent: {why}");
        }
    }
}
