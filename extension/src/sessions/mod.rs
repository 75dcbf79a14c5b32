//! Sessions: opening and refreshing (sql/schema/sessions/sessions.sql). What a presented token means for its session is
//! decided in `tollgate_core::refresh`; rows are read by `store::sessions` and changed by SQL.

pub(crate) mod open;
pub(crate) mod refresh;

use crate::access::issue::{IssuedAccessToken, NewAccessToken, issue_within, members_of};
use crate::error::Error;
use crate::guc;
use pgrx::Uuid;
use tollgate_core::ancestry::Ancestry;
use zeroize::Zeroizing;

/// What a client gets when a session is opened or refreshed. Times are microseconds since 2000-01-01.
pub(crate) struct Tokens {
    pub(crate) access: IssuedAccessToken,
    pub(crate) refresh: Zeroizing<String>,
    /// The end of the session, however often it is refreshed.
    pub(crate) expires_at: i64,
    pub(crate) scopes: Vec<String>,
    pub(crate) audience: Vec<String>,
}

/// An access token of a session, which ends with it.
struct SessionsToken<'a> {
    session: Uuid,
    user_id: &'a str,
    /// The mark that the user had when the session was looked at: if it has changed since, the token is refused.
    mark: Option<i64>,
    client_id: Option<&'a str>,
    scopes: &'a [String],
    audience: &'a [String],
    /// An object, as JSON.
    claims: &'a str,
    /// When the session is over unless it is refreshed.
    end: i64,
}

impl SessionsToken<'_> {
    fn issue(&self, now: i64) -> Result<IssuedAccessToken, Error> {
        // Whole seconds, as the claims are; at least one, since a session ends in its last second (`refresh::LAST`).
        let remaining = self.end.div_euclid(1_000_000) - now.div_euclid(1_000_000);
        let new = NewAccessToken {
            user_id: self.user_id,
            scopes: self.scopes,
            audience: self.audience,
            lifetime: guc::access_token_lifetime().min(remaining.max(1)),
            own: members_of(self.claims),
            session: Some(self.session),
            client_id: self.client_id,
            ancestry: &Ancestry::default(),
            act: None,
        };
        issue_within(&new, self.mark, None)
    }
}
