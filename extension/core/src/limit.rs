//! Rate limits: so many in so long a time, counted by the generic cell rate algorithm (ITU-T I.371, virtual scheduling).
//!
//! Of what is limited there is one number to remember: the theoretical arrival time, the moment at which the allowance
//! will be whole again. Each use moves it on by a `limit`-th of the window, and is refused if that took it further ahead
//! than the window is long. So `limit` uses may come at once, then one each `limit`-th of the window, and any stretch of
//! time of length `t` sees at most `limit + t * limit / window` of them.
//!
//! All numbers are integers. Time is counted in ticks of 1/4096 µs, and the step between two uses is rounded up to a
//! tick: never is more let through than the limit says, a burst is exactly `limit`, and the window is as long as was
//! said or longer by up to `limit` ticks.

const TICKS: u64 = 1 << 12;
/// In microseconds, a day. What has a longer one is a quota, which belongs in a table.
pub const LONGEST_WINDOW: i64 = 86_400_000_000;
/// In microseconds since 2000-01-01, in the year 2138: what is later is taken as this, so that nothing overflows.
const LAST: u64 = (1 << 52) - (1 << 47);

/// So many in so long a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    limit: u64,
    /// Between two uses, in ticks.
    step: u64,
}

/// What a limit says of a use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Charge {
    pub admitted: bool,
    /// How many more there may be at this moment.
    pub remaining: u32,
    /// How long until there may be one, in microseconds; 0 for what is admitted.
    pub retry_after: u64,
}

/// The theoretical arrival time, in ticks; 0 is an allowance that was never used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct State(pub u64);

impl State {
    /// Whether the whole allowance is there at `now`, in microseconds since 2000-01-01, as if it had never been used.
    pub fn is_idle(self, now: i64) -> bool {
        self.0 <= ticks(now)
    }
}

impl Limit {
    /// `window` in microseconds. `None` unless both are positive. More than one in a microsecond is taken as that, and
    /// a longer window than [`LONGEST_WINDOW`] as that.
    pub fn new(limit: i32, window: i64) -> Option<Limit> {
        let limit = u64::try_from(limit).ok().filter(|limit| *limit > 0)?;
        let window = u64::try_from(window.min(LONGEST_WINDOW)).ok().filter(|window| *window > 0)?;
        let limit = limit.min(window);
        Some(Limit { limit, step: (window * TICKS).div_ceil(limit) })
    }

    /// How many may come at once.
    pub fn limit(self) -> u32 {
        u32::try_from(self.limit).unwrap_or(u32::MAX)
    }

    /// Admits a use, or not. `now` in microseconds since 2000-01-01.
    #[inline]
    pub fn charge(self, state: &mut State, now: i64) -> Charge {
        let (charged, full) = self.next(state, now);
        if charged <= full {
            state.0 = charged;
        }
        self.verdict(charged, full)
    }

    /// What [`Limit::charge`] would say.
    pub fn look(self, state: &mut State, now: i64) -> Charge {
        let (charged, full) = self.next(state, now);
        self.verdict(charged, full)
    }

    /// Takes back a charge.
    pub fn refund(self, state: &mut State) {
        state.0 = state.0.saturating_sub(self.step);
    }

    /// The arrival time after one more use, and the last one that is allowed.
    fn next(self, state: &mut State, now: i64) -> (u64, u64) {
        let now = ticks(now);
        let full = now + self.limit * self.step;
        // What is further ahead is from before the limit was changed, or the clock set back: the allowance is spent, and no
        // more than that.
        state.0 = state.0.min(full);
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
