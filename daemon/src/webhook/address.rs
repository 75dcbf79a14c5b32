//! Which addresses webhooks are sent to: public ones, and those that were allowed on purpose. Anything else would let a role that may
//! define webhooks use the daemon to probe its network, or a cloud's metadata service.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::IpNet;

/// Those of a receiver's addresses that may be connected to; if there is none, why not.
pub(super) fn permitted(
    found: &[SocketAddr],
    encrypted: bool,
    allowed: &[IpNet],
) -> Result<Vec<SocketAddr>, String> {
    let is_allowed =
        |address: &&SocketAddr| allowed.iter().any(|net| net.contains(&address.ip().to_canonical()));
    let permitted: Vec<SocketAddr> = found
        .iter()
        .filter(|address| is_allowed(address) || encrypted && is_public(address.ip()))
        .copied()
        .collect();
    if !permitted.is_empty() || found.is_empty() {
        return Ok(permitted);
    }
    Err(if found.iter().any(|address| is_public(address.ip())) {
        "the address begins with http: webhooks are sent by https, unless --webhook-allow names the network"
    } else {
        "the address is not a public one, and --webhook-allow does not name its network"
    }
    .to_owned())
}

fn is_public(ip: IpAddr) -> bool {
    match ip.to_canonical() {
        IpAddr::V4(ip) => is_public_v4(ip),
        IpAddr::V6(ip) => is_public_v6(ip),
    }
}

/// IANA's registry of special-purpose addresses (RFC 6890 and what came after), multicast and what is reserved.
fn is_public_v4(ip: Ipv4Addr) -> bool {
    let [a, b, c, _] = ip.octets();
    !(ip.is_private()
        || ip.is_loopback()
        || ip.is_link_local()
        || ip.is_documentation()
        || ip.is_multicast()
        || a == 0
        || a >= 240
        || a == 100 && (64..128).contains(&b)
        || a == 192 && b == 0 && c == 0
        || a == 192 && b == 88 && c == 99
        || a == 198 && (b == 18 || b == 19))
}

/// Global unicast (2000::/3) but for what is special in it: protocol assignments, documentation, and 6to4, which would
/// hide an IPv4 address. NAT64 lies outside.
fn is_public_v6(ip: Ipv6Addr) -> bool {
    let [a, b, ..] = ip.segments();
    a & 0xe000 == 0x2000
        && !(a == 0x2001 && (b < 0x0200 || b == 0x0db8))
        && a != 0x2002
        && !(a == 0x3fff && b < 0x1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ip: &str) -> SocketAddr {
        SocketAddr::new(ip.parse().unwrap(), 443)
    }

    #[test]
    fn addresses_that_lead_inside_are_refused_in_every_spelling() {
        for ip in [
            "127.0.0.1",
            "0.0.0.0",
            "10.1.2.3",
            "172.16.0.1",
            "172.31.255.255",
            "192.168.1.1",
            "169.254.169.254",
            "100.64.0.1",
            "198.18.0.1",
            "192.0.0.8",
            "192.0.2.1",
            "224.0.0.1",
            "255.255.255.255",
            "240.0.0.1",
            "::1",
            "::",
            "::ffff:127.0.0.1",
            "::ffff:169.254.169.254",
            "::127.0.0.1",
            "fe80::1",
            "fc00::1",
            "fd12::1",
            "64:ff9b::7f00:1",
            "2002:7f00:1::",
            "2001:db8::1",
            "2001::1",
            "ff02::1",
            "fec0::1",
        ] {
            assert!(permitted(&[at(ip)], true, &[]).is_err(), "{ip}");
        }
    }

    #[test]
    fn public_addresses_are_sent_to_by_https_alone() {
        for ip in ["1.1.1.1", "172.32.0.1", "100.128.0.1", "2606:4700::1111", "::ffff:1.1.1.1"] {
            assert_eq!(permitted(&[at(ip)], true, &[]), Ok(vec![at(ip)]), "{ip}");
            let why = permitted(&[at(ip)], false, &[]).unwrap_err();
            assert!(why.contains("https"), "{why}");
        }
    }

    #[test]
    fn what_is_allowed_is_sent_to_and_nothing_beside_it() {
        let allowed = ["127.0.0.0/8".parse().unwrap(), "fd12::/16".parse().unwrap()];
        let found = [at("10.0.0.1"), at("::ffff:127.0.0.1"), at("fd12::1"), at("fe80::1")];
        assert_eq!(permitted(&found, false, &allowed), Ok(vec![found[1], found[2]]));
    }

    #[test]
    fn of_several_addresses_only_the_public_ones_are_tried() {
        let found = [at("10.0.0.1"), at("1.1.1.1")];
        assert_eq!(permitted(&found, true, &[]), Ok(vec![found[1]]));
    }
}
