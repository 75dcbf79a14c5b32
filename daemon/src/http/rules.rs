//! What a listener accepts, and whom it believes: from its options, the same for every request.

use axum::http::HeaderValue;
use url::Url;

use super::peer::TrustedProxies;
use crate::config::ApiOptions;

/// The longest body of a request; a thousand tokens fit in. Where there is none, requests have no body.
const MAX_BODY: usize = 256 * 1024;

#[derive(Clone, Debug)]
pub struct Rules {
    pub(super) proxies: TrustedProxies,
    pub(super) token_in_query: bool,
    /// 0 where requests have none.
    pub(super) max_body: usize,
    /// The host at which clients reach this listener, if it was given.
    pub(super) public_host: Option<String>,
    /// Where RFC 9728 has the metadata of this resource, as a parameter of a challenge.
    pub(super) resource_metadata: Option<HeaderValue>,
}

impl Rules {
    /// Of the ops listener: without proxies, bodies and credentials.
    pub fn ops() -> Self {
        Self {
            proxies: TrustedProxies::none(),
            token_in_query: false,
            max_body: 0,
            public_host: None,
            resource_metadata: None,
        }
    }

    pub fn api(options: &ApiOptions) -> Self {
        let public = options.api_public_url.as_ref();
        Self {
            proxies: TrustedProxies::new(options.trusted_proxy.clone(), options.forwarded_header),
            token_in_query: options.allow_token_in_query,
            max_body: MAX_BODY,
            public_host: public.and_then(|url| url.host_str().map(str::to_owned)),
            resource_metadata: public.and_then(resource_metadata),
        }
    }
}

/// The well-known part goes between host and path (RFC 9728, section 3).
fn resource_metadata(resource: &Url) -> Option<HeaderValue> {
    let mut url = resource.clone();
    url.set_path(&format!("/.well-known/oauth-protected-resource{}", resource.path().trim_end_matches('/')));
    // A URL holds neither quotes nor backslashes: they are encoded.
    HeaderValue::from_str(&format!("resource_metadata=\"{url}\"")).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_metadata_s_well_known_part_stands_before_the_path() {
        for (public, expected) in [
            ("https://auth.example.com", "https://auth.example.com/.well-known/oauth-protected-resource"),
            ("https://example.com/a/b/", "https://example.com/.well-known/oauth-protected-resource/a/b"),
            ("http://[::1]:8080/\"", "http://[::1]:8080/.well-known/oauth-protected-resource/%22"),
        ] {
            let found = resource_metadata(&public.parse().unwrap()).unwrap();
            assert_eq!(found, format!("resource_metadata=\"{expected}\""));
        }
    }
}
