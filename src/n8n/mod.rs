//! n8n as the appliance meets it: webhooks to call, executions to follow.
//!
//! `delivery`, `bridge` → **`n8n`** → n8n's HTTP port, its public API, its database (read only).
//!
//! # Invariants
//! 1. A call is made once: no redirect is followed and nothing is sent again here. Whether and when to call again is the
//!    caller's decision, who gets told what n8n may have seen ([`CallError`]).
//! 2. No secret, no header and no body of a call appears in an error.
//! 3. n8n's database is only read. What a look-up does not find may still exist a moment later: n8n writes the row when
//!    it starts the execution, which can be after its answer.
//!
//! # How executions are found (n8n 2.41)
//! A webhook does not tell which execution it started. It does store the `traceparent` of the request in
//! `execution_entity."tracingContext"`, so an attempt with its own span finds its own execution: see [`executions`].
//!
//! # Failure
//! A source that cannot be read is [`Error::Unreachable`], never "no such execution".

mod auth;
mod call;
pub mod executions;
mod sign;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes as Body;

pub use auth::authorize;
pub use executions::Lookup;
pub use sign::Signer;

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

/// An answer; `body` is cut at 64 KiB, and where it broke off.
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
    inner: Arc<Inner>,
}

struct Inner {
    base: reqwest::Url,
    client: reqwest::Client,
    executions: Option<executions::Source>,
}

impl N8n {
    /// Connects to nothing yet.
    ///
    /// # Errors
    /// A setting that cannot be used, as text for people.
    pub fn new(config: &config::N8n) -> Result<Self, String> {
        let base: reqwest::Url = config.url.parse().map_err(|_| "n8n.url is not a URL".to_owned())?;
        let client = call::client(config)?;
        let executions = executions::Source::new(config, &base, &client)?;
        Ok(Self { inner: Arc::new(Inner { base, client, executions }) })
    }

    /// Where n8n lives.
    pub fn base(&self) -> &reqwest::Url {
        &self.inner.base
    }

    /// Webhook URL of a route: its path joined to n8n's URL, `{workflow}` and `{tenant}` filled in percent-encoded.
    ///
    /// # Errors
    /// The template wants a workflow and the event has none, or its name would climb out of the path.
    pub fn webhook_url(&self, template: &str, workflow: Option<&str>, tenant: &str) -> Result<reqwest::Url, String> {
        let mut path = template.replace("{tenant}", &segment(tenant)?);
        if path.contains("{workflow}") {
            let workflow = workflow.ok_or("the route's webhook contains {workflow}, and the event names none")?;
            path = path.replace("{workflow}", &segment(workflow)?);
        }
        if path.starts_with('/') {
            let base = self.inner.base.as_str().trim_end_matches('/');
            path = format!("{base}{path}");
        }
        path.parse().map_err(|_| "the route's webhook is not a URL".to_owned())
    }

    /// URL of a captured request: n8n's address with the request's own path and query.
    pub fn request_url(&self, path: &str, query: Option<&str>) -> reqwest::Url {
        let mut url = self.inner.base.clone();
        let prefix = self.inner.base.path().trim_end_matches('/');
        let below = path.strip_prefix(prefix).is_some_and(|rest| prefix.is_empty() || rest.starts_with('/'));
        if below {
            url.set_path(path);
        } else {
            url.set_path(&format!("{prefix}{path}"));
        }
        url.set_query(query);
        url
    }

    /// Makes the call and reads its answer.
    pub async fn call(&self, call: Call) -> Result<Answer, CallError> {
        call::call(&self.inner.client, call).await
    }

    /// As `call`, with the answer's body as it comes (for `short`). The time limit covers the body too.
    pub async fn call_streamed(&self, call: Call) -> Result<reqwest::Response, CallError> {
        call::send(&self.inner.client, call).await
    }

    /// Whether executions can be followed at all (API key or database configured).
    pub fn can_follow(&self) -> bool {
        self.inner.executions.is_some()
    }

    /// Many executions at once: one question to the database, few to the API. One result per item, in order.
    pub async fn look(&self, lookups: &[Lookup]) -> Result<Vec<Option<Execution>>, Error> {
        match &self.inner.executions {
            Some(source) if !lookups.is_empty() => source.look(lookups).await,
            _ => Ok(vec![None; lookups.len()]),
        }
    }

    /// The execution with this id.
    pub async fn execution(&self, id: &str) -> Result<Option<Execution>, Error> {
        let found =
            self.look(&[Lookup { id: Some(id.to_owned()), traceparent: None, not_before: Timestamp(0) }]).await?;
        Ok(found.into_iter().next().flatten())
    }

