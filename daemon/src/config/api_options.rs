//! Options of the api listener: whom it believes, and what it accepts.

use std::net::IpAddr;

use clap::{Args, ValueEnum};
use ipnet::IpNet;
use url::Url;

#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "API")]
pub struct ApiOptions {
    /// A network of reverse proxies, such as 10.0.0.0/8, or one of them: what they say of a request's client is believed, and
    /// of no others. Repeat it, or separate several by commas
    #[arg(long, value_name = "CIDR", env = "TOLLGATED_TRUSTED_PROXY", value_delimiter = ',', value_parser = network)]
    pub trusted_proxy: Vec<IpNet>,

    /// The header in which trusted proxies name the client. The other one is ignored: a proxy that does not know it passes on
    /// what a client wrote there
    #[arg(long, value_enum, env = "TOLLGATED_FORWARDED_HEADER", default_value_t = ForwardedHeader::XForwardedFor)]
    pub forwarded_header: ForwardedHeader,

    /// Accept a token in the query too, as ?api_token=. URLs end up in logs and histories: only for clients that can send no
    /// header
    #[arg(long, env = "TOLLGATED_ALLOW_TOKEN_IN_QUERY")]
    pub allow_token_in_query: bool,

    /// The URL at which clients reach the api listener, such as https://auth.example.com
    #[arg(long, value_name = "URL", env = "TOLLGATED_API_PUBLIC_URL", value_parser = public_url)]
    pub api_public_url: Option<Url>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ForwardedHeader {
    XForwardedFor,
    /// RFC 7239.
    Forwarded,
}

/// An address alone is a network of one.
fn network(text: &str) -> Result<IpNet, String> {
    let text = text.trim();
    let address = || text.parse::<IpAddr>().ok().map(IpNet::from);
    text.parse::<IpNet>()
        .ok()
        .or_else(address)
        .ok_or_else(|| "it is neither a network, such as 10.0.0.0/8, nor an address".to_owned())
}

fn public_url(text: &str) -> Result<Url, String> {
    let url = Url::parse(text).map_err(|error| format!("{error}; write it as https://auth.example.com"))?;
    let plain = url.username().is_empty()
        && url.password().is_none()
        && url.query().is_none()
        && url.fragment().is_none();
    if !["http", "https"].contains(&url.scheme()) || url.host().is_none() || !plain {
        return Err("it takes an http or https URL without user, query and fragment".to_owned());
    }
    Ok(url)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trusted_proxy_is_a_network_or_an_address() {
        for (text, expected) in [
            ("10.0.0.0/8", Some("10.0.0.0/8")),
            (" 10.1.2.3", Some("10.1.2.3/32")),
            ("::1", Some("::1/128")),
            ("fd00::/8", Some("fd00::/8")),
            ("proxy.example", None),
            ("10.0.0.0/33", None),
            ("", None),
        ] {
            assert_eq!(network(text).ok().map(|found| found.to_string()).as_deref(), expected, "{text:?}");
        }
    }

    #[test]
    fn a_public_url_holds_nothing_but_where_clients_connect_to() {
        for url in ["https://auth.example.com", "http://localhost:8080", "https://example.com/tollgate"] {
            assert!(public_url(url).is_ok(), "{url}");
        }
        for url in [
            "auth.example.com",
            "ftp://example.com",
            "https://ann:secret@example.com",
            "https://example.com/?a=b",
            "https://example.com/#a",
        ] {
            assert!(public_url(url).is_err(), "{url}");
        }
    }
}
