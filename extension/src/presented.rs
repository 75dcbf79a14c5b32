//! What a caller presents, and under which digest that would be stored. Every function that takes a plaintext asks here.

use crate::datum::TextArray;
use crate::guc;
use tollgate_core::token::{self, Digest, Fault};

/// Longer than any header that a web server accepts; nobody is to have us digest megabytes.
const MAX_FOREIGN_LEN: usize = 8192;

/// What cannot be a token is told by its checksum, without a look-up. Tokens of another system have no checksum of ours,
/// so while those are accepted anything may be one.
#[inline]
pub(crate) fn digest(presented: Option<&[u8]>) -> Result<Digest, Fault> {
    let presented = presented.ok_or(Fault::Missing)?;
    if token::parse(presented).is_some() {
        return Ok(token::digest(presented));
    }
    match (guc::accept_foreign_tokens(), presented.len()) {
        (false, _) => Err(token::fault(presented)),
        (true, 0) => Err(Fault::Empty),
        (true, ..=MAX_FOREIGN_LEN) => Ok(token::digest(presented)),
        (true, _) => Err(Fault::Length),
    }
}

/// The scopes that a token must have.
#[derive(Clone, Copy)]
pub(crate) enum Required<'a> {
    Nothing,
    /// NULL is granted by nothing.
    One(Option<&'a [u8]>),
    All(TextArray<'a>),
}

impl<'a> Required<'a> {
    pub(crate) fn len(&self) -> usize {
        match self {
            Required::Nothing => 0,
            Required::One(_) => 1,
            Required::All(scopes) => scopes.len(),
        }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = Option<&'a [u8]>> + use<'a> {
        let (one, all) = match *self {
            Required::Nothing => (None, None),
            Required::One(one) => (Some(one), None),
            Required::All(all) => (None, Some(all)),
        };
        one.into_iter().chain(all.into_iter().flat_map(|all| all.iter()))
    }
}
