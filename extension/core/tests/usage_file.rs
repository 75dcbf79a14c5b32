//! The usage file: the data read is the data written, and damaged files are refused.

use std::io::{self, Cursor, Write};

use proptest::prelude::*;
use tollgate_core::net::Net;
use tollgate_core::usage_file::{
    Fault, Head, MAX_DATABASES, NODE_LEN, Outstanding, Reader, Record, Shutdown, VERSION, write,
};

fn written(head: &Head, records: &[Record]) -> Vec<u8> {
    let mut bytes = Vec::new();
    write(&mut bytes, head, records.iter().copied()).unwrap();
    bytes
}

fn read(bytes: &[u8]) -> Result<(Head, Vec<Record>), Fault> {
    let reader = Reader::open(Cursor::new(bytes))?;
    let head = reader.head().clone();
    Ok((head, reader.collect::<io::Result<_>>()?))
}

fn fault(bytes: &[u8]) -> String {
    read(bytes).expect_err("this is not a whole file").to_string()
}

fn example(count: u8) -> (Head, Vec<Record>) {
    let records: Vec<Record> = (0..count)
        .map(|n| Record {
            id: [n; 16],
            database: 16_384,
            kind: 1,
            uses: 5,
            denials: u32::from(n),
            handed_out: [4, 0],
            last_used: 800_000_000_000_000,
            client: Net::v4([192, 0, 2, n], 32),
            limiter: u64::MAX - u64::from(n),
            owner: 0x0102_0304 + u32::from(n),
            spent: u64::from(n),
            granted: 255,
            in_second: n % 2 == 1,
        })
        .collect();
    let outstanding = Outstanding { database: 16_384, generation: 7, boot: [9; 16], node: [b'n'; NODE_LEN] };
    let shutdown = Shutdown { system_identifier: 1, checkpoint: 2, timeline: 3 };
    (
        Head {
            shutdown,
            seed: 4,
            holder: [8; 16],
            latest: 800_000_000_000_001,
            outstanding: vec![outstanding],
            records: count.into(),
        },
        records,
    )
}

fn any_client() -> impl Strategy<Value = Option<Net>> {
    prop_oneof![
        Just(None),
        (any::<[u8; 4]>(), 0..=32_u8).prop_map(|(address, bits)| Net::v4(address, bits)),
        (any::<[u8; 16]>(), 0..=128_u8).prop_map(|(address, bits)| Net::v6(address, bits)),
    ]
}

fn any_record() -> impl Strategy<Value = Record> {
    let counts = (any::<u32>(), any::<u32>(), any::<[u32; 2]>());
    let limiter = (any::<[u64; 3]>(), any::<u32>(), any::<bool>());
    (any::<[u8; 16]>(), any::<u32>(), any::<u8>(), counts, any::<i64>(), any_client(), limiter).prop_map(
        |(
            id,
            database,
            kind,
            (uses, denials, handed_out),
            last_used,
            client,
            ([limiter, spent, granted], owner, in_second),
        )| Record {
            id,
            database,
            kind,
            uses,
            denials,
            handed_out: [handed_out[0].min(uses), handed_out[1].min(denials)],
            last_used,
            client,
            limiter,
            owner,
            spent,
            granted,
            in_second,
        },
    )
}

fn any_file() -> impl Strategy<Value = (Head, Vec<Record>)> {
    let outstanding = (any::<u32>(), any::<u64>(), any::<[u8; 16]>(), any::<[u8; 32]>()).prop_map(
        |(database, generation, boot, name)| {
            let mut node = [0; NODE_LEN];
            node[..32].copy_from_slice(&name);
            Outstanding { database, generation, boot, node }
        },
    );
    let shutdown = any::<(u64, u64, u32)>().prop_map(|(system_identifier, checkpoint, timeline)| Shutdown {
        system_identifier,
        checkpoint,
        timeline,
    });
    let outstanding = proptest::collection::vec(outstanding, 0..=MAX_DATABASES);
    let records = proptest::collection::vec(any_record(), 0..100);
    let names = (any::<u64>(), any::<[u8; 16]>(), any::<i64>());
    (shutdown, names, outstanding, records).prop_map(
        |(shutdown, (seed, holder, latest), outstanding, records)| {
            (Head { shutdown, seed, holder, latest, outstanding, records: records.len() as u64 }, records)
        },
    )
}

