//! What gateways ask: whether a request that they hold may pass, and as whom.

mod auth;
mod identity;

use axum::Router;
use axum::routing::any;

use super::gateway_state::Gateway;

pub(super) fn router() -> Router<Gateway> {
    // Envoy asks with the method of the request that it holds.
    Router::new().route("/auth", any(auth::auth))
}
