//! Signed tokens outside of PostgreSQL: the libraries that people verify with accept a token of ours by our key set, honour
//! its issuer, audience and times, and refuse what we refuse. The tokens are made by the core; no server runs.

#[path = "../../../extension/core/tests/jose/corpus.rs"]
mod corpus;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::symlink;
use std::process::{Command, Stdio};
use std::sync::LazyLock;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};
use tollgate_core::jws::{self, Algorithm, Fault};
use tollgate_core::signature::SigningKey;

use self::corpus::{Case, Of, Stricter};
use crate::drivers::{fetched, source};

const ISSUER: &str = "https://a.example";
const AUDIENCE: &str = "https://api.example/";

static KEYS: LazyLock<[SigningKey; 3]> = LazyLock::new(|| Algorithm::ALL.map(generate));
static ATTACKER: LazyLock<SigningKey> = LazyLock::new(|| generate(Algorithm::Es256));

#[expect(clippy::unwrap_used, reason = "a key can be made unless there is no memory")]
fn generate(algorithm: Algorithm) -> SigningKey {
    SigningKey::generate(algorithm).unwrap()
}

fn key(algorithm: Algorithm) -> &'static SigningKey {
    match algorithm {
        Algorithm::Es256 => &KEYS[0],
        Algorithm::EdDsa => &KEYS[1],
        Algorithm::Rs256 => &KEYS[2],
    }
}

/// As `jwks()` publishes them.
fn key_set() -> Result<Value> {
    let jwk =
        |key: &SigningKey| serde_json::from_str(&key.public_key().to_jwk(&key.public_key().thumbprint()));
    let keys: Vec<Value> = KEYS.iter().map(jwk).collect::<Result<_, _>>()?;
    Ok(json!({ "keys": keys }))
}

/// What each library found: the subject, `true`, or null if it refused.
type Found = BTreeMap<String, BTreeMap<String, Value>>;

/// Runs tests/drivers/*/verify.* with these tokens, by name.
fn run(tokens: &BTreeMap<String, (Algorithm, String)>, arguments: &[&str]) -> Result<Found> {
    let listed = |(name, (algorithm, token)): (&String, &(Algorithm, String))| {
        (name.clone(), json!({ "token": token, "algorithm": algorithm.as_str() }))
    };
    let tokens: serde_json::Map<String, Value> = tokens.iter().map(listed).collect();
    let given =
        json!({ "jwks": key_set()?, "issuer": ISSUER, "audience": AUDIENCE, "tokens": tokens }).to_string();
    let (directory, node) = (tempfile::tempdir()?, fetched("node")?);
    symlink(node.join("node_modules"), directory.path().join("node_modules"))?;
    fs::copy(source("node/verify.mjs"), directory.path().join("verify.mjs"))?;
    let python = (fetched("python")?.join("bin/python"), source("python/verify.py"));
    let node = (node.join("node"), directory.path().join("verify.mjs"));
    let mut found = Found::new();
    for (program, script) in [python, node] {
        let mut command = Command::new(program);
        command.arg(script).args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("cannot run {command:?}"))?;
        // It reads all of it before it writes.
        child.stdin.take().context("piped")?.write_all(given.as_bytes())?;
        let output = child.wait_with_output()?;
        ensure!(output.status.success(), "{command:?}: {}", output.status);
        found.append(&mut serde_json::from_slice::<Found>(&output.stdout)?);
    }
    Ok(found)
}

fn claims(changes: &Value) -> Result<Value> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    let mut claims = json!({
        "iss": ISSUER, "sub": "ann", "aud": AUDIENCE, "exp": now + 600, "iat": now, "nbf": now,
        "jti": "0b0e6f0e-7f5b-4a6c-9b0a-0d6a5e0c7f11", "client_id": "web", "scope": "posts:read posts:write",
    });
    for (name, change) in changes.as_object().context("an object")? {
        claims[name] = if name == "aud" || name == "iss" || name == "sub" {
            change.clone()
        } else {
            json!(now.checked_add_signed(change.as_i64().context("seconds")?))
        };
    }
    Ok(claims)
}

