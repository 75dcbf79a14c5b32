//! The table of counters: nothing is lost, nothing is counted twice.
//!
//! In the server it is in shared memory under PostgreSQL's locks; here it is on the heap under locks between threads.
#![allow(unsafe_code)]

use core::sync::atomic::{AtomicBool, Ordering};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard};
use tollgate_core::limit::{Charge, Limit};
use tollgate_core::net::Net;
use tollgate_core::quota::Lease;
use tollgate_core::status::Code;
use tollgate_core::usage_file::{Record, Shutdown};
use tollgate_core::usage_table::{
    Control, Group as GroupOf, Header, INSERT_LOCKS, Kind, MAX_DATABASES, Owner, Refusal, Restored,
    SLOTS_PER_GROUP, SpinLock, Table as TableOf, UsageRow, Use, groups_for,
};

/// Key, uses, denials.
type Sums = Vec<(u128, u64, u64)>;

const BOOT: [u8; 16] = [7; 16];
const NODE: [u8; 64] = [b'n'; 64];
/// As random as a real seed, so that keys are spread.
const SEED: u64 = 0xc35c_b8f3_5a97_21d6;
const STARTED_AT: i64 = 800_000_000_000_000;
const DATABASE: u32 = 16_384;
const SHUTDOWN: Shutdown = Shutdown { system_identifier: 1, checkpoint: 2, timeline: 3 };
/// In microseconds.
const MINUTE: i64 = 60 * 1_000_000;

/// A waiting thread yields to others.
#[derive(Default)]
struct ThreadLock(AtomicBool);

struct HeldLock<'a>(&'a ThreadLock);

impl SpinLock for ThreadLock {
    type Guard<'a> = HeldLock<'a>;

    fn init(&self) {
        self.0.store(false, Ordering::Release);
    }

    fn hold(&self) -> HeldLock<'_> {
        while self.0.swap(true, Ordering::Acquire) {
            std::thread::yield_now();
        }
        HeldLock(self)
    }
}

impl Drop for HeldLock<'_> {
    fn drop(&mut self) {
        self.0.0.store(false, Ordering::Release);
    }
}

type Group = GroupOf<ThreadLock>;
type Table<'a> = TableOf<'a, ThreadLock>;

/// The locks of one table.
#[derive(Default)]
struct Mutual {
    control: Mutex<()>,
    insert: [Mutex<()>; INSERT_LOCKS],
}

impl Control for &'static Mutual {
    type Guard = MutexGuard<'static, ()>;

    fn hold(&self) -> Self::Guard {
        self.control.lock().expect("not to be taken twice by the same thread")
    }

    fn hold_to_insert(&self, number: usize) -> Self::Guard {
        self.insert[number].lock().expect("not to be taken twice by the same thread")
    }
}

/// A table in leaked memory, for the life of the test process.
struct Counters {
    table: Table<'static>,
    control: &'static Mutual,
    capacity: u64,
}

impl Counters {
    fn new(keys: usize) -> Self {
        Self::started(keys, STARTED_AT)
    }

    fn started(keys: usize, at: i64) -> Self {
        Self::started_as(&BOOT, keys, at)
    }

    fn started_as(boot: &[u8; 16], keys: usize, at: i64) -> Self {
        // SAFETY: made of atomics only, for which zero is a value; PostgreSQL also provides it zeroed.
        let header: Box<Header> = unsafe { Box::new_zeroed().assume_init() };
        let groups: Vec<_> = (0..groups_for(keys)).map(|_| Group::default()).collect();
        let capacity = (groups.len() * SLOTS_PER_GROUP) as u64;
        let table = Table::new(Box::leak(header), Vec::leak(groups));
        // A different seed for each start, as in the server.
        table.start(&NODE, boot, SEED ^ u64::from(boot[0]), at);
        Counters { table, control: Box::leak(Box::default()), capacity }
    }

    /// The table of the next server start, an hour later, and how much of the old one found room.
    fn restarted(&self, keys: usize) -> (Self, Restored) {
        let at = self.table.stats(&self.control, DATABASE).started_at + 60 * MINUTE;
        let mut boot = self.table.boot();
        boot[0] += 1;
        let (head, records) = self.table.save(SHUTDOWN, at);
        let records: Vec<Record> = records.collect();
        assert_eq!(head.records, records.len() as u64);
        let next = Self::started_as(&boot, keys, at);
        let restored = next.table.restore(&head, records.into_iter());
        (next, restored)
    }

    fn count(&self, database: u32, id: u128, used: Use) {
        self.count_of(Owner::default(), database, id, used);
    }

    fn count_of(&self, owner: Owner, database: u32, id: u128, used: Use) {
        let process = id as usize % 7;
        self.table.count_use(&self.control, process, database, &id.to_be_bytes(), &|| owner, &used);
    }

    fn charge(&self, database: u32, kind: Kind, id: u128, limit: Limit, now: i64) -> Option<Charge> {
        self.charge_of(Owner::default(), database, kind, id, limit, now)
    }

    fn charge_of(
        &self,
        owner: Owner,
        database: u32,
        kind: Kind,
        id: u128,
        limit: Limit,
        now: i64,
    ) -> Option<Charge> {
        self.table.charge(&self.control, 0, database, kind, &id.to_be_bytes(), &|| owner, limit, now)
    }

    fn charge_use(&self, database: u32, id: u128, used: &Use, limit: Limit) -> Option<Charge> {
        self.table.charge_use(&self.control, 0, database, &id.to_be_bytes(), &Owner::default, used, limit)
    }

    fn overflowed(&self) -> u64 {
        self.table.stats(&self.control, DATABASE).overflowed
    }

    fn flush(&self, database: u32) -> Sums {
        let (generation, rows) = self.drain(database);
        self.acknowledge(database, generation);
        totals(&rows)
    }

    fn drain(&self, database: u32) -> (u64, BTreeMap<u128, UsageRow>) {
        let (_, generation, rows) = self.drain_of(database);
        (generation, rows)
    }

    /// Also returns the server start that the generation belongs to.
    fn drain_of(&self, database: u32) -> ([u8; 16], u64, BTreeMap<u128, UsageRow>) {
        let drained = self.table.drain(&self.control, database).expect("room for one more database");
        let rows = drained.rows;
        assert!(rows.is_empty() || drained.node == NODE);
        let count = rows.len();
        let rows: BTreeMap<_, _> =
            rows.into_iter().map(|row| (u128::from_be_bytes(row.token_id), row)).collect();
        assert_eq!(rows.len(), count, "a token twice in one generation");
        (drained.boot, drained.generation, rows)
    }

