//! What keys are for.

/// What the purpose of a key that signs URLs begins with; the name of the key follows.
pub(crate) const SIGNED_URL: &str = "signed_url:";

/// What the purpose of a key begins with by which another system made the digests of its tokens; the name of the key follows.
pub(crate) const TOKEN_IMPORT: &str = "token_import:";
/// The first text after all of them.
pub(crate) const AFTER_TOKEN_IMPORT: &str = "token_import;";

/// What a key is for. A key that is sealed for one purpose does not open for another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    AccessToken,
    /// A secret key for a MAC, which is never published.
    RefreshToken,
}

impl Purpose {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Purpose::AccessToken => "access_token",
            Purpose::RefreshToken => "refresh_token",
        }
    }

    pub(crate) fn parse(text: &str) -> Option<Self> {
        [Purpose::AccessToken, Purpose::RefreshToken].into_iter().find(|purpose| purpose.as_str() == text)
    }
}
