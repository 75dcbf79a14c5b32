//! Which version of the extension the database has. A daemon serves an older one, since its package may be installed before
//! ALTER EXTENSION is run: a task that calls what that version has not, or has in another form, waits for the update.

use tokio_postgres::GenericClient;

use super::query::one;
use crate::error::{Error, Kind, Result};

const OURS: &str = env!("CARGO_PKG_VERSION");

/// `None`: the extension is not in this database.
pub async fn schema_version(client: &impl GenericClient) -> Result<Option<String>> {
    one(
        client,
        "look for the extension",
        "select (select extversion from pg_extension where extname = 'tollgate')",
        &[],
    )
    .await
}

/// Whether a statement may have failed because the schema is of another version: class 42, the statement does not fit what
/// is there, without 42501, a missing privilege.
pub fn may_be_of_another_version(error: &Error) -> bool {
    error.sqlstate().is_some_and(|sqlstate| sqlstate.code().starts_with("42") && sqlstate.code() != "42501")
}

/// What such a task waits for; `None` if the versions are equal, so that something else is wrong.
pub fn other_version(schema: &str) -> Option<Error> {
    let number =
        |version: &str| -> Option<Vec<u64>> { version.split('.').map(|part| part.parse().ok()).collect() };
    let text = match number(schema)?.cmp(&number(OURS)?) {
        std::cmp::Ordering::Less => {
            format!("needs schema {OURS}, this database has {schema}; run ALTER EXTENSION tollgate UPDATE")
        }
        std::cmp::Ordering::Greater => {
            format!("this tollgated {OURS} is older than the schema, {schema}; install tollgated {schema}")
        }
        std::cmp::Ordering::Equal => return None,
    };
    Some(Error::new(Kind::OtherSchema, text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_older_schema_is_to_be_updated_and_a_newer_one_needs_another_daemon() {
        let text = |schema| other_version(schema).map(|error| error.message().to_owned());
        assert!(text("0.0.9").is_some_and(|text| text.ends_with("run ALTER EXTENSION tollgate UPDATE")));
        assert!(text("999.0.0").is_some_and(|text| text.ends_with("install tollgated 999.0.0")));
        assert_eq!(text(OURS), None);
        assert_eq!(text("unknown"), None);
    }
}
