//! TLS to the server, with a certificate authority created here: what each sslmode accepts and refuses, and the
//! messages.
//!
//! Not every build of PostgreSQL supports TLS, so a proxy in front of the server does it; where the server under test
//! supports it, the last test uses it directly, with a password that is bound to the channel.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::common::{self, Shared};
use crate::operator::{self, Db, OPERATOR};
use anyhow::{Context as _, Result};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, date_time_ymd};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tollgate_tests::{Account, Tollgated};

static SHARED: Shared = Shared::new(&[]);

/// A directory of certificates that the daemon's user can read.
struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    directory: TempDir,
}

impl Authority {
    fn new(name: &str) -> Result<Self> {
        let mut params = CertificateParams::new(Vec::new())?;
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
        let directory = TempDir::new()?;
        Account::unprivileged()?.private_dir(directory.path())?;
        let authority = Self { issuer, directory };
        authority.write("ca.pem", &authority.issuer.pem())?;
        Ok(authority)
    }

    /// A certificate and its key, in two files.
    fn issue(&self, name: &str, host: &str, expired: bool) -> Result<(PathBuf, PathBuf)> {
        let mut params = CertificateParams::new(vec![host.to_owned()])?;
        if expired {
            params.not_before = date_time_ymd(2020, 1, 1);
            params.not_after = date_time_ymd(2021, 1, 1);
        }
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        Ok((
            self.write(&format!("{name}.pem"), &certificate.pem())?,
            self.write(&format!("{name}.key"), &key.serialize_pem())?,
        ))
    }

    fn write(&self, name: &str, content: &str) -> Result<PathBuf> {
        use std::os::unix::fs::PermissionsExt as _;
        let path = self.path(name);
        std::fs::write(&path, content)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
        Account::unprivileged()?.own(&path)?;
        Ok(path)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}

/// Terminates TLS for a server, or refuses TLS if it has no certificate.
struct Front {
    address: SocketAddr,
    encrypted: Arc<AtomicU64>,
    plain: Arc<AtomicU64>,
}

impl Front {
    async fn start(
        db: &Db,
        certificate: Option<(PathBuf, PathBuf)>,
        client_authority: Option<&Path>,
    ) -> Result<Self> {
        let acceptor = certificate.map(|files| acceptor(&files, client_authority)).transpose()?;
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let front =
            Self { address: listener.local_addr()?, encrypted: Arc::default(), plain: Arc::default() };
        let (encrypted, plain) = (Arc::clone(&front.encrypted), Arc::clone(&front.plain));
        let server = db.cluster.port();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let (acceptor, encrypted, plain) =
                    (acceptor.clone(), Arc::clone(&encrypted), Arc::clone(&plain));
                tokio::spawn(async move { serve(client, server, acceptor, &encrypted, &plain).await });
            }
        });
        Ok(front)
    }

    /// How many connections were encrypted, and how many plain.
    fn count(&self) -> (u64, u64) {
        (self.encrypted.load(Ordering::SeqCst), self.plain.load(Ordering::SeqCst))
    }
}

fn acceptor(
    (certificate, key): &(PathBuf, PathBuf),
    client_authority: Option<&Path>,
) -> Result<tokio_rustls::TlsAcceptor> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder =
        ServerConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions()?;
    let builder = match client_authority {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let mut roots = RootCertStore::empty();
            roots.add(CertificateDer::from_pem_file(path)?)?;
            builder.with_client_cert_verifier(
                WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build()?,
            )
        }
    };
    let chain = vec![CertificateDer::from_pem_file(certificate)?];
    let config = builder.with_single_cert(chain, PrivateKeyDer::from_pem_file(key)?)?;
    Ok(tokio_rustls::TlsAcceptor::from(Arc::new(config)))
}

