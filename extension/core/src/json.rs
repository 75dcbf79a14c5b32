//! JSON (RFC 8259) as signed tokens and keys need it read: what two readers could understand differently is refused.
//!
//! On top of what serde_json refuses (lone surrogates, control characters, trailing data, comments, NaN, numbers beyond
//! a double), names must be unique in each object, whatever escapes they are written with; a text contains no NUL, which
//! PostgreSQL could not store; and nesting and exponents have limits, so that PostgreSQL can read as jsonb whatever was
//! accepted here. Nothing panics, and the memory taken is linear in the input, whose size the callers limit.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fmt;

use serde::de::{DeserializeSeed, MapAccess, SeqAccess, Visitor};
use serde::ser::{Serialize, Serializer};
pub use serde_json::Number;

/// How deep objects and arrays may be nested; `{}` has depth 1.
pub const MAX_DEPTH: usize = 32;

pub type Object = BTreeMap<String, Json>;

#[derive(Clone, Debug, PartialEq)]
pub enum Json {
    Null,
    Bool(bool),
    Number(Number),
    Text(String),
    List(Vec<Json>),
    Object(Object),
}

impl Json {
    pub fn as_text(&self) -> Option<&str> {
        if let Json::Text(text) = self { Some(text) } else { None }
    }

    pub fn as_object(&self) -> Option<&Object> {
        if let Json::Object(members) = self { Some(members) } else { None }
    }

    /// Whether every number in it is kept as it was written: an integer of 64 bits is, and a double is not.
    pub fn is_exact(&self) -> bool {
        match self {
            Json::Null | Json::Bool(_) | Json::Text(_) => true,
            Json::Number(number) => number.as_i64().is_some(),
            Json::List(list) => list.iter().all(Json::is_exact),
            Json::Object(members) => members.values().all(Json::is_exact),
        }
    }

    /// The elements of a list of texts.
    pub fn as_texts(&self) -> Option<Vec<&str>> {
        let Json::List(list) = self else { return None };
        list.iter().map(Json::as_text).collect()
    }
}

impl Serialize for Json {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Json::Null => serializer.serialize_unit(),
            Json::Bool(value) => serializer.serialize_bool(*value),
            Json::Number(number) => number.serialize(serializer),
            Json::Text(text) => serializer.serialize_str(text),
            Json::List(list) => serializer.collect_seq(list),
            Json::Object(members) => serializer.collect_map(members),
        }
    }
}

/// Why a text was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fault {
    /// Not JSON, or not UTF-8.
    Syntax,
    /// Two members of an object have the same name.
    DuplicateName,
    /// Deeper than [`MAX_DEPTH`].
    Depth,
    /// A text that contains U+0000.
    Nul,
    /// A number whose exponent has more than three digits.
    Exponent,
    /// JSON, but not an object.
    NotAnObject,
}

/// Parses a text that must be one object.
pub fn parse_object(text: &str) -> Result<Object, Fault> {
    match parse(text)? {
        Json::Object(members) => Ok(members),
        _ => Err(Fault::NotAnObject),
    }
}

/// Parses one value, with nothing but white space around it.
pub fn parse(text: &str) -> Result<Json, Fault> {
    let (fault, has_double) = (Cell::new(Fault::Syntax), Cell::new(false));
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let value = Strict { depth: 0, fault: &fault, has_double: &has_double }
        .deserialize(&mut deserializer)
        .map_err(|_| fault.get())
        .and_then(|value| deserializer.end().map(|()| value).map_err(|_| Fault::Syntax));
    // What was read without a double has no exponent.
    if (value.is_err() || has_double.get()) && has_long_exponent(text.as_bytes()) {
        return Err(Fault::Exponent);
    }
    value
}

