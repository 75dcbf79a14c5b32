//! What verifications found and could not write.

use tokio_postgres::GenericClient;

use super::leadership::{Fence, fenced};
use super::query::{one, unsigned};
use crate::error::{Doing as _, Result};

/// What a standby found and cannot write, as it stands in `tollgate.finding[]`: signed, and nothing that we look into.
#[derive(Clone, Debug, PartialEq)]
pub struct Findings(String);

/// `None` if it found nothing.
pub async fn drain_findings(client: &impl GenericClient) -> Result<Option<Findings>> {
    let text: Option<String> = one(
        client,
        "drain findings",
        "select array_agg(f)::text from (select f from tollgate.drain_findings() f limit 1000) f",
        &[],
    )
    .await?;
    Ok(text.map(Findings))
}

/// Has recorded what verifications found and could not write: those of this server, and those of a standby. How many they were.
pub async fn apply_findings(
    client: &impl GenericClient,
    fence: Option<&Fence>,
    findings: Option<&Findings>,
) -> Result<u64> {
    const DOING: &str = "record what verifications found";
    let statement =
        fenced("select tollgate.apply_findings(coalesce($1::text, '{}')::tollgate.finding[])", fence);
    let rows = client.query(&statement, &[&findings.map(|findings| &findings.0)]).await.doing(DOING)?;
    match rows.first() {
        Some(row) => unsigned("apply_findings", row.try_get(0).doing(DOING)?),
        None => Ok(0),
    }
}
