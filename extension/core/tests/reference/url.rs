//! The canonical form of a signed URL, as docs/signed-urls.md says it, a step after the other and with no regard to speed.

const UNRESERVED: &str = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~";
const RESERVED: &str = "!$&'()*+,;=:@/?";

/// `None` for what is refused whatever its parameters are.
pub(crate) fn canonical(url: &str) -> Option<String> {
    if url.len() > 8192 || url.chars().any(|c| c <= ' ' || c > '~' || c == '\\' || c == '#') {
        return None;
    }
    let (scheme, rest) = url.split_once("://")?;
    let scheme = scheme.to_lowercase();
    let default = match scheme.as_str() {
        "http" => ":80",
        "https" => ":443",
        _ => return None,
    };
    let mut halves = rest.splitn(2, '?');
    let before = halves.next()?;
    let query = halves.next().unwrap_or_default();
    let slash = before.find('/').unwrap_or(before.len());
    let authority = before[..slash].to_lowercase();
    if !is_authority(&authority) {
        return None;
    }
    let authority = authority.strip_suffix(default).unwrap_or(&authority);
    let mut path = normalised(&before[slash..])?;
    if path.is_empty() {
        path = "/".to_owned();
    }
    for segment in path.split('/') {
        let cut = segment.replace("%3B", ";");
        let name = cut.split(';').next().unwrap_or_default();
        if name == "." || name == ".." {
            return None;
        }
    }
    let query = normalised(query)?;
    let mut theirs: Vec<&str> = Vec::new();
    let mut ours: Vec<&str> = Vec::new();
    for part in query.split('&').filter(|part| !part.is_empty()) {
        if part.starts_with("tgu_sig=") {
            continue;
        }
        if part.starts_with("tgu_") { ours.push(part) } else { theirs.push(part) }
    }
    ours.sort_unstable();
    // An insertion sort, which leaves equal names in their order.
    let mut sorted: Vec<&str> = Vec::new();
    for part in theirs {
        let name = |part: &str| part.split('=').next().unwrap_or_default().to_owned();
        let place = sorted.iter().position(|other| name(other) > name(part)).unwrap_or(sorted.len());
        sorted.insert(place, part);
    }
    if let Some(length) = ours.iter().find_map(|part| part.strip_prefix("tgu_prefix=")) {
        let length: usize = length.parse().ok()?;
        if path.get(..length).is_some_and(|prefix| prefix.ends_with('/')) {
            path.truncate(length);
        }
    }
    Some(format!("tollgate-url-1\n{scheme}://{authority}\n{path}\n{}\n{}", sorted.join("&"), ours.join("&")))
}

fn is_authority(text: &str) -> bool {
    let (host, port) = match text.rfind(':') {
        Some(colon) if !text.ends_with(']') => (&text[..colon], Some(&text[colon + 1..])),
        _ => (text, None),
    };
    let good_port = port.is_none_or(|port| {
        (1..=5).contains(&port.len()) && !port.starts_with('0') && port.chars().all(|c| c.is_ascii_digit())
    });
    let good_host = if host.starts_with('[') {
        host.ends_with(']') && host.len() > 2 && host[1..host.len() - 1].parse::<std::net::Ipv6Addr>().is_ok()
    } else {
        let good = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '_';
        host.split('.').all(|label| !label.is_empty() && label.chars().all(good))
    };
    good_host && good_port
}

/// Every character alone: as it is, or as an escape with capital digits.
fn normalised(text: &str) -> Option<String> {
    let mut out = String::new();
    let mut rest = text.chars();
    while let Some(c) = rest.next() {
        let code = if c == '%' {
            let digits: String = rest.by_ref().take(2).collect();
            if digits.len() != 2 || digits.starts_with('+') {
                return None;
            }
            let code = u8::from_str_radix(&digits, 16).ok().filter(|code| *code != 0)?;
            if !UNRESERVED.contains(char::from(code)) {
                out.push_str(&format!("%{code:02X}"));
                continue;
            }
            code
        } else {
            u8::try_from(c).ok()?
        };
        let c = char::from(code);
        if UNRESERVED.contains(c) || RESERVED.contains(c) {
            out.push(c);
        } else {
            out.push_str(&format!("%{code:02X}"));
        }
    }
    Some(out)
}