    /// The execution that was started by a request with this `traceparent`.
    pub async fn execution_by_traceparent(
        &self,
        traceparent: &str,
        not_before: Timestamp,
    ) -> Result<Option<Execution>, Error> {
        let lookup = Lookup { id: None, traceparent: Some(traceparent.to_owned()), not_before };
        Ok(self.look(&[lookup]).await?.into_iter().next().flatten())
    }

    /// `/healthz/readiness` answers 2xx.
    pub async fn ready(&self) -> bool {
        self.health().await.is_some_and(|status| status.is_success())
    }

    /// Whether the server behind `url` is there and does not say itself that it is not ready. For n8n that is its
    /// readiness; for any other server a connection.
    pub async fn reachable(&self, url: &reqwest::Url) -> bool {
        if url.origin() == self.inner.base.origin() {
            // A receiver that is not n8n knows no such path: its 404 shows that it is there.
            return self.health().await.is_some_and(|status| !status.is_server_error());
        }
        let Some(host) = url.host_str() else { return false };
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let connect = tokio::net::TcpStream::connect((host, url.port_or_known_default().unwrap_or(80)));
        matches!(tokio::time::timeout(PROBE, connect).await, Ok(Ok(_)))
    }

    async fn health(&self) -> Option<http::StatusCode> {
        let url = self.request_url("/healthz/readiness", None);
        let answer = self.inner.client.get(url).timeout(PROBE).send().await.ok()?;
        Some(answer.status())
    }
}

/// A probe that takes longer than this says no.
const PROBE: Duration = Duration::from_secs(3);

/// Percent-encodes a path segment (RFC 3986 section 2.3: everything but unreserved characters).
fn segment(text: &str) -> Result<String, String> {
    if matches!(text, "." | "..") {
        return Err("a name of dots alone would climb out of the webhook's path".to_owned());
    }
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~') {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    Ok(encoded)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Span;

    pub(super) fn config(url: &str) -> config::N8n {
        // As `main` does; a second test finds it installed.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        config::N8n {
            url: url.to_owned(),
            api_key: None,
            database_url: None,
            database_file: None,
            connect_timeout: Span::secs(1),
            idle_timeout: Span::secs(4),
        }
    }

    #[test]
    fn webhook_urls_stay_below_n8n() {
        let n8n = N8n::new(&config("http://127.0.0.1:5678/n8n/")).unwrap();
        let url = |template: &str, workflow| n8n.webhook_url(template, workflow, "acme").map(|url| url.to_string());
        assert_eq!(url("/webhook/{tenant}", None).unwrap(), "http://127.0.0.1:5678/n8n/webhook/acme");
        assert_eq!(
            url("/webhook/{workflow}", Some("a/../b?c=d#e f")).unwrap(),
            "http://127.0.0.1:5678/n8n/webhook/a%2F..%2Fb%3Fc%3Dd%23e%20f"
        );
        assert_eq!(url("https://other/x", None).unwrap(), "https://other/x");
        assert!(url("/webhook/{workflow}", None).is_err());
        assert!(url("/webhook/{workflow}", Some("..")).is_err());
    }

    /// A workflow's name is the caller's text: whatever it contains, it stays one segment of the path on the route's server.
    #[test]
    fn hostile_names_stay_one_segment() {
        let n8n = N8n::new(&config("http://127.0.0.1:5678")).unwrap();
        for template in
            ["/webhook/{workflow}", "https://other.example/webhook/{workflow}", "/webhook/{workflow}?a={workflow}"]
        {
            for name in [
                "../rest",
                "%2e%2e",
                "%2E./x",
                "..\\..\\rest",
                "x?y=1",
                "x#y",
                "@evil.example",
                "//evil.example",
                "a\r\nX: 1",
                "\t",
                "…",
                "{tenant}",
            ] {
                let url = n8n.webhook_url(template, Some(name), "acme").unwrap();
                assert!(matches!(url.host_str(), Some("127.0.0.1" | "other.example")), "{url}");
                assert_eq!((url.username(), url.fragment()), ("", None), "{url}");
                let segments: Vec<_> = url.path_segments().unwrap().collect();
                assert_eq!((segments.len(), segments[0]), (2, "webhook"), "{url}");
                assert_eq!(url.query().is_some(), template.contains('?'), "{url}");
            }
        }
    }

    #[test]
    fn captured_paths_keep_their_form() {
        let n8n = N8n::new(&config("http://127.0.0.1:5678/n8n/")).unwrap();
        let url = n8n.request_url("/webhook/a%2Fb", Some("x=1&y=%20"));
        assert_eq!(url.as_str(), "http://127.0.0.1:5678/n8n/webhook/a%2Fb?x=1&y=%20");
        assert_eq!(n8n.request_url("/n8n/webhook/a", None).as_str(), "http://127.0.0.1:5678/n8n/webhook/a");
        assert_eq!(n8n.request_url("/n8nx", None).as_str(), "http://127.0.0.1:5678/n8n/n8nx");
    }
}
