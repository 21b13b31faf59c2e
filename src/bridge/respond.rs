//! The one place where an error becomes an answer: problem documents as in RFC 9457.
//!
//! # Invariants
//! 1. Every refusal of the bridge is made here, with a [`Kind`] from one list; `docs/api.md` describes each of them under the
//!    `type` that it sends.
//! 2. Nothing from inside (paths, queries, tokens, other tenants' names) reaches a caller: causes of 5xx go to the log.
//! 3. 429 and 503 always carry `Retry-After`.

use std::borrow::Cow;

use axum::body::Body;
use axum::http::{HeaderValue, Response, StatusCode, header};
use axum::response::IntoResponse;

use crate::observe::bridge as events;
use crate::{outbox, payloads};

/// Every `type` is this and [`Kind::word`]; `docs/api.md` describes them. A name, not an address: nothing is fetched from it.
pub const TYPE_BASE: &str = "urn:dealscale:problem:";

/// Every way in which the bridge refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    Malformed,
    Unauthorized,
    Forbidden,
    NotFound,
    MethodNotAllowed,
    RequestTimeout,
    Conflict,
    TooLarge,
    UnsupportedMediaType,
    KeyReused,
    TooMany,
    TenantFull,
    TooManyFailures,
    Internal,
    BadGateway,
    OutboxUnavailable,
    Busy,
    LedgerUnavailable,
    IssuerUnavailable,
    N8nUnavailable,
    GatewayTimeout,
}

impl Kind {
    pub const ALL: [Kind; 21] = [
        Self::Malformed,
        Self::Unauthorized,
        Self::Forbidden,
        Self::NotFound,
        Self::MethodNotAllowed,
        Self::RequestTimeout,
        Self::Conflict,
        Self::TooLarge,
        Self::UnsupportedMediaType,
        Self::KeyReused,
        Self::TooMany,
        Self::TenantFull,
        Self::TooManyFailures,
        Self::Internal,
        Self::BadGateway,
        Self::OutboxUnavailable,
        Self::Busy,
        Self::LedgerUnavailable,
        Self::IssuerUnavailable,
        Self::N8nUnavailable,
        Self::GatewayTimeout,
    ];

    /// Status, end of the `type`, title.
    const fn row(self) -> (StatusCode, &'static str, &'static str) {
        match self {
            Self::Malformed => (StatusCode::BAD_REQUEST, "malformed", "The request is malformed"),
            Self::Unauthorized => (StatusCode::UNAUTHORIZED, "unauthorized", "A valid token is needed"),
            Self::Forbidden => (StatusCode::FORBIDDEN, "forbidden", "Not allowed for this account"),
            Self::NotFound => (StatusCode::NOT_FOUND, "not-found", "Not found"),
            Self::MethodNotAllowed => {
                (StatusCode::METHOD_NOT_ALLOWED, "method-not-allowed", "This path does not know the method")
            }
            Self::RequestTimeout => {
                (StatusCode::REQUEST_TIMEOUT, "request-timeout", "The request did not arrive in time")
            }
            Self::Conflict => (StatusCode::CONFLICT, "conflict", "The present state does not allow it"),
            Self::TooLarge => (StatusCode::PAYLOAD_TOO_LARGE, "too-large", "The request is too large"),
            Self::UnsupportedMediaType => {
                (StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported-media-type", "This content type is not understood")
            }
            Self::KeyReused => (
                StatusCode::UNPROCESSABLE_ENTITY,
                "idempotency-key-reused",
                "The Idempotency-Key belongs to another request",
            ),
            Self::TooMany => (StatusCode::TOO_MANY_REQUESTS, "rate-limited", "The tenant publishes too fast"),
            Self::TenantFull => (StatusCode::TOO_MANY_REQUESTS, "tenant-full", "The tenant's quota is used up"),
            Self::TooManyFailures => {
                (StatusCode::TOO_MANY_REQUESTS, "too-many-failures", "Too many failed logins from this address")
            }
            Self::Internal => (StatusCode::INTERNAL_SERVER_ERROR, "internal", "The appliance failed"),
            Self::BadGateway => (StatusCode::BAD_GATEWAY, "bad-gateway", "n8n's answer broke off"),
            Self::OutboxUnavailable => {
                (StatusCode::SERVICE_UNAVAILABLE, "outbox-unavailable", "The outbox takes nothing now")
            }
            Self::Busy => (StatusCode::SERVICE_UNAVAILABLE, "busy", "Too many requests are under way"),
            Self::LedgerUnavailable => {
                (StatusCode::SERVICE_UNAVAILABLE, "ledger-unavailable", "The ledger cannot be read now")
            }
            Self::IssuerUnavailable => {
                (StatusCode::SERVICE_UNAVAILABLE, "issuer-unavailable", "The token's issuer cannot be asked now")
            }
            Self::N8nUnavailable => (StatusCode::SERVICE_UNAVAILABLE, "n8n-unavailable", "n8n cannot be reached"),
            Self::GatewayTimeout => (StatusCode::GATEWAY_TIMEOUT, "gateway-timeout", "n8n did not answer in time"),
        }
    }

    pub fn status(self) -> StatusCode {
        self.row().0
    }
    /// The end of the `type`, and the label in metrics.
    pub fn word(self) -> &'static str {
        self.row().1
    }
    pub fn title(self) -> &'static str {
        self.row().2
    }

    /// Seconds for `Retry-After`, where trying again can help.
    fn retry_after(self) -> Option<u64> {
        match self {
            Self::TooMany | Self::Busy => Some(1),
            Self::OutboxUnavailable | Self::LedgerUnavailable | Self::N8nUnavailable => Some(5),
            Self::TenantFull | Self::IssuerUnavailable => Some(10),
            Self::TooManyFailures => Some(60),
            _ => None,
        }
    }
}

