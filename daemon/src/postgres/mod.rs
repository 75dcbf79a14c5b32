//! How the server is reached: connection strings, hosts in turn, TLS, a pool of sessions.

pub mod conninfo;
pub mod pool;
pub mod pooler_probe;
pub mod session;
pub mod target;
pub mod tls;
