//! The rows of a file of tokens, CSV or JSON lines, checked as far as that needs no server.
//!
//! serde reads both into one struct. Not through the csv crate's own deserializer, whose errors do not say which column they are
//! about; and no error of serde is shown, since it quotes the value.

use std::cell::Cell;
use std::io::{self, BufRead, BufReader, Read};
use std::rc::Rc;
use std::time::Duration;

use base64::Engine as _;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use jiff::Timestamp;
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};

use tollgate_core::foreign::Format;

use crate::config::ImportFormat;
use crate::contract::Imported;
use crate::error::{Error, Result};
use crate::hex;

const COLUMNS: [&str; 13] = [
    "user_id",
    "name",
    "token_hash",
    "scopes",
    "expires_at",
    "metadata",
    "allowed_ips",
    "rate_limit",
    "rate_window",
    "created_at",
    "last_used_at",
    "disabled_at",
    "revoked_at",
];
const REQUIRED: [&str; 3] = ["user_id", "name", "token_hash"];

/// Far beyond what one token needs; a file with a longer line is not a file of tokens.
const LONGEST_LINE: u64 = 1024 * 1024;

const WITH_ANY_PADDING: GeneralPurposeConfig =
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
const BASE64: GeneralPurpose = GeneralPurpose::new(&alphabet::STANDARD, WITH_ANY_PADDING);
const BASE64_URL: GeneralPurpose = GeneralPurpose::new(&alphabet::URL_SAFE, WITH_ANY_PADDING);

/// What a line of the file holds, or what is wrong with it.
#[derive(Debug, PartialEq)]
pub(super) struct Row {
    pub(super) line: u64,
    /// Of the file.
    pub(super) bytes: usize,
    pub(super) token: Result<Imported, String>,
}

pub(super) struct Rows<R> {
    source: Source<R>,
    token_format: Format,
    name: String,
    done: bool,
}

enum Source<R> {
    Csv { reader: csv::Reader<Bounded<R>>, heading: csv::StringRecord, left: Rc<Cell<u64>> },
    Jsonl { reader: BufReader<R>, line: u64 },
}

/// Refuses a CSV file whose heading is not one of tokens: with a wrong one, every row would be.
pub(super) fn read<R: Read>(
    source: R,
    format: ImportFormat,
    token_format: Format,
    name: &str,
) -> Result<Rows<R>> {
    let source = match format {
        ImportFormat::Jsonl => Source::Jsonl { reader: BufReader::new(source), line: 0 },
        ImportFormat::Csv => {
            let left = Rc::new(Cell::new(LONGEST_LINE));
            let source = Bounded { source, left: left.clone() };
            let mut reader =
                csv::ReaderBuilder::new().trim(csv::Trim::All).flexible(true).from_reader(source);
            let heading = reader.headers().map_err(|error| unreadable(name, &error))?.clone();
            check_heading(&heading, name)?;
            Source::Csv { reader, heading, left }
        }
    };
    Ok(Rows { source, token_format, name: name.to_owned(), done: false })
}

/// Fails in a record that does not end: with a quote too many, it would be the rest of the file.
struct Bounded<R> {
    source: R,
    /// Bytes that may be read until a record is whole.
    left: Rc<Cell<u64>>,
}

impl<R: Read> Read for Bounded<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.left.get() == 0 {
            return Err(io::Error::other(format!("a record is longer than {LONGEST_LINE} bytes")));
        }
        let read = self.source.read(buffer)?;
        self.left.set(self.left.get().saturating_sub(read as u64));
        Ok(read)
    }
}

fn check_heading(heading: &csv::StringRecord, name: &str) -> Result<()> {
    let lacking: Vec<&str> =
        REQUIRED.into_iter().filter(|column| !heading.iter().any(|name| name == *column)).collect();
    // Without a heading, its first line has a token's data, which is not to be repeated.
    let unknown = heading.iter().filter(|name| !COLUMNS.contains(name)).count();
    let twice = COLUMNS.iter().find(|column| heading.iter().filter(|name| name == *column).count() > 1);
    let fault = if !lacking.is_empty() {
        format!("no column {}", lacking.join(", "))
    } else if let Some(column) = twice {
        format!("the column {column} twice")
    } else if unknown > 0 {
        format!("{unknown} columns that are not known")
    } else {
        return Ok(());
    };
    Err(Error::usage(format!("the first line of {name} has {fault}"))
        .with_remedy(format!("name the columns in the first line; there are {}", COLUMNS.join(", "))))
}

