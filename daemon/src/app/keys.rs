//! Signing keys, and the master keys that seal them.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::time::Duration;

use futures_util::Stream;
use tokio_postgres::Client;
use tollgate_core::seal_box::{MasterKey, id_text};

use crate::contract;
use crate::contract::document::Document;
use crate::error::{Error, Result};
use crate::postgres::target::Target;

/// Makes a master key and writes it to a new file, which only its owner may read. Returns its id.
pub fn init(file: &Path) -> Result<String> {
    let shown = file.display();
    let key = MasterKey::generate()
        .map_err(|_| Error::failed("the operating system gave no random bytes".to_owned()))?;
    // A file that is there already may hold the only copy of a key that is in use.
    let mut to = OpenOptions::new().write(true).create_new(true).mode(0o600).open(file).map_err(|error| {
        Error::usage(format!("could not create {shown}: {error}"))
            .with_remedy("name a file that does not exist yet, in a directory that you may write to")
    })?;
    to.write_all(format!("{}\n", *key.to_line()).as_bytes())
        .and_then(|()| to.sync_all())
        .map_err(|error| Error::failed(format!("could not write {shown}: {error}")))?;
    Ok(id_text(&key.id()))
}

/// Rows of `tollgate.signing_keys`.
pub async fn list(client: &Client) -> Result<impl Stream<Item = Result<Document>> + use<>> {
    contract::list_signing_keys(client).await
}

/// Creates the next key, of another algorithm if one is named, and returns its kid.
pub async fn rotate(client: &Client, algorithm: Option<&str>, signs_in: Option<Duration>) -> Result<String> {
    match algorithm {
        Some(algorithm) => contract::create_signing_key(client, algorithm, signs_in).await,
        None => contract::rotate_signing_key(client, signs_in).await,
    }
}

/// Imports a private key in PEM, and returns its kid.
pub async fn import(client: &Client, pem: &str, signs_in: Option<Duration>) -> Result<String> {
    contract::import_signing_key(client, pem, signs_in).await
}

/// False if there is no such key, or it was withdrawn before.
pub async fn withdraw(client: &Client, kid: &str, reason: Option<&str>) -> Result<bool> {
    contract::withdraw_signing_key(client, kid, reason).await
}

/// Seals all private keys with the first master key, and returns how many were sealed with another one. Not before each
/// standby has that master key: it could sign nothing after it.
pub async fn reseal(client: &Client, standbys: &[Target]) -> Result<u64> {
    let first = contract::loaded_master_keys(client).await?.into_iter().next();
    for standby in standbys {
        let session = standby.connect().await?;
        let loaded = contract::loaded_master_keys(&*session).await?;
        if let Some(first) = first.as_ref().filter(|first| !loaded.contains(first)) {
            return Err(Error::failed(format!(
                "the standby {} has not loaded master key {first}, with which the keys would be sealed",
                standby.describe()
            ))
            .with_remedy("add it to the file there, and reload the configuration; then run this again"));
        }
    }
    contract::reseal_signing_keys(client).await
}
