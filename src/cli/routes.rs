//! `dealscale routes explain`: the decision that the bridge would make, by the very same code.

use std::collections::BTreeMap;
use std::sync::Arc;

use clap::Subcommand;

use super::{Failure, Global, Outcome, environment, load, output};
use crate::config::masked;
use crate::ids::{Tenant, Topic, Workflow};
use crate::routing::{Input, Router};
use crate::units::Bytes;

#[derive(Subcommand, Debug)]
pub enum Command {
    /// All routes in the order in which they are tried
    Ls,
    /// Which route an event would take, and why
    Explain {
        /// Workflow that the event names
        #[arg(long)]
        workflow: Option<Workflow>,
        /// Topic that the event names instead of a workflow
        #[arg(long, conflicts_with = "workflow")]
        topic: Option<Topic>,
        #[arg(long, default_value = "default")]
        tenant: Tenant,
        /// Size of the payload
        #[arg(long, default_value = "1KiB")]
        bytes: Bytes,
        /// Metadata, `key=value`; may be repeated
        #[arg(long, value_parser = pair)]
        metadata: Vec<(String, String)>,
    },
}

pub(super) fn pair(text: &str) -> Result<(String, String), String> {
    text.split_once('=').map(|(k, v)| (k.to_owned(), v.to_owned())).ok_or_else(|| "expected key=value".into())
}

pub fn run(global: &Global, command: Command) -> Outcome {
    let config = load(global)?;
    let environment = environment(&config, global)?;
    let router = Router::new(Arc::new(environment.clone()));
    match command {
        Command::Ls if global.json => {
            let routes = router.routes().map(|r| {
                serde_json::json!({
                    "route": r.name, "class": r.class, "topic": r.topic, "webhook": masked(&r.webhook),
                    "consumer": format!("{:?}", r.consumer).to_lowercase(),
                })
            });
            output::json(&routes.collect::<Vec<_>>())
        }
        Command::Ls => output::table(
            &["route", "class", "topic", "webhook", "consumer"],
            router.routes().map(|r| {
                let consumer = format!("{:?}", r.consumer).to_lowercase();
                vec![r.name.clone(), r.class.as_str().into(), r.topic.clone(), masked(&r.webhook), consumer]
            }),
        ),
        Command::Explain { workflow, topic, tenant, bytes, metadata } => {
            if environment.tenant(&tenant).is_none() {
                return Err(Failure::Message(format!(
                    "tenant {tenant} is not declared in environment {}: 403",
                    environment.name
                )));
            }
            let metadata: BTreeMap<_, _> = metadata.into_iter().collect();
            let input = Input {
                workflow: workflow.as_ref(),
                topic: topic.as_ref(),
                tenant: &tenant,
                bytes: bytes.0,
                metadata: &metadata,
            };
            let decision = router.decide(input).map_err(|e| e.to_string())?;
            let route = decision.route;
            if global.json {
                return output::json(&serde_json::json!({
                    "route": route.name, "class": route.class, "topic": decision.topic, "webhook": masked(&route.webhook), "reason": decision.reason,
                }));
            }
            output::line(format!(
                "route    {}\nbecause  {}\nclass    {}\ntopic    {}\nwebhook  {}",
                route.name,
                decision.reason,
                route.class.as_str(),
                decision.topic,
                masked(&route.webhook)
            ))
        }
    }
}
