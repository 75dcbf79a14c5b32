//! What the README and the documents that go on from it show is true: their SQL runs, in order, and answers as shown; their
//! GRANTs let each role do what they are for, and no more; their links lead somewhere, the messages that they quote exist, and
//! nothing but Cargo.toml states the version.

use crate::document;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use tollgate_core::token::{self, ENTROPY_LEN, Prefix};
use tollgate_tests::{Cluster, DATABASE, Tollgated, eventually};

/// In the order in which they are run, in one session: each goes on from those before it.
const DOCUMENTS: [(&str, &str); 12] = [
    ("README.md", include_str!("../../../README.md")),
    ("docs/row-level-security.md", include_str!("../../../docs/row-level-security.md")),
    ("docs/usage.md", include_str!("../../../docs/usage.md")),
    ("docs/security.md", include_str!("../../../docs/security.md")),
    ("docs/drivers.md", include_str!("../../../docs/drivers.md")),
    ("docs/tokens.md", include_str!("../../../docs/tokens.md")),
    ("docs/access-tokens.md", include_str!("../../../docs/access-tokens.md")),
    ("docs/trusted-issuers.md", include_str!("../../../docs/trusted-issuers.md")),
    ("docs/service-accounts.md", include_str!("../../../docs/service-accounts.md")),
    ("docs/token-exchange.md", include_str!("../../../docs/token-exchange.md")),
    ("docs/quotas.md", include_str!("../../../docs/quotas.md")),
    ("docs/signed-urls.md", include_str!("../../../docs/signed-urls.md")),
];

fn blocks() -> Vec<&'static str> {
    DOCUMENTS.iter().flat_map(|(_, text)| document::blocks(text, "sql")).collect()
}

/// A fresh server on which all of the documents' SQL has run, and what each block answered.
fn after_the_documents() -> Result<(Cluster, Vec<Vec<String>>)> {
    let cluster = Cluster::start()?;
    let answers = document::run(&cluster, blocks())?;
    Ok((cluster, answers))
}

#[test]
fn their_sql_runs_in_its_order_and_answers_as_it_shows() -> Result<()> {
    let (_cluster, answers) = after_the_documents()?;
    let blocks = blocks();
    for (name, text) in DOCUMENTS {
        assert!(!document::blocks(text, "sql").is_empty(), "the SQL of {name} was not found");
    }
    assert_eq!(answers.len(), blocks.len());
    for (block, answer) in blocks.iter().zip(&answers) {
        document::assert_answered(block, answer);
    }
    Ok(())
}

/// Each guide, on data in the documented form of the other system.
#[test]
fn the_guides_to_migrating_run_and_answer_as_they_show() -> Result<()> {
    let cluster = Cluster::start()?;
    let blocks = document::blocks(include_str!("../../../docs/migrating.md"), "sql");
    let answers = document::run(&cluster, blocks.iter().copied())?;
    assert!(blocks.len() >= 8 && answers.len() == blocks.len());
    // The first one only sets up the scopes.
    for (block, answer) in blocks.iter().zip(&answers).skip(1) {
        document::assert_answered(block, answer);
    }
    Ok(())
}

#[tokio::test]
async fn its_roles_have_the_capabilities_that_it_says() -> Result<()> {
    let (cluster, _) = after_the_documents()?;
    let owner = cluster.connect("postgres", DATABASE).await?;
    let rows = owner
        .query(
            "select role || ' ' || capability || ' ' || state from tollgate.capability_grants order by 1",
            &[],
        )
        .await?;
    let held: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
    let expected = [
        "app verifier granted",
        "backoffice issuer granted",
        "boss admin granted",
        "tollgated key_fetcher granted",
        "tollgated operator granted",
    ];
    assert_eq!(held, expected);
    Ok(())
}