/// A text as JSON, in quotation marks.
pub fn quote(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// Whether a number has more than three digits after its `e`. A double rounds `1e-99999` to zero; PostgreSQL's numeric
/// raises an error for it.
fn has_long_exponent(text: &[u8]) -> bool {
    let (mut in_string, mut i) = (false, 0);
    while let Some(&byte) = text.get(i) {
        match byte {
            b'"' => in_string = !in_string,
            b'\\' if in_string => i += 1,
            // The `e` of `true` and `false` follows a letter.
            b'e' | b'E' if !in_string && i > 0 && text[i - 1].is_ascii_digit() => {
                let digits = text[i + 1..].iter().skip_while(|b| matches!(b, b'+' | b'-'));
                if digits.take_while(|b| b.is_ascii_digit()).count() > 3 {
                    return true;
                }
            }
            _ => {}
        }
        i += 1;
    }
    false
}

/// Reads a value. Errors of serde are texts, so the fault is left beside them.
#[derive(Clone, Copy)]
struct Strict<'f> {
    /// Of what contains the value.
    depth: usize,
    fault: &'f Cell<Fault>,
    /// Whether a number is not an integer of 64 bits.
    has_double: &'f Cell<bool>,
}

impl Strict<'_> {
    fn refuse<E: serde::de::Error>(self, fault: Fault) -> E {
        self.fault.set(fault);
        E::custom("")
    }

    fn inside<E: serde::de::Error>(self) -> Result<Self, E> {
        if self.depth >= MAX_DEPTH {
            return Err(self.refuse(Fault::Depth));
        }
        Ok(Self { depth: self.depth + 1, ..self })
    }

    fn check<E: serde::de::Error>(self, text: String) -> Result<String, E> {
        if text.contains('\0') { Err(self.refuse(Fault::Nul)) } else { Ok(text) }
    }
}

