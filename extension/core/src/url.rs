//! Signed URLs: their canonical form, their signature, what they allow, and the decision about a request.
//!
//! The form is a contract with verifiers that are not ours: docs/signed-urls.md defines it, and contrib/signed-urls has its
//! vectors. What is signed is five lines: the version, the origin, the path or its prefix, the query without our parameters,
//! and our parameters without the signature. Two URLs have the same lines only if every reader of RFC 3986 takes them for the
//! same; what readers take differently (dot segments, a user in front of the host, raw controls) is refused instead.
//!
//! A value of ours has one spelling, of characters that nothing on the way re-encodes.

use core::fmt;
use std::net::{IpAddr, Ipv6Addr};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use zeroize::Zeroizing;

use crate::json::{self, Json};
use crate::mac_key::{MacKey, Use};
use crate::net::Net;

/// Of a URL, in bytes.
pub const MAX_LEN: usize = 8 * 1024;
/// What the names of our parameters begin with.
pub const PARAMETER: &str = "tgu_";
/// Of a subject, in characters.
pub const MAX_SUBJECT: usize = 255;
/// Of pinned headers: how many, and how many bytes their JSON has.
pub const MAX_HEADERS: usize = 16;
pub const MAX_HEADERS_LEN: usize = 2048;

const VERSION: &str = "tollgate-url-1";
const SIGNATURE: &str = "tgu_sig";
const MAC_LEN: usize = 32;
/// Of a key id and of a signature: 32 bytes in base64url.
const ENCODED_LEN: usize = 43;
const MAX_METHODS: usize = 9;
const MAX_METHOD_LEN: usize = 16;

/// The parameters that are signed, in the order of their names.
#[derive(Clone, Copy)]
enum Parameter {
    Expires,
    Headers,
    Key,
    Methods,
    NotBefore,
    Network,
    Once,
    Prefix,
    Subject,
}

const NAMES: [&str; 9] = [
    "tgu_exp",
    "tgu_headers",
    "tgu_key",
    "tgu_methods",
    "tgu_nbf",
    "tgu_net",
    "tgu_once",
    "tgu_prefix",
    "tgu_sub",
];

/// Why a text is no signed URL, whatever key would be tried, or cannot become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fault {
    /// Longer than [`MAX_LEN`].
    Size,
    /// A control character, a space, a backslash, or one that is not ASCII.
    Character,
    /// It has a fragment, which no server receives.
    Fragment,
    /// Not `http://` or `https://`.
    Scheme,
    /// A user, or a host or port that is not written as it should be.
    Host,
    /// `%` without two hexadecimal digits, or `%00`.
    Escape,
    /// A segment of the path that is `.` or `..`, however it is written.
    DotSegment,
    /// One of ours is missing, unknown, there twice, or not written as it should be.
    Parameter,
}

impl Fault {
    pub const ALL: [Fault; 8] = [
        Fault::Size,
        Fault::Character,
        Fault::Fragment,
        Fault::Scheme,
        Fault::Host,
        Fault::Escape,
        Fault::DotSegment,
        Fault::Parameter,
    ];

    /// The name in SQL.
    pub const fn as_str(self) -> &'static str {
        match self {
            Fault::Size => "size",
            Fault::Character => "character",
            Fault::Fragment => "fragment",
            Fault::Scheme => "scheme",
            Fault::Host => "host",
            Fault::Escape => "escape",
            Fault::DotSegment => "dot-segment",
            Fault::Parameter => "parameter",
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl core::error::Error for Fault {}

/// The `code` of a verification of a signed URL, in the order in which they are decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Code {
    Valid,
    Malformed,
    UnknownKey,
    BadSignature,
    Expired,
    NotYetValid,
    PathNotAllowed,
    MethodNotAllowed,
    IpNotAllowed,
    AlreadyUsed,
}

impl Code {
    pub const ALL: [Code; 10] = [
        Code::Valid,
        Code::Malformed,
        Code::UnknownKey,
        Code::BadSignature,
        Code::Expired,
        Code::NotYetValid,
        Code::PathNotAllowed,
        Code::MethodNotAllowed,
        Code::IpNotAllowed,
        Code::AlreadyUsed,
    ];

