//! The audit log: purging and sealing it.

use postgres_types::Json;
use tokio_postgres::GenericClient;

use super::document::Document;
use super::leadership::{Fence, fenced};
use super::query::{one, unsigned};
use crate::error::{Doing as _, Result};

/// Removes sealed events of the audit log that are older than the retention, whole stretches of at least `max_events` together if
/// there are as many, and says how many.
pub async fn purge_audit_log(
    client: &impl GenericClient,
    fence: Option<&Fence>,
    retention: std::time::Duration,
    max_events: i32,
) -> Result<u64> {
    let count = one(
        client,
        "delete old events of the audit log",
        &fenced("select tollgate.purge_audit_log(now() - make_interval(secs => $1), $2)", fence),
        &[&retention.as_secs_f64(), &max_events],
    )
    .await?;
    unsigned("purge_audit_log", count)
}

/// What a call of `seal_audit_log` did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sealed {
    pub events: u64,
    /// Number and hash of the seal; `None` if there was nothing to seal.
    pub seal: Option<(i64, Vec<u8>)>,
}

/// Seals the next stretch of the event log, of about `batch_size` events at most.
pub async fn seal_audit_log(
    client: &impl GenericClient,
    fence: Option<&Fence>,
    batch_size: i32,
) -> Result<Sealed> {
    const DOING: &str = "seal the event log";
    let call = fenced("select tollgate.seal_audit_log($1) as sealed", fence);
    // OFFSET, or it would be called once for each column.
    let statement = format!("select (sealed).events, (sealed).seal, (sealed).hash from ({call} offset 0) s");
    let row = client.query_one(&statement, &[&batch_size]).await.doing(DOING)?;
    let (seal, hash): (Option<i64>, Option<Vec<u8>>) =
        (row.try_get(1).doing(DOING)?, row.try_get(2).doing(DOING)?);
    Ok(Sealed { events: unsigned("seal_audit_log", row.try_get(0).doing(DOING)?)?, seal: seal.zip(hash) })
}

/// `tollgate.audit_verification`, its hash in hexadecimal digits.
pub async fn verify_audit_log(
    client: &impl GenericClient,
    known_seal: Option<i64>,
    known_hash: Option<&[u8]>,
) -> Result<Document> {
    let Json(verification) = one(
        client,
        "verify the audit log",
        "select to_jsonb(v) || jsonb_build_object('last_hash', encode(v.last_hash, 'hex')) \
         from tollgate.verify_audit_log($1, $2) v",
        &[&known_seal, &known_hash],
    )
    .await?;
    Ok(verification)
}
