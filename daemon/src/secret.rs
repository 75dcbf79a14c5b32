//! Text that must not be shown.

use std::fmt;

use zeroize::Zeroizing;

/// Text that must not be shown: neither `Debug` nor an error nor `--help` does.
#[derive(Clone)]
pub struct Secret(Zeroizing<String>);

impl Secret {
    pub fn new(text: impl Into<String>) -> Self {
        Self(Zeroizing::new(text.into()))
    }

    /// Never refuses: an error of clap's would quote the text.
    pub fn parse(text: &str) -> Result<Self, std::convert::Infallible> {
        Ok(Self::new(text))
    }

    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[masked]")
    }
}
