//! A second implementation of the token format: slow, allocating, and simple enough to be checked by eye. Tests and
//! fuzz targets compare the real parser with it.

/// Prefix, body and checksum of a well-formed token.
pub(crate) fn parse(token: &[u8]) -> Option<(String, String, String)> {
    let text = String::from_utf8(token.to_vec()).ok()?;
    // Nothing after the prefix contains a `_`, so the last one ends it.
    let (prefix, tail) = text.rsplit_once('_')?;
    let mut letters = prefix.chars();
    let prefix_ok = prefix.len() <= 16
        && letters.next().is_some_and(|c| "abcdefghijklmnopqrstuvwxyz".contains(c))
        && letters.all(|c| "abcdefghijklmnopqrstuvwxyz0123456789_".contains(c));
    let tail_ok = tail.len() == 88 && tail.chars().all(|c| "0123456789abcdef".contains(c));
    if !prefix_ok || !tail_ok {
        return None;
    }
    let (body, checksum) = tail.split_at(80);
    let right = format!("{:08x}", crc32(body.as_bytes())) == checksum;
    right.then(|| (prefix.to_owned(), body.to_owned(), checksum.to_owned()))
}

/// CRC-32 (IEEE 802.3) by its definition, one bit at a time.
pub(crate) fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for &byte in bytes {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ 0xedb8_8320 } else { crc >> 1 };
        }
    }
    !crc
}