    fn acknowledge(&self, database: u32, generation: u64) -> bool {
        self.table.acknowledge(&self.control, database, generation)
    }
}

fn accepted(at: i64, client: Option<Net>) -> Use {
    Use { accepted: true, at, client }
}

fn denied(at: i64) -> Use {
    Use { accepted: false, at, client: None }
}

fn address(text: &str) -> Option<Net> {
    Some(Net::from(text.parse::<IpAddr>().unwrap()))
}

/// Uses and denials of each token in the rows.
fn totals(rows: &BTreeMap<u128, UsageRow>) -> Vec<(u128, u64, u64)> {
    rows.iter().map(|(key, row)| (*key, row.uses, row.denials)).collect()
}

/// A random number generator that is good enough for choosing (splitmix64).
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % sides
    }
}

#[test]
fn prefetching_counters_counts_nothing_and_takes_any_group_number() {
    let counters = Counters::new(1000);
    let known = 1_u128 << 80;
    counters.count(DATABASE, known, accepted(STARTED_AT, None));
    for token in [known, 2 << 80] {
        let group = counters.table.group_of(DATABASE, &token.to_be_bytes());
        assert!(group < groups_for(1000));
        assert!(counters.table.group_line(group).is_some());
        assert!(counters.table.entry_lines(DATABASE, &token.to_be_bytes()).count() <= SLOTS_PER_GROUP);
    }
    assert!(counters.table.group_line(usize::MAX).is_none());
    let (_, rows) = counters.drain(DATABASE);
    assert_eq!(rows.iter().map(|(&id, row)| (id, row.uses)).collect::<Vec<_>>(), [(known, 1)]);
}

#[test]
fn uses_and_denials_are_summed_per_token() {
    let counters = Counters::new(1024);
    for n in 0..10 {
        counters.count(DATABASE, 1, accepted(100 + n, None));
        counters.count(DATABASE, 2, denied(100));
    }
    counters.count(DATABASE, 2, accepted(100, None));
    let (_, rows) = counters.drain(DATABASE);
    assert_eq!(totals(&rows), [(1, 10, 0), (2, 1, 10)]);
}

#[test]
fn a_closed_generation_is_handed_out_again_until_it_is_acknowledged() {
    let counters = Counters::new(1024);
    counters.count(DATABASE, 1, accepted(100, None));
    let (first, rows) = counters.drain(DATABASE);
    assert_eq!(totals(&rows), [(1, 1, 0)]);

    // Uses meanwhile belong to the next generation, whether the token is new or not.
    counters.count(DATABASE, 1, accepted(200, None));
    counters.count(DATABASE, 2, denied(200));
    for _ in 0..3 {
        let (again, rows) = counters.drain(DATABASE);
        assert_eq!((again, totals(&rows)), (first, vec![(1, 1, 0)]));
    }
    let stats = counters.table.stats(&counters.control, DATABASE);
    assert_eq!((stats.generation, stats.closed_generation), (Some(first), Some(first)));

    for wrong in [0, first - 1, first + 1, u64::MAX] {
        assert!(!counters.acknowledge(DATABASE, wrong), "{wrong}");
        assert!(!counters.acknowledge(DATABASE + 1, first), "another database's");
    }
    assert!(counters.acknowledge(DATABASE, first));
    assert!(!counters.acknowledge(DATABASE, first), "a second time");
    let stats = counters.table.stats(&counters.control, DATABASE);
    assert_eq!((stats.generation, stats.closed_generation), (Some(first + 1), None));

    let (second, rows) = counters.drain(DATABASE);
    assert_eq!((second, totals(&rows)), (first + 1, vec![(1, 1, 0), (2, 0, 1)]));
    assert!(!counters.acknowledge(DATABASE, first), "late, for an older generation");
    assert!(counters.acknowledge(DATABASE, second));
    assert!(counters.drain(DATABASE).1.is_empty());
}

#[test]
fn a_drain_of_nothing_closes_nothing() {
    let counters = Counters::new(1024);
    let (generation, rows) = counters.drain(DATABASE);
    assert!(rows.is_empty());
    assert_eq!(counters.table.stats(&counters.control, DATABASE).closed_generation, None);
    assert!(!counters.acknowledge(DATABASE, generation));
    counters.count(DATABASE, 1, accepted(100, None));
    let (same, rows) = counters.drain(DATABASE);
    assert_eq!((same, totals(&rows)), (generation, vec![(1, 1, 0)]));
}

#[test]
fn databases_are_drained_each_for_itself() {
    let counters = Counters::new(1024);
    // The same token in two databases, as in a copy of a database.
    counters.count(1, 5, accepted(100, None));
    counters.count(2, 5, denied(100));
    let (first, rows) = counters.drain(1);
    assert_eq!(totals(&rows), [(5, 1, 0)]);
    let (second, rows) = counters.drain(2);
    assert_eq!(totals(&rows), [(5, 0, 1)]);
    assert!(counters.acknowledge(1, first));
    assert_eq!(totals(&counters.drain(2).1), [(5, 0, 1)]);
    assert!(counters.acknowledge(2, second));
}

#[test]
fn a_generations_number_is_not_used_again_after_a_restart() {
    let before = Counters::new(1024);
    before.count(DATABASE, 1, accepted(1, None));
    let (old, _) = before.drain(DATABASE);
    // Even a flush every microsecond would not have reached this number.
    let after = Counters::started(1024, STARTED_AT + 1_000_000);
    after.count(DATABASE, 1, accepted(1, None));
    let (new, _) = after.drain(DATABASE);
    assert!(new > old, "{new} after {old}");
    assert!(!after.acknowledge(DATABASE, old));
}

#[test]
fn a_database_beyond_the_limit_is_refused_and_harms_no_other() {
    let counters = Counters::new(1024);
    let most = u32::try_from(MAX_DATABASES).unwrap();
    for database in 1..=most {
        counters.count(database, 1, accepted(1, None));
        counters.drain(database);
    }
    counters.count(most + 1, 1, accepted(1, None));
    assert!(counters.table.drain(&counters.control, most + 1).is_err());
    assert!(!counters.acknowledge(most + 1, 1));
    assert_eq!(counters.table.stats(&counters.control, most + 1).generation, None);
    assert_eq!(totals(&counters.drain(most).1), [(1, 1, 0)]);
}

