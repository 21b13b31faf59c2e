//! `dealscale status` and `dealscale reload`.

use std::time::Duration;

use serde_json::Value;

use super::client::Client;
use super::output::cell;
use super::{Failure, Global, Outcome, output};

pub async fn run(global: &Global) -> Outcome {
    let client = Client::for_all(global)?;
    let status = client.get("/admin/status").await?;
    let ok = status["level"] == "ok";
    if global.json {
        output::json(&status)?;
    } else {
        output::line(format!("dealscale {}: {}\n", cell(&status["version"]), cell(&status["level"])))?;
        let parts = status["parts"].as_array().cloned().unwrap_or_default();
        output::table(
            &["part", "state", "detail"],
            parts.iter().map(|p| vec![cell(&p["name"]), cell(&p["level"]), cell(&p["detail"])]),
        )?;
        for (name, environment) in status["environments"].as_object().into_iter().flatten() {
            output::line(format!("\n{name}"))?;
            let rows = ["outbox", "payloads", "broker", "relay", "delivery"]
                .into_iter()
                .filter_map(|part| Some((part, environment.get(part)?)))
                .flat_map(|(part, value)| flat(part, value));
            output::table(&["figure", "value"], rows)?;
        }
    }
    if ok { Ok(()) } else { Err(Failure::Attention) }
}

/// `{"a": {"b": 1}}` as `part.a.b`, `1`.
fn flat(path: &str, value: &Value) -> Vec<Vec<String>> {
    match value {
        Value::Object(map) => map.iter().flat_map(|(key, value)| flat(&format!("{path}.{key}"), value)).collect(),
        Value::Null => Vec::new(),
        other => vec![vec![path.to_owned(), cell(other)]],
    }
}

#[derive(clap::Args, Debug)]
pub struct ReloadCommand {
    /// Wait for an appliance that is just starting, half a minute at most
    #[arg(long)]
    wait: bool,
}

/// For how long, and how often, `--wait` tries.
const WAIT_TRIES: usize = 60;
const WAIT_EVERY: Duration = Duration::from_millis(500);

pub async fn reload(global: &Global, command: &ReloadCommand) -> Outcome {
    let client = Client::for_all(global)?;
    let mut tries = if command.wait { WAIT_TRIES } else { 1 };
    let answer = loop {
        tries -= 1;
        match client.send(reqwest::Method::POST, "/admin/reload", None).await {
            Err(Failure::Unavailable(_)) if tries > 0 => tokio::time::sleep(WAIT_EVERY).await,
            answer => break answer?,
        }
    };
    if answer.status == reqwest::StatusCode::UNPROCESSABLE_ENTITY {
        return Err(Failure::Refused(format!("{}: {}", cell(&answer.body["title"]), cell(&answer.body["detail"]))));
    }
    let applied = client.understood(answer)?;
    if global.json {
        return output::json(&applied);
    }
    output::line("the configuration was read again")?;
    for key in applied["needs_restart"].as_array().into_iter().flatten() {
        output::line(format!("  {} changes at the next restart", cell(key)))?;
    }
    Ok(())
}
