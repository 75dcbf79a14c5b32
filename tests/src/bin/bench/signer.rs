//! Signed access tokens that are made here, with a key that the server has, so that the client knows any number of them.

use std::ops::Range;
use std::thread;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};
use tollgate_core::jws;
use tollgate_core::signature::{PublicKey, SigningKey};
use tollgate_tests::{Cluster, DATABASE};

use crate::tokens::{Tokens, id};

/// As every test server is configured.
const ISSUER: &str = "https://tollgate.test";
const AUDIENCE: &str = "https://api.test";

/// A key of the benchmark's own.
const PEM: &str = "-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg30DOsogH4Sfm+jUm
DBQZtkMQjZXI134AX+CSy4Q3NwuhRANCAARbs9Wz5saCVVDRJi3MGaNYJPIhATZ5
9DEw2BPdgx1oOu+QRvx9eeWm7nNV5MBdqdjtnKH1mRI6kidzanp9KJUB
-----END PRIVATE KEY-----
";

pub(crate) struct Signer {
    key: SigningKey,
    kid: String,
}

impl Signer {
    /// The key signs on this server from now on.
    pub(crate) fn on(cluster: &Cluster) -> Result<Self> {
        let kid = cluster
            .value(DATABASE, &format!("select tollgate.import_signing_key('{PEM}', '0')"))?
            .context("a key has a kid")?;
        Ok(Self { key: SigningKey::from_pkcs8_pem(PEM)?, kid })
    }

    pub(crate) fn key(&self) -> &SigningKey {
        &self.key
    }

    pub(crate) fn public_key(&self) -> &PublicKey {
        self.key.public_key()
    }

    /// Tokens of a user each, with the claims of those that the server issues. They last a day.
    pub(crate) fn tokens(&self, numbers: Range<u32>) -> Result<Tokens> {
        let workers = u32::try_from(thread::available_parallelism()?.get())?;
        let share = u32::try_from(numbers.len())?.div_ceil(workers).max(1);
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
        let texts = thread::scope(|scope| {
            let workers: Vec<_> = (0..workers)
                .map(|worker| {
                    let at = |position: u32| (numbers.start + position * share).min(numbers.end);
                    let numbers = at(worker)..at(worker + 1);
                    scope.spawn(move || {
                        numbers.map(|number| self.token(number, now)).collect::<Result<Vec<_>>>()
                    })
                })
                .collect();
            workers
                .into_iter()
                .map(|worker| worker.join().expect("a failing worker returns an error"))
                .collect::<Result<Vec<_>>>()
        })?;
        Tokens::of_texts(&texts.concat())
    }

    fn token(&self, number: u32, now: u64) -> Result<String> {
        let end = now + 86_400;
        let claims = format!(
            r#"{{"iss":"{ISSUER}","sub":"user-{number:010}","aud":"{AUDIENCE}","exp":{end},"nbf":{now},"iat":{now},"jti":"{}","client_id":"backoffice","scope":"posts:read posts:write"}}"#,
            id(number)
        );
        Ok(jws::sign(&self.key, &self.kid, "at+jwt", &claims)?)
    }
}
