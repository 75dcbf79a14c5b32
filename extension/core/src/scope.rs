//! The scope grammar, and which scope grants which.
//!
//! A scope is `segment(:segment)*` with segments `[a-z0-9][a-z0-9_.-]*`, at most 128 characters in all. A token may
//! carry a scope, which grants exactly itself, or a wildcard `x:*`, which grants `x:` followed by anything at any
//! depth but not `x` itself, or [`ADMIN`], which grants everything but Tollgate's own scopes ([`OWN`]): managing tokens is
//! granted by its name, or by `tollgate:*`. There is no `*` on its own: all power has one name.
//!
//! A malformed scope, on either side, grants nothing and is granted by nothing.

/// Length of the longest scope in characters, including a wildcard's `:*`.
pub const MAX_SCOPE_LEN: usize = 128;
/// The scope that grants every well-formed scope but those that begin with [`OWN`].
pub const ADMIN: &str = "admin";
/// The beginning of scopes that Tollgate itself asks for.
pub const OWN: &str = "tollgate:";

/// Whether `s` is a concrete scope: `posts:read`, but not `posts:*`.
pub fn is_scope(s: &[u8]) -> bool {
    s.len() <= MAX_SCOPE_LEN && are_segments(s)
}

/// Whether `s` is a scope that a token can have: a concrete scope, or a wildcard `x:*` where `x` is a concrete scope.
pub fn is_grantable(s: &[u8]) -> bool {
    s.len() <= MAX_SCOPE_LEN && are_segments(s.strip_suffix(b":*").unwrap_or(s))
}

/// The prefix of all scopes that the wildcard `s` grants: `posts:` for `posts:*`. `None` unless `s` is a well-formed
/// wildcard.
pub fn wildcard_prefix(s: &[u8]) -> Option<&[u8]> {
    let prefix = s.strip_suffix(b"*")?;
    (prefix.ends_with(b":") && is_grantable(s)).then_some(prefix)
}

/// Whether a token with scope `granted` satisfies `required`.
///
/// `required` may be a wildcard too: it is granted by a scope that grants all of it, so `x:*` grants `x:y:*`.
#[inline]
pub fn grants(granted: &[u8], required: &[u8]) -> bool {
    covers(granted, required) && is_grantable(required)
}

/// Whether any of `granted` satisfies `required`, by [`grants`].
#[inline]
pub fn any_grants<'a>(mut granted: impl Iterator<Item = &'a [u8]>, required: &[u8]) -> bool {
    granted.any(|g| covers(g, required)) && is_grantable(required)
}

/// The comparison alone. If `required` is well formed, a matching `granted` needs no check of its own: it equals
/// `required`, or it is [`ADMIN`], or all of it but the final `*` is a prefix of `required` that ends with a colon, so
/// it consists of whole segments of `required` and is no longer than that.
fn covers(granted: &[u8], required: &[u8]) -> bool {
    if granted == required {
        return true;
    }
    match granted.strip_suffix(b"*") {
        Some(prefix) => prefix.ends_with(b":") && required.starts_with(prefix),
        None => granted == ADMIN.as_bytes() && !required.starts_with(OWN.as_bytes()),
    }
}

/// Whether `s` is `segment(:segment)*`, of any length.
fn are_segments(s: &[u8]) -> bool {
    let mut at_start = true;
    for &b in s {
        at_start = match b {
            b'a'..=b'z' | b'0'..=b'9' => false,
            b'_' | b'.' | b'-' if !at_start => false,
            b':' if !at_start => true,
            _ => return false,
        };
    }
    // It ends inside a segment: it is neither empty nor ends with a colon.
    !at_start
}
