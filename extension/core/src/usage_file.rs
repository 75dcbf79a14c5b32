//! The format of the file that carries counters over a clean restart of the server.
//!
//! All numbers are little-endian:
//!
//! | part | bytes |
//! |---|---|
//! | head | magic 8, version 4, databases 4, records 8, system identifier 8, checkpoint 8, timeline 4, zero 4, seed 8, holder 16, latest 8 |
//! | each database | oid 4, zero 4, generation 8, boot 16, node 64 (padded with zeros) |
//! | each record | id 16, database 4, kind 1, family 1, bits 1, in second 1, uses 4, denials 4, handed out 4 + 4, last used 8, address 16, limiter 8, owner 4, spent 8, granted 8 |
//! | end | CRC-32 (IEEE) of all before it, 4 |
//!
//! Whatever a file contains, reading it neither panics nor takes more memory than [`MAX_DATABASES`] require: it is read
//! once to be checked as a whole, and then again record by record.

use crate::net::Net;
use core::fmt;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::net::IpAddr;

/// Must be increased with every change of the layout.
pub const VERSION: u32 = 4;
pub const MAX_DATABASES: usize = 64;
/// Length of a node's name in bytes: the maximum that PostgreSQL allows for `cluster_name`, including its NUL.
pub const NODE_LEN: usize = 64;

const MAGIC: [u8; 8] = *b"tollgate";
const HEAD_LEN: usize = 80;
const DATABASE_LEN: usize = 96;
const RECORD_LEN: usize = 92;
const CHECKSUM_LEN: u64 = 4;

/// The clean shutdown at which a file was written. A server whose last shutdown was another one did not write the file:
/// it came from another cluster, or with half of a backup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shutdown {
    pub system_identifier: u64,
    /// The WAL location of the last checkpoint.
    pub checkpoint: u64,
    pub timeline: u32,
}

/// A generation that was drained and is not acknowledged, and the name under which it may have been applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outstanding {
    pub database: u32,
    pub generation: u64,
    pub boot: [u8; 16],
    /// Padded with zeros.
    pub node: [u8; NODE_LEN],
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    pub shutdown: Shutdown,
    /// The seed of the table's hash: a table of the same size and with the same seed has room for all entries.
    pub seed: u64,
    /// The name under which this server holds leases of quotas; all zero if it gives them up.
    pub holder: [u8; 16],
    /// The latest time that this server has seen, in microseconds since 2000-01-01: a quota's period that ended before it is over,
    /// whatever the clock says later.
    pub latest: i64,
    /// At most [`MAX_DATABASES`].
    pub outstanding: Vec<Outstanding>,
    pub records: u64,
}

/// One entry of the table. It may have no counters to flush, only the state of a limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    pub id: [u8; 16],
    pub database: u32,
    /// The kind of key, as the table numbers it.
    pub kind: u8,
    pub uses: u32,
    pub denials: u32,
    /// The part of `uses` and `denials` that belongs to the outstanding generation.
    pub handed_out: [u32; 2],
    /// In microseconds since 2000-01-01; 0 for never.
    pub last_used: i64,
    pub client: Option<Net>,
    /// The limiter's state: see [`crate::limit::State`].
    pub limiter: u64,
    /// The owner of the key: two digests of 16 bits, made with the head's seed.
    pub owner: u32,
    /// Of a quota, else 0: what was spent and what was granted (see [`crate::quota::State`]). `limiter` says until when, and
    /// `last_used` at what point more is wanted.
    pub spent: u64,
    pub granted: u64,
    /// Whether the entry was in the second of its key's two groups.
    pub in_second: bool,
}

/// Why a file is not read.
#[derive(Debug)]
pub enum Fault {
    Unreadable(io::Error),
    NotOurs,
    Version(u32),
    Length { is: u64, should_be: u64 },
    TooManyDatabases(u32),
    Checksum,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Unreadable(error) => write!(f, "it could not be read: {error}"),
            Fault::NotOurs => f.write_str("it does not begin like such a file"),
            Fault::Version(version) => {
                write!(f, "it has format version {version}, and this release reads version {VERSION}")
            }
            Fault::Length { is, should_be } => write!(f, "it has {is} bytes and should have {should_be}"),
            Fault::TooManyDatabases(count) => {
                write!(f, "it names {count} databases, more than there can be ({MAX_DATABASES})")
            }
            Fault::Checksum => f.write_str("its checksum is wrong"),
        }
    }
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        Fault::Unreadable(error)
    }
}

