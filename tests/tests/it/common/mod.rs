//! Shared by the tests of the extension: one cluster per file, an ordinary role, tokens, and SQL results as Rust
//! values.

pub(crate) mod gateway;

use std::io::Write as _;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tokio_postgres::error::{DbError, SqlState};
use tokio_postgres::{Client, Row};
use tollgate_tests::{Builder, Cluster, DATABASE, eventually_async};
use uuid::Uuid;

/// A cluster that the tests of a file share while any of them runs. The last one to end stops it, which a plain
/// `static` could not do.
pub(crate) struct Shared {
    running: Mutex<Weak<Cluster>>,
    settings: &'static [(&'static str, &'static str)],
}

impl Shared {
    pub(crate) const fn new(settings: &'static [(&'static str, &'static str)]) -> Self {
        Self { running: Mutex::new(Weak::new()), settings }
    }

    pub(crate) fn cluster(&self) -> Result<Arc<Cluster>> {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(cluster) = running.upgrade() {
            return Ok(cluster);
        }
        let builder = self
            .settings
            .iter()
            .fold(Cluster::builder(), |builder, (name, value)| builder.setting(name, value));
        let cluster = Arc::new(start(builder)?);
        *running = Arc::downgrade(&cluster);
        Ok(cluster)
    }

    pub(crate) async fn world(&self) -> Result<World> {
        let cluster = self.cluster()?;
        let connect = async |role| {
            let client = cluster.connect(role, DATABASE).await?;
            anyhow::Ok(Connection { client, _cluster: Arc::clone(&cluster) })
        };
        Ok(World { owner: connect("postgres").await?, web: connect("web").await?, cluster })
    }
}

/// The connections that nearly every test needs.
pub(crate) struct World {
    /// The superuser, which owns the extension.
    pub(crate) owner: Connection,
    /// An application's ordinary role: it verifies and authenticates, and may do nothing else.
    pub(crate) web: Connection,
    pub(crate) cluster: Arc<Cluster>,
}

/// A connection to a shared cluster. The cluster runs as long as any of them is left: a test may take the connections
/// out of its [`World`] and drop the rest.
pub(crate) struct Connection {
    client: Client,
    _cluster: Arc<Cluster>,
}

impl Deref for Connection {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.client
    }
}

impl DerefMut for Connection {
    fn deref_mut(&mut self) -> &mut Client {
        &mut self.client
    }
}

/// Says that the running test, or a part of it, is not run, and why. Not with `eprintln!`, of which the test harness shows
/// nothing while the test passes.
pub(crate) fn not_run(why: &str) {
    let test = std::thread::current().name().unwrap_or("a test").to_owned();
    let _ = std::io::stderr().write_all(format!("NOT RUN: {test}: {why}\n").as_bytes());
}

/// The same, where this machine lacks something. In CI that is a failure.
pub(crate) fn not_run_here(why: &str) -> Result<()> {
    ensure!(std::env::var_os("CI").is_none(), "{why}, and in CI nothing is left out");
    not_run(why);
    Ok(())
}

/// Starts a cluster and prepares its database for tests.
pub(crate) fn start(builder: Builder) -> Result<Cluster> {
    let cluster = builder.start()?;
    cluster.execute(DATABASE, "create role web login")?;
    prepare(&cluster, DATABASE)?;
    Ok(cluster)
}

/// A separate database, for tests that change the extension or the catalogue.
pub(crate) fn database(cluster: &Cluster, name: &str) -> Result<()> {
    cluster.create_database(name)?;
    prepare(cluster, name)
}

/// Grants what a verifying application needs, and defines the scopes that the tests use.
pub(crate) fn prepare(cluster: &Cluster, database: &str) -> Result<()> {
    cluster.execute(
        database,
        "grant execute on function tollgate.verify_api_token, tollgate.verify_api_token_hash, tollgate.authenticate,
             tollgate.token_has_scope(text, text, inet), tollgate.last_refusal to web;
         select tollgate.define_scope(name, 'of the tests') from unnest(
             array['posts:read', 'posts:write', 'posts:comments:read', 'users:read', 'users:write']) name",
    )
}

#[derive(Clone, Debug)]
pub(crate) struct Token {
    pub(crate) id: Uuid,
    pub(crate) token: String,
}

impl Token {
    fn of(row: &Row) -> Self {
        Self { id: row.get("id"), token: row.get("token") }
    }
}

