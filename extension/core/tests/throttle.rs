//! The throttle: the rate per second is never exceeded, whatever the pattern, and no refusal goes unreported.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use proptest::prelude::*;
use tollgate_core::throttle::Throttle;

const SECOND: i64 = 1_000_000;
const NOW: i64 = 800_000_000 * SECOND;

#[test]
fn a_seconds_worth_may_come_at_once_and_then_one_at_a_time() {
    let throttle = Throttle::default();
    let admitted = (0..100).filter(|_| throttle.admit(NOW, 10).is_some()).count();
    assert_eq!(admitted, 10);
    assert_eq!(throttle.admit(NOW + SECOND / 10 - 1, 10), None);
    assert_eq!(throttle.admit(NOW + SECOND / 10, 10), Some(91));
    assert_eq!(throttle.admit(NOW + SECOND / 10, 10), None);
    assert_eq!(throttle.admit(NOW + SECOND, 10), Some(1));
}

#[test]
fn once_a_minute_is_once_a_minute_with_none_saved_up() {
    const MINUTE: i64 = 60 * SECOND;
    let throttle = Throttle::default();
    assert_eq!(throttle.admit_once_in(NOW, MINUTE), Some(0));
    for later in [0, 1, SECOND, MINUTE - 1] {
        assert_eq!(throttle.admit_once_in(NOW + later, MINUTE), None);
    }
    assert_eq!(throttle.admit_once_in(NOW + 10 * MINUTE, MINUTE), Some(4));
    assert_eq!(throttle.admit_once_in(NOW + 10 * MINUTE + 1, MINUTE), None);
}

#[test]
fn a_clock_that_was_set_back_stops_nothing_for_long() {
    let throttle = Throttle::default();
    assert!(throttle.admit(NOW + 86_400 * SECOND, 10).is_some());
    assert!(throttle.admit(NOW, 10).is_some());
    for clock in [i64::MIN, i64::MAX, 0, -1] {
        let _ = throttle.admit(clock, 0);
    }
}

#[test]
fn threads_together_get_no_more_than_one_would() {
    let (throttle, admitted, reported) = (Throttle::default(), AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..1000 {
                    if let Some(refused) = throttle.admit(NOW, 100) {
                        admitted.fetch_add(1, Relaxed);
                        reported.fetch_add(refused, Relaxed);
                    }
                }
            });
        }
    });
    assert_eq!(admitted.load(Relaxed), 100);
    let refused = throttle.admit(NOW + SECOND, 100).expect("a second later");
    assert_eq!(reported.load(Relaxed) + refused, 3900, "each refusal is reported once");
}

proptest! {
    #[test]
    fn no_window_of_time_has_more_than_its_share(gaps in prop::collection::vec(0..200_000_i64, 1..300), rate in 1..200_u32) {
        let throttle = Throttle::default();
        let mut now = NOW;
        let mut admitted = Vec::new();
        for gap in gaps {
            now += gap;
            if throttle.admit(now, rate).is_some() {
                admitted.push(now);
            }
        }
        let interval = SECOND / i64::from(rate);
        for (first, start) in admitted.iter().enumerate() {
            for (last, end) in admitted.iter().enumerate().skip(first) {
                let share = (end - start + SECOND) / interval;
                prop_assert!(i64::try_from(last - first + 1).unwrap() <= share, "from {start} to {end}");
            }
        }
        // A caller that keeps to the rate is never refused.
        prop_assert!(throttle.admit(now + SECOND, rate).is_some());
    }
}
