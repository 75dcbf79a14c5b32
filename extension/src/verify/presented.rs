//! What a caller presents, and the digest under which it would be stored. Every function that takes a plaintext uses
//! this.

use crate::guc;
use crate::pg::datum::TextArray;
use tollgate_core::token::{self, Digest, Fault};

/// Longer than any header that a web server accepts; prevents clients from making us digest megabytes.
const MAX_FOREIGN_LEN: usize = 8192;

/// A value that was presented as a token.
#[derive(Clone, Copy)]
pub(crate) struct Presented<'a> {
    /// The digest of the whole value.
    pub(crate) digest: Result<Digest, Fault>,
    /// The whole value, if it may be a token that was imported in another format.
    pub(crate) foreign: Option<&'a [u8]>,
}

impl<'a> Presented<'a> {
    /// A value with a wrong checksum is rejected without a look-up. Tokens of other systems have no such checksum, so
    /// while they are accepted any value may be a token.
    #[inline]
    pub(crate) fn to_verify(presented: Option<&'a [u8]>) -> Self {
        Self::new(presented, guc::accept_foreign_tokens)
    }

    /// For revoking: any stored token, whatever formats this session accepts.
    pub(crate) fn to_end(presented: Option<&'a [u8]>) -> Self {
        Self::new(presented, || true)
    }

    /// Whether it may be a guess: tokens of ours have 320 random bits, those of other systems may have few.
    pub(crate) fn can_be_guessed(&self) -> bool {
        self.foreign.is_some()
    }

    pub(crate) fn by_digest(digest: Result<Digest, Fault>) -> Self {
        Presented { digest, foreign: None }
    }

    #[inline]
    fn new(presented: Option<&'a [u8]>, accept_foreign: impl FnOnce() -> bool) -> Self {
        let Some(presented) = presented else { return Self::by_digest(Err(Fault::Missing)) };
        if token::parse(presented).is_some() {
            return Self::by_digest(Ok(token::digest(presented)));
        }
        match (accept_foreign(), presented.len()) {
            (false, _) => Self::by_digest(Err(token::fault(presented))),
            (true, 0) => Self::by_digest(Err(Fault::Empty)),
            (true, ..=MAX_FOREIGN_LEN) => {
                Presented { digest: Ok(token::digest(presented)), foreign: Some(presented) }
            }
            (true, _) => Self::by_digest(Err(Fault::Length)),
        }
    }
}

/// The scopes that a token must have.
#[derive(Clone, Copy)]
pub(crate) enum Required<'a> {
    Nothing,
    /// NULL is never granted.
    One(Option<&'a [u8]>),
    All(TextArray<'a>),
    /// Of several, in one text, separated by spaces.
    Joined(&'a [u8]),
}

impl<'a> Required<'a> {
    pub(crate) fn len(&self) -> usize {
        match self {
            Required::Nothing => 0,
            Required::One(_) => 1,
            Required::All(scopes) => scopes.len(),
            Required::Joined(scopes) => split(scopes).count(),
        }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = Option<&'a [u8]>> + use<'a> {
        let (one, all, joined) = match *self {
            Required::Nothing => (None, None, None),
            Required::One(one) => (Some(one), None, None),
            Required::All(all) => (None, Some(all), None),
            Required::Joined(joined) => (None, None, Some(joined)),
        };
        let joined = joined.into_iter().flat_map(split).map(Some);
        one.into_iter().chain(all.into_iter().flat_map(|all| all.iter())).chain(joined)
    }
}

fn split(joined: &[u8]) -> impl Iterator<Item = &[u8]> {
    joined.split(|&byte| byte == b' ').filter(|scope| !scope.is_empty())
}
