//! Connection strings as libpq reads them, in both forms, completed by its environment variables and password files.
//!
//! Not tokio-postgres' parser: it stops at the first option that it does not know, such as sslrootcert or passfile, takes an
//! unescaped `@` of a password for a part of the host, and its errors quote what it could not read, which may be a piece of a
//! password. Nothing here quotes a value. What is split here is checked by `Config`, see [`crate::postgres::target`].

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use percent_encoding::percent_decode_str;

use crate::error::{Error, Kind, Result};
use crate::secret::Secret;

/// The options of a connection string by their names in libpq.
pub type Options = BTreeMap<String, String>;

/// What libpq uses for options that the connection string does not have.
const ENVIRONMENT: [(&str, &str); 15] = [
    ("PGCHANNELBINDING", "channel_binding"),
    ("PGCONNECT_TIMEOUT", "connect_timeout"),
    ("PGDATABASE", "dbname"),
    ("PGHOST", "host"),
    ("PGHOSTADDR", "hostaddr"),
    ("PGLOADBALANCEHOSTS", "load_balance_hosts"),
    ("PGPASSFILE", "passfile"),
    ("PGPORT", "port"),
    ("PGSSLCERT", "sslcert"),
    ("PGSSLKEY", "sslkey"),
    ("PGSSLMODE", "sslmode"),
    ("PGSSLNEGOTIATION", "sslnegotiation"),
    ("PGSSLROOTCERT", "sslrootcert"),
    ("PGTARGETSESSIONATTRS", "target_session_attrs"),
    ("PGUSER", "user"),
];

/// Reads a connection string. The error is a sentence without any value in it.
pub fn parse(text: &str) -> std::result::Result<Options, String> {
    let text = text.trim();
    match text.strip_prefix("postgresql://").or_else(|| text.strip_prefix("postgres://")) {
        Some(rest) => parse_url(rest),
        None => parse_pairs(text),
    }
}

/// Adds options that are missing from the environment.
pub fn complete(options: &mut Options, environment: impl Fn(&str) -> Option<String>) {
    for (variable, option) in ENVIRONMENT {
        // A host in the string is not to be reached at another's address.
        if option == "hostaddr" && options.contains_key("host") {
            continue;
        }
        if !options.contains_key(option)
            && let Some(value) = environment(variable).filter(|value| !value.is_empty())
        {
            options.insert(option.to_owned(), value);
        }
    }
}

/// The same connection string without its passwords, for people to read.
pub fn masked(text: &str) -> String {
    let Ok(options) = parse(text) else { return "[masked]".to_owned() };
    options.iter().fold(String::new(), |mut text, (name, value)| {
        let separator = if text.is_empty() { "" } else { " " };
        let value = if is_secret(name) { "[masked]".to_owned() } else { quote(value) };
        let _ = write!(text, "{separator}{name}={value}");
        text
    })
}

/// An option that is not known to be harmless counts as secret: a password with an unescaped special character can become
/// part of any other.
fn is_secret(name: &str) -> bool {
    const PLAIN: [&str; 19] = [
        "application_name",
        "channel_binding",
        "connect_timeout",
        "dbname",
        "host",
        "hostaddr",
        "keepalives",
        "keepalives_idle",
        "keepalives_interval",
        "load_balance_hosts",
        "passfile",
        "port",
        "sslcert",
        "sslkey",
        "sslmode",
        "sslnegotiation",
        "sslrootcert",
        "target_session_attrs",
        "user",
    ];
    !PLAIN.contains(&name)
}

/// Quoted for the form with `=`.
pub fn quote(value: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-./:,@*".contains(c);
    if !value.is_empty() && value.chars().all(plain) {
        return value.to_owned();
    }
    format!("'{}'", value.replace('\\', "\\\\").replace('\'', "\\'"))
}

const FORMS: &str = "write it as postgresql://user:password@host:port/dbname, special characters as %XX, or as \
                     \"host=… dbname=… user=…\", values with spaces in single quotes";

fn unreadable(why: &str) -> String {
    format!("the connection string cannot be read: {why}; {FORMS}")
}

/// `name = value` or `name = 'va\'lue'`, separated by spaces.
fn parse_pairs(text: &str) -> std::result::Result<Options, String> {
    let mut options = Options::new();
    let mut rest = text.chars().peekable();
    loop {
        while rest.next_if(|c| c.is_whitespace()).is_some() {}
        if rest.peek().is_none() {
            return Ok(options);
        }
        let mut name = String::new();
        while let Some(c) = rest.next_if(|c| !c.is_whitespace() && *c != '=') {
            name.push(c);
        }
        while rest.next_if(|c| c.is_whitespace()).is_some() {}
        if rest.next() != Some('=') {
            return Err(unreadable("there is a word without a = behind it"));
        }
        while rest.next_if(|c| c.is_whitespace()).is_some() {}
        let quoted = rest.next_if_eq(&'\'').is_some();
        let mut value = String::new();
        loop {
            match rest.next() {
                Some('\\') => value.extend(rest.next()),
                Some('\'') if quoted => break,
                Some(c) if !quoted && c.is_whitespace() => break,
                Some(c) => value.push(c),
                None if quoted => return Err(unreadable("a quote is not closed")),
                None => break,
            }
        }
        options.insert(name, value);
    }
}