/// Issues a token through the given connection.
pub(crate) async fn issue(client: &Client, user: &str, scopes: &[&str]) -> Result<Token> {
    let row = client
        .query_one("select id, token from tollgate.create_api_token($1, 'a test''s', $2)", &[&user, &scopes])
        .await?;
    Ok(Token::of(&row))
}

/// Issues a token whose further arguments are written out in SQL: `expires_in => '1 second'`.
pub(crate) async fn issue_with(client: &Client, user: &str, arguments: &str) -> Result<Token> {
    let sql = format!(
        "select id, token from tollgate.create_api_token(user_id => $1, name => 'a test''s', {arguments})"
    );
    Ok(Token::of(&client.query_one(&sql, &[&user]).await.with_context(|| arguments.to_owned())?))
}

/// A row of `tollgate.verification`, its time and interval as text.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Verification {
    pub(crate) valid: bool,
    pub(crate) code: String,
    pub(crate) token_id: Option<Uuid>,
    pub(crate) user_id: Option<String>,
    pub(crate) name: Option<String>,
    pub(crate) scopes: Option<Vec<String>>,
    pub(crate) expires_at: Option<String>,
    pub(crate) metadata: Option<Value>,
    pub(crate) rate_limit: Option<i32>,
    pub(crate) rate_remaining: Option<i32>,
    pub(crate) retry_after: Option<String>,
}

impl Verification {
    /// The columns of a row `v` that [`Verification::of`] reads.
    pub(crate) const COLUMNS: &str = "v.valid, v.code, v.token_id, v.user_id, v.name, v.scopes, \
        v.expires_at::text, v.metadata, v.rate_limit, v.rate_remaining, v.retry_after::text";

    pub(crate) fn of(row: &Row) -> Self {
        Self {
            valid: row.get("valid"),
            code: row.get("code"),
            token_id: row.get("token_id"),
            user_id: row.get("user_id"),
            name: row.get("name"),
            scopes: row.get("scopes"),
            expires_at: row.get("expires_at"),
            metadata: row.get("metadata"),
            rate_limit: row.get("rate_limit"),
            rate_remaining: row.get("rate_remaining"),
            retry_after: row.get("retry_after"),
        }
    }
}

/// The arguments of `verify_api_token`.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Request<'a> {
    pub(crate) token: Option<&'a str>,
    pub(crate) required: Option<&'a [Option<&'a str>]>,
    pub(crate) client_ip: Option<&'a str>,
}

impl<'a> Request<'a> {
    pub(crate) fn of(token: &'a str) -> Self {
        Self { token: Some(token), ..Self::default() }
    }

    pub(crate) fn requiring(self, required: &'a [Option<&'a str>]) -> Self {
        Self { required: Some(required), ..self }
    }

    pub(crate) fn coming_from(self, client_ip: &'a str) -> Self {
        Self { client_ip: Some(client_ip), ..self }
    }

    pub(crate) async fn verify(self, client: &Client) -> Result<Verification> {
        let sql = format!(
            "select {} from tollgate.verify_api_token($1, $2, $3::text::inet) v",
            Verification::COLUMNS
        );
        let rows = client.query(&sql, &[&self.token, &self.required, &self.client_ip]).await?;
        anyhow::ensure!(rows.len() == 1, "{} rows instead of one for {self:?}", rows.len());
        Ok(Verification::of(&rows[0]))
    }

    pub(crate) async fn code(self, client: &Client) -> Result<String> {
        Ok(self.verify(client).await?.code)
    }
}

/// The code only, for a token that is presented without scopes and address.
pub(crate) async fn code(client: &Client, token: &str) -> Result<String> {
    Request::of(token).code(client).await
}

/// The identity that the context functions report.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Identity {
    pub(crate) token_id: Uuid,
    pub(crate) user_id: String,
    pub(crate) scopes: Vec<String>,
}

/// `None` without an authenticated token. Fails unless the three functions agree on that.
pub(crate) async fn identity(client: &Client) -> Result<Option<Identity>> {
    let row = client
        .query_one(
            "select tollgate.current_token_id(), tollgate.current_user_id(), tollgate.current_scopes()",
            &[],
        )
        .await?;
    Ok(
        match (
            row.get::<_, Option<Uuid>>(0),
            row.get::<_, Option<String>>(1),
            row.get::<_, Option<Vec<String>>>(2),
        ) {
            (None, None, None) => None,
            (Some(token_id), Some(user_id), Some(scopes)) => Some(Identity { token_id, user_id, scopes }),
            half => anyhow::bail!("half an identity: {half:?}"),
        },
    )
}

