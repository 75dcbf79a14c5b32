//! Networks: the examples in PostgreSQL's manual, the boundaries of families and lengths, and a bit-by-bit comparison
//! with `std::net` as the oracle.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use proptest::prelude::*;
use tollgate_core::net::{Net, client_of};

/// `192.0.2.0/24` or a single address, in any notation that `std::net` reads.
fn net(text: &str) -> Net {
    let (addr, bits) = match text.split_once('/') {
        Some((addr, bits)) => (addr, Some(bits.parse().unwrap())),
        None => (text, None),
    };
    match addr.parse().unwrap() {
        IpAddr::V4(v4) => Net::v4(v4.octets(), bits.unwrap_or(32)).unwrap(),
        IpAddr::V6(v6) => Net::v6(v6.octets(), bits.unwrap_or(128)).unwrap(),
    }
}

/// Address and length after converting IPv4-mapped networks to IPv4, the address as one character per bit.
fn bits_of(addr: IpAddr, len: usize) -> (bool, String, usize) {
    match addr {
        IpAddr::V4(v4) => (true, format!("{:032b}", u32::from(v4)), len),
        IpAddr::V6(v6) => {
            let text = format!("{:0128b}", u128::from(v6));
            let mapped = format!("{}{}", "0".repeat(80), "1".repeat(16));
            match text.strip_prefix(&mapped) {
                Some(rest) if len >= 96 => (true, rest.to_owned(), len - 96),
                _ => (false, text, len),
            }
        }
    }
}

fn reference_contains(outer: (IpAddr, u8), inner: (IpAddr, u8)) -> bool {
    let (outer_v4, outer_bits, outer_len) = bits_of(outer.0, outer.1.into());
    let (inner_v4, inner_bits, inner_len) = bits_of(inner.0, inner.1.into());
    outer_v4 == inner_v4 && outer_len <= inner_len && outer_bits[..outer_len] == inner_bits[..outer_len]
}

fn build((addr, bits): (IpAddr, u8)) -> Net {
    match addr {
        IpAddr::V4(v4) => Net::v4(v4.octets(), bits),
        IpAddr::V6(v6) => Net::v6(v6.octets(), bits),
    }
    .expect("the length fits the family")
}

#[test]
fn the_table_of_cases_holds() {
    let cases = [
        // The examples of PostgreSQL's manual for >>=.
        ("192.168.1.0/24", "192.168.1.0/24", true),
        ("192.168.1.0/24", "192.168.1.5", true),
        ("192.168.1.0/24", "192.168.0.5", false),
        ("192.168.1.5", "192.168.1.0/24", false),
        ("192.168.1.0/24", "192.168.1.128/25", true),
        ("192.168.1.128/25", "192.168.1.0/24", false),
        // Host bits in an inet do not change its network.
        ("192.168.1.77/24", "192.168.1.5", true),
        ("192.168.1.77/24", "192.168.2.77", false),
        ("0.0.0.0/0", "255.255.255.255", true),
        ("10.1.2.3/0", "192.0.2.1", true),
        ("192.0.2.1", "192.0.2.1", true),
        ("192.0.2.1", "192.0.2.2", false),
        ("192.0.2.0/31", "192.0.2.1", true),
        ("192.0.2.0/31", "192.0.2.2", false),
        ("127.0.0.0/1", "128.0.0.0", false),
        ("2001:db8::/32", "2001:db8:ffff::1", true),
        ("2001:db8::/32", "2001:db9::1", false),
        ("2001:db8::/127", "2001:db8::1", true),
        ("2001:db8::/127", "2001:db8::2", false),
        ("::1", "::1", true),
        ("::1", "::2", false),
        ("::/0", "2001:db8::1", true),
        // Families do not mix, even where the bits agree.
        ("::/0", "192.0.2.1", false),
        ("0.0.0.0/0", "::1", false),
        ("0.0.0.0/0", "::", false),
        ("::", "0.0.0.0", false),
        ("c000:201::", "192.0.2.1", false),
        ("c000:201::/32", "192.0.2.1", false),
        // IPv4 in IPv6 notation is IPv4.
        ("192.0.2.0/24", "::ffff:192.0.2.1", true),
        ("192.0.2.0/24", "::ffff:192.0.3.1", false),
        ("::ffff:192.0.2.0/120", "192.0.2.1", true),
        ("::ffff:192.0.2.0/120", "::ffff:192.0.2.1", true),
        ("::ffff:192.0.2.0/120", "192.0.3.1", false),
        ("::ffff:0:0/96", "192.0.2.1", true),
        ("::ffff:0:0/95", "192.0.2.1", false),
        ("::/0", "::ffff:192.0.2.1", false),
        ("::/0", "::ffff:192.0.2.0/95", true),
        // The deprecated IPv4-compatible form is IPv6, as it is for PostgreSQL.
        ("192.0.2.0/24", "::192.0.2.1", false),
        ("::/96", "::192.0.2.1", true),
    ];
    for (outer, inner, expected) in cases {
        assert_eq!(net(outer).contains(&net(inner)), expected, "{outer} contains {inner}");
    }
}

