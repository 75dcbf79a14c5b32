//! The histogram of latencies: buckets, sums, assignment to databases, and which verifications are measured.

use std::thread;
use tollgate_core::latency::{BOUNDS, BUCKETS, Countdown, Latencies, MAX_DATABASES, Measured, ONE_IN};

fn is_never_gone(_: u32) -> bool {
    false
}

#[test]
fn a_duration_counts_in_the_bucket_whose_bound_it_does_not_exceed() {
    assert!(BOUNDS.is_sorted());
    let latencies = Latencies::default();
    let histogram = latencies.claim(1, is_never_gone).unwrap();
    let mut expected = Measured::default();
    for (bucket, bound) in BOUNDS.into_iter().enumerate() {
        histogram.record(bound);
        histogram.record(bound + 1);
        expected.counts[bucket] += 1;
        expected.counts[bucket + 1] += 1;
        expected.nanoseconds += 2 * bound + 1;
    }
    histogram.record(0);
    expected.counts[0] += 1;
    assert_eq!(latencies.of(1), Some(expected));
    assert_eq!(latencies.of(2), Some(Measured::default()));
}

#[test]
fn nothing_is_lost_when_many_record_at_once() {
    let latencies = Latencies::default();
    thread::scope(|scope| {
        for n in 0..8 {
            let latencies = &latencies;
            scope.spawn(move || {
                let histogram = latencies.claim(1 + n % 2, is_never_gone).unwrap();
                (0..10_000).for_each(|_| histogram.record(3_000));
            });
        }
    });
    for database in [1, 2] {
        let measured = latencies.of(database).unwrap();
        assert_eq!((measured.counts[2], measured.nanoseconds), (40_000, 120_000_000));
        assert_eq!(measured.counts.iter().sum::<u64>(), 40_000);
    }
}

#[test]
fn a_database_keeps_its_histogram_until_it_is_gone_and_another_needs_it() {
    let latencies = Latencies::default();
    for database in 1..=MAX_DATABASES as u32 {
        latencies.claim(database, is_never_gone).unwrap().record(1);
    }
    let one_more = MAX_DATABASES as u32 + 1;
    assert!(latencies.claim(one_more, is_never_gone).is_none());
    assert_eq!(latencies.of(one_more), None);
    latencies.claim(7, is_never_gone).unwrap().record(1);
    assert_eq!(latencies.of(7).unwrap().counts[0], 2);
    let successor = latencies.claim(one_more, |database| database == 7).unwrap();
    assert_eq!(latencies.of(one_more), Some(Measured::default()));
    assert_eq!(latencies.of(7), None);
    successor.record(u64::MAX);
    assert_eq!(latencies.of(one_more).unwrap().counts[BUCKETS - 1], 1);
}

#[test]
fn one_of_so_many_is_measured_beginning_anywhere() {
    for seed in 0..2 * ONE_IN {
        let countdown = Countdown::new();
        let due: Vec<u32> = (0..3 * ONE_IN).filter(|_| countdown.is_due(|| seed)).collect();
        let first = seed % ONE_IN;
        assert_eq!(due, [first, first + ONE_IN, first + 2 * ONE_IN]);
    }
}