    /// The code as SQL returns it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Code::Valid => "VALID",
            Code::Malformed => "MALFORMED",
            Code::UnknownKey => "UNKNOWN_KEY",
            Code::BadSignature => "BAD_SIGNATURE",
            Code::Expired => "EXPIRED",
            Code::NotYetValid => "NOT_YET_VALID",
            Code::PathNotAllowed => "PATH_NOT_ALLOWED",
            Code::MethodNotAllowed => "METHOD_NOT_ALLOWED",
            Code::IpNotAllowed => "IP_NOT_ALLOWED",
            Code::AlreadyUsed => "ALREADY_USED",
        }
    }
}

pub enum Urls {}

impl Use for Urls {
    const KID: &'static [u8] = b"tollgate url key id 1\0";
}

/// A key that signs URLs.
pub type Key = MacKey<Urls>;

impl Key {
    /// The key as verifiers elsewhere take it: base64url without padding.
    pub fn to_text(&self) -> Zeroizing<String> {
        Zeroizing::new(URL_SAFE_NO_PAD.encode(self.as_bytes()))
    }
}

/// A URL up to its query, in canonical form, and its query.
struct Target {
    /// The version, the origin and the path, each on a line of its own; the last one has no end.
    lines: String,
    /// Where the path begins.
    path: usize,
    /// Normalised, but not sorted.
    query: String,
}

impl Target {
    fn parse(url: &str) -> Result<Target, Fault> {
        if url.len() > MAX_LEN {
            return Err(Fault::Size);
        }
        for byte in url.bytes() {
            match byte {
                b'#' => return Err(Fault::Fragment),
                b'\\' => return Err(Fault::Character),
                b'!'..=b'~' => {}
                _ => return Err(Fault::Character),
            }
        }
        let (scheme, rest) = url.split_once("://").ok_or(Fault::Scheme)?;
        let default_port = match scheme {
            _ if scheme.eq_ignore_ascii_case("http") => "80",
            _ if scheme.eq_ignore_ascii_case("https") => "443",
            _ => return Err(Fault::Scheme),
        };
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));

        let mut lines = String::with_capacity(2 * url.len() + 64);
        lines.push_str(VERSION);
        lines.push('\n');
        lines.extend(scheme.chars().map(|c| c.to_ascii_lowercase()));
        lines.push_str("://");
        push_authority(&mut lines, authority, default_port)?;
        lines.push('\n');
        let start = lines.len();
        lines.push_str(if path.is_empty() { "/" } else { "" });
        push_normalised(&mut lines, path)?;
        if has_dot_segment(&lines[start..]) {
            return Err(Fault::DotSegment);
        }
        let mut normalised = String::with_capacity(query.len());
        push_normalised(&mut normalised, query)?;
        Ok(Target { lines, path: start, query: normalised })
    }

    fn path(&self) -> &str {
        &self.lines[self.path..]
    }

    /// The parameters of the query, without empty ones.
    fn parameters(&self) -> impl Iterator<Item = &str> {
        self.query.split('&').filter(|part| !part.is_empty())
    }
}

/// Host in lower case, without the default port.
fn push_authority(into: &mut String, authority: &str, default_port: &str) -> Result<(), Fault> {
    let (host, port) = match authority.rsplit_once(':') {
        // The colons of an IPv6 address are in brackets.
        Some((host, port)) if !port.ends_with(']') => (host, Some(port)),
        _ => (authority, None),
    };
    let start = into.len();
    into.extend(host.chars().map(|c| c.to_ascii_lowercase()));
    let host = &into[start..];
    let is_host = match host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
        Some(address) => address.parse::<Ipv6Addr>().is_ok(),
        None => host.split('.').all(|label| {
            !label.is_empty() && label.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_'))
        }),
    };
    if !is_host {
        return Err(Fault::Host);
    }
    let Some(port) = port else { return Ok(()) };
    if !is_number(port, 5) {
        return Err(Fault::Host);
    }
    if port != default_port {
        into.push(':');
        into.push_str(port);
    }
    Ok(())
}