#[test]
fn the_last_use_is_the_latest_one_with_its_address() {
    let networks =
        [Net::v4([10, 0, 0, 0], 8), Net::v6([0x20; 16], 44), Net::v6([0; 16], 0), Net::v4([0; 4], 0)];
    let addresses =
        ["192.0.2.1", "2001:db8::1", "::", "0.0.0.0", "255.255.255.255", "::ffff:192.0.2.7"].map(address);
    for client in [None].into_iter().chain(addresses).chain(networks) {
        let counters = Counters::new(1024);
        counters.count(DATABASE, 1, accepted(300, address("203.0.113.9")));
        counters.count(DATABASE, 1, accepted(500, client));
        // Neither a use that was judged earlier nor a denial is the last use.
        counters.count(DATABASE, 1, accepted(400, address("203.0.113.9")));
        counters.count(DATABASE, 1, denied(600));
        let (_, rows) = counters.drain(DATABASE);
        assert_eq!(rows[&1].last_used, Some((500, client)));
        assert_eq!(totals(&rows), [(1, 3, 1)]);
    }
}

#[test]
fn a_token_that_was_only_denied_was_not_used() {
    let counters = Counters::new(1024);
    counters.count(DATABASE, 1, denied(600));
    let (generation, rows) = counters.drain(DATABASE);
    assert_eq!((rows[&1].uses, rows[&1].denials, rows[&1].last_used), (0, 1, None));
    counters.acknowledge(DATABASE, generation);

    // The last use of one generation is not that of the next.
    counters.count(DATABASE, 2, accepted(700, address("192.0.2.1")));
    let (generation, _) = counters.drain(DATABASE);
    counters.acknowledge(DATABASE, generation);
    counters.count(DATABASE, 2, denied(800));
    let (_, rows) = counters.drain(DATABASE);
    assert_eq!(rows[&2].last_used, None);
}

#[test]
fn outcomes_are_summed_over_all_processes() {
    let counters = Counters::new(1024);
    for process in 0..1000 {
        for (n, code) in Code::ALL.iter().enumerate() {
            for _ in 0..=n {
                counters.table.count_outcome(process, *code);
            }
        }
    }
    let stats = counters.table.stats(&counters.control, DATABASE);
    for (n, code) in Code::ALL.iter().enumerate() {
        assert_eq!(stats.outcomes[code.index()], 1000 * (n as u64 + 1), "{code}");
    }
    assert_eq!((stats.boot, stats.started_at, stats.tracked, stats.overflowed), (BOOT, STARTED_AT, 0, 0));
    assert!(counters.capacity >= 1024);
}

#[test]
fn keys_are_busy_until_their_counts_are_flushed_and_their_limits_are_whole() {
    let counters = Counters::new(1024);
    let limit = Limit::new(1, MINUTE).unwrap();
    let busy = |at| counters.table.busy(at);
    assert_eq!(busy(STARTED_AT), 0);
    counters.count(DATABASE, 1, accepted(STARTED_AT, None));
    counters.count(DATABASE + 1, 2, accepted(STARTED_AT, None));
    counters.charge(DATABASE, Kind::User, 3, limit, STARTED_AT);
    assert_eq!(busy(STARTED_AT), 3);
    counters.flush(DATABASE);
    assert_eq!(busy(STARTED_AT), 2);
    assert_eq!(busy(STARTED_AT + 2 * MINUTE), 1);
    counters.flush(DATABASE + 1);
    assert_eq!(busy(STARTED_AT + 2 * MINUTE), 0);
    assert_eq!(counters.table.stats(&counters.control, DATABASE).tracked, 3);
}

#[test]
fn as_many_keys_as_were_asked_for_find_room_and_a_fifth_more() {
    const KEYS: usize = 131_072;
    let counters = Counters::new(KEYS);
    for key in 0..(KEYS + KEYS / 5) as u128 {
        counters.count(DATABASE, key, accepted(1, None));
    }
    assert_eq!(counters.table.stats(&counters.control, DATABASE).overflowed, 0);
}

#[test]
fn counters_beyond_one_generation_go_into_the_next_ones() {
    const KEYS: u64 = 40_000;
    let counters = Counters::new(KEYS as usize);
    for key in 0..KEYS {
        counters.count(DATABASE, key.into(), accepted(1, None));
    }
    let mut sizes = Vec::new();
    loop {
        let (generation, rows) = counters.drain(DATABASE);
        if rows.is_empty() {
            break;
        }
        assert_eq!(totals(&counters.drain(DATABASE).1), totals(&rows), "the same until it is acknowledged");
        assert!(counters.acknowledge(DATABASE, generation));
        sizes.push(rows.len() as u64);
    }
    assert_eq!(sizes, [16_384, 16_384, KEYS - 2 * 16_384]);
}

#[test]
fn keys_that_come_and_go_are_counted_exactly_by_many_at_once() {
    // Far more keys than slots: slots change hands all the time, while other threads count in them.
    const THREADS: u64 = 4;
    const EACH: u64 = 50_000;
    let counters = Counters::new(500);
    let done = AtomicBool::new(false);
    let mut counted = 0;
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..THREADS)
            .map(|thread| {
                let counters = &counters;
                scope.spawn(move || {
                    let mut dice = Dice(thread);
                    for _ in 0..EACH {
                        let key = u128::from(dice.roll(3000));
                        counters.count(DATABASE, key, accepted(1 + key as i64, None));
                    }
                })
            })
            .collect();
        let done = &done;
        scope.spawn(move || {
            for worker in workers {
                worker.join().unwrap();
            }
            done.store(true, Ordering::Relaxed);
        });
        loop {
            let last = done.load(Ordering::Relaxed);
            let (generation, rows) = counters.drain(DATABASE);
            for (key, row) in &rows {
                counted += row.uses;
                assert_eq!(row.last_used, Some((1 + *key as i64, None)), "another key's use");
            }
            counters.acknowledge(DATABASE, generation);
            if last {
                break;
            }
        }
    });
    let lost = counters.table.stats(&counters.control, DATABASE).overflowed;
    assert_eq!(counted + lost, THREADS * EACH);
    assert!(counted > 0);
}

