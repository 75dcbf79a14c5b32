//! Whether what an access token of ours came of is still good (`tollgate_core::ancestry`). Looked up by the latest snapshot,
//! as the token itself: what is revoked ends all that came of it in the same moment.

use super::{foreign, revocations, sessions};
use crate::store::probe::{Column, Lookup, TokenRow};
use crate::{guc, keys};
use tollgate_core::ancestry::{Ancestor, Ancestry};
use tollgate_core::delegation::SERVICE;
use tollgate_core::net::Net;
use tollgate_core::scope;
use tollgate_core::status::{Code, decide};

/// A token that came of something.
pub(crate) struct Heir<'a> {
    pub(crate) ancestry: &'a Ancestry,
    pub(crate) user_id: &'a str,
    pub(crate) scopes: Vec<&'a str>,
    /// Where it is presented.
    pub(crate) client: Option<Net>,
}

impl Heir<'_> {
    /// The first fault, in the order of the codes, of what it came of. `root` is the row of its root, if there is one.
    /// `now` is in microseconds since 2000-01-01.
    pub(crate) fn fault(&self, root: Option<&TokenRow>, now: i64) -> Option<Code> {
        let of_root = self.ancestry.root.and_then(|_| self.fault_of_root(root, now));
        let of_others = self.ancestry.from.iter().filter_map(|one| self.fault_of(one, now));
        of_others.chain(of_root).min_by_key(|code| code.index())
    }

    fn fault_of_root(&self, root: Option<&TokenRow>, now: i64) -> Option<Code> {
        let is_its = root.is_some_and(|root| {
            root.text(Column::UserId) == self.user_id
                // A service account's secret has no scopes: those are the account's, and when they are narrowed it gets
                // a new mark.
                && (self.user_id.starts_with(SERVICE) || self.is_within(root))
        });
        if is_its { self.fault_of_api_token(root, now) } else { Some(Code::Revoked) }
    }

    /// Whether it has no scope that the root lost since.
    fn is_within(&self, root: &TokenRow) -> bool {
        let Some(granted) = root.array(Column::Scopes) else { return false };
        self.scopes.iter().all(|scope| scope::any_grants(granted.present(), scope.as_bytes()))
    }

    fn fault_of_api_token(&self, row: Option<&TokenRow>, now: i64) -> Option<Code> {
        let Some(row) = row else { return Some(Code::Revoked) };
        let code = decide(
            row.datum(Column::RevokedAt).is_some(),
            row.datum(Column::DisabledAt).is_some(),
            row.timestamp(Column::ExpiresAt),
            now,
            || row.allows(self.client),
            || true,
        );
        (code != Code::Valid).then_some(code)
    }

    fn fault_of(&self, ancestor: &Ancestor, now: i64) -> Option<Code> {
        let is_good = match ancestor {
            Ancestor::AccessToken(jti) => {
                let jti = uuid::Uuid::from_bytes(*jti).to_string();
                guc::issuer().is_some_and(|issuer| !revocations::is_denied(issuer, &jti))
            }
            Ancestor::Foreign(token) => foreign::is_good(token),
            Ancestor::Session(id) => sessions::goes_on(id),
            Ancestor::ApiToken(id) => {
                let lookup = Lookup::open_id(id);
                let fault = self.fault_of_api_token(lookup.token(), now);
                lookup.close();
                return fault;
            }
            Ancestor::User { id, mark } => {
                revocations::mark_of(id).is_none_or(|present| *mark == Some(present))
            }
            Ancestor::Key(kid) => keys::public_key_of(kid).is_some(),
        };
        (!is_good).then_some(Code::Revoked)
    }
}
