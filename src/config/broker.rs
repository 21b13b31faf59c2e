//! `[environments.NAME.broker]`

use std::path::PathBuf;

use super::topics::TopicsFile;
use super::{Secret, Section};
use crate::units::Span;

#[derive(Clone, Debug)]
pub enum Broker {
    /// In the outbox's own store: no other server.
    Local {
        retention: Span,
    },
    Pulsar(Box<Pulsar>),
}

#[derive(Clone, Debug)]
pub struct Pulsar {
    /// `pulsar://host:6650` or `pulsar+ssl://host:6651`
    pub service_url: String,
    /// Admin REST API, `http://host:8080`.
    pub http_url: String,
    pub tenant: String,
    pub namespace: String,
    pub subscription: String,
    pub auth: PulsarAuth,
    /// PEM of a private CA for `pulsar+ssl` and `https`.
    pub ca_file: Option<PathBuf>,
    /// Every send, connect and request ends within this; what missed it is dropped and rebuilt.
    pub operation_timeout: Span,
    /// Topics, partitions, retention: `topology plan|apply|check`, and what the relay makes for a new tenant.
    pub topics_file: Option<PathBuf>,
    /// May the appliance make a missing topic and subscription itself (a new tenant)? Otherwise the outbox waits.
    pub create_topics: bool,
    pub receive_queue: u64,
}

#[derive(Clone, Debug)]
pub enum PulsarAuth {
    None,
    Token(Secret),
    OAuth2 { issuer_url: String, audience: String, client_id: String, client_secret: Secret, scope: Option<String> },
}

impl Broker {
    pub(super) fn check(s: &mut Section<'_>, environment: &str) -> Self {
        let pulsar = s.choice("kind", false, &[("local", false), ("pulsar", true)]);
        let retention = s.span("retention", Span::hours(24), Span::secs(1)..=Span::days(30));
        let service_url = s.parse("service_url", "pulsar://127.0.0.1:6650".to_owned());
        let http_url = s.parse("http_url", "http://127.0.0.1:8080".to_owned());
        let tenant = s.parse("tenant", "dealscale".to_owned());
        let namespace = s.parse("namespace", environment.to_owned());
        let subscription = s.parse("subscription", "dealscale".to_owned());
        let token = s.secret("token");
        let issuer_url = s.parse_opt::<String>("oauth2_issuer_url");
        let audience = s.parse_opt::<String>("oauth2_audience");
        let client_id = s.parse_opt::<String>("oauth2_client_id");
        let client_secret = s.secret("oauth2_client_secret");
        let scope = s.parse_opt::<String>("oauth2_scope");
        let ca_file = s.file("ca_file");
        let operation_timeout = s.span("operation_timeout", Span::secs(5), Span::millis(100)..=Span::secs(60));
        let topics_file = s.parse_opt::<String>("topics_file").map(PathBuf::from);
        if let Err(problems) = super::topics::TopicsFile::read(topics_file.as_deref()) {
            s.problems("topics_file", problems);
        }
        let create_topics = s.flag("create_topics", true);
        let receive_queue = s.count("receive_queue", 1_000, 1..=100_000);
        if !pulsar {
            return Self::Local { retention };
        }
        let hosts = service_url.strip_prefix("pulsar://").or_else(|| service_url.strip_prefix("pulsar+ssl://"));
        if !hosts.is_some_and(is_host_and_port) {
            s.problem("service_url", "expected pulsar://host:6650 or pulsar+ssl://host:6651");
        }
        // Read here as well, so that `check` tells what is wrong with it.
        for problem in TopicsFile::read(topics_file.as_deref()).err().into_iter().flatten() {
            s.problem("topics_file", format!("{}: {}", problem.key, problem.text));
        }
        if !super::n8n::is_http_url(&http_url) {
            s.problem("http_url", "expected http://host:8080");
        }
        // Pulsar's own rule, without what a URL takes for "here" and "above".
        let name = |t: &str| {
            let plain = |b: u8| b.is_ascii_alphanumeric() || b"-=:._".contains(&b);
            t.len() <= 100 && t.bytes().all(plain) && t.bytes().any(|b| b != b'.')
        };
        for (key, value) in [("tenant", &tenant), ("namespace", &namespace), ("subscription", &subscription)] {
            if !name(value) {
                s.problem(key, "must be 1 to 100 letters, digits, '-', '_', '=', ':' or '.'");
            }
        }
        let auth = match (token, issuer_url) {
            (Some(_), Some(_)) => {
                s.problem("token", "set either a token or oauth2_*, not both");
                PulsarAuth::None
            }
            (Some(token), None) => PulsarAuth::Token(token),
            (None, Some(issuer_url)) => match (client_id, client_secret) {
                (Some(client_id), Some(client_secret)) => PulsarAuth::OAuth2 {
                    issuer_url,
                    audience: audience.unwrap_or_default(),
                    client_id,
                    client_secret,
                    scope,
                },
                _ => {
                    s.problem("oauth2_client_id", "OAuth2 needs oauth2_client_id and oauth2_client_secret (or …_file)");
                    PulsarAuth::None
                }
            },
            (None, None) => PulsarAuth::None,
        };
        Self::Pulsar(Box::new(Pulsar {
            service_url,
            http_url,
            tenant,
            namespace,
            subscription,
            auth,
            ca_file,
            operation_timeout,
            topics_file,
            create_topics,
            receive_queue,
        }))
    }
}

/// `broker`, `broker:6650`, `[::1]:6650`: one address, and nothing behind it.
fn is_host_and_port(text: &str) -> bool {
    let text = text.strip_suffix('/').unwrap_or(text);
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => (host, Some(port)),
        _ => (text, None),
    };
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-._".contains(&b);
    let literal = host.strip_prefix('[').and_then(|h| h.strip_suffix(']'));
    let host = match literal {
        Some(address) => address.parse::<std::net::Ipv6Addr>().is_ok(),
        None => !host.is_empty() && host.bytes().all(plain),
    };
    host && port.is_none_or(|port| port.parse::<u16>().is_ok_and(|port| port > 0))
}
