//! The partitioned table of counters. No unsafe: everything is an atomic in a slice, and who may touch what when is
//! said by the locks of [`Locks`] (see the rules in `mod.rs`).
//!
//! Counters live in generations. Uses are counted in the live half of an entry. `drain` closes a generation: it moves
//! each live half to the closed half, and hands the closed halves out as often as it is asked to, until `acknowledge`
//! clears them. So whoever carries counters to the tables may die at any moment and start over.

use core::sync::atomic::{AtomicBool, AtomicI64, AtomicU8, AtomicU32, AtomicU64, Ordering::*};
use std::net::IpAddr;
use tollgate_core::net::Net;
use tollgate_core::status::Code;

pub(super) const PARTITIONS: usize = 128;
pub(super) const MAX_DATABASES: usize = 64;
const OUTCOME_SHARDS: usize = 64;
/// How many entries a full partition looks at for one that it may evict.
const EVICTION_STEPS: usize = 16;
/// In microseconds: ten minutes, a hundred times the daemon's period.
const ABANDONED_AFTER: i64 = 600 * 1_000_000;

/// What an entry counts for.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    Token = 1,
}

/// One use, or one denial, of a token.
#[derive(Clone, Copy)]
pub(crate) struct Use {
    pub(crate) accepted: bool,
    /// Microseconds since 2000-01-01.
    pub(crate) at: i64,
    pub(crate) client: Option<Net>,
}

/// What one token was used in one generation.
#[derive(Clone, Copy)]
pub(crate) struct UsageRow {
    pub(crate) token_id: [u8; 16],
    pub(crate) uses: u64,
    pub(crate) denials: u64,
    /// Of the last accepted use; `None` if there was none.
    pub(crate) last_used: Option<(i64, Option<Net>)>,
}

pub(crate) struct Stats {
    pub(crate) boot: [u8; 16],
    pub(crate) started_at: i64,
    pub(crate) outcomes: [u64; Code::ALL.len()],
    pub(crate) tracked: u64,
    pub(crate) capacity: u64,
    pub(crate) overflowed: u64,
    /// Of this database; `None` before its first drain.
    pub(crate) generation: Option<u64>,
    pub(crate) closed_generation: Option<u64>,
}

/// The locks that the rules name. Guards release when dropped.
pub(super) trait Locks {
    type Guard;
    fn control(&self) -> Self::Guard;
    fn shared(&self, partition: usize) -> Self::Guard;
    fn exclusive(&self, partition: usize) -> Self::Guard;
}

/// Why counters cannot be handed out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    TooManyDatabases,
    /// In bytes.
    OutOfMemory(usize),
}

/// Counters of one half of an entry: the live or the closed.
#[repr(C)]
#[derive(Default)]
struct Half {
    uses: AtomicU64,
    denials: AtomicU64,
    /// 0 if not used.
    last_used: AtomicI64,
    /// The address of the last use, in network order.
    address: [AtomicU64; 2],
    family: AtomicU8,
    bits: AtomicU8,
    /// Held while last_used, address, family and bits are written together. Who finds it taken leaves them to the other,
    /// whose use is as late.
    writing: AtomicBool,
}

const NO_ADDRESS: u8 = 0;
const V4: u8 = 4;
const V6: u8 = 6;

/// One key and its counters: two cache lines, of which finding it and counting touch only the first.
#[repr(C, align(64))]
#[derive(Default)]
pub(super) struct Entry {
    /// With database and kind mixed in, so that they need not be read from the other line to compare: see [`words`].
    key: [AtomicU64; 2],
    live: Half,
    closed: Half,
    /// The next of its chain: index of an entry plus 1, or 0.
    next: AtomicU32,
    database: AtomicU32,
    kind: AtomicU8,
    /// Whether `closed` holds counters of the generation that its database has closed.
    is_closed: AtomicBool,
}

const _: () = assert!(size_of::<Entry>() == 128, "the setting's description says 128 bytes");

#[repr(C, align(64))]
#[derive(Default)]
pub(super) struct Partition {
    /// Entries in use; those beyond were never used.
    used: AtomicU32,
    /// Where the search for an entry to evict goes on.
    hand: AtomicU32,
    overflowed: AtomicU64,
}

