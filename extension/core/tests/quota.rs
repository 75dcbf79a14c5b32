//! Quotas: whatever order uses, leases, crashes and clocks come in, no period sees more uses than its quota allows.

use std::collections::BTreeMap;

use proptest::prelude::*;
use tollgate_core::quota::{Lease, State};

const PERIOD: i64 = 1000;

/// The tables, as `sql/schema/quotas/quotas.sql` keeps them.
#[derive(Debug)]
struct Tables {
    amount: u64,
    lease: u64,
    is_open: bool,
    ends_at: i64,
    taken: u64,
    /// The server that has a lease from the beginning of each period.
    holder: u32,
    /// By server: the end of its period, and what it was granted in that.
    leases: BTreeMap<u32, (i64, u64)>,
}

/// A server, whose memory a crash empties, which also gives it another name.
#[derive(Debug)]
struct Server {
    name: u32,
    is_primary: bool,
    memory: State,
}

fn end_of(now: i64) -> i64 {
    (now.div_euclid(PERIOD) + 1) * PERIOD
}

impl Tables {
    fn new(amount: u64, lease: u64, is_open: bool, holder: u32) -> Self {
        let leases = BTreeMap::new();
        Tables { amount, lease, is_open, ends_at: PERIOD, taken: lease, holder, leases }
    }

    /// The end of the present period, and what is taken in it.
    fn present(&self, now: i64) -> (i64, u64) {
        if now < self.ends_at { (self.ends_at, self.taken) } else { (end_of(now), self.lease) }
    }

    fn granted(&self, name: u32, is_primary: bool, ends_at: i64) -> u64 {
        match self.leases.get(&name) {
            Some((end, granted)) if *end == ends_at => *granted,
            _ if is_primary && name == self.holder => self.lease,
            _ => 0,
        }
    }

    fn lease_of(&self, server: &Server, now: i64) -> Lease {
        let (ends_at, taken) = self.present(now);
        let granted = self.granted(server.name, server.is_primary, ends_at);
        let beyond = if self.is_open { self.amount.saturating_sub(taken) } else { 0 };
        Lease { ends_at, granted, beyond }
    }

    /// `grant_lease`: what a server asks for, with the clock of the primary.
    fn grant(&mut self, name: u32, is_primary: bool, request: State, now: i64) {
        (self.ends_at, self.taken) = self.present(now);
        let had = self.granted(name, name == self.holder, self.ends_at);
        let rest = self.amount.saturating_sub(self.taken);
        let units = (request.spent.saturating_sub(request.granted) + self.lease).min(rest);
        if request.ends_at != self.ends_at || request.granted != had || units == 0 {
            return;
        }
        self.taken += units;
        if is_primary {
            self.holder = name;
        }
        self.leases.insert(name, (self.ends_at, had + units));
        self.leases.retain(|_, (end, _)| *end == self.ends_at);
    }
}

impl Server {
    /// The period in which a use was admitted.
    fn spend(&mut self, tables: &Tables, now: i64) -> Option<i64> {
        let spent = self.memory.spend(now).or_else(|| self.memory.spend_of(&tables.lease_of(self, now)))?;
        Some(spent.ends_at)
    }
}

#[derive(Clone, Debug)]
enum Step {
    Use(usize),
    /// The request reaches the primary; the same request may do so again.
    Lease(usize),
    Repeat,
    Crash(usize),
    Clock(i64),
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        12 => (0..2_usize).prop_map(Step::Use),
        6 => (0..2_usize).prop_map(Step::Lease),
        2 => Just(Step::Repeat),
        1 => (0..2_usize).prop_map(Step::Crash),
        1 => (-900..1500_i64).prop_map(Step::Clock),
    ]
}