fn unreadable(name: &str, error: &dyn std::error::Error) -> Error {
    Error::failed(format!("could not read {name}: {error}"))
}

impl<R> Rows<R> {
    pub(super) fn is_done(&self) -> bool {
        self.done
    }
}

impl<R: Read> Iterator for Rows<R> {
    type Item = Result<Row>;

    /// An error ends the iteration.
    fn next(&mut self) -> Option<Result<Row>> {
        if self.done {
            return None;
        }
        let next = match &mut self.source {
            Source::Csv { reader, heading, left } => {
                left.set(LONGEST_LINE);
                next_of_csv(reader, heading, &self.token_format, &self.name)
            }
            Source::Jsonl { reader, line } => next_of_jsonl(reader, line, &self.token_format, &self.name),
        };
        self.done = !matches!(next, Some(Ok(_)));
        next
    }
}

fn next_of_csv<R: Read>(
    reader: &mut csv::Reader<Bounded<R>>,
    heading: &csv::StringRecord,
    token_format: &Format,
    name: &str,
) -> Option<Result<Row>> {
    let mut record = csv::StringRecord::new();
    let read = reader.read_record(&mut record);
    let line = record.position().map_or_else(|| reader.position().line(), csv::Position::line);
    let token = match read {
        Ok(false) => return None,
        Ok(true) if record.len() != heading.len() => {
            Err(format!("{} fields, where the first line has {}", record.len(), heading.len()))
        }
        Ok(true) => of_record(heading, &record, token_format),
        Err(error) => match error.kind() {
            csv::ErrorKind::Utf8 { .. } => Err("it is not UTF-8".to_owned()),
            _ => return Some(Err(unreadable(name, &error))),
        },
    };
    Some(Ok(Row { line, bytes: record.as_slice().len(), token }))
}

fn of_record(
    heading: &csv::StringRecord,
    record: &csv::StringRecord,
    token_format: &Format,
) -> Result<Imported, String> {
    let (mut values, mut metadata) = (Map::new(), None);
    for (column, text) in heading.iter().zip(record).filter(|(_, text)| !text.is_empty()) {
        let value = match column {
            "scopes" | "allowed_ips" => json!(text.split_whitespace().collect::<Vec<_>>()),
            "rate_limit" => text.parse::<i32>().map_or_else(|_| json!(text), Value::from),
            "metadata" => {
                metadata = Some(serde_json::from_str(text).map_err(|_| "metadata is not JSON".to_owned())?);
                continue;
            }
            _ => json!(text),
        };
        values.insert(column.to_owned(), value);
    }
    let fields: Fields =
        serde_path_to_error::deserialize(Value::Object(values)).map_err(|error| explain(&error))?;
    Fields { metadata, ..fields }.imported(token_format)
}

fn next_of_jsonl<R: Read>(
    reader: &mut BufReader<R>,
    line: &mut u64,
    token_format: &Format,
    name: &str,
) -> Option<Result<Row>> {
    loop {
        let mut bytes = Vec::new();
        *line += 1;
        match reader.take(LONGEST_LINE).read_until(b'\n', &mut bytes) {
            Ok(0) => return None,
            Ok(_) if bytes.len() as u64 == LONGEST_LINE => {
                return Some(Err(Error::failed(format!(
                    "line {line} of {name} is longer than {LONGEST_LINE} bytes: that is no file of JSON lines"
                ))));
            }
            Ok(_) if bytes.trim_ascii().is_empty() => {}
            Ok(_) => {
                return Some(Ok(Row {
                    line: *line,
                    bytes: bytes.len(),
                    token: of_json(&bytes, token_format),
                }));
            }
            Err(error) => return Some(Err(unreadable(name, &error))),
        }
    }
}

fn of_json(bytes: &[u8], token_format: &Format) -> Result<Imported, String> {
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let fields: Fields = serde_path_to_error::deserialize(&mut json).map_err(|error| explain(&error))?;
    json.end().map_err(|error| not_json(&error))?;
    fields.imported(token_format)
}