async fn serve(
    mut client: TcpStream,
    server: u16,
    acceptor: Option<tokio_rustls::TlsAcceptor>,
    encrypted: &AtomicU64,
    plain: &AtomicU64,
) -> Result<()> {
    let mut server = TcpStream::connect(("127.0.0.1", server)).await?;
    // The SSLRequest: its length, 8, and 80877103; a start-up packet is longer than that.
    let mut head = [0; 8];
    client.read_exact(&mut head).await?;
    if head[4..] != 80_877_103_u32.to_be_bytes() {
        plain.fetch_add(1, Ordering::SeqCst);
        server.write_all(&head).await?;
        tokio::io::copy_bidirectional(&mut client, &mut server).await?;
        return Ok(());
    }
    let Some(acceptor) = acceptor else {
        client.write_all(b"N").await?;
        plain.fetch_add(1, Ordering::SeqCst);
        tokio::io::copy_bidirectional(&mut client, &mut server).await?;
        return Ok(());
    };
    client.write_all(b"S").await?;
    let mut client = acceptor.accept(client).await?;
    encrypted.fetch_add(1, Ordering::SeqCst);
    tokio::io::copy_bidirectional(&mut client, &mut server).await?;
    Ok(())
}

/// `tollgated status` through the proxy, which only needs a connection.
async fn connect(db: &Db, front: &Front, host: &str, options: &str) -> Result<Output> {
    let url = format!(
        "host={host} hostaddr=127.0.0.1 port={} user={OPERATOR} dbname={} {options}",
        front.address.port(),
        db.name
    );
    // The proxy runs on this thread's runtime.
    tokio::task::spawn_blocking(move || Tollgated::run(&url, &["status", "--json"])).await?
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// No daemon runs, so an answer is exit status 1; without a connection it is 69.
#[track_caller]
fn connected(output: &Output) {
    assert_eq!(output.status.code(), Some(1), "{}", text(output));
}

#[track_caller]
fn refused(output: &Output, words: &str) {
    assert_eq!(output.status.code(), Some(69), "{}", text(output));
    assert!(text(output).contains(words), "{words:?} in {}", text(output));
}

#[tokio::test(flavor = "multi_thread")]
async fn each_sslmode_accepts_what_it_says_and_no_less() -> Result<()> {
    let db = Db::create(&SHARED.cluster()?, "tls_modes").await?;
    let (authority, stranger) = (Authority::new("one")?, Authority::new("another")?);
    let good = Front::start(&db, Some(authority.issue("good", "db.test", false)?), None).await?;
    let expired = Front::start(&db, Some(authority.issue("expired", "db.test", true)?), None).await?;
    let none = Front::start(&db, None, None).await?;
    let ca = format!("sslrootcert={}", authority.path("ca.pem").display());
    let other_ca = format!("sslrootcert={}", stranger.path("ca.pem").display());

    connected(&connect(&db, &good, "db.test", &format!("sslmode=verify-full {ca}")).await?);
    connected(&connect(&db, &good, "elsewhere.test", &format!("sslmode=verify-ca {ca}")).await?);
    connected(&connect(&db, &good, "elsewhere.test", "sslmode=require").await?);
    connected(&connect(&db, &expired, "elsewhere.test", "sslmode=require").await?);
    connected(&connect(&db, &good, "elsewhere.test", "").await?);
    assert_eq!((good.count(), expired.count()), ((4, 0), (1, 0)));

    let wrong_host = connect(&db, &good, "elsewhere.test", &format!("sslmode=verify-full {ca}")).await?;
    refused(&wrong_host, "is for another host");
    assert!(text(&wrong_host).contains("db.test"), "{}", text(&wrong_host));
    for mode in ["verify-ca", "verify-full"] {
        refused(&connect(&db, &expired, "db.test", &format!("sslmode={mode} {ca}")).await?, "has expired");
        refused(
            &connect(&db, &good, "db.test", &format!("sslmode={mode} {other_ca}")).await?,
            "not trusted here",
        );
        refused(
            &connect(&db, &none, "db.test", &format!("sslmode={mode} {ca}")).await?,
            "does not speak TLS",
        );
    }
    let namesake = Authority::new("one")?;
    let options = format!("sslmode=verify-ca sslrootcert={}", namesake.path("ca.pem").display());
    refused(&connect(&db, &good, "db.test", &options).await?, "not trusted here");
    // Like libpq: with an authority given, `require` checks the certificate.
    refused(
        &connect(&db, &good, "db.test", &format!("sslmode=require {other_ca}")).await?,
        "not trusted here",
    );
    refused(&connect(&db, &none, "db.test", "sslmode=require").await?, "does not speak TLS");

    let (encrypted, plain) = good.count();
    connected(&connect(&db, &good, "db.test", "sslmode=disable").await?);
    connected(&connect(&db, &good, "db.test", "sslmode=allow").await?);
    assert_eq!(good.count(), (encrypted, plain + 2));
    let (_, before) = none.count();
    connected(&connect(&db, &none, "db.test", "sslmode=prefer").await?);
    assert_eq!(none.count(), (0, before + 1));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn client_certificates_are_shown_and_must_be_kept_secret() -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    let db = Db::create(&SHARED.cluster()?, "tls_client").await?;
    let (authority, stranger) = (Authority::new("one")?, Authority::new("another")?);
    let ca = authority.path("ca.pem");
    let front = Front::start(&db, Some(authority.issue("server", "db.test", false)?), Some(&ca)).await?;
    let verified = format!("sslmode=verify-full sslrootcert={}", ca.display());
    let with = |(certificate, key): &(PathBuf, PathBuf)| {
        format!("{verified} sslcert={} sslkey={}", certificate.display(), key.display())
    };
    let client = authority.issue("client", "a.client", false)?;
    connected(&connect(&db, &front, "db.test", &with(&client)).await?);
    refused(&connect(&db, &front, "db.test", &verified).await?, "wants a client certificate");
    let foreign = stranger.issue("foreign", "a.client", false)?;
    refused(&connect(&db, &front, "db.test", &with(&foreign)).await?, "refused our certificate");
    std::fs::set_permissions(&client.1, std::fs::Permissions::from_mode(0o644))?;
    let output = connect(&db, &front, "db.test", &with(&client)).await?;
    assert_eq!(output.status.code(), Some(64), "{}", text(&output));
    assert!(text(&output).contains("chmod 600"), "{}", text(&output));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_speaks_tls_itself_binds_the_password_to_the_channel() -> Result<()> {
    let mut cluster = common::start(tollgate_tests::Cluster::builder())?;
    let can = cluster
        .value("postgres", "select 1 from pg_settings where name = 'ssl_library' and setting <> ''")?;
    if can.is_none() {
        common::not_run("this PostgreSQL is built without TLS");
        return Ok(());
    }
    operator::grant(&cluster, "postgres")?;
    cluster.execute("postgres", &format!("alter role {OPERATOR} password 'correct horse'"))?;
    let authority = Authority::new("one")?;
    let (certificate, key) = authority.issue("server", "db.test", false)?;
    cluster.configure("ssl_cert_file", &certificate.display().to_string())?;
    cluster.configure("ssl_key_file", &key.display().to_string())?;
    cluster.configure("ssl", "on")?;
    let hba = cluster.data_dir().join("pg_hba.conf");
    let old = std::fs::read_to_string(&hba).context("pg_hba.conf")?;
    std::fs::write(
        &hba,
        format!("hostssl all {OPERATOR} all scram-sha-256\nhost all {OPERATOR} all reject\n{old}"),
    )?;
    cluster.restart()?;
    let password = authority.write("password", "correct horse\nand more\n")?;
    let wrong = authority.write("wrong", "battery staple\n")?;
    let passfile =
        authority.write("pgpass", "# none\nother:*:*:*:x\ndb.test:*:postgres:operator:correct horse\n")?;
    let base = format!(
        "host=db.test hostaddr=127.0.0.1 port={} user={OPERATOR} dbname=postgres channel_binding=require",
        cluster.port()
    );
    let full = format!("{base} sslmode=verify-full sslrootcert={}", authority.path("ca.pem").display());
    let file = |path: &Path| format!("--password-file={}", path.display());
    connected(&Tollgated::run(&full, &["status", &file(&password)])?);
    refused(&Tollgated::run(&full, &["status", &file(&wrong)])?, "password authentication failed");
    connected(&Tollgated::run(&format!("{full} passfile={}", passfile.display()), &["status"])?);
    connected(&Tollgated::run_command(
        Tollgated::command(&full)?.env("PGPASSWORD", "correct horse").arg("status"),
    )?);
    // A server that only accepts encrypted connections is reached with sslmode=allow too, at the second attempt.
    let allow = format!("{} sslmode=allow", base.replace("channel_binding=require", ""));
    connected(&Tollgated::run(&allow, &["status", &file(&password)])?);
    std::fs::set_permissions(&passfile, std::os::unix::fs::PermissionsExt::from_mode(0o644))?;
    let output = Tollgated::run(&format!("{full} passfile={}", passfile.display()), &["status"])?;
    assert!(text(&output).contains("chmod 600"), "{}", text(&output));
    Ok(())
}
