//! The state of the deployment, as the database sees it.

use tokio_postgres::GenericClient;

use crate::error::{Doing as _, Result};

/// A row of `tollgate.deployment_health`.
#[derive(Clone, Debug, PartialEq)]
pub struct Health {
    pub aspect: String,
    pub severity: String,
    pub detail: String,
    pub mend: Option<String>,
}

/// Problems that the database sees; a transaction or a delay counts once it lasts longer than `patience`.
pub async fn deployment_health(
    client: &impl GenericClient,
    patience: std::time::Duration,
) -> Result<Vec<Health>> {
    const DOING: &str = "look at the health of the deployment";
    let rows = client
        .query(
            "select aspect, severity, detail, mend from tollgate.deployment_health(make_interval(secs => $1))",
            &[&patience.as_secs_f64()],
        )
        .await
        .doing(DOING)?;
    rows.iter()
        .map(|row| {
            Ok(Health {
                aspect: row.try_get(0).doing(DOING)?,
                severity: row.try_get(1).doing(DOING)?,
                detail: row.try_get(2).doing(DOING)?,
                mend: row.try_get(3).doing(DOING)?,
            })
        })
        .collect()
}