/// A row of either format. Metadata passes as it is: our numbers do not hold all that the database's do.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Fields {
    user_id: Option<String>,
    name: Option<String>,
    token_hash: Option<String>,
    scopes: Option<Vec<String>>,
    expires_at: Option<Timestamp>,
    metadata: Option<Box<RawValue>>,
    allowed_ips: Option<Vec<String>>,
    rate_limit: Option<i32>,
    rate_window: Option<String>,
    created_at: Option<Timestamp>,
    last_used_at: Option<Timestamp>,
    disabled_at: Option<Timestamp>,
    revoked_at: Option<Timestamp>,
}

impl Fields {
    fn imported(self, token_format: &Format) -> Result<Imported, String> {
        let required = |name: &str, value: Option<String>| value.ok_or_else(|| format!("{name} is missing"));
        let metadata = self.metadata.map(|json| json.get().to_owned()).filter(|json| json != "null");
        let window = |text: String| humantime::parse_duration(&text).map_err(|_| expected("rate_window"));
        Ok(Imported {
            user_id: required("user_id", self.user_id)?,
            name: required("name", self.name)?,
            token_hash: digest(&required("token_hash", self.token_hash)?, token_format)?,
            scopes: self.scopes.unwrap_or_default(),
            expires_at: self.expires_at,
            created_at: self.created_at,
            last_used_at: self.last_used_at,
            disabled_at: self.disabled_at,
            revoked_at: self.revoked_at,
            metadata: metadata.unwrap_or_else(|| "{}".to_owned()),
            allowed_ips: self.allowed_ips,
            rate_limit: self.rate_limit,
            rate_window: self.rate_window.map(window).transpose()?.filter(|window| *window > Duration::ZERO),
        })
    }
}

/// In own words: those of serde quote the value, which may be a token.
fn explain(error: &serde_path_to_error::Error<serde_json::Error>) -> String {
    let inner = error.inner();
    let field = error.path().iter().next().map(ToString::to_string);
    let text = inner.to_string();
    match field {
        _ if !inner.is_data() => not_json(inner),
        _ if text.starts_with("unknown field") => {
            format!("it has a key that is not known; there are {}", COLUMNS.join(", "))
        }
        _ if text.starts_with("duplicate field") => "it has a key twice".to_owned(),
        Some(field) => expected(&field),
        None => "it is not a JSON object".to_owned(),
    }
}

fn not_json(error: &serde_json::Error) -> String {
    format!("it is not JSON, from column {} on", error.column())
}

/// What the value of a field must be.
fn expected(field: &str) -> String {
    let what = match field {
        "scopes" | "allowed_ips" => "an array of texts",
        "rate_limit" => "a whole number that a limit can be",
        "rate_window" => "a time such as 1min",
        "user_id" | "name" | "token_hash" => "text",
        "metadata" => "JSON",
        _ => "a time such as 2030-01-02T03:04:05Z",
    };
    format!("{field} is not {what}")
}

/// In hex, with or without PostgreSQL's \x, or in base64 of either alphabet, padded or not; also in Django's form with the name
/// of the hash before it, if that has no salt.
fn digest(text: &str, format: &Format) -> Result<Vec<u8>, String> {
    if is_salted(text) {
        return Err("token_hash has a salt, so a token cannot be found by it: let the application check such tokens as \
                    before, and import each by SHA-256 when it is next presented"
            .to_owned());
    }
    let bare = text.strip_prefix("\\x").or_else(|| text.strip_prefix("sha512$$")).unwrap_or(text);
    let length = format.digest_len();
    let digits = hex::decode(bare).filter(|bytes| bytes.len() == length);
    let bytes = digits.or_else(|| BASE64.decode(bare).or_else(|_| BASE64_URL.decode(bare)).ok());
    bytes.filter(|bytes: &Vec<u8>| bytes.len() == length).ok_or_else(|| {
        format!(
            "token_hash is not a digest of {length} bytes, as {format} has, in hex or base64; it takes the digest of the token, \
             never the token"
        )
    })
}