#[tokio::test]
async fn its_roles_do_their_work() -> Result<()> {
    let (cluster, _) = after_the_documents()?;
    let web = cluster.connect("backoffice", DATABASE).await?;
    let row = web
        .query_one("select id, token from tollgate.create_api_token('dan', 'web', '{posts:read}')", &[])
        .await?;
    let (id, secret): (uuid::Uuid, String) = (row.get(0), row.get(1));
    let listed = web.query("select * from tollgate.list_api_tokens('dan')", &[]).await?;
    assert_eq!(listed.len(), 1);

    let app = cluster.connect("app", DATABASE).await?;
    let verified = app.query_one("select code from tollgate.verify_api_token($1)", &[&secret]).await?;
    assert_eq!(verified.get::<_, &str>(0), "VALID");
    // As PostgREST calls it.
    app.batch_execute("begin read only").await?;
    let headers = serde_json::json!({ "x-api-key": secret }).to_string();
    app.query("select set_config('request.headers', $1, true)", &[&headers]).await?;
    app.query("select public.authenticate_request()", &[]).await?;
    let user = app.query_one("select tollgate.current_user_id()", &[]).await?;
    assert_eq!(user.get::<_, Option<&str>>(0), Some("dan"));
    app.batch_execute("commit; begin read only").await?;
    app.query("select public.authenticate_request()", &[]).await?;
    let user = app.query_one("select tollgate.current_user_id()", &[]).await?;
    assert_eq!(user.get::<_, Option<&str>>(0), None, "a request without a key has no identity");
    app.batch_execute("commit").await?;

    let boss = cluster.connect("boss", DATABASE).await?;
    boss.batch_execute("select tollgate.define_scope('posts:pin', 'Pin posts')").await?;
    boss.batch_execute("select tollgate.drop_scope('posts:pin')").await?;
    let seen = boss.query("select from tollgate.tokens where id = $1", &[&id]).await?;
    assert_eq!(seen.len(), 1);

    let url = cluster.url("tollgated", DATABASE);
    let check = Tollgated::run(&url, &["check"])?;
    assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stdout));
    let daemon = Tollgated::spawn(&url, &["run"])?;
    eventually(Duration::from_secs(30), "the daemon to flush the use of the token", || {
        let uses = format!("select use_count from tollgate.tokens where id = '{id}'");
        // By the application: its verification, and its authentication.
        cluster.value(DATABASE, &uses).is_ok_and(|uses| uses.as_deref() == Some("2"))
    });
    let status = Tollgated::run(&url, &["status"])?;
    assert!(status.status.success(), "{}", String::from_utf8_lossy(&status.stdout));
    daemon.terminate()
}

#[test]
fn after_its_settings_no_token_of_the_application_reaches_the_log() -> Result<()> {
    let (mut cluster, _) = after_the_documents()?;
    // Everything that can be logged is. Only bind values are at stake: a token written into a statement is logged.
    cluster.configure("log_statement", "all")?;
    cluster.configure("log_min_duration_statement", "0")?;
    cluster.configure("log_parameter_max_length", "-1")?;
    cluster.configure("log_parameter_max_length_on_error", "-1")?;
    eventually(Duration::from_secs(10), "the reload", || {
        cluster
            .value(DATABASE, "show log_min_duration_statement")
            .is_ok_and(|value| value.as_deref() == Some("0"))
    });
    cluster.execute(DATABASE, "create role careless login; grant app to careless")?;
    // In the right format, but never issued.
    let issued = token::issue(&Prefix::default(), &[0x5a; ENTROPY_LEN]);
    let (secret, body) = (issued.token(), "5a".repeat(ENTROPY_LEN));

    let present = |role: &str| -> Result<()> {
        let config = cluster.config(role, DATABASE);
        tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
            let (client, connection) = config.connect(tokio_postgres::NoTls).await?;
            tokio::spawn(connection);
            let row = client.query_one("select code from tollgate.verify_api_token($1)", &[&secret]).await?;
            assert_eq!(row.get::<_, &str>(0), "NOT_FOUND");
            let refused = client.query_one("select tollgate.authenticate($1)", &[&secret]).await;
            assert!(refused.is_err(), "this token was never issued");
            anyhow::Ok(())
        })
    };
    present("app")?;
    assert!(cluster.log().contains("tollgate.verify_api_token($1)"), "the server logged the statements");
    assert!(!cluster.log().contains(&body), "the log holds a token");
    present("careless")?;
    assert!(cluster.log().contains(&body), "without the settings it would");
    Ok(())
}

/// The folder of the checkout.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The documents for people, in the root and in docs.
fn documents() -> Result<Vec<(PathBuf, String)>> {
    let mut documents = Vec::new();
    for folder in [root(), root().join("docs")] {
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "md") {
                documents.push((path.clone(), fs::read_to_string(path)?));
            }
        }
    }
    ensure!(documents.len() > 10, "the documents were not found");
    Ok(documents)
}

/// What GitHub and GitLab call a heading in a link.
fn anchor(heading: &str) -> String {
    let kept = heading.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
    kept.collect::<String>().to_lowercase().replace(' ', "-")
}

