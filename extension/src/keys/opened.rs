//! Private and secret keys that this backend has opened, and the master keys that it opens them with.

use super::purpose::{Purpose, SIGNED_URL, TOKEN_IMPORT};
use crate::error::Error;
use crate::pg::wait;
use crate::shmem;
use crate::store::keys::Signing;
use core::cell::Cell;
use core::time::Duration;
use std::cell::RefCell;
use std::rc::Rc;
use tollgate_core::foreign::ImportKey;
use tollgate_core::mac_key::{self, MacKey, Use};
use tollgate_core::refresh;
use tollgate_core::seal_box::{self, Context, KeyId, MasterKey, Refusal};
use tollgate_core::signature::{Algorithm, SigningKey};
use tollgate_core::url;
use zeroize::Zeroizing;

/// How long a backend waits for the background worker right after the server started.
const PATIENCE: Duration = Duration::from_secs(5);
/// Those that sign, and those of refresh tokens and of URLs, of which each rotation leaves one in use.
const KEPT: usize = 32;

struct Opened {
    /// Of the master keys. A key that was opened with one that was taken away since is not used any more.
    generation: u64,
    kid: String,
    sealed: Vec<u8>,
    key: Key,
}

#[derive(Clone)]
enum Key {
    Signing(Rc<SigningKey>),
    Refresh(Rc<refresh::Key>),
    Url(Rc<UrlKey>),
    Import(Rc<ImportKey>),
}

/// A key that signs URLs.
pub(crate) struct UrlKey {
    pub(crate) name: String,
    pub(crate) key: url::Key,
}

thread_local! {
    /// The master key that this backend has asked for, and the generation that it was missing from.
    static ASKED_FOR: Cell<Option<(KeyId, u64)>> = const { Cell::new(None) };
    /// Whether this backend has waited for the background worker to open an import key.
    static WAITED: Cell<bool> = const { Cell::new(false) };
    static OPENED: RefCell<Vec<Opened>> = const { RefCell::new(Vec::new()) };
}

/// The private key of a row.
pub(super) fn open(row: &Signing) -> Result<Rc<SigningKey>, Error> {
    let opened = open_once(row, |context| {
        let (generation, key) = unseal(&row.sealed, context)?;
        Ok((generation, Key::Signing(Rc::new(key))))
    });
    match opened? {
        Key::Signing(key) => Ok(key),
        Key::Refresh(_) | Key::Url(_) | Key::Import(_) => Err(Error::damaged_key(&row.kid)),
    }
}

/// The key of refresh tokens in a row.
pub(super) fn open_refresh_key(row: &Signing) -> Result<Rc<refresh::Key>, Error> {
    let opened = open_once(row, |context| {
        let (generation, key) = unseal_mac_key(&row.sealed, context)?;
        Ok((generation, Key::Refresh(Rc::new(key))))
    });
    match opened? {
        Key::Refresh(key) => Ok(key),
        Key::Signing(_) | Key::Url(_) | Key::Import(_) => Err(Error::damaged_key(&row.kid)),
    }
}

/// The key in a row that signs URLs.
pub(super) fn open_url_key(row: &Signing) -> Result<Rc<UrlKey>, Error> {
    let opened = open_once(row, |context| {
        let (generation, key) = unseal_mac_key(&row.sealed, context)?;
        let name = row.purpose.strip_prefix(SIGNED_URL).ok_or_else(|| Error::damaged_key(&row.kid))?;
        Ok((generation, Key::Url(Rc::new(UrlKey { name: name.to_owned(), key }))))
    });
    match opened? {
        Key::Url(key) => Ok(key),
        Key::Signing(_) | Key::Refresh(_) | Key::Import(_) => Err(Error::damaged_key(&row.kid)),
    }
}

/// The import key in a row. Whatever is presented may ask for it, so the background worker is waited for once.
pub(super) fn open_import_key(row: &Signing) -> Result<Rc<ImportKey>, Error> {
    if shmem::master_key_generation() == Some(0) && WAITED.replace(true) {
        return Err(no_worker());
    }
    let name = row.purpose.strip_prefix(TOKEN_IMPORT).unwrap_or_default();
    let damaged = |error: Error| if error.is_damaged() { Error::damaged_import_key(name) } else { error };
    let opened = open_once(row, |context| {
        let (generation, bytes) = private_of(&row.sealed, context)?;
        let key = ImportKey::new(name, &bytes).ok_or_else(|| Error::damaged_import_key(name))?;
        Ok((generation, Key::Import(Rc::new(key))))
    });
    match opened.map_err(damaged)? {
        Key::Import(key) => Ok(key),
        Key::Signing(_) | Key::Refresh(_) | Key::Url(_) => Err(Error::damaged_import_key(name)),
    }
}

