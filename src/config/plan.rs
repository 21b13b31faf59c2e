//! The plan's own environment variables, honoured under their own names.
//!
//! They win over files, and apply to the environment `production` (the first one when there is none of that name).
//! An unset or empty variable says nothing; space around a value is dropped.
//!
//! | variable | key |
//! |---|---|
//! | `DEALSCALE_PULSAR_QUEUE_ENABLED` | `broker.kind`: `true` (`1`, `yes`, `on`, `y`, `t`) is Pulsar, `false` (`0`, `no`, `off`, `n`, `f`) the local broker, whatever else is set |
//! | `PULSAR_SERVICE_URL` | `broker.service_url`, and `broker.kind = "pulsar"` where nothing else says the kind |
//! | `PULSAR_HTTP_URL`, `PULSAR_TENANT`, `PULSAR_NAMESPACE` | `broker.http_url`, `.tenant`, `.namespace` |
//! | `PULSAR_AUTH_TOKEN` | `broker.token` |
//! | `PULSAR_OAUTH2_ISSUER_URL`, `…_AUDIENCE`, `…_CLIENT_ID`, `…_CLIENT_SECRET`, `…_SCOPE` | `broker.oauth2_*` |
//! | `FASTAPI_BRIDGE_PORT` | `bridge.listen`, port only |
//! | `FASTAPI_BRIDGE_WEBHOOK_URL` | `webhook` of the environment, and `n8n.url` from its origin where nothing sets it |

use toml::{Table, Value};

use super::{Sink, Source};

const PULSAR: [(&str, &str); 10] = [
    ("PULSAR_SERVICE_URL", "service_url"),
    ("PULSAR_HTTP_URL", "http_url"),
    ("PULSAR_TENANT", "tenant"),
    ("PULSAR_NAMESPACE", "namespace"),
    ("PULSAR_AUTH_TOKEN", "token"),
    ("PULSAR_OAUTH2_ISSUER_URL", "oauth2_issuer_url"),
    ("PULSAR_OAUTH2_AUDIENCE", "oauth2_audience"),
    ("PULSAR_OAUTH2_CLIENT_ID", "oauth2_client_id"),
    ("PULSAR_OAUTH2_CLIENT_SECRET", "oauth2_client_secret"),
    ("PULSAR_OAUTH2_SCOPE", "oauth2_scope"),
];

pub(super) fn apply(root: &mut Table, variables: &dyn Fn(&str) -> Option<String>, sink: &mut Sink) {
    let variable = |name: &str| variables(name).map(|value| value.trim().to_owned()).filter(|value| !value.is_empty());
    let environment = match root.get("environments") {
        Some(Value::Table(all)) if !all.contains_key("production") => all.keys().next().cloned(),
        _ => None,
    }
    .unwrap_or_else(|| "production".to_owned());
    let base = ["environments", environment.as_str()];
    let set = |root: &mut Table, sink: &mut Sink, path: &[&str], value: Value, name: &'static str| {
        sink.sources.insert(path.join("."), Source::Variable(name));
        let (last, tables) = path.split_last().expect("a path has a last part");
        let mut at = root;
        for table in tables {
            match at.entry(*table).or_insert_with(|| Value::Table(Table::new())) {
                Value::Table(inner) => at = inner,
                // Not a table: the check reports it.
                _ => return,
            }
        }
        at.insert((*last).to_owned(), value);
        // A file's `KEY_file` beside it would be a second source of one secret.
        at.remove(&format!("{last}_file"));
    };

    for (name, key) in PULSAR {
        if let Some(value) = variable(name) {
            set(root, sink, &[base[0], base[1], "broker", key], Value::String(value), name);
            if name == "PULSAR_SERVICE_URL" && !is_set(root, &[base[0], base[1], "broker", "kind"]) {
                set(root, sink, &[base[0], base[1], "broker", "kind"], Value::String("pulsar".into()), name);
            }
        }
    }
    const ENABLED: &str = "DEALSCALE_PULSAR_QUEUE_ENABLED";
    if let Some(value) = variable(ENABLED) {
        match value.to_ascii_lowercase().as_str() {
            "true" | "1" | "yes" | "on" | "y" | "t" => {
                set(root, sink, &[base[0], base[1], "broker", "kind"], Value::String("pulsar".into()), ENABLED);
            }
            "false" | "0" | "no" | "off" | "n" | "f" => {
                set(root, sink, &[base[0], base[1], "broker", "kind"], Value::String("local".into()), ENABLED);
            }
            _ => sink.problem(ENABLED, "must be true or false"),
        }
    }
    if let Some(port) = variable("FASTAPI_BRIDGE_PORT") {
        let host = match root.get("bridge").and_then(|b| b.get("listen")) {
            // What is no address is left for the check to refuse.
            Some(Value::String(listen)) => listen.rsplit_once(':').map_or(&**listen, |(host, _)| host).to_owned(),
            _ => "127.0.0.1".to_owned(),
        };
        set(root, sink, &["bridge", "listen"], Value::String(format!("{host}:{port}")), "FASTAPI_BRIDGE_PORT");
    }
    if let Some(url) = variable("FASTAPI_BRIDGE_WEBHOOK_URL") {
        const NAME: &str = "FASTAPI_BRIDGE_WEBHOOK_URL";
        if !is_set(root, &[base[0], base[1], "n8n", "url"])
            && let Ok(parsed) = url.parse::<reqwest::Url>()
            // Anything else the check of `webhook` refuses, or it is a path.
            && parsed.has_host()
        {
            set(
                root,
                sink,
                &[base[0], base[1], "n8n", "url"],
                Value::String(parsed.origin().ascii_serialization()),
                NAME,
            );
        }
        set(root, sink, &[base[0], base[1], "webhook"], Value::String(url), NAME);
    }
}

fn is_set(root: &Table, path: &[&str]) -> bool {
    let (last, tables) = path.split_last().expect("a path has a last part");
    let mut at = root;
    for table in tables {
        match at.get(*table) {
            Some(Value::Table(inner)) => at = inner,
            _ => return false,
        }
    }
    at.contains_key(*last)
}
