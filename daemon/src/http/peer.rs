//! The client's address, as far as it can be known.
//!
//! Every proxy on the way appends the address that its request came from, and anyone can write such a header. So only what
//! trusted proxies appended counts: from the right, the first address that is not one of them.

use std::net::{IpAddr, SocketAddr};

use axum::http::{HeaderMap, HeaderName};
use ipnet::IpNet;

use crate::config::ForwardedHeader;

const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED: HeaderName = axum::http::header::FORWARDED;

/// An extension of each request: the address that it came from, behind the trusted proxies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ClientIp(pub(super) IpAddr);

/// An extension of each request: whether a trusted proxy sent it. Only then do headers like X-Forwarded-Method,
/// X-Forwarded-Uri and X-Request-Id say what happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FromTrustedProxy(pub(super) bool);

/// Whose word counts, and which header they write.
#[derive(Clone, Debug)]
pub(super) struct TrustedProxies {
    networks: Vec<IpNet>,
    header: ForwardedHeader,
}

/// What a trusted proxy passed on cannot be read: the client wrote half of it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Malformed;

impl TrustedProxies {
    pub(super) fn new(networks: Vec<IpNet>, header: ForwardedHeader) -> Self {
        Self { networks, header }
    }

    pub(super) fn none() -> Self {
        Self::new(Vec::new(), ForwardedHeader::XForwardedFor)
    }

    pub(super) fn contains(&self, address: IpAddr) -> bool {
        self.networks.iter().any(|network| network.contains(&address))
    }

    /// `peer` is the other end of the connection. If a trusted proxy does not say where a request came from ("unknown", a
    /// name), that proxy itself is the last that is known.
    pub(super) fn client_ip(&self, peer: SocketAddr, headers: &HeaderMap) -> Result<IpAddr, Malformed> {
        let mut known = peer.ip().to_canonical();
        if !self.contains(known) {
            return Ok(known);
        }
        let hops = match self.header {
            ForwardedHeader::XForwardedFor => x_forwarded_for(headers),
            ForwardedHeader::Forwarded => forwarded(headers)?,
        };
        for hop in hops.into_iter().rev() {
            let Some(address) = hop else { break };
            known = address;
            if !self.contains(known) {
                break;
            }
        }
        Ok(known)
    }
}

/// All hops, from the client on; `None` for one that is no address.
fn x_forwarded_for(headers: &HeaderMap) -> Vec<Option<IpAddr>> {
    let lines = headers.get_all(X_FORWARDED_FOR).iter();
    lines.flat_map(|line| line.as_bytes().split(|byte| *byte == b',')).map(address).collect()
}

/// The same of RFC 7239, section 4. A quoted string may hold commas, so one that does not end is refused: it would hide what
/// a proxy appended.
fn forwarded(headers: &HeaderMap) -> Result<Vec<Option<IpAddr>>, Malformed> {
    let mut hops = Vec::new();
    for line in headers.get_all(FORWARDED) {
        for element in split_unquoted(line.as_bytes(), b',')? {
            let mut hop = None;
            for pair in split_unquoted(element, b';')? {
                let mut parts = pair.splitn(2, |byte| *byte == b'=');
                let (name, value) = (parts.next().unwrap_or_default(), parts.next());
                if name.trim_ascii().eq_ignore_ascii_case(b"for") {
                    // Each at most once (section 4).
                    if hop.is_some() {
                        return Err(Malformed);
                    }
                    hop = Some(address(&unquoted(value.unwrap_or_default())));
                }
            }
            hops.push(hop.flatten());
        }
    }
    Ok(hops)
}

