//! How everything is measured: in turns that alternate within one run, because a machine's speed drifts, and as ratios
//! of adjacent turns.

use std::io::{IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

use anyhow::Result;
use hdrhistogram::Histogram;

/// The measurements of one thing, one per round.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Series(pub(crate) Vec<f64>);

impl Series {
    /// The ratios round by round: a temporary slowdown of the machine affects both.
    pub(crate) fn over(&self, other: &Self) -> Self {
        self.with(other, |ours, theirs| ours / theirs)
    }

    pub(crate) fn minus(&self, other: &Self) -> Self {
        self.with(other, |ours, theirs| ours - theirs)
    }

    pub(crate) fn with(&self, other: &Self, combine: impl Fn(f64, f64) -> f64) -> Self {
        Self(self.0.iter().zip(&other.0).map(|(ours, theirs)| combine(*ours, *theirs)).collect())
    }

    pub(crate) fn times(&self, factor: f64) -> Self {
        Self(self.0.iter().map(|value| value * factor).collect())
    }

    pub(crate) fn median(&self) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        match sorted.len() {
            0 => f64::NAN,
            odd if odd % 2 == 1 => sorted[middle],
            _ => f64::midpoint(sorted[middle - 1], sorted[middle]),
        }
    }

    pub(crate) fn min(&self) -> f64 {
        self.0.iter().copied().fold(f64::NAN, f64::min)
    }

    pub(crate) fn max(&self) -> f64 {
        self.0.iter().copied().fold(f64::NAN, f64::max)
    }
}

impl FromIterator<f64> for Series {
    fn from_iter<T: IntoIterator<Item = f64>>(values: T) -> Self {
        Self(values.into_iter().collect())
    }
}

/// Takes each of the `turns` once per round, and returns the measurements by turn. The first round warms caches up and
/// is not counted. Every second round runs backwards, so that a machine that slows down or speeds up favours nothing.
pub(crate) fn alternate<T>(
    what: &str,
    rounds: u32,
    turns: usize,
    mut take: impl FnMut(usize) -> Result<T>,
) -> Result<Vec<Vec<T>>> {
    let mut measured: Vec<Vec<T>> = (0..turns).map(|_| Vec::new()).collect();
    let mut progress = Progress::new(what, (rounds as usize + 1) * turns);
    for round in 0..=rounds {
        for position in 0..turns {
            let turn = if round % 2 == 0 { position } else { turns - 1 - position };
            let value = take(turn)?;
            if round > 0 {
                measured[turn].push(value);
            }
            progress.step();
        }
    }
    Ok(measured)
}

/// [`alternate`], for turns that each measure a number.
pub(crate) fn alternate_numbers(
    what: &str,
    rounds: u32,
    turns: usize,
    take: impl FnMut(usize) -> Result<f64>,
) -> Result<Vec<Series>> {
    Ok(alternate(what, rounds, turns, take)?.into_iter().map(Series).collect())
}

/// Measures how long `work` takes.
pub(crate) fn timed<T>(work: impl FnOnce() -> Result<T>) -> Result<(T, Duration)> {
    let begin = Instant::now();
    let value = work()?;
    Ok((value, begin.elapsed()))
}

/// A histogram of nanoseconds, with three digits.
pub(crate) fn histogram() -> Histogram<u64> {
    Histogram::new(3).expect("three digits are allowed")
}

/// A percentile in microseconds of a histogram of nanoseconds.
pub(crate) fn percentile(times: &Histogram<u64>, quantile: f64) -> f64 {
    times.value_at_quantile(quantile) as f64 / 1000.0
}

/// A progress line on a terminal.
pub(crate) struct Progress {
    what: String,
    done: usize,
    all: usize,
}

impl Progress {
    pub(crate) fn new(what: &str, all: usize) -> Self {
        Self { what: what.to_owned(), done: 0, all }
    }

    pub(crate) fn step(&mut self) {
        self.done += 1;
        let mut terminal = std::io::stderr();
        if terminal.is_terminal() {
            let end = if self.done == self.all { "\r\x1b[K" } else { "" };
            // Failing to print it is harmless.
            let _ = write!(terminal, "\r  {}: {} of {}{end}", self.what, self.done, self.all);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_is_the_middle_one_or_between_the_two() {
        assert_eq!(Series(vec![3.0, 1.0, 2.0]).median(), 2.0);
        assert_eq!(Series(vec![4.0, 1.0, 2.0, 3.0]).median(), 2.5);
        assert!(Series::default().median().is_nan());
    }

    #[test]
    fn a_ratio_is_taken_round_by_round() {
        let slow_machine_in_the_second_round = (Series(vec![10.0, 5.0]), Series(vec![20.0, 10.0]));
        let ratio = slow_machine_in_the_second_round.0.over(&slow_machine_in_the_second_round.1);
        assert_eq!((ratio.min(), ratio.max()), (0.5, 0.5));
    }

    #[test]
    fn turns_alternate_and_the_first_round_does_not_count() {
        let mut order = Vec::new();
        let measured = alternate("a test", 2, 2, |turn| {
            order.push(turn);
            Ok(order.len())
        })
        .expect("turns that succeed");
        assert_eq!(order, [0, 1, 1, 0, 0, 1]);
        assert_eq!(measured, [vec![4, 5], vec![3, 6]]);
    }
}