#[repr(C, align(64))]
#[derive(Default)]
pub(super) struct OutcomeShard([AtomicU64; Code::ALL.len()]);

#[repr(C)]
#[derive(Default)]
pub(super) struct Database {
    oid: AtomicU32,
    /// When it was last drained.
    drained_at: AtomicI64,
    /// The generation that is open.
    generation: AtomicU64,
    /// The one that was handed out and not acknowledged; 0 for none.
    closed: AtomicU64,
}

/// What there is one of.
#[repr(C, align(64))]
pub(super) struct Header {
    boot: [AtomicU64; 2],
    started_at: AtomicI64,
    seed: AtomicU64,
    /// Counted for all databases together: one made from another as its template has the other's record of which
    /// generations were applied.
    next_generation: AtomicU64,
    databases: [Database; MAX_DATABASES],
    outcomes: [OutcomeShard; OUTCOME_SHARDS],
}

/// The table, wherever its memory came from.
#[derive(Clone, Copy)]
pub(super) struct Table<'a> {
    header: &'a Header,
    partitions: &'a [Partition],
    /// Heads of the chains, `buckets / PARTITIONS` to a partition: index of an entry plus 1, or 0.
    buckets: &'a [AtomicU32],
    entries: &'a [Entry],
}

/// Numbers of elements for a given number of keys.
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    pub(super) buckets: usize,
    pub(super) entries: usize,
}

impl Sizes {
    pub(super) fn for_keys(keys: usize) -> Self {
        let each = keys.div_ceil(PARTITIONS).max(1);
        Sizes { buckets: each.next_power_of_two() * PARTITIONS, entries: each * PARTITIONS }
    }
}

impl<'a> Table<'a> {
    pub(super) fn new(
        header: &'a Header,
        partitions: &'a [Partition],
        buckets: &'a [AtomicU32],
        entries: &'a [Entry],
    ) -> Self {
        Table { header, partitions, buckets, entries }
    }

    /// Stamps memory that is all zero. `boot` is random and never the same twice.
    pub(super) fn start(&self, boot: [u8; 16], seed: u64, now: i64) {
        store_key(&self.header.boot, &boot);
        self.header.seed.store(seed, Relaxed);
        self.header.started_at.store(now, Relaxed);
        // Counted from the start of the server in microseconds, so that a number is not used again after a restart and a
        // late acknowledgement cannot hit a later generation.
        self.header.next_generation.store(now.unsigned_abs().max(1), Relaxed);
    }

    pub(super) fn boot(&self) -> [u8; 16] {
        load_key(&self.header.boot)
    }

    pub(super) fn count_outcome(&self, process: usize, code: Code) {
        self.header.outcomes[process % OUTCOME_SHARDS].0[code.index()].fetch_add(1, Relaxed);
    }

    pub(super) fn count_use(
        &self,
        locks: &impl Locks,
        database: u32,
        kind: Kind,
        key: &[u8; 16],
        used: &Use,
    ) {
        let words = words(database, kind, key);
        let hash = self.hash(words);
        let partition = hash as usize % PARTITIONS;
        {
            let _shared = locks.shared(partition);
            if let Some(entry) = self.find(hash, words) {
                entry.live.count(used);
                return;
            }
        }
        let _exclusive = locks.exclusive(partition);
        // Between the two locks somebody may have inserted it.
        match self.find(hash, words).or_else(|| self.insert(hash, words, database, kind, used.at)) {
            Some(entry) => entry.live.count(used),
            None => {
                self.partitions[partition].overflowed.fetch_add(1, Relaxed);
            }
        }
    }