fn split_unquoted(text: &[u8], separator: u8) -> Result<Vec<&[u8]>, Malformed> {
    let (mut parts, mut start, mut quoted, mut escaped) = (Vec::new(), 0, false, false);
    for (at, byte) in text.iter().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            byte if *byte == separator && !quoted => {
                parts.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    if quoted {
        return Err(Malformed);
    }
    parts.push(&text[start..]);
    Ok(parts)
}

fn unquoted(value: &[u8]) -> Vec<u8> {
    let value = value.trim_ascii();
    match value.strip_prefix(b"\"").and_then(|rest| rest.strip_suffix(b"\"")) {
        // An address holds no quoted pairs; with a backslash it is none.
        Some(inner) => inner.to_vec(),
        None => value.to_vec(),
    }
}

/// With or without a port: `192.0.2.1`, `192.0.2.1:80`, `2001:db8::1`, `[2001:db8::1]`, `[2001:db8::1]:80`.
fn address(text: &[u8]) -> Option<IpAddr> {
    let text = std::str::from_utf8(text).ok()?.trim();
    let bare = || text.strip_prefix('[')?.strip_suffix(']')?.parse::<std::net::Ipv6Addr>().ok();
    let found = text
        .parse()
        .ok()
        .or_else(|| text.parse::<SocketAddr>().ok().map(|address| address.ip()))
        .or_else(|| bare().map(IpAddr::from))?;
    Some(found.to_canonical())
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    const PROXY: &str = "10.0.0.1:40000";

    fn client_ip(kind: ForwardedHeader, peer: &str, lines: &[(&str, &str)]) -> Result<String, Malformed> {
        let proxies = TrustedProxies::new(
            ["10.0.0.0/8", "fd00::/8"].map(|network| network.parse().unwrap()).to_vec(),
            kind,
        );
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            headers.append(
                HeaderName::from_bytes(name.as_bytes()).unwrap(),
                HeaderValue::from_bytes(value.as_bytes()).unwrap(),
            );
        }
        proxies.client_ip(peer.parse().unwrap(), &headers).map(|address| address.to_string())
    }

    fn by_x_forwarded_for(peer: &str, lines: &[&str]) -> String {
        let lines: Vec<_> = lines.iter().map(|line| ("x-forwarded-for", *line)).collect();
        client_ip(ForwardedHeader::XForwardedFor, peer, &lines).unwrap()
    }

    fn by_forwarded(peer: &str, lines: &[&str]) -> Result<String, Malformed> {
        let lines: Vec<_> = lines.iter().map(|line| ("forwarded", *line)).collect();
        client_ip(ForwardedHeader::Forwarded, peer, &lines)
    }

    #[test]
    fn what_others_than_trusted_proxies_say_is_ignored() {
        for peer in ["192.0.2.9:1", "[2001:db8::9]:1", "[::ffff:192.0.2.9]:1"] {
            let own = peer.parse::<SocketAddr>().unwrap().ip().to_canonical().to_string();
            assert_eq!(by_x_forwarded_for(peer, &["198.51.100.1"]), own);
            assert_eq!(by_forwarded(peer, &["for=198.51.100.1"]), Ok(own.clone()));
            assert_eq!(by_forwarded(peer, &["for=\"198.51.100.1"]), Ok(own), "it is not even read");
        }
    }

    #[test]
    fn the_client_is_the_right_most_hop_that_is_not_a_trusted_proxy() {
        for (lines, expected) in [
            (&[][..], "10.0.0.1"),
            (&["198.51.100.1"], "198.51.100.1"),
            (&["203.0.113.7, 198.51.100.1"], "198.51.100.1"),
            (&["203.0.113.7, 198.51.100.1, 10.0.0.2,fd00::2"], "198.51.100.1"),
            (&["203.0.113.7", "198.51.100.1", "10.0.0.2"], "198.51.100.1"),
            (&["198.51.100.1:4711"], "198.51.100.1"),
            (&["[2001:db8::1]:4711, 10.0.0.2"], "2001:db8::1"),
            (&["[2001:db8::1]"], "2001:db8::1"),
            (&["::ffff:198.51.100.1"], "198.51.100.1"),
            // A client inside the trusted networks.
            (&["10.0.0.3, 10.0.0.2"], "10.0.0.3"),
            // What cannot be read ends the chain: further left may be the client's own words.
            (&["203.0.113.7, unknown, 10.0.0.2"], "10.0.0.2"),
            (&["203.0.113.7, , 10.0.0.2"], "10.0.0.2"),
            (&["203.0.113.7, \u{e9}"], "10.0.0.1"),
        ] {
            assert_eq!(by_x_forwarded_for(PROXY, lines), expected, "{lines:?}");
        }
    }

    #[test]
    fn forwarded_is_read_as_its_standard_says() {
        for (lines, expected) in [
            (&["for=198.51.100.1"][..], "198.51.100.1"),
            (&["For=\"198.51.100.1:4711\";proto=https;by=10.0.0.1"], "198.51.100.1"),
            (&["proto=https;for=\"[2001:db8:cafe::17]:4711\""], "2001:db8:cafe::17"),
            (&["for=203.0.113.7, for=198.51.100.1;by=10.0.0.2 , for=10.0.0.2"], "198.51.100.1"),
            (&["for=203.0.113.7", "for=198.51.100.1"], "198.51.100.1"),
            (&["for=\"203.0.113.7, for=192.0.2.1\", for=198.51.100.1"], "198.51.100.1"),
            (&["for=203.0.113.7, for=_hidden"], "10.0.0.1"),
            (&["for=203.0.113.7, proto=https"], "10.0.0.1"),
            (&["for=203.0.113.7, for=unknown, for=10.0.0.2"], "10.0.0.2"),
        ] {
            assert_eq!(by_forwarded(PROXY, lines).as_deref(), Ok(expected), "{lines:?}");
        }
        for lines in [
            &["for=\", for=198.51.100.1"][..],
            &["for=\"\\\", for=\"[2001:db8::1]\""],
            &["for=1.1.1.1;for=2.2.2.2"],
        ] {
            assert_eq!(by_forwarded(PROXY, lines), Err(Malformed), "{lines:?}");
        }
    }

    #[test]
    fn only_the_header_that_the_proxies_write_is_read() {
        let both = [("forwarded", "for=203.0.113.7"), ("x-forwarded-for", "198.51.100.1")];
        assert_eq!(client_ip(ForwardedHeader::XForwardedFor, PROXY, &both).as_deref(), Ok("198.51.100.1"));
        assert_eq!(client_ip(ForwardedHeader::Forwarded, PROXY, &both).as_deref(), Ok("203.0.113.7"));
    }

    #[test]
    fn no_header_makes_it_panic() {
        let mut state = 1u64;
        let mut random = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            usize::try_from(state >> 33).unwrap()
        };
        let alphabet = b"for=\"\\;,[]:. 1aF\xff";
        for _ in 0..20_000 {
            let line: Vec<u8> = (0..random() % 24).map(|_| alphabet[random() % alphabet.len()]).collect();
            let mut headers = HeaderMap::new();
            let value = HeaderValue::from_bytes(&line).unwrap();
            headers.insert(FORWARDED, value.clone());
            headers.insert(X_FORWARDED_FOR, value);
            for kind in [ForwardedHeader::Forwarded, ForwardedHeader::XForwardedFor] {
                let proxies = TrustedProxies::new(vec!["10.0.0.0/8".parse().unwrap()], kind);
                let _ = proxies.client_ip(PROXY.parse().unwrap(), &headers);
            }
        }
    }
}
