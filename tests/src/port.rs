//! TCP ports on the loopback address.
//!
//! A server that is restarted must get its port back, so a port stays leased, with a lock on a file, for as long as its
//! owner lives. Ports are taken from below the kernel's range for outgoing connections: one of those could otherwise
//! take the port while its server is down.

use std::fs::File;
use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;

use anyhow::{Context as _, Result, bail};

const FIRST: u16 = 20_000;
const LAST: u16 = 32_000;

#[derive(Debug)]
pub struct Port {
    pub number: u16,
    _lease: File,
}

impl Port {
    /// A free port, `preferred` if it is free.
    pub fn lease(preferred: u16) -> Result<Self> {
        let leases = crate::dev_dir::dev_dir()?.join("tmp/ports");
        std::fs::create_dir_all(&leases)?;
        let preferred = preferred.clamp(FIRST, LAST);
        for number in (preferred..=LAST).chain(FIRST..preferred) {
            if let Some(lease) = take(&leases, number)? {
                return Ok(Self { number, _lease: lease });
            }
        }
        bail!("no free TCP port between {FIRST} and {LAST} on {}", Ipv4Addr::LOCALHOST)
    }

    /// Any free port. The search begins at a number that depends on this process: leases bind only processes that share
    /// a `.dev`, and the tests of two checkouts that began at the same number would see the same ports free at the same
    /// moment.
    pub fn any() -> Result<Self> {
        let spread = std::process::id().wrapping_mul(97) % u32::from(LAST - FIRST);
        Self::lease(FIRST + spread as u16)
    }
}

fn take(leases: &Path, number: u16) -> Result<Option<File>> {
    let path = leases.join(number.to_string());
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .with_context(|| format!("cannot open {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(std::fs::TryLockError::WouldBlock) => return Ok(None),
        Err(std::fs::TryLockError::Error(error)) => return Err(error.into()),
    }
    let free = TcpListener::bind((Ipv4Addr::LOCALHOST, number)).is_ok();
    Ok(free.then_some(file))
}