    /// The generation that is closed, and its counters.
    pub(super) fn drain(
        &self,
        locks: &impl Locks,
        database: u32,
        now: i64,
    ) -> Result<(u64, Vec<UsageRow>), Refusal> {
        // Allocated before any lock is taken. Entries that are inserted meanwhile may find no room: they stay for the next
        // generation.
        let mut rows = Vec::new();
        let room = self.tracked() + PARTITIONS;
        rows.try_reserve_exact(room).map_err(|_| Refusal::OutOfMemory(room * size_of::<UsageRow>()))?;
        let _control = locks.control();
        let slot = self.database(database).ok_or(Refusal::TooManyDatabases)?;
        slot.drained_at.store(now, Relaxed);
        let outstanding = slot.closed.load(Relaxed);
        let generation = if outstanding == 0 { slot.generation.load(Relaxed) } else { outstanding };
        for partition in 0..PARTITIONS {
            let _exclusive = locks.exclusive(partition);
            for entry in self.used_entries(partition).filter(|entry| entry.database.load(Relaxed) == database)
            {
                if outstanding == 0 && rows.len() < room {
                    entry.close();
                }
                if entry.is_closed.load(Relaxed) {
                    rows.push(entry.row());
                }
            }
        }
        if !rows.is_empty() {
            slot.closed.store(generation, Relaxed);
        }
        Ok((generation, rows))
    }

    /// The databases that have a slot.
    pub(super) fn databases(&self, locks: &impl Locks) -> [u32; MAX_DATABASES] {
        let _control = locks.control();
        core::array::from_fn(|i| self.header.databases[i].oid.load(Relaxed))
    }

    /// Frees the slot of a database that does not exist any more. Its entries are evicted as room is needed.
    pub(super) fn forget(&self, locks: &impl Locks, database: u32) {
        let _control = locks.control();
        if let Some(slot) = self.known_database(database) {
            slot.closed.store(0, Relaxed);
            slot.drained_at.store(0, Relaxed);
            slot.oid.store(0, Relaxed);
        }
    }

    pub(super) fn acknowledge(&self, locks: &impl Locks, database: u32, generation: u64) -> bool {
        let _control = locks.control();
        let Some(slot) = self.known_database(database) else { return false };
        if generation == 0 || slot.closed.load(Relaxed) != generation {
            return false;
        }
        for partition in 0..PARTITIONS {
            let _exclusive = locks.exclusive(partition);
            for entry in self.used_entries(partition) {
                if entry.database.load(Relaxed) == database && entry.is_closed.load(Relaxed) {
                    entry.closed.clear();
                    entry.is_closed.store(false, Relaxed);
                }
            }
        }
        slot.closed.store(0, Relaxed);
        slot.generation.store(self.header.next_generation.fetch_add(1, Relaxed), Relaxed);
        true
    }

    pub(super) fn stats(&self, locks: &impl Locks, database: u32) -> Stats {
        let _control = locks.control();
        let slot = self.known_database(database);
        let mut outcomes = [0; Code::ALL.len()];
        for shard in &self.header.outcomes {
            for (sum, counter) in outcomes.iter_mut().zip(&shard.0) {
                *sum += counter.load(Relaxed);
            }
        }
        Stats {
            boot: self.boot(),
            started_at: self.header.started_at.load(Relaxed),
            outcomes,
            tracked: self.tracked() as u64,
            capacity: self.entries.len() as u64,
            overflowed: self.partitions.iter().map(|partition| partition.overflowed.load(Relaxed)).sum(),
            generation: slot.map(|slot| slot.generation.load(Relaxed)),
            closed_generation: slot.map(|slot| slot.closed.load(Relaxed)).filter(|&closed| closed != 0),
        }
    }

    fn tracked(&self) -> usize {
        self.partitions.iter().map(|partition| partition.used.load(Relaxed) as usize).sum()
    }

