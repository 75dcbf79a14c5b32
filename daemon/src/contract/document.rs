//! A row as a JSON object, whose values stay as the server wrote them: numbers of any size, nesting of any depth.

use std::fmt;
use std::time::Duration;

use jiff::{Span, SpanRelativeTo, Timestamp};
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;
use serde_json::value::RawValue;

use crate::process::duration;

#[derive(Clone, Debug, Default)]
pub struct Document(Vec<(String, Box<RawValue>)>);

impl Document {
    fn get(&self, name: &str) -> Option<&RawValue> {
        self.0.iter().find(|(key, value)| key == name && value.get() != "null").map(|(_, value)| &**value)
    }

    /// Whether there is anything by that name.
    pub fn has(&self, name: &str) -> bool {
        self.get(name).is_some()
    }

    pub fn is_true(&self, name: &str) -> bool {
        self.get(name).is_some_and(|value| value.get() == "true")
    }

    /// A field as text for a person; what is absent or null is a dash.
    pub fn field(&self, name: &str) -> String {
        self.get(name).map_or_else(|| "-".to_owned(), cell)
    }

    /// A field that holds a time, to the second, in UTC.
    pub fn moment(&self, name: &str) -> String {
        moment(self.field(name))
    }

    /// A field that holds a duration, as it is given on the command line: `1m 30s`.
    pub fn duration(&self, name: &str) -> String {
        duration_text(self.field(name))
    }

    /// Puts a text in the place of what is there.
    pub fn set(&mut self, name: &str, text: &str) {
        if let Ok(text) = serde_json::value::to_raw_value(text) {
            self.0.retain(|(key, _)| key != name);
            self.0.push((name.to_owned(), text));
        }
    }

    /// With nothing in the place of what [`Value`] cannot hold.
    pub fn into_value(self) -> Value {
        let read = |value: &RawValue| serde_json::from_str::<Value>(value.get()).unwrap_or_default();
        self.0.into_iter().map(|(key, value)| (key, read(&value))).collect()
    }
}

fn cell(value: &RawValue) -> String {
    let text = value.get();
    match text.as_bytes().first() {
        Some(b'n') => "-".to_owned(),
        Some(b'"') => serde_json::from_str(text).unwrap_or_else(|_| text.to_owned()),
        Some(b'[') => match serde_json::from_str::<Vec<&RawValue>>(text) {
            Ok(items) if items.is_empty() => "-".to_owned(),
            // Within a list, only texts and numbers are shown otherwise than they are.
            Ok(items) => items.into_iter().map(item).collect::<Vec<_>>().join(", "),
            Err(_) => text.to_owned(),
        },
        _ => text.to_owned(),
    }
}

fn item(value: &RawValue) -> String {
    if value.get().starts_with('[') { value.get().to_owned() } else { cell(value) }
}

/// A time as the server writes it, to the second, in UTC; anything else, such as "infinity", as it is.
pub fn moment(text: String) -> String {
    match text.parse::<Timestamp>() {
        Ok(time) => time.strftime("%Y-%m-%d %H:%M:%SZ").to_string(),
        Err(_) => text,
    }
}

/// An interval as the server writes it in ISO 8601, for people; anything else as it is.
fn duration_text(text: String) -> String {
    let whole = text.parse::<Span>().and_then(|span| span.to_duration(SpanRelativeTo::days_are_24_hours()));
    match whole.map(Duration::try_from) {
        Ok(Ok(time)) => duration::text(time),
        _ => text,
    }
}

impl Serialize for Document {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(key, value)| (key, value)))
    }
}

impl<'de> Deserialize<'de> for Document {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;
        impl<'de> Visitor<'de> for Fields {
            type Value = Document;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Document, A::Error> {
                let mut fields = Vec::new();
                while let Some(field) = map.next_entry()? {
                    fields.push(field);
                }
                Ok(Document(fields))
            }
        }
        deserializer.deserialize_map(Fields)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document(text: &str) -> Document {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn fields_are_readable() {
        let row = document(
            r#"{"a": null, "b": ["x", "y"], "c": [], "d": 7, "e": "infinity",
                "f": "2030-01-02T03:04:05.678901+00:00", "g": {"k":  1}, "h": [1, ["z"]]}"#,
        );
        let shown = ["a", "missing", "b", "c", "d", "g", "h"].map(|name| row.field(name));
        assert_eq!(shown, ["-", "-", "x, y", "-", "7", "{\"k\":  1}", "1, [\"z\"]"]);
        assert_eq!(row.moment("e"), "infinity");
        assert_eq!(row.moment("f"), "2030-01-02 03:04:05Z");
        assert!(row.has("c") && !row.has("a") && !row.has("missing"));
        let row = document(r#"{"a": "PT1M30S", "b": "P1D", "c": "PT0.25S", "d": "a minute", "e": null}"#);
        let shown = ["a", "b", "c", "d", "e"].map(|name| row.duration(name));
        assert_eq!(shown, ["1m 30s", "1d", "250ms", "a minute", "-"]);
    }

    #[test]
    fn what_no_number_and_no_stack_of_ours_holds_passes_as_it_is() {
        let deep = "[".repeat(100_000) + &"]".repeat(100_000);
        for value in ["1e400", "12345678901234567890123", "-0.10", &deep] {
            let text = format!(r#"{{"a":{value},"b":{{"c": {value}}}}}"#);
            let row = document(&text);
            assert_eq!(row.field("b"), format!(r#"{{"c": {value}}}"#));
            assert_eq!(serde_json::to_string(&row).unwrap(), text);
        }
        assert_eq!(document(r#"{"a": 1e400, "b": 1}"#).into_value(), serde_json::json!({"a": null, "b": 1}));
    }

    #[test]
    fn a_text_takes_the_place_of_what_was_there() {
        let mut row = document(r#"{"code": "A", "valid": true}"#);
        row.set("code", "B");
        assert_eq!(row.field("code"), "B");
        assert!(row.is_true("valid") && !row.is_true("code"));
    }
}
