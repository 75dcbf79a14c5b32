//! A connection that runs prepared statements repeatedly, as cheaply as a client can.
//!
//! The client shares the machine with the server that it measures, so a driver's own work would be counted as the
//! server's. For an execution it sends what libpq's `PQsendQueryPrepared`, and so `pgbench -M prepared`, sends: Bind,
//! Describe, Execute and Sync, with parameters and results as text. (pgbench itself cannot bind a random text without
//! querying the server for it.)

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use bytes::{BufMut as _, BytesMut};
use postgres_protocol::IsNull;
use postgres_protocol::message::backend::{DataRowBody, ErrorFields, Message};
use postgres_protocol::message::frontend;
use tokio_postgres::fallible_iterator::FallibleIterator as _;

const TEXT: i16 = 0;

pub(crate) struct Connection {
    stream: UnixStream,
    sent: BytesMut,
    received: BytesMut,
    backend: i32,
}

impl Connection {
    /// Connects without a password, and prepares each of these under its number.
    pub(crate) fn prepare(socket: &Path, role: &str, database: &str, statements: &[&str]) -> Result<Self> {
        let stream =
            UnixStream::connect(socket).with_context(|| format!("cannot connect to {}", socket.display()))?;
        let mut connection = Self { stream, sent: BytesMut::new(), received: BytesMut::new(), backend: 0 };
        frontend::startup_message([("user", role), ("database", database)], &mut connection.sent)?;
        let mut backend = 0;
        connection.exchange(&mut |message| {
            if let Message::BackendKeyData(key) = message {
                backend = key.process_id();
            }
            Ok(())
        })?;
        connection.backend = backend;
        for (number, sql) in statements.iter().enumerate() {
            frontend::parse(&number.to_string(), sql, [], &mut connection.sent)?;
        }
        frontend::sync(&mut connection.sent);
        connection.exchange(&mut |_| Ok(()))?;
        Ok(connection)
    }

    /// Nanoseconds of processor time that the backend has used so far, where the system reports it (Linux).
    pub(crate) fn backend_cpu(&self) -> Option<u64> {
        let times = std::fs::read_to_string(format!("/proc/{}/schedstat", self.backend)).ok()?;
        times.split_whitespace().next()?.parse().ok()
    }

    /// Pins the calling thread and the backend to one processor, where the system and our privileges allow it (Linux).
    /// Otherwise the scheduler moves them together and apart, which affects a round trip more than any statement does.
    pub(crate) fn share_processor(&self, number: usize) {
        #[cfg(target_os = "linux")]
        {
            use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
            use nix::unistd::Pid;
            let this_thread = Pid::from_raw(0);
            let Ok(all) = sched_getaffinity(this_thread) else { return };
            let ours: Vec<usize> = (0..CpuSet::count()).filter(|&one| all.is_set(one) == Ok(true)).collect();
            let mut one = CpuSet::new();
            let pinned = one
                .set(ours[number % ours.len()])
                .and_then(|()| sched_setaffinity(Pid::from_raw(self.backend), &one))
                .and_then(|()| sched_setaffinity(this_thread, &one));
            // Without pinning the figures are less steady, not wrong.
            let _ = pinned;
        }
    }

    /// Lets the backend run wherever the calling thread may, after [`Connection::share_processor`].
    pub(crate) fn leave_to_scheduler(&self) {
        #[cfg(target_os = "linux")]
        {
            use nix::sched::{sched_getaffinity, sched_setaffinity};
            use nix::unistd::Pid;
            let all = sched_getaffinity(Pid::from_raw(0));
            let _ = all.and_then(|all| sched_setaffinity(Pid::from_raw(self.backend), &all));
        }
    }

    /// Runs a prepared statement, which must return one row that begins with `expected`.
    pub(crate) fn execute(&mut self, statement: &str, parameters: &[&str], expected: &[u8]) -> Result<()> {
        self.run(statement, parameters, &mut |row| {
            let value = column(row, 0)?.context("the row's first column is NULL")?;
            ensure!(value == expected, "a row began with {:?}", String::from_utf8_lossy(value));
            Ok(())
        })
    }