    fn known_database(&self, oid: u32) -> Option<&'a Database> {
        self.header.databases.iter().find(|slot| slot.oid.load(Relaxed) == oid)
    }

    /// The slot of a database, taken for it if it has none. Under the control lock.
    fn database(&self, oid: u32) -> Option<&'a Database> {
        self.known_database(oid).or_else(|| {
            let free = self.header.databases.iter().find(|slot| slot.oid.load(Relaxed) == 0)?;
            free.generation.store(self.header.next_generation.fetch_add(1, Relaxed), Relaxed);
            free.oid.store(oid, Relaxed);
            Some(free)
        })
    }

    /// Whether a database has not been drained for so long that nobody seems to do it.
    fn is_abandoned(&self, oid: u32, now: i64) -> bool {
        let started_at = self.header.started_at.load(Relaxed);
        let drained_at = self.known_database(oid).map_or(started_at, |slot| slot.drained_at.load(Relaxed));
        now - drained_at > ABANDONED_AFTER
    }

    fn used_entries(&self, partition: usize) -> impl Iterator<Item = &'a Entry> + use<'a> {
        let each = self.entries.len() / PARTITIONS;
        let used = self.partitions[partition].used.load(Relaxed) as usize;
        self.entries[partition * each..partition * each + used].iter()
    }

    /// A folded multiplication: the keys are random or hashed already, the seed keeps anyone from aiming at one chain.
    fn hash(&self, [low, high]: [u64; 2]) -> u64 {
        let product =
            u128::from(low ^ self.header.seed.load(Relaxed)) * u128::from(high ^ 0x9e37_79b9_7f4a_7c15);
        (product as u64) ^ ((product >> 64) as u64)
    }

    fn chain(&self, hash: u64) -> &'a AtomicU32 {
        let each = self.buckets.len() / PARTITIONS;
        let partition = hash as usize % PARTITIONS;
        &self.buckets[partition * each + (hash as usize / PARTITIONS) % each]
    }

    fn find(&self, hash: u64, words: [u64; 2]) -> Option<&'a Entry> {
        let mut link = self.chain(hash).load(Relaxed);
        while link != 0 {
            let entry = &self.entries[link as usize - 1];
            if entry.words() == words {
                return Some(entry);
            }
            link = entry.next.load(Relaxed);
        }
        None
    }

    /// Under the partition's exclusive lock. `None` if it is full of what has not been flushed.
    fn insert(&self, hash: u64, words: [u64; 2], database: u32, kind: Kind, now: i64) -> Option<&'a Entry> {
        let each = self.entries.len() / PARTITIONS;
        let partition = hash as usize % PARTITIONS;
        let used = self.partitions[partition].used.load(Relaxed) as usize;
        let index = if used < each {
            self.partitions[partition].used.store(used as u32 + 1, Relaxed);
            partition * each + used
        } else {
            self.evict(partition, database, now)?
        };
        let entry = &self.entries[index];
        store_words(&entry.key, words);
        entry.database.store(database, Relaxed);
        entry.kind.store(kind as u8, Relaxed);
        entry.live.clear();
        entry.closed.clear();
        entry.is_closed.store(false, Relaxed);
        let chain = self.chain(hash);
        entry.next.store(chain.load(Relaxed), Relaxed);
        chain.store(index as u32 + 1, Relaxed);
        Some(entry)
    }

    /// Takes an entry out of its chain whose counters are all flushed, or belong to another database that nobody flushes:
    /// such a one, dropped perhaps, must not keep the others from being counted.
    fn evict(&self, partition: usize, database: u32, now: i64) -> Option<usize> {
        let each = self.entries.len() / PARTITIONS;
        let state = &self.partitions[partition];
        for _ in 0..EVICTION_STEPS.min(each) {
            let at = state.hand.load(Relaxed) as usize % each;
            state.hand.store((at as u32 + 1) % each as u32, Relaxed);
            let index = partition * each + at;
            let entry = &self.entries[index];
            if !entry.is_flushed() {
                let owner = entry.database.load(Relaxed);
                if owner == database || !self.is_abandoned(owner, now) {
                    continue;
                }
                state.overflowed.fetch_add(entry.unflushed(), Relaxed);
            }
            let hash = self.hash(entry.words());
            let mut link = self.chain(hash);
            while link.load(Relaxed) as usize != index + 1 {
                link = &self.entries[link.load(Relaxed) as usize - 1].next;
            }
            link.store(entry.next.load(Relaxed), Relaxed);
            return Some(index);
        }
        None
    }
}

impl Entry {
    fn words(&self) -> [u64; 2] {
        [self.key[0].load(Relaxed), self.key[1].load(Relaxed)]
    }

    fn is_flushed(&self) -> bool {
        !self.is_closed.load(Relaxed) && self.live.is_empty()
    }

    fn unflushed(&self) -> u64 {
        [&self.live, &self.closed]
            .map(|half| half.uses.load(Relaxed) + half.denials.load(Relaxed))
            .iter()
            .sum()
    }