fn anchors(text: &str) -> Vec<String> {
    let headings = text.lines().filter(|line| line.starts_with('#'));
    headings.map(|line| anchor(line.trim_start_matches('#').trim())).collect()
}

#[test]
fn each_link_leads_to_a_file_and_a_heading() -> Result<()> {
    let mut broken = Vec::new();
    for (path, text) in documents()? {
        for target in
            text.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(target, _)| target)
        {
            if target.starts_with("http") {
                continue;
            }
            let (file, heading) = target.split_once('#').unwrap_or((target, ""));
            let linked = if file.is_empty() { path.clone() } else { path.with_file_name(file) };
            let there = match fs::read_to_string(&linked) {
                Ok(text) => heading.is_empty() || anchors(&text).iter().any(|anchor| anchor == heading),
                Err(_) => heading.is_empty() && linked.exists(),
            };
            if !there {
                broken.push(format!("{}: {target}", path.display()));
            }
        }
    }
    assert!(broken.is_empty(), "{broken:#?}");
    Ok(())
}

#[test]
fn the_readme_is_short() {
    let lines = DOCUMENTS[0].1.lines().count();
    assert!(lines <= 220, "{lines} lines: a subject belongs into a document of its own");
}

/// Files of the repository that are ours, as text.
fn files() -> Result<Vec<(String, String)>> {
    let listed = Command::new("git").current_dir(root()).args(["ls-files", "-z"]).output()?;
    ensure!(listed.status.success(), "git ls-files: {}", String::from_utf8_lossy(&listed.stderr));
    let names = String::from_utf8(listed.stdout)?;
    let names =
        names.split_terminator('\0').filter(|name| !name.ends_with(".lock") && !name.ends_with("lock.json"));
    Ok(names
        .filter_map(|name| Some((name.to_owned(), fs::read_to_string(root().join(name)).ok()?)))
        .collect())
}

/// A person searches the document for what the log says.
#[test]
fn each_message_that_operations_quotes_is_raised_in_these_words() -> Result<()> {
    const OF_POSTGRESQL: [&str; 2] = ["permission denied for function", "stuck spinlock detected"];
    let ours = |name: &str| {
        ["sql/", "extension/", "daemon/"].iter().any(|folder| name.starts_with(folder))
            && [".sql", ".rs"].iter().any(|kind| name.ends_with(kind))
    };
    let sources: String = files()?
        .into_iter()
        .filter(|(name, _)| ours(name))
        .map(|(_, text)| text.replace("\\\n", ""))
        .collect();
    let sources = sources.split_whitespace().collect::<Vec<_>>().join(" ");

    let text = fs::read_to_string(root().join("docs/operations.md"))?;
    // Without code, whose quotes are of the shell or of a language.
    let prose: String = text.split('`').step_by(2).collect();
    let mut quoted = 0;
    for paragraph in prose.split("\n\n") {
        for message in paragraph.split('"').skip(1).step_by(2) {
            quoted += 1;
            // What differs each time is shown as `…`.
            for part in message.split('…') {
                let part = part.split_whitespace().collect::<Vec<_>>().join(" ");
                let exists = sources.contains(&part) || OF_POSTGRESQL.contains(&part.as_str());
                assert!(exists, "no source has the message {message:?}");
            }
        }
    }
    assert!(quoted >= 6, "the messages were not found");
    Ok(())
}

/// A version beside our name, a key or a macro that states one would be forgotten at the next release.
#[test]
fn only_cargo_toml_states_the_version() -> Result<()> {
    let version = env!("CARGO_PKG_VERSION");
    let changelog = root().join("CHANGELOG.md");
    ensure!(
        fs::read_to_string(&changelog)?.contains(&format!("## [{version}]")),
        "{} has no section for {version}",
        changelog.display()
    );
    let stating = |(name, text): &(String, String)| {
        let allowed = ["Cargo.toml", "CHANGELOG.md"].contains(&name.as_str()) || name.contains("/drivers/");
        let one = |line: &str| {
            line.match_indices(version).any(|(at, _)| {
                // No part of another number, such as an address.
                let around = [line[..at].chars().next_back(), line[at + version.len()..].chars().next()];
                !around.iter().flatten().any(|c| c.is_ascii_digit() || *c == '.' || *c == '/')
            })
        };
        !allowed && text.lines().any(one)
    };
    let stating: Vec<String> = files()?.into_iter().filter(stating).map(|(name, _)| name).collect();
    assert!(stating.is_empty(), "these state the version {version}, which Cargo.toml states: {stating:?}");
    Ok(())
}
