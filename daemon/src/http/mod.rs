//! The daemon's two HTTP listeners.
//!
//! - **ops**: `/livez`, `/readyz` and `/metrics`, for the people and programs that run the daemon. Without credentials, so on
//!   a loopback address unless an operator says otherwise.
//! - **api**: what programs call with a credential of their own. Off by default.
//!
//! Routes and their checks are axum's Router and middleware. Connections are accepted in [`server`], which bounds them.

mod connections;
#[allow(dead_code, reason = "what the routes of the API use")]
mod credential;
mod events;
mod gateway;
#[allow(dead_code, reason = "what the routes of the API use")]
mod gateway_state;
mod ops;
mod peer;
#[allow(dead_code, reason = "what the routes of the API use")]
mod problem;
mod request_checks;
mod request_id;
mod rules;
mod server;

use std::sync::Arc;

use axum::Router;
use axum::http::StatusCode;
use axum::middleware::from_fn;
use axum::routing::get;

use problem::Problem;

pub use events::{EventStreams, wake_streams};
pub use gateway_state::Gateway;
pub use ops::Metrics;
pub use rules::Rules;
pub use server::{Listener, Server};

/// What the ops listener serves.
pub fn ops_router(metrics: Metrics) -> Router {
    let router = Router::new()
        .route("/livez", get(ops::livez))
        .route("/readyz", get(ops::readyz))
        .route("/metrics", get(ops::metrics))
        .with_state(metrics);
    checked(router, "This listener serves /livez, /readyz and /metrics.")
}

/// What the api listener serves; without a gateway only what the daemon's own login is for.
pub fn api_router(streams: Arc<EventStreams>, gateway: Option<Gateway>) -> Router {
    let events = Router::new().route("/events", get(events::open)).with_state(streams);
    match gateway {
        Some(gateway) => {
            let routes: Router<Gateway> = gateway::router();
            checked(events.merge(routes.with_state(gateway)), "This listener has no such route.")
        }
        None => checked(
            events,
            "This listener serves /events. The rest of the API needs a database login of its own: --api-database-url.",
        ),
    }
}

/// With the answers to requests that no route is for, and the checks that every request passes.
fn checked(router: Router, routes: &'static str) -> Router {
    router
        .fallback(async move || Problem::new(StatusCode::NOT_FOUND, routes))
        // axum adds Allow.
        .method_not_allowed_fallback(async || {
            Problem::new(StatusCode::METHOD_NOT_ALLOWED, "Use a method that the header Allow names.")
        })
        .layer(from_fn(request_checks::check))
}