/// `user:password@host:port,host:port/dbname?option=value&…`, without the scheme.
fn parse_url(rest: &str) -> std::result::Result<Options, String> {
    let mut options = Options::new();
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, dbname) = rest.split_once('/').unwrap_or((rest, ""));
    let (credentials, hosts) = match authority.split_once('@') {
        Some((credentials, hosts)) => (Some(credentials), hosts),
        None => (None, authority),
    };
    // An @ in a password that is not written %40 makes the rest of the password a part of the host's name, which would
    // then be shown in messages and asked of a name server.
    if hosts.contains('@') {
        return Err("the connection string has more than one @ before the host: write an @ within user or password as \
                    %40"
            .to_owned());
    }
    if let Some(credentials) = credentials {
        let (user, password) = match credentials.split_once(':') {
            Some((user, password)) => (user, Some(password)),
            None => (credentials, None),
        };
        set(&mut options, "user", user)?;
        if let Some(password) = password {
            set(&mut options, "password", password)?;
        }
    }
    if !hosts.is_empty() {
        let pairs = hosts.split(',').map(host_and_port).collect::<std::result::Result<Vec<_>, _>>()?;
        let names: Vec<&str> = pairs.iter().map(|(host, _)| *host).collect();
        set(&mut options, "host", &names.join(","))?;
        if pairs.iter().any(|(_, port)| !port.is_empty()) {
            let ports: Vec<&str> = pairs.iter().map(|(_, port)| *port).collect();
            set(&mut options, "port", &ports.join(","))?;
        }
    }
    set(&mut options, "dbname", dbname)?;
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let Some((name, value)) = pair.split_once('=') else {
            return Err(unreadable("an option behind the ? has no ="));
        };
        let name = decode(name)?;
        let value = decode(value)?;
        match (name.as_str(), value.as_str()) {
            // As JDBC has it; libpq takes it too.
            ("ssl", "true") => options.insert("sslmode".to_owned(), "require".to_owned()),
            _ => options.insert(name, value),
        };
    }
    Ok(options)
}

/// An empty part counts as absent, as with libpq.
fn set(options: &mut Options, name: &str, value: &str) -> std::result::Result<(), String> {
    if !value.is_empty() {
        options.insert(name.to_owned(), decode(value)?);
    }
    Ok(())
}

fn host_and_port(text: &str) -> std::result::Result<(&str, &str), String> {
    // An IPv6 address stands in brackets.
    if let Some(rest) = text.strip_prefix('[') {
        let (address, port) =
            rest.split_once(']').ok_or_else(|| unreadable("a [ before an address has no ]"))?;
        return match port.strip_prefix(':') {
            Some(port) => Ok((address, port)),
            None if port.is_empty() => Ok((address, "")),
            None => Err(unreadable("there is something between ] and the port")),
        };
    }
    Ok(text.split_once(':').unwrap_or((text, "")))
}

fn decode(text: &str) -> std::result::Result<String, String> {
    percent_decode_str(text)
        .decode_utf8()
        .map(std::borrow::Cow::into_owned)
        .map_err(|_| unreadable("%XX do not make up UTF-8"))
}

/// The first line of a file, without its end.
pub fn first_line(path: &Path) -> Result<Secret> {
    let content = fs::read_to_string(path).map_err(|error| {
        Error::new(Kind::Unreachable, format!("could not read the password from {}: {error}", path.display()))
            .with_remedy("let the user that tollgated runs as read it, or correct --password-file")
    })?;
    Ok(Secret::new(content.lines().next().unwrap_or_default()))
}

/// The password file that libpq would read.
pub fn default_passfile() -> Option<PathBuf> {
    std::env::home_dir().map(|home| home.join(".pgpass"))
}

/// What a password is for.
#[derive(Clone, Copy, Debug)]
pub struct Login<'a> {
    pub host: &'a str,
    pub port: u16,
    pub dbname: &'a str,
    pub user: &'a str,
}

/// The password of this login in the password file. A file that others may read is not used, as with libpq.
pub fn password_from(path: &Path, login: Login<'_>) -> Option<Secret> {
    let metadata = fs::metadata(path).ok()?;
    if !metadata.is_file() {
        return None;
    }
    if metadata.permissions().mode() & 0o077 != 0 {
        tracing::warn!(
            "the password file {} is not used, since others than its owner may read it: chmod 600 it",
            path.display()
        );
        return None;
    }
    let content = fs::read_to_string(path).ok()?;
    content.lines().filter(|line| !line.starts_with('#')).find_map(|line| password_in(line, login))
}