/// Unreserved characters as they are, all other escapes with capital digits (RFC 3986 section 6.2.2); what may not be there
/// without an escape, but browsers send, gets one.
fn push_normalised(into: &mut String, text: &str) -> Result<(), Fault> {
    let bytes = text.as_bytes();
    // The characters from `from` on that are taken as they are.
    let (mut from, mut at) = (0, 0);
    while let Some(&byte) = bytes.get(at) {
        if is_unreserved(byte) || is_reserved(byte) {
            at += 1;
            continue;
        }
        into.push_str(&text[from..at]);
        at += 1;
        let mut meant = byte;
        if byte == b'%' {
            meant = bytes.get(at..at + 2).and_then(byte_of).filter(|&byte| byte != 0).ok_or(Fault::Escape)?;
            at += 2;
        }
        if is_unreserved(meant) {
            into.push(char::from(meant));
        } else {
            into.push('%');
            into.extend(
                [meant >> 4, meant & 15].map(|half| char::from(b"0123456789ABCDEF"[usize::from(half)])),
            );
        }
        from = at;
    }
    into.push_str(&text[from..]);
    Ok(())
}

fn byte_of(digits: &[u8]) -> Option<u8> {
    let half = |digit: u8| char::from(digit).to_digit(16).and_then(|half| u8::try_from(half).ok());
    Some(half(digits[0])? << 4 | half(digits[1])?)
}

