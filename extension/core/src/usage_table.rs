//! The table of counters. No unsafe: everything is an atomic in a slice, and the locks define who may access what (see
//! the rules in the extension's `shmem/mod.rs`).
//!
//! It consists of groups, usually a few thousand. A key is in the first group that its hash selects, or, if that was
//! full, in a second one; tags in the group's first cache line say in which slot it may be, and each slot is one cache
//! line. So counting a use mostly takes two cache lines, and for a known key the first is only read. With one group per
//! key instead of two, one key in a thousand would find no room as soon as the table holds the number of keys it was
//! sized for, and a limit that cannot be kept refuses.
//!
//! An entry may have a limiter in addition to its counters. It is charged under the group's lock, together with
//! counting the use. While its allowance is not full the entry stays, unless its owner has more than a fair share of
//! the room.
//!
//! Sharing the room: each kind of key may use a part of each group, addresses at most a quarter, all limiters together
//! three quarters, so that there is always room for counters. A new key takes a slot that is empty, or whose counters
//! are flushed and whose limiter is full again. If there is none, it may take a slot from an owner that has more slots
//! in the two groups than its own: from the database with most entries there, within that from the role that issued
//! most of the tokens, within that from the user with most. So an owner that fills the table displaces its own entries,
//! and cannot displace those of others: each database is guaranteed an equal part, each issuing role an equal part of
//! that, and each user an equal part of that.
//!
//! A quota's entry holds what this server may still spend of it (see `crate::quota`), and stays until its period ends, in at
//! most half of a group's slots. So an entry that is not there has spent nothing in its period. It finds room as other keys
//! do, except that those that it has there count as its database's own, and that it does not take the slot of another quota.
//! Only if the database of one has more of them in a group may it take the slot of that; from then on, entries that are added
//! there count as spent, until the period of what was forgotten is over, and a restart gives all leases up.
//!
//! Counters belong to generations. `drain` closes a generation: it notes in each entry how much was counted, and hands
//! the same figures out until `acknowledge` subtracts them. So the process that moves counters to the tables may fail
//! at any moment and start again. Counters that are not acknowledged when the server is stopped are carried over to its
//! next start.

use crate::limit::{Charge, Limit, State};
use crate::net::Net;
use crate::quota::{self, Lease, Spent};
use crate::status::Code;
pub use crate::usage_file::MAX_DATABASES;
use crate::usage_file::{Head, NODE_LEN, Outstanding, Record, Shutdown};
use core::sync::atomic::{AtomicI64, AtomicU8, AtomicU32, AtomicU64, Ordering::*};
use std::net::IpAddr;

const SHARDS: usize = 64;
/// Slots per group: as many as there are tags in one cache line.
pub const SLOTS_PER_GROUP: usize = 4 * TAG_WORDS;
const TAG_WORDS: usize = 7;
const ALL_SLOTS: u32 = (1 << SLOTS_PER_GROUP) - 1;
/// Slots of a group that addresses may use: a client that fails from very many addresses must not take the room of
/// tokens.
const MAX_ADDRESSES: usize = SLOTS_PER_GROUP / 4;
/// Slots of a group that limiters in use may take, including addresses: a limiter may last for a day, and the counters
/// of others must find room meanwhile.
const MAX_LIMITED: usize = SLOTS_PER_GROUP - SLOTS_PER_GROUP / 4;
/// Slots of a group that quotas may take: a period may last for ever, and limits and counters must find room meanwhile.
const MAX_QUOTAS: usize = SLOTS_PER_GROUP / 2;
/// Saved instead of the name under which leases are held, if a lease may have been spent of which nothing is known.
const NO_HOLDER: [u8; 16] = [0; 16];
/// Number of locks for adding an entry; a key's hash selects one.
pub const INSERT_LOCKS: usize = 32;
/// Maximum number of rows handed out at a time, which limits the memory of the session that drains and of the daemon;
/// the rest goes into the next generation.
const MOST_ROWS: usize = 16_384;
/// Groups that are sampled to estimate how full the table is: keys are spread evenly over all of them.
const SAMPLE: usize = 4096;
/// Entries that are looked at to estimate how many limits are in use.
const SAMPLE_OF_LIMITS: u64 = 65_536;

/// The kind of key that an entry counts for.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// By its id.
    Token = 1,
    /// By a digest of the user's id.
    User = 2,
    /// A client's, by the address.
    Address = 3,
    /// By its id.
    Quota = 4,
}

impl Kind {
    fn from_number(number: u8) -> Option<Self> {
        [Kind::Token, Kind::User, Kind::Address, Kind::Quota].into_iter().find(|kind| *kind as u8 == number)
    }
}

/// The database is part of the key: a database created from another as its template has the same ids.
#[derive(Clone, Copy)]
struct Key {
    id: [u64; 2],
    database: u32,
    kind: Kind,
}

/// The owner of a key, for sharing the room: digests of the role that issued the token and of the token's user. All
/// zero for an address.
#[derive(Clone, Copy, Default)]
pub struct Owner {
    pub creator: u64,
    pub user: u64,
}

/// One use, or one denial, of a token.
#[derive(Clone, Copy)]
pub struct Use {
    pub accepted: bool,
    /// Microseconds since 2000-01-01.
    pub at: i64,
    pub client: Option<Net>,
}

/// The usage of one token in one generation.
#[derive(Clone, Copy)]
pub struct UsageRow {
    pub token_id: [u8; 16],
    pub uses: u64,
    pub denials: u64,
    /// The last accepted use; `None` if there was none.
    pub last_used: Option<(i64, Option<Net>)>,
}

/// A closed generation: its name and its counters.
pub struct Drained {
    /// The server, and the start of it, that first handed the generation out.
    pub node: [u8; NODE_LEN],
    pub boot: [u8; 16],
    pub generation: u64,
    pub rows: Vec<UsageRow>,
}

pub struct Stats {
    pub boot: [u8; 16],
    pub started_at: i64,
    pub outcomes: [u64; Code::ALL.len()],
    pub tracked: u64,
    pub overflowed: u64,
    /// Of this database; `None` before its first drain.
    pub generation: Option<u64>,
    pub closed_generation: Option<u64>,
}

/// Locks whose waiters sleep. The guards release them when dropped.
pub trait Control {
    type Guard;
    /// The control lock.
    fn hold(&self) -> Self::Guard;
    /// One of the [`INSERT_LOCKS`].
    fn hold_to_insert(&self, number: usize) -> Self::Guard;
}

/// A lock that is held for some tens of instructions, which call nothing, allocate nothing and cannot fail.
pub trait SpinLock: Default {
    type Guard<'a>
    where
        Self: 'a;
    /// Called before it is first taken.
    fn init(&self);
    fn hold(&self) -> Self::Guard<'_>;
}

/// Why counters cannot be drained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    TooManyDatabases,
    /// In bytes.
    OutOfMemory(usize),
}

const NO_ADDRESS: u8 = 0;
const V4: u8 = 4;
const V6: u8 = 6;