/// `host:port:dbname:user:password`, where `*` stands for any, and `\:` and `\\` for themselves.
fn password_in(line: &str, login: Login<'_>) -> Option<Secret> {
    let mut fields = vec![String::new()];
    let mut rest = line.chars();
    while let Some(c) = rest.next() {
        let last = fields.len() - 1;
        match c {
            '\\' => fields[last].extend(rest.next()),
            // All behind the fourth colon is the password.
            ':' if fields.len() < 5 => fields.push(String::new()),
            c => fields[last].push(c),
        }
    }
    let [host, port, dbname, user, password] = fields.try_into().ok()?;
    // A socket in the usual place is the local host.
    let local = ["/run/postgresql", "/var/run/postgresql", "/tmp"].contains(&login.host);
    let matches = |field: &str, value: &str| field == "*" || field == value;
    let here = matches(&host, login.host) || (local && host == "localhost");
    (here
        && matches(&port, &login.port.to_string())
        && matches(&dbname, login.dbname)
        && matches(&user, login.user))
    .then(|| Secret::new(password))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Vec<(String, String)> {
        parse(text).unwrap().into_iter().collect()
    }

    fn pairs(expected: &[(&str, &str)]) -> Vec<(String, String)> {
        expected.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn a_url_is_taken_apart_as_libpq_does() {
        assert_eq!(
            read(
                "postgresql://ann:p%40ss@one:5433,[::1]:5434,three/app?sslmode=verify-full&options=-c%20a%3Db"
            ),
            pairs(&[
                ("dbname", "app"),
                ("host", "one,::1,three"),
                ("options", "-c a=b"),
                ("password", "p@ss"),
                ("port", "5433,5434,"),
                ("sslmode", "verify-full"),
                ("user", "ann"),
            ])
        );
        assert_eq!(read("postgres://"), pairs(&[]));
        assert_eq!(
            read("postgres:///app?host=/run/postgresql"),
            pairs(&[("dbname", "app"), ("host", "/run/postgresql")])
        );
        assert_eq!(read("postgres://db?ssl=true"), pairs(&[("host", "db"), ("sslmode", "require")]));
    }

    #[test]
    fn pairs_may_be_quoted_escaped_and_spaced() {
        assert_eq!(
            read(r"host = 'a b'  password='it\'s \\ here' user=o\'brien dbname=''"),
            pairs(&[("dbname", ""), ("host", "a b"), ("password", r"it's \ here"), ("user", "o'brien")])
        );
    }

    #[test]
    fn the_environment_fills_in_what_is_missing_and_nothing_else() {
        let mut options = parse("host=db sslmode=require").unwrap();
        complete(&mut options, |name| match name {
            "PGSSLMODE" => Some("disable".to_owned()),
            "PGHOSTADDR" => Some("10.0.0.1".to_owned()),
            "PGSSLROOTCERT" => Some("/ca.pem".to_owned()),
            "PGUSER" => Some(String::new()),
            _ => None,
        });
        assert_eq!(
            options.into_iter().collect::<Vec<_>>(),
            pairs(&[("host", "db"), ("sslmode", "require"), ("sslrootcert", "/ca.pem")])
        );
    }

    #[test]
    fn what_is_masked_shows_no_password_in_whatever_place() {
        for text in [
            "postgresql://ann:hunter2@db/app",
            "host=db password=hunter2",
            "host=db pasword=hunter2",
            "host=db password='hunter2",
            "postgresql://ann:p@hunter2@db",
            "postgresql://db/app?sslpassword=hunter2",
            "postgresql://db/app?hunter2",
        ] {
            assert!(!masked(text).contains("hunter2"), "{text}: {}", masked(text));
        }
        assert_eq!(masked("postgresql://ann:x@db/app"), "dbname=app host=db password=[masked] user=ann");
    }

    #[test]
    fn the_first_line_of_a_password_file_that_fits_is_taken() {
        let login = Login { host: "db", port: 5432, dbname: "app", user: "ann" };
        let password = |line| password_in(line, login).map(|password| password.expose().to_owned());
        assert_eq!(password("db:5432:app:ann:secret").as_deref(), Some("secret"));
        assert_eq!(password(r"*:*:*:ann:se:cr\:et\\").as_deref(), Some(r"se:cr:et\"));
        assert_eq!(password("db:5433:*:*:secret"), None);
        assert_eq!(password("db:*:*:bob:secret"), None);
        assert_eq!(password("db:*:ann"), None);
        let socket = Login { host: "/run/postgresql", ..login };
        assert!(password_in("localhost:*:*:*:secret", socket).is_some());
    }
}