#[test]
fn uses_without_room_are_counted_as_lost_until_a_flush_makes_room() {
    const KEYS: u64 = 1000;
    let counters = Counters::new(100);
    for key in 0..KEYS {
        counters.count(DATABASE, u128::from(key), accepted(1, None));
    }
    let full = counters.table.stats(&counters.control, DATABASE);
    let (generation, rows) = counters.drain(DATABASE);
    assert_eq!(rows.len() as u64 + full.overflowed, KEYS, "every use is counted or reported as lost");
    assert_eq!((full.tracked, rows.len() as u64), (counters.capacity, counters.capacity), "slots stay empty");

    // Closed counters are not dropped for new keys.
    for key in 1000..2000 {
        counters.count(DATABASE, key, accepted(1, None));
    }
    assert_eq!(totals(&counters.drain(DATABASE).1), totals(&rows));
    assert!(counters.acknowledge(DATABASE, generation));
    let before = counters.table.stats(&counters.control, DATABASE).overflowed;
    for key in 2000..2100 {
        counters.count(DATABASE, key, accepted(1, None));
    }
    let lost = counters.table.stats(&counters.control, DATABASE).overflowed - before;
    assert!(lost < 100, "no room was made");
    let (_, rows) = counters.drain(DATABASE);
    assert_eq!(rows.keys().filter(|key| **key >= 2000).count() as u64 + lost, 100);
}

#[test]
fn a_limiter_that_is_in_use_keeps_its_entry_and_one_that_is_idle_does_not() {
    let counters = Counters::new(100);
    let slow = Limit::new(2, MINUTE).expect("positive");
    let charge = |key: u64, at| {
        let used = accepted(at, None);
        counters.charge_use(DATABASE, key.into(), &used, slow)
    };
    for key in 0..10 {
        assert_eq!(charge(key, STARTED_AT).map(|charge| charge.remaining), Some(1));
    }
    let flush = || {
        let (generation, _) = counters.drain(DATABASE);
        counters.acknowledge(DATABASE, generation)
    };
    assert!(flush());
    let crowd =
        |at| (0..10_000).for_each(|key| counters.count(DATABASE, 1_000_000 + key, accepted(at, None)));
    crowd(STARTED_AT + MINUTE / 4);
    for key in 0..10 {
        assert_eq!(charge(key, STARTED_AT).map(|charge| charge.remaining), Some(0), "forgotten");
        assert_eq!(charge(key, STARTED_AT).map(|charge| charge.admitted), Some(false), "forgotten");
    }
    // The table is full of unflushed counters, so a limit on another key cannot be kept.
    assert_eq!(charge(99, STARTED_AT), None);
    assert!(flush());
    crowd(STARTED_AT + 2 * MINUTE);
    let kept = (0..10).filter(|&key| charge(key, STARTED_AT + 2 * MINUTE).is_some()).count();
    assert!(kept < 10, "limiters with a full allowance were kept, and their room was not reused");
}

#[test]
fn a_use_refused_by_its_limit_counts_as_a_denial() {
    let counters = Counters::new(100);
    let limit = Limit::new(3, MINUTE).expect("positive");
    for _ in 0..10 {
        counters.charge_use(DATABASE, 1, &accepted(STARTED_AT, None), limit);
    }
    assert_eq!(totals(&counters.drain(DATABASE).1), [(1, 3, 7)]);
}

#[test]
fn users_and_addresses_are_limited_but_not_handed_out() {
    let counters = Counters::new(100);
    let limit = Limit::new(1, MINUTE).expect("positive");
    let admitted =
        |kind, database| counters.charge(database, kind, 1, limit, STARTED_AT).map(|charge| charge.admitted);
    for kind in [Kind::Token, Kind::User, Kind::Address] {
        for database in [DATABASE, DATABASE + 1] {
            assert_eq!(admitted(kind, database), Some(true), "another key");
            assert_eq!(admitted(kind, database), Some(false));
        }
    }
    assert!(counters.drain(DATABASE).1.is_empty());
}

#[test]
fn addresses_take_no_more_than_their_part_and_the_last_ones_are_remembered() {
    let counters = Counters::new(1000);
    let limit = Limit::new(1, 1440 * MINUTE).expect("positive");
    let charge = |key: u64| {
        let at = STARTED_AT + key as i64;
        counters.charge(DATABASE, Kind::Address, key.into(), limit, at).map(|charge| charge.admitted)
    };
    assert!((0..100_000).all(|key| charge(key) == Some(true)), "there is always room for one more");
    let full = counters.table.stats(&counters.control, DATABASE);
    assert_eq!((full.tracked, full.overflowed), (counters.capacity / 4, 0));
    assert!((99_950..100_000).all(|key| charge(key) == Some(false)), "the last that failed are remembered");
}

// ---- Shares of a full table

