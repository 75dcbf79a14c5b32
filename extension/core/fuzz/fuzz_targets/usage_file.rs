//! Reading never panics and never takes more memory than the file's length justifies; and the data read is the data
//! written, byte for byte. Tried on raw bytes, and on bytes with a valid checksum, without which most checks are not
//! reached. How to run it: `fuzz/Cargo.toml`.

#![no_main]

use libfuzzer_sys::fuzz_target;
use std::io::Cursor;
use tollgate_core::usage_file::{Reader, Record, write};

fn read(bytes: &[u8]) {
    let Ok(mut reader) = Reader::open(Cursor::new(bytes)) else { return };
    let head = reader.head().clone();
    let records: Vec<Record> = reader.by_ref().map(|record| record.expect("it was readable before")).collect();
    assert_eq!(records.len() as u64, head.records);
    let mut again = Vec::new();
    write(&mut again, &head, records.iter().copied()).expect("writing to memory succeeds");
    assert_eq!(again.len(), bytes.len());
    let reader = Reader::open(Cursor::new(&again)).expect("just written");
    assert_eq!(reader.head(), &head);
    assert!(reader.map(|record| record.expect("just written")).eq(records));
}

fuzz_target!(|data: &[u8]| {
    read(data);
    let mut bytes = data.to_vec();
    bytes.extend(crc32fast::hash(data).to_le_bytes());
    read(&bytes);
});