#[test]
fn a_token_of_ours_is_accepted_elsewhere_and_its_issuer_audience_and_times_are_honoured() -> Result<()> {
    let mut tokens = BTreeMap::new();
    for signer in KEYS.iter() {
        let algorithm = signer.algorithm();
        let kid = signer.public_key().thumbprint();
        let mut add = |name: &str, changes: Value| -> Result<String> {
            let token = jws::sign(signer, &kid, "at+jwt", &claims(&changes)?.to_string())?;
            tokens.insert(format!("{algorithm}: {name}"), (algorithm, token.clone()));
            Ok(token)
        };
        let good = add("good", json!({}))?;
        add("good, audiences", json!({ "aud": ["https://b.example/", AUDIENCE] }))?;
        add("another issuer", json!({ "iss": "https://b.example" }))?;
        add("another audience", json!({ "aud": "https://b.example/" }))?;
        add("other audiences", json!({ "aud": ["https://b.example/", "https://c.example/"] }))?;
        add("expired", json!({ "exp": -3600, "iat": -7200, "nbf": -7200 }))?;
        add("not yet valid", json!({ "nbf": 3600, "exp": 7200 }))?;
        let other = add("good, of another user", json!({ "sub": "ben" }))?;
        let (payload, signature) =
            (other.rsplit_once('.').context("parts")?.0, good.rsplit_once('.').context("parts")?.1);
        tokens.insert(format!("{algorithm}: another payload"), (algorithm, format!("{payload}.{signature}")));
        let header =
            URL_SAFE_NO_PAD.encode(json!({ "alg": "none", "kid": kid, "typ": "at+jwt" }).to_string());
        let payload = URL_SAFE_NO_PAD.encode(claims(&json!({}))?.to_string());
        tokens.insert(format!("{algorithm}: alg none"), (algorithm, format!("{header}.{payload}.")));
    }
    let kid = key(Algorithm::Es256).public_key().thumbprint();
    let forged = jws::sign(&ATTACKER, &kid, "at+jwt", &claims(&json!({}))?.to_string())?;
    tokens.insert("ES256: another's key".into(), (Algorithm::Es256, forged));

    let found = run(&tokens, &[])?;
    let libraries: BTreeSet<&str> = found.keys().map(String::as_str).collect();
    assert_eq!(
        libraries,
        ["Authlib", "PyJWT", "fast-jwt", "jose", "joserfc", "jsonwebtoken", "jwcrypto", "oauth4webapi"]
            .into()
    );
    for (library, verdicts) in &found {
        for name in tokens.keys() {
            // jsonwebtoken 9 has no Ed25519.
            let is_missing = library == "jsonwebtoken" && name.starts_with("EdDSA");
            let subject = match name.split_once(": ").context("a name")?.1 {
                _ if is_missing => Value::Null,
                "good" | "good, audiences" => json!("ann"),
                "good, of another user" => json!("ben"),
                _ => Value::Null,
            };
            assert_eq!(verdicts.get(name), Some(&subject), "{library}, {name}");
        }
    }
    Ok(())
}

// No list has a bad signature, another algorithm or a missing part: what signs for a token is the same for all.
const STRICTER_THAN_PYJWT: &[Stricter] = &[
    Stricter { of: Of::Fault(Fault::Size), why: "it has no limit of size" },
    Stricter { of: Of::Fault(Fault::Depth), why: "its limit is that of Python's recursion" },
    Stricter { of: Of::Fault(Fault::DuplicateName), why: "Python's json takes the last" },
    Stricter { of: Of::Fault(Fault::Nul), why: "it stores nothing in PostgreSQL" },
    Stricter {
        of: Of::Fault(Fault::Json),
        why: "Python's json reads NaN, lone surrogates, UTF-16, and numbers beyond a double",
    },
    Stricter { of: Of::Fault(Fault::Encoding), why: "it adds padding, and ignores more" },
    Stricter { of: Of::Fault(Fault::Header), why: "it does not look at typ, and kid has no limit of size" },
    Stricter {
        of: Of::Fault(Fault::Critical),
        why: "it knows RFC 7797, and takes b64 for false only as a boolean",
    },
    Stricter {
        of: Of::Fault(Fault::Claim),
        why: "it leaves the types to the application, where it checks no claims",
    },
];

const STRICTER_THAN_JOSE: &[Stricter] = &[
    Stricter { of: Of::Fault(Fault::Size), why: "it has no limit of size" },
    Stricter { of: Of::Fault(Fault::Depth), why: "JavaScript's JSON has no limit" },
    Stricter { of: Of::Fault(Fault::DuplicateName), why: "JavaScript's JSON takes the last" },
    Stricter { of: Of::Fault(Fault::Nul), why: "it stores nothing in PostgreSQL" },
    Stricter {
        of: Of::Fault(Fault::Json),
        why: "JavaScript reads lone surrogates, and numbers beyond a double; a byte order mark is ignored",
    },
    Stricter {
        of: Of::Fault(Fault::Encoding),
        why: "JavaScript's base64 ignores white space, padding, and unused bits",
    },
    Stricter { of: Of::Fault(Fault::Header), why: "it looks at kid and typ only when asked to" },
    Stricter { of: Of::Fault(Fault::Critical), why: "it knows RFC 7797, and b64 counts where crit names it" },
    Stricter { of: Of::Fault(Fault::Claim), why: "it looks at the types of the claims that it checks" },
];

#[test]
fn what_is_accepted_here_is_accepted_by_pyjwt_and_jose_and_where_they_accept_more_the_reason_is_listed()
-> Result<()> {
    let corpus = corpus::corpus(key, &ATTACKER);
    let tokens =
        corpus.iter().map(|case| (case.name.clone(), (case.algorithm, case.token.clone()))).collect();
    let found = run(&tokens, &["bare"])?;
    for (library, stricter) in [("PyJWT", STRICTER_THAN_PYJWT), ("jose", STRICTER_THAN_JOSE)] {
        let accepts = |case: &Case| found[library][&case.name] == json!(true);
        assert_eq!(corpus::differences(&corpus, stricter, accepts), [""; 0], "{library}");
    }
    Ok(())
}