/// The user of the context, which most tests check.
pub(crate) async fn current_user(client: &Client) -> Result<Option<String>> {
    Ok(identity(client).await?.map(|identity| identity.user_id))
}

pub(crate) async fn authenticate(client: &Client, token: &str) -> Result<(), tokio_postgres::Error> {
    client.query_one("select valid from tollgate.authenticate($1)", &[&token]).await.map(drop)
}

pub(crate) async fn revoke(client: &Client, id: Uuid) -> Result<bool> {
    Ok(client.query_one("select tollgate.revoke_api_token($1)", &[&id]).await?.get(0))
}

/// In seconds since 1970, as claims have it.
pub(crate) fn now() -> Result<i64> {
    Ok(i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs())?)
}

/// Claims with some replaced; null removes one.
pub(crate) fn changed(mut claims: Value, changes: &Value) -> Result<Value> {
    let all = claims.as_object_mut().context("an object")?;
    for (name, value) in changes.as_object().context("an object")? {
        match value {
            Value::Null => all.remove(name),
            value => all.insert(name.clone(), value.clone()),
        };
    }
    Ok(claims)
}

/// The first column of the only row.
pub(crate) async fn value<T>(client: &Client, sql: &str) -> Result<T>
where
    T: for<'a> tokio_postgres::types::FromSql<'a>,
{
    Ok(client.query_one(sql, &[]).await.with_context(|| format!("in: {sql}"))?.try_get(0)?)
}

/// Waits until another session waits for a lock of this one.
pub(crate) async fn wait_until_blocked(holder: &Client) -> Result<()> {
    let own: i32 = value(holder, "select pg_backend_pid()").await?;
    let blocked = format!("select count(*) from pg_stat_activity where {own} = any (pg_blocking_pids(pid))");
    eventually_async(Duration::from_secs(10), "the other session to wait", async || {
        value::<i64>(holder, &blocked).await.is_ok_and(|count| count > 0)
    })
    .await;
    Ok(())
}

/// The server's error; panics if there was none.
#[track_caller]
pub(crate) fn error<T>(result: Result<T, tokio_postgres::Error>) -> DbError {
    match result {
        Ok(_) => panic!("this should have been refused"),
        Err(error) => error.as_db_error().unwrap_or_else(|| panic!("not the server's: {error}")).clone(),
    }
}

/// The server's error, which has this SQLSTATE.
#[track_caller]
pub(crate) fn refused<T>(result: Result<T, tokio_postgres::Error>, code: &SqlState) -> DbError {
    let error = error(result);
    assert_eq!(error.code(), code, "{error:?}");
    error
}

/// Everything that a client sees of an error.
pub(crate) fn text_of(error: &DbError) -> String {
    [Some(error.message()), error.detail(), error.hint(), error.where_()]
        .into_iter()
        .flatten()
        .collect::<Vec<_>>()
        .join("\n")
}

/// The events of a token in their order, with their details.
pub(crate) async fn history(owner: &Client, token: Uuid) -> Result<Vec<(String, Value)>> {
    let log = "select event, detail from tollgate.audit_log where token_id = $1 order by id";
    Ok(owner.query(log, &[&token]).await?.iter().map(|row| (row.get(0), row.get(1))).collect())
}

/// Derives a token with the given scopes, which ends with its parent.
pub(crate) async fn derive(
    client: &Client,
    parent: &Token,
    scopes: &[&str],
) -> Result<Token, tokio_postgres::Error> {
    let call = "select id, token from tollgate.derive_api_token($1, 'derived', $2, null)";
    Ok(Token::of(&client.query_one(call, &[&parent.token, &scopes]).await?))
}

/// A token after `tollgate.rotate_api_token` with further arguments in SQL: `, '1 hour'`.
pub(crate) async fn rotate(client: &Client, id: Uuid, grace: &str) -> Result<Token, tokio_postgres::Error> {
    let call = format!("select id, token from tollgate.rotate_api_token($1, '{grace}')");
    Ok(Token::of(&client.query_one(&call, &[&id]).await?))
}

pub(crate) async fn update(client: &Client, id: Uuid, changes: &Value) -> Result<(), tokio_postgres::Error> {
    client.execute("select tollgate.update_api_token($1, $2)", &[&id, changes]).await.map(drop)
}

pub(crate) async fn enable(client: &Client, id: Uuid, enabled: bool) -> Result<bool, tokio_postgres::Error> {
    let call = "select tollgate.set_api_token_enabled($1, $2, 'a test')";
    Ok(client.query_one(call, &[&id, &enabled]).await?.get(0))
}