#[test]
fn a_length_that_the_family_does_not_have_is_refused() {
    for bits in 0..=u8::MAX {
        assert_eq!(Net::v4([192, 0, 2, 1], bits).is_some(), bits <= 32, "{bits}");
        assert_eq!(Net::v6(Ipv6Addr::LOCALHOST.octets(), bits).is_some(), bits <= 128, "{bits}");
        let mapped = Ipv4Addr::new(192, 0, 2, 1).to_ipv6_mapped();
        assert_eq!(Net::v6(mapped.octets(), bits).is_some(), bits <= 128, "{bits}, mapped");
    }
}

#[test]
fn a_network_is_shown_as_postgres_shows_inet() {
    let cases = [
        ("192.0.2.1", "192.0.2.1"),
        ("192.0.2.7/24", "192.0.2.7/24"),
        ("0.0.0.0/0", "0.0.0.0/0"),
        ("2001:db8::1", "2001:db8::1"),
        ("2001:db8::/32", "2001:db8::/32"),
        ("::/0", "::/0"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.0/120", "192.0.2.0/24"),
    ];
    for (given, shown) in cases {
        assert_eq!(net(given).to_string(), shown);
    }
}

#[test]
fn an_address_is_the_network_of_itself_alone() {
    for (given, bits) in [("192.0.2.1", 32), ("2001:db8::1", 128), ("::ffff:192.0.2.1", 32)] {
        let addr: IpAddr = given.parse().unwrap();
        assert_eq!(Net::from(addr), net(given));
        assert_eq!(Net::from(addr).bits(), bits);
        assert_eq!(Net::from(addr).addr(), addr.to_canonical());
    }
}

fn any_net() -> impl Strategy<Value = (IpAddr, u8)> {
    prop_oneof![
        (any::<Ipv4Addr>(), 0_u8..=32).prop_map(|(addr, bits)| (IpAddr::V4(addr), bits)),
        (any::<Ipv6Addr>(), 0_u8..=128).prop_map(|(addr, bits)| (IpAddr::V6(addr), bits)),
        (any::<Ipv4Addr>(), 0_u8..=128).prop_map(|(addr, bits)| (IpAddr::V6(addr.to_ipv6_mapped()), bits)),
    ]
}

/// A network and a second one of the same family that differs from a chosen bit on: unrelated networks hardly ever
/// overlap.
fn related_nets() -> impl Strategy<Value = ((IpAddr, u8), (IpAddr, u8))> {
    (any_net(), any::<u8>(), 0_u32..=128).prop_map(|((addr, bits), other_bits, flipped)| {
        let other = match addr {
            IpAddr::V4(v4) => {
                let flip = 1_u32.checked_shl(flipped).unwrap_or(0);
                (IpAddr::V4((u32::from(v4) ^ flip).into()), other_bits % 33)
            }
            IpAddr::V6(v6) => {
                let flip = 1_u128.checked_shl(flipped).unwrap_or(0);
                (IpAddr::V6((u128::from(v6) ^ flip).into()), other_bits % 129)
            }
        };
        ((addr, bits), other)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(10_000))]

    #[test]
    fn unrelated_networks_contain_as_the_reference_says(outer in any_net(), inner in any_net()) {
        prop_assert_eq!(build(outer).contains(&build(inner)), reference_contains(outer, inner));
    }

    #[test]
    fn related_networks_contain_as_the_reference_says((outer, inner) in related_nets()) {
        prop_assert_eq!(build(outer).contains(&build(inner)), reference_contains(outer, inner));
        prop_assert_eq!(build(inner).contains(&build(outer)), reference_contains(inner, outer));
    }

    #[test]
    fn an_address_reads_back_as_it_was_given(given in any_net()) {
        let built = build(given);
        if built.addr() != given.0 {
            prop_assert_eq!(built.addr(), given.0.to_canonical());
            prop_assert_eq!(built.bits(), given.1 - 96);
        } else {
            prop_assert_eq!(built.bits(), given.1);
        }
    }
}

proptest! {
    #[test]
    fn the_client_is_found_among_any_hops_behind_what_it_made_up(
        forged in "[ -~]{0,40}",
        client in any::<u32>(),
        port in proptest::option::of(any::<u16>()),
        proxies in proptest::collection::vec(any::<[u8; 3]>(), 0..5),
    ) {
        let client = Ipv4Addr::from(client | 0x8000_0000);
        let is_trusted = |hop: &Net| net("10.0.0.0/8").contains(hop);
        let shown = port.map_or_else(|| client.to_string(), |port| format!("{client}:{port}"));
        let behind: String = proxies.iter().map(|[a, b, c]| format!(" , 10.{a}.{b}.{c}")).collect();
        prop_assert_eq!(client_of(&format!("{forged},{shown}{behind}"), is_trusted), Some(IpAddr::V4(client)));
        let _ = client_of(&forged, is_trusted);
    }
}