/// A refusal.
#[derive(Clone, Debug)]
pub struct Problem {
    pub kind: Kind,
    pub detail: Cow<'static, str>,
    retry_after: Option<u64>,
}

impl Problem {
    pub fn new(kind: Kind, detail: impl Into<Cow<'static, str>>) -> Self {
        Self { kind, detail: detail.into(), retry_after: kind.retry_after() }
    }

    pub fn malformed(detail: impl Into<Cow<'static, str>>) -> Self {
        Self::new(Kind::Malformed, detail)
    }

    /// One text for every id that is not there or not the caller's, so that the two cannot be told apart.
    pub fn no_execution() -> Self {
        Self::new(Kind::NotFound, "no such execution")
    }

    /// One text for a tenant that is not declared and for one that is not granted.
    pub fn no_tenant() -> Self {
        Self::new(Kind::Forbidden, "the tenant is not declared, or not granted to this account")
    }

    /// Waits longer than the kind's own default.
    pub fn retry_after(mut self, seconds: u64) -> Self {
        self.retry_after = Some(seconds.max(1));
        self
    }

    /// The document, as in batch results.
    pub fn document(&self, instance: Option<&str>) -> Document {
        Document {
            r#type: format!("{TYPE_BASE}{}", self.kind.word()),
            title: self.kind.title().to_owned(),
            status: self.kind.status().as_u16(),
            detail: self.detail.to_string(),
            instance: instance.map(str::to_owned),
        }
    }

    /// The answer to the request for `path`.
    pub fn answer(self, path: &str) -> Response<Body> {
        events::Refused { kind: self.kind.word(), status: self.kind.status().as_u16(), detail: &self.detail, path }
            .emit();
        let document = serde_json::to_vec(&self.document(Some(path))).unwrap_or_default();
        let mut response = Response::new(Body::from(document));
        *response.status_mut() = self.kind.status();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        if let Some(seconds) = self.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.kind == Kind::Unauthorized {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer realm=\"dealscale\""));
        }
        if matches!(self.kind, Kind::TooLarge | Kind::RequestTimeout) {
            // The rest of the body is not read, so the connection cannot be used again.
            headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response<Body> {
        self.answer("")
    }
}

/// A problem document, `application/problem+json` (RFC 9457).
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize, utoipa::ToSchema)]
#[schema(as = Problem)]
pub struct Document {
    /// Which problem it is: a URI that stays the same over releases.
    #[schema(example = "urn:dealscale:problem:malformed")]
    pub r#type: String,
    #[schema(example = "The request is malformed")]
    pub title: String,
    #[schema(minimum = 400, maximum = 599, example = 400)]
    pub status: u16,
    /// What is wrong with this very request.
    #[schema(example = "payload is missing")]
    pub detail: String,
    /// The path that was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance: Option<String>,
}

impl From<outbox::Error> for Problem {
    fn from(error: outbox::Error) -> Self {
        use outbox::Verdict;
        let kind = match error.verdict() {
            Verdict::Later => Kind::OutboxUnavailable,
            Verdict::TenantLater => Kind::TenantFull,
            Verdict::TooLarge => Kind::TooLarge,
            Verdict::Conflict => Kind::Conflict,
            Verdict::KeyReused => Kind::KeyReused,
            Verdict::Broken => Kind::Internal,
        };
        let detail = match &error {
            outbox::Error::Store { .. } => {
                tracing::error!(%error, "the outbox failed");
                "the outcome is unknown; retry with the same Idempotency-Key or execution_id".into()
            }
            outbox::Error::Closed => "the appliance is stopping; retry in a moment".into(),
            outbox::Error::Locked(_) | outbox::Error::Open(_) => "the outbox is not open".into(),
            shown => Cow::Owned(shown.to_string()),
        };
        Self::new(kind, detail)
    }
}

impl From<payloads::Error> for Problem {
    fn from(error: payloads::Error) -> Self {
        match error {
            payloads::Error::Refused(why) => Self::malformed(why),
            error => {
                tracing::warn!(%error, "the ledger cannot be read");
                Self::new(Kind::LedgerUnavailable, "the ledger's database is not reachable; accepted work is safe")
            }
        }
    }
}