/// Runs the steps, and returns how many uses were admitted in each period, and how much crashes have cost.
fn run(tables: &mut Tables, steps: &[Step]) -> (BTreeMap<i64, u64>, u64) {
    let mut servers = [0, 1].map(|name| Server { name, is_primary: name == 0, memory: State::default() });
    let (mut now, mut next, mut last, mut lost) = (0, 2, None, 0);
    let mut admitted = BTreeMap::new();
    for step in steps {
        match step {
            Step::Use(server) => {
                if let Some(ends_at) = servers[*server].spend(tables, now) {
                    *admitted.entry(ends_at).or_default() += 1;
                }
            }
            Step::Lease(server) => {
                let server = &servers[*server];
                let request = (server.name, server.is_primary, server.memory);
                tables.grant(request.0, request.1, request.2, now);
                last = Some(request);
            }
            Step::Repeat => {
                if let Some((name, _, request)) = last {
                    // What a daemon carries is never taken for the primary's own.
                    tables.grant(name, false, request, now);
                }
            }
            Step::Crash(server) => {
                let server = &mut servers[*server];
                let lease = tables.lease_of(server, now);
                lost += lease.granted.saturating_sub(server.memory.spent);
                (server.name, server.memory) = (next, State::default());
                next += 1;
            }
            Step::Clock(by) => now += by,
        }
    }
    (admitted, lost)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn a_closed_quota_is_never_exceeded(
        amount in 1..40_u64, lease in 1..12_u64, steps in proptest::collection::vec(any_step(), 0..200)
    ) {
        let mut tables = Tables::new(amount, lease.min(amount), false, 0);
        let (admitted, _) = run(&mut tables, &steps);
        prop_assert!(admitted.values().all(|uses| *uses <= amount), "{:?} of {}", admitted, amount);
    }

    #[test]
    fn an_open_quota_of_one_server_is_exact_whether_a_daemon_leases_or_not(
        amount in 1..40_u64, lease in 1..12_u64, leases in proptest::collection::vec(any::<bool>(), 100)
    ) {
        let mut tables = Tables::new(amount, lease.min(amount), true, 0);
        let steps: Vec<Step> = leases
            .into_iter()
            .flat_map(|leased| [Some(Step::Use(0)), leased.then_some(Step::Lease(0))])
            .flatten()
            .collect();
        let (admitted, _) = run(&mut tables, &steps);
        prop_assert_eq!(admitted, BTreeMap::from([(PERIOD, amount)]));
    }

    #[test]
    fn with_a_daemon_nothing_but_what_a_crash_costs_is_lost(
        amount in 1..40_u64, lease in 1..12_u64, crashes in proptest::collection::vec(0..100_usize, 0..4)
    ) {
        let mut tables = Tables::new(amount, lease.min(amount), false, 0);
        let steps: Vec<Step> = (0..100)
            .flat_map(|n| {
                let crash = crashes.contains(&n).then_some(Step::Crash(0));
                [crash, Some(Step::Use(0)), Some(Step::Lease(0))]
            })
            .flatten()
            .collect();
        let (admitted, lost) = run(&mut tables, &steps);
        let uses = admitted.get(&PERIOD).copied().unwrap_or_default();
        prop_assert!(uses + lost >= amount && uses <= amount, "{} used and {} lost of {}", uses, lost, amount);
    }
}

#[test]
fn more_is_wanted_when_half_of_a_lease_is_spent_and_again_before_it_is_over() {
    let mut state = State::default();
    let lease = Lease { ends_at: PERIOD, granted: 8, beyond: 0 };
    let wanted = |state: &mut State| state.spend_of(&lease).map(|spent| spent.more_wanted);
    let uses: Vec<Option<bool>> = (0..9).map(|_| wanted(&mut state)).collect();
    let [no, yes] = [Some(false), Some(true)];
    assert_eq!(uses, [no, no, no, yes, no, yes, yes, yes, None]);
}

#[test]
fn a_unit_is_returned_only_to_its_own_period() {
    let mut state = State::default();
    let lease = Lease { ends_at: PERIOD, granted: 2, beyond: 0 };
    let spent = state.spend_of(&lease).expect("two are left");
    state.refund(spent.ends_at);
    assert_eq!(state.spent, 0);
    let spent = state.spend_of(&lease).expect("two are left");
    state.spend_of(&Lease { ends_at: 2 * PERIOD, ..lease }).expect("the next period");
    state.refund(spent.ends_at);
    assert_eq!(state.spent, 1);
}

#[test]
fn what_the_tables_said_of_an_earlier_period_or_before_more_was_granted_changes_nothing() {
    let mut state = State::default();
    state.learn(&Lease { ends_at: 2 * PERIOD, granted: 8, beyond: 0 });
    let known = state;
    state.learn(&Lease { ends_at: PERIOD, granted: 99, beyond: 99 });
    state.learn(&Lease { ends_at: 2 * PERIOD, granted: 4, beyond: 0 });
    assert_eq!(state, known);
    state.give_up();
    assert_eq!(state.spend_of(&Lease { ends_at: PERIOD, granted: 99, beyond: 99 }), None);
}
