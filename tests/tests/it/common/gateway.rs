//! The HTTP API of a real daemon, whose login has the capability gateway and no other, and a client of it.

use std::net::SocketAddr;

use anyhow::Result;
use tokio_postgres::Client;
use tollgate_tests::{Cluster, Tollgated};

use crate::operator::Db;
use crate::web::{self, Answer};

/// An ordinary role that may do what the HTTP API needs, and nothing else.
pub(crate) const GATEWAY: &str = "gateway_login";

/// Grants that role, which is created at the first call, its capability in a database.
pub(crate) fn grant(cluster: &Cluster, database: &str) -> Result<()> {
    cluster.execute(
        database,
        "do $$ begin
             create role gateway_login login;
         exception when duplicate_object or unique_violation then
             -- Another test was faster.
         end $$;
         select tollgate.grant_capability('gateway_login', 'gateway')",
    )
}

/// A daemon with its API, until it is dropped.
pub(crate) struct Api {
    _daemon: Tollgated,
    address: SocketAddr,
}

impl Api {
    /// For a database of a test. `arguments` are further options of `tollgated run`.
    pub(crate) async fn start(db: &Db, arguments: &[&str]) -> Result<Self> {
        Self::of(&db.cluster, &db.name, arguments).await
    }

    pub(crate) async fn of(cluster: &Cluster, database: &str, arguments: &[&str]) -> Result<Self> {
        grant(cluster, database)?;
        Self::at(&cluster.url("tollgated", database), &cluster.url(GATEWAY, database), arguments).await
    }

    /// With the daemon's own database, and that of the API.
    pub(crate) async fn at(url: &str, gateway_url: &str, arguments: &[&str]) -> Result<Self> {
        let option = format!("--api-database-url={gateway_url}");
        let (daemon, _, address) = web::run_api(url, &[&[option.as_str()], arguments].concat()).await?;
        Ok(Self { _daemon: daemon, address })
    }

    /// GET with header lines.
    pub(crate) async fn get(&self, path: &str, headers: &[&str]) -> Result<Answer> {
        self.send("GET", path, headers, "").await
    }

    /// GET with a credential.
    pub(crate) async fn get_as(&self, token: &str, path: &str) -> Result<Answer> {
        self.get(path, &[&format!("Authorization: Bearer {token}")]).await
    }

    /// The whole answer to a request of any kind; a body gets its length.
    pub(crate) async fn send(
        &self,
        method: &str,
        path: &str,
        headers: &[&str],
        body: &str,
    ) -> Result<Answer> {
        web::send(self.address, method, path, headers, body).await
    }
}

/// Issues a signed token of ours; there must be a signing key.
pub(crate) async fn access_token(owner: &Client, user: &str, scopes: &[&str]) -> Result<String> {
    let call = "select access_token from tollgate.issue_access_token($1, $2)";
    Ok(owner.query_one(call, &[&user, &scopes]).await?.get(0))
}

/// Makes a key that signs at once.
pub(crate) async fn sign(owner: &Client) -> Result<()> {
    Ok(owner.batch_execute("select tollgate.create_signing_key('ES256', '0')").await?)
}

impl Answer {
    #[track_caller]
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).unwrap_or_else(|| panic!("no {name}: {self:?}"))
    }
}
