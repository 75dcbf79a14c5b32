//! What the head of an answer says of its body.

use std::time::Duration;

use hyper::HeaderMap;
use hyper::header::{CACHE_CONTROL, CONTENT_ENCODING, CONTENT_TYPE};

/// `application/json`, or a type that ends with `+json` (RFC 6839 §3.1), such as `application/jwk-set+json`.
pub(super) fn is_json(headers: &HeaderMap) -> bool {
    let Some(value) = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()) else { return false };
    let kind = value.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    kind.strip_prefix("application/").is_some_and(|kind| kind == "json" || kind.ends_with("+json"))
}

/// Whether the body is as it is, and not compressed.
pub(super) fn is_plain(headers: &HeaderMap) -> bool {
    headers.get_all(CONTENT_ENCODING).iter().all(|value| value.as_bytes().eq_ignore_ascii_case(b"identity"))
}

/// How long the answer may be kept (RFC 9111 §5.2.2); `None` if that is not said.
pub(super) fn max_age(headers: &HeaderMap) -> Option<Duration> {
    let mut age = None;
    for value in headers.get_all(CACHE_CONTROL) {
        for directive in value.to_str().unwrap_or_default().split(',') {
            let directive = directive.trim().to_ascii_lowercase();
            if directive == "no-store" || directive == "no-cache" {
                return Some(Duration::ZERO);
            }
            let seconds = directive.strip_prefix("max-age=").map(|seconds| seconds.trim_matches('"'));
            age = age
                .or(seconds
                    .and_then(|seconds| Some(Duration::from_secs(seconds.parse::<u32>().ok()?.into()))));
        }
    }
    age
}

#[cfg(test)]
mod tests {
    use hyper::header::{HeaderName, HeaderValue};

    use super::*;

    fn with(name: &HeaderName, values: &[&str]) -> HeaderMap {
        let value = |value: &&str| (name.clone(), HeaderValue::from_str(value).unwrap());
        values.iter().map(value).collect()
    }

    #[test]
    fn json_has_several_names() {
        for good in [
            "application/json",
            "application/json; charset=utf-8",
            "Application/JWK-Set+JSON",
            "application/jwk-set+json;charset=utf-8",
        ] {
            assert!(is_json(&with(&CONTENT_TYPE, &[good])), "{good}");
        }
        for bad in ["text/html", "application/jsonp", "text/json", "application/octet-stream", ""] {
            assert!(!is_json(&with(&CONTENT_TYPE, &[bad])), "{bad}");
        }
        assert!(!is_json(&HeaderMap::new()));
    }

    #[test]
    fn what_is_compressed_is_seen() {
        assert!(is_plain(&HeaderMap::new()) && is_plain(&with(&CONTENT_ENCODING, &["Identity"])));
        assert!(!is_plain(&with(&CONTENT_ENCODING, &["gzip"])));
        assert!(!is_plain(&with(&CONTENT_ENCODING, &["identity", "br"])));
    }

    #[test]
    fn the_age_is_what_the_server_says() {
        for (values, age) in [
            (&["max-age=300"][..], Some(300)),
            (&["public, max-age=86400, must-revalidate"], Some(86400)),
            (&["public", "Max-Age=\"60\""], Some(60)),
            (&["max-age=300, no-cache"], Some(0)),
            (&["no-store"], Some(0)),
            (&["max-age=-1"], None),
            (&["max-age=99999999999999999999999"], None),
            (&["s-maxage=60"], None),
            (&["public"], None),
            (&[], None),
        ] {
            let headers = with(&CACHE_CONTROL, values);
            assert_eq!(max_age(&headers), age.map(Duration::from_secs), "{values:?}");
        }
    }
}