/// The key of a row. It is kept by the sealed bytes, so a row that was changed or resealed is opened anew.
fn open_once(
    row: &Signing,
    unseal: impl FnOnce(&Context<'_>) -> Result<(u64, Key), Error>,
) -> Result<Key, Error> {
    let generation = wait_for_keys()?;
    let known = OPENED.with_borrow(|opened| {
        let same =
            |one: &&Opened| one.generation == generation && one.kid == row.kid && one.sealed == row.sealed;
        opened.iter().find(same).map(|one| one.key.clone())
    });
    if let Some(key) = known {
        return Ok(key);
    }
    let context = Context { kid: &row.kid, algorithm: &row.algorithm, purpose: &row.purpose };
    let (generation, key) = unseal(&context)?;
    OPENED.with_borrow_mut(|opened| {
        opened.retain(|one| one.generation == generation && one.kid != row.kid);
        if opened.len() >= KEPT {
            opened.remove(0);
        }
        let (kid, sealed) = (row.kid.clone(), row.sealed.clone());
        opened.push(Opened { generation, kid, sealed, key: key.clone() });
    });
    Ok(key)
}

fn unseal(sealed: &[u8], context: &Context<'_>) -> Result<(u64, SigningKey), Error> {
    let (generation, private) = private_of(sealed, context)?;
    let key = SigningKey::from_pkcs8(&private).map_err(|_| Error::damaged_key(context.kid))?;
    let fits = key.algorithm().as_str() == context.algorithm && key.public_key().thumbprint() == context.kid;
    if fits { Ok((generation, key)) } else { Err(Error::damaged_key(context.kid)) }
}

fn unseal_mac_key<U: Use>(sealed: &[u8], context: &Context<'_>) -> Result<(u64, MacKey<U>), Error> {
    let (generation, secret) = private_of(sealed, context)?;
    MacKey::from_bytes(&secret)
        .filter(|key| key.kid() == context.kid && context.algorithm == mac_key::ALGORITHM)
        .map(|key| (generation, key))
        .ok_or_else(|| Error::damaged_key(context.kid))
}

/// The master keys, at least one, with their generation.
pub(crate) fn loaded() -> Result<(u64, Vec<MasterKey>), Error> {
    wait_for_keys()?;
    let (generation, masters) = shmem::master_keys();
    if masters.is_empty() {
        // Not what is wrong: it names the file, which is shown to superusers and those who may run a check.
        let unread = shmem::master_key_fault().map(|_| "They could not be read; the server's log says why.");
        return Err(Error::no_master_key(unread));
    }
    Ok((generation, masters))
}

/// The generation of the master keys, which the background worker reads right after the server started.
fn wait_for_keys() -> Result<u64, Error> {
    wait::until(PATIENCE, || shmem::master_key_generation() != Some(0));
    match shmem::master_key_generation() {
        None => Err(Error::needs_preload("signing")),
        Some(0) => Err(no_worker()),
        Some(generation) => Ok(generation),
    }
}

fn no_worker() -> Error {
    Error::no_master_key(Some(
        "The background worker that reads them has not started; it needs one of max_worker_processes.",
    ))
}

/// Seals a private key with the first master key, and tests that it opens again.
pub(crate) fn seal(
    key: &SigningKey,
    kid: &str,
    algorithm: Algorithm,
    purpose: Purpose,
) -> Result<Vec<u8>, Error> {
    let (_, masters) = loaded()?;
    let context = Context { kid, algorithm: algorithm.as_str(), purpose: purpose.as_str() };
    let private = key.to_pkcs8().map_err(|_| Error::internal("a key could not be encoded"))?;
    let sealed = sealed_with(&masters[0], &private, &context)?;
    unseal(&sealed, &context)?;
    Ok(sealed)
}

/// The same for a secret key.
pub(crate) fn seal_mac_key<U: Use>(key: &MacKey<U>, purpose: &str) -> Result<Vec<u8>, Error> {
    let (_, masters) = loaded()?;
    let kid = key.kid();
    let context = Context { kid: &kid, algorithm: mac_key::ALGORITHM, purpose };
    let sealed = sealed_with(&masters[0], key.as_bytes(), &context)?;
    unseal_mac_key::<U>(&sealed, &context)?;
    Ok(sealed)
}

/// The same for an import key, whose name is in its purpose.
pub(crate) fn seal_import_key(bytes: &[u8], kid: &str, purpose: &str) -> Result<Vec<u8>, Error> {
    let (_, masters) = loaded()?;
    let context = Context { kid, algorithm: mac_key::ALGORITHM, purpose };
    let sealed = sealed_with(&masters[0], bytes, &context)?;
    private_of(&sealed, &context)?;
    Ok(sealed)
}

/// A sealed private key, sealed with the first master key.
pub(crate) fn reseal(sealed: &[u8], context: &Context<'_>) -> Result<Vec<u8>, Error> {
    let (_, private) = private_of(sealed, context)?;
    let (_, masters) = loaded()?;
    sealed_with(&masters[0], &private, context)
}

/// A private key in PKCS#8, and the generation of the master keys that opened it. If the one that it is sealed with is not
/// among them, they are read again, once.
fn private_of(sealed: &[u8], context: &Context<'_>) -> Result<(u64, Zeroizing<Vec<u8>>), Error> {
    loop {
        let (generation, masters) = loaded()?;
        match seal_box::open(&masters, sealed, context) {
            Ok(private) => return Ok((generation, private)),
            Err(Refusal::Damaged) => return Err(Error::damaged_key(context.kid)),
            Err(Refusal::UnknownKey(id)) => {
                if ASKED_FOR.replace(Some((id, generation))) == Some((id, generation)) {
                    return Err(Error::unknown_master_key(&seal_box::id_text(&id)));
                }
                if let Some(request) = shmem::request_master_keys() {
                    wait::until(PATIENCE, || shmem::master_keys_answered(request));
                }
            }
        }
    }
}

fn sealed_with(master: &MasterKey, private: &[u8], context: &Context<'_>) -> Result<Vec<u8>, Error> {
    master.seal(private, context).map_err(|_| Error::internal("the operating system gave no random bytes"))
}
