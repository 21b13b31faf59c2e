//! `[environments.NAME.n8n]`: the n8n that events are delivered to, and where its executions can be followed.

use std::path::PathBuf;

use super::{Secret, Section};
use crate::units::Span;

#[derive(Clone, Debug)]
pub struct N8n {
    /// Base URL; webhook paths of routes are joined to it.
    pub url: String,
    /// Public API key (`X-N8N-API-KEY`), for following executions.
    pub api_key: Option<Secret>,
    /// n8n's own database, for finding an execution by its trace context: `postgresql://…`
    pub database_url: Option<Secret>,
    /// The same with n8n on SQLite: its `database.sqlite`, opened read-only.
    pub database_file: Option<PathBuf>,
    pub connect_timeout: Span,
    /// Idle pooled connections are dropped before n8n closes them (its keep-alive is 5 s).
    pub idle_timeout: Span,
}

impl N8n {
    pub(super) fn check(s: &mut Section<'_>) -> Self {
        let n8n = Self {
            url: s.parse("url", "http://127.0.0.1:5678".to_owned()),
            api_key: s.secret("api_key"),
            database_url: s.secret("database_url"),
            database_file: s.parse_opt::<String>("database_file").map(PathBuf::from),
            connect_timeout: s.span("connect_timeout", Span::secs(3), Span::millis(50)..=Span::secs(60)),
            idle_timeout: s.span("idle_timeout", Span::secs(4), Span::millis(100)..=Span::secs(600)),
        };
        if !is_http_url(&n8n.url) {
            s.problem("url", "expected a URL such as \"http://127.0.0.1:5678\"");
        } else if n8n.url.contains(['?', '#']) {
            s.problem("url", "must not have a query or a fragment: the routes' paths are joined to it");
        }
        if n8n.database_url.is_some() && n8n.database_file.is_some() {
            s.problem("database_url", "set either database_url or database_file, not both");
        }
        n8n
    }
}

/// Whether `text` is an absolute http or https URL.
pub fn is_http_url(text: &str) -> bool {
    text.parse::<reqwest::Url>().is_ok_and(|url| matches!(url.scheme(), "http" | "https") && url.has_host())
}