/// One key and its counters, in one cache line. Written under the group's lock.
///
/// Of a quota: `address` holds what was spent and what was granted, `limiter` the end of the period, and `last_used` at what
/// point more is wanted.
#[repr(C, align(64))]
#[derive(Default)]
struct Entry {
    id: [AtomicU64; 2],
    /// The last accepted use; 0 if there was none since the last flushed one.
    last_used: AtomicI64,
    /// The client address of the last use, in network order.
    address: [AtomicU64; 2],
    /// The state of the limiter: see `crate::limit`.
    limiter: AtomicU64,
    uses: AtomicU32,
    denials: AtomicU32,
    database: AtomicU32,
    kind: AtomicU8,
    family: AtomicU8,
    bits: AtomicU8,
}

/// The part of an entry's counters that was handed out and not acknowledged. Protected by the group's lock.
#[repr(C)]
#[derive(Default)]
struct HandedOut {
    uses: AtomicU32,
    denials: AtomicU32,
}

#[repr(C, align(64))]
#[derive(Default)]
pub struct Group<L> {
    /// Four per word, each a part of the hash of the key in its slot; 0 for a slot that was never used.
    tags: [AtomicU64; TAG_WORDS],
    /// A bit for each slot with unflushed counters.
    unflushed: AtomicU32,
    /// Held to write anything in the group. Reads without it only suggest what is worth checking under it.
    lock: L,
    entries: [Entry; SLOTS_PER_GROUP],
    handed_out: [HandedOut; SLOTS_PER_GROUP],
    /// For each slot, keyed digests of its owner: 16 bits of the issuing role and 16 of the user.
    owners: [AtomicU32; SLOTS_PER_GROUP],
    /// Until when quotas last that this group has forgotten, like a limiter's state; 0 for none.
    forgotten: AtomicU64,
}

const _: () = assert!(size_of::<Entry>() == 64);

#[repr(C, align(64))]
#[derive(Default)]
struct Shard {
    outcomes: [AtomicU64; Code::ALL.len()],
    /// Uses that found no room.
    overflowed: AtomicU64,
}

#[repr(C)]
#[derive(Default)]
pub struct Database {
    oid: AtomicU32,
    /// The open generation.
    generation: AtomicU64,
    /// The closed generation, drained and not acknowledged; 0 for none.
    closed: AtomicU64,
    /// Its origin: an earlier start of the server, if it has been outstanding since then.
    closed_under: Origin,
}

/// Distinguishes the generations of one start of one server from all others.
#[repr(C)]
#[derive(Default)]
struct Origin {
    boot: [AtomicU64; 2],
    node: [AtomicU64; NODE_LEN / 8],
}

impl Origin {
    fn store(&self, node: &[u8; NODE_LEN], boot: &[u8; 16]) {
        store(&self.boot, boot);
        for (word, bytes) in self.node.iter().zip(node.as_chunks().0) {
            word.store(u64::from_ne_bytes(*bytes), Relaxed);
        }
    }

    fn boot(&self) -> [u8; 16] {
        load(&self.boot)
    }

    fn node(&self) -> [u8; NODE_LEN] {
        let mut node = [0; NODE_LEN];
        for (bytes, word) in node.as_chunks_mut().0.iter_mut().zip(&self.node) {
            *bytes = word.load(Relaxed).to_ne_bytes();
        }
        node
    }
}

/// The parts of which there is only one.
#[repr(C, align(64))]
pub struct Header {
    origin: Origin,
    started_at: AtomicI64,
    seed: AtomicU64,
    /// The name under which this server holds leases of quotas: as long as none of them was forgotten.
    holder: [AtomicU64; 2],
    /// The latest time at which an entry was added or a quota's period began: if the clock goes back, an entry whose
    /// period has ended may be gone already.
    latest: AtomicI64,
    /// One sequence for all databases: a database created from another as its template also has the other's record of
    /// which generations were applied.
    next_generation: AtomicU64,
    databases: [Database; MAX_DATABASES],
    shards: [Shard; SHARDS],
}

/// The table, independent of where its memory came from.
pub struct Table<'a, L> {
    header: &'a Header,
    groups: &'a [Group<L>],
}

/// The number of groups for a number of keys.
pub fn groups_for(keys: usize) -> usize {
    (keys * 3 / 2).div_ceil(SLOTS_PER_GROUP).max(1)
}

/// A key that is to be counted or limited.
struct Wanted<'a> {
    key: &'a Key,
    limited: bool,
    /// Called only if the key has no entry.
    owner: &'a dyn Fn() -> Owner,
    now: i64,
}

/// A key that has no entry yet.
struct NewKey<'a> {
    key: &'a Key,
    hash: u64,
    /// Whether it is about to get a limiter in use.
    limited: bool,
    owner: u32,
    now: i64,
}

/// The result of restoring the entries of an earlier start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Restored {
    pub kept: u64,
    /// Limits in use that found no room: of tokens, of users, of addresses; and quotas.
    pub lost_limits: [u64; 4],
    /// The unflushed counts of keys that found no room.
    pub lost_counters: u64,
    pub lost_uses: u64,
}

impl Restored {
    fn add(&mut self, record: &Record, now: i64, is_kept: bool) {
        if is_kept {
            self.kept += 1;
            return;
        }
        if let Some(kind) = Kind::from_number(record.kind)
            && !State(record.limiter).is_idle(now)
        {
            self.lost_limits[kind as usize - 1] += 1;
        }
        let uses = u64::from(record.uses) + u64::from(record.denials);
        self.lost_counters += u64::from(uses > 0);
        self.lost_uses += uses;
    }
}

impl<L> Clone for Table<'_, L> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<L> Copy for Table<'_, L> {}

impl<'a, L: SpinLock> Table<'a, L> {
    pub fn new(header: &'a Header, groups: &'a [Group<L>]) -> Self {
        const {
            assert!(
                core::mem::offset_of!(Group<L>, entries) == 64,
                "the tags and the lock are one cache line"
            );
        };
        const {
            assert!(
                size_of::<Group<L>>() * 3 / 2 / SLOTS_PER_GROUP <= 128,
                "the setting's description is right"
            );
        };
        Table { header, groups }
    }

    /// Initialises memory that is all zero. `boot` is random and never repeats.
    pub fn start(&self, node: &[u8; NODE_LEN], boot: &[u8; 16], seed: u64, now: i64) {
        self.header.origin.store(node, boot);
        self.header.seed.store(seed, Relaxed);
        self.header.started_at.store(now, Relaxed);
        self.header.latest.store(now, Relaxed);
        store(&self.header.holder, boot);
        // Starts at the time of the server's start in microseconds, so that a number is not used again after a restart
        // and a late acknowledgement cannot match a later generation.
        self.header.next_generation.store(now.unsigned_abs().max(1), Relaxed);
        for group in self.groups {
            group.lock.init();
        }
    }

    pub fn boot(&self) -> [u8; 16] {
        self.header.origin.boot()
    }

