//! The id of a server-sent event: a whole cursor, since the number of an event does not say which of those with lower
//! numbers were committed and told before it.
//!
//! The ids that were told at or above the horizon are written as ranges, because they nearly always follow one another.

use std::fmt::Write as _;

use uuid::Uuid;

use crate::sql::{Batch, Cursor};

/// Short enough for every server's and proxy's limit on a header.
const MAX_LENGTH: usize = 3000;
/// More ids than a cursor ever holds, and no more than a request may have us hold.
const MAX_IDS: u64 = 100_000;

/// For the client to hand back. Of ids that do not fit some are left out: their events are told once more, none is lost.
pub(super) fn encode(cursor: &Cursor) -> String {
    let mut text = format!("{}.{}.", cursor.epoch.simple(), cursor.horizon);
    let mut ids = cursor.delivered.clone();
    ids.sort_unstable();
    ids.dedup();
    ids.truncate(usize::try_from(MAX_IDS).unwrap_or(usize::MAX));
    let mut rest = ids.as_slice();
    while let [first, ..] = *rest {
        let length = 1 + rest.windows(2).take_while(|pair| pair[1] - pair[0] == 1).count();
        let last = rest[length - 1];
        rest = &rest[length..];
        if text.len() > MAX_LENGTH {
            break;
        }
        let separator = if text.ends_with('.') { "" } else { "," };
        let _ = match last == first {
            true => write!(text, "{separator}{first}"),
            false => write!(text, "{separator}{first}-{last}"),
        };
    }
    text
}

pub(super) fn decode(text: &str) -> Option<Cursor> {
    let mut parts = text.splitn(3, '.');
    let epoch = Uuid::try_parse(parts.next()?).ok()?;
    let horizon = number(parts.next()?)?;
    let ranges = parts.next()?;
    let mut delivered = Vec::new();
    for range in ranges.split(',').filter(|range| !range.is_empty()) {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last) = (number(first)?, number(last)?);
        let length = u64::try_from(last.checked_sub(first)?).ok()? + 1;
        if length + u64::try_from(delivered.len()).ok()? > MAX_IDS {
            return None;
        }
        delivered.extend(first..=last);
    }
    Some(Cursor { epoch, horizon, delivered })
}

fn number(text: &str) -> Option<i64> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

/// For each event of a batch that was read from `since`, the cursor after it.
pub(super) fn places(since: &Cursor, batch: &Batch) -> Vec<Cursor> {
    let mut place = since.clone();
    // In another epoch the same numbers may stand for other events. Where the batch crosses into one, whoever resumes
    // in its middle is told of it from its beginning.
    let same_epoch = batch.next.epoch == since.epoch;
    let mut places: Vec<Cursor> = batch
        .events
        .iter()
        .map(|event| {
            if same_epoch {
                place.delivered.push(event.id);
            }
            place.clone()
        })
        .collect();
    if let Some(last) = places.last_mut() {
        *last = batch.next.clone();
    }
    places
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn cursor(delivered: &[i64]) -> Cursor {
        Cursor { epoch: Uuid::from_u128(7), horizon: 900, delivered: delivered.to_vec() }
    }

    #[test]
    fn an_id_gives_back_the_cursor_that_it_was_made_of() {
        for delivered in [&[][..], &[5], &[5, 6], &[1, 3, 5, 6, 7, 9], &[i64::MAX - 1, i64::MAX]] {
            let place = cursor(delivered);
            assert_eq!(decode(&encode(&place)), Some(place));
        }
        assert_eq!(encode(&cursor(&[7, 6, 5, 9])), "00000000000000000000000000000007.900.5-7,9");
    }

    #[test]
    fn an_id_stays_short_and_then_forgets_what_was_told_not_what_was_not() {
        let gaps: Vec<i64> = (0..10_000).map(|id| id * 2).collect();
        let id = encode(&cursor(&gaps));
        assert!(id.len() < 2 * MAX_LENGTH, "{}", id.len());
        let kept = decode(&id).unwrap().delivered;
        assert!(kept.iter().all(|id| gaps.contains(id)) && !kept.is_empty());
    }

    #[test]
    fn what_is_no_id_of_ours_is_refused_and_costs_no_memory() {
        let epoch = Uuid::from_u128(7).simple();
        for text in
            ["", "7", "a.b.c", &format!("{epoch}.1"), &format!("{epoch}.-1."), &format!("{epoch}.1.x")]
        {
            assert_eq!(decode(text), None, "{text}");
        }
        assert_eq!(decode(&format!("{epoch}.1.0-9223372036854775807")), None);
        assert_eq!(decode(&format!("{epoch}.1.9-8")), None);
    }

    fn batch(since: &Cursor, next: Uuid) -> Batch {
        let event = |id: i64| serde_json::from_value(json!({ "id": id })).unwrap();
        let next = Cursor { epoch: next, horizon: since.horizon + 5, delivered: vec![12] };
        Batch { events: vec![event(10), event(11), event(12)], next, caught_up: true }
    }

    #[test]
    fn within_a_batch_each_event_is_added_to_what_was_told_and_the_last_one_ends_it() {
        let since = cursor(&[9]);
        let batch = batch(&since, since.epoch);
        let places = places(&since, &batch);
        assert_eq!(places, [cursor(&[9, 10]), cursor(&[9, 10, 11]), batch.next]);
    }

    #[test]
    fn in_the_middle_of_a_batch_that_begins_an_epoch_one_resumes_before_it() {
        let since = cursor(&[9]);
        let batch = batch(&since, Uuid::from_u128(8));
        assert_eq!(places(&since, &batch), [since.clone(), since, batch.next]);
    }
}
