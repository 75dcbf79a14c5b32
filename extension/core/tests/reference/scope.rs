//! A second implementation of the scope grammar: slow, allocating, and simple enough to be checked by eye. Tests and
//! fuzz targets compare the real one with it.

pub(crate) fn is_scope(s: &[u8]) -> bool {
    let Ok(text) = String::from_utf8(s.to_vec()) else { return false };
    text.len() <= 128 && text.split(':').all(is_segment)
}

pub(crate) fn is_wildcard(s: &[u8]) -> bool {
    let Ok(text) = String::from_utf8(s.to_vec()) else { return false };
    let Some((prefix, "*")) = text.rsplit_once(':') else { return false };
    text.len() <= 128 && prefix.split(':').all(is_segment)
}

pub(crate) fn is_grantable(s: &[u8]) -> bool {
    is_scope(s) || is_wildcard(s)
}

pub(crate) fn grants(granted: &[u8], required: &[u8]) -> bool {
    if !is_grantable(granted) || !is_grantable(required) {
        return false;
    }
    let segments = |s: &[u8]| -> Vec<Vec<u8>> { s.split(|&b| b == b':').map(<[u8]>::to_vec).collect() };
    let (mut granted, required) = (segments(granted), segments(required));
    if granted == [b"admin"] {
        return required.len() == 1 || required[0] != b"tollgate";
    }
    if granted.last().is_some_and(|last| last == b"*") {
        granted.pop();
        return required.len() > granted.len() && required[..granted.len()] == granted[..];
    }
    granted == required
}

fn is_segment(segment: &str) -> bool {
    let start = "abcdefghijklmnopqrstuvwxyz0123456789";
    let mut letters = segment.chars();
    letters.next().is_some_and(|c| start.contains(c))
        && letters.all(|c| start.contains(c) || "_.-".contains(c))
}
