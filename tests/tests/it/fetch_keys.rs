//! The daemon fetches the keys of trusted issuers: of real ones, whose rotation it follows, and of those that misbehave, of which
//! nothing is taken.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead as _, BufReader, Lines, Write as _};
use std::net::SocketAddr;
use std::os::unix::fs::symlink;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use jiff::Timestamp;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tollgate_core::jws;
use tollgate_core::signature::{Algorithm, SigningKey};
use tollgate_tests::{Cluster, Tollgated, eventually_async};

use crate::commands::{NO, OK, failure, fed, json_of, printed};
use crate::common::{self, Shared, value};
use crate::drivers::{fetched, source};
use crate::operator::{Db, GRANTS};
use crate::web::{LONG, eventually_measures, metrics, run};

static SHARED: Shared = Shared::new(&[]);

const ALLOW: &str = "--issuer-allow=127.0.0.0/8,::1/128";
const AUDIENCE: &str = "https://api.test";

/// What the daemon needs to fetch keys, beside what it needs anyway.
fn let_fetch(db: &Db) -> Result<()> {
    db.cluster.execute(&db.name, &GRANTS.replace("'operator'", "'key_fetcher'"))
}

async fn db(name: &str) -> Result<Db> {
    let db = Db::create(&SHARED.cluster()?, name).await?;
    let_fetch(&db)?;
    Ok(db)
}

/// A key of an issuer.
struct Key {
    kid: &'static str,
    key: SigningKey,
}

impl Key {
    fn new(kid: &'static str) -> Result<Self> {
        Self::of(kid, Algorithm::Es256)
    }

    fn of(kid: &'static str, algorithm: Algorithm) -> Result<Self> {
        Ok(Self { kid, key: SigningKey::generate(algorithm)? })
    }

    fn jwk(&self) -> String {
        self.key.public_key().to_jwk(self.kid)
    }

    /// A token of ann's.
    fn sign(&self, issuer: &str) -> Result<String> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
        let claims = json!({
            "iss": issuer, "sub": "ann", "aud": AUDIENCE, "iat": now, "exp": now + 600, "scope": "posts:read other",
        });
        Ok(jws::sign(&self.key, self.kid, "JWT", &claims.to_string())?)
    }
}

fn key_set(keys: &[&Key]) -> String {
    format!("{{\"keys\": [{}]}}", keys.iter().map(|key| key.jwk()).collect::<Vec<_>>().join(", "))
}

/// How an address is answered.
#[derive(Clone, Debug)]
enum Reply {
    Answer {
        status: u16,
        headers: String,
        body: Vec<u8>,
    },
    /// Never.
    Hang,
    /// With a byte of the body each second.
    Drip,
    /// With a head, or a body, that has no end.
    EndlessHead,
    EndlessBody,
}

fn answer(status: u16, headers: &str, body: impl Into<Vec<u8>>) -> Reply {
    Reply::Answer { status, headers: headers.to_owned(), body: body.into() }
}

fn json(body: impl Into<Vec<u8>>) -> Reply {
    answer(200, "Content-Type: application/json\r\n", body)
}

