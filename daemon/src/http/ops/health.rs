//! `/livez` and `/readyz`, for those that restart a process or send requests to it.

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};

use super::metrics::Metrics;

/// A process that can answer is alive.
pub(in crate::http) async fn livez() -> &'static str {
    "ok\n"
}

/// 503 without a connection to the database, and while a task has no leader.
pub(in crate::http) async fn readyz(State(metrics): State<Metrics>) -> Response {
    if !metrics.is_ready() {
        return (StatusCode::SERVICE_UNAVAILABLE, "no connection to the database\n").into_response();
    }
    let leaderless = metrics.leaderless();
    if !leaderless.is_empty() {
        let text = format!("no daemon leads {}\n", leaderless.join(", "));
        return (StatusCode::SERVICE_UNAVAILABLE, text).into_response();
    }
    "ok\n".into_response()
}
