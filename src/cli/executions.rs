//! `dealscale executions`: what became of events.

use std::time::Duration;

use clap::Subcommand;
use serde_json::Value;

use super::client::{Client, query};
use super::output::cell;
use super::{Failure, Global, Outcome, output};
use crate::event::State;
use crate::ids::{ExecutionId, Tenant};
use crate::units::Span;

#[derive(Subcommand, Debug)]
pub enum Command {
    /// List events, newest first
    Ls {
        #[arg(long)]
        tenant: Option<Tenant>,
        /// accepted, relayed, delivering, delivered, succeeded, failed, unknown, dead or cancelled
        #[arg(long)]
        state: Option<State>,
        /// RFC 3339 time
        #[arg(long)]
        since: Option<crate::clock::Timestamp>,
        #[arg(long)]
        cursor: Option<String>,
        #[arg(long, default_value_t = 50)]
        limit: usize,
    },
    /// One event with every attempt
    Show {
        id: ExecutionId,
        #[arg(long)]
        tenant: Option<Tenant>,
    },
    /// Wait until an event is final; exit code 3 when it did not end well, or not in time
    Wait {
        id: ExecutionId,
        #[arg(long)]
        tenant: Option<Tenant>,
        /// Such as 30s
        #[arg(long, default_value = "30s")]
        timeout: Span,
    },
    /// Cancel an event that is not yet delivered
    Cancel {
        id: ExecutionId,
        #[arg(long)]
        tenant: Option<Tenant>,
    },
}

pub async fn run(global: &Global, command: Command) -> Outcome {
    let client = Client::new(global)?;
    let text = |t: Option<Tenant>| t.map(|t| t.to_string());
    match command {
        Command::Ls { tenant, state, since, cursor, limit } => {
            let path = query(
                "/executions",
                &[
                    ("tenant", text(tenant)),
                    ("state", state.map(|s| s.to_string())),
                    ("since", since.map(|s| s.to_string())),
                    ("cursor", cursor),
                    ("limit", Some(limit.to_string())),
                ],
            );
            list(global, &client.get(&path).await?)
        }
        Command::Show { id, tenant } => {
            show(global, &client.get(&query(&format!("/executions/{id}"), &[("tenant", text(tenant))])).await?)
        }
        Command::Wait { id, tenant, timeout } => wait(global, &client, &id.to_string(), text(tenant), timeout).await,
        Command::Cancel { id, tenant } => {
            let answer = client.delete(&query(&format!("/executions/{id}"), &[("tenant", text(tenant))])).await?;
            if global.json {
                output::json(&answer)
            } else {
                output::line(format!("{id} is {}", cell(&answer["state"])))
            }
        }
    }
}

/// Waits, in as many long polls as it takes, and shows the event.
pub(super) async fn wait(global: &Global, client: &Client, id: &str, tenant: Option<String>, timeout: Span) -> Outcome {
    let end = std::time::Instant::now() + timeout.0;
    loop {
        let left = end.saturating_duration_since(std::time::Instant::now());
        // Where it cannot be read, what any appliance takes.
        let poll_max = client.config.as_ref().map_or(Duration::from_secs(1), |c| c.bridge.wait_max.0);
        let poll = left.min(poll_max);
        let parameters = [("tenant", tenant.clone()), ("timeout", Some(format!("{}ms", poll.as_millis())))];
        let event = client.get(&query(&format!("/executions/{id}/wait"), &parameters)).await?;
        let state = event["state"].as_str().and_then(|s| s.parse::<State>().ok());
        let ended = state.is_some_and(State::is_final);
        if ended || std::time::Instant::now() >= end {
            show(global, &event)?;
            return match state {
                Some(State::Delivered | State::Succeeded) => Ok(()),
                _ => Err(Failure::Attention),
            };
        }
    }
}

/// A page of events.
pub(super) fn list(global: &Global, page: &Value) -> Outcome {
    if global.json {
        return output::json(page);
    }
    let rows = page["executions"].as_array().cloned().unwrap_or_default();
    output::table(
        &["execution", "tenant", "workflow", "state", "attempts", "accepted", "error"],
        rows.iter().map(|r| {
            ["execution_id", "tenant_id", "workflow", "state", "attempts", "accepted_at", "error"]
                .map(|k| short(&r[k]))
                .to_vec()
        }),
    )?;
    match &page["next"] {
        Value::String(next) => output::line(format!("\nmore: --cursor {next}")),
        _ => Ok(()),
    }
}

/// Lists (`attempts` as a list) as their length, texts cut to a column.
fn short(value: &Value) -> String {
    match value {
        Value::Array(items) => items.len().to_string(),
        other => cell(other).chars().take(60).collect(),
    }
}

pub(super) fn show(global: &Global, event: &Value) -> Outcome {
    if global.json {
        return output::json(event);
    }
    let fields = event.as_object().cloned().unwrap_or_default();
    let plain = fields.iter().filter(|(_, v)| !v.is_array() && !v.is_null());
    output::table(&["field", "value"], plain.map(|(k, v)| vec![k.clone(), cell(v)]))?;
    let attempts = event["history"].as_array().or_else(|| event["attempts"].as_array()).cloned().unwrap_or_default();
    if attempts.is_empty() {
        return Ok(());
    }
    output::line("")?;
    output::table(
        &["attempt", "started", "ms", "status", "error", "n8n execution", "message"],
        attempts.iter().map(|a| {
            ["number", "started_at", "duration_ms", "status", "error_class", "n8n_execution_id", "message_id"]
                .map(|k| cell(&a[k]))
                .to_vec()
        }),
    )
}