    /// The data to keep while the server is down: the head of the file and the records. Call it when no other process
    /// can write any more.
    pub fn save(&self, shutdown: Shutdown, now: i64) -> (Head, impl Iterator<Item = Record> + use<'a, L>) {
        let outstanding = self
            .header
            .databases
            .iter()
            .filter(|slot| slot.closed.load(Relaxed) != 0)
            .map(|slot| Outstanding {
                database: slot.oid.load(Relaxed),
                generation: slot.closed.load(Relaxed),
                boot: slot.closed_under.boot(),
                node: slot.closed_under.node(),
            })
            .collect();
        let seed = self.header.seed.load(Relaxed);
        let records = self.records(now).count() as u64;
        // What a group has forgotten is not in the file.
        let has_forgotten = self.groups.iter().any(|group| group.has_forgotten(now));
        let holder = if has_forgotten { NO_HOLDER } else { load(&self.header.holder) };
        let latest = self.latest(now);
        (Head { shutdown, seed, holder, latest, outstanding, records }, self.records(now))
    }

    /// Limits in use come first, so that a smaller table has room for them, if not for all counters: a lost count is
    /// reported, but a lost limit admits too many requests.
    fn records(&self, now: i64) -> impl Iterator<Item = Record> + use<'a, L> {
        let table = *self;
        let all = move || {
            let slots =
                table.groups.iter().flat_map(|group| bits(group.used()).map(move |slot| (group, slot)));
            slots.map(move |(group, slot)| {
                let record = group.record(slot);
                let in_second = table
                    .key(&record)
                    .is_some_and(|key| !core::ptr::eq(table.groups_of(table.hash(&key))[0], group));
                Record { in_second, ..record }
            })
        };
        let limited = move |record: &Record| !State(record.limiter).is_idle(now);
        let counted = |record: &Record| record.uses > 0 || record.denials > 0;
        all().filter(limited).chain(all().filter(move |record| !limited(record) && counted(record)))
    }

    /// Restores the entries of an earlier start, before the first use is counted. A table of the same size has room for
    /// all of them.
    pub fn restore(&self, head: &Head, records: impl Iterator<Item = Record>) -> Restored {
        self.header.seed.store(head.seed, Relaxed);
        self.header.latest.fetch_max(head.latest, Relaxed);
        let now = self.header.started_at.load(Relaxed);
        for (slot, outstanding) in self.header.databases.iter().zip(&head.outstanding) {
            slot.oid.store(outstanding.database, Relaxed);
            slot.generation.store(outstanding.generation, Relaxed);
            slot.closed.store(outstanding.generation, Relaxed);
            slot.closed_under.store(&outstanding.node, &outstanding.boot);
        }
        let (mut restored, mut seen) = (Restored::default(), 0);
        for record in records {
            seen += 1;
            restored.add(&record, now, self.restore_one(&record, now));
        }
        let is_whole = seen == head.records && restored.lost_limits[Kind::Quota as usize - 1] == 0;
        if is_whole && head.holder != NO_HOLDER {
            store(&self.header.holder, &head.holder);
        } else {
            self.forget_quotas();
        }
        self.shard(0).overflowed.fetch_add(restored.lost_uses, Relaxed);
        restored
    }

    fn restore_one(&self, record: &Record, now: i64) -> bool {
        let Some(key) = self.key(record) else { return false };
        let hash = self.hash(&key);
        // In the group where it was there is room for it.
        let mut groups = self.groups_of(hash);
        if record.in_second {
            groups.reverse();
        }
        let limited = !State(record.limiter).is_idle(now);
        let new_key = NewKey { key: &key, hash, limited, owner: record.owner, now };
        groups.iter().any(|group| group.insert(&new_key, |slot| group.resume(slot, record)).is_some())
    }

    /// `None` for a kind that a later release added.
    fn key(&self, record: &Record) -> Option<Key> {
        let kind = Kind::from_number(record.kind)?;
        Some(Key { id: split(&record.id), database: record.database, kind })
    }

    /// The fraction of the room taken by unflushed counters, from 0 to 1; estimated from a sample in a large table, so
    /// that the cost does not depend on its size.
    pub fn pressure(&self) -> f64 {
        let sample = &self.groups[..self.groups.len().min(SAMPLE)];
        let unflushed: u32 = sample.iter().map(|group| group.unflushed.load(Relaxed).count_ones()).sum();
        f64::from(unflushed) / (sample.len() * SLOTS_PER_GROUP) as f64
    }

    /// Entries that cannot make room for another key without a loss, because they hold counts that are not flushed or a limit
    /// in use. Of very many, the limits are counted in a sample.
    pub fn busy(&self, now: i64) -> u64 {
        let (mut unflushed, mut others, mut seen, mut limited) = (0, 0, 0, 0);
        for group in self.groups {
            let counted = group.unflushed.load(Relaxed);
            let rest = group.used() & !counted;
            unflushed += u64::from(counted.count_ones());
            others += u64::from(rest.count_ones());
            if seen < SAMPLE_OF_LIMITS {
                seen += u64::from(rest.count_ones());
                limited += bits(rest).filter(|&slot| !group.entries[slot].is_idle(now)).count() as u64;
            }
        }
        unflushed + (others * limited).checked_div(seen).unwrap_or(0)
    }

    /// Uses that were not counted for lack of room.
    pub fn overflowed(&self) -> u64 {
        self.header.shards.iter().map(|shard| shard.overflowed.load(Relaxed)).sum()
    }

    pub fn count_outcome(&self, process: usize, code: Code) {
        self.shard(process).outcomes[code.index()].fetch_add(1, Relaxed);
    }

    /// Counts a use of a token. Without room the use is lost, and the loss is counted.
    pub fn count_use(
        &self,
        control: &impl Control,
        process: usize,
        database: u32,
        token: &[u8; 16],
        owner: &dyn Fn() -> Owner,
        used: &Use,
    ) {
        let key = Key { id: split(token), database, kind: Kind::Token };
        let wanted = Wanted { key: &key, limited: false, owner, now: used.at };
        self.touch(control, process, &wanted, |group, slot| group.count_in(slot, used));
    }

    /// Charges a use to its token's limit, and counts it, as a denial if the limit refuses it. `None` if there is no
    /// room to remember it.
    #[allow(clippy::too_many_arguments)]
    pub fn charge_use(
        &self,
        control: &impl Control,
        process: usize,
        database: u32,
        token: &[u8; 16],
        owner: &dyn Fn() -> Owner,
        used: &Use,
        limit: Limit,
    ) -> Option<Charge> {
        let key = Key { id: split(token), database, kind: Kind::Token };
        let wanted = Wanted { key: &key, limited: true, owner, now: used.at };
        self.touch(control, process, &wanted, |group, slot| {
            let charge = group.entries[slot].limiter(|state| limit.charge(state, used.at));
            group.count_in(slot, &Use { accepted: charge.admitted, ..*used });
            charge
        })
    }

    /// Spends a unit of what is remembered of a quota. `None` if the tables may say more.
    #[inline]
    pub fn spend(&self, database: u32, quota: &[u8; 16], now: i64) -> Option<Spent> {
        self.with_quota(database, quota, |state| state.spend(now))?
    }

    /// Spends a unit of what the tables say of a quota, in the present period; the inner `None` if nothing is left, the outer
    /// one if there is no room to remember it.
    pub fn spend_of(
        &self,
        control: &impl Control,
        process: usize,
        database: u32,
        quota: &[u8; 16],
        lease: &Lease,
        now: i64,
    ) -> Option<Option<Spent>> {
        // As it will be remembered.
        let lease = Lease { ends_at: State::until(lease.ends_at).end(), ..*lease };
        let key = Key { id: split(quota), database, kind: Kind::Quota };
        let hash = self.hash(&key);
        self.header.latest.fetch_max(now, Relaxed);
        let wanted = Wanted { key: &key, limited: true, owner: &Owner::default, now };
        self.touch(control, process, &wanted, |group, slot| {
            // Another period of a quota that is still there is like a new one.
            if group.entries[slot].is_idle(now) && group.quotas(now).count() >= MAX_QUOTAS {
                return None;
            }
            let spent = group.entries[slot].quota(|state| {
                let is_new = *state == quota::State::default();
                if is_new && self.groups_of(hash).iter().any(|group| group.has_forgotten(now)) {
                    state.learn(&lease);
                    state.give_up();
                }
                state.spend_of(&lease)
            });
            Some(spent)
        })?
    }

    /// Runs `act` on what is remembered of a quota; `None` if nothing is.
    pub fn with_quota<R>(
        &self,
        database: u32,
        quota: &[u8; 16],
        act: impl Fn(&mut quota::State) -> R,
    ) -> Option<R> {
        self.with_entry(database, Kind::Quota, quota, |entry| entry.quota(&act))
    }

    /// The quotas of a database of which something is remembered.
    pub fn quotas(&self, database: u32) -> Vec<[u8; 16]> {
        let mut quotas = Vec::new();
        for group in self.groups {
            let mut here = [None; SLOTS_PER_GROUP];
            {
                let _held = group.lock.hold();
                for slot in bits(group.used()).filter(|&slot| group.is_quota(slot)) {
                    let entry = &group.entries[slot];
                    if entry.database.load(Relaxed) == database && entry.limiter.load(Relaxed) > 0 {
                        here[slot] = Some(load(&entry.id));
                    }
                }
            }
            quotas.extend(here.into_iter().flatten());
        }
        quotas
    }

    /// Forgets a quota that is no more, so that its place can be used again.
    pub fn forget_quota(&self, database: u32, quota: &[u8; 16]) {
        self.with_quota(database, quota, |state| *state = quota::State::default());
    }

    fn forget_quotas(&self) {
        for group in self.groups {
            for slot in bits(group.used()).filter(|&slot| group.is_quota(slot)) {
                let _held = group.lock.hold();
                group.entries[slot].quota(|state| *state = quota::State::default());
            }
        }
    }

    /// The name under which this server holds leases of quotas.
    pub fn holder(&self) -> [u8; 16] {
        load(&self.header.holder)
    }

    /// The time for quotas, in microseconds since 2000-01-01: it never goes back.
    pub fn latest(&self, now: i64) -> i64 {
        now.max(self.header.latest.load(Relaxed))
    }

    /// The number of the group that holds a token's entry, unless that group is full.
    pub fn group_of(&self, database: u32, token: &[u8; 16]) -> usize {
        self.place(self.hash(&Key { id: split(token), database, kind: Kind::Token }))
    }

    /// The cache line of a group that [`Table::entry_lines`] reads, for a caller that can prefetch it.
    pub fn group_line(&self, number: usize) -> Option<*const u8> {
        self.groups.get(number).map(|group| core::ptr::from_ref(group).cast())
    }

    /// The cache lines that counting or charging a use of the token will access, to be prefetched.
    pub fn entry_lines(&self, database: u32, token: &[u8; 16]) -> impl Iterator<Item = *const u8> {
        let hash = self.hash(&Key { id: split(token), database, kind: Kind::Token });
        let group = &self.groups[self.place(hash)];
        group.candidates(hash).map(|slot| core::ptr::from_ref(&group.entries[slot]).cast())
    }

    /// Charges a limit. `None` if there is no room to remember it.
    #[allow(clippy::too_many_arguments)]
    pub fn charge(
        &self,
        control: &impl Control,
        process: usize,
        database: u32,
        kind: Kind,
        id: &[u8; 16],
        owner: &dyn Fn() -> Owner,
        limit: Limit,
        now: i64,
    ) -> Option<Charge> {
        let key = Key { id: split(id), database, kind };
        let wanted = Wanted { key: &key, limited: true, owner, now };
        self.touch(control, process, &wanted, |group, slot| {
            group.entries[slot].limiter(|state| limit.charge(state, now))
        })
    }

    /// Runs `act` on the limiter of a key; `None` if it has no entry, which means that it was never used.
    pub fn with_limiter<R>(
        &self,
        database: u32,
        kind: Kind,
        id: &[u8; 16],
        act: impl Fn(&mut State) -> R,
    ) -> Option<R> {
        self.with_entry(database, kind, id, |entry| entry.limiter(&act))
    }

    fn with_entry<R>(
        &self,
        database: u32,
        kind: Kind,
        id: &[u8; 16],
        act: impl Fn(&Entry) -> R,
    ) -> Option<R> {
        let key = Key { id: split(id), database, kind };
        let hash = self.hash(&key);
        self.groups_of(hash)
            .into_iter()
            .find_map(|group| group.find(hash, &key, |group, slot| act(&group.entries[slot])))
    }

    /// Runs `act` on the entry of a key, under its group's lock. Adds an entry if there is none; `None` if there is no
    /// room.
    #[inline]
    fn touch<R>(
        &self,
        control: &impl Control,
        process: usize,
        wanted: &Wanted<'_>,
        act: impl Fn(&Group<L>, usize) -> R,
    ) -> Option<R> {
        let hash = self.hash(wanted.key);
        let first = &self.groups[self.place(hash)];
        first.find(hash, wanted.key, &act).or_else(|| self.insert(control, process, wanted, hash, act))
    }

    /// For a key that is not in its first group: runs `act` on its entry in the other one, or adds an entry in one of
    /// the two. Counts that are lost by this, or for lack of room, are added to `overflowed`.
    #[cold]
    fn insert<R>(
        &self,
        control: &impl Control,
        process: usize,
        wanted: &Wanted<'_>,
        hash: u64,
        act: impl Fn(&Group<L>, usize) -> R,
    ) -> Option<R> {
        let key = wanted.key;
        let [first, second] = self.groups_of(hash);
        if let Some(done) = second.find(hash, key, &act) {
            return Some(done);
        }
        let owner = self.owner_tag((wanted.owner)());
        // All callers that insert this key take the same lock, so that it does not get an entry in each group.
        let _insert = control.hold_to_insert(hash as usize % INSERT_LOCKS);
        let groups = if first.is_more_crowded_than(second) { [second, first] } else { [first, second] };
        if let Some(done) = groups.iter().find_map(|group| group.find(hash, key, &act)) {
            return Some(done);
        }
        self.header.latest.fetch_max(wanted.now, Relaxed);
        let new_key = NewKey { key, hash, limited: wanted.limited, owner, now: wanted.now };
        let done = groups.iter().find_map(|group| group.insert(&new_key, |slot| act(group, slot)));
        if done.is_some() {
            return done;
        }
        let (done, lost) = match displace(groups, &new_key, &act) {
            Some((done, lost)) => (Some(done), lost),
            None if key.kind == Kind::Quota => (displace_quota(groups, &new_key, &act), 0),
            None => (None, u64::from(key.kind == Kind::Token)),
        };
        if lost > 0 {
            self.shard(process).overflowed.fetch_add(lost, Relaxed);
        }
        done
    }

    /// The closed generation and its counters.
    pub fn drain(&self, control: &impl Control, database: u32) -> Result<Drained, Refusal> {
        let _control = control.hold();
        // Allocated before any entry is locked. Keys inserted meanwhile may find no room, and stay for the next
        // generation; those handed out before are all among the unflushed now.
        let mut rows = Vec::new();
        let room = (self.unflushed() + 128).min(MOST_ROWS);
        rows.try_reserve_exact(room).map_err(|_| Refusal::OutOfMemory(room * size_of::<UsageRow>()))?;
        let slot = self.database(database).ok_or(Refusal::TooManyDatabases)?;
        if slot.closed.load(Relaxed) != 0 {
            self.hand_out(database, &mut rows, None);
            if rows.is_empty() {
                // All of it was dropped, for others or because it found no room after a restart. Nothing is left to
                // acknowledge, and until that happens nothing more would be drained.
                self.open_next(slot);
            }
        }
        if slot.closed.load(Relaxed) == 0 {
            // Starts at another group each time, so that none is always last.
            let first = self.place(fold(slot.generation.load(Relaxed), 0xa076_1d64_78bd_642f));
            self.hand_out(database, &mut rows, Some(first));
            if !rows.is_empty() {
                let origin = &self.header.origin;
                slot.closed_under.store(&origin.node(), &origin.boot());
                slot.closed.store(slot.generation.load(Relaxed), Relaxed);
            }
        }
        let generation = slot.generation.load(Relaxed);
        Ok(Drained { node: slot.closed_under.node(), boot: slot.closed_under.boot(), generation, rows })
    }

    /// Appends the handed-out counters of a database. First closes them, starting at a group, up to the capacity.
    fn hand_out(&self, database: u32, rows: &mut Vec<UsageRow>, close_from: Option<usize>) {
        for (group, slot) in self.unflushed_slots(close_from.unwrap_or(0)) {
            if close_from.is_some() && rows.len() == rows.capacity() {
                return;
            }
            let row = group.hand_out(slot, database, close_from.is_some());
            rows.extend(row);
        }
    }

    fn open_next(&self, slot: &Database) {
        slot.closed.store(0, Relaxed);
        slot.generation.store(self.header.next_generation.fetch_add(1, Relaxed), Relaxed);
    }

    /// The databases that have a slot.
    pub fn databases(&self, control: &impl Control) -> [u32; MAX_DATABASES] {
        let _control = control.hold();
        core::array::from_fn(|i| self.header.databases[i].oid.load(Relaxed))
    }

    /// Frees the slot of a database that no longer exists. Its entries are evicted as room is needed.
    pub fn forget(&self, control: &impl Control, database: u32) {
        let _control = control.hold();
        if let Some(slot) = self.known_database(database) {
            slot.closed.store(0, Relaxed);
            slot.oid.store(0, Relaxed);
        }
    }

    /// The name of this server, and the closed generation of a database without its counters.
    pub fn handed_out(&self, control: &impl Control, database: u32) -> ([u8; NODE_LEN], Option<Drained>) {
        let _control = control.hold();
        let closed = self.known_database(database).filter(|slot| slot.closed.load(Relaxed) != 0);
        let closed = closed.map(|slot| Drained {
            node: slot.closed_under.node(),
            boot: slot.closed_under.boot(),
            generation: slot.closed.load(Relaxed),
            rows: Vec::new(),
        });
        (self.header.origin.node(), closed)
    }

    pub fn acknowledge(&self, control: &impl Control, database: u32, generation: u64) -> bool {
        let _control = control.hold();
        let Some(slot) = self.known_database(database) else { return false };
        if generation == 0 || slot.closed.load(Relaxed) != generation {
            return false;
        }
        for (group, slot) in self.unflushed_slots(0) {
            let _held = group.lock.hold();
            if group.entries[slot].database.load(Relaxed) == database {
                group.subtract(slot);
            }
        }
        self.open_next(slot);
        true
    }

    pub fn stats(&self, control: &impl Control, database: u32) -> Stats {
        let _control = control.hold();
        let slot = self.known_database(database);
        let mut outcomes = [0; Code::ALL.len()];
        for shard in &self.header.shards {
            for (sum, counter) in outcomes.iter_mut().zip(&shard.outcomes) {
                *sum += counter.load(Relaxed);
            }
        }
        Stats {
            boot: self.boot(),
            started_at: self.header.started_at.load(Relaxed),
            outcomes,
            tracked: self.groups.iter().map(|group| u64::from(group.used().count_ones())).sum(),
            overflowed: self.overflowed(),
            generation: slot.map(|slot| slot.generation.load(Relaxed)),
            closed_generation: slot.map(|slot| slot.closed.load(Relaxed)).filter(|&closed| closed != 0),
        }
    }

    /// Counters that are nearly private to each process.
    fn shard(&self, process: usize) -> &'a Shard {
        &self.header.shards[process % SHARDS]
    }

    fn unflushed(&self) -> usize {
        self.groups.iter().map(|group| group.unflushed.load(Relaxed).count_ones() as usize).sum()
    }

    /// The unflushed slots of all groups, starting at one of them.
    fn unflushed_slots(&self, first: usize) -> impl Iterator<Item = (&'a Group<L>, usize)> + use<'a, L> {
        let (before, after) = self.groups.split_at(first);
        after
            .iter()
            .chain(before)
            .flat_map(|group| bits(group.unflushed.load(Relaxed)).map(move |slot| (group, slot)))
    }

    fn known_database(&self, oid: u32) -> Option<&'a Database> {
        self.header.databases.iter().find(|slot| slot.oid.load(Relaxed) == oid)
    }

    /// The slot of a database, taken for it if it has none. Called under the control lock.
    fn database(&self, oid: u32) -> Option<&'a Database> {
        self.known_database(oid).or_else(|| {
            let free = self.header.databases.iter().find(|slot| slot.oid.load(Relaxed) == 0)?;
            free.generation.store(self.header.next_generation.fetch_add(1, Relaxed), Relaxed);
            free.oid.store(oid, Relaxed);
            Some(free)
        })
    }

    /// Keyed with the seed, so that a name cannot be chosen to collide with another owner's.
    fn owner_tag(&self, owner: Owner) -> u32 {
        let seed = self.header.seed.load(Relaxed);
        let part = |digest: u64| fold(digest ^ seed, 0x9e37_79b9_7f4a_7c15) as u16;
        u32::from(part(owner.creator)) << 16 | u32::from(part(owner.user))
    }

    /// Folded multiplications: ids are random, and the seed prevents keys from being aimed at one group.
    fn hash(&self, key: &Key) -> u64 {
        let tag = (u64::from(key.database) << 8) | key.kind as u64;
        let mixed = fold(key.id[0] ^ self.header.seed.load(Relaxed), key.id[1] ^ 0x9e37_79b9_7f4a_7c15);
        fold(mixed ^ tag, 0xd6e8_feb8_6659_fd93)
    }

    /// Uses the high half of the hash; tags use the low half.
    #[inline]
    fn place(&self, hash: u64) -> usize {
        (((hash >> 32) * self.groups.len() as u64) >> 32) as usize
    }

    /// The groups that a key may be in; in a small table both may be the same.
    fn groups_of(&self, hash: u64) -> [&'a Group<L>; 2] {
        [hash, fold(hash, 0xa076_1d64_78bd_642f)].map(|hash| &self.groups[self.place(hash)])
    }
}