proptest! {
    #[test]
    fn the_data_read_is_the_data_written((head, records) in any_file()) {
        prop_assert_eq!(read(&written(&head, &records)).unwrap(), (head, records));
    }

    #[test]
    fn a_file_that_was_cut_off_or_grew_is_not_read((head, records) in any_file(), cut in any::<prop::sample::Index>()) {
        let mut bytes = written(&head, &records);
        prop_assert!(read(&bytes[..cut.index(bytes.len())]).is_err());
        bytes.push(0);
        prop_assert!(read(&bytes).is_err());
    }

    #[test]
    fn bytes_of_any_kind_do_no_harm(mut bytes in proptest::collection::vec(any::<u8>(), 0..400), ours in any::<bool>()) {
        let (head, records) = example(3);
        let whole = written(&head, &records);
        if ours {
            let beginning = bytes.len().min(20);
            bytes[..beginning].copy_from_slice(&whole[..beginning]);
        }
        prop_assert!(read(&bytes).is_err());
    }
}

#[test]
fn no_single_bit_can_flip_unnoticed() {
    let (head, records) = example(3);
    let whole = written(&head, &records);
    for bit in 0..8 * whole.len() {
        let mut bytes = whole.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        assert!(read(&bytes).is_err(), "bit {bit}");
    }
}

#[test]
fn each_fault_is_named() {
    let (head, records) = example(2);
    let whole = written(&head, &records);
    let changed = |at: usize, to: &[u8]| {
        let mut bytes = whole.clone();
        bytes[at..at + to.len()].copy_from_slice(to);
        fault(&bytes)
    };
    assert_eq!(fault(&[]), "it has 0 bytes and should have 84");
    assert_eq!(fault(b"toll"), "it has 4 bytes and should have 84");
    assert_eq!(fault(&whole[..30]), "it has 30 bytes and should have 84");
    assert_eq!(fault(&whole[..363]), "it has 363 bytes and should have 364");
    assert_eq!(fault(&[0; 364]), "it does not begin like such a file");
    let later = (VERSION + 1).to_le_bytes();
    assert_eq!(changed(8, &later), "it has format version 5, and this release reads version 4");
    assert_eq!(changed(12, &[65]), "it names 65 databases, more than there can be (64)");
    // Neither is that much memory allocated, nor does the product overflow.
    let huge = format!("it has 364 bytes and should have {}", u64::MAX);
    assert_eq!(changed(16, &[0xff; 8]), huge);
    assert_eq!(changed(200, &[77]), "its checksum is wrong");
}

/// Servers in the field have such files: a change of the layout needs a new version.
#[test]
fn the_layout_is_that_of_version_4() {
    assert_eq!(VERSION, 4);
    let (head, records) = example(2);
    assert_eq!(crc32fast::hash(&written(&head, &records)[..360]), LAYOUT);
}

const LAYOUT: u32 = 2_468_145_500;

#[test]
fn more_handed_out_than_was_counted_is_taken_as_all_of_it() {
    let (head, mut records) = example(1);
    records[0].handed_out = [6, 9];
    let (_, read) = read(&written(&head, &records)).unwrap();
    assert_eq!(read[0].handed_out, [5, 0]);
}

#[test]
fn a_full_disk_is_an_error() {
    struct Full;
    impl Write for Full {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::StorageFull.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let (head, records) = example(1);
    let error = write(Full, &head, records.into_iter()).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::StorageFull);
}