fn is_unreserved(byte: u8) -> bool {
    matches!(byte, b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~')
}

/// Reserved characters that may be in a path or a query as they are.
fn is_reserved(byte: u8) -> bool {
    matches!(
        byte,
        b'!' | b'$'
            | b'&'
            | b'\''
            | b'('
            | b')'
            | b'*'
            | b'+'
            | b','
            | b';'
            | b'='
            | b':'
            | b'@'
            | b'/'
            | b'?'
    )
}

/// Some servers cut a segment at a semicolon, before or after they decode it.
fn has_dot_segment(path: &str) -> bool {
    path.split('/').any(|segment| {
        let name = segment.split(';').next().unwrap_or_default();
        matches!(name.split("%3B").next(), Some("." | ".."))
    })
}

/// Whether this may follow the prefix that was signed: whatever a server decodes or cuts, it stays below the prefix.
fn is_plain(rest: &str) -> bool {
    !rest.bytes().any(|byte| matches!(byte, b'%' | b';'))
}

/// A decimal number without a sign or leading zeros.
fn is_number(text: &str, longest: usize) -> bool {
    text.len() <= longest
        && text.bytes().all(|b| b.is_ascii_digit())
        && !text.is_empty()
        && !text.starts_with('0')
}

/// A signed URL that is well formed; its signature is not checked yet.
///
/// It has no `Debug`, which would print the signature.
pub struct SignedUrl {
    pub key_id: String,
    /// Seconds since 1970, as the other time.
    pub expires_at: i64,
    pub not_before: Option<i64>,
    /// Names with dots between them.
    methods: String,
    /// Whether what follows the prefix may follow it.
    is_plain: bool,
    pub network: Option<Net>,
    /// Makes a URL for one use differ from all others.
    pub once: Option<[u8; 16]>,
    pub subject: Option<String>,
    /// An object of texts, as JSON.
    pub response_headers: Option<String>,
    mac: [u8; MAC_LEN],
    canonical: String,
}

impl SignedUrl {
    pub fn parse(url: &str) -> Result<SignedUrl, Fault> {
        let target = Target::parse(url)?;
        let (mut ours, mut signature) = ([None; NAMES.len()], None);
        let mut theirs = Vec::new();
        for part in target.parameters() {
            if !part.starts_with(PARAMETER) {
                theirs.push(part);
                continue;
            }
            let (name, value) = part.split_once('=').ok_or(Fault::Parameter)?;
            let place = match NAMES.iter().position(|known| *known == name) {
                Some(place) => &mut ours[place],
                None if name == SIGNATURE => &mut signature,
                None => return Err(Fault::Parameter),
            };
            if place.replace(value).is_some() {
                return Err(Fault::Parameter);
            }
        }
        // Stable: the order of values of one name may mean something.
        theirs.sort_by_key(|part| part.split('=').next());
        let read = Ours { values: ours };
        let methods = read.required(Parameter::Methods)?;
        if !are_methods(methods) {
            return Err(Fault::Parameter);
        }
        let key_id = read.required(Parameter::Key)?;
        if key_id.len() != ENCODED_LEN || !key_id.bytes().all(|b| is_unreserved(b) && b != b'.' && b != b'~')
        {
            return Err(Fault::Parameter);
        }
        let prefix = read.number(Parameter::Prefix, 4)?;
        let mut url = SignedUrl {
            key_id: key_id.to_owned(),
            expires_at: read.number(Parameter::Expires, 12)?.ok_or(Fault::Parameter)?,
            not_before: read.number(Parameter::NotBefore, 12)?,
            methods: methods.to_owned(),
            is_plain: true,
            network: read.read(Parameter::Network, network_of)?,
            once: read.read(Parameter::Once, once_of)?,
            subject: read.read(Parameter::Subject, |value| text_of(value).filter(|text| is_subject(text)))?,
            response_headers: read
                .read(Parameter::Headers, |value| text_of(value).filter(|text| are_headers(text)))?,
            mac: signature.and_then(mac_of).ok_or(Fault::Parameter)?,
            canonical: String::new(),
        };
        let mut canonical = String::with_capacity(target.lines.len() + target.query.len() + 2);
        canonical.push_str(&target.lines);
        if let Some(length) = prefix.and_then(|length| usize::try_from(length).ok()) {
            // A path that is not below the prefix stays whole, and so is not what was signed.
            let path = target.path();
            if path.get(..length).is_some_and(|prefix| prefix.ends_with('/')) {
                url.is_plain = is_plain(&path[length..]);
                canonical.truncate(target.path + length);
            }
        }
        canonical.push('\n');
        canonical.push_str(&theirs.join("&"));
        canonical.push('\n');
        read.push_to(&mut canonical);
        url.canonical = canonical;
        Ok(url)
    }

    /// What is signed.
    pub fn canonical(&self) -> &str {
        &self.canonical
    }

    /// Takes the same time whatever the signature is.
    pub fn is_signed_by(&self, key: &Key) -> bool {
        key.verifies(self.canonical.as_bytes(), &self.mac)
    }

    /// What distinguishes a URL for one use from all others. Only for one that is signed by its key.
    pub fn signature(&self) -> &[u8; MAC_LEN] {
        &self.mac
    }

    /// Decides on a request, for a URL that is signed by its key. That it is for one use is left to the caller.
    pub fn decide(&self, request: &Request<'_>) -> Code {
        const SECOND: i64 = 1_000_000;
        if request.now >= self.expires_at.saturating_mul(SECOND) {
            Code::Expired
        } else if self.not_before.is_some_and(|start| request.now < start.saturating_mul(SECOND)) {
            Code::NotYetValid
        } else if !self.is_plain {
            Code::PathNotAllowed
        } else if !self.methods.split('.').any(|method| method == request.method) {
            Code::MethodNotAllowed
        } else if self
            .network
            .is_some_and(|network| !request.client.is_some_and(|client| network.contains(&client)))
        {
            Code::IpNotAllowed
        } else {
            Code::Valid
        }
    }
}

/// A request for a signed URL.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// As HTTP has it: case matters (RFC 9110 section 9.1).
    pub method: &'a str,
    pub client: Option<Net>,
    /// Microseconds since 1970.
    pub now: i64,
}

/// The values of our parameters.
struct Ours<'a> {
    values: [Option<&'a str>; NAMES.len()],
}

