//! What runs in the background: the tasks, the driver that runs them, their leadership, and the shutdown.

pub mod backoff;
pub mod driver;
pub mod leader;
pub mod leaderless;
pub mod listener;
pub mod shutdown;
pub mod signal;
pub mod tasks;
