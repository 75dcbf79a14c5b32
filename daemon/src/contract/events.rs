//! The event log, read batch by batch.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use tokio_postgres::GenericClient;
use uuid::Uuid;

use super::query::one;
use crate::error::{Doing as _, Error, Result};

/// The channel on which the extension notifies that access was taken away.
pub const CHANNEL: &str = "tollgate_events";

/// A place in the event log, as the server writes it. What is in it is the server's business; we keep it and hand it back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cursor(pub String);

impl Cursor {
    /// The place after an event of the page that was read from here: its last field is the next id.
    pub fn after(&self, id: i64) -> Self {
        let fields = self.0.rsplit_once(',').map_or("", |(fields, _)| fields);
        Self(format!("{fields},{})", id.saturating_add(1)))
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Event {
    pub id: i64,
    /// Together with the id it names an event for good: a promoted standby may give out ids again.
    #[serde(default)]
    pub epoch: Option<i64>,
    #[serde(default)]
    pub at: Option<String>,
    #[serde(default)]
    pub event: Option<String>,
    #[serde(default)]
    pub token_id: Option<String>,
    #[serde(default)]
    pub user_id: Option<String>,
    #[serde(default)]
    pub actor: Option<String>,
    #[serde(default)]
    pub client_addr: Option<String>,
    /// Text, as far as the extension is concerned; but whatever is in the log must come out of it.
    #[serde(default)]
    pub reason: Box<RawValue>,
    #[serde(default)]
    pub detail: Box<RawValue>,
}

/// Events after a cursor, in commit order, and the cursor after them: some 4 MB at most.
#[derive(Clone, Debug)]
pub struct Batch {
    pub events: Vec<Event>,
    /// The place before the events, in the batch that they are of: see [`Cursor::after`].
    pub start: Cursor,
    pub next: Cursor,
    /// There were no more of them.
    pub caught_up: bool,
    /// That reading ended at `next`.
    pub proof: Vec<u8>,
}

/// The cursor from now on (`None`), from the first event that the log has (0), after the event with that id, or at the last events of
/// so many (-10).
pub async fn event_position(client: &impl GenericClient, since: Option<i64>) -> Result<Cursor> {
    one(
        client,
        "find the place in the event log",
        "select p::text from tollgate.event_position($1) p",
        &[&since],
    )
    .await
    .map(Cursor)
}

/// Whether there may be events after a cursor, at a cost that does not depend on how many.
pub async fn has_events(client: &impl GenericClient, after: &Cursor) -> Result<bool> {
    one(client, "look for events", "select tollgate.has_events($1::text::tollgate.event_cursor)", &[&after.0])
        .await
}

pub async fn read_events(client: &impl GenericClient, after: &Cursor, max_events: i32) -> Result<Batch> {
    const DOING: &str = "read events";
    let row = client
        .query_one(
            "select b.events::text, b.cursor::text, b.next::text, b.caught_up, b.proof \
             from tollgate.read_events($1::text::tollgate.event_cursor, $2) b",
            &[&after.0, &max_events],
        )
        .await
        .doing(DOING)?;
    Ok(Batch {
        events: events(row.try_get(0).doing(DOING)?)?,
        start: Cursor(row.try_get(1).doing(DOING)?),
        next: Cursor(row.try_get(2).doing(DOING)?),
        caught_up: row.try_get(3).doing(DOING)?,
        proof: row.try_get(4).doing(DOING)?,
    })
}

fn events(array: &str) -> Result<Vec<Event>> {
    serde_json::from_str(array).map_err(|error| {
        Error::failed(format!("could not read events: read_events() returned something else: {error}"))
            .with_remedy("use a tollgated of the same version as the extension")
    })
}

/// The cursor kept under this name, locked until the transaction ends; `None` while another session holds it.
pub async fn open_subscription(
    transaction: &tokio_postgres::Transaction<'_>,
    name: &str,
) -> Result<Option<Cursor>> {
    const DOING: &str = "open the subscription";
    let row = transaction
        .query_opt("select s::text from tollgate.open_subscription($1) s", &[&name])
        .await
        .doing(DOING)?;
    row.map(|row| row.try_get(0).doing(DOING).map(Cursor)).transpose()
}

/// Moves the cursor kept under this name to the end of a batch that was read from it; in the transaction that opened it.
pub async fn advance_subscription(
    transaction: &tokio_postgres::Transaction<'_>,
    name: &str,
    batch: &Batch,
) -> Result<()> {
    transaction
        .execute(
            "select tollgate.advance_subscription($1, $2::text::tollgate.event_cursor, $3)",
            &[&name, &batch.next.0, &batch.proof],
        )
        .await
        .doing("advance the subscription")
        .map(drop)
}

/// The code of a token that asks to read events, and its id.
pub async fn admit_event_reader(
    client: &impl GenericClient,
    token_hash: &[u8],
    client_ip: IpAddr,
) -> Result<(String, Option<Uuid>)> {
    const DOING: &str = "verify a reader of events";
    let row = client
        .query_one(
            "select code, token_id from tollgate.admit_event_reader($1, $2)",
            &[&token_hash, &client_ip],
        )
        .await
        .doing(DOING)?;
    Ok((row.try_get(0).doing(DOING)?, row.try_get(1).doing(DOING)?))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[expect(clippy::needless_pass_by_value, reason = "for json!")]
    fn read(array: Value) -> Result<Vec<Event>> {
        events(&array.to_string())
    }

    #[test]
    fn whatever_json_an_event_holds_is_read_as_it_is() {
        let deep = "[".repeat(100_000) + &"]".repeat(100_000);
        for value in ["1e400", "12345678901234567890123", "-0.10", &deep] {
            let read =
                events(&format!(r#"[{{"id": 1, "detail": {{"n": {value}}}, "new": {value}}}, {{"id": 2}}]"#))
                    .unwrap();
            assert_eq!((read[0].detail.get(), read[1].id), (&*format!(r#"{{"n": {value}}}"#), 2));
        }
    }

    #[test]
    fn an_event_of_the_extension_is_read_whole() {
        let read = read(json!([{
            "id": 7, "epoch": 2, "at": "2030-01-02T03:04:05.678901+00:00", "event": "token.revoked",
            "token_id": "018f4a6e-0000-7000-8000-000000000000", "user_id": "ann", "actor": "app",
            "client_addr": "10.0.0.1", "reason": "leaked", "detail": {"by": "scanner"}
        }]))
        .unwrap();
        assert_eq!(read.len(), 1);
        assert_eq!((read[0].id, read[0].epoch), (7, Some(2)));
        assert_eq!(read[0].event.as_deref(), Some("token.revoked"));
        assert_eq!(read[0].reason.get(), r#""leaked""#);
        assert_eq!(read[0].detail.get(), r#"{"by":"scanner"}"#);
    }

    #[test]
    fn an_event_of_a_kind_we_have_never_heard_of_is_read_all_the_same() {
        let read =
            read(json!([{"id": 8, "event": "moon.landed", "token_id": null, "phase": "full"}])).unwrap();
        assert_eq!(read[0].event.as_deref(), Some("moon.landed"));
        assert_eq!((&read[0].token_id, read[0].reason.get()), (&None, "null"));
    }

    #[test]
    fn what_is_no_array_of_events_is_an_error_and_not_an_empty_batch() {
        for other in [json!(null), json!({}), json!([{"event": "without an id"}])] {
            assert!(read(other.clone()).is_err(), "{other}");
        }
        assert!(read(json!([])).unwrap().is_empty());
    }
}
