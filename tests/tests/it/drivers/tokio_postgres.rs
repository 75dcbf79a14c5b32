//! As docs/drivers.md shows it.

use std::net::IpAddr;

use tokio_postgres::types::Type;
use tokio_postgres::{Client, Error};

/// The status to answer with and why, as a JSON object, if Tollgate refused the token; `None` for any other error.
pub fn refusal(error: &Error) -> Option<(u16, &str)> {
    let error = error.as_db_error()?;
    let detail = error.detail().filter(|detail| detail.starts_with('{'))?;
    match error.code().code() {
        "28000" => Some((401, detail)),
        "42501" => Some((403, detail)),
        "53400" => Some((429, detail)),
        _ => None,
    }
}

pub async fn posts(client: &mut Client, token: &str, client_ip: IpAddr) -> Result<Vec<String>, Error> {
    let transaction = client.transaction().await?;
    // query_typed prepares nothing by name, so it suits every pooler.
    transaction
        .query_typed(
            "SELECT user_id FROM tollgate.authenticate($1, '{posts:read}', $2)",
            &[(&token, Type::TEXT), (&client_ip, Type::INET)],
        )
        .await?;
    let rows = transaction.query_typed("SELECT title FROM posts ORDER BY id", &[]).await?;
    let titles = rows.iter().map(|row| row.get("title")).collect();
    transaction.commit().await?;
    Ok(titles)
}

pub async fn careless_posts(client: &Client, token: &str) -> Result<(), Error> {
    client.query("SELECT user_id FROM tollgate.authenticate($1)", &[&token]).await?;
    Ok(())
}
