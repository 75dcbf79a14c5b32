//! Rate limits, compared with a model that remembers every use and calculates with fractions.

use std::collections::VecDeque;

use proptest::prelude::*;
use tollgate_core::limit::{Charge, Limit, State};

const SECOND: i64 = 1_000_000;
const MINUTE: i64 = 60 * SECOND;
const DAY: i64 = 86_400 * SECOND;
const NOW: i64 = 848_000_000 * SECOND;

fn limit(limit: i32, window: i64) -> Limit {
    Limit::new(limit, window).expect("positive")
}

/// How many of `uses` at one moment are admitted.
fn burst(limit: Limit, state: &mut State, now: i64, uses: u32) -> u32 {
    (0..uses).map(|_| u32::from(limit.charge(state, now).admitted)).sum()
}

/// The generic cell rate algorithm in exact fractions: all times are multiplied by the limit, so that the step is the
/// window. The window is the one that the limit really has, rounded up so that its ticks can be divided by the limit.
struct Model {
    limit: i128,
    window: i128,
    arrival: i128,
}

const TICKS: i128 = 4096;

impl Model {
    fn new(limit: i32, window: i64) -> Model {
        let limit = i128::from(limit);
        let ticks = i128::from(window) * TICKS;
        Model { limit, window: (ticks + limit - 1) / limit * limit, arrival: 0 }
    }

    fn charge(&mut self, now: i64) -> Charge {
        let now = i128::from(now) * TICKS * self.limit;
        let charged = self.arrival.max(now) + self.window;
        let over = charged - now - self.window * self.limit;
        if over > 0 {
            let unit = TICKS * self.limit;
            return Charge { admitted: false, remaining: 0, retry_after: ((over + unit - 1) / unit) as u64 };
        }
        self.arrival = charged;
        Charge { admitted: true, remaining: (-over / self.window) as u32, retry_after: 0 }
    }
}

#[test]
fn the_whole_limit_may_come_at_once_and_then_a_share_of_the_window_apart() {
    let (limit, mut state) = (limit(10, MINUTE), State::default());
    for left in (0..10).rev() {
        assert_eq!(limit.charge(&mut state, NOW), Charge { admitted: true, remaining: left, retry_after: 0 });
    }
    let refused = Charge { admitted: false, remaining: 0, retry_after: 6_000_000 };
    assert_eq!(limit.charge(&mut state, NOW), refused);
    assert_eq!(limit.charge(&mut state, NOW), refused, "a refused use is not charged");
    assert!(!limit.charge(&mut state, NOW + 6 * SECOND - 1).admitted);
    assert!(limit.charge(&mut state, NOW + 6 * SECOND).admitted);
    assert!(!limit.charge(&mut state, NOW + 6 * SECOND).admitted);
    assert_eq!(burst(limit, &mut state, NOW + 3 * MINUTE, 100), 10);
}

#[test]
fn one_in_a_window_is_one_in_a_window() {
    let (limit, mut state) = (limit(1, MINUTE), State::default());
    assert!(limit.charge(&mut state, NOW).admitted);
    assert_eq!(limit.charge(&mut state, NOW + 1).retry_after, 59_999_999);
    assert!(!limit.charge(&mut state, NOW + MINUTE - 1).admitted);
    assert!(limit.charge(&mut state, NOW + MINUTE).admitted);
}

#[test]
fn a_look_says_what_a_charge_would_and_charges_nothing() {
    let (limit, mut state) = (limit(2, MINUTE), State::default());
    for _ in 0..4 {
        let peeked = limit.peek(&mut state, NOW);
        assert_eq!(peeked, limit.peek(&mut state, NOW));
        assert_eq!(peeked, limit.charge(&mut state, NOW));
    }
}

#[test]
fn a_refund_gives_back_one_use() {
    let (limit, mut state) = (limit(3, MINUTE), State::default());
    assert_eq!(burst(limit, &mut state, NOW, 10), 3);
    limit.refund(&mut state);
    assert_eq!(burst(limit, &mut state, NOW, 10), 1);
    let mut unused = State::default();
    limit.refund(&mut unused);
    assert_eq!(burst(limit, &mut unused, NOW, 10), 3, "a refund never exceeds the full allowance");
}

#[test]
fn a_limiter_is_idle_once_its_allowance_is_whole_again() {
    let (limit, mut state) = (limit(10, MINUTE), State::default());
    assert!(state.is_idle(NOW));
    limit.charge(&mut state, NOW);
    assert!(!state.is_idle(NOW + 6 * SECOND - 1));
    assert!(state.is_idle(NOW + 6 * SECOND));
}

