//! The identity that a gateway passes on, as headers. Each of them is always set, even if it is empty: a gateway that copies
//! them all replaces each that the client made up.

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};

use crate::contract::Verified;

const USER: HeaderName = HeaderName::from_static("x-tollgate-user");
const TOKEN_ID: HeaderName = HeaderName::from_static("x-tollgate-token-id");
const SCOPES: HeaderName = HeaderName::from_static("x-tollgate-scopes");
const SESSION: HeaderName = HeaderName::from_static("x-tollgate-session");
const ISSUER: HeaderName = HeaderName::from_static("x-tollgate-issuer");

/// All but visible ASCII, and `%` and `,`, which would be ambiguous.
const ENCODED: &AsciiSet = &CONTROLS.add(b' ').add(b'%').add(b',');

/// Of a valid credential, or of none.
pub(super) fn headers(verified: Option<&Verified>) -> HeaderMap {
    let scopes =
        verified.map(|one| one.scopes.iter().map(|scope| encoded(scope)).collect::<Vec<_>>().join(","));
    let text = |text: Option<&String>| text.map(|text| encoded(text)).unwrap_or_default();
    [
        (USER, text(verified.and_then(|one| one.user_id.as_ref()))),
        (TOKEN_ID, verified.and_then(|one| one.token_id).map(|id| id.to_string()).unwrap_or_default()),
        (SCOPES, scopes.unwrap_or_default()),
        (SESSION, text(verified.and_then(|one| one.session.as_ref()))),
        (ISSUER, text(verified.and_then(|one| one.issuer.as_ref()))),
    ]
    .into_iter()
    .map(|(name, value)| (name, HeaderValue::try_from(value).unwrap_or(HeaderValue::from_static(""))))
    .collect()
}

fn encoded(text: &str) -> String {
    utf8_percent_encode(text, ENCODED).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_holds_visible_ascii_alone_and_can_be_read_back() {
        for (user, header) in [
            ("ann", "ann"),
            ("a b", "a%20b"),
            ("a,b%c", "a%2Cb%25c"),
            ("é\r\nX-Tollgate-Scopes: admin", "%C3%A9%0D%0AX-Tollgate-Scopes:%20admin"),
            ("\"~\u{7f}", "\"~%7F"),
        ] {
            let verified = Verified { user_id: Some(user.to_owned()), ..Verified::default() };
            let headers = headers(Some(&verified));
            assert_eq!(headers[USER], header);
            assert_eq!(percent_encoding::percent_decode_str(header).decode_utf8().unwrap(), user);
        }
    }

    #[test]
    fn without_an_identity_each_header_is_there_and_empty() {
        let headers = headers(None);
        assert_eq!(headers.len(), 5);
        assert!(headers.values().all(HeaderValue::is_empty));
    }
}
