//! Which addresses may be connected to: public ones, and those that were allowed on purpose. Anything else would let a role that
//! may enter an address use the daemon to probe its network, or a cloud's metadata service.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;

/// Which addresses may be connected to.
#[derive(Clone, Debug)]
pub struct Rules {
    allowed: Arc<[IpNet]>,
    option: &'static str,
    plain: Plain,
}

/// What may be asked without TLS, of the networks that are allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plain {
    /// All of them.
    Allowed,
    /// This machine: what comes from others decides who is let in, so no network in between may change it.
    Loopback,
}

impl Rules {
    /// Public addresses, and these networks, which the option of this name gives.
    pub fn new(allowed: &[IpNet], option: &'static str, plain: Plain) -> Self {
        Self { allowed: allowed.into(), option, plain }
    }

    /// Those of a host's addresses that may be connected to; if there is none, why not.
    pub(super) fn permitted(&self, found: &[SocketAddr], encrypted: bool) -> Result<Vec<SocketAddr>, String> {
        let permitted: Vec<SocketAddr> =
            found.iter().filter(|address| self.permits(address.ip(), encrypted)).copied().collect();
        if !permitted.is_empty() || found.is_empty() {
            return Ok(permitted);
        }
        let option = self.option;
        Err(if !found.iter().any(|address| self.permits(address.ip(), true)) {
            format!("the address is not a public one, and {option} does not name its network")
        } else if self.plain == Plain::Allowed {
            format!("the address begins with http: only https is used, unless {option} names the network")
        } else {
            format!(
                "the address begins with http: only https is used, but on this machine itself, if {option} names it"
            )
        })
    }

    fn permits(&self, ip: IpAddr, encrypted: bool) -> bool {
        let ip = ip.to_canonical();
        let is_allowed = self.allowed.iter().any(|net| net.contains(&ip));
        match encrypted {
            true => is_allowed || is_public(ip),
            false => is_allowed && (self.plain == Plain::Allowed || ip.is_loopback()),
        }
    }
}

fn is_public(ip: IpAddr) -> bool {
    match ip {
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

    fn rules(allowed: &[&str], plain: Plain) -> Rules {
        let allowed: Vec<IpNet> = allowed.iter().map(|net| net.parse().unwrap()).collect();
        Rules::new(&allowed, "--allow", plain)
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
            let why = rules(&[], Plain::Allowed).permitted(&[at(ip)], true).unwrap_err();
            assert!(why.contains("not a public one") && why.contains("--allow"), "{ip}: {why}");
        }
    }

    #[test]
    fn public_addresses_are_asked_by_https_alone() {
        for ip in ["1.1.1.1", "172.32.0.1", "100.128.0.1", "2606:4700::1111", "::ffff:1.1.1.1"] {
            assert_eq!(rules(&[], Plain::Allowed).permitted(&[at(ip)], true), Ok(vec![at(ip)]), "{ip}");
            for plain in [Plain::Allowed, Plain::Loopback] {
                let why = rules(&[], plain).permitted(&[at(ip)], false).unwrap_err();
                assert!(why.contains("https"), "{why}");
            }
        }
    }

    #[test]
    fn what_is_allowed_is_asked_and_nothing_beside_it() {
        let allowed = ["127.0.0.0/8", "fd12::/16"];
        let found = [at("10.0.0.1"), at("::ffff:127.0.0.1"), at("fd12::1"), at("fe80::1")];
        let permitted = |plain, encrypted| rules(&allowed, plain).permitted(&found, encrypted);
        assert_eq!(permitted(Plain::Allowed, false), Ok(vec![found[1], found[2]]));
        assert_eq!(permitted(Plain::Loopback, true), Ok(vec![found[1], found[2]]));
        assert_eq!(permitted(Plain::Loopback, false), Ok(vec![found[1]]), "in plain text only this machine");
        let why = rules(&allowed, Plain::Loopback).permitted(&found[2..], false).unwrap_err();
        assert!(why.contains("https"), "{why}");
    }

    #[test]
    fn of_several_addresses_only_the_public_ones_are_tried() {
        let found = [at("10.0.0.1"), at("1.1.1.1")];
        assert_eq!(rules(&[], Plain::Allowed).permitted(&found, true), Ok(vec![found[1]]));
    }
}
