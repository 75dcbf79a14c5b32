//! The id of a server-sent event is the whole cursor after it: the number of an event alone does not say which events with
//! lower numbers were committed and read before it. The database writes cursors in printable characters, and bounds their length.

use crate::contract::{Batch, Cursor};

/// No cursor is longer.
const MAX_LENGTH: usize = 8000;

/// As the client sends it back.
pub(super) fn encode(cursor: &Cursor) -> &str {
    &cursor.0
}

/// What may be a cursor; the database decides whether it is one.
pub(super) fn decode(text: &str) -> Option<Cursor> {
    let plausible = text.len() <= MAX_LENGTH
        && text.starts_with('(')
        && text.ends_with(')')
        && text.bytes().all(|byte| byte.is_ascii_hexdigit() || b"(),:\"-".contains(&byte));
    plausible.then(|| Cursor(text.to_owned()))
}

/// For each event of a page, the cursor after it.
pub(super) fn cursors(batch: &Batch) -> Vec<Cursor> {
    let mut cursors: Vec<Cursor> = batch.events.iter().map(|event| batch.start.after(event.id)).collect();
    if let Some(last) = cursors.last_mut() {
        *last = batch.next.clone();
    }
    cursors
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const CURSOR: &str = "(00000000-0000-0000-0000-000000000007,\"10:20:10,12\",\
                           00000000-0000-0000-0000-000000000007,25:25:,4,900,5)";

    #[test]
    fn an_id_decodes_to_the_cursor_it_was_made_of() {
        let cursor = Cursor(CURSOR.to_owned());
        assert_eq!(decode(encode(&cursor)), Some(cursor));
    }

    #[test]
    fn a_value_that_is_not_one_of_our_ids_is_refused_and_costs_no_memory() {
        let long = format!("({})", "1".repeat(MAX_LENGTH));
        for text in ["", "7", "a.b.c", "(1,2", "(1);drop", "(1\n)", &long] {
            assert_eq!(decode(text), None, "{text}");
        }
    }

    #[test]
    fn within_a_page_each_event_has_its_own_cursor_and_the_last_is_that_of_the_page() {
        let event = |id: i64| serde_json::from_value(json!({ "id": id })).unwrap();
        let next = Cursor("(next)".to_owned());
        let batch = Batch {
            events: vec![event(10), event(11), event(12)],
            start: Cursor(CURSOR.to_owned()),
            next: next.clone(),
            caught_up: true,
            proof: Vec::new(),
        };
        let after = |id: &str| Cursor(CURSOR.replace(",5)", &format!(",{id})")));
        assert_eq!(cursors(&batch), [after("11"), after("12"), next]);
    }
}
