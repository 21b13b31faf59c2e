//! `[log]` and `[trace]`.

use std::path::PathBuf;

use super::Section;

/// `[log]`: to standard error (JSON or for people), to journald when systemd runs us, to rotating files when asked.
#[derive(Clone, Debug)]
pub struct Log {
    /// `tracing` filter, such as `info` or `info,dealscale::relay=debug`.
    pub filter: String,
    pub format: LogFormat,
    pub dir: Option<PathBuf>,
    pub files_max: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// Journald under systemd, text on a terminal, JSON elsewhere.
    Auto,
    Json,
    Text,
}

impl Log {
    pub(super) fn check(s: &mut Section<'_>) -> Self {
        let log = Self {
            filter: s.parse("filter", "info".to_owned()),
            format: s.choice(
                "format",
                LogFormat::Auto,
                &[("auto", LogFormat::Auto), ("json", LogFormat::Json), ("text", LogFormat::Text)],
            ),
            dir: s.parse_opt::<String>("dir").map(PathBuf::from),
            files_max: s.count("files_max", 14, 1..=1_000),
        };
        if log.filter.parse::<tracing_subscriber::filter::Targets>().is_err() {
            s.problem("filter", "expected a filter such as \"info\" or \"info,dealscale::relay=debug\"");
        }
        log
    }
}

/// `[trace]`: spans by OTLP/HTTP (protobuf). Off without an endpoint.
#[derive(Clone, Debug)]
pub struct Trace {
    /// Such as `http://127.0.0.1:4318`; `/v1/traces` is added.
    pub otlp_endpoint: Option<String>,
    /// Share of traces that are exported when the caller sent no decision of its own.
    pub sample: f64,
}

impl Trace {
    pub(super) fn check(s: &mut Section<'_>) -> Self {
        let trace = Self { otlp_endpoint: s.parse_opt("otlp_endpoint"), sample: s.number("sample", 1.0, 0.0..=1.0) };
        if trace.otlp_endpoint.as_deref().is_some_and(|e| !super::n8n::is_http_url(e)) {
            s.problem("otlp_endpoint", "expected a URL such as \"http://127.0.0.1:4318\"");
        }
        trace
    }
}
