//! Hostile tokens: each is signed as well as its author could, so that it is refused for what its name says and for
//! nothing else. The tests outside of this crate give the same tokens to other libraries.

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;
use tollgate_core::jws::{Algorithm, Fault, MAX_LEN};
use tollgate_core::signature::{Material, SigningKey};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Accepted,
    Malformed(Fault),
    /// Well formed, and not signed by the key.
    BadSignature,
}

pub(crate) struct Case {
    pub(crate) name: String,
    pub(crate) token: String,
    /// Of the key that the verifier has.
    pub(crate) algorithm: Algorithm,
    pub(crate) verdict: Verdict,
}

/// What another library accepts and we refuse.
pub(crate) struct Stricter {
    pub(crate) of: Of,
    #[allow(dead_code, reason = "for who reads the list")]
    pub(crate) why: &'static str,
}

pub(crate) enum Of {
    /// Cases that are refused for this.
    Fault(Fault),
    /// The case of this name.
    Case(&'static str),
}

impl Stricter {
    fn fits(&self, case: &Case) -> bool {
        match self.of {
            Of::Fault(fault) => case.verdict == Verdict::Malformed(fault),
            Of::Case(name) => case.name == name,
        }
    }
}

/// Where another library differs from us and the list does not say so, and entries of the list that are not true.
pub(crate) fn differences(
    corpus: &[Case],
    stricter: &[Stricter],
    accepts: impl Fn(&Case) -> bool,
) -> Vec<String> {
    let (accepted, refused): (Vec<&Case>, Vec<&Case>) = corpus.iter().partition(|case| accepts(case));
    let mut differences = Vec::new();
    for case in refused {
        if case.verdict == Verdict::Accepted {
            differences.push(format!("refused: {}", case.name));
        }
    }
    let is_listed = |case: &Case| stricter.iter().any(|one| one.fits(case));
    for case in &accepted {
        if case.verdict != Verdict::Accepted && !is_listed(case) {
            differences.push(format!("accepted: {}", case.name));
        }
    }
    for one in stricter.iter().filter(|one| !accepted.iter().any(|case| one.fits(case))) {
        differences.push(match one.of {
            Of::Fault(fault) => format!("not accepted: {fault}"),
            Of::Case(name) => format!("not accepted: {name}"),
        });
    }
    differences
}

/// A token of these bytes with a valid signature.
pub(crate) fn forge(signer: &SigningKey, header: impl AsRef<[u8]>, payload: impl AsRef<[u8]>) -> String {
    let input = format!("{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(payload));
    sign(signer, &input)
}

/// A signing input as it stands, with a valid signature.
fn sign(signer: &SigningKey, input: &str) -> String {
    format!("{input}.{}", URL_SAFE_NO_PAD.encode(signer.sign(input.as_bytes()).unwrap()))
}

pub(crate) fn header(algorithm: Algorithm) -> String {
    format!(r#"{{"alg":"{algorithm}","kid":"one","typ":"at+jwt"}}"#)
}

/// 2040, so that no library refuses it for its time.
pub(crate) const PAYLOAD: &str =
    r#"{"iss":"https://a.example","sub":"ann","aud":"api","exp":2208988800,"iat":1700000000}"#;

/// `key` is the key of an algorithm that the verifier has, `attacker` has another one.
pub(crate) fn corpus(key: impl Fn(Algorithm) -> &'static SigningKey, attacker: &SigningKey) -> Vec<Case> {
    let mut cases = Vec::new();
    for algorithm in Algorithm::ALL {
        let mut add = |name: &str, token: String, verdict: Verdict| {
            cases.push(Case { name: format!("{algorithm}: {name}"), token, algorithm, verdict });
        };
        of_any_algorithm(key(algorithm), &mut add);
        for other in Algorithm::ALL.into_iter().filter(|&other| other != algorithm) {
            let name = format!("a header that names {other} over our own signature");
            add(&name, forge(key(algorithm), header(other), PAYLOAD), Verdict::BadSignature);
            let name = format!("signed by our key of {other}");
            add(&name, forge(key(other), header(other), PAYLOAD), Verdict::BadSignature);
        }
    }
    let es256 = key(Algorithm::Es256);
    let mut add = |name: &str, token: String, verdict: Verdict| {
        cases.push(Case { name: name.to_owned(), token, algorithm: Algorithm::Es256, verdict });
    };
    of_the_header(es256, attacker, &mut add);
    of_the_json(es256, &mut add);
    of_the_encoding(es256, &mut add);
    of_the_claims(es256, &mut add);
    of_ecdsa(es256, &mut add);
    let mut add = |name: &str, token: String, verdict: Verdict| {
        cases.push(Case { name: name.to_owned(), token, algorithm: Algorithm::EdDsa, verdict });
    };
    of_ed25519(key(Algorithm::EdDsa), &mut add);
    let mut add = |name: &str, token: String, verdict: Verdict| {
        cases.push(Case { name: name.to_owned(), token, algorithm: Algorithm::Rs256, verdict });
    };
    of_rsa(key(Algorithm::Rs256), &mut add);
    cases
}

type Add<'a> = dyn FnMut(&str, String, Verdict) + 'a;

fn of_any_algorithm(key: &SigningKey, add: &mut Add<'_>) {
    let good = forge(key, header(key.algorithm()), PAYLOAD);
    add("a good token", good.clone(), Verdict::Accepted);
    let (input, encoded) = good.rsplit_once('.').unwrap();
    let signature = URL_SAFE_NO_PAD.decode(encoded).unwrap();
    let with = |signature: &[u8]| format!("{input}.{}", URL_SAFE_NO_PAD.encode(signature));

    add("no signature", format!("{input}."), Verdict::Malformed(Fault::Parts));
    add("no signature and no dot", input.to_owned(), Verdict::Malformed(Fault::Parts));
    add("a signature of zeros", with(&vec![0; signature.len()]), Verdict::BadSignature);
    add("a signature of ones", with(&vec![0xff; signature.len()]), Verdict::BadSignature);
    add("a signature of one byte", with(&[0]), Verdict::BadSignature);
    add("a signature that is cut off", with(&signature[..signature.len() - 1]), Verdict::BadSignature);
    add("a signature and a byte more", with(&[&signature[..], &[0]].concat()), Verdict::BadSignature);
    add("a byte and a signature", with(&[&[0], &signature[..]].concat()), Verdict::BadSignature);
    add("a signature twice", with(&signature.repeat(2)), Verdict::BadSignature);
    let other = forge(key, header(key.algorithm()), PAYLOAD.replace("ann", "ben"));
    let (other_input, _) = other.rsplit_once('.').unwrap();
    add("another payload", format!("{other_input}.{encoded}"), Verdict::BadSignature);

    for none in ["none", "None", "NONE", "nOnE", ""] {
        let (name, header) = (format!("alg {none:?}"), format!(r#"{{"alg":"{none}"}}"#));
        let signed = forge(key, &header, PAYLOAD);
        add(&format!("{name} with a signature"), signed.clone(), Verdict::Malformed(Fault::Algorithm));
        let (unsigned, _) = signed.rsplit_once('.').unwrap();
        add(&format!("{name} without a signature"), format!("{unsigned}."), Verdict::Malformed(Fault::Parts));
    }
    // What a verifier might take for the secret of HMAC: the public key in any of its spellings.
    let jwk = key.public_key().to_jwk("one");
    let raw = match key.public_key().material() {
        Material::P256 { x, y } => [&[4], &x[..], y].concat(),
        Material::Ed25519 { x } => x.to_vec(),
        Material::Rsa { n, .. } => n.clone(),
    };
    let encoded = STANDARD.encode(&raw);
    let pem = format!("-----BEGIN PUBLIC KEY-----\n{encoded}\n-----END PUBLIC KEY-----\n");
    for (name, secret) in
        [("its JWK", jwk.as_bytes()), ("its bytes", &raw), ("its PEM", pem.as_bytes()), ("nothing", &[])]
    {
        for alg in ["HS256", key.algorithm().as_str()] {
            let header = format!(r#"{{"alg":"{alg}","kid":"one"}}"#);
            let input = format!("{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(PAYLOAD));
            let mut mac = Hmac::<Sha256>::new_from_slice(secret).unwrap();
            mac.update(input.as_bytes());
            let token = format!("{input}.{}", URL_SAFE_NO_PAD.encode(mac.finalize().into_bytes()));
            let verdict = match alg {
                "HS256" => Verdict::Malformed(Fault::Algorithm),
                _ => Verdict::BadSignature,
            };
            add(&format!("HMAC with {name}, named {alg}"), token, verdict);
        }
    }
}

fn of_the_header(key: &SigningKey, attacker: &SigningKey, add: &mut Add<'_>) {
    for alg in [
        "es256",
        "Es256",
        "ES256 ",
        " ES256",
        "ES-256",
        "ES256K",
        "ES384",
        "ES512",
        "RS384",
        "RS512",
        "PS256",
        "HS256",
        "HS384",
        "HS512",
        "Ed25519",
        "Ed448",
        "eddsa",
        "dir",
        "RSA-OAEP",
        "SHA256withECDSA",
    ] {
        let token = forge(key, format!(r#"{{"alg":"{alg}"}}"#), PAYLOAD);
        add(&format!("alg {alg:?}"), token, Verdict::Malformed(Fault::Algorithm));
    }
    for header in [
        r"{}",
        r#"{"Alg":"ES256"}"#,
        r#"{"alg":null}"#,
        r#"{"alg":256}"#,
        r#"{"alg":["ES256"]}"#,
        r#"{"alg":"ES256","kid":null}"#,
        r#"{"alg":"ES256","kid":1}"#,
        r#"{"alg":"ES256","kid":["one"]}"#,
        r#"{"alg":"ES256","kid":{"$ne":""}}"#,
        r#"{"alg":"ES256","typ":1}"#,
        r#"{"alg":"ES256","typ":null}"#,
    ] {
        add(&format!("header {header}"), forge(key, header, PAYLOAD), Verdict::Malformed(Fault::Header));
    }
    let long = format!(r#"{{"alg":"ES256","kid":"{}"}}"#, "k".repeat(257));
    add("a kid of 257 bytes", forge(key, long, PAYLOAD), Verdict::Malformed(Fault::Header));
    // A kid is compared with those of the issuer's keys and does nothing else.
    for kid in ["", "../../../../dev/null", "' or 1=1 --", "https://evil.example/jwks.json", "one|id", "ключ"]
    {
        let header = |kid| format!(r#"{{"alg":"ES256","kid":{}}}"#, tollgate_core::json::quote(kid));
        add(&format!("kid {kid:?}"), forge(key, header(kid), PAYLOAD), Verdict::Accepted);
        add(&format!("another's, kid {kid:?}"), forge(attacker, header(kid), PAYLOAD), Verdict::BadSignature);
    }
    // Keys that a token brings along, or says where to find.
    let jwk = attacker.public_key().to_jwk("one");
    for (name, member) in [
        ("jwk", format!(r#""jwk":{jwk}"#)),
        ("jku", r#""jku":"https://evil.example/jwks.json""#.to_owned()),
        ("x5u", r#""x5u":"https://evil.example/chain.pem""#.to_owned()),
        ("x5c", r#""x5c":["MIIB"]"#.to_owned()),
        ("x5t", r#""x5t":"AAAA","x5t#S256":"AAAA""#.to_owned()),
    ] {
        let header = format!(r#"{{"alg":"ES256","kid":"one",{member}}}"#);
        add(
            &format!("{name} of another, signed by it"),
            forge(attacker, &header, PAYLOAD),
            Verdict::BadSignature,
        );
        add(&format!("{name}, signed by us"), forge(key, &header, PAYLOAD), Verdict::Accepted);
    }
    for member in [
        r#""crit":["exp"],"exp":1"#,
        r#""crit":["b64"],"b64":false"#,
        r#""crit":["b64"],"b64":true"#,
        r#""crit":["http://evil.example/UNDEFINED"],"http://evil.example/UNDEFINED":true"#,
        r#""crit":["alg"]"#,
        r#""crit":[]"#,
        r#""crit":null"#,
        r#""crit":"exp""#,
        r#""b64":false"#,
        r#""b64":true"#,
        r#""b64":"false""#,
    ] {
        let token = forge(key, format!(r#"{{"alg":"ES256",{member}}}"#), PAYLOAD);
        add(&format!("header with {member}"), token, Verdict::Malformed(Fault::Critical));
    }
    // RFC 7797 signs the payload as it is.
    let header = URL_SAFE_NO_PAD.encode(r#"{"alg":"ES256","b64":false}"#);
    let token = sign(key, &format!("{header}.{}", PAYLOAD.replace('.', "")));
    add("a payload that is not encoded", token, Verdict::Malformed(Fault::Critical));
}

fn of_the_json(key: &SigningKey, add: &mut Add<'_>) {
    let of_header = |bytes: &[u8]| forge(key, bytes, PAYLOAD);
    let of_payload = |bytes: &[u8]| forge(key, header(Algorithm::Es256), bytes);
    for (text, fault) in [
        ("", Fault::Json),
        (" ", Fault::Json),
        ("null", Fault::Json),
        ("1", Fault::Json),
        (r#""ES256""#, Fault::Json),
        (r#"[{"alg":"ES256"}]"#, Fault::Json),
        (r#"{"alg":"ES256""#, Fault::Json),
        (r#"{"alg":"ES256",}"#, Fault::Json),
        (r#"{"alg":"ES256"}{"alg":"none"}"#, Fault::Json),
        (r#"{"alg":"ES256"} x"#, Fault::Json),
        ("{\"alg\":\"ES256\"}\0", Fault::Json),
        ("\u{feff}{\"alg\":\"ES256\"}", Fault::Json),
        (r"{'alg':'ES256'}", Fault::Json),
        (r#"{"alg":"ES256"/**/}"#, Fault::Json),
        (r#"{"alg":"ES256","a":NaN}"#, Fault::Json),
        (r#"{"alg":"ES256","a":1e400}"#, Fault::Json),
        (r#"{"alg":"ES256","a":1e-99999}"#, Fault::Json),
        (r#"{"alg":"ES256","a":01}"#, Fault::Json),
        ("{\"alg\":\"ES256\",\"a\":\"\n\"}", Fault::Json),
        (r#"{"alg":"ES256","a":"\ud800"}"#, Fault::Json),
        (r#"{"alg":"ES256","a":"\udc00\ud800"}"#, Fault::Json),
        (r#"{"alg":"ES256","\ud800":1}"#, Fault::Json),
        (r#"{"alg":"ES256","a":"\u0000"}"#, Fault::Nul),
        (r#"{"alg":"ES256","a\u0000":1}"#, Fault::Nul),
        (r#"{"alg":"ES256\u0000"}"#, Fault::Nul),
        (r#"{"alg":"ES256","alg":"ES256"}"#, Fault::DuplicateName),
        (r#"{"alg":"none","alg":"ES256"}"#, Fault::DuplicateName),
        (r#"{"alg":"ES256","alg":"none"}"#, Fault::DuplicateName),
        (r#"{"alg":"ES256","\u0061lg":"none"}"#, Fault::DuplicateName),
        (r#"{"alg":"ES256","a":[{"b":1,"b":1}]}"#, Fault::DuplicateName),
    ] {
        let verdict = Verdict::Malformed(fault);
        if !text.is_empty() {
            add(&format!("header {text:?}"), of_header(text.as_bytes()), verdict);
            add(&format!("payload {text:?}"), of_payload(text.as_bytes()), verdict);
        }
    }
    for (name, bytes) in [
        ("bytes that are not UTF-8", &b"{\"alg\":\"ES256\",\"a\":\"\xff\"}"[..]),
        ("an overlong quotation mark", b"{\"alg\":\"ES256\",\"a\":\"\xc0\xa2\"}"),
        ("a surrogate in UTF-8", b"{\"alg\":\"ES256\",\"a\":\"\xed\xa0\x80\"}"),
    ] {
        add(&format!("header of {name}"), of_header(bytes), Verdict::Malformed(Fault::Json));
        add(&format!("payload of {name}"), of_payload(bytes), Verdict::Malformed(Fault::Json));
    }
    let utf16: Vec<u8> = r#"{"alg":"ES256"}"#.encode_utf16().flat_map(u16::to_le_bytes).collect();
    add("header in UTF-16", of_header(&utf16), Verdict::Malformed(Fault::Json));
    for (depth, verdict) in [
        (31, Verdict::Accepted),
        (32, Verdict::Malformed(Fault::Depth)),
        (1000, Verdict::Malformed(Fault::Depth)),
    ] {
        let (open, close) = ("[".repeat(depth), "]".repeat(depth));
        let nested = format!(r#"{{"alg":"ES256","exp":2208988800,"a":{open}{close}}}"#);
        add(&format!("header with {depth} arrays in each other"), of_header(nested.as_bytes()), verdict);
        add(&format!("payload with {depth} arrays in each other"), of_payload(nested.as_bytes()), verdict);
    }
    let large = format!(r#"{{"alg":"ES256","a":"{}"}}"#, "a".repeat(1 << 20));
    add("header of 1 MB", of_header(large.as_bytes()), Verdict::Malformed(Fault::Size));
    add("payload of 1 MB", of_payload(large.as_bytes()), Verdict::Malformed(Fault::Size));
    let spaces = [r#"{"alg":"ES256"}"#, &" ".repeat(1 << 20)].concat();
    add("header with 1 MB of spaces", of_header(spaces.as_bytes()), Verdict::Malformed(Fault::Size));
    add("white space and escapes", of_header(br#" { "\u0061lg" : "\u0045S256" } "#), Verdict::Accepted);
}

fn of_the_encoding(key: &SigningKey, add: &mut Add<'_>) {
    // Two lengths each, so that every number of unused bits occurs.
    let (header, payload) = (r#"{"alg":"ES256"}"#, r#"{"exp":2208988800}"#);
    let header = URL_SAFE_NO_PAD.encode(header.to_owned() + " ");
    let payload = URL_SAFE_NO_PAD.encode(payload.to_owned() + " ");
    let good = sign(key, &format!("{header}.{payload}"));
    add("a good token of the length", good.clone(), Verdict::Accepted);
    let signature = good.rsplit_once('.').unwrap().1;
    // The signature covers what was changed, so that only the encoding is left to refuse.
    let changes: [(&str, &dyn Fn(&str) -> String); 13] = [
        ("padding", &|part| format!("{part}=")),
        ("more padding", &|part| format!("{part}==")),
        ("a space at the end", &|part| format!("{part} ")),
        ("a space at the beginning", &|part| format!(" {part}")),
        ("a newline at the end", &|part| format!("{part}\n")),
        ("a line break inside", &|part| format!("{}\r\n{}", &part[..4], &part[4..])),
        ("a tab inside", &|part| format!("{}\t{}", &part[..4], &part[4..])),
        ("a NUL at the end", &|part| format!("{part}\0")),
        ("an exclamation mark inside", &|part| format!("{}!{}", &part[..4], &part[4..])),
        ("a zero-width space at the end", &|part| format!("{part}\u{200b}")),
        ("a full-width letter", &|part| format!("{part}Ａ")),
        ("percent-encoding", &|part| format!("%{:02x}{}", part.as_bytes()[0], &part[1..])),
        ("unused bits that are set", &|part| {
            const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
            let (rest, last) = part.split_at(part.len() - 1);
            let value = ALPHABET.iter().position(|&letter| letter == last.as_bytes()[0]).unwrap();
            format!("{rest}{}", char::from(ALPHABET[value | 1]))
        }),
    ];
    for (name, change) in changes {
        let verdict = Verdict::Malformed(Fault::Encoding);
        add(&format!("header with {name}"), sign(key, &format!("{}.{payload}", change(&header))), verdict);
        add(&format!("payload with {name}"), sign(key, &format!("{header}.{}", change(&payload))), verdict);
        add(&format!("signature with {name}"), format!("{header}.{payload}.{}", change(signature)), verdict);
    }
    let question_marks = URL_SAFE_NO_PAD.encode(r#"{"exp":2208988800,"a":"???~~~"}"#);
    assert!(question_marks.contains(['-', '_']));
    let standard = question_marks.replace('-', "+").replace('_', "/");
    add(
        "a payload with + and /",
        sign(key, &format!("{header}.{standard}")),
        Verdict::Malformed(Fault::Encoding),
    );

    for (name, token) in [
        ("nothing", String::new()),
        ("a dot", ".".to_owned()),
        ("two dots", "..".to_owned()),
        ("three dots", "...".to_owned()),
        ("no dot", header.clone()),
        ("no header", sign(key, &format!(".{payload}"))),
        ("no payload", sign(key, &format!("{header}."))),
        ("a dot at the end", format!("{good}.")),
        ("a dot at the beginning", format!(".{good}")),
        ("a fourth part", format!("{good}.{signature}")),
        (
            "five parts, as encrypted tokens have",
            format!("{header}.{payload}.{payload}.{payload}.{signature}"),
        ),
        ("an empty part inside", format!("{header}..{payload}.{signature}")),
    ] {
        add(name, token, Verdict::Malformed(Fault::Parts));
    }
    let of_json = format!(r#"{{"protected":"{header}","payload":"{payload}","signature":"{signature}"}}"#);
    add("JSON serialization", of_json, Verdict::Malformed(Fault::Parts));
    for (name, token) in [
        ("Bearer before it", format!("Bearer {good}")),
        ("a space before it", format!(" {good}")),
        ("a newline after it", format!("{good}\n")),
        ("quotation marks around it", format!("\"{good}\"")),
        ("a comma and another after it", format!("{good},{}", good.replace('.', ""))),
    ] {
        add(name, token, Verdict::Malformed(Fault::Encoding));
    }
    let of_length = |length: usize| {
        // Four characters for three bytes, and two more for the last one.
        let filler = (length - good.len()) / 4 * 3;
        let payload = format!(r#"{{"exp":2208988800}}{}"#, " ".repeat(filler + 1));
        sign(key, &format!("{header}.{}", URL_SAFE_NO_PAD.encode(payload)))
    };
    let longest = (0..8).map(|less| of_length(MAX_LEN - less)).find(|token| token.len() <= MAX_LEN).unwrap();
    add("the longest token", longest, Verdict::Accepted);
    add("a token that is too long", of_length(MAX_LEN + 4), Verdict::Malformed(Fault::Size));
}

fn of_the_claims(key: &SigningKey, add: &mut Add<'_>) {
    let of_payload = |payload: &str| forge(key, header(Algorithm::Es256), payload);
    for claim in [
        r#""exp":"2208988800""#,
        r#""exp":null"#,
        r#""exp":true"#,
        r#""exp":[2208988800]"#,
        r#""exp":{}"#,
        r#""exp":-1"#,
        r#""exp":253402300800"#,
        r#""exp":9223372036854775807"#,
        r#""exp":1e300"#,
        r#""exp":2208988800,"nbf":"1""#,
        r#""exp":2208988800,"nbf":null"#,
        r#""exp":2208988800,"nbf":[]"#,
        r#""exp":2208988800,"nbf":-1"#,
        r#""exp":2208988800,"iat":"1""#,
        r#""exp":2208988800,"iat":false"#,
        r#""exp":2208988800,"iat":-0.5"#,
        r#""exp":2208988800,"aud":1"#,
        r#""exp":2208988800,"aud":null"#,
        r#""exp":2208988800,"aud":{"api":true}"#,
        r#""exp":2208988800,"aud":[]"#,
        r#""exp":2208988800,"aud":["api",1]"#,
        r#""exp":2208988800,"aud":[["api"]]"#,
        r#""exp":2208988800,"iss":["https://a.example"]"#,
        r#""exp":2208988800,"iss":null"#,
        r#""exp":2208988800,"sub":1"#,
        r#""exp":2208988800,"sub":{"a":"ann"}"#,
        r#""exp":2208988800,"jti":1"#,
    ] {
        add(
            &format!("claims {claim}"),
            of_payload(&format!("{{{claim}}}")),
            Verdict::Malformed(Fault::Claim),
        );
    }
    for claims in [
        r#"{"exp":2208988800,"exp":1}"#,
        r#"{"exp":1,"e\u0078p":2208988800}"#,
        r#"{"exp":2208988800,"sub":"ann","sub":"ben"}"#,
    ] {
        add(&format!("claims {claims}"), of_payload(claims), Verdict::Malformed(Fault::DuplicateName));
    }
    add("a fraction of a second", of_payload(r#"{"exp":2208988800.5,"nbf":1.7e9}"#), Verdict::Accepted);
    add("audiences as a list", of_payload(r#"{"exp":2208988800,"aud":["a","api"]}"#), Verdict::Accepted);
}

/// The order of P-256's group.
const ORDER: [u8; 32] = *b"\xff\xff\xff\xff\x00\x00\x00\x00\xff\xff\xff\xff\xff\xff\xff\xff\xbc\xe6\xfa\xad\xa7\x17\x9e\x84\xf3\xb9\xca\xc2\xfc\x63\x25\x51";

fn subtract(a: [u8; 32], b: [u8; 32]) -> [u8; 32] {
    let (mut difference, mut borrow) = ([0; 32], 0);
    for i in (0..32).rev() {
        let digit = i16::from(a[i]) - i16::from(b[i]) - borrow;
        borrow = i16::from(digit < 0);
        difference[i] = digit.rem_euclid(256) as u8;
    }
    difference
}

fn of_ecdsa(key: &SigningKey, add: &mut Add<'_>) {
    let good = forge(key, header(Algorithm::Es256), PAYLOAD);
    let (input, signature) = good.rsplit_once('.').unwrap();
    let signature = URL_SAFE_NO_PAD.decode(signature).unwrap();
    let (r, s) = signature.split_first_chunk::<32>().unwrap();
    let s: [u8; 32] = s.try_into().unwrap();
    let with = |bytes: &[u8]| format!("{input}.{}", URL_SAFE_NO_PAD.encode(bytes));
    let (zero, mut one) = ([0; 32], [0; 32]);
    one[31] = 1;
    let less = subtract(ORDER, one);
    let numbers = [("0", zero), ("1", one), ("n - 1", less), ("n", ORDER), ("2^256 - 1", [0xff; 32])];
    for (name, number) in numbers {
        add(&format!("ES256: r is {name}"), with(&[number, s].concat()), Verdict::BadSignature);
        add(&format!("ES256: s is {name}"), with(&[*r, number].concat()), Verdict::BadSignature);
        for (other_name, other) in numbers {
            let name = format!("ES256: r is {name}, s is {other_name}");
            add(&name, with(&[number, other].concat()), Verdict::BadSignature);
        }
    }
    add("ES256: r and s exchanged", with(&[s, *r].concat()), Verdict::BadSignature);
    // A signature of X.509 instead of 64 bytes.
    let integer = |number: &[u8; 32]| [&[2, 33, 0], &number[..]].concat();
    let der = [vec![0x30, 70], integer(r), integer(&s)].concat();
    add("ES256: a signature in DER", with(&der), Verdict::BadSignature);
    // ECDSA is malleable: one who has a token can make another signature for it. So a denied token is not recognised by
    // its bytes, but by what was signed.
    let twin = with(&[*r, subtract(ORDER, s)].concat());
    add("ES256: the twin of a signature, n - s", twin, Verdict::Accepted);
}

fn of_ed25519(key: &SigningKey, add: &mut Add<'_>) {
    // Little-endian, as is the s of a signature.
    const ORDER: [u8; 32] = *b"\xed\xd3\xf5\x5c\x1a\x63\x12\x58\xd6\x9c\xf7\xa2\xde\xf9\xde\x14\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x10";
    let good = forge(key, header(Algorithm::EdDsa), PAYLOAD);
    let (input, signature) = good.rsplit_once('.').unwrap();
    let signature = URL_SAFE_NO_PAD.decode(signature).unwrap();
    let with = |bytes: &[u8]| format!("{input}.{}", URL_SAFE_NO_PAD.encode(bytes));
    let mut larger = signature.clone();
    for times in 1..=14 {
        let mut carry = 0;
        for (digit, order) in larger[32..].iter_mut().zip(ORDER) {
            let sum = u16::from(*digit) + u16::from(order) + carry;
            (*digit, carry) = (sum as u8, sum >> 8);
        }
        add(&format!("EdDSA: s plus {times} times the order"), with(&larger), Verdict::BadSignature);
    }
    let mut identity = signature.clone();
    identity[..32].fill(0);
    identity[0] = 1;
    add("EdDSA: R is the identity", with(&identity), Verdict::BadSignature);
    identity[32..].fill(0);
    add("EdDSA: R is the identity and s is 0", with(&identity), Verdict::BadSignature);
}

fn of_rsa(key: &SigningKey, add: &mut Add<'_>) {
    let good = forge(key, header(Algorithm::Rs256), PAYLOAD);
    let (input, signature) = good.rsplit_once('.').unwrap();
    let signature = URL_SAFE_NO_PAD.decode(signature).unwrap();
    let with = |bytes: &[u8]| format!("{input}.{}", URL_SAFE_NO_PAD.encode(bytes));
    let Material::Rsa { n, .. } = key.public_key().material() else { unreachable!("a key of RS256") };
    let mut one = vec![0; n.len()];
    one[n.len() - 1] = 1;
    let mut less = n.clone();
    less[n.len() - 1] -= 1;
    for (name, number) in [("1", &one), ("n - 1", &less), ("n", n)] {
        add(&format!("RS256: the signature is {name}"), with(number), Verdict::BadSignature);
    }
    let (mut sum, mut carry) = (signature, 0);
    for (digit, of_n) in sum.iter_mut().zip(n).rev() {
        let total = u16::from(*digit) + u16::from(*of_n) + carry;
        (*digit, carry) = (total as u8, total >> 8);
    }
    add("RS256: the signature plus n", with(&[&[carry as u8], &sum[..]].concat()), Verdict::BadSignature);
    add("RS256: the signature plus n, cut to its length", with(&sum), Verdict::BadSignature);
}
