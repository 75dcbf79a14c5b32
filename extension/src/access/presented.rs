//! What a caller presents as an access token.

/// A value that was presented as an access token, and the audience that it must name.
#[derive(Clone, Copy)]
pub(crate) struct Presented<'a> {
    pub(crate) token: Option<&'a str>,
    pub(crate) audience: Option<&'a str>,
}
