//! The decision about a presented URL. What costs nothing comes first, then the key, which is selected as it is now, then
//! the signature, then what was signed, and at last, for a URL that is for one use, whether this is the first.

use crate::access::{EPOCHS, id_of_digest};
use crate::error::Error;
use crate::keys;
use crate::pg::read_only::refuse_if_read_only;
use crate::pg::sys;
use crate::services::consumes;
use crate::store::used_urls;
use tollgate_core::net::Net;
use tollgate_core::token;
use tollgate_core::url::{Code, Request, SignedUrl};

/// A reason of `MALFORMED`, beside those of the parser.
const MISSING: &str = "missing";

pub(crate) struct Judged {
    pub(crate) code: Code,
    /// For [`Code::Malformed`].
    pub(crate) reason: Option<&'static str>,
    /// Of one that a key of ours has signed.
    pub(crate) signed: Option<Signed>,
}

pub(crate) struct Signed {
    pub(crate) url: SignedUrl,
    pub(crate) key_name: String,
    /// In microseconds since 2000-01-01.
    pub(crate) expires_at: i64,
}

pub(crate) fn verify(url: Option<&str>, method: Option<&str>, client: Option<Net>) -> Result<Judged, Error> {
    let refused = |code, reason| Ok(Judged { code, reason, signed: None });
    let Some(text) = url else { return refused(Code::Malformed, Some(MISSING)) };
    let url = match SignedUrl::parse(text) {
        Ok(url) => url,
        Err(fault) => return refused(Code::Malformed, Some(fault.as_str())),
    };
    let Some(key) = keys::url_key_of(&url.key_id)? else { return refused(Code::UnknownKey, None) };
    if !url.is_signed_by(&key.key) {
        return refused(Code::BadSignature, None);
    }
    let now = sys::GetCurrentTimestamp() + EPOCHS;
    let expires_at = url.expires_at.saturating_mul(1_000_000) - EPOCHS;
    let mut code = url.decide(&Request { method: method.unwrap_or_default(), client, now });
    if code == Code::Valid && url.once.is_some() && !is_first_use(&url, expires_at)? {
        code = Code::AlreadyUsed;
    }
    Ok(Judged { code, reason: None, signed: Some(Signed { url, key_name: key.name.clone(), expires_at }) })
}

/// Stores the use. It is one when the transaction is committed.
fn is_first_use(url: &SignedUrl, expires_at: i64) -> Result<bool, Error> {
    let id = id_of_digest(&token::digest(url.signature()));
    // One that was used is refused without a write, also where nothing can be written.
    if used_urls::is_used(id) {
        return Ok(false);
    }
    refuse_if_read_only(c"tollgate.verify_signed_url() of a URL for one use");
    consumes::check("tollgate.verify_signed_url()")?;
    used_urls::note_use(id, expires_at)
}
