//! From an event to the HTTP call that n8n gets.
//!
//! Pure but for the random of a span's id, which the caller makes.
//!
//! Headers of every attempt: `webhook-id` (the execution id: the same over all attempts), `webhook-timestamp`,
//! `webhook-signature` (Standard Webhooks 1.0.0, only with a secret), `traceparent`, `x-dealscale-execution-id`,
//! `x-dealscale-tenant`, `x-dealscale-attempt`, `x-dealscale-workflow`, and the route's `webhook_auth`. A captured request
//! keeps its own method, path, query, headers and body; a sender's own `webhook-*` headers stay, since the workflow verifies them.

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};

use crate::clock::Timestamp;
use crate::config::Route;
use crate::event::{Content, Envelope};
use crate::n8n::{Call, N8n, Signer, authorize};

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const EXECUTION_ID: HeaderName = HeaderName::from_static("x-dealscale-execution-id");
const TENANT: HeaderName = HeaderName::from_static("x-dealscale-tenant");
const ATTEMPT: HeaderName = HeaderName::from_static("x-dealscale-attempt");
const WORKFLOW: HeaderName = HeaderName::from_static("x-dealscale-workflow");
const JSON: HeaderValue = HeaderValue::from_static("application/json");

/// Headers of a captured request that belong to its first connection (RFC 9110 section 7.6.1) or are made anew.
const OWN: [&str; 12] = [
    "connection",
    "keep-alive",
    "proxy-connection",
    "proxy-authorization",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "host",
    "content-length",
    "expect",
    "traceparent",
];

/// One attempt.
pub(super) struct Attempted<'a> {
    pub envelope: &'a Envelope,
    pub body: Bytes,
    pub number: u32,
    pub traceparent: &'a str,
    pub now: Timestamp,
}

/// # Errors
/// The event cannot be sent by this route, ever: why, for people.
pub(super) fn call(n8n: &N8n, route: &Route, signer: &Signer, attempt: Attempted<'_>) -> Result<Call, String> {
    let Attempted { envelope, body, number, traceparent, now } = attempt;
    let mut headers = HeaderMap::with_capacity(16);
    let (method, url) = match &envelope.content {
        Content::Json => {
            headers.insert(CONTENT_TYPE, JSON);
            let workflow = envelope.workflow.as_ref().map(|w| w.as_str());
            (http::Method::POST, n8n.webhook_url(&route.webhook, workflow, envelope.tenant.as_str())?)
        }
        Content::Request { method, path, query, headers: own } => {
            let nominated: Vec<String> = own
                .iter()
                .filter(|(name, _)| name.eq_ignore_ascii_case("connection"))
                .flat_map(|(_, value)| value.split(',').map(|n| n.trim().to_ascii_lowercase()))
                .collect();
            for (name, value) in own {
                // What came in as a header can go out as one; a record that was altered loses the bad line only.
                if let (Ok(name), Ok(value)) =
                    (HeaderName::try_from(name.as_str()), HeaderValue::try_from(value.as_str()))
                    && !OWN.contains(&name.as_str())
                    && !nominated.iter().any(|n| n == name.as_str())
                {
                    headers.append(name, value);
                }
            }
            let method =
                http::Method::try_from(method.as_str()).map_err(|_| "the captured method is not one".to_owned())?;
            (method, n8n.request_url(path, query.as_deref()))
        }
        Content::Done { .. } => return Err("a recorded call is never delivered".to_owned()),
    };
    let id = envelope.execution_id.to_string();
    if !headers.contains_key("webhook-id") && !headers.contains_key("webhook-signature") {
        signer.sign(&mut headers, &id, now, &body);
    }
    headers.insert(TRACEPARENT, ascii(traceparent));
    headers.insert(TENANT, ascii(envelope.tenant.as_str()));
    headers.insert(ATTEMPT, HeaderValue::from(number));
    if let Some(workflow) = &envelope.workflow
        // Bytes above 127 are allowed in a header's value and n8n reads them as Latin-1: only plain names go there.
        && workflow.as_str().is_ascii()
        && let Ok(value) = HeaderValue::try_from(workflow.as_str())
    {
        headers.insert(WORKFLOW, value);
    }
    headers.insert(EXECUTION_ID, ascii(&id));
    authorize(&mut headers, &route.webhook_auth, now);
    Ok(Call { method, url, headers, body, timeout: route.timeout.0 })
}