/// Issuers, each below a path of its own; what is not served is 404.
struct Issuers {
    address: SocketAddr,
    replies: Arc<Mutex<BTreeMap<String, Reply>>>,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Issuers {
    async fn start() -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let started =
            Self { address: listener.local_addr()?, replies: Arc::default(), asked: Arc::default() };
        let (replies, asked) = (started.replies.clone(), started.asked.clone());
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let (replies, asked) = (replies.clone(), asked.clone());
                tokio::spawn(async move { drop(converse(socket, &replies, &asked).await) });
            }
        });
        Ok(started)
    }

    fn issuer(&self, name: &str) -> String {
        format!("http://{}/{name}", self.address)
    }

    fn serve(&self, path: &str, reply: Reply) {
        self.replies.lock().unwrap_or_else(PoisonError::into_inner).insert(path.to_owned(), reply);
    }

    /// The discovery document of an issuer, whose keys are at `/{name}/keys`.
    fn serve_discovery(&self, name: &str) {
        let issuer = self.issuer(name);
        let document = json!({ "issuer": issuer, "jwks_uri": format!("{issuer}/keys") });
        self.serve(&format!("/{name}/.well-known/openid-configuration"), json(document.to_string()));
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

async fn converse(
    socket: TcpStream,
    replies: &Mutex<BTreeMap<String, Reply>>,
    asked: &Mutex<Vec<String>>,
) -> Result<()> {
    let mut socket = tokio::io::BufReader::new(socket);
    let mut line = String::new();
    socket.read_line(&mut line).await?;
    let path =
        line.strip_prefix("GET ").and_then(|rest| rest.split(' ').next()).context(line.clone())?.to_owned();
    while !line.trim_end().is_empty() {
        line.clear();
        socket.read_line(&mut line).await?;
    }
    asked.lock().unwrap_or_else(PoisonError::into_inner).push(path.clone());
    let reply = replies.lock().unwrap_or_else(PoisonError::into_inner).get(&path).cloned();
    let filler = vec![b' '; 64 * 1024];
    match reply.unwrap_or_else(|| answer(404, "", "")) {
        Reply::Answer { status, headers, body } => {
            let head = format!("HTTP/1.1 {status} x\r\nContent-Length: {}\r\n{headers}\r\n", body.len());
            socket.write_all(head.as_bytes()).await?;
            socket.write_all(&body).await?;
        }
        Reply::Hang => {
            line.clear();
            socket.read_line(&mut line).await?;
        }
        Reply::Drip => {
            socket
                .write_all(b"HTTP/1.1 200 x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n")
                .await?;
            loop {
                socket.write_all(b" ").await?;
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
        Reply::EndlessHead => {
            socket.write_all(b"HTTP/1.1 200 x\r\nX-Long: ").await?;
            loop {
                socket.write_all(&filler).await?;
            }
        }
        Reply::EndlessBody => {
            let head =
                b"HTTP/1.1 200 x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n";
            socket.write_all(head).await?;
            loop {
                socket.write_all(b"10000\r\n").await?;
                socket.write_all(&filler).await?;
                socket.write_all(b"\r\n").await?;
            }
        }
    }
    Ok(())
}

/// Trusts an issuer, whose users begin with the name, with further arguments in SQL.
async fn trust(db: &Db, issuer: &str, name: &str, arguments: &str) -> Result<()> {
    let call = format!(
        "select tollgate.trust_issuer($1, $2, '{{{AUDIENCE}}}', scopes => '{{posts:read}}'{arguments})"
    );
    db.owner.execute(&call, &[&issuer, &format!("{name}:")]).await?;
    Ok(())
}

/// A row of `tollgate.trusted_issuers`.
#[derive(Debug)]
struct State {
    kids: Vec<String>,
    failures: i32,
    problem: String,
    fetched_at: Option<Timestamp>,
    problem_at: Option<Timestamp>,
}

async fn state(db: &Db, issuer: &str) -> Result<State> {
    let query = "select kids, failures, coalesce(problem, '') as problem, fetched_at, problem_at
                 from tollgate.trusted_issuers where issuer = $1";
    let row = db.operator.query_one(query, &[&issuer]).await?;
    Ok(State {
        kids: row.get("kids"),
        failures: row.get("failures"),
        problem: row.get("problem"),
        fetched_at: row.get("fetched_at"),
        problem_at: row.get("problem_at"),
    })
}

async fn eventually_has(db: &Db, issuer: &str, kids: &[&str]) {
    eventually_async(LONG, &format!("the keys {kids:?} of {issuer}"), async || {
        state(db, issuer).await.unwrap().kids == kids
    })
    .await;
}

/// The code, and the user if it is valid.
async fn verify(db: &Db, token: &str) -> Result<(String, Option<String>)> {
    let query =
        "select code, case when valid then user_id end from tollgate.verify_access_token($1, '{posts:read}')";
    let row = db.owner.query_one(query, &[&token]).await?;
    Ok((row.get(0), row.get(1)))
}

async fn refuses(db: &Db, token: &str) -> Result<()> {
    ensure!(verify(db, token).await? == ("UNKNOWN_KEY".to_owned(), None), "{:?}", verify(db, token).await?);
    Ok(())
}

async fn accepts(db: &Db, token: &str, user: &str) -> Result<()> {
    let found = verify(db, token).await?;
    ensure!(found == ("VALID".to_owned(), Some(user.to_owned())), "{found:?}");
    Ok(())
}

/// Has more than the minute go by in which no unknown key makes an issuer due.
async fn pass_a_minute(db: &Db) -> Result<()> {
    db.owner.batch_execute("update tollgate.issuers set tried_at = tried_at - interval '2 minutes'").await?;
    Ok(())
}

#[tokio::test]
async fn keys_are_found_by_discovery_and_followed_on_an_unknown_kid_and_with_age() -> Result<()> {
    let db = db("rotated").await?;
    let issuers = Issuers::start().await?;
    let issuer = issuers.issuer("a");
    let (first, second, third) = (Key::new("first")?, Key::new("second")?, Key::new("third")?);
    issuers.serve_discovery("a");
    issuers.serve("/a/keys", json(key_set(&[&first])));
    let (daemon, address) = run(&db.url(), &[ALLOW]).await?;
    trust(&db, &issuer, "a", "").await?;
    eventually_has(&db, &issuer, &["first"]).await;
    accepts(&db, &first.sign(&issuer)?, "a:ann").await?;
    assert_eq!(issuers.asked(), ["/a/.well-known/openid-configuration", "/a/keys"]);

    issuers.serve("/a/keys", answer(200, "Content-Type: application/jwk-set+json\r\n", key_set(&[&second])));
    pass_a_minute(&db).await?;
    refuses(&db, &second.sign(&issuer)?).await?;
    eventually_has(&db, &issuer, &["second"]).await;
    accepts(&db, &second.sign(&issuer)?, "a:ann").await?;
    refuses(&db, &first.sign(&issuer)?).await?;

    // That the first one is unknown by now does not have the issuer asked within a minute; its age does.
    assert_eq!(issuers.asked().len(), 4);
    issuers.serve("/a/keys", json(key_set(&[&second, &third])));
    db.owner.batch_execute("update tollgate.issuers set due_at = now()").await?;
    eventually_has(&db, &issuer, &["second", "third"]).await;
    assert_eq!(issuers.asked().len(), 6);
    // Logged once it is recorded.
    for why in ["new", "unknown key", "age"] {
        let is_logged = async || daemon.log().contains(&format!("\"why\":\"{why}\""));
        eventually_async(LONG, why, is_logged).await;
    }
    eventually_measures(address, &format!("tollgate_issuer_keys{{issuer=\"{issuer}\"}}"), |keys| keys == 2.0)
        .await;
    let page = metrics(address).await?;
    assert!(page[&format!("tollgate_issuer_keys_fetched_timestamp_seconds{{issuer=\"{issuer}\"}}")] > 1.7e9);
    assert_eq!(page["tollgated_key_fetches_total{outcome=\"fetched\"}"], 3.0);
    Ok(())
}

#[tokio::test]
async fn of_an_issuer_that_misbehaves_nothing_is_taken_and_no_other_waits_for_it() -> Result<()> {
    let db = db("misbehaving").await?;
    let issuers = Issuers::start().await?;
    let (good, other) = (Key::new("good")?, Key::new("other")?);
    let closed = TcpListener::bind("127.0.0.1:0").await?.local_addr()?;
    let elsewhere = format!("Location: {}\r\n", issuers.issuer("elsewhere"));
    let private: Value = serde_json::from_str(&good.jwk())?;
    let private =
        json!({ "keys": [private, { "kty": "EC", "crv": "P-256", "kid": "x", "d": "AA" }] }).to_string();
    let symmetric = r#"{"keys": [{"kty": "oct", "kid": "x", "alg": "HS256", "k": "c2VjcmV0"}]}"#;
    let many = format!("{{\"keys\": [{}]}}", vec!["{}"; 10_000].join(","));
    let html = "<html>Sign in</html>";
    let discovery = |name: &str, issuer: &str, jwks_uri: &str| {
        let document = json!({ "issuer": issuer, "jwks_uri": jwks_uri }).to_string();
        issuers.serve(&format!("/{name}/.well-known/openid-configuration"), json(document));
    };
    // What is served as the key set, and what is said of it.
    let cases = [
        ("hangs", Reply::Hang, "no whole answer within 5s"),
        ("drips", Reply::Drip, "no whole answer within 5s"),
        ("head", Reply::EndlessHead, "the connection broke"),
        ("endless", Reply::EndlessBody, "longer than 256 kB"),
        ("huge", json(vec![b' '; 300_000]), "longer than 256 kB"),
        ("fails", answer(500, "", ""), "the issuer answered 500"),
        ("redirects", answer(302, &elsewhere, ""), "redirects are not followed"),
        ("html", answer(200, "Content-Type: text/html\r\n", html), "not of a JSON content type"),
        ("pretends", json(html), "not a JSON object"),
        (
            "compressed",
            answer(200, "Content-Type: application/json\r\nContent-Encoding: gzip\r\n", ""),
            "compressed",
        ),
        ("latin", json(b"{\"keys\": [\"\xe9\"]}".to_vec()), "not UTF-8"),
        ("oct", json(symmetric), "must never be published"),
        ("private", json(private), "must never be published"),
        ("algorithm", json(key_set(&[&Key::of("good", Algorithm::EdDsa)?])), "not accepted"),
        ("many", json(many), "at most"),
        ("twice", json(key_set(&[&good, &Key::new("good")?])), "same"),
        ("empty", json("{\"keys\": []}"), "empty"),
    ];
    let mut all: Vec<(&str, &str)> = Vec::new();
    for (name, reply, words) in &cases {
        issuers.serve(&format!("/{name}/keys"), reply.clone());
        issuers.serve_discovery(name);
        all.push((*name, *words));
    }
    // What is wrong with the discovery document.
    for (name, words) in [
        ("wrong", "another one"),
        ("inside", "not a public one"),
        ("plain", "https"),
        ("down", "could not connect"),
    ] {
        issuers.serve(&format!("/{name}/keys"), json(key_set(&[&other])));
        all.push((name, words));
    }
    discovery("wrong", &issuers.issuer("html"), &format!("{}/keys", issuers.issuer("wrong")));
    discovery("inside", &issuers.issuer("inside"), "https://169.254.169.254/keys");
    discovery("plain", &issuers.issuer("plain"), "http://1.1.1.1/keys");
    discovery("down", &issuers.issuer("down"), &format!("http://{closed}/keys"));
    issuers.serve_discovery("well");
    // As Keycloak has it, a key for encryption beside the others.
    let encrypts = r#"{"kty": "RSA", "kid": "x", "use": "enc", "alg": "RSA-OAEP", "e": "AQAB", "n": "AQAB"}"#;
    issuers.serve("/well/keys", json(format!("{{\"keys\": [{encrypts}, {}]}}", other.jwk())));

    // Each had a good key until now; the one that is well waits for the others' turn.
    let store = "select tollgate.store_issuer_keys($1, $2)";
    for name in all.iter().map(|(name, _)| *name).chain(["well"]) {
        trust(&db, &issuers.issuer(name), name, ", algorithms => '{ES256}'").await?;
        db.operator.execute(store, &[&issuers.issuer(name), &key_set(&[&good])]).await?;
    }
    db.owner.batch_execute("update tollgate.issuers set due_at = now()").await?;
    let (daemon, address) = run(&db.url(), &[ALLOW]).await?;
    for (name, words) in &all {
        let issuer = issuers.issuer(name);
        eventually_async(LONG, &format!("{name} to fail"), async || {
            state(&db, &issuer).await.unwrap().failures > 0
        })
        .await;
        let state = state(&db, &issuer).await?;
        assert!(!state.problem.is_empty() && state.problem.contains(words), "{name}: {state:?}");
        assert_eq!(state.kids, ["good"], "{name}");
        accepts(&db, &good.sign(&issuer)?, &format!("{name}:ann"))
            .await
            .with_context(|| (*name).to_owned())?;
        eventually_async(LONG, &format!("{name} to be logged"), async || {
            daemon.log().lines().any(|line| line.contains(&format!("{issuer}\"")) && line.contains(words))
        })
        .await;
    }
    let well = issuers.issuer("well");
    eventually_has(&db, &well, &["other"]).await;
    let (well, hangs) = (state(&db, &well).await?, state(&db, &issuers.issuer("hangs")).await?);
    assert_eq!(well.problem, "");
    assert!(well.fetched_at < hangs.problem_at, "it waited for another: {well:?} {hangs:?}");
    assert!(!issuers.asked().contains(&"/elsewhere".to_owned()), "a redirect was followed");
    let failures = format!("tollgate_issuer_fetch_failures{{issuer=\"{}\"}}", issuers.issuer("hangs"));
    eventually_measures(address, &failures, |failures| failures >= 1.0).await;
    assert!(metrics(address).await?["tollgated_key_fetches_total{outcome=\"failed\"}"] >= all.len() as f64);
    Ok(())
}

#[tokio::test]
async fn nothing_is_asked_inside_unless_it_was_allowed() -> Result<()> {
    let db = db("fetched_inside").await?;
    let issuers = Issuers::start().await?;
    let port = issuers.address.port();
    let names = ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "10.0.0.1", "169.254.169.254"];
    for (number, host) in names.iter().enumerate() {
        trust(&db, &format!("http://{host}:{port}/a"), &format!("n{number}"), "").await?;
    }
    let (_daemon, _) = run(&db.url(), &["--issuer-allow=192.0.2.0/24"]).await?;
    eventually_async(LONG, "all to be refused", async || {
        let refused = "select count(*) from tollgate.trusted_issuers where problem like '%not a public one%'";
        value::<i64>(&db.owner, refused).await.unwrap() == names.len() as i64
    })
    .await;
    assert!(issuers.asked().is_empty());
    Ok(())
}

/// What `check` finds about issuers.
fn findings(db: &Db) -> Result<Vec<Value>> {
    let output = Tollgated::run(&db.url(), &["check", "--json"])?;
    let report: Value = serde_json::from_slice(&output.stdout)?;
    let all = report["findings"].as_array().context("findings")?;
    Ok(all.iter().filter(|finding| finding["name"] == "issuers").cloned().collect())
}

#[tokio::test]
async fn a_daemon_without_the_capability_says_so_and_check_prints_the_grant() -> Result<()> {
    // Of its own, for what the server logs.
    let db = Db::only(&Arc::new(common::start(Cluster::builder())?)).await?;
    let issuers = Issuers::start().await?;
    let key = Key::new("good")?;
    issuers.serve_discovery("a");
    issuers.serve("/a/keys", json(key_set(&[&key])));
    let (daemon, _) = run(&db.url(), &[ALLOW]).await?;
    let report = "select coalesce(max(tasks -> 'fetch_keys' ->> 'note'), '') from tollgate.daemons";
    eventually_async(LONG, "a report", async || {
        value::<i64>(&db.owner, "select count(*) from tollgate.daemons").await.unwrap() == 1
    })
    .await;
    assert_eq!(value::<String>(&db.owner, report).await?, "", "nothing is to be fetched");

    trust(&db, &issuers.issuer("a"), "a", "").await?;
    eventually_async(LONG, "the daemon to say so", async || {
        daemon.log().contains("lacks the capability key_fetcher")
    })
    .await;
    assert!(!db.cluster.log().contains("permission denied"), "{}", db.cluster.log());
    let found = findings(&db)?;
    assert!(found.iter().all(|finding| finding["verdict"] == "fail"), "{found:?}");
    assert!(
        found
            .iter()
            .any(|finding| finding["detail"].as_str().is_some_and(|text| text.contains("never fetched"))),
        "{found:?}"
    );
    let grant =
        found.iter().find_map(|finding| finding["remedy"].as_str().filter(|text| text.starts_with("SELECT")));
    db.owner.batch_execute(grant.context("a statement")?).await?;
    eventually_has(&db, &issuers.issuer("a"), &["good"]).await;
    let found = findings(&db)?;
    assert!(matches!(&found[..], [finding] if finding["verdict"] == "ok"), "{found:?}");
    // Keys that are old, because none fetches them any more.
    db.owner.batch_execute("update tollgate.issuers set fetched_at = now() - interval '3 hours', due_at = now() + interval '1 hour'").await?;
    let old =
        "select detail from tollgate.deployment_health() where aspect = 'issuers' and severity = 'warn'";
    let old: String = value(&db.operator, old).await?;
    assert!(old.contains("last fetched 03:00"), "{old}");
    Ok(())
}

// The issuer answers while a command is waited for.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn issuers_are_trusted_fetched_and_distrusted_by_the_command_line() -> Result<()> {
    let db = db("by_command").await?;
    db.cluster.execute(
        &db.name,
        "create role issuers_boss login; select tollgate.grant_capability('issuers_boss', 'admin')",
    )?;
    let boss = db.cluster.url("issuers_boss", &db.name);
    let issuers = Issuers::start().await?;
    let (given, fetched) = (Key::new("given")?, Key::new("fetched")?);
    let issuer = issuers.issuer("a");
    assert!(printed(&boss, &["issuer", "list"], OK).contains("no issuer is trusted"));
    assert!(printed(&db.url(), &["issuer", "fetch"], OK).contains("no issuer is due"));

    let trust = [
        "issuer",
        "trust",
        issuer.as_str(),
        "--user-prefix",
        "a:",
        "--audience",
        AUDIENCE,
        "--scope",
        "posts:read",
    ];
    let output = fed(&boss, &[&trust[..], &["--jwks", "-"]].concat(), key_set(&[&given]).as_bytes())?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    accepts(&db, &given.sign(&issuer)?, "a:ann").await?;
    let listed = json_of(&boss, &["issuer", "list"], OK);
    assert_eq!(
        (&listed[0]["issuer"], &listed[0]["keys_from"], &listed[0]["kids"]),
        (&json!(issuer), &json!("given"), &json!(["given"]))
    );

    // Again, with its keys from an address; which is down at first.
    let address = format!("{issuer}/keys");
    let more = [
        "--jwks-url",
        address.as_str(),
        "--required-claims",
        "{\"sub\": \"ann\"}",
        "--max-lifetime",
        "1h",
        "--algorithm",
        "ES256",
        "--scope-claim",
        "scope",
        "--user-claim",
        "sub",
        "--type",
        "JWT,at+jwt",
    ];
    printed(&boss, &[&trust[..], &more].concat(), OK);
    let allow = ["issuer", "fetch", ALLOW];
    assert!(
        printed(&db.url(), &allow, NO).contains("nothing was changed; the key set: the issuer answered 404")
    );
    issuers.serve("/a/keys", json(key_set(&[&fetched])));
    db.owner.batch_execute("update tollgate.issuers set due_at = now()").await?;
    let report = json_of(&db.url(), &allow, OK);
    assert_eq!(report, json!([{ "issuer": issuer, "keys": 1, "problem": null }]));
    accepts(&db, &fetched.sign(&issuer)?, "a:ann").await?;
    refuses(&db, &given.sign(&issuer)?).await?;
    let listed = json_of(&boss, &["issuer", "list"], OK)[0].clone();
    assert_eq!(listed["required_claims"], json!({ "sub": "ann" }));
    assert_eq!((&listed["max_lifetime"], &listed["types"]), (&json!("PT1H"), &json!(["JWT", "at+jwt"])));

    let refused = failure(
        &boss,
        &["issuer", "trust", "https://b.example", "--user-prefix", "a:b:", "--audience", AUDIENCE],
        NO,
    );
    assert!(refused.contains("Option: --user-prefix"), "{refused}");
    let refused = failure(&boss, &allow, NO);
    assert!(refused.contains("key_fetcher"), "{refused}");
    printed(&boss, &["issuer", "distrust", &issuer, "--reason", "moved"], OK);
    printed(&boss, &["issuer", "distrust", &issuer], NO);
    assert_eq!(verify(&db, &fetched.sign(&issuer)?).await?.0, "UNTRUSTED_ISSUER");
    Ok(())
}

/// An identity provider from npm: see tests/drivers/node/issuer.mjs.
struct Provider {
    process: Child,
    commands: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
    _directory: TempDir,
}

impl Provider {
    fn start(name: &str) -> Result<(Self, String)> {
        let (directory, node) = (tempfile::tempdir()?, fetched("node")?);
        symlink(node.join("node_modules"), directory.path().join("node_modules"))?;
        fs::copy(source("node/issuer.mjs"), directory.path().join("issuer.mjs"))?;
        let mut command = Command::new(node.join("node"));
        command.arg(directory.path().join("issuer.mjs")).arg(name);
        let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let commands = process.stdin.take().context("piped")?;
        let answers = BufReader::new(process.stdout.take().context("piped")?).lines();
        let mut started = Self { process, commands, answers, _directory: directory };
        let issuer = started.answer()?;
        Ok((started, issuer))
    }

    fn answer(&mut self) -> Result<String> {
        for line in self.answers.by_ref() {
            if let Some(answer) = line?.strip_prefix("> ") {
                return Ok(answer.to_owned());
            }
        }
        anyhow::bail!("it ended")
    }

    fn ask(&mut self, command: &str) -> Result<String> {
        writeln!(self.commands, "{command}")?;
        self.answer()
    }
}

impl Drop for Provider {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[tokio::test]
async fn tokens_of_real_providers_are_accepted_and_their_rotation_is_followed() -> Result<()> {
    let db = db("providers").await?;
    let (_daemon, _) = run(&db.url(), &[ALLOW]).await?;
    for name in ["oidc-provider", "oauth2-mock-server"] {
        let (mut provider, issuer) = Provider::start(name)?;
        trust(&db, &issuer, name, "").await?;
        eventually_async(LONG, &format!("the keys of {name}"), async || {
            state(&db, &issuer).await.unwrap().kids.len() == 1
        })
        .await;
        let user = format!("{name}:robot");
        accepts(&db, &provider.ask("token")?, &user).await.with_context(|| name.to_owned())?;

        let kid = provider.ask("rotate")?;
        pass_a_minute(&db).await?;
        refuses(&db, &provider.ask("token")?).await?;
        eventually_async(LONG, &format!("the new key of {name}"), async || {
            state(&db, &issuer).await.unwrap().kids.contains(&kid)
        })
        .await;
        accepts(&db, &provider.ask("token")?, &user).await.with_context(|| name.to_owned())?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_keys_of_a_service_account_are_fetched_as_those_of_an_issuer_are() -> Result<()> {
    let db = db("of_services").await?;
    let (issuers, key) = (Issuers::start().await?, Key::new("1")?);
    issuers.serve("/ci/keys", json(key_set(&[&key])));
    let address = format!("{}/keys", issuers.issuer("ci"));
    db.owner
        .batch_execute(
            "select tollgate.create_signing_key(), tollgate.create_service_account('ci', 'n', '{posts:read}')",
        )
        .await?;
    db.owner.execute("select tollgate.set_service_account_keys('ci', jwks_url => $1)", &[&address]).await?;
    let fetched = json_of(&db.url(), &["issuer", "fetch", ALLOW], OK);
    assert_eq!(fetched, json!([{"issuer": "service:ci", "keys": 1, "problem": null}]));
    assert_eq!(issuers.asked(), ["/ci/keys"]);
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    let claims = json!({
        "iss": "ci", "sub": "ci", "aud": "https://tollgate.test", "iat": now, "exp": now + 60, "jti": "1",
    });
    let assertion = jws::sign(&key.key, key.kid, "JWT", &claims.to_string())?;
    let call = "select code from tollgate.client_credentials('ci', assertion => $1)";
    assert_eq!(db.owner.query_one(call, &[&assertion]).await?.get::<_, &str>(0), "VALID");
    Ok(())
}
