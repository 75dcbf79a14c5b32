//! Service accounts: which ids they have, and that each is a user whom nothing else may be.

/// What the user ids of service accounts begin with, and no others.
pub const PREFIX: &str = "service:";
/// Length of the longest id in characters, which are of ASCII.
pub const MAX_ID: usize = 63;

/// Whether an account may have this id: `[a-z0-9][a-z0-9._-]*`.
pub fn is_id(id: &str) -> bool {
    let is_first = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let is_part = |b: u8| is_first(b) || matches!(b, b'.' | b'_' | b'-');
    (1..=MAX_ID).contains(&id.len()) && is_first(id.as_bytes()[0]) && id.bytes().all(is_part)
}

/// The user that an account is.
pub fn user_id(id: &str) -> String {
    format!("{PREFIX}{id}")
}

/// What follows the prefix of a user id, where that is one of an account.
pub fn id_of(user_id: &str) -> Option<&str> {
    user_id.strip_prefix(PREFIX)
}

/// Whether a user of an issuer whose users begin like this could be an account.
pub fn could_be_named_by(user_prefix: &str) -> bool {
    !user_prefix.is_empty() && (user_prefix.starts_with(PREFIX) || PREFIX.starts_with(user_prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_short_and_plain() {
        for id in ["a", "0", "ci", "nightly-build_2.x", &"a".repeat(MAX_ID)] {
            assert!(is_id(id), "{id}");
            assert_eq!(id_of(&user_id(id)), Some(id));
        }
        for other in ["", "A", "-a", ".a", "_a", "a b", "a:b", "a/b", "é", "a\n", &"a".repeat(MAX_ID + 1)] {
            assert!(!is_id(other), "{other:?}");
        }
        assert_eq!([id_of("ann"), id_of("Service:ci"), id_of("service")], [None; 3]);
    }

    #[test]
    fn a_prefix_of_users_is_apart_from_the_accounts() {
        for prefix in ["s", "service", "service:", "service:ci", "service::"] {
            assert!(could_be_named_by(prefix), "{prefix}");
        }
        for prefix in ["", "services:", "Service:", "idp:", "xservice:"] {
            assert!(!could_be_named_by(prefix), "{prefix}");
        }
    }
}