impl<'a> Ours<'a> {
    fn required(&self, parameter: Parameter) -> Result<&'a str, Fault> {
        self.values[parameter as usize].ok_or(Fault::Parameter)
    }

    fn read<T>(
        &self,
        parameter: Parameter,
        read: impl FnOnce(&str) -> Option<T>,
    ) -> Result<Option<T>, Fault> {
        self.values[parameter as usize].map(|value| read(value).ok_or(Fault::Parameter)).transpose()
    }

    fn number(&self, parameter: Parameter, digits: usize) -> Result<Option<i64>, Fault> {
        self.read(parameter, |value| value.parse().ok().filter(|_| is_number(value, digits)))
    }

    /// Those that are there, as they are signed.
    fn push_to(&self, into: &mut String) {
        let mut separator = "";
        for (name, value) in NAMES.into_iter().zip(self.values) {
            let Some(value) = value else { continue };
            [separator, name, "=", value].into_iter().for_each(|piece| into.push_str(piece));
            separator = "&";
        }
    }
}

fn are_methods(text: &str) -> bool {
    text.split('.').count() <= MAX_METHODS
        && text.split('.').all(|method| {
            (1..=MAX_METHOD_LEN).contains(&method.len()) && method.bytes().all(|b| b.is_ascii_uppercase())
        })
}

fn text_of(value: &str) -> Option<String> {
    String::from_utf8(URL_SAFE_NO_PAD.decode(value).ok()?).ok()
}

/// The engine refuses a signature whose unused bits are set.
fn mac_of(value: &str) -> Option<[u8; MAC_LEN]> {
    let mut mac = [0; MAC_LEN];
    let length = URL_SAFE_NO_PAD.decode_slice(value, &mut mac).ok()?;
    (length == MAC_LEN).then_some(mac)
}

fn hex_of<const N: usize>(text: &str) -> Option<[u8; N]> {
    if text.len() != 2 * N || text.bytes().any(|b| b.is_ascii_uppercase()) {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        *byte = byte_of(pair)?;
    }
    Some(bytes)
}

fn once_of(value: &str) -> Option<[u8; 16]> {
    hex_of(value)
}

/// `cb007100-24`: the digits of an address, and the length of its network. One spelling: no bits beyond the length, and IPv4
/// addresses as such.
fn network_of(value: &str) -> Option<Net> {
    let (digits, bits) = value.split_once('-')?;
    let bits = bits.parse().ok()?;
    let network = match digits.len() {
        8 => Net::v4(hex_of(digits)?, bits)?,
        _ => Net::v6(hex_of(digits)?, bits)?,
    };
    (network_text(&network) == value).then_some(network)
}

fn network_text(network: &Net) -> String {
    let masked = |address: u128, width: u8| {
        let host = u32::from(width - network.bits());
        address.checked_shr(host).and_then(|kept| kept.checked_shl(host)).unwrap_or(0)
    };
    match network.addr() {
        IpAddr::V4(address) => {
            format!("{:08x}-{}", masked(u128::from(address.to_bits()), 32), network.bits())
        }
        IpAddr::V6(address) => format!("{:032x}-{}", masked(address.to_bits(), 128), network.bits()),
    }
}

pub fn is_subject(text: &str) -> bool {
    (1..=MAX_SUBJECT).contains(&text.chars().count()) && !text.contains('\0')
}

/// Whether a text is an object of header fields (RFC 9110 section 5): names once each, whatever their case, and values that
/// cannot end the field.
pub fn are_headers(text: &str) -> bool {
    let is_name = |name: &str| {
        !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b))
    };
    let is_value = |value: &Json| {
        value.as_text().is_some_and(|value| {
            value.bytes().all(|b| matches!(b, b' '..=b'~'))
                && !value.starts_with(' ')
                && !value.ends_with(' ')
        })
    };
    let Some(fields) = (text.len() <= MAX_HEADERS_LEN).then(|| json::parse_object(text).ok()).flatten()
    else {
        return false;
    };
    let mut names: Vec<String> = fields.keys().map(|name| name.to_ascii_lowercase()).collect();
    names.sort();
    names.dedup();
    names.len() == fields.len()
        && (1..=MAX_HEADERS).contains(&fields.len())
        && fields.iter().all(|(name, value)| is_name(name) && is_value(value))
}

