//! The open connections, and which of them is closed when there is no room for one more.
//!
//! A connection may be held while the daemon does something for it that is bounded elsewhere: an event stream, or the
//! verification of a token. All others are idle: they wait for a request, send one slowly, or read an answer slowly.
//! Every new connection is accepted, and the connection that has been idle for the longest is closed for it. So idle
//! connections, however many, never keep a client from its response.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::rules::Rules;

/// The sender of a request; an extension of each.
#[derive(Clone, Debug)]
pub(super) struct Client {
    pub(super) connection: Arc<Connection>,
    pub(super) peer: SocketAddr,
    /// Whether the listener is on a loopback address.
    pub(super) is_loopback: bool,
    pub(super) rules: Arc<Rules>,
}

#[derive(Debug)]
pub(super) struct Connections {
    most: usize,
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    last: u64,
    open: HashMap<u64, Entry>,
}

#[derive(Debug)]
struct Entry {
    /// When it was opened, or began its last request.
    since: Instant,
    /// Breaks ties, since several may come at the same moment.
    turn: u64,
    holds: usize,
    close: CancellationToken,
}

impl Connections {
    pub(super) fn new(most: usize) -> Arc<Self> {
        Arc::new(Self { most, table: Mutex::default() })
    }

    /// Takes in one more connection.
    pub(super) fn open(self: &Arc<Self>) -> Connection {
        let mut table = self.table();
        if table.open.len() >= self.most {
            table.close_one();
        }
        let id = table.next();
        let close = CancellationToken::new();
        table.open.insert(id, Entry { since: Instant::now(), turn: id, holds: 0, close: close.clone() });
        drop(table);
        Connection { all: self.clone(), id, close }
    }

    /// Closes the connection that has been idle for the longest.
    pub(super) fn close_one(&self) {
        self.table().close_one();
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn next(&mut self) -> u64 {
        self.last += 1;
        self.last
    }

    fn close_one(&mut self) {
        let idle = self.open.iter().filter(|(_, entry)| entry.holds == 0);
        let oldest = idle.min_by_key(|(_, entry)| (entry.since, entry.turn)).map(|(id, _)| *id);
        if let Some(entry) = oldest.and_then(|id| self.open.remove(&id)) {
            entry.close.cancel();
        }
    }
}

/// One of them, until it is dropped.
#[derive(Debug)]
pub(super) struct Connection {
    all: Arc<Connections>,
    id: u64,
    close: CancellationToken,
}

impl Connection {
    /// Resolves when it has to make room.
    pub(super) async fn closed(&self) {
        self.close.cancelled().await;
    }

    /// A request has arrived.
    pub(super) fn touch(&self) {
        let mut table = self.all.table();
        let turn = table.next();
        if let Some(entry) = table.open.get_mut(&self.id) {
            (entry.since, entry.turn) = (Instant::now(), turn);
        }
    }

    /// Keeps it open until the guard is dropped.
    pub(super) fn hold(&self) -> Held {
        if let Some(entry) = self.all.table().open.get_mut(&self.id) {
            entry.holds += 1;
        }
        Held { all: self.all.clone(), id: self.id }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.all.table().open.remove(&self.id);
    }
}

/// See [`Connection::hold`].
#[derive(Debug)]
pub(super) struct Held {
    all: Arc<Connections>,
    id: u64,
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(entry) = self.all.table().open.get_mut(&self.id) {
            entry.holds = entry.holds.saturating_sub(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn closed(connections: &[&Connection]) -> Vec<bool> {
        connections.iter().map(|connection| connection.close.is_cancelled()).collect()
    }

    #[test]
    fn the_one_that_has_been_idle_for_the_longest_makes_room() {
        let all = Connections::new(3);
        let (one, two, three) = (all.open(), all.open(), all.open());
        one.touch();
        let _four = all.open();
        assert_eq!(closed(&[&one, &two, &three]), [false, true, false]);
        drop(three);
        let _five = all.open();
        assert!(!one.close.is_cancelled(), "there was room");
        assert_eq!(all.table().open.len(), 3);
    }

    #[test]
    fn one_that_is_held_stays_open_until_it_is_let_go() {
        let all = Connections::new(2);
        let (one, two) = (all.open(), all.open());
        let (first, second) = (one.hold(), one.hold());
        let three = all.open();
        assert_eq!(closed(&[&one, &two, &three]), [false, true, false]);
        drop(first);
        let four = all.open();
        assert_eq!(closed(&[&one, &three, &four]), [false, true, false]);
        drop(second);
        let _five = all.open();
        assert_eq!(closed(&[&one, &four]), [true, false]);
    }
}