/// A creator and a user in one database.
fn owner(creator: u64, user: u64) -> Owner {
    // As evenly spread as digests are.
    let spread = |n: u64| (n + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    Owner { creator: spread(creator), user: spread(user) }
}

const MALLORY: u64 = 1;
const APP: u64 = 2;

#[test]
fn a_database_that_is_never_drained_takes_nothing_from_the_share_of_another() {
    let counters = Counters::new(1024);
    let other = DATABASE + 1;
    for key in 0..10_000 {
        counters.count(DATABASE, key, accepted(STARTED_AT, None));
    }
    let full = counters.table.stats(&counters.control, DATABASE);
    assert_eq!((full.tracked, full.overflowed), (counters.capacity, 10_000 - counters.capacity));
    for _ in 0..3 {
        for key in 0..300 {
            counters.count(other, key, accepted(STARTED_AT, None));
        }
        // Their counters that were displaced are reported as lost, and all of theirs are counted while more come from
        // the first.
        for key in 10_000..12_000 {
            counters.count(DATABASE, key, accepted(STARTED_AT, None));
        }
        assert_eq!(counters.flush(other), (0..300).map(|key| (key, 1, 0)).collect::<Sums>());
    }
    let kept: u64 = counters.drain(DATABASE).1.values().map(|row| row.uses).sum();
    assert_eq!(kept + counters.overflowed(), 16_000, "every use is counted or reported as lost");
}

/// Otherwise nothing of it would ever be drained again: the outstanding generation must be acknowledged first.
#[test]
fn a_database_whose_outstanding_counters_were_given_up_is_drained_again() {
    let counters = Counters::new(10);
    for key in 0..1000 {
        counters.count(DATABASE, key, accepted(STARTED_AT, None));
    }
    let (gone, rows) = counters.drain(DATABASE);
    assert!(!rows.is_empty());
    for database in DATABASE + 1..DATABASE + 40 {
        counters.count(database, 1, accepted(STARTED_AT, None));
    }
    let (again, _) = counters.drain(DATABASE);
    counters.acknowledge(DATABASE, again);
    assert!(!counters.acknowledge(DATABASE, gone));
    for database in DATABASE + 1..DATABASE + 40 {
        counters.flush(database);
    }
    counters.count(DATABASE, 2000, accepted(STARTED_AT, None));
    assert_eq!(counters.flush(DATABASE), [(2000, 1, 0)]);
}

#[test]
fn limits_that_last_for_a_day_leave_room_for_counters_and_for_the_limits_of_others() {
    let counters = Counters::new(1024);
    let day = Limit::new(1, 1440 * MINUTE).expect("positive");
    let charge = |creator, user, database, kind, key| {
        let charge = counters.charge_of(owner(creator, user), database, kind, key, day, STARTED_AT);
        charge.map(|charge| charge.admitted)
    };
    // A different user for each token, so that only the issuer is the same.
    for key in 0..5_000 {
        charge(MALLORY, key as u64, DATABASE, Kind::Token, 1_000_000 + key);
    }
    let full = counters.table.stats(&counters.control, DATABASE);
    assert_eq!(full.tracked, counters.capacity * 3 / 4);
    for (user, database) in [(1, DATABASE), (2, DATABASE), (3, DATABASE + 1)] {
        for kind in [Kind::Token, Kind::User, Kind::Address] {
            for key in 0..20 {
                let key = 100 * u128::from(user) + key;
                assert_eq!(charge(APP, user, database, kind, key), Some(true), "no room for {user}'s");
            }
        }
    }
    for key in 5_000..10_000 {
        charge(MALLORY, key as u64, DATABASE, Kind::Token, 1_000_000 + key);
    }
    for (user, database) in [(1, DATABASE), (2, DATABASE), (3, DATABASE + 1)] {
        for kind in [Kind::Token, Kind::User, Kind::Address] {
            for key in 0..20 {
                let key = 100 * u128::from(user) + key;
                assert_eq!(charge(APP, user, database, kind, key), Some(false), "{user}'s is forgotten");
            }
        }
    }
    // Limits without room are reported as lost.
    let overflowed = counters.overflowed();
    for key in 0..200 {
        counters.count_of(owner(APP, 1), DATABASE, 2_000_000 + key, accepted(STARTED_AT, None));
    }
    assert_eq!((counters.flush(DATABASE).len(), counters.overflowed()), (200, overflowed));
}

#[test]
fn a_user_with_very_many_tokens_displaces_neither_other_users_nor_the_own_limit() {
    let counters = Counters::new(1024);
    let day = Limit::new(1, 1440 * MINUTE).expect("positive");
    let limited = |user: u64| {
        let charge = counters.charge_of(owner(APP, user), DATABASE, Kind::User, user.into(), day, STARTED_AT);
        charge.map(|charge| charge.admitted)
    };
    assert_eq!((limited(1), limited(2)), (Some(true), Some(true)));
    for user in 2..40 {
        counters.count_of(owner(APP, user), DATABASE, 5000 + u128::from(user), accepted(STARTED_AT, None));
    }
    for key in 0..5_000 {
        counters.count_of(owner(APP, 1), DATABASE, 1_000_000 + key, accepted(STARTED_AT, None));
    }
    for user in 40..80 {
        counters.count_of(owner(APP, user), DATABASE, 5000 + u128::from(user), accepted(STARTED_AT, None));
    }
    assert_eq!((limited(1), limited(2)), (Some(false), Some(false)));
    let (_, rows) = counters.drain(DATABASE);
    assert!((2..80).all(|user| rows.get(&(5000 + user)).is_some_and(|row| row.uses == 1)), "lost");
}

#[test]
fn addresses_that_fail_in_one_database_do_not_displace_those_of_another() {
    let counters = Counters::new(1024);
    let limit = Limit::new(1, 1440 * MINUTE).expect("positive");
    let charge = |database, key: u128| {
        let charge = counters.charge(database, Kind::Address, key, limit, STARTED_AT);
        charge.map(|charge| charge.admitted)
    };
    assert!((0..30).all(|key| charge(DATABASE + 1, key) == Some(true)));
    assert!((0..10_000).all(|key| charge(DATABASE, key) == Some(true)));
    assert!((0..30).all(|key| charge(DATABASE + 1, key) == Some(false)), "forgotten");
}

// ---- A clean restart

#[test]
fn undrained_counts_continue_after_a_restart() {
    let before = Counters::new(1024);
    before.count(DATABASE, 1, accepted(STARTED_AT, address("192.0.2.1")));
    before.count(DATABASE, 1, denied(STARTED_AT));
    before.count(DATABASE + 1, 2, accepted(STARTED_AT + 5, None));
    let (after, restored) = before.restarted(1024);
    assert_eq!(restored, Restored { kept: 2, ..Restored::default() });
    after.count(DATABASE, 1, denied(STARTED_AT));
    let (boot, _, rows) = after.drain_of(DATABASE);
    assert_eq!((totals(&rows), boot), (vec![(1, 1, 2)], after.table.boot()));
    assert_eq!(rows[&1].last_used, Some((STARTED_AT, address("192.0.2.1"))));
    let (_, rows) = after.drain(DATABASE + 1);
    assert_eq!(totals(&rows), [(2, 1, 0)]);
    assert_eq!(rows[&2].last_used, Some((STARTED_AT + 5, None)));
}

/// It may have been applied, under the name that is recorded there.
#[test]
fn an_outstanding_generation_keeps_its_name_and_its_counts_over_restarts() {
    let first = Counters::new(1024);
    first.count(DATABASE, 1, accepted(STARTED_AT, None));
    first.count(DATABASE, 2, denied(STARTED_AT));
    let (boot, generation, rows) = first.drain_of(DATABASE);
    let handed_out = totals(&rows);
    first.count(DATABASE, 1, accepted(STARTED_AT, None));
    first.count(DATABASE, 3, accepted(STARTED_AT, None));
    // Acknowledged, so nothing of it remains.
    first.count(DATABASE + 1, 4, accepted(STARTED_AT, None));
    let (other, _) = first.drain(DATABASE + 1);
    assert!(first.acknowledge(DATABASE + 1, other));

    let (second, _) = first.restarted(1024);
    let (third, restored) = second.restarted(1024);
    assert_eq!(restored.lost_uses, 0);
    assert_ne!(third.table.boot(), boot);
    third.count(DATABASE, 2, denied(STARTED_AT));
    for _ in 0..2 {
        let (named, number, rows) = third.drain_of(DATABASE);
        assert_eq!((named, number, totals(&rows)), (boot, generation, handed_out.clone()));
    }
    assert!(third.drain(DATABASE + 1).1.is_empty());
    assert!(third.acknowledge(DATABASE, generation));
    let (named, number, rows) = third.drain_of(DATABASE);
    assert_eq!((named, totals(&rows)), (third.table.boot(), vec![(1, 1, 0), (2, 0, 1), (3, 1, 0)]));
    assert!(number > generation);
}

#[test]
fn a_table_of_the_same_size_has_room_for_all_that_was_in_it() {
    let before = Counters::new(1000);
    for key in 0..3000 {
        before.count(DATABASE, key, accepted(STARTED_AT, None));
    }
    let full = before.table.stats(&before.control, DATABASE);
    assert_eq!(full.tracked, before.capacity);
    let (after, restored) = before.restarted(1000);
    assert_eq!((restored.kept, restored.lost_uses), (full.tracked, 0));
    assert_eq!(totals(&after.drain(DATABASE).1), totals(&before.drain(DATABASE).1));
}

#[test]
fn a_smaller_table_keeps_limits_before_counters_and_reports_what_is_lost_of_each() {
    let before = Counters::new(3000);
    let limit = Limit::new(1, 1440 * MINUTE).expect("positive");
    let charge = |counters: &Counters, kind, key| {
        counters.charge(DATABASE, kind, key, limit, STARTED_AT).map(|charge| charge.admitted)
    };
    for key in 0..500 {
        assert_eq!(charge(&before, Kind::User, key), Some(true));
        assert_eq!(charge(&before, Kind::Token, 1_000_000 + key), Some(true));
    }
    for key in 0..2000 {
        for _ in 0..3 {
            before.count(DATABASE, key, accepted(STARTED_AT, None));
        }
    }
    let (after, restored) = before.restarted(1000);
    let [tokens, users, addresses, _] = restored.lost_limits;
    let limits = 1000 - tokens - users - addresses;
    assert!(addresses == 0 && limits > 950, "{restored:?}");
    let spent = |kind, from: u128| {
        (from..from + 500)
            .filter(|&key| {
                let look = |state: &mut _| limit.peek(state, STARTED_AT).admitted;
                after.table.with_limiter(DATABASE, kind, &key.to_be_bytes(), look) == Some(false)
            })
            .count() as u64
    };
    assert_eq!((spent(Kind::User, 0), spent(Kind::Token, 1_000_000)), (500 - users, 500 - tokens));
    let stats = after.table.stats(&after.control, DATABASE);
    assert_eq!((stats.overflowed, stats.tracked), (restored.lost_uses, restored.kept));
    assert_eq!(restored.kept, limits + 2000 - restored.lost_counters);
    assert_eq!(restored.lost_uses, 3 * restored.lost_counters);
    let counted: u64 = after.drain(DATABASE).1.values().map(|row| row.uses).sum();
    assert_eq!(counted + restored.lost_uses, 6000);

    // If no outstanding counters found room, the next drain is not blocked.
    before.drain(DATABASE);
    let kept = before.table.save(SHUTDOWN, STARTED_AT).0;
    let bare = Counters::new(500);
    bare.table.restore(&kept, core::iter::empty());
    bare.count(DATABASE, 1, accepted(STARTED_AT, None));
    assert_eq!(totals(&bare.drain(DATABASE).1), [(1, 1, 0)]);
}

#[test]
fn limits_go_on_after_a_restart_and_those_that_are_idle_are_not_kept() {
    let before = Counters::new(1024);
    let (long, short) = (Limit::new(2, 1440 * MINUTE), Limit::new(2, MINUTE));
    let charge = |counters: &Counters, key: u128, limit: Option<Limit>| {
        let limit = limit.expect("positive");
        counters.charge(DATABASE, Kind::User, key, limit, STARTED_AT)
    };
    for key in 1..=2 {
        for (key, limit) in [(key, long), (10 + key, short)] {
            assert!(charge(&before, key, limit).is_some_and(|charge| charge.admitted));
            assert!(charge(&before, key, limit).is_some_and(|charge| charge.admitted));
        }
    }
    let (after, _) = before.restarted(1024);
    assert_eq!(after.table.stats(&after.control, DATABASE).tracked, 2);
    for key in 1..=2 {
        assert!(charge(&after, key, long).is_some_and(|charge| !charge.admitted));
    }
}

#[test]
fn entries_of_a_later_release_are_lost_and_reported() {
    let before = Counters::new(1024);
    before.count(DATABASE, 1, accepted(STARTED_AT, None));
    let (head, records) = before.table.save(SHUTDOWN, STARTED_AT);
    let after = Counters::new(1024);
    let unknown = records.map(|record| Record { kind: 200, ..record });
    assert_eq!(after.table.restore(&head, unknown).lost_uses, 1);
    assert!(after.drain(DATABASE).1.is_empty());
}

// ---- Pressure

#[test]
fn pressure_is_the_part_of_the_room_that_is_not_flushed() {
    for keys in [100, 1000, 400_000] {
        let counters = Counters::new(keys);
        assert_eq!(counters.table.pressure(), 0.0);
        for key in 0..keys as u128 / 2 {
            counters.count(DATABASE, key, accepted(STARTED_AT, None));
        }
        // There is room for half as many keys again as requested.
        let pressure = counters.table.pressure();
        assert!((0.2..0.4).contains(&pressure), "{keys}: {pressure}");
        let (generation, _) = counters.drain(DATABASE);
        assert_eq!(counters.table.pressure(), pressure, "closed counters are not flushed yet");
        assert!(counters.acknowledge(DATABASE, generation));
        loop {
            let (generation, rows) = counters.drain(DATABASE);
            if rows.is_empty() {
                break;
            }
            assert!(counters.acknowledge(DATABASE, generation));
        }
        assert_eq!(counters.table.pressure(), 0.0);
        for key in 0..20 * keys.min(1000) as u128 {
            counters.count(DATABASE, key, accepted(STARTED_AT, None));
        }
        assert!(keys > 1000 || counters.table.pressure() == 1.0, "{keys}");
    }
}

#[test]
fn a_forgotten_database_leaves_its_slot_to_another() {
    let counters = Counters::new(4096);
    let most = MAX_DATABASES as u32;
    for database in 1..=most {
        counters.count(database, 1, denied(STARTED_AT));
        counters.drain(database);
    }
    assert_eq!(counters.table.drain(&counters.control, most + 1).err(), Some(Refusal::TooManyDatabases));
    assert_eq!(counters.table.databases(&counters.control), core::array::from_fn(|i| i as u32 + 1));
    counters.table.forget(&counters.control, 7);
    counters.count(most + 1, 2, denied(STARTED_AT));
    assert_eq!(totals(&counters.drain(most + 1).1), [(2, 0, 1)]);
}

#[test]
fn no_two_databases_close_generations_of_one_number() {
    let counters = Counters::new(100);
    let mut numbers = Vec::new();
    for _ in 0..3 {
        for database in 1..=3 {
            counters.count(database, 1, denied(STARTED_AT));
            let (generation, _) = counters.drain(database);
            assert!(!numbers.contains(&generation), "{generation} twice");
            numbers.push(generation);
            assert!(counters.acknowledge(database, generation));
        }
    }
}

/// Random uses, drains and acknowledgements, in a table that is far too small for one database or has room for three,
/// compared with a plain map that does the same.
#[test]
fn whatever_happens_the_sums_are_those_of_a_plain_map() {
    for seed in 0..40 {
        let mut dice = Dice(seed);
        let databases = if seed % 2 == 0 { 1 } else { 3 };
        let room = if databases == 1 { 100 * (1 + dice.roll(3) as usize) } else { 12_000 };
        let counters = Counters::new(room);
        let keys = 50 + u128::from(dice.roll(1500));
        let mut live: BTreeMap<(u32, u128), (u64, u64)> = BTreeMap::new();
        let mut closed: BTreeMap<u32, (u64, Sums)> = BTreeMap::new();
        for _ in 0..6000 {
            let database = 1 + dice.roll(databases) as u32;
            match dice.roll(200) {
                0 => {
                    let (generation, rows) = counters.drain(database);
                    let expected = closed.entry(database).or_insert_with(|| {
                        let sums = live
                            .extract_if(.., |(of, _), _| *of == database)
                            .map(|((_, key), (uses, denials))| (key, uses, denials))
                            .collect();
                        (generation, sums)
                    });
                    assert_eq!((generation, totals(&rows)), *expected, "seed {seed}");
                    if rows.is_empty() {
                        closed.remove(&database);
                    }
                }
                1 => {
                    let generation = closed.remove(&database).map(|(generation, _)| generation);
                    let acknowledged = counters.acknowledge(database, generation.unwrap_or(1));
                    assert_eq!(acknowledged, generation.is_some(), "seed {seed}");
                }
                _ => {
                    let key = u128::from(dice.roll(keys as u64)) << (64 * (dice.roll(2)));
                    let used = if dice.roll(3) == 0 { denied(1) } else { accepted(1, None) };
                    let before = counters.table.overflowed();
                    counters.count(database, key, used);
                    if counters.table.overflowed() == before {
                        let sums = live.entry((database, key)).or_default();
                        if used.accepted {
                            sums.0 += 1;
                        } else {
                            sums.1 += 1;
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn counting_is_exact_while_others_count_and_drain() {
    const THREADS: u64 = 6;
    const EACH: u64 = 60_000;
    const KEYS: u64 = 40;
    let counters = Counters::new(1024);
    let done = AtomicBool::new(false);
    let mut sums: BTreeMap<u128, (u64, u64)> = BTreeMap::new();
    let mut add = |rows: &BTreeMap<u128, UsageRow>| {
        for (key, row) in rows {
            let sum = sums.entry(*key).or_default();
            sum.0 += row.uses;
            sum.1 += row.denials;
        }
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..THREADS)
            .map(|thread| {
                let counters = &counters;
                scope.spawn(move || {
                    let mut dice = Dice(thread);
                    for n in 0..EACH {
                        // One of them is hot, so that several threads count in the same entry at the same time.
                        let key = u128::from(dice.roll(KEYS) * dice.roll(2));
                        let at = 1 + n as i64;
                        // The address encodes the time of the use, so that the two can be compared.
                        let client = Net::v4((at as u32).to_be_bytes(), 32);
                        counters.count(
                            DATABASE,
                            key,
                            if n % 4 == 0 { denied(at) } else { accepted(at, client) },
                        );
                    }
                })
            })
            .collect();
        let done = &done;
        scope.spawn(move || {
            for worker in workers {
                worker.join().unwrap();
            }
            done.store(true, Ordering::Relaxed);
        });
        loop {
            let last = done.load(Ordering::Relaxed);
            let (generation, rows) = counters.drain(DATABASE);
            for row in rows.values() {
                if let Some((at, client)) = row.last_used {
                    assert_eq!(
                        client,
                        Net::v4((at as u32).to_be_bytes(), 32),
                        "an address of another moment"
                    );
                }
            }
            add(&rows);
            assert_eq!(counters.acknowledge(DATABASE, generation), !rows.is_empty());
            if last {
                break;
            }
        }
    });
    let (uses, denials) = sums.values().fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
    assert_eq!((uses, denials), (THREADS * EACH * 3 / 4, THREADS * EACH / 4));
    assert_eq!(sums.len() as u64, KEYS);
    assert_eq!(counters.table.stats(&counters.control, DATABASE).overflowed, 0);
}

// ---- Quotas

const FOR_EVER: i64 = i64::MAX;

impl Counters {
    /// Spends a unit as the tables say; `None` without room.
    fn spend(&self, database: u32, quota: u128, granted: u64, ends_at: i64, now: i64) -> Option<bool> {
        let id = quota.to_be_bytes();
        if self.table.spend(database, &id, now).is_some() {
            return Some(true);
        }
        let lease = Lease { ends_at, granted, beyond: 0 };
        self.table.spend_of(&self.control, 1, database, &id, &lease, now).map(|spent| spent.is_some())
    }
}

#[test]
fn what_was_spent_of_a_quota_stays_until_its_period_is_over_whatever_else_comes() {
    let counters = Counters::new(100);
    let limit = Limit::new(1, 1440 * MINUTE).expect("positive");
    assert_eq!(counters.spend(DATABASE, 1, 1, FOR_EVER, STARTED_AT), Some(true));
    assert_eq!(counters.spend(DATABASE, 2, 1, STARTED_AT + MINUTE, STARTED_AT), Some(true));
    for key in 100..2000 {
        counters.count(DATABASE, key, accepted(STARTED_AT, None));
        counters.charge(DATABASE, Kind::User, key, limit, STARTED_AT);
    }
    assert_eq!(counters.spend(DATABASE, 1, 1, FOR_EVER, STARTED_AT), Some(false));
    assert_eq!(counters.spend(DATABASE, 2, 1, STARTED_AT + MINUTE, STARTED_AT), Some(false));
    assert!(counters.drain(DATABASE).1.len() > 50, "and the others found room");
    // The period after it begins with what the tables grant.
    assert_eq!(counters.spend(DATABASE, 2, 1, STARTED_AT + 2 * MINUTE, STARTED_AT + MINUTE), Some(true));
}

#[test]
fn quotas_take_half_of_the_room_at_most_and_refuse_beyond_that() {
    let counters = Counters::new(SLOTS_PER_GROUP);
    let room = counters.capacity / 2;
    let found = |now, end| {
        (0..1000).filter(|quota| counters.spend(DATABASE, *quota, 5, end, now).is_some()).count() as u64
    };
    assert_eq!(found(STARTED_AT, STARTED_AT + MINUTE), room);
    assert_eq!(found(STARTED_AT + MINUTE, FOR_EVER), room, "those whose period is over make room");
}

#[test]
fn a_database_with_many_quotas_leaves_room_for_those_of_another_and_nothing_is_spent_twice() {
    let counters = Counters::new(SLOTS_PER_GROUP);
    let granted = 3;
    for quota in 0..1000 {
        counters.spend(DATABASE, quota, granted, FOR_EVER, STARTED_AT);
    }
    let used = |database, quota| {
        (0..2 * granted)
            .filter(|_| counters.spend(database, quota, granted, FOR_EVER, STARTED_AT) == Some(true))
            .count()
    };
    let found = |quota| counters.spend(DATABASE + 1, quota, granted, FOR_EVER, STARTED_AT).is_some();
    assert_eq!((0..4).filter(|quota| found(*quota)).count(), 4);
    // In whose place one was forgotten, which may have been theirs.
    assert_eq!(used(DATABASE + 1, 0), 0);
    // Each of the first database's was used once, and has at most what was left then.
    for quota in 0..1000 {
        assert!(used(DATABASE, quota) < granted as usize, "{quota}");
    }
}

#[test]
fn a_clean_restart_keeps_leases_and_a_smaller_table_gives_all_of_them_up() {
    let before = Counters::new(3000);
    for quota in 0..500 {
        assert_eq!(before.spend(DATABASE, quota, 2, FOR_EVER, STARTED_AT), Some(true));
    }
    let (same, restored) = before.restarted(3000);
    assert_eq!((same.table.holder(), restored.lost_limits), (before.table.holder(), [0; 4]));
    let later = STARTED_AT + 60 * MINUTE;
    for quota in 0..500 {
        let uses = [0; 2].map(|_| same.spend(DATABASE, quota, 2, FOR_EVER, later));
        assert_eq!(uses, [Some(true), Some(false)]);
    }
    let (smaller, restored) = before.restarted(400);
    assert!(restored.lost_limits[3] > 0, "{restored:?}");
    assert_ne!(smaller.table.holder(), before.table.holder());
    assert!(smaller.table.quotas(DATABASE).is_empty());
}

#[test]
fn a_restart_gives_all_leases_up_once_a_quota_was_forgotten() {
    let before = Counters::new(SLOTS_PER_GROUP);
    for quota in 0..1000 {
        before.spend(DATABASE, quota, 3, FOR_EVER, STARTED_AT);
    }
    let (next, _) = before.restarted(SLOTS_PER_GROUP);
    assert_eq!(next.table.holder(), before.table.holder());
    assert!(before.spend(DATABASE + 1, 0, 3, FOR_EVER, STARTED_AT).is_some());
    let (next, restored) = before.restarted(SLOTS_PER_GROUP);
    assert_eq!(restored.lost_limits, [0; 4]);
    assert_ne!(next.table.holder(), before.table.holder());
    assert!(next.table.quotas(DATABASE).is_empty());
}

#[test]
fn unflushed_counters_make_room_for_quotas_of_their_own_and_of_another_database() {
    let counters = Counters::new(SLOTS_PER_GROUP);
    for key in 0..1000 {
        counters.count_of(owner(1, 1), DATABASE, key, accepted(STARTED_AT, None));
    }
    let lost = counters.overflowed();
    for database in [DATABASE, DATABASE + 1] {
        for quota in 0..4 {
            let uses = [0; 2].map(|_| counters.spend(database, quota, 1, FOR_EVER, STARTED_AT));
            assert_eq!(uses, [Some(true), Some(false)]);
        }
    }
    assert_eq!(counters.overflowed(), lost + 8, "one use each");
}

#[test]
fn a_clock_that_is_set_back_before_a_restart_does_not_bring_a_period_back() {
    let before = Counters::new(100);
    let end = STARTED_AT + MINUTE;
    assert_eq!(before.spend(DATABASE, 1, 1, end, STARTED_AT), Some(true));
    assert_eq!(before.spend(DATABASE, 2, 1, FOR_EVER, end), Some(true));
    let (head, records) = before.table.save(SHUTDOWN, STARTED_AT);
    let next = Counters::started(100, STARTED_AT);
    next.table.restore(&head, records);
    assert_eq!(next.table.latest(STARTED_AT), end);
}

#[test]
fn a_clock_that_goes_back_does_not_bring_a_period_back() {
    let counters = Counters::new(100);
    let end = STARTED_AT + MINUTE;
    assert_eq!(counters.spend(DATABASE, 1, 1, end, STARTED_AT), Some(true));
    // Its place goes to others once its period is over.
    for quota in 2..400 {
        counters.spend(DATABASE, quota, 1, FOR_EVER, end);
    }
    assert_eq!(counters.table.latest(STARTED_AT), end);
}

#[test]
fn a_quota_that_was_removed_is_forgotten() {
    let counters = Counters::new(100);
    counters.spend(DATABASE, 1, 1, FOR_EVER, STARTED_AT);
    counters.spend(DATABASE + 1, 2, 1, FOR_EVER, STARTED_AT);
    assert_eq!(counters.table.quotas(DATABASE), [1_u128.to_be_bytes()]);
    counters.table.forget_quota(DATABASE, &1_u128.to_be_bytes());
    assert!(counters.table.quotas(DATABASE).is_empty());
    assert_eq!(counters.table.quotas(DATABASE + 1).len(), 1);
}