impl<L: SpinLock> Group<L> {
    /// Runs `act` on the entry of a key, under the lock; `None` if the key is not in this group.
    #[inline]
    fn find<R>(&self, hash: u64, key: &Key, act: impl Fn(&Group<L>, usize) -> R) -> Option<R> {
        for slot in self.candidates(hash) {
            let _held = self.lock.hold();
            if self.entries[slot].is(key) {
                return Some(act(self, slot));
            }
        }
        None
    }

    /// The slots whose tag matches the hash: usually one, if the key is here, or else none.
    #[inline]
    fn candidates(&self, hash: u64) -> impl Iterator<Item = usize> {
        let words = self.tags.iter().enumerate();
        words.flat_map(move |(n, word)| lanes(word.load(Relaxed), tag(hash)).map(move |lane| 4 * n + lane))
    }

    /// Whether a new key should go to the other group. Only if few slots are left: a key in its first group is found
    /// sooner.
    fn is_more_crowded_than(&self, other: &Group<L>) -> bool {
        let [here, there] = [self, other].map(|group| group.unflushed.load(Relaxed).count_ones() as usize);
        here >= SLOTS_PER_GROUP - SLOTS_PER_GROUP / 4 && there < here
    }

    /// Gives a key a slot that is empty or can be reused without loss, if its kind may have one more, and runs `act` on
    /// it.
    fn insert<R>(&self, new_key: &NewKey<'_>, act: impl Fn(usize) -> R) -> Option<R> {
        let now = new_key.now;
        if new_key.key.kind == Kind::Address
            && let Some(slot) = self.address_to_replace(new_key.key.database)
        {
            let _held = self.lock.hold();
            if self.entries[slot].kind.load(Relaxed) == Kind::Address as u8 {
                self.give(slot, new_key);
                return Some(act(slot));
            }
        }
        if new_key.limited && !self.has_room_for_a_limiter(now) {
            return None;
        }
        if new_key.key.kind == Kind::Quota && self.quotas(now).count() >= MAX_QUOTAS {
            return None;
        }
        let unused = !self.used() & ALL_SLOTS;
        let flushed = !self.unflushed.load(Relaxed) & ALL_SLOTS;
        // Any flushed and idle slot will do, but not always the same one.
        let (before, after) = (flushed & ((1 << (new_key.hash % SLOTS_PER_GROUP as u64)) - 1), flushed);
        let candidates = bits(unused).chain(bits(after & !before)).chain(bits(before));
        for slot in candidates.filter(|&slot| self.is_free(slot, now)) {
            let _held = self.lock.hold();
            // Another use may have been counted in it since.
            if self.is_free(slot, now) {
                self.give(slot, new_key);
                return Some(act(slot));
            }
        }
        None
    }

