//! What keys are for.

/// What a key is for. A key that is sealed for one purpose does not open for another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    AccessToken,
}

impl Purpose {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Purpose::AccessToken => "access_token",
        }
    }

    pub(crate) fn parse(text: &str) -> Option<Self> {
        (text == Purpose::AccessToken.as_str()).then_some(Purpose::AccessToken)
    }
}