/// Writes a whole file. The number of records must be that in the head; otherwise the file cannot be read.
pub fn write(to: impl Write, head: &Head, records: impl Iterator<Item = Record>) -> io::Result<()> {
    let mut to = Summing { to, checksum: crc32fast::Hasher::new() };
    let mut bytes = Fields::<HEAD_LEN>::new();
    bytes.put(MAGIC);
    bytes.put(VERSION.to_le_bytes());
    bytes.put((head.outstanding.len() as u32).to_le_bytes());
    bytes.put(head.records.to_le_bytes());
    bytes.put(head.shutdown.system_identifier.to_le_bytes());
    bytes.put(head.shutdown.checkpoint.to_le_bytes());
    bytes.put(head.shutdown.timeline.to_le_bytes());
    bytes.put([0; 4]);
    bytes.put(head.seed.to_le_bytes());
    bytes.put(head.holder);
    bytes.put(head.latest.to_le_bytes());
    to.write_all(&bytes.whole())?;
    for outstanding in &head.outstanding {
        let mut bytes = Fields::<DATABASE_LEN>::new();
        bytes.put(outstanding.database.to_le_bytes());
        bytes.put([0; 4]);
        bytes.put(outstanding.generation.to_le_bytes());
        bytes.put(outstanding.boot);
        bytes.put(outstanding.node);
        to.write_all(&bytes.whole())?;
    }
    for record in records {
        to.write_all(&encode(&record))?;
    }
    let checksum = to.checksum.clone().finalize();
    to.write_all(&checksum.to_le_bytes())?;
    to.flush()
}

/// A file that was checked as a whole.
#[derive(Debug)]
pub struct Reader<R> {
    from: R,
    head: Head,
    left: u64,
}

impl<R: Read + Seek> Reader<R> {
    /// Checks the whole file. The reader should be buffered.
    pub fn open(mut from: R) -> Result<Self, Fault> {
        let is = from.seek(SeekFrom::End(0))?;
        from.seek(SeekFrom::Start(0))?;
        let smallest = HEAD_LEN as u64 + CHECKSUM_LEN;
        if is < MAGIC.len() as u64 {
            return Err(Fault::Length { is, should_be: smallest });
        }
        let mut magic = [0; MAGIC.len()];
        from.read_exact(&mut magic)?;
        if magic != MAGIC {
            return Err(Fault::NotOurs);
        }
        if is < smallest {
            return Err(Fault::Length { is, should_be: smallest });
        }
        from.seek(SeekFrom::Start(0))?;
        let mut from = Checking { from, checksum: crc32fast::Hasher::new() };
        let mut bytes = Fields::<HEAD_LEN>::read(&mut from)?;
        let _magic: [u8; 8] = bytes.take();
        let version = u32::from_le_bytes(bytes.take());
        if version != VERSION {
            return Err(Fault::Version(version));
        }
        let databases = u32::from_le_bytes(bytes.take());
        let records = u64::from_le_bytes(bytes.take());
        let shutdown = Shutdown {
            system_identifier: u64::from_le_bytes(bytes.take()),
            checkpoint: u64::from_le_bytes(bytes.take()),
            timeline: u32::from_le_bytes(bytes.take()),
        };
        let _zero: [u8; 4] = bytes.take();
        let seed = u64::from_le_bytes(bytes.take());
        let holder = bytes.take();
        let latest = i64::from_le_bytes(bytes.take());
        if databases as usize > MAX_DATABASES {
            return Err(Fault::TooManyDatabases(databases));
        }
        let should_be = records
            .saturating_mul(RECORD_LEN as u64)
            .saturating_add(smallest + u64::from(databases) * DATABASE_LEN as u64);
        if is != should_be {
            return Err(Fault::Length { is, should_be });
        }
        let mut outstanding = Vec::with_capacity(databases as usize);
        for _ in 0..databases {
            let mut bytes = Fields::<DATABASE_LEN>::read(&mut from)?;
            let database = u32::from_le_bytes(bytes.take());
            let _zero: [u8; 4] = bytes.take();
            outstanding.push(Outstanding {
                database,
                generation: u64::from_le_bytes(bytes.take()),
                boot: bytes.take(),
                node: bytes.take(),
            });
        }
        for _ in 0..records {
            Fields::<RECORD_LEN>::read(&mut from)?;
        }
        let checksum = from.checksum.clone().finalize();
        let mut written = [0; CHECKSUM_LEN as usize];
        from.read_exact(&mut written)?;
        if u32::from_le_bytes(written) != checksum {
            return Err(Fault::Checksum);
        }
        let mut from = from.from;
        from.seek(SeekFrom::Start((HEAD_LEN + outstanding.len() * DATABASE_LEN) as u64))?;
        let head = Head { shutdown, seed, holder, latest, outstanding, records };
        Ok(Reader { from, head, left: records })
    }