    /// Whether the slot can go to another key without loss.
    fn is_free(&self, slot: usize, now: i64) -> bool {
        self.unflushed.load(Relaxed) & (1 << slot) == 0 && self.entries[slot].is_idle(now)
    }

    fn is_quota(&self, slot: usize) -> bool {
        self.entries[slot].kind.load(Relaxed) == Kind::Quota as u8
    }

    /// The slots with quotas whose period is not over.
    fn quotas(&self, now: i64) -> impl Iterator<Item = usize> {
        (0..SLOTS_PER_GROUP).filter(move |&slot| self.is_quota(slot) && !self.entries[slot].is_idle(now))
    }

    fn has_forgotten(&self, now: i64) -> bool {
        !State(self.forgotten.load(Relaxed)).is_idle(now)
    }

    fn has_room_for_a_limiter(&self, now: i64) -> bool {
        self.entries.iter().filter(|entry| !entry.is_idle(now)).count() < MAX_LIMITED
    }

    /// If addresses use all the slots they may: of the database that has most of them, the slot whose allowance will be
    /// full first.
    fn address_to_replace(&self, database: u32) -> Option<usize> {
        let addresses = || {
            self.entries
                .iter()
                .enumerate()
                .filter(|(_, entry)| entry.kind.load(Relaxed) == Kind::Address as u8)
        };
        if addresses().count() < MAX_ADDRESSES {
            return None;
        }
        let of = |oid| addresses().filter(move |(_, entry)| entry.database.load(Relaxed) == oid);
        let databases = addresses().map(|(_, entry)| entry.database.load(Relaxed));
        let most = databases.max_by_key(|&oid| (of(oid).count(), oid == database))?;
        of(most).min_by_key(|(_, entry)| entry.limiter.load(Relaxed)).map(|(slot, _)| slot)
    }

