//! What runs in the daemon without being asked: the tasks, the driver that runs them, who leads them, and how they stop.

pub mod backoff;
pub mod driver;
pub mod leader;
pub mod leaderless;
pub mod listener;
pub mod shutdown;
pub mod signal;
pub mod tasks;
