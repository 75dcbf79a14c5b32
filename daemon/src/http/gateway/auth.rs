//! `/auth`: whether a request may pass that a reverse proxy holds (forward-auth), and as whom.
//!
//! It answers 200 with the identity, 401, 403, 429, and 503 when the database cannot be asked, and nothing else: proxies take
//! other codes for errors of their own.

use axum::Extension;
use axum::extract::{RawQuery, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};

use super::identity;
use crate::contract::{Credential, Unsound};
use crate::http::credential::TryPresented;
use crate::http::gateway_state::{Gateway, lacks_scope, refusal, refused};
use crate::http::peer::ClientIp;
use crate::http::problem::{Challenge, Problem};
use crate::secret::Secret;

/// What the proxy asks for, in the query.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Demand {
    /// Each of them is required.
    scopes: Vec<String>,
    audience: Option<String>,
    /// Lets a request pass that presents nothing, with an empty identity.
    optional: bool,
}

impl Demand {
    /// Refuses what it does not know: a misspelt demand must not be none.
    pub(super) fn parse(query: &str) -> Result<Self, Problem> {
        let mut demand = Self::default();
        for (name, value) in url::form_urlencoded::parse(query.as_bytes()) {
            match (&*name, &*value) {
                ("scope", scopes) => demand.scopes.extend(scopes.split_ascii_whitespace().map(str::to_owned)),
                ("audience", audience) if demand.audience.is_none() => {
                    demand.audience = Some(audience.to_owned());
                }
                ("optional", "true") => demand.optional = true,
                ("optional", "false") => demand.optional = false,
                // Read where the credential is.
                ("api_token", _) => {}
                _ => return Err(misasked()),
            }
        }
        Ok(demand)
    }

    fn scopes(&self) -> String {
        self.scopes.join(" ")
    }
}

/// 403, since the gateway asks for what cannot be granted.
fn misasked() -> Problem {
    Problem::new(
        StatusCode::FORBIDDEN,
        "The gateway asks with a query that has more than scope, audience and optional, each as it is documented.",
    )
}

pub(super) async fn auth(
    State(gateway): State<Gateway>,
    Extension(ClientIp(client)): Extension<ClientIp>,
    TryPresented(presented): TryPresented,
    RawQuery(query): RawQuery,
) -> Response {
    let answer = async {
        let demand = Demand::parse(query.as_deref().unwrap_or_default())?;
        let presented = presented.map_err(|_| {
            let detail = "The request presents more than one credential. Send one, in one way.";
            Problem::unauthorized(&Challenge::invalid_request(), detail)
        })?;
        judge(&gateway, &demand, presented, client).await
    };
    answer.await.unwrap_or_else(Problem::into_response)
}

pub(super) async fn judge(
    gateway: &Gateway,
    demand: &Demand,
    presented: Option<Secret>,
    client: std::net::IpAddr,
) -> Result<Response, Problem> {
    let scopes = demand.scopes();
    let Some(token) = presented else {
        if demand.optional {
            return Ok((StatusCode::OK, identity::headers(None)).into_response());
        }
        let challenge = match scopes.as_str() {
            "" => Challenge::nothing_presented(),
            scopes => Challenge::nothing_presented().scope(scopes),
        };
        return Err(Problem::unauthorized(
            &challenge,
            "Present a credential: Authorization: Bearer, X-API-Token or X-API-Key.",
        ));
    };
    let required = demand.scopes.iter().map(String::as_str);
    let credential = Credential::new(token, required, client, demand.audience.as_deref());
    let credential = credential.map_err(|unsound| match unsound {
        Unsound::Token => refused("MALFORMED"),
        Unsound::Scope => lacks_scope(&scopes),
        Unsound::Audience => misasked(),
    })?;
    let verified = gateway.verify(credential).await?;
    if verified.is_valid() {
        Ok((StatusCode::OK, identity::headers(Some(&verified))).into_response())
    } else {
        Err(refusal(&verified, &scopes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_demand_is_read_as_it_is_written_and_never_half() {
        let demand =
            Demand::parse("scope=posts:read&scope=a+b%20c&audience=https://api.test&optional=true").unwrap();
        assert_eq!(demand.scopes, ["posts:read", "a", "b", "c"]);
        assert_eq!((demand.audience.as_deref(), demand.optional), (Some("https://api.test"), true));
        assert_eq!(Demand::parse("").unwrap(), Demand::default());
        for query in ["scopes=posts:read", "Scope=a", "optional=1", "optional", "audience=a&audience=b", "x"]
        {
            assert!(Demand::parse(query).is_err(), "{query}");
        }
    }
}