/// What bcrypt, argon2 and scrypt write, and Django and Werkzeug for hashes of passwords.
fn is_salted(text: &str) -> bool {
    let known = ["$2", "$argon2", "$scrypt", "$pbkdf2", "pbkdf2", "argon2", "bcrypt", "scrypt", "$5$", "$6$"];
    known.iter().any(|prefix| text.starts_with(prefix)) && text.contains(['$', ':'])
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEX: &str = "00112233445566778899aabbccddeeff00112233445566778899AABBCCDDEEFF";

    fn rows(text: &str, format: ImportFormat) -> Vec<Row> {
        read(text.as_bytes(), format, Format::Sha256, "f").unwrap().map(Result::unwrap).collect()
    }

    fn why(row: &Row) -> &str {
        row.token.as_ref().err().map_or("accepted", String::as_str)
    }

    #[test]
    fn digests_are_read_in_every_usual_form() {
        let bytes = digest(HEX, &Format::Sha256).unwrap();
        assert_eq!(digest(&format!("\\x{}", HEX.to_lowercase()), &Format::Sha256).unwrap(), bytes);
        for (engine, text) in [
            (base64::engine::general_purpose::STANDARD, "padded"),
            (base64::engine::general_purpose::STANDARD_NO_PAD, "bare"),
            (base64::engine::general_purpose::URL_SAFE, "url"),
            (base64::engine::general_purpose::URL_SAFE_NO_PAD, "url, bare"),
        ] {
            assert_eq!(digest(&engine.encode(&bytes), &Format::Sha256).unwrap(), bytes, "{text}");
        }
        for bad in ["", &HEX[1..], "tgt_0123456789abcdef", "é"] {
            let error = digest(bad, &Format::Sha256).unwrap_err();
            assert!(bad.is_empty() || !error.contains(bad), "{error}");
        }
    }

    #[test]
    fn a_digest_of_another_format_has_its_length_and_one_with_a_salt_is_refused_with_the_way_out() {
        let hex = [HEX, HEX].concat();
        assert_eq!(digest(&hex, &Format::Sha512).unwrap().len(), 64);
        assert_eq!(digest(&format!("sha512$${hex}"), &Format::Sha512).unwrap().len(), 64);
        assert!(digest(HEX, &Format::Sha512).unwrap_err().contains("64 bytes"));
        assert!(digest(&hex, &Format::Sanctum).unwrap_err().contains("32 bytes"));
        for salted in
            ["$2b$12$abc", "pbkdf2_sha256$260000$salt$hash", "$argon2id$v=19$x", "scrypt:32768:8:1$a$b"]
        {
            let error = digest(salted, &Format::Sha256).unwrap_err();
            assert!(error.contains("salt") && error.contains("next presented"), "{error}");
        }
    }

    #[test]
    fn both_formats_say_the_same() {
        let csv = format!(
            "name,user_id,token_hash,scopes,expires_at,metadata,allowed_ips,rate_limit,rate_window\n\
             ci,ann,{HEX},a:b c,2030-01-02T03:04:05Z,\"{{\"\"x\"\": 1}}\",10.0.0.0/8,5,1min\n\
             ci,bob,{HEX},,,,,,\n"
        );
        let jsonl = format!(
            "{{\"name\": \"ci\", \"user_id\": \"ann\", \"token_hash\": \"{HEX}\", \"scopes\": [\"a:b\", \"c\"], \
               \"expires_at\": \"2030-01-02T03:04:05Z\", \"metadata\": {{\"x\": 1}}, \"allowed_ips\": [\"10.0.0.0/8\"], \
               \"rate_limit\": 5, \"rate_window\": \"1min\"}}\n\n\
             {{\"name\": \"ci\", \"user_id\": \"bob\", \"token_hash\": \"{HEX}\", \"expires_at\": null}}"
        );
        let (csv, jsonl) = (rows(&csv, ImportFormat::Csv), rows(&jsonl, ImportFormat::Jsonl));
        assert_eq!(csv.iter().map(|row| row.line).collect::<Vec<_>>(), [2, 3]);
        assert_eq!(jsonl.iter().map(|row| row.line).collect::<Vec<_>>(), [1, 3]);
        for (one, other) in csv.iter().zip(&jsonl) {
            assert_eq!(one.token.as_ref().unwrap(), other.token.as_ref().unwrap());
        }
        let whole = csv[0].token.as_ref().unwrap();
        assert_eq!((whole.scopes.len(), whole.rate_limit), (2, Some(5)));
        let bare = csv[1].token.as_ref().unwrap();
        assert_eq!((&bare.allowed_ips, &bare.metadata), (&None, &"{}".to_owned()));
    }

    #[test]
    fn metadata_passes_as_it_was_given() {
        let deep = "[".repeat(10_000) + &"]".repeat(10_000);
        for value in ["1e400", "12345678901234567890123", "-0.10", &deep] {
            let metadata = format!("{{\"n\":  {value}}}");
            let csv = format!(
                "user_id,name,token_hash,metadata\nann,n,{HEX},\"{}\"\n",
                metadata.replace('"', "\"\"")
            );
            let jsonl = format!(
                "{{\"user_id\": \"ann\", \"metadata\": {metadata}, \"name\": \"n\", \"token_hash\": \"{HEX}\"}}"
            );
            for rows in [rows(&csv, ImportFormat::Csv), rows(&jsonl, ImportFormat::Jsonl)] {
                assert_eq!(rows[0].token.as_ref().unwrap().metadata, metadata);
            }
        }
    }

    #[test]
    fn a_quote_too_many_does_not_take_the_rest_of_the_file_for_one_field() {
        let csv = format!("user_id,name,token_hash\n\"ann,n,{HEX}\n{}", "bob,n,x\n".repeat(200_000));
        let rows: Vec<_> = read(csv.as_bytes(), ImportFormat::Csv, Format::Sha256, "f").unwrap().collect();
        assert_eq!(rows.len(), 1);
        assert!(rows[0].as_ref().is_err_and(|error| error.message().contains("longer than")), "{rows:?}");
    }

    #[test]
    fn a_bad_row_is_refused_by_its_line_and_the_next_is_read() {
        let csv = format!(
            "user_id,name,token_hash,rate_limit\nann,n,junk,\nann,n\nann,n,{HEX},many\n,n,{HEX},\n\"a\nb\",n,{HEX},\nann,n,bad,\n"
        );
        let csv = rows(&csv, ImportFormat::Csv);
        assert_eq!(csv.iter().map(|row| row.line).collect::<Vec<_>>(), [2, 3, 4, 5, 6, 8]);
        for (row, words) in
            csv.iter().zip(["token_hash", "2 fields", "rate_limit", "user_id", "accepted", "token_hash"])
        {
            assert!(why(row).contains(words), "{row:?}");
        }
        let jsonl = [
            ("{", "not JSON"),
            ("[]", "not a JSON object"),
            ("\"tgt_secret\"", "not a JSON object"),
            (r#"{"tgt_secret": 1}"#, "not known"),
            (r#"{"user_id": 1}"#, "user_id is not text"),
            (r#"{"user_id": "a"} tgt_secret"#, "not JSON"),
            (r#"{"user_id": "a", "user_id": "b"}"#, "a key twice"),
            (r#"{"rate_limit": "tgt_secret"}"#, "rate_limit is not a whole number"),
            (r#"{"expires_at": "tgt_secret"}"#, "expires_at is not a time"),
            (r#"{"scopes": ["a", {"tgt_secret": 1}]}"#, "scopes is not an array of texts"),
        ];
        let lines = jsonl.map(|(line, _)| line).join("\n");
        for (row, (line, words)) in rows(&lines, ImportFormat::Jsonl).iter().zip(jsonl) {
            assert!(why(row).contains(words), "{line}: {row:?}");
            assert!(!why(row).contains("tgt_secret"), "{row:?}");
        }
    }

    #[test]
    fn a_file_without_a_heading_is_refused_and_not_quoted() {
        for text in [
            format!("ann,n,{HEX}\n"),
            "user_id,name\n".into(),
            "user_id,name,token_hash,x\n".into(),
            "user_id,name,token_hash,name\n".into(),
            String::new(),
        ] {
            let Err(error) = read(text.as_bytes(), ImportFormat::Csv, Format::Sha256, "f") else {
                panic!("{text}")
            };
            assert!(
                error.report().contains("token_hash") && !error.report().contains(HEX),
                "{}",
                error.report()
            );
        }
    }
}
