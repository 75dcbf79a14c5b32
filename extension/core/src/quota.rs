//! Quotas: what one server has spent of what it was granted.
//!
//! The tables say how much of a quota a server was granted in a period, in all: its lease. The server counts in memory
//! what it has spent, and never spends more than that, unless the quota is open. So however often servers and daemons
//! fail, what was spent is at most what the tables granted.
//!
//! A period is known by its end, and lasts until a clock has reached that. Time never goes back: once a later period
//! has begun, an earlier one is not returned to.

/// What the tables say now of this server's lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease {
    /// When its period ends, in microseconds since 2000-01-01.
    pub ends_at: i64,
    /// Units that this server was granted in the period, in all.
    pub granted: u64,
    /// Units that it may spend beyond that, because the quota is open; else 0.
    pub beyond: u64,
}

/// What is remembered of a quota. All zero: nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// When the period ends, in microseconds since 2000-01-01.
    pub ends_at: i64,
    pub spent: u64,
    pub granted: u64,
    /// Once so much is spent, more is wanted.
    pub wanted_at: u64,
}

/// A unit that was spent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spent {
    /// The end of its period, for [`State::refund`].
    pub ends_at: i64,
    /// Whether more should be leased before the rest is spent.
    pub more_wanted: bool,
}

impl State {
    /// Spends a unit of what is remembered. `None` if the period is over, or nothing is left: the tables may say more.
    #[inline]
    pub fn spend(&mut self, now: i64) -> Option<Spent> {
        (now < self.ends_at && self.spent < self.granted).then(|| self.take())
    }

    /// Spends a unit of what the tables say. `None` if nothing is left.
    pub fn spend_of(&mut self, lease: &Lease) -> Option<Spent> {
        self.learn(lease);
        // What was granted since the tables were read was part of what they said was beyond.
        let most = if lease.ends_at == self.ends_at { lease.granted.saturating_add(lease.beyond) } else { 0 };
        (self.spent < self.granted.max(most)).then(|| self.take())
    }

    /// Takes over what the tables say, unless it is older than what is remembered.
    pub fn learn(&mut self, lease: &Lease) {
        if lease.ends_at > self.ends_at {
            *self = State { ends_at: lease.ends_at, ..State::default() };
        }
        if lease.ends_at == self.ends_at && lease.granted > self.granted {
            self.granted = lease.granted;
            self.want_at_half();
        }
    }

    /// For a quota of which was forgotten how much was spent: all of it.
    pub fn give_up(&mut self) {
        self.spent = self.spent.max(self.granted);
    }

    /// Returns a unit, unless its period is over.
    pub fn refund(&mut self, ends_at: i64) {
        if self.ends_at == ends_at {
            self.spent = self.spent.saturating_sub(1);
        }
    }

    fn take(&mut self) -> Spent {
        self.spent += 1;
        let more_wanted = self.spent >= self.wanted_at;
        if more_wanted {
            // Again some time later, in case this is lost.
            self.want_at_half();
        }
        Spent { ends_at: self.ends_at, more_wanted }
    }

    /// When half of what is left will be spent.
    fn want_at_half(&mut self) {
        let left = self.granted.saturating_sub(self.spent);
        self.wanted_at = self.spent + left.div_ceil(2).max(1);
    }
}
