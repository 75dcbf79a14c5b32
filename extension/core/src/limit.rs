//! Rate limits: a number of uses per window, by the generic cell rate algorithm (ITU-T I.371, virtual scheduling).
//!
//! The state is one number: the theoretical arrival time, the moment at which the full allowance will be available
//! again. Each use moves it ahead by a `limit`-th of the window, and is refused if it would then be more than a window
//! ahead. So `limit` uses may come at once, then one each `limit`-th of the window, and any period of length `t` has at
//! most `limit + t * limit / window` of them.
//!
//! All numbers are integers. Time is counted in ticks of 1/4096 µs, and the step between two uses is rounded up to a
//! tick: the limit is never exceeded, a burst is exactly `limit`, and the window is as long as configured or longer by
//! up to `limit` ticks.

const TICKS: u64 = 1 << 12;
/// In microseconds: a day. A longer budget is a quota, which belongs in a table.
pub const LONGEST_WINDOW: i64 = 86_400_000_000;
/// In microseconds since 2000-01-01, in the year 2138: later times are treated as this one, so that nothing overflows.
pub const LAST: u64 = (1 << 52) - (1 << 47);

/// How long a process may take from reading the clock to charging.
const LATE: u64 = 10_000_000 * TICKS;

/// A number of uses per window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    limit: u64,
    /// Between two uses, in ticks.
    step: u64,
}

/// The answer to one use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Charge {
    pub admitted: bool,
    /// The number of further uses that would be admitted now.
    pub remaining: u32,
    /// The time until the next use is admitted, in microseconds; 0 if this one was admitted.
    pub retry_after: u64,
}

/// The theoretical arrival time, in ticks; 0 is an allowance that was never used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct State(pub u64);

impl State {
    /// Whether the full allowance is available at `now`, in microseconds since 2000-01-01, as if it had never been
    /// used.
    pub fn is_idle(self, now: i64) -> bool {
        self.0 <= ticks(now)
    }

    /// A state that is in use until a moment, in microseconds since 2000-01-01, at the latest 2138.
    pub fn until(end: i64) -> State {
        State(ticks(end))
    }

    /// That moment.
    pub fn end(self) -> i64 {
        (self.0 / TICKS).cast_signed()
    }
}

impl Limit {
    /// `window` in microseconds. `None` unless both are positive. A limit above one per microsecond is reduced to that,
    /// and a window longer than [`LONGEST_WINDOW`] to that.
    pub fn new(limit: i32, window: i64) -> Option<Limit> {
        let limit = u64::try_from(limit).ok().filter(|limit| *limit > 0)?;
        let window = u64::try_from(window.min(LONGEST_WINDOW)).ok().filter(|window| *window > 0)?;
        let limit = limit.min(window);
        Some(Limit { limit, step: (window * TICKS).div_ceil(limit) })
    }

    /// The number of uses that may come at once.
    pub fn limit(self) -> u32 {
        u32::try_from(self.limit).unwrap_or(u32::MAX)
    }

    /// Admits or refuses a use. `now` in microseconds since 2000-01-01.
    #[inline]
    pub fn charge(self, state: &mut State, now: i64) -> Charge {
        let (charged, full) = self.next(state, now);
        if charged <= full {
            state.0 = charged;
        }
        self.verdict(charged, full)
    }

    /// The answer that [`Limit::charge`] would give.
    pub fn peek(self, state: &mut State, now: i64) -> Charge {
        let (charged, full) = self.next(state, now);
        self.verdict(charged, full)
    }

    /// Refunds a charge.
    pub fn refund(self, state: &mut State) {
        state.0 = state.0.saturating_sub(self.step);
    }

    /// The arrival time after one more use, and the last one that is allowed.
    fn next(self, state: &mut State, now: i64) -> (u64, u64) {
        let now = ticks(now);
        let full = now + self.limit * self.step;
        // A state further ahead is from before the limit was changed or the clock set back: the allowance is spent, but
        // nothing beyond it. One that is a little ahead was charged by a process that read the clock later and came first.
        if state.0 > full + LATE {
            state.0 = full;
        }
        (state.0.max(now) + self.step, full)
    }

    fn verdict(self, charged: u64, full: u64) -> Charge {
        match full.checked_sub(charged) {
            Some(left) => Charge {
                admitted: true,
                remaining: u32::try_from(left / self.step).unwrap_or(u32::MAX),
                retry_after: 0,
            },
            None => Charge { admitted: false, remaining: 0, retry_after: (charged - full).div_ceil(TICKS) },
        }
    }
}

fn ticks(micros: i64) -> u64 {
    u64::try_from(micros).unwrap_or(0).min(LAST) * TICKS
}
