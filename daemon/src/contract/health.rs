//! The state of the deployment, and of our own role, as the database sees them.

use tokio_postgres::GenericClient;

use crate::error::{Doing as _, Result};

/// A row of `tollgate.deployment_health`.
#[derive(Clone, Debug, PartialEq)]
pub struct Health {
    pub aspect: String,
    pub severity: String,
    pub detail: String,
    pub remedy: Option<String>,
}

/// Problems that the database sees; a transaction or a delay counts once it lasts longer than `patience`.
pub async fn deployment_health(
    client: &impl GenericClient,
    patience: std::time::Duration,
) -> Result<Vec<Health>> {
    const DOING: &str = "look at the health of the deployment";
    let rows = client
        .query(
            "select aspect, severity, detail, remedy from tollgate.deployment_health(make_interval(secs => $1))",
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
                remedy: row.try_get(3).doing(DOING)?,
            })
        })
        .collect()
}

/// What our role holds of a capability: a row of `tollgate.list_own_capabilities`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnCapability {
    pub name: String,
    pub held: Held,
    /// Functions and views.
    pub missing: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Held {
    Whole,
    Partly,
    Not,
}

pub async fn own_capabilities(client: &impl GenericClient) -> Result<Vec<OwnCapability>> {
    const DOING: &str = "look up our capabilities";
    let rows = client
        .query("select capability, held, missing from tollgate.list_own_capabilities()", &[])
        .await
        .doing(DOING)?;
    rows.iter()
        .map(|row| {
            let held = match row.try_get::<_, &str>(1).doing(DOING)? {
                "whole" => Held::Whole,
                "partly" => Held::Partly,
                _ => Held::Not,
            };
            Ok(OwnCapability {
                name: row.try_get(0).doing(DOING)?,
                held,
                missing: row.try_get(2).doing(DOING)?,
            })
        })
        .collect()
}
