//! TLS to the server: how much of it `sslmode` asks for, with which certificates, and what went wrong in words.
//!
//! Certificates and keys are read anew for each connection, so that renewed ones are used without a restart.

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{
    AlertDescription, CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
};
use tokio_postgres_rustls::MakeRustlsConnect;

use crate::error::{Error, Kind, Result};
use crate::postgres::conninfo::Options;

/// `sslmode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mode {
    Disable,
    Allow,
    Prefer,
    Require,
    VerifyCa,
    VerifyFull,
}

impl Mode {
    const ALL: [(&str, Mode); 6] = [
        ("disable", Mode::Disable),
        ("allow", Mode::Allow),
        ("prefer", Mode::Prefer),
        ("require", Mode::Require),
        ("verify-ca", Mode::VerifyCa),
        ("verify-full", Mode::VerifyFull),
    ];
}

/// Whose signature on the server's certificate counts.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Roots {
    /// The certificate is not checked.
    Unchecked,
    File(PathBuf),
    /// Whom the operating system trusts.
    System,
}

/// What the connection string asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    pub mode: Mode,
    /// TLS from the first byte on, which PostgreSQL knows since 17.
    pub direct: bool,
    roots: Roots,
    /// Our own certificate and its key.
    client: Option<(PathBuf, PathBuf)>,
}

impl Settings {
    /// Takes its options out of a connection string's, and adds what is wrong with them to the faults.
    pub fn take(options: &mut Options, faults: &mut Vec<String>) -> Self {
        let mut take = |name: &str| options.remove(name).filter(|value| !value.is_empty());
        let root = take("sslrootcert");
        let named = take("sslmode");
        let direct = take("sslnegotiation");
        let (certificate, key) = (take("sslcert"), take("sslkey"));
        let mode = match &named {
            // As libpq: who trusts the whole world's authorities must at least look at the name.
            None if root.as_deref() == Some("system") => Mode::VerifyFull,
            None => Mode::Prefer,
            Some(name) => match Mode::ALL.iter().find(|(known, _)| known == name) {
                Some((_, mode)) => *mode,
                None => {
                    faults.push(
                        "the connection string has an sslmode that does not exist: give disable, allow, prefer, require, \
                         verify-ca or verify-full"
                            .to_owned(),
                    );
                    Mode::Prefer
                }
            },
        };
        let direct = match direct.as_deref() {
            None | Some("postgres") => false,
            Some("direct") => {
                if mode < Mode::Require {
                    faults.push(
                        "the connection string has sslnegotiation=direct, which needs sslmode=require, verify-ca or verify-full"
                            .to_owned(),
                    );
                }
                true
            }
            Some(_) => {
                faults.push(
                    "the connection string has an sslnegotiation that does not exist: give postgres or direct".to_owned(),
                );
                false
            }
        };
        let roots = Self::roots(mode, root, faults);
        let client = Self::client(certificate, key, faults);
        let settings = Self { mode, direct, roots, client };
        // What is wrong with the files now is better said now than at every connection.
        if settings.mode >= Mode::Require
            && faults.is_empty()
            && let Err(error) = settings.client_config()
        {
            faults.push(error.message().to_owned());
        }
        settings
    }

    fn roots(mode: Mode, root: Option<String>, faults: &mut Vec<String>) -> Roots {
        let in_home = home(".postgresql/root.crt").filter(|path| path.exists());
        match (root, mode) {
            (Some(root), Mode::Disable | Mode::Allow | Mode::Prefer | Mode::Require | Mode::VerifyCa)
                if root == "system" =>
            {
                faults.push(
                    "the connection string has sslrootcert=system, which needs sslmode=verify-full"
                        .to_owned(),
                );
                Roots::System
            }
            (Some(root), Mode::VerifyFull) if root == "system" => Roots::System,
            (_, Mode::Disable | Mode::Allow | Mode::Prefer) => Roots::Unchecked,
            (Some(root), _) => Roots::File(root.into()),
            // As libpq does it: a file in this place makes `require` check the certificate.
            (None, Mode::Require) => in_home.map_or(Roots::Unchecked, Roots::File),
            (None, Mode::VerifyCa | Mode::VerifyFull) => {
                if in_home.is_none() {
                    faults.push(
                        "sslmode=verify-ca and verify-full need the certificate of the authority that signed the server's: \
                         give sslrootcert=FILE, or sslrootcert=system for those that this machine trusts"
                            .to_owned(),
                    );
                }
                in_home.map_or(Roots::System, Roots::File)
            }
        }
    }