    /// Call it under the lock.
    fn give(&self, slot: usize, new_key: &NewKey<'_>) {
        let (entry, key) = (&self.entries[slot], new_key.key);
        for (to, from) in entry.id.iter().zip(key.id) {
            to.store(from, Relaxed);
        }
        entry.database.store(key.database, Relaxed);
        entry.kind.store(key.kind as u8, Relaxed);
        entry.uses.store(0, Relaxed);
        entry.denials.store(0, Relaxed);
        entry.limiter.store(0, Relaxed);
        entry.forget_last_use();
        if new_key.key.kind == Kind::Quota {
            entry.address.iter().for_each(|word| word.store(0, Relaxed));
        }
        self.unflushed.fetch_and(!(1 << slot), Relaxed);
        self.handed_out[slot].uses.store(0, Relaxed);
        self.handed_out[slot].denials.store(0, Relaxed);
        self.owners[slot].store(new_key.owner, Relaxed);
        let (word, shift) = (&self.tags[slot / 4], 16 * (slot % 4));
        let others = word.load(Relaxed) & !(0xffff << shift);
        word.store(others | (u64::from(tag(new_key.hash)) << shift), Relaxed);
    }

    /// The counters of a slot that are handed out for a database, after closing them if `close`.
    fn hand_out(&self, slot: usize, database: u32, close: bool) -> Option<UsageRow> {
        let (entry, handed_out) = (&self.entries[slot], &self.handed_out[slot]);
        let _held = self.lock.hold();
        if entry.database.load(Relaxed) != database {
            return None;
        }
        if close {
            handed_out.uses.store(entry.uses.load(Relaxed), Relaxed);
            handed_out.denials.store(entry.denials.load(Relaxed), Relaxed);
        }
        entry.row(handed_out)
    }

    /// Call it under the lock.
    fn count_in(&self, slot: usize, used: &Use) {
        if self.unflushed.load(Relaxed) & (1 << slot) == 0 {
            self.unflushed.fetch_or(1 << slot, Relaxed);
        }
        self.entries[slot].count(used);
    }