    pub fn head(&self) -> &Head {
        &self.head
    }
}

impl<R: Read> Iterator for Reader<R> {
    type Item = io::Result<Record>;

    /// Ends after the first error.
    fn next(&mut self) -> Option<Self::Item> {
        self.left = self.left.checked_sub(1)?;
        let record = Fields::<RECORD_LEN>::read(&mut self.from).map(decode);
        if record.is_err() {
            self.left = 0;
        }
        Some(record)
    }
}

const NO_ADDRESS: u8 = 0;
const V4: u8 = 4;
const V6: u8 = 6;

fn encode(record: &Record) -> [u8; RECORD_LEN] {
    let (family, bits, address) = match record.client.map(|net| (net.bits(), net.addr())) {
        None => (NO_ADDRESS, 0, [0; 16]),
        Some((bits, IpAddr::V4(address))) => (V4, bits, address.to_ipv6_mapped().octets()),
        Some((bits, IpAddr::V6(address))) => (V6, bits, address.octets()),
    };
    let mut bytes = Fields::new();
    bytes.put(record.id);
    bytes.put(record.database.to_le_bytes());
    bytes.put([record.kind, family, bits, record.in_second.into()]);
    bytes.put(record.uses.to_le_bytes());
    bytes.put(record.denials.to_le_bytes());
    bytes.put(record.handed_out[0].to_le_bytes());
    bytes.put(record.handed_out[1].to_le_bytes());
    bytes.put(record.last_used.to_le_bytes());
    bytes.put(address);
    bytes.put(record.limiter.to_le_bytes());
    bytes.put(record.owner.to_le_bytes());
    bytes.put(record.spent.to_le_bytes());
    bytes.put(record.granted.to_le_bytes());
    bytes.whole()
}

fn decode(mut bytes: Fields<RECORD_LEN>) -> Record {
    let id = bytes.take();
    let database = u32::from_le_bytes(bytes.take());
    let [kind, family, bits, in_second] = bytes.take();
    let uses = u32::from_le_bytes(bytes.take());
    let denials = u32::from_le_bytes(bytes.take());
    // No more can have been handed out than was counted; subtracting it relies on that.
    let handed_out =
        [u32::from_le_bytes(bytes.take()).min(uses), u32::from_le_bytes(bytes.take()).min(denials)];
    let last_used = i64::from_le_bytes(bytes.take());
    let address: [u8; 16] = bytes.take();
    let client = match family {
        V4 => Net::v4([address[12], address[13], address[14], address[15]], bits),
        V6 => Net::v6(address, bits),
        _ => None,
    };
    let limiter = u64::from_le_bytes(bytes.take());
    let owner = u32::from_le_bytes(bytes.take());
    let (spent, granted) = (u64::from_le_bytes(bytes.take()), u64::from_le_bytes(bytes.take()));
    Record {
        id,
        database,
        kind,
        uses,
        denials,
        handed_out,
        last_used,
        client,
        limiter,
        owner,
        spent,
        granted,
        in_second: in_second != 0,
    }
}

/// Bytes that are written or read field by field.
struct Fields<const N: usize> {
    bytes: [u8; N],
    at: usize,
}

impl<const N: usize> Fields<N> {
    fn new() -> Self {
        Fields { bytes: [0; N], at: 0 }
    }

    fn read(from: &mut impl Read) -> io::Result<Self> {
        let mut fields = Self::new();
        from.read_exact(&mut fields.bytes)?;
        Ok(fields)
    }

    fn put<const M: usize>(&mut self, field: [u8; M]) {
        self.bytes[self.at..self.at + M].copy_from_slice(&field);
        self.at += M;
    }

    fn take<const M: usize>(&mut self) -> [u8; M] {
        let mut field = [0; M];
        field.copy_from_slice(&self.bytes[self.at..self.at + M]);
        self.at += M;
        field
    }

    fn whole(self) -> [u8; N] {
        self.bytes
    }
}

struct Summing<W> {
    to: W,
    checksum: crc32fast::Hasher,
}

impl<W: Write> Write for Summing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.to.write(bytes)?;
        self.checksum.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

struct Checking<R> {
    from: R,
    checksum: crc32fast::Hasher,
}

impl<R: Read> Read for Checking<R> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let read = self.from.read(bytes)?;
        self.checksum.update(&bytes[..read]);
        Ok(read)
    }
}
