//! Operating and watching the appliance.
//!
//! Two doors, with different trust:
//!
//! - The **TCP listener** (`admin.listen`, loopback) serves `/healthz`, `/readyz` and `/metrics` and nothing else: loopback is
//!   no trust boundary where n8n runs users' code.
//! - The **Unix socket** (`admin.socket`, mode 0660) serves operating: the bridge's API with all rights (`app` merges it in) and
//!   `/admin/*`. Who may open the file may operate; the peer's user id (SO_PEERCRED) is logged with each change.
//!
//! # Invariants
//! 1. Nothing on the TCP listener changes anything or shows an event, a tenant or a secret.
//! 2. A socket file left over by a killed process is replaced; one that a living process serves is not.

#![expect(clippy::result_large_err, reason = "an HTTP answer is the error here, made once and sent")]

mod outbox;
mod socket;

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use futures_util::future::BoxFuture;
use serde_json::{Value, json};

pub use outbox::{RecordView, absent};
pub use socket::{Peer, bind as bind_socket};

use crate::ids::Environment;
use crate::observe;
use crate::observe::health::Report;

/// What the doors show and do; `app` fills it in.
#[derive(Clone)]
pub struct Admin {
    pub report: Arc<dyn Fn() -> BoxFuture<'static, Report> + Send + Sync>,
    /// Details of each part, for `dealscale status`.
    pub details: Arc<dyn Fn() -> BoxFuture<'static, Value> + Send + Sync>,
    /// Reads the configuration again: what was applied and what needs a restart, or why it was refused.
    pub reload: Arc<dyn Fn() -> BoxFuture<'static, Result<Value, Vec<String>>> + Send + Sync>,
    pub outboxes: BTreeMap<Environment, crate::outbox::Outbox>,
}

impl Admin {
    /// `/healthz`, `/readyz`, `/metrics`.
    pub fn public(&self) -> Router {
        observe::started();
        Router::new()
            .route("/healthz", get(|| async { "ok\n" }))
            .route("/readyz", get(readyz))
            .route("/metrics", get(metrics))
            .with_state(self.clone())
    }

    /// `/admin/*`, for the socket only.
    pub fn operator(&self) -> Router {
        Router::new()
            .route("/admin/status", get(status))
            .route("/admin/reload", post(reload))
            .merge(outbox::router())
            .with_state(self.clone())
    }

    /// The outbox that `x-dealscale-environment` names, or the only one.
    fn outbox(&self, headers: &axum::http::HeaderMap) -> Result<&crate::outbox::Outbox, Response> {
        let named = headers.get("x-dealscale-environment").and_then(|v| v.to_str().ok());
        match named {
            Some(name) => Environment::try_new(name).ok().and_then(|name| self.outboxes.get(&name)),
            None if self.outboxes.len() == 1 => self.outboxes.values().next(),
            None => None,
        }
        .ok_or_else(|| problem(StatusCode::NOT_FOUND, "Unknown environment", "say which in x-dealscale-environment"))
    }
}

/// A problem document (RFC 9457).
fn problem(status: StatusCode, title: &str, detail: &str) -> Response {
    let body = json!({ "title": title, "status": status.as_u16(), "detail": detail });
    (status, [(header::CONTENT_TYPE, "application/problem+json")], body.to_string()).into_response()
}

async fn readyz(State(admin): State<Admin>) -> Response {
    let report = (admin.report)().await;
    let status = if report.is_ready() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(report)).into_response()
}

async fn metrics(State(admin): State<Admin>) -> Response {
    // Moves the gauges of the parts.
    (admin.report)().await;
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], observe::render()).into_response()
}

async fn status(State(admin): State<Admin>) -> Json<Value> {
    let (report, details) = tokio::join!((admin.report)(), (admin.details)());
    Json(
        json!({ "version": env!("CARGO_PKG_VERSION"), "level": report.level, "parts": report.parts, "environments": details }),
    )
}

async fn reload(State(admin): State<Admin>) -> Response {
    match (admin.reload)().await {
        Ok(applied) => Json(applied).into_response(),
        Err(problems) => problem(
            StatusCode::UNPROCESSABLE_ENTITY,
            "The configuration was refused; the old one goes on",
            &problems.join("; "),
        ),
    }
}
