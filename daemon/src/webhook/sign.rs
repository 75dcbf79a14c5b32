//! The signature of a message, after Standard Webhooks: `v1,` and the base64 of HMAC-SHA256 over id, timestamp and body.
//!
//! Not the crate `standardwebhooks` (1.0.1): for this one function it brings another implementation of HMAC-SHA256 than the one
//! that is here already, an older base64, `time` and `http`, and it states no minimum version of Rust.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;

/// One for each secret, separated by spaces: a receiver accepts the message if it knows any of them.
pub(super) fn signatures(secrets: &[Vec<u8>], id: &str, timestamp: i64, body: &str) -> String {
    let sign = |secret: &Vec<u8>| {
        let mut hmac = Hmac::<Sha256>::new_from_slice(secret).expect("HMAC takes keys of any length");
        hmac.update(format!("{id}.{timestamp}.").as_bytes());
        hmac.update(body.as_bytes());
        format!("v1,{}", STANDARD.encode(hmac.finalize().into_bytes()))
    };
    secrets.iter().map(sign).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of the specification's own libraries.
    #[test]
    fn the_signature_is_that_of_the_reference_implementation() {
        let secret = STANDARD.decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").unwrap();
        let body = r#"{"test": 2432232314}"#;
        assert_eq!(
            signatures(std::slice::from_ref(&secret), "msg_p5jXN8AQM9LWM0D4loKWxJek", 1_614_265_330, body),
            "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
        );
        let two = signatures(&[secret, vec![1; 32]], "msg_p5jXN8AQM9LWM0D4loKWxJek", 1_614_265_330, body);
        assert_eq!(two.split(' ').count(), 2);
    }
}