#[test]
fn a_changed_limit_holds_at_once_and_locks_out_for_no_longer_than_its_own_window() {
    let mut state = State::default();
    assert_eq!(burst(limit(5, DAY), &mut state, NOW, 10), 5);
    let shorter = limit(60, MINUTE);
    assert_eq!(shorter.charge(&mut state, NOW).retry_after, 1_000_000);
    assert_eq!(burst(shorter, &mut state, NOW + SECOND, 10), 1);
}

#[test]
fn a_clock_that_was_set_back_locks_out_for_no_longer_than_the_window() {
    let (limit, mut state) = (limit(10, MINUTE), State::default());
    assert_eq!(burst(limit, &mut state, NOW + DAY, 20), 10);
    assert_eq!(limit.charge(&mut state, NOW).retry_after, 6_000_000);
}

#[test]
fn a_limit_and_a_window_are_positive() {
    for (count, window) in [(0, MINUTE), (-1, MINUTE), (i32::MIN, MINUTE), (1, 0), (1, -1), (1, i64::MIN)] {
        assert_eq!(Limit::new(count, window), None);
    }
    assert_eq!(limit(i32::MAX, 5).limit(), 5, "no more than one a microsecond");
}

proptest! {
    #[test]
    fn it_agrees_with_the_model(
        count in prop_oneof![1..100_i32, 1..1_000_000_i32],
        window in prop_oneof![SECOND..DAY / 20, Just(MINUTE), Just(SECOND)],
        // In fractions of the window: bursts, steady use, pauses.
        gaps in prop::collection::vec(prop_oneof![Just(0.0), 0.0..0.001, 0.0..0.1, 0.0..2.0_f64], 1..400),
    ) {
        let (limit, mut state, mut model) = (limit(count, window), State::default(), Model::new(count, window));
        let mut now = NOW;
        for gap in gaps {
            now += (gap * window as f64 * if gap < 0.1 { 100.0 / f64::from(count) } else { 1.0 }) as i64;
            prop_assert_eq!(limit.charge(&mut state, now), model.charge(now));
        }
    }

    #[test]
    fn no_stretch_of_time_sees_more_than_the_limit_and_its_share(
        count in 1..50_i32,
        window in 1_000..MINUTE,
        gaps in prop::collection::vec(0..2_000_000_i64, 1..400),
    ) {
        let (limit, mut state) = (limit(count, window), State::default());
        let mut admitted = VecDeque::new();
        let mut now = NOW;
        for gap in gaps {
            now += gap % window;
            if limit.charge(&mut state, now).admitted {
                admitted.push_back(now);
            }
        }
        for (first, start) in admitted.iter().enumerate() {
            for (last, end) in admitted.iter().enumerate().skip(first) {
                let share = i128::from(end - start) * i128::from(count) / i128::from(window);
                prop_assert!((last - first + 1) as i128 <= i128::from(count) + share);
            }
        }
    }

    /// Several processes read the clock, and charge in another order.
    #[test]
    fn what_comes_late_gives_nothing_back(
        count in 1..50_i32,
        window in 1_000..MINUTE,
        uses in prop::collection::vec((0..20_000_i64, 0..5 * SECOND), 1..400),
    ) {
        let (limit, mut state) = (limit(count, window), State::default());
        let (mut now, mut admitted) = (NOW, 0);
        for (gap, late) in uses {
            now += gap;
            admitted += i128::from(limit.charge(&mut state, now - late).admitted);
        }
        let share = i128::from(now - (NOW - 5 * SECOND)) * i128::from(count) / i128::from(window);
        prop_assert!(admitted <= i128::from(count) + share, "{} of {}", admitted, share);
    }

    #[test]
    fn a_use_after_retry_after_is_admitted_and_none_sooner(
        count in 1..1000_i32,
        window in 1_000..DAY,
        later in 0..DAY,
    ) {
        let (limit, mut state) = (limit(count, window), State::default());
        burst(limit, &mut state, NOW, count as u32);
        let at = NOW + later % (window / i64::from(count)).max(1);
        let refused = limit.peek(&mut state, at);
        prop_assume!(!refused.admitted);
        let wait = refused.retry_after as i64;
        prop_assert!(wait > 0);
        prop_assert!(!limit.peek(&mut state, at + wait - 1).admitted);
        prop_assert!(limit.peek(&mut state, at + wait).admitted);
    }

    #[test]
    fn nothing_overflows(state: u64, now: i64, count in 1..i32::MAX, window in 1..i64::MAX) {
        let (limit, mut state) = (limit(count, window), State(state));
        let charge = limit.charge(&mut state, now);
        prop_assert!(charge.admitted || charge.retry_after > 0);
        prop_assert!(charge.remaining < limit.limit());
        prop_assert!(limit.peek(&mut state, i64::MAX).retry_after <= 1 << 45);
        limit.refund(&mut state);
    }
}
