//! n8n as the appliance meets it: webhooks to call, executions to follow. (Contract.)

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes as Body;

use crate::clock::Timestamp;
use crate::config;

/// One HTTP call to a webhook.
#[derive(Clone, Debug)]
pub struct Call {
    pub method: http::Method,
    pub url: reqwest::Url,
    pub headers: http::HeaderMap,
    pub body: Body,
    /// From the first byte sent to the last byte received.
    pub timeout: Duration,
}

/// Why a call has no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// No connection: n8n has seen nothing of it.
    #[error("cannot connect: {0}")]
    Connect(String),
    /// n8n may have taken it.
    #[error("no answer in time")]
    Timeout,
    /// n8n may have taken it.
    #[error("the connection broke: {0}")]
    Reset(String),
}

/// A complete answer; `body` is cut at 64 KiB.
#[derive(Clone, Debug)]
pub struct Answer {
    pub status: http::StatusCode,
    pub headers: http::HeaderMap,
    pub body: Body,
}

/// What became of an execution of n8n.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Run {
    /// `new`, `running`, `waiting`.
    Open,
    Succeeded,
    /// `error`.
    Failed(String),
    Crashed,
    Cancelled,
}

/// An execution that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Execution {
    pub id: String,
    pub run: Run,
    pub started_at: Option<Timestamp>,
}

#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    #[error("n8n's API or database cannot be read: {0}")]
    Unreachable(Arc<str>),
    #[error("n8n's API refused the key: {0}")]
    Unauthorized(Arc<str>),
}

/// The n8n of one environment. Cheap to clone.
#[derive(Clone)]
pub struct N8n {
    _private: Arc<()>,
}

impl N8n {
    pub fn new(_config: &config::N8n) -> Result<Self, String> {
        unimplemented!()
    }
    /// Webhook URL of a route: its path joined to n8n's URL, `{workflow}` and `{tenant}` filled in percent-encoded.
    pub fn webhook_url(&self, _template: &str, _workflow: Option<&str>, _tenant: &str) -> Result<reqwest::Url, String> {
        unimplemented!()
    }
    pub async fn call(&self, _call: Call) -> Result<Answer, CallError> {
        unimplemented!()
    }
    /// As `call`, with the answer's body as it comes (for `short`).
    pub async fn call_streamed(&self, _call: Call) -> Result<reqwest::Response, CallError> {
        unimplemented!()
    }
    /// Whether executions can be followed at all (API key or database configured).
    pub fn can_follow(&self) -> bool {
        unimplemented!()
    }
    /// The execution with this id.
    pub async fn execution(&self, _id: &str) -> Result<Option<Execution>, Error> {
        unimplemented!()
    }
    /// The execution that was started by a request with this `traceparent`.
    pub async fn execution_by_traceparent(
        &self,
        _traceparent: &str,
        _not_before: Timestamp,
    ) -> Result<Option<Execution>, Error> {
        unimplemented!()
    }
    /// `/healthz/readiness`.
    pub async fn ready(&self) -> bool {
        unimplemented!()
    }
}

/// Adds the route's authentication to the headers of a call (`webhook_auth`).
pub fn authorize(_headers: &mut http::HeaderMap, _auth: &config::routes::WebhookAuth, _now: Timestamp) {
    unimplemented!()
}