    fn client(
        certificate: Option<String>,
        key: Option<String>,
        faults: &mut Vec<String>,
    ) -> Option<(PathBuf, PathBuf)> {
        let in_home = |name| home(name).filter(|path| path.exists());
        let certificate = match certificate {
            Some(certificate) => PathBuf::from(certificate),
            None => {
                if key.is_some() {
                    faults.push("the connection string has sslkey without sslcert".to_owned());
                }
                in_home(".postgresql/postgresql.crt")?
            }
        };
        let Some(key) = key.map(PathBuf::from).or_else(|| in_home(".postgresql/postgresql.key")) else {
            faults.push("the connection string has sslcert without sslkey".to_owned());
            return None;
        };
        Some((certificate, key))
    }

    /// The files that are read for each connection.
    pub fn files(&self) -> Vec<PathBuf> {
        let root = match &self.roots {
            Roots::File(path) => Some(path.clone()),
            Roots::Unchecked | Roots::System => None,
        };
        let own = self.client.iter().flat_map(|(certificate, key)| [certificate.clone(), key.clone()]);
        root.into_iter().chain(own).collect()
    }

    /// What makes TLS connections. Reads the files.
    pub fn connector(&self) -> Result<MakeRustlsConnect> {
        self.client_config().map(MakeRustlsConnect::new)
    }

    fn client_config(&self) -> Result<ClientConfig> {
        let provider = Arc::new(ring::default_provider());
        let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|error| Error::failed(format!("could not set up TLS: {error}")))?;
        let verifier: Arc<dyn ServerCertVerifier> = match &self.roots {
            Roots::Unchecked => Arc::new(Unchecked(provider)),
            roots => {
                let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots.load()?), provider)
                    .build()
                    .map_err(|error| unusable(format!("could not set up TLS: {error}")))?;
                if self.mode == Mode::VerifyFull { verifier } else { Arc::new(AnyName(verifier)) }
            }
        };
        let builder = builder.dangerous().with_custom_certificate_verifier(verifier);
        let mut config = match &self.client {
            None => builder.with_no_client_auth(),
            Some((certificate, key)) => {
                let (chain, key_der) = (certificates(certificate)?, private_key(key)?);
                builder.with_client_auth_cert(chain, key_der).map_err(|error| {
                    unusable(format!(
                        "the certificate {} cannot be used with the key {}: {error}",
                        certificate.display(),
                        key.display()
                    ))
                })?
            }
        };
        if self.direct {
            config.alpn_protocols = vec![b"postgresql".to_vec()];
        }
        Ok(config)
    }
}

impl Roots {
    fn load(&self) -> Result<RootCertStore> {
        let mut store = RootCertStore::empty();
        match self {
            Roots::Unchecked => {}
            Roots::File(path) => {
                for certificate in certificates(path)? {
                    store.add(certificate).map_err(|error| {
                        unusable(format!("{} holds no certificate of an authority: {error}", path.display()))
                    })?;
                }
            }
            Roots::System => {
                store.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
                if store.is_empty() {
                    return Err(unusable(
                        "this machine trusts no certificate authority, so sslrootcert=system cannot be used",
                    )
                    .with_remedy("install the package ca-certificates, or name a file: sslrootcert=FILE"));
                }
            }
        }
        Ok(store)
    }
}

fn unusable(why: impl Into<String>) -> Error {
    Error::new(Kind::Unreachable, why)
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let cannot = |why: &dyn std::fmt::Display| {
        unusable(format!("cannot read the certificate {}: {why}", path.display()))
    };
    let all = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect::<std::result::Result<Vec<_>, _>>)
        .map_err(|error| cannot(&error))?;
    if all.is_empty() {
        return Err(cannot(&"there is none in it"));
    }
    Ok(all)
}

/// A key that others may read is no secret: refused, as libpq does it.
fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>> {
    let cannot =
        |why: &dyn std::fmt::Display| unusable(format!("cannot read the key {}: {why}", path.display()));
    let metadata = std::fs::metadata(path).map_err(|error| cannot(&error))?;
    let allowed = if metadata.uid() == 0 { 0o640 } else { 0o600 };
    if metadata.permissions().mode() & 0o777 & !allowed != 0 {
        return Err(unusable(format!(
            "the key {} is not used, for others than its owner may read it: chmod 600 it",
            path.display()
        )));
    }
    PrivateKeyDer::from_pem_file(path).map_err(|error| match error {
        rustls::pki_types::pem::Error::NoItemsFound => {
            cannot(&"there is none in it that is not encrypted; take the passphrase off with `openssl pkey`")
        }
        error => cannot(&error),
    })
}