impl<'de> DeserializeSeed<'de> for Strict<'_> {
    type Value = Json;

    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<Json, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict<'_> {
    type Value = Json;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Json, E> {
        Ok(Json::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Json, E> {
        Ok(Json::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Json, E> {
        Ok(Json::Number(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Json, E> {
        Ok(Json::Number(value.into()))
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Json, E> {
        self.has_double.set(true);
        Number::from_f64(value).map(Json::Number).ok_or_else(|| E::custom(""))
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Json, E> {
        self.visit_string(text.to_owned())
    }

    fn visit_string<E: serde::de::Error>(self, text: String) -> Result<Json, E> {
        self.check(text).map(Json::Text)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<Json, A::Error> {
        let inside = self.inside()?;
        let mut list = Vec::new();
        while let Some(element) = elements.next_element_seed(inside)? {
            list.push(element);
        }
        Ok(Json::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Json, A::Error> {
        let inside = self.inside()?;
        let mut object = Object::new();
        while let Some(name) = members.next_key::<String>()? {
            let name = self.check(name)?;
            let value = members.next_value_seed(inside)?;
            if object.insert(name, value).is_some() {
                return Err(self.refuse(Fault::DuplicateName));
            }
        }
        Ok(Json::Object(object))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_read_as_it_was_written() {
        let read =
            parse(r#" {"a":[null,true,-1,18446744073709551615,1.5e3,"\ud83d\ude00é"],"b":{}} "#).unwrap();
        let list = vec![
            Json::Null,
            Json::Bool(true),
            Json::Number((-1).into()),
            Json::Number(u64::MAX.into()),
            Json::Number(Number::from_f64(1500.0).unwrap()),
            Json::Text("😀é".into()),
        ];
        let expected = [("a".into(), Json::List(list)), ("b".into(), Json::Object(Object::new()))];
        assert_eq!(read, Json::Object(expected.into()));
        for scalar in ["null", "false", "0", "-0", "0.0", "1e-999", r#""""#] {
            parse(scalar).unwrap_or_else(|fault| panic!("{scalar}: {fault:?}"));
        }
    }

    #[test]
    fn two_members_of_one_name_are_refused_at_any_depth_and_however_they_are_escaped() {
        for text in [
            r#"{"iss":"a","iss":"a"}"#,
            r#"{"iss":"a","\u0069ss":"b"}"#,
            r#"{"iss":"a","is\u0073":"b"}"#,
            r#"{"a":[{"b":{"c":1,"d":2,"c":3}}]}"#,
            r#"{"":1,"":1}"#,
            r#"{"/":1,"\/":1}"#,
        ] {
            assert_eq!(parse(text), Err(Fault::DuplicateName), "{text}");
        }
        // Different names: neither case nor Unicode's normal forms make two of them one.
        parse_object(r#"{"iss":1,"Iss":1,"é":1,"e\u0301":1,"a":{"iss":1}}"#).unwrap();
    }

    #[test]
    fn what_two_readers_could_understand_differently_is_refused() {
        for text in [
            "",
            " ",
            "{",
            "}",
            "{}{}",
            "{} x",
            "{}\0",
            "\u{feff}{}",
            "{'a':1}",
            "{a:1}",
            r#"{"a":1,}"#,
            "[1,]",
            "[,1]",
            r#"{"a" 1}"#,
            r#"{"a"}"#,
            r#"{1:1}"#,
            "/**/{}",
            "{}//",
            "#\n{}",
            "NaN",
            "Infinity",
            "-Infinity",
            "+1",
            "01",
            "-01",
            "1.",
            ".5",
            "0x10",
            "1e",
            "1_000",
            "1e400",
            "-1e400",
            "- 1",
            "True",
            "nul",
            "nulll",
            r#""a"#,
            "\"\t\"",
            "\"\n\"",
            r#""\x41""#,
            r#""\'""#,
            r#""\u12""#,
            r#""\ud800""#,
            r#""\udc00""#,
            r#""\ud800\ud800""#,
            r#""\udc00\ud800""#,
            r#""\ud800x""#,
            r#"{"\ud800":1}"#,
            "\u{a0}1",
            "\u{2028}1",
            "１",
        ] {
            assert_eq!(parse(text), Err(Fault::Syntax), "{text:?}");
        }
        for text in [r#""\u0000""#, r#"{"\u0000":1}"#, r#"{"iss":"a\u0000"}"#, r#"["iss\u0000b"]"#] {
            assert_eq!(parse(text), Err(Fault::Nul), "{text}");
        }
        for text in ["1e1000", "[1E-1000]", r#"{"a\"e1":1.5e+0001}"#, r#"{"exp":1e99999999999}"#] {
            assert_eq!(parse(text), Err(Fault::Exponent), "{text}");
        }
        parse(r#"["1e1000","\"1e1000","a\\",true,false]"#).unwrap();
        for text in ["1", "null", r#""{}""#, "[{}]"] {
            assert_eq!(parse_object(text), Err(Fault::NotAnObject), "{text}");
        }
    }

    #[test]
    fn nesting_has_a_limit() {
        let nested = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        parse(&nested(MAX_DEPTH)).unwrap();
        for depth in [MAX_DEPTH + 1, 127, 128, 129, 100_000] {
            assert_eq!(parse(&nested(depth)), Err(Fault::Depth));
            assert_eq!(parse(&"{\"a\":".repeat(depth)), Err(Fault::Depth));
        }
    }

    #[test]
    fn what_is_exact_is_written_as_it_was_read() {
        for text in [
            r#"{"":[null,true,{"a":"\u0001é😀"}],"z":{"aa":-9223372036854775808,"b":9223372036854775807}}"#,
            "[]",
            "{}",
            "0",
        ] {
            let value = parse(text).unwrap();
            assert!(value.is_exact(), "{text}");
            assert_eq!(serde_json::to_string(&value).unwrap(), text);
        }
        for text in ["1.0", "-0", "1e1", "[9223372036854775808]", r#"{"a":[{"b":-9223372036854775809}]}"#] {
            assert!(!parse(text).unwrap().is_exact(), "{text}");
        }
    }

    #[test]
    fn a_quoted_text_is_read_back() {
        for text in ["", "a\"b\\c", "\u{1}\u{7f}\n", "é😀"] {
            assert_eq!(parse(&quote(text)), Ok(Json::Text(text.to_owned())));
        }
    }
}
