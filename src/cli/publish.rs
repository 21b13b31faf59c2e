//! `dealscale publish`: one event from the command line, through the admin socket.

use std::collections::BTreeMap;
use std::io::Read;

use serde_json::value::RawValue;

use reqwest::{Method, StatusCode};

use super::client::{Answer, Client};
use super::output::cell;
use super::{Failure, Global, Outcome, output};
use crate::clock::Timestamp;
use crate::ids::{ExecutionId, OrderingKey, Tenant, Topic, Workflow};
use crate::units::Span;

#[derive(clap::Args, Debug)]
pub struct Command {
    #[arg(long)]
    workflow: Option<Workflow>,
    #[arg(long, conflicts_with = "workflow")]
    topic: Option<Topic>,
    #[arg(long, default_value = "default")]
    tenant: Tenant,
    /// JSON, `@FILE` to read it from a file, or `-` from standard input
    #[arg(long, default_value = "{}")]
    payload: String,
    /// Sent again with the same key, it is the same event
    #[arg(long)]
    idempotency_key: Option<String>,
    /// 0 to 9
    #[arg(long)]
    priority: Option<u8>,
    /// Metadata, `key=value`; may be repeated
    #[arg(long, value_parser = super::routes::pair)]
    metadata: Vec<(String, String)>,
    #[arg(long)]
    execution_id: Option<ExecutionId>,
    #[arg(long)]
    ordering_key: Option<OrderingKey>,
    /// RFC 3339 time
    #[arg(long)]
    deliver_at: Option<Timestamp>,
    /// Wait until the event is final, and show it; exit code 3 when it did not end well, or not in time
    #[arg(long)]
    wait: bool,
    /// How long --wait waits
    #[arg(long, default_value = "1m")]
    timeout: Span,
}

/// As the bridge's API takes it.
#[derive(serde::Serialize)]
struct Body<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    workflow: Option<Workflow>,
    #[serde(skip_serializing_if = "Option::is_none")]
    topic: Option<Topic>,
    tenant_id: &'a Tenant,
    #[serde(skip_serializing_if = "Option::is_none")]
    execution_id: Option<ExecutionId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ordering_key: Option<OrderingKey>,
    #[serde(skip_serializing_if = "Option::is_none")]
    deliver_at: Option<Timestamp>,
    #[serde(skip_serializing_if = "Option::is_none")]
    priority: Option<u8>,
    #[serde(skip_serializing_if = "Option::is_none")]
    metadata: Option<BTreeMap<String, String>>,
    payload: &'a RawValue,
}

pub async fn run(global: &Global, command: Command) -> Outcome {
    let mut payload = command.payload;
    if payload == "-" {
        payload.clear();
        std::io::stdin().read_to_string(&mut payload).map_err(|e| format!("cannot read standard input: {e}"))?;
    } else if let Some(file) = payload.strip_prefix('@') {
        payload = std::fs::read_to_string(file).map_err(|e| format!("cannot read {file}: {e}"))?;
    }
    let payload: Box<RawValue> = serde_json::from_str(&payload).map_err(|e| format!("--payload is not JSON: {e}"))?;
    if command.workflow.is_none() && command.topic.is_none() {
        return Err(Failure::from("say --workflow NAME or --topic TOPIC"));
    }
    let metadata: BTreeMap<_, _> = command.metadata.into_iter().collect();
    // The payload goes as it is: numbers keep their digits, keys their order.
    let body = serde_json::to_string(&Body {
        workflow: command.workflow,
        topic: command.topic,
        tenant_id: &command.tenant,
        execution_id: command.execution_id,
        ordering_key: command.ordering_key,
        deliver_at: command.deliver_at,
        priority: command.priority,
        metadata: (!metadata.is_empty()).then_some(metadata),
        payload: &payload,
    });
    let body = body.map_err(|e| e.to_string())?;
    let client = Client::new(global)?;
    let headers: Vec<_> = command.idempotency_key.iter().map(|key| ("idempotency-key", key.as_str())).collect();
    let Answer { status, body: answer } =
        client.send_with(Method::POST, "/pulsar/publish", Some(body), &headers).await?;
    if status != StatusCode::ACCEPTED {
        // A refusal, or what n8n itself answered on a short route.
        let refused = client.understood(Answer { status, body: answer })?;
        return output::json(&refused);
    }
    if command.wait {
        let (id, tenant) = (cell(&answer["execution_id"]), Some(command.tenant.to_string()));
        return super::executions::wait(global, &client, &id, tenant, command.timeout).await;
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