/// What a URL is to allow.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options<'a> {
    /// Seconds since 1970.
    pub expires_at: i64,
    pub not_before: Option<i64>,
    pub methods: &'a [&'a str],
    /// All paths that begin with it; it ends with a slash.
    pub path_prefix: Option<&'a str>,
    pub network: Option<Net>,
    /// Random bytes, for a URL that is to be used once.
    pub once: Option<[u8; 16]>,
    pub subject: Option<&'a str>,
    /// An object of texts, as JSON.
    pub response_headers: Option<&'a str>,
}

/// Why a URL was not signed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unfit {
    Url(Fault),
    /// It has parameters of ours already.
    Signed,
    Times,
    Methods,
    /// It does not end with a slash, the path does not begin with it, or goes on with what is not plain.
    Prefix,
    Subject,
    Headers,
}

/// Signs a URL: it gets parameters of ours, and is otherwise left as it is written. What [`SignedUrl::parse`] would refuse is
/// not signed.
pub fn sign(key: &Key, url: &str, options: &Options<'_>) -> Result<String, Unfit> {
    let target = Target::parse(url).map_err(Unfit::Url)?;
    if target.parameters().any(|part| part.starts_with(PARAMETER)) {
        return Err(Unfit::Signed);
    }
    let is_time = |time: i64| (1..1_000_000_000_000).contains(&time);
    if !is_time(options.expires_at) || options.not_before.is_some_and(|start| !is_time(start)) {
        return Err(Unfit::Times);
    }
    let mut methods = options.methods.to_vec();
    methods.sort_unstable();
    methods.dedup();
    let methods = methods.join(".");
    if !are_methods(&methods) {
        return Err(Unfit::Methods);
    }
    let prefix = options.path_prefix.map(|prefix| prefix_length(&target, prefix)).transpose()?;
    if !options.subject.is_none_or(is_subject) {
        return Err(Unfit::Subject);
    }
    if !options.response_headers.is_none_or(are_headers) {
        return Err(Unfit::Headers);
    }
    let values: [Option<String>; NAMES.len()] = [
        Some(options.expires_at.to_string()),
        options.response_headers.map(|headers| URL_SAFE_NO_PAD.encode(headers)),
        Some(key.kid()),
        Some(methods),
        options.not_before.map(|start| start.to_string()),
        options.network.as_ref().map(network_text),
        options.once.map(|once| once.iter().map(|byte| format!("{byte:02x}")).collect()),
        prefix.map(|length| length.to_string()),
        options.subject.map(|subject| URL_SAFE_NO_PAD.encode(subject)),
    ];
    let mut signed = url.to_owned();
    if !url.contains('?') {
        signed.push('?');
    } else if !url.ends_with(['?', '&']) {
        signed.push('&');
    }
    Ours { values: values.each_ref().map(Option::as_deref) }.push_to(&mut signed);
    signed.push_str("&tgu_sig=");
    // Read as it will be, with a signature that is replaced.
    let draft = SignedUrl::parse(&format!("{signed}{}", "A".repeat(ENCODED_LEN))).map_err(Unfit::Url)?;
    URL_SAFE_NO_PAD.encode_string(key.sign(draft.canonical.as_bytes()), &mut signed);
    Ok(signed)
}

/// How many characters of the normalised path the prefix has.
fn prefix_length(target: &Target, prefix: &str) -> Result<usize, Unfit> {
    let mut normalised = String::new();
    push_normalised(&mut normalised, prefix).map_err(|_| Unfit::Prefix)?;
    match target.path().strip_prefix(&normalised) {
        Some(rest) if normalised.ends_with('/') && is_plain(rest) => Ok(normalised.len()),
        _ => Err(Unfit::Prefix),
    }
}