    fn evictable(&self, place: (usize, usize), now: i64) -> Evictable {
        let (entry, slot) = (&self.entries[place.1], place.1);
        Evictable {
            place,
            database: entry.database.load(Relaxed),
            owner: self.owners[slot].load(Relaxed),
            is_user: entry.kind.load(Relaxed) == Kind::User as u8,
            is_limited: !entry.is_idle(now),
            counted: u64::from(entry.uses.load(Relaxed)) + u64::from(entry.denials.load(Relaxed)),
        }
    }

    /// The content of a slot. Call it when no other process can write any more.
    fn record(&self, slot: usize) -> Record {
        let (entry, handed_out) = (&self.entries[slot], &self.handed_out[slot]);
        let [spent, granted] =
            if self.is_quota(slot) { [0, 1].map(|n| entry.address[n].load(Relaxed)) } else { [0; 2] };
        Record {
            id: load(&entry.id),
            database: entry.database.load(Relaxed),
            kind: entry.kind.load(Relaxed),
            uses: entry.uses.load(Relaxed),
            denials: entry.denials.load(Relaxed),
            handed_out: [handed_out.uses.load(Relaxed), handed_out.denials.load(Relaxed)],
            last_used: entry.last_used.load(Relaxed),
            client: entry.client(),
            limiter: entry.limiter.load(Relaxed),
            owner: self.owners[slot].load(Relaxed),
            spent,
            granted,
            in_second: false,
        }
    }

    /// Restores the earlier content of a slot. Call it under the lock.
    fn resume(&self, slot: usize, record: &Record) {
        let (entry, handed_out) = (&self.entries[slot], &self.handed_out[slot]);
        entry.uses.store(record.uses, Relaxed);
        entry.denials.store(record.denials, Relaxed);
        entry.last_used.store(record.last_used, Relaxed);
        entry.set_client(record.client);
        entry.limiter.store(record.limiter, Relaxed);
        if self.is_quota(slot) {
            entry.address[0].store(record.spent, Relaxed);
            entry.address[1].store(record.granted, Relaxed);
        }
        handed_out.uses.store(record.handed_out[0], Relaxed);
        handed_out.denials.store(record.handed_out[1], Relaxed);
        if record.uses > 0 || record.denials > 0 {
            self.unflushed.fetch_or(1 << slot, Relaxed);
        }
    }

    /// Subtracts the handed-out counters from the counted ones. Call it under the lock.
    fn subtract(&self, slot: usize) {
        let (entry, handed_out) = (&self.entries[slot], &self.handed_out[slot]);
        let uses = entry.uses.load(Relaxed).saturating_sub(handed_out.uses.swap(0, Relaxed));
        let denials = entry.denials.load(Relaxed).saturating_sub(handed_out.denials.swap(0, Relaxed));
        entry.uses.store(uses, Relaxed);
        entry.denials.store(denials, Relaxed);
        if uses == 0 {
            entry.forget_last_use();
            if denials == 0 {
                self.unflushed.fetch_and(!(1 << slot), Relaxed);
            }
        }
    }

    /// A bit for each slot that has ever had a key.
    fn used(&self) -> u32 {
        let used = |word: u64| {
            (0..4).filter(|lane| word >> (16 * lane) & 0xffff != 0).fold(0, |bits, lane| bits | 1 << lane)
        };
        self.tags.iter().enumerate().fold(0, |bits, (n, word)| bits | used(word.load(Relaxed)) << (4 * n))
    }
}

impl Entry {
    fn is(&self, key: &Key) -> bool {
        self.id[0].load(Relaxed) == key.id[0]
            && self.id[1].load(Relaxed) == key.id[1]
            && self.database.load(Relaxed) == key.database
            && self.kind.load(Relaxed) == key.kind as u8
    }

    /// Runs `act` on the state of the limiter.
    fn limiter<R>(&self, act: impl FnOnce(&mut State) -> R) -> R {
        let mut state = State(self.limiter.load(Relaxed));
        let done = act(&mut state);
        self.limiter.store(state.0, Relaxed);
        done
    }

    /// Runs `act` on what is remembered of a quota.
    fn quota<R>(&self, act: impl FnOnce(&mut quota::State) -> R) -> R {
        let [spent, granted] = [0, 1].map(|n| self.address[n].load(Relaxed));
        let mut state = quota::State {
            ends_at: State(self.limiter.load(Relaxed)).end(),
            spent,
            granted,
            wanted_at: self.last_used.load(Relaxed).cast_unsigned(),
        };
        let done = act(&mut state);
        self.limiter.store(State::until(state.ends_at).0, Relaxed);
        self.address[0].store(state.spent, Relaxed);
        self.address[1].store(state.granted, Relaxed);
        self.last_used.store(state.wanted_at.cast_signed(), Relaxed);
        done
    }

    /// Whether its limiter can be dropped without effect.
    fn is_idle(&self, now: i64) -> bool {
        State(self.limiter.load(Relaxed)).is_idle(now)
    }

    fn count(&self, used: &Use) {
        let counter = if used.accepted { &self.uses } else { &self.denials };
        // It would take four billion uses between two flushes to saturate.
        counter.store(counter.load(Relaxed).saturating_add(1), Relaxed);
        if used.accepted && used.at >= self.last_used.load(Relaxed) {
            self.last_used.store(used.at, Relaxed);
            self.set_client(used.client);
        }
    }

    fn row(&self, handed_out: &HandedOut) -> Option<UsageRow> {
        let (uses, denials) = (handed_out.uses.load(Relaxed), handed_out.denials.load(Relaxed));
        let last_used = (uses > 0).then(|| (self.last_used.load(Relaxed), self.client()));
        let id = u128::from(self.id[0].load(Relaxed)) | u128::from(self.id[1].load(Relaxed)) << 64;
        (uses > 0 || denials > 0).then(|| UsageRow {
            token_id: id.to_ne_bytes(),
            uses: uses.into(),
            denials: denials.into(),
            last_used,
        })
    }

    fn set_client(&self, client: Option<Net>) {
        let (family, address) = match client.map(|net| net.addr()) {
            // The old address is never read again.
            None => return self.family.store(NO_ADDRESS, Relaxed),
            Some(IpAddr::V4(address)) => (V4, address.to_ipv6_mapped().octets()),
            Some(IpAddr::V6(address)) => (V6, address.octets()),
        };
        store(&self.address, &address);
        self.family.store(family, Relaxed);
        self.bits.store(client.map_or(0, |net| net.bits()), Relaxed);
    }

    fn client(&self) -> Option<Net> {
        let address = load(&self.address);
        let bits = self.bits.load(Relaxed);
        match self.family.load(Relaxed) {
            V4 => Net::v4([address[12], address[13], address[14], address[15]], bits),
            V6 => Net::v6(address, bits),
            _ => None,
        }
    }

    fn forget_last_use(&self) {
        self.last_used.store(0, Relaxed);
        self.family.store(NO_ADDRESS, Relaxed);
    }
}

/// An entry whose content would be lost if its slot went to another key.
#[derive(Clone, Copy)]
struct Evictable {
    place: (usize, usize),
    database: u32,
    owner: u32,
    is_user: bool,
    is_limited: bool,
    /// Unflushed uses and denials.
    counted: u64,
}

