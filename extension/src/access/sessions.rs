//! Whether the session of an access token goes on.

use super::revocations;
use crate::keys;
use crate::store::sessions;

/// Whether tokens of this session are accepted: not once it, its user's access or its key was revoked. `mark` is the
/// user's present one. The end of the session is also that of the token.
pub(crate) fn is_live(session: &[u8; 16], user_id: &str, mark: Option<i64>) -> bool {
    sessions::unrevoked(session).is_some_and(|session| {
        session.user_id == user_id
            && mark.is_none_or(|mark| session.mark == Some(mark))
            && keys::has_refresh_key(&session.kid)
    })
}

/// Whether a session, of whatever user, is not over by more than its time.
pub(crate) fn goes_on(session: &[u8; 16]) -> bool {
    sessions::unrevoked(session).is_some_and(|session| {
        revocations::mark_of(&session.user_id).is_none_or(|mark| session.mark == Some(mark))
            && keys::has_refresh_key(&session.kid)
    })
}