fn home(name: &str) -> Option<PathBuf> {
    std::env::home_dir().map(|home| home.join(name))
}

/// Encrypts without asking with whom: `require` without a root certificate, and less.
#[derive(Debug)]
struct Unchecked(Arc<CryptoProvider>);

impl ServerCertVerifier for Unchecked {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> std::result::Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    // The other end must hold the key of the certificate all the same.
    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// Everything but the name: `verify-ca`.
#[derive(Debug)]
struct AnyName(Arc<WebPkiServerVerifier>);

impl ServerCertVerifier for AnyName {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> std::result::Result<ServerCertVerified, rustls::Error> {
        // The name is looked at last, so this error says that all else is well.
        match self.0.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now) {
            Err(rustls::Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) => Ok(ServerCertVerified::assertion()),
            other => other,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}

/// What rustls has to say in an error of tokio-postgres, if it is one of TLS.
fn cause(error: &tokio_postgres::Error) -> Option<&rustls::Error> {
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        if let Some(found) = inner.downcast_ref::<rustls::Error>() {
            return Some(found);
        }
        // What an io::Error wraps is not among its sources.
        if let Some(found) = inner
            .downcast_ref::<std::io::Error>()
            .and_then(std::io::Error::get_ref)
            .and_then(|inner| inner.downcast_ref::<rustls::Error>())
        {
            return Some(found);
        }
        cause = inner.source();
    }
    None
}

/// Whether it was TLS that failed.
pub fn is_handshake(error: &tokio_postgres::Error) -> bool {
    cause(error).is_some()
}

/// Why TLS failed, and what fixes it.
pub fn explain(error: &tokio_postgres::Error) -> Option<(String, &'static str)> {
    if error.to_string().contains("TLS")
        && std::error::Error::source(error)
            .is_some_and(|cause| cause.to_string() == "server does not support TLS")
    {
        return Some((
            "the server does not speak TLS, and sslmode asks for it".to_owned(),
            "set ssl = on at the server, with ssl_cert_file and ssl_key_file, and reload it; or give sslmode=disable if the \
             network in between is trusted",
        ));
    }
    Some(match cause(error)? {
        rustls::Error::InvalidCertificate(why) => certificate(why),
        rustls::Error::AlertReceived(alert) => match alert {
            AlertDescription::CertificateRequired | AlertDescription::HandshakeFailure => (
                "the server wants a client certificate".to_owned(),
                "give sslcert and sslkey in the connection string",
            ),
            AlertDescription::UnknownCA
            | AlertDescription::BadCertificate
            | AlertDescription::DecryptError
            | AlertDescription::CertificateExpired
            | AlertDescription::CertificateRevoked
            | AlertDescription::CertificateUnknown => (
                format!("the server refused our certificate (sslcert): {alert:?}"),
                "give one that is valid and signed by an authority in the server's ssl_ca_file",
            ),
            other => (
                format!("the server broke the TLS handshake off: {other:?}"),
                "see the server's log, which says why",
            ),
        },
        other => (format!("TLS failed: {other}"), "see the server's log, and its ssl settings"),
    })
}

fn certificate(why: &CertificateError) -> (String, &'static str) {
    match why {
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => (
            "the server's certificate has expired".to_owned(),
            "renew the server's ssl_cert_file and reload the server",
        ),
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => (
            "the server's certificate is not valid yet".to_owned(),
            "compare the clocks of both machines, or wait",
        ),
        CertificateError::NotValidForName => (
            "the server's certificate is for another host".to_owned(),
            "name the host as its certificate does, or have one issued for this name",
        ),
        CertificateError::NotValidForNameContext { expected, presented } => {
            let names = if presented.is_empty() { "no host at all".to_owned() } else { presented.join(", ") };
            (
                format!(
                    "the server's certificate is for another host: for {names}, not for {}",
                    expected.to_str()
                ),
                "name the host as its certificate does, or have one issued for this name",
            )
        }
        // The latter: of the same name as one that is trusted, with another key.
        CertificateError::UnknownIssuer | CertificateError::BadSignature => (
            "the server's certificate is signed by an authority that is not trusted here".to_owned(),
            "let sslrootcert name the file with that authority's certificate",
        ),
        other if format!("{other:?}").contains("CaUsedAsEndEntity") => (
            "the server uses the certificate of an authority as its own".to_owned(),
            "have the authority sign a certificate for the server (basicConstraints CA:FALSE)",
        ),
        other => (
            format!("the server's certificate cannot be used: {other}"),
            "replace the server's ssl_cert_file",
        ),
    }
}