impl Evictable {
    const NONE: Evictable =
        Evictable { place: (0, 0), database: 0, owner: 0, is_user: false, is_limited: false, counted: 0 };

    /// Its owner at a level: the database, the issuing role in it, or that role's user.
    fn owner_at(&self, level: usize) -> u64 {
        u64::from([self.database, self.owner >> 16, self.owner & 0xffff][level])
    }
}

/// Takes a slot for a key from an owner that has at least two slots more in the two groups, so that it cannot be taken
/// back. Also returns how many uses are lost by that.
fn displace<L: SpinLock, R>(
    groups: [&Group<L>; 2],
    new_key: &NewKey<'_>,
    act: impl Fn(&Group<L>, usize) -> R,
) -> Option<(R, u64)> {
    // Other processes may change the chosen slot first.
    (0..3).find_map(|_| {
        let victim = victim(groups, new_key)?;
        let (group, slot) = (groups[victim.place.0], victim.place.1);
        let entry = &group.entries[slot];
        let _held = group.lock.hold();
        let is_same = entry.database.load(Relaxed) == victim.database
            && group.owners[slot].load(Relaxed) == victim.owner
            && !group.is_quota(slot);
        if !is_same {
            return None;
        }
        let lost = u64::from(entry.uses.load(Relaxed)) + u64::from(entry.denials.load(Relaxed));
        group.give(slot, new_key);
        Some((act(group, slot), lost))
    })
}

/// The entry to displace: of the largest database, its largest issuing role, and that role's largest user, if the new
/// key's owner has fewer slots at one of these levels.
fn victim<L: SpinLock>(groups: [&Group<L>; 2], new_key: &NewKey<'_>) -> Option<Evictable> {
    const LEVELS: usize = 3;
    let mut evictables = [None; 2 * SLOTS_PER_GROUP];
    let distinct = if core::ptr::eq(groups[0], groups[1]) { 1 } else { 2 };
    let (is_quota, database) = (new_key.key.kind == Kind::Quota, new_key.key.database);
    let mut own_quotas = 0;
    for (number, group) in groups.iter().enumerate().take(distinct) {
        if is_quota {
            let is_own = |slot: &usize| group.entries[*slot].database.load(Relaxed) == database;
            own_quotas += group.quotas(new_key.now).filter(is_own).count();
            if group.quotas(new_key.now).count() >= MAX_QUOTAS {
                continue;
            }
        }
        // Beyond the part that limiters may use, a limiter takes the slot of another limiter.
        let only_limited = new_key.limited && !group.has_room_for_a_limiter(new_key.now);
        let taken = |slot: &usize| !group.is_free(*slot, new_key.now) && !group.is_quota(*slot);
        for slot in (0..SLOTS_PER_GROUP).filter(taken) {
            let evictable = group.evictable((number, slot), new_key.now);
            if evictable.is_limited || !only_limited {
                evictables[number * SLOTS_PER_GROUP + slot] = Some(evictable);
            }
        }
    }
    let own = Evictable { database, owner: new_key.owner, ..Evictable::NONE };
    let mut left_at = None;
    for level in 0..LEVELS {
        let size =
            |owner_at| evictables.iter().flatten().filter(|one| one.owner_at(level) == owner_at).count();
        let largest =
            evictables.iter().flatten().map(|one| one.owner_at(level)).max_by_key(|&one| size(one))?;
        let mine = own.owner_at(level);
        let unmovable = if level == 0 { own_quotas } else { 0 };
        if left_at.is_none() && size(largest) >= size(mine) + unmovable + 2 {
            left_at = Some(level);
        }
        let chosen = if left_at.is_some() { largest } else { mine };
        for place in &mut evictables {
            *place = place.filter(|one| one.owner_at(level) == chosen);
        }
    }
    // A user with many tokens must not be able to displace the user's own limit.
    let spares_users = left_at? == LEVELS - 1;
    let candidates = evictables.iter().flatten().filter(|one| !(spares_users && one.is_user));
    candidates.min_by_key(|one| (one.is_user, one.is_limited, one.counted)).copied()
}

/// Takes a slot for a quota from the database that has most of them in the two groups, if it has at least two more than the
/// new one's. What that one has spent is forgotten.
fn displace_quota<L: SpinLock, R>(
    groups: [&Group<L>; 2],
    new_key: &NewKey<'_>,
    act: impl Fn(&Group<L>, usize) -> R,
) -> Option<R> {
    let distinct = if core::ptr::eq(groups[0], groups[1]) { 1 } else { 2 };
    let quotas = || {
        groups
            .into_iter()
            .take(distinct)
            .flat_map(|group| group.quotas(new_key.now).map(move |slot| (group, slot)))
    };
    let owner = |(group, slot): (&Group<L>, usize)| group.entries[slot].database.load(Relaxed);
    let size = |database| quotas().filter(|&place| owner(place) == database).count();
    let largest = quotas().map(owner).max_by_key(|&database| size(database))?;
    if size(largest) < size(new_key.key.database) + 2 {
        return None;
    }
    let (group, slot) = quotas().find(|&place| owner(place) == largest)?;
    let _held = group.lock.hold();
    // Other processes may have changed the slot since.
    if !group.is_quota(slot) || owner((group, slot)) != largest {
        return None;
    }
    group.forgotten.fetch_max(group.entries[slot].limiter.load(Relaxed), Relaxed);
    group.give(slot, new_key);
    Some(act(group, slot))
}

fn fold(one: u64, other: u64) -> u64 {
    let product = u128::from(one) * u128::from(other);
    (product as u64) ^ ((product >> 64) as u64)
}

/// Never 0, which marks a slot without a key.
fn tag(hash: u64) -> u16 {
    (hash as u16).max(1)
}

/// The lanes of a word that are equal to a tag, and sometimes one that is not: the caller compares the key.
fn lanes(word: u64, tag: u16) -> impl Iterator<Item = usize> {
    const LOW: u64 = 0x0001_0001_0001_0001;
    const HIGH: u64 = 0x8000_8000_8000_8000;
    let difference = word ^ (u64::from(tag) * LOW);
    let mut zeros = difference.wrapping_sub(LOW) & !difference & HIGH;
    core::iter::from_fn(move || {
        let lane = (zeros != 0).then_some(zeros.trailing_zeros() as usize / 16)?;
        zeros &= zeros - 1;
        Some(lane)
    })
}

/// The positions of the set bits.
fn bits(mut word: u32) -> impl Iterator<Item = usize> {
    core::iter::from_fn(move || {
        let bit = (word != 0).then_some(word.trailing_zeros() as usize)?;
        word &= word - 1;
        Some(bit)
    })
}

fn split(bytes: &[u8; 16]) -> [u64; 2] {
    let word = u128::from_ne_bytes(*bytes);
    [word as u64, (word >> 64) as u64]
}

fn store(to: &[AtomicU64; 2], bytes: &[u8; 16]) {
    let [low, high] = split(bytes);
    to[0].store(low, Relaxed);
    to[1].store(high, Relaxed);
}

fn load(from: &[AtomicU64; 2]) -> [u8; 16] {
    (u128::from(from[0].load(Relaxed)) | u128::from(from[1].load(Relaxed)) << 64).to_ne_bytes()
}