    /// Runs a prepared statement, which must return one row, and returns some of its columns. NULL is empty.
    pub(crate) fn columns<const N: usize>(
        &mut self,
        statement: &str,
        parameters: &[&str],
        columns: [usize; N],
    ) -> Result<[String; N]> {
        let mut values = [const { String::new() }; N];
        self.run(statement, parameters, &mut |row| {
            for (value, number) in values.iter_mut().zip(columns) {
                *value = String::from_utf8(column(row, number)?.unwrap_or_default().to_vec())?;
            }
            Ok(())
        })?;
        Ok(values)
    }

    fn run(
        &mut self,
        statement: &str,
        parameters: &[&str],
        take: &mut dyn FnMut(&DataRowBody) -> Result<()>,
    ) -> Result<()> {
        let bound = frontend::bind(
            "",
            statement,
            [TEXT],
            parameters,
            |value, buffer| {
                buffer.put_slice(value.as_bytes());
                Ok(IsNull::No)
            },
            [TEXT],
            &mut self.sent,
        );
        if bound.is_err() {
            bail!("the parameters cannot be bound");
        }
        frontend::describe(b'P', "", &mut self.sent)?;
        frontend::execute("", 0, &mut self.sent)?;
        frontend::sync(&mut self.sent);
        let mut rows = 0;
        self.exchange(&mut |message| {
            if let Message::DataRow(row) = message {
                take(row)?;
                rows += 1;
            }
            Ok(())
        })?;
        ensure!(rows == 1, "{rows} rows where one was expected");
        Ok(())
    }

    /// Runs SQL without parameters, possibly several statements. Returns the first column of the last row.
    pub(crate) fn simple(&mut self, sql: &str) -> Result<Option<String>> {
        let mut last = None;
        self.query(sql, &mut |value| last = value)?;
        Ok(last)
    }

    /// The same, of all rows.
    pub(crate) fn all(&mut self, sql: &str) -> Result<Vec<String>> {
        let mut values = Vec::new();
        self.query(sql, &mut |value| values.extend(value))?;
        Ok(values)
    }

    fn query(&mut self, sql: &str, take: &mut dyn FnMut(Option<String>)) -> Result<()> {
        frontend::query(sql, &mut self.sent)?;
        self.exchange(&mut |message| {
            if let Message::DataRow(row) = message {
                take(column(row, 0)?.map(|bytes| String::from_utf8_lossy(bytes).into_owned()));
            }
            Ok(())
        })
        .with_context(|| format!("in: {sql}"))
    }

    /// Sends what was written, and reads everything up to the next ReadyForQuery.
    fn exchange(&mut self, take: &mut dyn FnMut(&Message) -> Result<()>) -> Result<()> {
        self.stream.write_all(&self.sent)?;
        self.sent.clear();
        loop {
            while let Some(message) = Message::parse(&mut self.received)? {
                match message {
                    Message::ReadyForQuery(_) => return Ok(()),
                    Message::ErrorResponse(body) => bail!("{}", message_of(&mut body.fields())?),
                    other => take(&other)?,
                }
            }
            let mut chunk = [0; 8192];
            let length = self.stream.read(&mut chunk)?;
            ensure!(length > 0, "the server closed the connection");
            self.received.extend_from_slice(&chunk[..length]);
        }
    }
}

fn column(row: &DataRowBody, number: usize) -> Result<Option<&[u8]>> {
    let range = row.ranges().nth(number)?.with_context(|| format!("the row has no column {number}"))?;
    Ok(range.map(|range| &row.buffer()[range]))
}

fn message_of(fields: &mut ErrorFields<'_>) -> Result<String> {
    while let Some(field) = fields.next()? {
        if field.type_() == b'M' {
            return Ok(String::from_utf8_lossy(field.value_bytes()).into_owned());
        }
    }
    Ok("an error without a message".into())
}
