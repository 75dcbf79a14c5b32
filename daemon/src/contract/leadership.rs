//! Which daemon leads which task, and the fence that keeps a former leader from writing.

use std::collections::BTreeMap;

use tokio_postgres::GenericClient;

use crate::error::{Doing as _, Result};

/// By what the server distinguishes the present leader of a task from those before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fence {
    pub task: &'static str,
    pub number: i64,
}

/// The fence of each of these tasks that this session leads from now on; `None` while another does.
pub async fn acquire_leadership(
    client: &impl GenericClient,
    tasks: &[String],
) -> Result<BTreeMap<String, Option<i64>>> {
    const DOING: &str = "ask for leadership";
    let rows = client
        .query("select t, tollgate.acquire_leadership(t) from unnest($1::text[]) t", &[&tasks])
        .await
        .doing(DOING)?;
    rows.iter().map(|row| Ok((row.try_get(0).doing(DOING)?, row.try_get(1).doing(DOING)?))).collect()
}

/// A SELECT without FROM, which fails instead of calling its functions if another daemon leads by now. A person who runs a
/// command leads nothing, and fences nothing.
pub(super) fn fenced(select: &str, fence: Option<&Fence>) -> String {
    match fence {
        None => select.to_owned(),
        Some(Fence { task, number }) => {
            format!("{select} where tollgate.check_leadership('{task}', {number})")
        }
    }
}
