//! `dealscale publish`: one event from the command line, through the admin socket or (with `--url`) the bridge itself.

use std::io::Read;

use serde_json::value::RawValue;
use serde_json::{Value, json};

use super::client::Client;
use super::output::cell;
use super::{Failure, Global, Outcome, output};
use crate::clock::Timestamp;
use crate::ids::{ExecutionId, OrderingKey, Tenant, Topic, Workflow};

#[derive(clap::Args, Debug)]
pub struct Command {
    #[arg(long)]
    workflow: Option<Workflow>,
    #[arg(long, conflicts_with = "workflow")]
    topic: Option<Topic>,
    #[arg(long, default_value = "default")]
    tenant: Tenant,
    /// JSON, or `-` to read it from standard input
    #[arg(long, default_value = "{}")]
    payload: String,
    #[arg(long)]
    execution_id: Option<ExecutionId>,
    #[arg(long)]
    ordering_key: Option<OrderingKey>,
    /// RFC 3339 time
    #[arg(long)]
    deliver_at: Option<Timestamp>,
    /// Wait until the event is final, and show it
    #[arg(long)]
    wait: bool,
}

pub async fn run(global: &Global, command: Command) -> Outcome {
    let mut payload = command.payload;
    if payload == "-" {
        payload.clear();
        std::io::stdin().read_to_string(&mut payload).map_err(|e| format!("cannot read standard input: {e}"))?;
    }
    let payload: Box<RawValue> = serde_json::from_str(&payload).map_err(|e| format!("--payload is not JSON: {e}"))?;
    let mut body = json!({ "tenant_id": command.tenant, "payload": payload });
    let optional = [
        ("workflow", command.workflow.map(|w| w.to_string())),
        ("topic", command.topic.map(|t| t.to_string())),
        ("execution_id", command.execution_id.map(|e| e.to_string())),
        ("ordering_key", command.ordering_key.map(|k| k.to_string())),
        ("deliver_at", command.deliver_at.map(|t| t.to_string())),
    ];
    for (key, value) in optional {
        if let Some(value) = value {
            body[key] = Value::String(value);
        }
    }
    if body.get("workflow").is_none() && body.get("topic").is_none() {
        return Err(Failure::from("say --workflow NAME or --topic TOPIC"));
    }
    let client = Client::new(global)?;
    let answer = client.post("/pulsar/publish", Some(body)).await?;
    if command.wait {
        let id = cell(&answer["execution_id"]);
        let path = super::client::query(
            &format!("/executions/{id}/wait"),
            &[("tenant", Some(command.tenant.to_string())), ("timeout", Some("60s".into()))],
        );
        return super::executions::show(global, &client.get(&path).await?);
    }
    if global.json {
        return output::json(&answer);
    }
    output::line(format!(
        "{} accepted on {} by route {} ({}){}",
        cell(&answer["execution_id"]),
        cell(&answer["topic"]),
        cell(&answer["route"]["name"]),
        cell(&answer["route"]["reason"]),
        if answer["duplicate"] == true { ", a duplicate" } else { "" }
    ))
}