fn ascii(text: &str) -> HeaderValue {
    HeaderValue::try_from(text).expect("made of visible ASCII characters")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::ids::{BodyHash, ExecutionId, Tenant, Topic, Workflow};

    fn environment(extra: &str) -> crate::config::EnvironmentConfig {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let text = format!("state_dir = \"/nowhere\"\n[environments.test]\n{extra}");
        crate::config::parse(&text).unwrap().environments.into_values().next().unwrap()
    }

    fn envelope(content: Content) -> Envelope {
        Envelope {
            tenant: Tenant::try_new("acme").unwrap(),
            execution_id: ExecutionId::from_idempotency_key(
                &crate::ids::Environment::try_new("test").unwrap(),
                &Tenant::try_new("acme").unwrap(),
                "k",
            ),
            workflow: Some(Workflow::try_new("crm sync").unwrap()),
            topic: Topic::try_new("dealscale.workflow.long").unwrap(),
            route: "default".into(),
            accepted_at: Timestamp(0),
            deliver_at: None,
            ordering_key: None,
            priority: 5,
            metadata: BTreeMap::new(),
            traceparent: None,
            source_execution: None,
            source_workflow: None,
            body_hash: BodyHash::of(b"{}"),
            content,
        }
    }

    fn made(extra: &str, content: Content) -> Call {
        let config = environment(extra);
        let n8n = N8n::new(&config.n8n).unwrap();
        let signer = Signer::new(&config.delivery).unwrap();
        let envelope = envelope(content);
        let attempt = Attempted {
            envelope: &envelope,
            body: Bytes::from_static(b"{\"test\": 2432232314}"),
            number: 3,
            traceparent: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            now: Timestamp(1_614_265_330_000),
        };
        call(&n8n, &config.default_route, &signer, attempt).unwrap()
    }

    const SECRETS: &str = "[environments.test.delivery]\nwebhook_secret = \"whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw\"\n\
                           webhook_secret_previous = \"whsec_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA\"\n";

    #[test]
    fn an_event_is_a_json_post_with_its_identity() {
        let call = made(SECRETS, Content::Json);
        assert_eq!((call.method.as_str(), call.url.path()), ("POST", "/webhook/pulsar-trigger"));
        let id = envelope(Content::Json).execution_id.to_string();
        for (name, value) in [
            ("content-type", "application/json"),
            ("webhook-id", id.as_str()),
            ("webhook-timestamp", "1614265330"),
            ("x-dealscale-execution-id", id.as_str()),
            ("x-dealscale-tenant", "acme"),
            ("x-dealscale-attempt", "3"),
            ("x-dealscale-workflow", "crm sync"),
            ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
        ] {
            assert_eq!(call.headers[name], value, "{name}");
        }
        assert!(call.headers.contains_key("webhook-signature"));
        assert!(!made("", Content::Json).headers.contains_key("webhook-signature"));
    }

    #[test]
    fn a_captured_request_keeps_its_form_and_its_senders_signature() {
        let header = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let call = made(
            SECRETS,
            Content::Request {
                method: "PUT".into(),
                path: "/webhook/stripe%2Fx".into(),
                query: Some("a=1".into()),
                headers: vec![
                    header("Content-Type", "application/octet-stream"),
                    header("Webhook-Id", "theirs"),
                    header("Webhook-Signature", "v1,theirs"),
                    header("Connection", "close, X-Hop"),
                    header("X-Hop", "1"),
                    header("Host", "public.example"),
                    header("Content-Length", "7"),
                ],
            },
        );
        assert_eq!(call.method, "PUT");
        assert_eq!((call.url.path(), call.url.query()), ("/webhook/stripe%2Fx", Some("a=1")));
        assert_eq!(call.headers["content-type"], "application/octet-stream");
        assert_eq!(call.headers["webhook-id"], "theirs");
        assert_eq!(call.headers["webhook-signature"], "v1,theirs");
        for gone in ["connection", "x-hop", "host", "content-length"] {
            assert!(!call.headers.contains_key(gone), "{gone}");
        }
        assert!(call.headers.contains_key("x-dealscale-execution-id"));
    }
}
