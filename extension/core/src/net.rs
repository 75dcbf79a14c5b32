//! Addresses and networks as PostgreSQL's `inet` and `cidr` store them: an address and the number of leading bits that
//! form the network.
//!
//! An IPv4-mapped IPv6 address (`::ffff:192.0.2.1`, RFC 4291 §2.5.5.2) is treated as the IPv4 address. A server that
//! listens on a dual-stack socket reports every IPv4 client in the mapped form, and a list of allowed IPv4 networks has
//! to hold for it. In turn an IPv6 network never contains an IPv4 address, not even `::/0`, whichever way it is written.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

const V4_BITS: u8 = 32;
const V6_BITS: u8 = 128;
/// Bits of `::ffff:0:0/96`, the network of all IPv4-mapped addresses.
const MAPPED_BITS: u8 = 96;

/// An address with its network length. Bits beyond the length may be set, as in `inet`: `192.0.2.7/24`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Net {
    /// In network order. An IPv4 address takes the first 4 bytes, the others are zero.
    addr: [u8; 16],
    v4: bool,
    bits: u8,
}

impl Net {
    /// `None` if there are more than 32 `bits`.
    pub fn v4(addr: [u8; 4], bits: u8) -> Option<Net> {
        let mut padded = [0; 16];
        padded[..4].copy_from_slice(&addr);
        (bits <= V4_BITS).then_some(Net { addr: padded, v4: true, bits })
    }

    /// `None` if there are more than 128 `bits`. A network of IPv4-mapped addresses becomes the IPv4 network.
    pub fn v6(addr: [u8; 16], bits: u8) -> Option<Net> {
        match (Ipv6Addr::from(addr).to_ipv4_mapped(), bits.checked_sub(MAPPED_BITS)) {
            (Some(mapped), Some(mapped_bits)) => Net::v4(mapped.octets(), mapped_bits),
            _ => (bits <= V6_BITS).then_some(Net { addr, v4: false, bits }),
        }
    }

    /// Whether `other`, an address or a whole network, lies within this network: PostgreSQL's `self >>= other`.
    #[inline]
    pub fn contains(&self, other: &Net) -> bool {
        let differing = u128::from_be_bytes(self.addr) ^ u128::from_be_bytes(other.addr);
        // Shifting by all 128 bits is the network of length 0, which contains every address of its family.
        let differing_in_network = differing.checked_shr(u32::from(V6_BITS - self.bits)).unwrap_or(0);
        self.v4 == other.v4 && self.bits <= other.bits && differing_in_network == 0
    }

    /// The address without the network length.
    pub fn addr(&self) -> IpAddr {
        let [a, b, c, d, ..] = self.addr;
        if self.v4 { IpAddr::V4(Ipv4Addr::new(a, b, c, d)) } else { IpAddr::V6(Ipv6Addr::from(self.addr)) }
    }

    /// The network that one subscriber has to itself: an IPv4 address in its IPv6-mapped form, or the /64 of an IPv6
    /// address (RFC 6177 gives each site at least that much), with the remaining bits zero.
    pub fn subscriber(&self) -> [u8; 16] {
        match self.addr() {
            IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
            IpAddr::V6(v6) => (v6.to_bits() & !u128::from(u64::MAX)).to_be_bytes(),
        }
    }

    /// The network length, 0 to 32 or 0 to 128.
    pub fn bits(&self) -> u8 {
        self.bits
    }
}

impl From<IpAddr> for Net {
    /// A single address, as a network that contains nothing else.
    fn from(addr: IpAddr) -> Net {
        let mut padded = [0; 16];
        match addr.to_canonical() {
            IpAddr::V4(v4) => {
                padded[..4].copy_from_slice(&v4.octets());
                Net { addr: padded, v4: true, bits: V4_BITS }
            }
            IpAddr::V6(v6) => Net { addr: v6.octets(), v4: false, bits: V6_BITS },
        }
    }
}

/// The client's address from a list like `X-Forwarded-For`, to which each proxy appended the peer that it was called
/// by: the last hop that is not a trusted proxy. If all are trusted, the first.
///
/// A client can forge everything before that hop, so it is ignored. `None` if the hop is not an address, such as
/// `unknown` and obfuscated names (RFC 7239 §6.3), or if the list is empty.
pub fn client_of(forwarded: &str, is_trusted: impl Fn(&Net) -> bool) -> Option<IpAddr> {
    let mut client = None;
    for hop in forwarded.rsplit(',').map(str::trim).filter(|hop| !hop.is_empty()) {
        let address = hop_address(hop)?;
        client = Some(address);
        if !is_trusted(&Net::from(address)) {
            break;
        }
    }
    client
}

/// `192.0.2.1`, `192.0.2.1:443`, `2001:db8::1`, `[2001:db8::1]`, `[2001:db8::1]:443`, optionally quoted, optionally
/// with a zone. An IPv4-mapped address becomes the IPv4 one.
fn hop_address(hop: &str) -> Option<IpAddr> {
    let hop = hop.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')).unwrap_or(hop);
    let is_port = |port: &str| port.parse::<u16>().is_ok() && port.bytes().all(|b| b.is_ascii_digit());
    let address = match hop.strip_prefix('[').map(|rest| rest.split_once(']')) {
        Some(None) => return None,
        Some(Some((address, ""))) => address,
        Some(Some((address, port))) => {
            port.strip_prefix(':').filter(|port| is_port(port)).map(|_| address)?
        }
        None => match hop.split_once(':') {
            Some((address, port)) if is_port(port) && address.contains('.') => address,
            _ => hop,
        },
    };
    let address = match address.split_once('%') {
        Some((address, zone)) if address.contains(':') && !zone.is_empty() => address,
        Some(_) => return None,
        None => address,
    };
    address.parse::<IpAddr>().ok().map(|address| address.to_canonical())
}

/// Formatted like `inet`: the length is omitted for a single address.
impl fmt::Display for Net {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let full = if self.v4 { V4_BITS } else { V6_BITS };
        write!(f, "{}", self.addr())?;
        if self.bits < full { write!(f, "/{}", self.bits) } else { Ok(()) }
    }
}
