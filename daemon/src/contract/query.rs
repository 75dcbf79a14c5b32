//! What the other files run their statements with.

use futures_util::{Stream, StreamExt as _};
use postgres_types::{FromSql, Json, ToSql};
use tokio_postgres::GenericClient;

use super::document::Document;
use crate::error::{Doing as _, Error, Result};

pub(super) async fn one<T: for<'a> FromSql<'a>>(
    client: &impl GenericClient,
    doing: &str,
    statement: &str,
    values: &[&(dyn ToSql + Sync)],
) -> Result<T> {
    client.query_one(statement, values).await.doing(doing)?.try_get(0).doing(doing)
}

pub(super) async fn many<T: for<'a> FromSql<'a>>(
    client: &impl GenericClient,
    doing: &str,
    statement: &str,
    values: &[&(dyn ToSql + Sync)],
) -> Result<Vec<T>> {
    let rows = client.query(statement, values).await.doing(doing)?;
    rows.iter().map(|row| row.try_get(0).doing(doing)).collect()
}

/// Rows as they come: the server is asked for more only as they are taken, so that a few of them are in memory.
pub(super) async fn documents<C: GenericClient>(
    client: &C,
    doing: &'static str,
    statement: &str,
    values: &[&(dyn ToSql + Sync)],
) -> Result<impl Stream<Item = Result<Document>> + use<C>> {
    let rows = client.query_raw(statement, values.iter().copied()).await.doing(doing)?;
    Ok(rows.map(move |row| row.and_then(|row| row.try_get(0)).doing(doing).map(|Json(document)| document)))
}

pub(super) fn unsigned(function: &str, count: i64) -> Result<u64> {
    u64::try_from(count)
        .map_err(|_| Error::failed(format!("{function}() returned {count}, which is no count")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_negative_count_is_an_error() {
        assert!(unsigned("expire_tokens", -1).is_err());
        assert_eq!(unsigned("expire_tokens", 3).unwrap(), 3);
    }
}