    /// Moves the live half to the closed one. Under the partition's exclusive lock: nobody counts meanwhile.
    fn close(&self) {
        if !self.live.is_empty() {
            self.closed.copy_from(&self.live);
            self.live.clear();
            self.is_closed.store(true, Relaxed);
        }
    }

    fn row(&self) -> UsageRow {
        let last_used = self.closed.last_used.load(Relaxed);
        UsageRow {
            token_id: unmix(self.words(), self.database.load(Relaxed), self.kind.load(Relaxed)),
            uses: self.closed.uses.load(Relaxed),
            denials: self.closed.denials.load(Relaxed),
            last_used: (last_used != 0).then(|| (last_used, self.closed.client())),
        }
    }
}

impl Half {
    fn count(&self, used: &Use) {
        if !used.accepted {
            self.denials.fetch_add(1, Relaxed);
            return;
        }
        self.uses.fetch_add(1, Relaxed);
        if self.writing.swap(true, Acquire) {
            return;
        }
        if used.at >= self.last_used.load(Relaxed) {
            self.last_used.store(used.at, Relaxed);
            self.set_client(used.client);
        }
        self.writing.store(false, Release);
    }

    fn set_client(&self, client: Option<Net>) {
        let (family, address) = match client.map(|net| net.addr()) {
            None => (NO_ADDRESS, [0; 16]),
            Some(IpAddr::V4(address)) => (V4, address.to_ipv6_mapped().octets()),
            Some(IpAddr::V6(address)) => (V6, address.octets()),
        };
        store_key(&self.address, &address);
        self.family.store(family, Relaxed);
        self.bits.store(client.map_or(0, |net| net.bits()), Relaxed);
    }

    fn client(&self) -> Option<Net> {
        let address = load_key(&self.address);
        let bits = self.bits.load(Relaxed);
        match self.family.load(Relaxed) {
            V4 => Net::v4([address[12], address[13], address[14], address[15]], bits),
            V6 => Net::v6(address, bits),
            _ => None,
        }
    }

    fn is_empty(&self) -> bool {
        self.uses.load(Relaxed) == 0 && self.denials.load(Relaxed) == 0
    }

    fn clear(&self) {
        self.copy_from(&Half::default());
    }

    fn copy_from(&self, other: &Half) {
        self.uses.store(other.uses.load(Relaxed), Relaxed);
        self.denials.store(other.denials.load(Relaxed), Relaxed);
        self.last_used.store(other.last_used.load(Relaxed), Relaxed);
        for (to, from) in self.address.iter().zip(&other.address) {
            to.store(from.load(Relaxed), Relaxed);
        }
        self.family.store(other.family.load(Relaxed), Relaxed);
        self.bits.store(other.bits.load(Relaxed), Relaxed);
    }
}

/// A key as it is compared: the same id in another database, made from this one as its template, is another key.
fn words(database: u32, kind: Kind, key: &[u8; 16]) -> [u64; 2] {
    let word = u128::from_ne_bytes(*key);
    [word as u64, (word >> 64) as u64 ^ tag(database, kind as u8)]
}

/// The key that was mixed into `words`.
fn unmix([low, high]: [u64; 2], database: u32, kind: u8) -> [u8; 16] {
    (u128::from(low) | u128::from(high ^ tag(database, kind)) << 64).to_ne_bytes()
}

fn tag(database: u32, kind: u8) -> u64 {
    (u64::from(database) << 8) | u64::from(kind)
}

fn store_words(to: &[AtomicU64; 2], [low, high]: [u64; 2]) {
    to[0].store(low, Relaxed);
    to[1].store(high, Relaxed);
}

fn store_key(to: &[AtomicU64; 2], key: &[u8; 16]) {
    let word = u128::from_ne_bytes(*key);
    store_words(to, [word as u64, (word >> 64) as u64]);
}

fn load_key(from: &[AtomicU64; 2]) -> [u8; 16] {
    (u128::from(from[0].load(Relaxed)) | u128::from(from[1].load(Relaxed)) << 64).to_ne_bytes()
}
